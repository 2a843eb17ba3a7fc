"""One call of `attention` as data: what is asked, checked once, in the form that every engine reads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Problem", "make_problem"]

Window = tuple[int | None, int | None]


class Problem(NamedTuple):
    """Everything about a call but q, k and v themselves. A named tuple, because one is made for every call.

    `window` is (left, right): how many keys to the left and right of its own position a query may see, None: no bound. It
    includes causality (right = 0), so an engine that reads `window` need not look at `is_causal`. A single query stands at the
    last key, so its right bound is always None.
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
) -> Problem:
    """Check a call and bring it to one form. Raises ValueError that says what was given and what would be right."""
    num_queries, num_keys, head_dim = _check_tensors(q, k, v)
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
    left, right = _bounds(window_size) if window_size is not None else (None, None)
    if is_causal:
        right = 0
    if cu_seqlens is None:
        if cu_seqlens_k is not None or max_seqlen is not None or max_seqlen_k is not None:
            raise ValueError("cu_seqlens_k, max_seqlen and max_seqlen_k belong to a packed batch: give cu_seqlens as well")
        if num_queries == 1:
            right = None
    else:
        if cu_seqlens_k is None:
            if num_keys != num_queries:
                raise ValueError(f"{num_queries} packed queries and {num_keys} packed keys: give cu_seqlens_k as well")
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen_k if max_seqlen_k is not None else max_seqlen
        _check_offsets(q, cu_seqlens, cu_seqlens_k)
    return Problem(
        num_queries,
        num_keys,
        1.0 / math.sqrt(head_dim or 1) if scale is None else scale,
        is_causal,
        (left, right),
        attn_mask,
        bias,
        cu_seqlens,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen_k,
        softcap,
        dropout_p,
        return_lse,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """(N_q, N_k, D) of tensors that fit together."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        raise ValueError(f"q, k and v are laid out as (B, H, N, D); got {tuple(q_shape)}, {tuple(k_shape)}, {tuple(v_shape)}")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    batch, heads, num_queries, head_dim = q_shape
    key_batch, key_heads, num_keys, key_dim = k_shape
    if batch != key_batch or k_shape[:3] != v_shape[:3] or head_dim != key_dim:
        raise ValueError(
            "q (B, H, N_q, D), k (B, H_kv, N_k, D) and v (B, H_kv, N_k, D_v) must agree in B, H_kv, N_k and D; "
            f"got {tuple(q_shape)}, {tuple(k_shape)}, {tuple(v_shape)}"
        )
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"{heads} query heads cannot be shared out evenly over {key_heads} key/value heads")
    return num_queries, num_keys, head_dim


def _check_offsets(q: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"a packed batch is laid out as (1, H, total tokens, D); got a batch of {q.shape[0]}")
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.ndim != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 (S + 1,), the offsets of S sequences; got {offsets.dtype} {tuple(offsets.shape)}"
            )
        if offsets.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {offsets.device}")
    if cu_seqlens.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(f"cu_seqlens describes {len(cu_seqlens) - 1} sequences, cu_seqlens_k {len(cu_seqlens_k) - 1}")


def _check_map(name: str, value: Tensor, q: Tensor, k: Tensor) -> Tensor:
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if value.ndim < 2 or value.ndim > 4 or any(n not in (1, m) for n, m in zip(value.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to (B, H, N_q, N_k) = {full}; got {tuple(value.shape)}")
    if value.dtype != torch.bool and not value.is_floating_point():
        raise ValueError(f"{name} must be boolean (True = attend) or floating point (added to the logits), got {value.dtype}")
    if value.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}; got {value.device}")
    return value if value.ndim == 4 else value[(None,) * (4 - value.ndim)]


def _bounds(window_size: int | tuple[int | None, int | None]) -> Window:
    if isinstance(window_size, int):
        left = right = None if window_size < 0 else window_size  # -1: no bound, as in flash-attn
        return left, right
    if len(window_size) != 2:
        raise ValueError(f"window_size must be an int or (left, right), got {window_size}")
    left, right = window_size
    return None if left is None or left < 0 else left, None if right is None or right < 0 else right
