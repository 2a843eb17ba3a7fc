"""Perturbed grouped-query attention: the noise against loops, its modes, its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped_reference import even, head_outputs, output, perturbed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import attention_zoo as az
from attention_zoo.attention import PerturbedGroupedQueryAttention
from attention_zoo.attention.pgqa import hashed_uniforms, perturb


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    keys=st.none() | st.integers(2, 5),
    groups=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([3, 4]),
)
def test_against_loops(batch: int, tokens: int, keys: int | None, groups: int, group: int, head_dim: int) -> None:
    heads = groups * group
    module = PerturbedGroupedQueryAttention(7, heads, num_kv_heads=groups, head_dim=head_dim, dtype=torch.float64)
    x = torch.randn(batch, tokens, 7, dtype=torch.float64, requires_grad=True)
    context = None if keys is None else torch.randn(batch, keys, 7, dtype=torch.float64)
    noise = torch.rand(groups, group, tokens * head_dim, dtype=torch.float64)
    want = output(module, perturbed(head_outputs(module, x, [even(heads, groups)] * batch, context), noise))
    got = module(x, context=context, noise=noise)
    close(got, want, 1e-9)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    found = [torch.autograd.grad((out * weights).sum(), [x, *module.parameters()]) for out in (got, want)]
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-8)


def test_the_diagonal_is_zeroed_where_rows_are_shorter_than_the_group() -> None:
    heads, noise = torch.randn(2, 6, 1, 2), torch.rand(2, 3, 2)
    close(perturb(heads, noise), perturbed(heads, noise))


def test_rows_have_mean_zero_and_keep_a_deviation() -> None:
    heads, noise = 3 + torch.randn(2, 6, 5, 4), torch.rand(3, 2, 20)
    out = perturb(heads, noise).flatten(2)
    close(out.mean(-1), torch.zeros(2, 6), 1e-5)
    assert out.std(-1).min() > 0.1


def test_noise_is_one_draw_for_all_samples() -> None:
    module = PerturbedGroupedQueryAttention(24, 6, num_kv_heads=3).eval()
    x = torch.randn(1, 5, 24)
    out = module(x.expand(3, -1, -1))
    close(out[1:], out[:1].expand(2, -1, -1))
    assert not torch.allclose(module(x), out[:1], atol=1e-3)  # drawn anew, in eval as well
    torch.manual_seed(5)
    got = module(x)
    torch.manual_seed(5)
    close(got, module(x, noise=torch.stack([torch.rand(2, 20) for _ in range(3)])))  # group after group


@pytest.mark.parametrize(("mode", "training", "noisy"), [
    ("always", True, True), ("always", False, True), ("train", True, True), ("train", False, False), ("never", True, False),
    ("never", False, False),
])  # fmt: skip
def test_modes(mode: str, training: bool, noisy: bool) -> None:
    module = PerturbedGroupedQueryAttention(24, 6, num_kv_heads=3, noise_mode=mode).train(training)
    gqa = az.create_attention("gqa", 24, 6, num_kv_heads=3)
    gqa.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 24)
    assert torch.allclose(module(x), gqa(x), atol=1e-6) != noisy
    if not noisy:
        with pytest.raises(ValueError, match=f"noise was given, but noise_mode='{mode}'"):
            module(x, noise=torch.rand(3, 2, 20))


def test_a_seed_makes_eval_repeatable() -> None:
    module = PerturbedGroupedQueryAttention(24, 6, num_kv_heads=3, eval_seed=3).eval()
    x = torch.randn(2, 5, 24)
    out, other = module(x), PerturbedGroupedQueryAttention(24, 6, num_kv_heads=3, eval_seed=3).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(out, module(x))
    assert torch.equal(out, other(x))
    assert torch.equal(out, module(x, noise=hashed_uniforms((3, 2, 20), 3, 0)))
    other.layer_idx = 1
    assert not torch.allclose(out, other(x), atol=1e-3)  # another layer, other noise
    module.train()
    assert not torch.allclose(module(x), module(x), atol=1e-3)  # drawn in training


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (0, 1), (1, 0), (2**40, 11)])
def test_hashed_numbers_look_uniform(seed: int, stream: int) -> None:
    x = hashed_uniforms((200, 300), seed, stream).double()
    assert x.min() >= 0
    assert x.max() < 1
    assert (x.mean() - 0.5).abs() < 5 * (1 / 12 / 60_000) ** 0.5
    assert (x.var() - 1 / 12).abs() < 5 * (1 / 180 / 60_000) ** 0.5
    assert torch.histc(x, 20, 0, 1).sub(3_000).abs().max() < 5 * 3_000**0.5
    rows = x - x.mean(1, keepdim=True)
    correlation = (rows[:-1] * rows[1:]).mean(1) * 12
    assert correlation.abs().max() < 5 / 300**0.5
    assert (rows[:, :-1] * rows[:, 1:]).mean().abs() * 12 < 5 / 60_000**0.5
    assert not torch.equal(hashed_uniforms((6,), seed, stream), hashed_uniforms((6,), seed + 1, stream))


def test_one_number_per_head_becomes_zero() -> None:
    module = PerturbedGroupedQueryAttention(6, 6, num_kv_heads=2)
    x = torch.randn(2, 1, 6, requires_grad=True)
    out = module(x)
    close(out, module.proj.bias.expand(2, 1, 6))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_constant_rows_have_finite_gradients() -> None:
    module = PerturbedGroupedQueryAttention(6, 2, num_kv_heads=1)
    torch.nn.init.zeros_(module.v.weight)
    x = torch.randn(2, 4, 6, requires_grad=True)
    module(x, noise=torch.full((1, 2, 12), 0.0)).square().sum().backward()  # noise without deviation as well
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_padded_tokens_count_in_no_statistic() -> None:
    heads, noise = torch.randn(2, 4, 6, 3), torch.rand(2, 2, 18)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    out = perturb(heads, noise, real)
    close(out[:1, :, :4], perturbed(heads[:1, :, :4], noise[..., :12]))  # as if the padding were not there
    close(out[1:], perturbed(heads[1:], noise))
    module = PerturbedGroupedQueryAttention(12, 4, num_kv_heads=2)
    x, noise = torch.randn(2, 6, 12), torch.rand(2, 2, 18)
    padded = module(x, attention_mask=real, noise=noise)
    close(padded[:1, :4], module(x[:1, :4], noise=noise[..., :12]))


def test_float16_statistics_do_not_overflow() -> None:
    heads, noise = torch.full((1, 2, 64, 16), 500.0, dtype=torch.float16), torch.rand(1, 2, 1024)
    heads[:, :, ::2] = -500.0
    out = perturb(heads, noise)
    assert out.dtype == torch.float16
    close(out.float(), perturb(heads.float(), noise), 2.0)  # the spacing of float16 at 1000 is 0.5


@pytest.mark.parametrize("shape", [(3, 2, 19), (2, 3, 20), (6, 20)])
def test_noise_of_another_shape(shape: tuple[int, ...]) -> None:
    module = PerturbedGroupedQueryAttention(24, 6, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"\(3, 2, 20\), got "):
        module(torch.randn(2, 5, 24), noise=torch.rand(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_mode": "eval"}, r"noise_mode.*'always', 'train', 'never'.*'eval'"),
        ({"is_causal": True}, r"'always'.*is_causal=True needs noise_mode='never'"),
        ({"is_causal": True, "noise_mode": "train"}, r"'train'.*noise_mode='never'"),
        ({"num_kv_heads": 4}, r"num_kv_heads=4; .* is 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerturbedGroupedQueryAttention(24, 6, **options)


def test_a_cache_needs_no_noise() -> None:
    module = PerturbedGroupedQueryAttention(24, 6, noise_mode="train").eval()
    module.layer_idx = 0
    with pytest.raises(ValueError, match="noise_mode='never'"):
        module(torch.randn(1, 3, 24), past_key_values=DynamicCache())
