"""Swapping attention in a model, all layers or none, and taking it back."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from attention_zoo.attention.base import AttentionModule
from attention_zoo.registry import attention_info, some
from attention_zoo.swap.convert import INITS, Plan, build_mechanism, check_plan, describe_swap
from attention_zoo.swap.hosted import settle
from attention_zoo.swap.hosts import ADAPTERS, Host
from attention_zoo.swap.record import slots_of, swaps_of
from attention_zoo.swap.report import SwapReport
from attention_zoo.swap.slot import Slot

__all__ = ["AUX_LOSS_COEF", "find_hosts", "slot_of", "swap_attention", "swaps_of", "unswap"]

AUX_LOSS_COEF = 0.01  # the papers' (MoH)


def swap_attention(
    model: nn.Module,
    attention: str | Mapping[Any, Any],
    *,
    layers: Any = None,
    init: str = "convert",
    dry_run: bool = False,
    keep_original: bool = True,
    aux_loss_coef: float | None = None,
    **options: Any,
) -> SwapReport:
    """Put a mechanism into a pretrained model, in place, with the layers' weights carried over; all layers or, on an error, none.

        swap_attention(llama, "cca", layers=range(8, 24), group_size=16)
        swap_attention(vit, {"blocks.0.*": "moh", -1: ("hilo", {"window_size": 2})})

    Args:
        model: a Hugging Face or timm model.
        attention: a mechanism's name, or layers (a number, range, name or pattern) -> mechanism or (mechanism, options).
        layers: which attention layers: a number, a slice, a name or shell-style pattern of names, or several of these; None: all.
        init: "convert": as the mechanism's `from_softmax_attention` says; "mean_pool": the same after averaging key and value heads
            to `num_kv_heads`; "random": new weights.
        dry_run: only report.
        keep_original: keep the original layers for `unswap`. They stay on their device, beside the mechanisms' copies of their
            weights: the attention layers take twice the memory. False frees them.
        aux_loss_coef: weight of the mechanisms' auxiliary losses (`az.auxiliary_loss`: MoH's load balance) in the loss that a
            Hugging Face model returns in training, with no code of the user's; 0: they stay out. None: as the model has it by an
            earlier swap, else 0.01. It holds for all layers of the model. Models that return no loss (timm's) leave it to whoever
            computes theirs.
        options: of the mechanism, in every layer; those of a mapping win.

    Returns: what became of each layer, to be printed.

    Raises:
        ValueError: no layer is chosen, or one cannot be swapped; the reasons are listed. A weight below 0. The model is as it was.
        TypeError: an option that the mechanism does not have; something else than a module, or a name or mapping.
        UnknownNameError: no such mechanism.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}; got {init!r}")
    if not (aux_loss_coef is None or (isinstance(aux_loss_coef, Real) and math.isfinite(aux_loss_coef) and aux_loss_coef >= 0)):
        raise ValueError(f"aux_loss_coef is a weight, from 0; got {aux_loss_coef!r}")
    plans = _plans(model, attention, layers, init, options)
    _check(plans)
    chosen = [_plain_options(plan) for plan in plans]
    num_tokens, known = _context_length(model), {}  # type: ignore[var-annotated]
    report = SwapReport(tuple(_named(plan, describe_swap, plan, num_tokens, known) for plan in plans), dry_run)
    if dry_run:
        return report
    mechanisms = [_named(plan, build_mechanism, plan) for plan in plans]
    coefficient = next((slot.aux_loss_coef for slot in slots_of(model).values()), AUX_LOSS_COEF)
    undo = _install_all(model, plans, mechanisms)
    for plan, given in zip(plans, chosen, strict=True):
        slot = slot_of(model, plan.host)
        slot.init, slot.options, slot.undo = plan.init, given, undo[plan.host.name] if keep_original else None
    for slot in slots_of(model).values():
        slot.aux_loss_coef = coefficient if aux_loss_coef is None else float(aux_loss_coef)
    settle(model)
    return report


def unswap(model: nn.Module) -> list[str]:
    """Put the original layers back, with their weights, where the model is now; returns their names.

    Raises:
        ValueError: no layer of the model is swapped, or the original of one was not kept (`keep_original=False`, a copy, a loaded
            model).
    """
    slots = slots_of(model)
    if not slots:
        raise ValueError("no attention layer of this model is swapped")
    if lost := [name for name, slot in slots.items() if slot.undo is None]:
        raise ValueError(f"the original layers of {some(lost)} were not kept")
    for name, slot in reversed(slots.items()):
        now = next(slot.parameters(), None)
        assert slot.undo is not None
        slot.undo()
        if now is not None:
            model.get_submodule(name).to(device=now.device, dtype=now.dtype if now.is_floating_point() else None)
    settle(model)
    return list(slots)


def slot_of(model: nn.Module, host: Host) -> Slot:
    """What stands in the place of a host that is swapped."""
    slot = model.get_submodule(host.adapter.state_prefix(host).removesuffix(".mechanism."))
    assert isinstance(slot, Slot)
    return slot


def find_hosts(model: nn.Module) -> list[Host]:
    """All attention layers that an adapter knows, in the model's order; layers that are swapped already keep their numbers."""
    found = {host.name: host for adapter in ADAPTERS for host in adapter.find(model)}
    swapped = slots_of(model)
    hosts, number = [], 0
    for name, _ in model.named_modules():
        if name in found:
            hosts.append(dataclasses.replace(found[name], index=number))
        number += name in found or name in swapped
    return hosts


def _plans(model: nn.Module, attention: str | Mapping[Any, Any], layers: Any, init: str, options: dict[str, Any]) -> list[Plan]:
    """What to do, in the model's order. Raises ValueError when nothing is chosen or a layer is chosen twice."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model, an nn.Module, is swapped; got {type(model).__name__}")
    if not isinstance(attention, (str, Mapping)):
        raise TypeError(f"attention is a mechanism's name or a mapping layers -> mechanism; got {attention!r}")
    hosts = find_hosts(model)
    taken = list(slots_of(model))
    if not hosts:
        extra = f"; swapped already (unswap first): {some(taken)}" if taken else ""
        raise ValueError(f"{type(model).__name__} has no attention layer of a kind that is known{extra}")
    if isinstance(attention, Mapping):
        if layers is not None:
            raise ValueError("a mapping says its layers itself: leave `layers` out")
        if not attention:
            raise ValueError("no layer is chosen: the mapping is empty")
        wanted = [(key, *_mechanism(value)) for key, value in attention.items()]
    else:
        wanted = [(layers, attention, {})]
    plans: dict[str, Plan] = {}
    for key, name, own in wanted:
        attention_info(name)  # an unknown name is told first
        for host in _choose(hosts, key, taken):
            if host.name in plans:
                raise ValueError(f"{host.name} is chosen twice: {plans[host.name].mechanism!r} and {name!r}")
            plans[host.name] = Plan(host, name, {**options, **own}, init)
    return sorted(plans.values(), key=lambda plan: plan.host.index)


def _mechanism(value: Any) -> tuple[str, dict[str, Any]]:
    """A mapping's value: a name, or (name, options)."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
        return value[0], dict(value[1])
    raise ValueError(f"a layer's mechanism is its name, or (name, options); got {value!r}")


def _choose(hosts: list[Host], layers: Any, taken: list[str]) -> list[Host]:
    """The layers that a number, a slice, a pattern or several of these name. Raises ValueError when one names nothing."""
    if layers is None:
        return hosts
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        each = [host for one in layers for host in _choose(hosts, one, taken)]
        if not each:
            raise ValueError("no layer is chosen: `layers` is empty")
        return list({host.name: host for host in each}.values())
    count = max(host.index for host in hosts) + 1
    count = max(count, len(hosts) + len(taken))
    if isinstance(layers, slice):
        numbers = set(range(*layers.indices(count)))
    elif isinstance(layers, Integral) and not isinstance(layers, bool):
        numbers = {int(layers) + count if layers < 0 else int(layers)}
    elif isinstance(layers, str):
        numbers = {host.index for host in hosts if fnmatch.fnmatchcase(host.name, layers)}
    else:
        raise ValueError(f"layers are numbers, slices, names or patterns of names, or several of these; got {layers!r}")
    chosen = [host for host in hosts if host.index in numbers]
    if not chosen or (isinstance(layers, Integral) and len(chosen) != 1):
        names = some([host.name for host in hosts])
        extra = f"; swapped already (unswap first): {some(taken)}" if taken else ""
        raise ValueError(f"no attention layer is {layers!r}; the model has {count}: {names}{extra}")
    return chosen


def _check(plans: list[Plan]) -> None:
    """Raise ValueError that lists every layer that cannot be swapped, with the reasons."""
    problems = {plan.host.name: reasons for plan in plans if (reasons := [*check_plan(plan), *_offloaded(plan.host)])}
    if problems:
        lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in list(problems.items())[:20]]
        more = [f"  ... and {len(problems) - 20} layers more"] if len(problems) > 20 else []
        mechanisms = ", ".join(sorted({repr(plan.mechanism) for plan in plans if plan.host.name in problems}))
        raise ValueError("\n".join([f"{mechanisms} cannot take the place of:", *lines, *more]))


def _offloaded(host: Host) -> list[str]:
    """Whether accelerate keeps the layer's weights elsewhere, in words; nothing if it does not."""
    hooked = [module for module in host.module.modules() if "_hf_hook" in vars(module)]
    away = any(parameter.is_meta for module in hooked for parameter in module.parameters(recurse=False))
    return ["its weights are offloaded: swap the model on a device that holds it, before it is spread"] if away else []


def _named(plan: Plan, function: Callable[..., Any], *args: Any) -> Any:
    """Call, and say of an error in which layer it is."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{plan.host.name}: {plan.mechanism!r}: {error}") from error


def _install_all(model: nn.Module, plans: list[Plan], mechanisms: list[AttentionModule]) -> dict[str, Callable[[], None]]:
    """Put every mechanism in its place, or none. Returns what undoes each."""
    undo: dict[str, Callable[[], None]] = {}
    try:
        for plan, mechanism in zip(plans, mechanisms, strict=True):
            undo[plan.host.name] = plan.host.adapter.install(model, plan.host, mechanism)
    except BaseException:
        for step in reversed(undo.values()):
            step()
        raise
    return undo


def _plain_options(plan: Plan) -> dict[str, Any]:
    """The options as a configuration holds them. Raises ValueError for one that JSON cannot hold."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(plan.options)))
    except TypeError as error:
        raise ValueError(f"{plan.host.name}: the options are saved with the model and must be plain data: {error}") from error
    return plain


def _context_length(model: Any) -> int:
    """How many tokens of a text a report counts for: those that the model is made for, 4096 where it does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return 4096
    tables = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    unused = [index for table in tables if (index := getattr(table, "padding_idx", None)) is not None]
    return length - 1 - max(unused, default=-1)  # RoBERTa's positions count from behind the padding's
