"""What all suites are made of: a case is one setting, which several contenders compute; every case is measured in one run.

A suite is a list of cases. `measure` fills one row of the results for each: times of the forward, and of the forward and backward,
and the memory of the latter, of every contender.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_zoo import ops
from attention_zoo.attention.auxiliary import AuxiliaryLossModule, auxiliary_loss
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN, Peaks, Work
from attention_zoo.benchmarks.timing import Clock, captured, estimate_ms, interleaved_ms, peak_mib, synchronize, time_call
from attention_zoo.registry import create_attention

__all__ = [
    "Case",
    "Contender",
    "Task",
    "compiled",
    "dense_ways",
    "freshly_compiled",
    "measure",
    "measure_case",
    "mechanism",
    "module_task",
    "normal",
    "operation_task",
    "plain",
    "unique",
    "warm_up",
]

Row = dict[str, Any]
Context = Callable[[], AbstractContextManager[Any]]
_FAR = 1.5  # a way that takes so much longer than another at first sight is not measured
Wrap = Callable[[Any], Any]  # what is done to a module or function before it is timed: nothing, or torch.compile


@dataclass(frozen=True)
class Task:
    """Calls to time: `forward`, and `train`, forward and backward, where something learns. `capturable`: as a CUDA graph."""

    forward: Callable[[], Any]
    train: Callable[[], Any] | None = None
    capturable: bool = True

    def directions(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield FORWARD, self.forward
        if self.train is not None:
            yield TRAIN, self.train


Build = Callable[[str, torch.dtype, Wrap], Task]


@dataclass(frozen=True)
class Contender:
    """One way of computing a case.

    Attributes:
        build: (device, dtype, wrap) -> its task, of the wrapped module or function.
        ways: contexts in which it is built and run, by a name; of several the fastest counts, for each direction by itself.
        wrap: applied to its module or function.
        shared: contenders of the same `shared` name are measured once in a run.
        optional: left out once the time of the suite is spent (`torch.compile` takes most of it).
    """

    build: Build
    ways: Mapping[str, Context] = field(default_factory=lambda: {"": nullcontext})
    wrap: Wrap = lambda computation: computation
    shared: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        group: what it is a setting of: one section of a table, or one curve.
        setting: its name, unique in the suite together with `group`.
        size: what grows along a curve: tokens, in most suites.
        contenders: by their names; "ours" is what is judged.
        baseline: the contender that the times of "ours" are divided by; "": the fastest of the others, for each direction.
        targets: direction -> the largest share of the baseline's time that is aimed at.
        work: what "ours" computes and moves at least, by direction; called when it is asked for, since it takes time to count.
        items: what one call handles: images, or tokens; 0 where no rate is of interest.
        facts: what else is known of it without measuring, as the bytes of a cache.
        closely: the contenders are measured in turns, to compare them to a percent.
    """

    group: str
    setting: str
    size: int
    contenders: Mapping[str, Contender]
    baseline: str = "dense"
    targets: Mapping[str, float] = field(default_factory=dict)
    work: Callable[[], Mapping[str, Work] | None] = lambda: None
    items: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    closely: bool = False

    @property
    def name(self) -> str:
        return f"{self.group}: {self.setting}"


def measure(
    cases: Sequence[Case],
    *,
    device: str,
    dtype: torch.dtype,
    clock: Clock,
    peaks: Peaks,
    budget: float = float("inf"),
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for each case. Optional contenders come last, as many as the budget of seconds allows, the largest cases first.

    Args:
        done: called with the rows so far after each case: a run that is cut short leaves what it has.
    """
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # what is imported need not be searched again each time that memory is given back
    rows: list[Row] = []
    shared: dict[str, Row] = {}
    for case in cases:
        rows.append(measure_case(case, device=device, dtype=dtype, clock=clock, peaks=peaks, shared=shared))
        done(rows)
    for name, contender, row in _optional(cases, rows):
        if time.perf_counter() - start > budget:
            row["measured"][name] = {"error": "left out: the time of the suite was spent"}
            continue
        row["measured"][name] = _measure_contender(contender, device, dtype, clock)
        done(rows)
    gc.unfreeze()
    return rows


def warm_up(cases: Sequence[Case], *, device: str, dtype: torch.dtype, optional: bool = True) -> None:
    """Run what is no baseline once, so that kernels are compiled and kept on disk; what fails will say so when it is measured."""
    for late in (False, True) if optional else (False,):
        for case in cases:
            for name, contender in case.contenders.items():
                if contender.optional != late or name == case.baseline:
                    continue
                for context in list(contender.ways.values())[:1]:  # the others are libraries, compiled already
                    try:
                        with context():
                            task = contender.build(device, dtype, contender.wrap)
                            for _, run in task.directions():
                                run()
                        synchronize()
                    except Exception:
                        continue
                    finally:
                        task = None  # type: ignore[assignment]
                        _release()


def measure_case(
    case: Case, *, device: str, dtype: torch.dtype, clock: Clock, peaks: Peaks, shared: dict[str, Row] | None = None
) -> Row:
    """The row of a case: what it is, what it must cost, and what each contender that is not optional took.

    Args:
        shared: results of the run so far by the contenders' `shared`; added to.
    """
    shared = {} if shared is None else shared
    start = time.perf_counter()
    work = case.work() or {}
    row: Row = {
        "group": case.group,
        "setting": case.setting,
        "size": case.size,
        "baseline": case.baseline,
        "targets": dict(case.targets),
        "items": case.items,
        "facts": dict(case.facts),
        "work": {d: {"flops": w.flops, "bytes": w.bytes, "bound_ms": w.bound_ms(peaks)} for d, w in work.items()},
    }
    needed = {name: contender for name, contender in case.contenders.items() if not contender.optional}
    if case.closely:
        row["measured"] = _measure_in_turns(needed, device, dtype, clock)
    else:
        row["measured"] = {}
        for name, contender in needed.items():
            found = shared.get(contender.shared) or _measure_contender(contender, device, dtype, clock)
            row["measured"][name] = found
            if contender.shared:
                shared[contender.shared] = found
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _optional(cases: Sequence[Case], rows: list[Row]) -> list[tuple[str, Contender, Row]]:
    """What is not measured yet: plain code before compiled code, and of each the largest case of a group before the others."""
    largest = {case.group: max(c.size for c in cases if c.group == case.group) for case in cases}
    found = [
        (contender.wrap is freshly_compiled, case.size != largest[case.group], name, contender, row)
        for case, row in zip(cases, rows, strict=True)
        for name, contender in case.contenders.items()
        if contender.optional
    ]
    return [(name, contender, row) for *_, name, contender, row in sorted(found, key=lambda item: item[:2])]


def _measure_contender(contender: Contender, device: str, dtype: torch.dtype, clock: Clock) -> Row:
    """{direction: {"eager", "graph" (ms), "way"}, "peak_mib", "error"}: a contender that fails is a result, not the end."""
    found: Row = {}
    errors = []
    for way, context in contender.ways.items():
        task = None
        try:
            with context():
                task = contender.build(device, dtype, contender.wrap)
                for direction, run in task.directions():
                    if direction in found and estimate_ms(run) > _FAR * found[direction]["eager"]:
                        continue
                    times: Row = time_call(run, clock, capturable=task.capturable)
                    if direction not in found or _ms(times) < _ms(found[direction]):
                        found[direction] = times | ({"way": way} if way else {})
                memory = peak_mib(task.train or task.forward)
                if memory is not None:
                    found["peak_mib"] = min(memory, found.get("peak_mib", memory))
        except Exception as error:
            errors.append(_say(error))
        _release()
    if len(errors) == len(contender.ways):
        found["error"] = "; ".join(errors)
    return found


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _measure_in_turns(contenders: Mapping[str, Contender], device: str, dtype: torch.dtype, clock: Clock) -> dict[str, Row]:
    """As `_measure_contender`, of all at the same time, in turns; from Python one call after the other."""
    found: dict[str, Row] = {name: {} for name in contenders}
    tasks = {}
    for name, contender in contenders.items():
        try:
            tasks[name] = contender.build(device, dtype, contender.wrap)
            for direction, run in tasks[name].directions():
                found[name][direction] = time_call(run, Clock(clock.seconds / 4, clock.least, clock.most))
            if (memory := peak_mib(tasks[name].train or tasks[name].forward)) is not None:
                found[name]["peak_mib"] = memory
        except Exception as error:
            found[name]["error"] = _say(error)
            tasks.pop(name, None)
    for direction in (FORWARD, TRAIN):
        measured = {name: found[name][direction] for name in tasks if direction in found[name]}
        best = sorted(measured, key=lambda name: _ms(measured[name]))
        near = {n: dict(tasks[n].directions())[direction] for n in best if n == "ours" or n in best[:2]}
        turns, reason = _replayed_in_turns(near, clock)
        for name, ms in turns.items():
            found[name][direction]["turns"] = round(ms, 5)
            if reason:
                found[name][direction].setdefault("not_captured", reason)
    _release()
    return found


def _replayed_in_turns(runs: Mapping[str, Callable[[], Any]], clock: Clock) -> tuple[dict[str, float], str]:
    """Milliseconds, and on CUDA the reason why they are those of calls from Python; "" where they are not."""
    reason = ""
    if torch.cuda.is_available():
        try:
            return interleaved_ms({name: captured(run) for name, run in runs.items()}, clock), reason
        except Exception as error:  # one of them cannot be captured: all of them from Python
            reason = f"in turns: {_say(error)}"
    return interleaved_ms(runs, clock), reason


def _ms(times: Row) -> float:
    """The time that counts: of the graph, where there is one."""
    return float(times["graph"] if "graph" in times else times["eager"])


def _release() -> None:
    """The GPU's memory of what has been measured, before the next needs it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def normal(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of a normal distribution, the same in every run on a device."""
    return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(seed))


def module_task(module: nn.Module, x: Tensor, wrap: Wrap, **inputs: Any) -> Task:
    """A module's forward in evaluation mode without gradients, and forward and backward in training mode, to input and weights.

    Auxiliary losses have their gradients too, with the weight of Mixture-of-Head's paper.
    """
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = tuple(t for t in (x, *module.parameters()) if t.requires_grad)
    has_losses = any(isinstance(part, AuxiliaryLossModule) for part in module.modules())
    call = wrap(module)

    def forward() -> None:
        if module.training:  # to set the mode takes the host longer than some layers
            module.eval()
        with torch.no_grad():
            call(x, **inputs)

    with torch.no_grad():
        gradient = torch.randn_like(module.eval()(x, **inputs))
    loss_weight = torch.full((), 0.01, device=x.device)

    def train() -> None:
        if not module.training:
            module.train()
        ends, gradients = [call(x, **inputs)], [gradient]
        if has_losses:
            ends.append(auxiliary_loss(module))
            gradients.append(loss_weight)
        torch.autograd.grad(ends, leaves, gradients, allow_unused=True)

    return Task(forward, train)


def operation_task(function: Callable[..., Tensor], wrap: Wrap, *tensors: Tensor, learns: bool = True) -> Task:
    """A function of tensors, and its gradients with respect to all of them."""
    call = wrap(function)

    def forward() -> None:
        with torch.no_grad():
            call(*tensors)

    if not learns:
        return Task(forward)
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    with torch.no_grad():
        gradient = torch.randn_like(function(*tensors))

    def train() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient)

    return Task(forward, train)


def mechanism(
    name: str,
    dim: int,
    num_heads: int,
    *,
    batch: int,
    num_tokens: int,
    grid_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Build:
    """What builds the task of a registered mechanism, with its projections; `grid_size` goes to those that are spatial."""

    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        module = create_attention(name, dim, num_heads, device=device, dtype=dtype, **dict(options or {}))
        inputs = {"grid_size": grid_size} if module.attention_info.spatial else {}
        return module_task(module, normal(batch, num_tokens, dim, device=device, dtype=dtype), wrap, **inputs)

    return build


def dense_ways() -> dict[str, Context]:
    """Engines among which the fastest dense attention is: what "auto" takes, and on CUDA torch's flash kernel."""
    ways: dict[str, Context] = {"auto": nullcontext}
    if torch.cuda.is_available():
        ways["flash"] = _torch_flash
    return ways


class _torch_flash(AbstractContextManager[None]):
    """torch's flash kernel, whatever else is installed."""

    def __enter__(self) -> None:
        self.contexts = (ops.use_backend("torch"), sdpa_kernel([SDPBackend.FLASH_ATTENTION]))
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*exception)


def plain(build: Build, backend: str = "torch", *, optional: bool = False) -> Contender:
    """The same without our kernels: the plain code that specifies them, around this engine's attention."""
    return Contender(build, {backend: partial(ops.use_backend, backend)}, optional=optional)


def compiled(build: Build, backend: str = "torch") -> Contender:
    """The plain code under `torch.compile`."""
    return Contender(build, {backend: partial(ops.use_backend, backend)}, wrap=freshly_compiled, optional=True)


def freshly_compiled(computation: Any) -> Any:
    """`torch.compile`, with nothing remembered of what was compiled before: another context may compute otherwise."""
    torch._dynamo.reset()
    return torch.compile(computation)


def unique(cases: Iterable[Case]) -> list[Case]:
    """The first of each name: small sizes make some settings the same."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.name, case)
    return list(found.values())
