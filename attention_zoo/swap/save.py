"""Saving and loading swapped models: which layers are swapped is part of the checkpoint, and the weights come back bit by bit.

Hugging Face models save themselves; their configuration holds the swaps. timm models have no file format that says how they were
built beyond their name, so theirs is here: `config.json` and `model.safetensors` in a folder.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_model
from torch import nn

from attention_zoo.attention.base import AttentionModule
from attention_zoo.checkpoints.convert import CheckpointError
from attention_zoo.checkpoints.files import read_checkpoint
from attention_zoo.registry import create_attention, some
from attention_zoo.swap.convert import rebuild_mechanism
from attention_zoo.swap.core import AUX_LOSS_COEF, find_hosts, slot_of
from attention_zoo.swap.hosted import settle
from attention_zoo.swap.record import RECORD, configurations, is_hugging_face, read_record, slots_of, swaps_of, write_record
from attention_zoo.swap.timm_args import find_timm_args, timm_name

__all__ = ["from_pretrained", "save_pretrained", "swap_again"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TIMM_FORMAT = "attention_zoo.timm"
# Of Hugging Face's `from_pretrained`: what says where on the hub the files are.
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_FILES = ("*.json", "*.safetensors", "*.bin", "*.py")


def save_pretrained(model: Any, path: str | Path, *, model_args: Mapping[str, Any] | None = None) -> None:
    """Save a swapped model as a folder: a Hugging Face model as it does itself, a timm model with its name, arguments and swaps.

    What a timm model was built with is read from it, and the model is built once more, without memory, to see whether that is all.

    Args:
        model: a model that `swap_attention` changed, or did not; also compiled or in a `DataParallel` wrapper, which are not saved.
        path: the folder; made if it is not there.
        model_args: arguments of `timm.create_model` besides the name, where they cannot be read from a timm model (img_size,
            in_chans, num_classes, embed_dim, depth and the like can).

    Raises:
        ValueError: a model of neither kind, one that its name and arguments do not build, or arguments that JSON cannot hold.
            Nothing is written.
    """
    model = _unwrapped(model)
    if hasattr(model, "save_pretrained"):
        if model_args is not None:
            raise ValueError("a Hugging Face model is built from its configuration: leave model_args out")
        if is_hugging_face(model):
            write_record(model)
        model.save_pretrained(path)
        return
    name = timm_name(model)
    config = {"format": _TIMM_FORMAT, "architecture": name, "model_args": find_timm_args(model, name, model_args or {})}
    try:
        text = json.dumps({**config, RECORD: swaps_of(model)}, indent=2)
    except TypeError as error:
        raise ValueError(f"model_args are saved as JSON: {error}") from error
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    save_model(model, str(folder / _WEIGHTS), metadata={"format": "pt"})


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved with its swaps: the host is built, its layers swapped as they were, then the weights are read.

    transformers' own `from_pretrained` does not know the swaps: it reports the layers as unexpected and missing keys in a warning,
    and starts the original ones anew.

    Args:
        path: a folder, or a repository on Hugging Face's hub.
        kwargs: where on the hub and in the repository the files are (revision, token, cache_dir, force_download, local_files_only,
            subfolder); for a Hugging Face model, all that its own `from_pretrained` takes (dtype, device_map, ...).

    Returns: the model in eval mode; its original layers are not there, so it cannot be unswapped. With output_loading_info=True,
        the model and what Hugging Face says of loading it.

    Raises:
        FileNotFoundError: no configuration is there.
        CheckpointError: a model or layer that is not known, weights that are missing or have no place; all of them are listed.
        TypeError: other kwargs for a timm model.
    """
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), allow_patterns=list(_FILES), **hub))
    folder = folder / (kwargs.pop("subfolder", None) or "")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"no {_CONFIG} in {folder}")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("format") != _TIMM_FORMAT:
        return _load_transformers(folder, kwargs)
    if kwargs:
        raise TypeError(f"a timm model is built as it was saved; {', '.join(kwargs)} cannot be given")
    return _load_timm(folder, config)


def _unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile` and the parallel wrappers return."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or "_orig_mod" in getattr(model, "_modules", ()):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def swap_again(model: nn.Module, entries: Iterable[Mapping[str, Any]]) -> None:
    """Put mechanisms as they were recorded (`swaps_of`) into a model's layers; their weights are to be read afterwards.

    Raises:
        CheckpointError: layers that the model does not have.
    """
    _install_again(model, entries)
    settle(model)


def _install_again(model: nn.Module, entries: Iterable[Mapping[str, Any]]) -> None:
    hosts = {host.name: host for host in find_hosts(model)}  # also those that only a part of this model can swap
    entries = list(entries)
    if lost := [entry["name"] for entry in entries if entry["name"] not in hosts]:
        raise CheckpointError(f"{type(model).__name__} has no attention layer {some(lost)}")
    for entry in entries:
        host = hosts[entry["name"]]
        mechanism = rebuild_mechanism(host, entry["mechanism"], _tuples(entry["constructor"]))
        host.adapter.install(model, host, mechanism)
        slot = slot_of(model, host)
        slot.init, slot.options = entry["init"], dict(entry["options"])
        slot.aux_loss_coef = entry.get("aux_loss_coef", AUX_LOSS_COEF)


def _load_timm(folder: Path, config: dict[str, Any]) -> Any:
    model = timm.create_model(config["architecture"], **_tuples(config["model_args"]))
    swap_again(model, config[RECORD])
    state = read_checkpoint(folder / _WEIGHTS)
    own = model.state_dict()
    _refuse_other_keys([name for name in own if name not in state], [name for name in state if name not in own])
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    else:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = tensor.data.to(state[name].dtype if name in state else tensor.dtype)
    model.load_state_dict(state)
    return model.eval()


def _load_transformers(folder: Path, kwargs: dict[str, Any]) -> Any:
    """Hugging Face's own loading, into a model whose layers are swapped as soon as it is built."""
    from transformers import AutoConfig

    told = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    config = kwargs["config"] if not isinstance(kwargs.get("config", ""), str) else AutoConfig.from_pretrained(folder, **told)
    kind = _model_class(config, folder)
    with_info = kwargs.pop("output_loading_info", False)
    swapped = any(getattr(one, RECORD, None) for one in configurations(config))
    loading = _swapping_class(kind) if swapped else kind
    model, info = loading.from_pretrained(folder, output_loading_info=True, **kwargs)
    model.__class__ = kind
    foreign = [name for name in info["unexpected_keys"] if ".mechanism." in name]
    if swapped or foreign:
        own = model.state_dict().keys()
        _refuse_other_keys([name for name in info["missing_keys"] if name in own], info["unexpected_keys"])
    _restore_buffers(model)
    settle(model)
    return (model, info) if with_info else model


def _model_class(config: Any, folder: Path) -> Any:
    """The class of transformers, or one that its Auto classes were told of, that the configuration names.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    import transformers

    names = config.architectures or []
    if len(names) != 1:
        raise CheckpointError(f"{folder / _CONFIG} should name one class in `architectures`; it has {names or 'none'}")
    (name,) = names
    if (kind := getattr(transformers, name, None)) is not None:
        return kind
    autos = [getattr(transformers, auto) for auto in dir(transformers.models.auto) if auto.startswith("AutoModel")]
    mappings = [mapping for auto in autos if (mapping := getattr(auto, "_model_mapping", None)) is not None]
    for kind in (mapping[type(config)] for mapping in mappings if type(config) in mapping):
        if getattr(kind, "__name__", None) == name:
            return kind
    beside = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        kind = getattr(importlib.import_module(beside), name, None)
    except ImportError:
        kind = None
    if kind is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no model {name!r}; was it registered?")
    return kind


def _swapping_class(kind: Any) -> Any:
    """A class whose instances have the layers that their configuration says in the place of `kind`'s own."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        _install_again(self, read_record(self))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _restore_buffers(model: nn.Module) -> None:
    """Fill what mechanisms hold besides what is in files: transformers builds models without memory, and leaves it unset."""
    for slot in slots_of(model).values():
        for module in slot.mechanism.modules():
            unsaved = module._non_persistent_buffers_set
            if isinstance(module, AttentionModule) and unsaved:
                fresh = create_attention(module.attention_info.name, **module.constructor_options())
                for name in unsaved:
                    module.get_buffer(name).copy_(fresh.get_buffer(name))


def _refuse_other_keys(missing: Iterable[str], unknown: Iterable[str]) -> None:
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
