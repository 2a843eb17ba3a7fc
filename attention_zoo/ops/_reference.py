"""Attention in plain PyTorch: the specification that every engine is held to.

Written to be read, not to be fast: the whole (N_q, N_k) map is formed, in float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._problem import Problem

__all__ = ["packed_positions", "reference_attention", "visible"]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + bias + mask) v, and the natural logarithm of the softmax's denominator.

    Shape: q (B, H_q, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v) -> (B, H_q, N_q, D_v), (B, H_q, N_q) float32 or float64.
    Query head h reads key/value head h // (H_q / H_kv). A row that may attend to nothing gives 0 and a log-normaliser of -inf.
    """
    with no_autocast(q):
        return _attend(q, k, v, problem)


def _attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // max(k.shape[1], 1)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    qf = q.to(work).unflatten(1, (k.shape[1], groups))  # (B, H_kv, G, N_q, D): K and V stay at H_kv heads
    logits = problem.scale * qf @ k.to(work).unsqueeze(2).transpose(-2, -1)
    logits = logits.flatten(1, 2)  # (B, H_q, N_q, N_k)
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if problem.bias is not None:
        logits = logits + problem.bias.to(work)
    if problem.attn_mask is not None and problem.attn_mask.is_floating_point():
        logits = logits + problem.attn_mask.to(work)
    if (allowed := visible(problem, q.device)) is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)

    top = logits.detach().amax(-1, keepdim=True) if problem.num_keys else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)  # a fully masked row: weights of 0, and finite gradients
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    lse = (top + torch.log(total)).masked_fill(dead, -torch.inf)
    weights = weights / total
    if problem.dropout_p > 0:
        weights = torch.dropout(weights, problem.dropout_p, train=True)
    out = weights.unflatten(1, (k.shape[1], groups)) @ v.to(work).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse.squeeze(-1)


def visible(problem: Problem, device: torch.device) -> Tensor | None:
    """Which keys each query may attend to, boolean and broadcastable to (B, H, N_q, N_k); None: all of them.

    Causal and window bounds count from the END of both sequences: the last query stands at the last key, so that decoding with
    a cache needs no offset. In a packed batch they count within each sequence, and sequences do not see each other.
    """
    allowed: Tensor | None = None
    left, right = problem.window
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        query_sequence, query_position = packed_positions(problem.cu_seqlens_q, problem.num_queries)
        key_sequence, key_position = packed_positions(problem.cu_seqlens_k, problem.num_keys)
        lengths_q, lengths_k = problem.cu_seqlens_q.diff(), problem.cu_seqlens_k.diff()
        allowed = query_sequence[:, None] == key_sequence[None, :]
        query_position = query_position + (lengths_k - lengths_q)[query_sequence]
    elif left is None and right is None:
        mask = problem.attn_mask
        return mask if mask is not None and mask.dtype == torch.bool else None
    else:
        query_position = torch.arange(problem.num_queries, device=device) + problem.num_keys - problem.num_queries
        key_position = torch.arange(problem.num_keys, device=device)
    distance = key_position[None, :] - query_position[:, None]
    if left is not None:
        allowed = _both(allowed, distance >= -left)
    if right is not None:
        allowed = _both(allowed, distance <= right)
    if problem.attn_mask is not None and not problem.attn_mask.is_floating_point():
        allowed = _both(allowed, problem.attn_mask)
    return allowed


def packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of the packed tokens: the index of its sequence, and its position in it."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(torch.long), tokens, right=True).clamp_max(len(cu_seqlens) - 2)
    return sequence, tokens - cu_seqlens.to(torch.long)[sequence]


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b
