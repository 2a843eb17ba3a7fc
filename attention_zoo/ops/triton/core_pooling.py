"""Pooling groups of tokens into core tokens as Triton kernels: one pass over keys and values, each read once.

A program has some groups of one key/value head and serves all query heads of it, whose queries are read where they stand among all
others. Nothing is multiplied as matrices: the bytes are what takes time. Gradients stay within a group, so there are no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_zoo.ops.triton._common import LOG2E, last_contiguous, per_logit, tile

__all__ = ["pool_core_tokens_triton"]


@triton.jit
def _group_weights(q, k, member, scale):
    """Softmax over the tokens of each group: q (groups, channels) float32, k (groups, tokens, channels) -> (groups, tokens)."""
    x = tl.sum(k.to(tl.float32) * q[:, None, :], 2) * scale
    x = tl.where(member[None, :], x, float("-inf"))
    p = tl.exp2(x - tl.max(x, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _forward_kernel(
    Q, K, V, CoreK, CoreV,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn,
    BATCH, KV_HEADS, GROUPS, SIZE, D, DV,
    SHARE: tl.constexpr, MEAN: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    heads = BATCH * KV_HEADS  # neighbours take the heads of the same tokens, which projections lay side by side
    b, g, base = (pid % heads // KV_HEADS).to(tl.int64), pid % heads % KV_HEADS, (pid // heads).to(tl.int64) * BG
    j, t, d, dv = tl.arange(0, BG), tl.arange(0, BP), tl.arange(0, BD), tl.arange(0, BDV)
    real, member = j < GROUPS - base, t < SIZE
    there = (real[:, None] & member[None, :])[:, :, None]
    token = (j[:, None] * SIZE + t[None, :])[:, :, None]
    k = tl.load(K + b * skb + g * skh + base * SIZE * skn + token * skn + d[None, None, :], mask=there & (d < D), other=0.0)
    v = tl.load(V + b * svb + g * svh + base * SIZE * svn + token * svn + dv[None, None, :], mask=there & (dv < DV), other=0.0)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    Q += b * sqb + base * sqn
    CoreK += b * sckb + base * sckn
    CoreV += b * scvb + base * scvn
    mean = tl.zeros([BG, BP], tl.float32)
    for one in range(SHARE):
        h = g * SHARE + one
        q = tl.load(Q + h * sqh + j[:, None] * sqn + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        weights = _group_weights(q, k, member, scale)
        if MEAN:
            mean += weights / SHARE
        else:
            core_k, core_v = tl.sum(weights[:, :, None] * k.to(tl.float32), 1), tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
            tl.store(CoreK + h * sckh + j[:, None] * sckn + d[None, :], core_k.to(CoreK.dtype.element_ty), mask=wanted)
            tl.store(CoreV + h * scvh + j[:, None] * scvn + dv[None, :], core_v.to(CoreV.dtype.element_ty), mask=wanted_v)
    if MEAN:
        core_k, core_v = tl.sum(mean[:, :, None] * k.to(tl.float32), 1), tl.sum(mean[:, :, None] * v.to(tl.float32), 1)
        tl.store(CoreK + g * sckh + j[:, None] * sckn + d[None, :], core_k.to(CoreK.dtype.element_ty), mask=wanted)
        tl.store(CoreV + g * scvh + j[:, None] * scvn + dv[None, :], core_v.to(CoreV.dtype.element_ty), mask=wanted_v)


@triton.jit
def _backward_kernel(
    Q, K, V, DCoreK, DCoreV, DQ, DK, DV_,
    scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sckb, sckh, sckn, scvb, scvh, scvn, sdqb, sdqh, sdqn, sdkb, sdkh, sdkn,
    sdvb, sdvh, sdvn,
    BATCH, KV_HEADS, GROUPS, SIZE, D, DV,
    SHARE: tl.constexpr, MEAN: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    heads = BATCH * KV_HEADS
    b, g, base = (pid % heads // KV_HEADS).to(tl.int64), pid % heads % KV_HEADS, (pid // heads).to(tl.int64) * BG
    j, t, d, dv = tl.arange(0, BG), tl.arange(0, BP), tl.arange(0, BD), tl.arange(0, BDV)
    real, member = j < GROUPS - base, t < SIZE
    there = (real[:, None] & member[None, :])[:, :, None]
    token = (j[:, None] * SIZE + t[None, :])[:, :, None]
    k = tl.load(K + b * skb + g * skh + base * SIZE * skn + token * skn + d[None, None, :], mask=there & (d < D), other=0.0)
    v = tl.load(V + b * svb + g * svh + base * SIZE * svn + token * svn + dv[None, None, :], mask=there & (dv < DV), other=0.0)
    wanted, wanted_v = real[:, None] & (d < D)[None, :], real[:, None] & (dv < DV)[None, :]
    Q += b * sqb + base * sqn
    DQ += b * sdqb + base * sdqn
    DCoreK += b * sckb + base * sckn
    DCoreV += b * scvb + base * scvn
    dk = tl.zeros([BG, BP, BD], tl.float32)
    dv_sum = tl.zeros([BG, BP, BDV], tl.float32)
    for one in range(SHARE):
        h = g * SHARE + one
        core = g if MEAN else h  # a mean over the query heads hands each its share
        q = tl.load(Q + h * sqh + j[:, None] * sqn + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        gk = tl.load(DCoreK + core * sckh + j[:, None] * sckn + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        gv = tl.load(DCoreV + core * scvh + j[:, None] * scvn + dv[None, :], mask=wanted_v, other=0.0).to(tl.float32)
        if MEAN:
            gk, gv = gk / SHARE, gv / SHARE
        weights = _group_weights(q, k, member, scale)
        slope = tl.sum(k.to(tl.float32) * gk[:, None, :], 2) + tl.sum(v.to(tl.float32) * gv[:, None, :], 2)
        slope = weights * (slope - tl.sum(weights * slope, 1)[:, None]) * per_logit(scale)
        dq = tl.sum(slope[:, :, None] * k.to(tl.float32), 1)
        tl.store(DQ + h * sdqh + j[:, None] * sdqn + d[None, :], dq.to(DQ.dtype.element_ty), mask=wanted)
        dk += weights[:, :, None] * gk[:, None, :] + slope[:, :, None] * q[:, None, :]
        dv_sum += weights[:, :, None] * gv[:, None, :]
    at_k = DK + b * sdkb + g * sdkh + base * SIZE * sdkn
    at_v = DV_ + b * sdvb + g * sdvh + base * SIZE * sdvn
    tl.store(at_k + token * sdkn + d[None, None, :], dk.to(DK.dtype.element_ty), mask=there & (d < D))
    tl.store(at_v + token * sdvn + dv[None, None, :], dv_sum.to(DV_.dtype.element_ty), mask=there & (dv < DV))


_FORWARD, _BACKWARD = 8192, 4096  # numbers of k that a program has, if a group has not more


def _launch(kernel: Any, tensors: tuple[Tensor, ...], size: int, mean: bool, scale: float, most: int) -> None:
    """Run a kernel on q, k, v, ..."""
    q, k, v = tensors[:3]
    (batch, kv_heads), (groups, dim), dim_v = k.shape[:2], q.shape[2:], v.shape[-1]
    members, channels, channels_v = triton.next_power_of_2(size), tile(dim, 256), tile(dim_v, 256)
    whole = members * max(channels, channels_v)
    block = max(1, min(most // whole, triton.next_power_of_2(groups)))
    strides = [s for t in tensors for s in t.stride()[:3]]
    kernel[(triton.cdiv(groups, block) * batch * kv_heads,)](
        *tensors, scale * LOG2E, *strides, batch, kv_heads, groups, size, dim, dim_v,
        SHARE=q.shape[1] // kv_heads, MEAN=mean, BG=block, BP=members, BD=channels, BDV=channels_v,
        num_warps=min(16, max(4, whole // 1024)),
    )  # fmt: skip


@torch.library.custom_op("attention_zoo::core_pooling_forward", mutates_args=())
def _pooling_forward(q: Tensor, k: Tensor, v: Tensor, size: int, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    core_k, core_v = _core_tokens(q, k, v, mean)
    if core_k.numel():
        q, k, v = (last_contiguous(t) for t in (q, k, v))
        _launch(_forward_kernel, (q, k, v, core_k, core_v), size, mean, scale, _FORWARD)
    return core_k, core_v


def _core_tokens(q: Tensor, k: Tensor, v: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Room for the core tokens, (B, H or G, m, D) and (B, H or G, m, D_v)."""
    heads = k.shape[1] if mean else q.shape[1]
    return k.new_empty((q.shape[0], heads, *q.shape[2:])), v.new_empty((q.shape[0], heads, q.shape[2], v.shape[-1]))


@_pooling_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, size: int, mean: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _core_tokens(q, k, v, mean)


@torch.library.custom_op("attention_zoo::core_pooling_backward", mutates_args=())
def _pooling_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor, size: int, mean: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _like(q), _like(k), _like(v)
    if q.numel():
        tensors = tuple(last_contiguous(t) for t in (q, k, v, grad_k, grad_v))
        _launch(_backward_kernel, (*tensors, *gradients), size, mean, scale, _BACKWARD)
    return gradients


def _like(x: Tensor) -> Tensor:
    """Room for a gradient, heads next to channels as the projections lay them."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


@_pooling_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor, size: int, mean: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


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
