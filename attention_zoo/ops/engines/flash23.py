"""flash-attn 2 (`flash_attn`) and flash-attn 3 (`flash_attn_interface`). Their recent releases register operators of their own, so
torch.compile traces them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import Engine, Signature, compute_capability, flash_limits

__all__ = ["Flash2Engine", "Flash3Engine"]


class Flash3Engine(Engine):
    """flash-attn 3, for Hopper."""

    name = "flash3"
    group = "flash"
    package = "flash-attn-3"
    module = "flash_attn_interface"

    def load(self) -> str | None:
        import flash_attn_interface  # noqa: F401

        return None if torch.cuda.is_available() else "needs a CUDA device"

    def can_run(self, signature: Signature) -> str | None:
        if signature.dropout:
            return "has no dropout"
        if signature.softcap and signature.grad:
            return "softcap has no tested gradient"
        if signature.device.type == "cuda" and compute_capability(signature.device) // 10 != 9:
            return "needs compute capability 9.0"
        return _common_limits(signature)

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        import flash_attn_interface as library

        settings: dict[str, Any] = {"softmax_scale": problem.scale, **_window(problem), "softcap": problem.softcap or 0.0}
        if problem.return_lse:  # the first releases have no such argument, and always return it
            settings["return_attn_probs"] = True
        return _call(library.flash_attn_func, library.flash_attn_varlen_func, q, k, v, problem, settings)


class Flash2Engine(Engine):
    """flash-attn 2, for Ampere and later."""

    name = "flash2"
    group = "flash"
    package = "flash-attn"
    module = "flash_attn"

    def load(self) -> str | None:
        import flash_attn

        if not hasattr(flash_attn, "flash_attn_func"):  # flash-attn 4's namespace package has the same name
            return "not installed (the package flash_attn here is flash-attn 4's)"
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def can_run(self, signature: Signature) -> str | None:
        if signature.softcap and signature.dropout:
            return "has softcap or dropout, not both"
        if signature.device.type == "cuda" and compute_capability(signature.device) < 80:
            return "needs compute capability 8.0 or later"
        return _common_limits(signature)

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        import flash_attn as library

        settings: dict[str, Any] = {
            "dropout_p": problem.dropout_p,
            "softmax_scale": problem.scale,
            **_window(problem),
            "softcap": problem.softcap or 0.0,
            "return_attn_probs": problem.return_lse,
        }
        return _call(library.flash_attn_func, library.flash_attn_varlen_func, q, k, v, problem, settings)


def _common_limits(s: Signature) -> str | None:
    if (reason := flash_limits(s)) is not None:
        return reason
    if s.head_dim != s.value_dim:
        return "key and value heads must have one size"
    if s.head_dim > 256 or s.head_dim % 8:
        return "head size must be a multiple of 8 up to 256"
    if s.lse and s.grad:
        return "its log-normaliser carries no gradient"
    return None


def _window(problem: Problem) -> dict[str, Any]:
    left, right = problem.window
    bounds = (-1 if left is None else left, -1 if right is None else right)
    return {"causal": right == 0, "window_size": bounds}


def _call(dense: Any, varlen: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, settings: dict[str, Any]) -> Any:
    """Both libraries return the output alone, or a tuple (output, log-normaliser, ...)."""
    if problem.cu_seqlens_q is None:
        result = dense(*(t.transpose(1, 2) for t in (q, k, v)), **settings)
    else:
        assert problem.cu_seqlens_k is not None
        result = varlen(
            *(t[0].transpose(0, 1) for t in (q, k, v)),
            cu_seqlens_q=problem.cu_seqlens_q.to(torch.int32),
            cu_seqlens_k=problem.cu_seqlens_k.to(torch.int32),
            max_seqlen_q=longest(problem.cu_seqlens_q, problem.max_seqlen_q, problem.num_queries),
            max_seqlen_k=longest(problem.cu_seqlens_k, problem.max_seqlen_k, problem.num_keys),
            **settings,
        )
    out = result[0] if isinstance(result, tuple) else result
    out = out.transpose(1, 2) if problem.cu_seqlens_q is None else out.transpose(0, 1)[None]
    if not problem.return_lse:
        return out, None
    lse = result[1] if problem.cu_seqlens_q is None else result[1][None]
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # flash-attn 2 marks a fully masked row with +inf


def longest(cu_seqlens: Tensor, max_seqlen: int | None, total: int) -> int:
    """Length of the longest packed sequence: as given, else read from the device (a wait), or bounded by the total in a graph."""
    if max_seqlen is not None:
        return max_seqlen
    return total if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
