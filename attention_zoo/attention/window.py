"""Swin's windows: softmax attention inside square windows of a grid, which are shifted in every other block.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030, 2021. What hosts with windows share: the
attention of their softmax blocks (not a mechanism of its own in the registry), and the way into windows and back.
Deviations: grids that windows do not divide are filled up with zeros on the right and bottom, as in Swin's detection code.
"""

from __future__ import annotations

import math

import torch
from timm.layers import to_2tuple
from timm.models import swin_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import merge_heads, split_heads
from attention_zoo.ops.windows import takes_windows

__all__ = ["WindowAttention", "fit_shift", "fit_window", "from_windows", "resize_positions", "shift_mask", "to_windows"]

Grid = tuple[int, int]


class WindowAttention(swin_transformer.WindowAttention):
    """Swin's softmax attention in windows: logits get a bias by the relative position, and -100 across the seams of a shift.

    Parameters and buffers are timm's; the computation goes through our engines.

    Shape: windows (B * windows, w * w, C), mask (windows, w * w, w * w) -> (B * windows, w * w, C).
    """

    relative_position_bias_table: nn.Parameter
    window_size: Grid

    def set_window_size(self, window_size: int | Grid) -> None:
        """Resample the table (bicubic) to other windows, as the official loader does."""
        table, wanted = self.relative_position_bias_table, to_2tuple(window_size)
        old, new = ((2 * height - 1, 2 * width - 1) for height, width in (self.window_size, wanted))
        with torch.no_grad():
            resized = resize_positions(table[None], old, new)[0].contiguous()
        self.window_size, self.window_area = wanted, math.prod(wanted)
        self.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)
        index = swin_transformer.get_relative_position_index(*wanted, device=table.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        bias, windows = self._get_rel_pos_bias(), 1
        if mask is not None:
            windows = mask.shape[0]
            bias = bias + mask[:, None]  # (windows, heads, w * w, w * w)
        if self._takes_kernel(q):
            return self._project(self._attend_by_kernel(q, k, v, bias))
        if mask is not None:
            bias = bias.flatten(0, 1)[None]  # windows stand beside the heads, so that no bias is repeated over the batch
            q, k, v = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (q, k, v))
        out = ops.attention(q, k, v, bias=bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        if mask is not None:
            out = out.unflatten(1, (windows, self.num_heads)).flatten(0, 1)
        return self._project(out)

    def _takes_kernel(self, q: Tensor) -> bool:
        """Whether our kernel serves the windows, and nobody looks on, who would see them as maps of one window."""
        height, width = self.window_size
        dropout_p = self.attn_drop.p if self.training else 0.0
        return height == width and not ops.is_observed() and takes_windows(q, height, q.shape[-1], dropout_p)

    def _attend_by_kernel(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """(B * windows, heads, w * w, D) and bias (windows or 1, heads, w * w, w * w) -> (B * windows, heads, w * w, D)."""
        q, k, v = (t.unflatten(2, self.window_size) for t in (q, k, v))
        return ops.window_attention(q, k, v, window_size=self.window_size[0], bias=bias).flatten(2, 3)

    def _project(self, out: Tensor) -> Tensor:
        out = self.proj_drop(self.proj(merge_heads(out)))
        assert isinstance(out, Tensor)
        return out


def fit_window(grid_size: Grid, window: int) -> int:
    """The largest window up to this one that a grid has room for."""
    return min(window, *grid_size)


def fit_shift(grid_size: Grid, window: int, shift: int) -> int:
    """No shift where a window spans the grid."""
    return 0 if min(grid_size) <= window else shift


def to_windows(x: Tensor, grid_size: Grid, window: int, shift: int) -> Tensor:
    """Tokens (B, H * W, C) -> windows (B * windows, w * w, C) of the shifted grid, filled up with zeros on the right and bottom."""
    image = x.unflatten(1, grid_size)
    below, right = (-side % window for side in grid_size)
    if below or right:
        image = F.pad(image, (0, 0, 0, right, 0, below))
    if shift:
        image = image.roll((-shift, -shift), (1, 2))
    return swin_transformer.window_partition(image, (window, window)).flatten(1, 2)


def from_windows(windows: Tensor, grid_size: Grid, window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`; what filled up the grid is cut off."""
    (height, width), (rows, columns) = grid_size, (math.ceil(side / window) for side in grid_size)
    image = windows.unflatten(1, (window, window)).unflatten(0, (windows.shape[0] // (rows * columns), rows, columns))
    image = image.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift:
        image = image.roll((shift, shift), (1, 2))
    return image[:, :height, :width].flatten(1, 2)


def shift_mask(like: Tensor, grid_size: Grid, window: int, shift: int) -> Tensor | None:
    """-100 where a shift brought opposite sides into one window, else 0, (windows, w * w, w * w); None without a shift."""
    if not shift:
        return None
    bands = []
    for side in grid_size:
        place = torch.arange(-(-side // window) * window, device=like.device)
        bands.append((place >= len(place) - window).int() + (place >= len(place) - shift).int())
    regions = 3 * bands[0][:, None] + bands[1]
    regions = swin_transformer.window_partition(regions[None, ..., None], (window, window)).flatten(1)
    return -100.0 * (regions[:, :, None] != regions[:, None, :]).to(like.dtype)


def resize_positions(positions: Tensor, grid_size: Grid, wanted: Grid) -> Tensor:
    """Position embeddings (1, H * W, C) of one grid, resampled (bicubic) to another."""
    if grid_size == tuple(wanted):
        return positions
    image = positions.transpose(1, 2).unflatten(2, grid_size)
    image = F.interpolate(image.float(), size=wanted, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(positions.dtype)
