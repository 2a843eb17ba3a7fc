"""How long calls take: medians, cold caches, CUDA graphs, calls from Python back to back; and how much memory they need.

Clocks and power limits of a device are left as they are. On CUDA a time lies between two events; before each replay of a graph a
buffer larger than the second-level cache is read, so that a call finds its tensors in memory. (To write it instead would leave in
the cache what has yet to reach the memory, 50 MB on an H200, and small calls would pay 12 microseconds for it.) On a CPU it is the
wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Clock",
    "captured",
    "estimate_ms",
    "host_microseconds",
    "interleaved_ms",
    "median_ms",
    "peak_mib",
    "pipelined_ms",
    "synchronize",
    "time_call",
]

_FLUSHED_BYTES = 256 * 2**20  # several times the second-level cache of any GPU of today
_IN_A_ROW = 10  # calls between two events when Python's share is wanted

_LONG = 400.0  # milliseconds; a training step of a whole model can wait for Python for most of that

Call = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """How much is measured. `seconds`: of each measurement, about; `least` and `most`: how often a call is timed."""

    seconds: float = 0.05
    least: int = 3
    most: int = 50

    def repeats(self, ms: float) -> int:
        """How many calls of about `ms` milliseconds are timed."""
        return max(self.least, min(self.most, round(1e3 * self.seconds / max(ms, 1e-3))))


def time_call(run: Call, clock: Clock, *, capturable: bool = True) -> dict[str, Any]:
    """Milliseconds of a call: "eager", called from Python back to back, and on CUDA "graph", replayed, without Python's time.

    A call that cannot be captured, because it waits for the device, has no "graph" but "not_captured", the reason. One of more than
    400 milliseconds is not captured either: neither Python nor the cache has much of a share in it.
    """
    if not torch.cuda.is_available():
        return {"eager": round(median_ms(run, clock), 5)}
    found: dict[str, Any] = {"eager": round(pipelined_ms(run, clock), 5)}
    if capturable and found["eager"] <= _LONG:
        try:
            replay = captured(run)
        except Exception as error:  # whatever a library raises inside a capture
            return found | {"not_captured": f"{type(error).__name__}: {str(error)[:200]}"}
        found["graph"] = round(median_ms(replay, clock), 5)
    return found


def median_ms(run: Call, clock: Clock) -> float:
    """Median over single calls: on CUDA each with a cold cache, between its own events."""
    return statistics.median(_times(run, clock.repeats(estimate_ms(run))))


def interleaved_ms(runs: Mapping[str, Call], clock: Clock) -> dict[str, float]:
    """Medians of calls that are compared closely: one call of each in turn, each turn begun by another of them.

    Blocks of calls do not compare as closely: the first block of hot matrix products runs at a higher clock than those after it.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = deque(runs)
    for _ in range(clock.repeats(max(map(estimate_ms, runs.values()), default=1.0))):
        for name in order:
            taken[name] += _times(runs[name], 1)
        order.rotate(-1)
    return {name: statistics.median(times) for name, times in taken.items()}


def pipelined_ms(run: Call, clock: Clock) -> float:
    """Median time of a call of several queued in a row: the device's or Python's, whichever is longer."""
    expected = estimate_ms(run)
    calls = max(1, min(_IN_A_ROW, int(1e3 * clock.seconds / expected)))

    def several() -> None:
        for _ in range(calls):
            run()

    return statistics.median(_times(several, max(3, clock.repeats(calls * expected)), cold=False)) / calls


def host_microseconds(run: Call, calls: int) -> float:
    """Python time of a call, least of seven rounds; the device is not waited for within a round."""
    for _ in range(calls):
        run()
    best = float("inf")
    for _ in range(7):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    synchronize()
    return best * 1e6


def captured(run: Call) -> Callable[[], None]:
    """The call as a CUDA graph, after three calls on a stream of its own, to compile and to allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        return _capture(run)
    except Exception:
        torch.cuda.synchronize()
        _capture(torch.zeros(1, device="cuda").zero_)  # a failure leaves the random generators waiting for a capture's end
        raise


def _capture(run: Call) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_mib(run: Call) -> float | None:
    """MiB that a call allocates on the GPU at its worst moment, beyond what is there before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def estimate_ms(run: Call) -> float:
    """Milliseconds of a call, roughly, after one that warms up."""
    run()
    return max(1e-3, min(_times(run, 2, cold=False)))


def _times(run: Call, repeat: int, *, cold: bool = True) -> list[float]:
    if not torch.cuda.is_available():
        return [_wall_ms(run) for _ in range(repeat)]
    buffer = _flushing_buffer() if cold else None
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    torch.cuda.synchronize()
    for begin, end in events:
        if buffer is not None:
            buffer.sum()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _wall_ms(run: Call) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


_BUFFERS: dict[int, Tensor] = {}


def _flushing_buffer() -> Tensor:
    device = torch.cuda.current_device()
    if device not in _BUFFERS:
        _BUFFERS[device] = torch.zeros(_FLUSHED_BYTES // 4, device=device)
    return _BUFFERS[device]
