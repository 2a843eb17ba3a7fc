"""Saving and loading swapped models: which layers are swapped is part of the checkpoint, and the weights come back bit by bit.

Hugging Face models save themselves; their configuration holds the swaps. timm models have no file format that says how they were
built beyond their name, so theirs is here: `config.json` and `model.safetensors` in a folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_model
from torch import nn

from attention_zoo.checkpoints.convert import CheckpointError
from attention_zoo.checkpoints.files import read_checkpoint
from attention_zoo.registry import some
from attention_zoo.swap.core import swap_attention, swaps_of

__all__ = ["from_pretrained", "save_pretrained", "swap_again"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TIMM_FORMAT = "attention_zoo.timm"


def save_pretrained(model: Any, path: str | Path, *, model_args: Mapping[str, Any] | None = None) -> None:
    """Save a swapped model as a folder: a Hugging Face model as it does itself, a timm model with its name, arguments and swaps.

    Args:
        model: a model that `swap_attention` changed, or did not.
        path: the folder; made if it is not there.
        model_args: what `timm.create_model` was given besides the name (img_size, ...); num_classes is read from the model.

    Raises:
        ValueError: a model of neither kind, or arguments that JSON cannot hold.
    """
    if hasattr(model, "save_pretrained"):
        if model_args is not None:
            raise ValueError("a Hugging Face model is built from its configuration: leave model_args out")
        model.save_pretrained(path)
        return
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if architecture is None:
        raise ValueError(f"{type(model).__name__} is neither a Hugging Face model nor one that timm.create_model built")
    args = {"num_classes": getattr(model, "num_classes", 0), **(model_args or {})}
    config = {"format": _TIMM_FORMAT, "architecture": architecture, "model_args": args, "zoo_swap": swaps_of(model)}
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise ValueError(f"model_args are saved as JSON: {error}") from error
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    save_model(model, str(folder / _WEIGHTS), metadata={"format": "pt"})


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved with its swaps: the host is built, its layers swapped as they were, then the weights are read.

    Args:
        path: a folder, or a repository on Hugging Face's hub.
        kwargs: for a Hugging Face model, what its own `from_pretrained` takes.

    Returns: the model in eval mode; its original layers are not there, so it cannot be unswapped.

    Raises:
        FileNotFoundError: no configuration is there.
        CheckpointError: weights that are missing or have no place; all of them are listed.
        TypeError: kwargs for a timm model.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path)))
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"no {_CONFIG} in {folder}")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("format") != _TIMM_FORMAT:
        return _load_transformers(folder, kwargs)
    if kwargs:
        raise TypeError(f"a timm model is built as it was saved; {', '.join(kwargs)} cannot be given")
    model = timm.create_model(config["architecture"], **config["model_args"])
    swap_again(model, config["zoo_swap"])
    state = read_checkpoint(folder / _WEIGHTS)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    _refuse_other_keys([n for n in model.state_dict() if n not in state], [n for n in state if n not in model.state_dict()])
    model.load_state_dict(state)
    return model.eval()


def swap_again(model: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Swap as the entries say, which is how the layers are built; their weights are read afterwards."""
    for init in dict.fromkeys(entry["init"] for entry in entries):
        chosen = {entry["name"]: (entry["mechanism"], _tuples(entry["options"])) for entry in entries if entry["init"] == init}
        swap_attention(model, chosen, init=init, keep_original=False)


def _load_transformers(folder: Path, kwargs: dict[str, Any]) -> Any:
    """Hugging Face's own loading, into a model whose layers were swapped before."""
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    if kind is None:
        raise CheckpointError(f"{folder}: transformers has no {config.architectures}")
    entries = getattr(config, "zoo_swap", None) or []
    if not entries:
        return kind.from_pretrained(folder, **kwargs)
    del config.zoo_swap
    dtype = kwargs.get("dtype", "auto")
    dtype = config.dtype if dtype in (None, "auto") else dtype
    model = kind._from_config(config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    swap_again(model, entries)
    wanted = model.state_dict().keys()
    loaded, info = _with_skeleton(kind, model).from_pretrained(folder, output_loading_info=True, **kwargs)
    _refuse_other_keys([n for n in info["missing_keys"] if n in wanted], info["unexpected_keys"])
    model.load_state_dict(loaded.state_dict(), assign=True)  # into the model whose other buffers, in no file, are right
    model.tie_weights()
    model.config = loaded.config
    model.config.zoo_swap = entries
    if getattr(loaded, "generation_config", None) is not None:
        model.generation_config = loaded.generation_config
    return model.eval()


def _with_skeleton(kind: Any, model: nn.Module) -> Any:
    """A class whose instances have `model`'s swapped layers, on the meta device, in the place of `kind`'s own."""

    def skeleton(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        for name, child in model.named_children():
            memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in child.parameters()}
            setattr(self, name, copy.deepcopy(child, memo))
        self.tie_weights()

    return type(kind.__name__, (kind,), {"__init__": skeleton, "__module__": kind.__module__})


def _refuse_other_keys(missing: Any, unknown: Any) -> None:
    missing, unknown = sorted(missing), sorted(unknown)
    if missing or unknown:
        raise CheckpointError(
            "the file does not hold the swapped model's weights"
            + (f"; missing: {some(missing)}" if missing else "")
            + (f"; without a place: {some(unknown)}" if unknown else "")
        )


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them back, as the tuples that options are."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
