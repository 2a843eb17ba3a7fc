"""Looking on at the operations: whoever records attention sees every call, with a function that gives its probabilities.

Nothing is computed for it, and a call costs one look at an empty list, while nobody looks on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

__all__ = ["Call", "Tap", "add_tap", "is_observed", "observe", "remove_tap", "tapped"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Call(NamedTuple):
    """A call of an operation.

    Attributes:
        name: of the operation.
        proceed: runs it and returns what it returns.
        weights: its attention probabilities before any dropout, (B, H, ..., N_q, N_k), on request; the queries numbered `rows`,
            int64, where the operation `takes_rows`, else all. None: it has none.
        queries: what has them in the last dimension but one.
        takes_rows: whether `weights` computes single rows.
    """

    name: str
    proceed: Callable[[], Any]
    weights: Callable[[Tensor | None], Tensor | None]
    queries: Tensor
    takes_rows: bool


Tap = Callable[[Call], Any]  # sees a call, lets it proceed, and returns what it returned

_taps: list[Tap] = []  # the last one added sees a call first; `proceed` leads to the one before


def add_tap(tap: Tap) -> None:
    """From now on `tap` sees every call, in every thread."""
    _taps.append(tap)


def remove_tap(tap: Tap) -> None:
    """End what `add_tap` began."""
    _taps.remove(tap)


def is_observed() -> bool:
    """Whether anybody looks on."""
    return bool(_taps)


def tapped(
    weights: Callable[..., Tensor | None], *, takes_rows: bool = False
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorator of an operation whose first argument is the queries (..., N_q, D).

    Args:
        weights: called with the operation's arguments (and `rows`), it returns the probabilities.
        takes_rows: whether it has the argument `rows`.
    """

    def decorate(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(operation)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            if not _taps:
                return operation(*args, **kwargs)

            def wanted(rows: Tensor | None) -> Tensor | None:
                return weights(*args, **kwargs, rows=rows) if takes_rows else weights(*args, **kwargs)

            queries: Any = args[0] if args else kwargs["q"]
            name = operation.__name__
            return _see(Call(name, functools.partial(operation, *args, **kwargs), wanted, queries, takes_rows))  # type: ignore[no-any-return]

        return call

    return decorate


def observe(name: str, weights: Tensor) -> None:
    """For a mechanism that computes a softmax itself: its probabilities (B, H, ..., N_q, N_k), before any dropout."""
    if _taps:
        _see(Call(name, lambda: None, lambda rows: weights if rows is None else weights[..., rows, :], weights, True))


def _see(call: Call) -> Any:
    """Hand a call to all taps, each inside the one before."""
    proceed = call.proceed
    for tap in _taps:
        proceed = functools.partial(tap, call._replace(proceed=proceed))
    return proceed()
