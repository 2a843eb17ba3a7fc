"""Official grouped differential attention: the published Motif models' keys convert and load, in every layer and option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "motif.json").read_text())
TINY: dict[str, Any] = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_kwargs": {"num_noise_heads": 2}}


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_models_load(name: str) -> None:
    """Keys and shapes as derived from the public ports; tied models have no lm_head.weight."""
    manifest = MANIFESTS[name]
    keys = dict(manifest["others"])
    keys |= {f"model.layers.{i}.{k}": shape for i in range(manifest["layers"]) for k, shape in manifest["layer"].items()}
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)
    layer = model.model.layers[0].self_attn
    assert (layer.lambda_init, layer.is_causal) == (pytest.approx(-0.00991528), True)


def tiny(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a tiny Motif under the official names, which are ours, and its arguments."""
    kwargs = {**TINY, **HEADS, **options}
    model = az.create_model("motif", **kwargs)
    return {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}, kwargs


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "silu"}, {"attention_bias": True, "mlp_bias": True}, {"attention_kwargs": [{"num_noise_heads": 2}, {}]}],
    ids=str,
)
def test_options_that_change_keys(options: dict[str, Any]) -> None:
    state, kwargs = tiny(**options)
    converted = az.convert_official_state_dict("motif", state, **kwargs)
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    az.create_model("motif", **kwargs).load_state_dict(converted, strict=True)


def test_tied_embeddings() -> None:
    state, kwargs = tiny(tie_word_embeddings=True)
    del state["lm_head.weight"]
    converted = az.convert_official_state_dict("motif", state, **kwargs)
    assert converted["lm_head.weight"] is state["model.embed_tokens.weight"]
    az.create_model("motif", **kwargs).load_state_dict(converted, strict=True)


@pytest.mark.parametrize("options", [{}, {"style": "v2", "lambda_bias": True}, {"qkv_bias": True, "sub_norm": False}], ids=str)
def test_layers(options: dict[str, Any]) -> None:
    kwargs = {"dim": 16, "num_heads": 4, **options}
    module = az.create_attention("gda", **kwargs)
    state = {key: torch.randn_like(tensor) for key, tensor in module.state_dict().items()}
    module.load_state_dict(az.convert_official_state_dict("gda", state, **kwargs), strict=True)
    assert torch.equal(module.q_proj.weight, state["q_proj.weight"])


def test_wrong_keys_are_all_listed() -> None:
    state, kwargs = tiny()
    del state["model.layers.0.mlp.act_fn.bias"], state["model.norm.weight"]
    message = r"unknown keys: gate; missing keys: model\.layers\.0\.mlp\.act_fn\.bias, model\.norm\.weight$"
    with pytest.raises(az.CheckpointError, match=message):
        az.convert_official_state_dict("motif", {**state, "gate": torch.empty(1)}, **kwargs)
    with pytest.raises(az.CheckpointError, match=r"'gda' in every layer, not 'mha'"):
        az.convert_official_state_dict("motif", state, **{**kwargs, "attention": "mha"})
    with pytest.raises(az.CheckpointError, match=r"missing keys: k_proj\.weight"):
        az.convert_official_state_dict("gda", {}, dim=16, num_heads=4)
