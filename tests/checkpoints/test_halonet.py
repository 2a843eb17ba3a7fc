"""Checkpoints of halo attention: timm's eight networks convert and load, the layer's own additions, what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "halonet.json").read_text())
NORM = ("weight", "bias", "running_mean", "running_var")
TINY: dict[str, Any] = {
    "blocks": [{"type": "bottle", "d": 1, "c": 16, "s": 1, "br": 0.5}, {"type": "self_attn", "d": 1, "c": 16, "s": 2, "br": 0.5}],
    "stem_chs": 8,
    "stem_type": "tiered",
    "stem_pool": "",
    "num_features": 24,
    "self_attn_kwargs": {"block_size": 4, "halo_size": 1, "num_heads": 2},
    "num_classes": 3,
}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives a normalisation as its width, and the keys of like blocks once."""
    compact = dict(manifest["others"])
    for kind in manifest["blocks"]:
        compact |= {f"stages.{block}.{key}": shape for block in kind["blocks"] for key, shape in kind["keys"].items()}
    keys = {}
    for key, shape in compact.items():
        if isinstance(shape, int):
            keys |= {f"{key}.{name}": [shape] for name in NORM} | {f"{key}.num_batches_tracked": []}
        else:
            keys[key] = shape
    return keys


@pytest.mark.parametrize("name", slow_but({"sehalonet33ts", "lamhalobotnet50ts_256"}, MANIFESTS))
def test_published_networks_load(name: str) -> None:
    manifest = MANIFESTS[name]
    keys = official_keys(manifest)
    assert len(keys) == manifest["keys"]
    with torch.device("meta"):
        model = az.create_model(name, attention="halo", **({"img_size": 256} if name.endswith("_256") else {}))
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)


def official_state() -> dict[str, Tensor]:
    state = az.create_model("halonet", **TINY).state_dict()
    return {k: torch.randn_like(v).abs() for k, v in state.items() if v.is_floating_point()}  # no counters, as in a bare file


def convert(state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict("halonet", state, **{**TINY, **options})


def test_counters_and_projections_are_filled_in() -> None:
    state, x = official_state(), torch.randn(1, 3, 32, 32)
    outputs = []
    for own in ({}, {"out_proj": True}):
        model = az.create_model("halonet", attention_kwargs=own, **TINY).eval()
        converted = convert(state, attention_kwargs=own)
        assert converted.keys() == model.state_dict().keys()
        model.load_state_dict(converted, strict=True)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    layer = {k.removeprefix("stages.1.0.self_attn."): v for k, v in state.items() if ".self_attn." in k}
    projected = az.convert_official_state_dict("halo", layer, dim=8, num_heads=2, block_size=4, halo_size=1)
    assert torch.equal(projected["proj.weight"], torch.eye(8))
    assert az.convert_official_state_dict("halo", projected, dim=8, num_heads=2, block_size=4, halo_size=1) == projected


@pytest.mark.parametrize("indices", [None, (0, 1), [1]])
def test_as_a_dense_backbone(indices: Any) -> None:
    state, x = official_state(), torch.randn(1, 3, 32, 32)
    options = {"features_only": True, **({} if indices is None else {"out_indices": indices})}
    backbone, model = az.create_model("halonet", **TINY, **options).eval(), az.create_model("halonet", **TINY).eval()
    backbone.load_state_dict(convert(state, **options), strict=True)
    model.load_state_dict(convert(state), strict=True)
    want = model.forward_intermediates(x, indices=None if indices is None else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_head() -> None:
    az.create_model("halonet", **{**TINY, "num_classes": 0}).load_state_dict(convert(official_state(), num_classes=0), strict=True)


def test_refusals() -> None:
    state = official_state()
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: head\.fc\.bias"):
        convert({**{k: v for k, v in state.items() if k != "head.fc.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"halo attention.*'mha'"):
        convert(state, attention="mha")
    with pytest.raises(az.CheckpointError, match="feature class 'list'"):
        convert(state, features_only=True, feature_cls="list")
    with pytest.raises(az.CheckpointError, match=r"missing keys: kv\.weight, pos_embed\.height_rel"):
        az.convert_official_state_dict("halo", {}, dim=8)


def test_file(tmp_path: Path) -> None:
    state = official_state()
    torch.save(state, tmp_path / "halonet.pth")
    model = az.create_model("halonet", checkpoint_path=tmp_path / "halonet.pth", **TINY)
    assert torch.equal(model.head.fc.weight, state["head.fc.weight"])
