"""Differential attention as one operator around cuDNN: a dense call for each map, and kernels of ours for all that joins them.

Where each signal head is followed by its noise head, both maps are one call, in which two heads share their values: half as many
heads at a time leave processors idle at the end.

Queries and keys come as the projections give them, heads of both maps in one tensor, and their gradients go back as such. Through
autograd the parts of a tensor cost a copy or a sum each, more than the difference itself. Forward, values are computed whole;
backward, wide ones in halves, which share the log-normaliser: outputs and their gradients are then slices of the whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops import _cudnn
from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import ceil_div, heads_last, last_contiguous, power_of_2
from attention_zoo.ops.triton.differential import gradients_of_settings, launch_subtract, launch_subtract_gradient

__all__ = ["differential_attention_cudnn"]


@triton.jit
def _add(A, B, To, n, c, sn, stn, TOKENS, C, TWO: tl.constexpr):
    wanted = (n < TOKENS)[:, None] & (c < C)[None, :]
    at = n[:, None] * sn + c[None, :]
    x = tl.load(A + at, mask=wanted, other=0.0)
    if TWO:
        x = x.to(tl.float32) + tl.load(B + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(To + n[:, None] * stn + c[None, :], x.to(To.dtype.element_ty), mask=wanted)


@triton.jit
def _join_kernel(
    A, B, To, LastA, LastB, LastTo,
    sb, sm, sh, sn, stb, stm, sth, stn, slb, slm, sln, sltb, sltm, sltn,
    GROUPS, GROUP, LAST, TOKENS, C,
    TWO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """To = A, plus B if TWO, of GROUP heads of each group; LastTo likewise of its LAST heads, 1 or 0, which lie elsewhere."""
    heads = GROUPS * (GROUP + LAST)
    h, portion = tl.program_id(0) % heads, tl.program_id(0) // heads  # heads of a token are neighbours in memory
    portions = tl.cdiv(TOKENS, BT)
    b, n = (portion // portions).to(tl.int64), (portion % portions * BT + tl.arange(0, BT)).to(tl.int64)
    m, g = (h // (GROUP + LAST)).to(tl.int64), (h % (GROUP + LAST)).to(tl.int64)
    c = tl.arange(0, BC)
    if g < GROUP:
        at, to = b * sb + m * sm + g * sh, b * stb + m * stm + g * sth
        _add(A + at, B + at, To + to, n, c, sn, stn, TOKENS, C, TWO)
    else:
        at, to = b * slb + m * slm, b * sltb + m * sltm
        _add(LastA + at, LastB + at, LastTo + to, n, c, sln, sltn, TOKENS, C, TWO)


def _join(parts: Sequence[Tensor], to: Tensor, last_parts: Sequence[Tensor] = (), last_to: Tensor | None = None) -> None:
    """Fill `to` (B, M, G, N, C) with one part of this shape, or the sum of two that lie alike; `last_to` (B, M, N, C) likewise."""
    batch, groups, group, tokens, channels = to.shape
    if not to.numel():
        return
    first, second = parts[0], parts[-1]
    if last_to is None:
        last, ends = 0, (first[:, :, 0], second[:, :, 0], to[:, :, 0])
    else:
        last, ends = 1, (last_parts[0], last_parts[-1], last_to)
    width = power_of_2(channels)
    rows = min(power_of_2(tokens), max(4096 // width, 1))
    _join_kernel[(ceil_div(tokens, rows) * batch * groups * (group + last),)](
        first, second, to, *ends, *first.stride()[:4], *to.stride()[:4], *ends[0].stride()[:3], *ends[2].stride()[:3],
        groups, group, last, tokens, channels, TWO=len(parts) > 1, BT=rows, BC=width,
    )  # fmt: skip


def _maps(x: Tensor, noise: Tensor | None, groups: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the signal heads (B, M, G, N, C) and of the noise heads (B, M, N, C), which stand in `noise`, else in x too."""
    if noise is not None:
        return x.unflatten(1, (groups, -1)), noise
    if interleaved:
        grouped = x.unflatten(1, (groups, -1))
        return grouped[:, :, :-1], grouped[:, :, -1]
    return x[:, :-groups].unflatten(1, (groups, -1)), x[:, -groups:]


def _new_copy(x: Tensor) -> Tensor:
    """Room (B, M G, N, C) for x (B, M, G, N, C), or an empty vector where its heads lie evenly, as cuDNN takes them."""
    groups, group = x.shape[1:3]
    if groups == 1 or group == 1 or x.stride(1) == group * x.stride(2):
        return x.new_empty(0)
    return heads_last(x[:, 0], heads=groups * group)


def _for_library(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None,
    kv_heads: int, copy: Tensor, groups: int, interleaved: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Queries and keys (B, heads, N, D) of the signal maps, and of the noise maps; `copy` as `_new_copy` made it, and filled."""
    signal_q, noise_q = _maps(q, noise_q, groups, interleaved)
    signal_k, noise_k = _maps(k, noise_k, kv_heads, interleaved)
    return (copy if copy.ndim > 1 else signal_q.flatten(1, 2), signal_k.flatten(1, 2)), (noise_q, noise_k)


def _is_one_call(q: Tensor, noise_q: Tensor | None, k: Tensor, v: Tensor, groups: int, interleaved: bool) -> bool:
    """Whether head 2 i is a signal head, with its own key head, 2 i + 1 its noise head, and i that of their values."""
    return noise_q is None and interleaved and q.shape[1] == k.shape[1] == 2 * v.shape[1] == 2 * groups


@operator("differential_cudnn_forward")
def _forward(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, factor: Tensor, weight: Tensor | None,
    groups: int, interleaved: bool, is_causal: bool, scale: float, gain: float, eps: float, norm: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The difference; if `keep`, both maps' outputs, their log-normalisers and the copy of the queries, else empty tensors.

    Of one call the outputs of the signal maps have those of the noise maps between them, whose place is an empty vector.
    """
    signal_q, _ = _maps(q, noise_q, groups, interleaved)
    copy = _new_copy(signal_q)  # none of pairs
    if copy.ndim > 1:
        _join((signal_q,), copy.unflatten(1, (groups, -1)))
    signal, noise, *rest = _attend(q, noise_q, k, noise_k, v, copy, groups, interleaved, is_causal, scale, keep)
    out = launch_subtract(signal, noise, factor, weight, groups, gain, eps, norm)
    return out, *_kept(keep, signal, noise, *rest, copy)


def _attend(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, copy: Tensor,
    groups: int, interleaved: bool, is_causal: bool, scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs of the signal maps and of the noise maps, and the log-normalisers of both."""
    call: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "keep": keep}
    if _is_one_call(q, noise_q, k, v, groups, interleaved):
        both, lse = _cudnn.dense_forward(q, k, v, **call)
        return both, q.new_empty(0), lse, q.new_empty(0, dtype=torch.float32)
    maps = _for_library(q, noise_q, k, noise_k, v.shape[1], copy, groups, interleaved)
    (signal, lse), (noise, noise_lse) = (_cudnn.dense_forward(*one, v, **call) for one in maps)
    return signal, noise, lse, noise_lse


def _kept(keep: bool, *tensors: Tensor) -> tuple[Any, ...]:
    return tensors if keep else tuple(t.new_empty(0) for t in tensors)


@_forward.register_fake
def _(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, factor: Tensor, weight: Tensor | None,
    groups: int, interleaved: bool, is_causal: bool, scale: float, gain: float, eps: float, norm: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    copy = _new_copy(_maps(q, noise_q, groups, interleaved)[0])
    signal, noise, *rest = _attend(q, noise_q, k, noise_k, v, copy, groups, interleaved, is_causal, scale, keep)
    heads = signal.shape[1] // (2 if noise.ndim == 1 else 1)
    return heads_last(signal, v.shape[3], heads), *_kept(keep, signal, noise, *rest, copy)


@operator("differential_cudnn_backward")
def _backward(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, factor: Tensor, weight: Tensor | None,
    signal: Tensor, noise: Tensor, lse: Tensor, noise_lse: Tensor, copy: Tensor, grad: Tensor,
    groups: int, interleaved: bool, is_causal: bool, scale: float, gain: float, eps: float, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, noise_q, k, noise_k (empty vectors of those that are not there), v, factor and weight."""
    kv_heads = v.shape[1]
    # as SDPA's callers have them
    dsignal, dnoise = (heads_last(t) if t.ndim > 1 else t.new_empty(0) for t in (signal, noise))
    empty = grad.new_empty(0)
    dfactor, dweight = launch_subtract_gradient(
        signal, noise, factor, weight, last_contiguous(grad), dsignal, dnoise, empty, empty, groups, gain, eps, norm
    )
    if noise.ndim == 1:
        return *_one_call_backward(dsignal, q, k, v, signal, lse, scale, is_causal), dfactor, dweight
    signal_maps, noise_maps = _for_library(q, noise_q, k, noise_k, kv_heads, copy, groups, interleaved)
    of_signal = _parts_backward(dsignal, *signal_maps, v, signal, lse, scale, is_causal)
    of_noise = _parts_backward(dnoise, *noise_maps, v, noise, noise_lse, scale, is_causal)
    dq, dnoise_q, dk, dnoise_k, dv = _rooms(q, noise_q, k, noise_k, v)
    for i, (to, noise_to, count) in enumerate(((dq, dnoise_q, groups), (dk, dnoise_k, kv_heads))):
        to_signal, to_noise = _maps(to, noise_to if noise_to.ndim > 1 else None, count, interleaved)
        parts = [part[i].unflatten(1, (count, -1)) for part in of_signal]
        _join(parts, to_signal, [part[i] for part in of_noise], to_noise)
    sums = [(one[2], other[2]) for one, other in zip(of_signal, of_noise, strict=True)]
    ends = dv.chunk(len(sums), -1)
    _join([t.unsqueeze(2) for t in sums[0]], ends[0].unsqueeze(2), *((sums[1], ends[1]) if len(sums) == 2 else ()))
    return dq, dnoise_q, dk, dnoise_k, dv, dfactor, dweight


def _one_call_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k and v, with empty vectors in the places of the noise heads."""
    parts = _parts_backward(grad, q, k, v, out, lse, scale, is_causal)
    if len(parts) == 1:
        dq, dk, dv = parts[0]
    else:
        dq, dk, dv = _rooms_of_one_call(q, k, v)
        for i, to in enumerate((dq, dk)):
            _join([part[i].unsqueeze(2) for part in parts], to.unsqueeze(2))
        for (_, _, half), place in zip(parts, dv.chunk(2, -1), strict=True):
            place.copy_(half)
    return dq, q.new_empty(0), dk, k.new_empty(0), dv


def _rooms_of_one_call(*given: Tensor) -> tuple[Tensor, ...]:
    """For gradients of q, k and v: as cuDNN has them, or for the sums of its halves."""
    if given[2].shape[3] <= _cudnn.WIDEST:
        return tuple(torch.empty_like(t) for t in given)
    return tuple(heads_last(t) for t in given)


def _parts_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of q and k from one or two parts of the channels, and of those of v."""
    count = 2 if v.shape[3] > _cudnn.WIDEST else 1
    parts = zip(grad.chunk(count, -1), v.chunk(count, -1), out.chunk(count, -1), strict=True)
    return [_cudnn.dense_backward(slope, q, k, some, o, lse, scale=scale, is_causal=is_causal) for slope, some, o in parts]


def _rooms(*given: Tensor | None) -> tuple[Tensor, ...]:
    """For gradients: like each tensor, heads next to channels, or an empty vector for none."""
    like = next(t for t in given if t is not None)
    return tuple(like.new_empty(0) if t is None else heads_last(t) for t in given)


@_backward.register_fake
def _(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, factor: Tensor, weight: Tensor | None,
    signal: Tensor, noise: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    if noise.ndim == 1:
        dq, dk, dv = _rooms_of_one_call(q, k, v)
        rooms: tuple[Tensor, ...] = dq, q.new_empty(0), dk, k.new_empty(0), dv
    else:
        rooms = _rooms(q, noise_q, k, noise_k, v)
    sizes = (signal.shape[0], signal.shape[1] // (2 if noise.ndim == 1 else 1), signal.shape[2])
    return *rooms, *gradients_of_settings(factor, weight, sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.settings = inputs[7:14]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    *slopes, dfactor, dweight = _backward(*saved, grad, *ctx.settings)
    found = (None if given is None else slope for given, slope in zip(saved[:5], slopes, strict=True))
    factor, weight = saved[5:7]
    return *found, dfactor.to(factor.dtype), None if weight is None else dweight.to(weight.dtype), *(None,) * 8


_forward.register_autograd(_gradients, setup_context=_setup)


def differential_attention_cudnn(
    q: Tensor, noise_q: Tensor | None, k: Tensor, noise_k: Tensor | None, v: Tensor, factor: Tensor, weight: Tensor | None, *,
    groups: int, interleaved: bool, is_causal: bool, scale: float, gain: float, eps: float | None,
) -> Tensor:  # fmt: skip
    """Of tensors as `differential_attention` has checked them, which cuDNN serves.

    Without `noise_q` and `noise_k` q and k hold the heads of both maps, `interleaved` or signal heads first.
    """
    norm, tensors = eps is not None, (q, noise_q, k, noise_k, v, factor, weight)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward(
        q, noise_q, k, noise_k, v, factor, weight if norm else None,
        groups, interleaved, is_causal, scale, gain if norm else 1.0, eps or 0.0, norm, keep,
    )[0]  # fmt: skip
