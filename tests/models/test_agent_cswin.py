"""Agent-CSwin: the published variants, its stripes, image sizes, other mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import slow_but
from model_case import AGENT_PAPER, check_registered, close, giga_multiply_adds, parameters_of, small_model
from timm.data import resolve_data_config
from torch import nn

import attention_zoo as az
from attention_zoo.attention import AgentAttention, AgentCSwinAttention, HiLoAttention, MultiHeadAttention

TINY: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 8,
    "depth": (1, 2, 1),
    "num_heads": (2, 2, 4),
    "split_size": (1, 2, 2),
    "agent_num": (4, 9, 4),
    "attn_type": "AMB1",
    "num_classes": 5,
}


def tiny(**options: Any) -> Any:
    return small_model("agent_cswin", **{**TINY, **options})


def attentions(model: nn.Module) -> list[AgentCSwinAttention]:
    return [m for m in model.modules() if isinstance(m, AgentCSwinAttention)]


# --- the published variants -------------------------------------------------------------------------------------------------------

VARIANTS = [
    ("agent_cswin", 20_458_672, 4.292),
    ("agent_cswin_t", 20_458_672, 4.292),
    ("agent_cswin_s", 32_814_100, 6.744),
    ("agent_cswin_b", 73_249_696, 14.870),
    ("agent_cswin_b_384", 73_328_416, 46.177),
]


@pytest.mark.parametrize(("name", "parameters", "giga"), slow_but({VARIANTS[1]}, VARIANTS))
def test_size_and_cost(name: str, parameters: int, giga: float) -> None:
    """Parameters, and products of matrices and convolutions, as counted from the official code."""
    assert parameters_of(name) == parameters
    assert giga_multiply_adds(name) == pytest.approx(giga, abs=6e-4)


def test_registered() -> None:
    check_registered("agent_cswin*", [name for name, *_ in VARIANTS], **AGENT_PAPER)


def test_layout() -> None:
    model = az.create_model("agent_cswin_t", device="meta")
    stages = [model.stage1, model.stage2, model.stage3, model.stage4]
    assert [{block.attn.use_agents for block in stage} for stage in stages] == [{True}, {True}, {False}, {False}]
    assert [[branch.idx for branch in stage[0].attn.attns] for stage in stages] == [[-1], [-1], [0, 1], [-1]]
    assert [branch.stripe((14, 14)) for branch in model.stage3[0].attn.attns] == [(14, 7), (7, 14)]
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in stages for block in stage]
    assert rates == pytest.approx(torch.linspace(0, 0.2, 25).tolist())
    config = resolve_data_config(model=model)
    assert (config["crop_pct"], config["crop_mode"]) == (0.875, "squash")
    large = az.create_model("agent_cswin_b_384", device="meta")
    assert large.stage3[0].attn.attns[0].stripe((24, 24)) == (24, 12)
    assert large.stage1[0].attn.attns[0].ah_bias.shape == (1, 4, 9, 96, 1)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = az.create_model("agent_cswin", **{**TINY, "embed_dim": 32})
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", ".fc1.weight", ".qkv.weight", "head.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.endswith(".bias") and not any(part in name for part in ("get_v", "conv")):
            assert not parameter.any(), name
    assert model.no_weight_decay() == set()


# --- stripes and sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["8-4-2", [8, 4, 2]])
def test_stripes_of_agents(form: Any) -> None:
    """Narrower than the map: two branches with tables of a stripe's size. The last stage is one stripe, whatever is said."""
    model = tiny(la_split_size=form, attn_type="AAA")
    shapes = [[tuple(branch.ah_bias.shape[3:4] + branch.aw_bias.shape[4:]) for branch in a.attns] for a in attentions(model)]
    assert shapes == [[(16, 8), (8, 16)], [(8, 4), (4, 8)], [(8, 4), (4, 8)], [(4, 4)]]
    assert model(torch.randn(2, 3, 60, 44)).shape == (2, 5)
    assert [len(a.attns) for a in attentions(tiny(la_split_size="16-8-4", attn_type="AAA"))] == [1, 1, 1, 1]
    assert [len(a.attns) for a in attentions(tiny(attn_type="BBB", split_size=(16, 4, 1)))] == [1, 2, 2, 1]


@pytest.mark.parametrize("size", [(64, 64), (54, 42), (96, 130), (3, 9)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = tiny(la_split_size="16-3-4")
    grid = [(side - 3) // 4 + 1 for side in size]
    assert model.forward_features(torch.randn(2, 3, *size)).shape == (2, 32, -(-grid[0] // 4), -(-grid[1] // 4))


@pytest.mark.parametrize("la_split_size", [None, "8-3-4"])
def test_set_input_size(la_split_size: str | None) -> None:
    """The tables get the size of the map, and the model computes what it did before by resampling them on the way."""
    model, x = tiny(la_split_size=la_split_size), torch.randn(2, 3, 96, 72)
    before = model(x)
    model.set_input_size((96, 72))
    close(model(x), before)
    assert model.img_size == (96, 72)
    first = model.stage1[0].attn.attns[0]
    assert (first.ah_bias.shape[3], first.aw_bias.shape[4]) == ((24, 18) if la_split_size is None else (24, 8))
    built = tiny(la_split_size=la_split_size, img_size=(96, 72))
    if la_split_size is None:
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


def test_options_reach_the_layers() -> None:
    model = tiny(
        attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False, agent_grid=((3, 2), None, None), attention_kwargs={"bias_grid": 5}
    )
    agents = [a for a in attentions(model) if a.use_agents]
    assert [(a.attns[0].agent_grid, a.attns[0].an_bias.shape, a.proj_drop.p, a.attns[0].attn_drop) for a in agents] == [
        ((3, 2), (2, 4, 5, 5), 0.2, 0.1),
        ((3, 3), (2, 9, 5, 5), 0.2, 0.1),
    ]
    assert [a.attns[0].attn_drop for a in attentions(model)] == [0.1] * 4
    assert not any("qkv.bias" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize(("attention", "kind"), [("mha", MultiHeadAttention), ("hilo", HiLoAttention), ("agent", AgentAttention)])
def test_another_mechanism(attention: str, kind: type) -> None:
    options = {"attention_kwargs": {"agent_num": 4}} if attention == "agent" else {}
    model = tiny(attention=attention, **options)
    assert sum(isinstance(m, kind) for m in model.modules()) == 2  # in the place of the agents; B blocks stay
    assert len(attentions(model)) == 2
    assert model(torch.randn(2, 3, 54, 42)).shape == (2, 5)
    model.set_input_size(96)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"patch_size=16.*nearest is 4"):
        tiny(patch_size=16)
    with pytest.raises(ValueError, match=r"la_split_size.*'56-28-14-7'.*'8-x'"):
        tiny(la_split_size="8-x")
    with pytest.raises(ValueError, match=r"one entry for each stage.*la_split_size=\(8, None\)"):
        tiny(la_split_size="8-4")
    with pytest.raises(ValueError, match=r"img_size=\(2, 2\).*at least 3"):
        tiny(img_size=2)
    with pytest.raises(ValueError, match=r"num_heads=1 must be even"):
        tiny(num_heads=(2, 1, 4))
