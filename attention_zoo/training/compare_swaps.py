"""Mechanisms compared in a pretrained sentence encoder: what a swap does to its embeddings, and what distilling brings back."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from rich.console import Console
from torch import nn

import attention_zoo as az
from attention_zoo.attention.kdgqa import KeyDrivenGroupedQueryAttention
from attention_zoo.swap.convert import Plan, check_plan
from attention_zoo.swap.core import find_hosts
from attention_zoo.swap.report import LayerSwap
from attention_zoo.training.checkpoint import replace_file
from attention_zoo.training.distill import DistillRecipe, Sentences, compare_embeddings, distill, embed, open_sentences

__all__ = [
    "CASES",
    "PRESERVED",
    "Case",
    "as_markdown",
    "compare",
    "hosts_table",
    "load_encoder",
    "refusals",
    "run_case",
    "swap",
    "write_page",
    "write_results",
]

PRESERVED = 1e-5  # largest difference of an embedding's channels up to which it counts as the same

_LONGER = {"alone_steps": 800}
_SHARED_OUT = {"alone_steps": 1500, "together_steps": 100, "together_lr": 5e-4}  # query heads that read other heads' keys now
# With half of the heads gone a layer alone cannot answer as it did, but the layers together can.
_TOGETHER = {"alone_steps": 0, "together_steps": 500, "together_lr": 1e-3}


@dataclass(frozen=True)
class Case:
    """A row of the comparison.

    Attributes:
        mechanism: its name.
        note: what the options mean.
        init, options: of `swap_attention`.
        layers: numbers of the layers that are swapped; None: all.
        recipe: fields of the `DistillRecipe` that differ from its defaults.
        freeze: KDGQA: allocate query heads once, by the norms of a batch of sentences, and keep that.
    """

    mechanism: str
    note: str
    init: str = "convert"
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    freeze: bool = False

    @property
    def name(self) -> str:
        """The mechanism and the note."""
        return f"{self.mechanism}, {self.note}"


CASES = (
    Case("mha", "the plain mechanism"),
    Case("gqa", "12 key/value heads", options={"num_kv_heads": 12}),
    Case("moh", "all 12 heads active"),
    Case("diff", "v2"),
    Case("gda", "v2, a noise head for each head"),
    Case("dgqa", "12 key/value heads, frozen in evaluation", options={"num_kv_heads": 12, "eval_update": False}),
    Case("pgqa", "12 key/value heads, no noise", options={"num_kv_heads": 12, "noise_mode": "never"}),
    Case("combiner", "window of 512, all tokens", options={"window_size": 512}),
    Case("moh", "9 of 12 heads active", options={"routed_topk": 3}, recipe={"alone_lr": 1e-3}),
    Case("moh", "6 of 12 heads active", options={"shared_heads": 4, "routed_topk": 2}, recipe=_TOGETHER),
    Case("agent", "49 agents", options={"agent_num": 49}),
    Case("agent", "16 agents", options={"agent_num": 16}),
    Case("combiner", "segments of 8", options={"window_size": 8}),
    Case("combiner", "segments of sqrt(N)"),
    Case("gqa", "6 key/value heads", "mean_pool", {"num_kv_heads": 6}),
    Case("dgqa", "6 key/value heads, frozen in evaluation", "mean_pool", {"num_kv_heads": 6, "eval_update": False}),
    Case("pgqa", "6 key/value heads", "mean_pool", {"num_kv_heads": 6}),
    Case(
        "pgqa",
        "6 key/value heads, without the last layer",
        "mean_pool",
        {"num_kv_heads": 6},
        layers=[0, 1, 2, 3, 4],
        recipe={"together_steps": 100, "together_lr": 5e-4},
    ),
    Case("kdgqa", "12 key/value heads, allocated once", options={"num_kv_heads": 12}, recipe=_SHARED_OUT, freeze=True),
    Case("gda", "v2, 6 noise heads and key/value heads", options={"num_noise_heads": 6}),
    Case("diff", "v1", options={"version": "v1"}, recipe=_LONGER),
    Case("mha", "new weights, for contrast", "random"),
)


def load_encoder(folder: str | Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer."""
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def swap(model: nn.Module, case: Case, tokenizer: Any, sentences: Sequence[str]) -> Any:
    """Swap as the case says; the report. New weights are drawn from a fixed seed."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the converted layer does not compute", UserWarning)  # the report says it
        report = az.swap_attention(model, case.mechanism, layers=case.layers, init=case.init, **case.options)
    if case.freeze:
        embed(model, tokenizer, sentences, len(sentences))
        for module in model.modules():
            if isinstance(module, KeyDrivenGroupedQueryAttention):
                module.freeze_allocation()
    return report


def run_case(case: Case, folder: str, sentences: Sentences, recipe: DistillRecipe) -> dict[str, Any]:
    """One row, as plain data: the embeddings right after the swap and, where they are not the original's, after distilling."""
    torch.set_num_threads(1)
    (teacher, tokenizer), (model, _) = load_encoder(folder), load_encoder(folder)
    want, originals = embed(teacher, tokenizer, sentences.held_out), _attention_layers(teacher)
    report = swap(model, case, tokenizer, sentences.train[:64])
    got = embed(model, tokenizer, sentences.held_out)
    layers, swapped = report.layers, {layer.name for layer in report.layers}
    row = {
        **asdict(case),
        "recipe": None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention_flops": sum(layer.flops_after or 0 for layer in layers)
        + sum(layer.flops_before for layer in originals if layer.name not in swapped),
        "num_tokens": layers[0].num_tokens,
        "difference": (got - want).abs().max().item(),
        "swapped": asdict(compare_embeddings(got, want)),
        "distilled": None,
        "seconds": None,
    }
    if row["difference"] > PRESERVED:
        recipe, started = replace(recipe, **case.recipe), time.perf_counter()
        distill(model, teacher, tokenizer, [layer.name for layer in layers], sentences.train, recipe)
        row |= {"recipe": asdict(recipe), "seconds": time.perf_counter() - started}
        row["distilled"] = asdict(compare_embeddings(embed(model, tokenizer, sentences.held_out), want))
    return row


def _attention_layers(model: nn.Module) -> tuple[LayerSwap, ...]:
    """All of the model's, as the report of a swap has them."""
    return az.swap_attention(model, "gqa", dry_run=True).layers


def compare(
    folder: str | Path,
    path: Path,
    console: Console,
    *,
    cases: Sequence[Case] = CASES,
    recipe: DistillRecipe | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run the cases, `jobs` at a time on a core each, and write what has come out after each; the results as plain data.

    Rows of `CASES` that are not among the cases are kept from the results that are there.

    Raises:
        OSError: no model is there.
    """
    (model, _), sentences, recipe = load_encoder(folder), open_sentences(), recipe or DistillRecipe()
    layers = _attention_layers(model)
    results: dict[str, Any] = {
        "where": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "jobs": jobs,
        },
        "sentences": {"train": len(sentences.train), "held_out": len(sentences.held_out)},
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention_flops": sum(layer.flops_before for layer in layers),
            "num_tokens": layers[0].num_tokens,
        },
        "rows": [],
        "refused": refusals(model, {case.mechanism for case in CASES}),
    }
    console.print(f"{len(sentences.train)} sentences, {len(sentences.held_out)} held out; {len(cases)} cases")
    job = partial(run_case, folder=str(folder), sentences=sentences, recipe=recipe)
    rows = {_name(row): row for row in (json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else [])}
    for case in cases:
        rows.pop(_name(asdict(case)), None)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(job, case) for case in cases]):
            row = finished.result()
            rows[_name(row)] = row
            results["rows"] = [rows[name] for name in (_name(asdict(case)) for case in CASES) if name in rows]
            console.print(f"{_name(row)}: {_cosine(row['swapped'])} -> {_cosine(row['distilled'])}", markup=False)
            write_results(results, path)
    return results


def refusals(model: nn.Module, compared: set[str]) -> dict[str, str]:
    """Mechanisms that are not compared, and why the first layer of the model does not take them."""
    reasons = {}
    for name in az.list_attentions():
        if name in compared:
            continue
        try:
            az.swap_attention(model, name, init="random", layers=0, dry_run=True)
        except ValueError as error:
            reasons[name] = str(error).splitlines()[-1].partition(": ")[2].partition(";")[0]
    return reasons


def write_results(results: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace_file(temporary, path)


def write_page(results: dict[str, Any], path: Path) -> None:
    """Put the tables between their marks in a page: `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

    Raises:
        ValueError: the page lacks marks.
    """
    page = path.read_text(encoding="utf-8")
    for name, table in (("hosts", hosts_table()), ("sentences", as_markdown(results))):
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{path} has no place for a table: it needs the lines {begin.strip()} and {end}")
        page = "".join([before, begin, table, end, after])
    path.write_text(page, encoding="utf-8")


def hosts_table() -> str:
    """Which mechanism stands in which kind of layer, as Markdown."""
    hosts = {kind: find_hosts(model)[0] for kind, model in _kinds().items()}
    lines = ["| mechanism | " + " | ".join(hosts) + " |", "|---|" + ":-:|" * len(hosts)]
    for name in az.list_attentions():
        fits = [not check_plan(Plan(host, name, {}, "convert")) for host in hosts.values()]
        if any(fits):
            lines.append(f"| `{name}` | " + " | ".join("yes" if fit else "" for fit in fits) + " |")
    return "\n".join(lines) + "\n"


def _kinds() -> dict[str, nn.Module]:
    """A small host of each kind that makes a difference to what fits."""
    text: dict[str, Any] = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    image: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 0}
    return {
        "text encoder": transformers.BertModel(transformers.BertConfig(**text)),
        "decoder": transformers.LlamaModel(transformers.LlamaConfig(**text)),
        "decoder, sliding window": transformers.MistralModel(transformers.MistralConfig(**text, sliding_window=4)),
        "decoder, query/key norms": transformers.Qwen3Model(transformers.Qwen3Config(**text, head_dim=8)),
        "image encoder": timm.create_model("vit_tiny_patch16_224", **image),
        "without class token": timm.create_model("vit_tiny_patch16_224", **image, class_token=False, global_pool="avg"),
        "rotary": timm.create_model("eva02_tiny_patch14_224", **image),
    }


def as_markdown(results: dict[str, Any]) -> str:
    """Two tables, what keeps the function and what was distilled, and what does not fit."""
    model, rows = results["model"], results["rows"]
    kept, others = [r for r in rows if r["distilled"] is None], [r for r in rows if r["distilled"] is not None]
    size = f"{_millions(model['parameters'])} M parameters, {_giga(model)} GFLOPs in the attention layers for {model['num_tokens']}"
    lines = [
        f"As it is: {size} tokens. With the same function after the swap:",
        "",
        "| swapped in | largest difference in an embedding | parameters, M | GFLOPs |",
        "|---|--:|--:|--:|",
        *(f"| {_name(r)} | {_small(r['difference'])} | {_millions(r['parameters'])} | {_giga(r)} |" for r in kept),
        "",
        "With another function, right after the swap and after distilling:",
        "",
        "| swapped in | cosine: mean (lowest) | same neighbour | **distilled** | same neighbour | updates | minutes "
        "| parameters, M | GFLOPs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in others:
        updates = r["recipe"]["alone_steps"] + r["recipe"]["together_steps"]
        cells = [
            _cosine(r["swapped"]),
            _percent(r["swapped"]),
            f"**{r['distilled']['mean']:.3f}** ({r['distilled']['lowest']:.2f})",
        ]
        cells += [_percent(r["distilled"]), str(updates), f"{r['seconds'] / 60:.1f}", _millions(r["parameters"]), _giga(r)]
        lines.append(f"| {_name(r)} | {' | '.join(cells)} |")
    lines += ["", "What does not stand in these layers:", ""]
    reasons: dict[str, list[str]] = {}
    for name, reason in results["refused"].items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    return f"`{row['mechanism']}`, {row['note']}"


def _cosine(agreement: dict[str, float] | None) -> str:
    return "-" if agreement is None else f"{agreement['mean']:.3f} ({agreement['lowest']:.2f})"


def _percent(agreement: dict[str, float]) -> str:
    return f"{100 * agreement['same_neighbour']:.0f} %"


def _small(number: float) -> str:
    return f"{number:.0e}" if number else "0"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}"


def _giga(row: dict[str, Any]) -> str:
    return f"{row['attention_flops'] / 1e9:.2f}"
