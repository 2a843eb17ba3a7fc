"""Routed block attention as Triton kernels: keys and values are read where they stand, nothing is gathered in memory.

Forward and the gradient of queries: a program has some queries of one region and walks along the tokens of the regions that it is
routed to. Gradients of keys and values: a program has some keys of one region and walks along the queries of the regions that are
routed to it, which a sort of the routes lists; no atomics, so the result is the same every time.
"""

from __future__ import annotations

import functools
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
    last_contiguous,
    per_logit,
    power_of_2,
    precision,
    prepare_gradient,
    read_lse,
    tile,
)

__all__ = ["Tiling", "launch_backward", "launch_forward", "routed_attention_triton"]


@triton.jit
def _place(region, t, HEIGHT, WIDTH, COLUMNS):
    """Row and column of a region's token on the map that regions of HEIGHT x WIDTH tokens tile, COLUMNS side by side."""
    line, y = region // COLUMNS, t // WIDTH
    return line * HEIGHT + y, (region - line * COLUMNS) * WIDTH + t - y * WIDTH


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
    y, x = _place(r.to(tl.int64), rows, QH, QW, QC)
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
        region = tl.load(Routes + j, mask=inside, other=0)
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
    y, x = _place(r.to(tl.int64), rows, QH, QW, QC)
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
        region = tl.load(Routes + j, mask=inside, other=0)
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
    ky, kx = _place(wide, keys, KH, KW, KC)
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
            source = tl.load(Order + e, mask=inside, other=0)
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
    ky, kx = _place(region.to(tl.int64), keys, KH, KW, KC)
    at = DK + b * sdkb + hk * sdkh + ky[:, None] * sdky + kx[:, None] * sdkx + d[None, :]
    at_v = DV_ + b * sdvb + hk * sdvh + ky[:, None] * sdvy + kx[:, None] * sdvx + dv[None, :]
    tl.store(at, dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(at_v, dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)


def _mask_stride(mask: Tensor | None) -> int:
    """From one sample's mask to the next; 0 where all share one."""
    return 0 if mask is None or mask.ndim == 2 else mask.stride(0)


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


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, of_q: Tiling, of_k: Tiling,
) -> None:  # fmt: skip
    """Fill `out` and `lse`; the last dimension of all tensors is contiguous."""
    batch, heads, dim, dim_v, num = q.shape[0], q.shape[1], q.shape[-1], v.shape[-1], routes.shape[2]
    bm, bn = tile(of_q.tokens), tile(num * of_k.tokens)
    tiles = ceil_div(of_q.tokens, bm)
    _forward_kernel[(of_q.number * tiles, batch * heads)](
        q, k, v, routes, routes if weights is None else weights, routes if mask is None else mask, out, lse, scale * LOG2E,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4], _mask_stride(mask),
        heads, heads // k.shape[1], of_q.number, of_q.tokens, of_k.tokens, num, dim, dim_v, tiles, *of_q[:3], *of_k[:3],
        HAS_W=weights is not None, HAS_MASK=mask is not None, PRECISION=precision(q),
        BM=bm, BN=bn, BD=tile(dim, 256), BDV=tile(dim_v, 256), num_warps=4,
    )  # fmt: skip


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, scale: float, wants_weights: bool,
    of_q: Tiling, of_k: Tiling,
) -> Tensor:  # fmt: skip
    """Fill `dq`, `dk` and `dv`; returns the gradient of the weights, or something empty."""
    batch, heads, kv_heads, dim, dim_v, num = q.shape[0], q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], routes.shape[2]
    (nq, regions), (nk, key_regions), group = (of_q.tokens, of_q.number), (of_k.tokens, of_k.number), heads // kv_heads
    bm, bn = tile(nq), tile(num * nk)
    tiles = ceil_div(nq, bm)
    partial = (batch, heads * tiles, regions, num, nk) if wants_weights else (1,)
    dweights = torch.empty(partial, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse)
    common = {
        "HAS_W": weights is not None, "HAS_MASK": mask is not None, "PRECISION": precision(q),
        "BD": tile(dim, 256), "BDV": tile(dim_v, 256),
    }  # fmt: skip
    some_weights, some_mask = routes if weights is None else weights, routes if mask is None else mask
    mask_stride = _mask_stride(mask)
    if q.numel():
        _query_gradient_kernel[(regions * tiles, batch * heads)](
            q, k, v, routes, some_weights, some_mask, out, lse, grad, lse if grad_lse is None else (grad_lse * LOG2E).contiguous(),
            delta, dq, dweights, scale * LOG2E,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *out.stride()[:4], *grad.stride()[:4], *dq.stride()[:4], mask_stride,
            heads, group, regions, nq, nk, num, dim, dim_v, tiles, *of_q[:3], *of_k[:3],
            HAS_DW=wants_weights, HAS_DLSE=grad_lse is not None, BM=bm, BN=bn, num_warps=4, **common,
        )  # fmt: skip
    if k.numel():
        plan = _plan(routes, key_regions)
        bn = tile(nk)
        key_tiles = ceil_div(nk, bn)
        sums = torch.empty((batch, plan.parts, kv_heads, nk, dim + dim_v), dtype=torch.float32, device=q.device)
        _key_gradient_kernel[(plan.items * key_tiles, batch * kv_heads)](
            q, k, v, *plan.tables, some_weights, some_mask, lse, grad, delta, dk, dv, sums, scale * LOG2E,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *grad.stride()[:4], *dk.stride()[:4], *dv.stride()[:4], mask_stride,
            heads, group, regions, key_regions, nq, nk, num, dim, dim_v, key_tiles, plan.items, plan.parts, plan.chunk,
            *of_q[:3], *of_k[:3],
            BM=tile(nq * num), BN=bn, num_warps=2 if dim <= 64 else 4, num_stages=2, **common,
        )  # fmt: skip
        _add_parts_kernel[(key_regions * key_tiles, batch * kv_heads)](
            plan.tables[2], plan.tables[4], sums, dk, dv, *dk.stride()[:4], *dv.stride()[:4],
            kv_heads, key_regions, nk, dim, dim_v, key_tiles, plan.parts, *of_k[:3],
            BN=bn, BD=common["BD"], BDV=common["BDV"], num_warps=4,
        )  # fmt: skip
    return dweights.sum((1, 4)) if wants_weights else dweights


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """(B, H, R, n, D_v), laid out with heads next to channels as the output projection reads them."""
    batch, heads, regions, nq = q.shape[:4]
    return q.new_empty((batch, regions, nq, heads, v.shape[-1])).permute(0, 3, 1, 2, 4)


@operator("routed_forward")
def _routed_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, routes = last_contiguous(q), last_contiguous(k), last_contiguous(v), routes.contiguous()
    out = _empty_out(q, v)
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    if out.numel():
        launch_forward(q, k, v, routes, weights, mask, out, lse, scale, _listed(q), _listed(k))
    return out, lse


@_routed_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v), q.new_empty(q.shape[:4], dtype=torch.float32)


@operator("routed_backward")
def _routed_backward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor | None, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad, routes = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad), routes.contiguous()
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    dweights = launch_backward(
        q, k, v, routes, weights, mask, out, lse, grad, grad_lse, dq, dk, dv, scale, wants_weights, _listed(q), _listed(k)
    )
    return dq, dk, dv, dweights


class _Plan(NamedTuple):
    """Who computes the gradients of keys and values. All tables are on the device: nothing waits for a count.

    The routes to a key region are its sources. A region has one work item for every `chunk` of them, at least one; items of regions
    that have several leave their sums in `parts` places, to be added.

    Attributes:
        tables: numbers of the sources (B, R K), region after region; where each region's sources begin (B, R_k + 1); where its
            items begin (B, R_k + 1); the region of each item (B, items); where its parts begin, -1 for none (B, R_k).
        items, parts: how many there can be at most.
        chunk: sources of an item.
    """

    tables: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    items: int
    parts: int
    chunk: int


def _plan(routes: Tensor, key_regions: int) -> _Plan:
    batch, regions, num = routes.shape
    sources = regions * num
    chunk = 2 * max(1, sources // key_regions)
    items, parts = key_regions + sources // chunk, max(1, 2 * sources // chunk)
    ordered, order = routes.flatten(1).sort(dim=1, stable=True)
    table = functools.partial(torch.empty, dtype=torch.int32, device=routes.device)
    starts, firsts = table((batch, key_regions + 1)), table((batch, key_regions + 1))
    of_item, of_part = table((batch, items)), table((batch, key_regions))
    _plan_kernel[(batch,)](
        ordered, starts, firsts, of_item, of_part, key_regions, sources, items, chunk, sources.bit_length(),
        BR=power_of_2(key_regions + 1), num_warps=4,
    )  # fmt: skip
    return _Plan((order, starts, firsts, of_item, of_part), items, parts, chunk)


def _empty_like(x: Tensor) -> Tensor:
    """Of the same shape; (B, H, R, n, D) with heads next to channels."""
    batch, heads, regions, n, dim = x.shape
    return x.new_empty((batch, regions, n, heads, dim)).permute(0, 3, 1, 2, 4)


@_routed_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Any, mask: Any, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Any, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dweights = q.new_empty(routes.shape if wants_weights else (1,), dtype=torch.float32)
    return _empty_like(q), _empty_like(k), _empty_like(v), dweights


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
