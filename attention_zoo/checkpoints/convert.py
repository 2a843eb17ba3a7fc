"""Official state dict -> ours: lookup of the converter, and the renaming that converters are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from attention_zoo import registry

__all__ = ["CheckpointError", "convert_official_state_dict", "parameter_keys", "rename_keys", "take_backbone", "taken_stages"]


class CheckpointError(ValueError):
    """A checkpoint file or state dict that cannot be what it is taken for. The message says what is wrong with it."""


def convert_official_state_dict(name: str, state_dict: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Map the state dict of an official checkpoint to the names and layout of ours.

    Args:
        name: a mechanism (`"hilo"`) or a model (`"litv2_s"`).
        state_dict: official keys and tensors; not modified. Tensors may be on the meta device.
        kwargs: the same keyword arguments that `create_attention(name)` or `create_model(name)` gets.

    Returns: a new dict that loads with `strict=True`.

    Raises:
        UnknownNameError: a name without an official format.
        CheckpointError: unknown or missing keys, all of them listed.
    """
    convert, preset = registry.converter(name)
    if preset.get("attention_kwargs") and kwargs.get("attention_kwargs") is not None:
        kwargs["attention_kwargs"] = _add_options(preset["attention_kwargs"], kwargs["attention_kwargs"])
    return convert(dict(state_dict), **{**preset, **kwargs})


def _add_options(of_name: Mapping[str, Any], given: Any) -> Any:
    """The mechanism's options that a model's name stands for, and those given besides, for all layers or for each; these win."""
    return {**of_name, **given} if isinstance(given, Mapping) else [{**of_name, **(layer or {})} for layer in given]


def parameter_keys(*modules: str, bias: bool = True) -> list[str]:
    """`{module}.weight` and, with `bias`, `{module}.bias` of each module."""
    return [f"{module}.{kind}" for module in modules for kind in (("weight", "bias") if bias else ("weight",))]


def take_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a detector's or segmenter's state dict (keys under `backbone.`); another state dict as it is."""
    inside = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return inside or dict(state_dict)


def taken_stages(num_stages: int, out_indices: int | Sequence[int] | None) -> list[int]:
    """The stages whose maps a dense backbone returns, in order: timm's `out_indices`, a number for the last n, None for all."""
    if out_indices is None:
        return list(range(num_stages))
    if isinstance(out_indices, int):
        return list(range(num_stages - out_indices, num_stages))
    return sorted(i % num_stages for i in out_indices)


def rename_keys(
    state_dict: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], *, expected: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Rename every key by the first rule whose regular expression matches (at the start), others keep their name.

    Args:
        rules: (regular expression, replacement) pairs, as for `re.sub`.
        expected: the official keys that must be there, before renaming.
        optional: official keys that may be there.

    Raises:
        CheckpointError: keys that are neither expected nor optional, or expected keys that are missing; all are listed.
    """
    expected, allowed = set(expected), {*expected, *optional}
    unknown, missing = sorted(set(state_dict) - allowed), sorted(expected - set(state_dict))
    if unknown or missing:
        raise CheckpointError(
            "not the official checkpoint of this model"
            + (f"; unknown keys: {', '.join(unknown)}" if unknown else "")
            + (f"; missing keys: {', '.join(missing)}" if missing else "")
        )
    renamed = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in rules:
            if re.match(pattern, key):
                key = re.sub(pattern, replacement, key, count=1)
                break
        renamed[key] = tensor
    return renamed
