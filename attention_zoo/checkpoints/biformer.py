"""Official checkpoints of BiFormer (rayleizhu/BiFormer): both implementations of its layers, classifiers and dense backbones.

The first implementation names the projections `qkv.qkv` and `wo`, the later one (nchw) `qkv_linear` and `output_linear`, with 1x1
convolutions where ours are linear layers. All other names are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys, take_backbone, taken_stages
from attention_zoo.registry import register_converter

__all__ = ["convert_biformer", "convert_biformer_stl", "convert_bra", "convert_lepe_attention"]

State = dict[str, Tensor]

_RULES = [(r"(.*\.)?(qkv\.qkv|qkv_linear)\.", r"\g<1>qkv."), (r"(.*\.)?(wo|output_linear)\.", r"\g<1>proj.")]


@register_converter("bra")
def convert_bra(
    state_dict: State,
    *,
    side_dwconv: int = 3,
    qkv_bias: bool = True,
    out_proj: bool = True,
    param_routing: bool = False,
    **options: Any,
) -> State:
    """One `bra` layer of either implementation; `options` are the constructor's other arguments, which change no key."""
    nchw = any(key.startswith("qkv_linear.") for key in state_dict)
    return _squeeze(rename_keys(state_dict, _RULES, expected=_bra_keys(side_dwconv, qkv_bias, out_proj, param_routing, nchw=nchw)))


@register_converter("lepe_attention")
def convert_lepe_attention(state_dict: State, *, side_dwconv: int = 5, qkv_bias: bool = False, **options: Any) -> State:
    """One `lepe_attention` layer of either implementation; `options` are the constructor's other arguments."""
    return _squeeze(rename_keys(state_dict, (), expected=_lepe_keys(side_dwconv, qkv_bias)))


@register_converter("biformer")
def convert_biformer(
    state_dict: State,
    *,
    depths: Sequence[int],
    topks: Sequence[int] = (1, 4, 16, -2),
    side_dwconv: int = 5,
    pos_dwconv: int = 3,
    layer_scale_init: float | None = None,
    mlp_dwconv: bool = False,
    param_routing: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> State:
    """A whole BiFormer; arguments as for `create_model`, `options` as for `_convert_model`.

    Takes classifiers, dense backbones, and the detectors they stand in (keys under `backbone.`; the rest is left out). With
    num_classes=0 an official head is left out; with features_only, so are an official classifier's norm and head, and stages and
    norms that no map needs.

    Raises:
        CheckpointError: another mechanism or feature class than the official ones, unknown or missing keys.
    """
    shared = parameter_keys("norm1", "norm2", "mlp.0", "mlp.3")
    shared += parameter_keys("pos_embed") if pos_dwconv else []
    shared += parameter_keys("mlp.1.dwconv") if mlp_dwconv else []
    shared += ["gamma1", "gamma2"] if layer_scale_init is not None else []
    expected = [
        *_conv_keys("downsample_layers.0.0", "downsample_layers.0.1"),
        *_conv_keys("downsample_layers.0.3", "downsample_layers.0.4"),
    ]
    for i, (depth, topk) in enumerate(zip(depths, topks, strict=True)):
        expected += _conv_keys(f"downsample_layers.{i}.0", f"downsample_layers.{i}.1") if i else []
        if topk > 0:
            layer = {"side_dwconv": side_dwconv, "param_routing": param_routing, **(attention_kwargs or {})}
            own = _bra_keys(**{k: v for k, v in layer.items() if k in _BRA_OPTIONS})
        else:
            own = parameter_keys("1", "2", "3") if topk == 0 else _lepe_keys(side_dwconv if topk == -2 else 0)
        expected += [f"stages.{i}.{j}.{key}" for j in range(depth) for key in (*shared, *(f"attn.{key}" for key in own))]
    return _convert_model(state_dict, expected, len(depths), **options)


@register_converter("biformer_stl")
def convert_biformer_stl(
    state_dict: State,
    *,
    depths: Sequence[int],
    topks: Sequence[int] | None = None,
    side_dwconv: int = 5,
    variant: str = "legacy",
    attention_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> State:
    """A whole BiFormer in Swin-T's layout, either variant; arguments as for `convert_biformer`."""
    nchw = variant == "nchw"
    topks = (*(1 for _ in depths[:-1]), -1) if topks is None else topks  # only the sign matters here
    expected = _conv_keys("downsample_layers.0.0", "downsample_layers.0.1")
    for i, (depth, topk) in enumerate(zip(depths, topks, strict=True)):
        expected += _conv_keys(f"downsample_layers.{i}.1", f"downsample_layers.{i}.0") if i else []
        if topk > 0:
            layer = {"side_dwconv": side_dwconv, **(attention_kwargs or {})}
            own = _bra_keys(**{k: v for k, v in layer.items() if k in _BRA_OPTIONS}, nchw=nchw)
        else:
            own = _lepe_keys(5 if nchw else side_dwconv)
        block = [*parameter_keys("norm1", "norm2", "mlp.0", "mlp.2"), *(f"attn.{key}" for key in own)]
        expected += [f"stages.{i}.blocks.{j}.{key}" for j in range(depth) for key in block]
    return _squeeze(_convert_model(state_dict, expected, len(depths), **options))


def _convert_model(
    state_dict: State,
    expected: list[str],
    num_stages: int,
    *,
    num_classes: int = 1000,
    attention: str = "bra",
    features_only: bool = False,
    feature_cls: Any = None,
    out_indices: int | Sequence[int] | None = None,
    out_norm: str | None = None,
    **options: Any,
) -> State:
    """Rename, once the keys of the stages are known; `options` are the model's other arguments, which change no key."""
    if attention != "bra":
        raise CheckpointError(f"official BiFormer checkpoints have BRA in their blocks, not {attention!r}")
    if feature_cls not in (None, "getter"):
        raise CheckpointError(f"no conversion to timm's feature class {feature_cls!r}; without feature_cls, BiFormer has its own")
    norm, head, optional = [*parameter_keys("norm"), *_statistics("norm")], parameter_keys("head"), []
    if features_only:
        stages = taken_stages(num_stages, out_indices)
        after = range(max(stages) + 1, num_stages)
        dropped = [*norm, *head, *(f"{room}.{i}." for i in after for room in ("stages", "downsample_layers"))]
        optional = norm + head
        if out_norm is not None:
            expected = expected + parameter_keys(*(f"extra_norms.{i}" for i in stages))
            unused = [f"extra_norms.{i}" for i in range(num_stages) if i not in stages]
            optional, dropped = optional + parameter_keys(*unused), dropped + unused
    else:
        expected = expected + norm + (head if num_classes else [])
        optional, dropped = head, [] if num_classes else head
    state = rename_keys(take_backbone(state_dict), _RULES, expected=expected, optional=optional)
    prefix = "" if feature_cls is None else "model."
    return {prefix + key: tensor for key, tensor in state.items() if not key.startswith(tuple(dropped))}


def _squeeze(state: State) -> State:
    """The later implementation's 1x1 convolutions as linear layers; all but a LePE of side 1, which is depthwise."""
    return {
        key: tensor.flatten(1) if tensor.shape[2:] == (1, 1) and not re.match(r"(.*\.)?lepe\.", key) else tensor
        for key, tensor in state.items()
    }


_BRA_OPTIONS = ("side_dwconv", "qkv_bias", "out_proj", "param_routing")


def _bra_keys(
    side_dwconv: int = 3, qkv_bias: bool = True, out_proj: bool = True, param_routing: bool = False, nchw: bool = False
) -> list[str]:
    keys = parameter_keys("qkv_linear" if nchw else "qkv.qkv", bias=qkv_bias)
    keys += parameter_keys("output_linear" if nchw else "wo") if out_proj else []
    keys += parameter_keys("lepe") if side_dwconv else []
    return keys + (parameter_keys("router.emb") if param_routing else [])


def _lepe_keys(side_dwconv: int = 5, qkv_bias: bool = False) -> list[str]:
    keys = parameter_keys("qkv", bias=qkv_bias) + parameter_keys("proj")
    return keys + (parameter_keys("lepe") if side_dwconv else [])


def _conv_keys(conv: str, norm: str) -> list[str]:
    """A convolution and its batch normalisation."""
    return [*parameter_keys(conv, norm), *_statistics(norm)]


def _statistics(norm: str) -> list[str]:
    return [f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
