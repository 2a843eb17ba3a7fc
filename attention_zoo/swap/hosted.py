"""Hugging Face models that hold swapped layers: auxiliary losses in their loss, and the swap in the file that they save.

Both need the model's own methods, which hooks do not reach: PEFT calls `forward` itself, `Trainer` calls `save_pretrained`. So the
model's class is exchanged for a subclass of the same name, as PyTorch's FSDP does it, and given back when nothing is swapped.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from attention_zoo.attention.auxiliary import add_auxiliary_loss
from attention_zoo.swap.record import is_hugging_face, slots_of, write_record

__all__ = ["host_class", "settle", "swapped_class"]

_ITEMS = ("labels", "shift_labels", "num_items_in_batch")  # of a forward's arguments: what tells a batch's share of an update


def settle(model: nn.Module) -> None:
    """After a swap or its undoing: let the Hugging Face models in and around `model` be what their slots make of them."""
    for outermost in _outermost(model):
        inner: list[nn.Module] = [module for module in outermost.modules() if is_hugging_face(module)]
        kind = type(outermost)
        if slots_of(outermost) and host_class(kind) is kind:
            _own_configurations([*outermost.modules(), *model.modules()])
        for module in inner:
            slots = slots_of(module).values()
            with_loss = module is outermost and any(slot.has_auxiliary_loss for slot in slots)
            _exchange(module, swapped_class(host_class(type(module)), with_loss) if slots else host_class(type(module)))
        write_record(outermost)


def host_class(kind: type) -> type:
    """The class that was exchanged for `kind`; `kind` itself where none was."""
    return vars(kind).get("_zoo_host", kind)  # type: ignore[no-any-return]


@functools.cache
def swapped_class(kind: Any, with_loss: bool) -> type:
    """A subclass of the same name that records its swap when it is saved and, `with_loss`, adds auxiliary losses to its loss."""

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        write_record(self)  # what was changed since the swap: heads that are routed, grown, ...
        return kind.save_pretrained(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        parts = kind.__reduce_ex__(self, protocol)
        return (_blank, (kind, with_loss), *parts[2:]) if type(self) is swapped else parts

    own = {"save_pretrained": save_pretrained, "__reduce_ex__": reduce, "_zoo_host": kind}
    if with_loss:
        own["forward"] = _forward_with_loss(kind)
    swapped = type(kind.__name__, (kind,), {**own, "__module__": kind.__module__, "__doc__": kind.__doc__})
    swapped.__qualname__ = kind.__qualname__
    return swapped


def _blank(kind: Any, with_loss: bool) -> nn.Module:
    """For pickle, which finds classes by their names: an instance without its state."""
    swapped: Any = swapped_class(kind, with_loss)
    blank: nn.Module = swapped.__new__(swapped)
    return blank


def _forward_with_loss(kind: Any) -> Callable[..., Any]:
    """`kind.forward`, its loss of training with the auxiliary losses of the swapped layers."""
    names = list(inspect.signature(kind.forward).parameters)[1:]

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        coefficient = _coefficient(self) if self.training else 0.0
        loss = _loss(output)
        if loss is None or not coefficient:
            return output
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        items = {name: given[name] for name in _ITEMS if name in given}
        loss = add_auxiliary_loss(self, loss, coefficient, **items)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    return forward


def _loss(output: Any) -> Tensor | None:
    """The loss in what a model of transformers returns; with DataParallel it has one entry. None where there is none."""
    loss = output[0] if isinstance(output, tuple) and output else output.get("loss") if hasattr(output, "get") else None
    return loss if isinstance(loss, Tensor) and loss.ndim < 2 else None


def _coefficient(model: nn.Module) -> float:
    return next((slot.aux_loss_coef for slot in slots_of(model).values() if slot.has_auxiliary_loss), 0.0)


def _exchange(module: Any, kind: type) -> None:
    if type(module) is kind:
        return
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hooks, which device_map sets, hold the method that they wrap
        module._old_forward = MethodType(kind.forward, module)  # type: ignore[attr-defined]


def _outermost(model: nn.Module) -> list[Any]:
    """The Hugging Face models that contain `model` and are in no other one; those in it where there are none.

    A model that is swapped in part is saved and trained as a whole, whichever part was swapped.
    """
    return _maximal(_around(model) or [module for module in model.modules() if is_hugging_face(module)])


def _around(model: Any) -> list[nn.Module]:
    """The Hugging Face models that contain `model`, itself included.

    A module does not know what contains it, so all that are alive are looked through, where it can be a part at all: a model with
    a head of its own is taken as whole.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    whole = [model] if is_hugging_face(model) else []
    if transformers is None or (whole and model.base_model is not model):
        return whole
    wraps_timm = "transformers.models.timm_wrapper" in sys.modules
    may_be_part = bool(whole) or wraps_timm or type(model).__module__.startswith(("transformers.", "torch.nn."))
    if not may_be_part or not any(isinstance(holder, dict) for holder in gc.get_referrers(model)):
        return whole
    alive = [module for module in gc.get_objects() if issubclass(type(module), transformers.PreTrainedModel)]
    built = (module for module in alive if "_modules" in vars(module))
    return [module for module in built if any(inner is model for inner in module.modules())]


def _maximal(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are in no other one of them."""
    modules = list(modules)
    inside = {id(inner) for module in modules for inner in module.modules() if inner is not module}
    return [module for module in modules if id(module) not in inside]


def _own_configurations(modules: Iterable[nn.Module]) -> None:
    """Give the modules copies of their configurations, the same where they shared one: other models may hold those, too."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    for module in {id(module): module for module in modules}.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)
