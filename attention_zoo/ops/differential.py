"""Differential attention as functions of tensors: what two attentions of the same tokens have in common is subtracted.

In plain PyTorch, written to be read; the difference and its norm in float32 (float64 stays float64), since they cancel. It is the
specification of the kernels of `triton/differential.py` and `triton/differential_cudnn.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops import _cudnn
from attention_zoo.ops._decode import is_decode, mask_of_keys
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import is_observed
from attention_zoo.ops.attention import attention
from attention_zoo.ops.dispatch import follow_autocast, wanted_backend

__all__ = ["PAIRINGS", "difference_factor", "differential_attention", "split_maps", "subtract_noise"]

PAIRINGS = ("interleaved", "halves")
_FEW_KEYS = 256  # up to which a CPU forms the map sooner than it walks along the keys twice


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor,
    *,
    noise_q: Tensor | None = None,
    noise_k: Tensor | None = None,
    groups: int | None = None,
    pairing: str = "interleaved",
    weight: Tensor | None = None,
    eps: float | None = None,
    gain: float = 1.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of signal heads minus lambda times that of noise heads, over the same values, normalised:

        out = subtract_noise(softmax(scale * q k^T + mask) v, softmax(scale * noise_q noise_k^T + mask) v, factor, ...)

    Grouped heads: signal head s reads key/value head s // (S / H_kv), and so does its group's noise head, s // (S / M).

    Args:
        q: (B, S, N_q, D), of the signal heads.
        k: (B, H_kv, N_k, D).
        v: (B, H_kv, N_k, D_v), of both.
        factor, weight, eps, gain: lambda and the norm, as for `subtract_noise`.
        noise_q: (B, M, N_q, D), S a multiple of M and M of H_kv. None: q (B, S + M, N_q, D) and k (B, 2 H_kv, N_k, D) hold the
            heads of both maps, as `split_maps` takes them apart; where they are one tensor anyway, nothing is then copied for that.
        noise_k: (B, H_kv, N_k, D); None: k, or in k.
        groups: M; needed without `noise_q`.
        pairing: how heads of both maps are laid out, one of `PAIRINGS`.
        attn_mask, is_causal, scale, dropout_p: of both attentions, as for `attention`.
        backend: "triton" for our kernels of both maps in one pass; "auto" takes them on CUDA for few queries without gradients,
            and where they are faster than two attentions and the kernel of their difference; any other is the backend of the
            attentions, with the plain difference.

    Returns: (B, S, N_q, D_v) in the dtype of q.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    q, k, v = follow_autocast(q, k, v)
    if noise_q is not None:
        noise_q, noise_k, _ = follow_autocast(noise_q, k if noise_k is None else noise_k, v)
    groups, heads = _check_inputs(q, k, v, noise_q, noise_k, groups, pairing)
    signal_shape, noise_shape = ((q.shape[0], count, q.shape[2], v.shape[3]) for count in (heads, groups))
    _check_outputs(signal_shape, noise_shape, factor, None, weight, eps)
    name = wanted_backend(backend)
    width = q.shape[-1] ** -0.5 if scale is None else scale
    norm: dict[str, Any] = {"gain": gain, "eps": eps}
    given = (q, k, v) if noise_q is None or noise_k is None else (q, k, v, noise_q, noise_k)
    if is_decode(q, k, attn_mask, dropout_p, *given, factor, weight) and use_kernel(name, given):
        from attention_zoo.ops.triton.decode import decode_difference

        if noise_q is None or noise_k is None:
            (q, noise_q), (k, noise_k) = split_maps(q, groups, pairing), split_maps(k, v.shape[1], pairing)
        seen: dict[str, Any] = {"key_mask": mask_of_keys(attn_mask), "is_causal": is_causal}
        return decode_difference(q, noise_q, k, noise_k, v, _per_head(factor), weight, scale=width, **seen, **norm)
    plain = attn_mask is None and dropout_p == 0.0 and not is_observed()
    one_pass = q.is_cuda and _is_faster_in_one_pass(q, v) and groups == heads
    library = plain and not one_pass and _library_serves(q, k, v, noise_q, noise_k, is_causal)
    if library and name == "auto" and use_kernel(name, (q, k, v)):
        from attention_zoo.ops.triton.differential_cudnn import differential_attention_cudnn

        where: dict[str, Any] = {"groups": groups, "interleaved": pairing == "interleaved", "is_causal": is_causal}
        return differential_attention_cudnn(q, noise_q, k, noise_k, v, _per_head(factor), weight, scale=width, **where, **norm)
    if noise_q is None or noise_k is None:
        (q, noise_q), (k, noise_k) = split_maps(q, groups, pairing), split_maps(k, v.shape[1], pairing)
    if name == "triton" or (name == "auto" and one_pass):
        missing = _missing(q, noise_q, attn_mask, width)
        if use_kernel(name, (q, k, v, noise_q, noise_k), dropout_p=dropout_p, missing=missing):
            from attention_zoo.ops.triton.differential import differential_attention_triton

            return differential_attention_triton(
                q, noise_q, k, noise_k, v, _per_head(factor), weight, is_causal=is_causal, scale=width, **norm
            )
    call: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    maps = ((q, k), (noise_q, noise_k))
    signal, noise = (_attend(one, key, v, whole=library, backend=backend, **call) for one, key in maps)
    return subtract_noise(signal, noise, factor, weight=weight, backend=backend, **norm)


def split_maps(x: Tensor, groups: int, pairing: str = "interleaved") -> tuple[Tensor, Tensor]:
    """Heads of both maps (B, H + groups, N, D) -> signal (B, H, N, D) and noise (B, groups, N, D).

    In the pairing "interleaved" each group's noise head stands behind its signal heads, in "halves" all of them behind all.
    """
    if pairing == "halves":
        signal, noise = x.split([x.shape[1] - groups, groups], dim=1)
        return signal, noise
    grouped = x.unflatten(1, (groups, -1))
    signal, noise = grouped.split([grouped.shape[2] - 1, 1], dim=2)  # whose gradients are joined, not added up
    return signal.flatten(1, 2), noise.flatten(1, 2)


def difference_factor(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, start: float) -> Tensor:
    """lambda of a layer, exp(q1 . k1) - exp(q2 . k2) + start, from vectors (d,), float32 or float64: a scalar ().

    On CUDA, where no gradient is recorded, one kernel in place of eight.
    """
    vectors = (q1, k1, q2, k2)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in vectors)) and use_kernel("auto", vectors, channels=1):
        from attention_zoo.ops.triton.differential import difference_factor_triton

        return difference_factor_triton(q1, k1, q2, k2, start)
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + start


def _attend(q: Tensor, k: Tensor, v: Tensor, *, whole: bool, dropout_p: float, backend: str, **call: Any) -> Tensor:
    """One map. Values of twice the width go in halves where no library is good at them whole: with gradients on CUDA beyond 128
    channels, for a single query on CUDA, whose keys torch's flash kernel splits, and on a CPU, where torch forms the map for them.

    whole: where `differential_attention_cudnn` would serve the call: it has halves that lie in memory in another way, and gradients
        that lie as those of a projection, which torch's plans for cuDNN do not tell apart, see `_cudnn.dense_backward`.
    """
    channels = v.shape[-1]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.device.type == "cpu":
        halves = v.shape[2] > _FEW_KEYS and wanted_backend(backend) in ("auto", "torch")
    else:
        single = q.shape[2] == 1 and call["attn_mask"] is None
        halves = not whole and q.is_cuda and q.element_size() == 2 and (single or (training and channels > _cudnn.WIDEST))
    halves = halves and channels == 2 * q.shape[-1]
    # the halves would drop different weights, and who looks on would see two maps
    parts = v.chunk(2, -1) if halves and dropout_p == 0.0 and not is_observed() else (v,)
    outputs = []
    for part in parts:
        out = attention(q, k, part, dropout_p=dropout_p, backend=backend, **call)
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        outputs.append(out)
    if whole:
        return _cudnn.with_heads_last(outputs[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


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
    groups = _check_outputs(signal.shape, None if noise is None else noise.shape, factor, groups, weight, eps)
    if use_kernel(backend, (signal, signal if noise is None else noise)):
        from attention_zoo.ops.triton.differential import subtract_noise_triton

        return subtract_noise_triton(signal, noise, _per_head(factor), weight, groups=groups, gain=gain, eps=eps)
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


def _per_head(factor: Tensor) -> Tensor:
    """As the kernels take it: a scalar, or (B, S, N)."""
    return factor.transpose(1, 2) if factor.ndim else factor


def _is_faster_in_one_pass(q: Tensor, v: Tensor) -> bool:
    """Whether launches and the way of the outputs through memory count for more than the products; tried on Hopper."""
    return v.shape[2] <= 256 and v.shape[3] <= 64 and q.element_size() == 2


def _library_serves(q: Tensor, k: Tensor, v: Tensor, noise_q: Tensor | None, noise_k: Tensor | None, is_causal: bool) -> bool:
    """Whether cuDNN takes both maps, and is what "auto" takes for attention with values of twice the width."""
    if not q.is_cuda or v.shape[3] != 2 * q.shape[3] or q.shape[2] == 1:  # one query: see the torch engine
        return False
    apart = noise_q is None or noise_k is None or _cudnn.serves(noise_q, noise_k, v, is_causal)
    return apart and _cudnn.serves(q, k, v, is_causal)


def _missing(q: Tensor, noise_q: Tensor, attn_mask: Tensor | None, scale: float) -> str | None:
    """What a call asks for that the kernel of both maps does not have."""
    if q.shape[1] != noise_q.shape[1]:
        return f"it needs a noise head for each signal head; {q.shape[1]} share {noise_q.shape[1]}"
    if attn_mask is not None:
        return "it has no mask"
    if scale <= 0:
        return f"it needs a positive scale; got {scale}"
    return "it forms no maps for those who look on" if is_observed() else None


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, noise_q: Tensor | None, noise_k: Tensor | None, groups: int | None, pairing: str
) -> tuple[int, int]:
    """M and S. Raise ValueError unless queries, keys and values of `differential_attention` fit together."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(map(repr, PAIRINGS))}; got {pairing!r}")
    given = [t for t in (q, k, v, noise_q, noise_k) if t is not None]
    fits, count, heads = all(t.ndim == 4 for t in given) and (noise_q is None) == (noise_k is None), 0, 0
    if fits:
        (batch, heads, queries, dim), (kv_heads, keys) = q.shape, v.shape[1:3]
        if noise_q is None or noise_k is None:
            count = groups or 0
            heads -= count
            fits = k.shape == (batch, 2 * kv_heads, keys, dim)
        else:
            count = noise_q.shape[1]
            fits = k.shape == noise_k.shape == (batch, kv_heads, keys, dim) and noise_q.shape == (batch, count, queries, dim)
        fits = fits and v.shape[0] == batch and groups in (None, count) and min(count, heads, kv_heads) > 0
        fits = fits and not heads % count and not count % kv_heads
    if not fits:
        raise ValueError(
            "q (B, S, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v), noise_q (B, M, N_q, D), noise_k as k, with S a multiple "
            "of M and M of H_kv; or without noise_q and noise_k q (B, S + M, N_q, D), k (B, 2 H_kv, N_k, D) and groups M; got "
            f"{', '.join(str(tuple(t.shape)) for t in given)}, groups={groups}"
        )
    return count, heads


def _check_outputs(
    signal: tuple[int, ...],
    noise: tuple[int, ...] | None,
    factor: Tensor,
    groups: int | None,
    weight: Tensor | None,
    eps: float | None,
) -> int:
    """The number of groups, from the shapes of the outputs. Raises ValueError unless the call of `subtract_noise` makes sense."""
    if len(signal) != 4 or (noise is not None and len(noise) != 4):
        raise ValueError(f"signal and noise are (B, H, N, D_v); got {signal} and {noise}")
    if noise is None and groups is None:
        raise ValueError("groups must say how many noise heads there are, since they stand in signal")
    count = noise[1] if noise is not None else groups or 0
    per_group, rest = (signal[1] // count, signal[1] % count) if count > 0 else (0, 1)  # dynamo has no divmod of sizes
    batch, heads, tokens, channels = signal
    heads -= count if noise is None else 0
    if rest or (per_group < 2 and noise is None) or groups not in (None, count):
        raise ValueError(f"{signal[1]} heads of signal do not make {groups or count} groups with one noise head each")
    if noise is not None and tuple(noise) != (batch, count, tokens, channels):
        raise ValueError(f"noise must be {(batch, count, tokens, channels)}, as signal is; got {tuple(noise)}")
    if factor.ndim and factor.shape != (batch, tokens, heads):
        raise ValueError(f"factor must be a scalar or {(batch, tokens, heads)}; got {tuple(factor.shape)}")
    if weight is not None and (weight.shape != (channels,) or eps is None):
        raise ValueError(
            f"weight must be ({channels},), and is one of the norm, which needs eps; got {tuple(weight.shape)}, eps={eps}"
        )
    return count
