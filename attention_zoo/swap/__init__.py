"""Mechanisms in existing Hugging Face and timm models."""

from attention_zoo.swap import decoders, encoders, vision  # noqa: F401 - they register their adapters
from attention_zoo.swap.core import swap_attention, unswap
from attention_zoo.swap.report import LayerSwap, SwapReport
from attention_zoo.swap.save import from_pretrained, save_pretrained

__all__ = ["LayerSwap", "SwapReport", "from_pretrained", "save_pretrained", "swap_attention", "unswap"]
