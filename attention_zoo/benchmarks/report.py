"""Results of a suite: JSON with device and versions, Markdown tables, and the pages that hold them between markers.

A page says where a suite's results stand, `<!-- papers: results/papers_h200.json -->`, and what is generated from them lies between
that line and `<!-- end of papers -->`; "none" is no file. Rows come from `cases.measure`; times are medians in milliseconds.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attention_zoo import ops
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN

__all__ = [
    "baseline_ms",
    "by_group",
    "exponent",
    "fits",
    "joined",
    "milliseconds",
    "put_results",
    "ratio",
    "read",
    "render",
    "single_kind",
    "target_of",
    "where",
    "write",
]

Row = Mapping[str, Any]
DIRECTIONS = (FORWARD, TRAIN)


def where() -> dict[str, Any]:
    """Device and versions."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": None if cuda else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "backends": {b.name: {"version": b.version, "available": b.available, "reason": b.reason} for b in ops.backends()},
    }


def write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier run. Raises ValueError for a file that holds none."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not {"suite", "where", "rows"} <= set(results):
        raise ValueError(f"{path} holds no results of a benchmark")
    return results


def joined(results: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Results with the rows of a later run of some settings in place of their own, or by size among those of their group.

    Such rows know their date.

    Raises:
        ValueError: the runs are of other suites, devices, versions of torch, dtypes or scales.
    """
    for name, one, other in (
        ("suite", results["suite"], later["suite"]),
        *((name, results["where"][name], later["where"][name]) for name in ("device", "torch")),
        *((name, results.get(name), later.get(name)) for name in ("dtype", "scale")),
    ):
        if one != other:
            raise ValueError(f"rows of one table are of one {name}: {one} and {other}")
    rows = list(results["rows"])
    for row in later["rows"]:
        dated = {**row, "date": later["where"]["date"]}
        same = next((i for i, r in enumerate(rows) if (r["group"], r["setting"]) == (row["group"], row["setting"])), None)
        if same is not None:
            rows[same] = dated
            continue
        group = [i for i, r in enumerate(rows) if r["group"] == row["group"]]
        smaller = [i + 1 for i in group if rows[i]["size"] <= row["size"]]
        rows.insert(smaller[-1] if smaller else group[0] if group else len(rows), dated)
    more = {"explain": {**results["explain"], **later.get("explain", {})}} if "explain" in results else {}
    return {**results, **more, "rows": rows}


# ---- what rows say


def milliseconds(row: Row, contender: str, direction: str, kind: str | None = None) -> float | None:
    """Median time of a contender; None where it was not measured.

    Args:
        kind: "graph", "eager" or "turns"; None: of the CUDA graph, where this and the baseline have one, else from Python.
    """
    found = row["measured"].get(contender, {}).get(direction)
    if found is None:
        return None
    return found.get(kind or _kind(row, direction))


def _kind(row: Row, direction: str) -> str:
    compared = [row["measured"].get(name, {}).get(direction) for name in ("ours", row["baseline"])]
    found = [times for times in compared if times is not None]
    return next((kind for kind in ("turns", "graph") if found and all(kind in times for times in found)), "eager")


def baseline_ms(row: Row, direction: str, kind: str | None = None) -> float | None:
    """Time of the baseline: of the fastest other contender, where the row names none."""
    if row["baseline"]:
        return milliseconds(row, row["baseline"], direction, kind)
    times = (milliseconds(row, name, direction, kind) for name in row["measured"] if name not in ("ours", "compiled"))
    return min((t for t in times if t is not None), default=None)


def ratio(row: Row, direction: str, kind: str | None = None) -> float | None:
    """Time of ours as a share of the baseline's."""
    ours, theirs = milliseconds(row, "ours", direction, kind), baseline_ms(row, direction, kind)
    return None if ours is None or theirs is None else ours / theirs


def roofline_share(row: Row, direction: str) -> float | None:
    """The least time that the device needs, as a share of ours."""
    work, ours = row["work"].get(direction), milliseconds(row, "ours", direction)
    return None if work is None or ours is None else work["bound_ms"] / ours


def target_of(row: Row, direction: str) -> tuple[float, bool] | None:
    """What is aimed at, as a share of the baseline's time, and whether it lay beyond the roofline: 80 % of that takes its place."""
    target, theirs = row["targets"].get(direction), baseline_ms(row, direction)
    if target is None or theirs is None:
        return None
    bound = row["work"].get(direction, {}).get("bound_ms", 0.0) / theirs
    return (bound / 0.8, True) if target < bound else (target, False)


def memory_ratio(row: Row) -> float | None:
    """Peak memory of a training step (of a forward, where nothing learns) as a share of the baseline's."""
    ours, theirs = (row["measured"].get(name, {}).get("peak_mib") for name in ("ours", row["baseline"]))
    return ours / theirs if ours is not None and theirs else None


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes), by least squares."""
    x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def fits(rows: Iterable[Row], contender: str = "ours", points: int = 2) -> dict[str, dict[str, float]]:
    """Group -> direction -> exponent of the size that a contender's time grows with, over the largest sizes of the group."""
    found: dict[str, dict[str, float]] = {}
    for group, members in by_group(rows).items():
        for direction in DIRECTIONS:
            timed = [(r["size"], milliseconds(r, contender, direction)) for r in members]
            curve = sorted({size: ms for size, ms in timed if ms}.items())[-points:]
            if len(curve) > 1:
                found.setdefault(group, {})[direction] = exponent(*zip(*curve, strict=True))
    return found


# ---- Markdown


def render(results: Mapping[str, Any], stem: str = "") -> str:
    """The Markdown of a suite's results: where they are from, their tables, and the pictures `stem_*.png` beside the JSON."""
    device, rows = results["where"], results["rows"]
    peaks = results.get("peaks")
    days = sorted({date[:10] for date in (device["date"], *(row["date"] for row in rows if "date" in row))})
    head = f"{device['device']}, torch {device['torch']}, {' and '.join(days)}"
    if peaks:
        head += f"; roofline: {peaks['flops'] / 1e12:.4g} TFLOP/s, {peaks['bandwidth'] / 1e12:.3g} TB/s ({peaks['source']})"
    body = _RENDERERS[results["suite"]](rows, results)
    pictures = [f"![{_PICTURES[kind]}]({stem}_{kind}.png)" for kind in results.get("pictures", ())] if stem else []
    return "\n\n".join([head + ".", *pictures, *body])


_PICTURES = {
    "ratios": "Times as shares of the baseline's, with what is aimed at",
    "roofline": "Rates over operations per byte, under the roofline",
    "scaling": "Times over lengths, log-log",
}


def _papers(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    parts, claims, growth = [], results.get("claims", {}), results.get("growth", {})
    grown = fits(rows)
    for group, members in by_group(rows).items():
        head = f"**{group}.** {claims.get(group, '')}".rstrip()
        if group in growth and group in grown:
            said = [f"{value:.2f} ({'met' if value <= growth[group] + 0.1 else 'missed'})" for value in grown[group].values()]
            head += f" Exponent of N between the two largest: {' | '.join(said)}; aimed at: {growth[group]:g}, at most 0.1 above."
        parts += [head, _judged(members), *_not_captured(members)]
    if on_cpu := results.get("hilo_on_cpu"):
        from attention_zoo.benchmarks.hilo_cpu import render_hilo_on_cpu

        parts += [
            "**HiLo, CPU.** The same paper on an i9-10900X: 1.4 times spatial reduction, 1.6 times local windows.",
            *map(render_hilo_on_cpu, on_cpu),
        ]
    return parts


def _judged(rows: Sequence[Row]) -> str:
    base = rows[0]["baseline"]
    columns: dict[str, list[str]] = {"setting": [r["setting"] for r in rows]}
    columns[f"{base}, ms"] = [_pair(r, lambda d, r=r: baseline_ms(r, d)) for r in rows]
    columns["ours, ms"] = [_pair(r, lambda d, r=r: milliseconds(r, "ours", d)) for r in rows]
    columns[f"of {base}"] = [_pair(r, lambda d, r=r: ratio(r, d)) for r in rows]
    columns["aimed at"] = [" \\| ".join(_verdict(r, d) for d in DIRECTIONS if d in r["targets"]) for r in rows]
    columns["of the roofline"] = [_pair(r, lambda d, r=r: roofline_share(r, d), "{:.0%}") for r in rows]
    columns["plain code, ms"] = [_pair(r, lambda d, r=r: milliseconds(r, "plain", d)) for r in rows]
    columns["torch.compile of it, ms"] = [_pair(r, lambda d, r=r: milliseconds(r, "compiled", d)) for r in rows]
    if _has_graphs(rows):
        columns[f"from Python: {base}"] = [_pair(r, lambda d, r=r: baseline_ms(r, d, "eager")) for r in rows]
        columns["from Python: ours"] = [_pair(r, lambda d, r=r: milliseconds(r, "ours", d, "eager")) for r in rows]
        columns[f"from Python: of {base}"] = [_pair(r, lambda d, r=r: ratio(r, d, "eager")) for r in rows]
    columns[f"memory of {base}"] = [_number(memory_ratio(r)) for r in rows]
    return _table({name: cells for name, cells in columns.items() if any(cells)})


def _has_graphs(rows: Sequence[Row]) -> bool:
    """Whether some times are of CUDA graphs, beside which those from Python stand."""
    return any("graph" in r["measured"]["ours"].get(d, {}) for r in rows for d in DIRECTIONS)


def _verdict(row: Row, direction: str) -> str:
    target, found = target_of(row, direction), ratio(row, direction)
    if target is None or found is None:
        return f"{row['targets'][direction]:.3g}"
    share, replaced = target
    return f"{share:.3g}{' (80 % of the roofline)' if replaced else ''} {'met' if found <= share else 'missed'}"


def _not_captured(rows: Sequence[Row]) -> list[str]:
    """A line for each reason why calls have no CUDA graph, and whose they are; [] where there are none."""
    several = len(by_group(rows)) > 1
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        where = f"{row['group']}: {row['setting']}" if several else row["setting"]
        for name, measured in row["measured"].items():
            for direction in DIRECTIONS:
                if reason := measured.get(direction, {}).get("not_captured"):
                    found.setdefault(" ".join(reason.split()), {})[f"{where} ({name}, {direction})"] = None
    return [f"Not captured as a CUDA graph, {'; '.join(calls)}: `{reason}`" for reason, calls in found.items()]


def _mechanisms(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    """One table for each direction of time: shares of dense over lengths, exponents, memory."""
    parts = []
    ours, sizes = fits(rows), sorted({row["size"] for row in rows})
    dense = fits(rows, "dense")
    for causal, title in ((False, "Both ways"), (True, "Causal")):
        groups = {g: m for g, m in by_group(rows).items() if g.endswith(", causal") == causal}
        if not groups:
            continue
        columns: dict[str, list[str]] = {"mechanism": [group.removesuffix(", causal") for group in groups]}
        for direction, short in ((FORWARD, "forward"), (TRAIN, "with backward")):
            for size in sizes:
                of_size = [next((r for r in m if r["size"] == size), None) for m in groups.values()]
                cells = ["" if r is None else _number(ratio(r, direction)) for r in of_size]
                columns[f"{short}, {size:,}"] = cells
            grown = next((dense[g][direction] for g in groups if direction in dense.get(g, {})), None)
            name = f"{short}, exponent" + (f" (dense {grown:.2f})" if grown is not None else "")
            columns[name] = [_number(ours.get(g, {}).get(direction)) for g in groups]
        largest = [max(m, key=lambda r: r["size"]) for m in groups.values()]
        columns["plain code, ours = 1"] = [_pair(r, lambda d, r=r: _against_ours(r, "plain", d)) for r in largest]
        columns["torch.compile of it"] = [_pair(r, lambda d, r=r: _against_ours(r, "compiled", d)) for r in largest]
        columns["of the roofline"] = [_pair(r, lambda d, r=r: roofline_share(r, d), "{:.0%}") for r in largest]
        columns["memory of dense"] = [_number(memory_ratio(r)) for r in largest]
        text = f"**{title}.** Times as shares of dense attention's at so many tokens; the last columns are of the most tokens."
        shown = [row for members in groups.values() for row in members]
        parts += [text, _table({name: cells for name, cells in columns.items() if any(cells)}), *_not_captured(shown)]
    return parts


def _against_ours(row: Row, contender: str, direction: str) -> float | None:
    other, ours = milliseconds(row, contender, direction), milliseconds(row, "ours", direction)
    return None if other is None or ours is None else other / ours


def _models(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    def rate(row: Row, contender: str, direction: str) -> float | None:
        ms = milliseconds(row, contender, direction)
        return None if ms is None else 1e3 * row["items"] / ms

    columns: dict[str, list[str]] = {"model": [r["group"] for r in rows], "setting": [r["setting"] for r in rows]}
    columns["ours, a second"] = [_pair(r, lambda d, r=r: rate(r, "ours", d), "{:,.0f}") for r in rows]
    columns["theirs"] = [_pair(r, lambda d, r=r: rate(r, "theirs", d), "{:,.0f}") for r in rows]
    columns["plain code"] = [_pair(r, lambda d, r=r: rate(r, "plain", d), "{:,.0f}") for r in rows]
    columns["torch.compile of it"] = [_pair(r, lambda d, r=r: rate(r, "compiled", d), "{:,.0f}") for r in rows]
    columns["ours / theirs"] = [_pair(r, lambda d, r=r: _inverse(ratio(r, d))) for r in rows]
    if _has_graphs(rows):
        columns["from Python: ours / theirs"] = [_pair(r, lambda d, r=r: _inverse(ratio(r, d, "eager"))) for r in rows]
    columns["of the roofline"] = [_pair(r, lambda d, r=r: roofline_share(r, d), "{:.0%}") for r in rows]
    columns["memory of theirs"] = [_number(memory_ratio(r)) for r in rows]
    table = _table({name: cells for name, cells in columns.items() if any(cells)})
    return ["Images or tokens a second, of CUDA graphs where both models have one, else from Python.", table, *_not_captured(rows)]


def _decode(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    columns: dict[str, list[str]] = {"": [r["group"] for r in rows], "setting": [r["setting"] for r in rows]}
    columns["cache, MiB"] = [_number(r["facts"].get("cache_mib"), "{:.1f}") for r in rows]
    columns["of dense's"] = [_number(r["facts"]["cache_mib"] / r["facts"]["dense_cache_mib"], "{:.0%}") for r in rows]
    columns["dense, ms"] = [_number(baseline_ms(r, FORWARD), "{:.3f}") for r in rows]
    columns["ours, ms"] = [_number(milliseconds(r, "ours", FORWARD), "{:.3f}") for r in rows]
    columns["dense / ours"] = [_number(_inverse(ratio(r, FORWARD)), "{:.1f}") for r in rows]
    columns["of the roofline"] = [_number(roofline_share(r, FORWARD), "{:.0%}") for r in rows]
    columns["plain code, ms"] = [_number(milliseconds(r, "plain", FORWARD), "{:.3f}") for r in rows]
    return [_table({name: cells for name, cells in columns.items() if any(cells)}), *_not_captured(rows)]


def _engines(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["measured"] if name not in ("ours", "library", "compiled")))
    several = {group for group, members in by_group(rows).items() if len(members) > 1}
    calls = [f"{r['group']}, {r['size']:,} tokens" if r["group"] in several else r["group"] for r in rows]
    columns: dict[str, list[str]] = {"call": calls}
    columns["auto, ms"] = [_pair(r, lambda d, r=r: milliseconds(r, "ours", d, single_kind(r, d))) for r in rows]
    for name in [*names, "compiled"]:
        columns[name] = [_pair(r, lambda d, r=r, n=name: milliseconds(r, n, d, single_kind(r, d))) for r in rows]
    columns["auto over the best, %"] = [_pair(r, lambda d, r=r: _percent(ratio(r, d)), "{:+.1f}") for r in rows]
    columns["of the roofline"] = [_pair(r, lambda d, r=r: roofline_share(r, d), "{:.0%}") for r in rows]
    parts = [_table({name: cells for name, cells in columns.items() if any(cells)}), *_not_captured(rows)]
    if host := results.get("host"):
        cells = {"host, microseconds": [h["call"] for h in host], "engine": [h["engine"] for h in host]}
        for key, name in (("auto_us", "attention"), ("engine_us", "engine alone"), ("choice_us", "choice"), ("raw_us", "library")):
            cells[name] = [_number(h.get(key), "{:.1f}") for h in host]
        parts.append(_table(cells))
    return parts


def single_kind(row: Row, direction: str) -> str:
    """How all engines were measured, not only those that were compared in turns."""
    times = row["measured"].get("ours", {}).get(direction, {})
    return "graph" if "graph" in times else "eager"


def _inverse(value: float | None) -> float | None:
    return None if not value else 1 / value


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * (value - 1)


_RENDERERS = {"papers": _papers, "mechanisms": _mechanisms, "models": _models, "decode": _decode, "engines": _engines}


def _pair(row: Row, value: Any, form: str = "") -> str:
    """Forward | forward and backward, of what was measured."""
    values = [value(direction) for direction in DIRECTIONS]
    return " \\| ".join(_number(v, form) for v in values if v is not None)


def _number(value: float | None, form: str = "") -> str:
    """Three digits where no form is given; "" for None."""
    if value is None:
        return ""
    return (
        form.format(value)
        if form
        else f"{value:.3f}"
        if abs(value) < 0.1
        else f"{value:.2f}"
        if abs(value) < 100
        else f"{value:.0f}"
    )


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


# ---- pages

_SECTION = re.compile(r"<!-- (?P<suite>[a-z]+): (?P<file>\S+) -->.*?<!-- end of (?P=suite) -->", re.DOTALL)


def put_results(page: str, folder: Path, files: Mapping[str, str] | None = None) -> str:
    """A page with the tables of all results that it names.

    Args:
        page: text with markers.
        folder: what the names of the files are relative to: the page's own.
        files: suite -> another file for its section.

    Raises:
        ValueError: the page has no section for a suite of `files`.
    """
    files = dict(files or {})
    if lost := set(files) - {match["suite"] for match in _SECTION.finditer(page)}:
        name = sorted(lost)[0]
        raise ValueError(f"the page has no markers <!-- {name}: {files[name]} --> and <!-- end of {name} -->")

    def section(match: re.Match[str]) -> str:
        suite, file = match["suite"], files.get(match["suite"], match["file"])
        text = "No run is kept." if file == "none" else render(read(folder / file), stem=file.removesuffix(".json"))
        return f"<!-- {suite}: {file} -->\n\n{text}\n\n<!-- end of {suite} -->"

    return _SECTION.sub(section, page)
