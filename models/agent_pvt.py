"""Agent-PVT: the Pyramid Vision Transformer with agent attention in place of its spatial reduction.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023; official code
LeapLabTHU/Agent-Attention. Four stages, each of patches, a learned position table and blocks; no class token, no final norm, a
mean over the tokens. Images of any size run on the same weights: what the patches do not cover is left out, position and bias
tables are resampled. Training recipe: AdamW, learning rate 5e-4 * batch / 512, weight decay 0.05 on all tables as well, 5 warm-up
epochs of 300, gradients clipped at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import Mlp, calculate_drop_path_rates, register_notrace_function, register_notrace_module, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention_zoo.attention.agent import resize_grid
from attention_zoo.attention.base import AttentionModule, attend, merge_heads, resolve_head_dim, split_heads
from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import Grid, PreNormBlock, PyramidClassifier, check_stages, init_linear, patches, run_blocks, to_map
from ._timm import AGENT_PAPER, create_variant, imagenet_cfg

__all__ = ["AgentPVT", "SpatialReductionAttention"]


@register_notrace_module  # a leaf for torch.fx, as the registered mechanisms are
class SpatialReductionAttention(AttentionModule):
    """PVT's own attention (the paper's baseline, letter B): softmax over keys of which r x r are merged by a strided convolution.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads.
        sr_ratio: side r of the squares; 1: all keys.
        qkv_bias: whether `q` and `kv` have a bias.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        resolve_head_dim(dim, num_heads)
        self.num_heads, self.sr_ratio, self.attn_drop = num_heads, sr_ratio, attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, *, grid_size: Grid) -> Tensor:
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(to_map(x, grid_size)).flatten(2).transpose(1, 2))
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), *self.kv(source).chunk(2, dim=-1)))
        return self.proj_drop(self.proj(merge_heads(attend(self, q, k, v))))


class AgentPVT(PyramidClassifier):
    """Agent-PVT classifier.

    Args:
        img_size: side or (H, W) of the images; position and bias tables are as large as their grids.
        patch_size: side of the first stage's patches; the other stages have 2.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads, and hidden width of the MLPs over it, of each stage.
        qkv_bias: whether the attentions' projections of queries, keys and values have a bias.
        sr_ratios: side of the squares of tokens that are merged into one key, of each stage with attention B.
        agent_sr_ratios: the same of each stage with agents.
        agent_num: number of agents of each stage, a square.
        agent_grid: grid of the agents that are pooled in each stage, or None for a stage or all of them: as many as its agent_num.
        attn_type: a letter for each stage: A for agents, B for PVT's own attention.
        attention: the mechanism of the stages with agents, any registered one that does noncausal self attention.
        attention_kwargs: its options.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position tables.
        proj_drop_rate: dropout in the MLPs and after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32).

    Raises:
        ValueError: lists of different lengths, unknown letters, an image too small for the stages, a mechanism that cannot stand
            here or that lacks a setting.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: str | Sequence[int] = "1111",
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_grid: Sequence[Grid | None] | None = None,
        attn_type: str = "AAAA",
        attention: str = "agent",
        attention_kwargs: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_stages(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            agent_sr_ratios=agent_sr_ratios,
            agent_num=agent_num,
            agent_grid=agent_grid or [None] * len(depths),
            attn_type=attn_type,
        )
        if set(attn_type) - {"A", "B"}:
            raise ValueError(f"attn_type must have the letters A (agents) and B (PVT's own attention), got {attn_type!r}")
        check_attention(attention, "Agent-PVT")
        self.patch_size, self.attention, self.attn_type = patch_size, attention, attn_type
        self._set_sizes(embed_dims, in_chans, num_classes, patch_size, "block", first=1)
        self.img_size, self.grids = to_2tuple(img_size), self._grids_of(img_size)

        host = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (width, grid) in enumerate(zip(embed_dims, self.grids, strict=True)):
            before, side = (in_chans, patch_size) if i == 0 else (embed_dims[i - 1], 2)
            patch_embed = patches(before, width, side, padded=False, **factory)
            if attn_type[i] == "A":
                own = {"agent_num": agent_num[i], "window_size": grid, "sr_ratio": int(agent_sr_ratios[i]), "split_qkv": True}
                own["agent_grid"] = agent_grid[i] if agent_grid else None
                own = {**(own if attention == "agent" else {}), **(attention_kwargs or {})}
                build = partial(build_attention, attention, width, num_heads[i], host, own)
            else:
                build = partial(SpatialReductionAttention, width, num_heads[i], sr_ratio=sr_ratios[i], **host)
            mlp = partial(Mlp, width, int(width * mlp_ratios[i]), drop=proj_drop_rate, **factory)
            blocks = [PreNormBlock(width, build(), mlp(), norm_eps=1e-6, drop_path=rate, **factory) for rate in rates[i]]
            self.add_module(f"patch_embed{i + 1}", patch_embed)
            self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.empty(1, grid[0] * grid[1], width, **factory)))
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self._create_end(nn.Identity(), drop_rate, global_pool, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """The official initialisation. A mechanism other than agent attention keeps its own."""
        blocks = [block for i in range(self.num_stages) for block in self._stage(i)[2]]
        own = {"A": self.attention != "agent", "B": False}
        letters = [self.attn_type[i] for i in range(self.num_stages) for _ in self._stage(i)[2]]
        foreign = {m for block, letter in zip(blocks, letters, strict=True) if own[letter] for m in block.attn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in foreign:
                init_linear(module)
        for i in range(self.num_stages):
            trunc_normal_(self._stage(i)[1], std=0.02)

    def _stage(self, i: int) -> tuple[Any, Any, Any]:
        """Patch embedding, position table and blocks of stage i, from 0; the official names count from 1."""
        return getattr(self, f"patch_embed{i + 1}"), getattr(self, f"pos_embed{i + 1}"), getattr(self, f"block{i + 1}")

    def _grids_of(self, img_size: int | tuple[int, int]) -> list[Grid]:
        """The grid of each stage. Raises ValueError for an image that leaves nothing."""
        height, width = (side // self.patch_size for side in to_2tuple(img_size))
        least = self.patch_size * 2 ** (self.num_stages - 1)
        if min(height, width) < 2 ** (self.num_stages - 1):
            raise ValueError(
                f"img_size={to_2tuple(img_size)} leaves nothing for the last of {self.num_stages} stages; at least {least}"
            )
        return [(height // 2**i, width // 2**i) for i in range(self.num_stages)]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position tables, and the bias tables of the attentions that have some, for another image size."""
        grids = self._grids_of(img_size)
        for i, grid in enumerate(grids):
            _, table, blocks = self._stage(i)
            resized = nn.Parameter(_resize_positions(table.detach(), self.grids[i], grid), requires_grad=table.requires_grad)
            setattr(self, f"pos_embed{i + 1}", resized)
            for block in blocks:
                if callable(resize := getattr(block.attn, "set_window_size", None)):
                    resize(grid)
        self.img_size, self.grids = to_2tuple(img_size), grids

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: each stage's patches and positions, then its blocks (or a stage each)."""
        fine = [(r"^(?:patch_embed|pos_embed)(\d+)", (-1,)), (r"^block(\d+)\.(\d+)", None)]
        coarsely = r"^(?:patch_embed|pos_embed|block)(\d+)"
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": coarsely if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """None by name: the official recipe decays the position and bias tables."""
        return set()

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        found: list[tuple[Tensor, Grid]] = []
        for i in range(self.num_stages if num_stages is None else num_stages):
            patch_embed, positions, blocks = self._stage(i)
            x = patch_embed(to_map(*found[-1]) if found else x)  # (B, H, W, C)
            grid = (x.shape[1], x.shape[2])
            x = self.pos_drop(x.flatten(1, 2) + _resize_positions(positions, self.grids[i], grid))
            x = run_blocks(blocks, x, grid, self.grad_checkpointing)
            found.append((x, grid))
        return found

    def prune_stages(self, last: int) -> None:
        for i in range(last + 1, self.num_stages):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{i + 1}")
        self.grids = self.grids[: last + 1]


@torch.fx.wrap
@register_notrace_function
def _resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """(1, H * W, C) on another grid, bilinearly; a leaf for torch.fx, since it compares sizes."""
    if old == new:
        return table
    return resize_grid(to_map(table, old), new).flatten(2).transpose(1, 2).to(table.dtype)


# The published variants. The bare name is the family's configurable entry point, the tiny one unless the arguments say otherwise.
_TINY: dict[str, Any] = {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1}
_MEDIUM: dict[str, Any] = {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_pvt": _TINY,
    "agent_pvt_t": _TINY,
    "agent_pvt_s": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "agent_pvt_m": _MEDIUM,
    "agent_pvt_m_256": {**_MEDIUM, "img_size": 256},
    "agent_pvt_l": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
}
_CFG: dict[str, Any] = {"first_conv": "patch_embed1.proj", **AGENT_PAPER}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(preset.get("img_size", 224), **_CFG) for name, preset in _VARIANTS.items()}
)


def _create_agent_pvt(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(AgentPVT, variant, pretrained, {**_VARIANTS[variant], **kwargs})


@register_model
def agent_pvt(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT of any size; Agent-PVT-T unless the arguments say otherwise."""
    return _create_agent_pvt("agent_pvt", pretrained, **kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT-T, 11.6 M parameters, 2.0 G multiply-adds at 224."""
    return _create_agent_pvt("agent_pvt_t", pretrained, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT-S, 20.6 M parameters, 4.0 G multiply-adds at 224."""
    return _create_agent_pvt("agent_pvt_s", pretrained, **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT-M, 35.9 M parameters, 7.0 G multiply-adds at 224."""
    return _create_agent_pvt("agent_pvt_m", pretrained, **kwargs)


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT-M for images of 256 x 256, 36.1 M parameters, 9.1 G multiply-adds there."""
    return _create_agent_pvt("agent_pvt_m_256", pretrained, **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-PVT-L, 48.7 M parameters, 10.3 G multiply-adds at 224."""
    return _create_agent_pvt("agent_pvt_l", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "agent_pvt", **_preset)
