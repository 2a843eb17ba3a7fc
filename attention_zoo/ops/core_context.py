"""Core-context attention as functions of tensors: old tokens as core tokens, one for each group, recent ones exactly, one softmax.

In plain PyTorch, written to be read, in blocks of queries so that no N x N map is formed; softmaxes in float32 (float64 stays
float64). It is the specification of the kernel of `triton/core_context.py`.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped

__all__ = ["CORE_HEADS", "POOLS", "core_context_attention", "core_context_visible", "pool_core_tokens", "pooling_weights"]

POOLS = ("cca", "mean", "max")
CORE_HEADS = ("query", "kv")

_BLOCK = 256  # queries whose logits exist at the same time
_MOST_MEMBERS = 64  # tokens of a group that a program of the pooling kernel holds


def pooling_weights(q: Tensor, k: Tensor, *, group_size: int, scale: float | None = None) -> Tensor:
    """How much each token counts in its group: alpha_jt = softmax over t in group j of (scale * q_j k_t), per query head.

    Shape: q (B, H, m, D), the queries of the groups' last tokens, k (B, G, m group_size, D) -> (B, H, m, group_size), float32 or
    float64.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    groups = k.to(work).unflatten(2, (-1, group_size))
    heads = q.to(work).unflatten(1, (k.shape[1], -1))  # (B, G, H / G, m, D): keys stay at G heads
    return torch.einsum("bgrmd,bgmpd->bgrmp", factor * heads, groups).softmax(-1).flatten(1, 2)


def _pool_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    pool: str = "cca",
    core_per: str = "query",
    scale: float | None = None,
    **_: Any,
) -> Tensor | None:
    """How `pool_core_tokens` weighs the tokens of each group, (B, H_core, m, group_size); None: by their size ("max")."""
    if pool == "max":
        return None
    if pool == "mean":
        shape = (*k.shape[:2], q.shape[2], group_size)
        return k.new_full(shape, 1 / group_size, dtype=torch.promote_types(k.dtype, torch.float32))
    with no_autocast(q):
        weights = pooling_weights(q, k, group_size=group_size, scale=scale)
    return weights.unflatten(1, (k.shape[1], -1)).mean(2) if core_per == "kv" else weights


@tapped(_pool_weights)
def pool_core_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    pool: str = "cca",
    core_per: str = "query",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Keys and values of the core tokens, one for each group of `group_size` consecutive tokens.

        K_j = sum_t alpha_jt k_t          V_j = sum_t alpha_jt v_t          t in group j

    Args:
        q: (B, H, m, D), the query of each group's last token.
        k: (B, G, m group_size, D), H a multiple of G.
        v: (B, G, m group_size, D_v).
        group_size: tokens of a group.
        pool: "cca": alpha as in `pooling_weights`; "mean": 1 / group_size; "max": the largest of each channel, of k and v apart.
        core_per: "query": a core token for each query head; "kv": one for each key/value head, with the mean of its query heads'
            alpha. "mean" and "max" do not depend on the query and are always one for each key/value head.
        scale: factor of q k; None: 1 / sqrt(D).
        backend: "triton" for our kernel, which pool="cca" has; "auto" takes it on CUDA; any other for the plain code.

    Returns: (B, H_core, m, D) and (B, H_core, m, D_v) in the dtype of k and v; H_core is H or G.

    Raises:
        ValueError: tensors that do not fit together, or an unknown choice.
        BackendError: backend="triton" cannot serve the call.
    """
    for name, value, allowed in (("pool", pool, POOLS), ("core_per", core_per, CORE_HEADS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    if k.shape[2] != q.shape[2] * group_size or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be (B, H, m, D), k and v (B, G, m * {group_size}, D) with G a divisor of H; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if use_kernel(backend, (q, k, v), missing=_no_pooling_kernel(pool, group_size)):
        from attention_zoo.ops.triton.core_pooling import pool_core_tokens_triton

        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return pool_core_tokens_triton(q, k, v, group_size=group_size, mean=core_per == "kv", scale=factor)
    with no_autocast(q):
        groups = tuple(t.unflatten(2, (-1, group_size)) for t in (k, v))  # (B, G, m, group_size, D)
        if pool == "max":
            return groups[0].amax(3), groups[1].amax(3)
        work = torch.promote_types(k.dtype, torch.float32)
        if pool == "mean":
            return groups[0].to(work).mean(3).to(k.dtype), groups[1].to(work).mean(3).to(v.dtype)
        weights = pooling_weights(q, k, group_size=group_size, scale=scale).unflatten(1, (k.shape[1], -1))
        if core_per == "kv":
            weights = weights.mean(2, keepdim=True)
        core_k, core_v = (torch.einsum("bgrmp,bgmpd->bgrmd", weights, t.to(work)).flatten(1, 2) for t in groups)
        return core_k.to(k.dtype), core_v.to(v.dtype)


def _no_pooling_kernel(pool: str, group_size: int) -> str | None:
    """Why there is no kernel for pooling this way; None if there is."""
    if pool != "cca":
        return f"pool={pool!r} is a single reduction, which needs no kernel"
    if group_size > _MOST_MEMBERS:
        return f"groups of more than {_MOST_MEMBERS} tokens: {group_size}"
    return None


def core_context_visible(
    query_positions: Tensor, key_positions: Tensor, num_core: int, *, window_size: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Which core tokens and which exact tokens each query sees; together they are every token up to its own, each once.

    With positions from 0, query i sees the groups 0 .. n_i - 1, n_i = max(0, floor((i + 1 - window_size) / group_size)), as core
    tokens, and the tokens from n_i group_size to i exactly.

    Shape: positions (N_q,) and (N_k,), or (B, N_q) and (B, N_k) -> (..., N_q, num_core) and (..., N_q, N_k), boolean.
    """
    released = _released(query_positions, window_size, group_size).unsqueeze(-1)
    core = torch.arange(num_core, device=query_positions.device) < released
    keys = key_positions.unsqueeze(-2)
    return core, (keys >= released * group_size) & (keys <= query_positions.unsqueeze(-1))


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    *,
    window_size: int,
    group_size: int,
    query_start: int | Tensor = 0,
    key_start: int | Tensor = 0,
    scale: float | None = None,
    rows: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Probabilities (B, H, N_q, m + N_k) of a call of `core_context_attention`, core tokens first; `rows`: of these queries."""
    _check(q, k, v, core_k, core_v, window_size, group_size)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    positions = _positions(query_start, q.shape[2], q.device), _positions(key_start, k.shape[2], q.device)
    if rows is not None:
        q, positions = q.index_select(2, rows), (positions[0][..., rows], positions[1])
    with no_autocast(q):
        logits = _logits(
            factor * q.to(torch.promote_types(q.dtype, torch.float32)), k, core_k, positions, (window_size, group_size)
        )
        return logits.softmax(-1).nan_to_num(0.0)  # nan: padding, which sees nothing


@tapped(_weights, takes_rows=True)
def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    *,
    window_size: int,
    group_size: int,
    query_start: int | Tensor = 0,
    key_start: int | Tensor = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to old tokens in groups and to recent ones exactly, in one softmax; `core_context_visible` says which.

        out_i = softmax(scale * q_i [K_{0 .. n_i - 1}; k_{n_i p .. i}]^T) [V_{0 .. n_i - 1}; v_{n_i p .. i}],  p = group_size

    Grouped heads: query head h reads key/value head h // (H / G) and core head h // (H / H_core), nothing is repeated in memory.

    Args:
        q: (B, H, N_q, D), queries of consecutive tokens.
        k: (B, G, N_k, D), keys of consecutive tokens.
        v: (B, G, N_k, D_v).
        core_k: (B, H_core, m, D), core tokens of the groups 0 .. m - 1, at least those that the last query sees.
        core_v: (B, H_core, m, D_v).
        window_size: tokens up to and with its own that a query sees exactly at least.
        group_size: tokens of a group.
        query_start, key_start: position of the first query and of the first key; an int, or int64 (B,), one for each sample.
            Keys at negative positions are seen by nobody.
        scale: factor of the logits; None: 1 / sqrt(D).
        dropout_p: probability with which each weight is dropped (and the others scaled up).
        return_lse: return the natural logarithm of each query's softmax denominator too.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other for the plain code.

    Returns: (B, H, N_q, D_v) in the dtype of q; with `return_lse` also (B, H, N_q), float32 or float64.

    Raises:
        ValueError: tensors that do not fit together, sizes out of range, or core tokens that are missing.
        BackendError: backend="triton" cannot serve the call.
    """
    _check(q, k, v, core_k, core_v, window_size, group_size)
    if isinstance(query_start, int) and core_k.shape[2] < (
        needed := _released(query_start + q.shape[2] - 1, window_size, group_size)
    ):
        raise ValueError(f"the last query sees {needed} core tokens, core_k has {core_k.shape[2]}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernel(backend, (q, k, v, core_k, core_v), dropout_p=dropout_p):
        from attention_zoo.ops.triton._common import LN2
        from attention_zoo.ops.triton.core_context import core_context_attention_triton

        places: dict[str, Any] = {"query_start": query_start, "key_start": key_start}
        sizes = {"window_size": window_size, "group_size": group_size}
        out, lse = core_context_attention_triton(q, k, v, core_k, core_v, **sizes, **places, scale=factor)
        return (out, lse * LN2) if return_lse else out
    parts = []
    with no_autocast(q):
        for first in range(0, max(q.shape[2], 1), _BLOCK):
            block = q[:, :, first : first + _BLOCK]
            keys, core = slice(None), slice(None)
            start, offset = query_start + first, key_start
            if isinstance(start, int) and isinstance(key_start, int):  # what no query of the block sees is not even read
                stop = start + block.shape[2]
                oldest = max(_released(start, window_size, group_size) * group_size, key_start)
                keys, offset = slice(oldest - key_start, max(stop - key_start, 0)), oldest
                core = slice(0, _released(stop - 1, window_size, group_size))
            parts.append(
                _attend_block(
                    factor * block.to(torch.promote_types(q.dtype, torch.float32)),
                    *(t[:, :, keys] for t in (k, v)),
                    *(t[:, :, core] for t in (core_k, core_v)),
                    starts=(start, offset),
                    sizes=(window_size, group_size),
                    dropout_p=dropout_p,
                )
            )
    out = torch.cat([part for part, _ in parts], 2).to(q.dtype)
    return (out, torch.cat([lse for _, lse in parts], 2)) if return_lse else out


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    *,
    starts: tuple[int | Tensor, int | Tensor],
    sizes: tuple[int, int],
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """All of the block's logits, core tokens first; q is scaled and in the working dtype."""
    num_core = core_k.shape[2]
    positions = _positions(starts[0], q.shape[2], q.device), _positions(starts[1], k.shape[2], q.device)
    logits = _logits(q, k, core_k, positions, sizes)
    weights = logits.softmax(-1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    out = _per_head(weights[..., :num_core], core_v.to(q.dtype)) + _per_head(weights[..., num_core:], v.to(q.dtype))
    return out, logits.logsumexp(-1)


def _logits(q: Tensor, k: Tensor, core_k: Tensor, positions: tuple[Tensor, Tensor], sizes: tuple[int, int]) -> Tensor:
    """(B, H, N_q, m + N_k), -inf where a query does not see; q is scaled, positions are those of the queries and of the keys."""
    queries, keys = positions
    if queries.ndim != keys.ndim:
        queries, keys = (p if p.ndim == 2 else p.unsqueeze(0) for p in positions)
    seen = torch.cat(core_context_visible(queries, keys, core_k.shape[2], window_size=sizes[0], group_size=sizes[1]), -1)
    if seen.ndim == 3:
        seen = seen.unsqueeze(1)  # over the heads
    logits = torch.cat([_per_head(q, core_k.to(q.dtype).mT), _per_head(q, k.to(q.dtype).mT)], -1)
    return logits.masked_fill(~seen, -torch.inf)


def _per_head(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, N, a) @ y (B, G, a, b) -> (B, H, N, b): each head of y for H / G consecutive heads of x, taken as rows of one."""
    rows = x.unflatten(1, (y.shape[1], -1))
    return (rows.flatten(2, 3) @ y).unflatten(2, rows.shape[2:4]).flatten(1, 2)


def _positions(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """start, start + 1, ...: (length,), or (B, length) for one start for each sample."""
    steps = torch.arange(length, device=device)
    return steps + start if isinstance(start, int) else start.unsqueeze(-1) + steps


@overload
def _released(position: int, window_size: int, group_size: int) -> int: ...
@overload
def _released(position: Tensor, window_size: int, group_size: int) -> Tensor: ...
def _released(position: int | Tensor, window_size: int, group_size: int) -> int | Tensor:
    """Groups that the query at `position` (from 0) sees as core tokens: those whose last token lies window_size tokens back."""
    groups = (position + 1 - window_size) // group_size
    return groups.clamp_min(0) if isinstance(groups, Tensor) else max(groups, 0)


def _check(q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, window_size: int, group_size: int) -> None:
    """Raise ValueError unless the call makes sense."""
    if window_size < 0 or group_size < 1:
        raise ValueError(f"window_size must be at least 0 and group_size at least 1; got {window_size} and {group_size}")
    shapes = [tuple(t.shape) for t in (q, k, v, core_k, core_v)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"q, k, v, core_k and core_v are (B, H, N, D) with one B; got {', '.join(map(str, shapes))}")
    fits = k.shape[:3] == v.shape[:3] and core_k.shape[:3] == core_v.shape[:3] and v.shape[-1] == core_v.shape[-1]
    fits = fits and q.shape[-1] == k.shape[-1] == core_k.shape[-1]
    if not fits or q.shape[1] % k.shape[1] or q.shape[1] % core_k.shape[1]:
        raise ValueError(
            "k and v (B, G, N_k, D), core_k and core_v (B, H_core, m, D) need the channels of q and numbers of heads that divide "
            f"its; got {', '.join(map(str, shapes))}"
        )
