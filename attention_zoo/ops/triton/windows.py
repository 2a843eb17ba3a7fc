"""Attention inside the windows of a map as Triton kernels: windows are read where they stand, nothing is copied or formed.

A program has a tile of whole windows, as many as fit into it, and computes all their logits in one product of which it keeps the
diagonal blocks. A query's keys all stand in its tile, so that the backward needs nothing but q, k and v: the softmax is computed
again, and no two programs write to one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import LOG2E, ceil_div, heads_last, last_contiguous, per_logit, precision, tile
from attention_zoo.ops.triton._launch import Launch, Place, settled

__all__ = ["Windows", "backward_launch", "forward_launch", "window_attention_triton"]

_PROGRAMS = 1024  # that sum up gradients of a bias, each over its windows


@triton.jit
def _place(
    tile_number, group, WINDOWS, GROUPS, HEIGHT, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Of the rows of a tile: window in the tile, cell in the window, whether there is such a window, sample, y, x."""
    row = tl.arange(0, BM)
    local, cell = row // (ROWS * COLUMNS), row % (ROWS * COLUMNS)
    number = (tile_number * (BM // (ROWS * COLUMNS)) + local) * GROUPS + group
    exists = (local < BM // (ROWS * COLUMNS)) & (number < WINDOWS)
    across = tl.cdiv(WIDTH, COLUMNS)
    of_map = across * tl.cdiv(HEIGHT, ROWS)
    b, place = number // of_map, number % of_map
    y, x = place // across * ROWS + cell // COLUMNS, place % across * COLUMNS + cell % COLUMNS
    return local, cell, exists, b.to(tl.int64), y, x


@triton.jit
def _softmax(
    q, k, bias, scale, local, cell, exists, inside,
    CELLS: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights relative to each row's maximum, and their sums. Rows without a window see one another: they have no use."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    together = local[:, None] == local[None, :]
    if HAS_BIAS:
        z += 1.4426950408889634 * tl.load(
            bias + cell[:, None] * CELLS + cell[None, :], mask=together & exists[:, None], other=0.0
        ).to(tl.float32)  # fmt: skip
    if MASKED:
        together = together & (inside | ~exists)[None, :]
    z = tl.where(together, z, float("-inf"))
    p = tl.exp2(z - tl.max(z, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    Q, K, V, Bias, Out,
    scale,  # times log2 e
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sob, soh, soy, sox,
    HEADS, WINDOWS, GROUPS, HEIGHT, WIDTH, D, DV,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = ROWS * COLUMNS
    number, h = tl.program_id(0), tl.program_id(1)
    group = number % GROUPS
    local, cell, exists, b, y, x = _place(number // GROUPS, group, WINDOWS, GROUPS, HEIGHT, WIDTH, ROWS, COLUMNS, BM)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    inside = exists & (y < HEIGHT) & (x < WIDTH)
    wanted, wanted_v = inside[:, None] & (d < D)[None, :], inside[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + h * sqh + (b * sqb + y * sqy + x * sqx)[:, None] + d[None, :], mask=wanted, other=0.0)
    k = tl.load(K + h * skh + (b * skb + y * sky + x * skx)[:, None] + d[None, :], mask=wanted, other=0.0)
    v = tl.load(V + h * svh + (b * svb + y * svy + x * svx)[:, None] + dv[None, :], mask=wanted_v, other=0.0)
    bias = Bias + (group * HEADS + h) * (CELLS * CELLS)
    p, total = _softmax(q, k, bias, scale, local, cell, exists, inside, CELLS, HAS_BIAS, MASKED, PRECISION)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
    at = Out + h * soh + (b * sob + y * soy + x * sox)[:, None] + dv[None, :]
    tl.store(at, out.to(Out.dtype.element_ty), mask=wanted_v)


@triton.jit
def _backward_kernel(
    Q, K, V, Bias, DOut, DQ, DK, DV_, DBias,
    scale,
    sqb, sqh, sqy, sqx, skb, skh, sky, skx, svb, svh, svy, svx, sgb, sgh, sgy, sgx,
    sdqb, sdqh, sdqy, sdqx, sdkb, sdkh, sdky, sdkx, sdvb, sdvh, sdvy, sdvx,
    HEADS, WINDOWS, GROUPS, HEIGHT, WIDTH, D, DV, SHARE,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of `SHARE` tiles one after another, whose gradients of the bias are added up."""
    CELLS: tl.constexpr = ROWS * COLUMNS
    number, h = tl.program_id(0), tl.program_id(1)
    group, share = number % GROUPS, number // GROUPS
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    bias = Bias + (group * HEADS + h) * (CELLS * CELLS)
    if HAS_DBIAS:
        of_bias = tl.zeros([BM, BM], tl.float32)
    for step in range(SHARE):
        local, cell, exists, b, y, x = _place(share * SHARE + step, group, WINDOWS, GROUPS, HEIGHT, WIDTH, ROWS, COLUMNS, BM)
        inside = exists & (y < HEIGHT) & (x < WIDTH)
        wanted, wanted_v = inside[:, None] & (d < D)[None, :], inside[:, None] & (dv < DV)[None, :]
        q = tl.load(Q + h * sqh + (b * sqb + y * sqy + x * sqx)[:, None] + d[None, :], mask=wanted, other=0.0)
        k = tl.load(K + h * skh + (b * skb + y * sky + x * skx)[:, None] + d[None, :], mask=wanted, other=0.0)
        v = tl.load(V + h * svh + (b * svb + y * svy + x * svx)[:, None] + dv[None, :], mask=wanted_v, other=0.0)
        grad = tl.load(DOut + h * sgh + (b * sgb + y * sgy + x * sgx)[:, None] + dv[None, :], mask=wanted_v, other=0.0)
        p, total = _softmax(q, k, bias, scale, local, cell, exists, inside, CELLS, HAS_BIAS, MASKED, PRECISION)
        p /= total[:, None]
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if HAS_DBIAS:
            of_bias += ds
        rounded = ds.to(q.dtype)
        dq = tl.dot(rounded, k, input_precision=PRECISION) * per_logit(scale)
        dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION) * per_logit(scale)
        dv_sum = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        at = DQ + h * sdqh + (b * sdqb + y * sdqy + x * sdqx)[:, None] + d[None, :]
        tl.store(at, dq.to(DQ.dtype.element_ty), mask=wanted)
        at = DK + h * sdkh + (b * sdkb + y * sdky + x * sdkx)[:, None] + d[None, :]
        tl.store(at, dk.to(DK.dtype.element_ty), mask=wanted)
        at = DV_ + h * sdvh + (b * sdvb + y * sdvy + x * sdvx)[:, None] + dv[None, :]
        tl.store(at, dv_sum.to(DV_.dtype.element_ty), mask=wanted_v)
    if HAS_DBIAS:  # the diagonal blocks: (share, group, head, window of the tile, cells, cells)
        row = tl.arange(0, BM)
        local, cell = row // CELLS, row % CELLS
        at = DBias + (number * HEADS + h).to(tl.int64) * (BM // CELLS * CELLS * CELLS)
        listed = (local[:, None] == local[None, :]) & (local < BM // CELLS)[:, None]
        tl.store(at + row[:, None] * CELLS + cell[None, :], of_bias, mask=listed)


def _tiling(cells: int, row_bytes: int) -> dict[str, int]:
    """Rows of a tile, which holds several small windows where their rows are short enough, and warps."""
    rows = tile(cells, 128)
    while rows < 64 and 2 * rows * row_bytes <= 8192:
        rows *= 2
    return {"BM": rows, "num_warps": 4 if rows < 128 and rows * row_bytes <= 16384 else 8}  # 128 x 128 logits are many registers


class Windows(NamedTuple):
    """What the launches of a call depend on besides where its tensors are.

    Attributes:
        batch, heads, height, width: of the map.
        channels, value_channels: of a head.
        groups: how many biases there are; 0: none.
        window: rows and columns of a window.
        scale, masked: of the call.
        bytes: of a number.
        precision: of products.
    """

    batch: int
    heads: int
    height: int
    width: int
    channels: int
    value_channels: int
    groups: int
    window: tuple[int, int]
    scale: float
    masked: bool
    bytes: int
    precision: str

    @property
    def cells(self) -> int:
        return self.window[0] * self.window[1]

    def arguments(self) -> tuple[tuple[int, ...], dict[str, Any], int]:
        """What both kernels take: sizes, settings; and the number of tiles of each group of windows."""
        windows = self.batch * ceil_div(self.height, self.window[0]) * ceil_div(self.width, self.window[1])
        groups = max(self.groups, 1)
        channels = {"BD": tile(self.channels, 256), "BDV": tile(self.value_channels, 256)}
        constants: dict[str, Any] = _tiling(self.cells, max(channels.values()) * self.bytes) | channels
        tiles = ceil_div(windows // groups, constants["BM"] // self.cells)
        constants |= {"ROWS": self.window[0], "COLUMNS": self.window[1]}
        constants |= {"HAS_BIAS": self.groups > 0, "MASKED": self.masked, "PRECISION": self.precision}
        sizes = self.heads, windows, groups, self.height, self.width, self.channels, self.value_channels
        return sizes, constants, tiles


def forward_launch(call: Windows, q: Place, k: Place, v: Place, bias: Place, out: Place) -> Launch:
    """Attention into `out`; strides are those of (B, heads, H, W), channels side by side. Without a bias its place is any."""
    sizes, constants, tiles = call.arguments()
    numbers = call.scale * LOG2E, *q.strides, *k.strides, *v.strides, *out.strides, *sizes
    return Launch(_forward_kernel, (tiles * sizes[2], sizes[0]), (q, k, v, bias, out), numbers, constants)


def backward_launch(
    call: Windows, q: Place, k: Place, v: Place, bias: Place, grad: Place,
    dq: Place, dk: Place, dv: Place, dbias: Place | None = None,
) -> tuple[Launch, tuple[int, ...]]:  # fmt: skip
    """Gradients into `dq`, `dk` and `dv`, strides as in `forward_launch`.

    Returns: the launch, and of what shape `dbias` has to be, float32, whose sum over its dimensions 0 and 3 is the bias's.
    """
    sizes, constants, tiles = call.arguments()
    heads, groups, cells = sizes[0], sizes[2], call.cells
    shares = tiles if dbias is None else min(tiles, max(1, _PROGRAMS // (heads * groups)))
    strides = (s for place in (q, k, v, grad, dq, dk, dv) for s in place.strides)
    launch = Launch(
        _backward_kernel,
        (shares * groups, heads),
        (q, k, v, bias, grad, dq, dk, dv, q if dbias is None else dbias),
        (call.scale * LOG2E, *strides, *sizes, ceil_div(tiles, shares)),
        constants | {"HAS_DBIAS": dbias is not None},
    )
    return launch, (shares, groups, heads, constants["BM"] // cells, cells, cells)


# Of tensors that stand alone, by their strides; `key` is their dtype, the bias's, and the device.


@settled
def _forward_of(call: Windows, strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None) -> Launch:
    q, k, v, out = (Place(number, 0, of[:4]) for number, of in enumerate(strides))
    return forward_launch(call, q, k, v, Place(4), out)


@settled
def _backward_of(
    call: Windows, strides: tuple[tuple[int, ...], ...], *key: torch.dtype | torch.device | None
) -> tuple[Launch, tuple[int, ...]]:
    q, k, v, grad, dq, dk, dv = (Place(number, 0, of[:4]) for number, of in enumerate(strides))
    return backward_launch(call, q, k, v, Place(7), grad, dq, dk, dv, Place(8) if call.groups else None)


def _call(q: Tensor, v: Tensor, bias: Tensor | None, rows: int, columns: int, scale: float, masked: bool) -> Windows:
    (batch, heads, height, width, channels), groups = q.shape, 0 if bias is None else bias.shape[0]
    sizes = batch, heads, height, width, channels, v.shape[4]
    return Windows(*sizes, groups, (rows, columns), scale, masked, q.element_size(), precision(q))


@operator("window_forward")
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: int, columns: int, scale: float, masked: bool
) -> Tensor:
    out = heads_last(q, v.shape[-1])
    if out.numel():
        tensors = last_contiguous(q), last_contiguous(k), last_contiguous(v), out
        strides, call = tuple(t.stride() for t in tensors), _call(q, v, bias, rows, columns, scale, masked)
        launch = _forward_of(call, strides, q.dtype, None if bias is None else bias.dtype, q.device)
        launch(*tensors, q if bias is None else bias)
    return out


@_window_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Any, *_: Any) -> Tensor:
    return heads_last(q, v.shape[-1])


@operator("window_backward")
def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grad: Tensor, rows: int, columns: int, scale: float, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    # without a bias nobody reads it: not worth a kernel that fills it
    dbias = q.new_empty((), dtype=torch.float32) if bias is None else q.new_zeros(bias.shape, dtype=torch.float32)
    if grad.numel():
        tensors = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(grad), dq, dk, dv
        strides, call = tuple(t.stride() for t in tensors), _call(q, v, bias, rows, columns, scale, masked)
        launch, shape = _backward_of(call, strides, q.dtype, None if bias is None else bias.dtype, q.device)
        if bias is None:
            launch(*tensors, q)
        else:
            sums = q.new_empty(shape, dtype=torch.float32)
            launch(*tensors, bias, sums)
            dbias = sums.sum((0, 3))
    return dq, dk, dv, dbias


@_window_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(() if bias is None else bias.shape, dtype=torch.float32)
    return heads_last(q), heads_last(k), heads_last(v), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, bias = ctx.saved_tensors
    dq, dk, dv, dbias = _window_backward(q, k, v, bias, grad, *ctx.settings)
    return dq, dk, dv, None if bias is None else dbias.to(bias.dtype), None, None, None, None


_window_forward.register_autograd(_backward, setup_context=_setup)


def window_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, window_size: int, scale: float, mask_padding: bool
) -> Tensor:
    """Outputs (B, heads, H, W, D_v) of tensors as `ops.window_attention` has checked them; bias (n, heads, s^2, s^2) or None."""
    by_group, sides = None if bias is None else bias.contiguous(), (window_size, window_size)
    result: Tensor = _window_forward(q, k, v, by_group, *sides, scale, mask_padding)
    return result
