"""What the classifiers that are pyramids of stages share: timm's interface, written once over `forward_stages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import create_classifier, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["Grid", "PyramidClassifier", "block_types", "check_stages", "factory_of", "init_linear", "to_map"]

Grid = tuple[int, int]


class PyramidClassifier(nn.Module):
    """timm's interface of a classifier whose stages halve the grid; the final norm is on tokens, the head pools its map.

    A family's class builds its stages, `norm` and `head_drop`, sets `feature_info`, `num_features`, `head_hidden_size`, `in_chans`
    and `num_stages`, calls `_create_head`, and defines `forward_stages` and `prune_stages`.

    Shape: x (B, in_chans, H, W) -> (B, num_classes). `forward_features` gives the last stage's map (B, C, H', W'), normalised.
    """

    num_stages: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: Any
    norm: nn.Module
    head_drop: nn.Module

    def forward_stages(self, x: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Image -> tokens (B, N_i, C_i) and grid of each of the first stages (all if None), before what leads to the next."""
        raise NotImplementedError

    def prune_stages(self, last: int) -> None:
        """Drop the stages after `last`, and the way to them."""
        raise NotImplementedError

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
