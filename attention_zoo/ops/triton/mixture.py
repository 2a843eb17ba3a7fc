"""Attention of the chosen (token, head) pairs as Triton kernels: queries that a head's router did not choose cost nothing.

The chosen queries are lined up, key/value head after key/value head, in the order of their tokens: B * N * K rows, whatever was
chosen, so that nothing waits for a count. A sequence of rows and the keys of its head are then an ordinary problem of flash
attention. Last, each row goes back to its place, times its gate, and all other places get 0. Heads that every token uses need
none of it: cuDNN computes them, where it serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops import _cudnn
from attention_zoo.ops._operators import operator
from attention_zoo.ops._split import lie_in_one
from attention_zoo.ops.triton._common import LOG2E, ceil_div, heads_last, last_contiguous, per_logit, precision, read_lse, tile
from attention_zoo.ops.triton._launch import Launch, Place, Tiled, launch_all, settled
from attention_zoo.ops.triton._streams import two_streams
from attention_zoo.ops.triton.mixture_rows import (
    count_kernel,
    empty_slopes,
    list_kernel,
    mixing,
    spread_kernel,
    tokens_to_a_tile,
    unmixing,
)

__all__ = ["Attended", "Call", "attend", "attend_backward", "mixture_attention_triton"]

_LEAST_BESIDE = 2**35  # of `_cudnn.dense_work`; below, the host takes longer for two streams than the GPU gains by them


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
    entry = tl.load(Tiles.to(tl.pointer_type(tl.int64), bitcast=True) + tl.program_id(0))
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
    entry = tl.load(Tiles.to(tl.pointer_type(tl.int64), bitcast=True) + tl.program_id(0))
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


class _Sections(NamedTuple):
    """Where the tables of `list_kernel` begin in one tensor of int32, and how many numbers that has; entries of tiles have two."""

    tiles: int
    counts: int
    starts: int
    slots: int
    origins: int
    numbers: int

    @classmethod
    def of(cls, sequences: int, pairs: int, rows: int, sizes: tuple[int, ...]) -> _Sections:
        """`pairs`: of a token and a head, chosen or not; `sizes`: rows to a tile."""
        begins = [0]
        for length in (2 * sum(_most_tiles(rows, sequences, *sizes)), sequences, sequences + 1, pairs, rows):
            begins.append(begins[-1] + ceil_div(length, 4) * 4)  # each begins at 16 bytes
        tiles, counts, starts, slots, origins, end = begins
        return cls(tiles, counts, starts, slots, origins, end + 1)  # also a section of nothing begins in the tensor


def _most_tiles(rows: int, sequences: int, *sizes: int) -> tuple[int, ...]:
    """How many tiles of each size there can be, whatever was chosen."""
    return tuple(rows // size + sequences for size in sizes)


def _tile_sizes(dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Rows to a tile of the forward kernel and of that of queries' gradients."""
    return tuple(settings(kernel, dim, dtype).bm for kernel in ("forward", "query"))


def _pitch(dim: int, dtype: torch.dtype) -> int:
    """Channels of a packed row in memory: the copy engine takes multiples of 16 bytes."""
    unit = 16 // dtype.itemsize
    return ceil_div(dim, unit) * unit


class Call(NamedTuple):
    """What the launches of a call depend on.

    Attributes:
        batch, heads, kv_heads, tokens, keys, dim, dim_v: of queries, keys and values.
        routed, topk: how many heads can be chosen, and are.
        apart: how many of the heads that every token uses are computed by cuDNN's dense kernel, whole groups of them.
        scale, is_causal: of attention.
        q, k, v: where queries are, and the keys and values of all heads that are not apart; by (B, head, token).
        gates, chosen: their strides.
        precision: of products.
        dtypes: of queries, gates and choice.
        device: of all.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    dim: int
    dim_v: int
    routed: int
    topk: int
    apart: int
    scale: float
    is_causal: bool
    q: Place
    k: Place
    v: Place
    gates: tuple[int, ...]
    chosen: tuple[int, ...]
    precision: str
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    device: torch.device

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def packed_heads(self) -> int:
        """Key/value heads that are not apart."""
        return self.kv_heads - self.apart // self.group

    @property
    def rows(self) -> int:
        return self.batch * self.tokens * (self.heads - self.routed - self.apart + self.topk)

    @property
    def pitches(self) -> tuple[int, int]:
        """Of packed queries and of packed values."""
        return _pitch(self.dim, self.dtypes[0]), _pitch(self.dim_v, self.dtypes[0])

    def tiles(self) -> tuple[int, ...]:
        return _tile_sizes(max(self.dim, self.dim_v), self.dtypes[0])

    def sections(self) -> _Sections:
        sequences = self.batch * self.packed_heads
        return _Sections.of(sequences, sequences * self.tokens * self.group, self.rows, self.tiles())

    def parts(self) -> tuple[int, ...]:
        """Of heads: how many are apart, and key/value heads and groups of the others."""
        return self.apart, self.packed_heads, self.group

    def tiled(self, keys: Place, dim: int, length: int) -> Tiled:
        """Keys or values, aligned, read as tiles of `length` keys of one head."""
        shape = self.batch, self.packed_heads, self.keys, dim
        return Tiled(keys.tensor, keys.offset, (*keys.strides, 1), shape, (1, 1, length, tile(dim, 256)))

    def constants(self) -> dict[str, Any]:
        dims = {"BD": tile(self.dim, 256), "BDV": tile(self.dim_v, 256)}
        return {"CAUSAL": self.is_causal, "PRECISION": self.precision, **dims}


@dataclass(frozen=True, eq=False)
class _Forward:
    """Launches of q, k, v, gates, choice, tables, packed outputs and normalisers; sizes of the last three.

    Attributes:
        call: of which they are.
        sections: of the tables.
        rows, pitch: of the packed outputs, (rows, pitch).
        launches: what does not wait for the shared heads.
        computes: whether there is anything to attend to.
        beside: whether cuDNN's kernel runs beside them.
    """

    call: Call
    sections: _Sections
    rows: int
    pitch: int
    launches: tuple[Launch, ...]
    computes: bool
    beside: bool


@settled
def _forward_launches(call: Call) -> _Forward:
    sections, rows, (_, pitch), sizes = call.sections(), call.rows, call.pitches, call.tiles()
    sequences, group = call.batch * call.packed_heads, call.group
    tiles, counts, starts, slots, origins = (Place(5, offset) for offset in sections[:5])
    always = call.heads - call.routed - call.apart
    shared = (*call.chosen, call.tokens, call.packed_heads, group, always)
    block = tile(call.tokens * group, 4096)
    launches = []
    if sequences:
        each = {"BLOCK": block, "num_warps": 8}
        launches.append(Launch(count_kernel, (sequences,), (Place(4), counts), shared, each))
        numbers = *shared, sequences, rows, *_most_tiles(rows, sequences, *sizes)
        each |= {"BS": tile(sequences, 1 << 30), "BM": sizes[0], "BMQ": sizes[1], "CAUSAL": call.is_causal}
        places = Place(4), counts, starts, slots, origins, tiles
        launches.append(Launch(list_kernel, (sequences,), places, numbers, each))
    if rows and call.keys:
        own = settings("forward", max(call.dim, call.dim_v), call.dtypes[0])
        first = Place(call.q.tensor, call.q.offset + call.apart * call.q.strides[1])
        of_keys = call.tiled(call.k, call.dim, own.bn), call.tiled(call.v, call.dim_v, own.bn)
        factors: tuple[float, ...] = (*call.q.strides, call.scale * LOG2E, call.keys - call.tokens)
        sizes = call.tokens, call.keys, call.packed_heads, group, call.dim, call.dim_v, pitch
        read: tuple[Place | Tiled, ...] = (first, *of_keys, Place(6), Place(7), starts, origins, tiles)
        grid = _most_tiles(rows, sequences, own.bm)
        launches.append(Launch(_forward_kernel, grid, read, (*factors, *sizes), call.constants() | _tiling(own)))
    work = _cudnn.dense_work(call.batch, call.heads, call.tokens, call.keys, call.dim, call.is_causal)
    beside = call.apart > 0 and work >= _LEAST_BESIDE
    return _Forward(call, sections, rows, pitch, tuple(launches), bool(rows and call.keys), beside)


@settled
def _mix_launch(own: _Forward, shared: tuple[int, ...]) -> tuple[Launch, ...]:
    """Of gates, tables, packed outputs, shared ones and all."""
    call, pitch = own.call, own.pitch
    packed, slots = Place(2, 0, (pitch,)), Place(1, own.sections.slots)
    sizes = call.batch, call.heads, call.tokens, call.dim_v
    return mixing(sizes, call.parts(), Place(4), Place(3, 0, shared), packed, Place(0, 0, call.gates), slots)


class Attended(NamedTuple):
    """Of a forward.

    Attributes:
        out: (B, N, H, D_v).
        packed, lse: (rows, pitch) and (rows,), of the chosen pairs.
        plan: which row is which pair, see `list_kernel`; in sections.
        shared, shared_lse: of the heads that are apart.
    """

    out: Tensor
    packed: Tensor
    lse: Tensor
    plan: Tensor
    shared: Tensor
    shared_lse: Tensor


def attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, dense: tuple[Tensor, Tensor, Tensor]
) -> Attended:
    """What there is to know of a call with tensors where `call` says; `dense`: queries, keys and values of the heads apart."""
    own = _forward_launches(call)
    out = q.new_empty((call.batch, call.tokens, call.heads, call.dim_v))
    packed, lse = q.new_empty((own.rows, own.pitch)), q.new_empty((own.rows,), dtype=torch.float32)
    plan = q.new_empty((own.sections.numbers,), dtype=torch.int32)
    if not own.computes:
        packed.zero_()
        lse.fill_(float("-inf"))
    with two_streams(q, own.beside) as beside:
        shared, shared_lse = _dense_forward(*dense, call.dim_v, call.scale, call.is_causal)
        launch_all(own.launches, (q, k, v, gates, chosen, plan, packed, lse), beside)
    launch_all(_mix_launch(own, shared.stride()[:3]), (gates, plan, packed, shared, out))
    return Attended(out, packed, lse, plan, shared, shared_lse)


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, dim_v: int, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and normalisers of the heads that are apart; their strides are torch's choice, also of tensors without data."""
    if q.shape[1] == 0:
        return q.new_empty((q.shape[0], 0, q.shape[2], dim_v)), q.new_empty((0,), dtype=torch.float32)
    return _cudnn.dense_forward(q, k, v, scale=scale, is_causal=is_causal)


def _own_heads(x: Tensor, first: int, tensor: int) -> tuple[Tensor, Place]:
    """Heads from `first` on of x (B, H, M, D) as the copy engine can read them: steps of 16 bytes, no gaps between channels."""
    one, two, three, four = x.stride()
    unit = 16 // x.element_size()
    if four == 1 and one and two and three and not (one % unit or two % unit or three % unit or x.data_ptr() % 16):
        return x, Place(tensor, first * two, (one, two, three))
    batch, heads, keys, dim = x.shape
    own = x.new_empty((batch, heads - first, keys, _pitch(dim, x.dtype)))
    own[..., :dim].copy_(x[:, first:])
    return own, Place(tensor, 0, own.stride()[:3])


def _describe(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: tuple[tuple[int, ...], int, torch.dtype], topk: int, apart: int,
    scale: float, is_causal: bool,
) -> tuple[Call, Tensor, Tensor]:  # fmt: skip
    """The call, and the keys and values as it has them; `chosen`: strides, heads and dtype."""
    batch, heads, tokens, dim = q.shape
    kv_heads, keys, dim_v = v.shape[1:]
    some = apart // (heads // kv_heads)
    (own_k, of_k), (own_v, of_v) = _own_heads(k, some, 1), _own_heads(v, some, 2)
    call = Call(
        batch, heads, kv_heads, tokens, keys, dim, dim_v, chosen[1], topk, apart, scale, is_causal,
        Place(0, 0, q.stride()[:3]), of_k, of_v, gates.stride(), chosen[0],
        precision(q), (q.dtype, gates.dtype, chosen[2]), q.device,
    )  # fmt: skip
    return call, own_k, own_v


@operator("mixture_forward")
def _mixture_forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, topk: int, apart: int, scale: float, is_causal: bool,
    together: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Out (B, H, N, D_v); for the gradient, see `Attended`.

    apart: see `Call`.
    together: for the gradient, see `_mixture_backward`.
    """
    q = last_contiguous(q)
    chosen = chosen.view(torch.uint8) if chosen.dtype == torch.bool else chosen
    call, own_k, own_v = _describe(
        q, k, v, gates, (chosen.stride(), chosen.shape[-1], chosen.dtype), topk, apart, scale, is_causal
    )  # fmt: skip
    found = attend(call, q, own_k, own_v, gates, chosen, _apart(q, k, v, apart))
    return found.out.permute(0, 2, 1, 3), *found[1:]


def _apart(q: Tensor, k: Tensor, v: Tensor, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first heads."""
    some = apart // (q.shape[1] // k.shape[1])
    return q[:, :apart], k[:, :some], v[:, :some]


@_mixture_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, topk: int, apart: int, scale: float, is_causal: bool, *_: Any
) -> tuple[Tensor, ...]:
    batch, heads, tokens, dim = q.shape
    dim_v, group = v.shape[-1], heads // k.shape[1]
    rows, sequences = batch * tokens * (heads - chosen.shape[-1] - apart + topk), batch * (k.shape[1] - apart // group)
    sections = _Sections.of(sequences, sequences * tokens * group, rows, _tile_sizes(max(dim, dim_v), q.dtype))
    packed, lse = q.new_empty((rows, _pitch(dim_v, q.dtype))), q.new_empty((rows,), dtype=torch.float32)
    plan = q.new_empty((sections.numbers,), dtype=torch.int32)
    return heads_last(q, dim_v), packed, lse, plan, *_dense_forward(*_apart(q, k, v, apart), dim_v, scale, is_causal)


@dataclass(frozen=True, eq=False)
class _Backward:
    """Launches of a backward pass.

    Attributes:
        forward: the launches of its forward.
        places: of the gradients of q, k and v, of all heads, among the tensors of the launches.
        work: how many numbers of the queries' dtype are worked with: packed gradients of outputs, queries and their gradients.
        unmix: before all.
        packed: what does not wait for the shared heads.
    """

    forward: _Forward
    places: tuple[Place, Place, Place]
    work: int
    packed: tuple[Launch, ...]


_GRADIENTS = 11  # where the gradients of q, k and v stand among the tensors of a backward's launches


def _gradient_places(call: Call, together: bool) -> tuple[Place, Place, Place]:
    """Of q, k and v; `together`: in one tensor."""
    heads = call.heads, call.kv_heads, call.kv_heads
    if together:
        whole = sum(heads) * call.dim
        strides = call.tokens * whole, call.dim, whole
        return tuple(Place(_GRADIENTS, sum(heads[:i]) * call.dim, strides) for i in range(3))  # type: ignore[return-value]
    lengths, dims = (call.tokens, call.keys, call.keys), (call.dim, call.dim, call.dim_v)
    return tuple(  # type: ignore[return-value]
        Place(_GRADIENTS + i, 0, (length * n * dim, dim, n * dim))
        for i, (length, n, dim) in enumerate(zip(lengths, heads, dims, strict=True))
    )


@settled
def _backward_launches(call: Call, together: bool) -> _Backward:
    """Of q, k, v, gates, tables, packed outputs, their normalisers, outputs of shared heads, gradients of outputs, work, delta, the
    gradients of q, k and v, those of gates, of shared outputs, and, for `_spread_launch`, of shared q, k and v."""
    own, rows = _forward_launches(call), call.rows
    places, (pitch_q, pitch), group = _gradient_places(call, together), call.pitches, call.group
    some, sections = call.apart // group, own.sections
    launches = []
    if own.computes:
        packed_q, dpacked_q = Place(9, rows * pitch), Place(9, rows * (pitch + pitch_q))
        tiles, _, starts, slots, origins = (Place(4, offset) for offset in sections[:5])
        wide, dtype = max(call.dim, call.dim_v), call.dtypes[0]
        ahead, first, other = (settings(kernel, wide, dtype) for kernel in ("forward", "query", "key"))

        def read(size: Settings) -> tuple[Tiled, Tiled, Tiled, Tiled]:
            """Packed queries, keys, values and packed gradients, in tiles."""
            q = Tiled(9, packed_q.offset, (pitch_q, 1), (rows, call.dim), (size.bm, tile(call.dim, 256)))
            grad = Tiled(9, 0, (pitch, 1), (rows, call.dim_v), (size.bm, tile(call.dim_v, 256)))
            return q, call.tiled(call.k, call.dim, size.bn), call.tiled(call.v, call.dim_v, size.bn), grad

        before, most = _most_tiles(rows, call.batch * call.packed_heads, ahead.bm, first.bm)
        of_tiles, lse, delta = Place(4, tiles.offset + 2 * before), Place(6), Place(10)
        scale, offset = call.scale * LOG2E, call.keys - call.tokens
        sizes = call.tokens, call.keys, call.packed_heads, group, call.dim
        launches.append(
            Launch(
                _query_gradient_kernel, (most,), (*read(first), lse, delta, dpacked_q, starts, origins, of_tiles),
                (scale, offset, *sizes, pitch_q),
                call.constants() | _tiling(first),
            )
        )  # fmt: skip
        dk, dv = (Place(place.tensor, place.offset + some * place.strides[1]) for place in places[1:])
        blocks = ceil_div(call.keys, other.bn)
        launches.append(
            Launch(
                _key_gradient_kernel, (call.batch * call.packed_heads * blocks,),
                (*read(other), lse, delta, dk, dv, starts, slots, origins),
                (scale, offset, *places[1].strides, *places[2].strides, *sizes, call.dim_v, blocks),
                call.constants() | _tiling(other) | {"EARLY": other.early},
            )
        )  # fmt: skip
    return _Backward(own, places, rows * (2 * pitch_q + pitch), tuple(launches))


def _tiling(size: Settings) -> dict[str, Any]:
    return {"BM": size.bm, "BN": size.bn, "STAGES": size.stages, "num_warps": size.warps, "num_stages": size.stages}


@settled
def _unmix_launch(
    own: _Backward, grad: Place, shared: tuple[int, ...], dshared: tuple[int, ...], slopes: bool
) -> tuple[Launch, ...]:
    """Of the tensors of `_backward_launches`."""
    call, sections = own.forward.call, own.forward.sections
    pitch_q, pitch = call.pitches
    packed, dpacked, packed_q = Place(5, 0, (pitch,)), Place(9), Place(9, call.rows * pitch, (pitch_q,))
    sizes = call.batch, call.heads, call.tokens, call.dim, call.dim_v
    found = dpacked, packed_q, Place(14 if slopes else 10), Place(10)
    of_shared = Place(7, 0, shared), Place(15, 0, dshared)
    return unmixing(
        sizes, call.parts(), grad, call.q, *of_shared, packed, Place(3, 0, call.gates), Place(4, sections.slots), found, slopes
    )


@settled
def _spread_launch(own: _Backward, shared: tuple[tuple[int, ...], ...]) -> tuple[Launch, ...]:
    """Of the tensors of `_backward_launches`; `shared`: strides of the gradients of shared q, k and v."""
    call = own.forward.call
    pitch_q, pitch = call.pitches
    some = call.apart // call.group
    wide, tall = max(call.dim, call.dim_v), max(call.tokens, call.keys if call.apart else 0)
    bt, blocks = tokens_to_a_tile(tall, wide)
    dpacked_q, slots = Place(9, call.rows * (pitch + pitch_q)), Place(4, own.forward.sections.slots)
    of_shared = tuple(Place(16 + i, 0, strides) for i, strides in enumerate(shared))
    numbers = (
        *(step for place in (*own.places, *of_shared) for step in place.strides),
        call.tokens, call.keys, call.heads, some, *call.parts(), call.dim, call.dim_v, pitch_q, blocks,
    )  # fmt: skip
    grid, constants = (call.batch * blocks * (call.heads + 2 * some),), {"BT": bt, "BD": tile(wide, 256), "num_warps": 4}
    places = *own.places, *of_shared, dpacked_q, slots
    return (Launch(spread_kernel, grid, places, numbers, constants),) if grid[0] and call.tokens and call.dim else ()


def attend_backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, dense: tuple[Tensor, Tensor, Tensor], found: Attended,
    grad: Tensor, of_grad: tuple[int, ...], together: bool, wants_gates: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """Gradients of q, k and v, each (B, N, H, D), or `together`, (B, N, H + 2 H_kv, D); and those of gates, (B, N, H), or empty.

    Args:
        call, q, k, v, gates, dense: of the forward, which `found` the rest; of its outputs `out` is not looked at.
        grad: of the outputs; `of_grad`: its strides by (B, head, token).
    """
    own = _backward_launches(call, together)
    batch, tokens, keys = call.batch, call.tokens, call.keys
    if together:
        whole = q.new_empty((batch, tokens, call.heads + 2 * call.kv_heads, call.dim))
        gradients: tuple[Tensor, ...] = (whole, whole, whole)
    else:
        heads, dims = (call.heads, call.kv_heads, call.kv_heads), (call.dim, call.dim, call.dim_v)
        gradients = tuple(q.new_empty((batch, n, h, d)) for n, h, d in zip((tokens, keys, keys), heads, dims, strict=True))
    dgates = q.new_empty((batch, tokens, call.heads) if wants_gates else (0,), dtype=torch.float32)
    dshared, delta, work = torch.empty_like(found.shared), torch.empty_like(found.lse), q.new_empty((own.work,))
    if not own.forward.computes:
        for t in (work, *gradients):
            t.zero_()
    tensors = (
        q, k, v, gates, found.plan, found.packed, found.lse, found.shared, grad, work, delta, *gradients, dgates, dshared
    )  # fmt: skip
    grad_place = Place(8, 0, of_grad)
    launch_all(_unmix_launch(own, grad_place, found.shared.stride()[:3], dshared.stride()[:3], wants_gates), tensors)
    of_shared = dense
    with two_streams(q, own.forward.beside) as beside:
        if call.apart:
            of_shared = _cudnn.dense_backward(
                dshared, *dense, found.shared, found.shared_lse, scale=call.scale, is_causal=call.is_causal
            )  # fmt: skip
        launch_all(own.packed, tensors, beside)
    strides = tuple(t.stride()[:3] for t in of_shared)
    launch_all(_spread_launch(own, strides), (*tensors, *of_shared))
    return gradients[:1] if together else gradients, dgates


@operator("mixture_backward")
def _mixture_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, packed: Tensor, lse: Tensor, plan: Tensor, shared: Tensor,
    shared_lse: Tensor, routed: int, topk: int, scale: float, is_causal: bool, together: bool, wants_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and gates; if nobody `wants_gates`, of them an empty tensor.

    together: q, k and v lie in one tensor, and so do their gradients, which is the first that is returned: (B, N, H + 2 H_kv, D).
    """
    grad, q = last_contiguous(grad), last_contiguous(q)
    apart = shared.shape[1]
    call, own_k, own_v = _describe(q, k, v, gates, ((), routed, torch.uint8), topk, apart, scale, is_causal)
    found, dense = Attended(grad, packed, lse, plan, shared, shared_lse), _apart(q, k, v, apart)
    gradients, dgates = attend_backward(
        call, q, own_k, own_v, gates, dense, found, grad, grad.stride()[:3], together, wants_gates
    )  # fmt: skip
    if together:
        dq, dk, dv = gradients[0], q.new_empty((0,)), q.new_empty((0,))
    else:
        dq, dk, dv = (t.permute(0, 2, 1, 3) for t in gradients)
    return dq, dk, dv, dgates.permute(0, 2, 1) if wants_gates else dgates


@_mixture_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    together, wants_gates = rest[-2:]
    dgates = empty_slopes(gates, wants_gates)
    if together:
        batch, heads, tokens, dim = q.shape
        found = q.new_empty((batch, tokens, heads + 2 * k.shape[1], dim)), q.new_empty((0,)), q.new_empty((0,))
    else:
        found = heads_last(q), heads_last(k), heads_last(v)
    return *found, dgates.permute(0, 2, 1) if wants_gates else dgates


def _cut(whole: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """The gradients of q, k and v in one tensor."""
    return tuple(t.transpose(1, 2) for t in whole.split([heads, kv_heads, kv_heads], 2))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gates, chosen, ctx.topk, _, ctx.scale, ctx.is_causal, ctx.together = inputs
    ctx.routed = chosen.shape[-1]
    ctx.save_for_backward(q, k, v, gates, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, gates, *rest = ctx.saved_tensors
    wants_gates = ctx.needs_input_grad[3]
    dq, dk, dv, dgates = _mixture_backward(
        grad, q, k, v, gates, *rest, ctx.routed, ctx.topk, ctx.scale, ctx.is_causal, ctx.together, wants_gates
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
