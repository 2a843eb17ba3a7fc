"""Our kernels against the operations' plain code: random odd shapes, outputs and gradients; in graphs; what they refuse.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from torch import Tensor

from attention_zoo import ops
from attention_zoo.ops.core_context import core_context_attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@dataclass
class Problem(Case):
    """A call whose log-normaliser is looked at too."""

    single: tuple[str, ...] = ("lse",)

    def run(self, backend: str, dtype: torch.dtype = torch.float32, function: Any = None) -> dict[str, Tensor]:
        """Output, log-normaliser, and gradients of a fixed functional of both, by name."""
        given = {
            name: t.to(DEVICE, dtype).requires_grad_() if t.is_floating_point() else t.to(DEVICE)
            for name, t in self.tensors.items()
        }
        leaves = {name: t for name, t in given.items() if t.is_floating_point()}
        out, lse = (function or self.operation)(**given, **self.settings, return_lse=True, backend=backend)
        objective = (out.float() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum()
        seen = lse.isfinite()  # where nothing is seen there is no slope
        objective = (
            objective + (torch.where(seen, lse, 0.0) * torch.linspace(1, -1, lse.numel(), device=DEVICE).view(lse.shape)).sum()
        )
        gradients = torch.autograd.grad(objective, list(leaves.values()))
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}


def routed(
    batch: int = 2, kv_heads: int = 1, group: int = 2, regions: int = 5, key_regions: int = 4, n: int = 5, m: int = 3,
    number: int = 2, dim: int = 8, value_dim: int = 16, weights: bool = False, mask: int = 0, popular: bool = False,
    shared: int = 0,
) -> Problem:  # fmt: skip
    """Regions of queries and of keys; `popular`: all queries are routed to the same regions."""
    number = min(number, key_regions)
    order = torch.rand(batch, regions, key_regions).argsort(-1)[..., :number]
    tensors = {
        "q": torch.randn(batch, regions, n, kv_heads * group, dim).permute(0, 3, 1, 2, 4),
        "k": torch.randn(batch, kv_heads, key_regions, m, dim),
        "v": torch.randn(batch, key_regions, m, kv_heads, value_dim).permute(0, 3, 1, 2, 4),
        "routes": torch.arange(number).expand(batch, regions, -1) if popular else order,
    }
    if weights:
        tensors["route_weights"] = torch.rand(batch, regions, number)
    if mask:
        tensors["key_mask"] = torch.rand(*((batch,) if mask == 2 else ()), key_regions, m) > 0.5
    if shared:
        tensors["shared_k"], tensors["shared_v"] = (torch.randn(batch, kv_heads, shared, d) for d in (dim, value_dim))
    return Problem(ops.routed_attention, tensors, {"scale": 0.3})


def halo(
    batch: int = 1, heads: int = 2, height: int = 5, width: int = 4, block: int = 3, halo_size: int = 1, stride: int = 1,
    dim: int = 8, value_dim: int = 16, masked: bool = True, scale_positions: bool = False,
) -> Problem:  # fmt: skip
    """Blocks on a map; without a mask the map is made of whole blocks."""
    block *= stride
    if not masked:
        height, width = (-(-side // block) * block for side in (height, width))
    table = 2 * (block + 2 * halo_size) - 1
    tensors = {
        "q": torch.randn(batch, -(-height // stride), -(-width // stride), heads, dim).permute(0, 3, 1, 2, 4),
        "k": torch.randn(batch, height, width, heads, dim).permute(0, 3, 1, 2, 4),
        "v": torch.randn(batch, heads, height, width, value_dim),
        "height_rel": torch.randn(table, dim),
        "width_rel": torch.randn(table, dim),
    }
    return Problem(
        ops.halo_attention,
        tensors,
        {
            "block_size": block,
            "halo_size": halo_size,
            "query_stride": stride,
            "scale": 0.3,
            "scale_positions": scale_positions,
            "mask_padding": masked,
        },
    )


def core_context(
    batch: int = 2, kv_heads: int = 2, group: int = 2, per_query: bool = True, window: int = 5, pool: int = 3, queries: int = 40,
    start: int = 0, cut: bool = False, spare: int = 0, dim: int = 8, value_dim: int = 16,
) -> Problem:  # fmt: skip
    """Queries from place `start` on; `cut`: older keys than any of them sees are not there; `spare` core tokens that none sees."""
    heads, last = kv_heads * group, start + queries
    key_start = max(0, (start + 1 - window) // pool * pool) if cut else 0
    cores = max(0, (last - window) // pool) + spare
    core_heads = heads if per_query else kv_heads
    tensors = {
        "q": torch.randn(batch, queries, heads, dim).transpose(1, 2),
        "k": torch.randn(batch, last - key_start, kv_heads, dim).transpose(1, 2),
        "v": torch.randn(batch, kv_heads, last - key_start, value_dim),
        "core_k": torch.randn(batch, core_heads, cores, dim),
        "core_v": torch.randn(batch, core_heads, cores, value_dim),
    }
    places = {"window_size": window, "group_size": pool, "query_start": start, "key_start": key_start}
    return Problem(core_context_attention, tensors, {**places, "scale": 0.3})


def compare(problem: Problem) -> None:
    want, got = problem.run("reference"), problem.run("triton")
    for name, right in want.items():
        torch.testing.assert_close(got[name], right, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


DIMS = st.sampled_from([(8, 16), (16, 16), (24, 40), (40, 24)])


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 2), regions=st.integers(1, 6),
    key_regions=st.integers(1, 5), n=st.sampled_from([1, 3, 17]), m=st.sampled_from([1, 5, 18]), number=st.integers(1, 3),
    dims=DIMS, weights=st.booleans(), mask=st.integers(0, 2), popular=st.booleans(), shared=st.sampled_from([0, 0, 2]),
)  # fmt: skip
def test_routed_attention(dims: tuple[int, int], **sizes: Any) -> None:
    compare(routed(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    heads=st.integers(1, 2), height=st.integers(1, 5), width=st.integers(1, 5), block=st.integers(2, 3),
    halo_size=st.sampled_from([0, 1, 3]), stride=st.sampled_from([1, 1, 2]), dims=DIMS, masked=st.booleans(),
    scale_positions=st.booleans(),
)  # fmt: skip
def test_halo_attention(dims: tuple[int, int], **sizes: Any) -> None:
    compare(halo(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 2), per_query=st.booleans(),
    window=st.sampled_from([0, 1, 5, 70]), pool=st.sampled_from([1, 3, 8]), queries=st.sampled_from([1, 7, 40, 70]),
    start=st.sampled_from([0, 0, 11, 60]), cut=st.booleans(), spare=st.integers(0, 2), dims=DIMS,
)  # fmt: skip
def test_core_context_attention(dims: tuple[int, int], **sizes: Any) -> None:
    compare(core_context(dim=dims[0], value_dim=dims[1], **sizes))


# Sizes of which a block, a window or a list takes several tiles.
LARGE = {
    "routed": lambda: routed(1, 1, 1, 3, 3, n=130, m=70, number=3, dim=72),
    "routed-popular": lambda: routed(1, 1, 2, 40, 3, n=4, m=4, number=1, popular=True),
    "halo": lambda: halo(1, 1, 20, 18, block=9, halo_size=2, dim=72),
    "halo-strided": lambda: halo(1, 1, 20, 20, block=10, halo_size=3, stride=2, masked=False, scale_positions=True),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=list(LARGE))
def test_several_tiles(make: Callable[[], Problem]) -> None:
    compare(make())


MAKERS = {"routed": lambda: routed(1, weights=True, mask=1), "halo": halo, "core_context": core_context}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


@every
def test_half_precision(make: Callable[[], Problem]) -> None:
    kernels.check_half_precision(make())


@every
def test_in_one_graph(make: Callable[[], Problem]) -> None:
    kernels.check_in_one_graph(make())


@every
def test_registration(make: Callable[[], Problem]) -> None:
    assert len(kernels.check_registration(make())) == 2  # forward and backward


@every
@pytest.mark.gpu  # in the interpreter a run is one thread
def test_every_time_the_same(make: Callable[[], Problem]) -> None:
    kernels.check_every_time_the_same(make())


@pytest.mark.gpu
@every
def test_cuda_graphs(make: Callable[[], Problem]) -> None:
    kernels.check_cuda_graph(make())


@every
def test_empty_batches(make: Callable[[], Problem]) -> None:
    problem = make()
    batched = {"q", "k", "v", "routes", "route_weights", "core_k", "core_v"}
    empty = Problem(problem.operation, {n: t[:0] if n in batched else t for n, t in problem.tensors.items()}, problem.settings)
    for name, gradient in empty.run("triton").items():
        assert gradient.shape == empty.run("reference")[name].shape
        assert not gradient.any()


WIDE = ("q", "k", "core_k", "height_rel", "width_rel")  # what has the channels of queries


@every
@pytest.mark.parametrize(
    ("changes", "match"),
    [({"dropout_p": 0.5}, "dropout"), ({}, "float64"), ({"dim": 320}, "256")],
    ids=["dropout", "double", "wide"],
)
def test_what_a_kernel_refuses(make: Callable[[], Problem], changes: dict[str, Any], match: str) -> None:
    problem = make()
    tensors, given = dict(problem.tensors), {k: v for k, v in changes.items() if k != "dim"}
    if "dim" in changes:
        tensors = {n: t.new_zeros(*t.shape[:-1], 320) if n in WIDE else t for n, t in tensors.items()}
    if match == "float64":
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    tensors = {n: t.to(DEVICE) for n, t in tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        problem.operation(**tensors, **problem.settings, **given, backend="triton")
    problem.operation(**tensors, **problem.settings, **given)  # "auto" goes another way
