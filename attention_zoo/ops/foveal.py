"""Foveal attention as a function of tensors: what a token sees around it, sharply, and of the whole grid, coarsely (TransNeXt).

In plain PyTorch, written to be read. It is the specification of the kernels of `triton/foveal.py`, which form neither the windows
nor their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import is_observed, observe
from attention_zoo.ops.engines.base import GRID_LIMIT

__all__ = ["foveal_attention"]

Grid = tuple[int, int]

_MOST_CHANNELS = 128  # of a head, several tiles of which are in registers


def foveal_attention(
    q: Tensor,
    directions: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    *,
    local_bias: Tensor,
    pooled_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    outside: Tensor,
    grid_size: Grid,
    window_size: int,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """One softmax over the neighbours of a token and all pooled tokens; neighbours also count by their place alone.

        A = softmax([q k_j + B_j, q k_p + B_p])          j: the w x w tokens around the query, those outside the grid -inf
        o = sum_j (A_j + u T_j + b_j) v_j + sum_p A_p v_p

    Args:
        q: queries (B, h, N, d), scaled, N = H * W row-major.
        directions: u (B, h, N, d).
        k, v: (B, h, N, d).
        pooled_k, pooled_v: (B, h, P, d).
        local_bias: B_j (h, w^2), in the order of the window, row-major.
        pooled_bias: B_p (h, N, P).
        tokens, token_bias: T (h, d, w^2) and b (h, 1, w^2).
        outside: (N, w^2), true where a place of a token's window is outside the grid.
        grid_size: (H, W).
        window_size: w, odd.
        dropout_p: probability with which each weight of the softmax is dropped (and the others scaled up).
        backend: "triton" for our kernels; "auto" takes them on CUDA, where they serve the call; any other for the plain code.

    Returns: (B, h, N, d) in the dtype of v. Logits, biases and softmax are float32 at least.

    Raises:
        BackendError: backend="triton" cannot serve the call.
    """
    work = torch.promote_types(v.dtype, torch.float32)
    q, directions = q.to(v.dtype), directions.to(v.dtype)
    if not is_observed() and use_kernel(
        backend, (q, directions, k, v, pooled_k, pooled_v), dropout_p=dropout_p, missing=_missing(q)
    ):
        from attention_zoo.ops.triton.foveal import foveal_attention_triton

        tables = local_bias, pooled_bias, tokens, token_bias
        return foveal_attention_triton(
            q, directions, k, v, pooled_k, pooled_v, *tables, window_size=window_size, grid_size=grid_size
        )
    local = _products(q, k, grid_size, window_size).to(work) + local_bias.to(work).unsqueeze(1)
    coarse = (q @ pooled_k.transpose(-2, -1)).to(work) + pooled_bias
    weights = torch.softmax(torch.cat([local.masked_fill(outside, -torch.inf), coarse], dim=-1), dim=-1)
    observe("neighbours and pooled tokens", weights)
    weights = F.dropout(weights, dropout_p).to(v.dtype)
    local, coarse = weights.split([window_size**2, pooled_k.shape[2]], dim=-1)
    local = local + (directions @ tokens.to(v.dtype) + token_bias.to(v.dtype))
    return _weighted_sum(local, v, grid_size, window_size) + coarse @ pooled_v


def _missing(q: Tensor) -> str | None:
    """Why the kernels do not serve heads like these; None if they do."""
    if q.shape[-1] > _MOST_CHANNELS:
        return f"heads of more than {_MOST_CHANNELS} channels: {q.shape[-1]}"
    heads = q.shape[0] * q.shape[1]
    return f"more than {GRID_LIMIT} heads of all samples together: {heads}" if heads > GRID_LIMIT else None


def _neighbours(x: Tensor, grid: Grid, window_size: int) -> list[Tensor]:
    """Views of (B, h, N, d), one for each place in the window, row-major: (B, h, H, W, d) of that neighbour, 0 outside the grid."""
    (height, width), reach = grid, window_size // 2
    padded = F.pad(x.unflatten(2, grid), (0, 0, reach, reach, reach, reach))
    return [padded[:, :, i : i + height, j : j + width] for i in range(window_size) for j in range(window_size)]


def _products(queries: Tensor, keys: Tensor, grid: Grid, window_size: int) -> Tensor:
    """Each query with the keys around it: (B, h, N, d) twice -> (B, h, N, w * w). Nothing of size N * w * w * d is kept."""
    image = queries.unflatten(2, grid)
    return torch.stack([(image * near).sum(-1) for near in _neighbours(keys, grid, window_size)], dim=-1).flatten(2, 3)


def _weighted_sum(weights: Tensor, values: Tensor, grid: Grid, window_size: int) -> Tensor:
    """sum_j weights_j v_j over the window: (B, h, N, w * w), (B, h, N, d) -> (B, h, N, d)."""
    each = weights.unflatten(2, grid).unsqueeze(-2).unbind(-1)  # (B, h, H, W, 1) of each place
    total = values.new_zeros(())
    for weight, near in zip(each, _neighbours(values, grid, window_size), strict=True):
        total = total + weight * near
    return total.flatten(2, 3)
