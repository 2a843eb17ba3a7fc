"""Agent attention against its formula written out, the paper's invariants, its options, and the conversion of softmax attention."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import AgentAttention, GroupedQueryAttention, MultiHeadAttention
from attention_zoo.attention.agent import agent_attention, pool_agents

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 12, num_heads: int = 4, **options: Any) -> AgentAttention:
    """A float64 layer whose biases are not zero."""
    options = {"agent_num": 4, "window_size": (3, 4), "bias_grid": 3, **options}
    module: AgentAttention = az.create_attention("agent", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def tokens(length: int, dim: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, dim, dtype=F64)


# --- the formula ------------------------------------------------------------------------------------------------------------------


def resampling(size: int, new_size: int) -> Tensor:
    """Matrix (new_size, size) of bilinear resampling along one axis, align_corners=False."""
    matrix = torch.zeros(new_size, size, dtype=F64)
    for i in range(new_size):
        place = max((i + 0.5) * size / new_size - 0.5, 0.0)
        low = min(int(place), size - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, size - 1)] += place - low
    return matrix


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return resampling(image.shape[0], size[0]) @ image @ resampling(image.shape[1], size[1]).T


def bin_means(x: Tensor, count: int, real: Tensor) -> list[Tensor]:
    """Means of rows over the bins along the first axis: of sums and of counts of real rows; callers divide."""
    length = x.shape[0]
    bounds = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    return [x[lo:hi].sum(0) / max(1, int(real[lo:hi].sum())) for lo, hi in bounds]


def pooled(q: Tensor, real: Tensor, grid: tuple[int, int] | None, agent_grid: tuple[int, int]) -> Tensor:
    """(N, C) -> (n, C), over real rows only."""
    q = q * real[:, None]
    if grid is None:
        return torch.stack(bin_means(q, math.prod(agent_grid), real))
    image, cells, means = q.view(*grid, -1), real.view(*grid), []
    for i in range(agent_grid[0]):
        rows = slice(i * grid[0] // agent_grid[0], -(-(i + 1) * grid[0] // agent_grid[0]))
        for j in range(agent_grid[1]):
            columns = slice(j * grid[1] // agent_grid[1], -(-(j + 1) * grid[1] // agent_grid[1]))
            total = image[rows, columns].sum((0, 1))
            means.append(total / max(1, int(cells[rows, columns].sum())))
    return torch.stack(means)


def bias_over(agents_first: Any, prefix: Any, grid: tuple[int, int], agent_grid: tuple[int, int]) -> Tensor:
    """One head: square (n, b, b), rows (n, H'), columns (n, W') and prefix (n, P) tables -> (n', P + H * W)."""
    square, rows, columns = agents_first
    per_agent = []
    for i in range(len(square)):
        down = resampling(rows.shape[1], grid[0]) @ rows[i]
        across = resampling(columns.shape[1], grid[1]) @ columns[i]
        flat = (resized(square[i], grid) + down[:, None] + across[None, :]).flatten()
        per_agent.append(flat if prefix is None else torch.cat([prefix[i], flat]))
    bias = torch.stack(per_agent)
    side = math.isqrt(len(bias))
    return torch.stack([resized(column.view(side, side), agent_grid).flatten() for column in bias.T], dim=1)


def by_formula(
    m: AgentAttention, x: Tensor, grid: tuple[int, int] | None, mask: Tensor | None = None, context: Tensor | None = None
) -> Tensor:
    """Sample by sample, head by head, agent by agent, token by token."""
    return torch.stack(
        [
            sample_by_formula(m, x[b], grid, None if mask is None else mask[b].bool(), None if context is None else context[b])
            for b in range(len(x))
        ]
    )


def sample_by_formula(
    m: AgentAttention, x: Tensor, grid: tuple[int, int] | None, mask: Tensor | None, context: Tensor | None
) -> Tensor:
    prefix, d, heads = m.num_prefix_tokens, m.head_dim, m.num_heads
    source = x if context is None else context
    real = torch.ones(len(source), dtype=torch.bool) if mask is None else mask
    key_grid = grid if context is None else None
    if context is not None and m.window_size is not None and len(context) == prefix + math.prod(m.window_size):
        key_grid = m.window_size
    real_queries = real if context is None else torch.ones(len(x), dtype=torch.bool)
    if m.sr_ratio > 1:
        assert key_grid is not None
        r = m.sr_ratio
        cells = (source * real[:, None]).view(key_grid[0] // r, r, key_grid[1] // r, r, -1).permute(0, 2, 4, 1, 3)
        merged = torch.einsum("hwcij,dcij->hwd", cells, m.sr.weight) + m.sr.bias
        source = m.norm(merged.flatten(0, 1))
        real = real.view(key_grid[0] // r, r, key_grid[1] // r, r).any(3).any(1).flatten()
        key_grid = (key_grid[0] // r, key_grid[1] // r)
    if m.split_qkv:
        q, (k, v) = m.q(x), m.kv(source).chunk(2, -1)
    else:
        inner, kv_inner = heads * d, m.num_kv_heads * d
        q = F.linear(x, *(t[:inner] for t in (m.qkv.weight, m.qkv.bias)))
        k, v = F.linear(source, *(t[inner:] for t in (m.qkv.weight, m.qkv.bias))).split([kv_inner, kv_inner], -1)
    q = m.q_norm(q.unflatten(-1, (heads, d)))  # (N, h, d)
    k, v = m.k_norm(k.unflatten(-1, (m.num_kv_heads, d))), v.unflatten(-1, (m.num_kv_heads, d))
    k, v = (torch.stack([t[:, i * m.num_kv_heads // heads] for i in range(heads)], 1) for t in (k, v))
    if m.agent_source == "learned":
        agents = m.agent_tokens[0].unflatten(-1, (heads, d))
    else:
        agents = pooled(q.flatten(1)[prefix:], real_queries[prefix:], grid, m.agent_grid).unflatten(-1, (heads, d))
    out = torch.zeros_like(q)
    for head in range(heads):
        key_bias, query_bias = torch.zeros(len(agents), len(k), dtype=F64), torch.zeros(len(agents), len(q), dtype=F64)
        if m.has_tables and key_grid is not None:
            tables = m.an_bias[head], m.ah_bias[0, head, :, :, 0], m.aw_bias[0, head, :, 0]
            key_bias = bias_over(tables, m.ac_bias[0, head] if prefix else None, key_grid, m.agent_grid)
        if m.has_tables and grid is not None:
            tables = m.na_bias[head], m.ha_bias[0, head, :, 0].T, m.wa_bias[0, head, 0].T
            query_bias = bias_over(tables, m.ca_bias[0, head].T if prefix else None, grid, m.agent_grid)
        read = []
        for i, agent in enumerate(agents[:, head]):
            weights = torch.exp(m.scale * k[:, head] @ agent + key_bias[i]) * real
            read.append((weights / weights.sum().clamp_min(1e-30)) @ v[:, head])
        for t in range(len(q)):
            weights = torch.exp(m.scale * agents[:, head] @ q[t, head] + query_bias[:, t])
            out[t, head] = (weights / weights.sum()) @ torch.stack(read)
    out = out.flatten(1)
    if m.dwc is not None and context is None:
        local = (v.flatten(1) * real[:, None])[prefix:].T
        if grid is None:
            out = torch.cat([out[:prefix], out[prefix:] + m.dwc(local[None])[0].T])
        else:
            image = torch.stack([resized(channel.view(key_grid), grid) for channel in local])
            out = torch.cat([out[:prefix], out[prefix:] + m.dwc(image[None])[0].flatten(1).T])
    return m.proj(out)


def hold_to_formula(module: AgentAttention, x: Tensor, grid: tuple[int, int] | None, **inputs: Any) -> None:
    """Output, and gradients by the input and all parameters."""
    place = {} if grid is None else {"grid_size": grid}
    leaves, results = [x.requires_grad_(), *module.parameters()], []
    mask, context = inputs.get("attention_mask"), inputs.get("context")
    for out in (module(x, **place, **inputs), by_formula(module, x, grid, mask, context)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        close(torch.zeros(()).double() if a is None else a.sum(), torch.zeros(()).double() if b is None else b.sum(), 1e-8)
        if a is not None and b is not None:
            close(a, b, 1e-9)


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    agent_num=st.sampled_from([1, 4, 9]),
    agent_grid=st.sampled_from([None, (2, 3), (4, 1)]),
    window_size=st.sampled_from([(3, 4), (1, 1), 5]),
    num_prefix_tokens=st.integers(0, 2),
    num_kv_heads=st.sampled_from([None, 1, 2]),
    qk_norm=st.booleans(),
    use_bias=st.booleans(),
    use_dwc=st.booleans(),
    head_dim=st.sampled_from([None, 2]),
    scale=st.sampled_from([None, 0.7]),
    masked=st.booleans(),
)
def test_against_the_formula(height: int, width: int, num_prefix_tokens: int, masked: bool, **options: Any) -> None:
    module = build(num_prefix_tokens=num_prefix_tokens, **options)
    x = tokens(num_prefix_tokens + height * width)
    inputs = {"attention_mask": torch.rand(x.shape[:2]) > 0.3} if masked else {}
    hold_to_formula(module, x, (height, width), **inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"sr_ratio": 2}, {"sr_ratio": 2, "num_kv_heads": 2, "agent_grid": (1, 2)}, {"sr_ratio": 3}]
)
def test_split_projections_and_reduced_keys(options: dict[str, Any], masked: bool) -> None:
    module = build(split_qkv=True, window_size=(6, 6), **options)
    x = tokens(36)
    inputs = {"attention_mask": torch.rand(x.shape[:2]) > 0.8} if masked else {}
    hold_to_formula(module, x, (6, 6), **inputs)
    x = tokens(12 * 6, batch=1)
    hold_to_formula(module, x, (12, 6))


@pytest.mark.parametrize("options", [{}, {"num_prefix_tokens": 1}, {"use_dwc": False}, {"qk_norm": True}])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_sequences_without_a_grid(options: dict[str, Any], length: int) -> None:
    module = build(window_size=None, **options)
    assert not any(name.endswith("_bias") for name, _ in module.named_parameters())
    x = tokens(length + module.num_prefix_tokens)
    hold_to_formula(module, x, None)
    hold_to_formula(module, x, None, attention_mask=torch.rand(x.shape[:2]) > 0.3)
    with pytest.raises(ValueError, match="leave out grid_size"):
        module(x, grid_size=(1, length))


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_learned_agents(num_prefix_tokens: int) -> None:
    module = build(agent_source="learned", num_prefix_tokens=num_prefix_tokens)
    assert module.agent_tokens.shape == (1, 4, 12)
    hold_to_formula(module, tokens(12 + num_prefix_tokens), (4, 3))
    hold_to_formula(build(agent_source="learned", window_size=None), tokens(5), None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 12, 13])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_cross_attention(num_prefix_tokens: int, length: int, masked: bool) -> None:
    """The bias of the keys where the context has the tables' size (3 x 4 tokens after the prefix), never a convolution."""
    module = build(num_prefix_tokens=num_prefix_tokens)
    inputs = {"context": tokens(length), **({"attention_mask": torch.rand(2, length) > 0.5} if masked else {})}
    hold_to_formula(module, tokens(num_prefix_tokens + 10), (5, 2), **inputs)


def test_cross_attention_to_reduced_keys() -> None:
    module = build(split_qkv=True, sr_ratio=2, window_size=(4, 6))
    hold_to_formula(module, tokens(8), (4, 2), context=tokens(24))
    with pytest.raises(ValueError, match=r"context must have the \(4, 6\) tokens.*got 8"):
        module(tokens(8), grid_size=(4, 2), context=tokens(8))


# --- invariants -------------------------------------------------------------------------------------------------------------------


def bare(**options: Any) -> AgentAttention:
    """Without tables and convolution."""
    return build(use_bias=False, use_dwc=False, **options)


def test_constant_values_stay() -> None:
    module = build(use_dwc=False)
    with torch.no_grad():
        module.qkv.weight[24:] = 0
    want = module.proj(module.qkv.bias[24:])
    close(module(tokens(15), grid_size=(5, 3)), want.expand(2, 15, 12))


def test_one_agent_says_the_same_to_all() -> None:
    out = build(agent_num=1, use_dwc=False)(tokens(15), grid_size=(5, 3))
    close(out, out[:, :1].expand_as(out))


def test_as_many_agents_as_tokens() -> None:
    module, x = bare(agent_num=9), tokens(9)
    q, k, v = module.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
    maps = [(module.scale * a @ b.mT).softmax(-1) for a, b in ((q, q), (q, k))]
    close(module(x, grid_size=(3, 3)), module.proj((maps[0] @ maps[1] @ v).transpose(1, 2).flatten(2)))


def test_shifted_keys_change_nothing() -> None:
    module, x = build(), tokens(15)
    want = module(x, grid_size=(5, 3))
    with torch.no_grad():
        module.qkv.bias[12:24] += torch.randn(12)
    close(module(x, grid_size=(5, 3)), want)


def test_keys_may_be_permuted_and_queries_may_not() -> None:
    module, x, context = bare(), tokens(15), tokens(7)
    order = torch.randperm(7)
    close(module(x, grid_size=(5, 3), context=context[:, order]), module(x, grid_size=(5, 3), context=context))
    order = torch.arange(15).roll(1)
    assert not torch.allclose(module(x[:, order], grid_size=(5, 3)), module(x, grid_size=(5, 3))[:, order], atol=1e-3)


def test_linear_in_the_values() -> None:
    q, k, agents = (torch.randn(1, 2, n, 3, dtype=F64) for n in (6, 7, 4))
    a, b = torch.randn(2, 1, 2, 7, 3, dtype=F64)
    both = agent_attention(q, k, 2 * a - b, agents)
    close(both, 2 * agent_attention(q, k, a, agents) - agent_attention(q, k, b, agents))


def test_equal_sizes_are_the_identity() -> None:
    module = build()
    bias = module.key_bias((3, 4), (2, 2))
    square = F.interpolate(module.an_bias, size=(3, 4), mode="bilinear")
    assert torch.equal(bias, (square + (module.ah_bias + module.aw_bias)[0]).flatten(2)[None])
    assert torch.equal(
        module.query_bias((3, 4), (2, 2))[0, 0, 5, 3],
        (module.ha_bias[0, 0, 1, 0, 3] + module.wa_bias[0, 0, 0, 1, 3])
        + F.interpolate(module.na_bias, size=(3, 4), mode="bilinear")[0, 3, 1, 1],
    )


def test_fused_and_split_projections_agree() -> None:
    fused, split = build(), build(split_qkv=True)
    split.load_state_dict(
        az.convert_official_state_dict(
            "agent", fused.state_dict(), dim=12, num_heads=4, agent_num=4, window_size=(3, 4), bias_grid=3, split_qkv=True
        )
    )
    x = tokens(15)
    close(fused(x, grid_size=(5, 3)), split(x, grid_size=(5, 3)))


def test_tables_resized_for_good() -> None:
    module = build(num_prefix_tokens=1)
    other, x = copy.deepcopy(module), tokens(36)
    other.set_window_size((5, 7))
    assert other.ah_bias.shape == (1, 4, 4, 5, 1)
    close(other(x), module(x, grid_size=(5, 7)))


def test_fully_masked_samples() -> None:
    """Only the bias of the convolution is left, and that of the projection."""
    module, x = build(), tokens(15)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0] = False
    out = module(x, grid_size=(5, 3), attention_mask=mask)
    close(out[0], module.proj(module.dwc.bias).expand(15, 12))
    close(out[1], module(x, grid_size=(5, 3))[1])


def test_masked_pooling() -> None:
    x, mask = torch.randn(1, 6, 2), torch.tensor([[1, 0, 0, 1, 0, 0]]).bool()
    pooled_tokens = pool_agents(x, (2, 3), (1, 3), mask)
    close(pooled_tokens, torch.stack([(x[0, 0] + x[0, 3]) / 2, torch.zeros(2), torch.zeros(2)])[None], 1e-6)
    close(pool_agents(x, None, (1, 2), mask), torch.stack([x[0, 0], x[0, 3]])[None], 1e-6)


# --- construction, sizes and errors -----------------------------------------------------------------------------------------------


def test_grid_may_be_left_out() -> None:
    module = build(num_prefix_tokens=1)
    x = tokens(13)
    assert torch.equal(module(x), module(x, grid_size=(3, 4)))
    with pytest.raises(TypeError, match=r"grid_size is needed: x has 14 tokens .*window_size=\(3, 4\) stands for 12"):
        module(tokens(15))


def test_parameters_and_their_initialisation() -> None:
    module = az.create_attention("agent", dim=192, num_heads=6, num_prefix_tokens=2, split_qkv=True, agent_source="learned")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["an_bias"] == shapes["na_bias"] == (6, 49, 7, 7)
    assert (shapes["ah_bias"], shapes["aw_bias"]) == ((1, 6, 49, 14, 1), (1, 6, 49, 1, 14))
    assert (shapes["ha_bias"], shapes["wa_bias"]) == ((1, 6, 14, 1, 49), (1, 6, 1, 14, 49))
    assert (shapes["ac_bias"], shapes["ca_bias"]) == ((1, 6, 49, 2), (1, 6, 2, 49))
    for name, parameter in module.named_parameters():
        if name.endswith("_bias") or name in {"agent_tokens", "q.weight", "kv.weight", "proj.weight"}:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
        elif name in {"q.bias", "kv.bias", "proj.bias"}:
            assert not parameter.any()
    reduced = az.create_attention("agent", dim=16, num_heads=4, window_size=(8, 6), split_qkv=True, sr_ratio=2)
    assert (reduced.ah_bias.shape[3], reduced.aw_bias.shape[4], reduced.ha_bias.shape[2]) == (4, 3, 8)
    assert (reduced.norm.eps, reduced.sr.stride) == (1e-5, (2, 2))


def test_multiply_adds() -> None:
    """4 N n C of the two attentions, beside the projections and the convolution."""
    module, length = az.create_attention("agent", dim=64, num_heads=4, agent_num=9, window_size=12), 144
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        module(torch.randn(1, length, 64))
    assert counter.get_total_flops() / 2 == 4 * length * 9 * 64 + 4 * length * 64 * 64 + 9 * length * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent_num": 50}, r"agent_num must be a square, got 50; the nearest is 49"),
        ({"agent_num": 0}, r"agent_num must be a square, got 0; the nearest is 1"),
        ({"sr_ratio": 2}, r"sr_ratio=2.*split_qkv=True"),
        ({"sr_ratio": 2, "split_qkv": True, "num_prefix_tokens": 1}, r"num_prefix_tokens=1 \(only 0\)"),
        ({"sr_ratio": 2, "split_qkv": True, "window_size": None}, "window_size=None"),
        ({"sr_ratio": 8, "split_qkv": True, "window_size": 4}, r"leaves no key.*4"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens=-1"),
        ({"agent_source": "random"}, r"agent_source must be one of 'pool', 'learned'; got 'random'"),
        ({"agent_source": "learned", "agent_grid": (2, 4)}, r"leave out agent_grid=\(2, 4\)"),
        ({"window_size": (0, 4)}, r"window_size must be \(H, W\), both at least 1.*got \(0, 4\), the nearest is \(1, 4\)"),
        ({"window_size": (3,)}, r"window_size must be \(H, W\).*got \(3,\), the nearest is \(3, 1\)"),
        ({"agent_grid": (0, 4)}, r"agent_grid must be \(H, W\)"),
        ({"num_kv_heads": 3}, r"num_kv_heads=3; the nearest that does is 2"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        az.create_attention("agent", dim=16, num_heads=4, **options)


def test_wrong_inputs() -> None:
    module = build(split_qkv=True, sr_ratio=2, window_size=4)
    with pytest.raises(ValueError, match=r"grid_size=\(5, 3\) is not divisible by sr_ratio=2; the nearest is \(4, 4\)"):
        module(tokens(15), grid_size=(5, 3))
    with pytest.raises(ValueError, match="no tokens to pool"):
        build(window_size=None, num_prefix_tokens=2)(tokens(2))
    with pytest.raises(ValueError, match="attention_mask must be padding"):
        build()(tokens(12), attention_mask=torch.zeros(12, 12))
    with pytest.raises(ValueError, match=r"padding, \(2, 12\) boolean.*got torch\.bool \(3, 12\)"):
        build()(tokens(12), attention_mask=torch.ones(3, 12).bool())


# --- from softmax attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        MultiHeadAttention(12, 4, qkv_bias=True, attn_drop=0.1, proj_drop=0.2),
        GroupedQueryAttention(12, 4, num_kv_heads=2),
        Attention(12, 4, qkv_bias=True),
    ],
    ids=["mha", "gqa", "timm"],
)
def test_conversion(source: nn.Module, split_qkv: bool) -> None:
    """The projections are the source's; nothing else says anything."""
    source = copy.deepcopy(source).eval()
    module = AgentAttention.from_softmax_attention(source, agent_num=9, window_size=(5, 3), split_qkv=split_qkv)
    assert not module.training
    x = torch.randn(2, 15, 12)
    q, k, v, *_ = module._project(x, None, (5, 3), None)
    tensors = source.state_dict()
    fused = tensors.get("qkv.weight")
    want = (
        F.linear(x, fused, tensors["qkv.bias"])
        if fused is not None
        else torch.cat(
            [
                F.linear(x, tensors[f"{n}.weight"], tensors.get(f"{n}.bias"))
                for n in (("q_proj", "k_proj", "v_proj") if "q_proj.weight" in tensors else "qkv")
            ],
            -1,
        )
    )
    close(torch.cat([q, k, v], -1), want, 1e-6)
    zero = AgentAttention(
        12,
        4,
        num_kv_heads=module.num_kv_heads,
        agent_num=9,
        window_size=(5, 3),
        split_qkv=split_qkv,
        qkv_bias=("qkv.bias" if not split_qkv else "q.bias") in module.state_dict(),
        use_bias=False,
        use_dwc=False,
    )
    zero.load_state_dict({name: t for name, t in module.state_dict().items() if name in zero.state_dict()})
    close(module(x), zero(x), 1e-6)


def test_conversion_of_sources_with_normalisation_and_refusals() -> None:
    source = MultiHeadAttention(12, 4, qk_norm=True)
    module = AgentAttention.from_softmax_attention(source, qk_norm=True, window_size=None, agent_num=4)
    assert module.q_norm.weight.shape == (3,)
    with pytest.raises(ValueError, match=r"without a place: q_norm\.weight"):
        AgentAttention.from_softmax_attention(source)
    with pytest.raises(ValueError, match="causal"):
        AgentAttention.from_softmax_attention(MultiHeadAttention(12, 4, is_causal=True))
    with pytest.raises(ValueError, match="give num_heads"):
        AgentAttention.from_softmax_attention(source.state_dict())
    noisy = AgentAttention.from_softmax_attention(MultiHeadAttention(12, 4).state_dict(), num_heads=4, table_std=0.02)
    assert noisy.an_bias.any()
    assert not noisy.dwc.weight.any()
    learned = AgentAttention.from_softmax_attention(MultiHeadAttention(12, 4), agent_source="learned")
    assert learned.agent_tokens.any()


# --- in a Vision Transformer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prefix"), [({}, 1), ({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)]
)
def test_in_a_vision_transformer(options: dict[str, Any], prefix: int) -> None:
    """It keeps its class and register tokens, and the layers know how many they are."""
    model = az.create_model(
        "vit_tiny_patch16_224",
        attention="agent",
        attention_kwargs={"agent_num": 4},
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=4,
        num_classes=5,
        **options,
    ).eval()
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [prefix] * 2
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
