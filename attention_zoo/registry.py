"""Names, capabilities and lookup of everything the zoo holds. Standard library only.

Three tables: mechanisms (`register_attention`), the presets behind model names (`register_model_info`) and the converters of
official checkpoints (`register_converter`). Rooms above fill them when they are imported; nothing here imports a room.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = [
    "PATTERNS",
    "AttentionInfo",
    "ModelInfo",
    "UnknownNameError",
    "attention_class",
    "attention_info",
    "converter",
    "create_attention",
    "did_you_mean",
    "list_attentions",
    "matches",
    "model_builder",
    "model_info",
    "register_attention",
    "register_builder",
    "register_converter",
    "register_model_info",
    "some",
]

PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")

_Class = TypeVar("_Class", bound=type)
_Converter = Callable[..., dict[str, Any]]
_Builder = TypeVar("_Builder", bound=Callable[..., Any])


class UnknownNameError(KeyError, ValueError):
    """A name that nothing is registered under. The message lists the nearest names."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0])


@dataclass(frozen=True)
class AttentionInfo:
    """What a mechanism is and can do. The tests and the adapters are driven by it.

    Attributes:
        name: registry key, as in `create_attention(name)`.
        title: title of the paper.
        arxiv: arXiv identifier, or None where the paper has none.
        year: year of the first version.
        repository: official code as `owner/name`, or None where none was published.
        patterns: which of `PATTERNS` the mechanism supports.
        spatial: whether forward needs `grid_size`.
        kv_cache: whether forward takes `past_key_values`.
        cost: time of the attention itself in big-O, in the paper's symbols.
        engines: the backends of its hot path, the preferred first.
        prefix_tokens: whether a spatial mechanism accepts class or register tokens before the grid.
        keeps_shape: False for a mechanism that changes the number of tokens or channels (a downsampler).
        static_cache: whether its cache may be preallocated (a Hugging Face StaticCache), where it has one.
        padding_masks_only: its attention_mask is (B, N) padding; masks of single pairs of tokens have no meaning for it.
        cross_equals_self: whether cross attention to the tokens themselves is its self attention, where it does both.
        batch_coupled: by default, a sample's output depends on the other samples of its batch, in evaluation mode as well.
        stochastic: by default, its output is random in evaluation mode as well.
        length_coupled: by default, how it groups the tokens depends on their number, so that padding is no matter of masks alone.
        relative_rotation: whether rotary embeddings act through the distances of tokens only.
        min_grid_size: the smallest (H, W) that a spatial mechanism takes.
        grid_multiple: by default, H and W of its grid must be multiples of these.
        causal_options: constructor options that `is_causal=True` needs, where the defaults would let a token see the future.
        sequence_options: constructor options with which a spatial mechanism takes sequences, without a grid; none if it cannot.
        decoder_options: constructor options with which a swap starts it in a pretrained decoder, where the paper has others there.
        silent_parameters: names of parameters that the output does not depend on; official checkpoints have them.
        summary: first line of the class's docstring.
        equation: the equation of the class's docstring (its first indented block), or "".
    """

    name: str
    title: str
    arxiv: str | None
    year: int
    repository: str | None
    patterns: frozenset[str]
    spatial: bool = False
    kv_cache: bool = False
    cost: str = ""
    engines: tuple[str, ...] = ()
    prefix_tokens: bool = False
    keeps_shape: bool = True
    static_cache: bool = True
    padding_masks_only: bool = False
    cross_equals_self: bool = True
    batch_coupled: bool = False
    stochastic: bool = False
    length_coupled: bool = False
    relative_rotation: bool = True
    min_grid_size: tuple[int, int] = (1, 1)
    grid_multiple: tuple[int, int] = (1, 1)
    causal_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sequence_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    decoder_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    silent_parameters: tuple[str, ...] = ()
    summary: str = ""
    equation: str = ""

    @property
    def causal(self) -> bool:
        """Whether it supports causal attention, self or cross."""
        return bool(self.patterns & {"causal_self", "causal_cross"})

    @property
    def cross(self) -> bool:
        """Whether it supports cross attention, causal or not."""
        return bool(self.patterns & {"noncausal_cross", "causal_cross"})


@dataclass(frozen=True)
class ModelInfo:
    """A model name: the family whose entry point builds it, and the keyword arguments that make it this variant."""

    name: str
    family: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_attentions: dict[str, tuple[AttentionInfo, type]] = {}
_models: dict[str, ModelInfo] = {}
_builders: dict[str, Callable[..., Any]] = {}
_converters: dict[str, _Converter] = {}


def register_attention(
    name: str,
    *,
    title: str,
    arxiv: str | None,
    year: int,
    repository: str | None,
    patterns: Iterable[str],
    spatial: bool = False,
    kv_cache: bool = False,
    cost: str = "",
    engines: Iterable[str] = (),
    prefix_tokens: bool = False,
    keeps_shape: bool = True,
    static_cache: bool = True,
    padding_masks_only: bool = False,
    cross_equals_self: bool = True,
    batch_coupled: bool = False,
    stochastic: bool = False,
    length_coupled: bool = False,
    relative_rotation: bool = True,
    min_grid_size: tuple[int, int] = (1, 1),
    grid_multiple: tuple[int, int] = (1, 1),
    causal_options: Mapping[str, Any] | None = None,
    sequence_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    silent_parameters: Iterable[str] = (),
) -> Callable[[_Class], _Class]:
    """Class decorator that registers a mechanism under `name`; the arguments are the fields of `AttentionInfo`.

    Raises:
        ValueError: when the name is taken, a pattern is unknown, or none is given.
    """
    patterns = frozenset(patterns)
    if not patterns or not patterns <= set(PATTERNS):
        raise ValueError(f"{name!r}: patterns must be a non-empty subset of {PATTERNS}, got {sorted(patterns)}")

    def register(cls: _Class) -> _Class:
        if name in _attentions:
            _refuse_other("an attention", name, _attentions[name][1], cls)
        summary, equation = _read_docstring(cls)
        info = AttentionInfo(
            name=name,
            title=title,
            arxiv=arxiv,
            year=year,
            repository=repository,
            patterns=patterns,
            spatial=spatial,
            kv_cache=kv_cache,
            cost=cost,
            engines=tuple(engines),
            prefix_tokens=prefix_tokens,
            keeps_shape=keeps_shape,
            static_cache=static_cache,
            padding_masks_only=padding_masks_only,
            cross_equals_self=cross_equals_self,
            batch_coupled=batch_coupled,
            stochastic=stochastic,
            length_coupled=length_coupled,
            relative_rotation=relative_rotation,
            min_grid_size=min_grid_size,
            grid_multiple=grid_multiple,
            causal_options=dict(causal_options or {}),
            sequence_options=dict(sequence_options or {}),
            decoder_options=dict(decoder_options or {}),
            silent_parameters=tuple(silent_parameters),
            summary=summary,
            equation=equation,
        )
        _attentions[name] = (info, cls)
        cls.attention_info = info  # type: ignore[attr-defined]
        return cls

    return register


def create_attention(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build the mechanism registered under `name`: `create_attention("moh", dim=384, num_heads=6, shared_heads=2)`.

    Returns: an `nn.Module` that maps tokens (B, N, C) to (B, N, C) unless its `AttentionInfo` says otherwise.

    Raises:
        UnknownNameError: no mechanism has this name; the nearest ones are listed.
        TypeError: an option that the mechanism does not have; those it has are listed.
        ValueError: an option with a value that is not allowed.
    """
    cls = attention_class(name)
    parameters = inspect.signature(cls).parameters
    unknown = [k for k in kwargs if k not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        hints = [f"{k!r}" + did_you_mean(k, parameters) for k in unknown]
        raise TypeError(f"{name!r} has no option {', '.join(hints)}; its options: {', '.join(parameters)}")
    return cls(*args, **kwargs)


def attention_class(name: str) -> type:
    """The class registered under `name`. Raises UnknownNameError."""
    return _lookup(_attentions, name, "attention")[1]


def attention_info(name: str) -> AttentionInfo:
    """What the mechanism registered under `name` is and can do. Raises UnknownNameError."""
    return _lookup(_attentions, name, "attention")[0]


def list_attentions(
    filter: str | Iterable[str] = "*",
    *,
    causal: bool | None = None,
    cross: bool | None = None,
    spatial: bool | None = None,
    kv_cache: bool | None = None,
    pattern: str | None = None,
    engine: str | None = None,
    exclude: str | Iterable[str] = (),
) -> list[str]:
    """Names of the registered mechanisms, sorted; each argument that is given narrows the list.

    Args:
        filter: shell-style wildcards, one or several: `"*gqa"`.
        causal, cross, spatial, kv_cache: True or False to require or rule out the capability.
        pattern: one of `PATTERNS`.
        engine: a backend that its hot path can run on.
        exclude: wildcards to leave out.

    Raises:
        ValueError: an unknown pattern.
    """
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}; the patterns are {', '.join(PATTERNS)}")
    wanted = {"causal": causal, "cross": cross, "spatial": spatial, "kv_cache": kv_cache}
    names = []
    for name, (info, _) in sorted(_attentions.items()):
        fits = all(value is None or getattr(info, key) == value for key, value in wanted.items())
        fits = fits and (pattern is None or pattern in info.patterns) and (engine is None or engine in info.engines)
        if fits and matches(name, filter) and not matches(name, exclude):
            names.append(name)
    return names


def register_builder(*families: str) -> Callable[[_Builder], _Builder]:
    """Decorator: `function(name, family, **kwargs)` builds the models of these families, which timm's registry does not hold.

    Raises:
        ValueError: when another function is registered for one of them.
    """

    def register(function: _Builder) -> _Builder:
        for family in families:
            if family in _builders:
                _refuse_other("a builder", family, _builders[family], function)
            _builders[family] = function
        return function

    return register


def model_builder(name: str) -> Callable[..., Any] | None:
    """What builds the model `name` as `builder(name, family, **kwargs)`; None: timm's entry point. Raises UnknownNameError."""
    return _builders.get(model_info(name).family)


def register_model_info(name: str, family: str, **kwargs: Any) -> None:
    """Record that the model `name` is `family` built with `kwargs`. Raises ValueError when the name is taken."""
    info = ModelInfo(name, family, dict(kwargs))
    if _models.setdefault(name, info) != info:
        raise ValueError(f"a model named {name!r} is registered already")


def model_info(name: str | None = None) -> Any:
    """The `ModelInfo` of one name, or the whole table (a dict) when no name is given. Raises UnknownNameError."""
    return dict(_models) if name is None else _lookup(_models, name, "model")


def register_converter(*names: str) -> Callable[[_Converter], _Converter]:
    """Decorator: the function turns the official state dict of these mechanisms or model families into ours.

    It is called as `function(state_dict, **kwargs)` with the keyword arguments that build the mechanism or model.

    Raises:
        ValueError: when another function is registered under one of the names.
    """

    def register(function: _Converter) -> _Converter:
        for name in names:
            if name in _converters:
                _refuse_other("a converter", name, _converters[name], function)
            _converters[name] = function
        return function

    return register


def converter(name: str) -> tuple[_Converter, dict[str, Any]]:
    """The converter of a mechanism's or model's name, and the keyword arguments that the name itself stands for.

    Raises:
        UnknownNameError: the name is unknown, or known and without an official checkpoint format.
    """
    info = _models.get(name)
    key = info.family if info else name
    if key not in _converters and name in {*_attentions, *_models}:
        raise UnknownNameError(f"{name!r} has no official checkpoint format; those that have one: {', '.join(sorted(_converters))}")
    return _lookup(_converters, key, "checkpoint format"), dict(info.kwargs) if info else {}


def _lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise UnknownNameError(f"no {kind} is named {name!r}{did_you_mean(name, table) or f'; known: {some(sorted(table))}'}")
    return table[name]


def _refuse_other(kind: str, name: str, old: Any, new: Any) -> None:
    """Raise ValueError unless both are the same definition: a module that is reloaded may register again."""
    if (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        raise ValueError(f"{kind} named {name!r} is registered already: {old.__module__}.{old.__qualname__}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a', 'b'?` with the known names that are nearest, or nothing when none is near."""
    spelled = str(name).lower().replace("-", "_")  # names are lower case with underscores
    nearest = difflib.get_close_matches(spelled, list(known), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, nearest))}?" if nearest else ""


def some(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many there are when that is not all of them."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def matches(name: str, wildcards: str | Iterable[str]) -> bool:
    """Whether `name` fits a shell-style wildcard, or one of several."""
    wildcards = [wildcards] if isinstance(wildcards, str) else list(wildcards)
    return any(fnmatch.fnmatchcase(name, w) for w in wildcards)


def _read_docstring(cls: type) -> tuple[str, str]:
    """First line, and the first indented block (the equation) of a class's docstring."""
    text = inspect.getdoc(cls) or ""
    summary = text.split("\n", 1)[0].strip()
    equation: list[str] = []
    for line in text.splitlines()[1:]:
        if line.startswith("    "):
            equation.append(line)
        elif equation and line.strip():
            break
        elif equation:
            equation.append("")
        elif line.rstrip() in {"Args:", "Shape:", "Raises:"}:
            break
    return summary, textwrap.dedent("\n".join(equation)).strip()
