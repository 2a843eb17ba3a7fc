"""The figures of a report against what is measured on the model: parameters, FLOPs and caches; and the report as a table."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import transformers
from marks import covering, slow_but
from swap_case import fits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention.cache import measured_cache_bytes
from attention_zoo.attention.flops import forward_flops
from attention_zoo.swap import LayerSwap, SwapReport, convert
from attention_zoo.swap.convert import Plan, describe_swap
from attention_zoo.swap.core import find_hosts

# Its name since transformers 5.24, and before.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def hugging_face(name: str, config: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        settings = getattr(transformers, f"{config}Config")(**changes)
        return getattr(transformers, name)._from_config(settings, attn_implementation="eager").eval()

    return make


def of_timm(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = timm.create_model(name, **{**TIMM, **changes}).eval()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # torch counts no FLOPs of its fused attention on a CPU
        return model

    return make


GROUPED = {**TEXT, "num_key_value_heads": 2}
HOSTS: dict[str, Callable[[], Any]] = {
    "llama": hugging_face("LlamaForCausalLM", "Llama", **GROUPED, attention_bias=True),
    "mistral": hugging_face("MistralForCausalLM", "Mistral", **GROUPED, sliding_window=8),
    "qwen3": hugging_face("Qwen3ForCausalLM", "Qwen3", **GROUPED, head_dim=16),
    "gpt2": hugging_face("GPT2LMHeadModel", "GPT2", **TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=24),
    "bert": hugging_face("BertModel", "Bert", **TEXT),
    "hf_vit": hugging_face("ViTModel", "ViT", **IMAGE, patch_size=8),
    "timm_vit": of_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "timm_dinov3": of_timm("vit_small_patch16_dinov3", img_size=(32, 24)),
    "timm_eva": of_timm("eva02_tiny_patch14_224"),
}
DECODERS = ("llama", "mistral")
CONVERTED = [n for n in az.list_attentions() if az.attention_info(n).keeps_shape and "transnext" not in n]
# Options without which a mechanism would not show what it does at 24 tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "bra": {"n_win": 2, "topk": 1}, "cca": {"window_size": 6, "group_size": 4}, "combiner": {"window_size": 5},
    "gqa": {"num_kv_heads": 1}, "hilo": {"alpha": 0.5}, "moh": {"routed_topk": 1},
}  # fmt: skip


def windowed(host: Any, name: str) -> bool:
    """Whether the host's sliding window has no place in the mechanism."""
    return host.window_size is not None and az.attention_info(name).padding_masks_only


FOUND = {kind: find_hosts(make())[0] for kind, make in HOSTS.items()}
PAIRS = [(kind, name) for kind, host in FOUND.items() for name in CONVERTED if fits(host, name) and not windowed(host, name)]


def options_for(model: Any, name: str) -> dict[str, Any]:
    given = dict(OPTIONS.get(name, {}))
    if name == "combiner" and not find_hosts(model)[0].is_causal:
        del given["window_size"]
    return given


def swap(model: Any, name: str, **options: Any) -> SwapReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.swap_attention(model, name, **options_for(model, name), **options)


def feed(model: Any, num_tokens: int) -> dict[str, torch.Tensor]:
    if not hasattr(model, "config"):
        return {"x": torch.randn(1, 3, *model.patch_embed.img_size)}
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(1, 3, 32, 32)}
    return {"input_ids": torch.randint(3, 32, (1, num_tokens)), "use_cache": False}


def measured_flops(model: nn.Module, num_tokens: int) -> dict[str, int]:
    """By module, "" for all of it."""
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        model(**feed(model, num_tokens))
    counts = {name.partition(".")[2]: sum(by.values()) for name, by in counter.get_flop_counts().items() if name != "Global"}
    return {**counts, "": counter.get_total_flops()}


@pytest.mark.parametrize(("kind", "name"), slow_but(covering(PAIRS), PAIRS))
def test_parameters_and_flops_are_the_models(kind: str, name: str) -> None:
    model = HOSTS[kind]()
    parameters = sum(p.numel() for p in model.parameters())
    lengths = {row.num_tokens for row in swap(model, name, dry_run=True).layers}
    assert len(lengths) == 1
    before = measured_flops(model, *lengths)
    report = swap(model, name)
    after = measured_flops(model, *lengths)
    assert sum(p.numel() for p in model.parameters()) - parameters == report.parameters[1] - report.parameters[0]
    for row in report.layers:
        assert (row.flops_before, row.flops_after) == (before[row.name], after[row.name])
    flops = report.flops
    assert flops[1] is not None
    assert after[""] - before[""] == flops[1] - flops[0]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in PAIRS if kind in DECODERS])
def test_caches_are_those_that_are_filled(kind: str, name: str) -> None:
    """At lengths around windows and groups; before and after the swap."""
    model = HOSTS[kind]().to(torch.bfloat16 if kind == "llama" else torch.float32)
    model.set_attn_implementation("sdpa")  # no mask is made where nothing is padded
    lengths = (1, 7, 8, 9, 15, 24)
    with mock.patch.object(convert, "forward_flops", return_value=0):  # which take the most of the time
        rows = {length: reports(model, name, length) for length in lengths}
    before = [filled(model, length) for length in lengths]
    assert [sum(row.cache_bytes_before for row in rows[length]) for length in lengths] == before
    swap(model, name)
    assert [sum(row.cache_bytes_after for row in rows[length]) for length in lengths] == [filled(model, n) for n in lengths]


def test_a_cache_with_rotary_tables() -> None:
    """Combiner's axial rows keep them until they are whole."""
    model = HOSTS["llama"]()
    model.set_attn_implementation("sdpa")
    options = {"pattern": "axial", "window_size": 5}
    plans = [Plan(host, "combiner", options, "convert") for host in find_hosts(model)]
    rows = {length: [describe_swap(plan, length) for plan in plans] for length in (4, 5, 8)}
    az.swap_attention(model, "combiner", **options)
    for length, each in rows.items():
        assert sum(row.cache_bytes_after for row in each) == filled(model, length)
        assert sum(layer.bytes for layer in az.cache_report(model, length).layers) == filled(model, length)


def reports(model: Any, name: str, num_tokens: int) -> list[LayerSwap]:
    """The rows for a sequence of this length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [describe_swap(Plan(host, name, options_for(model, name), "convert"), num_tokens) for host in find_hosts(model)]


def filled(model: Any, num_tokens: int) -> int:
    """Bytes of a cache that has seen one sequence: the last two tokens one by one."""
    ids, cache = feed(model, num_tokens)["input_ids"], None
    with torch.no_grad():
        for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
            if piece.shape[1]:
                cache = model(piece, use_cache=True, **({} if cache is None else {CACHE: cache}))[CACHE]
    return measured_cache_bytes(cache)


# --- what is counted --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (hugging_face("RobertaModel", "Roberta", **{**TEXT, "max_position_embeddings": 34, "pad_token_id": 1}), {32}),
        (HOSTS["timm_dinov3"], {5 + 4 * 3}),
        (HOSTS["hf_vit"], {1 + 4 * 4}),
        (of_timm("vit_tiny_patch16_224", patch_drop_rate=0.5), {1 + 4 * 4}),
    ],
    ids=["roberta", "timm_dinov3", "hf_vit", "patch_drop"],
)
def test_tokens_are_those_of_the_models_own_inputs(make: Callable[[], Any], lengths: set[int]) -> None:
    model = make()
    report = swap(model, "moh")
    assert {row.num_tokens for row in report.layers} == lengths
    model(**feed(model, report.num_tokens))
    assert report.num_tokens == max(lengths)


def test_towers_have_their_own_lengths_and_no_cache() -> None:
    text = {**TEXT, "max_position_embeddings": 12, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config={**IMAGE, "patch_size": 8}, projection_dim=8)
    report = swap(transformers.CLIPModel(config), "gda")
    assert [(row.name.split("_")[0], row.num_tokens) for row in report.layers] == [("text", 12)] * 2 + [("vision", 17)] * 2
    assert report.num_tokens == 17
    assert report.cache_bytes == (0, 0)


def test_grids_that_a_mechanism_cannot_have_are_refused() -> None:
    model = of_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg")()
    with pytest.raises(ValueError, match=r"blocks.0.attn: 'bra': on images of the model's size, 16 tokens: .*at least \(7, 7\)"):
        az.swap_attention(model, "bra", n_win=7, topk=1, pad_mode="qkv")
    assert not hasattr(model, "zoo_swap")


def test_layers_alike_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion parameters in no time, and no numbers drawn."""
    described: list[str] = []
    describe = convert._describe
    monkeypatch.setattr(convert, "_describe", lambda plan, *args: described.append(plan.host.name) or describe(plan, *args))
    sizes = {**TEXT, "num_hidden_layers": 40, "hidden_size": 256, "num_key_value_heads": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 20, "sliding_window": 8, "use_sliding_window": True}
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).to(torch.bfloat16)
    state = torch.get_rng_state()
    report = swap(model, "moh", dry_run=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert described == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [row.cache_bytes_before for row in report.layers] == [2 * 256 * 2 * 7, 2 * 256 * 2 * 24] * 20
    assert {row.name for row in report.layers} == {f"model.layers.{i}.self_attn" for i in range(40)}


def test_flops_without_data() -> None:
    module = az.create_attention("hilo", 16, 4).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        module(torch.randn(1, 12, 16), grid_size=(4, 3))
    assert forward_flops(module, 12, grid_size=(4, 3)) == counter.get_total_flops()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    long = az.create_attention("mha", 64, 4, device="meta", is_causal=True)
    assert forward_flops(long, 2**17) == 2 * 2**17 * 4 * 64**2 + 4 * 2**34 * 64
    module.register_forward_pre_hook(lambda module, inputs: inputs[0].sum().item() and None)
    assert forward_flops(module, 12, grid_size=(4, 3)) is None


# --- the report -------------------------------------------------------------------------------------------------------------------


def test_the_report_as_data() -> None:
    model = HOSTS["llama"]()
    report = swap(model, "moh", dry_run=True)
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["dry_run"] is True
    assert data["layers"][1]["name"] == "model.layers.1.self_attn"
    assert data["totals"] == {name: list(getattr(report, name)) for name in ("parameters", "flops", "cache_bytes")}
    assert swap(model, "moh", dry_run=True) == report
    assert swap(model, "gqa", dry_run=True) != report
    assert swap(model, "moh") != report  # not a dry run
    assert hash(report)


def row(name: str, **changes: Any) -> LayerSwap:
    figures: dict[str, Any] = {
        "mechanism": "moh", "num_tokens": 4096, "carried": 67_108_864, "converted": 0, "new": 139_264, "removed": 67_108_864,
        "preserving": True, "tried_tokens": 44, "flops_before": 824_633_720_832, "flops_after": 825_774_571_520,
        "cache_bytes_before": 67_108_864, "cache_bytes_after": 67_108_864,
    }  # fmt: skip
    return LayerSwap(name=name, **{**figures, **changes})


def test_the_table() -> None:
    """Alike neighbours share a row; what does not change stands once."""
    layers = [row(f"h.{i}.attn") for i in (*range(4), 6, *range(8, 30))]
    layers += [row("h.30.attn", mechanism="cca", cache_bytes_after=16_777_216, preserving=False)]
    layers += [row("h.31.attn", flops_after=None, preserving=None)]
    assert str(SwapReport(tuple(layers), True)) == TABLE


TABLE = """\
would swap (before -> after, FLOPs and cache of a sequence of 4,096 tokens; same: the layer's function is kept)
* tried on 44 tokens only
layer              mechanism      parameters  carried  converted    new  same         FLOPs  cache B/token
h.0-3,6,8-29.attn  moh        67.1M -> 67.2M    67.1M          0   139k  yes*  825G -> 826G          16.4k
h.30.attn          cca        67.1M -> 67.2M    67.1M          0   139k    no  825G -> 826G  16.4k -> 4.1k
h.31.attn          moh        67.1M -> 67.2M    67.1M          0   139k     ?     825G -> ?          16.4k
all 29 layers                          1.95G    1.95G          0  4.04M          23.9T -> ?   475k -> 463k"""


def test_the_table_fits_a_terminal() -> None:
    long = "vision_language_model.transformer.encoder.{}.layers.{}.block.self_attention.core"
    changes = {
        "mechanism": "agent_cswin",
        "converted": 12_345_678,
        "new": 999_999,
        "cache_bytes_after": 1234,
        "num_tokens": 131_072,
    }
    layers = [row(long.format(i % 2, i), **changes) for i in range(40)]
    lines = str(SwapReport((*layers, row("another")), False)).split("\n")
    assert max(map(len, lines)) <= 120
    assert len(lines) == 2 + 1 + 40 + 1 + 1  # two numbers of their names differ
