"""Official checkpoints of Agent Attention (LeapLabTHU/Agent-Attention): single layers, Agent-DeiT, Agent-PVT; other resolutions.

Names are ours already. A checkpoint of another image size than the model is built for is resampled on the way, as the official
loader does: `resize_state`, which the converters of the other Agent backbones use as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys
from attention_zoo.registry import create_attention, register_converter

__all__ = ["convert_agent", "convert_agent_deit", "convert_agent_pvt", "fit_projections", "refit_head", "resize_state"]

State = dict[str, Tensor]
Grid = tuple[int, int]


@register_converter("agent")
def convert_agent(state_dict: State, **kwargs: Any) -> State:
    """The state dict of one official layer -> `AgentAttention(**kwargs)`'s.

    Fused and separate projections are turned into each other, and tables of another grid are resampled to `window_size`.

    Raises:
        CheckpointError: unknown or missing keys.
    """
    own = create_attention("agent", **{**kwargs, "device": "meta"}).state_dict()
    state = fit_projections(state_dict, own)
    return resize_state(rename_keys(state, (), expected=own), own)


def fit_projections(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> State:
    """Fuse `q` and `kv` to `qkv`, or split it, wherever `wanted` (our keys) has the other form; all other tensors stay."""
    fitted = dict(state)
    for key in wanted:
        module, _, kind = key.rpartition(".")
        layer, _, name = module.rpartition(".")
        q, kv, qkv = (f"{layer}.{projection}.{kind}".lstrip(".") for projection in ("q", "kv", "qkv"))
        if name == "qkv" and qkv not in fitted and q in fitted and kv in fitted:
            fitted[qkv] = torch.cat([fitted.pop(q), fitted.pop(kv)])
        elif name == "q" and q not in fitted and kv in wanted and qkv in fitted:
            fused = fitted.pop(qkv)
            rows = fused.shape[0] // 3
            fitted[q], fitted[kv] = fused.split([rows, 2 * rows])
    return fitted


def resize_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Any], *, grids: Mapping[str, Grid] | None = None, num_prefix_tokens: int = 0
) -> State:
    """Resample what depends on the image size, as the official loader does; all other tensors, and those that fit, stay.

    Row and column tables (`ah_bias`, `aw_bias`, `ha_bias`, `wa_bias`) linearly; `pos_embed*` and `absolute_pos_embed`,
    (1, P + N, C) of which the P first rows are kept, and `relative_position_bias_table` (L, h) bicubically; align_corners=False.

    Args:
        state: our keys.
        wanted: tensors (or anything with a `shape`) of the model's sizes, by our keys; keys may be missing.
        grids: the model's grid (H, W) of each position embedding that is not square.
        num_prefix_tokens: P.

    Raises:
        CheckpointError: positions of a grid that nothing in `state` tells the sides of.
    """
    resized = {}
    for key, tensor in state.items():
        shape = tuple(wanted[key].shape) if key in wanted else tuple(tensor.shape)
        if shape != tuple(tensor.shape):
            name = key.rpartition(".")[2]
            if name.startswith("pos_embed") or name == "absolute_pos_embed":
                old = _grid_of_positions(state, key, tensor.shape[1] - num_prefix_tokens)
                tensor = _resize_positions(tensor, old, shape[1], (grids or {}).get(key), num_prefix_tokens)
            else:
                tensor = _resize(name, tensor, shape)
        resized[key] = tensor
    return resized


def _grid_of_positions(state: Mapping[str, Tensor], key: str, num_positions: int) -> Grid:
    """The grid that positions were trained on: that of an agents' table of as many tokens, else a square."""
    for name, rows in state.items():
        columns = state.get(name.removesuffix("ha_bias") + "wa_bias")
        if name.endswith("ha_bias") and columns is not None and rows.shape[2] * columns.shape[3] == num_positions:
            return rows.shape[2], columns.shape[3]
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise CheckpointError(
            f"{key} has {num_positions} positions, of a grid that is not square: load it at the img_size of the checkpoint, then "
            "call set_input_size"
        )
    return side, side


def _resize_positions(tensor: Tensor, old: Grid, num_tokens: int, grid: Grid | None, num_prefix_tokens: int) -> Tensor:
    """(1, P + N, C) -> (1, num_tokens, C), on `grid` or a square."""
    prefix, positions = tensor.tensor_split([num_prefix_tokens], dim=1)
    side = math.isqrt(num_tokens - num_prefix_tokens)
    image = positions.transpose(1, 2).unflatten(2, old)
    return torch.cat([prefix, _resample(image, grid or (side, side), "bicubic").flatten(2).transpose(1, 2)], dim=1)


def _resize(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if name in {"ah_bias", "aw_bias"}:  # (1, h, n, H, 1), (1, h, n, 1, W)
        return _resample(tensor[0], (shape[3], shape[4]), "bilinear")[None]
    if name in {"ha_bias", "wa_bias"}:  # (1, h, H, 1, n), (1, h, 1, W, n)
        return _resample(tensor[0].permute(0, 3, 1, 2), (shape[2], shape[3]), "bilinear").permute(0, 2, 3, 1)[None].contiguous()
    if name == "relative_position_bias_table":  # (L, h)
        side, wanted = math.isqrt(tensor.shape[0]), math.isqrt(shape[0])
        image = tensor.T.unflatten(1, (side, side))[None]
        return _resample(image, (wanted, wanted), "bicubic")[0].flatten(1).T.contiguous()
    return tensor  # loading tells what does not fit


def _resample(image: Tensor, size: Grid, mode: str) -> Tensor:
    work = torch.promote_types(image.dtype, torch.float32)
    return F.interpolate(image.to(work), size=size, mode=mode, align_corners=False).to(image.dtype)


def refit_head(state: Mapping[str, Tensor], num_classes: int, name: str = "head") -> State:
    """A head of another number of classes starts anew at zero, as in the official loader; with num_classes=0 there is none."""
    fitted = dict(state)
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in fitted and not num_classes:
            del fitted[key]
        elif key in fitted and fitted[key].shape[0] != num_classes:
            fitted[key] = fitted[key].new_zeros(num_classes, *fitted[key].shape[1:])
    return fitted


@register_converter("agent_deit")
def convert_agent_deit(
    state_dict: State,
    *,
    img_size: int | Grid = 224,
    patch_size: int | Grid = 16,
    num_classes: int = 1000,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    qkv_bias: bool = True,
    agent_layer: int = -1,
    attention: str = "agent",
    attention_kwargs: Mapping[str, Any] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> State:
    """A whole Agent-DeiT; arguments as for `create_model`, `options` are those that change no key.

    A checkpoint of another image size is resampled, a head of another number of classes starts at zero; with features_only, norm,
    head and the blocks after the last one that is returned are left out.

    Raises:
        CheckpointError: another mechanism than the official one, unknown or missing keys.
    """
    _refuse_other_mechanism(attention, "Agent-DeiT")
    height, width = (side // patch for side, patch in zip(_pair(img_size), _pair(patch_size), strict=True))
    expected = parameter_keys("patch_embed.proj") + ["cls_token"] + ([] if features_only else parameter_keys("norm"))
    wanted = {"pos_embed": _sized(1, 1 + height * width, embed_dim)}
    for i in range(depth):
        expected += [f"blocks.{i}.{key}" for key in _BLOCK_KEYS]
        if 0 <= agent_layer <= i:
            attn = parameter_keys("attn.qkv", bias=qkv_bias) + parameter_keys("attn.proj")
            expected += [f"blocks.{i}.{key}" for key in attn]
            continue
        own = {"window_size": (height, width), "num_prefix_tokens": 1, "qkv_bias": qkv_bias, **(attention_kwargs or {})}
        wanted |= _layer_tensors(state_dict, f"blocks.{i}.attn.", embed_dim, num_heads, own)
    state = _fit(state_dict, [*expected, *wanted], 0 if features_only else num_classes, wanted)
    state = resize_state(state, wanted, grids={"pos_embed": (height, width)}, num_prefix_tokens=1)
    return _as_backbone(state, [(f"blocks.{i}.",) for i in range(depth)], out_indices) if features_only else state


@register_converter("agent_pvt")
def convert_agent_pvt(
    state_dict: State,
    *,
    img_size: int | Grid = 224,
    patch_size: int = 4,
    num_classes: int = 1000,
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    qkv_bias: bool = True,
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    agent_sr_ratios: str | Sequence[int] = "1111",
    attn_type: str = "AAAA",
    attention: str = "agent",
    attention_kwargs: Mapping[str, Any] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> State:
    """A whole Agent-PVT; arguments as for `create_model`, `options` are those that change no key.

    A checkpoint of another image size is resampled, a head of another number of classes starts at zero; with
    attention_kwargs=dict(split_qkv=False) the projections are fused; with features_only, the head and the stages after the last
    one that is returned are left out.

    Raises:
        CheckpointError: another mechanism than the official one, unknown or missing keys.
    """
    _refuse_other_mechanism(attention, "Agent-PVT")
    expected: list[str] = []
    wanted: dict[str, Any] = {}
    grids: dict[str, Grid] = {}
    for i, depth in enumerate(depths):
        expected += parameter_keys(f"patch_embed{i + 1}.proj", f"patch_embed{i + 1}.norm")
        height, width = (side // patch_size // 2**i for side in _pair(img_size))
        grids[f"pos_embed{i + 1}"] = (height, width)
        wanted[f"pos_embed{i + 1}"] = _sized(1, height * width, embed_dims[i])
        for block in (f"block{i + 1}.{j}." for j in range(depth)):
            expected += [block + key for key in _BLOCK_KEYS]
            if attn_type[i] == "B":
                attn = parameter_keys("q", "kv", bias=qkv_bias) + parameter_keys(
                    "proj", *(("sr", "norm") if sr_ratios[i] > 1 else ())
                )
                expected += [f"{block}attn.{key}" for key in attn]
                continue
            own = {"window_size": (height, width), "sr_ratio": int(agent_sr_ratios[i]), "split_qkv": True, "qkv_bias": qkv_bias}
            own |= attention_kwargs or {}
            wanted |= _layer_tensors(state_dict, f"{block}attn.", embed_dims[i], num_heads[i], own)
    state = _fit(state_dict, [*expected, *wanted], 0 if features_only else num_classes, wanted)
    state = resize_state(state, wanted, grids=grids)
    stages = [(f"block{i}.", f"patch_embed{i}.", f"pos_embed{i}") for i in range(1, len(depths) + 1)]
    return _as_backbone(state, stages, out_indices) if features_only else state


_BLOCK_KEYS = parameter_keys("norm1", "norm2", "mlp.fc1", "mlp.fc2")


def _pair(size: int | Grid) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sized(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _refuse_other_mechanism(attention: str, where: str) -> None:
    if attention != "agent":
        raise CheckpointError(f"official {where} checkpoints have agent attention in their blocks, not {attention!r}")


def _layer_tensors(state: Mapping[str, Tensor], prefix: str, dim: int, num_heads: int, options: Mapping[str, Any]) -> State:
    """Names and sizes of one agent layer, with as many agents as the checkpoint has."""
    table = state.get(f"{prefix}an_bias")
    agents = {} if table is None else {"agent_num": table.shape[1]}
    layer = create_attention("agent", dim=dim, num_heads=num_heads, **{**agents, **options, "device": "meta"})
    return {prefix + key: tensor for key, tensor in layer.state_dict().items()}


def _fit(state_dict: State, expected: Sequence[str], num_classes: int, wanted: Mapping[str, Any]) -> State:
    """Check the keys, and bring projections and head to the model's form."""
    head = parameter_keys("head")
    required = [*expected, *(head if num_classes else [])]
    state = rename_keys(fit_projections(state_dict, wanted), (), expected=required, optional=[*head, *parameter_keys("norm")])
    return refit_head(state, num_classes)


def _as_backbone(state: State, stages: Sequence[tuple[str, ...]], out_indices: int | Sequence[int] | None) -> State:
    """As timm's feature extraction names it, without what follows the last stage that it returns."""
    last = len(stages) - 1
    if out_indices is not None and not isinstance(out_indices, int):  # a number means the last ones
        last = max(i % len(stages) for i in out_indices)
    dropped = ("norm.", "head.", *(prefix for stage in stages[last + 1 :] for prefix in stage))
    return {f"model.{key}": tensor for key, tensor in state.items() if not key.startswith(dropped)}
