"""Our kernels as operators of PyTorch, which an eager call reaches without the dispatcher.

A registered operator (`torch.library.custom_op`) is what compilers, tracers, fake tensors, transforms and those who record calls
need. To launch a kernel through one takes the host about a tenth of a millisecond, several times what the kernel takes on a small
map. Where nobody of these is there, the same function is called by itself, inside a `torch.autograd.Function` if gradients are
recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

__all__ = ["Operator", "is_at_hand", "is_watched", "operator", "stands_alone"]

_Result = TypeVar("_Result")
_PLAIN = (Tensor, nn.Parameter)


class Operator(Generic[_Result]):
    """A function of tensors and numbers, positional ones only, that launches kernels: see `operator`.

    Attributes:
        registered: the operator as PyTorch knows it, `torch.ops.attention_zoo.<name>`.
    """

    def __init__(self, name: str, function: Callable[..., _Result], mutates_args: Iterable[str]) -> None:
        functools.update_wrapper(self, function)
        self._name, self._function, self._launch = name, function, _on_its_device(function)
        mutated = tuple(mutates_args)
        schema = torch.library.infer_schema(function, mutates_args=mutated)
        self.registered = torch.library.custom_op(f"attention_zoo::{name}", self._launch, mutates_args=mutated, schema=schema)
        self._recorded: Any = None

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` says what comes out, from tensors without data. A decorator, as `custom_op` has it."""
        self.registered.register_fake(function)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """How gradients are computed, as `custom_op` has it; once only: gradients of gradients raise RuntimeError."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        launch = self._launch

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:  # with `setup_context` beside it torch binds signatures, 20 microseconds
                output = launch(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._recorded = Recorded

    def __call__(self, *args: Any) -> _Result:
        if torch.compiler.is_compiling() or is_watched():
            return self.registered(*args)  # type: ignore[no-any-return]
        tensors = _tensors(args)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{self._name}: our kernels have no forward-mode derivatives; backend='reference' has them")
        needs_gradient = False
        for tensor in tensors:
            if type(tensor) not in _PLAIN or tensor.is_meta:
                return self.registered(*args)  # type: ignore[no-any-return]
            needs_gradient = needs_gradient or tensor.requires_grad
        if not needs_gradient or not torch.is_grad_enabled():
            return self._launch(*args)
        if self._recorded is None or any(isinstance(arg, list) for arg in args):  # which autograd.Function does not look into
            return self.registered(*args)  # type: ignore[no-any-return]
        return self._recorded.apply(*args)  # type: ignore[no-any-return]

    def unseen(self) -> Callable[..., _Result]:
        """What to call for plain tensors of the current device where nothing is recorded, as within a node of autograd."""
        return self if torch.compiler.is_compiling() or is_watched() else self._function


def operator(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., _Result]], Operator[_Result]]:
    """Decorator: `function` as the operator `attention_zoo::<name>`.

    Its kernels are launched on the device of its tensors, whatever the current one is. What comes out shares no memory with what
    went in.

    Args:
        name: unique.
        mutates_args: names of the arguments that change in place.
    """
    return functools.partial(_make, name, mutates_args)


def _make(name: str, mutates_args: Iterable[str], function: Callable[..., _Result]) -> Operator[_Result]:
    return Operator(name, function, mutates_args)


def is_watched() -> bool:
    """Whether somebody has to see the operator: a transform, a dispatch mode or a tracer."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def stands_alone(x: Tensor) -> bool:
    """Whether a call on `x` may be one node of autograd that computes with our kernels, instead of operators that others see."""
    return type(x) in _PLAIN and not (torch.compiler.is_compiling() or is_watched() or forward_ad._current_level >= 0)


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list):
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def is_at_hand(x: Tensor) -> bool:
    """Whether a kernel of Triton's would be launched where `x` is."""
    return not x.is_cuda or x.get_device() == torch.cuda.current_device()


def _on_its_device(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Triton launches kernels on the current device, which need not be the one that holds the tensors."""

    @functools.wraps(function)
    def launch(*args: Any) -> _Result:
        first = args[0] if args and isinstance(args[0], Tensor) else next(iter(_tensors(args)), None)
        if first is None or is_at_hand(first):
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return launch
