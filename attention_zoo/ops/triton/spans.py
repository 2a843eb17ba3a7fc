"""Attention to binary spans as Triton kernels: every query over its own token and the summaries of [0, i), one softmax.

The summary of the span that ends before token s and has as many tokens as the lowest set bit of s counts is kept in slot s, as in
a Fenwick tree: query i reads the slots that are left when the set bits of i are cleared, lowest first. Tokens are cut into chunks.
Inside a chunk slots and tokens meet as one masked tile, a product of matrices; slots at the beginnings of chunks ("outer") number
log2 of the chunks for each query, and all queries of a chunk read the same ones. What many chunks give to an outer slot is written
apart and summed up in order by a kernel of its own: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import (
    LN2,
    LOG2E,
    ceil_div,
    conclude,
    heads_last,
    last_contiguous,
    per_logit,
    precision,
    read_lse,
    tile,
)

__all__ = ["span_attention_triton"]

_CHUNKS = {2: 64, 4: 16}  # tokens of a chunk, by the bytes of a number: products in float32 are unrolled, and compiled too long
_LEVELS = 16  # rows of a tile of outer slots: for 2^16 chunks


@triton.jit
def _level(slot, LEVELS: tl.constexpr):
    """The lowest set bit of an outer slot, and its number."""
    low = slot & -slot
    level = 0
    for i in tl.static_range(1, LEVELS):
        level += ((low >> i) > 0).to(tl.int32)
    return low, level


@triton.jit
def _within(C: tl.constexpr):
    """Which tokens (columns) of a chunk belong to which of its slots (rows)."""
    s, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (j >= s - (s & -s)) & (j < s)


@triton.jit
def _outer_of_members(chunk, CHUNKS, LEVELS: tl.constexpr):
    """The outer slots whose spans hold a chunk, one a level, and whether they are there."""
    level = tl.arange(0, LEVELS)
    slot = ((chunk >> level) + 1) << level
    return slot, (((chunk >> level) & 1) == 0) & (slot < CHUNKS)


@triton.jit
def _outer_of_queries(chunk, LEVELS: tl.constexpr):
    """The outer slots that the queries of a chunk see."""
    level = tl.arange(0, LEVELS)
    return (chunk >> level) << level, ((chunk >> level) & 1) == 1


@triton.jit
def _grow(Tokens, Slots, Chunks, base, chunk, LENGTH, CHUNKS, D, stn, C: tl.constexpr, BD: tl.constexpr):
    """Largest value of each channel over all spans of a chunk, level by level, and over the chunk."""
    n, d = chunk * C + tl.arange(0, C), tl.arange(0, BD)
    pool = tl.load(Tokens + n[:, None] * stn + d[None, :], mask=(n < LENGTH)[:, None] & (d < D)[None, :], other=float("-inf"))
    for level in tl.static_range(0, 6):
        if (1 << level) < C:
            t = tl.arange(0, C >> level)
            slot = chunk * C + ((t + 1) << level)
            first = (t % 2 == 0) & (slot < LENGTH)
            tl.store(Slots + (base * LENGTH + slot)[:, None] * D + d[None, :], pool, mask=first[:, None] & (d < D)[None, :])
            pool = tl.max(tl.reshape(pool, (C >> (level + 1), 2, BD)), 1)
    pool = tl.reshape(pool, (BD,))
    tl.store(Chunks + (base * CHUNKS + chunk) * D + d, pool, mask=d < D)


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS"))
def _pool_kernel(
    Q, K, SlotQ, SlotK, ChunkQ, ChunkK, sqb, sqh, sqn, skb, skh, skn, HEADS, LENGTH, CHUNKS, D, C: tl.constexpr, BD: tl.constexpr
):
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    _grow(Q + b * sqb + h * sqh, SlotQ, ChunkQ, bh, chunk, LENGTH, CHUNKS, D, sqn, C, BD)
    _grow(K + b * skb + h * skh, SlotK, ChunkK, bh, chunk, LENGTH, CHUNKS, D, skn, C, BD)


@triton.jit(do_not_specialize=("CHUNKS",))
def _outer_pool_kernel(
    ChunkQ, ChunkK, OuterQ, OuterK, ArgQ, ArgK, CHUNKS, D, BC: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr
):
    """The same over the spans of whole chunks, and which chunk has the largest value, the first of them."""
    slot, base = tl.program_id(0), tl.program_id(1).to(tl.int64) * CHUNKS
    low, _ = _level(slot, LEVELS)
    d = tl.arange(0, BD)
    for which in tl.static_range(2):
        From = ChunkQ if which == 0 else ChunkK
        best = tl.full([BD], float("-inf"), tl.float32)
        arg = tl.zeros([BD], tl.int32)
        for start in range(slot - low, slot, BC):
            m = start + tl.arange(0, BC)
            there = (m < slot)[:, None] & (d < D)[None, :]
            x = tl.load(From + (base + m)[:, None] * D + d[None, :], mask=there, other=float("-inf")).to(tl.float32)
            top = tl.max(x, 0)
            index = tl.min(tl.where(x == top[None, :], m[:, None], CHUNKS), 0)
            arg = tl.where(top > best, index, arg)
            best = tl.maximum(best, top)
        place = (base + slot) * D + d
        known = (d < D) & (low > 0)
        tl.store((OuterQ if which == 0 else OuterK) + place, best.to(OuterQ.dtype.element_ty), mask=known)
        tl.store((ArgQ if which == 0 else ArgK) + place, arg, mask=known)


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS", "DEPTH"))
def _value_kernel(
    K, V, SlotQ, OuterQ, SlotV, SlotLse, PartV, PartLse,
    scale, skb, skh, skn, svb, svh, svn, HEADS, LENGTH, CHUNKS, DEPTH, D, DV,
    PRECISION: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Values of the spans of a chunk, and what it gives to those of the outer slots that it belongs to."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    n, d, dv = chunk * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BDV)
    real, cd, cdv = n < LENGTH, (d < D)[None, :], (dv < DV)[None, :]
    k = tl.load(K + b * skb + h * skh + n[:, None] * skn + d[None, :], mask=real[:, None] & cd, other=0.0)
    v = tl.load(V + b * svb + h * svh + n[:, None] * svn + dv[None, :], mask=real[:, None] & cdv, other=0.0)
    slot = real & (n > chunk * C)
    q = tl.load(SlotQ + (bh * LENGTH + n)[:, None] * D + d[None, :], mask=slot[:, None] & cd, other=0.0)
    x = tl.where(_within(C), tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    top = tl.max(x, 1)
    p = tl.exp2(x - tl.where(top == float("-inf"), 0.0, top)[:, None])
    value, lse = conclude(tl.dot(p.to(v.dtype), v, input_precision=PRECISION), top, tl.sum(p, 1))
    tl.store(SlotV + (bh * LENGTH + n)[:, None] * DV + dv[None, :], value.to(SlotV.dtype.element_ty), mask=slot[:, None] & cdv)
    tl.store(SlotLse + bh * LENGTH + n, lse, mask=real)

    outer, there = _outer_of_members(chunk, CHUNKS, LEVELS)
    q = tl.load(OuterQ + (bh * CHUNKS + outer)[:, None] * D + d[None, :], mask=there[:, None] & cd, other=0.0)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    top = tl.max(x, 1)
    p = tl.exp2(x - top[:, None])
    value, lse = conclude(tl.dot(p.to(v.dtype), v, input_precision=PRECISION), top, tl.sum(p, 1))
    place = (bh * CHUNKS + chunk) * DEPTH + tl.arange(0, LEVELS)
    tl.store(PartV + place[:, None] * DV + dv[None, :], value, mask=there[:, None] & cdv)
    tl.store(PartLse + place, lse, mask=there)


@triton.jit(do_not_specialize=("CHUNKS", "DEPTH"))
def _join_kernel(PartV, PartLse, OuterV, OuterLse, CHUNKS, DEPTH, DV, BC: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr):
    """Values of the outer slots from their parts."""
    slot, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low, level = _level(slot, LEVELS)
    dv = tl.arange(0, BDV)
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BDV], tl.float32)
    for start in range(slot - low, slot, BC):
        m = start + tl.arange(0, BC)
        place = (bh * CHUNKS + m) * DEPTH + level
        lse = tl.load(PartLse + place, mask=m < slot, other=float("-inf"))
        value = tl.load(PartV + place[:, None] * DV + dv[None, :], mask=(m < slot)[:, None] & (dv < DV)[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        p, fade = tl.exp2(lse - higher), tl.exp2(highest - higher)
        acc = acc * fade + tl.sum(p[:, None] * value, 0)
        total = total * fade + tl.sum(p, 0)
        highest = higher
    if low > 0:
        tl.store(OuterV + (bh * CHUNKS + slot) * DV + dv, (acc / total).to(OuterV.dtype.element_ty), mask=dv < DV)
        tl.store(OuterLse + bh * CHUNKS + slot, highest + tl.log2(total))


@triton.jit
def _seen(C: tl.constexpr):
    """Which slots (columns) of a chunk its queries (rows) see."""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i ^ s) < (s & -s)


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS"))
def _attend_kernel(
    Q, K, V, SlotK, SlotV, OuterK, OuterV, Out, Lse,
    scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, HEADS, LENGTH, CHUNKS, D, DV,
    OWN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    n, d, dv = chunk * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BDV)
    real, cd, cdv = n < LENGTH, (d < D)[None, :], (dv < DV)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + n[:, None] * sqn + d[None, :], mask=real[:, None] & cd, other=0.0)
    slot = real & (n > chunk * C)
    slot_k = tl.load(SlotK + (bh * LENGTH + n)[:, None] * D + d[None, :], mask=slot[:, None] & cd, other=0.0)
    slot_v = tl.load(SlotV + (bh * LENGTH + n)[:, None] * DV + dv[None, :], mask=slot[:, None] & cdv, other=0.0)
    outer, there = _outer_of_queries(chunk, LEVELS)
    outer_k = tl.load(OuterK + (bh * CHUNKS + outer)[:, None] * D + d[None, :], mask=there[:, None] & cd, other=0.0)
    outer_v = tl.load(OuterV + (bh * CHUNKS + outer)[:, None] * DV + dv[None, :], mask=there[:, None] & cdv, other=0.0)
    x = tl.where(_seen(C), tl.dot(q, tl.trans(slot_k), input_precision=PRECISION) * scale, float("-inf"))
    y = tl.where(there[None, :], tl.dot(q, tl.trans(outer_k), input_precision=PRECISION) * scale, float("-inf"))
    highest = tl.maximum(tl.max(x, 1), tl.max(y, 1))
    if OWN:
        k = tl.load(K + b * skb + h * skh + n[:, None] * skn + d[None, :], mask=real[:, None] & cd, other=0.0)
        own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        highest = tl.maximum(highest, own)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    p, r = tl.exp2(x - anchor), tl.exp2(y - anchor)
    total = tl.sum(p, 1) + tl.sum(r, 1)
    acc = tl.dot(p.to(slot_v.dtype), slot_v, input_precision=PRECISION)
    acc += tl.dot(r.to(slot_v.dtype), outer_v, input_precision=PRECISION)
    if OWN:
        v = tl.load(V + b * svb + h * svh + n[:, None] * svn + dv[None, :], mask=real[:, None] & cdv, other=0.0)
        o = tl.exp2(own[:, None] - anchor)
        acc += o * v.to(tl.float32)
        total += tl.sum(o, 1)
    out, lse = conclude(acc, highest, total)
    at = Out + b * sob + h * soh
    tl.store(at + n[:, None] * son + dv[None, :], out.to(Out.dtype.element_ty), mask=real[:, None] & cdv)
    tl.store(Lse + bh * LENGTH + n, lse, mask=real)


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS", "DEPTH"))
def _query_gradient_kernel(
    Q, K, V, SlotK, SlotV, OuterK, OuterV, Out, Lse, DOut, DLse,
    DQ, DSlotK, DSlotV, PartK, PartV, OwnP, OwnS,
    scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn, sdb, sdh, sdn,
    HEADS, LENGTH, CHUNKS, DEPTH, D, DV,
    HAS_DLSE: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a chunk as they attend, of its slots, and what it gives to those of outer slots.

    Of a query's own token the weight and the gradient of the logit are kept for the kernel of the tokens.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    n, d, dv = chunk * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BDV)
    real, cd, cdv = n < LENGTH, (d < D)[None, :], (dv < DV)[None, :]
    wanted, wanted_v = real[:, None] & cd, real[:, None] & cdv
    q = tl.load(Q + b * sqb + h * sqh + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
    out = tl.load(Out + b * sob + h * soh + n[:, None] * son + dv[None, :], mask=wanted_v, other=0.0)
    grad = tl.load(DOut + b * sgb + h * sgh + n[:, None] * sgn + dv[None, :], mask=wanted_v, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLse + bh * LENGTH + n, mask=real, other=0.0)
    lse = read_lse(Lse, bh * LENGTH + n, real)
    slot = real & (n > chunk * C)
    slot_k = tl.load(SlotK + (bh * LENGTH + n)[:, None] * D + d[None, :], mask=slot[:, None] & cd, other=0.0)
    slot_v = tl.load(SlotV + (bh * LENGTH + n)[:, None] * DV + dv[None, :], mask=slot[:, None] & cdv, other=0.0)
    x = tl.dot(q, tl.trans(slot_k), input_precision=PRECISION) * scale
    p = tl.where(_seen(C), tl.exp2(x - lse[:, None]), 0.0)
    ds = p * (tl.dot(grad, tl.trans(slot_v), input_precision=PRECISION) - delta[:, None])
    p, ds = p.to(grad.dtype), ds.to(q.dtype)
    dq = tl.dot(ds, slot_k, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * per_logit(scale)
    dv_sum = tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    tl.store(DSlotK + (bh * LENGTH + n)[:, None] * D + d[None, :], dk.to(DSlotK.dtype.element_ty), mask=slot[:, None] & cd)
    tl.store(DSlotV + (bh * LENGTH + n)[:, None] * DV + dv[None, :], dv_sum.to(DSlotV.dtype.element_ty), mask=slot[:, None] & cdv)

    outer, there = _outer_of_queries(chunk, LEVELS)
    outer_k = tl.load(OuterK + (bh * CHUNKS + outer)[:, None] * D + d[None, :], mask=there[:, None] & cd, other=0.0)
    outer_v = tl.load(OuterV + (bh * CHUNKS + outer)[:, None] * DV + dv[None, :], mask=there[:, None] & cdv, other=0.0)
    x = tl.dot(q, tl.trans(outer_k), input_precision=PRECISION) * scale
    p = tl.where(there[None, :], tl.exp2(x - lse[:, None]), 0.0)
    ds = p * (tl.dot(grad, tl.trans(outer_v), input_precision=PRECISION) - delta[:, None])
    p, ds = p.to(grad.dtype), ds.to(q.dtype)
    dq += tl.dot(ds, outer_k, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * per_logit(scale)
    dv_sum = tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    place = (bh * CHUNKS + chunk) * DEPTH + tl.arange(0, LEVELS)
    tl.store(PartK + place[:, None] * D + d[None, :], dk, mask=there[:, None] & cd)
    tl.store(PartV + place[:, None] * DV + dv[None, :], dv_sum, mask=there[:, None] & cdv)
    if OWN:
        k = tl.load(K + b * skb + h * skh + n[:, None] * skn + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        v = tl.load(V + b * svb + h * svh + n[:, None] * svn + dv[None, :], mask=wanted_v, other=0.0)
        o = tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * scale - lse)
        s = o * (tl.sum(grad.to(tl.float32) * v.to(tl.float32), 1) - delta)
        dq += s[:, None] * k
        tl.store(OwnP + bh * LENGTH + n, o, mask=real)
        tl.store(OwnS + bh * LENGTH + n, s * per_logit(scale), mask=real)
    at = DQ + b * sdb + h * sdh + n[:, None] * sdn + d[None, :]
    tl.store(at, (dq * per_logit(scale)).to(DQ.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=("CHUNKS", "DEPTH"))
def _collect_kernel(
    Part, Sum, CHUNKS, DEPTH, D, QUERIES: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Sums what chunks give to the outer slots: those whose QUERIES see a slot, or those that belong to its span."""
    slot, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low, level = _level(slot, LEVELS)
    d = tl.arange(0, BD)
    first = slot if QUERIES else slot - low
    stop = tl.minimum(slot + low, CHUNKS) if QUERIES else slot
    acc = tl.zeros([BD], tl.float32)
    for start in range(first, stop, BC):
        m = start + tl.arange(0, BC)
        place = (bh * CHUNKS + m) * DEPTH + level
        acc += tl.sum(tl.load(Part + place[:, None] * D + d[None, :], mask=(m < stop)[:, None] & (d < D)[None, :], other=0.0), 0)
    tl.store(Sum + (bh * CHUNKS + slot) * D + d, acc.to(Sum.dtype.element_ty), mask=(d < D) & (low > 0))


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS", "DEPTH"))
def _token_gradient_kernel(
    Q, K, V, DOut, SlotQ, SlotV, SlotLse, OuterQ, OuterV, OuterLse, DSlotV, DOuterV, OwnP, OwnS,
    DK, DV_, DSlotQ, PartQ,
    scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    HEADS, LENGTH, CHUNKS, DEPTH, D, DV,
    OWN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of a chunk through the values of spans, and directly; of the pooled queries of its slots."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    n, d, dv = chunk * C + tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BDV)
    real, cd, cdv = n < LENGTH, (d < D)[None, :], (dv < DV)[None, :]
    wanted, wanted_v = real[:, None] & cd, real[:, None] & cdv
    k = tl.load(K + b * skb + h * skh + n[:, None] * skn + d[None, :], mask=wanted, other=0.0)
    v = tl.load(V + b * svb + h * svh + n[:, None] * svn + dv[None, :], mask=wanted_v, other=0.0)
    slot = real & (n > chunk * C)
    at, at_v = (bh * LENGTH + n)[:, None] * D + d[None, :], (bh * LENGTH + n)[:, None] * DV + dv[None, :]
    q = tl.load(SlotQ + at, mask=slot[:, None] & cd, other=0.0)
    value = tl.load(SlotV + at_v, mask=slot[:, None] & cdv, other=0.0)
    grad = tl.load(DSlotV + at_v, mask=slot[:, None] & cdv, other=0.0)
    delta = tl.sum(value.to(tl.float32) * grad.to(tl.float32), 1)
    lse = read_lse(SlotLse, bh * LENGTH + n, slot)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.where(_within(C), tl.exp2(x - lse[:, None]), 0.0)
    ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    p, ds = p.to(grad.dtype), ds.to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    dv_sum = tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    dq = tl.dot(ds, k, input_precision=PRECISION) * per_logit(scale)
    tl.store(DSlotQ + at, dq.to(DSlotQ.dtype.element_ty), mask=slot[:, None] & cd)

    outer, there = _outer_of_members(chunk, CHUNKS, LEVELS)
    at, at_v = (bh * CHUNKS + outer)[:, None] * D + d[None, :], (bh * CHUNKS + outer)[:, None] * DV + dv[None, :]
    q = tl.load(OuterQ + at, mask=there[:, None] & cd, other=0.0)
    value = tl.load(OuterV + at_v, mask=there[:, None] & cdv, other=0.0)
    grad = tl.load(DOuterV + at_v, mask=there[:, None] & cdv, other=0.0)
    delta = tl.sum(value.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(OuterLse + bh * CHUNKS + outer, mask=there, other=float("inf"))
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.exp2(x - lse[:, None])
    ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    p, ds = p.to(grad.dtype), ds.to(q.dtype)
    dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    dv_sum += tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    dq = tl.dot(ds, k, input_precision=PRECISION) * per_logit(scale)
    place = (bh * CHUNKS + chunk) * DEPTH + tl.arange(0, LEVELS)
    tl.store(PartQ + place[:, None] * D + d[None, :], dq, mask=there[:, None] & cd)
    dk *= per_logit(scale)
    if OWN:
        q = tl.load(Q + b * sqb + h * sqh + n[:, None] * sqn + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        grad = tl.load(DOut + b * sgb + h * sgh + n[:, None] * sgn + dv[None, :], mask=wanted_v, other=0.0).to(tl.float32)
        dk += tl.load(OwnS + bh * LENGTH + n, mask=real, other=0.0)[:, None] * q
        dv_sum += tl.load(OwnP + bh * LENGTH + n, mask=real, other=0.0)[:, None] * grad
    tl.store(DK + b * sdkb + h * sdkh + n[:, None] * sdkn + d[None, :], dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(DV_ + b * sdvb + h * sdvh + n[:, None] * sdvn + dv[None, :], dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)


@triton.jit(do_not_specialize=("HEADS", "LENGTH", "CHUNKS"))
def _spread_kernel(
    Tokens, DSlots, DOuter, Arg, Grad, stb, sth, stn, sgb, sgh, sgn,
    HEADS, LENGTH, CHUNKS, D, ADD: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradients of pools go to the tokens that are the largest, the first of equal ones. ADD: to what is there."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    j, d = tl.arange(0, C), tl.arange(0, BD)
    n = chunk * C + j
    real, cd = n < LENGTH, (d < D)[None, :]
    wanted = real[:, None] & cd
    pool = tl.load(Tokens + b * stb + h * sth + n[:, None] * stn + d[None, :], mask=wanted, other=float("-inf")).to(tl.float32)
    arg = tl.broadcast_to(j[:, None], (C, BD))
    acc = tl.zeros([C, BD], tl.float32)
    at = Grad + b * sgb + h * sgh + n[:, None] * sgn + d[None, :]
    if ADD:
        acc += tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    for level in tl.static_range(0, 6):
        if (1 << level) < C:
            slot = (j >> level) + 1
            first = (slot % 2 == 1) & ((chunk * C + (slot << level)) < LENGTH)
            place = (bh * LENGTH + chunk * C + (slot << level))[:, None] * D + d[None, :]
            grad = tl.load(DSlots + place, mask=first[:, None] & cd, other=0.0).to(tl.float32)
            winner = tl.reshape(tl.broadcast_to(tl.reshape(arg, (C >> level, 1, BD)), (C >> level, 1 << level, BD)), (C, BD))
            acc += tl.where(winner == j[:, None], grad, 0.0)
            pairs, args = tl.reshape(pool, (C >> (level + 1), 2, BD)), tl.reshape(arg, (C >> (level + 1), 2, BD))
            pool = tl.max(pairs, 1)
            arg = tl.min(tl.where(pairs == tl.reshape(pool, (C >> (level + 1), 1, BD)), args, C), 1)
    outer, there = _outer_of_members(chunk, CHUNKS, LEVELS)
    place = (bh * CHUNKS + outer)[:, None] * D + d[None, :]
    mine = tl.load(Arg + place, mask=there[:, None] & cd, other=-1) == chunk
    grad = tl.sum(tl.where(mine, tl.load(DOuter + place, mask=there[:, None] & cd, other=0.0).to(tl.float32), 0.0), 0)
    acc += tl.where(tl.reshape(arg, (1, BD)) == j[:, None], grad[None, :], 0.0)
    tl.store(at, acc.to(Grad.dtype.element_ty), mask=wanted)


def _rows(like: Tensor, number: int, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, number, channels), not initialised."""
    return like.new_empty((*like.shape[:2], number, channels), dtype=dtype)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _sizes(q: Tensor) -> tuple[int, int, int]:
    """Tokens of a chunk, chunks, and levels of outer slots."""
    chunk = _CHUNKS[q.element_size()]
    chunks = ceil_div(q.shape[2], chunk)
    return chunk, chunks, max(1, (chunks - 1).bit_length())


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Sides of the tiles of the kernels that multiply, and their warps."""
    dim, dim_v = tile(q.shape[-1], 256), tile(v.shape[-1], 256)
    warps = 4 if max(dim, dim_v) <= 64 else 8
    return {
        "PRECISION": precision(q),
        "C": _CHUNKS[q.element_size()],
        "BD": dim,
        "BDV": dim_v,
        "LEVELS": _LEVELS,
        "num_warps": warps,
    }


# What the forward kernels leave for the backward: slots (queries, keys, values, log-normalisers), the same of outer slots, and
# which chunks have the largest values there.
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _keep(q: Tensor, v: Tensor) -> Kept:
    (batch, heads, length), dim, dim_v = q.shape[:3], q.shape[-1], v.shape[-1]
    _, chunks, _ = _sizes(q)
    slot_lse, outer_lse = (q.new_empty((batch, heads, n), dtype=torch.float32) for n in (length, chunks))
    arg_q, arg_k = (_rows(q, chunks, dim, torch.int32) for _ in range(2))
    slots = (_rows(q, length, dim), _rows(q, length, dim), _rows(v, length, dim_v), slot_lse)
    return *slots, _rows(q, chunks, dim), _rows(q, chunks, dim), _rows(v, chunks, dim_v), outer_lse, arg_q, arg_k


@operator("span_forward")
def _span_forward(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, own: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (last_contiguous(t) for t in (q, k, v))
    pool_q, pool_k = (t if pool is None else last_contiguous(pool) for t, pool in ((q, pool_q), (k, pool_k)))
    (batch, heads, length, dim), dim_v = q.shape, v.shape[-1]
    out, lse, kept = heads_last(q, dim_v), q.new_empty((batch, heads, length), dtype=torch.float32), _keep(q, v)
    if not out.numel():
        return out, lse, *kept
    slot_q, slot_k, slot_v, slot_lse, outer_q, outer_k, outer_v, outer_lse, arg_q, arg_k = kept
    (chunk, chunks, depth), tiles = _sizes(q), _tiles(q, v)
    chunk_q, chunk_k = _rows(q, chunks, dim), _rows(q, chunks, dim)
    part, part_lse = _rows(v, chunks * depth, dim_v, torch.float32), slot_lse.new_empty((batch, heads, chunks * depth))
    grid, bd, bdv = (chunks, batch * heads), tiles["BD"], tiles["BDV"]
    _pool_kernel[grid](
        pool_q, pool_k, slot_q, slot_k, chunk_q, chunk_k, *_strides(pool_q, pool_k), heads, length, chunks, dim, C=chunk, BD=bd
    )  # fmt: skip
    _outer_pool_kernel[grid](chunk_q, chunk_k, outer_q, outer_k, arg_q, arg_k, chunks, dim, BC=32, BD=bd, LEVELS=_LEVELS)
    _value_kernel[grid](
        k, v, slot_q, outer_q, slot_v, slot_lse, part, part_lse, scale * LOG2E, *_strides(k, v),
        heads, length, chunks, depth, dim, dim_v, **tiles,
    )  # fmt: skip
    _join_kernel[grid](part, part_lse, outer_v, outer_lse, chunks, depth, dim_v, BC=32, BDV=bdv, LEVELS=_LEVELS)
    _attend_kernel[grid](
        q, k, v, slot_k, slot_v, outer_k, outer_v, out, lse, scale * LOG2E, *_strides(q, k, v, out),
        heads, length, chunks, dim, dim_v, OWN=own, **tiles,
    )  # fmt: skip
    return out, lse, *kept


@_span_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, own: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return heads_last(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32), *_keep(q, v)


@operator("span_backward")
def _span_backward(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, out: Tensor, lse: Tensor, kept: list[Tensor],
    grad: Tensor, grad_lse: Tensor | None, own: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v; of what is pooled apart, empty where that is q and k."""
    slot_q, slot_k, slot_v, slot_lse, outer_q, outer_k, outer_v, outer_lse, arg_q, arg_k = kept
    q, k, v, grad = (last_contiguous(t) for t in (q, k, v, grad))
    dq, dk, dv, dpool_q, dpool_k = _gradients(q, k, v, pool_q, pool_k)
    if not q.numel() or not v.numel():
        return *(t.zero_() for t in (dq, dk, dv)), dpool_q.zero_(), dpool_k.zero_()  # type: ignore[return-value]
    (_, heads, length, dim), dim_v = q.shape, v.shape[-1]
    (chunk, chunks, depth), tiles = _sizes(q), _tiles(q, v)
    dslot_q, dslot_k, dslot_v = (torch.empty_like(t) for t in (slot_q, slot_k, slot_v))
    douter_q, douter_k, douter_v = (torch.empty_like(t) for t in (outer_q, outer_k, outer_v))
    part, part_v = (_rows(t, chunks * depth, t.shape[-1], torch.float32) for t in (q, v))
    own_p, own_s = torch.empty_like(lse), torch.empty_like(lse)
    grid, bd, bdv = (chunks, q.shape[0] * heads), tiles["BD"], tiles["BDV"]
    _query_gradient_kernel[grid](
        q, k, v, slot_k, slot_v, outer_k, outer_v, out, lse, grad, lse if grad_lse is None else (grad_lse * LOG2E).contiguous(),
        dq, dslot_k, dslot_v, part, part_v, own_p, own_s, scale * LOG2E, *_strides(q, k, v, out, grad, dq),
        heads, length, chunks, depth, dim, dim_v, HAS_DLSE=grad_lse is not None, OWN=own, **tiles,
    )  # fmt: skip
    _collect_kernel[grid](part, douter_k, chunks, depth, dim, QUERIES=True, BC=32, BD=bd, LEVELS=_LEVELS)
    _collect_kernel[grid](part_v, douter_v, chunks, depth, dim_v, QUERIES=True, BC=32, BD=bdv, LEVELS=_LEVELS)
    _token_gradient_kernel[grid](
        q, k, v, grad, slot_q, slot_v, slot_lse, outer_q, outer_v, outer_lse, dslot_v, douter_v, own_p, own_s,
        dk, dv, dslot_q, part, scale * LOG2E, *_strides(q, k, v, grad, dk, dv),
        heads, length, chunks, depth, dim, dim_v, OWN=own, **tiles,
    )  # fmt: skip
    _collect_kernel[grid](part, douter_q, chunks, depth, dim, QUERIES=False, BC=32, BD=bd, LEVELS=_LEVELS)
    for tokens, pooled, dslot, douter, arg, direct, apart in (
        (q, pool_q, dslot_q, douter_q, arg_q, dq, dpool_q),
        (k, pool_k, dslot_k, douter_k, arg_k, dk, dpool_k),
    ):
        tokens, into = (tokens, direct) if pooled is None else (last_contiguous(pooled), apart)
        _spread_kernel[grid](
            tokens, dslot, douter, arg, into, *_strides(tokens, into), heads, length, chunks, dim,
            ADD=pooled is None, C=chunk, BD=bd, LEVELS=_LEVELS,
        )  # fmt: skip
    return dq, dk, dv, dpool_q, dpool_k


def _gradients(q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None) -> tuple[Tensor, ...]:
    pools = (q.new_empty(0) if pool is None else heads_last(pool) for pool in (pool_q, pool_k))
    return *(heads_last(t) for t in (q, k, v)), *pools


@_span_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, out: Tensor, lse: Tensor, kept: list[Tensor],
    grad: Tensor, grad_lse: Tensor | None, own: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(q, k, v, pool_q, pool_k)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
    q, k, v, pool_q, pool_k, out, lse, *kept = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    *direct, dpool_q, dpool_k = _span_backward(q, k, v, pool_q, pool_k, out, lse, kept, grad, grad_lse, *ctx.settings)
    apart = (None if pool is None else g for pool, g in ((pool_q, dpool_q), (pool_k, dpool_k)))
    return *direct, *apart, None, None


_span_forward.register_autograd(_backward, setup_context=_setup)


def span_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, *, own: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, D_v) and the natural log-normaliser, of tensors as `span_attention` has checked them.

    `own`: whether queries see themselves.
    """
    out, lse, *_ = _span_forward(q, k, v, pool_q, pool_k, own, scale)
    return out, lse * LN2
