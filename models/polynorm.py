"""PolyNorm, the activation of Motif's MLPs: a weighted sum of the normalised first three powers.

Motif 2.6B Technical Report, arXiv 2508.09148, 2025, after Polynomial Composition Activations, arXiv 2411.03884, 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PolyNorm"]


class PolyNorm(nn.Module):
    """w_0 n(z^3) + w_1 n(z^2) + w_2 n(z) + b,  n(u) = u / sqrt(mean(u^2) + eps) over the last dimension.

    The cubic term comes first, as in Motif's checkpoints. Weights start at 1/3, the bias at 0; computed in float32.

    Args:
        eps: added to the mean square.

    Shape: (..., C) -> (..., C).
    """

    def __init__(self, eps: float = 1e-6, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(3, **factory))
        self.bias = nn.Parameter(torch.empty(1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        cubic, square, linear = (self._normalise(z**power) for power in (3, 2, 1))
        out: Tensor = self.weight[0] * cubic + self.weight[1] * square + self.weight[2] * linear + self.bias
        return out.to(x.dtype)

    def _normalise(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
