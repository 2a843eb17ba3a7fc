"""scripts/test_gpu.sh, with programs in the place of a GPU's Python and of compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Fails one file, finds no tests in another.
SANITIZER = """#!/bin/bash
case "$*" in
*"registration tests/ops/test_triton_merge.py") echo "========= ERROR SUMMARY: 3 errors"; exit $((77 * BROKEN)) ;;
*"registration tests/ops/test_triton_halo.py") exit 5 ;;
*) echo "2 passed"; echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_gpu.sh"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("broken", [0, 1])
def test_memory_errors_fail(tmp_path: Path, broken: int) -> None:
    python, sanitizer = program(tmp_path / "python", "#!/bin/bash\nexit 0\n"), program(tmp_path / "sanitizer", SANITIZER)
    done = run("memory", "2", PYTHON=python, COMPUTE_SANITIZER=sanitizer, BROKEN=str(broken))
    lines = done.stdout.splitlines()
    assert done.returncode == broken
    assert "tests/ops/test_triton_halo.py: no test of this kind" in lines
    assert (
        "tests/ops/test_triton_halo.py: 2 passed ========= ERROR SUMMARY: 0 errors" in lines
    )  # its layers, which are no operators
    assert "tests/ops/test_triton_merge.py:  ========= ERROR SUMMARY: 3 errors" in lines
    files = {path.name for path in (ROOT / "tests" / "ops").glob("test_triton*.py")}
    assert {line.split(":")[0].rsplit("/")[-1] for line in lines if line.startswith("tests/")} == files


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    without = run(PYTHON=sys.executable)
    assert (without.returncode, "finds a GPU" in without.stderr) == (2, True)
    other = run("all of it")
    assert (other.returncode, "tests, memory or all; got 'all of it'" in other.stderr) == (2, True)
    python = program(tmp_path / "python", "#!/bin/bash\nexit 0\n")
    nowhere = run("memory", PYTHON=python, COMPUTE_SANITIZER=str(tmp_path / "nothing"))
    assert (nowhere.returncode, "no compute-sanitizer at" in nowhere.stderr) == (2, True)
