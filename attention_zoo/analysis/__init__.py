"""What attention does in a model: attention maps of any layer, also where a fused engine computes it."""

from attention_zoo.analysis.effective import effective_attention
from attention_zoo.analysis.record import AttentionCall, AttentionMaps, record_attention

__all__ = ["AttentionCall", "AttentionMaps", "effective_attention", "record_attention"]
