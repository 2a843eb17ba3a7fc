"""Attention as functions of tensors: the reference, the engines, and which of them serves a call."""

from attention_zoo.ops.attention import attention, merge_attention

__all__ = ["attention", "merge_attention"]
