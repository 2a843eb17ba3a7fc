"""Bi-level routing attention against its definition in loops, the invariants of the paper and of padding, and its conversion."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from parity_case import load_case
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import BiLevelRoutingAttention, GroupedQueryAttention, MultiHeadAttention

F64 = torch.float64
Cell = tuple[int, int]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 8, num_heads: int = 2, **options: Any) -> BiLevelRoutingAttention:
    """A float64 layer in which nothing is zero, and whose routing is not near a tie."""
    module: BiLevelRoutingAttention = az.create_attention("bra", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def tokens(grid: Cell, dim: int = 8, batch: int = 2, prefix: int = 0) -> Tensor:
    return torch.randn(batch, prefix + grid[0] * grid[1], dim, dtype=F64)


# --- the definition, in loops -----------------------------------------------------------------------------------------------------


class Loops:
    """One sample, cell by cell: what pads, what is pooled, which regions are chosen, one softmax for each token and head."""

    def __init__(self, m: BiLevelRoutingAttention, x: Tensor, height: int, width: int) -> None:
        self.m, self.height, self.width = m, height, width
        rows, columns = m.n_win
        if m.pad_mode == "qkv":
            self.size = (height // rows, width // columns)
            self.count = (-(-height // self.size[0]), -(-width // self.size[1]))
        else:
            self.count, self.size = (rows, columns), (-(-height // rows), -(-width // columns))
        grid = x[m.num_prefix_tokens :].view(height, width, -1)
        self.prefix = [self.project(t) for t in x[: m.num_prefix_tokens]]
        self.cells: dict[Cell, tuple[Tensor, Tensor, Tensor]] = {}  # those that are keys
        self.counted: set[Cell] = set()  # those that count in the means
        zeros = self.project(torch.zeros_like(x[0]))
        for i, j in itertools.product(*(range(n * s) for n, s in zip(self.count, self.size, strict=True))):
            if i < height and j < width:
                self.cells[i, j] = self.project(grid[i, j])
                self.counted.add((i, j))
            elif m.pad_mode == "input":
                self.cells[i, j] = zeros
                self.counted.add((i, j))
            elif m.pad_mode == "qkv":
                self.cells[i, j] = tuple(torch.zeros_like(t) for t in zeros)  # type: ignore[assignment]
        self.regions = list(itertools.product(range(self.count[0]), range(self.count[1])))

    def project(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.m.qkv(token).split([self.m.qk_dim, self.m.qk_dim, self.m.dim])

    def inside(self, region: Cell) -> list[Cell]:
        (a, b), (hr, wr) = region, self.size
        return [(a * hr + i, b * wr + j) for i, j in itertools.product(range(hr), range(wr))]

    def route(self) -> tuple[dict[Cell, list[Cell]], dict[Cell, Tensor]]:
        means: list[dict[Cell, Tensor]] = [{}, {}]
        for part, found in enumerate(means):
            for region in self.regions:
                members = [self.cells[c][part] for c in self.inside(region) if c in self.counted]
                if members or self.m.pad_mode != "mask":
                    mean = torch.stack(members).mean(0)
                    mean = mean if self.m.diff_routing else mean.detach()
                    found[region] = self.m.router["emb"](mean) if self.m.param_routing else mean
        chosen, weights = {}, {}
        for region in self.regions:
            query = means[0].get(region, torch.zeros(self.m.qk_dim, dtype=F64))
            logits = {other: self.m.scale * query @ mean for other, mean in means[1].items()}
            best = sorted(logits, key=lambda other: -logits[other].item())[: self.m.topk]
            chosen[region], weights[region] = best, torch.stack([logits[other] for other in best]).softmax(0)
        return chosen, weights

    def pooled(self, region: Cell, part: int) -> list[Tensor]:
        """Keys (1) or values (2) of a region, after pooling."""
        kind, (hr, wr) = self.m.kv_downsample, self.size
        members = self.inside(region)
        if kind == "identity":
            return [self.cells[c][part] for c in members if c in self.cells]
        at = {(i, j): self.cells[members[i * wr + j]][part] for i, j in itertools.product(range(hr), range(wr))}
        spans = []
        for side in (hr, wr):
            if kind.startswith("ada"):
                n = self.m.kv_per_win
                spans.append([range(i * side // n, -(-(i + 1) * side // n)) for i in range(n)])
            else:
                n = self.m.kv_downsample_ratio
                spans.append([range(i * n, i * n + n) for i in range(side // n)])
        found = []
        for down, across in itertools.product(*spans):
            window = torch.stack([at[i, j] for i, j in itertools.product(down, across)])
            found.append(window.mean(0) if "avg" in kind else window.amax(0))
        return found

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        heads = []
        for q, k, v in zip(*(torch.stack(t).chunk(self.m.num_heads, -1) for t in ([query], keys, values)), strict=True):
            heads.append((self.m.scale * q @ k.T).softmax(-1) @ v)
        return torch.cat(heads, -1)[0]

    def lepe(self, cell: Cell) -> Tensor:
        if self.m.lepe is None:
            return torch.zeros(self.m.dim, dtype=F64)
        side, out = self.m.side_dwconv, self.m.lepe.bias
        for i, j in itertools.product(range(side), range(side)):
            other = (cell[0] + i - side // 2, cell[1] + j - side // 2)
            if other in self.cells and (self.m.pad_mode == "input" or other in self.counted):
                out = out + self.m.lepe.weight[:, 0, i, j] * self.cells[other][2]
        return out

    def forward(self) -> Tensor:
        chosen, weights = self.route()
        grid: dict[Cell, Tensor] = {}
        for region in self.regions:
            keys, values = [p[1] for p in self.prefix], [p[2] for p in self.prefix]
            for other, weight in zip(chosen[region], weights[region], strict=True):
                factor = weight if self.m.soft_routing else 1.0
                keys += [factor * k for k in self.pooled(other, 1)]
                values += [factor * v for v in self.pooled(other, 2)]
            for cell in self.inside(region):
                if cell[0] < self.height and cell[1] < self.width:
                    grid[cell] = self.attend(self.cells[cell][0], keys, values) + self.lepe(cell)
        real = [self.cells[c] for c in itertools.product(range(self.height), range(self.width))]
        seen = [*self.prefix, *real]
        rows = [self.attend(p[0], [t[1] for t in seen], [t[2] for t in seen]) for p in self.prefix]
        rows += [grid[c] for c in itertools.product(range(self.height), range(self.width))]
        return self.m.proj(torch.stack(rows))


def by_loops(m: BiLevelRoutingAttention, x: Tensor, grid: Cell) -> Tensor:
    return torch.stack([Loops(m, sample, *grid).forward() for sample in x])


FLAGS = [
    dict(zip(("soft_routing", "diff_routing", "param_routing"), f, strict=True))
    for f in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1))
]
POOLINGS = ["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]


def assert_equals_loops(module: BiLevelRoutingAttention, grid: Cell, batch: int = 1) -> None:
    x = tokens(grid, batch=batch, prefix=module.num_prefix_tokens).requires_grad_()
    leaves, results = [x, *module.parameters()], []
    for out in (module(x, grid_size=grid), by_loops(module, x, grid)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        close(torch.zeros(1) if a is None else a, torch.zeros(1) if a is None and b is None else b, 1e-9)


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    batch=st.integers(1, 2),
    n_win=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    topk=st.integers(1, 5),
    pad_mode=st.sampled_from(["input", "qkv", "mask"]),
    num_prefix_tokens=st.integers(0, 2),
    qk_scale=st.sampled_from([None, 0.0, 0.7]),
    side_dwconv=st.sampled_from([0, 1, 3, 5]),
)
def test_padding_against_the_loops(height: int, width: int, batch: int, **options: Any) -> None:
    """Every size, regions that are cut off or empty, prefix tokens."""
    assume(options["pad_mode"] != "qkv" or (height >= options["n_win"][0] and width >= options["n_win"][1]))
    assert_equals_loops(build(**options), (height, width), batch)


@given(
    height=st.integers(2, 5),
    width=st.integers(2, 6),
    topk=st.integers(1, 4),
    qk_dim=st.sampled_from([None, 4]),
    flags=st.sampled_from(FLAGS),
    kv_downsample=st.sampled_from(POOLINGS),
    pad_mode=st.sampled_from(["none", "input", "mask"]),
    bias=st.booleans(),
    out_proj=st.booleans(),
)
def test_routing_and_pooling_against_the_loops(
    height: int, width: int, flags: dict[str, Any], kv_downsample: str, pad_mode: str, bias: bool, **options: Any
) -> None:
    if pad_mode == "none" or (pad_mode == "mask" and kv_downsample != "identity"):
        height, width = height + height % 2, width + width % 2
    sizes = {"kv_per_win": 2, "kv_downsample_ratio": 1 if min(height, width) <= 2 else 2}
    module = build(**options, **flags, **sizes, n_win=2, kv_downsample=kv_downsample, pad_mode=pad_mode, qkv_bias=bias)
    assert_equals_loops(module, (height, width))


@pytest.mark.parametrize("case", ["legacy_even", "legacy_autopad_odd", "legacy_soft_diff", "nchw_odd"])
def test_routing_as_the_official_code(case: str) -> None:
    """output.r_idx and output.r_weight; the later implementation keeps extra.r_idx only."""
    parity = load_case(f"bra/{case}")
    x, kwargs = parity.inputs()
    out, routes, weights = parity.build()(x, **kwargs, return_routing=True)
    assert out.shape == x.shape
    stored = {**parity.group("output"), **parity.group("extra")}
    assert torch.equal(routes, stored["r_idx"])
    if "r_weight" in stored:
        close(weights, stored["r_weight"], parity.tolerance)


# --- invariants -------------------------------------------------------------------------------------------------------------------


def plain_attention(module: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    out = (module.scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
    return module.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pad_mode", ["none", "input", "qkv", "mask"])
@pytest.mark.parametrize(("n_win", "topk"), [(2, 4), ((4, 1), 4), ((1, 3), 99), (1, 1)])
def test_all_regions_are_plain_attention(pad_mode: str, n_win: Any, topk: int) -> None:
    module = build(n_win=n_win, topk=topk, side_dwconv=0, pad_mode=pad_mode, qk_scale=0.4)
    x = tokens((4, 6))
    close(module(x, grid_size=(4, 6)), plain_attention(module, x))


@pytest.mark.parametrize("grid", [(1, 1), (5, 3), (4, 6), (2, 7)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_all_regions_are_plain_attention_on_any_grid_with_mask(grid: Cell, prefix: int) -> None:
    module = build(n_win=(3, 4), topk=12, side_dwconv=0, num_prefix_tokens=prefix)
    x = tokens(grid, prefix=prefix)
    close(module(x, grid_size=grid), plain_attention(module, x))


def test_pad_modes_agree_where_the_regions_divide_the_grid_and_only_there() -> None:
    modules = [build(n_win=2, topk=2, pad_mode=mode) for mode in ("none", "input", "qkv", "mask")]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    x = tokens((4, 6))
    outputs = [module(x, grid_size=(4, 6)) for module in modules]
    for out in outputs[1:]:
        close(out, outputs[0])
    x = tokens((5, 7))
    outputs = [module(x, grid_size=(5, 7)) for module in modules[1:]]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outputs, 2))


def test_padding_is_not_there_with_mask() -> None:
    """The routing of a grid with cut-off regions: no empty region is ever chosen before the real ones, and weights sum to 1."""
    module = build(n_win=4, topk=7)
    x = tokens((5, 2))  # regions of 2 x 1: three rows and two columns of four are real
    _, routes, weights = module(x, grid_size=(5, 2), return_routing=True)
    real = torch.tensor([r // 4 < 3 and r % 4 < 2 for r in range(16)])
    assert real[routes[..., :6]].all()
    assert not real[routes[..., 6]].any()
    assert (weights[..., 6] == 0).all()
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_routing_is_sorted_clamped_and_returned() -> None:
    module = build(n_win=2, topk=9)
    out, routes, weights = module(tokens((4, 4)), grid_size=(4, 4), return_routing=True)
    assert out.shape == (2, 16, 8)
    assert routes.shape == weights.shape == (2, 4, 4)
    assert routes.dtype == torch.int64
    assert (weights.diff(dim=-1) <= 0).all()
    assert torch.equal(routes.sort(-1).values, torch.arange(4).expand(2, 4, 4))
    chosen = build(n_win=2, topk=3)
    _, routes, _ = chosen(tokens((4, 4)), grid_size=(4, 4), return_routing=True)
    assert torch.bincount(routes[0].flatten(), minlength=4).sum() == 4 * 3  # the lists of who chose a region hold them all


def test_the_best_region_need_not_be_ones_own() -> None:
    """Keys that are minus the queries: the region itself suits worst."""
    module = build(n_win=2, topk=1, side_dwconv=0)
    with torch.no_grad():
        module.qkv.weight[8:16] = -module.qkv.weight[:8]
        module.qkv.bias[:16] = 0
    _, routes, _ = module(tokens((4, 4)), grid_size=(4, 4), return_routing=True)
    assert (routes[..., 0] != torch.arange(4)).all()


def test_regions_and_the_tokens_inside_them_may_change_places() -> None:
    module, x = build(n_win=(2, 3), topk=2, side_dwconv=0), tokens((4, 6))
    regions = module.cut_grid((4, 6))
    order, inner = torch.randperm(6), torch.randperm(4)

    def moved(t: Tensor) -> Tensor:
        return regions.join(regions.cut(t.unflatten(1, (4, 6)))[:, order][:, :, inner]).flatten(1, 2)

    close(module(moved(x), grid_size=(4, 6)), moved(module(x, grid_size=(4, 6))))


def test_samples_do_not_meet() -> None:
    module, x = build(n_win=2, topk=1), tokens((4, 4))
    changed = torch.cat([x[:1], x[1:] + 1])
    close(module(changed, grid_size=(4, 4))[0], module(x, grid_size=(4, 4))[0], 0)


@pytest.mark.parametrize(("flags", "reached"), list(zip(FLAGS, (False, False, True, True), strict=True)))
def test_which_gradients_reach_the_routing(flags: dict[str, Any], reached: bool) -> None:
    """Means are detached unless diff_routing; values never route."""
    module = build(n_win=2, topk=2, **flags)
    _, routes, weights = module(tokens((4, 4)), grid_size=(4, 4), return_routing=True)
    assert weights.requires_grad == reached
    assert not routes.requires_grad
    if reached:
        weights[..., 0].sum().backward()
        assert module.qkv.weight.grad[:16].abs().max() > 0
        assert module.qkv.weight.grad[16:].abs().max() == 0


def test_routing_stays_float32_under_autocast() -> None:
    """Near-ties would fall differently in bfloat16."""
    module = az.create_attention("bra", dim=8, num_heads=2, n_win=4, topk=3)
    x = torch.randn(4, 64, 8)
    q, k, _ = module.qkv(x).unflatten(1, (8, 8)).chunk(3, -1)
    regions = module.cut_grid((8, 8))
    want = module.route(regions.cut(q), regions.cut(k))
    with torch.autocast("cpu", torch.bfloat16):
        got = module.route(regions.cut(q), regions.cut(k))
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float32


# --- cost -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "dim", "topk", "millions"), [(56, 64, 1, 25.7), (28, 128, 4, 12.8), (14, 256, 16, 6.4)])
def test_multiply_adds(side: int, dim: int, topk: int, millions: float) -> None:
    """The routed stages of BiFormer-S: every query sees 64 keys."""
    module = az.create_attention("bra", dim=dim, num_heads=dim // 32, topk=topk, side_dwconv=5)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        module(torch.randn(1, side * side, dim), grid_size=(side, side))
    cells = side * side
    attention = 2 * cells * 64 * dim
    assert attention / 1e6 == pytest.approx(millions, abs=0.06)
    assert counter.get_total_flops() / 2 == 4 * cells * dim**2 + cells * dim * 25 + 49**2 * dim + attention


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_parameters_exist_where_they_are_needed() -> None:
    def names(**options: Any) -> set[str]:
        return {name for name, _ in build(**options).named_parameters()}

    everything = {f"{module}.{kind}" for module in ("qkv", "proj", "lepe") for kind in ("weight", "bias")}
    assert names() == everything
    assert names(side_dwconv=0) == everything - {"lepe.weight", "lepe.bias"}
    assert names(out_proj=False) == everything - {"proj.weight", "proj.bias"}
    assert names(qkv_bias=False) == everything - {"qkv.bias"}
    assert names(**FLAGS[3]) == everything | {"router.emb.weight", "router.emb.bias"}
    assert build(qk_dim=4).qkv.weight.shape == (16, 8)
    assert build(qk_dim=4).scale == 0.5
    assert build().scale == 8**-0.5, "of the whole width, not of a head's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_dim": 5}, r"dim=5.*num_heads=2.*nearest"),
        ({"n_win": 0}, r"n_win.*0.*nearest is 1"),
        ({"n_win": (2, -1)}, r"n_win.*-1.*nearest is 1"),
        ({"n_win": (7, 7, 7)}, r"n_win.*one number.*or two.*\(7, 7, 7\)"),
        ({"topk": 0}, r"topk.*0.*nearest is 1"),
        ({"topk": 2.5}, r"topk.*whole number, got 2.5; the nearest is 2"),
        ({"side_dwconv": 4}, r"side_dwconv.*4.*nearest is 5"),
        ({"pad_mode": "reflect"}, r"pad_mode.*'none', 'input', 'qkv', 'mask'.*'reflect'"),
        ({"kv_downsample": "fracpool"}, r"kv_downsample.*'identity'.*'maxpool'.*'fracpool'"),
        ({"kv_downsample": "ada_avgpool", "kv_per_win": -1}, r"kv_per_win.*-1"),
        ({"kv_downsample": "maxpool", "kv_downsample_ratio": 0}, r"kv_downsample_ratio.*0"),
        ({"num_prefix_tokens": -1}, r"num_prefix_tokens.*-1"),
        ({"diff_routing": True}, r"diff_routing needs soft_routing.*soft_routing=False, diff_routing=True"),
        ({"soft_routing": True, "param_routing": True}, r"param_routing needs diff_routing"),
        ({"pad_mode": "qkv", "qk_dim": 4}, r"'qkv'.*no qk_dim=4"),
        ({"pad_mode": "qkv", "soft_routing": True, "out_proj": False}, r"'qkv'.*no soft_routing, out_proj=False"),
        ({"pad_mode": "qkv", "kv_downsample": "avgpool"}, r"'qkv'.*no kv_downsample='avgpool'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_grids_that_cannot_be() -> None:
    for options, message in (
        ({"pad_mode": "none"}, r"n_win=\(3, 3\) does not divide grid_size=\(4, 6\); \(6, 6\) would do"),
        ({"pad_mode": "mask", "kv_downsample": "ada_avgpool"}, r"pooling.*\(6, 6\) would do, or pad_mode='input'"),
        ({"pad_mode": "qkv", "n_win": 5}, r"at least \(5, 5\), got \(4, 6\)"),
        ({"n_win": 2, "kv_downsample": "maxpool", "kv_downsample_ratio": 3}, r"\(2, 3\).*kv_downsample_ratio=3.*at most 2"),
        ({"num_prefix_tokens": 1}, r"24 tokens, x has 23"),
        ({"num_prefix_tokens": 30}, r"24 tokens, x has 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**{"n_win": 3, **options})(tokens((4, 6)), grid_size=(4, 6))
    one = tokens((1, 1))
    with pytest.raises(ValueError, match="does not divide"):
        build(pad_mode="none")(one, grid_size=(1, 1))
    assert build(pad_mode="none", n_win=1)(one, grid_size=(1, 1)).shape == one.shape
    module = build(n_win=3)  # one key: itself
    *_, v = module.qkv(one).split(8, -1)
    close(module(one, grid_size=(1, 1)), module.proj(v + module.lepe(v[:, None])[:, 0]))


# --- conversion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "mha", "gqa", "state"])
@pytest.mark.parametrize("bias", [True, False])
def test_conversion_that_changes_nothing(kind: str, bias: bool) -> None:
    layer: Any
    if kind in ("timm", "state"):
        layer = Attention(8, num_heads=2, qkv_bias=bias).double().eval()
    elif kind == "mha":
        layer = MultiHeadAttention(8, 2, qkv_bias=bias, dtype=F64).eval()
    else:
        layer = GroupedQueryAttention(8, 2, num_kv_heads=2, qkv_bias=bias, dtype=F64).eval()
    source, heads = (layer.state_dict(), {"num_heads": 2}) if kind == "state" else (layer, {})
    for options in (
        {"n_win": 2, "topk": 4},
        {"n_win": 3, "topk": 9, "soft_routing": False},
        {"n_win": 1, "topk": 1, "side_dwconv": 0},
    ):
        module = BiLevelRoutingAttention.from_softmax_attention(source, **heads, **options).eval()
        x = tokens((5, 4))
        close(module(x, grid_size=(5, 4)), layer(x))
        assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())


def test_conversion_takes_settings_over() -> None:
    layer = Attention(8, num_heads=2, attn_drop=0.1, proj_drop=0.2).double().train()
    layer.scale, layer.fused_attn = 0.3, False
    module = BiLevelRoutingAttention.from_softmax_attention(layer, **FLAGS[3])
    assert (module.attn_drop, module.proj_drop.p, module.scale, module.training) == (0.1, 0.2, 0.3, True)
    assert not module.lepe.weight.any()
    assert not module.lepe.bias.any()
    assert module.router["emb"].weight.any()
    prefixed = BiLevelRoutingAttention.from_softmax_attention(layer, num_prefix_tokens=1, n_win=2, topk=4).eval()
    x = tokens((4, 4), prefix=1)
    close(prefixed(x, grid_size=(4, 4)), layer.eval()(x))


def test_conversion_refusals() -> None:
    convert, layer = BiLevelRoutingAttention.from_softmax_attention, Attention(8, num_heads=2)
    with pytest.raises(ValueError, match="give num_heads"):
        convert(layer.state_dict())
    with pytest.raises(ValueError, match="causal"):
        convert(MultiHeadAttention(8, 2, is_causal=True))
    with pytest.raises(ValueError, match=r"as many key/value heads.*'k': \(4, 8\)"):
        convert(GroupedQueryAttention(8, 2, num_kv_heads=1))
    with pytest.raises(ValueError, match="'identity'"):
        convert(layer, kv_downsample="avgpool")
    with pytest.raises(ValueError, match="out_proj"):
        convert(layer, out_proj=False)
    with pytest.raises(ValueError, match=r"without a place: .*q_norm\.weight"):
        convert(Attention(8, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm))
