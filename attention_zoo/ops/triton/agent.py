"""Agent attention as Triton kernels: a few agents read all tokens, and all tokens read the agents.

All agents of a head stand in one tile beside a tile of tokens. Agents that read: a program walks along a share of the tokens with a
running softmax, and a small kernel joins the shares. Tokens that read: the logits of a token are all in the tile. The gradients of
both come from one kernel along the tokens, which keeps the sums of the agents; a share of tokens leaves its sums in a place of its
own, to be added afterwards, so that there are no atomics and the result is the same every time. The gradients of biases are those
of the logits, added up over samples that share them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

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
    last_contiguous,
    per_logit,
    precision,
    read_lse,
    tile,
)
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = [
    "MOST_AGENTS",
    "Call",
    "Gradients",
    "add_samples_launch",
    "agents_read_launches",
    "few_keys_triton",
    "few_queries_triton",
    "tokens_read_launch",
]

MOST_AGENTS = 128  # that a tile takes
_PROGRAMS = 1024  # that a call is shared out to, where it has that much work: a few for each processor of any card
_FEW = 8  # agents of a program that adds up shares


@triton.jit
def _load_bias(Bias, tokens, agents, wanted, sbt, sbn):
    """A tile (tokens, agents) of the logits' bias, in base 2."""
    at = Bias + agents[None, :].to(tl.int64) * sbn + tokens[:, None] * sbt
    return tl.load(at, mask=wanted, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def _agents_read_kernel(
    A, K, V, Bias, Mask, Out, Lse, Sums, Peaks,
    scale,  # of the logits, times log2 e
    sab, sah, san, skb, skh, skt, svb, svh, svt, sbb, sbh, sbt, sbn, smb, sob, soh, son,
    HEADS, GROUP, N, T, D, DV, SHARES, SHARE,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh, share = pid // SHARES, pid % SHARES
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    i, d, dv = tl.arange(0, BA), tl.arange(0, BD), tl.arange(0, BDV)
    a = tl.load(A + b * sab + h * sah + i[:, None] * san + d[None, :], mask=(i < N)[:, None] & (d < D)[None, :], other=0.0)
    K += b * skb + (h // GROUP) * skh
    V += b * svb + (h // GROUP) * svh
    Bias += b * sbb + h * sbh
    highest = tl.full([BA], float("-inf"), tl.float32)
    total = tl.zeros([BA], tl.float32)
    acc = tl.zeros([BA, BDV], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, T), BT):
        t = start + tl.arange(0, BT)
        seen = t < T
        k = tl.load(K + t[None, :].to(tl.int64) * skt + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(V + t[:, None].to(tl.int64) * svt + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        x = tl.dot(a, k, input_precision=PRECISION) * scale
        if HAS_BIAS:
            at = Bias + i[:, None].to(tl.int64) * sbn + t[None, :] * sbt
            x += tl.load(at, mask=(i < N)[:, None] & seen[None, :], other=0.0).to(tl.float32) * 1.4426950408889634
        if HAS_MASK:
            seen = seen & (tl.load(Mask + b * smb + t, mask=seen, other=0) != 0)
        x = tl.where(seen[None, :], x, float("-inf"))
        p, fade, highest, total = absorb(x, highest, total)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    wanted = (i < N)[:, None] & (dv < DV)[None, :]
    if ALONE:
        out, lse = conclude(acc, highest, total)
        tl.store(Out + b * sob + h * soh + i[:, None] * son + dv[None, :], out.to(Out.dtype.element_ty), mask=wanted)
        tl.store(Lse + bh.to(tl.int64) * N + i, lse, mask=i < N)
    else:
        place = pid.to(tl.int64) * N + i
        tl.store(Sums + place[:, None] * DV + dv[None, :], acc, mask=wanted)
        tl.store(Peaks + place * 2, highest, mask=i < N)
        tl.store(Peaks + place * 2 + 1, total, mask=i < N)


@triton.jit
def _join_kernel(
    Sums, Peaks, Out, Lse, sob, soh, son, HEADS, N, DV, SHARES, TILES,
    BS: tl.constexpr, BN: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The softmax over all shares, for a few agents of one head."""
    pid = tl.program_id(0)
    bh, portion = pid // TILES, pid % TILES
    i, s, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BS), tl.arange(0, BDV)
    Sums += bh.to(tl.int64) * SHARES * N * DV
    Peaks += bh.to(tl.int64) * SHARES * N * 2
    highest = tl.full([BN], float("-inf"), tl.float32)
    for start in range(0, SHARES, BS):
        place = (start + s)[:, None] * N + i[None, :]
        there = (start + s < SHARES)[:, None] & (i < N)[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(Peaks + place * 2, mask=there, other=float("-inf")), 0))
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, BDV], tl.float32)
    for start in range(0, SHARES, BS):
        place = (start + s)[:, None] * N + i[None, :]
        there = (start + s < SHARES)[:, None] & (i < N)[None, :]
        weight = tl.exp2(tl.load(Peaks + place * 2, mask=there, other=float("-inf")) - anchor[None, :])
        total += tl.sum(weight * tl.load(Peaks + place * 2 + 1, mask=there, other=0.0), 0)
        sums = tl.load(
            Sums + place[:, :, None] * DV + dv[None, None, :], mask=there[:, :, None] & (dv < DV)[None, None, :], other=0.0
        )
        acc += tl.sum(weight[:, :, None] * sums, 0)
    out, lse = conclude(acc, highest, total)
    at = Out + (bh // HEADS).to(tl.int64) * sob + (bh % HEADS) * soh
    tl.store(at + i[:, None] * son + dv[None, :], out.to(Out.dtype.element_ty), mask=(i < N)[:, None] & (dv < DV)[None, :])
    tl.store(Lse + bh.to(tl.int64) * N + i, lse, mask=i < N)


@triton.jit
def _tokens_read_kernel(
    Q, A, F, Bias, Out,
    scale,
    sqb, sqh, sqt, sab, sah, san, sfb, sfh, sfn, sbb, sbh, sbt, sbn, sob, soh, sot,
    HEADS, N, T, D, DV, SHARES, SHARE,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh, share = pid // SHARES, pid % SHARES
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    i, d, dv = tl.arange(0, BA), tl.arange(0, BD), tl.arange(0, BDV)
    a = tl.load(A + b * sab + h * sah + i[None, :] * san + d[:, None], mask=(i < N)[None, :] & (d < D)[:, None], other=0.0)
    f = tl.load(F + b * sfb + h * sfh + i[:, None] * sfn + dv[None, :], mask=(i < N)[:, None] & (dv < DV)[None, :], other=0.0)
    Q += b * sqb + h * sqh
    Out += b * sob + h * soh
    Bias += b * sbb + h * sbh
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, T), BT):
        t = start + tl.arange(0, BT)
        wide = t[:, None].to(tl.int64)
        q = tl.load(Q + wide * sqt + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.dot(q, a, input_precision=PRECISION) * scale
        if HAS_BIAS:
            x += _load_bias(Bias, t, i, (t < T)[:, None] & (i < N)[None, :], sbt, sbn)
        x = tl.where((i < N)[None, :], x, float("-inf"))
        p = tl.exp2(x - tl.max(x, 1)[:, None])
        out = tl.dot(p.to(f.dtype), f, input_precision=PRECISION) / tl.sum(p, 1)[:, None]
        tl.store(Out + wide * sot + dv[None, :], out.to(Out.dtype.element_ty), mask=(t < T)[:, None] & (dv < DV)[None, :])


@triton.jit
def _gradient_kernel(
    X, Y, A, F, Out, Lse, Bias, Mask, DX, DY, DBias, Sums,
    scale,
    sxb, sxh, sxt, syb, syh, syt, sab, sah, san, sfb, sfh, sfn, sob, soh, son, sbb, sbh, sbt, sbn, smb,
    sdxb, sdxh, sdxt, sdyb, sdyh, sdyt,
    HEADS, GROUP, N, T, D, DV, SHARES, SHARE,
    TOKENS_READ: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Gradients of one of the two steps, along the tokens; in both the map is P = softmax(scale x a^T + bias).

    Tokens that read: x are queries, y the gradients of their outputs, f what the agents say; the softmax is over the agents, the
    sums are the gradients of a and f. Agents that read: x are keys, y values, f the gradients of the agents' outputs; the softmax
    is over the tokens, the sums are the gradients of a, and y has gradients too.
    """
    pid = tl.program_id(0)
    bh, share = pid // SHARES, pid % SHARES
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    i, d, dv = tl.arange(0, BA), tl.arange(0, BD), tl.arange(0, BDV)
    agent, agent_v = (i < N)[:, None] & (d < D)[None, :], (i < N)[:, None] & (dv < DV)[None, :]
    a = tl.load(A + b * sab + h * sah + i[:, None] * san + d[None, :], mask=agent, other=0.0)
    f = tl.load(F + b * sfb + h * sfh + i[:, None] * sfn + dv[None, :], mask=agent_v, other=0.0)
    if not TOKENS_READ:
        out = tl.load(Out + b * sob + h * soh + i[:, None] * son + dv[None, :], mask=agent_v, other=0.0)
        delta = tl.sum(out.to(tl.float32) * f.to(tl.float32), 1)
        lse = read_lse(Lse, bh.to(tl.int64) * N + i, i < N)
    X += b * sxb + (h // GROUP) * sxh
    Y += b * syb + (h // GROUP) * syh
    DX += b * sdxb + h * sdxh
    DY += b * sdyb + h * sdyh
    Bias += b * sbb + h * sbh
    DBias += bh.to(tl.int64) * N * T
    da = tl.zeros([BA, BD], tl.float32)
    df = tl.zeros([BA, BDV], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, T), BT):
        t = start + tl.arange(0, BT)
        wide, there = t[:, None].to(tl.int64), (t < T)[:, None]
        x = tl.load(X + wide * sxt + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        y = tl.load(Y + wide * syt + dv[None, :], mask=there & (dv < DV)[None, :], other=0.0)
        z = tl.dot(x, tl.trans(a), input_precision=PRECISION) * scale
        dp = tl.dot(y, tl.trans(f), input_precision=PRECISION)
        if HAS_BIAS:
            z += _load_bias(Bias, t, i, there & (i < N)[None, :], sbt, sbn)
        if TOKENS_READ:
            z = tl.where((i < N)[None, :], z, float("-inf"))
            p = tl.exp2(z - tl.max(z, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None]
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            df += tl.dot(tl.trans(p.to(y.dtype)), y, input_precision=PRECISION)
        else:
            seen = t < T
            if HAS_MASK:
                seen = seen & (tl.load(Mask + b * smb + t, mask=seen, other=0) != 0)
            p = tl.where(seen[:, None], tl.exp2(z - lse[None, :]), 0.0)
            ds = p * (dp - delta[None, :])
            dy = tl.dot(p.to(f.dtype), f, input_precision=PRECISION)
            tl.store(DY + wide * sdyt + dv[None, :], dy.to(DY.dtype.element_ty), mask=there & (dv < DV)[None, :])
        if HAS_DBIAS:
            at = DBias + i[None, :].to(tl.int64) * T + t[:, None]
            tl.store(at, ds.to(DBias.dtype.element_ty), mask=there & (i < N)[None, :])
        ds = ds.to(x.dtype)
        dx = tl.dot(ds, a, input_precision=PRECISION) * per_logit(scale)
        tl.store(DX + wide * sdxt + d[None, :], dx.to(DX.dtype.element_ty), mask=there & (d < D)[None, :])
        da += tl.dot(tl.trans(ds), x, input_precision=PRECISION)
    sums = Sums + (pid.to(tl.int64) * N + i)[:, None] * (D + DV)
    tl.store(sums + d[None, :], da * per_logit(scale), mask=agent)
    if TOKENS_READ:
        tl.store(sums + D + dv[None, :], df, mask=agent_v)


@triton.jit
def _add_shares_kernel(
    Sums, DA, DF, sdab, sdah, sdan, sdfb, sdfh, sdfn, HEADS, N, D, DV, SHARES, TILES,
    ADD: tl.constexpr, HAS_DF: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The gradients of a few agents of one head, from what each share of the tokens adds to them; `ADD`: those of a are added."""
    pid = tl.program_id(0)
    bh, portion = pid // TILES, pid % TILES
    b, h = (bh // HEADS).to(tl.int64), bh % HEADS
    i, s, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BDV)
    Sums += bh.to(tl.int64) * SHARES * N * (D + DV)
    da = tl.zeros([BN, BD], tl.float32)
    df = tl.zeros([BN, BDV], tl.float32)
    for start in range(0, SHARES, BS):
        at = Sums + ((start + s)[:, None] * N + i[None, :])[:, :, None] * (D + DV)
        there = ((start + s < SHARES)[:, None] & (i < N)[None, :])[:, :, None]
        da += tl.sum(tl.load(at + d[None, None, :], mask=there & (d < D)[None, None, :], other=0.0), 0)
        if HAS_DF:
            df += tl.sum(tl.load(at + D + dv[None, None, :], mask=there & (dv < DV)[None, None, :], other=0.0), 0)
    at = DA + b * sdab + h * sdah + i[:, None] * sdan + d[None, :]
    if ADD:
        da += tl.load(at, mask=(i < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(at, da.to(DA.dtype.element_ty), mask=(i < N)[:, None] & (d < D)[None, :])
    if HAS_DF:
        at = DF + b * sdfb + h * sdfh + i[:, None] * sdfn + dv[None, :]
        tl.store(at, df.to(DF.dtype.element_ty), mask=(i < N)[:, None] & (dv < DV)[None, :])


@triton.jit
def _add_samples_kernel(X, Out, SAMPLES, SIZE, BLOCK: tl.constexpr):
    """(samples, size) -> (size,)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(SAMPLES):
        acc += tl.load(X + place, mask=place < SIZE, other=0.0).to(tl.float32)
        X += SIZE
    tl.store(Out + place, acc.to(Out.dtype.element_ty), mask=place < SIZE)


def _empty(batch: int, heads: int, length: int, channels: int, like: Tensor) -> Tensor:
    """(B, H, length, channels), laid out with heads next to channels as projections read them."""
    return like.new_empty((batch, length, heads, channels)).transpose(1, 2)


class Call(NamedTuple):
    """What launches depend on, besides where tensors are; `number`: of agents, `group`: heads for one of keys and values."""

    batch: int
    heads: int
    group: int
    number: int
    tokens: int
    dim: int
    dim_v: int
    scale: float
    bytes: int
    precision: str

    @classmethod
    def of(cls, x: Tensor, dim_v: int, agents: Tensor, scale: float) -> Self:
        """Of tokens (B, H_kv, T, D) and agents (B, H, n, D)."""
        batch, heads, number, dim = agents.shape
        return cls(
            batch, heads, heads // x.shape[1], number, x.shape[2], dim, dim_v, scale, agents.element_size(), precision(agents)
        )

    def sizes(self) -> tuple[int, ...]:
        return self.number, self.tokens, self.dim, self.dim_v


class _Tiles(NamedTuple):
    """Sizes of the tiles of a call, and how it is run: the larger the tile of the agents, the fewer tokens beside it."""

    agents: int
    tokens: int
    channels: int
    channels_v: int
    warps: int
    stages: int

    @classmethod
    def of(cls, call: Call) -> _Tiles:
        ba, bd, bdv = tile(call.number, MOST_AGENTS), tile(call.dim, 256), tile(call.dim_v, 256)
        size = ba * max(bd, bdv)
        room = size * call.bytes
        most = 64 if room <= 16384 else 32 if room <= 32768 else 16
        return cls(ba, tile(call.tokens, most), bd, bdv, 4 if size <= 4096 else 8, 2 if room <= 16384 else 1)

    def constants(self) -> dict[str, int]:
        return {"BA": self.agents, "BT": self.tokens, "BD": self.channels, "BDV": self.channels_v, "num_warps": self.warps}


def _shares(pairs: int, tokens: int, bt: int, least: int = 2) -> tuple[int, int]:
    """How many programs share the tokens of a head, and how many tokens each has: whole tiles, some `least` tiles."""
    tiles = ceil_div(tokens, bt)
    share = max(least, ceil_div(tiles * pairs, _PROGRAMS))
    return ceil_div(tiles, share), share * bt


def _bias_strides(bias: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Of a bias broadcast to (B, H, n, T): for samples, heads, tokens, agents."""
    if bias is None:
        return 0, 0, 0, 0
    sample, head, agent, token = bias.expand(shape).stride()
    return sample, head, token, agent


# Launches. Places have strides by (B, H, tokens or agents), channels side by side; those of biases by (B, H, tokens, agents).


def agents_read_launches(
    call: Call, a: Place, k: Place, v: Place, bias: Place | None, mask: Place | None, out: Place, lse: Place, parts: int
) -> tuple[list[Launch], int]:
    """Launches, and how many numbers, float32, they take for parts of the softmax in the tensor `parts`."""
    tiles, pairs = _Tiles.of(call), call.batch * call.heads
    shares, share = _shares(pairs, call.tokens, tiles.tokens)
    alone, rows = shares == 1, pairs * shares * call.number
    sums, peaks = (lse, lse) if alone else (Place(parts), Place(parts, rows * call.dim_v))
    numbers = (
        call.scale * LOG2E, *a.strides, *k.strides, *v.strides, *(bias.strides if bias else (0, 0, 0, 0)),
        mask.strides[0] if mask else 0, *out.strides, call.heads, call.group, *call.sizes(), shares, share,
    )  # fmt: skip
    flags = {"HAS_BIAS": bias is not None, "HAS_MASK": mask is not None, "ALONE": alone, "PRECISION": call.precision}
    constants = {**flags, "num_stages": tiles.stages, **tiles.constants()}
    places = a, k, v, bias or a, mask or a, out, lse, sums, peaks
    launches = [Launch(_agents_read_kernel, (pairs * shares,), places, numbers, constants)]
    if not alone:
        portions = ceil_div(call.number, _FEW)
        numbers = *out.strides, call.heads, call.number, call.dim_v, shares, portions
        constants = {"BS": 8, "BN": _FEW, "BDV": tiles.channels_v, "num_warps": 4}
        launches.append(Launch(_join_kernel, (pairs * portions,), (sums, peaks, out, lse), numbers, constants))
    return launches, 0 if alone else rows * (call.dim_v + 2)


def tokens_read_launch(call: Call, q: Place, a: Place, f: Place, bias: Place | None, out: Place) -> Launch:
    tiles, pairs = _Tiles.of(call), call.batch * call.heads
    shares, share = _shares(pairs, call.tokens, tiles.tokens, 1)
    numbers = (
        call.scale * LOG2E, *q.strides, *a.strides, *f.strides, *(bias.strides if bias else (0, 0, 0, 0)), *out.strides,
        call.heads, *call.sizes(), shares, share,
    )  # fmt: skip
    constants = {"HAS_BIAS": bias is not None, "PRECISION": call.precision, "num_stages": tiles.stages, **tiles.constants()}
    return Launch(_tokens_read_kernel, (pairs * shares,), (q, a, f, bias or q, out), numbers, constants)


class Gradients(NamedTuple):
    """Places of what `_gradient_kernel` names, and of the gradients of a and f; None: there is none, or it is not wanted."""

    x: Place
    y: Place
    a: Place
    f: Place
    out: Place | None
    lse: Place | None
    bias: Place | None
    mask: Place | None
    dx: Place
    dy: Place
    dlogits: Place | None
    sums: Place
    da: Place
    df: Place | None

    def launches(self, call: Call, *, add: bool = False) -> tuple[list[Launch], int]:
        """Tokens read where there is no `out`. `add`: to what `da` has. Returns the launches, and how many numbers `sums` has."""
        tiles, pairs, tokens_read = _Tiles.of(call), call.batch * call.heads, self.out is None
        shares, share = _shares(pairs, call.tokens, tiles.tokens)
        x, f, bias, mask = self.x, self.f, self.bias, self.mask
        read = (x, self.y, self.a, f, self.out or f)
        numbers = (
            call.scale * LOG2E, *(s for place in read for s in place.strides), *(bias.strides if bias else (0, 0, 0, 0)),
            mask.strides[0] if mask else 0, *self.dx.strides, *self.dy.strides,
            call.heads, call.group, *call.sizes(), shares, share,
        )  # fmt: skip
        constants = {
            "TOKENS_READ": tokens_read, "HAS_BIAS": bias is not None, "HAS_DBIAS": self.dlogits is not None,
            "HAS_MASK": mask is not None, "PRECISION": call.precision, "num_stages": tiles.stages, **tiles.constants(),
        }  # fmt: skip
        places = *read, self.lse or f, bias or x, mask or x, self.dx, self.dy, self.dlogits or x, self.sums
        first = Launch(_gradient_kernel, (pairs * shares,), places, numbers, constants)
        portions, df = ceil_div(call.number, _FEW), self.df or self.da
        rows = {"BS": 8 if max(call.dim, call.dim_v) <= 64 else 2, "BN": _FEW, "BD": tiles.channels, "BDV": tiles.channels_v}
        second = Launch(
            _add_shares_kernel,
            (pairs * portions,),
            (self.sums, self.da, df),
            (*self.da.strides, *df.strides, call.heads, call.number, call.dim, call.dim_v, shares, portions),
            {"ADD": add, "HAS_DF": tokens_read, **rows, "num_warps": 4},
        )
        return [first, second], pairs * shares * call.number * (call.dim + call.dim_v)


def add_samples_launch(samples: int, size: int, x: Place, out: Place) -> Launch:
    """(samples, size) -> (size,)."""
    return Launch(_add_samples_kernel, (ceil_div(size, 1024),), (x, out), (samples, size), {"BLOCK": 1024, "num_warps": 4})


# Of tensors that stand alone, by their strides; `key`: dtypes and device.


@settled
def _agents_read_of(
    call: Call, flags: tuple[bool, bool], strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None
) -> tuple[list[Launch], int]:
    a, k, v, bias, mask, out = (Place(number, 0, of) for number, of in enumerate(strides))
    return agents_read_launches(call, a, k, v, bias if flags[0] else None, mask if flags[1] else None, out, Place(6), 7)


@settled
def _tokens_read_of(
    call: Call, has_bias: bool, strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None
) -> Launch:
    q, a, f, bias, out = (Place(number, 0, of) for number, of in enumerate(strides))
    return tokens_read_launch(call, q, a, f, bias if has_bias else None, out)


@settled
def _gradients_of(
    call: Call, flags: tuple[bool, bool, bool, bool], strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None
) -> tuple[list[Launch], int]:
    x, y, a, f, out, bias, mask, dx, dy, da, df = (Place(number, 0, of) for number, of in enumerate(strides))
    tokens_read, has_bias, has_mask, wants_bias = flags
    return Gradients(
        x, y, a, f, None if tokens_read else out, None if tokens_read else Place(11), bias if has_bias else None,
        mask if has_mask else None, dx, dy, Place(12) if wants_bias else None, Place(13), da, df if tokens_read else None,
    ).launches(call)  # fmt: skip


@operator("agents_read_forward")
def _agents_read_forward(
    agents: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    agents, k, v = last_contiguous(agents), last_contiguous(k), last_contiguous(v)
    (batch, heads, number, _), tokens, dim_v = agents.shape, k.shape[2], v.shape[-1]
    out, lse = _empty(batch, heads, number, dim_v, v), agents.new_empty((batch, heads, number), dtype=torch.float32)
    if not out.numel():
        return out, lse
    if not tokens:
        return out.zero_(), lse.fill_(-torch.inf)
    of_bias = _bias_strides(bias, (batch, heads, number, tokens))
    of_mask = (0,) if mask is None else (mask.stride(0),)
    strides = agents.stride()[:3], k.stride()[:3], v.stride()[:3], of_bias, of_mask, out.stride()[:3]
    key = agents.dtype, None if bias is None else bias.dtype, None if mask is None else mask.dtype, agents.device
    flags = bias is not None, mask is not None
    launches, number = _agents_read_of(Call.of(k, dim_v, agents, scale), flags, strides, *key)
    parts = lse if not number else lse.new_empty(number)
    given = agents, k, v, agents if bias is None else bias, agents if mask is None else mask
    launch_all(launches, (*given, out, lse, parts))
    return out, lse


@_agents_read_forward.register_fake
def _(agents: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, number = agents.shape[:3]
    out = _empty(batch, heads, number, v.shape[-1], v)
    return out, agents.new_empty((batch, heads, number), dtype=torch.float32)


@operator("agents_read_backward")
def _agents_read_backward(
    agents: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    scale: float, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of agents, keys, values and (else empty) the bias."""
    dx, dy, da, _, dbias = _gradients(k, v, agents, grad, bias, mask, out, lse, scale, wants_bias)
    group = agents.shape[1] // k.shape[1]
    if group > 1:
        dx, dy = (t.unflatten(1, (k.shape[1], group)).sum(2) for t in (dx, dy))
    return da, dx, dy, dbias


@_agents_read_backward.register_fake
def _(
    agents: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, out: Tensor, lse: Tensor, grad: Tensor, scale: float,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dy, da, _, dbias = _empty_gradients(k, v, agents, grad, bias, wants_bias)
    if agents.shape[1] > k.shape[1]:
        dx, dy = (t.unflatten(1, (k.shape[1], -1)).sum(2) for t in (dx, dy))
    return da, dx, dy, dbias


@operator("tokens_read_forward")
def _tokens_read_forward(q: Tensor, agents: Tensor, read: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    q, agents, read = last_contiguous(q), last_contiguous(agents), last_contiguous(read)
    (batch, heads, tokens, _), number, dim_v = q.shape, agents.shape[2], read.shape[-1]
    out = _empty(batch, heads, tokens, dim_v, q)
    if out.numel():
        of_bias = _bias_strides(bias, (batch, heads, number, tokens))
        strides = q.stride()[:3], agents.stride()[:3], read.stride()[:3], of_bias, out.stride()[:3]
        key = q.dtype, None if bias is None else bias.dtype, q.device
        launch = _tokens_read_of(Call.of(q, dim_v, agents, scale), bias is not None, strides, *key)
        launch(q, agents, read, q if bias is None else bias, out)
    return out


@_tokens_read_forward.register_fake
def _(q: Tensor, agents: Tensor, read: Tensor, bias: Any, scale: float) -> Tensor:
    batch, heads, tokens = q.shape[:3]
    return _empty(batch, heads, tokens, read.shape[-1], q)


@operator("tokens_read_backward")
def _tokens_read_backward(
    q: Tensor, agents: Tensor, read: Tensor, bias: Tensor | None, grad: Tensor, scale: float, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, agents, what they say, and (else empty) the bias."""
    dx, _, da, df, dbias = _gradients(q, grad, agents, read, bias, None, None, None, scale, wants_bias)
    return dx, da, df, dbias


@_tokens_read_backward.register_fake
def _(
    q: Tensor, agents: Tensor, read: Tensor, bias: Any, grad: Tensor, scale: float, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, _, da, df, dbias = _empty_gradients(q, grad, agents, read, bias, wants_bias)
    return dx, da, df, dbias


def _empty_gradients(
    x: Tensor, y: Tensor, agents: Tensor, f: Tensor, bias: Tensor | None, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_gradients` returns."""
    (batch, heads, number, dim), tokens, dim_v = agents.shape, x.shape[2], y.shape[-1]
    dx, dy = _empty(batch, heads, tokens, dim, x), _empty(batch, heads, tokens, dim_v, y)
    da, df = _empty(batch, heads, number, dim, agents), _empty(batch, heads, number, dim_v, f)
    of_bias = (0,) if bias is None or not wants_bias else bias.shape
    return dx, dy, da, df, x.new_empty(of_bias, dtype=x.dtype if bias is None else bias.dtype)


def _gradients(
    x: Tensor, y: Tensor, agents: Tensor, f: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor | None,
    lse: Tensor | None, scale: float, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `_gradient_kernel` says, with the letters that it has: gradients of x, y, a, f and the bias.

    Those of y where agents read, those of f where tokens do; the others of the two are not filled.
    """
    x, y, agents, f = last_contiguous(x), last_contiguous(y), last_contiguous(agents), last_contiguous(f)
    (batch, heads, number, dim), tokens, dim_v = agents.shape, x.shape[2], y.shape[-1]
    tokens_read = out is None
    shape = (batch, heads, number, tokens)
    dx = _empty(batch, heads, tokens, dim, x)
    dy = dx if tokens_read else _empty(batch, heads, tokens, dim_v, y)
    da = _empty(batch, heads, number, dim, agents)
    df = _empty(batch, heads, number, dim_v, f) if tokens_read else da
    dlogits = x.new_empty(shape if wants_bias else (0,))
    if not x.numel() or not agents.numel():
        return dx.zero_(), dy.zero_(), da.zero_(), df.zero_(), _of_bias(dlogits, bias)
    given = x, y, agents, f, f if out is None else out
    strides = (
        *(t.stride()[:3] for t in given), _bias_strides(bias, shape), (0,) if mask is None else (mask.stride(0),),
        *(t.stride()[:3] for t in (dx, dy, da, df)),
    )  # fmt: skip
    flags = tokens_read, bias is not None, mask is not None, wants_bias
    key = x.dtype, None if bias is None else bias.dtype, None if mask is None else mask.dtype, x.device
    launches, numbers = _gradients_of(Call.of(x, dim_v, agents, scale), flags, strides, *key)
    sums = x.new_empty(numbers, dtype=torch.float32)
    others = x if bias is None else bias, x if mask is None else mask, dx, dy, da, df, f if lse is None else lse
    launch_all(launches, (*given, *others, dlogits if wants_bias else x, sums))
    return dx, dy, da, df, _of_bias(dlogits, bias)


def _of_bias(dlogits: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of the bias, added up over what shares it."""
    if bias is None or not dlogits.numel():
        return dlogits if bias is None or dlogits.ndim == 1 else dlogits.new_zeros(bias.shape, dtype=bias.dtype)
    if bias.shape[0] == 1 < dlogits.shape[0]:
        samples, size = dlogits.shape[0], dlogits[0].numel()
        dlogits, parts = dlogits.new_empty((1, *dlogits.shape[1:]), dtype=bias.dtype), dlogits
        add_samples_launch(samples, size, Place(0), Place(1))(parts, dlogits)
    return dlogits.sum_to_size(bias.shape).to(bias.dtype)


def _setup_agents_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.scale = inputs[5]
    ctx.mark_non_differentiable(output[1])


def _backward_agents_read(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    agents, k, v, bias, mask, out, lse = ctx.saved_tensors
    wants_bias = bias is not None and ctx.needs_input_grad[3]
    da, dk, dv, dbias = _agents_read_backward(agents, k, v, bias, mask, out, lse, grad, ctx.scale, wants_bias)
    return da, dk, dv, dbias if wants_bias else None, None, None


def _setup_tokens_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


def _backward_tokens_read(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, agents, read, bias = ctx.saved_tensors
    wants_bias = bias is not None and ctx.needs_input_grad[3]
    dq, da, df, dbias = _tokens_read_backward(q, agents, read, bias, grad, ctx.scale, wants_bias)
    return dq, da, df, dbias if wants_bias else None, None


_agents_read_forward.register_autograd(_backward_agents_read, setup_context=_setup_agents_read)
_tokens_read_forward.register_autograd(_backward_tokens_read, setup_context=_setup_tokens_read)


def few_queries_triton(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """Attention of at most `MOST_AGENTS` queries (B, H, n, D) to k (B, H_kv, T, D) and v; bias up to (B, H, n, T), mask (B, T)."""
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    out: Tensor = _agents_read_forward(q, k, v, bias, mask, scale)[0]
    return out


def few_keys_triton(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of q (B, H, T, D) to at most `MOST_AGENTS` keys (B, H, n, D) and their values; bias up to (B, H, T, n)."""
    out: Tensor = _tokens_read_forward(q, k, v, None if bias is None else bias.transpose(-2, -1), scale)
    return out
