"""Core-context-aware decoders: checkpoints of the models of the paper, which are Hugging Face's own, load as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_case import load_case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "cca.json").read_text())
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"window_size": 4, "group_size": 3}


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_models_load(name: str) -> None:
    manifest = MANIFESTS[name]
    keys = dict(manifest["others"])
    for i in range(manifest["num_layers"]):
        keys |= {f"model.layers.{i}.{key}": shape for key, shape in manifest["layer"].items()}
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    converted = az.convert_official_state_dict(name, state)
    assert converted.keys() == state.keys(), "no key changes"
    model.load_state_dict(converted, strict=True, assign=True)
    assert [layer.self_attn.rope_theta for layer in model.model.layers] == [None] * manifest["num_layers"]


def test_before_the_swap() -> None:
    """The stored logits_softmax_attention: of the same model with softmax attention, equal while no token sees a core token."""
    case = load_case("llama_cca/tiny_gqa")
    _, kwargs = case.arguments()
    options = kwargs.pop("attention_kwargs")
    want, ids = case.group("output"), case.group("input")["input_ids"]
    softmax = az.create_model("llama", attention="gqa", **kwargs).eval()
    softmax.load_state_dict(az.convert_official_state_dict("llama", case.group("state"), attention="gqa", **kwargs))
    torch.testing.assert_close(softmax(ids).logits, want["logits_softmax_attention"], atol=case.tolerance, rtol=0)
    equal = options["window_size"] + options["group_size"] - 1
    off = (want["logits"] - want["logits_softmax_attention"]).abs().amax((0, 2))
    assert off[:equal].max() < case.tolerance < off[equal:].min()


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen2"])
def test_hugging_faces_checkpoints_load(kind: str, tied: bool) -> None:
    """On sequences without a core token, logits are those of the model that the checkpoint comes from."""
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama-biases" else {}
    if kind == "qwen2":
        source: Any = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=tied))
        own: dict[str, Any] = {"attention_kwargs": {"qkv_bias": True, **WINDOW}, "rms_norm_eps": source.config.rms_norm_eps}
    else:
        source = LlamaForCausalLM(LlamaConfig(**TINY, **biases, tie_word_embeddings=tied))
        own = {"attention_kwargs": WINDOW, **biases}
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0.0, 0.2)
    state = {k: v for k, v in source.state_dict().items() if not (tied and k == "lm_head.weight")}  # as saved
    kwargs = {**TINY, **own, "tie_word_embeddings": tied}
    model = az.create_model("llama_cca", **kwargs).eval()
    converted = az.convert_official_state_dict("llama_cca", state, **kwargs)
    assert converted.keys() == state.keys() | {"lm_head.weight"}
    model.load_state_dict(converted, strict=True)
    ids = torch.randint(0, 40, (2, 9))
    got, want = (m(ids).logits for m in (model, source.eval()))
    torch.testing.assert_close(got[:, :6], want[:, :6], atol=1e-4, rtol=1e-4)
    assert (got - want)[:, 6:].abs().max() > 1e-3


def layer_state(**biases: bool) -> dict[str, Tensor]:
    return az.create_attention("cca", dim=16, num_heads=4, num_kv_heads=2, **biases).state_dict()


def test_layers() -> None:
    for biases in ({}, {"qkv_bias": True}, {"qkv_bias": True, "proj_bias": True}):
        state = layer_state(**biases)
        kwargs: dict[str, Any] = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "window_size": 8, **biases}
        converted = az.convert_official_state_dict("cca", state, **kwargs)
        assert converted.keys() == state.keys()
        az.create_attention("cca", **kwargs).load_state_dict(converted, strict=True)
    with pytest.raises(az.CheckpointError, match=r"unknown keys: k_proj\.bias, q_proj\.bias, v_proj\.bias"):
        az.convert_official_state_dict("cca", layer_state(qkv_bias=True), dim=16, num_heads=4)
    with pytest.raises(az.CheckpointError, match=r"missing keys: o_proj\.bias"):
        az.convert_official_state_dict("cca", layer_state(), dim=16, num_heads=4, proj_bias=True)


def test_refusals() -> None:
    state = az.create_model("llama_cca", **TINY).state_dict()
    with pytest.raises(az.CheckpointError, match=r"'cca' in every layer, not 'gqa'"):
        az.convert_official_state_dict("llama_cca", state, **TINY, attention="gqa")
    with pytest.raises(az.CheckpointError, match="give all layers the same proj_bias, qkv_bias"):
        az.convert_official_state_dict("llama_cca", state, **TINY, attention_kwargs=[{}, {"qkv_bias": True}])
    with pytest.raises(az.CheckpointError, match=r"unknown keys: model\.layers\.1\."):
        az.convert_official_state_dict("llama_cca", state, **{**TINY, "num_hidden_layers": 1})
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert az.convert_official_state_dict("llama_cca", old, **TINY).keys() == state.keys()


def test_options_add_to_those_of_the_name() -> None:
    """The biases of Qwen2 are the name's, whatever else is given, for all layers or for each."""
    sizes = {**TINY, "num_hidden_layers": 2}
    for options in (WINDOW, [WINDOW, None]):
        model = az.create_model("cca_qwen2_5_7b", **sizes, attention_kwargs=options)
        converted = az.convert_official_state_dict("cca_qwen2_5_7b", model.state_dict(), **sizes, attention_kwargs=options)
        assert "model.layers.1.self_attn.q_proj.bias" in converted
        model.load_state_dict(converted, strict=True)
