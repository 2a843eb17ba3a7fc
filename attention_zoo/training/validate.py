"""A checkpoint measured on labelled images: what `scripts/validate.py` runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from attention_zoo.training.checkpoint import Description, load_model, read_description
from attention_zoo.training.data import ImageSet, InputConfig, input_config, open_images, validation_loader
from attention_zoo.training.evaluate import ClassResult, Evaluation, evaluate
from attention_zoo.training.plots import Prediction, plot_validation
from attention_zoo.training.recipe import DataRecipe, RecipeError, apply_overrides, make_recipe

__all__ = ["ValidationJob", "prepare_validation", "report_validation", "write_validation"]


@dataclass(frozen=True)
class ValidationJob:
    """A model and the images to measure it on."""

    checkpoint: Path
    description: Description
    model: nn.Module
    input: InputConfig
    data: DataRecipe
    split: str
    images: ImageSet
    loader: DataLoader
    device: torch.device

    def run(self) -> Evaluation:
        return evaluate(self.model, self.loader, len(self.images.class_names), device=self.device)


def prepare_validation(
    checkpoint: str | Path, overrides: Iterable[str] = (), *, model: str | None = None, split: str | None = None, cpu: bool = False
) -> ValidationJob:
    """Load the model and open the images.

    Args:
        checkpoint: a weights file.
        overrides: `data.key=value`, `model.kwargs.key=value`, ... over what the file says about itself.
        model: name of the model, for a file that says nothing.
        split: default: the validation split.

    Raises:
        CheckpointError, RecipeError, FileNotFoundError: what is wrong with the file, the settings or the images.
    """
    described = read_description(checkpoint)
    content: dict[str, Any] = {} if described is None else _content(described)
    content.setdefault("model", {})
    if model is not None:
        content["model"]["name"] = model
    elif described is None and not any(o.startswith("model.name=") for o in overrides):
        raise RecipeError(f"{checkpoint} does not say which model it holds: name it with --model")
    apply_overrides(content, overrides)
    recipe = make_recipe(content)
    chosen = Description(
        model=recipe.model.name,
        attention=recipe.model.attention,
        attention_kwargs=recipe.model.attention_kwargs,
        kwargs=recipe.model.kwargs,
        zoo_swap=described.zoo_swap if described is not None else [],
        class_names=described.class_names if described is not None else (),
    )
    network, _ = load_model(checkpoint, chosen)
    split = recipe.data.val_split if split is None else split
    images = open_images(recipe.data, split, class_names=chosen.class_names or None)
    outputs = getattr(network, "num_classes", len(images.class_names))
    if outputs != len(images.class_names):
        raise RecipeError(f"the model has {outputs} classes, {recipe.data.name} has {len(images.class_names)}")
    kwargs = recipe.model.kwargs
    form = input_config(network, recipe.data, img_size=kwargs.get("img_size"), in_chans=kwargs.get("in_chans"))
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    return ValidationJob(
        checkpoint=Path(checkpoint),
        description=chosen,
        model=network.to(device),
        input=form,
        data=recipe.data,
        split=split,
        images=images,
        loader=validation_loader(images, form, recipe.data),
        device=device,
    )


def write_validation(job: ValidationJob, results: Evaluation, folder: Path, *, samples: int = 16) -> None:
    """results.json, per_class.csv, confusion_matrix.csv (row: true class) and validation.png."""
    folder.mkdir(parents=True, exist_ok=True)
    names = job.images.class_names
    classes = results.per_class(names)
    summary = {
        "checkpoint": str(job.checkpoint),
        "model": job.description.model,
        "data": job.data.name,
        "split": job.split,
        "images": results.images,
        **results.metrics(),
        "per_class": [asdict(c) for c in classes],
    }
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(ClassResult)])
        writer.writerows([c.name, c.images, f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.f1:.4f}"] for c in classes)
    with (folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, results.confusion.tolist(), strict=True))
    title = f"{job.description.model} on {job.data.name} ({job.split}): {results.top1:.2f} % of {results.images} images right"
    plot_validation(results.confusion, names, _samples(job, results, samples), folder / "validation.png", title=title)


def report_validation(job: ValidationJob, results: Evaluation, console: Console, *, most: int = 20) -> None:
    """A table on the screen: all classes, or the `most` with the lowest F1."""
    classes = results.per_class(job.images.class_names)
    shown = classes if len(classes) <= most else sorted(classes, key=lambda c: c.f1)[:most]
    table = Table("class", title="results per class, %" + ("" if shown is classes else f" (the {most} weakest of {len(classes)})"))
    for column in ("images", "precision", "recall", "F1"):
        table.add_column(column, justify="right")
    for c in shown:
        table.add_row(c.name, str(c.images), f"{c.precision:.2f}", f"{c.recall:.2f}", f"{c.f1:.2f}")
    console.print(table)
    console.print(
        f"top-1 {results.top1:.2f} %, top-5 {results.top5:.2f} %, loss {results.loss:.4f} on {results.images} images "
        f"({job.data.name}, {job.split})",
        markup=False,
    )


def _content(described: Description) -> dict[str, Any]:
    """The description as the sections of a recipe; the form of the input is the one that the model was trained with."""
    form = {k: described.input[k] for k in ("mean", "std", "interpolation", "crop_pct") if k in described.input}
    return {
        "model": {
            "name": described.model,
            "attention": described.attention,
            "attention_kwargs": described.attention_kwargs,
            "kwargs": described.kwargs,
        },
        "data": {**described.data, **form},
    }


@torch.no_grad()
def _samples(job: ValidationJob, results: Evaluation, count: int) -> list[Prediction]:
    """`count` images, up to half of them mistakes, the mistakes first; chosen by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(results.truth))
    wrong = [int(i) for i in order if results.truth[i] != results.predicted[i]][: count // 2]
    right = [int(i) for i in order if results.truth[i] == results.predicted[i]][: count - len(wrong)]
    names, transform, shown = job.images.class_names, job.input.transform(), []
    for index in [*wrong, *right]:
        image, label = job.images.images[index]
        image = image.convert(job.input.mode)
        probabilities = job.model(transform(image)[None].to(job.device)).float().softmax(dim=-1)[0]
        probability, predicted = probabilities.max(dim=0)
        shown.append(Prediction(image, names[int(predicted)], float(probability), names[int(label)]))
    return shown
