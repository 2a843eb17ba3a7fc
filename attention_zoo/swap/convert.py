"""One layer's mechanism, built from the layer: what of the host it must have, its options, its weights, and what became of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import AttentionModule
from attention_zoo.attention.flops import forward_flops
from attention_zoo.attention.gqa import GroupedQueryAttention, mean_pool_kv_heads
from attention_zoo.registry import attention_class, attention_info, did_you_mean
from attention_zoo.swap.hosts import Host
from attention_zoo.swap.report import LayerSwap

__all__ = ["INITS", "Plan", "build_mechanism", "check_plan", "describe_swap", "rebuild_mechanism"]

INITS = ("convert", "mean_pool", "random")

_SCALES = ("qk_scale", "scale")  # what mechanisms call the factor of their logits, where it is an option
_TRIED = 3 * 10**9  # multiply-adds at most of the projections in a trial of whether the function is kept
_TRIED_LOGITS = 2**24  # logits at most in it: narrow layers of models for long texts are cheap to project, not to attend with


@dataclass(frozen=True)
class Plan:
    """What is to stand in the place of one layer: a mechanism's name, its options, and how it starts (one of `INITS`)."""

    host: Host
    mechanism: str
    options: Mapping[str, Any]
    init: str


@dataclass(frozen=True)
class _NormLike:
    """Builds normalisations like one of the host's: its class and epsilon."""

    kind: type[nn.Module]
    eps: float | None

    def __call__(self, dim: int, *, device: Any = None, dtype: Any = None) -> nn.Module:
        norm = self.kind(dim) if self.eps is None else self.kind(dim, eps=self.eps)
        return norm.to(device=device, dtype=dtype)


def check_plan(plan: Plan) -> list[str]:
    """Why the mechanism cannot take the layer's place; nothing if it can. Raises TypeError for an option that it lacks."""
    host, info = plan.host, attention_info(plan.mechanism)
    if host.refuse is not None:
        return [host.refuse]
    own, takes = _constructor(plan.mechanism), _inputs(plan.mechanism)
    allowed = {*own, *(_conversion(plan.mechanism) if plan.init != "random" else ())} - {"dim", "num_heads", "source", "options"}
    if unknown := [name for name in plan.options if name not in allowed]:
        hints = ", ".join(f"{name!r}{did_you_mean(name, allowed)}" for name in unknown)
        raise TypeError(f"{plan.mechanism!r} has no option {hints}; its options here: {', '.join(sorted(allowed))}")
    pattern = "causal_self" if host.is_causal else "noncausal_self"
    problems = {
        f"it needs {pattern}, which is not among {', '.join(sorted(info.patterns))}": pattern not in info.patterns,
        "the mechanism changes the number of tokens or channels": not info.keeps_shape,
        "the mechanism needs a grid, which the layer has not": info.spatial and not host.spatial and not _takes_sequences(plan),
        f"the layer has {host.prefix_tokens} class or register tokens, for which the mechanism has no place": info.spatial
        and host.prefix_tokens > 0
        and "num_prefix_tokens" not in own,
        "the layer rotates queries and keys, the mechanism does not": host.rope and "position_embeddings" not in takes,
        "the layer normalises queries and keys, the mechanism has no place for its norm_layer": host.qk_norm
        and "norm_layer" not in own,
        f"the layer bounds its logits (softcap={host.softcap}), which no mechanism does": bool(host.softcap),
        f"the layer has a window of {host.window_size} tokens, the mechanism takes no mask that could hold it": host.window_size
        is not None
        and ("attention_mask" not in takes or info.padding_masks_only),
        "the layer has a cache, the mechanism none": host.is_causal and host.adapter.has_cache and not info.kv_cache,
        f"{plan.mechanism!r} has no conversion from softmax attention; use init='random'": plan.init != "random"
        and not _conversion(plan.mechanism),
    }
    for name in ("attn_drop", "proj_drop"):
        problems[f"the layer has {name}={getattr(host, name)}, the mechanism has no {name}"] = (
            getattr(host, name) > 0 and name not in own
        )
    problems |= {f"{name}={plan.options[name]!r}: {why}": True for name, why in _settled(plan).items()}
    return [reason for reason, applies in problems.items() if applies]


def _settled(plan: Plan) -> dict[str, str]:
    """Options that say something else than the layer, which settles them: why they cannot."""
    host = plan.host
    settled = {"is_causal": host.is_causal, "layer_idx": host.layer_idx}
    if host.spatial:
        settled["num_prefix_tokens"] = host.prefix_tokens
    if plan.init != "random":
        settled["head_dim"] = host.head_dim
    wrong = {name: f"the layer says {value}" for name, value in settled.items() if plan.options.get(name, value) != value}
    followed = {"device": "it is the layer's", "dtype": "it is the layer's"}
    if host.rope:
        followed["rope_layout"] = "the model's rotary tables settle it"
    return wrong | {name: why for name, why in followed.items() if name in plan.options}


def build_mechanism(plan: Plan) -> AttentionModule:
    """The mechanism, in the layer's dtype, on its device, in its train or eval mode.

    Parameters that come from the layer require gradients as the layer's do, new ones if any of the layer's does.

    Raises:
        ValueError: what the mechanism's constructor or conversion says of the layer.
    """
    source = plan.host.adapter.softmax_state(plan.host)
    module = _build(plan, {name: tensor.detach() for name, tensor in source.items()})
    module.train(plan.host.module.training)
    frozen = {name for name, tensor in source.items() if not tensor.requires_grad}
    if len(frozen) == len(source):
        module.requires_grad_(False)
    elif frozen:
        _freeze(plan, module, source, frozen)
    return module


def describe_swap(plan: Plan, num_tokens: int, known: dict[Any, LayerSwap] | None = None) -> LayerSwap:
    """The row of a report.

    The figures follow from shapes and settings, so the layer is converted from random weights of its shapes, once more from other
    ones to see which parameters depend on them, and never run on data. Layers alike share a row by way of `known`.

    Args:
        plan: the layer and its mechanism.
        num_tokens: length of the sequence that FLOPs and cache are counted for; a grid that the host knows says its own.
        known: rows of earlier layers, to be extended.

    Raises:
        ValueError: what the conversion says of the layer, or the mechanism of the grid of an image of the model's size.
    """
    host, known = plan.host, {} if known is None else known
    if host.grid_size is not None:
        num_tokens = host.prefix_tokens + math.prod(host.grid_size)
    state = host.adapter.softmax_state(host)
    key = (_alike(plan), num_tokens, *((name, tensor.shape, tensor.dtype) for name, tensor in state.items()))
    if key not in known:
        known[key] = _describe(plan, state, num_tokens)
    return dataclasses.replace(known[key], name=host.name)


def _alike(plan: Plan) -> str:
    """All that a layer's figures depend on, besides the shapes of its tensors."""
    own = {"name", "module", "adapter", "index", "layer_idx"}
    host = {field.name: getattr(plan.host, field.name) for field in dataclasses.fields(plan.host) if field.name not in own}
    norms = [getattr(plan.host.module, name, None) for name in ("q_norm", "k_norm")]
    return repr((plan.mechanism, plan.init, sorted(plan.options.items()), host, plan.host.adapter.has_cache, norms))


def _describe(plan: Plan, state: Mapping[str, Tensor], num_tokens: int) -> LayerSwap:
    host, width = plan.host, state["q_proj.weight"].element_size()
    source = _random_weights(state)
    with _quiet() as said:
        module = _repeatable(plan, source)
        other = dict(_repeatable(plan, {n: _other(t) for n, t in source.items()}).named_parameters())
    counts = {"carried": 0, "converted": 0, "new": 0}
    for name, parameter in module.named_parameters():
        if plan.init == "random" or torch.equal(parameter, other[name]):
            kind = "new"
        else:
            kind = "carried" if _is_carried(parameter, source) else "converted"
        counts[kind] += parameter.numel()
    preserving, tried_tokens = _keeps_function(plan, module, source, num_tokens)
    cached, module.is_rotated = host.is_causal and host.adapter.has_cache, host.rope
    kept = num_tokens if host.window_size is None else min(num_tokens, host.window_size - 1)
    cache = (2 * host.num_kv_heads * host.head_dim * kept, module.cache_elements(kept)) if cached else (0, 0)
    return LayerSwap(
        name=host.name,
        mechanism=plan.mechanism,
        num_tokens=num_tokens,
        **counts,
        removed=sum(p.numel() for part in host.adapter.replaced(host) for p in part.parameters()),
        preserving=False if plan.init == "random" or said else preserving,
        tried_tokens=tried_tokens,
        flops_before=_softmax_flops(host, source, num_tokens),
        flops_after=_mechanism_flops(host, module, num_tokens),
        cache_bytes_before=cache[0] * width,
        cache_bytes_after=cache[1] * width,
    )


def rebuild_mechanism(host: Host, mechanism: str, constructor: Mapping[str, Any]) -> AttentionModule:
    """A mechanism as it was when its options were recorded (`Slot.entry`), on the layer's device, its weights still to be read."""
    weight = host.adapter.softmax_state(host)["q_proj.weight"]
    said = _settings(Plan(host, mechanism, {}, "random"))
    own = {name: value for name, value in said.items() if name == "norm_layer"}  # a class, which no record holds
    factory = {"device": weight.device, "dtype": weight.dtype}
    module: AttentionModule = attention_class(mechanism)(**own, **constructor, **factory)
    return module.train(host.module.training)


def _build(plan: Plan, state: dict[str, Tensor]) -> AttentionModule:
    cls: Any = attention_class(plan.mechanism)
    host, options = plan.host, dict(plan.options)
    if plan.init == "random":
        said = {"num_heads": host.num_heads, **_sizes(plan, state), **_settings(plan), **options}
        fresh: AttentionModule = cls(host.dim, said.pop("num_heads"), **said)
        _scale_queries(plan, fresh)
        return fresh
    takes_kv_heads = "num_kv_heads" in _conversion(plan.mechanism)
    wanted = options.get("num_kv_heads")
    if plan.init == "mean_pool":
        if wanted is None:
            raise ValueError("init='mean_pool' averages key and value heads: say to how many, num_kv_heads=...")
        for name in [n for n in state if n.startswith(("k_proj.", "v_proj."))]:
            state[name] = mean_pool_kv_heads(state[name], host.num_kv_heads, wanted)
    elif wanted is None and takes_kv_heads and host.num_kv_heads < host.num_heads:
        options["num_kv_heads"] = host.num_kv_heads  # grouped already
    elif wanted not in (None, host.num_kv_heads) and not takes_kv_heads:
        raise ValueError(
            f"{plan.mechanism!r} keeps the layer's {host.num_kv_heads} key/value heads; init='mean_pool' averages them"
        )
    if not takes_kv_heads:
        options.pop("num_kv_heads", None)
    module: AttentionModule = cls.from_softmax_attention(
        _with_usual_scale(host, state), num_heads=host.num_heads, **{**_settings(plan), **options}
    )
    return module


def _settings(plan: Plan) -> dict[str, Any]:
    """What the layer says of itself, as options of the mechanism; the weights say the rest."""
    host, own = plan.host, _constructor(plan.mechanism)
    said: dict[str, Any] = {"attn_drop": host.attn_drop, "proj_drop": host.proj_drop}
    if host.spatial:
        said["num_prefix_tokens"] = host.prefix_tokens
    else:
        said |= attention_info(plan.mechanism).sequence_options
    if host.is_causal:
        info = attention_info(plan.mechanism)
        said |= {"is_causal": True, **info.causal_options, **info.decoder_options}
    if host.layer_idx is not None:
        said["depth"] = host.layer_idx
    if host.qk_norm:
        norm: Any = host.module.q_norm
        eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
        said |= {"qk_norm": True, "norm_layer": _NormLike(type(norm), eps)}
    return {name: value for name, value in said.items() if name in own}


def _sizes(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights say, for a mechanism that is not converted from them."""
    host, own = plan.host, _constructor(plan.mechanism)
    sizes: dict[str, Any] = {
        "head_dim": host.head_dim,
        "qkv_bias": host.qkv_bias,
        "proj_bias": host.proj_bias,
        **dict.fromkeys(_SCALES, host.scale),
        "device": state["q_proj.weight"].device,
        "dtype": state["q_proj.weight"].dtype,
    }
    if host.num_kv_heads < host.num_heads:
        sizes["num_kv_heads"] = host.num_kv_heads
    return {name: value for name, value in sizes.items() if name in own}


def _with_usual_scale(host: Host, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with which logits scaled by head_dim ** -0.5 are the host's, whose scale may be another.

    Raises:
        ValueError: queries are normalised after their projection by a class whose weight cannot take the factor.
    """
    factor = host.scale * host.head_dim**0.5
    if abs(factor - 1.0) < 1e-6:
        return state
    if not host.qk_norm:
        return {name: t * factor if name.startswith("q_proj.") else t for name, t in state.items()}
    kind = type(host.module.q_norm).__name__
    if "q_norm.weight" not in state:
        raise ValueError(f"the logits are scaled by {host.scale}, and {kind} has no weight that could take that over")
    one = 1.0 if kind.startswith("Gemma") else 0.0  # Gemma's normalisations multiply by 1 + weight
    scaled = {n: t * factor for n, t in state.items() if n.startswith("q_norm.")}
    return {**state, **scaled, "q_norm.weight": (state["q_norm.weight"] + one) * factor - one}


def _scale_queries(plan: Plan, module: Any) -> None:
    """Give new queries the factor by which the host's logits are scaled differently, where no option has taken it."""
    host = plan.host
    factor = host.scale * host.head_dim**0.5
    if abs(factor - 1.0) < 1e-6 or any(name in _constructor(plan.mechanism) for name in _SCALES):
        return
    if host.qk_norm:
        loaded = _with_usual_scale(host, {f"q_norm.{name}": p.detach() for name, p in module.q_norm.named_parameters()})
        module.q_norm.load_state_dict({name.removeprefix("q_norm."): tensor for name, tensor in loaded.items()})
        return
    layer = next(getattr(module, name) for name in ("q_proj", "q", "qkv") if hasattr(module, name))
    rows = layer.weight.shape[0] if not hasattr(module, "qkv") else layer.weight.shape[0] // 3
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[:rows].mul_(factor)


def _freeze(plan: Plan, module: nn.Module, source: Mapping[str, Tensor], frozen: set[str]) -> None:
    """Let those parameters require no gradient that come from `frozen` tensors of the layer only, as conversions tell."""
    drawn = _random_weights(source)
    with _quiet():
        first, by_frozen, by_others = (
            dict(_repeatable(plan, {n: _other(t) if n in moved else t for n, t in drawn.items()}).named_parameters())
            for moved in (set(), frozen, drawn.keys() - frozen)
        )
    for name, parameter in module.named_parameters():
        if torch.equal(first[name], by_others[name]) and not torch.equal(first[name], by_frozen[name]):
            parameter.requires_grad_(False)


def _repeatable(plan: Plan, state: Mapping[str, Tensor]) -> AttentionModule:
    """The mechanism from `state`, with the same random numbers each time, which nobody else sees."""
    devices = [t.device for t in state.values() if t.is_cuda][:1]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return _build(plan, dict(state)).requires_grad_(False)


def _is_carried(parameter: Tensor, source: Mapping[str, Tensor]) -> bool:
    """Whether a parameter is one of the source's tensors, or several on top of each other."""
    groups = [[name] for name in source]
    groups += [[f"{part}_proj.{kind}" for part in parts] for parts in ("qkv", "kv") for kind in ("weight", "bias")]
    found = [[source[name] for name in names] for names in groups if all(name in source for name in names)]
    same = (pieces for pieces in found if sum(piece.numel() for piece in pieces) == parameter.numel())
    return any(parameter.shape == (whole := torch.cat(pieces)).shape and torch.equal(parameter, whole) for pieces in same)


def _random_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of these shapes, such that logits are of the order of 1, in single precision on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return {name: tensor.mul_(tensor.shape[-1] ** -0.5) if tensor.ndim > 1 else tensor for name, tensor in drawn.items()}


def _other(tensor: Tensor) -> Tensor:
    """A tensor of which no part stays what it was."""
    return 0.5 * tensor.flip(0) + 1.0


def _keeps_function(plan: Plan, module: AttentionModule, source: Mapping[str, Tensor], num_tokens: int) -> tuple[bool | None, int]:
    """Whether `module` and the softmax attention of the source agree on random tokens, and on how many; None if that fails."""
    host, spatial = plan.host, module.attention_info.spatial and plan.host.spatial
    options = {**_settings(Plan(host, "gqa", {}, "convert")), "num_kv_heads": host.num_kv_heads}
    affordable = min(_TRIED // sum(tensor.numel() for tensor in source.values()), math.isqrt(_TRIED_LOGITS // host.num_heads))
    affordable = max(16, affordable)
    grid_size = host.grid_size if num_tokens <= affordable else None
    if spatial:
        grid_size = grid_size or (4, 4)
        tokens = host.prefix_tokens + math.prod(grid_size)
    else:
        tokens = min(num_tokens, affordable)
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            usual = _with_usual_scale(host, dict(source))
            softmax = GroupedQueryAttention.from_softmax_attention(usual, num_heads=host.num_heads, **options)
            x = torch.randn(1, tokens, host.dim)
            want, got = softmax.eval()(x), module.eval()(x, **({"grid_size": grid_size} if spatial else {}))
    except (RuntimeError, TypeError, ValueError):
        return None, tokens
    return bool((got - want).abs().max() <= 1e-3 * want.abs().max()), tokens


def _softmax_flops(host: Host, source: Mapping[str, Tensor], num_tokens: int) -> int:
    """Of the host's projections, of all logits and of their products with the values."""
    projections = sum(tensor.numel() for tensor in source.values() if tensor.ndim > 1)
    return 2 * num_tokens * projections + 4 * num_tokens**2 * host.num_heads * host.head_dim


def _mechanism_flops(host: Host, module: AttentionModule, num_tokens: int) -> int | None:
    """None where they cannot be told. Raises ValueError where the mechanism cannot work on images of the model's size."""
    spatial = module.attention_info.spatial and host.spatial
    if spatial and host.grid_size is None:
        return None
    try:
        return forward_flops(module, num_tokens, grid_size=host.grid_size if spatial else None)
    except ValueError as error:
        if host.grid_size is None:
            return None  # texts may have other lengths
        raise ValueError(f"on images of the model's size, {num_tokens} tokens: {error}") from error


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of conversions that do not keep the function; the report says it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def _takes_sequences(plan: Plan) -> bool:
    """Whether a spatial mechanism does without a grid, with the options that it is given."""
    needed = attention_info(plan.mechanism).sequence_options
    return bool(needed) and all(plan.options.get(name, value) == value for name, value in needed.items())


def _constructor(mechanism: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(attention_class(mechanism)).parameters


def _inputs(mechanism: str) -> Mapping[str, inspect.Parameter]:
    cls: Any = attention_class(mechanism)
    return inspect.signature(cls.forward).parameters


def _conversion(mechanism: str) -> Mapping[str, inspect.Parameter]:
    """What the mechanism's conversion takes by name; nothing where it has none."""
    convert = getattr(attention_class(mechanism), "from_softmax_attention", None)
    return inspect.signature(convert).parameters if convert is not None else {}
