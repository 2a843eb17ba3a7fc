"""Official checkpoints of MoH-DiT (SkyworkAI/MoH), and of the dense DiT that it is made from: only routers have other names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, rename_keys
from attention_zoo.checkpoints.moh import ROUTERS
from attention_zoo.registry import model_builder, register_converter

__all__ = ["convert_moh_dit"]


@register_converter("moh_dit")
def convert_moh_dit(state_dict: dict[str, Tensor], *, attention: str = "moh", **kwargs: Any) -> dict[str, Tensor]:
    """A whole model, arguments as for `create_model`. With attention="mha", a dense DiT.

    Raises:
        CheckpointError: another mechanism than the official ones, unknown or missing keys.
    """
    if attention not in ("moh", "mha"):
        raise CheckpointError(f"official checkpoints have MoH attention or plain attention in their blocks, not {attention!r}")
    build = model_builder("moh_dit")
    assert build is not None  # registered with the family
    own = build("moh_dit", "moh_dit", attention=attention, **{**kwargs, "device": "meta"}).state_dict()
    official = {ours: name for name, ours in ROUTERS.items()}
    expected = [".".join(official.get(part, part) for part in key.split(".")) for key in own]
    rules = [(rf"(blocks\.\d+\.attn)\.{name}\.", rf"\1.{ours}.") for name, ours in ROUTERS.items()]
    return rename_keys(state_dict, rules, expected=expected)
