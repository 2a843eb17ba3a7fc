"""Auxiliary losses: kept on the layers that have one, gathered for the training loss, also out of reentrant checkpoints.

Reentrant gradient checkpointing runs a layer without a graph first, and once more, with one, when the gradient of its output has
arrived. A loss that a layer keeps beside its output is therefore a constant when the training loss is put together, and its graph
appears too late. Both ends are joined by hand: `auxiliary_loss` notes the gradient that such a loss gets, and the layer's second
run hands it on, at its output.

A loss that is kept also keeps its graph, and so the nodes that add up gradients of the parameters, which remember the stream that
they were made on: a CUDA graph cannot be captured on another stream while they are alive. A layer therefore keeps the number alone
once the loss has had its gradient, and lets go of a loss that never got one when its next forward begins.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import AttentionModule

__all__ = ["AuxiliaryLossModule", "add_auxiliary_loss", "auxiliary_loss"]


class AuxiliaryLossModule(AttentionModule):
    """A mechanism with an auxiliary loss: `aux_loss`, of the last forward in training mode, None otherwise.

    A subclass calls `_forget_auxiliary_loss` at the start of every forward and `_keep_auxiliary_loss` once in it.
    """

    aux_loss: Tensor | None = None
    _is_cut: bool = False  # the last forward had no graph though it was in training: the first run of a reentrant checkpoint
    _noted: Tensor | None = None  # gradient of the training loss by `aux_loss`, for the second run

    def _forget_auxiliary_loss(self) -> None:
        """Let go of the last forward's loss, and so of its graph."""
        self.aux_loss = None

    def _keep_auxiliary_loss(self, loss: Tensor | None, output: Tensor) -> Tensor:
        """Set `aux_loss`; returns `output`, to be used from here on, whose backward pass is the loss's too where it was cut."""
        self.aux_loss = loss if self.training else None
        if self.aux_loss is None:
            return output
        if not torch.is_grad_enabled():
            self._is_cut = True
            return output
        _release_when_done(self, self.aux_loss)
        if not self._is_cut:
            return output
        self._is_cut = False
        return _HandOn.apply(output, self.aux_loss, self)  # type: ignore[no-any-return, no-untyped-call]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Mean of the auxiliary losses of the last forward over the layers that have one; 0 when none has.

    A mechanism keeps its loss as `aux_loss` in training mode (None otherwise). Multiply by the paper's weight and add it to the
    task's loss: `loss + 0.01 * auxiliary_loss(model)`.

    Returns: a scalar on the layers' device, differentiable until the losses have had their gradients, a number from then on.
    """
    losses = [_joined(module) for module in model.modules() if isinstance(getattr(module, "aux_loss", None), Tensor)]
    if losses:  # at least float32, on the first one's device: a model may be spread over several
        return torch.stack([loss.to(losses[0].device, torch.promote_types(loss.dtype, torch.float32)) for loss in losses]).mean()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=parameter.device if parameter is not None else None)


def add_auxiliary_loss(
    model: Any,
    loss: Tensor,
    coefficient: float,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The training loss of a Hugging Face model: its task's `loss` + coefficient * auxiliary_loss(model) * this batch's share.

    `Trainer` adds up the losses of several batches that are each divided by all the items of the update: with them, the shares of
    the batches add up to 1.

    Args:
        model: a Hugging Face model after its forward.
        loss: of its task.
        coefficient: weight of the auxiliary losses.
        labels, shift_labels: what the items are counted from, as `Trainer` does.
        num_items_in_batch: items of the whole update; None: this batch is all of it.
        ignore_index: the label of what is no item.
    """
    share: Tensor | float = 1.0
    counted = shift_labels if shift_labels is not None else labels
    if num_items_in_batch is not None and counted is not None:
        if shift_labels is None and _compares_with_the_next(model):
            counted = counted[..., 1:]
        items = num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        share = counted.ne(ignore_index).sum().to(loss.device) / items
    return loss + coefficient * share * auxiliary_loss(model).to(loss.device)


def _release_when_done(module: AuxiliaryLossModule, loss: Tensor) -> None:
    """Once `loss` has had its gradient, `module` keeps it without its graph."""
    if torch.compiler.is_compiling() or not loss.requires_grad:
        return
    at_module, at_loss = weakref.ref(module), weakref.ref(loss)

    def release(_: Tensor) -> None:
        keeper, kept = at_module(), at_loss()
        if keeper is not None and kept is not None and keeper.aux_loss is kept:
            keeper.aux_loss = kept.detach()

    loss.register_hook(release)


def _compares_with_the_next(model: Any) -> bool:
    """Whether the model's loss holds each token against the label of the next one; the first label counts for nothing then."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss  # as Trainer decides it


def _joined(module: Any) -> Tensor:
    """The module's loss; one that a reentrant checkpoint cut notes its gradient for the second run."""
    loss: Tensor = module.aux_loss
    if loss.requires_grad or not torch.is_grad_enabled() or not getattr(module, "_is_cut", False):
        return loss
    return _Note.apply(loss, loss.new_zeros((), requires_grad=True), module)  # type: ignore[no-any-return, no-untyped-call]


class _Note(torch.autograd.Function):
    """The loss itself; its backward keeps the gradient on the module. `anchor` requires gradients, so that there is a backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor, module: AuxiliaryLossModule) -> Tensor:
        ctx.module = module
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.module._noted = gradient
        return None, None, None


class _HandOn(torch.autograd.Function):
    """The output itself; its backward gives the loss the gradient that was noted, if any."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, module: AuxiliaryLossModule) -> Tensor:
        ctx.module = module
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        noted, ctx.module._noted = ctx.module._noted, None
        return gradient, noted, None
