"""What every vision family says to timm: the metadata of its variants, and timm's builder with a variant's preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

__all__ = ["AGENT_PAPER", "create_variant", "imagenet_cfg"]

# The paper of several families.
AGENT_PAPER = {
    "license": "unknown",
    "paper_ids": "arXiv:2312.08874",
    "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
    "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
}


def imagenet_cfg(side: int = 224, **changes: Any) -> dict[str, Any]:
    """timm's metadata of an ImageNet classifier without weights to fetch, whose last map is a 32nd of the image.

    Args:
        side: of the images.
        changes: further fields, or others; every family says `first_conv`, `license`, `paper_ids`, `paper_name` and `origin_url`.
    """
    pool = -(-side // 32)
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (pool, pool),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **changes,
    }


def create_variant(
    cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    arguments: Mapping[str, Any],
    *,
    depths: str = "depths",
    feature_cls: Any = "getter",
) -> Any:
    """timm's builder for a pyramid of stages; features are all stages' maps unless `out_indices` says otherwise.

    Args:
        cls: the classifier.
        variant: its registered name.
        pretrained: timm's argument.
        arguments: the variant's preset, and what the caller has given over it.
        depths: which argument has an entry for each stage.
        feature_cls: the family's dense backbone, which takes `out_norm`; "getter": timm's, over `forward_intermediates`.

    Raises:
        ValueError: `out_indices` or `out_norm` without features.
    """
    kwargs = dict(arguments)
    feature_cfg: dict[str, Any] = {"out_indices": tuple(range(len(kwargs[depths]))), "feature_cls": feature_cls}
    if feature_cls != "getter" and (out_norm := kwargs.pop("out_norm", None)) is not None:
        if not kwargs.get("features_only") or "feature_cls" in kwargs:
            raise ValueError(f"out_norm belongs to features_only=True, with the family's own {feature_cls.__name__}")
        feature_cfg["out_norm"] = out_norm
    if "out_indices" in kwargs and not kwargs.get("features_only"):
        raise ValueError("out_indices belongs to features_only=True")
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
