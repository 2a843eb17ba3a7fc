"""Vision Transformers with any mechanism in their blocks: timm's `VisionTransformer`, its attention exchanged.

An Image is Worth 16x16 Words, arXiv 2010.11929. Everything but the attention is timm's: patch embedding, class and register tokens,
position table, MLP, heads, feature extraction. Names of ours are `vit_{small,base,large}_patch16_224_{gqa,kdgqa,dgqa,pgqa}`
(Key-Driven Grouped Query Attention, arXiv 2408.08454); `build_vit` puts a mechanism into any of timm's own names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.fx
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import register_notrace_function
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from attention_zoo.registry import AttentionInfo, attention_info, register_model_info

from ._host import build_attention, check_attention
from ._timm import imagenet_cfg

__all__ = ["AttentionBlock", "build_vit", "share_grid"]


class _NoAttention(nn.Identity):
    """Keeps timm's block from building its own attention before ours takes the place."""


class AttentionBlock(Block):
    """timm's pre-norm transformer block with a registered mechanism as `attn`.

    Args:
        dim, num_heads: as for `timm.models.vision_transformer.Block`, which takes all other keyword arguments.
        attention: name of the mechanism.
        attention_kwargs: its own options; they win over what the host model says (`qkv_bias`, `num_heads`, ...).
        num_prefix_tokens: class and register tokens before the patches, for the spatial mechanisms that have a place for them.

    Shape: x (B, N, C) -> (B, N, C). `grid_size` must be set before the first forward if the mechanism is spatial; `build_vit`'s
    models set it whenever the patch embedding runs.

    Raises:
        ValueError: a setting of the host that the mechanism does not have; at call, a causal request to a module that is not.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: str,
        attention_kwargs: dict[str, Any] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_layer: Any = None,
        depth: int = 0,
        device: Any = None,
        dtype: Any = None,
        **block_kwargs: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            attn_layer=_NoAttention,
            depth=depth,
            device=device,
            dtype=dtype,
            **block_kwargs,
        )
        host = {
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "scale_norm": scale_attn_norm,
            "proj_bias": proj_bias,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
            "norm_layer": norm_layer,
            "num_prefix_tokens": num_prefix_tokens,
            "device": device,
            "dtype": dtype,
        }
        self.attn = build_attention(attention, dim, num_heads, host, attention_kwargs)
        self.attn.layer_idx = depth
        self._takes_mask = "attention_mask" in inspect.signature(self.attn.forward).parameters
        self.grid_size: tuple[int, int] | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **self._attention_inputs(attn_mask, is_causal))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attention_inputs(self, attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
        info: AttentionInfo = self.attn.attention_info
        mask = _host_mask(attn_mask, is_causal, info.name, self._takes_mask, self.attn.is_causal)
        inputs: dict[str, Any] = {"attention_mask": mask} if self._takes_mask else {}
        return {**inputs, "grid_size": self.grid_size} if info.spatial else inputs


@torch.fx.wrap
@register_notrace_function
def _host_mask(attn_mask: Tensor | None, is_causal: bool, name: str, takes_mask: bool, built_causal: bool) -> Tensor | None:
    """The mask that timm hands to a block, in our vocabulary; a leaf for torch.fx, since it looks at values."""
    if is_causal and not built_causal:
        raise ValueError(f"{name!r} was built noncausal: give attention_kwargs=dict(is_causal=True) at construction")
    if attn_mask is None:
        return None
    if not takes_mask:
        raise ValueError(f"{name!r} takes no attention mask")
    if attn_mask.ndim == 3:  # (B, N, N)
        return attn_mask.unsqueeze(1)
    return attn_mask[(None,) * (4 - attn_mask.ndim)]  # timm's 2-D boolean mask is (N, N); ours would be padding


class _ShareGrid:
    """Forward hook of the patch embedding: tells every block the grid that its tokens stand on, also when image sizes vary."""

    def __init__(self, blocks: list[AttentionBlock]) -> None:
        self.blocks = blocks

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        grid = tuple(patch_embed.dynamic_feat_size(inputs[0].shape[-2:]))
        for block in self.blocks:
            block.grid_size = grid


def build_vit(
    name: str, attention: str, attention_kwargs: dict[str, Any] | None = None, pretrained: bool = False, **kwargs: Any
) -> Any:
    """timm's Vision Transformer `name` with `attention` in every block.

    Args:
        name: one of timm's own Vision Transformers, `vit_small_patch16_224` for instance.
        attention: a registered mechanism that does noncausal self attention.
        attention_kwargs: its options.
        pretrained: load timm's weights; possible with attention="mha" only, whose parameters are timm's.
        kwargs: timm's own, `num_classes`, `img_size`, `class_token`, `features_only`, ...

    A spatial mechanism without a place for class or register tokens gets a model without them, pooled by averaging.

    Raises:
        UnknownNameError: no such mechanism.
        ValueError: a name that is not built of timm's standard block, class tokens asked for where they cannot be, pretrained
            weights for another attention.
    """
    if pretrained and attention != "mha":
        raise ValueError(f"pretrained weights of {name!r} belong to its own attention; {attention!r} starts from random weights")
    _check_standard_block(name)
    num_prefix_tokens = _count_prefix_tokens(name, kwargs) if attention_info(attention).prefix_tokens else 0
    arguments = _host_arguments(attention, attention_kwargs, kwargs, num_prefix_tokens)
    model = timm.create_model(name, pretrained=pretrained, **arguments)
    if hasattr(model, "_model_args"):  # newer timm writes these to its config files: a block function has no place there
        model._model_args = {k: v for k, v in model._model_args.items() if k != "block_fn"} | {"attention": attention}
    return share_grid(model)


def _host_arguments(
    attention: str, attention_kwargs: dict[str, Any] | None, kwargs: dict[str, Any], num_prefix_tokens: int
) -> dict[str, Any]:
    """timm's keyword arguments for a Vision Transformer with this attention. Raises ValueError when the two do not go together."""
    info = check_attention(attention, "a Vision Transformer")
    if info.spatial and not info.prefix_tokens:
        if kwargs.get("class_token") or kwargs.get("reg_tokens") or kwargs.get("global_pool") == "token":
            raise ValueError(
                f"{attention!r} works on a grid of patches and has no place for class or register tokens: leave out class_token "
                "and reg_tokens, and pool with global_pool='avg'"
            )
        kwargs = {"global_pool": "avg", **kwargs, "class_token": False, "reg_tokens": 0}
    block = functools.partial(
        AttentionBlock, attention=attention, attention_kwargs=attention_kwargs, num_prefix_tokens=num_prefix_tokens
    )
    return {**kwargs, "block_fn": block}


def _count_prefix_tokens(name: str, kwargs: dict[str, Any]) -> int:
    """Class and register tokens of timm's model `name`, built with these arguments."""
    said = {k: kwargs[k] for k in ("class_token", "reg_tokens", "global_pool") if k in kwargs}
    with torch.device("meta"):
        return int(timm.create_model(name, **said).num_prefix_tokens)


@functools.cache
def _check_standard_block(name: str) -> None:
    """Raise ValueError unless timm builds `name` of its standard pre-norm block, the only one that ours stands for."""
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, VisionTransformer) or {type(block) for block in model.blocks} != {Block}:
        raise ValueError(
            f"attention= needs a Vision Transformer of timm's standard block (vit_*, deit_*, deit3_*); {name!r} is built otherwise"
        )


def share_grid(model: nn.Module) -> nn.Module:
    """Let the blocks of a Vision Transformer (or of timm's feature wrapper around one) follow the grid of the patch embedding.

    Raises:
        ValueError: patches are dropped in training, and a mechanism needs their grid.
    """
    for vit in [m for m in model.modules() if isinstance(m, VisionTransformer)]:
        blocks = [b for b in vit.blocks if isinstance(b, AttentionBlock)]
        if any(b.attn.attention_info.spatial for b in blocks):
            if not isinstance(vit.patch_drop, nn.Identity):
                raise ValueError(f"patch_drop_rate={vit.patch_drop.prob} leaves no grid for attention that works on one; give 0")
            vit.patch_embed.register_forward_hook(_ShareGrid(blocks))
    return model


# The paper's hosts: size -> timm's arguments, and the number of key/value heads (half of the query heads).
_SIZES = {
    "small": ({"embed_dim": 384, "depth": 12, "num_heads": 6}, 3),
    "base": ({"embed_dim": 768, "depth": 12, "num_heads": 12}, 6),
    "large": ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, 8),
}
_KDGQA = ("gqa", "kdgqa", "dgqa", "pgqa")
_PATCHES = {"img_size": 224, "patch_size": 16}
# Name -> timm's arguments, the mechanism and its options. The bare name is the family's configurable entry point.
_VARIANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "vit_kdgqa": ({**_PATCHES, **_SIZES["base"][0]}, "kdgqa", {}),
    **{
        f"vit_{size}_patch16_224_{attention}": (
            {**_PATCHES, **arguments},
            attention,
            # the official pgqa is random in eval as well; a model with a name gives one answer
            {"num_kv_heads": num_kv_heads, **({"eval_seed": 0} if attention == "pgqa" else {})},
        )
        for size, (arguments, num_kv_heads) in _SIZES.items()
        for attention in _KDGQA
    },
}
_CFG: dict[str, Any] = {
    "pool_size": None,
    "crop_pct": 1.0,
    "fixed_input_size": True,
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
    "first_conv": "patch_embed.proj",
    "license": "mit",
    "paper_ids": "arXiv:2408.08454",
    "paper_name": "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "origin_url": "https://github.com/zohaib-khan5040/key-driven-gqa",
}
default_cfgs = generate_default_cfgs({name: imagenet_cfg(**_CFG) for name in _VARIANTS})


def _register(name: str) -> None:
    """Register a variant with timm, as a function of this module, and its preset with the zoo."""
    preset, mechanism, own = _VARIANTS[name]

    def entry(pretrained: bool = False, attention: str = mechanism, attention_kwargs: Any = None, **kwargs: Any) -> Any:
        kept = own if attention == mechanism else {k: v for k, v in own.items() if k == "num_kv_heads" and attention in _KDGQA}
        options = {**kept, **(attention_kwargs or {})}
        num_prefix_tokens = int(kwargs.get("class_token", True)) + kwargs.get("reg_tokens", 0)
        arguments = _host_arguments(attention, options, {**preset, **kwargs}, num_prefix_tokens)
        model = build_model_with_cfg(
            VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
            **arguments,
        )
        return share_grid(model)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Vision Transformer with {mechanism} (arXiv 2408.08454): {preset}, {own or 'half as many key/value heads'}."
    globals()[name] = register_model(entry)
    register_model_info(name, "vit_kdgqa", attention=mechanism, attention_kwargs=own, **preset)


for _name in _VARIANTS:
    _register(_name)
for _size, (_arguments, _) in _SIZES.items():  # timm's own names: the paper's baseline, whose official files convert as well
    register_model_info(f"vit_{_size}_patch16_224", "vit_kdgqa", attention="mha", **_PATCHES, **_arguments)
