"""Halo attention with its projections as one function, forward and backward, for eager calls on small maps.

As `hilo_layer`: projections, views of heads, attention and sums of gradients are one node of autograd. Compilers get the same from
`halo_attention` and its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy, use_kernel
from attention_zoo.ops._one_node import apply_node, bias_gradients, linear_gradients

if TYPE_CHECKING:
    from attention_zoo.ops.triton import halo_layer as kernels
else:
    kernels = Lazy("attention_zoo.ops.triton.halo_layer")

__all__ = ["HaloParts", "HaloSettings", "halo_layer", "takes_layer"]

_MOST_NUMBERS = 2**31  # of a sample's projection: the kernels count them with 32 bits


class HaloSettings(NamedTuple):
    """Of a layer of `h` heads, d channels of queries and keys and d_v of values each; the rest is `halo_attention`'s."""

    grid_size: tuple[int, int]
    heads: int
    block_size: int
    halo_size: int
    scale_positions: bool
    mask_padding: bool


class HaloParts(NamedTuple):
    """Parameters of a layer.

    Attributes:
        query, query_bias: (h d, C, 1, 1) and (h d,).
        pair, pair_bias: of keys and values, head by head, (h (d + d_v), C, 1, 1) and (h (d + d_v),); a bias if queries have one.
        rows, columns: relative positions, (2 win - 1, d).
        proj, proj_bias: (C', h d_v) and (C',); None: there is no output projection.
    """

    query: Tensor
    query_bias: Tensor | None
    pair: Tensor
    pair_bias: Tensor | None
    rows: Tensor
    columns: Tensor
    proj: Tensor | None
    proj_bias: Tensor | None


def takes_layer(x: Tensor, settings: HaloSettings, channels: tuple[int, int], dropout_p: float) -> bool:
    """Whether the kernels serve heads of `channels` (d, d_v), for tokens like `x`.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    (height, width), block = settings.grid_size, settings.block_size
    if not settings.mask_padding and (height % block or width % block):
        return False
    numbers = height * width * settings.heads * (2 * channels[0] + channels[1])
    return 0 < numbers < _MOST_NUMBERS and use_kernel("auto", (x,), channels=max(channels), dropout_p=dropout_p)


def halo_layer(x: Tensor, settings: HaloSettings, parts: HaloParts) -> Tensor:
    """From tokens (B, H W, C) to tokens (B, H W, C'), by the kernels; without a projection C' = h d_v. No second derivatives."""
    out: Tensor = apply_node(_Layer, x, settings, parts)
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: HaloSettings, *parameters: Any) -> Tensor:
        query, query_bias, pair, pair_bias, rows, columns, proj, proj_bias = parameters
        weight = torch.cat((query, pair)).view(-1, x.shape[2])  # one product each way, and gradients need not be added up
        bias = None if query_bias is None else torch.cat((query_bias, pair_bias))
        qkv = F.linear(x, weight, bias).contiguous()
        rows, columns = rows.contiguous(), columns.contiguous()
        ctx.call = kernels.LayerCall.of(qkv, rows, columns, *settings)
        out, lse = kernels.attend(qkv, rows, columns, ctx.call)
        ctx.save_for_backward(x, qkv, rows, columns, out, lse, weight, proj)
        return out if proj is None else F.linear(out, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, qkv, rows, columns, out, lse, weight, proj = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        of_weight, of_bias, of_tables = needs[0] or needs[2], needs[1] or needs[3], needs[4] or needs[5]
        further = needs_x or of_weight or of_bias or of_tables
        if proj is None:
            dout, d_proj = grad.contiguous(), None
        else:
            dout, d_proj, _ = linear_gradients(grad, out, proj, further, needs[6], False)
        if not further:
            return (*(None,) * 8, d_proj, *bias_gradients(grad if needs[7] else None))
        dqkv, d_rows, d_columns = kernels.attend_backward(qkv, rows, columns, out, lse, dout, ctx.call, of_tables)
        dx, dw, _ = linear_gradients(dqkv, x, weight, needs_x, of_weight, False)
        d_proj_bias, db = bias_gradients(grad if needs[7] else None, dqkv if of_bias else None)
        inner = ctx.call.halo.heads * rows.shape[1]
        sizes = inner, weight.shape[0] - inner
        d_query, d_pair = (None, None) if dw is None else dw.view(*dw.shape, 1, 1).split_with_sizes(sizes)
        d_query_bias, d_pair_bias = (None, None) if db is None else db.split_with_sizes(sizes)
        return dx, None, d_query, d_query_bias, d_pair, d_pair_bias, d_rows, d_columns, d_proj, d_proj_bias
