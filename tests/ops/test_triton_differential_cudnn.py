"""Differential attention around cuDNN against the plain code: heads taken apart, gradients joined, and which calls it takes.

cuDNN runs on a GPU in half precision only. Everywhere else plain PyTorch stands in for its two calls, from the same tensors and
into the strides that torch gives cuDNN's outputs; without a GPU our kernels run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attention_zoo import ops
from attention_zoo.ops import _cudnn
from attention_zoo.ops.differential import PAIRINGS, split_maps

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LONG = 12 if DEVICE == "cuda" else 1  # times as many tokens where kernels are not run in Python
KEPT = ("factor", "weight")  # lambda and the norm's weight stay float32


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch in cuDNN's place."""
    real = _cudnn.dense_forward

    def logits(q: Tensor, k: Tensor, scale: float, is_causal: bool) -> Tensor:
        x = scale * q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
        if is_causal:
            x = x.masked_fill(torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        return x

    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if isinstance(q, FakeTensor):
            return real(q, k, v, scale=scale, is_causal=is_causal, keep=keep)
        room, _ = real(*(t.to("meta") for t in (q, k, v)), scale=scale, is_causal=is_causal, keep=keep)
        out, x = q.new_empty_strided(room.shape, room.stride()), logits(q, k, scale, is_causal)
        out.copy_(x.softmax(-1) @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out, x.logsumexp(-1, keepdim=True) if keep else q.new_empty(0, dtype=torch.float32)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (of_k, of_v), slope = (q.shape[1] // t.shape[1] for t in (k, v)), grad.float()
        every_k, every_v = k.float().repeat_interleave(of_k, 1), v.float().repeat_interleave(of_v, 1)
        p = (logits(q, k, scale, is_causal) - lse).exp()
        ds = scale * p * (slope @ every_v.transpose(2, 3) - (slope * out.float()).sum(-1, keepdim=True))
        dk = (ds.transpose(2, 3) @ q.float()).unflatten(1, (-1, of_k)).sum(2)
        dv = (p.transpose(2, 3) @ slope).unflatten(1, (-1, of_v)).sum(2)
        return tuple(torch.empty_like(t).copy_(d) for t, d in ((q, ds @ every_k), (k, dk), (v, dv)))  # type: ignore[return-value]

    monkeypatch.setattr(_cudnn, "dense_forward", forward)
    monkeypatch.setattr(_cudnn, "dense_backward", backward)


def _differ(backend: str, **call: Any) -> Tensor:
    """The operator where "triton" is asked for, else the operation."""
    if backend != "triton":
        return ops.differential_attention(**call, backend=backend)
    from attention_zoo.ops.triton.differential_cudnn import differential_attention_cudnn

    q, k, v, factor = (call.pop(name) for name in ("q", "k", "v", "factor"))
    given = {"noise_q": None, "noise_k": None, "weight": None, "gain": 1.0, "eps": None, **call}
    pairing = given.pop("pairing")
    factor = factor.transpose(1, 2) if factor.ndim else factor
    tensors = (q, given.pop("noise_q"), k, given.pop("noise_k"), v, factor, given.pop("weight"))
    return differential_attention_cudnn(*tensors, interleaved=pairing == "interleaved", **given)


def maps(
    batch: int = 2, kv_heads: int = 2, share: int = 1, group: int = 2, queries: int = 7, keys: int | None = None, dim: int = 8,
    is_causal: bool = True, pairing: str = "interleaved", apart: bool = False, heads_first: bool = False, per_token: bool = False,
    norm: bool = True, weighted: bool = True, operation: Callable[..., Any] = _differ,
) -> Case:  # fmt: skip
    """Heads of both maps in one tensor, or `apart`; `share` noise heads to a key/value head, `group` signal heads to each."""
    keys, noise = queries if keys is None else keys, kv_heads * share
    heads = noise * group

    def tensor(count: int, tokens: int, channels: int) -> Tensor:
        shape = (batch, count, tokens, channels) if heads_first else (batch, tokens, count, channels)
        return torch.randn(shape) if heads_first else torch.randn(shape).transpose(1, 2)

    tensors = {
        "q": tensor(heads if apart else heads + noise, queries, dim),
        "k": tensor(kv_heads if apart else 2 * kv_heads, keys, dim),
        "v": tensor(kv_heads, keys, 2 * dim),
        "factor": torch.rand(batch, queries, heads) if per_token else torch.tensor(0.4),
    }
    if apart:
        tensors |= {"noise_q": tensor(noise, queries, dim), "noise_k": tensor(kv_heads, keys, dim)}
    if norm and weighted:
        tensors["weight"] = torch.rand(2 * dim) + 0.5
    # a large epsilon: where both maps see one key the difference is small, and its norm is as exact as the difference is
    options = {"groups": noise, "pairing": pairing, "is_causal": is_causal, "scale": 0.3}
    options |= {"eps": 1e-2, "gain": 0.8} if norm else {}
    return Case(operation, tensors, options, KEPT, unbatched=("weight",) if per_token else KEPT)


def size(name: str, want: dict[str, Tensor]) -> float:
    """Lambda and the norm's weight have gradients from all tokens, which cancel."""
    return kernels.largest(name, want) * max(1.0, want["out"].numel() / max(want[name].numel(), 1)) ** 0.5


@pytest.mark.usefixtures("_stand_in")
@settings(parent=FEW, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), share=st.integers(1, 2), group=st.integers(1, 3),
    queries=st.sampled_from([1, 7, 33 * LONG]), dim=st.sampled_from([8, 24, 72]), is_causal=st.booleans(),
    pairing=st.sampled_from(PAIRINGS), apart=st.booleans(), heads_first=st.booleans(), per_token=st.booleans(), norm=st.booleans(),
    weighted=st.booleans(), more=st.sampled_from([0, 5]),
)  # fmt: skip
def test_any_shape(more: int, **sizes: Any) -> None:
    """Among them values of 144 channels, whose gradients are computed in halves."""
    keys = sizes["queries"] + (0 if sizes["is_causal"] else more)
    kernels.check_against_plain_code(maps(keys=keys, **sizes), size=size)


LAYOUTS: dict[str, dict[str, Any]] = {
    "pairs": {"group": 1, "queries": 9 * LONG},
    "wide pairs": {"group": 1, "queries": 12 * LONG, "dim": 72},
    "groups": {"group": 3, "queries": 9 * LONG},
    "halves": {"batch": 1, "kv_heads": 1, "share": 2, "queries": 5 * LONG, "dim": 72, "pairing": "halves"},
    "apart": {"apart": True, "is_causal": False, "keys": 11, "heads_first": True, "weighted": False},
}
MAKERS: dict[str, Callable[[], Case]] = {name: partial(maps, per_token=True, **sizes) for name, sizes in LAYOUTS.items()}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.usefixtures("_stand_in")
def test_each_layout(sizes: dict[str, Any], per_token: bool) -> None:
    kernels.check_against_plain_code(maps(per_token=per_token, **sizes), size=size)


@kernels.each_check(MAKERS, empty_batch={})
@pytest.mark.usefixtures("_stand_in")
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("group", [1, 3])
def test_heads_in_one_tensor_are_heads_apart(pairing: str, group: int) -> None:
    """The plain code takes one tensor as it takes its parts."""
    case = maps(group=group, pairing=pairing)
    given = case.given()
    joint = case.of_given(given, "reference")
    signal_q, noise_q = split_maps(given["q"], 4 // 2, pairing)
    signal_k, noise_k = split_maps(given["k"], 2, pairing)
    rest = {name: given[name] for name in ("v", "factor", "weight")}
    options = {name: value for name, value in case.settings.items() if name not in ("groups", "pairing")}
    out = ops.differential_attention(signal_q, k=signal_k, noise_q=noise_q, noise_k=noise_k, **rest, **options, backend="reference")
    torch.testing.assert_close(out, joint["out"])
    places = torch.arange(given["q"].shape[1])
    if pairing == "interleaved":
        assert torch.equal(noise_q, given["q"][:, places[group :: group + 1]])
        assert torch.equal(signal_k, given["k"][:, [0, 2]])
    else:
        assert torch.equal(noise_q, given["q"][:, places[-2:]])
        assert torch.equal(signal_k, given["k"][:, [0, 1]])


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": None},
        {"groups": 3},
        {"groups": 0},
        {"pairing": "rows"},
        {"k": (2, 2, 7, 8)},
        {"q": (2, 2, 7, 8)},
        {"v": (2, 2, 6, 16)},
    ],
    ids=str,
)
def test_joint_heads_that_do_not_fit(changes: dict[str, Any]) -> None:
    case = maps()
    new = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=r"q \(B|pairing|factor"):
        ops.differential_attention(**{**case.tensors, **case.settings, **new})


def test_gradients_with_heads_last() -> None:
    """However they come, SDPA gets them as a projection gives them, with the same numbers."""
    x, grad = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 5, 8)
    strides: list[tuple[int, ...]] = []

    class Sdpa(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            strides.append(grad.stride())
            return grad

    _cudnn.with_heads_last(Sdpa.apply(x)).backward(grad)
    assert strides == [(120, 8, 24, 1)]
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


class _Cudnn(Exception):
    """The call has come to the operator."""


class _TwoCalls(Exception):
    """The call has come to `ops.attention`."""


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"share": 2, "apart": True, "norm": False}, True),
        ({"pairing": "halves", "dim": 64, "queries": 12}, True),
        ({"is_causal": False, "keys": 40}, True),
        ({"keys": 40}, False),  # causality of torch's counts from the other end
        ({"dim": 60}, False),
        ({"dim": 136}, False),
        ({"attn_mask": torch.ones(32, 32, dtype=torch.bool)}, False),
        ({"dropout_p": 0.1}, False),
        ({"backend": "torch"}, False),
        ({"dtype": torch.float32}, False),
        ({"capability": 80}, False),
        ({"capability": 100}, False),
        ({"deterministic": True}, False),
        ({"observed": True}, False),
    ],
    ids=str,
)
def test_what_goes_to_cudnn(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], taken: bool) -> None:
    """By tensors without data, which say that they are on a Hopper GPU, or another. Up to eight queries: test_triton_decode.py."""
    call, sizes = {}, {"queries": 32, "dim": 128, **changes}
    capability, dtype = sizes.pop("capability", 90), sizes.pop("dtype", torch.bfloat16)
    deterministic, observed = sizes.pop("deterministic", False), sizes.pop("observed", False)
    for name in ("attn_mask", "dropout_p", "backend"):
        if name in sizes:
            call[name] = sizes.pop(name)
    case = maps(**sizes)

    def reached(kind: type[Exception]) -> Callable[..., Any]:
        def raises(*_: Any, **__: Any) -> Any:
            raise kind

        return raises

    for module in ("_cudnn", "engines.base"):
        monkeypatch.setattr(f"attention_zoo.ops.{module}.compute_capability", lambda _: capability)
    monkeypatch.setattr("attention_zoo.ops.triton.differential_cudnn.differential_attention_cudnn", reached(_Cudnn))
    monkeypatch.setattr("attention_zoo.ops.differential._attend", reached(_TwoCalls))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr("attention_zoo.ops.differential.is_observed", lambda: observed)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {
            name: t.new_empty_strided(t.shape, t.stride(), device="cuda", dtype=torch.float32 if name in KEPT else dtype)
            for name, t in case.tensors.items()
        }
        with pytest.raises(_Cudnn if taken else _TwoCalls):
            ops.differential_attention(**tensors, **case.settings, **call)


def _as_chosen(backend: str, **call: Any) -> Tensor:
    """What "auto" takes in bfloat16, as "triton"; the plain code in the dtype given."""
    if backend != "triton":
        return ops.differential_attention(**call, backend=backend)
    call = {name: t.bfloat16() if isinstance(t, Tensor) and name not in KEPT else t for name, t in call.items()}
    return ops.differential_attention(**call).to(torch.float32)


REAL: dict[str, dict[str, Any]] = {
    "pairs": {"group": 1, "queries": 521},
    "groups": {"group": 3, "queries": 384, "per_token": True},
    "shared": {"kv_heads": 1, "share": 2, "group": 2, "queries": 300, "is_causal": False, "keys": 389},
    "halves": {"group": 2, "queries": 777, "pairing": "halves", "per_token": True, "weighted": False},
    "apart": {"group": 3, "queries": 320, "apart": True, "heads_first": True, "norm": False},
}
ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="values of twice the width go to cuDNN on Hopper")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", REAL.values(), ids=list(REAL))
class TestCudnn:
    def test_against_plain_code(self, options: dict[str, Any], dim: int) -> None:
        case = maps(dim=dim, operation=_as_chosen, **options)
        self.compare(case, case.run("triton"))

    def test_registration(self, options: dict[str, Any], dim: int) -> None:
        """The operator is what is reached, and its fakes have cuDNN's strides."""
        kernels.check_registration(maps(dim=dim, operation=_as_chosen, **options))

    def test_both_ways_in_one_process(self, options: dict[str, Any], dim: int) -> None:
        """torch keeps cuDNN's plans by the strides of queries, keys and values, whatever those of outputs and gradients."""
        case = maps(dim=dim, operation=_as_chosen, **options)
        for backend, dtype in (("triton", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)):
            self.compare(case, case.run(backend, dtype))

    def compare(self, case: Case, got: dict[str, Tensor]) -> None:
        exact = case.run("reference")
        batch, heads, tokens, _ = exact["out"].shape
        for name, right in exact.items():
            whole = right
            if name == "factor" and not right.ndim:  # a sum over tokens that cancels is as exact as its terms
                each = case.of(factor=case.tensors["factor"].expand(batch, tokens, heads))
                whole = each.run("reference")["factor"]
            error = (got[name].float() - right).norm() / whole.norm()
            assert error < 6 * torch.finfo(torch.bfloat16).eps, f"{name}: {error}"
