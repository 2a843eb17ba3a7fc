"""The hosts of the swap's matrix: tiny models of every family, what they are fed, and what they are, written down by hand.

What a host is (`Traits`) is said here and not read from the adapters, so that it can contradict them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from swap_case import shake
from torch import Tensor, nn

__all__ = ["HOSTS", "HostCase", "Traits"]

DIM, HEADS, HEAD_DIM, DEPTH, VOCABULARY, PADDING = 32, 4, 8, 2, 64, 0
GRID = 8  # patches on a side: whole blocks for the mechanisms that want them
_IMAGE_SIZE, _PATCH = 32, 4
_LENGTH = 9


@dataclass(frozen=True)
class Traits:
    """What a host's attention layers are, under the names that `Host` has for it."""

    is_causal: bool = False
    rope: bool = False
    qk_norm: bool = False
    spatial: bool = False
    prefix_tokens: int = 0
    num_kv_heads: int = HEADS
    window_size: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class HostCase:
    """One kind of host: how it is built, what it is fed.

    Attributes:
        name: for the tests' names.
        build: a model in evaluation mode, its parameters off their initial values.
        traits: of its layers; of a model of several towers one for each.
        feed: "tokens", "images", "patches" (Siglip2's lists of patches) or "both" (tokens and images).
        model_args: what `az.save_pretrained` must be told of a timm model.
        layers: which of its attention layers are meant, as `swap_attention` takes it.
        head: "lm" for a model that generates.
    """

    name: str
    build: Callable[..., Any]
    traits: Traits
    feed: str
    model_args: Mapping[str, Any] | None = field(default=None, hash=False)
    layers: Any = None
    head: str = ""

    def inputs(self, side: str = "right") -> dict[str, Tensor]:
        """A batch of two, always the same numbers; the second text is padded on one `side`."""
        generator = torch.Generator().manual_seed(5)
        feed: dict[str, Tensor] = {}
        if self.feed in ("tokens", "both"):
            feed["input_ids"] = torch.randint(3, VOCABULARY, (2, _LENGTH), generator=generator)
            mask = torch.ones(2, _LENGTH, dtype=torch.long)
            mask[1, slice(None, 3) if side == "left" else slice(-3, None)] = 0
            feed["attention_mask"] = mask
        if self.feed in ("images", "both"):
            feed["x" if self.is_timm else "pixel_values"] = torch.randn(2, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=generator)
        if self.feed == "patches":
            feed["pixel_values"] = torch.randn(2, 16, 3 * _PATCH**2, generator=generator)
            feed["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
            feed["pixel_attention_mask"][1, 12:] = 0
            feed["spatial_shapes"] = torch.tensor([[4, 4], [3, 4]])
        return feed

    @property
    def is_timm(self) -> bool:
        return self.model_args is not None

    def run(self, model: Any, feed: Mapping[str, Tensor]) -> Tensor:
        """The model's first output; 0 where padding stands, which is no matter."""
        out = model(**feed)
        out = out if isinstance(out, Tensor) else out[0]
        mask = next((feed[name] for name in ("attention_mask", "pixel_attention_mask") if name in feed), None)
        return out if mask is None or out.shape[:2] != mask.shape else out * mask[..., None]


def _ready(model: Any) -> Any:
    shake(model)
    return model.eval()


def _timm(name: str, architecture: str, prefix_tokens: int, rope: bool = False, **changes: Any) -> HostCase:
    sizes = {"img_size": _IMAGE_SIZE, "patch_size": _PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    sizes |= changes

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = _ready(timm.create_model(architecture, **sizes))
        return model

    traits = Traits(spatial=True, prefix_tokens=prefix_tokens, rope=rope, qk_norm=bool(changes.get("qk_norm")))
    return HostCase(f"timm-{name}", build, traits, "images", model_args=sizes)


def _hugging_face(name: str, kind: str, config: Callable[[], Any], traits: Traits, feed: str, **more: Any) -> HostCase:
    def build(implementation: str | None = None) -> Any:
        torch.manual_seed(0)
        chosen = {} if implementation is None else {"attn_implementation": implementation}
        return _ready(getattr(transformers, kind)._from_config(config(), **chosen))

    return HostCase(f"hf-{name}", build, traits, feed, **more)


_SIZES = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 48}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SIZES, **_TOKENS, "max_position_embeddings": 40}
_IMAGE = {**_SIZES, "image_size": _IMAGE_SIZE, "patch_size": _PATCH}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _encoder(name: str, kind: str, config: str, traits: Traits, feed: str, **settings: Any) -> HostCase:
    return _hugging_face(name, kind, lambda: getattr(transformers, config)(**settings), traits, feed)


def _bert(name: str, kind: str, config: str, **changes: Any) -> HostCase:
    return _encoder(name, kind, config, Traits(), "tokens", **{**_TEXT, **_NO_DROPOUT, **changes})


def _image(name: str, kind: str, config: str, prefix_tokens: int, **changes: Any) -> HostCase:
    settings = {**_IMAGE, **changes}
    return _encoder(name, kind, config, Traits(spatial=True, prefix_tokens=prefix_tokens), "images", **settings)


def _towers(name: str, kind: str, config: str, layers: str, traits: Traits) -> HostCase:
    """A model of a text's and an image's tower, of which one is swapped."""

    def configure() -> Any:
        vision = {**_SIZES, "patch_size": _PATCH, "num_patches": 16} if "2" in config else _IMAGE
        return getattr(transformers, config)(text_config={**_TEXT, "projection_size": DIM}, vision_config=vision, projection_dim=16)

    return _hugging_face(f"{name}-{layers.split('_')[0]}", kind, configure, traits, "both", layers=layers)


def _decoder(name: str, family: str, head: str = "ForCausalLM", traits: Traits | None = None, **changes: Any) -> HostCase:
    settings = {**_TEXT, "num_key_value_heads": 2, "head_dim": HEAD_DIM, **changes}
    config = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    kind = f"{family}TextForSequenceClassification" if (family, head[3:]) == ("Gemma3", "SequenceClassification") else family + head
    traits = traits or Traits(is_causal=True, rope=True, num_kv_heads=2)
    return _hugging_face(
        name, kind, lambda: getattr(transformers, config)(**settings), traits, "tokens", head="lm" if "LM" in head else ""
    )


_ROPE: dict[str, Any] = {"is_causal": True, "rope": True, "num_kv_heads": 2}
_SLIDING = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
_GEMMA = {"query_pre_attn_scalar": 20, **_SLIDING}
_GPT2 = {
    "n_embd": DIM,
    "n_layer": DEPTH,
    "n_head": HEADS,
    "n_positions": 40,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_GPT2_TRAITS = Traits(is_causal=True)

_ALL = [
    _timm("vit", "vit_tiny_patch16_224", 1),
    _timm("vit_avg", "vit_tiny_patch16_224", 0, class_token=False, global_pool="avg"),
    _timm("vit_norm", "vit_tiny_patch16_224", 1, qk_norm=True, qkv_bias=False, proj_bias=False),
    _timm("deit", "deit_tiny_patch16_224", 1),
    _timm("deit_distilled", "deit_tiny_distilled_patch16_224", 2),
    _timm("deit3", "deit3_small_patch16_224", 1),
    _timm("dinov2", "vit_small_patch14_dinov2", 1),
    _timm("dinov2_reg", "vit_small_patch14_reg4_dinov2", 5),
    _timm("dinov3", "vit_small_patch16_dinov3", 5, rope=True),
    _timm("clip", "vit_base_patch32_clip_224", 1),
    _timm("siglip", "vit_base_patch16_siglip_224", 0),
    _timm("eva", "eva_giant_patch14_224", 1),
    _timm("eva02", "eva02_tiny_patch14_224", 1, rope=True),
    _bert("bert", "BertModel", "BertConfig"),
    _bert("bert-mlm", "BertForMaskedLM", "BertConfig"),
    _bert("bert-classes", "BertForSequenceClassification", "BertConfig"),
    _bert("roberta", "RobertaModel", "RobertaConfig"),
    _bert("roberta-mlm", "RobertaForMaskedLM", "RobertaConfig"),
    _bert("roberta-classes", "RobertaForSequenceClassification", "RobertaConfig"),
    _image("vit", "ViTModel", "ViTConfig", 1),
    _image("vit-classes", "ViTForImageClassification", "ViTConfig", 1, qkv_bias=False),
    _image("dinov2", "Dinov2Model", "Dinov2Config", 1),
    _image("dinov2-classes", "Dinov2ForImageClassification", "Dinov2Config", 1),
    _image("dinov2_reg", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 5),
    _image("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", 1),
    _encoder("clip_text", "CLIPTextModel", "CLIPTextConfig", Traits(is_causal=True), "tokens", **_TEXT),
    _image("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", 0),
    _encoder("siglip_text", "SiglipTextModel", "SiglipTextConfig", Traits(), "tokens", **_TEXT, projection_size=DIM),
    _encoder(
        "siglip2_vision", "Siglip2VisionModel", "Siglip2VisionConfig", Traits(), "patches",
        **_SIZES, patch_size=_PATCH, num_patches=16,
    ),
    _encoder("siglip2_text", "Siglip2TextModel", "Siglip2TextConfig", Traits(), "tokens", **_TEXT, projection_size=DIM),
    _towers("clip", "CLIPModel", "CLIPConfig", "text_model.*", Traits(is_causal=True)),
    _towers("clip", "CLIPModel", "CLIPConfig", "vision_model.*", Traits(spatial=True, prefix_tokens=1)),
    _towers("siglip", "SiglipModel", "SiglipConfig", "text_model.*", Traits()),
    _towers("siglip", "SiglipModel", "SiglipConfig", "vision_model.*", Traits(spatial=True)),
    _decoder("llama", "Llama", attention_bias=True),
    _decoder("llama-classes", "Llama", "ForSequenceClassification"),
    _decoder("mistral", "Mistral", sliding_window=None),
    _decoder("mistral-window", "Mistral", traits=Traits(**_ROPE, window_size=5), sliding_window=5),
    _decoder("qwen2", "Qwen2"),
    _decoder("qwen2-window", "Qwen2", traits=Traits(**_ROPE, window_size=5), use_sliding_window=True, **_SLIDING),
    _decoder("qwen3", "Qwen3", traits=Traits(**_ROPE, qk_norm=True), head_dim=16),
    _decoder("gemma", "Gemma", head_dim=16),
    _decoder("gemma2", "Gemma2", traits=Traits(**_ROPE, window_size=5), attn_logit_softcapping=None, **_GEMMA),
    _decoder("gemma2-softcap", "Gemma2", traits=Traits(**_ROPE, window_size=5, softcap=50.0), **_GEMMA),
    _decoder("gemma3", "Gemma3", traits=Traits(**_ROPE, window_size=5, qk_norm=True), **_GEMMA),
    _decoder("gpt2", "GPT2", "LMHeadModel", _GPT2_TRAITS, **_GPT2, scale_attn_by_inverse_layer_idx=True),
    _decoder("gpt2-classes", "GPT2", "ForSequenceClassification", _GPT2_TRAITS, **_GPT2),
    _decoder("phi3", "Phi3"),
]  # fmt: skip

HOSTS: dict[str, HostCase] = {case.name: case for case in _ALL}
