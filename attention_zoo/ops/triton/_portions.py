"""Keys in portions, one for a program, where queries are few (flash-decoding): how long they are, and how they are merged."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from attention_zoo.ops.triton._common import ceil_div

__all__ = ["Split", "merge_kernel", "merge_tiles", "merged", "portion", "processors", "room", "split_keys"]

_PROGRAMS, _LEAST, _MOST = 4, 128, 1024  # for each multiprocessor; keys of a program


@triton.jit
def merged(Part, PartLse, row, PARTS, DV, BP: tl.constexpr, BDV: tl.constexpr):
    """Of one query: its portions' outputs, weighted by their shares of the whole softmax, and its log-normaliser (of base 2)."""
    dv = tl.arange(0, BDV)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BDV], tl.float32)
    for start in range(0, PARTS, BP):
        p = start + tl.arange(0, BP)
        lse = tl.load(PartLse + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
        part = tl.load(
            Part + (row * PARTS + p)[:, None] * DV + dv[None, :], mask=(p < PARTS)[:, None] & (dv < DV)[None, :], other=0.0
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(lse, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(lse - anchor)
        fade = tl.exp2(highest - anchor)
        acc = acc * fade + tl.sum(weights[:, None] * part, 0)
        total = total * fade + tl.sum(weights, 0)
        highest = higher
    whole = tl.where(total == 0.0, 1.0, total)
    return acc / whole, tl.where(total == 0.0, float("-inf"), highest + tl.log2(whole))


@triton.jit(do_not_specialize=["PARTS", "sob", "soh", "son"])
def merge_kernel(
    Part, PartLse, Out, Lse, sob, soh, son, PARTS,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, DV: tl.constexpr, KEEP: tl.constexpr, BP: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Outputs, and to KEEP log-normalisers, of portions (B, H, N_q, PARTS, D_v)."""
    row = tl.program_id(0).to(tl.int64)
    b, h, query = row // QUERIES // HEADS, row // QUERIES % HEADS, row % QUERIES
    out, lse = merged(Part, PartLse, row, PARTS, DV, BP, BDV)
    dv = tl.arange(0, BDV)
    tl.store(Out + b * sob + h * soh + query * son + dv, out.to(Out.dtype.element_ty), mask=dv < DV)
    if KEEP:
        tl.store(Lse + row, lse)


def merge_tiles(wide: int) -> dict[str, int]:
    """Portions that are merged at a time, and warps for `wide` channels: one size, so that nothing is compiled as keys grow."""
    return {"BP": 64, "BDV": wide, "num_warps": 8 if wide > 128 else 4}


def portion(device: torch.device, *rows: tuple[int, int]) -> int:
    """Keys of a program, a multiple of 64, for `rows` of so many tiles of queries and keys each.

    As few as all programs run at once, within bounds; not more than 64 portions of a row.
    """
    # as for the next multiple of 64: found once for so many steps that each add a key
    return _portion(tuple((number, ceil_div(keys, 64) * 64) for number, keys in rows), _PROGRAMS * processors(device), _MOST)


@functools.lru_cache(maxsize=1024)
def _portion(rows: tuple[tuple[int, int], ...], programs: int, most: int) -> int:
    chunk = max(_LEAST, ceil_div(max(keys for _, keys in rows), 4096) * 64)
    while chunk < most and sum(number * ceil_div(keys, chunk) for number, keys in rows) > programs:
        chunk += 64
    return chunk


class Split(NamedTuple):
    """How keys are shared out to programs: `chunk` for each, in tiles of 64 KB or of 32, so many `stages` on their way at once."""

    chunk: int
    large_tiles: bool
    stages: int


def split_keys(rows: int, keys: int, processors: int, room: int) -> Split:
    """For so many tiles of queries, each with all `keys`, a multiple of 64, to read; `room` in bytes of shared memory.

    Reading is all that takes time, and what is on its way at once decides how fast it is: all but one of a program's stages. One
    program of large tiles is enough for a multiprocessor, or two and three of small ones. Not to split at all spares the merging.
    Measured on an H200 (docs/engines.md).
    """
    roomy = room >= 144 * 1024  # for two large tiles or three small ones, and what else a program holds
    if rows > processors:  # in several waves, where they do not all run at once
        return Split(max(keys, 64), False, 4 if roomy and rows > 2 * processors else 3)
    fills = 3 * rows <= processors or 10 * rows >= 7 * processors  # or else many multiprocessors have nothing to do
    large = fills and roomy
    parts = (1 if large else 2) * processors // rows
    chunk = max(64, ceil_div(ceil_div(keys, parts), 64) * 64)
    return Split(chunk, large and chunk >= 512, 3)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; in the interpreter as on Hopper."""
    if device.type != "cuda":
        return 232_448
    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]  # type: ignore[no-any-return]
