"""Checkpoints of Llama-style decoders: Hugging Face's own Llama, and Mixture-of-Head Llama (SkyworkAI/MoH).

Every decoder has Hugging Face's names outside its attention. Checkpoints of Llama itself load into `llama` with `gqa` or `mha`,
whose projections are called otherwise; MoH-LLaMA3 adds no parameter, so its names stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys
from attention_zoo.registry import register_converter

__all__ = ["convert_decoder", "convert_llama", "convert_moh_llama"]

State = dict[str, Tensor]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_decoder(
    state_dict: State,
    layer_keys: list[str],
    *,
    num_hidden_layers: int = 32,
    mlp_bias: bool = False,
    tie_word_embeddings: bool = False,
    act_keys: tuple[str, ...] = (),
    convert_layer: Callable[[State], State] | None = None,
) -> State:
    """A whole decoder with Hugging Face's names.

    Args:
        layer_keys: official names of one layer's attention, below `self_attn.`.
        num_hidden_layers, mlp_bias, tie_word_embeddings: as in LlamaConfig.
        act_keys: names of the MLP's activation, below `mlp.act_fn.`.
        convert_layer: maps the state of one attention, names below `self_attn.`; None: they stay.

    Returns: a state dict that has the output layer in any case: where it is tied to the embedding, checkpoints leave it out.

    Raises:
        CheckpointError: unknown or missing keys, all of them listed.
    """
    of_layer = [f"self_attn.{key}" for key in layer_keys]
    of_layer += parameter_keys("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", bias=mlp_bias)
    of_layer += [f"mlp.act_fn.{key}" for key in act_keys]
    of_layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [f"model.layers.{i}." for i in range(num_hidden_layers)]
    expected = [EMBEDDING, "model.norm.weight", *(layer + key for layer in layers for key in of_layer)]
    # Older checkpoints of transformers hold the rotary frequencies, which follow from the configuration.
    frequencies = [f"{layer}self_attn.rotary_emb.inv_freq" for layer in layers]
    optional = list(frequencies)
    (optional if tie_word_embeddings else expected).append(HEAD)
    state = rename_keys(state_dict, (), expected=expected, optional=optional)
    state = {key: tensor for key, tensor in state.items() if key not in set(frequencies)}
    if convert_layer is not None:
        for prefix in (f"{layer}self_attn." for layer in layers):
            own = {key: state.pop(prefix + key) for key in layer_keys}
            state.update({prefix + key: tensor for key, tensor in convert_layer(own).items()})
    return {**state, HEAD: state.get(HEAD, state[EMBEDDING])}


def projection_keys(attention_bias: bool, options: Mapping[str, Any]) -> list[str]:
    """q_proj, k_proj, v_proj, o_proj of one layer; the mechanism's own `qkv_bias` and `proj_bias` win over the configuration's."""
    inputs = parameter_keys("q_proj", "k_proj", "v_proj", bias=options.get("qkv_bias", attention_bias))
    return inputs + parameter_keys("o_proj", bias=options.get("proj_bias", attention_bias))


@register_converter("llama")
def convert_llama(
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
    """Hugging Face's Llama -> `llama` with plain attention, "gqa" (the default) or "mha", in every layer.

    Raises:
        CheckpointError: another mechanism, unknown or missing keys.
    """
    attention = "gqa" if attention is None else attention
    layers = {"gqa": _rename_projections, "mha": _fuse_projections}
    if attention not in layers:
        raise CheckpointError(f"checkpoints of Llama have plain attention: give attention 'gqa' or 'mha', not {attention!r}")
    keys = projection_keys(attention_bias, attention_kwargs if isinstance(attention_kwargs, Mapping) else {})
    return convert_decoder(
        state_dict,
        keys,
        num_hidden_layers=num_hidden_layers,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tie_word_embeddings,
        convert_layer=layers[attention],
    )


@register_converter("moh_llama")
def convert_moh_llama(
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
    """MoH-LLaMA3, whose query-norm router has no parameters: the names are Llama's and ours.

    Raises:
        CheckpointError: another mechanism or router, unknown or missing keys.
    """
    options = attention_kwargs if isinstance(attention_kwargs, Mapping) else {}
    if attention not in (None, "moh") or options.get("router", "query_norm") != "query_norm":
        raise CheckpointError("official Mixture-of-Head decoders have 'moh' with router='query_norm' in every layer")
    keys = projection_keys(attention_bias, options)
    return convert_decoder(
        state_dict, keys, num_hidden_layers=num_hidden_layers, mlp_bias=mlp_bias, tie_word_embeddings=tie_word_embeddings
    )


_PLAIN_NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}


def _rename_projections(state: State) -> State:
    """As `gqa` calls them."""
    return {f"{_PLAIN_NAMES[module]}.{kind}": t for (module, _, kind), t in ((k.rpartition("."), t) for k, t in state.items())}


def _fuse_projections(state: State) -> State:
    """As `mha` has them: rows [q; k; v]."""
    parts = _rename_projections(state)
    fused = {kind: [parts.pop(f"{name}.{kind}") for name in "qkv" if f"{name}.{kind}" in parts] for kind in ("weight", "bias")}
    return {**{f"qkv.{kind}": torch.cat(tensors) for kind, tensors in fused.items() if tensors}, **parts}
