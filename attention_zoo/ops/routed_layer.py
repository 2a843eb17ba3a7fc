"""Bi-level routing attention with its projections as one function, forward and backward, for eager calls on small maps.

As `hilo_layer`: projections, router, attention and LePE are one node of autograd. Compilers get the same from
`routed_map_attention` and its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy
from attention_zoo.ops._one_node import Parts, apply_node, bias_gradients, linear_gradients
from attention_zoo.ops.routed_map import Regions

if TYPE_CHECKING:
    from attention_zoo.ops.triton import depthwise
    from attention_zoo.ops.triton import routed_map as kernels
else:
    kernels, depthwise = Lazy("attention_zoo.ops.triton.routed_map"), Lazy("attention_zoo.ops.triton.depthwise")

__all__ = ["RoutedLayer", "routed_layer"]


class RoutedLayer(NamedTuple):
    """Parameters and settings of a layer.

    Attributes:
        regions: how the map is cut; they tile it.
        qk_dim, heads, scale: as for `routed_map_attention`.
        topk: regions that each one is routed to.
        soft: whether the softmax of their products weights them.
        parts: its parameters; the convolution is LePE.
    """

    regions: Regions
    qk_dim: int
    heads: int
    scale: float
    topk: int
    soft: bool
    parts: Parts


def routed_layer(x: Tensor, layer: RoutedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """From tokens (B, H W, C) to tokens (B, H W, C'), the routes (B, R, K) and their products, where `takes_map` says so.

    No gradients of gradients, and none through the routes.
    """
    found: tuple[Tensor, Tensor, Tensor] = apply_node(_Layer, x, layer[:6], layer.parts)
    return found


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: tuple[Regions, int, int, float, int, bool], *parameters: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        regions, qk_dim, heads, scale, topk, soft = settings
        qkv_weight, qkv_bias, proj, proj_bias, kernel, kernel_bias = parameters
        size = regions.height, regions.width
        grid = regions.rows * size[0], regions.columns * size[1]
        qkv = F.linear(x, qkv_weight, qkv_bias)
        qkv = qkv.view(qkv.shape[0], *grid, qkv.shape[2])
        routes, best = kernels.find_regions(qkv, 2 * qk_dim, *size, scale, topk)
        weights = best.softmax(-1) if soft else None
        attended, lse = kernels.map_operator.unseen()(qkv, routes, weights, qk_dim, heads, *size, scale)
        out = attended
        if kernel is not None:
            out = torch.empty_like(attended)
            depthwise.convolve_channels(qkv, depthwise.Channels(grid, 2 * qk_dim), kernel, kernel_bias, attended, out)
        ctx.settings = settings
        ctx.save_for_backward(x, qkv, routes, weights, attended, lse, out, qkv_weight, proj, kernel)
        ctx.mark_non_differentiable(routes, best)
        ctx.set_materialize_grads(False)
        return F.linear(out.view(x.shape[0], x.shape[1], out.shape[3]), proj, proj_bias), routes, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        x, qkv, routes, weights, attended, lse, out, qkv_weight, proj, kernel = ctx.saved_tensors
        regions, qk_dim, heads, scale, _, _ = ctx.settings
        needs_x, _, *needs = ctx.needs_input_grad
        dout, d_proj, _ = linear_gradients(grad, out, proj, True, needs[2], False)
        size = regions.height, regions.width
        backward = kernels.map_backward_operator.unseen()
        dqkv, _ = backward(qkv, routes, weights, attended, lse, dout, qk_dim, heads, *size, scale, False)
        d_kernel, d_kernel_bias = None, None
        if kernel is not None:
            grid = regions.rows * size[0], regions.columns * size[1]
            values, wants = depthwise.Channels(grid, 2 * qk_dim), needs[4] or needs[5]
            d_kernel, d_kernel_bias = depthwise.add_gradients(qkv, dqkv, values, kernel, dout, wants)
        dx, d_qkv, _ = linear_gradients(dqkv, x, qkv_weight, needs_x, needs[0], False)
        d_proj_bias, d_qkv_bias = bias_gradients(grad if needs[3] else None, dqkv if needs[1] else None)
        return dx, None, d_qkv, d_qkv_bias, d_proj, d_proj_bias, d_kernel, d_kernel_bias
