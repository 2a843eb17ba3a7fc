"""What Hugging Face's decoders and encoders share as hosts: the family of a layer, and what their models hand to it.

How a mask looks depends on the attention implementation that the model is set to, also after a swap: none, padding (B, N), 4-D,
boolean or added, or a `BlockMask`. Each is read; what an implementation leaves out of its masks is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_call", "family_of", "hook_again_after", "read_mask", "window_problem"]

# Attention implementations with windows in their masks; others tell their kernels instead.
_WINDOWED = ("eager", "sdpa", "flex_attention", "zoo")
# What a model may say to its layers that changes nothing in their attention; positions are in the rotary tables.
_HARMLESS = {
    *("cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states", "position_ids"),
    *("return_dict", "token_type_ids", "use_cache"),
}


def family_of(module: nn.Module) -> str:
    """The folder of transformers.models that the module's class stands in; "" for a class of another library."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""


def check_call(mechanism: str, said: Mapping[str, Any]) -> None:
    """Raise ValueError when the model says something to a layer that would be lost, or collects what the layer does not have."""
    if lost := [name for name, value in said.items() if value is not None and name not in _HARMLESS]:
        raise ValueError(f"the model hands over {', '.join(lost)}, {mechanism!r} takes none")
    if said.get("output_attentions") or (not torch.compiler.is_compiling() and _collects_attentions()):
        raise ValueError(
            "output_attentions=True: swapped layers return no attention probabilities, and those of other layers would stand in "
            "their places; `with az.record_attention(model) as maps:` records both"
        )


def read_mask(mask: Any) -> Tensor | None:
    """A mask of any attention implementation as a tensor: `BlockMask`, flex_attention's, becomes boolean (B, 1, N_q, N_k)."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; a tensor or a BlockMask is known")
    batch, heads, *_ = mask.shape
    device = mask.kv_num_blocks.device
    return create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device=device)  # type: ignore[no-any-return]


def window_problem(window_size: int | None, config: Any) -> str | None:
    """Why a layer would lose its window in the masks of the attention implementation that is set now; None if it does not."""
    implementation = getattr(config, "_attn_implementation", None)
    if window_size is None or implementation in _WINDOWED:
        return None
    known = ", ".join(map(repr, _WINDOWED))
    return f"its window of {window_size} tokens is in the masks of {known} attention only, not in those of {implementation!r}"


def _collects_attentions() -> bool:
    """Whether transformers collects attention probabilities in this forward; it hooks its own classes, and tells no layer."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    return collector is not None and "attentions" in (collector.get() or ())


def hook_again_after(undo: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    """`undo`, after which transformers hooks the model's layers anew to collect their outputs: it hooked those that were there."""
    of = weakref.ref(model)

    def undo_and_forget() -> None:
        undo()
        for module in () if (there := of()) is None else there.modules():
            vars(module).pop("_output_capturing_hooks_installed", None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]

    return undo_and_forget
