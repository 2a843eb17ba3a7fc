"""Mechanisms as functions of q, k and v: those that need no parameters of their own, and the names that stand for them.

Hugging Face's models call whatever stands in their attention interface with q, k and v. What `register_functional` names can be
called so: `model.set_attn_implementation("zoo_cca")` computes core-context attention in an untouched model. Each function stands
beside its mechanism's class, which computes with the same code.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from attention_zoo.registry import attention_class, attention_info, did_you_mean

__all__ = [
    "INPUTS",
    "Attend",
    "Functional",
    "PureFunction",
    "follow_functionals",
    "list_functionals",
    "pure_function",
    "pure_functions",
    "register_functional",
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PREFIX = "zoo_"
# What a function may be told of a call, by the names of its parameters; its other keyword parameters are options.
INPUTS = {
    "attend": "the host's softmax attention of q (B, H, N, d), k and v (B, G, M, d): its mask, causality, window, scale, dropout",
    "attn_mask": "the mask that `attend` applies, (B, N_k) or 4-D; None: none",
    "real": "(B, N_k) boolean, which tokens are no padding; None: all",
    "seen": "tokens so far, padding included, where a preallocated cache has room for more: a number on the device; None: all keys",
    "is_causal": "whether each token attends to itself and those before it only",
    "grid_size": "(H, W) of the patches; None where the host has no grid",
    "num_prefix_tokens": "class and register tokens before the grid",
    "scale": "factor of the logits",
    "dropout_p": "dropout rate, 0 in evaluation",
    "training": "whether the host is in training mode",
    "qk_norm": "whether the host normalises queries and keys",
}

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class PureFunction:
    """A mechanism as a function of q, k, v (B, H, N, D).

    Attributes:
        mechanism: its name.
        compute: `compute(q, k, v, **inputs, **options) -> (B, H, N, D)`.
        inputs: which of `INPUTS` it takes.
        options: its options and their defaults.
        implied: options of the mechanism's class with which it is this function.
        needs_grid: whether a host without a grid has no use for it.
        check: raises ValueError for values that the class takes and the function does not, given by keyword; None: there are none.
    """

    mechanism: str
    compute: Callable[..., Tensor]
    inputs: frozenset[str]
    options: Mapping[str, Any]
    implied: Mapping[str, Any]
    needs_grid: bool
    check: Callable[..., None] | None


@dataclass(frozen=True)
class Functional:
    """A name that a model may be told: a function and its options."""

    name: str
    function: PureFunction
    options: Mapping[str, Any]


_functions: dict[str, PureFunction] = {}
_functionals: dict[str, Functional] = {}
_followers: list[Callable[[Functional], None]] = []


def pure_function(mechanism: str, *, check: Callable[..., None] | None = None, **implied: Any) -> Callable[[_Function], _Function]:
    """Decorator of a function that computes `mechanism` from q, k and v; it is offered as "zoo_<mechanism>" with its defaults.

    Args:
        mechanism: its registered name; the class must be registered already.
        check: called with all options by keyword; raises ValueError for values that need parameters.
        implied: options of the class with which it is this function (no position tables, for instance).
    """

    def register(function: _Function) -> _Function:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        inputs = frozenset(p.name for p in parameters if p.name in INPUTS)
        options = {p.name: p.default for p in parameters if p.name not in INPUTS}
        needs_grid = any(p.name == "grid_size" and p.default is p.empty for p in parameters)
        _functions[mechanism] = PureFunction(mechanism, function, inputs, options, implied, needs_grid, check)
        _add(Functional(PREFIX + mechanism, _functions[mechanism], {}))
        return function

    return register


def pure_functions() -> dict[str, PureFunction]:
    """All mechanisms that are functions of q, k and v, by name."""
    return dict(_functions)


def register_functional(name: str, mechanism: str, **options: Any) -> None:
    """Name a mechanism with options of it, so that Hugging Face's models can be told to compute it.

        register_functional("zoo_cca_mean", "cca", pool="mean", window_size=256)
        model.set_attn_implementation("zoo_cca_mean")

    Args:
        name: begins with "zoo_".
        mechanism: one of those that `list_functionals()` shows, without "zoo_".
        options: those of the mechanism that concern neither parameters nor what the host decides (heads, causality, scale).

    Raises:
        ValueError: a name of another form or that stands for something else, a mechanism with parameters of its own, an option
            that this form of it has not, or what the mechanism says of the values.
        TypeError: an option that the mechanism does not have.
        UnknownNameError: no such mechanism.
    """
    attention_info(mechanism)  # an unknown name is told first
    if mechanism not in _functions:
        raise ValueError(
            f"{mechanism!r} is no function of q, k and v alone; az.swap_attention puts it into a model. Such functions are "
            f"{', '.join(sorted(_functions))}"
        )
    if not re.fullmatch(PREFIX + r"\w+", name) or any(word in name for word in ("flash", "flex_attention", "sdpa")):
        raise ValueError(
            f"a name begins with {PREFIX!r}, goes on with letters, digits and _, and has none of transformers' own in it (flash, "
            f"flex_attention, sdpa); got {name!r}"
        )
    function = _functions[mechanism]
    _check_options(function, options)
    functional = Functional(name, function, options)
    known = _functionals.get(name)
    if known is None:
        _add(functional)
    elif known != functional:
        raise ValueError(f"{name!r} stands for {known.function.mechanism!r} with options {dict(known.options)} already")


def list_functionals(pattern: str = "*") -> list[str]:
    """Names for `attn_implementation=` that compute a mechanism of the zoo in any Hugging Face model, sorted; "zoo" is softmax."""
    return sorted(fnmatch.filter(["zoo", *_functionals], pattern))


def follow_functionals(follow: Callable[[Functional], None]) -> None:
    """Call `follow` with every functional that there is, and with each that will be registered."""
    for functional in _functionals.values():
        follow(functional)
    _followers.append(follow)


def _add(functional: Functional) -> None:
    _functionals[functional.name] = functional
    for follow in _followers:
        follow(functional)


def _check_options(function: PureFunction, options: Mapping[str, Any]) -> None:
    """Raise for options that the function has not, or that the mechanism's own checks refuse."""
    cls = attention_class(function.mechanism)
    own = inspect.signature(cls).parameters
    for name in options:
        if name in function.options:
            continue
        here = f"; as a function it has {', '.join(sorted(function.options)) or 'none'}"
        if name in own:
            raise ValueError(
                f"{function.mechanism!r}: {name} is decided by the host, or concerns parameters that a function has not{here}"
            )
        raise TypeError(f"{function.mechanism!r} has no option {name!r}{did_you_mean(name, function.options)}{here}")
    if function.check is not None:
        function.check(**{**function.options, **options})
    num_heads = 2 * options["num_kv_heads"] if isinstance(options.get("num_kv_heads"), int) else 8
    settings = {name: value for name, value in {**function.options, **options}.items() if name in own}
    cls(16 * max(num_heads, 1), max(num_heads, 1), device="meta", **{**function.implied, **settings})
