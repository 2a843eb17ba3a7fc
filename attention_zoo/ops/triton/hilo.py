"""HiLo attention as Triton kernels: both branches read one fused projection and write into one buffer, side by side.

Hi-Fi is `windows.py`'s kernels. Lo-Fi has few keys: up to `_ONE_PASS` of them stay in a program that walks along the queries and
computes all three gradients on the way; of more keys, one kernel computes the gradient of the queries and one that of the keys.
No atomics: where several programs share the queries of a head, their sums are kept apart and added up at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import (
    LOG2E,
    absorb,
    ceil_div,
    conclude,
    last_contiguous,
    per_logit,
    precision,
    prepare_gradient,
    read_lse,
    tile,
)
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled
from attention_zoo.ops.triton.windows import Windows, backward_launch, forward_launch

__all__ = ["hilo_attention_triton", "with_window_means_triton"]

_ONE_PASS = 64  # all tiles of a loop of 64 rows: on Hopper, loops that mix its products with older ones have been seen to race
_PROGRAMS = 512  # that keep a GPU busy


@triton.jit
def _low_forward_kernel(
    Q, K, V, Out, Lse,
    scale,  # times log2 e
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    HEADS, N, M, D,
    PRECISION: tl.constexpr, ONE_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    d = tl.arange(0, BD)
    wanted = (n < N)[:, None] & (d < D)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
    K += b * skb + h * skh
    V += b * svb + h * svh
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, BN if ONE_TILE else M, BN):  # of one step the compiler makes no loop, which takes memory for its stages
        m = start + tl.arange(0, BN)
        there = (m < M)[:, None] & (d < D)[None, :]
        k = tl.load(K + m[:, None] * skn + d[None, :], mask=there, other=0.0)
        v = tl.load(V + m[:, None] * svn + d[None, :], mask=there, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        z = tl.where((m < M)[None, :], z, float("-inf"))
        p, fade, highest, total = absorb(z, highest, total)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out, lse = conclude(acc, highest, total)
    tl.store(Out + b * sob + h * soh + n[:, None] * son + d[None, :], out.to(Out.dtype.element_ty), mask=wanted)
    tl.store(Lse + bh.to(tl.int64) * N + n, lse, mask=n < N)


@triton.jit
def _low_one_pass_kernel(
    Q, K, V, Lse, DOut, DQ, DK, DV_,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdqb, sdqh, sdqn, sds, sdb, sdh, sdn,
    HEADS, N, M, D, SHARE,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All keys of a head, and `SHARE` queries of it: no other program has a part of these queries' softmax."""
    share, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    m, d = tl.arange(0, BN), tl.arange(0, BD)
    there = (m < M)[:, None] & (d < D)[None, :]
    k = tl.load(K + b * skb + h * skh + m[:, None] * skn + d[None, :], mask=there, other=0.0)
    v = tl.load(V + b * svb + h * svh + m[:, None] * svn + d[None, :], mask=there, other=0.0)
    Q += b * sqb + h * sqh
    DOut += b * sgb + h * sgh
    DQ += b * sdqb + h * sdqh
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, N), BM):
        n = start + tl.arange(0, BM)
        wanted = (n < N)[:, None] & (d < D)[None, :]
        q = tl.load(Q + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
        grad = tl.load(DOut + n[:, None] * sgn + d[None, :], mask=wanted, other=0.0)
        lse = read_lse(Lse, bh.to(tl.int64) * N + n, n < N)
        # (keys, queries). Where there is no key, k and v are 0: its weight enters nothing that is stored
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * per_logit(scale)
        tl.store(DQ + n[:, None] * sdqn + d[None, :], dq.to(DQ.dtype.element_ty), mask=wanted)
    at = share * sds + b * sdb + h * sdh + m[:, None] * sdn + d[None, :]
    tl.store(DK + at, (dk * per_logit(scale)).to(DK.dtype.element_ty), mask=there)
    tl.store(DV_ + at, dv.to(DV_.dtype.element_ty), mask=there)


@triton.jit
def _low_query_gradient_kernel(
    Q, K, V, Out, Lse, DOut, Delta, DQ,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn, sdqb, sdqh, sdqn,
    HEADS, N, M, D,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n, bh = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    d = tl.arange(0, BD)
    wanted = (n < N)[:, None] & (d < D)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
    out = tl.load(Out + b * sob + h * soh + n[:, None] * son + d[None, :], mask=wanted, other=0.0)
    grad = tl.load(DOut + b * sgb + h * sgh + n[:, None] * sgn + d[None, :], mask=wanted, other=0.0)
    lse, delta = prepare_gradient(out, grad, Lse, Lse, Delta, bh.to(tl.int64) * N + n, n < N, False)
    K += b * skb + h * skh
    V += b * svb + h * svh
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, M, BN):
        m = start + tl.arange(0, BN)
        there = (m < M)[:, None] & (d < D)[None, :]
        k = tl.load(K + m[:, None] * skn + d[None, :], mask=there, other=0.0)
        v = tl.load(V + m[:, None] * svn + d[None, :], mask=there, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where((m < M)[None, :], tl.exp2(z - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq = (acc * per_logit(scale)).to(DQ.dtype.element_ty)
    tl.store(DQ + b * sdqb + h * sdqh + n[:, None] * sdqn + d[None, :], dq, mask=wanted)


@triton.jit
def _low_key_gradient_kernel(
    Q, K, V, Lse, DOut, Delta, DK, DV_,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sds, sdb, sdh, sdn,
    HEADS, N, M, D, SHARE, TILES,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of keys, over `SHARE` queries."""
    pid, bh = tl.program_id(0), tl.program_id(1)
    share, m = pid // TILES, pid % TILES * BN + tl.arange(0, BN)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    d = tl.arange(0, BD)
    there = (m < M)[:, None] & (d < D)[None, :]
    k = tl.load(K + b * skb + h * skh + m[:, None] * skn + d[None, :], mask=there, other=0.0)
    v = tl.load(V + b * svb + h * svh + m[:, None] * svn + d[None, :], mask=there, other=0.0)
    Q += b * sqb + h * sqh
    DOut += b * sgb + h * sgh
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, N), BM):
        n = start + tl.arange(0, BM)
        wanted = (n < N)[:, None] & (d < D)[None, :]
        q = tl.load(Q + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
        grad = tl.load(DOut + n[:, None] * sgn + d[None, :], mask=wanted, other=0.0)
        place = bh.to(tl.int64) * N + n
        lse = read_lse(Lse, place, n < N)
        delta = tl.load(Delta + place, mask=n < N, other=0.0)
        z = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # (keys, queries): products of p and ds need no transpose
        p = tl.exp2(z - lse[None, :])
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dv += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    at = share * sds + b * sdb + h * sdh + m[:, None] * sdn + d[None, :]
    tl.store(DK + at, (dk * per_logit(scale)).to(DK.dtype.element_ty), mask=there)
    tl.store(DV_ + at, dv.to(DV_.dtype.element_ty), mask=there)


@triton.jit
def _write_means(
    row_of, column_of, X, Means, sxb, sxy, sxx, WINDOWS, HEIGHT, WIDTH, C, SIDE,
    MASKED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of a tile of windows and channels."""
    number, c = row_of * BM + tl.arange(0, BM), column_of * BC + tl.arange(0, BC)
    down, across = tl.cdiv(HEIGHT, SIDE), tl.cdiv(WIDTH, SIDE)
    b, u, w = (number // (down * across)).to(tl.int64), number // across % down, number % across
    total = tl.zeros([BM, BC], tl.float32)
    for cell in range(SIDE * SIDE):
        y, x = u * SIDE + cell // SIDE, w * SIDE + cell % SIDE
        real = (number < WINDOWS) & (y < HEIGHT) & (x < WIDTH)
        at = (b * sxb + y * sxy + x * sxx)[:, None] + c[None, :]
        total += tl.load(X + at, mask=real[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    if MASKED:
        rows, columns = tl.minimum(SIDE, HEIGHT - u * SIDE), tl.minimum(SIDE, WIDTH - w * SIDE)
        total /= (rows * columns)[:, None].to(tl.float32)
    else:
        total /= SIDE * SIDE
    at = number.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(Means + at, total.to(Means.dtype.element_ty), mask=(number < WINDOWS)[:, None] & (c < C)[None, :])


@triton.jit
def _means_kernel(
    X, Means,
    sxb, sxy, sxx,
    WINDOWS, HEIGHT, WIDTH, C, SIDE, COLUMNS,
    MASKED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    _write_means(pid // COLUMNS, pid % COLUMNS, X, Means, sxb, sxy, sxx, WINDOWS, HEIGHT, WIDTH, C, SIDE, MASKED, BM, BC)


@triton.jit
def _spread_kernel(
    Grad, Of, Out,
    HEIGHT, WIDTH, CELLS, C, SIDE, MASKED: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of each cell from that of its window's mean, added to `Of`."""
    cell, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    down, across = tl.cdiv(HEIGHT, SIDE), tl.cdiv(WIDTH, SIDE)
    b, y, x = (cell // (HEIGHT * WIDTH)).to(tl.int64), cell // WIDTH % HEIGHT, cell % WIDTH
    u, w = y // SIDE, x // SIDE
    wanted = (cell < CELLS)[:, None] & (c < C)[None, :]
    grad = tl.load(Grad + ((b * down + u) * across + w)[:, None] * C + c[None, :], mask=wanted, other=0.0).to(tl.float32)
    if MASKED:
        rows, columns = tl.minimum(SIDE, HEIGHT - u * SIDE), tl.minimum(SIDE, WIDTH - w * SIDE)
        grad /= (rows * columns)[:, None].to(tl.float32)
    else:
        grad /= SIDE * SIDE
    at = cell.to(tl.int64)[:, None] * C + c[None, :]
    if ADD:
        grad += tl.load(Of + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(Out + at, grad.to(Out.dtype.element_ty), mask=wanted)


@triton.jit
def _prepare_kernel(
    X, Means, High, Query, HighBias, QueryBias, OutHigh, OutLow, OutHighBias, OutLowBias, In, InBias, Out, OutBias,
    sxb, sxy, sxx,
    WINDOWS, HEIGHT, WIDTH, C, SIDE, COLUMNS, OF_MEANS,
    HIGH, IN_ROWS, OUT_HIGH, OUT_ROWS, OUT_LEFT, OUT, JOINED,
    HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_OUT_BIAS: tl.constexpr,
    MASKED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`OF_MEANS` programs write the means of windows, the others join parameters.

    These are rows [High; Query] of `In`, then those of `Out`, whose diagonal blocks are OutHigh and OutLow; and their biases.
    """
    pid = tl.program_id(0)
    if pid < OF_MEANS:
        _write_means(pid // COLUMNS, pid % COLUMNS, X, Means, sxb, sxy, sxx, WINDOWS, HEIGHT, WIDTH, C, SIDE, MASKED, BM, BC)
    else:
        pid -= OF_MEANS
        row, c = pid // JOINED * BM + tl.arange(0, BM), pid % JOINED * BC + tl.arange(0, BC)
        _join(
            row, c, pid % JOINED == 0, High, Query, HighBias, QueryBias, OutHigh, OutLow, OutHighBias, OutLowBias,
            In, InBias, Out, OutBias, C, HIGH, IN_ROWS, OUT_HIGH, OUT_ROWS, OUT_LEFT, OUT, HAS_BIAS, HAS_OUT, HAS_OUT_BIAS,
        )  # fmt: skip


@triton.jit
def _join(
    row, c, first, High, Query, HighBias, QueryBias, OutHigh, OutLow, OutHighBias, OutLowBias, In, InBias, Out, OutBias,
    IN, HIGH, IN_ROWS, OUT_HIGH, OUT_ROWS, OUT_LEFT, OUT,
    HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_OUT_BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of the joined parameters; those of the first columns have the biases."""
    high, query = row < HIGH, (row >= HIGH) & (row < IN_ROWS)
    at, within = row.to(tl.int64)[:, None] * IN + c[None, :], (c < IN)[None, :]
    of_high = tl.load(High + at, mask=high[:, None] & within, other=0.0)
    of_query = tl.load(Query + ((row - HIGH).to(tl.int64)[:, None] * IN + c[None, :]), mask=query[:, None] & within, other=0.0)
    tl.store(In + at, tl.where(high[:, None], of_high, of_query), mask=(row < IN_ROWS)[:, None] & within)
    if HAS_BIAS:
        of_high = tl.load(HighBias + row, mask=high & first, other=0.0)
        of_query = tl.load(QueryBias + (row - HIGH), mask=query & first, other=0.0)
        tl.store(InBias + row, tl.where(high, of_high, of_query), mask=(row < IN_ROWS) & first)
    if HAS_OUT:
        row -= IN_ROWS
        top, bottom, left = (row >= 0) & (row < OUT_HIGH), (row >= OUT_HIGH) & (row < OUT_ROWS), (c < OUT_LEFT)[None, :]
        wide, within = row.to(tl.int64)[:, None], (c < OUT)[None, :]
        at = wide * OUT_LEFT + c[None, :]
        of_high = tl.load(OutHigh + at, mask=top[:, None] & left, other=0.0)
        at = (wide - OUT_HIGH) * (OUT - OUT_LEFT) + c[None, :] - OUT_LEFT
        of_low = tl.load(OutLow + at, mask=bottom[:, None] & within & (c >= OUT_LEFT)[None, :], other=0.0)
        both = tl.where(top[:, None], of_high, of_low)
        tl.store(Out + wide * OUT + c[None, :], both, mask=(top | bottom)[:, None] & within)
        if HAS_OUT_BIAS:
            of_high = tl.load(OutHighBias + row, mask=top & first, other=0.0)
            of_low = tl.load(OutLowBias + (row - OUT_HIGH), mask=bottom & first, other=0.0)
            tl.store(OutBias + row, tl.where(top, of_high, of_low), mask=(top | bottom) & first)


def _low_tiling(row_bytes: int) -> dict[str, int]:
    """Queries and keys of a tile in the forward, and warps."""
    return {"BM": 64, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4}


def _one_pass_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64, "num_warps": 4 if row_bytes <= 128 else 8}


def _query_gradient_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4 if row_bytes <= 128 else 8}


def _key_gradient_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64 if row_bytes <= 256 else 32, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4 if row_bytes <= 128 else 8}


class _Call(NamedTuple):
    """What the launches of a call depend on.

    Attributes:
        batch, queries, keys: numbers of samples, and of Lo-Fi's queries and keys of a sample.
        grid, side, heads, scale, masked: of the call.
        strides: from sample to sample and from token to token, of `qkv`, `kv`, and what has the outputs' shape.
        dim, bytes: channels of a head, and bytes of a number.
        precision: of products.
    """

    batch: int
    queries: int
    keys: int
    grid: tuple[int, int]
    side: int
    heads: tuple[int, int]
    scale: float
    masked: bool
    strides: tuple[tuple[int, ...], ...]
    dim: int
    bytes: int
    precision: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, qkv: Tensor, kv: Tensor, others: Sequence[Tensor], settings: tuple[Any, ...]) -> Self:
        """Of a forward, whose `others` are the outputs, or a backward, where they are the outputs and their gradient."""
        (height, width, side, h_heads, l_heads, scale, masked), (batch, keys, channels) = settings, kv.shape
        strides = tuple(t.stride()[:2] for t in (qkv, kv, *others))
        sizes = batch, qkv.shape[1], keys, (height, width), side, (h_heads, l_heads), scale, masked, strides
        return cls(*sizes, channels // (2 * l_heads), qkv.element_size(), precision(qkv), qkv.dtype, qkv.device)

    def windows(self) -> Windows:
        """Hi-Fi's part."""
        sizes = self.batch, self.heads[0], *self.grid, self.dim, self.dim
        return Windows(*sizes, 0, (self.side, self.side), self.scale, self.masked, self.bytes, self.precision)

    def high(self, tensor: int, strides: tuple[int, ...], number: int = 0) -> Place:
        """The `number`-th of Hi-Fi's parts of a tensor, by (B, heads, H, W)."""
        sample, token = strides
        return Place(tensor, number * self.heads[0] * self.dim, (sample, self.dim, self.grid[1] * token, token))

    def low(self, tensor: int, strides: tuple[int, ...], high: int = 0, low: int = 0) -> Place:
        """Lo-Fi's part of a tensor behind so many parts of Hi-Fi and of Lo-Fi, by (B, heads, tokens)."""
        sample, token = strides
        return Place(tensor, (high * self.heads[0] + low * self.heads[1]) * self.dim, (sample, self.dim, token))

    def channels(self, *parts: int) -> int:
        """Of so many parts of each branch."""
        return self.dim * sum(number * heads for number, heads in zip(parts, self.heads, strict=True))


@settled
def _forward_launches(call: _Call) -> tuple[Launch, ...]:
    """Of qkv, kv, outputs, log-normalisers."""
    of_qkv, of_kv, of_out = call.strides
    q, k, v = (call.high(0, of_qkv, number) for number in range(3))
    near = forward_launch(call.windows(), q, k, v, q, call.high(2, of_out))
    q, k, v, out = call.low(0, of_qkv, 3), call.low(1, of_kv), call.low(1, of_kv, 0, 1), call.low(2, of_out, 1)
    constants: dict[str, Any] = _low_tiling(call.dim * call.bytes)
    constants["BN"] = tile(call.keys, constants["BN"])
    constants |= {"PRECISION": call.precision, "ONE_TILE": call.keys <= constants["BN"], "BD": tile(call.dim, 256)}
    numbers = call.scale * LOG2E, *q.strides, *k.strides, *v.strides, *out.strides
    sizes = call.heads[1], call.queries, call.keys, call.dim
    grid = ceil_div(call.queries, constants["BM"]), call.batch * call.heads[1]
    return near, Launch(_low_forward_kernel, grid, (q, k, v, out, Place(3)), (*numbers, *sizes), constants)


@settled
def _backward_launches(call: _Call) -> tuple[tuple[Launch, ...], int, bool]:
    """Of qkv, kv, outputs, log-normalisers, gradients of the outputs, of qkv and of kv, deltas.

    Returns: launches; in how many parts, float32, they give the gradient of kv, 1: as it is; whether there are deltas.
    """
    of_qkv, of_kv, of_out, of_grad = call.strides
    inner, outer = call.channels(3, 1), call.channels(0, 2)
    of_dqkv, of_dkv = (call.queries * inner, inner), (call.keys * outer, outer)
    q, k, v, dq, dk, dv = (call.high(tensor, of, i) for tensor, of in ((0, of_qkv), (5, of_dqkv)) for i in range(3))
    near, _ = backward_launch(call.windows(), q, k, v, q, call.high(4, of_grad), dq, dk, dv)

    width, rows = call.dim * call.bytes, call.batch * call.heads[1]
    one_pass = call.keys <= _ONE_PASS and width <= 256
    constants = _one_pass_tiling(width) | {"BN": _ONE_PASS} if one_pass else _key_gradient_tiling(width)
    tiles = 1 if one_pass else ceil_div(call.keys, constants["BN"])
    parts = min(ceil_div(call.queries, constants["BM"]), max(1, _PROGRAMS // (rows * tiles)))
    share = ceil_div(ceil_div(call.queries, parts), constants["BM"]) * constants["BM"]
    parts = ceil_div(call.queries, share)

    q, dq = call.low(0, of_qkv, 3), call.low(5, of_dqkv, 3)
    k, v, dk, dv = (call.low(tensor, of, 0, i) for tensor, of in ((1, of_kv), (6, of_dkv)) for i in range(2))
    out, grad = call.low(2, of_out, 1), call.low(4, of_grad, 1)
    lse, delta = Place(3), Place(7)
    common = {"PRECISION": call.precision, "BD": tile(call.dim, 256)}
    sizes = call.heads[1], call.queries, call.keys, call.dim
    scale, inputs = call.scale * LOG2E, (*q.strides, *k.strides, *v.strides)
    of_keys = (call.batch * call.keys * outer if parts > 1 else 0), *dk.strides
    grid = parts * tiles, rows
    if one_pass:
        numbers = scale, *inputs, *grad.strides, *dq.strides, *of_keys, *sizes, share
        places = q, k, v, lse, grad, dq, dk, dv
        return (near, Launch(_low_one_pass_kernel, grid, places, numbers, common | constants)), parts, False
    of_queries = _query_gradient_tiling(width)
    first = Launch(
        _low_query_gradient_kernel,
        (ceil_div(call.queries, of_queries["BM"]), rows),
        (q, k, v, out, lse, grad, delta, dq),
        (scale, *inputs, *out.strides, *grad.strides, *dq.strides, *sizes),
        common | of_queries,
    )
    numbers = scale, *inputs, *grad.strides, *of_keys, *sizes, share, tiles
    second = Launch(_low_key_gradient_kernel, grid, (q, k, v, lse, grad, delta, dk, dv), numbers, common | constants)
    return (near, first, second), parts, True


@operator("hilo_forward")
def _hilo_forward(
    qkv: Tensor, kv: Tensor, height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = qkv.shape
    out = qkv.new_empty((batch, tokens, kv.shape[2] // (2 * l_heads) * (h_heads + l_heads)))
    lse = qkv.new_empty((batch, l_heads, tokens), dtype=torch.float32)
    if out.numel():
        qkv, kv = last_contiguous(qkv), last_contiguous(kv)
        settings = height, width, side, h_heads, l_heads, scale, masked
        launch_all(_forward_launches(_Call.of(qkv, kv, (out,), settings)), (qkv, kv, out, lse))
    return out, lse


@_hilo_forward.register_fake
def _(
    qkv: Tensor, kv: Tensor, height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool
) -> tuple[Tensor, Tensor]:
    dim = kv.shape[-1] // (2 * l_heads)
    out = qkv.new_empty((*qkv.shape[:2], (h_heads + l_heads) * dim))
    return out, qkv.new_empty((qkv.shape[0], l_heads, qkv.shape[1]), dtype=torch.float32)


@operator("hilo_backward")
def _hilo_backward(
    qkv: Tensor, kv: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not grad.numel():
        return dqkv, kv.new_empty(kv.shape)
    qkv, kv, grad = last_contiguous(qkv), last_contiguous(kv), last_contiguous(grad)
    settings = height, width, side, h_heads, l_heads, scale, masked
    launches, parts, with_deltas = _backward_launches(_Call.of(qkv, kv, (out, grad), settings))
    dkv = kv.new_empty(kv.shape) if parts == 1 else kv.new_empty((parts, *kv.shape), dtype=torch.float32)
    deltas = torch.empty_like(lse) if with_deltas else lse
    launch_all(launches, (qkv, kv, out, lse, grad, dqkv, dkv, deltas))
    return dqkv, dkv if parts == 1 else dkv.sum(0).to(kv.dtype)


@_hilo_backward.register_fake
def _(
    qkv: Tensor, kv: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), kv.new_empty(kv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.settings = inputs[2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    qkv, kv, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    return *_hilo_backward(qkv, kv, out, lse, grad, *ctx.settings), *(None,) * 7


_hilo_forward.register_autograd(_backward, setup_context=_setup)


@operator("window_means")
def _means(x: Tensor, side: int, masked: bool) -> Tensor:
    batch, height, width, channels = x.shape
    windows = ceil_div(height, side) * ceil_div(width, side)
    means = x.new_empty((batch, windows, channels))
    if means.numel():
        x = last_contiguous(x)
        _means_launch(x.shape, x.stride(), side, masked, x.dtype, x.device)(x, means)
    return means


@settled
def _means_launch(
    shape: tuple[int, ...], strides: tuple[int, ...], side: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> Launch:
    """Of the map and the means."""
    batch, height, width, channels = shape
    windows, bc = batch * ceil_div(height, side) * ceil_div(width, side), tile(channels, 128)
    columns = ceil_div(channels, bc)
    numbers = *strides[:3], windows, height, width, channels, side, columns
    constants = {"MASKED": masked, "BM": 16, "BC": bc}
    return Launch(_means_kernel, (ceil_div(windows, 16) * columns,), (Place(0), Place(1)), numbers, constants)


@_means.register_fake
def _(x: Tensor, side: int, masked: bool) -> Tensor:
    return x.new_empty((x.shape[0], -(-x.shape[1] // side) * -(-x.shape[2] // side), x.shape[3]))


@operator("window_means_backward")
def _means_backward(grad: Tensor, of: Tensor | None, height: int, width: int, side: int, masked: bool) -> Tensor:
    (batch, _, channels), grad = grad.shape, grad.contiguous()
    out = grad.new_empty((batch, height, width, channels))
    if out.numel():
        launch = _spread_launch((batch, height, width, channels), side, masked, of is not None, grad.dtype, grad.device)
        launch(grad, out if of is None else of.contiguous(), out)
    return out


@settled
def _spread_launch(
    shape: tuple[int, int, int, int], side: int, masked: bool, add: bool, dtype: torch.dtype, device: torch.device
) -> Launch:
    """Of the gradient of the means, what it is added to, and the sum, which may be the same."""
    batch, height, width, channels = shape
    cells, bc = batch * height * width, tile(channels, 128)
    constants = {"MASKED": masked, "ADD": add, "BM": 32, "BC": bc}
    places, numbers = (Place(0), Place(1), Place(2)), (height, width, cells, channels, side)
    return Launch(_spread_kernel, (ceil_div(cells, 32), ceil_div(channels, bc)), places, numbers, constants)


@operator("window_means_backward_", mutates_args=("of",))
def _add_means_backward(grad: Tensor, of: Tensor, height: int, width: int, side: int, masked: bool) -> None:
    """Adds to `of` (B, H W, C), contiguous."""
    if of.numel():
        shape, grad = (of.shape[0], height, width, of.shape[2]), grad.contiguous()
        _spread_launch(shape, side, masked, True, grad.dtype, grad.device)(grad, of, of)


@_add_means_backward.register_fake
def _(grad: Tensor, of: Tensor, height: int, width: int, side: int, masked: bool) -> None:
    return None


@_means_backward.register_fake
def _(grad: Tensor, of: Tensor | None, height: int, width: int, side: int, masked: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], height, width, grad.shape[2]))


def _setup_means(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = (*inputs[0].shape[1:3], *inputs[1:])


def _backward_means(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _means_backward(grad, None, *ctx.settings), None, None


_means.register_autograd(_backward_means, setup_context=_setup_means)


class _WithMeans(torch.autograd.Function):
    """A map and its windows' means, whose two gradients one kernel adds up: autograd by itself would write one and read both."""

    @staticmethod
    def forward(x: Tensor, side: int, masked: bool) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _means(x, side, masked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_means(ctx, inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_map: Tensor | None, of_means: Tensor | None) -> tuple[Any, ...]:
        if of_means is None:
            return of_map, None, None
        return _means_backward(of_means, of_map, *ctx.settings), None, None


class Prepared(NamedTuple):
    """What the projections of a layer take: means of the tokens, and two linear layers as one.

    Attributes:
        means: (B, windows, C).
        weight, bias: rows of both layers that take the tokens.
        out_weight, out_bias: both layers that take outputs, as diagonal blocks; a single one as it is.
    """

    means: Tensor
    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


def prepare_layer(
    x: Tensor,
    grid: tuple[int, int],
    side: int,
    masked: bool,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor | None],
) -> Prepared:
    """In one launch, for tokens x (B, H W, C). Biases are all there or none, of inputs and of outputs."""
    (batch, _, channels), (height, width) = x.shape, grid
    high, query = weights
    means = x.new_empty((batch, ceil_div(height, side) * ceil_div(width, side), channels))
    weight = high.new_empty((high.shape[0] + query.shape[0], channels))
    bias = None if biases[0] is None else high.new_empty(weight.shape[0])
    out, out_bias, blocks = out_weights[0], out_biases[0], None
    if len(out_weights) > 1:
        above, below = out_weights[0].shape, out_weights[1].shape
        out = high.new_empty((above[0] + below[0], above[1] + below[1]))
        out_bias = None if out_bias is None else high.new_empty(out.shape[0])
        blocks = *above, *below
    x = last_contiguous(x)
    given = (high, query, *biases, out_weights[0], out_weights[-1], out_biases[0], out_biases[-1])
    tensors = [x, means, *(high if t is None else t.contiguous() for t in given)]
    flags, dtypes = (bias is not None, out_bias is not None, masked), tuple(t.dtype for t in tensors)
    launch = _prepare_launch(x.shape, x.stride(), grid, side, (high.shape[0], weight.shape[0]), blocks, flags, dtypes, x.device)
    launch(*tensors, weight, weight if bias is None else bias, out, out if out_bias is None else out_bias)
    return Prepared(means, weight, bias, out, out_bias)


@settled
def _prepare_launch(
    shape: Sequence[int],
    strides: Sequence[int],
    grid: tuple[int, int],
    side: int,
    rows: tuple[int, int],
    blocks: tuple[int, int, int, int] | None,
    flags: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    """`rows`: of the first weight and of both; `blocks`: sides of the outputs' weights; `flags`: biases, of outputs, and masked."""
    (batch, _, channels), (height, width) = shape, grid
    top, left, bottom, right = blocks or (0, 0, 0, 0)
    windows, bc = batch * ceil_div(height, side) * ceil_div(width, side), tile(max(channels, left + right), 128)
    columns, joined = ceil_div(channels, bc), ceil_div(max(channels, left + right), bc)
    of_means = ceil_div(windows, 16) * columns
    numbers = (
        strides[0], width * strides[1], strides[1], windows, height, width, channels, side, columns, of_means,
        *rows, top, top + bottom, left, left + right, joined,
    )  # fmt: skip
    constants = dict(zip(("HAS_BIAS", "HAS_OUT_BIAS", "MASKED"), flags, strict=True)) | {"HAS_OUT": blocks is not None}
    programs = of_means + ceil_div(rows[1] + top + bottom, 16) * joined
    return Launch(_prepare_kernel, (programs,), [Place(number) for number in range(14)], numbers, {**constants, "BM": 16, "BC": bc})


# for `ops.hilo_layer`, which writes out what comes between them
forward_operator, backward_operator, add_means_backward_operator = _hilo_forward, _hilo_backward, _add_means_backward


def hilo_attention_triton(
    qkv: Tensor, kv: Tensor, grid: tuple[int, int], side: int, heads: tuple[int, int], scale: float, masked: bool
) -> Tensor:
    """Outputs (B, N, (h + l) D) of tensors as `ops.hilo_attention` has checked them."""
    out: Tensor = _hilo_forward(qkv, kv, *grid, side, *heads, scale, masked)[0]
    return out


def with_window_means_triton(x: Tensor, side: int, masked: bool) -> tuple[Tensor, Tensor]:
    """The map (B, H, W, C), for its other readers, and the means (B, windows, C)."""
    if torch.compiler.is_compiling():  # which fuses additions itself
        return x, _means(x, side, masked)
    result: tuple[Tensor, Tensor] = _WithMeans.apply(x, side, masked)
    return result
