"""flash-attn 4 (`flash_attn.cute`): kernels for Hopper and Blackwell, compiled on first use for each head size and kind of mask.

Eager calls go to the library's own autograd function. Dynamo cannot trace that, so a compiled graph holds `attention_zoo::flash4`
instead, whose gradient calls the library's backward kernel. Written against 4.0.0b36.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import Engine, Signature, compute_capability, flash_limits

__all__ = ["Flash4Engine"]


class Flash4Engine(Engine):
    name = "flash4"
    group = "flash"
    package = "flash-attn-4"
    module = "flash_attn"

    def load(self) -> str | None:
        from flash_attn.cute import interface

        for name in ("flash_attn_func", "flash_attn_varlen_func", "_flash_attn_fwd", "_flash_attn_bwd"):
            if not hasattr(interface, name):
                return f"flash_attn.cute.interface has no {name}: written against flash-attn 4.0.0b36"
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def can_run(self, signature: Signature) -> str | None:
        s = signature
        if (reason := flash_limits(s)) is not None:
            return reason
        if s.dropout:
            return "has no dropout"
        major = compute_capability(s.device) // 10
        if major < 8:
            return "needs compute capability 8.0 or later"
        if s.grad and major == 8:
            return "has no backward before compute capability 9.0"
        if s.grad and s.softcap and major >= 12:
            return "has no backward with softcap on compute capability 12"
        return self._head_sizes(s, major)

    def _head_sizes(self, s: Signature, major: int) -> str | None:
        if s.head_dim % 8 or s.value_dim % 8:
            return "head sizes must be multiples of 8"
        if s.head_dim == 192 and s.value_dim == 128 and major >= 9:
            return "grouped heads of sizes 192 and 128 have no backward" if s.grad and s.grouped else None
        if s.head_dim != s.value_dim:
            return "key and value heads must have one size (or 192 and 128)"
        if s.grad and s.head_dim < 128 and s.head_dim % 32:
            return "gradients of head sizes under 128 that are no multiple of 32 were found wrong in 4.0.0b36"
        most = 256 if major == 9 else 128
        if s.head_dim > most and not (s.head_dim == 256 and major in (10, 11)):
            return f"head size over {most}"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        if problem.packed:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (total, H, D)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, H, D)
        call = _compiled if torch.compiler.is_compiling() else _eager
        out, lse = call(q, k, v, problem)
        if problem.packed:
            return out.transpose(0, 1)[None], lse[None] if lse is not None else None
        return out.transpose(1, 2), lse


def _eager(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    from flash_attn.cute import interface

    softcap = problem.softcap or 0.0
    if problem.cu_seqlens_q is None:
        return interface.flash_attn_func(
            q,
            k,
            v,
            softmax_scale=problem.scale,
            window_size=problem.window,  # (None, 0) is causal
            softcap=softcap,
            return_lse=problem.return_lse,
        )
    return interface.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=_int32(problem.cu_seqlens_q),
        cu_seqlens_k=_int32(problem.cu_seqlens_k),
        max_seqlen_q=problem.max_seqlen_q,
        max_seqlen_k=problem.max_seqlen_k,
        softmax_scale=problem.scale,
        window_size=problem.window,
        softcap=softcap,
        return_lse=problem.return_lse,
    )


def _compiled(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    left, right = problem.window
    return _forward(
        q,
        k,
        v,
        _int32(problem.cu_seqlens_q),
        _int32(problem.cu_seqlens_k),
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        problem.scale,
        left,
        right,
        problem.softcap or 0.0,
    )


def _int32(offsets: Tensor | None) -> Tensor | None:
    return offsets if offsets is None or offsets.dtype == torch.int32 else offsets.to(torch.int32)


@torch.library.custom_op("attention_zoo::flash4", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import interface

    out, lse, *_ = interface._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        window_size_left=left,
        window_size_right=right,
        softcap=softcap,
        return_lse=True,
    )
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return out, q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("attention_zoo::flash4_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute import interface

    # gradients are allocated here, contiguous, so that their strides are what the fake below promises
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad_out,
        lse,
        scale,
        False,
        softcap,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dq=dq,
        dk=dk,
        dv=dv,
        dlse=grad_lse,
    )
    return dq, dk, dv


@_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dq, dk, dv = _backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.settings)
    return dq, dk, dv, None, None, *(None,) * len(ctx.settings)


_forward.register_autograd(_gradient, setup_context=_setup_context)
