#!/usr/bin/env python
"""Compare mechanisms in up-training. Thin: everything is in `attention_zoo.training.uptrain`."""

from __future__ import annotations

from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors


def main(
    base: Annotated[str, typer.Argument(help="Recipe of the model to start from; it is trained if its run is not there.")],
    recipe: Annotated[str, typer.Argument(help="Recipe of up-training, with a model.swap.")],
    mechanisms: Annotated[list[str], typer.Argument(help="name, or name:option=value,... with options beyond the recipe's.")],
    override: Annotated[list[str] | None, typer.Option(help="section.key=value for both recipes; repeat it.")] = None,
    root: Annotated[str, typer.Option(help="Folder of the runs.")] = "runs",
) -> None:
    """Train an image classifier, swap each mechanism into it, train each on, and compare: as it was, converted, up-trained.

    Key-Driven Grouped Query Attention (arXiv 2408.08454) starts from a mean-pooled checkpoint in this way.

    Example:

      python scripts/uptrain.py train/vit_digits finetune/vit_kdgqa_digits gqa kdgqa dgqa:kind=ema,window_size=22,eval_update=false

    The folder of the second recipe's name gets results.md, results.json and the run of each mechanism.
    """
    with user_errors():
        from attention_zoo.training.recipe import load_recipe
        from attention_zoo.training.uptrain import as_markdown, plan_uptraining, uptrain, write_uptraining

        said = [*(override or []), f"output.root={root!r}"]
        first, second = load_recipe(base, said), load_recipe(recipe, said)
        plan_uptraining(second, mechanisms)
    runs = uptrain(first, second, mechanisms, stdout)
    folder = write_uptraining(second, first, runs)
    stdout.print(as_markdown(runs), markup=False)
    stdout.print(f"results.md, results.json and the runs are in {folder}/", markup=False)


if __name__ == "__main__":
    typer.run(main)
