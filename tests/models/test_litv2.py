"""LITv2: sizes and costs of the published variants, timm's interface, dense maps, any image size, other mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import slow_but
from model_case import (
    check_feature_maps,
    check_gradient_checkpointing,
    check_head,
    check_intermediates,
    check_layer_decay,
    check_one_graph,
    check_registered,
    close,
    giga_multiply_adds,
    parameters_of,
    small_model,
)
from timm.data import resolve_data_config
from torch import nn
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention import HiLoAttention, MultiHeadAttention
from attention_zoo.training.optim import parameter_groups
from attention_zoo.training.recipe import OptimizerRecipe

NAMES = ["litv2", "litv2_b", "litv2_b_384", "litv2_m", "litv2_s"]
TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "num_classes": 5}


def tiny(**options: Any) -> Any:
    return small_model("litv2", **{**TINY, **options})


# --- the published variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("litv2", {}, 27_844_000),
        ("litv2_s", {}, 27_844_000),
        ("litv2_m", {}, 48_830_368),
        ("litv2_b", {}, 86_520_704),
        ("litv2_b_384", {}, 86_520_704),
        ("litv2_s", {"alpha": 1.0}, 28_089_760),
        ("litv2_s", {"features_only": True, "out_norm": [False, True, True, True]}, 27_076_152),
    ],
)
def test_parameters(name: str, options: dict[str, Any], parameters: int) -> None:
    assert parameters_of(name, **options) == parameters


@pytest.mark.parametrize(("alpha", "giga"), slow_but(1, [(0.9, 3.734), (0.0, 3.965), (0.5, 3.769), (1.0, 3.746)]))
def test_multiply_adds(alpha: float, giga: float) -> None:
    """Products of matrices and convolutions as the official counter has them, which counts 12 offset channels where there are 8."""
    offsets = sum((12 - 8) * 4 * 96 * 2**i * (28 // 2**i) ** 2 for i in range(3))
    rest = 0.012  # normalisations and activations, which it counts
    assert giga_multiply_adds("litv2_s", alpha=alpha) + offsets / 1e9 == pytest.approx(giga, abs=rest)


def test_registered() -> None:
    check_registered("litv2*", NAMES, license="apache-2.0", paper="2205.13213", origin="https://github.com/ziplab/LITv2")


@pytest.mark.parametrize(("name", "rate"), [("litv2", 0.2), ("litv2_s", 0.2), ("litv2_m", 0.3), ("litv2_b", 0.5)])
def test_stochastic_depth_of_the_variants(name: str, rate: float) -> None:
    model = az.create_model(name, device="meta")
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, rate, len(rates)).tolist())


def test_layout() -> None:
    model = az.create_model("litv2_s", device="meta")
    attentions = [[getattr(block, "attn", None) for block in stage.blocks] for stage in model.stages]
    assert attentions[0] == attentions[1] == [None, None]
    assert {(a.window_size, a.h_heads, a.l_heads) for a in attentions[2]} == {(2, 2, 10)}
    assert {(a.window_size, a.h_heads, a.l_heads) for a in attentions[3]} == {(1, 0, 24)}
    assert {m.eps for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))} == {1e-5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    assert resolve_data_config(model=model)["crop_pct"] == 0.875


def test_initialisation() -> None:
    model = az.create_model("litv2", **{**TINY, "embed_dim": 32})
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 5 + 2 * 5 + 3 + 1  # MLPs; HiLo with both branches in stage 2, Lo-Fi only in stage 3; the head
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not linear.bias.any()
    for block in (block for stage in model.stages for block in stage.blocks):
        assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.15)
    assert not any(p.any() for n, p in model.named_parameters() if "conv_offset" in n)


# --- forward ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (54, 42), (29, 130), (33, 61)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """Without rebuilding, and as if the image had been padded with zeros to whole patches."""
    model, x = tiny(), torch.randn(2, 3, *size)
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    close(model(x), model(padded))
    patches = [-(-side // 4) for side in size]
    assert model.forward_features(x).shape == (2, 64, patches[0] // 8, patches[1] // 8)


def test_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=r"img_size=\(28, 64\).*at least 29"):
        tiny(img_size=(28, 64))
    model = tiny()
    with pytest.raises(ValueError, match="larger image"):
        model(torch.randn(1, 3, 64, 28))
    model.set_input_size((29, 32))
    assert model.img_size == (29, 32)


def test_gradient_at_batch_size_one() -> None:
    """Against the same image twice: torch 2.15's batch normalisation on the CPU is wrong for one sample in some layouts."""
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(torch.cat([leaf, leaf]))[0].square().sum(), leaf)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    close(got, want, 1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    check_gradient_checkpointing(tiny)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    check_one_graph(tiny(), torch.randn(2, 3, 54, 42))


# --- timm's interface -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    check_head(tiny)


def test_intermediates() -> None:
    model = tiny()
    check_intermediates(model, torch.randn(2, 3, 54, 42), [(8, 14, 11), (16, 7, 5), (32, 3, 2), (64, 1, 1)])
    assert not any("stages.3" in n or "stages.2.downsample" in n for n, _ in model.named_parameters())


def test_parameter_groups() -> None:
    """The recipe's slow offsets, through the zoo's own groups; timm's layer decay through `group_matcher`."""
    model = tiny()
    recipe = OptimizerRecipe(lr_multipliers=model.lr_multipliers())
    names = {id(p): n for n, p in model.named_parameters()}
    slow = {names[id(p)]: g for g in parameter_groups(model, recipe) for p in g["params"] if g["lr_scale"] == 0.01}
    assert set(slow) == {f"stages.{i}.downsample.conv.conv_offset.weight" for i in range(3)}
    assert all(g["weight_decay"] > 0 for g in slow.values())
    order = [
        "patch_embed.proj.weight",
        "stages.0.blocks.0.norm2.weight",
        "stages.0.downsample.conv.weight",
        "stages.2.blocks.0.attn.l_q.weight",
        "stages.2.blocks.1.attn.l_q.weight",
        "stages.3.blocks.0.mlp.fc1.weight",
        "norm.weight",
        "head.weight",
    ]
    check_layer_decay(model, order, 7)
    assert model.no_weight_decay() == set()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"one entry for each stage.*depths=\(1, 1, 2\)"):
        tiny(depths=(1, 1, 2))
    with pytest.raises(ValueError, match="at least one block"):
        tiny(depths=(1, 0, 2, 1))
    with pytest.raises(ValueError, match=r"window_size.*0"):
        tiny(has_attn=(0, 1, 1, 1))
    with pytest.raises(ValueError, match=r"out_norm.*features_only"):
        tiny(out_norm=[True] * 4)
    with pytest.raises(ValueError, match=r"out_indices.*features_only"):
        tiny(out_indices=[0])
    with pytest.raises(ValueError, match="out_norm must have 2 entries"):
        tiny(features_only=True, out_indices=(0, 1), out_norm=[True])


# --- dense backbone ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,), (-1,), 2])
def test_feature_maps(indices: Any) -> None:
    backbone = az.create_model("litv2", features_only=True, out_indices=indices, **TINY).eval()
    check_feature_maps(tiny(), backbone, torch.randn(2, 3, 54, 42), indices)


def test_norms_of_the_maps() -> None:
    x = torch.randn(1, 3, 64, 64)
    plain, normed = tiny(features_only=True), tiny(features_only=True, out_norm=[False, True, True, True])
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert {n.split(".")[0] for n, _ in normed.named_parameters()} == {"patch_embed", "stages", "norm1", "norm2", "norm3"}
    for i, (a, b) in enumerate(zip(plain(x), normed(x), strict=True)):
        norm = getattr(normed, f"norm{i}", nn.Identity())
        close(norm(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), b)
    assert hasattr(tiny(features_only=True, out_norm=[True] * 4), "norm0")
    by_map = tiny(features_only=True, out_indices=(1, 3), out_norm=[False, True])
    by_stage = tiny(features_only=True, out_indices=(1, 3), out_norm=[True, False, True, True])
    assert [n for n in ("norm0", "norm1", "norm2", "norm3") if hasattr(by_map, n)] == ["norm3"]
    assert [n for n in ("norm0", "norm1", "norm2", "norm3") if hasattr(by_stage, n)] == ["norm3"]


# --- other mechanisms and options -------------------------------------------------------------------------------------------------


def test_options_reach_the_layers() -> None:
    model = tiny(
        alpha=0.5, window_sizes=(0, 2, 4, 1), has_attn=(0, 1, 1, 1), attn_drop_rate=0.1, proj_drop_rate=0.2, patch_norm=False
    )
    attentions = [m for m in model.modules() if isinstance(m, HiLoAttention)]
    assert [(a.window_size, a.l_heads, a.attn_drop, a.proj_drop.p) for a in attentions] == [
        (2, 1, 0.1, 0.2),
        (4, 2, 0.1, 0.2),
        (4, 2, 0.1, 0.2),
        (1, 8, 0.1, 0.2),
    ]
    assert {block.mlp.drop2.p for stage in model.stages for block in stage.blocks} == {0.2}
    assert not any("patch_embed.norm" in n for n, _ in model.named_parameters())
    assert not any("l_q.bias" in n for n, _ in tiny(qkv_bias=False).named_parameters())
    masked = tiny(attention_kwargs={"pad_mode": "mask", "window_size": 3})
    assert {(m.pad_mode, m.window_size) for m in masked.modules() if isinstance(m, HiLoAttention)} == {("mask", 3)}


def test_another_mechanism() -> None:
    model = tiny(attention="mha", attention_kwargs={"qk_norm": True})
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert len(attentions) == 3
    assert isinstance(attentions[0].q_norm, nn.LayerNorm)
    assert model(torch.randn(2, 3, 54, 42)).shape == (2, 5)
    with pytest.raises(ValueError, match="'dtm' cannot stand in LITv2"):
        tiny(attention="dtm")
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(attention_kwargs={"no_such_option": 1})


def test_plain_attention_is_hilo_with_windows_of_one() -> None:
    plain = tiny(attention="mha")
    hilo = tiny(window_sizes=(0, 0, 1, 1))
    state = {}
    for key, tensor in plain.state_dict().items():
        if ".attn.qkv." in key:
            q, kv = tensor.split([tensor.shape[0] // 3, tensor.shape[0] // 3 * 2])
            state |= {key.replace("qkv", "l_q"): q, key.replace("qkv", "l_kv"): kv}
        else:
            state[key.replace(".attn.proj.", ".attn.l_proj.")] = tensor
    hilo.load_state_dict(state)
    x = torch.randn(2, 3, 54, 42)
    close(hilo(x), plain(x))
