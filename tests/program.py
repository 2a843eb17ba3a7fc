"""The programs of scripts/, called in the tests' own process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def call(program: str, *arguments: Any) -> Result:
    """Run scripts/PROGRAM.py in this process; errors that it does not handle are raised."""
    spec = importlib.util.spec_from_file_location(f"scripts_{program}", SCRIPTS / f"{program}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
