"""What a computation costs at least: its arithmetic, the bytes it must move, and the time a device needs for the larger of both.

Counted is what the mathematics asks for: two operations for each multiply-add, pairs of tokens that causality or routing leaves out
not at all, every input read once and every output written once. No implementation is faster; most cannot come near, because parts
that follow each other write what lies between them to memory, and a softmax is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from attention_zoo.attention.base import AttentionModule
from attention_zoo.attention.flops import forward_flops
from attention_zoo.benchmarks.timing import Clock, median_ms
from attention_zoo.registry import create_attention

__all__ = ["Peaks", "Work", "attention_work", "causal_pairs", "core_context_pairs", "device_peaks", "least_flops", "mechanism_work"]

FORWARD, TRAIN = "forward", "forward+backward"


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one call, at least."""

    flops: float
    bytes: float

    def bound_ms(self, peaks: Peaks) -> float:
        """Milliseconds that the device needs at least."""
        return 1e3 * max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Peaks:
    """What a device does in a second at best: operations of a large matrix product, bytes (read and written) of a large copy."""

    flops: float
    bandwidth: float
    source: str = "measured in this run"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


KNOWN = {"NVIDIA H200": Peaks(790e12, 4.3e12, "measured before: bf16 product of 8192 x 8192, copy of 4 GiB")}


def device_peaks(device: str, dtype: torch.dtype, *, quick: bool = False) -> Peaks:
    """Of an H200 in bf16 those that are known; of any other device a matrix product and a copy are timed."""
    if device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_name() in KNOWN:
        return KNOWN[torch.cuda.get_device_name()]
    side, numbers = (8192, 2**28) if device == "cuda" else (256, 2**18) if quick else (1024, 2**24)
    clock = Clock(0.01 if quick else 0.2, most=20)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(numbers, device=device, dtype=dtype).fill_(1.0) for _ in range(2))
    product, copied = median_ms(lambda: a @ b, clock), median_ms(lambda: target.copy_(source), clock)
    return Peaks(2e3 * side**3 / product, 2e3 * numbers * source.element_size() / copied)


def causal_pairs(num_queries: int, num_keys: int) -> float:
    """Pairs of a query and a key that is not after it; the last query stands at the last key."""
    return num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) / 2


def core_context_pairs(num_tokens: int, *, window_size: int, group_size: int) -> float:
    """Pairs that core-context attention of a whole sequence looks at: core tokens, and the tokens of the window."""
    positions = torch.arange(num_tokens, dtype=torch.float64)
    core = ((positions + 1 - window_size) / group_size).floor().clamp(min=0)
    return float((core + positions + 1 - core * group_size).sum())


def attention_work(
    *,
    batch: int,
    heads: int,
    num_queries: int,
    pairs: float,
    head_dim: int,
    kept: float,
    element_size: int = 2,
    value_dim: int | None = None,
) -> dict[str, Work]:
    """Of an operation on queries, keys and values.

    Args:
        pairs: (query, key) pairs of each head and sample.
        kept: numbers in all keys and values together.
        value_dim: channels of a value; None: `head_dim`.

    Returns: "forward", and "forward+backward", seven products for the forward's two: the logits are formed again.
    """
    value_dim = head_dim if value_dim is None else value_dim
    queries, outputs = (batch * heads * num_queries * d for d in (head_dim, value_dim))
    flops = 2.0 * batch * heads * pairs * (head_dim + value_dim)
    once = element_size * (queries + outputs + kept)
    both = 2.0 * batch * heads * pairs * (4 * head_dim + 3 * value_dim)
    return {FORWARD: Work(flops, once), TRAIN: Work(both, 2.0 * once)}


def mechanism_work(
    mechanism: str,
    dim: int,
    num_heads: int,
    *,
    batch: int,
    num_tokens: int,
    grid_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    element_size: int = 2,
) -> dict[str, Work] | None:
    """Of a mechanism with its projections, by `forward_flops` and what it need not compute; None where that cannot be counted.

    Backward takes two products for each of the forward's. Bytes are those of tokens, weights and their gradients.
    """
    with torch.device("meta"):
        module = create_attention(mechanism, dim, num_heads, **dict(options or {}))
    flops = least_flops(module, num_tokens, grid_size=grid_size)
    if flops is None:
        return None
    tokens, weights = 2.0 * batch * num_tokens * dim, float(sum(p.numel() for p in module.parameters()))
    return {
        FORWARD: Work(batch * flops, element_size * (tokens + weights)),
        TRAIN: Work(3 * batch * flops, element_size * 2 * (tokens + weights)),
    }


def least_flops(module: AttentionModule, num_tokens: int, *, grid_size: tuple[int, int] | None = None) -> float | None:
    """FLOPs of a forward without the pairs of tokens, or of a token and a head, that the mechanism does not need.

    `forward_flops` counts as the plain code computes: all pairs, and all heads. Here a causal mechanism that looks at every pair
    needs half of them, Mixture-of-Head those of its active heads, core-context attention core tokens and windows.
    """
    counted = forward_flops(module, num_tokens, grid_size=grid_size)
    name, settings = module.attention_info.name, cast(Any, module)
    if counted is None or name not in (*_ALL_PAIRS, "cca"):
        return counted
    linear = sum(2.0 * num_tokens * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    if name == "cca":
        pairs = core_context_pairs(num_tokens, window_size=settings.window_size, group_size=settings.group_size)
        return linear + 4.0 * settings.num_heads * settings.head_dim * (pairs + num_tokens)  # and pooling: each token once
    core = counted - linear
    if module.is_causal:
        core *= (num_tokens + 1) / (2 * num_tokens)
    if name == "moh":
        core *= (settings.shared_heads + settings.routed_topk) / settings.num_heads
    return linear + core


_ALL_PAIRS = ("mha", "gqa", "kdgqa", "dgqa", "pgqa", "moh", "diff", "gda")
