"""What stands between the projections of a mixture of heads, forward and backward, on tensors as its layer has them.

Gates, attention, the load-balance loss and their gradients are launches that are settled once for a layer: they find heads and
routers where they stand in a projection, and write gradients there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.triton._common import precision
from attention_zoo.ops.triton._launch import Place, launch_all, settled
from attention_zoo.ops.triton.mixture import Attended, Call, attend, attend_backward
from attention_zoo.ops.triton.mixture_gates import GatesCall, gates_gradient_launches, gates_launches

__all__ = [
    "Attended",
    "Layer",
    "Routed",
    "attend",
    "attend_backward",
    "attend_layer",
    "attend_layer_backward",
    "call_of_split",
    "heads_of",
    "heads_of_split",
    "precision",
]


class Layer(NamedTuple):
    """What the launches of a layer depend on.

    Attributes:
        batch, tokens: B and N.
        heads, dim: h and d.
        routed, topk: how many heads can be chosen and are.
        apart: see `Call`.
        is_causal: whether a token sees those before it only.
        width: channels of the routers' logits: of routed heads, then of shared ones if there are more than one, then 2 of the
            balance if there are shared ones, then what fills them up.
        precision: of products.
        dtype, device: of all.
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    routed: int
    topk: int
    apart: int
    is_causal: bool
    width: int
    precision: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, qkv: Tensor, logits: Tensor, heads: int, routed: int, topk: int, apart: int, is_causal: bool) -> Layer:
        """Of a projection (B, N, 3 h d) and logits (B, N, width)."""
        batch, tokens, channels = qkv.shape
        sizes = batch, tokens, heads, channels // (3 * heads), routed, topk, apart
        return cls(*sizes, is_causal, logits.shape[2], precision(qkv), qkv.dtype, qkv.device)


def heads_of(qkv: Tensor, heads: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `first` heads of q, k and v (B, first, N, d) in a projection (B, N, 3 h d)."""
    batch, tokens, whole = qkv.shape
    dim = whole // (3 * heads)
    shape, strides = (batch, first, tokens, dim), (tokens * whole, dim, whole, 1)
    q, k, v = (qkv.as_strided(shape, strides, part * heads * dim) for part in range(3))
    return q, k, v


class _Settled(NamedTuple):
    """Of a layer.

    Attributes:
        call: of attention.
        routers: of the gates.
        gradients: places of those of the logits.
        pad: what fills the logits up.
        out: strides of the outputs (B, N, h d) by (B, head, token).
    """

    call: Call
    routers: GatesCall
    gradients: tuple[Place, Place, Place]
    pad: int
    out: tuple[int, int, int]


@settled
def _settle(layer: Layer) -> _Settled:
    batch, tokens, heads, dim, routed = layer[:5]
    shared, channels, width = heads - routed, heads * dim, layer.width
    strides, at = (tokens * 3 * channels, dim, 3 * channels), layer.apart * dim
    q, k, v = Place(0, 0, strides), Place(1, channels + at, strides), Place(2, 2 * channels + at, strides)
    gates, chosen = (tokens * heads, 1, heads), (tokens * routed, routed, 1)
    kinds = layer.dtype, torch.float32, torch.float32
    sizes = batch, heads, heads, tokens, tokens, dim, dim, routed, layer.topk, layer.apart
    call = Call(*sizes, dim**-0.5, layer.is_causal, q, k, v, gates, chosen, layer.precision, kinds, layer.device)
    behind = routed + (shared if shared > 1 else 0)
    offsets = 0, routed if shared > 1 else None, behind if shared else None
    parts = tuple(None if offset is None else Place(0, offset, (width,)) for offset in offsets)
    first = Place(0, 0, (width,))
    assert parts[0] is not None
    routers = GatesCall(batch * tokens, routed, shared, layer.topk, parts[0], parts[1], parts[2], layer.dtype, layer.device)
    of_routed, of_shared, of_balance = (first if part is None else Place(8, part.offset, part.strides) for part in parts)
    pad = width - behind - 2 if shared else 0
    return _Settled(call, routers, (of_routed, of_shared, of_balance), pad, (tokens * channels, dim, channels))


class Routed(NamedTuple):
    """Of a forward: gates (B, N, h), scores and choice (B, N, h_r)."""

    gates: Tensor
    scores: Tensor
    chosen: Tensor


def attend_layer(qkv: Tensor, logits: Tensor, layer: Layer) -> tuple[Routed, Attended]:
    """Of a projection (B, N, 3 h d) and the routers' logits, both contiguous."""
    own, shape = _settle(layer), (layer.batch, layer.tokens, layer.routed)
    gates = qkv.new_empty((layer.batch, layer.tokens, layer.heads), dtype=torch.float32)
    scores, chosen = gates.new_empty(shape), gates.new_empty(shape)
    launch_all(gates_launches(own.routers), (logits, logits, logits, gates, scores, chosen))
    dense = heads_of(qkv, layer.heads, layer.apart)
    return Routed(gates, scores, chosen), attend(own.call, qkv, qkv, qkv, gates, chosen, dense)


def attend_layer_backward(
    qkv: Tensor, logits: Tensor, layer: Layer, routed: Routed, found: Attended, grad: Tensor,
    slopes: Tensor | None, d_loss: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the projection and of the logits, from `grad` (B, N, h d), contiguous, and that of the loss, if any.

    slopes: of the loss by the scores of any token, (h_r,).
    """
    own, dense = _settle(layer), heads_of(qkv, layer.heads, layer.apart)
    gates, scores, chosen = routed
    of_parts, dgates = attend_backward(own.call, qkv, qkv, qkv, gates, dense, found, grad, own.out, True, True)
    dlogits, wanted = torch.empty_like(logits), d_loss is not None
    launches = gates_gradient_launches(own.routers, own.gradients, False, wanted, own.pad)
    of_loss: tuple[Any, Any] = (slopes, d_loss) if wanted else (scores, scores)
    launch_all(launches, (logits, logits, logits, scores, chosen, dgates, *of_loss, dlogits))
    return of_parts[0], dlogits


def heads_of_split(x: Tensor, heads: int, first: int) -> Tensor:
    """The `first` heads (B, first, N, d) of a projection (B, N, h d) of its own."""
    batch, tokens, channels = x.shape
    dim = channels // heads
    return x.as_strided((batch, first, tokens, dim), (tokens * channels, dim, channels, 1))


def call_of_split(
    q: Tensor, k: Tensor, heads: tuple[int, int], routed: int, topk: int, apart: int, is_causal: bool
) -> tuple[Call, tuple[int, int, int]]:
    """The call of projections (B, N, h d), (B, N, h_kv d) and one like that, `heads` h and h_kv, with gates (B, N, h) and choices
    (B, N, h_r) in float32; and the strides of its outputs (B, N, h d) by (B, head, token)."""
    batch, tokens, channels = q.shape
    dim, narrow = channels // heads[0], k.shape[2]
    strides, of_keys = (tokens * channels, dim, channels), (tokens * narrow, dim, narrow)
    at = apart // (heads[0] // heads[1]) * dim
    sizes = batch, *heads, tokens, tokens, dim, dim, routed, topk, apart
    places = Place(0, 0, strides), Place(1, at, of_keys), Place(2, at, of_keys)
    gates, chosen = (tokens * heads[0], 1, heads[0]), (tokens * routed, routed, 1)
    kinds = q.dtype, torch.float32, torch.float32
    return Call(*sizes, dim**-0.5, is_causal, *places, gates, chosen, precision(q), kinds, q.device), strides
