"""The Combiner paper's language model: a plain pre-norm Transformer decoder around Combiner attention.

Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv 2107.05768, 2021. Follows the official JAX model
(google-research/google-research, combiner/jax, `AutoregTransformer` and its `LanguageModel`); options give the TF one.
`CombinerLMForCausalLM` is a Hugging Face model of its own type ("combiner_lm", known to the Auto classes), with `generate` and a
cache. Deviations: input ids are not shifted inside; other mechanisms can stand in Combiner's place (`attention`), to compare.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ._host import build_causal_attention
from .combiner_lm_config import ACTS, CombinerLMConfig

__all__ = ["CombinerLMConfig", "CombinerLMForCausalLM", "CombinerLMModel"]

# What outputs call the cache: past_key_values before transformers 5.24.
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class CombinerLMLayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x)).

    Shape: hidden_states (B, N, C) -> (B, N, C).
    """

    def __init__(self, config: CombinerLMConfig, layer_idx: int) -> None:
        super().__init__()
        host = {"qkv_bias": config.attn_bias, "proj_bias": config.attn_bias, "layer_idx": layer_idx, "depth": layer_idx}
        self.input_layernorm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.self_attn = build_causal_attention(config.attention, config.dim, config.num_heads, host, config.layer_options())
        self.post_attention_layernorm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.mlp_dim, act_layer=ACTS[config.act])
        self._takes = set(inspect.signature(self.self_attn.forward).parameters)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, cache: Any = None
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values if cache is None else cache}
        given = {name: value for name, value in given.items() if name in self._takes}
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **given)
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class CombinerLMPreTrainedModel(PreTrainedModel):
    """What the model tells transformers about itself."""

    config_class = CombinerLMConfig
    config: CombinerLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CombinerLMLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [_CACHE]  # noqa: RUF012
    _supports_sdpa = True  # in the sense that the mechanism chooses its engine itself, see attention_zoo.ops

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class CombinerLMModel(CombinerLMPreTrainedModel):
    """Embedding, positions, layers and the final normalisation.

    Shape: input_ids (B, N) -> `last_hidden_state` (B, N, C). `attention_mask` is (B, all tokens so far), 1 = a real token.

    Raises:
        ValueError: more tokens than `max_len`, or both or neither of input_ids and inputs_embeds.
    """

    def __init__(self, config: CombinerLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        if config.pos_emb == "learned":
            self.embed_positions = nn.Embedding(config.max_len, config.dim)
        self.layers = nn.ModuleList(CombinerLMLayer(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # the name that past_key_values has since transformers 5.24
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = DynamicCache()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self._positions(x, position_ids, 0 if cache is None else int(cache.get_seq_length()))
        if attention_mask is not None and attention_mask.ndim == 2 and not torch.compiler.is_compiling():
            attention_mask = None if bool(attention_mask.all()) else attention_mask  # a mask keeps the fastest engines away
        states = [x]
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, **{_CACHE: cache})
            states.append(x)
        x = self.norm(x)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{_CACHE: cache})

    def _positions(self, x: Tensor, position_ids: Tensor | None, seen: int) -> Tensor:
        """What is added to tokens (B, N, C) that stand after `seen` others."""
        if seen + x.shape[1] > self.config.max_len:
            raise ValueError(f"{seen + x.shape[1]} tokens are more than max_len={self.config.max_len}")
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        if self.config.pos_emb == "learned":
            positions: Tensor = self.embed_positions(position_ids)
            return positions
        return sinusoids(position_ids, self.config.dim).to(x.dtype)


def sinusoids(position_ids: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of the positions times exp(-i ln(10000) / (C / 2 - 1)): (..., N) -> (..., N, C), float32."""
    half = dim // 2
    step = math.log(10000.0) / max(half - 1, 1)
    angles = position_ids[..., None].float() * torch.exp(-step * torch.arange(half, device=position_ids.device))
    return torch.cat([angles.sin(), angles.cos()], -1)


class CombinerLMForCausalLM(CombinerLMPreTrainedModel, GenerationMixin):
    """The language model: the decoder and a linear output layer with a bias.

    Shape: input_ids (B, N) -> logits (B, N, vocab_size), in Hugging Face's `CausalLMOutputWithPast`. The logits of position i are
    about token i + 1: nothing is shifted inside but the labels of the loss.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CombinerLMConfig) -> None:
        super().__init__(config)
        self.model = CombinerLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.dim, config.vocab_size)
        self.post_init()
        if not config.use_cache and self.generation_config is not None:
            self.generation_config.use_cache = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_kwargs: Any,  # Hugging Face's Trainer: num_items_in_batch
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{_CACHE: past_key_values if cache is None else cache},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{_CACHE: getattr(outputs, _CACHE)}
        )


AutoModel.register(CombinerLMConfig, CombinerLMModel, exist_ok=True)
AutoModelForCausalLM.register(CombinerLMConfig, CombinerLMForCausalLM, exist_ok=True)
