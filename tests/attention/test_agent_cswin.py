"""Agent attention in stripes against its formula written out, the official branch, its neighbours in the zoo, and its edges."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_case import load_case
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention import AgentAttention, AgentCSwinAttention, GroupedQueryAttention, MultiHeadAttention
from attention_zoo.attention.agent_cswin import AgentStripes, SoftmaxStripes

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def filled(module: nn.Module) -> Any:
    """In float64, with generic numbers in every parameter."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def attention(dim: int = 8, num_heads: int = 4, **options: Any) -> AgentCSwinAttention:
    return filled(AgentCSwinAttention(dim, num_heads, **{"resolution": (4, 6), "agent_num": 4, **options}))


def tokens(grid: tuple[int, int], dim: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, dtype=F64)


# --- the formula ------------------------------------------------------------------------------------------------------------------


def biases(m: AgentStripes, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """B_k and B_q (h, n, rows, columns) of a stripe."""

    def up(square: Tensor) -> Tensor:
        return F.interpolate(square, size=(rows, columns), mode="bilinear")

    def stretch(line: Tensor, length: int) -> Tensor:  # (h, n, L)
        return F.interpolate(line, size=length, mode="linear")

    key = up(m.an_bias) + stretch(m.ah_bias[0, ..., 0], rows)[..., None] + stretch(m.aw_bias[0, ..., 0, :], columns)[..., None, :]
    down, across = m.ha_bias[0, :, :, 0].transpose(1, 2), m.wa_bias[0, :, 0].transpose(1, 2)
    return key, up(m.na_bias) + stretch(down, rows)[..., None] + stretch(across, columns)[..., None, :]


def bins(length: int, parts: int) -> list[range]:
    return [range(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]


def by_formula(m: Any, qkv: Tensor, grid: tuple[int, int], real: Tensor) -> Tensor:
    """Stripe by stripe, token by token and head by head; `real` (B, N) says which tokens exist."""
    height, width = grid
    rows, columns = m.stripe(grid)
    d, out = m.head_dim, torch.zeros_like(qkv[0])
    uses_agents = isinstance(m, AgentStripes)
    key_bias, query_bias = biases(m, rows, columns) if uses_agents else (None, None)
    weight = m.get_v.weight[:, 0]
    places = itertools.product(range(qkv.shape[1]), range(0, height, rows), range(0, width, columns))
    for b, top, left in places:
        inside = [(i, j) for i in range(rows) for j in range(columns) if top + i < height and left + j < width]
        number = {(i, j): (top + i) * width + left + j for i, j in inside}
        kept = {cell: n for cell, n in number.items() if real[b, n]}
        for h in range(m.num_heads):
            part = slice(h * d, (h + 1) * d)
            q, k, v = ({cell: t[b, n, part] for cell, n in number.items()} for t in qkv)
            keys = [k[c] for c in kept]
            values = torch.stack([v[c] for c in kept]) if kept else torch.zeros(1, d, dtype=F64)
            if uses_agents:
                agents, read = [], []
                for a, (down, across) in enumerate(itertools.product(bins(rows, m.agent_grid[0]), bins(columns, m.agent_grid[1]))):
                    members = [q[c] for c in itertools.product(down, across) if c in kept]
                    agents.append(torch.stack(members).mean(0) if members else torch.zeros(d, dtype=F64))
                    logits = [m.scale * agents[-1] @ key + key_bias[h, a, i, j] for key, (i, j) in zip(keys, kept, strict=True)]
                    read.append(torch.stack(logits).softmax(0) @ values if kept else torch.zeros(d, dtype=F64))
            for (i, j), n in number.items():
                if uses_agents:
                    weights = torch.stack([m.scale * q[i, j] @ a for a in agents]) + query_bias[h, :, i, j]
                    result = weights.softmax(0) @ torch.stack(read)
                elif kept:
                    result = torch.stack([m.scale * q[i, j] @ key for key in keys]).softmax(0) @ values
                else:
                    result = torch.zeros(d, dtype=F64)
                for di, dj in itertools.product((-1, 0, 1), repeat=2):
                    if (i + di, j + dj) in kept:
                        result = result + weight[part, di + 1, dj + 1] * v[i + di, j + dj]
                out[b, n, part] = result + m.get_v.bias[part]
    return out


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    idx=st.sampled_from([-1, 0, 1]),
    split_size=st.integers(1, 4),
    agent_num=st.sampled_from([0, 1, 4]),
    masked=st.booleans(),
)
def test_against_the_formula(grid: tuple[int, int], idx: int, split_size: int, agent_num: int, masked: bool) -> None:
    options: dict[str, Any] = {"resolution": (3, 4), "idx": idx, "split_size": split_size}
    module = filled(AgentStripes(4, 2, agent_num=agent_num, **options) if agent_num else SoftmaxStripes(4, 2, **options))
    qkv = torch.randn(3, 2, grid[0] * grid[1], 4, dtype=F64).requires_grad_()
    real = torch.rand(qkv.shape[1:3]) > 0.4 if masked else torch.ones(qkv.shape[1:3], dtype=torch.bool)
    leaves, results = [qkv, *module.parameters()], []
    for out in (module(qkv, grid_size=grid, mask=real if masked else None), by_formula(module, qkv, grid, real)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True, materialize_grads=True)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b, 1e-9)


def test_branch_parity() -> None:
    """The official branch on one stripe, the whole grid: agent/cswin_branch_full_6x6."""
    case = load_case("agent/cswin_branch_full_6x6")
    module = AgentStripes(**json.loads(case.meta["zoo_kwargs"]))
    module.load_state_dict(case.group("state"), strict=True)
    qkv = case.group("input")["qkv"].requires_grad_()
    out = module(qkv, grid_size=case.forward_kwargs["grid_size"])
    close(out, case.group("output")["x"], case.tolerance)
    (out * case.group("cotangent")["x"]).sum().backward()
    close(qkv.grad, case.tensors["grad.input"], float(case.meta["grad_tolerance"]))


# --- the whole mechanism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_grid", [None, (3, 1)])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
def test_one_branch_is_agent_attention(grid: tuple[int, int], agent_grid: Any) -> None:
    module = attention(agent_grid=agent_grid)
    plain = filled(AgentAttention(8, 4, agent_num=4, window_size=(4, 6), agent_grid=agent_grid))
    names = {key: key.replace("attns.0.get_v", "dwc").replace("attns.0.", "") for key in module.state_dict()}
    plain.load_state_dict({names[key]: tensor for key, tensor in module.state_dict().items()}, strict=True)
    x, mask = tokens(grid), torch.rand(2, grid[0] * grid[1]) > 0.3
    close(module(x, grid_size=grid), plain(x, grid_size=grid))
    close(module(x, grid_size=grid, attention_mask=mask), plain(x, grid_size=grid, attention_mask=mask))


@pytest.mark.parametrize("use_agents", [True, False])
def test_two_branches_have_half_the_channels_each(use_agents: bool) -> None:
    module, x, grid = attention(split_size=2, use_agents=use_agents), tokens((5, 3)), (5, 3)
    assert [(branch.idx, branch.dim, branch.num_heads) for branch in module.attns] == [(0, 4, 2), (1, 4, 2)]
    assert {branch.stripe((4, 6)) for branch in module.attns} == {(4, 2), (2, 6)}
    parts = module.qkv(x).chunk(3, dim=-1)
    real = torch.ones(2, 15, dtype=torch.bool)
    halves = [by_formula(b, torch.stack([p.chunk(2, dim=-1)[i] for p in parts]), grid, real) for i, b in enumerate(module.attns)]
    close(module(x, grid_size=grid), module.proj(torch.cat(halves, dim=-1)))


def test_softmax_over_the_map_is_plain_attention() -> None:
    module, x = attention(use_agents=False), tokens((3, 4))
    nn.init.zeros_(module.attns[0].get_v.weight)
    nn.init.zeros_(module.attns[0].get_v.bias)
    plain = Attention(8, num_heads=4, qkv_bias=True).double().eval()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("attns")}, strict=True)
    close(module(x, grid_size=(3, 4)), plain(x))


@pytest.mark.parametrize("use_agents", [True, False])
def test_stripes_do_not_see_each_other(use_agents: bool) -> None:
    options: dict[str, Any] = {"resolution": 6, "split_size": 2}
    module = filled(AgentStripes(4, 2, idx=0, agent_num=4, **options) if use_agents else SoftmaxStripes(4, 2, idx=0, **options))
    qkv = torch.randn(3, 1, 36, 4, dtype=F64)
    changed = qkv.clone()
    changed.view(3, 1, 6, 6, 4)[:, :, 2, 3] += 1.0
    difference = (module(changed, grid_size=(6, 6)) - module(qkv, grid_size=(6, 6))).view(6, 6, 4).abs().amax(-1)
    assert difference[:, 2:4].min() > (1e-9 if use_agents else 1e-12)
    assert difference[:, [0, 1, 4, 5]].max() == 0


@pytest.mark.parametrize("split_size", [None, 2])
def test_set_resolution_keeps_what_the_layer_computes(split_size: int | None) -> None:
    module, x = attention(split_size=split_size), tokens((6, 8))
    before = module(x, grid_size=(6, 8))
    module.attns[0].an_bias.requires_grad_(False)
    module.attns[0].ah_bias.requires_grad_(False)
    module.set_resolution((6, 8))
    close(module(x, grid_size=(6, 8)), before, 1e-6)  # tables are resampled in float64, the same values
    built = attention(split_size=split_size, resolution=(6, 8))
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert not module.attns[0].ah_bias.requires_grad
    assert module.attns[0].aw_bias.requires_grad


def test_parameters() -> None:
    module = attention(split_size=2)
    names = {"an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "get_v.weight", "get_v.bias"}
    own = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(module.state_dict()) == own | {f"attns.{i}.{name}" for i in (0, 1) for name in names}
    assert set(attention(use_agents=False, qkv_bias=False).state_dict()) == own - {"qkv.bias"} | {
        "attns.0.get_v.weight",
        "attns.0.get_v.bias",
    }
    assert len(attention(split_size=6).attns) == 1
    fresh = AgentCSwinAttention(64, 4, agent_num=9)
    for table in (fresh.attns[0].an_bias, fresh.attns[0].wa_bias, fresh.qkv.weight, fresh.proj.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.2)
    assert not fresh.qkv.bias.any()


def test_dropout_reaches_the_branches() -> None:
    x = tokens((4, 6), batch=1)
    for use_agents in (True, False):
        module = attention(use_agents=use_agents, attn_drop=0.5, split_size=2).train()
        assert not torch.allclose(module(x, grid_size=(4, 6)), module(x, grid_size=(4, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 1, "split_size": 2}, r"two branches.*num_heads=1.*nearest is 2"),
        ({"agent_num": 5}, r"agent_num.*square.*5.*nearest is 4"),
        ({"split_size": 0}, r"split_size must be positive, got 0"),
        ({"resolution": (0, 4)}, r"resolution must be \(H, W\).*got \(0, 4\)"),
        ({"agent_grid": 0}, r"agent_grid must be \(H, W\).*got 0, the nearest is \(1, 1\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**options)


def test_bad_calls() -> None:
    module = attention()
    with pytest.raises(ValueError, match=r"grid_size=\(4, 5\) stands for 20 tokens, x has 24"):
        module(tokens((4, 6)), grid_size=(4, 5))
    with pytest.raises(ValueError, match="attention_mask must be padding"):
        module(tokens((4, 6)), grid_size=(4, 6), attention_mask=torch.zeros(24, 24))
    with pytest.raises(ValueError, match="idx must be one of -1, 0, 1; got 2"):
        AgentStripes(8, 2, resolution=4, idx=2)
    with pytest.raises(ValueError, match=r"qkv|each of q, k and v"):
        AgentStripes(8, 2, resolution=4)(torch.zeros(3, 1, 16, 4), grid_size=(4, 4))


def test_registered() -> None:
    info = az.attention_info("agent_cswin")
    assert (info.arxiv, info.spatial, info.padding_masks_only) == ("2312.08874", True, True)
    assert "V_A" in info.equation


# --- conversion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "mha", "gqa"])
def test_conversion_that_changes_nothing(kind: str) -> None:
    layers = {
        "timm": lambda: Attention(8, num_heads=4, qkv_bias=True),
        "mha": lambda: MultiHeadAttention(8, 4),
        "gqa": lambda: GroupedQueryAttention(8, 4, num_kv_heads=4, qkv_bias=True),
    }
    layer, x = layers[kind]().double().eval(), tokens((3, 4))
    module = AgentCSwinAttention.from_softmax_attention(layer, use_agents=False)
    assert not module.training
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    close(module(x, grid_size=(3, 4)), layer(x))


def test_conversion_to_agents() -> None:
    """Projections are kept, whatever the stripes; everything else is zero, as in the conversion to plain agent attention."""
    layer, x = Attention(8, num_heads=4, qkv_bias=True, attn_drop=0.1, proj_drop=0.2).double(), tokens((4, 4))
    module = AgentCSwinAttention.from_softmax_attention(layer, resolution=4, agent_num=4)
    assert (module.attns[0].attn_drop, module.proj_drop.p, module.training) == (0.1, 0.2, True)
    plain = AgentAttention.from_softmax_attention(layer, window_size=4, agent_num=4)
    close(module.eval()(x, grid_size=(4, 4)), plain.eval()(x, grid_size=(4, 4)))
    stripes = AgentCSwinAttention.from_softmax_attention(layer.state_dict(), num_heads=4, resolution=4, split_size=2, agent_num=4)
    assert not any(parameter.any() for parameter in stripes.attns.parameters())
    close(stripes.qkv.weight, layer.qkv.weight, 0)


def test_conversion_refusals() -> None:
    convert = AgentCSwinAttention.from_softmax_attention
    with pytest.raises(ValueError, match=r"noncausal.*is_causal=True"):
        convert(MultiHeadAttention(8, 4, is_causal=True))
    with pytest.raises(ValueError, match=r"as wide as its tokens.*k\.weight \(4, 8\)"):
        convert(GroupedQueryAttention(8, 4, num_kv_heads=2))
    with pytest.raises(ValueError, match=r"without a place: q_norm\.weight"):
        convert(Attention(8, num_heads=4, qk_norm=True, norm_layer=nn.RMSNorm))
    with pytest.raises(ValueError, match="give num_heads"):
        convert(Attention(8, num_heads=4).state_dict())
