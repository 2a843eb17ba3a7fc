"""Halo attention: each block of pixels attends to itself and a margin around it, with learned relative positions.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731, 2021. No official code exists; timm's
`HaloAttn` (huggingface/pytorch-image-models) is followed, whose weights load unchanged.
Deviations: `mask_padding` keeps what lies outside the image out of the softmax and allows grids of any size, where timm attends to
zeros and needs whole blocks; an output projection (`out_proj`); tokens before the grid (`num_prefix_tokens`); dropout; biases start
at zero; the softmax is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from timm.layers import make_divisible
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import (
    AttentionModule,
    check_grid,
    check_tokens,
    drop,
    has_hooks,
    is_bare,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import load_converted, projection_settings, source_heads, source_settings, split_projections
from attention_zoo.attention.functional import pure_function
from attention_zoo.ops._one_node import weight_and_bias
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.halo_layer import HaloParts, HaloSettings, halo_layer, takes_layer
from attention_zoo.registry import register_attention

__all__ = ["HaloAttention", "halo"]

_PLAIN = {Tensor, nn.Parameter}  # types of what is data and nothing else


class RelativePositions(nn.Module):
    """Two tables of relative positions, rows (2 win - 1) by channels of a head."""

    def __init__(self, win_size: int, head_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * win_size - 1, head_dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * win_size - 1, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=table.shape[1] ** -0.5)


@register_attention(
    "halo",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    arxiv="2103.12731",
    year=2021,
    repository=None,
    patterns={"noncausal_self"},
    spatial=True,
    prefix_tokens=True,
    grid_multiple=(8, 8),
    cost="O(N (b + 2h)^2 C)",
    engines=("triton", "reference"),
)
class HaloAttention(AttentionModule):
    """Halo attention: the b x b queries of a block share the (b + 2h) x (b + 2h) keys in and around it.

        y = W_o concat_heads(o),   o(i, j) = sum_rc p(i, j, r, c) v(r, c)      cells (r, c) of the window, win = b + 2h a side
        p(i, j) = softmax_rc(q k(r, c) / sqrt(d) + q (R_h[r - i + win - 1] + R_w[c - j + win - 1]))

    | paper | here |
    |---|---|
    | b, h | `block_size`, `halo_size` |
    | win = b + 2h | `win_size` |
    | number of heads; d of q and k; width of a head's values | `num_heads`, `head_dim`, `value_dim` |
    | W_q | `q`, rows (head, d) |
    | W_k, W_v | `kv`: for each head d rows of keys, then its rows of values |
    | relative positions R_h, R_w, of all heads | `pos_embed.height_rel`, `pos_embed.width_rel` |
    | W_o, ours | `proj` |

    (i, j) counts the queries of a block and (r, c) the cells of its window, which starts h cells above and left of it; the first
    rows of both tables are never read. With stride 2 and an even b, the queries are every second pixel and (i, j) counts those;
    with an odd b or `avg_down`, the output of stride 1 is averaged over 2 x 2 pixels.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads.
        head_dim: channels d of a head's queries and keys; None: make_divisible(dim_out * qk_ratio, 8) / num_heads, rounded down.
        dim_out: channels of the output, a multiple of num_heads; None: dim.
        block_size: side b of the blocks.
        halo_size: width h of the margin.
        stride: 1, or 2 to halve the grid.
        qk_ratio: width of queries and keys over dim_out, where head_dim is None.
        qkv_bias: whether `q` and `kv` have a bias.
        avg_down: halve the grid by averaging, whatever b.
        scale_pos_embed: divide the position term by sqrt(d) as well.
        mask_padding: what lies outside the image is not attended to, and the grid may be of any size. False, as in timm: keys and
            values of zero stand there and count in the softmax; b must divide H and W.
        num_prefix_tokens: class or register tokens before the grid. They attend to all tokens, and all patches to them besides
            their window, without positions.
        out_proj: whether there is an output projection.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, P + N, C), N = H * W row-major -> (B, P + N / stride^2, dim_out); or, without prefix tokens, x (B, C, H, W) ->
    (B, dim_out, H / stride, W / stride). Halves are rounded up where queries are strided, down where outputs are averaged.

    Raises:
        ValueError: numbers that do not go together, a grid that b does not divide (without `mask_padding`), that is not N tokens,
            or that has nothing to average.
        TypeError: tokens without grid_size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        dim_out: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        num_prefix_tokens: int = 0,
        out_proj: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        _check_numbers(dim, block_size, halo_size, stride, num_prefix_tokens)
        self.dim, self.dim_out, self.num_heads = dim, dim if dim_out is None else dim_out, num_heads
        self.value_dim = resolve_head_dim(self.dim_out, num_heads)
        self.head_dim = _resolve_query_dim(self.dim_out, num_heads, head_dim, qk_ratio)
        self.block_size, self.halo_size, self.stride = block_size, halo_size, stride
        self.win_size = block_size + 2 * halo_size
        self.averages = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if self.averages else stride
        self.scale_pos_embed, self.mask_padding, self.num_prefix_tokens = scale_pos_embed, mask_padding, num_prefix_tokens
        inner = num_heads * self.head_dim
        self.q = nn.Conv2d(dim, inner, 1, stride=self.query_stride, bias=qkv_bias, **factory)
        self.kv = nn.Conv2d(dim, inner + self.dim_out, 1, bias=qkv_bias, **factory)
        self.pos_embed = RelativePositions(self.win_size, self.head_dim, **factory)
        self.proj = nn.Linear(self.dim_out, self.dim_out, **factory) if out_proj else nn.Identity()
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """timm's initialisation; biases are zero."""
        layers = [(self.q, self.dim**-0.5), (self.kv, self.dim**-0.5), (self.proj, 0.02)]
        for layer, std in layers:
            if not isinstance(layer, nn.Identity):
                nn.init.trunc_normal_(layer.weight, std=std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.pos_embed.reset_parameters()

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build halo attention from the weights of a multi-head attention, with position tables of zero.

        The result is the source restricted to the windows (with mask_padding=True, which is the default here); it computes what
        the source does when one block holds the whole grid. Start with a large halo and shrink it. Memory is not shared with the
        source. From a module, its dropout rates and train mode are taken over.

        Args:
            source: an attention module or its state dict: timm's or the zoo's fused `qkv` and `proj`, or separate projections.
            num_heads: heads of the source; needed for a state dict, and for modules without a `num_heads`.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: a causal or grouped source, one with another scale of the logits or heads that do not make up its width, or
                tensors that are missing or have no place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), kv_shape = state["q.weight"].shape, tuple(state["k.weight"].shape)
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        if inner != dim or kv_shape != (dim, dim) or dim % num_heads:
            raise ValueError(
                f"halo attention needs as many key/value heads as query heads, which together have the width of the tokens: with "
                f"{num_heads} heads, q.weight is {(inner, dim)} and k.weight {kv_shape}"
            )
        settings = {
            "head_dim": dim // num_heads,
            **projection_settings(state),
            "mask_padding": True,
            **_source_settings(source, dim // num_heads),
        }
        module = cls(dim, num_heads, **{**settings, **options})
        module._load_softmax_attention(state)
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def _load_softmax_attention(self, state: Mapping[str, Tensor]) -> None:
        """Copy q, k, v and proj; the tables become zero."""
        tables = {f"pos_embed.{n}": torch.zeros_like(p) for n, p in self.pos_embed.named_parameters()}
        own = {n: t for n, t in state.items() if n.partition(".")[0] not in {"q", "k", "v", "proj"}}
        for kind in ("weight", "bias"):
            if f"q.{kind}" in state:
                q, k, v = (state[f"{name}.{kind}"].unflatten(0, (self.num_heads, -1)) for name in "qkv")
                maps = {"q": q.flatten(0, 1), "kv": torch.cat([k, v], 1).flatten(0, 1)}  # keys and values head by head
                own |= {f"{n}.{kind}": t[..., None, None] if kind == "weight" else t for n, t in maps.items()}
        own["proj.weight"] = state["proj.weight"]
        own["proj.bias"] = state.get("proj.bias", own["proj.weight"].new_zeros(self.dim_out))
        load_converted(self, {**own, **tables})

    def forward(self, x: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        if x.ndim == 4:
            self._check_map(x, grid_size)
            if (layer := self._of_one_node(x, (x.shape[2], x.shape[3]))) is not None:
                cells = x.flatten(2).transpose(1, 2).contiguous()
                return self._in_one_node(cells, layer).transpose(1, 2).unflatten(2, x.shape[2:])
            out, _ = self._attend(x)
            return self.proj_drop(self.proj(out.movedim(1, -1))).movedim(-1, 1)
        check_tokens(x, self.dim)
        if grid_size is None:
            raise TypeError("forward() of tokens needs grid_size=(H, W)")
        if not self.num_prefix_tokens and (layer := self._of_one_node(x, check_grid(x, grid_size))) is not None:
            return self._in_one_node(x, layer)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        image = patches.transpose(1, 2).unflatten(2, check_grid(patches, grid_size))
        out, prefix_out = self._attend(image, prefix if self.num_prefix_tokens else None)
        tokens = out.flatten(2).transpose(1, 2)
        if prefix_out is not None:
            tokens = torch.cat([prefix_out, tokens], 1)
        return self.proj_drop(self.proj(tokens))

    def _of_one_node(self, x: Tensor, grid_size: tuple[int, int]) -> tuple[HaloSettings, HaloParts] | None:
        """What `_in_one_node` takes; None unless our kernels serve all of the layer as it is, and nobody looks on."""
        if self.query_stride > 1 or self.averages or not stands_alone(x) or ops.is_observed():
            return None
        layers: Any = self._modules  # modules find attributes slowly
        q, kv, proj, positions = layers["q"], layers["kv"], layers["proj"], layers["pos_embed"]
        without = type(proj) is nn.Identity
        if not (_is_pointwise(q) and _is_pointwise(kv)) or (has_hooks(proj) if without else not is_bare(proj)):
            return None
        of_proj = (None, None) if without else weight_and_bias(proj)
        parts = HaloParts(*weight_and_bias(q), *weight_and_bias(kv), positions.height_rel, positions.width_rel, *of_proj)
        if (parts.query_bias is None) != (parts.pair_bias is None) or not {type(parts.rows), type(parts.columns)} <= _PLAIN:
            return None
        settings = HaloSettings(grid_size, self.num_heads, self.block_size, self.halo_size, self.scale_pos_embed, self.mask_padding)
        return (settings, parts) if takes_layer(x, settings, (self.head_dim, self.value_dim), self._dropout) else None

    def _in_one_node(self, x: Tensor, layer: tuple[HaloSettings, HaloParts]) -> Tensor:
        """`forward` of tokens with one node of autograd, whose books take longer than a GPU takes for a small map."""
        return drop(self.proj_drop, halo_layer(x, *layer))

    def _attend(self, image: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) and (B, P, C) -> (B, dim_out, H / stride, W / stride) and (B, P, dim_out), before the output projection."""
        if self.averages and min(image.shape[2:]) < 2:
            raise ValueError(
                f"the output is averaged over 2 x 2 pixels: both sides must be at least 2, got {tuple(image.shape[2:])}"
            )
        cells = project_map(self.q, image).unflatten(-1, (self.num_heads, -1))
        pairs = project_map(self.kv, image).unflatten(-1, (self.num_heads, -1)).split([self.head_dim, self.value_dim], -1)
        q, k, v = (t.permute(0, 3, 1, 2, 4) for t in (cells, *pairs))  # the split comes first: its gradient is one plain copy then
        result = ops.halo_attention(
            q,
            k,
            v,
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            block_size=self.block_size,
            halo_size=self.halo_size,
            query_stride=self.query_stride,
            scale_positions=self.scale_pos_embed,
            mask_padding=self.mask_padding,
            dropout_p=self._dropout,
            return_lse=prefix is not None,
        )
        if prefix is None:
            out, prefix_out = result, None
        else:
            out, prefix_out = self._attend_with_prefix(prefix, q, k, v, *result)
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)  # type: ignore[union-attr]  # channels (head, d)
        return F.avg_pool2d(out, 2) if self.averages else out, prefix_out

    def _attend_with_prefix(
        self, prefix: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the prefix keys to the softmax of the patches (`out`, `lse`), and let the prefix queries attend to all tokens."""
        column = prefix.transpose(1, 2).unsqueeze(-1)  # (B, C, P, 1)
        q_prefix = self.q(column.repeat_interleave(self.query_stride, 2)).flatten(2).transpose(1, 2)
        kv_prefix = split_heads(self.kv(column).flatten(2).transpose(1, 2), self.num_heads)
        k_prefix, v_prefix = kv_prefix.split([self.head_dim, self.value_dim], -1)
        first = (split_heads(q_prefix, self.num_heads), k_prefix, v_prefix)
        merged, prefix_out = _join_prefix(first, q, k, v, out, lse, scale=None, dropout_p=self._dropout)
        return merged, merge_heads(prefix_out)

    @property
    def _dropout(self) -> float:
        return self.attn_drop if self.training else 0.0

    def _check_map(self, x: Tensor, grid_size: tuple[int, int] | None) -> None:
        """Raise ValueError unless `x` is (B, dim, H, W) that this module can take."""
        if x.shape[1] != self.dim:
            raise ValueError(f"x must be (B, N, C) or (B, C, H, W) with C = {self.dim}, got shape {tuple(x.shape)}")
        if self.num_prefix_tokens:
            raise ValueError(f"a map (B, C, H, W) has no place for num_prefix_tokens={self.num_prefix_tokens}: give tokens")
        if grid_size is not None and tuple(grid_size) != tuple(x.shape[2:]):
            raise ValueError(f"grid_size={tuple(grid_size)} is not that of x {tuple(x.shape)}; leave it out")

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, block_size={self.block_size}, halo_size={self.halo_size}"
        text += f", stride={self.stride}, mask_padding={self.mask_padding}"
        return text + (f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else "")


def project_map(layer: nn.Module, image: Tensor) -> Tensor:
    """A 1 x 1 convolution of (B, C, H, W), with its stride -> (B, H', W', C').

    On CUDA as a matrix product over the cells, which leaves the channels of a cell side by side, where the kernel reads them: a
    convolution may transpose the map on either side, each way about as long as the attention takes.
    """
    if image.is_cuda and _is_pointwise(layer):
        return project_cells(layer, image)  # type: ignore[arg-type]
    result: Tensor = layer(image).movedim(1, -1)
    return result


def _is_pointwise(layer: Any) -> bool:
    """Whether a layer is a matrix of weights and a bias for each cell, or for each of some cells."""
    return is_bare(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding == (0, 0)


def project_cells(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """What `project_map` does on CUDA."""
    rows, columns = layer.stride
    return F.linear(image[:, :, ::rows, ::columns].movedim(1, -1), layer.weight.flatten(1), layer.bias)


def _resolve_query_dim(dim_out: int, num_heads: int, head_dim: int | None, qk_ratio: float) -> int:
    """Channels of a head's queries and keys: `head_dim`, else the width in multiples of 8, shared out. Raises ValueError."""
    if head_dim is None:
        head_dim = make_divisible(dim_out * qk_ratio, 8) // num_heads
        if head_dim < 1 or qk_ratio <= 0:
            raise ValueError(
                f"qk_ratio={qk_ratio} gives {num_heads} heads of dim_out={dim_out} no queries; give head_dim, or at least "
                f"qk_ratio={num_heads / dim_out:g}"
            )
    return resolve_head_dim(dim_out, num_heads, head_dim)


def _check_numbers(dim: int, block_size: int, halo_size: int, stride: int, num_prefix_tokens: int) -> None:
    given = {"dim": dim, "block_size": block_size, "halo_size": halo_size, "num_prefix_tokens": num_prefix_tokens}
    for name, value in given.items():
        least = 1 if name in ("dim", "block_size") else 0
        if value != int(value) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value}; the nearest is {max(least, round(value))}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}; the nearest is {1 if stride < 2 else 2}")


def _join_prefix(
    first: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Add prefix keys to the softmax of the patches (`out`, `lse`), and let the prefix queries attend to all tokens.

    Shape: `first`, the prefix's q, k and v (B, heads, P, D); q, k, v (B, heads, H, W, D) -> (B, heads, H, W, D), (B, heads, P, D).
    """
    q_first, k_first, v_first = first
    extra = ops.attention(q.flatten(2, 3), k_first, v_first, scale=scale, dropout_p=dropout_p, return_lse=True)
    merged, _ = ops.merge_attention([out.flatten(2, 3), extra[0]], [lse.flatten(2, 3), extra[1]])
    keys, values = (torch.cat([a, b.flatten(2, 3)], 2) for a, b in ((k_first, k), (v_first, v)))
    first_out = ops.attention(q_first, keys, values, scale=scale, dropout_p=dropout_p)
    assert isinstance(first_out, Tensor)  # no log-normaliser was asked for
    return merged.unflatten(2, q.shape[2:4]), first_out


@pure_function("halo")
def halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    block_size: int = 8,
    halo_size: int = 3,
    mask_padding: bool = True,
) -> Tensor:
    """`HaloAttention` without relative positions, as a function; `mask_padding` is on, as in its conversion.

    Shape: q, k, v (B, heads, P + N, D), N = H * W row-major -> (B, heads, P + N, D).
    """
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    sizes = [num_prefix_tokens, q.shape[2] - num_prefix_tokens]
    (q_first, q), (k_first, k), (v_first, v) = (t.split(sizes, 2) for t in (q, k, v))
    q, k, v = (t.unflatten(2, grid_size) for t in (q, k, v))
    nowhere = q.new_zeros(2 * (block_size + 2 * halo_size) - 1, q.shape[-1])  # positions that add nothing to the logits
    result = ops.halo_attention(
        q,
        k,
        v,
        nowhere,
        nowhere,
        block_size=block_size,
        halo_size=halo_size,
        scale=scale,
        mask_padding=mask_padding,
        dropout_p=dropout_p,
        return_lse=True,
    )
    assert isinstance(result, tuple)
    if not num_prefix_tokens:
        return result[0].flatten(2, 3)
    out, first_out = _join_prefix((q_first, k_first, v_first), q, k, v, *result, scale=scale, dropout_p=dropout_p)
    return torch.cat([first_out, out.flatten(2, 3)], 2)


def _source_settings(source: nn.Module | Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Constructor arguments that the source's attributes tell. Raises ValueError for a source that halo attention cannot be."""
    if not isinstance(source, nn.Module):
        return {}
    if getattr(source, "is_causal", False):
        raise ValueError("the source is causal: halo attention attends both ways over a grid of image patches")
    scale = getattr(source, "scale", None)
    if isinstance(scale, float) and not math.isclose(scale, head_dim**-0.5):
        raise ValueError(f"the source scales its logits by {scale:g}; halo attention has 1 / sqrt(head_dim) = {head_dim**-0.5:g}")
    return {name: value for name, value in source_settings(source).items() if name in {"attn_drop", "proj_drop"}}
