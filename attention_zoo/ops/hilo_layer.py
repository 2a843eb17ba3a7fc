"""HiLo with its projections as one function, forward and backward, for eager calls on small maps.

There a GPU computes faster than autograd keeps its books: each of a dozen operations has a node of its own, also views and joined
weights. Here all are one node, whose backward pass is written out. Compilers get the same from `hilo_attention` and its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy
from attention_zoo.ops._one_node import apply_node, as_rows, bias_gradients, linear_gradients

if TYPE_CHECKING:
    from attention_zoo.ops.triton import hilo as kernels
else:
    kernels = Lazy("attention_zoo.ops.triton.hilo")

__all__ = ["HiloSettings", "hilo_layer"]


class HiloSettings(NamedTuple):
    """Of a call: size of the grid, side of the windows, Hi-Fi and Lo-Fi heads, factor of q k, whether padding is left out."""

    grid_size: tuple[int, int]
    window_size: int
    heads: tuple[int, int]
    scale: float
    mask_padding: bool


def hilo_layer(
    x: Tensor,
    settings: HiloSettings,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_weights: tuple[Tensor, ...],
    out_biases: tuple[Tensor | None, ...],
) -> Tensor:
    """Both branches from tokens to tokens, on CUDA, where `hilo_attention` takes its kernels. No gradients of gradients.

    Args:
        x: (B, N, C), N = H * W row-major.
        settings: of the call; with biases, and padding that is not left out, the windows tile the grid.
        weights: of q, k and v of Hi-Fi, (3 h D, C), of q of Lo-Fi, (l D, C), and of its k and v, (2 l D, C).
        biases: of the same, all of them or none.
        out_weights: one, (C', (h + l) D), or one for each branch, (C_h, h D) and (C_l, l D), whose outputs stand side by side.
        out_biases: of the same.

    Returns: (B, N, C').
    """
    out: Tensor = apply_node(_Layer, x, settings, (*weights, *biases, *out_weights, *out_biases))
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: HiloSettings, *parameters: Any) -> Tensor:
        w_high, w_query, w_kv, b_high, b_query, b_kv, *of_output = parameters
        branches = len(of_output) // 2
        grid, side, heads, scale, masked = settings
        # one product for both outputs, whose zeros cost less than a second one and a copy
        layers = (w_high, w_query), (b_high, b_query), of_output[:branches], of_output[branches:]
        means, weight, bias, out_weight, out_bias = kernels.prepare_layer(x, grid, side, masked, *layers)
        qkv, kv = F.linear(x, weight, bias), F.linear(means, w_kv, b_kv)
        out, lse = kernels.forward_operator.unseen()(qkv, kv, *grid, side, *heads, scale, masked)
        ctx.settings = settings
        ctx.save_for_backward(x, means, qkv, kv, out, lse, weight, w_kv, *of_output[:branches])
        return F.linear(out, out_weight, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, means, qkv, kv, out, lse, weight, w_kv, *out_weights = ctx.saved_tensors
        (height, width), side, heads, scale, masked = ctx.settings
        needs = ctx.needs_input_grad
        of_in, of_out = needs[2:8], needs[8:]
        dout, of_out_weights = _back_through_output(as_rows(grad), as_rows(out), out_weights, of_out)
        call = height, width, side, *heads, scale, masked
        dqkv, dkv = kernels.backward_operator.unseen()(qkv, kv, out, lse, dout.view_as(out), *call)
        dx, dw, _ = linear_gradients(dqkv, x, weight, needs[0], of_in[0] or of_in[1], False)
        dmeans, dw_kv, _ = linear_gradients(dkv, means, w_kv, needs[0], of_in[2], False)
        wanted = any(of_out[len(out_weights) :]), of_in[3] or of_in[4], of_in[5]
        of_biases = (t if needed else None for t, needed in zip((grad, dqkv, dkv), wanted, strict=True))
        d_out_bias, db, db_kv = bias_gradients(*of_biases)
        if dx is not None:
            kernels.add_means_backward_operator.unseen()(dmeans, dx, height, width, side, masked)
        rows = weight.shape[0] - w_kv.shape[0] // 2, w_kv.shape[0] // 2
        pairs = [(None, None) if t is None else t.split_with_sizes(rows) for t in (dw, db)]
        of_out_biases = (d_out_bias,) * len(out_weights)
        if d_out_bias is not None and len(out_weights) > 1:
            of_out_biases = d_out_bias.split_with_sizes([t.shape[0] for t in out_weights])
        return dx, None, *pairs[0], dw_kv, *pairs[1], db_kv, *of_out_weights, *of_out_biases


def _back_through_output(
    grad: Tensor, out: Tensor, weights: list[Tensor], needs: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients (B N, ...) of what the branches computed, and of the output's weights, branch by branch."""
    rows, columns = [weight.shape[0] for weight in weights], [weight.shape[1] for weight in weights]
    dout = torch.empty_like(out)
    of_weights: list[Tensor | None] = []
    parts = grad.split_with_sizes(rows, 1), out.split_with_sizes(columns, 1), dout.split_with_sizes(columns, 1)
    for part, branch, place, weight, wanted in zip(*parts, weights, needs[: len(weights)], strict=True):
        torch.mm(part, weight, out=place)
        of_weights.append(torch.mm(part.t(), branch) if wanted else None)
    return dout, of_weights
