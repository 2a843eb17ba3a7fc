"""The benchmark program: quick runs of each suite, what it says without running, and the page that holds the results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attention_zoo.benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def invoke(program: Any, *arguments: str) -> str:
    done = CliRunner().invoke(program.app, list(arguments))
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def test_several_wildcards_and_a_dtype(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    quick = ("--scale", "quick", "--seconds", "0.001", "--budget", "0", "--dtype", "bfloat16")
    invoke(program, "engines", *quick, "--only", "self*|causal*", "--out", str(out))
    found = json.loads(out.read_text())
    assert {row["group"] for row in found["rows"]} == {"self, D 64", "causal, D 64"}
    assert found["dtype"] == "bfloat16"
    with pytest.raises(AssertionError, match="dtype is auto, float32"):
        invoke(program, "engines", "--dtype", "int8")


@pytest.mark.parametrize(
    ("suite", "only"),
    [
        ("papers", "BRA: dim 64*"),
        ("papers", "CCA, decode*"),
        ("mechanisms", "moh, causal*"),
        ("models", "llama, moh*"),
        ("models", "vit*"),
        ("decode", "cca*"),
        ("engines", "causal*"),
    ],
)
def test_a_quick_run_fills_a_file(program: Any, suite: str, only: str, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ("--scale", "quick", "--seconds", "0.001", "--budget", "0", "--only", only, "--out", str(out))
    output = invoke(program, suite, *arguments)
    results = report.read(out)
    assert results["suite"] == suite
    assert results["scale"] == "quick"
    assert results["peaks"]["flops"] > 0
    for row in results["rows"]:
        assert "error" not in row["measured"]["ours"], row
        assert row["measured"]["ours"]["forward"]["eager"] > 0
        assert report.baseline_ms(row, "forward")
        assert row["work"]["forward"]["bound_ms"] > 0
    assert "|---|" in output


def test_hilo_is_measured_on_the_cpu(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    invoke(program, "papers", "--scale", "quick", "--only", "HiLo, CPU*", "--out", str(out))
    results = report.read(out)
    assert results["rows"] == []
    assert [found["threads"] for found in results["hilo_on_cpu"]] == sorted({1, torch.get_num_threads()})
    assert all(found["layers"]["hilo"]["ms"] > 0 for found in results["hilo_on_cpu"])
    assert "spatial reduction" in report.render(results)


def test_a_dry_run_counts(program: Any) -> None:
    output = invoke(program, "papers", "--dry-run", "--only", "HiLo: dim 768*")
    assert "bound: of an H200" in output
    cells = [cell.strip() for cell in output.splitlines()[-2].split("│")]
    flops, _, bound = (float(cell.split("|")[0]) for cell in cells[4:7])
    assert flops == pytest.approx(2 * 64 * 0.2983, rel=0.01)  # multiply-adds of the table of hilo.md
    assert bound == pytest.approx(flops / 790, rel=0.01)  # of an H200's 790 TFLOP/s, in milliseconds


@pytest.mark.parametrize("suite", ["engines", "mechanisms", "models", "decode"])
def test_every_suite_says_what_it_would_run(program: Any, suite: str) -> None:
    only = {"models": "llama, gqa: 4096*", "mechanisms": "hilo*"}.get(suite, "*")
    scale = ("--scale", "quick") if suite == "engines" else ()
    assert "│ ours" in invoke(program, suite, "--dry-run", "--only", only, *scale)


def test_tables_of_earlier_runs(program: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "results" / "mine.json", tmp_path / "page.md"
    page.write_text("before\n<!-- papers: results/none.json -->\nold\n<!-- end of papers -->\nafter\n", encoding="utf-8")
    invoke(
        program, "papers", "--scale", "quick", "--seconds", "0.001", "--budget", "0", "--only", "BRA: dim 64*", "--out", str(out)
    )
    invoke(program, "table", str(page), str(out))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- papers: results/mine.json -->")
    assert text.endswith("<!-- end of papers -->\nafter\n")
    assert "old" not in text
    assert "dim 64, 8x8" in text
    assert "(results/mine_roofline.png)" in text
    assert (tmp_path / "results" / "mine_roofline.png").exists()
    invoke(program, "table", str(page))
    assert page.read_text(encoding="utf-8") == text


def test_rows_of_a_later_run(program: Any, tmp_path: Path) -> None:
    kept, later = RESULTS / "papers_h200.json", report.read(RESULTS / "papers_h200.json")
    first = later["rows"][0]["setting"]
    later["rows"] = [{**later["rows"][0], "seconds": -1.0}]
    copy = tmp_path / "kept.json"
    copy.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
    report.write(later, tmp_path / "later.json")
    invoke(program, "join", str(copy), str(tmp_path / "later.json"))
    found, before = report.read(copy)["rows"], report.read(kept)["rows"]
    assert [row["setting"] for row in found] == [row["setting"] for row in before]
    assert (found[0]["setting"], found[0]["seconds"]) == (first, -1.0)
    assert found[1:] == before[1:]


def test_the_page_shows_the_results_that_are_kept() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "<!-- papers: results/" in page
    assert report.put_results(page, ROOT / "docs") == page


@pytest.mark.parametrize("path", sorted([*RESULTS.glob("engines_*.json"), *RESULTS.glob("papers_*.json")]), ids=lambda p: p.stem)
def test_results_that_are_kept_can_be_read(path: Path) -> None:
    results = report.read(path)
    assert results["suite"] in path.stem
    assert "|---|" in report.render(results)
    for picture in results.get("pictures", ()):
        assert path.with_name(f"{path.stem}_{picture}.png").exists()


def test_a_share_is_only_compiled(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    quick = ("--scale", "quick", "--only", "GQA*", "--out", str(out))
    assert invoke(program, "decode", *quick, "--share", "0/2") == ""
    assert not out.exists()


@pytest.mark.slow
def test_workers_compile_first(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    output = invoke(program, "decode", "--scale", "quick", "--only", "GQA*", "--workers", "2", "--out", str(out))
    assert "compiled in" in output
    assert report.read(out)["rows"]


def test_a_scale_that_is_none(program: Any) -> None:
    done = CliRunner().invoke(program.app, ["papers", "--scale", "tiny"])
    assert done.exit_code == 2


def test_results_are_plain_json(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    invoke(program, "decode", "--scale", "quick", "--seconds", "0.001", "--only", "GQA*", "--out", str(out))
    assert json.loads(out.read_text(encoding="utf-8"))["dtype"] == "float32"
