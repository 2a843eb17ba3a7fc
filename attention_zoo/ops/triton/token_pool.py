"""Adaptive average pooling of tokens on a grid as Triton kernels: means over bins, and for gradients each token from its bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, tile, warps
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["pool_gradient_launch", "pool_launch", "pool_tokens_triton"]


@triton.jit
def _pool_kernel(
    X, Out, sxb, sxt, H, W, BINS_Y, BINS_X, C, TILES, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    which, portion = pid // TILES, pid % TILES
    b, place = (which // (BINS_Y * BINS_X)).to(tl.int64), which % (BINS_Y * BINS_X)
    i, j = place // BINS_X, place % BINS_X
    top, left = i * H // BINS_Y, j * W // BINS_X
    height, width = ((i + 1) * H + BINS_Y - 1) // BINS_Y - top, ((j + 1) * W + BINS_X - 1) // BINS_X - left
    c = portion * BC + tl.arange(0, BC)
    acc = tl.zeros([BT, BC], tl.float32)
    for start in range(0, height * width, BT):
        p = start + tl.arange(0, BT)
        t = (top + p // width) * W + left + p % width
        wanted = (p < height * width)[:, None] & (c < C)[None, :]
        acc += tl.load(X + b * sxb + t[:, None].to(tl.int64) * sxt + c[None, :], mask=wanted, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / (height * width)
    tl.store(Out + which.to(tl.int64) * C + c, mean.to(Out.dtype.element_ty), mask=c < C)


@triton.jit
def _pool_gradient_kernel(
    Grad, DX, sdb, sdt, H, W, BINS_Y, BINS_X, C, TILES, TILES_C,
    MOST_Y: tl.constexpr, MOST_X: tl.constexpr, ADD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Every token gathers from the bins that it lies in, at most `MOST_Y` x `MOST_X`."""
    pid = tl.program_id(0)
    rest, portion_c = pid // TILES_C, pid % TILES_C
    b, portion = (rest // TILES).to(tl.int64), rest % TILES
    t, c = portion * BT + tl.arange(0, BT), portion_c * BC + tl.arange(0, BC)
    y, x = t // W, t % W
    wanted = (t < H * W)[:, None] & (c < C)[None, :]
    acc = tl.zeros([BT, BC], tl.float32)
    for e in range(MOST_Y * MOST_X):
        i, j = y * BINS_Y // H + e // MOST_X, x * BINS_X // W + e % MOST_X
        inside = (i * H < (y + 1) * BINS_Y) & (j * W < (x + 1) * BINS_X) & (i < BINS_Y) & (j < BINS_X)
        height = ((i + 1) * H + BINS_Y - 1) // BINS_Y - i * H // BINS_Y
        width = ((j + 1) * W + BINS_X - 1) // BINS_X - j * W // BINS_X
        share = tl.where(inside, 1.0 / (height * width).to(tl.float32), 0.0)
        at = Grad + (b * BINS_Y * BINS_X + i * BINS_X + j)[:, None] * C + c[None, :]
        acc += tl.load(at, mask=wanted & inside[:, None], other=0.0).to(tl.float32) * share[:, None]
    at = DX + b * sdb + t[:, None].to(tl.int64) * sdt + c[None, :]
    if ADD:
        acc += tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(at, acc.to(DX.dtype.element_ty), mask=wanted)


@operator("pool_forward")
def _pool_forward(x: Tensor, height: int, width: int, bins_y: int, bins_x: int) -> Tensor:
    x = last_contiguous(x)
    batch, _, channels = x.shape
    out = x.new_empty((batch, bins_y * bins_x, channels))
    if out.numel():
        _pool_of(x.shape, (height, width), (bins_y, bins_x), x.stride(), x.dtype, x.device)(x, out)
    return out


@settled
def _pool_of(
    shape: Sequence[int],
    size: tuple[int, int],
    bins: tuple[int, int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    return pool_launch(shape[0], shape[2], size, bins, Place(0, 0, tuple(strides[:2])), Place(1))


def pool_launch(batch: int, channels: int, size: tuple[int, int], bins: tuple[int, int], x: Place, out: Place) -> Launch:
    """Of tokens by (B, H W), channels side by side, into (B, a b, C)."""
    rows, columns = (side // of if not side % of else ceil_div(side, of) + 1 for side, of in zip(size, bins, strict=True))
    bt = min(64, power_of_2(rows * columns))  # small bins have small tiles, and few warps
    bc = tile(channels, 128 if bt <= 16 else 64)
    tiles = ceil_div(channels, bc)
    numbers = *x.strides, *size, *bins, channels, tiles
    constants = {"BT": bt, "BC": bc, "num_warps": warps(bt * bc)}
    return Launch(_pool_kernel, (batch * bins[0] * bins[1] * tiles,), (x, out), numbers, constants)


@_pool_forward.register_fake
def _(x: Tensor, height: int, width: int, bins_y: int, bins_x: int) -> Tensor:
    return x.new_empty((x.shape[0], bins_y * bins_x, x.shape[2]))


@operator("pool_backward")
def _pool_backward(grad: Tensor, height: int, width: int, bins_y: int, bins_x: int) -> Tensor:
    batch, _, channels = grad.shape
    dx, grad = grad.new_empty((batch, height * width, channels)), grad.contiguous()
    if dx.numel():
        _pool_gradient_of(batch, channels, (height, width), (bins_y, bins_x), grad.dtype, grad.device)(grad, dx)
    return dx


@settled
def _pool_gradient_of(
    batch: int, channels: int, size: tuple[int, int], bins: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Launch:
    dx = Place(1, 0, (size[0] * size[1] * channels, channels))
    return pool_gradient_launch(batch, channels, size, bins, Place(0), dx)


def pool_gradient_launch(
    batch: int, channels: int, size: tuple[int, int], bins: tuple[int, int], grad: Place, dx: Place, *, add: bool = False
) -> Launch:
    """From `grad` (B, a b, C) into `dx` by (B, H W), channels side by side; `add`: to what it has."""
    bc = tile(channels)
    tiles, tiles_c = ceil_div(size[0] * size[1], 64), ceil_div(channels, bc)
    most = [1 if not side % of else 2 if side >= of else -(-of // side) + 1 for side, of in zip(size, bins, strict=True)]
    constants = {"MOST_Y": most[0], "MOST_X": most[1], "ADD": add, "BT": 64, "BC": bc, "num_warps": 4}
    numbers = *dx.strides, *size, *bins, channels, tiles, tiles_c
    return Launch(_pool_gradient_kernel, (batch * tiles * tiles_c,), (grad, dx), numbers, constants)


@_pool_backward.register_fake
def _(grad: Tensor, height: int, width: int, bins_y: int, bins_x: int) -> Tensor:
    return grad.new_empty((grad.shape[0], height * width, grad.shape[2]))


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = inputs[1:]


def _backward_pool(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _pool_backward(grad, *ctx.sizes), None, None, None, None


_pool_forward.register_autograd(_backward_pool, setup_context=_setup_pool)


def pool_tokens_triton(x: Tensor, size: tuple[int, int], bins: tuple[int, int]) -> Tensor:
    """(B, H W, C) -> (B, a b, C): means over the bins of adaptive average pooling."""
    out: Tensor = _pool_forward(x, *size, *bins)
    return out
