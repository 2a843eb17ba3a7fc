"""HiLo attention against its formula written out, the paper's invariants, its modes, and the conversion of softmax attention."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import slow_but
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import GroupedQueryAttention, HiLoAttention, MultiHeadAttention

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 12, num_heads: int = 4, **options: Any) -> HiLoAttention:
    """A float64 layer whose biases are not zero."""
    options = {"qkv_bias": True, **options}
    module: HiLoAttention = az.create_attention("hilo", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def tokens(grid: tuple[int, int], dim: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, dtype=F64)


def softmax_of(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (scale * k @ q).softmax(0) @ v


def by_formula(m: HiLoAttention, x: Tensor, height: int, width: int) -> Tensor:
    """Token by token and head by head: each output is one softmax over the keys that its head sees there."""
    s, d, C = m.window_size, m.head_dim, x.shape[-1]
    rows = []
    for sample in x.view(-1, height, width, C):
        cells = {(i, j): sample[i, j] for i, j in itertools.product(range(height), range(width))}
        zero = torch.zeros(C, dtype=x.dtype)
        windows: dict[tuple[int, int], list[Tensor]] = {}
        for i, j in itertools.product(range(-(-height // s) * s), range(-(-width // s) * s)):
            if (i, j) in cells or m.pad_mode == "zero":
                windows.setdefault((i // s, j // s), []).append(cells.get((i, j), zero))
        means = torch.stack([torch.stack(members).mean(0) for members in windows.values()])
        for (i, j), cell in cells.items():
            heads = []
            for head in range(m.h_heads):
                members = torch.stack(windows[i // s, j // s])
                q = m.h_qkv(cell).view(3, m.h_heads, d)[0, head]
                k, v = m.h_qkv(members).view(-1, 3, m.h_heads, d)[:, 1:, head].unbind(1)
                heads.append(softmax_of(m.q_norm(q), m.k_norm(k), v, m.scale))
            for head in range(m.l_heads):
                q = m.l_q(cell).view(m.l_heads, d)[head]
                k, v = m.l_kv(means).view(-1, 2, m.l_heads, d)[:, :, head].unbind(1)
                heads.append(softmax_of(m.q_norm(q), m.k_norm(k), v, m.scale))
            if m.output_proj == "full":
                rows.append(m.proj(torch.cat(heads)))
            else:
                high, low = heads[: m.h_heads], heads[m.h_heads :]
                parts = [*([m.h_proj(torch.cat(high))] if high else []), *([m.l_proj(torch.cat(low))] if low else [])]
                rows.append(torch.cat(parts))
    return torch.stack(rows).view_as(x)


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    batch=st.integers(1, 2),
    window_size=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    pad_mode=st.sampled_from(["zero", "mask"]),
    output_proj=st.sampled_from(["split", "full"]),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
    qk_scale=st.sampled_from([None, 0.0, 0.7]),
)
def test_against_the_formula(height: int, width: int, batch: int, **options: Any) -> None:
    module = build(**options)
    x = tokens((height, width), batch=batch).requires_grad_()
    leaves = [x, *module.parameters()]
    results = []
    for out in (module(x, grid_size=(height, width)), by_formula(module, x, height, width)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)))
    (got, gradients), (want, wanted) = results
    close(got, want)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-9)


@pytest.mark.parametrize(
    ("heads", "alpha", "low"), [(12, 0.9, 10), (5, 0.9, 4), (12, 0.7, 8), (12, 0.2, 2), (3, 0.0, 0), (3, 1, 3)]
)
def test_heads_are_truncated(heads: int, alpha: float, low: int) -> None:
    assert HiLoAttention.count_heads(heads, alpha, 2) == (heads - low, low)
    assert HiLoAttention.count_heads(heads, alpha, 1) == (0, heads)


def test_parameters_exist_where_their_branch_does() -> None:
    names = {alpha: {n.split(".")[0] for n, _ in build(alpha=alpha).named_parameters()} for alpha in (0.0, 0.5, 1.0)}
    assert names == {0.0: {"h_qkv", "h_proj"}, 0.5: {"h_qkv", "h_proj", "l_q", "l_kv", "l_proj"}, 1.0: {"l_q", "l_kv", "l_proj"}}
    assert {n for n, _ in build(qkv_bias=False).named_parameters() if n.endswith("bias")} == {"h_proj.bias", "l_proj.bias"}
    assert {n.split(".")[0] for n, _ in build(output_proj="full").named_parameters()} == {"h_qkv", "l_q", "l_kv", "proj"}


# --- invariants -------------------------------------------------------------------------------------------------------------------


def plain_attention(module: HiLoAttention, x: Tensor) -> Tensor:
    """Multi-head attention with the weights of the only branch."""
    if module.h_heads:
        q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in module.h_qkv(x).chunk(3, -1))
        proj = module.h_proj
    else:
        q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (module.l_q(x), *module.l_kv(x).chunk(2, -1)))
        proj = module.l_proj
    weights = (module.scale * q @ k.transpose(-2, -1)).softmax(-1)
    return proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_window_of_one_is_plain_attention(alpha: float) -> None:
    module, x = build(window_size=1, alpha=alpha), tokens((5, 3))
    close(module(x, grid_size=(5, 3)), plain_attention(module, x))


def test_one_window_of_hifi_is_plain_attention() -> None:
    module, x = build(window_size=4, alpha=0.0), tokens((4, 4))
    close(module(x, grid_size=(4, 4)), plain_attention(module, x))


@pytest.mark.parametrize("grid", [(3, 3), (2, 3), (1, 1)])
def test_one_window_of_lofi_gives_all_positions_the_same(grid: tuple[int, int]) -> None:
    out = build(window_size=3, alpha=1.0)(tokens(grid), grid_size=grid)
    close(out, out[:, :1].expand_as(out))


def windows(x: Tensor, height: int, width: int, s: int) -> Tensor:
    return x.view(-1, height // s, s, width // s, s, x.shape[-1]).transpose(2, 3).flatten(1, 2)  # (B, windows, s, s, C)


def from_windows(w: Tensor, height: int, width: int) -> Tensor:
    s = w.shape[2]
    return w.unflatten(1, (height // s, width // s)).transpose(2, 3).reshape(w.shape[0], height * width, -1)


def test_hifi_windows_are_independent_and_interchangeable() -> None:
    module, x = build(alpha=0.0), tokens((4, 6))
    out, order = module(x, grid_size=(4, 6)), torch.randperm(6)
    permuted = from_windows(windows(x, 4, 6, 2)[:, order], 4, 6)
    close(module(permuted, grid_size=(4, 6)), from_windows(windows(out, 4, 6, 2)[:, order], 4, 6))
    changed = windows(x, 4, 6, 2).clone()
    changed[:, 1] += 1
    unchanged = windows(module(from_windows(changed, 4, 6), grid_size=(4, 6)) - out, 4, 6, 2)
    assert unchanged[:, 1].abs().min() > 1e-6
    assert unchanged[:, [0, 2, 3, 4, 5]].abs().max() == 0


def test_lofi_sees_other_windows_only_through_their_means() -> None:
    module, x = build(alpha=1.0), tokens((4, 6))
    shuffled = windows(x, 4, 6, 2).flatten(2, 3).clone()
    shuffled[:, 1:] = shuffled[:, 1:, torch.tensor([2, 0, 3, 1])]
    y = module(from_windows(shuffled.unflatten(2, (2, 2)), 4, 6), grid_size=(4, 6))
    out = module(x, grid_size=(4, 6))
    close(windows(y, 4, 6, 2)[:, 0], windows(out, 4, 6, 2)[:, 0])
    assert (windows(y - out, 4, 6, 2)[:, 1:].abs().amax() > 1e-3).item()


def test_pad_modes_agree_without_padding_and_differ_with() -> None:
    zero, mask = build(), build(pad_mode="mask")
    mask.load_state_dict(zero.state_dict())
    for grid, same in (((4, 6), True), ((5, 6), False), ((1, 1), False)):
        x = tokens(grid)
        assert torch.allclose(zero(x, grid_size=grid), mask(x, grid_size=grid), atol=1e-12) == same


def test_constant_input_gives_constant_output() -> None:
    for grid, options in (((4, 6), {}), ((5, 3), {"pad_mode": "mask"})):
        out = build(**options)(tokens((1, 1)).expand(-1, grid[0] * grid[1], -1), grid_size=grid)
        close(out, out[:, :1].expand_as(out))


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_attn_drop_reaches_both_branches() -> None:
    x = tokens((4, 4), batch=1)
    for alpha in (0.0, 1.0):
        module = build(alpha=alpha, attn_drop=0.5).train()
        assert not torch.allclose(module(x, grid_size=(4, 4)), module(x, grid_size=(4, 4)))


def test_head_dim_of_its_own() -> None:
    module = build(head_dim=5, output_proj="full")
    assert module.proj.weight.shape == (12, 20)
    assert module(tokens((3, 2)), grid_size=(3, 2)).shape == (2, 6, 12)
    with pytest.raises(ValueError, match=r"head_dim=5.*dim=12; head_dim=3 is.*'full'"):
        build(head_dim=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.1}, r"alpha.*1\.1.*nearest is 1"),
        ({"alpha": -0.1}, r"alpha.*-0\.1.*nearest is 0"),
        ({"alpha": float("nan")}, "alpha.*nan"),
        ({"window_size": 0}, "window_size.*0.*nearest is 1"),
        ({"window_size": 2.5}, r"window_size.*2\.5.*nearest is 2"),
        ({"pad_mode": "reflect"}, "pad_mode.*'zero', 'mask'.*'reflect'"),
        ({"output_proj": "none"}, "output_proj.*'split', 'full'.*'none'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("alpha", "grid", "window_size", "millions"),
    [(0.0, 14, 2, 116.2), (0.5, 14, 2, 83.5), (0.9, 14, 2, 77.7), (1.0, 14, 2, 79.6), (0.5, 24, 2, 266.3), (0.9, 24, 2, 263.4)],
)
def test_multiply_adds(alpha: float, grid: int, window_size: int, millions: float) -> None:
    """What the official counter gives for 384 channels and 12 heads."""
    module = az.create_attention("hilo", dim=384, num_heads=12, alpha=alpha, window_size=window_size)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        module(torch.randn(1, grid * grid, 384), grid_size=(grid, grid))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.06)


def test_size_of_the_published_benchmark() -> None:
    module = az.create_attention("hilo", dim=768, num_heads=12, alpha=0.9, window_size=2, qkv_bias=True, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 2_198_528


# --- conversion -------------------------------------------------------------------------------------------------------------------


def source(kind: str) -> Any:
    if kind == "timm":
        return Attention(12, num_heads=4, qkv_bias=True).double().eval()
    layer = MultiHeadAttention if kind == "mha" else GroupedQueryAttention
    heads = {"num_kv_heads": 4} if kind == "gqa" else {}
    return layer(12, 4, qkv_bias=True, dtype=F64, **heads).eval()


@pytest.mark.parametrize("kind", ["timm", "mha", "gqa"])
@pytest.mark.parametrize("output_proj", ["full", "split"])
@pytest.mark.parametrize(
    "options", [{"window_size": 1}, {"window_size": 3, "alpha": 0.0}, {"window_size": 3, "high_heads": [2, 0, 3, 1]}]
)
def test_conversion_that_changes_nothing(kind: str, output_proj: str, options: dict[str, Any]) -> None:
    layer, x = source(kind), tokens((3, 3))
    module = HiLoAttention.from_softmax_attention(layer, **{"output_proj": output_proj, **options})
    assert not module.training
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    close(module(x, grid_size=(3, 3)), layer(x))


def test_conversion_chooses_heads() -> None:
    """Hi-Fi heads 3 and 1 attend within windows as the source would there, the others to the window means of the source's keys."""
    layer, x = source("timm"), tokens((4, 4), batch=1)
    module = HiLoAttention.from_softmax_attention(layer, high_heads=[3, 1], window_size=2)
    assert (module.h_heads, module.l_heads) == (2, 2)
    q, k, v = layer.qkv(x).view(1, 16, 3, 4, 3).permute(2, 0, 3, 1, 4)[:, 0]  # (heads, 16, d)
    cell = torch.arange(16).view(4, 4)
    window = (cell // 4 // 2 * 2 + cell % 4 // 2).flatten()
    out = torch.empty(16, 4, 3, dtype=F64)
    for head in range(4):
        for t in range(16):
            if head in (3, 1):
                keys, values = k[head][window == window[t]], v[head][window == window[t]]
            else:
                keys, values = (torch.stack([a[head][window == w].mean(0) for w in range(4)]) for a in (k, v))
            out[t, head] = softmax_of(q[head, t], keys, values, 3**-0.5)
    close(module(x, grid_size=(4, 4)), layer.proj(out.flatten(1))[None])


def test_split_conversion_keeps_the_diagonal_blocks() -> None:
    layer = source("timm")
    module = HiLoAttention.from_softmax_attention(layer, high_heads=[2], output_proj="split")
    close(module.h_proj.weight, layer.proj.weight[:3, 6:9], 0)
    close(module.l_proj.weight, layer.proj.weight[3:][:, [0, 1, 2, 3, 4, 5, 9, 10, 11]], 0)
    close(torch.cat([module.h_proj.bias, module.l_proj.bias]), layer.proj.bias, 0)


@pytest.mark.parametrize("heads", [3, 7, 49])
def test_every_number_of_high_heads_can_be_asked_for(heads: int) -> None:
    layer = Attention(heads, num_heads=heads)
    for number in range(heads + 1):
        module = HiLoAttention.from_softmax_attention(layer, high_heads=list(range(number)))
        assert module.h_heads == number


def test_conversion_takes_settings_and_normalisations_over() -> None:
    layer = Attention(12, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm, attn_drop=0.1, proj_drop=0.2).double()
    nn.init.normal_(layer.q_norm.weight)
    layer.scale, layer.fused_attn = 0.3, False
    module = HiLoAttention.from_softmax_attention(layer, window_size=1, qk_norm=True)
    assert (module.attn_drop, module.proj_drop.p, module.scale, module.training) == (0.1, 0.2, 0.3, True)
    x = tokens((2, 3))
    close(module.eval()(x, grid_size=(2, 3)), layer.eval()(x))
    state = HiLoAttention.from_softmax_attention(layer.state_dict(), num_heads=4, window_size=1, qk_norm=True, qk_scale=0.3).eval()
    close(state(x, grid_size=(2, 3)), layer(x))


def test_conversion_refusals() -> None:
    convert, layer = HiLoAttention.from_softmax_attention, source("timm")
    with pytest.raises(ValueError, match="num_heads"):
        convert(layer.state_dict())
    with pytest.raises(ValueError, match="causal"):
        convert(MultiHeadAttention(12, 4, is_causal=True))
    with pytest.raises(ValueError, match=r"as many key/value heads.*\(12, 12\).*\(6, 12\)"):
        convert(GroupedQueryAttention(12, 4, num_kv_heads=2))
    with pytest.raises(ValueError, match=r"high_heads.*0 to 3.*\[4\]"):
        convert(layer, high_heads=[4])
    with pytest.raises(ValueError, match=r"different.*\[1, 1\]"):
        convert(layer, high_heads=[1, 1])
    with pytest.raises(ValueError, match="leave out alpha"):
        convert(layer, high_heads=[1], alpha=0.5)
    with pytest.raises(ValueError, match=r"window_size=1.*leave out high_heads=\[1\]"):
        convert(layer, high_heads=[1], window_size=1)
    with pytest.raises(ValueError, match=r"without a place: .*q_norm\.weight"):
        convert(Attention(12, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match=r"missing: .*q_norm\.weight"):
        convert(layer, qk_norm=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True},  # whose padding has keys
        {"pad_mode": "mask", "output_proj": "full", "qkv_bias": True},
    ],
    ids=["plain", "bias", "masked, one projection"],
)
@pytest.mark.parametrize("compiled", slow_but(1, [False, True]))
def test_kernels_compute_the_same(options: dict[str, Any], compiled: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = az.create_attention("hilo", dim=16, num_heads=2, device=device, **options)
    x = torch.randn(2, 15, 16, device=device, requires_grad=True)
    results = []
    for backend, function in (("torch", module), ("triton", torch.compile(module, backend="aot_eager") if compiled else module)):
        with ops.use_backend(backend):
            out = function(x, grid_size=(3, 5))
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_what_the_kernels_are_not_asked_for() -> None:
    """Layers that somebody has exchanged or waits for, normalisations, branches that are alone, float64, onlookers."""
    x = torch.randn(1, 4, 16)
    module = az.create_attention("hilo", dim=16, num_heads=2)
    with ops.use_backend("triton"):
        if importlib.util.find_spec("triton") is not None:
            assert module._is_fused(x)
        handle = module.l_q.register_forward_hook(lambda *_: None)
        assert not module._is_fused(x)
        handle.remove()
        module.h_proj = nn.Sequential(module.h_proj)
        assert not module._is_fused(x)
        assert not az.create_attention("hilo", dim=16, num_heads=2, qk_norm=True)._is_fused(x)
        assert not az.create_attention("hilo", dim=16, num_heads=2, alpha=1.0)._is_fused(x)
    assert module._is_fused(x.double()) is False


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"pad_mode": "mask"}, {"output_proj": "full"}, {"alpha": 1.0}], ids=str)
def test_computing_without_recording_gives_the_same(batch: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.attention.hilo._TOKENS_AT_ONCE", 40)  # two samples at a time
    module = az.create_attention("hilo", dim=24, num_heads=4, **options).eval()
    x = torch.randn(24, 15, batch).permute(2, 1, 0)
    recorded = module(x, grid_size=(3, 5)).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(module(x, grid_size=(3, 5)), recorded, atol=1e-6, rtol=1e-6)
