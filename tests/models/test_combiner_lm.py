"""The Combiner language model: its formula, its configuration, `generate` with and without a cache, saving and training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_case import seeded
from decoder_case import CACHE
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import attention_zoo as az
from attention_zoo.attention import CombinerAttention, MultiHeadAttention
from attention_zoo.models.combiner_lm import CombinerLMConfig, CombinerLMForCausalLM, sinusoids

SIZES: dict[str, Any] = {"vocab_size": 40, "dim": 16, "depth": 2, "num_heads": 4, "mlp_dim": 24, "max_len": 48}
PATTERNS = ("fixed", "axial", "logsparse", "mixture")
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def build(name: str = "combiner_lm", **config: Any) -> Any:
    """A tiny model in evaluation mode, its weights large enough that attention matters."""
    with seeded(0):
        model = az.create_model(name, **{**SIZES, "window_size": 4, **config})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def prompt(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(3))


def generate(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with seeded(5):
        ids: Tensor = model.generate(input_ids, **{"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **kwargs})
    return ids


# --- the model --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"act": "gelu_tanh", "pos_emb": "learned", "attn_bias": True, "tie_embeddings": True}], ids=["jax", "tf"]
)
def test_against_the_formula(options: dict[str, Any]) -> None:
    model, ids = build(**options), prompt()
    stack = model.model
    x = stack.embed_tokens(ids)
    x = x + (stack.embed_positions.weight[:9] if options else sinusoids(torch.arange(9), 16))
    act = (lambda t: torch.nn.functional.gelu(t, approximate="tanh")) if options else torch.relu
    for layer in stack.layers:
        x = x + layer.self_attn(layer.input_layernorm(x))
        x = x + layer.mlp.fc2(act(layer.mlp.fc1(layer.post_attention_layernorm(x))))
    logits = stack.norm(x) @ model.lm_head.weight.T + model.lm_head.bias
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_sinusoids() -> None:
    """Sines first; the lowest frequency is 1 / 10000."""
    table = sinusoids(torch.tensor([0, 3]), 6)
    frequencies = [1.0, 0.01, 0.0001]
    want = [[0.0] * 3 + [1.0] * 3, [math.sin(3 * f) for f in frequencies] + [math.cos(3 * f) for f in frequencies]]
    torch.testing.assert_close(table, torch.tensor(want))
    assert sinusoids(torch.tensor([1]), 2).shape == (1, 2)


def test_number_of_parameters() -> None:
    """As a plain Transformer; axial's projected summaries add 2 C^2 per layer, and their normalisation."""
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in az.create_model("combiner_lm_base", **options).parameters())
            for name, options in (("axial", {}), ("fixed", {"pattern": "fixed"}), ("plain", {"attention": "mha"}))
        }
    embedding, layer = (32000 + 2048) * 768, 4 * 768**2 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert count["plain"] == count["fixed"] == embedding + 12 * layer + 2 * 768 + 32000
    assert count["axial"] - count["fixed"] == 12 * (2 * 768**2 + 4 * 768)


def test_too_many_tokens() -> None:
    model = build()
    assert model(prompt(48)).logits.shape == (2, 48, 40)
    with pytest.raises(ValueError, match=r"49.*max_len=48"):
        model(prompt(49))
    cache = DynamicCache()
    model(prompt(47), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"49.*max_len=48"):
        model(prompt(2), **{CACHE: cache})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(prompt(), inputs_embeds=torch.zeros(2, 9, 16))


@each_pattern
def test_the_future_matters_only_to_an_encoder(pattern: str) -> None:
    ids = prompt(12)
    changed = torch.cat([ids[:, :-1], 1 + ids[:, -1:] % 39], 1)
    decoder, encoder = build(pattern=pattern), build(pattern=pattern, causal=False)
    torch.testing.assert_close(decoder(changed).logits[:, :-1], decoder(ids).logits[:, :-1])
    assert not torch.allclose(encoder(changed).logits[:, 0], encoder(ids).logits[:, 0], atol=1e-4)


def test_other_attention() -> None:
    model = build(attention="mha", attention_kwargs={"qk_norm": True})
    assert all(isinstance(layer.self_attn, MultiHeadAttention) for layer in model.model.layers)
    ids = prompt()
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    with pytest.raises(ValueError, match="'hilo' cannot stand in a language model"):
        build(attention="hilo")


# --- the configuration ------------------------------------------------------------------------------------------------------------


def test_config() -> None:
    config = CombinerLMConfig(hidden_size=32, num_hidden_layers=3, tie_embeddings=True, window_size=8)
    assert (config.dim, config.depth, config.tie_word_embeddings, config.hidden_size) == (32, 3, True, 32)
    assert config.use_cache
    assert not CombinerLMConfig().use_cache, "without a window there is no cache"
    assert CombinerLMConfig(pattern="logsparse").use_cache
    assert not CombinerLMConfig(window_size=8, causal=False).use_cache
    model = az.create_model("combiner_lm", **{**SIZES, "num_heads": 2, "attention_kwargs": {"summary_pool": "mean"}})
    attn = model.model.layers[1].self_attn
    assert isinstance(attn, CombinerAttention)
    assert (attn.summary_pool, attn.num_heads, attn.layer_idx, attn.proj.bias) == ("mean", 2, 1, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"act": "swish"}, "'relu', 'gelu_tanh'.*'swish'"),
        ({"pos_emb": "rope"}, "'sinusoidal', 'learned'.*'rope'"),
        ({"dim": 15, "num_heads": 3}, "even, got 15"),
        ({"pattern": "spiral"}, "'spiral'"),
        ({"attention_kwargs": {"dtype": torch.float16}}, "plain values"),
    ],
)
def test_wrong_configurations(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        az.create_model("combiner_lm", **{**SIZES, **wrong})


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="unknown: widht"):
        az.create_model("combiner_lm", widht=3)
    assert {"combiner_lm", "combiner_lm_tiny", "combiner_lm_base"} <= set(az.list_models("combiner*"))
    assert az.create_model("combiner_lm_tiny", dtype=torch.bfloat16)(prompt()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_bit_exactly(tied: bool, tmp_path: Path) -> None:
    model, ids = build(pattern="axial", tie_embeddings=tied, act="gelu_tanh"), prompt()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, CombinerLMForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config, saved = model.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {**saved, "_name_or_path": ""} == {**config, "_name_or_path": ""}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    options = {**SIZES, "window_size": 4, "pattern": "axial", "act": "gelu_tanh", "tie_embeddings": tied}
    again = az.create_model("combiner_lm", checkpoint_path=tmp_path / "model.safetensors", **options)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


# --- generate ---------------------------------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 8}, {"num_beams": 3}], ids=["greedy", "sample", "beam"])
def test_with_cache_equals_without(pattern: str, how: dict[str, Any]) -> None:
    model, ids = build(pattern=pattern), prompt()
    want = generate(model, ids, use_cache=False, **how)
    assert torch.equal(generate(model, ids, use_cache=True, **how), want)
    assert want[:, 9:].unique().numel() > 2


def test_without_a_window_generate_goes_without_a_cache() -> None:
    model, ids = build(window_size=None), prompt()
    outputs = generate(model, ids, return_dict_in_generate=True)
    assert getattr(outputs, CACHE) is None
    assert outputs.sequences.shape == (2, 18)
    with pytest.raises(ValueError, match="window_size"):
        model(ids, use_cache=True)


def test_a_left_padded_batch_equals_the_prompts_alone() -> None:
    """By whole segments, with positions that start at the first real token."""
    model, ids = build(), prompt(12, 3)
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in (12, 8, 4)])
    batch = generate(model, torch.where(mask.bool(), ids, 0), attention_mask=mask)
    for i, length in enumerate((12, 8, 4)):
        alone = generate(model, ids[i : i + 1, 12 - length :])
        assert batch[i, 12:].tolist() == alone[0, length:].tolist()


def test_chunked_prefill_and_continuing() -> None:
    model, ids = build(pattern="mixture"), prompt(17)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(generate(model, first.sequences, max_new_tokens=5, **{CACHE: first[CACHE]}), generate(model, ids))


# --- training ---------------------------------------------------------------------------------------------------------------------


def test_loss_is_about_the_next_token() -> None:
    model, ids = build(), prompt()
    outputs = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, want)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, outputs.logits[:, -2:])
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(model.lm_head(states[-1]), outputs.logits)


def test_gradient_checkpointing_equals_plain() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(prompt(), labels=prompt()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_lora() -> None:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["qkv", "proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    model.train()(prompt(), labels=prompt()).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for _, p in model.named_parameters() if p.requires_grad)


def test_it_learns() -> None:
    """A few steps on one batch: the loss falls."""
    with seeded(0):
        model = az.create_model("combiner_lm_tiny").train()
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
