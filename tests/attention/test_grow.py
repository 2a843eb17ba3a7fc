"""Growing signal heads: exactly the same function, in layers, state dicts and whole decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_case import make_generic, rotary_tables, seeded
from parity_case import load_case
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import attention_zoo as az
from attention_zoo.attention import DiffAttention, GroupedDiffAttention, MultiHeadAttention

F64 = torch.float64


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def build(dim: int = 12, num_heads: int = 4, **options: Any) -> GroupedDiffAttention:
    settings = {"num_noise_heads": 2, "num_kv_heads": 1, "head_dim": 4, "qkv_bias": True, "proj_bias": True, "dtype": F64}
    with seeded(0):
        module = GroupedDiffAttention(dim, num_heads, **{**settings, **options})
    make_generic(module)
    return module.eval()


def tokens(length: int = 5) -> Tensor:
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_the_stored_growth() -> None:
    case = load_case("gda/grow_x2")
    name, kwargs = case.arguments()
    module = az.create_attention(name, **kwargs)
    module.load_state_dict(case.convert(case.group("state")))
    x, inputs = case.inputs()
    want = case.group("output")["tokens"]
    tool = {k: v for k, v in case.forward_kwargs.items() if k in {"factor", "split", "noise"}}
    sizes = {k: kwargs[k] for k in ("num_heads", "num_noise_heads", "head_dim")}
    expected = {**case.group("state"), **case.group("grown")}
    grown = az.grow_signal_heads(module, **tool)
    for state in (grown.state_dict(), az.grow_signal_heads(case.group("state"), **tool, **sizes)):
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            close(state[key], tensor, case.tolerance)
    for layer in (module, grown):
        close(layer(x, **{k: v for k, v in inputs.items() if k == "position_embeddings"}), want, case.tolerance)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("split", ["equal", (0.5, 0.2, 0.3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"style": "v2", "lambda_bias": True}, {"lambda_mode": "token"}, {"qk_norm": True}], ids=str
)
def test_growth_changes_nothing(options: dict[str, Any], split: Any, symmetric: bool) -> None:
    module, x = build(**options, is_causal=True, layer_idx=0), tokens()
    grown = az.grow_signal_heads(module, 3, split, symmetric=symmetric)
    assert (grown.num_heads, grown.num_noise_heads, grown.num_kv_heads) == (12, 6 if symmetric else 2, 1)
    tables = tuple(t.double() for t in rotary_tables(5, 4))
    close(grown(x, position_embeddings=tables), module(x, position_embeddings=tables))
    fresh = build(num_heads=12, **options, num_noise_heads=grown.num_noise_heads, is_causal=True)
    fresh.load_state_dict(grown.state_dict(), strict=True)
    close(fresh(x), grown(x), 0)
    assert repr(fresh.q_proj) == repr(grown.q_proj)
    assert repr(fresh.o_proj) == repr(grown.o_proj)
    past, before = DynamicCache(), DynamicCache()
    grown(x, past_key_values=past)
    module(x, past_key_values=before)
    close(past.layers[0].keys, before.layers[0].keys, 0)


def test_state_dict_and_module_agree() -> None:
    module = build()
    for symmetric in (False, True):
        state = az.grow_signal_heads(module.state_dict(), 2, num_heads=4, num_noise_heads=2, head_dim=4, symmetric=symmetric)
        grown = az.grow_signal_heads(module, 2, symmetric=symmetric).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in grown.items())
    assert module.num_heads == 4
    assert module.q_proj.weight.shape == (24, 12)


def test_a_grown_module_keeps_its_state() -> None:
    module = build().train()
    module.q_proj.weight.requires_grad_(False)
    grown = az.grow_signal_heads(module, 2)
    assert grown.training
    assert not grown.q_proj.weight.requires_grad
    assert grown.o_proj.weight.requires_grad
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in grown.parameters())
    twice = az.grow_signal_heads(grown, 2)
    close(twice(tokens()), module(tokens()))
    assert (twice.num_heads, twice.num_noise_heads) == (16, 2)


def test_diff_layers_grow_into_groups() -> None:
    diff = DiffAttention(12, 4, head_dim=4, num_kv_heads=2, pairing="halves", dtype=F64).eval()
    make_generic(diff)
    grown = az.grow_signal_heads(diff, 3)
    assert isinstance(grown, GroupedDiffAttention)
    assert (grown.num_heads, grown.num_noise_heads, grown.num_kv_heads) == (12, 4, 2)
    close(grown(tokens()), diff(tokens()))


def test_noise_separates_the_copies() -> None:
    """Without it copies with equal shares stay equal for ever; with it the first of each stays what it was."""
    module, x = build(), tokens()
    for noise, snr_db in ((0.0, None), (0.01, None), (0.0, 40.0)):
        with seeded(1):
            grown = az.grow_signal_heads(module, 2, noise=noise, snr_db=snr_db)
        rows, old = grown.q_proj.weight.view(2, 5, 4, 12), module.q_proj.weight.view(2, 3, 4, 12)
        close(rows[:, [0, 2, 4]], old, 0)
        off = (rows[:, [1, 3]] - old[:, :2]).std() / old.std()
        assert off == 0 if (noise, snr_db) == (0.0, None) else 0.005 < off < 0.02
        change = (grown(x) - module(x)).abs().max() / module(x).abs().max()
        assert change < 0.1
        grown(x).square().sum().backward()
        gradient = grown.q_proj.weight.grad.view(2, 5, 4, 12)
        assert torch.allclose(gradient[:, 0], gradient[:, 1], atol=1e-12) == (off == 0)


# --- models -----------------------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    **{"vocab_size": 31, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None},
}


def decoder(name: str = "motif", **options: Any) -> Any:
    with seeded(2):
        model = az.create_model(name, **{**TINY, **options})
    make_generic(model)
    return model.eval()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_decoder_grows_with_its_configuration(symmetric: bool, tmp_path: Path) -> None:
    model, ids = decoder(attention_kwargs={"num_noise_heads": 2}), torch.randint(0, 31, (2, 7))
    grown = az.grow_model(model, 3, symmetric=symmetric)
    want = model(ids).logits
    close(grown(ids).logits, want, 1e-4)
    assert (model.config.num_attention_heads, grown.config.num_attention_heads) == (4, 12)
    assert grown.config.attention_kwargs["num_noise_heads"] == (6 if symmetric else 2)
    assert grown.config.num_key_value_heads == 2
    grown.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(loaded(ids).logits, grown(ids).logits, 0)
    with torch.no_grad():
        steps = grown.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(steps, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("listed", [False, True])
def test_layers_that_differ_keep_their_sizes_as_options(listed: bool, tmp_path: Path) -> None:
    options: Any = [{"num_noise_heads": 2}, {"qkv_bias": True}] if listed else None
    model = decoder("llama", attention=["gda", "gqa"], attention_kwargs=options)
    grown = az.grow_model(model, 2)
    ids = torch.randint(0, 31, (1, 5))
    close(grown(ids).logits, model(ids).logits, 1e-4)
    assert grown.config.num_attention_heads == 4
    first, second = grown.config.attention_kwargs
    assert first == {"num_noise_heads": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 4}
    assert second == ({"qkv_bias": True} if listed else {})
    grown.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, grown(ids).logits, 0)


def test_any_module_that_holds_layers_grows() -> None:
    shared = build()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(build(), nn.Linear(12, 3).double()), "again": shared})
    grown = az.grow_model(model, 2, noise=0.0)
    close(grown["b"](tokens()), model["b"](tokens()))
    assert grown["a"] is grown["again"]
    assert grown["a"].num_heads == 8
    assert model["a"].num_heads == 4
    assert grown["b"][1].weight.data_ptr() != model["b"][1].weight.data_ptr()
    vit = az.create_model("vit_tiny_patch16_224", attention="gda", img_size=32, depth=1, num_classes=2).eval()
    x = torch.randn(1, 3, 32, 32)
    close(az.grow_model(vit, 2)(x), vit(x), 1e-4)


def test_refusals() -> None:
    module, state = build(), build().state_dict()
    sizes = {"num_heads": 4, "num_noise_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match=r"factor.*got 0"):
        az.grow_signal_heads(module, 0)
    with pytest.raises(ValueError, match=r"2 shares of sum 1.*\(0.5, 0.6\)"):
        az.grow_signal_heads(module, 2, (0.5, 0.6))
    with pytest.raises(ValueError, match=r"'equal' or 2 shares.*'half'"):
        az.grow_signal_heads(module, 2, "half")
    with pytest.raises(ValueError, match=r"noise=0.1 and snr_db=20"):
        az.grow_signal_heads(module, 2, noise=0.1, snr_db=20)
    with pytest.raises(ValueError, match="noise"):
        az.grow_signal_heads(module, 2, noise=-1.0)
    with pytest.raises(ValueError, match="give num_heads, num_noise_heads and head_dim"):
        az.grow_signal_heads(state, 2)
    with pytest.raises(ValueError, match=r"24 rows.*num_heads=6"):
        az.grow_signal_heads(state, 2, **{**sizes, "num_heads": 6})
    with pytest.raises(ValueError, match=r"lacks o_proj\.weight"):
        az.grow_signal_heads({"q_proj.weight": state["q_proj.weight"]}, 2, **sizes)
    with pytest.raises(ValueError, match="not MultiHeadAttention"):
        az.grow_signal_heads(MultiHeadAttention(12, 4), 2)
    with pytest.raises(ValueError, match="holds no grouped differential attention"):
        az.grow_model(MultiHeadAttention(12, 4), 2)
    module.q_proj = nn.Sequential(module.q_proj)  # what an adapter does
    with pytest.raises(ValueError, match=r"q_proj are no plain linear layers"):
        az.grow_signal_heads(module, 2)
