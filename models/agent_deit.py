"""Agent-DeiT: a Vision Transformer (DeiT) whose first blocks, or all of them, read through agent tokens.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023; official code
LeapLabTHU/Agent-Attention. Everything but the attention is timm's Vision Transformer, parameter names included. The bias tables
belong to the grid of `img_size` and are resampled on any other, so that `dynamic_img_size=True` and `set_input_size` work. Weight
decay applies to the bias tables as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from attention_zoo.registry import register_model_info

from ._host import check_attention
from ._timm import AGENT_PAPER, imagenet_cfg
from .vit import AttentionBlock, share_grid

__all__ = ["AgentDeiT"]

_AGENT_GROUPS = (0, 1, 2, 2, 2, 3)  # entry of agent_num for each pair of blocks


class AgentDeiT(VisionTransformer):
    """Agent-DeiT classifier.

    Args:
        img_size: side or (H, W) of the images; the bias tables are as large as their grid of patches.
        patch_size: side of the patches.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0: no head.
        embed_dim: channels.
        depth: number of blocks.
        num_heads: heads of each block.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        agent_num: numbers of agents, squares, of four groups of blocks: 0-1, 2-3, 4-9, and all after that; one number for all.
        agent_layer: how many of the first blocks have agents, the others have plain softmax attention; negative: all have.
        attention: the mechanism of those first blocks, any registered one that does noncausal self attention.
        attention_kwargs: its options.
        class_token, reg_tokens: whether a class token, and how many register tokens, stand before the patches.
        vit_kwargs: all other arguments of timm's `VisionTransformer` (`global_pool`, `drop_path_rate`, `dynamic_img_size`, ...).

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives (B, 1 + N, C), normalised.

    Raises:
        ValueError: not four groups of agents, or a mechanism that cannot stand here.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        agent_num: int | Sequence[int] = (49, 49, 49, 49),
        agent_layer: int = -1,
        attention: str = "agent",
        attention_kwargs: dict[str, Any] | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        **vit_kwargs: Any,
    ) -> None:
        groups = (agent_num,) * 4 if isinstance(agent_num, int) else tuple(agent_num)
        if len(groups) != 4:
            raise ValueError(f"agent_num has four entries, one for each group of blocks, or is one number; got {agent_num}")
        info = check_attention(attention, "Agent-DeiT")
        if info.spatial and not info.prefix_tokens and (class_token or reg_tokens):
            raise ValueError(
                f"{attention!r} has no place for class or register tokens: give class_token=False and global_pool='avg'"
            )
        grid = tuple(side // patch for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True))

        def block_fn(*, depth: int, **kwargs: Any) -> AttentionBlock:
            kwargs["num_prefix_tokens"] = int(class_token) + reg_tokens
            if 0 <= agent_layer <= depth:
                return AttentionBlock(attention="mha", depth=depth, **kwargs)
            own: dict[str, Any] = {}
            if attention == "agent":
                own = {"agent_num": groups[_AGENT_GROUPS[min(depth // 2, 5)]], "window_size": grid}
            return AttentionBlock(attention=attention, attention_kwargs={**own, **(attention_kwargs or {})}, depth=depth, **kwargs)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            class_token=class_token,
            reg_tokens=reg_tokens,
            block_fn=block_fn,  # type: ignore[arg-type]  # timm calls it, and asks nothing else of the class
            **vit_kwargs,
        )
        share_grid(self)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resample the position table, and the bias tables of the attentions that have some, for another image or patch size."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            if callable(resize := getattr(block.attn, "set_window_size", None)):
                resize(self.patch_embed.grid_size)


# The published variants. The bare name is the family's configurable entry point, the tiny one unless the arguments say otherwise.
_TINY: dict[str, Any] = {"embed_dim": 192, "num_heads": 3}
_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1}
_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_deit": _TINY,
    "agent_deit_t": _TINY,
    "agent_deit_s": _SMALL,
    "agent_deit_s_448": {**_SMALL, "img_size": 448},
    "agent_deit_b": {"embed_dim": 768, "num_heads": 12, "agent_num": (81, 81, 81, 81), "agent_layer": 4, "drop_path_rate": 0.3},
}
_CFG: dict[str, Any] = {"pool_size": None, "fixed_input_size": True, "first_conv": "patch_embed.proj", **AGENT_PAPER}
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(preset.get("img_size", 224), **_CFG) for name, preset in _VARIANTS.items()}
)


def _create_agent_deit(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's builder with the variant's preset."""
    return build_model_with_cfg(
        AgentDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**_VARIANTS[variant], **kwargs},
    )


@register_model
def agent_deit(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-DeiT of any size; Agent-DeiT-T unless the arguments say otherwise."""
    return _create_agent_deit("agent_deit", pretrained, **kwargs)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-DeiT-T, 6.0 M parameters, 1.2 G multiply-adds at 224."""
    return _create_agent_deit("agent_deit_t", pretrained, **kwargs)


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-DeiT-S, 22.7 M parameters, 4.4 G multiply-adds at 224."""
    return _create_agent_deit("agent_deit_s", pretrained, **kwargs)


@register_model
def agent_deit_s_448(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-DeiT-S for images of 448 x 448, 23.1 M parameters, 17.6 G multiply-adds there."""
    return _create_agent_deit("agent_deit_s_448", pretrained, **kwargs)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs: Any) -> Any:
    """Agent-DeiT-B, agents in the first four blocks, 87.2 M parameters, 17.5 G multiply-adds at 224."""
    return _create_agent_deit("agent_deit_b", pretrained, **kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "agent_deit", **_preset)
