"""BiFormer-STL: BiFormer's attention in Swin-T's layout, to compare the two mechanisms and nothing else.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810, 2023; official code rayleizhu/BiFormer, which has it
twice: variant "legacy" and the later "nchw", whose last stage convolves the values (5x5, whatever `side_dwconv`) and whose routed
stages have pad_mode "qkv" and PyTorch's own initialisation.
Deviations: "legacy" takes grids that the regions do not divide (`pad_mode="mask"`); 1x1 convolutions are linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention_zoo.registry import register_model_info

from ._host import check_attention
from ._pyramid import check_stages, init_linear
from ._timm import create_variant, imagenet_cfg
from .biformer import BIFORMER_CFG, BiFormerBlock, BiFormerFeatures, BiFormerPyramid, BlockSequence, build_mixer, init_weights

__all__ = ["BiFormerSTL"]

# The stage after the routed ones: the topk that stands for `lepe_attention`, what it convolves, and how the others are padded.
_LAYOUTS: dict[str, dict[str, Any]] = {
    "legacy": {"topk": -2, "lepe_on": "x", "pad_mode": "mask"},
    "nchw": {"topk": -1, "lepe_on": "v", "pad_mode": "qkv"},
}


class STLStage(nn.Module):
    """Blocks of one stage. Shape: x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, blocks: Sequence[BiFormerBlock]) -> None:
        super().__init__()
        self.blocks = BlockSequence(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class BiFormerSTL(BiFormerPyramid):
    """BiFormer in Swin-T's layout: 4x4 patches, 2x2 merging, no convolution for positions but LePE.

    Args:
        img_size: accepted for timm's sake: nothing is sized by it.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        global_pool: pooling before the head ("avg", "max", ...; "" for none, without a head).
        embed_dims, depths: channels and blocks of each stage.
        head_dim: channels per head of the routed stages.
        mlp_ratios: hidden width of the MLPs over their width, for each stage.
        n_wins: regions along each side of each routed stage's grid.
        topks: k > 0, `bra` with k regions; -2 ("legacy") or -1 ("nchw"), `lepe_attention`. None: (1, 4, 16) and that one.
        side_dwconv: side of LePE's kernel ("nchw": in the routed stages).
        variant: the official implementation that is followed, "legacy" or "nchw".
        pad_mode: as for `bra`; None: the variant's, "mask" or "qkv".
        attention: the mechanism of all stages, any registered one that does noncausal self attention; "bra" is what `topks` says.
        attention_kwargs: its options; with "bra", of the routed stages.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout after the attentions.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, C, H / 32, W / 32), normalised.

    Raises:
        ValueError: lists of different lengths, an unknown topk or variant, a mechanism that cannot stand here.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        n_wins: Sequence[int] = (7, 7, 7, 7),
        topks: Sequence[int] | None = None,
        side_dwconv: int = 5,
        variant: str = "legacy",
        pad_mode: str | None = None,
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
        if variant not in _LAYOUTS:
            raise ValueError(f"variant must be one of {', '.join(map(repr, _LAYOUTS))}; got {variant!r}")
        layout = _LAYOUTS[variant]
        topks = (1, 4, 16, layout["topk"]) if topks is None else topks
        check_stages(depths=depths, embed_dims=embed_dims, mlp_ratios=mlp_ratios, n_wins=n_wins, topks=topks)
        check_attention(attention, "BiFormer-STL")
        host = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, **factory}
        routed = {"side_dwconv": side_dwconv, "pad_mode": layout["pad_mode"] if pad_mode is None else pad_mode}
        kernel = 5 if variant == "nchw" else side_dwconv
        lepe = {layout["topk"]: {"side_dwconv": kernel, "lepe_on": layout["lepe_on"]}}
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            own = {**routed, "n_win": n_wins[i], "topk": topks[i]}
            build = partial(
                build_mixer, topks[i], dim, dim // head_dim, own, lepe, host, attention=attention, options=attention_kwargs
            )
            mlp = partial(_mlp, dim, int(mlp_ratios[i] * dim), **factory)
            stages.append(
                STLStage([BiFormerBlock(dim, build(), mlp(), pos_embed=False, drop_path=rate, **factory) for rate in rates[i]])
            )
        self.stages = nn.ModuleList(stages)
        self.downsample_layers = nn.ModuleList(_downsamples(in_chans, embed_dims, **factory))
        self._set_sizes(embed_dims, in_chans, num_classes, 4, "stages.")
        self._create_end(nn.BatchNorm2d(embed_dims[-1], **factory), drop_rate, global_pool, **factory)
        if variant == "legacy":
            init_weights(self, attention)
        elif isinstance(self.head, nn.Linear):  # the others are convolutions there, which keep PyTorch's start
            init_linear(self.head)


def _mlp(dim: int, hidden_dim: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden_dim, **factory), nn.GELU(), nn.Linear(hidden_dim, dim, **factory))


def _downsamples(in_chans: int, embed_dims: Sequence[int], **factory: Any) -> list[nn.Module]:
    """4x4 patches, normalised; then normalisations and 2x2 convolutions of stride 2."""
    patches = nn.Conv2d(in_chans, embed_dims[0], 4, stride=4, **factory)
    found: list[nn.Module] = [nn.Sequential(patches, nn.BatchNorm2d(embed_dims[0], **factory))]
    for before, after in pairwise(embed_dims):
        merge = nn.Conv2d(before, after, 2, stride=2, **factory)
        found.append(nn.Sequential(nn.BatchNorm2d(before, **factory), merge))
    return found


_SWIN_T = {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)}
_VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_stl": {**_SWIN_T, "variant": "legacy"},
    "biformer_stl_nchw": {**_SWIN_T, "variant": "nchw"},
}
default_cfgs = generate_default_cfgs(
    {
        "biformer_stl": imagenet_cfg(**BIFORMER_CFG),
        # A token for each of the 7 x 7 regions of stage 2.
        "biformer_stl_nchw": imagenet_cfg(min_input_size=(3, 112, 112), **BIFORMER_CFG),
    }
)


def _create_stl(model_name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    kwargs = {**_VARIANTS[model_name], **kwargs}
    build = partial(BiFormerSTL, variant=kwargs.pop("variant"))  # timm's builder has another argument of this name
    return create_variant(build, model_name, pretrained, kwargs, feature_cls=BiFormerFeatures)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> Any:
    """BiFormer in Swin-T's layout, of any size; as it stands 28.4 M parameters, 4.6 G multiply-adds at 224."""
    return _create_stl("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> Any:
    """The later official implementation: 28.4 M parameters, 4.6 G multiply-adds at 224."""
    return _create_stl("biformer_stl_nchw", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "biformer_stl", **_preset)
