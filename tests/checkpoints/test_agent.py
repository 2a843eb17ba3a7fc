"""Official checkpoints of agent attention, Agent-DeiT and Agent-PVT: every published variant's keys load; other resolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.checkpoints.agent import resize_state

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "agent.json").read_text())
DEIT: dict[str, Any] = {
    "img_size": 40,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "agent_num": [9, 4, 4, 4],
    "agent_layer": 2,
    "num_classes": 3,
}
PVT: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": [8, 8, 16, 16],
    "num_heads": [1, 2, 2, 4],
    "mlp_ratios": [2] * 4,
    "depths": [1] * 4,
    "agent_num": [9, 16, 4, 4],
    "attn_type": "AABA",
    "agent_sr_ratios": "2111",
    "num_classes": 3,
}
TINY = {"agent_deit": DEIT, "agent_pvt": PVT}
LAYER: dict[str, Any] = {"dim": 8, "num_heads": 2, "agent_num": 4, "window_size": (4, 6)}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of like blocks once."""
    keys = dict(manifest["others"])
    for prefix, start, stop, block in manifest["blocks"]:
        keys |= {f"{prefix}.{j}.{name}": shape for j in range(start, stop) for name, shape in block.items()}
    return keys


def official_state(family: str, **options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names, which are ours."""
    model = az.create_model(family, **{**TINY[family], **options})
    return {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


def convert(family: str, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict(family, state, **{**TINY[family], **options})


@pytest.mark.parametrize("name", slow_but({"agent_deit_t", "agent_pvt_t"}, MANIFESTS))
def test_published_variants_load(name: str) -> None:
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in official_keys(MANIFESTS[name]).items()}
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)


def test_nine_variants() -> None:
    assert len(MANIFESTS) == 9
    assert len(official_keys(MANIFESTS["agent_deit_b"])) == 192
    assert len(official_keys(MANIFESTS["agent_pvt_l"])) == 924


@pytest.mark.parametrize("family", TINY)
def test_nothing_changes_at_the_same_size(family: str) -> None:
    state = official_state(family)
    converted = convert(family, state)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


# --- other sizes ------------------------------------------------------------------------------------------------------------------


def linear(table: Tensor, axis: int, size: int) -> Tensor:
    moved = table.movedim(axis, -1)
    out = F.interpolate(moved.reshape(1, -1, moved.shape[-1]), size=size, mode="linear", align_corners=False)
    return out.view(*moved.shape[:-1], size).movedim(-1, axis)


def test_tables_of_another_grid() -> None:
    state = {key: torch.randn_like(t) for key, t in az.create_attention("agent", **LAYER).state_dict().items()}
    converted = az.convert_official_state_dict("agent", state, **{**LAYER, "window_size": (7, 5)})
    az.create_attention("agent", **{**LAYER, "window_size": (7, 5)}).load_state_dict(converted)
    for name, axis, size in (("ah_bias", 3, 7), ("aw_bias", 4, 5), ("ha_bias", 2, 7), ("wa_bias", 3, 5)):
        torch.testing.assert_close(converted[name], linear(state[name], axis, size))
    assert torch.equal(converted["an_bias"], state["an_bias"])


def test_half_precision_stays() -> None:
    state = {"ah_bias": torch.randn(1, 2, 4, 3, 1, dtype=torch.float16)}
    resized = resize_state(state, {"ah_bias": torch.empty(1, 2, 4, 5, 1)})["ah_bias"]
    assert resized.dtype == torch.float16
    torch.testing.assert_close(resized.float(), linear(state["ah_bias"].float(), 3, 5), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("size", "grid"), [(64, (8, 8)), ((24, 48), (3, 6)), ((40, 40), (5, 5))])
def test_deit_of_another_size(size: Any, grid: tuple[int, int]) -> None:
    state = official_state("agent_deit")
    converted = convert("agent_deit", state, img_size=size)
    az.create_model("agent_deit", **{**DEIT, "img_size": size}).load_state_dict(converted, strict=True)
    image = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (5, 5))
    want = F.interpolate(image, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(converted["pos_embed"], torch.cat([state["pos_embed"][:, :1], want], 1))
    torch.testing.assert_close(converted["blocks.1.attn.wa_bias"], linear(state["blocks.1.attn.wa_bias"], 3, grid[1]))
    assert torch.equal(converted["blocks.1.attn.ca_bias"], state["blocks.1.attn.ca_bias"])


@pytest.mark.parametrize("size", [96, (64, 96)])
def test_pvt_of_another_size(size: Any) -> None:
    state = official_state("agent_pvt")
    converted = convert("agent_pvt", state, img_size=size)
    az.create_model("agent_pvt", **{**PVT, "img_size": size}).load_state_dict(converted, strict=True)
    height, width = (size, size) if isinstance(size, int) else size
    torch.testing.assert_close(
        converted["block1.0.attn.ah_bias"], linear(state["block1.0.attn.ah_bias"], 3, height // 8), msg="the reduced grid"
    )
    image = state["pos_embed2"].transpose(1, 2).unflatten(2, (8, 8))
    want = F.interpolate(image, size=(height // 8, width // 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(converted["pos_embed2"], want.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("family", "size"), [("agent_deit", (72, 32)), ("agent_pvt", (128, 32)), ("agent_pvt", (32, 64))])
def test_files_of_rectangles_load_at_another_size(family: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Also where the number of positions is a square: the agents' tables tell the sides of the grid."""
    options = {**TINY[family], "img_size": size} | ({"attn_type": "AAAA"} if family == "agent_pvt" else {})
    small = az.create_model(family, **options)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    large = az.create_model(family, **{**options, "img_size": (size[0], 2 * size[1])}, checkpoint_path=tmp_path / "small.pth")
    name, prefix = ("pos_embed", 1) if family == "agent_deit" else ("pos_embed2", 0)
    height, width = (side // 8 for side in size)
    image = small.state_dict()[name][:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    want = F.interpolate(image, size=(height, 2 * width), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.state_dict()[name][:, prefix:], want)


def test_positions_of_an_unknown_grid() -> None:
    state = {key: tensor for key, tensor in official_state("agent_deit").items() if not key.endswith("wa_bias")}
    with pytest.raises(az.CheckpointError, match=r"pos_embed has 35 positions.*set_input_size"):
        resize_state({**state, "pos_embed": torch.empty(1, 36, 4)}, {"pos_embed": torch.empty(1, 26, 4)}, num_prefix_tokens=1)


def test_files_of_another_size_load(tmp_path: Path) -> None:
    state = official_state("agent_deit")
    torch.save({"model": state, "epoch": 299}, tmp_path / "agent.pth")
    model = az.create_model("agent_deit", checkpoint_path=tmp_path / "agent.pth", **{**DEIT, "img_size": 64, "num_classes": 7})
    assert torch.equal(model.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    assert model.blocks[0].attn.ah_bias.shape[3] == 8
    assert not model.head.weight.any(), "a head of other classes starts anew"
    with pytest.raises(az.CheckpointError, match="other sizes"):
        az.create_model("agent_deit", checkpoint_path=tmp_path / "agent.pth", **{**DEIT, "embed_dim": 32})


# --- projections, heads, refusals -------------------------------------------------------------------------------------------------


def test_projections_are_fused_and_split() -> None:
    state, x = official_state("agent_pvt", agent_sr_ratios="1111"), torch.randn(1, 3, 64, 64)
    outputs = []
    for options in ({}, {"attention_kwargs": {"split_qkv": False}}):
        model = az.create_model("agent_pvt", **{**PVT, "agent_sr_ratios": "1111", **options}).eval()
        model.load_state_dict(convert("agent_pvt", state, agent_sr_ratios="1111", **options), strict=True)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    fused = {key: torch.randn_like(t) for key, t in az.create_attention("agent", **LAYER).state_dict().items()}
    split = az.convert_official_state_dict("agent", fused, **LAYER, split_qkv=True)
    again = az.convert_official_state_dict("agent", split, **LAYER)
    assert again.keys() == fused.keys()
    assert all(torch.equal(again[key], fused[key]) for key in fused)


@pytest.mark.parametrize("family", TINY)
def test_heads(family: str) -> None:
    state = official_state(family)
    headless = {**TINY[family], "num_classes": 0}
    az.create_model(family, **headless).load_state_dict(convert(family, state, num_classes=0), strict=True)
    other = convert(family, state, num_classes=7)
    assert other["head.weight"].shape == (7, 16)
    assert not other["head.weight"].any()


@pytest.mark.parametrize("indices", [(0, 1), [-1], 1, (1,)])
@pytest.mark.parametrize("family", TINY)
def test_classifier_as_dense_backbone(family: str, indices: Any) -> None:
    options = {"features_only": True, "out_indices": indices}
    state, x = official_state(family), torch.randn(1, 3, TINY[family]["img_size"], TINY[family]["img_size"])
    backbone, model = az.create_model(family, **TINY[family], **options).eval(), az.create_model(family, **TINY[family]).eval()
    backbone.load_state_dict(convert(family, state, **options), strict=True)
    model.load_state_dict(convert(family, state), strict=True)
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)
    headless = {key: tensor for key, tensor in state.items() if not key.startswith(("norm.", "head."))}
    assert convert(family, headless, **options).keys() == convert(family, state, **options).keys()


@pytest.mark.parametrize("family", TINY)
def test_refusals(family: str) -> None:
    state = official_state(family)
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: head\.bias"):
        convert(family, {**{k: v for k, v in state.items() if k != "head.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"agent attention.*'mha'"):
        convert(family, state, attention="mha")
    with pytest.raises(az.CheckpointError, match=r"missing keys: block.*q_norm"):
        convert(family, state, attention_kwargs={"qk_norm": True})
    with pytest.raises(az.CheckpointError, match=r"missing keys: ah_bias"):
        az.convert_official_state_dict("agent", {}, **LAYER)


def test_options_that_change_keys() -> None:
    for family, options in (
        ("agent_deit", {"qkv_bias": False}),
        ("agent_deit", {"agent_layer": 0}),
        ("agent_pvt", {"qkv_bias": False}),
        ("agent_pvt", {"attn_type": "BBBB", "sr_ratios": [8, 4, 2, 1]}),
    ):
        state = official_state(family, **options)
        az.create_model(family, **{**TINY[family], **options}).load_state_dict(convert(family, state, **options), strict=True)
