"""The parts of a fused projection, whose gradients need no copy where they already lie side by side.

The gradient of `torch.split` puts those of the parts together in new memory. An operation that has written them into one tensor,
as the projection has its outputs, is spared that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._operators import stands_alone

__all__ = ["joined", "lie_in_one", "split_channels"]


def split_channels(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x.split(sizes, -1), of sizes that add up to the channels."""
    if not (x.requires_grad and torch.is_grad_enabled() and stands_alone(x)):
        return x.split(list(sizes), -1)
    return _Split.apply(x, list(sizes))  # type: ignore[no-any-return, no-untyped-call]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return x.split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        whole = None if torch.is_grad_enabled() else joined(grads)  # gradients of gradients: `cat` has them
        return torch.cat(grads, -1) if whole is None else whole, None


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor (..., C) whose channels are `parts`, one after the other, and nothing else; None: there is none in memory."""
    first = parts[0]
    shape = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
    if any(type(part) is not Tensor or part.layout != torch.strided for part in parts) or 0 in shape:
        return None
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    place = first.storage_offset()
    for part in parts:
        if part.dtype != first.dtype or not _share_memory(part, first) or part.storage_offset() != place:
            return None
        if any(n > 1 and own != step for n, own, step in zip(part.shape, part.stride(), strides, strict=True)):
            return None
        place += part.shape[-1]
    return first.as_strided(shape, strides)


def lie_in_one(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q (B, H, N, D), k and v (B, H_kv, N, D) are cut out of the channels of one tensor, in this order."""
    if not all(stands_alone(t) and t.dtype == q.dtype and t.shape[2:] == q.shape[2:] for t in (q, k, v)):
        return False
    if not (q.stride() == k.stride() == v.stride() and _share_memory(q, k) and _share_memory(q, v)):
        return False
    steps = (k.storage_offset() - q.storage_offset(), v.storage_offset() - k.storage_offset())
    whole = sum(t.shape[1] for t in (q, k, v)) * q.shape[3]
    return steps == (q.shape[1] * q.shape[3], k.shape[1] * k.shape[3]) and q.stride()[1:] == (q.shape[3], whole, 1)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
