"""Mechanisms put into a saved or published model: what `attention-zoo swap` and `scripts/swap.py` run, and what recipes swap."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import attention_zoo as az
from attention_zoo.registry import did_you_mean
from attention_zoo.swap.core import find_hosts
from attention_zoo.swap.report import SwapReport
from attention_zoo.training.recipe import RecipeError, SwapRecipe, read_yaml

__all__ = [
    "Source",
    "apply_swap",
    "copy_preprocessing",
    "open_model",
    "parse_layers",
    "read_options",
    "read_swap",
    "require_free",
    "save_swapped",
]

REPORT = "swap_report.json"

# Files of a Hugging Face folder that say how text or images become the model's input.
_PREPROCESSING = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*"),
    *("preprocessor_config.json", "processor_config.json", "image_processor*", "feature_extractor*"),
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """A model to swap in.

    Attributes:
        model: in evaluation mode.
        folder: what it was read from; None for a model of timm's.
        model_args: what `timm.create_model` was given, None for a Hugging Face model.
    """

    model: Any
    folder: Path | None = None
    model_args: dict[str, Any] | None = None


def parse_layers(text: str) -> tuple[int | slice | str, ...]:
    """Layers as text: numbers, slices as Python's, ranges that include their end, patterns of names; several with commas between.

    "3" | "-1" | "8:24" | "::2" | "0-3" | "blocks.*.attn" | "0-3, 7, 10:"

    Raises:
        RecipeError: nothing is named.
    """
    layers: list[int | slice | str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if re.fullmatch(r"-?\d+", part):
            layers.append(int(part))
        elif re.fullmatch(r"(-?\d+)?(:(-?\d+)?){1,2}", part):
            layers.append(slice(*(int(n) if n else None for n in part.split(":"))))
        elif found := re.fullmatch(r"(\d+)-(\d+)", part):
            layers.append(slice(int(found[1]), int(found[2]) + 1))
        else:
            layers.append(part)
    if not layers:
        raise RecipeError(f"no layers in {text!r}: numbers, slices (8:24), ranges (0-3) or patterns of names, commas between")
    return tuple(layers)


def read_swap(
    mechanism: str | None = None,
    *,
    layers: str | None = None,
    maps: Iterable[str] = (),
    map_file: str | Path | None = None,
    options: Iterable[str] = (),
    init: str = "convert",
    aux_loss_coef: float | None = None,
) -> SwapRecipe:
    """What is said on a command line.

    Args:
        mechanism, layers, init, aux_loss_coef: as in `SwapRecipe`.
        maps: "LAYERS:MECHANISM" each.
        map_file: YAML or JSON, layers -> mechanism, or [mechanism, options].
        options: "key=value", the value in YAML, for every mechanism; "mechanism.key=value" for one.

    Raises:
        RecipeError: both or neither of a mechanism and a mapping, or what is not written so.
        FileNotFoundError: no such mapping file.
    """
    mapping = _read_map_file(Path(map_file)) if map_file is not None else {}
    for entry in maps:
        where, colon, name = entry.rpartition(":")
        if not colon or not where or not name:
            raise RecipeError(f"a mapping is written LAYERS:MECHANISM, as 0-3:moh; got {entry!r}")
        mapping[where] = name
    for_all, for_one = _read_options_of_each(options)
    named = {_name_and_options(value)[0] for value in mapping.values()} | ({mechanism} if mechanism else set())
    if unused := sorted(for_one.keys() - named):
        raise RecipeError(
            f"options for {', '.join(unused)}, which is not among the mechanisms {', '.join(map(str, sorted(named)))}"
        )
    if mechanism is not None:
        for_all |= for_one.get(mechanism, {})
    entries = {where: _name_and_options(value) for where, value in mapping.items()}
    full = {where: [name, {**for_one.get(name, {}), **own}] for where, (name, own) in entries.items()}
    recipe = SwapRecipe(mechanism=mechanism, layers=layers, map=full, init=init, options=for_all, aux_loss_coef=aux_loss_coef)
    _check(recipe)
    return recipe


def read_options(options: Iterable[str]) -> dict[str, Any]:
    """key=value, the value in YAML. Raises RecipeError for what is not written so."""
    found: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)?", key):
            raise RecipeError(f"an option is written key=value or mechanism.key=value, got {option!r}")
        try:
            found[key] = read_yaml(text)
        except yaml.YAMLError:
            raise RecipeError(f"the value of {option!r} is not YAML") from None
    return found


def apply_swap(model: Any, recipe: SwapRecipe, *, dry_run: bool = False) -> SwapReport:
    """Swap as a recipe says, in place; without the originals, since nobody takes the swap back.

    Raises:
        RecipeError: both or neither of a mechanism and a mapping.
        ValueError, TypeError, UnknownNameError: what `swap_attention` says.
    """
    _check(recipe)
    attention: Any = recipe.mechanism
    layers: Any = None if recipe.layers is None else parse_layers(recipe.layers)
    if recipe.map:
        count = 1 + max((host.index for host in find_hosts(model)), default=-1)
        chosen = {where: tuple(_hashable(part, count) for part in parse_layers(where)) for where in recipe.map}
        attention = {chosen[where]: _name_and_options(value) for where, value in recipe.map.items()}
    extra = {} if recipe.aux_loss_coef is None else {"aux_loss_coef": recipe.aux_loss_coef}
    return az.swap_attention(
        model, attention, layers=layers, init=recipe.init, dry_run=dry_run, keep_original=False, **extra, **recipe.options
    )


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Source:
    """The model of a folder (Hugging Face's, or what `save_pretrained` wrote), of a repository on the hub, or of timm.

    Args:
        name: a folder, "owner/name" on the hub, or "timm/NAME".
        pretrained: timm only: with its published weights.
        model_args: timm only: arguments of `timm.create_model`.
        dtype: of the weights; None: as they were saved.
        device: where the model goes; "meta": it is built without weights, from the configuration alone.

    Raises:
        FileNotFoundError: no such folder or repository.
        RecipeError: arguments that belong to another kind of model, no such dtype or device.
    """
    wanted = None if dtype is None else _dtype(dtype)
    folder, is_timm = Path(name).expanduser(), name.startswith("timm/")
    if (pretrained or model_args) and not is_timm:
        raise RecipeError("--pretrained and --model-arg are for models of timm's (timm/NAME); others come as they were saved")
    if is_timm:
        source = _open_timm(name.removeprefix("timm/"), pretrained, dict(model_args or {}), meta=device == "meta")
    else:
        source = _open_folder(folder if folder.is_dir() else _download(name, config_only=device == "meta"), wanted, device)
    try:
        source.model.to(device=device, dtype=wanted)
    except (RuntimeError, AssertionError) as error:  # torch's ways of saying that there is no such device
        raise RecipeError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    return replace(source, model=source.model.eval())


def require_free(folder: str | Path, *, force: bool = False) -> None:
    """Raise FileExistsError where something stands in the folder already and `force` does not allow to write over it."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; nothing is written over (--force does)")


def save_swapped(source: Source, folder: str | Path, report: Mapping[str, Any] | None = None, *, force: bool = False) -> None:
    """Write the model, what belongs to its input and the report as JSON into a folder, all or nothing.

    Raises:
        FileExistsError: see `require_free`.
    """
    folder = Path(folder)
    require_free(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        az.save_pretrained(source.model, written, model_args=source.model_args)
        if source.folder is not None:
            copy_preprocessing(source.folder, written)
        if report is not None:
            (written / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for old in (path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            old.unlink()  # shards of before would be read in the place of the new file
        for path in written.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def copy_preprocessing(source: Path, target: Path) -> None:
    """Copy tokenizer and processor files that stand beside a Hugging Face model."""
    for path in (path for pattern in _PREPROCESSING for path in source.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _check(recipe: SwapRecipe) -> None:
    if (recipe.mechanism is None) == (not recipe.map):
        raise RecipeError("a swap names one mechanism, or a mapping from layers to mechanisms")
    if recipe.map and recipe.layers is not None:
        raise RecipeError("a mapping says its layers itself: leave layers out")


def _read_map_file(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"{path} must hold layers and their mechanisms, as 0:4: moh")
    return {str(where): value for where, value in content.items()}


def _read_options_of_each(options: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options of every mechanism, and those of single ones by name."""
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {}
    for key, value in read_options(options).items():
        mechanism, _, name = key.rpartition(".")
        (for_one.setdefault(mechanism, {}) if mechanism else for_all)[name] = value
    return for_all, for_one


def _name_and_options(value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
        return value[0], dict(value[1])
    raise RecipeError(f"a layer's mechanism is its name, or [name, {{option: value}}]; got {value!r}")


def _hashable(part: int | slice | str, count: int) -> Any:
    """A slice of `count` layers as a range, which can be a key."""
    return range(*part.indices(count)) if isinstance(part, slice) else part


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(f"dtype must be float32, bfloat16, float16 or float64, got {name!r}")
    return found


def _open_timm(name: str, pretrained: bool, model_args: dict[str, Any], *, meta: bool) -> Source:
    if not timm.is_model(name.split(".")[0]):
        raise RecipeError(f"timm has no model {name!r}" + did_you_mean(name.split(".")[0], timm.list_models()))
    if pretrained and meta:
        raise RecipeError("there are no weights on the device meta: leave --pretrained out")
    with torch.device("meta" if meta else "cpu"):
        return Source(timm.create_model(name, pretrained=pretrained, **model_args), model_args=model_args)


def _open_folder(folder: Path, dtype: torch.dtype | None, device: str | None) -> Source:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: neither a Hugging Face model nor one that save_pretrained wrote")
    config = json.loads(file.read_text(encoding="utf-8"))
    model_args = config.get("model_args") if "architecture" in config else None
    if device == "meta":
        if config.get("zoo_swap"):
            raise RecipeError("a model that is swapped already needs its weights: another device than meta")
        return Source(_without_weights(folder, config, dtype), folder, model_args)
    kwargs: dict[str, Any] = {} if dtype is None or model_args is not None else {"dtype": dtype}
    return Source(az.from_pretrained(folder, **kwargs), folder, model_args)


def _without_weights(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    with torch.device("meta"):
        if "architecture" in config:
            return timm.create_model(config["architecture"], **config["model_args"])
        import transformers

        loaded = transformers.AutoConfig.from_pretrained(folder)
        kind: Any = getattr(transformers, (loaded.architectures or ["AutoModel"])[0])
        return kind._from_config(loaded, dtype=loaded.dtype if dtype is None else dtype)


def _download(name: str, *, config_only: bool) -> Path:
    """The snapshot of a repository on Hugging Face's hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"] if config_only else None))
    except HFValidationError:
        raise FileNotFoundError(f"no folder {name}") from None
    except OSError as error:
        hint = f"; timm's are written timm/{name}" if timm.is_model(name) else ""
        text = str(error).splitlines()[0]
        raise FileNotFoundError(f"no folder {name}, and Hugging Face's hub does not give it{hint}: {text}") from None
