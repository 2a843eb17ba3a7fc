"""Foveal attention as Triton kernels: a token's neighbours and all pooled tokens under one softmax, nothing of size N w^2 d formed.

Neighbours are read where they stand, one place of the window after the other, for a tile of tokens: with 3 x 3 places a product of
matrices would be mostly zeros. Pooled tokens are tiles of matrix products. The backward keeps three numbers for each token and
place, from which the keys' kernel collects: no two programs write to one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import absorb, ceil_div, conclude, heads_last, last_contiguous, precision, stride_unit, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["foveal_attention_triton"]

_PROGRAMS = 1024  # that sum up gradients of pooled tokens, each over its share of the queries


@triton.jit
def _place(n, j, sign, HEIGHT, WIDTH, SIDE: tl.constexpr):
    """The token at place j of the windows around tokens n, or, with sign -1, whose window has them there; and whether it exists."""
    y, x = n // WIDTH + sign * (j // SIDE - SIDE // 2), n % WIDTH + sign * (j % SIDE - SIDE // 2)
    return y * WIDTH + x, (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)


@triton.jit
def _at(X, b, h, n, d, sb, sh, sn, UNIT: tl.constexpr):
    """Rows n of a head; strides come in units (`stride_unit`)."""
    return X + (b * sb + h * sh) * UNIT + (n * (sn * UNIT))[:, None] + d[None, :]


@triton.jit
def _rows(X, b, h, n, d, sb, sh, sn, wanted, UNIT: tl.constexpr):
    return tl.load(_at(X, b, h, n, d, sb, sh, sn, UNIT), mask=wanted, other=0.0)


@triton.jit
def _local_logit(q, k, LocalBias, h, j, inside, PLACES: tl.constexpr):
    """Of base 2, for each token, of its neighbour at place j."""
    x = (tl.sum(q * k, 1) + tl.load(LocalBias + h * PLACES + j).to(tl.float32)) * 1.4426950408889634
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _factor(u, Tokens, TokenBias, h, j, d, D: tl.constexpr, PLACES: tl.constexpr):
    """What a neighbour at place j counts for by its place, and the vector of that place."""
    token = tl.load(Tokens + (h * D + d) * PLACES + j, mask=d < D, other=0.0).to(tl.float32)
    return tl.sum(u * token[None, :], 1) + tl.load(TokenBias + h * PLACES + j).to(tl.float32), token


@triton.jit
def _pooled_logits(q, pooled_k, PooledBias, n, p, N, POOLED, real, PRECISION: tl.constexpr):
    """Of base 2, (tokens, pooled tokens)."""
    bias = tl.load(
        PooledBias + (n * POOLED)[:, None] + p[None, :], mask=real[:, None] & (p < POOLED)[None, :], other=0.0
    )  # fmt: skip
    x = (tl.dot(q, tl.trans(pooled_k), input_precision=PRECISION) + bias.to(tl.float32)) * 1.4426950408889634
    return tl.where((p < POOLED)[None, :], x, float("-inf"))


@triton.jit
def _forward_kernel(
    Q, U, K, V, PooledK, PooledV, LocalBias, PooledBias, Tokens, TokenBias, Out, Lse,
    sqb, sqh, sqn, sub, suh, sun, skb, skh, skn, svb, svh, svn, spb, sph, spn, swb, swh, swn, sob, soh, son,
    HEADS, N, POOLED, HEIGHT, WIDTH,
    SIDE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    real = n < N
    wanted = real[:, None] & (d < D)[None, :]
    PLACES: tl.constexpr = SIDE * SIDE
    q = _rows(Q, b, h, n, d, sqb, sqh, sqn, wanted, UNIT)
    u = _rows(U, b, h, n, d, sub, suh, sun, wanted, UNIT).to(tl.float32)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, POOLED, BP):
        p = start + tl.arange(0, BP)
        there = (p < POOLED)[:, None] & (d < D)[None, :]
        pooled_k = _rows(PooledK, b, h, p, d, spb, sph, spn, there, UNIT)
        pooled_v = _rows(PooledV, b, h, p, d, swb, swh, swn, there, UNIT)
        x = _pooled_logits(q, pooled_k, PooledBias + h.to(tl.int64) * N * POOLED, n, p, N, POOLED, real, PRECISION)
        weights, fade, highest, total = absorb(x, highest, total)
        acc = acc * fade[:, None] + tl.dot(weights.to(pooled_v.dtype), pooled_v, input_precision=PRECISION)
    by_place = tl.zeros([BM, BD], tl.float32)
    q = q.to(tl.float32)
    for j in range(PLACES):
        m, inside = _place(n, j, 1, HEIGHT, WIDTH, SIDE)
        inside = inside & real
        near = inside[:, None] & (d < D)[None, :]
        k = _rows(K, b, h, m, d, skb, skh, skn, near, UNIT).to(tl.float32)
        v = _rows(V, b, h, m, d, svb, svh, svn, near, UNIT).to(tl.float32)
        x = _local_logit(q, k, LocalBias, h, j, inside, PLACES)
        higher = tl.maximum(highest, x)
        weight, fade = tl.exp2(x - higher), tl.exp2(highest - higher)
        acc, total, highest = acc * fade[:, None] + weight[:, None] * v, total * fade + weight, higher
        factor, _ = _factor(u, Tokens, TokenBias, h, j, d, D, PLACES)
        by_place += factor[:, None] * v
    out, lse = conclude(acc, highest, total)
    tl.store(_at(Out, b, h, n, d, sob, soh, son, UNIT), (out + by_place).to(Out.dtype.element_ty), mask=wanted)
    tl.store(Lse + bh.to(tl.int64) * N + n, lse, mask=real)


@triton.jit
def _query_kernel(
    Q, U, K, V, PooledK, PooledV, LocalBias, PooledBias, Tokens, TokenBias, Out, DOut, Lse, DQ, DU, Delta,
    DLogits, Weights, DFactors,
    sqb, sqh, sqn, sub, suh, sun, skb, skh, skn, svb, svh, svn, spb, sph, spn, swb, swh, swn, sob, soh, son, sgb, sgh, sgn,
    sdqb, sdqh, sdqn, sdub, sduh, sdun,
    HEADS, N, POOLED, HEIGHT, WIDTH,
    SIDE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of both queries; for the other kernels delta, and for each place the gradients of its logit and of its factor, and
    the whole weight of its value."""
    bh = tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    real = n < N
    wanted = real[:, None] & (d < D)[None, :]
    PLACES: tl.constexpr = SIDE * SIDE
    of_head = bh.to(tl.int64) * N
    native = _rows(Q, b, h, n, d, sqb, sqh, sqn, wanted, UNIT)
    u = _rows(U, b, h, n, d, sub, suh, sun, wanted, UNIT).to(tl.float32)
    rounded = _rows(DOut, b, h, n, d, sgb, sgh, sgn, wanted, UNIT)
    q, grad = native.to(tl.float32), rounded.to(tl.float32)
    lse = tl.load(Lse + of_head + n, mask=real, other=0.0)
    delta = tl.sum(_rows(Out, b, h, n, d, sob, soh, son, wanted, UNIT).to(tl.float32) * grad, 1)
    du = tl.zeros([BM, BD], tl.float32)
    for j in range(PLACES):  # delta is of the softmax's part of the output
        m, inside = _place(n, j, 1, HEIGHT, WIDTH, SIDE)
        near = (inside & real)[:, None] & (d < D)[None, :]
        v = _rows(V, b, h, m, d, svb, svh, svn, near, UNIT).to(tl.float32)
        factor, token = _factor(u, Tokens, TokenBias, h, j, d, D, PLACES)
        dp = tl.sum(grad * v, 1)
        delta -= factor * dp
        du += dp[:, None] * token[None, :]
        tl.store(DFactors + of_head * PLACES + j * N + n, dp.to(DFactors.dtype.element_ty), mask=real)
    dq = tl.zeros([BM, BD], tl.float32)
    for j in range(PLACES):
        m, inside = _place(n, j, 1, HEIGHT, WIDTH, SIDE)
        inside = inside & real
        near = inside[:, None] & (d < D)[None, :]
        k = _rows(K, b, h, m, d, skb, skh, skn, near, UNIT).to(tl.float32)
        v = _rows(V, b, h, m, d, svb, svh, svn, near, UNIT).to(tl.float32)
        p = tl.exp2(_local_logit(q, k, LocalBias, h, j, inside, PLACES) - lse)
        factor, _ = _factor(u, Tokens, TokenBias, h, j, d, D, PLACES)
        ds = p * (tl.sum(grad * v, 1) - delta)
        dq += ds[:, None] * k
        at = of_head * PLACES + j * N + n
        tl.store(DLogits + at, ds.to(DLogits.dtype.element_ty), mask=real)
        tl.store(Weights + at, (p + factor).to(Weights.dtype.element_ty), mask=real)
    for start in range(0, POOLED, BP):
        p = start + tl.arange(0, BP)
        there = (p < POOLED)[:, None] & (d < D)[None, :]
        pooled_k = _rows(PooledK, b, h, p, d, spb, sph, spn, there, UNIT)
        pooled_v = _rows(PooledV, b, h, p, d, swb, swh, swn, there, UNIT)
        x = _pooled_logits(native, pooled_k, PooledBias + h.to(tl.int64) * N * POOLED, n, p, N, POOLED, real, PRECISION)
        dp = tl.dot(rounded, tl.trans(pooled_v), input_precision=PRECISION)
        ds = tl.exp2(x - lse[:, None]) * (dp - delta[:, None])
        dq += tl.dot(ds.to(pooled_k.dtype), pooled_k, input_precision=PRECISION)
    tl.store(_at(DQ, b, h, n, d, sdqb, sdqh, sdqn, UNIT), dq.to(DQ.dtype.element_ty), mask=wanted)
    tl.store(_at(DU, b, h, n, d, sdub, sduh, sdun, UNIT), du.to(DU.dtype.element_ty), mask=wanted)
    tl.store(Delta + of_head + n, delta, mask=real)


@triton.jit
def _neighbour_kernel(
    Q, DOut, DLogits, Weights, DK, DV_,
    sqb, sqh, sqn, sgb, sgh, sgn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    HEADS, N, HEIGHT, WIDTH,
    SIDE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of neighbours' keys and values, from all tokens in whose windows they stand."""
    bh = tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    real = m < N
    PLACES: tl.constexpr = SIDE * SIDE
    dk = tl.zeros([BM, BD], tl.float32)
    dv = tl.zeros([BM, BD], tl.float32)
    for j in range(PLACES):
        n, inside = _place(m, j, -1, HEIGHT, WIDTH, SIDE)
        inside = inside & real
        near = inside[:, None] & (d < D)[None, :]
        at = (bh.to(tl.int64) * PLACES + j) * N + n
        ds = tl.load(DLogits + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(Weights + at, mask=inside, other=0.0).to(tl.float32)
        dk += ds[:, None] * _rows(Q, b, h, n, d, sqb, sqh, sqn, near, UNIT).to(tl.float32)
        dv += weight[:, None] * _rows(DOut, b, h, n, d, sgb, sgh, sgn, near, UNIT).to(tl.float32)
    wanted = real[:, None] & (d < D)[None, :]
    tl.store(_at(DK, b, h, m, d, sdkb, sdkh, sdkn, UNIT), dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(_at(DV_, b, h, m, d, sdvb, sdvh, sdvn, UNIT), dv.to(DV_.dtype.element_ty), mask=wanted)


@triton.jit
def _pooled_kernel(
    Q, PooledK, PooledV, PooledBias, DOut, Lse, Delta, DPooledK, DPooledV,
    sqb, sqh, sqn, spb, sph, spn, swb, swh, swn, sgb, sgh, sgn,
    HEADS, ALL, N, POOLED, TILES, STEPS,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of pooled keys and values from `STEPS` tiles of queries: (share, sample and head, pooled token, channel)."""
    bh = tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    share, portion = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    p, d = portion * BP + tl.arange(0, BP), tl.arange(0, BD)
    there = (p < POOLED)[:, None] & (d < D)[None, :]
    pooled_k = _rows(PooledK, b, h, p, d, spb, sph, spn, there, UNIT)
    pooled_v = _rows(PooledV, b, h, p, d, swb, swh, swn, there, UNIT)
    dk = tl.zeros([BP, BD], tl.float32)
    dv = tl.zeros([BP, BD], tl.float32)
    for step in range(STEPS):
        n = (share * STEPS + step) * BM + tl.arange(0, BM)
        real = n < N
        wanted = real[:, None] & (d < D)[None, :]
        q = _rows(Q, b, h, n, d, sqb, sqh, sqn, wanted, UNIT)
        grad = _rows(DOut, b, h, n, d, sgb, sgh, sgn, wanted, UNIT)
        lse = tl.load(Lse + bh.to(tl.int64) * N + n, mask=real, other=float("inf"))
        delta = tl.load(Delta + bh.to(tl.int64) * N + n, mask=real, other=0.0)
        bias = tl.load(
            PooledBias + h.to(tl.int64) * N * POOLED + (n * POOLED)[None, :] + p[:, None],
            mask=real[None, :] & (p < POOLED)[:, None], other=0.0,
        )  # fmt: skip
        x = (tl.dot(pooled_k, tl.trans(q), input_precision=PRECISION) + bias.to(tl.float32)) * 1.4426950408889634
        weights = tl.exp2(x - lse[None, :])
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        ds = weights * (tl.dot(pooled_v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    at = ((share * ALL + bh).to(tl.int64) * POOLED + p)[:, None] * D + d[None, :]
    tl.store(DPooledK + at, dk, mask=there)
    tl.store(DPooledV + at, dv, mask=there)


@triton.jit
def _bias_kernel(
    Q, PooledK, PooledV, PooledBias, DOut, Lse, Delta, DBias,
    sqb, sqh, sqn, spb, sph, spn, swb, swh, swn, sgb, sgh, sgn,
    BATCH, HEADS, N, POOLED, TILES,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of the pooled tokens' bias (head, token, pooled token): a sum over the samples."""
    h = tl.program_id(1)
    n = tl.program_id(0) // TILES * BM + tl.arange(0, BM)
    p, d = tl.program_id(0) % TILES * BP + tl.arange(0, BP), tl.arange(0, BD)
    real = n < N
    wanted, there = real[:, None] & (d < D)[None, :], (p < POOLED)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BM, BP], tl.float32)
    for sample in range(BATCH):
        b = tl.cast(sample, tl.int64)
        q = _rows(Q, b, h, n, d, sqb, sqh, sqn, wanted, UNIT)
        grad = _rows(DOut, b, h, n, d, sgb, sgh, sgn, wanted, UNIT)
        pooled_k = _rows(PooledK, b, h, p, d, spb, sph, spn, there, UNIT)
        pooled_v = _rows(PooledV, b, h, p, d, swb, swh, swn, there, UNIT)
        lse = tl.load(Lse + (b * HEADS + h) * N + n, mask=real, other=float("inf"))
        delta = tl.load(Delta + (b * HEADS + h) * N + n, mask=real, other=0.0)
        x = _pooled_logits(q, pooled_k, PooledBias + h.to(tl.int64) * N * POOLED, n, p, N, POOLED, real, PRECISION)
        dp = tl.dot(grad, tl.trans(pooled_v), input_precision=PRECISION)
        acc += tl.exp2(x - lse[:, None]) * (dp - delta[:, None])
    at = DBias + h.to(tl.int64) * N * POOLED + (n * POOLED)[:, None] + p[None, :]
    tl.store(at, acc.to(DBias.dtype.element_ty), mask=real[:, None] & (p < POOLED)[None, :])


class _Call(NamedTuple):
    """What the launches of a call depend on besides where its tensors are: its sizes, the bytes of a number, and precision."""

    batch: int
    heads: int
    tokens: int
    pooled: int
    height: int
    width: int
    dim: int
    side: int
    bytes: int
    precision: str

    @classmethod
    def of(cls, q: Tensor, pooled_k: Tensor, side: int, height: int, width: int) -> _Call:
        batch, heads, tokens, dim = q.shape
        return cls(batch, heads, tokens, pooled_k.shape[2], height, width, dim, side, q.element_size(), precision(q))

    @property
    def rows(self) -> int:
        """Of a tile of tokens, a few of which stay in registers."""
        return max(16, min(64, 4096 // (tile(self.dim, 128) * self.bytes)))

    def unit(self, strides: tuple[tuple[int, ...], ...]) -> int:
        """In which strides of (B, h, N, d) are given, all but the last, which is 1."""
        return stride_unit((stride for of in strides for stride in of[:3]), self.bytes)

    def constants(self, unit: int, *names: str) -> dict[str, Any]:
        known = {"SIDE": self.side, "PRECISION": self.precision, "BP": tile(self.pooled)}
        same = {"D": self.dim, "UNIT": unit, "BM": self.rows, "BD": tile(self.dim, 128)}
        return {name: known[name] for name in names} | same | {"num_warps": 4, "num_stages": 2}

    def grid(self) -> tuple[int, int]:
        return ceil_div(self.tokens, self.rows), self.batch * self.heads

    def shares(self) -> tuple[int, int]:
        """Into how many parts queries are shared out between programs, and of how many tiles each is."""
        tiles = ceil_div(self.tokens, self.rows)
        programs = self.batch * self.heads * ceil_div(self.pooled, tile(self.pooled))
        steps = ceil_div(tiles, min(tiles, max(1, _PROGRAMS // programs)))
        return ceil_div(tiles, steps), steps


_Strides = tuple[tuple[int, ...], ...]


# `strides`: of the tensors of (B, h, N, d), first among those of a launch; `key`: dtypes and device.


@settled
def _forward_of(call: _Call, strides: _Strides, key: tuple[Any, ...]) -> Launch:
    """Of q, u, k, v, pooled k, pooled v, out; local bias, pooled bias, tokens, their bias; log-normalisers."""
    places, unit = [Place(number) for number in (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 6, 11)], call.unit(strides)
    numbers = [stride // unit for of in strides for stride in of[:3]]
    sizes = call.heads, call.tokens, call.pooled, call.height, call.width
    return Launch(_forward_kernel, call.grid(), places, (*numbers, *sizes), call.constants(unit, "SIDE", "PRECISION", "BP"))


@settled
def _backward_of(call: _Call, strides: _Strides, key: tuple[Any, ...]) -> tuple[Launch, ...]:
    """Of q, u, k, v, pooled k, pooled v, out, its gradient, dq, du, dk, dv; local bias, pooled bias, tokens, their bias;
    log-normalisers, delta, three numbers for each place; dpooled k, dpooled v, each share's; the pooled bias's gradient."""
    (q, u, k, v, pooled_k, pooled_v, out, grad, dq, du, dk, dv), unit = map(Place, range(12)), call.unit(strides)
    local, pooled_bias, tokens, token_bias, lse, delta, logits, weights, factors, d_pooled_k, d_pooled_v, d_bias = map(
        Place, range(12, 24)
    )

    def numbers(*places: Place) -> list[int]:
        return [stride // unit for place in places for stride in strides[place.tensor][:3]]

    shares, steps = call.shares()
    tiles = ceil_div(call.pooled, tile(call.pooled))
    of_pooled = (q, pooled_k, pooled_v, pooled_bias, grad, lse, delta), numbers(q, pooled_k, pooled_v, grad)
    constants = call.constants(unit, "PRECISION", "BP")
    return (
        Launch(
            _query_kernel,
            call.grid(),
            (q, u, k, v, pooled_k, pooled_v, local, pooled_bias, tokens, token_bias, out, grad, lse, dq, du, delta)
            + (logits, weights, factors),
            (
                *numbers(q, u, k, v, pooled_k, pooled_v, out, grad, dq, du),
                call.heads,
                call.tokens,
                call.pooled,
                call.height,
                call.width,
            ),
            call.constants(unit, "SIDE", "PRECISION", "BP"),
        ),
        Launch(
            _neighbour_kernel,
            call.grid(),
            (q, grad, logits, weights, dk, dv),
            (*numbers(q, grad, dk, dv), call.heads, call.tokens, call.height, call.width),
            call.constants(unit, "SIDE"),
        ),
        Launch(
            _pooled_kernel,
            (shares * tiles, call.batch * call.heads),
            (*of_pooled[0], d_pooled_k, d_pooled_v),
            (*of_pooled[1], call.heads, call.batch * call.heads, call.tokens, call.pooled, tiles, steps),
            constants,
        ),
        Launch(
            _bias_kernel,
            (call.grid()[0] * tiles, call.heads),
            (*of_pooled[0], d_bias),
            (*of_pooled[1], call.batch, call.heads, call.tokens, call.pooled, tiles),
            constants,
        ),
    )


@operator("foveal_forward")
def _foveal_forward(
    q: Tensor, u: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor,
    local_bias: Tensor, pooled_bias: Tensor, tokens: Tensor, token_bias: Tensor, side: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs, and log-normalisers of base 2 of the softmaxes (B, h, N)."""
    out, lse = heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        tensors = (*map(last_contiguous, (q, u, k, v, pooled_k, pooled_v)), out)
        tables = tuple(t.contiguous() for t in (local_bias, pooled_bias, tokens, token_bias))
        key = (*(t.dtype for t in (q, *tables)), q.device)
        launch = _forward_of(_Call.of(q, pooled_k, side, height, width), tuple(t.stride() for t in tensors), key)
        launch(*tensors, *tables, lse)
    return out, lse


@_foveal_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("foveal_backward")
def _foveal_backward(
    q: Tensor, u: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor,
    local_bias: Tensor, pooled_bias: Tensor, tokens: Tensor, token_bias: Tensor,
    out: Tensor, lse: Tensor, grad: Tensor, side: int, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first ten."""
    dq, du, dk, dv = (heads_last(q) for _ in range(4))
    batch, heads, length, dim = q.shape
    if not out.numel():
        rest = (torch.zeros_like(t) for t in (pooled_k, pooled_v, local_bias, pooled_bias, tokens, token_bias))
        return dq, du, dk, dv, *rest  # type: ignore[return-value]
    tensors = (*map(last_contiguous, (q, u, k, v, pooled_k, pooled_v, out, grad)), dq, du, dk, dv)
    tables = tuple(t.contiguous() for t in (local_bias, pooled_bias, tokens, token_bias))
    call, key = _Call.of(q, pooled_k, side, height, width), (*(t.dtype for t in (q, *tables)), q.device)
    delta = torch.empty_like(lse)
    logits, weights, factors = (q.new_empty((batch, heads, side * side, length)) for _ in range(3))
    shares = q.new_empty((2, call.shares()[0], batch, heads, pooled_k.shape[2], dim), dtype=torch.float32)
    d_bias = torch.empty_like(tables[1])
    launches = _backward_of(call, tuple(t.stride() for t in tensors), key)
    given = (*tensors, *tables, lse, delta, logits, weights, factors, shares[0], shares[1], d_bias)
    for launch in launches:
        launch(*given)
    by_place = (logits.sum((0, 3), dtype=torch.float32), factors.sum((0, 3), dtype=torch.float32))
    d_tokens = (factors @ u).sum(0, dtype=torch.float32).transpose(1, 2)
    return (
        *(dq, du, dk, dv, *(share.sum(0).to(q.dtype) for share in shares), by_place[0].to(local_bias.dtype), d_bias),
        d_tokens.to(tokens.dtype).contiguous(),
        by_place[1].unsqueeze(1).to(token_bias.dtype),
    )


@_foveal_backward.register_fake
def _(q: Tensor, u: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tables = (t.new_empty(t.shape) for t in rest[:4])
    return *(heads_last(q) for _ in range(4)), pooled_k.new_empty(pooled_k.shape), pooled_v.new_empty(pooled_v.shape), *tables


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.settings = inputs[10:]


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    return *_foveal_backward(*ctx.saved_tensors, grad, *ctx.settings), None, None, None


_foveal_forward.register_autograd(_backward, setup_context=_setup)


def foveal_attention_triton(*tensors: Tensor, window_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Outputs (B, h, N, d) of the ten tensors that `ops.foveal_attention` has checked."""
    return _foveal_forward(*tensors, window_size, *grid_size)[0]
