"""The swap itself: which layers, what is refused, all or nothing, and what the report counts."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import timm
import torch
from swap_case import assert_same_state, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import attention_zoo as az
from attention_zoo.swap import record, vision


def llama(**kwargs: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 4, "max_position_embeddings": 128, **kwargs})).eval()


def vit(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **kwargs}).eval()


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        (None, [0, 1, 2, 3]),
        (1, [1]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (range(2, 4), [2, 3]),
        ("model.layers.0.*", [0]),
        (["*.3.*", 0, slice(0, 2)], [0, 1, 3]),
    ],
)
def test_layers(layers: Any, want: list[int]) -> None:
    report = az.swap_attention(llama(), "gqa", layers=layers)
    assert [row.name for row in report.layers] == [f"model.layers.{i}.self_attn" for i in want]


def test_mapping_of_layers_to_mechanisms() -> None:
    model = llama()
    report = az.swap_attention(model, {0: "moh", range(1, 3): ("cca", {"group_size": 4}), "*.3.*": "gda"}, attn_drop=0.5)
    assert [row.mechanism for row in report.layers] == ["moh", "cca", "cca", "gda"]
    assert model.model.layers[1].self_attn.mechanism.group_size == 4
    assert [layer.self_attn.mechanism.attn_drop for layer in model.model.layers] == [0.5] * 4


@pytest.mark.parametrize(
    ("attention", "options", "match"),
    [
        ("gqa", {"layers": 9}, "no attention layer is 9; the model has 4"),
        ("gqa", {"layers": "encoder.*"}, "no attention layer is 'encoder"),
        ("gqa", {"layers": []}, "no layer is chosen"),
        ("gqa", {"layers": 1.5}, "layers are numbers"),
        ("gqa", {"init": "zeros"}, "init must be one of 'convert'"),
        ("gqa", {"num_kv_heads": 3}, "model.layers.0.self_attn: 'gqa'.*nearest"),
        ("moh", {"num_kv_heads": 1}, "mean_pool"),
        ("moh", {"init": "mean_pool"}, "num_kv_heads"),
        ("hilo", {}, "needs causal_self"),
        ("dtm", {}, "changes the number of tokens"),
        ({0: "gqa", "*.0.*": "moh"}, {}, "chosen twice"),
        ({0: 3}, {}, "name, or"),
        ({0: "gqa"}, {"layers": 1}, "mapping says its layers"),
        ("nogqa", {}, "no attention is named 'nogqa'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(attention: Any, options: dict[str, Any], match: str) -> None:
    model = llama()
    before, modules = snapshot(model), list(model.modules())
    with pytest.raises(ValueError, match=match):
        az.swap_attention(model, attention, **options)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not hasattr(model.config, "zoo_swap")


def test_unknown_options_are_told_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="did you mean 'group_size'"):
        az.swap_attention(llama(), "cca", groups_size=2)
    with pytest.raises(ValueError, match="plain data"):
        az.swap_attention(llama(), "gqa", norm_layer=nn.LayerNorm)


@pytest.mark.parametrize("step", ["build", "install"])
def test_a_failure_in_the_last_layer_leaves_the_model_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    want, before, modules = model(x), snapshot(model), list(model.modules())
    if step == "build":
        model.blocks[2].attn = timm.layers.Attention(24, num_heads=2).eval()
        want, before, modules = model(x), snapshot(model), list(model.modules())
        options: dict[str, Any] = {"num_kv_heads": 3}
    else:
        install, options = vision.TimmAdapter.install, {}

        def failing(self: Any, model: Any, host: Any, mechanism: Any) -> Any:
            if host.index == 2:
                raise RuntimeError("no")
            return install(self, model, host, mechanism)

        monkeypatch.setattr(vision.TimmAdapter, "install", failing)
    with pytest.raises((ValueError, RuntimeError)):
        az.swap_attention(model, "gqa", **options)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), want)


def test_a_dry_run_reports_and_changes_nothing() -> None:
    model = llama()
    before, state = snapshot(model), torch.get_rng_state()
    report = az.swap_attention(model, "moh", dry_run=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(model, before)
    assert str(report).startswith("would swap")
    again = az.swap_attention(model, "moh")
    assert again.layers == report.layers


def test_the_report_counts_what_is_there() -> None:
    model = vit()
    report = az.swap_attention(model, {0: "moh", 1: "diff", 2: ("moh", {"routed_topk": 1})})
    for row, block in zip(report.layers, model.blocks, strict=True):
        assert row.carried + row.converted + row.new == sum(p.numel() for p in block.attn.mechanism.parameters())
        assert row.removed == 4 * 24 * 24 + 4 * 24
    assert [row.preserving for row in report.layers] == [True, True, False]
    assert (report.layers[0].carried, report.layers[0].converted) == (report.layers[0].removed, 0)
    assert report.layers[1].converted > 0
    assert report.as_dict()["layers"][0]["mechanism"] == "moh"
    assert "blocks.2.attn" in str(report)


def test_the_cache_of_the_report_is_that_of_the_models_report() -> None:
    model = llama()
    report = az.swap_attention(model, {0: "moh", 1: "cca", 2: "gda", 3: ("gqa", {"num_kv_heads": 1})})
    assert report.num_tokens == 128
    assert report.layers[0].cache_bytes_before == 2 * 2 * 8 * 4 * 128
    assert [row.cache_bytes_after for row in report.layers] == [layer.bytes for layer in az.cache_report(model, 128).layers]
    assert report.cache_bytes_per_token[0] == 4 * 2 * 2 * 8 * 4


def test_dtype_mode_and_gradients_are_kept() -> None:
    model = llama().to(torch.bfloat16).requires_grad_(False)
    model.model.layers[1].train().requires_grad_(True)
    az.swap_attention(model, "moh")
    slots = [layer.self_attn for layer in model.model.layers]
    assert [slot.training for slot in slots] == [slot.mechanism.training for slot in slots] == [False, True, False, False]
    assert [any(p.requires_grad for p in slot.parameters()) for slot in slots] == [False, True, False, False]
    assert {p.dtype for p in slots[0].parameters()} == {torch.bfloat16}


def test_unswap() -> None:
    model, ids = llama(), torch.randint(0, 64, (2, 7))
    want, before = model(ids).logits, snapshot(model)
    az.swap_attention(model, "cca", layers=[0, 1], group_size=2)
    az.swap_attention(model, "moh", layers=3)
    with pytest.raises(ValueError, match="swapped already"):
        az.swap_attention(model, "gqa", layers="*.0.*")
    with pytest.raises(ValueError, match="were not kept"):
        az.unswap(copy.deepcopy(model))
    assert az.unswap(model) == [f"model.layers.{i}.self_attn" for i in (0, 1, 3)]
    assert_same_state(model, before)
    assert torch.equal(model(ids).logits, want)
    assert not hasattr(model.config, "zoo_swap")
    with pytest.raises(ValueError, match="no attention layer of this model is swapped"):
        az.unswap(model)


def test_unswap_follows_the_model() -> None:
    model = llama()
    az.swap_attention(model, "gqa")
    model.to(torch.float64)
    az.unswap(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_originals_need_not_be_kept() -> None:
    model = llama()
    az.swap_attention(model, "gqa", keep_original=False)
    with pytest.raises(ValueError, match="were not kept"):
        az.unswap(model)


def test_random_and_mean_pooled_starts() -> None:
    model = llama()
    report = az.swap_attention(llama(num_key_value_heads=4), "mha", init="random")
    assert all(row.new > 0 and row.carried == row.converted == 0 and row.preserving is False for row in report.layers)
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    report = az.swap_attention(model, "gda", init="mean_pool", num_kv_heads=1)
    pooled = model.model.layers[0].self_attn.mechanism.k_proj.weight
    torch.testing.assert_close(pooled, weight.unflatten(0, (2, 8)).mean(0))
    assert {row.preserving for row in report.layers} == {False}


def test_models_without_known_attention() -> None:
    with pytest.raises(ValueError, match="no attention layer of a kind that is known"):
        az.swap_attention(nn.Linear(2, 2), "gqa")


def test_models_of_one_configuration_are_apart() -> None:
    config = llama().config
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    az.swap_attention(model, "gqa")
    assert model.config is not config
    assert model.config is model.model.config is model.model.layers[0].mlp.config
    assert not hasattr(config, "zoo_swap")
    assert not hasattr(other.config, "zoo_swap")
    with pytest.raises(ValueError, match="no attention layer of this model is swapped"):
        az.unswap(other)
    assert az.swap_attention(other.model, "moh", layers=0).layers[0].name == "layers.0.self_attn"
    assert [entry["mechanism"] for entry in other.config.zoo_swap] == ["moh"]
    assert {entry["mechanism"] for entry in model.config.zoo_swap} == {"gqa"}
    assert not hasattr(config, "zoo_swap")


def test_parts_and_wholes_unswap_each_other() -> None:
    model = llama()
    az.swap_attention(model.model, "gqa", layers=0)
    az.swap_attention(model, "gqa", layers=1)
    assert [entry["name"] for entry in model.config.zoo_swap] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert az.unswap(model.model.layers[0]) == ["self_attn"]
    assert [entry["name"] for entry in model.config.zoo_swap] == ["layers.1.self_attn"]
    assert az.unswap(model) == ["model.layers.1.self_attn"]
    assert (type(model), type(model.model)) == (LlamaForCausalLM, LlamaModel)


def test_copies_hold_no_originals_and_swapped_models_are_freed_at_once() -> None:
    model = llama()
    original = weakref.ref(model.model.layers[0].self_attn)
    az.swap_attention(model, "gqa")
    twin = copy.deepcopy(model)
    assert all(slot.undo is None for slot in record.slots_of(twin).values())
    assert original() is not None
    gc.collect()
    gc.disable()
    try:
        slots = [weakref.ref(slot) for slot in record.slots_of(model).values()]
        del model
        assert original() is None
        assert all(slot() is None for slot in slots)
    finally:
        gc.enable()
    vision = vit()
    az.swap_attention(vision, "agent", agent_num=4, window_size=4)
    kept = weakref.ref(vision.blocks[0].attn)
    gc.collect()
    gc.disable()
    try:
        del vision
        assert kept() is None
    finally:
        gc.enable()


def test_originals_that_are_not_kept_are_freed() -> None:
    model = llama()
    original = weakref.ref(model.model.layers[0].self_attn)
    az.swap_attention(model, "gqa", keep_original=False)
    gc.collect()
    assert original() is None


def test_offloaded_layers_are_refused() -> None:
    from accelerate import cpu_offload

    model, ids = llama(), torch.randint(0, 64, (2, 7))
    want = model(ids).logits
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="its weights are offloaded"):
        az.swap_attention(model, "gqa")
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("options", [{}, {"router": "linear"}])
def test_a_decoder_starts_with_the_papers_options_for_it(options: dict[str, Any]) -> None:
    model, ids = llama(), torch.randint(0, 64, (2, 7))
    want = model(ids).logits
    report = az.swap_attention(model, "moh", layers=0, **options)
    assert model.model.layers[0].self_attn.mechanism.router_kind == options.get("router", "query_norm")
    assert (report.layers[0].new == 0) == (not options)  # ranking the queries' norms needs no weights
    torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("trained", ["bias", "v_proj", "o_proj", "q_proj"])
@pytest.mark.parametrize("mechanism", ["mha", "gda", "moh"])
def test_frozen_parts_of_a_layer_stay_frozen(mechanism: str, trained: str) -> None:
    """A parameter that comes from frozen tensors only is frozen; what is made of both, or is new, is not."""
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    az.swap_attention(model, mechanism, layers=0)
    said = {name: p.requires_grad for name, p in model.model.layers[0].self_attn.mechanism.named_parameters()}
    for name, learns in said.items():
        layer, _, kind = name.rpartition(".")
        sources = {"qkv": "q_proj k_proj v_proj", "proj": "o_proj"}.get(layer, layer) if kind in ("weight", "bias") else ""
        if "proj" in sources:
            assert learns == any(trained in f"{source}.{kind}" for source in sources.split()), name
        else:
            assert learns, name


@pytest.mark.parametrize(
    ("model", "attention", "options", "error", "match"),
    [
        ("llama", "gqa", {}, TypeError, "an nn.Module, is swapped; got str"),
        (None, ["gqa"], {}, TypeError, "a mechanism's name or a mapping"),
        (None, {}, {}, ValueError, "the mapping is empty"),
        (None, "gqa", {"aux_loss_coef": "much"}, ValueError, "aux_loss_coef is a weight"),
    ],
)
def test_wrong_arguments_are_named(model: Any, attention: Any, options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        az.swap_attention(llama() if model is None else model, attention, **options)


def test_numbers_of_numpy_choose_layers() -> None:
    report = az.swap_attention(llama(), "gqa", layers=np.arange(1, 3), dry_run=True)
    assert [row.name for row in report.layers] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert repr(report) == str(report)
