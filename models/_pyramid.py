"""What the models that are pyramids of stages share: timm's interface, written once over `forward_stages`, and common parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from timm.layers import DropPath, PatchEmbed, create_classifier, trunc_normal_
from timm.models import FeatureInfo, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = [
    "Grid",
    "PreNormBlock",
    "Pyramid",
    "PyramidClassifier",
    "PyramidFeatures",
    "PyramidStage",
    "block_types",
    "check_stages",
    "factory_of",
    "init_linear",
    "patches",
    "run_blocks",
    "to_map",
]

Grid = tuple[int, int]


class Pyramid(nn.Module):
    """Stages that halve the grid. A family's classifier and its dense backbone, if it has its own, share the same stages.

    A family defines `forward_stages` and `prune_stages`.
    """

    feature_info: Any
    grad_checkpointing = False

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image -> tokens (B, N_i, C_i) and grid of each of the first stages (all if None), before what leads to the next."""
        raise NotImplementedError

    def prune_stages(self, last: int) -> None:
        """Drop the stages after `last`, and the way to them."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        modules: Iterable[Any] = self.modules()
        for module in modules:
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """None by name: timm leaves biases and normalisations out by their shape, as the official recipes do."""
        return set()


class PyramidClassifier(Pyramid):
    """timm's interface of a classifier; the final norm is on tokens, the head pools its map.

    A family's class calls `_set_sizes`, builds its stages, and calls `_create_end`.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives the last stage's map (B, C, H', W'), normalised.
    """

    num_stages: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    norm: nn.Module
    head_drop: nn.Module

    def _set_sizes(
        self, widths: Sequence[int], in_chans: int, num_classes: int, reduction: int, stage: str, first: int = 0
    ) -> None:
        """Note what timm asks of a classifier of stages.

        Args:
            widths: channels of their maps.
            in_chans, num_classes: of the model.
            reduction: stride of the first map.
            stage: name of a stage, but for its number.
            first: number of the first stage.
        """
        self.num_stages, self.num_classes, self.in_chans = len(widths), num_classes, in_chans
        self.feature_info = [
            {"num_chs": width, "reduction": reduction * 2**i, "module": f"{stage}{first + i}"} for i, width in enumerate(widths)
        ]
        self.num_features = self.head_hidden_size = widths[-1]

    def _create_end(self, norm: nn.Module, drop_rate: float, global_pool: str, **factory: Any) -> None:
        """All that comes after the stages."""
        self.norm, self.head_drop = norm, nn.Dropout(drop_rate)
        self._create_head(self.num_classes, global_pool, **factory)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with `num_classes` outputs (0: none); `global_pool` None keeps the pooling."""
        self.num_classes = num_classes
        self._create_head(num_classes, self.pool_type if global_pool is None else global_pool, **factory_of(self))
        if isinstance(self.head, nn.Linear):
            init_linear(self.head)

    def _create_head(self, num_classes: int, pool_type: str, device: Any = None, dtype: Any = None) -> None:
        self.pool_type = pool_type
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type, device=device, dtype=dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, (B, C, H', W')."""
        x, grid_size = self.forward_stages(x)[-1]
        return to_map(self._final_norm(x), grid_size)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages before their downsampling, and the final features.

        Args:
            x: image (B, in_chans, H, W).
            indices: which stages; the last n if a number, all if None.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out the stages after the last of `indices`; the final features are then that stage's.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps only.

        Raises:
            ValueError: another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(self.num_stages, indices)
        found = self.forward_stages(x, last + 1 if stop_early else None)
        maps = []
        for i in take:
            tokens, grid_size = found[i]
            tokens = self._final_norm(tokens) if norm and i == self.num_stages - 1 else tokens
            maps.append(to_map(tokens, grid_size) if output_fmt == "NCHW" else tokens.unflatten(1, grid_size))
        if intermediates_only:
            return maps
        tokens, grid_size = found[-1]
        return to_map(self._final_norm(tokens) if len(found) == self.num_stages else tokens, grid_size), maps

    def _final_norm(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.norm(tokens)
        return out

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of `indices` do not need; the norm and the head go with the last stage. Returns the stages taken."""
        take, last = feature_take_indices(self.num_stages, indices)
        shortened = last < self.num_stages - 1
        self.prune_stages(last)
        self.num_stages = last + 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return list(take)


class PyramidFeatures(Pyramid):
    """The dense backbone of a family: maps of the stages; parameters are named as the classifier's.

    Args:
        model: the classifier whose stages become its own.
        out_indices: which stages; the last n if a number.
        parts: names of what the stages are, which are taken over.

    Shape: x (B, in_chans, H, W) -> list of (B, C_i, H_i, W_i).
    """

    def __init__(self, model: PyramidClassifier, out_indices: int | Sequence[int], parts: Sequence[str]) -> None:
        super().__init__()
        take, last = feature_take_indices(model.num_stages, out_indices if isinstance(out_indices, int) else list(out_indices))
        self.out_indices = sorted(set(take))
        self.feature_info = FeatureInfo(model.feature_info, tuple(self.out_indices))
        for name in parts:
            setattr(self, name, getattr(model, name))
        self.prune_stages(last)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self.forward_stages(x)
        return [self._to_map(i, *found[i]) for i in self.out_indices]

    def _to_map(self, index: int, tokens: Tensor, grid_size: Grid) -> Tensor:
        """The map of stage `index`, for the reader."""
        return to_map(tokens, grid_size)


class PyramidStage(nn.Module):
    """Blocks of one resolution. `downsample`, which leads to the next stage, is called by the model: features are taken before it.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample: Any = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        return run_blocks(self.blocks, x, grid_size, self.grad_checkpointing)


class PreNormBlock(nn.Module):
    """Pre-norm block: attention, then the MLP, each with stochastic depth.

    Args:
        dim: channels.
        attention: a module of `build_attention`, or another that takes `grid_size`.
        mlp: the MLP.
        mlp_on_grid: whether the MLP is given the grid, too.
        norm_eps: epsilon of the normalisations.
        drop_path: rate of stochastic depth.

    Shape: x (B, H * W, C) -> (B, H * W, C).
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        mlp_on_grid: bool = False,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.mlp_on_grid = mlp_on_grid
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn: Any = attention
        info = getattr(attention, "attention_info", None)
        self.attn_on_grid = info is None or info.spatial
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:
        place = {"grid_size": grid_size}
        x = x + self.drop_path1(self.attn(self.norm1(x), **(place if self.attn_on_grid else {})))
        return x + self.drop_path2(self.mlp(self.norm2(x), **(place if self.mlp_on_grid else {})))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, grid_size: Grid, grad_checkpointing: bool) -> Tensor:
    """Tokens (B, N, C) through blocks that take the grid; `grad_checkpointing` computes them again in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, grid_size) if grad_checkpointing else block(x, grid_size)
    return x


def patches(in_chans: int, dim: int, side: int, *, normed: bool = True, padded: bool = True, **factory: Any) -> PatchEmbed:
    """timm's patches for images of any size, as a map (B, H, W, C).

    Args:
        in_chans, dim: channels before and after.
        side: of a patch.
        normed: whether they are normalised.
        padded: whether zeros are added for what patches do not cover, or that is left out.
    """
    return PatchEmbed(
        img_size=None,
        patch_size=side,
        in_chans=in_chans,
        embed_dim=dim,
        norm_layer=nn.LayerNorm if normed else None,
        output_fmt="NHWC",
        strict_img_size=False,
        dynamic_img_pad=padded,
        **factory,
    )


def check_stages(**lists: Sequence[Any]) -> None:
    """Raise ValueError unless every list has an entry for each stage, and every stage a block: the first list is the depths."""
    depths = next(iter(lists.values()))
    if len({len(value) for value in lists.values()}) != 1 or not depths or min(depths) < 1:
        given = ", ".join(f"{name}={tuple(value)}" for name, value in lists.items())
        raise ValueError(f"one entry for each stage, and at least one block in each; got {given}")


def block_types(attn_type: str, depths: Sequence[int], letters: str = "AB") -> list[str]:
    """The kind of every block, a string for each stage.

    Args:
        attn_type: a letter for each stage, one of the two `letters` or M: the first k blocks of the first kind, the others of the
            second; k stands after all letters, as in "AAMB2".
        depths: blocks of each stage.

    Raises:
        ValueError: letters that say nothing, or a k without M, or M without k.
    """
    first, second = tuple(letters)
    stages, number = attn_type[: len(depths)], attn_type[len(depths) :]
    if (
        len(stages) != len(depths)
        or set(stages) - {first, second, "M"}
        or ("M" in stages) != number.isdecimal()
        or (number and not number.isdecimal())
    ):
        raise ValueError(
            f"attn_type must have {len(depths)} letters, one for each stage, of {first}, {second} and M, and then, where one is M, "
            f"how many of its blocks are {first}, as in {(first * len(depths))[:-1] + 'M2'!r}; got {attn_type!r}"
        )
    mixed = int(number or 0)
    return [
        first * min(mixed, depth) + second * max(depth - mixed, 0) if letter == "M" else letter * depth
        for letter, depth in zip(stages, depths, strict=True)
    ]


def to_map(tokens: Tensor, grid_size: Grid) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view; this way one sample has the strides of a channels-last image too."""
    return tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)


def factory_of(module: nn.Module) -> dict[str, Any]:
    """Where a model's parameters are, for those that it gets later."""
    parameter = next(module.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def init_linear(module: nn.Linear) -> None:
    """Weights from a normal distribution of deviation 0.02, cut at 2; no bias."""
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
