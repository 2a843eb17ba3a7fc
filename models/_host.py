"""What every backbone and decoder needs to hold any mechanism: its settings handed over, none lost, none invented."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from timm.layers import register_notrace_module

from attention_zoo.registry import AttentionInfo, attention_class, attention_info, create_attention

__all__ = ["ZOO_ATTENTION", "build_attention", "build_causal_attention", "check_attention", "check_plain"]

ZOO_ATTENTION = "zoo"  # ours among transformers' attention implementations, see `_hf_attention.py`

# What each setting of a host is when it asks for nothing special: such a one need not exist on the mechanism.
_NEUTRAL = {"qkv_bias": True, "qk_norm": False, "scale_norm": False, "proj_bias": True, "attn_drop": 0.0, "proj_drop": 0.0}


def check_attention(attention: str, where: str) -> AttentionInfo:
    """What `attention` is. Raises ValueError unless it can stand in a block of `where`, UnknownNameError for no such mechanism."""
    info = attention_info(attention)
    if "noncausal_self" not in info.patterns or not info.keeps_shape:
        raise ValueError(f"{attention!r} cannot stand in {where}: that needs noncausal self attention, (B, N, C) -> (B, N, C)")
    return info


def build_attention(attention: str, dim: int, num_heads: int, host: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Any:
    """Build `attention` for a block of a backbone.

    Args:
        attention: name of the mechanism.
        dim, num_heads: of the block; `own` may override num_heads.
        host: the backbone's settings in timm's words (`qkv_bias`, `norm_layer`, `device`, ...); handed over where the mechanism has
            them.
        own: the mechanism's options; they win over the host's.

    Raises:
        ValueError: a setting of the host that the mechanism lacks and that says something.
        TypeError: an own option that the mechanism lacks.
    """
    cls, own = attention_class(attention), dict(own or {})
    parameters = inspect.signature(cls).parameters
    lost = [f"{k}={host[k]}" for k, v in _NEUTRAL.items() if k in host and k not in parameters and k not in own and host[k] != v]
    if lost:
        raise ValueError(f"the model is built with {', '.join(lost)}, which {attention!r} does not have")
    register_notrace_module(cls)  # a leaf for torch.fx, as timm's own layers with data-dependent Python are
    shared = {k: v for k, v in {"num_heads": num_heads, **host}.items() if k in parameters}
    return create_attention(attention, **{"dim": dim, **shared, **own})


def check_plain(attention_kwargs: Any) -> None:
    """Raise ValueError unless a configuration can save these options of a mechanism."""
    try:
        json.dumps(attention_kwargs)
    except TypeError as error:
        raise ValueError(f"attention_kwargs are saved in config.json, so only plain values can stand there: {error}") from None


def build_causal_attention(
    attention: str, dim: int, num_heads: int, host: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> Any:
    """Build the causal `attention` for a layer of a decoder.

    Args:
        attention: name of the mechanism.
        dim, num_heads: of the layer; `own` may override num_heads.
        host: the decoder's settings in the mechanisms' words (`num_kv_heads`, `head_dim`, `qkv_bias`, `attn_drop`, `layer_idx`,
            `depth`, ...); handed over where the mechanism has them.
        own: the mechanism's options; they win.

    Raises:
        ValueError: grouped key/value heads, a bias or dropout that the mechanism lacks.
        TypeError: an own option that the mechanism lacks.
    """
    own, parameters = dict(own or {}), inspect.signature(attention_class(attention)).parameters
    neutral = {"num_kv_heads": num_heads, "qkv_bias": False, "proj_bias": False, "attn_drop": 0.0}
    lost = [k for k, v in neutral.items() if host.get(k, v) != v and k not in parameters and k not in own]
    if lost:
        raise ValueError(f"{attention!r} does not have {', '.join(f'{k}={host[k]}' for k in lost)}, as the decoder is configured")
    shared = {"num_heads": num_heads, "is_causal": True, "rope_layout": "half", **attention_info(attention).causal_options, **host}
    if "num_heads" in own and own["num_heads"] != num_heads:
        shared.pop("num_kv_heads", None)  # they belong to the other number of heads
    module = create_attention(attention, **{"dim": dim, **{k: v for k, v in shared.items() if k in parameters}, **own})
    module.layer_idx = host.get("layer_idx")
    return module
