"""A zoo of attention: every paper's mechanism as a module that is provably the paper's, with backbones and fast engines."""

from typing import TYPE_CHECKING, Any

from attention_zoo import attention as _mechanisms  # noqa: F401 - registers them
from attention_zoo import ops
from attention_zoo._version import __version__
from attention_zoo.attention import auxiliary_loss, cache_report, grow_model, grow_signal_heads, set_routed_topk, set_training_step
from attention_zoo.attention.functional import list_functionals, register_functional
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

if TYPE_CHECKING:
    from attention_zoo.analysis import AttentionMaps, record_attention
    from attention_zoo.swap import SwapReport, from_pretrained, save_pretrained, swap_attention, unswap

__all__ = [
    "AttentionInfo",
    "AttentionMaps",
    "BackendError",
    "CheckpointError",
    "SwapReport",
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
    "from_pretrained",
    "grow_model",
    "grow_signal_heads",
    "list_attentions",
    "list_functionals",
    "list_models",
    "ops",
    "record_attention",
    "register_attention",
    "register_functional",
    "save_pretrained",
    "set_routed_topk",
    "set_training_step",
    "swap_attention",
    "unswap",
    "use_backend",
]

_SWAP = ("SwapReport", "from_pretrained", "save_pretrained", "swap_attention", "unswap")
_ANALYSIS = ("AttentionMaps", "record_attention")


def __getattr__(name: str) -> Any:
    """Names of the swap and of the analysis, whose rooms are imported when they are asked for: who needs neither does not wait."""
    if name in _SWAP:
        from attention_zoo import swap

        return getattr(swap, name)
    if name in _ANALYSIS:
        from attention_zoo import analysis

        return getattr(analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SWAP, *_ANALYSIS})
