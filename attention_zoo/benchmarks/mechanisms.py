"""Suite `mechanisms`: every registered mechanism as a module of one width, over growing sequences and maps, against `mha`.

Spatial mechanisms see square maps of as many tokens. Mechanisms that can be causal are measured both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from attention_zoo.benchmarks.cases import Case, Contender, compiled, dense_ways, mechanism, plain
from attention_zoo.benchmarks.roofline import mechanism_work
from attention_zoo.registry import AttentionInfo, attention_class, attention_info, list_attentions

__all__ = ["cases"]

DIM, HEADS, BATCH = 768, 12, 4
SIDES = {"full": (32, 64, 128), "small": (8, 16, 32), "quick": (4, 8)}  # tokens are their squares

# Where the defaults do not fit, or are not what a paper takes for large maps.
OPTIONS: dict[str, dict[str, Any]] = {
    "bra": {"n_win": 8},
    "gqa": {"num_kv_heads": 3},
    "kdgqa": {"num_kv_heads": 3},
    "dgqa": {"num_kv_heads": 3},
    "pgqa": {"num_kv_heads": 3},
    "hilo": {"alpha": 0.9},
    "diff": {"num_heads": 6},
    "gda": {"num_heads": 6},
}
_ON_REFERENCE = ("combiner",)  # needs log-normalisers, which torch's own attention does not return


def cases(scale: str) -> list[Case]:
    """Of each mechanism in each direction, one case for each length."""
    return [case for name in list_attentions() for case in _of(attention_info(name), scale)]


def _of(info: AttentionInfo, scale: str) -> Iterator[Case]:
    if info.name == "mha" or not info.keeps_shape:
        return  # what the others are compared with; what is no attention between tokens
    for causal in (False, True):
        if ("causal_self" if causal else "noncausal_self") not in info.patterns:
            continue
        for side in SIDES[scale]:
            least = max(*info.min_grid_size, *info.grid_multiple) if info.spatial else 1
            if side >= least and not side % max(info.grid_multiple):
                yield _case(info, causal, side, scale)


def _case(info: AttentionInfo, causal: bool, side: int, scale: str) -> Case:
    dim, heads, batch = (DIM, HEADS, BATCH) if scale == "full" else (192, 12, 1)
    tokens, grid = side * side, (side, side) if info.spatial else None
    takes = inspect.signature(attention_class(info.name)).parameters
    options = {**OPTIONS.get(info.name, {}), **(dict(info.causal_options) if causal else {})}
    if "is_causal" in takes:
        options["is_causal"] = causal
    if info.name == "agent":
        options["window_size"] = grid
    own_heads = options.pop("num_heads", heads)
    shape: dict[str, Any] = {"batch": batch, "num_tokens": tokens}
    ours = mechanism(info.name, dim, own_heads, **shape, grid_size=grid, options=options)
    dense = mechanism("mha", dim, heads, **shape, options={"is_causal": causal})
    backend = "reference" if info.name in _ON_REFERENCE else "torch"
    contenders = {
        "ours": Contender(ours),
        "dense": Contender(dense, dense_ways(), shared=f"dense {tokens} {causal}"),
        "compiled": compiled(ours, backend),
    }
    if "triton" in info.engines:  # ours may run on our kernels
        contenders["plain"] = plain(ours, backend, optional=True)
    return Case(
        f"{info.name}, causal" if causal else info.name,
        f"{side}x{side}" if info.spatial else f"{tokens} tokens",
        tokens,
        contenders,
        work=partial(mechanism_work, info.name, dim, own_heads, **shape, grid_size=grid, options=options),
        items=batch * tokens,
    )
