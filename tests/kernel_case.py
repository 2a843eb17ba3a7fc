"""What every operation with a kernel is put through: against its plain code, in half precision, in graphs, again and again.

A file names its cases, and puts them through all of `CHECKS` by `each_check`. Without a GPU kernels run under TRITON_INTERPRET=1,
which conftest.py sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo.ops import use_backend
from attention_zoo.ops._tap import Call, add_tap, remove_tap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Each example takes seconds: in the interpreter, or for the compiler.
FEW = settings(max_examples=2 if DEVICE == "cpu" else 4)
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)  # numbers of numpy's interpret it


@dataclass
class Case:
    """A call of an operation: those of `tensors` with floating point get gradients.

    Attributes:
        operation: takes `tensors` and `settings` by name, and `backend`.
        outputs: names of what it returns, a tensor or a tuple of them.
        single: tensors, and results of `run`, that are float32 in any dtype.
        unbatched: tensors without a dimension of samples.
        learns: whether there are gradients.
        operators: how many operators of ours a forward and a backward reach.
        spacings: how much half precision may err, relative to the result, in spacings of its numbers.
    """

    operation: Callable[..., Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("out",)
    unbatched: tuple[str, ...] = ()
    learns: bool = True
    operators: int = 2
    spacings: float = 6.0

    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors on the device, those with floating point in `dtype` and with gradients."""
        given = {}
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point():
                given[name] = tensor.detach().to(DEVICE, torch.float32 if name in self.single else dtype)
                given[name].requires_grad_(self.learns)
            else:
                given[name] = tensor.to(DEVICE)
        return given

    def of_given(self, given: Mapping[str, Tensor], backend: str, function: Any = None) -> dict[str, Tensor]:
        """The outputs, and the gradients of a fixed functional of them, by name."""
        leaves = {name: t for name, t in given.items() if t.requires_grad}
        objective = torch.zeros((), device=DEVICE)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # PyTorch's convolutions, too, are to be exact
            found = (function or self.operation)(**given, **self.settings, backend=backend)
            found = dict(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True))
            for out in found.values() if leaves else ():
                seen = out.isfinite()  # no log-normaliser of nothing has a slope
                slopes = torch.arange(out.numel(), device=DEVICE).cos().view(out.shape)
                objective = objective + (torch.where(seen, out, 0.0).float() * slopes).sum()
            gradients = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True) if leaves else ()
        return {**{name: out.detach() for name, out in found.items()}, **dict(zip(leaves, gradients, strict=True))}

    def run(self, backend: str, dtype: torch.dtype = torch.float32, function: Any = None) -> dict[str, Tensor]:
        return self.of_given(self.given(dtype), backend, function)

    def of(self, **changed: Tensor) -> Case:
        return replace(self, tensors={**self.tensors, **changed})


Makers = Mapping[str, Callable[[], Case]]


def largest(name: str, want: Mapping[str, Tensor]) -> float:
    """Sums over many tokens are as exact as the largest of them lets them be."""
    finite = want[name][want[name].isfinite()]
    return max(1.0, float(finite.abs().max())) if finite.numel() else 1.0


def constant(name: str, want: Mapping[str, Tensor]) -> float:
    return 1.0


def check_against_plain_code(
    case: Case, *, atol: float = 2e-5, rtol: float = 1e-4, size: Callable[[str, Mapping[str, Tensor]], float] = largest
) -> None:
    """But for rounding; `size` of a result, by its name among all of them, is what `atol` is relative to."""
    got, want = case.run("triton"), case.run("reference")
    for name, right in want.items():
        torch.testing.assert_close(
            got[name], right, atol=atol * size(name, want), rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_half_precision(case: Case) -> None:
    """Within what a plain computation in the same dtype may err."""
    exact = case.run("reference")
    for dtype in HALVES:
        got, spacing = case.run("triton", dtype), torch.finfo(dtype).eps
        for name, right in exact.items():
            assert got[name].dtype == (torch.float32 if name in case.single else dtype)
            finite = right.isfinite()  # all but log-normalisers of nothing
            error = (got[name].float() - right)[finite].norm() / right[finite].norm().clamp_min(1e-6)
            assert error < case.spacings * spacing, f"{name} {dtype}: {error}"


def check_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = case.run("triton", function=torch.compile(case.operation, fullgraph=True, backend=backend))
    for name, right in case.run("triton").items():
        torch.testing.assert_close(compiled[name], right, atol=1e-5, rtol=1e-5)


def check_registration(case: Case) -> None:
    """What the operators tell the compiler (shapes, strides, aliases) is what they do."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "attention_zoo":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    def copy(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        return value.detach().clone() if isinstance(value, Tensor) else value

    with Record():
        case.run("triton")
    for func, args in calls:
        torch.library.opcheck(func, copy(args), test_utils=("test_schema", "test_faketensor"))
    assert len({func for func, _ in calls}) == case.operators


def check_determinism(case: Case) -> None:
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_capture(case: Case) -> None:
    """Nothing waits for the device: a CUDA graph computes what then stands in the tensors that it was recorded with."""
    given = case.given(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case.of_given(given, "triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.of_given(given, "triton")
    with torch.no_grad():
        for tensor in given.values():
            if tensor.ndim:
                tensor.copy_(tensor.flip(0))
    graph.replay()
    for name, right in case.of_given(given, "triton").items():
        assert torch.equal(got[name], right), name


def check_graphed_callable(layer: nn.Module, x: Tensor, **inputs: Any) -> None:
    """Forward and backward replayed as CUDA graphs, after eager calls on another stream, give what those gave."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x, **inputs)
            return out

    def run(function: Any, x: Tensor) -> tuple[Tensor, ...]:
        out = function(x)
        found = torch.autograd.grad(out.float().square().sum(), (x, *layer.parameters()))
        return tuple(t.detach().clone() for t in (out, *found))  # a capture cannot wait for the streams of nodes that are alive

    module = Fixed()
    want = run(module, x)
    graphed = torch.cuda.make_graphed_callables(module, (torch.randn_like(x).requires_grad_(),), allow_unused_input=True)
    for got, right in zip(run(graphed, x), want, strict=True):  # cuDNN adds up gradients in any order
        assert (got - right).float().norm() <= 1e-2 * right.float().norm()


def check_empty_batch(case: Case) -> None:
    empty = case.of(**{name: t[:0] for name, t in case.tensors.items() if name not in case.unbatched})
    want = empty.run("reference")
    for name, found in empty.run("triton").items():
        assert found.shape == want[name].shape
        assert not found.any()


@contextmanager
def looking_on(note: Callable[[Call], Any] = lambda call: call) -> Iterator[list[Any]]:
    """Somebody looks on: what `note` makes of each tapped call, in their order."""
    seen: list[Any] = []

    def look(call: Call) -> Any:
        seen.append(note(call))
        return call.proceed()

    add_tap(look)
    try:
        yield seen
    finally:
        remove_tap(look)


class Called(TorchDispatchMode):
    """Names of our own operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "attention_zoo":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def check_one_node(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
    """A layer on tokens of a grid is one node of autograd by name, with the outputs and gradients of its plain code."""
    leaves, results = [t for t in (x, *layer.parameters()) if t.requires_grad], []
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out = layer(x, grid_size=grid)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert type(out.grad_fn).__name__ == "_LayerBackward"
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5 * max(1.0, float(want.detach().abs().max())), rtol=1e-4)


CHECKS: dict[str, Callable[[Case], None]] = {
    "half_precision": check_half_precision,
    "one_graph": check_one_graph,
    "registration": check_registration,
    "determinism": check_determinism,
    "capture": check_capture,
    "empty_batch": check_empty_batch,
}
_ON_A_GPU = ("determinism", "capture")  # in the interpreter a run is one thread


def each_check(makers: Makers, **others: Makers) -> pytest.MarkDecorator:
    """Parametrise over `check` and `make`: every check and every maker, but the checks in `others` with makers of their own."""
    return pytest.mark.parametrize(
        ("check", "make"),
        [
            pytest.param(check, make, id=f"{name}-{kind}", marks=pytest.mark.gpu if name in _ON_A_GPU else ())
            for name, check in CHECKS.items()
            for kind, make in others.get(name, makers).items()
        ],
    )
