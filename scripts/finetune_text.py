#!/usr/bin/env python
"""Train a Hugging Face decoder on with other attention. Thin: everything is in `attention_zoo.training.finetune`."""

from __future__ import annotations

from typing import Annotated

import typer

from attention_zoo.training.console import stderr, stdout, user_errors


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one of the zoo's recipes: finetune/tiny_llama_swaps.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run; short for output.root and output.name.")] = None,
) -> None:
    """Train a Hugging Face decoder on, swapped now or by scripts/swap.py before, with transformers.Trainer; LoRA is an option.

    Examples:

      python scripts/finetune_text.py finetune/tiny_llama

      python scripts/finetune_text.py finetune/tiny_llama_swaps

      python scripts/finetune_text.py finetune/llama_cca model.path=meta-llama/Llama-3.1-8B data.name=corpus.txt lora.rank=16

    `finetune_text.py list` names the zoo's recipes for it; `finetune_text.py keys` prints every key with its default; what they
    mean is in attention_zoo/training/finetune.py. The folder gets the model (attention_zoo.from_pretrained reads it), recipe.yaml,
    results.md and results.json; with variants each has a folder of its own below it.
    """
    with user_errors():
        from pathlib import Path

        from attention_zoo.training.finetune import FinetuneRecipe, FinetuneRun, as_markdown, prepare, runs_of, write_results
        from attention_zoo.training.loop import TrainingDivergedError
        from attention_zoo.training.recipe import describe_recipe, list_recipes, read_recipe

        if recipe in ("list", "keys"):
            found = list_recipes(FinetuneRecipe) if recipe == "list" else [describe_recipe(FinetuneRecipe)]
            stdout.print("\n".join(found), markup=False)
            return
        where = [] if output is None else [f"output.root={str(Path(output).parent)!r}", f"output.name={Path(output).name!r}"]
        loaded = read_recipe(FinetuneRecipe, recipe, [*(overrides or []), *where])
        for name, run in runs_of(loaded).items() if loaded.variants else ():
            prepare(run, name, measure=False)  # what is wrong with the last is said before the first is trained
    runs: list[FinetuneRun] = []
    for name, run in runs_of(loaded).items():
        with user_errors():
            job = prepare(run, name)
        try:
            runs.append(job.run(stdout))
        except TrainingDivergedError as error:
            stderr.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
        folder = write_results(loaded, runs)  # after each: what is done is not lost with what fails
    stdout.print(as_markdown(runs), markup=False)
    stdout.print(f"everything is in {folder}/", markup=False)


if __name__ == "__main__":
    typer.run(main)
