"""The zoo in Hugging Face's attention interface: the implementation named "zoo", and the masks that go with it.

`model.set_attn_implementation("zoo")` lets `ops.attention` compute the softmax attention of any Hugging Face model that uses the
interface. The zoo's own decoders have it by default, for the sake of its masks: while nothing but padding is masked, a mechanism
gets the (B, N) padding mask, or none, and not an N x N tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from attention_zoo import ops
from attention_zoo.attention.base import resolve_attention_mask

from ._host import ZOO_ATTENTION

__all__ = ["register_zoo_attention"]


def register_zoo_attention() -> None:
    """Make "zoo" known to transformers as an attention implementation."""
    AttentionInterface.register(ZOO_ATTENTION, _attention)
    AttentionMaskInterface.register(ZOO_ATTENTION, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Padding (B, N_k) or None where the mask is causal and padded at most; else boolean (B, 1, N_q, N_k), true = attend.

    A static cache has more keys than have been seen, and only its offset tells where the queries stand: it gets the 4-D mask.
    """
    static = isinstance(q_offset, Tensor) or (attention_mask is not None and attention_mask.shape[-1] != kv_length)
    plain = allow_is_causal_skip and kwargs.get("allow_is_bidirectional_skip", True) and kv_offset == 0
    if static or not plain or kwargs.get("local_size") is not None:
        own = {} if mask_function is None else {"mask_function": mask_function}
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            **{**own, **kwargs, "allow_is_bidirectional_skip": False},
        )
        assert mask is not None  # both shortcuts were ruled out
        return mask
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`ops.attention` as Hugging Face calls it: q (B, H, N, D), k, v (B, H_kv, M, D) -> (B, N, H, D), and no weights.

    Raises:
        ValueError: attention sinks (`s_aux`) or a position bias, which `ops.attention` does not have.
    """
    lost = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if lost:
        raise ValueError(f"the zoo's attention has no {', '.join(lost)}: choose another attn_implementation for this model")
    whole = attention_mask is not None and attention_mask.ndim == 4  # then it holds causality and windows already
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = ops.attention(
        query,
        key,
        value,
        attn_mask=resolve_attention_mask(attention_mask, query.shape[2], key.shape[2]),
        is_causal=causal and not whole,
        window_size=None if sliding_window is None or whole else sliding_window - 1,  # Hugging Face counts the token itself
        scale=scaling,
        softcap=softcap or None,
        dropout_p=dropout,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None
