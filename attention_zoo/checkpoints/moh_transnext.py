"""Official checkpoints of MoH-TransNeXt (SkyworkAI/MoH) and of TransNeXt (DaiShiResearch/TransNeXt): layers and backbones.

The official names are ours but for the routers, which are renamed as in every Mixture-of-Head layer. A TransNeXt has no
routers: they start at zero, which makes every gate 1, so that with K = h_r (`routed_topk`) the model computes what the
TransNeXt does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys
from attention_zoo.checkpoints.moh import ROUTERS, convert_layer, official_shapes
from attention_zoo.registry import register_converter

__all__ = ["convert_aggregated", "convert_global", "convert_moh_transnext"]

State = dict[str, Tensor]

_RULES = [(rf"(.*\.attn\.){name}\.", rf"\g<1>{ours}.") for name, ours in ROUTERS.items()]


@register_converter("moh_transnext_global")
def convert_global(state_dict: State, **kwargs: Any) -> State:
    """One global layer -> `MoHTransNeXtGlobal(**kwargs)`'s. Raises CheckpointError."""
    shapes = official_shapes("moh_transnext_global", **kwargs)
    return convert_layer("moh_transnext_global", _add_routers(state_dict, shapes), **kwargs)


@register_converter("moh_transnext_aggregated")
def convert_aggregated(state_dict: State, **kwargs: Any) -> State:
    """One aggregated layer -> `MoHTransNeXtAggregated(**kwargs)`'s. Raises CheckpointError."""
    shapes = official_shapes("moh_transnext_aggregated", **kwargs)
    return convert_layer("moh_transnext_aggregated", _add_routers(state_dict, shapes), **kwargs)


@register_converter("moh_transnext")
def convert_moh_transnext(
    state_dict: State,
    *,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    shared_heads: Sequence[int],
    routed_topk: Sequence[int],
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    window_sizes: Sequence[int | None] = (3, 3, 3, None),
    qkv_bias: bool = True,
    num_classes: int = 1000,
    attention: str | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    features_only: bool = False,
    feature_cls: Any = None,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> State:
    """A whole MoH-TransNeXt; arguments as for `create_model`, `options` are those that change no key.

    With num_classes=0 an official head is left out; with features_only, so are the head and the stages that no map needs.

    Raises:
        CheckpointError: another mechanism or feature class than the official ones, unknown or missing keys.
    """
    if attention is not None:
        raise CheckpointError(f"official checkpoints have the published attentions in their blocks, not {attention!r}")
    if feature_cls not in (None, "getter"):
        raise CheckpointError(f"no conversion to timm's feature class {feature_cls!r}; leave feature_cls out")
    shapes: dict[str, tuple[int, ...] | None] = {}
    for i, depth in enumerate(depths, 1):
        name = "moh_transnext_global" if sr_ratios[i - 1] == 1 else "moh_transnext_aggregated"
        own = {} if sr_ratios[i - 1] == 1 else {"window_size": window_sizes[i - 1] or 3}
        heads = {"num_heads": num_heads[i - 1], "shared_heads": shared_heads[i - 1], "routed_topk": routed_topk[i - 1]}
        layer = official_shapes(name, dim=embed_dims[i - 1], qkv_bias=qkv_bias, **{**heads, **own, **(attention_kwargs or {})})
        shapes |= dict.fromkeys(parameter_keys(f"patch_embed{i}.proj", f"patch_embed{i}.norm", f"norm{i}"))
        for j in range(depth):
            block = f"block{i}.{j}."
            shapes |= {f"{block}attn.{key}": shape for key, shape in layer.items()}
            rest = parameter_keys("norm1", "norm2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2")
            shapes |= dict.fromkeys(block + key for key in rest)
    head = parameter_keys("head")
    wanted = head if num_classes and not features_only else []
    state_dict = _add_routers(state_dict, shapes)
    state = rename_keys(state_dict, _RULES, expected=[*shapes, *wanted], optional=head)
    last = _last_stage(len(depths), out_indices) if features_only else len(depths)
    after = tuple(f"{part}{i}." for i in range(last + 1, len(depths) + 1) for part in ("patch_embed", "block", "norm"))
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(after) and (wanted or key not in head)}
    prefix = "model." if features_only else ""
    return {prefix + key: tensor for key, tensor in kept.items()}


def _add_routers(state_dict: State, shapes: Mapping[str, tuple[int, ...] | None]) -> State:
    """The state dict of a TransNeXt, which has none, with routers of zeros; any other as it is."""
    routers = {key: shape for key, shape in shapes.items() if key.split(".")[-2:][0] in ROUTERS}
    like = next((tensor for key, tensor in state_dict.items() if key.endswith("temperature")), None)
    if like is None or state_dict.keys() & routers.keys():
        return state_dict
    zeros = {key: torch.zeros(shape, dtype=like.dtype, device=like.device) for key, shape in routers.items() if shape}
    return {**state_dict, **zeros}


def _last_stage(num_stages: int, out_indices: int | Sequence[int] | None) -> int:
    """Number of the last stage, counted from 1, that a map is taken of."""
    if out_indices is None or isinstance(out_indices, int):  # all, or the last n
        return num_stages
    return max(i % num_stages for i in out_indices) + 1
