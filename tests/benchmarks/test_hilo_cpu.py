"""The benchmark of HiLo on a CPU, at a size that takes no time."""

from __future__ import annotations

import torch

from attention_zoo.benchmarks.hilo_cpu import TARGETS, measure_hilo_on_cpu, render_hilo_on_cpu


def test_measures_every_layer_and_says_what_is_met() -> None:
    before = torch.get_num_threads()
    result = measure_hilo_on_cpu(threads=1, dim=24, num_heads=12, side=14, batch=2, rounds=2)
    assert torch.get_num_threads() == before
    layers = result["layers"]
    assert list(layers) == ["dense", "spatial reduction", "local windows", "hilo"]
    assert layers["hilo"]["faster"] == 1.0
    assert {name: row["target"] for name, row in layers.items() if "target" in row} == TARGETS
    assert all(row["ms"] > 0 and row["images_per_second"] > 0 for row in layers.values())
    table = render_hilo_on_cpu(result)
    assert len(table.splitlines()) == 2 + len(layers)
    assert table.count("met") + table.count("missed") == len(TARGETS)
