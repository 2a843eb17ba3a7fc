"""The generic matrix: what every registered mechanism must do, whatever its paper says.

The cases come from the registry and follow `AttentionInfo`: nothing here names a mechanism; to be registered is to be tested.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from attention_case import DIM, FORWARD_VOCABULARY, HEADS, Case, cases, make_generic, rotary_tables, run, run_with_gradients, seeded
from marks import slow_but
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, StaticCache

import attention_zoo as az
from attention_zoo.attention.base import AttentionModule
from attention_zoo.attention.cache import cache_report, measured_cache_bytes

PLAIN = cases()
CAUSAL = cases(causal=True)
BOTH = [*PLAIN, *CAUSAL]
LENGTHS = (1, 2, 7, 16)
GRIDS = ((1, 1), (1, 5), (3, 7), (4, 4))
CHUNKINGS = {"at-once": (9,), "one-by-one": (1,) * 9, "prefill-decode": (6, 1, 1, 1), "chunks": (2, 3, 4), "late-chunk": (1, 8)}


def each(found: list[Case]) -> pytest.MarkDecorator:
    """Parametrise over cases, with readable ids."""
    return pytest.mark.parametrize("case", found, ids=str)


def close(a: Tensor, b: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5, msg: str | None = None) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=None if msg is None else lambda m: f"{msg}: {m}")


def close_gradients(a: list[Tensor | None], b: list[Tensor | None], **tolerance: float) -> None:
    assert [g is None for g in a] == [g is None for g in b]
    for left, right in zip(a, b, strict=True):
        if left is not None and right is not None:
            close(left, right, **tolerance)


def sizes(case: Case) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Inputs of every size that the mechanism takes."""
    smallest = case.info.min_grid_size
    if case.info.spatial:
        yield from (case.inputs(grid=grid) for grid in (smallest, *GRIDS) if grid[0] >= smallest[0] and grid[1] >= smallest[1])
    else:
        yield from (case.inputs(length=length) for length in LENGTHS)


# --- construction -----------------------------------------------------------------------------------------------------------------


@each(PLAIN)
def test_signature_says_what_the_capabilities_say(case: Case) -> None:
    info, arguments, constructor = case.info, case.arguments, case.constructor
    kinds = {p.kind for p in (*arguments.values(), *constructor.values())}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, "nothing may be swallowed"
    assert next(iter(arguments)) == "x"
    assert all(p.kind is p.KEYWORD_ONLY for k, p in arguments.items() if k != "x")
    if info.spatial:
        assert "grid_size" in arguments  # may have a default where a map (B, C, H, W) can be given instead of tokens
    elif "grid_size" in arguments:
        assert arguments["grid_size"].default is not inspect.Parameter.empty
    assert ("past_key_values" in arguments) == info.kv_cache
    assert ("context" in arguments) == info.cross
    assert {"device", "dtype"} <= set(constructor)
    both = {"noncausal_self", "causal_self"} <= info.patterns or {"noncausal_cross", "causal_cross"} <= info.patterns
    assert ("is_causal" in constructor) == both, "is_causal is the option of a mechanism that can do both"
    assert ("position_embeddings" in arguments) == ("rope_layout" in constructor)
    assert set(info.causal_options) | set(info.sequence_options) <= set(constructor)
    assert [p.default for p in arguments.values() if p.name in {"attention_mask", "position_embeddings", "past_key_values"}].count(
        inspect.Parameter.empty
    ) == 0, "masks, rotations and caches are optional"


@each(PLAIN)
def test_module(case: Case) -> None:
    module = case.build()
    assert isinstance(module, AttentionModule)
    assert type(module).attention_info is case.info
    assert module.extra_repr()
    assert len(repr(module)) > len(type(module).__name__)
    for name, rate in (("attn_drop", 0.25), ("proj_drop", 0.25)):
        if name in case.constructor:
            assert "0.25" in repr(case.build(**{name: rate})) or getattr(case.build(**{name: rate}), name, None) == rate


@each(BOTH)
def test_is_causal_is_kept_on_the_module(case: Case) -> None:
    assert case.build().is_causal == (case.is_causal or not case.info.patterns & {"noncausal_self", "noncausal_cross"})


@each(PLAIN)
def test_unknown_option_is_a_type_error(case: Case) -> None:
    with pytest.raises(TypeError, match=r"no option 'no_such_option'.*its options: "):
        case.build(no_such_option=1)


@each([c for c in PLAIN if "num_heads" in c.constructor])
def test_heads_that_do_not_divide_are_a_value_error(case: Case) -> None:
    with pytest.raises(ValueError, match=r"16.*3.*nearest.*[24]"):
        az.create_attention(case.name, **{**case.kwargs(), "num_heads": 3})
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=str(wrong)):
            az.create_attention(case.name, **{**case.kwargs(), "num_heads": wrong})


@each(PLAIN)
def test_dim_that_is_not_positive_is_a_value_error(case: Case) -> None:
    with pytest.raises(ValueError, match="0"):
        az.create_attention(case.name, **{**case.kwargs(), "dim": 0})


@each([c for c in PLAIN if "rope_layout" in c.constructor])
def test_unknown_rope_layout_is_a_value_error(case: Case) -> None:
    with pytest.raises(ValueError, match=r"rope_layout.*'half'.*'interleaved'.*'spiral'"):
        case.build(rope_layout="spiral")


@each(PLAIN)
def test_dtype_and_device_are_honoured(case: Case) -> None:
    module = case.build(dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    x, kwargs = case.inputs(dtype=torch.float64)
    assert run(module, x, **kwargs).dtype == torch.float64
    on_meta = case.build(generic=False, device="meta")
    assert {t.device.type for t in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}


@each(BOTH)
def test_meta_construction_then_reset_parameters(case: Case) -> None:
    """Deferred initialisation: nothing may be computed in the constructor that reset_parameters does not compute again."""
    fresh = case.build(generic=False)
    with torch.device("meta"):
        module = case.build(generic=False)
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else 113)
    module.reset_parameters()
    for (name, got), want in zip(module.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert got.isfinite().all(), f"{name} is not set by reset_parameters"
        assert got.shape == want.shape
        assert got.dtype == want.dtype
    for (name, got), want in zip(module.named_buffers(), fresh.buffers(), strict=True):
        close(got, want, msg=f"buffer {name}")
    x, kwargs = case.inputs()
    assert run(module, x, **kwargs).isfinite().all()


@each(BOTH)
def test_meta_forward(case: Case) -> None:
    """Shapes, and multiply-adds, can be had without computing anything."""
    x, kwargs = case.inputs()
    want = run(case.build(generic=False), x, **kwargs).shape
    kwargs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    out = run(case.build(generic=False, device="meta"), x.to("meta"), **kwargs)
    assert (out.device.type, out.shape) == ("meta", want)


@each(PLAIN)
def test_reset_parameters_initialises_again(case: Case) -> None:
    fresh, module = case.build(generic=False), case.build(generic=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    module.reset_parameters()
    for (name, got), want in zip(module.named_parameters(), fresh.parameters(), strict=True):
        assert not (got == 7.0).any(), f"{name} is not reset"
        if want.numel() > 1 and want.std() == 0:  # the paper starts it at a constant
            close(got, want, msg=name)
        elif want.numel() > 16:
            assert 0.5 < got.std() / want.std() < 2.0, f"{name} starts at another scale than the constructor's"


@each(BOTH)
def test_state_dict_round_trip(case: Case) -> None:
    module, other = case.build(), case.build(generic=False)
    other.load_state_dict(module.state_dict(), strict=True)
    x, kwargs = case.inputs()
    close(run(other, x, **kwargs), run(module, x, **kwargs), atol=0, rtol=0)


@each(PLAIN)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "after-training-step"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(case: Case, duplicate: Callable[[nn.Module], nn.Module], trained: bool) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    if trained:
        out = module.train()(x.requires_grad_(), **kwargs)
        (out.sum() + az.auxiliary_loss(module)).backward()
        module.train()(x, **kwargs)  # leaves a graph behind that was not walked
    other = duplicate(module).eval()
    close(run(other, x, **kwargs), run(module.eval(), x, **kwargs), atol=0, rtol=0)
    assert not {id(t) for t in module.parameters()} & {id(t) for t in other.parameters()}


@each(PLAIN)
def test_torch_save_with_weights_only(case: Case) -> None:
    module = case.build()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for key, tensor in module.state_dict().items():
        assert torch.equal(loaded[key], tensor)


# --- shapes and values ------------------------------------------------------------------------------------------------------------


@each(BOTH)
def test_shapes(case: Case) -> None:
    module = case.build()
    for x, kwargs in sizes(case):
        out, gradients = run_with_gradients(module, x, **kwargs)
        if case.info.keeps_shape:
            assert out.shape == x.shape
        assert out.ndim == 3
        assert out.shape[0] == x.shape[0]
        assert out.dtype == x.dtype
        assert out.isfinite().all()
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert gradients[0] is not None


@each([c for c in PLAIN if c.info.spatial])
def test_grid_is_row_major_height_first(case: Case) -> None:
    """A grid and its transpose are different questions: (H, W) must not be read as (W, H)."""
    module = case.build()
    tall, wide = case.info.grid_multiple
    x, _ = case.inputs(grid=(3 * tall, 8 * wide))
    a, b = (run(module, x, grid_size=grid) for grid in ((3 * tall, 8 * wide), (8 * tall, 3 * wide)))
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-4)


@each(BOTH)
def test_empty_batch(case: Case) -> None:
    x, kwargs = case.inputs(batch=0)
    out, gradients = run_with_gradients(case.build(), x, **kwargs)
    assert out.shape[0] == 0
    if case.info.keeps_shape:
        assert out.shape == x.shape
    assert all(g is None or g.isfinite().all() for g in gradients)


@each(BOTH)
def test_layout_of_the_input_does_not_matter(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    want, gradients = run_with_gradients(module, x, **kwargs)
    strided = torch.empty(x.shape[1], x.shape[0], 2 * DIM).transpose(0, 1)[..., ::2].copy_(x)  # neither dense nor batch first
    assert not strided.is_contiguous()
    got, strided_gradients = run_with_gradients(module, strided, call=lambda m, t, **kw: m(_restride(t), **kw), **kwargs)
    close(got, want)
    close_gradients(strided_gradients, gradients, atol=1e-4, rtol=1e-4)
    same = x[:1].expand(3, -1, -1)  # stride 0 over the batch
    close(run(module, same, **kwargs), run(module, same.contiguous(), **kwargs))


def _restride(x: Tensor) -> Tensor:
    return torch.cat([x.transpose(0, 1), torch.zeros_like(x.transpose(0, 1))], -1).transpose(0, 1)[..., :DIM]


@each([c for c in BOTH if not c.coupled])
def test_a_sample_alone_equals_the_sample_in_its_batch(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(batch=3)
    batch = run(module, x, **kwargs)
    for i in range(3):
        alone = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        close(run(module, x[i : i + 1], **alone), batch[i : i + 1])


@each([c for c in PLAIN if c.coupled])
def test_batch_coupling_is_real(case: Case) -> None:
    """A mechanism that says its samples are coupled and does not couple them would escape the test above for nothing."""
    module = case.build()
    x, kwargs = case.inputs(batch=8, length=4)
    x[1:] *= torch.arange(1, 8).view(-1, 1, 1)
    coupled = False
    for i in range(8):
        coupled = coupled or not torch.allclose(run(module, x[i : i + 1], **kwargs), run(module, x, **kwargs)[i : i + 1], atol=1e-4)
    assert coupled


@each(BOTH)
def test_eval_is_deterministic_and_without_dropout(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    want = run(module, x, **kwargs)
    assert torch.equal(run(module, x, **kwargs), want)
    with seeded(4):
        assert torch.equal(copy.deepcopy(module)(x, **kwargs), want) != case.draws
    rates = {name: 0.5 for name in ("attn_drop", "proj_drop") if name in case.constructor}
    dropping = case.build(generic=False, **rates)
    dropping.load_state_dict(module.state_dict())
    close(run(dropping, x, **kwargs), want, atol=0, rtol=0)


DROPPING = [(c, n) for c in PLAIN for n in ("attn_drop", "proj_drop") if n in c.constructor]


@pytest.mark.parametrize(("case", "rate"), DROPPING, ids=[f"{c}-{n}" for c, n in DROPPING])
def test_dropout_drops_in_training(case: Case, rate: str) -> None:
    """Each rate drops in training mode, other elements for another seed."""
    module = case.build(**{rate: 0.5}).train()
    plain = case.build().train()
    x, kwargs = case.inputs()
    dropped = []
    for seed in (3, 4):
        with seeded(seed):
            dropped.append(copy.deepcopy(module)(x, **kwargs))
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
    assert not torch.allclose(dropped[0], run(plain, x, **kwargs), atol=1e-3)
    if rate == "proj_drop":
        assert 0.2 < (dropped[0] == 0).float().mean() < 0.8


@each(PLAIN)
def test_every_parameter_matters(case: Case) -> None:
    """Over a few inputs every parameter gets a gradient: none is created that the output does not depend on."""
    module = case.build().train()
    seen: dict[str, bool] = {name: False for name, _ in module.named_parameters()}
    for scale in (1.0, 3.0, -2.0, 0.3):
        x, kwargs = case.inputs(batch=3)
        _, gradients = run_with_gradients(module, scale * x.roll(int(scale), 1), **kwargs)
        for name, gradient in zip(seen, gradients[1:], strict=True):
            seen[name] = seen[name] or (gradient is not None and bool(gradient.abs().max() > 1e-7))
    # a bias of the keys shifts all logits of a query alike, which softmax does not see: it may be fused with others or stand alone
    silent = {name for name, reached in seen.items() if not reached and not re.search(r"(^|[._])k\w*\.bias$", name)}
    assert silent <= set(case.info.silent_parameters)


class _Adapted(nn.Linear):
    """What an adapter or a quantised layer is: the weight alone does not say what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * torch.linspace(0.5, 2.0, out.shape[-1], dtype=out.dtype, device=out.device)


@each(PLAIN)
def test_adapted_projections(case: Case) -> None:
    """Every linear layer is called, so that LoRA and quantisation reach it: none is read past its own forward."""
    module = case.build()
    x, kwargs = case.inputs()
    want = run(module, x, **kwargs)
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _Adapted
            assert not torch.allclose(run(module, x, **kwargs), want, atol=1e-5), name
            layer.__class__ = nn.Linear


@each(PLAIN)
def test_bfloat16_autocast_is_close_to_float32(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    want = run(module, x, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = run_with_gradients(module, x, **kwargs)
    _assert_close_in_low_precision(got, want)
    assert all(g is None or (g.dtype == torch.float32 and g.isfinite().all()) for g in gradients)


@each(PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_module_is_close_to_float32(case: Case, dtype: torch.dtype) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    want = run(module, x, **kwargs)
    got = run(copy.deepcopy(module).to(dtype), x.to(dtype), **_cast(kwargs, dtype))
    assert got.dtype == dtype
    _assert_close_in_low_precision(got, want)


def _assert_close_in_low_precision(got: Tensor, want: Tensor) -> None:
    """Median over the tokens: a discrete choice (a head, a key) may fall differently for a token that stands on the edge."""
    off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert got.isfinite().all()
    assert off.median() < 0.03, f"relative error {off.median():.3f}"


def _cast(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


DIFFERENTIATED = [(case, batch, mode) for case in BOTH for batch, mode in ((1, "train"), (2, "eval"), (1, "eval"), (2, "train"))]
BY_DEFAULT = {(case, batch, mode) for case, batch, mode in DIFFERENTIATED if (batch == 1) == (mode == "train")}


@pytest.mark.parametrize(("case", "batch", "mode"), slow_but(BY_DEFAULT, DIFFERENTIATED), ids=str)
def test_gradcheck(case: Case, batch: int, mode: str) -> None:
    """Analytic gradients by input and all parameters against finite differences, in float64.

    Discrete choices (routing, allocation) are constant around the input: it is fixed by a seed, and the differences are 1e-6 wide.
    A batch of one has its own strides, with which torch 2.15's batch normalisation gives a wrong gradient.
    """
    module = case.build(dtype=torch.float64).train(mode == "train")
    x, kwargs = case.inputs(batch, length=3, grid=(4, 5), dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        copied = copy.deepcopy(module)  # statistics that a forward moves start from the same place each time
        with seeded(3):
            out = torch.func.functional_call(copied, dict(zip(names, parameters, strict=True)), (x,), kwargs)
        return torch.cat([out.flatten(), az.auxiliary_loss(copied).reshape(1).to(out)])

    leaves = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each([c for c in BOTH if c.info.keeps_shape])
def test_gradient_checkpointing_equals_plain(case: Case) -> None:
    """The forward is run a second time during the backward: what it does besides its output must stand that."""
    module = case.build().train()
    x, kwargs = case.inputs()
    want, gradients = run_with_gradients(module, x, **kwargs)
    got, again = run_with_gradients(module, x, call=functools.partial(checkpoint, use_reentrant=False), **kwargs)
    close(got, want, atol=0, rtol=0)
    close_gradients(again, gradients, atol=1e-6, rtol=1e-5)


# --- causality and the cache ------------------------------------------------------------------------------------------------------


@each([c for c in CAUSAL if "causal_self" in c.info.patterns])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_future_does_not_matter(case: Case, mode: str) -> None:
    heads = {"num_heads": 2 * HEADS} if "num_heads" in case.constructor else {}  # more to choose from: choices change sooner
    module = case.build(**heads).train(mode == "train")
    x, kwargs = case.inputs(length=9)
    want = run(module, x, **kwargs)
    for t in (1, 2, 5, 8):
        for shape in ((2, 9 - t, DIM), *[(1, 1, DIM)] * 3):  # tokens of all kinds, or all of one kind: that moves statistics most
            changed = x.clone()
            changed[:, t:] = 30 * torch.randn(shape)
            close(run(module, changed, **kwargs)[:, :t], want[:, :t], msg=f"tokens before {t} see what follows")
    changed = x.clone()
    changed[:, 0] += 1.0
    assert not torch.allclose(run(module, changed, **kwargs)[:, -1], want[:, -1], atol=1e-4), "the last token sees the first"


@each([c for c in PLAIN if "noncausal_self" in c.info.patterns and not c.info.spatial])
def test_the_future_matters_where_it_should(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=9)
    changed = x.clone()
    changed[:, -1] += 1.0
    assert not torch.allclose(run(module, changed, **kwargs)[:, 0], run(module, x, **kwargs)[:, 0], atol=1e-5)


@each([c for c in CAUSAL if "causal_cross" in c.info.patterns])
def test_causal_cross_attention_aligns_the_ends(case: Case) -> None:
    """Query i of N stands at key i + M - N, as in decoding."""
    module = case.build()
    x, kwargs = case.inputs(length=4)
    context = torch.randn(2, 7, DIM)
    want = run(module, x, **{**kwargs, "context": context})
    for query in range(4):
        changed = context.clone()
        changed[:, query + 4 :] = 30 * torch.randn(2, 3 - query, DIM)
        close(run(module, x, **{**kwargs, "context": changed})[:, : query + 1], want[:, : query + 1])
    changed = context.clone()
    changed[:, -1] += 1.0
    assert not torch.allclose(run(module, x, **{**kwargs, "context": changed})[:, -1], want[:, -1], atol=1e-5)


CACHED = cases(causal=True, takes="past_key_values")


def with_caches(found: list[Case], kinds: tuple[str, ...] = ("dynamic", "static")) -> pytest.MarkDecorator:
    """Parametrise over cases and the kinds of cache that each of them can use."""
    pairs = [(c, kind) for c in found for kind in kinds if c.info.static_cache or kind == "dynamic"]
    return pytest.mark.parametrize(("case", "kind"), pairs, ids=[f"{c}-{kind}" for c, kind in pairs])


def make_cache(kind: str, length: int) -> Any:
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=length)


def decode(
    module: nn.Module, x: Tensor, chunks: tuple[int, ...], cache: Any, arguments: Callable[[int, int], dict[str, Any]]
) -> Tensor:
    """The tokens in consecutive chunks through a cache; `arguments(start, stop)` are those of one chunk."""
    out, start = [], 0
    for size in chunks:
        out.append(module(x[:, start : start + size], past_key_values=cache, **arguments(start, start + size)))
        start += size
    return torch.cat(out, 1)


@with_caches(CACHED, ("dynamic", "static", "static-exact"))
@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_decoding_with_a_cache_equals_the_full_forward(case: Case, chunks: tuple[int, ...], kind: str) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=9)
    cache = make_cache(kind.removesuffix("-exact"), 9 if kind == "static-exact" else 12)
    got = decode(copy.deepcopy(module), x, chunks, cache, lambda start, stop: kwargs)
    close(got, run(module, x, **kwargs))
    assert int(cache.get_seq_length(0)) == 9


@with_caches([c for c in CACHED if c.takes("position_embeddings")])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_decoding_rotates_by_position(case: Case, kind: str, layout: str) -> None:
    module = case.build(rope_layout=layout)
    x, kwargs = case.inputs(length=9)
    cos, sin = rotary_tables(9, module.head_dim, layout)
    want = run(module, x, position_embeddings=(cos, sin), **kwargs)
    for chunks in CHUNKINGS.values():
        got = decode(
            copy.deepcopy(module),
            x,
            chunks,
            make_cache(kind, 12),
            lambda start, stop: {**kwargs, "position_embeddings": (cos[start:stop], sin[start:stop])},
        )
        close(got, want)


@with_caches([c for c in CACHED if c.takes("attention_mask")])
@pytest.mark.parametrize("full_width", [False, True], ids=["mask-of-seen", "mask-of-cache"])
def test_decoding_behind_left_padding(case: Case, kind: str, full_width: bool) -> None:
    """Prompts of different lengths, padded on the left: each continues as if it stood alone."""
    module = case.build()
    x, kwargs = case.inputs(length=9)
    padding = torch.ones(2, 12 if full_width and kind == "static" else 9, dtype=torch.long)
    padding[0, :4] = 0
    got = decode(
        copy.deepcopy(module),
        x,
        (6, 1, 1, 1),
        make_cache(kind, 12),
        lambda start, stop: {**kwargs, "attention_mask": padding if padding.shape[1] == 12 else padding[:, :stop]},
    )
    want = run(module, x, attention_mask=padding[:, :9], **kwargs)
    real = padding[:, :9].bool()
    close(got[real], want[real])
    if not case.coupled:
        close(got[:1, 4:], run(module, x[:1, 4:], **kwargs), msg="a padded prompt differs from the same prompt alone")


@each(CACHED)
def test_decoding_after_reordering_the_cache(case: Case) -> None:
    """Beam search: the beams' caches change places between two tokens."""
    module = case.build()
    x, kwargs = case.inputs(batch=3, length=9)
    order, cache = torch.tensor([2, 0, 0]), DynamicCache()
    module(x[:, :8], past_key_values=cache, **kwargs)
    cache.reorder_cache(order)
    got = module(x[:, 8:], past_key_values=cache, **kwargs)
    beams = torch.cat([x[order, :8], x[:, 8:]], 1)
    if not case.coupled:
        close(got, run(case.build(), beams, **kwargs)[:, 8:])
    assert got.isfinite().all()


@each(CACHED)
@pytest.mark.parametrize("length", [1, 7, 40])
def test_the_cache_is_as_large_as_it_says(case: Case, length: int) -> None:
    """`cache_report` against the tensors that a cache really holds, after a prefill and after decoding."""
    module = case.build()
    x, kwargs = case.inputs(length=length)
    at_once, stepwise = DynamicCache(), DynamicCache()
    decode(copy.deepcopy(module), x, (length,), at_once, lambda start, stop: kwargs)
    decode(copy.deepcopy(module), x, (1,) * length, stepwise, lambda start, stop: kwargs)
    report = cache_report(module, length)
    for cache in (at_once, stepwise):
        assert measured_cache_bytes(cache) == 2 * report.cache_bytes, "2 samples"
    assert report.cache_bytes_per_token * length == report.cache_bytes
    assert case.name in str(report)


@each([c for c in CACHED if not c.info.static_cache])
def test_a_static_cache_is_refused_where_it_cannot_serve(case: Case) -> None:
    x, kwargs = case.inputs(length=3)
    with pytest.raises(ValueError, match="static cache"):
        case.build()(x, past_key_values=make_cache("static", 12), **kwargs)


@each(CACHED)
def test_a_cache_needs_the_layer(case: Case) -> None:
    module = case.build()
    module.layer_idx = None
    x, kwargs = case.inputs(length=3)
    with pytest.raises(ValueError, match="layer_idx"):
        module(x, past_key_values=DynamicCache(), **kwargs)


@each([c for c in CACHED if c.takes("context")])
def test_a_cache_does_not_go_with_context(case: Case) -> None:
    x, kwargs = case.inputs(length=3)
    with pytest.raises(ValueError, match="past_key_values"):
        case.build()(x, context=x, past_key_values=DynamicCache(), **kwargs)


# --- masks, context, rotations ----------------------------------------------------------------------------------------------------

MASKED = [c for c in BOTH if c.takes("attention_mask")]
PAIR_MASKED = [c for c in MASKED if not c.info.padding_masks_only]


@each(MASKED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_stands_in_the_padding_does_not_matter(case: Case, mode: str) -> None:
    module = case.build().train(mode == "train")
    x, kwargs = case.inputs(batch=4, length=8)
    padding = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0, 1]]).bool()
    changed = torch.where(padding[..., None], x, 40 * torch.randn(x.shape))
    a, b = copy.deepcopy(module), copy.deepcopy(module)
    results = []
    for copied, tokens in ((a, x.clone().requires_grad_()), (b, changed.requires_grad_())):
        with seeded(3):
            out = copied(tokens, attention_mask=padding, **kwargs)
        auxiliary = az.auxiliary_loss(copied)
        (out[padding].square().sum() + auxiliary).backward()
        results.append((out, auxiliary, tokens.grad, [p.grad for p in copied.parameters()]))
    (out, auxiliary, gradient, of_parameters), (out_b, auxiliary_b, gradient_b, of_parameters_b) = results
    close(out[padding], out_b[padding])
    close(auxiliary, auxiliary_b, msg="auxiliary loss")
    close(gradient[padding], gradient_b[padding], atol=1e-4, rtol=1e-4)
    assert gradient_b[~padding].abs().max() == 0, "the real tokens' outputs depend on the padding"
    close_gradients(of_parameters, of_parameters_b, atol=1e-3, rtol=1e-3)


@each([c for c in MASKED if not (c.draws or c.info.spatial or c.length_coupled)])  # another number: another draw, grid, grouping
def test_padding_equals_leaving_the_tokens_out(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(batch=1, length=8)
    padding = torch.ones(1, 8, dtype=torch.long)
    padding[:, 5:] = 0
    padded = run(module, x, attention_mask=padding, **kwargs)[:, :5]
    close(padded, run(module, x[:, :5], **kwargs))


MASK_FORMS = [(c, f) for c in MASKED for f in ("padding", "bool", "float", "finfo-min") if f == "padding" or c in PAIR_MASKED]


@pytest.mark.parametrize(("case", "form"), MASK_FORMS, ids=[f"{c}-{f}" for c, f in MASK_FORMS])
def test_fully_masked_rows_are_finite(case: Case, form: str) -> None:
    module = case.build().train()
    x, kwargs = case.inputs(length=5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0] = False
    if form != "padding":
        mask = mask[:, None, None, :].expand(2, 1, 5, 5)
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    if form == "finfo-min":  # what Hugging Face writes
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, gradients = run_with_gradients(module, x, attention_mask=mask, **kwargs)
    assert out.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in gradients)
    if form != "finfo-min":  # nothing was attended to, so what each token is cannot be told apart through its neighbours
        other = x.clone()
        other[0, 1:] += 1.0
        close(run(module, other, attention_mask=mask, **kwargs)[0, :1], out[0, :1])


@each(MASKED)
def test_forms_of_a_mask_agree(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=6)
    call = functools.partial(run, module, x, **kwargs)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]])
    want = call(attention_mask=padding)
    for dtype in (torch.bool, torch.int32, torch.uint8):
        close(call(attention_mask=padding.to(dtype)), want, msg=f"padding as {dtype}")
    if case.info.padding_masks_only:
        return

    allowed = torch.rand(2, 1, 6, 6) > 0.3
    allowed |= torch.eye(6, dtype=torch.bool)
    want = call(attention_mask=allowed)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    close(call(attention_mask=added), want, msg="4-D boolean and float")
    close(call(attention_mask=allowed.expand(2, HEADS, 6, 6)), want, msg="one mask for all heads, and one each")

    bias = torch.randn(6, 6)
    close(call(attention_mask=bias), call(attention_mask=bias[None, None]), msg="2-D and 4-D float")


@each([c for c in PAIR_MASKED if not (c.coupled or c.draws)])  # those take statistics over the real tokens besides
def test_padding_is_a_mask_over_the_keys(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=6)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]).bool()
    close(run(module, x, attention_mask=padding, **kwargs), run(module, x, attention_mask=padding[:, None, None], **kwargs))


@each([c for c in CAUSAL if c in PAIR_MASKED])
def test_a_mask_adds_to_causality(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=6)
    all_visible = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    close(run(module, x, attention_mask=all_visible, **kwargs), run(module, x, **kwargs))
    close(run(module, x, attention_mask=torch.zeros(6, 6), **kwargs), run(module, x, **kwargs))


@each(MASKED)
def test_wrong_masks_are_value_errors(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=6)
    for wrong in (
        torch.ones(2, 5, dtype=torch.bool),
        torch.zeros(6, 5),
        torch.ones(2, 6, 6, dtype=torch.bool),
        torch.ones(2, 1, 6, 4, dtype=torch.bool),
        torch.ones(2, 1, 6, 6, dtype=torch.long),
    ):
        with pytest.raises(ValueError, match="mask"):
            module(x, attention_mask=wrong, **kwargs)


@each(cases(pattern="noncausal_cross"))
def test_cross_attention_reads_the_context(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=5)
    for length in (1, 3, 5, 8):
        context = torch.randn(2, length, DIM, requires_grad=True)
        kwargs["context"] = context
        out = run(module, x, **kwargs)
        assert out.shape == x.shape
        (gradient,) = torch.autograd.grad(out.square().sum(), context)
        assert gradient.abs().amax(-1).gt(0).all(), "every context token reaches the output"
    with pytest.raises(ValueError, match="context"):
        module(x, context=torch.randn(2, 3, DIM + 1))


@each([c for c in cases(pattern="noncausal_cross", cross_equals_self=True) if "noncausal_self" in c.info.patterns])
def test_cross_attention_to_itself_is_self_attention(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=5)
    close(run(module, x, **{**kwargs, "context": x}), run(module, x, **kwargs))


@each([c for c in cases(pattern="noncausal_cross") if c.takes("attention_mask")])
def test_context_padding_does_not_matter(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=3)
    context, padding = torch.randn(2, 6, DIM), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]).bool()
    changed = torch.where(padding[..., None], context, 40 * torch.randn(context.shape))
    a, b = (run(module, x, **{**kwargs, "context": c, "attention_mask": padding}) for c in (context, changed))
    close(a, b)


ROTATED = [c for c in BOTH if c.takes("position_embeddings")]


@each(ROTATED)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_is_relative(case: Case, layout: str) -> None:
    """Rotary tables change the result, and moving all positions by the same step does not."""
    module = case.build(rope_layout=layout)
    x, kwargs = case.inputs(length=6)
    want = run(module, x, position_embeddings=rotary_tables(6, module.head_dim, layout), **kwargs)
    assert not torch.allclose(want, run(module, x, **kwargs), atol=1e-3)
    shifted = run(module, x, position_embeddings=rotary_tables(6, module.head_dim, layout, start=5), **kwargs)
    if case.info.relative_rotation:
        close(shifted, want, atol=1e-4)
    else:
        assert not torch.allclose(shifted, want, atol=1e-3)
    batched = tuple(t.expand(2, -1, -1) for t in rotary_tables(6, module.head_dim, layout))
    close(run(module, x, position_embeddings=batched, **kwargs), want)


@each(ROTATED)
def test_wrong_rotations_are_value_errors(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs(length=6)
    for length, head_dim in ((5, module.head_dim), (6, module.head_dim + 2)):
        with pytest.raises(ValueError, match="position_embeddings"):
            module(x, position_embeddings=rotary_tables(length, head_dim), **kwargs)
    if case.takes("context"):
        with pytest.raises(ValueError, match="position_embeddings"):
            module(x, context=x, position_embeddings=rotary_tables(6, module.head_dim), **kwargs)


@each(PLAIN)
def test_wrong_tokens_are_value_errors(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    for wrong in (x[..., :-1], x[0], x[None]):
        with pytest.raises(ValueError, match=r"16|\(B, N, C\)"):
            module(wrong, **kwargs)


@each([c for c in PLAIN if c.info.spatial])
def test_wrong_grids_are_errors(case: Case) -> None:
    module = case.build()
    x, _ = case.inputs(grid=(4, 6))
    for wrong in ((4, 5), (5, 6), (24, 0), (-4, -6)):
        with pytest.raises(ValueError, match="grid_size"):
            module(x, grid_size=wrong)
    with pytest.raises(TypeError, match="grid_size"):
        module(x)
    height, width = case.info.min_grid_size
    for grid in ((height - 1, width), (height, width - 1)):
        if min(grid) > 0:
            with pytest.raises(ValueError, match=rf"{height}.*{width}"):
                module(*case.inputs(grid=grid)[:1], grid_size=grid)
    height, width = case.info.grid_multiple
    for grid in ((height + 1, width), (height, width + 1)):
        if (height, width) != (1, 1):
            with pytest.raises(ValueError, match=rf"grid_size.*{height}.*{width}"):
                module(torch.randn(2, grid[0] * grid[1], DIM), grid_size=grid)


@each(PLAIN)
def test_arguments_that_are_not_supported_are_type_errors(case: Case) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    for argument in (*FORWARD_VOCABULARY, "no_such_argument"):
        if not case.takes(argument):
            with pytest.raises(TypeError, match=argument):
                module(x, **kwargs, **{argument: None})


# --- compilation ------------------------------------------------------------------------------------------------------------------


def compiled() -> Iterator[Any]:
    """Every form of every mechanism: causal or not, in training or not, with a mask or without. By default one each, by turns."""
    for turn, name in enumerate(dict.fromkeys(case.name for case in BOTH)):
        forms = [
            (case, mode, masked)
            for masked in (False, True)
            for mode in ("train", "eval")
            for case in BOTH
            if case.name == name and (case in MASKED or not masked)
        ]
        for number, (case, mode, masked) in enumerate(forms):
            marks = () if number == turn % len(forms) else pytest.mark.slow
            yield pytest.param(case, mode, masked, id=f"{case}-{mode}" + "-masked" * masked, marks=marks)


@pytest.mark.parametrize(("case", "mode", "masked"), list(compiled()))
def test_compiles_to_one_graph(case: Case, mode: str, masked: bool) -> None:
    """No graph break, same outputs and gradients; aot_eager traces and differentiates as inductor does, without its compiler."""
    _assert_compiled_equals_eager(case, "aot_eager", mode, masked)


@pytest.mark.slow
@each(BOTH)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_with_inductor(case: Case, mode: str) -> None:
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of eager mode
        _assert_compiled_equals_eager(case, "inductor", mode, atol=1e-4, rtol=1e-4)


def _assert_compiled_equals_eager(case: Case, backend: str, mode: str, masked: bool = False, **tolerance: float) -> None:
    def compiled(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = torch.compile(module, fullgraph=True, backend=backend)(x, **kwargs)
        return out

    torch._dynamo.reset()
    module = case.build().train(mode == "train")
    x, kwargs = case.inputs(length=6, grid=(3, 4))
    if masked:
        kwargs["attention_mask"] = torch.ones(x.shape[:2], dtype=torch.long)
        kwargs["attention_mask"][1, -2:] = 0
    want, gradients = run_with_gradients(module, x, **kwargs)
    got, compiled_gradients = run_with_gradients(module, x, call=compiled, **kwargs)
    close(got, want, **tolerance)
    close_gradients(compiled_gradients, gradients, atol=1e-3, rtol=1e-3)


STATIC = [c for c in CACHED if c.takes("position_embeddings") and c.info.static_cache]


@pytest.mark.parametrize("case", slow_but(2, STATIC), ids=str)
def test_decoding_compiles(case: Case) -> None:
    """A decoding step with a static cache is one graph: its shapes do not change."""
    torch._dynamo.reset()
    module = case.build()
    x, kwargs = case.inputs(length=9)
    cos, sin = rotary_tables(9, module.head_dim)
    want = run(module, x, position_embeddings=(cos, sin), **kwargs)
    step, cache, out = torch.compile(module, fullgraph=True, backend="aot_eager"), make_cache("static", 12), []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        call = module if start == 0 else step
        tables = (cos[start:stop], sin[start:stop])
        with torch.no_grad():
            out.append(call(x[:, start:stop], past_key_values=cache, position_embeddings=tables, **kwargs))
    close(torch.cat(out, 1), want)


# --- documentation ----------------------------------------------------------------------------------------------------------------


@each(PLAIN)
def test_documented(case: Case) -> None:
    info, cls = case.info, type(case.build())
    text = inspect.getdoc(cls) or ""
    assert re.fullmatch(r"[A-Z].*\.", info.summary), "the first line is a sentence"
    assert info.equation, "an indented equation block"
    assert re.search(r"^\|.*\|\n\|[-| ]+\|\n(\|.*\|\n?)+", text, re.MULTILINE), "a table: symbol -> attribute"
    for section in ("Args:", "Shape:", "Raises:"):
        assert section in text
    documented = text[text.index("Args:") : text.index("Shape:")]
    for option in case.constructor:
        assert option in {"device", "dtype"} or re.search(rf"\b{option}\b", documented), f"{option} is not documented"
    module = inspect.getmodule(cls)
    assert module is not None
    assert module.__doc__
    assert info.arxiv is None or info.arxiv in module.__doc__ or info.title.split(":")[0] in module.__doc__
    assert f"{cls.__module__}".startswith("attention_zoo.attention.")


@each(PLAIN)
def test_capabilities_are_plausible(case: Case) -> None:
    info = case.info
    assert info.title
    assert info.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", info.arxiv)
    assert info.arxiv is None or info.year == 2000 + int(info.arxiv[:2])
    assert info.repository is None or re.fullmatch(r"[\w.-]+/[\w.-]+", info.repository)
    assert re.match(r"O\(.+\)", info.cost)
    assert info.engines
    assert set(info.engines) <= {"reference", "torch", "flash", "xformers", "flex", "triton"}
    assert not info.kv_cache or info.causal
    assert info.spatial or info.min_grid_size == info.grid_multiple == (1, 1)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", info.name)


def test_the_matrix_sees_the_registry() -> None:
    assert {c.name for c in PLAIN} == set(az.list_attentions())
    assert {c.name for c in CAUSAL} == set(az.list_attentions(causal=True))
    make_generic(module := nn.Linear(2, 2))
    assert module.weight.std() > 0
