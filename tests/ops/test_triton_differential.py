"""Differential attention's kernels against the plain code: random odd shapes, outputs and gradients; in graphs; what they refuse.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from torch import Tensor

from attention_zoo import ops
from attention_zoo.attention import DiffAttention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGE = 12 if DEVICE == "cuda" else 1  # times as many tokens where kernels are not run in Python


KEPT = ("factor", "weight")  # lambda and the norm's weight stay float32


def difference(
    batch: int = 2, groups: int = 2, group: int = 2, tokens: int = 5, dim: int = 8, joint: bool = False, per_token: bool = True,
    norm: bool = True, weighted: bool = True,
) -> Case:  # fmt: skip
    """Outputs of signal heads and of noise heads, apart or each group's together."""
    heads = groups * group
    tensors = {"signal": torch.randn(batch, tokens, heads + groups * joint, dim).transpose(1, 2)}
    if not joint:
        tensors["noise"] = torch.randn(batch, groups, tokens, dim)
    tensors["factor"] = torch.rand(batch, tokens, heads) if per_token else torch.tensor(0.4)
    if norm and weighted:
        tensors["weight"] = torch.rand(dim) + 0.5
    settings = {"groups": groups, **({"eps": 1e-2, "gain": 0.8} if norm else {}), **({"noise": None} if joint else {})}
    unbatched = ("weight",) if per_token else ("factor", "weight")
    return Case(ops.subtract_noise, tensors, settings, KEPT, unbatched=unbatched)


def both_maps(
    batch: int = 1, kv_heads: int = 1, share: int = 2, queries: int = 7, keys: int = 9, dim: int = 8, value_dim: int = 16,
    is_causal: bool = True, same_keys: bool = False, per_token: bool = False, norm: bool = True, weighted: bool = True,
) -> Case:  # fmt: skip
    """As many noise heads as signal heads."""
    heads = kv_heads * share
    tensors = {
        "q": torch.randn(batch, queries, heads, dim).transpose(1, 2),
        "noise_q": torch.randn(batch, heads, queries, dim),
        "k": torch.randn(batch, keys, kv_heads, dim).transpose(1, 2),
        "v": torch.randn(batch, kv_heads, keys, value_dim),
        "factor": torch.rand(batch, queries, heads) if per_token else torch.tensor(0.4),
    }
    if not same_keys:
        tensors["noise_k"] = torch.randn(batch, kv_heads, keys, dim)
    if norm and weighted:
        tensors["weight"] = torch.rand(value_dim) + 0.5
    # a large epsilon: where both maps see one key the difference is small, and its norm is as exact as the difference is
    settings = {"is_causal": is_causal, "scale": 0.3, **({"eps": 1e-2, "gain": 0.8} if norm else {})}
    unbatched = ("weight",) if per_token else ("factor", "weight")
    return Case(ops.differential_attention, tensors, settings, KEPT, unbatched=unbatched)


def size(name: str, want: Mapping[str, Tensor]) -> float:
    """Lambda and the norm's weight have gradients from all tokens, which cancel."""
    return kernels.largest(name, want) * max(1.0, want["out"].numel() / max(want[name].numel(), 1)) ** 0.5


def compare(problem: Case) -> None:
    kernels.check_against_plain_code(problem, size=size)


@FEW
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), group=st.integers(1, 3), tokens=st.sampled_from([1, 5, 37 * LARGE]),
    dim=st.sampled_from([8, 24, 130]), joint=st.booleans(), per_token=st.booleans(), norm=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_subtract_noise(**sizes: Any) -> None:
    compare(difference(**sizes))


@FEW
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), share=st.integers(1, 2), queries=st.sampled_from([1, 7, 33 * LARGE]),
    keys=st.sampled_from([1, 20, 35 * LARGE]), dims=st.sampled_from([(8, 16), (16, 16), (24, 40), (40, 72)]),
    is_causal=st.booleans(), same_keys=st.booleans(), per_token=st.booleans(), norm=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_differential_attention(dims: tuple[int, int], **sizes: Any) -> None:
    compare(both_maps(dim=dims[0], value_dim=dims[1], **sizes))


def test_grouped_noise_is_two_attentions() -> None:
    """Equal to the formula, with each noise head repeated for the signal heads of its group."""
    problem = both_maps(kv_heads=1, share=4, queries=9)  # fewer are decoded, which has any groups
    q, k, v, factor, noise_q = (problem.tensors[name].to(DEVICE) for name in ("q", "k", "v", "factor", "noise_q"))
    noise_q = noise_q[:, :2]
    out = ops.differential_attention(q, k, v, factor, noise_q=noise_q, is_causal=True)
    repeated = ops.differential_attention(q, k, v, factor, noise_q=noise_q.repeat_interleave(2, 1), noise_k=k, is_causal=True)
    torch.testing.assert_close(out, repeated)
    with pytest.raises(ops.BackendError, match="noise head"):
        ops.differential_attention(q, k, v, factor, noise_q=noise_q, backend="triton")


SEVERAL: dict[str, Callable[[], Case]] = {
    "difference": lambda: difference(1, 1, 2, 70 * LARGE, 72, joint=True, per_token=False),
    "maps": lambda: both_maps(queries=70 * LARGE, keys=75 * LARGE, share=1),
    "maps-full": lambda: both_maps(queries=40 * LARGE, keys=50 * LARGE, dim=64, value_dim=128, is_causal=False, per_token=True),
}


@pytest.mark.parametrize("make", SEVERAL.values(), ids=list(SEVERAL))
def test_several_tiles(make: Callable[[], Case]) -> None:
    compare(make())


MAKERS: dict[str, Callable[[], Case]] = {
    "difference": difference,
    "maps": lambda: both_maps(queries=7 * LARGE, keys=9 * LARGE, dim=64 if DEVICE == "cuda" else 8, per_token=True),
}


NOBODY: dict[str, Callable[[], Case]] = {
    "difference": difference,
    "difference-one": lambda: difference(per_token=False),
    "maps": both_maps,
    "maps-unweighted": lambda: both_maps(weighted=False),
}


@kernels.each_check(MAKERS, empty_batch=NOBODY)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": (2, 3, 5, 8)}, "noise"),
        ({"noise": None, "groups": None}, "groups"),
        ({"noise": None, "groups": 4}, "groups"),
        ({"groups": 1}, "groups"),
        ({"factor": (2, 5, 3)}, "factor"),
        ({"weight": (7,)}, "weight"),
        ({"eps": None}, "eps"),
        ({"signal": (2, 4, 40)}, "signal"),
    ],
    ids=str,
)
def test_differences_that_do_not_fit(changes: dict[str, Any], match: str) -> None:
    problem = difference()
    new = {name: torch.zeros(value, device=DEVICE) if isinstance(value, tuple) else value for name, value in changes.items()}
    tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
    with pytest.raises(ValueError, match=match):
        problem.operation(**{**tensors, **problem.settings, **new})


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_k": (1, 1, 8, 8)},
        {"noise_q": (1, 3, 7, 8)},
        {"v": (1, 1, 8, 16)},
        {"k": (1, 1, 9, 4)},
        {"factor": (1, 7, 3)},
        {"weight": (8,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_maps_that_do_not_fit(changes: dict[str, tuple[int, ...]], backend: str) -> None:
    problem = both_maps()
    tensors = {name: torch.zeros(changes[name]) if name in changes else t for name, t in problem.tensors.items()}
    with pytest.raises(ValueError, match=r"q \(B|factor|weight"):
        problem.operation(**{name: t.to(DEVICE) for name, t in tensors.items()}, **problem.settings, backend=backend)


@pytest.mark.parametrize("make", [difference, both_maps])
@pytest.mark.parametrize(("dtype", "dim", "match"), [(torch.float64, 8, "float64"), (torch.float32, 320, "256")], ids=str)
def test_what_the_kernels_refuse(make: Callable[..., Case], dtype: torch.dtype, dim: int, match: str) -> None:
    problem = make(dim=dim)
    tensors = {name: t.to(DEVICE, dtype) for name, t in problem.tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        problem.operation(**tensors, **problem.settings, backend="triton")
    problem.operation(**tensors, **problem.settings)  # "auto" goes another way


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"dropout_p": 0.5}, "dropout"), ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, "mask"), ({"scale": -1.0}, "scale")],
    ids=["dropout", "mask", "scale"],
)
def test_what_one_pass_refuses(changes: dict[str, Any], match: str) -> None:
    problem = both_maps(queries=9)
    call = {**problem.tensors, **problem.settings, **changes}
    call = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
    with pytest.raises(ops.BackendError, match=match):
        problem.operation(**call, backend="triton")
    problem.operation(**call)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 128), (128, 256)], ids=str)
def test_the_fastest_way(dim: int, value_dim: int, share: int) -> None:
    """What "auto" chooses on a GPU: heads that share keys, and values that go in halves."""
    problem = both_maps(2, 2, share, 520, 520, dim, value_dim, per_token=True)
    exact, got = problem.run("reference"), problem.run("auto", torch.bfloat16)
    for name, right in exact.items():
        error = (got[name].float() - right).norm() / right.norm()
        assert error < 6 * torch.finfo(torch.bfloat16).eps, f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"version": "v2"}, {"head_dim": 128, "num_heads": 4}], ids=str)
def test_a_whole_module(options: dict[str, Any]) -> None:
    """Eager and as one graph, as the plain code on the same weights."""
    module = DiffAttention(512, **{"num_heads": 4, "is_causal": True, "device": DEVICE, "dtype": torch.bfloat16, **options})
    x = torch.randn(2, 300, 512, device=DEVICE, dtype=torch.bfloat16)
    exact, leaf = copy.deepcopy(module).float(), x.float().requires_grad_()
    with ops.use_backend("reference"):
        want = exact(leaf)
        (slope,) = torch.autograd.grad(want.square().sum(), leaf)
    torch._dynamo.reset()
    for run in (module, torch.compile(module, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        (got,) = torch.autograd.grad(out.float().square().sum(), leaf)
        for a, b in ((out, want), (got, slope)):
            assert (a.float() - b).norm() / b.norm() < 0.04
