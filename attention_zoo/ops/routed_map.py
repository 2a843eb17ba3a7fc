"""Attention between the regions of a map, on one fused projection, with the router that needs no parameters.

The plain code is `routed_attention` on regions cut out of the map; the kernels of `triton/routed_map.py` read the map as it lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops.routed import routed_attention

__all__ = ["Regions", "best_regions", "routed_map_attention", "takes_map", "with_values"]

_MOST_REGIONS = 1024  # whose products a program of the router holds for some of them


class Regions(NamedTuple):
    """How a grid is cut: `rows` x `columns` regions of `height` x `width` tokens, the last filled up below and on the right."""

    rows: int
    columns: int
    height: int
    width: int

    def padding(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        """Rows below and columns on the right that the regions have and the grid has not."""
        return self.rows * self.height - grid_size[0], self.columns * self.width - grid_size[1]

    def cut(self, image: Tensor) -> Tensor:
        """(B, H', W', C) -> (B, R, n, C), regions and the tokens inside them row-major."""
        blocks = image.unflatten(2, (self.columns, self.width)).unflatten(1, (self.rows, self.height))
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, regions: Tensor) -> Tensor:
        """(B, R, n, C) -> (B, H', W', C)."""
        blocks = regions.unflatten(2, (self.height, self.width)).unflatten(1, (self.rows, self.columns))
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def takes_map(x: Tensor, regions: Regions, channels: int, *, dropout_p: float = 0.0) -> bool:
    """Whether to call the kernels for heads of so many channels, of maps projected from tokens like `x` that the regions tile.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    if regions.rows * regions.columns > _MOST_REGIONS or channels > x.shape[-1]:
        return False
    return use_kernel("auto", (x,), channels=channels, dropout_p=dropout_p)


def best_regions(qk: Tensor, regions: Regions, *, scale: float, topk: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The K regions whose mean key suits each region's mean query best, in float32 at least, without gradient.

    Args:
        qk: (B, H, W, 2 C), queries and keys of all heads, the regions tile the map.
        regions: how it is cut.
        scale: of the products.
        topk: K.
        backend: "triton" for our kernels, which "auto" takes on CUDA; any other for plain PyTorch.

    Returns: numbers (B, R, K), int64, best first, and their products.
    """
    number = regions.rows * regions.columns
    missing = None if number <= _MOST_REGIONS else f"more than {_MOST_REGIONS} regions: {number}"
    if use_kernel(backend, (qk,), channels=1, missing=missing):
        from attention_zoo.ops.triton.routed_map import best_regions_triton

        return best_regions_triton(qk, size=regions[2:], scale=scale, topk=topk)
    with no_autocast(qk):
        q, k = regions.cut(qk.detach()).mean(2, dtype=torch.promote_types(qk.dtype, torch.float32)).chunk(2, -1)
        best, routes = ((scale * q) @ k.transpose(-2, -1)).topk(topk, dim=-1)
    return routes, best


def routed_map_attention(
    qkv: Tensor,
    routes: Tensor,
    regions: Regions,
    *,
    qk_dim: int,
    heads: int,
    scale: float,
    route_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`routed_attention` between the regions of a map.

    Args:
        qkv: (B, H, W, 2 qk_dim + C), q, k and v, each of all heads; the regions tile the map.
        routes, route_weights: (B, R, K), as for `routed_attention`.
        regions: how the map is cut.
        qk_dim: channels of q, and of k, of all heads together.
        heads: how many; a divisor of qk_dim and C.
        scale: factor of the logits.
        backend: as for `routed_attention`.

    Returns: (B, H, W, C).

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    dim_v = qkv.shape[-1] - 2 * qk_dim
    number = regions.rows * regions.columns
    tiled = qkv.ndim == 4 and any(qkv.shape[1:3]) and not any(regions.padding((qkv.shape[1], qkv.shape[2])))
    if not tiled or qk_dim % heads or dim_v % heads or min(qk_dim, dim_v) <= 0 or routes.shape[:2] != (qkv.shape[0], number):
        raise ValueError(
            f"with {regions}, qk_dim={qk_dim} and heads={heads}, qkv is (B, {regions.rows * regions.height}, "
            f"{regions.columns * regions.width}, 2 qk_dim + C), qk_dim and C multiples of heads, and routes (B, {number}, K); got "
            f"{tuple(qkv.shape)} and {tuple(routes.shape)}"
        )
    widest = max(qk_dim, dim_v) // heads
    if use_kernel(backend, (qkv[..., :widest],)):
        from attention_zoo.ops.triton.routed_map import routed_map_attention_triton

        return routed_map_attention_triton(
            qkv, routes, route_weights=route_weights, qk_dim=qk_dim, heads=heads, size=regions[2:], scale=scale
        )
    q, k, v = (regions.cut(t).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4) for t in qkv.split([qk_dim, qk_dim, dim_v], -1))
    out = routed_attention(q, k, v, routes, route_weights=route_weights, scale=scale, backend=backend)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return regions.join(out.permute(0, 2, 3, 1, 4).flatten(3))


class _WithValues(torch.autograd.Function):
    """A projection and its last channels, whose two gradients meet in one addition.

    By itself autograd writes the second one into zeros of the whole's size and adds the two up.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, start: int) -> tuple[Tensor, Tensor]:
        ctx.start = start
        ctx.set_materialize_grads(False)
        return qkv.view_as(qkv), qkv[..., start:]

    @staticmethod
    def backward(ctx: Any, of_all: Tensor | None, of_values: Tensor | None) -> tuple[Any, ...]:
        if of_values is None or of_all is None:
            whole = None if of_values is None else torch.nn.functional.pad(of_values, (ctx.start, 0))
            return whole if of_all is None else of_all, None
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            return of_all + torch.nn.functional.pad(of_values, (ctx.start, 0)), None
        of_all[..., ctx.start :] += of_values  # the attention has made it for this
        return of_all, None


def with_values(qkv: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """qkv (..., C), for `routed_map_attention` alone, and qkv[..., start:], for another reader."""
    if torch.compiler.is_compiling() or not qkv.requires_grad:
        return qkv, qkv[..., start:]
    result: tuple[Tensor, Tensor] = _WithValues.apply(qkv, start)
    return result
