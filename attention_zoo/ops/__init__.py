"""Attention as functions of tensors: the reference, the engines, and which of them serves a call."""

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops.attention import attention, merge_attention
from attention_zoo.ops.dispatch import BACKENDS, BackendError, backends, explain, use_backend
from attention_zoo.ops.halo import halo_attention
from attention_zoo.ops.routed import routed_attention

__all__ = [
    "BACKENDS",
    "BackendError",
    "attention",
    "backends",
    "explain",
    "halo_attention",
    "merge_attention",
    "no_autocast",
    "routed_attention",
    "use_backend",
]
