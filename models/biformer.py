"""BiFormer: a pyramid of four stages that attend to routed regions, and to the whole grid in the last one.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810, 2023; official code rayleizhu/BiFormer. The last
stage is `lepe_attention` with 8 heads whatever its width (the paper: every region attends to all). Images of any size run on the
same weights, which do not depend on the number of regions either: the official dense models (`features_only=True,
out_norm="layernorm2d"`) have pad_mode="input" and n_win=8 for segmentation at 512, 16 for detection. The small one was trained with
drop_path_rate=0.15, 0.2 in detectors, 0.3 in UPerNet. models/biformer_stl.py has the same blocks in Swin-T's layout.
Deviations: `pad_mode="mask"` where the regions do not divide a grid, which the official classifier refuses; a topk beyond the
number of regions means all of them; maps are normalised for the reader only, never for the next stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from attention_zoo.attention.lepe import LocalPositionEncoding
from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import Grid, Pyramid, PyramidClassifier, PyramidFeatures, check_stages, factory_of, init_linear, to_map
from ._timm import create_variant, imagenet_cfg

__all__ = ["BiFormer", "BiFormerFeatures", "BiFormerPyramid"]

LAST_HEADS = 8  # of the stages that are not routed, whatever their width
OUT_NORMS = (None, "layernorm2d")


class ConvMixer(nn.Module):
    """What stands in attention's place with topk=0: 1x1, depthwise 5x5 and 1x1 convolutions, nothing between them.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.add_module("1", nn.Conv2d(dim, dim, 1, **factory))  # the official names, which count a change of layout as 0
        self.add_module("2", nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **factory))
        self.add_module("3", nn.Conv2d(dim, dim, 1, **factory))

    def forward(self, x: Tensor, *, grid_size: Grid) -> Tensor:
        x = to_map(x, grid_size)
        for layer in self.children():
            x = layer(x)
        return x.flatten(2).transpose(1, 2)


class DepthwiseMix(nn.Module):
    """The MLP's depthwise 3x3 convolution (`mlp_dwconv`). Shape: x (B, H, W, C) -> the same."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dwconv = LocalPositionEncoding(dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dwconv(x)
        return out


class BiFormerBlock(nn.Module):
    """Depthwise convolution, attention, MLP, each added to its input.

    Args:
        dim: channels.
        attention: a module of `build_attention`, or a `ConvMixer`.
        mlp: the MLP, on (B, H, W, C).
        pos_embed: whether the block starts with a depthwise 3x3 convolution, which is all that it knows of positions.
        layer_scale_init: start of a factor for each channel of the two branches; None: no factors.
        pre_norm: whether the branches' inputs are normalised, or the sums.
        drop_path: rate of stochastic depth.

    Shape: x (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        pos_embed: bool = True,
        layer_scale_init: float | None = None,
        pre_norm: bool = True,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.pre_norm = pre_norm
        self.pos_embed = LocalPositionEncoding(dim, 3, **factory) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.attn: Any = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = mlp
        self.gamma1 = self.gamma2 = None
        if layer_scale_init is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), float(layer_scale_init), **factory)) for _ in range(2))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if self.pre_norm:
            x = x + self.drop_path1(_scaled(self._attend(self.norm1(x)), self.gamma1))
            return x + self.drop_path2(_scaled(self.mlp(self.norm2(x)), self.gamma2))
        x = self.norm1(x + self.drop_path1(_scaled(self._attend(x), self.gamma1)))
        out: Tensor = self.norm2(x + self.drop_path2(_scaled(self.mlp(x), self.gamma2)))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        grid_size = (x.shape[1], x.shape[2])
        spatial = isinstance(self.attn, ConvMixer) or self.attn.attention_info.spatial
        out: Tensor = self.attn(x.flatten(1, 2), **({"grid_size": grid_size} if spatial else {}))
        return out.unflatten(1, grid_size)


class BlockSequence(nn.Sequential):
    """Blocks of one stage. Shape: x (B, C, H, W) -> (B, C, H, W), channels last in memory."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x.permute(0, 3, 1, 2)


class _Stages(Pyramid):
    """What the classifiers and the dense backbone share: an image in, the map of every stage out; timm's words for training it."""

    downsample_layers: Any  # nn.ModuleList: what leads to each stage, from the image to the first
    stages: Any

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image (B, in_chans, H, W) -> tokens (B, N_i, C_i) and grid of each of the first stages."""
        # Blocks work on channels-last maps; and torch 2.15's CPU batch normalisation is right for one sample of those only.
        x, found = x.contiguous(memory_format=torch.channels_last), []
        for downsample, stage in list(zip(self.downsample_layers, self.stages, strict=True))[:num_stages]:
            x = stage(downsample(x))
            found.append((x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])))
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: the way to a stage, then a block each (or a stage each, with its way)."""
        fine = [
            (r"^downsample_layers\.(\d+)", (-1,)),
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None),
            (r"^(?:norm|extra_norms)", (99999,)),
        ]
        return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:downsample_layers|stages)\.(\d+)" if coarse else fine}

    def prune_stages(self, last: int) -> None:
        """Drop the stages after `last`, and the way to them."""
        self.stages, self.downsample_layers = self.stages[: last + 1], self.downsample_layers[: last + 1]


class BiFormerPyramid(_Stages, PyramidClassifier):
    """The classifier of both layouts: stages, batch normalisation, mean over the map, linear head.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.
    """

    def _final_norm(self, tokens: Tensor) -> Tensor:
        """Every token is a sample of its own: the statistics are the same, and gradients are right at batch size 1."""
        out: Tensor = self.norm(tokens.flatten(0, 1)[:, :, None, None])
        return out.view_as(tokens)


class BiFormer(BiFormerPyramid):
    """BiFormer classifier.

    Args:
        img_size: accepted for timm's sake: nothing is sized by it.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dims, depths: channels and blocks of each stage.
        head_dim: channels per head of the routed stages.
        mlp_ratios: hidden width of the MLPs over their width, for each stage.
        n_win: regions along each side of every routed stage's grid.
        topks: what each stage attends with: k > 0, `bra` with k regions; -2, `lepe_attention` on its input; -1, plain attention; 0,
            no attention but convolutions.
        side_dwconv: side of LePE's kernel; 0: no LePE.
        pos_dwconv: side of the convolution that starts each block, 3, or 0 for none.
        layer_scale_init: start of a factor for each channel of the branches; None: no factors.
        pre_norm: whether branches or sums are normalised.
        mlp_dwconv: whether the MLPs have a depthwise 3x3 convolution.
        qk_dims: channels of the routed stages' queries and keys; None: embed_dims.
        kv_downsample, kv_per_wins: `bra`'s pooling of keys and values; -1 where it is not adaptive.
        pad_mode, qk_scale, param_routing, diff_routing, soft_routing: as for `bra`.
        attention: the mechanism of all stages that have attention, any registered one that does noncausal self attention; "bra" is
            what `topks` says.
        attention_kwargs: its options; with "bra", of the routed stages.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, an unknown topk, a mechanism that cannot stand here or that lacks a setting.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        n_win: int = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        side_dwconv: int = 5,
        pos_dwconv: int = 3,
        layer_scale_init: float | None = None,
        pre_norm: bool = True,
        mlp_dwconv: bool = False,
        qk_dims: Sequence[int] | None = None,
        kv_downsample: str = "identity",
        kv_per_wins: Sequence[int] | None = None,
        pad_mode: str = "mask",
        qk_scale: float | None = None,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        attention: str = "bra",
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
        qk_dims = embed_dims if qk_dims is None else qk_dims
        kv_per_wins = [-1] * len(depths) if kv_per_wins is None else kv_per_wins
        lists = {"embed_dims": embed_dims, "mlp_ratios": mlp_ratios, "topks": topks, "qk_dims": qk_dims, "kv_per_wins": kv_per_wins}
        check_stages(depths=depths, **lists)
        check_attention(attention, "BiFormer")
        if pos_dwconv not in (0, 3):
            raise ValueError(
                f"pos_dwconv must be 3, which keeps the size with the padding of 1 that it has, or 0; got {pos_dwconv}"
            )
        if layer_scale_init is not None and layer_scale_init <= 0:
            raise ValueError(f"layer_scale_init is where positive factors start, or None for no factors; got {layer_scale_init}")
        host = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        routed = {"n_win": n_win, "side_dwconv": side_dwconv, "pad_mode": pad_mode, "qk_scale": qk_scale}
        routed |= {"kv_downsample": kv_downsample, "param_routing": param_routing}
        routed |= {"diff_routing": diff_routing, "soft_routing": soft_routing}
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            own = {**routed, "topk": topks[i], "qk_dim": qk_dims[i]}
            own |= {"kv_per_win": kv_per_wins[i]} if kv_downsample.startswith("ada_") else {}
            others = {-2: {"side_dwconv": side_dwconv}, -1: {"side_dwconv": 0}, 0: None}
            build = partial(
                build_mixer, topks[i], dim, qk_dims[i] // head_dim, own, others, host, attention=attention, options=attention_kwargs
            )
            blocks = [
                BiFormerBlock(
                    dim,
                    build(),
                    _mlp(dim, int(mlp_ratios[i] * dim), mlp_dwconv, **factory),
                    pos_embed=pos_dwconv > 0,
                    layer_scale_init=layer_scale_init,
                    pre_norm=pre_norm,
                    drop_path=rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            stages.append(BlockSequence(*blocks))
        self.stages = nn.ModuleList(stages)
        self.downsample_layers = nn.ModuleList(_downsamples(in_chans, embed_dims, **factory))
        self._set_sizes(embed_dims, in_chans, num_classes, 4, "stages.")
        self._create_end(nn.BatchNorm2d(embed_dims[-1], **factory), drop_rate, global_pool, **factory)
        init_weights(self, attention)


class BiFormerFeatures(_Stages, PyramidFeatures):
    """The dense backbone: maps of the stages; parameters are named as the classifier's.

    Args:
        model: the classifier whose stages become its own.
        out_indices: which stages; the last n if a number.
        out_norm: "layernorm2d": each returned map gets a LayerNorm over its channels, `extra_norms.{stage}`, as in the official
            dense models; the next stage is given the map as it was. None: no norm, so that a classifier's weights give usable maps.

    Shape: x (B, in_chans, H, W) -> list of (B, C_i, H_i, W_i), strides 4, 8, 16, 32.

    Raises:
        ValueError: an unknown `out_norm`.
    """

    def __init__(
        self, model: BiFormerPyramid, out_indices: int | Sequence[int] = (0, 1, 2, 3), out_norm: str | None = None
    ) -> None:
        if out_norm not in OUT_NORMS:
            raise ValueError(f"out_norm must be 'layernorm2d' or None, got {out_norm!r}")
        super().__init__(model, out_indices, ("stages", "downsample_layers"))
        self.extra_norms: Any = None
        if out_norm is not None:
            factory, widths = factory_of(model), [info["num_chs"] for info in model.feature_info]
            self.extra_norms = nn.ModuleDict({f"{i}": LayerNorm2d(widths[i], eps=1e-6, **factory) for i in self.out_indices})

    def _to_map(self, index: int, tokens: Tensor, grid_size: Grid) -> Tensor:
        found: Tensor = super()._to_map(index, tokens, grid_size)
        return found if self.extra_norms is None else self.extra_norms[f"{index}"](found)


def build_mixer(
    topk: int,
    dim: int,
    num_heads: int,
    routed: dict[str, Any],
    others: Mapping[int, dict[str, Any] | None],
    host: dict[str, Any],
    *,
    attention: str,
    options: dict[str, Any] | None,
) -> nn.Module:
    """What a block of a stage mixes its tokens with.

    Args:
        topk: of the stage.
        dim, num_heads: of a routed stage.
        routed: `bra`'s arguments there.
        others: the other topks that a layout knows, each with the arguments of its `lepe_attention`; None: convolutions.
        host: settings for any mechanism.
        attention, options: the model's.

    Raises:
        ValueError: another topk.
    """
    if topk <= 0 and topk not in others:
        raise ValueError(f"topks are numbers of regions, or one of {', '.join(map(str, others))}; got {topk}")
    if topk <= 0 and others[topk] is None:
        return ConvMixer(dim, device=host["device"], dtype=host["dtype"])
    num_heads = num_heads if topk > 0 else LAST_HEADS
    if attention != "bra":
        return build_attention(attention, dim, num_heads, host, options)
    if topk > 0:
        return build_attention("bra", dim, num_heads, host, {**routed, **(options or {})})
    return build_attention("lepe_attention", dim, num_heads, host, others[topk])


def init_weights(model: nn.Module, attention: str) -> None:
    """Linear layers start as the official ones; convolutions, and a mechanism that is not the paper's, keep their own start."""
    foreign = {
        m for block in model.modules() if isinstance(block, BiFormerBlock) and attention != "bra" for m in block.attn.modules()
    }
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in foreign:
            init_linear(module)


def _mlp(dim: int, hidden_dim: int, dwconv: bool, **factory: Any) -> nn.Sequential:
    between = DepthwiseMix(hidden_dim, **factory) if dwconv else nn.Identity()
    return nn.Sequential(nn.Linear(dim, hidden_dim, **factory), between, nn.GELU(), nn.Linear(hidden_dim, dim, **factory))


def _downsamples(in_chans: int, embed_dims: Sequence[int], **factory: Any) -> list[nn.Module]:
    """3x3 convolutions of stride 2, each normalised: two from the image to the first stage, one to each of the others."""
    first = embed_dims[0] // 2
    stem = nn.Sequential(*_halve(in_chans, first, **factory), nn.GELU(), *_halve(first, embed_dims[0], **factory))
    return [stem, *(nn.Sequential(*_halve(before, after, **factory)) for before, after in pairwise(embed_dims))]


def _halve(before: int, after: int, **factory: Any) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride=2, padding=1, **factory), nn.BatchNorm2d(after, **factory)]


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


BIFORMER_CFG: dict[str, Any] = {
    "first_conv": "downsample_layers.0.0",
    "license": "mit",
    "paper_ids": "arXiv:2303.08810",
    "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    "origin_url": "https://github.com/rayleizhu/BiFormer",
}

# The published variants.
_TINY = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2)}
_SMALL = {**_TINY, "depths": (4, 4, 18, 4)}
_BASE = {**_SMALL, "embed_dims": (96, 192, 384, 768)}
_VARIANTS: dict[str, dict[str, Any]] = {"biformer": _TINY, "biformer_tiny": _TINY, "biformer_small": _SMALL, "biformer_base": _BASE}
default_cfgs = generate_default_cfgs({name: imagenet_cfg(**BIFORMER_CFG) for name in _VARIANTS})


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(BiFormer, variant, pretrained, {**_VARIANTS[variant], **kwargs}, feature_cls=BiFormerFeatures)


@register_model
def biformer(pretrained: bool = False, **kwargs: Any) -> Any:
    """BiFormer of any size; BiFormer-T unless the arguments say otherwise."""
    return _create_biformer("biformer", pretrained, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """BiFormer-T, 13.1 M parameters, 2.2 G multiply-adds at 224."""
    return _create_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """BiFormer-S, 25.5 M parameters, 4.5 G multiply-adds at 224."""
    return _create_biformer("biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """BiFormer-B, 56.8 M parameters, 9.8 G multiply-adds at 224."""
    return _create_biformer("biformer_base", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "biformer", **_preset)
