"""Names of the decoders: what each stands for, and how it is built. Nothing here imports transformers until one is built.

The families `llama`, `moh_llama`, `llama_cca`, `diffllama` and `motif` are built by `llama.py`, `combiner_lm` by `combiner_lm.py`.
transformers' registries learn of them when transformers is imported, before or after this package: `AutoModelForCausalLM` loads
a saved decoder of the zoo after `import attention_zoo`, and "zoo" is an attention implementation of any model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attention_zoo.registry import register_builder, register_model_info

from ._when_imported import when_imported

__all__ = ["build_combiner_lm", "build_llama"]

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

# Presets of each Llama-style family: what a name stands for. The family's bare name is its configurable entry point.
_LLAMA_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
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

# Presets of `combiner_lm`. The bare name is the configurable entry point; "base" has the official TF model's defaults.
_COMBINER_PRESETS: dict[str, dict[str, Any]] = {
    "combiner_lm": {},
    "combiner_lm_tiny": {
        "vocab_size": 256,
        "dim": 64,
        "depth": 2,
        "num_heads": 4,
        "mlp_dim": 128,
        "max_len": 512,
        "window_size": 16,
    },
    "combiner_lm_base": {
        "pattern": "axial",
        "window_size": 128,
        "act": "gelu_tanh",
        "pos_emb": "learned",
        "attn_bias": True,
        "norm_eps": 1e-5,
        "summary_norm_eps": 1e-5,
        "tie_embeddings": True,
    },
}

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
) -> Any:
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
    with torch.device("cpu"):  # transformers may be imported here for the first time, which it cannot be on the meta device
        from .llama import ZooLlamaConfig, ZooLlamaForCausalLM

    preset = dict(_LLAMA_PRESETS[family][name])
    of_preset = preset.pop("attention_kwargs", {})
    settings = {**preset, **config}
    unknown = sorted(set(settings) - set(inspect.signature(ZooLlamaConfig).parameters) - set(_GENERAL_FIELDS))
    if unknown:
        raise TypeError(f"{name!r} takes the fields of transformers' LlamaConfig; unknown: {', '.join(unknown)}")
    own, defaults = _family_attention(family, settings)
    chosen = own if attention is None else attention if isinstance(attention, str) else list(attention)
    options = _add_family_options(chosen, attention_kwargs, own, {**defaults, **of_preset})
    configuration = ZooLlamaConfig(attention=chosen, attention_kwargs=options or None, **settings)
    return _instantiate(ZooLlamaForCausalLM, configuration, device, dtype)


def _family_attention(family: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mechanism of a family and its options, where the caller names none."""
    if family == "moh_llama":
        return "moh", {"router": "query_norm", "split_qkv": True}
    if family == "llama_cca":
        return "cca", {"rope_theta": None}  # the decoder's tables are handed over
    if family == "diffllama":
        eps = config.get("rms_norm_eps", 1e-6)
        return "diff", {"pairing": "halves", "version": "v1", "sub_norm_affine": False, "norm_eps": eps}
    if family == "motif":
        heads = config.get("num_attention_heads", 32)
        return "gda", {"num_noise_heads": heads, "lambda_depth_offset": -1, "norm_eps": 1e-5}
    return "gqa", {}


def _add_family_options(
    attention: str | list[str],
    given: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    own: str,
    defaults: Mapping[str, Any],
) -> dict[str, Any] | list[dict[str, Any]]:
    """The options of all layers, or of each: those given, and `defaults` where the family's own mechanism stands."""
    if given is None or isinstance(given, Mapping):
        if isinstance(attention, str) or own not in attention or not defaults:
            return {**(defaults if attention == own else {}), **(given or {})}
        given = [given] * len(attention)
    each = list(given)
    names = [attention] * len(each) if isinstance(attention, str) else attention
    if len(names) != len(each):
        raise ValueError(f"attention names {len(names)} layers, attention_kwargs {len(each)}: give one for each")
    return [{**(defaults if name == own else {}), **(layer or {})} for name, layer in zip(names, each, strict=True)]


@register_builder("combiner_lm")
def build_combiner_lm(
    name: str,
    family: str,
    *,
    attention: str | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    device: Any = None,
    dtype: Any = None,
    **config: Any,
) -> Any:
    """Build a language model.

    Args:
        name, family: a registered name and its family.
        attention: the mechanism of every layer; None: Combiner.
        attention_kwargs: further options of it.
        device, dtype: of the parameters.
        config: fields of `CombinerLMConfig`, or Hugging Face's names of them.

    Raises:
        ValueError: as `CombinerLMConfig`; TypeError: no such field.
    """
    with torch.device("cpu"):  # as above
        from .combiner_lm import CombinerLMConfig, CombinerLMForCausalLM

    known = {*inspect.signature(CombinerLMConfig).parameters, *CombinerLMConfig.attribute_map}
    if unknown := sorted(set(config) - known):
        raise TypeError(f"{name!r} takes the fields of CombinerLMConfig; unknown: {', '.join(unknown)}")
    spelled = {CombinerLMConfig.attribute_map.get(key, key): value for key, value in {**_COMBINER_PRESETS[name], **config}.items()}
    options = dict(attention_kwargs) if attention_kwargs else None
    configuration = CombinerLMConfig(attention=attention or "combiner", attention_kwargs=options, **spelled)
    return _instantiate(CombinerLMForCausalLM, configuration, device, dtype)


def _instantiate(cls: Any, configuration: Any, device: Any, dtype: Any) -> Any:
    """The model, its parameters on `device` and in `dtype`; None: torch's defaults."""
    with torch.device(device if device is not None else torch.get_default_device()):
        model = cls(configuration)
    return model if dtype is None else model.to(dtype)


# What has to be complete, if it has been begun, before our configurations can be made: transformers' own import each other, since
# the docstrings of configurations are made from its table of models. And what each of them has when it is.
_NEEDED = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.modeling_auto": "MODEL_MAPPING_NAMES",
    "transformers.models.llama.configuration_llama": "LlamaConfig",
}
_registering: list[bool] = []


def _register_configurations() -> None:
    """Tell transformers of the model types. Their models follow when a configuration is made: then transformers is complete.

    Called whenever one of `_NEEDED` has been imported; the first call that finds none of them half done goes on.
    """
    begun = {name: sys.modules[name] for name in _NEEDED if name in sys.modules}
    if _registering or next(iter(_NEEDED)) not in begun or not all(hasattr(m, _NEEDED[name]) for name, m in begun.items()):
        return
    _registering.append(True)
    from transformers.models.auto.configuration_auto import AutoConfig

    from .combiner_lm_config import CombinerLMConfig
    from .llama_config import ZooLlamaConfig

    for config in (ZooLlamaConfig, CombinerLMConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_attention() -> None:
    from ._hf_attention import register_zoo_attention
    from ._hf_functional import register_zoo_functionals

    register_zoo_attention()
    register_zoo_functionals()


for _family, _presets in (*_LLAMA_PRESETS.items(), ("combiner_lm", _COMBINER_PRESETS)):
    for _name, _preset in _presets.items():
        register_model_info(_name, _family, **_preset)

for _module in _NEEDED:
    when_imported(_module, _register_configurations)
when_imported("transformers.modeling_utils", _register_attention)
