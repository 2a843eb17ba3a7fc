"""Grouped-query attention against its equation in loops, its limits (multi-head, multi-query), and conversion into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped_reference import even, head_outputs, output
from hypothesis import given
from hypothesis import strategies as st
from parity_case import load_case
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn
from transformers import DynamicCache

import attention_zoo as az
from attention_zoo.attention import GroupedQueryAttention
from attention_zoo.attention.gqa import mean_pool_kv_heads


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), [*inputs, *module.parameters()], allow_unused=True))


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    keys=st.none() | st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 4]),
    bias=st.booleans(),
)
def test_against_loops(batch: int, tokens: int, keys: int | None, groups: int, group: int, head_dim: int, bias: bool) -> None:
    heads = groups * group
    module = GroupedQueryAttention(7, heads, num_kv_heads=groups, head_dim=head_dim, qkv_bias=bias, dtype=torch.float64)
    x = torch.randn(batch, tokens, 7, dtype=torch.float64, requires_grad=True)
    context = None if keys is None else torch.randn(batch, keys, 7, dtype=torch.float64, requires_grad=True)
    want = output(module, head_outputs(module, x, [even(heads, groups)] * batch, context))
    got = module(x, context=context)
    close(got, want, 1e-10)
    inputs = (x,) if context is None else (x, context)
    for a, b in zip(gradients(module, got, *inputs), gradients(module, want, *inputs), strict=True):
        assert a is not None
        assert b is not None
        close(a, b, 1e-9)


@pytest.mark.parametrize("keys", [None, 7], ids=["self", "cross"])
def test_causal_and_padded_against_loops(keys: int | None) -> None:
    module = GroupedQueryAttention(8, 4, num_kv_heads=2, is_causal=True, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    context = None if keys is None else torch.randn(2, keys, 8, dtype=torch.float64)
    length = 5 if keys is None else keys
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, 1] = False
    allowed = torch.ones(5, length).tril(length - 5).bool() & real[:, None]  # the last query stands at the last key
    want = output(module, head_outputs(module, x, [[2, 2]] * 2, context, allowed))
    close(module(x, context=context, attention_mask=real), want, 1e-10)


def test_as_many_kv_heads_as_heads_is_multi_head_attention() -> None:
    options: dict[str, Any] = {"qkv_bias": True, "qk_norm": True, "is_causal": True}
    mha = az.create_attention("mha", 16, 4, **options)
    gqa = GroupedQueryAttention(16, 4, num_kv_heads=4, **options)
    state = {k: v for k, v in mha.state_dict().items() if not k.startswith("qkv.")}
    for kind in ("weight", "bias"):
        rows = mha.state_dict()[f"qkv.{kind}"].chunk(3)
        state.update({f"{name}.{kind}": part for name, part in zip("qkv", rows, strict=True)})
    gqa.load_state_dict(state)
    x = torch.randn(2, 9, 16)
    close(gqa(x), mha(x))


def test_one_kv_head_is_multi_query_attention() -> None:
    module = GroupedQueryAttention(12, 3, num_kv_heads=1)
    x = torch.randn(2, 6, 12)
    q = module.q(x).view(2, 6, 3, 4)
    weights = torch.einsum("bihc,bjc->bhij", q / 2.0, module.k(x)).softmax(-1)
    want = module.proj(torch.einsum("bhij,bjc->bihc", weights, module.v(x)).flatten(2))
    close(module(x), want)


def test_permuting_tokens_permutes_the_output() -> None:
    module = GroupedQueryAttention(12, 6)
    x, order = torch.randn(2, 7, 12), torch.randperm(7)
    close(module(x[:, order]), module(x)[:, order])


def test_the_cache_holds_the_kv_heads_only() -> None:
    module = GroupedQueryAttention(24, 6, num_kv_heads=2, is_causal=True).eval()
    module.layer_idx = 0
    cache, x = DynamicCache(), torch.randn(2, 5, 24)
    module(x, past_key_values=cache)
    assert cache.layers[0].keys.shape == (2, 2, 5, 4)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (3, 1), (5, 1), (8, 4), (9, 3), (12, 6), (15, 5)])
def test_default_kv_heads(heads: int, groups: int) -> None:
    """Half of the heads; where that does not divide, the largest number below it that does."""
    module = az.create_attention("gqa", dim=4 * heads, num_heads=heads)
    assert module.num_kv_heads == groups
    assert f"num_kv_heads={groups}" in repr(module)


@pytest.mark.parametrize(("wrong", "nearest"), [(4, 3), (0, 1), (-1, 1), (7, 6), (12, 6)])
def test_kv_heads_that_do_not_divide(wrong: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"num_heads=6 .*num_kv_heads={wrong}; .* is {nearest}"):
        GroupedQueryAttention(24, 6, num_kv_heads=wrong)


def test_context_of_other_channels() -> None:
    module = GroupedQueryAttention(12, 6, context_dim=5)
    assert module.k.weight.shape == (6, 5)
    assert module(torch.randn(2, 3, 12), context=torch.randn(2, 4, 5)).shape == (2, 3, 12)
    with pytest.raises(ValueError, match="context_dim=5: give context"):
        module(torch.randn(2, 3, 12))
    with pytest.raises(ValueError, match="context must be tokens"):
        module(torch.randn(2, 3, 12), context=torch.randn(2, 4, 12))


# --- conversion -------------------------------------------------------------------------------------------------------------------


def test_mean_pool_kv_heads() -> None:
    weight = torch.randn(6 * 4, 5)
    want = torch.stack([weight[(2 * g + 0) * 4 :][:4] + weight[(2 * g + 1) * 4 :][:4] for g in range(3)]) / 2
    close(mean_pool_kv_heads(weight, 6, 3), want.flatten(0, 1))
    close(mean_pool_kv_heads(weight[:, 0], 6, 3), want.flatten(0, 1)[:, 0])
    assert torch.equal(mean_pool_kv_heads(weight, 6, 6), weight)
    with pytest.raises(ValueError, match=r"num_heads=6 .*num_kv_heads=4; .* is 3"):
        mean_pool_kv_heads(weight, 6, 4)
    with pytest.raises(ValueError, match=r"24 rows.* 5 heads"):
        mean_pool_kv_heads(weight, 5, 1)


def test_conversion() -> None:
    """The official mean pooling of timm's fused layer: case convert_h6kv3."""
    case = load_case("gqa/convert_h6kv3")
    module = GroupedQueryAttention.from_softmax_attention(case.group("state"), num_heads=6, num_kv_heads=3)
    converted, stored = module.state_dict(), case.group("output")
    names = {name for name in stored if name.startswith("converted.")}
    assert {f"converted.{name}" for name in converted} == names
    for name, tensor in converted.items():
        close(tensor, stored[f"converted.{name}"], case.tolerance)
    torch.testing.assert_close(module(case.tensors["input.tokens"]), stored["tokens"], atol=case.tolerance, rtol=0)


def softmax_layer(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """An attention layer of 6 heads, and what its conversion has to be told."""
    if kind == "timm":
        return TimmAttention(24, 6, qkv_bias=True, attn_drop=0.1, proj_drop=0.2), {}
    if kind == "timm, no bias":
        return TimmAttention(24, 6, qkv_bias=False), {}
    if kind == "timm, normalised":
        return TimmAttention(24, 6, qk_norm=True, norm_layer=nn.LayerNorm), {"qk_norm": True}
    if kind == "mha":
        return az.create_attention("mha", 24, 6, head_dim=3, is_causal=True, proj_bias=False, rope_layout="interleaved"), {}
    assert kind == "gqa"
    return GroupedQueryAttention(24, 6, num_kv_heads=6, qkv_bias=True), {}


KINDS = ["timm", "timm, no bias", "timm, normalised", "mha", "gqa"]


@pytest.mark.parametrize("name", ["gqa", "pgqa"])
@pytest.mark.parametrize("kind", KINDS)
def test_converting_without_pooling_changes_nothing(kind: str, name: str) -> None:
    source, options = softmax_layer(kind)
    options |= {"noise_mode": "never"} if name == "pgqa" else {}
    cls = type(az.create_attention(name, 8, 2))
    module = cls.from_softmax_attention(source.eval(), num_kv_heads=6, **options)
    x = torch.randn(2, 5, 24)
    close(module(x), source(x), 1e-6)
    assert not module.training
    assert not {t.data_ptr() for t in module.parameters()} & {t.data_ptr() for t in source.parameters()}


def test_converting_heads_that_are_equal_already_changes_nothing() -> None:
    source = TimmAttention(24, 6, qkv_bias=True)
    with torch.no_grad():
        for tensor in (source.qkv.weight, source.qkv.bias):
            heads = tensor.unflatten(0, (3, 3, 2, 4))
            heads[1:, :, 1] = heads[1:, :, 0]
    module = GroupedQueryAttention.from_softmax_attention(source, num_kv_heads=3)
    x = torch.randn(2, 5, 24)
    close(module(x), source(x), 1e-6)


def test_conversion_takes_settings_over() -> None:
    source, _ = softmax_layer("timm")
    module = GroupedQueryAttention.from_softmax_attention(source.double().train(), num_kv_heads=2)
    assert (module.attn_drop, module.proj_drop.p, module.training, module.q.weight.dtype) == (0.1, 0.2, True, torch.float64)
    assert GroupedQueryAttention.from_softmax_attention(source, attn_drop=0.0).attn_drop == 0.0
    source, _ = softmax_layer("mha")
    module = GroupedQueryAttention.from_softmax_attention(source)
    assert (module.is_causal, module.rope_layout, module.num_kv_heads) == (True, "interleaved", 3)


def test_conversion_of_grouped_decoder_weights() -> None:
    """Hugging Face's names, grouped already: 4 key/value heads become 2."""
    shapes = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    module = GroupedQueryAttention.from_softmax_attention(state, num_heads=8, num_kv_heads=2, is_causal=True)
    assert (module.head_dim, module.num_kv_heads, module.is_causal) == (4, 2, True)
    close(module.k.weight, state["k_proj.weight"].view(2, 2, 4, 24).mean(1).view(8, 24))
    assert torch.equal(module.proj.weight, state["o_proj.weight"])
    assert module.proj.bias is None


def test_conversion_of_cross_attention() -> None:
    source = az.create_attention("mha", 12, 4, context_dim=5)
    module = GroupedQueryAttention.from_softmax_attention(source, num_kv_heads=4)
    x, context = torch.randn(2, 3, 12), torch.randn(2, 6, 5)
    close(module(x, context=context), source(x, context=context), 1e-6)


def test_conversion_refuses_what_it_cannot_place() -> None:
    convert = GroupedQueryAttention.from_softmax_attention
    source, _ = softmax_layer("timm")
    state = source.state_dict()
    with pytest.raises(ValueError, match="give num_heads"):
        convert(state)
    with pytest.raises(ValueError, match=r"found dense\.weight; expected .*qkv, proj.*q_proj, k_proj, v_proj, o_proj"):
        convert({"dense.weight": torch.ones(2, 2)}, num_heads=2)
    with pytest.raises(ValueError, match="found nothing"):
        convert({}, num_heads=2)
    with pytest.raises(ValueError, match=r"without a place: bonus"):
        convert({**state, "bonus": torch.ones(1)}, num_heads=6)
    with pytest.raises(ValueError, match=r"24 rows.* 5 heads"):
        convert(state, num_heads=5)
    with pytest.raises(ValueError, match=r"num_kv_heads=4; .* is 3"):
        convert(state, num_heads=6, num_kv_heads=4)
    with pytest.raises(TypeError, match="no_such_option"):
        convert(state, num_heads=6, no_such_option=1)
    normalised, _ = softmax_layer("timm, normalised")
    with pytest.raises(ValueError, match=r"without a place: q_norm\.weight"):
        convert(normalised)
    with pytest.raises(ValueError, match=r"missing: q_norm\.weight"):
        convert(source, qk_norm=True)
    wide = {
        "q.weight": torch.ones(8, 8),
        "k.weight": torch.ones(6, 8),
        "v.weight": torch.ones(6, 8),
        "proj.weight": torch.ones(8, 8),
    }
    with pytest.raises(ValueError, match=r"k\.weight has 6 rows.* 4 channels"):
        convert(wide, num_heads=2)
