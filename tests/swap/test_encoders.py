"""Hugging Face's encoders as hosts: what is found, what is refused, and what a swap leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from marks import covering, slow_but
from swap_case import BIDIRECTIONAL, PRESERVING, assert_same_state, fits, put, shake, snapshot
from torch import nn

import attention_zoo as az
from attention_zoo.swap.encoders import BertAdapter, Dinov2Adapter, EncoderAdapter
from attention_zoo.swap.hosts import Adapter

_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
_TEXT = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 40}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
_CLIP_TEXT = {**_TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# Kind of host -> its class, its configuration, and the class and register tokens of an image.
HOSTS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "bert": ("BertModel", "BertConfig", _TEXT, 0),
    "roberta": ("RobertaModel", "RobertaConfig", _TEXT, 0),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _TEXT, 0),
    "camembert": ("CamembertModel", "CamembertConfig", _TEXT, 0),
    "electra": ("ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": 24}, 0),
    "clip_text": ("CLIPTextModel", "CLIPTextConfig", _CLIP_TEXT, 0),
    "siglip_text": ("SiglipTextModel", "SiglipTextConfig", {**_TEXT, "projection_size": 24}, 0),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, 1),
    "vit_no_bias": ("ViTModel", "ViTConfig", {**_IMAGE, "qkv_bias": False}, 1),
    "deit": ("DeiTModel", "DeiTConfig", _IMAGE, 2),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", _IMAGE, 1),
    "ijepa": ("IJepaModel", "IJepaConfig", _IMAGE, 0),
    "dinov2": ("Dinov2Model", "Dinov2Config", _IMAGE, 1),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _IMAGE, 5),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE, 1),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE, 0),
    "siglip2_vision": ("Siglip2VisionModel", "Siglip2VisionConfig", {**_SIZES, "patch_size": 8, "num_patches": 16}, 0),
}
TEXTS = [kind for kind, (*_, config, _) in HOSTS.items() if "vocab_size" in config]
NO_GRID = [*TEXTS, "siglip2_vision"]
BERTS = ["bert", "roberta", "xlm_roberta", "camembert", "electra"]


def make(kind: str, implementation: str = "sdpa", **changes: Any) -> Any:
    cls, config, settings, _ = HOSTS[kind]
    configuration = getattr(transformers, config)(**{**settings, **changes})
    model = getattr(transformers, cls)._from_config(configuration, attn_implementation=implementation).eval()
    shake(model)
    return model


def adapter_of(kind: str) -> Adapter:
    if kind.startswith("dinov2") and Dinov2Adapter().find(make(kind)):
        return Dinov2Adapter()
    return BertAdapter() if kind in BERTS else EncoderAdapter()


def inputs(kind: str, padded: bool = False) -> dict[str, torch.Tensor]:
    if kind == "siglip2_vision":  # images of any shape, as padded lists of patches
        real = torch.ones(2, 16, dtype=torch.long)
        real[1, 12:] = 0
        shapes = torch.tensor([[4, 4], [3, 4]])
        return {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": real, "spatial_shapes": shapes}
    if kind not in TEXTS:
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": mask}


def run(model: Any, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's first output; what stands at padded tokens is no matter."""
    out: torch.Tensor = model(**feed)[0]
    mask = feed.get("attention_mask", feed.get("pixel_attention_mask"))
    return out if mask is None or out.ndim < 3 else out * mask[..., None]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


FOUND = {kind: adapter_of(kind).find(make(kind))[0] for kind in HOSTS}
PAIRS = [(kind, name) for kind, host in FOUND.items() for name in BIDIRECTIONAL if fits(host, name)]


@pytest.mark.parametrize("kind", HOSTS)
def test_layers_are_found_and_described(kind: str) -> None:
    model, adapter = make(kind, hidden_act="gelu"), adapter_of(kind)
    hosts = adapter.find(model)
    assert [(h.index, h.layer_idx, h.refuse) for h in hosts] == [(0, 0, None), (1, 1, None)]
    for host in hosts:
        assert host.module is model.get_submodule(host.name)
        assert (host.dim, host.num_heads, host.num_kv_heads, host.head_dim, host.scale) == (24, 3, 3, 8, 8**-0.5)
        assert (host.is_causal, host.spatial, host.prefix_tokens) == (kind == "clip_text", kind not in NO_GRID, HOSTS[kind][3])
        assert (host.qkv_bias, host.proj_bias, host.qk_norm, host.rope) == (kind != "vit_no_bias", True, False, False)
        state = adapter.softmax_state(host)
        names = [f"{part}_proj.{tensor}" for part in "qkvo" for tensor in ("weight", "bias")]
        assert sorted(state) == sorted(names if host.qkv_bias else [*names[::2], "o_proj.bias"])
        assert {t.data_ptr() for t in state.values()} <= {p.data_ptr() for p in model.parameters()}
    other = EncoderAdapter() if kind in BERTS else BertAdapter()
    assert other.find(model) == []


@pytest.mark.parametrize(("kind", "name"), slow_but(covering(PAIRS), PAIRS))
def test_every_mechanism_in_every_host(kind: str, name: str) -> None:
    """Forward and backward, the function where it can be kept (padding included), and the very same model after undoing."""
    model, adapter = make(kind), adapter_of(kind)
    feed = inputs(kind, padded=True)
    want, before = run(model, feed), snapshot(model)
    undo = put(adapter, model, name, **PRESERVING.get(name, {"window_size": 4, "agent_num": 4} if name == "agent" else {}))
    got = run(model, feed)
    if name in PRESERVING:
        close(got, want)
    got.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    undo()
    assert_same_state(model, before)
    assert torch.equal(run(model, feed), want)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("name", ["gqa", "moh", "diff", "combiner"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "zoo"])
@pytest.mark.parametrize("kind", ["bert", "siglip_text", "clip_text"])
def test_masks_of_every_implementation(kind: str, implementation: str, name: str) -> None:
    """Boolean and added 4-D masks, and (B, N) padding, mean the same to a mechanism."""
    feed = inputs(kind, padded=True)
    model = make(kind, "eager")
    want = run(model, feed)
    model.set_attn_implementation(implementation)
    put(adapter_of(kind), model, name, **PRESERVING[name])
    close(run(model, feed), want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "zoo"])
def test_padding_is_read_from_any_mask(implementation: str) -> None:
    """Agents of a sequence know padding only: what stands there is no matter, whichever mask the host hands over."""
    model, feed = make("bert", implementation), inputs("bert", padded=True)
    put(BertAdapter(), model, "agent", window_size=None, agent_num=4)
    want = run(model, feed)
    feed["input_ids"] = torch.where(feed["attention_mask"].bool(), feed["input_ids"], 7)
    close(run(model, feed), want)
    assert not torch.allclose(run(model, {"input_ids": feed["input_ids"]})[1, :6], want[1, :6], atol=1e-3)


def test_agents_take_sequences() -> None:
    """Agent attention does without a grid in a text model; asked for a grid, it is refused."""
    model = make("bert")
    report = az.swap_attention(model, "agent", agent_num=4)
    assert model.encoder.layer[0].attention.self.mechanism.window_size is None
    assert all(row.preserving is False and row.flops_after for row in report.layers)
    run(model, inputs("bert", padded=True)).sum().backward()
    with pytest.raises(ValueError, match="needs a grid"):
        az.swap_attention(make("bert"), "agent", agent_num=4, window_size=4)


@pytest.mark.parametrize("name", ["agent", "combiner"])
@pytest.mark.parametrize("kind", ["causal", "weights"])
def test_masks_of_pairs_are_not_taken_for_padding(kind: str, name: str) -> None:
    model = make("bert")
    put(BertAdapter(), model, name, **({"window_size": None, "agent_num": 4} if name == "agent" else {}))
    slot = model.encoder.layer[0].attention.self
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if kind == "causal" else torch.randn(5, 5)
    with pytest.raises(ValueError, match="single pairs of tokens"):
        slot(torch.randn(2, 5, 24), mask.expand(2, 1, 5, 5))


@pytest.mark.parametrize("kind", [k for k in ["bert", "clip_text", "dinov2"] if k in HOSTS])
def test_half_precision(kind: str) -> None:
    model = make(kind).bfloat16()
    feed = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs(kind, padded=True).items()}
    want = run(model, feed)
    put(adapter_of(kind), model, "gqa", num_kv_heads=3)
    got = run(model, feed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


def test_names_and_places_of_bert() -> None:
    model, adapter = make("bert"), BertAdapter()
    put(adapter, model, "moh")
    assert isinstance(model.encoder.layer[0].attention.output.dense, nn.Identity)
    state = model.state_dict()
    assert not any("attention.self.query" in name or "attention.output.dense" in name for name in state)
    assert any(name.startswith("encoder.layer.0.attention.self.mechanism.") for name in state)
    assert adapter.find(model) == []


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_prefix_of_the_mechanisms_tensors(kind: str) -> None:
    model, adapter = make(kind), adapter_of(kind)
    prefixes = [adapter.state_prefix(host) for host in adapter.find(model)]
    put(adapter, model, "gqa")
    for prefix in prefixes:
        own = model.get_submodule(prefix.removesuffix(".")).state_dict()
        assert {prefix + name for name in own} <= set(model.state_dict())


def test_both_towers_of_clip() -> None:
    """One model, one numbering: causal layers of the text, layers of the image with a grid."""
    config = transformers.CLIPConfig(text_config=_CLIP_TEXT, vision_config=_IMAGE, projection_dim=16)
    model, adapter = transformers.CLIPModel(config).eval(), EncoderAdapter()
    shake(model)
    feed = {**inputs("clip_text", padded=True), **inputs("clip_vision")}
    want = model(**feed).logits_per_image
    hosts = adapter.find(model)
    assert [(h.index, h.is_causal, h.spatial) for h in hosts] == [
        (0, True, False),
        (1, True, False),
        (2, False, True),
        (3, False, True),
    ]
    put(adapter, model, "gqa", num_kv_heads=3)
    torch.testing.assert_close(model(**feed).logits_per_image, want, atol=1e-4, rtol=1e-4)


def test_causality_is_not_lost() -> None:
    """A noncausal mechanism in a causal tower says so."""
    model, adapter = make("clip_text"), EncoderAdapter()
    put(adapter, model, "gqa", is_causal=False)
    with pytest.raises(ValueError, match="asks for causal attention, 'gqa' was built noncausal"):
        run(model, inputs("clip_text"))


def test_the_grid_follows_the_image() -> None:
    model = make("siglip_vision")
    images = [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 24, 40)]
    want = [model(x, interpolate_pos_encoding=True)[0] for x in images]
    put(EncoderAdapter(), model, "bra", n_win=1, topk=1)
    for x, expected in zip(images, want, strict=True):
        close(model(x, interpolate_pos_encoding=True)[0], expected)


def test_other_layers_are_refused() -> None:
    beit = transformers.BeitModel(transformers.BeitConfig(**_IMAGE, use_relative_position_bias=True))
    assert {str(host.refuse) for host in EncoderAdapter().find(beit)} == {
        "its model adds a relative position bias, which would be lost"
    }
    decoder = make("bert", is_decoder=True)
    assert all("is_decoder=True" in str(host.refuse) for host in BertAdapter().find(decoder))
    audio = transformers.ASTModel(transformers.ASTConfig(**_SIZES, patch_size=8, num_mel_bins=16, max_length=32))
    assert all("of a family that is not known" in str(host.refuse) for host in EncoderAdapter().find(audio))
    for kind in ("bert", "vit"):
        layer = adapter_of(kind).find(make(kind))[0].module
        assert "whole model" in str(adapter_of(kind).find(layer)[0].refuse)
    changed = make("vit")
    layers = [host.module for host in EncoderAdapter().find(changed)]
    layers[0].register_parameter("sink", nn.Parameter(torch.zeros(3)))
    layers[1].q_proj = type("Quantised", (nn.Linear,), {})(24, 24)
    reasons = [str(host.refuse) for host in EncoderAdapter().find(changed)]
    assert "holds sink, which would be lost" in reasons[0]
    assert "q_proj is Quantised" in reasons[1]


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        lambda: az.create_model("llama_tiny"),
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, vocab_size=20)
        ),
    ],
)
def test_models_that_are_no_hosts(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert BertAdapter().find(model) == EncoderAdapter().find(model) == []


def test_cross_attention_stays() -> None:
    model = make("bert", is_decoder=True, add_cross_attention=True)
    assert [host.name for host in BertAdapter().find(model)] == [f"encoder.layer.{i}.attention" for i in range(2)]


def test_inputs_without_a_place() -> None:
    model = make("vit")
    put(EncoderAdapter(), model, "moh")
    slot = next(m for m in model.modules() if type(m).__name__ == "EncoderSlot")
    with pytest.raises(ValueError, match="hands over cache, 'moh' takes none"):
        slot(torch.randn(1, 4, 24), cache=object(), output_attentions=True)


def test_modes_and_gradients_of_the_state() -> None:
    model = make("bert").train()
    model.encoder.layer[0].requires_grad_(False)
    frozen, free = (BertAdapter().softmax_state(host) for host in BertAdapter().find(model))
    assert not any(t.requires_grad for t in frozen.values())
    assert all(t.requires_grad for t in free.values())
    undo = put(BertAdapter(), model, "moh")
    assert all(m.training for m in model.modules())
    model.eval()
    undo()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("kind", [k for k in ["bert", "dinov2"] if k in HOSTS])
def test_gradient_checkpointing(kind: str) -> None:
    feed, no_dropout = inputs(kind), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make(kind, **no_dropout).train()
    put(adapter_of(kind), model, "moh")
    run(model, feed).square().mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    run(model, feed).square().mean().backward()
    assert want
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "clip_vision"])
def test_lora_and_copies(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, feed = make(kind), inputs(kind)
    put(adapter_of(kind), model, "gqa", num_kv_heads=3)
    want = run(model, feed)
    assert torch.equal(run(copy.deepcopy(model), feed), want)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["mechanism.q", "mechanism.v"]))
    close(run(adapted, feed), want)
    run(adapted, feed).square().mean().backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("mechanism" in n and "lora" in n for n in trained)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("bert", "moh"), ("siglip_vision", "hilo"), ("clip_text", "gqa")])
def test_compiles(kind: str, name: str) -> None:
    model, feed = make(kind), inputs(kind, padded=True)
    put(adapter_of(kind), model, name, **PRESERVING[name])
    close(run(torch.compile(model, backend="eager"), feed), run(model, feed))
