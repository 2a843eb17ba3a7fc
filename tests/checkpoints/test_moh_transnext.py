"""Official checkpoints of MoH-TransNeXt and TransNeXt: every published variant's keys load; what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor

import attention_zoo as az
from attention_zoo.attention import set_routed_topk

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "moh_transnext.json").read_text())
TINY: dict[str, Any] = {
    "img_size": 32,
    "num_classes": 3,
    "embed_dims": (4, 4, 8, 8),
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "shared_heads": (2, 1, 2, 0),
    "routed_topk": (0, 1, 1, 2),
    "mlp_ratios": (2, 2, 2, 2),
}
ROUTERS = {"shared_router": "wg_1", "router": "wg", "balance": "wg_0"}


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of a block once for each stage."""
    keys = dict(manifest["others"])
    for i, (depth, block) in enumerate(zip(manifest["depths"], manifest["blocks"], strict=True), 1):
        keys |= {f"block{i}.{j}.{name}": shape for j in range(depth) for name, shape in block.items()}
    return keys


def official_name(key: str) -> str:
    parts = key.split(".")
    return ".".join([*parts[:-2], ROUTERS.get(parts[-2], parts[-2]), parts[-1]]) if len(parts) > 1 else key


def official_state(**options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names of a tiny classifier (in our names, translated back by hand)."""
    model = az.create_model("moh_transnext", **{**TINY, **options})
    return {official_name(key): torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


def convert(state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict("moh_transnext", state, **{**TINY, **options})


@pytest.mark.parametrize("name", slow_but(1, MANIFESTS))
def test_published_variants_load(name: str) -> None:
    manifest = MANIFESTS[name]
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in official_keys(manifest).items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)


def test_four_variants() -> None:
    assert len(MANIFESTS) == 4
    assert len(official_keys(MANIFESTS["moh_transnext_base_50"])) == 1197
    assert len(official_keys(MANIFESTS["moh_transnext_small_80"])) == 1145


def test_values_arrive_where_they_belong() -> None:
    state = official_state()
    model = az.create_model("moh_transnext", **TINY)
    model.load_state_dict(convert(state), strict=True)
    for ours, official in {
        "block1.0.attn.shared_router.weight": "block1.0.attn.wg_1.weight",
        "block2.1.attn.router.weight": "block2.1.attn.wg.weight",
        "block3.0.attn.balance.weight": "block3.0.attn.wg_0.weight",
        "block4.0.attn.router.weight": "block4.0.attn.wg.weight",
        "block1.0.mlp.dwconv.dwconv.weight": "block1.0.mlp.dwconv.dwconv.weight",
        "block3.0.attn.learnable_tokens": "block3.0.attn.learnable_tokens",
    }.items():
        assert torch.equal(model.state_dict()[ours], state[official])


@pytest.mark.parametrize("name", ["moh_transnext_global", "moh_transnext_aggregated"])
@pytest.mark.parametrize("heads", [(1, 2), (3, 0), (0, 2), (2, 1)])
def test_single_layers(name: str, heads: tuple[int, int]) -> None:
    options: dict[str, Any] = {"dim": 6, "num_heads": 3, "shared_heads": heads[0], "routed_topk": heads[1]}
    module = az.create_attention(name, **options)
    state = {official_name(key): torch.randn_like(tensor) for key, tensor in module.state_dict().items()}
    module.load_state_dict(az.convert_official_state_dict(name, state, **options), strict=True)
    dense = {key: tensor for key, tensor in state.items() if not key.startswith("wg")}
    module.load_state_dict(az.convert_official_state_dict(name, dense, **options), strict=True)
    assert not any(p.any() for n, p in module.named_parameters() if n.split(".")[0] in ROUTERS)
    with pytest.raises(az.CheckpointError, match=r"missing keys: proj\.bias"):
        az.convert_official_state_dict(name, {k: v for k, v in state.items() if k != "proj.bias"}, **options)


def test_a_transnext_becomes_a_moh_transnext() -> None:
    """Weights without routers: with all routed heads chosen every gate is 1, as in a model without gates."""
    state = {key: tensor / 10 for key, tensor in official_state().items() if ".wg" not in key}
    model = az.create_model("moh_transnext", **TINY).eval()
    model.load_state_dict(convert(state), strict=True)
    set_routed_topk(model, [1, 1, 2, 4])
    x, gates = torch.randn(2, 3, 32, 32), []
    for module in model.modules():
        if hasattr(module, "_route_linearly"):
            module.register_forward_pre_hook(lambda m, args: gates.append(m._route_linearly(args[0])[0]))
    model(x)
    assert len(gates) == 5
    assert all(torch.allclose(g, torch.ones_like(g)) for g in gates)
    some = {**state, "block1.0.attn.wg_1.weight": torch.zeros(2, 4)}
    with pytest.raises(az.CheckpointError, match=r"missing keys: block2\.0\.attn\.wg\.weight"):
        convert(some)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), [-2], 1, 2])
def test_classifier_as_dense_backbone(indices: Any) -> None:
    options = {"features_only": True, "out_indices": indices}
    state, x = official_state(), torch.randn(1, 3, 32, 32)
    backbone, model = (az.create_model("moh_transnext", **TINY, **kwargs).eval() for kwargs in (options, {}))
    backbone.load_state_dict(convert(state, **options), strict=True)
    model.load_state_dict(convert(state), strict=True)
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)


def test_options_that_change_keys() -> None:
    for options in (
        {"qkv_bias": False},
        {"sr_ratios": (4, 1, 2, 1), "window_sizes": (5, None, 1, None)},
        {"sr_ratios": (4, 2, 2, 1), "window_sizes": (None, 5, None, None)},
        {"attention_kwargs": {"cpb_hidden": 7}},
    ):
        az.create_model("moh_transnext", **TINY, **options).load_state_dict(
            convert(official_state(**options), **options), strict=True
        )
    headless = {**TINY, "num_classes": 0}
    az.create_model("moh_transnext", **headless).load_state_dict(convert(official_state(), num_classes=0), strict=True)


def test_refusals() -> None:
    state = official_state()
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: head\.bias"):
        convert({**{k: v for k, v in state.items() if k != "head.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"missing keys: block1\.1\.attn"):
        convert(state, depths=(2, 2, 1, 1))
    with pytest.raises(az.CheckpointError, match=r"published attentions.*'mha'"):
        convert(state, attention="mha")
    with pytest.raises(az.CheckpointError, match="feature class 'list'"):
        convert(state, features_only=True, feature_cls="list")


def test_file_of_a_training_run(tmp_path: Path) -> None:
    """As published: the weights under "model", beside the rest of the run's state."""
    state = official_state()
    torch.save({"model": state, "epoch": 299, "optimizer": {"state": {}}}, tmp_path / "moh.pth")
    model = az.create_model("moh_transnext", checkpoint_path=tmp_path / "moh.pth", **TINY)
    assert torch.equal(model.block2[1].attn.router.weight, state["block2.1.attn.wg.weight"])
