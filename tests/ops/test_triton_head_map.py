"""Key/value heads named by a map: the kernels against copies and the libraries; the map itself against the mechanism's plain code.

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

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention.kdgqa import allocation_to_head_map, key_driven_allocation
from attention_zoo.ops.head_map import select_heads

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LENGTHS = [1, 3, 18] if DEVICE == "cpu" else [1, 18, 197, 1000]


def heads(batch: int, number: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, number, dim, device=DEVICE).transpose(1, 2).to(dtype)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("batch", [0, 2])
def test_equal_norms_are_shared_out_evenly(value: float, batch: int) -> None:
    from attention_zoo.ops.triton.head_map import allocate_heads

    allocation, head_map = allocate_heads(torch.full((batch, 3, 4, 8), value, device=DEVICE), 8, False)
    assert allocation.tolist() == [3, 3, 2]
    assert head_map.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("num_heads", [3, 12])
def test_many_keys_and_samples_of_few_heads(num_heads: int) -> None:
    """More parts and samples than the kernels read at once."""
    from attention_zoo.ops.triton.head_map import allocate_heads

    k = heads(70, 3, 2, 2) if num_heads == 3 else heads(1, 3, 700, 2)
    assert torch.equal(allocate_heads(k, num_heads, False)[0], key_driven_allocation(k, num_heads, None, "batch"))


def attend(
    batch: int = 2, kv_heads: int = 3, length: int = 18, dim: int = 8, value_dim: int = 16, each: bool = True, learns: bool = False
) -> Case:  # fmt: skip
    """Five heads of queries, and a map that leaves a head out, of each sample its own or one for all. Kernels do not learn."""
    maps = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=DEVICE).clamp(max=kv_heads - 1)
    q, k, v = heads(batch, 5, length, dim), heads(batch, kv_heads, length, dim), heads(batch, kv_heads, length, value_dim)
    tensors = {"q": q, "k": k, "v": v, "head_map": maps[:batch] if each else maps[0]}
    return Case(_attend, tensors, unbatched=() if each else ("head_map",), learns=learns, operators=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, head_map: Tensor, *, backend: str) -> Tensor:
    with ops.use_backend(backend):
        return ops.attention_by_head_map(q, k, v, head_map)


def copies(length: int = 18, each: bool = True) -> Case:
    case = attend(length=length, each=each)
    tensors = {name: case.tensors[name] for name in ("k", "v", "head_map")}
    return Case(_copy, tensors, outputs=("copies_of_k", "copies_of_v"), unbatched=case.unbatched)


def _copy(k: Tensor, v: Tensor, head_map: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    from attention_zoo.ops.triton.head_map import copy_heads

    return copy_heads(k, v, head_map) if backend == "triton" else (select_heads(k, head_map), select_heads(v, head_map))


def allocation(batch: int = 2, kv_heads: int = 3, length: int = 18, dim: int = 8, num_heads: int = 5, each: bool = True) -> Case:
    k = heads(batch, kv_heads, length, dim) * torch.rand(batch, kv_heads, 1, 1, device=DEVICE)
    settings = {"num_heads": num_heads, "each": each}
    return Case(_allocate, {"k": k}, settings, outputs=("allocation", "head_map"), learns=False, operators=1)


def _allocate(k: Tensor, *, num_heads: int, each: bool, backend: str) -> tuple[Tensor, Tensor]:
    from attention_zoo.ops.triton.head_map import allocate_heads

    if backend == "triton":
        return allocate_heads(k, num_heads, each)
    allocation = key_driven_allocation(k, num_heads, None, "sample" if each else "batch")
    return allocation, allocation_to_head_map(allocation, num_heads)


@FEW
@given(
    batch=st.integers(1, 3), kv_heads=st.sampled_from([1, 2, 3, 5]), more=st.integers(0, 4), length=st.sampled_from(LENGTHS),
    dim=st.sampled_from([4, 8, 24]), each=st.booleans(),
)  # fmt: skip
def test_the_allocation(kv_heads: int, more: int, **sizes: Any) -> None:
    kernels.check_against_plain_code(allocation(kv_heads=kv_heads, num_heads=kv_heads + more, **sizes), atol=0, rtol=0)


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 3), length=st.sampled_from(LENGTHS), dim=st.sampled_from([8, 24]),
    each=st.booleans(),
)  # fmt: skip
def test_attention(**sizes: Any) -> None:
    kernels.check_against_plain_code(attend(**sizes), atol=1e-5, size=kernels.constant)


@pytest.mark.parametrize("length", [70, 130])
def test_several_tiles(length: int) -> None:
    kernels.check_against_plain_code(attend(1, length=length, dim=16), atol=1e-5, size=kernels.constant)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_copies_and_their_gradients(each: bool, length: int) -> None:
    case = copies(length, each)
    got, want = case.run("triton"), case.run("reference")
    assert all(torch.equal(got[name], want[name]) for name in case.outputs)
    torch.testing.assert_close(got, want)
    assert not got["k"][:, 2].any()  # nobody reads it


MAKERS: dict[str, Callable[[], Case]] = {
    "attend": lambda: attend(dim=16),
    "copy": copies,
    "allocate": allocation,
    "allocate-together": lambda: allocation(each=False),
}


@kernels.each_check(
    MAKERS,
    half_precision={name: MAKERS[name] for name in ("attend", "copy")},  # an allocation is of whole numbers
    empty_batch={"copy": copies},  # nothing attends there
)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_the_device(dtype: torch.dtype) -> None:
    case = attend(length=197, dim=64, value_dim=64, learns=True)
    got = case.run("auto", dtype)
    for name, want in case.run("reference").items():
        error = (got[name].float() - want).norm() / want.norm().clamp_min(1e-6)
        assert error < max(2e-3, 10 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("training", [False, True])
def test_the_mechanism_in_one_graph(training: bool) -> None:
    module = az.create_attention("kdgqa", 24, 6, num_kv_heads=3, device=DEVICE)
    x = torch.randn(2, 7, 24, device=DEVICE, requires_grad=training)
    torch._dynamo.reset()
    with ops.use_backend("auto" if training or DEVICE == "cuda" else "triton"), torch.set_grad_enabled(training):
        compiled = torch.compile(module, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")(x)
        torch.testing.assert_close(compiled, module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_the_mechanism(scope: str) -> None:
    """With kernels and without: one allocation, one result."""
    module = az.create_attention("kdgqa", 24, 6, num_kv_heads=3, alloc_scope=scope, device=DEVICE)
    x = torch.randn(2, 7, 24, device=DEVICE)
    found = []
    with torch.no_grad():
        for backend in ("torch", "triton"):
            with ops.use_backend(backend):
                found.append((module(x), module.last_allocation))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    """The allocation goes beside the projections in a graph; a replay follows new tokens."""
    module = az.create_attention("kdgqa", 128, 8, num_kv_heads=4, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 50, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def once() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            quiet = module(x)
        loud = module(x)
        return quiet, loud, torch.autograd.grad(loud.float().square().sum(), x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = once()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(got, once(), strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def test_maps_that_do_not_fit() -> None:
    tensors = attend().tensors
    head_map = tensors.pop("head_map")
    for wrong, match in ((head_map[:, 1:], "head_map"), (head_map.int(), "int64")):
        with pytest.raises(ValueError, match=match):
            ops.attention_by_head_map(**tensors, head_map=wrong)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    case = attend(**sizes)
    assert case.run("auto")["out"].shape == (*case.tensors["q"].shape[:3], 16)


@pytest.mark.parametrize("kind", ["diff", "ema"])
@pytest.mark.parametrize("training", [True, False])
def test_what_evolves(kind: str, training: bool) -> None:
    """With kernels and without: the same allocations, cached norms and counters, forward by forward."""
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        module = az.create_attention("dgqa", 24, 7, head_dim=4, num_kv_heads=3, kind=kind, window_size=2, device=DEVICE).train(
            training
        )
        states = []
        for step in (None, None, 4, 5, None):
            x = torch.randn(2, 7, 24, device=DEVICE)
            with ops.use_backend(backend), torch.no_grad():
                y = module(x, training_step=step)
            states += [y, module.cache.clone(), module.allocation.clone(), module.step.clone(), module.last_allocation]
        found.append(states)
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
