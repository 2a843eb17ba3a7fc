"""Agent-Swin: Swin Transformer whose first stages see the whole image, through agents, at the cost of windows.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023; official code
LeapLabTHU/Agent-Attention. A letter says what the blocks of a stage are: A agent attention, in windows as large as the map in all
published models; B Swin's softmax attention in shifted windows with relative positions; M the first few A, the rest B. Parameters
are named as the official ones.
Deviations: images of any size run on the same weights, as in the official detection code: agents see the whole map, whatever it is,
with their tables resampled; B windows stay, and the map is filled up with zeros for them. `attention` puts another mechanism in
place of the agents. Training recipe: AdamW at 5e-4 * batch / 512, weight decay 0.05, 20 warm-up epochs of 300, gradients
clipped at 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model, swin_transformer
from torch import Tensor, nn

from attention_zoo.attention.window import (
    WindowAttention,
    fit_shift,
    fit_window,
    from_windows,
    resize_positions,
    shift_mask,
    to_windows,
)
from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import Grid, PyramidClassifier, PyramidStage, block_types, check_stages, init_linear, patches
from ._timm import AGENT_PAPER, create_variant, imagenet_cfg

__all__ = ["AgentSwin", "AgentSwinBlock"]


# Leaves for torch.fx, as the mechanisms are: they decide by numbers.
register_notrace_module(WindowAttention)
for _function in (fit_shift, fit_window, from_windows, resize_positions, shift_mask, to_windows):
    register_notrace_function(_function)


class AgentSwinBlock(nn.Module):
    """Pre-norm block: attention over the whole map or in its windows, then the MLP.

    A window that covers a square map becomes the map; on a rectangle, windows are at most as wide as its shorter side. Smaller ones
    are moved by `shift_size`, which wraps around: B blocks mask what does not belong together, A blocks do not (as in the official
    code; no published model shifts A blocks).

    Args:
        dim, num_heads: width and heads.
        input_resolution: (H, W) of the map that it is meant for.
        window_size: side of the windows; None: the map.
        shift_size: how far they are shifted.
        attn_type: "A" for `attention`, "B" for Swin's.
        attention, attention_kwargs: the mechanism of A blocks and its options.
        mlp_ratio: hidden width of the MLP over its width.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        attn_drop, proj_drop, drop_path: dropout rates.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Grid,
        num_heads: int,
        window_size: int | None = 7,
        shift_size: int = 0,
        *,
        attn_type: str = "A",
        attention: str = "agent",
        attention_kwargs: Mapping[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        host = {"qkv_bias": qkv_bias, "attn_drop": attn_drop, "proj_drop": proj_drop, **factory}
        self.uses_agents = attn_type == "A" and attention == "agent"
        self.softmax_windows = attn_type == "B"
        self._set_window(input_resolution, window_size, shift_size)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn: Any
        if self.softmax_windows:
            self.attn = WindowAttention(dim, num_heads, window_size=self.window_size, **host)
        else:
            own = {"window_size": self.window_size or tuple(input_resolution)} if self.uses_agents else {}
            self.attn = build_attention(attention, dim, num_heads, host, {**own, **(attention_kwargs or {})})
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _set_window(self, input_resolution: Grid, window_size: int | None, shift_size: int) -> None:
        """Side of the windows, None where they are the map itself."""
        self.input_resolution, self.shift_size = tuple(input_resolution), shift_size
        height, width = input_resolution
        whole = window_size is None or height == width <= window_size
        shorter = min(height, width) if window_size is None else min(window_size, height, width)
        self.window_size = None if whole and not self.softmax_windows else shorter

    def set_input_size(self, input_resolution: Grid, window_size: int | None, shift_size: int) -> None:
        """Another map, and windows on it; tables are resampled to their size."""
        self._set_window(input_resolution, window_size, shift_size)
        if self.softmax_windows:
            self.attn.set_window_size(self.window_size)
        elif self.uses_agents:
            self.attn.set_window_size(to_2tuple(self.window_size or self.input_resolution))

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        x = x + self.drop_path1(self._attend(self.norm1(x), grid_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, grid_size: Grid) -> Tensor:
        if self.window_size is None:
            return self._mechanism(x, grid_size)
        shift = fit_shift(grid_size, self.window_size, self.shift_size)
        if self.softmax_windows:  # the table has the size of its window, whatever the grid
            windows = to_windows(x, grid_size, self.window_size, shift)
            windows = self.attn(windows, shift_mask(x, grid_size, self.window_size, shift))
            return from_windows(windows, grid_size, self.window_size, shift)
        window = fit_window(grid_size, self.window_size)
        windows = self._mechanism(to_windows(x, grid_size, window, shift), (window, window))
        return from_windows(windows, grid_size, window, shift)

    def _mechanism(self, x: Tensor, grid_size: Grid) -> Tensor:
        out: Tensor = self.attn(x, **({"grid_size": grid_size} if self.attn.attention_info.spatial else {}))
        return out


class AgentSwin(PyramidClassifier):
    """Agent-Swin classifier.

    Args:
        img_size: side or (H, W) of the images that it is meant for; tables and windows are sized by it. Others run as well.
        patch_size: side of the patches.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dim: channels of stage 0; they double at each stage.
        depths, num_heads: blocks and heads of each stage.
        window_size: side of the windows of A blocks, cut to the shorter side of the stage's map; B blocks have an eighth of it, at
            least 7. None: A blocks see the whole map in every stage, rectangles too, and B blocks have an eighth of stage 0's.
        agent_num: agents of each stage, squares.
        agent_grid: grid of the agents that are pooled in each stage, or None for a stage or all of them: as many as its agent_num.
            Detection has ((9, 9), (12, 12), (14, 14), (7, 7)).
        attn_type: a letter for each stage, A, B, or M; after them, if one is M, how many of its first blocks are A.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: whether the attentions' projections of queries, keys and values have a bias.
        ape: whether learned positions are added to the patches (`absolute_pos_embed`).
        patch_norm: whether the patches are normalised.
        attention: the mechanism of A blocks, any registered one that does noncausal self attention.
        attention_kwargs: its options.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in the MLPs and after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, letters that say nothing, a mechanism that cannot stand here or lacks a setting.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | None = None,
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_grid: Sequence[Grid | None] | None = None,
        attn_type: str = "AAAB",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ape: bool = False,
        patch_norm: bool = True,
        attention: str = "agent",
        attention_kwargs: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        agent_grid = [None] * len(depths) if agent_grid is None else agent_grid
        check_stages(depths=depths, num_heads=num_heads, agent_num=agent_num, agent_grid=agent_grid)
        check_attention(attention, "Agent-Swin")
        types = block_types(attn_type, depths)
        self.attention, num_stages = attention, len(depths)
        widths = [embed_dim * 2**i for i in range(num_stages)]
        self._set_sizes(widths, in_chans, num_classes, patch_size, "layers.")
        self.patch_embed = patches(in_chans, embed_dim, patch_size, normed=patch_norm, **factory)
        grids = self._plan(img_size, window_size)
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, math.prod(grids[0]), embed_dim, **factory))
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        layers = []
        for i, width in enumerate(widths):
            own = {"agent_num": agent_num[i], "agent_grid": agent_grid[i]} if attention == "agent" else {}
            blocks = [
                AgentSwinBlock(
                    width,
                    grids[i],
                    num_heads[i],
                    *self._window_of(letter, j),
                    attn_type=letter,
                    attention=attention,
                    attention_kwargs={**own, **(attention_kwargs or {})},
                    drop_path=rates[i][j],
                    **shared,
                )
                for j, letter in enumerate(types[i])
            ]
            merging = swin_transformer.PatchMerging(width, **factory) if i < num_stages - 1 else None
            layers.append(PyramidStage(blocks, merging))
        self.layers: Any = nn.ModuleList(layers)
        self._create_end(nn.LayerNorm(widths[-1], **factory), drop_rate, global_pool, **factory)
        self.init_weights()

    def _plan(self, img_size: int | Grid, window_size: int | None) -> list[Grid]:
        """Note the sizes that the model is meant for; returns the grid of each stage. Raises ValueError for an impossible one."""
        size, patch = to_2tuple(img_size), self.patch_embed.patch_size
        grids = [tuple(math.ceil(side / p) for side, p in zip(size, patch, strict=True))]
        for _ in range(self.num_stages - 1):
            grids.append(tuple(math.ceil(side / 2) for side in grids[-1]))
        if min(*size, window_size or 1) < 1:
            raise ValueError(f"img_size and window_size must be positive, got img_size={img_size}, window_size={window_size}")
        self.img_size, self.window_size, self.grid_size = size, window_size, grids[0]
        return grids

    def _window_of(self, letter: str, index: int) -> tuple[int | None, int]:
        """Window and shift of a block of this kind, the `index`th of its stage."""
        window = max(self.grid_size) if self.window_size is None else self.window_size
        if letter == "B":
            window = max(7, window // 8)
        elif self.window_size is None:
            return None, 0
        return window, window // 2 if index % 2 else 0

    def init_weights(self) -> None:
        """The official initialisation; the mechanisms have their own."""
        foreign = {m for layer in self.layers for block in layer.blocks if not block.softmax_windows for m in block.attn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in foreign:
                init_linear(module)
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def set_input_size(self, img_size: int | Grid, window_size: int | None = None) -> None:
        """Resize tables, positions and windows to other images, as if the model had been built for them; what is learned stays.

        Args:
            img_size: side or (H, W).
            window_size: of the constructor; None: as the model was built.

        Raises:
            ValueError: sizes that are not positive.
        """
        old_grid = self.grid_size
        grids = self._plan(img_size, self.window_size if window_size is None else window_size)
        if self.absolute_pos_embed is not None:
            resized = resize_positions(self.absolute_pos_embed.detach(), old_grid, self.grid_size)
            self.absolute_pos_embed = nn.Parameter(resized, self.absolute_pos_embed.requires_grad)
        for layer, grid in zip(self.layers, grids, strict=False):  # a pruned model has fewer stages
            for index, block in enumerate(layer.blocks):
                block.set_input_size(grid, *self._window_of("B" if block.softmax_windows else "A", index))

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image (B, 3, H, W) -> tokens (B, N_i, C_i) and grid of each of the first stages, before their downsampling."""
        x = self.patch_embed(x)  # (B, H, W, C)
        grid_size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        if self.absolute_pos_embed is not None:
            x = x + resize_positions(self.absolute_pos_embed, self.grid_size, grid_size)
        layers, found = list(self.layers)[:num_stages], []
        for i, layer in enumerate(layers):
            x = layer(x, grid_size)
            found.append((x, grid_size))
            if i < len(layers) - 1:
                x = layer.downsample(x.unflatten(1, grid_size))
                grid_size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        return found

    def prune_stages(self, last: int) -> None:
        self.layers = self.layers[: last + 1]
        self.layers[last].downsample = None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: a block each, then the stage's merging (or a stage each)."""
        fine = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (98,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed|^absolute_pos_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions and the absolute ones, as in the official recipe; the agents' tables are decayed."""
        names = ("relative_position_bias_table", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(names)}


# The published variants; whatever is not said is the tiny one's.
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "attn_type": "AAAB", "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "attn_type": "AABB", "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "attn_type": "AAMB2", "drop_path_rate": 0.5}
_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_swin": _TINY,
    "agent_swin_t": _TINY,
    "agent_swin_s": _SMALL,
    "agent_swin_s_288": {**_SMALL, "img_size": 288},
    "agent_swin_b": _BASE,
    "agent_swin_b_384": {**_BASE, "img_size": 384},
}
_CFG: dict[str, Any] = {"crop_mode": "squash", "first_conv": "patch_embed.proj", **AGENT_PAPER}
_SIDES = {name: preset.get("img_size", 224) for name, preset in _VARIANTS.items()}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(side, crop_pct=0.875 if side == 224 else 1.0, **_CFG) for name, side in _SIDES.items()}
)


def _create_agent_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(AgentSwin, variant, pretrained, {**_VARIANTS[variant], **kwargs})


@register_model
def agent_swin(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin of any size; Agent-Swin-T unless the arguments say otherwise."""
    return _create_agent_swin("agent_swin", pretrained, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin-T, 28.9 M parameters, 4.5 G multiply-adds at 224."""
    return _create_agent_swin("agent_swin_t", pretrained, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin-S, 49.7 M parameters, 8.7 G multiply-adds at 224."""
    return _create_agent_swin("agent_swin_s", pretrained, **kwargs)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin-S for images of 288 x 288; 14.5 G multiply-adds there."""
    return _create_agent_swin("agent_swin_s_288", pretrained, **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin-B, 88.1 M parameters, 15.4 G multiply-adds at 224."""
    return _create_agent_swin("agent_swin_b", pretrained, **kwargs)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-Swin-B fine-tuned on images of 384 x 384; 88.3 M parameters, 46.2 G multiply-adds there."""
    return _create_agent_swin("agent_swin_b_384", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "agent_swin", **_preset)
