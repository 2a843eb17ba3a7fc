"""Key/value heads named by a map: the kernels against copies and the libraries; the map itself against the mechanism's plain code.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import FEW
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention.kdgqa import allocation_to_head_map, key_driven_allocation
from attention_zoo.ops.head_map import select_heads

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 3, 18] if DEVICE == "cpu" else [1, 18, 197, 1000]


def heads(batch: int, number: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, number, dim, device=DEVICE).transpose(1, 2).to(dtype)


@FEW
@given(
    batch=st.integers(1, 3), kv_heads=st.sampled_from([1, 2, 3, 5]), more=st.integers(0, 4), length=st.sampled_from(LENGTHS),
    dim=st.sampled_from([4, 8, 24]), each=st.booleans(),
)  # fmt: skip
def test_the_allocation(batch: int, kv_heads: int, more: int, length: int, dim: int, each: bool) -> None:
    from attention_zoo.ops.triton.head_map import allocate_heads

    k, num_heads = heads(batch, kv_heads, length, dim) * torch.rand(batch, kv_heads, 1, 1, device=DEVICE), kv_heads + more
    allocation, head_map = allocate_heads(k, num_heads, each)
    assert torch.equal(allocation, key_driven_allocation(k, num_heads, None, "sample" if each else "batch"))
    assert torch.equal(head_map, allocation_to_head_map(allocation, num_heads))


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


def call(
    batch: int = 2, kv_heads: int = 3, length: int = 18, dim: int = 8, value_dim: int = 16, each: bool = True
) -> dict[str, Tensor]:
    """q of five heads, k, v and a map that leaves a head out, of each sample its own or one for all."""
    maps = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=DEVICE).clamp(max=kv_heads - 1)
    q, k, v = heads(batch, 5, length, dim), heads(batch, kv_heads, length, dim), heads(batch, kv_heads, length, value_dim)
    return {"q": q, "k": k, "v": v, "head_map": maps[:batch] if each else maps[0]}


def run(tensors: dict[str, Tensor], backend: str, grad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, and the gradients of a fixed functional of it."""
    leaves = [t.to(dtype).requires_grad_(grad) for t in (tensors["q"], tensors["k"], tensors["v"])]
    with ops.use_backend(backend):
        out = ops.attention_by_head_map(*leaves, tensors["head_map"])
    if not grad:
        return [out]
    return [
        out.detach(),
        *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum(), leaves),
    ]


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 3), length=st.sampled_from(LENGTHS), dim=st.sampled_from([8, 24]),
    each=st.booleans(),
)  # fmt: skip
def test_attention(**sizes: Any) -> None:
    tensors = call(**sizes)
    torch.testing.assert_close(run(tensors, "triton", False), run(tensors, "torch", False), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [70, 130])
def test_several_tiles(length: int) -> None:
    tensors = call(1, length=length, dim=16)
    torch.testing.assert_close(run(tensors, "triton", False), run(tensors, "torch", False), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_copies_and_their_gradients(each: bool, length: int) -> None:
    from attention_zoo.ops.triton.head_map import copy_heads

    tensors = call(length=length, each=each)
    found = []
    for copy in (copy_heads, lambda k, v, head_map: (select_heads(k, head_map), select_heads(v, head_map))):
        leaves = [tensors[name].clone().requires_grad_() for name in "kv"]
        copies = copy(*leaves, tensors["head_map"])
        objective = sum((c * torch.linspace(-1, 1, c.numel(), device=DEVICE).view_as(c)).sum() for c in copies)
        found.append([*copies, *torch.autograd.grad(objective, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    torch.testing.assert_close(found[0][2:], found[1][2:])
    assert not found[0][2][:, 2].any()  # nobody reads it


def test_half_precision() -> None:
    tensors = call(dim=16)
    (exact,) = run(tensors, "torch", False)
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,):  # numbers of numpy's interpret it
        (got,) = run(tensors, "triton", False, dtype)
        assert (got.float() - exact).norm() / exact.norm() < 6 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_the_device(dtype: torch.dtype) -> None:
    tensors = call(length=197, dim=64, value_dim=64)
    for got, want in zip(run(tensors, "auto", True, dtype), run(tensors, "reference", True), strict=True):
        assert (got.float() - want).norm() / want.norm().clamp_min(1e-6) < max(2e-3, 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("operator", ["attend", "copy", "allocate"])
def test_registration(operator: str) -> None:
    """What the operators tell the compiler (shapes, strides, aliases) is what they do."""
    from attention_zoo.ops.triton import head_map as kernels

    tensors = call()
    k = tensors["k"]
    arguments: list[tuple[Any, tuple[Any, ...]]] = {
        "attend": [(kernels._attend_by_map, (tensors["q"], k, tensors["v"], tensors["head_map"], 0.3))],
        "copy": [
            (kernels._copy_heads, (k, tensors["v"], tensors["head_map"])),
            (kernels._add_up_heads, (tensors["q"], tensors["q"].clone(), tensors["head_map"], 3)),
        ],
        "allocate": [(kernels._allocate_heads, (k, 5, True)), (kernels._allocate_heads, (k, 5, False))],
    }[operator]
    for function, args in arguments:
        torch.library.opcheck(function.registered, args, test_utils=("test_schema", "test_faketensor"))


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
    tensors = call()
    with pytest.raises(ValueError, match="head_map"):
        ops.attention_by_head_map(tensors["q"], tensors["k"], tensors["v"], tensors["head_map"][:, 1:])
    with pytest.raises(ValueError, match="int64"):
        ops.attention_by_head_map(tensors["q"], tensors["k"], tensors["v"], tensors["head_map"].int())


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    tensors = call(**sizes)
    assert run(tensors, "auto", False)[0].shape == (*tensors["q"].shape[:3], 16)


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
