"""Deformable token merging: a 2x2 strided convolution whose four taps move to where the image is worth reading.

Less is More: Pay Less Attention in Vision Transformers, arXiv 2105.14217, 2021 (LITv1); the downsampler of LITv1 and LITv2. Follows
the official code (ziplab/LITv2), whose operator is `torchvision.ops.deform_conv2d` with stride 2 and without modulation.
Deviations: pure PyTorch, one `grid_sample` for all taps, so that it runs, compiles and differentiates on every device; any batch
size and any grid from 2x2 on; sampling is float32 (float64 stays float64) under reduced precision, and under autocast all of it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import AttentionModule, check_grid, check_tokens
from attention_zoo.registry import register_attention

__all__ = ["DeformableConv2d", "DeformableTokenMerging"]


@register_attention(
    "dtm",
    title="Less is More: Pay Less Attention in Vision Transformers",
    arxiv="2105.14217",
    year=2021,
    repository="ziplab/LITv2",
    patterns={"noncausal_self"},
    spatial=True,
    cost="O(N C C_out)",
    engines=("torch",),
    keeps_shape=False,
    min_grid_size=(2, 2),
)
class DeformableTokenMerging(AttentionModule):
    """Deformable token merging: every 2x2 cells become one token, read from four points that the tokens themselves displace.

        y = GELU(BatchNorm(b + sum_k W_k X(p + p_k + dp_k)))     p_k: the four cells of a 2x2 block at p
        dp = W_off * X + b_off                                   2x2 convolution, stride 2: (dy, dx) for each of the four
        X(p) for fractional p: bilinear, 0 outside the grid

    | paper | here |
    |---|---|
    | W_k, b | `conv.weight`, `conv.bias` |
    | W_off, b_off | `conv.conv_offset`, channels (dy, dx) of the first tap, of the second, ... |
    | BatchNorm | `norm` |

    Offsets start at 0, as a plain convolution. The paper's recipe trains `conv.conv_offset.weight` at a hundredth of the learning
    rate. The last row or column of an odd grid is reached only through offsets.

    Args:
        dim: channels C of the tokens.
        out_dim: channels of the result; None: 2 * dim.

    Shape: x (B, H * W, C) -> (B, floor(H / 2) * floor(W / 2), out_dim).

    Raises:
        ValueError: numbers that are not positive, a grid that is not N tokens or is smaller than 2x2.
    """

    def __init__(self, dim: int, out_dim: int | None = None, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        if dim < 1 or out_dim < 1:
            raise ValueError(f"dim and out_dim must be positive, got dim={dim}, out_dim={out_dim}")
        self.dim, self.out_dim = dim, out_dim
        self.conv = DeformableConv2d(dim, out_dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor, *, grid_size: tuple[int, int]) -> Tensor:
        check_tokens(x, self.dim)
        height, width = check_grid(x, grid_size)
        if height < 2 or width < 2:
            raise ValueError(f"2x2 cells become one: grid_size must be at least (2, 2), got {(height, width)}; use a larger image")
        merged = self.conv(x.transpose(1, 2).unflatten(2, (height, width)))
        # Every token is a sample of its own to the normalisation. The statistics are the same, and torch 2.15's CPU backward, which
        # is wrong for a map of one sample whose gradient has another memory layout, is right for maps of one pixel.
        normed = self.norm(merged.flatten(0, 1)[:, :, None, None])
        return self.act(normed).view_as(merged)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, out_dim={self.out_dim}"


class DeformableConv2d(nn.Module):
    """2x2 convolution with stride 2 whose taps are displaced: `torchvision.ops.deform_conv2d(x, conv_offset(x), ..., stride=2)`.

    Shape: x (B, C, H, W) -> tokens (B, floor(H / 2) * floor(W / 2), out_channels).
    """

    def __init__(self, in_channels: int, out_channels: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 2, 2, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        self.conv_offset = nn.Conv2d(in_channels, 8, kernel_size=2, stride=2, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Conv2d's initialisation, and offsets of 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        with ops.no_autocast(x):
            x = x.to(self.weight.dtype)
            exact = torch.promote_types(x.dtype, torch.float32)  # positions of more than 256 are not exact in bfloat16
            taps = _sample(x.to(exact), self.conv_offset(x).to(exact))
            columns = taps.flatten(1, 2).flatten(2).transpose(1, 2)  # (B, H/2 * W/2, C * 4): channels, then taps, as in the weight
            return F.linear(columns.to(x.dtype), self.weight.flatten(1), self.bias)


def _sample(x: Tensor, offset: Tensor) -> Tensor:
    """The four displaced taps of every 2x2 block: x (B, C, H, W), offset (B, 8, h, w) -> (B, C, 4, h, w)."""
    height, width = x.shape[2:]
    rows, columns = offset.shape[2:]
    tap = torch.arange(4, device=x.device)[:, None, None]
    y = 2 * torch.arange(rows, device=x.device)[None, :, None] + tap // 2 + offset[:, 0::2]  # (B, 4, h, w)
    x_position = 2 * torch.arange(columns, device=x.device)[None, None, :] + tap % 2 + offset[:, 1::2]
    # without align_corners -1 and 1 are the outer edges of the map: a side of 1 is no special case
    grid = torch.stack([(2 * x_position + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    taps = F.grid_sample(x, grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False)
    return taps.unflatten(2, (4, rows))
