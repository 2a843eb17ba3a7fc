"""What stands between the projections of halo attention, forward and backward, on tensors as its layer has them.

Its launches are settled once for a layer: they find heads in one projection of queries, keys and values, and write gradients there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.triton._common import precision
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled
from attention_zoo.ops.triton.halo import Halo, Scratch, backward_launches, forward_launch

__all__ = ["LayerCall", "attend", "attend_backward"]


class LayerCall(NamedTuple):
    """What the launches of a layer depend on.

    Attributes:
        halo: the call. A cell of a projection has h d channels of queries, then of each head d of keys and d_v of values.
        dtypes, device: of the projection and of both tables.
    """

    halo: Halo
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    device: torch.device

    @staticmethod
    def of(
        qkv: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int], heads: int,
        block: int, halo: int, scale_positions: bool, masked: bool,
    ) -> LayerCall:  # fmt: skip
        """Of a projection (B, H W, h (2 d + d_v)) and the tables (2 win - 1, d)."""
        dtypes, settings = (qkv.dtype, rows.dtype, columns.dtype), (grid, heads, block, halo, scale_positions, masked)
        return _call_of(qkv.shape, rows.shape[1], *settings, precision(qkv), dtypes, qkv.device)

    @property
    def values(self) -> int:
        """Channels of all heads' values."""
        return self.halo.heads * self.halo.value_channels

    def place(self, tensor: int, offset: int, head: int, cell: int) -> Place:
        """By (B, h, H, W), in a tensor (B, H W, `cell`) where heads begin each `head` channels from `offset` on."""
        width = self.halo.width
        return Place(tensor, offset, (self.halo.height * width * cell, head, width * cell, cell))

    def parts(self, tensor: int) -> tuple[Place, Place, Place]:
        """q, k and v in a projection."""
        dim, pair = self.halo.channels, self.halo.channels + self.halo.value_channels
        inner, cell = self.halo.heads * dim, self.halo.heads * (dim + pair)
        starts = ((0, dim), (inner, pair), (inner + dim, pair))
        q, k, v = (self.place(tensor, offset, head, cell) for offset, head in starts)
        return q, k, v

    def alone(self, tensor: int) -> Place:
        """(B, H W, h d_v)."""
        return self.place(tensor, 0, self.halo.value_channels, self.values)


@settled
def _call_of(
    shape: torch.Size, dim: int, grid: tuple[int, int], heads: int, block: int, halo: int, scale_positions: bool, masked: bool,
    precision: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device,
) -> LayerCall:  # fmt: skip
    """To look one up takes half as long as to make it."""
    scale = dim**-0.5
    sizes = shape[0], heads, *grid, dim, shape[2] // heads - 2 * dim
    factors = scale, scale if scale_positions else 1.0
    return LayerCall(Halo(*sizes, block, halo, 1, *factors, masked, True, dtypes[0].itemsize, precision), dtypes, device)


@settled
def _forward_launch(layer: LayerCall) -> Launch:
    """Of projection, tables, outputs, log-normalisers."""
    return forward_launch(layer.halo, *layer.parts(0), (Place(1), Place(2)), layer.alone(3), Place(4))


def attend(qkv: Tensor, rows: Tensor, columns: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
    """Outputs (B, H W, h d_v) and log-normalisers (B, h, H W), of a projection and tables that are contiguous."""
    batch, tokens, _ = qkv.shape
    out = qkv.new_empty((batch, tokens, layer.values))
    lse = qkv.new_empty((batch, layer.halo.heads, tokens), dtype=torch.float32)
    if batch:
        _forward_launch(layer)(qkv, rows, columns, out, lse)
    return out, lse


@settled
def _backward_launches(layer: LayerCall, learns: bool) -> tuple[list[Launch], Scratch]:
    """Of projection, tables, outputs, log-normalisers, gradients of outputs and of the projection, scratch, then of the tables."""
    parts, tables, gradients = layer.parts(0), (Place(1), Place(2)), layer.parts(6)
    d_tables = (Place(10), Place(11)) if learns else None
    scratch = Place(7), Place(8), Place(9)
    of_outputs = layer.alone(3), Place(4), layer.alone(5)
    return backward_launches(layer.halo, *parts, tables, *of_outputs, None, *gradients, scratch, d_tables)


def attend_backward(
    qkv: Tensor, rows: Tensor, columns: Tensor, out: Tensor, lse: Tensor, grad: Tensor, layer: LayerCall, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From `grad` (B, H W, h d_v), contiguous: of the projection, and of both tables if they learn."""
    dqkv = torch.empty_like(qkv)
    d_rows, d_columns = (torch.empty_like(rows), torch.empty_like(columns)) if learns else (None, None)
    given = () if d_rows is None or d_columns is None else (d_rows, d_columns)
    if not qkv.shape[0]:
        for table in given:
            table.zero_()
        return dqkv, d_rows, d_columns
    launches, scratch = _backward_launches(layer, learns)
    distances, kept, sums = qkv.new_empty(scratch.distances), qkv.new_empty(scratch.kept), lse.new_empty(scratch.sums)
    launch_all(launches, (qkv, rows, columns, out, lse, grad, dqkv, distances, kept, sums, *given))
    return dqkv, d_rows, d_columns
