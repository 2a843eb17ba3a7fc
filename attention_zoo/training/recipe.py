"""Recipes: everything that decides a training run, as frozen dataclasses read from YAML.

A recipe file holds any part of `Recipe`; what it leaves out has the default written here. On the command line every key can be
overridden by its dotted name: `optimizer.lr=1e-3`, `model.kwargs.embed_dim=32`. A program that needs other sections has a class of
recipes of its own (`text.TextRecipe`); its files say `kind: text`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

__all__ = [
    "AugmentRecipe",
    "DataRecipe",
    "EmaRecipe",
    "EngineRecipe",
    "LossRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "OutputRecipe",
    "Recipe",
    "RecipeError",
    "RecipeSections",
    "ScheduleRecipe",
    "SwapRecipe",
    "apply_overrides",
    "build_recipe",
    "describe_recipe",
    "list_recipes",
    "load_recipe",
    "make_recipe",
    "nearest_key",
    "read_recipe",
    "read_yaml",
]


class RecipeError(ValueError):
    """A recipe that cannot be followed. The message names the key, what was given and what would be right."""


@dataclass(frozen=True)
class SwapRecipe:
    """Mechanisms to put into a pretrained model: the arguments of `attention_zoo.swap_attention`.

    Attributes:
        mechanism: registered mechanism; null where `map` says everything.
        layers: which attention layers, "8:24", "0-3, 7", "blocks.*.attn" (see `swap.parse_layers`); null: all.
        map: layers -> mechanism, or [mechanism, options], instead of `mechanism` and `layers`.
        init: "convert", "mean_pool" or "random".
        options: of the mechanism; those of `map` win.
        aux_loss_coef: weight of the mechanisms' auxiliary losses in the loss of a Hugging Face model; null: the swap's own. Runs on
            images weigh theirs by `loss.aux_weight`.
    """

    mechanism: str | None = None
    layers: str | None = None
    map: dict[str, Any] = field(default_factory=dict)
    init: str = "convert"
    options: dict[str, Any] = field(default_factory=dict)
    aux_loss_coef: float | None = None


@dataclass(frozen=True)
class ModelRecipe:
    """Which model: the arguments of `attention_zoo.create_model`, and what is swapped in it.

    Attributes:
        name: a model that `create_model` knows.
        attention: registered mechanism to put into it; null: the model's own.
        attention_kwargs: options of the mechanism.
        pretrained: start from timm's published weights (downloads them).
        checkpoint_path: start from this file, ours or official, or from a folder that `attention-zoo swap` wrote for a model of
            timm's; the head is replaced when the number of classes differs.
        kwargs: any other argument of the model: img_size, in_chans, embed_dim, drop_path_rate, ...
        swap: mechanisms that take the place of its attention layers once its weights are there; null: none. A checkpoint that was
            swapped when it was written comes as it was.
    """

    name: str = "litv2_s"
    attention: str | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint_path: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    swap: SwapRecipe | None = None


@dataclass(frozen=True)
class DataRecipe:
    """Which images, and the form in which the model sees them.

    Attributes:
        name: "folder" (root/train/class/*.png, root/val/...), "torchvision/CIFAR100", "hf/owner/name", or "sklearn-digits".
        root: folder of the images or of the download.
        train_split, val_split: names of the two splits.
        download: whether torchvision and Hugging Face may download.
        split_seed: sklearn-digits only: seed of the split into four fifths for training and one held out.
        image_column, label_column: Hugging Face only.
        batch_size: images per device and step.
        val_batch_size: the same in validation; null: batch_size.
        workers: processes that load images, per device; 0: load in the main process.
        image_size: side of the model's input; null: the model's own.
        mean, std, interpolation, crop_pct: normalisation and resizing; null: the model's own.
    """

    name: str = "folder"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    download: bool = False
    split_seed: int = 0
    image_column: str = "image"
    label_column: str = "label"
    batch_size: int = 64
    val_batch_size: int | None = None
    workers: int = 4
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class AugmentRecipe:
    """timm's augmentation of the training images (`timm.data.create_transform`, `timm.data.Mixup`); the defaults change nothing.

    Attributes:
        crop_scale, crop_ratio: area and aspect ratio of the random crop.
        hflip, vflip: probability of mirroring.
        color_jitter: strength; 0: none.
        auto_augment: timm's policy string, for instance "rand-m9-mstd0.5-inc1"; null: none.
        random_erasing: probability.
        random_erasing_mode: "const", "rand" or "pixel".
        mixup, cutmix: alpha of the Beta distribution; 0: off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of CutMix instead of Mixup when both are on.
    """

    crop_scale: tuple[float, ...] = (1.0, 1.0)
    crop_ratio: tuple[float, ...] = (1.0, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    random_erasing_mode: str = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5


@dataclass(frozen=True)
class LossRecipe:
    """What is minimised: cross-entropy plus `aux_weight` times the mean auxiliary loss of the layers that have one.

    Attributes:
        label_smoothing: share of the target spread over all classes.
        aux_weight: weight of `attention_zoo.auxiliary_loss(model)`; 0: not computed.
    """

    label_smoothing: float = 0.0
    aux_weight: float = 0.01


@dataclass(frozen=True)
class OptimizerRecipe:
    """timm's `create_optimizer_v2`.

    Attributes:
        name: timm's name of the optimizer.
        lr: peak learning rate.
        lr_batch_size: null: lr is what it says; else lr is multiplied by (images per step, over all devices) / lr_batch_size.
        weight_decay: on matrices and kernels; biases, norms and what the model's `no_weight_decay` names are left out.
        layer_decay: factor of the learning rate from each layer to the one below; null: none.
        lr_multipliers: wildcard over parameter names -> factor of their learning rate; the first that matches counts.
        clip_grad: largest norm of the gradient; null: not clipped.
        options: further arguments of the optimizer, for instance {betas: [0.9, 0.98]}.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch_size: int | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    clip_grad: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleRecipe:
    """timm's `create_scheduler_v2`, stepped at every update.

    Attributes:
        name: "cosine", "linear", "step", ... or "constant" (which may still warm up).
        epochs: length of the run, warm-up included.
        warmup_epochs, warmup_lr: linear rise from warmup_lr (scaled by lr_batch_size as lr is) to lr; counted within `epochs`.
        min_lr: where the schedule ends (scaled as lr is).
        decay_epochs, decay_rate: of "step".
    """

    name: str = "cosine"
    epochs: int = 10
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    decay_epochs: float = 30.0
    decay_rate: float = 0.1


@dataclass(frozen=True)
class EmaRecipe:
    """timm's `ModelEmaV3`: an exponential moving average of the weights, which is then what is validated and saved.

    Attributes:
        decay: null: no average.
        warmup: let the decay grow from 0 over the first steps.
    """

    decay: float | None = None
    warmup: bool = True


@dataclass(frozen=True)
class EngineRecipe:
    """How the run is computed.

    Attributes:
        mixed_precision: "no", "fp16", "bf16"; null: what `accelerate launch` says.
        accumulate: batches per update.
        cpu: stay on the CPU although there is a GPU.
        compile: `torch.compile` the model.
        grad_checkpointing: recompute activations in the backward pass.
        channels_last: memory format of images and kernels.
        seed: of the initial weights, the order of the images, augmentation and dropout.
        deterministic: only algorithms that give the same bits every time.
    """

    mixed_precision: str | None = None
    accumulate: int = 1
    cpu: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = False
    seed: int = 0
    deterministic: bool = False


@dataclass(frozen=True)
class OutputRecipe:
    """What is written, and how often.

    Attributes:
        root: folder of the runs.
        name: folder of this run below root; null: the name of the recipe.
        checkpoint_every: updates between checkpoints within an epoch (every epoch ends with one anyway); 0: none.
        keep: how many checkpoints stay.
        log_every: updates between lines in TensorBoard and, away from a terminal, on the screen.
        validate_every: epochs between validations; the last epoch is always validated.
        validate_first: whether to validate before the first update, too: what a converted model starts from.
        tensorboard: whether to write TensorBoard files.
    """

    root: str = "runs"
    name: str | None = None
    checkpoint_every: int = 0
    keep: int = 2
    log_every: int = 50
    validate_every: int = 1
    validate_first: bool = False
    tensorboard: bool = True


@dataclass(frozen=True)
class RecipeSections:
    """Base of the kinds of recipe: each attribute of a subclass is a section of the YAML file, a dataclass with defaults."""

    kind: ClassVar[str]
    program: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars: what YAML and JSON hold, and what `build_recipe` reads back."""
        return _plain(dataclasses.asdict(self))

    def check(self) -> None:
        """Raise RecipeError for values that no run can have."""


@dataclass(frozen=True)
class Recipe(RecipeSections):
    """A training run on images. Each attribute is a section of the YAML file."""

    kind: ClassVar[str] = "images"
    program: ClassVar[str] = "scripts/train.py"

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    output: OutputRecipe = field(default_factory=OutputRecipe)

    def check(self) -> None:
        """Raise RecipeError for values that no run can have."""
        _check(self)


_Kind = TypeVar("_Kind", bound=RecipeSections)


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe for images and apply overrides; see `read_recipe`."""
    return read_recipe(Recipe, name, overrides)


def read_recipe(cls: type[_Kind], name: str | Path, overrides: Iterable[str] = ()) -> _Kind:
    """Read a recipe of the kind `cls` and apply overrides.

    Args:
        cls: the class of the recipe.
        name: path of a YAML file, or the name of a recipe of the zoo: "train/litv2_digits", or "litv2_digits" where that is unique.
        overrides: `key.sub=value`, the value in YAML: `data.mean=[0.5]`, `optimizer.layer_decay=null`.

    Raises:
        RecipeError: no such recipe, one of another kind, not YAML, an unknown key (the nearest is named), a value of the wrong kind
            or out of range.
    """
    path = _find(str(name), cls)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold sections ({', '.join(_sections(cls))}), got {type(content).__name__}")
    if (kind := content.pop("kind", Recipe.kind)) != cls.kind:
        raise RecipeError(f"{path} is a recipe of the kind {kind!r}; {cls.program} follows those of the kind {cls.kind!r}")
    apply_overrides(content, overrides, cls)
    content.setdefault("output", {})
    if isinstance(content["output"], dict):
        content["output"]["name"] = content["output"].get("name") or path.stem
    return build_recipe(cls, content)


def make_recipe(content: Mapping[str, Any]) -> Recipe:
    """Build and check a recipe for images from nested dicts. Raises RecipeError."""
    return build_recipe(Recipe, content)


def build_recipe(cls: type[_Kind], content: Mapping[str, Any]) -> _Kind:
    """Build and check a recipe of the kind `cls` from nested dicts. Raises RecipeError."""
    recipe: _Kind = _build(cls, content, "")
    recipe.check()
    return recipe


def apply_overrides(content: dict[str, Any], overrides: Iterable[str], cls: type[RecipeSections] = Recipe) -> None:
    """Write `section.key=value` overrides into nested dicts. Raises RecipeError for what is not written so."""
    for override in overrides:
        _override(content, override, cls)


def list_recipes(cls: type[RecipeSections] = Recipe) -> list[str]:
    """Names of the recipes of one kind that are installed with the zoo: "train/litv2_digits", ..."""
    root = Path(str(resources.files("attention_zoo.configs")))
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in root.rglob("*.yaml")
        if path.relative_to(root).parts[0] in ("train", "finetune") and _kind_of(path) == cls.kind
    )


def describe_recipe(cls: type[RecipeSections] = Recipe) -> str:
    """Every key with its default, a section on each line."""
    lines = []
    for section, keys in cls().to_dict().items():
        shown = (f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in keys.items())
        lines.append(f"{section}: {', '.join(shown)}")
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """PyYAML reads 8:24 as a number to the base of 60, as YAML 1.1 has it; here it is text, and names layers."""

    def construct_whole_number(self, node: yaml.ScalarNode) -> int | str:
        return str(node.value) if ":" in node.value else int(self.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


def read_yaml(text: str) -> Any:
    """Plain data from YAML. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def _sections(cls: type[RecipeSections]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _kind_of(path: Path) -> str:
    """What a file of ours says in its `kind:`."""
    kind: str = read_yaml(path.read_text(encoding="utf-8")).get("kind", Recipe.kind)
    return kind


def _find(name: str, cls: type[RecipeSections]) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    known = list_recipes(cls)
    stem = name.removesuffix(".yaml")
    found = [k for k in known if stem in (k, k.rsplit("/", 1)[-1])]
    if len(found) == 1:
        return Path(str(resources.files("attention_zoo.configs"))) / f"{found[0]}.yaml"
    if found:
        raise RecipeError(f"{name!r} may be {' or '.join(found)}: give the whole name")
    short = {k.rsplit("/", 1)[-1]: k for k in known}
    nearest = [short.get(m, m) for m in difflib.get_close_matches(stem, [*known, *short], n=3, cutoff=0.5)]
    hint = f"did you mean {', '.join(dict.fromkeys(nearest))}?" if nearest else f"the zoo's recipes: {', '.join(known)}"
    raise RecipeError(f"no recipe file and no recipe of the zoo is named {name!r}; {hint}")


def _override(content: dict[str, Any], override: str, cls: type[RecipeSections]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override is written key.sub=value, got {override!r}")
    try:
        value = read_yaml(text) if text else None
    except yaml.YAMLError:
        raise RecipeError(f"the value of {override!r} is not YAML") from None
    *parents, last = key.split(".")
    if not parents:
        hint = nearest_key(key, _sections(cls), cls=cls)
        raise RecipeError(f"{key!r} is a section or no key at all{hint}; an override is written section.key=value")
    for parent in parents:
        inner = content.get(parent)
        content[parent] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise RecipeError(f"{key!r}: {parent!r} holds a value, not keys")
        content = inner
    content[last] = value


def _build(cls: type, content: Any, where: str, root: type | None = None) -> Any:
    """A dataclass from a dict, every value checked against its annotation; `root` is the recipe that it is a section of."""
    root = cls if root is None else root
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where or 'a recipe'} must hold keys, got {content!r}")
    hints = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise RecipeError(f"a recipe has no key {name!r}{nearest_key(str(key), hints, where, root)}")
        values[key] = _convert(hints[key], value, name, root)
    return cls(**values)


def _convert(kind: Any, value: Any, name: str, root: type) -> Any:
    """`value` as the annotation `kind` wants it: YAML reads 5e-4 as text, and lists stand for tuples."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), {} if value is None else value, name, root)
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        return _convert(next(k for k in kind.__args__ if k is not type(None)), value, name, root)
    origin = typing.get_origin(kind) or kind
    if origin is dict and isinstance(value, dict):
        inner = typing.get_args(kind)[1]
        return {str(k): value[k] if inner is Any else _convert(inner, value[k], f"{name}.{k}", root) for k in value}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(typing.get_args(kind)[0], v, name, root) for v in value)
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(origin, type) and isinstance(value, origin) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = _WANTED.get(getattr(origin, "__name__", ""), str(kind))
    raise RecipeError(f"{name} must be {wanted}, got {value!r}")


_WANTED = {
    "dict": "keys with values",
    "tuple": "a list of numbers",
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}


def _check(recipe: Recipe) -> None:
    """Raise RecipeError for values that no run can have."""

    def require(fits: bool, name: str, wanted: str) -> None:
        if not fits:
            section, key = name.split(".")
            raise RecipeError(f"{name} must be {wanted}, got {getattr(getattr(recipe, section), key)!r}")

    data, augment, schedule, engine, output = recipe.data, recipe.augment, recipe.schedule, recipe.engine, recipe.output
    require(data.batch_size >= 1, "data.batch_size", "at least 1")
    require(data.workers >= 0, "data.workers", "0 or more")
    for name, pair in (("crop_scale", augment.crop_scale), ("crop_ratio", augment.crop_ratio)):
        require(len(pair) == 2 and 0 < pair[0] <= pair[1], f"augment.{name}", "two positive numbers, the smaller first")
    mixes = augment.mixup > 0 or augment.cutmix > 0
    require(not (mixes and data.batch_size % 2), "data.batch_size", "even, as Mixup and CutMix mix pairs")
    require(0 <= recipe.loss.label_smoothing < 1, "loss.label_smoothing", "at least 0 and below 1")
    require(recipe.optimizer.lr > 0, "optimizer.lr", "positive")
    require(schedule.epochs >= 1, "schedule.epochs", "at least 1")
    require(
        0 <= schedule.warmup_epochs <= schedule.epochs, "schedule.warmup_epochs", f"from 0 to schedule.epochs={schedule.epochs}"
    )
    require(recipe.ema.decay is None or 0 < recipe.ema.decay < 1, "ema.decay", "between 0 and 1, or null")
    require(engine.mixed_precision in (None, "no", "fp16", "bf16"), "engine.mixed_precision", "no, fp16, bf16 or null")
    require(engine.accumulate >= 1, "engine.accumulate", "at least 1")
    require(output.checkpoint_every >= 0, "output.checkpoint_every", "0 or more")
    for name in ("keep", "log_every", "validate_every"):
        require(getattr(output, name) >= 1, f"output.{name}", "at least 1")


def nearest_key(key: str, known: Iterable[str], where: str = "", cls: type = Recipe) -> str:
    """ "; did you mean ...?", or what there is."""
    known = list(known)
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    if found:
        return f"; did you mean {prefix + found[0]!r}?"
    hints = {s.name: typing.get_type_hints(cls)[s.name] for s in dataclasses.fields(cls)}
    sections = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    elsewhere = [f"{name}.{key}" for name, section in sections.items() if key in typing.get_type_hints(section)]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; keys {f'of {where}' if where else 'here'}: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
