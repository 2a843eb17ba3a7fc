"""Deformable token merging against loops, torchvision's operator and finite differences; its invariants and errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

import attention_zoo as az
from attention_zoo.attention import DeformableTokenMerging

F64 = torch.float64


def build(dim: int = 3, out_dim: int = 4, offsets: float = 1.5, dtype: torch.dtype = F64) -> DeformableTokenMerging:
    module: DeformableTokenMerging = az.create_attention("dtm", dim=dim, out_dim=out_dim, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(module.conv.conv_offset.weight, std=offsets / math.sqrt(4 * dim))
    nn.init.normal_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2)
    return module.eval()


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height, width))


def bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """Value of (C, H, W) at a point; every corner outside counts 0."""
    _, height, width = image.shape
    total, y0, x0 = torch.zeros(image.shape[0], dtype=image.dtype), math.floor(y), math.floor(x)
    for i, j in itertools.product((y0, y0 + 1), (x0, x0 + 1)):
        if 0 <= i < height and 0 <= j < width:
            total += (1 - abs(y - i)) * (1 - abs(x - j)) * image[:, i, j]
    return total


def by_loops(m: DeformableTokenMerging, x: Tensor, height: int, width: int) -> Tensor:
    image = as_map(x, height, width)
    offsets = F.conv2d(image, m.conv.conv_offset.weight, m.conv.conv_offset.bias, stride=2)
    merged = torch.zeros(len(x), m.out_dim, height // 2, width // 2, dtype=x.dtype)
    for b, i, j in itertools.product(range(len(x)), range(height // 2), range(width // 2)):
        merged[b, :, i, j] = m.conv.bias
        for ky, kx in itertools.product(range(2), range(2)):
            dy, dx = offsets[b, 2 * (2 * ky + kx) :, i, j][:2].tolist()
            merged[b, :, i, j] += m.conv.weight[:, :, ky, kx] @ bilinear(image[b], 2 * i + ky + dy, 2 * j + kx + dx)
    normed = F.batch_norm(merged, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)
    return F.gelu(normed).flatten(2).transpose(1, 2)


@given(height=st.integers(2, 7), width=st.integers(2, 7), batch=st.integers(1, 3), offsets=st.sampled_from([0.3, 1.5, 6.0]))
def test_against_loops(height: int, width: int, batch: int, offsets: float) -> None:
    module, x = build(offsets=offsets), torch.randn(batch, height * width, 3, dtype=F64)
    with torch.no_grad():
        got = module(x, grid_size=(height, width))
        torch.testing.assert_close(got, by_loops(module, x, height, width), atol=1e-10, rtol=0)


@given(height=st.integers(2, 9), width=st.integers(2, 9), batch=st.integers(1, 5))
def test_gradients_against_torchvision(height: int, width: int, batch: int) -> None:
    """Outputs and all gradients of the convolution, which torchvision's operator with stride 2 defines."""
    conv = build().conv
    x = torch.randn(batch, 3, height, width, dtype=F64, requires_grad=True)
    results = []
    for out in (conv(x), deform_conv2d(x, conv.conv_offset(x), conv.weight, conv.bias, stride=2).flatten(2).transpose(1, 2)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append([out, *torch.autograd.grad((out * cotangent).sum(), [x, *conv.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("mode", "grid"), [("eval", (2, 2)), ("eval", (4, 4)), ("eval", (5, 3)), ("train", (4, 4))])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_gradient_of_one_sample(mode: str, grid: tuple[int, int], layout: str) -> None:
    """A batch of one, whatever the memory layout of the incoming gradient: torch's own batch normalisation is wrong for some."""
    module = build(dim=2, out_dim=3).train(mode == "train")
    x = torch.randn(1, grid[0] * grid[1], 2, dtype=F64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        out: Tensor = module(x, grid_size=grid)
        return out if layout == "tokens" else out.transpose(1, 2).contiguous()

    assert torch.autograd.gradcheck(function, (x,))


def test_starts_as_a_plain_convolution() -> None:
    module = az.create_attention("dtm", dim=3).eval()
    assert all(not p.any() for p in module.conv.conv_offset.parameters())
    assert module.out_dim == 6
    x = torch.randn(2, 7 * 6, 3)
    plain = F.gelu(module.norm(F.conv2d(as_map(x, 7, 6), module.conv.weight, module.conv.bias, stride=2)))
    torch.testing.assert_close(module(x, grid_size=(7, 6)), plain.flatten(2).transpose(1, 2))


def test_offsets_of_one_row_shift_the_image() -> None:
    module = build()
    x = torch.randn(2, 6 * 4, 3, dtype=F64)
    with torch.no_grad():
        module.conv.conv_offset.weight.zero_()
        module.conv.conv_offset.bias.zero_()
        shifted = module(F.pad(x, (0, 0, 0, 4))[:, 4:], grid_size=(6, 4))  # the next row in every cell, zeros below the last
        module.conv.conv_offset.bias[0::2] = 1
        torch.testing.assert_close(module(x, grid_size=(6, 4)), shifted)


def test_statistics_are_those_of_the_map() -> None:
    module = build(dtype=torch.float32).train()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(module.norm.state_dict())
    x = torch.randn(3, 6 * 4, 3)
    merged = as_map(module.conv(as_map(x, 6, 4)), 3, 2)
    torch.testing.assert_close(module(x, grid_size=(6, 4)), F.gelu(plain(merged)).flatten(2).transpose(1, 2))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(module.norm.get_buffer(name), buffer)


def test_autocast_computes_in_float32() -> None:
    module = build(dtype=torch.float32)
    x = torch.randn(2, 6 * 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, grid_size=(6, 4))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(x, grid_size=(6, 4)), atol=1e-6, rtol=0)


def test_bfloat16_keeps_positions_of_a_large_map() -> None:
    """Positions beyond 256 are no bfloat16 numbers: sampling by them would read other pixels."""
    module = az.create_attention("dtm", dim=2).eval()
    x = torch.randn(1, 2 * 600, 2).bfloat16()
    want = module(x.float(), grid_size=(2, 600))
    torch.testing.assert_close(module.bfloat16()(x, grid_size=(2, 600)).float(), want, atol=0.05, rtol=0)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1), (1, 1)])
def test_small_grids(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least \(2, 2\).*larger image"):
        build()(torch.randn(1, grid[0] * grid[1], 3, dtype=F64), grid_size=grid)


def test_out_dim_must_be_positive() -> None:
    with pytest.raises(ValueError, match="out_dim=0"):
        az.create_attention("dtm", dim=4, out_dim=0)
