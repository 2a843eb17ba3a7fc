"""Core-context-aware attention (chenyaofo/CCA-Attention): no weights of its own, so every key is the host model's and stays.

No checkpoint was published; those of any Hugging Face Llama or Qwen2 decoder are the official ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import rename_keys
from attention_zoo.checkpoints.llama import check_mechanism, convert_decoder, layer_options, projection_keys
from attention_zoo.registry import register_converter

__all__ = ["convert_cca", "convert_llama_cca"]

State = dict[str, Tensor]


@register_converter("cca")
def convert_cca(state_dict: State, *, qkv_bias: bool = False, proj_bias: bool = False, **options: Any) -> State:
    """One attention layer; `options` are those that change no key. Raises CheckpointError."""
    return rename_keys(state_dict, (), expected=projection_keys(qkv_bias, proj_bias))


@register_converter("llama_cca")
def convert_llama_cca(
    state_dict: State, *, attention: Any = None, attention_kwargs: Any = None, attention_bias: bool = False, **config: Any
) -> State:
    """A whole decoder; arguments as for `create_model`.

    Raises:
        CheckpointError: another mechanism, biases in some layers only, unknown or missing keys.
    """
    check_mechanism(attention, "cca")
    return convert_decoder(state_dict, projection_keys(**layer_options(attention_kwargs, attention_bias)), **config)
