"""Key/value heads named by a map, as Triton kernels: attention that reads them where they stand, and copies with their gradient.

Without gradients: flash attention whose program (queries, head) looks its key/value head up. For training the heads are copied,
since the libraries' backward is faster than ours; the gradients of copies are added up in order of the heads: no atomics. And the
map itself, from the norms of the keys: two kernels in place of some sixty.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import LOG2E, ceil_div, heads_last, last_contiguous, power_of_2, precision, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["allocate_heads", "attend_by_map", "copy_heads", "evolve_heads", "read_allocation"]


@triton.jit
def _absorb(x, scale, highest, total):
    """As the kernels' common `absorb`, of logits that are yet to be scaled (by a positive number): a product less for each."""
    higher = tl.maximum(highest, tl.max(x, 1))
    p = tl.exp2(x * scale - (higher * scale)[:, None])
    fade = tl.exp2((highest - higher) * scale)
    return p, fade, higher, total * fade + tl.sum(p, 1)


@triton.jit
def _attend_kernel(
    Q, K, V, Map, Out,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, smb, sob, soh, son,
    HEADS, QUERIES, KEYS, D, DV,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    portion, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    head = tl.load(Map + b * smb + h)
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < QUERIES
    q = tl.load(Q + b * sqb + h * sqh + rows[:, None] * sqn + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    K += b * skb + head * skh
    V += b * svb + head * svh
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    whole = KEYS // BN * BN
    for start in range(0, whole, BN):
        n = start + tl.arange(0, BN)
        if EVEN:
            k = tl.load(K + n[None, :] * skn + d[:, None])
            v = tl.load(V + n[:, None] * svn + dv[None, :])
        else:
            k = tl.load(K + n[None, :] * skn + d[:, None], mask=(d < D)[:, None], other=0.0)
            v = tl.load(V + n[:, None] * svn + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
        p, fade, highest, total = _absorb(tl.dot(q, k, input_precision=PRECISION), scale, highest, total)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if whole < KEYS:
        n = whole + tl.arange(0, BN)
        there = n < KEYS
        k = tl.load(K + n[None, :] * skn + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(V + n[:, None] * svn + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        x = tl.where(there[None, :], tl.dot(q, k, input_precision=PRECISION), float("-inf"))
        p, fade, highest, total = _absorb(x, scale, highest, total)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out = acc / total[:, None]
    at = Out + b * sob + h * soh
    tl.store(at + rows[:, None] * son + dv[None, :], out.to(Out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])


@triton.jit
def _expand_kernel(
    K, V, Map, OutK, OutV,
    skb, skh, skn, svb, svh, svn, smb, sokb, sokh, sokn, sovb, sovh, sovn,
    HEADS, KEYS, D, DV,
    BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    portion, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    head = tl.load(Map + b * smb + h)
    n, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    wanted, wanted_v = (n < KEYS)[:, None] & (d < D)[None, :], (n < KEYS)[:, None] & (dv < DV)[None, :]
    k = tl.load(K + b * skb + head * skh + n[:, None] * skn + d[None, :], mask=wanted)
    v = tl.load(V + b * svb + head * svh + n[:, None] * svn + dv[None, :], mask=wanted_v)
    tl.store(OutK + b * sokb + h * sokh + n[:, None] * sokn + d[None, :], k, mask=wanted)
    tl.store(OutV + b * sovb + h * sovh + n[:, None] * sovn + dv[None, :], v, mask=wanted_v)


@triton.jit
def _reduce_kernel(
    DK, DV_, Map, OutK, OutV,
    skb, skh, skn, svb, svh, svn, smb, sokb, sokh, sokn, sovb, sovh, sovn,
    KV_HEADS, KEYS, D, DV,
    HEADS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Sums over the query heads that read a key/value head, whichever they are, in the order of their numbers."""
    portion, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // KV_HEADS).to(tl.int64), bg % KV_HEADS
    n, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    wanted, wanted_v = (n < KEYS)[:, None] & (d < D)[None, :], (n < KEYS)[:, None] & (dv < DV)[None, :]
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for h in tl.static_range(HEADS):  # no branch: none waits for the map's entry of the one before
        mine = tl.load(Map + b * smb + h) == g
        dk += tl.load(DK + b * skb + h * skh + n[:, None] * skn + d[None, :], mask=wanted & mine, other=0.0).to(tl.float32)
        grad = tl.load(DV_ + b * svb + h * svh + n[:, None] * svn + dv[None, :], mask=wanted_v & mine, other=0.0)
        dv_sum += grad.to(tl.float32)
    tl.store(OutK + b * sokb + g * sokh + n[:, None] * sokn + d[None, :], dk.to(OutK.dtype.element_ty), mask=wanted)
    tl.store(OutV + b * sovb + g * sovh + n[:, None] * sovn + dv[None, :], dv_sum.to(OutV.dtype.element_ty), mask=wanted_v)


@triton.jit
def _norm_kernel(K, Parts, skb, skh, skn, KV_HEADS, KEYS, D, ROWS, BN: tl.constexpr, BD: tl.constexpr):
    """Sums of squares of ROWS keys of one head."""
    part, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // KV_HEADS).to(tl.int64), bg % KV_HEADS
    d = tl.arange(0, BD)
    total = tl.zeros([BN, BD], tl.float32)
    stop = tl.minimum(part * ROWS + ROWS, KEYS)
    for start in range(part * ROWS, stop, BN):
        n = start + tl.arange(0, BN)
        there = (n < stop)[:, None] & (d < D)[None, :]
        k = tl.load(K + b * skb + g * skh + n[:, None] * skn + d[None, :], mask=there, other=0.0).to(tl.float32)
        total += k * k
    tl.store(Parts + bg.to(tl.int64) * tl.num_programs(0) + part, tl.sum(total))


@triton.jit
def _norms(Squares, first, stop, BATCH, PARTS, KV_HEADS, BB: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr):
    """Norms of the keys of each head, summed over the samples `first` to `stop`."""
    flat, parts = tl.arange(0, BB * BG), tl.arange(0, BP)
    norms = tl.zeros([BG], tl.float32)
    for start in range(first, stop, BB):
        b, head = start + flat // BG, flat % BG
        there = ((b < stop) & (head < KV_HEADS))[:, None] & (parts < PARTS)[None, :]
        squares = tl.load(Squares + (b * KV_HEADS + head)[:, None] * PARTS + parts[None, :], mask=there, other=0.0)
        norms += tl.sum(tl.reshape(tl.sqrt_rn(tl.sum(squares, 1)), (BB, BG)), 0)
    return norms


@triton.jit
def _share_out(weights, KV_HEADS, HEADS, TURNS: tl.constexpr, BG: tl.constexpr):
    """Query heads in proportion to weights, as `allocate_query_heads` of the mechanism; 0 beyond the heads that there are."""
    g = tl.arange(0, BG)
    real = g < KV_HEADS
    weights = tl.where(real, weights, 0.0)
    total = tl.zeros([BG], tl.float32) + tl.sum(weights)
    usable = (total > 0.0) & (total < float("inf"))
    share = tl.where(usable & real, tl.div_rn(weights, tl.where(usable, total, 1.0)) * HEADS, 0.0)
    rounded = ((share + 12582912.0) - 12582912.0).to(tl.int32)  # half to even: what lies below 1 is no digit there
    even = HEADS // KV_HEADS + (g < HEADS % KV_HEADS).to(tl.int32)
    allocation = tl.where(real, tl.where(usable, rounded, even), 0)
    for _ in range(TURNS):
        excess = tl.sum(allocation) - HEADS
        takes = tl.argmax(tl.where(real, allocation, -1), 0)
        gives = tl.argmin(tl.where(real, allocation, HEADS + 1), 0)
        allocation -= tl.where(g == takes, (excess > 0).to(tl.int32), 0)
        allocation += tl.where(g == gives, (excess < 0).to(tl.int32), 0)
    return allocation


@triton.jit
def _store_map(Allocation, Map, allocation, KV_HEADS, HEADS, BG: tl.constexpr, BH: tl.constexpr):
    g, h = tl.arange(0, BG), tl.arange(0, BH)
    real = g < KV_HEADS
    ends = tl.cumsum(allocation, 0)
    head = tl.sum(((ends[None, :] <= h[:, None]) & real[None, :]).to(tl.int32), 1)
    tl.store(Allocation + g, allocation.to(tl.int64), mask=real)
    tl.store(Map + h, head.to(tl.int64), mask=h < HEADS)


@triton.jit
def _read_kernel(Stored, Allocation, Map, KV_HEADS, HEADS, BG: tl.constexpr, BH: tl.constexpr):
    g = tl.arange(0, BG)
    allocation = tl.load(Stored + g, mask=g < KV_HEADS, other=0).to(tl.int32)
    _store_map(Allocation, Map, allocation, KV_HEADS, HEADS, BG, BH)


@triton.jit
def _allocate_kernel(
    Squares, Allocation, Map, BATCH, PARTS, KV_HEADS, HEADS,
    EACH: tl.constexpr, TURNS: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """From the sums of squares to the norms (of the batch, or of EACH sample), query heads of each, and their map."""
    row = tl.program_id(0)
    norms = _norms(Squares, row if EACH else 0, row + 1 if EACH else BATCH, BATCH, PARTS, KV_HEADS, BB, BG, BP)
    real = tl.arange(0, BG) < KV_HEADS
    lowest, highest = tl.min(tl.where(real, norms, float("inf"))), tl.max(tl.where(real, norms, 0.0))
    weights = tl.div_rn(norms - lowest, tl.zeros([BG], tl.float32) + (highest - lowest))
    allocation = _share_out(weights, KV_HEADS, HEADS, TURNS, BG)
    _store_map(Allocation + row * KV_HEADS, Map + row * HEADS, allocation, KV_HEADS, HEADS, BG, BH)


@triton.jit(do_not_specialize=("given", "window"))
def _evolve_kernel(
    Squares, Cache, Stored, Step, Allocation, Map, BATCH, PARTS, KV_HEADS, HEADS, beta, rest, window, given,
    EMA: tl.constexpr, TRAINING: tl.constexpr,
    TURNS: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The same by how norms evolve. The cached norms, the stored allocation and the counter of steps change in place."""
    norms = _norms(Squares, 0, BATCH, BATCH, PARTS, KV_HEADS, BB, BG, BP)
    g = tl.arange(0, BG)
    real = g < KV_HEADS
    cache = tl.load(Cache + g, mask=real, other=0.0)
    weights = beta * norms + rest * cache if EMA else tl.abs(cache - norms)
    allocation = _share_out(weights, KV_HEADS, HEADS, TURNS, BG)
    kept = norms
    if TRAINING:
        step = tl.load(Step)
        due = tl.where(given >= 0, given.to(tl.int64), step) % window == 0
        kept = tl.where(due, tl.div_rn(cache + norms, tl.zeros([BG], tl.float32) + window), cache)
        allocation = tl.where(due, allocation, tl.load(Stored + g, mask=real, other=0).to(tl.int32))
        tl.store(Step, step + 1)
    tl.store(Cache + g, kept, mask=real)
    tl.store(Stored + g, allocation.to(tl.int64), mask=real)
    _store_map(Allocation, Map, allocation, KV_HEADS, HEADS, BG, BH)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _step(head_map: Tensor) -> int:
    """From one sample's map to the next one's."""
    return head_map.stride(0) if head_map.ndim == 2 else 0


# --- the allocation --------------------------------------------------------------------------------------------------------------


def _sum_squares(k: Tensor) -> Tensor:
    """Of the keys of each sample and head, (B G, parts); what a kernel of one program reads at once."""
    k = last_contiguous(k)
    (batch, kv_heads, keys, dim), channels = k.shape, power_of_2(k.shape[3])
    rows = 256
    while ceil_div(keys, rows) > 64:
        rows *= 2
    parts = ceil_div(keys, rows)
    if not k.numel():
        return k.new_zeros((batch * kv_heads, 1), dtype=torch.float32)
    squares = k.new_empty((batch * kv_heads, parts), dtype=torch.float32)
    _norm_kernel[(parts, batch * kv_heads)](
        k, squares, *_strides(k), kv_heads, keys, dim, rows,
        BN=min(power_of_2(min(keys, rows)), max(16, 8192 // channels)), BD=channels, num_warps=4,
    )  # fmt: skip
    return squares


def _tiles(squares: Tensor, samples: int, kv_heads: int, num_heads: int) -> dict[str, int]:
    """Of the kernels that share out heads. A single warp: what it adds up goes through no memory."""
    groups, parts = power_of_2(kv_heads), power_of_2(squares.shape[1])
    at_once = min(power_of_2(samples), max(1, 2048 // (groups * parts)))
    return {"TURNS": (kv_heads + 1) // 2, "BB": at_once, "BG": groups, "BP": parts, "BH": power_of_2(num_heads), "num_warps": 1}


def _allocate(k: Tensor, num_heads: int, each: bool) -> tuple[Tensor, Tensor]:
    batch, kv_heads = k.shape[:2]
    squares, (allocation, head_map) = _sum_squares(k), _allocation_like(k, num_heads, each)
    if allocation.numel():
        _allocate_kernel[(batch if each else 1,)](
            squares, allocation, head_map, batch, squares.shape[1], kv_heads, num_heads,
            EACH=each, **_tiles(squares, 1 if each else batch, kv_heads, num_heads),
        )  # fmt: skip
    return allocation, head_map


def _allocation_like(k: Tensor, num_heads: int, each: bool) -> tuple[Tensor, Tensor]:
    lead = (k.shape[0],) if each else ()
    return k.new_empty((*lead, k.shape[1]), dtype=torch.int64), k.new_empty((*lead, num_heads), dtype=torch.int64)


_allocate_heads = operator("allocate_heads")(_allocate)
_allocate_heads.register_fake(_allocation_like)


def allocate_heads(k: Tensor, num_heads: int, each: bool) -> tuple[Tensor, Tensor]:
    """Query heads of each key/value head by the norms of its keys, min-max scaled, and the map of heads; without gradient.

    Shape: k (B, G, N, d) -> int64 (G,) and (num_heads,), or of `each` sample (B, G) and (B, num_heads).
    """
    return _allocate_heads(k.detach(), num_heads, each)


@operator("read_allocation")
def _read(stored: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    allocation, head_map = _read_like(stored, num_heads)
    _reading(stored.shape[0], num_heads, stored.device)(stored.contiguous(), allocation, head_map)
    return allocation, head_map


@settled
def _reading(kv_heads: int, num_heads: int, device: torch.device) -> Launch:
    constants = {"BG": power_of_2(kv_heads), "BH": power_of_2(num_heads), "num_warps": 1}
    return Launch(_read_kernel, (1,), (Place(0), Place(1), Place(2)), (kv_heads, num_heads), constants)


@_read.register_fake
def _read_like(stored: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    return stored.new_empty(stored.shape), stored.new_empty((num_heads,))


def read_allocation(stored: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """A copy of an allocation, int64 (G,), and its map of heads, int64 (num_heads,)."""
    return _read(stored, num_heads)


def _evolve(
    k: Tensor, cache: Tensor, stored: Tensor, step: Tensor, num_heads: int, beta: float, window: int, given: int, training: bool
) -> tuple[Tensor, Tensor]:
    batch, kv_heads = k.shape[:2]
    squares, (allocation, head_map) = _sum_squares(k), _allocation_like(k, num_heads, False)
    _evolve_kernel[(1,)](
        squares, cache, stored, step, allocation, head_map, batch, squares.shape[1], kv_heads, num_heads,
        max(beta, 0.0), 1.0 - beta, window, given, EMA=beta >= 0, TRAINING=training, **_tiles(squares, batch, kv_heads, num_heads),
    )  # fmt: skip
    return allocation, head_map


_evolve_heads = operator("evolve_heads", mutates_args=("cache", "stored", "step"))(_evolve)


@_evolve_heads.register_fake
def _(
    k: Tensor, cache: Tensor, stored: Tensor, step: Tensor, num_heads: int, beta: float, window: int, given: int, training: bool
) -> tuple[Tensor, Tensor]:
    return _allocation_like(k, num_heads, False)


def evolve_heads(
    k: Tensor,
    cache: Tensor,
    stored: Tensor,
    step: Tensor,
    *,
    num_heads: int,
    beta: float | None,
    window_size: int,
    training_step: int | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """`allocate_heads` by how norms evolve; the norms in `cache`, the `stored` allocation and the counter `step` change in place.

    `beta`: weight of the new norms; None: by the difference. `training_step`: in place of the counter.
    """
    given = -1 if training_step is None else training_step
    return _evolve_heads(k.detach(), cache, stored, step, num_heads, -1.0 if beta is None else beta, window_size, given, training)


# --- attention -------------------------------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, head_map: Tensor, scale: float) -> Tensor:
    q, k, v = (last_contiguous(t) for t in (q, k, v))
    (batch, heads, queries, dim), dim_v = q.shape, v.shape[-1]
    out, bd, bdv = heads_last(q, dim_v, heads), tile(dim, 256), tile(dim_v, 256)
    bm, bn = tile(queries), 64 if max(bd, bdv) <= 128 and q.element_size() == 2 and k.shape[2] > 512 else 32
    _attend_kernel[(ceil_div(queries, bm), batch * heads)](
        q, k, v, head_map, out, scale * LOG2E, *_strides(q, k, v), _step(head_map), *_strides(out), heads, queries, k.shape[2],
        dim, dim_v, EVEN=dim == bd and dim_v == bdv, PRECISION=precision(q), BM=bm, BN=bn, BD=bd, BDV=bdv,
        num_warps=4, num_stages=3 if bn == 64 else 4,
    )  # fmt: skip
    return out


_attend_by_map = operator("attend_by_map")(_attend)


@_attend_by_map.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, head_map: Tensor, scale: float) -> Tensor:
    return heads_last(q, v.shape[-1])


def attend_by_map(q: Tensor, k: Tensor, v: Tensor, head_map: Tensor, scale: float) -> Tensor:
    """(B, H, N_q, D_v), of tensors that need no gradient."""
    return _attend_by_map(q, k, v, head_map, scale)


# --- copies ----------------------------------------------------------------------------------------------------------------------


def _copy(k: Tensor, v: Tensor, head_map: Tensor) -> tuple[Tensor, Tensor]:
    k, v = last_contiguous(k), last_contiguous(v)
    heads, length = head_map.shape[-1], k.shape[2]
    out_k, out_v = _copies(k, v, head_map)
    if out_k.numel() and out_v.numel():
        _expand_kernel[(ceil_div(length, 64), k.shape[0] * heads)](
            k, v, head_map, out_k, out_v, *_strides(k, v), _step(head_map), *_strides(out_k, out_v),
            heads, length, k.shape[3], v.shape[3], BN=64, BD=power_of_2(k.shape[3]), BDV=power_of_2(v.shape[3]),
        )  # fmt: skip
    return out_k, out_v


def _copies(k: Tensor, v: Tensor, head_map: Tensor) -> tuple[Tensor, Tensor]:
    lead = k.shape[0], head_map.shape[-1], k.shape[2]
    return k.new_empty((*lead, k.shape[3])), v.new_empty((*lead, v.shape[3]))


def _add_up(dk: Tensor, dv: Tensor, head_map: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    dk, dv = last_contiguous(dk), last_contiguous(dv)
    length = dk.shape[2]
    out_k, out_v = heads_last(dk, heads=kv_heads), heads_last(dv, heads=kv_heads)
    if out_k.numel() and out_v.numel():
        _reduce_kernel[(ceil_div(length, 32), dk.shape[0] * kv_heads)](
            dk, dv, head_map, out_k, out_v, *_strides(dk, dv), _step(head_map), *_strides(out_k, out_v),
            kv_heads, length, dk.shape[3], dv.shape[3],
            HEADS=dk.shape[1], BN=32, BD=power_of_2(dk.shape[3]), BDV=power_of_2(dv.shape[3]),
        )  # fmt: skip
    return out_k, out_v


_copy_heads = operator("copy_heads")(_copy)
_copy_heads.register_fake(_copies)
_add_up_heads = operator("add_up_heads")(_add_up)


@_add_up_heads.register_fake
def _(dk: Tensor, dv: Tensor, head_map: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    return heads_last(dk, heads=kv_heads), heads_last(dv, heads=kv_heads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.kv_heads = inputs[0].shape[1]


def _backward(ctx: Any, *grad_outputs: Any) -> Any:
    dk, dv = grad_outputs
    return *_add_up_heads(dk, dv, ctx.saved_tensors[0], ctx.kv_heads), None


_copy_heads.register_autograd(_backward, setup_context=_setup)


def copy_heads(k: Tensor, v: Tensor, head_map: Tensor) -> tuple[Tensor, Tensor]:
    """The named heads of k and v, (B, H, N, D) and (B, H, N, D_v)."""
    return _copy_heads(k, v, head_map)
