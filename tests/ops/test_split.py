"""The parts of a fused projection: their gradients are put together, without a copy where they lie in one tensor already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo import ops
from attention_zoo.ops._split import joined, lie_in_one

SIZES = (8, 4, 4)


def parts_of(whole: Tensor) -> list[Tensor]:
    """As gradients of heads of 2 channels come back: turned to (B, H, N, D) and back again."""
    return [t.unflatten(-1, (-1, 2)).transpose(1, 2).transpose(1, 2).flatten(2) for t in whole.split(SIZES, -1)]


@pytest.mark.parametrize("apart", [False, True])
def test_gradient(apart: bool) -> None:
    whole, x = torch.randn(3, 5, 16), torch.randn(3, 5, 16, requires_grad=True)
    grads = [t.clone() for t in parts_of(whole)] if apart else parts_of(whole)
    (found,) = torch.autograd.grad(ops.split_channels(x, SIZES), x, grads)
    assert torch.equal(found, whole)
    assert (found.data_ptr() == whole.data_ptr()) != apart


def test_parts_that_nobody_used() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    (found,) = torch.autograd.grad(ops.split_channels(x, SIZES)[1].sum(), x)
    assert torch.equal(found, torch.cat([torch.zeros(3, 5, 8), torch.ones(3, 5, 4), torch.zeros(3, 5, 4)], -1))


def test_gradients_of_gradients() -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: [t**3 for t in ops.split_channels(x * x, SIZES)], (x,))


def test_compiled_in_one_graph() -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    compiled = torch.compile(lambda x: ops.split_channels(x, SIZES)[1].square(), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(ops.split_channels(x, SIZES)[1].square().sum(), x)
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], want[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, v, k),  # in another order
        lambda q, k, v: (q, k),  # not all of it
        lambda q, k, v: (q, k, v.clone()),
        lambda q, k, v: (q, k, v[:, :, ::2]),
        lambda q, k, v: (q[:2], k[:2], v[:2].double()),
        lambda q, k, v: (q[:0], k[:0], v[:0]),
    ],
    ids=["order", "some", "elsewhere", "steps", "dtype", "empty"],
)
def test_what_is_no_whole(change: object) -> None:
    assert callable(change)
    assert joined(change(*parts_of(torch.randn(3, 5, 16)))) is None


def test_heads_in_one() -> None:
    q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in torch.randn(3, 5, 16).split(SIZES, -1))
    assert lie_in_one(q, k, v)
    assert not lie_in_one(q, v, k)
    assert not lie_in_one(q, k, v.clone())
    assert not lie_in_one(q, k[:, :, :4], v[:, :, :4])
