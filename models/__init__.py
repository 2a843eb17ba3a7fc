"""Backbones and decoders: one file per family, in timm's registry or transformers'. Installed as `attention_zoo.models`."""

from . import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    biformer_stl,
    decoders,
    halonet,
    litv2,
    moh_dit,
    moh_transnext,
    vit,
)
from ._factory import create_model, list_models

__all__ = [
    "agent_cswin",
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "biformer",
    "biformer_stl",
    "create_model",
    "decoders",
    "halonet",
    "list_models",
    "litv2",
    "moh_dit",
    "moh_transnext",
    "vit",
]
