"""Attention in plain PyTorch: the specification that every engine is held to.

Written to be read, not to be fast: the whole (N_q, N_k) map is formed, in float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._problem import Problem

__all__ = ["packed_positions", "reference_attention", "reference_weights", "visible"]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + bias + mask) v, and the natural logarithm of the softmax's denominator.

    Shape: q (B, H_q, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v) -> (B, H_q, N_q, D_v), (B, H_q, N_q) float32 or float64.
    Query head h reads key/value head h // (H_q / H_kv). A row that may attend to nothing gives 0 and a log-normaliser of -inf.
    """
    with no_autocast(q):
        return _attend(q, k, v, problem)


def _attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    weights, lse = reference_weights(q, k, problem)
    if problem.dropout_p > 0:
        weights = torch.dropout(weights, problem.dropout_p, train=True)
    out = weights.unflatten(1, (k.shape[1], q.shape[1] // max(k.shape[1], 1))) @ v.to(weights.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse


def reference_weights(q: Tensor, k: Tensor, problem: Problem, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + bias + mask) before any dropout, and the natural logarithm of its denominator.

    Shape: q (B, H_q, N_q, D), k (B, H_kv, N_k, D) -> (B, H_q, N_q, N_k), (B, H_q, N_q) float32 or float64. `rows`, int64 (R,):
    numbers of the queries to compute, none of the others is looked at; None: all.
    """
    groups = q.shape[1] // max(k.shape[1], 1)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q if rows is None else q.index_select(2, rows)
    qf = queries.to(work).unflatten(1, (k.shape[1], groups))  # (B, H_kv, G, N_q, D): K and V stay at H_kv heads
    logits = problem.scale * qf @ k.to(work).unsqueeze(2).transpose(-2, -1)
    logits = logits.flatten(1, 2)  # (B, H_q, N_q, N_k)
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if problem.bias is not None:
        logits = logits + _take_rows(problem.bias, rows).to(work)
    if problem.attn_mask is not None and problem.attn_mask.is_floating_point():
        logits = logits + _take_rows(problem.attn_mask, rows).to(work)
    if (allowed := visible(problem, q.device, rows)) is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)

    top = logits.detach().amax(-1, keepdim=True) if problem.num_keys else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)  # a fully masked row: weights of 0, and finite gradients
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    lse = (top + torch.log(total)).masked_fill(dead, -torch.inf)
    return weights / total, lse.squeeze(-1)


def _take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a map (..., N_q or 1, N_k), where it has more than one for all queries."""
    return x if rows is None or x.shape[-2] == 1 else x.index_select(-2, rows)


def visible(problem: Problem, device: torch.device, rows: Tensor | None = None) -> Tensor | None:
    """Which keys each query may attend to, boolean and broadcastable to (B, H, N_q, N_k); None: all of them.

    Causal and window bounds count from the END of both sequences: the last query stands at the last key, so that decoding with
    a cache needs no offset. In a packed batch they count within each sequence, and sequences do not see each other. `rows`: as for
    `reference_weights`.
    """
    allowed: Tensor | None = None
    left, right = problem.window
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        query_sequence, query_position = packed_positions(problem.cu_seqlens_q, problem.num_queries)
        key_sequence, key_position = packed_positions(problem.cu_seqlens_k, problem.num_keys)
        lengths_q, lengths_k = problem.cu_seqlens_q.diff(), problem.cu_seqlens_k.diff()
        query_position = query_position + (lengths_k - lengths_q)[query_sequence]
        if rows is not None:
            query_sequence, query_position = query_sequence[rows], query_position[rows]
        allowed = query_sequence[:, None] == key_sequence[None, :]
    elif left is None and right is None:
        mask = problem.attn_mask
        return _take_rows(mask, rows) if mask is not None and mask.dtype == torch.bool else None
    else:
        number = torch.arange(problem.num_queries, device=device) if rows is None else rows
        query_position = number + problem.num_keys - problem.num_queries
        key_position = torch.arange(problem.num_keys, device=device)
    distance = key_position[None, :] - query_position[:, None]
    if left is not None:
        allowed = _both(allowed, distance >= -left)
    if right is not None:
        allowed = _both(allowed, distance <= right)
    if problem.attn_mask is not None and not problem.attn_mask.is_floating_point():
        allowed = _both(allowed, _take_rows(problem.attn_mask, rows))
    return allowed


def packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of the packed tokens: the index of its sequence, and its position in it."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(torch.long), tokens, right=True).clamp_max(len(cu_seqlens) - 2)
    return sequence, tokens - cu_seqlens.to(torch.long)[sequence]


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b
