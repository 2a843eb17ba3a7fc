"""Softmax attention in stripes of a map, CSwin's, with its projections as one function, forward and backward, for eager calls.

As `agent_layer`: projection, both branches, the convolutions of the values in every stripe and the output are one node of autograd,
and no stripe is copied. Compilers get the same from `attention` and its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy
from attention_zoo.ops._one_node import apply_node, bias_gradients, linear_gradients
from attention_zoo.ops.windows import projected_dtype, takes_windows, too_large

if TYPE_CHECKING:
    from attention_zoo.ops.triton import depthwise
    from attention_zoo.ops.triton import stripe_layer as kernels
else:
    depthwise, kernels = Lazy("attention_zoo.ops.triton.depthwise"), Lazy("attention_zoo.ops.triton.stripe_layer")

__all__ = ["StripeSettings", "stripe_layer", "takes_layer"]

Grid = tuple[int, int]


class StripeSettings(NamedTuple):
    """Of a call: (H, W), rows and columns of the stripes of each branch, heads of each branch, factor of the logits."""

    grid_size: Grid
    stripes: tuple[Grid, ...]
    heads: int
    scale: float


def takes_layer(x: Tensor, settings: StripeSettings, channels: int, dropout_p: float) -> bool:
    """Whether the kernels serve heads of so many channels, for tokens like `x`.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    dtype = projected_dtype(x)
    if any(too_large(stripe, channels, dtype) for stripe in settings.stripes):
        return False  # other kernels serve those
    return all(takes_windows(x, stripe, channels, dropout_p) for stripe in settings.stripes)


def stripe_layer(
    x: Tensor,
    settings: StripeSettings,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    convolutions: list[tuple[Tensor, Tensor | None]],
) -> Tensor:
    """y = (concat_i(softmax(s q_i k_i^T) v_i + conv_i(v_i))) W_o, in the stripes of each branch i. No gradients of gradients.

    Args:
        x: (B, H W, C').
        settings: of the call.
        qkv: weight (3 C, C') and bias; channels of q, then k, then v, each those of the branches one after the other.
        proj: weight (C'', C) and bias.
        convolutions: of each branch, weight (C / branches, 1, k, k) and bias.

    Returns: (B, H W, C'').
    """
    flat = tuple(t for pair in convolutions for t in pair)
    out: Tensor = apply_node(_Layer, x, settings, (*qkv, *proj), flat)
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: StripeSettings, *parameters: Any) -> Tensor:
        weight, bias, proj, proj_bias, *convolutions = parameters
        qkv = F.linear(x, weight, bias).contiguous()
        ctx.call = kernels.LayerCall.of(qkv, *settings)
        out = kernels.attend(qkv, ctx.call)
        for branch, kernel in enumerate(convolutions[::2]):
            depthwise.convolve_channels(qkv, _values(ctx.call, branch), kernel, convolutions[2 * branch + 1], out, out)
        ctx.save_for_backward(x, qkv, out, weight, proj, *convolutions[::2])
        return F.linear(out, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, qkv, out, weight, proj, *weights = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        dout, d_proj, _ = linear_gradients(grad, out, proj, True, needs[2], False)
        dqkv = kernels.attend_backward(qkv, dout, ctx.call)
        of_convolutions: list[Tensor | None] = []
        for branch, kernel in enumerate(weights):
            wants = needs[4 + 2 * branch] or needs[5 + 2 * branch]
            of_convolutions += depthwise.add_gradients(qkv, dqkv, _values(ctx.call, branch), kernel, dout, wants)
        dx, d_weight, _ = linear_gradients(dqkv, x, weight, needs_x, needs[0], False)
        d_proj_bias, d_bias = bias_gradients(grad if needs[3] else None, dqkv if needs[1] else None)
        return dx, None, d_weight, d_bias, d_proj, d_proj_bias, *of_convolutions


def _values(call: kernels.LayerCall, branch: int) -> depthwise.Channels:
    """A branch's values in the projection, and where they are added to the output."""
    first, stripe = branch * call.heads * call.dim, call.stripes[branch]
    return depthwise.Channels(call.grid, 2 * call.channels + first, first, stripe=None if stripe == call.grid else stripe)
