"""Combiner in loops over tokens and regions, from the paper's formulas: probabilities of every pair of tokens, and outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_zoo.attention import CombinerAttention
from attention_zoo.attention.base import apply_rotary

Tables = tuple[Tensor, Tensor] | None


def by_formula(m: CombinerAttention, x: Tensor, real: Tensor | None = None, tables: Tables = None) -> tuple[Tensor, Tensor]:
    """Output (B, N, C) and probabilities (B, H, N, N). The module's window_size must be given; `real` is (B, N)."""
    batch, length, _ = x.shape
    q, k, v = m.qkv(x).view(batch, length, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
    q, k = m.q_norm(q), m.k_norm(k)
    if tables is not None:
        q, k = (apply_rotary(t, tables, m.rope_layout) for t in (q, k))
    q = q / math.sqrt(m.head_dim)
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real.bool()
    probabilities = torch.stack(
        [
            axial_map(m, x[b], q[b], k[b], v[b], real[b], tables) if m.pattern == "axial" else regions_map(m, q[b], k[b], real[b])
            for b in range(batch)
        ]
    )
    out = m.proj((probabilities @ v).transpose(1, 2).reshape(batch, length, -1))
    return out, probabilities


def regions_map(m: CombinerAttention, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """fixed, logsparse and mixture: q, k (H, N, d) -> (H, N, N)."""
    heads, length, width = q.shape
    rows = []
    for i in range(length):
        direct, regions = partition(m, i, length)
        direct = [j for j in direct if real[j]]
        logits, spread = [(q[:, i] * k[:, j]).sum(-1) for j in direct], [one_hot(j, heads, length, q) for j in direct]
        for members, line in regions:
            kept = [j for j in members if real[j]]
            if kept:
                key, query = pooled(m, m._act_key(k)[:, kept]), pooled(m, m._act_query(q)[:, kept])
                weights = torch.einsum("hd,hjd->hj", query, k[:, kept]).softmax(-1)
            elif not m.exclusive and not m.is_causal and not members:  # official: a key of 0, and the mean of the line
                kept, key = line, torch.zeros(heads, width, dtype=q.dtype)
                weights = torch.full((heads, len(line)), 1 / len(line), dtype=q.dtype)
            else:
                continue
            logits.append((q[:, i] * key).sum(-1))
            spread.append(torch.zeros(heads, length, dtype=q.dtype).index_add(1, torch.tensor(kept), weights))
        rows.append(mixed(logits, spread, heads, length, q))
    return torch.stack(rows, 1)


def mixed(logits: list[Tensor], spread: list[Tensor], heads: int, length: int, like: Tensor) -> Tensor:
    if not logits:
        return torch.zeros(heads, length, dtype=like.dtype)
    return (torch.stack(logits, -1).softmax(-1)[..., None] * torch.stack(spread, 1)).sum(1)


def one_hot(j: int, heads: int, length: int, like: Tensor) -> Tensor:
    return torch.eye(length, dtype=like.dtype)[j].expand(heads, -1)


def pooled(m: CombinerAttention, members: Tensor) -> Tensor:
    """(H, n, d) -> (H, d)."""
    return {"max": lambda t: t.amax(1), "sum": lambda t: t.sum(1), "mean": lambda t: t.mean(1)}[m.summary_pool](members)


def partition(m: CombinerAttention, i: int, length: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Direct tokens of query i, and the regions it sees summaries of, each with the line that it lies in."""
    everything = range(length)
    if m.pattern == "logsparse":
        spans = binary(i)
        if not m.is_causal:
            spans += [(length - e, length - a) for a, e in binary(length - 1 - i)]
        return [i], [(list(range(a, e)), []) for a, e in spans]
    window = min(m.window_size, length)
    row, column = divmod(i, window)
    num_rows = -(-length // window)

    def cells(rows: range, columns: range) -> list[int]:
        return [r * window + c for r in rows for c in columns if r * window + c < length]

    if m.pattern == "fixed":
        own = [j for j in everything if j // window == row and (j <= i or not m.is_causal)]
        others = [s for s in range(num_rows) if (s < row if m.is_causal else s != row or not m.exclusive)]
        return own, [(cells(range(s, s + 1), range(window)), []) for s in others]

    all_rows, all_columns = range(num_rows), range(window)
    if m.is_causal:
        direct = [j for j in everything if (j // window == row and j <= i) or (j % window == column and j < i)]
        regions = [cells(range(row), range(c, c + 1)) for c in all_columns if c != column and row > 0]
        for r in range(row):
            regions += [cells(range(r, r + 1), part) for part in (range(column), range(column + 1, window)) if len(part)]
        return direct, [(members, []) for members in regions]
    if m.exclusive:
        direct = [j for j in everything if j // window == row or j % window == column]
    else:
        direct = cells(range(row, row + 1), all_columns) + cells(all_rows, range(column, column + 1))
    found = []
    for c in all_columns:
        if c != column or not m.exclusive:
            line = cells(all_rows, range(c, c + 1))
            found += [(cells(part, range(c, c + 1)), line) for part in (range(row), range(row + 1, num_rows))]
    for r in all_rows:
        if r != row or not m.exclusive:
            line = cells(range(r, r + 1), all_columns)
            found += [(cells(range(r, r + 1), part), line) for part in (range(column), range(column + 1, window))]
    return direct, found


def binary(i: int) -> list[tuple[int, int]]:
    """The spans of the binary decomposition of [0, i)."""
    found, start = [], 0
    for bit in reversed(range(i.bit_length())):
        if i >> bit & 1:
            found.append((start, start + (1 << bit)))
            start += 1 << bit
    return found


def axial_map(m: CombinerAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor, tables: Tables) -> Tensor:
    """x (N, C), q, k, v (H, N, d) -> (H, N, N)."""
    heads, length, _ = q.shape
    window = min(m.window_size, length)
    whole = torch.zeros(heads, length, length, dtype=q.dtype)  # what each token sees of its own row
    for i in range(length):
        row = [j for j in range(i // window * window, min(length, (i // window + 1) * window)) if real[j]]
        if row:
            weights = torch.einsum("hd,hjd->hj", q[:, i], k[:, row]).softmax(-1)
            whole = whole.index_put((torch.arange(heads)[:, None], torch.tensor(i), torch.tensor(row)[None]), weights)
    keys = k
    if m.row_summary == "wsum":
        keys = whole @ k
    elif m.row_summary != "none":
        start = whole @ (v if m.row_summary == "proj" else k)
        y = m.summary_norm(m.summary_proj(start.transpose(0, 1).flatten(1)) + x)
        keys = m.summary_key(y).unflatten(-1, (heads, -1)).transpose(0, 1)
        if tables is not None:
            keys = apply_rotary(keys[None], tables, m.rope_layout)[0]
    rows = []
    for i in range(length):
        row, column = divmod(i, window)
        direct = [j for j in range(length) if j // window == row and (j <= i or not m.is_causal) and real[j]]
        others = [j for j in range(column, length, window) if real[j] and (j < i if m.is_causal else j != i or not m.exclusive)]
        logits = [(q[:, i] * k[:, j]).sum(-1) for j in direct] + [(q[:, i] * keys[:, j]).sum(-1) for j in others]
        spread = [one_hot(j, heads, length, q) for j in direct] + [whole[:, j] for j in others]
        rows.append(mixed(logits, spread, heads, length, q))
    return torch.stack(rows, 1)
