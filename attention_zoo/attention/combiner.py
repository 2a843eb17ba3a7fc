"""Combiner: full attention at sparse cost; a token sees some others directly and the rest through summaries of regions.

Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv 2107.05768, 2021. Follows the official code
(google-research/google-research, folder combiner: JAX and TF1); where the two differ (pooling, biases, epsilon) both are options.
Deviations: without causality a region does not contain what is seen directly (`exclusive`), as in the paper; lengths that the
window does not divide; padding masks; rotary embeddings and query/key normalisation; logsparse in both directions and, where its
official code leaves the last token alone (N = 2^k + 1) or fails (N = 2), complete; softmaxes and sums in float32 with true masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention.base import (
    ROPE_LAYOUTS,
    AttentionModule,
    apply_rotary,
    check_choice,
    check_grid,
    check_tokens,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.cache import StateCacheLayer, own_cache_layer
from attention_zoo.attention.combiner_patterns import PATTERNS, Plan, State, pieces
from attention_zoo.attention.conversion import (
    fuse_rows,
    load_converted,
    projection_settings,
    relative_scale,
    repeat_heads,
    source_heads,
    source_settings,
    split_projections,
)
from attention_zoo.attention.functional import pure_function
from attention_zoo.registry import register_attention

__all__ = ["CombinerAttention", "combine"]

POOLS = ("max", "sum", "mean")
ACTS = ("identity", "relu", "deepset")
ROW_SUMMARIES = ("none", "wsum", "proj", "wsum_proj")


class CombinerCacheLayer(StateCacheLayer):
    """What a Combiner layer keeps: the tokens of its unfinished segment and the summaries of finished ones, by pattern."""

    def keep(self, state: State, length: int) -> None:
        """Replace what is kept, after `length` more tokens."""
        for name, tensor in state.items():
            compiling = torch.compiler.is_compiling()  # then nobody can tell
            whole = not compiling and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            setattr(self, name, tensor if whole else tensor.clone())  # a view would keep all of its storage alive
        self.tokens_seen += length


@register_attention(
    "combiner",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    arxiv="2107.05768",
    year=2021,
    repository="google-research/google-research",
    patterns={"noncausal_self", "causal_self"},
    kv_cache=True,
    static_cache=False,
    padding_masks_only=True,
    length_coupled=True,
    relative_rotation=False,
    cost="O(N (L + N / L) d H), logsparse O(N log(N) d H)",
    engines=("triton", "flash", "flex", "reference", "torch"),
    causal_options={"window_size": 128},  # the official language models'
)
class CombinerAttention(AttentionModule):
    """Combiner attention: one softmax over direct tokens and over summaries of regions that together hold every other token.

        y_i = sum_{j in D_i} a_ij v_j + sum_{r in R_i} a_ir v_r
        a_i = softmax([q_i k_j for j in D_i, q_i k_r for r in R_i])            q is scaled by 1 / sqrt(d) before all else
        k_r = pool_{j in r} act(k_j)     v_r = sum_{j in r} softmax_j(q_r k_j) v_j     q_r = pool_{j in r} act(q_j)

    Each pattern is a choice of D_i and R_i (N tokens in segments of L; s(i) the segment, c(i) the column of token i):

    - "fixed": the own segment; the other segments.
    - "logsparse": the token itself; the binary decomposition of [0, i), spans of 2^b tokens, and its mirror image if not causal.
    - "axial": the own row (segment); the tokens of the own column, each with the values of its row, as that token attends to it
      (k_r by `row_summary`).
    - "mixture": the own row and column; of every other column the part above (and below), of every other row the part on the left
      and on the right.

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | W_Q, W_K, W_V; W_O | rows of `qkv`, in this order; `proj` |
    | L, tokens of a segment or row | `window_size` |
    | act of the queries and of the keys (deepset) | relu of `pool_q`, `pool_k` |
    | axial-rowmajor's summary key: W_1, LN, W_2 | `summary_proj`, `summary_norm`, `summary_key` |

    With window_size >= N and an empty R_i (causal, or `exclusive`; not logsparse) this is multi-head attention.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h.
        head_dim: channels d per head; None: dim / num_heads.
        qkv_bias: whether `qkv`, `summary_proj` and `summary_key` have a bias.
        qk_norm: RMS normalisation of q and k per head, before rotation, scale and pooling.
        proj_bias: whether `proj` has a bias.
        attn_drop: dropout rate on the weights of direct tokens and on those inside a region; summaries are never dropped.
        proj_drop: dropout rate on the output.
        pattern: "fixed", "axial", "logsparse" or "mixture".
        is_causal: each token attends to itself and those before it.
        window_size: L; None: the width of the grid if forward gets a `grid_size`, else near sqrt(N), a divisor of N if one is near.
            It then depends on N: a cache, or padded batches that should equal unpadded ones, need a number. Unused by logsparse.
        summary_pool: "max", "sum" or "mean" over a region. The official mixture has "max" (JAX) or "sum" (TF).
        summary_act: "identity", "relu" or "deepset" before pooling.
        row_summary: axial's summary key of a row, for each of its tokens: the token's own ("none"), the row's weighted as its
            values are ("wsum"), or projected from the values ("proj") or the weighted keys ("wsum_proj"), with x as residual.
        summary_norm_eps: epsilon of `summary_norm`; 1e-6 is flax's, 1e-5 TF's.
        exclusive: not causal: regions leave out what is seen directly; False: they do not, as in the official TF code.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved".

    Shape: x (B, N, C) -> (B, N, C). `attention_mask` is (B, N), or (B, all tokens so far) with a cache: true or 1 = a real token.

    Raises:
        ValueError: heads that do not divide `dim`, an unknown choice, axial or mixture in both directions on rows that are not
            full, a mask of another kind, or a cache without a `window_size`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pattern: str = "fixed",
        is_causal: bool = False,
        window_size: int | None = None,
        summary_pool: str = "max",
        summary_act: str = "identity",
        row_summary: str = "proj",
        summary_norm_eps: float = 1e-6,
        exclusive: bool = True,
        rope_layout: str = "half",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("pattern", pattern, PATTERNS)
        check_choice("summary_pool", summary_pool, POOLS)
        check_choice("summary_act", summary_act, ACTS)
        check_choice("row_summary", row_summary, ROW_SUMMARIES)
        check_choice("rope_layout", rope_layout, ROPE_LAYOUTS)
        if window_size is not None and (window_size < 1 or window_size != int(window_size)):
            nearest = max(1, int(window_size))
            raise ValueError(f"window_size must be a positive whole number or None, got {window_size}; the nearest is {nearest}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.pattern, self.is_causal, self.exclusive = pattern, is_causal, exclusive
        self.window_size = None if window_size is None else int(window_size)
        self.summary_pool, self.summary_act, self.row_summary = summary_pool, summary_act, row_summary
        self.attn_drop, self.rope_layout = attn_drop, rope_layout
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else nn.Identity()
        if pattern == "axial" and self.projects_rows:
            self.summary_proj = nn.Linear(inner, dim, bias=qkv_bias, **factory)
            self.summary_norm = nn.LayerNorm(dim, eps=summary_norm_eps, **factory)
            self.summary_key = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        elif pattern != "axial" and summary_act == "deepset":
            self.pool_q = nn.Linear(self.head_dim, self.head_dim, bias=False, **factory)
            self.pool_k = nn.Linear(self.head_dim, self.head_dim, bias=False, **factory)
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @property
    def projects_rows(self) -> bool:
        """Whether axial's summary keys have parameters of their own."""
        return self.row_summary in ("proj", "wsum_proj")

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), truncated; biases 0 and normalisations 1."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build this mechanism from the weights of a multi-head attention: q, k, v and the output projection are kept.

        With window_size >= N and nothing beside what is seen directly (causal, or `exclusive`; not logsparse) it computes what the
        source does; for shorter windows it is an approximation: take "fixed", or "axial" with row_summary "none" or "wsum", which
        have no new parameters. Projected summary keys start as the keys of the normalised input (`summary_proj` at 0,
        `summary_key` as k), "deepset" as "relu". Grouped key/value heads are repeated. Memory is not shared with the source. From
        a module, its dropout rates, causality, scale and train mode are taken over, and its layer in a cache.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. Its q_norm and k_norm may be RMS normalisations.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: a source with ALiBi, head counts that do not divide, or tensors that are missing or have no place here; all
                of them are listed.
        """
        if any(getattr(source, name, None) is not None for name in ("alibi", "alibi_slopes")):
            raise ValueError("the source biases its logits by distance (ALiBi), which a summary of many tokens does not have")
        if isinstance(getattr(source, "q_norm", None), nn.LayerNorm):
            raise ValueError("the source normalises q and k by LayerNorm; Combiner has RMS normalisation")
        state = split_projections(source)
        (inner, dim), kv_inner = state["q.weight"].shape, state["k.weight"].shape[0]
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim = inner // num_heads if num_heads > 0 and inner % num_heads == 0 else 0
        if head_dim == 0 or kv_inner % head_dim or inner % kv_inner:
            raise ValueError(f"q.weight has {inner} rows, k.weight {kv_inner}: no whole number of heads; is num_heads={num_heads}?")
        causal = getattr(source, "is_causal", None)
        settings = {
            "head_dim": head_dim,
            **projection_settings(state),
            "qkv_bias": any(f"{name}.bias" in state for name in "qkv"),
            "qk_norm": "q_norm.weight" in state,
            "proj_bias": "proj.bias" in state,
            **({"is_causal": causal} if isinstance(causal, bool) else {}),
            **(source_settings(source) if isinstance(source, nn.Module) else {}),
        }
        module = cls(dim, num_heads, **{**settings, **options})
        module.layer_idx = getattr(source, "layer_idx", None)
        module._load_softmax_attention(state, relative_scale(source, head_dim))
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def _load_softmax_attention(self, state: State, scale: float) -> None:
        """Copy q, k, v, proj and the normalisations; `scale` is that of the source's logits to ours."""
        inner, own = self.num_heads * self.head_dim, self.state_dict()
        factor = 1.0 if "q_norm.weight" in own else scale
        state = fuse_rows(repeat_heads(state, self.num_heads, factor), "qkv")
        if "q_norm.weight" in state:
            state["q_norm.weight"] = state["q_norm.weight"] * scale
        if "summary_key.weight" in own:
            state |= {name: torch.zeros_like(own[name]) for name in own if name.startswith("summary_proj.")}
            state |= {name: own[name] for name in own if name.startswith("summary_norm.")}
            keys = {name: f"qkv.{name.rpartition('.')[2]}" for name in own if name.startswith("summary_key.")}
            state |= {name: state[fused][inner : 2 * inner] for name, fused in keys.items()}
        for name in ("pool_q.weight", "pool_k.weight"):
            if name in own:
                state[name] = torch.eye(self.head_dim)
        load_converted(self, state)

    def cache_elements(self, num_tokens: int) -> int:
        """Numbers that a cache keeps of one sequence: of an unfinished row also what its summary key will be made from.

        Raises:
            ValueError: no `window_size`.
        """
        inner = self.num_heads * self.head_dim
        if self.pattern == "logsparse":
            return inner * (2 * num_tokens + 3 * num_tokens.bit_count())
        window = self._window(num_tokens, None, cached=True)
        rows, running = divmod(num_tokens, window)
        if self.pattern == "fixed":
            return inner * (3 * running + 2 * rows)
        if self.pattern == "axial":
            tables = 2 * self.head_dim if self.is_rotated else 0
            projected = self.dim + tables if self.projects_rows else 0
            return (3 * inner + projected) * running + 2 * inner * rows * window
        return inner * (3 * running + (6 * rows + 3) * window if rows else 3 * running)

    def forward(
        self,
        x: Tensor,
        *,
        grid_size: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        check_tokens(x, self.dim)
        if grid_size is not None:
            check_grid(x, grid_size)
        layer = None
        if past_key_values is not None:
            if not self.is_causal:
                raise ValueError("past_key_values needs is_causal=True: summaries of the past are kept, and must not change")
            layer = own_cache_layer(self, past_key_values, CombinerCacheLayer)
        seen = layer.tokens_seen if layer is not None else 0
        real = self._real_tokens(attention_mask, x.shape[0], seen + x.shape[1])
        plan = self._plan(self._window(x.shape[1], grid_size, cached=layer is not None), layer is not None)
        new = self._project(x, position_embeddings)
        if layer is not None and x.shape[1]:
            out = self._attend(plan, new, real, layer)
        else:
            out = _attend_at_once(self.pattern, plan, new, real)
        return self.proj_drop(self.proj(merge_heads(out)))

    def _attend(self, plan: Plan, new: State, real: Tensor | None, layer: CombinerCacheLayer) -> Tensor:
        """The tokens piece by piece, so that each begins where a segment does or stays inside one."""
        start, outs = 0, []
        for size in pieces(self.pattern, plan.window_size, layer.tokens_seen, new["q"].shape[2]):
            piece = {name: tensor[..., start : start + size, :] for name, tensor in new.items()}
            seen = layer.tokens_seen
            known = None if real is None else real[:, : seen + size]
            out, state = PATTERNS[self.pattern](plan, piece, known, layer.tensors(), seen)
            layer.keep(state, size)
            start += size
            outs.append(out)
        return torch.cat(outs, 2)

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> State:
        """q (rotated and scaled), k and v by name, and what axial's summary keys are made from."""
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            q, k = (apply_rotary(t, position_embeddings, self.rope_layout) for t in (q, k))
        new = {"q": (q * self.head_dim**-0.5).to(v.dtype), "k": k.to(v.dtype), "v": v}
        if self.pattern == "axial" and self.projects_rows:
            new["x"] = x
            if position_embeddings is not None:
                new |= {
                    name: table.expand(x.shape[0], -1, -1) for name, table in zip(("cos", "sin"), position_embeddings, strict=True)
                }
        return new

    def _row_keys(self, values: Tensor, keys: Tensor | None, rows: State) -> Tensor:
        """Summary keys (B, H, S, L, d) of whole rows, from the values and the weighted keys that each token sees in its row."""
        if not self.projects_rows:
            return _own_or_mixed(values, keys, rows)
        seen = values if keys is None else keys
        batch, heads, num_rows, width, head_dim = seen.shape
        merged = seen.permute(0, 2, 3, 1, 4).reshape(batch, num_rows * width, heads * head_dim)
        y = self.summary_norm(self.summary_proj(merged) + rows["x"].flatten(1, 2))
        key = split_heads(self.summary_key(y), heads).to(rows["k"].dtype)
        if "cos" in rows:
            key = apply_rotary(key, (rows["cos"].flatten(1, 2), rows["sin"].flatten(1, 2)), self.rope_layout)
        return key.unflatten(2, (num_rows, width))

    def _act_query(self, q: Tensor) -> Tensor:
        return q if self.summary_act == "identity" else F.relu(self.pool_q(q) if self.summary_act == "deepset" else q)

    def _act_key(self, k: Tensor) -> Tensor:
        return k if self.summary_act == "identity" else F.relu(self.pool_k(k) if self.summary_act == "deepset" else k)

    def _plan(self, window_size: int, keep: bool) -> Plan:
        return Plan(
            window_size=window_size,
            is_causal=self.is_causal,
            exclusive=self.exclusive,
            pool=self.summary_pool,
            act_query=self._act_query,
            act_key=self._act_key,
            row_keys=self._row_keys,
            mix_keys=self.row_summary in ("wsum", "wsum_proj"),
            dropout=self.attn_drop if self.training else 0.0,
            keep=keep,
        )

    def _window(self, length: int, grid_size: tuple[int, int] | None, cached: bool) -> int:
        """Tokens of a segment. Raises ValueError where there are none, or where rows that must be full would not be."""
        if not cached or self.pattern == "logsparse":
            return _segment_length(self.pattern, self.window_size, length, grid_size, is_causal=self.is_causal)
        if self.window_size is None:
            raise ValueError("decoding with a cache needs window_size: without one it depends on the number of tokens")
        return self.window_size

    @staticmethod
    def _real_tokens(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        """(B, N) boolean. Raises ValueError for any other mask: summaries have no place for one."""
        if attention_mask is None:
            return None
        if attention_mask.shape != (batch, length) or attention_mask.is_floating_point():
            raise ValueError(
                "attention_mask must be padding, boolean or integer (B, N), N all tokens so far: "
                f"{(batch, length)}; got {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        return attention_mask.bool()

    def extra_repr(self) -> str:
        text = f"pattern={self.pattern!r}, num_heads={self.num_heads}, head_dim={self.head_dim}, is_causal={self.is_causal}"
        if self.pattern != "logsparse":
            text += f", window_size={self.window_size}"
        if self.pattern == "axial":
            text += f", row_summary={self.row_summary!r}"
        else:
            text += f", summary_pool={self.summary_pool!r}, summary_act={self.summary_act!r}"
        return text + ("" if self.is_causal or self.exclusive else ", exclusive=False")


def _refuse_parameters(*, pattern: str, row_summary: str, summary_act: str, **_: Any) -> None:
    """Raise ValueError for options that come with parameters."""
    if pattern == "axial" and row_summary not in ("none", "wsum"):
        raise ValueError(f"row_summary={row_summary!r} has parameters; a function of q, k and v has 'none' or 'wsum'")
    if pattern != "axial" and summary_act == "deepset":
        raise ValueError("summary_act='deepset' has parameters; a function of q, k and v has 'identity' or 'relu'")


@pure_function("combiner", check=_refuse_parameters)
def combine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    real: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    pattern: str = "fixed",
    window_size: int | None = None,
    summary_pool: str = "max",
    summary_act: str = "identity",
    row_summary: str = "proj",
    exclusive: bool = True,
) -> Tensor:
    """`CombinerAttention` as a function of whole sequences: summaries need the queries of their tokens, which no cache keeps.

    Shape: q (B, H, N, d), k, v (B, G, N, d) -> (B, H, N, d).
    """
    if k.shape[1] != q.shape[1]:  # regions are summarised by their queries, so that no two heads share them
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    act = F.relu if summary_act == "relu" else _identity
    plan = Plan(
        window_size=_segment_length(pattern, window_size, q.shape[2], None, is_causal=is_causal),
        is_causal=is_causal,
        exclusive=exclusive,
        pool=summary_pool,
        act_query=act,
        act_key=act,
        row_keys=_own_or_mixed,
        mix_keys=pattern == "axial" and row_summary == "wsum",
        dropout=dropout_p,
        keep=False,
    )
    scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _attend_at_once(pattern, plan, {"q": scaled.to(v.dtype), "k": k.to(v.dtype), "v": v}, real)


def _attend_at_once(pattern: str, plan: Plan, new: State, real: Tensor | None) -> Tensor:
    """Whole sequences: (B, H, N, d), of tokens as the patterns take them."""
    length = new["q"].shape[2]
    if length == 0:  # no tokens, no rows to cut them into
        return new["v"]
    if real is not None and pattern == "mixture" and not (plan.exclusive or plan.is_causal):
        raise ValueError("attention_mask does not go with the mixture of exclusive=False, whose empty regions count")
    if real is None and not plan.is_causal and pattern == "fixed" and length % plan.window_size:
        real = torch.ones(1, length, dtype=torch.bool, device=new["q"].device)  # what fills up the last segment is not
    return PATTERNS[pattern](plan, new, real, {}, 0)[0]


def _segment_length(
    pattern: str, window_size: int | None, length: int, grid_size: tuple[int, int] | None, *, is_causal: bool
) -> int:
    """Tokens of a segment of a whole sequence. Raises ValueError where rows that must be full would not be."""
    if pattern == "logsparse":
        return 0
    if window_size is None:
        window_size = grid_size[1] if grid_size is not None else _near_root(length)
    window = max(1, min(window_size, length))
    if not is_causal and pattern != "fixed" and length % window:
        below = next(w for w in range(window, 0, -1) if length % w == 0)
        raise ValueError(
            f"{pattern!r} in both directions needs full rows: {length} tokens are no multiple of window_size={window}; "
            f"the nearest below that divides them is {below}"
        )
    return window


def _own_or_mixed(values: Tensor, keys: Tensor | None, rows: State) -> Tensor:
    """Summary keys of whole rows: each token's own, or the keys of its row as it attends to them."""
    return rows["k"] if keys is None else keys


def _identity(x: Tensor) -> Tensor:
    return x


def _near_root(length: int) -> int:
    """The divisor of N nearest to sqrt(N); ceil(sqrt(N)) where that is further off than a factor of 2."""
    root = math.sqrt(length)
    small = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    divisors = [*small, *(length // d for d in reversed(small))] or [1]
    nearest = min(divisors, key=lambda d: abs(d - root))
    return nearest if root / 2 <= nearest <= 2 * root else math.ceil(root)
