"""Llama-style decoders with any causal mechanism of the zoo: Hugging Face's own Llama around our attention.

Embedding, RMSNorm, gated MLP, rotary tables, the model's forward, masks, caches, loss and `generate` are transformers'
(LLaMA, arXiv 2302.13971); a layer's attention is whatever `config.attention` names, one mechanism for all layers or one for each.
`ZooLlamaForCausalLM` is a model type of its own ("zoo_llama", known to the Auto classes), so that `save_pretrained`, `Trainer` and
PEFT treat it as any other. Families: `llama` (any mechanism), and the papers' own: `moh_llama`, `llama_cca`, `diffllama`, `motif`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
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
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from attention_zoo.attention.base import AttentionModule, auxiliary_loss, read_padding
from attention_zoo.attention.cache import check_cache
from attention_zoo.registry import attention_class, attention_info, create_attention, register_builder, register_model_info

from ._hf_attention import NAME, register_zoo_attention
from .polynorm import PolyNorm

__all__ = [
    "ZooLlamaConfig",
    "ZooLlamaForCausalLM",
    "ZooLlamaForSequenceClassification",
    "ZooLlamaForTokenClassification",
    "ZooLlamaModel",
    "build_attention_layer",
]

register_zoo_attention()


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
        kwargs.setdefault("attn_implementation", NAME)
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
    try:
        json.dumps(config.attention_kwargs)
    except TypeError as error:
        raise ValueError(f"attention_kwargs are saved in config.json, so only plain values can stand there: {error}") from None


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
        return build_attention_layer(name, config.hidden_size, config.num_attention_heads, given, options)


def build_attention_layer(
    attention: str, dim: int, num_heads: int, host: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> Any:
    """Build the causal `attention` for a layer of a decoder.

    Args:
        attention: name of the mechanism.
        dim, num_heads: of the layer; `own` may override num_heads.
        host: the decoder's settings in the mechanisms' words (`num_kv_heads`, `head_dim`, `qkv_bias`, `attn_drop`, `layer_idx`,
            `depth`, ...); handed over where the mechanism has them.
        own: the mechanism's options; they win.

    Raises:
        ValueError: grouped key/value heads, a bias or dropout that the mechanism lacks.
        TypeError: an own option that the mechanism lacks.
    """
    own, parameters = dict(own or {}), inspect.signature(attention_class(attention)).parameters
    neutral = {"num_kv_heads": num_heads, "qkv_bias": False, "proj_bias": False, "attn_drop": 0.0}
    lost = [k for k, v in neutral.items() if host.get(k, v) != v and k not in parameters and k not in own]
    if lost:
        raise ValueError(f"{attention!r} does not have {', '.join(f'{k}={host[k]}' for k in lost)}, as the decoder is configured")
    shared = {"num_heads": num_heads, "is_causal": True, "rope_layout": "half", **attention_info(attention).causal_options, **host}
    if "num_heads" in own and own["num_heads"] != num_heads:
        shared.pop("num_kv_heads", None)  # they belong to the other number of heads
    module = create_attention(attention, **{"dim": dim, **{k: v for k, v in shared.items() if k in parameters}, **own})
    module.layer_idx = host.get("layer_idx")
    return module


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
        self.self_attn = build_attention_layer(name, config.hidden_size, config.num_attention_heads, host, options)
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
    """What the zoo's decoders tell transformers about themselves."""

    config_class = ZooLlamaConfig
    config: ZooLlamaConfig
    _no_split_modules = ["ZooLlamaDecoderLayer"]  # noqa: RUF012
    _supports_flash_attn = False  # the mechanisms choose their engine themselves, see attention_zoo.ops
    _supports_flex_attn = False
    _supports_sdpa = True  # in the sense that its masks are understood, as eager attention's are
    _can_record_outputs = {"hidden_states": ZooLlamaDecoderLayer}  # noqa: RUF012

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
    """A language model: the decoder and its output layer. In training, the loss includes the mechanisms' auxiliary losses.

    Shape: input_ids (B, N) -> logits (B, N, vocab_size), in Hugging Face's `CausalLMOutputWithPast`.
    """

    def __init__(self, config: ZooLlamaConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = ZooLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        task_loss = super().loss_function

        def loss(*args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = task_loss(*args, **kwargs)
            if self.training and self.config.aux_loss_coef:
                value = value + self.config.aux_loss_coef * auxiliary_loss(self).to(value.device)
            return value

        return loss

    @loss_function.setter
    def loss_function(self, value: Callable[..., Tensor]) -> None:
        self._loss_function = value  # where transformers keeps it


class ZooLlamaForSequenceClassification(GenericForSequenceClassification, ZooLlamaPreTrainedModel):
    """The decoder with a linear layer on the last token of each sequence."""


class ZooLlamaForTokenClassification(GenericForTokenClassification, ZooLlamaPreTrainedModel):
    """The decoder with a linear layer on every token."""


AutoConfig.register(ZooLlamaConfig.model_type, ZooLlamaConfig, exist_ok=True)
AutoModel.register(ZooLlamaConfig, ZooLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(ZooLlamaConfig, ZooLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ZooLlamaConfig, ZooLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(ZooLlamaConfig, ZooLlamaForTokenClassification, exist_ok=True)


# --- names ------------------------------------------------------------------------------------------------------------------------

# Sizes of published models, in LlamaConfig's words.
_LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA31_8B = {
    **_LLAMA3_8B,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}
_QWEN25_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "attention_kwargs": {"qkv_bias": True, "proj_bias": False},
}
_MOTIF = {"vocab_size": 219520, "head_dim": 128, "hidden_act": "poly_norm", "rms_norm_eps": 1e-6}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Presets of each family: what a name stands for. The bare name of the family is its configurable entry point.
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"llama": {}, "llama_tiny": _TINY},
    "moh_llama": {"moh_llama": {}, "moh_llama3_8b": _LLAMA3_8B},
    "llama_cca": {"llama_cca": {}, "cca_llama2_7b": _LLAMA2_7B, "cca_llama3_1_8b": _LLAMA31_8B, "cca_qwen2_5_7b": _QWEN25_7B},
    "diffllama": {"diffllama": {"rms_norm_eps": 1e-5}},
    "motif": {
        "motif": {"hidden_act": "poly_norm"},
        "motif_2_6b": {
            **_MOTIF,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "motif_2_12_7b": {
            **_MOTIF,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "attention_kwargs": {"num_noise_heads": 8},
        },
    },
}


def _family_attention(family: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mechanism of a family and its options, where the caller names none."""
    if family == "moh_llama":
        return "moh", {"router": "query_norm", "split_qkv": True}
    if family == "llama_cca":
        return "cca", {"rope_theta": None}  # the decoder's tables are handed over
    if family == "diffllama":
        eps = config.get("rms_norm_eps", ZooLlamaConfig.rms_norm_eps)
        return "diff", {"pairing": "halves", "version": "v1", "sub_norm_affine": False, "norm_eps": eps}
    if family == "motif":
        heads = config.get("num_attention_heads", ZooLlamaConfig.num_attention_heads)
        return "gda", {"num_noise_heads": heads, "lambda_depth_offset": -1, "norm_eps": 1e-5}
    return "gqa", {}


@register_builder("llama", "moh_llama", "llama_cca", "diffllama", "motif")
def build_llama(
    name: str,
    family: str,
    *,
    attention: str | Sequence[str] | None = None,
    attention_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    device: Any = None,
    dtype: Any = None,
    **config: Any,
) -> ZooLlamaForCausalLM:
    """Build a decoder.

    Args:
        name, family: a registered name and its family.
        attention: a mechanism, or one for each layer; None: the family's.
        attention_kwargs: its options, or those of each layer. Where the family's own mechanism stays they are added to its options.
        device, dtype: of the parameters.
        config: fields of `ZooLlamaConfig`, which are Hugging Face's `LlamaConfig`'s.

    Raises:
        ValueError: as `ZooLlamaConfig`; TypeError: no such field.
    """
    preset = dict(_PRESETS[family][name])
    of_preset = preset.pop("attention_kwargs", {})
    settings = {**preset, **config}
    unknown = sorted(set(settings) - set(inspect.signature(ZooLlamaConfig).parameters) - set(_GENERAL_FIELDS))
    if unknown:
        raise TypeError(f"{name!r} takes the fields of transformers' LlamaConfig; unknown: {', '.join(unknown)}")
    own, defaults = _family_attention(family, settings)
    options: Any
    if attention is None or attention == own:
        attention, defaults = own, {**defaults, **of_preset}
    else:
        defaults = {}
    if attention_kwargs is None or isinstance(attention_kwargs, Mapping):
        options = {**defaults, **(attention_kwargs or {})}
    else:
        options = [{**defaults, **(layer or {})} for layer in attention_kwargs]
    chosen = attention if isinstance(attention, str) else list(attention)
    configuration = ZooLlamaConfig(attention=chosen, attention_kwargs=options or None, **settings)
    with torch.device(device if device is not None else torch.get_default_device()):
        model = ZooLlamaForCausalLM(configuration)
    return model if dtype is None else model.to(dtype)


# Fields that every configuration of transformers takes besides its own.
_GENERAL_FIELDS = (
    "attn_implementation",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
)

for _family, _presets in _PRESETS.items():
    for _name, _preset in _presets.items():
        register_model_info(_name, _family, **_preset)
