"""Depthwise convolution of channels-last maps as Triton kernels: stride 1, an odd kernel, zeros outside.

A program has a patch of pixels and some channels and reads the patch once for each tap; neighbours come from the cache. The
gradient of the input is the same with the kernel turned around. That of the weights is added up in two steps, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, tile
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = ["Channels", "add_gradients", "convolve_channels", "depthwise_conv2d_triton"]

Grid = tuple[int, int]

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
    X, Weight, Bias, Add, Out, sxb, sxy, sxx, sab, say, sax, sob, soy, sox, H, W, SY, SX, C, TILES, TILES_X, TILES_C,
    K: tl.constexpr, STRIPES: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
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
        if STRIPES:
            inside = inside & (ty // SY == y // SY) & (tx // SX == x // SX)
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
    X, Grad, Sums, sxb, sxy, sxx, sgb, sgy, sgx, H, W, SY, SX, C, TILES, TILES_X, TILES_C, PATCHES, SHARE,
    K: tl.constexpr, STRIPES: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
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
            if STRIPES:
                inside = inside & (ty // SY == y // SY) & (tx // SX == x // SX)
            at = X + b * sxb + ty[:, None].to(tl.int64) * sxy + tx[:, None] * sxx + c[None, :]
            near = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
            longer = longer + (sums[tap] + grad * near,)  # type: ignore[assignment]
        sums = longer
    Sums += share.to(tl.int64) * (K * K + 1) * C
    for tap in tl.static_range(K * K):
        tl.store(Sums + tap * C + c, tl.sum(sums[tap], 0), mask=c < C)
    tl.store(Sums + K * K * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _weight_total_kernel(Sums, DWeight, DBias, C, SHARES, TAPS, BS: tl.constexpr, BC: tl.constexpr):
    """Adds up what `_weight_gradient_kernel` wrote, for the places of its rows."""
    place = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros([BS, BC], tl.float32)
    for start in range(0, SHARES, BS):
        s = start + tl.arange(0, BS)
        at = Sums + s[:, None].to(tl.int64) * (TAPS * C) + place[None, :]
        acc += tl.load(at, mask=(s < SHARES)[:, None] & (place < TAPS * C)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    c, tap = place % C, place // C
    tl.store(DWeight + c * (TAPS - 1) + tap, total.to(DWeight.dtype.element_ty), mask=tap < TAPS - 1)
    tl.store(DBias + c, total.to(DBias.dtype.element_ty), mask=tap == TAPS - 1)


def _patch(height: int, pixels: int) -> tuple[int, int]:
    """Sides of patches of so many pixels, a power of two: as square as can be, less tall for maps of few rows."""
    by = min(1 << (pixels.bit_length() - 1) // 2, power_of_2(height))
    return by, pixels // by


def _convolution_launch(
    shape: Sequence[int],
    side: int,
    turned: bool,
    x: Place,
    weight: Place,
    bias: Place | None,
    add: Place | None,
    out: Place,
    stripe: Grid | None = None,
) -> Launch:
    """For maps of this `shape`, by (B, H, W), channels side by side; `out` may be `add`: programs read there what they write.

    `stripe`: rows and columns of parts of the map that are maps of their own, None: there are none.
    """
    batch, height, width, channels = shape
    (by, bx), bc = _patch(height, _PIXELS), tile(channels)
    tiles_x = ceil_div(width, bx)
    tiles, tiles_c = ceil_div(height, by) * tiles_x, ceil_div(channels, bc)
    flags = {"K": side, "STRIPES": stripe is not None, "TURNED": turned, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None}
    return Launch(
        _convolution_kernel,
        (batch * tiles * tiles_c,),
        (x, weight, bias or x, add or x, out),
        (*x.strides, *(add or x).strides, *out.strides, *_sides(shape, stripe), channels, tiles, tiles_x, tiles_c),
        {**flags, "BY": by, "BX": bx, "BC": bc, "num_warps": 4},
    )


def _sides(shape: Sequence[int], stripe: Grid | None) -> Sequence[int]:
    """Of the map and of its stripes."""
    return *shape[1:3], *(stripe or shape[1:3])


@settled
def _convolution_of(
    shape: Sequence[int],
    side: int,
    turned: bool,
    flags: tuple[bool, bool],
    strides: tuple[tuple[int, ...], ...],
    *key: torch.dtype | torch.device | None,
) -> Launch:
    """Of the map, weight, bias, map to be added and result, where `flags` says whether there are the third and the fourth."""
    x, add, out = (Place(number, 0, of[:3]) for number, of in zip((0, 3, 4), strides, strict=True))
    return _convolution_launch(shape, side, turned, x, Place(1), Place(2) if flags[0] else None, add if flags[1] else None, out)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, turned: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    x, weight = last_contiguous(x), weight.contiguous()
    added = x if add is None else last_contiguous(add)
    strides, flags = (x.stride(), added.stride(), out.stride()), (bias is not None, add is not None)
    key = x.dtype, weight.dtype, None if bias is None else bias.dtype, added.dtype, x.device
    launch = _convolution_of(x.shape, weight.shape[3], turned, flags, strides, *key)
    launch(x, weight, x if bias is None else bias, added, out)
    return out


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
    taps, channels = weight.shape[-1] ** 2 + 1, x.shape[3]
    if not wants_weight:
        return dx, x.new_empty(0, dtype=torch.float32)
    if not x.numel():
        return dx, x.new_zeros((taps, channels), dtype=torch.float32)
    x, grad = last_contiguous(x), last_contiguous(grad)
    launch, shares = _weight_gradient_of(x.shape, weight.shape[3], (x.stride(), grad.stride()), x.dtype, x.device)
    sums = x.new_empty((shares, taps, channels), dtype=torch.float32)
    launch(x, grad, sums)
    return dx, sums.sum(0)


@settled
def _weight_gradient_of(
    shape: Sequence[int], side: int, strides: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Launch, int]:
    x, grad = (Place(number, 0, of[:3]) for number, of in enumerate(strides))
    return _weight_gradient_launch(shape, side, x, grad, Place(2))


def _weight_gradient_launch(
    shape: Sequence[int], side: int, x: Place, grad: Place, sums: Place, stripe: Grid | None = None
) -> tuple[Launch, int]:
    """Into float32 sums (shares, k k + 1, C) of weights' and of the bias's gradients; and the number of shares."""
    batch, height, width, channels = shape
    (by, bx), bc = _patch(height, 16 if side <= 3 else 8 if side <= 5 else 4), tile(channels)  # each tap has a sum of this size
    tiles_x = ceil_div(width, bx)
    tiles, tiles_c = ceil_div(height, by) * tiles_x, ceil_div(channels, bc)
    patches = batch * tiles
    share = max(4, ceil_div(patches * tiles_c, _PROGRAMS))
    shares = ceil_div(patches, share)
    numbers = *x.strides, *grad.strides, *_sides(shape, stripe), channels, tiles, tiles_x, tiles_c, patches, share
    constants = {"K": side, "STRIPES": stripe is not None, "BY": by, "BX": bx, "BC": bc, "num_warps": 4}
    return Launch(_weight_gradient_kernel, (shares * tiles_c,), (x, grad, sums), numbers, constants), shares


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


# For layers that are one node of autograd: the map is some channels of tokens (B, P + H W, I), row-major, all but the first P.


class Channels(NamedTuple):
    """Which map is convolved, and where it is added.

    Attributes:
        grid: (H, W).
        first: channel of the tokens that is the map's first; their gradient has it there, too.
        first_out: channel of what it is added to that is the map's first.
        before: P.
        stripe: rows and columns of parts of the map that are maps of their own; None: there are none.
    """

    grid: Grid
    first: int
    first_out: int = 0
    before: int = 0
    stripe: Grid | None = None


class _Part(NamedTuple):
    """Of a call: samples, channels of the tokens, of what is added to, and of the map, side of the kernel, a choice, dtypes and
    device."""

    which: Channels
    batch: int
    inner: int
    outer: int
    channels: int
    side: int
    flag: bool
    key: tuple[torch.dtype | torch.device | None, ...]

    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, *self.which.grid, self.channels

    def within(self, tensor: int) -> Place:
        """The map in the tokens."""
        return self._map(tensor, self.which.first, self.inner)

    def out(self, tensor: int) -> Place:
        """The map in what it is added to."""
        return self._map(tensor, self.which.first_out, self.outer)

    def _map(self, tensor: int, first: int, inner: int) -> Place:
        (height, width), before = self.which.grid, self.which.before
        return Place(tensor, before * inner + first, ((before + height * width) * inner, width * inner, inner))


def convolve_channels(tokens: Tensor, which: Channels, weight: Tensor, bias: Tensor | None, add: Tensor, out: Tensor) -> None:
    """The convolved map and `add` into that of `out`, both (B, P + H W, I'), contiguous, which may be the same."""
    if out.numel():
        weight, key = weight.contiguous(), (tokens.dtype, weight.dtype, None if bias is None else bias.dtype, out.device)
        sizes = out.shape[0], tokens.shape[-1], out.shape[-1], weight.shape[0], weight.shape[3]
        part = _Part(which, *sizes, bias is not None, key)
        _part_forward(part)(tokens, weight, tokens if bias is None else bias, add, out)


@settled
def _part_forward(part: _Part) -> Launch:
    places = part.within(0), Place(1), Place(2) if part.flag else None, part.out(3), part.out(4)
    return _convolution_launch(part.shape(), part.side, False, *places, part.which.stripe)


def add_gradients(
    tokens: Tensor, dtokens: Tensor, which: Channels, weight: Tensor, grad: Tensor, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the map's to `dtokens`, from `grad` (B, P + H W, I'), contiguous; returns those of weight and bias, if wanted."""
    weight, key = weight.contiguous(), (tokens.dtype, weight.dtype, tokens.device)
    if not grad.numel():
        return (torch.zeros_like(weight), weight.new_zeros(weight.shape[0])) if wants_weight else (None, None)
    sizes = grad.shape[0], tokens.shape[-1], grad.shape[-1], weight.shape[0], weight.shape[3]
    part = _Part(which, *sizes, wants_weight, key)
    launches, shares = _part_backward(part)
    tensors = [tokens, dtokens, weight, grad]
    of_weight, of_bias = None, None
    if wants_weight:
        sums = grad.new_empty((shares, part.side * part.side + 1, part.channels), dtype=torch.float32)
        of_weight, of_bias = torch.empty_like(weight), weight.new_empty(part.channels)
        tensors += sums, of_weight, of_bias
    launch_all(launches, tensors)
    return of_weight, of_bias


@settled
def _part_backward(part: _Part) -> tuple[list[Launch], int]:
    """Of tokens, their gradient, the weight, the convolution's gradient, shares, gradients of weight and bias."""
    shape, dx, stripe = part.shape(), part.within(1), part.which.stripe
    launches, shares = [_convolution_launch(shape, part.side, True, part.out(3), Place(2), None, dx, dx, stripe)], 0
    if part.flag:
        sums, taps, bc = Place(4), part.side * part.side + 1, 32
        launch, shares = _weight_gradient_launch(shape, part.side, part.within(0), part.out(3), sums, stripe)
        numbers, constants = (part.channels, shares, taps), {"BS": 64, "BC": bc, "num_warps": 4}
        total = Launch(_weight_total_kernel, (ceil_div(taps * part.channels, bc),), (sums, Place(5), Place(6)), numbers, constants)
        launches += launch, total
    return launches, shares
