"""Mechanisms as functions in Hugging Face's attention interface: the swap's results, under every mask and cache that a host has."""

from __future__ import annotations

import copy
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_but
from swap_case import shake
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

import attention_zoo as az
from attention_zoo.attention import functional as functional_module
from attention_zoo.attention.base import merge_heads, split_heads
from attention_zoo.attention.functional import pure_function, pure_functions
from attention_zoo.cli import app
from attention_zoo.swap.core import find_hosts

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    "num_channels": 3,
}  # fmt: skip


def decoder(name: str, **changes: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
        config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
        return build(kind, config(**{**SIZES, **changes, **more}))

    return make


def image_encoder(name: str, **changes: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**IMAGES, **changes, **more})
        return build(getattr(transformers, f"{name}Model"), config)

    return make


def build(kind: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    shake(model)
    return model


FULL = {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 20, "head_dim": 8}
BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama": decoder("Llama", attention_bias=True),
    "mistral": decoder("Mistral", sliding_window=None),
    "qwen3": decoder("Qwen3", head_dim=16),
    "gemma2": decoder("Gemma2", attn_logit_softcapping=None, **FULL),
    "gemma3": decoder("Gemma3", **FULL),
    "gpt2": decoder(
        "GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True, num_key_value_heads=4
    ),
}
ENCODERS = {
    "bert": lambda **more: build(transformers.BertModel, transformers.BertConfig(**{**BERT, **more})),
    "vit": image_encoder("ViT"),
    "deit": image_encoder("DeiT"),
    "clip": image_encoder("CLIPVision"),
    "siglip": image_encoder("SiglipVision"),
    "dinov2": image_encoder("Dinov2"),
    "registers": image_encoder("Dinov2WithRegisters", num_register_tokens=2),
}
HOSTS = {**DECODERS, **ENCODERS}
# Name -> mechanism, its options as a function, and what the swapped mechanism needs besides to be the same function.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "zoo_cca_t": ("cca", {"window_size": 3, "group_size": 2}, {}),
    "zoo_cca_kv_t": ("cca", {"window_size": 2, "group_size": 3, "core_per": "kv"}, {}),
    "zoo_cca_mean_t": ("cca", {"window_size": 2, "group_size": 3, "pool": "mean"}, {}),
    "zoo_cca_max_t": ("cca", {"window_size": 0, "group_size": 2, "pool": "max"}, {}),
    "zoo_combiner_t": ("combiner", {"window_size": 3}, {}),
    "zoo_combiner_relu_t": ("combiner", {"window_size": 3, "summary_act": "relu", "summary_pool": "mean"}, {}),
    "zoo_combiner_axial_t": ("combiner", {"window_size": 4, "pattern": "axial", "row_summary": "wsum"}, {}),
    "zoo_combiner_log_t": ("combiner", {"pattern": "logsparse"}, {}),
    "zoo_combiner_mix_t": ("combiner", {"pattern": "mixture", "window_size": 4}, {}),
    "zoo_gqa_t": ("gqa", {"num_kv_heads": 1}, {}),
    "zoo_kdgqa": ("kdgqa", {}, {}),
    "zoo_kdgqa_t": ("kdgqa", {"num_kv_heads": 2, "alloc_scope": "sample"}, {}),
    "zoo_pgqa": ("pgqa", {}, {}),
    "zoo_agent_t": ("agent", {"agent_num": 4}, {"use_bias": False, "use_dwc": False, "window_size": (4, 4)}),
    "zoo_bra_t": ("bra", {"n_win": 2, "topk": 1}, {"side_dwconv": 0}),
    "zoo_bra_soft_t": ("bra", {"n_win": 3, "topk": 2, "soft_routing": True, "diff_routing": True}, {"side_dwconv": 0}),
    "zoo_halo_t": ("halo", {"block_size": 2, "halo_size": 1}, {}),
    "zoo_halo_unmasked_t": ("halo", {"block_size": 2, "halo_size": 1, "mask_padding": False}, {}),
}  # fmt: skip
for _name, (_mechanism, _options, _) in CASES.items():
    if _options:
        az.register_functional(_name, _mechanism, **_options)
ONE_OF_EACH = [
    ("llama", "zoo_cca_t"),
    ("llama", "zoo_cca_mean_t"),
    ("llama", "zoo_combiner_t"),
    ("llama", "zoo_gqa_t"),
    ("bert", "zoo_kdgqa"),
    ("bert", "zoo_agent_t"),
    ("vit", "zoo_bra_t"),
    ("vit", "zoo_halo_t"),
]
CACHED = ("zoo_cca_mean_t", "zoo_cca_max_t", "zoo_gqa_t")
SEQUENCE = [name for name, (mechanism, _, _) in CASES.items() if mechanism in ("cca", "combiner")]
QUICK = {"llama", "bert", "vit"}


def fits(host: str, name: str) -> bool:
    mechanism, options, _ = CASES[name]
    info, causal = az.attention_info(mechanism), host in DECODERS
    if host in ("qwen3", "gemma3"):
        return False  # normalised keys are not averaged, and the other modules have no place for the host's norms
    if host == "bert" and options.get("pattern") in ("axial", "mixture"):
        return False  # rows would have to be full
    if ("causal_self" if causal else "noncausal_self") not in info.patterns or (mechanism == "kdgqa" and causal):
        return False
    if mechanism in ("bra", "halo"):
        return host in ENCODERS and host != "bert"
    if mechanism == "agent" and host == "bert":
        return bool(getattr(info, "sequence_options", None))  # whether a swap knows of it
    return mechanism in ("agent", "kdgqa", "gqa", "pgqa") or host in DECODERS or host == "bert"


def inputs_of(host: str, padding: str | None = None) -> dict[str, Any]:
    torch.manual_seed(1)
    if host in ENCODERS and host != "bert":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, 64, (2, 15))}
    if padding is not None:
        mask = torch.ones(2, 15, dtype=torch.long)
        mask[0, slice(0, 4) if padding == "left" else slice(11, None)] = 0
        mask[1, slice(0, 1) if padding == "left" else slice(14, None)] = 0
        inputs["attention_mask"] = mask
    return inputs


def run(model: nn.Module, inputs: dict[str, Any], seed: int = 0, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of the real tokens, and the gradients of what two forms of a model have in common."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**inputs, **more)[0]
    out = out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out
    (out.double() * torch.linspace(-1, 1, out.shape[-1], dtype=torch.float64)).square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got[0], want[0], atol=tolerance * float(want[0].abs().max()), rtol=0)
    shared = got[1].keys() & want[1].keys()
    assert len(shared) > 10
    for name in shared:
        scale = max(float(want[1][name].abs().max()), 1e-2 * max(float(t.abs().max()) for t in want[1].values()))
        torch.testing.assert_close(got[1][name], want[1][name], atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def functional(host: str, name: str, **config: Any) -> Any:
    model: Any = HOSTS[host](**config)
    model.set_attn_implementation(name)
    return model


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids, **more).logits
    return out


# --- the same as a swap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name"),
    [
        pytest.param(host, name, marks=[] if host in QUICK else pytest.mark.slow)
        for host in HOSTS
        for name in CASES
        if fits(host, name)
    ],
)
def test_a_functional_is_the_swap(host: str, name: str) -> None:
    """Outputs and gradients, with and without padding; the swapped model has the masks of sdpa."""
    mechanism, options, besides = CASES[name]
    swapped = HOSTS[host]()
    if not find_hosts(swapped):
        pytest.skip("a host that a swap does not know, in this transformers")
    if mechanism == "agent" and host == "bert":
        besides = {**besides, "window_size": None}
    az.swap_attention(swapped, mechanism, **options, **besides)
    model = functional(host, name)
    text = host in DECODERS or host == "bert"
    for padding in (None, "left", "right") if text else (None,):
        inputs = inputs_of(host, padding)
        assert_same(run(model, inputs), run(swapped, inputs))


@pytest.mark.parametrize("pooling", ["avgpool", "ada_maxpool"])
def test_bra_pools_keys_as_its_module_does(pooling: str) -> None:
    """A conversion refuses to; the module itself is what it is compared with."""
    options = {"n_win": 2, "topk": 2, "kv_downsample": pooling, "kv_downsample_ratio": 2, "kv_per_win": 2}
    module = az.create_attention("bra", 16, 2, side_dwconv=0, out_proj=False, qk_scale=8**-0.5, **options)
    x = torch.randn(2, 24, 16)
    q, k, v = (split_heads(t, 2) for t in module.qkv(x).chunk(3, dim=-1))
    out = pure_functions()["bra"].compute(q, k, v, grid_size=(4, 6), num_prefix_tokens=0, scale=None, dropout_p=0.0, **options)
    torch.testing.assert_close(merge_heads(out), module(x, grid_size=(4, 6)))


def test_chunked_models_are_refused() -> None:
    """Llama 4 says its chunks in the masks only."""
    from transformers.masking_utils import create_chunked_causal_mask

    model = functional("llama", "zoo_cca_t")
    model.config.attention_chunk_size = 4
    embeds = torch.zeros(1, 6, 32)
    positions = torch.arange(6)[None]
    cache = {CACHE: None} if CACHE in inspect.signature(create_chunked_causal_mask).parameters else {"past_key_values": None}
    mask = create_chunked_causal_mask(model.config, embeds, attention_mask=None, position_ids=positions, **cache)
    with pytest.raises(ValueError, match="windows or chunks"):
        model(torch.randint(1, 64, (1, 6)), attention_mask=mask)


@pytest.mark.parametrize("host", ["qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("mechanism", "options"), [("cca", {"window_size": 3, "group_size": 1}), ("combiner", {"window_size": 16})]
)
def test_hosts_that_normalise_queries_and_keys(host: str, mechanism: str, options: dict[str, Any]) -> None:
    """No swap takes them; with settings that leave softmax attention they compute what the host does."""
    name = f"zoo_{mechanism}_plain_t"
    az.register_functional(name, mechanism, **options)
    inputs = {**inputs_of(host, "left"), "use_cache": False}
    assert_same(run(functional(host, name), inputs), run(functional(host, "eager"), inputs))


def test_gqa_keeps_grouped_heads_and_is_then_softmax() -> None:
    ids = inputs_of("qwen3")["input_ids"]
    torch.testing.assert_close(logits(functional("qwen3", "zoo_gqa"), ids), logits(functional("qwen3", "eager"), ids))


def test_models_know_the_names_from_the_first() -> None:
    config = transformers.LlamaConfig(**SIZES, attn_implementation="zoo_cca")
    assert transformers.LlamaForCausalLM(config).config._attn_implementation == "zoo_cca"


def test_from_pretrained(tmp_path: Any) -> None:
    model = functional("llama", "zoo_cca_mean_t")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="zoo_cca_mean_t")
    ids = inputs_of("llama")["input_ids"]
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))


# --- packing ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEQUENCE, "zoo_gqa_t"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    """Each is grouped from its own first token, forward and backward."""
    ids = torch.randint(1, 64, (2, 17))
    sizes = [(6, 11), (1, 9, 7)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])
    model = functional("llama", name)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    packed.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row, (tokens, split) in enumerate(zip(ids, sizes, strict=True)):
        alone = torch.cat([model(part[None]).logits[0] for part in tokens.split(split)])
        torch.testing.assert_close(packed[row], alone, atol=1e-5, rtol=1e-5)
        alone.square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, atol=1e-4, rtol=1e-3)


def test_documents_must_be_told_by_positions() -> None:
    model, ids = functional("llama", "zoo_cca_t"), torch.randint(1, 64, (1, 8))
    with pytest.raises(ValueError, match="by their position_ids"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 8], dtype=torch.int32))
    az.register_functional("zoo_combiner_log_none_t", "combiner", window_size=None)
    model.set_attn_implementation("zoo_combiner_log_none_t")
    with pytest.raises(ValueError, match="give window_size"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)


# --- caches -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("host", ["llama", *(pytest.param(h, marks=pytest.mark.slow) for h in DECODERS if h != "llama")])
def test_steps_with_a_cache_are_rows_of_the_whole(host: str, name: str) -> None:
    """Prefill, a chunk, then token by token, with dynamic and preallocated caches, padded on the left."""
    if name == "zoo_gqa_t" and host in ("qwen3", "gemma3"):
        pytest.skip("normalised keys are not averaged")
    model, inputs = functional(host, name), inputs_of(host, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for padded in (False, True):
        own = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if padded else {}
        want = logits(model, ids, **own)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=23)):
            rows, ends = [], [0, 5, 8, *range(9, 16)]
            for start, stop in itertools.pairwise(ends):
                step = {k: t[:, :stop] if k == "attention_mask" else t[:, start:stop] for k, t in own.items()}
                rows.append(logits(model, ids[:, start:stop], **{CACHE: cache}, **step))
            got = torch.cat(rows, 1)
            real = mask.bool() if padded else torch.ones_like(ids, dtype=torch.bool)
            torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CACHED)
def test_generation(name: str) -> None:
    model, inputs = functional("llama", name), inputs_of("llama", "left")
    common = {"max_new_tokens": 8, "do_sample": False, **inputs}
    want = model.generate(use_cache=False, **common)
    assert torch.equal(model.generate(**common), want)
    assert torch.equal(model.generate(cache_implementation="static", **common), want)
    assert torch.equal(model.generate(prefill_chunk_size=4, **common), want)
    beams = {"num_beams": 3, **common}
    assert torch.equal(model.generate(**beams), model.generate(use_cache=False, **beams))


@pytest.mark.parametrize("name", ["zoo_cca_t", "zoo_combiner_t"])
def test_what_needs_queries_of_the_past_says_so(name: str) -> None:
    model, inputs = functional("llama", name), inputs_of("llama", "left")
    common = {"max_new_tokens": 4, "do_sample": False, **inputs}
    for more in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(**common, **more)
    swapped: Any = HOSTS["llama"]()
    mechanism, options, _ = CASES[name]
    az.swap_attention(swapped, mechanism, **options)
    assert torch.equal(model.generate(use_cache=False, **common), swapped.generate(use_cache=False, **common))


def test_cca_decodes_with_its_own_pool_while_nothing_is_pooled() -> None:
    """Up to window_size + group_size - 1 tokens it is plain causal attention."""
    az.register_functional("zoo_cca_wide_t", "cca", window_size=20, group_size=8)
    inputs = inputs_of("llama", "left")
    common = {"max_new_tokens": 10, "do_sample": False, **inputs}
    model = functional("llama", "zoo_cca_wide_t")
    want = functional("llama", "eager").generate(**common)
    assert torch.equal(model.generate(**common), want)
    assert torch.equal(model.generate(cache_implementation="static", **common), want)


# --- training, precision, compilation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoo_cca_t", "zoo_combiner_t", "zoo_gqa_t"])
def test_gradient_checkpointing_and_dropout(name: str) -> None:
    model = functional("llama", name, attention_dropout=0.3).train()
    inputs = {**inputs_of("llama", "left"), "use_cache": False}
    want = run(model, inputs)
    other = run(model, inputs, seed=1)
    assert not torch.allclose(other[0], want[0])  # dropout is there
    model.gradient_checkpointing_enable()
    assert_same(run(model, inputs), want, 1e-6)


@pytest.mark.parametrize(("host", "name"), ONE_OF_EACH)
def test_low_precision(host: str, name: str) -> None:
    inputs = inputs_of(host)
    model = functional(host, name)
    want = run(model, inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = run(model, inputs)[0]
    if name != "zoo_kdgqa":  # its allocation may fall differently, as a whole head
        torch.testing.assert_close(automatic.float(), want, atol=0.15 * float(want.abs().max()), rtol=0.1)
    model = model.to(torch.bfloat16)
    inputs = {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in inputs.items()}
    got = run(model, inputs)[0]
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()


def whole_graph(host: str, name: str) -> None:
    model = functional(host, name)
    inputs = inputs_of(host, "left" if host in ("llama", "bert") else None)
    inputs |= {"use_cache": False} if host == "llama" else {}
    want = run(model, inputs)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, inputs), (want[0], {f"_orig_mod.{n}": grad for n, grad in want[1].items()}))
    torch.compiler.reset()


@pytest.mark.parametrize(("host", "name"), slow_but({("bert", "zoo_kdgqa")}, ONE_OF_EACH))
def test_compiled(host: str, name: str) -> None:
    whole_graph(host, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo_cca_mean_t", "zoo_gqa_t", "zoo_cca"])
def test_compiled_decoding(name: str) -> None:
    """As `generate` does with a preallocated cache on an accelerator: one graph, with masks that are made before."""
    model, inputs = functional("llama", name), inputs_of("llama", "left")
    how = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True  # type: ignore[attr-defined]  # this processor too
    common = {"max_new_tokens": 4, "do_sample": False, **inputs}
    want = model.generate(use_cache=False, **common)
    torch.compiler.reset()
    assert torch.equal(model.generate(cache_implementation="static", compile_config=how, **common), want)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo_cca_t", "zoo_combiner_t"])
def test_compiled_with_packed_documents(name: str) -> None:
    """A graph cannot know of them; they break it and stay right."""
    model, ids = functional("llama", name), torch.randint(1, 64, (1, 15))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for more in ({"position_ids": torch.cat([torch.arange(9), torch.arange(6)])[None]}, {}):
        got = logits(compiled, ids, use_cache=False, **more)
        torch.testing.assert_close(got, logits(model, ids, use_cache=False, **more), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name", "config", "match"),
    [
        ("mistral", "zoo_cca", {"sliding_window": 4}, "sliding_window=4"),
        ("gemma2", "zoo_cca", {"attn_logit_softcapping": 30.0}, "softcap=30.0"),
        ("gemma3", "zoo_cca", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}, "sliding_window=5"),
        ("qwen3", "zoo_gqa_t", {}, "normalises its keys"),
        ("llama", "zoo_kdgqa", {}, "buffer"),
        ("llama", "zoo_agent", {}, "needs causal_self"),
        ("bert", "zoo_cca", {}, "needs noncausal_self"),
        ("bert", "zoo_bra", {}, "grid of patches"),
        ("bert", "zoo_halo", {}, "grid of patches"),
        ("bert", "zoo_cca", {"is_decoder": True, "add_cross_attention": True}, "cross attention|noncausal_self"),
    ],
)
def test_hosts_that_a_function_cannot_serve(host: str, name: str, config: dict[str, Any], match: str) -> None:
    model = functional(host, name, **config)
    inputs = inputs_of(host)
    if config.get("add_cross_attention"):
        inputs["encoder_hidden_states"] = torch.randn(2, 15, 32)
    with pytest.raises(ValueError, match=match):
        model(**inputs)


def test_masks_of_pairs_are_refused_where_tokens_are_grouped() -> None:
    ids = torch.randint(1, 64, (1, 6))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    model = functional("llama", "zoo_cca_t")
    torch.testing.assert_close(logits(model, ids, attention_mask=causal), logits(model, ids))
    holes = causal.clone()
    holes[..., 4, 1] = False
    for mask in (holes, torch.zeros(1, 1, 6, 6).masked_fill(~holes, torch.finfo(torch.float32).min)):
        with pytest.raises(ValueError, match="single pairs"):
            logits(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="tells of 3 tokens, and there are 6"):
        logits(model, ids, attention_mask=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no s_aux"):
        az_call(model, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="no maps"):
        az_call(model, output_attentions=True)


def az_call(model: Any, **more: Any) -> None:
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    q, kv = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    interface(model.model.layers[0].self_attn, q, kv, kv, None, scaling=0.5, **more)


@pytest.mark.parametrize("name", ["zoo_bra_t", "zoo_halo_t", "zoo_agent_t"])
def test_the_grid_is_told_by_the_configuration_or_not_at_all(name: str) -> None:
    model = functional("vit", name, image_size=(8, 16))
    swapped = HOSTS["vit"](image_size=(8, 16))
    mechanism, options, besides = CASES[name]
    az.swap_attention(swapped, mechanism, **options, **besides)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 16)}
    assert_same(run(model, inputs), run(swapped, inputs))
    with pytest.raises(ValueError, match=r"\(4, 4\).*follows the size"):
        functional("vit", name)(torch.randn(1, 3, 16, 24), interpolate_pos_encoding=True)
    model.config.model_type = "other"
    with pytest.raises(ValueError, match="of no family"):
        model(**inputs)


# --- names ------------------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    names = az.list_functionals()
    assert {"zoo", *(f"zoo_{name}" for name in pure_functions())} <= set(names)
    assert names == sorted(names)
    assert az.list_functionals("zoo_k*") == [n for n in names if n.startswith("zoo_k")]
    assert "zoo_cca" in CliRunner().invoke(app, ["info", "cca"]).output
    assert "attn_implementation" not in CliRunner().invoke(app, ["info", "moh"]).output


@pytest.mark.parametrize(
    ("name", "mechanism", "options", "match"),
    [
        ("zoo_a", "nocca", {}, "no attention is named"),
        ("zoo_a", "moh", {}, "no function of q, k and v alone.*swap_attention"),
        ("cca_small", "cca", {}, "begins with 'zoo_'"),
        ("zoo_flash_cca", "cca", {}, "transformers' own"),
        ("zoo_a", "cca", {"group_size": 0}, "group_size must be at least 1"),
        ("zoo_a", "cca", {"pool": "sum"}, "pool must be one of"),
        ("zoo_a", "cca", {"rope_theta": 1e4}, "rope_theta is decided by the host"),
        ("zoo_a", "cca", {"is_causal": True}, "'cca' has no option|decided by the host"),
        ("zoo_a", "bra", {"side_dwconv": 5}, "side_dwconv is decided"),
        ("zoo_a", "bra", {"pad_mode": "input"}, "before the projections"),
        ("zoo_a", "bra", {"diff_routing": True}, "diff_routing needs soft_routing"),
        ("zoo_a", "kdgqa", {"alloc_scope": "frozen"}, "buffer"),
        ("zoo_a", "combiner", {"pattern": "axial"}, "row_summary='proj' has parameters"),
        ("zoo_a", "combiner", {"summary_act": "deepset"}, "'deepset' has parameters"),
        ("zoo_a", "agent", {"agent_num": 5}, "must be a square"),
        ("zoo_a", "halo", {"block_size": 0}, "block_size"),
        ("zoo_a", "pgqa", {"noise_mode": "some"}, "noise_mode must be one of"),
        ("zoo_cca", "cca", {"group_size": 4}, "stands for 'cca' with options {} already"),
    ],
)
def test_what_cannot_be_registered(name: str, mechanism: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        az.register_functional(name, mechanism, **options)
    assert "zoo_a" not in az.list_functionals()


def test_unknown_options_are_told_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="did you mean 'group_size'"):
        az.register_functional("zoo_a", "cca", groups_size=2)
    az.register_functional("zoo_cca_t", "cca", **CASES["zoo_cca_t"][1])  # the same once more is no matter


def test_a_new_function_is_one_registration_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says by its parameters what it wants to know of a call; the rest are options."""
    for table in ("_functions", "_functionals"):
        monkeypatch.setattr(f"attention_zoo.attention.functional.{table}", dict(getattr(functional_module, table)))

    @pure_function("mha")
    def first_row(q: Tensor, k: Tensor, v: Tensor, *, grid_size: tuple[int, int], num_prefix_tokens: int, rows: int = 1) -> Tensor:
        return v[:, :, num_prefix_tokens : num_prefix_tokens + rows * grid_size[1]].mean(2, keepdim=True).expand_as(v)

    vit = functional("vit", "zoo_mha")
    az.register_functional("zoo_two_rows_t", "mha", rows=2)
    one = vit(**inputs_of("vit"))[0]
    assert not torch.allclose(functional("vit", "zoo_two_rows_t")(**inputs_of("vit"))[0], one)
    with pytest.raises(ValueError, match="'mha' works on a grid"):
        functional("bert", "zoo_mha")(**inputs_of("bert"))


@pytest.mark.slow  # by default a decoder is built in such a process (tests/models/test_decoders.py), "zoo" chosen in it
@pytest.mark.parametrize("first", ["attention_zoo", "transformers"])
def test_any_order_of_imports(first: str) -> None:
    """Names are known once both packages are imported, those registered before transformers too."""
    second = {"attention_zoo": "transformers", "transformers": "attention_zoo"}[first]
    program = (
        f"import sys, {first}\n"
        "register = 'attention_zoo' in sys.modules\n"
        "if register:\n"
        "    assert 'transformers' not in sys.modules\n"
        "    sys.modules['attention_zoo'].register_functional('zoo_cca_x', 'cca', group_size=4)\n"
        f"import {second}, attention_zoo\n"
        "if not register:\n"
        "    attention_zoo.register_functional('zoo_cca_x', 'cca', group_size=4)\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as m\n"
        "names = attention_zoo.list_functionals()\n"
        "assert 'zoo_cca_x' in names and all(n in a and n in m for n in names), names\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- "zoo" itself -----------------------------------------------------------------------------------------------------------------

SOFTMAX: dict[str, Callable[..., nn.Module]] = {
    "llama": DECODERS["llama"],
    "mistral": decoder("Mistral", sliding_window=5),
    "gemma2": decoder("Gemma2", **{**FULL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}),
}  # fmt: skip


def pair(host: str) -> list[Any]:
    """The model as "eager" and as "zoo"."""
    eager: Any = {**HOSTS, **SOFTMAX}[host]()
    eager.set_attn_implementation("eager")
    zoo = copy.deepcopy(eager)
    zoo.set_attn_implementation("zoo")
    return [eager, zoo]


PAIRS: dict[str, list[Any]] = {}


@pytest.mark.parametrize("host", SOFTMAX)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_softmax_attention_is_that_of_eager(host: str, data: st.DataObject) -> None:
    """Padding on any side, packed documents, and a cache of any kind, fed in pieces."""
    if host not in PAIRS:
        PAIRS[host] = pair(host)
    eager, zoo = PAIRS[host]
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    ids = torch.randint(1, 64, (batch, length))
    left = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch)))
    right = torch.tensor([data.draw(st.integers(0, length - 1 - int(n))) for n in left])
    place = torch.arange(length)
    mask = ((place >= left[:, None]) & (place < length - right[:, None])).long()
    real = mask.bool()
    torch.testing.assert_close(*(logits(m, ids, attention_mask=mask)[real] for m in (zoo, eager)), atol=1e-4, rtol=1e-4)

    cut = data.draw(st.integers(0, length))
    packed = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
    torch.testing.assert_close(*(logits(m, ids, position_ids=packed, use_cache=False) for m in (zoo, eager)), atol=1e-4, rtol=1e-4)

    room, padded = data.draw(st.integers(0, 5)), data.draw(st.booleans())
    static = data.draw(st.booleans())
    own = {"attention_mask": (place >= left[:, None]).long()} if padded else {}
    ends = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    results = []
    for model in (zoo, eager):
        cache = StaticCache(config=model.config, max_cache_len=length + room) if static else DynamicCache(config=model.config)
        rows = []
        for start, stop in itertools.pairwise(ends):
            step = {k: t[:, :stop] for k, t in own.items()}
            rows.append(logits(model, ids[:, start:stop], **{CACHE: cache}, **step))
        results.append(torch.cat(rows, 1)[place >= left[:, None] if padded else torch.ones_like(ids, dtype=torch.bool)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_softmax_attention_of_encoders_is_that_of_eager() -> None:
    eager, zoo = pair("bert")
    for padding in (None, "left", "right"):
        inputs = inputs_of("bert", padding)
        assert_same(run(zoo, inputs), run(eager, inputs))
    eager, zoo = pair("vit")
    assert_same(run(zoo, inputs_of("vit")), run(eager, inputs_of("vit")))
