"""Attention maps of any model: what every layer's queries attend to, recomputed beside fused engines that never form them.

with record_attention(model, layers=[0, -1], rows=0) as maps:
    model(images)
maps["blocks.0.attn"]        # (B, H, 1, N): where the class token looks
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.analysis.effective import effective_attention
from attention_zoo.analysis.sources import (
    FunctionMode,
    Weights,
    attends,
    encoder_layer_weights,
    interface_table,
    interface_weights,
    multihead_call,
    multihead_weights,
)
from attention_zoo.attention.base import AttentionModule
from attention_zoo.ops._tap import Call, add_tap, remove_tap
from attention_zoo.registry import some

__all__ = ["AttentionCall", "AttentionMaps", "record_attention"]

FORWARDS = ("last", "all")


@dataclass(frozen=True)
class AttentionCall:
    """One softmax attention inside a forward of a layer.

    Attributes:
        name: the function that computed it.
        probabilities: as it was computed, (B, H, ..., queries, keys), before any dropout.
    """

    name: str
    probabilities: Tensor

    def __repr__(self) -> str:
        *_, queries, keys = self.probabilities.shape
        return f"{self.name}: {queries} queries over {keys} keys, {tuple(self.probabilities.shape)}"


@dataclass
class _Forward:
    """What a layer did in one forward: its calls, and the one map that they come down to, or why there is none."""

    calls: list[AttentionCall] = field(default_factory=list)
    effective: Tensor | None = None
    reason: str = "record_attention(effective=True) finds the map that they come down to"


class AttentionMaps(Mapping[str, Tensor]):
    """The recorded layers, by name or number, in the model's order; `maps[layer]` is the last forward's map (B, H, R, N).

    R are the rows that were asked for, N the keys. A layer that attends more than once in a forward has `calls`, and a map only
    where it was recorded with `effective=True`.

    Attributes:
        layers: names of all attention layers of the model; their places are the numbers.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self._forwards: dict[str, list[_Forward]] = {}

    def __getitem__(self, layer: str | int) -> Tensor:
        return self._single(self._name(layer), -1)

    def __iter__(self) -> Iterator[str]:
        order = {name: number for number, name in enumerate(self.layers)}
        return iter(sorted(self._forwards, key=order.__getitem__))

    def __len__(self) -> int:
        return len(self._forwards)

    def __contains__(self, layer: object) -> bool:
        return layer in self._forwards or (isinstance(layer, int) and layer < len(self.layers) and self.layers[layer] in self)

    def history(self, layer: str | int) -> list[Tensor]:
        """The map of every forward that was kept, the oldest first: in generation one for each step."""
        name = self._name(layer)
        return [self._single(name, number) for number in range(len(self._forwards[name]))]

    def calls(self, layer: str | int, forward: int = -1) -> tuple[AttentionCall, ...]:
        """All that a layer computed in a forward, in order, for mechanisms that attend in windows, regions or more than once."""
        return tuple(self._forwards[self._name(layer)][forward].calls)

    def __repr__(self) -> str:
        lines = [f"  {name}: {'; '.join(map(repr, self.calls(name)))}" for name in self]
        return "\n".join([f"attention of {len(self)} of {len(self.layers)} layers", *lines])

    def _name(self, layer: str | int) -> str:
        name = layer
        if isinstance(layer, int):
            if not -len(self.layers) <= layer < len(self.layers):
                raise KeyError(f"no layer {layer}: the model has {len(self.layers)} attention layers: {some(self.layers)}")
            name = self.layers[layer]
        if name not in self._forwards:
            recorded = some(list(self)) or "none, as no forward ran in the block"
            raise KeyError(f"no attention of layer {name!r} was recorded; recorded: {recorded}")
        return str(name)

    def _single(self, name: str, number: int) -> Tensor:
        forward = self._forwards[name][number]
        if forward.effective is not None:
            return forward.effective
        if len(forward.calls) != 1:
            listed = "".join(f"\n  {number}: {call!r}" for number, call in enumerate(forward.calls))
            times = f"{name} attends {len(forward.calls)} times in a forward"
            raise ValueError(f"{times}: maps.calls({name!r}) has each of them; {forward.reason}{listed}")
        return forward.calls[0].probabilities

    def _add(self, name: str, forward: _Forward, *, keep_all: bool) -> None:
        if name not in self.layers:
            self.layers.append(name)
        if keep_all and name in self._forwards:
            self._forwards[name].append(forward)
        else:
            self._forwards[name] = [forward]


@dataclass(eq=False)
class _Frame:
    """A module whose forward is running."""

    layer: str
    module: nn.Module
    num_tokens: int | None  # of a mechanism of the zoo
    forward: _Forward = field(default_factory=_Forward)
    ran_own: bool = False  # whether a part of it was recorded under a name of its own


class record_attention:
    """Context manager: keep the attention probabilities of every forward of `model` within, of fused engines too.

    Any model: mechanisms of the zoo, timm's and Hugging Face's layers (every attn_implementation), `nn.MultiheadAttention`,
    `F.scaled_dot_product_attention`, or a softmax and a matrix product in anybody's module. Outputs and gradients stay what they
    are: engines compute them as ever, and the probabilities beside, in float32 (float64 stays float64), without gradients, before
    any dropout. A query head has a map of its own also where it shares its keys; a row that sees nothing is 0. A forward that is
    repeated for gradient checkpointing counts once. What `torch.compile` has compiled runs uncompiled within.

    Memory: B * H * R * N numbers for each layer that is chosen; nothing else is kept.

    Args:
        model: any module, swapped or not.
        layers: which attention layers: a number, a slice, a name or shell-style pattern of names, or several of these; None: all.
        rows: which queries: a number, a slice or several numbers, in each forward; None: all. The class token is 0, the last token
            -1. Windows and regions of sparse mechanisms, whose queries are not the layer's tokens, are kept whole.
        heads: which heads: a number, a slice or several numbers; "mean": one map, their mean; None: all.
        effective: for mechanisms of the zoo, `maps[layer]` is the one map over tokens that they come down to, with gates and
            differences, at the cost of N / d forwards of the layer (`effective_attention`); where there is none, it says why.
        forwards: "last": of each layer the last forward; "all": every one, for `AttentionMaps.history`.
        device: where the maps are kept; None: where the model is.
        dtype: of the maps; None: as computed.

    Raises:
        ValueError: no such layer, or a choice that is none. Inside a forward: rows or heads that it does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Any = None,
        rows: int | slice | Sequence[int] | None = None,
        heads: int | slice | Sequence[int] | str | None = None,
        effective: bool = False,
        forwards: str = "last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if forwards not in FORWARDS:
            raise ValueError(f"forwards must be one of {', '.join(map(repr, FORWARDS))}; got {forwards!r}")
        if isinstance(heads, str) and heads != "mean":
            raise ValueError(f"heads are numbers, a slice, or 'mean'; got {heads!r}")
        self.model, self.rows, self.heads, self.forwards = model, rows, heads, forwards
        self.effective, self.device, self.dtype = effective, device, dtype
        self._owners = dict(_layer_names(model))
        names = [self._owners[module] for module in self._owners if isinstance(module, AttentionModule) or attends(module)]
        self.maps = AttentionMaps(list(dict.fromkeys(names)))
        self._wanted = _choose(self.maps.layers, list(self._owners.values()), layers)
        self._mode = FunctionMode(self._listening, self._found)
        self._running = threading.local()
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> AttentionMaps:
        if self._undo is not None:
            raise RuntimeError("this recorder is in use; make another one")
        with contextlib.ExitStack() as undo:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            for module in list(self._owners):
                undo.callback(_replace_forward(module, self._watch(module)))
            self._replace_interfaces(undo)
            add_tap(self._tap)
            undo.callback(remove_tap, self._tap)
            undo.enter_context(self._mode)
            self._undo = undo.pop_all()
        return self.maps

    def __exit__(self, *error: Any) -> None:
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()

    # --- who is running ---------------------------------------------------------------------------------------------------------

    @property
    def _stack(self) -> list[_Frame]:
        if not hasattr(self._running, "stack"):
            self._running.stack, self._running.quiet = [], 0
        return self._running.stack  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """What runs within is part of something that has been seen: nothing of this recorder looks on, and compiled code runs."""
        self._running.quiet += 1
        try:
            with self._mode.off(), torch.compiler.set_stance("default"):
                yield
        finally:
            self._running.quiet -= 1

    def _frame(self) -> _Frame | None:
        """Whose attention a call is that is made now; None where it is nobody's, not wanted, or repeated in a backward pass."""
        stack = self._stack
        if not stack or self._running.quiet or torch._C._current_graph_task_id() != -1:
            return None
        frame = next((frame for frame in stack if isinstance(frame.module, AttentionModule)), stack[-1])
        return frame if self._wanted is None or frame.layer in self._wanted else None

    def _watch(self, module: nn.Module) -> Callable[..., Any]:
        """What takes the place of `module.forward`: the same, known to be running."""
        original = module.forward
        layer, kind = self._owners[module], type(module)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.get("x")
            tokens = x.shape[1] if isinstance(module, AttentionModule) and isinstance(x, Tensor) and x.ndim == 3 else None
            stack = self._stack
            stack.append(_Frame(layer, module, tokens))
            try:
                if kind.forward is nn.MultiheadAttention.forward:
                    return self._run_multihead(module, original, args, kwargs)
                if kind in (nn.TransformerEncoder, nn.TransformerEncoderLayer):
                    return self._run_encoder(module, original, args, kwargs)
                result = original(*args, **kwargs)
                if self.effective and (frame := self._frame()) is not None and frame is stack[-1]:
                    self._keep_effective(frame, args, kwargs)
                return result
            finally:
                stack.pop()
                if not stack:
                    self._running.quiet = 0

        return forward

    # --- what is seen -----------------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        frame = self._frame()
        return frame is not None and not isinstance(frame.module, AttentionModule)  # those tell of what they do themselves

    def _found(self, name: str, weights: Weights, num_queries: int, device: torch.device) -> None:
        """A call of torch's functions."""
        if (frame := self._frame()) is not None:
            self._keep(frame, name, weights, num_queries, device)

    def _tap(self, call: Call) -> Any:
        """A call of the zoo's operations."""
        frame, queries = self._frame(), call.queries
        with self._quiet():
            result = call.proceed()
        if frame is not None:
            self._keep(frame, call.name, call.weights, queries.shape[-2], queries.device, takes_rows=call.takes_rows)
        return result

    def _run_multihead(self, module: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`nn.MultiheadAttention`, whose fused path calls nothing that could be seen, and is not taken where a mode looks on."""
        frame = self._frame()
        for above in self._stack[:-1]:
            above.ran_own = True
        with self._quiet():
            result = original(*args, **kwargs)
        if frame is not None:
            call = multihead_call(module, *args, **kwargs)
            self._keep(frame, "multi_head_attention", multihead_weights(**call), call["query"].shape[0], call["query"].device)
        return result

    def _run_encoder(self, module: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """torch's encoder, whose fused path runs none of its parts."""
        if isinstance(module, nn.TransformerEncoder) and any(
            type(layer) is not nn.TransformerEncoderLayer for layer in module.layers
        ):
            return original(*args, **kwargs)
        frame = self._stack[-1]
        with self._mode.off():
            result = original(*args, **kwargs)
        if isinstance(module, nn.TransformerEncoderLayer) and not frame.ran_own and self._running.quiet == 0:
            part = _Frame(self._owners[module.self_attn], module.self_attn, None)
            if self._wanted is None or part.layer in self._wanted:
                self._keep(part, "multi_head_attention", *encoder_layer_weights(module, *args, **kwargs))
        return result

    def _replace_interfaces(self, undo: contextlib.ExitStack) -> None:
        """Put watched functions into Hugging Face's table, in the places of those that hide what they attend to."""
        table = interface_table()
        for kind in [] if table is None else list(table):
            if kind in ("sdpa", "flex_attention") or ("flash" in kind and "paged" not in kind):
                undo.callback(_replace_entry(table, kind, self._watch_interface(kind, table[kind])))

    def _watch_interface(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
            frame = self._frame()
            with self._quiet():
                result = original(module, query, key, value, attention_mask, *args, **kwargs)
            if frame is not None:
                said = {**dict(zip(("dropout", "scaling", "is_causal"), args, strict=False)), **kwargs}
                weights = interface_weights(kind, module, query, key, attention_mask, **said)
                self._keep(frame, kind, weights, query.shape[2], query.device)
            return result

        return attend

    # --- what is kept -----------------------------------------------------------------------------------------------------------

    def _keep(
        self,
        frame: _Frame,
        name: str,
        weights: Callable[[Tensor | None], Tensor | None],
        num_queries: int,
        device: torch.device,
        takes_rows: bool = True,
    ) -> None:
        """Compute what was asked for of a call, and put it to its layer's forward."""
        rows = None
        if self.rows is not None and frame.num_tokens in (None, num_queries):
            rows = torch.tensor(_numbers("rows", self.rows, num_queries), dtype=torch.int64, device=device)
        with torch.no_grad(), self._mode.off():
            found = weights(rows if takes_rows else None)
            if found is None or found.numel() == 0:  # no probabilities, or nobody that attends
                return
            if rows is not None and not takes_rows:
                found = found.index_select(-2, rows)
            if found.ndim == 3:  # products of three dimensions have samples and heads in the first, or one head
                count = next((n for a in _HEADS if isinstance(n := getattr(frame.module, a, None), int)), 1)
                found = found.unflatten(0, (-1, count)) if found.shape[0] % count == 0 else found.unsqueeze(1)
            found = self._reduce(found)
        if not frame.forward.calls:
            self.maps._add(frame.layer, frame.forward, keep_all=self.forwards == "all")
        frame.forward.calls.append(AttentionCall(name, found))

    def _keep_effective(self, frame: _Frame, args: Any, kwargs: Any) -> None:
        """After a forward of a mechanism: the map that its calls come down to."""
        if not isinstance(frame.module, AttentionModule) or not frame.forward.calls:
            return
        try:
            with self._quiet():
                found = effective_attention(frame.module, *args, **kwargs)
        except ValueError as error:
            frame.forward.reason = str(error)
            return
        with torch.no_grad(), self._mode.off():
            if self.rows is not None:
                found = found[:, :, _numbers("rows", self.rows, found.shape[2])]
            frame.forward.effective = self._reduce(found)

    def _reduce(self, found: Tensor) -> Tensor:
        """The heads that were asked for, where and as they are kept."""
        if self.heads == "mean":
            found = found.mean(1, keepdim=True)
        elif not (self.heads is None or isinstance(self.heads, str)):
            found = found[:, _numbers("heads", self.heads, found.shape[1])]
        return found.detach().to(device=self.device, dtype=self.dtype)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")  # what modules call their number of heads


def _layer_names(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module that may attend, with the name of its layer: its own, or that of the mechanism of the zoo that it is part of."""
    mechanism = None
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # nothing of it runs in Python
            continue
        if mechanism is not None and name.startswith(f"{mechanism}." if mechanism else ""):
            yield module, _layer(mechanism)
        elif isinstance(module, AttentionModule):
            mechanism = name
            yield module, _layer(name)
        elif not type(module).__module__.startswith("torch.nn.") or isinstance(module, _TORCH) or attends(module):
            yield module, _layer(name)


_TORCH = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def _layer(name: str) -> str:
    """A layer's name, whether it is swapped (the mechanism stands inside it) and compiled (the module stands inside it) or not."""
    parts = [part for part in name.removesuffix(".mechanism").split(".") if part != "_orig_mod"]
    return ".".join(parts)


def _choose(layers: list[str], modules: list[str], wanted: Any) -> set[str] | None:
    """Names of the layers that are meant; None: all, also those that are not known to attend until they do."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        found = {name for name in layers if fnmatch.fnmatchcase(name, wanted)}
        found = found or {name for name in modules if fnmatch.fnmatchcase(name, wanted)}
    elif isinstance(wanted, slice):
        found = set(layers[wanted])
    elif isinstance(wanted, int) and not isinstance(wanted, bool):
        found = {layers[wanted]} if -len(layers) <= wanted < len(layers) else set()
    else:
        try:
            each = list(wanted)
        except TypeError:
            raise ValueError(
                f"layers are numbers, slices, names or patterns of names, or several of these; got {wanted!r}"
            ) from None
        return set().union(*(_choose(layers, modules, one) or () for one in each))
    if not found:
        raise ValueError(f"no attention layer is {wanted!r}; the model has {len(layers)}: {some(layers)}")
    return found


def _numbers(name: str, wanted: int | slice | Sequence[int], count: int) -> list[int]:
    """Numbers from 0. Raises ValueError for one that is out of range."""
    if isinstance(wanted, slice):
        return list(range(count)[wanted])
    numbers = [wanted] if isinstance(wanted, int) else [int(n) for n in wanted]
    if wrong := [n for n in numbers if not -count <= n < count]:
        raise ValueError(f"{name}={wrong} are not among the {count} {name} of this forward; a slice takes those that there are")
    return [n % count for n in numbers]


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another forward; returns what undoes it."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if module.__dict__.get("forward") is forward:
            del module.__dict__["forward"]
            if before is not None:
                module.forward = before

    return undo


def _replace_entry(table: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put a function into Hugging Face's table, for this process; returns what undoes it."""
    own = table._local_mapping
    before = own.get(name)
    own[name] = function

    def undo() -> None:
        if before is None:
            own.pop(name, None)
        else:
            own[name] = before

    return undo
