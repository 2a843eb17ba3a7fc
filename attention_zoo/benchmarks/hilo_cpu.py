"""HiLo's claim for the CPU: one layer against spatial-reduction attention and local windows, in the setting of its paper.

14 x 14 tokens of 768 channels, 12 heads, batch 64, float32, forward. HiLo: windows of 2 x 2, nine heads of ten Lo-Fi. Spatial
reduction (PVT, timm's module): keys and values from a convolution of kernel and stride 2 with LayerNorm. Local windows: 7 x 7,
without relative positions. All of them attend through torch's SDPA but for what HiLo does otherwise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.pvt_v2 import Attention as SpatialReduction
from torch import Tensor, nn

from attention_zoo.attention.window import from_windows, to_windows
from attention_zoo.registry import create_attention

__all__ = ["TARGETS", "measure_hilo_on_cpu", "render_hilo_on_cpu"]

TARGETS = {"spatial reduction": 1.4, "local windows": 1.6}  # how many times faster HiLo is to be
_MULTIPLY_ADDS = {"dense": 521.43, "spatial reduction": 419.56, "local windows": 477.17, "hilo": 298.30}  # millions an image


class _LocalWindows(nn.Module):
    """Softmax attention inside windows."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window, self.attention = window, Attention(dim, num_heads, qkv_bias=True)

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return from_windows(self.attention(to_windows(x, grid_size, self.window, 0)), grid_size, self.window, 0)


def measure_hilo_on_cpu(
    *, threads: int | None = None, dim: int = 768, num_heads: int = 12, side: int = 14, batch: int = 64, rounds: int = 7
) -> dict[str, Any]:
    """Median times of the four layers, measured in turns, so that what else the machine does meets all alike.

    Args:
        threads: of torch while measuring; None: as it is.
        dim, num_heads, side, batch: of the setting; the paper's by default.
        rounds: times that each layer is timed, after one round to warm up.

    Returns: `setting`, `threads`, and `layers`: for each name `ms`, `images_per_second`, `faster`: how many times as fast HiLo is
        (the median over the rounds), and `target` where there is one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        times = _times(_layers(dim, num_heads), torch.randn(batch, side * side, dim), (side, side), rounds)
    finally:
        torch.set_num_threads(before)
    layers: dict[str, dict[str, float]] = {}
    for name, taken in times.items():
        ms = statistics.median(taken)
        ratio = statistics.median(theirs / ours for theirs, ours in zip(taken, times["hilo"], strict=True))
        layers[name] = {"ms": round(ms, 3), "images_per_second": round(1e3 * batch / ms, 1), "faster": round(ratio, 3)}
        if name in TARGETS:
            layers[name]["target"] = TARGETS[name]
    setting = {"dim": dim, "num_heads": num_heads, "grid": [side, side], "batch": batch, "dtype": "float32"}
    return {"setting": setting, "threads": before if threads is None else threads, "layers": layers}


def _layers(dim: int, num_heads: int) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
    """The layers, and how each is called with tokens and their grid."""
    dense = create_attention("mha", dim, num_heads, qkv_bias=True)
    reduction = SpatialReduction(dim, num_heads, sr_ratio=2)
    windows = _LocalWindows(dim, num_heads, 7)
    hilo = create_attention("hilo", dim, num_heads, window_size=2, alpha=0.9, qkv_bias=True)
    return {
        "dense": (dense, lambda x, grid: dense(x)),
        "spatial reduction": (reduction, lambda x, grid: reduction(x, list(grid))),
        "local windows": (windows, windows),
        "hilo": (hilo, lambda x, grid: hilo(x, grid_size=grid)),
    }


def _times(
    layers: Mapping[str, tuple[nn.Module, Callable[..., Any]]], x: Tensor, grid: tuple[int, int], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each layer in each round."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for n in range(rounds + 1):
            for name, (module, call) in layers.items():
                module.eval()
                start = time.perf_counter()
                call(x, grid)
                if n:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def render_hilo_on_cpu(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each layer."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    lines = [
        f"| layer, {threads} | million multiply-adds | ms | images/s | HiLo is faster by | target |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["layers"].items():
        target = row.get("target")
        met = "" if target is None else f"{target:g} {'met' if row['faster'] >= target else 'missed'}"
        cells = (name, f"{_MULTIPLY_ADDS[name]:.0f}", f"{row['ms']:.1f}", f"{row['images_per_second']:.1f}", f"{row['faster']:.2f}")
        lines.append("| " + " | ".join((*cells, met)) + " |")
    return "\n".join(lines)
