#!/usr/bin/env python
"""Train an image classifier from a recipe. Thin: everything is in `attention_zoo.training`."""

from __future__ import annotations

from typing import Annotated

import typer

from attention_zoo.training.console import stderr, stdout, user_errors


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one of the zoo's recipes: train/litv2_digits.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them.")] = None,
    resume: Annotated[str | None, typer.Option(help='"auto" (newest checkpoint, if any) or the folder of a checkpoint.')] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run; short for output.root and output.name.")] = None,
) -> None:
    """Train an image classifier from a recipe (YAML) and overrides.

    Examples:

      python scripts/train.py train/litv2_digits

      python scripts/train.py train/litv2_digits optimizer.lr=1e-3 model.kwargs.embed_dim=48 --output runs/wide

      accelerate launch --num_processes 8 scripts/train.py train/litv2_s_imagenet data.root=/data/imagenet --resume auto

    `train.py list` names the zoo's recipes; `train.py keys` prints every key with its default; what they mean is in
    attention_zoo/training/recipe.py. The run's folder gets recipe.yaml, log.csv, tensorboard/, checkpoints/, curves.png,
    best.safetensors and model.safetensors. SIGTERM or Ctrl-C saves a checkpoint first; the exit code is then 128 plus the
    signal's number.
    """
    with user_errors():
        from pathlib import Path

        from attention_zoo.training.recipe import describe_recipe, list_recipes, load_recipe

        if recipe in ("list", "keys"):
            stdout.print("\n".join(list_recipes()) if recipe == "list" else describe_recipe(), markup=False)
            return
        where = [] if output is None else [f"output.root={str(Path(output).parent)!r}", f"output.name={Path(output).name!r}"]
        loaded = load_recipe(recipe, [*(overrides or []), *where])
        from attention_zoo.training.loop import Stopped, Trainer, TrainingDivergedError

        trainer = Trainer(loaded, resume=resume, console=stdout)
    try:
        result = trainer.fit()
    except Stopped as stopped:
        stderr.print(str(stopped), markup=False)
        raise typer.Exit(128 + stopped.signum) from None
    except TrainingDivergedError as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if trainer.accelerator.is_main_process:
        summary = f"top-1 {result.top1:.2f} %, loss {result.loss:.4f} on {result.images} images"
        stdout.print(f"{summary}; everything is in {trainer.run.folder}/", markup=False)


if __name__ == "__main__":
    typer.run(main)
