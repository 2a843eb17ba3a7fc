"""What a mechanism's forward computes, counted from its settings alone."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import ops
from attention_zoo.attention.base import AttentionModule

__all__ = ["forward_flops"]


def forward_flops(module: AttentionModule, num_tokens: int, *, grid_size: tuple[int, int] | None = None) -> int | None:
    """FLOPs of a mechanism's forward on one sequence in evaluation mode, without running it on data.

    They are counted as `torch.utils.flop_counter` does on the engine "reference": two for each multiply-add of a matrix product or
    convolution, nothing for the rest. Every pair of tokens that is computed counts, also those that a mask or causality hides.

    Args:
        module: the mechanism; it is not touched.
        num_tokens: length of the sequence, class tokens included.
        grid_size: (H, W) of the patches, for spatial mechanisms.

    Returns: None for a mechanism whose forward depends on the values, so that it cannot be followed without them.

    Raises:
        ValueError: what the mechanism says of a sequence of this length, or of this grid.
    """
    memo = {id(t): _without_data(t) for t in (*module.parameters(), *module.buffers())}
    followed = copy.deepcopy(module, memo).eval()
    x = torch.empty(1, num_tokens, int(module.dim), device="meta")  # type: ignore[arg-type]
    inputs = {"grid_size": grid_size} if module.attention_info.spatial else {}
    try:
        with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
            followed(x, **inputs)
    except (NotImplementedError, RuntimeError):
        return None
    return int(counter.get_total_flops())


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """Its shape in single precision, which takes no memory."""
    meta = torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
