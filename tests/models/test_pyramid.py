"""timm's interface of the pyramid classifiers (`models/_pyramid.py`), over the families that take it as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from model_case import (
    check_feature_maps,
    check_gradient_checkpointing,
    check_head,
    check_intermediates,
    check_one_graph,
    close,
    small_model,
)
from timm.optim import param_groups_layer_decay
from torch import nn

import attention_zoo as az
from attention_zoo.models._pyramid import block_types, check_stages

TINY: dict[str, dict[str, Any]] = {
    "agent_swin": {"depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "attn_type": "AMBB1", "window_size": 16},
    "agent_cswin": {"depth": (1, 2, 2, 1), "num_heads": (2, 2, 2, 4), "attn_type": "AMBB1", "split_size": (1, 2, 2, 2)},
}
COMMON: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "agent_num": (4, 4, 4, 4), "num_classes": 5}
STAGE = {"agent_swin": "layers.{}.", "agent_cswin": "stage{}."}  # where a stage's parameters stand, counted from 0 and from 1

families = pytest.mark.parametrize("family", sorted(TINY))


def tiny(family: str, **options: Any) -> Any:
    """A small model whose parameters all matter; agents in stage 0 and in half of stage 1, the rest softmax in windows."""
    return small_model(family, **{**TINY[family], **COMMON, **options})


def stages_of(family: str, model: nn.Module) -> set[int]:
    offset = 1 if family == "agent_cswin" else 0
    names = [name.removeprefix("model.") for name, _ in model.named_parameters()]
    return {i for i in range(4) if any(name.startswith(STAGE[family].format(i + offset)) for name in names)}


@families
def test_head(family: str) -> None:
    check_head(partial(tiny, family))


@families
def test_intermediates(family: str) -> None:
    model, x = tiny(family), torch.randn(2, 3, 60, 44)
    maps = check_intermediates(model, x, [(8, 15, 11), (16, 8, 6), (32, 4, 3), (64, 2, 2)])
    assert stages_of(family, model) == {0, 1, 2}
    model.set_input_size((60, 44))
    assert model(x).shape == maps[2].shape


@families
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,), (-1,), 2])
def test_feature_maps(family: str, indices: Any) -> None:
    backbone = az.create_model(family, features_only=True, out_indices=indices, **TINY[family], **COMMON).eval()
    check_feature_maps(tiny(family), backbone, torch.randn(2, 3, 60, 44), indices, "model.")


@families
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    check_gradient_checkpointing(partial(tiny, family))


@families
@pytest.mark.slow
def test_compiles_to_one_graph(family: str) -> None:
    size = {"num_heads": (2, 2), "agent_num": (4, 4)}
    size |= (
        {"depths": (1, 2), "attn_type": "AB"}
        if family == "agent_swin"
        else {"depth": (1, 1), "split_size": (2, 2), "attn_type": "BA"}
    )
    check_one_graph(tiny(family, **size), torch.randn(2, 3, 60, 44))


@families
def test_meta_device_and_dtype(family: str) -> None:
    model = az.create_model(family, device="meta", dtype=torch.bfloat16, **TINY[family], **COMMON)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    half = tiny(family).bfloat16()
    assert half(torch.randn(2, 3, 64, 64).bfloat16()).dtype == torch.bfloat16
    model, x = tiny(family), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    close(out.float(), model(x), 0.1)


@families
def test_empty_batch_and_independent_samples(family: str) -> None:
    model, x = tiny(family), torch.randn(3, 3, 60, 44)
    assert model(x[:0]).shape == (0, 5)
    close(model(x)[1:2], model(x[1:2]))


@families
def test_layer_decay_follows_the_depth(family: str) -> None:
    model = tiny(family)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    first = "patch_embed.proj.weight" if family == "agent_swin" else "stage1_conv_embed.0.weight"
    blocks = {
        "agent_swin": [
            "layers.0.blocks.0.",
            "layers.0.downsample.",
            "layers.2.blocks.0.",
            "layers.2.blocks.1.",
            "layers.3.blocks.0.",
        ],
        "agent_cswin": ["stage1.0.", "merge1.", "stage3.0.", "stage3.1.", "stage4.0."],
    }[family]
    scales = [scale[first], *({s for n, s in scale.items() if n.startswith(b)} for b in blocks), scale["norm.weight"]]
    flat = [s.pop() if isinstance(s, set) and len(s) == 1 else s for s in scales]
    assert flat == sorted(flat)
    assert len(set(flat[:6])) == 6


@families
def test_bad_arguments(family: str) -> None:
    depths = "depth" if family == "agent_cswin" else "depths"
    with pytest.raises(ValueError, match=rf"one entry for each stage.*{depths}=\(1, 1, 2\)"):
        tiny(family, **{depths: (1, 1, 2)}, attn_type="AAA")
    with pytest.raises(ValueError, match=r"out_indices.*features_only"):
        tiny(family, out_indices=[0])
    with pytest.raises(ValueError, match=r"'dtm' cannot stand in Agent-"):
        tiny(family, attention="dtm")
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(family, attention_kwargs={"no_such_option": 1})


def test_block_types() -> None:
    assert block_types("AAAB", (1, 2, 1, 2)) == ["A", "AA", "A", "BB"]
    assert block_types("AMB2", (1, 4, 3)[:3]) == ["A", "AABB", "BBB"]
    assert block_types("MB1", (3, 1)) == ["ABB", "B"]
    assert block_types("MM12", (2, 14)) == ["AA", "A" * 12 + "BB"]
    assert block_types("MB0", (2, 1)) == ["BB", "B"]
    assert block_types("IS", (1, 1), letters="IS") == ["I", "S"]
    for wrong in ("AAB", "AABBB", "AAMB", "AABB2", "AACB", "AAMB2x", ""):
        with pytest.raises(ValueError, match=r"4 letters.*'AAAM2'.*got"):
            block_types(wrong, (1, 1, 1, 1))


def test_check_stages() -> None:
    check_stages(depths=(1, 2), num_heads=[1, 1])
    with pytest.raises(ValueError, match=r"depths=\(1, 2\), num_heads=\(1,\)"):
        check_stages(depths=(1, 2), num_heads=[1])
    with pytest.raises(ValueError, match="at least one block"):
        check_stages(depths=(1, 0), num_heads=[1, 1])
