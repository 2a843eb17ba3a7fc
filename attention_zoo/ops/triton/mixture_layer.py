"""What stands between the projections of a mixture of heads, forward and backward, on tensors as its layer has them.

Gates, attention, the load-balance loss and their gradients are launches that are settled once for a layer: they find heads and
routers where they stand in a projection, and write gradients there. Attention is that of chosen pairs, packed, or for few tokens
one call of torch's fused kernels for all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops._fused import fused_backward, fused_forward
from attention_zoo.ops.triton._common import precision
from attention_zoo.ops.triton._launch import Place, launch_all, settled
from attention_zoo.ops.triton.mixture import Attended, Call, attend, attend_backward
from attention_zoo.ops.triton.mixture_balance import with_own_start
from attention_zoo.ops.triton.mixture_gates import GatesCall, gates_gradient_launches, gates_launches
from attention_zoo.ops.triton.mixture_rows import gate_rows, gate_rows_backward, join_heads

__all__ = [
    "Attended",
    "Gated",
    "Layer",
    "Routed",
    "Routers",
    "attend",
    "attend_all",
    "attend_all_backward",
    "attend_backward",
    "attend_layer",
    "attend_layer_backward",
    "call_of_split",
    "heads_of",
    "heads_of_split",
    "join_heads",
    "precision",
    "route",
    "route_backward",
]


class Routers(NamedTuple):
    """What the launches of linear routers depend on.

    Attributes:
        batch, tokens: B and N.
        heads: h.
        routed, topk: how many heads can be chosen and are.
        width: channels of the routers' logits: of routed heads, then of shared ones if there are more than one, then 2 of the
            balance if there are shared ones, then what fills them up.
        dtype, device: of the logits.
    """

    batch: int
    tokens: int
    heads: int
    routed: int
    topk: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, logits: Tensor, heads: int, routed: int, topk: int) -> Routers:
        """Of logits (B, N, width)."""
        batch, tokens, width = logits.shape
        return cls(batch, tokens, heads, routed, topk, width, logits.dtype, logits.device)


class Layer(NamedTuple):
    """What the launches of a layer depend on.

    Attributes:
        routers: its routers.
        dim: d.
        apart: see `Call`.
        is_causal: whether a token sees those before it only.
        kernel: name of torch's kernel for all heads, see `_fused.py`; empty: pairs are packed.
        precision: of products.
    """

    routers: Routers
    dim: int
    apart: int
    is_causal: bool
    kernel: str
    precision: str


def heads_of(qkv: Tensor, heads: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `first` heads of q, k and v (B, first, N, d) in a projection (B, N, 3 h d)."""
    batch, tokens, whole = qkv.shape
    dim = whole // (3 * heads)
    shape, strides = (batch, first, tokens, dim), (tokens * whole, dim, whole, 1)
    start = qkv.storage_offset()
    q, k, v = (qkv.as_strided(shape, strides, start + part * heads * dim) for part in range(3))
    return q, k, v


@settled
def _settle_call(layer: Layer) -> tuple[Call, tuple[int, int, int]]:
    """Of packed attention, and the strides of the outputs (B, N, h d) by (B, head, token)."""
    batch, tokens, heads, routed, topk, _, dtype, device = layer.routers
    dim = layer.dim
    channels = heads * dim
    strides, at = (tokens * 3 * channels, dim, 3 * channels), layer.apart * dim
    q, k, v = Place(0, 0, strides), Place(1, channels + at, strides), Place(2, 2 * channels + at, strides)
    gates, chosen = (tokens * heads, 1, heads), (tokens * routed, routed, 1)
    kinds = dtype, torch.float32, torch.float32
    sizes = batch, heads, heads, tokens, tokens, dim, dim, routed, topk, layer.apart
    call = Call(*sizes, dim**-0.5, layer.is_causal, q, k, v, gates, chosen, layer.precision, kinds, device)
    return call, (tokens * channels, dim, channels)


class _Settled(NamedTuple):
    """Of routers: the call, the places of the logits' gradients, and how many columns fill the logits up."""

    call: GatesCall
    gradients: tuple[Place, Place, Place]
    pad: int


@settled
def _settle_routers(routers: Routers) -> _Settled:
    batch, tokens, heads, routed, topk, width, dtype, device = routers
    shared = heads - routed
    behind = routed + (shared if shared > 1 else 0)
    offsets = 0, routed if shared > 1 else None, behind if shared else None
    parts = tuple(None if offset is None else Place(0, offset, (width,)) for offset in offsets)
    first = Place(0, 0, (width,))
    assert parts[0] is not None
    call = GatesCall(batch * tokens, routed, shared, topk, parts[0], parts[1], parts[2], dtype, device)
    of_routed, of_shared, of_balance = (first if part is None else Place(8, part.offset, part.strides) for part in parts)
    pad = width - behind - 2 if shared else 0
    return _Settled(call, (of_routed, of_shared, of_balance), pad)


class Routed(NamedTuple):
    """Of a forward: gates (B, N, h), scores and choice (B, N, h_r)."""

    gates: Tensor
    scores: Tensor
    chosen: Tensor


def route(logits: Tensor, routers: Routers) -> Routed:
    """Of the routers' logits, contiguous."""
    gates = logits.new_empty((routers.batch, routers.tokens, routers.heads), dtype=torch.float32)
    shape = routers.batch, routers.tokens, routers.routed
    scores, chosen = gates.new_empty(shape), gates.new_empty(shape)
    launch_all(gates_launches(_settle_routers(routers).call), (logits, logits, logits, gates, scores, chosen))
    return Routed(gates, scores, chosen)


def route_backward(
    logits: Tensor, routers: Routers, scores: Tensor, chosen: Tensor, dgates: Tensor, slopes: Tensor | None, d_loss: Tensor | None
) -> Tensor:
    """Gradient of the logits, from those of gates, contiguous, and of scores.

    slopes: gradient of scores, contiguous, or with `d_loss`, the gradient of a loss, its slopes by the scores of any token, (h_r,);
        None: there is none.
    """
    own, dlogits = _settle_routers(routers), torch.empty_like(logits)
    of_loss = d_loss is not None
    launches = gates_gradient_launches(own.call, own.gradients, slopes is not None and not of_loss, of_loss, own.pad)
    given = scores if slopes is None else slopes, scores if d_loss is None else with_own_start(d_loss)
    launch_all(launches, (logits, logits, logits, scores, chosen, dgates, *given, dlogits))
    return dlogits


class Gated(NamedTuple):
    """Of a forward that computes all heads.

    Attributes:
        out: (B, N, h d), times the gates.
        heads: (B, h, N, d), as the library has computed them.
        lse: what else its backward needs.
    """

    out: Tensor
    heads: Tensor
    lse: Tensor


def attend_all(kernel: str, qkv: tuple[Tensor, Tensor, Tensor], gates: Tensor, is_causal: bool, keep: bool) -> Gated:
    """Of queries (B, h, N, d), keys and values, by torch's `kernel`; `keep`: for a backward."""
    heads, lse = fused_forward(kernel, *qkv, scale=qkv[0].shape[3] ** -0.5, is_causal=is_causal, keep=keep)
    return Gated(gate_rows(heads, gates), heads, lse)


def attend_all_backward(
    kernel: str, qkv: tuple[Tensor, Tensor, Tensor], gates: Tensor, found: Gated, grad: Tensor, is_causal: bool, wants_gates: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of queries, keys and values, laid out as those are but without gaps, and of gates, (B, N, h), or empty.

    grad: of the outputs, contiguous.
    """
    dheads, dgates = gate_rows_backward(grad, found.heads, gates, wants_gates)
    scale = qkv[0].shape[3] ** -0.5
    return fused_backward(kernel, dheads, *qkv, found.heads, found.lse, scale=scale, is_causal=is_causal), dgates


def attend_layer(qkv: Tensor, layer: Layer, routed: Routed, keep: bool) -> Attended | Gated:
    """Of a projection (B, N, 3 h d), contiguous."""
    heads = layer.routers.heads
    if layer.kernel:
        return attend_all(layer.kernel, heads_of(qkv, heads, heads), routed.gates, layer.is_causal, keep)
    dense = heads_of(qkv, heads, layer.apart)
    return attend(_settle_call(layer)[0], qkv, qkv, qkv, routed.gates, routed.chosen, dense)


def attend_layer_backward(
    qkv: Tensor, layer: Layer, gates: Tensor, found: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the projection and of gates, from `grad` (B, N, h d), contiguous."""
    heads = layer.routers.heads
    if layer.kernel:
        whole, gated = heads_of(qkv, heads, heads), Gated(*found)
        of_parts, dgates = attend_all_backward(layer.kernel, whole, gates, gated, grad, layer.is_causal, True)
        return join_heads(*of_parts, gates), dgates
    (call, of_out), dense = _settle_call(layer), heads_of(qkv, heads, layer.apart)
    (dqkv,), dgates = attend_backward(call, qkv, qkv, qkv, gates, dense, Attended(*found), grad, of_out, True, True)
    return dqkv, dgates


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
