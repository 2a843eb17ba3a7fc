"""Suite `papers`: each mechanism in a setting of its paper, or of its size, with what the paper claims and what is aimed at here.

Modules are measured with their projections against `mha` of the same width, heads and tokens; operations, which have no
projections, against dense attention of the same queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.attention.combiner import combine
from attention_zoo.benchmarks.cases import (
    Build,
    Case,
    Contender,
    Task,
    Wrap,
    compiled,
    dense_ways,
    mechanism,
    module_task,
    normal,
    operation_task,
    plain,
    unique,
)
from attention_zoo.benchmarks.decode import core_context_case, token_count
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN, Work, attention_work, causal_pairs, core_context_pairs, mechanism_work
from attention_zoo.ops.core_context import core_context_attention, pool_core_tokens
from attention_zoo.registry import create_attention

__all__ = ["CLAIMS", "GROWTH", "ON_CPU", "cases", "hilo_on_cpu"]

CLAIMS = {
    "BRA": "BiFormer, 2303.08810: attention to the regions that matter, far below the cost of dense; the official code gathers "
    "keys and values.",
    "halo": "HaloNet, 2103.12731: local attention at the cost of its windows; timm's layer, which stands for it, unfolds them.",
    "HiLo": "LITv2, 2205.13213, dim 768, 14x14, batch 64, on an RTX 3090: 1.16 times the images per second of dense attention, "
    "1.06 of spatial reduction, 1.13 of local windows.",
    "agent": "Agent attention, 2312.08874: cost linear in the tokens; models 1.4 to 2.1 times as fast as PVT and Swin.",
    "agent, growth": "The same module on growing maps: time linear in the tokens, to 16K.",
    "CCA, attention": "Core context, 2412.12465, Llama-2-7B: first token 3.5, 5.7 and 7.9 times earlier at 32K, 64K and 128K "
    "tokens. Here the operation alone, against dense causal attention.",
    "CCA, with pooling": "The same with the pooling of the core tokens.",
    "CCA, decode": "The same, attention of one token: 14 times as fast at 128K in the paper (a whole model's step).",
    "MoH": "Mixture-of-Head, 2410.11842: equal quality with 50 to 90 % of the heads; the paper's own kernel is 1.6 times as fast "
    "with half of them. Here routing, attention and gates, without projections.",
    "MoH, causal": "The same in a decoder, routed by the norms of the queries.",
    "diff": "Differential transformer, 2410.05258: training 5 to 12 % slower than the plain transformer. Here two maps, their "
    "difference and its norm, without projections, against softmax attention of as many FLOPs.",
    "gda": "Grouped differential attention, 2510.06949: as diff, one noise head for three signal heads.",
    "KDGQA": "Key-driven grouped queries, 2408.08454: no claim about speed. Against grouped queries of as many key/value heads.",
    "Combiner, fixed": "Combiner, 2107.05768: full attention in O(N sqrt N).",
    "Combiner, logsparse": "The same in O(N log N).",
    "Combiner, axial": "The same along the rows and columns of a grid of tokens, in O(N sqrt N); summary keys are those of the row "
    "as a token attends to it.",
    "Combiner, mixture": "The same with the own row and column, and parts of all others summarised, in O(N sqrt N).",
}
# Group -> exponent of N that its time should grow with, at most 0.1 above it; N log N between 4K and 64K is N^1.1.
GROWTH = {
    "agent, growth": 1.0,
    "Combiner, fixed": 1.5,
    "Combiner, logsparse": 1.1,
    "Combiner, axial": 1.5,
    "Combiner, mixture": 1.5,
}

ON_CPU = "HiLo, CPU: layers of 14x14 tokens"  # measured apart: always on the CPU


def cases(scale: str) -> list[Case]:
    """Every setting, at its full size, "small" (for a CPU) or "quick" (to try the program)."""
    parts = (_vision, _core_context, _mixture_of_heads, _differential, _grouped, _combiner)
    found = unique(case for part in parts for case in part(scale))
    return found if scale == "full" else [replace(case, targets={}) for case in found]  # what is aimed at holds for full sizes


def hilo_on_cpu(scale: str) -> list[dict[str, Any]]:
    """The paper's setting on this machine's CPU, on one thread and on all; fewer images at smaller scales."""
    from attention_zoo.benchmarks.hilo_cpu import measure_hilo_on_cpu

    sizes = {"full": {}, "small": {"batch": 8, "rounds": 5}, "quick": {"dim": 96, "batch": 1, "rounds": 1}}[scale]
    return [measure_hilo_on_cpu(threads=threads, **sizes) for threads in sorted({1, torch.get_num_threads()})]


# ---- modules on maps


def _vision(scale: str) -> Iterator[Case]:
    bra, halo, agent = {"n_win": 16}, {"block_size": 8, "halo_size": 3}, {"agent_num": 49}
    hilo = {"alpha": 0.9, "window_size": 2}
    yield _map("BRA", "bra", 64, 2, 2, (208, 336), {**bra, "topk": 1}, (0.06, 0.08), scale)
    yield _map("BRA", "bra", 128, 4, 2, (112, 176), {**bra, "topk": 4}, (0.3, 0.35), scale)
    yield _map("BRA", "bra", 256, 8, 2, (64, 96), {**bra, "topk": 16}, (0.9, 1.0), scale)
    yield _map("halo", "halo", 512, 8, 8, (64, 64), halo, (0.6, 0.7), scale)
    yield _map("halo", "halo", 256, 8, 8, (128, 128), halo, (0.15, 0.2), scale)
    yield _map("HiLo", "hilo", 768, 12, 64, (14, 14), hilo, (1.0, 1.0), scale)
    yield _map("HiLo", "hilo", 384, 12, 32, (28, 28), hilo, (0.9, 0.9), scale)
    yield _map("HiLo", "hilo", 384, 12, 16, (56, 56), hilo, (0.6, 0.6), scale)
    yield _map("HiLo", "hilo", 384, 12, 4, (112, 112), hilo, (0.4, 0.4), scale)
    yield _map("agent", "agent", 192, 6, 16, (56, 56), agent, (0.9, 0.9), scale)
    yield _map("agent", "agent", 384, 12, 1, (128, 128), agent, (0.35, 0.4), scale)
    for side in (32, 64, 128):
        yield _map("agent, growth", "agent", 384, 12, 4, (side, side), agent, None, scale)


def _map(
    group: str,
    name: str,
    dim: int,
    heads: int,
    batch: int,
    grid: tuple[int, int],
    options: Mapping[str, Any],
    targets: tuple[float, float] | None,
    scale: str,
) -> Case:
    """A spatial mechanism on maps, against dense attention of their tokens."""
    if scale != "full":
        most = 32 if scale == "small" else 8
        grid, batch = (max(4, min(grid[0] // 2, most)), max(4, min(grid[1] // 2, most))), min(batch, 2 if scale == "small" else 1)
    given = dict(options)
    if name == "agent":
        given["window_size"] = grid
    if scale == "quick":
        given |= {"bra": {"n_win": 2, "topk": 1}, "agent": {"agent_num": 4}}.get(name, {})
    tokens = grid[0] * grid[1]
    setting = f"dim {dim}, {grid[0]}x{grid[1]}, batch {batch}" + (f", top {given['topk']}" if "topk" in given else "")
    shape: dict[str, Any] = {"batch": batch, "num_tokens": tokens}
    ours = mechanism(name, dim, heads, **shape, grid_size=grid, options=given)
    return Case(
        group,
        setting,
        tokens,
        _contenders(ours, mechanism("mha", dim, heads, **shape)),
        targets=_by_direction(targets),
        work=partial(mechanism_work, name, dim, heads, **shape, grid_size=grid, options=given),
        items=batch * tokens,
    )


# ---- operations on sequences


def _core_context(scale: str) -> Iterator[Case]:
    """A layer of Llama-2-7B's shape."""
    heads, head_dim, window, group = (32, 128, 1024, 16) if scale == "full" else (2, 32, 64, 16)
    for tokens, speed in ((32_768, 3.5), (65_536, 5.7), (131_072, 7.9)):
        length, learns = _scaled(tokens, scale, small=32), tokens < 2**17
        dense = _sequences(_causal, heads, length, head_dim, learns=learns)
        work = partial(
            attention_work,
            batch=1,
            heads=heads,
            num_queries=length,
            pairs=core_context_pairs(length, window_size=window, group_size=group),
            head_dim=head_dim,
            kept=2 * heads * head_dim * (length + length // group),
        )
        attention = _sequences(partial(_core, window, group), heads, length, head_dim, cores=length // group, learns=learns)
        pooled = _sequences(partial(_pooled, window, group), heads, length, head_dim, learns=learns)
        for name, ours in (("CCA, attention", attention), ("CCA, with pooling", pooled)):
            contenders = _contenders(ours, dense, shared=f"causal {length}")
            if tokens > 2**15:  # seconds each: the shortest context shows them
                del contenders["plain"], contenders["compiled"]
            yield Case(name, token_count(length), length, contenders, targets={FORWARD: 1 / speed}, work=work, items=length)
    yield core_context_case({"full": 131_072, "small": 8192, "quick": 512}[scale], scale, targets={FORWARD: 0.1})


def _core(window: int, group: int, q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor) -> Tensor:
    out = core_context_attention(q, k, v, core_k, core_v, window_size=window, group_size=group)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def _pooled(window: int, group: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _core(window, group, q, k, v, *pool_core_tokens(q[:, :, group - 1 :: group], k, v, group_size=group))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ops.attention(q, k, v, is_causal=True)
    assert isinstance(out, Tensor)
    return out


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ops.attention(q, k, v)
    assert isinstance(out, Tensor)
    return out


def _sequences(
    function: Callable[..., Tensor], heads: int, length: int, head_dim: int, *, batch: int = 1, cores: int = 0, learns: bool = True
) -> Build:
    """What builds the task of an operation on q, k, v (and core tokens), laid out as projections leave them."""

    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        tensors = [
            normal(batch, n, heads, head_dim, device=device, dtype=dtype, seed=i).transpose(1, 2)
            for i, n in enumerate([length] * 3 + [cores] * (2 if cores else 0))
        ]
        return operation_task(function, wrap, *tensors, learns=learns)

    return build


class Given(nn.Module):
    """In the place of a projection: numbers that are there already, whatever the tokens are. A mechanism without projections."""

    def __init__(self, *shape: int, device: str, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.value = nn.Parameter(normal(*shape, device=device, dtype=dtype, seed=seed))

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _bare(name: str, dim: int, heads: int, *, batch: int, length: int, options: Mapping[str, Any]) -> Build:
    """A mechanism without its projections: queries, keys and values are given, and the heads' outputs are what comes out."""

    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        module = create_attention(name, dim, heads, device=device, dtype=dtype, **options)
        widths = {p: getattr(module, p).weight.shape[0] for p in ("qkv", "q_proj", "k_proj", "v_proj") if hasattr(module, p)}
        for seed, (part, width) in enumerate(widths.items()):
            setattr(module, part, Given(batch, length, width, device=device, dtype=dtype, seed=seed))
        setattr(module, "proj" if hasattr(module, "proj") else "o_proj", nn.Identity())
        return module_task(module, normal(batch, length, dim, device=device, dtype=dtype, seed=9), wrap)

    return build


def _mixture_of_heads(scale: str) -> Iterator[Case]:
    heads = 16 if scale == "full" else 4
    for causal, head_dim in ((False, 64), (True, 128)):
        for tokens in (4096, 16_384):
            for active, targets in ((heads // 2, (0.6, 0.65)), (3 * heads // 4, (0.85, 0.85))):
                length = _scaled(tokens, scale)
                batch = 1 if scale != "full" or tokens > 4096 else 4
                options: dict[str, Any] = {"shared_heads": heads // 4, "active_heads": active, "is_causal": causal}
                if causal:
                    options["router"] = "query_norm"
                pairs = causal_pairs(length, length) if causal else length**2
                numbers = {"batch": batch, "heads": active, "num_queries": length, "head_dim": head_dim}
                ours = _bare("moh", heads * head_dim, heads, batch=batch, length=length, options=options)
                dense = _sequences(_causal if causal else _full, heads, length, head_dim, batch=batch)
                yield Case(
                    "MoH, causal" if causal else "MoH",
                    f"{active} of {heads} heads of {head_dim}, {token_count(length)}",
                    length,
                    _contenders(ours, dense, shared=f"{heads} heads of {head_dim}, {length}, {causal}"),
                    targets=_by_direction(targets),
                    work=partial(attention_work, **numbers, pairs=pairs, kept=2 * batch * heads * length * head_dim),
                )


def _differential(scale: str) -> Iterator[Case]:
    """A map with values of twice the width costs 1.5 times what a head of softmax attention costs: as many more heads there."""
    unit = 8 if scale == "full" else 2
    for name, causal, head_dim in (("diff", True, 64), ("gda", True, 128), ("diff", False, 64), ("gda", False, 128)):
        noise = unit if name == "diff" else unit // 2
        signal = 2 * unit - noise  # as many maps in all
        for tokens in (4096, 16_384):
            length = _scaled(tokens, scale)
            batch = 1 if scale != "full" or tokens > 4096 else 4
            options: dict[str, Any] = {"head_dim": head_dim, "is_causal": causal}
            if name == "gda":
                options |= {"num_noise_heads": noise, "num_kv_heads": noise}
            ours = _bare(name, 2 * unit * head_dim, signal, batch=batch, length=length, options=options)
            dense = _sequences(_causal if causal else _full, 3 * unit, length, head_dim, batch=batch)
            pairs = causal_pairs(length, length) if causal else length**2
            numbers = {"batch": batch, "heads": 2 * unit, "num_queries": length, "head_dim": head_dim, "value_dim": 2 * head_dim}
            yield Case(
                name,
                f"{'causal, ' if causal else ''}{signal} + {noise} heads of {head_dim}, {token_count(length)}",
                length,
                _contenders(ours, dense),
                targets=_by_direction((1.1, 1.1)),
                work=partial(attention_work, **numbers, pairs=pairs, kept=4 * batch * noise * length * head_dim),
            )


def _grouped(scale: str) -> Iterator[Case]:
    layers = ((768, 12, 64, 197), (1024, 16, 64, 197), (1024, 16, 8, 1024), (1024, 16, 2, 4096))  # of ViT-B, then of ViT-L
    for dim, heads, batch, tokens in layers:
        kv_heads, length = 4, {"full": tokens, "small": min(tokens, 256), "quick": 16}[scale]
        shape: dict[str, Any] = {
            "batch": batch if scale == "full" else 1,
            "num_tokens": length,
            "options": {"num_kv_heads": kv_heads},
        }
        ours = mechanism("kdgqa", dim, heads, **shape)
        yield Case(
            "KDGQA",
            f"dim {dim}, {heads} heads on {kv_heads}, {token_count(length)}, batch {shape['batch']}",
            length,
            {
                "ours": Contender(ours),
                "gqa": Contender(mechanism("gqa", dim, heads, **shape), dense_ways()),
                "plain": plain(ours),
                "compiled": compiled(ours),
            },
            baseline="gqa",
            targets=_by_direction((1.05, 1.05)),
            work=partial(mechanism_work, "kdgqa", dim, heads, **shape),
            items=shape["batch"] * length,
        )


def _combiner(scale: str) -> Iterator[Case]:
    heads, head_dim = (12, 64) if scale == "full" else (2, 16)
    for pattern in ("fixed", "logsparse", "axial", "mixture"):
        for tokens in (4096, 16_384, 65_536):
            length = _scaled(tokens, scale)
            ours = _sequences(partial(_combine, pattern), heads, length, head_dim)
            dense = _sequences(_causal, heads, length, head_dim)
            yield Case(
                f"Combiner, {pattern}",
                f"{heads} heads of {head_dim}, {token_count(length)}",
                length,
                _contenders(ours, dense, backend="reference", shared=f"combiner {length}"),  # it joins by log-normalisers
                work=partial(_combiner_work, pattern, heads, length, head_dim),
            )


def _combine(pattern: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    settings: dict[str, Any] = {"real": None, "is_causal": True, "scale": None, "dropout_p": 0.0}
    return combine(q, k, v, **settings, pattern=pattern, row_summary="wsum")  # read by axial only, whose default has parameters


def _combiner_work(pattern: str, heads: int, length: int, head_dim: int) -> dict[str, Work]:
    """By the pairs of a query, on average: direct tokens and summaries of its softmax, then what its share of the summaries takes.

    A pair is two products. Rows (segments) are of about sqrt(N) tokens.
    """
    row = 2 ** (length.bit_length() // 2)
    rows, levels = length / row, length.bit_length() - 1
    pairs = {
        "fixed": (row + rows) / 2 + 1,
        "logsparse": levels / 2 + 1 + levels / 2,  # of the spans of a level every other one ends before some token
        "axial": row / 4 + rows / 2 + 1.5 * row,  # values of the own row; all logits of the row, its values and its keys
        "mixture": 1.5 * (row + rows) + (row + rows / 2),
    }[pattern]
    kept = 2 * heads * length * head_dim
    return attention_work(batch=1, heads=heads, num_queries=length, pairs=length * pairs, head_dim=head_dim, kept=kept)


# ---- shared


def _contenders(ours: Build, dense: Build, *, backend: str = "torch", shared: str = "") -> dict[str, Contender]:
    """`shared`: a name of the dense computation, where several cases have the same."""
    return {
        "ours": Contender(ours),
        "dense": Contender(dense, dense_ways(), shared=shared),
        "plain": plain(ours, backend),
        "compiled": compiled(ours, backend),
    }


def _by_direction(targets: tuple[float, float] | None) -> dict[str, float]:
    return {} if targets is None else dict(zip((FORWARD, TRAIN), targets, strict=True))


def _scaled(tokens: int, scale: str, *, small: int = 16) -> int:
    """A length at this scale; "small" divides it by so much."""
    return {"full": tokens, "small": tokens // small, "quick": max(16, tokens // 256)}[scale]
