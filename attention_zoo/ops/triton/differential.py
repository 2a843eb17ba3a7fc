"""Differential attention as Triton kernels: the difference of two attentions' outputs with its norm, and both maps in one pass.

The difference (`_subtract_kernel` and its backward) reads each output once: a program has some tokens of one group of heads and
holds the group's noise while it goes through its signal heads. Sums over all tokens are added up in two steps, without atomics.

In one pass, where each signal head has a noise head of its own, a program reads the values once for both softmaxes. The gradients
of the two outputs are one tensor but for a factor of each row, -lambda: the backward multiplies it by the values once for both,
and the values' gradient comes from the difference of the weights. Queries and keys have a kernel each for their gradients.
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
    power_of_2,
    precision,
    read_lse,
    tile,
)
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = [
    "difference_factor_triton",
    "differential_attention_triton",
    "gradients_of_settings",
    "launch_subtract",
    "launch_subtract_gradient",
    "subtract_noise_triton",
]

_TOKENS = 64  # that a program of the difference's backward goes through, adding up what is common to them


# --- the difference ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_rms(x, real, eps, DV):
    return tl.where(real, tl.rsqrt(tl.sum(x * x, 1) / DV + eps), 0.0)


@triton.jit
def _subtract_kernel(
    Signal, Noise, Factor, Weight, Out,
    gain, eps,
    ssb, ssm, ssh, ssn, snb, snm, snn, sfb, sfh, sfn, sob, soh, son,
    GROUPS, GROUP, TOKENS, DV,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    portions = tl.cdiv(TOKENS, BM)
    portion, bm = tl.program_id(0) % portions, tl.program_id(0) // portions
    b, m = (bm // GROUPS).to(tl.int64), bm % GROUPS
    n, c = (portion * BM + tl.arange(0, BM)).to(tl.int64), tl.arange(0, BDV)
    real = n < TOKENS
    wanted = real[:, None] & (c < DV)[None, :]
    noise = tl.load(Noise + b * snb + m * snm + n[:, None] * snn + c[None, :], mask=wanted, other=0.0).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(Weight + c, mask=c < DV, other=0.0).to(tl.float32)
    for g in range(GROUP):
        at = Signal + b * ssb + m * ssm + g * ssh
        x = tl.load(at + n[:, None] * ssn + c[None, :], mask=wanted, other=0.0).to(tl.float32)
        h = m * GROUP + g
        factor = tl.load(Factor + b * sfb + h * sfh + n * sfn, mask=real, other=0.0).to(tl.float32)
        x -= factor[:, None] * noise
        if NORM:
            x *= _inverse_rms(x, real, eps, DV)[:, None]
            if WEIGHTED:
                x *= weight[None, :]
            x *= gain
        tl.store(Out + b * sob + h * soh + n[:, None] * son + c[None, :], x.to(Out.dtype.element_ty), mask=wanted)


@triton.jit
def _subtract_gradient_kernel(
    Signal, Noise, Factor, Weight, Grad, DSignal, DNoise, DFactor, DWeight, Delta1, Delta2,
    gain, eps,
    ssb, ssm, ssh, ssn, snb, snm, snn, sfb, sfh, sfn, sgb, sgh, sgn, sdsb, sdsm, sdsh, sdsn, sdnb, sdnm, sdnn,
    GROUPS, GROUP, TOKENS, DV,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SCALAR: tl.constexpr, DELTAS: tl.constexpr, PAIR: tl.constexpr,
    STEPS: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """DFactor (B, S, N), or, if the factor is a scalar, its part of each program, as DWeight is that of the weight.

    DELTAS for the attentions' backward: the products of their outputs and gradients, row by row. In a PAIR the gradient of the
    noise is that of the signal but for the factor; it is not written then, nor is the factor in its delta.
    """
    portions = tl.cdiv(TOKENS, STEPS * BM)
    portion, bm = tl.program_id(0) % portions, tl.program_id(0) // portions
    b, m = (bm // GROUPS).to(tl.int64), bm % GROUPS
    c = tl.arange(0, BDV)
    dweight = tl.zeros([BDV], tl.float32)
    dfactor = tl.zeros([BM], tl.float32)
    if WEIGHTED:
        weight = tl.load(Weight + c, mask=c < DV, other=0.0).to(tl.float32)
    for step in range(STEPS):
        n = ((portion * STEPS + step) * BM + tl.arange(0, BM)).to(tl.int64)
        real = n < TOKENS
        wanted = real[:, None] & (c < DV)[None, :]
        noise = tl.load(Noise + b * snb + m * snm + n[:, None] * snn + c[None, :], mask=wanted, other=0.0).to(tl.float32)
        dnoise = tl.zeros([BM, BDV], tl.float32)
        for g in range(GROUP):
            h = m * GROUP + g
            at = Signal + b * ssb + m * ssm + g * ssh
            signal = tl.load(at + n[:, None] * ssn + c[None, :], mask=wanted, other=0.0).to(tl.float32)
            factor = tl.load(Factor + b * sfb + h * sfh + n * sfn, mask=real, other=0.0).to(tl.float32)
            dx = tl.load(Grad + b * sgb + h * sgh + n[:, None] * sgn + c[None, :], mask=wanted, other=0.0).to(tl.float32)
            if NORM:
                x = signal - factor[:, None] * noise
                inverse = _inverse_rms(x, real, eps, DV)
                x *= inverse[:, None]
                dx *= gain
                if WEIGHTED:
                    dweight += tl.sum(dx * x, 0)
                    dx *= weight[None, :]
                dx = inverse[:, None] * (dx - x * (tl.sum(dx * x, 1) / DV)[:, None])
            at = DSignal + b * sdsb + m * sdsm + g * sdsh
            tl.store(at + n[:, None] * sdsn + c[None, :], dx.to(DSignal.dtype.element_ty), mask=wanted)
            dnoise -= factor[:, None] * dx
            along = tl.sum(dx * noise, 1)
            if DELTAS:
                place = (b * GROUPS * GROUP + h) * TOKENS + n
                dx = dx.to(DSignal.dtype.element_ty).to(tl.float32)  # as the attention will read it
                tl.store(Delta1 + place, tl.sum(dx * signal, 1), mask=real)
                if PAIR:
                    tl.store(Delta2 + place, tl.sum(dx * noise, 1), mask=real)
            if SCALAR:
                dfactor -= along
            else:
                tl.store(DFactor + (b * GROUPS * GROUP + h) * TOKENS + n, -along, mask=real)
        if not PAIR:
            at = DNoise + b * sdnb + m * sdnm
            tl.store(at + n[:, None] * sdnn + c[None, :], dnoise.to(DNoise.dtype.element_ty), mask=wanted)
            if DELTAS:
                dnoise = dnoise.to(DNoise.dtype.element_ty).to(tl.float32)
                tl.store(Delta2 + (b * GROUPS + m) * TOKENS + n, tl.sum(dnoise * noise, 1), mask=real)
    if SCALAR:
        tl.store(DFactor + tl.program_id(0), tl.sum(dfactor, 0))
    if WEIGHTED:
        tl.store(DWeight + tl.program_id(0).to(tl.int64) * DV + c, dweight, mask=c < DV)


def _place(signal: Tensor, noise: Tensor, groups: int) -> tuple[list[int], list[int]]:
    """Strides of samples, groups, heads in a group, tokens of `signal`; of samples, groups, tokens of `noise`.

    Without `noise` (an empty tensor) each group of `signal` ends with its noise head.
    """
    sb, sh, sn, _ = signal.stride()
    apart = signal.shape[1] // groups * sh
    return [sb, apart, sh, sn], [sb, apart, sn] if noise.ndim == 1 else list(noise.stride()[:3])


def _noise_of(signal: Tensor, noise: Tensor, groups: int) -> Tensor:
    return signal[:, signal.shape[1] // groups - 1 :] if noise.ndim == 1 else noise


def _sizes(signal: Tensor, noise: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Samples, signal heads of a group, tokens, channels."""
    batch, heads, tokens, channels = signal.shape
    return batch, heads // groups - (noise.ndim == 1), tokens, channels


def _rows(tokens: int, channels: int) -> dict[str, int]:
    """Tokens and channels that a program of the difference holds at a time."""
    wide = power_of_2(channels)
    return {"BM": min(power_of_2(tokens), max(4096 // wide, 1)), "BDV": wide}


@operator("subtract_noise_forward")
def _subtract_forward(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, groups: int, gain: float, eps: float, norm: bool
) -> Tensor:
    """`noise` is an empty vector where each group of `signal` ends with its noise head."""
    return launch_subtract(last_contiguous(signal), last_contiguous(noise), factor, weight, groups, gain, eps, norm)


def launch_subtract(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, groups: int, gain: float, eps: float, norm: bool
) -> Tensor:
    batch, group, tokens, channels = _sizes(signal, noise, groups)
    out = heads_last(signal, channels, groups * group)
    if not out.numel():
        return out
    tiles = _rows(tokens, channels)
    strides, noise_strides = _place(signal, noise, groups)
    _subtract_kernel[(ceil_div(tokens, tiles["BM"]) * batch * groups,)](
        signal, _noise_of(signal, noise, groups), factor, factor if weight is None else weight, out, gain, eps,
        *strides, *noise_strides, *_factor_strides(factor), *out.stride()[:3], groups, group, tokens, channels,
        NORM=norm, WEIGHTED=weight is not None, **tiles,
    )  # fmt: skip
    return out


def _factor_strides(factor: Tensor) -> tuple[int, ...]:
    return factor.stride() if factor.ndim else (0, 0, 0)


@_subtract_forward.register_fake
def _(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, groups: int, gain: float, eps: float, norm: bool
) -> Tensor:
    _, group, _, channels = _sizes(signal, noise, groups)
    return heads_last(signal, channels, groups * group)


@operator("subtract_noise_backward")
def _subtract_backward(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor,
    groups: int, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of signal, noise, factor (float32), and weight (float32; an empty one without a weight)."""
    signal, noise, grad = (last_contiguous(t) for t in (signal, noise, grad))
    dsignal, dnoise = _like(signal), _like(noise)
    empty = grad.new_empty(0)
    settings = (groups, gain, eps, norm)
    dfactor, dweight = launch_subtract_gradient(signal, noise, factor, weight, grad, dsignal, dnoise, empty, empty, *settings)
    return dsignal, dnoise, dfactor, dweight


def launch_subtract_gradient(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor, dsignal: Tensor, dnoise: Tensor,
    delta1: Tensor, delta2: Tensor, groups: int, gain: float, eps: float, norm: bool, *, pair: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dsignal, dnoise (not of a pair), and the deltas, unless they are empty; returns those of factor and weight."""
    batch, group, tokens, channels = _sizes(signal, noise, groups)
    dfactor, dweight = gradients_of_settings(factor, weight, (batch, groups * group, tokens))
    if not grad.numel():
        return dfactor.zero_(), dweight.zero_()
    tiles = _rows(tokens, channels)
    steps = max(1, min(_TOKENS // tiles["BM"], ceil_div(tokens, tiles["BM"])))
    programs = ceil_div(tokens, tiles["BM"] * steps) * batch * groups
    parts = [factor.new_empty(programs if not factor.ndim else 0, dtype=torch.float32),
             factor.new_empty((programs, channels) if weight is not None else (0,), dtype=torch.float32)]  # fmt: skip
    strides, noise_strides = _place(signal, noise, groups)
    dstrides, dnoise_strides = _place(dsignal, dsignal if pair else dnoise, groups)
    _subtract_gradient_kernel[(programs,)](
        signal, _noise_of(signal, noise, groups), factor, factor if weight is None else weight, grad,
        dsignal, dsignal if pair else _noise_of(dsignal, dnoise, groups), dfactor if factor.ndim else parts[0], parts[1],
        delta1, delta2, gain, eps,
        *strides, *noise_strides, *_factor_strides(factor), *grad.stride()[:3], *dstrides, *dnoise_strides,
        groups, group, tokens, channels,
        NORM=norm, WEIGHTED=weight is not None, SCALAR=not factor.ndim, DELTAS=delta1.numel() > 0, PAIR=pair,
        STEPS=steps, **tiles,
    )  # fmt: skip
    return dfactor if factor.ndim else parts[0].sum(), dweight if weight is None else parts[1].sum(0)


def _like(x: Tensor) -> Tensor:
    """Room for the gradient of outputs x (B, H, N, channels), or an empty vector for one."""
    return torch.empty_like(x) if x.ndim == 1 else heads_last(x)


def gradients_of_settings(factor: Tensor, weight: Tensor | None, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    dfactor = factor.new_empty(shape if factor.ndim else (), dtype=torch.float32)
    return dfactor, factor.new_empty(0 if weight is None else weight.shape, dtype=torch.float32)


@_subtract_backward.register_fake
def _(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor,
    groups: int, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, group, tokens, _ = _sizes(signal, noise, groups)
    return _like(signal), _like(noise), *gradients_of_settings(factor, weight, (batch, groups * group, tokens))


def _setup_subtract(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, noise, factor, weight, *ctx.settings = inputs
    ctx.save_for_backward(signal, noise, factor, weight)


def _backward_subtract(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    signal, noise, factor, weight = ctx.saved_tensors
    dsignal, dnoise, dfactor, dweight = _subtract_backward(signal, noise, factor, weight, grad, *ctx.settings)
    return (
        dsignal, dnoise, dfactor.to(factor.dtype), None if weight is None else dweight.to(weight.dtype), *(None,) * 4,
    )  # fmt: skip


_subtract_forward.register_autograd(_backward_subtract, setup_context=_setup_subtract)


def subtract_noise_triton(
    signal: Tensor, noise: Tensor | None, factor: Tensor, weight: Tensor | None, *, groups: int, gain: float, eps: float | None
) -> Tensor:
    """Of tensors as `subtract_noise` has checked them; the factor is a scalar or (B, S, N); without `eps` there is no norm."""
    noise = signal.new_empty(0) if noise is None else noise
    norm = eps is not None
    return _subtract_forward(signal, noise, factor, weight if norm else None, groups, gain if norm else 1.0, eps or 0.0, norm)


@triton.jit
def _factor_kernel(Q1, K1, Q2, K2, Out, start, N, BN: tl.constexpr):
    n = tl.arange(0, BN)
    real = n < N
    one = tl.sum(tl.load(Q1 + n, mask=real, other=0.0) * tl.load(K1 + n, mask=real, other=0.0), 0)
    two = tl.sum(tl.load(Q2 + n, mask=real, other=0.0) * tl.load(K2 + n, mask=real, other=0.0), 0)
    tl.store(Out, tl.exp(one) - tl.exp(two) + start)


@settled
def _factor_launch(channels: int, start: float, device: torch.device) -> Launch:
    constants = {"BN": power_of_2(channels), "num_warps": 1}
    return Launch(_factor_kernel, (1,), [Place(number) for number in range(5)], (start, channels), constants)


@operator("difference_factor")
def _difference_factor(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, start: float) -> Tensor:
    out = q1.new_empty((), dtype=torch.float32)
    _factor_launch(q1.shape[0], start, q1.device)(*(t.contiguous() for t in (q1, k1, q2, k2)), out)
    return out


@_difference_factor.register_fake
def _(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, start: float) -> Tensor:
    return q1.new_empty((), dtype=torch.float32)


def difference_factor_triton(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, start: float) -> Tensor:
    """A layer's lambda, a scalar of float32, from vectors (d,) that need no gradient."""
    return _difference_factor(q1, k1, q2, k2, float(start))


# --- both maps in one pass --------------------------------------------------------------------------------------------------------


@triton.jit
def _rows_of(X, n, c, sn, N, C, MASKED: tl.constexpr, WHOLE: tl.constexpr):
    """Tile (n, c) of X; rows from N on are 0 if MASKED, channels from C on are 0 unless the tile is the WHOLE width."""
    at = X + n[:, None] * sn + c[None, :]
    if MASKED:
        x = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    elif WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(c < C)[None, :], other=0.0)
    return x


@triton.jit
def _absorb(x, scale, highest, total):
    """As `absorb`, of logits that are yet to be multiplied by `scale`, a positive number: one instruction for each then."""
    higher = tl.maximum(highest, tl.max(x, 1) * scale)
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(x * scale - anchor[:, None])
    fade = tl.exp2(highest - anchor)
    return p, fade, higher, total * fade + tl.sum(p, 1)


@triton.jit
def _place_of(QUERIES, HEADS, SHARE, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """Of the program: its first query, its sample, head and key/value head; if CAUSAL the longest come first."""
    portions = tl.cdiv(QUERIES, BM)
    portion, bh = tl.program_id(0) % portions, tl.program_id(0) // portions
    if CAUSAL:
        samples = tl.num_programs(0) // portions
        portion, bh = portions - 1 - tl.program_id(0) // samples, tl.program_id(0) % samples
    return portion * BM, (bh // HEADS).to(tl.int64), bh % HEADS, bh % HEADS // SHARE


@triton.jit
def _span(start, QUERIES, KEYS, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of the queries from `start` on: up to where tiles of keys are seen by all, where the keys end, and each query's last key."""
    all_to, end = KEYS // BN * BN, KEYS
    last = tl.zeros([BM], tl.int32) + (KEYS - 1)
    if CAUSAL:
        ahead = KEYS - QUERIES
        all_to = tl.maximum(tl.minimum(start + 1 + ahead, KEYS), 0) // BN * BN
        end = tl.maximum(tl.minimum(start + BM + ahead, KEYS), 0)
        last = tl.minimum(start + tl.arange(0, BM) + ahead, KEYS - 1)
    return all_to, end, last


@triton.jit
def _walk(
    q1, q2, K1, K2, V, first, stop, last, sk1n, sk2n, svn, KEYS, D, DV, high1, total1, acc1, high2, total2, acc2, scale,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Both softmaxes go on over the keys `first` to `stop`; if MASKED, a query sees those up to its `last`."""
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        n = start + tl.arange(0, BN)
        k = _rows_of(K1, n, d, sk1n, KEYS, D, MASKED, WHOLE)
        x = tl.dot(q1, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = n[None, :] <= last[:, None]
            x = tl.where(seen, x, float("-inf"))
        p, fade, high1, total1 = _absorb(x, scale, high1, total1)
        v = _rows_of(V, n, dv, svn, KEYS, DV, MASKED, WHOLE)
        acc1 = tl.dot(p.to(v.dtype), v, acc1 * fade[:, None], input_precision=PRECISION)
        k = _rows_of(K2, n, d, sk2n, KEYS, D, MASKED, WHOLE)
        x = tl.dot(q2, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            x = tl.where(seen, x, float("-inf"))
        p, fade, high2, total2 = _absorb(x, scale, high2, total2)
        acc2 = tl.dot(p.to(v.dtype), v, acc2 * fade[:, None], input_precision=PRECISION)
    return high1, total1, acc1, high2, total2, acc2


@triton.jit
def _forward_kernel(
    Q1, Q2, K1, K2, V, Factor, Weight, Out, Out1, Out2, Lse1, Lse2,
    scale, gain, eps,
    sq1b, sq1h, sq1n, sq2b, sq2h, sq2n, sk1b, sk1h, sk1n, sk2b, sk2h, sk2n, svb, svh, svn, sfb, sfh, sfn, sob, soh, son,
    HEADS, SHARE, QUERIES, KEYS, D, DV,
    CAUSAL: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The normalised difference, and, to KEEP for gradients, outputs and log-normalisers (of base 2) of each map."""
    start, b, h, g = _place_of(QUERIES, HEADS, SHARE, BM, CAUSAL)
    rows, d, dv = start + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < QUERIES
    q1 = _rows_of(Q1 + b * sq1b + h * sq1h, rows, d, sq1n, QUERIES, D, True, WHOLE)
    q2 = _rows_of(Q2 + b * sq2b + h * sq2h, rows, d, sq2n, QUERIES, D, True, WHOLE)
    K1 += b * sk1b + g * sk1h
    K2 += b * sk2b + g * sk2h
    V += b * svb + g * svh
    all_to, end, last = _span(start, QUERIES, KEYS, CAUSAL, BM, BN)
    high1, high2 = tl.full([BM], float("-inf"), tl.float32), tl.full([BM], float("-inf"), tl.float32)
    total1, total2 = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    acc1, acc2 = tl.zeros([BM, BDV], tl.float32), tl.zeros([BM, BDV], tl.float32)
    high1, total1, acc1, high2, total2, acc2 = _walk(
        q1, q2, K1, K2, V, 0, all_to, last, sk1n, sk2n, svn, KEYS, D, DV, high1, total1, acc1, high2, total2, acc2, scale,
        False, WHOLE, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    high1, total1, acc1, high2, total2, acc2 = _walk(
        q1, q2, K1, K2, V, all_to, end, last, sk1n, sk2n, svn, KEYS, D, DV, high1, total1, acc1, high2, total2, acc2, scale,
        True, WHOLE, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    wanted = real[:, None] & (dv < DV)[None, :]
    offset = b * sob + h * soh + rows[:, None] * son + dv[None, :]
    place = (b * HEADS + h) * QUERIES + rows
    x, lse1 = conclude(acc1, high1, total1)
    noise, lse2 = conclude(acc2, high2, total2)
    if KEEP:
        tl.store(Out1 + offset, x.to(Out1.dtype.element_ty), mask=wanted)
        tl.store(Out2 + offset, noise.to(Out2.dtype.element_ty), mask=wanted)
        tl.store(Lse1 + place, lse1, mask=real)
        tl.store(Lse2 + place, lse2, mask=real)
    factor = tl.load(Factor + b * sfb + h * sfh + rows * sfn, mask=real, other=0.0).to(tl.float32)
    x -= factor[:, None] * noise
    if NORM:
        x *= _inverse_rms(x, real, eps, DV)[:, None]
        if WEIGHTED:
            x *= tl.load(Weight + dv, mask=dv < DV, other=0.0).to(tl.float32)[None, :]
        x *= gain
    tl.store(Out + offset, x.to(Out.dtype.element_ty), mask=wanted)


@triton.jit
def _descend(
    q1, q2, grad, K1, K2, V, first, stop, last, lse1, lse2, delta1, delta2, sk1n, sk2n, svn, KEYS, D, DV, acc1, acc2, scale,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Adds to the queries' gradients, those of the noise but for -lambda, what comes through the keys `first` to `stop`."""
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        n = start + tl.arange(0, BN)
        v = _rows_of(V, n, dv, svn, KEYS, DV, MASKED, WHOLE)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        k = _rows_of(K1, n, d, sk1n, KEYS, D, MASKED, WHOLE)
        p = tl.exp2(tl.dot(q1, tl.trans(k), input_precision=PRECISION) * scale - lse1[:, None])
        if MASKED:
            seen = n[None, :] <= last[:, None]
            p = tl.where(seen, p, 0.0)
        acc1 = tl.dot((p * (dp - delta1[:, None])).to(k.dtype), k, acc1, input_precision=PRECISION)
        k = _rows_of(K2, n, d, sk2n, KEYS, D, MASKED, WHOLE)
        p = tl.exp2(tl.dot(q2, tl.trans(k), input_precision=PRECISION) * scale - lse2[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        acc2 = tl.dot((p * (dp - delta2[:, None])).to(k.dtype), k, acc2, input_precision=PRECISION)
    return acc1, acc2


@triton.jit
def _query_gradient_kernel(
    Q1, Q2, K1, K2, V, Factor, Grad, Lse1, Lse2, Delta1, Delta2, DQ1, DQ2,
    scale,
    sq1b, sq1h, sq1n, sq2b, sq2h, sq2n, sk1b, sk1h, sk1n, sk2b, sk2h, sk2n, svb, svh, svn, sfb, sfh, sfn, sgb, sgh, sgn,
    sd1b, sd1h, sd1n, sd2b, sd2h, sd2n,
    HEADS, SHARE, QUERIES, KEYS, D, DV,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    start, b, h, g = _place_of(QUERIES, HEADS, SHARE, BM, CAUSAL)
    rows, d, dv = start + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    real = rows < QUERIES
    q1 = _rows_of(Q1 + b * sq1b + h * sq1h, rows, d, sq1n, QUERIES, D, True, WHOLE)
    q2 = _rows_of(Q2 + b * sq2b + h * sq2h, rows, d, sq2n, QUERIES, D, True, WHOLE)
    grad = _rows_of(Grad + b * sgb + h * sgh, rows, dv, sgn, QUERIES, DV, True, WHOLE)
    place = (b * HEADS + h) * QUERIES + rows
    lse1, delta1 = read_lse(Lse1, place, real), tl.load(Delta1 + place, mask=real, other=0.0)
    lse2, delta2 = read_lse(Lse2, place, real), tl.load(Delta2 + place, mask=real, other=0.0)
    K1 += b * sk1b + g * sk1h
    K2 += b * sk2b + g * sk2h
    V += b * svb + g * svh
    all_to, end, last = _span(start, QUERIES, KEYS, CAUSAL, BM, BN)
    acc1, acc2 = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    acc1, acc2 = _descend(
        q1, q2, grad, K1, K2, V, 0, all_to, last, lse1, lse2, delta1, delta2, sk1n, sk2n, svn, KEYS, D, DV, acc1, acc2, scale,
        False, WHOLE, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    acc1, acc2 = _descend(
        q1, q2, grad, K1, K2, V, all_to, end, last, lse1, lse2, delta1, delta2, sk1n, sk2n, svn, KEYS, D, DV, acc1, acc2, scale,
        True, WHOLE, PRECISION, BN, BD, BDV,
    )  # fmt: skip
    wanted = real[:, None] & (d < D)[None, :]
    acc1 *= per_logit(scale)
    factor = tl.load(Factor + b * sfb + h * sfh + rows * sfn, mask=real, other=0.0).to(tl.float32)
    acc2 *= -per_logit(scale) * factor[:, None]
    at1, at2 = DQ1 + b * sd1b + h * sd1h, DQ2 + b * sd2b + h * sd2h
    tl.store(at1 + rows[:, None] * sd1n + d[None, :], acc1.to(DQ1.dtype.element_ty), mask=wanted)
    tl.store(at2 + rows[:, None] * sd2n + d[None, :], acc2.to(DQ2.dtype.element_ty), mask=wanted)


@triton.jit
def _gather(
    k1, k2, v, n, Q1, Q2, Grad, Factor, Lse1, Lse2, Delta1, Delta2, first, stop, ahead, sq1n, sq2n, sgn, sfn,
    QUERIES, D, DV, dk1, dk2, dv_sum, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of some keys and values what comes from the queries `first` to `stop`; maps are (keys, queries)."""
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BM):
        rows = start + tl.arange(0, BM)
        real = rows < QUERIES
        grad = _rows_of(Grad, rows, dv, sgn, QUERIES, DV, MASKED, WHOLE)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        q = _rows_of(Q1, rows, d, sq1n, QUERIES, D, MASKED, WHOLE)
        lse, delta = read_lse(Lse1, rows, real), tl.load(Delta1 + rows, mask=real, other=0.0)
        p = tl.exp2(tl.dot(k1, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        if MASKED and CAUSAL:
            seen = n[:, None] <= (rows + ahead)[None, :]
            p = tl.where(seen, p, 0.0)
        dk1 = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk1, input_precision=PRECISION)
        q = _rows_of(Q2, rows, d, sq2n, QUERIES, D, MASKED, WHOLE)
        lse, delta = read_lse(Lse2, rows, real), tl.load(Delta2 + rows, mask=real, other=0.0)
        factor = tl.load(Factor + rows * sfn, mask=real, other=0.0).to(tl.float32)
        noise = tl.exp2(tl.dot(k2, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]) * factor[None, :]
        if MASKED and CAUSAL:
            noise = tl.where(seen, noise, 0.0)
        dk2 = tl.dot((noise * (delta[None, :] - dp)).to(q.dtype), q, dk2, input_precision=PRECISION)
        dv_sum = tl.dot((p - noise).to(grad.dtype), grad, dv_sum, input_precision=PRECISION)
    return dk1, dk2, dv_sum


@triton.jit
def _key_gradient_kernel(
    Q1, Q2, K1, K2, V, Factor, Grad, Lse1, Lse2, Delta1, Delta2, DK1, DK2, DV_,
    scale,
    sq1b, sq1h, sq1n, sq2b, sq2h, sq2n, sk1b, sk1h, sk1n, sk2b, sk2h, sk2n, svb, svh, svn, sfb, sfh, sfn, sgb, sgh, sgn,
    sd1b, sd1h, sd1n, sd2b, sd2h, sd2n, sdvb, sdvh, sdvn,
    HEADS, SHARE, QUERIES, KEYS, D, DV,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of the earliest keys first, which most queries see."""
    samples = tl.num_programs(0) // tl.cdiv(KEYS, BN)
    portion, bg = tl.program_id(0) // samples, tl.program_id(0) % samples
    kv_heads = HEADS // SHARE
    b, g = (bg // kv_heads).to(tl.int64), bg % kv_heads
    n, d, dv = portion * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    k1 = _rows_of(K1 + b * sk1b + g * sk1h, n, d, sk1n, KEYS, D, True, WHOLE)
    k2 = _rows_of(K2 + b * sk2b + g * sk2h, n, d, sk2n, KEYS, D, True, WHOLE)
    v = _rows_of(V + b * svb + g * svh, n, dv, svn, KEYS, DV, True, WHOLE)
    begin, all_from, ahead = 0, 0, KEYS - QUERIES
    if CAUSAL:
        begin = tl.minimum(tl.maximum(portion * BN - ahead, 0), QUERIES) // BM * BM
        all_from = tl.minimum(tl.cdiv(tl.maximum(portion * BN + BN - 1 - ahead, 0), BM) * BM, QUERIES)
    all_to = tl.maximum(QUERIES // BM * BM, all_from)
    dk1, dk2 = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for one in range(SHARE):
        h = g * SHARE + one
        q1, q2 = Q1 + b * sq1b + h * sq1h, Q2 + b * sq2b + h * sq2h
        grad, factor = Grad + b * sgb + h * sgh, Factor + b * sfb + h * sfh
        place = (b * HEADS + h) * QUERIES
        lse1, lse2, delta1, delta2 = Lse1 + place, Lse2 + place, Delta1 + place, Delta2 + place
        if CAUSAL:
            dk1, dk2, dv_sum = _gather(
                k1, k2, v, n, q1, q2, grad, factor, lse1, lse2, delta1, delta2, begin, all_from, ahead, sq1n, sq2n, sgn, sfn,
                QUERIES, D, DV, dk1, dk2, dv_sum, scale, CAUSAL, True, WHOLE, PRECISION, BM, BD, BDV,
            )  # fmt: skip
        dk1, dk2, dv_sum = _gather(
            k1, k2, v, n, q1, q2, grad, factor, lse1, lse2, delta1, delta2, all_from, all_to, ahead, sq1n, sq2n, sgn, sfn,
            QUERIES, D, DV, dk1, dk2, dv_sum, scale, CAUSAL, False, WHOLE, PRECISION, BM, BD, BDV,
        )  # fmt: skip
        dk1, dk2, dv_sum = _gather(
            k1, k2, v, n, q1, q2, grad, factor, lse1, lse2, delta1, delta2, all_to, QUERIES, ahead, sq1n, sq2n, sgn, sfn,
            QUERIES, D, DV, dk1, dk2, dv_sum, scale, CAUSAL, True, WHOLE, PRECISION, BM, BD, BDV,
        )  # fmt: skip
    real = n < KEYS
    wanted = real[:, None] & (d < D)[None, :]
    dk1 *= per_logit(scale)
    dk2 *= per_logit(scale)
    at1, at2, at = DK1 + b * sd1b + g * sd1h, DK2 + b * sd2b + g * sd2h, DV_ + b * sdvb + g * sdvh
    tl.store(at1 + n[:, None] * sd1n + d[None, :], dk1.to(DK1.dtype.element_ty), mask=wanted)
    tl.store(at2 + n[:, None] * sd2n + d[None, :], dk2.to(DK2.dtype.element_ty), mask=wanted)
    tl.store(at + n[:, None] * sdvn + dv[None, :], dv_sum.to(DV_.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def _constants(q: Tensor, v: Tensor, is_causal: bool) -> dict[str, Any]:
    dim, dim_v = tile(q.shape[3], 256), tile(v.shape[3], 256)
    whole = dim == q.shape[3] and dim_v == v.shape[3]
    return {"CAUSAL": is_causal, "WHOLE": whole, "PRECISION": precision(q), "BD": dim, "BDV": dim_v}


def _sides(q: Tensor, v: Tensor, queries: int, keys: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sides of the tiles and warps: of the forward, of the queries' gradients, of the keys'."""
    half, wide = q.element_size() == 2, max(q.shape[3], v.shape[3]) > 128
    most = 64 if half else 32
    across = (32 if wide else 64) if half else 16
    warps, stages = 8 if half and wide else 4, 2 if half else 1
    forward = {"BM": tile(queries, most), "BN": tile(keys, across), "num_warps": warps, "num_stages": stages}
    down = {"BM": tile(queries, most), "BN": tile(keys, min(across, 32)), "num_warps": warps, "num_stages": stages}
    over = {"BM": tile(queries, 32 if half else 16), "BN": tile(keys, most), "num_warps": warps, "num_stages": stages}
    return forward, down, over


@operator("differential_forward")
def _differential_forward(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    is_causal: bool, scale: float, gain: float, eps: float, norm: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The difference; if `keep`, outputs and log-normalisers (of base 2) of both maps, else empty tensors."""
    q, noise_q, k, noise_k, v = (last_contiguous(t) for t in (q, noise_q, k, noise_k, v))
    (batch, heads, queries, dim), (kv_heads, keys, dim_v) = q.shape, v.shape[1:]
    out, signal, noise, lse, noise_lse = _results(q, v, keep)
    if out.numel():
        tiles = _sides(q, v, queries, keys)[0]
        _forward_kernel[(ceil_div(queries, tiles["BM"]) * batch * heads,)](
            q, noise_q, k, noise_k, v, factor, factor if weight is None else weight,
            out, signal, noise, lse, noise_lse, scale * LOG2E, gain, eps,
            *_strides(q, noise_q, k, noise_k, v), *_factor_strides(factor), *_strides(out),
            heads, heads // kv_heads, queries, keys, dim, dim_v, KEEP=keep, NORM=norm, WEIGHTED=weight is not None,
            **_constants(q, v, is_causal), **tiles,
        )  # fmt: skip
    return out, signal, noise, lse, noise_lse


def _results(q: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    one, two = (heads_last(q, v.shape[3], heads) if keep else q.new_empty(0) for _ in range(2))
    lse, noise_lse = (q.new_empty((batch, heads, queries) if keep else (0,), dtype=torch.float32) for _ in range(2))
    return heads_last(q, v.shape[3], heads), one, two, lse, noise_lse


@_differential_forward.register_fake
def _(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    is_causal: bool, scale: float, gain: float, eps: float, norm: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(q, v, keep)


@operator("differential_backward")
def _differential_backward(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    signal: Tensor, noise: Tensor, lse: Tensor, noise_lse: Tensor, grad: Tensor,
    is_causal: bool, scale: float, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, noise_q, k, noise_k, v, grad = (last_contiguous(t) for t in (q, noise_q, k, noise_k, v, grad))
    (batch, heads, queries, dim), (kv_heads, keys, dim_v) = q.shape, v.shape[1:]
    dq, dnoise_q, dk, dnoise_k, dv = (heads_last(t) for t in (q, noise_q, k, noise_k, v))
    dsignal, delta, noise_delta = heads_last(grad, dim_v, heads), torch.empty_like(lse), torch.empty_like(lse)
    dfactor, dweight = launch_subtract_gradient(
        signal, noise, factor, weight, grad, dsignal, dsignal, delta, noise_delta, heads, gain, eps, norm, pair=True
    )
    _, down, over = _sides(q, v, queries, keys)
    read = (q, noise_q, k, noise_k, v, factor, dsignal, lse, noise_lse, delta, noise_delta)
    strides = (*_strides(q, noise_q, k, noise_k, v), *_factor_strides(factor), *_strides(dsignal))
    sizes, constants = (heads, heads // kv_heads, queries, keys, dim, dim_v), _constants(q, v, is_causal)
    if dq.numel():
        _query_gradient_kernel[(ceil_div(queries, down["BM"]) * batch * heads,)](
            *read, dq, dnoise_q, scale * LOG2E, *strides, *_strides(dq, dnoise_q), *sizes, **constants, **down
        )
    if dk.numel():
        _key_gradient_kernel[(ceil_div(keys, over["BN"]) * batch * kv_heads,)](
            *read, dk, dnoise_k, dv, scale * LOG2E, *strides, *_strides(dk, dnoise_k, dv), *sizes, **constants, **over
        )
    return dq, dnoise_q, dk, dnoise_k, dv, dfactor, dweight


@_differential_backward.register_fake
def _(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None,
    signal: Tensor, noise: Tensor, lse: Tensor, noise_lse: Tensor, grad: Tensor,
    is_causal: bool, scale: float, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dnoise_q, dk, dnoise_k, dv = (heads_last(t) for t in (q, noise_q, k, noise_k, v))
    return dq, dnoise_q, dk, dnoise_k, dv, *gradients_of_settings(factor, weight, (q.shape[0], q.shape[1], q.shape[2]))


def _setup_differential(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.settings = inputs[7:12]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_differential(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    factor, weight = saved[5:7]
    *gradients, dfactor, dweight = _differential_backward(*saved, grad, *ctx.settings)
    return *gradients, dfactor.to(factor.dtype), None if weight is None else dweight.to(weight.dtype), *(None,) * 6


_differential_forward.register_autograd(_backward_differential, setup_context=_setup_differential)


def differential_attention_triton(
    q: Tensor, noise_q: Tensor, k: Tensor, noise_k: Tensor, v: Tensor, factor: Tensor, weight: Tensor | None, *,
    is_causal: bool, scale: float, gain: float, eps: float | None,
) -> Tensor:  # fmt: skip
    """Of tensors as `differential_attention` has checked them, with as many noise heads as signal heads, and a positive scale."""
    norm, tensors = eps is not None, (q, noise_q, k, noise_k, v, factor, weight)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _differential_forward(
        q, noise_q, k, noise_k, v, factor, weight if norm else None, is_causal, scale, gain if norm else 1.0, eps or 0.0, norm, keep
    )[0]
