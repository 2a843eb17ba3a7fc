"""The grouped-query mechanisms as loops over samples, heads and tokens: their papers' equations, one number after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def heads_of_kv(allocation: list[int]) -> list[int]:
    """The key/value head of each query head: the first allocation[0] have 0, the next allocation[1] have 1, ..."""
    return [g for g, count in enumerate(allocation) for _ in range(count)]


def head_outputs(
    module: nn.Module, x: Tensor, allocation: list[list[int]], context: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """softmax(q_h k_kv(h)^T) v_kv(h) for each sample b, whose query heads are shared out by allocation[b].

    Shape: -> (B, H, N, d). `allowed` is boolean (B, N, M), which keys a query may see; None: all.
    """
    context = x if context is None else context
    d, out = module.head_dim, []
    for b in range(x.shape[0]):
        heads = []
        for h, g in enumerate(heads_of_kv(allocation[b])):
            q = module.q(x[b])[:, h * d : (h + 1) * d] * d**-0.5
            k = module.k(context[b])[:, g * d : (g + 1) * d]
            v = module.v(context[b])[:, g * d : (g + 1) * d]
            rows = []
            for i in range(x.shape[1]):
                seen = [j for j in range(context.shape[1]) if allowed is None or allowed[b, i, j]]
                weights = torch.stack([torch.exp((q[i] * k[j]).sum()) for j in seen])
                rows.append(sum(w * v[j] for w, j in zip(weights / weights.sum(), seen, strict=True)))
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def output(module: nn.Module, heads: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, C): heads side by side, then the output projection."""
    return module.proj(torch.cat(list(heads.unbind(1)), dim=-1))


def fix_up(allocation: list[int], num_heads: int) -> list[int]:
    allocation = list(allocation)
    while sum(allocation) > num_heads:
        allocation[allocation.index(max(allocation))] -= 1
    while sum(allocation) < num_heads:
        allocation[allocation.index(min(allocation))] += 1
    return allocation


def even(num_heads: int, num_kv_heads: int) -> list[int]:
    return [num_heads // num_kv_heads + (1 if g < num_heads % num_kv_heads else 0) for g in range(num_kv_heads)]


def share_out(weights: Tensor, num_heads: int) -> list[int]:
    """Query heads in proportion to weights (G,), float32 as the official code computes; even where there is no proportion."""
    if not (weights.sum() > 0 and math.isfinite(weights.sum())):
        return even(num_heads, len(weights))
    shares = (weights / weights.sum() * num_heads).tolist()
    return fix_up([round(share) for share in shares], num_heads)  # Python, too, rounds half to even


def frobenius_norms(module: nn.Module, context: Tensor, real: Tensor | None = None) -> Tensor:
    """sqrt of the sum of squares of the keys, for each sample and key/value head (B, G); only `real` (B, M) tokens count."""
    d, norms = module.head_dim, torch.zeros(context.shape[0], module.num_kv_heads)
    for b in range(context.shape[0]):
        keys = module.k(context[b]).detach().float()
        for g in range(module.num_kv_heads):
            counted = [keys[j, g * d : (g + 1) * d] for j in range(context.shape[1]) if real is None or real[b, j]]
            norms[b, g] = torch.stack(counted).square().sum().sqrt() if counted else 0.0
    return norms


def min_max(norms: Tensor) -> Tensor:
    return (norms - norms.min()) / (norms.max() - norms.min())


def perturbed(heads: Tensor, noise: Tensor) -> Tensor:
    """Noise of the outputs' own mean and deviation taken off each row: heads (B, H, N, d), noise (G, H/G, N d)."""
    batch, num_heads, tokens, d = heads.shape
    group = noise.shape[1]
    out = []
    for b in range(batch):
        for h in range(num_heads):
            row = torch.cat([heads[b, h, i] for i in range(tokens)])
            uniform = noise[h // group, h % group].to(row).clone()
            if h % group < len(uniform):
                uniform[h % group] = 0.0
            count = len(row)
            u_mean, mean = uniform.sum() / count, row.sum() / count
            u_std = ((uniform - u_mean).square().sum() / (count - 1)).sqrt()
            std = ((row - mean).square().sum() / (count - 1)).sqrt()
            out.append(row - ((uniform - u_mean) / u_std * std + mean))
    return torch.stack(out).reshape(batch, num_heads, tokens, d)
