"""Agent-CSwin: CSwin Transformer whose first stages read the whole image through agents instead of narrow stripes.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023; official code
LeapLabTHU/Agent-Attention, on the host of CSWin Transformer, arXiv 2107.00652. A letter says what the blocks of a stage are: A
agent attention, in stripes that are the whole map in all published models; B softmax attention in crossed stripes; M the first few
A, the rest B. Parameters are named as the official ones, those of the attention under `attn`.
Deviations: images of any size run on the same weights: tables are resampled, and what fills up the last stripe is masked;
`attention` puts another mechanism in place of the agents. Training recipe: AdamW at 5e-4 * batch / 512, weight decay 0.05, 20
warm-up epochs of 300, and an average of the weights (decay 0.99984).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import Grid, PreNormBlock, PyramidClassifier, block_types, check_stages, init_linear, run_blocks
from ._timm import AGENT_PAPER, create_variant, imagenet_cfg

__all__ = ["AgentCSwin"]


class ToChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ConvMerging(nn.Module):
    """Way to the next stage: a 3x3 convolution of stride 2, then a LayerNorm.

    Shape: x (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out_dim).
    """

    def __init__(self, dim: int, out_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(out_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return out


class AgentCSwin(PyramidClassifier):
    """Agent-CSwin classifier. Stages are `stage1`, `stage2`, ..., what leads from one to the next `merge1`, ...

    Args:
        img_size: side or (H, W) of the images that it is meant for; tables are sized by it. Others run as well.
        patch_size: 4, the stride of the stem, whose convolution is 7x7.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dim: channels of the first stage; they double at each stage.
        depth, num_heads: blocks and heads of each stage.
        split_size: width of the stripes of B blocks in each stage. In the last stage there is one stripe, the map.
        la_split_size: the same of A blocks, numbers or, as in the official configurations, one string "56-28-14-7". None: the map.
        agent_num: agents of each stage, squares.
        agent_grid: grid of the agents that are pooled in each stage, or None for a stage or all of them: as many as its agent_num.
        attn_type: a letter for each stage, A, B, or M; after them, if one is M, how many of its first blocks are A.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: whether the attentions' projections of queries, keys and values have a bias.
        attention: the mechanism of A blocks, any registered one that does noncausal self attention.
        attention_kwargs: its options.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in the MLPs and after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, letters that say nothing, another patch_size, a mechanism that cannot stand here or
            lacks a setting.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depth: Sequence[int] = (2, 4, 18, 1),
        split_size: Sequence[int] = (1, 2, 7, 7),
        la_split_size: str | Sequence[int] | None = None,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_grid: Sequence[Grid | None] | None = None,
        attn_type: str = "AABB",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention: str = "agent_cswin",
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
        if patch_size != 4:
            raise ValueError(
                f"the stem of Agent-CSwin has patches of 4 with overlap, got patch_size={patch_size}; the nearest is 4"
            )
        widths = [embed_dim * 2**i for i in range(len(depth))]
        splits = {"A": _split_sizes(la_split_size, len(depth)), "B": [*split_size[:-1], None]}
        agent_grid = [None] * len(depth) if agent_grid is None else agent_grid
        check_stages(
            depth=depth,
            num_heads=num_heads,
            split_size=split_size,
            la_split_size=splits["A"],
            agent_num=agent_num,
            agent_grid=agent_grid,
        )
        check_attention(attention, "Agent-CSwin")
        types = block_types(attn_type, depth)
        self.attention = attention
        self._set_sizes(widths, in_chans, num_classes, 4, "stage", first=1)
        grids = self._plan(img_size)
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, kernel_size=7, stride=4, padding=2, **factory),
            ToChannelsLast(),
            nn.LayerNorm(embed_dim, **factory),
        )
        host = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        rates = calculate_drop_path_rates(drop_path_rate, list(depth), stagewise=True)
        for i, width in enumerate(widths):
            agents = {"agent_num": agent_num[i], "agent_grid": agent_grid[i]}
            stripes = {letter: {"resolution": grids[i], "split_size": sizes[i]} for letter, sizes in splits.items()}
            own = {**stripes["A"], **agents} if attention == "agent_cswin" else {}
            kinds = {
                "A": (attention, {**own, **(attention_kwargs or {})}),
                "B": ("agent_cswin", {**stripes["B"], "use_agents": False}),
            }
            blocks = []
            for letter, rate in zip(types[i], rates[i], strict=True):
                name, options = kinds[letter]
                mechanism = build_attention(name, width, num_heads[i], host, options)
                mlp = Mlp(width, int(width * mlp_ratio), drop=proj_drop_rate, **factory)
                blocks.append(PreNormBlock(width, mechanism, mlp, drop_path=rate, **factory))
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
            if i < self.num_stages - 1:
                self.add_module(f"merge{i + 1}", ConvMerging(width, 2 * width, **factory))
        self._create_end(nn.LayerNorm(widths[-1], **factory), drop_rate, global_pool, **factory)
        self.init_weights()

    def _plan(self, img_size: int | Grid) -> list[Grid]:
        """Note the size that the model is meant for; returns the grid of each stage. Raises ValueError for one too small."""
        self.img_size = to_2tuple(img_size)
        if min(self.img_size) < 3:
            raise ValueError(f"img_size={self.img_size} is too small for the stem; it must be at least 3")
        grids = [tuple((side - 3) // 4 + 1 for side in self.img_size)]
        for _ in range(self.num_stages - 1):
            grids.append(tuple((side + 1) // 2 for side in grids[-1]))
        return grids

    def init_weights(self) -> None:
        """The official initialisation; the mechanisms have their own."""
        foreign = {m for i in range(self.num_stages) for block in self._stage(i) for m in block.attn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in foreign:
                init_linear(module)

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize the tables to other images, as if the model had been built for them. Raises ValueError for one too small."""
        for i, grid in enumerate(self._plan(img_size)):
            for block in self._stage(i):
                if callable(resize := getattr(block.attn, "set_resolution", None)):
                    resize(grid)

    def _stage(self, index: int) -> Any:
        return getattr(self, f"stage{index + 1}")

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image (B, 3, H, W) -> tokens (B, N_i, C_i) and grid of each of the first stages, before what leads to the next."""
        x = self.stage1_conv_embed(x)  # (B, H, W, C)
        found: list[tuple[Tensor, Grid]] = []
        for i in range(self.num_stages if num_stages is None else num_stages):
            if i:
                x = getattr(self, f"merge{i}")(x)
            grid_size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
            x = run_blocks(self._stage(i), x, grid_size, self.grad_checkpointing)
            found.append((x, grid_size))
            x = x.unflatten(1, grid_size)
        return found

    def prune_stages(self, last: int) -> None:
        for i in range(last + 1, self.num_stages):
            delattr(self, f"stage{i + 1}")
            delattr(self, f"merge{i}")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: a block each, then the way to the next stage (or a stage each)."""
        fine = [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)", (98,)), (r"^norm", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """None by name: timm leaves biases and normalisations out by their shape; the agents' tables are decayed, as officially."""
        return set()


def _split_sizes(la_split_size: str | Sequence[int] | None, num_stages: int) -> list[int | None]:
    """One entry for each stage: the last stage has one stripe, whatever it says, and None is that as well."""
    if la_split_size is None:
        return [None] * num_stages
    if isinstance(la_split_size, str):
        parts = la_split_size.split("-")
        if not all(part.isdecimal() for part in parts):
            raise ValueError(f"la_split_size must be numbers joined by '-', as '56-28-14-7'; got {la_split_size!r}")
        la_split_size = [int(part) for part in parts]
    return [*la_split_size[:-1], None]


# The published variants; whatever is not said is the tiny one's.
_TINY = {"embed_dim": 64, "depth": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depth": (3, 6, 29, 2), "drop_path_rate": 0.4}
_BASE = {**_SMALL, "embed_dim": 96, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_cswin": _TINY,
    "agent_cswin_t": _TINY,
    "agent_cswin_s": _SMALL,
    "agent_cswin_b": _BASE,
    "agent_cswin_b_384": {**_BASE, "img_size": 384, "split_size": (1, 2, 12, 12), "drop_path_rate": 0.7},
}
_CFG: dict[str, Any] = {"crop_mode": "squash", "first_conv": "stage1_conv_embed.0", **AGENT_PAPER}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(preset.get("img_size", 224), **_CFG) for name, preset in _VARIANTS.items()}
)


def _create_agent_cswin(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(AgentCSwin, variant, pretrained, {**_VARIANTS[variant], **kwargs}, depths="depth")


@register_model
def agent_cswin(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-CSwin of any size; Agent-CSwin-T unless the arguments say otherwise."""
    return _create_agent_cswin("agent_cswin", pretrained, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-CSwin-T, 20.5 M parameters, 4.3 G multiply-adds at 224."""
    return _create_agent_cswin("agent_cswin_t", pretrained, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-CSwin-S, 32.8 M parameters, 6.7 G multiply-adds at 224."""
    return _create_agent_cswin("agent_cswin_s", pretrained, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-CSwin-B, 73.3 M parameters, 14.9 G multiply-adds at 224."""
    return _create_agent_cswin("agent_cswin_b", pretrained, **kwargs)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-CSwin-B fine-tuned on images of 384 x 384; 46.2 G multiply-adds there."""
    return _create_agent_cswin("agent_cswin_b_384", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "agent_cswin", **_preset)
