"""What the measurements of growth return, at sizes that say nothing about speed; exponents of known curves."""

from __future__ import annotations

import math

import pytest

from attention_zoo.benchmarks.scaling import (
    GroupedSetting,
    fit_exponent,
    measure_combiner,
    measure_kdgqa,
    summarise_exponents,
    theory_of_combiner,
)
from attention_zoo.benchmarks.timing import Clock

ONCE = Clock(0.0, 1, 1)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0])
def test_exponents_of_known_curves(exponent: float) -> None:
    sizes = [2**i for i in range(5, 10)]
    assert fit_exponent(sizes, [0.3 * n**exponent for n in sizes]) == pytest.approx(exponent)
    assert math.isnan(fit_exponent([4], [1.0]))


def test_theory() -> None:
    """Segments of sqrt(N) give N^1.5, of a constant length nearly N^2 in the end, spans a little more than N."""
    sizes = [2**i for i in (14, 15, 16)]
    assert fit_exponent(sizes, [theory_of_combiner("fixed", n) for n in sizes]) == pytest.approx(1.5)
    assert fit_exponent(sizes, [theory_of_combiner("axial", n, 4) for n in sizes]) > 1.9
    assert 1.05 < fit_exponent(sizes, [theory_of_combiner("logsparse", n) for n in sizes]) < 1.1
    assert fit_exponent(sizes, [theory_of_combiner("dense", n) for n in sizes]) == pytest.approx(2.0)


def test_grouped_attention_on_a_cpu() -> None:
    (row,) = measure_kdgqa([GroupedSetting("tiny", 1, 5, 16, 4, 2)], device="cpu", clock=ONCE)
    assert row["name"] == "tiny"
    assert set(row["ms"]) == set(row["ratio"]) == {"gqa", "kdgqa", "dgqa"}
    assert row["ratio"]["gqa"]["forward"]["eager"] == 1.0
    assert all(times["eager"] > 0 for times in row["ms"]["kdgqa"].values())


@pytest.mark.parametrize("training", [True, False])
def test_combiner_on_a_cpu(training: bool) -> None:
    found = measure_combiner(
        ("fixed", "logsparse"), (16, 36), device="cpu", num_heads=2, head_dim=4, training=training, clock=ONCE
    )  # fmt: skip
    assert list(found) == ["fixed", "logsparse", "dense"]
    for row in found.values():
        assert set(row["module"]) == set(row["operator"]) == ({"forward", "training"} if training else {"forward"})
        assert list(row["operator"]["forward"]) == [16, 36]
    assert len(summarise_exponents(found)) == 3
