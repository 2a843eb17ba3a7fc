"""MoH-TransNeXt's attentions against their formulas written out token by token, the official tables, and the paper's invariants."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from attention_case import make_generic
from hypothesis import given
from hypothesis import strategies as st
from parity_case import ParityCase, all_cases
from timm.layers import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import MoHTransNeXtAggregated, MoHTransNeXtGlobal, set_routed_topk
from attention_zoo.attention import moh_transnext as source

F64 = torch.float64
NAMES = ("moh_transnext_global", "moh_transnext_aggregated")
FIXTURES = [c for c in all_cases() if c.path.parent.name in NAMES]


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(name: str, dim: int = 12, num_heads: int = 3, **options: Any) -> Any:
    """A float64 layer whose parameters have no special values, always the same ones, with a small MLP."""
    torch.manual_seed(0)
    options = {"shared_heads": 1, "routed_topk": 1, "cpb_hidden": 6, **options}
    module = az.create_attention(name, dim=dim, num_heads=num_heads, dtype=F64, **options)
    make_generic(module)
    return module.eval()


def tokens(grid: tuple[int, int], dim: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, dtype=F64)


# --- the formulas, token by token -------------------------------------------------------------------------------------------------


def bins(size: int, number: int) -> list[range]:
    """Adaptive pooling's: the cells of each bin."""
    return [range(math.floor(a * size / number), math.ceil((a + 1) * size / number)) for a in range(number)]


def position_bias(m: Any, offset: tuple[float, float], scale_grid: tuple[int, int]) -> Tensor:
    """B of one query and key, for all heads; `offset` is query less key."""
    t = []
    for distance, side in zip(offset, scale_grid, strict=True):
        relative = distance / max(side - 1, 1) * 8
        t.append(math.copysign(math.log2(abs(relative) + 1) / math.log2(8), relative))
    hidden = torch.relu(m.cpb_fc1.weight @ torch.tensor(t, dtype=F64) + m.cpb_fc1.bias)
    return m.cpb_fc2.weight @ hidden + m.cpb_fc2.bias


def unit(v: Tensor) -> Tensor:
    return v / v.norm().clamp_min(1e-12)


def by_formula(m: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One query, head and key after the other. The gates are `moh`'s, which its own tests hold to their formulas."""
    (height, width), h, d = grid, m.num_heads, m.head_dim
    aggregated = isinstance(m, MoHTransNeXtAggregated)
    scale_grid = m.pretrain_resolution or grid
    gates = m._route_linearly(x)[0]
    tau = torch.log1p(torch.exp(m.temperature)).flatten()
    cells = list(itertools.product(range(height), range(width)))
    samples = []
    for b, sample in enumerate(x):
        if aggregated:
            q, (k, v) = m.q(sample).view(-1, h, d), m.kv(sample).view(-1, 2, h, d).unbind(1)
            pooled, centres = pooled_tokens(m, sample, grid)
            pooled_k, pooled_v = m.kv(pooled).view(-1, 2, h, d).unbind(1)
        else:
            q, k, v = m.qkv(sample).view(-1, 3, h, d).unbind(1)
        rows = []
        for n, (i, j) in enumerate(cells):
            if aggregated:
                r = m.window_size // 2
                window = [(i + di, j + dj) for di in range(-r, r + 1) for dj in range(-r, r + 1)]
                near = [place for place, cell in enumerate(window) if cell in cells]
                biases = [position_bias(m, (i - y, j - z), scale_grid) for y, z in centres]
                length = math.log(len(near) + len(centres))
            else:
                biases = [position_bias(m, (i - y, j - z), scale_grid) for y, z in cells]
                length = math.log(len(cells))
            heads = []
            for head in range(h):
                direction = unit(q[n, head])
                query = (direction + m.query_embedding[head, 0]) * tau[head] * length
                if not aggregated:
                    logits = torch.stack([query @ unit(k[o, head]) + biases[o][head] for o in range(len(cells))])
                    heads.append(gates[b, n, head] * (logits.softmax(0) @ v[:, head]))
                    continue
                at = [cells.index(window[place]) for place in near]
                local = [query @ unit(k[o, head]) + m.relative_pos_bias_local[head, p] for o, p in zip(at, near, strict=True)]
                coarse = [query @ unit(pooled_k[p, head]) + biases[p][head] for p in range(len(centres))]
                weights = torch.stack(local + coarse).softmax(0)
                out = weights[len(near) :] @ pooled_v[:, head]
                for weight, o, p in zip(weights, at, near, strict=False):
                    dynamic = direction @ m.learnable_tokens[head, :, p] + m.learnable_bias[head, 0, p]
                    out = out + (weight + dynamic) * v[o, head]
                heads.append(gates[b, n, head] * out)
            rows.append(m.proj(torch.cat(heads)))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def pooled_tokens(m: Any, sample: Tensor, grid: tuple[int, int]) -> tuple[Tensor, list[tuple[float, float]]]:
    """The pooled tokens, and the mean row and column of each."""
    height, width = grid
    shape = m.pool_size or tuple(max(1, side // m.sr_ratio) for side in grid)
    reduced = sample @ m.sr.weight.flatten(1).t() + m.sr.bias
    activated = (0.5 * reduced * (1 + torch.erf(reduced / math.sqrt(2)))).view(height, width, -1)
    pooled, centres = [], []
    for rows, columns in itertools.product(bins(height, shape[0]), bins(width, shape[1])):
        mean = activated[rows][:, columns].mean((0, 1))
        normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        pooled.append(normed * m.norm.weight + m.norm.bias)
        centres.append((sum(rows) / len(rows), sum(columns) / len(columns)))
    return torch.stack(pooled), centres


def assert_equals_formula(module: Any, grid: tuple[int, int], batch: int) -> None:
    module.train()
    x = tokens(grid, batch=batch).requires_grad_()
    leaves = [x, *module.parameters()]
    results = []
    for out in (module(x, grid_size=grid), by_formula(module, x, grid)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, materialize_grads=True, allow_unused=True)))
    close(results[0][0], results[1][0])
    for got, want in zip(results[0][1], results[1][1], strict=True):
        close(got, want, 1e-8)


SIDES = st.integers(1, 4)
COMMON = {
    "qkv_bias": st.booleans(),
    "pretrain_resolution": st.sampled_from([None, 1, (7, 3)]),
    "heads": st.sampled_from([(1, 1), (2, 1), (3, 0), (0, 2)]),
    "batch": st.integers(1, 2),
}


@given(height=SIDES, width=SIDES, **COMMON)
def test_global_against_the_formula(height: int, width: int, batch: int, heads: tuple[int, int], **options: Any) -> None:
    module = build("moh_transnext_global", shared_heads=heads[0], routed_topk=heads[1], **options)
    assert_equals_formula(module, (height, width), batch)


@given(
    height=SIDES,
    width=SIDES,
    window_size=st.sampled_from([1, 3, 5]),
    pool=st.sampled_from([{}, {"sr_ratio": 1}, {"sr_ratio": 3}, {"pool_size": (2, 3)}, {"pool_size": 1}, {"pool_size": [3, 5]}]),
    **COMMON,
)
def test_aggregated_against_the_formula(
    height: int, width: int, batch: int, heads: tuple[int, int], pool: dict[str, Any], **options: Any
) -> None:
    """Also where the pooled grid is larger than the grid, whose bins then repeat cells, and where the window is."""
    module = build("moh_transnext_aggregated", shared_heads=heads[0], routed_topk=heads[1], **pool, **options)
    assert_equals_formula(module, (height, width), batch)


# --- what the official code computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_gates_and_positions_of_the_official_code(case: ParityCase) -> None:
    """Parity itself is in test_parity.py; here the gates, and the coordinates of every query and key."""
    module: Any = case.build()
    x, kwargs = case.inputs()
    close(module._route_linearly(x)[0], case.tensors["debug.gates"], case.tolerance)
    grid = kwargs["grid_size"]
    keys = module.pool_grid(grid) if isinstance(module, MoHTransNeXtAggregated) else grid
    positions = source._positions(grid, keys, module.pretrain_resolution, x.device, torch.float32)
    table = positions.coordinates.unflatten(0, (-1, positions.num_columns))
    ours = table[positions.rows[:, None, :, None], positions.columns[None, :, None, :]]  # (H, W, Hk, Wk, 2)
    official = case.tensors["input.relative_coords_table"][case.tensors["input.relative_pos_index"]]
    close(ours.flatten(0, -2), official, 1e-6)
    assert len(positions.coordinates) == len(case.tensors["input.relative_coords_table"])


@pytest.mark.parametrize(("size", "keys"), [(56, 7), (14, 14), (7, 7), (5, 2), (9, 4), (1, 1), (2, 5)])
def test_offsets_are_those_that_occur(size: int, keys: int) -> None:
    t, index = source._offsets(size, keys, size, torch.device("cpu"), F64)
    assert index.shape == (size, keys)
    assert t.tolist() == sorted(set(t.tolist()))
    centres = [sum(cells) / len(cells) for cells in bins(size, keys)]
    for (n, m), found in zip(itertools.product(range(size), range(keys)), t[index.flatten()].tolist(), strict=True):
        relative = (n - centres[m]) / max(size - 1, 1) * 8
        assert found == pytest.approx(math.copysign(math.log(abs(relative) + 1, 8), relative))
    if size % keys == 0:
        assert len(index.unique()) == len(t), "the MLP is run for offsets that do not occur"


# --- invariants -------------------------------------------------------------------------------------------------------------------


def test_cosine_attention_is_a_special_case() -> None:
    """Without embeddings and position biases, tau ln N = sqrt(d): attention of unit vectors times sqrt(d)."""
    module, x = build("moh_transnext_global", shared_heads=3, routed_topk=0), tokens((3, 4))
    with torch.no_grad():
        for parameter in (module.query_embedding, module.cpb_fc2.weight, module.shared_router.weight):
            parameter.zero_()
        module.temperature.fill_(math.log(math.expm1(2 / math.log(12))))
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    want = ((2 * q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    close(module(x, grid_size=(3, 4)), module.proj(want))


def test_weights_sum_to_one_without_the_dynamic_part() -> None:
    """Equal values come out as they are, at the corners too: neighbours outside the grid have no weight."""
    module, x = build("moh_transnext_aggregated", shared_heads=3, routed_topk=0), tokens((4, 3))
    with torch.no_grad():
        for parameter in (module.learnable_tokens, module.learnable_bias, module.shared_router.weight, module.kv.weight[12:]):
            parameter.zero_()
    close(module(x, grid_size=(4, 3)), module.proj(module.kv.bias[12:]).expand(2, 12, -1))


def test_flip_equivariance_needs_symmetric_biases() -> None:
    module = build("moh_transnext_aggregated", sr_ratio=2)
    x = tokens((4, 6))
    flipped = x.unflatten(1, (4, 6)).flip(2).flatten(1, 2)

    def difference() -> float:
        out, other = (module(t, grid_size=(4, 6)).unflatten(1, (4, 6)) for t in (x, flipped))
        return (out - other.flip(2)).abs().max().item()

    assert difference() > 1e-3
    with torch.no_grad():
        module.cpb_fc1.weight[:, 1] = 0
        for parameter in (module.relative_pos_bias_local, module.learnable_tokens, module.learnable_bias):
            places = parameter.unflatten(-1, (3, 3))
            parameter.copy_(((places + places.flip(-1)) / 2).flatten(-2))
    assert difference() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_scaled_by_pretraining(name: str) -> None:
    """The scale of positions is that of `pretrain_resolution`, else of `input_resolution`, else of the grid of the call."""
    x = tokens((4, 4))
    plain, small = build(name), build(name, input_resolution=4)
    pretrained = build(name, input_resolution=(4, 4), pretrain_resolution=7)
    other = build(name, input_resolution=[9, 2], pretrain_resolution=[7, 7])
    close(plain(x, grid_size=(4, 4)), small(x, grid_size=(4, 4)))
    close(pretrained(x, grid_size=(4, 4)), other(x, grid_size=(4, 4)))
    assert (plain(x, grid_size=(4, 4)) - pretrained(x, grid_size=(4, 4))).abs().max() > 1e-4
    x = tokens((5, 3))
    assert (plain(x, grid_size=(5, 3)) - small(x, grid_size=(5, 3))).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_load_balance_loss_is_gathered(name: str) -> None:
    routed, shared = build(name).train(), build(name, shared_heads=3, routed_topk=0).train()
    x = tokens((3, 4))
    both = nn.ModuleList([routed, shared])
    for layer in both:
        layer(x, grid_size=(3, 4))
    assert shared.aux_loss is None
    close(az.auxiliary_loss(both), routed.aux_loss, 0)
    with torch.no_grad():
        routed.router.weight.zero_()
    routed(x, grid_size=(3, 4))
    assert routed.aux_loss.item() == pytest.approx(1.0)
    routed.eval()(x, grid_size=(3, 4))
    assert routed.aux_loss is None
    routed.debug = True
    routed(x, grid_size=(3, 4))
    assert routed.last_head_load.tolist() == [1.0, 0.0]  # ties: the lowest head


@pytest.mark.parametrize("name", NAMES)
def test_topk_can_be_set(name: str) -> None:
    module = build(name)
    set_routed_topk(module, 2)
    assert module.routed_topk == 2
    assert module._route_linearly(tokens((2, 2)))[0].count_nonzero() == 2 * 4 * 3
    with pytest.raises(ValueError, match="from 1 to 2, got 3"):
        set_routed_topk(module, 3)


# --- tables that are kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_kept_tables_serve_every_later_call(name: str) -> None:
    """Made in inference mode, under a transform or with fake tensors, they would break what follows."""
    module, grid = build(name), (3, 2)
    x = tokens(grid)

    def forget() -> None:
        source._cached_positions.cache_clear()
        source._cached_neighbourhood.cache_clear()

    forget()
    want = module(x, grid_size=grid).detach()
    forget()
    with torch.inference_mode():
        module(x, grid_size=grid)
    module(x, grid_size=grid).sum().backward()
    forget()
    with ops.use_backend("reference"):  # torch's own kernels do not see through a transform that the bias needs a gradient
        by_transform = torch.func.grad(lambda t: module(t, grid_size=grid).square().sum())(x)
    leaf = x.clone().requires_grad_()
    out = module(leaf, grid_size=grid)
    close(out, want)
    close(by_transform, torch.autograd.grad(out.square().sum(), leaf)[0])
    forget()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(x), grid_size=grid)
    close(module(x, grid_size=grid), want)
    assert source._cached_positions.cache_info().currsize == 1


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    module = az.create_attention("moh_transnext_aggregated", dim=24, num_heads=6, shared_heads=2, routed_topk=2, window_size=5)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "proj.weight": (24, 24),
        "proj.bias": (24,),
        "temperature": (6, 1, 1),
        "query_embedding": (6, 1, 4),
        "cpb_fc1.weight": (512, 2),
        "cpb_fc1.bias": (512,),
        "cpb_fc2.weight": (6, 512),
        "cpb_fc2.bias": (6,),
        "router.weight": (4, 24),
        "shared_router.weight": (2, 24),
        "balance.weight": (2, 24),
        "q.weight": (24, 24),
        "q.bias": (24,),
        "kv.weight": (48, 24),
        "kv.bias": (48,),
        "sr.weight": (24, 24, 1, 1),
        "sr.bias": (24,),
        "norm.weight": (24,),
        "norm.bias": (24,),
        "relative_pos_bias_local": (6, 25),
        "learnable_tokens": (6, 4, 25),
        "learnable_bias": (6, 1, 25),
    }
    names = {n for n, _ in build("moh_transnext_global", qkv_bias=False, shared_heads=1, routed_topk=2).named_parameters()}
    assert "qkv.bias" not in names
    assert {"proj.bias", "router.weight", "balance.weight"} <= names
    assert "shared_router.weight" not in names
    names = {n for n, _ in build("moh_transnext_aggregated", qkv_bias=False, shared_heads=3, routed_topk=0).named_parameters()}
    assert not {"q.bias", "kv.bias", "router.weight", "balance.weight"} & names
    assert {"sr.bias", "shared_router.weight"} <= names


@pytest.mark.parametrize("name", NAMES)
def test_initialisation(name: str) -> None:
    module = az.create_attention(name, dim=64, num_heads=8)
    assert torch.nn.functional.softplus(module.temperature).flatten().tolist() == pytest.approx([1 / 0.24] * 8)
    for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.25)
        assert linear.bias is None or not linear.bias.any()
    assert module.query_embedding.std().item() == pytest.approx(0.02, rel=0.25)
    if isinstance(module, MoHTransNeXtAggregated):
        assert module.sr.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
        assert not module.sr.bias.any()
        assert module.relative_pos_bias_local.std().item() == pytest.approx(0.0004, rel=0.3)
        assert module.learnable_tokens.std().item() == pytest.approx(0.02, rel=0.25)
        assert not module.learnable_bias.any()
        assert module.norm.eps == 1e-5


def test_dropout_spares_the_dynamic_part() -> None:
    module, x = build("moh_transnext_aggregated", attn_drop=1 - 1e-12).train(), tokens((3, 3))
    out = module(x, grid_size=(3, 3))  # all weights are dropped
    assert (out - module.proj.bias).abs().max() > 1e-3
    with torch.no_grad():
        module.learnable_tokens.zero_()
        module.learnable_bias.zero_()
    close(module(x, grid_size=(3, 3)), module.proj.bias.expand_as(x))


def test_pooled_grids() -> None:
    by_ratio, fixed = build("moh_transnext_aggregated", sr_ratio=4), build("moh_transnext_aggregated", pool_size=(2, 7))
    assert [by_ratio.pool_grid(g) for g in ((8, 9), (3, 4), (1, 1))] == [(2, 2), (1, 1), (1, 1)]
    assert fixed.pool_grid((3, 3)) == (2, 7)
    assert build("moh_transnext_aggregated").pool_grid((6, 5)) == (3, 2)
    assert "sr_ratio=4" in repr(by_ratio)
    assert "pool_size=(2, 7)" in repr(fixed)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moh_transnext_aggregated", {"window_size": 2}, "window_size must be odd.*got 2, the nearest is 3"),
        ("moh_transnext_aggregated", {"window_size": -1}, "window_size must be odd.*got -1, the nearest is 1"),
        ("moh_transnext_aggregated", {"pool_size": 2, "sr_ratio": 2}, "pool_size=2 and sr_ratio=2.*give one"),
        ("moh_transnext_aggregated", {"pool_size": (0, 2)}, r"pool_size.*at least 1.*\(0, 2\)"),
        ("moh_transnext_aggregated", {"sr_ratio": 0}, "sr_ratio must be at least 1, got 0"),
        ("moh_transnext_global", {"input_resolution": (1, 2, 3)}, r"input_resolution must be \(H, W\).*\(1, 2, 3\)"),
        ("moh_transnext_global", {"pretrain_resolution": 0}, "pretrain_resolution.*at least 1.*0"),
        ("moh_transnext_global", {"cpb_hidden": 0}, "cpb_hidden.*0.*nearest is 1"),
        ("moh_transnext_global", {"shared_heads": 4}, "shared_heads=4.*nearest is 3"),
        ("moh_transnext_global", {"shared_heads": 1, "routed_topk": 0}, "routed_topk must be from 1 to 2.*nearest is 1"),
        ("moh_transnext_global", {"shared_heads": 3, "routed_topk": 1}, "routed_topk must be 0.*nearest is 0"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


# --- conversion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_transnext_is_continued_as_it_is(name: str) -> None:
    """A dense layer is one whose heads are all shared, with gates of 1."""
    cls = {"moh_transnext_global": MoHTransNeXtGlobal, "moh_transnext_aggregated": MoHTransNeXtAggregated}[name]
    dense, x = build(name, shared_heads=3, routed_topk=0, qkv_bias=False, attn_drop=0.1), tokens((4, 3))
    nn.init.zeros_(dense.shared_router.weight)
    state = {k: v for k, v in dense.state_dict().items() if k != "shared_router.weight"}
    module = cls.from_softmax_attention(state)
    assert (module.shared_heads, module.routed_topk, module.training) == (1, 2, True)
    close(module.eval()(x, grid_size=(4, 3)), dense(x, grid_size=(4, 3)))
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in dense.parameters())
    del dense.shared_router
    module = cls.from_softmax_attention(dense, shared_heads=2, routed_topk=1)
    assert (module.shared_heads, module.routed_topk, module.attn_drop, module.training) == (2, 1, 0.1, False)


def test_conversion_refusals() -> None:
    convert = MoHTransNeXtGlobal.from_softmax_attention
    with pytest.raises(ValueError, match=r"starts from TransNeXt's attention only.*qkv\.weight"):
        convert(Attention(12, num_heads=3))
    state = {k: v for k, v in build("moh_transnext_global").state_dict().items() if "router" not in k and "balance" not in k}
    with pytest.raises(ValueError, match=r"missing: proj\.bias; without a place: extra"):
        convert({**{k: v for k, v in state.items() if k != "proj.bias"}, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"missing: kv\.weight"):
        MoHTransNeXtAggregated.from_softmax_attention(state)
