"""Suite `decode`: one token against a long context, in the shape of a layer of Llama-2-7B: time of a step, and bytes of the cache.

Steps of modules project the token, extend a Hugging Face cache and attend, called from Python: a cache that grows is copied at
every step, dense attention's as well. Operations attend only, to keys and values that are there, and are replayed as CUDA graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo import ops
from attention_zoo.benchmarks.cases import Build, Case, Contender, Task, Wrap, dense_ways, normal, operation_task, plain
from attention_zoo.benchmarks.roofline import FORWARD, Work, attention_work
from attention_zoo.ops.core_context import core_context_attention
from attention_zoo.registry import attention_class, attention_info, create_attention

__all__ = ["cases", "core_context_case", "token_count"]

WINDOW, GROUP = 1024, 16  # of core-context attention
# Mechanism -> (heads, options), for the same width as 32 heads of 128 channels.
MECHANISMS: dict[str, tuple[int, dict[str, Any]]] = {
    "gqa": (32, {"num_kv_heads": 8}),
    "kdgqa": (32, {"num_kv_heads": 8}),
    "moh": (32, {"shared_heads": 8, "active_heads": 16, "router": "query_norm"}),
    "diff": (16, {"head_dim": 128}),
    "gda": (12, {"head_dim": 128, "num_noise_heads": 4, "num_kv_heads": 4}),
    "cca": (32, {"window_size": WINDOW, "group_size": GROUP, "rope_theta": None}),
}


def cases(scale: str) -> list[Case]:
    """Operations and steps of modules, over contexts of 4K to 128K tokens; "small": 512 to 4K, "quick": one of 128."""
    contexts = {"full": (4096, 16_384, 65_536, 131_072), "small": (512, 1024, 2048, 4096), "quick": (128,)}[scale]
    found = []
    for context in contexts:
        found += [_grouped_case(context, scale), core_context_case(context, scale)]
    for name in MECHANISMS:
        found += [_step_case(name, context, scale) for context in contexts]
    return found


def core_context_case(context: int, scale: str, *, targets: Mapping[str, float] | None = None) -> Case:
    """The operation of core-context attention: all core tokens, and the window's keys and values."""
    heads, head_dim, window, group = _sizes(scale)
    released = max(0, (context - window) // group)
    recent, seen = context - released * group, released + context - released * group
    ours = _operation(partial(_core_step, context=context, window=window, group=group), heads, head_dim, (recent, context // group))
    dense = _dense_step(heads, heads, head_dim, context)
    numbers = {"batch": 1, "heads": heads, "num_queries": 1, "pairs": seen, "head_dim": head_dim}
    return Case(
        "CCA, decode",
        f"operation, {token_count(context)}",
        context,
        {"ours": Contender(ours), "dense": Contender(dense, dense_ways(), shared=f"dense {context}"), "plain": plain(ours)},
        targets=dict(targets or {}),
        work=lambda: {FORWARD: attention_work(**numbers, kept=2 * seen * heads * head_dim)[FORWARD]},
        items=1,
        facts=_cache_facts(2 * heads * head_dim * (recent + context // group), 2 * heads * head_dim * context),
    )


def _grouped_case(context: int, scale: str) -> Case:
    heads, head_dim, *_ = _sizes(scale)
    kv_heads = heads // 4 if heads > 4 else 1
    kept = 2 * kv_heads * context * head_dim
    numbers = {"batch": 1, "heads": heads, "num_queries": 1, "pairs": context, "head_dim": head_dim}
    return Case(
        "GQA, decode",
        f"operation, {token_count(context)}",
        context,
        {
            "ours": Contender(_dense_step(heads, kv_heads, head_dim, context), dense_ways()),
            "dense": Contender(_dense_step(heads, heads, head_dim, context), dense_ways(), shared=f"dense {context}"),
        },
        work=lambda: {FORWARD: attention_work(**numbers, kept=kept)[FORWARD]},
        items=1,
        facts=_cache_facts(kept, 2 * heads * head_dim * context),
    )


def _step_case(name: str, context: int, scale: str) -> Case:
    """A step of a module with its cache, against one of `mha`."""
    dim, (heads, options) = 4096, MECHANISMS[name]
    if scale != "full":
        dim, heads = 256, heads // 4
        small = {"num_kv_heads": 2, "head_dim": 32, "num_noise_heads": 1, "shared_heads": 2, "active_heads": 4}
        small |= {"window_size": 64} | ({"num_kv_heads": 1} if name == "gda" else {})
        options = {key: small.get(key, value) for key, value in options.items()}
    with torch.device("meta"):
        module: Any = create_attention(name, dim, heads, **_causal_options(name, options))
        dense: Any = create_attention("mha", dim, 32 if scale == "full" else 8, is_causal=True)
    ours = _step(name, dim, heads, context, options)
    kept, weights = module.cache_elements(context), sum(p.numel() for p in module.parameters())
    work = Work(2.0 * (weights + kept), 2.0 * (weights + kept))
    return Case(
        f"{name}, step",
        f"module, {token_count(context)}",
        context,
        {
            "ours": Contender(ours),
            "plain": plain(ours, optional=True),
            "dense": Contender(
                _step("mha", dim, 32 if scale == "full" else 8, context, {}), dense_ways(), shared=f"dense step {context}"
            ),
        },
        work=lambda: {FORWARD: work},
        items=1,
        facts=_cache_facts(kept, dense.cache_elements(context)),
    )


def _step(name: str, dim: int, heads: int, context: int, options: Mapping[str, Any]) -> Build:
    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        from transformers import DynamicCache

        module: Any = create_attention(name, dim, heads, device=device, dtype=dtype, **_causal_options(name, options)).eval()
        module.layer_idx = 0
        cache, call = DynamicCache(), wrap(module)
        with torch.no_grad():
            module(normal(1, context, dim, device=device, dtype=dtype), past_key_values=cache)
        token = normal(1, 1, dim, device=device, dtype=dtype, seed=1)

        def step() -> None:
            with torch.no_grad():
                call(token, past_key_values=cache)

        return Task(step, capturable=False)

    return build


def _causal_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """These options, and what makes the mechanism causal."""
    takes = inspect.signature(attention_class(name)).parameters
    causal = {"is_causal": True} if "is_causal" in takes else {}
    return {**attention_info(name).causal_options, **causal, **options}


def _operation(function: Any, heads: int, head_dim: int, lengths: tuple[int, int]) -> Build:
    """Of a query, and of keys and values, and core keys and values, of these lengths."""

    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        tensors = [
            normal(1, heads, n, head_dim, device=device, dtype=dtype, seed=i)
            for i, n in enumerate((1, lengths[0], lengths[0], lengths[1], lengths[1]))
        ]
        return operation_task(function, wrap, *tensors, learns=False)

    return build


def _core_step(q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, *, context: int, window: int, group: int) -> Tensor:
    out = core_context_attention(
        q, k, v, core_k, core_v, window_size=window, group_size=group, query_start=context - 1, key_start=context - k.shape[2]
    )
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def _dense_step(heads: int, kv_heads: int, head_dim: int, context: int) -> Build:
    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        q, k, v = (
            normal(1, h, n, head_dim, device=device, dtype=dtype, seed=i)
            for i, (h, n) in enumerate(((heads, 1), (kv_heads, context), (kv_heads, context)))
        )
        return operation_task(_attend, wrap, q, k, v, learns=False)

    return build


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ops.attention(q, k, v, is_causal=True)
    assert isinstance(out, Tensor)
    return out


def _sizes(scale: str) -> tuple[int, int, int, int]:
    """Heads, channels, window and group of an operation."""
    return (32, 128, WINDOW, GROUP) if scale == "full" else (4, 32, 64, GROUP)


def _cache_facts(kept: int, dense: int) -> dict[str, Any]:
    """Of numbers in half precision."""
    return {"cache_mib": round(2 * kept / 2**20, 2), "dense_cache_mib": round(2 * dense / 2**20, 2)}


def token_count(number: int) -> str:
    """As words: 4096 is \"4K tokens\"."""
    return f"{number // 1024}K tokens" if number >= 1024 and number % 1024 == 0 else f"{number} tokens"
