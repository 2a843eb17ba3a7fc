"""Official MoH-DiT checkpoints: the eight published variants convert and load, dense DiTs too; what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "moh_dit.json").read_text())
TINY: dict[str, Any] = {"input_size": 4, "dim": 16, "depth": 2, "num_heads": 4, "shared_heads": [2, 4], "routed_topk": [1, 0]}
OFFICIAL = {"router": "wg", "shared_router": "wg_1", "balance": "wg_0"}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of like blocks once."""
    keys = dict(manifest["others"])
    for kind in manifest["blocks"]:
        keys |= {f"blocks.{block}.{key}": shape for block in kind["blocks"] for key, shape in kind["keys"].items()}
    return keys


def official_state(**options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names of a tiny model (in our names, translated back by hand)."""
    state = az.create_model("moh_dit", **{**TINY, **options}).state_dict()
    return {".".join(OFFICIAL.get(part, part) for part in key.split(".")): torch.randn_like(t) for key, t in state.items()}


@pytest.mark.parametrize("name", slow_but(1, MANIFESTS))
def test_published_variants_load(name: str) -> None:
    manifest = MANIFESTS[name]
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in official_keys(manifest).items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["trainable"]
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)


def test_values_arrive_where_they_belong() -> None:
    state = official_state()
    model = az.create_model("moh_dit", **TINY)
    model.load_state_dict(az.convert_official_state_dict("moh_dit", state, **TINY), strict=True)
    own = model.state_dict()
    for ours, official in {
        "blocks.0.attn.router.weight": "blocks.0.attn.wg.weight",
        "blocks.0.attn.balance.weight": "blocks.0.attn.wg_0.weight",
        "blocks.1.attn.shared_router.weight": "blocks.1.attn.wg_1.weight",
        "blocks.1.adaLN_modulation.1.bias": "blocks.1.adaLN_modulation.1.bias",
        "pos_embed": "pos_embed",
    }.items():
        assert torch.equal(own[ours], state[official])


def test_file_of_a_training_run(tmp_path: Path) -> None:
    """As published: of the weights and their moving average, the average is taken."""
    state = official_state()
    torch.save({"model": official_state(), "ema": state, "opt": {}}, tmp_path / "moh_dit.pt")
    model = az.create_model("moh_dit", checkpoint_path=tmp_path / "moh_dit.pt", **TINY)
    assert torch.equal(model.final_layer.linear.weight, state["final_layer.linear.weight"])


def test_dense_dit() -> None:
    dense = {k: v for k, v in official_state().items() if ".wg" not in k}
    options = {**{k: v for k, v in TINY.items() if k not in {"shared_heads", "routed_topk"}}, "attention": "mha"}
    model = az.create_model("moh_dit", **options)
    model.load_state_dict(az.convert_official_state_dict("moh_dit", dense, **options), strict=True)


def test_refusals() -> None:
    state = official_state()
    broken = {k: v for k, v in state.items() if k != "blocks.0.attn.wg_0.weight"} | {"extra": torch.empty(1)}
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: blocks\.0\.attn\.wg_0\.weight"):
        az.convert_official_state_dict("moh_dit", broken, **TINY)
    with pytest.raises(az.CheckpointError, match=r"MoH attention.*'hilo'"):
        az.convert_official_state_dict("moh_dit", state, attention="hilo", **TINY)
