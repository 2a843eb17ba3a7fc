"""xformers' `memory_efficient_attention`: flash and CUTLASS kernels. It alone takes packed float32, dropout and large heads, fused.

Its CUTLASS kernels want a bias whose rows start at multiples of 16 bytes; we pad. Dynamo cannot trace its choice of kernels, so a
compiled graph holds `attention_zoo::xformers`. Written against 0.0.35.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops._problem import Problem
from attention_zoo.ops.engines.base import HALF, Engine, Signature, compute_capability, join_masks
from attention_zoo.ops.engines.flash23 import longest

__all__ = ["XformersEngine"]


class XformersEngine(Engine):
    name = group = "xformers"
    package = "xformers"
    module = "xformers"

    def load(self) -> str | None:
        logger = logging.getLogger("xformers")
        level = logger.level
        with warnings.catch_warnings(), _without_namespace_flash_attn():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL)  # what it would log is the reason that we return
            try:
                importlib.import_module("xformers.ops.fmha")
            finally:
                logger.setLevel(level)
        library = importlib.import_module("xformers._cpp_lib")
        if (error := library._cpp_library_load_exception) is not None:
            return "has no operators: " + " ".join(str(error).split())[:200]
        if not library._built_with_cuda:
            return "was built without CUDA"
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def can_run(self, signature: Signature) -> str | None:
        s = signature
        if s.device.type != "cuda":
            return "serves CUDA tensors only"
        if not s.half and s.dtype != torch.float32:
            return "serves float16, bfloat16 and float32 only"
        if s.softcap:
            return "has no softcap"
        if s.empty:
            return "empty sizes are left to the reference"
        multiple = 8 if s.half else 4
        if s.head_dim % multiple or s.value_dim % multiple:
            return f"head sizes must be multiples of {multiple} in {s.dtype}"
        flash = _flash_kernel(s.half, s.head_dim, s.value_dim, s.mapped)
        capability = compute_capability(s.device)
        if capability < 80 or (not flash and capability > 90):
            return "its kernels for this call need compute capability 8.0 to 9.0"
        return self._gradients(s) or (self._packed(s, flash) if s.packed else self._dense(s, flash))

    def _gradients(self, s: Signature) -> str | None:
        if s.lse and s.grad:
            return "its log-normaliser carries no gradient"
        if s.lse and s.dropout:
            return "returns no log-normaliser with dropout"
        if s.map_grad and not s.grad:
            return "has a gradient for the bias only together with q, k or v"
        if s.grouped and s.grad:
            return "has no backward with shared key/value heads"
        if s.grouped and s.mapped:
            return "takes no mask tensor with shared key/value heads"
        return None

    def _packed(self, s: Signature, flash: bool) -> str | None:
        if s.mapped:
            return "takes no mask tensor in a packed batch"
        if s.packed == "cross":
            return "packed queries without a key cannot be ruled out when keys have offsets of their own"
        if s.lse:
            return "returns no log-normaliser of a packed batch"
        if s.windowed and not (flash and s.left and s.zero_right):
            return "windows in a packed batch are causal, in float16 and bfloat16 with head sizes up to 256"
        return None

    def _dense(self, s: Signature, flash: bool) -> str | None:
        if s.mapped:
            return None  # causality and window go into the tensor
        if s.right and s.lengths == "more":
            return "leaves queries without a key undefined"
        if s.left and s.lengths == "more":
            return "leaves queries without a key undefined"
        if s.windowed and not flash:
            return "windows are for float16 and bfloat16 with head sizes up to 256"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        mask = dead = None
        if problem.attn_mask is not None or problem.bias is not None:
            mask, dead = join_masks(q, problem)
            assert mask is not None
            mask = _padded(mask, q, k)
        left, right = (None, None) if mask is not None else problem.window
        longest_sequence = 0
        if problem.cu_seqlens_q is not None:
            longest_sequence = longest(problem.cu_seqlens_q, problem.max_seqlen_q, problem.num_queries)
        call = _compiled if torch.compiler.is_compiling() else _eager
        out, lse = call(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            problem.cu_seqlens_q,
            longest_sequence,
            -1 if left is None else left,
            -1 if right is None else right,
            problem.dropout_p,
            problem.scale,
            problem.return_lse,
        )
        out = out.transpose(1, 2)
        if dead is not None:
            out = out.masked_fill(dead, 0.0)
            lse = None if lse is None else lse.masked_fill(dead.squeeze(-1), -torch.inf)
        return out, lse


@contextmanager
def _without_namespace_flash_attn() -> Iterator[None]:
    """Hide `flash_attn` while it is only flash-attn 4's namespace package: xformers would take it for flash-attn 2 and fail."""
    try:
        hide = importlib.util.find_spec("flash_attn.flash_attn_interface") is None
    except Exception:  # flash-attn 2 is half installed: xformers can do without it
        hide = True
    if not hide:
        yield
        return
    missing = object()
    modules: dict[str, Any] = sys.modules
    before = modules.get("flash_attn", missing)
    modules["flash_attn"] = None  # how Python marks a module that must not be found
    try:
        yield
    finally:
        if before is missing:
            modules.pop("flash_attn", None)
        else:
            modules["flash_attn"] = before


def _flash_kernel(half: bool, head_dim: int, value_dim: int, mapped: bool) -> bool:
    """Whether its flash kernel serves the call; the CUTLASS one otherwise."""
    return half and head_dim == value_dim and head_dim <= 256 and not mapped


def _padded(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as additive (B, H, N_q, N_k) in q's dtype, each row aligned, without copying it over batch or heads."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    num_keys = k.shape[2]
    mask = F.pad(mask, (0, -num_keys % 8)).contiguous()[..., :num_keys]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], num_keys)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, longest_sequence: int, left: int, right: int
) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """q, k, v, attn_bias and the pair of operators, as xformers wants them. Layout (B, N, H, D)."""
    from xformers.ops import fmha

    q, k, v = (_aligned(t) for t in (q, k, v))
    flash = _flash_kernel(q.dtype in HALF, q.shape[-1], v.shape[-1], mask is not None)
    operators = (fmha.flash.FwOp, fmha.flash.BwOp) if flash else (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
    bias = mask if mask is not None else _structure(q, k, cu_seqlens, longest_sequence, left, right)
    if q.shape[2] != k.shape[2]:  # (B, N, H_kv, G, D), keys and values shared by stride
        q = q.unflatten(2, (k.shape[2], -1))
        k, v = (t.unsqueeze(3).expand(-1, -1, -1, q.shape[3], -1) for t in (k, v))
    return q, k, v, bias, operators


def _aligned(x: Tensor) -> Tensor:
    """Rows that are contiguous and start at multiples of 16 bytes, as the kernels want them."""
    return x if x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]) else x.contiguous()


def _structure(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, longest_sequence: int, left: int, right: int) -> Any:
    from xformers.ops.fmha import attn_bias

    num_queries, num_keys = q.shape[1], k.shape[1]
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(torch.int32)
        # the Python list is what its checks read; the kernels read the tensor, so the device need not be waited for
        sequences = attn_bias._SeqLenInfo(seqstart=offsets, max_seqlen=longest_sequence, min_seqlen=0, seqstart_py=[0, num_queries])
        if left >= 0:
            return attn_bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask(
                q_seqinfo=sequences, k_seqinfo=sequences, _window_size=left + 1
            )
        kind = attn_bias.BlockDiagonalMask if right < 0 else attn_bias.BlockDiagonalCausalMask
        return kind(q_seqinfo=sequences, k_seqinfo=sequences)
    if left < 0 and right < 0:
        return None
    if left < 0 and right == 0:
        return attn_bias.LowerTriangularMask() if num_queries == num_keys else attn_bias.LowerTriangularFromBottomRightMask()
    if right == 0:
        return attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=left + 1)
    return attn_bias.LocalAttentionFromBottomRightMask(
        window_left=num_keys if left < 0 else left, window_right=num_keys if right < 0 else right
    )


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest_sequence: int,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    from xformers.ops import fmha

    num_queries, heads = q.shape[1], q.shape[2]
    q, k, v, bias, operators = _arguments(q, k, v, mask, cu_seqlens, longest_sequence, left, right)
    if not return_lse:
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale, op=operators)
        return out.reshape(*out.shape[:2], heads, -1), None
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias, scale=scale, op=operators[0])
    return out.reshape(*out.shape[:2], heads, -1), lse.reshape(lse.shape[0], heads, -1)[..., :num_queries]


def _compiled(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    *settings, return_lse = arguments
    out, lse, _, _ = _forward(q, k, v, *settings)
    return out, lse[..., : q.shape[1]] if return_lse else None


@torch.library.custom_op("attention_zoo::xformers", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest_sequence: int,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, H, D_v), log-normaliser as the kernel pads it, and the two halves of the random state."""
    from xformers.ops import fmha

    heads = q.shape[2]
    q, k, v, bias, operators = _arguments(q, k, v, mask, cu_seqlens, longest_sequence, left, right)
    if dropout_p > 0:
        operators = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)  # the one whose random state is two tensors of known type
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias, p=dropout_p, scale=scale)
    out, context = fmha._memory_efficient_attention_forward_requires_grad(inputs, op=operators[0])
    seed, offset = (t.cpu() for t in context.rng_state) if dropout_p > 0 else _no_state()
    out = out.reshape(*out.shape[:2], heads, -1).contiguous()
    return out, context.lse.reshape(context.lse.shape[0], heads, -1).contiguous(), seed, offset


def _no_state() -> tuple[Tensor, Tensor]:
    return torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest_sequence: int,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_queries, heads, _ = q.shape
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    flash = _flash_kernel(q.dtype in HALF, q.shape[-1], v.shape[-1], mask is not None) and dropout_p == 0
    if flash:
        lse_shape = (batch, heads, num_queries)
    elif cu_seqlens is None:
        lse_shape = (batch, heads, (num_queries + 31) // 32 * 32)
    else:
        lse_shape = (cu_seqlens.shape[0] - 1, heads, (longest_sequence + 31) // 32 * 32)
    return out, q.new_empty(lse_shape, dtype=torch.float32), *_no_state()


@torch.library.custom_op("attention_zoo::xformers_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    mask_grad: bool,
    cu_seqlens: Tensor | None,
    longest_sequence: int,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the mask (empty when it needs none)."""
    from xformers.ops import fmha

    if mask is not None and mask_grad:
        mask = mask.detach().requires_grad_()
    q, k, v, bias, operators = _arguments(q, k, v, mask, cu_seqlens, longest_sequence, left, right)
    if dropout_p > 0:
        operators = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
    context = fmha.Context(lse=lse, out=out, rng_state=(seed, offset) if dropout_p > 0 else None)
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias, p=dropout_p, scale=scale)
    gradients = fmha._memory_efficient_attention_backward(context, inputs, grad_out.contiguous(), operators[1])
    grad_mask = q.new_empty(0) if gradients.db is None else gradients.db.contiguous()
    return gradients.dq.contiguous(), gradients.dk.contiguous(), gradients.dv.contiguous(), grad_mask


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    mask_grad: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mask = mask.new_empty(mask.shape) if mask is not None and mask_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, cu_seqlens, *ctx.settings = inputs
    ctx.mask_grad = mask is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens)


def _gradient(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, seed, offset, mask, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, grad_mask = _backward(grad_out, q, k, v, out, lse, seed, offset, mask, ctx.mask_grad, cu_seqlens, *ctx.settings)
    return dq, dk, dv, grad_mask if ctx.mask_grad else None, None, *(None,) * len(ctx.settings)


_forward.register_autograd(_gradient, setup_context=_setup_context)
