"""Multi-head attention: every token attends to every token; the baseline that all other mechanisms are compared with.

Attention Is All You Need, arXiv 1706.03762, 2017. Parameter names are timm's (`qkv`, `proj`), so that its checkpoints load.
Deviations: a fully masked row gives 0; rotary embeddings, query/key normalisation and cross attention are options.
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
    merge_heads,
    project_qkv,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import (
    adopt_norms,
    fuse_rows,
    load_converted,
    projection_settings,
    relative_scale,
    repeat_heads,
    source_heads,
    source_settings,
    split_projections,
    whole_heads,
)
from attention_zoo.registry import PATTERNS, register_attention


@register_attention(
    "mha",
    title="Attention Is All You Need",
    arxiv="1706.03762",
    year=2017,
    repository="tensorflow/tensor2tensor",
    patterns=PATTERNS,
    kv_cache=True,
    cost="O(N^2 d h)",
    engines=("flash", "torch", "xformers", "flex"),
)
class MultiHeadAttention(AttentionModule):
    """Multi-head attention: every token attends to every token.

        head_i = softmax(q_i k_i^T / sqrt(d)) v_i          y = concat_i(head_i) W_o

    | paper | here |
    |---|---|
    | h, d = d_k = d_v | `num_heads`, `head_dim` |
    | W^Q, W^K, W^V | rows of `qkv`, in this order |
    | W^O | `proj` |

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h.
        head_dim: channels d per head; None: dim / num_heads.
        qkv_bias: whether `qkv` has a bias.
        qk_norm: normalise q and k per head with `norm_layer` (before any rotation).
        scale_norm: normalise the concatenated heads before `proj` (timm's option).
        norm_layer: class of those normalisations, called with the number of channels.
        proj_bias: whether `proj` has a bias.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.
        is_causal: each token attends to itself and those before it; the last query stands at the last key.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved".
        context_dim: channels of `context`; None: dim.

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C).

    Raises:
        ValueError: heads that do not divide `dim`, an unknown layout, tokens or masks of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
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
        self.is_causal, self.rope_layout = is_causal, rope_layout
        self.context_dim = dim if context_dim is None else context_dim
        inner = num_heads * self.head_dim
        if self.context_dim == dim:
            self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)
        else:
            self.q = nn.Linear(dim, inner, bias=qkv_bias, **factory)
            self.kv = nn.Linear(self.context_dim, 2 * inner, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.norm = norm_layer(inner, **factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build this mechanism from the weights of a softmax attention; it computes what the source does.

        Grouped key/value heads are repeated, another scale of the logits goes into the queries (or into their normalisation).
        Memory is not shared with the source. From a module, its dropout rates, causality, normalisations and train mode are taken
        over.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. It may have fewer key/value heads than query heads.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            options: further constructor arguments; they win over the settings of the source. For a state dict with normalisations
                give their norm_layer.

        Raises:
            ValueError: head counts that do not divide, a scale that normalised queries cannot take over, or tensors that are
                missing or have no place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), context_dim = state["q.weight"].shape, state["k.weight"].shape[1]
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim, num_kv_heads = whole_heads(state, num_heads)
        check_head_split(num_heads, num_kv_heads)
        parts, causal = {name.partition(".")[0] for name in state}, getattr(source, "is_causal", None)
        settings = {
            "head_dim": head_dim,
            **projection_settings(state),
            "qkv_bias": any(f"{part}.bias" in state for part in "qkv"),
            "proj_bias": "proj.bias" in state,
            "qk_norm": "q_norm" in parts or not isinstance(getattr(source, "q_norm", nn.Identity()), nn.Identity),
            "scale_norm": "norm" in parts,
            "context_dim": context_dim,
            **({"is_causal": causal} if isinstance(causal, bool) else {}),
            **(source_settings(source) if isinstance(source, nn.Module) else {}),
        }
        module = cls(dim, num_heads, **{**settings, **options})
        adopt_norms(module, source, ("q_norm", "k_norm", "norm"))
        module._load_softmax_attention(state, relative_scale(source, head_dim))
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def _load_softmax_attention(self, state: Mapping[str, Tensor], scale: float) -> None:
        """Load q, k, v, proj and normalisations; `scale` is that of the source's logits to ours."""
        normed = not isinstance(self.q_norm, nn.Identity)
        if normed and scale != 1.0:
            if not isinstance(self.q_norm, (nn.LayerNorm, nn.RMSNorm)) or "q_norm.weight" not in state:
                raise ValueError(
                    f"the source scales its logits by {scale:g} / sqrt(head_dim), and its {type(self.q_norm).__name__} of queries "
                    "has no weight that is known to take that over"
                )
            state = {name: tensor * scale if name.startswith("q_norm.") else tensor for name, tensor in state.items()}
        whole = repeat_heads(state, self.num_heads, 1.0 if normed else scale)
        load_converted(self, fuse_rows(whole, "qkv" if self.context_dim == self.dim else "kv"))

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        check_tokens(x, self.dim)
        q, k, v = self._project(x, context)
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        out = attend(
            self,
            self.q_norm(q),
            self.k_norm(k),
            v,
            cross=context is not None,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
        )
        return self.proj_drop(self.proj(self.norm(merge_heads(out))))

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        check_context(context, self.dim, self.context_dim)
        if self.context_dim == self.dim:
            inner = self.num_heads * self.head_dim
            return project_qkv(self.qkv, x, context, (inner, inner, inner))
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.q(x), k, v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, is_causal={self.is_causal}"
