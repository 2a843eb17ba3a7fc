"""Core-context attention of few queries as Triton kernels: the keys are split between programs, whose results are merged then.

A program has a portion of one head's core keys, or of its exact keys, and all the queries that read it: those of the query heads
that share a key/value head are the rows of one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops.triton._common import LOG2E, ceil_div, conclude, precision, tile
from attention_zoo.ops.triton._core_walk import place_of, released, walk
from attention_zoo.ops.triton._portions import merge_kernel, merge_tiles, portion

__all__ = ["decode", "is_decode"]

_MOST_QUERIES, _MOST_ROWS = 8, 64  # of each head, and of the heads that share a key/value head together


@triton.jit(do_not_specialize=["CORES", "KEYS", "CHUNK", "CORE_PARTS", "PARTS", "query_start", "key_start"])
def _portion_kernel(
    Q, K, V, CoreK, CoreV, Part, PartLse, QueryStarts, KeyStarts,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn,
    HEADS, SHARE, CORE_SHARE, QUERIES, KEYS, CORES, CHUNK, CORE_PARTS, PARTS, query_start, key_start, WINDOW, GROUP, D, DV,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_start, key_start = place_of(query_start, QueryStarts, b), place_of(key_start, KeyStarts, b)
    core_programs = HEADS // CORE_SHARE * CORE_PARTS
    of_core = pid < core_programs
    share = tl.where(of_core, CORE_SHARE, SHARE)
    if of_core:
        head, part = pid // CORE_PARTS, pid % CORE_PARTS
    else:
        head, part = (pid - core_programs) // (PARTS - CORE_PARTS), (pid - core_programs) % (PARTS - CORE_PARTS)
    rows, d, dv = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    h, query = head * share + rows // QUERIES, rows % QUERIES
    real = rows < share * QUERIES
    q = tl.load(
        Q + b * sqb + h[:, None] * sqh + query[:, None] * sqn + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    )  # fmt: skip
    places = query_start + query
    oldest = released(places, WINDOW, GROUP)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    first = part * CHUNK
    if of_core:
        stop = tl.minimum(tl.minimum(first + CHUNK, CORES), released(query_start + QUERIES - 1, WINDOW, GROUP))
        highest, total, acc = walk(
            q, CoreK + b * sckb + head * sckh, CoreV + b * scvb + head * scvh, first, stop, places, 0, oldest, sckn, scvn, CORES,
            D, DV, highest, total, acc, scale, True, True, PRECISION, BN, BD, BDV,
        )  # fmt: skip
        slot = part
    else:
        highest, total, acc = walk(
            q, K + b * skb + head * skh, V + b * svb + head * svh, first, tl.minimum(first + CHUNK, KEYS), places, key_start,
            oldest * GROUP, skn, svn, KEYS, D, DV, highest, total, acc, scale, False, True, PRECISION, BN, BD, BDV,
        )  # fmt: skip
        slot = CORE_PARTS + part
    out, lse = conclude(acc, highest, total)
    place = ((b * HEADS + h) * QUERIES + query) * PARTS + slot
    tl.store(Part + place[:, None] * DV + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])
    tl.store(PartLse + place, lse, mask=real)


def is_decode(q: Tensor, k: Tensor) -> bool:
    """Whether the queries are so few that the keys should be split between programs."""
    return q.shape[2] <= _MOST_QUERIES and q.shape[2] * (q.shape[1] // k.shape[1]) <= _MOST_ROWS


_TILES = {"BN": 64, "num_warps": 4, "num_stages": 2}


def decode(
    q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, out: Tensor, lse: Tensor,
    query_starts: Tensor | None, key_starts: Tensor | None,
    window: int, group: int, query_start: int, key_start: int, scale: float,
) -> None:  # fmt: skip
    """Write the outputs and log-normalisers (of base 2) of a call that `is_decode`; channels are contiguous."""
    (batch, heads, queries, dim), (kv_heads, keys), (core_heads, cores), dim_v = (
        q.shape,
        k.shape[1:3],
        core_k.shape[1:3],
        v.shape[-1],
    )
    chunk = portion(q.device, (batch * core_heads, cores), (batch * kv_heads, keys))
    core_parts, raw_parts = ceil_div(cores, chunk), ceil_div(keys, chunk)
    parts = core_parts + raw_parts
    part = q.new_empty((batch, heads, queries, parts, dim_v), dtype=torch.float32)
    part_lse = q.new_empty((batch, heads, queries, parts), dtype=torch.float32)
    strides = [s for t in (q, k, v, core_k, core_v) for s in t.stride()[:3]]
    share = heads // min(kv_heads, core_heads)
    if parts:
        _portion_kernel[(core_heads * core_parts + kv_heads * raw_parts, batch)](
            q, k, v, core_k, core_v, part, part_lse, query_starts, key_starts, scale * LOG2E, *strides,
            heads, heads // kv_heads, heads // core_heads, queries, keys, cores, chunk, core_parts, parts, query_start, key_start,
            window, group, dim, dim_v, PRECISION=precision(q), BM=tile(share * queries, 256), BD=tile(dim, 256),
            BDV=tile(dim_v, 256), **_TILES,
        )  # fmt: skip
    merge_kernel[(batch * heads * queries,)](
        part, part_lse, out, lse, *out.stride()[:3], parts, HEADS=heads, QUERIES=queries, DV=dim_v, KEEP=True,
        **merge_tiles(tile(dim_v, 256)),
    )  # fmt: skip
