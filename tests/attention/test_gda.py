"""Grouped differential attention: its equations as loops, what follows from them, and conversion of pretrained layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attention_case import make_generic, rotary_tables, seeded
from differential_reference import differential
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, StaticCache

from attention_zoo import ops
from attention_zoo.attention import DiffAttention, GroupedDiffAttention, GroupedQueryAttention, MultiHeadAttention

F64 = torch.float64


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def build(dim: int = 12, num_heads: int = 6, **options: Any) -> GroupedDiffAttention:
    with seeded(0):
        module = GroupedDiffAttention(dim, num_heads, **{"num_noise_heads": 2, "head_dim": 4, "dtype": F64, **options})
    make_generic(module)
    return module.eval()


def tokens(batch: int = 2, length: int = 4, dim: int = 12) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), dtype=F64)


# --- the equations ----------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 1, "depth": 3, "lambda_depth_offset": -1, "qkv_bias": True, "proj_bias": True},
    {"num_noise_heads": 6, "num_kv_heads": 3},
    {"sub_norm": False, "qk_norm": True, "norm_eps": 1e-2},
    {"lambda_mode": "token", "lambda_bias": True},
    {"style": "v2"},
    {"style": "v2", "num_kv_heads": 1, "lambda_bias": True, "qkv_bias": True, "proj_bias": True},
    {"style": "v2", "lambda_mode": "scalar", "lambda_init": 0.4, "sub_norm": True, "norm_eps": 1e-3, "qk_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equations(options: dict[str, Any]) -> None:
    module, x, eps = build(**options), tokens(), options.get("norm_eps", 1e-5)
    close(module(x), differential(module, x, eps=eps))
    module.is_causal = True
    causal = torch.ones(4, 4).tril().bool().expand(2, 4, 4)
    tables = tuple(t.double() for t in rotary_tables(4, 4))
    close(module(x, position_embeddings=tables), differential(module, x, allowed=causal, tables=tables, eps=eps))


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_equations_with_masks_and_context(style: str) -> None:
    module, x, context = build(style=style, num_kv_heads=1, context_dim=10), tokens(), tokens(length=5, dim=10)
    padding = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    allowed = padding.bool()[:, None].expand(2, 4, 5)
    close(module(x, context=context, attention_mask=padding), differential(module, x, context=context, allowed=allowed))
    added = torch.randn(4, 5, dtype=F64)
    close(module(x, context=context, attention_mask=added), differential(module, x, context=context, added=added))
    module.is_causal = True
    ends = torch.ones(4, 5).tril(1).bool().expand(2, 4, 5)
    close(module(x, context=context, attention_mask=padding), differential(module, x, context=context, allowed=allowed & ends))


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_a_mask_for_each_signal_head_is_seen_by_both_its_maps(style: str) -> None:
    module, x = build(style=style, num_kv_heads=1), tokens()
    mask = torch.rand(2, 6, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    mask |= torch.eye(4, dtype=torch.bool)
    total, width = torch.zeros(2, 4, 12, dtype=F64), module.value_dim
    for h in range(6):  # by linearity: one head's columns of the output projection at a time, all heads with that head's mask
        single = build(style=style, num_kv_heads=1)
        with torch.no_grad():
            single.o_proj.weight[:, : h * width] = 0
            single.o_proj.weight[:, (h + 1) * width :] = 0
        total = total + differential(single, x, allowed=mask[:, h])
    close(module(x, attention_mask=mask), total)


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_a_row_that_sees_nothing_is_the_bias(style: str) -> None:
    module, x = build(style=style, proj_bias=True), tokens().requires_grad_()
    out = module(x, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    close(out[0], module.o_proj.bias.expand(4, -1))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# --- what follows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_one_signal_head_for_each_noise_head_is_diff(style: str) -> None:
    module, x = build(style=style, num_noise_heads=6, num_kv_heads=2, depth=2), tokens()
    diff = DiffAttention(12, 6, head_dim=4, num_kv_heads=2, version=style, depth=2, dtype=F64)
    diff.load_state_dict(module.state_dict())
    close(module(x), diff(x), 0)
    close(GroupedDiffAttention.from_diff(diff)(x), diff(x), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"pairing": "halves", "sub_norm_affine": False, "norm_eps": 1e-3, "lambda_init": 0.3},
        {"version": "v2", "lambda_bias": True, "qk_norm": True, "norm_eps": 1e-2},
        {"sub_norm": False, "qkv_bias": True, "proj_bias": True, "is_causal": True, "rope_layout": "interleaved", "layer_idx": 4},
    ],
    ids=str,
)
def test_from_diff(options: dict[str, Any]) -> None:
    diff, x = DiffAttention(12, 4, head_dim=4, num_kv_heads=2, dtype=F64, **options).eval(), tokens()
    make_generic(diff)
    module = GroupedDiffAttention.from_diff(diff)
    tables = tuple(t.double() for t in rotary_tables(4, 4, diff.rope_layout))
    close(module(x, position_embeddings=tables), diff(x, position_embeddings=tables))
    assert (module.training, module.layer_idx, module.num_noise_heads) == (False, diff.layer_idx, 4)
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in diff.parameters())


def test_without_lambda_it_is_grouped_query_attention() -> None:
    for style in ("v1", "v2"):
        module, x = build(style=style, lambda_mode="scalar", sub_norm=False, lambda_init=0.0), tokens()
        with torch.no_grad():
            module.lambda_q2.copy_(module.lambda_q1)
            module.lambda_k2.copy_(module.lambda_k1)
        q = module.q_proj(x).unflatten(-1, (2, 4, 4))[..., :3, :].flatten(2, 3)
        k, v = module.k_proj(x).unflatten(-1, (2, -1))[..., :4], module.v_proj(x).unflatten(-1, (2, -1))
        heads = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
        close(module(x), module.o_proj(heads.transpose(1, 2).flatten(2)))


def test_equal_maps_leave_one_minus_lambda() -> None:
    module, x = build(sub_norm=False), tokens()
    with torch.no_grad():
        for linear, heads in ((module.q_proj, 4), (module.k_proj, 2)):
            rows = linear.weight.view(2, heads, 4, 12)
            rows[:, 1:] = rows[:, :1]
    q, k = module.q_proj(x).unflatten(-1, (2, 4, 4))[..., :3, :].flatten(2, 3), module.k_proj(x).unflatten(-1, (2, 8))[..., :4]
    v = module.v_proj(x).unflatten(-1, (2, 8))
    plain = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    close(module(x), module.o_proj((1 - module._lambda(x)) * plain.transpose(1, 2).flatten(2)))


def test_signal_heads_of_a_group_may_change_places() -> None:
    for style in ("v1", "v2"):
        module, other, x = build(style=style), build(style=style), tokens()
        order, width = [2, 0, 1], module.value_dim
        with torch.no_grad():
            other.q_proj.weight.view(2, 4, 4, 12)[1, :3] = module.q_proj.weight.view(2, 4, 4, 12)[1, order]
            other.o_proj.weight.view(12, 2, 3, width)[:, 1] = module.o_proj.weight.view(12, 2, 3, width)[:, 1, order]
            if style == "v2":
                other.lambda_proj.weight.view(2, 3, 12)[1] = module.lambda_proj.weight.view(2, 3, 12)[1, order]
        assert not torch.equal(other.q_proj.weight, module.q_proj.weight)
        close(other(x), module(x))


@pytest.mark.parametrize("style", ["v1", "v2"])
@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=9)])
def test_decoding(style: str, cache: Any) -> None:
    module, x, past = build(style=style, num_kv_heads=1, is_causal=True, layer_idx=0), tokens(length=7), cache()
    cos, sin = (t.double() for t in rotary_tables(7, 4))
    want = module(x, position_embeddings=(cos, sin))
    got = [module(x[:, i:j], position_embeddings=(cos[i:j], sin[i:j]), past_key_values=past) for i, j in ((0, 4), (4, 5), (5, 7))]
    close(torch.cat(got, 1), want)
    assert past.layers[0].keys.shape[1::2] == past.layers[0].values.shape[1::2] == (1, module.value_dim)
    assert module.cache_elements(7) == 7 * (16 if style == "v1" else 8)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "want"),
    [(4, None, 1), (8, None, 2), (6, None, 2), (5, None, 1), (7, None, 1), (1, None, 1), (2, None, 1), (10, None, 2), (32, 8, 8)]
    + [(8, 4, 4), (12, 4, 4), (12, 2, 4), (1, 1, 1)],
)
def test_default_noise_heads(num_heads: int, num_kv_heads: int | None, want: int) -> None:
    """The ratio nearest to 4 above 1 that key/value heads allow."""
    module = GroupedDiffAttention(16, num_heads, head_dim=2, num_kv_heads=num_kv_heads)
    assert module.num_noise_heads == want
    assert module.num_kv_heads == (num_kv_heads or want)


def test_lambda_follows_the_depth() -> None:
    offset = [GroupedDiffAttention(16, 4, depth=depth, lambda_depth_offset=-1).lambda_init for depth in (0, 1, 3)]
    assert offset == pytest.approx([-0.0099153, 0.2, 0.4707130], abs=1e-6)
    assert GroupedDiffAttention(16, 4, depth=1, style="v2", lambda_mode="scalar").lambda_init == 0
    assert GroupedDiffAttention(16, 4, lambda_init=0.3, lambda_mode="token").lambda_init == 0
    assert GroupedDiffAttention(16, 4).no_weight_decay() == DiffAttention(16, 4).no_weight_decay()


@pytest.mark.parametrize(("style", "per_head"), [("v1", 3), ("v2", 2)])
def test_cost(style: str, per_head: int) -> None:
    """Multiply-adds of the attention itself, for each pair of tokens: 3 (S + M) d in v1, 2 (S + M) d in v2."""
    module = GroupedDiffAttention(32, 8, num_noise_heads=2, head_dim=4, style=style).eval()
    counts = []
    for length in (8, 16):
        with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
            module(torch.randn(1, length, 32))
        counts.append(counter.get_total_flops() / 2)
    assert counts[1] - 2 * counts[0] == per_head * (8 + 2) * 4 * (16**2 - 2 * 8**2)


# --- conversion -------------------------------------------------------------------------------------------------------------------


def grouped(num_kv_heads: int = 2, **options: Any) -> GroupedQueryAttention:
    with seeded(5):
        layer = GroupedQueryAttention(12, 8, num_kv_heads=num_kv_heads, head_dim=4, qkv_bias=True, **options).double().eval()
    make_generic(layer)
    return layer


@pytest.mark.parametrize(
    ("num_kv_heads", "options", "noise_heads"),
    [
        (2, {}, 2),
        (2, {"num_noise_heads": 4}, 4),
        (1, {"num_noise_heads": 2}, 2),
        (8, {}, 8),
        (2, {"noise": 0.0}, 2),
        (8, {"lambda_mode": "token"}, 8),
    ],
    ids=str,
)
def test_conversion_changes_nothing(num_kv_heads: int, options: dict[str, Any], noise_heads: int) -> None:
    layer, x = grouped(num_kv_heads, is_causal=True), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = GroupedDiffAttention.from_softmax_attention(layer, **options)
    tables = tuple(t.double() for t in rotary_tables(4, 4))
    close(module(x, position_embeddings=tables), layer(x, position_embeddings=tables))
    assert (module.num_noise_heads, module.num_kv_heads, module.training, module.is_causal) == (
        *(noise_heads, num_kv_heads, False, True),
    )
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())


def test_conversion_starts_to_subtract() -> None:
    module, x = GroupedDiffAttention.from_softmax_attention(grouped()), tokens()
    module(x).square().sum().backward()
    assert module.lambda_q1.grad is not None
    close(module.lambda_q1.grad, -module.lambda_q2.grad)
    assert module.lambda_q1.grad.abs().max() > 1e-4
    noise = module.q_proj.weight.view(2, 5, 4, 12)
    off = (noise[:, -1] - noise[:, :-1].mean(1)).std() / noise[:, :-1].mean(1).std()
    assert 0.003 < off < 0.03


def test_conversion_of_a_state_and_of_timm() -> None:
    layer, x = Attention(12, num_heads=4, qkv_bias=True).double().eval(), tokens()
    close(GroupedDiffAttention.from_softmax_attention(layer)(x), layer(x))
    close(GroupedDiffAttention.from_softmax_attention(layer.state_dict(), num_heads=4)(x), layer(x))
    module = GroupedDiffAttention.from_softmax_attention(layer, lambda_mode="token", lambda_bias=True)
    close(module(x), layer(x), 5e-3)


def test_conversions_that_do_not_preserve_warn() -> None:
    for options, why in (
        ({"num_noise_heads": 2}, "8 key/value heads are averaged to 2"),
        ({"num_kv_heads": 4}, "8 key/value heads are averaged to 4"),
        ({"sub_norm": True}, "normalises each head"),
        ({"lambda_init": 0.3}, "lambda starts at lambda_init=0.3"),
        ({"lambda_mode": "token", "noise": 0.1}, "starts at 1/2"),
        ({"style": "v1"}, "twice the width"),
    ):
        with pytest.warns(UserWarning, match=why):
            module = GroupedDiffAttention.from_softmax_attention(MultiHeadAttention(16, 8), **options)
        assert module(torch.randn(1, 3, 16)).isfinite().all()


def test_v1_from_grouped_heads() -> None:
    """Signal heads read the first of two key/value heads, means of the second's query heads are the noise."""
    layer, x = grouped(2), tokens()
    with pytest.warns(UserWarning, match="twice the width"):
        module = GroupedDiffAttention.from_softmax_attention(layer, style="v1", sub_norm=False, lambda_init=0.0)
    assert (module.num_heads, module.num_noise_heads, module.num_kv_heads, module.head_dim) == (4, 1, 1, 4)
    rows = layer.q.weight.view(2, 4, 4, 12)
    close(module.q_proj.weight.view(5, 4, 12), torch.cat([rows[0], rows[1].mean(0, keepdim=True)]))
    with torch.no_grad():
        module.lambda_q1.zero_()
        module.lambda_q2.zero_()
        module.o_proj.weight.view(12, 4, 2, 4)[:, :, 1] = 0
        layer.proj.weight[:, 16:] = 0
    close(module(x), layer(x))
    with pytest.warns(UserWarning, match="twice the width"):
        assert GroupedDiffAttention.from_softmax_attention(layer, style="v1", num_noise_heads=2).num_noise_heads == 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_heads=8.*num_noise_heads=3.*nearest that does is 2"):
        GroupedDiffAttention(16, 8, num_noise_heads=3)
    with pytest.raises(ValueError, match=r"num_noise_heads=2.*num_kv_heads=4.*nearest that does is 2"):
        GroupedDiffAttention(16, 8, num_noise_heads=2, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"num_heads=8.*num_kv_heads=3.*nearest that does is 2"):
        GroupedDiffAttention(16, 8, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"num_kv_heads=8.*nearest that does is 4, and num_noise_heads=8"):
        GroupedDiffAttention(16, 8, num_kv_heads=8)
    with pytest.raises(ValueError, match=r"num_noise_heads=0.*nearest that does is 1"):
        GroupedDiffAttention(16, 8, num_noise_heads=0)
    with pytest.raises(ValueError, match=r"style must be one of 'v1', 'v2'; got 'v3'"):
        GroupedDiffAttention(16, 8, style="v3")
    with pytest.raises(ValueError, match=r"lambda_mode must be one of 'scalar', 'token'; got 'head'"):
        GroupedDiffAttention(16, 8, lambda_mode="head")
    with pytest.raises(ValueError, match="leave lambda_bias False"):
        GroupedDiffAttention(16, 8, lambda_bias=True)
    with pytest.raises(TypeError, match="k_ratio"):
        GroupedDiffAttention(16, 8, k_ratio=2)
    with pytest.raises(ValueError, match=r"8 query heads on 1 key/value heads cannot"):
        GroupedDiffAttention.from_softmax_attention(grouped(1), style="v1")
    with pytest.raises(ValueError, match=r"num_heads=4 .*num_noise_heads=3"):
        GroupedDiffAttention.from_softmax_attention(grouped(2), style="v1", num_noise_heads=3)
    with pytest.raises(ValueError, match=r"key/value heads=2 .*num_kv_heads=3"):
        GroupedDiffAttention.from_softmax_attention(grouped(2), num_kv_heads=3)
