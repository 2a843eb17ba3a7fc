#!/usr/bin/env python
"""Compare the causal mechanisms on text. Thin: everything is in `attention_zoo.training.text`."""

from __future__ import annotations

from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors


def main(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of the zoo.")] = "train/text_decoders",
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the results; short for output.root and output.name.")] = None,
) -> None:
    """Train a small decoder with each causal mechanism on the same text, in the same order, and compare them.

    Examples:

      python scripts/train_text.py

      python scripts/train_text.py train/text_decoders "model.mechanisms=[gqa, cca]" schedule.epochs=5 --output runs/two

    `train_text.py list` names the zoo's recipes for it; `train_text.py keys` prints every key with its default; what they mean is
    in attention_zoo/training/text.py. The folder gets curves.png, results.md (a table, and what each model writes) and
    results.json.
    """
    with user_errors():
        from pathlib import Path

        from attention_zoo.training.recipe import describe_recipe, list_recipes, read_recipe
        from attention_zoo.training.text import TextRecipe, as_markdown, compare, open_texts

        if recipe in ("list", "keys"):
            found = list_recipes(TextRecipe) if recipe == "list" else [describe_recipe(TextRecipe)]
            stdout.print("\n".join(found), markup=False)
            return
        where = [] if output is None else [f"output.root={str(Path(output).parent)!r}", f"output.name={Path(output).name!r}"]
        loaded = read_recipe(TextRecipe, recipe, [*(overrides or []), *where])
        open_texts(loaded.data)  # what is wrong with them is said before anything is trained
    runs = compare(loaded, stdout)
    stdout.print(as_markdown(loaded, runs), markup=False)
    stdout.print(f"curves.png, results.md and results.json are in {loaded.output.root}/{loaded.output.name}/", markup=False)


if __name__ == "__main__":
    typer.run(main)
