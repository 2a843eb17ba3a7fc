"""Official differential attention: unilm's layers, DiffLlama's layers and models, and both pairings of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_case import make_generic, seeded
from torch import Tensor
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

import attention_zoo as az

SIZES: dict[str, Any] = {"vocab_size": 19, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 4}
LAMBDA = ["lambda_k1", "lambda_k2", "lambda_q1", "lambda_q2"]


def official_model(**options: Any) -> DiffLlamaForCausalLM:
    """Hugging Face's, with random weights; 8 heads on 4, that is 4 differential heads on 2."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None}
    with seeded(0):
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, **heads, rms_norm_eps=1e-5, **options))
    make_generic(model)
    return model.eval()


def ours(state: dict[str, Tensor], **options: Any) -> Any:
    kwargs = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **options}
    model = az.create_model("diffllama", **kwargs).eval()
    model.load_state_dict(az.convert_official_state_dict("diffllama", state, **kwargs), strict=True)
    return model


@pytest.mark.parametrize("attention_kwargs", [{}, {"pairing": "interleaved"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_hugging_faces_model(options: dict[str, Any], attention_kwargs: dict[str, Any]) -> None:
    official, ids = official_model(**options), torch.randint(19, (2, 7))
    state = official.state_dict()
    if options.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    model = ours(state, **options, attention_kwargs=attention_kwargs)
    assert model.model.layers[1].self_attn.pairing == attention_kwargs.get("pairing", "halves")
    torch.testing.assert_close(model(ids).logits, official(ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_hugging_faces_layer(pairing: str) -> None:
    official = official_model().model.layers[1].self_attn
    assert isinstance(official, DiffLlamaAttention)
    kwargs = {"dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "depth": 1, "sub_norm_affine": False, "pairing": pairing}
    module = az.create_attention("diff", **kwargs, is_causal=True)
    module.load_state_dict(az.convert_official_state_dict("diff", official.state_dict(), **kwargs), strict=True)
    x, none = torch.randn(2, 5, 24), torch.zeros(2, 5, 4)
    causal = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    want = official(x, position_embeddings=(none + 1, none), attention_mask=causal)[0]
    torch.testing.assert_close(module(x), want, atol=1e-4, rtol=1e-4)


def test_unilms_names() -> None:
    state = {f"{n}_proj.weight": torch.randn(16, 16) for n in ("q", "k", "v", "out")}
    state |= {name: torch.randn(2) for name in LAMBDA} | {"subln.weight": torch.randn(4)}
    before = dict(state)
    converted = az.convert_official_state_dict("diff", state, dim=16, num_heads=4)
    assert state.keys() == before.keys(), "the input is not modified"
    module = az.create_attention("diff", dim=16, num_heads=4)
    module.load_state_dict(converted, strict=True)
    assert torch.equal(module.o_proj.weight, state["out_proj.weight"])
    assert torch.equal(module.q_proj.weight, state["q_proj.weight"])
    halves = az.convert_official_state_dict("diff", state, dim=16, num_heads=4, pairing="halves")
    assert torch.equal(halves["k_proj.weight"].view(2, 4, 2, 16).transpose(0, 1).flatten(0, 2), state["k_proj.weight"])
    own = {k.replace("out_proj", "o_proj"): v for k, v in state.items()}  # with a sub-norm weight it is no DiffLlama
    assert torch.equal(az.convert_official_state_dict("diff", own, num_heads=4)["k_proj.weight"], state["k_proj.weight"])


def test_version_2() -> None:
    state = {f"{n}_proj.weight": torch.randn(32 if n == "q" else 16, 16) for n in ("q", "k", "v", "o")}
    state["lambda_proj.weight"] = torch.randn(4, 16)
    kwargs = {"dim": 16, "num_heads": 4, "version": "v2"}
    converted = az.convert_official_state_dict("diff", state, **kwargs)
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    az.create_attention("diff", **kwargs).load_state_dict(converted, strict=True)


def test_wrong_keys_are_all_listed() -> None:
    with pytest.raises(az.CheckpointError, match=r"unknown keys: gate; missing keys: k_proj\.weight, lambda_k1, .*v_proj\.weight"):
        az.convert_official_state_dict("diff", {"out_proj.weight": torch.empty(1), "gate": torch.empty(1)}, num_heads=4)
    state = official_model().state_dict()
    del state["model.layers.1.self_attn.lambda_q1"]
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: model\.layers\.1\.self_attn\.lambda_q1$"):
        ours({**state, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"'diff' in every layer, not 'diff', 'gqa'"):
        az.convert_official_state_dict("diffllama", {}, num_hidden_layers=2, attention=["diff", "gqa"])
    with pytest.raises(az.CheckpointError, match="give all layers the same"):
        az.convert_official_state_dict("diffllama", {}, num_hidden_layers=2, attention_kwargs=[{"qk_norm": True}, {}])
