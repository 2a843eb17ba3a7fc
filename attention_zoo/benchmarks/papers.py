"""The suite `papers`: mechanisms as modules, in settings of their papers, against dense attention of the same shape.

Dense is `mha`: fused projection, the fastest dense engine that is installed, output projection. Times are medians of CUDA events,
once as called from Python and once replayed from a CUDA graph, which leaves Python's time out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.ops.core_context import core_context_attention, pool_core_tokens
from attention_zoo.registry import create_attention

__all__ = ["CONTEXTS", "SETTINGS", "Setting", "measure_context", "measure_setting", "render_table"]


@dataclass(frozen=True)
class Setting:
    """A mechanism of a shape. `targets`: forward, forward and backward, as shares of dense's time."""

    name: str
    mechanism: str
    dim: int
    num_heads: int
    batch: int
    grid: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    targets: tuple[float, float] | None = None
    has_kernel: bool = False  # then the plain code is measured too


def _bra(dim: int, grid: tuple[int, int], topk: int, targets: tuple[float, float]) -> Setting:
    name = f"BRA {dim}, {grid[0]}x{grid[1]}, top {topk}"
    return Setting(name, "bra", dim, dim // 32, 2, grid, {"n_win": 16, "topk": topk}, targets, True)


def _halo(dim: int, side: int, targets: tuple[float, float]) -> Setting:
    options = {"block_size": 8, "halo_size": 3}
    return Setting(f"halo {dim}, {side}x{side}", "halo", dim, 8, 8, (side, side), options, targets, True)


def _hilo(dim: int, side: int, batch: int, targets: tuple[float, float]) -> Setting:
    options = {"alpha": 0.9, "window_size": 2}
    return Setting(f"HiLo {dim}, {side}x{side}", "hilo", dim, 12, batch, (side, side), options, targets)


def _agent(dim: int, side: int, batch: int, targets: tuple[float, float]) -> Setting:
    options = {"agent_num": 49, "window_size": (side, side)}
    return Setting(f"agent {dim}, {side}x{side}", "agent", dim, dim // 32, batch, (side, side), options, targets)


SETTINGS = (
    _bra(64, (208, 336), 1, (0.06, 0.08)),
    _bra(128, (112, 176), 4, (0.3, 0.35)),
    _bra(256, (64, 96), 16, (0.9, 1.0)),
    _halo(512, 64, (0.6, 0.7)),
    _halo(256, 128, (0.15, 0.2)),
    _hilo(768, 14, 64, (1.0, 1.0)),
    _hilo(384, 28, 32, (0.9, 0.9)),
    _hilo(384, 56, 16, (0.6, 0.6)),
    _hilo(384, 112, 4, (0.4, 0.4)),
    _agent(192, 56, 16, (0.9, 0.9)),
    _agent(384, 128, 1, (0.35, 0.4)),
)
CONTEXTS = {32_768: 1 / 3.5, 65_536: 1 / 5.7, 131_072: 1 / 7.9}  # tokens of a Llama-2-7B layer -> target, as a share of dense


def measure_setting(setting: Setting, *, device: str, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Times and memory of "dense", "ours" and, where there is a kernel, "plain": the mechanism without it.

    Returns: for each, `eager` and on CUDA `graph`: milliseconds of [forward, forward and backward], and `peak_mib`: memory that a
    training step takes beyond weights and input.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    height, width = (8, 8) if quick else setting.grid
    options = dict(setting.options) | ({"n_win": 2, "topk": 1} if quick and setting.mechanism == "bra" else {})
    if quick and setting.mechanism == "agent":
        options |= {"window_size": (8, 8), "agent_num": 4}
    batch = 1 if quick else setting.batch
    x = torch.randn(batch, height * width, setting.dim, device=device, dtype=dtype, requires_grad=True)
    found: dict[str, dict[str, Any]] = {}
    dense = create_attention("mha", setting.dim, setting.num_heads, device=device, dtype=dtype)
    ours = create_attention(setting.mechanism, setting.dim, setting.num_heads, device=device, dtype=dtype, **options)
    grid = {"grid_size": (height, width)}
    cases: list[tuple[str, nn.Module, dict[str, Any], str]] = [("dense", dense, {}, "auto"), ("ours", ours, grid, "auto")]
    if setting.has_kernel and device == "cuda":
        cases.append(("plain", ours, grid, "torch"))
    for name, module, kwargs, backend in cases:
        with ops.use_backend(backend) if backend != "auto" else nullcontext():
            found[name] = _measure(module, x, kwargs, repeat=1 if quick else 9)
    return found


def measure_context(num_tokens: int, *, device: str, heads: int = 32, head_dim: int = 128) -> dict[str, float]:
    """Milliseconds of the operators' forward: causal dense attention, core-context attention, and pooling its core tokens."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(length: int) -> Tensor:
        return torch.randn(1, length, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = normal(num_tokens), normal(num_tokens), normal(num_tokens)
    core_k, core_v = normal(num_tokens // 16), normal(num_tokens // 16)
    lasts = q[:, :, 15::16]
    return {
        "dense": _median(lambda: ops.attention(q, k, v, is_causal=True), 5),
        "core_context": _median(lambda: core_context_attention(q, k, v, core_k, core_v, window_size=1024, group_size=16), 5),
        "pool": _median(lambda: pool_core_tokens(lasts, k, v, group_size=16), 5),
    }


def _measure(module: nn.Module, x: Tensor, kwargs: dict[str, Any], repeat: int) -> dict[str, Any]:
    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            module(x, **kwargs)

    def train() -> None:
        module(x, **kwargs).backward(gradient)

    row: dict[str, Any] = {"eager": [_median(forward, repeat), _median(train, repeat)]}
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        torch.cuda.synchronize()
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        row["graph"] = [_median(_captured(run), repeat) for run in (forward, train)]
    return row


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _median(run: Callable[[], Any], repeat: int) -> float:
    """Milliseconds, each run on its own, after three to warm up."""
    for _ in range(min(repeat, 3)):
        run()
    return round(statistics.median(_times(run, repeat)), 4)


def _times(run: Callable[[], Any], repeat: int) -> Iterator[float]:
    for _ in range(repeat):
        if not torch.cuda.is_available():
            start = time.perf_counter()
            run()
            yield 1e3 * (time.perf_counter() - start)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        yield begin.elapsed_time(end)


def render_table(rows: Mapping[str, Mapping[str, Any]], contexts: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: each setting's times as shares of dense's, with the targets; then the operators over long contexts."""
    lines = [
        "| module | dense, ms | ours, ms | of dense | target | plain code, ms | from Python: dense, ours | memory of dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    targets = {setting.name: setting.targets for setting in SETTINGS}
    for name, row in rows.items():
        dense, ours = row["dense"], row["ours"]
        kind = "graph" if "graph" in dense else "eager"
        shares = [mine / theirs for mine, theirs in zip(ours[kind], dense[kind], strict=True)]
        target = targets.get(name)
        met = "" if target is None else " \\| ".join(
            f"{t:g} {'met' if share <= t else 'missed'}" for t, share in zip(target, shares, strict=True)
        )  # fmt: skip
        plain = _pair(row["plain"][kind]) if "plain" in row else ""
        memory = f"{ours['peak_mib'] / dense['peak_mib']:.2f}" if "peak_mib" in ours else ""
        cells = (name, _pair(dense[kind]), _pair(ours[kind]), _pair(shares), met, plain)
        lines.append("| " + " | ".join((*cells, f"{_pair(dense['eager'])}, {_pair(ours['eager'])}", memory)) + " |")
    if contexts:
        lines += [
            "",
            "| tokens | dense, ms | core-context attention, ms | dense / ours | target | pooling, ms | with pooling |",
            "|---|---|---|---|---|---|---|",
        ]
    for tokens, row in contexts.items():
        speed = row["dense"] / row["core_context"]
        whole = row["dense"] / (row["core_context"] + row["pool"])
        target_speed = 1 / CONTEXTS[int(tokens)]
        lines.append(
            f"| {int(tokens):,} | {row['dense']:.1f} | {row['core_context']:.2f} | {speed:.1f} | {target_speed:.1f} "
            f"{'met' if speed >= target_speed else 'missed'} | {row['pool']:.2f} | {whole:.1f} |"
        )
    return "\n".join(lines)


def _pair(values: Any) -> str:
    return " \\| ".join(f"{value:.2f}" for value in values)
