"""Combiner against its formula in loops, the paper's invariants, its caches, and the conversion of softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_case import rotary_tables
from combiner_reference import by_formula
from hypothesis import given
from hypothesis import strategies as st
from parity_case import load_case
from timm.layers import Attention
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import attention_zoo as az
from attention_zoo.attention import CombinerAttention, GroupedQueryAttention, MultiHeadAttention
from attention_zoo.attention.cache import cache_report, measured_cache_bytes
from attention_zoo.attention.combiner import _near_root

F64 = torch.float64
PATTERNS = ("fixed", "axial", "logsparse", "mixture")
ROW_SUMMARIES = ("none", "wsum", "proj", "wsum_proj")
VARIANTS: list[dict[str, Any]] = [
    *(
        {"pattern": p, "summary_pool": pool, "summary_act": act}
        for p, pool, act in (
            ("fixed", "max", "deepset"),
            ("fixed", "mean", "identity"),
            ("logsparse", "max", "identity"),
            ("logsparse", "mean", "relu"),
            ("logsparse", "sum", "deepset"),
            ("mixture", "max", "identity"),
            ("mixture", "sum", "relu"),
            ("mixture", "mean", "deepset"),
        )
    ),
    *({"pattern": "axial", "row_summary": summary} for summary in ROW_SUMMARIES),
]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 8, num_heads: int = 2, **options: Any) -> CombinerAttention:
    """A float64 layer whose biases are not zero."""
    options = {"qkv_bias": True, "window_size": 3, **options}
    module: CombinerAttention = az.create_attention("combiner", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    module.layer_idx = 0
    return module.eval()


def tokens(length: int, batch: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(batch, length, dim, dtype=F64)


def ids(variant: dict[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


# --- the formula ------------------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Options of a layer, and a length that it takes."""
    pattern, is_causal = draw(st.sampled_from(PATTERNS)), draw(st.booleans())
    window = draw(st.integers(1, 5))
    full_rows = not is_causal and pattern in ("axial", "mixture")
    options = {
        "pattern": pattern,
        "is_causal": is_causal,
        "window_size": window,
        "summary_pool": draw(st.sampled_from(["max", "sum", "mean"])),
        "summary_act": draw(st.sampled_from(["identity", "relu", "deepset"])),
        "row_summary": draw(st.sampled_from(ROW_SUMMARIES)),
        "exclusive": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "rope_layout": draw(st.sampled_from(["half", "interleaved"])),
    }
    return options, window * draw(st.integers(1, 4)) if full_rows else draw(st.integers(1, 13))


@given(layer=layers(), rotated=st.booleans(), masked=st.booleans())
def test_against_the_formula(layer: tuple[dict[str, Any], int], rotated: bool, masked: bool) -> None:
    options, length = layer
    module, x = build(**options), tokens(length).requires_grad_()
    tables = tuple(t.to(F64) for t in rotary_tables(length, 4, options["rope_layout"])) if rotated else None
    real = None
    if masked and (options["is_causal"] or options["exclusive"] or options["pattern"] != "mixture"):
        real = torch.rand(2, length) > 0.4
    kept = torch.ones(2, length, dtype=torch.bool) if real is None else real
    leaves = [x, *module.parameters()]
    results = []
    for out in (module(x, attention_mask=real, position_embeddings=tables), by_formula(module, x, real, tables)[0]):
        out = out.masked_fill(~kept[..., None], 0.0)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for leaf, a, b in zip(leaves, gradients, wanted, strict=True):  # the loops leave out what is summed up to 0 here
        close(*(torch.zeros_like(leaf) if gradient is None else gradient for gradient in (a, b)), 1e-8)


OFFICIAL = (
    "axial_bidir_proj",
    "axial_causal",
    "fixed_bidir",
    "fixed_bidir_exclusive",
    "fixed_causal",
    "fixed_ragged_masked",
    "logsparse_causal_n13",
    "mixture_bidir",
    "mixture_causal_max",
)


@pytest.mark.parametrize("name", OFFICIAL)
def test_probabilities_as_the_official_code(name: str) -> None:
    """The loops above agree with the official code about every pair of tokens."""
    case = load_case(f"combiner/{name}")
    module, (x, kwargs) = case.build().double(), case.inputs()
    probabilities = by_formula(module, x.double(), kwargs.get("attention_mask"))[1]
    want = case.group("output")["prob"].double()
    if "attention_mask" in kwargs:
        rows = kwargs["attention_mask"][:, None, :, None]
        probabilities, want = probabilities * rows, want * rows
    close(probabilities, want, 1e-5)


# --- invariants -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_every_token_reaches_every_other(options: dict[str, Any], is_causal: bool) -> None:
    """Full support: the point of the method. Rows of the probabilities sum to 1."""
    module, x = build(is_causal=is_causal, **options), tokens(12, batch=1)
    probabilities = by_formula(module, x)[1]
    close(probabilities.sum(-1), torch.ones(1, 2, 12, dtype=F64))
    allowed = torch.ones(12, 12, dtype=torch.bool)
    allowed = allowed.tril() if is_causal else allowed
    assert (probabilities > 0).eq(allowed).all()


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_later_tokens_change_nothing_at_all(options: dict[str, Any]) -> None:
    module, x = build(is_causal=True, **options), tokens(11)
    want = module(x)
    for t in (1, 3, 4, 8, 10):
        changed = x.clone()
        changed[:, t:] = 30 * torch.randn(2, 11 - t, 8, dtype=F64)
        assert torch.equal(module(changed)[:, :t], want[:, :t])
        close(module(x[:, :t]), want[:, :t])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_a_constant_value_stays(options: dict[str, Any], is_causal: bool) -> None:
    module, x = build(is_causal=is_causal, **options), tokens(12)
    with torch.no_grad():
        module.qkv.weight[16:] = 0
    close(module(x), module.proj(module.qkv.bias[16:]).expand(2, 12, 8))


def softmax_layer(module: CombinerAttention) -> MultiHeadAttention:
    plain = MultiHeadAttention(8, 2, qkv_bias=True, is_causal=module.is_causal, dtype=F64)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k.startswith(("qkv.", "proj."))})
    return plain


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [v for v in VARIANTS if v["pattern"] != "logsparse"], ids=ids)
def test_a_window_over_all_tokens_is_softmax_attention(options: dict[str, Any], is_causal: bool) -> None:
    for length in (1, 5, 6):
        module, x = build(is_causal=is_causal, window_size=6, **options), tokens(length)
        close(module(x), softmax_layer(module)(x))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"pattern": "fixed"}, {"pattern": "mixture"}, *({"pattern": "axial", "row_summary": s} for s in ("none", "wsum"))],
    ids=ids,
)
def test_windows_of_one_are_softmax_attention(options: dict[str, Any], is_causal: bool) -> None:
    module, x = build(is_causal=is_causal, window_size=1, **options), tokens(7)
    close(module(x), softmax_layer(module)(x))


@pytest.mark.parametrize("is_causal", [False, True])
def test_logsparse_of_two_tokens_is_softmax_attention(is_causal: bool) -> None:
    module = build(pattern="logsparse", is_causal=is_causal)
    for length in (1, 2):
        x = tokens(length)
        close(module(x), softmax_layer(module)(x))


def test_the_order_inside_a_finished_segment_does_not_matter() -> None:
    module, x = build(is_causal=True), tokens(9)
    mixed = torch.cat([x[:, [2, 0, 1]], x[:, 3:]], 1)
    close(module(mixed)[:, 3:], module(x)[:, 3:])
    assert not torch.allclose(module(mixed)[:, :3], module(x)[:, :3])


# --- windows, lengths, masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "window"), [(1, 1), (2, 1), (3, 1), (5, 3), (7, 3), (8, 2), (12, 3), (13, 4), (196, 14), (10, 2)]
)
def test_window_near_the_root(length: int, window: int) -> None:
    assert _near_root(length) == window
    module, x = build(window_size=None), tokens(length)
    close(module(x), build_like(module, window_size=window)(x))


def build_like(module: CombinerAttention, **options: Any) -> CombinerAttention:
    other = build(**options)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tokens(pattern: str, is_causal: bool) -> None:
    module = build(pattern=pattern, is_causal=is_causal)
    assert module(tokens(0)).shape == (2, 0, 8)
    assert build(pattern=pattern, is_causal=is_causal, window_size=None)(tokens(0)).shape == (2, 0, 8)
    if is_causal:
        cache, x = DynamicCache(), tokens(5)
        parts = [module(part, past_key_values=cache) for part in x.split([0, 2, 0, 3], dim=1)]
        close(torch.cat(parts, 1), module(x))


def test_grid_gives_the_window() -> None:
    module, x = build(window_size=None), tokens(12)
    close(module(x, grid_size=(2, 6)), build_like(module, window_size=6)(x))
    given_window = build_like(module, window_size=4)
    close(given_window(x, grid_size=(2, 6)), given_window(x))
    with pytest.raises(ValueError, match=r"grid_size.*15"):
        module(x, grid_size=(3, 5))


@pytest.mark.parametrize("pattern", ["axial", "mixture"])
def test_rows_must_be_full_in_both_directions(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"full rows: 10 tokens.*window_size=4.*nearest.* 2"):
        build(pattern=pattern, window_size=4)(tokens(10))
    assert build(pattern=pattern, window_size=4, is_causal=True)(tokens(10)).shape == (2, 10, 8)
    assert build(pattern=pattern, window_size=16)(tokens(10)).shape == (2, 10, 8), "one row"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_padding_on_the_right(options: dict[str, Any], is_causal: bool) -> None:
    """Equals leaving it out, by whole rows where rows must be full; never in logsparse's mirrored spans, which hang on the end."""
    if options["pattern"] == "logsparse" and not is_causal:
        pytest.skip("its spans count from the end")
    kept = 9 if not is_causal else 7
    module, x = build(is_causal=is_causal, **options), tokens(12)
    padding = torch.arange(12).expand(2, -1) < kept
    close(module(x, attention_mask=padding)[:, :kept], module(x[:, :kept]))


@pytest.mark.parametrize("options", [v for v in VARIANTS if v["pattern"] != "logsparse"], ids=ids)
def test_padding_on_the_left_by_whole_segments(options: dict[str, Any]) -> None:
    module, x = build(is_causal=True, **options), tokens(11)
    padding = (torch.arange(11) >= 6).expand(2, -1)
    close(module(x, attention_mask=padding)[:, 6:], module(x[:, 6:]))


def test_masks_that_have_no_meaning_are_refused() -> None:
    module = build(pattern="mixture", exclusive=False)
    with pytest.raises(ValueError, match=r"attention_mask.*exclusive=False"):
        module(tokens(9), attention_mask=torch.ones(2, 9).bool())
    for mask in (torch.ones(2, 1, 9, 9).bool(), torch.zeros(2, 9), torch.ones(1, 9).bool()):
        with pytest.raises(ValueError, match=r"padding.*\(2, 9\)"):
            build()(tokens(9), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "spiral"}, "'fixed', 'axial', 'logsparse', 'mixture'.*'spiral'"),
        ({"summary_pool": "min"}, "'max', 'sum', 'mean'.*'min'"),
        ({"summary_act": "gelu"}, "'identity', 'relu', 'deepset'.*'gelu'"),
        ({"row_summary": "mean"}, "'none', 'wsum', 'proj', 'wsum_proj'.*'mean'"),
        ({"window_size": 0}, "window_size.*0.*nearest is 1"),
        ({"window_size": 2.5}, "window_size.*2.5.*nearest is 2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        az.create_attention("combiner", dim=8, num_heads=2, **options)


def test_parameters_exist_where_they_are_used() -> None:
    names = {ids(v): {n.split(".")[0] for n, _ in build(**v).named_parameters()} for v in VARIANTS}
    own = {"summary_proj", "summary_norm", "summary_key"}
    for variant, found in names.items():
        assert found - {"qkv", "proj"} == (own if "proj" in variant else {"pool_q", "pool_k"} if "deepset" in variant else set())
    shapes = {
        n: tuple(p.shape)
        for n, p in az.create_attention("combiner", dim=8, num_heads=2, head_dim=6, pattern="axial").named_parameters()
    }
    assert shapes == {
        "qkv.weight": (36, 8),
        "summary_proj.weight": (8, 12),
        "summary_norm.weight": (8,),
        "summary_norm.bias": (8,),
        "summary_key.weight": (12, 8),
        "proj.weight": (8, 12),
        "proj.bias": (8,),
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropout_is_unbiased(pattern: str) -> None:
    module = build(pattern=pattern, is_causal=True, attn_drop=0.5, row_summary="none").train()
    x = tokens(12)
    outs = torch.stack([module(x) for _ in range(200)])
    want = module.eval()(x)
    noise = outs.std(0) / 200**0.5
    assert ((outs.mean(0) - want).abs() < 6 * noise + 1e-9).all()
    assert (outs.std(0).amax(-1) > 1e-3).all()


def test_dropout_never_drops_a_summary() -> None:
    """The second of two tokens sees itself, which may be dropped, and a summary, which may not."""
    module, x = build(pattern="logsparse", is_causal=True, attn_drop=0.5, proj_bias=False), tokens(2, batch=1)
    first, second = by_formula(module, x)[1][0, :, 1].unbind(-1)
    v = module.qkv(x)[0, :, 16:].view(2, 2, 4)
    module.train()
    possible = {
        tuple((first[:, None] * v[0] + torch.tensor(kept)[:, None] * 2 * second[:, None] * v[1]).flatten().tolist())
        for kept in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    module.proj = nn.Identity()
    for _ in range(30):
        out = module(x)[0, 1]
        assert any(torch.allclose(out, torch.tensor(p, dtype=F64)) for p in possible)


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("pattern", ["fixed", "logsparse", "mixture"])
def test_sums_are_accurate_in_low_precision(pattern: str, pool: str) -> None:
    """Sums grow with the region, so they and the logits made of them are float32."""
    module = build(pattern=pattern, summary_pool=pool, window_size=32, is_causal=True).float()
    x = tokens(200).float()
    want = module(x.bfloat16().float())
    got = module.bfloat16()(x.bfloat16()).float()
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiles_with_symbolic_lengths(pattern: str) -> None:
    torch._dynamo.reset()
    module = build(pattern=pattern, is_causal=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 13, 22):
        x = tokens(length)
        close(compiled(x), module(x))


# --- caches -----------------------------------------------------------------------------------------------------------------------


def decode(
    module: CombinerAttention, x: Tensor, chunks: list[int], real: Tensor | None = None, tables: Any = None, cache: Any = None
) -> Tensor:
    cache, start, out = DynamicCache() if cache is None else cache, 0, []
    for size in chunks:
        stop = start + size
        out.append(
            module(
                x[:, start:stop],
                past_key_values=cache,
                attention_mask=None if real is None else real[:, :stop],
                position_embeddings=None if tables is None else (tables[0][start:stop], tables[1][start:stop]),
            )
        )
        start = stop
    return torch.cat(out, 1)


@given(
    variant=st.sampled_from(VARIANTS),
    window=st.integers(1, 5),
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    rotated=st.booleans(),
    masked=st.booleans(),
)
def test_decoding_equals_the_whole(variant: dict[str, Any], window: int, chunks: list[int], rotated: bool, masked: bool) -> None:
    module, x = build(is_causal=True, window_size=window, **variant), tokens(sum(chunks))
    real = torch.rand(2, sum(chunks)) > 0.3 if masked else None
    tables = tuple(t.to(F64) for t in rotary_tables(sum(chunks), 4)) if rotated else None
    got, want = decode(module, x, chunks, real, tables), module(x, attention_mask=real, position_embeddings=tables)
    kept = torch.ones(2, sum(chunks), dtype=torch.bool) if real is None else real
    close(got[kept], want[kept])


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_cache_size_and_beams(options: dict[str, Any]) -> None:
    module, x = build(is_causal=True, **options), tokens(11, batch=3)
    for length in range(1, 10):
        caches = [DynamicCache(), DynamicCache()]
        for cache, chunks in zip(caches, ([length], [1] * length), strict=True):
            decode(module, x[:, :length], chunks, cache=cache)
            assert measured_cache_bytes(cache) == 3 * cache_report(module, length).cache_bytes
            assert all(t.untyped_storage().nbytes() == t.numel() * 8 for t in cache.layers[0].tensors().values()), "no view"
        order = torch.tensor([2, 0, 0])
        beams = torch.cat([x[order, :length], x[:, length:]], 1)
        for cache in caches:
            cache.reorder_cache(order)
            close(module(x[:, length:], past_key_values=cache), module(beams)[:, length:])


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_cache_size_with_rotations(options: dict[str, Any]) -> None:
    """Tables of an unfinished row are kept for its projected summary keys."""
    module = build(is_causal=True, **options)
    module.is_rotated = True
    tables = tuple(t.to(F64) for t in rotary_tables(9, module.head_dim))
    for length in range(1, 10):
        cache = DynamicCache()
        decode(module, tokens(9)[:, :length], [1] * length, tables=tables, cache=cache)
        assert measured_cache_bytes(cache) == 2 * cache_report(module, length).cache_bytes


def test_a_fixed_cache_stays_small() -> None:
    """The cache of 4096 tokens in segments of 64 is 1 / 64 of all keys and values, and one unfinished segment at most."""
    module = az.create_attention("combiner", dim=64, num_heads=4, window_size=64, is_causal=True)
    plain = az.create_attention("mha", dim=64, num_heads=4, is_causal=True)
    assert cache_report(module, 4096).cache_bytes * 64 == cache_report(plain, 4096).cache_bytes
    assert cache_report(module, 4096 + 63).cache_bytes < cache_report(plain, 4096).cache_bytes / 20


def test_caches_that_cannot_be() -> None:
    x = tokens(4)
    with pytest.raises(ValueError, match="window_size"):
        build(is_causal=True, window_size=None)(x, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="is_causal=True"):
        build()(x, past_key_values=DynamicCache())
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="another mechanism"):
        build(is_causal=True)(x, past_key_values=cache)


# --- conversion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["fixed", "axial", "mixture"])
def test_conversion_keeps_the_function(pattern: str) -> None:
    x = torch.randn(2, 9, 16)
    plain = Attention(16, num_heads=4, qkv_bias=True).eval()
    close(CombinerAttention.from_softmax_attention(plain, pattern=pattern, window_size=9)(x), plain(x), 1e-6)
    grouped = GroupedQueryAttention(16, 4, num_kv_heads=2, is_causal=True, qkv_bias=True).train()
    converted = CombinerAttention.from_softmax_attention(grouped, pattern=pattern, window_size=9)
    assert converted.is_causal
    assert converted.training
    close(converted(x), grouped(x), 1e-6)


def test_conversion_of_hugging_face_layers() -> None:
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    source = LlamaAttention(config, layer_idx=3).eval()
    converted = CombinerAttention.from_softmax_attention(source, window_size=1)
    assert (converted.layer_idx, converted.is_causal, converted.num_heads) == (3, True, 4)
    x, tables = torch.randn(2, 7, 16), rotary_tables(7, 4)
    want = source(x, position_embeddings=tuple(t[None] for t in tables), attention_mask=None)[0]
    close(converted(x, position_embeddings=tables), want, 1e-6)


def test_conversion_of_scales_norms_and_partial_biases() -> None:
    source = MultiHeadAttention(16, 4, qk_norm=True, norm_layer=nn.RMSNorm)
    for norm in (source.q_norm, source.k_norm):
        norm.eps = 1e-6
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    source.eval()
    x = torch.randn(2, 5, 16)
    close(CombinerAttention.from_softmax_attention(source, window_size=8)(x), source(x), 1e-6)
    with pytest.raises(ValueError, match="RMS"):
        CombinerAttention.from_softmax_attention(MultiHeadAttention(16, 4, qk_norm=True))

    timm_layer = Attention(16, num_heads=4).eval()
    timm_layer.scale, timm_layer.fused_attn = 0.9, False
    close(CombinerAttention.from_softmax_attention(timm_layer, window_size=8)(x), timm_layer(x), 1e-6)
    state = {**GroupedQueryAttention(16, 4, num_kv_heads=4).state_dict(), "q.bias": torch.randn(16)}
    converted = CombinerAttention.from_softmax_attention(state, num_heads=4)
    assert torch.equal(converted.qkv.bias, torch.cat([state["q.bias"], torch.zeros(32)]))


def test_conversion_starts_summaries_as_keys() -> None:
    source = Attention(16, num_heads=4, qkv_bias=True)
    converted = CombinerAttention.from_softmax_attention(source, pattern="axial")
    assert not converted.summary_proj.weight.any()
    assert torch.equal(converted.summary_key.weight, source.qkv.weight[16:32])
    assert torch.equal(converted.summary_key.bias, source.qkv.bias[16:32])
    deepset = CombinerAttention.from_softmax_attention(source, summary_act="deepset", window_size=2)
    relu = CombinerAttention.from_softmax_attention(source, summary_act="relu", window_size=2)
    x = torch.randn(2, 6, 16)
    close(deepset.eval()(x), relu.eval()(x), 1e-6)


def test_conversion_refuses_what_has_no_place() -> None:
    source = Attention(16, num_heads=4)
    with pytest.raises(ValueError, match="num_heads"):
        CombinerAttention.from_softmax_attention(source.state_dict())
    with pytest.raises(ValueError, match="no whole number of heads"):
        CombinerAttention.from_softmax_attention(source.state_dict(), num_heads=5)
    with pytest.raises(ValueError, match=r"without a place: relative\.weight"):
        CombinerAttention.from_softmax_attention({**source.state_dict(), "relative.weight": torch.zeros(3)}, num_heads=4)
    source.alibi_slopes = torch.ones(4)
    with pytest.raises(ValueError, match="ALiBi"):
        CombinerAttention.from_softmax_attention(source)
