"""Calls of `attention` for the tests: drawn by hypothesis, or listed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention_zoo import ops


@dataclass
class Call:
    """q, k, v and the keyword arguments of one call; `leaves` are the tensors whose gradients are compared."""

    q: Tensor
    k: Tensor
    v: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, *self.settings.values()) if isinstance(t, Tensor) and t.is_floating_point()]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """A copy of which every floating-point tensor is a leaf of its own."""

        def copy(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().clone().to(device)
            return value.to(dtype).requires_grad_(not _is_mask(value)) if value.is_floating_point() else value

        return Call(copy(self.q), copy(self.k), copy(self.v), {name: copy(value) for name, value in self.settings.items()})

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Output, then the log-normaliser if asked for."""
        result = ops.attention(self.q, self.k, self.v, backend=backend, **self.settings)
        return result if isinstance(result, tuple) else (result,)

    def run_with_gradients(self, backend: str) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the gradients of a fixed mixture of them in every leaf that takes one."""
        results = self.run(backend)
        mixture = sum(((r.masked_fill(r == -torch.inf, 0.0).double()) * _weights(r)).sum() for r in results)
        leaves = [leaf for leaf in self.leaves() if leaf.requires_grad]
        gradients = torch.autograd.grad(mixture, leaves, allow_unused=True)
        return list(results), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def _is_mask(value: Tensor) -> bool:
    return bool(torch.isinf(value).any())


def _weights(like: Tensor) -> Tensor:
    count = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return torch.cos(count).reshape(like.shape)


@st.composite
def calls(draw: st.DrawFn, *, packed: bool | None = None, maps: bool = True, softcap: bool = True, lse: bool = True) -> Call:
    """A random small call: odd sizes, more or fewer queries than keys, shared heads, another value size, every kind of mask."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    settings: dict[str, Any] = {}
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim, value_dim = draw(st.sampled_from([1, 4, 7, 8])), draw(st.sampled_from([1, 4, 8, 9]))
    heads = kv_heads * groups
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
        batch, num_queries = 1, sum(lengths)
        settings["cu_seqlens"] = _offsets(lengths)
        num_keys = num_queries
        if draw(st.booleans()):
            key_lengths = draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths)).filter(any))
            settings["cu_seqlens_k"], num_keys = _offsets(key_lengths), sum(key_lengths)
    else:
        batch, num_queries, num_keys = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    settings["is_causal"] = draw(st.booleans())
    settings["window_size"] = draw(st.sampled_from([None, None, 0, 2, (1, 3), (None, 2), (-1, 0), (3, None)]))
    settings["scale"] = draw(st.sampled_from([None, 0.3, 1.7]))
    if softcap:
        settings["softcap"] = draw(st.sampled_from([None, None, 0.9]))
    if maps:
        settings.update(_maps(draw, generator, (batch, heads, num_queries, num_keys)))
    if lse:
        settings["return_lse"] = draw(st.booleans())
    q = normal(batch, heads, num_queries, head_dim)
    return Call(q, normal(batch, kv_heads, num_keys, head_dim), normal(batch, kv_heads, num_keys, value_dim), settings)


def _maps(draw: st.DrawFn, generator: torch.Generator, full: tuple[int, ...]) -> dict[str, Tensor]:
    """A mask and a bias, each of some broadcastable shape, or neither."""

    def shape() -> tuple[int, ...]:
        kept = [size if draw(st.booleans()) else 1 for size in full]
        return tuple(kept[draw(st.integers(0, 2)) :])

    maps: dict[str, Tensor] = {}
    kind = draw(st.sampled_from(["none", "none", "bool", "float"]))
    if kind != "none":
        visible = torch.rand(shape(), generator=generator) > draw(st.sampled_from([0.2, 0.5, 1.0]))
        maps["attn_mask"] = visible if kind == "bool" else torch.zeros(visible.shape).double().masked_fill(~visible, -torch.inf)
    if draw(st.booleans()):
        maps["bias"] = torch.randn(shape(), generator=generator, dtype=torch.float64)
    return maps


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
