"""Core-context-aware attention: its formula written out row by row, the paper's invariants, its cache, padding and conversion."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from attention_case import rotary_tables
from hypothesis import assume, given
from hypothesis import strategies as st
from marks import slow_but
from parity_case import load_case
from timm.layers import Attention
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.bert.modeling_bert import BertConfig, BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention

import attention_zoo as az
from attention_zoo.attention import CoreContextAttention, GroupedQueryAttention, MultiHeadAttention
from attention_zoo.attention.base import apply_rotary
from attention_zoo.attention.cache import cache_report, measured_cache_bytes
from attention_zoo.attention.cca import CoreContextCacheLayer
from attention_zoo.ops import core_context
from attention_zoo.ops.core_context import core_context_attention, core_context_visible, pool_core_tokens, pooling_weights

F64 = torch.float64
SIZES = [(4, 2), (3, 4), (0, 3), (5, 1), (1, 2), (0, 1), (6, 4)]  # (w, p): w < p, w = 0, p = 1, w no multiple of p
OPTIONS: list[dict[str, Any]] = [{}, {"pool": "mean"}, {"pool": "max"}, {"core_per": "kv"}]
each_size = pytest.mark.parametrize(("w", "p"), SIZES)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(map(str, o.values()), "cca"))


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(w: int = 4, p: int = 2, *, num_heads: int = 4, **options: Any) -> CoreContextAttention:
    """A float64 layer with 2 key/value heads, biases that are not zero, and logits that differ."""
    options = {"num_kv_heads": 2, "qkv_bias": True, "proj_bias": True, "dtype": F64, **options}
    module: CoreContextAttention = az.create_attention(
        "cca", dim=12, num_heads=num_heads, head_dim=4, window_size=w, group_size=p, layer_idx=0, **options
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module.eval()


def tokens(length: int, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, length, 12, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- the formula ------------------------------------------------------------------------------------------------------------------


def by_formula(m: CoreContextAttention, x: Tensor) -> Tensor:
    """Row by row and head by head, positions from 1 as in the paper."""
    w, p, d, repeats = m.window_size, m.group_size, m.head_dim, m.num_heads // m.num_kv_heads
    rows = []
    for sample in x:
        q, k, v = (f(sample).unflatten(-1, (-1, d)).transpose(0, 1) for f in (m.q_proj, m.k_proj, m.v_proj))  # (heads, N, d)
        if m.rope_theta is not None:
            q, k = rotate_by_formula(q, m), rotate_by_formula(k, m)
        outputs = []
        for i in range(1, len(sample) + 1):
            n = max(0, (i - w) // p)
            heads = []
            for h in range(m.num_heads):
                keys = [core_by_formula(m, q, k, k, h, j) for j in range(1, n + 1)] + [*k[h // repeats, n * p : i]]
                values = [core_by_formula(m, q, k, v, h, j) for j in range(1, n + 1)] + [*v[h // repeats, n * p : i]]
                weights = (torch.stack(keys) @ q[h, i - 1] / d**0.5).softmax(0)
                heads.append(weights @ torch.stack(values))
            outputs.append(m.o_proj(torch.cat(heads)))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def core_by_formula(m: CoreContextAttention, q: Tensor, k: Tensor, pooled: Tensor, head: int, group: int) -> Tensor:
    """The core token of a group (from 1) in a query head: of the keys or of the values, whichever is `pooled`."""
    p, repeats = m.group_size, m.num_heads // m.num_kv_heads
    kv_head, members = head // repeats, slice((group - 1) * p, group * p)
    if m.pool == "max":
        return pooled[kv_head, members].amax(0)
    if m.pool == "mean":
        return pooled[kv_head, members].mean(0)
    sharing = range(kv_head * repeats, (kv_head + 1) * repeats) if m.core_per == "kv" else [head]
    alphas = [(k[kv_head, members] @ q[h, group * p - 1] / m.head_dim**0.5).softmax(0) for h in sharing]
    return torch.stack(alphas).mean(0) @ pooled[kv_head, members]


def rotate_by_formula(x: Tensor, m: CoreContextAttention) -> Tensor:
    """Pair c of token t as a complex number, times exp(1j t theta^(-2c/d))."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * m.rope_theta ** (-2 * torch.arange(d // 2, dtype=F64) / d)
    if m.rope_layout == "half":
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], -1)
    turned = torch.complex(x[..., ::2].contiguous(), x[..., 1::2].contiguous()) * torch.exp(1j * angles)
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)


@given(
    length=st.integers(1, 13),
    batch=st.integers(1, 2),
    w=st.integers(0, 7),
    p=st.integers(1, 4),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    pool=st.sampled_from(["cca", "cca", "mean", "max"]),
    core_per=st.sampled_from(["query", "kv"]),
    rope_theta=st.sampled_from([None, 10000.0, 100.0]),
    rope_layout=st.sampled_from(["half", "interleaved"]),
    qkv_bias=st.booleans(),
)
def test_against_the_formula(length: int, batch: int, w: int, p: int, **options: Any) -> None:
    module = build(w, p, **options)
    x = tokens(length, batch).requires_grad_()
    leaves = [x, *module.parameters()]
    results = []
    for out in (module(x), by_formula(module, x)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b, 1e-9)


@each_size
def test_visible_tokens_are_all_up_to_the_query_each_once(w: int, p: int) -> None:
    length = 30
    positions = torch.arange(length)
    core, local = core_context_visible(positions, positions, length // p, window_size=w, group_size=p)
    counted = core.repeat_interleave(p, 1).long()  # what the groups stand for
    counted = nn.functional.pad(counted, (0, length - counted.shape[1])) + local
    assert torch.equal(counted, torch.ones(length, length).tril().long())
    exact = local.sum(1)
    for i in range(1, length + 1):  # the paper's count of the local window, where its index is off by one
        assert exact[i - 1] == (i if i < w + p else w + (i - w) % p)


@each_option
def test_blocks_of_queries_do_not_change_the_result(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build(5, 3, **options), tokens(50)
    want = module(x)
    for size in (1, 7, 16):
        monkeypatch.setattr(core_context, "_BLOCK", size)
        close(module(x), want)


def test_long_sequences_form_no_square_map(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = core_context._attend_block

    def spy(q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, **kwargs: Any) -> Any:
        seen.append((k.shape[2], core_k.shape[2]))
        return attend(q, k, v, core_k, core_v, **kwargs)

    monkeypatch.setattr(core_context, "_attend_block", spy)
    build(16, 8)(tokens(1000, 1))
    assert len(seen) == 4
    assert max(raw for raw, _ in seen) <= 256 + 16 + 8
    assert [core for _, core in seen] == [(stop - 16) // 8 for stop in (256, 512, 768, 1000)]


# --- the official code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norope_h4_w4_p4", "rope_gqa_w6_p4", "decode_gqa_w4_p4"])
def test_core_tokens_as_the_official_code(name: str) -> None:
    """Its pool_weights, core_k, core_v and mask."""
    case = load_case(f"cca/{name}")
    module, stored = case.build(), case.group("output")
    x = case.group("input")["tokens"]
    q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj))
    tables = (case.group("input")["cos"], case.group("input")["sin"])
    q, k = (apply_rotary(t, tables) for t in (q, k))
    m, p = stored["core_k"].shape[2], module.group_size
    ends, k, v = q[:, :, p - 1 : m * p : p], k[:, :, : m * p], v[:, :, : m * p]
    close(pooling_weights(ends, k, group_size=p), stored["pool_weights"], case.tolerance)
    core_k, core_v = pool_core_tokens(ends, k, v, group_size=p)
    close(core_k, stored["core_k"], case.tolerance)
    close(core_v, stored["core_v"], case.tolerance)
    positions = torch.arange(x.shape[1])
    visible = core_context_visible(positions, positions, m, window_size=module.window_size, group_size=p)
    assert torch.equal(torch.cat(visible, 1), stored["mask"])


def test_decoding_as_the_official_code() -> None:
    """decode_gqa_w4_p4: a prefill, then token by token; output, and the gradient through all of it."""
    case = load_case("cca/decode_gqa_w4_p4")
    plan = json.loads(case.meta["forward_kwargs"])
    module, x = case.build(), case.group("input")["tokens"].requires_grad_()
    module.layer_idx = 0
    chunks = (plan["prefill"], *[1] * plan["decode_steps"])
    out = decode(module, x, chunks)
    close(out, case.group("output")["tokens"], case.tolerance)
    (out * case.group("cotangent")["tokens"]).sum().backward()
    assert x.grad is not None
    close(x.grad, case.tensors["grad.input"], case.gradient_tolerance)


# --- invariants -------------------------------------------------------------------------------------------------------------------


@each_size
@each_option
def test_a_prefix_gives_the_prefix(w: int, p: int, options: dict[str, Any]) -> None:
    module, x = build(w, p, **options), tokens(17)
    want = module(x)
    for length in (1, 4, 9, 16):
        close(module(x[:, :length]), want[:, :length])


@pytest.mark.parametrize(("w", "p", "length"), [(4, 3, 6), (9, 5, 13), (5, 1, 14), (0, 1, 9)])
@each_option
def test_short_sequences_and_groups_of_one_are_softmax_attention(w: int, p: int, length: int, options: dict[str, Any]) -> None:
    """Up to w + p - 1 tokens, and any number with p = 1: outputs and gradients."""
    module = build(w, p, rope_theta=None, **options)
    plain = GroupedQueryAttention(12, 4, num_kv_heads=2, head_dim=4, qkv_bias=True, is_causal=True, dtype=F64)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}
    plain.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in module.state_dict().items()})
    results = []
    for attention in (module, plain):
        x = tokens(length).requires_grad_()
        out = attention(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-9)


def test_one_token_more_than_that_is_not_softmax_attention() -> None:
    module, wide = build(4, 3), build(100, 3)
    x = tokens(8)
    close(module(x)[:, :6], wide(x)[:, :6])
    assert (module(x) - wide(x))[:, 6:].abs().amin((0, 2)).min() > 1e-4


def test_equal_keys_in_a_group_pool_to_their_mean() -> None:
    q, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8)
    k = torch.randn(2, 2, 3, 8).repeat_interleave(4, 2)
    for a, b in zip(pool_core_tokens(q, k, v, group_size=4), pool_core_tokens(q, k, v, group_size=4, pool="mean"), strict=True):
        close(a, b.repeat_interleave(2, 1), 1e-5)


@each_option
def test_constant_values_give_a_constant(options: dict[str, Any]) -> None:
    module = build(3, 2, proj_bias=False, **options)
    with torch.no_grad():
        module.v_proj.weight.zero_()
    out = module(tokens(15))
    close(out, out[:1, :1].expand_as(out))


def test_weights_sum_to_one() -> None:
    ones = torch.ones(1, 2, 21, 1)
    q, k = torch.randn(1, 4, 21, 8), torch.randn(1, 2, 21, 8)
    core_k, _ = pool_core_tokens(q[:, :, 2:18:3], k[:, :, :18], ones[:, :, :18], group_size=3)
    out = core_context_attention(q, k, ones, core_k, torch.ones(1, 4, 6, 1), window_size=3, group_size=3)
    close(out, torch.ones_like(out), 1e-6)


@each_option
def test_grouped_heads_equal_repeated_ones(options: dict[str, Any]) -> None:
    if options.get("core_per") == "kv":
        pytest.skip("averages over the query heads of a key/value head")
    grouped, whole = build(3, 2, **options), build(3, 2, num_kv_heads=4, **options)
    state = grouped.state_dict()
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            heads = state[f"{name}.{kind}"].unflatten(0, (2, 4))
            state[f"{name}.{kind}"] = heads.repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    x = tokens(14)
    close(grouped(x), whole(x))


def test_rotation_is_relative_however_core_tokens_are_pooled() -> None:
    module, x = build(3, 2), tokens(14)
    tables = [rotary_tables(14, 4, start=start) for start in (0, 7)]
    a, b = (module(x, position_embeddings=(cos.to(F64), sin.to(F64))) for cos, sin in tables)
    close(a, b, 1e-5)  # the tables are float32
    steps = torch.arange(14)[:, None] * 10000.0 ** (-torch.arange(0, 4, 2, dtype=F64) / 4)
    own = torch.cat([steps, steps], -1)
    close(module(x, position_embeddings=(own.cos(), own.sin())), module(x))


def test_mixed_precision_with_core_tokens() -> None:
    module = build(3, 2).float()
    x = tokens(30).float()
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert ((got - want).norm() / want.norm()) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert ((low.float() - want).norm() / want.norm()) < 0.05


def test_large_logits_in_half_precision_stay_finite() -> None:
    module = build(3, 2).half()
    out = module((60 * tokens(20)).half())
    assert out.isfinite().all()


@pytest.mark.parametrize("masked", slow_but(1, [True, False]))
def test_compiles_with_core_tokens(masked: bool) -> None:
    torch._dynamo.reset()
    module, x = build(3, 2), tokens(11)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    mask = padding(11, (11, 6)) if masked else None
    close(compiled(x, attention_mask=mask), module(x, attention_mask=mask))


# --- the cache --------------------------------------------------------------------------------------------------------------------


def decode(
    module: CoreContextAttention, x: Tensor, chunks: tuple[int, ...], mask: Tensor | None = None, cache: Any = None
) -> Tensor:
    """The tokens in consecutive chunks through a cache; the mask grows with them."""
    out, start, cache = [], 0, DynamicCache() if cache is None else cache
    for size in chunks:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        out.append(module(x[:, start:stop], past_key_values=cache, attention_mask=seen))
        start = stop
    return torch.cat(out, 1)


@given(
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    w=st.integers(0, 8),
    p=st.integers(1, 4),
    options=st.sampled_from(OPTIONS),
    layout=st.sampled_from(["half", "interleaved"]),
)
def test_any_split_equals_one_forward(chunks: list[int], w: int, p: int, options: dict[str, Any], layout: str) -> None:
    module = build(w, p, rope_layout=layout, **options)
    x = tokens(sum(chunks))
    close(decode(module, x, tuple(chunks)), module(x))


def test_gradients_through_the_cache_equal_those_of_one_forward() -> None:
    module = build(3, 2)
    results = []
    for call in (module, lambda t: decode(module, t, (5, 1, 1, 6, 1))):
        x = tokens(14).requires_grad_()
        out = call(x)
        results.append(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-9)


@each_size
@each_option
def test_the_cache_is_as_small_as_the_paper_has_it(w: int, p: int, options: dict[str, Any]) -> None:
    module, x = build(w, p, **options), tokens(23, 3)
    for chunks in ((23,), (1,) * 23, (5, 9, 9)):
        cache = DynamicCache()
        decode(module, x, chunks, cache=cache)
        layer = cache.layers[0]
        assert isinstance(layer, CoreContextCacheLayer)
        assert layer.get_seq_length() == cache.get_seq_length(0) == 23
        assert layer.keys.shape == layer.values.shape == (3, 2, 23 - max(0, (23 - w) // p) * p, 4)
        assert layer.keys.shape[2] <= w + p - 1
        assert layer.core_keys.shape == layer.core_values.shape == (3, module.num_core_heads, 23 // p, 4)
        assert measured_cache_bytes(cache) == 3 * cache_report(module, 23).cache_bytes == 3 * 8 * module.cache_elements(23)


def test_the_prefill_is_cut_back_in_memory_too() -> None:
    """A slice would keep the whole prompt's keys alive."""
    module, cache = build(3, 2), DynamicCache()
    module(tokens(500), past_key_values=cache)
    layer = cache.layers[0]
    for tensor in (layer.keys, layer.values):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 8


def test_a_cache_at_the_papers_sizes() -> None:
    """131 072 tokens, w = 1024, p = 16: 7 % of all keys and values; with 8 of 32 heads 25.6 %, or 7 % with cores per KV head."""
    kwargs: dict[str, Any] = {"dim": 4096, "num_heads": 32, "device": "meta"}
    held = 64  # complete groups that are not a window back yet
    raw, core = 1024 + 16, 8128
    sizes = {
        name: az.create_attention("cca", **kwargs, **options).cache_elements(131072 + 15) / (2 * 128)
        for name, options in {
            "mha": {},
            "gqa": {"num_kv_heads": 8},
            "kv": {"num_kv_heads": 8, "core_per": "kv"},
            "mean": {"num_kv_heads": 8, "pool": "mean"},
        }.items()
    }
    assert sizes["mha"] == 32 * (core + held) + 32 * (raw - 1)
    assert sizes["gqa"] == 32 * (core + held) + 8 * (raw - 1)
    assert sizes["kv"] == sizes["mean"] == 8 * (core + held + raw - 1)
    assert sizes["mha"] / (32 * 131072) == pytest.approx(0.07, abs=0.001)
    assert sizes["gqa"] / (8 * 131072) == pytest.approx(0.256, abs=0.003)


@pytest.mark.parametrize(("length", "mean"), [(32768, 1976), (65536, 3007), (131072, 5059)])
def test_keys_per_query_at_the_papers_sizes(length: int, mean: int) -> None:
    """The spec's averages over a prompt for w = 1024, p = 16: 8.3, 10.9 and 13 times fewer scores than causal attention."""
    position = torch.arange(length)
    released = core_context._released(position, 1024, 16)
    keys = released + position + 1 - 16 * released
    assert keys.double().mean().item() == pytest.approx(mean, abs=1)


def test_other_uses_of_a_cache() -> None:
    module, x = build(3, 2).requires_grad_(False), tokens(12, 3)
    cache = DynamicCache()
    decode(module, x[:, :9], (5, 4), cache=cache)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    close(decode(module, x[:, 9:].repeat_interleave(2, 0), (3,), cache=repeated), module(x)[:, 9:].repeat_interleave(2, 0))
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    beams = torch.cat([x[order, :9], x[:, 9:]], 1)
    close(decode(module, x[:, 9:], (1, 2), cache=cache), module(beams)[:, 9:])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(decode(module, x, (7, 5), cache=cache), module(x))
    with pytest.raises(NotImplementedError, match="summarised"):
        cache.layers[0].crop(-3)


# --- padding ----------------------------------------------------------------------------------------------------------------------


def padding(length: int, real: tuple[int, ...], side: str = "left") -> Tensor:
    """(B, N) with this many ones in each row, padded on one side."""
    places = torch.arange(length)
    return torch.stack([places >= length - n if side == "left" else places < n for n in real]).long()


@each_size
@each_option
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_the_prompts_alone(w: int, p: int, options: dict[str, Any], side: str) -> None:
    module, lengths = build(w, p, **options), (15, 11, 4, 1)
    x, mask = tokens(15, 4), padding(15, lengths, side)
    out = module(x, attention_mask=mask)
    for i, row in enumerate(mask.bool()):
        close(out[i : i + 1, row], module(x[i : i + 1, row]))
    assert torch.equal(out[~mask.bool()], module.o_proj.bias.expand(int((1 - mask).sum()), -1)), "padding attends to nothing"


@given(
    data=st.data(),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    w=st.integers(0, 7),
    p=st.integers(1, 4),
    options=st.sampled_from(OPTIONS),
)
def test_any_padding_through_any_split(data: Any, chunks: list[int], w: int, p: int, options: dict[str, Any]) -> None:
    """Tokens missing anywhere, other ones in each sample, prefilled and decoded in any chunks: as without the missing tokens."""
    length = sum(chunks)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=2, max_size=3)))
    module, x = build(w, p, **options), tokens(length, len(mask))
    out, once = decode(module, x, tuple(chunks), mask), module(x, attention_mask=mask)
    for i, row in enumerate(mask):
        if row.any():
            want = module(x[i : i + 1, row])
            close(once[i : i + 1, row], want)
            close(out[i : i + 1, row], want)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    module, mask = build(3, 2), padding(14, (14, 9, 5))
    x = tokens(14, 3)
    changed = torch.where(mask.bool()[..., None], x, 40 * torch.randn(x.shape, dtype=F64)).requires_grad_()
    real = mask.bool()
    for call in (functools.partial(module, attention_mask=mask), lambda t: decode(module, t, (8, 1, 5), mask)):
        out = call(changed)
        close(out[real], call(x)[real])
        (gradient,) = torch.autograd.grad(out[real].square().sum(), changed)
        assert gradient[~real].abs().max() == 0


def test_padding_after_and_before_unpadded_calls() -> None:
    """A cache that began without a mask goes on with one, and a padded batch that lost its padded samples without."""
    module, x = build(3, 2), tokens(14, 2)
    cache, mask = DynamicCache(), torch.ones(2, 14, dtype=torch.long)
    mask[1, 8:10] = 0
    first = module(x[:, :7], past_key_values=cache)
    rest = module(x[:, 7:], past_key_values=cache, attention_mask=mask)
    out = torch.cat([first, rest], 1)
    for i, row in enumerate(mask.bool()):
        close(out[i : i + 1, row], module(x[i : i + 1, row]))

    cache = DynamicCache()
    module(x[:, :9], past_key_values=cache, attention_mask=padding(9, (4, 9)))
    cache.batch_select_indices(torch.tensor([1]))
    close(decode(module, x[1:, 9:], (1, 1, 3), cache=cache), module(x[1:])[:, 9:])


def test_reordering_a_padded_cache() -> None:
    module, x, mask = build(3, 2), tokens(14, 3), padding(14, (14, 9, 5))
    cache, order = DynamicCache(), torch.tensor([1, 1, 2])
    decode(module, x[:, :10], (6, 4), mask[:, :10], cache)
    cache.reorder_cache(order)
    beams = torch.cat([x[order, :10], x[:, 10:]], 1)
    got = [module(x[:, i : i + 1], past_key_values=cache, attention_mask=mask[order][:, : i + 1]) for i in range(10, 14)]
    close(torch.cat(got, 1), module(beams, attention_mask=mask[order])[:, 10:])


def test_a_mask_that_changes_its_mind_is_refused() -> None:
    module, x = build(3, 2), tokens(8)
    cache = DynamicCache()
    module(x[:, :6], past_key_values=cache, attention_mask=padding(6, (6, 3)))
    for mask in (None, torch.ones(2, 7, dtype=torch.long), padding(7, (7, 5))):
        with pytest.raises(ValueError, match="same tokens padding"):
            module(x[:, 6:7], past_key_values=cache, attention_mask=mask)
    unpadded = DynamicCache()
    module(x[:, :6], past_key_values=unpadded)
    with pytest.raises(ValueError, match="same tokens padding"):
        module(x[:, 6:7], past_key_values=unpadded, attention_mask=padding(7, (7, 4)))


@pytest.mark.parametrize("form", ["bool", "eager", "inf", "keys"])
def test_padding_is_read_from_hugging_faces_causal_mask(form: str) -> None:
    module, x, mask = build(3, 2), tokens(12), padding(12, (12, 7))
    want = module(x, attention_mask=mask)
    cache, got = DynamicCache(), []
    for start, stop in ((0, 8), (8, 9), (9, 12)):
        sizes: dict[str, Any] = {"batch_size": 2, "q_length": stop - start, "kv_length": stop, "q_offset": start}
        padded = {"attention_mask": mask[:, :stop].bool(), "allow_is_causal_skip": False}
        if form == "eager":
            whole = eager_mask(**sizes, **padded, dtype=F64)
        else:
            whole = sdpa_mask(**sizes, **padded)
        if form == "inf":
            whole = torch.zeros(whole.shape).masked_fill(~whole, -torch.inf).expand(2, 4, -1, -1)
        if form == "keys":
            whole = mask[:, None, None, :stop].bool()
        if start == 0:
            close(module(x[:, :8], attention_mask=whole), want[:, :8])
        got.append(module(x[:, start:stop], attention_mask=whole, past_key_values=cache))
    real = mask.bool()
    close(torch.cat(got, 1)[real], want[real])


def test_other_masks_are_refused() -> None:
    module, x = build(3, 2), tokens(6)
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    windowed = causal & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
    packed = causal.clone()
    packed[:, :, 3:, :3] = False  # two documents in one row
    weighed = torch.zeros(2, 1, 6, 6).masked_fill(~causal, -torch.inf)
    weighed[..., 2, 1] = -0.5
    close(module(x, attention_mask=causal), module(x))
    for mask in (windowed, packed, weighed):
        with pytest.raises(ValueError, match="single pairs"):
            module(x, attention_mask=mask)
    for mask in (torch.zeros(6, 6), torch.ones(6, 6), causal[:, :, :, :5], causal.long(), torch.ones(2, 7, dtype=torch.long)):
        with pytest.raises(ValueError, match="attention_mask must be padding"):
            module(x, attention_mask=mask)


# --- construction and conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": -1}, r"window_size.*-1.*nearest is 0"),
        ({"group_size": 0}, r"group_size.*0.*nearest is 1"),
        ({"pool": "sum"}, r"pool.*'cca', 'mean', 'max'.*'sum'"),
        ({"core_per": "head"}, r"core_per.*'query', 'kv'"),
        ({"num_kv_heads": 3}, r"num_kv_heads=3.*nearest"),
        ({"rope_theta": 0.0}, r"rope_theta.*positive"),
        ({"head_dim": 3}, r"even, got 3.*rope_theta=None"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        az.create_attention("cca", dim=16, num_heads=4, **options)


def test_defaults() -> None:
    module = az.create_attention("cca", dim=32, num_heads=4)
    assert (module.window_size, module.group_size, module.pool, module.core_per) == (1024, 16, "cca", "query")
    assert (module.num_kv_heads, module.rope_theta, module.rope_layout, module.layer_idx) == (4, 10000.0, "half", None)
    assert {n for n, _ in module.named_parameters()} == {f"{p}_proj.weight" for p in "qkvo"}
    assert az.create_attention("cca", dim=32, num_heads=4, head_dim=5, rope_theta=None).head_dim == 5


SOURCES: dict[str, Any] = {
    "mha": lambda: MultiHeadAttention(32, 4, qkv_bias=True, is_causal=True, attn_drop=0.1),
    "gqa": lambda: GroupedQueryAttention(32, 4, num_kv_heads=2, head_dim=6, proj_bias=False, is_causal=True),
    "llama": lambda: LlamaAttention(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), layer_idx=3),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_conversion_preserves_the_function_of_short_sequences(kind: str) -> None:
    source = SOURCES[kind]().eval()
    module = CoreContextAttention.from_softmax_attention(source, window_size=4, group_size=3)
    exact = CoreContextAttention.from_softmax_attention(source, window_size=2, group_size=1)
    assert not module.training
    x = torch.randn(2, 12, 32)
    if kind == "llama":
        tables = rotary_tables(12, 8)
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        want = source(x, position_embeddings=tuple(t[None] for t in tables), attention_mask=mask)[0]
        calls = {"position_embeddings": tables}
        assert module.layer_idx == 3
    else:
        want, calls = source(x), {}
        assert module.attn_drop == source.attn_drop
    close(exact(x, **calls), want, 1e-5)
    close(module(x, **calls)[:, :6], want[:, :6], 1e-5)
    assert (module(x, **calls) - want)[:, 6:].abs().max() > 1e-4
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in source.parameters()}


def test_conversion_refuses_what_it_cannot_keep() -> None:
    convert = CoreContextAttention.from_softmax_attention
    bidirectional: list[nn.Module] = [
        MultiHeadAttention(16, 4),
        BertSelfAttention(BertConfig(hidden_size=16, num_attention_heads=4)),
    ]
    for source in bidirectional:
        with pytest.raises(ValueError, match="causal"):
            convert(source)
    with pytest.raises(ValueError, match=r"without a place.*q_norm"):
        convert(Attention(16, 4, qk_norm=True, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match="num_heads"):
        convert(Attention(16, 4).state_dict())
    with pytest.raises(ValueError, match="whole number of heads"):
        convert(Attention(16, 4).state_dict(), num_heads=3)
    module = convert(Attention(16, 4, qkv_bias=True).double().state_dict(), num_heads=4, rope_theta=500.0, pool="mean")
    assert (module.rope_theta, module.pool, module.q_proj.bias is not None) == (500.0, "mean", True)
    assert module.q_proj.weight.dtype == F64


# --- the operation ----------------------------------------------------------------------------------------------------------------


def test_the_operation_returns_the_normaliser() -> None:
    q, k, v = torch.randn(1, 4, 9, 8, dtype=F64), torch.randn(1, 2, 9, 8, dtype=F64), torch.randn(1, 2, 9, 5, dtype=F64)
    core_k, core_v = pool_core_tokens(q[:, :, 1:6:2], k[:, :, :6], v[:, :, :6], group_size=2)
    out, lse = core_context_attention(q, k, v, core_k, core_v, window_size=3, group_size=2, scale=0.3, return_lse=True)
    assert out.shape == (1, 4, 9, 5)
    core, local = core_context_visible(torch.arange(9), torch.arange(9), 3, window_size=3, group_size=2)
    logits = 0.3 * torch.cat([q @ core_k.mT, q @ k.repeat_interleave(2, 1).mT], -1)
    close(lse, logits.masked_fill(~torch.cat([core, local], -1), -torch.inf).logsumexp(-1))


@given(length=st.integers(1, 9), seen=st.lists(st.integers(0, 9), min_size=2, max_size=2), w=st.integers(0, 4), p=st.integers(1, 3))
def test_samples_may_stand_at_different_positions(length: int, seen: list[int], w: int, p: int) -> None:
    assume(max(seen) + length <= 15)
    total = 15
    q, k, v = (torch.randn(2, 2, total, 4, dtype=F64) for _ in range(3))
    m = total // p
    core_k, core_v = pool_core_tokens(q[:, :, p - 1 : m * p : p], k[:, :, : m * p], v[:, :, : m * p], group_size=p)
    call = functools.partial(core_context_attention, window_size=w, group_size=p)
    want = call(q, k, v, core_k, core_v)
    starts = torch.tensor(seen)
    parts = torch.stack([q[i, :, s : s + length] for i, s in enumerate(seen)])
    got = call(parts, k, v, core_k, core_v, query_start=starts)
    close(got, torch.stack([want[i, :, s : s + length] for i, s in enumerate(seen)]))


def test_wrong_calls_of_the_operation() -> None:
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    core = torch.randn(1, 4, 3, 8)
    call = functools.partial(core_context_attention, window_size=3, group_size=2)
    assert call(q, k, k, core, core).shape == q.shape
    with pytest.raises(ValueError, match="sees 3 core tokens, core_k has 2"):
        call(q, k, k, core[:, :, :2], core[:, :, :2])
    with pytest.raises(ValueError, match="numbers of heads"):
        call(q, k.repeat(1, 2, 1, 1)[:, :3], k.repeat(1, 2, 1, 1)[:, :3], core, core)
    with pytest.raises(ValueError, match="channels"):
        call(q, k[..., :7], k, core, core)
    with pytest.raises(ValueError, match="one B"):
        call(q, k[0], k, core, core)
    with pytest.raises(ValueError, match="at least"):
        call(q, k, k, core, core, group_size=0)
    with pytest.raises(ValueError, match=r"m \* 4"):
        pool_core_tokens(q[:, :, :2], k, k, group_size=4)
    with pytest.raises(ValueError, match="pool must be"):
        pool_core_tokens(q, k, k, group_size=1, pool="sum")
