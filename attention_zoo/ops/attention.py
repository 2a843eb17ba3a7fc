"""`attention`: softmax attention as a function of tensors, on whichever engine serves the call; and merging of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._problem import Problem, make_problem
from attention_zoo.ops._reference import reference_weights
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.dispatch import follow_autocast, select
from attention_zoo.ops.engines import GRID_LIMIT, Engine, describe

__all__ = ["attention", "attention_weights", "merge_attention"]


def attention_weights(q: Tensor, k: Tensor, v: Tensor, *, rows: Tensor | None = None, backend: str = "auto", **call: Any) -> Tensor:
    """The probabilities of a call of `attention` before any dropout, (B, H, N_q, N_k), float32 or float64; rows of 0 see nothing.

    Takes the arguments of `attention`, of which `backend` changes nothing, and `rows`, int64 (R,): numbers of the queries to
    compute, in memory for those; None: all.
    """
    q, k, v = follow_autocast(q, k, v)
    with no_autocast(q):
        return reference_weights(q, k, make_problem(q, k, v, **call), rows)[0]


@tapped(attention_weights, takes_rows=True)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: softmax(softcap(scale * q k^T) + bias + mask) v, each query over the keys that it may see.

    Grouped heads: query head h reads key/value head h // (H / H_kv), without K and V being repeated. A row that may see nothing
    gives 0, with finite gradients. The softmax is computed in float32. Under autocast q, k and v are cast as for torch's SDPA.

    Args:
        q: (B, H, N_q, D).
        k: (B, H_kv, N_k, D), H a multiple of H_kv.
        v: (B, H_kv, N_k, D_v).
        attn_mask: broadcastable to (B, H, N_q, N_k); boolean: True = attend; floating point: added to the logits. It adds to
            `is_causal` and `window_size`, never replaces them.
        bias: floating point, broadcastable to (B, H, N_q, N_k), added to the logits. May need a gradient.
        is_causal: query i sees the keys up to i + N_k - N_q: the last query stands at the last key.
        window_size: how many keys to the left and right of its own position a query sees, (left, right) or one number for both;
            None or -1: no bound. With `is_causal` right is 0.
        cu_seqlens: int32 (S + 1,): q holds S sequences one after another as (1, H, total, D), and these are their offsets.
            Sequences do not see each other; may be empty; causality and window count within each.
        cu_seqlens_k: the same of k and v; None: that of q.
        max_seqlen, max_seqlen_k: length of the longest sequence; spares some engines a wait for the device.
        scale: factor of the logits; None: 1 / sqrt(D).
        softcap: c, to replace the scaled logits s by c * tanh(s / c).
        dropout_p: probability with which each weight is dropped (and the others scaled up), whatever the training mode.
        return_lse: return the natural logarithm of each row's softmax denominator too.
        backend: "auto" for the fastest engine that serves the call, or one of `BACKENDS`; see docs/engines.md.

    Returns: (B, H, N_q, D_v) in the dtype of q; with `return_lse` also (B, H, N_q), -inf for a row that sees nothing:
            float32, or float64 for tensors of float64.

    Raises:
        ValueError: tensors that do not fit together, an option out of range, or an unknown backend.
        BackendError: the named backend cannot serve the call; the reasons of all engines are listed.
    """
    q, k, v = follow_autocast(q, k, v)
    problem = make_problem(
        q,
        k,
        v,
        attn_mask=attn_mask,
        bias=bias,
        is_causal=is_causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen=max_seqlen,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )
    engine = select(describe(q, k, v, problem), backend)
    if q.is_cuda and q.shape[0] * q.shape[1] > GRID_LIMIT and q.shape[0] > (most := engine.largest_batch(q.shape[1])):
        out, lse = _run_in_parts(engine, q, k, v, problem, most)
    else:
        out, lse = engine.run(q, k, v, problem)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def _run_in_parts(engine: Engine, q: Tensor, k: Tensor, v: Tensor, problem: Problem, most: int) -> tuple[Tensor, Tensor | None]:
    """Groups of at most `most` samples, one after another; masks and biases that differ between samples go with them."""
    outputs, lses = [], []
    for start in range(0, q.shape[0], most):
        some = slice(start, start + most)
        mask, bias = (t if t is None or t.shape[0] == 1 else t[some] for t in (problem.attn_mask, problem.bias))
        out, lse = engine.run(q[some], k[some], v[some], problem._replace(attn_mask=mask, bias=bias))
        outputs.append(out)
        lses.append(lse)
    return torch.cat(outputs), torch.cat([lse for lse in lses if lse is not None]) if problem.return_lse else None


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each of them.

        lse = log(sum_i exp(lse_i))          out = sum_i exp(lse_i - lse) out_i

    Differentiable in the outputs and the normalisers. Computed in float32 (float64 stays float64). A set that a row sees nothing
    of (lse_i = -inf, out_i = 0) counts for nothing; a row that sees nothing in any set gives 0 and -inf, with finite gradients.

    Args:
        outputs: each (B, H, N, D_v), as `attention(..., return_lse=True)` returned them; or (B, H, S, L, D_v), N being S times L.
        lses: each (B, H, N), or (B, H, S, L).

    Returns: the like in the dtype of the outputs, and in that of the normalisers.

    Raises:
        ValueError: none given, different numbers of them, or shapes that do not agree.
    """
    _check_parts(outputs, lses)
    if _merges_in_one_pass(outputs, lses):
        return _merge_in_one_pass(outputs, lses)
    work = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(work) for lse in lses])  # (parts, B, H, N)
    top = parts.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(parts - top)
    total = weights.sum(0)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    merged = sum((w / total).unsqueeze(-1) * out.to(work) for w, out in zip(weights, outputs, strict=True))
    assert isinstance(merged, Tensor)
    lse = (top + torch.log(total)).masked_fill(dead, -torch.inf)
    return merged.to(outputs[0].dtype), lse.to(lses[0].dtype)


def _merges_in_one_pass(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether our kernel merges: on CUDA, by itself."""
    fits = len(outputs) <= 6 and outputs[0].ndim in (4, 5) and all(lse.dtype == torch.float32 for lse in lses)
    return outputs[0].is_cuda and fits and use_kernel("auto", tuple(outputs))


def _merge_in_one_pass(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from attention_zoo.ops.triton.merge import merge_attention_triton

    if outputs[0].ndim == 5:
        return merge_attention_triton(outputs, lses)
    out, lse = merge_attention_triton([out.unsqueeze(2) for out in outputs], [lse.unsqueeze(2) for lse in lses])
    return out.squeeze(2), lse.squeeze(2)


def _check_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(f"one log-normaliser for each output, and at least one; got {len(outputs)} outputs and {len(lses)}")
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outputs must share one shape (B, H, N, D_v) and log-normalisers be (B, H, N); got {tuple(out.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(outputs[0].shape)}"
            )
