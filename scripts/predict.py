#!/usr/bin/env python
"""Say what is on an image. Thin: everything is in `attention_zoo.training`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Weights: ours (.safetensors), or official ones together with --model.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top_k: Annotated[int, typer.Option(help="How many classes to name.", min=1)] = 5,
    model: Annotated[str | None, typer.Option(help="Name of the model, for a file that does not say (an official one).")] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file, a class name on each line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the images with their first class into this PNG.")] = None,
    cpu: Annotated[bool, typer.Option(help="Stay on the CPU although there is a GPU.")] = False,
) -> None:
    """Say what is on each image: the k most probable classes.

    Example:

      python scripts/predict.py runs/litv2_digits/model.safetensors seven.png --top-k 3
    """
    with user_errors():
        from attention_zoo.training.predict import draw, predict, prepare_prediction

        predictor = prepare_prediction(checkpoint, model=model, classes=classes, cpu=cpu)
        results = predict(predictor, images, top_k)
        if picture is not None:
            draw(results, picture)
    if as_json:
        stdout.print(json.dumps([result.to_dict() for result in results], indent=2), markup=False)
        return
    for result in results:
        named = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in result.classes)
        stdout.print(f"{result.path}: {named}", markup=False)


if __name__ == "__main__":
    typer.run(main)
