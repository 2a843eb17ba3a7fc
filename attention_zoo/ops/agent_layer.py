"""Agent attention with its projections as one function, forward and backward, for eager calls on small maps.

As `hilo_layer`: some thirty operations, views, tables and sums of gradients are one node of autograd. Compilers get the same from
`agent_attention` and its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy, use_kernel
from attention_zoo.ops._one_node import Parts, apply_node, bias_gradients, linear_gradients
from attention_zoo.ops.agent import Grid, too_large_tables, too_many_agents

if TYPE_CHECKING:
    from attention_zoo.ops.triton import agent_layer as kernels
    from attention_zoo.ops.triton import depthwise
else:
    kernels, depthwise = Lazy("attention_zoo.ops.triton.agent_layer"), Lazy("attention_zoo.ops.triton.depthwise")

__all__ = ["AgentLayer", "agent_layer", "takes_layer"]


class AgentLayer(NamedTuple):
    """Parameters and settings of a layer, of `h` heads of `d` channels and n = a a' agents.

    Attributes:
        grid_size, agent_grid: (H, W) of the tokens and (a, a').
        heads: h.
        scale: factor of both logits.
        parts: projections and convolution.
        key_tables: (h, n, b, b'), (1, h, n, H, 1) and (1, h, n, 1, W); None: there are no position biases.
        query_tables: (h, n, b, b'), (1, h, H, 1, n) and (1, h, 1, W, n); None: as above.
    """

    grid_size: Grid
    agent_grid: Grid
    heads: int
    scale: float
    parts: Parts
    key_tables: tuple[Tensor, Tensor, Tensor] | None
    query_tables: tuple[Tensor, Tensor, Tensor] | None

    def parameters(self) -> tuple[Tensor | None, ...]:
        return (*self.parts, *(self.key_tables or (None,) * 3), *(self.query_tables or (None,) * 3))


def takes_layer(x: Tensor, number: int, channels: int, grid_size: Grid, square: Grid | None, dropout_p: float) -> bool:
    """Whether the kernels serve `number` agents of so many channels on this grid, for tokens like `x`.

    `square`: sides of the square tables; None: there are no tables.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    if channels > x.shape[-1] or (square is not None and too_large_tables(grid_size, square)):
        return False
    return use_kernel("auto", (x,), channels=channels, dropout_p=dropout_p, missing=too_many_agents(number, channels))


def agent_layer(x: Tensor, layer: AgentLayer) -> Tensor:
    """From tokens (B, H W, C) to tokens (B, H W, C'), by the kernels. No gradients of gradients."""
    out: Tensor = apply_node(_Layer, x, layer[:4], layer.parameters())
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Grid, Grid, int, float], *parameters: Any) -> Tensor:
        qkv_weight, qkv_bias, proj, proj_bias, kernel, kernel_bias, *tables = parameters
        qkv = F.linear(x, qkv_weight, qkv_bias).contiguous()
        given = () if tables[0] is None else tuple(t.contiguous() for t in tables)
        ctx.call = kernels.LayerCall.of(qkv, *settings, given)
        found = kernels.attend(qkv, ctx.call, given)
        out, grid = found.out, settings[0]
        if kernel is not None:
            depthwise.convolve_channels(qkv, qkv.shape[2] // 3 * 2, grid, kernel, kernel_bias, out, out)
        ctx.save_for_backward(x, qkv, *found, qkv_weight, proj, kernel)
        return F.linear(out, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, qkv, *found, qkv_weight, proj, kernel = ctx.saved_tensors
        attended = kernels.Attended(*found)
        needs_x, _, *needs = ctx.needs_input_grad
        dout, d_proj, _ = linear_gradients(grad, attended.out, proj, True, needs[2], False)
        wants = any(needs[6:9]), any(needs[9:12])
        dqkv, d_tables = kernels.attend_backward(qkv, ctx.call, attended, dout, wants)
        d_kernel, d_kernel_bias = None, None
        if kernel is not None:
            first = qkv.shape[2] // 3 * 2
            d_kernel, d_kernel_bias = depthwise.add_gradients(qkv, dqkv, first, ctx.call.grid, kernel, dout, needs[4] or needs[5])
        dx, d_qkv, _ = linear_gradients(dqkv, x, qkv_weight, needs_x, needs[0], False)
        d_proj_bias, d_qkv_bias = bias_gradients(grad if needs[3] else None, dqkv if needs[1] else None)
        return dx, None, d_qkv, d_qkv_bias, d_proj, d_proj_bias, d_kernel, d_kernel_bias, *d_tables
