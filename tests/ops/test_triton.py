"""Our kernels against the operations' plain code: random odd shapes, outputs and gradients; in graphs; what they refuse.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def with_lse(operation: Callable[..., Any], tensors: dict[str, Tensor], settings: dict[str, Any], **more: Any) -> Case:
    """A call whose log-normaliser is looked at too."""
    return Case(operation, tensors, {**settings, "return_lse": True}, ("lse",), ("out", "lse"), **more)


def routed(
    batch: int = 2, kv_heads: int = 1, group: int = 2, regions: int = 5, key_regions: int = 4, n: int = 5, m: int = 3,
    number: int = 2, dim: int = 8, value_dim: int = 16, weights: bool = False, mask: int = 0, popular: bool = False,
    shared: int = 0,
) -> Case:  # fmt: skip
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
    return with_lse(ops.routed_attention, tensors, {"scale": 0.3}, unbatched=("key_mask",) if mask == 1 else ())


def halo(
    batch: int = 1, heads: int = 2, height: int = 5, width: int = 4, block: int = 3, halo_size: int = 1, stride: int = 1,
    dim: int = 8, value_dim: int = 16, masked: bool = True, scale_positions: bool = False,
) -> Case:  # fmt: skip
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
    return with_lse(
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
        unbatched=("height_rel", "width_rel"),
    )


def core_context(
    batch: int = 2, kv_heads: int = 2, group: int = 2, per_query: bool = True, window: int = 5, pool: int = 3, queries: int = 40,
    start: int = 0, cut: bool = False, spare: int = 0, dim: int = 8, value_dim: int = 16,
) -> Case:  # fmt: skip
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
    return with_lse(core_context_attention, tensors, {**places, "scale": 0.3})


def compare(problem: Case) -> None:
    kernels.check_against_plain_code(problem, size=kernels.constant)


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
def test_several_tiles(make: Callable[[], Case]) -> None:
    compare(make())


MAKERS = {
    "routed": lambda: routed(1, weights=True, mask=1),
    "halo": lambda: halo(heads=1),
    "core_context": lambda: core_context(kv_heads=1, queries=24),
}


@kernels.each_check(MAKERS)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


WIDE = ("q", "k", "core_k", "height_rel", "width_rel")  # what has the channels of queries


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize(
    ("changes", "match"),
    [({"dropout_p": 0.5}, "dropout"), ({}, "float64"), ({"dim": 320}, "256")],
    ids=["dropout", "double", "wide"],
)
def test_what_a_kernel_refuses(make: Callable[[], Case], changes: dict[str, Any], match: str) -> None:
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
