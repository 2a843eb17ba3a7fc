"""Halo attention against its formula written out and against timm's, the paper's invariants, its modes, and the conversion."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention import GroupedQueryAttention, HaloAttention, MultiHeadAttention
from attention_zoo.attention.halo import project_cells

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def build(dim: int = 8, num_heads: int = 2, **options: Any) -> HaloAttention:
    """A float64 layer whose biases are not zero."""
    options = {"block_size": 2, "halo_size": 1, "qkv_bias": True, "mask_padding": True, **options}
    module: HaloAttention = az.create_attention("halo", dim=dim, num_heads=num_heads, dtype=F64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def zero_tables(module: HaloAttention) -> HaloAttention:
    for table in module.pos_embed.parameters():
        nn.init.zeros_(table)
    return module


def image(height: int, width: int, dim: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, dim, height, width, dtype=F64)


def by_formula(m: HaloAttention, x: Tensor, prefix: Tensor) -> Tensor:
    """Pixel by pixel: each output is one softmax over the cells of the pixel's window and the prefix; prefix (B, P, C)."""
    b, h, win, sq, d = m.block_size, m.halo_size, m.win_size, m.query_stride, m.head_dim
    (n_prefix, height, width), samples = (prefix.shape[1], *x.shape[2:]), []
    for sample, extra in zip(x, prefix, strict=True):
        tokens = torch.cat([extra, sample.flatten(1).T])
        q, kv = (linear(layer, tokens).unflatten(1, (m.num_heads, -1)) for layer in (m.q, m.kv))
        kv = torch.cat([kv, torch.zeros_like(kv[:1])])  # the last is what stands outside the image
        prefix_out = [attend(q[t] * d**-0.5, kv[:-1], 0.0, d) for t in range(n_prefix)]
        out = torch.zeros(-(-height // sq), -(-width // sq), m.dim_out, dtype=F64)
        for i, j in itertools.product(range(0, height, sq), range(0, width, sq)):
            found, position = list(range(n_prefix)), [torch.zeros(m.num_heads, dtype=F64)] * n_prefix
            query = q[n_prefix + i * width + j]
            for r, c in itertools.product(range(win), range(win)):
                row, column = i // b * b - h + r, j // b * b - h + c
                inside = 0 <= row < height and 0 <= column < width
                if inside or not m.mask_padding:
                    table = m.pos_embed.height_rel[r - i % b // sq + win - 1] + m.pos_embed.width_rel[c - j % b // sq + win - 1]
                    position.append(query @ table)
                    found.append(n_prefix + row * width + column if inside else -1)
            added = torch.stack(position) * (d**-0.5 if m.scale_pos_embed else 1)
            out[i // sq, j // sq] = attend(query * d**-0.5, kv[found], added, d)
        if m.averages:
            out = out[: height // 2 * 2, : width // 2 * 2].unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))
        samples.append(torch.cat([*(p[None] for p in prefix_out), out.flatten(0, 1)]))
    return m.proj(torch.stack(samples))


def linear(layer: nn.Conv2d, tokens: Tensor) -> Tensor:
    return nn.functional.linear(tokens, layer.weight.flatten(1), layer.bias)


def attend(query: Tensor, kv: Tensor, added: Tensor | float, d: int) -> Tensor:
    """One query (heads, d) over keys and values (M, heads, d + d_v), `added` (M, heads) to the logits -> (heads * d_v,)."""
    weights = (torch.einsum("nd,mnd->mn", query, kv[..., :d]) + added).softmax(0)
    return torch.einsum("mn,mnd->nd", weights, kv[..., d:]).flatten()


@given(
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    missing=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    block_size=st.integers(1, 4),
    halo_size=st.integers(0, 2),
    stride=st.sampled_from([1, 2]),
    mask_padding=st.booleans(),
    prefix=st.integers(0, 2),
    avg_down=st.booleans(),
    scale_pos_embed=st.booleans(),
    qkv_bias=st.booleans(),
    out_proj=st.booleans(),
    widths=st.sampled_from([(None, None), (6, 3), (None, 5)]),
)
def test_against_the_formula(
    blocks: tuple[int, int], missing: tuple[int, int], widths: tuple[Any, Any], prefix: int, **options: Any
) -> None:
    module = build(6, dim_out=widths[0], head_dim=widths[1], num_prefix_tokens=prefix, **options)
    height, width = (n * module.block_size for n in blocks)
    if module.mask_padding:
        height, width = (max(2 if module.averages else 1, n - m) for n, m in zip((height, width), missing, strict=True))
    elif module.averages and min(height, width) < 2:
        height, width = 2 * height, 2 * width
    x, extra = image(height, width, 6, batch=1).requires_grad_(), torch.randn(1, prefix, 6, dtype=F64)
    tokens = torch.cat([extra, x.flatten(2).transpose(1, 2)], 1)
    leaves = [x, *module.parameters()]
    results = []
    for out in (module(tokens, grid_size=(height, width)), by_formula(module, x, extra)):
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves)))
    (got, gradients), (want, wanted) = results
    close(got, want, 1e-6 if prefix else 1e-10)  # the parts of a softmax are merged with float32 normalisers
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b, 1e-5 if prefix else 1e-9)
    if not prefix:
        close(module(x).flatten(2).transpose(1, 2), got)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "qkv_bias": True, "dim_out": 24, "num_heads": 3},
        {"stride": 2, "block_size": 3},
        {"stride": 2, "avg_down": True, "scale_pos_embed": True},
        {"halo_size": 6, "qk_ratio": 0.33},
        {"head_dim": 5, "qk_ratio": 0.5},
    ],
)
def test_is_timms(options: dict[str, Any]) -> None:
    options = {"num_heads": 4, "block_size": 4, "halo_size": 2, **options}
    words = {"dim_head" if k == "head_dim" else k: v for k, v in options.items()}
    theirs, ours = (
        HaloAttn(16, **words).double(),
        build(16, **{"qkv_bias": False, "mask_padding": False, "out_proj": False, **options}),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    side = 2 * options["block_size"]
    x = image(side, 2 * side, 16)
    close(ours(x), theirs(x))


def test_sizes_and_initialisation() -> None:
    torch.manual_seed(0)
    module = HaloAttention(256, 8, qkv_bias=True)
    assert (module.win_size, module.head_dim, module.value_dim) == (14, 32, 32)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "q.weight": (256, 256, 1, 1),
        "q.bias": (256,),
        "kv.weight": (512, 256, 1, 1),
        "kv.bias": (512,),
        "pos_embed.height_rel": (27, 32),
        "pos_embed.width_rel": (27, 32),
        "proj.weight": (256, 256),
        "proj.bias": (256,),
    }
    deviations = {"q.weight": 1 / 16, "kv.weight": 1 / 16, "pos_embed.height_rel": 32**-0.5, "proj.weight": 0.02}
    for name, std in deviations.items():
        assert module.get_parameter(name).std().item() == pytest.approx(std, rel=0.1)
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("bias"))
    assert HaloAttention(288, 8, qk_ratio=0.33, out_proj=False).head_dim == 12


# --- invariants -------------------------------------------------------------------------------------------------------------------


def plain_attention(module: HaloAttention, x: Tensor) -> Tensor:
    """Multi-head attention over all pixels, with the weights of the module, before the output projection."""
    tokens = x.flatten(2).transpose(1, 2)
    q = (tokens @ module.q.weight.flatten(1).T + module.q.bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    kv = (tokens @ module.kv.weight.flatten(1).T + module.kv.bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    k, v = kv.split([module.head_dim, module.value_dim], -1)
    out = (q @ k.transpose(-2, -1) * module.head_dim**-0.5).softmax(-1) @ v
    return module.proj(out.transpose(1, 2).flatten(2))


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def test_one_block_without_positions_is_plain_attention() -> None:
    module, x = zero_tables(build(block_size=4, halo_size=0)), image(4, 4)
    close(as_tokens(module(x)), plain_attention(module, x))
    small = image(3, 2)
    close(as_tokens(module(small)), plain_attention(module, small))


def test_without_halo_blocks_are_independent() -> None:
    module, x = zero_tables(build(block_size=2, halo_size=0, mask_padding=False)), image(4, 6)
    out = module(x)
    for i in (0, 2):
        for j in (0, 2, 4):
            close(as_tokens(out[:, :, i : i + 2, j : j + 2]), plain_attention(module, x[:, :, i : i + 2, j : j + 2]))


def test_a_token_alone_returns_its_value() -> None:
    module, x = build(block_size=1, halo_size=0, out_proj=False), image(1, 1)
    close(module(x), module.kv(x).unflatten(1, (2, -1))[:, :, module.head_dim :].flatten(1, 2))


def test_constant_values_stay_constant_where_padding_is_masked() -> None:
    module = build(block_size=2, halo_size=1, out_proj=False)
    with torch.no_grad():
        module.kv.weight.view(2, -1, 8)[:, module.head_dim :] = 0
    values = module.kv.bias.view(2, -1)[:, module.head_dim :].flatten()[:, None, None]
    x = image(6, 6)
    close(module(x), values.expand(2, 8, 6, 6))
    module.mask_padding = False
    close(module(x)[:, :, 2:4, 2:4], values.expand(2, 8, 2, 2))
    assert ((module(x) - values)[:, :, :2].abs() > 1e-3).any()


def test_shifts_by_whole_blocks_only() -> None:
    module, x = build(block_size=2, halo_size=1), image(8, 8)
    shifted = module(x.roll((2, 2), (2, 3)))
    close(shifted[:, :, 4:6, 4:6], module(x)[:, :, 2:4, 2:4])
    shifted = module(x.roll((1, 1), (2, 3)))
    assert (shifted[:, :, 4:6, 4:6] - module(x)[:, :, 3:5, 3:5]).abs().max() > 1e-3


@pytest.mark.parametrize("stride", [1, 2])
def test_transposing(stride: int) -> None:
    module, x = build(block_size=2, halo_size=1, stride=stride), image(5, 7)
    want = module(x)
    tables = module.pos_embed
    tables.height_rel, tables.width_rel = tables.width_rel, tables.height_rel
    close(module(x.transpose(2, 3)).transpose(2, 3), want)


@pytest.mark.parametrize(("block_size", "halo_size"), [(2, 1), (2, 3), (4, 0)])
def test_a_block_sees_its_halo_and_no_further(block_size: int, halo_size: int) -> None:
    module, x = build(block_size=block_size, halo_size=halo_size), image(12, 12, batch=1).requires_grad_()
    module(x)[:, :, 4 : 4 + block_size, 4 : 4 + block_size].square().sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    want = torch.zeros(12, 12, dtype=torch.bool)
    want[max(4 - halo_size, 0) : 4 + block_size + halo_size, max(4 - halo_size, 0) : 4 + block_size + halo_size] = True
    assert torch.equal(seen, want)


@pytest.mark.parametrize("stride", [1, 2])
def test_dead_rows_of_the_tables(stride: int) -> None:
    module, x = build(block_size=4, halo_size=1, stride=stride), image(8, 8)
    want = module(x)
    dead = module.win_size - module.block_size // module.query_stride
    with torch.no_grad():
        for table in module.pos_embed.parameters():
            table[:dead] = 7.0
    close(module(x), want)
    with torch.no_grad():
        module.pos_embed.height_rel[dead] += 1.0
    assert (module(x) - want).abs().max() > 1e-4


def test_block_of_one_is_neighbourhood_attention() -> None:
    """Every pixel sees the k x k around it, k = 2h + 1, with zeros outside the image."""
    module, x = build(block_size=1, halo_size=1, mask_padding=False, out_proj=False), image(3, 4)
    q = module.q(x).unflatten(1, (2, -1))
    k, v = module.kv(x).unflatten(1, (2, -1)).split([module.head_dim, module.value_dim], 2)
    k, v = (nn.functional.pad(t.flatten(1, 2), (1, 1, 1, 1)).unflatten(1, (2, -1)) for t in (k, v))
    out = torch.empty_like(v[..., 1:-1, 1:-1])
    rows, columns = module.pos_embed.height_rel[2:5], module.pos_embed.width_rel[2:5]
    for i in range(3):
        for j in range(4):
            here = q[..., i, j]  # (B, heads, d)
            logits = torch.einsum("bnd,bndrc->bnrc", here, k[..., i : i + 3, j : j + 3]) * module.head_dim**-0.5
            logits = logits + (here @ rows.T)[..., None] + (here @ columns.T)[..., None, :]
            weights = logits.flatten(2).softmax(-1)
            out[..., i, j] = torch.einsum("bnp,bndp->bnd", weights, v[..., i : i + 3, j : j + 3].flatten(3))
    close(module(x), out.flatten(1, 2))


@pytest.mark.parametrize(
    ("options", "grid"), [({}, (3, 3)), ({"avg_down": True}, (2, 2)), ({"block_size": 3}, (2, 2)), ({"block_size": 4}, (3, 3))]
)
def test_halves_of_odd_grids(options: dict[str, Any], grid: tuple[int, int]) -> None:
    assert build(stride=2, **options)(image(5, 5)).shape == (2, 8, *grid)


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_log_normaliser() -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, d, dtype=F64) for d in (4, 4, 2))
    tables = torch.randn(2, 7, 4, dtype=F64)
    out, lse = ops.halo_attention(q, k, v, *tables, block_size=2, halo_size=1, mask_padding=True, return_lse=True)
    ones = ops.halo_attention(q, k, torch.ones_like(v), *tables, block_size=2, halo_size=1, mask_padding=True)
    assert out.shape == (2, 3, 5, 4, 2)
    close(ones, torch.ones_like(ones))
    logits = (q[0, 0, 0, 0] * k[0, 0, :3, :3]).sum(-1) / 2
    logits = logits + (tables[0, 4:] @ q[0, 0, 0, 0])[:, None] + (tables[1, 4:] @ q[0, 0, 0, 0])
    close(lse[0, 0, 0, 0], logits.flatten().logsumexp(0))


def test_half_precision_keeps_large_position_terms() -> None:
    module, x = build(block_size=4, halo_size=1), image(4, 4)
    with torch.no_grad():
        module.q.weight.mul_(300)
    for dtype in (torch.float16, torch.bfloat16):
        assert module.to(dtype)(x.to(dtype)).isfinite().all()


def test_attn_drop_reaches_prefix_and_patches() -> None:
    module, x = build(attn_drop=0.5, num_prefix_tokens=1, out_proj=False).train(), torch.randn(1, 13, 8, dtype=F64)
    a, b = (module(x, grid_size=(4, 3)) for _ in range(2))
    assert ((a - b).abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size.*0.*nearest is 1"),
        ({"halo_size": -1}, "halo_size.*-1.*nearest is 0"),
        ({"stride": 3}, "stride must be 1 or 2.*3.*nearest is 2"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens.*-1"),
        ({"dim_out": 9}, "9.*num_heads=2.*nearest"),
        ({"qk_ratio": 0.1, "num_heads": 8, "dim": 16, "head_dim": 0}, "head_dim=0"),
        ({"dim": 32, "num_heads": 32, "qk_ratio": 0.3}, r"qk_ratio=0\.3.*head_dim"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_inputs() -> None:
    module = build(block_size=4, mask_padding=False)
    with pytest.raises(ValueError, match=r"4 x 4.*\(5, 8\).*mask_padding=True.*nearest is \(4, 8\)"):
        module(image(5, 8))
    with pytest.raises(ValueError, match="grid_size"):
        module(image(4, 4), grid_size=(2, 8))
    with pytest.raises(TypeError, match="grid_size"):
        module(torch.randn(1, 16, 8, dtype=F64))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) with C = 8"):
        module(image(4, 4, 6))
    with pytest.raises(ValueError, match="no place for num_prefix_tokens=1"):
        build(num_prefix_tokens=1)(image(4, 4))
    with pytest.raises(ValueError, match=r"averaged over 2 x 2.*got \(1, 5\)"):
        build(block_size=3, stride=2)(image(1, 5))
    with pytest.raises(ValueError, match="class and register tokens"):
        module(torch.randn(1, 17, 8, dtype=F64), grid_size=(4, 4))
    q, table = torch.randn(1, 1, 4, 4, 2), torch.randn(7, 2)
    for wrong in (
        {"q": q[:, :, 1:]},
        {"height_rel": table[1:]},
        {"block_size": 3, "query_stride": 2},
        {"v": q[0]},
        {"halo_size": -1},
    ):
        call = {"q": q, "k": q, "v": q, "height_rel": table, "width_rel": table, "block_size": 2, "halo_size": 1, **wrong}
        with pytest.raises(ValueError, match=r"must be|laid out"):
            ops.halo_attention(**call)


# --- conversion -------------------------------------------------------------------------------------------------------------------


def source(kind: str) -> Any:
    if kind == "timm":
        return Attention(12, num_heads=4, qkv_bias=True).double().eval()
    layer = MultiHeadAttention if kind == "mha" else GroupedQueryAttention
    heads = {"num_kv_heads": 4} if kind == "gqa" else {}
    return layer(12, 4, qkv_bias=True, dtype=F64, **heads).eval()


@pytest.mark.parametrize("kind", ["timm", "mha", "gqa"])
def test_conversion_of_one_block_changes_nothing(kind: str) -> None:
    layer, x = source(kind), torch.randn(2, 12, 12, dtype=F64)
    module = HaloAttention.from_softmax_attention(layer, block_size=4, halo_size=0)
    assert not module.training
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    close(module(x, grid_size=(3, 4)), layer(x))
    with_prefix = HaloAttention.from_softmax_attention(layer, block_size=2, halo_size=2, num_prefix_tokens=2)
    tokens = torch.randn(2, 18, 12, dtype=F64)
    close(with_prefix(tokens, grid_size=(4, 4)), layer(tokens), 1e-7)


def test_conversion_is_the_source_restricted_to_the_window() -> None:
    layer, x = source("timm"), torch.randn(1, 30, 12, dtype=F64)
    module = HaloAttention.from_softmax_attention(layer, block_size=2, halo_size=1)
    q, k, v = layer.qkv(x).view(1, 30, 3, 4, 3).permute(2, 0, 3, 1, 4)
    row, column = torch.arange(30) // 6, torch.arange(30) % 6
    near = [(a[None] >= a[:, None] // 2 * 2 - 1) & (a[None] <= a[:, None] // 2 * 2 + 2) for a in (row, column)]
    logits = (q @ k.transpose(-2, -1) * 3**-0.5).masked_fill(~(near[0] & near[1]), -torch.inf)
    close(module(x, grid_size=(5, 6)), layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_conversion_takes_settings_over() -> None:
    layer = Attention(12, num_heads=4, attn_drop=0.1, proj_drop=0.2)
    module = HaloAttention.from_softmax_attention(layer, mask_padding=False)
    assert (module.attn_drop, module.proj_drop.p, module.training, module.mask_padding) == (0.1, 0.2, True, False)
    state = HaloAttention.from_softmax_attention(layer.state_dict(), num_heads=4, block_size=2, halo_size=3)
    assert (state.win_size, state.q.bias) == (8, None)


def test_conversion_refusals() -> None:
    convert, layer = HaloAttention.from_softmax_attention, source("timm")
    with pytest.raises(ValueError, match="num_heads"):
        convert(layer.state_dict())
    with pytest.raises(ValueError, match="causal"):
        convert(MultiHeadAttention(12, 4, is_causal=True))
    with pytest.raises(ValueError, match=r"as many key/value heads.*\(12, 12\).*\(6, 12\)"):
        convert(GroupedQueryAttention(12, 4, num_kv_heads=2))
    layer.scale = 0.3
    with pytest.raises(ValueError, match=r"scales its logits by 0\.3"):
        convert(layer)
    with pytest.raises(ValueError, match=r"without a place: .*q_norm\.weight"):
        convert(Attention(12, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm))


@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
def test_products_over_cells_are_the_convolution(stride: int, bias: bool) -> None:
    """What stands in for it on CUDA, on maps of either layout."""
    layer = nn.Conv2d(6, 8, 1, stride=stride, bias=bias)
    tokens = torch.randn(2, 35, 6, requires_grad=True)
    for image in (tokens.transpose(1, 2).unflatten(2, (5, 7)), tokens.transpose(1, 2).unflatten(2, (5, 7)).contiguous()):
        want, got = layer(image).movedim(1, -1), project_cells(layer, image)
        torch.testing.assert_close(got, want)
        leaves = [tokens, *layer.parameters()]
        gradients = (torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (got, want))
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right)
    assert got.stride(-1) == 1
