"""Attention to summaries of binary spans as a function of tensors: N log N pairs of query and key, and every token has its share.

In plain PyTorch, written to be read; softmaxes in float32 (float64 stays float64). It is the specification of the kernels of
`triton/spans.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.attention import merge_attention

__all__ = ["span_attention"]

_MOST_TOKENS = 2**20  # of the kernels, whose tiles of spans have 16 levels above those of a chunk of 16 tokens


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pool_q: Tensor | None = None,
    pool_k: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Probabilities of a call of `span_attention`, (B, H, N, 1 + levels): the token itself, then the spans from small to large.

    Not causal: then those of the other direction, (B, H, N, 1 + 2 levels).
    """
    _check(q, k, v, pool_q, pool_k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q):
        return _logits_and_values(q, k, v, pool_q, pool_k, is_causal, factor)[0].softmax(-1)


@tapped(_weights)
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pool_q: Tensor | None = None,
    pool_k: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each token to itself and to summaries of the spans that the tokens before it are cut into.

    The spans of query i are the binary decomposition of [0, i): for every bit b that is set in i, with e = (i >> b) << b, the span
    [e - 2^b, e). Not causal: besides, the same from the other end. A span r has

        k_r = max_{j in r} pool_k_j          v_r = sum_{j in r} softmax_j(scale q_r k_j) v_j          q_r = max_{j in r} pool_q_j

    Args:
        q, k: (B, H, N, D).
        v: (B, H, N, D_v).
        pool_q, pool_k: what is pooled in place of q and k, (B, H, N, D); None: these themselves.
        is_causal: only the spans before each token.
        scale: factor of the logits, those inside a span included; None: 1 / sqrt(D).
        return_lse: return the natural logarithm of each query's softmax denominator too.
        backend: "triton" for our kernels; "auto" takes them on CUDA, where they serve the call; any other for the plain code.

    Returns: (B, H, N, D_v) in the dtype of q; with `return_lse` also (B, H, N), float32 or float64.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: backend="triton" cannot serve the call.
    """
    _check(q, k, v, pool_q, pool_k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    pooled = (q if pool_q is None else pool_q, k if pool_k is None else pool_k)
    missing = f"the kernels serve {_MOST_TOKENS} tokens at most" if q.shape[2] > _MOST_TOKENS else None
    if use_kernel(backend, (q, k, v, *pooled), missing=missing):
        from attention_zoo.ops.triton.spans import span_attention_triton

        out, lse = span_attention_triton(q, k, v, pool_q, pool_k, own=True, scale=factor)
        if not is_causal:
            flipped = (None if t is None else t.flip(2) for t in (q, k, v, pool_q, pool_k))
            after = span_attention_triton(*flipped, own=False, scale=factor)  # type: ignore[arg-type]
            out, lse = merge_attention((out, after[0].flip(2)), (lse, after[1].flip(2)))
        return (out, lse) if return_lse else out
    with no_autocast(q):
        logits, values = _logits_and_values(q, k, v, pool_q, pool_k, is_causal, factor)
        weights = logits.softmax(-1)
        out = sum((w.unsqueeze(-1) * value for w, value in zip(weights.unbind(-1), values, strict=True)), torch.zeros_like(v))
        return (out.to(q.dtype), logits.logsumexp(-1)) if return_lse else out.to(q.dtype)


def _logits_and_values(
    q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, H, N, 1 + levels), -inf where a query sees no span of a level, and for each the values (B, H, N, D_v)."""
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    pool_q, pool_k = (own if pool is None else pool.to(own.dtype) for pool, own in ((pool_q, q), (pool_k, k)))
    logits, values = [scale * (q * k).sum(-1)], [v]
    for mirrored in (False, True)[: 1 if is_causal else 2]:
        tokens = [t.flip(2) if mirrored else t for t in (q, k, v, pool_q, pool_k)]
        for level in range(max(q.shape[2] - 1, 0).bit_length()):
            found = _one_level(level, scale, *tokens)
            for kept, new in zip((logits, values), found, strict=True):
                kept.append(new.flip(2) if mirrored else new)
    return torch.stack(logits, -1), values


def _one_level(level: int, scale: float, q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor, pool_k: Tensor) -> tuple[Tensor, Tensor]:
    """Of each query, the logit of the span of 2^level tokens that it sees, (B, H, N), and its value."""
    size, length = 1 << level, q.shape[2]
    whole = length >> level
    k, v, pool_q, pool_k = (t[:, :, : whole * size].unflatten(2, (whole, size)) for t in (k, v, pool_q, pool_k))
    inside = torch.einsum("bhrd,bhrjd->bhrj", scale * pool_q.amax(3), k).softmax(-1)
    value = torch.einsum("bhrj,bhrjd->bhrd", inside, v)
    number = torch.arange(length, device=q.device) >> level
    span = (number - 1).clamp_min(0)
    logits = scale * (q * pool_k.amax(3)[:, :, span]).sum(-1)
    return logits.masked_fill(number % 2 == 0, -torch.inf), value[:, :, span]


def _check(q: Tensor, k: Tensor, v: Tensor, pool_q: Tensor | None, pool_k: Tensor | None) -> None:
    """Raise ValueError unless the tensors fit together."""
    like_q = [t for t in (k, pool_q, pool_k) if t is not None]
    if q.ndim != 4 or v.ndim != 4 or any(t.shape != q.shape for t in like_q) or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, v, *like_q))
        raise ValueError(f"q, k and what is pooled are (B, H, N, D) alike, v is (B, H, N, D_v); got q, v, others: {shapes}")
