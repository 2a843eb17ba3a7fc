"""Mechanisms in existing Hugging Face and timm models."""

from attention_zoo.swap import encoders, vision  # noqa: F401 - they register their adapters
