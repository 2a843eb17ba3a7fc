"""Pooling groups of tokens into core tokens as Triton kernels: one pass over keys and values, each read once.

A program has some groups of one key/value head and serves all query heads of it, whose queries are read where they stand among all
others. The groups' tokens are the columns of one matrix product, of which each row needs those of its own group only: computing the
others and masking them is still far cheaper than sums along vectors, and the bytes are what takes time. Gradients stay within a
group, so there are no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops._operators import operator
from attention_zoo.ops.triton._common import LOG2E, ceil_div, heads_last, last_contiguous, per_logit, power_of_2, precision, tile

__all__ = ["pool_core_tokens_triton"]


@triton.jit
def _lay_out(base, GROUPS, SIZE, SHARE: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr):
    """Rows are a group's query heads, groups one after the other; columns its tokens.

    Returns: of each row its group, its head and whether it is one; of each column its place among the tokens and whether it is one;
    which columns are of a row's group.
    """
    row, column = tl.arange(0, BR), tl.arange(0, BG * BP)
    group, member = row // SHARE, column // BP
    real = (group < BG) & (group < GROUPS - base)
    there = (column % BP < SIZE) & (member < GROUPS - base)
    own = (group[:, None] == member[None, :]) & real[:, None] & there[None, :]
    return group, row % SHARE, real, member * SIZE + column % BP, there, own


@triton.jit
def _group_weights(q, k, own, scale, PRECISION: tl.constexpr):
    """Softmax of each row over the tokens of its group, float32; 0 elsewhere. q (rows, channels), k (tokens, channels)."""
    x = tl.where(own, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    highest = tl.max(x, 1)
    p = tl.exp2(x - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _forward_kernel(
    Q, K, V, CoreK, CoreV,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn,
    BATCH, KV_HEADS, GROUPS, SIZE, D, DV,
    SHARE: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    heads = BATCH * KV_HEADS  # neighbours take the heads of the same tokens, which projections lay side by side
    b, g, base = (pid % heads // KV_HEADS).to(tl.int64), pid % heads % KV_HEADS, (pid // heads).to(tl.int64) * BG
    CORE: tl.constexpr = 1 if MEAN else SHARE  # rows of a group
    group, one, real, token, there, own = _lay_out(base, GROUPS, SIZE, CORE, BG, BP, BR)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    at_k, at_v = K + b * skb + g * skh + base * SIZE * skn, V + b * svb + g * svh + base * SIZE * svn
    k = tl.load(at_k + token[:, None] * skn + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    v = tl.load(at_v + token[:, None] * svn + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    at_q = Q + b * sqb + base * sqn + group[:, None] * sqn + d[None, :]
    if MEAN:
        weights = tl.zeros([BR, BG * BP], tl.float32)
        for other in range(SHARE):
            q = tl.load(at_q + (g * SHARE + other) * sqh, mask=wanted, other=0.0)
            weights += _group_weights(q, k, own, scale, PRECISION) / SHARE
    else:
        q = tl.load(at_q + (g * SHARE + one)[:, None] * sqh, mask=wanted, other=0.0)
        weights = _group_weights(q, k, own, scale, PRECISION)
    core_k = tl.dot(weights.to(k.dtype), k, input_precision=PRECISION)
    core_v = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    h = g * CORE + one
    at_k, at_v = CoreK + b * sckb + base * sckn, CoreV + b * scvb + base * scvn
    place, place_v = h[:, None] * sckh + group[:, None] * sckn + d[None, :], h[:, None] * scvh + group[:, None] * scvn + dv[None, :]
    tl.store(at_k + place, core_k.to(CoreK.dtype.element_ty), mask=wanted)
    tl.store(at_v + place_v, core_v.to(CoreV.dtype.element_ty), mask=wanted_v)


@triton.jit
def _backward_kernel(
    Q, K, V, DCoreK, DCoreV, DQ, DK, DV_,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn, sdqb, sdqh, sdqn, sdkb, sdkh, sdkn,
    sdvb, sdvh, sdvn,
    BATCH, KV_HEADS, GROUPS, SIZE, D, DV,
    SHARE: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    heads = BATCH * KV_HEADS
    b, g, base = (pid % heads // KV_HEADS).to(tl.int64), pid % heads % KV_HEADS, (pid // heads).to(tl.int64) * BG
    group, one, real, token, there, own = _lay_out(base, GROUPS, SIZE, SHARE, BG, BP, BR)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    of_k, of_v = there[:, None] & (d < D)[None, :], there[:, None] & (dv < DV)[None, :]
    at_k, at_v = K + b * skb + g * skh + base * SIZE * skn, V + b * svb + g * svh + base * SIZE * svn
    k = tl.load(at_k + token[:, None] * skn + d[None, :], mask=of_k, other=0.0)
    v = tl.load(at_v + token[:, None] * svn + dv[None, :], mask=of_v, other=0.0)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    h = g * SHARE + one
    core = g + one * 0 if MEAN else h  # a mean over the query heads hands each its share
    at_q, at_gk, at_gv = Q + b * sqb + base * sqn, DCoreK + b * sckb + base * sckn, DCoreV + b * scvb + base * scvn
    q = tl.load(at_q + h[:, None] * sqh + group[:, None] * sqn + d[None, :], mask=wanted, other=0.0)
    gk = tl.load(at_gk + core[:, None] * sckh + group[:, None] * sckn + d[None, :], mask=wanted, other=0.0)
    gv = tl.load(at_gv + core[:, None] * scvh + group[:, None] * scvn + dv[None, :], mask=wanted_v, other=0.0)
    weights = _group_weights(q, k, own, scale, PRECISION)
    slope = tl.dot(gk, tl.trans(k), input_precision=PRECISION) + tl.dot(gv, tl.trans(v), input_precision=PRECISION)
    part = 1.0 / SHARE if MEAN else 1.0
    slope = weights * (slope - tl.sum(weights * slope, 1)[:, None]) * (per_logit(scale) * part)
    weights = tl.trans((weights * part).to(k.dtype))
    at_dv = DV_ + b * sdvb + g * sdvh + base * SIZE * sdvn
    dv_sum = tl.dot(weights, gv, input_precision=PRECISION)
    tl.store(at_dv + token[:, None] * sdvn + dv[None, :], dv_sum.to(DV_.dtype.element_ty), mask=of_v)
    slope = slope.to(k.dtype)
    dk = tl.dot(weights, gk, input_precision=PRECISION) + tl.dot(tl.trans(slope), q, input_precision=PRECISION)
    at_dk = DK + b * sdkb + g * sdkh + base * SIZE * sdkn
    tl.store(at_dk + token[:, None] * sdkn + d[None, :], dk.to(DK.dtype.element_ty), mask=of_k)
    dq = tl.dot(slope, k, input_precision=PRECISION)
    at_dq = DQ + b * sdqb + base * sdqn
    tl.store(at_dq + h[:, None] * sdqh + group[:, None] * sdqn + d[None, :], dq.to(DQ.dtype.element_ty), mask=wanted)


_TOKENS, _WARPS = 64, 4  # of a program


def _launch(kernel: Any, tensors: tuple[Tensor, ...], size: int, mean: bool, scale: float, rows: int) -> None:
    """Run a kernel on q, k, v, ...; each group has that many `rows` in it."""
    q, k, v = tensors[:3]
    (batch, kv_heads), (groups, dim), dim_v = k.shape[:2], q.shape[2:], v.shape[-1]
    members = power_of_2(size)
    most = min(_TOKENS // members, _TOKENS // power_of_2(rows))
    block = max(1, 16 // members, most)  # a power of two, and a matrix product takes 16 tokens at least
    strides = [s for t in tensors for s in t.stride()[:3]]
    kernel[(ceil_div(groups, block) * batch * kv_heads,)](
        *tensors, scale * LOG2E, *strides, batch, kv_heads, groups, size, dim, dim_v,
        SHARE=q.shape[1] // kv_heads, MEAN=mean, PRECISION=precision(q), BG=block, BP=members, BR=tile(block * rows, 1024),
        BD=tile(dim, 256), BDV=tile(dim_v, 256), num_warps=_WARPS,
    )  # fmt: skip


@operator("core_pooling_forward")
def _pooling_forward(q: Tensor, k: Tensor, v: Tensor, size: int, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    core_k, core_v = _core_tokens(q, k, v, mean)
    if core_k.numel():
        q, k, v = (last_contiguous(t) for t in (q, k, v))
        _launch(_forward_kernel, (q, k, v, core_k, core_v), size, mean, scale, 1 if mean else q.shape[1] // k.shape[1])
    return core_k, core_v


def _core_tokens(q: Tensor, k: Tensor, v: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Room for the core tokens, (B, H or G, m, D) and (B, H or G, m, D_v)."""
    heads = k.shape[1] if mean else q.shape[1]
    return k.new_empty((q.shape[0], heads, *q.shape[2:])), v.new_empty((q.shape[0], heads, q.shape[2], v.shape[-1]))


@_pooling_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, size: int, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _core_tokens(q, k, v, mean)


@operator("core_pooling_backward")
def _pooling_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor, size: int, mean: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = heads_last(q), heads_last(k), heads_last(v)
    if q.numel():
        tensors = tuple(last_contiguous(t) for t in (q, k, v, grad_k, grad_v))
        _launch(_backward_kernel, (*tensors, *gradients), size, mean, scale, q.shape[1] // k.shape[1])
    return gradients


@_pooling_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor, size: int, mean: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return heads_last(q), heads_last(k), heads_last(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
    return *_pooling_backward(*ctx.saved_tensors, grad_k, grad_v, *ctx.settings), *(None,) * 3


_pooling_forward.register_autograd(_backward, setup_context=_setup)


def pool_core_tokens_triton(q: Tensor, k: Tensor, v: Tensor, *, group_size: int, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Core tokens of pool="cca", of tensors as `pool_core_tokens` has checked them; `mean`: one for all query heads of a key."""
    core_k, core_v = _pooling_forward(q, k, v, group_size, mean, scale)
    return core_k, core_v
