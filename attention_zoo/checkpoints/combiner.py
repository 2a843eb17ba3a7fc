"""Official Combiner weights (google-research/google-research, folder combiner): layers as flax or TF1 lay them out, and flax's LM.

No checkpoint was ever published; these are the layouts that the official code writes. TF's slashes may be dots. Kernels are
(in, heads, d) or (heads, d, out) there and (out, in) here. A state dict with our own names passes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError, rename_keys
from attention_zoo.registry import create_attention, register_converter

__all__ = ["convert_combiner", "convert_combiner_lm"]

State = dict[str, Tensor]

# Our modules in the official layouts. Kernels called "out" have shape (heads, d, out), "in" (in, heads, d), "plain" (in, out).
_FLAX_KINDS = {"weight": "kernel", "bias": "bias"}
_FLAX = {"q": ("query", "in"), "k": ("key", "in"), "v": ("value", "in")}
_FLAX_PLAIN = {**_FLAX, "proj": ("DenseGeneral_0", "out")}
_FLAX_AXIAL = {
    **_FLAX,
    "summary_proj": ("DenseGeneral_0", "out"),
    "summary_norm": ("LayerNorm_0", "norm"),
    "summary_key": ("DenseGeneral_1", "in"),
    "proj": ("DenseGeneral_2", "out"),
}
_TF = {
    "q": ("q", "in"),
    "k": ("k", "in"),
    "v": ("v", "in"),
    "summary_proj": ("rowmajor_param_post.dense", "out"),
    "summary_norm": ("rowmajor_param_post.pre_norm", "norm"),
    "summary_key": ("rowmajor_param_post.dense_1", "in"),
    "pool_q": ("pooling_query.dense", "plain"),
    "pool_k": ("pooling_key.dense", "plain"),
    "proj": ("dense", "out"),
}


@register_converter("combiner")
def convert_combiner(state_dict: State, **kwargs: Any) -> State:
    """The state dict of one layer -> `CombinerAttention(**kwargs)`'s. Raises CheckpointError that lists unknown, missing keys."""
    own = list(create_attention("combiner", **{**kwargs, "device": "meta", "dtype": None}).state_dict())
    if "qkv.weight" in state_dict:
        return rename_keys(state_dict, (), expected=own)
    state = {key.replace("/", "."): tensor for key, tensor in state_dict.items()}
    if any(key.endswith(".kernel") for key in state):
        layout = _FLAX_AXIAL if any(key.startswith("summary_") for key in own) else _FLAX_PLAIN
        kinds, norms = _FLAX_KINDS, {"weight": "scale", "bias": "bias"}
    else:
        layout, kinds, norms = _TF, {"weight": "weight", "bias": "bias"}, {"weight": "gamma", "bias": "beta"}
    official = {}
    for name in _split_projections(own):
        module, _, kind = name.rpartition(".")
        if module not in layout:
            raise CheckpointError(f"official layers have no {name}")
        called, shape = layout[module]
        official[f"{called}.{(norms if shape == 'norm' else kinds)[kind]}"] = (name, shape)
    rename_keys(state, (), expected=official)
    split = {name: _to_linear(state[key], shape) for key, (name, shape) in official.items()}
    fused = {kind: [split.pop(f"{part}.{kind}") for part in "qkv"] for kind in ("weight", "bias") if f"q.{kind}" in split}
    return {**{f"qkv.{kind}": torch.cat(tensors) for kind, tensors in fused.items()}, **split}


def _split_projections(names: Iterable[str]) -> list[str]:
    """`qkv.*` as `q.*`, `k.*`, `v.*`."""
    return [
        f"{part}.{name.removeprefix('qkv.')}" if part else name
        for name in names
        for part in ("qkv" if name.startswith("qkv.") else [""])
    ]


def _to_linear(tensor: Tensor, shape: str) -> Tensor:
    """An official kernel as `nn.Linear`'s weight; a bias, maybe of (heads, d), flat."""
    if shape == "norm" or tensor.ndim == 1:
        return tensor
    if tensor.ndim == 3:
        tensor = tensor.flatten(1) if shape == "in" else tensor.flatten(0, 1)
    elif shape == "in":  # (heads, d)
        return tensor.flatten()
    return tensor.T.contiguous()


# Flax's names of a layer's other modules, and of the modules outside the layers.
_FLAX_LAYER = {
    "input_layernorm": "LayerNorm_0",
    "post_attention_layernorm": "LayerNorm_1",
    "mlp.fc1": "MlpBlock_0.Dense_0",
    "mlp.fc2": "MlpBlock_0.Dense_1",
}
_FLAX_STEM = {"model.norm": "autoreg_model.LayerNorm_0", "lm_head": "autoreg_model.Dense_0"}


# Hugging Face's names of the arguments that the layout depends on, as the model's configuration understands them.
_HF_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "tie_word_embeddings": "tie_embeddings",
}


@register_converter("combiner_lm")
def convert_combiner_lm(
    state_dict: State, *, attention: str | None = None, attention_kwargs: Mapping[str, Any] | None = None, **config: Any
) -> State:
    """Flax's language model; arguments as for `create_model`. A state dict with our own names passes through.

    Returns: a state dict that has the output layer in any case: where it is tied to the embedding, saved models leave it out.

    Raises:
        CheckpointError: learned positions, a tied output layer or another mechanism, which it does not have; unknown or missing
            keys, all listed.
    """
    config = {_HF_NAMES.get(name, name): value for name, value in config.items()}
    if "model.embed_tokens.weight" in state_dict:
        tied = {"lm_head.weight": state_dict["model.embed_tokens.weight"]} if config.get("tie_embeddings") else {}
        return {**tied, **state_dict}
    if attention not in (None, "combiner") or config.get("pos_emb", "sinusoidal") != "sinusoidal" or config.get("tie_embeddings"):
        raise CheckpointError(
            "the official flax language model has Combiner attention, sinusoidal positions and an output layer of its own"
        )
    depth, attn_bias = config.get("depth", 12), config.get("attn_bias", False)
    names = ("pattern", "window_size", "summary_pool", "summary_act", "row_summary", "summary_norm_eps")
    options = {"dim": config.get("dim", 768), "num_heads": config.get("num_heads", 12)}
    options |= {"qkv_bias": attn_bias, "proj_bias": attn_bias}
    options |= {name: config[name] for name in names if name in config} | dict(attention_kwargs or {})

    official = {"Embed_0.embedding": ("model.embed_tokens.weight", "norm")}
    modules = {**_FLAX_STEM}
    for i in range(depth):
        modules |= {f"model.layers.{i}.{own}": f"autoreg_model.transformer_layer_{i}.{name}" for own, name in _FLAX_LAYER.items()}
    for own, name in modules.items():
        norm = "norm" in own
        for kind, called in (("weight", "scale" if norm else "kernel"), ("bias", "bias")):
            official[f"{name}.{called}"] = (f"{own}.{kind}", "norm" if norm or kind == "bias" else "plain")
    attentions, rest = _split_attentions(state_dict, depth)
    rename_keys(rest, (), expected=official)
    state = {own: _to_linear(rest[key], shape) for key, (own, shape) in official.items()}
    for i, layer in enumerate(attentions):
        own_layer = convert_combiner(layer, **options)
        state.update({f"model.layers.{i}.self_attn.{key}": tensor for key, tensor in own_layer.items()})
    return state


def _split_attentions(state_dict: State, depth: int) -> tuple[list[State], State]:
    """The state of each layer's attention, whose module is called after the pattern, and everything else."""
    rest, attentions = dict(state_dict), []
    for i in range(depth):
        layer = f"autoreg_model.transformer_layer_{i}."
        found = (key.removesuffix("query.kernel") for key in rest if key.startswith(layer) and key.endswith(".query.kernel"))
        prefix = next(found, f"{layer}attention.")
        attentions.append({key.removeprefix(prefix): rest.pop(key) for key in list(rest) if key.startswith(prefix)})
    return attentions, rest
