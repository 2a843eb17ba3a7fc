"""HiLo's two branches as functions of tensors, for its kernels (`triton/hilo.py`): on one fused projection, into one buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops.attention import attention
from attention_zoo.ops.dispatch import wanted_backend
from attention_zoo.ops.engines import GRID_LIMIT
from attention_zoo.ops.windows import too_large, window_attention

__all__ = ["hilo_attention", "pool_windows", "too_wide", "with_window_means"]

_MOST_CHANNELS = 2**17  # of all Lo-Fi keys of a head together: more are faster on the dense engines
_MOST_BYTES = 512  # of a query, key or value


def hilo_attention(
    qkv: Tensor,
    kv: Tensor,
    *,
    grid_size: tuple[int, int],
    window_size: int,
    heads: tuple[int, int],
    scale: float,
    mask_padding: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Hi-Fi heads attend inside the s x s windows of the grid, Lo-Fi heads to M keys of the whole grid.

    Args:
        qkv: (B, N, (3 h + l) D), N = H * W row-major: q, k, v of the h Hi-Fi heads, then q of the l Lo-Fi heads.
        kv: (B, M, 2 l D), k and v of the Lo-Fi heads.
        grid_size: (H, W).
        window_size: side s of the windows.
        heads: (h, l), both at least 1.
        scale: factor of q k.
        mask_padding: what stands in a window outside the grid. False: keys and values of zero; True: nothing.
        backend: "triton" for our kernel; "auto" takes it on CUDA for few keys; otherwise `window_attention` and `attention`.

    Returns: (B, N, (h + l) D), Hi-Fi heads first.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    _check(qkv, kv, grid_size, heads)
    dim = kv.shape[-1] // (2 * heads[1])
    some = qkv[..., :dim], kv[..., :dim]  # the channels of a head, which is what the choice goes by
    missing = too_wide(dim, qkv.dtype) or too_large(window_size, dim, qkv.dtype)
    few = kv.shape[1] * dim <= _MOST_CHANNELS
    if kv.shape[0] * heads[1] > GRID_LIMIT:
        missing = f"more than {GRID_LIMIT} heads of all samples together: {kv.shape[0] * heads[1]}"
    if (few or wanted_backend(backend) == "triton") and use_kernel(backend, some, missing=missing):
        from attention_zoo.ops.triton.hilo import hilo_attention_triton

        return hilo_attention_triton(qkv, kv, grid_size, window_size, heads, scale, mask_padding)
    high, low = (number * dim for number in heads)
    *of_map, of_list = qkv.split([high, high, high, low], -1)
    q, k, v = (t.unflatten(-1, (heads[0], dim)).unflatten(1, grid_size).permute(0, 3, 1, 2, 4) for t in of_map)
    near = window_attention(q, k, v, window_size=window_size, scale=scale, mask_padding=mask_padding, backend=backend)
    far_q, far_k, far_v = (t.unflatten(-1, (heads[1], dim)).transpose(1, 2) for t in (of_list, *kv.chunk(2, -1)))
    far = attention(far_q, far_k, far_v, scale=scale, backend=backend)
    assert isinstance(far, Tensor)  # no log-normaliser was asked for
    return torch.cat([near.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2), far.transpose(1, 2).flatten(2)], -1)


def with_window_means(x: Tensor, window_size: int, *, mask_padding: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Means over the s x s windows of a map (B, H, W, C).

    Where s does not divide H or W the last windows reach beyond the map: zeros stand there, or with `mask_padding` nothing, and
    the mean is one over fewer cells. "auto" takes our kernel on CUDA.

    Returns: x, for its other readers (their gradient and that of the means meet in one kernel), and (B, windows, C), row-major.
    """
    if use_kernel(backend, (x,), channels=1):
        from attention_zoo.ops.triton.hilo import with_window_means_triton

        return with_window_means_triton(x, window_size, mask_padding)
    below, right = (-side % window_size for side in x.shape[1:3])
    full = F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x
    means = pool_windows(full, window_size)
    if mask_padding and (below or right):
        real = F.pad(x.new_ones((1, *x.shape[1:3], 1)), (0, 0, 0, right, 0, below))
        means = means / pool_windows(real, window_size)
    return x, means


def pool_windows(x: Tensor, window_size: int) -> Tensor:
    """Means over the windows of a map that they tile, (B, H, W, C) -> (B, windows, C), in plain PyTorch.

    Pooling a channels-last view is many times faster than a mean over two dimensions.
    """
    return F.avg_pool2d(x.permute(0, 3, 1, 2), window_size).flatten(2).transpose(1, 2)


def too_wide(channels: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve heads of this width; None if they do."""
    return f"heads of more than {_MOST_BYTES} bytes: {channels} channels" if channels * dtype.itemsize > _MOST_BYTES else None


def _check(qkv: Tensor, kv: Tensor, grid_size: tuple[int, int], heads: tuple[int, int]) -> None:
    """Raise ValueError unless the call makes sense."""
    high, low = heads
    dim = kv.shape[-1] // (2 * low) if low > 0 else 0
    fits = qkv.ndim == kv.ndim == 3 and qkv.shape[0] == kv.shape[0] and min(heads) > 0 and dim > 0
    if not fits or kv.shape[-1] != 2 * low * dim or qkv.shape[1:] != (grid_size[0] * grid_size[1], (3 * high + low) * dim):
        raise ValueError(
            f"with heads={tuple(heads)} and grid_size={tuple(grid_size)}, qkv is (B, H W, (3 h + l) D) and kv (B, M, 2 l D); got "
            f"{tuple(qkv.shape)} and {tuple(kv.shape)}"
        )
