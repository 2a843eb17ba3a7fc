"""The kernels that merge parts of an attention, against the plain code; and Combiner's parts where no mask is needed.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import kernel_case as kernels
import pytest
import torch
from kernel_case import DEVICE, Case
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import combiner_patterns

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def parts(count: int, batch: int = 2) -> Case:
    """Outputs (B, H, S, L, D), computed row by row or column by column, and normalisers; some have seen nothing."""
    sizes = {True: (batch, 3, 2, 5), False: (batch, 2, 5, 3)}  # (B, S, H, L) or (B, H, L, S) in memory
    tensors = {}
    for i in range(count):
        out, lse = torch.randn(*sizes[i % 2 == 0], 8), torch.randn(batch, 2, 3, 5)
        lse[:, 0, 0] = -torch.inf  # nobody has
        lse[:, 1, i % 3] = -torch.inf
        tensors |= {f"out{i}": out.transpose(1, 2) if i % 2 == 0 else out.transpose(2, 3), f"lse{i}": lse}
    lses = tuple(name for name in tensors if name.startswith("lse"))
    return Case(_merge, tensors, outputs=("out", "lse"), single=("lse", *lses), spacings=3.0)


def _merge(*, backend: str, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    outs, lses = ([t for name, t in tensors.items() if name.startswith(kind)] for kind in ("out", "lse"))
    if backend == "triton":
        from attention_zoo.ops.triton.merge import merge_attention_triton

        return merge_attention_triton(outs, lses)
    with ops.use_backend("torch"):
        return ops.merge_attention(outs, lses)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_merging(count: int) -> None:
    kernels.check_against_plain_code(parts(count), atol=1e-5, rtol=1e-5, size=kernels.constant)


@kernels.each_check({"merge": lambda: parts(3)})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [4, 5])
def test_that_it_is_taken_on_the_device(dims: int) -> None:
    given = parts(3).given()
    outs, lses = ([given[f"{kind}{i}"] for i in range(3)] for kind in ("out", "lse"))
    if dims == 4:
        outs, lses = [o.flatten(2, 3) for o in outs], [lse.flatten(2, 3) for lse in lses]
    with ops.use_backend("torch"):
        want = ops.merge_attention(outs, lses)
    for got, right in zip(ops.merge_attention(outs, lses), want, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "pool"), [(16, 4, "max"), (23, 5, "max"), (9, 9, "sum"), (20, 6, "mean"), (7, 2, "max")]
)
def test_a_mixture_without_masks(length: int, window: int, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing regions as missing lines, in place of masks: one result, to float64's last digits."""
    module = az.create_attention(
        "combiner", 16, 2, pattern="mixture", is_causal=True, window_size=window, summary_pool=pool
    ).double()
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    found = [(y := module(x)), torch.autograd.grad(y.square().sum(), x)[0]]

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Any:
        return ops.attention(q, k, v, is_causal=is_causal, scale=1.0, return_lse=True)

    monkeypatch.setattr(combiner_patterns, "_kernel_of_parts", lambda q, k, v, mask, dropout: mask is None)
    monkeypatch.setattr(combiner_patterns, "_attend_with_lse", attend)
    torch.testing.assert_close([(y := module(x)), torch.autograd.grad(y.square().sum(), x)[0]], found)


@pytest.mark.parametrize(("length", "window"), [(16, 4), (23, 5), (9, 9), (20, 1), (7, 16)])
def test_segments_and_their_summaries_in_one(length: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own segment as a window, those before it as core tokens: what two parts give when they are merged."""
    module = az.create_attention("combiner", 16, 2, pattern="fixed", is_causal=True, window_size=window).double()
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    found = [(y := module(x)), torch.autograd.grad(y.square().sum(), x)[0]]
    monkeypatch.setattr(combiner_patterns, "_kernel_of_parts", lambda *_: True)
    torch.testing.assert_close([(y := module(x)), torch.autograd.grad(y.square().sum(), x)[0]], found)


@pytest.mark.parametrize(("queries", "keys", "is_causal"), [(5, 5, True), (5, 4, True), (3, 6, True), (6, 5, False), (1, 7, False)])
def test_parts_by_the_kernel(queries: int, keys: int, is_causal: bool) -> None:
    q = torch.randn(2, 4, queries, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(2, 2, keys, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    with ops.use_backend("auto" if DEVICE == "cuda" else "triton"):
        got = combiner_patterns._attend_with_lse(q, k, v, is_causal)
    want = ops.attention(q, k, v, is_causal=is_causal, scale=1.0, return_lse=True, backend="reference")
    gradients = []
    for out, lse in (got, want):
        objective = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        gradients.append(torch.autograd.grad(objective, (q, k, v)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["fixed", "axial", "mixture", "logsparse"])
def test_patterns_on_the_device(pattern: str) -> None:
    """As its default there, on kernels, against the CPU."""
    module = az.create_attention(
        "combiner", 64, 2, pattern=pattern, is_causal=True, window_size=None if pattern == "logsparse" else 23
    )
    x = torch.randn(2, 300, 64)
    found = []
    for device in ("cpu", "cuda"):
        tokens = x.to(device).requires_grad_()
        y = module.to(device)(tokens)
        objective = (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum()
        found.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(objective, (tokens, module.qkv.weight)))])
    for got, want in zip(found[1], found[0], strict=True):
        assert (got - want).norm() / want.norm() < 1e-3
