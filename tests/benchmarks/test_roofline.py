"""The arithmetic under the bounds: operations, bytes, pairs of tokens, and what a device needs for them."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.benchmarks.roofline import (
    FORWARD,
    TRAIN,
    Peaks,
    Work,
    attention_work,
    causal_pairs,
    core_context_pairs,
    device_peaks,
    least_flops,
    mechanism_work,
)
from attention_zoo.ops.core_context import core_context_visible
from attention_zoo.registry import create_attention


def test_the_bound_is_the_larger_of_both_times() -> None:
    peaks = Peaks(flops=1e12, bandwidth=1e11)
    assert Work(2e9, 1e6).bound_ms(peaks) == pytest.approx(2.0)
    assert Work(1e3, 1e8).bound_ms(peaks) == pytest.approx(1.0)
    assert Work(6.0, 2.0).intensity == 3.0


def test_causal_pairs() -> None:
    assert causal_pairs(4, 4) == 10
    assert causal_pairs(1, 9) == 9
    assert causal_pairs(2, 5) == 4 + 5


@pytest.mark.parametrize(("tokens", "window", "group"), [(40, 8, 4), (33, 5, 3), (6, 8, 4), (16, 0, 1)])
def test_core_context_pairs(tokens: int, window: int, group: int) -> None:
    positions = torch.arange(tokens)
    core, exact = core_context_visible(positions, positions, tokens // group, window_size=window, group_size=group)
    assert core_context_pairs(tokens, window_size=window, group_size=group) == float(core.sum() + exact.sum())


def test_attention_is_two_products_and_seven_with_backward() -> None:
    work = attention_work(batch=2, heads=3, num_queries=5, pairs=35.0, head_dim=4, value_dim=8, kept=2 * 3 * 7 * 12, element_size=2)
    assert work[FORWARD].flops == 2 * 2 * 3 * 35 * (4 + 8)
    assert work[FORWARD].bytes == 2 * (2 * 3 * 5 * (4 + 8) + 2 * 3 * 7 * 12)
    assert work[TRAIN].flops == 2 * 2 * 3 * 35 * (4 * 4 + 3 * 8)
    assert work[TRAIN].bytes == 2 * work[FORWARD].bytes


def test_a_module_is_its_projections_and_its_pairs() -> None:
    batch, tokens, dim = 2, 10, 16
    work = mechanism_work("mha", dim, 4, batch=batch, num_tokens=tokens, options={"qkv_bias": False, "proj_bias": False})
    assert work is not None
    assert work[FORWARD].flops == batch * (2 * tokens * 4 * dim * dim + 4 * tokens * tokens * dim)
    assert work[FORWARD].bytes == 2 * (2 * batch * tokens * dim + 4 * dim * dim)
    assert work[TRAIN].flops == 3 * work[FORWARD].flops


def test_what_causality_and_routing_leave_out_is_not_counted() -> None:
    tokens, dim = 12, 32
    dense = create_attention("mha", dim, 4)
    causal = create_attention("mha", dim, 4, is_causal=True)
    projections = 2 * tokens * 4 * dim * dim
    core = least_flops(dense, tokens) - projections
    assert least_flops(causal, tokens) == projections + core * (tokens + 1) / (2 * tokens)
    routed = create_attention("moh", dim, 4, shared_heads=1, routed_topk=1)
    routers = 2 * tokens * sum(p.numel() for n, p in routed.named_parameters() if "router" in n or "balance" in n)
    assert least_flops(routed, tokens) == projections + routers + core / 2


def test_core_context_counts_its_windows() -> None:
    tokens, dim = 40, 16
    module = create_attention("cca", dim, 2, window_size=8, group_size=4, rope_theta=None)
    pairs = core_context_pairs(tokens, window_size=8, group_size=4)
    assert least_flops(module, tokens) == 2 * tokens * 4 * dim * dim + 4 * dim * (pairs + tokens)


def test_hilo_is_what_its_paper_counts() -> None:
    work = mechanism_work("hilo", 768, 12, batch=64, num_tokens=196, grid_size=(14, 14), options={"alpha": 0.9, "window_size": 2})
    assert work is not None
    assert work[FORWARD].flops == pytest.approx(2 * 64 * 0.2983e9, rel=0.01)  # multiply-adds of the table of hilo.md


def test_peaks_are_measured() -> None:
    peaks = device_peaks("cpu", torch.float32, quick=True)
    assert peaks.flops > 1e7
    assert peaks.bandwidth > 1e6
    assert peaks.source == "measured in this run"
