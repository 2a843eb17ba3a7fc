"""cuDNN's dense attention called as such, forward and backward, for operators of ours that surround it with kernels.

Through torch's SDPA autograd would stand between the two: it splits, adds up and copies gradients, one small kernel each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.ops.engines.base import GRID_LIMIT, HALF, compute_capability

__all__ = ["WIDEST", "dense_backward", "dense_forward", "dense_work", "serves", "with_heads_last"]

WIDEST = 128  # channels of values up to which the backward is at its best


def serves(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> bool:
    """Whether cuDNN has kernels for q (B, H, N, D), k (B, H_kv, M, D), v (B, H_kv, M, D_v), and for heads cut out of them.

    Its causal queries start at the first key. Values of another width than the keys were tried on Hopper only.
    """
    if not (q.is_cuda and q.dtype in HALF and q.dtype == k.dtype == v.dtype) or torch.are_deterministic_algorithms_enabled():
        return False
    (batch, _, tokens, dim), (keys, dim_v) = q.shape, v.shape[2:]
    places = (90, 100) if dim == dim_v else (90,)
    return (
        compute_capability(q.device) in places
        and dim % 8 == 0
        and dim <= 128
        and dim_v % 8 == 0
        and dim_v <= 256
        and 0 < batch <= GRID_LIMIT
        and tokens * keys > 0
        and (not is_causal or tokens == keys)
        and all(_is_aligned(t) for t in (q, k, v))
    )


def _is_aligned(x: Tensor) -> bool:
    """Rows without gaps between channels, in steps of 16 bytes."""
    return x.stride(3) == 1 and all(step % 8 == 0 for step in x.stride()[:3])


def dense_work(batch: int, heads: int, tokens: int, keys: int, dim: int, is_causal: bool) -> int:
    """B H N M D, halved by causality: by how many numbers a call's time grows."""
    return batch * heads * tokens * keys * dim // (2 if is_causal else 1)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, D_v), and if `keep` log-normalisers (B, H, N, 1), else an empty tensor.

    Strides are torch's choice, also of tensors without data: without gaps, dimensions in the order in which q has them.
    """
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, keep, 0.0, is_causal, False, scale=scale)
    return out, lse if keep else q.new_empty((0,), dtype=torch.float32)


def with_heads_last(out: Tensor) -> Tensor:
    """Outputs (B, H, N, D_v) of an SDPA, whose gradient will come to it with heads next to channels, whatever it is made by."""
    if out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(lambda grad: grad.transpose(1, 2).contiguous().transpose(1, 2))
    return out


def dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each without gaps, dimensions in the order in which the tensor has them.

    v, out and grad may be some of the channels: gradients of q and k are sums over all of them.

    torch keeps cuDNN's plans by the sizes and strides of q, k and v, only its latest releases by those of `out` and `grad` too: all
    that comes here or through SDPA with q, k and v of some strides must have `out` and `grad` of the same strides each time, or the
    gradients are wrong. `grad` therefore has heads next to channels, as from a projection of the outputs; see `with_heads_last`.
    """
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random numbers
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, lse, unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, is_causal, scale=scale
    )
