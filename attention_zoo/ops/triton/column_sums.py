"""Sums of the columns of a tall matrix, as the gradient of a linear layer's bias needs them, as Triton kernels.

torch's own reduction of the first dimension takes four times the memory of a half-precision matrix to work in: more than all else
in the backward pass of a small layer. Here programs share out the rows, and what they found is added up in a second step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["column_sums"]

_PROGRAMS, _ROWS = 512, 64  # that share out the matrix; of a tile


@triton.jit
def _share_kernel(X, Sums, sx, ROWS, COLUMNS, SHARE, TILES, BR: tl.constexpr, BC: tl.constexpr):
    """Of `SHARE` rows: a row of (shares, columns)."""
    pid = tl.program_id(0)
    share, c = pid // TILES, pid % TILES * BC + tl.arange(0, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, ROWS), BR):
        r = start + tl.arange(0, BR)
        at = X + r[:, None].to(tl.int64) * sx + c[None, :]
        acc += tl.load(at, mask=(r < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0).to(tl.float32)
    tl.store(Sums + share.to(tl.int64) * COLUMNS + c, tl.sum(acc, 0), mask=c < COLUMNS)


@triton.jit
def _total_kernel(Sums, Out, COLUMNS, SHARES, BS: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros([BS, BC], tl.float32)
    for start in range(0, SHARES, BS):
        s = start + tl.arange(0, BS)
        at = Sums + s[:, None].to(tl.int64) * COLUMNS + c[None, :]
        acc += tl.load(at, mask=(s < SHARES)[:, None] & (c < COLUMNS)[None, :], other=0.0)
    tl.store(Out + c, tl.sum(acc, 0).to(Out.dtype.element_ty), mask=c < COLUMNS)


@operator("column_sums")
def column_sums(x: Tensor) -> Tensor:
    """(R, C) -> (C,) in the dtype of x, summed in float32. No gradient."""
    x = last_contiguous(x)
    rows, columns = x.shape
    out = x.new_empty(columns)
    if not columns:
        return out
    first, second, shares = _launches(rows, columns, x.stride(0), x.dtype, x.device)
    sums = x.new_empty((shares, columns), dtype=torch.float32)
    first(x, sums)
    second(sums, out)
    return out


@settled
def _launches(rows: int, columns: int, stride: int, dtype: torch.dtype, device: torch.device) -> tuple[Launch, Launch, int]:
    """Of the matrix and the shares, and of the shares and the sums; the number of shares."""
    bc = tile(columns)
    tiles = ceil_div(columns, bc)
    share = ceil_div(max(1, ceil_div(rows * tiles, _PROGRAMS)), _ROWS) * _ROWS
    shares, places = max(1, ceil_div(rows, share)), (Place(0), Place(1))
    of_shares = {"BR": _ROWS, "BC": bc, "num_warps": 4}
    first = Launch(_share_kernel, (shares * tiles,), places, (stride, rows, columns, share, tiles), of_shares)
    second = Launch(_total_kernel, (tiles,), places, (columns, shares), {"BS": 16, "BC": bc, "num_warps": 4})
    return first, second, shares


@column_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])
