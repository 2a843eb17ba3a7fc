"""The kernels of heads of unit length, and of the cosine queries made from them, against plain PyTorch."""

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
from torch import Tensor

from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 30 if DEVICE == "cuda" else 1  # the interpreter is slow


def vectors(*shape: int) -> Tensor:
    """Of numbers that are not near 0: of one channel the gradient is 0, the difference of two numbers that are large then."""
    x = torch.randn(shape)
    return x + 0.1 * x.sign()


def queries(batch: int = 2, tokens: int = 7, heads: int = 3, dim: int = 8, scaled: bool = True) -> Case:
    """`scaled`: by a number for each token, or else by one for all."""
    tensors = {
        "x": vectors(batch, tokens, heads * dim),
        "embedding": 0.3 * torch.randn(heads, 1, dim),
        "temperature": 2 * torch.randn(heads, 1, 1),
    }
    scale = (torch.rand(tokens, 1) + 1).to(DEVICE) if scaled else 1.7
    tables = ("embedding", "temperature")
    return Case(ops.cosine_queries, tensors, {"scale": scale}, outputs=("queries", "units"), unbatched=tables)


def units(batch: int = 2, tokens: int = 5, heads: int = 2, dim: int = 12) -> Case:
    return Case(ops.unit_heads, {"x": vectors(batch, tokens, heads * dim)}, {"num_heads": heads})


MAKERS: dict[str, Callable[[], Case]] = {"queries": queries, "units": units}
SIZES = {
    "batch": st.integers(1, 3), "tokens": st.integers(1, 12 * LARGER), "heads": st.sampled_from([1, 3, 6, 12]),
    "dim": st.sampled_from([1, 8, 24, 40]),
}  # fmt: skip


@FEW
@given(**SIZES, scaled=st.booleans())
def test_queries(**sizes: Any) -> None:
    kernels.check_against_plain_code(queries(**sizes))


@FEW
@given(**SIZES)
def test_units(**sizes: int) -> None:
    kernels.check_against_plain_code(units(**sizes))


@kernels.each_check(MAKERS)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_several_tiles_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the embedding and the temperature are added up within and over programs."""
    monkeypatch.setattr("attention_zoo.ops.triton.cosine._PROGRAMS", 2)
    kernels.check_against_plain_code(queries(tokens=93, heads=16, dim=32))


@pytest.mark.parametrize("name", ["queries", "units"])
def test_vectors_without_a_length(name: str) -> None:
    """0 stays 0, and what is shorter than 1e-12 is divided by that, with the gradient of a division."""
    case = MAKERS[name]()
    case.tensors["x"][0, 0] = 0
    case.tensors["x"][0, 1] *= 1e-14
    got, want = case.run("triton"), case.run("reference")
    for key, right in want.items():
        torch.testing.assert_close(got[key], right, rtol=1e-4, atol=1e-5 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("used", ["queries", "units"])
def test_one_of_both_is_used(used: str) -> None:
    case = queries()
    results = []
    for backend in ("reference", "triton"):
        given = case.given()
        q, u = ops.cosine_queries(**given, **case.settings, backend=backend)
        slope = (q if used == "queries" else u).sin().sum()
        results.append(torch.autograd.grad(slope, list(given.values()), materialize_grads=True))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_parts_of_a_projection() -> None:
    """Keys stand beside values."""
    kv = torch.randn(2, 5, 48, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        out = ops.unit_heads(kv.chunk(2, -1)[0], 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), kv)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.randn(2, 7, 25)}, "h = 3 heads"),
        ({"embedding": torch.randn(3, 8)}, "embedding is"),
        ({"temperature": torch.randn(3)}, "temperature"),
        ({"scale": torch.ones(6, 1)}, "scale"),
    ],
    ids=["channels", "embedding", "temperature", "scale"],
)
def test_what_does_not_fit(changes: dict[str, Any], match: str) -> None:
    case = queries()
    with pytest.raises(ValueError, match=match):
        ops.cosine_queries(**{**case.tensors, **case.settings, **changes})


def test_what_the_kernels_refuse() -> None:
    for case in (units(heads=65, dim=129), queries(heads=65, dim=129)):
        with pytest.raises(ops.BackendError, match="16384 channels"):
            case.run("triton")
        case.run("auto")
