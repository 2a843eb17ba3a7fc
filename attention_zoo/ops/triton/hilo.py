"""HiLo attention as Triton kernels: both branches read one fused projection and write into one buffer, side by side.

Hi-Fi is `windows.py`'s kernels. Lo-Fi has few keys: up to `_ONE_PASS` of them stay in a program that walks along the queries and
computes all three gradients on the way; of more keys, one kernel computes the gradient of the queries and one that of the keys.
No atomics: where several programs share the queries of a head, their sums are kept apart and added up at the end.
"""

from __future__ import annotations

from typing import Any

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
from attention_zoo.ops.triton.windows import launch_backward, launch_forward

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
def _means_kernel(
    X, Means,
    sxb, sxy, sxx,
    WINDOWS, HEIGHT, WIDTH, C, SIDE, MASKED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    number, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
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


def _of_map(x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """Channels (B, N, heads D) -> (B, heads, H, W, D)."""
    return x.unflatten(-1, (heads, -1)).unflatten(1, grid).permute(0, 3, 1, 2, 4)


def _of_list(x: Tensor, heads: int) -> Tensor:
    """Channels (B, N, heads D) -> (B, heads, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _high(qkv: Tensor, grid: tuple[int, int], heads: int, width: int) -> list[Tensor]:
    """Views of q, k and v of Hi-Fi, which has `width` channels."""
    return [_of_map(qkv[..., i * width : (i + 1) * width], grid, heads) for i in range(3)]


def _low(qkv: Tensor, kv: Tensor, heads: int, width: int) -> list[Tensor]:
    """Views of q, k and v of Lo-Fi, which has `width` channels."""
    return [_of_list(t, heads) for t in (qkv[..., -width:], kv[..., :width], kv[..., width:])]


def _low_tiling(row_bytes: int) -> dict[str, int]:
    """Queries and keys of a tile in the forward, and warps."""
    return {"BM": 64, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4}


def _one_pass_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64, "num_warps": 4 if row_bytes <= 128 else 8}


def _query_gradient_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4 if row_bytes <= 128 else 8}


def _key_gradient_tiling(row_bytes: int) -> dict[str, int]:
    return {"BM": 64 if row_bytes <= 256 else 32, "BN": 64 if row_bytes <= 256 else 32, "num_warps": 4 if row_bytes <= 128 else 8}


@operator("hilo_forward")
def _hilo_forward(
    qkv: Tensor, kv: Tensor, height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool
) -> tuple[Tensor, Tensor]:
    dim = kv.shape[-1] // (2 * l_heads)
    out = qkv.new_empty((*qkv.shape[:2], (h_heads + l_heads) * dim))
    lse = qkv.new_empty((qkv.shape[0], l_heads, qkv.shape[1]), dtype=torch.float32)
    if not out.numel():
        return out, lse
    qkv, kv, grid, of_high = last_contiguous(qkv), last_contiguous(kv), (height, width), h_heads * dim
    q, k, v = _high(qkv, grid, h_heads, of_high)
    launch_forward(q, k, v, None, _of_map(out[..., :of_high], grid, h_heads), side, scale, masked)
    q, k, v = _low(qkv, kv, l_heads, l_heads * dim)
    o = _of_list(out[..., of_high:], l_heads)
    constants = _low_tiling(dim * qkv.element_size())
    constants["BN"] = tile(k.shape[2], constants["BN"])
    one_tile = k.shape[2] <= constants["BN"]
    _low_forward_kernel[(ceil_div(q.shape[2], constants["BM"]), q.shape[0] * l_heads)](
        q, k, v, o, lse, scale * LOG2E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        l_heads, q.shape[2], k.shape[2], dim, PRECISION=precision(q), ONE_TILE=one_tile, BD=tile(dim, 256), **constants,
    )  # fmt: skip
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
    dqkv, dkv = qkv.new_empty(qkv.shape), kv.new_empty(kv.shape)
    if not grad.numel():
        return dqkv, dkv
    qkv, kv, grad = last_contiguous(qkv), last_contiguous(kv), last_contiguous(grad)
    dim, grid = kv.shape[-1] // (2 * l_heads), (height, width)
    of_high, of_low = h_heads * dim, l_heads * dim
    q, k, v = _high(qkv, grid, h_heads, of_high)
    dq, dk, dv = _high(dqkv, grid, h_heads, of_high)
    launch_backward(q, k, v, None, _of_map(grad[..., :of_high], grid, h_heads), dq, dk, dv, side, scale, masked)
    q, k, v = _low(qkv, kv, l_heads, of_low)
    dq, dk, dv = _low(dqkv, dkv, l_heads, of_low)
    of_out, out = (_of_list(t[..., of_high:], l_heads) for t in (grad, out))
    _low_backward(q, k, v, of_out, out, lse, dq, dk, dv, scale)
    return dqkv, dkv


@_hilo_backward.register_fake
def _(
    qkv: Tensor, kv: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    height: int, width: int, side: int, h_heads: int, l_heads: int, scale: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), kv.new_empty(kv.shape)


def _low_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> None:
    """Gradients of Lo-Fi into `dq`, `dk` and `dv`, all (B, heads, N or M, D)."""
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    width = dim * q.element_size()
    common = {"PRECISION": precision(q), "BD": tile(dim, 256)}
    sizes = (heads, queries, keys, dim)
    one_pass = keys <= _ONE_PASS and width <= 256
    constants = _one_pass_tiling(width) | {"BN": _ONE_PASS} if one_pass else _key_gradient_tiling(width)
    tiles = 1 if one_pass else ceil_div(keys, constants["BN"])
    parts = min(ceil_div(queries, constants["BM"]), max(1, _PROGRAMS // (batch * heads * tiles)))
    share = ceil_div(ceil_div(queries, parts), constants["BM"]) * constants["BM"]
    parts = ceil_div(queries, share)
    sums = None
    to_k, to_v, strides = dk, dv, (0, *dk.stride()[:3])
    if parts > 1:
        sums = q.new_empty((parts, 2, batch, keys, heads, dim), dtype=torch.float32)
        to_k, to_v = (sums[:, i].transpose(2, 3) for i in range(2))
        strides = to_k.stride()[:4]
    grid, inputs = (parts * tiles, batch * heads), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if one_pass:
        _low_one_pass_kernel[grid](
            q, k, v, lse, grad, dq, to_k, to_v, scale * LOG2E, *inputs, *grad.stride()[:3], *dq.stride()[:3], *strides,
            *sizes, share, **common, **constants,
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        of_queries = _query_gradient_tiling(width)
        _low_query_gradient_kernel[(ceil_div(queries, of_queries["BM"]), batch * heads)](
            q, k, v, out, lse, grad, delta, dq, scale * LOG2E, *inputs, *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3],
            *sizes, **common, **of_queries,
        )  # fmt: skip
        _low_key_gradient_kernel[grid](
            q, k, v, lse, grad, delta, to_k, to_v, scale * LOG2E, *inputs, *grad.stride()[:3], *strides,
            *sizes, share, tiles, **common, **constants,
        )  # fmt: skip
    if sums is not None:
        summed = sums.sum(0).transpose(2, 3)
        dk.copy_(summed[0])
        dv.copy_(summed[1])


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
        bc = tile(channels, 128)
        _means_kernel[(ceil_div(batch * windows, 16), ceil_div(channels, bc))](
            x, means, *x.stride()[:3], batch * windows, height, width, channels, side, MASKED=masked, BM=16, BC=bc
        )
    return means


@_means.register_fake
def _(x: Tensor, side: int, masked: bool) -> Tensor:
    return x.new_empty((x.shape[0], -(-x.shape[1] // side) * -(-x.shape[2] // side), x.shape[3]))


@operator("window_means_backward")
def _means_backward(grad: Tensor, of: Tensor | None, height: int, width: int, side: int, masked: bool) -> Tensor:
    (batch, _, channels), grad = grad.shape, grad.contiguous()
    out = grad.new_empty((batch, height, width, channels))
    if out.numel():
        bc = tile(channels, 128)
        _spread_kernel[(ceil_div(batch * height * width, 32), ceil_div(channels, bc))](
            grad, grad if of is None else of.contiguous(), out, height, width, batch * height * width, channels, side,
            MASKED=masked, ADD=of is not None, BM=32, BC=bc,
        )  # fmt: skip
    return out


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


# for `ops.hilo_layer`, which writes out what comes between them
forward_operator, backward_operator, means_operator, means_backward_operator = (
    _hilo_forward,
    _hilo_backward,
    _means,
    _means_backward,
)


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
