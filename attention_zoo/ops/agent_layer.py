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
        prefix: number P of tokens before the grid.
        grid_size, agent_grid: (H, W) of the other tokens and (a, a').
        heads: h.
        scale: factor of both logits.
        parts: projections and convolution; where queries have a projection of their own, `qkv` is that one.
        kv, kv_bias: (2 h d, C) and (2 h d,), of keys and values; None: they are in `parts`.
        key_tables: (h, n, b, b'), (1, h, n, H, 1), (1, h, n, 1, W), and (1, h, n, P) where P > 0; (): there are no position biases.
        query_tables: (h, n, b, b'), (1, h, H, 1, n), (1, h, 1, W, n), and (1, h, P, n) where P > 0; (): as above.
    """

    prefix: int
    grid_size: Grid
    agent_grid: Grid
    heads: int
    scale: float
    parts: Parts
    kv: Tensor | None
    kv_bias: Tensor | None
    key_tables: tuple[Tensor, ...]
    query_tables: tuple[Tensor, ...]

    def parameters(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Those of products, and the others."""
        *of_products, kernel, kernel_bias = self.parts
        return (*of_products, self.kv, self.kv_bias), (kernel, kernel_bias, *self.key_tables, *self.query_tables)


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
    """From tokens (B, P + H W, C) to tokens (B, P + H W, C'), by the kernels. No gradients of gradients."""
    out: Tensor = apply_node(_Layer, x, layer[:5], *layer.parameters())
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[int, Grid, Grid, int, float], *parameters: Any) -> Tensor:
        weight, bias, proj, proj_bias, kv, kv_bias, kernel, kernel_bias, *tables = parameters
        if kv is not None:  # one product for all three costs less than two
            weight, bias = torch.cat((weight, kv)), None if bias is None else torch.cat((bias, kv_bias))
        qkv = F.linear(x, weight, bias).contiguous()
        given = tuple(t.contiguous() for t in tables)
        ctx.call = kernels.LayerCall.of(qkv, *settings, given)
        found = kernels.attend(qkv, ctx.call, given)
        out = found.out
        if kernel is not None:
            depthwise.convolve_channels(qkv, _values(qkv, ctx.call), kernel, kernel_bias, out, out)
        ctx.save_for_backward(x, qkv, *found, weight, proj, kernel)
        ctx.is_split = kv is not None
        return F.linear(out, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, qkv, *found, weight, proj, kernel = ctx.saved_tensors
        attended, call = kernels.Attended(*found), ctx.call
        needs_x, _, *needs = ctx.needs_input_grad
        of_tables = needs[8:]
        half = len(of_tables) // 2
        dout, d_proj, _ = linear_gradients(grad, attended.out, proj, True, needs[2], False)
        dqkv, d_tables = kernels.attend_backward(qkv, call, attended, dout, (any(of_tables[:half]), any(of_tables[half:])))
        d_kernel, d_kernel_bias = None, None
        if kernel is not None:
            values, wants = _values(qkv, call), needs[6] or needs[7]
            d_kernel, d_kernel_bias = depthwise.add_gradients(qkv, dqkv, values, kernel, dout, wants)
        dx, d_weight, _ = linear_gradients(dqkv, x, weight, needs_x, needs[0] or needs[4], False)
        d_proj_bias, d_bias = bias_gradients(grad if needs[3] else None, dqkv if needs[1] or needs[5] else None)
        of_kv: list[Tensor | None] = [None, None]
        if ctx.is_split:
            rows = qkv.shape[2] // 3, qkv.shape[2] // 3 * 2
            (d_weight, of_kv[0]), (d_bias, of_kv[1]) = (
                (None, None) if t is None else t.split_with_sizes(rows) for t in (d_weight, d_bias)
            )
        of_products = d_weight, d_bias, d_proj, d_proj_bias, *of_kv
        return dx, None, *of_products, d_kernel, d_kernel_bias, *d_tables[: len(of_tables)]


def _values(qkv: Tensor, call: kernels.LayerCall) -> depthwise.Channels:
    """The map of the values in a projection."""
    return depthwise.Channels(call.grid, qkv.shape[2] // 3 * 2, before=call.prefix)
