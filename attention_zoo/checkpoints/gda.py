"""Official grouped differential attention: layers and language models laid out as the Motif-2 checkpoints, whose names are ours.

The numbers of heads are not those of Motif's configurations: num_attention_heads there is S + M, num_key_value_heads 2 H_k.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import rename_keys
from attention_zoo.checkpoints.diff import decoder_options, layer_keys
from attention_zoo.checkpoints.llama import convert_decoder
from attention_zoo.registry import register_converter

__all__ = ["convert_gda", "convert_motif"]

State = dict[str, Tensor]


@register_converter("gda")
def convert_gda(state_dict: State, **options: Any) -> State:
    """One `gda` layer; `options` are the constructor's. Raises CheckpointError that lists unknown and missing keys."""
    return rename_keys(state_dict, (), expected=layer_keys("gda", options))


@register_converter("motif")
def convert_motif(
    state_dict: State,
    *,
    hidden_act: str = "poly_norm",
    attention: Any = None,
    attention_kwargs: Any = None,
    attention_bias: bool = False,
    **config: Any,
) -> State:
    """A whole Motif; arguments as for `create_model`.

    Raises:
        CheckpointError: another mechanism than the official one, unknown or missing keys.
    """
    return convert_decoder(
        state_dict,
        layer_keys("gda", decoder_options("gda", attention, attention_kwargs, attention_bias)),
        act_keys=("weight", "bias") if hidden_act == "poly_norm" else (),
        **config,
    )
