"""A zoo of attention: every paper's mechanism as a module that is provably the paper's, with backbones and fast engines."""

from attention_zoo import attention as _mechanisms  # noqa: F401 - registers them
from attention_zoo import ops
from attention_zoo._version import __version__
from attention_zoo.attention import auxiliary_loss, cache_report, grow_model, grow_signal_heads, set_routed_topk, set_training_step
from attention_zoo.checkpoints import CheckpointError, convert_official_state_dict
from attention_zoo.models import create_model, list_models  # type: ignore[import-not-found]  # installed from models/
from attention_zoo.ops import BackendError, backends, explain, use_backend
from attention_zoo.registry import (
    AttentionInfo,
    UnknownNameError,
    attention_info,
    create_attention,
    list_attentions,
    register_attention,
)

__all__ = [
    "AttentionInfo",
    "BackendError",
    "CheckpointError",
    "UnknownNameError",
    "__version__",
    "attention_info",
    "auxiliary_loss",
    "backends",
    "cache_report",
    "convert_official_state_dict",
    "create_attention",
    "create_model",
    "explain",
    "grow_model",
    "grow_signal_heads",
    "list_attentions",
    "list_models",
    "ops",
    "register_attention",
    "set_routed_topk",
    "set_training_step",
    "use_backend",
]
