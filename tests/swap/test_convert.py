"""How a mechanism starts in a host's layer: ways that keep the function, new weights, and why there is none."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from swap_case import fits, shake
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.registry import attention_class
from attention_zoo.swap.core import find_hosts

TOKENS = 24
TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": TOKENS, "scale_attn_by_inverse_layer_idx": True}


def text(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, f"{config}Config")(**{**TEXT, **settings}))


def image(name: str = "vit_tiny_patch16_224", **changes: Any) -> Callable[[], Any]:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return lambda: timm.create_model(name, **{**sizes, **changes})


HOSTS: dict[str, Callable[[], Any]] = {
    "llama": text("LlamaForCausalLM", "Llama", num_key_value_heads=2, attention_bias=True),
    "gemma": text("GemmaForCausalLM", "Gemma", num_key_value_heads=1, head_dim=8),
    "gpt2": text("GPT2LMHeadModel", "GPT2", **GPT2),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3", num_key_value_heads=2, head_dim=16),
    "bert": text("BertForMaskedLM", "Bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    "vit": image(),  # 4 x 4 patches behind a class token
    "vit_patches": image(class_token=False, global_pool="avg"),
    "vit_odd": image(img_size=(40, 24)),
}
# Settings with which a mechanism computes what softmax attention does; on hosts where that takes the most.
KEEPING: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "agent_cswin": [("vit_patches", {"resolution": 4, "use_agents": False})],
    "bra": [("vit", {"n_win": 2, "topk": 4}), ("vit_odd", {"n_win": 2, "topk": 4, "pad_mode": "mask"})],
    "cca": [("llama", {"window_size": TOKENS}), ("llama", {"window_size": 2, "group_size": 1}), ("gpt2", {"window_size": TOKENS})],
    "combiner": [
        ("llama", {"window_size": TOKENS}),
        ("llama", {"window_size": 1}),
        ("gpt2", {"pattern": "axial", "row_summary": "none", "window_size": 1}),
        ("llama", {"pattern": "mixture", "window_size": TOKENS}),
        ("bert", {"window_size": TOKENS}),
    ],
    "dgqa": [("llama", {"num_kv_heads": 2}), ("vit", {"num_kv_heads": 4})],  # until its first update
    "diff": [("llama", {}), ("gpt2", {}), ("bert", {}), ("vit", {})],
    "gda": [("llama", {}), ("bert", {}), ("vit", {}), ("gpt2", {"lambda_mode": "token", "num_noise_heads": 4})],
    "gqa": [("llama", {}), ("bert", {"num_kv_heads": 4})],
    "halo": [("vit", {"block_size": 4, "halo_size": 0}), ("vit_odd", {"block_size": 2, "halo_size": 4})],
    "hilo": [("vit_patches", {"window_size": 1}), ("vit_patches", {"window_size": 4, "alpha": 0.0})],
    "kdgqa": [("gemma", {"num_kv_heads": 1})],  # one group cannot be shared out otherwise
    "lepe_attention": [("vit", {}), ("vit_odd", {"lepe_on": "v"}), ("vit_patches", {"side_dwconv": 0})],
    "mha": [("llama", {}), ("gemma", {}), ("gpt2", {}), ("bert", {}), ("vit", {})],
    "moh": [("llama", {}), ("llama", {"router": "query_norm"}), ("bert", {"shared_heads": 0}), ("vit", {})],
    "pgqa": [("llama", {"num_kv_heads": 2, "noise_mode": "never"})],
}
NEVER = {
    "agent": "a head's map goes through n agents and has rank n at most",
    "dtm": "a downsampler",
    "moh_transnext_aggregated": "its logits are cosines",
    "moh_transnext_global": "its logits are cosines",
}
WAYS = [(kind, name, options) for name, ways in KEEPING.items() for kind, options in ways]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = HOSTS[kind]().eval()
    shake(model)
    return model


def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "config"):
        out: Tensor = model(torch.randint(3, 32, (2, TOKENS), generator=generator)).logits
        return out
    return model(torch.randn(2, 3, *model.patch_embed.img_size, generator=generator))  # type: ignore[no-any-return]


def test_every_mechanism_has_its_ways_or_a_reason() -> None:
    assert KEEPING.keys() | NEVER.keys() == set(az.list_attentions())


@pytest.mark.parametrize(("kind", "name", "options"), WAYS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_settings_that_keep_the_function(kind: str, name: str, options: dict[str, Any]) -> None:
    model = build(kind)
    want = run(model)
    report = az.swap_attention(model, name, **options)
    torch.testing.assert_close(run(model), want, atol=3e-5, rtol=1e-4)
    assert all(row.preserving and row.tried_tokens == row.num_tokens for row in report.layers)


@pytest.mark.parametrize(
    ("kind", "name", "options", "match"),
    [
        ("vit", "dtm", {}, "changes the number of tokens"),
        ("vit_patches", "moh_transnext_global", {}, "starts from TransNeXt's attention only"),
        ("vit", "cca", {}, "needs noncausal_self"),
        ("gpt2", "agent", {}, "needs causal_self"),
        ("llama", "moh", {"num_kv_heads": 1}, "init='mean_pool' averages them"),
        ("vit", "bra", {"n_win": 2, "topk": 4, "kv_downsample": "ada_avgpool", "kv_per_win": 1}, "pools keys"),
    ],
)
def test_what_cannot_start_says_why(kind: str, name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        az.swap_attention(build(kind), name, **options)


def test_averaging_heads_that_agree_keeps_the_function() -> None:
    model = build("llama")
    with torch.no_grad():
        for projection in (p for layer in model.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)):
            projection.weight[8:], projection.bias[8:] = projection.weight[:8], projection.bias[:8]
    want = run(model)
    az.swap_attention(model, "gqa", init="mean_pool", num_kv_heads=1)
    torch.testing.assert_close(run(model), want, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "name", "num_kv_heads"), [("gpt2", "gqa", 4), ("llama", "cca", 2), ("qwen3", "moh", 2)])
def test_averaging_keeps_scale_biases_and_normalisations(kind: str, name: str, num_kv_heads: int) -> None:
    """To as many heads as there are, so that nothing is averaged."""
    model = build(kind)
    want = run(model)
    az.swap_attention(
        model, name, init="mean_pool", num_kv_heads=num_kv_heads, **({"window_size": TOKENS} if name == "cca" else {})
    )
    torch.testing.assert_close(run(model), want, atol=3e-5, rtol=1e-4)


# --- new weights ------------------------------------------------------------------------------------------------------------------


@functools.cache
def fitting() -> list[tuple[str, str]]:
    """Every mechanism once, in a host that it fits into."""
    hosts = {kind: find_hosts(HOSTS[kind]())[0] for kind in ("llama", "vit", "vit_patches")}
    names = [name for name in az.list_attentions() if az.attention_info(name).keeps_shape]
    return [(next(kind for kind, host in hosts.items() if fits(host, name)), name) for name in names]


@pytest.mark.parametrize(("kind", "name"), fitting())
def test_new_weights_are_the_mechanisms_own(kind: str, name: str) -> None:
    """The numbers that its constructor draws, with the host's biases, sizes and dtype; the same for the same seed."""
    models = []
    for seed in (3, 3, 4):
        model = build(kind).to(torch.bfloat16)
        torch.manual_seed(seed)
        report = az.swap_attention(model, name, init="random", **small(name))
        assert {(row.carried, row.converted, row.preserving) for row in report.layers} == {(0, 0, False)}
        models.append(mechanisms(model))
    (first, again, other), host = models, find_hosts(build(kind))[0]
    info = az.attention_info(name)
    options = {**info.causal_options, **info.decoder_options} if host.is_causal else {}
    options |= {} if host.spatial else info.sequence_options
    torch.manual_seed(3)
    for module in first:
        own = inspect.signature(attention_class(name)).parameters
        said = {
            "qkv_bias": host.qkv_bias,
            "proj_bias": host.proj_bias,
            "is_causal": host.is_causal,
            "dtype": torch.bfloat16,
            "head_dim": 8,
        }
        said |= {"num_kv_heads": host.num_kv_heads} if host.num_kv_heads < host.num_heads else {}
        said |= {"num_prefix_tokens": host.prefix_tokens} if host.spatial else {}
        want = az.create_attention(name, 32, 4, **{k: v for k, v in {**said, **options, **small(name)}.items() if k in own})
        assert {n: (p.shape, p.dtype) for n, p in module.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in want.named_parameters()
        }
        for key, parameter in want.named_parameters():
            assert torch.equal(module.get_parameter(key), parameter), key
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def small(name: str) -> dict[str, Any]:
    """What the tests' small grids need."""
    return {"bra": {"n_win": 2}, "halo": {"block_size": 2}}.get(name, {})


def mechanisms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "attention_info")]


@pytest.mark.parametrize("name", ["cca", "combiner", "diff", "gqa", "mha", "moh"])
def test_new_weights_keep_the_scale_of_the_logits(name: str) -> None:
    """GPT-2's second layer divides its logits by 2 more; so do new queries. Dropout is the host's."""
    model = text("GPT2LMHeadModel", "GPT2", **GPT2, attn_pdrop=0.25, resid_pdrop=0.5)()
    torch.manual_seed(3)
    az.swap_attention(model, name, init="random")
    modules: list[Any] = mechanisms(model)
    torch.manual_seed(3)
    info = az.attention_info(name)
    options = {**info.causal_options, **info.decoder_options}
    own = inspect.signature(attention_class(name)).parameters
    said = {"is_causal": True, "qkv_bias": True, "proj_bias": True, "head_dim": 8, **options}
    fresh = [az.create_attention(name, 32, 4, **{k: v for k, v in said.items() if k in own}) for _ in modules]
    queries = next(n for n in ("q_proj", "q", "qkv") if hasattr(fresh[0], n))
    for factor, module, plain in zip((1.0, 0.5), modules, fresh, strict=True):
        assert (module.attn_drop, module.proj_drop.p) == (0.25, 0.5)
        for key, parameter in plain.named_parameters():
            want = parameter.detach().clone()
            if key.startswith(f"{queries}."):
                want[: 32 if queries == "qkv" else None] *= factor
            torch.testing.assert_close(module.get_parameter(key).detach(), want)


def test_new_weights_with_normalised_queries() -> None:
    config = {"query_pre_attn_scalar": 20, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT, **config))
    az.swap_attention(model, "gqa", init="random")
    for module in mechanisms(model):
        assert type(module.q_norm).__name__ == "Gemma3RMSNorm"
        torch.testing.assert_close(module.q_norm.weight.detach() + 1.0, torch.full((8,), (8 / 20) ** 0.5))
        assert not module.k_norm.weight.any()


def test_conversions_that_warn_say_it_in_the_report_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = az.swap_attention(build("llama"), "diff", version="v1", dry_run=True)
    assert {row.preserving for row in report.layers} == {False}
