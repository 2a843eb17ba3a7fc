"""Grouped-query attention: several query heads share one key/value head, so K, V and their cache shrink.

GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv 2305.13245, 2023.
Parameters are split as q, k, v, proj, the names of the key-driven descendants (`kdgqa.py`, `pgqa.py`), which build on this class.
Deviations: rotary embeddings, query/key normalisation and cross attention are options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from attention_zoo.attention.base import (
    ROPE_LAYOUTS,
    AttentionModule,
    attend,
    check_choice,
    check_context,
    check_head_split,
    check_tokens,
    drop,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import projection_settings, refuse_tensors, source_heads, source_settings, split_projections
from attention_zoo.attention.functional import Attend, pure_function
from attention_zoo.registry import PATTERNS, register_attention

__all__ = ["GroupedQueryAttention", "grouped_query_attention", "mean_pool_kv_heads", "mean_pool_states", "source_kv_heads"]


@register_attention(
    "gqa",
    title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    arxiv="2305.13245",
    year=2023,
    repository=None,
    patterns=PATTERNS,
    kv_cache=True,
    cost="O(N^2 d H)",
    engines=("flash", "torch", "xformers", "flex"),
)
class GroupedQueryAttention(AttentionModule):
    """Grouped-query attention: query heads share key/value heads evenly; G = H is multi-head, G = 1 is multi-query attention.

        head_h = softmax(q_h k_g^T / sqrt(d)) v_g,  g = floor(h G / H)          y = concat_h(head_h) W_o

    | paper | here |
    |---|---|
    | H query heads, d | `num_heads`, `head_dim` |
    | G groups | `num_kv_heads` |
    | W^Q, W^K, W^V, W^O | `q`, `k`, `v`, `proj` |

    Args:
        dim: channels C of the tokens.
        num_heads: number of query heads H.
        num_kv_heads: number of key/value heads G, a divisor of H; None: H / 2, or the largest divisor below it.
        head_dim: channels d per head; None: dim / num_heads.
        qkv_bias: whether `q`, `k` and `v` have a bias.
        qk_norm: normalise q and k per head with `norm_layer` (before any rotation).
        norm_layer: class of those normalisations, called with the number of channels.
        proj_bias: whether `proj` has a bias.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.
        is_causal: each token attends to itself and those before it; the last query stands at the last key.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved".
        context_dim: channels of `context`; None: dim.

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C). The cache holds (B, G, N, d).

    Raises:
        ValueError: heads that do not divide each other or `dim`, an unknown layout, tokens or masks of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("rope_layout", rope_layout, ROPE_LAYOUTS)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.num_kv_heads = self.resolve_num_kv_heads(num_heads, num_kv_heads)
        self.is_causal, self.rope_layout = is_causal, rope_layout
        self.context_dim = dim if context_dim is None else context_dim
        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.k = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
        self.v = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def resolve_num_kv_heads(cls, num_heads: int, num_kv_heads: int | None = None) -> int:
        """The number of key/value heads, `num_kv_heads` if given. Raises ValueError when the class cannot work with it."""
        if num_kv_heads is None:
            return next(g for g in range(max(1, num_heads // 2), 0, -1) if num_heads % g == 0)
        check_head_split(num_heads, num_kv_heads)
        return num_kv_heads

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        **options: Any,
    ) -> Self:
        """Build this mechanism from the weights of a softmax attention: q and proj are kept, k and v are averaged over groups.

        With as many key/value heads as the source has, nothing is averaged and `gqa` computes what the source does. Memory is not
        shared with the source. From a module, its dropout rates, train mode and (if it is the zoo's) causality are taken over.

        Args:
            source: an attention module or its state dict: timm's or the zoo's fused `qkv` and `proj`, or separate projections named
                `q, k, v, proj` or, as in Hugging Face's decoders, `q_proj, k_proj, v_proj, o_proj`. It may be grouped already.
            num_heads: query heads of the source; needed for a state dict, and for modules without a `num_heads`.
            num_kv_heads: key/value heads G of the result.
            options: further constructor arguments; they win over the settings of the source. A source with `q_norm` and `k_norm`
                needs qk_norm=True and its norm_layer.

        Raises:
            ValueError: head counts that do not divide, or tensors that are missing or have no place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), (kv_inner, context_dim) = state["q.weight"].shape, state["k.weight"].shape
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim = _channels_per_head("q.weight", inner, num_heads)
        if kv_inner % head_dim:
            raise ValueError(
                f"k.weight has {kv_inner} rows, no whole number of heads of {head_dim} channels; is num_heads={num_heads}?"
            )
        num_kv_heads = cls.resolve_num_kv_heads(num_heads, num_kv_heads)
        for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
            if name in state:
                state[name] = mean_pool_kv_heads(state[name], kv_inner // head_dim, num_kv_heads)
        settings = {
            "head_dim": head_dim,
            **projection_settings(state),
            "proj_bias": "proj.bias" in state,
            "context_dim": context_dim,
            **(source_settings(source) if isinstance(source, nn.Module) else {}),
            **options,
        }
        module = cls(dim, num_heads, num_kv_heads=num_kv_heads, **settings)
        own = module.state_dict()
        norms = [name for name in own if name.startswith(("q_norm.", "k_norm."))]
        missing, unknown = [n for n in norms if n not in state], [n for n in state if n not in own]
        refuse_tensors(cls.__name__, missing, unknown)
        module.load_state_dict({**own, **state})
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        q, k, v = self._project(x, context)
        out = attend(
            self,
            q,
            k,
            v,
            cross=context is not None,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
        )
        return self._output(out)

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, d) of x, k and v (B, G, M, d) of context (of x when it is None), normalised."""
        source = self._source(x, context)
        return self._queries(x), self._keys(source), self._values(source)

    def _source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Where keys and values come from. Raises ValueError for tokens of another shape."""
        check_tokens(x, self.dim)
        check_context(context, self.dim, self.context_dim)
        return x if context is None else context

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_norm(split_heads(self.q(x), self.num_heads))  # type: ignore[no-any-return]

    def _keys(self, source: Tensor) -> Tensor:
        return self.k_norm(split_heads(self.k(source), self.num_kv_heads))  # type: ignore[no-any-return]

    def _values(self, source: Tensor) -> Tensor:
        return split_heads(self.v(source), self.num_kv_heads)

    def _output(self, heads: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, N, C)."""
        return drop(self.proj_drop, self.proj(merge_heads(heads)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, is_causal={self.is_causal}"


def mean_pool_kv_heads(weight_or_bias: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Average the rows of a key or value projection over runs of consecutive heads (section 2.1 of the GQA paper).

    Shape: (num_heads * d, C) or (num_heads * d,) -> (num_kv_heads * d, C) or (num_kv_heads * d,).

    Raises:
        ValueError: rows that are no whole number of heads, or heads that do not share out evenly.
    """
    check_head_split(num_heads, num_kv_heads)
    _channels_per_head("a key or value projection", weight_or_bias.shape[0], num_heads)
    return weight_or_bias.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1)).mean(1).flatten(0, 1)


@pure_function("gqa")
def grouped_query_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, qk_norm: bool, num_kv_heads: int | None = None
) -> Tensor:
    """`GroupedQueryAttention` as a function: key and value heads averaged to `num_kv_heads`, as its conversion averages weights.

    Shape: q (B, H, N, d), k, v (B, G', M, d) -> (B, H, N, d).

    Raises:
        ValueError: heads that do not share out evenly, or normalised keys that would have to be averaged.
    """
    num_kv_heads = GroupedQueryAttention.resolve_num_kv_heads(q.shape[1], source_kv_heads(q, k, num_kv_heads))
    return attend(q, *mean_pool_states(k, v, num_kv_heads, qk_norm))


def source_kv_heads(q: Tensor, k: Tensor, num_kv_heads: int | None) -> int | None:
    """`num_kv_heads` if given; else what q and k have where they are grouped already, and None where they are not."""
    if num_kv_heads is None and k.shape[1] != q.shape[1]:
        return k.shape[1]
    return num_kv_heads


def mean_pool_states(k: Tensor, v: Tensor, num_kv_heads: int, qk_norm: bool) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G', M, d) averaged over runs of consecutive heads -> (B, G, M, d); so are those of averaged projections.

    Raises:
        ValueError: heads that do not share out evenly, or keys that were normalised head by head.
    """
    if k.shape[1] == num_kv_heads:
        return k, v
    check_head_split(k.shape[1], num_kv_heads)
    if qk_norm:
        raise ValueError(
            f"the model normalises its keys head by head, so that averaging them to num_kv_heads={num_kv_heads} is not averaging "
            "their projections; az.swap_attention does that"
        )
    k, v = (t.unflatten(1, (num_kv_heads, -1)).mean(2) for t in (k, v))
    return k, v


def _channels_per_head(name: str, rows: int, num_heads: int) -> int:
    if rows % num_heads:
        raise ValueError(f"{name} has {rows} rows, which are not a whole number of channels for each of {num_heads} heads")
    return rows // num_heads
