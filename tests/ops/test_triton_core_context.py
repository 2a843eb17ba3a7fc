"""The kernels of core-context attention beyond a prompt: pooling, few queries, samples that start at different places.

`test_triton.py` has the attention itself, and what a test of a kernel looks like.
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
from attention_zoo.ops.core_context import core_context_attention, pool_core_tokens
from tests.ops.test_triton import DIMS, compare, core_context

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SCALE_UP = 8 if DEVICE == "cuda" else 1  # the interpreter is slow


def pool_in_place(q: Tensor, k: Tensor, v: Tensor, *, group_size: int, **how: Any) -> tuple[Tensor, Tensor]:
    """As a module pools: the queries of the last tokens are a slice of all, a rest that fills no group is left out."""
    whole = k.shape[2] // group_size * group_size
    lasts = q[:, :, group_size - 1 : whole : group_size]
    return pool_core_tokens(lasts, k[:, :, :whole], v[:, :, :whole], group_size=group_size, **how)


def pooling(
    batch: int = 2, kv_heads: int = 2, group: int = 2, per: str = "query", size: int = 3, groups: int = 5, rest: int = 1,
    dim: int = 8, value_dim: int = 16,
) -> Case:  # fmt: skip
    length = groups * size + rest
    tensors = {
        "q": torch.randn(batch, length, kv_heads * group, dim).transpose(1, 2),
        "k": torch.randn(batch, length, kv_heads, dim).transpose(1, 2),
        "v": torch.randn(batch, kv_heads, length, value_dim),
    }
    settings = {"group_size": size, "core_per": per, "scale": 0.3}
    return Case(pool_in_place, tensors, settings, outputs=("core_k", "core_v"))


def at_places(
    batch: int = 3, queries: int = 4, window: int = 5, pool: int = 3, key_too: bool = True, furthest: int = 20, **sizes: Any
) -> Case:
    """Each sample's queries start somewhere else, and with `key_too` its keys; some keys stand before the first token."""
    problem = core_context(batch, queries=furthest, window=window, pool=pool, **sizes)
    tensors = problem.tensors
    starts = torch.randint(0, furthest - queries + 1, (batch,))
    tensors["q"] = tensors["q"][:, :, :queries]
    del problem.settings["query_start"], problem.settings["key_start"]
    tensors["query_start"] = starts
    if key_too:  # keys up to the sample's last query, wherever that is
        tensors["key_start"] = starts + queries - furthest
    return problem


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 3), per=st.sampled_from(["query", "kv"]),
    size=st.sampled_from([1, 3, 8, 16]), groups=st.sampled_from([1, 6, 19]), rest=st.integers(0, 2), dims=DIMS,
)  # fmt: skip
def test_pooling(dims: tuple[int, int], groups: int, **sizes: Any) -> None:
    compare(pooling(dim=dims[0], value_dim=dims[1], groups=groups * SCALE_UP, **sizes))


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.sampled_from([1, 3, 4]), per_query=st.booleans(),
    window=st.sampled_from([0, 5, 70]), pool=st.sampled_from([1, 3]), queries=st.integers(1, 8), cut=st.booleans(),
    start=st.sampled_from([0, 3, 60, 140]), spare=st.sampled_from([0, 3]), dims=DIMS,
)  # fmt: skip
def test_few_queries(dims: tuple[int, int], start: int, **sizes: Any) -> None:
    """The keys are split between programs, also when there are no core tokens yet."""
    compare(core_context(dim=dims[0], value_dim=dims[1], start=start * SCALE_UP, **sizes))


@FEW
@given(
    kv_heads=st.integers(1, 2), group=st.integers(1, 2), per_query=st.booleans(), window=st.sampled_from([0, 5]),
    pool=st.sampled_from([1, 3]), queries=st.sampled_from([1, 4, 12]), key_too=st.booleans(), furthest=st.sampled_from([16, 40]),
)  # fmt: skip
def test_samples_at_different_places(furthest: int, **sizes: Any) -> None:
    compare(at_places(2, furthest=furthest * SCALE_UP, **sizes))


MAKERS: dict[str, Callable[[], Case]] = {
    "pooling": lambda: pooling(1),
    "pooling-kv": lambda: pooling(1, per="kv", size=4),
    "decode": lambda: core_context(1, 1, start=30, queries=1),
    "decode-places": lambda: at_places(2, kv_heads=1),
    "places": lambda: at_places(2, 10, kv_heads=1),
}


@kernels.each_check(MAKERS, one_graph={name: MAKERS[name] for name in ("pooling", "decode-places")})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_no_groups_give_no_core_tokens() -> None:
    compare(pooling(groups=0, rest=2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"pool": "mean"}, "single reduction"), ({"group_size": 256}, "more than 64 tokens")],
    ids=["mean", "large"],
)
def test_what_the_pooling_kernel_refuses(changes: dict[str, Any], match: str) -> None:
    how: dict[str, Any] = {"group_size": 4, **changes}
    k = torch.randn(1, 2, 256, 8, device=DEVICE)
    q = k[:, :, how["group_size"] - 1 :: how["group_size"]]
    with pytest.raises(ops.BackendError, match=match):
        pool_core_tokens(q, k, k, **how, backend="triton")
    pool_core_tokens(q, k, k, **how)  # "auto" goes another way


def test_many_portions_of_the_keys() -> None:
    """More core keys than one program takes, of which the last is not full, and several heads in one tile."""
    compare(core_context(1, 1, 4, per_query=False, window=40, pool=1, queries=2, start=300, dim=16))


def test_the_operation_is_the_same_for_few_and_many_queries() -> None:
    problem = core_context(1, 1, 2, queries=12, start=30)
    tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
    whole, _ = core_context_attention(**tensors, **problem.settings, backend="triton")
    few = {**tensors, "q": tensors["q"][:, :, :5]}
    part, _ = core_context_attention(**few, **problem.settings, backend="triton")
    torch.testing.assert_close(part, whole[:, :, :5], atol=1e-5, rtol=1e-5)
