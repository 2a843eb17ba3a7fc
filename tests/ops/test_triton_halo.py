"""Halo attention as one node of autograd with its projections, against the plain code, and what stays several operations."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from kernel_case import DEVICE, looking_on
from marks import slow_but
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def build(**options: Any) -> Any:
    options = {"block_size": 2, "halo_size": 1, "mask_padding": True, **options}
    layer = az.create_attention("halo", 16, 2, **options, device=DEVICE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def check(layer: Any, x: Tensor, **inputs: Any) -> None:
    """Outputs and the gradients of what learns; nothing else gets one."""
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    results = []
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            out = layer(x, **inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    nodes, seen = [out.grad_fn], []
    while nodes:
        node = nodes.pop()
        seen.append(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert "_LayerBackward" in seen
    assert "ConvolutionBackward0" not in seen
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=2e-5 * max(1.0, float(want.detach().abs().max())), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "grid", "learns"),
    slow_but(
        6,
        [
            ({}, (4, 6), "everything"),
            ({"qkv_bias": True, "out_proj": False, "qk_ratio": 0.5, "halo_size": 2}, (3, 5), "everything"),
            ({"qkv_bias": True, "scale_pos_embed": True, "dim_out": 32, "mask_padding": False}, (4, 2), "everything"),
            ({"qkv_bias": True}, (2, 4), "x"),
            ({"qkv_bias": True}, (2, 4), "kv.bias|pos_embed.width_rel"),
            ({}, (2, 4), "proj.weight|proj.bias"),
            ({}, (2, 4), "q.weight"),
            ({"out_proj": False}, (2, 4), "x"),
            ({"block_size": 9, "halo_size": 2, "head_dim": 24}, (10, 8), "everything"),
        ],
    ),
    ids=["paper", "padded", "scaled", "input only", "some parameters", "output only", "one weight", "no projection", "large"],
)  # fmt: skip
def test_the_layer_as_one_node(
    options: dict[str, Any], grid: tuple[int, int], learns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention_zoo.ops.triton.halo._KEPT_BYTES", 2**13)  # heads a few at a time
    layer = build(**options)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(learns == "everything" or name in learns.split("|"))
    x = torch.randn(3, grid[0] * grid[1], 16, device=DEVICE, requires_grad=learns in ("everything", "x"))
    check(layer, x, grid_size=grid)


@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_are_tokens(channels_last: bool) -> None:
    """In any layout; the output lies as other ways leave it."""
    layer, x = build(qkv_bias=True), torch.randn(2, 16, 4, 6, device=DEVICE)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    check(layer, x)
    with ops.use_backend("reference"):
        want = layer(x)
    with ops.use_backend("triton"):
        assert layer(x).stride() == want.stride()


def test_no_samples() -> None:
    layer, x = build(), torch.randn(0, 8, 16, device=DEVICE, requires_grad=True)
    with ops.use_backend("triton"):
        out = layer(x, grid_size=(2, 4))
    assert type(out.grad_fn).__name__ == "_LayerBackward"
    for gradient in torch.autograd.grad(out.sum(), list(layer.parameters())):
        assert not gradient.any()


def test_what_is_not_one_node() -> None:
    x = torch.randn(2, 16, 16, device=DEVICE)

    def node(layer: Any) -> str:
        with ops.use_backend("triton"):
            return type(layer(x, grid_size=(4, 4)).grad_fn).__name__

    for options in ({"stride": 2}, {"stride": 2, "avg_down": True}):
        assert node(build(**options)) != "_LayerBackward"
    layer = build()
    bare = build(out_proj=False)
    for owner, part in ((layer, layer.q), (layer, layer.kv), (layer, layer.proj), (bare, bare.proj)):
        assert node(owner) == "_LayerBackward"
        handle = part.register_forward_hook(lambda *_: None)
        assert node(owner) != "_LayerBackward"
        handle.remove()
    with looking_on() as calls:
        assert node(layer) != "_LayerBackward"
    assert len(calls) == 1
    with ops.use_backend("triton"), pytest.raises(ValueError, match="do not divide"):
        build(mask_padding=False)(x[:, :15], grid_size=(3, 5))
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="dropout"):
        build(attn_drop=0.5)(x, grid_size=(4, 4))
