"""Benchmarks: how fast the engines are, and what the choice between them costs.

    python scripts/benchmark.py engines --out docs/results/engines.json      # on a GPU, about three minutes
    python scripts/benchmark.py engines --quick                              # anywhere, seconds
    python scripts/benchmark.py papers --out docs/results/papers.json --page docs/performance.md    # a minute and a half

A suite is a command of its own that fills a `Report`; the report knows the device, prints its tables and writes the JSON.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attention_zoo as az
from attention_zoo.attention.flops import forward_flops
from attention_zoo.benchmarks.papers import CONTEXTS, SETTINGS, measure_context, measure_setting, render_table
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.dispatch import select
from attention_zoo.ops.engines import ENGINES, describe

Direction = tuple[str, Callable[[], Any]]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=160)


@app.callback()
def _suites() -> None:
    """Benchmarks of attention_zoo; one command a suite."""


@dataclass
class Report:
    """What a suite measured, with where it was measured."""

    suite: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"suite": self.suite, "where": where(), **self.notes, "rows": self.rows}, indent=1) + "\n")
        console.print(f"wrote {path}")


def where() -> dict[str, Any]:
    """Device and versions."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "backends": {b.name: {"version": b.version, "available": b.available, "reason": b.reason} for b in az.backends()},
    }


@dataclass(frozen=True)
class Workload:
    """One call to time. Sizes as in `attention`; `packed` splits the length into that many sequences."""

    name: str
    batch: int = 4
    heads: int = 16
    kv_heads: int = 16
    num_queries: int = 4096
    num_keys: int = 4096
    head_dim: int = 128
    is_causal: bool = False
    window_size: int | None = None
    packed: int = 0
    backward: bool = True

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            shape = (self.batch, length, heads, self.head_dim)  # as a projection leaves them: heads after tokens
            return torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2)

        return normal(self.heads, self.num_queries), normal(self.kv_heads, self.num_keys), normal(self.kv_heads, self.num_keys)

    def settings(self, device: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"is_causal": self.is_causal, "window_size": self.window_size}
        if self.packed:
            step = self.num_queries // self.packed
            offsets = torch.arange(0, self.num_queries + 1, step, device=device, dtype=torch.int32)
            settings.update(cu_seqlens=offsets, max_seqlen=step)
        return settings

    def flops(self) -> float:
        """Multiply-adds of both products, times two; of the pairs that may attend."""
        length = self.num_queries // self.packed if self.packed else self.num_queries
        keys = self.num_keys // self.packed if self.packed else self.num_keys
        pairs: float = length * keys * max(self.packed, 1)
        if self.window_size is not None:
            pairs = length * min(keys, self.window_size * (1 if self.is_causal else 2) + 1) * max(self.packed, 1)
        elif self.is_causal and length > 1:
            pairs /= 2
        return 4.0 * self.batch * self.heads * pairs * self.head_dim


WORKLOADS = [
    Workload("self, D 64", head_dim=64, heads=32, kv_heads=32),
    Workload("self, D 128"),
    Workload("causal, D 64", head_dim=64, heads=32, kv_heads=32, is_causal=True),
    Workload("causal, D 128", is_causal=True),
    Workload("window 512 causal, D 128", is_causal=True, window_size=512),
    Workload("GQA 16:4 causal, D 128", kv_heads=4, is_causal=True),
    Workload("packed 16 x 1024 causal, D 128", batch=1, num_queries=16384, num_keys=16384, packed=16, is_causal=True),
    Workload("ViT, 197 tokens, D 64", batch=64, heads=12, kv_heads=12, num_queries=197, num_keys=197, head_dim=64),
    Workload("windows of 49 tokens, D 32", batch=2048, heads=4, kv_heads=4, num_queries=49, num_keys=49, head_dim=32),
    Workload("decode 1 of 4096, GQA 32:8, D 128", batch=16, heads=32, kv_heads=8, num_queries=1, is_causal=True, backward=False),
]
QUICK = [
    Workload("self, D 64", 1, 2, 2, 128, 128, 64),
    Workload("causal, D 64", 1, 2, 2, 128, 128, 64, is_causal=True),
    Workload("GQA packed", 1, 4, 2, 128, 128, 32, packed=4),
    Workload("decode", 2, 4, 2, 1, 128, 32, is_causal=True, backward=False),
]


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Median time of a call: by CUDA events with a cold cache on a GPU, by `torch.utils.benchmark` elsewhere."""
    run()
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(run, warmup=int(seconds * 250), rep=int(seconds * 1000), return_mode="median"))
    from torch.utils.benchmark import Timer

    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=seconds).median * 1e3


def interleaved_ms(runs: dict[str, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[str, float]:
    """Medians of calls that are to be compared closely: measured in turns, so that a drift of the clock meets all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(median_ms(run, seconds / rounds))
    return {name: statistics.median(times) for name, times in taken.items()}


def host_microseconds(run: Callable[[], Any], calls: int) -> float:
    """Python time of a call, least of seven rounds; the device is not waited for within a round."""
    for _ in range(calls):
        run()
    best = float("inf")
    for _ in range(7):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    synchronize()
    return best * 1e6


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def directions(workload: Workload, attend: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Iterator[Direction]:
    """("forward", call) and ("forward+backward", call)."""
    yield "forward", lambda: attend(*tensors)
    if workload.backward:
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        with torch.no_grad():
            gradient = torch.randn_like(attend(*tensors))
        yield "forward+backward", lambda: torch.autograd.grad(attend(*leaves), leaves, gradient)


def raw_call(engine: str, workload: Workload, settings: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The library's own function, as its documentation says to call it; None where there is no single one."""
    if engine == "flash4":
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        window = (workload.window_size, 0) if workload.window_size is not None else (None, None)
        shared = {"causal": workload.is_causal, "window_size": window}
        if workload.packed:
            lengths = {"cu_seqlens_q": settings["cu_seqlens"], "cu_seqlens_k": settings["cu_seqlens"]}
            lengths |= {"max_seqlen_q": settings["max_seqlen"], "max_seqlen_k": settings["max_seqlen"]}
            return lambda q, k, v: flash_attn_varlen_func(*(t[0].transpose(0, 1) for t in (q, k, v)), **lengths, **shared)[
                0
            ].transpose(0, 1)[None]
        return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **shared)[0].transpose(1, 2)
    if engine == "torch" and not workload.packed and workload.window_size is None:
        causal = workload.is_causal and workload.num_queries > 1
        gqa = workload.heads != workload.kv_heads
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    return None


@app.command()
def engines(
    out: Path | None = typer.Option(None, help="write the results to this JSON file"),  # noqa: B008
    quick: bool = typer.Option(False, help="tiny sizes and short timings, to try the program"),
    seconds: float = typer.Option(0.1, help="time spent on each measurement"),
    only: str = typer.Option("*", help="workloads whose names match this wildcard"),
) -> None:
    """Every engine on every workload, the automatic choice against the library called directly, and the host time of a call."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    seconds = 0.01 if quick else seconds
    report = Report("engines", notes={"dtype": str(dtype), "explain": {}, "auto": [], "host": []})
    for workload in WORKLOADS if cuda and not quick else QUICK:
        if not fnmatch.fnmatchcase(workload.name, only):
            continue
        tensors, settings = workload.tensors(device, dtype), workload.settings(device)
        explanation = az.explain(*tensors, **settings)
        report.notes["explain"][workload.name] = str(explanation)
        console.rule(workload.name)
        console.print(str(explanation), markup=False, highlight=False)
        report.rows += time_engines(workload, tensors, settings, seconds)
        report.notes["auto"] += time_auto(workload, tensors, settings, explanation.chosen or "reference", seconds)
        report.write(out)  # after each workload: a run that is cut short leaves what it has
    report.notes["host"] = time_host(device, dtype, 200 if quick else 2000)
    show("engines: median milliseconds (TFLOP/s)", report.rows, ("workload", "direction", "engine", "ms", "tflops", "error"))
    show(
        "auto against the library",
        report.notes["auto"],
        ("workload", "direction", "engine", "auto_ms", "raw_ms", "overhead_percent"),
    )
    show("host time of a call", report.notes["host"], ("call", "engine", "auto_us", "engine_us", "choice_us", "raw_us"))
    report.write(out)


@app.command()
def papers(
    out: Path | None = typer.Option(None, help="write the results to this JSON file"),  # noqa: B008
    page: Path | None = typer.Option(None, help="put the table into this page, between its markers"),  # noqa: B008
    quick: bool = typer.Option(False, help="tiny sizes, to try the program"),
    dry_run: bool = typer.Option(False, help="say what would run, with its FLOPs"),
    only: str = typer.Option("*", help="settings whose names match this wildcard"),
) -> None:
    """Mechanisms in settings of their papers against dense attention of the same shape: time, memory, and what was aimed at."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [setting for setting in SETTINGS if fnmatch.fnmatchcase(setting.name, only)]
    if dry_run:
        rows = [{"setting": s.name, "batch": s.batch, **_gigaflops(s)} for s in chosen]
        show("forward of the modules, GFLOP (two for each multiply-add)", rows, ("setting", "batch", "dense", "ours"))
        return
    results: dict[str, Any] = {"suite": "papers", "where": where(), "rows": {}, "contexts": {}}
    for setting in chosen:
        results["rows"][setting.name] = measure_setting(setting, device=device, quick=quick)
        console.print(f"{setting.name}: {results['rows'][setting.name]}", markup=False, highlight=False)
    if device == "cuda" and fnmatch.fnmatchcase("contexts", only) and not quick:
        results["contexts"] = {str(length): measure_context(length, device=device) for length in CONTEXTS}
    console.print(render_table(results["rows"], results["contexts"]), markup=False, highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    if page is not None:
        page.write_text(put_table(page.read_text(), results))


@app.command()
def table(results: Path, page: Path) -> None:
    """Write the table of an earlier run of `papers` into a page."""
    page.write_text(put_table(page.read_text(), json.loads(results.read_text())))


def put_table(text: str, results: dict[str, Any]) -> str:
    """The page with the table of these results between its markers. Raises ValueError when it has none."""
    begin, end = "<!-- papers -->", "<!-- end of papers -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no markers {begin} and {end}")
    where_it_ran = f"{results['where']['device']}, torch {results['where']['torch']}, {results['where']['date'][:10]}."
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{before}\n\n{where_it_ran}\n\n{render_table(results['rows'], results['contexts'])}\n\n{after}"


def _gigaflops(setting: Any) -> dict[str, float]:
    """Of one forward of dense and of the mechanism."""
    tokens = setting.grid[0] * setting.grid[1]
    found = {}
    for name, mechanism, options in (("dense", "mha", {}), ("ours", setting.mechanism, setting.options)):
        with torch.device("meta"):
            module = az.create_attention(mechanism, setting.dim, setting.num_heads, **options)
        flops = forward_flops(module, tokens, grid_size=setting.grid)
        found[name] = setting.batch * (flops or float("nan")) / 1e9
    return found


def time_engines(workload: Workload, tensors: tuple[Tensor, ...], settings: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    leaves = (t.detach().requires_grad_(workload.backward) for t in tensors)
    rows = []
    for report in az.explain(*leaves, **settings):
        if not report.serves or (tensors[0].is_cuda and report.name == "reference"):
            continue  # on a GPU the reference forms the map: minutes and tens of gigabytes, and no news
        attend = partial(az.ops.attention, backend=report.name, **settings)
        for direction, run in directions(workload, attend, tensors):
            row: dict[str, Any] = {"workload": workload.name, "direction": direction, "engine": report.name}
            try:
                ms = median_ms(run, seconds)
                row |= {"ms": ms, "tflops": workload.flops() * (1.0 if direction == "forward" else 3.5) / ms / 1e9}
            except Exception as error:  # one engine's failure is a result, not the end of the others'
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
    return rows


def time_auto(
    workload: Workload, tensors: tuple[Tensor, ...], settings: dict[str, Any], chosen: str, seconds: float
) -> list[dict[str, Any]]:
    raw = raw_call(chosen, workload, settings)
    if raw is None:
        return []
    rows = []
    calls: dict[str, Callable[..., Any]] = {"auto": partial(az.ops.attention, **settings), "raw": raw}
    timed = {kind: dict(directions(workload, call, tensors)) for kind, call in calls.items()}
    for direction in timed["auto"]:
        ms = interleaved_ms({kind: runs[direction] for kind, runs in timed.items()}, 5 * seconds)
        rows.append(
            {
                "workload": workload.name,
                "direction": direction,
                "engine": chosen,
                "auto_ms": ms["auto"],
                "raw_ms": ms["raw"],
                "overhead_percent": 100 * (ms["auto"] / ms["raw"] - 1),
            }
        )
    return rows


def time_host(device: str, dtype: torch.dtype, calls: int) -> list[dict[str, Any]]:
    """Microseconds of Python of tiny calls, for which the device is never what is waited for."""
    tiny = {"plain": Workload("tiny", 1, 4, 4, 64, 64, 64), "causal": Workload("tiny", 1, 4, 4, 64, 64, 64, is_causal=True)}
    return [{"call": name, **host_row(workload, device, dtype, calls)} for name, workload in tiny.items()]


def host_row(workload: Workload, device: str, dtype: torch.dtype, calls: int) -> dict[str, Any]:
    """Of `attention`, of the chosen engine alone, of the choice alone, and of the library's own function."""
    (q, k, v), settings = workload.tensors(device, dtype), workload.settings(device)
    chosen = az.explain(q, k, v, **settings).chosen or "reference"
    engine, problem, raw = ENGINES[chosen], make_problem(q, k, v, **settings), raw_call(chosen, workload, settings)

    def choose() -> None:
        select(describe(q, k, v, make_problem(q, k, v, **settings)), "auto")

    row: dict[str, Any] = {
        "engine": chosen,
        "auto_us": host_microseconds(lambda: az.ops.attention(q, k, v, **settings), calls),
        "engine_us": host_microseconds(lambda: engine.run(q, k, v, problem), calls),
        "choice_us": host_microseconds(choose, calls),
    }
    if raw is not None:
        row["raw_us"] = host_microseconds(lambda: raw(q, k, v), calls)
    return row


def show(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{x:.3f}" if isinstance(x := row.get(column), float) else str(x or "") for column in columns))
    console.print(table)


if __name__ == "__main__":
    app()
