"""What a host's layers have is respected or refused, never dropped: one test for each thing that they may have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from marks import covering, slow_but
from swap_case import assert_same_state, shake, snapshot
from swap_hosts import HEAD_DIM, HEADS, HOSTS, HostCase
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils import parametrizations, prune

import attention_zoo as az
from attention_zoo.attention.base import read_padding
from attention_zoo.swap.core import find_hosts
from attention_zoo.swap.slot import Slot

LLAMA, GPT2 = HOSTS["hf-llama"], HOSTS["hf-gpt2"]


def softmax(model: Any, case: HostCase) -> None:
    """The mechanism that is the host's own attention in every layer."""
    az.swap_attention(model, "gqa", num_kv_heads=case.traits.num_kv_heads, layers=case.layers)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def slots(model: nn.Module) -> list[Slot]:
    return [module for module in model.modules() if isinstance(module, Slot)]


def changed(case: HostCase, **settings: Any) -> Any:
    """A host of another configuration."""
    original = case.build()
    config = type(original.config)(**{**original.config.to_dict(), **settings})
    torch.manual_seed(0)
    model = type(original)._from_config(config, attn_implementation=original.config._attn_implementation)
    shake(model)
    return model.eval()


def assert_refused(model: Any, match: str, mechanism: str = "gqa", **options: Any) -> None:
    before, modules = snapshot(model), list(model.modules())
    with pytest.raises(ValueError, match=match):
        az.swap_attention(model, mechanism, **options)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


# Positions

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.7}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {**LLAMA3, "original_max_position_embeddings": 8},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": 3.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_scaling(rope: dict[str, Any]) -> None:
    """It is in the tables that the model hands over, attention factor included."""
    model = changed(LLAMA, rope_parameters={"rope_theta": 1e4, **rope}, max_position_embeddings=8)
    want = LLAMA.run(model, LLAMA.inputs())
    softmax(model, LLAMA)
    close(LLAMA.run(model, LLAMA.inputs()), want)


@pytest.mark.parametrize("name", ["hf-phi3", "hf-llama"])
def test_partly_rotated_heads(name: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    try:
        model = changed(HOSTS[name], rope_parameters=rope)
    except KeyError:
        pytest.skip("this family has no partial rotation")
    assert_refused(model, "50%")


def test_two_rotations_of_gemma3() -> None:
    """Its windowed layers have tables of their own."""
    case = HOSTS["hf-gemma3"]
    model = changed(
        case,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 10.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    )
    want = case.run(model, case.inputs())
    softmax(model, case)
    close(case.run(model, case.inputs()), want)


# Logits


@pytest.mark.parametrize(
    "settings",
    [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}],
    ids=str,
)
@pytest.mark.parametrize("mechanism", ["gqa", "moh", "cca"])
def test_logits_of_gpt2(settings: dict[str, bool], mechanism: str) -> None:
    model = changed(GPT2, **{"scale_attn_by_inverse_layer_idx": False, **settings})
    model.set_attn_implementation("eager")
    want = GPT2.run(model, GPT2.inputs())
    az.swap_attention(model, mechanism, **{"gqa": {"num_kv_heads": HEADS}, "moh": {}, "cca": {"window_size": 16}}[mechanism])
    close(GPT2.run(model, GPT2.inputs()), want)


def test_upcast_logits() -> None:
    """What GPT-2 has a switch for is so in every mechanism: logits that half precision cannot hold are no matter."""
    model = changed(GPT2, reorder_and_upcast_attn=True).half()
    model.set_attn_implementation("eager")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data.mul_(60)
    want = GPT2.run(model, GPT2.inputs())
    softmax(model, GPT2)
    got = GPT2.run(model, GPT2.inputs())
    assert got.isfinite().all()
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()


def test_softcaps_are_refused() -> None:
    assert_refused(HOSTS["hf-gemma2-softcap"].build(), "bounds its logits")


# Windows, masks, packing

KINDS = ("eager", "sdpa", "padding", "flex_attention", "none")


def mask_of(kind: str, causal: bool, real: Tensor) -> Any:
    """The mask that an attention implementation makes of padding, and of causality."""
    length = real.shape[1]
    allowed = real[:, None, None].expand(-1, 1, length, -1)
    allowed = allowed.tril() if causal else allowed
    if kind == "eager":
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    if kind == "flex_attention":
        seen = (lambda b, h, q, k: (q >= k) & real[b, k]) if causal else (lambda b, h, q, k: (q >= 0) & real[b, k])
        return create_block_mask(seen, len(real), None, length, length, device="cpu")
    return {"sdpa": allowed, "padding": real, "none": None}[kind]


MASKED = [
    (name, kind, mechanism)
    for name in ("hf-gpt2", "hf-bert", "hf-siglip_text", "hf-clip_text")
    for kind in KINDS
    for mechanism in ("gqa", "combiner", "cca", "moh")
    if mechanism != "cca" or HOSTS[name].traits.is_causal
]


@pytest.mark.parametrize(("name", "kind", "mechanism"), slow_but(covering(MASKED, together=2), MASKED))
def test_masks_of_every_implementation(name: str, kind: str, mechanism: str) -> None:
    """None, padding, boolean, added and block masks say the same to a layer."""
    case, model = HOSTS[name], HOSTS[name].build()
    causal = case.traits.is_causal
    az.swap_attention(model, mechanism)
    slot = slots(model)[0]
    real = torch.ones(2, 9, dtype=torch.bool)
    if kind != "none":
        real[1, 6:] = False
    x = torch.randn(2, 9, 32)
    extra = {"is_causal": True} if name == "hf-clip_text" else {}
    got, weights = slot(x, attention_mask=mask_of(kind, causal, real), **extra)
    want, _ = slot(x, attention_mask=mask_of("sdpa", causal, real), **extra)
    assert weights is None
    close(got[real], want[real])


def test_other_masks_are_refused() -> None:
    model = GPT2.build()
    softmax(model, GPT2)
    with pytest.raises(ValueError, match="attention_mask is a list"):
        slots(model)[0](torch.randn(1, 3, 32), attention_mask=[1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-llama", "hf-mistral-window", "hf-bert"])
def test_flex_attention_of_whole_models(name: str) -> None:
    case = HOSTS[name]
    model = case.build("eager")
    want = case.run(model, case.inputs())
    model.set_attn_implementation("flex_attention")
    softmax(model, case)
    close(case.run(model, case.inputs()), want)


@pytest.mark.parametrize("name", ["hf-mistral-window", "hf-qwen2-window", "hf-gemma2", "hf-gemma3"])
def test_windows_are_in_the_masks_or_refused(name: str) -> None:
    """flash-attn's masks hold no windows: before a swap, and when a swapped model is set to it."""
    case = HOSTS[name]
    model = case.build()
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "flash_attention_2"
    assert_refused(model, "window of 5 tokens is in the masks of .* not in those of 'flash_attention_2'")
    model.config._attn_implementation = implementation
    softmax(model, case)
    windowed = next(slot for slot in slots(model) if slot.window_size == 5)
    x, tables = torch.randn(1, 3, 32), (torch.ones(1, 3, case.build().model.layers[0].self_attn.head_dim),) * 2
    windowed(x, tables)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="window of 5 tokens"):
        windowed(x, tables)


def test_packed_sequences_are_in_the_masks_or_refused() -> None:
    model = LLAMA.build()
    softmax(model, LLAMA)
    slot, x, tables = slots(model)[0], torch.randn(1, 5, 32), (torch.ones(1, 5, HEAD_DIM),) * 2
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    slot(x, tables, position_ids=packed)
    model.config._attn_implementation = "flash_attention_2"
    slot(x, tables, position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="packed sequences"):
        slot(x, tables, position_ids=packed)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_refused_in_a_compiled_graph(causal: bool, dtype: torch.dtype) -> None:
    """A mechanism that leaves padding out cannot hold them; a graph looks at its mask when it runs."""
    seen = torch.ones(7, 7).tril() if causal else torch.ones(7, 7)
    padded, packed = seen * (torch.arange(7) > 1), seen * torch.block_diag(torch.ones(3, 3), torch.ones(4, 4))
    masks = [mask.bool()[None, None] for mask in (padded, packed)]
    if dtype.is_floating_point:
        masks = [torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min) for mask in masks]
    read = torch.compile(functools.partial(read_padding, batch=1, new=7, seen=0, causal=causal), backend="eager", fullgraph=True)
    assert read(masks[0]).tolist() == [[False, False, True, True, True, True, True]]
    with pytest.raises(RuntimeError, match="single pairs of tokens"):
        read(masks[1])


@pytest.mark.parametrize(
    ("host", "mechanism", "options", "match"),
    [
        ("hf-llama", "moh", {"is_causal": False}, "is_causal=False: the layer says True"),
        ("hf-bert", "mha", {"is_causal": True}, "is_causal=True: the layer says False"),
        ("hf-llama", "cca", {"layer_idx": 5}, "layer_idx=5: the layer says 0"),
        ("hf-llama", "cca", {"head_dim": 16}, "head_dim=16: the layer says 8"),
        ("hf-llama", "gqa", {"rope_layout": "interleaved"}, "rotary tables settle it"),
        ("hf-vit", "moh", {"device": "meta"}, "device='meta': it is the layer's"),
        ("hf-vit", "agent", {"num_prefix_tokens": 0}, "num_prefix_tokens=0: the layer says 1"),
    ],
)
def test_what_the_layer_settles_is_no_option(host: str, mechanism: str, options: dict[str, Any], match: str) -> None:
    assert_refused(HOSTS[host].build(), match, mechanism, **options)


# Probabilities

ATTENTIVE = ["hf-llama", "hf-gpt2", "hf-gemma2", "hf-bert", "hf-vit", "hf-dinov2", "hf-clip_text", "hf-siglip_vision"]


@pytest.mark.parametrize("way", ["argument", "configuration"])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_probabilities_are_refused(name: str, way: str) -> None:
    """Transformers would give those of the layers that are left, as if they were the first ones."""
    case = HOSTS[name]
    model = case.build("eager")
    az.swap_attention(model, "gqa", layers=0)
    if way == "configuration":
        model.config.output_attentions = True
    with pytest.raises(ValueError, match="record_attention"):
        model(**case.inputs(), **({"output_attentions": True} if way == "argument" else {}))
    model.config.output_attentions = False
    assert model(**case.inputs(), output_hidden_states=True).hidden_states is not None
    az.unswap(model)
    assert len(model(**case.inputs(), output_attentions=True).attentions) == 2


# Dropout

DROPOUT = [
    ("hf-llama", {"attention_dropout": 0.5}, 0.5, 0.0),
    ("hf-gemma3", {"attention_dropout": 0.5}, 0.5, 0.0),
    ("hf-phi3", {"attention_dropout": 0.5}, 0.5, 0.0),
    ("hf-gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.25}, 0.5, 0.25),
    ("hf-bert", {"attention_probs_dropout_prob": 0.5}, 0.5, 0.0),
    ("hf-vit", {"attention_probs_dropout_prob": 0.5}, 0.5, 0.0),
    ("hf-dinov2", {"attention_probs_dropout_prob": 0.5}, 0.5, 0.0),
    ("hf-clip_vision", {"attention_dropout": 0.5}, 0.5, 0.0),
    ("hf-siglip_text", {"attention_dropout": 0.5}, 0.5, 0.0),
]


@pytest.mark.parametrize(("name", "settings", "attn_drop", "proj_drop"), DROPOUT, ids=[row[0] for row in DROPOUT])
def test_dropout(name: str, settings: dict[str, float], attn_drop: float, proj_drop: float) -> None:
    case = HOSTS[name]
    model = changed(case, **settings)
    az.swap_attention(model, "moh")
    assert [slot.mechanism.attn_drop for slot in slots(model)] == [attn_drop] * 2
    assert [slot.mechanism.proj_drop.p for slot in slots(model)] == [proj_drop] * 2


def test_dropout_of_timm() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", **{**HOSTS["timm-vit"].model_args, "attn_drop_rate": 0.5, "proj_drop_rate": 0.25}
    )
    az.swap_attention(model, "moh")
    assert [(slot.mechanism.attn_drop, slot.mechanism.proj_drop.p) for slot in slots(model)] == [(0.5, 0.25)] * 2


# Projections


def test_pruned_heads_are_refused() -> None:
    model = LLAMA.build()
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        projection.weight = nn.Parameter(projection.weight[: len(projection.weight) // 2])
    assert_refused(model, r"layers\.1\.self_attn: its projections have 32 rows, .* were heads pruned")


@pytest.mark.parametrize("name", ["hf-llama", "hf-bert", "hf-vit", "timm-vit"])
@pytest.mark.parametrize("tie", ["weight", "module"])
def test_tied_layers_are_refused(name: str, tie: str) -> None:
    """A swap of one would tear it from the other."""
    model = HOSTS[name].build()
    first, last = (host.module for host in find_hosts(model))
    if tie == "module":
        parent, _, leaf = find_hosts(model)[1].name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, first)
    else:
        ours, theirs = (next(m for m in layer.modules() if isinstance(m, nn.Linear)) for layer in (first, last))
        theirs.weight = ours.weight
    assert_refused(model, "as well: a swap would tear them apart")


@pytest.mark.parametrize("change", [parametrizations.weight_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)])
@pytest.mark.parametrize("name", ["hf-llama", "hf-bert", "hf-vit", "timm-vit"])
def test_projections_that_are_more_than_a_weight_are_refused(name: str, change: Callable[[nn.Module], Any]) -> None:
    model = HOSTS[name].build()
    projections = [m for m in find_hosts(model)[-1].module.modules() if isinstance(m, nn.Linear)]
    change(projections[0])
    assert_refused(model, "projections must be plain linear layers")


@pytest.mark.parametrize("name", ["hf-qwen2", "hf-llama", "hf-vit-classes", "timm-vit_norm", "timm-eva", "timm-dinov3"])
def test_biases(name: str) -> None:
    """As many of them as the host has: none, all, those of some projections; EVA's keys get one that starts at 0."""
    case, model = HOSTS[name], HOSTS[name].build()
    host = find_hosts(model)[0]
    softmax(model, case)
    names = {name.rpartition(".")[0] for name, _ in slots(model)[0].mechanism.named_parameters() if name.endswith(".bias")}
    names = {name for name in names if "norm" not in name}
    assert (any(name.startswith(("q", "kv")) for name in names), any("o" in name for name in names)) == (
        host.qkv_bias,
        host.proj_bias,
    )


def test_cross_attention_stays() -> None:
    """GPT-2 as the decoder of an encoder: its own attention is swapped, that to the encoder is not."""
    model = changed(GPT2, add_cross_attention=True)
    feed = {**GPT2.inputs(), "encoder_hidden_states": torch.randn(2, 4, 32)}
    want = GPT2.run(model, feed)
    assert [host.name for host in find_hosts(model)] == [f"transformer.h.{i}.attn" for i in range(2)]
    softmax(model, GPT2)
    close(GPT2.run(model, feed), want)
    settings = {**feed, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(use_cache=True, **settings), model.generate(use_cache=False, **settings))


def test_scale_of_timm() -> None:
    """A layer's own scale holds where it computes the logits itself; the fused kernel is not told."""
    case = HOSTS["timm-vit"]
    for fused in (False, True):
        model = case.build()
        for block in model.blocks:
            block.attn.scale, block.attn.fused_attn = 0.1, fused
        want = case.run(model, case.inputs())
        softmax(model, case)
        close(case.run(model, case.inputs()), want)


def test_bidirectional_and_unknown_layers_are_refused() -> None:
    config = transformers.Gemma3Config(
        text_config=HOSTS["hf-gemma3"].build().config.to_dict(), vision_config=HOSTS["hf-siglip_vision"].build().config.to_dict()
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert_refused(model, "tokens of an image see each other", layers="model.language_model.*")
