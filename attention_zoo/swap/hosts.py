"""What a swap knows of somebody's model: `Host`, one attention layer, and `Adapter`, one calling convention of such layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["ADAPTERS", "Adapter", "Host", "register_adapter"]


@dataclass(frozen=True)
class Host:
    """One attention layer of somebody's model, as an adapter describes it.

    Attributes:
        name: qualified name of the module that is replaced, as in "model.layers.3.self_attn".
        module: that module.
        adapter: who found it.
        index: number of the attention layer in the model, from 0.
        dim, num_heads, num_kv_heads, head_dim: its sizes.
        is_causal: tokens see themselves and those before them only.
        qkv_bias, proj_bias: whether the projections have biases.
        scale: of the logits; head_dim ** -0.5 unless the host says otherwise.
        qk_norm: whether queries and keys are normalised per head, by modules `q_norm` and `k_norm`.
        rope: whether the host hands over rotary tables.
        window_size: sliding window; None: all tokens.
        softcap: bound of the logits; None: none.
        attn_drop, proj_drop: dropout rates.
        prefix_tokens: class and register tokens before a grid of patches; 0 otherwise.
        spatial: whether the host can tell `grid_size`.
        grid_size: (H, W) of the patches of an image of the size that the model is made for; None: no patches, or any size.
        layer_idx: its number for a mechanism that depends on the depth, and its layer in a cache where there is one.
        refuse: why this layer cannot be swapped at all; None if it can.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    index: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool
    qkv_bias: bool
    proj_bias: bool
    scale: float
    qk_norm: bool
    rope: bool
    window_size: int | None
    softcap: float | None
    attn_drop: float
    proj_drop: float
    prefix_tokens: int
    spatial: bool
    grid_size: tuple[int, int] | None
    layer_idx: int | None
    refuse: str | None


class Adapter(ABC):
    """Finds and replaces the attention layers of one calling convention.

    Attributes:
        has_cache: whether the layers are handed a cache, at their `layer_idx`.
    """

    has_cache = False

    @abstractmethod
    def find(self, model: nn.Module) -> list[Host]:
        """The layers of this convention in `model`, in its order; those that cannot be swapped say so in `refuse`."""

    @abstractmethod
    def softmax_state(self, host: Host) -> dict[str, Tensor]:
        """The layer's tensors under the names that `from_softmax_attention` reads: q_proj, k_proj, v_proj, o_proj, q_norm, k_norm.

        They share memory with the host's parameters, and require gradients where those do.
        """

    def replaced(self, host: Host) -> list[nn.Module]:
        """The modules whose place the mechanism takes, with all their parameters."""
        return [host.module]

    @abstractmethod
    def install(self, model: nn.Module, host: Host, mechanism: nn.Module) -> Callable[[], None]:
        """Put `mechanism` in the layer's place, behind the host's calling convention; returns what undoes it."""

    @abstractmethod
    def state_prefix(self, host: Host) -> str:
        """Where the mechanism's tensors stand in the swapped model's state dict, with the final dot."""


ADAPTERS: list[Adapter] = []


def register_adapter(adapter: Adapter) -> Adapter:
    """Add an adapter to those that a swap asks, in this order; one of the same class takes the other's place."""
    for index, known in enumerate(ADAPTERS):
        if (type(known).__module__, type(known).__qualname__) == (type(adapter).__module__, type(adapter).__qualname__):
            ADAPTERS[index] = adapter
            return adapter
    ADAPTERS.append(adapter)
    return adapter
