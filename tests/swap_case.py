"""What the swap's tests share: a mechanism put into the layers that an adapter found, and the settings that keep the function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.registry import attention_class
from attention_zoo.swap.hosts import Adapter, Host

BIDIRECTIONAL = [
    name
    for name in az.list_attentions(pattern="noncausal_self")
    if az.attention_info(name).keeps_shape and hasattr(attention_class(name), "from_softmax_attention") and "transnext" not in name
]

# Options with which a mechanism computes what the softmax attention did, on a grid of 4 x 4 at most and 3 heads.
PRESERVING: dict[str, dict[str, Any]] = {
    "agent_cswin": {"resolution": 4, "use_agents": False},
    "bra": {"n_win": 2, "topk": 4},
    "combiner": {"window_size": 64},
    "dgqa": {"num_kv_heads": 3},
    "diff": {},
    "gda": {},
    "gqa": {"num_kv_heads": 3},
    "halo": {"block_size": 4, "halo_size": 0},
    "hilo": {"window_size": 1},
    "lepe_attention": {},
    "mha": {},
    "moh": {},
    "pgqa": {"num_kv_heads": 3, "noise_mode": "never"},
}


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """What the mechanism's constructor takes."""
    return dict(inspect.signature(attention_class(name)).parameters)


def misfits(host: Any, name: str) -> list[str]:
    """Why the mechanism cannot stand in the host's layers, in words of the refusal; from its capabilities, by rules of our own.

    Args:
        host: a `Host`, or whatever says the same of a layer.
        name: the mechanism's.
    """
    info, own = az.attention_info(name), parameters_of(name)
    takes = inspect.signature(attention_class(name).forward).parameters
    pattern = "causal_self" if host.is_causal else "noncausal_self"
    reasons = {
        f"needs {pattern}": pattern not in info.patterns,
        "changes the number of tokens": not info.keeps_shape,
        "needs a grid": info.spatial and not host.spatial and not info.sequence_options,
        "class or register tokens": info.spatial and host.prefix_tokens > 0 and "num_prefix_tokens" not in own,
        "rotates queries and keys": host.rope and "position_embeddings" not in takes,
        "normalises queries and keys": host.qk_norm and "norm_layer" not in own,
        "bounds its logits": host.softcap is not None,
        "has a window": host.window_size is not None and (info.padding_masks_only or "attention_mask" not in takes),
    }
    return [reason for reason, applies in reasons.items() if applies]


def fits(host: Any, name: str) -> bool:
    """Whether the mechanism has what the host asks for."""
    return not misfits(host, name)


def build(adapter: Adapter, host: Host, name: str, **options: Any) -> nn.Module:
    """The mechanism from the host's weights, with what the host says of itself."""
    cls, own = attention_class(name), parameters_of(name)
    said: dict[str, Any] = {"attn_drop": host.attn_drop, "proj_drop": host.proj_drop}
    if "num_prefix_tokens" in own and host.spatial:
        said["num_prefix_tokens"] = host.prefix_tokens
    if host.is_causal:
        said |= {"is_causal": True, **az.attention_info(name).causal_options}
    if not host.spatial:
        options |= az.attention_info(name).sequence_options
    if host.qk_norm:
        norm = host.module.q_norm
        said |= {"qk_norm": True, "norm_layer": functools.partial(type(norm), eps=norm.eps)}
    module: nn.Module = cls.from_softmax_attention(adapter.softmax_state(host), num_heads=host.num_heads, **{**said, **options})
    return module.train(host.module.training)


def put(adapter: Adapter, model: nn.Module, name: str, **options: Any) -> Callable[[], None]:
    """Put the mechanism into every layer that the adapter finds; returns what undoes it."""
    undo = [adapter.install(model, host, build(adapter, host, name, **options)) for host in adapter.find(model)]

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    return undo_all


def shake(model: nn.Module) -> None:
    """Move every parameter off its initial value, where zeros and ones would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model holds exactly what it held."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
