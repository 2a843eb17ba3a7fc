"""Cases: names, what is measured of them, contenders that fail or are left out; the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attention_zoo import ops
from attention_zoo.attention.combiner_patterns import PATTERNS
from attention_zoo.benchmarks import decode, engines, mechanisms, models, papers
from attention_zoo.benchmarks.cases import Case, Contender, Task, _replayed_in_turns, compiled, measure, mechanism, plain
from attention_zoo.benchmarks.report import exponent
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN, Peaks
from attention_zoo.benchmarks.timing import Clock
from attention_zoo.registry import list_attentions

CLOCK, PEAKS = Clock(0.001, least=1, most=2), Peaks(1e11, 1e10)


def run(cases: list[Case], **settings: Any) -> list[dict[str, Any]]:
    return measure(cases, device="cpu", dtype=torch.float32, clock=CLOCK, peaks=PEAKS, **settings)


def nothing(device: str, dtype: torch.dtype, wrap: Any) -> Task:
    return Task(lambda: None)


def broken(device: str, dtype: torch.dtype, wrap: Any) -> Task:
    raise RuntimeError("out of something")


def no_create(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("no model is built to name it")


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "engines": lambda scale: engines.cases(scale, "cpu", torch.float32),
    "mechanisms": mechanisms.cases,
    "models": lambda scale: models.cases(scale, no_create),
    "papers": papers.cases,
    "decode": decode.cases,
}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("scale", ["full", "small", "quick"])
def test_names_are_unique(suite: str, scale: str) -> None:
    names = [(case.group, case.setting, case.size) for case in SUITES[suite](scale)]
    assert names
    assert len(set(names)) == len(names)


def test_every_claim_has_its_cases() -> None:
    groups = {case.group for case in papers.cases("full")}
    assert groups == set(papers.CLAIMS)
    assert set(papers.GROWTH) <= groups


def test_combiners_patterns_are_judged_by_their_growth() -> None:
    assert {group for group in papers.GROWTH if group.startswith("Combiner")} == {f"Combiner, {name}" for name in PATTERNS}


@pytest.mark.parametrize("group", papers.GROWTH)
def test_what_is_aimed_at_is_how_the_work_grows(group: str) -> None:
    """The exponent of what a mechanism must compute, over the sizes that it is measured at."""
    members = [case for case in papers.cases("full") if case.group == group]
    works = [case.work() for case in members]
    assert all(works)
    for direction in (FORWARD, TRAIN):
        flops = [work[direction].flops for work in works if work is not None]
        assert exponent([case.size for case in members], flops) == pytest.approx(papers.GROWTH[group], abs=0.02)


def test_every_mechanism_is_measured() -> None:
    measured = {case.group.removesuffix(", causal") for case in mechanisms.cases("full")}
    assert measured == set(list_attentions()) - {"mha", "dtm"}


def test_a_row_has_times_of_all(tmp_path: Any) -> None:
    ours = mechanism("gqa", 16, 4, batch=1, num_tokens=8)
    dense = mechanism("mha", 16, 4, batch=1, num_tokens=8)
    case = Case("g", "s", 8, {"ours": Contender(ours), "dense": Contender(dense), "plain": plain(ours, "reference")})
    seen: list[int] = []
    (row,) = run([case], done=lambda rows: seen.append(len(rows)))
    for name in ("ours", "dense", "plain"):
        assert row["measured"][name][FORWARD]["eager"] > 0
        assert row["measured"][name][TRAIN]["eager"] > 0
    assert seen == [1]


def test_a_failure_is_a_result() -> None:
    ways = {"bad": lambda: ops.use_backend("flash"), "good": lambda: ops.use_backend("torch")}
    build = mechanism("mha", 16, 4, batch=1, num_tokens=8)
    (row,) = run([Case("g", "s", 8, {"ours": Contender(broken), "dense": Contender(build, ways)})])
    assert row["measured"]["ours"] == {"error": "RuntimeError: out of something"}
    assert row["measured"]["dense"][FORWARD]["way"] == "good"
    assert "error" not in row["measured"]["dense"]


def test_what_is_shared_is_measured_once() -> None:
    built = []

    def counted(device: str, dtype: torch.dtype, wrap: Any) -> Task:
        built.append(device)
        return Task(lambda: None)

    cases = [Case("g", f"{i}", i, {"ours": Contender(nothing), "dense": Contender(counted, shared="dense")}) for i in (1, 2)]
    rows = run(cases)
    assert built == ["cpu"]
    assert rows[0]["measured"]["dense"] == rows[1]["measured"]["dense"]


def test_what_is_optional_waits_for_the_budget() -> None:
    cases = [Case("g", f"{i}", i, {"ours": Contender(nothing), "compiled": Contender(nothing, optional=True)}) for i in (1, 2)]
    rows = run(cases, budget=float("inf"))
    assert all(FORWARD in row["measured"]["compiled"] for row in rows)
    rows = run(cases, budget=0.0)
    assert all("left out" in row["measured"]["compiled"]["error"] for row in rows)
    assert all(FORWARD in row["measured"]["ours"] for row in rows)


def test_close_contenders_are_measured_in_turns() -> None:
    (row,) = run(
        [Case("g", "s", 1, {"ours": Contender(nothing), "a": Contender(nothing), "b": Contender(broken)}, "", closely=True)]
    )
    assert row["measured"]["ours"][FORWARD]["turns"] >= 0
    assert row["measured"]["a"][FORWARD]["turns"] >= 0
    assert "error" in row["measured"]["b"]


def test_turns_that_are_not_captured_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("it waits")

    monkeypatch.setattr("attention_zoo.benchmarks.cases.captured", refuse)
    runs = {"ours": lambda: None}
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr("attention_zoo.benchmarks.cases.interleaved_ms", lambda runs, clock: dict.fromkeys(runs, 1.0))
        assert _replayed_in_turns(runs, CLOCK) == ({"ours": 1.0}, "in turns: RuntimeError: it waits")


def test_modules_without_projections_have_gradients_of_what_is_given() -> None:
    """The Mixture-of-Head case: its queries, keys and values are leaves."""
    case = next(case for case in papers.cases("quick") if case.group == "MoH")
    task = case.contenders["ours"].build("cpu", torch.float32, lambda module: module)
    task.forward()
    assert task.train is not None
    task.train()


@pytest.mark.slow
def test_the_plain_code_compiles() -> None:
    build = mechanism("hilo", 32, 4, batch=1, num_tokens=16, grid_size=(4, 4))
    (row,) = run([Case("g", "s", 16, {"ours": Contender(build), "compiled": compiled(build)})])
    assert row["measured"]["compiled"][TRAIN]["eager"] > 0
