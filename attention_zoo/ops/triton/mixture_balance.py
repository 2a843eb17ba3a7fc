"""The load-balance loss of a mixture of heads in two small kernels, and one for its gradient.

In plain PyTorch it is a dozen operations on small tensors each way, which is most of what they cost.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, tile
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = ["load_balance", "load_balance_backward", "load_balance_triton", "with_own_start"]

_PARTS = 64  # programs among which the tokens are shared out


@triton.jit
def _count(Real, n, N, ROWS, srb, srn, HAS_REAL: tl.constexpr):
    """1 for each token of the batch that counts, else 0."""
    counted = n < ROWS
    if HAS_REAL:
        counted &= tl.load(Real + (n // N) * srb + (n % N) * srn, mask=counted, other=0) != 0
    return counted.to(tl.float32)


@triton.jit
def _sums_kernel(
    Scores, Chosen, Real, Sums, srb, srn, N, ROWS, R, EACH, HAS_REAL: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """Sums (parts, 3, R) over the tokens of a part: of scores, of choices, and how many tokens count."""
    part, e = tl.program_id(0), tl.arange(0, BE)
    p, m, tokens = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
    first = part.to(tl.int64) * EACH
    for start in range(0, EACH, BT):
        n = first + start + tl.arange(0, BT)
        counted = _count(Real, n, N, tl.minimum(first + EACH, ROWS), srb, srn, HAS_REAL)[:, None]
        here = (counted > 0.0) & (e < R)[None, :]
        at = n[:, None] * R + e[None, :]
        p += tl.sum(tl.load(Scores + at, mask=here, other=0.0), 0)
        m += tl.sum(tl.load(Chosen + at, mask=here, other=0.0), 0)
        tokens += tl.sum(counted, 0)
    to = Sums + part * 3 * R + e
    tl.store(to, p, mask=e < R)
    tl.store(to + R, m, mask=e < R)
    tl.store(to + 2 * R, tokens, mask=e < R)


@triton.jit
def _loss_kernel(Sums, Loss, Load, Slopes, R, PARTS: tl.constexpr, BE: tl.constexpr):
    """R sum(mean(p) mean(m)); mean(m); and the slope of the loss by a token's scores."""
    part, e = tl.arange(0, PARTS)[:, None], tl.arange(0, BE)
    at = Sums + part * 3 * R + e[None, :]
    here = (part >= 0) & (e < R)[None, :]
    p = tl.sum(tl.load(at, mask=here, other=0.0), 0)
    m = tl.sum(tl.load(at + R, mask=here, other=0.0), 0)
    total = tl.maximum(tl.sum(tl.load(at + 2 * R, mask=here, other=0.0), 0), 1.0)
    load = m / total
    tl.store(Loss, R * tl.sum(p / total * load, 0))
    tl.store(Load + e, load, mask=e < R)
    tl.store(Slopes + e, R * load / total, mask=e < R)


@triton.jit
def _slopes_kernel(
    Grad, Slopes, Real, DScores, srb, srn, N, ROWS, R, HAS_REAL: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    n, e = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE)
    counted = _count(Real, n, N, ROWS, srb, srn, HAS_REAL)
    slope = tl.load(Slopes + e, mask=e < R, other=0.0) * tl.load(Grad)
    here = (n < ROWS)[:, None] & (e < R)[None, :]
    tl.store(DScores + n[:, None] * R + e[None, :], counted[:, None] * slope[None, :], mask=here)


def with_own_start(x: Tensor) -> Tensor:
    """x, or a copy where it does not begin at 16 bytes, which costs less than a launch that is not settled.

    The gradient of the mean of several losses is one tensor, and that of each loss a number in it.
    """
    return x.clone() if x.data_ptr() % 16 else x


def _real_of(real: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """A tensor to read it from, and its steps by sample and token, 0 where it is broadcast."""
    if real is None:
        return like, 0, 0
    by_sample, by_token = real.expand(like.shape[:2]).stride()
    return real.view(torch.uint8) if real.dtype == torch.bool else real, by_sample, by_token


@operator("load_balance")
def load_balance(scores: Tensor, chosen: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), the load (R,) and the loss's slope by the scores of a token that counts (R,)."""
    scores, chosen = scores.contiguous(), chosen.contiguous()
    batch, tokens, routed = scores.shape
    loss, load, slopes = (scores.new_empty(size) for size in ((), (routed,), (routed,)))
    sums = scores.new_empty((_PARTS, 3, routed))
    where, *steps = _real_of(real, scores)
    launches = _launches(batch, tokens, routed, (*steps, real is not None), where.dtype, scores.device)
    launch_all(launches, (scores, chosen, where, sums, loss, load, slopes))
    return loss, load, slopes


@settled
def _launches(
    batch: int, tokens: int, routed: int, real: tuple[int, int, bool], of_real: torch.dtype, device: torch.device
) -> tuple[Launch, Launch]:
    """Of scores, choice, the mask with its steps, sums, loss, load and slopes."""
    be = tile(routed, 1 << 30)
    bt = max(1, 2048 // be)
    each = ceil_div(ceil_div(batch * tokens, _PARTS), bt) * bt
    numbers, flags = (*real[:2], tokens, batch * tokens, routed, each), {"HAS_REAL": real[2], "BT": bt, "BE": be, "num_warps": 4}
    first = Launch(_sums_kernel, (_PARTS,), tuple(Place(i) for i in range(4)), numbers, flags)
    constants = {"PARTS": _PARTS, "BE": be, "num_warps": 4}
    return first, Launch(_loss_kernel, (1,), tuple(Place(i) for i in range(3, 7)), (routed,), constants)


@load_balance.register_fake
def _(scores: Tensor, chosen: Tensor, real: Any) -> tuple[Tensor, Tensor, Tensor]:
    routed = scores.shape[-1]
    return scores.new_empty(()), scores.new_empty((routed,)), scores.new_empty((routed,))


@operator("load_balance_backward")
def load_balance_backward(grad: Tensor, slopes: Tensor, real: Tensor | None, batch: int, tokens: int) -> Tensor:
    routed = slopes.shape[0]
    dscores = slopes.new_empty((batch, tokens, routed))
    where, *steps = _real_of(real, dscores)
    if dscores.numel():
        grad = with_own_start(grad)
        launch = _gradient_launch(batch, tokens, routed, (*steps, real is not None), (grad.dtype, where.dtype), slopes.device)
        launch(grad, slopes, where, dscores)
    return dscores


@settled
def _gradient_launch(
    batch: int, tokens: int, routed: int, real: tuple[int, int, bool], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Launch:
    """Of the loss's gradient, slopes, the mask with its steps and the scores' gradient."""
    be = tile(routed, 1 << 30)
    bt = max(1, 2048 // be)
    numbers, flags = (*real[:2], tokens, batch * tokens, routed), {"HAS_REAL": real[2], "BT": bt, "BE": be, "num_warps": 4}
    return Launch(_slopes_kernel, (ceil_div(batch * tokens, bt),), tuple(Place(i) for i in range(4)), numbers, flags)


@load_balance_backward.register_fake
def _(grad: Tensor, slopes: Tensor, real: Any, batch: int, tokens: int) -> Tensor:
    return slopes.new_empty((batch, tokens, slopes.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.shape = inputs[0].shape[:2]
    ctx.save_for_backward(output[2], inputs[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    return load_balance_backward(grad, *ctx.saved_tensors, *ctx.shape), None, None


load_balance.register_autograd(_backward, setup_context=_setup)


def load_balance_triton(scores: Tensor, chosen: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss and the load; tensors as `ops.mixture.load_balance_loss` has them, `scores` and `chosen` in float32."""
    loss, load, _ = load_balance(scores, chosen, real)
    return loss, load.detach()
