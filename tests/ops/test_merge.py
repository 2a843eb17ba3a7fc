"""Merging attention over parts of the keys."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attention_zoo import ops


def parts_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, cuts: list[int]) -> tuple[list, list]:
    outputs, lses = [], []
    for start, end in pairwise(cuts):
        part = slice(start, end)
        out, lse = ops.attention(q, k[:, :, part], v[:, :, part], attn_mask=mask[..., part], return_lse=True)
        outputs.append(out)
        lses.append(lse)
    return outputs, lses


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 1, 2, 9], [0, 3, 3, 9]])
def test_equals_attention_over_the_union_with_gradients(cuts: list[int]) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))
    mask = torch.rand(2, 1, 5, 9) > 0.6
    mask[0, :, 1] = False  # sees nothing at all
    mask[0, :, 2, :4] = False  # sees nothing of the first part
    merged, lse = ops.merge_attention(*parts_of(q, k, v, mask, cuts))
    out, expected_lse = ops.attention(q, k, v, attn_mask=mask, return_lse=True)
    torch.testing.assert_close(merged, out, rtol=1e-6, atol=1e-6)  # the normalisers are float32
    torch.testing.assert_close(lse, expected_lse)
    assert (merged[0, :, 1] == 0).all()
    assert (lse[0, :, 1] == -torch.inf).all()
    weights = torch.cos(torch.arange(out.numel())).reshape(out.shape)
    gradients = torch.autograd.grad((merged * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((out * weights).sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_gradcheck_and_dtypes() -> None:
    outputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: ops.merge_attention([a, b], [c, d]), (*outputs, *lses))
    merged, lse = ops.merge_attention([o.bfloat16() for o in outputs], [x.float() for x in lses])
    assert (merged.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "at least one"),
        ([(1, 2, 3, 4)], [], "1 outputs and 0"),
        ([(1, 2, 3, 4), (1, 2, 4, 4)], [(1, 2, 3), (1, 2, 4)], "share one shape"),
        ([(1, 2, 3, 4)], [(1, 2, 3, 1)], "share one shape"),
    ],
)
def test_bad_parts(outputs: list, lses: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.merge_attention([torch.zeros(s) for s in outputs], [torch.zeros(s) for s in lses])
