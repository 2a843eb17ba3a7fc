"""Checkpoints of Llama-style decoders: Hugging Face's own Llama, and Mixture-of-Head Llama (SkyworkAI/MoH).

Every decoder has Hugging Face's names outside its attention. Checkpoints of Llama itself load into `llama` with `gqa` or `mha`,
whose projections are called otherwise; MoH-LLaMA3 adds no parameter, so its names stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, parameter_keys, rename_keys
from attention_zoo.registry import register_converter

__all__ = ["check_mechanism", "convert_decoder", "convert_llama", "convert_moh_llama", "layer_options", "projection_keys"]

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
    **config: Any,
) -> State:
    """A whole decoder with Hugging Face's names.

    Args:
        layer_keys: official names of one layer's attention, below `self_attn.`.
        num_hidden_layers, mlp_bias, tie_word_embeddings: as in LlamaConfig.
        act_keys: names of the MLP's activation, below `mlp.act_fn.`.
        convert_layer: maps the state of one attention, names below `self_attn.`; None: they stay.
        config: the other arguments of `create_model`, which change no name here.

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


def check_mechanism(attention: Any, *official: str) -> str:
    """The mechanism of every layer, from `attention` as `create_model` takes it; None: the first of the official ones.

    Raises:
        CheckpointError: another than the official ones, or different ones in different layers.
    """
    names = {official[0]} if attention is None else {attention} if isinstance(attention, str) else set(attention)
    if len(names) > 1 or not names <= set(official):
        raise CheckpointError(
            f"official checkpoints of this model have {' or '.join(map(repr, official))} in every layer, "
            f"not {', '.join(map(repr, sorted(names)))}"
        )
    return names.pop()


def layer_options(attention_kwargs: Any, attention_bias: bool, which: Collection[str] = ()) -> dict[str, Any]:
    """The mechanism's biases and its options named in `which`, from the arguments of `create_model`; its own biases win.

    Raises:
        CheckpointError: they are not the same in every layer.
    """
    each = [attention_kwargs] if attention_kwargs is None or isinstance(attention_kwargs, Mapping) else attention_kwargs
    biases = {"qkv_bias": attention_bias, "proj_bias": attention_bias}
    layers = [biases | {k: v for k, v in (own or {}).items() if k in biases or k in which} for own in each]
    if any(own != layers[0] for own in layers):
        raise CheckpointError(
            "official checkpoints have the same tensors in every layer: give all layers the same "
            + ", ".join(sorted({name for own in layers for name in own}))
        )
    return layers[0]


def projection_keys(qkv_bias: bool, proj_bias: bool) -> list[str]:
    """q_proj, k_proj, v_proj, o_proj of one layer."""
    return parameter_keys("q_proj", "k_proj", "v_proj", bias=qkv_bias) + parameter_keys("o_proj", bias=proj_bias)


@register_converter("llama")
def convert_llama(
    state_dict: State, *, attention: Any = None, attention_kwargs: Any = None, attention_bias: bool = False, **config: Any
) -> State:
    """Hugging Face's Llama -> `llama` with plain attention, "gqa" (the default) or "mha", in every layer.

    Raises:
        CheckpointError: another mechanism, unknown or missing keys.
    """
    layers = {"gqa": _rename_projections, "mha": _fuse_projections}
    convert_layer = layers[check_mechanism(attention, *layers)]
    return convert_decoder(
        state_dict, projection_keys(**layer_options(attention_kwargs, attention_bias)), convert_layer=convert_layer, **config
    )


@register_converter("moh_llama")
def convert_moh_llama(
    state_dict: State, *, attention: Any = None, attention_kwargs: Any = None, attention_bias: bool = False, **config: Any
) -> State:
    """MoH-LLaMA3, whose query-norm router has no parameters: the names are Llama's and ours.

    Raises:
        CheckpointError: another mechanism or router, unknown or missing keys.
    """
    check_mechanism(attention, "moh")
    options = layer_options(attention_kwargs, attention_bias, {"router"})
    if options.pop("router", "query_norm") != "query_norm":
        raise CheckpointError("official Mixture-of-Head decoders have router='query_norm' in every layer")
    return convert_decoder(state_dict, projection_keys(**options), **config)


_PLAIN_NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}


def _rename_projections(state: State) -> State:
    """As `gqa` calls them."""
    return {f"{_PLAIN_NAMES[module]}.{kind}": t for (module, _, kind), t in ((k.rpartition("."), t) for k, t in state.items())}


def _fuse_projections(state: State) -> State:
    """As `mha` has them: rows [q; k; v]."""
    parts = _rename_projections(state)
    fused = {kind: [parts.pop(f"{name}.{kind}") for name in "qkv" if f"{name}.{kind}" in parts] for kind in ("weight", "bias")}
    return {**{f"qkv.{kind}": torch.cat(tensors) for kind, tensors in fused.items() if tensors}, **parts}
