"""What is read out of rows: times that may be compared, shares, targets, exponents; tables and the pages that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attention_zoo.benchmarks import plots, report
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN

WHERE = {"device": "a device", "torch": "2.0", "date": "2026-01-02T03:04:05+00:00"}
PEAKS = {"flops": 1e12, "bandwidth": 1e11, "source": "invented"}


def row(**changes: Any) -> dict[str, Any]:
    """Ours takes 1 and 6 ms, dense 2 and 4; the device needs at least 0.5 and 1."""
    times = {"ours": (1.0, 6.0), "dense": (2.0, 4.0)}
    return {
        "group": "g",
        "setting": "s",
        "size": 64,
        "baseline": "dense",
        "targets": {FORWARD: 0.6, TRAIN: 1.0},
        "items": 10,
        "facts": {"cache_mib": 1.0, "dense_cache_mib": 4.0},
        "work": {d: {"flops": b * 1e9, "bytes": b * 1e7, "bound_ms": b} for d, b in ((FORWARD, 0.5), (TRAIN, 1.0))},
        "measured": {
            name: {FORWARD: {"eager": 3 * f, "graph": f}, TRAIN: {"eager": 3 * t, "graph": t}, "peak_mib": 10 * f}
            for name, (f, t) in times.items()
        },
        **changes,
    }


def results(suite: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"suite": suite, "where": WHERE, "scale": "full", "peaks": PEAKS, "rows": rows, **more}


def test_shares_and_targets() -> None:
    one = row()
    assert report.ratio(one, FORWARD) == 0.5
    assert report.ratio(one, TRAIN) == 1.5
    assert report.target_of(one, FORWARD) == (0.6, False)
    assert report.roofline_share(one, FORWARD) == 0.5
    assert report.memory_ratio(one) == 0.5


def test_a_target_beyond_the_roofline_gives_way() -> None:
    one = row(targets={FORWARD: 0.2})  # 0.4 ms, where the device needs 0.5
    assert report.target_of(one, FORWARD) == (pytest.approx(0.5 / 2.0 / 0.8), True)
    assert "80 % of the roofline" in report.render(results("papers", [one]))


def test_times_of_one_kind_are_compared() -> None:
    one = row()
    del one["measured"]["dense"][FORWARD]["graph"]
    assert report.milliseconds(one, "ours", FORWARD) == 3.0
    assert report.baseline_ms(one, FORWARD) == 6.0
    assert report.baseline_ms(one, TRAIN) == 4.0


def test_without_a_name_the_fastest_other_is_the_baseline() -> None:
    one = row(baseline="")
    one["measured"]["other"] = {FORWARD: {"eager": 9.0, "graph": 1.5}, TRAIN: {"eager": 90.0, "graph": 50.0}}
    assert report.baseline_ms(one, FORWARD) == 1.5
    assert report.baseline_ms(one, TRAIN) == 4.0


def test_what_was_not_measured_is_none() -> None:
    one = row(measured={"ours": {"error": "no"}, "dense": {}})
    assert report.ratio(one, FORWARD) is None
    assert report.target_of(one, FORWARD) is None
    assert "| s |" in report.render(results("papers", [one]))


def test_exponents() -> None:
    assert report.exponent([2, 4, 8], [3 * n**1.5 for n in (2, 4, 8)]) == pytest.approx(1.5)
    rows = []
    for size in (16, 32, 64):
        one = row(size=size, setting=f"{size}")
        one["measured"] = {"ours": {FORWARD: {"eager": float(size)}}, "dense": {FORWARD: {"eager": float(size**2)}}}
        rows.append(one)
    assert report.fits(rows) == {"g": {FORWARD: pytest.approx(1.0)}}
    assert report.fits(rows, "dense")["g"][FORWARD] == pytest.approx(2.0)
    text = report.render(results("papers", rows, growth={"g": 0.5}))
    assert "1.00 (missed); aimed at: 0.5, at most 0.1 above" in text


def test_the_table_of_papers_judges() -> None:
    text = report.render(results("papers", [row()], claims={"g": "What is claimed."}))
    assert text.startswith("a device, torch 2.0, 2026-01-02; roofline: 1 TFLOP/s, 0.1 TB/s (invented).")
    assert "**g.** What is claimed." in text
    cells = text.splitlines()[-1].split(" | ")
    assert cells[:4] == ["| s", "2.00 \\| 4.00", "1.00 \\| 6.00", "0.50 \\| 1.50"]  # dense, ours, of dense
    assert cells[4:6] == ["0.6 met \\| 1 missed", "50% \\| 17%"]  # aimed at, of the roofline
    assert cells[6:] == ["6.00 \\| 12.00", "3.00 \\| 18.00", "0.50 \\| 1.50", "0.50 |"]  # from Python (dense, ours, share); memory


def test_calls_from_python_have_their_own_share() -> None:
    """Targets are judged by graphs; the interpreter's time shows beside them."""
    one = row(measured={name: {FORWARD: {"eager": e, "graph": g}} for name, e, g in (("ours", 9.0, 1.0), ("dense", 3.0, 2.0))})
    assert report.ratio(one, FORWARD) == 0.5
    assert report.ratio(one, FORWARD, "eager") == 3.0
    text = report.render(results("papers", [one]))
    names, cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[-3::2])
    table = dict(zip(names, cells, strict=True))
    assert table["aimed at"].startswith("0.6 met")
    assert [table[f"from Python: {name}"] for name in ("dense", "ours", "of dense")] == ["3.00", "9.00", "3.00"]


def test_without_graphs_there_is_one_share() -> None:
    one = row(measured={name: {FORWARD: {"eager": ms}} for name, ms in (("ours", 1.0), ("dense", 2.0))})
    assert "from Python" not in report.render(results("papers", [one]))


def test_models_called_from_python_stand_beside_those_of_graphs() -> None:
    one = row(baseline="theirs")
    one["measured"]["theirs"] = {d: {"eager": 6.0, "graph": 3.0} for d in (FORWARD, TRAIN)}
    text = report.render(results("models", [one]))
    cells = [[cell.strip() for cell in line.split("|")] for line in text.replace("\\|", ";").splitlines() if line.startswith("| ")]
    shown = dict(zip(*cells, strict=True))
    assert shown["ours / theirs"] == "3.00 ; 0.50"
    assert shown["from Python: ours / theirs"] == "2.00 ; 0.33"


@pytest.mark.parametrize("suite", ["papers", "mechanisms", "models", "decode", "engines"])
def test_what_was_not_captured_says_why(suite: str) -> None:
    """Under the table, once for each reason, and no line of a table is broken by it."""
    refused = {"eager": 3.0, "not_captured": "RuntimeError: the stream\nis | capturing"}
    rows = [row(setting=name, size=size) for size, name in ((64, "a"), (128, "b"))]
    if suite == "models":
        rows = [one | {"baseline": "theirs", "measured": {"theirs": one["measured"]["dense"], **one["measured"]}} for one in rows]
    assert "captur" not in report.render(results(suite, rows))
    rows[0]["measured"]["ours"][FORWARD] = refused
    rows[1]["measured"]["plain"] = {FORWARD: refused, TRAIN: {"eager": 1.0, "graph": 1.0}}
    text = report.render(results(suite, rows))
    calls = "a (ours, forward); b (plain, forward)"
    assert text.splitlines()[-1] == f"Not captured as a CUDA graph, {calls}: `RuntimeError: the stream is | capturing`"
    assert text.splitlines()[-2] == ""


@pytest.mark.parametrize("suite", ["papers", "mechanisms", "models", "decode", "engines"])
def test_every_suite_has_tables_and_pictures(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kind = "module" if suite == "decode" else "s"
    rows = [row(size=n, setting=f"{kind} {n}", baseline="theirs" if suite == "models" else "dense") for n in (64, 128)]
    for one in rows if suite == "models" else ():
        one["measured"]["theirs"] = one["measured"].pop("dense")
    found = results(suite, rows)
    found["pictures"] = plots.draw(found, tmp_path / "r.json")
    assert found["pictures"]
    for picture in found["pictures"]:
        assert (tmp_path / f"r.json_{picture}.png").stat().st_size > 1000
    text = report.render(found, "results/r")
    assert f"(results/r_{found['pictures'][0]}.png)" in text
    assert "|---|" in text


def test_pages_name_their_files(tmp_path: Path) -> None:
    for name, ms in (("old", 1.0), ("new", 0.25)):
        one = row()
        one["measured"]["ours"][FORWARD]["graph"] = ms
        report.write(results("papers", [one]), tmp_path / "results" / f"{name}.json")
    page = "before\n\n<!-- papers: results/old.json -->\nstale\n<!-- end of papers -->\n\nafter\n"
    fresh = report.put_results(page, tmp_path)
    assert "stale" not in fresh
    assert "0.50 \\| 1.50" in fresh
    assert report.put_results(fresh, tmp_path) == fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("\nafter\n")
    replaced = report.put_results(fresh, tmp_path, {"papers": "results/new.json"})
    assert "<!-- papers: results/new.json -->" in replaced
    assert "0.12 \\| 1.50" in replaced
    with pytest.raises(ValueError, match="no markers <!-- decode"):
        report.put_results(page, tmp_path, {"decode": "results/new.json"})


def test_sections_without_a_run(tmp_path: Path) -> None:
    page = report.put_results("<!-- models: none -->\n<!-- end of models -->\n", tmp_path)
    assert page == "<!-- models: none -->\n\nNo run is kept.\n\n<!-- end of models -->\n"
    assert report.put_results(page, tmp_path) == page


def test_results_without_peaks_have_no_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results("papers", [row(work={})])
    del found["peaks"]
    assert plots.draw(found, tmp_path / "r") == ["ratios"]


def test_rows_of_a_later_run_take_the_place_of_earlier_ones() -> None:
    earlier = results("papers", [row(setting="a"), row(setting="b"), row(group="other", setting="a")])
    new = [row(setting="b", size=3), row(setting="c"), row(setting="d", size=2), row(group="new", setting="e")]
    later = results("papers", new, where={**WHERE, "date": "2026-02-03T03:04:05+00:00"})
    found = report.joined(earlier, later)
    assert [(r["setting"], r["size"], r.get("date", "")[:10]) for r in found["rows"]] == [
        ("d", 2, "2026-02-03"),
        ("a", 64, ""),
        ("b", 3, "2026-02-03"),
        ("c", 64, "2026-02-03"),
        ("a", 64, ""),
        ("e", 64, "2026-02-03"),
    ]
    assert report.render(found).startswith("a device, torch 2.0, 2026-01-02 and 2026-02-03")
    assert len(earlier["rows"]) == 3
    for changes in ({"scale": "small"}, {"where": {**WHERE, "torch": "2.1"}}):
        with pytest.raises(ValueError, match=r"of one (scale|torch)"):
            report.joined(earlier, {**later, **changes})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="holds no results"):
        report.read(path)
