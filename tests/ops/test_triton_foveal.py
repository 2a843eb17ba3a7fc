"""The kernels of foveal attention against its plain code."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case, looking_on
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 5 if DEVICE == "cuda" else 1  # the interpreter is slow


def foveal(
    batch: int = 2, heads: int = 2, height: int = 3, width: int = 4, pooled: int = 5, side: int = 3, dim: int = 24
) -> Case:  # fmt: skip
    length, places = height * width, side * side

    def tokens(number: int) -> Tensor:
        return torch.randn(batch, number, heads, dim).transpose(1, 2)

    tensors = {"q": tokens(length), "directions": tokens(length), "k": tokens(length), "v": tokens(length)}
    tensors |= {"pooled_k": tokens(pooled), "pooled_v": tokens(pooled)}
    tensors |= {"local_bias": torch.randn(heads, places), "pooled_bias": torch.randn(heads, length, pooled)}
    tensors |= {"tokens": 0.2 * torch.randn(heads, dim, places), "token_bias": torch.randn(heads, 1, places)}
    tensors["q"] *= 0.3
    tables = ("local_bias", "pooled_bias", "tokens", "token_bias")
    settings = {"outside": outside(height, width, side).to(DEVICE), "grid_size": (height, width), "window_size": side}
    return Case(ops.foveal_attention, tensors, settings, single=("pooled_bias",), unbatched=tables)


def outside(height: int, width: int, side: int) -> Tensor:
    """Token by token, place by place."""
    reach = side // 2
    steps = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    cells = [(y, x) for y in range(height) for x in range(width)]
    return torch.tensor([[not (0 <= y + i < height and 0 <= x + j < width) for i, j in steps] for y, x in cells])


MAKERS: dict[str, Callable[[], Case]] = {"foveal": foveal}


@FEW
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), height=st.integers(1, 6 * LARGER), width=st.integers(1, 7 * LARGER),
    pooled=st.integers(1, 20 * LARGER), side=st.sampled_from([1, 3, 5]), dim=st.sampled_from([8, 24, 40]),
)  # fmt: skip
def test_foveal_attention(**sizes: int) -> None:
    kernels.check_against_plain_code(foveal(**sizes))


def test_more_tokens_than_a_tile_and_more_pooled_than_a_tile() -> None:
    kernels.check_against_plain_code(foveal(batch=1, heads=1, height=9, width=10, pooled=70, dim=16))


@kernels.each_check(MAKERS)
def test_kernels(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_large_heads_and_observers_take_the_plain_code() -> None:
    with pytest.raises(az.BackendError, match="more than 128 channels: 136"):
        foveal(dim=136).run("triton")
    with looking_on(lambda call: call.name) as seen:
        foveal().run("triton")
    assert seen == ["neighbours and pooled tokens"]


def test_the_layer_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what it gives without them, with the same gradients."""
    layer = az.create_attention("moh_transnext_aggregated", 32, 4, input_resolution=(6, 5), sr_ratio=2).to(DEVICE)
    x = torch.randn(2, 30, 32, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with az.use_backend(backend):
            out = layer(x, grid_size=(6, 5))
            results.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters(), allow_unused=True)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
