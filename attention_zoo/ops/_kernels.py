"""When one of our kernels serves an operation, whose plain code serves it otherwise."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops.dispatch import BackendError, EngineReport, Explanation, wanted_backend
from attention_zoo.ops.engines.base import unusable

__all__ = ["Lazy", "power_of_2", "use_kernel"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_CHANNELS = 256


class Lazy:
    """A module that is imported when it is first asked for something: one of kernels, which needs Triton.

    An `import` in a function takes the host some microseconds each time.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found


def power_of_2(length: int) -> int:
    """The smallest power of two that is not below `length`: what sides of the kernels' tiles are."""
    return 1 << max(length - 1, 0).bit_length()


def use_kernel(
    backend: str, tensors: tuple[Tensor, ...], *, channels: int = 0, dropout_p: float = 0.0, missing: str | None = None
) -> bool:
    """Whether the kernel is to be called with these queries, keys and values.

    Args:
        backend: of the call. "auto" takes the kernel on CUDA where it serves the call; "triton" asks for it; any other name is
            about the plain code.
        tensors: with their channels in the last dimension.
        channels: of a head, where the tensors have those of several; 0: they have those of one.
        dropout_p: of the call.
        missing: what else the call asks for that the kernel does not have; None: nothing.

    Raises:
        BackendError: "triton" is asked for, by the call, `use_backend` or the environment, and cannot serve it.
    """
    name = wanted_backend(backend)
    if name not in ("auto", "triton") or (name == "auto" and not tensors[0].is_cuda):
        return False  # nothing is asked of the kernels, which is all that such a call pays
    reason = _reason(tensors, channels, dropout_p) or missing
    if name == "auto":
        return reason is None
    if reason is not None:
        explanation = Explanation(None, name, (EngineReport(name, False, reason),))
        raise BackendError(f"backend {name!r} cannot serve this call: {reason}", explanation)
    return True


def _reason(tensors: tuple[Tensor, ...], channels: int, dropout_p: float) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    first = tensors[0]
    if first.dtype not in _DTYPES or any(t.dtype != first.dtype for t in tensors[1:]):
        return f"tensors must all be float16, bfloat16 or float32; got {', '.join(str(t.dtype) for t in tensors)}"
    most = channels or max(t.shape[-1] for t in tensors)
    if most > _MOST_CHANNELS:
        return f"heads of more than {_MOST_CHANNELS} channels: {most}"
    if dropout_p > 0:
        return "the kernels have no dropout"
    return unusable(first.device)
