"""FlexAttention: one fused kernel per kind of call, compiled from what the call adds to the logits and which blocks it leaves out.

On a CPU torch evaluates it unfused and without gradients: good for an explicit request, never chosen there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._problem import Problem
from attention_zoo.ops._reference import packed_positions
from attention_zoo.ops.engines.base import GRID_LIMIT, Engine, Signature, is_grouped

__all__ = ["FlexEngine"]

_BLOCK = 128
_MOST_KINDS = 256

_Ends = tuple[Tensor, Tensor]


class FlexEngine(Engine):
    name = group = "flex"
    package = "torch"

    def load(self) -> str | None:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention  # noqa: F401

        return None

    def can_run(self, signature: Signature) -> str | None:
        s = signature
        if s.device.type not in ("cuda", "cpu"):
            return "serves CUDA and CPU tensors only"
        if s.dropout:
            return "has no dropout"
        if s.empty:
            return "empty sizes are left to the reference"
        if s.device.type == "cpu":
            return "has no gradient on a CPU" if s.grad or s.map_grad else "has no log-normaliser on a CPU" if s.lse else None
        if s.dtype == torch.float64:
            return "serves float16, bfloat16 and float32 only"
        if not 16 <= s.head_dim <= 256 or not 16 <= s.value_dim <= 256:
            return "head sizes must be from 16 to 256"
        return None

    def largest_batch(self, num_heads: int) -> int:
        """Its backward kernel has samples and heads in one dimension of the grid."""
        return GRID_LIMIT // num_heads

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        from torch.nn.attention.flex_attention import AuxRequest

        result = _flex(
            q,
            k,
            v,
            score_mod=_score_mod(problem, q.device),
            block_mask=_block_mask(q, problem),
            scale=problem.scale,
            enable_gqa=is_grouped(q, k),
            return_aux=AuxRequest(lse=True) if problem.return_lse else None,
            kernel_options=_kernel_options(q, k),
        )
        return (result[0], result[1].lse) if problem.return_lse else (result, None)


def _flex(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()  # it refuses tensors that could need a gradient even where none is recorded
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **settings)
    if q.device.type == "cpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is unfused here is what was asked for
            return flex_attention(q, k, v, **settings)
    return _compiled(flex_attention)(q, k, v, **settings)


def _kernel_options(q: Tensor, k: Tensor) -> dict[str, Any] | None:
    """Keep torch from its decoding kernel where the queries of a group fill more than a tile of it: it has no choice left then."""
    return {"BACKEND": "TRITON"} if q.is_cuda and q.shape[2] * (q.shape[1] // k.shape[1]) > 64 else None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Each kind of call is a graph of its own: more than torch allows a function by default, after which it would run unfused.
    return torch._dynamo.config.patch(recompile_limit=_MOST_KINDS)(torch.compile(function))


def _score_mod(problem: Problem, device: torch.device) -> Callable[..., Tensor] | None:
    """What happens to a logit between the product and the softmax: softcap, then bias, then mask."""
    bias, mask = problem.bias, problem.attn_mask
    if problem.softcap is None and bias is None and mask is None:
        return None
    softcap = None if problem.softcap is None else torch.full((), problem.softcap, device=device)
    boolean = mask is not None and mask.dtype == torch.bool

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + _entry(bias, b, h, i, j)
        if mask is not None and boolean:
            score = torch.where(_entry(mask, b, h, i, j), score, -torch.inf)
        elif mask is not None:
            score = score + _entry(mask, b, h, i, j)
        return score

    return score_mod


def _entry(table: Tensor, *index: Tensor) -> Tensor:
    """The entry of a broadcastable table; its size-1 dimensions are read at 0, so that its gradient keeps its own size."""
    return table[tuple(at if size > 1 else torch.zeros_like(at) for size, at in zip(table.shape, index, strict=True))]


# Which blocks a call leaves out is found from the ends of each block. torch's own `create_block_mask` forms the map of queries and
# keys for it, or compiles a kernel that runs over all of it.
def _block_mask(q: Tensor, problem: Problem) -> Any:
    left, right = problem.window
    if problem.packed:
        return _packed_block_mask(problem)
    if left is None and right is None:
        return None
    make = _window_block_mask if torch.compiler.is_compiling() else _cached_window_block_mask
    return make(left, right, problem.num_queries, problem.num_keys, q.device)


def _window_block_mask(left: int | None, right: int | None, num_queries: int, num_keys: int, device: torch.device) -> Any:
    offset, bounds = num_keys - num_queries, _bounds(left, right, device)
    offset_there = torch.full((), offset, device=device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _within(j - i - offset_there, *bounds)

    queries, keys = (_block_ends(torch.arange(length, device=device)) for length in (num_queries, num_keys))
    some, full = _blocks_within(left, right, (queries[0] + offset, queries[1] + offset), keys)
    return _listed_blocks(some, full, mask_mod, num_queries, num_keys)


def _packed_block_mask(problem: Problem) -> Any:
    """Blocks that lie in several sequences and share one count as attended in part, even where the window leaves all of it out."""
    assert problem.cu_seqlens_q is not None
    assert problem.cu_seqlens_k is not None
    query_sequence, query_position = packed_positions(problem.cu_seqlens_q, problem.num_queries)
    key_sequence, key_position = packed_positions(problem.cu_seqlens_k, problem.num_keys)
    query_position = query_position + (problem.cu_seqlens_k.diff() - problem.cu_seqlens_q.diff())[query_sequence]
    bounds = _bounds(*problem.window, query_position.device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (query_sequence[i] == key_sequence[j]) & _within(key_position[j] - query_position[i], *bounds)

    (first_q, last_q), (first_k, last_k) = _block_ends(query_sequence), _block_ends(key_sequence)
    share_some = (first_q[:, None] <= last_k) & (first_k <= last_q[:, None])
    share_one = share_some & (first_q == last_q)[:, None] & (first_k == last_k)
    some, full = _blocks_within(*problem.window, _block_ends(query_position), _block_ends(key_position))
    return _listed_blocks(share_some & (some | ~share_one), share_one & full, mask_mod, problem.num_queries, problem.num_keys)


def _blocks_within(left: int | None, right: int | None, queries: _Ends, keys: _Ends) -> tuple[Tensor, Tensor]:
    """Which blocks, of places that follow one another from the first to the last, lie within the window in part, and as a whole."""
    nearest, farthest = keys[0] - queries[1][:, None], keys[1] - queries[0][:, None]  # of keys from queries
    some = full = nearest == nearest
    if left is not None:
        some, full = some & (farthest >= -left), full & (nearest >= -left)
    if right is not None:
        some, full = some & (nearest <= right), full & (farthest <= right)
    return some, full


def _block_ends(places: Tensor) -> _Ends:
    """What the first and the last token of each block have in `places`."""
    return places[::_BLOCK], torch.cat((places[_BLOCK - 1 :: _BLOCK], places[-1:]))[: -(-len(places) // _BLOCK)]


def _listed_blocks(some: Tensor, full: Tensor, mask_mod: Callable[..., Tensor], num_queries: int, num_keys: int) -> Any:
    """torch's form of a mask whose blocks (R, C) are attended in part, and as a whole; the last of R and C may not be filled."""
    from torch.nn.attention.flex_attention import BlockMask

    filled = [torch.arange(_BLOCK, length + _BLOCK, _BLOCK, device=full.device) <= length for length in (num_queries, num_keys)]
    full = full & filled[0][:, None] & filled[1]
    of_both = (*_listed(some & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(*of_both, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(num_queries, num_keys))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the number of its blocks, and the columns, those first: (1, 1, R) and (1, 1, R, C)."""
    columns = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None].contiguous()


_cached_window_block_mask = lru_cache(maxsize=64)(_window_block_mask)


def _bounds(left: int | None, right: int | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The window as tensors: numbers in a closure become symbols after a change, which inductor of torch 2.11 cannot lower."""
    return (
        None if left is None else torch.full((), left, device=device),
        None if right is None else torch.full((), right, device=device),
    )


def _within(distance: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    inside = distance == distance
    if left is not None:
        inside = inside & (distance >= -left)
    if right is not None:
        inside = inside & (distance <= right)
    return inside
