"""The router that picks heads by the norms of their queries, as one kernel each way: norms, the K largest, gates, scores.

In plain PyTorch the norms alone take five times as long as reading the queries does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, heads_last, last_contiguous, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled
from attention_zoo.ops.triton.mixture_gates import among_best, softmax, softmax_gradient

__all__ = ["norm_gates", "norm_gates_backward", "query_norm_gates_triton"]


@triton.jit
def _standardise(norms, valid, R, DEGREES, eps):
    """Norms (tokens, heads) less their mean, their standard deviation over the heads, and that with `eps`."""
    mean = tl.sum(tl.where(valid, norms, 0.0), 1) / R
    offset = tl.where(valid, norms - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(offset * offset, 1) / DEGREES)
    return offset, deviation, deviation + eps


@triton.jit
def _norm_gates_kernel(
    Q, Gates, Scores, Chosen, Norms, sqb, sqh, sqn, N, ROWS, D, R, S, K, DEGREES, eps,
    SCORED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BT  # int32: to divide 64 bits takes a hundred instructions
    pair = tl.arange(0, BT * BE)
    row, head = first + pair // BE, pair % BE
    there = (row < ROWS) & (head < R)
    at = Q + (row // N).to(tl.int64) * sqb + (S + head) * sqh + (row % N).to(tl.int64) * sqn
    squares = tl.zeros([BT * BE], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        q = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(q * q, 1)
    norms = tl.reshape(tl.sqrt_rn(squares), (BT, BE))
    n, e, f = (first + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BE), tl.arange(0, BS)
    ones = tl.full([BT, BS], 1.0, tl.float32)
    valid = (e < R)[None, :]
    here = (n < ROWS)[:, None] & valid
    chosen = among_best(norms, e < R, e, K)
    tl.store(Chosen + n[:, None] * R + e[None, :], chosen, mask=here)
    tl.store(Gates + n[:, None] * (S + R) + S + e[None, :], chosen, mask=here)
    tl.store(Gates + n[:, None] * (S + R) + f[None, :], ones, mask=(n < ROWS)[:, None] & (f < S)[None, :])
    if SCORED:
        _, _, whole = _standardise(norms, valid, R, DEGREES, eps)
        tl.store(Norms + n[:, None] * R + e[None, :], norms, mask=here)
        tl.store(Scores + n[:, None] * R + e[None, :], softmax(norms / whole[:, None], valid), mask=here)


@triton.jit
def _norm_gradient_kernel(
    Q, Scores, Chosen, Norms, DGates, DScores, DQ, sqb, sqh, sqn, N, ROWS, D, R, S, DEGREES, eps,
    HAS_DGATES: tl.constexpr, HAS_DSCORES: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """DQ (B, N, H, D), of all heads; the gradient of a gate goes straight through to the score of a chosen head."""
    first = tl.program_id(0) * BT
    n, h = (first + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BH)
    valid = ((h >= S) & (h < S + R))[None, :]
    here = (n < ROWS)[:, None] & valid
    at = n[:, None] * R + (h - S)[None, :]
    slope = tl.zeros([BT, BH], tl.float32)
    if HAS_DSCORES:
        slope += tl.load(DScores + at, mask=here, other=0.0)
    if HAS_DGATES:
        chosen = tl.load(Chosen + at, mask=here, other=0.0)
        slope += chosen * tl.load(DGates + n[:, None] * (S + R) + h[None, :], mask=here, other=0.0)
    norms = tl.load(Norms + at, mask=here, other=0.0)
    slope = softmax_gradient(tl.load(Scores + at, mask=here, other=0.0), slope)  # of the standardised norms
    offset, deviation, whole = _standardise(norms, valid, R, DEGREES, eps)
    by_deviation = -tl.sum(slope * offset, 1) / (whole * whole)  # slopes add up to 0, so the mean may go
    spread = tl.where(deviation > 0.0, by_deviation / (DEGREES * tl.where(deviation > 0.0, deviation, 1.0)), 0.0)
    slope = slope / whole[:, None] + spread[:, None] * offset
    factor = tl.reshape(tl.where(norms > 0.0, slope / tl.where(norms > 0.0, norms, 1.0), 0.0), (BT * BH,))
    pair = tl.arange(0, BT * BH)
    row, head = first + pair // BH, pair % BH
    real = (row < ROWS) & (head < S + R)
    at = Q + (row // N).to(tl.int64) * sqb + head * sqh + (row % N).to(tl.int64) * sqn
    to = DQ + (row.to(tl.int64) * (S + R) + head) * D
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (d < D)[None, :]
        q = tl.load(at[:, None] + d[None, :], mask=(real & (head >= S))[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(to[:, None] + d[None, :], (factor[:, None] * q).to(DQ.dtype.element_ty), mask=real[:, None] & inside)


_EPS = 1e-6  # of the deviation


def _tiles(heads: int, dim: int) -> tuple[int, int, int]:
    """Tokens to a program, heads and channels of a tile."""
    wide, deep = tile(heads, 1 << 30), tile(dim, 128)
    return max(1, 8192 // (wide * deep)), wide, deep


def _empty_outputs(q: Tensor, shared_heads: int, scored: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    sizes = [(batch, tokens, n) for n in (heads, heads - shared_heads)]
    kept = [sizes[1] if scored else (0,)] * 2
    gates, scores, chosen, norms = (q.new_empty(size, dtype=torch.float32) for size in (sizes[0], kept[0], sizes[1], kept[1]))
    return gates, scores, chosen, norms


@operator("query_norm_gates")
def norm_gates(q: Tensor, topk: int, shared_heads: int, scored: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates (B, N, H), scores, choice and norms (B, N, H_r); scores and norms are empty unless `scored`."""
    q = last_contiguous(q)
    batch, heads, tokens, dim = q.shape
    found = _empty_outputs(q, shared_heads, scored)
    if batch * tokens:
        launch = _launch((batch, heads, tokens, dim), q.stride()[:3], (topk, shared_heads, scored), q.dtype, q.device)
        launch(q, *found)
    return found


@settled
def _launch(
    shape: tuple[int, ...], of_q: tuple[int, ...], options: tuple[int, int, bool], dtype: torch.dtype, device: torch.device
) -> Launch:
    """Of queries, gates, scores, choice and norms."""
    (batch, heads, tokens, dim), (topk, shared_heads, scored) = shape, options
    routed = heads - shared_heads
    bt, be, bd = _tiles(routed, dim)
    numbers = *of_q, tokens, batch * tokens, dim, routed, shared_heads, topk, max(1, routed - 1), _EPS
    constants = {"SCORED": scored, "BT": bt, "BE": be, "BS": tile(shared_heads, 1 << 30), "BD": bd, "num_warps": 4}
    places = tuple(Place(i) for i in (0, 1, 2 if scored else 1, 3, 4 if scored else 1))
    return Launch(_norm_gates_kernel, (ceil_div(batch * tokens, bt),), places, numbers, constants)


@norm_gates.register_fake
def _(q: Tensor, topk: int, shared_heads: int, scored: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(q, shared_heads, scored)


@operator("querynorm_gates_backward")
def norm_gates_backward(
    dgates: Tensor | None, dscores: Tensor | None, q: Tensor, scores: Tensor, chosen: Tensor, norms: Tensor
) -> Tensor:
    q = last_contiguous(q)
    batch, heads, tokens, dim = q.shape
    of_gates, of_scores = (scores if t is None else t.contiguous() for t in (dgates, dscores))
    dq = q.new_empty((batch, tokens, heads, dim))
    if dq.numel():
        has = dgates is not None, dscores is not None
        launch = _gradient_launch((batch, heads, tokens, dim), q.stride()[:3], chosen.shape[-1], has, q.dtype, q.device)
        launch(q, scores, chosen, norms, of_gates, of_scores, dq)
    return dq.transpose(1, 2)


@settled
def _gradient_launch(
    shape: tuple[int, ...], of_q: tuple[int, ...], routed: int, has: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> Launch:
    """Of queries, scores, choice, norms, gradients of gates and of scores, and those of the queries."""
    batch, heads, tokens, dim = shape
    bt, bh, bd = _tiles(heads, dim)
    numbers = *of_q, tokens, batch * tokens, dim, routed, heads - routed, max(1, routed - 1), _EPS
    constants = {"HAS_DGATES": has[0], "HAS_DSCORES": has[1], "BT": bt, "BH": bh, "BD": bd, "num_warps": 4}
    places = tuple(Place(i) for i in range(7))
    return Launch(_norm_gradient_kernel, (ceil_div(batch * tokens, bt),), places, numbers, constants)


@norm_gates_backward.register_fake
def _(dgates: Any, dscores: Any, q: Tensor, scores: Tensor, chosen: Tensor, norms: Tensor) -> Tensor:
    return heads_last(q)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scored = inputs[3]
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dgates: Tensor | None, dscores: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.scored or (dgates is None and dscores is None):
        return (None,) * 4
    return norm_gates_backward(dgates, dscores, *ctx.saved_tensors), None, None, None


norm_gates.register_autograd(_backward, setup_context=_setup)


def query_norm_gates_triton(
    q: Tensor, *, topk: int, shared_heads: int, scored: bool, through: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `ops.query_norm_gates`, which has checked the tensors."""
    gates, scores, chosen, _ = norm_gates(q if scored else q.detach(), topk, shared_heads, scored)
    return gates if through else gates.detach(), scores if scored else None, chosen.detach()
