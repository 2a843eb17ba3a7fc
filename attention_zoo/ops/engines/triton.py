"""Our own kernels. They exist for what no library computes, or none well.

Of plain attention that is few queries without gradients, and sequences of few tokens, such as windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import HALF, Engine, Signature, unusable

__all__ = ["TritonEngine"]


# Of a head, by the side of a tile and whether it is in half precision: what a multiprocessor has room for.
_MOST_CHANNELS = {(64, True): 256, (64, False): 128, (128, True): 128, (128, False): 32}


class TritonEngine(Engine):
    name = group = "triton"
    package = "triton"
    module = "triton"

    def load(self) -> str | None:
        import triton  # noqa: F401

        return None

    def can_run(self, signature: Signature) -> str | None:
        s = signature
        if not s.few_queries and not s.short:
            return "no kernel of ours serves plain attention but of up to 8 queries to more keys, and within 128 tokens"
        if s.few_queries and (s.grad or s.map_grad):
            return "has no backward for few queries to more keys"
        windowed = s.left if s.lengths == "one" else s.windowed  # its own position is the last one
        if s.mapped or windowed or s.softcap or s.dropout or s.packed:
            return "has no mask or bias tensor, window, softcap, dropout or packing"
        if s.right and not s.few_queries:
            return "has no causality within few tokens"
        if s.lse:
            return "returns no log-normaliser"
        if s.empty:
            return "empty sizes are left to the reference"
        if s.dtype not in (*HALF, torch.float32):
            return f"serves float16, bfloat16 and float32 only, not {s.dtype}"
        most = 256 if s.few_queries else _MOST_CHANNELS[s.short, s.half]
        if s.head_dim > most or s.value_dim > most:
            return f"heads of more than {most} channels, for so many tokens"
        if s.grouped and not s.few_queries:
            return "has no shared heads within few tokens"
        return unusable(s.device)

    def largest_batch(self, num_heads: int) -> int:
        """Samples are in the first dimension of the grid, which has no such limit."""
        return 2**31 - 1

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        if problem.num_queries == problem.num_keys:
            from attention_zoo.ops.triton.short import short_attention_triton

            return short_attention_triton(q, k, v, scale=problem.scale), None
        from attention_zoo.ops.triton.decode import decode_attention

        return decode_attention(q, k, v, is_causal=problem.window[1] is not None, scale=problem.scale), None
