"""Mechanisms in existing Hugging Face and timm models."""
