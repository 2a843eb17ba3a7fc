"""The router of a mixture of heads as one kernel each way: softmaxes, the choice of the K best heads, gates.

In plain PyTorch it is some twenty operations on small tensors, which cost more than their arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, tile

__all__ = ["among_best", "mixture_gates_triton", "softmax", "softmax_gradient", "top_k_mask_triton"]


@triton.jit
def among_best(scores, valid, e, K):
    """1 for the K largest scores of each row (tokens, heads), else 0; of equal ones the first."""
    scores = tl.where(valid[None, :], scores, float("-inf"))
    ahead = (scores[:, None, :] > scores[:, :, None]) | (
        (scores[:, None, :] == scores[:, :, None]) & (e[None, None, :] < e[None, :, None])
    )
    rank = tl.sum((ahead & valid[None, None, :]).to(tl.int32), 2)
    return ((rank < K) & valid[None, :]).to(tl.float32)


@triton.jit
def softmax(x, valid):
    x = tl.where(valid, x, float("-inf"))
    p = tl.exp(x - tl.max(x, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def softmax_gradient(p, slope):
    return p * (slope - tl.sum(p * slope, 1)[:, None])


@triton.jit
def _balance(Balance, n, real, step, HAS_BALANCE: tl.constexpr):
    """Two numbers of sum 2 for each token: what shared and routed gates are multiplied by; 1 without a balance."""
    first = tl.zeros_like(n).to(tl.float32) + 1.0
    if HAS_BALANCE:
        zero = tl.load(Balance + n * step, mask=real, other=0.0).to(tl.float32)
        one = tl.load(Balance + n * step + 1, mask=real, other=0.0).to(tl.float32)
        highest = tl.maximum(zero, one)
        zero, one = tl.exp(zero - highest), tl.exp(one - highest)
        return 2.0 * zero / (zero + one), 2.0 * one / (zero + one)
    return first, first


@triton.jit
def _choice_kernel(Scores, Chosen, step, ROWS, R, K, BT: tl.constexpr, BE: tl.constexpr):
    n, e = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE)
    here = (n < ROWS)[:, None] & (e < R)[None, :]
    scores = tl.load(Scores + n[:, None] * step + e[None, :], mask=here, other=0.0)
    tl.store(Chosen + n[:, None] * R + e[None, :], among_best(scores, e < R, e, K).to(Chosen.dtype.element_ty), mask=here)


@triton.jit
def _gates_kernel(
    Logits, Shared, Balance, Gates, Scores, Chosen, step, step_s, step_b, ROWS, R, S, K, eps,
    HAS_SHARED: tl.constexpr, HAS_BALANCE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    n, e, f = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, BS)
    real = n < ROWS
    here = real[:, None] & (e < R)[None, :]
    p = softmax(tl.load(Logits + n[:, None] * step + e[None, :], mask=here, other=0.0).to(tl.float32), (e < R)[None, :])
    chosen = among_best(p, e < R, e, K)
    kept = p * chosen
    routed = K * kept / tl.maximum(tl.sum(kept, 1), eps)[:, None]
    first, second = _balance(Balance, n, real, step_b, HAS_BALANCE)
    tl.store(Scores + n[:, None] * R + e[None, :], p, mask=here)
    tl.store(Chosen + n[:, None] * R + e[None, :], chosen, mask=here)
    tl.store(Gates + n[:, None] * (S + R) + S + e[None, :], second[:, None] * routed, mask=here)
    there = real[:, None] & (f < S)[None, :]
    gate = tl.zeros([BT, BS], tl.float32) + 1.0
    if HAS_SHARED:
        x = tl.load(Shared + n[:, None] * step_s + f[None, :], mask=there, other=0.0).to(tl.float32)
        gate = S * softmax(x, (f < S)[None, :])
    tl.store(Gates + n[:, None] * (S + R) + f[None, :], first[:, None] * gate, mask=there)


@triton.jit
def _gates_gradient_kernel(
    Shared, Balance, Scores, Chosen, DGates, DScores, DLogits, DShared, DBalance, step_s, step_b, ROWS, R, S, K, eps,
    HAS_SHARED: tl.constexpr, HAS_BALANCE: tl.constexpr, HAS_DSCORES: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    n, e, f = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, BS)
    real = n < ROWS
    here, there = real[:, None] & (e < R)[None, :], real[:, None] & (f < S)[None, :]
    p = tl.load(Scores + n[:, None] * R + e[None, :], mask=here, other=0.0)
    chosen = tl.load(Chosen + n[:, None] * R + e[None, :], mask=here, other=0.0)
    slope = tl.load(DGates + n[:, None] * (S + R) + S + e[None, :], mask=here, other=0.0)
    first, second = _balance(Balance, n, real, step_b, HAS_BALANCE)
    kept = p * chosen
    total = tl.sum(kept, 1)
    whole = tl.maximum(total, eps)
    share = kept / whole[:, None]
    mean = tl.sum(slope * share, 1)  # of the routed gates' slopes
    inner = slope - tl.where(total > eps, mean, 0.0)[:, None]
    dp = chosen * (K * second / whole)[:, None] * inner
    if HAS_DSCORES:
        dp += tl.load(DScores + n[:, None] * R + e[None, :], mask=here, other=0.0)
    dx = softmax_gradient(p, dp)
    tl.store(DLogits + n[:, None] * R + e[None, :], dx.to(DLogits.dtype.element_ty), mask=here)
    slope = tl.load(DGates + n[:, None] * (S + R) + f[None, :], mask=there, other=0.0)
    by_first = tl.sum(slope, 1)
    if HAS_SHARED:
        x = tl.load(Shared + n[:, None] * step_s + f[None, :], mask=there, other=0.0).to(tl.float32)
        q = tl.where(there, softmax(x, (f < S)[None, :]), 0.0)
        by_first = S * tl.sum(slope * q, 1)
        dx = softmax_gradient(q, S * first[:, None] * slope)
        tl.store(DShared + n[:, None] * S + f[None, :], dx.to(DShared.dtype.element_ty), mask=there)
    if HAS_BALANCE:
        dx = 0.5 * first * second * (by_first - K * mean)  # of the first logit, the second's is the opposite
        tl.store(DBalance + n * 2, dx.to(DBalance.dtype.element_ty), mask=real)
        tl.store(DBalance + n * 2 + 1, (-dx).to(DBalance.dtype.element_ty), mask=real)


def _tiles(routed: int, shared: int) -> dict[str, int]:
    """Tokens to a program by how many pairs of heads are compared."""
    width = tile(routed, 1 << 30)
    return {"BT": max(1, min(32, 8192 // width**2)), "BE": width, "BS": tile(shared, 1 << 30)}


def _rows(x: Tensor) -> Tensor:
    """(B, N, E) as (B N, E) with neighbouring channels; without a copy where the tokens of a sample follow each other."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@operator("top_k_mask")
def top_k_mask_triton(scores: Tensor, topk: int) -> Tensor:
    """1 for the largest of (..., E), else 0; of equal ones the first."""
    rows = scores.reshape(-1, scores.shape[-1]).contiguous()
    chosen = torch.empty_like(rows)
    sizes = _tiles(rows.shape[1], 1)
    if rows.numel():
        _choice_kernel[(ceil_div(rows.shape[0], sizes["BT"]),)](
            rows, chosen, rows.shape[1], *rows.shape, topk, BT=sizes["BT"], BE=sizes["BE"], num_warps=4
        )
    return chosen.view(scores.shape)


@top_k_mask_triton.register_fake
def _(scores: Tensor, topk: int) -> Tensor:
    return scores.new_empty(scores.shape)


@operator("mixture_gates")
def _gates_forward(
    logits: Tensor, shared: Tensor | None, balance: Tensor | None, topk: int, shared_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, routed = logits.shape
    gates = logits.new_empty((batch, tokens, shared_heads + routed), dtype=torch.float32)
    scores, chosen = (logits.new_empty(logits.shape, dtype=torch.float32) for _ in range(2))
    rows, first, second = (None if t is None else _rows(t) for t in (logits, shared, balance))
    sizes = _tiles(routed, shared_heads)
    if rows is not None and rows.numel():
        _gates_kernel[(ceil_div(batch * tokens, sizes["BT"]),)](
            rows, rows if first is None else first, rows if second is None else second, gates, scores, chosen,
            rows.stride(0), 0 if first is None else first.stride(0), 0 if second is None else second.stride(0),
            batch * tokens, routed, shared_heads, topk, torch.finfo(torch.float32).eps,
            HAS_SHARED=first is not None, HAS_BALANCE=second is not None, **sizes, num_warps=4,
        )  # fmt: skip
    return gates, scores, chosen


@_gates_forward.register_fake
def _(logits: Tensor, shared: Any, balance: Any, topk: int, shared_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, routed = logits.shape
    gates = logits.new_empty((batch, tokens, shared_heads + routed), dtype=torch.float32)
    return gates, logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(logits.shape, dtype=torch.float32)


@operator("mixture_gates_backward")
def _gates_backward(
    dgates: Tensor, dscores: Tensor | None, logits: Tensor, shared: Tensor | None, balance: Tensor | None,
    scores: Tensor, chosen: Tensor, topk: int, shared_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, routed = scores.shape
    dgates, dscores = dgates.contiguous(), None if dscores is None else dscores.contiguous()
    first, second = (None if t is None else _rows(t) for t in (shared, balance))
    dlogits, dshared, dbalance = (logits.new_empty((0,) if t is None else t.shape) for t in (logits, shared, balance))
    sizes = _tiles(routed, shared_heads)
    if scores.numel():
        _gates_gradient_kernel[(ceil_div(batch * tokens, sizes["BT"]),)](
            scores if first is None else first, scores if second is None else second, scores, chosen,
            dgates, scores if dscores is None else dscores, dlogits, dshared, dbalance,
            0 if first is None else first.stride(0), 0 if second is None else second.stride(0),
            batch * tokens, routed, shared_heads, topk, torch.finfo(torch.float32).eps,
            HAS_SHARED=first is not None, HAS_BALANCE=second is not None, HAS_DSCORES=dscores is not None, **sizes, num_warps=4,
        )  # fmt: skip
    return dlogits, dshared, dbalance


@_gates_backward.register_fake
def _(
    dgates: Tensor, dscores: Any, logits: Tensor, shared: Any, balance: Any, scores: Tensor, chosen: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty((0,) if t is None else t.shape) for t in (logits, shared, balance))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, shared, balance, ctx.topk, ctx.shared_heads = inputs
    ctx.save_for_backward(logits, shared, balance, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dgates: Tensor | None, dscores: Tensor | None, _: Any) -> tuple[Any, ...]:
    logits, shared, balance, scores, chosen = ctx.saved_tensors
    if dgates is None:
        dgates = scores.new_zeros((*scores.shape[:2], ctx.shared_heads + scores.shape[2]))
    dlogits, dshared, dbalance = _gates_backward(
        dgates, dscores, logits, shared, balance, scores, chosen, ctx.topk, ctx.shared_heads
    )
    return dlogits, None if shared is None else dshared, None if balance is None else dbalance, None, None


_gates_forward.register_autograd(_backward, setup_context=_setup)


def mixture_gates_triton(
    logits: Tensor, shared: Tensor | None, balance: Tensor | None, *, topk: int, shared_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (B, N, h), scores and choice (B, N, h_r), float32; tensors as `ops.mixture_gates` has checked them."""
    return _gates_forward(logits, shared, balance, topk, shared_heads)
