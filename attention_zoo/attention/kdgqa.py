"""Key-driven grouped-query attention: key/value heads whose keys have the larger norm serve more query heads.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention, arXiv 2408.08454, 2024. Two mechanisms: `kdgqa` looks at the
norms of the present keys, `dgqa` at how they evolve. Follows the official code (zohaib-khan5040/key-driven-gqa) where paper and
code differ: the moving average weighs the new norm with 0.9, and what dgqa stores is (cache + norm) / window_size in training, the
norm in eval, so with a large window "diff" compares with nearly nothing.
Deviations: equal or vanishing norms give the even allocation (the official loop never ends); padded keys do not count; allocations
per sample, frozen ones and causal attention are options; the fix-up of dgqa is deterministic unless asked otherwise, its allocation
is saved with the weights, and without a published training step it counts its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.attention.base import attend, check_choice, seen_keys
from attention_zoo.attention.functional import Attend, pure_function
from attention_zoo.attention.gqa import GroupedQueryAttention, mean_pool_states, source_kv_heads
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops.head_map import select_heads
from attention_zoo.registry import PATTERNS, register_attention

__all__ = [
    "DynamicGroupedQueryAttention",
    "KeyDrivenGroupedQueryAttention",
    "allocate_query_heads",
    "allocation_to_head_map",
    "even_allocation",
    "key_driven_allocation",
    "key_driven_attention",
    "key_norms",
    "set_training_step",
]

PAPER: dict[str, Any] = {
    "title": "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "arxiv": "2408.08454",
    "year": 2024,
    "repository": "zohaib-khan5040/key-driven-gqa",
    "patterns": PATTERNS,
    "kv_cache": True,
    "cost": "O(N^2 d H)",
}
_ENGINES = ("triton", "flash", "torch", "xformers", "flex")

ALLOC_SCOPES = ("batch", "sample", "frozen")
KINDS = ("diff", "ema")
FIXUPS = ("deterministic", "random")


class _AllocatedAttention(GroupedQueryAttention):
    """What the two mechanisms share: any number of key/value heads up to H, and the allocation that was used last.

    Attributes:
        last_allocation: query heads of each key/value head in the last forward, int64 (G,), or (B, G) where each sample has its
            own; None before the first.
    """

    allocation: Tensor  # where there is a stored one
    last_allocation: Tensor | None = None

    @classmethod
    def resolve_num_kv_heads(cls, num_heads: int, num_kv_heads: int | None = None) -> int:
        """The number of key/value heads: `num_kv_heads` from 1 to num_heads; None: half of the heads."""
        if num_kv_heads is None:
            return max(1, num_heads // 2)
        if not 1 <= num_kv_heads <= num_heads:
            nearest = min(max(num_kv_heads, 1), num_heads)
            raise ValueError(f"num_kv_heads must be from 1 to num_heads={num_heads}, got {num_kv_heads}; the nearest is {nearest}")
        return num_kv_heads

    @classmethod
    def initial_allocation(cls, num_heads: int, num_kv_heads: int | None = None, device: Any = None) -> Tensor:
        """What a stored allocation starts from: the even one, int64 (G,)."""
        return even_allocation(num_heads, cls.resolve_num_kv_heads(num_heads, num_kv_heads), device=device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "allocation" in self._buffers:
            self.allocation.copy_(self.initial_allocation(self.num_heads, self.num_kv_heads, device=self.allocation.device))
        self.last_allocation = None


@register_attention("kdgqa", batch_coupled=True, causal_options={"alloc_scope": "frozen"}, engines=_ENGINES, **PAPER)
class KeyDrivenGroupedQueryAttention(_AllocatedAttention):
    """Key-driven grouped-query attention: query heads go to key/value heads in proportion to the norms of their keys.

        n_g = sum_b ||k_bg||_F       s = (n - min n) / (max n - min n)       a = round(H s / sum(s)), fixed up to the sum H
        head_h = softmax(q_h k_g^T / sqrt(d)) v_g,  a_0 heads with g = 0, the next a_1 with g = 1, ...      y = concat_h(head_h) W_o

    | paper | here |
    |---|---|
    | H query heads, G groups, d | `num_heads`, `num_kv_heads`, `head_dim` |
    | a, query heads of each group | `last_allocation`; `allocation` when frozen |
    | W^Q, W^K, W^V, W^O | `q`, `k`, `v`, `proj` |

    The weakest key head always gets 0 before the fix-up, which adds to the smallest entry and takes from the largest. No gradient
    flows through the allocation, and none to the keys and values of a head that got no query head. "batch" makes the result of a
    sample depend on the others in its batch.

    The allocation looks at all keys, future ones as well. Causal attention and a cache therefore need alloc_scope="frozen", whose
    allocation is a buffer saved with the weights: even at first, or what `freeze_allocation` found on a prompt.

    Args:
        dim, num_heads, head_dim, qkv_bias, qk_norm, norm_layer, proj_bias, attn_drop, proj_drop, is_causal, rope_layout,
            context_dim: as for `GroupedQueryAttention`.
        num_kv_heads: number of key/value heads G <= H; None: half of the heads.
        alloc_scope: whose norms decide: "batch" (the sum over the batch, official), "sample" (each sample for itself), or "frozen"
            (none: the buffer `allocation`).

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C).

    Raises:
        ValueError: an unknown scope, more key/value heads than heads, causal attention or a cache without a frozen allocation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        alloc_scope: str = "batch",
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_choice("alloc_scope", alloc_scope, ALLOC_SCOPES)
        if is_causal and alloc_scope != "frozen":
            raise ValueError(f"alloc_scope={alloc_scope!r} looks at future keys: is_causal=True needs alloc_scope='frozen'")
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            norm_layer=norm_layer,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            is_causal=is_causal,
            rope_layout=rope_layout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.alloc_scope = alloc_scope
        if alloc_scope == "frozen":
            self.register_buffer("allocation", self.initial_allocation(num_heads, num_kv_heads, device=device))

    def freeze_allocation(self) -> None:
        """Keep the allocation of the last forward from now on: it becomes the buffer `allocation`, alloc_scope "frozen".

        To generate after a prompt: run the prompt once, freeze, then fill the cache; `is_causal` may be set once it is frozen.

        Raises:
            ValueError: no forward has run, or the last one had an allocation for each of several samples.
        """
        allocation = self.last_allocation
        if allocation is None:
            raise ValueError("no allocation to freeze: run a forward first")
        if allocation.ndim == 2:
            if len(allocation) != 1:
                raise ValueError(f"the last forward allocated for each of {len(allocation)} samples; freeze after a batch of one")
            allocation = allocation[0]
        self.register_buffer("allocation", allocation.clone())
        self.alloc_scope = "frozen"

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        if past_key_values is not None and self.alloc_scope != "frozen":
            raise ValueError(
                f"alloc_scope={self.alloc_scope!r} would change with every cached key: a cache needs alloc_scope='frozen'"
            )
        source = self._source(x, context)
        k = self._keys(source)
        with _Branch(k) as branch:
            self.last_allocation, head_map = self._allocate(k, attention_mask)
        q, v = self._queries(x), self._values(source)
        branch.join()
        out = attend(
            self,
            q,
            k,
            v,
            cross=context is not None,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            operation=partial(ops.attention_by_head_map, head_map=head_map),
        )
        return self._output(out)

    def _allocate(self, k: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The allocation of this forward, and its map of heads."""
        if self.alloc_scope == "frozen":
            return _read_allocation(self.allocation, self.num_heads, k)
        return _allocate_by_keys(k, self.num_heads, attention_mask, self.alloc_scope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alloc_scope={self.alloc_scope!r}"


@register_attention("dgqa", batch_coupled=True, causal_options={"eval_update": False}, engines=_ENGINES, **PAPER)
class DynamicGroupedQueryAttention(_AllocatedAttention):
    """Dynamic key-distributed grouped-query attention: query heads follow the evolution of the key norms in training.

        diff: u = |c - n|       ema: u = beta n + (1 - beta) c       a = round(H u / sum(u)), fixed up to the sum H
        c <- (c + n) / window_size in training, every window_size-th step; c <- n in eval, every forward

    | paper | here |
    |---|---|
    | c, cached norms | `cache`, float32 whatever the module's dtype |
    | a, query heads of each group | `allocation`, `last_allocation` |
    | n_g = sum_b of the Frobenius norm of k_bg | `key_norms(k).sum(0)` |

    Attention itself is that of `kdgqa`. Between two updates the allocation stays: the result is that of `gqa` with uneven groups.
    Buffers change in forward: eval results depend on the order of the batches unless eval_update=False. A forward that is repeated
    for gradient checkpointing uses what the first one found and changes nothing.

    The allocation looks at all keys. Causal attention and a cache need eval_update=False: eval, with a cache also training, uses
    the stored allocation, and a causal training step the one that the steps before it left.

    Args:
        dim, num_heads, head_dim, qkv_bias, qk_norm, norm_layer, proj_bias, attn_drop, proj_drop, is_causal, rope_layout,
            context_dim: as for `GroupedQueryAttention`.
        num_kv_heads: number of key/value heads G <= H; None: half of the heads.
        kind: "diff" or "ema".
        window_size: training steps from one update to the next (the paper's best: 300).
        beta: weight of the new norm in "ema".
        eval_update: whether eval forwards update cache and allocation (official).
        fixup: "deterministic" (as kdgqa) or "random" (official: random entries, those above 0 when one is taken away).

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C).

    Raises:
        ValueError: unknown choices, numbers out of range, causal attention or a cache with eval_update=True.
    """

    cache: Tensor
    step: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kind: str = "diff",
        window_size: int = 1,
        beta: float = 0.9,
        eval_update: bool = True,
        fixup: str = "deterministic",
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("fixup", fixup, FIXUPS)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must be from 0 to 1, got {beta}")
        if is_causal and eval_update:
            raise ValueError("eval_update=True looks at future keys: is_causal=True needs eval_update=False")
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            norm_layer=norm_layer,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            is_causal=is_causal,
            rope_layout=rope_layout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.kind, self.window_size, self.beta = kind, window_size, beta
        self.eval_update, self.fixup = eval_update, fixup
        self.register_buffer("cache", torch.zeros(self.num_kv_heads, device=device, dtype=torch.float32))
        self.register_buffer("allocation", self.initial_allocation(num_heads, num_kv_heads, device=device))
        # A tensor, not an int: a number that changes with every call would make torch.compile compile every call.
        self.register_buffer("step", torch.zeros((), device=device, dtype=torch.int64), persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.cache.zero_()
        self.step.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        training_step: int | None = None,
    ) -> Tensor:
        """`training_step`: this call's step in place of the module's counter; a multiple of window_size updates. Unused in eval."""
        if past_key_values is not None and self.eval_update:
            raise ValueError("eval_update=True would change the allocation with every cached key: a cache needs eval_update=False")
        source = self._source(x, context)
        k = self._keys(source)
        with _Branch(k) as branch:
            self.last_allocation, head_map = self._allocate(k, attention_mask, training_step, cached=past_key_values is not None)
        q, v = self._queries(x), self._values(source)
        branch.join()
        out = attend(
            self,
            q,
            k,
            v,
            cross=context is not None,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            operation=partial(ops.attention_by_head_map, head_map=head_map),
        )
        return self._output(out)

    def _allocate(
        self, k: Tensor, attention_mask: Tensor | None, training_step: int | None, *, cached: bool
    ) -> tuple[Tensor, Tensor]:
        """The allocation of this forward, a copy, after the update that is due, and its map of heads."""
        if _recomputing() and self.last_allocation is not None:
            return self.last_allocation, allocation_to_head_map(self.last_allocation, self.num_heads)
        updates = not cached and (self.training or self.eval_update)
        plain = attention_mask is None and not self.is_causal and self.fixup == "deterministic"
        if updates and plain and k.shape[0] and use_kernel("auto", (k,)):
            return self._evolve(k, training_step)
        if not updates:
            return _read_allocation(self.allocation, self.num_heads, k)
        allocation = self.allocation.clone()
        self._update(k, attention_mask, training_step)
        if not self.is_causal:  # this step's update has seen the future
            allocation = self.allocation.clone()
        return allocation, allocation_to_head_map(allocation, self.num_heads)

    def _evolve(self, k: Tensor, training_step: int | None) -> tuple[Tensor, Tensor]:
        """`_update` as two kernels, and what is used now."""
        from attention_zoo.ops.triton.head_map import evolve_heads

        return evolve_heads(
            k,
            self.cache,
            self.allocation,
            self.step,
            num_heads=self.num_heads,
            beta=None if self.kind == "diff" else self.beta,
            window_size=self.window_size,
            training_step=training_step,
            training=self.training,
        )

    @torch.no_grad()
    def _update(self, k: Tensor, attention_mask: Tensor | None, training_step: int | None) -> None:
        """Bring `cache`, `allocation` and the counter to where this forward, which updates, and its step want them."""
        norms, cache = key_norms(k, attention_mask).sum(0), self.cache.float()
        evolution = (cache - norms).abs() if self.kind == "diff" else self.beta * norms + (1.0 - self.beta) * cache
        allocation = allocate_query_heads(evolution, self.num_heads, fixup=self.fixup)
        if not self.training:
            self.cache.copy_(norms)
            self.allocation.copy_(allocation)
            return
        step = self.step if training_step is None else torch.full_like(self.step, training_step)
        due = step % self.window_size == 0  # stays on the device: masks instead of a branch
        self.cache.copy_(torch.where(due, (cache + norms) / self.window_size, cache))
        self.allocation.copy_(torch.where(due, allocation, self.allocation))
        self.step.add_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicGroupedQueryAttention:
        cache = self.cache
        super()._apply(fn, recurse)
        if self.cache.dtype != torch.float32:  # with window_size=1 it grows without bound, which half precision does not bear
            self.cache = cache.to(device=self.cache.device, dtype=torch.float32)
        return self

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kind={self.kind!r}, window_size={self.window_size}, beta={self.beta}, "
            f"eval_update={self.eval_update}, fixup={self.fixup!r}"
        )


def set_training_step(model: nn.Module, step: int) -> None:
    """Tell every `dgqa` layer of a model the training step of its next forward; each training forward then counts one further.

    The official training restarts at 0 with every epoch. Models without such layers are left as they are.

    Raises:
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    for module in model.modules():
        if isinstance(module, DynamicGroupedQueryAttention):
            module.step.fill_(step)


def even_allocation(num_heads: int, num_kv_heads: int, device: Any = None) -> Tensor:
    """int64 (num_kv_heads,): num_heads shared out evenly, the first num_heads % num_kv_heads entries one more."""
    groups = torch.arange(num_kv_heads, device=device)
    return num_heads // num_kv_heads + (groups < num_heads % num_kv_heads).long()


def key_norms(k: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Frobenius norm of the keys of each sample and head, in float32, without gradient.

    Shape: k (B, G, N, d), attention_mask any that the mechanisms take -> (B, G). Keys that no query may see, as padding, do not
    count.

    Raises:
        ValueError: a padding mask of another shape.
    """
    k = k.detach().float()  # before squaring: sums of squares overflow in half precision
    if attention_mask is not None and (keep := seen_keys(attention_mask, k.shape[2])) is not None:
        if keep.shape[0] not in (1, k.shape[0]):
            raise ValueError(f"a padding mask must be (B, N_k) with B = {k.shape[0]}, got {tuple(attention_mask.shape)}")
        k = k.masked_fill(~keep[:, None, :, None], 0.0)
    return torch.linalg.vector_norm(k, dim=(-2, -1))


def key_driven_allocation(k: Tensor, num_heads: int, attention_mask: Tensor | None, scope: str) -> Tensor:
    """Query heads of each key/value head of k (B, G, N, d), int64 (G,) for the scope "batch", (B, G) for "sample"."""
    norms = key_norms(k, attention_mask)
    if scope == "batch":
        norms = norms.sum(0)
    lowest, highest = norms.aminmax(dim=-1, keepdim=True)
    return allocate_query_heads((norms - lowest) / (highest - lowest), num_heads)


def _allocate_by_keys(k: Tensor, num_heads: int, attention_mask: Tensor | None, scope: str) -> tuple[Tensor, Tensor]:
    """`key_driven_allocation` and its map of heads; on CUDA from two kernels."""
    if attention_mask is None and use_kernel("auto", (k,)):
        from attention_zoo.ops.triton.head_map import allocate_heads

        return allocate_heads(k, num_heads, scope == "sample")
    allocation = key_driven_allocation(k, num_heads, attention_mask, scope)
    return allocation, allocation_to_head_map(allocation, num_heads)


def _read_allocation(stored: Tensor, num_heads: int, k: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a stored allocation, which may change, and its map of heads; beside keys `k` on CUDA from one kernel."""
    if use_kernel("auto", (k,)):
        from attention_zoo.ops.triton.head_map import read_allocation

        return read_allocation(stored, num_heads)
    allocation = stored.clone()
    return allocation, allocation_to_head_map(allocation, num_heads)


class _Branch:
    """While a CUDA graph is captured, what is done within goes beside what follows, up to `join`; otherwise nothing happens.

    Sharing out the heads is short work for few multiprocessors: the other projections hide it.
    """

    def __init__(self, x: Tensor) -> None:
        beside = x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
        self._stream = torch.cuda.Stream(x.device) if beside else None

    def __enter__(self) -> _Branch:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _refuse_frozen(*, alloc_scope: str, is_causal: bool = False, **_: Any) -> None:
    if is_causal or alloc_scope == "frozen":
        raise ValueError(
            "'kdgqa' looks at all keys, future ones too: causal attention needs alloc_scope='frozen', whose allocation is kept in "
            "a buffer; az.swap_attention has it"
        )


@pure_function("kdgqa", check=_refuse_frozen)
def key_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attend: Attend,
    attn_mask: Tensor | None,
    is_causal: bool,
    qk_norm: bool,
    num_kv_heads: int | None = None,
    alloc_scope: str = "batch",
) -> Tensor:
    """`KeyDrivenGroupedQueryAttention` as a function, key and value heads averaged to `num_kv_heads`.

    Shape: q (B, H, N, d), k, v (B, G', M, d) -> (B, H, N, d).

    Raises:
        ValueError: causal attention, which needs a stored allocation; heads that do not share out evenly, or normalised keys that
            would have to be averaged.
    """
    _refuse_frozen(alloc_scope=alloc_scope, is_causal=is_causal)
    num_kv_heads = KeyDrivenGroupedQueryAttention.resolve_num_kv_heads(q.shape[1], source_kv_heads(q, k, num_kv_heads))
    k, v = mean_pool_states(k, v, num_kv_heads, qk_norm)
    head_map = _allocate_by_keys(k, q.shape[1], attn_mask, alloc_scope)[1]
    return attend(q, *(select_heads(t, head_map) for t in (k, v)))


def allocate_query_heads(weights: Tensor, num_heads: int, *, fixup: str = "deterministic") -> Tensor:
    """Share num_heads query heads out in proportion to weights, rounded half to even, then fixed up to the exact sum.

    Args:
        weights: (..., G), not negative. Where their sum is 0 or not finite the allocation is even.
        fixup: while the sum is too large, one is taken from the largest entry; while it is too small, the smallest gets one; the
            lowest index among equals. "random" takes from any entry above 0 and gives to any.

    Returns: int64 (..., G), not negative, summing to num_heads. Everything stays on the device.
    """
    num_kv_heads = weights.shape[-1]
    total = weights.sum(-1, keepdim=True)
    usable = (total > 0) & total.isfinite()
    shares = torch.where(usable, weights / total * num_heads, 0.0)
    even = even_allocation(num_heads, num_kv_heads, device=weights.device)
    allocation = torch.where(usable, shares.round().long(), even)
    for _ in range((num_kv_heads + 1) // 2):  # rounding moves each entry by at most one half, so more turns are never needed
        excess = allocation.sum(-1, keepdim=True) - num_heads
        if fixup == "deterministic":
            takes, gives = allocation.argmax(-1, keepdim=True), allocation.argmin(-1, keepdim=True)
        else:
            draw = torch.rand(allocation.shape, device=allocation.device)
            takes = draw.masked_fill(allocation == 0, -1.0).argmax(-1, keepdim=True)
            gives = draw.argmax(-1, keepdim=True)
        index = torch.where(excess > 0, takes, gives)
        allocation = allocation.scatter_add(-1, index, -excess.sign())
    return allocation


def allocation_to_head_map(allocation: Tensor, num_heads: int) -> Tensor:
    """The key/value head of every query head, heads of one key/value head in a row. int64 (..., G) -> (..., num_heads)."""
    heads = torch.arange(num_heads, device=allocation.device)
    return (allocation.cumsum(-1).unsqueeze(-2) <= heads.unsqueeze(-1)).sum(-1)


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass, that is, once more for gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
