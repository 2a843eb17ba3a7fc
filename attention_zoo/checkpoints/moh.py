"""Official Mixture-of-Head layers (SkyworkAI/MoH): the routers have other names, everything else keeps its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import rename_keys
from attention_zoo.registry import create_attention, register_converter

# Official router -> ours, as the last part but one of a key.
_ROUTERS = {"wg": "router", "wg_1": "shared_router", "wg_0": "balance"}


@register_converter("moh")
def convert_moh(state_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """The state dict of one official attention layer -> `MoHAttention(**kwargs)`'s. Raises CheckpointError."""
    official = {ours: name for name, ours in _ROUTERS.items()}
    own = create_attention("moh", **{**kwargs, "device": "meta"}).state_dict()
    expected = [f"{official.get(module, module)}.{kind}" for module, _, kind in (key.rpartition(".") for key in own)]
    return rename_keys(state_dict, [(rf"{name}\.", f"{ours}.") for name, ours in _ROUTERS.items()], expected=expected)
