"""Modules of kernels, imported when they are first called."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Lazy"]


class Lazy:
    """A module that is imported when it is first asked for something: one of kernels, which needs Triton.

    An `import` in a function takes the host some microseconds each time.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found
