"""torch's `scaled_dot_product_attention`: its flash, cuDNN, memory-efficient and math kernels, on any device.

On Hopper and later cuDNN is faster than the flash kernel that torch would take, so it is put first there; torch still refuses a
kernel that cannot serve the call. Everything that torch has no argument for (bottom-right causality, windows, packing, rows
without a key) goes in as one mask.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import HALF, Engine, Signature, compute_capability, is_grouped, join_masks

__all__ = ["TorchEngine"]

_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_CUDNN_LATE = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


class TorchEngine(Engine):
    name = group = "torch"
    package = "torch"

    def can_run(self, signature: Signature) -> str | None:
        if signature.softcap:
            return "has no softcap"
        if signature.lse:
            return "returns no log-normaliser"
        if signature.empty:
            return "empty sizes are left to the reference"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        left, right = problem.window
        plain = problem.attn_mask is None and problem.bias is None and not problem.packed and left is None
        if plain and (right is None or (right == 0 and problem.num_queries == problem.num_keys)):
            return _unmasked(q, k, v, problem, right is not None), None
        mask, dead = join_masks(q, problem)
        out = _masked(q, k, v, mask, problem)
        return out if dead is None else out.masked_fill(dead, 0.0), None


def _unmasked(q: Tensor, k: Tensor, v: Tensor, problem: Problem, is_causal: bool) -> Tensor:
    order: AbstractContextManager[None] = nullcontext()
    if q.is_cuda and q.dtype in HALF and compute_capability(q.device) >= 90:
        # cuDNN makes a plan for every new number of keys, 40 to 65 ms each: not for one token, whose keys grow at every step.
        # torch from 2.11 on has it first by itself.
        order = cudnn_first() if q.shape[2] > 1 else cudnn_late()
    with order:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=problem.dropout_p, is_causal=is_causal, scale=problem.scale, enable_gqa=is_grouped(q, k)
        )


def cudnn_first() -> AbstractContextManager[None]:
    """SDPA tries its cuDNN kernel before the others; each of them still decides for itself whether it serves the call."""
    return _in_order(_CUDNN_FIRST)


def cudnn_late() -> AbstractContextManager[None]:
    """SDPA tries its cuDNN kernel where no other fused one serves the call."""
    return _in_order(_CUDNN_LATE)


def _in_order(kernels: tuple[SDPBackend, ...]) -> AbstractContextManager[None]:
    if torch.compiler.is_compiling() or not hasattr(torch._C, "_set_sdp_priority_order"):
        return sdpa_kernel(list(kernels), set_priority=True)
    return _Order(kernels)


class _Order(AbstractContextManager[None]):
    """The same as torch's public context manager, which takes some 40 microseconds, in less than one. Nothing is ruled out."""

    def __init__(self, kernels: tuple[SDPBackend, ...]) -> None:
        self.wanted = [kernel.value for kernel in kernels]

    def __enter__(self) -> None:
        _ask_once()
        self.order = torch._C._get_sdp_priority_order()
        torch._C._set_sdp_priority_order([*self.wanted, *(kernel for kernel in self.order if kernel not in self.wanted)])

    def __exit__(self, *_: object) -> None:
        torch._C._set_sdp_priority_order(self.order)


@functools.cache
def _ask_once() -> None:
    """torch puts cuDNN first when it first looks for a kernel, over whatever has been set by then: its order is read after that."""
    if torch.cuda.is_available():
        q = torch.empty((1, 1, 8, 64), dtype=torch.float16, device="cuda")
        torch._fused_sdp_choice(q, q, q)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, problem: Problem) -> Tensor:
    gqa = is_grouped(q, k)
    if gqa and mask is not None and mask.shape[1] == 1 and mask.shape[2] == 1:
        # torch's masked kernels know no shared heads; where all rows have one mask, the heads of a group become queries of one head
        folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, dropout_p=problem.dropout_p, scale=problem.scale)
        return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=problem.dropout_p, scale=problem.scale, enable_gqa=gqa)
