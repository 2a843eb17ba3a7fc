"""Official checkpoints of Agent-Swin and Agent-CSwin: every variant's keys convert and load; sizes, heads, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from parity_case import load_case
from torch import Tensor

import attention_zoo as az

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "agent_swin.json").read_text())
SWIN: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 4,
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 2),
    "agent_num": (4, 4, 4),
    "attn_type": "AMB1",
    "num_classes": 3,
}
CSWIN: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 4,
    "depth": (1, 2, 1),
    "num_heads": (2, 2, 2),
    "split_size": (1, 2, 2),
    "agent_num": (4, 4, 4),
    "attn_type": "AMB1",
    "num_classes": 3,
}
TINY = {"agent_swin": SWIN, "agent_cswin": CSWIN}

families = pytest.mark.parametrize("family", sorted(TINY))


def official_keys(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Key -> shape. The file gives the keys of a kind of block once, and which blocks are of it."""
    keys = dict(manifest["others"])
    for block in manifest["blocks"]:
        keys |= {f"{prefix}.{name}": shape for prefix in block["prefixes"] for name, shape in block["keys"].items()}
    return keys


def official_state(family: str, **options: Any) -> dict[str, Tensor]:
    """Random tensors under the official names of a tiny classifier (in our names, translated back by hand), with its buffers."""
    model = az.create_model(family, **{**TINY[family], **options})
    state = {}
    for key, tensor in model.state_dict().items():
        key = key.replace(".attn.", ".") if family == "agent_cswin" else key
        state[key] = torch.randn_like(tensor)
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(1, dtype=torch.long)
            state[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(1)
    return state


def convert(family: str, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return az.convert_official_state_dict(family, state, **{**TINY[family], **options})


@pytest.mark.parametrize("name", slow_but({"agent_swin_t", "agent_cswin_t"}, sorted(MANIFESTS)))
def test_published_variants_load(name: str) -> None:
    manifest = MANIFESTS[name]
    with torch.device("meta"):
        model = az.create_model(name)
        state = {key: torch.empty(shape) for key, shape in official_keys(manifest).items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert len(state) == manifest["number"]
    model.load_state_dict(az.convert_official_state_dict(name, state), strict=True, assign=True)


def test_nine_variants() -> None:
    swin, cswin = ("t", "s", "s_288", "b", "b_384"), ("t", "s", "b", "b_384")
    assert set(MANIFESTS) == {*(f"agent_swin_{size}" for size in swin), *(f"agent_cswin_{size}" for size in cswin)}


@families
def test_values_arrive_where_they_belong(family: str) -> None:
    state, x = official_state(family), torch.randn(1, 3, 64, 64)
    model = az.create_model(family, **TINY[family])
    model.load_state_dict(convert(family, state), strict=True)
    pairs = {
        "agent_swin": {
            "layers.1.blocks.1.attn.relative_position_bias_table": "layers.1.blocks.1.attn.relative_position_bias_table"
        },
        "agent_cswin": {
            "stage1.0.attn.qkv.weight": "stage1.0.qkv.weight",
            "stage2.1.attn.attns.1.get_v.bias": "stage2.1.attns.1.get_v.bias",
            "stage3.0.attn.proj.bias": "stage3.0.proj.bias",
            "merge1.conv.weight": "merge1.conv.weight",
        },
    }
    for ours, official in pairs[family].items():
        assert torch.equal(model.state_dict()[ours], state[official])
    assert model(x).isfinite().all()


def test_other_resolution() -> None:
    """What the official loader puts into a model of another size: agent_swin/ckpt_resize_16_to_24."""
    case = load_case("agent_swin/ckpt_resize_16_to_24")
    sizes = json.loads(case.meta["zoo_kwargs"])
    small = az.create_model("agent_swin", **sizes["from"]).state_dict()
    stored = case.group("state")
    assert all(small[key].shape == tensor.shape for key, tensor in stored.items())
    converted = az.convert_official_state_dict("agent_swin", {**small, **stored}, **sizes["to"])
    want = case.group("output.state")
    for key, tensor in want.items():
        torch.testing.assert_close(converted[key], tensor, atol=case.tolerance, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    changed = {key for key, tensor in converted.items() if tensor.shape != small[key].shape}
    assert changed == set(want)
    model = az.create_model("agent_swin", **sizes["to"])
    model.load_state_dict(converted, strict=True)
    resized = az.create_model("agent_swin", **sizes["from"])
    resized.load_state_dict({**small, **stored})
    resized.set_input_size(24, window_size=12)
    for key, tensor in want.items():
        torch.testing.assert_close(resized.state_dict()[key], tensor, atol=case.tolerance, rtol=0)


@families
@pytest.mark.parametrize("size", [(96, 64), 128])
def test_other_sizes_load_and_agree(family: str, size: Any) -> None:
    """Converted to another size, a checkpoint computes what the model of its own size does there, if no softmax window changes."""
    options = {"attn_type": "AAA", "window_size": None} if family == "agent_swin" else {}
    state = official_state(family, **options)
    x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    small, large = (az.create_model(family, **{**TINY[family], **options, **more}).eval() for more in ({}, {"img_size": size}))
    small.load_state_dict(convert(family, state, **options))
    large.load_state_dict(convert(family, state, **options, img_size=size))
    torch.testing.assert_close(large(x), small(x), atol=1e-4, rtol=1e-4)


@families
def test_own_files_of_other_sizes_and_heads_load(family: str, tmp_path: Path) -> None:
    options = {**TINY[family], "img_size": (64, 32)} | ({"ape": True} if family == "agent_swin" else {})
    small = az.create_model(family, **options)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    for changes in ({"img_size": (64, 96)}, {"num_classes": 7}, {"num_classes": 0}, {"num_classes": 7, "img_size": (96, 32)}):
        model = az.create_model(family, **{**options, **changes}, checkpoint_path=tmp_path / "small.pth")
        found = small.state_dict()
        assert all(torch.equal(t, found[k]) for k, t in model.state_dict().items() if k.endswith(("qkv.weight", "norm.weight")))


@families
def test_heads(family: str) -> None:
    state = official_state(family)
    headless = az.create_model(family, **{**TINY[family], "num_classes": 0})
    headless.load_state_dict(convert(family, state, num_classes=0), strict=True)
    other = convert(family, state, num_classes=7)
    assert other["head.weight"].shape[0] == 7
    assert not other["head.weight"].any()


@families
@pytest.mark.parametrize("indices", slow_but(1, [((0, 1, 2),), ((0, 1),), ([-3],), (1,)]))
def test_classifier_as_dense_backbone(family: str, indices: Any) -> None:
    options = {"features_only": True, "out_indices": indices}
    state, x = official_state(family), torch.randn(1, 3, 64, 64)
    backbone, model = (az.create_model(family, **TINY[family], **more).eval() for more in (options, {}))
    backbone.load_state_dict(convert(family, state, **options), strict=True)
    model.load_state_dict(convert(family, state), strict=True)
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b)
    headless = {key: tensor for key, tensor in state.items() if not key.startswith(("norm.", "head."))}
    assert convert(family, headless, **options).keys() == backbone.state_dict().keys()


@families
def test_options_that_change_keys(family: str) -> None:
    changes: list[dict[str, Any]] = [{"qkv_bias": False}]
    if family == "agent_swin":
        changes += [{"patch_norm": False}, {"ape": True}, {"attention_kwargs": {"use_dwc": False}}, {"attn_type": "BBB"}]
    else:
        changes += [{"la_split_size": "8-4-2"}, {"attn_type": "BBA"}]
    for options in changes:
        model = az.create_model(family, **{**TINY[family], **options})
        model.load_state_dict(convert(family, official_state(family, **options), **options), strict=True)


@families
def test_refusals(family: str) -> None:
    state = official_state(family)
    with pytest.raises(az.CheckpointError, match=r"unknown keys: extra; missing keys: norm\.bias"):
        convert(family, {**{k: v for k, v in state.items() if k != "norm.bias"}, "extra": torch.empty(1)})
    with pytest.raises(az.CheckpointError, match=r"agent attention.*'mha'"):
        convert(family, state, attention="mha")
    with pytest.raises(az.CheckpointError, match=r"missing keys: head\.bias"):
        convert(family, {k: v for k, v in state.items() if k != "head.bias"})


def test_file_of_a_training_run_with_averaged_weights(tmp_path: Path) -> None:
    """As published for Agent-CSwin: the average is what is loaded."""
    state = official_state("agent_cswin")
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"model": other, "state_dict_ema": state, "epoch": 299}, tmp_path / "agent_cswin.pth")
    model = az.create_model("agent_cswin", checkpoint_path=tmp_path / "agent_cswin.pth", **CSWIN)
    assert torch.equal(model.head.weight, state["head.weight"])
