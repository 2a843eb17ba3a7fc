"""Errors a user can act on, without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

__all__ = ["stderr", "stdout", "user_errors"]

stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a wrong argument, file or recipe raises into one line on stderr and exit code 2.

    Wrap only the part of a program that reads what the user gave: a failure in the middle of training is worth its traceback.
    `ATTENTION_ZOO_TRACEBACK=1` keeps the traceback everywhere.
    """
    if os.environ.get("ATTENTION_ZOO_TRACEBACK"):
        yield
        return
    try:
        yield
    except ImportError as error:
        missing = f" (no module {error.name!r})" if error.name else ""
        text = f"error: {error}{missing}\nThe programs need the extra `train`: pip install -e '.[train]'"
        stderr.print(text, style="red", markup=False)
        raise typer.Exit(2) from None
    except (ValueError, TypeError, OSError) as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
