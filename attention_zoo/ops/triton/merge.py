"""Merging of attention over disjoint sets of keys as Triton kernels: one pass over the parts, and one back.

The rows of parts may lie in memory in any order: a part that was computed column by column is not brought into another first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, heads_last, last_contiguous, power_of_2

__all__ = ["MOST_PARTS", "merge_attention_triton"]

MOST_PARTS = 6
_ROWS = 32  # of a tile


@triton.jit
def _weigh(L, place, real, lse):
    """The share of a part in what is merged, exp(lse_i - lse); none where it, or all, have seen nothing."""
    part = tl.load(L + place, mask=real, other=float("-inf"))
    return tl.where(part == float("-inf"), 0.0, tl.exp2((part - lse) * 1.4426950408889634))


@triton.jit
def _rows(Part, b, h, s, w, sb, sh, ss, sw, d):
    """Where the rows of a part are."""
    return Part + b * sb + h * sh + (s * ss + w * sw)[:, None] + d[None, :]


@triton.jit
def _back(Part, L, DPart, DL, place, real, wanted, at, lse, grad, rest):
    """Gradients of one part."""
    share = _weigh(L, place, real, lse)
    out = tl.load(Part + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(DPart + at, (share[:, None] * grad).to(DPart.dtype.element_ty), mask=wanted)
    tl.store(DL + place, share * (tl.sum(out * grad, 1) + rest), mask=real)


@triton.jit(do_not_specialize=("HEADS", "SEGMENTS"))
def _merge_kernel(
    O0, O1, O2, O3, O4, O5, L0, L1, L2, L3, L4, L5, Out, Lse,
    s0b, s0h, s0s, s0w, s1b, s1h, s1s, s1w, s2b, s2h, s2s, s2w, s3b, s3h, s3s, s3w,
    s4b, s4h, s4s, s4w, s5b, s5h, s5s, s5w, sob, soh, sos, sow,
    HEADS, SEGMENTS, WIDTH, D,
    COUNT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    bh, d = tl.program_id(1), tl.arange(0, BD)
    b, h = (bh // HEADS).to(tl.int64), (bh % HEADS).to(tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    real, s, w = r < SEGMENTS * WIDTH, (r // WIDTH).to(tl.int64), (r % WIDTH).to(tl.int64)
    wanted, place = real[:, None] & (d < D)[None, :], bh.to(tl.int64) * SEGMENTS * WIDTH + r
    highest = tl.full([BM], float("-inf"), tl.float32)
    highest = tl.maximum(highest, tl.load(L0 + place, mask=real, other=float("-inf")))
    if COUNT > 1:
        highest = tl.maximum(highest, tl.load(L1 + place, mask=real, other=float("-inf")))
    if COUNT > 2:
        highest = tl.maximum(highest, tl.load(L2 + place, mask=real, other=float("-inf")))
    if COUNT > 3:
        highest = tl.maximum(highest, tl.load(L3 + place, mask=real, other=float("-inf")))
    if COUNT > 4:
        highest = tl.maximum(highest, tl.load(L4 + place, mask=real, other=float("-inf")))
    if COUNT > 5:
        highest = tl.maximum(highest, tl.load(L5 + place, mask=real, other=float("-inf")))
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if COUNT > 0:
        share = _weigh(L0, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O0, b, h, s, w, s0b, s0h, s0s, s0w, d), mask=wanted, other=0.0).to(tl.float32)
    if COUNT > 1:
        share = _weigh(L1, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O1, b, h, s, w, s1b, s1h, s1s, s1w, d), mask=wanted, other=0.0).to(tl.float32)
    if COUNT > 2:
        share = _weigh(L2, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O2, b, h, s, w, s2b, s2h, s2s, s2w, d), mask=wanted, other=0.0).to(tl.float32)
    if COUNT > 3:
        share = _weigh(L3, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O3, b, h, s, w, s3b, s3h, s3s, s3w, d), mask=wanted, other=0.0).to(tl.float32)
    if COUNT > 4:
        share = _weigh(L4, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O4, b, h, s, w, s4b, s4h, s4s, s4w, d), mask=wanted, other=0.0).to(tl.float32)
    if COUNT > 5:
        share = _weigh(L5, place, real, anchor)
        total += share
        acc += share[:, None] * tl.load(_rows(O5, b, h, s, w, s5b, s5h, s5s, s5w, d), mask=wanted, other=0.0).to(tl.float32)
    whole = tl.where(total == 0.0, 1.0, total)
    out = acc / whole[:, None]
    lse = tl.where(total == 0.0, float("-inf"), anchor + tl.log2(whole) * 0.6931471805599453)
    tl.store(_rows(Out, b, h, s, w, sob, soh, sos, sow, d), out.to(Out.dtype.element_ty), mask=wanted)
    tl.store(Lse + place, lse, mask=real)


@triton.jit(do_not_specialize=("HEADS", "SEGMENTS"))
def _merge_gradient_kernel(
    O0, O1, O2, O3, O4, O5, L0, L1, L2, L3, L4, L5, Out, Lse, DOut, DLse,
    DO0, DO1, DO2, DO3, DO4, DO5, DL0, DL1, DL2, DL3, DL4, DL5,
    s0b, s0h, s0s, s0w, s1b, s1h, s1s, s1w, s2b, s2h, s2s, s2w, s3b, s3h, s3s, s3w,
    s4b, s4h, s4s, s4w, s5b, s5h, s5s, s5w, sob, soh, sos, sow, sgb, sgh, sgs, sgw,
    HEADS, SEGMENTS, WIDTH, D,
    HAS_DLSE: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    bh, d = tl.program_id(1), tl.arange(0, BD)
    b, h = (bh // HEADS).to(tl.int64), (bh % HEADS).to(tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    real, s, w = r < SEGMENTS * WIDTH, (r // WIDTH).to(tl.int64), (r % WIDTH).to(tl.int64)
    wanted, place = real[:, None] & (d < D)[None, :], bh.to(tl.int64) * SEGMENTS * WIDTH + r
    out = tl.load(_rows(Out, b, h, s, w, sob, soh, sos, sow, d), mask=wanted, other=0.0).to(tl.float32)
    grad = tl.load(_rows(DOut, b, h, s, w, sgb, sgh, sgs, sgw, d), mask=wanted, other=0.0).to(tl.float32)
    lse = tl.load(Lse + place, mask=real, other=0.0)
    rest = -tl.sum(out * grad, 1)
    if HAS_DLSE:
        rest += tl.load(DLse + place, mask=real, other=0.0)
    if COUNT > 0:
        at = b * s0b + h * s0h + (s * s0s + w * s0w)[:, None] + d[None, :]
        _back(O0, L0, DO0, DL0, place, real, wanted, at, lse, grad, rest)
    if COUNT > 1:
        at = b * s1b + h * s1h + (s * s1s + w * s1w)[:, None] + d[None, :]
        _back(O1, L1, DO1, DL1, place, real, wanted, at, lse, grad, rest)
    if COUNT > 2:
        at = b * s2b + h * s2h + (s * s2s + w * s2w)[:, None] + d[None, :]
        _back(O2, L2, DO2, DL2, place, real, wanted, at, lse, grad, rest)
    if COUNT > 3:
        at = b * s3b + h * s3h + (s * s3s + w * s3w)[:, None] + d[None, :]
        _back(O3, L3, DO3, DL3, place, real, wanted, at, lse, grad, rest)
    if COUNT > 4:
        at = b * s4b + h * s4h + (s * s4s + w * s4w)[:, None] + d[None, :]
        _back(O4, L4, DO4, DL4, place, real, wanted, at, lse, grad, rest)
    if COUNT > 5:
        at = b * s5b + h * s5h + (s * s5s + w * s5w)[:, None] + d[None, :]
        _back(O5, L5, DO5, DL5, place, real, wanted, at, lse, grad, rest)


def _prepare(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (B, H, S, W, D) for which gradients of the same strides can be made; normalisers (B, H, S, W) one after another."""
    outs = [o if torch.empty_like(o, device="meta").stride() == o.stride() else o.contiguous() for o in map(last_contiguous, outs)]
    return outs, [lse.contiguous() for lse in lses]


def _six(tensors: list[Tensor]) -> list[Tensor]:
    """The kernels have six places; in those that are free stands the first, unread."""
    return tensors + tensors[:1] * (MOST_PARTS - len(tensors))


def _sizes(out: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Programs, sizes and tiles."""
    batch, heads, segments, width, dim = out.shape
    tiles = {"BM": _ROWS, "BD": power_of_2(dim)}
    return (ceil_div(segments * width, _ROWS), batch * heads), (heads, segments, width, dim), tiles


@operator("merge_forward")
def _merge_forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    outs, lses = _prepare(outs, lses)
    out, lse = heads_last(outs[0]), torch.empty_like(lses[0])
    if out.numel():
        grid, sizes, tiles = _sizes(out)
        strides = [stride for t in (*_six(outs), out) for stride in t.stride()[:4]]
        _merge_kernel[grid](*_six(outs), *_six(lses), out, lse, *strides, *sizes, COUNT=len(outs), **tiles)
    return out, lse


@_merge_forward.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return heads_last(outs[0]), lses[0].new_empty(lses[0].shape)


@operator("merge_backward")
def _merge_backward(
    outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> list[Tensor]:
    """Gradients of the outputs, then of the normalisers."""
    outs, lses = _prepare(outs, lses)
    grad = last_contiguous(grad)
    douts, dlses = [torch.empty_like(o) for o in outs], [torch.empty_like(lse) for lse in lses]
    if out.numel():
        grid, sizes, tiles = _sizes(out)
        strides = [stride for t in (*_six(outs), out, grad) for stride in t.stride()[:4]]
        _merge_gradient_kernel[grid](
            *_six(outs), *_six(lses), out, lse, grad, lse if grad_lse is None else grad_lse.contiguous(),
            *_six(douts), *_six(dlses), *strides, *sizes, HAS_DLSE=grad_lse is not None, COUNT=len(outs), **tiles,
        )  # fmt: skip
    return [*douts, *dlses]


@_merge_backward.register_fake
def _(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
    outs, lses = _prepare(outs, lses)
    return [*(torch.empty_like(o) for o in outs), *(lse.new_empty(lse.shape) for lse in lses)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[0], *inputs[1], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    *parts, out, lse = ctx.saved_tensors
    count = len(parts) // 2
    grad = torch.zeros_like(out) if grad is None else grad
    gradients = _merge_backward(parts[:count], parts[count:], out, lse, grad, grad_lse)
    return gradients[:count], gradients[count:]


_merge_forward.register_autograd(_backward, setup_context=_setup)


def merge_attention_triton(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`merge_attention` of at most `MOST_PARTS` parts (B, H, S, W, D) with normalisers (B, H, S, W) in float32."""
    merged: tuple[Tensor, Tensor] = _merge_forward(list(outs), list(lses))
    return merged
