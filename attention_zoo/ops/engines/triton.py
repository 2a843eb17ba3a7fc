"""Our own kernels. They exist for what no library computes; plain attention is not such a thing, so none of them serves it."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import Engine, Signature

__all__ = ["TritonEngine"]

_REASON = "no kernel of ours serves plain attention: the libraries' are better at it"


class TritonEngine(Engine):
    name = group = "triton"
    package = "triton"
    module = "triton"

    def load(self) -> str | None:
        import triton  # noqa: F401

        return None

    def can_run(self, signature: Signature) -> str | None:
        return _REASON

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(_REASON)
