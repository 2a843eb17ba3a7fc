"""Official checkpoints of Key-Driven Grouped Query Attention (zohaib-khan5040/key-driven-gqa): layers and Vision Transformers.

The names are ours, with two exceptions: the official multi-head baseline keeps q, k and v apart where timm's Vision Transformer has
them fused, and dgqa's allocation is not saved, so that it starts even, as the official code starts after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys
from attention_zoo.registry import attention_class, register_converter

__all__ = ["convert_dgqa", "convert_gqa", "convert_kdgqa", "convert_vit_kdgqa"]

State = dict[str, Tensor]


@register_converter("gqa", "pgqa")
def convert_gqa(state_dict: State, *, qkv_bias: bool = False, proj_bias: bool = True, **options: Any) -> State:
    """One `gqa` or `pgqa` layer; `options` are the constructor's other arguments, which change no key."""
    return rename_keys(state_dict, (), expected=_layer_keys(qkv_bias, proj_bias))


@register_converter("kdgqa")
def convert_kdgqa(
    state_dict: State,
    *,
    num_heads: int = 8,
    alloc_scope: str = "batch",
    qkv_bias: bool = False,
    proj_bias: bool = True,
    **options: Any,
) -> State:
    """One `kdgqa` layer; with alloc_scope="frozen" it gets the even allocation."""
    state = rename_keys(state_dict, (), expected=_layer_keys(qkv_bias, proj_bias))
    if alloc_scope == "frozen":
        num_kv_heads = state["k.weight"].shape[0] * num_heads // state["q.weight"].shape[0]
        state["allocation"] = _initial_allocation("kdgqa", num_heads, num_kv_heads, like=state["q.weight"])
    return state


@register_converter("dgqa")
def convert_dgqa(state_dict: State, *, num_heads: int = 8, qkv_bias: bool = False, proj_bias: bool = True, **options: Any) -> State:
    """One `dgqa` layer; the allocation, which official files do not hold, is even."""
    state = rename_keys(state_dict, (), expected=[*_layer_keys(qkv_bias, proj_bias), "cache"])
    state["cache"] = state["cache"].float()
    state["allocation"] = _initial_allocation("dgqa", num_heads, len(state["cache"]), like=state["cache"])
    return state


@register_converter("vit_kdgqa")
def convert_vit_kdgqa(
    state_dict: State,
    *,
    attention: str | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    depth: int = 12,
    num_heads: int = 12,
    num_classes: int = 1000,
    qkv_bias: bool = True,
    proj_bias: bool = True,
    **options: Any,
) -> State:
    """A Vision Transformer with one of the four mechanisms, or the multi-head baseline (attention "mha" or None).

    Arguments as for `create_model`, `depth` and `num_heads` those of timm's base size unless given. With num_classes=0 an official
    head is left out.
    """
    layer = {"num_heads": num_heads, "qkv_bias": qkv_bias, "proj_bias": proj_bias, **(attention_kwargs or {})}
    convert_layer = _LAYERS.get(attention or "mha")
    if convert_layer is None:
        raise CheckpointError(f"the official Vision Transformers have {', '.join(_LAYERS)} in their blocks, not {attention!r}")
    blocks = [f"blocks.{i}." for i in range(depth)]
    attention_keys = [*_layer_keys(layer["qkv_bias"], layer["proj_bias"]), *(["cache"] if attention == "dgqa" else [])]
    expected = [*parameter_keys("patch_embed.proj", "norm"), "cls_token", "pos_embed"]
    expected += [block + key for block in blocks for key in parameter_keys("norm1", "norm2", "mlp.fc1", "mlp.fc2")]
    expected += [f"{block}attn.{key}" for block in blocks for key in attention_keys]
    head = parameter_keys("head")
    state = rename_keys(state_dict, (), expected=expected + (head if num_classes else []), optional=head)
    converted = {key: tensor for key, tensor in state.items() if ".attn." not in key and (num_classes or key not in head)}
    for block in blocks:
        own = convert_layer({key: state[f"{block}attn.{key}"] for key in attention_keys}, **layer)
        converted.update({f"{block}attn.{key}": tensor for key, tensor in own.items()})
    return converted


def _fuse(state: State, *, qkv_bias: bool, proj_bias: bool, **options: Any) -> State:
    """The multi-head baseline's layer as timm's: rows [q; k; v]."""
    kinds = ["weight", "bias"] if qkv_bias else ["weight"]
    fused = {f"qkv.{kind}": torch.cat([state[f"{name}.{kind}"] for name in "qkv"]) for kind in kinds}
    return {**fused, **{key: state[key] for key in parameter_keys("proj", bias=proj_bias)}}


_LAYERS = {"gqa": convert_gqa, "kdgqa": convert_kdgqa, "dgqa": convert_dgqa, "pgqa": convert_gqa, "mha": _fuse}


def _layer_keys(qkv_bias: bool, proj_bias: bool) -> list[str]:
    return parameter_keys("q", "k", "v", bias=qkv_bias) + parameter_keys("proj", bias=proj_bias)


def _initial_allocation(name: str, num_heads: int, num_kv_heads: int, like: Tensor) -> Tensor:
    return attention_class(name).initial_allocation(num_heads, num_kv_heads, device=like.device)  # type: ignore[attr-defined]
