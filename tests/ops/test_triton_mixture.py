"""The kernels that compute chosen (token, head) pairs only, against all heads times their gates: outputs and gradients.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import FEW
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LONG = 9 if ON_GPU else 1  # times as long on a GPU


@dataclass
class Problem:
    """A call of `ops.mixture_attention` in float32, and the mask of what it computes, (B, H, N)."""

    tensors: dict[str, Tensor]
    chosen: Tensor
    topk: int
    settings: dict[str, Any]

    @property
    def active(self) -> Tensor:
        shared = self.tensors["q"].shape[1] - self.chosen.shape[-1]
        return nn.functional.pad(self.chosen.float(), (shared, 0), value=1.0).transpose(1, 2).to(DEVICE)

    def run(self, backend: str, dtype: torch.dtype = torch.float32, function: Any = ops.mixture_attention) -> dict[str, Tensor]:
        """Output and gradients of a fixed functional of it, by name; gradients of gates where pairs are computed."""
        kept = {name: torch.float32 if name == "gates" else dtype for name in self.tensors}
        leaves = {name: t.to(DEVICE, kept[name]).requires_grad_() for name, t in self.tensors.items()}
        out = function(**leaves, chosen=self.chosen.to(DEVICE), topk=self.topk, **self.settings, backend=backend)
        slopes = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        gradients = dict(zip(leaves, torch.autograd.grad((out.float() * slopes).sum(), list(leaves.values())), strict=True))
        gradients["gates"] = gradients["gates"] * self.active
        return {"out": out.detach(), **gradients}


def mixture(
    batch: int = 2, kv_heads: int = 2, group: int = 2, shared: int = 1, topk: int = 2, tokens: int = 20, keys: int | None = None,
    dim: int = 16, value_dim: int = 16, is_causal: bool = False, popular: bool = False, boolean: bool = False,
) -> Problem:  # fmt: skip
    """`popular`: all tokens choose the same heads, so that nobody chooses the others."""
    heads, keys = kv_heads * group, tokens if keys is None else keys
    routed = heads - shared
    order = torch.arange(routed).expand(batch, tokens, -1) if popular else torch.rand(batch, tokens, routed).argsort(-1)
    chosen = torch.zeros(batch, tokens, routed).scatter(-1, order[..., :topk], 1.0)
    tensors = {
        "q": torch.randn(batch, tokens, heads, dim).transpose(1, 2),
        "k": torch.randn(batch, kv_heads, keys, dim),
        "v": torch.randn(batch, keys, kv_heads, value_dim).transpose(1, 2),
        "gates": torch.rand(batch, tokens, heads).transpose(1, 2)
        * nn.functional.pad(chosen, (shared, 0), value=1.0).transpose(1, 2),
    }
    return Problem(tensors, chosen.bool() if boolean else chosen, topk, {"scale": 0.3, "is_causal": is_causal})


def compare(problem: Problem, function: Any = ops.mixture_attention) -> None:
    """Sums over many tokens are as exact as the largest of them lets them be."""
    want, got = problem.run("reference"), problem.run("triton", function=function)
    for name, right in want.items():
        atol = 2e-5 * max(1.0, float(right.abs().max()))
        torch.testing.assert_close(got[name], right, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 3), group=st.integers(1, 3), shared=st.integers(0, 4), topk=st.integers(0, 4),
    tokens=st.sampled_from([1, 5, 33 * LONG]), more=st.sampled_from([0, 0, -3, 7]), is_causal=st.booleans(),
    dims=st.sampled_from([(8, 16), (16, 16), (20, 12), (40, 24)]), popular=st.booleans(), boolean=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(more: int, dims: tuple[int, int], seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    heads = options["kv_heads"] * options["group"]
    options["shared"] = min(options["shared"], heads)
    options["topk"] = min(options["topk"], heads - options["shared"])
    compare(mixture(keys=max(1, options["tokens"] + more), dim=dims[0], value_dim=dims[1], **options))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 150 * LONG, "is_causal": True, "kv_heads": 1, "topk": 1},
        {"tokens": 150 * LONG, "keys": 70, "shared": 2, "topk": 1},
        {"tokens": 70 * LONG, "keys": 150 * LONG, "shared": 3, "topk": 1, "is_causal": True},
    ],
    ids=["causal", "keys", "more keys"],
)
def test_several_tiles(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    compare(mixture(batch=1, dim=8, **options))


@pytest.mark.parametrize("options", [{"shared": 0, "topk": 4}, {"shared": 4, "topk": 0}], ids=["all chosen", "all shared"])
def test_nothing_to_skip(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    compare(mixture(tokens=7, **options))


@pytest.mark.parametrize("options", [{"batch": 0}, {"tokens": 0}, {"keys": 0}], ids=str)
def test_empty(options: dict[str, int]) -> None:
    problem = mixture(**options)
    for name, got in problem.run("triton").items():
        like = problem.tensors.get(name, got)
        assert got.shape == like.shape, name
        assert not got.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision(dtype: torch.dtype, is_causal: bool) -> None:
    torch.manual_seed(0)
    problem = mixture(batch=1, tokens=40 * LONG, dim=24, is_causal=is_causal)
    want, got = problem.run("reference"), problem.run("triton", dtype)
    for name, right in want.items():
        error = (got[name].float() - right).norm() / right.norm()
        assert error < 2e-2, f"{name}: {error}"


@pytest.mark.gpu  # in the interpreter a run is one thread
def test_same_result_every_time() -> None:
    torch.manual_seed(0)
    problem = mixture(tokens=33 * LONG)
    first, second = problem.run("triton"), problem.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_choices_that_are_not_top_k_touch_nothing_else() -> None:
    """A token that has chosen more heads than it may, which is not checked, must not write where it should not."""
    torch.manual_seed(0)
    problem = mixture(topk=1, shared=0)
    problem.chosen[0, 3] = 1.0
    problem.chosen[0, 4] = 0.0
    assert problem.run("triton")["out"].isfinite().all()


def test_compiled() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(ops.mixture_attention, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    compare(mixture(batch=1, tokens=20, is_causal=True), compiled)


def test_operator_is_well_made() -> None:
    from attention_zoo.ops.triton.mixture import _mixture_forward

    problem = mixture(batch=1, tokens=9)
    arguments = (*(t.to(DEVICE) for t in problem.tensors.values()), problem.chosen.to(DEVICE), problem.topk, 0, 0.3, False)
    torch.library.opcheck(_mixture_forward.registered, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, "no mask"),
        ({"dropout_p": 0.5}, "no dropout"),
        ({"scale": -1.0}, "positive scale"),
        ({"topk": 4}, "topk must be from 0 to the 3 heads"),
        ({"chosen": torch.ones(2, 20, 5)}, "chosen must be"),
        ({"gates": torch.ones(2, 20, 4)}, "gates must be"),
        ({"v": torch.ones(2, 2, 19, 16)}, "q must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    problem = mixture()
    call = {**problem.tensors, "chosen": problem.chosen, "topk": problem.topk, "backend": "triton", **change}
    with pytest.raises(ValueError, match=message):
        ops.mixture_attention(**{name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in call.items()})


@pytest.mark.parametrize(
    "options",
    [{"shared_heads": 1, "routed_topk": 1}, {"router": "query_norm", "router_grad": "ste", "num_kv_heads": 2, "is_causal": True}],
    ids=["linear", "query norm"],
)
def test_layer(options: dict[str, Any]) -> None:
    """Outputs and the gradients of all parameters, those of the routers among them."""
    torch.manual_seed(0)
    module = az.create_attention("moh", dim=32, num_heads=4, device=DEVICE, **options)
    x = torch.randn(2, 19, 32, device=DEVICE)
    found = []
    for backend in ("reference", "triton"):
        module.zero_grad()
        with ops.use_backend(backend):
            out = module(x)
        (out.square().sum() + module.aux_loss).backward()
        found.append({"out": out.detach(), **{name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}})
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options", [{"shared": 4, "topk": 4}, {"shared": 0, "topk": 8}, {"shared": 3, "topk": 5, "group": 4}], ids=str
)
def test_by_default_on_a_gpu(options: dict[str, int], is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" takes for long sequences, cuDNN for shared heads among it, and in a CUDA graph."""
    monkeypatch.setattr("attention_zoo.ops.mixture._LEAST_WORK", 0)
    torch.manual_seed(0)
    options = dict(options)
    group = options.pop("group", 1)
    problem = mixture(batch=2, kv_heads=16 // group, group=group, tokens=600, dim=64, value_dim=64, is_causal=is_causal, **options)
    want, got = problem.run("reference"), problem.run("auto", torch.bfloat16)
    for name, right in want.items():
        error = (got[name].float() - right).norm() / right.norm()
        assert error < 2e-2, f"{name}: {error}"
    given = {name: t.to(DEVICE, torch.bfloat16) for name, t in problem.tensors.items()}
    call = {"chosen": problem.chosen.to(DEVICE), "topk": problem.topk, **problem.settings}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        ops.mixture_attention(**given, **call)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = ops.mixture_attention(**given, **call)
    other = mixture(batch=2, kv_heads=16 // group, group=group, tokens=600, dim=64, value_dim=64, is_causal=is_causal, **options)
    for name, t in given.items():
        t.copy_(other.tensors[name])
    call["chosen"].copy_(other.chosen)
    graph.replay()
    right = other.run("reference")["out"]
    assert (out.float() - right).norm() / right.norm() < 2e-2


@FEW
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 40), routed=st.integers(1, 20), shared=st.integers(0, 5),
    topk=st.integers(1, 20), balanced=st.booleans(), ties=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gates(batch: int, tokens: int, routed: int, shared: int, topk: int, balanced: bool, ties: bool, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(batch, tokens, routed + shared + 2, device=DEVICE)
    if ties:
        logits = logits.round()
    cotangents = torch.randn(batch, tokens, routed + shared, device=DEVICE), torch.randn(batch, tokens, routed, device=DEVICE)
    found = []
    for backend in ("reference", "triton"):
        leaf = logits.clone().requires_grad_()
        parts = leaf.split([routed, shared, 2], dim=-1)
        gates, scores, chosen = ops.mixture_gates(
            parts[0],
            parts[1] if shared > 1 else None,
            parts[2] if balanced and shared else None,
            topk=min(topk, routed),
            shared_heads=shared,
            backend=backend,
        )
        objective = (gates * cotangents[0]).sum() + (scores * cotangents[1]).sum()
        found.append((gates.detach(), scores.detach(), chosen, torch.autograd.grad(objective, leaf)[0]))
        assert not chosen.requires_grad
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_gates_compiled() -> None:
    torch.manual_seed(0)
    logits, balance = torch.randn(2, 9, 5, device=DEVICE), torch.randn(2, 9, 2, device=DEVICE)
    call = {"topk": 2, "shared_heads": 1}
    compiled = torch.compile(ops.mixture_gates, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    want = ops.mixture_gates(logits, None, balance, **call, backend="reference")
    for got, right in zip(compiled(logits, None, balance, **call, backend="triton"), want, strict=True):
        torch.testing.assert_close(got, right)


def test_choice() -> None:
    """Of equal scores the first are chosen."""
    from attention_zoo.ops.mixture import top_k_mask

    scores = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 2]], device=DEVICE)
    got = top_k_mask(scores, 2, backend="triton")
    assert got.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]]
    assert got.dtype == scores.dtype


@pytest.mark.gpu
def test_layer_on_a_gpu() -> None:
    """By default: one product for the three routers, and their kernel."""
    torch.manual_seed(0)
    module = az.create_attention("moh", dim=64, num_heads=8, shared_heads=2, routed_topk=3, device=DEVICE)
    x = torch.randn(2, 50, 64, device=DEVICE)
    found = []
    for backend in ("reference", "auto"):
        module.zero_grad()
        with ops.use_backend(backend):
            out = module(x)
        (out.square().sum() + module.aux_loss).backward()
        found.append({"out": out.detach(), **{name: p.grad.clone() for name, p in module.named_parameters()}})
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, atol=1e-3, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}")
