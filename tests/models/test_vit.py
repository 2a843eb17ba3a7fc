"""Vision Transformers with our mechanisms: equal to timm's where they should be, and aware of prefix tokens and grids."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch

import attention_zoo as az
from attention_zoo.models.vit import AttentionBlock

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
INFOS = [az.attention_info(name) for name in az.list_attentions(pattern="noncausal_self")]
IN_VIT = [info.name for info in INFOS if info.keeps_shape and info.grid_multiple == (1, 1)]  # the tests' grids are small


def tiny(attention, **kwargs):
    return az.create_model("vit_tiny_patch16_224", attention=attention, **{**TINY, **kwargs})


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"qkv_bias": False, "init_values": 0.1}])
def test_mha_is_timms_attention(options):
    ours, theirs = tiny("mha", **options), timm.create_model("vit_tiny_patch16_224", **TINY, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", IN_VIT)
def test_every_mechanism_trains_in_a_vit(attention):
    model = tiny(attention)
    loss = model(torch.randn(2, 3, 32, 32)).square().mean() + az.auxiliary_loss(model)
    loss.backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("attention", IN_VIT)
def test_varying_image_size(attention):
    """The grid that a spatial mechanism gets is that of the image at hand."""
    model = tiny(attention, dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == model(torch.randn(1, 3, 24, 40)).shape == (1, 5)


@pytest.mark.parametrize("attention", IN_VIT)
def test_feature_maps(attention):
    model = tiny(attention, features_only=True, out_indices=(0, 1))
    assert [m.shape for m in model(torch.randn(1, 3, 32, 32))] == [(1, 24, 4, 4)] * 2


SPATIAL = [n for n in IN_VIT if az.attention_info(n).spatial and not az.attention_info(n).prefix_tokens]


@pytest.mark.parametrize("attention", SPATIAL)
def test_spatial_mechanisms_have_no_class_token(attention):
    model = tiny(attention)
    assert model.cls_token is None
    assert model.global_pool == "avg"
    for options in ({"class_token": True}, {"reg_tokens": 1}, {"global_pool": "token"}):
        with pytest.raises(ValueError, match="no place for class or register tokens"):
            tiny(attention, **options)


@pytest.mark.parametrize("attention", SPATIAL)
def test_copies_follow_their_own_grid(attention):
    model = tiny(attention, dynamic_img_size=True).eval()
    twin = copy.deepcopy(model)
    x, y = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 24, 40)
    model(y)
    twin(x)
    assert model.blocks[0].grid_size == (3, 5)
    assert twin.blocks[0].grid_size == (4, 4)


def test_masks_of_the_host():
    model = tiny("mha").eval()
    x = torch.randn(2, 3, 32, 32)
    allowed = torch.ones(17, 17, dtype=torch.bool).tril()
    reference = timm.create_model("vit_tiny_patch16_224", **TINY)
    reference.load_state_dict(model.state_dict())
    theirs = reference.eval().forward_features(x, attn_mask=allowed)
    torch.testing.assert_close(model.forward_features(x, attn_mask=allowed), theirs, atol=2e-5, rtol=1e-4)
    batched = allowed.expand(2, 17, 17)
    torch.testing.assert_close(model.blocks[0](torch.randn(2, 17, 24), attn_mask=batched).shape, torch.Size([2, 17, 24]))
    with pytest.raises(ValueError, match="is_causal=True"):
        model.forward_features(x, is_causal=True)


def test_causal_by_construction():
    model = tiny("mha", attention_kwargs={"is_causal": True}).eval()
    tokens = torch.randn(1, 17, 24)
    changed = tokens.clone()
    changed[:, -1] += 1
    a, b = model.blocks(tokens), model.blocks(changed)
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_a_named_variant_takes_another_mechanism_and_the_family_other_sizes():
    assert (
        type(az.create_model("vit_small_patch16_224_gqa", attention="mha", **TINY).blocks[0].attn).__name__ == "MultiHeadAttention"
    )
    model = az.create_model("vit_kdgqa", attention="pgqa", **{**TINY, "num_heads": 4})
    assert model.blocks[0].attn.num_kv_heads == 2


def test_a_named_model_gives_one_answer():
    x = torch.randn(2, 3, 32, 32)
    model = az.create_model("vit_small_patch16_224_pgqa", **TINY).eval()
    assert [b.attn.noise_mode for b in model.blocks] == ["always"] * len(model.blocks)
    assert torch.equal(model(x), model(x))
    drawn = az.create_model("vit_small_patch16_224_pgqa", **TINY, attention_kwargs={"eval_seed": None}).eval()
    assert not torch.equal(drawn(x), drawn(x))
    assert not hasattr(az.create_model("vit_small_patch16_224_pgqa", attention="kdgqa", **TINY).blocks[0].attn, "eval_seed")


def test_options_reach_the_mechanism():
    model = tiny("gqa", attention_kwargs={"num_kv_heads": 1}, attn_drop_rate=0.25, proj_drop_rate=0.5)
    attn = model.blocks[0].attn
    assert (attn.num_kv_heads, attn.attn_drop, attn.proj_drop.p, attn.layer_idx) == (1, 0.25, 0.5, 0)
    assert isinstance(model.blocks[0], AttentionBlock)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        (f"vit_{size}_patch16_224_{a}", m)
        for size, m in (("small", 20.28), ("base", 79.48), ("large", 279.14))
        for a in ("gqa", "pgqa")
    ],
)
def test_parameter_counts_of_the_paper(name, millions):
    with torch.device("meta"):
        model = az.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
