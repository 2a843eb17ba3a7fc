"""MoH-DiT: parity with the official model, sizes and costs of the variants, guidance, conditions, other mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from marks import slow_but
from parity_case import load_case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo.attention import HiLoAttention, MoHAttention

# Name -> millions of parameters, giga multiply-adds for one latent image of 32 x 32, percentage of heads that are used.
VARIANTS = {
    "moh_dit_s_2_90": (33.0, 6.06, 90),
    "moh_dit_s_2_75": (33.0, 6.06, 75),
    "moh_dit_b_2_90": (130.6, 23.04, 90),
    "moh_dit_b_2_75": (130.6, 23.04, 75),
    "moh_dit_l_2_90": (458.5, 80.80, 90),
    "moh_dit_l_2_75": (458.5, 80.81, 75),
    "moh_dit_xl_2_90": (675.7, 118.76, 90),
    "moh_dit_xl_2_75": (675.7, 118.76, 75),
}
TINY: dict[str, Any] = {
    "input_size": 8,
    "dim": 16,
    "depth": 2,
    "num_heads": 4,
    "shared_heads": [2, 4],
    "routed_topk": [1, 0],
    "num_classes": 5,
    "mlp_ratio": 2.0,
}


def tiny(**options: Any) -> Any:
    """A small model whose parameters all matter: it starts as zero."""
    torch.manual_seed(0)
    model = az.create_model("moh_dit", **{**TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 2, side: int | tuple[int, int] = 8) -> tuple[Tensor, Tensor, Tensor]:
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(batch, 4, height, width), torch.rand(batch) * 1000, torch.arange(batch) % 6


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- parity -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny_mixed"])
def test_official_outputs_and_gradients(name: str) -> None:
    case = load_case(f"moh_dit/{name}")
    model, stored = az.create_model("moh_dit", **case.arguments()[1]).eval(), case.group("input")
    close(model.pos_embed, case.tensors["state.pos_embed"], 1e-7)  # a new model has the official table
    model.load_state_dict(case.convert(case.group("state")), strict=True)
    x = stored["x"].requires_grad_()
    out = model(x, stored["t"], stored["y"])
    torch.testing.assert_close(out, case.tensors["output.x"], atol=case.tolerance, rtol=0)
    (out * case.tensors["cotangent.x"]).sum().backward()
    torch.testing.assert_close(x.grad, case.tensors["grad.input"], atol=case.gradient_tolerance, rtol=0)


# --- the published variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(2, VARIANTS))
def test_variants(name: str) -> None:
    millions, giga, percentage = VARIANTS[name]
    model = az.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    x, t, y = (tensor.to("meta") for tensor in inputs(1, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(x, t, y).shape == (1, 8, 32, 32)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.006)
    layers = [m for m in model.modules() if isinstance(m, MoHAttention)]
    used = sum(m.shared_heads + m.routed_topk for m in layers) / sum(m.num_heads for m in layers)
    assert 100 * used == pytest.approx(percentage, abs=1.2)
    inner = sum(m.num_heads * m.head_dim for m in layers)
    assert inner == len(layers) * model.pos_embed.shape[-1]  # in all as the dense model has


def test_names() -> None:
    assert az.list_models("moh_dit*") == sorted(["moh_dit", *VARIANTS])
    assert not any(timm.is_model(name) for name in az.list_models("moh_dit*"))  # those are called with an image alone


def test_initialisation() -> None:
    model = az.create_model("moh_dit", **{**TINY, "dim": 64})
    assert not model(*inputs()).any()
    assert not any(block.adaLN_modulation[1].weight.any() for block in model.blocks)
    attn = model.blocks[0].attn
    for linear in (attn.qkv, attn.proj, attn.router, attn.shared_router, attn.balance):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.8 * bound < linear.weight.abs().max() <= bound
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.pos_embed.requires_grad
    assert model.no_weight_decay() == {"pos_embed"}


def test_positions() -> None:
    """The first half of the channels tells the column, the second the row."""
    table = tiny(input_size=(4, 6)).pos_embed
    fresh = az.create_model("moh_dit", **{**TINY, "input_size": (4, 6)}).pos_embed[0].unflatten(0, (2, 3))
    assert table.shape == (1, 6, 16)
    close(fresh[0, :, :8], fresh[1, :, :8])
    close(fresh[:, 0, 8:], fresh[:, 2, 8:])
    angles = 2.0 * 10000.0 ** (-torch.arange(4) / 4)
    close(fresh[0, 2, :8], torch.cat([angles.sin(), angles.cos()]))


# --- forward ----------------------------------------------------------------------------------------------------------------------


def test_conditions_matter_and_samples_are_independent() -> None:
    model, (x, t, y) = tiny(), inputs(3)
    out = model(x, t, y)
    assert not torch.allclose(model(x, t + 1, y), out, atol=1e-3)
    assert not torch.allclose(model(x, t, (y + 1) % 6), out, atol=1e-3)
    close(model(x, t.long().float(), y), model(x, t.long(), y))
    for i in range(3):
        close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]), out[i : i + 1])


def test_rectangles_and_outputs() -> None:
    model = tiny(input_size=(4, 6), learn_sigma=False, in_channels=3)
    assert model(torch.randn(2, 3, 4, 6), torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape == (2, 3, 4, 6)
    patch = tiny(patch_size=4)
    assert patch(*inputs()).shape == (2, 8, 8, 8)


def test_patches_return_to_their_places() -> None:
    model = tiny()
    tokens = torch.arange(16.0).view(1, 16, 1).expand(-1, -1, 4 * 8)
    out = model._unpatchify(tokens)
    assert torch.equal(out[0, 0, ::2, ::2], torch.arange(16.0).view(4, 4))
    channel = torch.arange(32.0).expand(1, 16, -1)  # (row, column, channel) inside a patch
    assert torch.equal(model._unpatchify(channel)[0, 3, :2, :2], torch.tensor([[3.0, 11.0], [19.0, 27.0]]))


def test_guidance() -> None:
    model, (x, t, _) = tiny(), inputs(2)
    y = torch.tensor([1, 4])
    pair = (torch.cat([x, torch.randn_like(x)]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 5)]))
    conditional, unconditional = model(x, t, y), model(x, t, torch.full_like(y, 5))
    guided = model.forward_with_cfg(*pair, 1.5)
    close(guided[:2, :3], unconditional[:, :3] + 1.5 * (conditional - unconditional)[:, :3])
    close(guided[2:, :3], guided[:2, :3])
    close(guided[:, 3:], torch.cat([conditional, unconditional])[:, 3:])
    close(model.forward_with_cfg(*pair, 1.0, guided_channels=4)[:2], conditional)
    with pytest.raises(ValueError, match="even batch, got 3"):
        model.forward_with_cfg(*(tensor[:3] for tensor in pair), 1.5)
    with pytest.raises(ValueError, match="class_dropout_prob > 0, got 0"):
        tiny(class_dropout_prob=0.0).forward_with_cfg(*pair, 1.5)


def test_labels_are_dropped_in_training() -> None:
    model, y = tiny(class_dropout_prob=0.5), torch.zeros(200, dtype=torch.long)
    table = model.y_embedder.embedding_table.weight
    assert torch.equal(model.y_embedder(y), table[:1].expand(200, -1))
    dropped = (model.train().y_embedder(y) == table[5]).all(-1)
    assert 60 < dropped.sum() < 140
    assert len(tiny(class_dropout_prob=0.0).train().y_embedder.embedding_table.weight) == 5


def test_training() -> None:
    model = tiny().train()
    out, auxiliary = model(*inputs()), az.auxiliary_loss(model)
    assert auxiliary > 0.5  # one of two layers routes: K = 1 when balanced
    (out.square().mean() + 0.01 * auxiliary).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_nothing() -> None:
    batch, results = inputs(), []
    for enable in (False, True):
        model = tiny()
        model.set_grad_checkpointing(enable)
        out = model(*batch)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, t, y = inputs()
    want = tiny()(x, t, y)
    got = tiny().to(dtype)(x.to(dtype), t, y)
    assert got.dtype == dtype
    close(got.float(), want, 1e-4 if dtype == torch.float64 else 0.2)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, batch = tiny(), inputs()
    close(torch.compile(model, fullgraph=True, backend="eager")(*batch), model(*batch))


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_heads_of_each_layer() -> None:
    model = tiny(num_heads=[2, 6], head_dim=5, shared_heads=[2, 3], routed_topk=[0, 2])
    layers = [block.attn for block in model.blocks]
    assert [(m.num_heads, m.head_dim, m.shared_heads, m.routed_topk) for m in layers] == [(2, 5, 2, 0), (6, 5, 3, 2)]
    assert tuple(layers[1].proj.weight.shape) == (16, 30)
    assert [block.attn.head_dim for block in tiny(head_dim=[5, 3]).blocks] == [5, 3]
    assert [m.routed_topk for m in (block.attn for block in tiny(shared_heads=None, routed_topk=None).blocks)] == [1, 1]
    assert tiny(attention_kwargs={"qk_norm": True}).blocks[0].attn.q_norm.weight.shape == (4,)


@pytest.mark.parametrize("attention", ["mha", "hilo"])
def test_another_mechanism(attention: str) -> None:
    model = tiny(attention=attention)
    assert isinstance(model.blocks[0].attn, HiLoAttention) == (attention == "hilo")
    assert model(*inputs()).shape == (2, 8, 8, 8)


def test_dense_is_all_heads_with_silent_routers() -> None:
    dense, routed = tiny(attention="mha"), tiny(shared_heads=2, routed_topk=2)
    state = {k: torch.zeros_like(v) for k, v in routed.state_dict().items()} | dense.state_dict()
    routed.load_state_dict(state)
    batch = inputs()
    close(routed(*batch), dense(*batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": [4, 4, 4]}, r"num_heads.*depth=2.*got 3"),
        ({"routed_topk": [1]}, r"routed_topk.*depth=2.*got 1"),
        ({"head_dim": [4]}, r"head_dim.*depth=2.*got 1"),
        ({"patch_size": 0}, r"patch_size=0 must divide"),
        ({"input_size": 9}, r"patch_size=2 must divide input_size=\(9, 9\)"),
        ({"dim": 18, "num_heads": 2, "shared_heads": 1, "routed_topk": 1}, r"dim=18.*nearest dim is 16"),
        ({"attention": "dtm"}, "cannot stand in MoH-DiT"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_inputs() -> None:
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"\(B, 4, 8, 8\), got \(2, 4, 8, 6\)"):
        tiny()(x[..., :6], t, y)
