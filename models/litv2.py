"""LITv2: a pyramid of four stages, convolutional at the top, HiLo attention below, joined by deformable token merging.

Fast Vision Transformers with HiLo Attention, arXiv 2205.13213, 2022; official code ziplab/LITv2. One backbone for classification
and (`features_only=True`) dense prediction, where the official code has two. Images of any size run on the same weights: what the
patches do not cover is zero-padded on the right and bottom, and no parameter depends on the size. Stages 0 and 1 have no attention;
stage 3, with its window of 1, is plain multi-head attention. Training recipe: AdamW at 5e-4 * batch / 512, weight decay 0.05, 20
warm-up epochs of 300, gradients clipped at 5, and the factors of `LITv2.lr_multipliers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates, register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention_zoo.attention import DeformableTokenMerging
from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import (
    Grid,
    Pyramid,
    PyramidClassifier,
    PyramidFeatures,
    PyramidStage,
    check_stages,
    factory_of,
    init_linear,
    patches,
    to_map,
)
from ._timm import create_variant, imagenet_cfg

__all__ = ["LITv2", "LITv2Features"]

register_notrace_module(DeformableTokenMerging)  # a leaf for torch.fx, as the attentions are


class ConvMlp(nn.Module):
    """MLP with a 3x3 depthwise convolution before the activation; its zero padding is all that the model knows of positions.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim, **factory)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        x = self.dwconv(to_map(self.fc1(x), grid_size)).flatten(2).transpose(1, 2)
        return self.drop2(self.fc2(self.drop1(self.act(x))))


class LITv2Block(nn.Module):
    """Pre-norm block: attention (where the stage has one), then the convolutional MLP.

    Args:
        attention: a module of `build_attention`, or None.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module | None,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.has_attn = attention is not None
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim, **factory)
            self.attn: Any = attention
            self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        if self.has_attn:
            place = {"grid_size": grid_size} if self.attn.attention_info.spatial else {}
            x = x + self.drop_path1(self.attn(self.norm1(x), **place))
        return x + self.drop_path2(self.mlp(self.norm2(x), grid_size))


class _Pyramid(Pyramid):
    """What the classifier and the dense backbone share: patches in, the map of every stage out; timm's words for training it."""

    patch_embed: PatchEmbed
    stages: Any  # nn.ModuleList of PyramidStage

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image (B, 3, H, W) -> tokens (B, N_i, C_i) and grid of each of the first stages, before their downsampling."""
        x = self.patch_embed(x)  # (B, H, W, C)
        grid_size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        stages, found = list(self.stages)[:num_stages], []
        for i, stage in enumerate(stages):
            x = stage(x, grid_size)
            found.append((x, grid_size))
            if i < len(stages) - 1:
                x = stage.downsample(x, grid_size=grid_size)
                grid_size = (grid_size[0] // 2, grid_size[1] // 2)
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: a block each, then the stage's merging (or a stage each)."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.downsample", (98,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def lr_multipliers(self) -> dict[str, float]:
        """The official recipe's factors of the learning rate by parameter (a wildcard): offsets learn a hundred times slower.

        For `optimizer.lr_multipliers` of the zoo's recipes, or for parameter groups of one's own.
        """
        return {"stages.*.downsample.conv.conv_offset.weight": 0.01}

    def prune_stages(self, last: int) -> None:
        """Drop the stages after `last`, and the way to them."""
        self.stages = self.stages[: last + 1]
        self.stages[last].downsample = None


class LITv2(_Pyramid, PyramidClassifier):
    """LITv2 classifier.

    Args:
        img_size: side or (H, W) of the images that it is meant for. Others run as well; nothing is sized by it.
        patch_size: side of the patches.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dim: channels of stage 0; they double at each stage.
        depths, num_heads: blocks and heads of each stage.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: whether the attentions' projections of queries, keys and values have a bias.
        alpha: HiLo's share of Lo-Fi heads.
        window_sizes: HiLo's window in each stage, 0 where it has no attention.
        has_attn: which stages have attention.
        patch_norm: whether the patches are normalised.
        attention: the mechanism of those stages, any registered one that does noncausal self attention.
        attention_kwargs: its options.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in the MLPs and after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, an image too small for the stages, a mechanism that cannot stand here or that
            lacks a setting.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: float = 0.9,
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        has_attn: Sequence[int | bool] = (0, 0, 1, 1),
        patch_norm: bool = True,
        attention: str = "hilo",
        attention_kwargs: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_stages(depths=depths, num_heads=num_heads, window_sizes=window_sizes, has_attn=has_attn)
        check_attention(attention, "LITv2")
        self.attention, num_stages = attention, len(depths)
        widths = [embed_dim * 2**i for i in range(num_stages)]
        self._set_sizes(widths, in_chans, num_classes, patch_size, "stages.")
        self.patch_embed = patches(in_chans, embed_dim, patch_size, normed=patch_norm, **factory)
        host = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, width in enumerate(widths):
            own = {"window_size": window_sizes[i], "alpha": alpha} if attention == "hilo" else {}
            build = partial(build_attention, attention, width, num_heads[i], host, {**own, **(attention_kwargs or {})})
            blocks = [
                LITv2Block(
                    width,
                    build() if has_attn[i] else None,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            stages.append(PyramidStage(blocks, DeformableTokenMerging(width, **factory) if i < num_stages - 1 else None))
        self.stages = nn.ModuleList(stages)
        self.set_input_size(img_size)
        self._create_end(nn.LayerNorm(widths[-1], **factory), drop_rate, global_pool, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """The paper's initialisation. A mechanism other than HiLo keeps its own."""
        foreign = {m for block in self._blocks() if block.has_attn and self.attention != "hilo" for m in block.attn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in foreign:
                init_linear(module)
            elif isinstance(module, ConvMlp):
                nn.init.normal_(module.dwconv.weight, std=math.sqrt(2 / 9))
                nn.init.zeros_(module.dwconv.bias)  # type: ignore[arg-type]

    def _blocks(self) -> list[Any]:
        return [block for stage in self.stages for block in stage.blocks]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Name another image size that the model is meant for. Nothing is resized. Raises ValueError when it is too small."""
        size, patch, halvings = to_2tuple(img_size), self.patch_embed.patch_size, len(self.stages) - 1
        if min(math.ceil(side / p) for side, p in zip(size, patch, strict=True)) < 2**halvings:
            least = (2**halvings - 1) * max(patch) + 1
            raise ValueError(f"img_size={size} leaves nothing of the grid after {halvings} halvings; it must be at least {least}")
        self.img_size = size


class LITv2Features(_Pyramid, PyramidFeatures):
    """The dense backbone: maps of the stages, taken before their downsampling; parameters are named as the classifier's.

    Args:
        model: the classifier whose patch embedding and stages become its own.
        out_indices: which stages; the last n if a number.
        out_norm: which of the returned maps get a LayerNorm `norm{stage}`, one entry for each map or for each stage. Detection has
            (False, True, True, True), segmentation (True, True, True, True). None: no norm, so that a classifier's weights give
            usable maps.

    Shape: x (B, in_chans, H, W) -> list of (B, C_i, H_i, W_i), strides 4, 8, 16, 32.

    Raises:
        ValueError: `out_norm` of another length.
    """

    def __init__(
        self, model: LITv2, out_indices: int | Sequence[int] = (0, 1, 2, 3), out_norm: Sequence[bool] | None = None
    ) -> None:
        super().__init__(model, out_indices, ("patch_embed", "stages"))
        flags = [False] * len(self.out_indices) if out_norm is None else list(out_norm)
        if len(flags) == model.num_stages:
            flags = [flags[i] for i in self.out_indices]
        elif len(flags) != len(self.out_indices):
            raise ValueError(f"out_norm must have {len(self.out_indices)} entries, one for each map; got {out_norm}")
        for i, normed in zip(self.out_indices, flags, strict=True):
            if normed:
                self.add_module(f"norm{i}", nn.LayerNorm(model.feature_info[i]["num_chs"], **factory_of(model)))

    def _to_map(self, index: int, tokens: Tensor, grid_size: Grid) -> Tensor:
        norm = getattr(self, f"norm{index}", None)
        return to_map(tokens if norm is None else norm(tokens), grid_size)


# The published variants; whatever is not said is the small one's.
_SMALL = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_MEDIUM = {**_SMALL, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_VARIANTS: dict[str, dict[str, Any]] = {
    "litv2": _SMALL,
    "litv2_s": _SMALL,
    "litv2_m": _MEDIUM,
    "litv2_b": _BASE,
    "litv2_b_384": {**_BASE, "img_size": 384},
}
_CFG: dict[str, Any] = {
    "first_conv": "patch_embed.proj",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2205.13213",
    "paper_name": "Fast Vision Transformers with HiLo Attention",
    "origin_url": "https://github.com/ziplab/LITv2",
}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(384, crop_pct=1.0, **_CFG) if name.endswith("384") else imagenet_cfg(**_CFG) for name in _VARIANTS}
)


def _create_litv2(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(LITv2, variant, pretrained, {**_VARIANTS[variant], **kwargs}, feature_cls=LITv2Features)


@register_model
def litv2(pretrained: bool = False, **kwargs: Any) -> Any:
    """LITv2 of any size; LITv2-S unless the arguments say otherwise."""
    return _create_litv2("litv2", pretrained, **kwargs)


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """LITv2-S, 27.8 M parameters, 3.7 G multiply-adds at 224."""
    return _create_litv2("litv2_s", pretrained, **kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> Any:
    """LITv2-M, 48.8 M parameters, 7.5 G multiply-adds at 224."""
    return _create_litv2("litv2_m", pretrained, **kwargs)


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> Any:
    """LITv2-B, 86.5 M parameters, 13.2 G multiply-adds at 224."""
    return _create_litv2("litv2_b", pretrained, **kwargs)


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> Any:
    """LITv2-B fine-tuned on images of 384 x 384; 39.7 G multiply-adds there."""
    return _create_litv2("litv2_b_384", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "litv2", **_preset)
