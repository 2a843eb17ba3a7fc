"""What only moves rows of a mixture of heads, as Triton kernels: which (token, head) pair is which row, packed rows back to their
places times their gates, their gradients, and gates alone where every head is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, heads_last, last_contiguous, tile
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled

__all__ = [
    "count_kernel",
    "empty_slopes",
    "gate_heads_triton",
    "gate_rows",
    "gate_rows_backward",
    "join_heads",
    "list_kernel",
    "mixing",
    "spread_kernel",
    "tokens_to_a_tile",
    "unmixing",
]


@triton.jit
def _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS):
    """Of the pairs `at` = n GROUP + query head of a sequence: n, the head, 1 if the token has chosen it, else 0."""
    n, h = at // GROUP, hk * GROUP + at % GROUP
    inside = at < N * GROUP
    chosen = tl.load(Chosen + b * scb + n.to(tl.int64) * scn + (h - ALWAYS) * sch, mask=inside & (h >= ALWAYS), other=1) != 0
    return n, h, (chosen & inside).to(tl.int32)


@triton.jit
def count_kernel(Chosen, Counts, scb, scn, sch, N, HEADS, GROUP, ALWAYS, BLOCK: tl.constexpr):
    """How many rows each sequence has: (b, key/value head) -> Counts."""
    s = tl.program_id(0)
    b, hk = (s // HEADS).to(tl.int64), s % HEADS
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N * GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, _, chosen = _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS)
        total += chosen
    tl.store(Counts + s, tl.sum(total, 0))


@triton.jit
def _list_tiles(Tiles, counts, each, s, begin, count, last, MOST, BM: tl.constexpr, REVERSED: tl.constexpr):
    """Tiles of BM rows, sequence after sequence: number of the sequence * 2 ** 32 + first row; -1 for those that are not needed."""
    before = tl.sum(tl.where(each < s, (counts + BM - 1) // BM, 0), 0)
    tiles = (count + BM - 1) // BM
    for start in range(0, tiles, 64):
        i = start + tl.arange(0, 64)
        place = i
        if REVERSED:
            place = tiles - 1 - i  # the longest first
        entry = (s.to(tl.int64) << 32) + (begin + place * BM)
        tl.store(Tiles + before + i, entry, mask=(i < tiles) & (before + i < MOST))
    if last:
        for start in range(before + tiles, MOST, 64):
            i = start + tl.arange(0, 64)
            tl.store(Tiles + i, tl.full([64], -1, tl.int64), mask=i < MOST)


@triton.jit
def list_kernel(
    Chosen, Counts, Starts, Slots, Origins, Tiles,
    scb, scn, sch, N, HEADS, GROUP, ALWAYS, SEQUENCES, ROWS, MOST, MOST_Q,
    BLOCK: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BMQ: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Where the rows of a sequence come from and go to.

    Starts: its first row. Origins: of a row, (b N + n) h + head. Slots, of each (b, key/value head, n, query head): its row, or,
    for pairs that are not chosen, -1 - the next row of the sequence. Tiles: see `_list_tiles`, of two sizes, one after the other.
    """
    s = tl.program_id(0)
    b, hk = (s // HEADS).to(tl.int64), s % HEADS
    each = tl.arange(0, BS)
    Tiles = Tiles.to(tl.pointer_type(tl.int64), bitcast=True)
    counts = tl.load(Counts + each, mask=each < SEQUENCES, other=0)
    begin = tl.minimum(tl.sum(tl.where(each < s, counts, 0), 0), ROWS)
    count = tl.minimum(tl.sum(tl.where(each == s, counts, 0), 0), ROWS - begin)
    tl.store(Starts + s, begin)
    last = s == SEQUENCES - 1
    _list_tiles(Tiles, counts, each, s, begin, count, last, MOST, BM, CAUSAL)
    _list_tiles(Tiles + MOST, counts, each, s, begin, count, last, MOST_Q, BMQ, CAUSAL)
    before = begin
    for start in range(0, N * GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n, h, chosen = _load_choice(Chosen, at, b, hk, scb, scn, sch, N, GROUP, ALWAYS)
        row = before + tl.cumsum(chosen, 0) - chosen
        is_row = (chosen != 0) & (row < ROWS)  # more than K to a token: the caller's fault, but nobody else's memory
        tl.store(Slots + s.to(tl.int64) * N * GROUP + at, tl.where(is_row, row, -1 - tl.minimum(row, ROWS)), mask=at < N * GROUP)
        tl.store(Origins + row, (b * N + n) * (HEADS * GROUP) + h, mask=is_row)
        before += tl.sum(chosen, 0)
    if last:
        end = begin + count
        tl.store(Starts + SEQUENCES, end)
        for start in range(end, ROWS, BLOCK):  # fewer than K to a token: rows that are not there read something of ours
            row = start + tl.arange(0, BLOCK)
            tl.store(Origins + row, tl.zeros([BLOCK], tl.int32), mask=row < ROWS)


@triton.jit
def _slots(Slots, b, h, n, real, N, APART, HEADS, GROUP):
    """Rows of the tokens n in head h, and whether they were chosen."""
    r = tl.maximum(h - APART, 0)
    at = ((b * HEADS + r // GROUP) * N + n) * GROUP + r % GROUP
    slot = tl.load(Slots + at, mask=real & (h >= APART), other=-1)
    return tl.maximum(slot, 0).to(tl.int64), slot >= 0


@triton.jit
def _gather(Shared, Packed, Slots, b, h, n, d, wanted, ssb, ssh, ssn, N, APART, HEADS, GROUP, D, PITCH):
    """What was computed for the tokens n that are wanted in head h, shared or packed; 0 where it was not chosen."""
    row, chosen = _slots(Slots, b, h, n, wanted, N, APART, HEADS, GROUP)
    inside = (d < D)[None, :]
    x = tl.load(Packed + row[:, None] * PITCH + d[None, :], mask=chosen[:, None] & inside, other=0.0)
    if h < APART:
        at = Shared + b * ssb + h * ssh + n.to(tl.int64)[:, None] * ssn + d[None, :]
        x = tl.load(at, mask=wanted[:, None] & inside, other=0.0)
    return x


@triton.jit
def _mix_kernel(
    Out, Shared, Packed, Gates, Slots,
    ssb, ssh, ssn, sgb, sgh, sgn, N, H, APART, HEADS, GROUP, DV, PITCH, TILES, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Out (B, N, H, D_v): gate times what was computed for a pair, 0 for the others. Where the gate is 0 nothing is read."""
    pid = tl.program_id(0)
    h, t = pid % H, pid // H  # heads of a token are neighbours in memory
    b, n, d = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BD)
    real = n < N
    gate = tl.load(Gates + b * sgb + h * sgh + n * sgn, mask=real, other=0.0).to(tl.float32)
    x = _gather(Shared, Packed, Slots, b, h, n, d, real & (gate != 0.0), ssb, ssh, ssn, N, APART, HEADS, GROUP, DV, PITCH)
    at = Out + ((b * N + n) * H + h)[:, None] * DV + d[None, :]
    tl.store(at, (x.to(tl.float32) * gate[:, None]).to(Out.dtype.element_ty), mask=real[:, None] & (d < DV)[None, :])


@triton.jit
def _unmix_kernel(
    Grad, Q, Shared, Packed, Gates, Slots, DShared, DPacked, PackedQ, DGates, Delta,
    srb, srh, srn, sqb, sqh, sqn, ssb, ssh, ssn, sdb, sdh, sdn, sgb, sgh, sgn,
    N, H, APART, HEADS, GROUP, D, DV, PITCH_Q, PITCH, TILES,
    SLOPES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Gradients of what `_mix_kernel` was given: DShared, DPacked and, with SLOPES, DGates (B, N, H).

    For the flash kernels: Delta, DPacked . Packed, and the packed rows of the queries.
    """
    pid = tl.program_id(0)
    h, t = pid % H, pid // H
    b, n, dv = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BDV)
    real, token = n < N, n.to(tl.int64)[:, None]
    inside = (dv < DV)[None, :]
    row, chosen = _slots(Slots, b, h, n, real, N, APART, HEADS, GROUP)
    gate = tl.load(Gates + b * sgb + h * sgh + n * sgn, mask=real, other=0.0).to(tl.float32)
    active = real & (chosen | (h < APART))
    wanted = active
    if not SLOPES:
        wanted = active & (gate != 0.0)  # nothing else becomes of the others
    grad = tl.load(Grad + b * srb + h * srh + token * srn + dv[None, :], mask=wanted[:, None] & inside, other=0.0).to(tl.float32)
    to = DGates + (b * N + n) * H + h
    if h < APART:
        if SLOPES:
            x = tl.load(Shared + b * ssb + h * ssh + token * ssn + dv[None, :], mask=active[:, None] & inside, other=0.0)
            tl.store(to, tl.sum(grad * x.to(tl.float32), 1), mask=real)
        at = DShared + b * sdb + h * sdh + token * sdn + dv[None, :]
        tl.store(at, (grad * gate[:, None]).to(DShared.dtype.element_ty), mask=active[:, None] & inside)
    else:
        d = tl.arange(0, BD)
        here = active[:, None] & (d < D)[None, :]
        q = tl.load(Q + b * sqb + h * sqh + token * sqn + d[None, :], mask=here, other=0.0)
        tl.store(PackedQ + row[:, None] * PITCH_Q + d[None, :], q, mask=here)
        here = active[:, None] & inside
        x = tl.load(Packed + row[:, None] * PITCH + dv[None, :], mask=here, other=0.0)
        slope = tl.sum(grad * x.to(tl.float32), 1)
        if SLOPES:
            tl.store(to, slope, mask=real)
        tl.store(DPacked + row[:, None] * PITCH + dv[None, :], (grad * gate[:, None]).to(DPacked.dtype.element_ty), mask=here)
        tl.store(Delta + row, slope * gate, mask=active)


@triton.jit
def _copy(From, To, at, to, d, D, mask):
    mask = mask & (d < D)[None, :]
    tl.store(To + to + d[None, :], tl.load(From + at + d[None, :], mask=mask), mask=mask)


@triton.jit
def spread_kernel(
    DQ, DK, DV_, SharedQ, SharedK, SharedV, Packed, Slots,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, fqb, fqh, fqn, fkb, fkh, fkn, fvb, fvh, fvn,
    N, M, H, SOME, APART, HEADS, GROUP, D, DV, PITCH, TILES, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """DQ: what was computed for a pair, shared or packed, 0 for the others. DK, DV_: the first SOME heads, from the shared ones."""
    pid = tl.program_id(0)
    columns = H + 2 * SOME
    h, t = pid % columns, pid // columns
    b, n, d = (t // TILES).to(tl.int64), t % TILES * BT + tl.arange(0, BT), tl.arange(0, BD)
    token = n.to(tl.int64)[:, None]
    if h < H:
        x = _gather(SharedQ, Packed, Slots, b, h, n, d, n < N, fqb, fqh, fqn, N, APART, HEADS, GROUP, D, PITCH)
        tl.store(DQ + b * sqb + h * sqh + token * sqn + d[None, :], x, mask=(n < N)[:, None] & (d < D)[None, :])
    else:
        mask = (n < M)[:, None]
        if h < H + SOME:
            _copy(SharedK + b * fkb + (h - H) * fkh, DK + b * skb + (h - H) * skh, token * fkn, token * skn, d, D, mask)
        else:
            head = h - H - SOME
            _copy(SharedV + b * fvb + head * fvh, DV_ + b * svb + head * svh, token * fvn, token * svn, d, DV, mask)


def tokens_to_a_tile(tokens: int, dim: int) -> tuple[int, int]:
    """For what only moves rows: how many tokens a program has, and how many programs a head."""
    size = 2048 // tile(dim, 256)
    return size, ceil_div(tokens, size)


def mixing(
    sizes: tuple[int, ...], parts: tuple[int, ...], out: Place, shared: Place, packed: Place, gates: Place, slots: Place
) -> tuple[Launch, ...]:
    """No launch if there is nothing."""
    batch, heads, tokens, dim_v = sizes
    bt, blocks = tokens_to_a_tile(tokens, dim_v)
    numbers = *shared.strides, *gates.strides, tokens, heads, *parts, dim_v, *packed.strides, blocks
    constants = {"BT": bt, "BD": tile(dim_v, 256), "num_warps": 4}
    places = out, shared, packed, gates, slots
    grid = (batch * blocks * heads,)
    return (Launch(_mix_kernel, grid, places, numbers, constants),) if grid[0] and dim_v else ()


def unmixing(
    sizes: tuple[int, ...], parts: tuple[int, ...], grad: Place, q: Place, shared: Place, dshared: Place, packed: Place,
    gates: Place, slots: Place, found: tuple[Place, Place, Place, Place], slopes: bool,
) -> tuple[Launch, ...]:  # fmt: skip
    """`found`: packed gradients and queries, gradients of gates, and delta. No launch if there is nothing."""
    batch, heads, tokens, dim, dim_v = sizes
    bt, blocks = tokens_to_a_tile(tokens, max(dim, dim_v))
    numbers = (
        *grad.strides, *q.strides, *shared.strides, *dshared.strides, *gates.strides,
        tokens, heads, *parts, dim, dim_v, *found[1].strides, *packed.strides, blocks,
    )  # fmt: skip
    constants = {"SLOPES": slopes, "BT": bt, "BD": tile(dim, 256), "BDV": tile(dim_v, 256), "num_warps": 4}
    places, grid = (grad, q, shared, packed, gates, slots, dshared, *found), (batch * blocks * heads,)
    return (Launch(_unmix_kernel, grid, places, numbers, constants),) if grid[0] and dim_v else ()


def empty_slopes(gates: Tensor, wanted: bool) -> Tensor:
    """For the gradient of gates (B, H, N): (B, N, H)."""
    batch, heads, tokens = gates.shape
    return gates.new_empty((batch, tokens, heads) if wanted else (0,), dtype=torch.float32)


_Strides = tuple[int, ...]


@settled
def _gate_launch(
    sizes: tuple[int, ...], of_x: _Strides, of_gates: _Strides, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> tuple[Launch, ...]:
    """Of x, gates and outputs. All heads are shared: nothing is packed, and nothing is read where that would be."""
    x, gates = Place(0, 0, of_x), Place(1, 0, of_gates)
    return mixing(sizes, (sizes[1], 0, 1), Place(2), x, Place(0, 0, (1,)), gates, Place(1))


@settled
def _gate_gradient_launch(
    sizes: tuple[int, ...], of_grad: _Strides, of_x: _Strides, of_dx: _Strides, of_gates: _Strides, slopes: bool,
    dtypes: tuple[torch.dtype, ...], device: torch.device,
) -> tuple[Launch, ...]:  # fmt: skip
    """Of gradients of outputs, x, gates and the gradients of both."""
    batch, heads, tokens, dim = sizes
    grad, x, gates, dx = Place(0, 0, of_grad), Place(1, 0, of_x), Place(2, 0, of_gates), Place(3, 0, of_dx)
    nothing, dgates = Place(1, 0, (1,)), Place(4)
    found = nothing, nothing, dgates, dgates
    return unmixing((batch, heads, tokens, dim, dim), (heads, 0, 1), grad, x, x, dx, nothing, gates, Place(2), found, slopes)


def gate_rows(x: Tensor, gates: Tensor) -> Tensor:
    """x (B, H, N, D), channels of a head side by side, times gates (B, N, H), contiguous: (B, N, H D)."""
    batch, heads, tokens, dim = sizes = tuple(x.shape)
    out = x.new_empty((batch, tokens, heads * dim))
    of_gates = tokens * heads, 1, heads
    launch_all(_gate_launch(sizes, x.stride()[:3], of_gates, (x.dtype, gates.dtype), x.device), (x, gates, out))
    return out


def gate_rows_backward(grad: Tensor, x: Tensor, gates: Tensor, wants_gates: bool) -> tuple[Tensor, Tensor]:
    """From `grad` (B, N, H D), contiguous: of x, laid out as it is, and of gates, (B, N, H), or empty."""
    batch, heads, tokens, dim = sizes = tuple(x.shape)
    dx, dgates = torch.empty_like(x), x.new_empty((batch, tokens, heads) if wants_gates else (0,), dtype=torch.float32)
    strides = (tokens * heads * dim, dim, heads * dim), x.stride()[:3], dx.stride()[:3], (tokens * heads, 1, heads)
    launches = _gate_gradient_launch(sizes, *strides, wants_gates, (grad.dtype, x.dtype, gates.dtype), x.device)
    launch_all(launches, (grad, x, gates, dx, dgates))
    return dx, dgates


@settled
def _join_launch(
    sizes: tuple[int, ...], of_q: _Strides, of_k: _Strides, of_v: _Strides, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> tuple[Launch, ...]:
    """Of queries, keys, values, something in float32, and all of them in one. All heads are shared, as in `_gate_launch`."""
    batch, heads, tokens, dim = sizes
    bt, blocks = tokens_to_a_tile(tokens, dim)
    whole = 3 * heads * dim
    to = (tokens * whole, dim, whole) * 3
    numbers = *to, *of_q, *of_k, *of_v, tokens, tokens, heads, heads, heads, 0, 1, dim, dim, 1, blocks
    grid, constants = (batch * blocks * 3 * heads,), {"BT": bt, "BD": tile(dim, 256), "num_warps": 4}
    places = *(Place(4, i * heads * dim) for i in range(3)), *(Place(i) for i in range(3)), Place(0), Place(3)
    return (Launch(spread_kernel, grid, places, numbers, constants),) if grid[0] and dim else ()


def join_heads(q: Tensor, k: Tensor, v: Tensor, single: Tensor) -> Tensor:
    """Of (B, H, N, D) each, channels of a head side by side: (B, N, 3 H D), as a fused projection has them.

    single: any tensor of float32, of which nothing is read.
    """
    batch, heads, tokens, dim = sizes = tuple(q.shape)
    out = q.new_empty((batch, tokens, 3 * heads * dim))
    strides = (t.stride()[:3] for t in (q, k, v))
    launch_all(_join_launch(sizes, *strides, (q.dtype, single.dtype), q.device), (q, k, v, single, out))
    return out


@operator("gate_heads")
def _gate_heads(x: Tensor, gates: Tensor) -> Tensor:
    """x (B, H, N, D) times gates (B, H, N), heads next to channels."""
    x, out = last_contiguous(x), heads_last(x)
    launches = _gate_launch(tuple(x.shape), x.stride()[:3], gates.stride(), (x.dtype, gates.dtype), x.device)
    launch_all(launches, (x, gates, out))
    return out


@_gate_heads.register_fake
def _(x: Tensor, gates: Tensor) -> Tensor:
    return heads_last(x)


@operator("gate_heads_backward")
def _gate_heads_backward(grad: Tensor, x: Tensor, gates: Tensor, wants_gates: bool) -> tuple[Tensor, Tensor]:
    grad, x = last_contiguous(grad), last_contiguous(x)
    dx, dgates = torch.empty_like(x), empty_slopes(gates, wants_gates)
    strides = (t.stride()[:3] for t in (grad, x, dx, gates))
    launches = _gate_gradient_launch(
        tuple(x.shape), *strides, wants_gates, (grad.dtype, x.dtype, gates.dtype), x.device
    )  # fmt: skip
    launch_all(launches, (grad, x, gates, dx, dgates))
    return dx, dgates.permute(0, 2, 1) if wants_gates else dgates


@_gate_heads_backward.register_fake
def _(grad: Tensor, x: Tensor, gates: Tensor, wants_gates: bool) -> tuple[Tensor, Tensor]:
    dgates = empty_slopes(gates, wants_gates)
    return torch.empty_like(last_contiguous(x)), dgates.permute(0, 2, 1) if wants_gates else dgates


def _setup_gates(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_gates(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    x, gates = ctx.saved_tensors
    dx, dgates = _gate_heads_backward(grad, x, gates, ctx.needs_input_grad[1])
    return dx, dgates.to(gates.dtype) if ctx.needs_input_grad[1] else None


_gate_heads.register_autograd(_backward_gates, setup_context=_setup_gates)


def gate_heads_triton(x: Tensor, gates: Tensor) -> Tensor:
    """(B, H, N, D) in the dtype of x, heads next to channels; tensors as `ops.gate_heads` has checked them."""
    return _gate_heads(x, gates)
