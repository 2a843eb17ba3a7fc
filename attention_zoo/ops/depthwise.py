"""Depthwise convolution of tokens on a map: each channel with a small kernel of its own, channels last, as attention has them.

PyTorch's convolution is the specification of the kernel of `triton/depthwise.py`, which reads maps of any strides as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel

__all__ = ["depthwise_conv2d"]


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Stride 1, zeros outside, the map keeps its size.

        out(y, x, c) = bias(c) + sum_{i, j} weight(c, i, j) x(y + i - k // 2, x + j - k // 2, c)

    Args:
        x: (B, H, W, C).
        weight: (C, 1, k, k), k odd.
        bias: (C,).
        add: (B, H, W, C), added to what comes out.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for PyTorch's convolution.

    Returns: (B, H, W, C) in the dtype of x, or in autocast's.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    sides = weight.shape[-2:]
    if x.ndim != 4 or weight.shape != (x.shape[-1], 1, *sides) or sides[0] != sides[1] or sides[0] % 2 == 0:
        raise ValueError(f"x must be (B, H, W, C) and weight (C, 1, k, k), k odd; got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be ({x.shape[-1]},), got {tuple(bias.shape)}")
    if add is not None and add.shape != x.shape:
        raise ValueError(f"add must be shaped as x, {tuple(x.shape)}; got {tuple(add.shape)}")
    samples = (x[:0, ..., :1], weight[:0])  # of their dtypes and device
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        samples = (samples[0].to(dtype), samples[1].to(dtype))
    missing = None if sides[0] <= 7 else f"a kernel of {sides[0]} x {sides[0]}: ours is for up to 7 x 7"
    if use_kernel(backend, samples, missing=missing):
        from attention_zoo.ops.triton.depthwise import depthwise_conv2d_triton

        dtype = samples[0].dtype
        with no_autocast(x):
            bias, add = (None if t is None else t.to(dtype) for t in (bias, add))
            return depthwise_conv2d_triton(x.to(dtype), weight.to(dtype), bias, add)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=sides[0] // 2, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return out if add is None else add + out
