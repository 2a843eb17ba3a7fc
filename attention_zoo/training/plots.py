"""Pictures of a run: its curves, its confusion matrix, its predictions; of several runs: their curves. Drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from attention_zoo.training.checkpoint import replace_file

__all__ = ["Curves", "Prediction", "plot_curves", "plot_predictions", "plot_side_by_side", "plot_validation"]

BLUE, ORANGE, GREEN, RED, GREY = "#1f77b4", "#d95f02", "#1b7837", "#c0392b", "#666666"


@dataclass(frozen=True)
class Prediction:
    """An image and what the model says about it. `truth` is None where nobody knows."""

    image: Image.Image
    label: str
    probability: float
    truth: str | None = None

    @property
    def wrong(self) -> bool:
        return self.truth is not None and self.truth != self.label


@dataclass(frozen=True)
class Curves:
    """One run of several: its name and its (updates, loss) points."""

    title: str
    train: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]


def plot_curves(rows: Sequence[dict[str, Any]], path: str | Path, *, title: str) -> None:
    """Loss, accuracy and learning rate over the epochs, from the rows of `report.read_log`."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    losses, accuracies, rates = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    _line(losses, rows, "train_loss", "training (augmented)", BLUE)
    _line(losses, rows, "val_loss", "validation", ORANGE)
    losses.set(ylabel="cross-entropy", title="Loss")
    last = next((f" (last: {r['val_top1']:.2f} %)" for r in reversed(rows) if r["val_top1"] is not None), "")
    _line(accuracies, rows, "val_top1", f"validation top-1{last}", ORANGE)
    _line(accuracies, rows, "val_top5", "validation top-5", GREY, linestyle="--")
    accuracies.set(ylabel="images, %", title="Accuracy")
    _line(rates, rows, "lr", "", GREEN)
    rates.set(ylabel="learning rate at the end of the epoch", title="Schedule")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, accuracies, rates):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_side_by_side(runs: Sequence[Curves], path: str | Path, *, title: str, xlabel: str, ylabel: str) -> None:
    """A panel for each run, in the order given, all on the same axes; the others' training curves stand behind in grey."""
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = np.asarray(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    for i, axes in enumerate(panels):
        if i >= len(runs):
            axes.set_axis_off()
            continue
        for other in runs:
            if other is not runs[i]:
                axes.plot(*zip(*other.train, strict=True), color="#dddddd", linewidth=0.9)
        axes.plot(*zip(*runs[i].train, strict=True), color=BLUE, label="training")
        axes.plot(*zip(*runs[i].held_out, strict=True), color=ORANGE, marker="o", markersize=3.5, label="held out")
        axes.set_title(runs[i].title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if i + columns >= len(runs):  # nothing below it
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(ylabel)
    lowest = min(loss for run in runs for _, loss in (*run.train, *run.held_out))
    highest = max(run.train[len(run.train) // 20][1] for run in runs)  # the very first updates would flatten all that follows
    panels[0].set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest) or None)
    panels[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_validation(
    confusion: np.ndarray, names: Sequence[str], predictions: Sequence[Prediction], path: str | Path, *, title: str
) -> None:
    """The confusion matrix, and beside it a few images with what the model says about them.

    Shape: confusion (K, K), row: true class, column: predicted class.
    """
    figure = Figure(figsize=(12.5 if predictions else 7, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    if predictions:
        left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1.15, 1)))
        _draw_confusion(left.subplots(), confusion, names)
        _draw_predictions(right, predictions)
        wrong = " (red: wrong)" if any(p.wrong for p in predictions) else ""
        right.suptitle(f"What the model says, and how sure it is{wrong}", fontsize=11)
    else:
        _draw_confusion(figure.subplots(), confusion, names)
    _save(figure, path)


def plot_predictions(predictions: Sequence[Prediction], path: str | Path, *, title: str) -> None:
    """Images with what the model says about them."""
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    _draw_predictions(figure, predictions)
    _save(figure, path)


def _line(axes: Any, rows: Sequence[dict[str, Any]], key: str, label: str, color: str, **style: Any) -> None:
    points = [(r["epoch"] + 1, r[key]) for r in rows if r[key] is not None]
    if points:
        marker = "o" if len(points) < 4 else None
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=4, **style)


def _draw_confusion(axes: Any, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Colour: share of the true class's images; numbers (up to 20 classes): how many."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="predicted class", ylabel="true class", title="Confusion matrix" + (" (numbers: images)" if len(names) <= 20 else "")
    )
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(confusion > 0):
            color = "white" if share[row, column] > 0.5 else RED if row != column else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color, fontsize=9)
    axes.figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class's images")


def _draw_predictions(figure: Any, predictions: Sequence[Prediction]) -> None:
    columns = max(1, int(np.ceil(np.sqrt(len(predictions)))))
    rows = -(-len(predictions) // columns)
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, prediction in zip(grid, predictions, strict=False):
        grey = prediction.image.mode == "L"
        axes.imshow(np.asarray(prediction.image), cmap="gray" if grey else None, interpolation="nearest")
        text = f"{prediction.label} ({100 * prediction.probability:.0f} %)"
        if prediction.wrong:
            text += f"\nis {prediction.truth}"
        axes.set_title(text, fontsize=10, color=RED if prediction.wrong else GREEN if prediction.truth is not None else "black")


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with matplotlib.rc_context({"font.size": 10}):
        FigureCanvasAgg(figure).print_figure(temporary, dpi=120, format="png")
    replace_file(temporary, path)
