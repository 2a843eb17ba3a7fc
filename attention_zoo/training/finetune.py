"""Hugging Face decoders trained on with other attention: read, swapped, grown, then `transformers.Trainer`, with LoRA or without.

A recipe of the kind `finetune` describes one run, or, as `variants`, several that differ in what they say; they start from the same
model and see the same text. A model without a path is built from `model.config` and trained from scratch.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import attention_zoo as az
from attention_zoo.swap.report import SwapReport
from attention_zoo.swap.slot import Slot
from attention_zoo.training.checkpoint import replace_file
from attention_zoo.training.loop import TrainingDivergedError
from attention_zoo.training.recipe import RecipeError, RecipeSections, SwapRecipe, build_recipe
from attention_zoo.training.report import ProgressReport
from attention_zoo.training.swap import Source, apply_swap, open_model, require_free, save_swapped
from attention_zoo.training.text import TextDataRecipe, hold_out, read_documents, require_enough

__all__ = ["FinetuneJob", "FinetuneRecipe", "FinetuneRun", "as_markdown", "prepare", "runs_of", "write_results"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv", "q", "k", "v", "proj")
_TRAINED = ("all", "swapped")


@dataclass(frozen=True)
class GrowRecipe:
    """Growth of `gda` layers, after the swap: the arguments of `attention_zoo.grow_model`.

    Attributes:
        factor: copies of each signal head, the original included; 1: none.
        noise: deviation of what is added to the copies' queries, relative to theirs.
        snr_db: the same as a ratio of signal to noise in decibels, instead.
        symmetric: repeat the noise heads too.
    """

    factor: int = 1
    noise: float = 0.01
    snr_db: float | None = None
    symmetric: bool = False


@dataclass(frozen=True)
class FinetuneModelRecipe:
    """Which model, and what is changed in it before it is trained.

    Attributes:
        path: a folder (`scripts/swap.py` writes them, too), or owner/name on Hugging Face's hub; null: built from `config`.
        config: fields of transformers' configuration, with model_type, where there is no path.
        dtype: of the weights: float32, bfloat16, ...; null: as they were saved.
        swap: mechanisms that take the place of attention layers; null: none.
        grow: growth of grouped differential attention.
    """

    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    swap: SwapRecipe | None = None
    grow: GrowRecipe = field(default_factory=GrowRecipe)


@dataclass(frozen=True)
class FinetuneDataRecipe(TextDataRecipe):
    """Which texts, and the form in which the model sees them.

    Attributes:
        name: "pydoc-topics", a folder of text files, a text file (its paragraphs are the documents), or "hf/owner/name".
        held_out_every: every how manieth document is held out of training.
        length: tokens that the model sees at once.
        batch_size: such pieces per device and step.
        tokens: "auto": the tokenizer beside the model, bytes where there is none; "bytes".
        split, text_column: Hugging Face's datasets only.
        documents: read no more than so many; null: all.
    """

    tokens: str = "auto"
    split: str = "train"
    text_column: str = "text"
    documents: int | None = None


@dataclass(frozen=True)
class TrainRecipe:
    """How it is trained, by `transformers.Trainer`.

    Attributes:
        steps: updates.
        lr: peak learning rate.
        schedule: transformers' name: "cosine", "linear", "constant_with_warmup", ...
        warmup_steps: linear rise from 0.
        weight_decay, clip_grad: AdamW's, and the largest norm of the gradient.
        accumulate: batches per update.
        parameters: "all", or "swapped": those of the swapped layers only.
        routed_topk: share of the run -> K of all Mixture-of-Head layers from there on: {0: 4, 0.3: 2}.
    """

    steps: int = 100
    lr: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    accumulate: int = 1
    parameters: str = "all"
    routed_topk: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters in the place of training all weights, by PEFT; they are merged at the end.

    Attributes:
        rank: of the adapters; 0: none.
        alpha: they are scaled by alpha / rank.
        dropout: on their input.
        target: names of linear layers, as PEFT takes them; null: the projections of the swapped layers.
        save: names of modules that are trained as they are; null: what else the swapped mechanisms hold (routers, norms, lambdas).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target: tuple[str, ...] | None = None
    save: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FinetuneEngineRecipe:
    """How it is computed.

    Attributes:
        seed: of new parameters, the order of the pieces and dropout.
        cpu: stay on the CPU although there is a GPU.
        mixed_precision: "no", "bf16" or "fp16".
        grad_checkpointing: recompute activations in the backward pass.
    """

    seed: int = 0
    cpu: bool = False
    mixed_precision: str = "no"
    grad_checkpointing: bool = False


@dataclass(frozen=True)
class FinetuneOutputRecipe:
    """What is written.

    Attributes:
        root, name: folder of the run, root/name, and of a variant, root/name/variant; name null: that of the recipe.
        save: whether to save the trained model.
        log_every: updates between points of the training curve.
        validate_every: updates between points of the held-out curve; the last update has one in any case.
    """

    root: str = "runs"
    name: str | None = None
    save: bool = True
    log_every: int = 10
    validate_every: int = 50


@dataclass(frozen=True)
class FinetuneRecipe(RecipeSections):
    """A run that trains a decoder on. Each attribute is a section of the YAML file.

    Attributes:
        variants: name -> sections that differ from the recipe's.
    """

    kind: ClassVar[str] = "finetune"
    program: ClassVar[str] = "scripts/finetune_text.py"

    model: FinetuneModelRecipe = field(default_factory=FinetuneModelRecipe)
    data: FinetuneDataRecipe = field(default_factory=FinetuneDataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    engine: FinetuneEngineRecipe = field(default_factory=FinetuneEngineRecipe)
    output: FinetuneOutputRecipe = field(default_factory=FinetuneOutputRecipe)
    variants: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        least = {
            "data": {"held_out_every": 2, "length": 2, "batch_size": 1},
            "train": {"steps": 1, "lr": 0, "warmup_steps": 0, "accumulate": 1},
            "lora": {"rank": 0},
            "output": {"log_every": 1, "validate_every": 1},
        }
        for section, keys in least.items():
            for key, lowest in keys.items():
                if (value := getattr(getattr(self, section), key)) < lowest:
                    raise RecipeError(f"{section}.{key} must be at least {lowest}, got {value}")
        choices = {"data.tokens": ("auto", "bytes"), "train.parameters": _TRAINED, "engine.mixed_precision": ("no", "bf16", "fp16")}
        for name, allowed in choices.items():
            section, key = name.split(".")
            if (value := getattr(getattr(self, section), key)) not in allowed:
                raise RecipeError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        if (self.model.path is None) == (not self.model.config):
            raise RecipeError("a model is read from model.path, or built from model.config: give one of them")
        _topk_steps(self.train)
        runs_of(self)


@dataclass(frozen=True)
class FinetuneRun:
    """What came of one run. Losses are of the held-out text, nats per token; curves are (updates, loss) points.

    Attributes:
        name: of the variant, or of the run.
        mechanisms: what the model has swapped in it, by name, with the number of layers.
        parameters, trained_parameters: of the model, and those that were trained.
        before: the model as it was read; None: it was built.
        swapped: after the swap and the growth; None: there was none.
        after: at the end.
        train, held_out: the curves.
        cache_bytes_per_token: of the swapped layers, before and after the swap; None without one.
        seconds: of training.
        tokens: what a token is, "bytes" or the tokenizer's class.
    """

    name: str
    mechanisms: dict[str, int]
    parameters: int
    trained_parameters: int
    before: float | None
    swapped: float | None
    after: float
    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    cache_bytes_per_token: tuple[float, float] | None
    seconds: float
    tokens: str


def runs_of(recipe: FinetuneRecipe) -> dict[str, FinetuneRecipe]:
    """The recipe's runs by name: its variants, or itself.

    Raises:
        RecipeError: a variant that says what no recipe has.
    """
    if not recipe.variants:
        return {recipe.output.name or "finetune": recipe}
    shared = {k: v for k, v in recipe.to_dict().items() if k != "variants"}
    root = str(Path(recipe.output.root) / (recipe.output.name or "finetune"))
    runs = {}
    for name, sections in recipe.variants.items():
        if not isinstance(sections, Mapping):
            raise RecipeError(f"variants.{name} must hold sections, got {sections!r}")
        try:
            merged = build_recipe(FinetuneRecipe, _merge(shared, sections))
        except RecipeError as error:
            raise RecipeError(f"variants.{name}: {error}") from None
        runs[name] = replace(merged, output=replace(merged.output, root=root, name=name))
    return runs


@dataclass(frozen=True)
class FinetuneJob:
    """A model that is swapped and grown, and the tokens to train it on; `run` does the rest.

    Attributes:
        recipe, name: of the run.
        source: the model, with what it was read from.
        report: of the swap; None without one.
        train, held_out: tokens.
        tokens, before, swapped: as in `FinetuneRun`.
    """

    recipe: FinetuneRecipe
    name: str
    source: Source
    report: SwapReport | None
    train: Tensor
    held_out: Tensor
    tokens: str
    before: float | None = None
    swapped: float | None = None

    def run(self, console: Console) -> FinetuneRun:
        """Train, measure, save.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        recipe, folder = self.recipe, _folder(self.recipe)
        console.print(_describe(self), markup=False)
        started = time.perf_counter()
        model, trained_parameters, train, held_out = _train(self, console)
        run = FinetuneRun(
            name=self.name,
            mechanisms=_mechanisms(model),
            parameters=_count(model),
            trained_parameters=trained_parameters,
            before=self.before,
            swapped=self.swapped,
            after=held_out[-1][1],
            train=train,
            held_out=held_out,
            cache_bytes_per_token=None if self.report is None else self.report.cache_bytes_per_token,
            seconds=time.perf_counter() - started,
            tokens=self.tokens,
        )
        if recipe.output.save:
            report = None if self.report is None else self.report.as_dict()
            save_swapped(replace(self.source, model=model), folder, report, force=True)
        _write_text(folder / "recipe.yaml", yaml.safe_dump({"kind": recipe.kind, **recipe.to_dict()}, sort_keys=False))
        return run


def prepare(recipe: FinetuneRecipe, name: str, *, measure: bool = True) -> FinetuneJob:
    """Read or build the model, read the text, swap and grow.

    Args:
        recipe: one run, without variants.
        name: of it.
        measure: whether to measure the model on the held-out text, before and after the swap.

    Raises:
        FileExistsError: a model would be written over.
        FileNotFoundError: no such model or texts.
        RecipeError: texts that are too short, settings that do not go together.
        ValueError, TypeError: a swap that cannot be.
    """
    if recipe.output.save:
        require_free(_folder(recipe))
    if recipe.lora.rank:
        import peft  # noqa: F401 - that it is not installed is said before anything is trained
    set_seed(recipe.engine.seed)
    source = _open(recipe.model)
    train, held_out, tokens = _open_texts(recipe.data, source.folder)
    if (most := int(max(train.max(), held_out.max()))) >= (known := source.model.get_input_embeddings().num_embeddings):
        raise RecipeError(f"data.tokens={recipe.data.tokens!r}: tokens go up to {most}, the model's vocabulary has {known}")
    source.model.to("cpu" if recipe.engine.cpu or not torch.cuda.is_available() else "cuda")
    measured = measure and recipe.model.path is not None
    before = _evaluate(source.model, held_out, recipe.data) if measured else None
    report = None if recipe.model.swap is None else apply_swap(source.model, recipe.model.swap)
    if (grow := recipe.model.grow).factor > 1:
        noise = 0.0 if grow.snr_db is not None else grow.noise
        grown = az.grow_model(source.model, grow.factor, noise=noise, snr_db=grow.snr_db, symmetric=grow.symmetric)
        source = replace(source, model=grown)
    needs_swaps = {"train.parameters=swapped": recipe.train.parameters == "swapped"}
    needs_swaps["lora without lora.target"] = recipe.lora.rank > 0 and recipe.lora.target is None
    if (needing := [key for key, needs in needs_swaps.items() if needs]) and not _slots(source.model):
        raise RecipeError(f"{' and '.join(needing)} trains swapped layers, and the model has none")
    changed = measured and (report is not None or grow.factor > 1)
    swapped = _evaluate(source.model, held_out, recipe.data) if changed else None
    return FinetuneJob(recipe, name, source, report, train, held_out, tokens, before, swapped)


def as_markdown(runs: Sequence[FinetuneRun]) -> str:
    """The table of losses."""
    lines = [
        "| run | attention | parameters | trained | loss before | after the swap | after training | cache, bytes/token |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        mechanisms = ", ".join(f"{name} x {count}" for name, count in run.mechanisms.items()) or "its own"
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in (run.before, run.swapped, run.after)]
        cache = "-" if run.cache_bytes_per_token is None else "{:,.0f} -> {:,.0f}".format(*run.cache_bytes_per_token)
        cells = [run.name, mechanisms, f"{run.parameters:,}", f"{run.trained_parameters:,}", *losses, cache]
        lines.append(f"| {' | '.join(cells)} |")
    units = " and ".join(dict.fromkeys("byte" if run.tokens == "bytes" else "token" for run in runs))
    return "\n".join([*lines, "", f"Losses are of held-out text, in nats per {units}."]) + "\n"


def write_results(recipe: FinetuneRecipe, runs: Sequence[FinetuneRun]) -> Path:
    """results.json and results.md in the recipe's folder; returns it."""
    folder = _folder(recipe)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    content = {"recipe": recipe.to_dict(), "where": where, "runs": [asdict(run) for run in runs]}
    _write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    _write_text(folder / "results.md", as_markdown(runs))
    return folder


# --- the model ----------------------------------------------------------------------------------------------------------------


def _open(recipe: FinetuneModelRecipe) -> Source:
    if recipe.path is not None:
        source = open_model(recipe.path, dtype=recipe.dtype)
        kind = type(source.model).__name__
        if not kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise RecipeError(f"model.path={recipe.path!r} holds {kind}, which is no decoder with a language model's head")
        return source
    values = dict(recipe.config)
    try:
        config = AutoConfig.for_model(values.pop("model_type", ""), **values)
        return Source(AutoModelForCausalLM.from_config(config).eval())
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"model.config: {str(error).splitlines()[0]}") from None


def _add_adapters(model: Any, recipe: LoraRecipe) -> Any:
    """PEFT's model around ours, which is changed in place: adapters in projections, what else is new trained as it is."""
    from peft import LoraConfig, get_peft_model

    projections, others, bare = _parts(model)
    targets = recipe.target if recipe.target is not None else tuple(projections)
    saved = recipe.save if recipe.save is not None else tuple(others)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        modules_to_save=list(saved) or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in bare if recipe.save is None else ():
        parameter.requires_grad_(True)
    return adapted


def _parts(model: nn.Module) -> tuple[list[str], list[str], list[nn.Parameter]]:
    """Of the swapped layers: names of projections, names of other modules with parameters, and parameters that are in no such."""
    projections, others, bare = [], [], []
    for prefix, slot in _slots(model).items():
        bare += list(slot.mechanism.parameters(recurse=False))
        for name, child in slot.mechanism.named_children():
            if name in _PROJECTIONS and isinstance(child, nn.Linear):
                projections.append(f"{prefix}.mechanism.{name}")
            elif next(child.parameters(), None) is not None:
                others.append(f"{prefix}.mechanism.{name}")
    return projections, others, bare


def _choose_parameters(model: nn.Module, which: str) -> None:
    if which == "all":
        return
    model.requires_grad_(False)
    for slot in _slots(model).values():
        slot.requires_grad_(True)


def _slots(model: nn.Module) -> dict[str, Slot]:
    """What stands in the place of swapped layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Slot)}


def _mechanisms(model: nn.Module) -> dict[str, int]:
    return dict(Counter(slot.mechanism.attention_info.name for slot in _slots(model).values()))


# --- the text -----------------------------------------------------------------------------------------------------------------


class _Pieces(Dataset):
    """Consecutive pieces of a text, each with the first token of the next, as `Trainer` takes them."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.pieces = text.unfold(0, length + 1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.pieces[index].long()
        return {"input_ids": piece, "labels": piece}


def _open_texts(recipe: FinetuneDataRecipe, folder: Path | None) -> tuple[Tensor, Tensor, str]:
    """Tokens for training and held out, and what a token is."""
    parts = hold_out(_documents(recipe), recipe)
    tokenizer = _tokenizer(folder) if recipe.tokens == "auto" and folder is not None else None
    if tokenizer is None:
        texts = [torch.tensor(list("\n\n".join(part).encode()), dtype=torch.uint8) for part in parts]
        kind = "bytes"
    else:
        texts = [torch.cat([_encode(tokenizer, text) for text in part]) for part in parts]
        kind = type(tokenizer).__name__
    require_enough(texts, recipe, "bytes" if tokenizer is None else "tokens")
    return texts[0], texts[1], kind


def _encode(tokenizer: Any, text: str) -> Tensor:
    """A document's tokens, int32 (n,), with the one that ends it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], *end], dtype=torch.int32)


def _documents(recipe: FinetuneDataRecipe) -> list[str]:
    if recipe.name.startswith("hf/"):
        from datasets import load_dataset

        rows = load_dataset(recipe.name.removeprefix("hf/"), split=recipe.split, streaming=True)
        return [row[recipe.text_column] for row in itertools.islice(rows, recipe.documents)]
    if Path(recipe.name).is_file():
        documents = [text for text in Path(recipe.name).read_text(encoding="utf-8").split("\n\n") if text.strip()]
    else:
        documents = read_documents(recipe.name)
    return documents[: recipe.documents]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None without one."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _evaluate(model: Any, text: Tensor, data: TextDataRecipe) -> float:
    """Nats per token over the held-out text but what is left over behind the last whole piece."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    pieces = text.unfold(0, data.length + 1, data.length)
    total = 0.0
    for part in pieces.split(data.batch_size):
        ids = part.long().to(device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(part)
    model.train(was_training)
    return total / len(pieces)


# --- training -----------------------------------------------------------------------------------------------------------------


_Curve = list[tuple[int, float]]


def _train(job: FinetuneJob, console: Console) -> tuple[Any, int, _Curve, _Curve]:
    """Train with `transformers.Trainer`; returns the model (adapters merged), how much was trained, and the two curves."""
    recipe, model = job.recipe, job.source.model
    _choose_parameters(model, recipe.train.parameters)
    adapted = _add_adapters(model, recipe.lora) if recipe.lora.rank else model
    trained_parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    curve = _HeldOutCurve(job.held_out, recipe)
    with ProgressReport(console, enabled=True, epochs=1, updates_per_epoch=recipe.train.steps) as progress:
        trainer = Trainer(
            model=adapted,
            args=_arguments(recipe),
            train_dataset=_Pieces(job.train, recipe.data.length),
            callbacks=[_TopKSchedule(model, recipe.train), curve, _Progress(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    points = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    if not all(math.isfinite(loss) for _, loss in [*points, *curve.points]):
        raise TrainingDivergedError("the loss is no longer finite: a lower train.lr or more train.warmup_steps may help")
    merged = adapted.merge_and_unload() if recipe.lora.rank else model
    return merged.eval().requires_grad_(True), trained_parameters, points, curve.points


def _arguments(recipe: FinetuneRecipe) -> TrainingArguments:
    train, engine = recipe.train, recipe.engine
    arguments = TrainingArguments(
        output_dir=str(_folder(recipe)),
        max_steps=train.steps,
        per_device_train_batch_size=recipe.data.batch_size,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip_grad,
        gradient_accumulation_steps=train.accumulate,
        seed=engine.seed,
        use_cpu=engine.cpu,
        bf16=engine.mixed_precision == "bf16",
        fp16=engine.mixed_precision == "fp16",
        **({_checkpointing(): True} if engine.grad_checkpointing else {}),
        logging_steps=recipe.output.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:  # the first one; Trainer would split batches over all of them by DataParallel
        arguments._n_gpu = 1
    return arguments


def _checkpointing() -> str:
    """transformers' name for it, which 5.24 changed."""
    known = {f.name for f in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"


class _HeldOutCurve(TrainerCallback):
    """Measures the held-out text every `validate_every` updates and after the last."""

    def __init__(self, text: Tensor, recipe: FinetuneRecipe) -> None:
        self.text, self.recipe = text, recipe
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.recipe.output.validate_every == 0 or state.global_step == state.max_steps:
            self.points.append((state.global_step, _evaluate(model, self.text, self.recipe.data)))


class _TopKSchedule(TrainerCallback):
    """Sets K of the Mixture-of-Head layers when its share of the run is reached."""

    def __init__(self, model: nn.Module, recipe: TrainRecipe) -> None:
        self.model, self.steps = model, _topk_steps(recipe)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            az.set_routed_topk(self.model, self.steps[state.global_step])


class _Progress(TrainerCallback):
    """The bar, or lines, of `ProgressReport`."""

    def __init__(self, progress: ProgressReport) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.progress.update(0, state.global_step, (logs or {}).get("loss"))


def _topk_steps(recipe: TrainRecipe) -> dict[int, int]:
    """Update -> K from there on."""
    steps = {}
    for share, number in recipe.routed_topk.items():
        try:
            begin = float(share)
        except ValueError:
            begin = -1.0
        if not 0 <= begin < 1:
            raise RecipeError(f"train.routed_topk: a share of the run is at least 0 and below 1, got {share!r}")
        steps[int(begin * recipe.steps)] = number
    return steps


def _folder(recipe: FinetuneRecipe) -> Path:
    return Path(recipe.output.root) / (recipe.output.name or "finetune")


def _describe(job: FinetuneJob) -> str:
    model = job.source.model
    mechanisms = ", ".join(f"{name} in {count} layers" for name, count in _mechanisms(model).items()) or "its own attention"
    known = [f"{text} {loss:.4f}" for text, loss in (("before", job.before), ("swapped", job.swapped)) if loss is not None]
    losses = [f"held-out loss {', '.join(known)}"] if known else []
    return "; ".join([f"{job.name}: {mechanisms}", f"{_count(model):,} parameters", *losses])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_file(temporary, path)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `changes` says, key by key."""
    merged: dict[str, Any] = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
