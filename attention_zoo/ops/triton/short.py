"""Plain attention of many short sequences as Triton kernels: each is the one window of a map of one row (`windows.py`).

A kernel serves all lengths up to the next power of two, as windows that stick out of their map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import heads_last, last_contiguous, power_of_2, precision
from attention_zoo.ops.triton._launch import Launch, Place, settled
from attention_zoo.ops.triton.windows import Windows, backward_launch, forward_launch

__all__ = ["short_attention_triton"]

_Strides = tuple[int, ...]


def _windows(shape: torch.Size, value_dim: int, scale: float, dtype: torch.dtype, products: str) -> Windows:
    batch, heads, length, dim = shape
    columns = power_of_2(length)
    return Windows(batch, heads, 1, length, dim, value_dim, 0, (1, columns), scale, columns > length, dtype.itemsize, products)


def _places(strides: tuple[_Strides, ...]) -> list[Place]:
    """Of tensors (B, heads, N, D) as maps (B, heads, 1, N, D)."""
    return [Place(number, 0, (batch, head, 0, token)) for number, (batch, head, token, _) in enumerate(strides)]


@settled
def _forward_of(call: tuple[Any, ...], device: torch.device, *strides: _Strides) -> Launch:
    q, k, v, out = _places(strides)
    return forward_launch(_windows(*call), q, k, v, q, out)


@settled
def _backward_of(call: tuple[Any, ...], device: torch.device, *strides: _Strides) -> Launch:
    q, k, v, grad, dq, dk, dv = _places(strides)
    return backward_launch(_windows(*call), q, k, v, q, grad, dq, dk, dv)[0]


@operator("short_forward")
def _short_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = heads_last(v)
    if out.numel():
        q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
        call = q.shape, v.shape[3], scale, q.dtype, precision(q)
        _forward_of(call, q.device, q.stride(), k.stride(), v.stride(), out.stride())(q, k, v, out)
    return out


@_short_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return heads_last(v)


@operator("short_backward")
def _short_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    if grad.numel():
        tensors = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad), dq, dk, dv
        call = q.shape, v.shape[3], scale, q.dtype, precision(q)
        _backward_of(call, q.device, *[tensor.stride() for tensor in tensors])(*tensors)
    return dq, dk, dv


@_short_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return heads_last(q), heads_last(k), heads_last(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v = ctx.saved_tensors
    return *_short_backward(q, k, v, grad, ctx.scale), None


_short_forward.register_autograd(_backward, setup_context=_setup)


def short_attention_triton(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Outputs (B, heads, N, D_v) of queries, keys and values (B, heads, N, D | D_v): all see all."""
    return _short_forward(q, k, v, scale)
