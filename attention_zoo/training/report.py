"""What a run tells while it runs: a table in CSV, TensorBoard, and progress on the screen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from attention_zoo.training.checkpoint import replace_file

__all__ = ["COLUMNS", "CsvLog", "ProgressReport", "TensorBoardLog", "read_log"]

COLUMNS = ("epoch", "step", "lr", "train_loss", "aux_loss", "val_loss", "val_top1", "val_top5", "images_per_second", "seconds")


class CsvLog:
    """One row per epoch. The file is rewritten whole at each row, so a kill never leaves half a line."""

    def __init__(self, path: str | Path, *, first_epoch: int = 0) -> None:
        """Go on with the file at `path`: rows from `first_epoch` on are dropped, since that epoch is run (again)."""
        self.path = Path(path)
        self.rows = [row for row in read_log(path) if row["epoch"] < first_epoch] if first_epoch and self.path.exists() else []

    def add(self, row: dict[str, float | None]) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(
                {k: "" if (v := r.get(k)) is None else v if isinstance(v, int) else f"{v:.6g}" for k in COLUMNS} for r in self.rows
            )
        replace_file(temporary, self.path)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `CsvLog`: numbers, and None where a column was left empty."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    whole = ("epoch", "step")
    return [{k: None if not v else int(v) if k in whole else float(v) for k, v in row.items()} for row in rows]


class TensorBoardLog:
    """Scalars for TensorBoard; does nothing when switched off."""

    def __init__(self, folder: Path, *, enabled: bool, purge_step: int | None = None) -> None:
        self.writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add(self, step: int, **scalars: float | None) -> None:
        if self.writer is not None:
            for name, value in scalars.items():
                if value is not None:
                    self.writer.add_scalar(name.replace("__", "/"), value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class ProgressReport:
    """A bar on a terminal, plain lines elsewhere, nothing on the devices that are not the first."""

    def __init__(self, console: Console, *, enabled: bool, epochs: int, updates_per_epoch: int) -> None:
        self.console, self.enabled, self.epochs, self.updates = console, enabled, epochs, updates_per_epoch
        self.bar: Progress | None = None
        if enabled and console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=epochs * updates_per_epoch)

    def __enter__(self) -> ProgressReport:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def line(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, markup=False)

    def update(self, epoch: int, step_in_epoch: int, loss: float | None) -> None:
        """After an update; `loss` where it is known."""
        done = epoch * self.updates + step_in_epoch
        if self.bar is not None:
            shown = {"description": f"epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}"} if loss is not None else {}
            self.bar.update(self.task, completed=done, **shown)  # type: ignore[arg-type]
        elif loss is not None:
            self.line(f"epoch {epoch + 1}/{self.epochs}  update {step_in_epoch}/{self.updates}  loss {loss:.4f}")
