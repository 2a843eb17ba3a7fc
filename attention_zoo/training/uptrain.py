"""Up-training compared: one image classifier, several mechanisms swapped into it, each learning on as the same recipe says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attention_zoo as az
from attention_zoo.training.checkpoint import Run, replace_file
from attention_zoo.training.loop import Trainer
from attention_zoo.training.recipe import ModelRecipe, Recipe, RecipeError, SwapRecipe
from attention_zoo.training.swap import read_options

__all__ = ["UptrainRun", "as_markdown", "plan_uptraining", "uptrain", "write_uptraining"]


@dataclass(frozen=True)
class UptrainRun:
    """One mechanism's way: accuracies are top-1 of the held-out images in per cent.

    Attributes:
        mechanism: its name; "" the model before the swap.
        options: of the mechanism.
        parameters: of the whole model.
        converted: right after the swap; None: before the swap.
        trained: at the end.
        epochs: of up-training.
    """

    mechanism: str
    options: dict[str, Any]
    parameters: int
    converted: float | None
    trained: float
    epochs: int


def plan_uptraining(recipe: Recipe, mechanisms: Sequence[str]) -> list[SwapRecipe]:
    """What is swapped in each run.

    Args:
        recipe: of up-training; its swap says how, whatever the mechanism.
        mechanisms: "name", or "name:option=value,..." with options beyond the recipe's.

    Raises:
        RecipeError: a recipe without a swap of one mechanism, options that are not written so, a mechanism that is named twice.
        UnknownNameError: no such mechanism.
        FileExistsError: the folder of a run holds checkpoints.
    """
    if recipe.model.swap is None or recipe.model.swap.map:
        raise RecipeError("up-training swaps one mechanism: the recipe needs model.swap.mechanism")
    swaps: list[SwapRecipe] = []
    for text in mechanisms:
        name, _, options = text.partition(":")
        az.attention_info(name)
        if name in (swap.mechanism for swap in swaps):
            raise RecipeError(f"{name!r} is named twice")
        if Run(_folder(recipe) / name).checkpoints():
            raise FileExistsError(f"{_folder(recipe) / name} holds the checkpoints of a run: remove it, or take another root")
        own = read_options(filter(None, options.split(",")))
        swaps.append(replace(recipe.model.swap, mechanism=name, options={**recipe.model.swap.options, **own}))
    return swaps


def uptrain(base: Recipe, recipe: Recipe, mechanisms: Sequence[str], console: Console) -> list[UptrainRun]:
    """Train `base` unless its run is finished, then swap and train with each mechanism in the place of the recipe's.

    Raises: see `plan_uptraining` and `Trainer`.
    """
    swaps = plan_uptraining(recipe, mechanisms)
    weights = _folder(base) / "model.safetensors"
    if not weights.is_file():
        console.print(f"the model that is up-trained, {weights.parent}", markup=False)
        Trainer(base, console=console).fit()
    before = Trainer(_start_from(recipe, weights, None, "before"), console=console)
    measured = before.measure()
    runs = [UptrainRun("", {}, _count(before), None, measured.top1, 0)]
    for swap in swaps:
        name = str(swap.mechanism)
        trainer = Trainer(_start_from(recipe, weights, swap, name), console=console)
        last = trainer.fit()
        assert trainer.first is not None
        epochs = recipe.schedule.epochs
        runs.append(UptrainRun(name, swap.options, _count(trainer), trainer.first.top1, last.top1, epochs))
    return runs


def as_markdown(runs: Sequence[UptrainRun]) -> str:
    """The table."""
    lines = ["| attention | parameters | converted | up-trained |", "|---|--:|--:|--:|"]
    for run in runs:
        name = "".join([run.mechanism or "as it was", *(f", {k}={v}" for k, v in run.options.items())])
        after = "-" if run.converted is None else f"{run.trained:.2f} %"
        first = run.trained if run.converted is None else run.converted
        lines.append(f"| {name} | {run.parameters:,} | {first:.2f} % | {after} |")
    return "\n".join(lines) + "\n"


def write_uptraining(recipe: Recipe, base: Recipe, runs: Sequence[UptrainRun]) -> Path:
    """results.json and results.md in the recipe's folder; returns it."""
    folder = _folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    content = {"base": base.to_dict(), "recipe": recipe.to_dict(), "where": where, "runs": [asdict(run) for run in runs]}
    for name, text in (("results.json", json.dumps(content, indent=1) + "\n"), ("results.md", as_markdown(runs))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, folder / name)
    return folder


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.output.root) / (recipe.output.name or "run")


def _start_from(recipe: Recipe, weights: Path, swap: SwapRecipe | None, name: str) -> Recipe:
    """The recipe with the base's weights, another swap, and a run of its own."""
    model: ModelRecipe = replace(recipe.model, checkpoint_path=str(weights), pretrained=False, swap=swap)
    output = replace(recipe.output, root=str(_folder(recipe)), name=name, validate_first=True)
    return replace(recipe, model=model, output=output)


def _count(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.module.parameters())
