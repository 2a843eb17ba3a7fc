"""What the kernels share: the sizes of their tiles, how exactly they multiply, and how their tensors lie in memory."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

__all__ = ["LN2", "LOG2E", "last_contiguous", "precision", "tile"]

LOG2E = math.log2(math.e)  # the kernels' softmax is one of base 2
LN2 = math.log(2.0)


def tile(length: int, most: int = 64) -> int:
    """Side of the tile for `length` rows or channels: a power of two, 16 at least, which is what a matrix product takes."""
    return min(most, max(16, int(triton.next_power_of_2(length))))


def precision(x: Tensor) -> str:
    """Of products of tensors like `x`: float32 is multiplied as such unless PyTorch is told that TF32 will do."""
    return "ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


def last_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()
