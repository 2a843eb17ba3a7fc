"""What a swap did or, as a dry run, would do: one row for each layer, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerSwap", "SwapReport"]


@dataclass(frozen=True)
class LayerSwap:
    """One layer of a `SwapReport`.

    Attributes:
        name: qualified name of the layer that is replaced.
        mechanism: what takes its place.
        carried: parameters that are the layer's own, unchanged.
        converted: parameters that are computed from the layer's.
        new: parameters that the layer says nothing of.
        removed: parameters of the layer itself, for comparison with the sum of the three.
        preserving: whether the layer computes what it did, tried on 16 random tokens (mechanisms with windows or summaries may
            differ on more); None: it could not be tried.
        cache_bytes_before, cache_bytes_after: what one sequence of the report's `num_tokens` keeps when it has been decoded; 0
            without a cache.
    """

    name: str
    mechanism: str
    carried: int
    converted: int
    new: int
    removed: int
    preserving: bool | None
    cache_bytes_before: int
    cache_bytes_after: int


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` changed.

    Attributes:
        layers: one row for each layer that was replaced, in the model's order.
        num_tokens: length of the sequence that the cache is counted for.
        dry_run: whether the model was left as it is.
    """

    layers: tuple[LayerSwap, ...]
    num_tokens: int
    dry_run: bool

    @property
    def cache_bytes_per_token(self) -> tuple[float, float]:
        """Of the replaced layers together, before and after: means over a sequence of `num_tokens`."""
        before = sum(layer.cache_bytes_before for layer in self.layers)
        return before / self.num_tokens, sum(layer.cache_bytes_after for layer in self.layers) / self.num_tokens

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "mechanism", "carried", "converted", "new", "before", "same function", "cache B/token")
        cells = [head, *(self._cells(layer) for layer in self.layers)]
        totals = [f"{sum(getattr(layer, part) for layer in self.layers):,}" for part in ("carried", "converted", "new", "removed")]
        before, after = self.cache_bytes_per_token
        cells.append((f"{len(self.layers)} layers", "", *totals, "", _change(before, after)))
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = [
            "  ".join(f"{cell:{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in _columns(row, widths))
            for row in cells
        ]
        return "\n".join([("would swap" if self.dry_run else "swapped") + " (parameters of each layer)", *lines])

    def _cells(self, layer: LayerSwap) -> tuple[str, ...]:
        counts = [f"{n:,}" for n in (layer.carried, layer.converted, layer.new, layer.removed)]
        same = {True: "yes", False: "no", None: "?"}[layer.preserving]
        cache = _change(layer.cache_bytes_before / self.num_tokens, layer.cache_bytes_after / self.num_tokens)
        return (layer.name, layer.mechanism, *counts, same, cache)


def _columns(row: tuple[str, ...], widths: list[int]) -> Any:
    return enumerate(zip(row, widths, strict=True))


def _change(before: float, after: float) -> str:
    return f"{before:,.1f} -> {after:,.1f}" if before or after else "-"
