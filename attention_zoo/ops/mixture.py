"""Attention whose heads are gated for each token as a function of tensors: heads that a token has not chosen are not computed.

In plain PyTorch all heads are computed and multiplied by their gates, 0 for those not chosen. It is the specification of the
kernels of `triton/mixture.py` and its neighbours, which compute the chosen (token, head) pairs only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops import _cudnn
from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.attention import attention, attention_weights
from attention_zoo.ops.dispatch import follow_autocast, wanted_backend
from attention_zoo.ops.engines.base import HALF

__all__ = [
    "MOST_COMPARED",
    "gate_heads",
    "heads_apart",
    "is_short",
    "load_balance_loss",
    "mixture_attention",
    "mixture_gates",
    "packs",
    "pays",
    "query_norm_gates",
    "top_k_mask",
]

# Shares of the heads up to which skipping the others pays for packing, each from so much `_cudnn.dense_work` on; below, the host
# takes longer to launch the kernels. Of dense attention's time, forward | with backward, a layer with three quarters of its heads
# takes 0.83 | 0.85 for 16K tokens (2**38), 0.89 | 0.96 causal, and for 4K (2**36) 0.92 | 0.89, 1.05 | 0.97 in a CUDA graph.
_MOST_ACTIVE = 0.7, 0.76
_LEAST_WORK = 2**35, 2**37
_MOST_MEASURED = 128  # channels of a head
_LEAST_GATED = 2**22  # numbers that gates multiply; below, the kernel's launch takes the host longer than the product takes
MOST_COMPARED = 64  # heads that the kernels of the router compare with each other


def _weights(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor | None, topk: int, *, rows: Tensor | None = None, **call: Any
) -> Tensor:
    """Probabilities (B, H, N, M) of a call of `mixture_attention`, of all heads, chosen or not."""
    return attention_weights(q, k, v, rows=rows, **call)


@tapped(_weights, takes_rows=True)
def mixture_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    chosen: Tensor | None,
    topk: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention outputs times gates, where every token uses the first heads and `topk` of the others.

        out(h, n) = gates(h, n) softmax_m(scale * q(h, n) . k(h, m)) v(h, m)        0 for heads that token n has not chosen

    Args:
        q: (B, H, N, D).
        k: (B, H_kv, M, D), H a multiple of H_kv.
        v: (B, H_kv, M, D_v).
        gates: (B, H, N), 0 for heads that are not chosen (not checked). The gradient of those is 0, or that of heads that are
            computed, according to the backend: the router has to mask it.
        chosen: (B, N, H_r), 0 or 1 or boolean: which of the last H_r heads a token uses; it uses all that come before them.
            None: no head is chosen, every token uses all.
        topk: how many are chosen, the same for every token (not checked), 0 to H_r.
        attn_mask, is_causal, scale, dropout_p: as for `attention`.
        backend: "triton" for our kernels; "auto" takes them on CUDA, where they serve the call and enough is skipped; any other as
            for `attention`.

    Returns: (B, H, N, D_v) in the dtype of q.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    q, k, v = follow_autocast(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    missing = None if attn_mask is None else "the kernels take no mask"
    if factor <= 0:
        missing = "the kernels need a positive scale"
    routed = 0 if chosen is None else chosen.shape[-1]
    if use_kernel(backend, (q, k, v), dropout_p=dropout_p, missing=missing) and packs(
        q.shape, q.dtype, k.shape[2], routed, topk, is_causal, backend=backend
    ):
        return _run_kernel(q, k, v, gates, chosen, topk, is_causal, factor)
    out = attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)
    assert isinstance(out, Tensor)  # no log-normaliser was asked for
    _check(q, gates, chosen, topk)
    return gate_heads(out, gates, backend=backend)


def gate_heads(x: Tensor, gates: Tensor, *, backend: str = "auto") -> Tensor:
    """x (B, H, N, D) times gates (B, H, N), in the dtype of x.

    Args:
        backend: "triton" for our kernel, which leaves heads next to channels in memory, as a projection reads them; "auto" takes
            it on CUDA for tensors of some size; any other for plain PyTorch.
    """
    if (wanted_backend(backend) != "auto" or x.numel() >= _LEAST_GATED) and use_kernel(backend, (x,)):
        from attention_zoo.ops.triton.mixture_rows import gate_heads_triton

        return gate_heads_triton(x, gates)
    return x * gates.unsqueeze(-1).to(x.dtype)


def mixture_gates(
    logits: Tensor, shared: Tensor | None, balance: Tensor | None, *, topk: int, shared_heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """What the linear routers of a mixture of heads say of each token, from their logits; float32 at least.

        p = softmax(logits),  m = 1 for the K largest p of the token, else 0,  r = K p m / sum(p m)
        s = h_s softmax(shared),  a = 2 softmax(balance),  gates = [a_0 s, a_1 r]

    Args:
        logits: (B, N, h_r).
        shared: (B, N, h_s); None: s = 1.
        balance: (B, N, 2); None: a = 1.
        topk: K, from 1 to h_r.
        shared_heads: h_s.
        backend: "triton" for our kernel, which "auto" takes on CUDA; any other for plain PyTorch.

    Returns: gates (B, N, h_s + h_r), p and m.
    """
    given = tuple(t for t in (logits, shared, balance) if t is not None)
    missing = None if logits.shape[-1] <= MOST_COMPARED else f"more than {MOST_COMPARED} heads to choose from"
    if use_kernel(backend, given, missing=missing):
        from attention_zoo.ops.triton.mixture_gates import mixture_gates_triton

        gates, scores, chosen = mixture_gates_triton(logits, shared, balance, topk=topk, shared_heads=shared_heads)
        return gates, scores, chosen.detach()
    scores = work_softmax(logits)
    chosen = top_k_mask(scores, topk, backend=backend)
    kept = scores * chosen
    routed = topk * kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)
    if shared_heads == 0:
        return routed, scores, chosen
    first = routed.new_ones((*routed.shape[:2], shared_heads)) if shared is None else shared_heads * work_softmax(shared)
    if balance is None:
        return torch.cat([first, routed], -1), scores, chosen
    share = 2 * work_softmax(balance)
    return torch.cat([share[..., :1] * first, share[..., 1:] * routed], -1), scores, chosen


def query_norm_gates(
    q: Tensor, *, topk: int, shared_heads: int, scored: bool = False, through: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the router without parameters says of each token, from the norms n of its routed queries; float32 at least.

        gates = [1, m],  m = 1 for the K largest n of the token, else 0,  p = softmax(n / std(n))

    Args:
        q: (B, h, N, D), shared heads first.
        topk: K, from 1 to h_r.
        shared_heads: h_s, less than h.
        scored: whether p is wanted.
        through: the gradient of the gates of chosen heads goes straight through to p; else gates have none.
        backend: "triton" for our kernel, which "auto" takes on CUDA; any other for plain PyTorch.

    Returns: gates (B, N, h), p (None unless it is `scored` or gradients go `through` it) and m, (B, N, h_r).
    """
    routed, scored = q[:, shared_heads:], scored or through
    missing = None if routed.shape[1] <= MOST_COMPARED else f"more than {MOST_COMPARED} heads to choose from"
    if use_kernel(backend, (q,), missing=missing):
        from attention_zoo.ops.triton.mixture_norms import query_norm_gates_triton

        return query_norm_gates_triton(q, topk=topk, shared_heads=shared_heads, scored=scored, through=through)
    work = torch.promote_types(q.dtype, torch.float32)
    norms = torch.linalg.vector_norm(routed, dim=-1, dtype=work).transpose(1, 2)
    chosen = top_k_mask(norms, topk, backend=backend)  # of the norms themselves: p has the same order
    scores = _standardised_softmax(norms) if scored else None
    gates = chosen + (scores - scores.detach()) * chosen if through and scores is not None else chosen
    shared = torch.ones((q.shape[0], q.shape[2], shared_heads), dtype=work, device=q.device)
    return torch.cat([shared, gates], -1), scores, chosen


def _standardised_softmax(norms: Tensor) -> Tensor:
    """softmax(n / std(n)) over the last dimension; of one number: 1."""
    if norms.shape[-1] > 1 and norms.numel():  # torch warns of deviations of nothing
        norms = norms / (norms.std(-1, keepdim=True) + 1e-6)
    return torch.softmax(norms, -1)


def load_balance_loss(
    scores: Tensor, chosen: Tensor, real: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """h_r * sum_e mean(p_e) * mean(m_e), which is K when all heads are chosen equally often, and the load mean(m_e).

    Args:
        scores: p (B, N, h_r).
        chosen: m (B, N, h_r), 0 or 1.
        real: (B, N) boolean or broadcastable, the tokens to count; None: all.
        backend: "triton" for our kernels, which "auto" takes on CUDA; any other for plain PyTorch.

    Returns: the loss, a scalar whose gradient flows through `scores`, and the load (h_r,).
    """
    missing = None if scores.dtype == torch.float32 else "scores that are not float32"
    if scores.shape[-1] > MOST_COMPARED:
        missing = f"more than {MOST_COMPARED} heads to choose from"
    if use_kernel(backend, (scores, chosen), missing=missing):
        from attention_zoo.ops.triton.mixture_balance import load_balance_triton

        return load_balance_triton(scores, chosen, real)
    counted = scores.new_ones(scores.shape[:2]) if real is None else real.to(scores.dtype).expand(scores.shape[:2])
    total = counted.sum().clamp_min(1.0)
    importance, load = ((counted.unsqueeze(-1) * t).sum((0, 1)) / total for t in (scores, chosen))
    return scores.shape[-1] * (importance * load).sum(), load


def work_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def top_k_mask(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """1 for the k largest of the last dimension, else 0, in the dtype of `scores`; no gradient. Of ties the lowest index wins."""
    scores = scores.detach()
    if k == scores.shape[-1]:
        return torch.ones_like(scores)
    if scores.shape[-1] <= MOST_COMPARED and use_kernel(backend, (scores,)):
        from attention_zoo.ops.triton.mixture_gates import top_k_mask_triton

        return top_k_mask_triton(scores, k)
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # torch.topk does not say which of equal scores it takes
    return torch.zeros_like(scores).scatter(-1, order[..., :k], 1.0)


def packs(
    shape: tuple[int, ...], dtype: torch.dtype, keys: int, routed: int, topk: int, is_causal: bool, *, backend: str = "auto"
) -> bool:
    """Whether the kernels are to compute the chosen pairs only, packed, and no library all heads of a call: if they are asked for,
    and where they are faster. See `pays`."""
    return wanted_backend(backend) != "auto" or pays(shape, dtype, keys, routed, topk, is_causal)


def pays(shape: tuple[int, ...], dtype: torch.dtype, keys: int, routed: int, topk: int, is_causal: bool) -> bool:
    """Whether enough is skipped of a call with queries (B, H, N, D), of whose last `routed` heads a token chooses `topk`.

    As measured on an H200.
    """
    batch, heads, tokens, dim = shape
    if dtype not in HALF or dim > _MOST_MEASURED:
        return False
    work, active = _cudnn.dense_work(batch, heads, tokens, keys, dim, is_causal), (heads - routed + topk) / max(1, heads)
    return any(active <= most and work >= least for most, least in zip(_MOST_ACTIVE, _LEAST_WORK, strict=True))


def is_short(shape: tuple[int, ...], keys: int, is_causal: bool) -> bool:
    """Whether the host's part counts for more than which library attends."""
    batch, heads, tokens, dim = shape
    return _cudnn.dense_work(batch, heads, tokens, keys, dim, is_causal) < min(_LEAST_WORK)


def _run_kernel(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, chosen: Tensor | None, topk: int, is_causal: bool, scale: float
) -> Tensor:
    """Whole groups of heads that every token uses go to cuDNN where it serves them, all others to our kernels."""
    from attention_zoo.ops.triton.mixture import mixture_attention_triton

    _check(q, gates, chosen, topk)
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            "q must be (B, H, N, D), k (B, H_kv, M, D) and v (B, H_kv, M, D_v), H a multiple of H_kv; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if chosen is None:
        chosen = gates.new_empty((q.shape[0], q.shape[2], 0))
    apart = heads_apart(q, k, v, chosen.shape[-1], is_causal)
    with no_autocast(q):
        return mixture_attention_triton(q, k, v, gates, chosen, topk=topk, apart=apart, scale=scale, is_causal=is_causal)


def heads_apart(q: Tensor, k: Tensor, v: Tensor, routed: int, is_causal: bool) -> int:
    """How many heads of those that every token uses are left to cuDNN: whole groups, and not all that there are."""
    group = q.shape[1] // max(1, k.shape[1])
    whole = min((q.shape[1] - routed) // max(1, group), k.shape[1] - 1)
    in_library = whole > 0 and q.shape[-1] == v.shape[-1] and _cudnn.serves(q, k, v, is_causal)
    return group * whole if in_library else 0


def _check(q: Tensor, gates: Tensor, chosen: Tensor | None, topk: int) -> None:
    """Raise ValueError for gates and choices that do not fit the queries."""
    batch, heads, tokens, _ = q.shape
    if gates.shape != (batch, heads, tokens):
        raise ValueError(f"gates must be (B, H, N) = {(batch, heads, tokens)}, got {tuple(gates.shape)}")
    if chosen is not None and (chosen.ndim != 3 or chosen.shape[:2] != (batch, tokens) or chosen.shape[2] > heads):
        raise ValueError(f"chosen must be (B, N, H_r) = {(batch, tokens, f'at most {heads}')}, got {tuple(chosen.shape)}")
    most = 0 if chosen is None else chosen.shape[2]
    if not 0 <= topk <= most:
        raise ValueError(f"topk must be from 0 to the {most} heads that can be chosen, got {topk}")
