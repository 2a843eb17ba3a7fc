"""When attention of few queries to many keys, as in decoding, goes to the kernels of `triton/decode.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._tap import is_observed
from attention_zoo.ops.engines.base import FEW_QUERIES

__all__ = ["is_decode", "mask_of_keys"]


def is_decode(q: Tensor, k: Tensor, attn_mask: Tensor | None, dropout_p: float, *others: Tensor | None) -> bool:
    """Whether the kernels have what a call asks for, but for `use_kernel`: few queries, no dropout, no mask but one of the keys.

    They have no gradients, for none of q, k and the `others`, and show nobody their probabilities.
    """
    few = 0 < q.shape[2] <= FEW_QUERIES and k.shape[2] > 0 and dropout_p == 0.0
    if not few or is_observed() or not (attn_mask is None or _is_of_keys(attn_mask, k)):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, *others)))


def _is_of_keys(attn_mask: Tensor, k: Tensor) -> bool:
    batch, _, keys, _ = k.shape
    if attn_mask.dtype != torch.bool or attn_mask.ndim != 4:
        return False
    return attn_mask.shape[0] in (1, batch) and attn_mask.shape[1:] == (1, 1, keys)


def mask_of_keys(attn_mask: Tensor | None) -> Tensor | None:
    """The mask of a call that `is_decode`, as the kernels take it: (B, N_k) or (1, N_k)."""
    return None if attn_mask is None else attn_mask[:, 0, 0]
