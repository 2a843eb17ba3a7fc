"""What stands in the place of a swapped layer: a mechanism behind its host's calling convention, told the grid of the image."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from timm.layers import register_notrace_module
from torch import Tensor, nn

from attention_zoo.attention.auxiliary import AuxiliaryLossModule
from attention_zoo.attention.base import AttentionModule, read_padding
from attention_zoo.attention.cache import check_cache

__all__ = ["Slot", "describe_refusal", "install_slot", "linear_problem", "replace_module", "shared_problem"]


@register_notrace_module
class Slot(nn.Module):
    """Base class of the wrappers, one for each calling convention; each adds the `forward` that its host calls.

    Attributes:
        mechanism: the attention that is in the place now.
        grid_size: (H, W) of the patches of the image at hand, set by the patch embedding's hook; None without a grid.
        place: where the slot stands, seen from the layer that is swapped: "" for its own place.
        init, options: what `swap_attention` was told.
        aux_loss_coef: weight of the mechanism's auxiliary loss, if it has one, in the host's training loss.
        undo: puts the original layer back; None where it was not kept. Copies and pickles have none.
    """

    place: ClassVar[str] = ""
    init: str = "convert"
    aux_loss_coef: float = 0.0
    undo: Callable[[], None] | None = None

    def __init__(self, mechanism: AttentionModule) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.grid_size: tuple[int, int] | None = None
        self.options: Mapping[str, Any] = {}
        self._inputs = frozenset(inspect.signature(mechanism.forward).parameters)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the mechanism may have an auxiliary loss."""
        return any(isinstance(module, AuxiliaryLossModule) for module in self.mechanism.modules())

    def entry(self, name: str) -> dict[str, Any]:
        """The swap of the layer `name` as a configuration holds it: what was asked for, and what builds the mechanism as it is."""
        entry = {
            "name": name,
            "mechanism": self.mechanism.attention_info.name,
            "init": self.init,
            "options": dict(self.options),
            "constructor": self.mechanism.constructor_options(),
        }
        return entry | ({"aux_loss_coef": self.aux_loss_coef} if self.has_auxiliary_loss else {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "undo": None}

    def attend(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        is_causal: bool,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Call the mechanism with what the host says in our vocabulary; (B, N, C) -> (B, N, C).

        Raises:
            ValueError: something that the mechanism has no input for, causality of one that was built without, or a preallocated
                cache where it keeps something else than one key and value for each token.
        """
        info = self.mechanism.attention_info
        check_cache(self.mechanism, past_key_values)
        if attention_mask is not None and attention_mask.ndim == 4 and info.padding_masks_only:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.mechanism.layer_idx)
            attention_mask = read_padding(attention_mask, x.shape[0], x.shape[1], seen, causal=self.mechanism.is_causal)
        if is_causal and not self.mechanism.is_causal:
            raise ValueError(f"the model asks for causal attention, {info.name!r} was built noncausal")
        said = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "past_key_values": past_key_values}
        inputs = {name: value for name, value in said.items() if value is not None}
        if lost := [name for name in inputs if name not in self._inputs]:  # torch 2.11 compiles no difference of keys
            raise ValueError(f"the model hands over {', '.join(sorted(lost))}, {info.name!r} takes none")
        if info.spatial and self.grid_size is not None:
            inputs["grid_size"] = self.grid_size
        return self.mechanism(x, **inputs)  # type: ignore[no-any-return]


class _TellGrid:
    """Forward hook of a patch embedding's convolution: its map is the grid, also when image sizes vary."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = output.shape[-2:]
        self.slot.grid_size = (height, width)


def replace_module(parent: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    """Put `new` under `name`, in the old one's train or eval mode; returns what puts the old one back, in the mode of then."""
    old, owner = getattr(parent, name), weakref.ref(parent)  # `new` may hold the undo: no cycles, which would delay freeing
    setattr(parent, name, new.train(old.training))

    def undo() -> None:
        place = owner()
        if place is not None:
            setattr(place, name, old.train(getattr(place, name).training))

    return undo


def install_slot(parent: nn.Module, name: str, slot: Slot, layer_idx: int | None, grid: nn.Module | None) -> Callable[[], None]:
    """Put `slot` in the place of `parent.name` and let it follow the convolution `grid`; returns what undoes both."""
    slot.mechanism.layer_idx = layer_idx
    undo_place = replace_module(parent, name, slot)
    hook = grid.register_forward_hook(_TellGrid(slot)) if grid is not None and slot.mechanism.attention_info.spatial else None

    def undo() -> None:
        undo_place()
        if hook is not None:
            hook.remove()

    return undo


def linear_problem(**layers: Any) -> str | None:
    """Why projections cannot be read, given by their names; None if all are plain linear layers."""
    strange = [f"{name} is {type(layer).__name__}" for name, layer in layers.items() if type(layer) is not nn.Linear]
    strange += [
        f"{name} holds {', '.join(kinds)}"
        for name, layer in layers.items()
        if (kinds := sorted({kind for kind, _ in layer.named_parameters()} - {"weight", "bias"}))
    ]
    if strange:
        return f"{', '.join(strange)}: projections must be plain linear layers (merge adapters, undo quantisation first)"
    return None


def describe_refusal(module: nn.Module, known: set[str]) -> str | None:
    """Why a layer cannot be read when it holds parameters or modules beyond the `known` ones; None if it does not.

    Modules without parameters (dropout, identity) are no matter.
    """
    own = {n for n, _ in module.named_parameters(recurse=False)}
    children = {n for n, child in module.named_children() if next(child.parameters(), None) is not None}
    unknown = sorted((own | children) - known)
    return f"{type(module).__name__} holds {', '.join(unknown)}, which would be lost" if unknown else None


def shared_problem(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why the layer `name` cannot be replaced alone: a parameter of it is one of another layer as well; None if none is."""
    own = {id(parameter): inside for inside, parameter in module.named_parameters()}
    for elsewhere, parameter in model.named_parameters(remove_duplicate=False):
        inside = own.get(id(parameter))
        if inside is not None and elsewhere != f"{name}.{inside}":
            return f"its {inside} is {elsewhere} as well: a swap would tear them apart"
    return None
