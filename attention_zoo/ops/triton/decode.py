"""Attention of few queries to many keys as Triton kernels: the keys are split between programs, whose results are merged then.

A program has a portion of one key/value head's keys and all the queries that read it: the rows of one tile are those of the query
heads that share it, evenly or by a map of heads; values may be of another width. In differential attention the noise queries are
rows behind the signal queries: a logit is the sum of two products, with 0 in place of the other kind's queries, so that one softmax
and one product with the values serve both kinds. No gradients.
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
    precision,
    stride_unit,
    tile,
)
from attention_zoo.ops.triton._launch import VaryingLaunch, settled
from attention_zoo.ops.triton._portions import Split, merge_kernel, merge_tiles, merged, processors, room, split_keys

__all__ = ["decode_attention", "decode_difference"]


@triton.jit(
    do_not_specialize=[
        "sqb", "sqh", "sqn", "skb", "skh", "skn", "svb", "svh", "svn", "snb", "snh", "snn", "slb", "slh", "sln",
        "sob", "soh", "son", "sab", "smb", "KEYS", "CHUNK", "PARTS",
    ]
)  # fmt: skip
def _portion_kernel(
    Q, K, V, NoiseQ, NoiseK, Map, Mask, Part, PartLse,
    scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, snb, snh, snn, slb, slh, sln, sob, soh, son, sab, smb,
    KEYS, CHUNK, PARTS,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, NOISE_SHARE: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, MAPPED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Strides are counted in UNITs, which the kernel knows to divide them: loads are as wide then as where they are known.

    A portion of the WHOLE keys is the output itself, where strides sob, soh and son say.
    """
    pid = tl.program_id(0)
    block, part, g = pid % BLOCKS, pid // BLOCKS % PARTS, (pid // BLOCKS // PARTS % KV_HEADS).to(tl.int64)
    b = (pid // BLOCKS // PARTS // KV_HEADS).to(tl.int64)
    rows, d, dv = block * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    query = rows % QUERIES
    signal = rows < SHARE * QUERIES
    if MAPPED:  # the rows are those of all heads, and most of them others'
        h = rows // QUERIES
        signal = tl.load(Map + b * sab + h, mask=signal, other=-1) == g
    else:
        h = g * SHARE + rows // QUERIES
    q = tl.load(
        Q + (b * sqb + h * sqh + query * sqn)[:, None] * UNIT + d[None, :], mask=signal[:, None] & (d < D)[None, :], other=0.0
    )  # fmt: skip
    real = signal
    if NOISE_SHARE > 0:
        noise = (rows >= SHARE * QUERIES) & (rows < (SHARE + NOISE_SHARE) * QUERIES)
        m = g * NOISE_SHARE + rows // QUERIES - SHARE
        noise_q = tl.load(
            NoiseQ + (b * snb + m * snh + query * snn)[:, None] * UNIT + d[None, :],
            mask=noise[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        h = tl.where(noise, KV_HEADS * SHARE + m, h)
        real = signal | noise
    first = (part * CHUNK).to(tl.int64)
    length = tl.minimum(CHUNK, KEYS - part * CHUNK)
    if MAPPED:  # nobody reads these keys
        length = tl.where(tl.max(signal.to(tl.int32), 0) > 0, length, 0)
    key_step, noise_step, value_step = skn * UNIT, sln * UNIT, svn * UNIT
    K += (b * skb + g * skh) * UNIT + first * key_step
    NoiseK += (b * slb + g * slh) * UNIT + first * noise_step
    V += (b * svb + g * svh) * UNIT + first * value_step
    Mask += b * smb + first
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for start in range(0, length, BN):
        n = start + tl.arange(0, BN)
        there = n < length
        k = tl.load(K + n[None, :] * key_step + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        x = tl.dot(q, k, input_precision=PRECISION)
        if NOISE_SHARE > 0:
            k = tl.load(NoiseK + n[None, :] * noise_step + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
            x = tl.dot(noise_q, k, x, input_precision=PRECISION)
        seen = there[None, :]
        if MASKED:
            seen = seen & (tl.load(Mask + n, mask=there, other=0) != 0)[None, :]
        if CAUSAL:
            seen = seen & ((first + n)[None, :] <= (query + KEYS - QUERIES)[:, None])
        p, fade, highest, total = absorb(tl.where(seen, x * scale, float("-inf")), highest, total)
        v = tl.load(V + n[:, None] * value_step + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out, lse = conclude(acc, highest, total)
    if WHOLE:
        at = Part + (b * sob + h * soh + query * son)[:, None] + dv[None, :]
        tl.store(at, out.to(Part.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    else:
        heads = SHARE if MAPPED else KV_HEADS * (SHARE + NOISE_SHARE)
        place = ((b * heads + h) * QUERIES + query) * PARTS + part
        tl.store(Part + place[:, None] * DV + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])
        tl.store(PartLse + place, lse, mask=real)


@triton.jit(do_not_specialize=["sfb", "sfh", "sfn", "sob", "soh", "son", "PARTS"])
def _difference_kernel(
    Part, PartLse, Factor, Weight, Out,
    gain, eps, sfb, sfh, sfn, sob, soh, son, PARTS,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DV: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, BP: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of one query of a signal head: its portions merged, less those of its noise head, normalised."""
    row = tl.program_id(0).to(tl.int64)
    b, h, query, dv = row // QUERIES // HEADS, row // QUERIES % HEADS, row % QUERIES, tl.arange(0, BDV)
    before = b * (HEADS + HEADS // GROUP)  # heads of earlier samples, of either kind
    x, _ = merged(Part, PartLse, (before + h) * QUERIES + query, PARTS, DV, BP, BDV)
    noise, _ = merged(Part, PartLse, (before + HEADS + h // GROUP) * QUERIES + query, PARTS, DV, BP, BDV)
    x -= tl.load(Factor + b * sfb + h * sfh + query * sfn).to(tl.float32) * noise
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / DV + eps)
        if WEIGHTED:
            x *= tl.load(Weight + dv, mask=dv < DV, other=0.0).to(tl.float32)
        x *= gain
    tl.store(Out + b * sob + h * soh + query * son + dv, x.to(Out.dtype.element_ty), mask=dv < DV)


class _Plan(NamedTuple):
    """What all calls of a size do, and of up to 63 keys more.

    Attributes:
        whole, partial: the kernel whose one portion is the output, and the one whose portions are merged.
        programs: for each portion of `chunk` keys.
    """

    whole: VaryingLaunch
    partial: VaryingLaunch
    programs: int
    chunk: int


@settled
def _plan(
    processors: int, device: torch.device, dtype: torch.dtype, precision: str, unit: int, batch: int, kv_heads: int, share: int,
    noise_share: int, queries: int, keys: int, dim: int, dim_v: int, mapped: bool, masked: bool, causal: bool,
) -> _Plan:  # fmt: skip
    rows = (share + noise_share) * queries
    height = tile(rows, 64 if dtype.itemsize == 2 else 16)
    blocks = ceil_div(rows, height)
    programs = batch * kv_heads * blocks
    split = split_keys(programs, keys, processors, room(device))
    constants = {
        "KV_HEADS": kv_heads, "SHARE": share, "NOISE_SHARE": noise_share, "QUERIES": queries, "D": dim, "DV": dim_v,
        "MAPPED": mapped, "MASKED": masked, "CAUSAL": causal, "UNIT": unit, "PRECISION": precision, "BLOCKS": blocks, "BM": height,
    }  # fmt: skip
    constants |= _tiling(height, tile(dim, 256), tile(dim_v, 256), noise_share > 0, dtype.itemsize, split)
    one, several = (_portions_launch(device, dtype, (*constants.items(), ("WHOLE", whole))) for whole in (True, False))
    return _Plan(one, several, programs, split.chunk)


def _tiling(height: int, dim: int, dim_v: int, paired: bool, size: int, split: Split) -> dict[str, int]:
    """How many keys at a time, 32 KB of them or 64, and how many tiles are on their way at once."""
    each = ((2 if paired else 1) * dim + dim_v) * size
    reads = size == 2 and height < 64  # or else it computes as well
    fitting = (64 if reads and split.large_tiles else 32) * 1024 // each
    side, most = 32, 256 if reads else 64 if size == 2 else 32
    while 2 * side <= min(fitting, most) and (side < 64 or 8 * side <= split.chunk):  # the last tile is read as a whole
        side *= 2
    warps = 8 if height * dim_v > 8192 else 4
    stages = split.stages if reads else 2
    return {"BN": side, "BD": dim, "BDV": dim_v, "num_warps": warps, "num_stages": stages}


@settled
def _portions_launch(device: torch.device, dtype: torch.dtype, constants: tuple[tuple[str, Any], ...]) -> VaryingLaunch:
    return VaryingLaunch(_portion_kernel, dict(constants))


@settled
def _merge_launch(device: torch.device, dtype: torch.dtype, **constants: Any) -> VaryingLaunch:
    return VaryingLaunch(merge_kernel, {**constants, "KEEP": False, **merge_tiles(tile(constants["DV"], 256))})


@settled
def _difference_launch(device: torch.device, dtypes: tuple[torch.dtype, ...], **constants: Any) -> VaryingLaunch:
    return VaryingLaunch(_difference_kernel, {**constants, **merge_tiles(tile(constants["DV"], 256))})


def _attend(
    q: Tensor, k: Tensor, v: Tensor, noise: tuple[Tensor, Tensor] | None, head_map: Tensor | None, key_mask: Tensor | None,
    is_causal: bool, scale: float, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, heads, N_q, parts, D_v) of each portion of the keys, noise heads behind signal heads, and log-normalisers.

    If there is one portion only, its outputs are `out`, which is what comes back then.
    """
    (batch, heads, queries, dim), (kv_heads, keys, dim_v) = q.shape, v.shape[1:]
    noises = 0 if noise is None else noise[0].shape[1]
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    noise = (q, k) if noise is None else (last_contiguous(noise[0]), last_contiguous(noise[1]))
    steps = [step for t in (q, k, v, *noise) for step in t.stride()[:3]]
    unit = stride_unit(steps, q.element_size())
    share, mapped, masked = heads if head_map is not None else heads // kv_heads, head_map is not None, key_mask is not None
    plan = _plan(
        processors(q.device), q.device, q.dtype, precision(q), unit, batch, kv_heads, share, noises // kv_heads, queries,
        ceil_div(keys, 64) * 64, dim, dim_v, mapped, masked, is_causal and queries > 1,
    )  # fmt: skip
    parts = ceil_div(keys, plan.chunk)
    if whole := parts == 1 and out is not None:
        part = part_lse = out
    else:
        part = q.new_empty((batch, heads + noises, queries, parts, dim_v), dtype=torch.float32)
        part_lse = q.new_empty((batch, heads + noises, queries, parts), dtype=torch.float32)
    if not part.numel():
        return part, part_lse
    head_map = head_map if head_map is None or head_map.stride(-1) == 1 else head_map.contiguous()
    key_mask = None if key_mask is None else last_contiguous(key_mask).view(torch.uint8)
    launch = plan.whole if whole else plan.partial
    launch(
        plan.programs * parts,
        (q, k, v, *noise, q if head_map is None else head_map, q if key_mask is None else key_mask, part, part_lse),
        (scale * LOG2E, *[step // unit for step in steps], *part.stride()[:3], _step(head_map), _step(key_mask),
         keys, plan.chunk, parts),
    )  # fmt: skip
    return part, part_lse


def _step(x: Tensor | None) -> int:
    """From one sample's row to the next one's; 0 where all have the same."""
    return 0 if x is None or x.ndim == 1 or x.shape[0] == 1 else x.stride(0)


@operator("decode_attention")
def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: Tensor | None, key_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    out = heads_last(q, v.shape[3])
    if not out.numel():
        return out
    part, part_lse = _attend(q, k, v, None, head_map, key_mask, is_causal, scale, out)
    if part is out:
        return out
    launch = _merge_launch(q.device, q.dtype, HEADS=q.shape[1], QUERIES=q.shape[2], DV=v.shape[3])
    launch(q.shape[0] * q.shape[1] * q.shape[2], (part, part_lse, out, part_lse), (*out.stride()[:3], part.shape[3]))
    return out


@_decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, head_map: Tensor | None, key_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return heads_last(q, v.shape[3])


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, head_map: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention (B, H, N_q, D_v) of tensors that need no gradient.

    Query heads share the H_kv key/value heads evenly, or read those that `head_map` names, int64 (H,) or (B, H). `key_mask`,
    boolean (B, N_k) or (1, N_k), is true for the keys that may be seen.
    """
    return _decode_attention(q, k, v, head_map, key_mask, is_causal, float(scale))


@operator("decode_difference")
def _decode_difference(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    key_mask: Tensor | None, is_causal: bool, scale: float, gain: float, eps: float, norm: bool,
) -> Tensor:  # fmt: skip
    out = heads_last(q, v.shape[3])
    if not out.numel():
        return out
    batch, heads, queries, dim_v = out.shape
    part, part_lse = _attend(q, k, v, (noise_q, noise_k), None, key_mask, is_causal, scale)
    weighted, weight = weight is not None, factor if weight is None else weight
    launch = _difference_launch(
        q.device, (q.dtype, factor.dtype, weight.dtype), HEADS=heads, GROUP=heads // noise_q.shape[1], QUERIES=queries, DV=dim_v,
        NORM=norm, WEIGHTED=weighted,
    )  # fmt: skip
    launch(
        batch * heads * queries, (part, part_lse, factor, weight, out),
        (gain, eps, *(factor.stride() if factor.ndim else (0, 0, 0)), *out.stride()[:3], part.shape[3]),
    )  # fmt: skip
    return out


@_decode_difference.register_fake
def _(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    key_mask: Tensor | None, is_causal: bool, scale: float, gain: float, eps: float, norm: bool,
) -> Tensor:  # fmt: skip
    return heads_last(q, v.shape[3])


def decode_difference(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None, *,
    key_mask: Tensor | None, is_causal: bool, scale: float, gain: float, eps: float | None,
) -> Tensor:  # fmt: skip
    """Differential attention of tensors as `differential_attention` has checked them, which need no gradient.

    The factor is a scalar or (B, S, N_q); without `eps` there is no norm. `key_mask` as for `decode_attention`.
    """
    norm = eps is not None
    return _decode_difference(
        q, noise_q, k, noise_k, v, factor, weight if norm else None, key_mask, is_causal, float(scale),
        float(gain) if norm else 1.0, float(eps or 0.0), norm,
    )  # fmt: skip
