"""Operators that an eager call reaches without the dispatcher, and that everybody else sees."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attention_zoo as az
from attention_zoo.ops._operators import operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS: list[Tensor] = []  # what the function was called with, in the order of the calls


@operator("test_scaled")
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Twice the same, and a number that nobody learns from."""
    RUNS.append(x)
    return x * factor, x.new_full((1,), 3, dtype=torch.int32)


@scaled.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((1,), dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.factor = inputs[1]


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return grad * ctx.factor, None


scaled.register_autograd(_backward, setup_context=_setup)


@operator("test_total")
def total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


@total.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


total.register_autograd(
    lambda ctx, grad: [grad] * ctx.number, setup_context=lambda ctx, inputs, output: setattr(ctx, "number", len(inputs[0]))
)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_runs() -> None:
    RUNS.clear()


def test_an_eager_call_is_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "registered", None)  # nobody asks for it
    x = torch.randn(3, requires_grad=True)
    out, number = scaled(x, 2.0)
    assert torch.equal(out, 2 * x)
    assert not number.requires_grad
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.full((3,), 2.0))
    with torch.no_grad():
        assert scaled(x, 2.0)[0].grad_fn is None
    assert scaled(x.detach(), 2.0)[0].grad_fn is None


@pytest.mark.parametrize("learns", [False, True])
def test_who_looks_on_sees_the_operator(learns: bool) -> None:
    x = torch.randn(3, requires_grad=learns)
    with Seen() as seen:
        out = scaled(x, 2.0)[0]
    assert "attention_zoo::test_scaled" in seen.names
    assert out.requires_grad == learns


def test_without_data() -> None:
    assert scaled(torch.empty(3, device="meta"), 2.0)[0].shape == (3,)
    assert not RUNS


def test_compiled_in_one_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    out = torch.compile(lambda x: scaled(x, 2.0)[0] + 1, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(out, 2 * x + 1)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 2.0))


def test_transforms_see_the_operator() -> None:
    x = torch.randn(2, 3)
    torch.testing.assert_close(vmap(lambda row: scaled(row, 2.0)[0])(x), 2 * x)


def test_derivatives_that_there_are_none_of() -> None:
    """Each is refused, not left out."""
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(scaled(x, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        torch.autograd.grad(gradient.sum(), x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="test_scaled"):
            scaled(dual, 2.0)
        scaled(torch.randn(3), 2.0)  # has nothing to do with it


def test_subclasses_of_tensors_see_the_operator() -> None:
    class Named(Tensor):
        pass

    out = scaled(torch.randn(3).as_subclass(Named), 2.0)[0]
    assert isinstance(out, Named)


def test_lists_of_tensors() -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    assert torch.equal(total([y, y]), 2 * y)
    out = total([x, y])
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are() -> None:
    cases: list[tuple[str, dict[str, Any], int]] = [("hilo", {}, 196), ("agent", {}, 196), ("moh", {}, 64)]
    cases += [("bra", {"n_win": 7, "topk": 2}, 196), ("halo", {"block_size": 7, "halo_size": 2}, 196)]
    for name, options, n in cases:
        module = az.create_attention(name, 64, 4, **options, device="cuda:1", dtype=torch.bfloat16)
        x = torch.randn(2, n, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
        grid = {"grid_size": (14, 14)} if module.attention_info.spatial else {}
        assert torch.cuda.current_device() == 0
        with az.ops.use_backend("auto"):
            got = module(x, **grid)
        got.float().square().sum().backward()
        with az.ops.use_backend("reference"):
            want = module(x, **grid)
        assert (got.float() - want.float()).norm() / want.float().norm() < 2e-2, name
        assert x.grad is not None
        assert x.grad.isfinite().all()


_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("hilo", {}),
    ("agent", {"agent_num": 4, "window_size": (4, 6)}),
    ("bra", {"n_win": 2, "topk": 2}),
    ("halo", {"block_size": 2, "halo_size": 1}),
    ("moh", {"num_heads": 4}),
    ("moh", {"num_heads": 4, "num_kv_heads": 2, "router": "query_norm"}),
]


def _layer(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A layer of 32 channels, in evaluation, where it keeps no loss, and what it has to be told about 24 tokens."""
    layer = az.create_attention(name, 32, **{"num_heads": 2, **options}, device=DEVICE).eval()
    return layer, {"grid_size": (4, 6)} if layer.attention_info.spatial else {}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "options"), _LAYERS)
def test_layers_of_one_node_take_tokens_that_lie_anyhow(name: str, options: dict[str, Any]) -> None:
    """Also again on a GPU, where launches are settled by then; without gradients they compute the same."""
    (layer, grid), tokens = _layer(name, options), torch.randn(2 * 24 * 64 + 1, device=DEVICE)
    begins_late = tokens[1:].view(4, 24, 32)
    given = {"among others": tokens[:-1].view(2, 24, 64)[..., ::2], "begin late": begins_late[:1], "none": begins_late[:0]}
    again = 2 if DEVICE == "cuda" else 1
    for kind, some in given.items():
        x = some.detach().requires_grad_()
        results = []
        for backend in ("reference", *["triton"] * again):
            with az.ops.use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                out = layer(x, **grid)
                with torch.no_grad():
                    assert torch.equal(layer(x, **grid), out), kind
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        assert type(out.grad_fn).__name__.endswith("LayerBackward")
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-4, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "options"), _LAYERS)
def test_layers_of_one_node_in_one_graph(name: str, options: dict[str, Any]) -> None:
    """Compilers get the operations one by one, and compute the same, as checkpoints do."""
    layer, grid = _layer(name, options)
    x = torch.randn(2, 24, 32, device=DEVICE, requires_grad=True)

    def run(function: Any) -> tuple[Tensor, ...]:
        out = function(x, **grid)
        return out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    with az.ops.use_backend("triton"):
        want = run(layer)
        assert type(want[0].grad_fn).__name__.endswith("LayerBackward")
        for function in (compiled, functools.partial(checkpoint, layer, use_reentrant=False)):
            torch.testing.assert_close(run(function), want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("name", "options"),
    [("agent", {"agent_num": 4, "window_size": (4, 6)}), ("halo", {"block_size": 2, "halo_size": 1, "qkv_bias": True})],
)
def test_layers_of_one_node_under_autocast(name: str, options: dict[str, Any]) -> None:
    """Parameters keep their dtype, and get gradients of it."""
    layer = az.create_attention(name, 32, 2, **options, device=DEVICE)
    x = torch.randn(2, 24, 32, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        with az.ops.use_backend(backend), torch.autocast(DEVICE, torch.float16):
            out = layer(x, grid_size=(4, 6))
        gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append((out.float(), *gradients))
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()
