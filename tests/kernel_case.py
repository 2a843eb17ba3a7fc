"""What every operation with a kernel is put through: against its plain code, in half precision, in graphs, again and again.

Without a GPU kernels run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Each example takes seconds: in the interpreter, or for the compiler.
FEW = settings(max_examples=2 if DEVICE == "cpu" else 4)
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)  # numbers of numpy's interpret it


@dataclass
class Case:
    """A call of an operation that returns one tensor: those of `tensors` with floating point get gradients.

    Attributes:
        single: tensors, and results of `run`, that are float32 in any dtype.
    """

    operation: Callable[..., Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    single: tuple[str, ...] = ()

    def run(self, backend: str, dtype: torch.dtype = torch.float32, function: Any = None) -> dict[str, Tensor]:
        """The output, and the gradients of a fixed functional of it, by name."""
        given = {
            name: t.to(DEVICE, torch.float32 if name in self.single else dtype).requires_grad_()
            if t.is_floating_point()
            else t.to(DEVICE)
            for name, t in self.tensors.items()
        }
        leaves = {name: t for name, t in given.items() if t.is_floating_point()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # PyTorch's convolutions, too, are to be exact
            out = (function or self.operation)(**given, **self.settings, backend=backend)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            gradients = torch.autograd.grad((out.float() * weights).sum(), list(leaves.values()))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    def of(self, **changed: Tensor) -> Case:
        return replace(self, tensors={**self.tensors, **changed})


def check_against_plain_code(case: Case) -> None:
    """But for rounding: sums over many tokens are as exact as the largest of them lets them be."""
    got = case.run("triton")
    for name, right in case.run("reference").items():
        atol = 2e-5 * max(1.0, float(right.abs().max())) if right.numel() else 0.0
        torch.testing.assert_close(got[name], right, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def check_half_precision(case: Case) -> None:
    """Within what a plain computation in the same dtype may err."""
    exact = case.run("reference")
    for dtype in HALVES:
        got, spacing = case.run("triton", dtype), torch.finfo(dtype).eps
        for name, right in exact.items():
            assert got[name].dtype == (torch.float32 if name in case.single else dtype)
            finite = right.isfinite()  # all but log-normalisers of nothing
            error = (got[name].float() - right)[finite].norm() / right[finite].norm().clamp_min(1e-6)
            assert error < 6 * spacing, f"{name} {dtype}: {error}"


def check_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = case.run("triton", function=torch.compile(case.operation, fullgraph=True, backend=backend))
    for name, right in case.run("triton").items():
        torch.testing.assert_close(compiled[name], right, atol=1e-5, rtol=1e-5)


def check_registration(case: Case) -> set[Any]:
    """What the operators tell the compiler (shapes, strides, aliases) is what they do. Returns the operators."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "attention_zoo":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        case.run("triton")
    assert calls
    for func, args in calls:
        copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, copies, test_utils=("test_schema", "test_faketensor"))
    return {func for func, _ in calls}


def check_every_time_the_same(case: Case) -> None:
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_cuda_graph(case: Case) -> None:
    tensors = {name: t.to(DEVICE) for name, t in case.tensors.items()}
    given = {name: t.bfloat16().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    leaves = [t for t in given.values() if t.is_floating_point()]

    def run() -> tuple[Tensor, ...]:
        out = case.operation(**given, **case.settings, backend="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

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
