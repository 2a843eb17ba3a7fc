"""Changing models: what `from_softmax_attention` reads of the layer that it replaces; what a decoder's configuration is told."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import AttentionModule

__all__ = [
    "adopt_norms",
    "fuse_rows",
    "load_converted",
    "projection_settings",
    "refuse_tensors",
    "relative_scale",
    "repeat_heads",
    "separate_names",
    "source_heads",
    "source_settings",
    "split_projections",
    "update_layer_options",
    "whole_heads",
]

# Names of the projections elsewhere, in order q, k, v, proj; fused ones have the rows [q; k; v] and [k; v].
_LAYOUTS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"qkv": ("q", "k", "v"), "proj": ("proj",)},
    {"q": ("q",), "kv": ("k", "v"), "proj": ("proj",)},
    {"q": ("q",), "k": ("k",), "v": ("v",), "proj": ("proj",)},
    {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "o_proj": ("proj",)},
)


def split_projections(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors with separate q, k, v and proj. Raises ValueError when no known set of projections is there."""
    source = source.state_dict() if isinstance(source, nn.Module) else source
    layout = next((names for names in _LAYOUTS if all(f"{name}.weight" in source for name in names)), None)
    if layout is None:
        raise ValueError(
            f"no attention layer of a known kind: found {', '.join(source) or 'nothing'}; expected the weights of "
            + ", or ".join(", ".join(names) for names in _LAYOUTS)
        )
    inner = next(source[f"{name}.weight"].shape[1] for name, parts in layout.items() if parts == ("proj",))
    state: dict[str, Tensor] = {}
    for name, tensor in source.items():
        projection, _, kind = name.rpartition(".")
        parts = layout.get(projection)
        if parts is None:
            state[name] = tensor  # normalisations
        elif len(parts) == 1:
            state[f"{parts[0]}.{kind}"] = tensor
        else:
            kv_rows = (tensor.shape[0] - inner * ("q" in parts)) // 2
            pieces = tensor.split([inner, kv_rows, kv_rows][-len(parts) :])
            state.update({f"{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)})
    return state


def separate_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `q`, `k`, `v` and `proj` under the names of decoders, `q_proj`, ..., `o_proj`; others keep theirs."""
    ours = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}
    named = ((name.rpartition("."), tensor) for name, tensor in state.items())
    return {f"{ours.get(module, module)}.{kind}": tensor for (module, _, kind), tensor in named}


def repeat_heads(state: Mapping[str, Tensor], num_heads: int, q_factor: float = 1.0) -> dict[str, Tensor]:
    """The tensors with as many key/value heads as query heads: grouped ones are repeated. Those of q are multiplied by `q_factor`.

    Where some of q, k and v have a bias, it is 0 in the others.
    """
    repeated, inner = dict(state), state["q.weight"].shape[0]
    biased = any(f"{part}.bias" in state for part in "qkv")
    for part in "qkv":
        rows = state[f"{part}.weight"].shape[0]
        for kind in ("weight", "bias") if biased else ("weight",):
            tensor = state.get(f"{part}.{kind}", state[f"{part}.weight"].new_zeros(rows))
            heads = tensor.unflatten(0, (-1, inner // num_heads)).repeat_interleave(inner // rows, 0).flatten(0, 1)
            repeated[f"{part}.{kind}"] = heads * q_factor if part == "q" else heads
    return repeated


def fuse_rows(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors with the rows of q, k and v, or k and v, in one projection, whose `name` is "qkv" or "kv"."""
    fused = {full: tensor for full, tensor in state.items() if full.rpartition(".")[0] not in set(name)}
    kinds = [kind for kind in ("weight", "bias") if f"{name[0]}.{kind}" in state]
    return fused | {f"{name}.{kind}": torch.cat([state[f"{part}.{kind}"] for part in name]) for kind in kinds}


def relative_scale(source: nn.Module | Mapping[str, Tensor], head_dim: int) -> float:
    """The factor of the source's logits, relative to 1 / sqrt(d)."""
    scale = getattr(source, "scale", None) or getattr(source, "scaling", None)
    return scale * math.sqrt(head_dim) if isinstance(scale, float) and not math.isclose(scale, head_dim**-0.5) else 1.0


def adopt_norms(module: nn.Module, source: nn.Module | Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Give a mechanism copies of the normalisations that the source module and it both have: their kind, with their epsilon."""
    for name in names:
        norm = getattr(source, name, None)
        if isinstance(norm, nn.Module) and nn.Identity not in (type(norm), type(getattr(module, name))):
            setattr(module, name, copy.deepcopy(norm))


def projection_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors of `q` tell, in any mechanism."""
    return {"qkv_bias": "q.bias" in state, "device": state["q.weight"].device, "dtype": state["q.weight"].dtype}


def source_settings(source: nn.Module) -> dict[str, Any]:
    """Constructor arguments that an attention module's attributes tell: dropout rates, and what the zoo's own carry."""
    found: dict[str, Any] = {}
    for name in ("attn_drop", "proj_drop"):
        value = getattr(source, name, None)
        if isinstance(value := getattr(value, "p", value), float):
            found[name] = value
    if isinstance(source, AttentionModule):
        found.update(is_causal=source.is_causal, rope_layout=source.rope_layout)
    return found


def source_heads(source: nn.Module | Mapping[str, Tensor], inner: int) -> int:
    """Query heads of an attention module: its `num_heads`, or what its `head_dim` tells of `inner` channels. Raises ValueError."""
    if isinstance(num_heads := getattr(source, "num_heads", None), int):
        return num_heads
    if isinstance(head_dim := getattr(source, "head_dim", None), int):
        return inner // head_dim
    raise ValueError("the weights do not say how many heads they are: give num_heads")


def whole_heads(state: Mapping[str, Tensor], num_heads: int) -> tuple[int, int]:
    """Channels of each of `num_heads` query heads, and how many key/value heads of that width there are. Raises ValueError."""
    inner, kv_inner = state["q.weight"].shape[0], state["k.weight"].shape[0]
    head_dim = inner // num_heads if num_heads > 0 and inner % num_heads == 0 else 0
    if head_dim == 0 or kv_inner % head_dim:
        raise ValueError(f"q.weight has {inner} rows, k.weight {kv_inner}: no whole number of heads; is num_heads={num_heads}?")
    return head_dim, kv_inner // head_dim


def load_converted(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all tensors of a mechanism. Raises ValueError, listing them all, if some are missing or have no place."""
    own = module.state_dict()
    refuse_tensors(type(module).__name__, sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()))
    module.load_state_dict(state)


def refuse_tensors(name: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise ValueError, listing them all, if the source lacks tensors that the mechanism `name` needs or has others."""
    missing, unknown = list(missing), list(unknown)
    if missing or unknown:
        raise ValueError(
            f"source and {name} do not have the same tensors"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; without a place: {', '.join(unknown)}" if unknown else "")
        )


def update_layer_options(config: Any, changes: Mapping[int, Mapping[str, Any]]) -> None:
    """Write options of single layers, by their index, into a decoder's `config.attention_kwargs`; those that are None are removed.

    One dict for all layers stays one while they agree. With it the configuration builds the changed model: `save_pretrained` works.
    """
    given = config.attention_kwargs
    each = [dict(own or {}) for own in given] if isinstance(given, list) else [dict(given or {})] * config.num_hidden_layers
    for index, options in changes.items():
        merged = {**each[index], **options}
        each[index] = {name: value for name, value in merged.items() if value is not None or name not in options}
    config.attention_kwargs = each[0] if not isinstance(given, list) and all(own == each[0] for own in each) else each
