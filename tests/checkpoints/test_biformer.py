"""Official BiFormer checkpoints: every published variant's keys convert and load; what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from model_case import check_official_keys
from torch import Tensor

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "biformer.json").read_text())
TINY: dict[str, Any] = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "head_dim": 8, "num_classes": 3}
DENSE: dict[str, Any] = {"features_only": True, "out_norm": "layernorm2d"}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of a block once for each stage."""
    keys = dict(manifest["others"])
    for i, (depth, block) in enumerate(zip(manifest["depths"], manifest["blocks"], strict=True)):
        keys |= {manifest["prefix"].format(i, j, name): shape for j in range(depth) for name, shape in block.items()}
    return keys


def official_state(name: str = "biformer", **options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names of a tiny model (in our names, translated back by hand)."""
    state = {}
    nchw = options.get("variant") == "nchw"
    for key, tensor in az.create_model(name, **TINY, **options).state_dict().items():
        routed = ".attn." in key and not key.startswith("stages.3") and ".attn.lepe" not in key
        if routed:
            key = key.replace(".qkv.", ".qkv_linear." if nchw else ".qkv.qkv.")
            key = key.replace(".proj.", ".output_linear." if nchw else ".wo.")
        if nchw and key.endswith("weight") and (".mlp." in key or (".attn." in key and ".lepe." not in key)):
            tensor = tensor[:, :, None, None]
        state[key] = torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor  # variances are positive
    return state


def convert(state: dict[str, Tensor], name: str = "biformer", **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict(name, state, **TINY, **options)


FILES = [(n, p) for n in MANIFESTS for p in ("", "backbone.") if not p or n.endswith("_det")]


@pytest.mark.parametrize(("name", "prefix"), slow_but({("biformer_tiny", ""), ("biformer_small_det", "backbone.")}, FILES))
def test_published_variants_load(name: str, prefix: str) -> None:
    check_official_keys(MANIFESTS[name], official_keys(MANIFESTS[name]), prefix)


def test_six_variants() -> None:
    """biformer_small_det is the dense one."""
    assert set(MANIFESTS) == {
        *("biformer_tiny", "biformer_small", "biformer_base", "biformer_small_det", "biformer_stl", "biformer_stl_nchw")
    }
    assert len(official_keys(MANIFESTS["biformer_tiny"])) == 264
    assert len(official_keys(MANIFESTS["biformer_small_det"])) == 519


@pytest.mark.parametrize("variant", [None, "legacy", "nchw"])
def test_values_arrive_where_they_belong(variant: str | None) -> None:
    name, options = ("biformer", {}) if variant is None else ("biformer_stl", {"variant": variant})
    state = official_state(name, **options)
    model = az.create_model(name, **TINY, **options)
    model.load_state_dict(convert(state, name, **options), strict=True)
    block = "stages.1.0" if variant is None else "stages.1.blocks.0"
    own, qkv = ("qkv_linear", "output_linear") if variant == "nchw" else ("qkv.qkv", "wo"), model.state_dict()
    for ours, official in {
        "downsample_layers.0.1.running_var": "downsample_layers.0.1.running_var",
        f"{block}.attn.qkv.weight": f"{block}.attn.{own[0]}.weight",
        f"{block}.attn.proj.bias": f"{block}.attn.{own[1]}.bias",
        f"{block}.mlp.0.weight": f"{block}.mlp.0.weight",
        f"{block.replace('1', '3', 1)}.attn.qkv.weight": f"{block.replace('1', '3', 1)}.attn.qkv.weight",
    }.items():
        assert torch.equal(qkv[ours].flatten(), state[official].flatten())


@pytest.mark.parametrize(
    "options",
    [
        {"pos_dwconv": 0},
        {"mlp_dwconv": True},
        {"layer_scale_init": 0.1},
        {"side_dwconv": 0},
        {"soft_routing": True, "diff_routing": True, "param_routing": True},
        {"topks": [0, -1, 2, -2]},
        {"qk_dims": [16, 16, 24, 32], "pre_norm": False},
        {"attention_kwargs": {"out_proj": False, "qkv_bias": False}},
    ],
)
def test_options_that_change_keys(options: dict[str, Any]) -> None:
    state = official_state(**options)
    if "topks" in options:  # neither of the first stages is routed
        state = {k.replace("qkv.qkv", "qkv").replace("wo", "proj") if k.startswith("stages.1") else k: v for k, v in state.items()}
        assert state["stages.0.0.attn.1.weight"].shape == (8, 8, 1, 1)
    model = az.create_model("biformer", **TINY, **options)
    model.load_state_dict(convert(state, **options), strict=True)
    if options not in ({"qk_dims": [16, 16, 24, 32], "pre_norm": False}, {"topks": [0, -1, 2, -2]}):
        with pytest.raises(az.CheckpointError, match="keys: "):
            convert(state)


@pytest.mark.parametrize("variant", ["legacy", "nchw"])
def test_lepe_of_side_1_stays_a_convolution(variant: str) -> None:
    options = {"variant": variant, "side_dwconv": 1}
    state = official_state("biformer_stl", **options)
    model = az.create_model("biformer_stl", **TINY, **options)
    model.load_state_dict(convert(state, "biformer_stl", **options), strict=True)
    layer = {"lepe.weight": torch.randn(8, 1, 1, 1)}
    for name in ("bra", "lepe_attention"):
        official = {"bra": ("qkv.qkv", "wo"), "lepe_attention": ("qkv", "proj")}[name]
        own = az.create_attention(name, dim=8, num_heads=2, side_dwconv=1)
        renamed = {k.replace("qkv", official[0]).replace("proj", official[1]): v for k, v in own.state_dict().items()}
        converted = az.convert_official_state_dict(name, {**renamed, **layer}, dim=8, num_heads=2, side_dwconv=1)
        own.load_state_dict(converted, strict=True)


def test_heads() -> None:
    state = official_state()
    headless = {**TINY, "num_classes": 0}
    model = az.create_model("biformer", **headless)
    model.load_state_dict(az.convert_official_state_dict("biformer", state, **headless), strict=True)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), [-2], 1, 2])
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_classifier_as_dense_backbone(indices: Any, feature_cls: str | None) -> None:
    options = {"features_only": True, "out_indices": indices, **({"feature_cls": feature_cls} if feature_cls else {})}
    state, x = official_state(), torch.randn(1, 3, 64, 64)
    backbone, model = az.create_model("biformer", **TINY, **options).eval(), az.create_model("biformer", **TINY).eval()
    backbone.load_state_dict(convert(state, **options), strict=True)
    model.load_state_dict(convert(state), strict=True)
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), 1])
def test_dense_state(indices: Any) -> None:
    """Norms and stages that no map needs are left out."""
    state = official_state(**DENSE)
    assert not any(key.startswith(("norm.", "head.")) for key in state)
    backbone = az.create_model("biformer", **TINY, **DENSE, out_indices=indices)
    backbone.load_state_dict(convert(state, **DENSE, out_indices=indices), strict=True)
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra_norms\.0\.bias"):
        convert(state, features_only=True)
    with pytest.raises(az.CheckpointError, match=r"missing keys: extra_norms\.0\.bias"):
        convert(official_state(), **DENSE)


def test_refusals() -> None:
    state = official_state()
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: head\.bias"):
        convert({**{k: v for k, v in state.items() if k != "head.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"BRA.*'mha'"):
        convert(state, attention="mha")
    with pytest.raises(az.CheckpointError, match="feature class 'list'"):
        convert(state, features_only=True, feature_cls="list")
    with pytest.raises(az.CheckpointError, match=r"unknown keys: .*qkv\.qkv.*missing keys: .*qkv_linear"):
        convert(official_state("biformer_stl"), "biformer_stl", variant="nchw")
    with pytest.raises(az.CheckpointError, match=r"missing keys: lepe\.bias, lepe\.weight, qkv\.qkv\.bias"):
        az.convert_official_state_dict("bra", {})
    with pytest.raises(az.CheckpointError, match=r"missing keys: lepe\.bias"):
        az.convert_official_state_dict("lepe_attention", {})


def test_file_of_a_training_run(tmp_path: Path) -> None:
    """As published: the weights under "model", beside the rest of the run's state."""
    state = official_state()
    torch.save({"model": state, "epoch": 299, "optimizer": {}}, tmp_path / "biformer.pth")
    model = az.create_model("biformer", checkpoint_path=tmp_path / "biformer.pth", **TINY)
    assert torch.equal(model.head.weight, state["head.weight"])
