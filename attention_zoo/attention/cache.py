"""What a layer keeps while decoding: cache layers of mechanisms that keep something else than all keys and values, and its size.

Mechanisms that attend to every key use Hugging Face's own layers (`base.extend_cache`). One that keeps summaries, a ring buffer
or a running pool derives its layer from `StateCacheLayer` and asks for it with `own_cache_layer`: it takes the place of the empty
layer that the cache has at the module's `layer_idx`, so that any dynamic cache works, also the one that `generate` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attention_zoo.attention.base import AttentionModule

__all__ = ["CacheReport", "LayerCache", "StateCacheLayer", "cache_report", "check_cache", "measured_cache_bytes", "own_cache_layer"]


class StateCacheLayer:
    """Base of a cache layer that holds the tensors of one mechanism, each with the batch as its first dimension.

    It answers to all that transformers asks of its own layers, without deriving from them, so that the mechanisms do without
    transformers until a cache is given to them.

    A subclass sets its tensors as plain attributes (None while there are none) and adds to `tokens_seen` what it is given; the
    rest, which `generate` and beam search call, follows from these. Such a layer cannot be cut back (`crop`) unless the subclass
    says how, so assisted generation refuses it; it cannot be preallocated either.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.tokens_seen = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are kept, by attribute."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is kept by `function` of it."""
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    def get_seq_length(self) -> int:
        """Tokens seen so far, which is what positions count from; not the length of any tensor."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask speaks of: all tokens, kept or not."""
        return self.tokens_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1  # grows without bound

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead of the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} holds the state of one mechanism; another one tried to append its keys and values")

    def reset(self) -> None:
        for name in self.tensors():
            setattr(self, name, None)
        self.tokens_seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"{type(self).__name__} has already summarised the tokens that should go; assisted generation needs a "
                "mechanism that keeps all keys and values"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_tensors(lambda t: t[indices])

    def offload(self) -> None:
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing: the mechanism moves what it reads to its own device."""


_Layer = TypeVar("_Layer", bound=StateCacheLayer)


@torch.compiler.assume_constant_result  # done while tracing: it is no matter of tensors
def _register_layers() -> bool:
    """Make our layers known for isinstance, by which a Hugging Face cache tells its kinds of layers apart."""
    from transformers.cache_utils import CacheLayerMixin

    CacheLayerMixin.register(StateCacheLayer)
    return True


def own_cache_layer(module: AttentionModule, past_key_values: Any, layer_class: type[_Layer], *args: Any) -> _Layer:
    """The module's layer of a Hugging Face cache: a `layer_class(*args)`, put there when the cache's own is still empty.

    Raises:
        ValueError: the module's `layer_idx` is not set, the cache is preallocated, or its layer holds another mechanism's tokens.
    """
    _register_layers()
    index, name = module.layer_idx, type(module).__name__
    if index is None:
        raise ValueError("past_key_values needs to know the layer: set `layer_idx` on the module, 0 for the first layer")
    layers = past_key_values.layers
    while len(layers) <= index:
        if past_key_values.layer_class_to_replicate is None:
            raise ValueError(f"the cache has {len(layers)} layers, {name} asks for layer {index}")
        layers.append(past_key_values.layer_class_to_replicate())
    layer = layers[index]
    if isinstance(layer, layer_class):
        return layer
    check_cache(module, past_key_values)
    if layer.get_seq_length() > 0:
        raise ValueError(
            f"layer {index} of the cache holds a {type(layer).__name__} with tokens of another mechanism, not {name}'s"
        )
    layers[index] = layer_class(*args)
    return layers[index]


def check_cache(module: AttentionModule, past_key_values: Any) -> None:
    """Raise ValueError for a preallocated cache where the mechanism keeps something else than one key and value for each token."""
    if past_key_values is None or module.attention_info.static_cache or not past_key_values.is_compileable:
        return
    name = type(module).__name__
    raise ValueError(f"{name} does not keep one key and value for each token and cannot use a static cache; use a DynamicCache")


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `CacheReport`. `elements` are numbers kept for one sequence."""

    name: str
    mechanism: str
    elements: int
    bytes: int


@dataclass(frozen=True)
class CacheReport:
    """What a model keeps for one sequence of `num_tokens` tokens while decoding.

    Attributes:
        num_tokens: tokens of the sequence.
        layers: one entry for each attention layer that caches.
    """

    num_tokens: int
    layers: tuple[LayerCache, ...]

    @property
    def cache_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def cache_bytes_per_token(self) -> float:
        """Mean over the sequence; mechanisms with a window or summaries need less the longer it is."""
        return self.cache_bytes / self.num_tokens

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        rows = [f"{layer.name:{width}}  {layer.mechanism:10}  {layer.bytes / self.num_tokens:12,.1f}" for layer in self.layers]
        head = f"cache for a sequence of {self.num_tokens:,} tokens, bytes per token"
        return "\n".join([head, *rows, f"{'all layers':{width}}  {'':10}  {self.cache_bytes_per_token:12,.1f}"])


def cache_report(model: nn.Module, num_tokens: int, dtype: torch.dtype | None = None) -> CacheReport:
    """What the mechanisms of `model` keep for one sequence, computed from their settings, nothing is run.

    Args:
        model: any module that holds the zoo's causal mechanisms.
        num_tokens: tokens of the sequence.
        dtype: of the cache; None: that of each layer's parameters.

    Raises:
        ValueError: `num_tokens` under 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    found = []
    for name, module in model.named_modules():
        if isinstance(module, AttentionModule) and module.attention_info.kv_cache and module.is_causal:
            kind = dtype or next((p.dtype for p in module.parameters()), torch.get_default_dtype())
            elements = module.cache_elements(num_tokens)
            found.append(LayerCache(name, module.attention_info.name, elements, elements * kind.itemsize))
    return CacheReport(num_tokens, tuple(found))


def measured_cache_bytes(past_key_values: Any) -> int:
    """Bytes of all tensors that a Hugging Face cache holds, for its whole batch."""
    tensors: Iterable[Tensor] = (
        value
        for layer in past_key_values.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name not in ("cumulative_length", "_sliding_window_tensor")  # a layer's counters
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
