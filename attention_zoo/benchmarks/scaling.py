"""How two mechanisms grow: key-driven against plain grouped-query attention, and Combiner's exponent over the number of tokens.

Plain dictionaries come back. On CUDA times are those of graphs, replayed with a cold cache, and of calls from Python beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.attention.combiner import combine
from attention_zoo.benchmarks.report import exponent
from attention_zoo.benchmarks.timing import Clock, peak_mib, time_call
from attention_zoo.registry import create_attention

__all__ = [
    "KDGQA_SETTINGS",
    "GroupedSetting",
    "fit_exponent",
    "measure_combiner",
    "measure_kdgqa",
    "summarise_exponents",
    "theory_of_combiner",
]

_CLOCK = Clock(0.03, 3, 20)


class GroupedSetting(NamedTuple):
    """A layer of grouped-query attention and what it is given."""

    name: str
    batch: int
    num_tokens: int
    dim: int
    num_heads: int
    num_kv_heads: int


KDGQA_SETTINGS = (
    GroupedSetting("ViT-B, 224 x 224", 64, 197, 768, 12, 4),
    GroupedSetting("ViT-L, 224 x 224", 64, 197, 1024, 16, 4),
    GroupedSetting("ViT-L, 1024 tokens", 8, 1024, 1024, 16, 4),
    GroupedSetting("ViT-L, 4096 tokens", 2, 4096, 1024, 16, 4),
)


def measure_kdgqa(
    settings: Iterable[GroupedSetting] = KDGQA_SETTINGS,
    *,
    device: str = "cuda",
    mechanisms: Sequence[str] = ("gqa", "kdgqa", "dgqa"),
    clock: Clock = _CLOCK,
) -> list[dict[str, Any]]:
    """Modules with their projections; bfloat16 on CUDA, else float32.

    Returns: for each setting its fields; `ms`: mechanism -> "forward" and "training" (forward and backward) -> what `time_call`
    measures; `ratio`: mechanism -> the same as multiples of the first mechanism's.
    """
    rows = []
    for setting in settings:
        x = _tokens(setting.batch, setting.num_tokens, setting.dim, device)
        ms = {}
        for name in mechanisms:
            sizes = {"num_heads": setting.num_heads, "num_kv_heads": setting.num_kv_heads}
            module = create_attention(name, setting.dim, **sizes, device=device, dtype=x.dtype)
            ms[name] = _time_module(module, x, clock)
        first = ms[mechanisms[0]]
        ratio = {
            name: {
                what: {kind: round(time / first[what][kind], 4) for kind, time in times.items() if kind in first[what]}
                for what, times in found.items()
            }
            for name, found in ms.items()
        }
        rows.append({**setting._asdict(), "ms": ms, "ratio": ratio})
    return rows


def measure_combiner(
    patterns: Sequence[str] = ("fixed", "axial", "logsparse", "mixture"),
    lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768, 65536),
    *,
    device: str = "cuda",
    batch: int = 1,
    num_heads: int = 12,
    head_dim: int = 64,
    is_causal: bool = True,
    window_size: int | None = None,
    saturated: int = 3,
    training: bool = True,
    clock: Clock = _CLOCK,
) -> dict[str, dict[str, Any]]:
    """Combiner's patterns and dense attention ("dense") over the number of tokens; segments of about sqrt(N), or `window_size`.

    Returns: for each pattern, `module` and `operator` (the same from q, k and v, without projections): "forward" and "training"
    -> N -> milliseconds; `peak_mib`: N -> memory of the module's training step beyond weights and tokens; `exponent`: of the same
    names, fitted over the last `saturated` lengths, where the device has enough to do; `theory`: the exponent of what the pattern
    should cost, fitted over these lengths too.
    """
    dim = num_heads * head_dim
    found: dict[str, dict[str, Any]] = {}
    for pattern in (*patterns, "dense"):
        row: dict[str, Any] = {"module": {}, "operator": {}, "peak_mib": {}}
        for length in lengths:
            x = _tokens(batch, length, dim, device)
            q, k, v = (
                _tokens(batch, length, dim, device).detach().unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for _ in "qkv"
            )
            module, operator = _of_pattern(pattern, dim, num_heads, is_causal, window_size, x)
            times = {
                "module": _time_module(module, x, clock, training),
                "operator": _time_operator(operator, (q, k, v), clock, training),
            }
            for part, measured in times.items():
                for what, ms in measured.items():
                    row[part].setdefault(what, {})[length] = ms.get("graph", ms["eager"])
            if training:
                row["peak_mib"][length] = peak_mib(lambda: module(x).sum().backward())  # noqa: B023
        last = list(lengths)[-saturated:]
        row["exponent"] = {
            part: {what: round(fit_exponent(last, [times[n] for n in last]), 3) for what, times in row[part].items()}
            for part in ("module", "operator")
        }
        row["theory"] = round(fit_exponent(last, [theory_of_combiner(pattern, n, window_size) for n in last]), 3)
        found[pattern] = row
    return found


def theory_of_combiner(pattern: str, length: int, window_size: int | None = None) -> float:
    """Pairs of a query and a key or summary that a pattern counts, up to a factor: N (L + N / L), or N log N; "dense": N^2."""
    if pattern == "dense":
        return float(length) ** 2
    if pattern == "logsparse":
        return length * math.log2(max(length, 2))
    window = math.sqrt(length) if window_size is None else window_size
    return length * (window + length / window)


def fit_exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log(time) over log(size), by least squares; nan for less than two sizes."""
    return exponent(sizes, times) if len(sizes) > 1 else math.nan


def _tokens(batch: int, length: int, dim: int, device: str) -> Tensor:
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return torch.randn(batch, length, dim, device=device, dtype=dtype, requires_grad=True)


def _of_pattern(
    pattern: str, dim: int, num_heads: int, is_causal: bool, window_size: int | None, x: Tensor
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A module, and the same as a function of q, k and v."""
    factory = {"device": x.device, "dtype": x.dtype}
    module: Any
    if pattern == "dense":
        module = create_attention("mha", dim, num_heads, is_causal=is_causal, **factory)
        return module, lambda q, k, v: ops.attention(q, k, v, is_causal=is_causal)  # type: ignore[return-value]
    options: dict[str, Any] = {"pattern": pattern, "window_size": window_size, "row_summary": "wsum"}
    module = create_attention("combiner", dim, num_heads, is_causal=is_causal, **options, **factory)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return combine(q, k, v, real=None, is_causal=is_causal, scale=None, dropout_p=0.0, **options)

    return module, operator


def _time_module(module: nn.Module, x: Tensor, clock: Clock, training: bool = True) -> dict[str, dict[str, float]]:
    return _time(module, (x,), clock, training)


def _time_operator(
    operator: Callable[..., Tensor], tensors: Sequence[Tensor], clock: Clock, training: bool
) -> dict[str, dict[str, float]]:
    return _time(operator, [t.detach().requires_grad_() for t in tensors], clock, training)


def _time(run: Callable[..., Tensor], tensors: Sequence[Tensor], clock: Clock, training: bool) -> dict[str, dict[str, float]]:
    def forward() -> None:
        with torch.no_grad():
            run(*tensors)

    found = {"forward": time_call(forward, clock)}
    if training:
        gradient = torch.randn_like(run(*tensors))
        found["training"] = time_call(lambda: run(*tensors).backward(gradient), clock)
    return found


def summarise_exponents(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each pattern: exponents of forward and training, as measured and as they should be."""
    lines = []
    for pattern, row in found.items():
        exponents = "; ".join(
            f"{part} {', '.join(f'{what} {e}' for what, e in row['exponent'][part].items())}" for part in ("module", "operator")
        )
        lines.append(f"{pattern}: {exponents}; theory {row['theory']}")
    return lines
