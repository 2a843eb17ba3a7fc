"""Differential attention's kernels against the plain code: random odd shapes, outputs and gradients; in graphs; what they refuse.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 40 if DEVICE == "cuda" else 1  # times as many tokens where kernels are not run in Python
FEW = settings(max_examples=4 if DEVICE == "cpu" else 25)


@dataclass
class Problem:
    """A call: the operation, its tensors (each gets a gradient), its other arguments."""

    operation: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def run(self, backend: str, dtype: torch.dtype = torch.float32, function: Any = None) -> dict[str, Tensor]:
        """The output and the gradients of a fixed functional of it, by name; lambda and the norm's weight stay float32."""
        given = {
            name: t.to(DEVICE, torch.float32 if name in ("factor", "weight") else dtype).requires_grad_()
            for name, t in self.tensors.items()
        }
        out = (function or self.operation)(**given, **self.settings, backend=backend)
        objective = (out.float() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum()
        gradients = torch.autograd.grad(objective, list(given.values()))
        return {"out": out.detach(), **dict(zip(given, gradients, strict=True))}


def difference(
    batch: int = 2, groups: int = 2, group: int = 2, tokens: int = 5, dim: int = 8, joint: bool = False, per_token: bool = True,
    norm: bool = True, weighted: bool = True,
) -> Problem:  # fmt: skip
    """Outputs of signal heads and of noise heads, apart or each group's together."""
    heads = groups * group
    tensors = {"signal": torch.randn(batch, tokens, heads + groups * joint, dim).transpose(1, 2)}
    if not joint:
        tensors["noise"] = torch.randn(batch, groups, tokens, dim)
    tensors["factor"] = torch.rand(batch, tokens, heads) if per_token else torch.tensor(0.4)
    if norm and weighted:
        tensors["weight"] = torch.rand(dim) + 0.5
    return Problem(
        ops.subtract_noise,
        tensors,
        {"groups": groups, **({"eps": 1e-5, "gain": 0.8} if norm else {}), **({"noise": None} if joint else {})},
    )


def compare(problem: Problem) -> None:
    want, got = problem.run("reference"), problem.run("triton")
    for name, right in want.items():
        size = max(1.0, right.abs().max().item())
        torch.testing.assert_close(got[name], right, atol=2e-5 * size, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@FEW
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), group=st.integers(1, 3), tokens=st.sampled_from([1, 5, 37 * LARGE]),
    dim=st.sampled_from([1, 8, 24, 130]), joint=st.booleans(), per_token=st.booleans(), norm=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_subtract_noise(**sizes: Any) -> None:
    compare(difference(**sizes))


MAKERS: dict[str, Callable[[], Problem]] = {
    "difference": difference,
    "difference-joint": lambda: difference(1, 1, 2, 70 * LARGE, 72, joint=True, per_token=False),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_several_tiles(make: Callable[[], Problem]) -> None:
    compare(make())


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_half_precision(make: Callable[[], Problem]) -> None:
    """Within what a plain computation in the same dtype may err."""
    problem = make()
    exact = problem.run("reference")
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,):  # numbers of numpy's interpret it
        got, spacing = problem.run("triton", dtype), torch.finfo(dtype).eps
        for name, right in exact.items():
            error = (got[name].float() - right).norm() / right.norm().clamp_min(1e-6)
            assert error < 6 * spacing, f"{name} {dtype}: {error}"


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_in_one_graph(make: Callable[[], Problem]) -> None:
    problem = make()
    torch._dynamo.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = problem.run("triton", function=torch.compile(problem.operation, fullgraph=True, backend=backend))
    for name, right in problem.run("triton").items():
        torch.testing.assert_close(compiled[name], right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_registration(make: Callable[[], Problem]) -> None:
    """What the operators tell the compiler (shapes, strides, aliases, gradients) is what they do."""
    problem, calls = make(), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "attention_zoo":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        problem.run("triton")
    assert len({func for func, _ in calls}) == 2
    for func, args in calls:
        copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, copies, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_every_time_the_same(make: Callable[[], Problem]) -> None:
    problem = make()
    first, second = problem.run("triton"), problem.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_cuda_graphs(make: Callable[[], Problem]) -> None:
    problem = make()
    given = {name: t.to(DEVICE, torch.bfloat16).requires_grad_() for name, t in problem.tensors.items()}

    def run() -> tuple[Tensor, ...]:
        out = problem.operation(**given, **problem.settings, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), list(given.values()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_empty_batches(per_token: bool) -> None:
    problem = difference(0, per_token=per_token)
    want, got = problem.run("reference"), problem.run("triton")
    assert all(got[name].shape == want[name].shape and not got[name].any() for name in want)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": (2, 3, 5, 8)}, "noise"),
        ({"noise": None, "groups": None}, "groups"),
        ({"noise": None, "groups": 4}, "groups"),
        ({"groups": 1}, "groups"),
        ({"factor": (2, 5, 3)}, "factor"),
        ({"weight": (7,)}, "weight"),
        ({"eps": None}, "eps"),
        ({"signal": (2, 4, 40)}, "signal"),
    ],
    ids=str,
)
def test_what_does_not_fit(changes: dict[str, Any], match: str) -> None:
    problem = difference()
    new = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=match):
        problem.operation(**{**problem.tensors, **problem.settings, **new})


@pytest.mark.parametrize(("dtype", "dim", "match"), [(torch.float64, 8, "float64"), (torch.float32, 320, "256")], ids=str)
def test_what_the_kernel_refuses(dtype: torch.dtype, dim: int, match: str) -> None:
    problem = difference(dim=dim)
    tensors = {name: t.to(DEVICE, dtype) for name, t in problem.tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        problem.operation(**tensors, **problem.settings, backend="triton")
    problem.operation(**tensors, **problem.settings)  # "auto" goes another way
