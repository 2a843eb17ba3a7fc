"""Kernels that do not wait for each other, on two streams: where one runs out of programs, the other fills the processors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["two_streams"]


@contextlib.contextmanager
def two_streams(x: Tensor, wanted: bool = True) -> Iterator[contextlib.AbstractContextManager[object]]:
    """A context that gives another one: what is launched inside that runs beside what is launched in this one outside it.

    Both begin after what the caller's stream has to do; from the end of this context on the caller's stream waits for both. A CUDA
    graph records the two branches. The device is that of `x`, the current one; on a CPU, or if it is not `wanted`, nothing happens.

    Nothing may be allocated in the inner context, and what it reads and writes must live until the end of the outer one: memory
    belongs to the caller's stream, which alone knows when it may be used again.
    """
    if not (wanted and x.is_cuda):
        yield contextlib.nullcontext()
        return
    caller = torch.cuda.current_stream(x.device)
    other = _beside(caller.device_index, caller.cuda_stream)
    other.wait_stream(caller)
    try:
        yield torch.cuda.stream(other)
    finally:
        caller.wait_stream(other)


@functools.lru_cache(maxsize=64)
def _beside(device: int, caller: int) -> torch.cuda.Stream:
    """The stream beside the one with the handle `caller`: one for each, since another thread may be recording a graph."""
    return torch.cuda.Stream(device)
