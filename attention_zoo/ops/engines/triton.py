"""Our own kernels. They exist for what no library computes, or none well: of plain attention a single query without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import HALF, Engine, Signature, unusable

__all__ = ["TritonEngine"]


class TritonEngine(Engine):
    name = group = "triton"
    package = "triton"
    module = "triton"

    def load(self) -> str | None:
        import triton  # noqa: F401

        return None

    def can_run(self, signature: Signature) -> str | None:
        s = signature
        if s.lengths != "one":
            return "no kernel of ours serves plain attention but of a single query to more keys: the libraries' are better at it"
        if s.grad or s.map_grad:
            return "has no backward"
        if s.mapped or s.left or s.softcap or s.dropout or s.packed:
            return "has no mask or bias tensor, window, softcap, dropout or packing"
        if s.lse:
            return "returns no log-normaliser"
        if s.empty:
            return "empty sizes are left to the reference"
        if s.dtype not in (*HALF, torch.float32):
            return f"serves float16, bfloat16 and float32 only, not {s.dtype}"
        if s.head_dim > 256 or s.value_dim > 256:
            return "heads of more than 256 channels"
        return unusable(s.device)

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        from attention_zoo.ops.triton.decode import decode_attention

        return decode_attention(q, k, v, is_causal=False, scale=problem.scale), None
