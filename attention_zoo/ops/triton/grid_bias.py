"""Biases of agents over a grid, from tables, as Triton kernels: a square table resampled, plus one for rows and one for columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["grid_bias_gradient_launch", "grid_bias_launch", "grid_bias_triton"]


@triton.jit
def _source(place, size, table):
    """Where a place of an axis of `size` stands in a table along it: bilinear resampling, align_corners=False."""
    cells = tl.cast(table, tl.float32)  # a size of 1 is a constant to Triton, which has no method `to`
    at = (place.to(tl.float32) + 0.5) * (cells / tl.cast(size, tl.float32)) - 0.5
    return tl.minimum(tl.maximum(at, 0.0), cells - 1.0)


@triton.jit
def _weight(place, cell, size, table):
    """How much a table's cell counts at a place: a tent around it."""
    return tl.maximum(1.0 - tl.abs(_source(place, size, table) - cell.to(tl.float32)), 0.0)


@triton.jit
def _grid_bias_kernel(
    Square, Rows, Columns, Prefix, Out, ssh, ssn, ssy, ssx, srh, srn, sry, sch, scn, scx, sph, spn, spp,
    N, P, H, W, SH, SW, TILES, BT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    hn, portion = pid // TILES, pid % TILES
    h, n = hn // N, hn % N
    t = portion * BT + tl.arange(0, BT)
    there = (t >= P) & (t < P + H * W)
    place = tl.where(there, t - P, 0)
    y, x = place // W, place % W
    sy, sx = _source(y, H, SH), _source(x, W, SW)
    y0, x0 = sy.to(tl.int32), sx.to(tl.int32)
    y1, x1 = tl.minimum(y0 + 1, SH - 1), tl.minimum(x0 + 1, SW - 1)
    fy, fx = sy - y0.to(tl.float32), sx - x0.to(tl.float32)
    at = Square + h * ssh + n * ssn
    upper = tl.load(at + y0 * ssy + x0 * ssx).to(tl.float32) * (1.0 - fx) + tl.load(at + y0 * ssy + x1 * ssx).to(tl.float32) * fx
    lower = tl.load(at + y1 * ssy + x0 * ssx).to(tl.float32) * (1.0 - fx) + tl.load(at + y1 * ssy + x1 * ssx).to(tl.float32) * fx
    value = upper * (1.0 - fy) + lower * fy
    value += tl.load(Rows + h * srh + n * srn + y * sry).to(tl.float32)
    value += tl.load(Columns + h * sch + n * scn + x * scx).to(tl.float32)
    before = tl.load(Prefix + h * sph + n * spn + t * spp, mask=t < P, other=0.0).to(tl.float32)
    value = tl.where(t < P, before, value)
    tl.store(Out + hn.to(tl.int64) * (P + H * W) + t, value.to(Out.dtype.element_ty), mask=t < P + H * W)


@triton.jit
def _grid_bias_gradient_kernel(
    Grad, DSquare, DRows, DColumns, DPrefix, sgh, sgn, srh, srn, sry, sch, scn, scx, sph, spn, spp, N, P, H, W, SH, SW,
    BP: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """All tables of one agent of one head: the square one by two products with weights, the others are sums along the axes."""
    hn = tl.program_id(0)
    h, n = (hn // N).to(tl.int64), hn % N
    before = tl.arange(0, BP)
    prefix = tl.load(Grad + h * sgh + n * sgn + before, mask=before < P, other=0.0)
    tl.store(DPrefix + h * sph + n * spn + before * spp, prefix.to(DPrefix.dtype.element_ty), mask=before < P)
    x, cell = tl.arange(0, BX), tl.arange(0, BS)
    across = tl.where((x < W)[:, None] & (cell < SW)[None, :], _weight(x[:, None], cell[None, :], W, SW), 0.0)
    columns = tl.zeros([BX], tl.float32)
    square = tl.zeros([BS, BS], tl.float32)
    Grad += h * sgh + n * sgn + P
    for start in range(0, H, BY):
        y = start + tl.arange(0, BY)
        grad = tl.load(Grad + y[:, None] * W + x[None, :], mask=(y < H)[:, None] & (x < W)[None, :], other=0.0).to(tl.float32)
        columns += tl.sum(grad, 0)
        tl.store(DRows + h * srh + n * srn + y * sry, tl.sum(grad, 1).to(DRows.dtype.element_ty), mask=y < H)
        down = tl.where((y < H)[None, :] & (cell < SH)[:, None], _weight(y[None, :], cell[:, None], H, SH), 0.0)
        square += tl.dot(down, tl.dot(grad, across, input_precision="ieee"), input_precision="ieee")
    tl.store(DColumns + h * sch + n * scn + x * scx, columns.to(DColumns.dtype.element_ty), mask=x < W)
    at = DSquare + hn.to(tl.int64) * SH * SW + cell[:, None] * SW + cell[None, :]
    tl.store(at, square.to(DSquare.dtype.element_ty), mask=(cell < SH)[:, None] & (cell < SW)[None, :])


@operator("grid_bias_forward")
def _grid_bias_forward(
    square: Tensor, rows: Tensor, columns: Tensor, prefix: Tensor | None, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    heads, number = square.shape[:2]
    before = 0 if prefix is None else prefix.shape[2]
    out = square.new_empty((heads, number, before + height * width), dtype=dtype)
    if not out.numel():
        return out
    tables = (square, rows, columns) if prefix is None else (square, rows, columns, prefix)
    strides = tuple(t.stride() for t in tables)
    launch = _grid_bias_of(
        (heads, number, before), (height, width), square.shape[2:], strides, (*(t.dtype for t in tables), dtype), square.device
    )
    launch(square, rows, columns, square if prefix is None else prefix, out)
    return out


@settled
def _grid_bias_of(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    sides: Sequence[int],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    square, rows, columns, *prefix = (Place(number, 0, of) for number, of in enumerate(strides))
    return grid_bias_launch(shape, size, sides, square, rows, columns, prefix[0] if prefix else None, Place(4))


def grid_bias_launch(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    sides: Sequence[int],
    square: Place,
    rows: Place,
    columns: Place,
    prefix: Place | None,
    out: Place,
) -> Launch:
    """Of h heads, n agents, and P tokens before a grid of `size`; tables by (h, n, ...), square ones with these `sides`."""
    heads, number, before = shape
    length = before + size[0] * size[1]
    bt = min(1024, max(128, power_of_2(length)))
    tiles = ceil_div(length, bt)
    of_prefix = prefix.strides if prefix else (0, 0, 0)
    numbers = *square.strides, *rows.strides, *columns.strides, *of_prefix, number, before, *size, *sides, tiles
    places = square, rows, columns, prefix or square, out
    return Launch(_grid_bias_kernel, (heads * number * tiles,), places, numbers, {"BT": bt, "num_warps": 4})


@_grid_bias_forward.register_fake
def _(square: Tensor, rows: Tensor, columns: Tensor, prefix: Tensor | None, height: int, width: int, dtype: torch.dtype) -> Tensor:
    before = 0 if prefix is None else prefix.shape[2]
    return square.new_empty((*square.shape[:2], before + height * width), dtype=dtype)


@operator("grid_bias_backward")
def _grid_bias_backward(
    grad: Tensor, before: int, height: int, width: int, side_y: int, side_x: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the square, row and column tables, and of the prefix."""
    grad = last_contiguous(grad)
    heads, number = grad.shape[:2]
    square, rows, columns, prefix = _empty_tables(grad, before, height, width, side_y, side_x, dtype)
    if grad.numel():
        sizes, strides = (heads, number, before), tuple(t.stride() for t in (grad, rows, columns, prefix))
        launch = _grid_bias_gradient_of(sizes, (height, width), (side_y, side_x), strides, (grad.dtype, dtype), grad.device)
        launch(grad, rows, columns, prefix, square)
    return square, rows, columns, prefix


@settled
def _grid_bias_gradient_of(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    sides: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    grad, rows, columns, prefix = (Place(number, 0, of) for number, of in enumerate(strides))
    return grid_bias_gradient_launch(shape, size, sides, grad, Place(4), rows, columns, prefix if shape[2] else None)


def grid_bias_gradient_launch(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    sides: tuple[int, int],
    grad: Place,
    square: Place,
    rows: Place,
    columns: Place,
    prefix: Place | None,
) -> Launch:
    """As `grid_bias_launch`, from `grad` by (h, n, tokens side by side); `square` is contiguous."""
    heads, number, before = shape
    bx, of_prefix = max(16, power_of_2(size[1])), prefix.strides if prefix else (0, 0, 0)
    numbers = *grad.strides[:2], *rows.strides, *columns.strides, *of_prefix, number, before, *size, *sides
    constants = {"BP": max(16, power_of_2(before)), "BY": 16, "BX": bx, "BS": tile(max(sides), 64)}
    places = grad, square, rows, columns, prefix or square
    return Launch(_grid_bias_gradient_kernel, (heads * number,), places, numbers, {**constants, "num_warps": 4 if bx <= 128 else 8})


@_grid_bias_backward.register_fake
def _(
    grad: Tensor, before: int, height: int, width: int, side_y: int, side_x: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_tables(grad, before, height, width, side_y, side_x, dtype)


def _empty_tables(
    grad: Tensor, before: int, height: int, width: int, side_y: int, side_x: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((side_y, side_x), (height,), (width,), (before,))
    square, rows, columns, prefix = (grad.new_empty((*grad.shape[:2], *size), dtype=dtype) for size in sizes)
    return square, rows, columns, prefix


def _setup_grid_bias(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    square, rows, columns, prefix, height, width, _ = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (square, rows, columns, prefix)]
    ctx.sizes = (0 if prefix is None else prefix.shape[2], height, width, *square.shape[2:], square.dtype)


def _backward_grid_bias(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = zip(_grid_bias_backward(grad, *ctx.sizes), ctx.dtypes, strict=True)
    return *(None if dtype is None else t.to(dtype) for t, dtype in found), None, None, None


_grid_bias_forward.register_autograd(_backward_grid_bias, setup_context=_setup_grid_bias)


def grid_bias_triton(
    square: Tensor, rows: Tensor, columns: Tensor, *, prefix: Tensor | None, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(h, n, P + H W) of (h, n, b, b'), (h, n, H), (h, n, W) and (h, n, P): up(square) + rows + columns after the prefix."""
    out: Tensor = _grid_bias_forward(square, rows, columns, prefix, *size, dtype)
    return out
