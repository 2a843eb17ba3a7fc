"""Suite `engines`: every installed engine on plain attention, the automatic choice against the best of them, and its host time.

"ours" is `ops.attention` as it chooses by itself; the baseline is the fastest engine, or the library called directly, measured in
turns with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention_zoo import ops
from attention_zoo.benchmarks.cases import Build, Case, Contender, Task, Wrap, freshly_compiled, operation_task
from attention_zoo.benchmarks.roofline import FORWARD, attention_work, causal_pairs
from attention_zoo.benchmarks.timing import host_microseconds
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.dispatch import select
from attention_zoo.ops.engines import ENGINES, describe

__all__ = ["WORKLOADS", "Workload", "cases", "explanations", "host_times"]

_MOST_REFERENCE_BYTES = 2**31  # of the reference's map in float32: beyond, it is minutes and tens of gigabytes, and no news


@dataclass(frozen=True)
class Workload:
    """One call to time. Sizes as in `attention`; `packed` splits the length into that many sequences."""

    name: str
    batch: int = 4
    heads: int = 16
    kv_heads: int = 16
    num_queries: int = 4096
    num_keys: int = 4096
    head_dim: int = 128
    is_causal: bool = False
    window_size: int | None = None
    packed: int = 0
    backward: bool = True

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            shape = (self.batch, length, heads, self.head_dim)  # as a projection leaves them: heads after tokens
            return torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2)

        return normal(self.heads, self.num_queries), normal(self.kv_heads, self.num_keys), normal(self.kv_heads, self.num_keys)

    def settings(self, device: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"is_causal": self.is_causal, "window_size": self.window_size}
        if self.packed:
            step = self.num_queries // self.packed
            offsets = torch.arange(0, self.num_queries + 1, step, device=device, dtype=torch.int32)
            settings.update(cu_seqlens=offsets, max_seqlen=step)
        return settings

    def pairs(self) -> float:
        """Pairs of a query and a key that may meet, of a head of a sample."""
        sequences = max(self.packed, 1)
        queries, keys = self.num_queries // sequences, self.num_keys // sequences
        if self.window_size is not None:
            return float(sequences * queries * min(keys, self.window_size * (1 if self.is_causal else 2) + 1))
        return sequences * (causal_pairs(queries, keys) if self.is_causal else float(queries * keys))


WORKLOADS = (
    Workload("self, D 64", batch=16, head_dim=64, heads=32, kv_heads=32, num_queries=1024, num_keys=1024),
    Workload("self, D 64", head_dim=64, heads=32, kv_heads=32),
    Workload("self, D 128", batch=16, num_queries=1024, num_keys=1024),
    Workload("self, D 128", batch=8, num_queries=2048, num_keys=2048),
    Workload("self, D 128"),
    Workload("self, D 128", batch=1, num_queries=16_384, num_keys=16_384),
    Workload("causal, D 64", batch=16, head_dim=64, heads=32, kv_heads=32, num_queries=1024, num_keys=1024, is_causal=True),
    Workload("causal, D 64", head_dim=64, heads=32, kv_heads=32, is_causal=True),
    Workload("causal, D 128", batch=16, num_queries=1024, num_keys=1024, is_causal=True),
    Workload("causal, D 128", batch=8, num_queries=2048, num_keys=2048, is_causal=True),
    Workload("causal, D 128", is_causal=True),
    Workload("causal, D 128", batch=1, num_queries=16_384, num_keys=16_384, is_causal=True),
    Workload("window 512 causal, D 128", is_causal=True, window_size=512),
    Workload("GQA 16:4 causal, D 128", kv_heads=4, is_causal=True),
    Workload("packed 16 x 1024 causal, D 128", batch=1, num_queries=16384, num_keys=16384, packed=16, is_causal=True),
    Workload("ViT, D 64", batch=64, heads=12, kv_heads=12, num_queries=197, num_keys=197, head_dim=64),
    Workload("windows of 49, D 32", batch=2048, heads=4, kv_heads=4, num_queries=49, num_keys=49, head_dim=32),
    Workload("decode, GQA 32:8, D 128", batch=16, heads=32, kv_heads=8, num_queries=1, is_causal=True, backward=False),
    Workload("decode, GQA 32:8, D 128", 1, 32, 8, 1, 131_072, is_causal=True, backward=False),
    Workload("4 queries, GQA 32:8, D 128", 8, 32, 8, 4, 16_384, is_causal=True, backward=False),
)
SMALL = (
    *(Workload("self, D 64", 1, 4, 4, n, n, 64) for n in (256, 512, 1024)),
    *(Workload("causal, D 64", 1, 4, 4, n, n, 64, is_causal=True) for n in (256, 512, 1024)),
    Workload("GQA packed", 1, 4, 2, 512, 512, 32, packed=4),
    Workload("decode", 2, 4, 2, 1, 1024, 32, is_causal=True, backward=False),
)
QUICK = (
    Workload("self, D 64", 1, 2, 2, 128, 128, 64),
    Workload("causal, D 64", 1, 2, 2, 128, 128, 64, is_causal=True),
    Workload("GQA packed", 1, 4, 2, 128, 128, 32, packed=4),
    Workload("decode", 2, 4, 2, 1, 128, 32, is_causal=True, backward=False),
)
SCALES = {"full": WORKLOADS, "small": SMALL, "quick": QUICK}


def cases(scale: str, device: str, dtype: torch.dtype) -> list[Case]:
    """Of each workload the automatic choice, each engine of this machine that serves it, and the chosen library itself."""
    return [_case(workload, device, dtype) for workload in SCALES[scale]]


def _case(workload: Workload, device: str, dtype: torch.dtype) -> Case:
    explanation = _explain(workload, device, dtype)
    size = max(workload.num_queries, workload.num_keys)
    contenders = {"ours": Contender(_attention(workload, "auto"))}
    for report in explanation:
        map_bytes = 4.0 * workload.batch * workload.heads * workload.num_queries * workload.num_keys
        if not report.serves or (report.name == "reference" and map_bytes > _MOST_REFERENCE_BYTES):
            continue
        build = _attention(workload, report.name)
        contenders[report.name] = Contender(build)
        if report.name == "reference":
            contenders["compiled"] = Contender(build, wrap=freshly_compiled, optional=True)
    raw = raw_call(explanation.chosen or "", workload, workload.settings(device))
    if raw is not None:
        contenders["library"] = Contender(_task(workload, raw))
    numbers = {"batch": workload.batch, "heads": workload.heads, "num_queries": workload.num_queries, "head_dim": workload.head_dim}
    kept = 2 * workload.batch * workload.kv_heads * workload.num_keys * workload.head_dim
    work = attention_work(**numbers, pairs=workload.pairs(), kept=kept, element_size=dtype.itemsize)
    return Case(
        workload.name,
        f"{workload.num_queries} queries, {workload.num_keys} keys, batch {workload.batch}, {workload.heads} heads",
        size,
        contenders,
        baseline="",  # the fastest of the others, for each direction
        targets=dict.fromkeys(work, 1.02) if device == "cuda" else {},
        work=lambda: work if workload.backward else {FORWARD: work[FORWARD]},
        facts={"chosen": explanation.chosen},
        closely=True,
    )


def _explain(workload: Workload, device: str, dtype: torch.dtype) -> Any:
    shapes = [(workload.heads, workload.num_queries), *[(workload.kv_heads, workload.num_keys)] * 2]
    q, k, v = (torch.empty(1, device=device, dtype=dtype).expand(workload.batch, h, n, workload.head_dim) for h, n in shapes)
    leaves = (t.detach().requires_grad_(workload.backward) for t in (q, k, v))
    return ops.explain(*leaves, **workload.settings(device))


def explanations(scale: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """What each engine says to each workload."""
    return {w.name: str(_explain(w, device, dtype)) for w in SCALES[scale]}


def _attention(workload: Workload, backend: str) -> Build:
    return _task(workload, None, backend)


def _task(workload: Workload, function: Callable[..., Any] | None, backend: str = "auto") -> Build:
    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        call: Callable[..., Any] = function or partial(ops.attention, backend=backend, **workload.settings(device))
        return operation_task(call, wrap, *workload.tensors(device, dtype), learns=workload.backward)

    return build


def raw_call(engine: str, workload: Workload, settings: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The library's own function, as its documentation says to call it; None where there is none. In place of our own: torch's."""
    if engine == "flash4":
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        window = (workload.window_size, 0) if workload.window_size is not None else (None, None)
        shared = {"causal": workload.is_causal, "window_size": window}
        if workload.packed:
            lengths = {"cu_seqlens_q": settings["cu_seqlens"], "cu_seqlens_k": settings["cu_seqlens"]}
            lengths |= {"max_seqlen_q": settings["max_seqlen"], "max_seqlen_k": settings["max_seqlen"]}
            return lambda q, k, v: flash_attn_varlen_func(*(t[0].transpose(0, 1) for t in (q, k, v)), **lengths, **shared)[
                0
            ].transpose(0, 1)[None]
        return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **shared)[0].transpose(1, 2)
    causal = workload.is_causal and workload.num_queries > 1
    in_line = not causal or workload.num_queries == workload.num_keys  # torch's causality begins at the first key
    if engine in ("torch", "triton") and not workload.packed and workload.window_size is None and in_line:
        gqa = workload.heads != workload.kv_heads
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    return None


def host_times(device: str, dtype: torch.dtype, calls: int) -> list[dict[str, Any]]:
    """Microseconds of Python of tiny calls, for which the device is never what is waited for."""
    tiny = {"plain": Workload("tiny", 1, 4, 4, 64, 64, 64), "causal": Workload("tiny", 1, 4, 4, 64, 64, 64, is_causal=True)}
    return [{"call": name, **_host_row(workload, device, dtype, calls)} for name, workload in tiny.items()]


def _host_row(workload: Workload, device: str, dtype: torch.dtype, calls: int) -> dict[str, Any]:
    """Of `attention`, of the chosen engine alone, of the choice alone, and of the library's own function."""
    (q, k, v), settings = workload.tensors(device, dtype), workload.settings(device)
    chosen = ops.explain(q, k, v, **settings).chosen or "reference"
    engine, problem, raw = ENGINES[chosen], make_problem(q, k, v, **settings), raw_call(chosen, workload, settings)

    def choose() -> None:
        select(describe(q, k, v, make_problem(q, k, v, **settings)), "auto")

    row: dict[str, Any] = {
        "engine": chosen,
        "auto_us": host_microseconds(lambda: ops.attention(q, k, v, **settings), calls),
        "engine_us": host_microseconds(lambda: engine.run(q, k, v, problem), calls),
        "choice_us": host_microseconds(choose, calls),
    }
    if raw is not None:
        row["raw_us"] = host_microseconds(lambda: raw(q, k, v), calls)
    return row
