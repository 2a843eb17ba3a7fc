"""Attention as functions of tensors: the reference, the engines, and which of them serves a call."""

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._split import split_channels
from attention_zoo.ops._tap import is_observed, observe
from attention_zoo.ops.agent import agent_attention, grid_bias, pool_tokens, resize_grid
from attention_zoo.ops.attention import attention, attention_weights, merge_attention
from attention_zoo.ops.cosine import cosine_queries, unit_heads
from attention_zoo.ops.depthwise import depthwise_conv2d
from attention_zoo.ops.differential import differential_attention, subtract_noise
from attention_zoo.ops.dispatch import BACKENDS, BackendError, backends, explain, use_backend
from attention_zoo.ops.foveal import foveal_attention
from attention_zoo.ops.halo import halo_attention
from attention_zoo.ops.head_map import attention_by_head_map
from attention_zoo.ops.mixture import gate_heads, load_balance_loss, mixture_attention, mixture_gates, query_norm_gates
from attention_zoo.ops.routed import routed_attention
from attention_zoo.ops.spans import span_attention
from attention_zoo.ops.windows import window_attention

__all__ = [
    "BACKENDS",
    "BackendError",
    "agent_attention",
    "attention",
    "attention_by_head_map",
    "attention_weights",
    "backends",
    "cosine_queries",
    "depthwise_conv2d",
    "differential_attention",
    "explain",
    "foveal_attention",
    "gate_heads",
    "grid_bias",
    "halo_attention",
    "is_observed",
    "load_balance_loss",
    "merge_attention",
    "mixture_attention",
    "mixture_gates",
    "no_autocast",
    "observe",
    "pool_tokens",
    "query_norm_gates",
    "resize_grid",
    "routed_attention",
    "span_attention",
    "split_channels",
    "subtract_noise",
    "unit_heads",
    "use_backend",
    "window_attention",
]
