"""Agent attention with its projections as one function, forward and backward, for eager calls on small maps.

As `hilo_layer`: some thirty operations, views, tables and sums of gradients are one node of autograd. Compilers get the same from
`agent_attention` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._one_node import Parts, apply_node, convolution_gradients, linear_gradients
from attention_zoo.ops.agent import Grid, too_large_tables, too_many_agents

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
    return use_kernel("auto", (x[..., :channels],), dropout_p=dropout_p, missing=too_many_agents(number, channels))


def agent_layer(x: Tensor, layer: AgentLayer) -> Tensor:
    """From tokens (B, H W, C) to tokens (B, H W, C'), by the kernels. No gradients of gradients."""
    out: Tensor = apply_node(_Layer, x, layer[:4], layer.parameters())
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Grid, Grid, int, float], *parameters: Any) -> Tensor:
        from attention_zoo.ops.triton import agent as kernels
        from attention_zoo.ops.triton.depthwise import forward_operator as convolve

        grid, bins, heads, scale = settings
        qkv_weight, qkv_bias, proj, proj_bias, kernel, kernel_bias, *tables = parameters
        qkv = F.linear(x, qkv_weight, qkv_bias)
        flat_q, _, flat_v = qkv.chunk(3, -1)
        q, k, v = _heads(qkv, heads)
        pooled = kernels.pool_operator(flat_q, *grid, *bins)
        agents = pooled.view(*pooled.shape[:2], heads, -1).transpose(1, 2)
        key_bias = _bias(tables[:3], grid, x.dtype, agents_first=True)
        read, lse = kernels.agents_read_operator(agents, k, v, key_bias, None, scale)
        query_bias = _bias(tables[3:], grid, x.dtype, agents_first=False)
        out = kernels.tokens_read_operator(q, agents, read, query_bias, scale).transpose(1, 2).flatten(2)
        if kernel is not None:
            out = convolve(flat_v.unflatten(1, grid), kernel, kernel_bias, out.unflatten(1, grid)).flatten(1, 2)
        ctx.settings = settings
        ctx.sides = [None if t is None else t.shape[2:] for t in (tables[0], tables[3])]
        ctx.save_for_backward(x, qkv, pooled, key_bias, query_bias, read, lse, out, qkv_weight, proj, kernel)
        return F.linear(out, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from attention_zoo.ops.triton import agent as kernels

        x, qkv, pooled, key_bias, query_bias, read, lse, out, qkv_weight, proj, kernel = ctx.saved_tensors
        grid, bins, heads, scale = ctx.settings
        needs_x, _, *needs = ctx.needs_input_grad
        dout, d_proj, d_proj_bias = linear_gradients(grad, out, proj, True, *needs[2:4])
        agents, by_head = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (pooled, dout))
        dqkv = torch.empty_like(qkv)
        (q, k, v), (dq, dk, dv) = _heads(qkv, heads), _heads(dqkv, heads)

        # gradients of biases have n numbers for a token and head of each sample: they go before the next ones come
        wanted = any(needs[9:12])
        d_agents, d_read, d_bias = kernels.tokens_read_gradients(q, agents, read, query_bias, by_head, scale, wanted, dq)
        d_query_tables = _table_gradients(d_bias, ctx.sides[1], grid, agents_first=False) if wanted else (None,) * 3
        wanted = any(needs[6:9])
        del d_bias
        more, d_bias = kernels.agents_read_gradients(agents, k, v, key_bias, read, lse, d_read, scale, wanted, dk, dv)
        d_key_tables = _table_gradients(d_bias, ctx.sides[0], grid, agents_first=True) if wanted else (None,) * 3
        del d_bias

        of_q, _, of_v = dqkv.chunk(3, -1)
        kernels.add_pool_gradient((d_agents + more).transpose(1, 2).flatten(2), of_q, grid, bins)
        d_kernel, d_kernel_bias = None, None
        if kernel is not None:
            near, values, of_values = (t.unflatten(1, grid) for t in (dout, qkv.chunk(3, -1)[2], of_v))
            d_kernel, d_kernel_bias = convolution_gradients(near, values, kernel, of_values, *needs[4:6])
        dx, d_qkv, d_qkv_bias = linear_gradients(dqkv, x, qkv_weight, needs_x, *needs[:2])
        return dx, None, d_qkv, d_qkv_bias, d_proj, d_proj_bias, d_kernel, d_kernel_bias, *d_key_tables, *d_query_tables


def _bias(tables: Sequence[Tensor | None], grid: Grid, dtype: torch.dtype, *, agents_first: bool) -> Tensor | None:
    """(1, h, n, H W) from the tables, whose rows and columns have the agents first or last."""
    from attention_zoo.ops.triton.agent import bias_operator

    square, rows, columns = tables
    if square is None or rows is None or columns is None:
        return None
    if agents_first:
        lines = rows[0, ..., 0], columns[0, :, :, 0]
    else:
        lines = rows[0, :, :, 0].transpose(1, 2), columns[0, :, 0].transpose(1, 2)
    return bias_operator(square, *lines, None, *grid, dtype)[None]


def _table_gradients(grad: Tensor, sides: Sequence[int], grid: Grid, *, agents_first: bool) -> tuple[Tensor, ...]:
    """Gradients of what `_bias` was made from; `sides`: (b, b')."""
    from attention_zoo.ops.triton.agent import bias_backward_operator

    of_square, rows, columns = bias_backward_operator(grad[0], 0, *grid, *sides, grad.dtype)
    if agents_first:
        return of_square, rows[None, ..., None], columns[None, :, :, None]
    return of_square, rows.transpose(1, 2)[None, :, :, None], columns.transpose(1, 2)[None, :, None]


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 h d) -> three of (B, h, N, d), views."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
