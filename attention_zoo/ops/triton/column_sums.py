"""Sums of the columns of a tall matrix, as the gradient of a linear layer's bias needs them, as Triton kernels.

torch's own reduction of the first dimension takes four times the memory of a half-precision matrix to work in: more than all else
in the backward pass of a small layer. Here programs share out the rows, and what they found is added up in a second step. Several
matrices take two launches together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, tile
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = ["column_sums", "joint_column_sums"]

_PROGRAMS, _ROWS = 512, 64  # that share out the matrix; of a tile


@triton.jit
def _share(pid, X, Sums, sx, ROWS, COLUMNS, SHARE, TILES, BR: tl.constexpr, BC: tl.constexpr):
    """Of `SHARE` rows: a row of (shares, columns)."""
    share, c = pid // TILES, pid % TILES * BC + tl.arange(0, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, ROWS), BR):
        r = start + tl.arange(0, BR)
        at = X + r[:, None].to(tl.int64) * sx + c[None, :]
        acc += tl.load(at, mask=(r < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0).to(tl.float32)
    tl.store(Sums + share.to(tl.int64) * COLUMNS + c, tl.sum(acc, 0), mask=c < COLUMNS)


@triton.jit
def _share_kernel(
    X, X1, X2, Sums, Sums1, Sums2,
    sx, ROWS, COLUMNS, SHARE, TILES, sx1, ROWS1, COLUMNS1, SHARE1, TILES1, sx2, ROWS2, COLUMNS2, SHARE2, TILES2, END, END1,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < END:
        _share(pid, X, Sums, sx, ROWS, COLUMNS, SHARE, TILES, BR, BC)
    elif pid < END1:
        _share(pid - END, X1, Sums1, sx1, ROWS1, COLUMNS1, SHARE1, TILES1, BR, BC)
    else:
        _share(pid - END1, X2, Sums2, sx2, ROWS2, COLUMNS2, SHARE2, TILES2, BR, BC)


@triton.jit
def _total(portion, Sums, Out, COLUMNS, SHARES, BS: tl.constexpr, BC: tl.constexpr):
    c = portion * BC + tl.arange(0, BC)
    acc = tl.zeros([BS, BC], tl.float32)
    for start in range(0, SHARES, BS):
        s = start + tl.arange(0, BS)
        at = Sums + s[:, None].to(tl.int64) * COLUMNS + c[None, :]
        acc += tl.load(at, mask=(s < SHARES)[:, None] & (c < COLUMNS)[None, :], other=0.0)
    tl.store(Out + c, tl.sum(acc, 0).to(Out.dtype.element_ty), mask=c < COLUMNS)


@triton.jit
def _total_kernel(
    Sums, Sums1, Sums2, Out, Out1, Out2, COLUMNS, SHARES, COLUMNS1, SHARES1, COLUMNS2, SHARES2, END, END1,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < END:
        _total(pid, Sums, Out, COLUMNS, SHARES, BS, BC)
    elif pid < END1:
        _total(pid - END, Sums1, Out1, COLUMNS1, SHARES1, BS, BC)
    else:
        _total(pid - END1, Sums2, Out2, COLUMNS2, SHARES2, BS, BC)


@operator("column_sums")
def column_sums(x: Tensor) -> Tensor:
    """(R, C) -> (C,) in the dtype of x, summed in float32. No gradient."""
    return _together((x,))


@column_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


def joint_column_sums(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of up to three matrices of one dtype, in one go. No gradient."""
    if column_sums.unseen() is column_sums:  # somebody looks on
        return [column_sums(x) for x in matrices]
    found = _together(matrices)
    return [found] if len(matrices) == 1 else found.split_with_sizes([x.shape[1] for x in matrices])


def _together(matrices: Sequence[Tensor]) -> Tensor:
    """One after the other."""
    matrices = [last_contiguous(x) for x in matrices]
    first = matrices[0]
    out = first.new_empty(sum(x.shape[1] for x in matrices))
    if out.numel():
        sizes = tuple((*x.shape, x.stride(0)) for x in matrices)
        launches, numbers = _launches(sizes, first.dtype, first.device)
        launch_all(launches, (*matrices, first.new_empty(numbers, dtype=torch.float32), out))
    return out


@settled
def _launches(
    matrices: tuple[tuple[int, int, int], ...], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Launch, Launch], int]:
    """Of matrices, given by rows, columns and steps from row to row, of shares and of sums; how many numbers are in the shares."""
    bc, count = tile(max(columns for _, columns, _ in matrices)), len(matrices)
    of_share, of_total, sums, outs = list[int](), list[int](), list[Place](), list[Place]()
    programs, tiles_until, numbers, columns_until = [0], [0], 0, 0
    for rows, columns, stride in matrices:
        tiles = ceil_div(columns, bc)
        share = ceil_div(max(1, ceil_div(rows * tiles, _PROGRAMS)), _ROWS) * _ROWS
        shares = max(1, ceil_div(rows, share))
        of_share += stride, rows, columns, share, tiles
        of_total += columns, shares
        sums.append(Place(count, numbers))
        outs.append(Place(count + 1, columns_until))
        programs.append(programs[-1] + shares * tiles)
        tiles_until.append(tiles_until[-1] + tiles)
        numbers, columns_until = numbers + shares * columns, columns_until + columns
    missing = 3 - count  # of which there are no programs
    given = [Place(number) for number in range(count)] + [Place(0)] * missing
    sums, outs = sums + sums[:1] * missing, outs + outs[:1] * missing
    ends, ends_total = (programs + programs[-1:] * missing)[1:3], (tiles_until + tiles_until[-1:] * missing)[1:3]
    first = Launch(
        _share_kernel,
        (programs[-1],),
        (*given, *sums),
        (*of_share, *of_share[:5] * missing, *ends),
        {"BR": _ROWS, "BC": bc, "num_warps": 4},
    )
    constants = {"BS": 16, "BC": bc, "num_warps": 4}
    second = Launch(_total_kernel, (tiles_until[-1],), (*sums, *outs), (*of_total, *of_total[:2] * missing, *ends_total), constants)
    return (first, second), numbers
