"""Core-context-aware attention: old tokens are seen in groups, each as one weighted summary, recent tokens exactly; no new weights.

Core Context Aware Transformers for Long Context Language Modeling (v1: Core Context Aware Attention for Long Context Language
Modeling), arXiv 2412.12465, 2024. Follows the official code's path through masked softmax attention (chenyaofo/CCA-Attention),
which pools rotated keys where the paper pools hidden states.
Deviations: a group becomes a core token once it lies a whole window back, for every window and group size (the official kernel
shows the first one early, and its window is right only for whole groups); all layers keep the same cache, which is cut back during
the prefill, and core tokens are pooled when their last token arrives, so that no queries are kept; padding is left out before the
tokens are grouped (the official code ignores masks), and counts for no position of the built-in rotation; `core_per="kv"` and the
"interleaved" layout are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import (
    ROPE_LAYOUTS,
    AttentionModule,
    apply_rotary,
    check_choice,
    check_head_split,
    check_tokens,
    merge_heads,
    read_padding,
    refuse_where,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.cache import StateCacheLayer, own_cache_layer
from attention_zoo.attention.conversion import (
    load_converted,
    projection_settings,
    separate_names,
    source_heads,
    source_settings,
    split_projections,
    whole_heads,
)
from attention_zoo.attention.functional import pure_function
from attention_zoo.ops.core_context import CORE_HEADS, POOLS, core_context_attention, pool_core_tokens
from attention_zoo.registry import register_attention

__all__ = ["CoreContextAttention", "CoreContextCacheLayer", "core_context"]


@register_attention(
    "cca",
    title="Core Context Aware Transformers for Long Context Language Modeling",
    arxiv="2412.12465",
    year=2024,
    repository="chenyaofo/CCA-Attention",
    patterns={"causal_self"},
    kv_cache=True,
    cost="O(N (w + N / p) d H)",
    engines=("triton", "reference"),
    static_cache=False,
    padding_masks_only=True,
)
class CoreContextAttention(AttentionModule):
    """Core-context-aware attention: causal, with one softmax over a core token for each group of old tokens and all recent tokens.

        n_i = max(0, floor((i - w) / p))               groups that token i sees as core tokens (i, j, t count from 1)
        alpha_jt = softmax_t(q_jp k_t^T / sqrt(d))     t in group j, which ends with token jp
        K_j = sum_t alpha_jt k_t,   V_j = sum_t alpha_jt v_t
        y_i = softmax(q_i [K_1 .. K_{n_i}; k_{n_i p + 1} .. k_i]^T / sqrt(d)) [V_1 .. V_{n_i}; v_{n_i p + 1} .. v_i]

    | paper | here |
    |---|---|
    | H, d | `num_heads`, `head_dim` |
    | group size g (p above; pooling_size in the official code) | `group_size` |
    | local window s (w above) | `window_size`; a token sees w to w + p - 1 tokens exactly |
    | core tokens C | K, V; one set for each query head, or with `core_per="kv"` for each key/value head |
    | W^Q, W^K, W^V, W^O | `q_proj`, `k_proj`, `v_proj`, `o_proj` |

    q and k are rotated before they are pooled. Up to w + p - 1 tokens, and for p = 1, this is plain causal attention.

    Args:
        dim: channels C of the tokens.
        num_heads: number of query heads H.
        num_kv_heads: number of key/value heads G, a divisor of H; None: H.
        head_dim: channels d per head; None: dim / num_heads.
        window_size: w, recent tokens that are seen exactly at least; 0 or more.
        group_size: p, tokens of a group.
        pool: how a group becomes a core token: "cca", the equation above; "mean", alpha = 1 / p; "max", the largest value of each
            channel. The latter two do not depend on queries: one core token for each key/value head.
        core_per: "query", as in the paper, or "kv": with fewer key/value heads than query heads, alpha is averaged over the query
            heads of each, so that the cache keeps G core tokens of a group and not H.
        qkv_bias: whether `q_proj`, `k_proj` and `v_proj` have a bias.
        proj_bias: whether `o_proj` has a bias.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.
        rope_theta: base of the built-in rotation, used when no `position_embeddings` are given: angle i of token t is
            t rope_theta^(-2i/d), t from 0, padding not counted. None: no rotation then.
        rope_layout: channel pairs of the rotation, "half" or "interleaved".
        layer_idx: the layer in a Hugging Face cache.

    Shape: x (B, N, C) -> (B, N, C). `attention_mask` is padding: (B, N_k) over all tokens so far, boolean or integer, 1 = a real
    token; or Hugging Face's causal mask (B, 1, N, N_k), from which the padding is read. A padding token's attention gives 0. The
    cache holds core tokens (B, H or G, floor(N / p), d) and at most w + p - 1 raw keys and values of G heads.

    Raises:
        ValueError: heads that do not divide each other or `dim`, sizes out of range, an unknown choice, tokens of another shape, a
            mask that is more than padding and causality, or that tells something else of cached tokens than before.
    """

    is_causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int = 1024,
        group_size: int = 16,
        pool: str = "cca",
        core_per: str = "query",
        qkv_bias: bool = False,
        proj_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rope_theta: float | None = 10000.0,
        rope_layout: str = "half",
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_head_split(num_heads, self.num_kv_heads)
        _check_sizes(window_size, group_size)
        check_choice("pool", pool, POOLS)
        check_choice("core_per", core_per, CORE_HEADS)
        check_choice("rope_layout", rope_layout, ROPE_LAYOUTS)
        _check_rotation(rope_theta, self.head_dim)
        self.window_size, self.group_size, self.pool, self.core_per = window_size, group_size, pool, core_per
        self.rope_theta, self.rope_layout, self.layer_idx = rope_theta, rope_layout, layer_idx
        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **factory)
        self.attn_drop = attn_drop
        self.o_proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def _settings(self) -> dict[str, Any]:
        """What the functions below need to know."""
        return {
            "window_size": self.window_size,
            "group_size": self.group_size,
            "pool": self.pool,
            "core_per": self.core_per,
            "scale": None,
            "dropout_p": self.attn_drop if self.training else 0.0,
        }

    @property
    def num_core_heads(self) -> int:
        """Core tokens that stand for one group: H, or G where they do not depend on the query head."""
        return self.num_heads if self.pool == "cca" and self.core_per == "query" else self.num_kv_heads

    def cache_elements(self, num_tokens: int) -> int:
        """Core tokens of the complete groups, and the keys and values of the tokens after those that the last token released."""
        released = max(0, (num_tokens - self.window_size) // self.group_size)
        core, raw = num_tokens // self.group_size, num_tokens - released * self.group_size
        return 2 * self.head_dim * (self.num_core_heads * core + self.num_kv_heads * raw)

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        rope_theta: float | None = None,
        **options: Any,
    ) -> Self:
        """Build this mechanism from the weights of a causal softmax attention: all are kept, there are no others.

        It computes what the source does for up to window_size + group_size - 1 tokens, and for any number with group_size=1. Memory
        is not shared with the source. From a module, its dropout rates and train mode are taken over, and its layer in a cache.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. It may have fewer key/value heads than query heads.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            rope_theta: base of a rotation that the source has built in; None: it has none, or the tables are given to forward.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: a source that is not causal, head counts that do not divide, or tensors that are missing or have no place
                here; all of them are listed.
        """
        module_given = isinstance(source, nn.Module)
        if module_given and getattr(source, "is_causal", None) is False:
            raise ValueError(f"{cls.__name__} is causal, the source is not: old and recent tokens have no meaning without an order")
        state = split_projections(source)
        inner, dim = state["q.weight"].shape
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim, num_kv_heads = whole_heads(state, num_heads)
        settings = source_settings(source) if isinstance(source, nn.Module) else {}
        settings.pop("is_causal", None)
        settings = {
            "head_dim": head_dim,
            **projection_settings(state),
            "proj_bias": "proj.bias" in state,
            "layer_idx": getattr(source, "layer_idx", None),
            **settings,
            **options,
        }
        module = cls(dim, num_heads, num_kv_heads=num_kv_heads, rope_theta=rope_theta, **settings)
        load_converted(module, separate_names(state))
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        check_tokens(x, self.dim)
        q = split_heads(self.q_proj(x), self.num_heads)
        k, v = (split_heads(projection(x), self.num_kv_heads) for projection in (self.k_proj, self.v_proj))
        if position_embeddings is not None:
            q, k = (apply_rotary(t, position_embeddings, self.rope_layout) for t in (q, k))
        layer = None if past_key_values is None else own_cache_layer(self, past_key_values, CoreContextCacheLayer)
        real = read_padding(attention_mask, x.shape[0], x.shape[1], 0 if layer is None else layer.tokens_seen)
        rotate = position_embeddings is None and self.rope_theta is not None
        out = self._attend(q, k, v, real, layer, rotate)
        return self.proj_drop(self.o_proj(merge_heads(out)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"window_size={self.window_size}, group_size={self.group_size}, pool={self.pool!r}, core_per={self.core_per!r}, "
            f"rope_theta={self.rope_theta}, attn_drop={self.attn_drop}"
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, layer: CoreContextCacheLayer | None, rotate: bool
    ) -> Tensor:
        """(B, H, N, d), from the new tokens and the layer's. With padding, each sample's real tokens are moved to the front.

        Args:
            real: (B, tokens seen and new), which tokens are no padding; None: all.
        """
        start = 0 if layer is None else layer.check_history(real)
        is_new = None if real is None else real[:, real.shape[1] - q.shape[2] :]
        order = None if is_new is None else torch.argsort(~is_new, dim=1, stable=True)
        if order is not None:
            q, k, v = (_in_order(t, order) for t in (q, k, v))
        if rotate:
            tables = self._rotary_tables(start, q.shape[2], q)
            q, k = (apply_rotary(t, tables, self.rope_layout) for t in (q, k))
        if layer is None:
            out = _attend_at_once(q, k, v, 0, **self._settings)
        else:
            out = self._attend_cached(q, k, v, layer, start, q.shape[2] if is_new is None else is_new.sum(1))
        if order is None or is_new is None:
            return out
        return _in_order(out, order.argsort(1)).masked_fill(~is_new[:, None, :, None], 0.0)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, layer: CoreContextCacheLayer, start: int | Tensor, count: int | Tensor
    ) -> Tensor:
        """The new tokens attend to the layer's and to each other; then the layer keeps what later tokens will see.

        Args:
            start: real tokens seen before, which is the position of the first query.
            count: real tokens among the new ones, (B,) with padding.
        """
        p, new, seen = self.group_size, q.shape[2], layer.tokens_seen + q.shape[2]
        key_start = layer.raw_position(start)
        k, v = layer.join_raw(k, v, start - key_start)
        group = start // p  # the one that is completed next; then how many are, at most where samples differ
        num_groups = (start + new) // p - group if isinstance(group, int) else -(-new // p)
        settings = self._settings
        if isinstance(num_groups, int) and num_groups == 0 and layer.core_keys is not None and layer.core_values is not None:
            core_k, core_v = layer.core_keys.to(k), layer.core_values.to(v)
        else:
            pooled = _pool(q, k, v, (group + 1) * p - 1 - start, group * p - key_start, int(num_groups), **settings)
            core_k, core_v = layer.join_core(pooled, group, seen // p)
        out = _attend(q, k, v, core_k, core_v, start, key_start, **settings)

        stop = start + count
        if isinstance(stop, int):
            released = max(0, (stop - self.window_size) // p) * p - int(key_start)
        else:  # as many tokens as any sample may still need
            length, released = min(seen, self.window_size + p - 1), 0
            if k.shape[2] > length + layer.room_for(k):
                k, v = (_take(t, stop - length - key_start, length) for t in (k, v))
                key_start = stop - length
        layer.keep(k, v, core_k, core_v, stop, seen, released, key_start)
        return out

    def _rotary_tables(self, start: int | Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the built-in rotation at the positions start, start + 1, ...: (N, d), or (B, N, d) where starts differ."""
        assert self.rope_theta is not None
        work = torch.promote_types(like.dtype, torch.float32)
        channels = torch.arange(0, self.head_dim, 2, device=like.device, dtype=work)
        steps = torch.arange(length, device=like.device)
        positions = steps + start if isinstance(start, int) else start.unsqueeze(-1) + steps
        angles = positions.unsqueeze(-1) * self.rope_theta ** (-channels / self.head_dim)
        angles = torch.cat([angles, angles], -1) if self.rope_layout == "half" else angles.repeat_interleave(2, -1)
        return angles.cos(), angles.sin()


class CoreContextCacheLayer(StateCacheLayer):
    """What `CoreContextAttention` keeps: core tokens of the complete groups, and raw keys and values of the recent tokens.

    A core token is pooled when its last token arrives, whose query is at hand then, and is seen once it lies a window back; until
    then the raw tokens of its group are kept too. Nothing of tokens further back is kept.

    Without padding both parts are as long as needed. With padding samples differ: each sample's tokens stand at the front of
    `core_keys` and of `keys`; what is behind them is seen by no query.

    While decoding the tensors are parts of buffers with room for 64 tokens more, to which new ones are appended in place. With
    padding `keys` is cut back only when that room is used up, since each sample's tokens have to be moved for it.

    Attributes:
        core_keys, core_values: (B, H or G, floor(N / p), d).
        keys, values: (B, G, at most w + p - 1, d).
        real_tokens: (B,) int64, tokens of each sample that were no padding; None while there was no padding.
        raw_start: (B,) int64, position of each sample's first raw token, not counting padding; negative where there are fewer
            than `keys` has room for. None while there was no padding.
    """

    core_keys: Tensor | None = None
    core_values: Tensor | None = None
    real_tokens: Tensor | None = None
    raw_start: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, _Room] = {}  # by the attribute that stands in it

    def check_history(self, real: Tensor | None) -> int | Tensor:
        """Real tokens seen of each sample, an int while there was no padding; `real` must say the same of them.

        Raises:
            ValueError: tokens that were summarised as real ones are padding now, or the other way round.
        """
        seen = self.tokens_seen
        if seen == 0 or (real is None and self.real_tokens is None):
            return seen
        counts = self.real_tokens
        if counts is None:
            assert real is not None
            counts = torch.full((real.shape[0],), seen, device=real.device)
        told = seen if real is None else real[:, :seen].sum(1)
        counts = counts if real is None else counts.to(real.device)
        refuse_where(
            counts != told,
            "attention_mask does not call the same tokens padding as it did when they were cached, and their groups are pooled; "
            "give the mask of all tokens with every call, or none from the first",
        )
        return counts

    def raw_position(self, start: int | Tensor) -> int | Tensor:
        """Position of the first raw token that is kept; `start`: that of the first new one."""
        if isinstance(start, Tensor) and self.raw_start is not None:
            return self.raw_start.to(start.device)
        return start if self.keys is None else start - self.keys.shape[2]

    def join_raw(self, k: Tensor, v: Tensor, first: int | Tensor) -> tuple[Tensor, Tensor]:
        """The raw tokens that are kept, and the new ones: number `first`, `first` + 1, ... of them."""
        total = k.shape[2] + (0 if self.keys is None else self.keys.shape[2])
        return self._append("keys", k, first, total), self._append("values", v, first, total)

    def room_for(self, keys: Tensor) -> int:
        """Tokens that may be kept beyond what is needed: those keys stand in a buffer that has them anyway."""
        room = self._rooms.get("keys")
        return _ROOM if room is not None and room.tokens is keys else 0

    def join_core(self, new: tuple[Tensor, Tensor], first: int | Tensor, total: int) -> tuple[Tensor, Tensor]:
        """The core tokens that are kept, and the new ones: those of the groups `first`, `first` + 1, ...; `total` at most."""
        core_k, core_v = (
            self._append(name, part, first, total) for name, part in zip(("core_keys", "core_values"), new, strict=True)
        )
        return core_k, core_v

    def keep(
        self,
        k: Tensor,
        v: Tensor,
        core_k: Tensor,
        core_v: Tensor,
        real_tokens: int | Tensor,
        tokens_seen: int,
        released: int,
        raw_start: int | Tensor,
    ) -> None:
        """Replace everything that is kept; of k and v, which begin at the position `raw_start`, without `released` in front."""
        for name, tensor in (("keys", k), ("values", v), ("core_keys", core_k), ("core_values", core_v)):
            room = self._rooms.get(name)
            inside = room is not None and room.tokens is tensor
            if released and name in ("keys", "values"):
                tensor = tensor[:, :, released:]
                tensor = tensor if inside else tensor.clone()  # a slice would keep all of it in memory
            if room is not None and inside:
                room.tokens = tensor
            else:
                self._rooms.pop(name, None)
            setattr(self, name, tensor)
        self.real_tokens = self.raw_start = None
        if isinstance(real_tokens, Tensor):
            self.real_tokens = real_tokens
            self.raw_start = raw_start if isinstance(raw_start, Tensor) else torch.full_like(real_tokens, raw_start)
        self.tokens_seen = tokens_seen

    def _append(self, name: str, new: Tensor, first: int | Tensor, total: int) -> Tensor:
        """What is kept under `name`, and the new tokens: behind it, or where samples differ from each one's place `first` on.

        Then `total` tokens are returned, and what is behind a sample's new ones is of no matter. While decoding without gradients
        the new tokens are written behind the kept ones in the buffer that these are in, if it has room.
        """
        kept: Tensor | None = getattr(self, name)
        count = new.shape[2]
        if kept is None or not count:
            return new if kept is None else kept.to(new)
        if count > _ROOM or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _join(kept.to(new), new, first, total)
        room = self._rooms.get(name)
        if room is None or not room.takes(kept, new):
            room = self._rooms[name] = _Room(kept, new)
        return room.append(new, first, total)


class _Room:
    """A buffer that tokens (B, H, n, d) stand in, with some room behind them, so that a step of decoding does not copy all of them.

    Attributes:
        tokens: the part of the buffer that is in use. Who holds another tensor, an earlier one for instance, may not append.
    """

    def __init__(self, tokens: Tensor, new: Tensor) -> None:
        """Move tokens into a buffer of their own, of the dtype of the new ones that will follow."""
        length = tokens.shape[2]
        self._buffer = new.new_empty((*tokens.shape[:2], length + _ROOM, tokens.shape[3]))
        self._buffer[:, :, :length] = tokens
        self._buffer[:, :, length:] = 0  # what has no weight must be a number too
        self.tokens = self._buffer[:, :, :length]

    def takes(self, tokens: Tensor, new: Tensor) -> bool:
        """Whether the tokens are those of this buffer, and it has room for the new ones."""
        buffer = self._buffer
        fits = tokens is self.tokens and buffer.dtype == new.dtype and buffer.device == new.device
        fits = fits and buffer.is_inference() == torch.is_inference_mode_enabled()  # else it cannot be written to
        return fits and self._end + new.shape[2] <= buffer.shape[2]

    def append(self, new: Tensor, first: int | Tensor, total: int) -> Tensor:
        """As the layer's `_append`."""
        begin, end = self._begin, self._end
        if isinstance(first, Tensor):
            index = (begin + first.unsqueeze(-1) + torch.arange(new.shape[2], device=first.device))[:, None, :, None]
            self._buffer.scatter_(2, index.expand_as(new), new)
            length = max(end - begin, total)
        else:
            self._buffer[:, :, end : end + new.shape[2]] = new
            length = end - begin + new.shape[2]
        self.tokens = self._buffer[:, :, begin : begin + length]
        return self.tokens

    @property
    def _begin(self) -> int:
        return int(self.tokens.storage_offset()) // self._buffer.stride(2)

    @property
    def _end(self) -> int:
        return self._begin + self.tokens.shape[2]


_ROOM = 64  # tokens


def _join(kept: Tensor, new: Tensor, first: int | Tensor, total: int) -> Tensor:
    """As `CoreContextCacheLayer._append`, in a new tensor."""
    joined = torch.cat([kept, new], 2)
    if not isinstance(first, Tensor):
        return joined
    group = torch.arange(total, device=first.device)
    gap = (kept.shape[2] - first).unsqueeze(-1)  # between a sample's old and new ones
    index = torch.where(group < first.unsqueeze(-1), group, group + gap).clamp_max(joined.shape[2] - 1)
    return joined.take_along_dim(index[:, None, :, None], 2)


@pure_function("cca")
def core_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    dropout_p: float,
    real: Tensor | None = None,
    seen: Tensor | None = None,
    window_size: int = 1024,
    group_size: int = 16,
    pool: str = "cca",
    core_per: str = "query",
) -> Tensor:
    """`CoreContextAttention` as a function: all keys and values are kept, q are the last tokens of those that were seen.

    `pool="cca"` weighs a group by the query of its last token, and queries are not kept: with fewer queries than keys it is defined
    as long as no group of the past is seen as a core token. "mean" and "max" know no queries.

    Shape: q (B, H, N, d), k, v (B, G, M, d) -> (B, H, N, d); 0 for padding.

    Raises:
        ValueError: a core token would be seen whose query is gone.
    """
    settings: dict[str, Any] = {"window_size": window_size, "group_size": group_size, "pool": pool, "core_per": core_per}
    settings |= {"scale": scale, "dropout_p": dropout_p}
    new, total = q.shape[2], k.shape[2]
    if real is None and seen is None:
        _check_queries(total - new, total, total, **settings)
        return _attend_at_once(q, k, v, total - new, **settings)
    # Real tokens come first, so that groups have no padding; queries are found by their number among them.
    index = torch.arange(total, device=q.device)
    first = total - new if seen is None else seen - new
    real = (index < first + new).expand(q.shape[0], -1) if real is None else real
    is_new = real.take_along_dim((index[:new] + first).expand(q.shape[0], -1), 1)
    order = torch.argsort(~is_new, dim=1, stable=True)
    start: int | Tensor = 0
    if new < total:
        start = (real & (index < first)).sum(1)
        _check_queries(start, start + is_new.sum(1), total, **settings)
    k, v = (_in_order(t, torch.argsort(~real, dim=1, stable=True)) for t in (k, v))
    out = _attend_at_once(_in_order(q, order), k, v, start, **settings)
    return _in_order(out, order.argsort(1)).masked_fill(~is_new[:, None, :, None], 0.0)


def _check_queries(
    start: int | Tensor, stop: int | Tensor, room: int, *, window_size: int, group_size: int, pool: str, **_: Any
) -> None:
    """Raise ValueError if the queries from `start` up to `stop` see core tokens of groups that end before `start`.

    While tracing, which cannot look at tensors, it is raised unless there is no `room` for that many tokens.
    """
    if pool != "cca" or room < window_size + group_size:
        return
    lost = (start >= group_size) & (stop >= window_size + group_size)
    if isinstance(lost, Tensor):
        lost = True if torch.compiler.is_compiling() else bool(lost.any())
    if lost:
        raise ValueError(
            f"pool='cca' weighs each group by a query, and a cache keeps none: beyond {window_size + group_size - 1} tokens it is "
            "defined for whole sequences (use_cache=False). az.swap_attention(model, 'cca') decodes with a cache of its own; pool="
            "'mean' or 'max' need no queries: az.register_functional('zoo_cca_mean', 'cca', pool='mean')"
        )


def _attend_at_once(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, *, window_size: int, group_size: int, **how: Any
) -> Tensor:
    """Queries at the positions `start`, ... of the sequence whose keys are k; with starts (B,) k may go on after the last one."""
    stop = start + q.shape[2] if isinstance(start, int) else k.shape[2]
    num_core = max(0, (stop - window_size) // group_size)  # groups that the last query sees as core tokens
    settings = {"window_size": window_size, "group_size": group_size, **how}
    core_k, core_v = _pool(q, k, v, group_size - 1 - start, 0, num_core, **settings)
    return _attend(q, k, v, core_k, core_v, start, 0, **settings)


def _pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    last: int | Tensor,
    first: int | Tensor,
    num_groups: int,
    *,
    group_size: int,
    pool: str,
    core_per: str,
    scale: float | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Core tokens of consecutive groups, the first of which begins at k's index `first` and ends at q's index `last`."""
    k, v = (_take(t, first, num_groups * group_size) for t in (k, v))
    if pool == "cca":
        q = _take(q, last, num_groups, group_size)
    else:
        q = q[:, :, :1].expand(-1, -1, num_groups, -1)  # of no matter, and perhaps not at hand
    return pool_core_tokens(q, k, v, group_size=group_size, pool=pool, core_per=core_per, scale=scale)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    query_start: int | Tensor,
    key_start: int | Tensor,
    *,
    window_size: int,
    group_size: int,
    scale: float | None,
    dropout_p: float,
    **_: Any,
) -> Tensor:
    out = core_context_attention(
        q,
        k,
        v,
        core_k,
        core_v,
        window_size=window_size,
        group_size=group_size,
        query_start=query_start,
        key_start=key_start,
        scale=scale,
        dropout_p=dropout_p,
    )
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (B, H, N, D) in an order (B, N)."""
    return x.take_along_dim(order[:, None, :, None], 2)


def _take(x: Tensor, start: int | Tensor, length: int, step: int = 1) -> Tensor:
    """`length` tokens of x (B, H, N, D), every `step`-th from `start`; with starts (B,) beyond the ends whatever stands nearest."""
    if isinstance(start, int):
        return x[:, :, start : start + step * length : step]
    index = start.unsqueeze(-1) + step * torch.arange(length, device=x.device)
    return x.take_along_dim(index.clamp(0, max(x.shape[2] - 1, 0))[:, None, :, None], 2)


def _check_sizes(window_size: int, group_size: int) -> None:
    """Raise ValueError unless both are in range; the nearest legal number is named."""
    for name, value, least in (("window_size", window_size, 0), ("group_size", group_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}; the nearest is {least}")


def _check_rotation(rope_theta: float | None, head_dim: int) -> None:
    if rope_theta is None:
        return
    if not rope_theta > 0:
        raise ValueError(f"rope_theta must be positive, or None for no rotation; got {rope_theta}")
    if head_dim % 2:
        raise ValueError(
            f"the built-in rotation turns pairs of channels: head_dim must be even, got {head_dim}; the nearest is {head_dim + 1}, "
            "or give rope_theta=None"
        )
