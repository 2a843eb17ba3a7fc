"""One call of `attention` as data: what is asked, checked once, in the form that every engine reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Problem", "make_problem"]

Window = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything about a call but q, k and v themselves.

    `window` is (left, right): how many keys to the left and right of its own position a query may see, None: no bound. It
    includes causality (right = 0), so an engine that reads `window` need not look at `is_causal`.
    """

    num_queries: int
    num_keys: int
    scale: float
    is_causal: bool
    window: Window
    attn_mask: Tensor | None
    bias: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softcap: float | None
    dropout_p: float
    return_lse: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    window_size: int | tuple[int | None, int | None] | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Problem:
    """Check a call and bring it to one form. Raises ValueError that says what was given and what would be right."""
    _check_tensors(q, k, v)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if attn_mask is not None:
        attn_mask = _check_map("attn_mask", attn_mask, q, k)
    if bias is not None:
        bias = _check_map("bias", bias, q, k)
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating point, got {bias.dtype}; a boolean mask goes in attn_mask")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if cu_seqlens is None:
        if cu_seqlens_k is not None or max_seqlen is not None or max_seqlen_k is not None:
            raise ValueError("cu_seqlens_k, max_seqlen and max_seqlen_k belong to a packed batch: give cu_seqlens as well")
    else:
        if q.shape[0] != 1:
            raise ValueError(f"a packed batch is laid out as (1, H, total tokens, D); got a batch of {q.shape[0]}")
        if cu_seqlens_k is None:
            if num_keys != num_queries:
                raise ValueError(f"{num_queries} packed queries and {num_keys} packed keys: give cu_seqlens_k as well")
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen_k if max_seqlen_k is not None else max_seqlen
        for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} must be int32 (S + 1,), the offsets of S sequences; got {offsets.dtype} {tuple(offsets.shape)}"
                )
        if len(cu_seqlens) != len(cu_seqlens_k):
            raise ValueError(f"cu_seqlens describes {len(cu_seqlens) - 1} sequences, cu_seqlens_k {len(cu_seqlens_k) - 1}")
    return Problem(
        num_queries=num_queries,
        num_keys=num_keys,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        is_causal=is_causal,
        window=_window(window_size, is_causal),
        attn_mask=attn_mask,
        bias=bias,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen_k,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v are laid out as (B, H, N, D); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q (B, H, N_q, D), k (B, H_kv, N_k, D) and v (B, H_kv, N_k, D_v) must agree in B, H_kv, N_k and D; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared out evenly over {k.shape[1]} key/value heads")


def _check_map(name: str, value: Tensor, q: Tensor, k: Tensor) -> Tensor:
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if value.ndim < 2 or value.ndim > 4 or any(n not in (1, m) for n, m in zip(value.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to (B, H, N_q, N_k) = {full}; got {tuple(value.shape)}")
    if value.dtype != torch.bool and not value.is_floating_point():
        raise ValueError(f"{name} must be boolean (True = attend) or floating point (added to the logits), got {value.dtype}")
    return value[(None,) * (4 - value.ndim)]


def _window(window_size: int | tuple[int | None, int | None] | None, is_causal: bool) -> Window:
    left: int | None
    right: int | None
    if window_size is None:
        left = right = None
    elif isinstance(window_size, int):
        left = right = window_size
    else:
        left, right = window_size
    left = None if left is None or left < 0 else left  # -1: no bound, as in flash-attn
    right = None if right is None or right < 0 else right
    return left, 0 if is_causal else right
