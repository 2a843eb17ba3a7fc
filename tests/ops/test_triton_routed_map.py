"""Routed attention between the regions of a map, its router, and the mechanism that is made of them, against their plain code."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from marks import slow_but
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.ops.routed_map import Regions, best_regions, routed_map_attention, takes_map, with_values

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 3 if DEVICE == "cuda" else 1  # the interpreter is slow


def attention(
    batch: int = 2, heads: int = 2, grid: tuple[int, int] = (2, 3), size: tuple[int, int] = (3, 2), topk: int = 2, dim: int = 8,
    value_dim: int = 16, weights: bool = False,
) -> Case:  # fmt: skip
    regions = Regions(*grid, *size)
    number = grid[0] * grid[1]
    tensors = {
        "qkv": torch.randn(batch, grid[0] * size[0], grid[1] * size[1], heads * (2 * dim + value_dim)),
        "routes": torch.rand(batch, number, number).argsort(-1)[..., : min(topk, number)],
    }
    if weights:
        tensors["route_weights"] = torch.rand(tensors["routes"].shape)
    settings = {"regions": regions, "qk_dim": heads * dim, "heads": heads, "scale": 0.3}
    return Case(_with_values_beside, tensors, settings)


def _with_values_beside(qkv: Tensor, routes: Tensor, *, qk_dim: int, **options: Any) -> Tensor:
    """The values have another reader, as LePE is one: both gradients meet in the projection's."""
    qkv, values = with_values(qkv, 2 * qk_dim)
    return routed_map_attention(qkv, routes, qk_dim=qk_dim, **options) + 0.5 * values


def routes(batch: int = 2, grid: tuple[int, int] = (2, 3), size: tuple[int, int] = (3, 2), topk: int = 2, dim: int = 20) -> Case:
    regions = Regions(*grid, *size)
    tensors = {"qk": torch.randn(batch, grid[0] * size[0], grid[1] * size[1], 2 * dim + 3)}
    return Case(
        _best_of_part, tensors, {"regions": regions, "scale": 0.3, "topk": min(topk, grid[0] * grid[1])}, ("which", "products"),
        ("which", "products"), learns=False, operators=1,
    )  # fmt: skip


def _best_of_part(qk: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of queries and keys that lie among other channels."""
    which, products = best_regions(qk[..., :-3], **options)
    return which.float(), products


@FEW
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), grid=st.tuples(st.integers(1, 2 * LARGER), st.integers(1, 3 * LARGER)),
    size=st.tuples(st.integers(1, 4 * LARGER), st.integers(1, 3 * LARGER)), topk=st.integers(1, 4),
    dims=st.sampled_from([(8, 16), (16, 16), (24, 40)]), weights=st.booleans(),
)  # fmt: skip
def test_routed_map_attention(dims: tuple[int, int], **sizes: Any) -> None:
    kernels.check_against_plain_code(attention(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    batch=st.integers(1, 2), grid=st.tuples(st.integers(1, 5 * LARGER), st.integers(1, 4 * LARGER)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)), topk=st.integers(1, 5), dim=st.sampled_from([1, 20, 70, 150]),
)  # fmt: skip
def test_best_regions(**sizes: Any) -> None:
    case = routes(**sizes)
    got, want = case.run("triton"), case.run("reference")
    torch.testing.assert_close(got["products"], want["products"], atol=1e-5, rtol=1e-4)
    number = case.settings["regions"].rows * case.settings["regions"].columns
    assert all(len(set(row.tolist())) == len(row) for row in got["which"].flatten(0, 1))
    assert got["which"].min() >= 0
    assert got["which"].max() < number
    ordered = want["products"]
    if (ordered[..., :-1] - ordered[..., 1:] > 1e-4).all():  # no near-ties, but for the last place
        assert torch.equal(got["which"][..., :-1], want["which"][..., :-1])


def test_many_regions() -> None:
    case = routes(1, (18, 16), (1, 1), topk=3, dim=20)
    got, want = case.run("triton"), case.run("reference")
    torch.testing.assert_close(got["products"], want["products"], atol=1e-5, rtol=1e-4)
    assert (got["which"] == want["which"]).float().mean() > 0.99  # but for near-ties


def test_regions_that_are_not_numbers_lead_nowhere_else() -> None:
    qk = torch.full((1, 4, 4, 16), torch.nan, device=DEVICE)
    which, _ = best_regions(qk, Regions(2, 2, 2, 2), scale=1.0, topk=3, backend="triton")
    assert which.min() >= 0
    assert which.max() < 4


MAKERS: dict[str, Callable[[], Case]] = {
    "attention": lambda: attention(LARGER, LARGER, weights=True),
    "bare": lambda: attention(LARGER, LARGER),
}


@kernels.each_check(MAKERS, half_precision={"attention": attention})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.parametrize("check", ["one_graph", "registration", "determinism"])
def test_checks_of_the_router(check: str) -> None:
    kernels.CHECKS[check](routes())


LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "everything"),
    "soft": ({"soft_routing": True}, "everything"),
    "without LePE": ({"side_dwconv": 0, "qk_dim": 8}, "everything"),
    "all regions": ({"topk": 9}, "everything"),
    "rows": ({"qkv_bias": False, "n_win": (1, 4)}, "everything"),
    "input only": ({}, "x"),
    "some parameters": ({}, "lepe.bias|qkv.weight"),
    "one parameter": ({}, "proj.weight"),
}
NODES = [(kind, nodes) for nodes in ("one node", "nodes") for kind in LAYERS]


@pytest.mark.parametrize(("kind", "nodes"), slow_but({("plain", "nodes"), *NODES[: len(LAYERS)]}, NODES))
def test_the_mechanism(kind: str, nodes: str) -> None:
    """Outputs, routes and the gradients of what learns; the layers' own forwards where somebody waits for them."""
    (options, learns), hooked = LAYERS[kind], nodes == "nodes"
    module = az.create_attention("bra", 16, 2, **{"n_win": (2, 3), "topk": 2, **options}, device=DEVICE)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns == "everything" or name in learns.split("|"))
    if hooked:
        module.proj.register_forward_hook(lambda *_: None)
    x = torch.randn(LARGER, 4 * 12, 16, device=DEVICE, requires_grad=learns in ("everything", "x"))
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
    found = []
    for backend in ("reference", "triton"):
        with ops.use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out, which, weights = module(x, grid_size=(4, 12), return_routing=True)
            slopes = torch.arange(out.numel(), device=DEVICE).cos().view_as(out)
            gradients = torch.autograd.grad((out * slopes).sum(), leaves)
            found.append((out, weights, which.sort(-1).values.float(), *gradients))
    assert (type(out.grad_fn).__name__ == "_LayerBackward") is not hooked
    torch.testing.assert_close(found[1], found[0], atol=5e-5, rtol=1e-4)


def test_what_the_kernels_do_not_take() -> None:
    with ops.use_backend("triton"):
        x = torch.randn(1, 1, 8, device=DEVICE)
        assert takes_map(x, Regions(2, 2, 2, 2), 8)
        assert not takes_map(x, Regions(64, 32, 2, 2), 8)
        assert not takes_map(x, Regions(2, 2, 2, 2), 16)
    with pytest.raises(ops.BackendError, match="1024"):
        best_regions(torch.randn(1, 64, 32, 4, device=DEVICE), Regions(64, 32, 1, 1), scale=1.0, topk=1, backend="triton")


@pytest.mark.parametrize(
    ("qkv", "heads", "match"), [((1, 4, 5, 24), 2, "qkv is"), ((1, 4, 4, 24), 3, "multiples"), ((2, 4, 4, 24), 2, "routes")]
)
def test_what_does_not_fit_together(qkv: tuple[int, ...], heads: int, match: str) -> None:
    which = torch.zeros(1, 4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=match):
        routed_map_attention(torch.randn(qkv), which, Regions(2, 2, 2, 2), qk_dim=8, heads=heads, scale=1.0)


def test_one_reader_of_the_values_only() -> None:
    for reader in (0, 1):
        qkv = torch.randn(2, 3, 6, requires_grad=True)
        with_values(qkv, 4)[reader].sum().backward()
        want = torch.ones(2, 3, 6)
        if reader:
            want[..., :4] = 0
        assert torch.equal(qkv.grad, want)  # type: ignore[arg-type]


def test_routes_are_listed_by_counting_or_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same sources in the same order, and so the same sums."""
    from attention_zoo.ops.triton import routed, routed_map

    case = attention(2, 1, (4, 5), (1, 2), topk=3)
    counted = case.run("triton")
    monkeypatch.setattr(routed, "_MOST_COUNTED", 0)
    for made in (routed.backward_launches, routed_map._map_backward_launches):
        made.cache_clear()
    for name, want in case.run("triton").items():
        assert torch.equal(counted[name], want), name
