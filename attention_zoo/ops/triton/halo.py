"""Blocked local attention with a halo as Triton kernels: windows are read from the maps, logits and copies are never formed.

A program has the queries of one block (or some of them) and walks along the cells of its window. The position terms of a query
are 2 win numbers, Sh[r] = q Rh[r - i + win - 1] and Sw[c] likewise; they reach the logits by a product with the one-hot rows and
columns of the cells, and their gradients come back by the same product. The queries' gradients are computed first; their kernel
leaves the weights and the logits' gradients of some heads at a time, from which keys and values then collect theirs, one program
for each block of cells: nothing is computed twice, and there are no atomics.
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
    read_delta,
    read_lse,
    tile,
)

__all__ = ["halo_attention_triton"]

_WARPS = 4
_KEPT_BYTES = 2**26  # of weights and gradients of logits that the backward holds at a time; a GPU is full with less


@triton.jit
def _table(Table, WIN, D, BT: tl.constexpr, BD: tl.constexpr):
    """The positions' vectors, one for each distance: (BT, BD)."""
    t, d = tl.arange(0, BT), tl.arange(0, BD)
    return tl.load(Table + t[:, None] * D + d[None, :], mask=(t < 2 * WIN - 1)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _positions(q, table, at, WIN, PRECISION: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr):
    """q table[r - at + win - 1] for r = 0 .. win - 1: (BM, BW). `at` is the row (column) of each query in its block."""
    by_distance = tl.dot(q, tl.trans(table).to(q.dtype), input_precision=PRECISION)
    r = tl.arange(0, BW)
    distance = r[None, :] - at[:, None] + WIN - 1  # out of range in rows and columns that are not there
    found = tl.gather(by_distance, tl.minimum(tl.maximum(distance, 0), BT - 1), 1)
    return tl.where((r < WIN)[None, :], found, 0.0)


@triton.jit
def _distances(x, at, WIN, BM: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr):
    """The reverse: (BM, BW) by rows (columns) of the window -> (BM, BT) by distance."""
    t = tl.arange(0, BT)
    r = t[None, :] + at[:, None] - WIN + 1
    return tl.where((r >= 0) & (r < WIN), tl.gather(x, tl.minimum(tl.maximum(r, 0), BW - 1), 1), 0.0)


@triton.jit
def _split(x):
    """A float32 tensor as the sum of two float16, 22 bits of it: their products with zeros and ones are exact."""
    high = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _spread(z, parts, one_hot):
    """z + (sum of parts) one_hot: the position terms of rows (or columns), at their cells."""
    return tl.dot(parts[1], one_hot, tl.dot(parts[0], one_hot, z))


@triton.jit
def _forward_kernel(
    Q, K, V, Rows, Columns, Out, Lse,
    scale, scale_positions,  # times log2 e
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sob, soh, soy, sox,
    HEADS, HEIGHT, WIDTH, QH, QW, BLOCKS_X, SIDE, BLOCK, HALO, WIN, D, DV, TILES,
    POSITIONS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, bh = tl.program_id(0), tl.program_id(1)
    block, portion = pid // TILES, pid % TILES
    u, w = block // BLOCKS_X, block % BLOCKS_X
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    i, j = rows // SIDE, rows % SIDE
    y, x = u * SIDE + i, w * SIDE + j
    real = (i < SIDE) & (y < QH) & (x < QW)
    q = tl.load(
        Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    )  # fmt: skip
    r = tl.arange(0, BW)
    if POSITIONS:
        of_rows, of_columns = _table(Rows, WIN, D, BT, BD), _table(Columns, WIN, D, BT, BD)
        s_rows = _positions(q, of_rows, i, WIN, PRECISION, BM, BW, BT) * scale_positions
        s_columns = _positions(q, of_columns, j, WIN, PRECISION, BM, BW, BT) * scale_positions
        of_row, of_column = _split(s_rows), _split(s_columns)
    K += b * skb + h * skh
    V += b * svb + h * svh
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for start in range(0, WIN * WIN, BN):
        cell = start + tl.arange(0, BN)
        row, column = cell // WIN, cell % WIN
        ky, kx = u * BLOCK - HALO + row, w * BLOCK - HALO + column
        inside = (cell < WIN * WIN) & (ky >= 0) & (ky < HEIGHT) & (kx >= 0) & (kx < WIDTH)
        k = tl.load(K + ky[None, :] * sky + kx[None, :] * skx + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        z = tl.dot(q, k, input_precision=PRECISION) * scale
        if POSITIONS:
            z = _spread(z, of_row, (r[:, None] == row[None, :]).to(tl.float16))
            z = _spread(z, of_column, (r[:, None] == column[None, :]).to(tl.float16))
        counts = inside if MASKED else cell < WIN * WIN
        z = tl.where(counts[None, :], z, float("-inf"))
        p, fade, highest, total = absorb(z, highest, total)
        v = tl.load(V + ky[:, None] * svy + kx[:, None] * svx + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out, lse = conclude(acc, highest, total)
    tl.store(
        Out + b * sob + h * soh + y[:, None] * soy + x[:, None] * sox + dv[None, :], out.to(Out.dtype.element_ty),
        mask=real[:, None] & (dv < DV)[None, :],
    )  # fmt: skip
    tl.store(Lse + (bh.to(tl.int64) * QH + y) * QW + x, lse, mask=real)


@triton.jit
def _query_gradient_kernel(
    Q, K, V, Rows, Columns, Out, Lse, DOut, DLse, DQ, Distances, P, DZ,
    scale, scale_positions, first_head,
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sob, soh, soy, sox, sgb, sgh, sgy, sgx, sdb, sdh, sdy, sdx,
    HEADS, HEIGHT, WIDTH, QH, QW, BLOCKS, BLOCKS_X, SIDE, BLOCK, HALO, WIN, D, DV, TILES,
    POSITIONS: tl.constexpr, MASKED: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of the heads from `first_head` on, counted over the batch; P and DZ keep their weights and the gradients of their logits."""
    pid, bh = tl.program_id(0), first_head + tl.program_id(1)
    block, portion = pid // TILES, pid % TILES
    u, w = block // BLOCKS_X, block % BLOCKS_X
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    i, j = rows // SIDE, rows % SIDE
    y, x = u * SIDE + i, w * SIDE + j
    real = (i < SIDE) & (y < QH) & (x < QW)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :], mask=wanted, other=0.0)
    out = tl.load(Out + b * sob + h * soh + y[:, None] * soy + x[:, None] * sox + dv[None, :], mask=wanted_v, other=0.0)
    grad = tl.load(DOut + b * sgb + h * sgh + y[:, None] * sgy + x[:, None] * sgx + dv[None, :], mask=wanted_v, other=0.0)
    place = (bh.to(tl.int64) * QH + y) * QW + x
    lse, delta = read_lse(Lse, place, real), read_delta(out, grad, DLse, place, real, HAS_DLSE)
    r = tl.arange(0, BW)
    if POSITIONS:
        of_rows, of_columns = _table(Rows, WIN, D, BT, BD), _table(Columns, WIN, D, BT, BD)
        s_rows = _positions(q, of_rows, i, WIN, PRECISION, BM, BW, BT) * scale_positions
        s_columns = _positions(q, of_columns, j, WIN, PRECISION, BM, BW, BT) * scale_positions
        ds_rows = tl.zeros([BM, BW], tl.float32)
        ds_columns = tl.zeros([BM, BW], tl.float32)
        of_row, of_column = _split(s_rows), _split(s_columns)
    K += b * skb + h * skh
    V += b * svb + h * svh
    pairs = (tl.program_id(1).to(tl.int64) * BLOCKS + block) * WIN * WIN * SIDE * SIDE  # (cells of the window, queries)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, WIN * WIN, BN):
        cell = start + tl.arange(0, BN)
        row, column = cell // WIN, cell % WIN
        ky, kx = u * BLOCK - HALO + row, w * BLOCK - HALO + column
        inside = (cell < WIN * WIN) & (ky >= 0) & (ky < HEIGHT) & (kx >= 0) & (kx < WIDTH)
        k = tl.load(K + ky[:, None] * sky + kx[:, None] * skx + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(V + ky[None, :] * svy + kx[None, :] * svx + dv[:, None], mask=inside[None, :] & (dv < DV)[:, None], other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if POSITIONS:
            z = _spread(z, of_row, (r[:, None] == row[None, :]).to(tl.float16))
            z = _spread(z, of_column, (r[:, None] == column[None, :]).to(tl.float16))
        counts = inside if MASKED else cell < WIN * WIN
        p = tl.where(counts[None, :], tl.exp2(z - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, v, input_precision=PRECISION) - delta[:, None])
        rounded = ds.to(k.dtype)
        at = pairs + cell[:, None] * (SIDE * SIDE) + rows[None, :]
        exists = (cell < WIN * WIN)[:, None] & (rows < SIDE * SIDE)[None, :]
        tl.store(P + at, tl.trans(p.to(k.dtype)), mask=exists)
        tl.store(DZ + at, tl.trans(rounded), mask=exists)
        acc += tl.dot(rounded, k, input_precision=PRECISION)
        if POSITIONS:
            ds_rows += tl.dot(rounded, (row[:, None] == r[None, :]).to(k.dtype), input_precision=PRECISION)
            ds_columns += tl.dot(rounded, (column[:, None] == r[None, :]).to(k.dtype), input_precision=PRECISION)
    acc *= per_logit(scale)
    if POSITIONS:
        by_rows = _distances(ds_rows * per_logit(scale_positions), i, WIN, BM, BW, BT).to(q.dtype)
        by_columns = _distances(ds_columns * per_logit(scale_positions), j, WIN, BM, BW, BT).to(q.dtype)
        t = tl.arange(0, BT)
        kept = ((bh.to(tl.int64) * BLOCKS + block) * SIDE * SIDE + rows)[:, None] * (2 * BT) + t[None, :]
        tl.store(Distances + kept, by_rows, mask=(rows < SIDE * SIDE)[:, None])
        tl.store(Distances + kept + BT, by_columns, mask=(rows < SIDE * SIDE)[:, None])
        of_rows, of_columns = _table(Rows, WIN, D, BT, BD), _table(Columns, WIN, D, BT, BD)  # again, to spare registers
        acc += tl.dot(by_rows, of_rows.to(q.dtype), input_precision=PRECISION)
        acc += tl.dot(by_columns, of_columns.to(q.dtype), input_precision=PRECISION)
    DQ += b * sdb + h * sdh
    tl.store(DQ + y[:, None] * sdy + x[:, None] * sdx + d[None, :], acc.to(DQ.dtype.element_ty), mask=wanted)


@triton.jit
def _key_gradient_kernel(
    Q, DOut, P, DZ, DK, DV_,
    scale, first_head,
    sqb, sqh, sqy, sqx, sgb, sgh, sgy, sgx, sdkb, sdkh, sdky, sdkx, sdvb, sdvh, sdvy, sdvx,
    HEADS, HEIGHT, WIDTH, QH, QW, BLOCKS_Y, BLOCKS_X, SIDE, BLOCK, HALO, WIN, REACH, D, DV, TILES,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """From the weights and gradients of logits that the queries' kernel has left of the heads from `first_head` on."""
    pid, bh = tl.program_id(0), first_head + tl.program_id(1)
    block, portion = pid // TILES, pid % TILES
    u, w = block // BLOCKS_X, block % BLOCKS_X
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    cells, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    a, c = cells // BLOCK, cells % BLOCK
    ky, kx = u * BLOCK + a, w * BLOCK + c
    real = (a < BLOCK) & (ky < HEIGHT) & (kx < WIDTH)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    Q += b * sqb + h * sqh
    DOut += b * sgb + h * sgh
    pairs = tl.program_id(1).to(tl.int64) * BLOCKS_Y * BLOCKS_X * WIN * WIN * SIDE * SIDE
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    up, left = tl.maximum(u - REACH, 0), tl.maximum(w - REACH, 0)
    across = tl.minimum(w + REACH + 1, BLOCKS_X) - left
    steps = tl.cdiv(SIDE * SIDE, BM)
    for n in range((tl.minimum(u + REACH + 1, BLOCKS_Y) - up) * across * steps):  # blocks whose windows may hold these cells
        uu, ww = up + n // steps // across, left + n // steps % across
        row, column = ky - uu * BLOCK + HALO, kx - ww * BLOCK + HALO
        seen = real & (row >= 0) & (row < WIN) & (column >= 0) & (column < WIN)
        rows = n % steps * BM + tl.arange(0, BM)
        y, x = uu * SIDE + rows // SIDE, ww * SIDE + rows % SIDE
        there = (rows < SIDE * SIDE) & (y < QH) & (x < QW)
        q = tl.load(Q + y[:, None] * sqy + x[:, None] * sqx + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        grad = tl.load(
            DOut + y[:, None] * sgy + x[:, None] * sgx + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
        )  # fmt: skip
        cell = (uu * BLOCKS_X + ww) * WIN * WIN + row * WIN + column
        at = pairs + cell[:, None] * (SIDE * SIDE) + rows[None, :]
        exists = seen[:, None] & there[None, :]
        p = tl.load(P + at, mask=exists, other=0.0)
        dz = tl.load(DZ + at, mask=exists, other=0.0)
        dv_sum += tl.dot(p, grad, input_precision=PRECISION)
        dk += tl.dot(dz, q, input_precision=PRECISION)
    dk *= per_logit(scale)
    at_k, at_v = DK + b * sdkb + h * sdkh, DV_ + b * sdvb + h * sdvh
    tl.store(at_k + ky[:, None] * sdky + kx[:, None] * sdkx + d[None, :], dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(at_v + ky[:, None] * sdvy + kx[:, None] * sdvx + dv[None, :], dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)


@triton.jit
def _table_gradient_kernel(
    Q, Distances, Sums,
    sqb, sqh, sqy, sqx,
    HEADS, QH, QW, BLOCKS, BLOCKS_X, SIDE, D, TILES, SHARE,
    PRECISION: tl.constexpr, BM: tl.constexpr, BOTH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradients by distance of `SHARE` pieces of blocks, times their queries, added up: (BOTH, D) of this program."""
    share, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    d, t = tl.arange(0, BD), tl.arange(0, BOTH)
    total = tl.zeros([BOTH, BD], tl.float32)
    for piece in range(share * SHARE, tl.minimum(share * SHARE + SHARE, BLOCKS * TILES)):
        block = piece // TILES
        rows = piece % TILES * BM + tl.arange(0, BM)
        i, j = rows // SIDE, rows % SIDE
        y, x = block // BLOCKS_X * SIDE + i, block % BLOCKS_X * SIDE + j
        real = (i < SIDE) & (y < QH) & (x < QW)
        q = tl.load(
            Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :],
            mask=real[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        at = Distances + ((bh.to(tl.int64) * BLOCKS + block) * SIDE * SIDE + rows)[:, None] * BOTH + t[None, :]
        total += tl.dot(tl.trans(tl.load(at, mask=real[:, None], other=0.0)), q, input_precision=PRECISION)
    at = Sums + ((share * tl.num_programs(1) + bh).to(tl.int64) * BOTH + t)[:, None] * D + d[None, :]
    tl.store(at, total, mask=(d < D)[None, :])


def _empty(like: Tensor, channels: int) -> Tensor:
    """(B, heads, H, W, channels), laid out with heads next to channels as projections read them."""
    batch, heads, height, width = like.shape[:4]
    return like.new_empty((batch, height, width, heads, channels)).permute(0, 3, 1, 2, 4)


@operator("halo_forward")
def _halo_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    (batch, heads, qh, qw, dim), (height, width), dim_v = q.shape, k.shape[2:4], v.shape[-1]
    out, lse = _empty(q, dim_v), q.new_empty((batch, heads, qh, qw), dtype=torch.float32)
    if not out.numel():
        return out, lse
    side, win = block // stride, block + 2 * halo
    blocks_y, blocks_x = ceil_div(height, block), ceil_div(width, block)
    bm = tile(side * side)
    tiles = ceil_div(side * side, bm)
    _forward_kernel[(blocks_y * blocks_x * tiles, batch * heads)](
        q, k, v, q if rows is None else rows, q if columns is None else columns, out, lse, scale * LOG2E, scale_positions * LOG2E,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4],
        heads, height, width, qh, qw, blocks_x, side, block, halo, win, dim, dim_v, tiles,
        POSITIONS=rows is not None, MASKED=masked, PRECISION=precision(q),
        BM=bm, BN=tile(win * win), BW=tile(win, 256), BT=tile(2 * win - 1, 512), BD=tile(dim, 256), BDV=tile(dim_v, 256),
        num_warps=_WARPS,
    )  # fmt: skip
    return out, lse


@_halo_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, columns: Any,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)


@operator("halo_backward")
def _halo_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor | None,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad)
    (batch, heads, qh, qw, dim), (height, width), dim_v = q.shape, k.shape[2:4], v.shape[-1]
    side, win = block // stride, block + 2 * halo
    blocks_y, blocks_x = ceil_div(height, block), ceil_div(width, block)
    dq, dk, dv = _empty(q, dim), _empty(k, dim), _empty(v, dim_v)
    positions, blocks, bw, bt = rows is not None, blocks_y * blocks_x, tile(win, 256), tile(2 * win - 1, 512)
    distances = q.new_empty((batch, heads, blocks, side * side, 2, bt) if positions else (1,))
    if not q.numel():
        return dq, dk, dv, q.new_zeros((2, 2 * win - 1, dim) if positions else (1,), dtype=torch.float32)
    bm, bn = tile(side * side), tile(block * block)
    per_head = blocks * win * win * side * side
    step = max(1, min(batch * heads, _KEPT_BYTES // (2 * per_head * q.element_size())))
    p, dz = (q.new_empty(step * per_head) for _ in range(2))
    d_lse = lse if grad_lse is None else (grad_lse * LOG2E).contiguous()
    common = {"PRECISION": precision(q), "BM": bm, "BD": tile(dim, 256), "BDV": tile(dim_v, 256), "num_warps": _WARPS}
    for first in range(0, batch * heads, step):
        some = min(step, batch * heads - first)
        tiles = ceil_div(side * side, bm)
        _query_gradient_kernel[(blocks * tiles, some)](
            q, k, v, q if rows is None else rows, q if columns is None else columns, out, lse, grad, d_lse, dq, distances, p, dz,
            scale * LOG2E, scale_positions * LOG2E, first,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4], *grad.stride()[:4], *dq.stride()[:4],
            heads, height, width, qh, qw, blocks, blocks_x, side, block, halo, win, dim, dim_v, tiles,
            POSITIONS=positions, MASKED=masked, HAS_DLSE=grad_lse is not None, BN=tile(win * win), BW=bw, BT=bt, **common,
        )  # fmt: skip
        tiles = ceil_div(block * block, bn)
        _key_gradient_kernel[(blocks * tiles, some)](
            q, grad, p, dz, dk, dv, scale * LOG2E, first,
            *q.stride()[:4], *grad.stride()[:4], *dk.stride()[:4], *dv.stride()[:4],
            heads, height, width, qh, qw, blocks_y, blocks_x, side, block, halo, win, ceil_div(halo, block),
            dim, dim_v, tiles, BN=bn, **common,
        )  # fmt: skip
    if not positions:
        return dq, dk, dv, distances
    return dq, dk, dv, _table_gradients(q, distances, side, win)


@_halo_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, columns: Any, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Any,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tables = (2, 2 * (block + 2 * halo) - 1, q.shape[-1]) if rows is not None else (1,)
    return _empty(q, q.shape[-1]), _empty(k, k.shape[-1]), _empty(v, v.shape[-1]), q.new_empty(tables, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, rows, columns, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, tables = _halo_backward(q, k, v, rows, columns, out, lse, grad, grad_lse, *ctx.settings)
    of_tables = (None, None) if rows is None else (tables[0].to(rows.dtype), tables[1].to(columns.dtype))
    return dq, dk, dv, *of_tables, *(None,) * 6


def _table_gradients(q: Tensor, distances: Tensor, side: int, win: int) -> Tensor:
    """Gradients of both tables, (2, 2 win - 1, D) float32, from those by distance, (B, heads, blocks, side^2, 2, BT)."""
    batch, heads, blocks, _, _, bt = distances.shape
    dim, bm = q.shape[-1], tile(side * side)
    tiles = ceil_div(side * side, bm)
    share = max(1, min(32, batch * heads * blocks * tiles // 2048))
    shares = ceil_div(blocks * tiles, share)
    sums = torch.empty((shares, batch * heads, 2, bt, dim), dtype=torch.float32, device=q.device)
    _table_gradient_kernel[(shares, batch * heads)](
        q, distances, sums, *q.stride()[:4], heads, *q.shape[2:4], blocks, ceil_div(q.shape[3], side), side, dim, tiles, share,
        PRECISION=precision(q), BM=bm, BOTH=2 * bt, BD=tile(dim, 256), num_warps=_WARPS,
    )  # fmt: skip
    return sums.sum((0, 1))[:, : 2 * win - 1].contiguous()


_halo_forward.register_autograd(_backward, setup_context=_setup)


def halo_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, height_rel: Tensor | None, width_rel: Tensor | None, *,
    block_size: int, halo_size: int, query_stride: int, scale: float, scale_positions: bool, mask_padding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, heads, H_q, W_q, D_v) and the log-normaliser of base 2, of tensors as `ops.halo_attention` has checked them."""
    tables = [None if t is None else t.contiguous() for t in (height_rel, width_rel)]
    return _halo_forward(
        q, k, v, tables[0], tables[1], block_size, halo_size, query_stride, scale, scale if scale_positions else 1.0, mask_padding
    )
