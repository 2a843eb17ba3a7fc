"""The reference against the definition, written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from attention_zoo import ops
from tests.ops.problems import Call, calls


def by_definition(call: Call) -> tuple[Tensor, Tensor]:
    """Each weight from its own scalar product, in Python floats."""
    q, k, v, s = call.q, call.k, call.v, call.settings
    batch, heads, num_queries, head_dim = q.shape
    num_keys, groups = k.shape[2], heads // k.shape[1]
    scale = s.get("scale") or 1 / math.sqrt(head_dim)
    window = s.get("window_size")
    left, right = window if isinstance(window, tuple) else (window, window)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float64)
    starts_q = s["cu_seqlens"].tolist() if "cu_seqlens" in s else [0, num_queries]
    starts_k = s["cu_seqlens_k"].tolist() if "cu_seqlens_k" in s else starts_q if "cu_seqlens" in s else [0, num_keys]
    full = (batch, heads, num_queries, num_keys)
    mask, bias = (None if s.get(name) is None else s[name].expand(full) for name in ("attn_mask", "bias"))
    for b in range(batch):
        for h in range(heads):
            for n, m, n_end, m_end in zip(starts_q, starts_k, starts_q[1:], starts_k[1:], strict=False):
                for i in range(n, n_end):
                    own = m_end - (n_end - i)  # the key that stands where this query stands
                    logits, values = [], []
                    for j in range(m, m_end):
                        if s.get("is_causal") and j > own:
                            continue
                        if left is not None and left >= 0 and j < own - left:
                            continue
                        if right is not None and right >= 0 and j > own + right:
                            continue
                        logit = scale * float(q[b, h, i] @ k[b, h // groups, j])
                        if s.get("softcap"):
                            logit = s["softcap"] * math.tanh(logit / s["softcap"])
                        if bias is not None:
                            logit += float(bias[b, h, i, j])
                        if mask is not None and mask.dtype == torch.bool:
                            logit = logit if mask[b, h, i, j] else -math.inf
                        elif mask is not None:
                            logit += float(mask[b, h, i, j])
                        if logit > -math.inf:
                            logits.append(logit)
                            values.append(v[b, h // groups, j])
                    if logits:
                        total = sum(math.exp(x) for x in logits)
                        out[b, h, i] = sum(math.exp(x) / total * value for x, value in zip(logits, values, strict=True))
                        lse[b, h, i] = math.log(total)
    return out, lse


@given(calls(lse=False))
def test_reference_is_the_definition(call: Call) -> None:
    out, lse = ops.attention(call.q, call.k, call.v, backend="reference", return_lse=True, **call.settings)
    expected, expected_lse = by_definition(call)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@given(calls())
def test_gradients_are_finite_and_those_of_finite_differences(call: Call) -> None:
    call = call.to(torch.float64)
    leaves = [leaf for leaf in call.leaves() if leaf.requires_grad]
    _, gradients = call.run_with_gradients("reference")
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.isfinite().all()
        direction = torch.cos(torch.arange(leaf.numel()).double() * 3).reshape(leaf.shape)
        sides = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                leaf += step * direction
                results = call.run("reference")
                weights = [torch.cos(torch.arange(r.numel()).double()).reshape(r.shape) for r in results]
                kept = (r.masked_fill(r == -torch.inf, 0.0) for r in results)
                sides.append(sum(float((r * w).sum()) for r, w in zip(kept, weights, strict=True)))
                leaf -= step * direction
        assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sizes(num_queries: int, num_keys: int) -> None:
    q = torch.randn(2, 4, num_queries, 8, requires_grad=True)
    k, v = torch.randn(2, 2, num_keys, 8, requires_grad=True), torch.randn(2, 2, num_keys, 5)
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, num_queries, 5)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    assert q.grad is not None
    assert (q.grad == 0).all()


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k = torch.zeros(4, 4, 64, 8), torch.randn(4, 4, 64, 8)
    v = torch.eye(64).expand(4, 4, 64, 64)  # the output is the weights themselves
    for backend in ("reference", "torch"):
        weights = ops.attention(q, k, v, dropout_p=0.25, backend=backend)
        kept = weights > 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
        torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 64 / 0.75))
        assert not torch.equal(weights, ops.attention(q, k, v, dropout_p=0.25, backend=backend))


def test_statistics_are_float32_for_low_precision_and_under_autocast() -> None:
    q, k, v = (torch.randn(1, 1, 65, 16) * 8 for _ in range(3))
    half = [t.bfloat16() for t in (q, k, v)]
    exact = ops.attention(*(t.double() for t in half), backend="reference")
    plain = ops.attention(*half, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ops.attention(*half, backend="reference")
        cast = ops.attention(*half[:2], v, backend="reference")  # as after a normalisation that autocast leaves in float32
    assert plain.dtype == under_autocast.dtype == cast.dtype == torch.bfloat16
    torch.testing.assert_close(plain.double(), exact, rtol=2**-8, atol=2**-8)  # one rounding of the output
    assert torch.equal(plain, under_autocast)
    assert torch.equal(plain, cast)


BASE = (torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3))
OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
PACKED = tuple(t[:1] for t in BASE)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ((BASE[0][0], *BASE[1:]), {}, r"\(B, H, N, D\)"),
        ((BASE[0].double(), *BASE[1:]), {}, "one floating-point dtype"),
        (tuple(t.long() for t in BASE), {}, "one floating-point dtype"),
        ((BASE[0].to("meta"), *BASE[1:]), {}, "on one device"),
        ((BASE[0][..., :4], *BASE[1:]), {}, "agree in B, H_kv, N_k and D"),
        ((BASE[0][:1], *BASE[1:]), {}, "agree in B, H_kv, N_k and D"),
        ((BASE[0][:, :3], *BASE[1:]), {}, "3 query heads cannot be shared out evenly over 2"),
        (BASE, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, r"attn_mask must be .*\(2, 4, 5, 6\); got \(5, 5\)"),
        (BASE, {"attn_mask": torch.ones(5, 6, dtype=torch.long)}, "attn_mask must be boolean"),
        (BASE, {"attn_mask": torch.ones(6)}, "attn_mask must be broadcastable"),
        (BASE, {"bias": torch.ones(5, 6, dtype=torch.bool)}, "bias must be floating point"),
        (BASE, {"bias": torch.ones(3, 5, 6)}, "bias must be broadcastable"),
        (BASE, {"bias": torch.ones(5, 6, device="meta")}, "on the device of q"),
        (BASE, {"softcap": 0.0}, "softcap must be positive"),
        (BASE, {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        (BASE, {"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\)"),
        (BASE, {"window_size": (1, 2, 3)}, "an int or"),
        (BASE, {"max_seqlen": 4}, "give cu_seqlens as well"),
        (BASE, {"cu_seqlens": OFFSETS, "cu_seqlens_k": OFFSETS}, "got a batch of 2"),
        (PACKED, {"cu_seqlens": OFFSETS}, "give cu_seqlens_k as well"),
        (PACKED, {"cu_seqlens": OFFSETS.float(), "cu_seqlens_k": OFFSETS}, "must be int32"),
        (PACKED, {"cu_seqlens": OFFSETS, "cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32)}, "2 sequences, cu_seqlens_k 1"),
        (PACKED, {"cu_seqlens": OFFSETS, "cu_seqlens_k": OFFSETS.to("meta")}, "on the device of q"),
    ],
)
def test_bad_calls_say_what_is_wrong(tensors: tuple[Tensor, ...], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(*tensors, **settings)
