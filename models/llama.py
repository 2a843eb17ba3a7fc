"""Llama-style decoders with any causal mechanism of the zoo: Hugging Face's own Llama around our attention.

Embedding, RMSNorm, gated MLP, rotary tables, the model's forward, masks, caches, loss and `generate` are transformers'
(LLaMA, arXiv 2302.13971); a layer's attention is whatever `config.attention` names, one mechanism for all layers or one for each.
`ZooLlamaForCausalLM` is a model type of its own ("zoo_llama", known to the Auto classes), so that `save_pretrained`, `Trainer` and
PEFT treat it as any other. Families: `llama` (any mechanism), and the papers' own: `moh_llama`, `llama_cca`, `diffllama`, `motif`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification, GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from attention_zoo.attention.auxiliary import add_auxiliary_loss
from attention_zoo.attention.base import AttentionModule, read_padding
from attention_zoo.attention.cache import check_cache

from ._host import build_causal_attention
from .llama_config import ZooLlamaConfig
from .polynorm import PolyNorm

__all__ = [
    "ZooLlamaConfig",
    "ZooLlamaForCausalLM",
    "ZooLlamaForSequenceClassification",
    "ZooLlamaForTokenClassification",
    "ZooLlamaModel",
]


# Of the arguments of transformers' losses: what tells a batch's share of an update.
_ITEMS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")


class ZooLlamaMLP(LlamaMLP):
    """Llama's gated MLP, down(act(gate(x)) * up(x)); `hidden_act` may also be "poly_norm", which has parameters."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        nn.Module.__init__(self)  # not Llama's, which knows transformers' activations only
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = PolyNorm() if config.hidden_act == "poly_norm" else ACT2FN[config.hidden_act]


class ZooLlamaDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x)).

    Shape: hidden_states (B, N, C) -> (B, N, C).
    """

    def __init__(self, config: ZooLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        name, options = config.layer_attention(layer_idx)
        host = {
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "qkv_bias": config.attention_bias,
            "proj_bias": config.attention_bias,
            "attn_drop": float(config.attention_dropout or 0.0),
            "layer_idx": layer_idx,
            "depth": layer_idx,
        }
        self.self_attn = build_causal_attention(name, config.hidden_size, config.num_attention_heads, host, options)
        self.self_attn.is_rotated = True
        self._takes = set(inspect.signature(self.self_attn.forward).parameters)
        self.mlp = ZooLlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # the name that past_key_values has since transformers 5.24
        **kwargs: Any,  # what Hugging Face hands to every layer and attention does not need: position_ids, use_cache, ...
    ) -> Tensor:
        cache = past_key_values if cache is None else cache
        check_cache(self.self_attn, cache)
        if attention_mask is not None and attention_mask.ndim == 4 and self.self_attn.attention_info.padding_masks_only:
            batch, new, seen = *hidden_states.shape[:2], 0 if cache is None else cache.get_seq_length(self.self_attn.layer_idx)
            attention_mask = read_padding(attention_mask, batch, new, seen)
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "past_key_values": cache}
        attended = self.self_attn(self.input_layernorm(hidden_states), **{k: v for k, v in given.items() if k in self._takes})
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class ZooLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the zoo's decoders tell transformers about themselves. In training, losses include the mechanisms' auxiliary losses."""

    config_class = ZooLlamaConfig
    config: ZooLlamaConfig
    _no_split_modules = ["ZooLlamaDecoderLayer"]  # noqa: RUF012
    _supports_flash_attn = False  # the mechanisms choose their engine themselves, see attention_zoo.ops
    _supports_flex_attn = False
    _supports_sdpa = True  # in the sense that its masks are understood, as eager attention's are
    _can_record_outputs = {"hidden_states": ZooLlamaDecoderLayer}  # noqa: RUF012

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """transformers' loss of the task, and in training the mechanisms' auxiliary losses."""
        task_loss = super().loss_function

        def loss(*args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = task_loss(*args, **kwargs)
            coefficient = self.config.aux_loss_coef
            if not self.training or not coefficient:
                return value
            items = {name: kwargs[name] for name in _ITEMS if name in kwargs}
            return add_auxiliary_loss(self, value, coefficient, **items)

        return loss

    @loss_function.setter
    def loss_function(self, value: Callable[..., Tensor]) -> None:
        self._loss_function = value  # where transformers keeps it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, AttentionModule):
            _reset_own_parameters(module)


def _reset_own_parameters(module: AttentionModule) -> None:
    """Initialise what the mechanism itself holds, not its projections and norms, which are the decoder's, where no file gave it."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    fresh = [t for t in own if not getattr(t, "_is_hf_initialized", False)]
    if not fresh:
        return
    tensors = [*module.parameters(), *module.buffers()]
    kept = [(t, t.detach().clone()) for t in tensors if all(t is not f for f in fresh)]
    module.reset_parameters()
    for tensor, value in kept:
        tensor.copy_(value)


class ZooLlamaModel(ZooLlamaPreTrainedModel, LlamaModel):
    """Llama's decoder stack with the mechanisms of `config.attention`; forward is Hugging Face's."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not LlamaModel's, which would build Llama's layers first
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ZooLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class ZooLlamaForCausalLM(ZooLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """A language model: the decoder and its output layer.

    Shape: input_ids (B, N) -> logits (B, N, vocab_size), in Hugging Face's `CausalLMOutputWithPast`.
    """

    def __init__(self, config: ZooLlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = ZooLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ZooLlamaForSequenceClassification(GenericForSequenceClassification, ZooLlamaPreTrainedModel):
    """The decoder with a linear layer on the last token of each sequence."""


class ZooLlamaForTokenClassification(GenericForTokenClassification, ZooLlamaPreTrainedModel):
    """The decoder with a linear layer on every token."""


AutoModel.register(ZooLlamaConfig, ZooLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(ZooLlamaConfig, ZooLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ZooLlamaConfig, ZooLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(ZooLlamaConfig, ZooLlamaForTokenClassification, exist_ok=True)
