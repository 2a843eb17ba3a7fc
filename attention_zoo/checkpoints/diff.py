"""Official differential attention: layers of microsoft/unilm, layers and models of Hugging Face's DiffLlama.

unilm's v1 calls the output projection `out_proj`; all other names are ours. DiffLlama keeps first and second heads in halves: rows
of q, k and v move only when the target has another `pairing` than the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo.checkpoints.convert import rename_keys
from attention_zoo.checkpoints.llama import check_mechanism, convert_decoder, layer_options
from attention_zoo.registry import attention_class, create_attention, register_converter

__all__ = ["convert_diff", "convert_diffllama", "decoder_options", "layer_keys"]

State = dict[str, Tensor]

# Options of a mechanism that decide which tensors it has, and how they are laid out.
_KEY_OPTIONS = frozenset(
    ("version", "style", "sub_norm", "sub_norm_affine", "qkv_bias", "proj_bias", "qk_norm", "lambda_mode", "lambda_bias", "pairing")
)


def layer_keys(mechanism: str, options: Mapping[str, Any]) -> list[str]:
    """Our keys of a layer of `diff` or `gda` with these options; those that change no key are ignored."""
    chosen = {name: value for name, value in options.items() if name in _KEY_OPTIONS}
    return list(create_attention(mechanism, dim=2, num_heads=1, head_dim=2, **chosen, device="meta").state_dict())


def decoder_options(mechanism: str, attention: Any, attention_kwargs: Any, attention_bias: bool) -> dict[str, Any]:
    """The options of the mechanism in every layer of a decoder, from the arguments of `create_model`.

    Raises:
        CheckpointError: layers with another mechanism, or whose options ask for other tensors in one than in another.
    """
    check_mechanism(attention, mechanism)
    return layer_options(attention_kwargs, attention_bias, {*_KEY_OPTIONS, "num_heads", "num_kv_heads"})


@register_converter("diff")
def convert_diff(state_dict: State, *, num_heads: int = 8, num_kv_heads: int | None = None, **options: Any) -> State:
    """One `diff` layer, unilm's or (o_proj, no sub-norm weight) DiffLlama's.

    Raises:
        CheckpointError: unknown or missing keys; all are listed.
    """
    ours = layer_keys("diff", options)
    from_unilm = any(key.startswith("out_proj.") for key in state_dict)
    expected = [key.replace("o_proj.", "out_proj.") for key in ours] if from_unilm else ours
    state = rename_keys(state_dict, [(r"out_proj\.", "o_proj.")] if from_unilm else [], expected=expected)
    weightless = "subln.weight" not in ours and options.get("sub_norm") is not False
    halves = options.get("version", "v1") == "v1" and not from_unilm and weightless
    return _lay_out(state, "halves" if halves else "interleaved", num_heads, num_kv_heads, options)


@register_converter("diffllama")
def convert_diffllama(
    state_dict: State,
    *,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    attention: Any = None,
    attention_kwargs: Any = None,
    attention_bias: bool = False,
    **config: Any,
) -> State:
    """A whole DiffLlama; arguments as for `create_model`, so that numbers of heads count differential heads.

    Raises:
        CheckpointError: another mechanism than the official one, unknown or missing keys.
    """
    defaults = {"version": "v1", "pairing": "halves", "sub_norm_affine": False}
    options = {**defaults, **decoder_options("diff", attention, attention_kwargs, attention_bias)}
    heads = options.pop("num_heads", num_attention_heads)
    kv_heads = options.pop("num_kv_heads", num_key_value_heads)
    return convert_decoder(
        state_dict,
        layer_keys("diff", options),
        convert_layer=lambda layer: _lay_out(layer, "halves", heads, kv_heads, options),
        **config,
    )


def _lay_out(state: State, pairing: str, num_heads: int, num_kv_heads: int | None, options: Mapping[str, Any]) -> State:
    """The layer in the pairing that `options` ask for, from the checkpoint's."""
    wanted = options.get("pairing", "interleaved")
    if wanted == pairing:
        return state
    move = attention_class("diff").change_pairing  # type: ignore[attr-defined]
    moved: State = move(state, wanted, num_heads, num_heads if num_kv_heads is None else num_kv_heads)
    return moved
