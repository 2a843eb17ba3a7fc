"""Which engine serves a call: the choice, forcing it, and the tables that explain it.

A call is reduced to its `Signature`; each signature is decided once. While torch.compile traces, the decision is traced with it
(its comparisons become guards) and leaves nothing in the graph.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem, make_problem
from attention_zoo.ops.engines import ENGINES, Engine, Signature, describe
from attention_zoo.ops.engines.base import compute_capability

__all__ = [
    "BACKENDS",
    "BackendError",
    "BackendInfo",
    "Backends",
    "EngineReport",
    "Explanation",
    "backends",
    "explain",
    "follow_autocast",
    "select",
    "use_backend",
    "wanted_backend",
]

ENVIRONMENT_VARIABLE = "ATTENTION_ZOO_BACKEND"
_GROUPS: dict[str, tuple[str, ...]] = {**{name: (name,) for name in ENGINES}, "flash": ("flash4", "flash3", "flash2")}
BACKENDS = ("auto", *sorted(_GROUPS))  # everything that `backend=` takes
_MOST_DECISIONS = 4096

# The backend that `use_backend` forces: per thread and task where Python runs, and once more as a plain list where dynamo traces,
# because it cannot read a ContextVar in every torch that we support, while it recompiles when a list that it has read changes.
_forced: ContextVar[str | None] = ContextVar("attention_zoo_backend", default=None)
_forced_in_graphs: list[str] = []
_decisions: dict[tuple[Signature, str], Engine] = {}


class BackendError(ValueError, RuntimeError):
    """A named backend cannot serve a call. The message lists the reason of every engine; `explanation` is the same as data."""

    def __init__(self, message: str, explanation: Explanation) -> None:
        super().__init__(message)
        self.explanation = explanation


def select(signature: Signature, backend: str) -> Engine:
    """The engine that serves calls of this class.

    Raises:
        BackendError: the backend named in the call, by `use_backend` or by the environment cannot serve it.
        ValueError: no backend has this name.
    """
    name = wanted_backend(backend)
    if torch.compiler.is_compiling():
        return _decide(signature, name)
    engine = _decisions.get((signature, name))
    if engine is None:
        engine = _decide(signature, name)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[(signature, name)] = engine
    return engine


def _decide(signature: Signature, name: str) -> Engine:
    for candidate in _candidates(signature, name):
        engine = ENGINES[candidate]
        if engine.can_run(signature) is None and _unavailable(candidate) is None:
            return engine
    explanation = _explanation(signature, name)
    raise BackendError(f"backend {name!r} cannot serve this call\n{explanation}", explanation)


def _candidates(signature: Signature, name: str) -> tuple[str, ...]:
    if name == "auto":
        return _preference(signature)
    if name not in _GROUPS:
        nearest = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.0)
        raise ValueError(f"no backend is named {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(BACKENDS)}")
    return _GROUPS[name]


def _preference(s: Signature) -> tuple[str, ...]:
    """Engines from the fastest to the slowest for this class of calls, by what was measured on Hopper (docs/engines.md)."""
    if s.empty:
        return ("reference",)
    if s.device.type != "cuda":
        return ("torch", "reference")
    if s.packed:  # a block mask has to be made for flex, and the whole map for torch
        return ("flash4", "flash3", "flash2", "xformers", "flex", "torch", "reference")
    ours = ("triton",) if _is_ours(s) else ()
    if _torch_is_fused(s):
        # torch's flash kernel is flash-attn 2; from Hopper on cuDNN is faster than it, for few keys than all others. Few queries
        # leave most of a GPU idle where keys are not split between programs, as torch does
        few = s.few_keys or s.few_queries
        return (*ours, "torch", "reference") if few else (*ours, "flash4", "flash3", "torch", "reference")
    flex = ("flex",) if s.large else ()
    return (*ours, "flash4", "flash3", "flash2", "xformers", *flex, "torch", "reference")


def _is_ours(s: Signature) -> bool:
    """Whether our kernel of few queries, or that of few tokens, is ahead of all others.

    On the device it nearly always is. But from Python torch's kernels are called in less time than ours, so that a call has to be
    larger than that; unless torch has no kernel for it, or cuDNN, which makes a plan for every new number of keys.
    """
    if s.few_queries:
        wide, causal = s.head_dim != s.value_dim, s.right and s.lengths == "few"
        return wide or (s.half and not s.watched and (s.heavy or causal))
    if not s.short or not s.half or s.watched:
        return False
    dim = max(s.head_dim, s.value_dim)
    if s.short * dim > 64 * 128 and compute_capability(s.device) != 90:  # other GPUs may not have the room
        return False
    if s.short == 64:
        return s.many or not s.grad
    return s.many and dim <= (128 if s.grad else 32)


def _torch_is_fused(s: Signature) -> bool:
    """Whether SDPA serves an unpacked call on CUDA with a kernel that neither forms the map nor a mask of its own."""
    if s.lse or s.softcap or s.windowed or s.dtype == torch.float64:
        return False
    if s.right and s.lengths != "equal" and not s.mapped:
        return False
    if s.grouped:
        if not s.half or s.mapped or s.head_dim > 256 or compute_capability(s.device) < 80:
            return False
        return s.head_dim == s.value_dim or _cudnn_takes_values(s)
    return True


def _cudnn_takes_values(s: Signature) -> bool:
    """Whether cuDNN serves shared heads with values of another width than the keys; nothing else of SDPA does. Tried on Hopper."""
    aligned = s.head_dim % 8 == 0 and s.value_dim % 8 == 0 and s.value_dim <= 256
    exact = torch.are_deterministic_algorithms_enabled()  # what cuDNN's backward is not
    return compute_capability(s.device) == 90 and aligned and s.lengths != "one" and not exact


@torch.compiler.assume_constant_result
def _unavailable(name: str) -> str | None:
    return ENGINES[name].status().reason


def wanted_backend(backend: str) -> str:
    """The backend of a call that names `backend`: that one, or for "auto" what `use_backend` or the environment say."""
    return backend if backend != "auto" else _wanted()


def _wanted() -> str:
    """The backend of the innermost `use_backend`, else of the environment, else "auto"."""
    if torch.compiler.is_compiling():
        return _forced_in_graphs[-1] if _forced_in_graphs else _environment()
    forced = _forced.get()
    if forced is None and _forced_in_graphs and torch._C._current_graph_task_id() != -1:
        forced = _forced_in_graphs[-1]  # autograd has threads of its own for a GPU, where checkpoints compute a forward again
    return forced or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


@torch.compiler.assume_constant_result
def _environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


class use_backend:
    """Context manager: calls of `attention` within it that name no backend run on this one.

    Holds for the current thread or task; compiled code, and what a backward pass on a GPU computes again, follow the context
    entered last in the process.

    Raises:
        ValueError: no backend has this name.
    """

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in _GROUPS:
            _candidates(_ANY, name)  # raises
        self.name = name
        self._token: Token[str | None] | None = None

    def __enter__(self) -> use_backend:
        _forced_in_graphs.append(self.name)
        if not torch.compiler.is_compiling():
            self._token = _forced.set(self.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _forced_in_graphs.remove(self.name)
        if self._token is not None:
            _forced.reset(self._token)
            self._token = None


_ANY: Any = None  # a signature for looking up names, which does not depend on it


@dataclass(frozen=True)
class BackendInfo:
    """One engine as installed here. `reason` says why it is not available, None when it is."""

    name: str
    available: bool
    version: str
    reason: str | None


class Backends(tuple[BackendInfo, ...]):
    """The engines as data, in the order of preference; printed, a table."""

    def __str__(self) -> str:
        rows = [(b.name, "yes" if b.available else "no", b.version or "-", b.reason or "") for b in self]
        return _table(("backend", "available", "version", "reason"), rows)

    __repr__ = __str__


def backends() -> Backends:
    """Which engines are installed and work here, with their versions. Imports each of them once."""
    found = []
    for name, engine in ENGINES.items():
        version, reason = engine.status()
        found.append(BackendInfo(name, reason is None, version, reason))
    return Backends(found)


@dataclass(frozen=True)
class EngineReport:
    """What one engine says to one call. `reason` is None when it would serve the call."""

    name: str
    serves: bool
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a call goes where it goes.

    Attributes:
        chosen: engine that would run, None when the wanted backend cannot serve the call.
        backend: what was asked for ("auto", or a name).
        reports: one per engine, in the order of preference for this call.
    """

    chosen: str | None
    backend: str
    reports: tuple[EngineReport, ...]

    def __iter__(self) -> Iterator[EngineReport]:
        return iter(self.reports)

    def __str__(self) -> str:
        rows = [("->" if r.name == self.chosen else "", r.name, "yes" if r.serves else "no", r.reason or "") for r in self.reports]
        return _table(("", "engine", "serves", "reason"), rows)


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **call: Any) -> Explanation:
    """Which engine `attention(q, k, v, ...)` would run on, and what each engine says to the call, without running it.

    Takes the arguments of `attention`. Raises TypeError and ValueError for the same arguments that it does, but no BackendError.
    """
    q, k, v = follow_autocast(q, k, v)
    problem: Problem = make_problem(q, k, v, **call)
    return _explanation(describe(q, k, v, problem), wanted_backend(backend))


def _explanation(signature: Signature, name: str) -> Explanation:
    reports = {}
    for engine_name, engine in ENGINES.items():
        reason = _unavailable(engine_name) or engine.can_run(signature)
        reports[engine_name] = EngineReport(engine_name, reason is None, reason)
    order = list(dict.fromkeys([*_preference(signature), *ENGINES]))
    chosen = next((c for c in _candidates(signature, name) if reports[c].serves), None)
    return Explanation(chosen, name, tuple(reports[n] for n in order))


def follow_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to torch's SDPA: all three in its dtype, unless they are float64."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows))
