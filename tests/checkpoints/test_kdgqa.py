"""Official checkpoints of the grouped-query family: layers, Vision Transformers, and the multi-head baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as az
from attention_zoo import CheckpointError, convert_official_state_dict

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 6}
MECHANISMS = ["gqa", "kdgqa", "dgqa", "pgqa"]


def official_layer(num_kv_heads: int = 3, qkv_bias: bool = True, cache: bool = False) -> dict[str, Tensor]:
    rows = {"q": 24, "k": 4 * num_kv_heads, "v": 4 * num_kv_heads, "proj": 24}
    state = {f"{name}.weight": torch.randn(n, 24) for name, n in rows.items()}
    state |= {f"{name}.bias": torch.randn(n) for name, n in rows.items() if qkv_bias or name == "proj"}
    return {**state, **({"cache": torch.rand(num_kv_heads)} if cache else {})}


def official_vit(num_kv_heads: int = 3, cache: bool = False) -> dict[str, Tensor]:
    shapes = {"cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "patch_embed.proj.weight": (24, 3, 8, 8), "head.weight": (5, 24)}
    vectors = {"patch_embed.proj.bias": 24, "norm.weight": 24, "norm.bias": 24, "head.bias": 5}
    for i in range(2):
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (96, 24), f"blocks.{i}.mlp.fc2.weight": (24, 96)}
        vectors |= {f"blocks.{i}.{name}.{kind}": 24 for name in ("norm1", "norm2") for kind in ("weight", "bias")}
        vectors |= {f"blocks.{i}.mlp.fc1.bias": 96, f"blocks.{i}.mlp.fc2.bias": 24}
    state = {name: torch.randn(shape) for name, shape in shapes.items()} | {name: torch.randn(n) for name, n in vectors.items()}
    for i in range(2):
        state |= {f"blocks.{i}.attn.{name}": tensor for name, tensor in official_layer(num_kv_heads, cache=cache).items()}
    return state


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("name", MECHANISMS)
def test_layer(name: str, qkv_bias: bool) -> None:
    state = official_layer(qkv_bias=qkv_bias, cache=name == "dgqa")
    options: dict[str, Any] = {"dim": 24, "num_heads": 6, "num_kv_heads": 3, "qkv_bias": qkv_bias}
    converted = convert_official_state_dict(name, state, **options)
    module = az.create_attention(name, **options)
    module.load_state_dict(converted, strict=True)
    for key, tensor in state.items():
        assert torch.equal(module.state_dict()[key], tensor)


def test_dgqa_gets_the_even_allocation() -> None:
    state = official_layer(num_kv_heads=4, cache=True)
    options: dict[str, Any] = {"dim": 24, "num_heads": 6, "num_kv_heads": 4, "qkv_bias": True}
    converted = convert_official_state_dict("dgqa", state, **options)
    assert converted["allocation"].tolist() == [2, 2, 1, 1]
    assert converted["allocation"].dtype == torch.int64
    assert "allocation" not in state
    half = {key: tensor.half() for key, tensor in state.items()}
    assert convert_official_state_dict("dgqa", half, **options)["cache"].dtype == torch.float32


def test_frozen_kdgqa_gets_the_even_allocation() -> None:
    options: dict[str, Any] = {"dim": 24, "num_heads": 6, "num_kv_heads": 4, "alloc_scope": "frozen", "qkv_bias": True}
    converted = convert_official_state_dict("kdgqa", official_layer(num_kv_heads=4), **options)
    assert converted["allocation"].tolist() == [2, 2, 1, 1]
    az.create_attention("kdgqa", **options).load_state_dict(converted, strict=True)


@pytest.mark.parametrize("name", MECHANISMS)
def test_wrong_keys_of_a_layer_are_all_listed(name: str) -> None:
    state = official_layer(cache=name == "dgqa")
    del state["q.weight"], state["v.bias"]
    state |= {"allocation": torch.ones(3), "extra": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unknown keys: allocation, extra; missing keys: q\.weight, v\.bias"):
        convert_official_state_dict(name, state, dim=24, num_heads=6, qkv_bias=True)


@pytest.mark.parametrize(("name", "cache", "what"), [("gqa", True, "unknown"), ("dgqa", False, "missing")])
def test_only_dgqa_has_a_cache(name: str, cache: bool, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"{what} keys: cache"):
        convert_official_state_dict(name, official_layer(cache=cache), dim=24, num_heads=6, qkv_bias=True)


@pytest.mark.parametrize("attention_kwargs", [{"num_kv_heads": 3}, {"num_kv_heads": 2}, {}], ids=str)
@pytest.mark.parametrize("name", MECHANISMS)
def test_vit(name: str, attention_kwargs: dict[str, Any]) -> None:
    state = official_vit(num_kv_heads=attention_kwargs.get("num_kv_heads", 6), cache=name == "dgqa")  # 6 is the name's own
    kwargs = {**SIZES, "attention_kwargs": attention_kwargs}
    model = az.create_model(f"vit_base_patch16_224_{name}", **kwargs)
    model.load_state_dict(convert_official_state_dict(f"vit_base_patch16_224_{name}", state, **kwargs), strict=True)
    for key, tensor in state.items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_multi_head_baseline() -> None:
    """The official baseline keeps q, k and v apart; with as many key/value heads as heads gqa reads the same file."""
    state = official_vit(num_kv_heads=6)
    models = []
    for name, kwargs in (
        ("vit_base_patch16_224", {**SIZES, "attention": "mha"}),
        ("vit_base_patch16_224_gqa", {**SIZES, "attention_kwargs": {"num_kv_heads": 6}}),
    ):
        model = az.create_model(name, **kwargs).eval()
        model.load_state_dict(convert_official_state_dict(name, state, **kwargs), strict=True)
        models.append(model)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(models[0](image), models[1](image), atol=1e-4, rtol=1e-4)


def test_without_a_head() -> None:
    kwargs = {**SIZES, "num_classes": 0, "attention_kwargs": {"num_kv_heads": 3}}
    with_head = official_vit()
    without = {key: tensor for key, tensor in with_head.items() if not key.startswith("head.")}
    model = az.create_model("vit_base_patch16_224_gqa", **kwargs)
    for state in (with_head, without):
        model.load_state_dict(convert_official_state_dict("vit_base_patch16_224_gqa", state, **kwargs), strict=True)
    with pytest.raises(CheckpointError, match=r"missing keys: head\.bias, head\.weight"):
        convert_official_state_dict("vit_base_patch16_224_gqa", without, **SIZES)


def test_wrong_keys_of_a_vit_are_all_listed() -> None:
    state = official_vit()
    del state["norm.bias"], state["blocks.1.attn.proj.bias"]
    state["blocks.2.attn.q.weight"] = torch.randn(24, 24)
    with pytest.raises(CheckpointError) as caught:
        convert_official_state_dict("vit_base_patch16_224_pgqa", state, **SIZES)
    assert "unknown keys: blocks.2.attn.q.weight" in str(caught.value)
    assert "missing keys: blocks.1.attn.proj.bias, norm.bias" in str(caught.value)


def test_a_mechanism_that_has_no_official_vit() -> None:
    with pytest.raises(CheckpointError, match="gqa, kdgqa, dgqa, pgqa, mha in their blocks, not 'hilo'"):
        convert_official_state_dict("vit_base_patch16_224", official_vit(), **SIZES, attention="hilo")
