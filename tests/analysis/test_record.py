"""Attention maps: against independent computations and eager models, of every mechanism and source; and nothing else changes."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import transformers
import transformers.modeling_utils
from attention_case import Case, cases, seeded
from maps_case import IMAGES, close, record, vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.analysis.sources import interface_table, interface_weights
from attention_zoo.ops import _tap

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT_PADDED = torch.ones(2, 9, dtype=torch.long).index_put((torch.tensor([1, 1]), torch.tensor([0, 1])), torch.tensor(0))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    own = dict(interface_table()._local_mapping)
    yield
    assert _tap._taps == []
    assert _get_current_function_mode_stack() == []
    assert interface_table()._local_mapping == own


def huggingface(kind: str, implementation: str = "eager", **options: Any) -> Any:
    """A tiny model with random weights: "Llama" gives a LlamaModel."""
    own: dict[str, dict[str, Any]] = {
        "Bert": {"max_position_embeddings": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 98},
        "ViT": {"image_size": 16, "patch_size": 4},
        "Llama": {"num_key_value_heads": 2},
        "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
        "Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.5},
        "GptOss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    }
    common = {} if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(
        **{**({} if kind == "ViT" else {"vocab_size": 99}), **common, **own[kind], **options}
    )
    with seeded(0):
        return getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=implementation).eval()


# --- against independent computations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_vision_transformer_of_timm(fused: bool) -> None:
    model: Any = vit(qk_norm=True)
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.norm1.register_forward_hook(lambda _module, _args, out: inputs.append(out))
    with torch.no_grad():
        want = model(IMAGES)
    out, maps = record(model, IMAGES)
    assert torch.equal(out, want)
    assert list(maps) == maps.layers == ["blocks.0.attn", "blocks.1.attn"]
    for number, x in enumerate(inputs[:2]):
        attn = copy.deepcopy(model.blocks[number].attn).double()
        qkv = attn.qkv(x.double()).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
        close(maps[number], (q @ k.mT / math.sqrt(8)).softmax(-1).float())
        assert torch.equal(maps[number], maps[f"blocks.{number}.attn"])


PADDED = {"input_ids": TOKENS, "attention_mask": LEFT_PADDED}


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "zoo", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama", "Mistral", "Gemma2", "ViT"])
def test_models_of_hugging_face(kind: str, implementation: str) -> None:
    """Padding, causality, grouped heads, windows, softcaps: what an eager model returns, whoever computes it."""
    if (kind, implementation) in {("Gemma2", "sdpa"), ("GPT2", "flex_attention")}:
        pytest.skip("not a combination of transformers")
    inputs = {"pixel_values": IMAGES} if kind == "ViT" else PADDED
    model = huggingface(kind)
    with torch.no_grad():
        want = model(**inputs, output_attentions=True).attentions
    if implementation == "zoo":
        az.create_model("llama_tiny", num_hidden_layers=1)  # makes it known to transformers
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        before = model(**inputs)[0]
    out, maps = record(model, call=inputs)
    assert torch.equal(out[0], before)
    assert len(maps) == len(maps.layers) == 2
    for number in range(2):
        if kind == "ViT":
            close(maps[number], want[number])
        else:  # what padding attends to is nobody's business
            real = LEFT_PADDED.bool()
            close(maps[number].transpose(1, 2)[real], want[number].transpose(1, 2)[real])


def test_sinks() -> None:
    model = huggingface("GptOss")
    with torch.no_grad():
        want = model(TOKENS, output_attentions=True).attentions
    _, maps = record(model, TOKENS)
    assert all(torch.equal(maps[number], want[number]) for number in range(2))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_queries", [6, 1])
def test_calls_of_flash_attention(causal: bool, window: int | None, num_queries: int) -> None:
    q, k, v = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    padding = LEFT_PADDED[:, :6]
    sides = None if window is None else (window - 1, 0 if causal else window - 1)
    settings: dict[str, Any] = {"is_causal": causal, "softcap": 2.0}
    want = ops.attention(q, k, v, attn_mask=padding.bool()[:, None, None], window_size=sides, scale=0.5, **settings)
    weights = interface_weights("flash_attention_2", nn.Module(), q, k, padding, scaling=0.5, sliding_window=window, **settings)(
        None
    )
    close(weights @ v.repeat_interleave(2, 1), want)
    sinks = torch.randn(4)
    shared = interface_weights("flash_attention_3", nn.Module(), q, k, None, is_causal=False, s_aux=sinks)(None)
    logits = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    close(shared, torch.cat([logits, sinks.view(1, 4, 1, 1).expand(2, 4, num_queries, 1)], -1).softmax(-1)[..., :-1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation(implementation: str, cache: str) -> None:
    """One map for each step, which is the row that a forward of all tokens has."""
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, pad_token_id=0, eos_token_id=98, **SIZES)
    with seeded(0):
        model: Any = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    settings = {"attention_mask": LEFT_PADDED, "max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    want = model.generate(TOKENS, **settings)
    with az.record_attention(model, forwards="all", rows=-1) as maps:
        got = model.generate(TOKENS, **settings)
    assert torch.equal(got, want)
    tokens = got[:, :-1]
    mask = torch.cat([LEFT_PADDED, LEFT_PADDED.new_ones(2, tokens.shape[1] - 9)], 1)
    _, whole = record(model, call={"input_ids": tokens, "attention_mask": mask})
    for layer in maps:
        steps = maps.history(layer)
        assert len(steps) == tokens.shape[1] - 8
        for number, step in enumerate(steps):
            seen = 9 + number
            close(step[..., :seen], whole[layer][:, :, seen - 1 : seen, :seen])
            assert step.shape[2] == 1
            assert not step[..., seen:].any()


# --- torch's own ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [True, False])  # without, torch takes its fused path
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 8, "vdim": 8}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("masked", [None, "padding", "causal", "added", "heads"])
def test_multihead_attention(options: dict[str, Any], masked: str | None, gradient: bool) -> None:
    with seeded(1):
        module = nn.MultiheadAttention(16, 4, batch_first=True, **options).eval()
        x, context = torch.randn(2, 5, 16), torch.randn(2, 5, options.get("kdim", 16))
    x_k = x if "kdim" not in options else context
    masks: dict[str | None, dict[str, Any]] = {
        None: {},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
        "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
        "added": {"attn_mask": torch.randn(5, 5)},
        "heads": {"attn_mask": torch.randn(8, 5, 5)},
    }
    with torch.set_grad_enabled(gradient):
        want, weights = module(x, x_k, x_k, average_attn_weights=False, **masks[masked])
        shown = masked == "causal" and "add_bias_kv" in options  # without weights, torch's causal mask hides the keys that it adds
        plain = module(x, x_k, x_k, need_weights=shown, **masks[masked])[0]
        with az.record_attention(module) as maps:
            got = module(x, x_k, x_k, need_weights=shown, **masks[masked])[0]
    assert torch.equal(got, plain)
    close(got, want)
    close(maps[0], weights)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gradient", [True, False])
def test_encoder_of_torch(gradient: bool, norm_first: bool) -> None:
    """Its fused path runs no attention module, and turns padded batches into nested tensors."""
    with seeded(1):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval())
        x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoder = model[0]
    with torch.set_grad_enabled(gradient):
        want = encoder(x, src_key_padding_mask=padding)
        with az.record_attention(model, layers=0) as maps:
            got = encoder(x, src_key_padding_mask=padding)
        first: Any = encoder.layers[0]
        y = first.norm1(x) if norm_first else x
        weights = first.self_attn(y, y, y, key_padding_mask=padding, average_attn_weights=False)[1]
    assert torch.equal(got, want)
    assert maps.layers == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
    close(maps[0].transpose(1, 2)[~padding], weights.transpose(1, 2)[~padding])


class Raw(nn.Module):
    """Somebody's attention that no name tells of, in several writings."""

    num_heads = 2

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate, self.mix, self.drop = kind, nn.Linear(8, 3), nn.Conv2d(2, 2, 1), nn.Dropout(0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = logits.softmax(-1)
        _ = self.gate(q).softmax(-1) * 2.0  # no attention: it weighs nothing in a product
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v), weights
        if self.kind == "causal":
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True), logits.masked_fill(~hidden, -torch.inf).softmax(-1)
        if self.kind == "einsum":
            return torch.einsum("...ij,...jd->...id", self.drop(weights), v), weights
        if self.kind == "turned":
            return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1), weights
        if self.kind == "talking":
            weights = self.mix(weights)
            return weights @ v, weights
        if self.kind == "function":
            return torch.matmul(F.dropout(F.softmax(logits, dim=-1, dtype=torch.float64).to(q.dtype), 0.5), v), weights
        return torch.bmm(torch.softmax(logits, -1).flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2]), weights


@pytest.mark.parametrize("kind", ["sdpa", "causal", "einsum", "turned", "talking", "function", "bmm"])
def test_anybodys_module(kind: str) -> None:
    model = nn.Sequential(nn.Identity(), Raw(kind)).train()
    model[0] = Raw("sdpa")  # by the name of its forward's function
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    with az.record_attention(model) as maps:
        _, want = model[1](q, k, v)
    assert list(maps) == ["1"]
    assert maps.calls("1")[0].probabilities.dtype == (torch.float64 if kind == "function" else torch.float32)
    close(maps["1"].float(), want)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 2, 5, 8)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())

    q = torch.randn(shape)
    out, maps = record(Module(), q, rows=slice(1, 4))
    weights = maps[0] if len(shape) > 3 else maps[0].squeeze(1).reshape(*shape[:-2], 3, 5)
    close(weights @ q, out[..., 1:4, :])


def test_queries_shared_by_a_batch_and_grouped_keys() -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, gqa: bool = False) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=gqa)

    q, k = torch.randn(1, 4, 3, 8), torch.randn(2, 4, 5, 8)
    out, maps = record(Module(), q, k)
    close(maps[0] @ k, out)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    out, maps = record(Module(), q, k, True)
    close(maps[0] @ k.repeat_interleave(2, 1), out)


# --- the zoo's mechanisms ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cca": [{"window_size": 3, "group_size": 2, **more} for more in ({}, {"core_per": "kv", "num_kv_heads": 2}, {"pool": "mean"})],
    "combiner": [{"pattern": p, "window_size": 3} for p in ("axial", "logsparse", "mixture")],
    "diff": [{"version": "v2"}],
    "halo": [{"block_size": 2, "halo_size": 1, "mask_padding": True, "num_prefix_tokens": 0}],
}
MECHANISMS = [
    *(case for case in [*cases(), *cases(causal=True)] if case.info.keeps_shape),
    *(Case(name, options=options) for name, several in OPTIONS.items() for options in several),
]


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_every_call_of_a_mechanism(case: Case) -> None:
    """Probabilities times values are what the call returned; none but these softmaxes are recorded; the output stays what it is."""
    module = case.build(dtype=torch.float64)
    x, kwargs = case.inputs(dtype=torch.float64)
    seen: list[_tap.Call] = []
    inside = 0

    def check(call: _tap.Call) -> Any:
        nonlocal inside
        inside += 1
        out = call.proceed()
        inside -= 1
        if inside == 0:  # an operation may be made of others
            seen.append(call)
        if isinstance(call.proceed, functools.partial):
            _check_call(call, call.proceed.args, call.proceed.keywords, out)
        return out

    with seeded(3):
        want = copy.deepcopy(module)(x, **kwargs)
    own = copy.deepcopy(module)
    _tap.add_tap(check)
    try:
        with seeded(3), az.record_attention(own) as maps:
            got = own(x, **kwargs)
    finally:
        _tap.remove_tap(check)
    assert torch.equal(got, want)
    assert maps.layers == [""]
    found = maps.calls(0)
    assert [call.name for call in found] == [call.name for call in seen if (w := call.weights(None)) is not None and w.numel()]
    for call in found:
        sums = call.probabilities.sum(-1)
        close(sums[sums > 0.5], torch.ones_like(sums[sums > 0.5]))
        assert call.probabilities.dtype == torch.float64
    if len(found) > 1:
        with pytest.raises(ValueError, match=rf"attends {len(found)} times.*\n.*queries over"):
            maps[0]


def _check_call(call: _tap.Call, args: Any, kwargs: Any, out: Any) -> None:
    weights = call.weights(None)
    out = out[0] if isinstance(out, tuple) and call.name != "pool_core_tokens" else out
    if weights is None:
        return
    if call.takes_rows and call.queries.shape[-2] > 1:
        some = torch.tensor([call.queries.shape[-2] - 1, 0])
        close(call.weights(some), weights[..., some, :], 1e-12)  # type: ignore[arg-type]
    if call.name == "attention":
        close(weights @ _expand(args[2], weights), out, 1e-10)
    elif call.name == "mixture_attention":
        close(kwargs["gates"].unsqueeze(-1) * (weights @ _expand(args[2], weights)), out, 1e-10)
    elif call.name == "core_context_attention":
        values = torch.cat([_expand(args[4], weights), _expand(args[2], weights)], 2)
        close(weights @ values, out, 1e-10)
    elif call.name == "pool_core_tokens":
        groups = _expand(args[2], weights).unflatten(2, (-1, kwargs["group_size"]))
        close((weights.unsqueeze(-2) @ groups).squeeze(-2), out[1], 1e-10)
    elif call.name == "routed_attention":
        v, routes = args[2], args[3]
        picked = torch.stack([v[b][:, routes[b]] for b in range(len(v))]).flatten(3, 4)  # (B, H, R, K m, D)
        close(weights @ picked, out, 1e-10)
    else:
        assert call.name == "halo_attention"
        block, halo = kwargs["block_size"], kwargs["halo_size"]
        v, side = args[2], block + 2 * halo
        height, width = v.shape[2:4]
        padded = F.pad(v, (0, 0, halo, halo + -width % block, halo, halo + -height % block))
        windows = padded.unfold(2, side, block).unfold(3, side, block).flatten(5).mT
        rows = (weights @ windows).unflatten(4, (block, block)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        close(rows[:, :, :height, :width], out, 1e-10)


def _expand(v: Tensor, weights: Tensor) -> Tensor:
    return v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("length", [9])
def test_a_mechanism_that_computes_its_own_softmax(length: int) -> None:
    """Its probabilities, those of the token itself and of the spans before it, weigh what is summed up."""
    module = az.create_attention("combiner", 8, 2, pattern="logsparse", is_causal=True)
    _, maps = record(module, torch.randn(1, length, 8))
    joint = maps.calls(0)[-1]
    assert joint.name == "token itself and spans"
    assert joint.probabilities.shape == (1, 2, length, 5)
    close(joint.probabilities[:, :, 0], torch.eye(5)[0].expand(1, 2, 5))


def test_rows_of_a_mechanism() -> None:
    """The layer's tokens are chosen; agents are none of them, and kept."""
    module = az.create_attention("agent", 16, 4, agent_num=4, window_size=(5, 3))
    x = torch.randn(2, 15, 16)
    _, whole = record(module, x, call={"grid_size": (5, 3)})
    _, some = record(module, x, call={"grid_size": (5, 3)}, rows=[3, -1])
    assert torch.equal(some.calls(0)[0].probabilities, whole.calls(0)[0].probabilities)
    assert torch.equal(some.calls(0)[1].probabilities, whole.calls(0)[1].probabilities[:, :, [3, 14]])


# --- swapped models ---------------------------------------------------------------------------------------------------------------


def test_swapped_layers_keep_names_and_numbers() -> None:
    model = vit()
    _, before = record(model, IMAGES)
    az.swap_attention(model, "moh", layers=1)
    out, after = record(model, IMAGES)
    assert after.layers == before.layers
    assert torch.equal(before[0], after[0])
    close(before[1], after[1])  # converted so that it computes the same
    assert (before.calls(1)[0].name, after.calls(1)[0].name) == ("scaled_dot_product_attention", "mixture_attention")
    with torch.no_grad():
        assert torch.equal(model(IMAGES), out)


def test_a_swapped_decoder() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SIZES)).eval()
    layers = az.record_attention(model).maps.layers
    az.swap_attention(model, {0: "cca", 1: "gda"})
    with torch.no_grad():
        want = model(TOKENS).logits
    out, maps = record(model, call=PADDED)
    assert maps.layers == layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert len(maps.calls(1)) in (1, 2)
    out, maps = record(model, TOKENS)
    assert torch.equal(out.logits, want)


# --- choices ----------------------------------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_number_slice_and_name() -> None:
    model = vit()
    choices: list[tuple[Any, list[int]]] = [
        (0, [0]),
        (-1, [1]),
        (slice(1, None), [1]),
        (range(2), [0, 1]),
        ("blocks.1.*", [1]),
        ("*attn", [0, 1]),
        ((1, "blocks.0.attn"), [0, 1]),
    ]
    for choice, want in choices:
        _, maps = record(model, IMAGES, layers=choice)
        assert list(maps) == [f"blocks.{number}.attn" for number in want]
        assert all(number in maps for number in want)
        assert (1 - want[0] in maps) == (len(want) == 2)
    assert len(record(model, IMAGES, layers=[])[1]) == 0
    for wrong in (2, -3, "head*x", slice(5, 6)):
        with pytest.raises(ValueError, match=r"no attention layer is .*; the model has 2: blocks.0.attn, blocks.1.attn"):
            az.record_attention(model, layers=wrong)
    with pytest.raises(ValueError, match="numbers, slices, names"):
        az.record_attention(model, layers=1.5)


def test_rows_and_heads_are_chosen() -> None:
    model = vit()
    _, whole = record(model, IMAGES)
    full = whole[0]
    assert full.shape == (2, 3, 17, 17)
    some: Any
    for some, want in ((0, [0]), (-1, [16]), (slice(None, 3), [0, 1, 2]), ((4, 2, -1), [4, 2, 16])):
        _, maps = record(model, IMAGES, rows=some)
        close(maps[0], full[:, :, want])
        assert maps[0].untyped_storage().nbytes() == maps[0].numel() * 4
    _, maps = record(model, IMAGES, heads="mean", rows=0)
    close(maps[0], full[:, :, :1].mean(1, keepdim=True))
    for some, want in ((2, [2]), (slice(1, None), [1, 2]), ((-1, 0), [2, 0])):
        assert torch.equal(record(model, IMAGES, heads=some)[1][0], full[:, want])
    for wrong in ({"rows": 17}, {"rows": [0, -18]}, {"heads": 3}):
        with pytest.raises(ValueError, match=r"are not among the (17 rows|3 heads) of this forward"):
            record(model, IMAGES, **wrong)
    for wrong in ({"heads": "max"}, {"forwards": "first"}):
        with pytest.raises(ValueError, match=r"max|first"):
            az.record_attention(model, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [True, False])
def test_only_what_was_asked_for_is_computed(fused: bool) -> None:
    """With fused attention no more than the rows exists at any time."""
    model: Any = vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    _, maps = record(model, IMAGES, rows=[1], dtype=torch.float16, device="cpu")
    assert maps[0].dtype == torch.float16
    assert not maps[0].requires_grad
    with az.record_attention(model, rows=0) as maps:
        model(IMAGES)
    assert not maps[0].requires_grad


def test_last_forward_or_all() -> None:
    model = vit()
    with az.record_attention(model) as last, torch.no_grad():
        model(IMAGES)
        model(IMAGES[:1])
    with az.record_attention(model, forwards="all") as every, torch.no_grad():
        model(IMAGES)
        model(IMAGES[:1])
    assert len(last.history(0)) == 1
    assert [h.shape[0] for h in every.history(0)] == [2, 1]
    assert torch.equal(last[0], every[0])
    assert torch.equal(every.calls(0, forward=0)[0].probabilities, every.history(0)[0])


def test_what_is_not_there_is_a_key_error() -> None:
    with az.record_attention(vit(), layers=0) as maps:
        pass
    with pytest.raises(KeyError, match="no forward ran"):
        maps[0]
    with pytest.raises(KeyError, match="no layer 5: the model has 2"):
        maps[5]
    _, maps = record(vit(), IMAGES, layers=0)
    with pytest.raises(KeyError, match=r"'blocks.1.attn' was recorded; recorded: blocks.0.attn"):
        maps[1]
    assert "scaled_dot_product_attention: 17 queries over 17 keys" in repr(maps)


# --- nothing else changes ---------------------------------------------------------------------------------------------------------


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_nothing_stays_after_an_error() -> None:
    model = vit()
    recorder = az.record_attention(model)
    with pytest.raises(AssertionError, match="Input height"), recorder as maps:
        model(torch.randn(1, 3, 5, 5))
    assert own_forwards(model) == []
    assert len(maps) == 0
    assert len(record(model, IMAGES)[1]) == 2


def test_a_forward_of_somebody_else_comes_back() -> None:
    model: Any = vit()
    attn = model.blocks[0].attn
    mine = attn.forward = functools.partial(type(attn).forward, attn)
    assert len(record(model, IMAGES)[1]) == 2
    assert attn.forward is mine


def test_nested_blocks_and_one_recorder_twice() -> None:
    model, huggingface_model = vit(), huggingface("Llama", "sdpa")
    az.swap_attention(model, "moh", layers=1)
    for one, inputs in ((model, IMAGES), (huggingface_model, TOKENS)):
        with az.record_attention(one) as outer, az.record_attention(one, rows=0) as inner, torch.no_grad():
            one(inputs)
        assert len(outer) == len(inner) == 2
        assert all(torch.equal(outer[i][:, :, :1], inner[i]) or torch.allclose(outer[i][:, :, :1], inner[i]) for i in range(2))
        assert len(outer.calls(0)) == len(inner.calls(1)) == 1
    recorder = az.record_attention(model)
    with recorder, pytest.raises(RuntimeError, match="in use"), recorder:
        pass
    assert own_forwards(model) == []


def test_other_models_and_threads_are_no_matter() -> None:
    model, other = vit(), az.create_attention("mha", 8, 2)
    with az.record_attention(model) as maps, torch.no_grad():
        other(torch.randn(1, 3, 8))
        thread = threading.Thread(target=lambda: other(torch.randn(1, 3, 8)))
        thread.start()
        thread.join()
        assert len(maps) == 0
        model(IMAGES)
    assert len(maps) == 2


@pytest.mark.parametrize("kind", ["timm", "swapped", "llama"])
def test_training_gives_the_same_gradients(kind: str) -> None:
    """Dropout draws what it drew; probabilities are those before it; a backward pass inside the block is no forward."""
    model: Any = huggingface("Llama", "sdpa", attention_dropout=0.5) if kind == "llama" else vit(attn_drop_rate=0.5)
    if kind == "swapped":
        az.swap_attention(model, "gqa")
    model.train()
    inputs = TOKENS if kind == "llama" else IMAGES

    def step() -> tuple[Tensor, list[Tensor]]:
        with seeded(5):
            out = model(inputs)
            out = out if isinstance(out, Tensor) else out[0]
            return out, list(torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True))

    out, gradients = step()
    with az.record_attention(model, forwards="all") as maps:
        again, same = step()
    assert torch.equal(out, again)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert len(maps.history(0)) == 1
    close(maps[0].sum(-1), torch.ones(maps[0].shape[:-1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_count_once(reentrant: bool) -> None:
    model = az.create_attention("mha", 8, 2)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with az.record_attention(model, forwards="all") as maps:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert len(maps.history(0)) == 1
    llama: Any = huggingface("Llama", "eager").train()
    llama.gradient_checkpointing_enable()
    with az.record_attention(llama, forwards="all") as maps:
        llama(TOKENS)[0].sum().backward()
    assert [len(maps.history(number)) for number in range(2)] == [1, 1]


def test_autocast() -> None:
    model = vit()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            want = model(IMAGES)
        out, maps = record(model, IMAGES)
    assert torch.equal(out, want)
    assert maps[0].dtype == torch.float32
    close(maps[0].sum(-1), torch.ones(2, 3, 17))


def test_a_row_that_sees_nothing_is_zero() -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    _, maps = record(Module(), torch.randn(1, 2, 4, 8), mask)
    assert not maps[0][:, :, 0].any()
    _, maps = record(az.create_attention("mha", 8, 2), torch.randn(1, 4, 8), call={"attention_mask": mask[None, None]})
    assert not maps[0][:, :, 0].any()


@pytest.mark.parametrize("how", ["function", "method", "part"])
def test_compiled_models_run_uncompiled_within(how: str) -> None:
    """Before and after the block they are what they were."""
    model: Any = vit()
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    run = model
    if how == "function":
        run = torch.compile(model, backend=backend)
    elif how == "method":
        model.compile(backend=backend)
    else:
        model.blocks[0].attn = torch.compile(model.blocks[0].attn, backend=backend)
    with torch.no_grad():
        want = run(IMAGES)
        compiled, before = graphs, own_forwards(run)
        assert compiled
        with az.record_attention(run) as maps:
            got = run(IMAGES)
        assert graphs == compiled
        close(got, want, 1e-5)
        close(run(IMAGES), want, 1e-5)
        assert graphs == compiled
    assert own_forwards(run) == before
    assert maps.layers == list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert maps[0].shape == (2, 3, 17, 17)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "cait_xxs24_224",
        "pvt_v2_b0",
        "mobilevit_xxs",
        "vit_base_patch16_siglip_224",
        "resnet50_clip",
    ],
)
@pytest.mark.slow
def test_other_models_of_timm(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.default_cfg["input_size"])
    with torch.no_grad():
        want = model(x)
    out, maps = record(model, x)
    assert torch.equal(out, want)
    assert list(maps) == maps.layers
    for layer in maps:
        if "cait" not in name:  # whose heads are mixed after the softmax
            close(maps[layer].sum(-1), torch.ones(maps[layer].shape[:-1]), 1e-5)
