"""The mechanisms: one file per paper, each registered under its name."""

from attention_zoo.attention.base import auxiliary_loss
from attention_zoo.attention.mha import MultiHeadAttention

__all__ = ["MultiHeadAttention", "auxiliary_loss"]
