"""What layers that are one node of autograd share: the casts of autocast, and the gradients of their linear parts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from attention_zoo.ops._kernels import Lazy
from attention_zoo.ops._operators import is_at_hand

if TYPE_CHECKING:
    from attention_zoo.ops.triton import column_sums as sums
else:
    sums = Lazy("attention_zoo.ops.triton.column_sums")

__all__ = ["Parts", "apply_node", "as_rows", "bias_gradients", "linear_gradients", "weight_and_bias"]


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Of a layer that is those, for whoever computes with them: modules find attributes slowly."""
    found = layer._parameters
    if "weight" in found and "bias" in found:
        return found["weight"], found["bias"]
    return layer.weight, layer.bias


class Parts(NamedTuple):
    """Parameters of a layer that projects tokens, attends, adds a depthwise convolution of the values, and projects back.

    Attributes:
        qkv, qkv_bias: (I, C) and (I,), I channels of queries, keys and values together.
        proj, proj_bias: (C', V) and (C',), V channels of the values.
        kernel, kernel_bias: (V, 1, k, k) and (V,), of the convolution; None: there is none.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    kernel: Tensor | None
    kernel_bias: Tensor | None

    @classmethod
    def of(cls, qkv: Any, proj: Any, convolution: nn.Module | None) -> Self:
        """Of the layers that have them."""
        local = (None, None) if convolution is None else weight_and_bias(convolution)
        return cls(*weight_and_bias(qkv), *weight_and_bias(proj), *local)


def apply_node(
    node: type[torch.autograd.Function],
    x: Tensor,
    settings: Any,
    parameters: tuple[Tensor | None, ...],
    as_they_are: tuple[Tensor | None, ...] = (),
) -> Any:
    """`node` of x, the settings and all parameters, on the tape; Triton's kernels run where x is.

    Autocast casts x and `parameters` first. Of `as_they_are` only kernels read, which compute in float32 whatever the dtype.
    """
    if not is_at_hand(x):
        with torch.cuda.device(x.device):
            return apply_node(node, x, settings, parameters, as_they_are)
    device, apply = x.device.type, node.apply
    if not torch.is_grad_enabled():
        apply = functools.partial(node.forward, _Unrecorded())  # what `apply` does then, in half the time
    if not torch.is_autocast_enabled(device):
        return apply(x, settings, *parameters, *as_they_are)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return apply(x.to(dtype), settings, *(None if t is None else t.to(dtype) for t in parameters), *as_they_are)


class _Unrecorded:
    """The context of a forward that no backward follows."""

    def save_for_backward(self, *_: Any) -> None:
        pass

    mark_non_differentiable = set_materialize_grads = save_for_backward


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (R, C)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Any, Tensor | None, Tensor | None]:
    """Of `F.linear(x, weight, bias)`, from `grad` (..., out): of x (..., in), weight and bias, each None if it is not wanted."""
    flat = as_rows(grad)
    dx = torch.mm(flat, weight).view_as(x) if wants_x else None
    d_weight = torch.mm(flat.t(), as_rows(x)) if wants_weight else None
    return dx, d_weight, sums.column_sums.unseen()(flat) if wants_bias else None


def bias_gradients(*grads: Tensor | None) -> list[Tensor | None]:
    """Of biases, from gradients (..., C) of what they were added to, up to three of them; None where it is not wanted."""
    wanted = [as_rows(grad) for grad in grads if grad is not None]
    found = iter(sums.joint_column_sums(wanted) if wanted else ())
    return [None if grad is None else next(found) for grad in grads]
