"""Blocked local attention with a halo as a function of tensors: queries of a block share one window of keys around it.

In plain PyTorch, written to be read: windows are gathered and all logits are formed, in float32 (float64 stays float64). It is the
specification of the kernel of `triton/halo.py`, which reads the windows from the maps and never forms the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped

__all__ = ["halo_attention"]


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    query_stride: int = 1,
    scale: float | None = None,
    scale_positions: bool = False,
    mask_padding: bool = False,
    **_: Any,
) -> Tensor:
    """Probabilities of a call of `halo_attention`, (B, heads, U, V, queries of a block, win^2) for U x V blocks."""
    with no_autocast(q):
        logits = _logits(q, k, height_rel, width_rel, block_size, halo_size, query_stride, scale, scale_positions, mask_padding)
        return logits.softmax(-1)


@tapped(_weights)
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block_size: int,
    halo_size: int,
    query_stride: int = 1,
    scale: float | None = None,
    scale_positions: bool = False,
    mask_padding: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends to the win x win window of its block, win = block_size + 2 halo_size, with learned relative positions.

        out(i, j) = softmax_rc(scale * q k(r, c) + q (Rh[r - i + win - 1] + Rw[c - j + win - 1])) v(r, c)

    (i, j) counts the queries of a block, (r, c) the cells of its window, whose first row is halo_size rows above the block.

    Args:
        q: (B, heads, H_q, W_q, D), the queries of every `query_stride`-th cell of the grid: H_q = ceil(H / query_stride).
        k: (B, heads, H, W, D).
        v: (B, heads, H, W, D_v).
        height_rel, width_rel: Rh and Rw, (2 win - 1, D).
        block_size: side of the blocks, in cells of k's grid; a multiple of `query_stride`.
        halo_size: cells that a window reaches beyond its block on each side.
        scale: factor of q k; None: 1 / sqrt(D).
        scale_positions: whether `scale` multiplies the position term too.
        mask_padding: what stands outside the image. False: keys and values of zero, which are attended to; H and W must be
            multiples of `block_size`. True: nothing; any H and W, the last blocks are cut off.
        dropout_p: probability with which each weight is dropped (and the others scaled up).
        return_lse: return the natural logarithm of each query's softmax denominator too.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for the plain code.

    Returns: (B, heads, H_q, W_q, D_v) in the dtype of q; with `return_lse` also (B, heads, H_q, W_q), float32 or float64.

    Raises:
        ValueError: tensors that do not fit together, or a grid that the blocks do not divide without `mask_padding`.
        BackendError: backend="triton" cannot serve the call.
    """
    _check(q, k, v, height_rel, width_rel, block_size, halo_size, query_stride, mask_padding)
    if use_kernel(backend, (q, k, v), dropout_p=dropout_p):
        from attention_zoo.ops.triton._common import LN2
        from attention_zoo.ops.triton.halo import halo_attention_triton

        sizes: dict[str, Any] = {"block_size": block_size, "halo_size": halo_size, "query_stride": query_stride}
        factor = k.shape[-1] ** -0.5 if scale is None else scale
        scales: dict[str, Any] = {"scale": factor, "scale_positions": scale_positions}
        out, lse = halo_attention_triton(q, k, v, height_rel, width_rel, **sizes, **scales, mask_padding=mask_padding)
        return (out, lse * LN2) if return_lse else out
    with no_autocast(q):
        logits = _logits(q, k, height_rel, width_rel, block_size, halo_size, query_stride, scale, scale_positions, mask_padding)
        values = _to_windows(v.to(logits.dtype), block_size, halo_size)  # (B, heads, U, V, win^2, D)
        weights = logits.softmax(-1)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        height, width = q.shape[2:4]
        out = _from_blocks(weights @ values, block_size // query_stride)[:, :, :height, :width].to(q.dtype)
        if not return_lse:
            return out
        lse = _from_blocks(logits.logsumexp(-1, keepdim=True), block_size // query_stride)
        return out, lse[:, :, :height, :width, 0]


def _logits(
    q: Tensor,
    k: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    query_stride: int,
    scale: float | None,
    scale_positions: bool,
    mask_padding: bool,
) -> Tensor:
    """(B, heads, U, V, i j, r c), float32 or float64."""
    work = torch.promote_types(q.dtype, torch.float32)
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    queries = _to_blocks(q.to(work), block_size // query_stride)  # (B, heads, U, V, i, j, D)
    keys = _to_windows(k.to(work), block_size, halo_size)  # (B, heads, U, V, win^2, D)
    logits = queries.flatten(4, 5) @ keys.transpose(-2, -1)
    positions = _position_logits(queries, height_rel.to(work), width_rel.to(work))
    logits = factor * (logits + positions) if scale_positions else factor * logits + positions
    if mask_padding:
        inside = torch.ones(1, 1, *k.shape[2:4], 1, dtype=torch.bool, device=k.device)
        real = _to_windows(inside, block_size, halo_size)[..., 0].unsqueeze(-2)  # (1, 1, U, V, 1, r c)
        logits = logits.masked_fill(~real, -torch.inf)
    return logits


def _position_logits(queries: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """q (Rh[r - i + win - 1] + Rw[c - j + win - 1]) for queries (B, heads, U, V, i, j, D) -> (B, heads, U, V, i j, r c)."""
    side, win = queries.shape[-2], (len(height_rel) + 1) // 2
    cells = torch.arange(win, device=queries.device)
    index = cells - torch.arange(side, device=queries.device)[:, None] + win - 1  # (i, r), and (j, c) alike
    rows = torch.einsum("bhuvijd,ird->bhuvijr", queries, height_rel[index])
    columns = torch.einsum("bhuvijd,jcd->bhuvijc", queries, width_rel[index])
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2).flatten(-3, -2)


def _to_blocks(x: Tensor, side: int) -> Tensor:
    """(B, heads, H, W, D) -> (B, heads, U, V, side, side, D), filled up with zeros on the right and bottom."""
    height, width = x.shape[2:4]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)


def _from_blocks(x: Tensor, side: int) -> Tensor:
    """(B, heads, U, V, side^2, D) -> (B, heads, U side, V side, D)."""
    return x.unflatten(4, (side, side)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _to_windows(x: Tensor, block_size: int, halo_size: int) -> Tensor:
    """(B, heads, H, W, D) -> (B, heads, U, V, win^2, D), the window of each block; zeros outside the image."""
    height, width = x.shape[2:4]
    below, right = (-side % block_size + halo_size for side in (height, width))
    x = F.pad(x, (0, 0, halo_size, right, halo_size, below))
    win = block_size + 2 * halo_size
    windows = x.unfold(2, win, block_size).unfold(3, win, block_size)  # (B, heads, U, V, D, win, win)
    return windows.flatten(5).transpose(4, 5)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    query_stride: int,
    mask_padding: bool,
) -> None:
    """Raise ValueError unless the call makes sense."""
    if block_size < 1 or halo_size < 0 or query_stride < 1 or block_size % query_stride:
        raise ValueError(
            "block_size must be at least 1 and a multiple of query_stride, halo_size at least 0; got "
            f"block_size={block_size}, halo_size={halo_size}, query_stride={query_stride}"
        )
    if any(t.ndim != 5 for t in (q, k, v)) or k.shape[:4] != v.shape[:4] or min(k.shape[2:4]) < 1:
        raise ValueError(
            "q, k and v are laid out as (B, heads, H, W, D), k and v on one grid of at least one cell; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    grid, win = k.shape[2:4], block_size + 2 * halo_size
    wanted = (*k.shape[:2], *(-(-side // query_stride) for side in grid), k.shape[-1])
    if q.shape != wanted:
        raise ValueError(f"with k {tuple(k.shape)} and query_stride={query_stride}, q must be {wanted}; got {tuple(q.shape)}")
    table = (2 * win - 1, k.shape[-1])
    if height_rel.shape != table or width_rel.shape != table:
        raise ValueError(f"height_rel and width_rel must be {table}; got {tuple(height_rel.shape)}, {tuple(width_rel.shape)}")
    if not mask_padding and any(side % block_size for side in grid):
        nearest = tuple(max(block_size, round(side / block_size) * block_size) for side in grid)
        raise ValueError(
            f"the blocks of {block_size} x {block_size} do not divide the grid_size {tuple(grid)}; give mask_padding=True for "
            f"grids of any size, or one of whole blocks, the nearest is {nearest}"
        )
