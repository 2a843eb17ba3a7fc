"""Do something once another package is imported, without importing it.

transformers takes longer to import than the rest of the package, and who builds vision models does not need it. What the zoo adds
to its registries is added when it is there: at once if it is imported already, else right after its import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]


def when_imported(module: str, action: Callable[[], Any]) -> None:
    """Call `action` as soon as `module` has been imported; now, if it has been."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(module, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Stands first among the finders until the module is looked for, then goes away."""

    def __init__(self, module: str, action: Callable[[], Any]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # by the finders that are left
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and the action after it."""

    def __init__(self, loader: Any, action: Callable[[], Any]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # what others read from it is the loader's own
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()
