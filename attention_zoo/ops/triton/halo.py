"""Blocked local attention with a halo as Triton kernels: windows are read from the maps, logits and copies are never formed.

A program has the queries of one block (or some of them) and walks along the cells of its window. The position terms of a query
are 2 win numbers, Sh[r] = q Rh[r - i + win - 1] and Sw[c] likewise; they reach the logits by a product with the one-hot rows and
columns of the cells, and their gradients come back by the same product. The queries' gradients are computed first; their kernel
leaves the weights and the logits' gradients of some heads at a time, from which keys and values then collect theirs, one program
for each block of cells: nothing is computed twice, and there are no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    heads_last,
    last_contiguous,
    per_logit,
    precision,
    read_delta,
    read_lse,
    tile,
)
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = ["Halo", "Scratch", "backward_launches", "forward_launch", "halo_attention_triton"]

_WARPS = 4
_KEPT_BYTES = 2**26  # of weights and gradients of logits that the backward holds at a time; a GPU is full with less
_PROGRAMS = 512  # that share out the sums over all blocks, and fill a GPU


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


@triton.jit
def _table_total_kernel(Sums, DRows, DColumns, PARTS, D, WIN, BOTH: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Gradients of both tables, (2 WIN - 1, D) each, from `PARTS` sums (BOTH, D): one row of one table."""
    number = tl.program_id(0) % (2 * WIN - 1)
    of_columns = tl.program_id(0) // (2 * WIN - 1)
    p, d = tl.arange(0, BP), tl.arange(0, BD)
    acc = tl.zeros([BP, BD], tl.float32)
    for start in range(0, PARTS, BP):
        parts = start + p
        at = Sums + (parts.to(tl.int64) * BOTH + of_columns * (BOTH // 2) + number)[:, None] * D + d[None, :]
        acc += tl.load(at, mask=(parts < PARTS)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tl.store(DRows + number * D + d, total.to(DRows.dtype.element_ty), mask=(d < D) & (of_columns == 0))
    tl.store(DColumns + number * D + d, total.to(DColumns.dtype.element_ty), mask=(d < D) & (of_columns == 1))


class Halo(NamedTuple):
    """What the launches of a call depend on besides where its tensors are.

    Attributes:
        batch, heads, height, width: of the keys' map.
        channels, value_channels: of a head.
        block, halo, stride, scale, scale_positions, masked: of the call; both scales are factors.
        positions: whether there are tables.
        bytes: of a number.
        precision: of products.
    """

    batch: int
    heads: int
    height: int
    width: int
    channels: int
    value_channels: int
    block: int
    halo: int
    stride: int
    scale: float
    scale_positions: float
    masked: bool
    positions: bool
    bytes: int
    precision: str

    @property
    def rows(self) -> int:
        """Heads of all samples."""
        return self.batch * self.heads

    @property
    def side(self) -> int:
        """Of the queries of a block."""
        return self.block // self.stride

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def blocks(self) -> tuple[int, int]:
        return ceil_div(self.height, self.block), ceil_div(self.width, self.block)

    @property
    def distances(self) -> int:
        """A row of a table, filled up to a tile."""
        return tile(2 * self.window - 1, 512)

    def queries(self) -> tuple[int, int, int]:
        """H_q and W_q, and the tiles of a block's queries."""
        cells = self.side * self.side
        return ceil_div(self.height, self.stride), ceil_div(self.width, self.stride), ceil_div(cells, tile(cells))

    def constants(self) -> dict[str, Any]:
        """What all kernels take that multiply queries, keys and values."""
        channels = {"BD": tile(self.channels, 256), "BDV": tile(self.value_channels, 256)}
        return {"PRECISION": self.precision, "BM": tile(self.side * self.side), **channels, "num_warps": _WARPS}

    def of_windows(self) -> dict[str, Any]:
        """Besides, of kernels that walk along windows."""
        tiles = {"BN": tile(self.window * self.window), "BW": tile(self.window, 256), "BT": self.distances}
        return {"POSITIONS": self.positions, "MASKED": self.masked, **self.constants(), **tiles}


class Scratch(NamedTuple):
    """How many numbers a backward works in: gradients by distance and kept weights, in the queries' dtype, and float32 sums."""

    distances: int
    kept: int
    sums: int


def forward_launch(call: Halo, q: Place, k: Place, v: Place, tables: tuple[Place, Place], out: Place, lse: Place) -> Launch:
    """Attention into `out` and `lse`; strides are those of (B, heads, H, W), channels side by side. Places of no tables are any."""
    (down, across), (height, width, tiles) = call.blocks, call.queries()
    strides = (s for place in (q, k, v, out) for s in place.strides)
    numbers = (
        call.scale * LOG2E, call.scale_positions * LOG2E, *strides,
        call.heads, call.height, call.width, height, width, across, call.side, call.block, call.halo, call.window,
        call.channels, call.value_channels, tiles,
    )  # fmt: skip
    return Launch(_forward_kernel, (down * across * tiles, call.rows), (q, k, v, *tables, out, lse), numbers, call.of_windows())


def backward_launches(
    call: Halo, q: Place, k: Place, v: Place, tables: tuple[Place, Place], out: Place, lse: Place, grad: Place, d_lse: Place | None,
    dq: Place, dk: Place, dv: Place, scratch: tuple[Place, Place, Place], d_tables: tuple[Place, Place] | None,
) -> tuple[list[Launch], Scratch]:  # fmt: skip
    """Gradients into `dq`, `dk`, `dv` and, if wanted, those of the tables; strides as in `forward_launch`.

    `scratch`: three tensors, of as many numbers as the second result says. `d_lse`: the gradient of the log-normaliser of base 2,
    times log2 e.
    """
    (down, across), (height, width, tiles) = call.blocks, call.queries()
    blocks, per_head = down * across, down * across * (call.window * call.side) ** 2
    most = max(1, _KEPT_BYTES // (2 * per_head * call.bytes))
    step = max(1, ceil_div(call.rows, ceil_div(call.rows, most)))  # heads at a time, about as many each time
    by_distance, (kept, first, _), sums = scratch
    p, dz = Place(kept, first), Place(kept, first + step * per_head)
    scales, constants, sizes = (
        (call.scale * LOG2E, call.scale_positions * LOG2E),
        call.constants(),
        (call.block, call.halo, call.window),
    )
    of_queries = [s for place in (q, k, v, out, grad, dq) for s in place.strides]
    of_keys = [s for place in (q, grad, dk, dv) for s in place.strides]
    cells, bn = call.block * call.block, tile(call.block * call.block)
    launches = []
    for head in range(0, call.rows, step):
        some, channels = min(step, call.rows - head), (call.channels, call.value_channels)
        numbers: tuple[float, ...] = (
            *scales, head, *of_queries, call.heads, call.height, call.width, height, width, blocks, across, call.side, *sizes,
            *channels, tiles,
        )  # fmt: skip
        places = q, k, v, *tables, out, lse, grad, d_lse or lse, dq, by_distance, p, dz
        given = call.of_windows() | {"HAS_DLSE": d_lse is not None}
        launches.append(Launch(_query_gradient_kernel, (blocks * tiles, some), places, numbers, given))
        numbers = (
            scales[0], head, *of_keys, call.heads, call.height, call.width, height, width, down, across, call.side, *sizes,
            ceil_div(call.halo, call.block), *channels, ceil_div(cells, bn),
        )  # fmt: skip
        grid = blocks * ceil_div(cells, bn), some
        launches.append(Launch(_key_gradient_kernel, grid, (q, grad, p, dz, dk, dv), numbers, constants | {"BN": bn}))
    if not call.positions:
        return launches, Scratch(1, 2 * step * per_head, 1)
    both, numbers_of_sums = 2 * call.distances, 1
    if d_tables is not None:
        share = ceil_div(blocks * tiles, max(1, _PROGRAMS // call.rows))
        shares = ceil_div(blocks * tiles, share)
        numbers = (*q.strides, call.heads, height, width, blocks, across, call.side, call.channels, tiles, share)
        given = {name: constants[name] for name in ("PRECISION", "BM", "BD", "num_warps")} | {"BOTH": both}
        launches.append(Launch(_table_gradient_kernel, (shares, call.rows), (q, by_distance, sums), numbers, given))
        numbers, bd = (shares * call.rows, call.channels, call.window), constants["BD"]
        given = {"BOTH": both, "BP": max(16, 4096 // bd), "BD": bd, "num_warps": _WARPS}
        launches.append(Launch(_table_total_kernel, (2 * (2 * call.window - 1),), (sums, *d_tables), numbers, given))
        numbers_of_sums = shares * call.rows * both * call.channels
    return launches, Scratch(call.rows * blocks * call.side**2 * both, 2 * step * per_head, numbers_of_sums)


# Of tensors that stand alone, by their strides; `key` is their dtype, the tables', and the device.


@settled
def _forward_of(call: Halo, strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None) -> Launch:
    q, k, v, out = (Place(number, 0, of[:4]) for number, of in enumerate(strides))
    return forward_launch(call, q, k, v, (Place(4), Place(5)), out, Place(6))


@settled
def _backward_of(
    call: Halo, strides: tuple[tuple[int, ...], ...], has_d_lse: bool, *key: torch.dtype | torch.device | None
) -> tuple[list[Launch], Scratch]:
    """Of q, k, v, outputs, gradients, of q, k, v, tables, log-normalisers, their gradients, scratch, gradients of both tables."""
    q, k, v, out, grad, dq, dk, dv = (Place(number, 0, of[:4]) for number, of in enumerate(strides))
    d_tables, d_lse = (Place(14), Place(14, (2 * call.window - 1) * call.channels)), Place(11) if has_d_lse else None
    scratch = Place(12), Place(13), Place(15)
    return backward_launches(call, q, k, v, (Place(8), Place(9)), out, Place(10), grad, d_lse, dq, dk, dv, scratch, d_tables)


def _call(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> Halo:  # fmt: skip
    settings = block, halo, stride, scale, scale_positions, masked
    batch, heads, height, width, dim = k.shape
    sizes = batch, heads, height, width, dim, v.shape[4]
    return Halo(*sizes, *settings, rows is not None, q.element_size(), precision(q))


@operator("halo_forward")
def _halo_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    out, lse = heads_last(q, v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)
    if out.numel():
        call = _call(q, k, v, rows, block, halo, stride, scale, scale_positions, masked)
        tables = q if rows is None else rows, q if columns is None else columns
        strides = tuple(t.stride() for t in (q, k, v, out))
        _forward_of(call, strides, q.dtype, tables[0].dtype, tables[1].dtype, q.device)(q, k, v, out, *tables, lse)
    return out, lse


@_halo_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, columns: Any,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return heads_last(q, v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)


@operator("halo_backward")
def _halo_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor | None,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad)
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    shape = (2, 2 * (block + 2 * halo) - 1, q.shape[-1]) if rows is not None else (1,)
    if not q.numel():
        return dq, dk, dv, q.new_zeros(shape, dtype=torch.float32)
    call = _call(q, k, v, rows, block, halo, stride, scale, scale_positions, masked)
    tables = q if rows is None else rows, q if columns is None else columns
    d_tables = q.new_empty(shape, dtype=torch.float32)
    d_lse = lse if grad_lse is None else (grad_lse * LOG2E).contiguous()
    given = q, k, v, out, grad, dq, dk, dv
    strides, dtypes = tuple(t.stride() for t in given), (q.dtype, tables[0].dtype, tables[1].dtype)
    launches, scratch = _backward_of(call, strides, grad_lse is not None, *dtypes, q.device)
    distances, kept, sums = q.new_empty(scratch.distances), q.new_empty(scratch.kept), d_tables.new_empty(scratch.sums)
    launch_all(launches, (*given, *tables, lse, d_lse, distances, kept, d_tables, sums))
    return dq, dk, dv, d_tables


@_halo_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, columns: Any, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Any,
    block: int, halo: int, stride: int, scale: float, scale_positions: float, masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tables = (2, 2 * (block + 2 * halo) - 1, q.shape[-1]) if rows is not None else (1,)
    return heads_last(q), heads_last(k), heads_last(v), q.new_empty(tables, dtype=torch.float32)


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
