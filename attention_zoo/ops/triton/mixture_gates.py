"""The router of a mixture of heads as one kernel each way: softmaxes, the choice of the K best heads, gates.

In plain PyTorch it is some twenty operations on small tensors, which cost more than their arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, tile
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = [
    "GatesCall",
    "among_best",
    "gates_gradient_launches",
    "gates_launches",
    "mixture_gates_triton",
    "softmax",
    "softmax_gradient",
    "top_k_mask_triton",
]


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
    Shared, Balance, Scores, Chosen, DGates, DScores, DLoss, DLogits, DShared, DBalance,
    step_s, step_b, step_d, step_ds, step_db, ROWS, R, S, K, eps,
    HAS_SHARED: tl.constexpr, HAS_BALANCE: tl.constexpr, HAS_DSCORES: tl.constexpr, HAS_DLOSS: tl.constexpr, PAD: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """DScores: (tokens, R), or with HAS_DLOSS (R,), of all tokens alike, times DLoss. PAD: columns of 0 behind DBalance."""
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
    if HAS_DLOSS:
        dp += (tl.load(DScores + e, mask=e < R, other=0.0) * tl.load(DLoss).to(tl.float32))[None, :]
    dx = softmax_gradient(p, dp)
    tl.store(DLogits + n[:, None] * step_d + e[None, :], dx.to(DLogits.dtype.element_ty), mask=here)
    slope = tl.load(DGates + n[:, None] * (S + R) + f[None, :], mask=there, other=0.0)
    by_first = tl.sum(slope, 1)
    if HAS_SHARED:
        x = tl.load(Shared + n[:, None] * step_s + f[None, :], mask=there, other=0.0).to(tl.float32)
        q = tl.where(there, softmax(x, (f < S)[None, :]), 0.0)
        by_first = S * tl.sum(slope * q, 1)
        dx = softmax_gradient(q, S * first[:, None] * slope)
        tl.store(DShared + n[:, None] * step_ds + f[None, :], dx.to(DShared.dtype.element_ty), mask=there)
    if HAS_BALANCE:
        dx = 0.5 * first * second * (by_first - K * mean)  # of the first logit, the second's is the opposite
        tl.store(DBalance + n * step_db, dx.to(DBalance.dtype.element_ty), mask=real)
        tl.store(DBalance + n * step_db + 1, (-dx).to(DBalance.dtype.element_ty), mask=real)
        for i in tl.static_range(PAD):
            tl.store(DBalance + n * step_db + 2 + i, tl.zeros([BT], tl.float32).to(DBalance.dtype.element_ty), mask=real)


def _tiles(routed: int, shared: int) -> dict[str, int]:
    """Tokens to a program by how many pairs of heads are compared."""
    width = tile(routed, 1 << 30)
    return {"BT": max(1, min(32, 8192 // width**2)), "BE": width, "BS": tile(shared, 1 << 30)}


def _rows(x: Tensor, tensor: int) -> tuple[Tensor, Place]:
    """(B, N, E) as (B N, E) with neighbouring channels; without a copy where the tokens of a sample follow each other."""
    one, two, three = x.stride()
    if three == 1 and one == x.shape[1] * two:
        return x, Place(tensor, 0, (two,))
    return x.contiguous(), Place(tensor, 0, (x.shape[2],))


class GatesCall(NamedTuple):
    """What the launches of a router depend on.

    Attributes:
        rows: B N tokens.
        routed, shared_heads, topk: h_r, h_s and K.
        logits, shared, balance: where they are in the first three tensors, by token; None: there are none.
        dtype, device: of the logits.
    """

    rows: int
    routed: int
    shared_heads: int
    topk: int
    logits: Place
    shared: Place | None
    balance: Place | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls, logits: Tensor, shared: Tensor | None, balance: Tensor | None, topk: int, shared_heads: int
    ) -> tuple[GatesCall, tuple[Tensor, Tensor, Tensor]]:
        """And the three tensors."""
        batch, tokens, routed = logits.shape
        own, place = _rows(logits, 0)
        (first, of_first), (second, of_second) = ((own, None) if t is None else _rows(t, i) for i, t in ((1, shared), (2, balance)))
        sizes = batch * tokens, routed, shared_heads, topk
        return cls(*sizes, place, of_first, of_second, logits.dtype, logits.device), (own, first, second)

    def grid(self) -> tuple[int]:
        return (ceil_div(self.rows, _tiles(self.routed, self.shared_heads)["BT"]),)

    def numbers(self) -> tuple[float, ...]:
        return self.rows, self.routed, self.shared_heads, self.topk, torch.finfo(torch.float32).eps

    def flags(self) -> dict[str, Any]:
        found = {"HAS_SHARED": self.shared is not None, "HAS_BALANCE": self.balance is not None}
        return {**found, **_tiles(self.routed, self.shared_heads), "num_warps": 4}


def _step(place: Place | None) -> int:
    return 0 if place is None else place.strides[0]


@settled
def gates_launches(call: GatesCall) -> tuple[Launch, ...]:
    """Of the three tensors, gates, scores and choice; none if there are no tokens."""
    places = call.logits, call.shared or call.logits, call.balance or call.logits, Place(3), Place(4), Place(5)
    numbers = _step(call.logits), _step(call.shared), _step(call.balance), *call.numbers()
    return (Launch(_gates_kernel, call.grid(), places, numbers, call.flags()),) if call.rows else ()


@settled
def gates_gradient_launches(
    call: GatesCall, gradients: tuple[Place, Place, Place], of_scores: bool, of_loss: bool, pad: int = 0
) -> tuple[Launch, ...]:
    """Of the three tensors, scores, choice, gradients of gates, slopes by scores, the loss's gradient, then `gradients`.

    Args:
        gradients: places of those of the three, by token.
        of_scores: whether the slopes are gradients of scores, (rows, routed).
        of_loss: whether they are those of a loss by the scores of any token, (routed,).
        pad: how many columns behind the gradient of the balance become 0.
    """
    places = call.shared or Place(3), call.balance or Place(3), *(Place(i) for i in range(3, 8)), *gradients
    numbers = _step(call.shared), _step(call.balance), *(place.strides[0] for place in gradients), *call.numbers()
    flags = {**call.flags(), "HAS_DSCORES": of_scores, "HAS_DLOSS": of_loss, "PAD": pad}
    return (Launch(_gates_gradient_kernel, call.grid(), places, numbers, flags),) if call.rows else ()


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
    call, given = GatesCall.of(logits, shared, balance, topk, shared_heads)
    launch_all(gates_launches(call), (*given, gates, scores, chosen))
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
    dgates, slopes = dgates.contiguous(), scores if dscores is None else dscores.contiguous()
    found = tuple(logits.new_empty((0,) if t is None else t.shape) for t in (logits, shared, balance))
    call, given = GatesCall.of(logits, shared, balance, topk, shared_heads)
    places = Place(8, 0, (call.routed,)), Place(9, 0, (shared_heads,)), Place(10, 0, (2,))
    launches = gates_gradient_launches(call, places, dscores is not None, False)
    launch_all(launches, (*given, scores, chosen, dgates, slopes, scores, *found))
    return found  # type: ignore[return-value]


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
