"""Backbones: one file per family, registered with timm's registry. Installed as `attention_zoo.models`."""

from attention_zoo.models import vit
from attention_zoo.models._factory import create_model, list_models

__all__ = ["create_model", "list_models", "vit"]
