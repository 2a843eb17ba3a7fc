"""The zoo's functions of q, k and v in Hugging Face's attention interface: "zoo_cca", "zoo_bra", ..., and the masks for them.

Functions that attend as a softmax does take the masks of "zoo" (`_hf_attention.py`). Those that group or pool tokens cannot do
with a mask of pairs: they are told which tokens are real and where a document begins, in a tensor (B, 1, 1, N_k)
(`_describe_tokens`), which has four dimensions because models pass such masks on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from attention_zoo.attention.base import read_padding
from attention_zoo.attention.functional import Functional, follow_functionals
from attention_zoo.registry import attention_info

from ._hf_attention import is_causal_call, refuse_inputs, softmax_attention, zoo_mask

__all__ = ["register_zoo_functionals"]

# Prefix tokens of the image encoders whose models have been read: what they put before the grid of patches, and nothing else.
_PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,  # and config.num_register_tokens
    "ijepa": 0,
    "siglip_vision_model": 0,
    "vit": 1,
    "vit_msn": 1,
}


def register_zoo_functionals() -> None:
    """Make all names, and those that will be registered, known to transformers."""
    follow_functionals(_register)


def _register(functional: Functional) -> None:
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return _compute(functional, module, query, key, value, attention_mask, **kwargs).transpose(1, 2).contiguous(), None

    AttentionInterface.register(functional.name, attention)
    softmax = "attend" in functional.function.inputs
    AttentionMaskInterface.register(functional.name, zoo_mask if softmax else _token_mask(functional))


# --- masks ------------------------------------------------------------------------------------------------------------------------


def _token_mask(functional: Functional) -> Callable[..., Tensor | None]:
    """The mask function of a functional that groups or pools tokens."""
    name = functional.function.mechanism

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        local_size: int | None = None,
        device: Any = "cpu",
        **kwargs: Any,
    ) -> Tensor | None:
        """See `_describe_tokens`; None where all tokens are real, one document, and were all seen."""
        if local_size is not None or use_vmap:  # models make masks for kinds of layers that they do not have: no error yet
            return torch.zeros(1, 1, 1, kv_length, dtype=torch.int16, device=device)
        documents = None
        if mask_function not in (causal_mask_function, bidirectional_mask_function):
            documents = _find_documents(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, device, name)
        if attention_mask is not None and attention_mask.shape[-1] > kv_length:
            raise ValueError(f"the cache keeps the last {kv_length} tokens only, which {name!r} has no use for")
        end = q_offset + q_length
        if attention_mask is not None and not isinstance(end, Tensor) and attention_mask.shape[-1] < end:
            raise ValueError(
                f"attention_mask tells of {attention_mask.shape[-1]} tokens, and there are {end} so far: all must be told"
            )
        room = isinstance(end, Tensor) or end != kv_length  # a preallocated cache
        return _describe_tokens(attention_mask, documents, end if room else None, batch_size, kv_length, device)

    return mask


def _describe_tokens(
    attention_mask: Tensor | None, documents: Tensor | None, end: int | Tensor | None, batch: int, length: int, device: Any
) -> Tensor | None:
    """All that a mask can say to a function that groups tokens, (B, 1, 1, N_k), by its dtype.

    - bool: whether a token is real;
    - int8: 1 for a real one, 0 for padding, -1 for one that a preallocated cache has room for;
    - int64: the number of its document from 1, 0 for padding;
    - int16, which the mask function makes: there are windows, chunks, or pairs of tokens that somebody masks.

    None: none of this is needed.
    """
    if documents is not None:
        states = documents if attention_mask is None else documents * attention_mask
    elif end is not None:
        states = torch.ones(batch, length, dtype=torch.int8, device=device)
        if attention_mask is not None:
            missing = length - attention_mask.shape[-1]
            states = torch.nn.functional.pad(attention_mask.to(torch.int8), (0, missing), value=1)
        states = states.masked_fill(torch.arange(length, device=device) >= end, -1)
    elif attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    else:
        states = attention_mask.bool()
    return states[:, None, None]


def _find_documents(
    mask_function: Callable[..., Any],
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    device: Any,
    name: str,
) -> Tensor | None:
    """The documents of packed sequences, int64 (B, N) from 1, which only the mask function knows; None if there is one.

    It is asked for O(N) pairs: whether a token sees the one before, the one after, and the first one of its document.

    Raises:
        ValueError: a mask that is more than causality and documents.
    """
    samples, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        found: Tensor = mask_function(samples, head, queries, keys)
        return found.expand(batch, q_length)

    tokens = (torch.arange(q_length, device=device) + q_offset).expand(batch, -1)
    first = tokens == 0
    begins = first | ~sees(tokens, (tokens - 1).clamp_min(0))
    start = torch.where(begins, tokens, 0).cummax(-1)[0]
    after, before = (tokens + 1).clamp_max(kv_length - 1), (start - 1).clamp_min(0)
    strange = (sees(tokens, after) & (after > tokens)) | (sees(tokens, before) & (before < start)) | ~sees(tokens, start)
    packed = (begins & ~first).any()
    # Read while tracing as well, which breaks the graph here once, since grouping documents would break it in every layer.
    if bool(strange.any()) or (bool(packed) and q_length != kv_length):
        raise ValueError(f"the model's mask is more than causality, padding and documents, which {name!r} has no place for")
    return begins.cumsum(-1) if bool(packed) else None


# --- calls ------------------------------------------------------------------------------------------------------------------------


def _compute(
    functional: Functional,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, H, N, D).

    Raises:
        ValueError: something that the model asks for and the function does not have.
    """
    refuse_inputs(functional.name, attention_mask, kwargs)
    function, info = functional.function, attention_info(functional.function.mechanism)
    causal = is_causal_call(module, is_causal)
    if (pattern := "causal_self" if causal else "noncausal_self") not in info.patterns:
        raise ValueError(f"the model needs {pattern}, {info.name!r} has {', '.join(sorted(info.patterns))}")
    options = {**function.options, **(info.causal_options if causal else {}), **functional.options}
    inputs: dict[str, Any] = {"is_causal": causal, "scale": scaling, "dropout_p": dropout, "training": module.training}
    if "attend" in function.inputs:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(module, q, k, v, attention_mask, scaling, dropout, is_causal, sliding_window, softcap)

        norms = any("norm" in name for name, _ in module.named_children())
        inputs |= {"attend": attend, "attn_mask": attention_mask, "qk_norm": norms}
        return function.compute(query, key, value, **_known(inputs, function.inputs), **options)

    for what, given in (("sliding_window", sliding_window), ("softcap", softcap)):
        if given is not None:
            raise ValueError(f"the model asks for {what}={given}, which {info.name!r} does not have")
    if _attends_across(module):
        raise ValueError(f"{info.name!r} as a function groups the tokens of one sequence; this is cross attention")
    if "grid_size" in function.inputs:
        grid_size, num_prefix_tokens = _find_grid(module, query.shape[2], info.name)
        if grid_size is None and function.needs_grid:
            raise ValueError(f"{info.name!r} works on a grid of patches, which {type(module).__name__} has not")
        inputs |= {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens}
    if attention_mask is not None and attention_mask.dtype == torch.int16:
        raise ValueError(f"the model attends in windows or chunks, or with a mask of pairs: {info.name!r} has no place for them")
    inputs |= _read_tokens(functional, attention_mask, query, key, causal)
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return _by_document(functional, attention_mask[:, 0, 0], query, key, value, inputs, options)
    return function.compute(query, key, value, **_known(inputs, function.inputs), **options)


def _known(inputs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in names}


def _attends_across(module: Any) -> bool:
    """Whether it is cross attention, as far as transformers' classes say."""
    return bool(getattr(module, "is_cross_attention", False)) or "CrossAttention" in type(module).__name__


def _read_tokens(functional: Functional, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> dict[str, Any]:
    """`real` and `seen` of a call, from a mask of ours (`_describe_tokens`) or a caller's own 4-D one.

    Raises:
        ValueError: what the function has no input for.
    """
    name, inputs = functional.function.mechanism, functional.function.inputs
    new, total = query.shape[2], key.shape[2]
    if "seen" not in inputs and (new != total or (mask is not None and mask.dtype == torch.int8)):
        raise ValueError(
            f"{name!r} as a function needs the queries of all tokens, and a cache keeps keys and values: use_cache=False, or "
            f"az.swap_attention(model, {name!r})"
        )
    if mask is None:
        return {"real": None, "seen": None}
    if "real" not in inputs:
        raise ValueError(f"the model hands over an attention mask, {name!r} takes none")
    if mask.dtype == torch.int8:
        states = mask[:, 0, 0]
        return {"real": states > 0, "seen": (states[0] >= 0).sum()}
    if mask.dtype == torch.bool and mask.shape[2] == 1 and mask.shape[1] == 1:
        return {"real": mask[:, 0, 0].expand(key.shape[0], -1), "seen": None}
    if mask.dtype == torch.int64:
        return {"real": None, "seen": None}
    return {"real": read_padding(mask, key.shape[0], new, total - new, causal=causal), "seen": None}


def _by_document(
    functional: Functional,
    documents: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: dict[str, Any],
    options: Mapping[str, Any],
) -> Tensor:
    """Packed sequences: every document (B, N) is a sample of its own, filled up at the end. Padding gives 0."""
    function = functional.function
    if attention_info(function.mechanism).length_coupled and options.get("window_size", 0) is None:
        raise ValueError(
            f"{function.mechanism!r} groups by the number of tokens, which differs between packed documents: give window_size"
        )
    batch, length = documents.shape
    place = documents.flatten().nonzero()[:, 0]
    before = documents.amax(1).cumsum(0) - documents.amax(1)
    row = ((documents - 1) + before[:, None]).flatten()[place]  # number of the document in the batch; they are in order
    sizes = torch.bincount(row)
    column = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    table = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.long, device=row.device)
    real = torch.zeros_like(table, dtype=torch.bool)
    table[row, column], real[row, column] = place, True
    rows = (t.transpose(1, 2).flatten(0, 1)[table].transpose(1, 2) for t in (query, key, value))
    out = function.compute(*rows, **{**_known(inputs, function.inputs), "real": real}, **options)
    flat = torch.zeros(batch * length, *out.shape[1::2], dtype=out.dtype, device=out.device)
    flat = flat.index_put((place,), out.transpose(1, 2)[row, column])
    return flat.unflatten(0, (batch, length)).transpose(1, 2)


def _find_grid(module: Any, num_tokens: int, name: str) -> tuple[tuple[int, int] | None, int]:
    """Grid and prefix tokens of an image encoder's layer, which only its configuration tells; (None, 0) of other models.

    A layer does not see the image: one of another shape with as many patches as the configuration's cannot be told from it.

    Raises:
        ValueError: a family that is not known, or another number of tokens than its images have.
    """
    config = getattr(module, "config", None)
    image, patch = (getattr(config, field, None) for field in ("image_size", "patch_size"))
    if image is None or patch is None:
        return None, 0
    (height, width), (rows, columns) = ((side, side) if isinstance(side, int) else tuple(side) for side in (image, patch))
    grid, kind = (height // rows, width // columns), getattr(config, "model_type", None)
    if kind not in _PREFIX_TOKENS:
        raise ValueError(
            f"{name!r} needs the grid of patches, and {kind!r} is of no family whose tokens are known: {', '.join(_PREFIX_TOKENS)}"
        )
    prefix = _PREFIX_TOKENS[kind] + (getattr(config, "num_register_tokens", 0) if kind == "dinov2_with_registers" else 0)
    if num_tokens != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{name!r} needs the grid of patches: images of {(height, width)} have {grid} and {prefix} tokens before it, which are "
            f"not the {num_tokens} tokens here; az.swap_attention follows the size of the images"
        )
    return grid, prefix
