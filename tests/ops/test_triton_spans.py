"""The kernels of attention to binary spans against its plain code and the mechanism's; outputs, gradients, graphs, refusals.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets. Chunks of float32 are short, so that few tokens have many
levels there.
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

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LONG = 35 if DEVICE == "cuda" else 1  # times as long on a GPU


def spans(
    batch: int = 1, heads: int = 2, length: int = 37, dim: int = 8, value_dim: int = 16, pools: int = 0, is_causal: bool = True
) -> Case:  # fmt: skip
    """`pools`: how many of what is pooled are apart from q and k."""

    def normal(channels: int) -> Tensor:
        return torch.randn(batch, length, heads, channels).transpose(1, 2)

    tensors = {"q": normal(dim), "k": normal(dim), "v": torch.randn(batch, heads, length, value_dim)}
    tensors |= {name: normal(dim) for name in ("pool_k", "pool_q")[:pools]}
    settings = {"is_causal": is_causal, "scale": 0.4, "return_lse": True}
    return Case(ops.span_attention, tensors, settings, single=("lse",), outputs=("out", "lse"), spacings=16.0)


def exactly_pooled() -> Case:
    """What is pooled differs from token to token in any precision."""
    length = 33 if DEVICE == "cpu" else 200
    case = spans(1, 1, length, pools=2)
    for name in ("pool_q", "pool_k"):
        order = torch.rand(1, 1, length, 8).argsort(2)
        case.tensors[name] = (order - length // 2) / 64
    return case


def compare(case: Case) -> None:
    kernels.check_against_plain_code(case, atol=1e-4, rtol=1e-3, size=kernels.constant)


@FEW
@given(
    batch=st.sampled_from([1, 1, 2]), length=st.sampled_from([1, 2, 5, 17, 33]),
    dims=st.sampled_from([(8, 16), (16, 16), (24, 8)]), pools=st.integers(0, 2), is_causal=st.booleans(),
)  # fmt: skip
def test_small(dims: tuple[int, int], **sizes: Any) -> None:
    compare(spans(heads=1, dim=dims[0], value_dim=dims[1], **sizes))


@pytest.mark.parametrize("length", [100] if DEVICE == "cpu" else [2048, 4097])
def test_many_levels(length: int) -> None:
    compare(spans(1, 1, length, pools=1))


def test_equal_numbers_share_nothing() -> None:
    """The gradient of a pool goes to one of equal tokens: all of it arrives, once."""
    case = spans(heads=1, length=21, dim=4, pools=2)
    case = case.of(**{name: case.tensors[name].round() for name in ("pool_q", "pool_k")})
    want, got = case.run("reference"), case.run("triton")
    for name in ("out", "lse", "q", "k", "v"):
        torch.testing.assert_close(got[name], want[name], atol=3e-5, rtol=2e-4)
    for name in ("pool_q", "pool_k"):
        torch.testing.assert_close(got[name].sum(2), want[name].sum(2), atol=3e-5, rtol=2e-4)


MAKERS: dict[str, Callable[[], Case]] = {"spans": lambda: spans(1, 1, 20 * LONG), "pooled-exactly": exactly_pooled}


@kernels.each_check(MAKERS, half_precision={"pooled-exactly": exactly_pooled})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.parametrize("sizes", [{"length": 0}, {"heads": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    case = spans(**sizes)
    want = case.run("reference")
    for name, tensor in case.run("triton").items():
        assert tensor.shape == want[name].shape


@pytest.mark.parametrize(("channels", "kind", "match"), [(320, torch.float32, "256"), (8, torch.float64, "float64")], ids=str)
def test_what_the_kernels_refuse(channels: int, kind: torch.dtype, match: str) -> None:
    tensors = {name: t.to(DEVICE, kind) for name, t in spans(length=3, dim=channels).tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        ops.span_attention(**tensors, backend="triton")
    ops.span_attention(**tensors)  # "auto" goes another way


def test_tensors_that_do_not_fit() -> None:
    tensors = spans().tensors
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
    q, k, v = (t.to(DEVICE) for t in spans(1, 1, 9).tensors.values())
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
