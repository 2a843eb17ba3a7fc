"""What the kernels of core-context attention share: which tokens a query sees, and the softmax along them."""

from __future__ import annotations

import triton
import triton.language as tl

from attention_zoo.ops.triton._common import absorb

__all__ = ["place_of", "released", "walk"]


@triton.jit
def place_of(start, Starts, b):
    """Position of a sample's first query or key: `start`, and where samples differ what `Starts` adds to it; None: nothing."""
    if Starts is not None:
        start += tl.load(Starts + b).to(tl.int32)
    return start


@triton.jit
def released(position, WINDOW, GROUP):
    """Core tokens that the query at `position` sees."""
    return tl.maximum(position + 1 - WINDOW, 0) // GROUP


@triton.jit
def walk(
    q, K, V, first, stop, places, offset, oldest, skn, svn, LENGTH, D, DV, highest, total, acc, scale,
    CORE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over the keys numbered `first` to `stop`, which stand at `offset` and behind.

    Exact keys (not CORE): a query sees those from `oldest` to its own place. Core keys: those below `oldest`.
    """
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        n = start + tl.arange(0, BN)
        there = (n >= 0) & (n < LENGTH)
        k = tl.load(K + n[None, :] * skn + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        x = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            if CORE:
                seen = there[None, :] & (n[None, :] < oldest[:, None])
            else:
                at = n + offset
                seen = (there & (at >= 0))[None, :] & (at[None, :] >= oldest[:, None]) & (at[None, :] <= places[:, None])
            x = tl.where(seen, x, float("-inf"))
        p, fade, highest, total = absorb(x, highest, total)
        v = tl.load(V + n[:, None] * svn + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return highest, total, acc
