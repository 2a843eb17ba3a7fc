"""Grouped differential attention: many signal heads share few noise heads, whose maps are subtracted from theirs.

Grouped Differential Attention, arXiv 2510.06949, 2025. No official code of its own; follows the layout of the Motif-2 checkpoints.
Deviations: style "v2", keys and values shared by both kinds of map and a lambda for each token, is the second version of
differential attention with unequal groups; `lambda_mode` exchanges the lambdas of the two styles; cross attention, query/key
normalisation and dropout are options. Several signal keys for each pair of heads (Motif's k_ratio) are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import check_choice
from attention_zoo.attention.diff import DiffAttention
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
from attention_zoo.attention.gqa import mean_pool_kv_heads
from attention_zoo.registry import PATTERNS, register_attention

__all__ = ["GroupedDiffAttention"]

BEST_RATIO = 4  # the paper's best ratios are 3 and 4 signal heads for each noise head


@register_attention(
    "gda",
    title="Grouped Differential Attention",
    arxiv="2510.06949",
    year=2025,
    repository=None,
    patterns=PATTERNS,
    kv_cache=True,
    cost="O(N^2 d (S + M))",
    engines=("torch", "triton", "flash", "flex", "xformers"),
)
class GroupedDiffAttention(DifferentialAttention):
    """Grouped differential attention: G = S / M signal heads subtract the map of one noise head, which is computed once for all.

        o_s = P_s - lambda Q_m,   m = floor(s / G)
        v1:  P_s = softmax(q_s k_j1^T / sqrt(d)) v_j,   Q_m = softmax(q_m k_j2^T / sqrt(d)) v_j,   j = floor(m H_k / M),  v_j of 2d
             lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init           one number for the layer
             lambda_init = 0.8 - 0.6 exp(-0.3 (depth + offset))
             y = concat_s((1 - lambda_init) RMSNorm(o_s)) W_o
        v2:  the same with k_j1 = k_j2 and v_j of width d
             lambda_s = sigmoid(W_lambda x)_s                                          one for each query token and signal head
             y = concat_s(o_s) W_o

    | paper | here |
    |---|---|
    | S signal heads, M noise heads, d | `num_heads` (the output heads), `num_noise_heads`, `head_dim` |
    | H_k | `num_kv_heads` |
    | W_q, rows of M groups [signal, ..., signal, noise] | `q_proj` |
    | W_k; v1: rows [k_01, k_02, k_11, ...] | `k_proj` |
    | W_v, W_o | `v_proj`, `o_proj` |
    | the four vectors of lambda | `lambda_q1`, `lambda_k1`, `lambda_q2`, `lambda_k2` |
    | W_lambda | `lambda_proj` |
    | sub-norm | `subln`, one weight of 2d for all heads |

    With G = 1 it is differential attention (`diff`).

    Args:
        dim: channels C of the tokens.
        num_heads: signal heads S.
        num_noise_heads: noise heads M, a divisor of S; None: by the G above 1 nearest to 4 that S and num_kv_heads allow.
        head_dim: channels d of a query head; None: dim / (2 num_heads) in v1, dim / num_heads in v2.
        num_kv_heads: heads H_k of keys and values, a divisor of M; None: M. In v1 each is two heads of keys and a value of 2d.
        style: "v1" or "v2".
        depth: index of the layer, from 0, which sets lambda_init in v1.
        lambda_depth_offset: added to `depth`; -1 in Motif's models.
        lambda_init: constant term of a scalar lambda; None: by depth in v1, 0 in v2.
        lambda_mode: "scalar", the four vectors, or "token", W_lambda with lambda_init = 0; None: "scalar" in v1, "token" in v2.
        lambda_bias: whether `lambda_proj` has a bias.
        sub_norm: normalise each head's output, and scale it by 1 - lambda_init; None: v1 does, v2 does not.
        qkv_bias: whether `q_proj`, `k_proj` and `v_proj` have a bias.
        proj_bias: whether `o_proj` has a bias.
        qk_norm: normalise q and k per head (RMSNorm, before any rotation).
        norm_eps: epsilon of the sub-norm and of the normalisation of q and k.
        attn_drop, proj_drop: dropout rates on the weights of either map and on the output.
        is_causal: each token attends to itself and those before it; the last query stands at the last key.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved".
        context_dim: channels of `context`; None: dim.
        layer_idx: the layer in a Hugging Face cache.

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C). The cache holds H_k heads of width 2d in v1, of width d in v2,
        whatever the number of signal heads. An attention_mask with one map for each head counts signal heads.

    Raises:
        ValueError: heads that do not divide each other or `dim`, an unknown choice, lambda_bias with a scalar lambda, tokens or
            masks of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_noise_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        style: str = "v1",
        depth: int = 0,
        lambda_depth_offset: int = 0,
        lambda_init: float | None = None,
        lambda_mode: str | None = None,
        lambda_bias: bool = False,
        sub_norm: bool | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_choice("style", style, STYLES)
        if lambda_init is None:
            lambda_init = depth_lambda(depth + lambda_depth_offset) if style == "v1" else 0.0
        super().__init__(
            dim,
            num_heads,
            self.resolve_noise_heads(num_heads, num_kv_heads, num_noise_heads),
            style=style,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            lambda_mode=lambda_mode,
            lambda_init=lambda_init,
            lambda_bias=lambda_bias,
            sub_norm=sub_norm,
            sub_norm_affine=True,
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

    @staticmethod
    def resolve_noise_heads(num_heads: int, num_kv_heads: int | None = None, num_noise_heads: int | None = None) -> int:
        """The number of noise heads M, `num_noise_heads` if given.

        Raises:
            ValueError: M does not divide S, H_k does not divide M, or H_k = S, with which every signal head needs a noise head of
                its own, and M was not given.
        """
        if num_noise_heads is not None:
            _check_divides("num_heads", num_heads, "num_noise_heads", num_noise_heads)
            if num_kv_heads is not None:
                _check_divides("num_noise_heads", num_noise_heads, "num_kv_heads", num_kv_heads)
            return num_noise_heads
        if num_heads < 1:
            return num_heads  # the constructor says that it must be positive
        if num_kv_heads is not None:
            _check_divides("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        if num_kv_heads == num_heads > 1:
            nearest = max(n for n in range(1, num_heads) if num_heads % n == 0)
            raise ValueError(
                f"num_kv_heads={num_kv_heads} leaves no heads to share a noise head; the nearest that does is {nearest}, and "
                f"num_noise_heads={num_heads} asks for one noise head each, which is differential attention"
            )
        return num_heads // _best_ratio(num_heads // (num_kv_heads or 1))

    def constructor_options(self) -> dict[str, Any]:
        grown = ("num_heads", "num_noise_heads", "num_kv_heads", "head_dim")  # `grow_signal_heads` changes heads
        return {**super().constructor_options(), **{name: getattr(self, name) for name in grown}}

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        num_noise_heads: int | None = None,
        num_kv_heads: int | None = None,
        style: str = "v2",
        lambda_mode: str = "scalar",
        lambda_bias: bool = False,
        noise: float | None = None,
        **options: Any,
    ) -> Self:
        """Build this mechanism from the weights of a softmax attention; by default it then computes what the source does.

        Style "v2" keeps every head as a signal head and puts a noise head into each group, the mean of the group's queries with a
        little noise. A scalar lambda starts at 0, so that nothing is subtracted; a token's starts at sigmoid(-8) = 3e-4 with
        `lambda_bias`, else at 1 / 2, which keeps the function only with one signal head for each noise head and no `noise` (the
        output projection is doubled). Style "v1" makes half as many heads of twice the width. What does not compute what the source
        did warns. Memory is not shared with the source.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. It may have fewer key/value heads than query heads.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            num_noise_heads: of the result; None: by the ratio nearest to 4 that keeps the source's key/value heads.
            num_kv_heads: of the result in style "v2"; None: the source's, or num_noise_heads if that is fewer: then keys and values
                are averaged over runs of heads, which does not keep the function.
            style, lambda_mode, lambda_bias: as for the constructor.
            noise: deviation of what is added to noise heads, relative to their rows'; None: 0.01, and 0 for a token's lambda
                without bias.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: heads that do not divide, or tensors that are missing or have no place here; all of them are listed.
        """
        check_choice("style", style, STYLES)
        found = SoftmaxSource(source, num_heads)
        halved = lambda_mode == "token" and not lambda_bias
        noise = (0.0 if halved else 0.01) if noise is None else noise
        if style == "v1":
            ratio = _best_ratio(found.num_heads // found.num_kv_heads)
            if num_noise_heads is not None:
                _check_divides("num_heads", found.num_heads // 2, "num_noise_heads", num_noise_heads)
                ratio = found.num_heads // 2 // num_noise_heads
            state, (heads, noise_heads, kv_heads) = pair_heads(found.projections(), found.num_heads, found.num_kv_heads, ratio)
            options.setdefault("depth", found.settings.get("layer_idx") or 0)
            why = ["style 'v1' has values of twice the width and normalises each head"]
        else:
            heads, noise_heads, kv_heads = _resolve_target(found, num_noise_heads, num_kv_heads)
            state = stripe_heads(_pool(found.projections(), found.num_kv_heads, kv_heads), heads, noise_heads, noise)
            why = [f"{found.num_kv_heads} key/value heads are averaged to {kv_heads}"] if kv_heads != found.num_kv_heads else []
        chosen = {"style": style, "lambda_mode": lambda_mode, "lambda_bias": lambda_bias}
        sizes = {"num_noise_heads": noise_heads, "num_kv_heads": kv_heads}
        module = cls(found.dim, heads, **{**found.settings, **sizes, **chosen, **options})
        if style == "v2":
            why += _start_lambda(module, state, exact=heads == noise_heads and noise == 0.0)
        if why:
            warn_not_preserving("; ".join(why))
        module._load_conversion(state, source)
        return module

    @classmethod
    def from_diff(cls, source: DiffAttention) -> Self:
        """The same function and tensors as a layer of `diff`, as groups of one signal head; memory is not shared."""
        state = source.state_dict()
        if source.pairing == "halves":
            state = source.change_pairing(state, "interleaved", source.num_heads, source.num_kv_heads)
        weight = source.q_proj.weight
        norms = [m for m in (getattr(source, "subln", None), source.q_norm) if isinstance(m, nn.RMSNorm)]
        module = cls(
            source.dim,
            source.num_heads,
            num_noise_heads=source.num_heads,
            head_dim=source.head_dim,
            num_kv_heads=source.num_kv_heads,
            style=source.version,
            lambda_init=source.lambda_init,
            lambda_bias="lambda_proj.bias" in state,
            sub_norm=source.sub_norm,
            qkv_bias=source.q_proj.bias is not None,
            proj_bias=source.o_proj.bias is not None,
            qk_norm="q_norm.weight" in state,
            norm_eps=norms[0].eps if norms and norms[0].eps is not None else 1e-5,
            attn_drop=source.attn_drop,
            proj_drop=source.proj_drop.p,
            is_causal=source.is_causal,
            rope_layout=source.rope_layout,
            context_dim=source.context_dim,
            layer_idx=source.layer_idx,
            device=weight.device,
            dtype=weight.dtype,
        )
        module._load_conversion(state, source)
        return module


def _start_lambda(module: GroupedDiffAttention, state: dict[str, Tensor], exact: bool) -> list[str]:
    """Set lambda of a converted layer to what subtracts nothing, as far as it goes; returns what changes the function."""
    why = ["sub_norm=True normalises each head"] if module.sub_norm else []
    if module.lambda_mode == "scalar":
        with torch.no_grad():  # equal products, which get opposite gradients
            module.lambda_q2.copy_(module.lambda_q1)
            module.lambda_k2.copy_(module.lambda_k1)
        return why + ([f"lambda starts at lambda_init={module.lambda_init:g}"] if module.lambda_init else [])
    factor = start_token_lambda(module)
    if module.lambda_proj.bias is not None:
        return why
    state["o_proj.weight"] = state["o_proj.weight"] / (1.0 - factor)  # exact where the noise head is a copy
    return why + ([] if exact else ["a token's lambda without lambda_bias starts at 1/2"])


def _resolve_target(found: SoftmaxSource, num_noise_heads: int | None, num_kv_heads: int | None) -> tuple[int, int, int]:
    """(S, M, H_k) of a converted layer of style "v2"."""
    kept = found.num_kv_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads is None and num_noise_heads is not None and num_noise_heads < kept:
        kept = num_noise_heads
    _check_divides("the source's key/value heads", found.num_kv_heads, "num_kv_heads", kept)
    if num_noise_heads is None:
        num_noise_heads = found.num_heads // _best_ratio(found.num_heads // kept)
    return found.num_heads, GroupedDiffAttention.resolve_noise_heads(found.num_heads, kept, num_noise_heads), kept


def _pool(state: dict[str, Tensor], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    pooled = dict(state)
    for name in state:
        if name.startswith(("k_proj.", "v_proj.")):
            pooled[name] = mean_pool_kv_heads(state[name], num_heads, num_kv_heads)
    return pooled


def _best_ratio(most: int) -> int:
    """The divisor of `most` above 1 that is nearest to `BEST_RATIO`, the smaller of two; 1 if there is none."""
    divisors = [g for g in range(2, most + 1) if most % g == 0]
    return min(divisors, key=lambda g: (abs(g - BEST_RATIO), g), default=1)


def _check_divides(name: str, number: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless `divisor` divides `number`; the nearest that does is named."""
    if divisor < 1 or number < 1 or number % divisor:
        legal = [n for n in range(1, number + 1) if number % n == 0]
        nearest = min(legal, key=lambda n: (abs(n - divisor), n), default=1)
        raise ValueError(
            f"{name}={number} does not share out evenly over {divisor_name}={divisor}; the nearest that does is {nearest}"
        )
