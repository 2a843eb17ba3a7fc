"""The suite of the papers' settings: its program, its table, and the page that holds it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_a_quick_run_fills_file_and_page(program: Any, tmp_path: Path) -> None:
    out, page = tmp_path / "papers.json", tmp_path / "page.md"
    page.write_text("before\n<!-- papers -->\nold\n<!-- end of papers -->\nafter\n")
    done = CliRunner().invoke(program.app, ["papers", "--quick", "--only", "BRA 64*", "--out", str(out), "--page", str(page)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())["rows"].values()
    assert min(row["dense"]["eager"] + row["ours"]["eager"]) > 0
    text = page.read_text()
    assert text.startswith("before\n<!-- papers -->")
    assert text.endswith("<!-- end of papers -->\nafter\n")
    assert "old" not in text
    assert "BRA 64, 208x336, top 1" in text


def test_a_dry_run_counts(program: Any) -> None:
    done = CliRunner().invoke(program.app, ["papers", "--dry-run", "--only", "HiLo 768*"])
    assert done.exit_code == 0, done.output
    dense, ours = (float(cell) for cell in done.output.splitlines()[-2].split("│")[3:5])
    assert dense == pytest.approx(2 * 64 * 0.52143, rel=0.01)  # multiply-adds of the table of hilo.md
    assert ours == pytest.approx(2 * 64 * 0.2983, rel=0.01)


def test_the_page_shows_the_results_that_are_kept(program: Any) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert program.put_table(page, json.loads((ROOT / "docs" / "results" / "papers_h100.json").read_text())) == page


def test_a_page_without_markers(program: Any) -> None:
    with pytest.raises(ValueError, match="no markers"):
        program.put_table("nothing", {})
