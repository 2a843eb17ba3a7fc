"""What is swapped in a model: read from its slots, and written into the configurations that Hugging Face saves.

The slots are the truth. A Hugging Face model's configuration holds a copy of it, `zoo_swap`, for its file. It stands in the
configuration of the innermost pretrained model around a layer, and its names count from there: a decoder's in `LlamaModel`'s, a
tower's in the tower's. So it does not matter whether the whole model or a part of it is saved and loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from attention_zoo.checkpoints.convert import CheckpointError
from attention_zoo.registry import some
from attention_zoo.swap.slot import Slot

__all__ = ["RECORD", "configurations", "is_hugging_face", "read_record", "slots_of", "swaps_of", "write_record"]

RECORD = "zoo_swap"  # in a Hugging Face configuration


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """The slots of a model, in its order, by the names of the layers that they replace."""
    slots = ((name, module) for name, module in model.named_modules() if isinstance(module, Slot))
    return {name.removesuffix(f".{slot.place}") if slot.place else name: slot for name, slot in slots}


def swaps_of(model: nn.Module) -> list[dict[str, Any]]:
    """What is swapped in a model, layer by layer, as plain data: name, mechanism, init, options and constructor."""
    return [slot.entry(name) for name, slot in slots_of(model).items()]


def is_hugging_face(module: Any) -> bool:
    """Whether a module is one of transformers' models."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and issubclass(type(module), transformers.PreTrainedModel)


def configurations(config: Any) -> Iterator[Any]:
    """A configuration of transformers and all that it holds: of a text model, a vision tower, ..."""
    from transformers import PreTrainedConfig

    seen: list[Any] = []
    waiting = [config] if isinstance(config, PreTrainedConfig) else []
    while waiting:
        config = waiting.pop(0)
        if all(config is not one for one in seen):
            seen.append(config)
            waiting += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
            yield config


def write_record(model: Any) -> None:
    """Write into the configurations of a Hugging Face model what is swapped in it now; nothing is left where nothing is."""
    configs = list(configurations(model.config))
    for config in configs:
        vars(config).pop(RECORD, None)
    saved = {id(config) for config in configs}  # what is not held by the model's own configuration is in no file
    towers = [(n, m) for n, m in model.named_modules() if is_hugging_face(m) and id(m.config) in saved]
    entries = [(_innermost(towers, entry["name"]), entry) for entry in swaps_of(model)]
    owners = {id(config): {name for (name, tower), _ in entries if tower.config is config} for config in configs}
    shared = any(len(names) > 1 for names in owners.values())  # twins with one configuration: all names count from the model
    for (name, tower), entry in entries:
        config, prefix = (model.config, "") if shared or not name else (tower.config, f"{name}.")
        setattr(config, RECORD, [*getattr(config, RECORD, []), {**entry, "name": entry["name"].removeprefix(prefix)}])


def read_record(model: nn.Module) -> list[dict[str, Any]]:
    """What the configurations of a model say is swapped in it, with names that count from the model.

    Raises:
        CheckpointError: layers that the model does not have.
    """
    known = {name for name, _ in model.named_modules()}
    found: dict[int, list[dict[str, Any]]] = {}
    failed: dict[int, list[str]] = {}
    for prefix, module in reversed(list(model.named_modules())):  # the innermost first
        config = vars(module).get("config")
        entries = getattr(config, RECORD, None)
        if not entries or id(config) in found:
            continue
        names = [f"{prefix}.{entry['name']}" if prefix else entry["name"] for entry in entries]
        if missing := [name for name in names if name not in known]:
            failed[id(config)] = missing
        else:
            found[id(config)] = [{**entry, "name": name} for entry, name in zip(entries, names, strict=True)]
    if lost := [name for key, names in failed.items() if key not in found for name in names]:
        raise CheckpointError(f"{type(model).__name__} has no layer {some(lost)}, which {RECORD} says is swapped")
    return [entry for entries in found.values() for entry in entries]


def _innermost(towers: list[tuple[str, Any]], name: str) -> tuple[str, Any]:
    """The innermost of these modules around the layer `name`."""
    around = [tower for tower in towers if not tower[0] or name.startswith(f"{tower[0]}.")]
    return max(around, key=lambda tower: len(tower[0]))
