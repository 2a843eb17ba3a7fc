"""Files of a run: weights that describe their model, and the state that a restart needs. Both are written whole or not at all.

Weights are safetensors; the header's `attention_zoo` entry holds a `Description` as JSON, so that validate.py and predict.py need
nothing but the file. The state is a PyTorch file of tensors, numbers, text, lists and dicts, read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError, read_checkpoint
from attention_zoo.swap.save import swap_again
from attention_zoo.training.data import InputConfig
from attention_zoo.training.recipe import ModelRecipe, RecipeError
from attention_zoo.training.swap import apply_swap

__all__ = ["Description", "Run", "load_model", "read_description", "replace_file", "save_weights"]


@dataclass(frozen=True)
class Description:
    """What a weights file says about its model.

    Attributes:
        model, attention, attention_kwargs, kwargs: arguments of `create_model` (kwargs hold num_classes).
        zoo_swap: what is swapped in it, layer by layer, as `swap_attention` records it.
        class_names: of the outputs, in order.
        input: the `InputConfig` as a dict.
        data: the recipe's data section.
        epoch, step, metrics: where the run stood, and the last validation.
    """

    model: str
    attention: str | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    zoo_swap: list[dict[str, Any]] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    input: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def input_config(self) -> InputConfig:
        return InputConfig.from_dict(self.input)


def build_model(recipe: ModelRecipe, num_classes: int) -> Any:
    """The recipe's model with `num_classes` outputs, its weights loaded where the recipe names a source, then swapped.

    Raises:
        RecipeError: a checkpoint that was swapped holds another model than the recipe's.
    """
    model = _build_host(recipe, num_classes)
    if recipe.swap is not None:
        apply_swap(model, recipe.swap)
    return model


def _build_host(recipe: ModelRecipe, num_classes: int) -> Any:
    kwargs = dict(recipe.kwargs)
    options: dict[str, Any] = {"attention": recipe.attention, "attention_kwargs": recipe.attention_kwargs or None}
    if recipe.checkpoint_path is None:
        return az.create_model(recipe.name, pretrained=recipe.pretrained, **options, **{**kwargs, "num_classes": num_classes})
    described = read_description(recipe.checkpoint_path)
    if described is not None:
        kwargs.setdefault("num_classes", described.kwargs.get("num_classes", num_classes))
    if described is not None and described.zoo_swap:
        if (recipe.name, recipe.attention) != (described.model, described.attention):
            raise RecipeError(
                f"{recipe.checkpoint_path} holds {described.model!r}, swapped: set model.name to that, not {recipe.name!r}"
            )
        model: Any = load_model(recipe.checkpoint_path, replace(described, kwargs=kwargs))[0].train()
    else:
        model = az.create_model(recipe.name, checkpoint_path=str(_weights_file(recipe.checkpoint_path)), **options, **kwargs)
    if getattr(model, "num_classes", num_classes) != num_classes:
        model.reset_classifier(num_classes)
    return model


def load_model(path: str | Path, description: Description | None = None) -> tuple[nn.Module, Description]:
    """The model of a weights file, in evaluation mode, through `create_model(checkpoint_path=...)`.

    Args:
        description: what model it is, for a file that does not say (an official one).

    Raises:
        FileNotFoundError: no such file. CheckpointError: damaged, hostile, or not saying what it is.
    """
    own = read_description(path)
    if description is None and own is None:
        raise CheckpointError(f"{path} does not say which model it holds: name it (--model)")
    chosen = description if description is not None else own
    assert chosen is not None
    options: dict[str, Any] = {"attention": chosen.attention, "attention_kwargs": chosen.attention_kwargs or None, **chosen.kwargs}
    if not chosen.zoo_swap:
        return az.create_model(chosen.model, checkpoint_path=str(_weights_file(path)), **options).eval(), chosen
    model: Any = az.create_model(chosen.model, **options)
    swap_again(model, chosen.zoo_swap)
    try:
        model.load_state_dict(read_checkpoint(_weights_file(path)))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {chosen.model!r} with its swapped layers: {error}") from None
    return model.eval(), chosen


def read_description(path: str | Path) -> Description | None:
    """What a weights file says about its model; None for a file that says nothing (official, or not safetensors).

    A folder that `attention_zoo.save_pretrained` wrote for a model of timm's says name, arguments and swaps.

    Raises:
        FileNotFoundError: no such file. CheckpointError: a damaged file, a folder of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("attention_zoo")
        if text is None:
            return None
        content = json.loads(text)
        return Description(**{**content, "class_names": tuple(content.get("class_names", ()))})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the description in {path} is damaged: {error}") from None


def _read_folder(folder: Path) -> Description:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "architecture" not in config or "zoo_swap" not in config:
        raise CheckpointError(f"{folder} is no file, and no folder that attention_zoo.save_pretrained wrote for a model of timm's")
    name: str = config["architecture"]
    return Description(model=name.split(".")[0], kwargs=config["model_args"], zoo_swap=config["zoo_swap"])


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def save_weights(path: str | Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write weights and their description as safetensors, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", "attention_zoo": json.dumps(asdict(description))}
    temporary = _temporary(Path(path))
    save_file(tensors, temporary, metadata=metadata)
    replace_file(temporary, path)


class Run:
    """The folder of a run: `checkpoints/step-00001234/{model.safetensors, ema.safetensors, state.pt}` and what stands beside it.

    A checkpoint is written under another name and renamed when all of it is on the disk, so one that has its name is whole.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def checkpoints(self) -> list[Path]:
        """The whole ones, the oldest first."""
        return sorted(p for p in (self.folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))

    def save(self, step: int, weights: Mapping[str, Mapping[str, Tensor]], description: Description, state: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest beyond `keep`. `weights` maps file stems to state dicts."""
        final = self.folder / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for stem, tensors in weights.items():
            save_weights(temporary / f"{stem}.safetensors", tensors, description)
        torch.save(state, temporary / "state.pt")
        _sync(temporary / "state.pt")
        if final.exists():  # the epoch ends where a checkpoint was due anyway: the newer one knows more
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(final.parent)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def load(self, checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Weights by file stem, and the state. Raises CheckpointError for a damaged or hostile file."""
        file = checkpoint / "state.pt"
        if not file.is_file():
            raise FileNotFoundError(f"{checkpoint} is not a checkpoint of a run: it has no state.pt")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged and for refused files
            raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        return {p.stem: read_checkpoint(p) for p in sorted(checkpoint.glob("*.safetensors"))}, state


def replace_file(temporary: str | Path, final: str | Path) -> None:
    """Rename a finished file into its place, after its content has reached the disk."""
    _sync(Path(temporary))
    os.replace(temporary, final)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
