"""`attention`: softmax attention as a function of tensors, on whichever engine serves the call."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._problem import make_problem
from attention_zoo.ops._reference import reference_attention

__all__ = ["attention", "merge_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Placeholder signature; see the final docstring."""
    problem = make_problem(
        q,
        k,
        v,
        attn_mask=attn_mask,
        bias=bias,
        is_causal=is_causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen=max_seqlen,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )
    out, lse = reference_attention(q, k, v, problem)
    return (out, lse) if return_lse else out


def merge_attention(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union."""
    lse = torch.logsumexp(torch.stack(lses), dim=0)
    weights = [torch.exp(part - torch.where(lse > -torch.inf, lse, 0.0)) for part in lses]
    merged = sum(w.unsqueeze(-1) * o.float() for w, o in zip(weights, outputs, strict=True))
    return merged.to(outputs[0].dtype), lse  # type: ignore[union-attr]
