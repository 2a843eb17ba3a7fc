"""Kernels that do not wait for each other, on two streams: where one runs out of programs, the other fills the processors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["two_streams"]


class _Pair(NamedTuple):
    """A stream, the one beside it, and the events by which each waits for the other: to make them takes the host longer."""

    caller: torch.cuda.Stream
    other: torch.cuda.Stream
    begins: torch.cuda.Event
    ends: torch.cuda.Event


@contextlib.contextmanager
def two_streams(x: Tensor, wanted: bool = True) -> Iterator[torch.cuda.Stream | None]:
    """A context that gives another stream: what is launched there runs beside what is launched on the caller's meanwhile.

    Both begin after what the caller's stream has to do; from the end of this context on the caller's stream waits for both. A CUDA
    graph records the two branches. The device is that of `x`, the current one; on a CPU, or if it is not `wanted`, it gives None.

    Nothing may be allocated for the other stream, and what it reads and writes must live until the end of the context: memory
    belongs to the caller's stream, which alone knows when it may be used again.
    """
    if not (wanted and x.is_cuda):
        yield None
        return
    device = x.get_device()
    caller, other, begins, ends = _beside(device, torch._C._cuda_getCurrentRawStream(device))
    begins.record(caller)
    other.wait_event(begins)
    try:
        yield other
    finally:
        ends.record(other)
        caller.wait_event(ends)


@functools.lru_cache(maxsize=64)
def _beside(device: int, handle: int) -> _Pair:
    """The stream `handle`, the current one, and its own companion: another thread, with another stream, may be recording a graph.

    An event may be recorded again while others wait for what it stood for.
    """
    streams = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    return _Pair(*streams, torch.cuda.Event(), torch.cuda.Event())
