"""Agent-DeiT: sizes and costs of the published variants, which blocks have agents, other image sizes and mechanisms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from marks import slow_but
from model_case import check_one_graph, close, giga_multiply_adds, parameters_of, small_model
from parity_case import load_case
from torch import nn

import attention_zoo as az
from attention_zoo.attention import AgentAttention, HiLoAttention, MultiHeadAttention

MANIFESTS = json.loads((Path(__file__).parent.parent / "fixtures" / "manifests" / "agent.json").read_text())
NAMES = ["agent_deit_t", "agent_deit_s", "agent_deit_s_448", "agent_deit_b"]
TINY: dict[str, Any] = {
    "img_size": 40,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "agent_num": [9, 4, 4, 4],
    "num_classes": 5,
}


def tiny(**options: Any) -> Any:
    return small_model("agent_deit", **{**TINY, **options})


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    assert parameters_of(name) == MANIFESTS[name]["parameters"]


@pytest.mark.parametrize("name", slow_but(1, ("agent_deit_t", "agent_deit_s", "agent_deit_s_448", "agent_deit_b")))
def test_multiply_adds(name: str) -> None:
    """Products of matrices and convolutions, as counted from the official code."""
    assert giga_multiply_adds(name) == pytest.approx(MANIFESTS[name]["gmacs"], abs=0.0006)


def test_registered() -> None:
    assert set(az.list_models("agent_deit*")) == {"agent_deit", *NAMES}
    for name in NAMES:
        config = timm.get_pretrained_cfg(name)
        assert not config.has_weights
        assert "2312.08874" in config.paper_ids
        assert config.input_size == (3, 448, 448) if name.endswith("448") else (3, 224, 224)
        model = timm.create_model(name, device="meta")
        rate = {"agent_deit_t": 0.0, "agent_deit_b": 0.3}.get(name, 0.1)
        assert getattr(model.blocks[-1].drop_path2, "drop_prob", 0.0) == pytest.approx(rate)
        assert model.blocks[0].norm1.eps == 1e-6
        assert model.blocks[0].attn.window_size == (model.patch_embed.grid_size)


def test_agents_of_the_blocks() -> None:
    def agents(**options: Any) -> list[int]:
        model = az.create_model("agent_deit", **{**TINY, **options}, device="meta")
        return [getattr(block.attn, "agent_num", 0) for block in model.blocks]

    assert agents(depth=14, agent_num=[1, 4, 9, 16]) == [1, 1, 4, 4, 9, 9, 9, 9, 9, 9, 16, 16, 16, 16]
    assert agents(depth=5, agent_num=[1, 4, 9, 16], agent_layer=3) == [1, 1, 4, 0, 0]
    assert agents(agent_num=9, agent_layer=0) == [0] * 4
    assert agents(agent_num=9, agent_layer=7) == [9] * 4
    with pytest.raises(ValueError, match="agent_num has four entries"):
        agents(agent_num=[1, 4])
    assert type(az.create_model("agent_deit_b", device="meta").blocks[4].attn) is MultiHeadAttention


def test_blocks_as_the_official_code() -> None:
    case = load_case("agent_deit/tiny_5x5")
    model, (x, _) = case.build(), case.inputs()
    _, found = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
    for i in (0, 2, 3):
        patches, prefix = found[i]
        close(torch.cat([prefix, patches], 1), case.tensors[f"debug.block_{i}"], case.tolerance)


def test_other_image_sizes() -> None:
    model, x = tiny(dynamic_img_size=True), torch.randn(2, 3, 48, 24)
    assert model(x).shape == (2, 5)
    want = model.forward_features(x)
    model.set_input_size((48, 24))
    assert model.blocks[0].attn.ah_bias.shape == (1, 2, 9, 6, 1)
    assert model.blocks[0].attn.window_size == (6, 3)
    close(model.forward_features(x), want)
    assert tiny(img_size=(24, 48), in_chans=1)(torch.randn(1, 1, 24, 48)).shape == (1, 5)


def test_tokens_of_the_host() -> None:
    for options, prefix in (({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)):
        model = tiny(**options)
        assert {block.attn.num_prefix_tokens for block in model.blocks} == {prefix}
        assert model(torch.randn(1, 3, 40, 40)).shape == (1, 5)


def test_another_mechanism_and_options() -> None:
    assert {type(b.attn) for b in tiny(attention="mha").blocks} == {MultiHeadAttention}
    model = tiny(attention="hilo", class_token=False, global_pool="avg", agent_layer=2)
    assert [type(b.attn) for b in model.blocks] == [HiLoAttention] * 2 + [MultiHeadAttention] * 2
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 5)
    with pytest.raises(ValueError, match="no place for class or register tokens"):
        tiny(attention="hilo")
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.25 leaves no grid"):
        tiny(patch_drop_rate=0.25)
    assert tiny(patch_drop_rate=0.25, attention="mha").train()(torch.randn(1, 3, 40, 40)).shape == (1, 5)
    with pytest.raises(ValueError, match="'dtm' cannot stand in Agent-DeiT"):
        tiny(attention="dtm")
    attn = tiny(attention_kwargs={"use_dwc": False, "agent_grid": (2, 4)}, attn_drop_rate=0.1, proj_drop_rate=0.2).blocks[0].attn
    assert (attn.dwc, attn.agent_grid, attn.attn_drop, attn.proj_drop.p) == (None, (2, 4), 0.1, 0.2)


def test_training_decays_the_tables() -> None:
    model = tiny().train()
    model(torch.randn(2, 3, 40, 40)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    decayed = timm.optim.param_groups_weight_decay(model, 0.05, model.no_weight_decay())[1]["params"]
    tables = [p for m in model.modules() if isinstance(m, AgentAttention) for n, p in m.named_parameters() if n.endswith("_bias")]
    assert len(tables) == 4 * 8
    assert {id(p) for p in tables} <= {id(p) for p in decayed}


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    check_one_graph(tiny(depth=1), torch.randn(2, 3, 40, 40))


def test_initialisation() -> None:
    model = az.create_model("agent_deit", depth=1)
    attn = model.blocks[0].attn
    for tensor in (attn.qkv.weight, attn.proj.weight, attn.an_bias, attn.ha_bias, model.pos_embed):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
    assert not attn.qkv.bias.any()
    assert isinstance(model.norm, nn.LayerNorm)
