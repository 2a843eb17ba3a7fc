"""Heads of unit length, and cosine queries made from them, as one Triton kernel each way.

In plain PyTorch a dozen operations read and write all queries in float32, and their gradients as many. Here a program has all heads
of some tokens; backward it has several such tiles, whose gradients of the embedding and the temperature it adds up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, last_contiguous, power_of_2, stride_unit
from attention_zoo.ops.triton._launch import Launch, Place, settled
from attention_zoo.ops.triton.column_sums import column_sums

__all__ = ["cosine_queries_triton", "unit_heads_triton"]

_PROGRAMS = 512  # that share out the tokens, where gradients are added up


@triton.jit
def _starts(t, N, sb, sn):
    """Where tokens begin: sb lies between two samples of N tokens, sn between two tokens."""
    return ((t // N).to(tl.int64) * sb + (t % N).to(tl.int64) * sn)[:, None, None]


@triton.jit
def _room(t, h, c, H: tl.constexpr, D: tl.constexpr):
    """Places in (tokens, H, D), side by side."""
    return (t.to(tl.int64) * (H * D))[:, None, None] + (h * D)[None, :, None] + c[None, None, :]


@triton.jit
def _read(X, t, h, c, there, sxb, sxn, N, D: tl.constexpr, UNIT: tl.constexpr):
    """Heads of tokens in float32, one over their lengths, and whether a length is not too short to have a gradient."""
    at = _starts(t, N, sxb, sxn) * UNIT + (h * D)[None, :, None] + c[None, None, :]
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    length = tl.sqrt_rn(tl.sum(x * x, 2))
    return x, 1.0 / tl.maximum(length, 1e-12), length >= 1e-12


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _temperatures(Temperature, h, H):
    return tl.load(Temperature + h, mask=h < H, other=0.0).to(tl.float32)


@triton.jit
def _scales(Scales, t, scale, N, TOKENS, HAS_SCALES: tl.constexpr):
    if HAS_SCALES:
        return scale * tl.load(Scales + t % N, mask=t < TOKENS, other=0.0).to(tl.float32)
    return tl.where(t < TOKENS, scale, 0.0)


@triton.jit
def _forward_kernel(
    X, Embedding, Temperature, Scales, Units, Queries, sxb, sxn, N, TOKENS, scale,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, QUERIES: tl.constexpr, HAS_SCALES: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Strides are counted in UNITs, which the kernel knows to divide them: loads are as wide then as where they are known."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    h, c = tl.arange(0, BH), tl.arange(0, BD)
    wide = (h < H)[:, None] & (c < D)[None, :]
    there = (t < TOKENS)[:, None, None] & wide[None, :, :]
    x, inverse, _ = _read(X, t, h, c, there, sxb, sxn, N, D, UNIT)
    unit = x * inverse[:, :, None]
    to = _room(t, h, c, H, D)
    tl.store(Units + to, unit.to(Units.dtype.element_ty), mask=there)
    if QUERIES:
        embedding = tl.load(Embedding + (h * D)[:, None] + c[None, :], mask=wide, other=0.0).to(tl.float32)
        factor = _softplus(_temperatures(Temperature, h, H))[None, :] * _scales(Scales, t, scale, N, TOKENS, HAS_SCALES)[:, None]
        queries = (unit + embedding[None, :, :]) * factor[:, :, None]
        tl.store(Queries + to, queries.to(Queries.dtype.element_ty), mask=there)


@triton.jit
def _backward_kernel(
    X, Embedding, Temperature, Scales, DUnits, DQueries, DX, DTables,
    sxb, sxn, sub, suh, sun, sqb, sqh, sqn, N, TOKENS, SHARE, scale,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    HAS_DUNITS: tl.constexpr, HAS_DQUERIES: tl.constexpr, HAS_SCALES: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h, c = tl.arange(0, BH), tl.arange(0, BD)
    wide = (h < H)[:, None] & (c < D)[None, :]
    if HAS_DQUERIES:
        embedding = tl.load(Embedding + (h * D)[:, None] + c[None, :], mask=wide, other=0.0).to(tl.float32)
        temperature = _temperatures(Temperature, h, H)
        of_embedding = tl.zeros([BH, BD], tl.float32)
        of_softplus = tl.zeros([BH], tl.float32)
    for step in range(SHARE):
        t = (pid * SHARE + step) * BT + tl.arange(0, BT)
        there = (t < TOKENS)[:, None, None] & wide[None, :, :]
        x, inverse, is_long = _read(X, t, h, c, there, sxb, sxn, N, D, UNIT)
        unit = x * inverse[:, :, None]
        slope = tl.zeros([BT, BH, BD], tl.float32)
        if HAS_DUNITS:
            at = (_starts(t, N, sub, sun) + (h * suh)[None, :, None]) * UNIT + c[None, None, :]
            slope += tl.load(DUnits + at, mask=there, other=0.0).to(tl.float32)
        if HAS_DQUERIES:
            at = (_starts(t, N, sqb, sqn) + (h * sqh)[None, :, None]) * UNIT + c[None, None, :]
            grad = tl.load(DQueries + at, mask=there, other=0.0).to(tl.float32)
            grad *= _scales(Scales, t, scale, N, TOKENS, HAS_SCALES)[:, None, None]
            of_softplus += tl.sum(tl.sum(grad * (unit + embedding[None, :, :]), 2), 0)
            grad *= _softplus(temperature)[None, :, None]
            of_embedding += tl.sum(grad, 0)
            slope += grad
        along = tl.where(is_long, tl.sum(unit * slope, 2), 0.0)
        dx = (slope - unit * along[:, :, None]) * inverse[:, :, None]
        tl.store(DX + _room(t, h, c, H, D), dx.to(DX.dtype.element_ty), mask=there)
    if HAS_DQUERIES:
        to = DTables + pid.to(tl.int64) * (H * D + H)  # of the embedding, then of the temperature
        tl.store(to + (h * D)[:, None] + c[None, :], of_embedding, mask=wide)
        tl.store(to + H * D + h, of_softplus / (1.0 + tl.exp(-temperature)), mask=h < H)


def _tiles(heads: int, dim: int, size: int, steps: tuple[int, ...], bytes_each: int) -> tuple[dict[str, int], list[int]]:
    """What a kernel is compiled for, with about `size` numbers in a tile, and strides in units."""
    wide, deep, unit = power_of_2(heads), power_of_2(dim), stride_unit(steps, bytes_each)
    tiles = {"BT": max(1, size // (wide * deep)), "BH": wide, "BD": deep, "num_warps": 4 if wide * deep <= 4096 else 8}
    return {"H": heads, "D": dim, "UNIT": unit, **tiles}, [step // unit for step in steps]


@settled
def _forward_launch(
    sizes: tuple[int, int, int, int], steps: tuple[int, int], scale: float, has: tuple[bool, bool], dtype: torch.dtype, *key: Any
) -> Launch:
    """Of x, embedding, temperature, scales, units, queries."""
    batch, tokens, heads, dim = sizes
    tiles, units = _tiles(heads, dim, 4096, steps, dtype.itemsize)
    numbers = *units, tokens, batch * tokens, scale
    constants = {"QUERIES": has[0], "HAS_SCALES": has[1], **tiles}
    places = [Place(number) for number in range(6)]
    return Launch(_forward_kernel, (ceil_div(batch * tokens, tiles["BT"]),), places, numbers, constants)


@settled
def _backward_launch(
    sizes: tuple[int, int, int, int],
    steps: tuple[int, ...],
    scale: float,
    has: tuple[bool, bool, bool],
    dtype: torch.dtype,
    *key: Any,
) -> tuple[Launch, int]:
    """Of x, embedding, temperature, scales, gradients of units and queries, dx, shares of the tables' gradients; their number."""
    batch, tokens, heads, dim = sizes
    tiles, units = _tiles(heads, dim, 2048, steps, dtype.itemsize)
    number = ceil_div(batch * tokens, tiles["BT"])
    share = ceil_div(number, _PROGRAMS) if has[1] else 1
    shares = ceil_div(number, share)
    numbers = *units, tokens, batch * tokens, share, scale
    constants = {"HAS_DUNITS": has[0], "HAS_DQUERIES": has[1], "HAS_SCALES": has[2], **tiles}
    return Launch(_backward_kernel, (shares,), [Place(place) for place in range(8)], numbers, constants), shares


def _rooms(x: Tensor, heads: int, has_queries: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    sizes = (batch, tokens, heads, channels // heads)
    return x.new_empty(sizes).transpose(1, 2), x.new_empty(sizes if has_queries else (0, 0, 0, 0)).transpose(1, 2)


@operator("cosine_heads")
def _forward(
    x: Tensor, embedding: Tensor | None, temperature: Tensor | None, scales: Tensor | None, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Units (B, h, N, d), and queries, which are empty without an embedding."""
    units, queries = _rooms(x, heads, embedding is not None)
    if x.numel():
        x = last_contiguous(x)
        given = [x if t is None else t.contiguous() for t in (embedding, temperature, scales)]
        sizes = (*x.shape[:2], heads, x.shape[2] // heads)
        launch = _forward_launch(
            sizes, x.stride()[:2], scale, (embedding is not None, scales is not None), *(t.dtype for t in (x, *given)), x.device
        )
        launch(x, *given, units, queries if embedding is not None else units)
    return units, queries


@_forward.register_fake
def _(x: Tensor, embedding: Tensor | None, temperature: Any, scales: Any, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return _rooms(x, heads, embedding is not None)


@operator("cosine_heads_backward")
def _backward(
    dunits: Tensor | None, dqueries: Tensor | None, x: Tensor, embedding: Tensor | None, temperature: Tensor | None,
    scales: Tensor | None, heads: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of embedding and temperature in one vector, float32, which is empty without gradients of queries."""
    dx, tables = _gradient_rooms(x, heads, dqueries is not None)
    if not x.numel():
        return dx, tables.zero_()
    x = last_contiguous(x)
    slopes = [None if t is None else last_contiguous(t) for t in (dunits, dqueries)]
    given = [x if t is None else t.contiguous() for t in (embedding, temperature, scales)]
    steps = [step for t in slopes for step in ((0, 0, 0) if t is None else t.stride()[:3])]
    sizes = (*x.shape[:2], heads, x.shape[2] // heads)
    launch, shares = _backward_launch(
        sizes, (*x.stride()[:2], *steps), scale, (dunits is not None, dqueries is not None, scales is not None),
        *(t.dtype for t in (x, *given, *(s for s in slopes if s is not None))), x.device,
    )  # fmt: skip
    parts = x.new_empty((shares, len(tables)), dtype=torch.float32)
    launch(x, *given, *(x if s is None else s for s in slopes), dx, parts)
    return dx, tables if dqueries is None else column_sums.unseen()(parts)


def _gradient_rooms(x: Tensor, heads: int, has_queries: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[2] + heads if has_queries else 0, dtype=torch.float32)


@_backward.register_fake
def _(dunits: Any, dqueries: Tensor | None, x: Tensor, embedding: Any, temperature: Any, scales: Any, heads: int, *_: Any) -> Any:
    return _gradient_rooms(x, heads, dqueries is not None)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)
    if inputs[1] is None:
        ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dunits: Tensor | None, dqueries: Tensor | None) -> tuple[Any, ...]:
    x, embedding, temperature, scales = ctx.saved_tensors
    if embedding is None:
        dqueries = None
    if dunits is None and dqueries is None:
        return (None,) * 6
    dx, tables = _backward(dunits, dqueries, x, embedding, temperature, scales, *ctx.settings)
    if dqueries is None:
        return dx, *(None,) * 5
    of_both = tables.split_with_sizes((embedding.numel(), temperature.numel()))
    found = (some.view_as(t).to(t.dtype) for some, t in zip(of_both, (embedding, temperature), strict=True))
    return dx, *found, *(None,) * 3


_forward.register_autograd(_gradients, setup_context=_setup)


def unit_heads_triton(x: Tensor, num_heads: int) -> Tensor:
    """As `ops.unit_heads`, which has checked the tensor."""
    return _forward(x, None, None, None, num_heads, 1.0)[0]


def cosine_queries_triton(x: Tensor, embedding: Tensor, temperature: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """As `ops.cosine_queries`, which has checked the tensors: queries and units."""
    scales, factor = (scale.detach(), 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    units, queries = _forward(x, embedding, temperature, scales, embedding.shape[0], factor)
    return queries, units
