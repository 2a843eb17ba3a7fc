"""Configuration of the Llama-style decoders, apart from their classes: transformers knows of it before it needs those."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from attention_zoo.registry import attention_class, attention_info

from ._host import ZOO_ATTENTION, build_causal_attention, check_plain

__all__ = ["ZooLlamaConfig"]


@strict
class ZooLlamaConfig(LlamaConfig):
    """Configuration of a Llama-style decoder: Hugging Face's `LlamaConfig` and the mechanism of its layers.

    Attributes:
        attention: a registered mechanism that can be causal, or one for each layer.
        attention_kwargs: its options: one dict for all layers, or one (or None) for each. They win over what the configuration
            says in other words (`num_key_value_heads`, `head_dim`, `attention_bias`, `attention_dropout`).
        aux_loss_coef: weight of the mechanisms' auxiliary losses (`az.auxiliary_loss`) in the training loss.
        hidden_act: an activation of transformers, or "poly_norm" (Motif's).
        num_key_value_heads: None: as many as query heads where the mechanism can have them, else its own default.
        head_dim: None: the mechanism's default.
        mechanism_depth: what layers that depend on their depth count from.

    Raises:
        ValueError: an unknown mechanism, one that cannot be causal, another number of entries than of layers, or options that do
            not go together.
    """

    model_type = "zoo_llama"
    # Heads are grouped, routed and paired in many ways: only the MLPs are split over devices without knowing the mechanism.
    base_model_tp_plan = {k: v for k, v in LlamaConfig.base_model_tp_plan.items() if ".mlp." in k}  # noqa: RUF012

    attention: str | list[str] = "gqa"
    attention_kwargs: dict | list | None = None
    aux_loss_coef: float | int = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        from . import llama  # noqa: F401 - a configuration is about to be used: the Auto classes must know its models

        kwargs.setdefault("attn_implementation", ZOO_ATTENTION)
        _check_layers(self)
        _resolve_heads(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Llama's check, that heads divide the width, does not hold here: heads may be of any width; mechanisms check their own."""

    def layer_attention(self, layer_idx: int) -> tuple[str, dict[str, Any]]:
        """Name and options of one layer's mechanism."""
        name = self.attention if isinstance(self.attention, str) else self.attention[layer_idx]
        options = self.attention_kwargs[layer_idx] if isinstance(self.attention_kwargs, list) else self.attention_kwargs
        return name, dict(options or {})


def _check_layers(config: ZooLlamaConfig) -> None:
    """Raise ValueError unless there is one causal mechanism, or one for each layer, and options that can be saved."""
    for field in ("attention", "attention_kwargs"):
        value = getattr(config, field)
        if isinstance(value, list | tuple) and len(value) != config.num_hidden_layers:
            raise ValueError(f"{field} has {len(value)} entries, the model {config.num_hidden_layers} layers: give one for each")
    for name in {config.attention} if isinstance(config.attention, str) else set(config.attention):
        info = attention_info(name)
        if "causal_self" not in info.patterns or not info.keeps_shape or info.spatial:
            raise ValueError(f"{name!r} cannot stand in a decoder: that needs causal self attention of a sequence")
    if any(config.layer_attention(i)[1].get("is_causal") is False for i in range(config.num_hidden_layers)):
        raise ValueError("attention_kwargs has is_causal=False, but a decoder is causal: leave it out")
    check_plain(config.attention_kwargs)


def _resolve_heads(config: ZooLlamaConfig) -> None:
    """Set `num_key_value_heads` and `head_dim` where they are None: as the mechanisms of the layers have them by default.

    Where the layers differ, each gets its own number of key/value heads into its options; all share one width, since they share the
    rotary tables.
    """
    if config.num_key_value_heads is not None and config.head_dim is not None:
        return
    layers = [config.layer_attention(i) for i in range(config.num_hidden_layers)]
    kinds = {json.dumps(layer, sort_keys=True): layer for layer in layers}
    found = {key: _default_heads(config, name, options) for key, (name, options) in kinds.items()}
    kv_heads, head_dims = ({pair[i] for pair in found.values()} for i in (0, 1))
    if config.head_dim is None:
        config.head_dim = head_dims.pop() if len(head_dims) == 1 else config.hidden_size // config.num_attention_heads
    if config.num_key_value_heads is not None:
        return
    config.num_key_value_heads = kv_heads.copy().pop() if len(kv_heads) == 1 else config.num_attention_heads
    if len(kv_heads) > 1:
        has_option = {name for name, _ in layers if "num_kv_heads" in inspect.signature(attention_class(name)).parameters}
        config.attention_kwargs = [
            {"num_kv_heads": found[json.dumps(layer, sort_keys=True)][0], **layer[1]} if layer[0] in has_option else layer[1]
            for layer in layers
        ]


def _default_heads(config: ZooLlamaConfig, name: str, options: Mapping[str, Any]) -> tuple[int, int]:
    """Key/value heads and width of a mechanism that is given what the configuration gives: as many as query heads if it can."""
    heads, given = config.num_key_value_heads, {"head_dim": config.head_dim}
    try:
        module = _on_meta(config, name, options, {**given, "num_kv_heads": heads or config.num_attention_heads})
    except ValueError:
        if heads is not None:
            raise
        module = _on_meta(config, name, options, given)
    return module.num_kv_heads if "num_kv_heads" in vars(module) else config.num_attention_heads, module.head_dim


def _on_meta(config: ZooLlamaConfig, name: str, options: Mapping[str, Any], host: Mapping[str, Any]) -> Any:
    given = {k: v for k, v in host.items() if v is not None}
    with torch.device("meta"):
        return build_causal_attention(name, config.hidden_size, config.num_attention_heads, given, options)
