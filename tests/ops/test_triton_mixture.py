"""The kernels that compute chosen (token, head) pairs only, against all heads times their gates: outputs and gradients.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LONG = 9 if DEVICE == "cuda" else 1  # times as long on a GPU


def mixture(
    batch: int = 2, kv_heads: int = 2, group: int = 2, shared: int = 1, topk: int = 2, tokens: int = 20, keys: int | None = None,
    dim: int = 16, value_dim: int = 16, is_causal: bool = False, popular: bool = False, boolean: bool = False,
) -> Case:  # fmt: skip
    """`popular`: all tokens choose the same heads, so that nobody chooses the others."""
    heads, keys = kv_heads * group, tokens if keys is None else keys
    routed = heads - shared
    order = torch.arange(routed).expand(batch, tokens, -1) if popular else torch.rand(batch, tokens, routed).argsort(-1)
    chosen = torch.zeros(batch, tokens, routed).scatter(-1, order[..., :topk], 1.0)
    tensors = {
        "q": torch.randn(batch, tokens, heads, dim).transpose(1, 2),
        "k": torch.randn(batch, kv_heads, keys, dim),
        "v": torch.randn(batch, keys, kv_heads, value_dim).transpose(1, 2),
        "gates": torch.rand(batch, tokens, heads).transpose(1, 2),
        "chosen": chosen.bool(),
    }
    settings = {"topk": topk, "scale": 0.3, "is_causal": is_causal, "boolean": boolean}
    return Case(_mix, tensors, settings, single=("gates",), spacings=2.5)


def _mix(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor, *, boolean: bool, **settings: Any) -> Tensor:
    """With gates, and gradients of gates, where pairs are computed."""
    active = nn.functional.pad(chosen.float(), (q.shape[1] - chosen.shape[-1], 0), value=1.0).transpose(1, 2)
    chosen = chosen if boolean else chosen.float()
    return ops.mixture_attention(q, k, v, gates=gates * active, chosen=chosen, **settings)


def gates(
    batch: int = 2, tokens: int = 9, routed: int = 5, shared: int = 1, topk: int = 2, balanced: bool = True, ties: bool = False
) -> Case:  # fmt: skip
    logits = torch.randn(batch, tokens, routed + shared + 2)
    settings = {"routed": routed, "shared": shared, "balanced": balanced, "topk": min(topk, routed)}
    outputs = ("gates", "scores", "chosen")
    return Case(_gate, {"logits": logits.round() if ties else logits}, settings, single=("logits", *outputs), outputs=outputs)


def _gate(
    logits: Tensor, *, routed: int, shared: int, balanced: bool, topk: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All of a token's logits in one tensor, as the product of the three routers gives them."""
    parts = logits.split([routed, shared, 2], dim=-1)
    for_shared, balance = parts[1] if shared > 1 else None, parts[2] if balanced and shared else None
    return ops.mixture_gates(parts[0], for_shared, balance, topk=topk, shared_heads=shared, backend=backend)


def gated(batch: int = 2, heads: int = 3, tokens: int = 9, dim: int = 12, learned: bool = True, rows: bool = True) -> Case:
    """A third of the gates are 0; `rows`: heads next to channels, as the engines leave them."""
    x = torch.randn(batch, tokens, heads, dim).transpose(1, 2) if rows else torch.randn(batch, heads, tokens, dim)
    given_gates = (torch.rand(batch, tokens, heads) - 0.3).relu().transpose(1, 2)
    return Case(_gate_heads, {"x": x, "gates": given_gates}, {"learned": learned}, single=("gates",), spacings=2.5)


def _gate_heads(x: Tensor, gates: Tensor, *, learned: bool, backend: str) -> Tensor:
    return ops.gate_heads(x, gates if learned else gates.detach(), backend=backend)


def normed(
    batch: int = 2, tokens: int = 9, routed: int = 5, shared: int = 2, topk: int = 2, dim: int = 24, through: bool = True,
    alike: bool = False,
) -> Case:  # fmt: skip
    """`alike`: the queries of all heads, so that the first are chosen; some are 0."""
    q = torch.randn(batch, tokens, shared + routed, dim).bfloat16().float()
    if alike:
        q = q[:, :, :1].expand_as(q) * (torch.rand(batch, tokens, 1, 1) > 0.3)
    outputs = ("gates", "scores", "chosen")
    settings = {"topk": min(topk, routed), "shared_heads": shared, "scored": True, "through": through}
    return Case(ops.query_norm_gates, {"q": q.transpose(1, 2)}, settings, single=outputs, outputs=outputs)


def balance(batch: int = 2, tokens: int = 9, routed: int = 5, topk: int = 2, padded: str = "") -> Case:
    """`padded`: of what size (batch, tokens) the mask of real tokens is; empty: there is none."""
    scores = torch.randn(batch, tokens, routed).softmax(-1)
    real = {"all": (batch, tokens), "sample": (1, tokens), "token": (batch, 1)}.get(padded)
    tensors = {"scores": scores, "chosen": scores.argsort(-1) < topk}
    if real is not None:
        tensors["real"] = torch.rand(real) > 0.4
    return Case(_balance, tensors, single=("scores", "loss", "load"), outputs=("loss", "load"))


def _balance(scores: Tensor, chosen: Tensor, real: Tensor | None = None, *, backend: str) -> tuple[Tensor, Tensor]:
    return ops.load_balance_loss(scores, chosen.float(), real, backend=backend)


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
    kernels.check_against_plain_code(mixture(keys=max(1, options["tokens"] + more), dim=dims[0], value_dim=dims[1], **options))


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
    kernels.check_against_plain_code(mixture(batch=1, dim=8, **options))


@pytest.mark.parametrize("options", [{"shared": 0, "topk": 4}, {"shared": 4, "topk": 0}], ids=["all chosen", "all shared"])
def test_nothing_to_skip(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kernels.check_against_plain_code(mixture(tokens=7, **options))


@pytest.mark.parametrize("options", [{"batch": 0}, {"tokens": 0}, {"keys": 0}], ids=str)
def test_empty(options: dict[str, int]) -> None:
    problem = mixture(**options)
    for name, got in problem.run("triton").items():
        like = problem.tensors.get(name, got)
        assert got.shape == like.shape, name
        assert not got.any(), name


MAKERS: dict[str, Callable[[], Case]] = {
    "mixture": lambda: mixture(batch=1, tokens=40 * LONG, dim=24),
    "mixture-causal": lambda: mixture(batch=1, tokens=40 * LONG, dim=24, is_causal=True),
    "gates": gates,
    "gated": gated,
    "gated-constant": lambda: gated(learned=False),
    "norms": normed,
    "balance": lambda: balance(padded="all"),
}
IN_ANY_PRECISION = {name: make for name, make in MAKERS.items() if name not in ("gates", "balance")}


@kernels.each_check(MAKERS, half_precision=IN_ANY_PRECISION)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_choices_that_are_not_top_k_touch_nothing_else() -> None:
    """A token that has chosen more heads than it may, which is not checked, must not write where it should not."""
    torch.manual_seed(0)
    problem = mixture(topk=1, shared=0)
    problem.tensors["chosen"][0, 3] = True
    problem.tensors["chosen"][0, 4] = False
    assert problem.run("triton")["out"].isfinite().all()


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
    call = {**problem.tensors, "topk": problem.settings["topk"], "backend": "triton", **change}
    with pytest.raises(ValueError, match=message):
        ops.mixture_attention(**{name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in call.items()})


@pytest.mark.parametrize(
    "options",
    [{"shared_heads": 1, "routed_topk": 1}, {"router": "query_norm", "router_grad": "ste", "num_kv_heads": 2, "is_causal": True}],
    ids=["linear", "query norm"],
)
def test_layer(options: dict[str, Any]) -> None:
    """Outputs and the gradients of all parameters, those of the routers among them.

    The plain code in double precision: in single precision its gradient through the deviation of norms, in which most terms cancel
    each other where norms are almost equal, is several times as far from it as the kernel's. The same numbers on every device.
    """
    torch.manual_seed(0)
    module, x = az.create_attention("moh", dim=32, num_heads=4, **options), torch.randn(2, 19, 32)
    found = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        layer = deepcopy(module).to(DEVICE, dtype)
        with ops.use_backend(backend):
            out = layer(x.to(DEVICE, dtype))
        (out.square().sum() + layer.aux_loss).backward()
        gradients = {name: p.grad.float() for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"out": out.detach().float(), **gradients})
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def _always_beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two streams also for small calls; what was settled for calls before, or is here, is forgotten."""
    from attention_zoo.ops.triton import mixture as kernels

    found = kernels._forward_launches, kernels._backward_launches
    for function in found:
        function.cache_clear()
    monkeypatch.setattr(kernels, "_LEAST_BESIDE", 0)
    yield
    for function in found:
        function.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("_always_beside")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"shared": 4, "topk": 4}, {"shared": 0, "topk": 8}, {"shared": 3, "topk": 5, "group": 4}, {"shared": 4, "topk": 8}],
    ids=str,
)
def test_by_default_on_a_gpu(options: dict[str, int], is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" takes for long sequences, cuDNN for shared heads among it or, with gates, for all; in a CUDA graph."""
    monkeypatch.setattr("attention_zoo.ops.mixture._LEAST_WORK", (0, 2**37))
    monkeypatch.setattr("attention_zoo.ops.mixture._LEAST_GATED", 0)
    torch.manual_seed(0)
    options = dict(options)
    group = options.pop("group", 1)
    sizes = {"batch": 2, "kv_heads": 16 // group, "group": group, "tokens": 600, "dim": 64, "value_dim": 64, **options}
    problem, other = mixture(is_causal=is_causal, **sizes), mixture(is_causal=is_causal, **sizes)
    want, got = problem.run("reference"), problem.run("auto", torch.bfloat16)
    for name, right in want.items():
        error = (got[name].float() - right).norm() / right.norm()
        assert error < 2e-2, f"{name}: {error}"
    given = problem.given(torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        _mix(**given, **problem.settings, backend="auto")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = _mix(**given, **problem.settings, backend="auto")
        for name, t in given.items():
            t.copy_(other.tensors[name])
    graph.replay()
    right = other.run("reference")["out"]
    assert (out.float() - right).norm() / right.norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("_always_beside")
def test_two_streams_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside cuDNN our kernels compute the bits that they compute after it, whatever memory is handed out in between."""
    torch.manual_seed(0)
    apart = 4
    problem = mixture(kv_heads=8, group=1, shared=apart, topk=2, tokens=1500, dim=64, value_dim=64)
    given = problem.given(torch.bfloat16)

    def found() -> dict[str, Tensor]:
        """Without the gradients of shared heads, which cuDNN adds up in any order."""
        return {n: t if n in ("out", "gates") else t[:, apart:] for n, t in problem.of_given(given, "triton").items()}

    with monkeypatch.context() as patch:
        patch.setattr("attention_zoo.ops.triton.mixture.two_streams", lambda *_: nullcontext())
        want = found()
    for size in range(20):
        junk = [torch.full((2, 1500, 8, 64), float("nan"), device=DEVICE) for _ in range(size % 5)]
        del junk
        for name, got in found().items():
            assert torch.equal(got, want[name]), name


@FEW
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 40), routed=st.integers(1, 20), shared=st.integers(0, 5),
    topk=st.integers(1, 20), balanced=st.booleans(), ties=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gates(seed: int, **sizes: Any) -> None:
    torch.manual_seed(seed)
    case = gates(**sizes)
    kernels.check_against_plain_code(case, atol=1e-5, size=kernels.constant)
    *_, chosen = _gate(**case.given(), **case.settings, backend="triton")
    assert not chosen.requires_grad


@FEW
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 5), tokens=st.integers(1, 70), dim=st.sampled_from([1, 16, 40, 130]),
    learned=st.booleans(), rows=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gated_heads(seed: int, **sizes: Any) -> None:
    torch.manual_seed(seed)
    case = gated(**sizes)
    kernels.check_against_plain_code(case, atol=1e-5)
    out = _gate_heads(**case.given(), **case.settings, backend="triton")
    assert out.transpose(1, 2).is_contiguous()  # what a projection reads without a copy


@FEW
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 20), routed=st.integers(1, 20), shared=st.integers(0, 5),
    topk=st.integers(1, 20), dim=st.sampled_from([1, 16, 40, 130]), through=st.booleans(), alike=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_norm_gates(seed: int, **sizes: Any) -> None:
    """The plain code in double precision: norms that are almost equal leave little of single precision to their deviation."""
    torch.manual_seed(seed)
    case = normed(**sizes)
    want = case.run("reference", torch.float64)
    for name, got in case.run("triton").items():
        right = want[name].float()
        if name == "q" and sizes["alike"]:  # of a deviation of 0 but for rounding
            assert got.isfinite().all()
            continue
        size = kernels.largest(name, {name: right})
        torch.testing.assert_close(got, right, atol=2e-5 * size, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    found, _, chosen = ops.query_norm_gates(**case.given(), **case.settings, backend="triton")
    assert found.requires_grad == sizes["through"]
    assert not chosen.requires_grad


def test_norm_gates_without_scores() -> None:
    case = normed()
    got = ops.query_norm_gates(case.given()["q"], topk=2, shared_heads=2, backend="triton")
    want = ops.query_norm_gates(case.given()["q"], topk=2, shared_heads=2, backend="reference")
    assert got[1] is want[1] is None
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])


@FEW
@given(
    batch=st.integers(1, 2), tokens=st.sampled_from([1, 40, 200]), routed=st.integers(1, 20), topk=st.integers(1, 20),
    padded=st.sampled_from(["", "all", "sample", "token"]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_balance(seed: int, **sizes: Any) -> None:
    torch.manual_seed(seed)
    kernels.check_against_plain_code(balance(**sizes), atol=1e-6, size=kernels.constant)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, keep: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _plain(q, k, v, scale, is_causal), q.new_empty((1,), dtype=torch.float32)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, is_causal: bool
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(_plain(*leaves, scale, is_causal), leaves, grad)


@pytest.fixture
def _library_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared heads go to a library, as on a GPU; here its place is taken by torch's plain attention."""
    monkeypatch.setattr("attention_zoo.ops._cudnn.serves", lambda *_: True)
    monkeypatch.setattr("attention_zoo.ops._cudnn.dense_forward", _plain_forward)
    monkeypatch.setattr("attention_zoo.ops._cudnn.dense_backward", _plain_backward)


@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize(
    "options", [{"shared": 2}, {"shared": 3, "keys": 31}, {"group": 1, "kv_heads": 4, "shared": 2, "is_causal": True}], ids=str
)
def test_shared_heads_apart(options: dict[str, Any]) -> None:
    """What they compute, and their gradients, are put among those of the packed heads."""
    torch.manual_seed(0)
    kernels.check_against_plain_code(mixture(topk=1, **options))


def _from_one(qkv: Tensor, gates: Tensor, chosen: Tensor, *, heads: int, kv_heads: int, **settings: Any) -> Tensor:
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    parts = ops.split_channels(qkv * 1.0, (heads * dim, kv_heads * dim, kv_heads * dim))
    q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in parts)
    return _mix(q, k, v, gates, chosen, **settings)


@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("shared", [1, 2])
def test_one_projection(shared: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries, keys and values in one tensor the gradients lie in one, too, so that nothing is copied."""
    from attention_zoo.ops import _split

    torch.manual_seed(0)
    apart = mixture(shared=shared, kv_heads=4 // group, group=group, topk=1)
    q, k, v = (apart.tensors.pop(name).transpose(1, 2).flatten(2) for name in "qkv")
    sizes = {"heads": 4, "kv_heads": 4 // group}
    case = Case(_from_one, {"qkv": torch.cat([q, k, v], -1), **apart.tensors}, {**apart.settings, **sizes}, single=("gates",))
    found: list[Tensor | None] = []
    joined = _split.joined

    def note(parts: Sequence[Tensor]) -> Tensor | None:
        found.append(joined(parts))
        return found[-1]

    monkeypatch.setattr(_split, "joined", note)
    kernels.check_against_plain_code(case)
    by_kernels, by_plain_code = found
    assert by_kernels is not None
    assert by_plain_code is None


@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize("wants_gates", [False, True])
def test_registration_of_one_projection(wants_gates: bool) -> None:
    """Operators that somebody watches are told that the tensors are apart; this is the other way."""
    from attention_zoo.ops.triton.mixture import _mixture_backward, _mixture_forward

    case = mixture(group=1, shared=1, topk=1)
    q, k, v, gates, chosen = (t.detach() for t in case.given().values())
    out, *rest = _mixture_forward.registered(q, k, v, gates, chosen.float(), 1, 0, 0.3, False, True)
    call = (torch.randn_like(out), q, k, v, gates, *rest, chosen.shape[-1], 1, 0.3, False, True, wants_gates)
    torch.library.opcheck(_mixture_backward.registered, call, test_utils=("test_schema", "test_faketensor"))


LAYERS: dict[str, dict[str, Any]] = {
    "all routed": {"shared_heads": 0, "routed_topk": 2},
    "one shared": {"shared_heads": 1, "routed_topk": 1, "qkv_bias": True},
    "some shared": {"shared_heads": 2, "routed_topk": 1, "head_dim": 24, "is_causal": True, "proj_bias": False},
    "norms": {"shared_heads": 1, "routed_topk": 1, "router": "query_norm", "num_kv_heads": 2, "qkv_bias": True, "is_causal": True},
    "norms through": {"shared_heads": 1, "routed_topk": 1, "router": "query_norm", "router_grad": "ste"},
}


def _run_layer(
    module: nn.Module, x: Tensor, backend: str, dtype: torch.dtype = torch.float32, weights: tuple[float, float] = (1.0, 1.0)
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs and loss of a layer like `module` in a dtype, and the gradients of both, so weighted."""
    layer: Any = deepcopy(module).to(DEVICE, dtype)
    given = x.to(DEVICE, dtype, copy=True).requires_grad_()
    with ops.use_backend(backend):
        out = layer(given)
    aims = [weight * t for weight, t in zip(weights, (out.float().square().sum(), layer.aux_loss), strict=True) if weight]
    leaves = {"x": given, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(sum(aims), list(leaves.values()), materialize_grads=True, allow_unused=True)
    found = {"out": out.detach(), "loss": layer.aux_loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: t.float() for name, t in found.items()}


@pytest.fixture
def nodes_seen(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What layers that are one node have settled; a backend of the test is not remembered."""
    from attention_zoo.ops import mixture_layer

    settled: dict[Any, Any] = {}
    monkeypatch.setattr(mixture_layer, "_layers", settled)
    return settled


@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "output", "loss"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layer_as_one_node(options: dict[str, Any], weights: tuple[float, float], nodes_seen: dict[Any, Any]) -> None:
    """Projections, routers, loss and all gradients, with shared heads apart or without."""
    torch.manual_seed(0)
    module, x = az.create_attention("moh", dim=32, num_heads=4, **options), torch.randn(2, 19, 32)
    want = _run_layer(module, x, "reference", torch.float64, weights)
    assert not nodes_seen
    got = _run_layer(module, x, "triton", weights=weights)
    assert len(nodes_seen) == 1
    for name, right in want.items():
        torch.testing.assert_close(got[name], right, atol=5e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_layer_as_one_node_in_half_precision(nodes_seen: dict[Any, Any]) -> None:
    """As such and under autocast, which leaves gradients of parameters in single precision."""
    torch.manual_seed(0)
    module, x = az.create_attention("moh", dim=32, num_heads=4, **LAYERS["some shared"]), torch.randn(2, 19, 32)
    want, half = _run_layer(module, x, "reference", torch.float64), torch.float16
    with torch.autocast(DEVICE, half):
        mixed = _run_layer(module, x, "triton")
    for got in (mixed, _run_layer(module, x, "triton", half)):
        for name, right in want.items():
            assert (got[name] - right).norm() < 2e-2 * right.norm(), name
    assert len(nodes_seen) == 1
    narrow = az.create_attention("moh", dim=32, num_heads=4, head_dim=12)
    want, got = _run_layer(narrow, x, "reference", torch.float64), _run_layer(narrow, x, "triton", half)
    assert len(nodes_seen) == 1  # heads that do not begin at 16 bytes are copied
    assert (got["out"] - want["out"]).norm() < 2e-2 * want["out"].norm()


@pytest.fixture
def _all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library computes all heads, as on a GPU for few tokens: torch's kernel for a CPU, or of a GPU the one that it takes."""
    monkeypatch.setattr("attention_zoo.ops.mixture_layer.packs", lambda *_, **__: False)
    monkeypatch.setattr("attention_zoo.ops.mixture_layer._kernels", {})


def _check_all_heads(module: nn.Module, x: Tensor, seen: dict[Any, Any], weights: tuple[float, float] = (1.0, 1.0)) -> None:
    """Against the plain code in double precision; `seen` tells that it was the node."""
    from attention_zoo.ops import mixture_layer

    want = _run_layer(module, x, "reference", torch.float64, weights)
    assert not mixture_layer._kernels
    got = _run_layer(module, x, "triton", weights=weights)
    assert list(mixture_layer._kernels.values()) != [None]
    assert len(seen) == (module.router_kind == "linear")
    for name, right in want.items():
        torch.testing.assert_close(got[name], right, atol=5e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("_all_heads")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "output", "loss"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "norms"])
def test_layer_of_all_heads(name: str, weights: tuple[float, float], nodes_seen: dict[Any, Any]) -> None:
    """As one node, gates multiply what torch's kernel computes: outputs, loss and all gradients, the routers' among them."""
    torch.manual_seed(0)
    module = az.create_attention("moh", dim=32, num_heads=4, **LAYERS[name])
    _check_all_heads(module, torch.randn(2, 19, 32), nodes_seen, weights)


@pytest.mark.usefixtures("_library_everywhere", "_all_heads")
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layer_of_all_heads_in_a_library(
    options: dict[str, Any], nodes_seen: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """With plain PyTorch in cuDNN's place, which has grouped heads, too."""
    monkeypatch.setattr("attention_zoo.ops._fused.fused_kernel", lambda *_: "cudnn")
    torch.manual_seed(0)
    module = az.create_attention("moh", dim=32, num_heads=4, **options)
    _check_all_heads(module, torch.randn(2, 19, 32), nodes_seen)


class _Adapted(nn.Module):
    """In the place of a projection, more than its weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * 1.5


@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize("all_heads", [False, True], ids=["packed", "all heads"])
@pytest.mark.parametrize("name", ["one shared", "norms through"])
def test_node_between_projections(
    name: str, all_heads: bool, nodes_seen: dict[Any, Any], request: pytest.FixtureRequest
) -> None:  # fmt: skip
    """Projections that are adapted stay outside, and so does a dropout behind them; each is called once."""
    if all_heads:
        request.getfixturevalue("_all_heads")
    torch.manual_seed(0)
    module: Any = az.create_attention("moh", dim=32, num_heads=4, **LAYERS[name])
    for part in ("qkv", "proj", "q_proj", "v_proj", "o_proj"):
        if hasattr(module, part):
            setattr(module, part, _Adapted(getattr(module, part)))
    x = torch.randn(2, 19, 32)
    want, got = _run_layer(module, x, "reference", torch.float64), _run_layer(module, x, "triton")
    assert len(nodes_seen) == (module.router_kind == "linear" or not all_heads)
    for key, right in want.items():
        torch.testing.assert_close(got[key], right, atol=5e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.usefixtures("_all_heads")
@pytest.mark.parametrize("options", [LAYERS["some shared"], LAYERS["norms through"]], ids=["linear", "norms"])
def test_layer_of_all_heads_in_half_precision(options: dict[str, Any], nodes_seen: dict[Any, Any]) -> None:
    """As such and under autocast, and no further from the truth than the plain code is."""
    torch.manual_seed(0)
    module, x = az.create_attention("moh", dim=32, num_heads=4, **options), torch.randn(2, 19, 32)
    want = _run_layer(module, x, "reference", torch.float64)
    for half in (torch.float16, torch.bfloat16):
        plain = _run_layer(module, x, "reference", half)
        with torch.autocast(DEVICE, half):
            mixed = _run_layer(module, x, "triton")
        for got in (mixed, _run_layer(module, x, "triton", half)):
            for name, right in want.items():
                error, usual = ((t[name] - right).norm() for t in (got, plain))
                assert error < 1.5 * usual + 4e-3 * right.norm(), f"{name} {half}: {error}, {usual}"


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU launches that are settled already do not come by `_launch`")
@pytest.mark.usefixtures("_library_everywhere")
@pytest.mark.parametrize("all_heads", [False, True], ids=["packed", "all heads"])
@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"router": "query_norm", "router_grad": "ste"}], ids=["linear", "norms"])
def test_launches_are_settled(
    options: dict[str, Any], all_heads: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """No tensor begins elsewhere than at 16 bytes, or Triton looks at all arguments of each launch; nor do losses' gradients."""
    from attention_zoo.ops.triton._launch import Launch

    if all_heads:
        request.getfixturevalue("_all_heads")
    found: list[bool] = []
    launch = Launch._launch

    def note(self: Launch, tensors: Sequence[Tensor], aligned: bool) -> None:
        found.append(aligned)
        launch(self, tensors, aligned)

    monkeypatch.setattr(Launch, "_launch", note)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 6, "shared_heads": 2, "routed_topk": 1, "head_dim": 8}
    model = nn.Sequential(*(az.create_attention("moh", 24, **sizes, **options, device=DEVICE) for _ in range(2)))
    tables = {"position_embeddings": (torch.ones(1, 9, 8, device=DEVICE), torch.zeros(1, 9, 8, device=DEVICE))}
    for positions in ({}, tables):
        with ops.use_backend("triton"):
            x = torch.randn(2, 9, 24, device=DEVICE, requires_grad=True)
            for layer in model:
                x = layer(x, **positions)
            (x.sum() + az.auxiliary_loss(model)).backward()
    assert len(found) > 10
    assert all(found)


@pytest.mark.usefixtures("_all_heads")
def test_swapped_layers_reach_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of timm's with a class token; what is more than its weights stays outside, dropped attention leaves no node."""
    from timm.models import VisionTransformer

    from attention_zoo.attention import moh

    seen: list[bool] = []
    node = moh.mixture_layer

    def note(x: Tensor, settings: Any, projected: Tensor | None, *rest: Any) -> Any:
        seen.append(projected is None)
        return node(x, settings, projected, *rest)

    monkeypatch.setattr(moh, "mixture_layer", note)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    for options, whole in (({}, [True, True]), ({"proj_drop_rate": 0.1}, [False, False]), ({"qk_norm": True}, [])):
        model = VisionTransformer(**sizes, **options).to(DEVICE)
        az.swap_attention(model, "moh", shared_heads=1, routed_topk=1)
        with ops.use_backend("triton"):
            model(x).sum().backward()
        assert seen == whole
        seen.clear()
        assert all(p.grad is not None for name, p in model.named_parameters() if "router" in name or "balance" in name)
        model.eval()
        with torch.no_grad():
            want = model(x)
            with ops.use_backend("triton"):
                torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)
        seen.clear()
    model = VisionTransformer(**sizes, attn_drop_rate=0.1).to(DEVICE)
    az.swap_attention(model, "moh", shared_heads=1, routed_topk=1)
    model(x).sum().backward()
    assert not seen


@pytest.mark.usefixtures("_all_heads")
def test_what_is_no_node(nodes_seen: dict[Any, Any]) -> None:
    """Masks, rotations, normalised queries, somebody who looks on, adapted routers: the operations one by one, the same numbers."""
    torch.manual_seed(0)
    module: Any = az.create_attention("moh", dim=32, num_heads=4, device=DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    tables = torch.ones(1, 9, 8, device=DEVICE), torch.zeros(1, 9, 8, device=DEVICE)
    with ops.use_backend("triton"):
        want = module(x)
        assert len(nodes_seen) == 1
        nodes_seen.clear()
        got = [module(x, position_embeddings=tables)]
        handle = module.router.register_forward_hook(lambda *_: None)
        got.append(module(x))
        handle.remove()
        handle = module.q_norm.register_forward_hook(lambda *_: None)
        got.append(module(x))
        handle.remove()
        with az.record_attention(module):
            got.append(module(x))
    got.append(module(x, attention_mask=mask))
    module.attn_drop = 0.5
    module(x)
    assert not nodes_seen
    for other in got:
        torch.testing.assert_close(other, want, atol=1e-5, rtol=1e-4)


def test_gates_as_one_node() -> None:
    """Where the whole layer is none, logits and gates of the linear routers are."""
    torch.manual_seed(0)
    module: Any = az.create_attention("moh", dim=36, num_heads=6, shared_heads=2, routed_topk=2, device=DEVICE)
    x = torch.randn(2, 9, 36, device=DEVICE, requires_grad=True)
    leaves = [x, module.router.weight, module.shared_router.weight, module.balance.weight]
    found = []
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            gates, scores, chosen = module._route_linearly(x)
        assert not chosen.requires_grad
        aim = (gates * torch.arange(6, device=DEVICE).cos()).sum() + scores.square().sum()
        found.append((gates, scores, chosen, *torch.autograd.grad(aim, leaves)))
        assert (gates.grad_fn.name() == "_GatesBackward") == (backend == "triton")
    for right, got in zip(*found, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_hooks_see_the_layers_of_a_mixture(nodes_seen: dict[Any, Any]) -> None:
    """Projections that somebody waits for are called; a layer without gradients, in evaluation, has no loss."""
    torch.manual_seed(0)
    module: Any = az.create_attention("moh", dim=32, num_heads=4, device=DEVICE).eval()
    x, seen = torch.randn(1, 9, 32, device=DEVICE), []
    with ops.use_backend("triton"), torch.no_grad():
        want = module(x)
        assert module.aux_loss is None
        module.debug = True
        module(x)
        assert module.last_head_load.shape == (module.routed_heads,)
        assert len(nodes_seen) == 2
        handle = module.balance.register_forward_hook(lambda *_: seen.append(1))
        got = module(x)
        handle.remove()
    assert seen == [1]
    assert len(nodes_seen) == 2
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("active", "tokens", "is_causal", "packed"),
    [
        (8, 4096, False, True), (8, 4096, True, True), (8, 2048, False, False), (11, 4096, False, True), (12, 4096, False, False),
        (12, 16384, False, True), (12, 8192, True, True), (12, 4096, True, False), (13, 16384, False, False),
    ],
)  # fmt: skip
def test_what_is_packed(active: int, tokens: int, is_causal: bool, packed: bool) -> None:
    """As measured, with 4 samples and 16 heads of 64: the more heads are active, the longer sequences must be."""
    from attention_zoo.ops.mixture import pays

    assert pays((4, 16, tokens, 64), torch.bfloat16, tokens, 8, active - 8, is_causal) == packed
    assert not pays((4, 16, tokens, 64), torch.float32, tokens, 8, active - 8, is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("cudnn", torch.bfloat16), ("flash", torch.bfloat16), ("efficient", torch.bfloat16), ("efficient", torch.float32)],
)
@pytest.mark.parametrize("options", ["one shared", "some shared", "norms", "norms through"])
def test_layer_of_all_heads_on_a_gpu(options: str, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of torch's kernels, as "auto" takes them for few tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from attention_zoo.ops import mixture_layer

    found: dict[Any, Any] = {}
    monkeypatch.setattr(mixture_layer, "_kernels", found)
    torch.manual_seed(0)
    module = az.create_attention("moh", dim=256, num_heads=4, **{**LAYERS[options], "head_dim": 64})
    x = torch.randn(3, 197, 256)
    want, plain = (_run_layer(module, x, "reference", kind) for kind in (torch.float64, dtype))
    backend = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}[kernel]
    with sdpa_kernel([getattr(SDPBackend, backend), SDPBackend.MATH]):
        got = _run_layer(module, x, "auto", dtype)
        layer = deepcopy(module).to(DEVICE, dtype)
        with torch.no_grad():
            unrecorded = layer(x.to(DEVICE, dtype))
    served = None if kernel == "efficient" and options == "norms" else kernel  # it has no grouped heads
    assert set(found.values()) == {served}
    got["unrecorded"] = unrecorded.float()
    for part, own in got.items():
        name = "out" if part == "unrecorded" else part
        right = want[name]
        error, usual = (own - right).norm(), (plain[name] - right).norm()
        # a bias of the keys moves all logits of a query alike: what is left of its gradient is rounding
        size = want["k_proj.weight"].norm() if name == "k_proj.bias" else right.norm()
        assert error < 1.5 * usual + 4e-3 * size, f"{part}: {error}, {usual}"


@pytest.mark.gpu
@pytest.mark.usefixtures("_always_beside")
@pytest.mark.parametrize("least", [0, 2**60], ids=["packed", "all heads"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layer_in_a_graph(options: dict[str, Any], least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a layer as one node, recorded after an eager call and in front of one, replayed with other tokens."""
    monkeypatch.setattr("attention_zoo.ops.mixture._LEAST_WORK", (least, least))
    torch.manual_seed(0)
    module: Any = az.create_attention("moh", dim=256, num_heads=4, **{**options, "head_dim": 64}).to(DEVICE, torch.bfloat16)
    module.set_topk(1)
    x, other = (torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = module(x)
        aim = out.float().square().mean() + module.aux_loss
        return out.detach(), *torch.autograd.grad(aim, (x, *module.parameters()))

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        recorded = run()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    for got, want in zip(recorded, run(), strict=True):  # cuDNN adds up gradients in any order
        assert (got - want).float().norm() <= 1e-2 * want.float().norm()


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
