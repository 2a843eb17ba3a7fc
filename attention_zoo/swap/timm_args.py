"""What a timm model was built with, read from the model: timm keeps its name, not its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from attention_zoo.registry import some
from attention_zoo.swap.record import slots_of

__all__ = ["find_timm_args", "timm_name"]

# What a model does with its arguments at other times than when it is built: no sign of another argument.
_PASSING = {"training", "grad_checkpointing", "fused_attn", "p", "drop_prob", "rate", "attn_drop", "proj_drop", "padding"}


def timm_name(model: Any) -> str:
    """The name that `timm.create_model` builds the model by. Raises ValueError if it is not one of timm's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        raise ValueError(f"{type(model).__name__} is neither a Hugging Face model nor one that timm.create_model built")
    return ".".join(part for part in (config["architecture"], config.get("tag")) if part)


def find_timm_args(model: Any, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which `timm.create_model(name)` builds a model like this one; `given` are known.

    Raises:
        ValueError: they cannot be read from the model.
    """
    args = {"num_classes": model.num_classes, **given} if hasattr(model, "num_classes") else dict(given)
    for _ in range(3):  # what one argument hides (the size of a table behind a number of blocks), another shows
        built = _build(name, args)
        read = {n: value for n, value in _readable(model).items() if n not in given}
        here = _readable(built)
        more = {n: value for n, value in read.items() if value is not None and n in here and value != here[n]}
        if not more or all(n in args and args[n] == value for n, value in more.items()):
            break
        args |= more
    if differences := _differences(model, built):
        raise ValueError(
            f"timm.create_model({name!r}, {', '.join(f'{n}={v!r}' for n, v in args.items())}) does not build this model: "
            f"{some(differences)}; say in model_args what it was built with"
        )
    return args


def _build(name: str, args: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            built: nn.Module = timm.create_model(name, **args)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{n}={v!r}" for n, v in args.items())
        what = f"timm.create_model({name!r}, {given}): {error}"
        raise ValueError(f"{what}; say in model_args what the model was built with") from error
    return built


def _readable(model: Any) -> dict[str, Any]:
    """Those arguments of the model's constructor that it shows, with their values."""
    names = inspect.signature(type(model)).parameters
    return {name: _read(model, name) for name in names if name not in ("self", "kwargs")}


def _read(model: Any, name: str) -> Any:
    """The value that an argument had, None where it cannot be told."""
    try:
        value = _READERS[name](model) if name in _READERS else getattr(model, name, None)
    except (AttributeError, IndexError, TypeError, KeyError):
        return None
    return value if isinstance(value, (bool, int, float, str, tuple)) else None


def _heads(model: Any) -> Any:
    attn = model.blocks[0].attn
    return getattr(attn, "mechanism", attn).num_heads


def _layer_scale(model: Any) -> Any:
    scale = model.blocks[0].ls1
    return None if isinstance(scale, nn.Identity) else getattr(scale, "init_values", 1e-5)


_READERS: dict[str, Callable[[Any], Any]] = {
    "img_size": lambda m: m.patch_embed.img_size,
    "patch_size": lambda m: m.patch_embed.patch_size,
    "in_chans": lambda m: _first_conv(m).in_channels,
    "depth": lambda m: len(m.blocks),
    "num_heads": _heads,
    "mlp_ratio": lambda m: m.blocks[0].mlp.fc1.out_features / m.embed_dim,
    "class_token": lambda m: m.cls_token is not None,
    "reg_tokens": lambda m: m.num_reg_tokens,
    "init_values": _layer_scale,
    "qkv_bias": lambda m: m.blocks[0].attn.qkv.bias is not None,
    "drop_rate": lambda m: None,
    "pos_embed": lambda m: None,
}


def _first_conv(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def _differences(model: nn.Module, built: nn.Module) -> list[str]:
    """What is not the same in two models, swapped layers apart: tensors, kinds of modules, and their settings."""
    swapped = tuple(f"{name}." for name in slots_of(model))
    ours, theirs = ({n: m for n, m in one.named_modules() if not f"{n}.".startswith(swapped)} for one in (model, built))
    found = [f"{n} is {'missing' if n in ours else 'there'}" for n in sorted(ours.keys() ^ theirs.keys())]
    for name in ours.keys() & theirs.keys():
        label = name or "the model"
        mine, other = ours[name], theirs[name]
        if type(mine).__qualname__ != type(other).__qualname__:
            found.append(f"{label} is {type(other).__name__}, not {type(mine).__name__}")
        shapes, expected = (dict(_shapes(one)) for one in (mine, other))
        found += [f"{label}.{n} is {expected.get(n)}, not {shapes.get(n)}" for n in _unequal(shapes, expected)]
        settings, others = _settings(mine), _settings(other)
        found += [f"{label}.{n} is {others.get(n)!r}, not {settings.get(n)!r}" for n in _unequal(settings, others)]
    return found


def _unequal(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(n for n in mine.keys() | other.keys() if mine.get(n) != other.get(n))


def _shapes(module: nn.Module) -> Any:
    return ((n, tuple(t.shape)) for n, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, tuple)
    return {n: v for n, v in vars(module).items() if isinstance(v, plain) and not n.startswith("_") and n not in _PASSING}
