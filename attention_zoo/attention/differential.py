"""What differential attention (`diff.py`) and its grouped form (`gda.py`) share: signal maps minus lambda times noise maps.

One layout serves both: the query heads stand in M groups of G signal heads and their noise head; with G = 1 that is differential
attention. In style "v1" signal and noise maps have keys of their own and values of twice the width, in style "v2" they share both,
so that all maps are one ordinary grouped-query attention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import (
    ROPE_LAYOUTS,
    AttentionModule,
    apply_rotary,
    attend,
    check_choice,
    check_context,
    check_cross,
    check_head_split,
    check_tokens,
    drop,
    extend_cache,
    merge_heads,
    resolve_head_dim,
    resolve_visibility,
    split_heads,
)
from attention_zoo.attention.conversion import (
    load_converted,
    projection_settings,
    separate_names,
    source_heads,
    source_settings,
    split_projections,
    whole_heads,
)
from attention_zoo.ops.differential import difference_factor, split_maps

__all__ = [
    "LAMBDA_VECTORS",
    "STYLES",
    "DifferentialAttention",
    "RMSNorm",
    "SoftmaxSource",
    "depth_lambda",
    "pair_heads",
    "start_token_lambda",
    "stripe_heads",
    "warn_not_preserving",
]

STYLES = ("v1", "v2")
LAMBDA_MODES = ("scalar", "token")
LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
CLOSED = -8.0  # bias of lambda_proj that starts with lambda = sigmoid(-8) = 3e-4


class DifferentialAttention(AttentionModule):
    """Base of the differential mechanisms; see `DiffAttention` and `GroupedDiffAttention` for the equations and the arguments.

    Attributes:
        num_heads: signal heads S, which are the output heads.
        num_noise_heads: noise heads M; each is shared by G = S / M signal heads.
        num_kv_heads: heads of keys and values; in style "v1" each is a pair of keys and one value of width 2d.
        value_dim: channels of an output head, 2d in style "v1", d in "v2".
        pairing: how heads are paired, "interleaved" (neighbours) or "halves" (DiffLlama's).
        lambda_init: constant term of a scalar lambda; 0 where lambda is a token's.
    """

    pairing: str = "interleaved"
    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_noise_heads: int,
        *,
        style: str,
        head_dim: int | None,
        num_kv_heads: int | None,
        lambda_mode: str | None,
        lambda_init: float,
        lambda_bias: bool,
        sub_norm: bool | None,
        sub_norm_affine: bool,
        norm_eps: float,
        qkv_bias: bool,
        proj_bias: bool,
        qk_norm: bool,
        attn_drop: float,
        proj_drop: float,
        is_causal: bool,
        rope_layout: str,
        context_dim: int | None,
        layer_idx: int | None,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("rope_layout", rope_layout, ROPE_LAYOUTS)
        v1 = style == "v1"
        self.style, self.lambda_mode = style, lambda_mode or ("scalar" if v1 else "token")
        check_choice("lambda_mode", self.lambda_mode, LAMBDA_MODES)
        if lambda_bias and self.lambda_mode == "scalar":
            raise ValueError(
                "lambda_bias is the bias of a token's lambda; a scalar lambda has lambda_init: leave lambda_bias False"
            )
        self.dim, self.num_heads, self.num_noise_heads = dim, num_heads, num_noise_heads
        self.head_dim = _resolve_head_dim(dim, num_heads, head_dim, heads_per_output=2 if v1 else 1)
        self.value_dim = 2 * self.head_dim if v1 else self.head_dim
        self.num_kv_heads = num_noise_heads if num_kv_heads is None else num_kv_heads
        self.is_causal, self.rope_layout, self.layer_idx = is_causal, rope_layout, layer_idx
        self.context_dim = dim if context_dim is None else context_dim
        self.sub_norm = v1 if sub_norm is None else sub_norm
        self.lambda_init = lambda_init if self.lambda_mode == "scalar" else 0.0

        inner, kv_inner = (num_heads + num_noise_heads) * self.head_dim, self.num_kv_heads * self.value_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        if self.lambda_mode == "token":
            self.lambda_proj = nn.Linear(dim, num_heads, bias=lambda_bias, **factory)
        else:
            single = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            for name in LAMBDA_VECTORS:
                self.register_parameter(name, nn.Parameter(torch.empty(self.head_dim, device=device, dtype=single)))
            self._reset_lambda()
        if self.sub_norm:
            self.subln = RMSNorm(self.value_dim, eps=norm_eps, elementwise_affine=sub_norm_affine, **factory)
        self.o_proj = nn.Linear(num_heads * self.value_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """PyTorch's own initialisation; the vectors of a scalar lambda are normal with deviation 0.1."""
        super().reset_parameters()
        if self.lambda_mode == "scalar":
            self._reset_lambda()

    def _reset_lambda(self) -> None:
        for name in LAMBDA_VECTORS:
            nn.init.normal_(getattr(self, name), std=0.1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: those of lambda and the sub-norm."""
        return {name for name, _ in self.named_parameters() if name.startswith(("lambda_", "subln."))}

    def cache_elements(self, num_tokens: int) -> int:
        return 2 * self.num_kv_heads * self.value_dim * num_tokens

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
        check_context(context, self.dim, self.context_dim)
        check_cross(context is not None, position_embeddings, past_key_values)
        source = x if context is None else context
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads + self.num_noise_heads))
        k, v = self.k_proj(source), self.v_proj(source)
        groups = self.num_noise_heads
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] > 1:
            q, groups = self._one_noise_map_each(q), self.num_heads  # a mask for each signal head, which both its maps see
        of_style = self._attend_to_pairs if self.style == "v1" else self._attend_to_shared
        heads = of_style(q, k, v, groups, self._lambda(x), attention_mask, position_embeddings, past_key_values)
        return drop(self.proj_drop, self.o_proj(merge_heads(heads)))

    def _attend_to_pairs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: int,
        factor: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Any,
    ) -> Tensor:
        """Style "v1": q (B, heads, N, d), k and v (B, M, H_kv * 2d) -> differences (B, S, N, 2d).

        The noise maps are computed once for each group. The cache holds H_kv heads of width 2d: [k_1, k_2], and v.
        """
        k = self.k_norm(split_heads(k, 2 * self.num_kv_heads))
        if position_embeddings is not None:
            q, k = (apply_rotary(t, position_embeddings, self.rope_layout) for t in (q, k))
        v = split_heads(v, self.num_kv_heads) if self.pairing == "interleaved" else self._join_halves(v)
        static = noise_q = noise_k = None
        if past_key_values is not None:
            q, noise_q = split_maps(q, groups, self.pairing)
            joint, v, static = extend_cache(self, past_key_values, self._join_keys(k), v)
            k, noise_k = joint[..., : self.head_dim], joint[..., self.head_dim :]
        mask, is_causal = resolve_visibility(self, attention_mask, static, q.shape[2], v.shape[2])
        dropout = self.attn_drop if self.training else 0.0
        return ops.differential_attention(
            q,
            k,
            v,
            factor,
            noise_q=noise_q,
            noise_k=noise_k,
            groups=groups,
            pairing=self.pairing,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=dropout,
            **self._norm(),
        )

    def _attend_to_shared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: int,
        factor: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Any,
    ) -> Tensor:
        """Style "v2", all maps in one call: q (B, heads, N, d), k and v (B, M, H_kv * d) -> differences (B, S, N, d)."""
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] > 1:
            attention_mask = attention_mask.repeat_interleave(2, dim=1)
        out = attend(
            self,
            q,
            self.k_norm(split_heads(k, self.num_kv_heads)),
            split_heads(v, self.num_kv_heads),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
        )
        return ops.subtract_noise(out, None, factor, groups=groups, **self._norm())

    def _norm(self) -> dict[str, Any]:
        """The sub-norm and its factor, as the operations take them."""
        return {"weight": self.subln.weight, "eps": self.subln.eps, "gain": 1.0 - self.lambda_init} if self.sub_norm else {}

    def _lambda(self, x: Tensor) -> Tensor:
        """lambda in float32: a scalar, or one number for each token of x and signal head (B, N, S)."""
        if self.lambda_mode == "token":
            logits = self.lambda_proj(x)
            return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        work = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (getattr(self, name).to(work) for name in LAMBDA_VECTORS)
        return difference_factor(q1, k1, q2, k2, self.lambda_init)

    def _join_keys(self, k: Tensor) -> Tensor:
        """(B, 2 H_kv, M, d) -> (B, H_kv, M, 2d), key j from the two of a pair; a view where they lie side by side in memory."""
        if self.pairing == "interleaved":
            return split_heads(merge_heads(k), self.num_kv_heads)
        return torch.cat(split_maps(k, self.num_kv_heads, self.pairing), dim=-1)

    def _join_halves(self, v: Tensor) -> Tensor:
        """Pairing "halves": (B, M, 2 H_kv * d) -> (B, H_kv, M, 2d), value j from the heads j and j + H_kv."""
        return torch.cat(split_maps(split_heads(v, 2 * self.num_kv_heads), self.num_kv_heads, self.pairing), dim=-1)

    def _one_noise_map_each(self, q: Tensor) -> Tensor:
        """Query heads with the noise head of each group repeated for each of its signal heads: (B, 2S, N, d)."""
        if self.num_noise_heads == self.num_heads:
            return q
        grouped = q.unflatten(1, (self.num_noise_heads, -1))
        signal, noise = grouped[:, :, :-1], grouped[:, :, -1:]
        return torch.stack([signal, noise.expand_as(signal)], dim=3).flatten(1, 3)

    def _load_conversion(self, state: Mapping[str, Tensor], source: nn.Module | Mapping[str, Tensor]) -> None:
        """Load converted tensors; lambda and the sub-norm keep what they are. Takes over the train mode of a module."""
        new = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(("lambda_", "subln."))}
        load_converted(self, {**new, **state})
        if isinstance(source, nn.Module):
            self.train(source.training)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_noise_heads={self.num_noise_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, style={self.style!r}, lambda_mode={self.lambda_mode!r}, lambda_init={self.lambda_init:g}, "
            f"is_causal={self.is_causal}"
        )


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least; returns the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(work)
        return F.rms_norm(x.to(work), tuple(self.normalized_shape), weight, self.eps).to(x.dtype)


def depth_lambda(depth: int) -> float:
    """lambda_init of the layer with this index, counted from 0: 0.2, 0.36, 0.47, ... towards 0.8."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def _resolve_head_dim(dim: int, num_heads: int, head_dim: int | None, heads_per_output: int) -> int:
    """`head_dim` if given, else what makes the output heads, of `heads_per_output` times that width, fill `dim`."""
    resolve_head_dim(dim, num_heads, 1 if head_dim is None else head_dim)  # positive numbers
    if head_dim is not None:
        return head_dim
    wanted = heads_per_output * num_heads
    if dim % wanted:
        legal = [h for h in range(1, dim + 1) if dim % (heads_per_output * h) == 0]
        nearest = min(legal, key=lambda h: (abs(h - num_heads), h), default=None)
        raise ValueError(
            f"dim={dim} is not divisible by {f'{heads_per_output} * ' if heads_per_output > 1 else ''}num_heads={num_heads}: give "
            "head_dim" + ("" if nearest is None else f"; the nearest num_heads that needs none is {nearest}")
        )
    return dim // wanted


# --- from softmax attention -------------------------------------------------------------------------------------------------------


class SoftmaxSource:
    """A pretrained softmax attention as the conversions read it: projections, numbers of heads, settings.

    Attributes:
        state: its tensors, named q, k, v, proj; and q_norm, k_norm.
        num_heads, num_kv_heads, head_dim: of the source.
        settings: constructor arguments of ours that keep what the source does.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], num_heads: int | None) -> None:
        self.state = split_projections(source)
        (inner, self.dim), context_dim = self.state["q.weight"].shape, self.state["k.weight"].shape[1]
        self.num_heads = num_heads or source_heads(source, inner)
        self.head_dim, self.num_kv_heads = whole_heads(self.state, self.num_heads)
        check_head_split(self.num_heads, self.num_kv_heads)
        self.settings: dict[str, Any] = {
            "head_dim": self.head_dim,
            **projection_settings(self.state),
            "proj_bias": "proj.bias" in self.state,
            "qk_norm": "q_norm.weight" in self.state,
            "context_dim": context_dim,
        }
        if isinstance(source, nn.Module):
            is_causal, norm = getattr(source, "is_causal", None), getattr(source, "q_norm", None)
            eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
            found = {"is_causal": is_causal, "norm_eps": eps, "layer_idx": getattr(source, "layer_idx", None)}
            self.settings |= {**source_settings(source), **{k: v for k, v in found.items() if v is not None}}

    def projections(self) -> dict[str, Tensor]:
        """The tensors under our names."""
        return separate_names(self.state)


def stripe_heads(state: Mapping[str, Tensor], num_heads: int, num_noise_heads: int, noise: float = 0.0) -> dict[str, Tensor]:
    """Insert after each group of query heads a noise head, the mean of the group's plus `noise` times its deviation.

    Keys, values and the output projection stay: style "v2".
    """
    striped = dict(state)
    for name in ("q_proj.weight", "q_proj.bias"):
        if name in state:
            heads = state[name].unflatten(0, (num_noise_heads, num_heads // num_noise_heads, -1))
            mean = heads.mean(1, keepdim=True)
            if noise and name.endswith("weight"):
                mean = mean + noise * mean.std() * torch.randn_like(mean)
            striped[name] = torch.cat([heads, mean], dim=1).flatten(0, 2)
    return striped


def pair_heads(
    state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, ratio: int
) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
    """Pairs of key/value heads as k_1, k_2 and one wide value: style "v1". Returns the state and (S, M, H_kv).

    The query heads of the first key/value head of a pair are signal heads, those of the second are averaged, `ratio` at a time, to
    noise heads. The output projection's columns follow the halves of the values.

    Raises:
        ValueError: an odd number of key/value heads, or groups that the ratio does not divide.
    """
    if num_kv_heads % 2 or (num_heads // num_kv_heads) % ratio:
        raise ValueError(
            f"style 'v1' pairs key/value heads and makes one noise head of {ratio} query heads of a group: {num_heads} query heads "
            f"on {num_kv_heads} key/value heads cannot be shared out so"
        )
    pairs, group = num_kv_heads // 2, num_heads // num_kv_heads
    paired = dict(state)
    for name in ("q_proj.weight", "q_proj.bias"):
        if name in state:
            signal, other = state[name].unflatten(0, (pairs, 2, group // ratio, ratio, -1)).unbind(1)
            paired[name] = torch.cat([signal, other.mean(2, keepdim=True)], dim=2).flatten(0, 3)
    columns = state["o_proj.weight"].unflatten(1, (pairs, 2, group, -1))
    paired["o_proj.weight"] = columns.transpose(2, 3).flatten(1)
    return paired, (num_heads // 2, num_heads // 2 // ratio, pairs)


def start_token_lambda(module: DifferentialAttention) -> float:
    """Let lambda be the same for every token: nearly 0 with lambda_bias, else 1 / 2. Returns that number."""
    with torch.no_grad():
        module.lambda_proj.weight.zero_()
        if module.lambda_proj.bias is None:
            return 0.5
        module.lambda_proj.bias.fill_(CLOSED)
    return 1.0 / (1.0 + math.exp(-CLOSED))


def warn_not_preserving(why: str) -> None:
    """Say that a converted layer does not compute what its source did."""
    warnings.warn(f"the converted layer does not compute what its source did: {why}; train it", stacklevel=3)
