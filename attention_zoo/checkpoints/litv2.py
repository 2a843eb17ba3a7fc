"""Official checkpoints of LITv2 (ziplab/LITv2): HiLo layers, the token merging, classifiers and dense backbones.

Stages are `layers` there, and the merging's convolution and normalisation and the depthwise convolution have longer names. HiLo's
parameters keep theirs; output_proj="full", which is ours, gets the two official projections as the blocks of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys, take_backbone, taken_stages
from attention_zoo.registry import attention_class, register_converter

__all__ = ["convert_dtm", "convert_hilo", "convert_litv2"]

State = dict[str, Tensor]

_MERGING_RULES = [(r"(.*\.)?dconv\.", r"\g<1>conv."), (r"(.*\.)?norm_layer\.", r"\g<1>norm.")]
_RULES = [
    (r"layers\.(\d+)\.downsample\.dconv\.", r"stages.\1.downsample.conv."),
    (r"layers\.(\d+)\.downsample\.norm_layer\.", r"stages.\1.downsample.norm."),
    (r"layers\.(.*)\.dwconv\.dwconv\.", r"stages.\1.dwconv."),
    (r"layers\.", "stages."),
]


@register_converter("hilo")
def convert_hilo(
    state_dict: State,
    *,
    num_heads: int = 8,
    window_size: int = 2,
    alpha: float = 0.5,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    output_proj: str = "split",
    **options: Any,
) -> State:
    """One `hilo` layer; `options` are the constructor's other arguments, which change no key."""
    if qk_norm:
        raise CheckpointError("official HiLo layers do not normalise queries and keys: leave out qk_norm")
    state = rename_keys(state_dict, (), expected=_hilo_keys(num_heads, alpha, window_size, qkv_bias))
    if output_proj == "full":
        branches = [name for name in ("h_proj", "l_proj") if f"{name}.weight" in state]
        weights, biases = ([state.pop(f"{name}.{kind}") for name in branches] for kind in ("weight", "bias"))
        state |= {"proj.weight": torch.block_diag(*weights), "proj.bias": torch.cat(biases)}
    return state


@register_converter("dtm")
def convert_dtm(state_dict: State, **options: Any) -> State:
    """One `dtm` layer; `options` are the constructor's arguments, which change no key."""
    return rename_keys(state_dict, _MERGING_RULES, expected=_merging_keys())


@register_converter("litv2")
def convert_litv2(
    state_dict: State,
    *,
    depths: Sequence[int],
    num_heads: Sequence[int],
    num_classes: int = 1000,
    qkv_bias: bool = True,
    alpha: float = 0.9,
    window_sizes: Sequence[int] = (0, 0, 2, 1),
    has_attn: Sequence[int | bool] = (0, 0, 1, 1),
    patch_norm: bool = True,
    attention: str = "hilo",
    attention_kwargs: Mapping[str, Any] | None = None,
    features_only: bool = False,
    feature_cls: Any = None,
    out_indices: int | Sequence[int] | None = None,
    out_norm: Sequence[bool] | None = None,
    **options: Any,
) -> State:
    """A whole LITv2; arguments as for `create_model`, `options` are those that change no key.

    Takes classifiers, dense backbones, and the detectors they stand in (keys under `backbone.`; the rest is left out). With
    num_classes=0 an official head is left out; with features_only, so are an official classifier's norm and head, and stages that
    no map needs.

    Raises:
        CheckpointError: another mechanism or feature class than the official ones, unknown or missing keys.
    """
    if attention != "hilo":
        raise CheckpointError(f"official LITv2 checkpoints have HiLo in their blocks, not {attention!r}")
    if feature_cls not in (None, "getter"):
        raise CheckpointError(f"no conversion to timm's feature class {feature_cls!r}; without feature_cls, LITv2 has its own")
    state_dict = take_backbone(state_dict)
    layers: list[dict[str, Any] | None] = []
    for i, heads in enumerate(num_heads):
        own = {"num_heads": heads, "alpha": alpha, "window_size": window_sizes[i], "qkv_bias": qkv_bias}
        layers.append({**own, **(attention_kwargs or {})} if has_attn[i] else None)
    expected = parameter_keys("patch_embed.proj", *(["patch_embed.norm"] if patch_norm else []))
    for i, (depth, layer) in enumerate(zip(depths, layers, strict=True)):
        expected += [f"layers.{i}.blocks.{j}.{key}" for j in range(depth) for key in _block_keys(layer)]
        expected += [f"layers.{i}.downsample.{key}" for key in _merging_keys()] if i < len(depths) - 1 else []
    norm, head, optional = parameter_keys("norm"), parameter_keys("head"), []
    if features_only:
        stages = taken_stages(len(depths), out_indices)
        expected += parameter_keys(*(f"norm{i}" for i in _normed_stages(len(depths), stages, out_norm)))
        optional, dropped = norm + head, [*norm, *head, *_unused(len(depths), stages)]
    else:
        expected += norm + (head if num_classes else [])
        optional, dropped = head, [] if num_classes else head
    prefix = "" if feature_cls is None else "model."
    state = rename_keys(state_dict, (), expected=expected, optional=optional)
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(tuple(dropped))}
    kept = _convert_layers(kept, layers)
    renamed = rename_keys(kept, _RULES, expected=kept)
    return {prefix + key: tensor for key, tensor in renamed.items()}


def _convert_layers(state: State, layers: Sequence[Mapping[str, Any] | None]) -> State:
    """Pass every block's attention through `convert_hilo`, which knows the options that change keys."""
    converted: State = {}
    blocks: dict[str, State] = {}
    for key, tensor in state.items():
        block, found, name = key.partition(".attn.")
        if found:
            blocks.setdefault(block, {})[name] = tensor
        else:
            converted[key] = tensor
    for block, own in blocks.items():
        layer = layers[int(block.split(".")[1])] or {}
        converted.update({f"{block}.attn.{key}": tensor for key, tensor in convert_hilo(own, **layer).items()})
    return converted


def _block_keys(layer: Mapping[str, Any] | None) -> list[str]:
    keys = parameter_keys("norm2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2")
    if layer is None:
        return keys
    attention = _hilo_keys(layer["num_heads"], layer["alpha"], layer["window_size"], layer["qkv_bias"])
    return [*keys, *parameter_keys("norm1"), *(f"attn.{key}" for key in attention)]


def _hilo_keys(num_heads: int, alpha: float, window_size: int, qkv_bias: bool) -> list[str]:
    h_heads, l_heads = attention_class("hilo").count_heads(num_heads, alpha, window_size)  # type: ignore[attr-defined]
    high = parameter_keys("h_qkv", bias=qkv_bias) + parameter_keys("h_proj") if h_heads else []
    low = parameter_keys("l_q", "l_kv", bias=qkv_bias) + parameter_keys("l_proj") if l_heads else []
    return high + low


def _merging_keys() -> list[str]:
    statistics = [f"norm_layer.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    return parameter_keys("dconv", "dconv.conv_offset", "norm_layer") + statistics


def _normed_stages(num_stages: int, stages: Sequence[int], out_norm: Sequence[bool] | None) -> list[int]:
    if out_norm is None:
        return []
    of_stage = dict(zip(range(num_stages) if len(out_norm) == num_stages else stages, out_norm, strict=True))
    return [i for i in stages if of_stage[i]]


def _unused(num_stages: int, stages: Sequence[int]) -> list[str]:
    """Prefixes of what comes after the last stage that is returned."""
    last = max(stages)
    after = [f"layers.{i}." for i in range(last + 1, num_stages)]
    return [f"layers.{last}.downsample.", *after]
