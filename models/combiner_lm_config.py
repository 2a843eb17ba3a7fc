"""Configuration of Combiner's language model. Apart from its classes, as the Llama-style decoders' is."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from attention_zoo.attention.base import check_choice
from attention_zoo.registry import attention_info

from ._host import check_plain

__all__ = ["ACTS", "POSITIONS", "CombinerLMConfig"]

ACTS = {"relu": nn.ReLU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}
POSITIONS = ("sinusoidal", "learned")


@strict
class CombinerLMConfig(PreTrainedConfig):
    """Configuration of the language model. Hugging Face's names (`hidden_size`, `num_hidden_layers`, ...) are understood as well.

    Attributes:
        vocab_size: number of tokens.
        dim, depth, num_heads, mlp_dim: channels, layers, heads of each, channels inside the MLPs.
        max_len: longest sequence.
        pattern, window_size, summary_pool, summary_act, row_summary, summary_norm_eps: Combiner's, see `CombinerAttention`.
        causal: False: an encoder, without a cache.
        act: of the MLPs, "relu" (JAX) or "gelu_tanh" (TF).
        pos_emb: "sinusoidal" (JAX: all sines, then all cosines) or "learned" (TF), added to the embedding.
        attn_bias: whether the attention's projections have biases.
        norm_eps: epsilon of the layer normalisations, 1e-6 (flax) or 1e-5 (TF).
        tie_word_embeddings: whether the output layer's weight is the embedding's (TF); `tie_embeddings` is the same.
        attention, attention_kwargs: the mechanism of the layers and further options of it.
        use_cache: set to False where there can be no cache: not causal, or no `window_size`.

    Raises:
        ValueError: an unknown choice, or a mechanism that cannot stand in a decoder.
    """

    model_type = "combiner_lm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "max_len",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 32000
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_len: int = 2048
    pattern: str = "fixed"
    causal: bool = True
    window_size: int | None = None
    act: str = "relu"
    pos_emb: str = "sinusoidal"
    attn_bias: bool = False
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    summary_pool: str = "max"
    summary_act: str = "identity"
    row_summary: str = "proj"
    summary_norm_eps: float = 1e-6
    attention: str = "combiner"
    attention_kwargs: dict | None = None
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        from . import combiner_lm  # noqa: F401 - a configuration is about to be used: the Auto classes must know its models

        super().__post_init__(**kwargs)
        check_choice("act", self.act, ACTS)
        check_choice("pos_emb", self.pos_emb, POSITIONS)
        if self.pos_emb == "sinusoidal" and self.dim % 2:
            raise ValueError(f"sinusoidal positions are sines and cosines: dim must be even, got {self.dim}")
        info = attention_info(self.attention)
        if not {"causal_self", "noncausal_self"} & info.patterns or not info.keeps_shape or info.spatial:
            raise ValueError(f"{self.attention!r} cannot stand in a language model: that needs self attention of a sequence")
        check_plain(self.attention_kwargs)
        options = self.layer_options()
        grows = self.attention == "combiner" and options["pattern"] != "logsparse" and options["window_size"] is None
        if not self.causal or grows or not info.kv_cache:
            self.use_cache = False

    def layer_options(self) -> dict[str, Any]:
        """Options of a layer's mechanism."""
        own: dict[str, Any] = {}
        if self.attention == "combiner":
            names = ("pattern", "window_size", "summary_pool", "summary_act", "row_summary", "summary_norm_eps")
            own = {name: getattr(self, name) for name in names}
        return {**own, **({} if self.causal else {"is_causal": False}), **(self.attention_kwargs or {})}
