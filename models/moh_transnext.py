"""MoH-TransNeXt (MoH-ViT): a pyramid of four stages with foveal attention, whose heads each token weighs and picks.

MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, 2024, inside TransNeXt: Robust Foveal Visual
Perception for Vision Transformers, arXiv 2311.17132, 2023; official code SkyworkAI/MoH (MoH-ViT). Stages that reduce keys
(`sr_ratios` > 1) have the aggregated attention, the others the global one. Images of any size run on the same weights, whose
positions are scaled by `pretrain_size`; the grid of a stage is what its convolution gives. Features are the normalised maps of
the stages. Add `0.01 * attention_zoo.auxiliary_loss(model)` to the training loss. Training recipe: AdamW at 1e-3 with batch
1024, weight decay 0.05 but for `no_weight_decay`, 5 warm-up epochs of 300, gradients clipped at 1, RandAugment 9/0.5, mixup
0.8, cutmix 1, erasing 0.25, label smoothing 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from attention_zoo.attention.agent import DepthwiseConv2d
from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._pyramid import Grid, PreNormBlock, PyramidClassifier, check_stages, init_linear, run_blocks, to_map
from ._timm import create_variant, imagenet_cfg

__all__ = ["MoHTransNeXt"]


class DWConv(nn.Module):
    """3x3 depthwise convolution of tokens on their grid. Shape: x (B, H * W, C) -> (B, H * W, C)."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        out: Tensor = self.dwconv(to_map(x, grid_size))
        return out.flatten(2).transpose(1, 2)


class ConvGlu(nn.Module):
    """Gated MLP whose gate is convolved: fc2(GELU(dwconv(u)) * w), u and w the halves of fc1(x).

    Two thirds of `hidden_dim` are used for each half, so that it costs what a plain MLP of that width does.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        half = 2 * hidden_dim // 3
        self.fc1 = nn.Linear(dim, 2 * half, **factory)
        self.dwconv = DWConv(half, **factory)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(half, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.drop1(self.act(self.dwconv(gate, grid_size)) * value)))


class MoHTransNeXt(PyramidClassifier):
    """MoH-TransNeXt classifier. Lists have one entry for each stage.

    Args:
        img_size: side or (H, W) of the images that it is meant for. Others run as well; nothing is sized by it.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dims: channels.
        depths, num_heads: blocks and heads.
        shared_heads: heads that every token uses.
        routed_topk: further heads that each token chooses for itself; 0 where all heads are shared.
        mlp_ratios: hidden width of the MLPs over their width, before the two thirds of a gated one.
        sr_ratios: how many times smaller the pooled grid is on each side; 1: global attention.
        window_sizes: side of the neighbourhood in the aggregated attention, odd; not read where attention is global.
        patch_size: stride of the first convolution, whose kernel is twice that less 1.
        pretrain_size: side or (H, W) of the images of pretraining, which scales positions; None: img_size.
        fixed_pool_size: side or (H, W) of the pooled grids, instead of the grid over sr_ratios.
        qkv_bias: whether the attentions' projections of queries, keys and values have a bias.
        norm_eps: epsilon of the blocks' and the stages' normalisations.
        attention: another mechanism for all blocks, any registered one that does noncausal self attention; None: the paper's.
        attention_kwargs: its options, or further ones of the paper's.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in the MLPs and after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, heads or windows that are not allowed, a mechanism that cannot stand here or that
            lacks a setting.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (5, 5, 23, 5),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        shared_heads: Sequence[int] = (4, 8, 4, 5),
        routed_topk: Sequence[int] = (0, 0, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_sizes: Sequence[int | None] = (3, 3, 3, None),
        patch_size: int = 4,
        pretrain_size: int | tuple[int, int] | None = None,
        fixed_pool_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        attention: str | None = None,
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
        lists: dict[str, Sequence[Any]] = {"depths": depths, "embed_dims": embed_dims, "num_heads": num_heads}
        lists |= {"shared_heads": shared_heads, "routed_topk": routed_topk}
        check_stages(**lists, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios, window_sizes=window_sizes)
        if min(sr_ratios) < 1:
            raise ValueError(f"sr_ratios must be at least 1, got {tuple(sr_ratios)}")
        if patch_size < 2:
            raise ValueError(f"patch_size must be at least 2, so that patches overlap; got {patch_size}")
        if attention is not None:
            check_attention(attention, "MoH-TransNeXt")
        self.patch_size = patch_size
        self.set_input_size(img_size)
        pretrained = to_2tuple(img_size if pretrain_size is None else pretrain_size)
        self._set_sizes(embed_dims, in_chans, num_classes, patch_size, "norm", first=1)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, width in enumerate(embed_dims):
            kernel, stride = (2 * patch_size - 1, patch_size) if i == 0 else (3, 2)
            before = in_chans if i == 0 else embed_dims[i - 1]
            host = {"qkv_bias": qkv_bias, "shared_heads": shared_heads[i], "routed_topk": routed_topk[i], **factory}
            host |= {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
            published = "moh_transnext_global" if sr_ratios[i] == 1 else "moh_transnext_aggregated"
            name = published if attention is None else attention
            own: dict[str, Any] = {}
            if name in ("moh_transnext_global", "moh_transnext_aggregated"):
                reduction = patch_size * 2**i
                own["input_resolution"] = tuple(-(-side // reduction) for side in self.img_size)
                own["pretrain_resolution"] = tuple(max(1, side // reduction) for side in pretrained)
            if name == "moh_transnext_aggregated":
                pool = {"sr_ratio": sr_ratios[i]} if fixed_pool_size is None else {"pool_size": fixed_pool_size}
                own |= {"window_size": window_sizes[i] or 3, **pool}
            build = partial(build_attention, name, width, num_heads[i], host, {**own, **(attention_kwargs or {})})
            mlp = partial(ConvGlu, width, int(width * mlp_ratios[i]), drop=proj_drop_rate, **factory)
            options: dict[str, Any] = {"mlp_on_grid": True, "norm_eps": norm_eps, **factory}
            blocks = [PreNormBlock(width, build(), mlp(), drop_path=rate, **options) for rate in rates[i]]
            self.add_module(f"patch_embed{i + 1}", OverlapPatchEmbed(kernel, stride, before, width, **factory))
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(width, eps=norm_eps, **factory))
        self._create_end(nn.Identity(), drop_rate, global_pool, **factory)  # every stage ends with a norm, which the next one reads
        self.init_weights()

    def init_weights(self) -> None:
        """The paper's initialisation; the mechanisms have their own."""
        attentions = {m for block in self.modules() if isinstance(block, PreNormBlock) for m in block.attn.modules()}
        for module in self.modules():
            if module in attentions:
                continue
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Name another image size that the model is meant for. Nothing is resized; positions keep the scale of pretraining."""
        self.img_size: Grid = to_2tuple(img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: a block each, after the patches of its stage (or a stage each)."""
        fine = [(r"^block(\d+)\.(\d+)", None), (r"^patch_embed(\d+)", (-1,)), (r"^norm(\d+)", (99999,))]
        return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|block|norm)(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Embeddings of queries and positions, temperatures; timm leaves biases and normalisations out by their shape."""
        keywords = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(keyword in name for keyword in keywords)}

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image (B, in_chans, H, W) -> normalised tokens (B, N_i, C_i) and grid of each of the first stages."""
        found = []
        for i in range(1, (self.num_stages if num_stages is None else num_stages) + 1):
            x = getattr(self, f"patch_embed{i}")(x)  # (B, H, W, C)
            grid_size, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
            x = run_blocks(getattr(self, f"block{i}"), x, grid_size, self.grad_checkpointing)
            x = getattr(self, f"norm{i}")(x)
            found.append((x, grid_size))
            x = to_map(x, grid_size)
        return found

    def prune_stages(self, last: int) -> None:
        """Drop the stages after `last`, and the way to them."""
        for i in range(last + 2, self.num_stages + 1):
            for name in (f"patch_embed{i}", f"block{i}", f"norm{i}"):
                delattr(self, name)


# The published variants; what is not said is the class's default.
_SMALL = {"embed_dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.45}
_BASE = {"embed_dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6}
_BASE_75 = {**_BASE, "shared_heads": (4, 8, 4, 5), "routed_topk": (0, 0, 8, 16)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "moh_transnext": {**_BASE_75, "drop_path_rate": 0.0},  # of any size: how deep it is to drop out is for whoever says the size
    "moh_transnext_small_75": {**_SMALL, "shared_heads": (3, 6, 3, 4), "routed_topk": (0, 0, 6, 12)},
    "moh_transnext_small_80": {**_SMALL, "shared_heads": (3, 6, 3, 8), "routed_topk": (0, 0, 6, 12)},
    "moh_transnext_base_75": _BASE_75,
    "moh_transnext_base_50": {**_BASE, "shared_heads": (2, 2, 2, 4), "routed_topk": (2, 4, 6, 8)},
}
_CFG: dict[str, Any] = {
    "first_conv": "patch_embed1.proj",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2410.11842",
    "paper_name": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
    "origin_url": "https://github.com/SkyworkAI/MoH",
}
default_cfgs = generate_default_cfgs({name: imagenet_cfg(**_CFG) for name in _VARIANTS})


def _create_moh_transnext(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return create_variant(MoHTransNeXt, variant, pretrained, {**_VARIANTS[variant], **kwargs})


@register_model
def moh_transnext(pretrained: bool = False, **kwargs: Any) -> Any:
    """MoH-TransNeXt of any size; base_75, without its stochastic depth, unless the arguments say otherwise."""
    return _create_moh_transnext("moh_transnext", pretrained, **kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> Any:
    """MoH-ViT-S with 75 % of the heads: 49.9 M parameters, 10.3 G multiply-adds at 224 (all heads computed), top-1 84.6 %."""
    return _create_moh_transnext("moh_transnext_small_75", pretrained, **kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> Any:
    """MoH-ViT-S with 80 % of the heads: 49.9 M parameters, 10.3 G multiply-adds at 224 (all heads computed), top-1 84.7 %."""
    return _create_moh_transnext("moh_transnext_small_80", pretrained, **kwargs)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> Any:
    """MoH-ViT-B with 75 % of the heads: 90.0 M parameters, 18.4 G multiply-adds at 224 (all heads computed), top-1 84.9 %."""
    return _create_moh_transnext("moh_transnext_base_75", pretrained, **kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> Any:
    """MoH-ViT-B with 50 % of the heads: 90.0 M parameters, 18.4 G multiply-adds at 224 (all heads computed), top-1 84.7 %."""
    return _create_moh_transnext("moh_transnext_base_50", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "moh_transnext", **_preset)
