"""Plain PyTorch, written to be read: serves every call, and is what the other engines are tested against."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops._reference import reference_attention
from attention_zoo.ops.engines.base import Engine, Signature

__all__ = ["ReferenceEngine"]


class ReferenceEngine(Engine):
    name = group = "reference"
    package = "torch"

    def can_run(self, signature: Signature) -> str | None:
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return reference_attention(q, k, v, problem)
