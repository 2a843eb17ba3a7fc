#!/usr/bin/env python
"""Measure a checkpoint on labelled images. Thin: everything is in `attention_zoo.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Weights: ours (.safetensors), or official ones together with --model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="data.key=value, model.kwargs.key=value, ...")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, for a file that does not say (an official one).")] = None,
    split: Annotated[str | None, typer.Option(help="Split to measure on; default: the validation split.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: validation/ beside the weights.")] = None,
    samples: Annotated[int, typer.Option(help="Images in the picture, half of them mistakes if there are.", min=0)] = 16,
    cpu: Annotated[bool, typer.Option(help="Stay on the CPU although there is a GPU.")] = False,
) -> None:
    """Measure a checkpoint: top-1, top-5, loss, results per class, confusion matrix.

    A checkpoint of train.py says which model it holds and what data it was trained on; the held-out split of the same data is the
    default. Writes results.json, per_class.csv, confusion_matrix.csv and validation.png.

    Examples:

      python scripts/validate.py runs/litv2_digits/model.safetensors

      python scripts/validate.py litv2_s.pth --model litv2_s data.name=folder data.root=/data/imagenet
    """
    with user_errors():
        from attention_zoo.training.validate import prepare_validation, report_validation, write_validation

        job = prepare_validation(checkpoint, overrides or [], model=model, split=split, cpu=cpu)
    results = job.run()
    folder = output if output is not None else checkpoint.absolute().parent / "validation"
    write_validation(job, results, folder, samples=samples)
    report_validation(job, results, stdout)
    stdout.print(f"results.json, per_class.csv, confusion_matrix.csv and validation.png are in {folder}/", markup=False)


if __name__ == "__main__":
    typer.run(main)
