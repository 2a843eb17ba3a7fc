"""What the tests of attention maps share: a small Vision Transformer, one recorded forward, and how near is near."""

from __future__ import annotations

from typing import Any

import timm
import torch
from attention_case import seeded
from torch import Tensor, nn

import attention_zoo as az

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(**options: Any) -> nn.Module:
    with seeded(0):
        model: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=24, num_classes=3, **options
        )
    return model.eval()


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0.0)


def record(model: nn.Module, *args: Any, call: dict[str, Any] | None = None, **choice: Any) -> tuple[Any, az.AttentionMaps]:
    with az.record_attention(model, **choice) as maps, torch.no_grad():
        return model(*args, **(call or {})), maps
