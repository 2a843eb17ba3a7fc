"""Every engine that runs on a CPU against the reference: outputs and gradients, or a refusal that says why."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from marks import slow_but
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask

from attention_zoo import ops
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.engines import ENGINES
from attention_zoo.ops.engines.flex import _packed_block_mask, _window_block_mask
from attention_zoo.ops.engines.sdpa import cudnn_first, cudnn_late
from tests.ops.problems import Call, calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(call=calls(softcap=False, lse=False))
def test_torch_equals_the_reference(dtype: torch.dtype, call: Call) -> None:
    call = call.to(dtype)
    results, gradients = call.run_with_gradients("torch")
    expected, expected_gradients = call.run_with_gradients("reference")
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(results, expected, **tolerance)
    torch.testing.assert_close(gradients, expected_gradients, **tolerance)


@given(call=calls())
@settings(max_examples=40)
def test_auto_equals_the_reference(call: Call) -> None:
    call = call.to(torch.float64)
    results, gradients = call.run_with_gradients("auto")
    expected, expected_gradients = call.run_with_gradients("reference")
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


@given(call=calls(lse=False))
@settings(max_examples=8)
def test_flex_equals_the_reference_without_gradients(call: Call) -> None:
    call = call.to(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(call.run("flex"), call.run("reference"), rtol=2e-4, atol=2e-5)
    with pytest.raises(ops.BackendError, match="has no gradient on a CPU"):
        call.run("flex")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_the_budget_of_low_precision(dtype: torch.dtype) -> None:
    """No worse than twice the error that rounding the inputs' exact result and the weights to `dtype` makes."""
    q, k, v = (torch.randn(2, 4, 33, 16).to(dtype) for _ in range(3))
    exact = ops.attention(q.double(), k.double(), v.double(), is_causal=True, backend="reference")
    weights = (q @ k.mT / 4).masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    budget = 2 * ((weights @ v).double() - exact).abs().max() + torch.finfo(dtype).eps
    out = ops.attention(q, k, v, is_causal=True, backend="torch")
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= budget


def test_a_bias_of_another_dtype_keeps_its_finite_values_finite() -> None:
    """float32's lowest number is -inf in float16: a row that holds nothing else is still no masked row."""
    q, k, v = (torch.randn(1, 1, 3, 8, dtype=torch.float16) for _ in range(3))
    bias = torch.zeros(3, 3)
    bias[0] = torch.finfo(torch.float32).min
    bias[1, 1:] = -1e9
    bias[2] = -torch.inf
    out = ops.attention(q, k, v, bias=bias, backend="torch")
    assert out.isfinite().all()
    assert (out[0, 0, 0] != 0).any()
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 0])
    assert (out[0, 0, 2] == 0).all()


def test_shared_heads_are_folded_where_all_rows_have_one_mask() -> None:
    """Keys and values keep their heads: torch gets four tensors with the heads of k."""
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])[:, None, None]
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append((q.shape, k.shape))
        return original(q, k, v, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        out = ops.attention(q, k, v, attn_mask=mask, backend="torch")
    assert seen == [((2, 2, 9, 8), (2, 2, 5, 8))]
    torch.testing.assert_close(out, ops.attention(q, k, v, attn_mask=mask, backend="reference"), rtol=1e-5, atol=1e-6)
    assert (out[1] == 0).all()


LENGTHS = ((7, 7), (5, 9), (11, 11), (1, 6))


@pytest.mark.parametrize(("dynamic", "lengths"), slow_but(1, [(None, LENGTHS[:2]), (None, LENGTHS), (True, LENGTHS)]))
def test_compiled_in_one_graph_equals_eager(dynamic: bool | None, lengths: tuple[tuple[int, int], ...]) -> None:
    torch._dynamo.reset()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, **call: object) -> list:
        parts = [
            ops.attention(q, k, v, **call),
            ops.attention(q, k, v, is_causal=True, window_size=2, **call),
            *ops.attention(q, k, v, softcap=2.0, return_lse=True, **call),
        ]
        if q.shape[2] == k.shape[2]:
            parts.append(ops.attention(q[:1], k[:1], v[:1], cu_seqlens=cu_seqlens, is_causal=True))
        return parts

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_queries, num_keys in lengths:
        q = torch.randn(2, 4, num_queries, 8, requires_grad=True)
        k, v = torch.randn(2, 2, num_keys, 8, requires_grad=True), torch.randn(2, 2, num_keys, 8)
        bias = torch.randn(4, num_queries, num_keys, requires_grad=True)
        offsets = torch.tensor([0, 2, num_queries], dtype=torch.int32)
        results, expected = compiled(q, k, v, offsets, bias=bias), attend(q, k, v, offsets, bias=bias)
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
        gradients, expected_gradients = (torch.autograd.grad(sum(p.sum() for p in r), (q, k, bias)) for r in (results, expected))
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_order_of_kernels_only_within() -> None:
    with cudnn_late():  # on a GPU the first look for a kernel in a process changes torch's order
        pass
    before = torch._C._get_sdp_priority_order()
    for order, first in ((cudnn_first, SDPBackend.CUDNN_ATTENTION), (cudnn_late, SDPBackend.FLASH_ATTENTION)):
        with order():
            within = torch._C._get_sdp_priority_order()
        assert within[0] == first.value
        assert sorted(within) == sorted(before)
        assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("queries", [1, 2])
def test_one_query_makes_no_plan(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensors without data that say that they are on a Hopper GPU: cuDNN comes first but for one query, whose keys grow."""
    orders = []

    def record(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        orders.append(torch._C._get_sdp_priority_order())
        return q

    monkeypatch.setattr("attention_zoo.ops.engines.sdpa.compute_capability", lambda _: 90)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    with FakeTensorMode():
        q = torch.empty(1, 4, queries, 16, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(1, 2, 7, 16, device="cuda", dtype=torch.bfloat16)
        ENGINES["torch"].run(q, k, k, make_problem(q, k, k))
    places = [
        orders[0].index(getattr(torch.nn.attention.SDPBackend, name).value) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    ]
    assert (places[0] < places[1]) == (queries > 1)


def test_more_samples_than_a_grid_holds_are_served_in_groups() -> None:
    """The grouping itself, on the CPU in groups of 3: samples, masks of each sample and shared biases stay together."""
    run_in_parts = importlib.import_module("attention_zoo.ops.attention")._run_in_parts
    q, k, v = (torch.randn(7, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    settings = {"attn_mask": torch.rand(7, 1, 5, 5) > 0.4, "bias": torch.randn(1, 2, 5, 5, dtype=torch.float64), "return_lse": True}
    expected = ops.attention(q, k, v, **settings, backend="reference")
    problem = make_problem(q, k, v, **settings)
    torch.testing.assert_close(run_in_parts(ENGINES["reference"], q, k, v, problem, 3), expected)
    del settings["return_lse"]
    out, lse = run_in_parts(ENGINES["torch"], q, k, v, make_problem(q, k, v, **settings), 3)
    torch.testing.assert_close(out, expected[0])
    assert lse is None


@pytest.mark.parametrize(("left", "right"), [(None, 0), (0, None), (3, 0), (100, 130), (300, 3)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 300), (129, 128), (128, 129), (512, 300), (300, 777)])
def test_flex_leaves_out_the_blocks_that_torch_finds_in_the_map(
    left: int | None, right: int | None, num_queries: int, num_keys: int
) -> None:
    found = _window_block_mask(left, right, num_queries, num_keys, torch.device("cpu"))
    wanted = create_block_mask(found.mask_mod, None, None, num_queries, num_keys, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert blocks_of(found, kind) == blocks_of(wanted, kind), kind


@pytest.mark.parametrize(
    "window", [{}, {"is_causal": True}, {"is_causal": True, "window_size": 200}, {"window_size": (30, 150)}], ids=str
)
@pytest.mark.parametrize(
    ("lengths", "key_lengths"),
    [
        ([256, 128, 384], None),  # at the edges of blocks
        ([300, 0, 77, 500], None),
        ([3, 5, 40, 1, 200, 150], None),
        ([100, 50, 300], [400, 0, 333]),
        ([130, 60], [7, 900]),
    ],
    ids=str,
)
def test_flex_leaves_out_blocks_of_other_sequences(
    lengths: list[int], key_lengths: list[int] | None, window: dict[str, Any]
) -> None:
    """Those that torch finds in the map; blocks in several sequences may count as attended where none of their pairs is."""
    offsets = [torch.tensor([0, *kept]).cumsum(0).int() for kept in (lengths, key_lengths or lengths)]
    q, k = (torch.empty(1, 1, int(o[-1]), 16) for o in offsets)
    problem = make_problem(q, k, k, cu_seqlens=offsets[0], cu_seqlens_k=offsets[1], **window)
    found = _packed_block_mask(problem)
    wanted = create_block_mask(found.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
    assert blocks_of(found, "full_kv") == blocks_of(wanted, "full_kv")
    sequences = [torch.repeat_interleave(torch.arange(len(o) - 1), o.diff()).split(128) for o in offsets]
    for row, (parts, needed) in enumerate(zip(blocks_of(found, "kv"), blocks_of(wanted, "kv"), strict=True)):
        assert needed <= parts
        for column in parts - needed:
            inside = [set(of[at].tolist()) for of, at in zip(sequences, (row, column), strict=True)]
            assert inside[0] & inside[1]
            assert max(map(len, inside)) > 1


def blocks_of(mask: Any, kind: str) -> list[set[int]]:
    """The blocks of one kind that a mask of torch's lists for each row (or column)."""
    numbers, blocks = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    assert numbers.dtype == blocks.dtype == torch.int32
    return [set(row[:number].tolist()) for number, row in zip(numbers[0, 0], blocks[0, 0], strict=True)]
