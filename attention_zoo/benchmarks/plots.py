"""Pictures of a suite's results: times over lengths, rates under the roofline, shares of the baseline's time. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attention_zoo.benchmarks.report import DIRECTIONS, baseline_ms, by_group, milliseconds, ratio, target_of
from attention_zoo.benchmarks.roofline import FORWARD

__all__ = ["draw"]

# Told apart without seeing red and green alike (Okabe and Ito), then the same with other marks.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99", "#999933", "#AA4499")
_MARKS = ("o", "s", "^", "D", "v")
_BLACK = ("dense", "auto")  # what the others are compared with
_INK, _GREY, _GRID = "#222222", "#777777", "#DDDDDD"

Row = Mapping[str, Any]
Curve = tuple[str, list[float], list[float]]


def draw(results: Mapping[str, Any], stem: Path) -> list[str]:
    """Write `stem_KIND.png` for each kind of picture that the suite has, and return the kinds."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for kind in _KINDS[results["suite"]]:
        figure = _DRAWERS[kind](results)
        if figure is None:
            continue
        figure.savefig(stem.with_name(f"{stem.name}_{kind}.png"), dpi=110, bbox_inches="tight", facecolor="white")
        drawn.append(kind)
    return drawn


def _panels(number: int, *, columns: int = 2, size: tuple[float, float] = (6.0, 5.0)) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(columns, number)
    lines = -(-number // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(number)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_GREY)
        axis.tick_params(colors=_INK, labelsize=9)
        axis.grid(True, which="major", color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


# ---- over lengths


def _scaling(results: Mapping[str, Any]) -> Any:
    """One panel for each kind of call, time over length on logarithmic axes; dense attention in black."""
    panels = list(_CURVES[results["suite"]](results["rows"]))
    panels = [panel for panel in panels if any(len(sizes) > 1 for _, sizes, _ in panel[2])]
    if not panels:
        return None
    figure, axes = _panels(len(panels), size=(6.4, 5.4))
    names = list(dict.fromkeys(name for _, _, curves in panels for name, *_ in curves if name not in _BLACK))
    for axis, (title, unit, curves) in zip(axes, panels, strict=True):
        _curves(axis, curves, names, logarithmic=unit != "TFLOP/s")
        axis.set_title(title, fontsize=11, color=_INK, loc="left")
        axis.set_ylabel(unit, fontsize=10)
        axis.set_xlabel("tokens", fontsize=10)
    figure.suptitle(results["where"]["device"], fontsize=10, color=_GREY, x=0.01, ha="left")
    return figure


def _curves(axis: Any, curves: Sequence[Curve], names: Sequence[str], *, logarithmic: bool) -> None:
    """`names`: of all panels; each has one color and mark in all of them."""
    ends = []
    for name, sizes, values in curves:
        black, index = name in _BLACK, names.index(name) if name in names else 0
        color = _INK if black else _COLORS[index % len(_COLORS)]
        mark = "o" if black else _MARKS[index // len(_COLORS) % len(_MARKS)]
        width, dot = (2.6, 5) if black else (1.4, 4)
        axis.plot(sizes, values, mark + "-", color=color, linewidth=width, markersize=dot, zorder=3 if black else 2)
        ends.append((values[-1], sizes[-1], name, color, black))
    axis.set_xscale("log", base=2)
    if logarithmic:
        _logarithmic(axis)
    else:
        axis.set_ylim(0, None)
    ticks = sorted({size for _, sizes, _ in curves for size in sizes})
    axis.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else f"{t}" for t in ticks])
    axis.xaxis.set_minor_locator(_none())
    least, most = axis.get_ylim()
    heights = _apart([value for value, *_ in ends], least, most, logarithmic)
    right = max(size for _, size, *_ in ends) * 1.12
    for (value, size, name, color, black), height in zip(ends, heights, strict=True):
        weight = "bold" if black else "normal"
        axis.annotate(
            name, (size, value), (right, height), color=color, fontsize=8.5, va="center", fontweight=weight, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    axis.set_xlim(min(ticks) / 1.15, max(ticks) * 1.08)


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _logarithmic(axis: Any) -> None:
    """A vertical axis with its numbers written out, also between powers of ten where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    least, most = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if most / least > 300 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(_none())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _apart(values: Sequence[float], least: float, most: float, logarithmic: bool, lines: float = 27.0) -> list[float]:
    """Heights for labels at these values, moved until none covers another; `lines` fit on the axis."""
    there, back = (math.log, math.exp) if logarithmic else (float, float)
    step = (there(most) - there(least)) / lines
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [there(values[i]) for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            gap = places[i + 1] - places[i]
            if gap < step * 0.999:
                shift = (step - gap) / 2
                places[i], places[i + 1], moved = places[i] - shift, places[i + 1] + shift, True
        if not moved:
            break
    heights = [0.0] * len(values)
    for place, i in zip(places, order, strict=True):
        heights[i] = back(place)
    return heights


def _mechanism_curves(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Curve]]]:
    for causal in (False, True):
        chosen = [r for r in rows if r["group"].endswith(", causal") == causal]
        for direction in DIRECTIONS:
            curves = [_curve("dense", chosen, partial(_baseline, direction))]
            for group, members in by_group(chosen).items():
                curves.append(_curve(group.removesuffix(", causal"), members, partial(_ours, direction)))
            yield f"{'causal' if causal else 'both ways'}, {direction}", "milliseconds", [c for c in curves if c[1]]


def _decode_curves(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Curve]]]:
    for kind in ("operation", "module"):
        chosen = [r for r in rows if r["setting"].startswith(kind)]
        curves = [_curve("dense", chosen, partial(_baseline, FORWARD))]
        for group, members in by_group(chosen).items():
            curves.append(_curve(group.split(",")[0], members, partial(_ours, FORWARD)))
        title = "one token, attention alone" if kind == "operation" else "one token, whole module with its cache"
        yield title, "milliseconds", [c for c in curves if c[1]]
    caches = [_curve("dense", rows, lambda r: r["facts"].get("dense_cache_mib"))]
    kind = "module" if any(r["setting"].startswith("module") for r in rows) else "operation"
    for group, members in by_group(r for r in rows if r["setting"].startswith(kind)).items():
        caches.append(_curve(group.split(",")[0], members, lambda r: r["facts"].get("cache_mib")))
    yield "the cache of a layer", "MiB", [c for c in caches if c[1]]


def _engine_curves(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Curve]]]:
    for group, members in by_group(rows).items():
        if len(members) < 2:
            continue
        for direction in DIRECTIONS:
            names = dict.fromkeys(name for r in members for name in r["measured"] if name not in ("library", "ours"))
            kind = "graph" if any("graph" in r["measured"]["ours"].get(direction, {}) for r in members) else "eager"
            curves = [_curve(name, members, partial(_rate, name, direction, kind)) for name in ("ours", *names)]
            curves = [("auto" if name == "ours" else name, sizes, values) for name, sizes, values in curves]
            yield f"{group}, {direction}", "TFLOP/s", [c for c in curves if len(c[1]) > 1]


def _baseline(direction: str, row: Row) -> float | None:
    return baseline_ms(row, direction)


def _ours(direction: str, row: Row) -> float | None:
    return milliseconds(row, "ours", direction)


def _rate(name: str, direction: str, kind: str | None, row: Row) -> float | None:
    """TFLOP/s."""
    ms, work = milliseconds(row, name, direction, kind), row["work"].get(direction)
    return None if ms is None or work is None else work["flops"] / ms / 1e9


def _curve(name: str, rows: Iterable[Row], value: Callable[[Row], float | None]) -> Curve:
    points = {row["size"]: v for row in rows if (v := value(row)) is not None and v > 0}
    return name, sorted(points), [points[size] for size in sorted(points)]


_CURVES: dict[str, Callable[[Sequence[Row]], Iterable[tuple[str, str, list[Curve]]]]] = {
    "mechanisms": _mechanism_curves,
    "decode": _decode_curves,
    "engines": _engine_curves,
}


# ---- under the roofline


def _roofline(results: Mapping[str, Any]) -> Any:
    """What was computed in a second over the operations for each byte that must move; forward filled, with backward hollow."""
    rows, peaks = results["rows"], results.get("peaks")
    points = {
        group: [
            (work["flops"] / work["bytes"], rate, direction)
            for row in members
            for direction, work in row["work"].items()
            if (rate := _rate("ours", direction, None, row)) is not None
        ]
        for group, members in by_group(rows).items()
    }
    points = {group: found for group, found in points.items() if found}
    if not points or not peaks:
        return None
    figure, (axis,) = _panels(1, size=(9.0, 5.6))
    for index, (group, found) in enumerate(points.items()):
        color, mark = _COLORS[index % len(_COLORS)], _MARKS[index // len(_COLORS) % len(_MARKS)]
        for direction in DIRECTIONS:
            x, y = ([p[i] for p in found if p[2] == direction] for i in (0, 1))
            face = color if direction == FORWARD else "none"
            label = group if direction == FORWARD else None
            axis.scatter(x, y, s=34, marker=mark, edgecolors=color, facecolors=face, linewidths=1.2, label=label, zorder=3)
    intensities = [p[0] for found in points.values() for p in found]
    ridge = peaks["flops"] / peaks["bandwidth"]
    span = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    axis.plot(span, [min(peaks["flops"], x * peaks["bandwidth"]) / 1e12 for x in span], color=_INK, linewidth=2)
    said: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": _INK}
    axis.annotate(f"{peaks['flops'] / 1e12:.3g} TFLOP/s", (span[2], peaks["flops"] / 1e12), (0, 5), ha="right", **said)
    axis.annotate(f"{peaks['bandwidth'] / 1e12:.2g} TB/s", (span[0], span[0] * peaks["bandwidth"] / 1e12), (14, 0), **said)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations for each byte of input, output and weights", fontsize=10)
    axis.set_ylabel("TFLOP/s that were needed", fontsize=10)
    title = f"{results['suite']}, {results['where']['device']}: forward filled, with backward hollow"
    axis.set_title(title, fontsize=11, color=_INK, loc="left")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    return figure


# ---- shares of the baseline


def _ratios(results: Mapping[str, Any]) -> Any:
    """A line for each setting: time as a share of the baseline's, and what is aimed at."""
    rows = [row for row in results["rows"] if ratio(row, FORWARD) is not None]
    if not rows:
        return None
    figure, (axis,) = _panels(1, size=(9.5, 0.27 * len(rows) + 1.4))
    blue, orange = _COLORS[:2]
    for y, row in enumerate(rows):
        for direction, mark, offset in zip(DIRECTIONS, ("o", "s"), (-0.14, 0.14), strict=True):
            found, target = ratio(row, direction), target_of(row, direction)
            if found is None:
                continue
            good = found <= (1.0 if target is None else target[0])
            color = blue if good else orange
            face = color if direction == FORWARD else "white"
            axis.plot([found], [y + offset], mark, color=color, markerfacecolor=face, markersize=5.5, zorder=3)
            if target is not None:
                axis.plot([target[0]] * 2, [y + offset - 0.16, y + offset + 0.16], color=_INK, linewidth=1.6, zorder=2)
    axis.axvline(1.0, color=_GREY, linewidth=1.0)
    axis.set_xscale("log", base=2)
    least, most = axis.get_xlim()
    ticks = [2.0**i for i in range(-7, 9) if least <= 2.0**i <= most]
    axis.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [f"{r['group']}: {r['setting']}" for r in rows], fontsize=8.5)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("time, baseline = 1", fontsize=10)
    _explain_marks(axis, aimed=any(row["targets"] for row in rows))
    return figure


def _explain_marks(axis: Any, *, aimed: bool) -> None:
    from matplotlib.lines import Line2D

    settings: list[dict[str, Any]] = [
        {"marker": "o", "color": _GREY, "label": "forward"},
        {"marker": "s", "color": _GREY, "label": "forward and backward", "markerfacecolor": "white"},
        {"marker": "o", "color": _COLORS[0], "label": "met, or faster" if aimed else "faster"},
        {"marker": "o", "color": _COLORS[1], "label": "missed, or slower" if aimed else "slower"},
    ]
    if aimed:
        settings.append({"marker": "|", "color": _INK, "label": "aimed at", "markersize": 10, "markeredgewidth": 1.6})
    marks = [Line2D([], [], **{"linestyle": "none", "markersize": 5.5, **setting}) for setting in settings]
    axis.legend(handles=marks, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(marks), fontsize=9, frameon=False)


_DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"scaling": _scaling, "roofline": _roofline, "ratios": _ratios}
_KINDS = {
    "papers": ("ratios", "roofline"),
    "mechanisms": ("scaling", "roofline"),
    "models": ("ratios",),
    "decode": ("scaling",),
    "engines": ("scaling",),
}
