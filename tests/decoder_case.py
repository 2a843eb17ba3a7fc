"""A tiny decoder with one causal mechanism, as the tests of `models/llama.py` build and feed it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_case import seeded
from torch import Tensor
from transformers import LlamaModel

import attention_zoo as az
from attention_zoo.registry import attention_class

VOCABULARY = 64
# What a decoder's forward and generate call their cache: past_key_values before transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# Windows and groups small enough that sequences of a few tokens go beyond them.
_SMALL_WINDOWS = {"window_size": 4, "group_size": 2}


@dataclass(frozen=True)
class DecoderCase:
    """A mechanism in every layer of a two-layer decoder."""

    attention: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.attention + "".join(f"-{k}={v}" for k, v in self.options.items())

    @property
    def info(self) -> az.AttentionInfo:
        return az.attention_info(self.attention)

    def attention_kwargs(self) -> dict[str, Any]:
        parameters = inspect.signature(attention_class(self.attention)).parameters
        return {**{k: v for k, v in _SMALL_WINDOWS.items() if k in parameters}, **self.options}

    def config(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `az.create_model("llama", ...)`."""
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 256}
        own = {"attention": self.attention, "attention_kwargs": self.attention_kwargs()}
        return {**sizes, "num_attention_heads": 4, **tokens, **own, **changes}

    def build(self, *, generic: bool = True, **changes: Any) -> Any:
        """The model in evaluation mode, from a fixed seed. `generic`: weights large enough that attention matters."""
        with seeded(0):
            model = az.create_model("llama", **self.config(**changes))
        if generic:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        return model.eval()


def causal_cases() -> list[DecoderCase]:
    """Every registered mechanism that can stand in a decoder."""
    infos = [az.attention_info(name) for name in az.list_attentions(pattern="causal_self")]
    return [DecoderCase(info.name) for info in infos if info.keeps_shape and not info.spatial]


def prompt(length: int = 13, batch: int = 2, seed: int = 3) -> Tensor:
    """Token ids (B, N); 0 stands for padding and does not occur."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
