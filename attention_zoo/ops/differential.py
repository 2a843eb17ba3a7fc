"""Differential attention as functions of tensors: what two attentions of the same tokens have in common is subtracted.

In plain PyTorch, written to be read; the difference and its norm in float32 (float64 stays float64), since they cancel. It is the
specification of the kernels of `triton/differential.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._kernels import use_kernel

__all__ = ["subtract_noise"]


def subtract_noise(
    signal: Tensor,
    noise: Tensor | None,
    factor: Tensor,
    *,
    groups: int | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    gain: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Outputs of signal heads minus lambda times those of the noise heads, normalised:

        x_s = signal_s - lambda_s noise_m(s)          out_s = gain x_s / sqrt(mean(x_s^2) + eps) * weight

    The signal heads stand in M groups of G = S / M, each with one noise head: m(s) = floor(s / G).

    Args:
        signal: (B, S, N, D_v). Without `noise` (B, S + M, N, D_v), each group followed by its noise head.
        noise: (B, M, N, D_v), or None.
        factor: lambda: a scalar (), or one for each token and signal head (B, N, S).
        groups: M; needed without `noise`.
        weight: (D_v,), of the norm; None: 1.
        eps: epsilon of the norm; None: no norm, no weight and no gain.
        gain: factor of what is normalised.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for the plain code.

    Returns: (B, S, N, D_v) in the dtype of signal.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: backend="triton" cannot serve the call.
    """
    groups = _check_outputs(signal, noise, factor, groups, weight, eps)
    if use_kernel(backend, (signal, signal if noise is None else noise)):
        from attention_zoo.ops.triton.differential import subtract_noise_triton

        factors = factor.transpose(1, 2) if factor.ndim else factor
        return subtract_noise_triton(signal, noise, factors, weight, groups=groups, gain=gain, eps=eps)
    if noise is None:
        grouped = signal.unflatten(1, (groups, -1))
        signal, noise = grouped[:, :, :-1].flatten(1, 2), grouped[:, :, -1]
    work = torch.promote_types(signal.dtype, torch.float32)
    factor = factor.to(work)
    if factor.ndim:  # (B, N, S) -> (B, M, G, N, 1)
        factor = factor.transpose(1, 2).unflatten(1, (groups, -1)).unsqueeze(-1)
    out = signal.to(work).unflatten(1, (groups, -1)) - factor * noise.to(work).unsqueeze(2)
    if eps is not None:
        out = F.rms_norm(out, out.shape[-1:], None if weight is None else weight.to(work), eps) * gain
    return out.flatten(1, 2).to(signal.dtype)


def _check_outputs(
    signal: Tensor, noise: Tensor | None, factor: Tensor, groups: int | None, weight: Tensor | None, eps: float | None
) -> int:
    """The number of groups. Raises ValueError unless the call of `subtract_noise` makes sense."""
    if signal.ndim != 4 or (noise is not None and noise.ndim != 4):
        raise ValueError(f"signal and noise are (B, H, N, D_v); got {_shape(signal)} and {_shape(noise)}")
    if noise is None and groups is None:
        raise ValueError("groups must say how many noise heads there are, since they stand in signal")
    count = noise.shape[1] if noise is not None else groups or 0
    per_group, rest = divmod(signal.shape[1], count) if count > 0 else (0, 1)
    heads = signal.shape[1] - (count if noise is None else 0)
    if rest or (per_group < 2 and noise is None) or groups not in (None, count):
        raise ValueError(f"{signal.shape[1]} heads of signal do not make {groups or count} groups with one noise head each")
    batch, _, tokens, channels = signal.shape
    if noise is not None and noise.shape != (batch, count, tokens, channels):
        raise ValueError(f"noise must be {(batch, count, tokens, channels)}, as signal is; got {_shape(noise)}")
    if factor.ndim and factor.shape != (batch, tokens, heads):
        raise ValueError(f"factor must be a scalar or {(batch, tokens, heads)}; got {_shape(factor)}")
    if weight is not None and (weight.shape != (channels,) or eps is None):
        raise ValueError(f"weight must be ({channels},), and is one of the norm, which needs eps; got {_shape(weight)}, eps={eps}")
    return count


def _shape(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)
