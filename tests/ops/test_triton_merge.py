"""The kernels that merge parts of an attention, against the plain code; and Combiner's parts where no mask is needed.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import combiner_patterns

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts(count: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (B, H, S, L, D), computed row by row or column by column, and normalisers; some have seen nothing."""
    sizes = {True: (batch, 3, 2, 5), False: (batch, 2, 5, 3)}  # (B, S, H, L) or (B, H, L, S) in memory
    outs = []
    for i in range(count):
        out = torch.randn(*sizes[i % 2 == 0], 8, device=DEVICE)
        outs.append((out.transpose(1, 2) if i % 2 == 0 else out.transpose(2, 3)).to(dtype).requires_grad_())
    lses = [torch.randn(batch, 2, 3, 5, device=DEVICE) for _ in range(count)]
    for i, lse in enumerate(lses):
        lse[:, 0, 0] = -torch.inf  # nobody has
        lse[:, 1, i % 3] = -torch.inf
    return outs, [lse.requires_grad_() for lse in lses]


def run(outs: list[Tensor], lses: list[Tensor], kernel: bool) -> list[Tensor]:
    """What is merged, and gradients of a fixed functional of it."""
    if kernel:
        from attention_zoo.ops.triton.merge import merge_attention_triton

        out, lse = merge_attention_triton(outs, lses)
    else:
        with ops.use_backend("torch"):
            out, lse = ops.merge_attention(outs, lses)
    objective = (out.float() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum()
    objective = (
        objective
        + (torch.where(lse.isfinite(), lse, 0.0) * torch.linspace(1, -1, lse.numel(), device=DEVICE).view(lse.shape)).sum()
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(objective, [*outs, *lses])]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_merging(count: int) -> None:
    tensors = parts(count)
    for got, want in zip(run(*tensors, kernel=True), run(*tensors, kernel=False), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    outs, lses = parts(3, torch.bfloat16 if DEVICE == "cuda" else torch.float16)
    exact = run([o.detach().float().requires_grad_() for o in outs], lses, kernel=False)
    for got, want in zip(run(outs, lses, kernel=True), exact, strict=True):
        seen = want.isfinite()
        assert (got.float() - want)[seen].norm() / want[seen].norm() < 3 * torch.finfo(outs[0].dtype).eps


def test_registration() -> None:
    """What the operators tell the compiler (shapes, strides, aliases) is what they do."""
    from attention_zoo.ops.triton import merge

    outs, lses = ([t.detach() for t in tensors] for tensors in parts(2))
    out, lse = merge._merge_forward(outs, lses)
    for function, args in (
        (merge._merge_forward, (outs, lses)),
        (merge._merge_backward, (outs, lses, out, lse, out.clone(), None)),
    ):
        torch.library.opcheck(function.registered, args, test_utils=("test_schema", "test_faketensor"))


def test_empty_batches() -> None:
    assert all(not gradient.numel() for gradient in run(*parts(2, batch=0), kernel=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [4, 5])
def test_that_it_is_taken_on_the_device(dims: int) -> None:
    outs, lses = parts(3)
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
