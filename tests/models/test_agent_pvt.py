"""Agent-PVT: sizes and costs of the published variants, timm's interface, any image size, other mechanisms."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from marks import slow_but
from model_case import (
    AGENT_PAPER,
    check_feature_maps,
    check_gradient_checkpointing,
    check_head,
    check_intermediates,
    check_layer_decay,
    check_one_graph,
    check_registered,
    close,
    giga_multiply_adds,
    small_model,
)
from parity_case import load_case
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention import AgentAttention, HiLoAttention

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "agent.json").read_text())
NAMES = ["agent_pvt_t", "agent_pvt_s", "agent_pvt_m", "agent_pvt_m_256", "agent_pvt_l"]
TINY: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": [8, 8, 16, 16],
    "num_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "depths": [1, 1, 2, 1],
    "agent_num": [9, 16, 4, 4],
    "num_classes": 5,
}


def tiny(**options: Any) -> Any:
    return small_model("agent_pvt", **{**TINY, **options})


# --- the published variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(2, NAMES))
def test_parameters(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == MANIFESTS[name]["parameters"]
    side = timm.get_pretrained_cfg(name).input_size[1]
    assert model.block4[-1].drop_path2.drop_prob == pytest.approx(0.1 if name[10] in "ts" else 0.3)
    assert model.grids == [(side // 4 // 2**i,) * 2 for i in range(4)]


@pytest.mark.parametrize("name", slow_but(1, NAMES))
def test_multiply_adds(name: str) -> None:
    """Products of matrices and convolutions, as counted from the official code."""
    assert giga_multiply_adds(name) == pytest.approx(MANIFESTS[name]["gmacs"], abs=0.0006)


def test_registered() -> None:
    check_registered("agent_pvt*", ["agent_pvt", *NAMES], **AGENT_PAPER)


def test_layout() -> None:
    model = tiny(attn_type="ABAB", sr_ratios=[8, 4, 2, 1], agent_sr_ratios="2111")
    kinds = [[type(b.attn).__name__ for b in getattr(model, f"block{i}")] for i in (1, 2, 3, 4)]
    agent, plain = "AgentAttention", "SpatialReductionAttention"
    assert kinds == [[agent], [plain], [agent] * 2, [plain]]
    assert [model.block1[0].attn.sr_ratio, model.block2[0].attn.sr_ratio, model.block4[0].attn.sr_ratio] == [2, 4, 1]
    assert (model.block1[0].norm1.eps, model.block2[0].norm2.eps) == (1e-6, 1e-6)
    assert {model.patch_embed1.norm.eps, model.block1[0].attn.norm.eps, model.block2[0].attn.norm.eps} == {1e-5}
    assert not hasattr(model.block4[0].attn, "sr")


def test_stages_as_the_official_code() -> None:
    case = load_case("agent_pvt/tiny_8_4_2_1")
    model, (x, _) = case.build(), case.inputs()
    for i, found in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        close(found.flatten(2).transpose(1, 2), case.tensors[f"debug.stage_{i + 1}"], case.tolerance)


def test_spatial_reduction_by_formula() -> None:
    attn, x = tiny(attn_type="BBBB").block1[0].attn, torch.randn(1, 64, 8)
    image = F.conv2d(x.transpose(1, 2).view(1, 8, 8, 8), attn.sr.weight, attn.sr.bias, stride=8)
    source = F.layer_norm(image.flatten(2).transpose(1, 2), (8,), attn.norm.weight, attn.norm.bias)
    assert source.shape[1] == 1, "a single key"
    close(attn(x, grid_size=(8, 8)), attn.proj(attn.kv(source)[..., 8:]).expand(1, 64, 8))
    attn = tiny(attn_type="BBBB").block4[0].attn
    x = torch.randn(2, 4, 16)
    q, (k, v) = attn.q(x), attn.kv(x).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, k, v))
    close(attn(x, grid_size=(2, 2)), attn.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)))


# --- forward ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (54, 42), (33, 130)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """Without rebuilding; what whole patches do not cover is left out, and resizing for good gives the same."""
    model, x = tiny(), torch.randn(2, 3, *size)
    want = model.forward_features(x)
    assert want.shape == (2, 16, size[0] // 32, size[1] // 32)
    covered = [side // 4 * 4 for side in size]
    close(model.forward_features(x[:, :, : covered[0], : covered[1]]), want)
    model.set_input_size(size)
    assert model.pos_embed1.shape[1] == (size[0] // 4) * (size[1] // 4)
    assert model.block1[0].attn.window_size == (size[0] // 4, size[1] // 4)
    close(model.forward_features(x), want)


def test_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=r"img_size=\(28, 64\) leaves nothing.*at least 32"):
        tiny(img_size=(28, 64))
    with pytest.raises(ValueError, match="leaves nothing"):
        tiny().set_input_size(16)


def test_gradient_checkpointing_changes_nothing() -> None:
    check_gradient_checkpointing(partial(tiny, attn_type="AABB"))


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    check_one_graph(tiny(attn_type="AAAB"), torch.randn(2, 3, 72, 64))


# --- timm's interface -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    check_head(tiny)


def test_intermediates() -> None:
    model = tiny()
    check_intermediates(model, torch.randn(2, 3, 64, 64), [(8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)])
    assert not any(f"{part}4" in n for n, _ in model.named_parameters() for part in ("block", "pos_embed", "patch_embed"))


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), 2])
def test_feature_maps(indices: Any) -> None:
    backbone = az.create_model("agent_pvt", features_only=True, out_indices=indices, **TINY).eval()
    check_feature_maps(tiny(), backbone, torch.randn(2, 3, 64, 64), indices, "model.")


def test_parameter_groups() -> None:
    model = tiny()
    order = [
        "pos_embed1",
        "block1.0.attn.q.weight",
        "patch_embed2.proj.weight",
        "block2.0.attn.q.weight",
        "block3.0.attn.an_bias",
        "block3.1.attn.an_bias",
        "pos_embed4",
        "block4.0.mlp.fc1.weight",
        "head.weight",
    ]
    scale = check_layer_decay(model, order, 9)
    assert scale["pos_embed1"] == scale["patch_embed1.proj.bias"]
    assert model.no_weight_decay() == set()


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_another_mechanism_and_options() -> None:
    model = tiny(attention="hilo", attn_type="AAAB", attention_kwargs={"window_size": 3})
    assert [type(m) for m in model.modules() if isinstance(m, HiLoAttention)] == [HiLoAttention] * 4
    assert model(torch.randn(2, 3, 54, 42)).shape == (2, 5)
    fused = tiny(attention_kwargs={"split_qkv": False, "agent_grid": (2, 3)}, attn_drop_rate=0.1, proj_drop_rate=0.2)
    attn = next(m for m in fused.modules() if isinstance(m, AgentAttention))
    assert (attn.split_qkv, attn.agent_grid, attn.attn_drop, attn.proj_drop.p) == (False, (2, 3), 0.1, 0.2)
    assert "block1.0.attn.qkv.bias" not in dict(tiny(qkv_bias=False).named_parameters())
    assert tiny(num_classes=0, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 16)


def test_agent_grids_of_detection() -> None:
    grids = [(3, 2), None, (1, 4), (2, 2)]
    model, x = tiny(agent_grid=grids), torch.randn(1, 3, 64, 96)
    assert [getattr(model, f"block{i}")[0].attn.agent_grid for i in (1, 2, 3, 4)] == [(3, 2), (4, 4), (1, 4), (2, 2)]
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), plain(x), atol=1e-4)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"one entry for each stage.*attn_type="):
        tiny(attn_type="AAA")
    with pytest.raises(ValueError, match=r"letters A \(agents\) and B"):
        tiny(attn_type="AAAC")
    with pytest.raises(ValueError, match="at least one block"):
        tiny(depths=(1, 0, 2, 1))
    with pytest.raises(ValueError, match="'dtm' cannot stand in Agent-PVT"):
        tiny(attention="dtm")
