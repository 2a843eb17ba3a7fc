"""LePE attention against its formula, both places of the convolution, and what it is without."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import LepeAttention, MultiHeadAttention

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 8, num_heads: int = 2, **options: Any) -> LepeAttention:
    module: LepeAttention = az.create_attention("lepe_attention", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def by_formula(m: LepeAttention, x: Tensor, height: int, width: int) -> Tensor:
    """Head by head, and the convolution tap by tap."""
    outputs = []
    for sample in x:
        q, k, v = m.qkv(sample).chunk(3, -1)
        heads = [
            (m.scale * a @ b.T).softmax(-1) @ c for a, b, c in zip(*(t.chunk(m.num_heads, -1) for t in (q, k, v)), strict=True)
        ]
        out = torch.cat(heads, -1)
        if m.lepe is not None:
            source = {"x": sample, "v": v}[m.lepe_on].view(height, width, -1)
            side, nearby = m.side_dwconv, []
            for row, column in itertools.product(range(height), range(width)):
                total = m.lepe.bias
                for i, j in itertools.product(range(side), range(side)):
                    y, z = row + i - side // 2, column + j - side // 2
                    if 0 <= y < height and 0 <= z < width:
                        total = total + m.lepe.weight[:, 0, i, j] * source[y, z]
                nearby.append(total)
            out = out + torch.stack(nearby)
        outputs.append(m.proj(out))
    return torch.stack(outputs)


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    lepe_on=st.sampled_from(["x", "v"]),
    side_dwconv=st.sampled_from([0, 1, 3, 5]),
    qkv_bias=st.booleans(),
    qk_scale=st.sampled_from([None, 0.0, 0.7]),
)
def test_against_the_formula(height: int, width: int, **options: Any) -> None:
    module = build(**options)
    x = torch.randn(2, height * width, 8, dtype=F64, requires_grad=True)
    leaves, results = [x, *module.parameters()], []
    for out in (module(x, grid_size=(height, width)), by_formula(module, x, height, width)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b)


def test_without_convolution_it_is_plain_attention() -> None:
    module, plain = build(side_dwconv=0, qkv_bias=True), MultiHeadAttention(8, 2, qkv_bias=True, dtype=F64)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 12, 8, dtype=F64)
    close(module(x, grid_size=(3, 4)), plain(x))


def test_options() -> None:
    assert {n for n, _ in build().named_parameters()} == {"qkv.weight", "proj.weight", "proj.bias", "lepe.weight", "lepe.bias"}
    assert build(dim=512, num_heads=8).scale == 64**-0.5
    for options, message in (
        ({"side_dwconv": 2}, r"side_dwconv.*got 2, the nearest is 3"),
        ({"side_dwconv": -1}, r"side_dwconv.*got -1, the nearest is 0"),
        ({"lepe_on": "q"}, r"lepe_on.*'x', 'v'.*'q'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)


def test_multiply_adds() -> None:
    """The last stage of BiFormer-S."""
    module = az.create_attention("lepe_attention", dim=512, num_heads=8)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        module(torch.randn(1, 49, 512), grid_size=(7, 7))
    assert counter.get_total_flops() / 2 == 4 * 49 * 512**2 + 2 * 49**2 * 512 + 49 * 512 * 25


@pytest.mark.parametrize("lepe_on", ["x", "v"])
def test_class_tokens_take_no_part_in_the_convolution(lepe_on: str) -> None:
    plain = build(lepe_on=lepe_on)
    module = build(lepe_on=lepe_on, num_prefix_tokens=2)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2 + 12, 8, dtype=F64)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in plain.qkv(x).chunk(3, -1))
    out = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert plain.lepe is not None
    image = (x if lepe_on == "x" else plain.qkv(x)[..., 16:])[:, 2:].unflatten(1, (3, 4))
    out[:, 2:] += plain.lepe(image).flatten(1, 2)
    close(module(x, grid_size=(3, 4)), plain.proj(out))
    with pytest.raises(ValueError, match="num_prefix_tokens must be at least 0, got -1"):
        build(num_prefix_tokens=-1)


@pytest.mark.parametrize("source", ["timm", "scaled", "gqa", "split"])
def test_conversion_keeps_the_function(source: str) -> None:
    layer: Any = Attention(8, num_heads=2, qkv_bias=source != "scaled", proj_bias=source != "split", attn_drop=0.25)
    if source == "gqa":
        layer = az.create_attention("gqa", 8, 4, num_kv_heads=2, qkv_bias=True)
    if source == "scaled":
        layer.scale, layer.fused_attn = 0.7, False
    layer = layer.double().eval()
    given: Any = layer
    if source == "split":
        parts = {
            f"{n}.{kind}": t for kind in ("weight", "bias") for n, t in zip("qkv", getattr(layer.qkv, kind).chunk(3), strict=True)
        }
        given = {**parts, "proj.weight": layer.proj.weight}
    heads = {"num_heads": 2} if source == "split" else {}
    module = LepeAttention.from_softmax_attention(given, **heads, num_prefix_tokens=1, lepe_on="v").eval()
    x = torch.randn(2, 1 + 12, 8, dtype=F64)
    close(module(x, grid_size=(4, 3)), layer(x))
    assert module.attn_drop == {"split": 0.0, "gqa": 0.0}.get(source, 0.25)
    module(x, grid_size=(4, 3)).square().sum().backward()
    assert module.lepe is not None
    assert module.lepe.weight.grad.abs().min() > 0


def test_conversions_that_cannot_be() -> None:
    convert = LepeAttention.from_softmax_attention
    for layer, message in (
        (MultiHeadAttention(8, 2, is_causal=True), "the source is causal"),
        (MultiHeadAttention(8, 2, head_dim=8), "2 heads of 8 are not 8"),
        (MultiHeadAttention(8, 2, qk_norm=True), "without a place: .*q_norm.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(layer)
