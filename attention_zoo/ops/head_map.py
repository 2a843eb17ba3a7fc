"""Attention whose query heads read the key/value heads that a map names, as data: nothing waits for the device to read it.

In plain PyTorch the named heads are copied and `attention` does the rest. On CUDA kernels of ours read them where they stand, or
copy them and add up the gradients of the copies in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._decode import is_decode, mask_of_keys
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import is_observed
from attention_zoo.ops.attention import attention

__all__ = ["attention_by_head_map", "select_heads"]

_MOST_KEYS = 4096  # beyond, copies cost less than the libraries' kernels win
_MOST_KEYS_OF_WIDE = 512  # of heads of more than 64 channels


def select_heads(x: Tensor, head_map: Tensor) -> Tensor:
    """Heads of (B, H_kv, N, D) in the order of `head_map`, (H,) or one row for each sample (B, H) -> (B, H, N, D)."""
    if head_map.ndim == 1:
        return x.index_select(1, head_map)
    return x.take_along_dim(head_map[:, :, None, None], dim=1)


def attention_by_head_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` in which query head h of sample b reads the key/value head head_map[h], or head_map[b, h].

    Shape: q (B, H, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v), head_map int64 (H,) or (B, H) -> (B, H, N_q, D_v). The
    other arguments are those of `attention`. A key/value head that no query head reads has a gradient of 0.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the backend that `use_backend` forces cannot serve the call.
    """
    shapes = (q.shape[1],), tuple(q.shape[:2])
    if tuple(head_map.shape) not in shapes or head_map.dtype != torch.int64:
        raise ValueError(f"head_map must be int64 {shapes[0]} or {shapes[1]}, got {head_map.dtype} {tuple(head_map.shape)}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernel("auto", (q, k, v)):
        if is_decode(q, k, attn_mask, dropout_p, v):
            from attention_zoo.ops.triton.decode import decode_attention

            mask = mask_of_keys(attn_mask)
            return decode_attention(q, k, v, is_causal=is_causal, scale=factor, head_map=head_map, key_mask=mask)
        from attention_zoo.ops.triton.head_map import attend_by_map, copy_heads

        recorded = is_observed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))
        plain = attn_mask is None and not is_causal and dropout_p == 0.0 and factor > 0
        most = _MOST_KEYS if max(q.shape[3], v.shape[3]) <= 64 else _MOST_KEYS_OF_WIDE
        if plain and not recorded and q.numel() and 0 < k.shape[2] <= most:
            return attend_by_map(q, k, v, head_map, factor)
        k, v = copy_heads(k, v, head_map)
    else:
        k, v = select_heads(k, head_map), select_heads(v, head_map)
    out = attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out
