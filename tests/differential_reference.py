"""Differential attention, grouped or not, as loops over samples, heads, queries and keys, one number after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def rotated(x: Tensor, tables: tuple[Tensor, Tensor] | None, position: int, layout: str) -> Tensor:
    """One head's vector (d,) turned by the angles of its position."""
    if tables is None:
        return x
    cos, sin, d, out = tables[0][position], tables[1][position], len(x), x.clone()
    for i in range(d // 2):
        a, b = (i, i + d // 2) if layout == "half" else (2 * i, 2 * i + 1)
        out[a], out[b] = x[a] * cos[a] - x[b] * sin[a], x[b] * cos[b] + x[a] * sin[b]
    return out


def rms_norm(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    normed = x / torch.sqrt(x.square().sum() / len(x) + eps)
    return normed if weight is None else normed * weight


def head(linear: nn.Linear, token: Tensor, index: int, width: int) -> Tensor:
    """Rows index * width ... of a projection of one token."""
    return linear(token)[index * width : (index + 1) * width]


def differential(
    module: nn.Module,
    x: Tensor,
    *,
    context: Tensor | None = None,
    allowed: Tensor | None = None,
    added: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The module's output (B, N, C). `allowed` is boolean (B, N, M), `added` float (N, M)."""
    source = x if context is None else context
    ratio, d = module.num_heads // module.num_noise_heads, module.head_dim
    per_kv = module.num_heads // module.num_kv_heads
    v1, halves, layout = module.style == "v1", module.pairing == "halves", module.rope_layout
    out = torch.zeros(x.shape[0], x.shape[1], module.dim, dtype=x.dtype)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            outputs = []
            for s in range(module.num_heads):
                m, j = s // ratio, s // per_kv
                if halves:
                    rows, keys, values = (s, s + module.num_heads), (j, j + module.num_kv_heads), (j, j + module.num_kv_heads)
                else:
                    rows = (m * (ratio + 1) + s % ratio, m * (ratio + 1) + ratio)
                    keys = values = (2 * j, 2 * j + 1) if v1 else (j, j)
                maps = []
                for row, key in zip(rows, keys, strict=True):
                    q = module.q_norm(head(module.q_proj, x[b, i], row, d))
                    q = rotated(q, tables, i, layout)
                    weights = []
                    for t in range(source.shape[1]):
                        k = module.k_norm(head(module.k_proj, source[b, t], key, d))
                        logit = (q * rotated(k, tables, t, layout)).sum() / math.sqrt(d)
                        visible = allowed is None or bool(allowed[b, i, t])
                        logit = logit if added is None else logit + added[i, t]
                        weights.append(torch.exp(logit) if visible else torch.zeros((), dtype=x.dtype))
                    total = sum(weights)
                    maps.append([w / total if total > 0 else w for w in weights])
                factor = scale(module, x[b, i], s)
                o = torch.zeros(module.value_dim, dtype=x.dtype)
                for t in range(source.shape[1]):
                    parts = [head(module.v_proj, source[b, t], value, d) for value in (values if v1 else values[:1])]
                    o = o + (maps[0][t] - factor * maps[1][t]) * torch.cat(parts)
                if module.sub_norm:
                    o = rms_norm(o, eps, module.subln.weight) * (1 - module.lambda_init)
                outputs.append(o)
            out[b, i] = module.o_proj(torch.cat(outputs))
    return out


def scale(module: nn.Module, token: Tensor, signal_head: int) -> Tensor:
    """lambda of one query token and signal head."""
    if module.lambda_mode == "token":
        return 1 / (1 + torch.exp(-module.lambda_proj(token)[signal_head]))
    first = torch.exp(sum(a * b for a, b in zip(module.lambda_q1, module.lambda_k1, strict=True)))
    second = torch.exp(sum(a * b for a, b in zip(module.lambda_q2, module.lambda_k2, strict=True)))
    return first - second + module.lambda_init
