"""Autocast, which torch does not know of meta tensors."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["no_autocast"]


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which operations on the device of `x` keep the dtypes that they are given."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
