"""Differential attention: each head is the difference of two softmax maps, which cancels the attention that both waste on noise.

Differential Transformer, arXiv 2410.05258, 2024 (version "v1"), and its second version, a blog post with code, 2026 ("v2"). Follows
the official code (microsoft/unilm): for grouped keys and values its flash classes, whose pairing of heads is the trained one.
Deviations: a mask adds to causality, where the official naive class lets it replace it; cross attention, query/key normalisation,
dropout (of each map on its own), a bias of v2's lambda, v1 without the sub-norm and DiffLlama's layout (`pairing="halves"`) are
options; the difference and the sub-norm are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from attention_zoo.attention.base import check_choice, check_head_split
from attention_zoo.attention.differential import (
    STYLES,
    DifferentialAttention,
    SoftmaxSource,
    depth_lambda,
    pair_heads,
    start_token_lambda,
    stripe_heads,
    warn_not_preserving,
)
from attention_zoo.ops.differential import PAIRINGS
from attention_zoo.registry import PATTERNS, register_attention

__all__ = ["DiffAttention"]


@register_attention(
    "diff",
    title="Differential Transformer",
    arxiv="2410.05258",
    year=2024,
    repository="microsoft/unilm",
    patterns=PATTERNS,
    kv_cache=True,
    cost="O(N^2 d h)",
    engines=("torch", "triton", "flash", "flex", "xformers"),
)
class DiffAttention(DifferentialAttention):
    """Differential attention: each head subtracts a second softmax map from its first.

        v1:  o_i = (A_i1 - lambda A_i2) v_j,   A_it = softmax(q_it k_jt^T / sqrt(d)),   j = floor(i h_k / h),   v_j of width 2d
             lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init           one number for the layer
             lambda_init = 0.8 - 0.6 exp(-0.3 depth)
             y = concat_i((1 - lambda_init) RMSNorm(o_i)) W_o
        v2:  o_i = (A_2i - lambda_i A_2i+1) v_j,   A_t = softmax(q_t k_j^T / sqrt(d)),   both heads of a pair on one k_j, v_j
             lambda = sigmoid(W_lambda x)                                                     one for each query token and head
             y = concat_i(o_i) W_o

    | paper | here |
    |---|---|
    | h, d | `num_heads` (the output heads), `head_dim` |
    | h_k | `num_kv_heads` |
    | W^Q, rows [q_01, q_02, q_11, q_12, ...] | `q_proj` |
    | W^K; v1: rows [k_01, k_02, k_11, ...] | `k_proj` |
    | W^V, W^O | `v_proj`, `o_proj` |
    | the four vectors of lambda | `lambda_q1`, `lambda_k1`, `lambda_q2`, `lambda_k2` |
    | W_lambda | `lambda_proj` |
    | sub-norm (GroupNorm in the paper) | `subln`, one weight of 2d for all heads |

    With pairing="halves" the rows are [q_01, q_11, ..., q_02, q_12, ...], and k_proj and v_proj alike.

    Args:
        dim: channels C of the tokens.
        num_heads: output heads h; there are twice as many query heads.
        head_dim: channels d of a query head; None: dim / (2 num_heads) in v1, dim / num_heads in v2.
        num_kv_heads: heads h_k of keys and values, a divisor of h; None: h. In v1 each is two heads of keys and a value of 2d.
        version: "v1" or "v2".
        depth: v1: index of the layer, from 0, which sets lambda_init.
        lambda_init: v1: the constant itself, instead of `depth`.
        pairing: how the rows of q, k and v are laid out, "interleaved" or, v1 only, "halves" (DiffLlama's).
        qkv_bias: whether `q_proj`, `k_proj` and `v_proj` have a bias.
        proj_bias: whether `o_proj` has a bias.
        sub_norm: normalise each head's output, and scale it by 1 - lambda_init; None: v1 does, v2 does not.
        sub_norm_affine: whether the sub-norm has a weight.
        norm_eps: epsilon of the sub-norm and of the normalisation of q and k.
        qk_norm: normalise q and k per head (RMSNorm, before any rotation).
        lambda_bias: v2: whether `lambda_proj` has a bias.
        attn_drop, proj_drop: dropout rates on the weights of either map and on the output.
        is_causal: each token attends to itself and those before it; the last query stands at the last key.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved" (the official code's).
        context_dim: channels of `context`; None: dim.
        layer_idx: the layer in a Hugging Face cache.

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C). The cache holds h_k heads of width 2d in v1, of width d in v2. An
        attention_mask applies to both maps.

    Raises:
        ValueError: heads that do not divide each other or `dim`, an unknown choice, "halves" or no lambda_bias where there is none,
            tokens or masks of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        version: str = "v1",
        depth: int = 0,
        lambda_init: float | None = None,
        pairing: str = "interleaved",
        qkv_bias: bool = False,
        proj_bias: bool = False,
        sub_norm: bool | None = None,
        sub_norm_affine: bool = True,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        lambda_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_choice("version", version, STYLES)
        check_choice("pairing", pairing, PAIRINGS)
        if pairing == "halves" and version == "v2":
            raise ValueError("pairing='halves' is a layout of version 'v1'; v2 has its pairs side by side: use 'interleaved'")
        super().__init__(
            dim,
            num_heads,
            num_heads,
            style=version,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            lambda_mode=None,
            lambda_init=depth_lambda(depth) if lambda_init is None else lambda_init,
            lambda_bias=lambda_bias,
            sub_norm=sub_norm,
            sub_norm_affine=sub_norm_affine,
            norm_eps=norm_eps,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            is_causal=is_causal,
            rope_layout=rope_layout,
            context_dim=context_dim,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        check_head_split(num_heads, self.num_kv_heads)
        self.pairing = pairing

    @property
    def version(self) -> str:
        return self.style

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        version: str = "v2",
        lambda_bias: bool = False,
        pairing: str = "interleaved",
        **options: Any,
    ) -> Self:
        """Build differential attention from the weights of a softmax attention; v2 then computes what the source does.

        v2: each query head gets a copy of itself to subtract, with lambda = 1 / 2, and the output projection is doubled; the two
        copies get different gradients. With `lambda_bias` the second head is new instead and lambda starts at sigmoid(-8): the
        source's function up to 3e-4. v1 keeps every tensor, with half as many heads of twice the width, and does not compute what
        the source did: it warns. Memory is not shared with the source.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. It may have fewer key/value heads than query heads.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            version, lambda_bias, pairing: as for the constructor.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: heads that do not divide (v1: an odd number of key/value heads), or tensors that are missing or have no
                place here; all of them are listed.
        """
        found = SoftmaxSource(source, num_heads)
        state, heads = found.projections(), (found.num_heads, found.num_heads, found.num_kv_heads)
        check_choice("version", version, STYLES)
        if version == "v1":
            state, heads = pair_heads(state, found.num_heads, found.num_kv_heads, ratio=1)
            options.setdefault("depth", found.settings.get("layer_idx") or 0)
        module = cls(
            found.dim,
            heads[0],
            num_kv_heads=heads[2],
            version=version,
            lambda_bias=lambda_bias,
            pairing=pairing,
            **{**found.settings, **options},
        )
        if version == "v1":
            if pairing == "halves":
                state = cls.change_pairing(state, "halves", heads[0], heads[2])
            warn_not_preserving("v1 has values of twice the width and normalises each head")
        else:
            state = stripe_heads(state, found.num_heads, found.num_heads)
            factor = start_token_lambda(module)
            if lambda_bias:
                state["q_proj.weight"] = _renew_noise_heads(state["q_proj.weight"], module.q_proj.weight, found.num_heads)
            else:
                state["o_proj.weight"] = state["o_proj.weight"] / (1.0 - factor)
            if module.sub_norm:
                warn_not_preserving("sub_norm=True normalises each head")
        module._load_conversion(state, source)
        return module

    @staticmethod
    def change_pairing(state: Mapping[str, Tensor], pairing: str, num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
        """A v1 layer's tensors laid out for this `pairing`, from the other one: rows of q, k and v move, all else stays."""
        check_choice("pairing", pairing, PAIRINGS)
        moved = dict(state)
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            if module in {"q_proj", "k_proj", "v_proj"} and kind in {"weight", "bias"}:
                heads = num_heads if module == "q_proj" else num_kv_heads
                split = (heads, 2, -1) if pairing == "halves" else (2, heads, -1)
                moved[name] = tensor.unflatten(0, split).transpose(0, 1).flatten(0, 2)
        return moved


def _renew_noise_heads(weight: Tensor, fresh: Tensor, num_heads: int) -> Tensor:
    """Rows of q with those of the second heads taken from `fresh`."""
    rows = weight.unflatten(0, (num_heads, 2, -1)).clone()
    rows[:, 1] = fresh.detach().unflatten(0, (num_heads, 2, -1))[:, 1]
    return rows.flatten(0, 2)
