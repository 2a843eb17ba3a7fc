"""Small decoders on real text, byte by byte: one with each causal mechanism, alike in everything else, compared in one picture.

The text needs no download: the documentation topics that every Python brings along (`pydoc_data.topics`), or a folder of text
files. Losses are in bits per byte: how many bits the model needs, on average, to tell the next byte.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo import attention as mechanisms
from attention_zoo.training.checkpoint import replace_file
from attention_zoo.training.optim import create_optimizer, create_scheduler
from attention_zoo.training.plots import Curves, plot_side_by_side
from attention_zoo.training.recipe import OptimizerRecipe, RecipeError, RecipeSections, ScheduleRecipe
from attention_zoo.training.report import ProgressReport

__all__ = [
    "TextDataRecipe",
    "TextRecipe",
    "TextRun",
    "Texts",
    "as_markdown",
    "compare",
    "hold_out",
    "open_texts",
    "read_documents",
    "require_enough",
    "train_decoder",
]


@dataclass(frozen=True)
class TextModelRecipe:
    """The decoder, and what is compared in it.

    Attributes:
        name: a decoder of `create_model`.
        kwargs: fields of its configuration: hidden_size, num_hidden_layers, ...
        mechanisms: registered mechanisms; null: all that can be causal.
        attention_kwargs: options of single mechanisms, by name.
    """

    name: str = "llama_tiny"
    kwargs: dict[str, Any] = field(default_factory=dict)
    mechanisms: tuple[str, ...] | None = None
    attention_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TextDataRecipe:
    """Which texts, and the form in which the model sees them.

    Attributes:
        name: "pydoc-topics", or a folder of text files (*.txt, *.md, *.rst), each of which is one document.
        held_out_every: every how manieth document is held out of training.
        length: bytes that the model sees at once.
        batch_size: such pieces per update.
    """

    name: str = "pydoc-topics"
    held_out_every: int = 10
    length: int = 256
    batch_size: int = 8


@dataclass(frozen=True)
class TextEngineRecipe:
    """How it is computed.

    Attributes:
        seed: of the initial weights, the order of the pieces, dropout and the generated text; the same for every mechanism.
        device: "cpu", "cuda", ...
    """

    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class TextOutputRecipe:
    """What is written.

    Attributes:
        root, name: folder of the comparison, root/name; name null: that of the recipe.
        log_every: updates between points of the training curve.
        validate_every: updates between points of the held-out curve; the last update has one in any case.
        prompt: what the generated text goes on from.
        sample_length: bytes that are generated; 0: none.
        temperature: of the sampling.
        cache_tokens: length of the sequence whose cache is reported.
    """

    root: str = "runs"
    name: str | None = None
    log_every: int = 10
    validate_every: int = 50
    prompt: str = "The "
    sample_length: int = 120
    temperature: float = 0.7
    cache_tokens: int = 1024


@dataclass(frozen=True)
class TextRecipe(RecipeSections):
    """A comparison of mechanisms on text. Each attribute is a section of the YAML file."""

    kind: ClassVar[str] = "text"
    program: ClassVar[str] = "scripts/train_text.py"

    model: TextModelRecipe = field(default_factory=TextModelRecipe)
    data: TextDataRecipe = field(default_factory=TextDataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    engine: TextEngineRecipe = field(default_factory=TextEngineRecipe)
    output: TextOutputRecipe = field(default_factory=TextOutputRecipe)

    def check(self) -> None:
        least = {
            "data": {"held_out_every": 2, "length": 1, "batch_size": 1},
            "schedule": {"epochs": 1},
            "output": {"log_every": 1, "validate_every": 1, "sample_length": 0, "cache_tokens": 1},
        }
        for section, keys in least.items():
            for key, lowest in keys.items():
                if (value := getattr(getattr(self, section), key)) < lowest:
                    raise RecipeError(f"{section}.{key} must be at least {lowest}, got {value}")
        if not self.output.prompt or self.output.temperature <= 0:
            raise RecipeError("output.prompt must hold a character, and output.temperature be positive")
        causal = az.list_attentions(pattern="causal_self")
        if unknown := [name for name in (*(self.model.mechanisms or ()), *self.model.attention_kwargs) if name not in causal]:
            raise RecipeError(f"model: no causal mechanism is named {', '.join(map(repr, unknown))}; there are {', '.join(causal)}")


@dataclass(frozen=True)
class Texts:
    """Bytes as token ids, uint8 (n,), and how many documents they come from."""

    train: Tensor
    held_out: Tensor
    documents: tuple[int, int]


@dataclass(frozen=True)
class TextRun:
    """What came of one mechanism. Curves are (updates, bits per byte) points."""

    mechanism: str
    options: dict[str, Any]
    parameters: int
    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    seconds: float
    cache_bytes_per_token: float | None
    sample: str

    @property
    def bits_per_byte(self) -> float:
        return self.held_out[-1][1]


def compare(recipe: TextRecipe, console: Console) -> list[TextRun]:
    """Train a decoder with each mechanism and write curves.png, results.md and results.json; the best comes first.

    Raises:
        RecipeError: texts that are too short, settings that do not go together.
        FileNotFoundError: no such folder of texts.
    """
    texts = open_texts(recipe.data)
    names = recipe.model.mechanisms or az.list_attentions(pattern="causal_self")
    sizes = f"{len(texts.train):,} bytes of {texts.documents[0]} documents"
    console.print(f"{sizes}, {len(texts.held_out):,} of {texts.documents[1]} held out; {len(names)} mechanisms")
    runs = sorted((train_decoder(recipe, name, texts, console) for name in names), key=lambda run: run.bits_per_byte)
    _write(recipe, runs, texts, Path(recipe.output.root) / (recipe.output.name or "text"))
    return runs


def open_texts(recipe: TextDataRecipe) -> Texts:
    """Read the documents and hold every `held_out_every`-th back.

    Raises:
        FileNotFoundError: no such folder, or no text in it.
        RecipeError: fewer bytes than one batch needs.
    """
    train, held_out = hold_out(read_documents(recipe.name), recipe)
    joined = [torch.tensor(list("\n\n".join(part).encode()), dtype=torch.uint8) for part in (train, held_out)]
    require_enough(joined, recipe, "bytes")
    return Texts(joined[0], joined[1], (len(train), len(held_out)))


def read_documents(name: str) -> list[str]:
    """The topics of Python's documentation ("pydoc-topics"), or the text files in a folder."""
    if name == "pydoc-topics":
        from pydoc_data.topics import topics

        return [topics[topic] for topic in sorted(topics)]
    files = sorted(path for path in Path(name).glob("**/*") if path.suffix in (".txt", ".md", ".rst"))
    return [path.read_text(encoding="utf-8") for path in files]


def hold_out(documents: Sequence[str], recipe: TextDataRecipe) -> tuple[list[str], list[str]]:
    """Documents for training, and every `held_out_every`-th, at least the last. Raises FileNotFoundError for fewer than two."""
    if len(documents) < 2:
        raise FileNotFoundError(f"data.name={recipe.name!r} is neither 'pydoc-topics' nor a folder of at least two text files")
    numbers = set(range(recipe.held_out_every - 1, len(documents), recipe.held_out_every)) or {len(documents) - 1}
    parts: tuple[list[str], list[str]] = ([], [])
    for number, document in enumerate(documents):
        parts[number in numbers].append(document)
    return parts


def require_enough(parts: Sequence[Tensor], recipe: TextDataRecipe, unit: str) -> None:
    """Raise RecipeError where training or held-out tokens are fewer than a batch, or a piece, needs."""
    for part, least in zip(parts, (recipe.batch_size * recipe.length + recipe.length, recipe.length + 1), strict=True):
        if len(part) < least:
            raise RecipeError(
                f"data: {len(part)} {unit} are too few for pieces of {recipe.length}: lower data.length or batch_size"
            )


def train_decoder(recipe: TextRecipe, mechanism: str, texts: Texts, console: Console) -> TextRun:
    """Train and measure the decoder with one mechanism."""
    data, output, device = recipe.data, recipe.output, recipe.engine.device
    options = recipe.model.attention_kwargs.get(mechanism, {})
    torch.manual_seed(recipe.engine.seed)
    model = az.create_model(recipe.model.name, attention=mechanism, attention_kwargs=options, **recipe.model.kwargs).to(device)
    optimizer = create_optimizer(model, recipe.optimizer, data.batch_size)
    per_epoch = len(_pieces(texts.train, data.length, 0)) // data.batch_size
    scheduler = create_scheduler(
        optimizer, recipe.schedule, recipe.optimizer, images_per_update=data.batch_size, updates_per_epoch=per_epoch
    )
    total = per_epoch * recipe.schedule.epochs
    train, held_out, recent, started = [], [], [], time.perf_counter()
    console.print(f"{mechanism} {options or ''}", markup=False)
    with ProgressReport(console, enabled=True, epochs=recipe.schedule.epochs, updates_per_epoch=per_epoch) as progress:
        for update, batch in enumerate(_batches(texts.train, recipe, per_epoch), 1):
            mechanisms.set_training_step(model, update - 1)
            recent.append(_train_step(model.train(), batch.to(device), optimizer, recipe.optimizer.clip_grad))
            scheduler.step_update(update)
            shown = None
            if update % output.log_every == 0 or update == total:
                train.append((update, sum(recent) / len(recent)))
                recent = []
            if update % output.validate_every == 0 or update == total:
                shown = _evaluate(model.eval(), texts.held_out.to(device), data)
                held_out.append((update, shown))
            progress.update((update - 1) // per_epoch, (update - 1) % per_epoch + 1, shown)
    seconds = time.perf_counter() - started
    report = az.cache_report(model, output.cache_tokens)
    return TextRun(
        mechanism=mechanism,
        options=options,
        parameters=sum(p.numel() for p in model.parameters()),
        train=train,
        held_out=held_out,
        seconds=seconds,
        cache_bytes_per_token=report.cache_bytes_per_token if report.layers else None,
        sample=_generate(model.eval(), recipe),
    )


def as_markdown(recipe: TextRecipe, runs: Sequence[TextRun]) -> str:
    """The table, and what each model wrote."""
    lines = [
        "| mechanism | parameters | held-out bits/byte | training bits/byte | cache, bytes/token | s/update |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    updates = runs[0].train[-1][0]
    for run in runs:
        cache = "no cache" if run.cache_bytes_per_token is None else f"{run.cache_bytes_per_token:,.0f}"
        options = "".join(f", {k}={v}" for k, v in run.options.items())
        lines.append(
            f"| {run.mechanism}{options} | {run.parameters:,} | {run.bits_per_byte:.3f} | {run.train[-1][1]:.3f} | {cache} | "
            f"{run.seconds / updates:.3f} |"
        )
    lines += ["", f"Cache: of a sequence of {recipe.output.cache_tokens:,} tokens, in the dtype of the weights.", ""]
    for run in runs if recipe.output.sample_length else ():
        lines += [f"`{run.mechanism}` writes:", "", "````text", run.sample, "````", ""]
    return "\n".join(lines).rstrip() + "\n"


def _pieces(text: Tensor, length: int, offset: int) -> Tensor:
    """Consecutive pieces of length + 1 bytes, each beginning with the last byte of the one before: (pieces, length + 1)."""
    return text[offset:].unfold(0, length + 1, length)


def _batches(text: Tensor, recipe: TextRecipe, per_epoch: int) -> Iterator[Tensor]:
    """Batches (B, length + 1) of all epochs, the same for every mechanism: cut elsewhere in each epoch, and shuffled."""
    generator, data = torch.Generator().manual_seed(recipe.engine.seed), recipe.data
    for _ in range(recipe.schedule.epochs):
        spare = (len(text) - 1) - per_epoch * data.batch_size * data.length
        offset = int(torch.randint(0, min(spare, data.length - 1) + 1, (), generator=generator))
        pieces = _pieces(text, data.length, offset)
        order = torch.randperm(len(pieces), generator=generator)[: per_epoch * data.batch_size]
        yield from (pieces[rows].long() for rows in order.split(data.batch_size))


def _bits_per_byte(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()) / math.log(2)


def _train_step(model: Any, batch: Tensor, optimizer: Any, clip_grad: float | None) -> float:
    """One update; returns the bits per byte, without the auxiliary loss."""
    bits = _bits_per_byte(model, batch)
    loss = bits * math.log(2) + model.config.aux_loss_coef * az.auxiliary_loss(model)
    optimizer.zero_grad()
    loss.backward()
    if clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return bits.item()


@torch.no_grad()
def _evaluate(model: Any, text: Tensor, data: TextDataRecipe) -> float:
    """Bits per byte over all of the held-out text but what is left over behind the last whole piece."""
    pieces = _pieces(text, data.length, 0)
    sums = [_bits_per_byte(model, part.long()).item() * len(part) for part in pieces.split(4 * data.batch_size)]
    return sum(sums) / len(pieces)


def _generate(model: Any, recipe: TextRecipe) -> str:
    output = recipe.output
    if output.sample_length == 0:
        return ""
    prompt = torch.tensor([list(output.prompt.encode())], device=recipe.engine.device)
    torch.manual_seed(recipe.engine.seed)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=output.sample_length,
        do_sample=True,
        temperature=output.temperature,
        top_k=0,
        pad_token_id=0,
    )
    return bytes(ids[0].tolist()).decode(errors="replace")


def _write(recipe: TextRecipe, runs: Sequence[TextRun], texts: Texts, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    where = {"torch": torch.__version__, "device": recipe.engine.device, "threads": torch.get_num_threads()}
    sizes = {"train_bytes": len(texts.train), "held_out_bytes": len(texts.held_out)}
    content = {"recipe": recipe.to_dict(), "where": where, **sizes, "runs": [asdict(run) for run in runs]}
    for name, text in (("results.json", json.dumps(content, indent=1) + "\n"), ("results.md", as_markdown(recipe, runs))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, folder / name)
    curves = [Curves(f"{r.mechanism}   {r.bits_per_byte:.3f}", r.train, r.held_out) for r in runs]
    plot_side_by_side(
        curves,
        folder / "curves.png",
        title=f"{recipe.model.name} on {recipe.data.name}\nbeside a name: held out, at the end; grey: the others",
        xlabel="updates",
        ylabel="bits per byte",
    )
