"""HaloNet: residual networks whose 3x3 convolutions are halo attention, in all blocks (the paper's H family) or in some (timm's).

Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731, 2021. No official code or weights exist.
The networks are timm's `ByobNet` (stem, blocks, head, the whole model interface), with the zoo's attention in its self-attention
blocks, so that timm's weights load unchanged. `halonet_paper_h0` to `h7` are the paper's table as a third party reads it;
`build_halonet` puts a mechanism into timm's own names (`halonet26t`, ...).
Deviations: the H family keeps what lies outside the image out of the softmax (`mask_padding`), so images of any size run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import timm
import torch
from timm.layers import register_notrace_module
from timm.layers.halo_attn import HaloAttn
from timm.models import build_model_with_cfg, byoanet, generate_default_cfgs, model_entrypoint, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, LayerFn, SelfAttnBlock
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.registry import register_model_info

from ._host import build_attention, check_attention
from ._timm import imagenet_cfg

__all__ = ["HaloBlock", "MapAttention", "build_halonet", "holds_halo_attention"]


class HaloBlock(SelfAttnBlock):
    """timm's self-attention block: 1x1 convolution, attention, normalisation, 1x1 convolution, and a shortcut.

    Args:
        in_chs, out_chs: channels of input and output.
        layers: timm's layer classes; `layers.self_attn` makes the attention. What it puts out may be wider than the block (the
            paper's rv); the layers after it then follow.
        block_kwargs: as for `timm.models.byobnet.SelfAttnBlock`.

    Shape: x (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride).
    """

    def __init__(
        self, in_chs: int, out_chs: int, *, layers: LayerFn, device: Any = None, dtype: Any = None, **block_kwargs: Any
    ) -> None:
        super().__init__(in_chs, out_chs, layers=layers, device=device, dtype=dtype, **block_kwargs)
        width = self.self_attn.dim_out
        if width != self.conv1_1x1.conv.out_channels:
            factory = {"device": device, "dtype": dtype}
            if block_kwargs.get("post_attn_na", True):
                self.post_attn = layers.norm_act(width, **factory)
            self.conv3_1x1 = layers.conv_norm_act(width, out_chs, 1, apply_act=False, **factory)


class MapAttention(nn.Module):
    """Any mechanism of the zoo on feature maps; stride 2 averages what it puts out over 2 x 2 pixels.

    Args:
        attention: a module of `build_attention`.
        stride: 1 or 2.

    Shape: x (B, C, H, W) -> (B, C, H / stride, W / stride).
    """

    def __init__(self, attention: Any, stride: int = 1) -> None:
        super().__init__()
        self.attention, self.stride, self.dim_out = attention, stride, attention.dim

    def reset_parameters(self) -> None:
        self.attention.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        place = {"grid_size": grid} if self.attention.attention_info.spatial else {}
        out: Tensor = self.attention(x.flatten(2).transpose(1, 2), **place).transpose(1, 2).unflatten(2, grid)
        return F.avg_pool2d(out, 2, ceil_mode=True) if self.stride == 2 else out  # odd sizes as the shortcut's convolution has them


register_notrace_module(MapAttention)


def _build_layer(
    dim: int,
    *,
    attention: str,
    attention_kwargs: Mapping[str, Any] | None,
    stride: int = 1,
    num_heads: int = 8,
    dim_head: int | None = None,
    value_ratio: float = 1.0,
    qk_ratio: float = 1.0,
    device: Any = None,
    dtype: Any = None,
    **settings: Any,
) -> Any:
    """The attention of one block, from what timm's configuration says of it (`self_attn_kwargs`), in timm's words.

    `value_ratio`, the paper's rv, is ours. A mechanism other than halo attention takes the number of heads only.
    """
    factory = {"device": device, "dtype": dtype}
    if attention != "halo":
        return MapAttention(build_attention(attention, dim, num_heads, factory, attention_kwargs), stride)
    if value_ratio != 1.0:
        settings["dim_out"], qk_ratio = round(dim * value_ratio), qk_ratio / value_ratio
    own = {"head_dim": dim_head, "qk_ratio": qk_ratio, "stride": stride, "out_proj": False, **settings}
    return build_attention("halo", dim, num_heads, factory, {**own, **(attention_kwargs or {})})


# --- timm's own networks ----------------------------------------------------------------------------------------------------------


@functools.cache
def holds_halo_attention(name: str) -> bool:
    """Whether timm's model `name` has its halo attention in some blocks."""
    if ":" in name or model_entrypoint(name.split(".")[0]).__module__ != byoanet.__name__:
        return False
    with torch.device("meta"):
        return any(isinstance(m, HaloAttn) for m in timm.create_model(name).modules())


def build_halonet(
    name: str, attention: str, attention_kwargs: Mapping[str, Any] | None = None, pretrained: bool = False, **kwargs: Any
) -> Any:
    """timm's network `name` with `attention` in place of its halo attention.

    Args:
        name: one of timm's names for which `holds_halo_attention`.
        attention: a registered mechanism. "halo" has timm's parameters and computes what timm's does.
        attention_kwargs: its options; they win over what the network says. `mask_padding=True` takes images of any size.
        pretrained: load timm's weights; possible with attention="halo" only.
        kwargs: timm's own.

    Raises:
        UnknownNameError: no such mechanism.
        ValueError: a mechanism that cannot stand here, pretrained weights that do not fit it or its options.
    """
    check_attention(attention, "a HaloNet")
    if pretrained and attention != "halo":
        raise ValueError(f"pretrained weights of {name!r} belong to halo attention; {attention!r} starts from random weights")
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, HaloAttn):
                setattr(parent, child_name, _exchange(child, attention, attention_kwargs, pretrained))
    if hasattr(model, "_model_args"):  # newer timm writes these to its config files
        model._model_args = {**model._model_args, "attention": attention}
    return model


def _exchange(layer: HaloAttn, attention: str, attention_kwargs: Mapping[str, Any] | None, pretrained: bool) -> Any:
    """`attention` in place of timm's layer, with its weights where they fit. Raises ValueError if those of `pretrained` do not."""
    averages = isinstance(layer.pool, nn.AvgPool2d)
    ours = _build_layer(
        layer.q.in_channels,
        attention=attention,
        attention_kwargs=attention_kwargs,
        stride=2 if averages else layer.block_stride,
        num_heads=layer.num_heads,
        dim_head=layer.dim_head_qk,
        dim_out=layer.dim_out_v,
        block_size=layer.block_size,
        halo_size=layer.halo_size,
        avg_down=averages,
        qkv_bias=layer.q.bias is not None,
        scale_pos_embed=layer.scale_pos_embed,
        device=layer.q.weight.device,
        dtype=layer.q.weight.dtype,
    )
    state, own = layer.state_dict(), ours.state_dict()
    fitting = {k: state[k] for k in own if k in state and state[k].shape == own[k].shape}
    if pretrained and len(fitting) < len(own):
        lost = ", ".join(k for k in own if k not in fitting)
        raise ValueError(f"with {dict(attention_kwargs or {})}, pretrained weights do not fit halo attention's {lost}")
    ours.load_state_dict(fitting, strict=False)
    return ours.train(layer.training)


# --- ours -------------------------------------------------------------------------------------------------------------------------


def _h_family(
    block_size: int, halo_size: int, value_ratio: float, block_ratio: float, depth: int, num_features: int = 0
) -> dict[str, Any]:
    """The configuration of one row of the paper's table: b, h, rv, rb, layers of stage 3, width of the final convolution."""
    own = {"block_size": block_size, "halo_size": halo_size, "value_ratio": value_ratio, "mask_padding": True}
    blocks = [
        {
            "type": "self_attn",
            "d": d,
            "c": round(width * block_ratio),
            "s": stride,
            "gs": 0,
            "br": 1 / block_ratio,
            "self_attn_kwargs": {**own, "num_heads": heads},
        }
        for d, width, stride, heads in ((3, 64, 1, 4), (3, 128, 2, 8), (depth, 256, 2, 8), (3, 512, 2, 8))
    ]
    return {"blocks": blocks, "stem_type": "7x7", "stem_chs": 64, "stem_pool": "maxpool", "num_features": num_features}


_H0 = _h_family(8, 3, 1.0, 0.5, 7)
# Name -> configuration, and side of the images.
_VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "halonet": (_H0, 256),
    "halonet_paper_h0": (_H0, 256),
    "halonet_paper_h1": (_h_family(8, 3, 1.0, 1.0, 10), 256),
    "halonet_paper_h2": (_h_family(8, 3, 1.0, 1.25, 11), 256),
    "halonet_paper_h3": (_h_family(10, 3, 1.0, 1.5, 12, 1024), 320),
    "halonet_paper_h4": (_h_family(12, 2, 1.0, 3.0, 12, 1280), 384),
    "halonet_paper_h5": (_h_family(14, 2, 2.5, 2.0, 23, 1536), 448),
    "halonet_paper_h6": (_h_family(8, 4, 3.0, 2.75, 24, 1536), 512),
    "halonet_paper_h7": (_h_family(10, 3, 4.0, 3.5, 26, 2048), 600),
}
_CFG: dict[str, Any] = {
    "min_input_size": (3, 32, 32),
    "crop_pct": 0.95,
    "fixed_input_size": False,
    "first_conv": "stem.conv1.conv",
    "classifier": "head.fc",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2103.12731",
    "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    "origin_url": "https://github.com/huggingface/pytorch-image-models",
}
default_cfgs = generate_default_cfgs({name: imagenet_cfg(side, **_CFG) for name, (_, side) in _VARIANTS.items()})


def _create_halonet(
    variant: str,
    pretrained: bool = False,
    *,
    blocks: Sequence[Any],
    attention: str = "halo",
    attention_kwargs: Mapping[str, Any] | None = None,
    self_attn_layer: Any = "halo",
    **kwargs: Any,
) -> Any:
    """timm's builder with a configuration from plain arguments, those of `ByoModelCfg`; other arguments are `ByobNet`'s."""
    check_attention(attention, "a HaloNet")
    layer = functools.partial(_build_layer, attention=attention, attention_kwargs=attention_kwargs)
    own = {field.name: kwargs.pop(field.name) for field in fields(ByoModelCfg) if field.name in kwargs}
    own["self_attn_layer"] = layer if self_attn_layer == "halo" else self_attn_layer
    config = ByoModelCfg(blocks=tuple(_own_blocks(stage, layer, own["self_attn_layer"]) for stage in blocks), **own)
    feature_cfg: dict[str, Any] = {"flatten_sequential": True}
    if kwargs.get("features_only"):  # all maps, however many stages there are
        feature_cfg["out_indices"] = tuple(range(len(_skeleton(config, kwargs.get("img_size")).feature_info)))
    return build_model_with_cfg(ByobNet, variant, pretrained, model_cfg=config, feature_cfg=feature_cfg, **kwargs)


def _skeleton(config: ByoModelCfg, img_size: Any) -> Any:
    return ByobNet(config, img_size=img_size, device="meta")


def _own_blocks(stage: Any, layer: Any, default_layer: Any) -> tuple[ByoBlockCfg, ...]:
    """The blocks of a stage, given as one configuration or several (dicts or timm's), with ours where they have halo attention."""
    found = []
    for config in stage if isinstance(stage, Sequence) else [stage]:
        config = config if isinstance(config, ByoBlockCfg) else ByoBlockCfg(**config)
        if config.self_attn_layer == "halo":
            config = replace(config, self_attn_layer=layer)
        if config.type == "self_attn" and (config.self_attn_layer or default_layer) is layer:
            config = replace(config, type=functools.partial(HaloBlock))  # type: ignore[arg-type]  # timm takes partials as well
        found.append(config)
    return tuple(found)


def _register(name: str) -> None:
    """Register a variant with timm, as a function of this module, and its preset with the zoo."""
    preset, side = _VARIANTS[name]

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return _create_halonet(name, pretrained, **{**preset, **kwargs})

    entry.__name__ = entry.__qualname__ = name
    if name == "halonet":
        entry.__doc__ = (
            "HaloNet of any layout: timm's `ByoModelCfg` as keyword arguments, `blocks` as dicts; H0 unless they say otherwise."
        )
    else:
        entry.__doc__ = f"HaloNet-{name[-2:].upper()} of the paper, for images of {side} x {side}."
    globals()[name] = register_model(entry)
    register_model_info(name, "halonet", **preset)


for _name in _VARIANTS:
    _register(_name)
for _name, _size in {  # timm's own names, whose files convert as well
    "halonet_h1": {},
    "halonet26t": {},
    "halonet50ts": {},
    "sehalonet33ts": {},
    "eca_halonext26ts": {},
    "haloregnetz_b": {},
    "lamhalobotnet50ts_256": {"img_size": 256},
    "halo2botnet50ts_256": {"img_size": 256},
}.items():
    _config = byoanet.model_cfgs[_name.removesuffix("_256")]
    register_model_info(_name, "halonet", **{f.name: getattr(_config, f.name) for f in fields(_config)}, **_size)
