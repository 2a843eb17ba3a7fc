"""Multi-head attention against timm's, PyTorch's and Hugging Face's, with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attention_case import make_generic, rotary_tables
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import attention_zoo as az
from attention_zoo.attention import MultiHeadAttention


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qk_norm": True, "scale_norm": True, "qkv_bias": True}, {"proj_bias": False}],
    ids=lambda options: "-".join(options) or "default",
)
def test_equals_timms(options: dict[str, Any]) -> None:
    """timm's state dict loads strictly, outputs and input gradients agree."""
    theirs = TimmAttention(24, num_heads=4, norm_layer=nn.LayerNorm, **options).eval()
    make_generic(theirs)
    ours = az.create_attention("mha", dim=24, num_heads=4, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 9, 24, requires_grad=True)
    gradients = []
    for module in (ours, theirs):
        out = module(x)
        gradients.append(torch.autograd.grad(out.sin().sum(), x)[0])
    same(ours(x), theirs(x))
    same(*gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_pytorchs(masked: bool) -> None:
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, kdim=10, vdim=10).eval()
    make_generic(theirs)
    ours = az.create_attention("mha", dim=24, num_heads=4, qkv_bias=True, context_dim=10).eval()
    bias_q, bias_kv = theirs.in_proj_bias[:24], theirs.in_proj_bias[24:]
    ours.load_state_dict(
        {
            "q.weight": theirs.q_proj_weight,
            "q.bias": bias_q,
            "kv.weight": torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]),
            "kv.bias": bias_kv,
            "proj.weight": theirs.out_proj.weight,
            "proj.bias": theirs.out_proj.bias,
        },
        strict=True,
    )
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    real = torch.arange(7) < torch.tensor([[7], [4]]) if masked else None
    want, _ = theirs(x, context, context, key_padding_mask=None if real is None else ~real)
    same(ours(x, context=context, attention_mask=real), want)


def test_causal_with_rotations_equals_hugging_faces() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager")
    theirs = LlamaAttention(config, layer_idx=0).eval()
    make_generic(theirs)
    ours = az.create_attention("mha", dim=24, num_heads=4, is_causal=True, proj_bias=False).eval()
    qkv = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight])
    ours.load_state_dict({"qkv.weight": qkv, "proj.weight": theirs.o_proj.weight}, strict=True)
    x, (cos, sin) = torch.randn(2, 9, 24), rotary_tables(9, 6)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    want, _ = theirs(x, position_embeddings=(cos[None], sin[None]), attention_mask=mask)
    same(ours(x, position_embeddings=(cos, sin)), want)


def test_head_dim_of_its_own() -> None:
    module = az.create_attention("mha", dim=20, num_heads=3, head_dim=8, scale_norm=True)
    assert isinstance(module, MultiHeadAttention)
    assert module.qkv.weight.shape == (72, 20)
    assert module.proj.weight.shape == (20, 24)
    assert module(torch.randn(2, 5, 20)).shape == (2, 5, 20)


def test_context_of_its_own_width() -> None:
    module = az.create_attention("mha", dim=20, num_heads=2, context_dim=6)
    x = torch.randn(2, 5, 20)
    assert module(x, context=torch.randn(2, 3, 6)).shape == (2, 5, 20)
    with pytest.raises(ValueError, match=r"built for cross attention with context_dim=6: give context"):
        module(x)
    with pytest.raises(ValueError, match=r"context must be tokens \(B, N, C\) with C = 6"):
        module(x, context=x)


def test_permuting_the_tokens_permutes_the_output() -> None:
    module = az.create_attention("mha", dim=16, num_heads=4).eval()
    x, order = torch.randn(2, 9, 16), torch.randperm(9)
    same(module(x[:, order]), module(x)[:, order])


# --- conversion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"qk_norm": True, "scale_norm": True, "qkv_bias": True}, {"proj_bias": False, "attn_drop": 0.25}],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("scaled", [False, True])
def test_conversion_of_timms_keeps_the_function(options: dict[str, Any], scaled: bool) -> None:
    theirs = TimmAttention(24, num_heads=4, norm_layer=functools.partial(nn.LayerNorm, eps=1e-2), **options).eval()
    make_generic(theirs)
    if scaled:
        theirs.scale, theirs.fused_attn = 0.7, False
    ours = MultiHeadAttention.from_softmax_attention(theirs)
    x = torch.randn(2, 9, 24)
    same(ours(x), theirs(x))
    assert (ours.attn_drop, ours.training) == (options.get("attn_drop", 0.0), False)
    assert not {t.data_ptr() for t in ours.parameters()} & {t.data_ptr() for t in theirs.parameters()}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_conversion_repeats_grouped_heads(num_kv_heads: int) -> None:
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=num_kv_heads, head_dim=8, attn_implementation="eager",
        attention_bias=True,
    )  # fmt: skip
    theirs = LlamaAttention(config, layer_idx=0).eval()
    make_generic(theirs)
    theirs.scaling *= 1.5
    ours = MultiHeadAttention.from_softmax_attention(theirs)
    assert ours.is_causal
    x, (cos, sin) = torch.randn(2, 9, 24), rotary_tables(9, 8)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    want, _ = theirs(x, position_embeddings=(cos[None], sin[None]), attention_mask=mask)
    same(ours(x, position_embeddings=(cos, sin)), want)
    theirs.q_proj.bias = None  # a bias that only some have
    ours = MultiHeadAttention.from_softmax_attention(theirs.state_dict(), num_heads=4)
    assert not ours.qkv.bias[:32].any()
    assert ours.qkv.bias[32:].all()


def test_conversion_of_cross_attention() -> None:
    source = az.create_attention("gqa", 24, 4, num_kv_heads=2, context_dim=10, qkv_bias=True).eval()
    module = MultiHeadAttention.from_softmax_attention(source)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    same(module(x, context=context), source(x, context=context))


def test_conversions_that_cannot_be() -> None:
    convert, source = MultiHeadAttention.from_softmax_attention, az.create_attention("gqa", 24, 4, num_kv_heads=2)
    with pytest.raises(ValueError, match="give num_heads"):
        convert(source.state_dict())
    with pytest.raises(ValueError, match="whole number of heads"):
        convert(source.state_dict(), num_heads=5)
    with pytest.raises(ValueError, match="without a place: table"):
        convert({**source.state_dict(), "table": torch.zeros(2)}, num_heads=4)
    normed = TimmAttention(24, num_heads=4, qk_norm=True, norm_layer=functools.partial(nn.LayerNorm, elementwise_affine=False))
    same(convert(normed)(x := torch.randn(2, 5, 24)), normed(x))
    normed.scale = 0.7
    with pytest.raises(ValueError, match="no weight that is known to take that over"):
        convert(normed)
