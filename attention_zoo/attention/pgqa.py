"""Perturbed grouped-query attention: even groups, with statistics-matched noise taken off the output of every head.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention, arXiv 2408.08454, 2024. Follows the official code
(zohaib-khan5040/key-driven-gqa) where paper and code differ: the noise is uniform, standardised, on the outputs of attention, not
Gaussian on its weights, and it is there in eval as well.
Deviations: noise can be kept to training or left out, and be the same in every call in eval; padded tokens count in no statistic; a
head output of one number becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import attend, check_choice, seen_keys
from attention_zoo.attention.functional import Attend, pure_function
from attention_zoo.attention.gqa import GroupedQueryAttention, mean_pool_states, source_kv_heads
from attention_zoo.attention.kdgqa import PAPER
from attention_zoo.registry import register_attention

__all__ = ["PerturbedGroupedQueryAttention", "perturb", "perturbed_attention"]

NOISE_MODES = ("always", "train", "never")


@register_attention(
    "pgqa", stochastic=True, causal_options={"noise_mode": "never"}, engines=("flash", "torch", "xformers", "flex"), **PAPER
)
class PerturbedGroupedQueryAttention(GroupedQueryAttention):
    """Perturbed grouped-query attention: from each head's output, noise with the output's own mean and deviation is subtracted.

        O_h = softmax(q_h k_g^T / sqrt(d)) v_g, seen as one row of N d numbers       U_h ~ Uniform[0, 1), U_hh = 0
        R_h = (U_h - mean U_h) / std U_h       O_h <- O_h - (std(O_h) R_h + mean O_h)       y = concat_h(O_h) W_o

    | paper | here |
    |---|---|
    | H query heads, G groups, d | `num_heads`, `num_kv_heads`, `head_dim` |
    | U | `noise` of the forward, (G, H/G, N d), for all samples alike; h counts within the group |
    | W^Q, W^K, W^V, W^O | `q`, `k`, `v`, `proj` |

    Every row ends with mean 0. The gradient flows through mean and deviation of the output.

    Args:
        dim, num_heads, head_dim, qkv_bias, qk_norm, norm_layer, proj_bias, attn_drop, proj_drop, is_causal, rope_layout,
            context_dim: as for `GroupedQueryAttention`.
        num_kv_heads: number of key/value heads G, a divisor of H; None: H / 2, or the largest divisor below it.
        noise_mode: "always" (official, so that eval is random as well), "train" or "never" (which is `gqa`).
        eval_seed: in eval, the noise is a function of this number and of `layer_idx`, so that two calls agree; None: drawn anew
            (official).

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C).

    Raises:
        ValueError: heads that do not divide, an unknown mode, causal attention or a cache with noise (its statistics are of all
            tokens), noise of another shape or where the mode has none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        noise_mode: str = "always",
        eval_seed: int | None = None,
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
        check_choice("noise_mode", noise_mode, NOISE_MODES)
        if is_causal and noise_mode != "never":
            raise ValueError(
                f"noise_mode={noise_mode!r} takes statistics of future tokens: is_causal=True needs noise_mode='never'"
            )
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            norm_layer=norm_layer,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            is_causal=is_causal,
            rope_layout=rope_layout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.noise_mode = noise_mode
        self.eval_seed = eval_seed

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """`noise`: the raw uniforms (G, H/G, N d) of this call, drawn when None."""
        if past_key_values is not None and self.noise_mode != "never":
            raise ValueError(f"noise_mode={self.noise_mode!r} takes statistics of all tokens: a cache needs noise_mode='never'")
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
        if self.noise_mode == "always" or (self.noise_mode == "train" and self.training):
            shape = (self.num_kv_heads, self.num_heads // self.num_kv_heads, out.shape[2] * self.head_dim)
            if noise is None:
                noise = self._draw(shape, out.device)
            elif noise.shape != shape:
                raise ValueError(f"noise must be (num_kv_heads, heads per group, N * head_dim) = {shape}, got {tuple(noise.shape)}")
            out = perturb(out, noise, _real_queries(attention_mask, out.shape[2]) if context is None else None)
        elif noise is not None:
            raise ValueError(
                f"noise was given, but noise_mode={self.noise_mode!r} has none in {'train' if self.training else 'eval'} mode"
            )
        return self._output(out)

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if self.training or self.eval_seed is None:
            return torch.rand(shape, device=device)
        return hashed_uniforms(shape, self.eval_seed, self.layer_idx or 0, device)

    def extra_repr(self) -> str:
        seed = "" if self.eval_seed is None else f", eval_seed={self.eval_seed}"
        return f"{super().extra_repr()}, noise_mode={self.noise_mode!r}{seed}"


@pure_function("pgqa")
def perturbed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attend: Attend,
    attn_mask: Tensor | None,
    is_causal: bool,
    training: bool,
    qk_norm: bool,
    num_kv_heads: int | None = None,
    noise_mode: str = "always",
) -> Tensor:
    """`PerturbedGroupedQueryAttention` as a function of q, k, v and the random state.

    Shape: q (B, H, N, d), k, v (B, G', M, d) -> (B, H, N, d).

    Raises:
        ValueError: noise in causal attention; heads that do not share out evenly, or normalised keys that would have to be
            averaged.
    """
    if is_causal and noise_mode != "never":
        raise ValueError(f"noise_mode={noise_mode!r} takes statistics of future tokens: causal attention needs 'never'")
    num_kv_heads = PerturbedGroupedQueryAttention.resolve_num_kv_heads(q.shape[1], source_kv_heads(q, k, num_kv_heads))
    out = attend(q, *mean_pool_states(k, v, num_kv_heads, qk_norm))
    if noise_mode == "never" or (noise_mode == "train" and not training):
        return out
    noise = torch.rand(num_kv_heads, q.shape[1] // num_kv_heads, out.shape[2] * out.shape[3], device=out.device)
    return perturb(out, noise, _real_queries(attn_mask, out.shape[2]) if k.shape[2] == out.shape[2] else None)


def hashed_uniforms(shape: tuple[int, ...], seed: int, stream: int, device: Any = None) -> Tensor:
    """Numbers of [0, 1) that look drawn, the same on every device: a 32-bit mixer of the position, of `seed` and of `stream`.

    A generator object would do as well, but torch.compile does not take one into a graph.
    """
    mask = 0xFFFFFFFF
    start = (seed * 0x9E3779B1 + stream * 0x85EBCA77) & mask
    x = (torch.arange(math.prod(shape), device=device) * 0x9E3779B1 + start) & mask
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & mask
    return (((x >> 16) ^ x) >> 8).to(torch.float32).mul(2.0**-24).view(shape)


def perturb(heads: Tensor, noise: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Take noise with each row's own mean and deviation off the head outputs; statistics in float32 (float64 stays).

    Args:
        heads: (B, H, N, d). A row is one sample's output of one head, N * d numbers.
        noise: (G, H/G, N * d) uniforms; number i of head i of every group is set to 0 first, as in the official code.
        tokens: boolean (B, N), which tokens count; None: all.

    Shape: -> (B, H, N, d).
    """
    work = torch.float64 if heads.dtype == torch.float64 else torch.float32
    rows = heads.to(work).reshape(heads.shape[0], *noise.shape)
    counts = None if tokens is None else tokens.repeat_interleave(heads.shape[-1], dim=1)[:, None, None, :]
    diagonal = torch.eye(*noise.shape[1:], dtype=torch.bool, device=noise.device)
    uniforms = noise.to(work).masked_fill(diagonal, 0.0)
    noise_mean, noise_std = _mean_and_std(uniforms, counts)
    mean, std = _mean_and_std(rows, counts)
    standard = (uniforms - noise_mean) / torch.where(noise_std > 0, noise_std, 1.0)
    return (rows - (standard * std + mean)).reshape(heads.shape).to(heads.dtype)


def _mean_and_std(rows: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the last dimension over the numbers that count; fewer than two have deviation 0."""
    weight = rows.new_ones(rows.shape[-1]) if counts is None else counts.to(rows.dtype)
    number = weight.sum(-1, keepdim=True)
    mean = (rows * weight).sum(-1, keepdim=True) / number.clamp_min(1.0)
    variance = ((rows - mean) * weight).square().sum(-1, keepdim=True) / (number - 1.0).clamp_min(1.0)
    positive = variance > 0  # the square root has no finite slope at 0
    return mean, torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def _real_queries(attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """Which tokens (B, N) are real, in self attention: those that any query may see; None: all."""
    return seen_keys(attention_mask, num_tokens)
