"""LePE attention: every token attends to every token, and a depthwise convolution adds what stands nearby.

The last stage of BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810, 2023; LePE, the locally enhanced
positional encoding, is CSWin Transformer's (arXiv 2107.00652). Follows the official code (rayleizhu/BiFormer): its first
implementation convolves the input of the attention, its later one the values.
Deviations: dropout is an option; the softmax is float32; class tokens may stand before the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.attention.base import (
    AttentionModule,
    attend,
    check_choice,
    check_grid,
    check_head_split,
    check_tokens,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import (
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
from attention_zoo.registry import register_attention

__all__ = ["LepeAttention", "LocalPositionEncoding"]

LEPE_SOURCES = ("x", "v")


class LocalPositionEncoding(nn.Conv2d):
    """LePE: a depthwise convolution, stride 1, that keeps the size of the map (zeros outside).

    Shape: x (B, H, W, C) -> (B, H, W, C), with `add`, of the same shape, added to it.

    Raises:
        ValueError: an even kernel, which cannot keep the size.
    """

    def __init__(self, dim: int, kernel_size: int, *, device: Any = None, dtype: Any = None) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"side_dwconv is the side of a kernel that keeps the map's size, odd, or 0 for none; got {kernel_size}, "
                f"the nearest is {max(kernel_size + 1, 0)}"
            )
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return ops.depthwise_conv2d(x, self.weight, self.bias, add=add)


@register_attention(
    "lepe_attention",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arxiv="2303.08810",
    year=2023,
    repository="rayleizhu/BiFormer",
    patterns={"noncausal_self"},
    spatial=True,
    prefix_tokens=True,
    cost="O(N^2 C + N s^2 C)",
    engines=("flash", "torch", "xformers", "flex", "triton"),
)
class LepeAttention(AttentionModule):
    """LePE attention: multi-head attention over the whole grid, plus a depthwise convolution of the input or the values.

        y = (concat_i(softmax(q_i k_i^T / sqrt(d)) v_i) + DWConv_s(x or v)) W_o

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | W_q, W_k, W_v | rows of `qkv`, in this order |
    | LePE(.), its kernel s | `lepe`, `side_dwconv` |
    | W_o | `proj` |

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h; the official models have 8 whatever their width.
        qkv_bias: whether `qkv` has a bias.
        qk_scale: factor of the logits; None (or 0): 1 / sqrt(d).
        side_dwconv: side s of the convolution's kernel, odd; 0: no convolution.
        lepe_on: what is convolved, the input "x" or the values "v".
        num_prefix_tokens: tokens before the grid, a class token for instance; they take no part in LePE.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, P + N, C), P = num_prefix_tokens, N = H * W row-major -> (B, P + N, C).

    Raises:
        ValueError: heads that do not divide `dim`, an even kernel, an unknown `lepe_on`, a grid that is not N tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        lepe_on: str = "x",
        num_prefix_tokens: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("lepe_on", lepe_on, LEPE_SOURCES)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads)
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be at least 0, got {num_prefix_tokens}")
        self.side_dwconv, self.lepe_on, self.num_prefix_tokens = side_dwconv, lepe_on, num_prefix_tokens
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.lepe = LocalPositionEncoding(dim, side_dwconv, **factory) if side_dwconv else None
        self.proj = nn.Linear(dim, dim, **factory)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build this mechanism from the weights of a softmax attention; LePE starts at zero, so it computes what the source does.

        Grouped key/value heads are repeated, the logits keep the source's scale. Memory is not shared with the source. From a
        module, its dropout rates, scale and train mode are taken over.

        Args:
            source: an attention module or its state dict: timm's or the zoo's fused `qkv` and `proj`, or separate projections.
            num_heads: query heads of the source; needed for a state dict, and for modules without a `num_heads`.
            options: further constructor arguments (`num_prefix_tokens`, ...); they win over the settings of the source.

        Raises:
            ValueError: a causal source, heads that are together not as wide as the tokens, or tensors without a place here
                (normalised queries and keys); all of them are listed.
        """
        if getattr(source, "is_causal", False):
            raise ValueError("the source is causal: LePE attention attends both ways over a grid of image patches")
        state = split_projections(source)
        inner, dim = state["q.weight"].shape
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim, num_kv_heads = whole_heads(state, num_heads)
        check_head_split(num_heads, num_kv_heads)
        if inner != dim:
            raise ValueError(
                f"LePE attention has dim / num_heads channels in each head: {num_heads} heads of {head_dim} are not {dim}"
            )
        rates: dict[str, Any] = source_settings(source) if isinstance(source, nn.Module) else {}
        settings: dict[str, Any] = {
            "qk_scale": relative_scale(source, head_dim) * head_dim**-0.5,
            **projection_settings(state),
            "qkv_bias": any(f"{part}.bias" in state for part in "qkv"),
            **{name: rates[name] for name in ("attn_drop", "proj_drop") if name in rates},
        }
        module = cls(dim, num_heads, **{**settings, **options})
        own = {"proj.bias": state["proj.weight"].new_zeros(dim), **fuse_rows(repeat_heads(state, num_heads), "qkv")}
        still = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items() if name.startswith("lepe.")}
        load_converted(module, {**still, **own})
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def forward(self, x: Tensor, *, grid_size: tuple[int, int]) -> Tensor:
        check_tokens(x, self.dim)
        image = x[:, self.num_prefix_tokens :]
        grid_size = check_grid(image, grid_size)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = merge_heads(attend(self, *(split_heads(t, self.num_heads) for t in (q, k, v)), scale=self.scale))
        if self.lepe is not None:
            source = image if self.lepe_on == "x" else v[:, self.num_prefix_tokens :]
            nearby = self.lepe(source.unflatten(1, grid_size)).flatten(1, 2)
            if self.num_prefix_tokens:
                prefix, patches = out.tensor_split([self.num_prefix_tokens], dim=1)
                out = torch.cat([prefix, patches + nearby], dim=1)
            else:
                out = out + nearby
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, side_dwconv={self.side_dwconv}, lepe_on={self.lepe_on!r}"
        return text + (f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else "")
