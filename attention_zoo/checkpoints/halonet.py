"""Checkpoints of halo attention and of networks built on it (timm's HaloNets): every key keeps its name.

timm's files are the only ones there are. What they may lack is filled in: counters of batch normalisations with 0, an output
projection (ours) with the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, rename_keys
from attention_zoo.registry import create_attention, register_converter

__all__ = ["convert_halo", "convert_halonet"]

State = dict[str, Tensor]


@register_converter("halo")
def convert_halo(state_dict: State, **kwargs: Any) -> State:
    """The state dict of one timm layer -> `HaloAttention(**kwargs)`'s. Raises CheckpointError."""
    return _convert(state_dict, create_attention("halo", **{**kwargs, "device": "meta"}).state_dict())


@register_converter("halonet")
def convert_halonet(
    state_dict: State,
    *,
    attention: str = "halo",
    num_classes: int = 1000,
    features_only: bool = False,
    out_indices: Any = None,
    feature_cls: Any = None,
    **options: Any,
) -> State:
    """A whole network; arguments as for `create_model`.

    With num_classes=0 an official head is left out; with features_only, everything that no map needs.

    Raises:
        CheckpointError: another mechanism than halo attention, another feature class than timm's default, unknown or missing keys.
    """
    if attention != "halo":
        raise CheckpointError(f"checkpoints of HaloNets have halo attention in their blocks, not {attention!r}")
    if feature_cls is not None:
        raise CheckpointError(f"no conversion to timm's feature class {feature_cls!r}; leave out feature_cls")
    build = {**options, "device": "meta"}
    full = timm.create_model("halonet", num_classes=num_classes, **build).state_dict()
    head = ("head.fc.weight", "head.fc.bias")
    if not features_only:
        return _convert(state_dict, full, dropped=head)
    taken = {} if out_indices is None else {"out_indices": out_indices}
    backbone = timm.create_model("halonet", features_only=True, **taken, **build).state_dict()
    names = {re.sub(r"^(stem|stages)_", r"\1.", key): key for key in backbone}  # timm's feature list flattens the first level
    unused = [key for key in full if key not in names]
    state = _convert(state_dict, {key: full[key] for key in names}, dropped=[*unused, *head])
    return {names[key]: tensor for key, tensor in state.items()}


def _convert(state: State, own: Mapping[str, Tensor], dropped: Iterable[str] = ()) -> State:
    """Check the keys against those of `own`, leave out what is `dropped` and not in `own`, and fill in what files may lack."""
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    projections = {key for key in own if re.search(r"(^|self_attn\.)proj\.", key)}
    state = rename_keys(state, (), expected=own.keys() - counters - projections, optional=[*counters, *projections, *dropped])
    state = {key: tensor for key, tensor in state.items() if key in own}
    for key in own.keys() - state.keys():
        like = next(iter(state.values()))
        if key in counters:
            state[key] = torch.zeros((), dtype=torch.long, device=like.device)
        elif key.endswith("weight"):
            state[key] = torch.eye(len(own[key]), dtype=like.dtype, device=like.device)
        else:
            state[key] = torch.zeros_like(own[key], dtype=like.dtype, device=like.device)
    return state
