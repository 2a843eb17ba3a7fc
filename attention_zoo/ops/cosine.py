"""Heads of unit length for attention by cosines, as functions of tensors: TransNeXt's queries and keys.

In plain PyTorch, written to be read, in float32 (float64 stays float64). It is the specification of the kernels of
`triton/cosine.py`: one pass over the tokens in place of ten.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._kernels import power_of_2, use_kernel

__all__ = ["cosine_queries", "unit_heads"]

_LARGEST_TOKEN = 16384  # heads times channels, each as a power of two, which a program holds


def unit_heads(x: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """Each head's vector over its length (over 1e-12, if it is shorter): (B, N, h d) -> (B, h, N, d), in the dtype of x.

    Args:
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for plain PyTorch.

    Raises:
        ValueError: channels that `num_heads` does not divide.
        BackendError: backend="triton" cannot serve the call.
    """
    _check(x, num_heads)
    if use_kernel(backend, (x,), channels=x.shape[2] // num_heads, missing=_missing(x, num_heads)):
        from attention_zoo.ops.triton.cosine import unit_heads_triton

        return unit_heads_triton(x, num_heads)
    return _units(x, num_heads).to(x.dtype)


def cosine_queries(
    x: Tensor, embedding: Tensor, temperature: Tensor, scale: Tensor | float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Queries for attention by cosines, and their directions:

        u = x / ||x||                          as `unit_heads`
        q = (u + E) softplus(tau) s

    Args:
        x: (B, N, h d).
        embedding: E, (h, 1, d).
        temperature: tau, (h, 1, 1).
        scale: s, a number or (N, 1), one for each token, without a gradient.
        backend: as for `unit_heads`.

    Returns: q and u, (B, h, N, d) in the dtype of x.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: backend="triton" cannot serve the call.
    """
    heads = embedding.shape[0]
    _check(x, heads)
    fits = embedding.shape == (heads, 1, x.shape[2] // heads) and temperature.shape == (heads, 1, 1)
    if not fits or (isinstance(scale, Tensor) and scale.shape != (x.shape[1], 1)):
        raise ValueError(
            f"embedding is (h, 1, d), temperature (h, 1, 1) and scale a number or (N, 1) for x (B, N, h d); got "
            f"{tuple(embedding.shape)}, {tuple(temperature.shape)}, "
            f"{tuple(scale.shape) if isinstance(scale, Tensor) else scale} and {tuple(x.shape)}"
        )
    if use_kernel(backend, (x,), channels=x.shape[2] // heads, missing=_missing(x, heads)):
        from attention_zoo.ops.triton.cosine import cosine_queries_triton

        return cosine_queries_triton(x, embedding, temperature, scale)
    units = _units(x, heads)
    queries = (units + embedding.to(units.dtype)) * F.softplus(temperature.to(units.dtype)) * scale
    return queries.to(x.dtype), units.to(x.dtype)


def _units(x: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(2, (num_heads, -1)).transpose(1, 2)
    return F.normalize(heads.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _check(x: Tensor, num_heads: int) -> None:
    if x.ndim != 3 or num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(f"x is (B, N, h d) with h = {num_heads} heads; got {tuple(x.shape)}")


def _missing(x: Tensor, num_heads: int) -> str | None:
    """Why the kernels do not serve tokens like these; None if they do."""
    channels = x.shape[2] // num_heads
    if power_of_2(num_heads) * power_of_2(channels) > _LARGEST_TOKEN:
        return f"tokens of more than {_LARGEST_TOKEN} channels: {num_heads} heads of {channels}"
    return None
