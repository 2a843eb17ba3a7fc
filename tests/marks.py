"""Marks of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
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


def covering(values: Sequence[tuple[Any, ...]], together: int = 1) -> list[tuple[Any, ...]]:
    """Some of `values` among which is, in every place, whatever is there in any of them; in every two places with `together=2`."""

    def seen(value: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(value), together))

    chosen: list[tuple[Any, ...]] = []
    missing = set().union(*map(seen, values))
    while missing:
        chosen.append(max(values, key=lambda value: len(seen(value) & missing)))
        missing -= seen(chosen[-1])
    return chosen
