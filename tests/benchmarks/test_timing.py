"""The clock: how often it measures, and on a GPU what it calls cold, captured and peak."""

from __future__ import annotations

import time

import pytest
import torch

from attention_zoo.benchmarks import timing
from attention_zoo.benchmarks.timing import Clock


def test_repeats_follow_the_time() -> None:
    clock = Clock(seconds=0.1, least=3, most=50)
    assert clock.repeats(1000.0) == 3
    assert clock.repeats(10.0) == 10
    assert clock.repeats(1e-6) == 50


def test_medians_of_sleeping() -> None:
    clock = Clock(0.01, least=3, most=3)
    assert 2.0 <= timing.median_ms(lambda: time.sleep(0.002), clock) < 50.0
    turns = timing.interleaved_ms({"short": lambda: None, "long": lambda: time.sleep(0.005)}, clock)
    assert turns["short"] < turns["long"]
    assert timing.host_microseconds(lambda: time.sleep(0.0005), 2) >= 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_on_a_cpu_there_is_one_time() -> None:
    assert set(timing.time_call(lambda: None, Clock(0.001, 1, 2))) == {"eager"}
    assert timing.peak_mib(lambda: None) is None


@pytest.mark.gpu
def test_on_a_gpu_there_are_graphs() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    times = timing.time_call(lambda: x @ x, Clock(0.01))
    assert times["eager"] > 0
    assert times["graph"] > 0


@pytest.mark.gpu
def test_what_waits_for_the_device_is_not_captured() -> None:
    x = torch.randn(64, device="cuda")
    times = timing.time_call(lambda: x.sum().item(), Clock(0.01))
    assert set(times) == {"eager", "not_captured"}
    assert "captur" in times["not_captured"]
    assert set(timing.time_call(lambda: x + 1, Clock(0.01), capturable=False)) == {"eager"}


@pytest.mark.gpu
def test_after_a_failed_capture_others_succeed() -> None:
    """Of random numbers too, whose generators take part in captures."""
    x = torch.randn(64, device="cuda")
    assert "graph" not in timing.time_call(lambda: torch.rand_like(x).sum().item(), Clock(0.01))
    assert timing.time_call(lambda: torch.rand_like(x), Clock(0.01))["graph"] > 0


@pytest.mark.gpu
def test_peak_memory() -> None:
    assert timing.peak_mib(lambda: torch.empty(2**20, device="cuda", dtype=torch.float32)) == pytest.approx(4.0, abs=0.1)
