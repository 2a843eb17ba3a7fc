"""Backbones: one file per family, registered with timm's registry. Installed as `attention_zoo.models`."""

from . import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    biformer_stl,
    combiner_lm,
    halonet,
    litv2,
    llama,
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
    "combiner_lm",
    "create_model",
    "halonet",
    "list_models",
    "litv2",
    "llama",
    "moh_dit",
    "moh_transnext",
    "vit",
]
