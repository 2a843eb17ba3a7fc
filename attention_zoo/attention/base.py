"""What every mechanism shares: checks with good errors, masks, heads, rotary embeddings, the cache, auxiliary losses.

Each convention lives here once; a mechanism's own file holds only what its paper adds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.registry import AttentionInfo

__all__ = [
    "ROPE_LAYOUTS",
    "AttentionModule",
    "apply_rotary",
    "attend",
    "check_choice",
    "check_context",
    "check_cross",
    "check_grid",
    "check_head_split",
    "check_tokens",
    "drop",
    "extend_cache",
    "has_hooks",
    "is_bare",
    "is_idle",
    "merge_heads",
    "project_qkv",
    "read_padding",
    "refuse_where",
    "reset_children",
    "resolve_attention_mask",
    "resolve_head_dim",
    "resolve_visibility",
    "seen_keys",
    "split_heads",
]

ROPE_LAYOUTS = ("half", "interleaved")


class AttentionModule(nn.Module):
    """Base class of the mechanisms: the settings that `attend` and the adapters read from any of them.

    Attributes:
        is_causal: each token attends to itself and those before it.
        rope_layout: channel pairs of `position_embeddings`, one of `ROPE_LAYOUTS`.
        attn_drop: dropout rate on the attention weights in training mode.
        layer_idx: the module's layer in a Hugging Face cache; set by the model that holds it.
        is_rotated: that model hands over `position_embeddings`; set by it, for those who keep them in the cache.
    """

    attention_info: ClassVar[AttentionInfo]
    is_causal: bool = False
    rope_layout: str = "half"
    attn_drop: float = 0.0
    layer_idx: int | None = None
    is_rotated: bool = False
    _given: dict[str, Any]  # arguments of the constructor that are plain data

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _noting_arguments(cls.__init__)  # type: ignore[method-assign]

    def constructor_options(self) -> dict[str, Any]:
        """What the constructor takes to build a module of the same parameters: all that it was given as plain data.

        Classes and functions (`norm_layer`), `device` and `dtype` are not among it. A mechanism that can be changed afterwards
        says here what it has become.
        """
        return dict(self._given)

    def reset_parameters(self) -> None:
        """PyTorch's own initialisation of every submodule; mechanisms whose paper starts otherwise extend it."""
        reset_children(self)

    def cache_elements(self, num_tokens: int) -> int:
        """Numbers that a cache keeps of one sequence of `num_tokens` tokens in this layer: keys and values of all heads."""
        num_kv_heads = getattr(self, "num_kv_heads", None) or self.num_heads
        return 2 * int(num_kv_heads) * int(self.head_dim) * num_tokens  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without what the last forward left behind that hangs on its graph (an auxiliary loss)."""
        state = self.__dict__.copy()
        state.update({k: None for k, v in state.items() if isinstance(v, Tensor) and v.grad_fn is not None})
        return state


def _noting_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which notes its arguments; a subclass's own come last and stay."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def noting(self: AttentionModule, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
        self._given = {name: value for name, value in given.items() if _is_plain(value) and name not in ("device", "dtype")}

    return noting


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value; tuples count as lists."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float))  # bool is an int


def resolve_head_dim(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """Channels per head: `head_dim` if given, else dim / num_heads.

    Raises:
        ValueError: numbers that are not positive, or heads that do not divide `dim`; the nearest legal number is named.
    """
    if dim < 1 or num_heads < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"dim, num_heads and head_dim must be positive, got dim={dim}, num_heads={num_heads}, head_dim={head_dim}")
    if head_dim is not None:
        return head_dim
    if dim % num_heads:
        nearest = min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: (abs(h - num_heads), h))
        raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; the nearest that divides it is {nearest}")
    return dim // num_heads


def check_head_split(num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless the query heads share out evenly over the key/value heads; the nearest legal number is named."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        nearest = min((h for h in range(1, num_heads + 1) if num_heads % h == 0), key=lambda h: (abs(h - num_kv_heads), h))
        raise ValueError(
            f"num_heads={num_heads} does not share out evenly over num_kv_heads={num_kv_heads}; the nearest that does is {nearest}"
        )


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_tokens(x: Tensor, dim: int, name: str = "x") -> None:
    """Raise ValueError unless `x` is (B, N, dim)."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be tokens (B, N, C) with C = {dim}, got shape {tuple(x.shape)}")


def check_context(context: Tensor | None, dim: int, context_dim: int) -> None:
    """Raise ValueError unless `context` is (B, M, context_dim), or None where keys may come from x, which has `dim` channels."""
    if context is not None:
        check_tokens(context, context_dim, "context")
    elif context_dim != dim:
        raise ValueError(f"this module was built for cross attention with context_dim={context_dim}: give context")


def check_grid(x: Tensor, grid_size: tuple[int, int]) -> tuple[int, int]:
    """The grid (H, W) of tokens (B, H * W, C), row-major. Raises ValueError when the numbers do not match."""
    height, width = grid_size
    if height < 1 or width < 1 or height * width != x.shape[1]:
        raise ValueError(
            f"grid_size={(height, width)} stands for {height * width} tokens, x has {x.shape[1]}; "
            "class and register tokens are not part of the grid"
        )
    return height, width


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody waits for the layer's own forward or backward, so that its weights may not be used past it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def is_bare(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer of this kind is its weight and bias: not adapted or quantised, and nobody waits for its own forward."""
    return type(layer) is kind and type(layer.weight) in (Tensor, nn.Parameter) and not has_hooks(layer)


def is_idle(dropout: nn.Module) -> bool:
    """Whether a dropout layer hands on what it gets, unnoticed."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and not has_hooks(dropout)


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """`dropout(x)`; a layer that hands x on, unnoticed, is not called: that takes time, too."""
    return x if is_idle(dropout) else dropout(x)  # type: ignore[no-any-return]


def reset_children(module: nn.Module) -> None:
    """Call `reset_parameters` of every submodule that has one: PyTorch's defaults, after `to_empty` for instance."""
    for child in module.children():
        if callable(reset := getattr(child, "reset_parameters", None)):
            reset()
        else:
            reset_children(child)


def project_qkv(qkv: nn.Module, x: Tensor, context: Tensor | None, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q of `x`, k and v of `context` (of `x` when it is None), from one fused projection with rows [q; k; v] of these sizes."""
    if context is None:
        return qkv(x).split(sizes, dim=-1)
    if type(qkv) is nn.Linear:  # only the rows that are needed
        (wq, wkv), bias = qkv.weight.split([sizes[0], sizes[1] + sizes[2]]), qkv.bias
        bq, bkv = (None, None) if bias is None else bias.split([sizes[0], sizes[1] + sizes[2]])
        q, kv = F.linear(x, wq, bq), F.linear(context, wkv, bkv)
        return q, *kv.split(sizes[1:], dim=-1)
    q = qkv(x).split(sizes, dim=-1)[0]  # adapted or quantised: its own forward is the only right one
    return q, *qkv(context).split(sizes, dim=-1)[1:]


def attend(
    module: AttentionModule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cross: bool = False,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Any = None,
    scale: float | None = None,
    operation: Callable[..., Any] | None = None,
) -> Tensor:
    """Softmax attention with the module's settings: rotate q and k, extend the cache, mask, attend.

    Reads from the module: `is_causal`, `rope_layout`, `attn_drop` (a rate) and `layer_idx`. `operation` takes q, k, v and
    attn_mask, is_causal, scale, dropout_p by name; None: `ops.attention`.

    Shape: q (B, H, N, D), k, v (B, H_kv, M, D) -> (B, H, N, D).

    Raises:
        ValueError: rotary tables or a cache with cross attention, or a mask of another shape.
    """
    check_cross(cross, position_embeddings, past_key_values)
    if position_embeddings is not None:
        q, k = (apply_rotary(t, position_embeddings, module.rope_layout) for t in (q, k))
    static = None
    if past_key_values is not None:
        k, v, static = extend_cache(module, past_key_values, k, v)
    mask, is_causal = resolve_visibility(module, attention_mask, static, q.shape[2], k.shape[2])
    # Not `operation or ...`: torch.compile of torch 2.11 asks no partial function for its truth.
    compute = ops.attention if operation is None else operation
    out = compute(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, dropout_p=module.attn_drop if module.training else 0.0)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    return out


def check_cross(cross: bool, position_embeddings: tuple[Tensor, Tensor] | None, past_key_values: Any) -> None:
    """Raise ValueError for rotary tables or a cache in cross attention."""
    if cross and (position_embeddings is not None or past_key_values is not None):
        raise ValueError("cross attention takes neither position_embeddings nor past_key_values: its keys come from context")


def resolve_visibility(
    module: AttentionModule, attention_mask: Tensor | None, static: Tensor | None, num_queries: int, num_keys: int
) -> tuple[Tensor | None, bool]:
    """The mask and the causal flag of a call of `ops.attention`, from the user's mask and a static cache's (`extend_cache`)."""
    if static is not None and attention_mask is not None:
        attention_mask = _pad_keys(attention_mask, num_keys)
    mask = resolve_attention_mask(attention_mask, num_queries, num_keys)
    if static is None:
        return mask, module.is_causal
    mask = static if mask is None else static & mask if mask.dtype == torch.bool else mask.masked_fill(~static, -torch.inf)
    return mask, False  # the causal bound counts from the end of the keys, which a static cache pads; it is in the mask


def resolve_attention_mask(attention_mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """One form for the masks that users pass: 4-D, boolean (True = attend) or float (added to the logits).

    Args:
        attention_mask: (B, N_k) boolean or integer padding, true or 1 = a real token; (N_q, N_k) float, added to the logits; or
            4-D, broadcastable to (B, H, N_q, N_k), boolean or float.

    Raises:
        ValueError: another rank or dtype, or a size that fits neither queries nor keys.
    """
    if attention_mask is None:
        return None
    mask = attention_mask
    if mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        if mask.shape[-1] not in (1, num_keys) or mask.shape[-2] not in (1, num_queries):
            raise ValueError(f"attention_mask {tuple(mask.shape)} is not broadcastable to (B, H, {num_queries}, {num_keys})")
        return mask
    if mask.ndim == 2 and mask.is_floating_point():
        if mask.shape != (num_queries, num_keys):
            raise ValueError(
                f"a 2-D float attention_mask is added to the logits and must be (N_q, N_k) = {(num_queries, num_keys)}, got "
                f"{tuple(mask.shape)}; a padding mask (B, N_k) is boolean or integer"
            )
        return mask[None, None]
    if mask.ndim == 2:
        if mask.shape[-1] != num_keys:
            raise ValueError(f"a padding mask must be (B, N_k), N_k = {num_keys} with cached keys; got {tuple(mask.shape)}")
        return mask.bool()[:, None, None, :]
    raise ValueError(
        "attention_mask must be (B, N_k) boolean or integer, (N_q, N_k) float, or 4-D boolean or float; "
        f"got {mask.dtype} {tuple(mask.shape)}"
    )


def read_padding(attention_mask: Tensor | None, batch: int, new: int, seen: int, *, causal: bool = True) -> Tensor | None:
    """What mechanisms that know padding only read from a mask: which of `seen` + `new` tokens are real, (B, N_k); None: all.

    A causal mask (B, 1, new, N_k), as Hugging Face makes them, is padding and causality and can be read so; where attention is not
    `causal`, a mask whose rows are alike.

    Raises:
        ValueError: a mask of another shape, or one that is more than padding and causality.
        RuntimeError: the latter in a compiled graph, which looks at the mask when it runs.
    """
    mask, total = attention_mask, seen + new
    if mask is None:
        return None
    if mask.ndim == 2 and not mask.is_floating_point() and mask.shape == (batch, total):
        return mask.bool()
    fits = mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, new) or mask.shape[3] != total:
        raise ValueError(
            f"attention_mask must be padding, boolean or integer (B, N_k) = {(batch, total)} with cached tokens, or a causal mask "
            f"(B, 1, {new}, {total}), boolean or float, from which the padding is read; got {mask.dtype} {tuple(mask.shape)}"
        )
    added = mask.is_floating_point()
    allowed = mask > torch.finfo(mask.dtype).min / 2 if added else mask
    real = allowed[:, 0, -1]  # the last token may see all that is real
    refuse_where(
        _says_more(mask, allowed, new, seen, causal),
        "attention_mask hides or weighs single pairs of tokens; this mechanism can only leave padding out",
    )
    return real.expand(batch, total)


def refuse_where(wrong: Tensor, message: str) -> None:
    """Raise ValueError where any of `wrong` is true; in a compiled graph, which branches on no value, RuntimeError as it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), message)
    elif bool(wrong.any()):
        raise ValueError(message)


def _says_more(mask: Tensor, allowed: Tensor, new: int, seen: int, causal: bool) -> Tensor:
    """Where a 4-D mask, and what it allows, say more than which tokens are real, and causality."""
    added, total, real = mask.is_floating_point(), seen + new, allowed[:, 0, -1]
    if not causal:
        wrong = allowed != real[:, None, None]
        wrong = wrong | (allowed & (mask != 0)) if added else wrong
    else:
        positions = torch.arange(total, device=mask.device)
        past = positions <= positions[seen:, None]
        expected = real[:, None, None] & past
        wrong = (allowed & past) != expected
        wrong = wrong | (expected & (mask != 0)) if added else wrong
        # Rows before the first real token are empty, opened wholly by those who want no empty rows, or padding without causality.
        uniform = (allowed == allowed[..., :1]).all(-1, keepdim=True)
        wrong = torch.where(expected.any(-1, keepdim=True), wrong, (allowed != real[:, None, None]) & ~uniform)
    return wrong


def seen_keys(attention_mask: Tensor | None, num_keys: int) -> Tensor | None:
    """Which keys any query may see, (B or 1, N_k) boolean, by a padding mask or a 4-D one; None: all."""
    if attention_mask is None or (attention_mask.ndim == 2 and attention_mask.is_floating_point()):
        return None
    mask = resolve_attention_mask(attention_mask, attention_mask.shape[-2] if attention_mask.ndim == 4 else 1, num_keys)
    assert mask is not None
    allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask
    return allowed.flatten(1, 2).any(1).expand(-1, num_keys)


def _pad_keys(attention_mask: Tensor, num_keys: int) -> Tensor:
    """A mask over the keys seen so far, lengthened to a static cache's size; what fills the end is masked anyway."""
    missing = num_keys - attention_mask.shape[-1]
    broadcasts = attention_mask.ndim == 4 and attention_mask.shape[-1] == 1
    return attention_mask if missing <= 0 or broadcasts else F.pad(attention_mask, (0, missing))


def apply_rotary(x: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: str = "half") -> Tensor:
    """Rotate pairs of channels: x * cos + rotate(x) * sin.

    Args:
        x: (B, H, N, D).
        position_embeddings: (cos, sin), each (N, D) or (B, N, D), full width: every angle stands twice.
        layout: which channels form a pair. "half": i and i + D/2 (Hugging Face's); "interleaved": 2i and 2i + 1 (the RoPE paper's).

    Raises:
        ValueError: tables of another shape, or an odd D.
    """
    _check_rotary(x, position_embeddings)
    cos, sin = position_embeddings
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # over the heads
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat([-b, a], dim=-1)
    else:
        pairs = x.unflatten(-1, (-1, 2))
        rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def _check_rotary(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
    cos, sin = position_embeddings
    batch, _, length, width = x.shape
    allowed = ((1, batch), (1, length), (width,))[-cos.ndim :]
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or any(n not in m for n, m in zip(cos.shape, allowed, strict=True)):
        raise ValueError(
            f"position_embeddings must be (cos, sin), each (N, head_dim) or (B, N, head_dim) with B = {batch}, N = {length}, "
            f"head_dim = {width}; got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if width % 2:
        raise ValueError(f"rotary embeddings turn pairs of channels: head_dim must be even, got {width}")


def extend_cache(module: AttentionModule, past_key_values: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append k and v to the module's layer of a Hugging Face cache; returns what to attend to.

    Shape: k, v (B, H_kv, N, D) -> (B, H_kv, N_cached + N, D), and a mask.

    The mask is None unless the cache is static (its tensors are longer than what has been seen): then it is boolean,
    broadcastable to (1, 1, N, N_k), true for the keys seen so far, if `is_causal` up to each query's own; it replaces the causal
    bound, which would count from the end.

    Raises:
        ValueError: the module's `layer_idx` is not set.
    """
    layer_idx = module.layer_idx
    if layer_idx is None:
        raise ValueError("past_key_values needs to know the layer: set `layer_idx` on the module, 0 for the first layer")
    seen, new = past_key_values.get_seq_length(layer_idx), k.shape[2]
    if isinstance(seen, Tensor):
        seen = seen.clone()  # static caches count in place
    k, v = past_key_values.update(k, v, layer_idx)
    if not isinstance(seen, Tensor) and k.shape[2] <= seen + new:
        return k, v, None
    last = torch.arange(new, device=k.device)[:, None] + seen if module.is_causal else seen + new - 1
    return k, v, torch.atleast_2d(torch.arange(k.shape[2], device=k.device) <= last)[None, None]
