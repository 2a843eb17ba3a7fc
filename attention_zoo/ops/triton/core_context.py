"""Core-context attention as Triton kernels: exact tokens of the window and core tokens of all before it, under one softmax.

A program has some queries of one head. It walks along the exact tokens that they see, then along the core tokens; only the tiles at
the edges are masked. Exact tokens collect their gradients from the queries of the window that follows them, core tokens from all
queries after it: one program for each tile of keys, no atomics.
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
    ceil_div,
    conclude,
    heads_last,
    last_contiguous,
    per_logit,
    precision,
    prepare_gradient,
    read_lse,
    tile,
)
from attention_zoo.ops.triton._core_walk import place_of, released, walk
from attention_zoo.ops.triton.core_decode import decode, is_decode

__all__ = ["core_context_attention_triton"]


@triton.jit
def _spans(low, high, KEYS, CORES, WINDOW, GROUP, offset, BN: tl.constexpr):
    """Of the queries at `low` to `high`: where their exact keys begin, are seen by all, are so no more, end; likewise core keys."""
    first = tl.maximum(released(low, WINDOW, GROUP) * GROUP - offset, 0) // BN * BN
    end = tl.maximum(tl.minimum(high + 1 - offset, KEYS), first)
    all_from = tl.cdiv(tl.maximum(released(high, WINDOW, GROUP) * GROUP - offset, -offset), BN) * BN
    all_from = tl.minimum(tl.maximum(all_from, first), end)
    all_to = tl.maximum(tl.minimum(low + 1 - offset, KEYS) // BN * BN, all_from)
    core_all = tl.minimum(released(low, WINDOW, GROUP), CORES) // BN * BN
    return first, all_from, all_to, end, core_all, tl.minimum(released(high, WINDOW, GROUP), CORES)


@triton.jit
def _forward_kernel(
    Q, K, V, CoreK, CoreV, Out, Lse, QueryStarts, KeyStarts,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn, sob, soh, son,
    HEADS, SHARE, CORE_SHARE, QUERIES, KEYS, CORES, query_start, key_start, WINDOW, GROUP, D, DV,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    portion, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest first
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    query_start, key_start = place_of(query_start, QueryStarts, b), place_of(key_start, KeyStarts, b)
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < QUERIES
    q = tl.load(Q + b * sqb + h * sqh + rows[:, None] * sqn + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    places = query_start + rows
    oldest = released(places, WINDOW, GROUP)
    low, high = query_start + portion * BM, query_start + tl.minimum(portion * BM + BM, QUERIES) - 1
    first, all_from, all_to, end, core_all, core_end = _spans(low, high, KEYS, CORES, WINDOW, GROUP, key_start, BN)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    K += b * skb + h // SHARE * skh
    V += b * svb + h // SHARE * svh
    CoreK += b * sckb + h // CORE_SHARE * sckh
    CoreV += b * scvb + h // CORE_SHARE * scvh
    highest, total, acc = walk(
        q, K, V, first, all_from, places, key_start, oldest * GROUP, skn, svn, KEYS, D, DV, highest, total, acc, scale,
        False, True, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    highest, total, acc = walk(
        q, K, V, all_from, all_to, places, key_start, oldest * GROUP, skn, svn, KEYS, D, DV, highest, total, acc, scale,
        False, False, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    highest, total, acc = walk(
        q, K, V, all_to, end, places, key_start, oldest * GROUP, skn, svn, KEYS, D, DV, highest, total, acc, scale,
        False, True, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    highest, total, acc = walk(
        q, CoreK, CoreV, 0, core_all, places, 0, oldest, sckn, scvn, CORES, D, DV, highest, total, acc, scale,
        True, False, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    highest, total, acc = walk(
        q, CoreK, CoreV, core_all, core_end, places, 0, oldest, sckn, scvn, CORES, D, DV, highest, total, acc, scale,
        True, True, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    out, lse = conclude(acc, highest, total)
    at = Out + b * sob + h * soh
    tl.store(at + rows[:, None] * son + dv[None, :], out.to(Out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    tl.store(Lse + bh.to(tl.int64) * QUERIES + rows, lse, mask=real)


@triton.jit
def _descend(
    q, grad, K, V, first, stop, places, offset, oldest, lse, delta, skn, svn, LENGTH, D, DV, acc, scale,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Adds to the queries' gradient what comes through the keys `first` to `stop`."""
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        n = start + tl.arange(0, BN)
        there = (n >= 0) & (n < LENGTH)
        k = tl.load(K + n[:, None] * skn + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(V + n[None, :] * svn + dv[:, None], mask=there[None, :] & (dv < DV)[:, None], other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CORE:
            seen = there[None, :] & (n[None, :] < oldest[:, None])
        else:
            at = n + offset
            seen = (there & (at >= 0))[None, :] & (at[None, :] >= oldest[:, None]) & (at[None, :] <= places[:, None])
        p = tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, v, input_precision=PRECISION) - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return acc


@triton.jit
def _query_gradient_kernel(
    Q, K, V, CoreK, CoreV, Out, Lse, DOut, DLse, Delta, DQ, QueryStarts, KeyStarts,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn, sob, soh, son, sgb, sgh, sgn, sdb, sdh, sdn,
    HEADS, SHARE, CORE_SHARE, QUERIES, KEYS, CORES, query_start, key_start, WINDOW, GROUP, D, DV,
    HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    portion, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    query_start, key_start = place_of(query_start, QueryStarts, b), place_of(key_start, KeyStarts, b)
    rows, d, dv = portion * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < QUERIES
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + rows[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
    out = tl.load(Out + b * sob + h * soh + rows[:, None] * son + dv[None, :], mask=wanted_v, other=0.0)
    grad = tl.load(DOut + b * sgb + h * sgh + rows[:, None] * sgn + dv[None, :], mask=wanted_v, other=0.0)
    place = bh.to(tl.int64) * QUERIES + rows
    lse, delta = prepare_gradient(out, grad, Lse, DLse, Delta, place, real, HAS_DLSE)
    places = query_start + rows
    oldest = released(places, WINDOW, GROUP)
    low, high = query_start + portion * BM, query_start + tl.minimum(portion * BM + BM, QUERIES) - 1
    first, _, _, end, _, core_end = _spans(low, high, KEYS, CORES, WINDOW, GROUP, key_start, BN)
    K += b * skb + h // SHARE * skh
    V += b * svb + h // SHARE * svh
    CoreK += b * sckb + h // CORE_SHARE * sckh
    CoreV += b * scvb + h // CORE_SHARE * scvh
    acc = tl.zeros([BM, BD], tl.float32)
    acc = _descend(
        q, grad, K, V, first, end, places, key_start, oldest * GROUP, lse, delta, skn, svn, KEYS, D, DV, acc, scale,
        False, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    acc = _descend(
        q, grad, CoreK, CoreV, 0, core_end, places, 0, oldest, lse, delta, sckn, scvn, CORES, D, DV, acc, scale,
        True, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    acc *= per_logit(scale)
    at = DQ + b * sdb + h * sdh
    tl.store(at + rows[:, None] * sdn + d[None, :], acc.to(DQ.dtype.element_ty), mask=wanted)


@triton.jit
def _key_gradient_kernel(
    Q, K, V, Lse, DOut, Delta, DK, DV_, QueryStarts, KeyStarts,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    HEADS, SHARE, QUERIES, KEYS, query_start, key_start, WINDOW, GROUP, D, DV,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of exact keys, or of core keys: their gradients from the queries that see them."""
    portion, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // (HEADS // SHARE)).to(tl.int64), bg % (HEADS // SHARE)
    query_start, key_start = place_of(query_start, QueryStarts, b), place_of(key_start, KeyStarts, b)
    n, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    real = n < KEYS
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    k = tl.load(K + b * skb + g * skh + n[:, None] * skn + d[None, :], mask=wanted, other=0.0)
    v = tl.load(V + b * svb + g * svh + n[:, None] * svn + dv[None, :], mask=wanted_v, other=0.0)
    last = tl.minimum(portion * BN + BN, KEYS) - 1
    if CORE:
        low, high = WINDOW - 1 + GROUP * (portion * BN + 1), query_start + QUERIES
    else:
        low, high = portion * BN + key_start, WINDOW - 1 + GROUP * (tl.maximum(last + key_start, 0) // GROUP + 1)
    begin = tl.maximum(low - query_start, 0) // BM * BM
    end = tl.minimum(high - query_start, QUERIES)
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for one in range(SHARE):
        h = g * SHARE + one
        for start in range(begin, end, BM):
            rows = start + tl.arange(0, BM)
            there = rows < QUERIES
            q = tl.load(
                Q + b * sqb + h * sqh + rows[:, None] * sqn + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
            )  # fmt: skip
            grad = tl.load(
                DOut + b * sgb + h * sgh + rows[:, None] * sgn + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
            )  # fmt: skip
            place = (b * HEADS + h) * QUERIES + rows
            lse = read_lse(Lse, place, there)
            delta = tl.load(Delta + place, mask=there, other=0.0)
            places = query_start + rows
            oldest = released(places, WINDOW, GROUP)
            if CORE:
                seen = real[None, :] & (n[None, :] < oldest[:, None])
            else:
                at = n + key_start
                seen = (real & (at >= 0))[None, :] & (at[None, :] >= (oldest * GROUP)[:, None]) & (at[None, :] <= places[:, None])
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            p = tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)
            ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dv_sum += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= per_logit(scale)
    at_k, at_v = DK + b * sdkb + g * sdkh, DV_ + b * sdvb + g * sdvh
    tl.store(at_k + n[:, None] * sdkn + d[None, :], dk.to(DK.dtype.element_ty), mask=wanted)
    tl.store(at_v + n[:, None] * sdvn + dv[None, :], dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)


_REACH = 2**31  # elements between the first and the last token of a head: the kernels count them in 32 bits


def _empty(like: Tensor, channels: int) -> Tensor:
    """(B, H, N, channels), laid out with heads next to channels as projections read them, unless tokens get out of reach."""
    batch, heads, length = like.shape[:3]
    if length * heads * channels >= _REACH:
        return like.new_empty((batch, heads, length, channels))
    return heads_last(like, channels)


def _within_reach(x: Tensor) -> Tensor:
    x = last_contiguous(x)
    return x if x.shape[2] * x.stride(2) < _REACH else x.contiguous()


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Sides of the tiles, and warps for them: the wide heads of language models take larger ones."""
    dim, dim_v = tile(q.shape[-1], 256), tile(v.shape[-1], 256)
    wide = q.element_size() == 2 and 64 <= max(dim, dim_v) <= 128
    return {"BM": tile(q.shape[2], 128 if wide else 64), "BN": 64 if max(dim, dim_v) <= 128 else 32, "BD": dim, "BDV": dim_v,
            "num_warps": 8 if wide and q.shape[2] > 64 else 4}  # fmt: skip


def _gradient_tiles(q: Tensor, v: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the two backward kernels: of queries, of keys.

    With two stages two programs fit on a multiprocessor. The kernel of keys has square tiles, however few the queries are: where
    Triton 3.6 compiles some of a loop's products for Hopper's asynchronous units (64 rows and more) and some not, tiles that are
    still read get overwritten. In float32, which those units do not multiply, the tiles are smaller: four products take registers.
    """
    tiles = {**_tiles(q, v), "BM": tile(q.shape[2]), "num_warps": 4, "num_stages": 2}
    side = min(tiles["BN"], 32) if q.element_size() == 4 else tiles["BN"]
    return tiles, {**tiles, "BM": side, "BN": side}


@operator("core_context_forward")
def _core_context_forward(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, query_starts: Tensor | None, key_starts: Tensor | None,
    window: int, group: int, query_start: int, key_start: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, core_k, core_v = (_within_reach(t) for t in (q, k, v, core_k, core_v))
    (batch, heads, queries, dim), dim_v = q.shape, v.shape[-1]
    out, lse = _empty(q, dim_v), q.new_empty((batch, heads, queries), dtype=torch.float32)
    if not out.numel():
        return out, lse
    if is_decode(q, k):
        decode(q, k, v, core_k, core_v, out, lse, query_starts, key_starts, window, group, query_start, key_start, scale)
        return out, lse
    tiles = _tiles(q, v)
    strides = [s for t in (q, k, v, core_k, core_v, out) for s in t.stride()[:3]]
    _forward_kernel[(ceil_div(queries, tiles["BM"]), batch * heads)](
        q, k, v, core_k, core_v, out, lse, query_starts, key_starts, scale * LOG2E, *strides,
        heads, heads // k.shape[1], heads // core_k.shape[1], queries, k.shape[2], core_k.shape[2], query_start, key_start,
        window, group, dim, dim_v, PRECISION=precision(q), **tiles,
    )  # fmt: skip
    return out, lse


@_core_context_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, query_starts: Tensor | None, key_starts: Tensor | None,
    window: int, group: int, query_start: int, key_start: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("core_context_backward")
def _core_context_backward(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, query_starts: Tensor | None, key_starts: Tensor | None,
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None,
    window: int, group: int, query_start: int, key_start: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, core_k, core_v, grad = (_within_reach(t) for t in (q, k, v, core_k, core_v, grad))
    (batch, heads, queries, dim), dim_v = q.shape, v.shape[-1]
    dq, delta = _empty(q, dim), torch.empty_like(lse)
    tiles, key_tiles = _gradient_tiles(q, v)
    if q.numel():
        strides = [s for t in (q, k, v, core_k, core_v, out, grad, dq) for s in t.stride()[:3]]
        _query_gradient_kernel[(ceil_div(queries, tiles["BM"]), batch * heads)](
            q, k, v, core_k, core_v, out, lse, grad, lse if grad_lse is None else (grad_lse * LOG2E).contiguous(), delta, dq,
            query_starts, key_starts, scale * LOG2E, *strides, heads, heads // k.shape[1], heads // core_k.shape[1],
            queries, k.shape[2], core_k.shape[2], query_start, key_start, window, group, dim, dim_v,
            HAS_DLSE=grad_lse is not None, PRECISION=precision(q), **tiles,
        )  # fmt: skip
    gradients = []
    for keys, values, core in ((k, v, False), (core_k, core_v, True)):
        dk, dv = _empty(keys, dim), _empty(values, dim_v)
        if dk.numel():
            strides = [s for t in (q, keys, values, grad, dk, dv) for s in t.stride()[:3]]
            _key_gradient_kernel[(ceil_div(keys.shape[2], key_tiles["BN"]), batch * keys.shape[1])](
                q, keys, values, lse, grad, delta, dk, dv, query_starts, key_starts, scale * LOG2E, *strides,
                heads, heads // keys.shape[1], queries, keys.shape[2], query_start, key_start, window, group, dim, dim_v,
                CORE=core, PRECISION=precision(q), **key_tiles,
            )  # fmt: skip
        gradients += [dk, dv]
    return dq, gradients[0], gradients[1], gradients[2], gradients[3]


@_core_context_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, query_starts: Any, key_starts: Any,
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Any,
    window: int, group: int, query_start: int, key_start: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dck, dcv = (_empty(t, t.shape[-1]) for t in (q, k, v, core_k, core_v))
    return dq, dk, dv, dck, dcv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    return *_core_context_backward(*tensors, out, lse, grad, grad_lse, *ctx.settings), *(None,) * 7


_core_context_forward.register_autograd(_backward, setup_context=_setup)


def core_context_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, *,
    window_size: int, group_size: int, query_start: int | Tensor, key_start: int | Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, H, N_q, D_v) and the log-normaliser of base 2, of tensors as `core_context_attention` has checked them."""
    (query_place, query_starts), (key_place, key_starts) = (
        (0, start.contiguous()) if isinstance(start, Tensor) else (start, None) for start in (query_start, key_start)
    )
    return _core_context_forward(
        q, k, v, core_k, core_v, query_starts, key_starts, window_size, group_size, query_place, key_place, scale
    )
