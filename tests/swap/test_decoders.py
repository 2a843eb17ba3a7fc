"""Hugging Face's decoders as hosts: what is found, what is refused, the function kept, and generation with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from marks import covering, slow_but
from swap_case import assert_same_state, shake, snapshot
from transformers import StaticCache

import attention_zoo as az
from attention_zoo.registry import attention_class
from attention_zoo.swap.core import find_hosts

# Its name since transformers 5.24, and before.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = {"query_pre_attn_scalar": 20, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}


def decoder(name: str, **changes: Any) -> Callable[[], Any]:
    def make(**more: Any) -> Any:
        kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
        config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**{**SIZES, **changes, **more})
        model = kind(config).eval()
        shake(model)
        return model

    return make


HOSTS = {
    "llama": decoder("Llama", attention_bias=True),
    "mistral": decoder("Mistral", sliding_window=5),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3", head_dim=16),
    "gemma": decoder("Gemma", head_dim=8),
    "gemma2": decoder("Gemma2", attn_logit_softcapping=None, **MIXED),
    "gemma3": decoder("Gemma3", **MIXED),
    "phi3": decoder("Phi3"),
    "gpt2": decoder(
        "GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True, num_key_value_heads=4
    ),
}
# Options with which a mechanism computes what the softmax attention did, for all 128 tokens.
PRESERVING: dict[str, dict[str, Any]] = {
    "cca": {"window_size": 128},
    "combiner": {"window_size": 128},
    "dgqa": {"num_kv_heads": None},
    "diff": {},
    "gda": {},
    "gqa": {"num_kv_heads": None},
    "mha": {},
    "moh": {},
    "pgqa": {"num_kv_heads": None},
}
REFUSED = {
    ("mistral", "cca"), ("mistral", "combiner"), ("gemma2", "cca"), ("gemma2", "combiner"), ("gemma3", "cca"),
    ("gemma3", "combiner"), ("gemma3", "diff"), ("gemma3", "gda"), ("qwen3", "cca"), ("qwen3", "combiner"), ("qwen3", "diff"),
    ("qwen3", "gda"),
}  # fmt: skip
CAUSAL = [name for name in az.list_attentions(pattern="causal_self") if hasattr(attention_class(name), "from_softmax_attention")]
PAIRS = [(host, name) for host in HOSTS for name in CAUSAL]


def options_for(model: Any, name: str) -> dict[str, Any]:
    options = dict(PRESERVING.get(name, {}))
    if "num_kv_heads" in options:
        options["num_kv_heads"] = find_hosts(model)[0].num_kv_heads
    return options


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask; the second sequence starts later."""
    ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return ids, mask


@pytest.mark.parametrize("kind", HOSTS)
def test_layers_are_found_and_described(kind: str) -> None:
    model = HOSTS[kind]()
    hosts = find_hosts(model)
    assert [(host.index, host.layer_idx, host.refuse, host.is_causal) for host in hosts] == [(0, 0, None, True), (1, 1, None, True)]
    assert [host.window_size for host in hosts] == {"mistral": [5, 5], "gemma2": [5, None], "gemma3": [5, None]}.get(
        kind, [None] * 2
    )
    for host in hosts:
        assert (host.dim, host.num_heads, host.qk_norm, host.rope) == (32, 4, kind in ("qwen3", "gemma3"), kind != "gpt2")
        state = host.adapter.softmax_state(host)
        assert state["q_proj.weight"].shape == (4 * host.head_dim, 32)
        assert state["k_proj.weight"].shape == (host.num_kv_heads * host.head_dim, 32)
        assert ("q_proj.bias" in state, "o_proj.bias" in state) == (host.qkv_bias, host.proj_bias)


@pytest.mark.parametrize(("kind", "name"), slow_but(covering(PAIRS), PAIRS))
def test_every_mechanism_in_every_host(kind: str, name: str) -> None:
    """Forward and backward, padding, the function where it can be kept, generation, and the very same model after undoing."""
    model = HOSTS[kind]()
    ids, mask = padded()
    want, before = model(ids, attention_mask=mask).logits, snapshot(model)
    if (kind, name) in REFUSED:
        with pytest.raises(ValueError, match=r"window|normalises"):
            az.swap_attention(model, name)
        assert_same_state(model, before)
        return
    report = az.swap_attention(model, name, **options_for(model, name))
    got = model(ids, attention_mask=mask).logits
    if name in PRESERVING:
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-5, rtol=1e-4)
        assert all(row.preserving for row in report.layers)
    got[mask.bool()].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings))
    az.unswap(model)
    assert_same_state(model, before)
    assert torch.equal(model(ids, attention_mask=mask).logits, want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "zoo"])
@pytest.mark.parametrize(("kind", "name"), [("llama", "cca"), ("llama", "moh"), ("gemma3", "gqa"), ("mistral", "gda")])
def test_masks_of_every_implementation(kind: str, name: str, implementation: str) -> None:
    model = HOSTS[kind]()
    model.set_attn_implementation(implementation)
    ids, mask = padded()
    want = model(ids, attention_mask=mask).logits[mask.bool()]
    az.swap_attention(model, name, **options_for(model, name))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], want, atol=2e-5, rtol=1e-4)


def test_static_caches() -> None:
    model = HOSTS["llama"]()
    ids, _ = padded()
    az.swap_attention(model, "moh")
    cache = StaticCache(config=model.config, max_cache_len=16)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    got = model.generate(ids, **{CACHE: cache}, **settings)
    assert torch.equal(got, model.generate(ids, use_cache=False, **settings))
    az.unswap(model)
    az.swap_attention(model, "cca")
    with pytest.raises(ValueError, match="cannot use a static cache"):
        model.generate(ids, **{CACHE: StaticCache(config=model.config, max_cache_len=16)}, **settings)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (decoder("Gemma2", head_dim=8), "softcap=50"),
        (decoder("Phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), "50%"),
        (decoder("Olmo2"), "family that is not known"),
        (decoder("Gemma3", head_dim=8, use_bidirectional_attention=True), "both directions"),
    ],
)
def test_what_would_be_lost_is_refused(make: Callable[[], Any], match: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        az.swap_attention(model, "gqa")
    assert_same_state(model, before)


def test_packed_sequences_are_not_lost() -> None:
    model = HOSTS["llama"]()
    ids = torch.randint(3, 64, (1, 8))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    want = model(ids, position_ids=positions, use_cache=False).logits
    az.swap_attention(model, "gqa")
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, want, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 8]))


@pytest.mark.parametrize("name", ["cca", "moh"])
def test_gradient_checkpointing(name: str) -> None:
    model = HOSTS["llama"]()
    ids, _ = padded()
    az.swap_attention(model, name)
    model.train()
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        if key in want:
            torch.testing.assert_close(parameter.grad, want[key])


@pytest.mark.parametrize("name", ["cca", "gda"])
def test_lora(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = HOSTS["llama"]()
    ids, _ = padded()
    az.swap_attention(model, name)
    want = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.testing.assert_close(adapted.eval()(ids).logits, want, atol=2e-5, rtol=1e-4)
    adapted(ids, labels=ids).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in n for n in trained)
