"""Where attention can be seen that is not the zoo's: torch's own functions, softmaxes by hand, Hugging Face's table, `nn` modules.

Each source is given the functions to call for what it sees. Probabilities are those before any dropout, in float32 at least where
they are computed here; the arguments of the calls are read, never changed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.weak import WeakTensorKeyDictionary

from attention_zoo.ops import no_autocast
from attention_zoo.ops._problem import Problem
from attention_zoo.ops._reference import reference_weights
from attention_zoo.ops.dispatch import follow_autocast

__all__ = [
    "FunctionMode",
    "attends",
    "encoder_layer_weights",
    "interface_table",
    "interface_weights",
    "multihead_call",
    "multihead_weights",
    "sdpa_weights",
]

Weights = Callable[["Tensor | None"], Tensor]  # numbers of queries, or None for all -> probabilities (..., N_q, N_k)
Found = Callable[[str, Weights, int, torch.device], None]  # is told of a call: its name, its probabilities, how many queries, where

# --- torch's functions ------------------------------------------------------------------------------------------------------------

_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
_DROPOUT = {F.dropout, torch.dropout, torch.nn.functional.dropout1d, torch.nn.functional.dropout2d}
_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.contiguous}
# What only moves or selects numbers, with which probabilities stay probabilities; they are moved alike.
_MOVES = {
    *(Tensor.__getitem__, Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten),
    *(Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.squeeze, Tensor.unsqueeze, Tensor.expand),
    *(torch.squeeze, torch.unsqueeze, Tensor.swapaxes, Tensor.movedim, Tensor.narrow, torch.narrow, Tensor.mT.__get__),  # type: ignore[attr-defined]
}
_TURNS = {Tensor.transpose, torch.transpose, Tensor.swapaxes, Tensor.mT.__get__}  # type: ignore[attr-defined]


class FunctionMode(TorchFunctionMode):
    """Sees `scaled_dot_product_attention`, `multi_head_attention_forward`, and softmaxes whose results weigh values.

    A softmax counts once it weighs something in a matrix product, from the left, or transposed from the right, as it is or after
    dropout, a cast, a move or a change of its numbers; so gates and classifiers are no attention.

    Args:
        listening: whether a call that is made now is wanted.
        found: told of every call.
    """

    def __init__(self, listening: Callable[[], bool], found: Found) -> None:
        super().__init__()
        self.listening, self.found = listening, found
        self.softmaxes: Any = WeakTensorKeyDictionary()  # a tensor -> the probabilities that it stands for, None: itself
        self.turned: Any = WeakTensorKeyDictionary()  # those of them whose last two dimensions are keys, queries

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within, torch is as it is without this mode: fused paths that avoid modes are taken, compiled functions stay compiled."""
        stack = _get_current_function_mode_stack()
        above = stack[stack.index(self) + 1 :] if self in stack else None
        if above is None:
            yield
            return
        for _ in range(len(above) + 1):
            _pop_mode()
        for mode in above:
            _push_mode(mode)
        try:
            yield
        finally:
            for _ in above:
                _pop_mode()
            for mode in (self, *above):
                _push_mode(mode)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.listening():
            return result
        if func is F.scaled_dot_product_attention:
            query = _argument(args, kwargs, 0, "query")
            self.found("scaled_dot_product_attention", sdpa_weights(*args, **kwargs), query.shape[-2], query.device)
        elif func is F.multi_head_attention_forward:
            call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
            self.found("multi_head_attention", multihead_weights(**call), call["query"].shape[0], call["query"].device)
        elif func in _SOFTMAX:
            if isinstance(result, Tensor) and result.ndim > 2 and _dimension(args, kwargs) % result.ndim == result.ndim - 1:
                self.softmaxes[result] = None
        elif self.softmaxes:
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """A function of a softmax's result: a product that ends its way, or a step on it."""
        source = next((a for a in args if isinstance(a, Tensor) and a in self.softmaxes), None)
        if source is None:
            return
        known = self.softmaxes[source]
        weights = source if known is None else known
        if func in _PRODUCTS:
            left, right = args[1:3] if func is torch.einsum else args[:2]
            if left is source or (right is source and source in self.turned):
                weights = weights if left is source else weights.transpose(-2, -1)
                del self.softmaxes[source]
                self.found("softmax", lambda rows: _rows_of(weights.detach(), rows), weights.shape[-2], weights.device)
        elif func in _MOVES and isinstance(result, Tensor):
            self.softmaxes[result] = None if known is None else func(known, *args[1:], **kwargs)
            turns = func in _TURNS and result.stride()[-2:] == source.stride()[:-3:-1]
            if turns != (source in self.turned):
                self.turned[result] = True
        elif isinstance(result, Tensor) and result.shape == source.shape and result.is_floating_point():
            kept = func in _DROPOUT or func in _CASTS  # before the dropout, and with all digits
            self.softmaxes[result] = weights if kept and result is not weights else None


def _dimension(args: Any, kwargs: Any) -> int:
    dim = _argument(args, kwargs, 1, "dim")
    return dim if isinstance(dim, int) else 0


def _argument(args: Any, kwargs: Any, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _rows_of(weights: Tensor, rows: Tensor | None) -> Tensor:
    return weights if rows is None else weights.index_select(-2, rows)


def sdpa_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Weights:
    """Probabilities (..., N_q, N_k) of a call of `F.scaled_dot_product_attention`, whose causality counts from the first key."""
    query, key, _ = follow_autocast(query.detach(), key.detach(), key.detach())
    lead = query.shape[:-2]
    if not enable_gqa:
        lead = torch.broadcast_shapes(lead, key.shape[:-2])
    if query.ndim == 4:
        query = query.expand(*lead, -1, -1)
        key = key.expand(lead[0], *(key.shape[1:] if enable_gqa else (lead[1], *key.shape[2:])))
    else:  # any other number of dimensions: as a batch of single heads
        query, key = (t.expand(*lead, -1, -1).reshape(-1, 1, *t.shape[-2:]) for t in (query, key))
        if attn_mask is not None and attn_mask.ndim > 2:
            attn_mask = attn_mask.expand(*lead, -1, -1).reshape(-1, 1, *attn_mask.shape[-2:])
    problem = _problem(query, key, mask=attn_mask, scale=scale, window=(None, 0) if is_causal else (None, None))

    def weights(rows: Tensor | None) -> Tensor:
        found = _weigh(query, key, problem, rows)
        return found if len(lead) == 2 else found.reshape(*lead, *found.shape[-2:])

    return weights


def _problem(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    from_start: bool = True,
) -> Problem:
    """The call as the reference reads it. `window` counts from the first query and key, or from the last ones."""
    left, right = window
    if from_start:  # the reference counts from the end
        shift = q.shape[2] - k.shape[2]
        left, right = (None if left is None else left - shift), (None if right is None else right + shift)
    mask, bias = (None if t is None else t.detach()[(None,) * (4 - t.ndim)] for t in (mask, bias))
    scale = 1 / math.sqrt(q.shape[-1] or 1) if scale is None else scale
    return Problem(
        q.shape[2], k.shape[2], scale, False, (left, right), mask, bias, None, None, None, None, softcap, 0.0, False
    )  # fmt: skip


def _weigh(q: Tensor, k: Tensor, problem: Problem, rows: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    with no_autocast(q):
        weights, lse = reference_weights(q, k, problem, rows)
        if sinks is not None:  # one more key for each head, which gives its share to nobody
            weights = weights * torch.sigmoid(lse - sinks.detach().to(lse.dtype).view(1, -1, 1)).unsqueeze(-1)
    return weights


# --- torch's modules --------------------------------------------------------------------------------------------------------------


def multihead_weights(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    add_zero_attn: bool,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    is_causal: bool = False,
    static_k: Tensor | None = None,
    **_: Any,
) -> Weights:
    """Probabilities (B, H, N_q, N_k) of a call of `F.multi_head_attention_forward`: query (N_q, B, C) or (N_q, C), key alike."""
    query, key = (t.detach() if t.ndim == 3 else t.detach().unsqueeze(1) for t in (query, key))
    width = query.shape[-1]
    wq, wk = (q_proj_weight, k_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)[:2]  # type: ignore[union-attr]
    bq, bk = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    assert wq is not None
    assert wk is not None
    with torch.no_grad():
        q, k = F.linear(query, wq, bq), F.linear(key, wk, bk)
        if bias_k is not None:
            k = torch.cat([k, bias_k.to(k.dtype).expand(-1, k.shape[1], -1)])
        q, k = (t.unflatten(-1, (num_heads, width // num_heads)).permute(1, 2, 0, 3) for t in (q, k))
        if static_k is not None:
            k = static_k.unflatten(0, (-1, num_heads))
        if add_zero_attn:
            k = torch.cat([k, k.new_zeros(*k.shape[:2], 1, k.shape[3])], 2)
        causal = is_causal and not need_weights and key_padding_mask is None  # then torch does not look at the mask
        attn_mask = None if causal else attn_mask
        mask, bias = _multihead_masks(attn_mask, key_padding_mask, num_heads, k.shape[2])
    problem = _problem(q, k, mask=mask, bias=bias, window=(None, 0) if causal else (None, None))
    return lambda rows: _weigh(q, k, problem, rows)


def _multihead_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, num_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks, of which true hides, as a boolean one, of which true shows, and what is added to the logits."""
    allowed: Tensor | None = None
    added: Tensor | None = None
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.ndim == 3 else attn_mask[None, None]
    if key_padding_mask is not None:
        key_padding_mask = (key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None])[:, None, None]
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        mask = F.pad(mask, (0, num_keys - mask.shape[-1]))  # keys that were appended are seen
        if mask.dtype == torch.bool:
            allowed = ~mask if allowed is None else allowed & ~mask
        else:
            added = mask if added is None else added + mask
    return allowed, added


def multihead_call(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of `multihead_weights` for a call of an `nn.MultiheadAttention`, whichever way it takes inside."""
    call = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
    query, key = call["query"], call["key"]
    if module.batch_first and query.ndim == 3:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return {
        "query": query,
        "key": key,
        "num_heads": module.num_heads,
        "in_proj_weight": module.in_proj_weight,
        "in_proj_bias": module.in_proj_bias,
        "bias_k": module.bias_k,
        "add_zero_attn": module.add_zero_attn,
        "key_padding_mask": call.get("key_padding_mask"),
        "need_weights": call.get("need_weights", True),
        "attn_mask": call.get("attn_mask"),
        "is_causal": call.get("is_causal", False),
        "use_separate_proj_weight": not module._qkv_same_embed_dim,
        "q_proj_weight": module.q_proj_weight,
        "k_proj_weight": module.k_proj_weight,
    }


def encoder_layer_weights(layer: nn.TransformerEncoderLayer, *args: Any, **kwargs: Any) -> tuple[Weights, int, torch.device]:
    """Of a call of torch's encoder layer that went through its fused kernel: the probabilities, how many queries, and where."""
    call = inspect.signature(nn.TransformerEncoderLayer.forward).bind(layer, *args, **kwargs).arguments
    x, padding = call["src"].detach(), call.get("src_key_padding_mask")
    with torch.no_grad():
        if x.is_nested:  # what an encoder makes of a padded batch
            lengths = torch.tensor([len(sample) for sample in x.unbind()], device=x.device)
            x = x.to_padded_tensor(0.0)
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        x = layer.norm1(x) if layer.norm_first else x
    arguments = multihead_call(layer.self_attn, x, x, x, key_padding_mask=padding, attn_mask=call.get("src_mask"))
    return multihead_weights(**arguments), x.shape[1], x.device


# --- Hugging Face -----------------------------------------------------------------------------------------------------------------


def interface_table() -> Any:
    """Hugging Face's table of attention functions; None while transformers has not been imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)


def interface_weights(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Weights:
    """Probabilities (B, H, N_q, N_k) of a call of one of transformers' attention functions, of which `kind` is the name.

    Args:
        kind: "sdpa", "flex_attention", or one that has "flash" in it.
    """
    query, key = query.detach(), key.detach()
    if query.shape[0] != key.shape[0]:
        batch = max(query.shape[0], key.shape[0])
        query, key = (t.expand(batch, -1, -1, -1) for t in (query, key))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window: tuple[int | None, int | None] = (None, None)
    from_start = kind == "sdpa"
    mask: Any = attention_mask
    if kind == "sdpa":
        softcap = None
        window = (None, 0) if causal and mask is None and query.shape[2] > 1 else window
    elif "flash" in kind:
        left = None if sliding_window is None or key.shape[2] <= sliding_window else sliding_window - 1
        window = (left, (0 if query.shape[2] > 1 else None) if causal else left)
        mask = None if mask is None else mask[:, -key.shape[2] :].bool()[:, None, None]
    elif isinstance(mask, Tensor):
        mask = mask[:, :1, :, : key.shape[2]]
    block_mask = mask if mask is not None and not isinstance(mask, Tensor) else None
    problem = _problem(
        query,
        key,
        mask=None if block_mask is not None else mask,
        bias=position_bias,
        scale=scaling,
        softcap=softcap,
        window=window,
        from_start=from_start,
    )

    def weights(rows: Tensor | None) -> Tensor:
        if block_mask is None:
            return _weigh(query, key, problem, rows, s_aux)
        numbers = torch.arange(query.shape[2], device=query.device) if rows is None else rows
        own = problem._replace(
            num_queries=len(numbers),
            attn_mask=_block_mask(block_mask, numbers, query, key),
            bias=None if position_bias is None else position_bias.detach()[..., numbers, :],
        )
        return _weigh(query.index_select(2, numbers), key, own, None, s_aux)

    return weights


def _block_mask(block_mask: Any, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's mask for the numbered queries, boolean (B, 1, R, N_k)."""
    from torch.nn.attention.flex_attention import create_mask

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found: Tensor = block_mask.mask_mod(b, h, rows[i], j)
        return found

    return create_mask(mask_mod, query.shape[0], 1, len(rows), key.shape[2], device=query.device)


# --- which modules attend ---------------------------------------------------------------------------------------------------------

_CALLS = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS", "flex_attention", "multi_head_attention_forward"}


def attends(module: nn.Module) -> bool:
    """Whether a module's own code computes attention, as far as its names tell."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    if any(kind.__module__ == "transformers.modeling_utils" for kind in kinds) or type(module).__module__.startswith("torch.nn."):
        return False
    names = {name for kind in kinds for function in vars(kind).values() for name in _names(function)}
    named = any(re.search("attn|attention", kind.__name__, re.IGNORECASE) for kind in kinds)
    return bool(names & _CALLS) or (named and "softmax" in names)


def _names(function: Any) -> Iterator[str]:
    """What a method names: functions, attributes and globals."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) and not isinstance(function, type) else None
    return iter(()) if code is None else iter(code.co_names)
