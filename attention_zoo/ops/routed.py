"""Attention between regions as a function of tensors: each query region sees the key regions that a router chose for it.

In plain PyTorch the chosen keys and values are gathered, and every query region is then a sample of its own to `attention`, on
whichever engine serves that. It is the specification of the kernel of `triton/routed.py`, which reads the regions where they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops._autocast import no_autocast
from attention_zoo.ops._kernels import use_kernel
from attention_zoo.ops._tap import tapped
from attention_zoo.ops.attention import attention, attention_weights, merge_attention
from attention_zoo.ops.dispatch import follow_autocast

__all__ = ["routed_attention"]


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    route_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Probabilities (B, H, R, n, P + K m) of a call of `routed_attention`."""
    keys, values, mask = _expand(q, k, v, routes, route_weights, key_mask, shared_k, shared_v)
    found = attention_weights(q.transpose(1, 2).flatten(0, 1), keys, values, attn_mask=mask, scale=scale)
    return found.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@tapped(_weights)
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    route_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends to the tokens of the K regions that its own region is routed to, the same for all heads.

        out(r, i) = softmax_{j in routes(r), t}(scale * q(r, i) . w(r, j) k(j, t)) w(r, j) v(j, t)

    The order of a region's routes does not matter. A query that may see nothing gives 0, with finite gradients. Memory for the
    gathered tensors: K times the tokens of a region for each query region.

    Args:
        q: (B, H, R, n, D), n tokens in each of R query regions.
        k: (B, H_kv, R_k, m, D), H a multiple of H_kv.
        v: (B, H_kv, R_k, m, D_v).
        routes: int64 (B, R, K), numbers of key regions, below R_k (not checked).
        route_weights: w, (B, R, K): keys and values of a region both count times its weight. None: 1.
        key_mask: boolean (R_k, m) or (B, R_k, m), True = a token that may be attended to.
        shared_k: (B, H_kv, P, D), keys that every query sees besides, without weights.
        shared_v: (B, H_kv, P, D_v), their values.
        scale: factor of the logits; None: 1 / sqrt(D).
        dropout_p: probability with which each attention weight is dropped (and the others scaled up).
        return_lse: return the natural logarithm of each query's softmax denominator too.
        backend: "triton" for our kernel; "auto" takes it on CUDA, where it serves the call; any other as for `attention`.

    Returns: (B, H, R, n, D_v) in the dtype of q; with `return_lse` also (B, H, R, n) float32.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the named backend cannot serve the call.
    """
    q, k, v = follow_autocast(q, k, v)
    if use_kernel(backend, (q, k, v), dropout_p=dropout_p):
        out, lse = _run_kernel(q, k, v, routes, route_weights, key_mask, shared_k, shared_v, scale)
        return (out, lse) if return_lse else out
    keys, values, mask = _expand(q, k, v, routes, route_weights, key_mask, shared_k, shared_v)
    batch, _, regions = q.shape[:3]
    queries = q.transpose(1, 2).flatten(0, 1)  # (B R, H, n, D): a query region is a sample
    result = attention(
        queries, keys, values, attn_mask=mask, scale=scale, dropout_p=dropout_p, return_lse=return_lse, backend=backend
    )
    if isinstance(result, Tensor):
        return result.unflatten(0, (batch, regions)).transpose(1, 2)
    out, lse = (t.unflatten(0, (batch, regions)).transpose(1, 2) for t in result)
    return out, lse


def _run_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    route_weights: Tensor | None,
    key_mask: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The kernel attends to the routed tokens; shared ones are joined to its result."""
    from attention_zoo.ops.triton.routed import routed_attention_triton

    _check(q, k, v, routes, route_weights, key_mask, shared_k, shared_v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q):
        out, lse = routed_attention_triton(q, k, v, routes, route_weights=route_weights, key_mask=key_mask, scale=factor)
        if shared_k is None or shared_v is None:
            return out, lse
        extra = attention(q.flatten(2, 3), shared_k.to(q.dtype), shared_v.to(q.dtype), scale=factor, return_lse=True)
        joined = merge_attention([out.flatten(2, 3), extra[0]], [lse.flatten(2, 3), extra[1]])
        return joined[0].unflatten(2, q.shape[2:4]), joined[1].unflatten(2, q.shape[2:4])


def _expand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    route_weights: Tensor | None,
    key_mask: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What every query region sees, shared keys first: keys and values (B R, H_kv, P + K m, D), and the mask over them or None."""
    _check(q, k, v, routes, route_weights, key_mask, shared_k, shared_v)
    batch, _, regions = q.shape[:3]
    keys, values = (_gather(t, routes, route_weights) for t in (k, v))  # (B R, H_kv, K m, D)
    mask = None
    if key_mask is not None:
        rows = torch.arange(batch, device=routes.device)[:, None, None]
        mask = key_mask[routes] if key_mask.ndim == 2 else key_mask[rows, routes]  # (B, R, K, m)
        mask = mask.flatten(0, 1).flatten(1)[:, None, None, :]
    if shared_k is not None and shared_v is not None:
        keys, values = (
            torch.cat([shared.unsqueeze(1).expand(-1, regions, -1, -1, -1).flatten(0, 1), own], dim=2)
            for shared, own in ((shared_k, keys), (shared_v, values))
        )
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], 1, 1, shared_k.shape[2]), mask], dim=-1)
    return keys, values, mask


def _gather(x: Tensor, routes: Tensor, route_weights: Tensor | None) -> Tensor:
    """The routed regions of x (B, H, R_k, m, D), side by side: (B * R, H, K * m, D)."""
    batch, regions, number = routes.shape
    rows = x.permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B R_k, m, H, D): whole regions are copied, all heads together
    first = torch.arange(batch, device=routes.device) * x.shape[2]
    picked = rows.index_select(0, (routes + first[:, None, None]).flatten())
    if route_weights is not None:
        picked = picked * route_weights.flatten()[:, None, None, None].to(picked.dtype)
    return picked.unflatten(0, (batch * regions, number)).flatten(1, 2).transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    route_weights: Tensor | None,
    key_mask: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
) -> None:
    """Raise ValueError for what `attention` would not see or would name by other shapes."""
    if (
        not q.ndim == k.ndim == v.ndim == 5
        or k.shape[:-1] != v.shape[:-1]
        or q.shape[0] != k.shape[0]
        or q.shape[-1] != k.shape[-1]
    ):
        raise ValueError(
            "q must be (B, H, R, n, D), k (B, H_kv, R_k, m, D) and v (B, H_kv, R_k, m, D_v); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if routes.ndim != 3 or routes.shape[:2] != (q.shape[0], q.shape[2]) or routes.dtype != torch.int64:
        raise ValueError(
            f"routes must be int64 (B, R, K) = {(q.shape[0], q.shape[2], 'K')}, got {routes.dtype} {tuple(routes.shape)}"
        )
    if route_weights is not None and route_weights.shape != routes.shape:
        raise ValueError(f"route_weights must be shaped as routes, {tuple(routes.shape)}; got {tuple(route_weights.shape)}")
    per_region = tuple(k.shape[2:4])
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape not in (per_region, (q.shape[0], *per_region))):
        raise ValueError(
            f"key_mask must be boolean {per_region} or {(q.shape[0], *per_region)}, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if (shared_k is None) != (shared_v is None):
        raise ValueError("shared_k and shared_v go together: give both or neither")
    for name, shared, own in (("shared_k", shared_k, k), ("shared_v", shared_v, v)):
        if shared is not None and (shared.ndim != 4 or shared.shape[:2] != own.shape[:2] or shared.shape[-1] != own.shape[-1]):
            wanted = (*own.shape[:2], "P", own.shape[-1])
            raise ValueError(f"{name} must be (B, H_kv, P, D) = {wanted}, got {tuple(shared.shape)}")
