"""Few queries to many keys: the kernels that split the keys between programs, against the plain code; who is sent to them.

Without a GPU they run under TRITON_INTERPRET=1, which conftest.py sets.
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
from kernel_case import DEVICE, FEW, Called, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

MANY = 4099 if DEVICE == "cuda" else 150  # keys of several programs


@pytest.fixture(autouse=True)
def _short_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is one processor, which would have all the keys in one program."""
    if DEVICE == "cpu":
        monkeypatch.setattr("attention_zoo.ops.triton.decode.processors", lambda _: 8)


def heads(batch: int, number: int, length: int, dim: int) -> Tensor:
    return torch.randn(batch, length, number, dim).transpose(1, 2)


def padding(batch: int, keys: int, masked: bool) -> dict[str, Tensor]:
    """The first keys of each sample may not be seen; of the last sample none of them."""
    first = torch.arange(batch) * keys // max(batch - 1, 1)
    return {"attn_mask": (torch.arange(keys) >= first[:, None])[:, None, None]} if masked else {}


def one_map(
    batch: int = 2, kv_heads: int = 2, share: int = 3, queries: int = 1, keys: int = 18, dim: int = 8, value_dim: int = 16,
    each: bool | None = None, is_causal: bool = True, masked: bool = False,
) -> Case:  # fmt: skip
    """Heads that are shared evenly, or by a map: of each sample, or one for all. The last key/value head is read by nobody then."""
    number = kv_heads * share
    tensors = {
        "q": heads(batch, number, queries, dim),
        "k": torch.randn(batch, kv_heads, keys, dim),
        "v": heads(batch, kv_heads, keys, value_dim),
        **padding(batch, keys, masked),
    }
    if each is not None:
        tensors["head_map"] = torch.randint(max(kv_heads - 1, 1), (batch, number) if each else (number,))
    unbatched = () if each is not False else ("head_map",)
    return Case(_attend, tensors, {"is_causal": is_causal}, unbatched=unbatched, learns=False, operators=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, head_map: Tensor | None = None, backend: str, **call: Any) -> Tensor:
    if head_map is not None:
        with ops.use_backend(backend):
            return ops.attention_by_head_map(q, k, v, head_map, **call)
    if backend == "triton":  # the engine serves a single query without a mask only
        from attention_zoo.ops.triton.decode import decode_attention

        mask = call.pop("attn_mask", None)
        return decode_attention(q, k, v, scale=q.shape[3] ** -0.5, key_mask=None if mask is None else mask[:, 0, 0], **call)
    out = ops.attention(q, k, v, backend=backend, **call)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def both_maps(
    batch: int = 2, kv_heads: int = 2, groups: int = 1, group: int = 2, queries: int = 1, keys: int = 18, dim: int = 8,
    value_dim: int = 16, joint: bool = False, per_token: bool = True, norm: bool = True, weighted: bool = True,
    is_causal: bool = True, masked: bool = False,
) -> Case:  # fmt: skip
    """`groups` noise heads for each key/value head, each with a `group` of signal heads."""
    noises = kv_heads * groups
    signals = noises * group
    tensors = {
        "q": heads(batch, signals + joint * noises, queries, dim),
        "k": heads(batch, (1 + joint) * kv_heads, keys, dim),
        "v": torch.randn(batch, kv_heads, keys, value_dim),
        "factor": torch.rand(batch, queries, signals) if per_token else torch.tensor(0.4),
        **padding(batch, keys, masked),
    }
    if not joint:
        tensors |= {"noise_q": torch.randn(batch, noises, queries, dim), "noise_k": torch.randn(batch, kv_heads, keys, dim)}
    if norm and weighted:
        tensors["weight"] = torch.rand(value_dim) + 0.5
    settings = {"is_causal": is_causal, "groups": noises, "scale": 0.3, **({"eps": 1e-2, "gain": 0.8} if norm else {})}
    unbatched = ("weight",) if per_token else ("factor", "weight")
    return Case(
        ops.differential_attention, tensors, settings, ("factor", "weight"), unbatched=unbatched, learns=False, operators=1
    )  # fmt: skip


def compare(case: Case) -> None:
    kernels.check_against_plain_code(case, atol=1e-5, size=kernels.constant)


SIZES: dict[str, Any] = {
    "batch": st.integers(1, 2), "kv_heads": st.integers(1, 3), "queries": st.sampled_from([1, 1, 2, 8]),
    "keys": st.sampled_from([2, 5, 64, MANY]), "is_causal": st.booleans(), "masked": st.booleans(),
}  # fmt: skip


@FEW
@given(
    share=st.sampled_from([1, 3, 20]), dims=st.sampled_from([(8, 8), (8, 16), (24, 40), (40, 12)]),
    each=st.sampled_from([None, True, False]), **SIZES,
)  # fmt: skip
def test_one_map(dims: tuple[int, int], **sizes: Any) -> None:
    compare(one_map(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    groups=st.sampled_from([1, 2]), group=st.sampled_from([1, 3]), dims=st.sampled_from([(8, 16), (24, 48), (20, 12)]),
    joint=st.booleans(), per_token=st.booleans(), norm=st.booleans(), weighted=st.booleans(), **SIZES,
)  # fmt: skip
def test_both_maps(dims: tuple[int, int], **sizes: Any) -> None:
    compare(both_maps(dim=dims[0], value_dim=dims[1], **sizes))


WIDE: dict[str, Callable[[], Case]] = {
    "grouped": lambda: one_map(1, 1, 70, keys=MANY),  # more rows than a tile has
    "mapped": lambda: one_map(2, 3, 4, keys=MANY, each=True, masked=True),
    "mapped-many": lambda: one_map(1, 3, 25, keys=MANY, each=False),
    "several-queries": lambda: one_map(1, 2, 2, queries=5, keys=MANY),
    "maps": lambda: both_maps(1, 1, 2, 3, keys=MANY, dim=128, value_dim=256),
    "maps-many": lambda: both_maps(1, 1, 1, 40, queries=2, keys=MANY, per_token=False),
    "more-queries-than-keys": lambda: both_maps(queries=8, keys=5),
}


@pytest.mark.parametrize("make", WIDE.values(), ids=list(WIDE))
def test_several_programs(make: Callable[[], Case]) -> None:
    compare(make())


MAKERS: dict[str, Callable[[], Case]] = {
    "grouped": lambda: one_map(keys=MANY),
    "mapped": lambda: one_map(each=True, masked=True),
    "maps": lambda: both_maps(keys=MANY, per_token=False),
    "maps-masked": lambda: both_maps(masked=True, norm=False, joint=True),
}


@kernels.each_check(MAKERS)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_keys_that_do_not_lie_in_steps_of_16_bytes() -> None:
    """Cut out of wider tensors, in which channels are not next to each other either."""
    case = both_maps(keys=40)
    cut = {}
    for name in ("q", "k", "noise_k", "v"):
        tensor = case.tensors[name]
        room = torch.empty(*tensor.shape[:3], tensor.shape[3] + 3) if name != "v" else tensor.new_empty((*tensor.shape, 2))
        cut[name] = room[..., 1 : 1 + tensor.shape[3]].copy_(tensor) if name != "v" else room[..., 1].copy_(tensor)
    compare(case.of(**cut))


def test_half_precision_of_a_layer_of_a_language_model() -> None:
    kernels.check_half_precision(both_maps(1, 1, keys=MANY, dim=128, value_dim=256))


def operators_of(call: Callable[[], Any]) -> set[str]:
    with Called() as calls:
        call()
    return calls.names


def on_device(case: Case) -> dict[str, Any]:
    return {name: tensor.to(DEVICE) for name, tensor in case.tensors.items()} | case.settings


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_p": 0.5},
        {"attn_mask": torch.ones(2, 1, 1, 18)},
        {"attn_mask": torch.ones(2, 2, 1, 18, dtype=torch.bool)},
        {"q": "learns"},
        {"factor": "learns"},
        {"weight": "learns"},
    ],
    ids=["dropout", "float", "heads", "q", "factor", "weight"],
)
def test_what_goes_another_way(changes: dict[str, Any]) -> None:
    """By name the kernels of both maps may serve it still, or refuse."""
    call = on_device(both_maps(group=1))
    for name, change in changes.items():
        call[name] = call[name].requires_grad_() if change == "learns" else change.to(DEVICE) if name == "attn_mask" else change
    assert "decode_difference" not in operators_of(lambda: ops.differential_attention(**call))
    with ops.use_backend("triton"):
        try:
            names = operators_of(lambda: ops.differential_attention(**call))
        except ops.BackendError:
            return
    assert "decode_difference" not in names


@pytest.mark.parametrize("make", [one_map, lambda: one_map(each=True), both_maps], ids=["grouped", "mapped", "maps"])
def test_who_is_sent_there(make: Callable[[], Case]) -> None:
    """Single queries: on CUDA, or by name; those of both maps not where somebody looks on, who sees the calls of `attention`."""
    case = make()
    operation = ops.attention if "head_map" not in case.tensors and "factor" not in case.tensors else case.operation
    name = "decode_difference" if "factor" in case.tensors else "decode_attention"

    def found(backend: str) -> set[str]:
        return operators_of(lambda: operation(**on_device(case), backend=backend))

    assert found("triton") == {name}
    assert found("auto") == ({name} if DEVICE == "cuda" else set())
    with kernels.looking_on():
        assert "decode_difference" not in found("auto")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_few_queries_by_name(queries: int, is_causal: bool) -> None:
    q, k, v = (t.to(DEVICE) for t in list(one_map(queries=queries, keys=MANY).tensors.values())[:3])
    got = ops.attention(q, k, v, is_causal=is_causal, backend="triton")
    torch.testing.assert_close(got, ops.attention(q, k, v, is_causal=is_causal, backend="reference"), atol=1e-5, rtol=1e-5)


@given(
    rows=st.integers(1, 2000), keys=st.integers(0, 4000).map(lambda n: 64 * n), room=st.sampled_from([101_376, 166_912, 232_448])
)
def test_how_keys_are_split(rows: int, keys: int, room: int) -> None:
    """Portions are not empty and not more than pay, and what is on its way fits into a multiprocessor."""
    from attention_zoo.ops.triton._portions import split_keys

    split = split_keys(rows, keys, 132, room)
    parts = -(-keys // split.chunk)
    assert split.chunk % 64 == 0
    assert rows > 132 or rows * parts <= 2 * 132
    assert rows <= 132 or parts <= 1
    assert (split.stages - 1) * (64 if split.large_tiles else 32) * 1024 + 12 * 1024 <= room


@pytest.mark.parametrize("value_dim", [8, 16])
def test_the_engine_of_few_queries(value_dim: int) -> None:
    """Named it serves any; asked for by nobody it comes first where values have another width than keys."""
    q, k, v = (t.to(DEVICE) for t in list(one_map(value_dim=value_dim).tensors.values())[:3])
    explanation = ops.explain(q, k, v, backend="triton")
    assert explanation.chosen == "triton"
    if DEVICE == "cuda":
        assert (ops.explain(q, k, v).chosen == "triton") == (value_dim != 8)
    for reason, changes in {
        "log-normaliser": {"return_lse": True},
        "mask": {"window_size": (3, 0)},
        "up to 8 queries": {"q": q.expand(-1, -1, 9, -1)},
        "few queries": {"q": q.expand(-1, -1, 8, -1).clone().requires_grad_()},
        "backward": {"q": q.clone().requires_grad_()},
        "float64": {"q": q.double(), "k": k.double(), "v": v.double()},
        "256": {"v": v.repeat(1, 1, 1, 257)},
    }.items():
        refused = {report.name: report for report in ops.explain(**{"q": q, "k": k, "v": v, **changes})}["triton"]
        assert reason in str(refused.reason)


# What a mechanism needs to decode, and which operator a step of it reaches.
STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "diff": ({}, "decode_difference"),
    "diff-grouped": ({"num_kv_heads": 2}, "decode_difference"),
    "diff-halves": ({"pairing": "halves"}, "decode_difference"),
    "gda": ({"num_noise_heads": 2, "num_kv_heads": 2}, "decode_difference"),
    "kdgqa": ({"num_kv_heads": 2, "alloc_scope": "frozen"}, "decode_attention"),
}


def check_steps(kind: str, dim: int, prompt: int, steps: int, dtype: torch.dtype, backend: str, padded: bool) -> None:
    from transformers import DynamicCache

    options, operator = STEPS[kind]
    module: Any = az.create_attention(kind.partition("-")[0], dim, 4, is_causal=True, device=DEVICE, dtype=dtype, **options).eval()
    module.layer_idx, cache = 0, DynamicCache()
    if "allocation" in dict(module.named_buffers()):
        module.allocation.copy_(torch.tensor([3, 1]))
    x = torch.randn(2, prompt + steps, dim, device=DEVICE, dtype=dtype)
    mask = None
    if padded:
        mask = torch.ones(2, prompt + steps, dtype=torch.bool, device=DEVICE)
        mask[1, : prompt // 2] = False
    with torch.no_grad():
        with ops.use_backend("reference"):
            want = module(x, attention_mask=mask)
        module(x[:, :prompt], past_key_values=cache, attention_mask=None if mask is None else mask[:, :prompt])
        for n in range(prompt, prompt + steps):
            seen = None if mask is None else mask[:, : n + 1]
            with ops.use_backend(backend), Called() as calls:
                got = module(x[:, n : n + 1], past_key_values=cache, attention_mask=seen)
            assert operator in calls.names
            assert (got - want[:, n : n + 1]).float().norm() <= 8 * torch.finfo(dtype).eps * want[:, n : n + 1].float().norm()
        with ops.use_backend(backend):  # and once unseen, past the dispatcher
            module(x[:, -1:], past_key_values=cache, attention_mask=None if mask is None else mask.new_ones(2, n + 2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_with_a_cache(kind: str, padded: bool) -> None:
    """As the full forward in plain code."""
    check_steps(kind, 32, 12, 2, torch.float32, "auto" if DEVICE == "cuda" else "triton", padded)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_with_a_cache_on_a_gpu(kind: str, padded: bool) -> None:
    check_steps(kind, 512 if kind == "kdgqa" else 1024, 1000, 3, torch.bfloat16, "auto", padded)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_one_query_without_our_kernels(groups: int) -> None:
    """Values in halves, which torch's flash kernel takes: cuDNN would make a plan for every number of keys."""
    case, names = both_maps(1, 2, groups, 3, keys=300, dim=128, value_dim=256), set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    with Note():
        got = case.run("torch", torch.bfloat16)["out"].float()
    want = case.run("reference")["out"]
    assert (got - want).norm() < 6 * torch.finfo(torch.bfloat16).eps * want.norm()
    assert {name for name in names if "dot_product" in name} == {"_scaled_dot_product_flash_attention"}


@pytest.mark.parametrize("make", [lambda **sizes: one_map(each=True, **sizes), both_maps], ids=["mapped", "maps"])
def test_keys_that_grow_are_compiled_once(make: Callable[..., Case]) -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(make().operation, fullgraph=True, dynamic=True, backend=count)
    for keys in (18, 19, 40):
        case = make(keys=keys)
        torch.testing.assert_close(case.run("triton", function=compiled), case.run("reference"), atol=1e-5, rtol=1e-4)
    assert len(graphs) == 1


def test_the_factor_of_a_layer() -> None:
    from attention_zoo.ops.differential import difference_factor

    vectors = [torch.randn(20, device=DEVICE) * 0.3 for _ in range(4)]
    want = difference_factor(*(t.clone().requires_grad_() for t in vectors), 0.2)
    with ops.use_backend("auto" if DEVICE == "cuda" else "triton"):
        assert operators_of(lambda: difference_factor(*vectors, 0.2)) == {"difference_factor"}
        torch.testing.assert_close(difference_factor(*vectors, 0.2), want.detach())
    opcheck(torch.ops.attention_zoo.difference_factor, (*vectors, 0.2))


def opcheck(operator: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("allocation", [[3, 0, 5], [8], [0, 1, 1]])
def test_a_stored_allocation(allocation: list[int]) -> None:
    from attention_zoo.attention.kdgqa import allocation_to_head_map
    from attention_zoo.ops.triton.head_map import read_allocation

    stored = torch.tensor(allocation, device=DEVICE)
    copy, head_map = read_allocation(stored, 8)
    assert torch.equal(head_map, allocation_to_head_map(stored, 8))
    assert torch.equal(copy, stored)
    assert copy.data_ptr() != stored.data_ptr()
    opcheck(torch.ops.attention_zoo.read_allocation, (stored, 8))
