"""Marks of parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any] | int, values: Iterable[Any]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`: all but `quick` (which of them, or how many of the first) are slow."""
    found = []
    for number, value in enumerate(values):
        is_quick = number < quick if isinstance(quick, int) else value in quick
        arguments = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*arguments, marks=() if is_quick else pytest.mark.slow))
    return found
