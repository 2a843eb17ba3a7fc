"""Every engine on a GPU against the float64 reference, within what low precision itself costs; and inside compiled graphs.

The error budget of a case is measured, not chosen: the same call is computed with plain matrix products in the dtype under test,
and an engine may err by at most twice as much as that does (plus a few units in the last place).
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops._reference import visible
from tests.ops.problems import Call

pytestmark = pytest.mark.gpu

ENGINE_NAMES = ("flash4", "flash3", "flash2", "torch", "xformers", "flex")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(
    num_queries: int, num_keys: int, heads: int = 4, kv_heads: int = 4, dim: int = 64, value_dim: int = 0, batch: int = 2
) -> Any:
    return (batch, heads, num_queries, dim), (batch, kv_heads, num_keys, dim), (batch, kv_heads, num_keys, value_dim or dim)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


PACKED = {"cu_seqlens": offsets(100, 1, 0, 156), "max_seqlen": 156}
CROSS = {"cu_seqlens": offsets(100, 3, 0, 50), "cu_seqlens_k": offsets(40, 0, 9, 208), "max_seqlen": 100, "max_seqlen_k": 208}
SHAPES_AND_SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "self": (case(257, 257), {}),
    "scaled": (case(128, 200), {"scale": 0.3}),
    "causal": (case(257, 257), {"is_causal": True}),
    "causal_fewer_queries": (case(100, 333), {"is_causal": True}),
    "causal_more_queries": (case(333, 100), {"is_causal": True}),
    "causal_window": (case(300, 300), {"is_causal": True, "window_size": 37}),
    "window": (case(300, 300), {"window_size": (20, 45)}),
    "window_left_only": (case(130, 300), {"window_size": (20, None)}),
    "window_more_queries": (case(300, 100), {"window_size": 16}),
    "grouped_causal": (case(257, 257, kv_heads=2), {"is_causal": True}),
    "grouped_one_key_head": (case(129, 257, kv_heads=1), {}),
    "softcap": (case(200, 200), {"softcap": 3.0, "is_causal": True}),
    "lse": (case(200, 333), {"return_lse": True, "is_causal": True}),
    "lse_dead_rows": (case(200, 100), {"return_lse": True, "is_causal": True}),
    "packed": (case(257, 257, batch=1), PACKED),
    "packed_without_max": (case(257, 257, batch=1), {"cu_seqlens": PACKED["cu_seqlens"]}),
    "packed_causal_grouped": (case(257, 257, kv_heads=2, batch=1), {**PACKED, "is_causal": True}),
    "packed_window": (case(257, 257, batch=1), {**PACKED, "is_causal": True, "window_size": 19}),
    "packed_lse": (case(257, 257, batch=1), {**PACKED, "return_lse": True}),
    "packed_cross": (case(153, 257, batch=1), CROSS),
    "packed_cross_causal": (case(153, 257, batch=1), {**CROSS, "is_causal": True}),
    "packed_head_512": (case(257, 257, heads=2, kv_heads=2, dim=512, batch=1), {**PACKED, "is_causal": True}),
    "decode": (case(1, 777, heads=8, kv_heads=2), {"is_causal": True}),
    "decode_many": (case(4, 777, heads=8, kv_heads=2, dim=128), {"is_causal": True}),
    "bias": (case(131, 77), {"bias": (1, 4, 131, 77)}),
    "bias_causal": (case(100, 100), {"bias": (2, 1, 100, 100), "is_causal": True}),
    "mask": (case(131, 77), {"attn_mask": (2, 1, 131, 77)}),
    "mask_kills_rows": (case(64, 64), {"attn_mask": (2, 1, 64, 1)}),
    "padding_grouped": (case(100, 100, kv_heads=2), {"attn_mask": (2, 1, 1, 100), "is_causal": True}),
    "padding_decode": (case(1, 300, heads=8, kv_heads=2), {"attn_mask": (2, 1, 1, 300)}),
    "head_32": (case(130, 130, dim=32), {"is_causal": True}),
    "head_80": (case(130, 130, dim=80), {"is_causal": True}),
    "head_96": (case(130, 130, dim=96), {"is_causal": True}),
    "head_160": (case(130, 130, dim=160), {"is_causal": True}),
    "head_128": (case(257, 257, dim=128), {"is_causal": True}),
    "head_192_128": (case(130, 130, dim=192, value_dim=128), {}),
    "head_256": (case(130, 130, dim=256), {"is_causal": True}),
    "value_dim_other": (case(130, 130, dim=64, value_dim=96), {}),
}
IN_HALF_TOO = ("causal", "window", "grouped_causal", "packed", "bias", "decode")
IN_FLOAT_TOO = (
    "self",
    "causal",
    "causal_fewer_queries",
    "window",
    "softcap",
    "lse",
    "packed",
    "packed_causal_grouped",
    "packed_cross",
)
IN_FLOAT_TOO += ("grouped_causal", "decode", "bias", "mask", "padding_grouped", "head_80", "head_256", "packed_head_512")
CASES = [(name, BF16) for name in SHAPES_AND_SETTINGS]
CASES += [(name, FP16) for name in IN_HALF_TOO] + [(name, FP32) for name in IN_FLOAT_TOO]


def make(name: str, dtype: torch.dtype) -> Call:
    """The case's call with its values already rounded to `dtype`, as float64 on the CPU."""
    generator = torch.Generator().manual_seed(len(name))
    shapes, settings = SHAPES_AND_SETTINGS[name]
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype).double() for shape in shapes)
    settings = dict(settings)
    if "bias" in settings:
        settings["bias"] = torch.randn(settings["bias"], generator=generator).to(dtype).double()
    if "attn_mask" in settings:
        settings["attn_mask"] = torch.rand(settings["attn_mask"], generator=generator) > 0.4
    return Call(q, k, v, settings)


def plainly(call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """The call with plain matrix products and softmax in the dtype of its tensors: what low precision costs."""

    def run(_: str) -> tuple[Tensor, ...]:
        q, k, v = call.q, call.k, call.v
        problem = make_problem(q, k, v, **call.settings)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        logits = q @ k.mT * problem.scale
        if problem.softcap:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        if problem.bias is not None:
            logits = logits + problem.bias
        allowed = visible(problem, q.device)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        dead = (logits == -torch.inf).all(-1, keepdim=True)
        logits = logits.masked_fill(dead, 0.0)
        out = (logits.softmax(-1) @ v).masked_fill(dead, 0.0)
        lse = logits.float().logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)
        return (out, lse) if problem.return_lse else (out,)

    call.run = run  # type: ignore[method-assign]
    return call.run_with_gradients("")


@functools.cache
def budgets(name: str, dtype: torch.dtype, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Exact outputs (and gradients), and how far each may be missed."""
    with torch.enable_grad():
        exact_parts = make(name, dtype).to(torch.float64, "cuda").run_with_gradients("reference")
        low_parts = plainly(make(name, dtype).to(dtype, "cuda"))
    exact, low = ([*parts[0], *(parts[1] if gradients else [])] for parts in (exact_parts, low_parts))
    allowed = []
    for right, rounded in zip(exact, low, strict=True):
        right, rounded = (t.detach().double().masked_fill(t == -torch.inf, 0.0) for t in (right, rounded))
        floor = 8 * torch.finfo(dtype).eps * right.abs().max()
        allowed.append(2 * (rounded - right).abs().max() + floor)
    return [t.detach() for t in exact], allowed


def assert_within(results: list[Tensor], exact: list[Tensor], allowed: list[Tensor]) -> None:
    for index, (result, right, most) in enumerate(zip(results, exact, allowed, strict=True)):
        dead = right == -torch.inf
        assert torch.equal(result == -torch.inf, dead), f"result {index}: rows without keys"
        error = (result.double() - right).masked_fill(dead, 0.0).abs().max()
        assert error <= most, f"result {index}: off by {error:.3g}, allowed {most:.3g}"


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_engine_within_the_budget(engine: str, name: str, dtype: torch.dtype, gradients: bool) -> None:
    call = make(name, dtype).to(dtype, "cuda")
    with torch.set_grad_enabled(gradients):
        report = {r.name: r for r in az.explain(call.q, call.k, call.v, **call.settings)}[engine]
        if not report.serves:
            pytest.skip(f"{engine}: {report.reason}")
        exact, allowed = budgets(name, dtype, gradients)
        if gradients:
            results, grads = call.run_with_gradients(engine)
            assert_within([*results, *grads], exact, allowed)
        else:
            assert_within(list(call.run(engine)), exact, allowed)


@pytest.mark.parametrize("name", ["self", "causal_fewer_queries", "causal_window", "grouped_causal", "softcap", "lse", "packed"])
@pytest.mark.parametrize("engine", ["flash4", "xformers", "flex", "torch"])
def test_compiled_in_one_graph_equals_eager(engine: str, name: str) -> None:
    torch._dynamo.reset()
    dtype = FP32 if engine == "xformers" and name == "packed" else BF16
    call, again = make(name, dtype).to(dtype, "cuda"), make(name, dtype).to(dtype, "cuda")
    report = {r.name: r for r in az.explain(call.q, call.k, call.v, **call.settings)}[engine]
    if not report.serves:
        pytest.skip(f"{engine}: {report.reason}")
    again.run = torch.compile(again.run, fullgraph=True)  # type: ignore[method-assign]
    exact, allowed = budgets(name, dtype, True)
    for parts in (call.run_with_gradients(engine), again.run_with_gradients(engine)):
        assert_within([*parts[0], *parts[1]], exact, allowed)


def test_compiled_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: ops.attention(q, k, k, is_causal=True), fullgraph=True, dynamic=True)
    for num_queries, num_keys in ((64, 64), (130, 130), (33, 99), (1, 50)):
        q = torch.randn(2, 4, num_queries, 64, device="cuda", dtype=BF16)
        k = torch.randn(2, 2, num_keys, 64, device="cuda", dtype=BF16)
        torch.testing.assert_close(compiled(q, k), ops.attention(q, k, k, is_causal=True), rtol=2e-2, atol=2e-2)


def installed(name: str) -> bool:
    return {b.name: b.available for b in az.backends()}[name]


@pytest.mark.parametrize("name", ["self", "causal", "causal_window", "packed", "grouped_causal", "softcap", "decode"])
def test_auto_takes_flash_attn_4(name: str) -> None:
    if not installed("flash4") or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("flash-attn 4 is not installed, or the device is older than Hopper")
    call = make(name, BF16).to(BF16, "cuda")
    if name in ("self", "causal", "grouped_causal", "softcap"):  # over few keys torch's kernels are faster
        call = Call(*(t.repeat(1, 1, 32, 1) for t in (call.q, call.k, call.v)), call.settings)
    assert az.explain(call.q, call.k, call.v, **call.settings).chosen == "flash4"


def test_auto_takes_torch_for_few_keys() -> None:
    q = torch.randn(64, 12, 197, 64, device="cuda", dtype=BF16)
    assert az.explain(q, q, q).chosen == "torch"


@pytest.mark.parametrize(
    ("name", "dtype", "extra"), [("packed", FP32, {}), ("packed", BF16, {"dropout_p": 0.1}), ("packed_head_512", BF16, {})]
)
def test_auto_takes_xformers_for_what_it_alone_serves(name: str, dtype: torch.dtype, extra: dict) -> None:
    if not installed("xformers"):
        pytest.skip("xformers is not installed")
    call = make(name, dtype).to(dtype, "cuda")
    assert az.explain(call.q, call.k, call.v, **call.settings, **extra).chosen == "xformers"


def test_the_first_query_of_a_process_makes_no_plan() -> None:
    """torch sets its own order of kernels at the first call of a process, which is neither to undo ours nor to be undone by it."""
    program = """
import torch
from torch.profiler import ProfilerActivity, profile
from attention_zoo import ops

q, k = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 300))
with profile(activities=[ProfilerActivity.CPU]) as seen:
    ops.attention(q, k, k, backend="torch")
names = {event.name for event in seen.events()}
assert "aten::_scaled_dot_product_flash_attention" in names, names
after = torch._C._get_sdp_priority_order()
torch.nn.functional.scaled_dot_product_attention(k, k, k)
assert torch._C._get_sdp_priority_order() == after
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["torch", "flash2", "xformers"])
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_drops_its_share(engine: str, compiled: bool) -> None:
    q = torch.zeros(4, 4, 64, 64, device="cuda", dtype=BF16, requires_grad=True)
    v = torch.eye(64, device="cuda", dtype=BF16).expand(4, 4, 64, 64).contiguous()
    report = {r.name: r for r in az.explain(q, q, v, dropout_p=0.25)}[engine]
    if not report.serves:
        pytest.skip(f"{engine}: {report.reason}")
    torch._dynamo.reset()
    run = functools.partial(ops.attention, dropout_p=0.25, backend=engine)
    weights = (torch.compile(run, fullgraph=True) if compiled else run)(q, q, v)
    kept = weights > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 64 / 0.75), rtol=1e-2, atol=0)
    weights.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_both_libraries_in_one_process() -> None:
    """flash-attn 4's namespace package must not cost us xformers, in either order of import."""
    if not (installed("flash4") and installed("xformers")):
        pytest.skip("flash-attn 4 and xformers are not both installed")
    q = torch.randn(1, 4, 128, 64, device="cuda", dtype=BF16)
    results = [ops.attention(q, q, q, backend=name) for name in ("flash4", "xformers", "flash4")]
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)
    assert torch.equal(results[0], results[2])


def test_strided_views_are_served_exactly() -> None:
    """q, k and v as they come out of one fused projection."""
    qkv = torch.randn(2, 100, 3, 4, 64, device="cuda", dtype=BF16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    exact = ops.attention(q.double(), k.double(), v.double(), backend="reference")
    scale = 1 / math.sqrt(64)
    budget = 2 * (((q @ k.mT * scale).softmax(-1) @ v).double() - exact).abs().max()
    for report in az.explain(q, k, v):
        if report.serves:
            out = ops.attention(q, k, v, backend=report.name)
            assert (out.double() - exact).abs().max() <= budget, report.name


@pytest.mark.parametrize("engine", ["auto", *ENGINE_NAMES])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_more_samples_than_a_grid_holds(engine: str, dtype: torch.dtype) -> None:
    """Windowed attention puts its windows in the batch: more than the 65,535 of a CUDA grid's second and third dimension."""
    q = torch.randn(70_000, 2, 4, 32, device="cuda", dtype=dtype, requires_grad=True)
    if engine != "auto" and not {r.name: r for r in az.explain(q, q, q)}[engine].serves:
        pytest.skip(f"{engine} does not serve {dtype}")
    out = ops.attention(q, q, q, backend=engine)
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    some = torch.tensor([0, 1, 32_767, 65_534, 65_535, 65_536, 69_999], device="cuda")
    exact = q.detach()[some].double().requires_grad_()
    right = ops.attention(exact, exact, exact, backend="reference")
    (right_grad,) = torch.autograd.grad(right.square().sum(), exact)
    tolerance = 0.03 if dtype == BF16 else 1e-4
    torch.testing.assert_close(out[some].double(), right, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grad[some].double(), right_grad, atol=5 * tolerance, rtol=5 * tolerance)
