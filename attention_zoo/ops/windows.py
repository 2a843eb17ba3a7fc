"""Attention inside windows that tile a map, as a function of tensors: HiLo's Hi-Fi, Swin-type windows.

In plain PyTorch, written to be read: windows are gathered and all logits are formed, in float32 (float64 stays float64). It is the
specification of the kernel of `triton/windows.py`, which reads the windows from the maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.dispatch import wanted_backend
from attention_zoo.ops.engines.base import HALF

__all__ = ["projected_dtype", "takes_windows", "too_large", "window_attention"]

_MOST_BYTES = 32768  # of a window's queries, keys or values that the kernel takes


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    **_: Any,
) -> Tensor:
    """Probabilities of a call of `window_attention`, (B, heads, windows, s^2, s^2)."""
    with no_autocast(q):
        return _logits(q, k, window_size, bias, scale, mask_padding).softmax(-1)


@tapped(_weights)
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Each query attends to the s x s window of the map that it stands in; windows lie side by side and do not overlap.

        out_i = sum_j softmax_j(scale * q_i k_j + bias_ij) v_j          i, j: cells of one window, row-major

    Args:
        q: (B, heads, H, W, D).
        k: (B, heads, H, W, D).
        v: (B, heads, H, W, D_v).
        window_size: side s of the windows. The last ones of a map reach beyond it where s does not divide H or W.
        bias: (heads, s^2, s^2), or (n, heads, s^2, s^2) for windows that differ: the w-th window, counted row-major over the map
            and on over the batch, takes bias[w mod n], and n divides their number. May need a gradient.
        scale: factor of q k; None: 1 / sqrt(D).
        mask_padding: what stands in a window outside the map. False: keys and values of zero, which are attended to; True: nothing.
        dropout_p: probability with which each weight is dropped (and the others scaled up).
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for the plain code.

    Returns: (B, heads, H, W, D_v) in the dtype of q.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: backend="triton" cannot serve the call.
    """
    _check(q, k, v, window_size, bias)
    missing = too_large(window_size, max(q.shape[-1], v.shape[-1]), q.dtype)
    if use_kernel(backend, (q, k, v), dropout_p=dropout_p, missing=missing):
        from attention_zoo.ops.triton.windows import window_attention_triton

        factor = q.shape[-1] ** -0.5 if scale is None else scale
        by_group = bias[None] if bias is not None and bias.ndim == 3 else bias
        return window_attention_triton(q, k, v, by_group, window_size=window_size, scale=factor, mask_padding=mask_padding)
    with no_autocast(q):
        logits = _logits(q, k, window_size, bias, scale, mask_padding)
        weights = logits.softmax(-1)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        height, width = q.shape[2:4]
        out = weights @ _to_windows(v.to(logits.dtype), window_size)
        return _from_windows(out, window_size, height, width).to(q.dtype)


def takes_windows(
    x: Tensor, window_size: int | tuple[int, int], channels: int, dropout_p: float = 0.0, missing: str | None = None
) -> bool:
    """Whether to call the kernel for heads of so many channels, projected from tensors like `x`, where a library could serve too.

    "auto" prefers it in half precision only, in which it was measured.

    Args:
        x: a tensor of the device and, but for autocast, of the dtype.
        window_size, dropout_p: of the call; windows may have rows and columns.
        channels: of a head.
        missing: what else is asked for that the kernel does not have; None: nothing.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    dtype = projected_dtype(x)
    if dtype not in HALF and wanted_backend("auto") != "triton":
        return False
    return use_kernel("auto", (x,), channels=1, dropout_p=dropout_p, missing=missing or too_large(window_size, channels, dtype))


def projected_dtype(x: Tensor) -> torch.dtype:
    """Of what is projected from x, on CUDA in autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device == "cuda" and torch.is_autocast_enabled(device) else x.dtype


def too_large(window_size: int | tuple[int, int], channels: int, dtype: torch.dtype) -> str | None:
    """Why the kernel, which has a window's logits in registers, has no windows of this size; None if it has."""
    rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
    cells, most = rows * columns, 256 // dtype.itemsize
    if cells > most:
        return f"windows of more than {most} cells of {dtype}: {cells}"
    if cells * channels * dtype.itemsize > _MOST_BYTES:
        return f"windows of more than {_MOST_BYTES} bytes: {cells} cells of {channels} channels"
    return None


def _logits(q: Tensor, k: Tensor, side: int, bias: Tensor | None, scale: float | None, mask_padding: bool) -> Tensor:
    """(B, heads, windows, s^2, s^2), float32 or float64."""
    work = torch.promote_types(q.dtype, torch.float32)
    queries, keys = _to_windows(q.to(work), side), _to_windows(k.to(work), side)
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * (queries @ keys.transpose(-2, -1))
    if bias is not None:
        every = (bias if bias.ndim == 4 else bias[None]).to(work)  # (n, heads, s^2, s^2)
        (batch, _, number), groups = logits.shape[:3], every.shape[0]
        windows = logits.transpose(1, 2).flatten(0, 1).unflatten(0, (batch * number // groups, groups)) + every
        logits = windows.flatten(0, 1).unflatten(0, (batch, number)).transpose(1, 2)
    if mask_padding:
        real = _to_windows(q.new_ones((1, 1, *q.shape[2:4], 1)), side)[..., 0].unsqueeze(-2) > 0
        logits = logits.masked_fill(~real, -torch.inf)
    return logits


def _to_windows(x: Tensor, side: int) -> Tensor:
    """(B, heads, H, W, D) -> (B, heads, windows, side^2, D), filled up with zeros on the right and bottom."""
    x = F.pad(x, (0, 0, 0, -x.shape[3] % side, 0, -x.shape[2] % side))
    x = x.unflatten(3, (x.shape[3] // side, side)).unflatten(2, (x.shape[2] // side, side))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _from_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """(B, heads, windows, side^2, D) -> (B, heads, height, width, D)."""
    x = x.unflatten(3, (side, side)).unflatten(2, (-(-height // side), -(-width // side)))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def _check(q: Tensor, k: Tensor, v: Tensor, side: int, bias: Tensor | None) -> None:
    """Raise ValueError unless the call makes sense."""
    if side < 1:
        raise ValueError(f"window_size must be at least 1; got {side}")
    if any(t.ndim != 5 for t in (q, k, v)) or q.shape != k.shape or k.shape[:4] != v.shape[:4] or min(k.shape[2:4]) < 1:
        raise ValueError(
            "q, k and v are laid out as (B, heads, H, W, D), on one grid of at least one cell, q and k of one shape; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if bias is None:
        return
    wanted = (q.shape[1], side**2, side**2)
    windows = q.shape[0] * -(-q.shape[2] // side) * -(-q.shape[3] // side)
    if bias.ndim not in (3, 4) or bias.shape[-3:] != wanted or (bias.ndim == 4 and (not bias.shape[0] or windows % bias.shape[0])):
        raise ValueError(
            f"bias must be {wanted}, or (n, *{wanted}) with n a divisor of the {windows} windows; got {tuple(bias.shape)}"
        )
