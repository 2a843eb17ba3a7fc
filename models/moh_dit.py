"""MoH-DiT: diffusion transformers for class-conditional images, with Mixture-of-Head attention in their blocks.

MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, 2024, in Scalable Diffusion Models with Transformers,
arXiv 2212.09748, 2022; follows the official MoH code (SkyworkAI/MoH). The models work on the latents of an autoencoder and are
called with a timestep and a label, so they are no image classifiers: `create_model` builds them, timm's registry does not list
them. The paper trains with 0.01 times `attention_zoo.auxiliary_loss(model)` added to the diffusion loss.
Deviations: numbers of heads are one number or one for each layer everywhere; `head_dim` counts in both cases; any mechanism can
stand in the blocks ("mha": the dense DiT); latents may be rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from attention_zoo.registry import model_info, register_builder, register_model_info

from ._host import build_attention, check_attention

__all__ = ["MoHDiT"]

PerLayer = int | Sequence[int] | None
_NUM_FREQUENCIES = 128


class TimestepEmbedder(nn.Module):
    """Cosines and sines of the timestep at 128 frequencies, from 1 down to nearly 1/10000, through an MLP.

    Shape: t (B,), whole or fractional -> (B, dim).
    """

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.mlp: Any = nn.Sequential(nn.Linear(2 * _NUM_FREQUENCIES, dim, **factory), nn.SiLU(), nn.Linear(dim, dim, **factory))

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        steps = torch.arange(_NUM_FREQUENCIES, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * steps / _NUM_FREQUENCIES)
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))
        return out


class LabelEmbedder(nn.Module):
    """A vector for each class and, for guidance without a classifier, one for no class, which training puts in at random.

    Args:
        num_classes: the classes 0 to num_classes - 1; num_classes itself is none of them.
        dropout: probability with which a label is dropped in training mode; 0: there is no vector for no class.

    Shape: y (B,) integer -> (B, dim).
    """

    def __init__(self, num_classes: int, dim: int, dropout: float, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes)
        out: Tensor = self.embedding_table(y)
        return out


class MoHDiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero: all gates start at 0).

    Args:
        attention: a module of `build_attention`.

    Shape: x (B, N, C), condition (B, C) -> (B, N, C).
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float = 4.0, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.attn: Any = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"), **factory)  # type: ignore[arg-type]
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **factory))

    def forward(self, x: Tensor, condition: Tensor, grid_size: tuple[int, int]) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        place = {"grid_size": grid_size} if self.attn.attention_info.spatial else {}
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn, **place)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Normalisation, shifted and scaled by the condition, and the projection of every token to its patch.

    Shape: x (B, N, C), condition (B, C) -> (B, N, out_features).
    """

    def __init__(self, dim: int, out_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.linear = nn.Linear(dim, out_features, **factory)
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **factory))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class MoHDiT(nn.Module):
    """Predicts the noise in a latent image, and with `learn_sigma` what its variance is made of, from timestep and label.

    Args:
        input_size: side or (H, W) of the latents, an eighth of the image's with the usual autoencoder.
        patch_size: side of the patches.
        in_channels: channels of the latents.
        dim: channels C of the tokens.
        depth: number of blocks.
        num_heads: heads of a block, one number or one for each.
        head_dim: channels of a head, one number or one for each block; None: dim / num_heads.
        mlp_ratio: hidden width of the MLPs over C.
        class_dropout_prob: probability with which a label is dropped in training; 0: the model cannot be guided.
        num_classes: number of labels; the label `num_classes` stands for none.
        learn_sigma: whether the output has a second half for the variance.
        shared_heads, routed_topk: of `moh`, one number or one for each block; None: the mechanism's own choice.
        attention: the mechanism of the blocks, any registered one that does noncausal self attention.
        attention_kwargs: its options.

    Shape: x (B, in_channels, H, W), t (B,), y (B,) -> (B, 2 in_channels, H, W), or in_channels without `learn_sigma`.

    Raises:
        ValueError: lists of another length than `depth`, a mechanism that cannot stand here or lacks a setting, an input of
            another size.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 1152,
        depth: int = 28,
        num_heads: int | Sequence[int] = 16,
        head_dim: PerLayer = None,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        shared_heads: PerLayer = None,
        routed_topk: PerLayer = None,
        attention: str = "moh",
        attention_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_attention(attention, "MoH-DiT")
        self.input_size, self.patch_size = to_2tuple(input_size), patch_size
        if patch_size < 1 or any(side < 1 or side % patch_size for side in self.input_size) or dim % 4:
            raise ValueError(
                f"patch_size={patch_size} must divide input_size={self.input_size}, and dim={dim} be a multiple of 4, for the "
                f"positions; the nearest dim is {max(4, round(dim / 4) * 4)}"
            )
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.attention, self.grad_checkpointing = num_classes, attention, False
        self.grid_size = (self.input_size[0] // patch_size, self.input_size[1] // patch_size)
        heads, widths = _per_layer("num_heads", num_heads, depth), _per_layer("head_dim", head_dim, depth)
        own = {
            name: _per_layer(name, value, depth) for name, value in (("shared_heads", shared_heads), ("routed_topk", routed_topk))
        }

        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, dim, **factory)
        self.t_embedder = TimestepEmbedder(dim, **factory)
        self.y_embedder = LabelEmbedder(num_classes, dim, class_dropout_prob, **factory)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), dim, **factory), requires_grad=False)
        host = {"qkv_bias": True, **factory}
        blocks = []
        for i in range(depth):
            moh = {name: values[i] for name, values in own.items()} if attention == "moh" else {}
            options = {**({} if widths[i] is None else {"head_dim": widths[i]}), **moh, **(attention_kwargs or {})}
            layer = build_attention(attention, dim, heads[i], host, options)
            blocks.append(MoHDiTBlock(dim, layer, mlp_ratio, **factory))
        self.blocks: Any = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(dim, patch_size**2 * self.out_channels, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity, the output as 0. Mechanisms other than `moh` keep their own."""
        foreign = {m for block in self.blocks if self.attention != "moh" for m in block.attn.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in foreign:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1).detach())  # a view: as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        silent = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in (*silent, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.pos_embed.copy_(_positions(self.grid_size, self.pos_embed.shape[-1]))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates: what embeds, a block each, the final layer."""
        return {"stem": r"^([xty]_embedder|pos_embed)", "blocks": [(r"^blocks\.(\d+)", None), (r"^final_layer", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise (and variance) of the latents `x` at the timesteps `t`, given the labels `y`."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            raise ValueError(f"x must be (B, {self.in_channels}, {self.input_size[0]}, {self.input_size[1]}), got {tuple(x.shape)}")
        condition = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            step = partial(checkpoint, block) if self.grad_checkpointing else block
            x = step(x, condition, self.grid_size)
        return self._unpatchify(self.final_layer(x, condition))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, *, guided_channels: int = 3) -> Tensor:
        """`forward` with classifier-free guidance: noise = unconditional + cfg_scale * (conditional - unconditional).

        Args:
            x, t, y: a batch whose second half is the first again with the label `num_classes`; x's second half is not looked at.
            cfg_scale: 1 is no guidance.
            guided_channels: how many channels are guided, the first ones. The official code guides 3 of 4; `in_channels` for all.

        Shape: as `forward`; both halves have the same guided channels.

        Raises:
            ValueError: an odd batch, or a model that was built without a vector for no label.
        """
        if len(x) % 2 or not self.y_embedder.dropout:
            raise ValueError(
                f"guidance needs an even batch, got {len(x)}, and class_dropout_prob > 0, got {self.y_embedder.dropout}"
            )
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        with_label, without = out[:, :guided_channels].chunk(2)
        guided = without + cfg_scale * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), out[:, guided_channels:]], 1)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, patch_size^2 * out_channels) -> (B, out_channels, H, W)."""
        patches = x.unflatten(2, (self.patch_size, self.patch_size, self.out_channels)).unflatten(1, self.grid_size)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _per_layer(name: str, value: PerLayer, depth: int) -> list[Any]:
    """One value for each layer. Raises ValueError for a list of another length."""
    if value is None or isinstance(value, int):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} must be one number or one for each of depth={depth} layers, got {len(value)}: {list(value)}")
    return list(value)


def _positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Fixed position table (H * W, dim): sines and cosines of the column, then of the row, at dim / 4 frequencies each."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid_size)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], -1) for angles in (rows, columns))
    height, width = grid_size
    return torch.cat([columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], -1).flatten(0, 1)


def _repeat(*runs: tuple[int, int]) -> list[int]:
    """(value, number of layers) one after another."""
    return [value for value, layers in runs for _ in range(layers)]


def _variant(
    depth: int, dim: int, head_dim: int, num_heads: int | list[int], shared: list[int], routed: list[int]
) -> dict[str, Any]:
    heads = {"num_heads": num_heads, "shared_heads": shared, "routed_topk": routed}
    return {"depth": depth, "dim": dim, "head_dim": head_dim, **heads}


_L_HEADS = _repeat((8, 8), (16, 8), (24, 8))
_XL_HEADS = _repeat((8, 9), (16, 10), (24, 9))
# 90 and 75 are the percentages of heads that a token uses. The bare name is the family's configurable entry point.
_VARIANTS: dict[str, dict[str, Any]] = {
    "moh_dit": {"depth": 12, "dim": 384, "num_heads": 6},
    "moh_dit_s_2_90": _variant(12, 384, 64, 6, _repeat((3, 8), (6, 4)), _repeat((2, 8), (0, 4))),
    "moh_dit_s_2_75": _variant(12, 384, 64, 6, _repeat((2, 2), (3, 8), (6, 2)), _repeat((1, 6), (2, 4), (0, 2))),
    "moh_dit_b_2_90": _variant(12, 768, 64, 12, _repeat((6, 5), (7, 5), (12, 2)), _repeat((4, 10), (0, 2))),
    "moh_dit_b_2_75": _variant(12, 768, 64, 12, _repeat((4, 2), (6, 8), (12, 2)), _repeat((2, 2), (3, 8), (0, 2))),
    "moh_dit_l_2_90": _variant(24, 1024, 64, _L_HEADS, _repeat((8, 8), (16, 16)), _repeat((0, 16), (3, 8))),
    "moh_dit_l_2_75": _variant(24, 1024, 64, _L_HEADS, _repeat((8, 16), (12, 8)), _repeat((0, 8), (4, 16))),
    "moh_dit_xl_2_90": _variant(28, 1152, 72, _XL_HEADS, _repeat((8, 9), (16, 19)), _repeat((0, 19), (3, 9))),
    "moh_dit_xl_2_75": _variant(28, 1152, 72, _XL_HEADS, _repeat((8, 9), (10, 10), (14, 9)), _repeat((0, 9), (2, 19))),
}


@register_builder("moh_dit")
def build_moh_dit(name: str, family: str, *, attention: str | None = None, attention_kwargs: Any = None, **kwargs: Any) -> MoHDiT:
    """Build the variant `name`; arguments as for `MoHDiT`."""
    chosen = {} if attention is None else {"attention": attention}
    return MoHDiT(**{**model_info(name).kwargs, **chosen, **kwargs}, attention_kwargs=attention_kwargs)


for _name, _preset in _VARIANTS.items():
    register_model_info(_name, "moh_dit", **_preset)
