"""Routed block attention as Triton kernels: keys and values are read where they stand, nothing is gathered in memory.

Forward and the gradient of queries: a program has some queries of one region and walks along the tokens of the regions that it is
routed to. Gradients of keys and values: a program has some keys of one region and walks along the queries of the regions that are
routed to it, which a sort of the routes lists; no atomics, so the result is the same every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import (
    LN2,
    LOG2E,
    absorb,
    ceil_div,
    conclude,
    heads_last,
    last_contiguous,
    per_logit,
    power_of_2,
    precision,
    prepare_gradient,
    read_lse,
    tile,
    warps,
)
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = ["RoutedCall", "Tiling", "backward_launches", "forward_launch", "routed_attention_triton", "run_backward"]


@triton.jit
def _place(region, t, HEIGHT, WIDTH, COLUMNS):
    """Row and column of a region's token on the map that regions of HEIGHT x WIDTH tokens tile, COLUMNS side by side.

    From int32, since a division of 64 bits is a hundred instructions; int64, to be multiplied by strides.
    """
    line, y = region // COLUMNS, t // WIDTH
    return (line * HEIGHT + y).to(tl.int64), ((region - line * COLUMNS) * WIDTH + t - y * WIDTH).to(tl.int64)


@triton.jit
def _forward_kernel(
    Q, K, V, Routes, Weights, Mask, Out, Lse,
    scale,  # of the logits, times log2 e
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sob, soh, soy, sox, smb,
    H, GROUP, R, NQ, NK, NUM, D, DV, TILES,
    QH, QW, QC, KH, KW, KC,  # regions of queries and of keys: see `Tiling`
    HAS_W: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, bh = tl.program_id(0), tl.program_id(1)
    r, portion = pid // TILES, pid % TILES
    b, h = (bh // H).to(tl.int64), bh % H
    hk = h // GROUP
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    y, x = _place(r, rows, QH, QW, QC)
    at = Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :]
    q = tl.load(at, mask=(rows < NQ)[:, None] & (d < D)[None, :], other=0.0)
    K += b * skb + hk * skh
    V += b * svb + hk * svh
    Routes += (b * R + r) * NUM
    Weights += (b * R + r) * NUM
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for start in range(0, NUM * NK, BN):
        slot = start + tl.arange(0, BN)
        inside = slot < NUM * NK
        j = slot // NK
        t = slot - j * NK
        region = tl.load(Routes + j, mask=inside, other=0).to(tl.int32)
        ky, kx = _place(region, t, KH, KW, KC)
        k = tl.load(K + ky[None, :] * sky + kx[None, :] * skx + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_W:
            w = tl.load(Weights + j, mask=inside, other=0.0)
            logits = logits * w[None, :]
        if HAS_MASK:
            inside = inside & (tl.load(Mask + b * smb + region * NK + t, mask=inside, other=0) != 0)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        p, fade, highest, total = absorb(logits, highest, total)
        if HAS_W:
            p = p * w[None, :]
        v = tl.load(V + ky[:, None] * svy + kx[:, None] * svx + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out, lse = conclude(acc, highest, total)
    at = Out + b * sob + h * soh + y[:, None] * soy + x[:, None] * sox + dv[None, :]
    tl.store(at, out.to(Out.dtype.element_ty), mask=(rows < NQ)[:, None] & (dv < DV)[None, :])
    tl.store(Lse + (bh.to(tl.int64) * R + r) * NQ + rows, lse, mask=rows < NQ)


@triton.jit
def _query_gradient_kernel(
    Q, K, V, Routes, Weights, Mask, Out, Lse, DOut, DLse, Delta, DQ, DWeights,
    scale,
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sob, soh, soy, sox, sgb, sgh, sgy, sgx, sdb, sdh, sdy, sdx, smb,
    H, GROUP, R, NQ, NK, NUM, D, DV, TILES,
    QH, QW, QC, KH, KW, KC,  # regions of queries and of keys: see `Tiling`
    HAS_W: tl.constexpr, HAS_DW: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, bh = tl.program_id(0), tl.program_id(1)
    r, portion = pid // TILES, pid % TILES
    b, h = (bh // H).to(tl.int64), bh % H
    hk = h // GROUP
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < NQ
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    y, x = _place(r, rows, QH, QW, QC)
    q = tl.load(Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :], mask=wanted, other=0.0)
    out = tl.load(Out + b * sob + h * soh + y[:, None] * soy + x[:, None] * sox + dv[None, :], mask=wanted_v, other=0.0)
    grad = tl.load(DOut + b * sgb + h * sgh + y[:, None] * sgy + x[:, None] * sgx + dv[None, :], mask=wanted_v, other=0.0)
    place = (bh.to(tl.int64) * R + r) * NQ + rows
    lse, delta = prepare_gradient(out, grad, Lse, DLse, Delta, place, real, HAS_DLSE)
    K += b * skb + hk * skh
    V += b * svb + hk * svh
    Routes += (b * R + r) * NUM
    Weights += (b * R + r) * NUM
    DWeights += ((bh.to(tl.int64) * TILES + portion) * R + r) * NUM * NK
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, NUM * NK, BN):
        slot = start + tl.arange(0, BN)
        inside = slot < NUM * NK
        j = slot // NK
        t = slot - j * NK
        region = tl.load(Routes + j, mask=inside, other=0).to(tl.int32)
        ky, kx = _place(region, t, KH, KW, KC)
        k = tl.load(K + ky[:, None] * sky + kx[:, None] * skx + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(V + ky[None, :] * svy + kx[None, :] * svx + dv[:, None], mask=inside[None, :] & (dv < DV)[:, None], other=0.0)
        seen = inside
        if HAS_MASK:
            seen = inside & (tl.load(Mask + b * smb + region * NK + t, mask=inside, other=0) != 0)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = raw
        if HAS_W:
            w = tl.load(Weights + j, mask=inside, other=0.0)
            logits = raw * w[None, :]
        p = tl.where(seen[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        dp = tl.dot(grad, v, input_precision=PRECISION)
        if HAS_W:
            ds = p * (dp * w[None, :] - delta[:, None])
            if HAS_DW:
                each = tl.sum(p * dp + ds * per_logit(raw), 0)
                tl.store(DWeights + slot, each, mask=inside)
            ds = ds * w[None, :]
        else:
            ds = p * (dp - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    acc *= per_logit(scale)
    at = DQ + b * sdb + h * sdh + y[:, None] * sdy + x[:, None] * sdx + d[None, :]
    tl.store(at, acc.to(DQ.dtype.element_ty), mask=wanted)


@triton.jit
def _order_kernel(Routes, Order, Ordered, SOURCES, TILES, BE: tl.constexpr):
    """The sources of one sample by where they lead, of equal ones the first: each counts those that come before it."""
    b, e = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BE + tl.arange(0, BE)
    Routes += b * SOURCES
    route = tl.load(Routes + e, mask=e < SOURCES, other=0).to(tl.int32)
    place = tl.zeros([BE], tl.int32)
    for start in range(0, SOURCES, BE):
        f = start + tl.arange(0, BE)
        other = tl.load(Routes + f, mask=f < SOURCES, other=2147483647).to(tl.int32)
        before = (other[None, :] < route[:, None]) | ((other[None, :] == route[:, None]) & (f[None, :] < e[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(Order + b * SOURCES + place, e, mask=e < SOURCES)
    tl.store(Ordered + b * SOURCES + place, route, mask=e < SOURCES)


@triton.jit
def _plan_kernel(Ordered, Starts, Items, ItemRegion, Parts, RK, SOURCES, ITEMS, CHUNK, STEPS, BR: tl.constexpr):
    """What the gradients of keys and values are made of, for one sample: see `_plan`."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    real = r < RK
    low, high = tl.zeros([BR], tl.int32), tl.zeros([BR], tl.int32) + SOURCES  # where the routes to r begin: a binary search
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(Ordered + b * SOURCES + middle, mask=middle < SOURCES, other=2147483647) < r
        low, high = tl.where((low < high) & less, middle + 1, low), tl.where((low < high) & (less == 0), middle, high)
    start = low
    low, high = start, tl.zeros([BR], tl.int32) + SOURCES
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(Ordered + b * SOURCES + middle, mask=middle < SOURCES, other=2147483647) < r + 1
        low, high = tl.where((low < high) & less, middle + 1, low), tl.where((low < high) & (less == 0), middle, high)
    tl.store(Starts + b * (RK + 1) + r, start, mask=r <= RK)
    chunks = tl.where(real, tl.maximum(1, (low - start + CHUNK - 1) // CHUNK), 0)
    item = tl.cumsum(chunks, 0) - chunks
    several = tl.where(chunks > 1, chunks, 0)
    tl.store(Items + b * (RK + 1) + r, item, mask=r <= RK)
    tl.store(Parts + b * RK + r, tl.where(chunks > 1, tl.cumsum(several, 0) - several, -1), mask=real)
    for c in range(tl.max(chunks, 0)):
        tl.store(ItemRegion + b * ITEMS + item + c, r, mask=c < chunks)


@triton.jit
def _key_gradient_kernel(
    Q, K, V, Order, Starts, Items, ItemRegion, Parts, Weights, Mask, Lse, DOut, Delta, DK, DV_, Sums,
    scale,
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sgb, sgh, sgy, sgx,
    sdkb, sdkh, sdky, sdkx, sdvb, sdvh, sdvy, sdvx, smb,
    H, GROUP, R, RK, NQ, NK, NUM, D, DV, TILES, ITEMS, PARTS, CHUNK,
    QH, QW, QC, KH, KW, KC,  # regions of queries and of keys: see `Tiling`
    HAS_W: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, bk = tl.program_id(0), tl.program_id(1)
    item, portion = pid // TILES, pid % TILES
    b, hk = (bk // (H // GROUP)).to(tl.int64), bk % (H // GROUP)
    if item >= tl.load(Items + b * (RK + 1) + RK):
        return
    region = tl.load(ItemRegion + b * ITEMS + item)
    wide = region.to(tl.int64)
    keys, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    real = keys < NK
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    ky, kx = _place(region, keys, KH, KW, KC)
    k = tl.load(K + b * skb + hk * skh + ky[:, None] * sky + kx[:, None] * skx + d[None, :], mask=wanted, other=0.0)
    v = tl.load(V + b * svb + hk * svh + ky[:, None] * svy + kx[:, None] * svx + dv[None, :], mask=wanted_v, other=0.0)
    seen = real
    if HAS_MASK:
        seen = real & (tl.load(Mask + b * smb + wide * NK + keys, mask=real, other=0) != 0)
    chunk = item - tl.load(Items + b * (RK + 1) + region)
    first = tl.load(Starts + b * (RK + 1) + region) + chunk * CHUNK
    count = tl.minimum(CHUNK, tl.load(Starts + b * (RK + 1) + region + 1) - first)
    Order += b * R * NUM + first
    Weights += b * R * NUM
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        for start in range(0, count * NQ, BM):
            slot = start + tl.arange(0, BM)
            inside = slot < count * NQ
            e = slot // NQ
            t = slot - e * NQ
            source = tl.load(Order + e, mask=inside, other=0).to(tl.int32)
            r = source // NUM
            y, x = _place(r, t, QH, QW, QC)
            q = tl.load(
                Q + b * sqb + h * sqh + y[:, None] * sqy + x[:, None] * sqx + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            grad = tl.load(
                DOut + b * sgb + h * sgh + y[:, None] * sgy + x[:, None] * sgx + dv[None, :],
                mask=inside[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
            place = ((b * H + h) * R + r) * NQ + t
            lse = read_lse(Lse, place, inside)
            delta = tl.load(Delta + place, mask=inside, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if HAS_W:
                w = tl.load(Weights + source, mask=inside, other=0.0)
                logits = logits * w[None, :]
            p = tl.where(seen[:, None], tl.exp2(logits - lse[None, :]), 0.0)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            if HAS_W:
                ds = p * (dp * w[None, :] - delta[None, :]) * w[None, :]
                p = p * w[None, :]
            else:
                ds = p * (dp - delta[None, :])
            dv_sum += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk *= per_logit(scale)
    part = tl.load(Parts + b * RK + region)
    if part < 0:
        at = DK + b * sdkb + hk * sdkh + ky[:, None] * sdky + kx[:, None] * sdkx + d[None, :]
        at_v = DV_ + b * sdvb + hk * sdvh + ky[:, None] * sdvy + kx[:, None] * sdvx + dv[None, :]
        tl.store(at, dk.to(DK.dtype.element_ty), mask=wanted)
        tl.store(at_v, dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)
    else:
        sums = Sums + (((b * PARTS + part + chunk) * (H // GROUP) + hk) * NK + keys[:, None]) * (D + DV)
        tl.store(sums + d[None, :], dk, mask=wanted)
        tl.store(sums + D + dv[None, :], dv_sum, mask=wanted_v)


@triton.jit
def _add_parts_kernel(
    Items, Parts, Sums, DK, DV_, sdkb, sdkh, sdky, sdkx, sdvb, sdvh, sdvy, sdvx, HK, RK, NK, D, DV, TILES, PARTS, KH, KW, KC,
    BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, bk = tl.program_id(0), tl.program_id(1)
    region, portion = pid // TILES, pid % TILES
    b, hk = (bk // HK).to(tl.int64), bk % HK
    part = tl.load(Parts + b * RK + region)
    if part < 0:
        return
    chunks = tl.load(Items + b * (RK + 1) + region + 1) - tl.load(Items + b * (RK + 1) + region)
    keys, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    wanted, wanted_v = (keys < NK)[:, None] & (d < D)[None, :], (keys < NK)[:, None] & (dv < DV)[None, :]
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for c in range(chunks):
        sums = Sums + (((b * PARTS + part + c) * HK + hk) * NK + keys[:, None]) * (D + DV)
        dk += tl.load(sums + d[None, :], mask=wanted, other=0.0)
        dv_sum += tl.load(sums + D + dv[None, :], mask=wanted_v, other=0.0)
    ky, kx = _place(region, keys, KH, KW, KC)
    at = DK + b * sdkb + hk * sdkh + ky[:, None] * sdky + kx[:, None] * sdkx + d[None, :]
    at_v = DV_ + b * sdvb + hk * sdvh + ky[:, None] * sdvy + kx[:, None] * sdvx + dv[None, :]
    tl.store(at, dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(at_v, dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)


_MOST_COUNTED = 1024  # sources of a sample, each of which looks at all


class Tiling(NamedTuple):
    """How tensors (B, H, Y, X, D) are cut: regions of `height` x `width` tokens, `columns` of them side by side, `number` in all.

    A list of regions (B, H, R, n, D) is a map of R rows, each of them one region.
    """

    height: int
    width: int
    columns: int
    number: int

    @property
    def tokens(self) -> int:
        """Of each region."""
        return self.height * self.width


def _listed(x: Tensor) -> Tiling:
    return Tiling(1, x.shape[3], 1, x.shape[2])


class RoutedCall(NamedTuple):
    """What the launches of a call depend on, besides where its tensors are.

    Attributes:
        batch, heads, kv_heads, dim, dim_v: of queries, keys and values.
        topk: routes of each region.
        of_q, of_k: how queries are cut, and keys and values.
        scale, precision: of the logits and of all products.
        has_weights, mask_stride: whether routes have weights, and what lies between two samples' masks; None: there are none.
        key: dtypes and device.
    """

    batch: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    topk: int
    of_q: Tiling
    of_k: Tiling
    scale: float
    precision: str
    has_weights: bool
    mask_stride: int | None
    key: tuple[torch.dtype | torch.device | None, ...]

    def sizes(self) -> tuple[int, ...]:
        return self.of_q.tokens, self.of_k.tokens, self.topk, self.dim, self.dim_v

    def constants(self) -> dict[str, Any]:
        flags = {"HAS_W": self.has_weights, "HAS_MASK": self.mask_stride is not None, "PRECISION": self.precision}
        return {**flags, "BD": tile(self.dim, 256), "BDV": tile(self.dim_v, 256)}

    def query_tiles(self) -> dict[str, Any]:
        """Of programs that have queries of a region: each warp finds the places of all keys by itself, so few for few queries."""
        rows, keys, constants = tile(self.of_q.tokens), self.topk * self.of_k.tokens, self.constants()
        return {
            **constants,
            "BM": rows,
            "BN": tile(keys),
            "num_warps": warps(rows * max(constants["BD"], constants["BDV"], 64)),
            "num_stages": 1 if keys <= tile(keys) else 3,
        }


# Launches, for tensors numbered as here. Places of queries, keys, values and the like have strides by (B, H, Y, X).
_Q, _K, _V, _ROUTES, _WEIGHTS, _MASK, _OUT, _LSE, _GRAD, _DLSE, _DQ, _DK, _DV, _ORDER, _ORDERED, _TABLES, _FLOATS, _DWEIGHTS = (
    range(18)
)


@settled
def forward_launch(call: RoutedCall, q: Place, k: Place, v: Place, out: Place) -> Launch:
    constants = call.query_tiles()
    tiles = ceil_div(call.of_q.tokens, constants["BM"])
    numbers = (
        call.scale * LOG2E, *q.strides, *k.strides, *v.strides, *out.strides, call.mask_stride or 0,
        call.heads, call.heads // call.kv_heads, call.of_q.number, *call.sizes(), tiles, *call.of_q[:3], *call.of_k[:3],
    )  # fmt: skip
    places = q, k, v, Place(_ROUTES), Place(_WEIGHTS), Place(_MASK), out, Place(_LSE)
    grid = call.of_q.number * tiles, call.batch * call.heads
    return Launch(_forward_kernel, grid, places, numbers, constants)


class Backward(NamedTuple):
    """Of a backward: launches, whether they need the routes sorted, how many numbers their int32 tables and float32 sums have, and
    the shape of the parts of the weights' gradients."""

    launches: tuple[Launch, ...]
    sorts: bool
    tables: int
    floats: int
    parts: tuple[int, ...]


@settled
def backward_launches(
    call: RoutedCall, wants_weights: bool, has_dlse: bool, q: Place, k: Place, v: Place, out: Place, grad: Place,
    dq: Place, dk: Place, dv: Place,
) -> Backward:  # fmt: skip
    (nq, nk, num, *_), regions, key_regions = call.sizes(), call.of_q.number, call.of_k.number
    group, tilings, common = call.heads // call.kv_heads, (*call.of_q[:3], *call.of_k[:3]), call.constants()
    lse, routes, weights, mask = Place(_LSE), Place(_ROUTES), Place(_WEIGHTS), Place(_MASK)
    scale, mask_stride = call.scale * LOG2E, call.mask_stride or 0
    of_queries = call.query_tiles()
    tiles = ceil_div(nq, of_queries["BM"])
    delta, deltas = Place(_FLOATS), call.batch * call.heads * regions * nq
    strides = (s for place in (q, k, v, out, grad, dq) for s in place.strides)
    first = Launch(
        _query_gradient_kernel,
        (regions * tiles, call.batch * call.heads),
        (q, k, v, routes, weights, mask, out, lse, grad, Place(_DLSE), delta, dq, Place(_DWEIGHTS)),
        (scale, *strides, mask_stride, call.heads, group, regions, *call.sizes(), tiles, *tilings),
        {**of_queries, "HAS_DW": wants_weights, "HAS_DLSE": has_dlse},
    )

    plan = _Plan.of(call.batch, regions * num, key_regions)
    bn, slots = tile(nk), tile(nq * num)
    settings = {"num_warps": 4 if call.dim > 64 else 1 if bn == 16 else 2, "num_stages": 1 if plan.chunk * nq <= 2 * slots else 2}
    key_tiles, sums = ceil_div(nk, bn), Place(_FLOATS, deltas)
    strides = (s for place in (q, k, v, grad, dk, dv) for s in place.strides)
    keys = Launch(
        _key_gradient_kernel,
        (plan.items * key_tiles, call.batch * call.kv_heads),
        (q, k, v, plan.order[0], *plan.places, weights, mask, lse, grad, delta, dk, dv, sums),
        (
            scale, *strides, mask_stride, call.heads, group, regions, key_regions, *call.sizes(), key_tiles,
            plan.items, plan.parts, plan.chunk, *tilings,
        ),
        {**common, "BM": slots, "BN": bn, **settings},
    )  # fmt: skip
    add = Launch(
        _add_parts_kernel,
        (key_regions * key_tiles, call.batch * call.kv_heads),
        (plan.places[1], plan.places[3], sums, dk, dv),
        (
            *dk.strides, *dv.strides, call.kv_heads, key_regions, nk, call.dim, call.dim_v, key_tiles, plan.parts, *call.of_k[:3],
        ),
        {"BN": bn, "BD": common["BD"], "BDV": common["BDV"], "num_warps": 4},
    )  # fmt: skip
    floats = deltas + call.batch * plan.parts * call.kv_heads * nk * (call.dim + call.dim_v)
    parts = (call.batch, call.heads * tiles, regions, num, nk)
    return Backward((first, *plan.launches(), keys, add), plan.sorts, plan.numbers, floats, parts)


def run_backward(backward: Backward, tensors: Sequence[Tensor], wants_weights: bool) -> Tensor:
    """With tensors `_Q` to `_DV`. Returns the gradient of the weights, or something empty."""
    routes, lse = tensors[_ROUTES], tensors[_LSE]
    tables = routes.new_empty(backward.tables, dtype=torch.int32)
    ordered, order = routes.flatten(1).sort(dim=1, stable=True) if backward.sorts else (tables, tables)
    floats = lse.new_empty(backward.floats)
    dweights = lse.new_empty(backward.parts) if wants_weights else floats
    launch_all(backward.launches, (*tensors, order, ordered, tables, floats, dweights))
    return dweights.sum((1, 4)) if wants_weights else floats.new_empty(1)


def _call_of(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, scale: float
) -> RoutedCall:
    sizes, key = (q.shape[0], q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], routes.shape[2]), (q.dtype, q.device)
    stride = None if mask is None else mask.stride(0) if mask.ndim > 2 else 0  # 0: all samples share one
    return RoutedCall(*sizes, _listed(q), _listed(k), scale, precision(q), weights is not None, stride, key)


def _places(**tensors: Tensor) -> dict[str, Place]:
    return {name: Place(_NUMBERS[name], 0, t.stride()[:4]) for name, t in tensors.items()}


_NUMBERS = {"q": _Q, "k": _K, "v": _V, "out": _OUT, "grad": _GRAD, "dq": _DQ, "dk": _DK, "dv": _DV}


@operator("routed_forward")
def _routed_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, routes = last_contiguous(q), last_contiguous(k), last_contiguous(v), routes.contiguous()
    out = heads_last(q, v.shape[-1])
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    if out.numel():
        launch = forward_launch(_call_of(q, k, v, routes, weights, mask, scale), **_places(q=q, k=k, v=v, out=out))
        launch(q, k, v, routes, routes if weights is None else weights, routes if mask is None else mask, out, lse)
    return out, lse


@_routed_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    return heads_last(q, v.shape[-1]), q.new_empty(q.shape[:4], dtype=torch.float32)


@operator("routed_backward")
def _routed_backward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor | None, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad, routes = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad), routes.contiguous()
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    if not (q.numel() and k.numel()):
        dweights = lse.new_zeros(routes.shape if wants_weights else (1,))
        return dq.zero_(), dk.zero_(), dv.zero_(), dweights
    places = _places(q=q, k=k, v=v, out=out, grad=grad, dq=dq, dk=dk, dv=dv)
    call = _call_of(q, k, v, routes, weights, mask, scale)
    backward = backward_launches(call, wants_weights, grad_lse is not None, **places)
    some = routes if weights is None else weights, routes if mask is None else mask
    of_lse = lse if grad_lse is None else (grad_lse * LOG2E).contiguous()
    return dq, dk, dv, run_backward(backward, (q, k, v, routes, *some, out, lse, grad, of_lse, dq, dk, dv), wants_weights)


class _Plan(NamedTuple):
    """Who computes the gradients of keys and values. All tables are on the device: nothing waits for a count.

    The routes to a key region are its sources. A region has one work item for every `chunk` of them, at least one; items of regions
    that have several leave their sums in `parts` places, to be added.

    Attributes:
        batch, sources, key_regions: routes of a sample, and where they lead.
        items, parts: how many there can be at most.
        chunk: sources of an item.
        sorts: whether there are too many sources for `_order_kernel`.
        order: places of the sources by where they lead, and of where they lead.
        places: of the tables: where each region's sources begin (B, R_k + 1) in the list of sources by regions; where its items
            begin (B, R_k + 1); the region of each item (B, items); where its parts begin, -1 for none (B, R_k).
        numbers: of all tables together.
    """

    batch: int
    sources: int
    key_regions: int
    items: int
    parts: int
    chunk: int
    sorts: bool
    order: tuple[Place, ...]
    places: tuple[Place, ...]
    numbers: int

    @classmethod
    def of(cls, batch: int, sources: int, key_regions: int) -> _Plan:
        chunk = 2 * max(1, sources // key_regions)
        items, parts = key_regions + sources // chunk, max(1, 2 * sources // chunk)
        sorts = sources > _MOST_COUNTED
        lengths = (key_regions + 1, key_regions + 1, items, key_regions, *(() if sorts else (sources, sources)))
        *offsets, numbers = itertools.accumulate((batch * length for length in lengths), initial=0)
        places = tuple(Place(_TABLES, offset) for offset in offsets)
        order = (Place(_ORDER), Place(_ORDERED)) if sorts else places[4:]
        return cls(batch, sources, key_regions, items, parts, chunk, sorts, order, places[:4], numbers)

    def launches(self) -> list[Launch]:
        numbers = self.key_regions, self.sources, self.items, self.chunk, self.sources.bit_length()
        constants = {"BR": power_of_2(self.key_regions + 1), "num_warps": 4}
        launches = [Launch(_plan_kernel, (self.batch,), (self.order[1], *self.places), numbers, constants)]
        if not self.sorts:
            tiles, places = ceil_div(self.sources, 32), (Place(_ROUTES), *self.order)
            constants = {"BE": 32, "num_warps": 4}
            launches.insert(0, Launch(_order_kernel, (self.batch * tiles,), places, (self.sources, tiles), constants))
        return launches


@_routed_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Any, mask: Any, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Any, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dweights = q.new_empty(routes.shape if wants_weights else (1,), dtype=torch.float32)
    return heads_last(q), heads_last(k), heads_last(v), dweights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, routes, weights, mask, scale = inputs
    ctx.save_for_backward(q, k, v, routes, weights, mask, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, routes, weights, mask, out, lse = ctx.saved_tensors
    wants_weights = weights is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dweights = _routed_backward(q, k, v, routes, weights, mask, out, lse, grad, grad_lse, ctx.scale, wants_weights)
    return dq, dk, dv, None, dweights if wants_weights else None, None, None


_routed_forward.register_autograd(_backward, setup_context=_setup)


def routed_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, route_weights: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, R, n, D_v) and the natural log-normaliser (B, H, R, n), of tensors as `ops.routed_attention` has checked them."""
    weights = None if route_weights is None else route_weights.float().contiguous()
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    out, lse = _routed_forward(q, k, v, routes, weights, mask, scale)
    return out, lse * LN2
