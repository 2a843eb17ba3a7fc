"""Official LITv2 checkpoints: every published variant's keys convert and load; what does not fit is listed."""

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

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "litv2.json").read_text())
TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 4, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "num_classes": 3}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of a block once for each stage."""
    keys = dict(manifest["others"])
    for i, (depth, block) in enumerate(zip(manifest["depths"], manifest["blocks"], strict=True)):
        keys |= {f"layers.{i}.blocks.{j}.{name}": shape for j in range(depth) for name, shape in block.items()}
    return keys


def official_state(**options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names of a tiny classifier (in our names, translated back by hand)."""
    model = az.create_model("litv2", **{**TINY, **options})
    state = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("stages.", "layers.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        key = key.replace("downsample.conv.", "downsample.dconv.").replace("downsample.norm.", "downsample.norm_layer.")
        state[key] = torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor  # variances are positive
    return state


def convert(state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict("litv2", state, **{**TINY, **options})


FILES = [(n, p) for n in MANIFESTS for p in ("", "backbone.") if not p or n.endswith("_det")]


@pytest.mark.parametrize(("name", "prefix"), slow_but({("litv2_s", ""), ("litv2_s_det", "backbone.")}, FILES))
def test_published_variants_load(name: str, prefix: str) -> None:
    check_official_keys(MANIFESTS[name], official_keys(MANIFESTS[name]), prefix)


def test_thirteen_variants() -> None:
    assert len(MANIFESTS) == 13
    assert len(official_keys(MANIFESTS["litv2_b"])) == 459
    assert len(official_keys(MANIFESTS["litv2_s_det"])) == 221


def test_values_arrive_where_they_belong() -> None:
    state = official_state(alpha=0.5)
    model = az.create_model("litv2", alpha=0.5, **TINY)
    model.load_state_dict(convert(state, alpha=0.5), strict=True)
    for ours, official in {
        "stages.0.downsample.conv.conv_offset.weight": "layers.0.downsample.dconv.conv_offset.weight",
        "stages.1.downsample.norm.running_var": "layers.1.downsample.norm_layer.running_var",
        "stages.2.blocks.0.mlp.dwconv.bias": "layers.2.blocks.0.mlp.dwconv.dwconv.bias",
        "stages.2.blocks.0.attn.h_proj.weight": "layers.2.blocks.0.attn.h_proj.weight",
        "norm.weight": "norm.weight",
    }.items():
        assert torch.equal(model.state_dict()[ours], state[official])


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), [-2], 1, 2])
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_classifier_as_dense_backbone(indices: Any, feature_cls: str | None) -> None:
    options = {"features_only": True, "out_indices": indices, **({"feature_cls": feature_cls} if feature_cls else {})}
    state, x = official_state(), torch.randn(1, 3, 64, 64)
    backbone, model = az.create_model("litv2", **TINY, **options).eval(), az.create_model("litv2", **TINY).eval()
    backbone.load_state_dict(convert(state, **options), strict=True)
    model.load_state_dict(convert(state), strict=True)
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)


def test_segmentation_flavour_and_single_norms() -> None:
    state = {k: v for k, v in official_state().items() if k.split(".")[0] not in {"norm", "head"}}
    for i in range(4):
        state |= {f"norm{i}.weight": torch.randn(4 * 2**i), f"norm{i}.bias": torch.randn(4 * 2**i)}
    options: dict[str, Any] = {"features_only": True, "out_norm": [True] * 4}
    az.create_model("litv2", **TINY, **options).load_state_dict(convert(state, **options), strict=True)
    with pytest.raises(az.CheckpointError, match=r"unknown keys: norm0\.bias, norm0\.weight$"):
        convert(state, features_only=True, out_norm=[False, True, True, True])
    with pytest.raises(az.CheckpointError, match=r"missing keys: norm1\.bias, norm1\.weight$"):
        convert(official_state(), features_only=True, out_norm=[False, True, False, False])


def test_options_that_change_keys() -> None:
    for options in ({"patch_norm": False}, {"qkv_bias": False}, {"window_sizes": [0, 2, 2, 1], "has_attn": [0, 1, 1, 1]}):
        az.create_model("litv2", **TINY, **options).load_state_dict(convert(official_state(**options), **options), strict=True)
    headless = {**TINY, "num_classes": 0}
    az.create_model("litv2", **headless).load_state_dict(convert(official_state(), num_classes=0), strict=True)


def test_one_projection_for_both_branches() -> None:
    """Our full projection computes what the official two do."""
    state, x = official_state(alpha=0.5), torch.randn(1, 3, 64, 64)
    split, full = ({"alpha": 0.5, "attention_kwargs": {"output_proj": kind}} for kind in ("split", "full"))
    outputs = []
    for options in (split, full):
        model = az.create_model("litv2", **TINY, **options).eval()
        model.load_state_dict(convert(state, **options), strict=True)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_refusals() -> None:
    state = official_state()
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: head\.bias"):
        convert({**{k: v for k, v in state.items() if k != "head.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"missing keys: layers\.0\.blocks\.1\.mlp"):
        convert(state, depths=[2, 1, 1, 1])
    with pytest.raises(az.CheckpointError, match=r"HiLo.*'mha'"):
        convert(state, attention="mha")
    with pytest.raises(az.CheckpointError, match="feature class 'list'"):
        convert(state, features_only=True, feature_cls="list")
    with pytest.raises(az.CheckpointError, match="qk_norm"):
        convert(state, attention_kwargs={"qk_norm": True})
    with pytest.raises(az.CheckpointError, match=r"missing keys: h_proj\.bias"):
        az.convert_official_state_dict("hilo", {}, num_heads=4)
    with pytest.raises(az.CheckpointError, match=r"missing keys: dconv\.bias"):
        az.convert_official_state_dict("dtm", {})


def test_file_of_a_training_run(tmp_path: Path) -> None:
    """As published: the weights under "model", beside the rest of the run's state."""
    state = official_state()
    torch.save({"model": state, "epoch": 299, "lr_scheduler": {"t": 1}}, tmp_path / "litv2.pth")
    model = az.create_model("litv2", checkpoint_path=tmp_path / "litv2.pth", **TINY)
    assert torch.equal(model.head.weight, state["head.weight"])
