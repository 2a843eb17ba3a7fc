"""Attention of the chosen (token, head) pairs as Triton kernels: queries that a head's router did not choose cost nothing.

The chosen queries are lined up, key/value head after key/value head, in the order of their tokens: B * N * K rows, whatever was
chosen, so that nothing waits for a count. A sequence of rows and the keys of its head are then an ordinary problem of flash
attention. Last, each row goes back to its place, times its gate, and all other places get 0. Heads that every token uses need
none of it: cuDNN computes them, where it serves them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attention_zoo.ops import _cudnn
from attention_zoo.ops._operators import operator
from attention_zoo.ops._split import lie_in_one
from attention_zoo.ops.triton._common import LOG2E, ceil_div, last_contiguous, per_logit, precision, read_lse, tile
from attention_zoo.ops.triton._streams import two_streams

__all__ = ["gate_heads_triton", "mixture_attention_triton"]


@triton.jit
def _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS):
    """Of the pairs `at` = n GROUP + query head of a sequence: n, the head, 1 if the token has chosen it, else 0."""
    n, h = at // GROUP, hk * GROUP + at % GROUP
    inside = at < N * GROUP
    chosen = tl.load(Chosen + b * scb + n.to(tl.int64) * scn + (h - ALWAYS) * sch, mask=inside & (h >= ALWAYS), other=1) != 0
    return n, h, (chosen & inside).to(tl.int32)


@triton.jit
def _count_kernel(Chosen, Counts, scb, scn, sch, N, HEADS, GROUP, ALWAYS, BLOCK: tl.constexpr):
    """How many rows each sequence has: (b, key/value head) -> Counts."""
    s = tl.program_id(0)
    b, hk = (s // HEADS).to(tl.int64), s % HEADS
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N * GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, _, chosen = _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS)
        total += chosen
    tl.store(Counts + s, tl.sum(total, 0))


@triton.jit
def _list_tiles(Tiles, counts, each, s, begin, count, last, MOST, BM: tl.constexpr, REVERSED: tl.constexpr):
    """Tiles of BM rows, sequence after sequence: number of the sequence * 2 ** 32 + first row; -1 for those that are not needed."""
    before = tl.sum(tl.where(each < s, (counts + BM - 1) // BM, 0), 0)
    tiles = (count + BM - 1) // BM
    for start in range(0, tiles, 64):
        i = start + tl.arange(0, 64)
        place = i
        if REVERSED:
            place = tiles - 1 - i  # the longest first
        entry = (s.to(tl.int64) << 32) + (begin + place * BM)
        tl.store(Tiles + before + i, entry, mask=(i < tiles) & (before + i < MOST))
    if last:
        for start in range(before + tiles, MOST, 64):
            i = start + tl.arange(0, 64)
            tl.store(Tiles + i, tl.full([64], -1, tl.int64), mask=i < MOST)


@triton.jit
def _list_kernel(
    Chosen, Counts, Starts, Slots, Origins, Tiles,
    scb, scn, sch, N, HEADS, GROUP, ALWAYS, SEQUENCES, ROWS, MOST, MOST_Q,
    BLOCK: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BMQ: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the rows of a sequence come from and go to.

    Starts: its first row. Origins: of a row, (b N + n) h + head. Slots, of each (b, key/value head, n, query head): its row, or,
    for pairs that are not chosen, -1 - the next row of the sequence. Tiles: see `_list_tiles`, of two sizes, one after the other.
    """
    s = tl.program_id(0)
    b, hk = (s // HEADS).to(tl.int64), s % HEADS
    each = tl.arange(0, BS)
    counts = tl.load(Counts + each, mask=each < SEQUENCES, other=0)
    begin = tl.minimum(tl.sum(tl.where(each < s, counts, 0), 0), ROWS)
    count = tl.minimum(tl.sum(tl.where(each == s, counts, 0), 0), ROWS - begin)
    tl.store(Starts + s, begin)
    last = s == SEQUENCES - 1
    _list_tiles(Tiles, counts, each, s, begin, count, last, MOST, BM, CAUSAL)
    _list_tiles(Tiles + MOST, counts, each, s, begin, count, last, MOST_Q, BMQ, CAUSAL)
    before = begin
    for start in range(0, N * GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n, h, chosen = _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS)
        row = before + tl.cumsum(chosen, 0) - chosen
        is_row = (chosen != 0) & (row < ROWS)  # more than K to a token: the caller's fault, but nobody else's memory
        tl.store(Slots + s.to(tl.int64) * N * GROUP + at, tl.where(is_row, row, -1 - tl.minimum(row, ROWS)), mask=at < N * GROUP)
        tl.store(Origins + row, (b * N + n) * (HEADS * GROUP) + h, mask=is_row)
        before += tl.sum(chosen, 0)
    if last:
        end = begin + count
        tl.store(Starts + SEQUENCES, end)
        for start in range(end, ROWS, BLOCK):  # fewer than K to a token: rows that are not there read something of ours
            row = start + tl.arange(0, BLOCK)
            tl.store(Origins + row, tl.zeros([BLOCK], tl.int32), mask=row < ROWS)


@triton.jit
def _slots(Slots, b, h, n, real, N, APART, HEADS, GROUP):
    """Rows of the tokens n in head h, and whether they were chosen."""
    r = tl.maximum(h - APART, 0)
    at = ((b * HEADS + r // GROUP) * N + n) * GROUP + r % GROUP
    slot = tl.load(Slots + at, mask=real & (h >= APART), other=-1)
    return tl.maximum(slot, 0).to(tl.int64), slot >= 0


@triton.jit
def _gather(Shared, Packed, Slots, b, h, n, d, wanted, ssb, ssh, ssn, N, APART, HEADS, GROUP, D, PITCH):
    """What was computed for the tokens n that are wanted in head h, shared or packed; 0 where it was not chosen."""
    row, chosen = _slots(Slots, b, h, n, wanted, N, APART, HEADS, GROUP)
    inside = (d < D)[None, :]
    x = tl.load(Packed + row[:, None] * PITCH + d[None, :], mask=chosen[:, None] & inside, other=0.0)
    if h < APART:
        at = Shared + b * ssb + h * ssh + n.to(tl.int64)[:, None] * ssn + d[None, :]
        x = tl.load(at, mask=wanted[:, None] & inside, other=0.0)
    return x


@triton.jit
def _mix_kernel(
    Out, Shared, Packed, Gates, Slots,
    ssb, ssh, ssn, sgb, sgh, sgn, N, H, APART, HEADS, GROUP, DV, PITCH, TILES, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Out (B, N, H, D_v): gate times what was computed for a pair, 0 for the others. Where the gate is 0 nothing is read."""
    pid = tl.program_id(0)
    h, t = pid % H, pid // H  # heads of a token are neighbours in memory
    b, n, d = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BD)
    real = n < N
    gate = tl.load(Gates + b * sgb + h * sgh + n * sgn, mask=real, other=0.0).to(tl.float32)
    x = _gather(Shared, Packed, Slots, b, h, n, d, real & (gate != 0.0), ssb, ssh, ssn, N, APART, HEADS, GROUP, DV, PITCH)
    at = Out + ((b * N + n) * H + h)[:, None] * DV + d[None, :]
    tl.store(at, (x.to(tl.float32) * gate[:, None]).to(Out.dtype.element_ty), mask=real[:, None] & (d < DV)[None, :])


@triton.jit
def _unmix_kernel(
    Grad, Q, Shared, Packed, Gates, Slots, DShared, DPacked, PackedQ, DGates, Delta,
    srb, srh, srn, sqb, sqh, sqn, ssb, ssh, ssn, sdb, sdh, sdn, sgb, sgh, sgn,
    N, H, APART, HEADS, GROUP, D, DV, PITCH_Q, PITCH, TILES,
    SLOPES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Gradients of what `_mix_kernel` was given: DShared, DPacked and, with SLOPES, DGates (B, N, H).

    For the flash kernels: Delta, DPacked . Packed, and the packed rows of the queries.
    """
    pid = tl.program_id(0)
    h, t = pid % H, pid // H
    b, n, dv = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BDV)
    real, token = n < N, n.to(tl.int64)[:, None]
    inside = (dv < DV)[None, :]
    row, chosen = _slots(Slots, b, h, n, real, N, APART, HEADS, GROUP)
    gate = tl.load(Gates + b * sgb + h * sgh + n * sgn, mask=real, other=0.0).to(tl.float32)
    active = real & (chosen | (h < APART))
    wanted = active
    if not SLOPES:
        wanted = active & (gate != 0.0)  # nothing else becomes of the others
    grad = tl.load(Grad + b * srb + h * srh + token * srn + dv[None, :], mask=wanted[:, None] & inside, other=0.0).to(tl.float32)
    to = DGates + (b * N + n) * H + h
    if h < APART:
        if SLOPES:
            x = tl.load(Shared + b * ssb + h * ssh + token * ssn + dv[None, :], mask=active[:, None] & inside, other=0.0)
            tl.store(to, tl.sum(grad * x.to(tl.float32), 1), mask=real)
        at = DShared + b * sdb + h * sdh + token * sdn + dv[None, :]
        tl.store(at, (grad * gate[:, None]).to(DShared.dtype.element_ty), mask=active[:, None] & inside)
    else:
        d = tl.arange(0, BD)
        here = active[:, None] & (d < D)[None, :]
        q = tl.load(Q + b * sqb + h * sqh + token * sqn + d[None, :], mask=here, other=0.0)
        tl.store(PackedQ + row[:, None] * PITCH_Q + d[None, :], q, mask=here)
        here = active[:, None] & inside
        x = tl.load(Packed + row[:, None] * PITCH + dv[None, :], mask=here, other=0.0)
        slope = tl.sum(grad * x.to(tl.float32), 1)
        if SLOPES:
            tl.store(to, slope, mask=real)
        tl.store(DPacked + row[:, None] * PITCH + dv[None, :], (grad * gate[:, None]).to(DPacked.dtype.element_ty), mask=here)
        tl.store(Delta + row, slope * gate, mask=active)


@triton.jit
def _copy(From, To, at, to, d, D, mask):
    mask = mask & (d < D)[None, :]
    tl.store(To + to + d[None, :], tl.load(From + at + d[None, :], mask=mask), mask=mask)


@triton.jit
def _spread_kernel(
    DQ, DK, DV_, SharedQ, SharedK, SharedV, Packed, Slots,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, fqb, fqh, fqn, fkb, fkh, fkn, fvb, fvh, fvn,
    N, M, H, SOME, APART, HEADS, GROUP, D, DV, PITCH, TILES, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """DQ: what was computed for a pair, shared or packed, 0 for the others. DK, DV_: the first SOME heads, from the shared ones."""
    pid = tl.program_id(0)
    columns = H + 2 * SOME
    h, t = pid % columns, pid // columns
    b, n, d = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BD)
    token = n.to(tl.int64)[:, None]
    if h < H:
        x = _gather(SharedQ, Packed, Slots, b, h, n, d, n < N, fqb, fqh, fqn, N, APART, HEADS, GROUP, D, PITCH)
        tl.store(DQ + b * sqb + h * sqh + token * sqn + d[None, :], x, mask=(n < N)[:, None] & (d < D)[None, :])
    else:
        mask = (n < M)[:, None]
        if h < H + SOME:
            _copy(SharedK + b * fkb + (h - H) * fkh, DK + b * skb + (h - H) * skh, token * fkn, token * skn, d, D, mask)
        else:
            head = h - H - SOME
            _copy(SharedV + b * fvb + head * fvh, DV_ + b * svb + head * svh, token * fvn, token * svn, d, DV, mask)


@triton.jit
def _places(Origins, row, real, N, HEADS):
    """Tokens of packed rows."""
    return tl.load(Origins + row, mask=real, other=0) // HEADS % N


@triton.jit
def _bounds(Origins, row, row0, end, real, offset, N, M, HEADS, BM: tl.constexpr):
    """Before which key each row of a causal tile must stop; before which all may see, and before which some."""
    bound = tl.minimum(_places(Origins, row, real, N, HEADS) + offset + 1, M)
    first = tl.load(Origins + row0) // HEADS % N
    last = tl.load(Origins + tl.minimum(row0 + BM, end) - 1) // HEADS % N
    return bound, tl.maximum(tl.minimum(first + offset + 1, M), 0), tl.minimum(last + offset + 1, M)


@triton.jit
def _absorb_tiles(
    q, K, V, b, hk, p, fade, acc, highest, total, bound, scale, first, last,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Keys from `first` to before `last` enter the running softmax; if MASKED, a query sees those before its `bound`.

    The weights p of a tile, and by how much what was summed up before them fades, wait for the next one: their product with the
    values runs while the next softmax is computed.
    """
    for start in tl.range(first, last, BN, num_stages=STAGES):
        x = tl.dot(q, K.load([b, hk, start, 0]).reshape(BN, BD).T, input_precision=PRECISION)
        v = V.load([b, hk, start - BN, 0]).reshape(BN, BDV)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        if MASKED:
            x = tl.where((start + tl.arange(0, BN))[None, :] < bound[:, None], x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 1) * scale)
        anchor = higher
        if MASKED:
            anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(x * scale - anchor[:, None])
        fade = tl.exp2(highest - anchor)
        total = total * fade + tl.sum(p, 1)
        highest = higher
    return p, fade, acc, highest, total


@triton.jit
def _forward_kernel(
    Q, K, V, Out, Lse, Starts, Origins, Tiles, sqb, sqh, sqn,
    scale,  # of the logits, times log2 e; positive
    offset,  # causal: the query of token n sees the keys up to n + offset
    N, M, HEADS, GROUP, D, DV, PITCH,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    entry = tl.load(Tiles + tl.program_id(0))
    if entry >= 0:
        s, row0 = (entry >> 32).to(tl.int32), (entry & 0xFFFFFFFF).to(tl.int32)
        b, hk, end = s // HEADS, s % HEADS, tl.load(Starts + s + 1)
        row, dv = row0 + tl.arange(0, BM), tl.arange(0, BDV)
        real = row < end
        d = tl.arange(0, BD)
        origin = tl.load(Origins + row, mask=real, other=0)
        n, h = origin // (HEADS * GROUP) % N, origin % (HEADS * GROUP)
        at = Q + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh + n.to(tl.int64) * sqn
        q = tl.load(at[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        highest = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BDV], tl.float32)
        p, fade = tl.zeros([BM, BN], tl.float32), tl.full([BM], 1.0, tl.float32)
        bound = tl.full([BM], M, tl.int32)
        free, last = M, M
        if CAUSAL:
            bound, free, last = _bounds(Origins, row, row0, end, real, offset, N, M, HEADS * GROUP, BM)
        free = free // BN * BN
        p, fade, acc, highest, total = _absorb_tiles(
            q, K, V, b, hk, p, fade, acc, highest, total, bound, scale, 0, free, False, PRECISION, STAGES, BN, BD, BDV
        )
        p, fade, acc, highest, total = _absorb_tiles(
            q, K, V, b, hk, p, fade, acc, highest, total, bound, scale, free, last, True, PRECISION, STAGES, BN, BD, BDV
        )
        v = V.load([b, hk, (tl.maximum(last, 1) - 1) // BN * BN, 0]).reshape(BN, BDV)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        whole = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), highest + tl.log2(whole))
        at = Out + row.to(tl.int64)[:, None] * PITCH + dv[None, :]
        tl.store(at, (acc / whole[:, None]).to(Out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
        tl.store(Lse + row, lse, mask=real)


@triton.jit
def _query_tiles(
    q, grad, lse, delta, K, V, b, hk, acc, bound, scale, first, last,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, last, BN, num_stages=STAGES):
        k = K.load([b, hk, start, 0]).reshape(BN, BD)
        v = V.load([b, hk, start, 0]).reshape(BN, BDV)
        p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            seen = start + tl.arange(0, BN)
            p = tl.where(seen[None, :] < bound[:, None], p, 0.0)
        slope = p * (tl.dot(grad, v.T, input_precision=PRECISION) - delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _query_gradient_kernel(
    Q, K, V, Grad, Lse, Delta, DQ, Starts, Origins, Tiles,
    scale, offset, N, M, HEADS, GROUP, D, PITCH,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    entry = tl.load(Tiles + tl.program_id(0))
    if entry >= 0:
        s, row0 = (entry >> 32).to(tl.int32), (entry & 0xFFFFFFFF).to(tl.int32)
        b, hk, end = s // HEADS, s % HEADS, tl.load(Starts + s + 1)
        row, d = row0 + tl.arange(0, BM), tl.arange(0, BD)
        real = row < end
        q, grad = Q.load([row0, 0]), Grad.load([row0, 0])
        lse, delta = read_lse(Lse, row, real), tl.load(Delta + row, mask=real, other=0.0)
        bound = tl.full([BM], M, tl.int32)
        free, last = M, M
        if CAUSAL:
            bound, free, last = _bounds(Origins, row, row0, end, real, offset, N, M, HEADS * GROUP, BM)
        free = free // BN * BN
        acc = tl.zeros([BM, BD], tl.float32)
        acc = _query_tiles(q, grad, lse, delta, K, V, b, hk, acc, bound, scale, 0, free, False, PRECISION, STAGES, BN, BD, BDV)
        acc = _query_tiles(q, grad, lse, delta, K, V, b, hk, acc, bound, scale, free, last, True, PRECISION, STAGES, BN, BD, BDV)
        at = DQ + row.to(tl.int64)[:, None] * PITCH + d[None, :]
        tl.store(at, (acc * per_logit(scale)).to(DQ.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _key_tiles(
    k, v, Q, Grad, Lse, Delta, Origins, dk, dv, keys, offset, scale, first, last, end, N, HEADS,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows from `first` to before `last`, in whole tiles, add to the gradients of the keys and values; `end` ends the sequence.

    EARLY: the product of gradient and values before the softmax, so that what follows it runs beside the next product; more
    registers.
    """
    for start in tl.range(first, last, BM, num_stages=STAGES):
        row = start + tl.arange(0, BM)
        real = row < end
        q, grad = Q.load([start, 0]), Grad.load([start, 0])
        lse = read_lse(Lse, row, real)
        delta = tl.load(Delta + row, mask=real, other=0.0)
        if EARLY:
            slope = tl.dot(v, grad.T, input_precision=PRECISION) - delta[None, :]  # (keys, queries)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale - lse[None, :])
        if MASKED:
            bound = _places(Origins, row, real, N, HEADS) + offset
            p = tl.where(keys[:, None] <= bound[None, :], p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if EARLY:
            slope *= p
        else:
            slope = p * (tl.dot(v, grad.T, input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _key_gradient_kernel(
    Q, K, V, Grad, Lse, Delta, DK, DV_, Starts, Slots, Origins,
    scale, offset, sdb, sdh, sdn, svb, svh, svn, N, M, HEADS, GROUP, D, DV, TILES,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    s, t = pid // TILES, pid % TILES
    b, hk = s // HEADS, s % HEADS
    key0 = t * BN
    keys, d, d_v = key0 + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    begin, end = tl.load(Starts + s), tl.load(Starts + s + 1)
    k = K.load([b, hk, key0, 0]).reshape(BN, BD)
    v = V.load([b, hk, key0, 0]).reshape(BN, BDV)
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    first, free = begin, begin
    if CAUSAL:  # the first row that sees any of the keys, and the first that sees them all
        Slots += s.to(tl.int64) * N * GROUP
        token = tl.maximum(key0 - offset, 0)
        slot = tl.load(Slots + token * GROUP, mask=token < N, other=end)
        first = tl.where(slot < 0, -1 - slot, slot)
        token = tl.maximum(key0 + BN - 1 - offset, 0)
        slot = tl.load(Slots + token * GROUP, mask=token < N, other=end)
        free = first + tl.cdiv(tl.where(slot < 0, -1 - slot, slot) - first, BM) * BM
        dk, dv = _key_tiles(
            k, v, Q, Grad, Lse, Delta, Origins, dk, dv, keys, offset, scale, first, free, end, N, HEADS * GROUP,
            True, PRECISION, STAGES, BM, EARLY,
        )  # fmt: skip
    dk, dv = _key_tiles(
        k, v, Q, Grad, Lse, Delta, Origins, dk, dv, keys, offset, scale, free, end, end, N, HEADS * GROUP,
        False, PRECISION, STAGES, BM, EARLY,
    )  # fmt: skip
    real, wide, key = (keys < M)[:, None], b.to(tl.int64), keys.to(tl.int64)[:, None]
    dk *= per_logit(scale)
    tl.store(DK + wide * sdb + hk * sdh + key * sdn + d[None, :], dk.to(DK.dtype.element_ty), mask=real & (d < D)[None, :])
    tl.store(DV_ + wide * svb + hk * svh + key * svn + d_v[None, :], dv.to(DV_.dtype.element_ty), mask=real & (d_v < DV)[None, :])


class Settings(NamedTuple):
    """Tile sizes (queries, keys), warps, stages of the pipeline; of keys' gradients, see `_key_tiles`."""

    bm: int
    bn: int
    warps: int
    stages: int
    early: bool = True


def settings(kernel: str, dim: int, dtype: torch.dtype) -> Settings:
    """For "forward", "query" or "key" gradients of heads of `dim` channels; half precision up to 128 was measured, on an H200."""
    if dtype == torch.float32:
        return Settings(32, 32, 4, 1, early=False)
    if dim > 128:
        return Settings(64, 64, 8, 1) if kernel != "forward" else Settings(128, 64, 8, 2)
    if kernel == "forward":
        return Settings(64, 64, 4, 3)
    if kernel == "query":
        return Settings(128, 64, 8, 3)
    return Settings(64, 64, 4, 2) if dim > 64 else Settings(128, 64, 4, 2, early=False)


class _Plan(NamedTuple):
    """Which row is which pair, see `_list_kernel`."""

    slots: Tensor
    origins: Tensor
    starts: Tensor
    tiles: Tensor


def _most_tiles(rows: int, sequences: int, *sizes: int) -> tuple[int, ...]:
    """How many tiles of each size there can be, whatever was chosen."""
    return tuple(rows // size + sequences for size in sizes)


def _empty_plan(x: Tensor, kv_heads: int, group: int, rows: int, sizes: tuple[int, ...]) -> _Plan:
    """Tables for queries like x (B, H, N, D); `sizes`: rows to a tile of the forward kernel and of that of queries' gradients."""
    batch, _, tokens, _ = x.shape
    slots = x.new_empty((batch, kv_heads, tokens, group), dtype=torch.int32)
    origins, starts = (x.new_empty((size,), dtype=torch.int32) for size in (rows, batch * kv_heads + 1))
    return _Plan(slots, origins, starts, x.new_empty((sum(_most_tiles(rows, batch * kv_heads, *sizes)),), dtype=torch.int64))


def _fill_plan(plan: _Plan, counts: Tensor, chosen: Tensor, always: int, sizes: tuple[int, ...], is_causal: bool) -> None:
    """The tables; `counts` has room for a number for each sequence."""
    batch, kv_heads, tokens, group = plan.slots.shape
    sequences, rows = batch * kv_heads, plan.origins.shape[0]
    shared = (*chosen.stride(), tokens, kv_heads, group, always)
    block = tile(tokens * group, 4096)
    if sequences:
        _count_kernel[(sequences,)](chosen, counts, *shared, BLOCK=block, num_warps=8)
        _list_kernel[(sequences,)](
            chosen, counts, plan.starts, plan.slots, plan.origins, plan.tiles, *shared, sequences, rows,
            *_most_tiles(rows, sequences, *sizes),
            BLOCK=block, BS=tile(sequences, 1 << 30), BM=sizes[0], BMQ=sizes[1], CAUSAL=is_causal, num_warps=8,
        )  # fmt: skip


def _tile_sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """Rows to a tile of the forward kernel and of that of queries' gradients."""
    return tuple(settings(kernel, max(q.shape[-1], v.shape[-1]), q.dtype).bm for kernel in ("forward", "query"))


def _pitch(x: Tensor) -> int:
    """Channels of a packed row in memory: the copy engine takes multiples of 16 bytes."""
    unit = 16 // x.element_size()
    return -(-x.shape[-1] // unit) * unit


def _rows_of(x: Tensor, dim: int, length: int) -> TensorDescriptor:
    """Packed rows (rows, pitch), read as tiles of `length` rows."""
    return TensorDescriptor(x, [x.shape[0], dim], [x.shape[1], 1], [length, tile(dim, 256)])


def _aligned(x: Tensor) -> Tensor:
    """x (B, H, M, D) as the copy engine can read it: rows without gaps between channels, steps of 16 bytes."""
    one, two, three, four = x.stride()
    unit = 16 // x.element_size()
    if four == 1 and one and two and three and not (one % unit or two % unit or three % unit or x.data_ptr() % 16):
        return x
    own = x.new_empty((*x.shape[:3], _pitch(x)))[..., : x.shape[3]]
    return own.copy_(x)


def _keys_of(x: Tensor, length: int) -> TensorDescriptor:
    """(B, H, M, D), aligned, read as tiles of `length` keys of one head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, length, tile(x.shape[3], 256)])


@operator("mixture_forward")
def _mixture_forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, topk: int, apart: int, scale: float, is_causal: bool,
    together: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Out (B, H, N, D_v); for the gradient: packed outputs and normalisers, the plan, the same of the shared heads that are apart.

    apart: how many of the heads that every token uses are computed by cuDNN's dense kernel, whole groups of them.
    together: for the gradient, see `_mixture_backward`.
    """
    q = last_contiguous(q)
    batch, heads, tokens, _ = q.shape
    kv_heads, keys, dim_v = v.shape[1:]
    group, every = heads // kv_heads, heads - chosen.shape[-1]
    own_q, own_k, own_v = q[:, apart:], _aligned(k[:, apart // group :]), _aligned(v[:, apart // group :])
    rows, packed_heads = batch * tokens * (every - apart + topk), own_k.shape[1]
    sizes = _tile_sizes(q, v)
    chosen = chosen.to(torch.uint8) if chosen.dtype == torch.bool else chosen
    plan, counts = _empty_plan(q, packed_heads, group, rows, sizes), q.new_empty((batch * packed_heads,), dtype=torch.int32)
    packed, lse = v.new_empty((rows, _pitch(v))), q.new_empty((rows,), dtype=torch.float32)
    out = _heads_last(q, dim_v)
    if rows == 0 or keys == 0:
        packed.zero_()
        lse.fill_(float("-inf"))
    with two_streams(q, apart > 0) as beside:
        shared, shared_lse = _dense_forward(q, k, v, apart, scale, is_causal)
        with beside:
            _fill_plan(plan, counts, chosen, every - apart, sizes, is_causal)
            if rows and keys:
                _flash_forward(own_q, own_k, own_v, packed, lse, plan, scale, is_causal)
    _mix(out, shared, packed, gates, plan.slots)
    return out, packed, lse, *plan, shared, shared_lse


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Tensor, lse: Tensor, plan: _Plan, scale: float, is_causal: bool
) -> None:  # fmt: skip
    """Fill packed and lse."""
    batch, kv_heads, keys, dim = k.shape
    heads, tokens, dim_v = q.shape[1], q.shape[2], v.shape[-1]
    own = settings("forward", max(dim, dim_v), q.dtype)
    _forward_kernel[_most_tiles(packed.shape[0], batch * kv_heads, own.bm)](
        q, _keys_of(k, own.bn), _keys_of(v, own.bn), packed, lse, plan.starts, plan.origins, plan.tiles,
        *q.stride()[:3], scale * LOG2E, keys - tokens, tokens, keys, kv_heads, heads // kv_heads, dim, dim_v, packed.shape[1],
        CAUSAL=is_causal, PRECISION=precision(q), STAGES=own.stages, BM=own.bm, BN=own.bn, BD=tile(dim, 256), BDV=tile(dim_v, 256),
        num_warps=own.warps, num_stages=own.stages,
    )  # fmt: skip


def _mix(out: Tensor, shared: Tensor, packed: Tensor, gates: Tensor, slots: Tensor) -> None:
    """Fill out (B, H, N, D_v), heads next to channels."""
    batch, heads, tokens, dim_v = out.shape
    if out.numel():
        bt, parts = _tokens_to_a_tile(tokens, dim_v)
        _mix_kernel[(batch * parts * heads,)](
            out, shared, packed, gates, slots, *shared.stride()[:3], *gates.stride(),
            tokens, heads, shared.shape[1], slots.shape[1], slots.shape[3], dim_v, packed.shape[1], parts,
            BT=bt, BD=tile(dim_v, 256), num_warps=4,
        )  # fmt: skip


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, apart: int, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs and normalisers of the heads that are apart; their strides are torch's choice, also of tensors without data."""
    if apart == 0:
        return v.new_empty((q.shape[0], 0, q.shape[2], v.shape[3])), q.new_empty((0,), dtype=torch.float32)
    some = apart // (q.shape[1] // k.shape[1])
    return _cudnn.dense_forward(q[:, :apart], k[:, :some], v[:, :some], scale=scale, is_causal=is_causal)


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    apart, some = out.shape[1], out.shape[1] // (q.shape[1] // k.shape[1])
    return _cudnn.dense_backward(grad, q[:, :apart], k[:, :some], v[:, :some], out, lse, scale=scale, is_causal=is_causal)


def _heads_last(x: Tensor, channels: int | None = None) -> Tensor:
    """Of the shape of x (B, H, N, D), or with so many channels, and heads next to channels in memory."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim if channels is None else channels)).permute(0, 2, 1, 3)


def _tokens_to_a_tile(tokens: int, dim: int) -> tuple[int, int]:
    """For what only moves rows: how many tokens a program has, and how many programs a head."""
    size = 2048 // tile(dim, 256)
    return size, ceil_div(tokens, size)


@_mixture_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, topk: int, apart: int, scale: float, is_causal: bool, *_: Any
) -> tuple[Tensor, ...]:
    batch, heads, tokens = q.shape[:3]
    group = heads // k.shape[1]
    rows = batch * tokens * (heads - chosen.shape[-1] - apart + topk)
    plan = _empty_plan(q, k.shape[1] - apart // group, group, rows, _tile_sizes(q, v))
    packed, lse = v.new_empty((rows, _pitch(v))), q.new_empty((rows,), dtype=torch.float32)
    return _heads_last(q, v.shape[-1]), packed, lse, *plan, *_dense_forward(q, k, v, apart, scale, is_causal)


@operator("mixture_backward")
def _mixture_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, packed: Tensor, lse: Tensor,
    slots: Tensor, origins: Tensor, starts: Tensor, tiles: Tensor, shared: Tensor, shared_lse: Tensor,
    scale: float, is_causal: bool, together: bool, wants_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and gates; if nobody `wants_gates`, of them an empty tensor.

    together: q, k and v lie in one tensor, and so do their gradients, which is the first that is returned: (B, N, H + 2 H_kv, D).
    """
    grad, q = last_contiguous(grad), last_contiguous(q)
    batch, heads, tokens, dim = q.shape
    kv_heads, keys, dim_v = v.shape[1:]
    rows, group, apart = packed.shape[0], heads // kv_heads, shared.shape[1]
    some = apart // group
    found = _empty_gradients(q, k, v, together)
    dq, dk, dv = _cut(found[0], heads, kv_heads) if together else found
    dgates = _empty_slopes(gates, wants_gates)
    dshared, dpacked, delta = torch.empty_like(shared), torch.empty_like(packed), torch.empty_like(lse)
    packed_q, dpacked_q = (q.new_empty((rows, _pitch(q))) for _ in range(2))
    own_k, own_v = _aligned(k[:, some:]), _aligned(v[:, some:])
    _unmix(grad, q, shared, packed, gates, slots, dshared, dpacked, packed_q, dgates, delta)
    dshared_q, dshared_k, dshared_v = q[:, :0], k[:, :0], v[:, :0]
    with two_streams(q, apart > 0) as beside:
        if apart:
            dshared_q, dshared_k, dshared_v = _dense_backward(dshared, q, k, v, shared, shared_lse, scale, is_causal)
        with beside:
            if rows and keys:
                own, plan = (packed_q, own_k, own_v, dpacked_q, dk[:, some:], dv[:, some:]), _Plan(slots, origins, starts, tiles)
                _flash_backward(*own, dpacked, lse, delta, plan, (tokens, group), scale, is_causal)
    if not (rows and keys):
        for t in (dpacked_q, dk[:, some:], dv[:, some:]):
            t.zero_()
    if dq.numel():
        wide, tall = max(dim, dim_v), max(tokens, keys if apart else 0)
        bt, parts = _tokens_to_a_tile(tall, wide)
        strides = (step for t in (dq, dk, dv, dshared_q, dshared_k, dshared_v) for step in t.stride()[:3])
        _spread_kernel[(batch * parts * (heads + 2 * some),)](
            dq, dk, dv, dshared_q, dshared_k, dshared_v, dpacked_q, slots, *strides,
            tokens, keys, heads, some, apart, kv_heads - some, group, dim, dim_v, dpacked_q.shape[1], parts,
            BT=bt, BD=tile(wide, 256), num_warps=4,
        )  # fmt: skip
    return *found, dgates.permute(0, 2, 1) if wants_gates else dgates


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, together: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not together:
        return _heads_last(q), _heads_last(k), _heads_last(v)
    batch, heads, tokens, dim = q.shape
    return q.new_empty((batch, tokens, heads + 2 * k.shape[1], dim)), q.new_empty((0,)), q.new_empty((0,))


def _cut(whole: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """The gradients of q, k and v in one tensor."""
    return tuple(t.transpose(1, 2) for t in whole.split([heads, kv_heads, kv_heads], 2))


def _empty_slopes(gates: Tensor, wanted: bool) -> Tensor:
    """For the gradient of gates (B, H, N): (B, N, H)."""
    batch, heads, tokens = gates.shape
    return gates.new_empty((batch, tokens, heads) if wanted else (0,), dtype=torch.float32)


def _unmix(
    grad: Tensor, q: Tensor, shared: Tensor, packed: Tensor, gates: Tensor, slots: Tensor,
    dshared: Tensor, dpacked: Tensor, packed_q: Tensor, dgates: Tensor, delta: Tensor,
) -> None:  # fmt: skip
    """Fill the last five; dgates is empty where nobody wants it."""
    batch, heads, tokens, dim_v = grad.shape
    if grad.numel():
        dim = q.shape[3]
        bt, parts = _tokens_to_a_tile(tokens, max(dim, dim_v))
        strides = (step for t in (grad, q, shared, dshared) for step in t.stride()[:3])
        _unmix_kernel[(batch * parts * heads,)](
            grad, q, shared, packed, gates, slots, dshared, dpacked, packed_q, dgates, delta, *strides, *gates.stride(),
            tokens, heads, shared.shape[1], slots.shape[1], slots.shape[3], dim, dim_v, packed_q.shape[1], packed.shape[1], parts,
            SLOPES=dgates.numel() > 0, BT=bt, BD=tile(dim, 256), BDV=tile(dim_v, 256), num_warps=4,
        )  # fmt: skip


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    plan: _Plan, sizes: tuple[int, int], scale: float, is_causal: bool,
) -> None:  # fmt: skip
    """Fill dq, packed as q and grad are, dk and dv; `sizes`: tokens, and query heads to a key/value head."""
    batch, kv_heads, keys, dim = k.shape
    (tokens, group), dim_v, rows = sizes, v.shape[-1], grad.shape[0]
    offset = keys - tokens
    common = {"CAUSAL": is_causal, "PRECISION": precision(q), "BD": tile(dim, 256), "BDV": tile(dim_v, 256)}
    ahead, own, other = (settings(kernel, max(dim, dim_v), q.dtype) for kernel in ("forward", "query", "key"))
    rows_by = {size: (_rows_of(q, dim, size), _rows_of(grad, dim_v, size)) for size in {own.bm, other.bm}}
    keys_by = {size: (_keys_of(k, size), _keys_of(v, size)) for size in {own.bn, other.bn}}
    first, most = _most_tiles(rows, batch * kv_heads, ahead.bm, own.bm)
    _query_gradient_kernel[(most,)](
        rows_by[own.bm][0], *keys_by[own.bn], rows_by[own.bm][1], lse, delta, dq, plan.starts, plan.origins, plan.tiles[first:],
        scale * LOG2E, offset, tokens, keys, kv_heads, group, dim, dq.shape[1],
        BM=own.bm, BN=own.bn, STAGES=own.stages, num_warps=own.warps, num_stages=own.stages, **common,
    )  # fmt: skip
    tiles = ceil_div(keys, other.bn)
    _key_gradient_kernel[(batch * kv_heads * tiles,)](
        rows_by[other.bm][0], *keys_by[other.bn], rows_by[other.bm][1],
        lse, delta, dk, dv, plan.starts, plan.slots, plan.origins,
        scale * LOG2E, offset, *dk.stride()[:3], *dv.stride()[:3], tokens, keys, kv_heads, group, dim, dim_v, tiles,
        BM=other.bm, BN=other.bn, STAGES=other.stages, EARLY=other.early,
        num_warps=other.warps, num_stages=other.stages, **common,
    )  # fmt: skip


@_mixture_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wants_gates = rest[-1]
    dgates = _empty_slopes(gates, wants_gates)
    return *_empty_gradients(q, k, v, rest[-2]), dgates.permute(0, 2, 1) if wants_gates else dgates


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gates, _, _, _, ctx.scale, ctx.is_causal, ctx.together = inputs
    ctx.save_for_backward(q, k, v, gates, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, gates, *rest = ctx.saved_tensors
    wants_gates = ctx.needs_input_grad[3]
    dq, dk, dv, dgates = _mixture_backward(
        grad, q, k, v, gates, *rest, ctx.scale, ctx.is_causal, ctx.together, wants_gates
    )  # fmt: skip
    if ctx.together:
        dq, dk, dv = _cut(dq, q.shape[1], k.shape[1])
    return dq, dk, dv, dgates.to(gates.dtype) if wants_gates else None, *(None,) * 6


_mixture_forward.register_autograd(_backward, setup_context=_setup)


def mixture_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, *, topk: int, apart: int, scale: float, is_causal: bool
) -> Tensor:
    """(B, H, N, D_v), see `_mixture_forward`; tensors as `ops.mixture_attention` has checked them."""
    return _mixture_forward(q, k, v, gates, chosen, topk, apart, scale, is_causal, lie_in_one(q, k, v))[0]


@operator("gate_heads")
def _gate_heads(x: Tensor, gates: Tensor) -> Tensor:
    """x (B, H, N, D) times gates (B, H, N), heads next to channels."""
    x, out = last_contiguous(x), _heads_last(x)
    packed, slots = _nothing_packed(x)
    _mix(out, x, packed, gates, slots)
    return out


def _nothing_packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of packed rows and their slots where all heads are shared."""
    return x.new_empty((0, 1)), x.new_empty((0, 1, 0, 1), dtype=torch.int32)


@_gate_heads.register_fake
def _(x: Tensor, gates: Tensor) -> Tensor:
    return _heads_last(x)


@operator("gate_heads_backward")
def _gate_heads_backward(grad: Tensor, x: Tensor, gates: Tensor, wants_gates: bool) -> tuple[Tensor, Tensor]:
    grad, x = last_contiguous(grad), last_contiguous(x)
    dx, dgates = torch.empty_like(x), _empty_slopes(gates, wants_gates)
    packed, slots = _nothing_packed(x)
    _unmix(grad, x, x, packed, gates, slots, dx, packed, packed, dgates, packed)
    return dx, dgates.permute(0, 2, 1) if wants_gates else dgates


@_gate_heads_backward.register_fake
def _(grad: Tensor, x: Tensor, gates: Tensor, wants_gates: bool) -> tuple[Tensor, Tensor]:
    dgates = _empty_slopes(gates, wants_gates)
    return torch.empty_like(last_contiguous(x)), dgates.permute(0, 2, 1) if wants_gates else dgates


def _setup_gates(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_gates(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    x, gates = ctx.saved_tensors
    dx, dgates = _gate_heads_backward(grad, x, gates, ctx.needs_input_grad[1])
    return dx, dgates.to(gates.dtype) if ctx.needs_input_grad[1] else None


_gate_heads.register_autograd(_backward_gates, setup_context=_setup_gates)


def gate_heads_triton(x: Tensor, gates: Tensor) -> Tensor:
    """(B, H, N, D) in the dtype of x, heads next to channels; tensors as `ops.gate_heads` has checked them."""
    return _gate_heads(x, gates)
