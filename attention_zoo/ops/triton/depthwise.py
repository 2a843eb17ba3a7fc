"""Depthwise convolution of channels-last maps as Triton kernels: stride 1, an odd kernel, zeros outside.

A program has a patch of pixels and some channels and reads the patch once for each tap; neighbours come from the cache. The
gradient of the input is the same with the kernel turned around. That of the weights is added up in two steps, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, tile

__all__ = ["add_input_gradient", "depthwise_conv2d_triton"]

_PIXELS = 32  # of a patch that is convolved
_PROGRAMS = 1024  # that the gradient of the weights is shared out to


@triton.jit
def _pixels(portion, H, W, TILES_X, BY: tl.constexpr, BX: tl.constexpr):
    """Rows and columns of a patch of BY x BX pixels, row by row; and which of them are on the map."""
    p = tl.arange(0, BY * BX)
    y, x = portion // TILES_X * BY + p // BX, portion % TILES_X * BX + p % BX
    return y, x, (y < H) & (x < W)


@triton.jit
def _convolution_kernel(
    X, Weight, Bias, Add, Out, sxb, sxy, sxx, sab, say, sax, sob, soy, sox, H, W, C, TILES, TILES_X, TILES_C,
    K: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    BY: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rest, portion_c = pid // TILES_C, pid % TILES_C
    b = (rest // TILES).to(tl.int64)
    y, x, there = _pixels(rest % TILES, H, W, TILES_X, BY, BX)
    c = portion_c * BC + tl.arange(0, BC)
    X += b * sxb
    acc = tl.zeros([BY * BX, BC], tl.float32)
    if HAS_BIAS:
        acc += tl.load(Bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(K * K):
        ty, tx = y + (tap // K - K // 2), x + (tap % K - K // 2)
        inside = (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
        at = X + ty[:, None].to(tl.int64) * sxy + tx[:, None] * sxx + c[None, :]
        near = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        w = tl.load(Weight + c * (K * K) + (K * K - 1 - tap if TURNED else tap), mask=c < C, other=0.0)
        acc += near.to(tl.float32) * w.to(tl.float32)[None, :]
    here = there[:, None] & (c < C)[None, :]
    if HAS_ADD:
        acc += tl.load(Add + b * sab + y[:, None].to(tl.int64) * say + x[:, None] * sax + c[None, :], mask=here, other=0.0)
    at = Out + b * sob + y[:, None].to(tl.int64) * soy + x[:, None] * sox + c[None, :]
    tl.store(at, acc.to(Out.dtype.element_ty), mask=here)


@triton.jit
def _weight_gradient_kernel(
    X, Grad, Sums, sxb, sxy, sxx, sgb, sgy, sgx, H, W, C, TILES, TILES_X, TILES_C, PATCHES, SHARE,
    K: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What `SHARE` patches add to the gradients of weights and bias: (K K + 1, C) of this share."""
    pid = tl.program_id(0)
    share, portion_c = pid // TILES_C, pid % TILES_C
    c = portion_c * BC + tl.arange(0, BC)
    sums = (tl.zeros([BY * BX, BC], tl.float32),) * (K * K)
    total = tl.zeros([BY * BX, BC], tl.float32)
    for patch in range(share * SHARE, tl.minimum(share * SHARE + SHARE, PATCHES)):
        b = (patch // TILES).to(tl.int64)
        y, x, there = _pixels(patch % TILES, H, W, TILES_X, BY, BX)
        at = Grad + b * sgb + y[:, None].to(tl.int64) * sgy + x[:, None] * sgx + c[None, :]
        grad = tl.load(at, mask=there[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += grad
        longer = ()
        for tap in tl.static_range(K * K):
            ty, tx = y + (tap // K - K // 2), x + (tap % K - K // 2)
            inside = there & (ty >= 0) & (ty < H) & (tx >= 0) & (tx < W)
            at = X + b * sxb + ty[:, None].to(tl.int64) * sxy + tx[:, None] * sxx + c[None, :]
            near = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
            longer = longer + (sums[tap] + grad * near,)  # type: ignore[assignment]
        sums = longer
    Sums += share.to(tl.int64) * (K * K + 1) * C
    for tap in tl.static_range(K * K):
        tl.store(Sums + tap * C + c, tl.sum(sums[tap], 0), mask=c < C)
    tl.store(Sums + K * K * C + c, tl.sum(total, 0), mask=c < C)


def _patch(height: int, pixels: int) -> tuple[int, int]:
    """Sides of patches of so many pixels, a power of two: as square as can be, less tall for maps of few rows."""
    by = min(1 << (pixels.bit_length() - 1) // 2, power_of_2(height))
    return by, pixels // by


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, turned: bool, out: Tensor | None = None
) -> Tensor:
    """`out` may be `add`: a program reads there what it writes itself."""
    x, weight = last_contiguous(x), weight.contiguous()
    added = x if add is None else last_contiguous(add)
    batch, height, width, channels = x.shape
    out = x.new_empty(x.shape) if out is None else out
    if not out.numel():
        return out
    (by, bx), bc = _patch(height, _PIXELS), tile(channels)
    tiles_x = ceil_div(width, bx)
    tiles, tiles_c = ceil_div(height, by) * tiles_x, ceil_div(channels, bc)
    _convolution_kernel[(batch * tiles * tiles_c,)](
        x, weight, x if bias is None else bias, added, out, *x.stride()[:3], *added.stride()[:3], *out.stride()[:3],
        height, width, channels, tiles, tiles_x, tiles_c,
        K=weight.shape[-1], TURNED=turned, HAS_BIAS=bias is not None, HAS_ADD=add is not None, BY=by, BX=bx, BC=bc, num_warps=4,
    )  # fmt: skip
    return out


def add_input_gradient(grad: Tensor, weight: Tensor, dx: Tensor) -> None:
    """What comes through the convolution from `grad` (B, H, W, C) is added to `dx`, whose channels are contiguous."""
    _convolve(grad, weight, None, dx, turned=True, out=dx)


@operator("depthwise_forward")
def _depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias, add, turned=False)


@_depthwise_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@operator("depthwise_backward")
def _depthwise_backward(x: Tensor, weight: Tensor, grad: Tensor, wants_x: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and of weights and bias (k k + 1, C) float32; empty where it is not wanted."""
    dx = _convolve(grad, weight, None, None, turned=True) if wants_x else x.new_empty(0)
    batch, height, width, channels = x.shape
    taps = weight.shape[-1] ** 2 + 1
    if not wants_weight:
        return dx, x.new_empty(0, dtype=torch.float32)
    if not x.numel():
        return dx, x.new_zeros((taps, channels), dtype=torch.float32)
    x, grad = last_contiguous(x), last_contiguous(grad)
    side = weight.shape[-1]
    (by, bx), bc = _patch(height, 16 if side <= 3 else 8 if side <= 5 else 4), tile(channels)  # each tap has a sum of this size
    tiles_x = ceil_div(width, bx)
    tiles, tiles_c = ceil_div(height, by) * tiles_x, ceil_div(channels, bc)
    patches = batch * tiles
    share = max(4, ceil_div(patches * tiles_c, _PROGRAMS))
    shares = ceil_div(patches, share)
    sums = x.new_empty((shares, taps, channels), dtype=torch.float32)
    _weight_gradient_kernel[(shares * tiles_c,)](
        x, grad, sums, *x.stride()[:3], *grad.stride()[:3], height, width, channels, tiles, tiles_x, tiles_c, patches, share,
        K=side, BY=by, BX=bx, BC=bc, num_warps=4,
    )  # fmt: skip
    return dx, sums.sum(0)


@_depthwise_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor, wants_x: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    of_weight = (weight.shape[-1] ** 2 + 1, x.shape[-1]) if wants_weight else (0,)
    return x.new_empty(x.shape if wants_x else (0,)), x.new_empty(of_weight, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_add = ctx.needs_input_grad
    if not (wants_x or wants_weight or wants_bias):
        return None, None, None, grad
    dx, sums = _depthwise_backward(x, weight, grad, wants_x, wants_weight or wants_bias)
    of_weight = sums[:-1].t().reshape(weight.shape).to(weight.dtype) if wants_weight else None
    return dx if wants_x else None, of_weight, sums[-1].to(ctx.bias_dtype) if wants_bias else None, grad if wants_add else None


_depthwise_forward.register_autograd(_backward, setup_context=_setup)


def depthwise_conv2d_triton(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """(B, H, W, C), (C, 1, k, k), (C,) and (B, H, W, C) -> (B, H, W, C)."""
    return _depthwise_forward(x, weight, bias, add)


forward_operator, backward_operator = _depthwise_forward, _depthwise_backward  # for `ops.agent_layer`
