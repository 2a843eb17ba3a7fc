"""CSwin's attention in stripes as one node of autograd, and agent attention in one stripe, against their plain code."""

from __future__ import annotations

import importlib.util
from typing import Any

import kernel_case as kernels
import pytest
import torch
from kernel_case import DEVICE
from marks import slow_but
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def build(grid: tuple[int, int], learns: str = "everything", heads: int = 4, **options: Any) -> tuple[nn.Module, Tensor]:
    """A layer, and tokens for it."""
    layer = az.create_attention("agent_cswin", 8 * heads, heads, resolution=grid, **options).to(DEVICE)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(learns == "everything" or name in learns.split("|"))
    x = torch.randn(2, grid[0] * grid[1], 8 * heads, device=DEVICE)
    return layer, x.requires_grad_(learns in ("everything", "x"))


@pytest.mark.parametrize(
    ("grid", "options", "learns"),
    slow_but(
        4,
        [
            ((4, 6), {"split_size": 2}, "everything"),
            ((5, 7), {"split_size": 3, "qkv_bias": False}, "everything"),  # stripes that are not full
            ((3, 5), {"split_size": None}, "everything"),
            ((4, 6), {"split_size": 2}, "attns.1.get_v.weight|qkv.bias"),
            ((6, 6), {"split_size": 1}, "everything"),
            ((6, 7), {"split_size": 5, "scale": 0.3}, "attns.0.get_v.bias"),
            ((4, 6), {"split_size": 2}, "x"),
        ],
    ),
    ids=["paper", "filled up", "one stripe", "some parameters", "lines", "scale", "input only"],
)
def test_stripes_as_one_node(grid: tuple[int, int], options: dict[str, Any], learns: str) -> None:
    """Outputs and the gradients of what learns."""
    layer, x = build(grid, learns, use_agents=False, **options)
    kernels.check_one_node(layer, x, grid)


@pytest.mark.parametrize("options", [{}, {"agent_grid": (2, 2), "bias_grid": 3}], ids=["paper", "tables"])
def test_agents_as_one_node(options: dict[str, Any]) -> None:
    layer, x = build((4, 5), agent_num=4, **options)
    kernels.check_one_node(layer, x, (4, 5))


def test_agents_in_two_branches_are_not_one_node() -> None:
    """Not even where a branch has one stripe."""
    layer, x = build((4, 2), agent_num=4, split_size=2)
    outs = []
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            outs.append(layer(x, grid_size=(4, 2)))
    assert type(outs[1].grad_fn).__name__ != "_LayerBackward"
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_agents", [True, False])
def test_what_is_not_one_node(use_agents: bool) -> None:
    grid, own = (4, 6), {"agent_num": 4} if use_agents else {"split_size": 2}
    layer, x = build(grid, use_agents=use_agents, attn_drop=0.1, **own)
    layer.eval()

    def is_node(**options: Any) -> bool:
        with ops.use_backend("triton"):
            try:
                out = layer(x, **{"grid_size": grid, **options})
            except ops.BackendError as error:  # of plain attention our kernels serve little
                if "no kernel of ours" in str(error) or "no mask or bias tensor" in str(error):
                    return False
                raise
        return type(out.grad_fn).__name__ == "_LayerBackward"

    assert is_node()
    assert not is_node(attention_mask=torch.ones(2, 24, device=DEVICE) > 0)
    assert is_node(grid_size=(6, 4)) == (not use_agents)  # tables are resampled
    layer.train()
    with pytest.raises(ops.BackendError, match="dropout"):
        is_node()
    layer.eval()
    with kernels.looking_on():
        assert not is_node()
    for part in (layer.qkv, layer.attns[0], layer.attns[-1].get_v):
        handle = part.register_forward_hook(lambda *_: None)
        assert not is_node()
        handle.remove()
    assert is_node()
    if not use_agents:
        layer, x = build((9, 9), heads=2, use_agents=False, split_size=None)
        grid = (9, 9)
        assert not is_node()  # 81 cells are too many in float32


def test_without_gradients() -> None:
    layer, x = build((4, 6), use_agents=False, split_size=2)
    with torch.no_grad():
        with ops.use_backend("reference"):
            want = layer(x, grid_size=(4, 6))
        with ops.use_backend("triton"):
            torch.testing.assert_close(layer(x, grid_size=(4, 6)), want, atol=1e-4, rtol=1e-4)
            assert layer(x[:0], grid_size=(4, 6)).shape == (0, 24, 32)


def test_autocast() -> None:
    layer, x = build((4, 6), use_agents=False, split_size=2)
    leaves, found = [x, *layer.parameters()], []
    for enabled in (False, True):
        with ops.use_backend("triton"), torch.autocast(DEVICE, torch.float16, enabled=enabled):
            out = layer(x, grid_size=(4, 6))
        assert out.dtype == (torch.float16 if enabled else torch.float32)
        assert type(out.grad_fn).__name__ == "_LayerBackward"
        found.append((out.float(), *torch.autograd.grad(out.float().square().sum(), leaves)))
    for right, got in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert (got - right).norm() < 1e-2 * right.norm()


def test_half_precision() -> None:
    """Stripes of 98 cells, as the published models have them."""
    layer, x = build((14, 14), heads=2, use_agents=False, split_size=7)
    leaves = [x, *layer.parameters()]
    want = layer(x, grid_size=(14, 14))
    gradients = torch.autograd.grad(want.square().sum(), leaves)
    half, x = layer.half(), x.detach().half().requires_grad_()
    with ops.use_backend("triton"):
        got = half(x, grid_size=(14, 14))
    assert type(got.grad_fn).__name__ == "_LayerBackward"
    assert (got.float() - want).norm() < 5e-3 * want.norm()
    found = torch.autograd.grad(got.float().square().sum(), [x, *half.parameters()])
    for right, gradient in zip(gradients, found, strict=True):
        assert (gradient.float() - right).norm() < 1e-2 * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["agent_deit_t", "agent_pvt_t", "agent_swin_t", "agent_cswin_t"])
def test_models(name: str) -> None:
    """In bfloat16 as eager calls have it, against float32 by plain code."""
    model = az.create_model(name, num_classes=10).to(DEVICE).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("_bias"):  # tables that matter
            nn.init.normal_(parameter)
    x, found = torch.randn(4, 3, 224, 224, device=DEVICE), []
    with ops.use_backend("reference"):
        out = model(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    half = model.bfloat16()
    out = half(x.bfloat16())
    found.append((out, *torch.autograd.grad(out.float().square().sum(), list(half.parameters()))))
    for want, got in zip(*found, strict=True):
        assert got.isfinite().all()
        assert (got.float() - want.float()).norm() < 0.3 * want.float().norm() + 1e-3  # of sums that nearly cancel


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("agent", {"window_size": (14, 14), "num_prefix_tokens": 1}, 1),
        ("agent", {"window_size": (14, 14), "split_qkv": True}, 0),
        ("agent_cswin", {"resolution": (14, 14)}, 0),
        ("agent_cswin", {"resolution": (14, 14), "split_size": 7, "use_agents": False}, 0),
    ],
    ids=["class token", "split", "agents", "stripes"],
)
def test_in_cuda_graphs(name: str, options: dict[str, Any], prefix: int) -> None:
    layer = az.create_attention(name, 128, 4, **options, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8, prefix + 196, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    assert type(layer(x, grid_size=(14, 14)).grad_fn).__name__ == "_LayerBackward"
    kernels.check_graphed_callable(layer, x, grid_size=(14, 14))
