"""timm's Vision Transformers as hosts: what is found, what is refused, and what a swap leaves as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import timm
import torch
from marks import covering, slow_but
from swap_case import BIDIRECTIONAL, PRESERVING, assert_same_state, build, fits, put, shake, snapshot
from timm.layers import AttentionRope
from timm.models._features_fx import create_feature_extractor
from torch import nn

import attention_zoo as az
from attention_zoo.swap.vision import TimmAdapter

ADAPTER = TimmAdapter()
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}

# Kind of host -> timm's name, its class and register tokens, and what is changed of it.
HOSTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", 1, {}),
    "vit_avg": ("vit_tiny_patch16_224", 0, {"class_token": False, "global_pool": "avg"}),
    "vit_norm": ("vit_tiny_patch16_224", 1, {"qk_norm": True, "qkv_bias": False, "proj_bias": False}),
    "deit": ("deit_tiny_distilled_patch16_224", 2, {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 5, {}),
    "clip": ("vit_base_patch32_clip_224", 1, {}),
    "siglip": ("vit_base_patch16_siglip_224", 0, {}),
    "eva": ("eva_giant_patch14_224", 1, {}),
    "eva02": ("eva02_tiny_patch14_224", 1, {}),
    "dinov3": ("vit_small_patch16_dinov3", 5, {}),
    "pe": ("vit_pe_core_tiny_patch16_384", 1, {}),
}
ROTATED = ("eva02", "dinov3", "pe")


def make(kind: str, **kwargs: Any) -> nn.Module:
    name, _, changes = HOSTS[kind]
    model = timm.create_model(name, **{**TINY, **changes, **kwargs}).eval()
    shake(model)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


FOUND = {kind: ADAPTER.find(make(kind))[0] for kind in HOSTS}
PAIRS = [(kind, name) for kind, host in FOUND.items() for name in BIDIRECTIONAL if fits(host, name)]


@pytest.mark.parametrize("kind", HOSTS)
def test_layers_are_found_and_described(kind: str) -> None:
    model = make(kind)
    hosts = ADAPTER.find(model)
    assert [(h.name, h.index, h.refuse) for h in hosts] == [("blocks.0.attn", 0, None), ("blocks.1.attn", 1, None)]
    for host in hosts:
        assert host.module is model.get_submodule(host.name)
        assert (host.dim, host.num_heads, host.num_kv_heads, host.head_dim, host.is_causal) == (24, 3, 3, 8, False)
        assert (host.prefix_tokens, host.spatial, host.rope) == (HOSTS[kind][1], True, kind in ROTATED)
        assert (host.qk_norm, host.scale) == (kind == "vit_norm", 8**-0.5)
        state = ADAPTER.softmax_state(host)
        assert ("q_proj.bias" in state, "o_proj.bias" in state) == (host.qkv_bias, host.proj_bias)
        assert all(tensor.shape == (24, 24) for name, tensor in state.items() if name.endswith("proj.weight"))
        assert host.qkv_bias == (kind not in ("vit_norm", "dinov3"))


@pytest.mark.parametrize(("kind", "name"), slow_but(covering(PAIRS), PAIRS))
def test_every_mechanism_in_every_host(kind: str, name: str) -> None:
    """Forward and backward, the function where it can be kept, and the very same model after undoing."""
    model, x = make(kind), images()
    want, before = model(x), snapshot(model)
    options = PRESERVING.get(name, {"window_size": 4, "agent_num": 4} if name == "agent" else {})
    undo = put(ADAPTER, model, name, **options)
    got = model(x)
    if name in PRESERVING:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    got.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    prefix = model.get_submodule("blocks.0.attn").mechanism.state_dict()
    assert {f"blocks.0.attn.mechanism.{n}" for n in prefix} <= set(model.state_dict())
    undo()
    assert_same_state(model, before)
    assert torch.equal(model(x), want)
    assert not model.patch_embed.proj._forward_hooks


def test_eva_with_separate_projections() -> None:
    """Its keys have no bias where its queries and values have one."""
    model, x = make("eva02", qkv_fused=False, qkv_bias=True), images()
    want = model(x)
    put(ADAPTER, model, "gqa", num_kv_heads=3)
    torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rotate_half", [False, True])
def test_both_layouts_of_rotation(rotate_half: bool) -> None:
    model, x = make("dinov3"), images()
    for block in model.blocks:
        block.attn.rotate_half = rotate_half
    want = model(x)
    put(ADAPTER, model, "moh")
    torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(AttentionRope).parameters, reason="this timm has no grouped key/value heads"
)
def test_grouped_key_value_heads() -> None:
    model, x = make("eva02"), images()
    for block in model.blocks:
        block.attn = AttentionRope(24, 3, qkv_fused=False, num_kv_heads=1, rotate_half=True).eval()
    want = model(x)
    assert [host.num_kv_heads for host in ADAPTER.find(model)] == [1, 1]
    put(ADAPTER, model, "gqa", num_kv_heads=1)
    torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-4)


def test_dropped_patches_take_their_rotation_with_them() -> None:
    model, x = make("dinov3", patch_drop_rate=0.5).train(), images()
    torch.manual_seed(3)
    want = model(x)
    put(ADAPTER, model, "gqa", num_kv_heads=3)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-4)


def test_images_of_native_aspect_ratio() -> None:
    """NaFlexVit: no grid, and a mask for the padding."""
    model = timm.create_model("naflexvit_base_patch16_gap", patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    shake(model)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    coord = torch.stack([rows, columns], -1).flatten(0, 1).expand(2, 16, 2)
    feed = {"patches": torch.randn(2, 16, 192), "patch_coord": coord, "patch_valid": valid}
    want = model(feed)
    assert not any(host.spatial for host in ADAPTER.find(model))
    put(ADAPTER, model, "moh")
    torch.testing.assert_close(model(feed), want, atol=2e-5, rtol=1e-4)


def test_traced_feature_extraction() -> None:
    model, x = make("siglip"), images()
    put(ADAPTER, model, "hilo", window_size=1)
    traced = create_feature_extractor(model, ["norm"])
    torch.testing.assert_close(traced(x)["norm"], model.forward_features(x))


@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_masks_and_causality(kind: str) -> None:
    """A mask for pairs of tokens, in each of timm's shapes; causality is asked of a mechanism that has none."""
    model, x = make(kind), images()
    tokens = 16 + HOSTS[kind][1]
    visible = torch.rand(tokens, tokens) > 0.3
    visible.fill_diagonal_(True)
    added = torch.zeros(tokens, tokens).masked_fill(~visible, -torch.inf)
    masks = [visible, added, visible.expand(2, 1, -1, -1)]
    want = [model.forward_features(x, attn_mask=mask) for mask in masks]
    put(ADAPTER, model, "gqa", num_kv_heads=3)
    for mask, expected in zip(masks, want, strict=True):
        torch.testing.assert_close(model.forward_features(x, attn_mask=mask), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="built noncausal"):
        model.blocks[0](torch.randn(1, 4, 24), is_causal=True)


def test_mask_without_a_place() -> None:
    model = make("siglip")
    put(ADAPTER, model, "hilo", window_size=1)
    with pytest.raises(ValueError, match="hands over attention_mask, 'hilo' takes none"):
        model.forward_features(images(), attn_mask=torch.ones(16, 16, dtype=torch.bool))


@pytest.mark.parametrize("name", ["halo", "hilo", "bra"])
def test_the_grid_follows_the_image(name: str) -> None:
    """Settings that keep the function on any grid keep it on images that are not square."""
    options = {"halo": {"block_size": 6, "halo_size": 0}, "hilo": {"window_size": 1}, "bra": {"n_win": 1, "topk": 1}}[name]
    model = make("vit_avg", dynamic_img_size=True)
    sizes = [(32, 32), (24, 40), (16, 24)]
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    want = [model(x) for x in inputs]
    put(ADAPTER, model, name, **options)
    for x, expected in zip(inputs, want, strict=True):
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "why"),
    [
        ("beit_base_patch16_224", {}, "relative position bias"),
        ("vit_relpos_small_patch16_224", {}, "relative position bias"),
        ("vit_small_patch16_rope_mixed_224", {}, "rotary tables of its own"),
        ("beit3_base_patch16_224", {}, "normalised before the projection"),
        ("vit_large_patch14_xp_224", {}, "with those of its MLP"),
        ("vit_dlittle_patch16_reg1_gap_256", {}, "is not softmax attention of all tokens"),
        ("swin_tiny_patch4_window7_224", {}, "relative position bias"),
        ("pvt_v2_b0", {}, "is not softmax attention of all tokens"),
        ("cait_xxs24_224", {}, "is not softmax attention of all tokens"),
    ],
)
def test_other_attention_is_refused(name: str, kwargs: dict[str, Any], why: str) -> None:
    with torch.device("meta"):
        hosts = ADAPTER.find(timm.create_model(name, **kwargs))
    assert hosts
    assert all(why in str(host.refuse) for host in hosts if "cls_attn" not in host.name)


def test_changed_layers_are_refused() -> None:
    model = make("vit")
    model.blocks[0].attn.gate = nn.Linear(24, 24)
    model.blocks[1].attn.proj = nn.Sequential(nn.Linear(24, 24))
    model.blocks[1].attn.proj.out_features = 24
    model.blocks[1].attn.proj.bias = None
    reasons = [host.refuse for host in ADAPTER.find(model)]
    assert "gated" in str(reasons[0])
    assert "proj is Sequential" in str(reasons[1])
    other = make("vit")
    other.blocks[0].attn.register_parameter("sink", nn.Parameter(torch.zeros(3)))
    other.blocks[1].attn.__class__ = type("Mine", (type(other.blocks[1].attn),), {})
    reasons = [host.refuse for host in ADAPTER.find(other)]
    assert "holds sink, which would be lost" in str(reasons[0])
    assert "Mine changes timm's Attention" in str(reasons[1])


def test_models_that_are_no_hosts() -> None:
    assert ADAPTER.find(nn.Sequential(nn.Linear(3, 3))) == []
    assert ADAPTER.find(timm.create_model("resnet10t")) == []
    assert "whole model" in str(ADAPTER.find(make("vit").blocks[0].attn)[0].refuse)


def test_dropped_patches_leave_no_grid() -> None:
    assert not ADAPTER.find(make("vit", patch_drop_rate=0.5))[0].spatial


def test_half_precision() -> None:
    """Rotary tables stay as precise as the host has them."""
    model, x = make("eva02").bfloat16(), images().bfloat16()
    want = model(x)
    put(ADAPTER, model, "gqa", num_kv_heads=3)
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), want, atol=0.1, rtol=0.1)


def test_single_layers_keep_their_numbers() -> None:
    model = make("vit")
    first, second = ADAPTER.find(model)
    undo = ADAPTER.install(model, first, build(ADAPTER, first, "moh"))
    assert [(h.name, h.index) for h in ADAPTER.find(model)] == [(second.name, 1)]
    undo()
    assert [h.index for h in ADAPTER.find(model)] == [0, 1]
    assert model.blocks[0].attn is first.module


def test_train_mode_and_requires_grad_of_the_state() -> None:
    model = make("vit").train()
    model.blocks[0].attn.requires_grad_(False)
    frozen, free = (ADAPTER.softmax_state(host) for host in ADAPTER.find(model))
    assert not any(t.requires_grad for t in frozen.values())
    assert all(t.requires_grad for t in free.values())
    undo = put(ADAPTER, model, "moh")
    assert all(m.training for m in model.modules())
    model.eval()
    undo()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["moh", "hilo"])
def test_copies_and_pickles_follow_their_own_grid(name: str) -> None:
    model, x = make("siglip"), images()
    put(ADAPTER, model, name, **PRESERVING[name])
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.blocks[0].attn.grid_size = None
        assert torch.equal(twin(x), want)
        assert model.blocks[0].attn is not twin.blocks[0].attn


def test_features_checkpointing_and_auxiliary_losses() -> None:
    model, x = make("vit"), images()
    put(ADAPTER, model, "moh", routed_topk=1)
    want = model(x)
    want.sum().backward()
    gradient = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model.train()
    model(x).sum().backward()
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, gradient, atol=1e-5, rtol=1e-4)
    assert az.auxiliary_loss(model) > 0
    features = model.eval().forward_intermediates(x, indices=2, intermediates_only=True)
    assert [f.shape for f in features] == [(2, 24, 4, 4)] * 2


def test_lora_on_a_swapped_model() -> None:
    peft = pytest.importorskip("peft")
    model, x = make("vit"), images()
    put(ADAPTER, model, "moh")
    want = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=True))
    torch.testing.assert_close(adapted(x), want, atol=1e-6, rtol=1e-5)
    adapted(x).sum().backward()
    assert any("blocks.0.attn.mechanism" in n and p.grad is not None for n, p in adapted.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("siglip", "hilo"), ("eva02", "moh"), ("vit", "gqa")])
def test_compiles(kind: str, name: str) -> None:
    model, x = make(kind), images()
    put(ADAPTER, model, name, **PRESERVING[name])
    want = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want, atol=2e-5, rtol=1e-4)
