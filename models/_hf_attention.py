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
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from attention_zoo import ops
from attention_zoo.attention.base import resolve_attention_mask

from ._host import ZOO_ATTENTION

__all__ = ["is_causal_call", "refuse_inputs", "register_zoo_attention", "softmax_attention", "zoo_mask"]

# What models may hand to their attention that changes it, and that ours does not have.
_UNKNOWN = ("s_aux", "position_bias")


def register_zoo_attention() -> None:
    """Make "zoo" known to transformers as an attention implementation."""
    AttentionInterface.register(ZOO_ATTENTION, _attention)
    AttentionMaskInterface.register(ZOO_ATTENTION, zoo_mask)


def zoo_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Padding or None where only padding is masked, besides causality; else boolean (B, 1, N_q, N_k), true = attend.

    Padding is (B, N_k) where attention is causal and (B, 1, 1, N_k) where it is not. A static cache has more keys than have been
    seen, and only its offset tells where the queries stand: it gets the 4-D mask.
    """
    both_ways = mask_function is bidirectional_mask_function
    plain = not use_vmap and local_size is None and not isinstance(kv_offset, Tensor) and kv_offset == 0
    plain = plain and (allow_is_bidirectional_skip if both_ways else allow_is_causal_skip and allow_is_bidirectional_skip)
    static = isinstance(q_offset, Tensor) or (attention_mask is not None and attention_mask.shape[-1] != kv_length)
    if static or not plain or not (both_ways or q_offset + q_length == kv_length):
        own = {} if mask_function is None else {"mask_function": mask_function}
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            local_size=local_size,
            **{**own, **kwargs},
        )
        assert mask is not None  # both shortcuts were ruled out
        return mask
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask[:, None, None] if both_ways else attention_mask


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`ops.attention` as Hugging Face calls it: q (B, H, N, D), k, v (B, H_kv, M, D) -> (B, N, H, D), and no weights."""
    refuse_inputs(ZOO_ATTENTION, attention_mask, kwargs)
    out = softmax_attention(module, query, key, value, attention_mask, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def refuse_inputs(name: str, attention_mask: Tensor | None, inputs: dict[str, Any]) -> None:
    """Raise ValueError for what a model asks of its attention besides the common: sinks (`s_aux`), position biases, its maps.

    Packed documents are known by their positions (without a mask and a cache): by offsets alone, `cu_seq_lens_q`, they are not.
    """
    if lost := [key for key in _UNKNOWN if inputs.get(key) is not None]:
        raise ValueError(f"{name!r} attention has no {', '.join(lost)}: choose another attn_implementation for this model")
    if inputs.get("output_attentions"):
        raise ValueError(f"{name!r} attention forms no maps (output_attentions): take attn_implementation='eager' for them")
    offsets = inputs.get("cu_seq_lens_q")
    if offsets is not None and len(offsets) > 2 and (attention_mask is None or attention_mask.ndim != 4):
        raise ValueError(
            f"{name!r} attention knows packed documents by their position_ids, without attention_mask and cache (use_cache=False), "
            "not by cu_seq_lens_q"
        )


def is_causal_call(module: Any, is_causal: bool | None) -> bool:
    """Whether a module attends causally: what its caller says, else what it says itself, unless its model attends both ways."""
    if is_causal is not None:
        return is_causal
    return bool(getattr(module, "is_causal", True)) and getattr(getattr(module, "config", None), "is_causal", True) is not False


def softmax_attention(
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
    **_: Any,
) -> Tensor:
    """The attention that a Hugging Face model asks for, by `ops.attention`: q (B, H, N, D), k, v (B, G, M, D) -> (B, H, N, D)."""
    whole = attention_mask is not None and attention_mask.ndim == 4  # then it holds causality and windows already
    out = ops.attention(
        query,
        key,
        value,
        attn_mask=resolve_attention_mask(attention_mask, query.shape[2], key.shape[2]),
        is_causal=is_causal_call(module, is_causal) and not whole,
        window_size=None if sliding_window is None or whole else sliding_window - 1,  # Hugging Face counts the token itself
        scale=scaling,
        softcap=softcap or None,
        dropout_p=dropout,
    )
    assert isinstance(out, Tensor)
    return out
