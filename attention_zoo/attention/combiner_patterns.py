"""Combiner's four factorisations as functions of tensors: which tokens a query sees directly, and which through a summary.

Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv 2107.05768, 2021. `combiner.py` holds the module.

A query's softmax runs over its direct tokens and its summaries together. Here it is computed in parts, each an ordinary attention
with its log-normaliser, which `ops.merge_attention` joins exactly; no part is larger than N x (L + S) for S segments of L tokens.

A pattern is a function `(plan, new, real, past, seen) -> (out, state)`:

- `plan`: the settings.
- `new`: tensors of the N tokens to attend, by name: `q` (rotated and scaled), `k`, `v` (B, H, N, d); `axial` may need `x` (B, N, C)
  and the rotary tables `cos`, `sin` (B, N, d) as well.
- `real`: which of all tokens, those in the cache included, are no padding, (B or 1, seen + N); None: all of them.
- `past`, `seen`: what the cache holds, by name, of how many tokens; {} and 0 without one. The N tokens must be a `pieces` piece.
- `out`: (B, H, N, d). `state`: what to keep, by name; of use only with `plan.keep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops.core_context import core_context_attention
from attention_zoo.ops.dispatch import wanted_backend
from attention_zoo.ops.engines import GRID_LIMIT

__all__ = ["PATTERNS", "Plan", "State", "axial", "fixed", "logsparse", "mixture", "pieces"]

State = dict[str, Tensor]
Part = tuple[Tensor, Tensor]  # an attention over some of the keys, and its log-normaliser


class Plan(NamedTuple):
    """The settings that the patterns read.

    Attributes:
        window_size: tokens L of a segment or row.
        is_causal, exclusive: as the module's.
        pool: "max", "sum" or "mean".
        act_query, act_key: applied to q and k before they are pooled.
        row_keys: axial's summary keys of whole rows, `row_keys(values, weighted keys, row)`.
        mix_keys: whether `row_keys` reads the weighted keys.
        dropout: rate; 0 in evaluation.
        keep: whether the state will be used.
    """

    window_size: int
    is_causal: bool
    exclusive: bool
    pool: str
    act_query: Callable[[Tensor], Tensor]
    act_key: Callable[[Tensor], Tensor]
    row_keys: Callable[[Tensor, Tensor | None, State], Tensor]
    mix_keys: bool
    dropout: float
    keep: bool


Pattern = Callable[[Plan, State, "Tensor | None", State, int], tuple[Tensor, State]]


def pieces(pattern: str, window_size: int, seen: int, length: int) -> Iterator[int]:
    """Sizes of the pieces that `length` tokens after `seen` cached ones are fed in: a running row or span is filled up first."""
    while length:
        if seen == 0:
            size = length
        elif pattern == "logsparse":
            size = min(length, seen & -seen)  # up to the size of the last span, so that spans stay aligned
        else:
            size = min(length, window_size - seen % window_size) if seen % window_size else length
        yield size
        seen, length = seen + size, length - size


# --- segments -------------------------------------------------------------------------------------------------------------------


def fixed(plan: Plan, new: State, real: Tensor | None, past: State, seen: int) -> tuple[Tensor, State]:
    """Direct: the own segment. Summaries: the segments before it, or all others (section 3.1 of the paper)."""
    grid = _Grid.of(plan, new, real, past, seen)
    ended = grid.ended_rows("q", "k", "v")
    query, key = (
        _normalise(_pool(plan.pool, act(ended[name]), grid.real_ended), plan.pool, grid.counts())
        for name, act in (("q", plan.act_query), ("k", plan.act_key))
    )
    value = _region_values(query, ended["k"], ended["v"], grid.real_ended, plan.dropout)
    state = {"summary_key": _extend(past, "summary_key", key, 2), "summary_value": _extend(past, "summary_value", value, 2)}

    visible = grid.visible(plan)
    if plan.is_causal and seen == 0 and grid.real is None and _kernel_of_parts(new["q"], key, value, None, plan.dropout):
        summaries = (state[name][:, :, :visible] for name in ("summary_key", "summary_value"))
        return _fixed_in_one(plan, new, *summaries), {**grid.running_row(plan), **state}
    parts = [grid.own_rows(plan)]
    if visible:
        mask = None if grid.real is None else grid.real[:, None, None, :visible].any(-1)
        if not plan.is_causal and plan.exclusive:
            mask = _both(mask, ~torch.eye(visible, dtype=torch.bool, device=key.device)[None, None])
        key, value = (state[name][:, :, :visible] for name in ("summary_key", "summary_value"))
        parts.append(_over_segments(grid.q, key, value, mask, plan.is_causal))
    return grid.join(parts), {**grid.running_row(plan), **state}


def _fixed_in_one(plan: Plan, new: State, key: Tensor, value: Tensor) -> Tensor:
    """The own segment and those before it are the window and the core tokens of core-context attention, which has kernels."""
    sizes: dict[str, Any] = {"window_size": 1, "group_size": plan.window_size, "scale": 1.0}
    with ops.no_autocast(new["q"]):
        out = core_context_attention(new["q"], new["k"], new["v"], key, value, **sizes)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def axial(plan: Plan, new: State, real: Tensor | None, past: State, seen: int) -> tuple[Tensor, State]:
    """Direct: the own row. Summaries: the tokens of the own column, each standing for its row (section 3.3 of the paper)."""
    grid = _Grid.of(plan, new, real, past, seen)
    ended = grid.ended_rows(*new)
    values = torch.cat([ended["v"], ended["k"]], -1) if plan.mix_keys else ended["v"]
    mask = None if grid.real_ended is None else grid.real_ended[:, :, None]
    values, *mixed = _values_along_rows(ended["q"], ended["k"], values, mask, False, plan.dropout).split(ended["v"].shape[-1], -1)
    key = plan.row_keys(values, mixed[0] if mixed else None, ended)
    state = {"summary_key": _extend(past, "summary_key", key, 2), "summary_value": _extend(past, "summary_value", values, 2)}

    parts = [grid.own_rows(plan)]
    if grid.visible(plan):
        parts.append(grid.own_columns(plan, state["summary_key"], state["summary_value"], grid.real, plan.exclusive, 0.0))
    return grid.join(parts), {**grid.running_row(plan), **state}


def mixture(plan: Plan, new: State, real: Tensor | None, past: State, seen: int) -> tuple[Tensor, State]:
    """Direct: the own row and column. Summaries: the parts of all other rows and columns before and after the own ones."""
    grid = _Grid.of(plan, new, real, past, seen)
    if not plan.is_causal:
        return _mixture_both_ways(plan, grid), {}
    ended = grid.ended_rows("q", "k", "v")
    lines = _Lines.of(plan, ended, grid.real_ended)
    left, right = lines.before(), lines.after()
    state = {
        f"{name}_{what}": _extend(past, f"{name}_{what}", tensor, 2)
        for name, pair in (("row", (ended["k"], ended["v"])), ("left", left[:2]), ("right", right[:2]))
        for what, tensor in zip(("key", "value"), pair, strict=True)
    }
    up, above = _running_columns(plan, grid, ended, state, past)

    parts = [grid.own_rows(plan)]
    if grid.visible(plan) and grid.is_whole() and _kernel_of_parts(grid.q, up.key, up.value, None, plan.dropout):
        parts += _mixture_without_masks(plan, grid, state, up)
    elif grid.visible(plan):
        real_left, real_right = _alive_before(grid), _alive_before(grid, flipped=True)
        parts += [
            grid.own_columns(plan, state["row_key"], state["row_value"], grid.real, False, plan.dropout),
            grid.own_columns(plan, state["left_key"], state["left_value"], real_left, False, 0.0),
            grid.own_columns(plan, state["right_key"], state["right_value"], real_right, False, 0.0),
            _along_rows(grid.q, up.key, up.value, up.alive[:, :, None] & grid.other_columns(), False),
        ]
    return grid.join(parts), {**grid.running_row(plan), **state, **above}


def _mixture_without_masks(plan: Plan, grid: _Grid, state: State, up: _Regions) -> list[Part]:
    """The parts of other rows and columns where no token is padding: what is missing then is missing for whole lines of queries."""
    column = torch.arange(grid.width, device=grid.q.device)
    row = torch.arange(grid.rows, device=grid.q.device)[:, None]
    own = grid.own_columns(plan, state["row_key"], state["row_value"], None, False, plan.dropout)
    left = grid.own_columns(plan, state["left_key"], state["left_value"], None, False, 0.0)
    right = grid.own_columns(plan, state["right_key"], state["right_value"], None, False, 0.0)
    # Causal bounds count from the end: of all columns but one, each query sees those before its own; flipped, those after it.
    before = _along_rows(grid.q, up.key[:, :, :, :-1], up.value[:, :, :, :-1], None, True)
    flipped = _along_rows(grid.q.flip(3), up.key[:, :, :, 1:].flip(3), up.value[:, :, :, 1:].flip(3), None, True)
    parts = (left, column == 0), (right, column == grid.width - 1), (before, row == 0), ((t.flip(3) for t in flipped), row == 0)
    return [own, *((out, lse.masked_fill(dead, -torch.inf)) for (out, lse), dead in parts)]


def _running_columns(plan: Plan, grid: _Grid, ended: State, finished: State, past: State) -> tuple[_Regions, State]:
    """Summaries of every column above each row that holds new tokens, and what to keep for the rows to come.

    Kept, per column over all finished rows: the pools of q and k (of sums: not yet divided), and the value.
    """
    query, key = (_transpose(act(ended[name])) for name, act in (("q", plan.act_query), ("k", plan.act_key)))
    if "up_query" in past:
        base = (past["up_query"], past["up_key"])
    else:
        base = (_empty_pool(query, plan.pool), _empty_pool(key, plan.pool))
    real = None if grid.real is None else grid.real[:, : grid.finished + grid.ended].transpose(1, 2)
    columns = _Lines(plan, query, key, _transpose(finished["row_key"]), _transpose(finished["row_value"]), real)
    pools = columns.running_pools(base)
    below = columns.running(pools)  # entry j: the rows up to the j-th that has ended
    query, key = (torch.cat([start.unsqueeze(3), pool], 3) for start, pool in zip(base, pools, strict=True))

    first_value = past["up_value"] if "up_value" in past else query.new_zeros(base[0].shape, dtype=below.value.dtype)
    counts = columns.counts(grid.finished + torch.arange(grid.ended + 1, device=key.device))
    values = torch.cat([first_value.unsqueeze(3), below.value], 3)
    keys, rows = _normalise(key, plan.pool, counts), grid.rows
    up = _Regions(_transpose(keys)[:, :, :rows], _transpose(values)[:, :, :rows], (counts > 0).transpose(1, 2)[:, :rows])
    if grid.finished + grid.ended == 0:
        return up, {}
    return up, {"up_query": query[:, :, :, -1], "up_key": key[:, :, :, -1], "up_value": values[:, :, :, -1]}


def _mixture_both_ways(plan: Plan, grid: _Grid) -> Tensor:
    """The mixture where every token sees both directions.

    exclusive=False is the official form: regions also of the own lines, itself twice, and a region that is empty keeps a key of 0
    and has the mean of its whole line as its value.
    """
    tokens = {"q": grid.q, "k": grid.k, "v": grid.v}
    rows = _Lines.of(plan, tokens, grid.real)
    columns = _Lines.of(
        plan, {name: _transpose(t) for name, t in tokens.items()}, None if grid.real is None else grid.real.transpose(1, 2)
    )
    parts = [grid.own_rows(plan), grid.own_columns(plan, grid.k, grid.v, grid.real, plan.exclusive, plan.dropout)]
    for key, value, alive in (columns.before(), columns.after()):
        mask = None if not plan.exclusive else alive.transpose(1, 2)[:, :, None] & grid.other_columns()
        parts.append(_along_rows(grid.q, _transpose(key), _transpose(value), mask, False))
    for key, value, alive in (rows.before(), rows.after()):
        parts.append(grid.own_columns(plan, key, value, alive if plan.exclusive else None, plan.exclusive, 0.0))
    return grid.join(parts)


class _Grid(NamedTuple):
    """New tokens as a grid of rows, below the `finished` rows of a cache, right of the `running` tokens of its unfinished one.

    Attributes:
        q: (B, H, rows, width, d), new tokens; k, v: (B, H, rows, running + width, d). The last row may be filled up.
        tokens: the unfinished row and the new tokens, one after another.
        length: new tokens; ended: rows of `tokens` that get summaries.
        real: (B or 1, finished + rows, L) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: State
    length: int
    finished: int
    running: int
    ended: int
    window_size: int
    real: Tensor | None

    @classmethod
    def of(cls, plan: Plan, new: State, real: Tensor | None, past: State, seen: int) -> _Grid:
        length, window = new["q"].shape[2], plan.window_size
        finished, running = seen // window, seen % window  # not divmod, which torch.compile does not know of symbolic sizes
        width = min(length, window)
        rows = -(-length // width)
        tokens = {name: _extend(past, name, tensor, -2) for name, tensor in new.items()}
        if plan.keep:
            ended = (running + length) // window
        else:
            ended = rows - 1 if plan.is_causal else rows
        q = _to_rows(new["q"], rows, width)
        k, v = (_to_rows(tokens[name], rows, running + width) for name in ("k", "v"))
        if real is not None:
            real = _to_rows(real.unsqueeze(-1), finished + rows, window).squeeze(-1)
        return cls(q, k, v, tokens, length, finished, running, ended, window, real)

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def width(self) -> int:
        return self.q.shape[3]

    def is_whole(self) -> bool:
        """Rows of at least two tokens, none of them padding, none of them begun in a cache."""
        return self.real is None and self.running == 0 and 1 < self.window_size == self.width

    @property
    def real_ended(self) -> Tensor | None:
        """(B or 1, ended, L) or None."""
        return None if self.real is None else self.real[:, self.finished : self.finished + self.ended]

    def counts(self) -> Tensor:
        """Real tokens of each ended row, (B or 1, ended)."""
        if self.real_ended is not None:
            return self.real_ended.sum(-1)
        return torch.full((1, self.ended), self.window_size, device=self.q.device)

    def ended_rows(self, *names: str) -> State:
        """Whole rows of the named tensors, (B, H, ended, L, d) or (B, ended, L, C)."""
        return {name: _to_rows(self.tokens[name], self.ended, self.window_size) for name in names}

    def running_row(self, plan: Plan) -> State:
        """The tokens after the ended rows, to be kept."""
        if not plan.keep:
            return {}
        return {name: tensor[..., self.ended * self.window_size :, :] for name, tensor in self.tokens.items()}

    def visible(self, plan: Plan) -> int:
        """Rows that the last row sees summaries of: those before it, or all."""
        return self.finished + self.rows - 1 if plan.is_causal else self.rows

    def own_rows(self, plan: Plan) -> Part:
        mask = None if self.real is None else self.real[:, self.finished :, None, : self.running + self.width]
        return _along_rows(self.q, self.k, self.v, mask, plan.is_causal, plan.dropout)

    def own_columns(self, plan: Plan, key: Tensor, value: Tensor, real: Tensor | None, others: bool, dropout: float) -> Part:
        """Each query over (B, H, all rows, L, d) in its own column: causal: rows before its own; else all, or all `others`."""
        visible, own = self.visible(plan), slice(self.running, self.running + self.width)
        key, value = (_transpose(t[:, :, :visible, own]) for t in (key, value))
        mask = None if real is None else real[:, :visible, own].transpose(1, 2)[:, :, None]
        if others and not plan.is_causal:
            mask = _both(mask, ~torch.eye(visible, dtype=torch.bool, device=key.device)[None, None])
        # Causal bounds count from the end: with all rows but the last query's own as keys, each query sees those before it.
        out, lse = _along_rows(_transpose(self.q), key, value, mask, plan.is_causal, dropout)
        return _transpose(out), _transpose(lse)

    def other_columns(self) -> Tensor:
        """(1, 1, width, L): which columns are not a query's own."""
        own = torch.arange(self.running, self.running + self.width, device=self.q.device)
        return (own[:, None] != torch.arange(self.window_size, device=self.q.device))[None, None]

    def join(self, parts: Sequence[Part]) -> Tensor:
        outs, lses = zip(*parts, strict=True)
        out = ops.merge_attention(outs, lses)[0] if len(outs) > 1 else outs[0]
        return out.flatten(2, 3)[:, :, : self.length]


class _Regions(NamedTuple):
    """Summaries: key and value (B, H, S, n, d), and which of them stand for any real token, (B or 1, S, n)."""

    key: Tensor
    value: Tensor
    alive: Tensor


class _Lines(NamedTuple):
    """S lines (rows, or columns) of n tokens, and the summaries of their beginnings and ends.

    Attributes:
        query, key: (B, H, S, m, d), activated, to be pooled; of the last m of the n tokens.
        k, v: (B, H, S, n, d).
        real: (B or 1, S, n) or None.
    """

    plan: Plan
    query: Tensor
    key: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, plan: Plan, tokens: State, real: Tensor | None) -> _Lines:
        return cls(plan, plan.act_query(tokens["q"]), plan.act_key(tokens["k"]), tokens["k"], tokens["v"], real)

    def running_pools(self, base: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Pools of q and k over every beginning of the lines (of means: sums), going on from those of the tokens before."""
        pools = []
        for i, tensor in enumerate((self.query, self.key)):
            real = None if self.real is None else self.real[:, :, -tensor.shape[3] :] if tensor.shape[3] else self.real[:, :, :0]
            tensor = _mask_out(tensor, real, self.plan.pool)
            if base is not None:
                tensor = torch.cat([base[i].unsqueeze(3).to(tensor.dtype), tensor], 3)
            pool = tensor.cummax(3)[0] if self.plan.pool == "max" else tensor.cumsum(3)
            pools.append(pool if base is None else pool[:, :, :, 1:])
        return pools[0], pools[1]

    def counts(self, lengths: Tensor) -> Tensor:
        """Real tokens among the first `lengths` of each line, (B or 1, S, len(lengths))."""
        if self.real is None:
            return lengths[None, None].expand(1, self.k.shape[2], -1)
        return F.pad(self.real.cumsum(-1), (1, 0))[:, :, lengths]

    def running(self, pools: tuple[Tensor, Tensor] | None = None) -> _Regions:
        """Summaries of the beginnings, the j-th up to token j itself, for the last m tokens."""
        num_pools, num_keys = self.query.shape[3], self.k.shape[3]
        counts = self.counts(torch.arange(num_keys - num_pools + 1, num_keys + 1, device=self.k.device))
        query, key = (_normalise(pool, self.plan.pool, counts) for pool in pools or self.running_pools())
        mask = None if self.real is None else self.real[:, :, None]
        value = _values_along_rows(query, self.k, self.v, mask, True, self.plan.dropout)
        return _Regions(key, value, counts > 0)

    def before(self) -> _Regions:
        """Summaries of all tokens before each one. Where there is none: key 0, and the mean of the line as value."""
        regions = self.running()
        key = F.pad(regions.key, (0, 0, 1, -1))
        value = torch.cat([self.v.mean(3, keepdim=True).to(regions.value.dtype), regions.value[:, :, :, :-1]], 3)
        return _Regions(key, value, F.pad(regions.alive, (1, -1)))

    def after(self) -> _Regions:
        """Summaries of all tokens after each one."""
        flipped = self._replace(
            query=self.query.flip(3),
            key=self.key.flip(3),
            k=self.k.flip(3),
            v=self.v.flip(3),
            real=None if self.real is None else self.real.flip(2),
        )
        key, value, alive = flipped.before()
        return _Regions(key.flip(3), value.flip(3), alive.flip(2))


def _alive_before(grid: _Grid, flipped: bool = False) -> Tensor:
    """(B or 1, rows, L): whether any real token stands before each one in its row; `flipped`: after it."""
    shape = (1, grid.finished + grid.rows, grid.window_size)
    real = torch.ones(shape, dtype=torch.bool, device=grid.q.device) if grid.real is None else grid.real
    if flipped:
        return F.pad(real.flip(2).cumsum(2) > 0, (1, -1)).flip(2)
    return F.pad(real.cumsum(2) > 0, (1, -1))


# --- spans ----------------------------------------------------------------------------------------------------------------------


def logsparse(plan: Plan, new: State, real: Tensor | None, past: State, seen: int) -> tuple[Tensor, State]:
    """Direct: the token itself. Summaries: the binary decomposition of the tokens before it (section 3.2 of the paper).

    Not causal: besides, the same from the other end.
    """
    q, k, v = new["q"], new["k"], new["v"]
    missing = _missing_in_kernel(plan, real)
    if not plan.keep and not ops.is_observed() and use_kernel("auto", (q, k, v), dropout_p=plan.dropout, missing=missing):
        return _attend_to_spans(plan, q, k, v), {}
    work = torch.promote_types(q.dtype, torch.float32)
    real_new = None if real is None else real[:, seen:]
    own = (q.to(work) * k.to(work)).sum(-1, keepdim=True)
    logits = [own if real_new is None else own.masked_fill(~real_new[:, None, :, None], -torch.inf)]
    if seen:
        logits.append(_logits_of_spans(plan, q, past["span_key"], real, seen))
    spans = _Spans(plan, new, real_new)
    logits.append(spans.logits())
    mirrored = None
    if not plan.is_causal:
        mirrored = _Spans(plan, {name: new[name].flip(2) for name in "qkv"}, None if real_new is None else real_new.flip(1))
        logits.append(mirrored.logits().flip(2))

    joint = _softmax(torch.cat(logits, -1))
    ops.observe("token itself and spans", joint)
    weights = joint.split([part.shape[-1] for part in logits], -1)
    out = F.dropout(weights[0], plan.dropout) * v if plan.dropout else weights[0] * v
    if seen:
        out = out + weights[1] @ past["span_value"].to(work)
    out = out + spans.mix(weights[2 if seen else 1])
    if mirrored is not None:
        out = out + mirrored.mix(weights[-1].flip(2)).flip(2)
    return out.to(v.dtype), _keep_spans(plan, spans, new, real, past, seen) if plan.keep else {}


def _missing_in_kernel(plan: Plan, real: Tensor | None) -> str | None:
    """What `ops.span_attention`, which has kernels, does not have; None: nothing."""
    if real is not None:
        return "the kernels of spans know no padding"
    return None if plan.pool == "max" else "the kernels of spans pool by maximum"


def _attend_to_spans(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens at once: (B, H, N, d)."""
    pools = [None if (pool := act(t)) is t else pool.to(t.dtype) for t, act in ((q, plan.act_query), (k, plan.act_key))]
    out = ops.span_attention(q, k, v, pool_q=pools[0], pool_k=pools[1], is_causal=plan.is_causal, scale=1.0)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


class _Spans:
    """Spans of 2^b tokens at multiples of 2^(b + 1): those that some query after them sees, with their summaries.

    A query i sees the span [e - 2^b, e), e = (i >> b) << b, of every bit b that is set in i. In pairs of spans of one level, the
    queries in the second see the first.

    Attributes, a list entry for each level b:
        pool_query, pool_key: (B, H, M, d), pools over all M whole spans, of means the sums.
        key, value: (B, H, P, d), summaries of the first of each pair; alive: (B or 1, P).
        pairs: how many of them queries see.
    """

    def __init__(self, plan: Plan, tokens: State, real: Tensor | None) -> None:
        self.length = length = tokens["q"].shape[2]
        self.levels = length.bit_length() if plan.keep else (length - 1).bit_length()
        self.padded = 1 << self.levels
        self.query, k, v = (F.pad(tokens[name], (0, 0, 0, self.padded - length)) for name in "qkv")
        self.pool_query, self.pool_key = self._pools(plan, tokens, real)
        real = None if real is None else F.pad(real, (0, self.padded - length))
        self.key, self.value, self.alive, self.pairs = [], [], [], []
        for level in range(self.levels):
            size, firsts = 1 << level, ((length >> level) + 1) >> 1
            self.pairs.append((length + size - 1) >> (level + 1))
            members = None if real is None else real[:, : firsts << (level + 1)].unflatten(1, (firsts, 2, size))[:, :, 0]
            counts = torch.full((1, firsts), size, device=v.device) if members is None else members.sum(-1)
            query, key = (_normalise(pools[level][:, :, ::2], plan.pool, counts) for pools in (self.pool_query, self.pool_key))
            k_members, v_members = (t[:, :, : firsts << (level + 1)].unflatten(2, (firsts, 2, size))[:, :, :, 0] for t in (k, v))
            value = v_members[:, :, :, 0] if level == 0 else _region_values(query, k_members, v_members, members, plan.dropout)
            self.key.append(key)
            self.value.append(value)
            self.alive.append(counts > 0)

    def _pools(self, plan: Plan, tokens: State, real: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for pools, tensor in zip(found, (plan.act_query(tokens["q"]), plan.act_key(tokens["k"])), strict=True):
            pools.append(_mask_out(tensor, real, plan.pool))
            for level in range(1, self.levels):
                whole = self.length >> level
                pairs = pools[-1][:, :, : 2 * whole].unflatten(2, (whole, 2))
                pools.append(pairs.amax(3) if plan.pool == "max" else pairs.sum(3))
        return found

    def logits(self) -> Tensor:
        """(B, H, N, levels), -inf where a query sees no span of that level."""
        batch, heads = self.query.shape[:2]
        work = torch.promote_types(self.query.dtype, torch.float32)
        found = [self.query.new_zeros(batch, heads, self.length, 0, dtype=work)]
        for level, pairs in enumerate(self.pairs):
            logits = torch.full((batch, heads, pairs, 2, 1 << level), -torch.inf, dtype=work, device=self.query.device)
            if pairs:
                queries = self.query[:, :, : pairs << (level + 1)].unflatten(2, (pairs, 2, 1 << level))[:, :, :, 1]
                second = (queries * self.key[level][:, :, :pairs, None].to(work)).sum(-1)
                second = second.masked_fill(~self.alive[level][:, None, :pairs, None], -torch.inf)
                logits = torch.stack([logits[:, :, :, 0], second], 3)
            missing = self.length - (pairs << (level + 1))
            found.append(F.pad(logits.flatten(2), (0, missing), value=-torch.inf).unsqueeze(-1))
        return torch.cat(found, -1)

    def mix(self, weights: Tensor) -> Tensor:
        """Values weighted, (B, H, N, levels) -> (B, H, N, d)."""
        out = weights.new_zeros(*weights.shape[:3], self.query.shape[3])
        weights = F.pad(weights, (0, 0, 0, self.padded - self.length))
        for level, pairs in enumerate(self.pairs):
            if pairs:
                second = weights[:, :, : pairs << (level + 1), level].unflatten(2, (pairs, 2, 1 << level))[:, :, :, 1]
                mixed = second.unsqueeze(-1) * self.value[level][:, :, :pairs, None]
                mixed = torch.stack([torch.zeros_like(mixed), mixed], 3).flatten(2, 4)
                out = out + F.pad(mixed, (0, 0, 0, self.length - mixed.shape[2]))
        return out


def _keep_spans(plan: Plan, spans: _Spans, new: State, real: Tensor | None, past: State, seen: int) -> State:
    """All keys and values, and pools and value of the span of every set bit of the length, the largest first.

    A new span as large as the last one before it is merged with it, and so on, as digits are carried.
    """
    state = {name: _extend(past, name, new[name], 2) for name in "kv"}
    found = [
        (spans.pool_query[level][:, :, index], spans.pool_key[level][:, :, index], spans.value[level][:, :, index >> 1])
        for level in reversed(range(spans.levels))
        if (index := (spans.length >> level) - 1) % 2 == 0
    ]
    total, size = seen + spans.length, spans.length
    if seen:
        before = list(zip(*(past[f"span_{name}"].unbind(2) for name in ("query", "key", "value")), strict=True))
        if seen & size:  # carried
            query, key = found[0][:2]
            while seen & size:
                query, key = (_pool_two(plan.pool, a, b) for a, b in zip(before.pop()[:2], (query, key), strict=True))
                seen, size = seen - size, 2 * size
            members = None if real is None else real[:, None, seen:]
            counts = torch.full((1, 1), size, device=query.device) if members is None else members.sum(-1)
            pooled = _normalise(query.unsqueeze(2), plan.pool, counts)
            k, v = (state[name][:, :, None, seen:] for name in "kv")
            found = [(query, key, _region_values(pooled, k, v, members, plan.dropout)[:, :, 0])]
        found = before + found
    assert len(found) == total.bit_count()
    names = ("span_query", "span_key", "span_value")
    return {**state, **{name: torch.stack(tensors, 2) for name, tensors in zip(names, zip(*found, strict=True), strict=True)}}


def _logits_of_spans(plan: Plan, q: Tensor, key: Tensor, real: Tensor | None, seen: int) -> Tensor:
    """q (B, H, N, d) against the spans of the cache, all of which it sees -> (B, H, N, spans)."""
    start, counts = 0, []
    for level in reversed(range(seen.bit_length())):
        if seen >> level & 1:
            size = 1 << level
            counts.append(torch.full((1,), size, device=q.device) if real is None else real[:, start : start + size].sum(-1))
            start += size
    real_tokens = torch.stack(counts, -1)
    work = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(work) @ _normalise(key, plan.pool, real_tokens).to(work).transpose(-2, -1)
    return logits.masked_fill(~(real_tokens > 0)[:, None, None], -torch.inf)


# --- parts ----------------------------------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float, lse: bool) -> tuple[Tensor, ...]:
    """Unscaled attention, in the wider dtype of q and k: pools of low precision may have been summed up in float32."""
    kind = torch.promote_types(q.dtype, k.dtype)
    settings: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "scale": 1.0, "dropout_p": dropout, "return_lse": lse}
    q, k, v = (t.to(kind) for t in (q, k, v))
    with ops.no_autocast(q):
        if lse and _kernel_of_parts(q, k, v, mask, dropout):
            return _attend_with_lse(q, k, v, is_causal)
        result = ops.attention(q, k, v, **settings)
    return result if isinstance(result, tuple) else (result,)


def _kernel_of_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether our kernel computes a part: torch's fused engines return no log-normaliser, and flex compiles for each size."""
    if not q.is_cuda or mask is not None or dropout or ops.is_observed() or math.prod(q.shape[:-2]) > GRID_LIMIT:
        return False
    return wanted_backend("auto") == "auto" and use_kernel("auto", (q, k, v))


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Unscaled attention by the kernel of core-context attention: without core tokens, and a window that is never left."""
    ahead = k.shape[2] - q.shape[2] if is_causal else k.shape[2]  # of the first query, before the first key
    none = (t[:, :, :0] for t in (k, v))
    settings: dict[str, Any] = {"window_size": 2**30, "group_size": 1, "scale": 1.0, "return_lse": True}
    out, lse = core_context_attention(q, k, v, *none, query_start=max(ahead, 0), key_start=max(-ahead, 0), **settings)
    return out, lse


def _along_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float = 0.0) -> Part:
    """Attention inside each of the S rows: q (B, H, S, n, d), k, v (B, H, S, m, d), mask (B or 1, S or 1, n or 1, m).

    Returns: (B, H, S, n, d) and (B, H, S, n).
    """
    shape, mask = (q.shape[0], q.shape[2]), _mask_of_rows(mask, q)
    out, lse = _attend(_as_batch(q), _as_batch(k), _as_batch(v), mask, is_causal, dropout, lse=True)
    return out.unflatten(0, shape).transpose(1, 2), lse.unflatten(0, shape).transpose(1, 2)


def _values_along_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    """`_along_rows` without the normaliser, which more engines compute, in the dtype of v."""
    shape, mask = (q.shape[0], q.shape[2]), _mask_of_rows(mask, q)
    (out,) = _attend(_as_batch(q), _as_batch(k), _as_batch(v), mask, is_causal, dropout, lse=False)
    return out.unflatten(0, shape).transpose(1, 2).to(v.dtype)


def _as_batch(rows: Tensor) -> Tensor:
    """(B, H, S, n, d) -> (B * S, H, n, d)."""
    return rows.transpose(1, 2).flatten(0, 1)


def _mask_of_rows(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """(B or 1, S or 1, n or 1, m) -> (B * S or 1, 1, n or 1, m)."""
    if mask is None or mask.shape[:2] == (1, 1):
        return mask
    return mask.expand(q.shape[0], q.shape[2], -1, -1).flatten(0, 1).unsqueeze(1)


def _over_segments(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Part:
    """q (B, H, S, L, d) over summaries (B, H, K, d); mask (B or 1, 1, S or 1, K); causal: row S - 1 sees all K, the others fewer.

    Tokens of one column are a head of queries, all those of a head share its summaries: a mask of S x K does for all of them.
    """
    heads, width = q.shape[1], q.shape[3]
    out, lse = _attend(q.transpose(2, 3).flatten(1, 2), key, value, mask, is_causal, 0.0, lse=True)
    return out.unflatten(1, (heads, width)).transpose(2, 3), lse.unflatten(1, (heads, width)).transpose(2, 3)


def _region_values(query: Tensor, k: Tensor, v: Tensor, real: Tensor | None, dropout: float) -> Tensor:
    """Values of R regions of n tokens: query (B, H, R, d), k, v (B, H, R, n, d), real (B or 1, R, n) -> (B, H, R, d)."""
    mask = None if real is None else real[:, :, None]
    return _values_along_rows(query.unsqueeze(3), k, v, mask, False, dropout).squeeze(3)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; 0 where all are -inf."""
    top = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


# --- pools ----------------------------------------------------------------------------------------------------------------------


def _mask_out(tensor: Tensor, real: Tensor | None, pool: str) -> Tensor:
    """What is pooled, (B, H, ..., d), with padding (B or 1, ...) as that which changes no pool; sums in float32."""
    if pool != "max":
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if real is None:
        return tensor
    return tensor.masked_fill(~real[:, None, ..., None], -torch.inf if pool == "max" else 0.0)


def _pool(pool: str, tensor: Tensor, real: Tensor | None) -> Tensor:
    """(B, H, R, n, d) -> (B, H, R, d); of means the sums."""
    tensor = _mask_out(tensor, real, pool)
    return tensor.amax(3) if pool == "max" else tensor.sum(3)


def _pool_two(pool: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b) if pool == "max" else a + b


def _empty_pool(like: Tensor, pool: str) -> Tensor:
    """The pool over nothing: (B, H, S, n, d) -> (B, H, S, d)."""
    kind = like.dtype if pool == "max" else torch.promote_types(like.dtype, torch.float32)
    return like.new_full((*like.shape[:3], like.shape[4]), -torch.inf if pool == "max" else 0.0, dtype=kind)


def _normalise(pooled: Tensor, pool: str, counts: Tensor) -> Tensor:
    """(B, H, ..., d) as pooled over `counts` (B or 1, ...) tokens: means divided, 0 where there was no token."""
    counts = counts[:, None, ..., None]
    if pool == "mean":
        return pooled / counts.clamp_min(1).to(pooled.dtype)
    return pooled.masked_fill(counts == 0, 0.0) if pool == "max" else pooled


# --- shapes ---------------------------------------------------------------------------------------------------------------------


def _extend(past: State, name: str, tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([past[name].to(tensor.dtype), tensor], dim) if name in past else tensor


def _to_rows(tensor: Tensor, rows: int, width: int) -> Tensor:
    """(..., N, d) -> (..., rows, width, d), cropped or filled up with zeros at the end."""
    missing = rows * width - tensor.shape[-2]
    tensor = F.pad(tensor, (0, 0, 0, missing)) if missing > 0 else tensor[..., : rows * width, :]
    return tensor.unflatten(-2, (rows, width))


def _transpose(tensor: Tensor) -> Tensor:
    """Rows to columns: (B, H, S, L, ...) -> (B, H, L, S, ...)."""
    return tensor.transpose(2, 3)


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


PATTERNS: dict[str, Pattern] = {"fixed": fixed, "axial": axial, "logsparse": logsparse, "mixture": mixture}
