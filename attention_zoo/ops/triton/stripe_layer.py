"""What stands between the projections of attention in stripes, forward and backward, on tensors as its layer has them.

Branches share the channels of a projection and of the output. Each reads its heads in windows that are its stripes, where they
stand, and writes outputs and gradients there, in launches that are settled once for a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.triton._common import precision
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled
from attention_zoo.ops.triton.windows import Windows, backward_launch, forward_launch

__all__ = ["LayerCall", "attend", "attend_backward"]

Grid = tuple[int, int]


class LayerCall(NamedTuple):
    """What the launches of a layer depend on.

    Attributes:
        batch, grid: of samples, of the tokens.
        stripes: of each branch, rows and columns.
        heads, dim: of heads of each branch and their channels.
        scale: factor of the logits.
        dtype, device: of the projection.
    """

    batch: int
    grid: Grid
    stripes: tuple[Grid, ...]
    heads: int
    dim: int
    scale: float
    bytes: int
    precision: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, qkv: Tensor, grid: Grid, stripes: tuple[Grid, ...], heads: int, scale: float) -> LayerCall:
        """Of a projection (B, H W, 3 C), C = branches h d."""
        sizes = qkv.shape[0], grid, stripes, heads, qkv.shape[2] // (3 * len(stripes) * heads), scale
        return cls(*sizes, qkv.element_size(), precision(qkv), qkv.dtype, qkv.device)

    @property
    def channels(self) -> int:
        """Of all branches."""
        return len(self.stripes) * self.heads * self.dim

    def windows(self, branch: int) -> Windows:
        (height, width), (rows, columns) = self.grid, self.stripes[branch]
        sizes = self.batch, self.heads, height, width, self.dim, self.dim, 0, (rows, columns)
        masked = height % rows != 0 or width % columns != 0  # what fills up the last stripe is not read
        return Windows(*sizes, self.scale, masked, self.bytes, self.precision)

    def part(self, tensor: int, number: int, branch: int, parts: int = 3) -> Place:
        """A branch's q, k or v in a projection, or its share of what has one part, by (B, h, H, W)."""
        (height, width), row = self.grid, parts * self.channels
        return Place(
            tensor, number * self.channels + branch * self.heads * self.dim, (height * width * row, self.dim, width * row, row)
        )


@settled
def _forward_launches(layer: LayerCall) -> list[Launch]:
    """Of the projection and outputs."""
    launches = []
    for branch in range(len(layer.stripes)):
        q, k, v = (layer.part(0, number, branch) for number in range(3))
        launches.append(forward_launch(layer.windows(branch), q, k, v, Place(0), layer.part(1, 0, branch, 1)))
    return launches


def attend(qkv: Tensor, layer: LayerCall) -> Tensor:
    """(B, H W, 3 C), contiguous -> (B, H W, C)."""
    out = qkv.new_empty((*qkv.shape[:2], layer.channels))
    if layer.batch:
        launch_all(_forward_launches(layer), (qkv, out))
    return out


@settled
def _backward_launches(layer: LayerCall) -> list[Launch]:
    """Of the projection, gradients of outputs, and gradients of the projection."""
    launches = []
    for branch in range(len(layer.stripes)):
        q, k, v, dq, dk, dv = (layer.part(tensor, number, branch) for tensor in (0, 2) for number in range(3))
        grad = layer.part(1, 0, branch, 1)
        launches.append(backward_launch(layer.windows(branch), q, k, v, Place(0), grad, dq, dk, dv)[0])
    return launches


def attend_backward(qkv: Tensor, grad: Tensor, layer: LayerCall) -> Tensor:
    """Of the projection, from `grad` (B, H W, C), contiguous."""
    dqkv = torch.empty_like(qkv)
    if layer.batch:
        launch_all(_backward_launches(layer), (qkv, grad, dqkv))
    return dqkv
