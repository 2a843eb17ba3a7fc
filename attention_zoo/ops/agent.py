"""Agent attention as functions of tensors: its two thin softmaxes, the biases made from tables, and the pooling of agents.

The plain code, two calls of `attention` and PyTorch's own resampling and pooling, is the specification of the kernels of
`triton/agent.py`, `grid_bias.py` and `token_pool.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import power_of_2, use_kernel
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.attention import attention, attention_weights
from attention_zoo.ops.dispatch import follow_autocast

__all__ = ["Grid", "agent_attention", "grid_bias", "pool_tokens", "resize_grid", "too_large_tables", "too_many_agents"]

Grid = tuple[int, int]

_MOST_AGENTS = 128  # that stand in one tile of the kernels
_LARGEST_TILE = 128 * 128  # agents times channels
_MOST_COLUMNS = 1024  # of a grid, whose rows stand in one tile of the biases' gradients
_LARGEST_SQUARE = 64  # side of a square table


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Two thin softmax attentions: the agents read the keys, the queries read the agents.

        V_A = softmax(s A K^T + B_k) V          O = softmax(s_q Q A^T + B_q) V_A

    Who looks on at `attention` sees both.

    Args:
        q: (B, H, N, D).
        k, v: (B, H_kv, M, D), H a multiple of H_kv.
        agents: A, (B or 1, H, n, D).
        key_bias, query_bias: B_k (1 or B, H, n, M) and B_q (1 or B, H, N, n).
        key_mask: (B, M) boolean, true where a key may be read.
        scale: s, and s_q where `query_scale` is not given; None: 1 / sqrt(D).
        dropout_p: dropout rate on both maps.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other as for `attention`.

    Returns: (B, H, N, D).

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    agents = agents.expand(q.shape[0], -1, -1, -1)
    query_scale = scale if query_scale is None else query_scale
    cast = (*follow_autocast(q, k, v), follow_autocast(agents, k, v)[0])
    if use_kernel(backend, cast, dropout_p=dropout_p, missing=too_many_agents(agents.shape[2], max(agents.shape[-1], v.shape[-1]))):
        q, k, v, agents = cast
        _check(q, k, v, agents, key_bias, query_bias, key_mask)
        with no_autocast(q):
            read = _few_queries(agents, k, v, bias=key_bias, attn_mask=key_mask, scale=scale)
            return _few_keys(q, agents, read, bias=query_bias, scale=query_scale)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    read = _plain(agents, k, v, bias=key_bias, attn_mask=mask, scale=scale, dropout_p=dropout_p, backend=backend)
    return _plain(q, agents, read, bias=query_bias, scale=query_scale, dropout_p=dropout_p, backend=backend)


def _plain(*args: Tensor, **kwargs: Any) -> Tensor:
    out = attention(*args, **kwargs)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def too_many_agents(number: int, dim: int) -> str | None:
    """Why so many agents, of so many channels, do not fit into a tile of the kernels; None if they do."""
    if number > _MOST_AGENTS or power_of_2(number) * power_of_2(dim) > _LARGEST_TILE:
        return f"{number} agents of {dim} channels: the kernel is for up to {_MOST_AGENTS} of 128, or 64 of 256"
    return None


def _attention_weights(*args: Tensor, attn_mask: Tensor | None = None, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`attention_weights` of the calls below, whose masks are (B, M)."""
    mask = None if attn_mask is None else attn_mask[:, None, None, :]
    return attention_weights(*args, attn_mask=mask, rows=rows, **kwargs)


def _as_attention(operation: Any) -> Any:
    """To those who look on, the kernels' two steps are the calls of `attention` that they stand for."""
    operation.__name__ = attention.__name__
    return tapped(_attention_weights, takes_rows=True)(operation)


@_as_attention
def _few_queries(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    from attention_zoo.ops.triton.agent import few_queries_triton

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return few_queries_triton(q, k, v, bias=bias, key_mask=attn_mask, scale=factor)


@_as_attention
def _few_keys(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float | None) -> Tensor:
    from attention_zoo.ops.triton.agent import few_keys_triton

    return few_keys_triton(q, k, v, bias=bias, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_bias: Tensor | None, query_bias: Tensor | None, key_mask: Tensor | None
) -> None:
    """Raise ValueError for what `attention` would refuse in one of the two calls."""
    shapes = [tuple(t.shape) for t in (q, k, v, agents)]
    fits = all(t.ndim == 4 for t in (q, k, v, agents)) and k.shape[:3] == v.shape[:3] and agents.shape[:2] == q.shape[:2]
    fits = fits and k.shape[0] == q.shape[0] and q.shape[-1] == k.shape[-1] == agents.shape[-1]
    if not fits or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be (B, H, N, D), k and v (B, H_kv, M, D) with H a multiple of H_kv, agents (B or 1, H, n, D); got "
            + ", ".join(map(str, shapes))
        )
    batch, heads, length = q.shape[:3]
    number, keys = agents.shape[2], k.shape[2]
    for name, bias, last in (("key_bias", key_bias, (number, keys)), ("query_bias", query_bias, (length, number))):
        if bias is None:
            continue
        allowed = [(1, batch), (1, heads), *((1, side) for side in last)]
        if bias.ndim != 4 or any(side not in sides for side, sides in zip(bias.shape, allowed, strict=True)):
            raise ValueError(f"{name} must be broadcastable to {(batch, heads, *last)}, got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {bias.dtype}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape not in {(batch, keys), (1, keys)}):
        raise ValueError(f"key_mask must be boolean {(batch, keys)}, got {key_mask.dtype} {tuple(key_mask.shape)}")


# --- biases from tables -----------------------------------------------------------------------------------------------------------


def resize_grid(image: Tensor, size: Grid) -> Tensor:
    """Bilinear resampling of (B, C, H, W), align_corners=False, at least in float32; nothing is done where the size is the same."""
    if image.shape[-2:] == size:
        return image
    work = torch.promote_types(image.dtype, torch.float32)
    return F.interpolate(image.to(work), size=size, mode="bilinear", align_corners=False)


def grid_bias(
    square: Tensor,
    rows: Tensor,
    columns: Tensor,
    size: Grid,
    *,
    prefix: Tensor | None = None,
    agent_grids: tuple[Grid, Grid] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The bias of each agent and each token of a grid, from small tables, all of it resampled bilinearly.

        B = [prefix | up(square) + up(rows) + up(columns)]

    Args:
        square: (h, n, b, b').
        rows, columns: (h, n, H'), (h, n, W').
        size: (H, W) of the grid.
        prefix: (h, n, P), of tokens before the grid.
        agent_grids: (a, a') with a a' = n, and the grid of agents that the bias is wanted for, resampled over the agents.
        dtype: what the kernel returns; None: that of `square`. Plain code returns the tables' dtype, and at least float32 where
            something is resampled.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for plain code.

    Returns: (h, n', P + H * W).
    """
    if use_kernel(backend, (square,), missing=too_large_tables(size, (square.shape[2], square.shape[3]))):
        from attention_zoo.ops.triton.grid_bias import grid_bias_triton

        with no_autocast(square):
            over = (_over_agents(t, agent_grids) for t in (square, _over_line(rows, size[0]), _over_line(columns, size[1])))
            before = None if prefix is None else _over_agents(prefix, agent_grids)
            return grid_bias_triton(*over, prefix=before, size=size, dtype=square.dtype if dtype is None else dtype)
    separable = resize_grid(rows[..., None], (size[0], 1)) + resize_grid(columns[:, :, None], (1, size[1]))
    bias = (resize_grid(square, size) + separable).flatten(2)
    if prefix is not None:
        bias = torch.cat([prefix.to(bias.dtype), bias], dim=-1)
    return _over_agents(bias, agent_grids)


def too_large_tables(size: Grid, square: Grid) -> str | None:
    """Why the kernel of `grid_bias` does not serve square tables of these sides on a grid of this size; None if it does."""
    if size[1] > _MOST_COLUMNS:
        return f"a grid of {size[1]} columns: the kernel is for up to {_MOST_COLUMNS}"
    if max(square) > _LARGEST_SQUARE:
        return f"square tables of {square[0]} x {square[1]}: the kernel is for up to {_LARGEST_SQUARE} x {_LARGEST_SQUARE}"
    return None


def _over_line(table: Tensor, length: int) -> Tensor:
    """(h, n, L) -> (h, n, length)."""
    if table.shape[-1] == length:
        return table
    return resize_grid(table[..., None], (length, 1))[..., 0]


def _over_agents(bias: Tensor, agent_grids: tuple[Grid, Grid] | None) -> Tensor:
    """(h, n, ...) -> (h, n', ...)."""
    if agent_grids is None or agent_grids[0] == agent_grids[1]:
        return bias
    places = bias.flatten(2).transpose(1, 2).unflatten(-1, agent_grids[0])
    return resize_grid(places, agent_grids[1]).flatten(2).transpose(1, 2).unflatten(-1, bias.shape[2:])


# --- pooling ----------------------------------------------------------------------------------------------------------------------


def pool_tokens(x: Tensor, grid_size: Grid | None, bins: Grid, *, backend: str = "auto") -> Tensor:
    """Means over the bins of adaptive average pooling; they overlap or repeat where the grid is not a multiple of theirs.

    Args:
        x: (B, N, C), tokens of a grid, row-major.
        grid_size: (H, W) with H * W = N; None: a sequence.
        bins: (a, a'); along a sequence there are a * a' of them.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for PyTorch's.

    Returns: (B, a * a', C).
    """
    if use_kernel(backend, (x,), channels=1):  # of any number of channels
        from attention_zoo.ops.triton.token_pool import pool_tokens_triton

        if grid_size is None:
            return pool_tokens_triton(x, (1, x.shape[1]), (1, math.prod(bins)))
        return pool_tokens_triton(x, grid_size, bins)
    if grid_size is None:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), math.prod(bins)).transpose(1, 2)
    image = x.unflatten(1, grid_size).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, bins).flatten(2).transpose(1, 2)
