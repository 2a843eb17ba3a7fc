"""The kernel of column sums against PyTorch's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from attention_zoo.ops.triton.column_sums import column_sums, joint_column_sums

LARGER = 40 if DEVICE == "cuda" else 1  # the interpreter is slow


@FEW
@given(
    rows=st.integers(0, 300 * LARGER),
    columns=st.sampled_from([0, 1, 16, 70, 200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    part=st.booleans(),
)
def test_column_sums(rows: int, columns: int, dtype: torch.dtype, part: bool) -> None:
    x = torch.randn(rows, columns + 3, device=DEVICE).to(dtype)[:, 3 if part else 0 :][:, :columns]
    got = column_sums(x)
    assert got.dtype == dtype
    last_place = max(1e-5, torch.finfo(dtype).eps)  # the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(got.float(), x.float().sum(0), rtol=last_place, atol=1e-5 * max(1, rows) ** 0.5)


@pytest.mark.parametrize("sizes", [((150, 70), (20, 16)), ((20, 1), (0, 30), (200, 140)), ((9, 0), (70, 33), (70, 33))])
def test_several_matrices(sizes: tuple[tuple[int, int], ...]) -> None:
    matrices = [torch.randn(size, device=DEVICE) for size in sizes]
    for got, x in zip(joint_column_sums(matrices), matrices, strict=True):
        torch.testing.assert_close(got, x.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(130, 40), (0, 8)])
def test_registration(shape: tuple[int, int]) -> None:
    torch.library.opcheck(column_sums.registered, (torch.randn(shape, device=DEVICE),))


@pytest.mark.gpu
def test_the_same_every_time_and_in_a_graph() -> None:
    x = torch.randn(10_000, 300, device="cuda", dtype=torch.bfloat16)
    want = column_sums(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = column_sums(x)
    graph.replay()
    assert torch.equal(got, want)
