"""Backbones: one file per family, registered with timm's registry. Installed as `attention_zoo.models`."""

from . import halonet, litv2, llama, vit
from ._factory import create_model, list_models

__all__ = ["create_model", "list_models", "halonet", "litv2", "llama", "vit"]
