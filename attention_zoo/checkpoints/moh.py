"""Official Mixture-of-Head layers (SkyworkAI/MoH): the routers have other names, everything else keeps its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import rename_keys
from attention_zoo.registry import create_attention, register_converter

__all__ = ["ROUTERS", "convert_layer", "convert_moh", "official_shapes"]

# Official router -> ours, as the last part but one of a key.
ROUTERS = {"wg": "router", "wg_1": "shared_router", "wg_0": "balance"}


@register_converter("moh")
def convert_moh(state_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """The state dict of one official attention layer -> `MoHAttention(**kwargs)`'s. Raises CheckpointError."""
    return convert_layer("moh", state_dict, **kwargs)


def convert_layer(name: str, state_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """One official layer of the mechanism `name` -> that of `create_attention(name, **kwargs)`. Raises CheckpointError."""
    rules = [(rf"{official}\.", f"{ours}.") for official, ours in ROUTERS.items()]
    return rename_keys(state_dict, rules, expected=official_shapes(name, **kwargs))


def official_shapes(name: str, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of the layer `create_attention(name, **kwargs)`."""
    official = {ours: router for router, ours in ROUTERS.items()}
    own = create_attention(name, **{**kwargs, "device": "meta"}).state_dict()
    split = ((*key.rpartition("."), tuple(tensor.shape)) for key, tensor in own.items())
    return {f"{official.get(module, module)}.{kind}" if module else kind: shape for module, _, kind, shape in split}
