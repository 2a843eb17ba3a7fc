"""What all mechanisms share: checks, masks, heads, rotations, the cache, auxiliary losses."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from attention_case import make_generic, rotary_tables
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import attention_zoo as az
from attention_zoo.attention import base
from attention_zoo.attention.base import AttentionModule


class Toy(AttentionModule):
    """The least that `attend` reads from, with parameters of its own kind."""

    def __init__(self, *, is_causal: bool = False, layer_idx: int | None = 0, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.is_causal, self.layer_idx, self.attn_drop = is_causal, layer_idx, attn_drop
        self.proj = nn.Linear(4, 4)
        self.nested = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.LayerNorm(4)]))


def heads(batch: int = 2, num_heads: int = 4, length: int = 5, dim: int = 6) -> Tensor:
    return torch.randn(batch, num_heads, length, dim)


def explicit(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> Tensor:
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if allowed is None else logits.masked_fill(~allowed, -math.inf)).softmax(-1) @ v


# --- checks -----------------------------------------------------------------------------------------------------------------------


def test_resolve_head_dim() -> None:
    assert base.resolve_head_dim(12, 4) == 3
    assert base.resolve_head_dim(12, 5, head_dim=7) == 7


@pytest.mark.parametrize(("dim", "heads", "nearest"), [(12, 5, 4), (10, 4, 5), (16, 3, 2), (7, 3, 1), (16, 100, 16)])
def test_resolve_head_dim_names_the_nearest(dim: int, heads: int, nearest: int) -> None:
    with pytest.raises(
        ValueError, match=rf"dim={dim} is not divisible by num_heads={heads}; the nearest that divides it is {nearest}$"
    ):
        base.resolve_head_dim(dim, heads)


@pytest.mark.parametrize(("dim", "heads", "head_dim"), [(0, 1, None), (8, 0, None), (8, -2, None), (8, 2, 0)])
def test_sizes_are_positive(dim: int, heads: int, head_dim: int | None) -> None:
    with pytest.raises(ValueError, match=f"must be positive, got dim={dim}, num_heads={heads}, head_dim={head_dim}"):
        base.resolve_head_dim(dim, heads, head_dim)


@given(st.integers(1, 64), st.integers(-3, 70))
def test_check_head_split(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads >= 1 and num_heads % num_kv_heads == 0:
        base.check_head_split(num_heads, num_kv_heads)
    else:
        with pytest.raises(ValueError, match=f"num_heads={num_heads} does not share out evenly") as error:
            base.check_head_split(num_heads, num_kv_heads)
        assert num_heads % int(str(error.value).rsplit(" ", 1)[1]) == 0, "the advice is legal"


def test_check_choice() -> None:
    base.check_choice("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^mode must be one of 'a', 'b'; got 'c'$"):
        base.check_choice("mode", "c", (name for name in "ab"))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 4), (1, 2, 3, 4)])
def test_check_tokens(shape: tuple[int, ...]) -> None:
    base.check_tokens(torch.zeros(2, 3, 4), 4)
    with pytest.raises(ValueError, match=r"^context must be tokens \(B, N, C\) with C = 4, got shape \("):
        base.check_tokens(torch.zeros(shape), 4, "context")


@pytest.mark.parametrize("grid", [(2, 4), (0, 0), (-2, -3), (6, 0), (3, 3)])
def test_check_grid(grid: tuple[int, int]) -> None:
    assert base.check_grid(torch.zeros(1, 6, 4), (2, 3)) == (2, 3)
    with pytest.raises(
        ValueError, match=rf"grid_size=\({grid[0]}, {grid[1]}\) stands for {grid[0] * grid[1]} tokens, x has 6; class"
    ):
        base.check_grid(torch.zeros(1, 6, 4), grid)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_heads_split_and_merge(batch: int) -> None:
    x = torch.randn(batch, 5, 12)
    split = base.split_heads(x, 3)
    assert split.shape == (batch, 3, 5, 4)
    assert torch.equal(split[:, 1], x[..., 4:8])
    assert torch.equal(base.merge_heads(split), x)


# --- masks ------------------------------------------------------------------------------------------------------------------------


def test_masks_of_every_form() -> None:
    resolve = base.resolve_attention_mask
    assert resolve(None, 3, 4) is None
    padding = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        got = resolve(padding.to(dtype), 3, 4)
        assert got is not None
        assert (got.dtype, got.shape) == (torch.bool, (2, 1, 1, 4))
        assert torch.equal(got[:, 0, 0], padding.bool())
    added = torch.randn(3, 4)
    assert torch.equal(resolve(added, 3, 4), added[None, None])
    for shape in ((1, 1, 3, 4), (2, 5, 3, 4), (2, 1, 1, 4), (1, 5, 3, 1)):
        for mask in (torch.randn(shape), torch.randn(shape) > 0):
            assert resolve(mask, 3, 4) is mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5).bool(), r"must be \(B, N_k\), N_k = 4 with cached keys; got \(2, 5\)"),
        (torch.ones(2, 4), r"must be \(N_q, N_k\) = \(3, 4\), got \(2, 4\); a padding mask \(B, N_k\) is boolean or integer"),
        (torch.ones(1, 1, 3, 5), r"\(1, 1, 3, 5\) is not broadcastable to \(B, H, 3, 4\)"),
        (torch.ones(1, 1, 2, 4).bool(), r"\(1, 1, 2, 4\) is not broadcastable to \(B, H, 3, 4\)"),
        (torch.ones(1, 1, 3, 4).long(), r"must be .* got torch.int64 \(1, 1, 3, 4\)"),
        (torch.ones(2, 3, 4).bool(), r"got torch.bool \(2, 3, 4\)"),
        (torch.ones(4).bool(), r"got torch.bool \(4,\)"),
    ],
)
def test_masks_of_no_form(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        base.resolve_attention_mask(mask, 3, 4)


# --- rotations --------------------------------------------------------------------------------------------------------------------


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    x, (cos, sin) = heads(), rotary_tables(5, 6, "interleaved")
    phase = torch.polar(torch.ones(5, 3), torch.atan2(sin, cos)[:, ::2])
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * phase).flatten(-2)
    torch.testing.assert_close(base.apply_rotary(x, (cos, sin), "interleaved"), want)


def test_half_layout_is_hugging_faces() -> None:
    q, k = heads(), heads(num_heads=2)
    cos, sin = (t.expand(2, -1, -1) for t in rotary_tables(5, 6))
    for got, want in zip((base.apply_rotary(t, (cos, sin)) for t in (q, k)), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(got, want)


def test_layouts_are_the_same_rotation_of_other_channels() -> None:
    x = heads()
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # half -> interleaved
    want = base.apply_rotary(x, rotary_tables(5, 6, "half"), "half")[..., order]
    torch.testing.assert_close(base.apply_rotary(x[..., order], rotary_tables(5, 6, "interleaved"), "interleaved"), want)


def test_rotations_broadcast_and_keep_the_dtype() -> None:
    x = heads().bfloat16()
    tables = rotary_tables(5, 6)
    assert base.apply_rotary(x, tables).dtype == torch.bfloat16
    each_sample = tuple(torch.stack([t, 2 * t]) for t in tables)
    torch.testing.assert_close(base.apply_rotary(x, each_sample)[1], 2 * base.apply_rotary(x, tables)[1])
    one_position = tuple(t[2:3] for t in tables)
    torch.testing.assert_close(base.apply_rotary(x, one_position)[:, :, 2], base.apply_rotary(x, tables)[:, :, 2])


@pytest.mark.parametrize("shape", [(4, 6), (5, 8), (3, 5, 6), (2, 4, 6), (6,), (1, 1, 5, 6)])
def test_rotations_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"with B = 2, N = 5, head_dim = 6; got"):
        base.apply_rotary(heads(), (torch.ones(shape), torch.ones(shape)))


def test_rotations_of_two_shapes_or_odd_width() -> None:
    with pytest.raises(ValueError, match="position_embeddings must be"):
        base.apply_rotary(heads(), (torch.ones(5, 6), torch.ones(1, 6)))
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        base.apply_rotary(heads(dim=7), (torch.ones(5, 7), torch.ones(5, 7)))


# --- attend and the cache ---------------------------------------------------------------------------------------------------------


def test_attend() -> None:
    q, k, v = heads(), heads(length=7), heads(length=7, dim=3)
    torch.testing.assert_close(base.attend(Toy(), q, k, v), explicit(q, k, v))
    torch.testing.assert_close(base.attend(Toy(), q, k, v, scale=0.3), explicit(q, k, v, scale=0.3))
    last_at_last = torch.ones(5, 7).tril(2).bool()
    torch.testing.assert_close(base.attend(Toy(is_causal=True), q, k, v), explicit(q, k, v, last_at_last))
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    both = last_at_last & padding.bool()[:, None, None]
    torch.testing.assert_close(base.attend(Toy(is_causal=True), q, k, v, attention_mask=padding), explicit(q, k, v, both))


def test_attend_drops_in_training_only() -> None:
    q, k, v = heads(), heads(), heads()
    module = Toy(attn_drop=0.5)
    assert not torch.allclose(base.attend(module, q, k, v), explicit(q, k, v))
    torch.testing.assert_close(base.attend(module.eval(), q, k, v), explicit(q, k, v))


def test_attend_shares_key_value_heads() -> None:
    q, k, v = heads(), heads(num_heads=2), heads(num_heads=2)
    want = explicit(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(base.attend(Toy(), q, k, v), want)


@pytest.mark.parametrize("argument", ["position_embeddings", "past_key_values"])
def test_cross_attention_takes_neither_rotations_nor_cache(argument: str) -> None:
    value = rotary_tables(5, 6) if argument == "position_embeddings" else DynamicCache()
    with pytest.raises(ValueError, match="cross attention takes neither"):
        base.attend(Toy(), heads(), heads(), heads(), cross=True, **{argument: value})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [None, "seen", "full", "bias"])
def test_static_and_dynamic_caches_agree(is_causal: bool, masked: str | None) -> None:
    """Chunk by chunk, whatever the mask; the part of a static cache that is not filled yet is never seen."""
    module, q, k, v = Toy(is_causal=is_causal).eval(), heads(length=7), heads(length=7), heads(length=7)
    static, dynamic = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=10), DynamicCache()
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        chunk = tuple(t[:, :, start:stop] for t in (q, k, v))
        seen = torch.arange(10)[:stop].remainder(3).ne(1).expand(2, -1)
        if masked == "bias":
            seen = torch.randn(1, 4, stop - start, stop)
        full = torch.ones(2, 10, dtype=torch.bool)
        full[:, :stop] = seen if masked == "full" else True
        for_static = {None: None, "seen": seen, "full": full, "bias": seen}[masked]
        a = base.attend(module, *chunk, past_key_values=dynamic, attention_mask=None if masked is None else seen)
        b = base.attend(module, *chunk, past_key_values=static, attention_mask=for_static)
        torch.testing.assert_close(b, a)
        if stop == 7 and masked is None:
            allowed = torch.ones(3, 7).tril(4).bool() if is_causal else None
            torch.testing.assert_close(a, explicit(chunk[0], k, v, allowed))


def test_a_static_cache_that_is_full_needs_no_mask() -> None:
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=5)
    k, v, mask = base.extend_cache(Toy(is_causal=True), cache, heads(), heads())
    assert (k.shape[2], v.shape[2], mask) == (5, 5, None)


def test_layers_of_a_cache_are_apart() -> None:
    cache = DynamicCache()
    for layer, length in ((0, 3), (1, 5)):
        base.extend_cache(Toy(layer_idx=layer), cache, heads(length=length), heads(length=length))
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (3, 5)
    with pytest.raises(ValueError, match="set `layer_idx` on the module, 0 for the first layer"):
        base.extend_cache(Toy(layer_idx=None), cache, heads(), heads())


class Adapted(nn.Linear):
    """What LoRA does to a projection: its weight alone does not say what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Adapted])
def test_project_qkv(kind: type[nn.Linear], bias: bool) -> None:
    qkv, x, context = kind(4, 14, bias=bias), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    sizes = (8, 4, 2)
    for own, other in ((x, None), (x, context)):
        q, k, v = base.project_qkv(qkv, own, other, sizes)
        source = own if other is None else other
        torch.testing.assert_close(q, qkv(own)[..., :8])
        torch.testing.assert_close(k, qkv(source)[..., 8:12])
        torch.testing.assert_close(v, qkv(source)[..., 12:])


# --- modules ----------------------------------------------------------------------------------------------------------------------


def test_reset_reaches_every_depth() -> None:
    module = Toy()
    make_generic(module)
    module.reset_parameters()
    norm = module.nested[1][0]
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm.bias, torch.zeros(4))
    bound = 4**-0.5
    assert all(p.abs().max() <= bound for linear in (module.proj, module.nested[0]) for p in linear.parameters())


def test_copies_leave_the_graph_of_the_last_forward_behind() -> None:
    module = Toy()
    module.aux_loss = module.proj.weight.sum()
    module.note = torch.ones(2)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.aux_loss is None
        assert torch.equal(copied.note, module.note)
        assert torch.equal(copied.proj.weight, module.proj.weight)
    assert module.aux_loss is not None, "the original keeps it"


def test_auxiliary_loss() -> None:
    model = nn.Sequential(Toy(), nn.Linear(4, 4), nn.Sequential(Toy(), Toy()))
    assert az.auxiliary_loss(model) == 0
    model[0].aux_loss = model[0].proj.weight.sum()
    model[2][0].aux_loss = 2 * model[2][0].proj.weight.bfloat16().sum()
    model[2][1].aux_loss = None
    loss = az.auxiliary_loss(model)
    torch.testing.assert_close(loss, (model[0].aux_loss + model[2][0].aux_loss.float()) / 2)
    loss.backward()
    torch.testing.assert_close(model[0].proj.weight.grad, torch.full((4, 4), 0.5))
    torch.testing.assert_close(az.auxiliary_loss(model[2][0]), model[2][0].aux_loss.float(), msg="a bare layer: its own")
    assert az.auxiliary_loss(nn.Identity()) == 0
    assert az.auxiliary_loss(nn.Linear(2, 2, device="meta")).device.type == "meta"
