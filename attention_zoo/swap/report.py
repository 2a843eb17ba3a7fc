"""What a swap did or, as a dry run, would do: one row for each layer, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["LayerSwap", "SwapReport"]

_WIDTH = 120  # columns of the table


@dataclass(frozen=True)
class LayerSwap:
    """One layer of a `SwapReport`.

    FLOPs are those of the layer's forward in evaluation mode on one sequence of `num_tokens`, as `torch.utils.flop_counter` counts
    them: two for each multiply-add of a matrix product or convolution, nothing for the rest. Every pair of tokens that is computed
    counts, also those that a mask then hides: a causal or sliding layer of full attention counts as the engine "reference" and
    Hugging Face's "eager" attention compute it.

    Attributes:
        name: qualified name of the layer that is replaced.
        mechanism: what takes its place.
        num_tokens: what FLOPs and cache are counted for: the context length of a text model; the patches of an image of the
            model's size, and its class tokens.
        carried: parameters that are the layer's own, unchanged.
        converted: parameters that are computed from the layer's.
        new: parameters that the layer says nothing of.
        removed: parameters of the layer itself, for comparison with the sum of the three.
        preserving: whether the layer computes what it did, for any weights; None: it could not be tried.
        tried_tokens: how many random tokens that was tried on: `num_tokens`, fewer where these are too many. Mechanisms with
            windows or summaries may differ on more.
        flops_before: of the layer.
        flops_after: of the mechanism; None: its forward cannot be followed without data.
        cache_bytes_before, cache_bytes_after: what is kept of one sequence when it has been decoded; 0 without a cache.
    """

    name: str
    mechanism: str
    num_tokens: int
    carried: int
    converted: int
    new: int
    removed: int
    preserving: bool | None
    tried_tokens: int
    flops_before: int
    flops_after: int | None
    cache_bytes_before: int
    cache_bytes_after: int

    @property
    def parameters(self) -> int:
        """Of the mechanism."""
        return self.carried + self.converted + self.new


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What `swap_attention` changed.

    Attributes:
        layers: one row for each layer that was replaced, in the model's order.
        dry_run: whether the model was left as it is.
    """

    layers: tuple[LayerSwap, ...]
    dry_run: bool

    @property
    def num_tokens(self) -> int:
        """The longest sequence that a layer was counted for; towers of one model may have different ones."""
        return max((layer.num_tokens for layer in self.layers), default=0)

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the replaced layers together, before and after."""
        return sum(layer.removed for layer in self.layers), sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> tuple[int, int | None]:
        """Of the replaced layers together, before and after."""
        return sum(layer.flops_before for layer in self.layers), _sum(layer.flops_after for layer in self.layers)

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Of the replaced layers together, before and after."""
        return sum(layer.cache_bytes_before for layer in self.layers), sum(layer.cache_bytes_after for layer in self.layers)

    @property
    def cache_bytes_per_token(self) -> tuple[float, float]:
        """Of the replaced layers together, before and after: means over a sequence."""
        before = sum(layer.cache_bytes_before / layer.num_tokens for layer in self.layers)
        return before, sum(layer.cache_bytes_after / layer.num_tokens for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, which JSON can hold: the rows, and the totals as [before, after]."""
        totals = {name: list(getattr(self, name)) for name in ("parameters", "flops", "cache_bytes")}
        return {"dry_run": self.dry_run, "layers": [asdict(layer) for layer in self.layers], "totals": totals}

    def __repr__(self) -> str:
        """The table: what a prompt or notebook shows."""
        return str(self)

    def __str__(self) -> str:
        """A table of at most 120 columns; neighbours that differ in one number of their names only share a row."""
        lengths = sorted({row.num_tokens for row in self.layers})
        rows = [(_name(group), *_cells(group[0])) for group in _fold(self.layers)]
        parts = (sum(getattr(row, part) for row in self.layers) for part in ("carried", "converted", "new"))
        costs = (_change(*self.parameters), *map(_short, parts), "", _change(*self.flops), _change(*self.cache_bytes_per_token))
        rows.append((f"all {len(self.layers)} layers", "", "", *costs))
        head = ("layer", "mechanism", "tokens", "parameters", "carried", "converted", "new", "same", "FLOPs", "cache B/token")
        hidden = {"tokens": len(lengths) == 1, "cache B/token": self.cache_bytes == (0, 0)}
        shown = [column for column, name in enumerate(head) if not hidden.get(name, False)]
        table = [tuple(row[column] for column in shown) for row in (head, *rows)]
        widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
        widths[0] = max(len(head[0]), min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
        done = "would swap" if self.dry_run else "swapped"
        length = f"a sequence of {lengths[0]:,} tokens" if len(lengths) == 1 else "one sequence"
        title = f"{done} (before -> after, FLOPs and cache of {length}; same: the layer's function is kept)"
        if tried := sorted({row.tried_tokens for row in self.layers if row.preserving and row.tried_tokens < row.num_tokens}):
            title += f"\n* tried on {' or '.join(f'{limit:,}' for limit in tried)} tokens only"
        return "\n".join([title, *(_line(row, widths) for row in table)])


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None where one of them is not known."""
    each = list(numbers)
    return None if None in each else sum(number for number in each if number is not None)


def _cells(row: LayerSwap) -> tuple[str, ...]:
    """A row's cells after its name."""
    same = {True: "yes*" if row.tried_tokens < row.num_tokens else "yes", False: "no", None: "?"}[row.preserving]
    cache = _change(row.cache_bytes_before / row.num_tokens, row.cache_bytes_after / row.num_tokens)
    parts = (_short(count) for count in (row.carried, row.converted, row.new))
    flops = _change(row.flops_before, row.flops_after)
    return (row.mechanism, f"{row.num_tokens:,}", _change(row.removed, row.parameters), *parts, same, flops, cache)


def _fold(layers: tuple[LayerSwap, ...]) -> list[list[LayerSwap]]:
    """Runs of neighbours that agree in all but one number of their names."""
    groups: list[list[LayerSwap]] = []
    for row in layers:
        if groups and _figures(groups[-1][0]) == _figures(row) and _varying([*groups[-1], row]) is not None:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _figures(row: LayerSwap) -> list[Any]:
    return [getattr(row, field.name) for field in fields(row) if field.name != "name"]


def _varying(group: list[LayerSwap]) -> int | None:
    """Which piece of the names, cut at their numbers, is the one that varies; None if there is not exactly one, a number."""
    pieces = [re.split(r"(\d+)", row.name) for row in group]
    if len({len(one) for one in pieces}) != 1:
        return None
    varying = [place for place, texts in enumerate(zip(*pieces, strict=True)) if len(set(texts)) > 1]
    return varying[0] if len(varying) == 1 and varying[0] % 2 else None


def _name(group: list[LayerSwap]) -> str:
    """One name for all of a group: "layers.0-31.attn", with a dash for runs of numbers."""
    place = _varying(group)
    pieces = re.split(r"(\d+)", group[0].name)
    if place is None:
        return group[0].name
    numbers = [int(re.split(r"(\d+)", row.name)[place]) for row in group]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces[place] = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return "".join(pieces)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Texts to the left, shortened in their middle where they are too long; numbers to the right."""
    cells = [f"{cell:{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
    if len(row[0]) > widths[0]:
        half = (widths[0] - 3) // 2
        cells[0] = f"{row[0][:half]}...{row[0][len(row[0]) - (widths[0] - 3 - half) :]}"
    return "  ".join(cells).rstrip()


def _change(before: float, after: float | None) -> str:
    """ "a -> b", a alone where it stays (in three digits), a dash for nothing at all."""
    if before == after == 0:
        return "-"
    texts = [_short(before), "?" if after is None else _short(after)]
    return " -> ".join(dict.fromkeys(texts))


def _short(number: float) -> str:
    """Three digits and a unit: 16.8M."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"
