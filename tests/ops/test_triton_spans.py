"""The kernels of attention to binary spans against its plain code and the mechanism's; outputs, gradients, graphs, refusals.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets. Chunks of float32 are short, so that few tokens have many
levels there.
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
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(batch: int = 1, heads: int = 2, length: int = 37, dim: int = 8, value_dim: int = 16, pools: int = 0) -> dict[str, Tensor]:
    """Tensors of a call; `pools`: how many of what is pooled are apart from q and k."""

    def normal(channels: int) -> Tensor:
        return torch.randn(batch, length, heads, channels).transpose(1, 2)

    tensors = {"q": normal(dim), "k": normal(dim), "v": torch.randn(batch, heads, length, value_dim)}
    return tensors | {name: normal(dim) for name in ("pool_k", "pool_q")[:pools]}


def run(
    tensors: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float32, function: Any = ops.span_attention, **options: Any
) -> dict[str, Tensor]:
    """Output, log-normaliser, and gradients of a fixed functional of both, by name."""
    leaves = {name: t.to(DEVICE, dtype).requires_grad_() for name, t in tensors.items()}
    out, lse = function(**leaves, scale=0.4, return_lse=True, backend=backend, **options)
    objective = (out.float() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum()
    objective = objective + (lse * torch.linspace(1, -1, lse.numel(), device=DEVICE).view(lse.shape)).sum()
    gradients = torch.autograd.grad(objective, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare(tensors: dict[str, Tensor], **options: Any) -> None:
    want, got = run(tensors, "reference", **options), run(tensors, "triton", **options)
    for name, right in want.items():
        torch.testing.assert_close(got[name], right, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@FEW
@given(
    batch=st.sampled_from([1, 1, 2]), length=st.sampled_from([1, 2, 5, 17, 33]),
    dims=st.sampled_from([(8, 16), (16, 16), (24, 8)]), pools=st.integers(0, 2), is_causal=st.booleans(),
)  # fmt: skip
def test_small(dims: tuple[int, int], is_causal: bool, **sizes: Any) -> None:
    compare(make(heads=1, dim=dims[0], value_dim=dims[1], **sizes), is_causal=is_causal)


@pytest.mark.parametrize("length", [100] if DEVICE == "cpu" else [2048, 4097])
def test_many_levels(length: int) -> None:
    compare(make(1, 1, length, pools=1))


def test_equal_numbers_share_nothing() -> None:
    """The gradient of a pool goes to one of equal tokens: all of it arrives, once."""
    tensors = make(heads=1, length=21, dim=4, pools=2)
    tensors |= {name: tensors[name].round() for name in ("pool_q", "pool_k")}
    want, got = run(tensors, "reference"), run(tensors, "triton")
    for name in ("out", "lse", "q", "k", "v"):
        torch.testing.assert_close(got[name], want[name], atol=3e-5, rtol=2e-4)
    for name in ("pool_q", "pool_k"):
        torch.testing.assert_close(got[name].sum(2), want[name].sum(2), atol=3e-5, rtol=2e-4)


def test_half_precision() -> None:
    """Within what a plain computation in the same dtype may err. What is pooled differs from token to token in any precision."""
    length = 33 if DEVICE == "cpu" else 200
    tensors = make(1, 1, length, pools=2)
    for name in ("pool_q", "pool_k"):
        order = torch.rand(1, 1, length, 8).argsort(2)
        tensors[name] = (order - length // 2) / 64  # all of them exact
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,):  # numbers of numpy's interpret it
        rounded = {name: t.to(dtype).float() for name, t in tensors.items()}
        exact, got = run(rounded, "reference"), run(rounded, "triton", dtype)
        for name, right in exact.items():
            error = (got[name].float() - right).norm() / right.norm()
            assert error < 16 * torch.finfo(dtype).eps, f"{name} {dtype}: {error}"


def test_in_one_graph() -> None:
    tensors = make(heads=1, length=5)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = run(tensors, "triton", function=torch.compile(ops.span_attention, fullgraph=True, backend=backend))
    for name, right in run(tensors, "triton").items():
        torch.testing.assert_close(compiled[name], right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pools", [0, 1])
def test_registration(pools: int) -> None:
    """What the operators tell the compiler (shapes, strides, aliases, gradients) is what they do."""
    tensors, calls = make(heads=1, length=20, pools=pools), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "attention_zoo":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        return value.detach().clone() if isinstance(value, Tensor) else value

    with Record():
        run(tensors, "triton")
    assert len({func for func, _ in calls}) == 2
    for func, args in calls:
        torch.library.opcheck(func, copy(list(args)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu  # in the interpreter a run is one thread
def test_every_time_the_same() -> None:
    tensors = make(1, 1, length=40 if DEVICE == "cpu" else 2000)
    first, second = run(tensors, "triton"), run(tensors, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    leaves = {name: t.cuda().bfloat16().requires_grad_() for name, t in make(length=700, pools=2).items()}

    def once() -> tuple[Tensor, ...]:
        out = ops.span_attention(**leaves, backend="triton")
        assert isinstance(out, Tensor)
        return out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = once()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = once()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}, {"heads": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    tensors = make(**sizes)
    want = run(tensors, "reference")
    for name, tensor in run(tensors, "triton").items():
        assert tensor.shape == want[name].shape


@pytest.mark.parametrize(("channels", "kind", "match"), [(320, torch.float32, "256"), (8, torch.float64, "float64")], ids=str)
def test_what_the_kernels_refuse(channels: int, kind: torch.dtype, match: str) -> None:
    tensors = {name: t.to(DEVICE, kind) for name, t in make(length=3, dim=channels).items()}
    with pytest.raises(ops.BackendError, match=match):
        ops.span_attention(**tensors, backend="triton")
    ops.span_attention(**tensors)  # "auto" goes another way


def test_tensors_that_do_not_fit() -> None:
    tensors = make()
    with pytest.raises(ValueError, match="alike"):
        ops.span_attention(tensors["q"], tensors["k"][:, :, 1:], tensors["v"])


@pytest.mark.parametrize(("is_causal", "act"), [(True, "identity"), (False, "deepset")])
def test_the_mechanism(is_causal: bool, act: str) -> None:
    """Combiner's plain code, and the operation's, and the kernels: one result."""
    module = az.create_attention(
        "combiner", 16, 2, pattern="logsparse", is_causal=is_causal, summary_act=act, device=DEVICE
    )  # fmt: skip
    x = torch.randn(2, 21, 16, device=DEVICE)
    with ops.use_backend("torch"):
        want = module(x)
    with ops.use_backend("triton"):
        got = module(x)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_what_the_mechanism_keeps_from_the_kernels() -> None:
    x = torch.randn(1, 9, 16, device=DEVICE)
    for options, mask in (({"summary_pool": "sum"}, None), ({}, torch.ones(1, 9, dtype=torch.bool, device=DEVICE))):
        module = az.create_attention("combiner", 16, 2, pattern="logsparse", is_causal=True, device=DEVICE, **options)
        with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="spans"):
            module(x, attention_mask=mask)


def test_probabilities_for_those_who_look_on() -> None:
    """They weigh the values: the token itself, then one span of each level."""
    q, k, v = (t.to(DEVICE) for t in make(1, 1, 9).values())
    from attention_zoo.ops._tap import add_tap, remove_tap

    seen: list[Tensor] = []

    def tap(call: Any) -> Any:
        seen.append(call.weights(None))
        return call.proceed()

    add_tap(tap)
    try:
        ops.span_attention(q, k, v)
        ops.span_attention(q, k, v, is_causal=False)
    finally:
        remove_tap(tap)
    assert [t.shape[-1] for t in seen] == [5, 9]
    for weights in seen:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(seen[0][0, 0, 0], torch.eye(5, device=DEVICE)[0])
