"""Core-context-aware attention (chenyaofo/CCA-Attention): no weights of its own, so every key is the host model's and stays.

No checkpoint was published; those of any Hugging Face Llama or Qwen2 decoder are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, rename_keys
from attention_zoo.checkpoints.llama import convert_decoder, projection_keys
from attention_zoo.registry import register_converter

__all__ = ["convert_cca", "convert_llama_cca"]

State = dict[str, Tensor]


@register_converter("cca")
def convert_cca(state_dict: State, *, qkv_bias: bool = False, proj_bias: bool = False, **options: Any) -> State:
    """One attention layer; `options` are those that change no key. Raises CheckpointError."""
    keys = projection_keys(False, {"qkv_bias": qkv_bias, "proj_bias": proj_bias})
    return rename_keys(state_dict, (), expected=keys)


@register_converter("llama_cca")
def convert_llama_cca(
    state_dict: State,
    *,
    attention: Any = None,
    attention_kwargs: Any = None,
    attention_bias: bool = False,
    num_hidden_layers: int = 32,
    mlp_bias: bool = False,
    tie_word_embeddings: bool = False,
    **config: Any,
) -> State:
    """A whole decoder; arguments as for `create_model`.

    Raises:
        CheckpointError: another mechanism, biases in some layers only, unknown or missing keys.
    """
    if ({attention} if attention is None or isinstance(attention, str) else set(attention)) - {None, "cca"}:
        raise CheckpointError(f"checkpoints for this model have attention 'cca' in every layer, not {attention!r}")
    each = [attention_kwargs] if attention_kwargs is None or isinstance(attention_kwargs, Mapping) else attention_kwargs
    keys = [projection_keys(attention_bias, options or {}) for options in each]
    if any(layer != keys[0] for layer in keys):
        raise CheckpointError("checkpoints have the same biases in every layer: give all layers the same qkv_bias and proj_bias")
    return convert_decoder(
        state_dict, keys[0], num_hidden_layers=num_hidden_layers, mlp_bias=mlp_bias, tie_word_embeddings=tie_word_embeddings
    )
