#!/usr/bin/env python
"""Grow the signal heads of a saved decoder with grouped differential attention. Thin: everything is in `attention_zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a decoder of the zoo with `gda`, as save_pretrained wrote it.")],
    target: Annotated[Path, typer.Argument(help="Folder for the grown one; it must not exist.")],
    factor: Annotated[int, typer.Option(help="Copies of each signal head, the original included.", min=1)] = 2,
    noise: Annotated[float, typer.Option(help="Deviation of what is added to the copies' queries, relative to theirs.")] = 0.01,
    snr_db: Annotated[float | None, typer.Option(help="The same as a signal-to-noise ratio in decibels, instead.")] = None,
    symmetric: Annotated[bool, typer.Option(help="Repeat the noise heads too, as the paper's baseline.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Grow a checkpoint (Grouped Differential Attention, arXiv 2510.06949): more signal heads, the same keys, values and cache.

    Without noise the grown model computes exactly what the source does, but the copies of a head never part in training; with a
    little of it, the default, they do.

    Example:

      python scripts/grow.py runs/motif_small runs/motif_grown --factor 4
    """
    with user_errors():
        import torch
        from transformers import AutoModelForCausalLM

        import attention_zoo as az

        if target.exists():
            raise ValueError(f"{target} exists; nothing is written over")
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
        torch.manual_seed(seed)
        grown = az.grow_model(model, factor, noise=0.0 if snr_db is not None else noise, snr_db=snr_db, symmetric=symmetric)
    grown.save_pretrained(target)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, grown))
    report = az.cache_report(grown, 1024)
    stdout.print(f"{source}: {before:,} parameters, {model.config.num_attention_heads} signal heads in each layer", markup=False)
    stdout.print(f"{target}: {after:,} parameters, {grown.config.num_attention_heads} signal heads in each layer", markup=False)
    stdout.print(
        f"cache, bytes per token: {report.cache_bytes_per_token:,.0f}" + ("" if symmetric else ", as before"), markup=False
    )


if __name__ == "__main__":
    typer.run(main)
