"""torch's fused attention kernels called as such, forward and backward, for functions of ours that write out their gradients.

Which one, SDPA says. `_cudnn.py` is the same for cuDNN alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from attention_zoo.ops import _cudnn
from attention_zoo.ops.engines.base import GRID_LIMIT, HALF, compute_capability, is_grouped
from attention_zoo.ops.engines.sdpa import cudnn_first, cudnn_late

__all__ = ["fused_backward", "fused_forward", "fused_kernel", "preferences"]

_NAMES = {
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
}


def preferences() -> tuple[bool, ...]:
    """What `fused_kernel` depends on besides the tensors: torch's settings."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def fused_kernel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str | None:
    """Name of the kernel that SDPA, as the torch engine calls it, takes for q (B, H, N, D), k and v (B, H_kv, M, D); None: none."""
    dim, grouped = q.shape[3], is_grouped(q, k)
    if not q.numel() or not k.numel() or q.shape[0] > GRID_LIMIT or (is_causal and q.shape[2] != k.shape[2]):
        return None
    order: AbstractContextManager[None] = nullcontext()
    if q.is_cuda and q.dtype in HALF and compute_capability(q.device) >= 90:
        order = cudnn_first() if q.shape[2] > 1 else cudnn_late()
    with order:
        found = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=None, enable_gqa=grouped)
    name = _NAMES.get(found)
    if q.device.type == "cpu":
        return "cpu" if name == "flash" and not grouped else None
    if not q.is_cuda or (name == "flash" and dim % 8) or (name == "efficient" and grouped):  # SDPA itself adds channels, or heads
        return None
    return name


def fused_forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, H, N, D) of the kernel, and what else its backward needs, if `keep`."""
    aten = torch.ops.aten
    if name == "cudnn":
        return _cudnn.dense_forward(q, k, v, scale=scale, is_causal=is_causal, keep=keep)
    if name == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    elif name == "efficient":
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, keep, 0.0, is_causal, scale=scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, lse


def fused_backward(
    name: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, channels of a head side by side. `grad` lies as `out` does, see `_cudnn.dense_backward`."""
    aten = torch.ops.aten
    if name == "cudnn":
        return _cudnn.dense_backward(grad, q, k, v, out, lse, scale=scale, is_causal=is_causal)
    if name == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random numbers
    if name == "flash":
        return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, unused, unused, scale=scale
        )
    found = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False], is_causal, scale=scale
    )
    return found[:3]  # type: ignore[no-any-return]
