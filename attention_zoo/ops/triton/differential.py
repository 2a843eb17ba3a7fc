"""The difference of differential attention's outputs, with its norm, as Triton kernels.

Each output is read once: a program has some tokens of one group of heads and holds the group's noise while it goes through its
signal heads. The gradients of lambda and of the norm's weight are added up in two steps, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops.triton._common import last_contiguous

__all__ = ["subtract_noise_triton"]


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


def new_heads(like: Tensor, heads: int, channels: int) -> Tensor:
    """(B, heads, N, channels), laid out with heads next to channels as projections read them."""
    return like.new_empty((like.shape[0], like.shape[2], heads, channels)).transpose(1, 2)


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
    wide = triton.next_power_of_2(channels)
    return {"BM": min(triton.next_power_of_2(tokens), max(4096 // wide, 1)), "BDV": wide}


@torch.library.custom_op("attention_zoo::subtract_noise_forward", mutates_args=())
def _subtract_forward(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, groups: int, gain: float, eps: float, norm: bool
) -> Tensor:
    """`noise` is an empty vector where each group of `signal` ends with its noise head."""
    signal, noise = last_contiguous(signal), last_contiguous(noise)
    batch, group, tokens, channels = _sizes(signal, noise, groups)
    out = new_heads(signal, groups * group, channels)
    if not out.numel():
        return out
    tiles = _rows(tokens, channels)
    strides, noise_strides = _place(signal, noise, groups)
    _subtract_kernel[(triton.cdiv(tokens, tiles["BM"]) * batch * groups,)](
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
    return new_heads(signal, groups * group, channels)


@torch.library.custom_op("attention_zoo::subtract_noise_backward", mutates_args=())
def _subtract_backward(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor,
    groups: int, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of signal, noise, factor (float32), and weight (float32; an empty one without a weight)."""
    signal, noise, grad = (last_contiguous(t) for t in (signal, noise, grad))
    dsignal, dnoise = _like(signal), _like(noise)
    empty = grad.new_empty(0)
    settings = (groups, gain, eps, norm)
    dfactor, dweight = _launch_subtract_gradient(signal, noise, factor, weight, grad, dsignal, dnoise, empty, empty, *settings)
    return dsignal, dnoise, dfactor, dweight


def _launch_subtract_gradient(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor, dsignal: Tensor, dnoise: Tensor,
    delta1: Tensor, delta2: Tensor, groups: int, gain: float, eps: float, norm: bool, *, pair: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dsignal, dnoise (not of a pair), and the deltas, unless they are empty; returns those of factor and weight."""
    batch, group, tokens, channels = _sizes(signal, noise, groups)
    dfactor, dweight = _gradients_of_settings(factor, weight, (batch, groups * group, tokens))
    if not grad.numel():
        return dfactor.zero_(), dweight.zero_()
    tiles = _rows(tokens, channels)
    steps = max(1, min(64 // tiles["BM"], triton.cdiv(tokens, tiles["BM"])))
    programs = triton.cdiv(tokens, tiles["BM"] * steps) * batch * groups
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
    return torch.empty_like(x) if x.ndim == 1 else new_heads(x, x.shape[1], x.shape[3])


def _gradients_of_settings(factor: Tensor, weight: Tensor | None, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    dfactor = factor.new_empty(shape if factor.ndim else (), dtype=torch.float32)
    return dfactor, factor.new_empty(0 if weight is None else weight.shape, dtype=torch.float32)


@_subtract_backward.register_fake
def _(
    signal: Tensor, noise: Tensor, factor: Tensor, weight: Tensor | None, grad: Tensor,
    groups: int, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, group, tokens, _ = _sizes(signal, noise, groups)
    return _like(signal), _like(noise), *_gradients_of_settings(factor, weight, (batch, groups * group, tokens))


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
