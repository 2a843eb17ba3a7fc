"""Benchmarks: how fast mechanisms, models and engines are, each row against its baseline in the same run.

    python scripts/benchmark.py papers --out docs/results/papers_h200.json    # on a GPU, two minutes
    python scripts/benchmark.py mechanisms --dry-run    # what would run: FLOPs, bytes, the roofline's bound
    python scripts/benchmark.py decode                  # without a GPU: float32, small sizes
    python scripts/benchmark.py table docs/performance.md docs/results/papers_h200.json    # tables and pictures of earlier runs
    python scripts/benchmark.py join docs/results/papers_h200.json new.json    # rows of `--only` in place of earlier ones

Suites: `engines` (plain attention), `mechanisms` (each one over lengths), `models` (against timm's and Hugging Face's), `papers`
(their settings and claims), `decode` (one token against a long context). The code stands in `attention_zoo.benchmarks`.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import attention_zoo as az
from attention_zoo.benchmarks import decode, engines, mechanisms, models, papers, report
from attention_zoo.benchmarks.cases import Case, measure, warm_up
from attention_zoo.benchmarks.roofline import KNOWN, device_peaks
from attention_zoo.benchmarks.timing import Clock

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=200)

# Suite -> its cases, by scale, device and dtype; and what else its results hold.
SUITES: dict[str, Callable[[str, str, torch.dtype], list[Case]]] = {
    "engines": engines.cases,
    "mechanisms": lambda scale, device, dtype: mechanisms.cases(scale),
    "models": lambda scale, device, dtype: models.cases(scale, az.create_model),
    "papers": lambda scale, device, dtype: papers.cases(scale),
    "decode": lambda scale, device, dtype: decode.cases(scale),
}
ABOUT = {
    "engines": "Every engine on plain attention, and the automatic choice against the best of them.",
    "mechanisms": "Every mechanism over growing sequences and maps, against dense attention.",
    "models": "Models of the zoo against models of timm and Hugging Face of about the same size.",
    "papers": "Mechanisms in settings of their papers: what is claimed, what is aimed at, what is measured.",
    "decode": "One token against a long context: steps of operations and modules, and the bytes of their caches.",
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Out = Annotated[Path | None, typer.Option(help="Write the results to this JSON file, row by row.")]
Scale = Annotated[str, typer.Option(help="Sizes: full, small, quick (to try the program); auto: full on a GPU, else small.")]
Only = Annotated[
    str, typer.Option(help="Settings whose names (group: setting) match this wildcard, or one of several with | between.")
]
Seconds = Annotated[float, typer.Option(help="Time of each measurement, about.")]
Budget = Annotated[
    float, typer.Option(help="Seconds after which what is optional (torch.compile above all) is left out; 0: always.")
]
Workers = Annotated[int, typer.Option(help="Processes that compile all kernels first, at the same time.")]
Compile = Annotated[float, typer.Option("--compile-seconds", help="Seconds that these processes have; then they are ended.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: bfloat16 on a GPU, else float32.")]
Share = Annotated[str, typer.Option(hidden=True, help="i/n: only compile what each n-th case from the i-th on needs.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would run, with FLOPs, bytes and the roofline's bound.")]


def _command(suite: str) -> Callable[..., None]:
    def command(
        out: Out = None,
        scale: Scale = "auto",
        only: Only = "*",
        seconds: Seconds = 0.05,
        budget: Budget = 100.0,
        workers: Workers = 0,
        compile_seconds: Compile = 60.0,
        dtype: Dtype = "auto",
        share: Share = "",
        dry_run: Dry = False,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if scale == "auto":
            scale = "full" if device == "cuda" or dry_run else "small"
        if scale not in ("full", "small", "quick"):
            raise typer.BadParameter(f"scale is auto, full, small or quick; got {scale!r}")
        if dtype not in ("auto", *DTYPES):
            raise typer.BadParameter(f"dtype is auto, {', '.join(DTYPES)}; got {dtype!r}")
        numbers = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if device == "cuda" else torch.float32
        chosen = [case for case in SUITES[suite](scale, device, numbers) if matches(case.name, only)]
        if dry_run:
            show_plan(suite, chosen, device)
        elif share:
            index, number = (int(part) for part in share.split("/"))
            warm_up(chosen[index::number], device=device, dtype=numbers, optional=budget > 0)
        else:
            same = ("--scale", scale, "--only", only, "--budget", str(budget), "--dtype", dtype)
            compile_first(suite, workers, same, compile_seconds)
            if suite == "engines":  # a few kernels at a time; torch 2.11's compile workers, idle for long, did not always answer
                from torch._inductor import config

                config.compile_threads = 1
            clock = Clock(seconds, most=5 if scale == "quick" else 50)
            extras = measure_extras(suite, scale, device, numbers, only)
            run(suite, chosen, device, numbers, scale=scale, clock=clock, budget=budget, out=out, extras=extras)

    command.__doc__ = ABOUT[suite]
    return command


for _suite in SUITES:
    app.command(_suite)(_command(_suite))


def compile_first(suite: str, workers: int, options: tuple[str, ...], seconds: float) -> None:
    """Fill the compilers' caches on disk: processes that each run a share of the cases once. Those not done by then are ended."""
    if workers < 1:
        return
    program = [sys.executable, str(Path(__file__).resolve()), suite, *options]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.perf_counter()
    started = [subprocess.Popen([*program, "--share", f"{i}/{workers}"], env=alone, **silent) for i in range(workers)]  # type: ignore[call-overload]
    for process in started:
        try:
            process.wait(max(0.0, start + seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    console.print(f"compiled in {time.perf_counter() - start:.0f} s")


def matches(name: str, only: str) -> bool:
    """Whether one of the wildcards is about this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in only.split("|"))


def measure_extras(suite: str, scale: str, device: str, dtype: torch.dtype, only: str) -> dict[str, Any]:
    """What the results of a suite hold besides rows."""
    if suite == "engines":
        times = engines.host_times(device, dtype, 2000 if scale == "full" else 100)
        return {"explain": engines.explanations(scale, device, dtype), "host": times}
    if suite != "papers":
        return {}
    extras: dict[str, Any] = {"claims": papers.CLAIMS, "growth": papers.GROWTH if scale == "full" else {}}
    if matches(papers.ON_CPU, only):
        extras["hilo_on_cpu"] = papers.hilo_on_cpu(scale)
    return extras


def run(
    suite: str,
    cases: list[Case],
    device: str,
    dtype: torch.dtype,
    *,
    scale: str,
    clock: Clock,
    budget: float,
    out: Path | None,
    extras: dict[str, Any],
) -> None:
    """Measure these cases, print their tables and write them."""
    peaks = device_peaks(device, dtype, quick=scale == "quick")
    results: dict[str, Any] = {"suite": suite, "where": report.where(), "scale": scale, "dtype": str(dtype).removeprefix("torch.")}
    results |= {"peaks": peaks.as_dict(), **extras, "rows": []}

    def done(rows: list[dict[str, Any]]) -> None:
        last = rows[-1]
        if len(rows) > len(results["rows"]):
            console.print(f"{last['group']}: {last['setting']}: {_short(last)}", markup=False, highlight=False)
        results["rows"] = list(rows)
        if out is not None:
            report.write(results, out)

    results["rows"] = measure(cases, device=device, dtype=dtype, clock=clock, peaks=peaks, budget=budget, done=done)
    console.print(report.render(results), markup=False, highlight=False)
    if out is not None:
        report.write(results, out)
        console.print(f"wrote {out}")


def _short(row: dict[str, Any]) -> str:
    """One line of a row, as it is measured."""
    parts = []
    for name, found in row["measured"].items():
        times = " | ".join(
            f"{t:.3f}"
            for d in report.DIRECTIONS
            if (t := report.milliseconds(row, name, d, report.single_kind(row, d))) is not None
        )
        memory = f", {found['peak_mib']:.0f} MiB" if "peak_mib" in found else ""
        parts.append(f"{name} {times}{memory}{' ' + found['error'] if 'error' in found else ''}")
    return "; ".join(parts) + f" ({row['seconds']:.1f} s)"


def show_plan(suite: str, cases: list[Case], device: str) -> None:
    """What would run, at least how much work it is, and the time below which this device, or an H200, cannot come."""
    known = KNOWN["NVIDIA H200"] if device == "cpu" else device_peaks(device, torch.bfloat16)
    name = "an H200" if device == "cpu" else torch.cuda.get_device_name()
    table = Table(title=f"{suite}: forward | forward and backward; bound: of {name}", title_justify="left")
    for column in ("group", "setting", "contenders", "GFLOP", "MiB", "bound, ms"):
        table.add_column(column)
    for case in cases:
        work = case.work() or {}
        columns = [
            " | ".join(f"{value:.4g}" for value in values)
            for values in zip(*((w.flops / 1e9, w.bytes / 2**20, w.bound_ms(known)) for w in work.values()), strict=True)
        ]
        table.add_row(case.group, case.setting, ", ".join(case.contenders), *(columns or ("not counted", "", "")))
    console.print(table)


@app.command()
def join(results: Path, later: list[Path]) -> None:
    """Put rows of later runs, of some settings, into the file of an earlier one, in place of its own."""
    found = report.read(results)
    for path in later:
        found = report.joined(found, report.read(path))
    report.write(found, results)


@app.command()
def table(page: Path, results: Annotated[list[Path] | None, typer.Argument()] = None, pictures: bool = True) -> None:
    """Write the tables of earlier runs into a page, between its markers; without files, of those that the page names.

    Beside each of the files go its pictures, which need matplotlib.
    """
    files: dict[str, str] = {}
    for path in results or []:
        found = report.read(path)
        files[found["suite"]] = Path(os.path.relpath(path, page.parent)).as_posix()
        if pictures:
            from attention_zoo.benchmarks.plots import draw

            found["pictures"] = draw(found, path.with_suffix(""))
            report.write(found, path)
    page.write_text(report.put_results(page.read_text(encoding="utf-8"), page.parent, files), encoding="utf-8")


if __name__ == "__main__":
    app()
