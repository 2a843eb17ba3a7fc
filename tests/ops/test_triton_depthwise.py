"""The kernel of depthwise convolution on channels-last maps against PyTorch's convolution."""

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
from attention_zoo.attention.lepe import LocalPositionEncoding

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 8 if DEVICE == "cuda" else 1  # the interpreter is slow


def depthwise(
    batch: int = 2, height: int = 5, width: int = 9, dim: int = 20, side: int = 3, bias: bool = True,
    add: bool = True,
) -> Case:  # fmt: skip
    tensors = {"x": torch.randn(batch, height, width, 3 * dim), "weight": torch.randn(dim, 1, side, side)}
    if bias:
        tensors["bias"] = torch.randn(dim)
    if add:
        tensors["add"] = torch.randn(batch, width, height, dim).transpose(1, 2)
    return Case(_convolve_part, tensors, unbatched=("weight", "bias"))


def _convolve_part(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, *, backend: str) -> Tensor:
    """Of tokens that lie among others, as the values of a fused projection do."""
    return ops.depthwise_conv2d(x.chunk(3, -1)[1], weight, bias, add=add, backend=backend)


@FEW
@given(
    batch=st.integers(1, 3), height=st.integers(1, 9 * LARGER), width=st.integers(1, 20 * LARGER),
    dim=st.sampled_from([1, 16, 70]), side=st.sampled_from([1, 3, 5]), bias=st.booleans(),
    add=st.booleans(),
)  # fmt: skip
def test_depthwise_conv2d(**sizes: Any) -> None:
    kernels.check_against_plain_code(depthwise(**sizes))


@kernels.each_check({"depthwise": depthwise})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_weights_that_are_not_learned() -> None:
    x, weight = torch.randn(1, 4, 4, 16, device=DEVICE), torch.randn(16, 1, 3, 3, device=DEVICE)
    for wanted in ((x,), (weight,)):
        for t in (x, weight):
            t.requires_grad_(t is wanted[0])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            want, got = (
                torch.autograd.grad(ops.depthwise_conv2d(x, weight, backend=backend).square().sum(), wanted)[0]
                for backend in ("reference", "triton")
            )
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "side", "match"), [(torch.float64, 3, "float64"), (torch.float32, 9, "9 x 9")], ids=["double", "large"]
)
def test_what_the_kernel_refuses(dtype: torch.dtype, side: int, match: str) -> None:
    x, weight = torch.randn(1, 4, 4, 8, dtype=dtype, device=DEVICE), torch.randn(8, 1, side, side, dtype=dtype, device=DEVICE)
    with pytest.raises(ops.BackendError, match=match):
        ops.depthwise_conv2d(x, weight, backend="triton")
    ops.depthwise_conv2d(x, weight)


@pytest.mark.parametrize(
    ("weight", "bias", "match"), [((8, 1, 2, 2), (8,), "k odd"), ((7, 1, 3, 3), (7,), "weight"), ((8, 1, 3, 3), (7,), "bias")]
)
def test_what_does_not_fit_together(weight: tuple[int, ...], bias: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.depthwise_conv2d(torch.randn(1, 4, 4, 8), torch.randn(weight), torch.randn(bias))


def test_local_position_encoding() -> None:
    """Module and operation are one, under autocast too."""
    module = LocalPositionEncoding(16, 5, device=DEVICE)
    x = torch.randn(2, 6, 7, 16, device=DEVICE)
    with ops.use_backend("reference"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want = module(x)
    with ops.use_backend("triton"):
        torch.testing.assert_close(module(x), want, atol=2e-5, rtol=1e-4)
        with torch.autocast(DEVICE, torch.float16):
            half = module(x)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), want, atol=2e-2, rtol=2e-2)
