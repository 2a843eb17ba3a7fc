"""Differential attention: its equations as loops, what follows from them, and conversion of pretrained layers."""

from __future__ import annotations

import math
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
from transformers.models.llama.modeling_llama import LlamaAttention

from attention_zoo import ops
from attention_zoo.attention import DiffAttention, GroupedQueryAttention, MultiHeadAttention
from attention_zoo.ops import differential as operation

F64 = torch.float64


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def build(dim: int = 12, num_heads: int = 4, **options: Any) -> DiffAttention:
    with seeded(0):
        module = DiffAttention(dim, num_heads, **{"head_dim": 4, "dtype": F64, **options})
    make_generic(module)
    return module.eval()


def tokens(batch: int = 2, length: int = 4, dim: int = 12) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), dtype=F64)


# --- the equations ----------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "depth": 3},
    {"num_kv_heads": 1, "lambda_init": 0.3, "qkv_bias": True, "proj_bias": True},
    {"num_kv_heads": 2, "pairing": "halves", "sub_norm_affine": False, "norm_eps": 1e-3},
    {"sub_norm": False, "qk_norm": True, "norm_eps": 1e-2},
    {"version": "v2"},
    {"version": "v2", "num_kv_heads": 2, "qkv_bias": True, "proj_bias": True},
    {"version": "v2", "num_kv_heads": 1, "lambda_bias": True, "qk_norm": True},
    {"version": "v2", "sub_norm": True, "lambda_init": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equations(options: dict[str, Any]) -> None:
    module, x, eps = build(**options), tokens(), options.get("norm_eps", 1e-5)
    close(module(x), differential(module, x, eps=eps))
    module.is_causal = True
    causal = torch.ones(4, 4).tril().bool().expand(2, 4, 4)
    for layout in ("half", "interleaved"):
        module.rope_layout = layout
        tables = tuple(t.double() for t in rotary_tables(4, 4, layout))
        close(module(x, position_embeddings=tables), differential(module, x, allowed=causal, tables=tables, eps=eps))


@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"num_kv_heads": 2, "version": "v2"}], ids=str)
def test_equations_with_masks_and_context(options: dict[str, Any]) -> None:
    module, x, context = build(**options, context_dim=10), tokens(), tokens(length=5, dim=10)
    padding = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    allowed = padding.bool()[:, None].expand(2, 4, 5)
    close(module(x, context=context, attention_mask=padding), differential(module, x, context=context, allowed=allowed))
    added = torch.randn(4, 5, dtype=F64)
    close(module(x, context=context, attention_mask=added), differential(module, x, context=context, added=added))
    module.is_causal = True
    ends = torch.ones(4, 5).tril(1).bool().expand(2, 4, 5)
    close(module(x, context=context, attention_mask=padding), differential(module, x, context=context, allowed=allowed & ends))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_mask_for_each_head_is_seen_by_both_maps(version: str) -> None:
    module, x = build(version=version, num_kv_heads=2), tokens()
    mask = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    mask |= torch.eye(4, dtype=torch.bool)
    got = module(x, attention_mask=mask)
    width, alone = module.value_dim, torch.zeros_like(got)
    for h in range(4):  # by linearity: one head's columns of the output projection at a time, all heads with that head's mask
        single = build(version=version, num_kv_heads=2)
        single.load_state_dict(module.state_dict())
        with torch.no_grad():
            columns = torch.zeros(4 * width, dtype=F64)
            columns[h * width : (h + 1) * width] = 1
            single.o_proj.weight *= columns
        alone = alone + differential(single, x, allowed=mask[:, h])
    close(got, alone)


def test_a_row_that_sees_nothing_is_the_bias() -> None:
    for version in ("v1", "v2"):
        module, x = build(version=version, proj_bias=True), tokens().requires_grad_()
        out = module(x, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
        close(out[0], module.o_proj.bias.expand(4, -1))
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


# --- what follows -----------------------------------------------------------------------------------------------------------------


def test_lambda_follows_the_depth() -> None:
    for depth, want in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (5, 0.8 - 0.6 * math.exp(-1.5))):
        assert DiffAttention(16, 4, depth=depth).lambda_init == pytest.approx(want)
    assert DiffAttention(16, 4, depth=3, lambda_init=0.5).lambda_init == 0.5
    assert DiffAttention(16, 4, depth=3, lambda_init=0.5, version="v2").lambda_init == 0


def test_without_lambda_it_is_plain_attention() -> None:
    module, x = build(sub_norm=False, lambda_init=0.0), tokens()
    with torch.no_grad():
        module.lambda_q2.copy_(module.lambda_q1)
        module.lambda_k2.copy_(module.lambda_k1)
    q, k = (module.q_proj(x).unflatten(-1, (4, 2, 4))[..., 0, :], module.k_proj(x).unflatten(-1, (4, 2, 4))[..., 0, :])
    v = module.v_proj(x).unflatten(-1, (4, 8))
    plain = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    close(module(x), module.o_proj(plain.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_equal_maps_leave_one_minus_lambda(version: str) -> None:
    module, x = build(version=version, sub_norm=False), tokens()
    with torch.no_grad():
        for linear in (module.q_proj, module.k_proj)[: 2 if version == "v1" else 1]:
            rows = linear.weight.view(4, 2, 4, 12)
            rows[:, 1] = rows[:, 0]
    heads = []
    module.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    module(x)
    left = 1 - (module._lambda(x).unsqueeze(-1) if version == "v2" else module._lambda(x))
    rate = (heads[0].unflatten(-1, (4, -1)) / left).flatten(2)
    q, k = module.q_proj(x).unflatten(-1, (4, 2, 4))[..., 0, :], module.k_proj(x).unflatten(-1, (4, -1))[..., :4]
    v = module.v_proj(x).unflatten(-1, (4, -1))
    plain = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    close(rate, plain.transpose(1, 2).flatten(2))


def test_pairings_are_one_function_of_moved_rows() -> None:
    options: dict[str, Any] = {"num_kv_heads": 2, "qkv_bias": True}
    interleaved, halves, x = build(**options), build(**options, pairing="halves"), tokens()
    moved = DiffAttention.change_pairing(interleaved.state_dict(), "halves", 4, 2)
    assert not torch.equal(moved["q_proj.bias"], interleaved.q_proj.bias)
    halves.load_state_dict(moved)
    tables = tuple(t.double() for t in rotary_tables(4, 4))
    close(halves(x, position_embeddings=tables), interleaved(x, position_embeddings=tables))
    back = DiffAttention.change_pairing(moved, "interleaved", 4, 2)
    assert all(torch.equal(tensor, back[name]) for name, tensor in interleaved.state_dict().items())


@pytest.mark.parametrize("cache", [DynamicCache, lambda: StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=9)])
@pytest.mark.parametrize("options", [{}, {"pairing": "halves"}, {"version": "v2"}], ids=str)
def test_decoding(options: dict[str, Any], cache: Any) -> None:
    module, x, past = build(**options, num_kv_heads=2, is_causal=True, layer_idx=0), tokens(length=7), cache()
    cos, sin = (t.double() for t in rotary_tables(7, 4))
    want = module(x, position_embeddings=(cos, sin))
    got = [module(x[:, i:j], position_embeddings=(cos[i:j], sin[i:j]), past_key_values=past) for i, j in ((0, 4), (4, 5), (5, 7))]
    close(torch.cat(got, 1), want)
    width = 4 if options.get("version") == "v2" else 8
    assert past.layers[0].keys.shape[1::2] == past.layers[0].values.shape[1::2] == (2, width)


def test_lambda_is_float32_in_half_precision() -> None:
    """exp(16) is beyond float16; the difference of two of them is not."""
    module = build(dtype=torch.float32)
    assert DiffAttention(16, 4, dtype=torch.bfloat16).lambda_q1.dtype == torch.float32
    half, x = DiffAttention(12, 4, head_dim=4, dtype=torch.float16), tokens()
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(half, name).fill_(2.0)
            getattr(module, name).fill_(2.0)
    close(half(x.half()).float(), module(x.float()), 2e-2)


def test_weight_decay_leaves_lambda_and_sub_norm_alone() -> None:
    vectors = {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "subln.weight"}
    assert DiffAttention(16, 4).no_weight_decay() == vectors
    assert DiffAttention(16, 4, version="v2", lambda_bias=True).no_weight_decay() == {"lambda_proj.weight", "lambda_proj.bias"}


@pytest.mark.parametrize(("version", "per_pair"), [("v1", 6), ("v2", 4)])
def test_cost(version: str, per_pair: int) -> None:
    """Multiply-adds of the attention itself: 6 h d for each pair of tokens in v1, 4 h d in v2."""
    module = DiffAttention(32, 4, head_dim=4, version=version).eval()
    with ops.use_backend("reference"), torch.no_grad():
        counts = []
        for length in (8, 16):
            with FlopCounterMode(display=False) as counter:
                module(torch.randn(1, length, 32))
            counts.append(counter.get_total_flops() / 2)
    assert counts[1] - 2 * counts[0] == per_pair * 4 * 4 * (16**2 - 2 * 8**2)


# --- conversion -------------------------------------------------------------------------------------------------------------------


def llama(kv_heads: int = 2, bias: bool = True) -> LlamaAttention:
    config = LlamaConfig(hidden_size=12, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=4, attention_bias=bias)
    with seeded(5):
        layer = LlamaAttention(config, layer_idx=3)
    layer.config._attn_implementation = "sdpa"  # eager attention rounds its softmax to float32
    make_generic(layer)
    return layer.double().eval()


def run_llama(layer: LlamaAttention, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    causal = torch.full((1, 1, x.shape[1], x.shape[1]), -math.inf, dtype=F64).triu(1)
    out: Tensor = layer(x, tuple(t[None] for t in tables), causal)[0]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_conversion_of_a_decoder_changes_nothing(kv_heads: int, bias: bool) -> None:
    layer, x = llama(kv_heads, bias), tokens(length=5)
    tables = tuple(t.double() for t in rotary_tables(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = DiffAttention.from_softmax_attention(layer)
    assert (module.version, module.num_heads, module.num_kv_heads, module.is_causal, module.training) == (
        *("v2", 4, kv_heads, True, False),
    )
    close(module(x, position_embeddings=tables), run_llama(layer, x, tables))
    close(
        DiffAttention.from_softmax_attention(layer, lambda_bias=True)(x, position_embeddings=tables),
        run_llama(layer, x, tables),
        5e-3,
    )
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    module(x, position_embeddings=tables).square().sum().backward()
    signal, noise = module.q_proj.weight.grad.view(4, 2, 4, 12).unbind(1)
    assert not torch.allclose(signal, noise, atol=1e-3), "the two copies separate"


@pytest.mark.parametrize("kind", ["timm", "mha", "gqa", "state"])
def test_conversion_of_encoders_changes_nothing(kind: str) -> None:
    with seeded(6):
        layer: Any = {
            "timm": lambda: Attention(12, num_heads=4, qkv_bias=True, attn_drop=0.1),
            "mha": lambda: MultiHeadAttention(12, 4, qkv_bias=True),
            "gqa": lambda: GroupedQueryAttention(12, 4, num_kv_heads=2),
            "state": lambda: Attention(12, num_heads=4),
        }[kind]()
    layer, x = layer.double().eval(), tokens()
    if kind == "state":
        module = DiffAttention.from_softmax_attention(layer.state_dict(), num_heads=4).eval()
    else:
        module = DiffAttention.from_softmax_attention(layer)
    assert module.attn_drop == (0.1 if kind == "timm" else 0.0)
    close(module(x), layer(x))


def test_conversion_takes_normalisations_over() -> None:
    layer = Attention(12, num_heads=4, qk_norm=True, norm_layer=nn.RMSNorm).double().eval()
    make_generic(layer)
    layer.q_norm.eps = layer.k_norm.eps = 1e-3
    module, x = DiffAttention.from_softmax_attention(layer), tokens()
    close(module(x), layer(x))
    with pytest.raises(ValueError, match=r"without a place: k_norm\.bias, q_norm\.bias"):
        DiffAttention.from_softmax_attention(Attention(12, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm))


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_v1_keeps_every_tensor_and_warns(pairing: str) -> None:
    """With lambda = 0 and no sub-norm, the first half of each value is what the source's first head of the pair reads."""
    layer, x = llama(2, bias=False), tokens(length=5)
    with pytest.warns(UserWarning, match="v1 has values of twice the width"):
        module = DiffAttention.from_softmax_attention(layer, version="v1", pairing=pairing)
    assert (module.num_heads, module.num_kv_heads, module.head_dim) == (2, 1, 4)
    assert module.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.9)), "layer_idx 3"
    with pytest.warns(UserWarning, match="does not compute"):
        plain = DiffAttention.from_softmax_attention(layer, version="v1", pairing=pairing, sub_norm=False, lambda_init=0.0)
    with torch.no_grad():
        plain.lambda_q1.zero_()
        plain.lambda_q2.zero_()
        plain.o_proj.weight.view(12, 2, 2, 4)[:, :, 1] = 0  # the second halves, which see the wrong map
        layer.o_proj.weight[:, 8:] = 0  # heads 2 and 3, on the second key/value head
    tables = tuple(t.double() for t in rotary_tables(5, 4))
    close(plain(x, position_embeddings=tables), run_llama(layer, x, tables))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_heads=4.*num_kv_heads=3.*nearest that does is 2"):
        DiffAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"num_heads=4.*num_kv_heads=8.*nearest that does is 4"):
        DiffAttention(16, 4, num_kv_heads=8, version="v2")
    with pytest.raises(ValueError, match=r"version must be one of 'v1', 'v2'; got 'v3'"):
        DiffAttention(16, 4, version="v3")
    with pytest.raises(ValueError, match=r"pairing must be one of 'interleaved', 'halves'; got 'rows'"):
        DiffAttention(16, 4, pairing="rows")
    with pytest.raises(ValueError, match=r"'halves'.*v2.*use 'interleaved'"):
        DiffAttention(16, 4, pairing="halves", version="v2")
    with pytest.raises(ValueError, match=r"lambda_bias.*leave lambda_bias False"):
        DiffAttention(16, 4, lambda_bias=True)
    with pytest.raises(ValueError, match=r"dim=16 is not divisible by 2 \* num_heads=3: give head_dim; .* is 2"):
        DiffAttention(16, 3)
    with pytest.raises(ValueError, match=r"dim=15 is not divisible by 2 \* num_heads=3: give head_dim$"):
        DiffAttention(15, 3)
    with pytest.raises(ValueError, match=r"must be even, got 3"):
        DiffAttention(12, 2, head_dim=3)(torch.randn(1, 2, 12), position_embeddings=(torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"4 query heads on 1 key/value heads cannot"):
        DiffAttention.from_softmax_attention(llama(1), version="v1")
    with pytest.raises(ValueError, match="give num_heads"):
        DiffAttention.from_softmax_attention(llama().state_dict())
    with pytest.raises(ValueError, match="is num_heads=5"):
        DiffAttention.from_softmax_attention(llama().state_dict(), num_heads=5)


@pytest.mark.parametrize(("keys", "calls"), [(256, 2), (257, 4)])
def test_a_cpu_takes_wide_values_in_halves(keys: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each map, where torch would form it for values wider than keys; outputs and gradients are the reference's."""
    attention, seen = operation.attention, []

    def count(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[2].shape[-1])
        return attention(*args, **kwargs)

    monkeypatch.setattr(operation, "attention", count)
    q, k, noise_q, noise_k = (torch.randn(1, 2, keys, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    v = torch.randn(1, 2, keys, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("auto", "reference"):
        out = operation.differential_attention(
            q, k, v, torch.tensor(0.3), noise_q=noise_q, noise_k=noise_k, is_causal=True, backend=backend
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, noise_q, noise_k))))
    assert len(seen) == calls + 2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
