"""Mechanisms on a CUDA device: the same numbers as on the CPU, in low precision, and in one compiled graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_case import Case, cases
from torch import Tensor

pytestmark = pytest.mark.gpu

# Random in evaluation mode from the device's own generator: other numbers than the CPU's, so there is nothing to compare.
DEFAULTS = [c for causal in (False, True) for c in cases(causal=causal) if not c.draws]

# Other forms than the defaults, whose hot paths differ.
FORMS = [
    *(Case("combiner", True, {"pattern": p, "window_size": 8}) for p in ("fixed", "axial", "logsparse", "mixture")),
    *(Case("combiner", options={"pattern": p, "window_size": 37}) for p in ("axial", "mixture")),
    Case("cca", True, {"window_size": 8, "group_size": 4, "num_kv_heads": 2}),
    Case("diff", True, {"version": "v2"}),
    Case("gda", True, {"style": "v2", "num_noise_heads": 2}),
    Case("moh", True, {"router": "query_norm", "num_kv_heads": 2}),
    Case("bra", options={"n_win": 3, "topk": 2, "soft_routing": True}),
    Case("bra", options={"n_win": 3, "topk": 2, "pad_mode": "qkv"}),
    Case("halo", options={"block_size": 4, "halo_size": 1, "mask_padding": True}),
    Case("agent", options={"agent_num": 9, "window_size": (9, 7)}),
]
ALL = [*DEFAULTS, *FORMS]


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """No TF32 in convolutions, where torch allows it by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def output_and_gradient(case: Case, device: str, autocast: bool = False, compiled: bool = False) -> tuple[Tensor, Tensor]:
    module = case.build().to(device)
    x, kwargs = case.inputs(length=37, grid=(9, 7))
    x = x.to(device).requires_grad_()
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    call = torch.compile(module, fullgraph=True) if compiled else module
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = call(x, **kwargs)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach().cpu().float(), x.grad.cpu()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float32_equals_the_cpu(case: Case) -> None:
    for ours, right in zip(output_and_gradient(case, "cuda"), output_and_gradient(case, "cpu"), strict=True):
        torch.testing.assert_close(ours, right, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_bfloat16_is_as_near_as_on_the_cpu(case: Case) -> None:
    """Low precision costs about the same on both: routed mechanisms may choose otherwise, so most elements are asked for."""
    exact = output_and_gradient(case, "cpu")
    on_cpu, on_gpu = output_and_gradient(case, "cpu", autocast=True), output_and_gradient(case, "cuda", autocast=True)
    for right, cpu, gpu in zip(exact, on_cpu, on_gpu, strict=True):
        budget = 2 * (cpu - right).abs().mean() + 1e-3 * right.abs().mean()
        assert (gpu - right).abs().mean() <= budget


@pytest.mark.parametrize("case", ALL, ids=str)
def test_compiles_in_one_graph(case: Case) -> None:
    for ours, right in zip(output_and_gradient(case, "cuda", compiled=True), output_and_gradient(case, "cuda"), strict=True):
        torch.testing.assert_close(ours, right, atol=2e-4, rtol=2e-4)
