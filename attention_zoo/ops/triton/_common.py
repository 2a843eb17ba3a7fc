"""What the kernels share: the sizes of their tiles, how exactly they multiply, and how their tensors lie in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._kernels import power_of_2

__all__ = [
    "LN2",
    "LOG2E",
    "absorb",
    "ceil_div",
    "conclude",
    "heads_last",
    "last_contiguous",
    "per_logit",
    "power_of_2",
    "precision",
    "prepare_gradient",
    "read_delta",
    "read_lse",
    "stride_unit",
    "tile",
    "warps",
]

LOG2E = math.log2(math.e)  # the kernels' softmax is one of base 2
LN2 = math.log(2.0)


def tile(length: int, most: int = 64) -> int:
    """Side of the tile for `length` rows or channels: a power of two, 16 at least, which is what a matrix product takes."""
    return min(most, max(16, power_of_2(length)))


# On the host: Triton's own `next_power_of_2` and `cdiv` take some 15 microseconds a call, more than half of a launch.


def ceil_div(length: int, size: int) -> int:
    """How many tiles of `size` cover `length`."""
    return -(-length // size)


def precision(x: Tensor) -> str:
    """Of products of tensors like `x`: float32 is multiplied as such unless PyTorch is told that TF32 will do."""
    return "ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


def warps(numbers: int, each: int = 1024) -> int:
    """For a tile of so many numbers, a power of two: one for every `each` of them, 1 to 4."""
    return max(1, min(4, numbers // each))


def last_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides but the last dimension's."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_last(like: Tensor, channels: int | None = None, heads: int | None = None) -> Tensor:
    """Room of the shape of `like`, (B, H, N, D) or (B, H, rows, columns, D), or for so many channels or heads, with heads next to
    channels as projections read and write them."""
    batch, own_heads, *rows, length, own_channels = like.shape
    heads, channels = own_heads if heads is None else heads, own_channels if channels is None else channels
    token = heads * channels
    row = length * token
    strides = (rows[0] * row, channels, row, token, 1) if rows else (row, channels, token, 1)
    return like.new_empty_strided((batch, heads, *rows, length, channels), strides)


def stride_unit(strides: Iterable[int], element_size: int) -> int:
    """What all strides are multiples of: 16 bytes, or else 1.

    A kernel that is given strides in such units sees how wide its loads may be. By itself Triton sees multiples of 16 numbers only,
    which heads of 24 channels are not.
    """
    unit, bits = 16 // element_size, 0
    for stride in strides:
        bits |= stride
    return 1 if bits & (unit - 1) else unit


@triton.jit
def read_lse(Lse, place, real):
    """Log-normalisers, +inf where a query has seen nothing: the weights 2 ** (x - lse) that are computed again are 0 then."""
    lse = tl.load(Lse + place, mask=real, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def read_delta(out, grad, DLse, place, real, HAS_DLSE: tl.constexpr):
    """out . grad - grad of the log-normaliser, for each query."""
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLse + place, mask=real, other=0.0)
    return delta


@triton.jit
def prepare_gradient(out, grad, Lse, DLse, Delta, place, real, HAS_DLSE: tl.constexpr):
    """What the gradient of a logit is made of besides: the log-normaliser and delta = out . grad - grad of the log-normaliser.

    Delta is kept for the kernel of the keys.
    """
    delta = read_delta(out, grad, DLse, place, real, HAS_DLSE)
    tl.store(Delta + place, delta, mask=real)
    return read_lse(Lse, place, real), delta


@triton.jit
def absorb(x, highest, total):
    """One tile of logits x (queries, keys) enters the running softmax of each query.

    Returns: its weights, relative to the new maximum; by how much what was summed up before fades; the new maximum and denominator.
    """
    higher = tl.maximum(highest, tl.max(x, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    p = tl.exp2(x - anchor[:, None])
    fade = tl.exp2(highest - anchor)
    return p, fade, higher, total * fade + tl.sum(p, 1)


@triton.jit
def conclude(acc, highest, total):
    """Outputs and log-normalisers from the sums of a softmax; a query that has seen nothing gives 0 and -inf."""
    whole = tl.where(total == 0.0, 1.0, total)
    return acc / whole[:, None], tl.where(total == 0.0, float("-inf"), highest + tl.log2(whole))


@triton.jit
def per_logit(scale):
    """Without the factor log2 e, which logits of base 2 carry: what gradients by natural logits are multiplied by."""
    return scale * 0.6931471805599453
