"""Routed attention between the regions of a map whose queries, keys and values are one projection, and the routes themselves.

The kernels of `routed.py` read the regions where they stand on the map, and write their gradients there: nothing is cut out or put
together in memory. The router (means of the regions, their products, the best of them) is two kernels, where plain PyTorch has a
dozen operations on small tensors, which take the host longer than the attention takes the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, precision, tile, warps
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled
from attention_zoo.ops.triton.routed import Backward, RoutedCall, Tiling, backward_launches, forward_launch, run_backward

__all__ = ["best_regions_triton", "find_regions", "routed_map_attention_triton"]

_FEW_REGIONS = {"BC": 32, "num_warps": 4}
_MANY_REGIONS = {"BC": 16, "num_warps": 8, "num_stages": 1}  # whose keys fill the shared memory of small cards


@triton.jit
def _region_means_kernel(
    X, Means, sb, sy, sx, N, C, R, HEIGHT, WIDTH, COLUMNS, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Means (B, R, C) over the tokens of each region."""
    pid, portion = tl.program_id(0), tl.program_id(1)
    b, region = (pid // R).to(tl.int64), pid % R
    line = region // COLUMNS
    c = portion * BC + tl.arange(0, BC)
    X += b * sb + (line * HEIGHT).to(tl.int64) * sy + (region - line * COLUMNS) * WIDTH * sx
    total = tl.zeros([BN, BC], tl.float32)
    for start in range(0, N, BN):
        t = start + tl.arange(0, BN)
        y = t // WIDTH
        at = X + y[:, None].to(tl.int64) * sy + (t - y * WIDTH)[:, None] * sx + c[None, :]
        total += tl.load(at, mask=(t < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    tl.store(Means + pid.to(tl.int64) * C + c, tl.sum(total, 0) / N, mask=c < C)


@triton.jit
def _best_kernel(Means, Routes, Best, scale, R, C, K, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Of each region the K others whose mean key suits its mean query best; of equal ones the first."""
    b = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR)
    Means += b * R * 2 * C
    logits = tl.zeros([BM, BR], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        q = tl.load(Means + rows[:, None] * (2 * C) + c[None, :], mask=(rows < R)[:, None] & (c < C)[None, :], other=0.0)
        k = tl.load(Means + columns[None, :] * (2 * C) + C + c[:, None], mask=(columns < R)[None, :] & (c < C)[:, None], other=0.0)
        logits += tl.dot(q * scale, k, input_precision="ieee")
    logits = tl.where((columns < R)[None, :], logits, float("-inf"))
    at = (b * R + rows) * K
    for i in range(K):
        highest = tl.max(logits, 1)
        which = tl.min(tl.where(logits == highest[:, None], columns[None, :], R - 1), 1)  # a region also where logits are NaN
        tl.store(Routes + at + i, which.to(tl.int64), mask=rows < R)
        tl.store(Best + at + i, highest, mask=rows < R)
        logits = tl.where(columns[None, :] == which[:, None], float("-inf"), logits)


@operator("best_regions")
def _best_regions(qk: Tensor, height: int, width: int, scale: float, topk: int) -> tuple[Tensor, Tensor]:
    return find_regions(last_contiguous(qk), qk.shape[3], height, width, scale, topk)


def find_regions(qk: Tensor, channels: int, height: int, width: int, scale: float, topk: int) -> tuple[Tensor, Tensor]:
    """Of the first `channels` of a map, which lie side by side."""
    regions = _tiled(qk, height, width)
    means = qk.new_empty((qk.shape[0], regions.number, channels), dtype=torch.float32)
    routes, best = _empty_routes(qk, regions, topk)
    if means.numel():
        launches = _best_launches(qk.shape[0], channels, qk.stride(), regions, scale, topk, qk.dtype, qk.device)
        launch_all(launches, (qk, means, routes, best))
    return routes, best


@settled
def _best_launches(
    batch: int,
    channels: int,
    strides: Sequence[int],
    regions: Tiling,
    scale: float,
    topk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, Launch]:
    """Of queries and keys, means, routes and their products."""
    bc, bn = tile(channels, 128), min(16, power_of_2(regions.tokens))
    numbers = *strides[:3], regions.tokens, channels, regions.number, *regions[:3]
    grid = batch * regions.number, ceil_div(channels, bc)
    constants = {"BN": bn, "BC": bc, "num_warps": warps(bn * bc, 512)}
    first = Launch(_region_means_kernel, grid, (Place(0), Place(1)), numbers, constants)
    constants = {"BM": 16, "BR": tile(regions.number, 1 << 30), **(_FEW_REGIONS if regions.number <= 256 else _MANY_REGIONS)}
    grid, places = (ceil_div(regions.number, 16), batch), (Place(1), Place(2), Place(3))
    return first, Launch(_best_kernel, grid, places, (scale, regions.number, channels // 2, topk), constants)


def _empty_routes(qk: Tensor, regions: Tiling, topk: int) -> tuple[Tensor, Tensor]:
    shape = (qk.shape[0], regions.number, topk)
    return qk.new_empty(shape, dtype=torch.int64), qk.new_empty(shape, dtype=torch.float32)


@_best_regions.register_fake
def _(qk: Tensor, height: int, width: int, scale: float, topk: int) -> tuple[Tensor, Tensor]:
    return _empty_routes(qk, _tiled(qk, height, width), topk)


def _tiled(qkv: Tensor, height: int, width: int) -> Tiling:
    columns = qkv.shape[2] // width
    return Tiling(height, width, columns, qkv.shape[1] // height * columns)


@operator("routed_map_forward")
def _map_forward(
    qkv: Tensor, routes: Tensor, weights: Tensor | None, qk_dim: int, heads: int, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    qkv, routes, regions = last_contiguous(qkv), routes.contiguous(), _tiled(qkv, height, width)
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] - 2 * qk_dim))
    lse = qkv.new_empty((qkv.shape[0], heads, regions.number, regions.tokens), dtype=torch.float32)
    if out.numel():
        call = _call(qkv, routes, weights, qk_dim, heads, regions, scale)
        launch = _map_forward_launch(call, qk_dim, qkv.stride(), out.stride())
        launch(qkv, qkv, qkv, routes, routes if weights is None else weights, routes, out, lse)
    return out, lse


def _call(
    qkv: Tensor, routes: Tensor, weights: Tensor | None, qk_dim: int, heads: int, regions: Tiling, scale: float
) -> RoutedCall:
    dim, dim_v = qk_dim // heads, (qkv.shape[3] - 2 * qk_dim) // heads
    sizes = qkv.shape[0], heads, heads, dim, dim_v, routes.shape[2], regions, regions
    return RoutedCall(*sizes, scale, precision(qkv), weights is not None, None, (qkv.dtype, qkv.device))


def _of_projection(first: int, call: RoutedCall, qk_dim: int, strides: Sequence[int]) -> tuple[Place, Place, Place]:
    """q, k and v in the tensors `first`, ... of a launch, which all are one projection with these strides, by (B, h, Y, X)."""
    sample, row, column = strides[:3]
    places = (
        Place(first + number, number * qk_dim, (sample, dim, row, column))
        for number, dim in enumerate((call.dim, call.dim, call.dim_v))
    )
    q, k, v = places
    return q, k, v


def _of_values(tensor: int, call: RoutedCall, strides: Sequence[int]) -> Place:
    """Heads side by side (B, Y, X, h d), by (B, h, Y, X)."""
    return Place(tensor, 0, (strides[0], call.dim_v, strides[1], strides[2]))


@settled
def _map_forward_launch(call: RoutedCall, qk_dim: int, strides: Sequence[int], of_out: Sequence[int]) -> Launch:
    return forward_launch(call, *_of_projection(0, call, qk_dim, strides), _of_values(6, call, of_out))


@settled
def _map_backward_launches(call: RoutedCall, wants_weights: bool, qk_dim: int, strides: tuple[Sequence[int], ...]) -> Backward:
    """`strides`: of projection, outputs, their gradient, and the projection's."""
    of_qkv, of_out, of_grad, of_dqkv = strides
    places = *_of_projection(0, call, qk_dim, of_qkv), _of_values(6, call, of_out), _of_values(8, call, of_grad)
    return backward_launches(call, wants_weights, False, *places, *_of_projection(10, call, qk_dim, of_dqkv))


@_map_forward.register_fake
def _(
    qkv: Tensor, routes: Tensor, weights: Any, qk_dim: int, heads: int, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    regions = _tiled(qkv, height, width)
    lse = qkv.new_empty((qkv.shape[0], heads, regions.number, regions.tokens), dtype=torch.float32)
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] - 2 * qk_dim)), lse


@operator("routed_map_backward")
def _map_backward(
    qkv: Tensor, routes: Tensor, weights: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    qk_dim: int, heads: int, height: int, width: int, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv, routes, grad, regions = last_contiguous(qkv), routes.contiguous(), last_contiguous(grad), _tiled(qkv, height, width)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not grad.numel():
        return dqkv.zero_(), qkv.new_zeros(routes.shape if wants_weights else (1,), dtype=torch.float32)
    call = _call(qkv, routes, weights, qk_dim, heads, regions, scale)
    strides = qkv.stride(), out.stride(), grad.stride(), dqkv.stride()
    backward = _map_backward_launches(call, wants_weights, qk_dim, strides)
    some = routes if weights is None else weights
    tensors = qkv, qkv, qkv, routes, some, routes, out, lse, grad, lse, dqkv, dqkv, dqkv
    return dqkv, run_backward(backward, tensors, wants_weights)


@_map_backward.register_fake
def _(
    qkv: Tensor, routes: Tensor, weights: Any, out: Tensor, lse: Tensor, grad: Tensor,
    qk_dim: int, heads: int, height: int, width: int, scale: float, wants_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), qkv.new_empty(routes.shape if wants_weights else (1,), dtype=torch.float32)


def _setup_map(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward_map(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    wants_weights = ctx.needs_input_grad[2]
    dqkv, dweights = _map_backward(*ctx.saved_tensors, grad, *ctx.settings, wants_weights)
    return dqkv, None, dweights if wants_weights else None, *(None,) * 5


_map_forward.register_autograd(_backward_map, setup_context=_setup_map)


def routed_map_attention_triton(
    qkv: Tensor, routes: Tensor, *, route_weights: Tensor | None, qk_dim: int, heads: int, size: tuple[int, int], scale: float
) -> Tensor:
    """(B, Y, X, C), of tensors as `ops.routed_map_attention` has checked them; `size`: of a region."""
    weights = None if route_weights is None else route_weights.float().contiguous()
    return _map_forward(qkv, routes, weights, qk_dim, heads, *size, scale)[0]


def best_regions_triton(qk: Tensor, *, size: tuple[int, int], scale: float, topk: int) -> tuple[Tensor, Tensor]:
    """Numbers (B, R, K) of the best regions and their logits, of queries and keys (B, Y, X, 2 C); no gradient."""
    return _best_regions(qk.detach(), *size, scale, topk)


# for `ops.routed_layer`, which writes out what comes between them
map_operator, map_backward_operator = _map_forward, _map_backward
