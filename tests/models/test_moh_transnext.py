"""MoH-TransNeXt: the published sizes, timm's interface, images of every size, other mechanisms in its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import slow_but
from model_case import (
    check_feature_maps,
    check_gradient_checkpointing,
    check_head,
    check_intermediates,
    check_layer_decay,
    check_one_graph,
    check_registered,
    close,
    small_model,
)
from timm.data import resolve_data_config
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo.attention import (
    HiLoAttention,
    MoHAttention,
    MoHTransNeXtAggregated,
    MoHTransNeXtGlobal,
    MultiHeadAttention,
    set_routed_topk,
)

NAMES = ["moh_transnext", *(f"moh_transnext_{size}" for size in ("base_50", "base_75", "small_75", "small_80"))]
TINY: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "shared_heads": (2, 1, 2, 0),
    "routed_topk": (0, 1, 1, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "drop_path_rate": 0.0,
}


def tiny(**options: Any) -> Any:
    return small_model("moh_transnext", **{**TINY, **options})


def attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (MoHTransNeXtGlobal, MoHTransNeXtAggregated))]


# --- the published variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    slow_but(
        1,
        [
            ("moh_transnext_small_75", 49_910_548, 10.32),
            ("moh_transnext_small_80", 49_910_548, 10.32),
            ("moh_transnext", 90_020_632, 18.35),
            ("moh_transnext_base_75", 90_020_632, 18.35),
            ("moh_transnext_base_50", 90_023_512, 18.35),
        ],
    ),
)
def test_parameters_and_multiply_adds(name: str, parameters: int, giga: float) -> None:
    """All heads computed. The counter sees products of matrices and convolutions; the window's products are elementwise."""
    model = az.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    depths = [len(getattr(model, f"block{i}")) for i in (1, 2, 3, 4)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # the blocks of a stage are alike: one of each is counted
        az.create_model(name, device="meta", depths=(1, 1, 1, 1)).eval()(torch.empty(1, 3, 224, 224, device="meta"))
    counted = counter.get_total_flops() / 2
    for i, depth in enumerate(depths):
        block = sum(counter.get_flop_counts()[f"MoHTransNeXt.block{i + 1}.0"].values()) / 2
        width, window = model.feature_info[i]["num_chs"], 9 if i < 3 else 0
        counted += (depth - 1) * block + depth * 2 * window * width * (56 // 2**i) ** 2
    assert counted / 1e9 == pytest.approx(giga, abs=0.006)


def test_registered() -> None:
    check_registered("moh_transnext*", NAMES, license="apache-2.0", paper="2410.11842", origin="https://github.com/SkyworkAI/MoH")


@pytest.mark.parametrize(
    ("name", "shared", "topk", "rate", "active"),
    slow_but(
        2,
        [
            ("moh_transnext_small_75", (3, 6, 3, 4), (0, 0, 6, 12), 0.45, 0.75),
            ("moh_transnext_base_50", (2, 2, 2, 4), (2, 4, 6, 8), 0.60, 0.50),
            ("moh_transnext_small_80", (3, 6, 3, 8), (0, 0, 6, 12), 0.45, 0.80),
            ("moh_transnext_base_75", (4, 8, 4, 5), (0, 0, 8, 16), 0.60, 0.75),
        ],
    ),
)
def test_layout(name: str, shared: tuple[int, ...], topk: tuple[int, ...], rate: float, active: float) -> None:
    model = az.create_model(name, device="meta")
    found = attentions(model)
    stages = [{(a.shared_heads, a.routed_topk) for a in attentions(getattr(model, f"block{i}"))} for i in (1, 2, 3, 4)]
    assert stages == [{pair} for pair in zip(shared, topk, strict=True)]
    used = sum(a.shared_heads + a.routed_topk for a in found) / sum(a.num_heads for a in found)
    assert used == pytest.approx(active, abs=0.025)
    assert not any(isinstance(m, DropPath) for m in az.create_model("moh_transnext", device="meta").modules())
    ends = [m.drop_prob for n, m in model.named_modules() if n.endswith("drop_path1") and isinstance(m, DropPath)]
    assert ends == pytest.approx(torch.linspace(0, rate, len(found)).tolist()[1:])
    for i, side, ratio in ((1, 56, 8), (2, 28, 4), (3, 14, 2)):
        for layer in attentions(getattr(model, f"block{i}")):
            assert isinstance(layer, MoHTransNeXtAggregated)
            assert (layer.window_size, layer.sr_ratio, layer.pretrain_resolution) == (3, ratio, (side, side))
            assert layer.pool_grid((side, side)) == (7, 7)
    assert all(isinstance(a, MoHTransNeXtGlobal) and a.pretrain_resolution == (7, 7) for a in attentions(model.block4))
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    assert resolve_data_config(model=model)["crop_pct"] == 0.875


def test_epsilons() -> None:
    eps = {n: m.eps for n, m in tiny().named_modules() if isinstance(m, nn.LayerNorm)}
    assert {e for n, e in eps.items() if n.startswith("patch_embed") or n.endswith("attn.norm")} == {1e-5}
    assert {e for n, e in eps.items() if not (n.startswith("patch_embed") or n.endswith("attn.norm"))} == {1e-6}
    assert {m.eps for n, m in tiny(norm_eps=1e-3).named_modules() if n.endswith((".norm1", ".norm2")) or n == "norm4"} == {1e-3}


def test_initialisation() -> None:
    model = az.create_model("moh_transnext", **{**TINY, "embed_dims": (32, 32, 32, 32), "mlp_ratios": (6, 6, 6, 6)})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 500:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            assert not module.bias.any()


def test_width_of_the_gated_mlp() -> None:
    """Two thirds of a width that was rounded down before."""
    assert [tiny(mlp_ratios=(r, 2, 2, 2)).block1[0].mlp.fc2.in_features for r in (2, 2.2, 4, 0.9)] == [10, 11, 21, 4]


# --- forward ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (33, 61), (7, 130), (1, 1)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model, x = tiny(), torch.randn(2, 3, *size)
    side = [[-(-s // (4 * 2**i)) for s in size] for i in range(4)]
    maps = model.forward_intermediates(x)[1]
    assert [list(m.shape[2:]) for m in maps] == side
    assert model(x).isfinite().all()
    close(model(x[:1]), model(x)[:1])


def test_positions_are_scaled_by_pretraining() -> None:
    model, x = tiny(), torch.randn(1, 3, 96, 96)
    assert {a.pretrain_resolution for a in attentions(model.block2)} == {(8, 8)}
    larger, continued = tiny(img_size=96), tiny(img_size=96, pretrain_size=64)
    close(model(x), continued(x))
    assert (model(x) - larger(x)).abs().max() > 1e-4
    assert {a.input_resolution for a in attentions(continued.block2)} == {(12, 12)}
    close(tiny(pretrain_size=(64, 64))(x), model(x))
    assert {a.pretrain_resolution for a in attentions(tiny(img_size=20).block4)} == {(1, 1)}
    model.set_input_size((96, 64))
    assert model.img_size == (96, 64)


def test_fixed_pooled_grids() -> None:
    x = torch.randn(1, 3, 128, 128)
    at_64 = tiny(fixed_pool_size=2)
    assert {a.pool_size for a in attentions(at_64) if isinstance(a, MoHTransNeXtAggregated)} == {(2, 2)}
    close(at_64(x[..., :64, :64]), tiny()(x[..., :64, :64]))  # 16 / 8, 8 / 4 and 4 / 2
    assert (at_64(x) - tiny()(x)).abs().max() > 1e-4


def test_auxiliary_loss() -> None:
    """The mean over the layers with routed heads; a stage whose heads are all shared has none."""
    model = tiny().train()
    model(torch.randn(2, 3, 64, 64))
    losses = [a.aux_loss for a in attentions(model) if a.routed_heads]
    assert len(losses) == 4
    close(az.auxiliary_loss(model), torch.stack(losses).mean())
    (model(torch.randn(2, 3, 64, 64)).sum() + az.auxiliary_loss(model)).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert not silent
    set_routed_topk(model, [1, 1, 2, 4])
    assert [a.routed_topk for a in attentions(model)] == [0, 1, 1, 2, 4]


def test_gradient_checkpointing_changes_nothing() -> None:
    check_gradient_checkpointing(tiny)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    two = {k: v[-2:] for k, v in TINY.items() if isinstance(v, tuple)}  # stages: one of each attention
    check_one_graph(tiny(**two, sr_ratios=(2, 1), window_sizes=(3, None)), torch.randn(2, 3, 27, 21))


# --- timm's interface -------------------------------------------------------------------------------------------------------------


def test_head() -> None:
    check_head(tiny)


def test_intermediates() -> None:
    model = tiny()
    maps = check_intermediates(model, torch.randn(2, 3, 64, 64), [(8, 16, 16), (12, 8, 8), (16, 4, 4), (24, 2, 2)])
    for i, found in enumerate(maps[:3], 1):  # each ends with its stage's norm
        normed = (found.permute(0, 2, 3, 1) - getattr(model, f"norm{i}").bias) / getattr(model, f"norm{i}").weight
        close(normed.mean(-1), torch.zeros(normed.shape[:-1]), 1e-4)
    assert not any(n.split(".")[0][-1] == "4" or n.startswith("head") for n, _ in model.named_parameters())


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (-2,), 2])
def test_feature_maps(indices: Any) -> None:
    backbone = az.create_model("moh_transnext", features_only=True, out_indices=indices, **TINY).eval()
    check_feature_maps(tiny(), backbone, torch.randn(1, 3, 64, 64), indices, "model.")
    with pytest.raises(ValueError, match=r"out_indices.*features_only"):
        tiny(out_indices=[0])


def test_parameter_groups() -> None:
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    free = {
        names[id(p)]
        for group in param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        for p in group["params"]
        if group["weight_decay"] == 0
    }
    keywords = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
    want = {n for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".bias") or any(k in n for k in keywords)}
    assert free == want
    assert not any("learnable_tokens" in n or "router" in n or "balance" in n for n in free)
    order = [
        "patch_embed1.proj.weight",
        "block1.0.attn.q.weight",
        "patch_embed2.proj.weight",
        "block2.0.mlp.fc1.weight",
        "block2.1.mlp.fc1.weight",
        "norm2.weight",
        "block3.0.attn.sr.weight",
        "block4.0.attn.qkv.weight",
        "head.weight",
    ]
    check_layer_decay(model, order, len(order) - 1)  # a stage's norm goes with its last block


# --- other mechanisms and options -------------------------------------------------------------------------------------------------


def test_options_reach_the_layers() -> None:
    model = tiny(attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False, window_sizes=(5, 3, 1, None), sr_ratios=(4, 1, 2, 1))
    found = attentions(model)
    assert {(a.attn_drop, a.proj_drop.p) for a in found} == {(0.1, 0.2)}
    assert [a.window_size for a in found if isinstance(a, MoHTransNeXtAggregated)] == [5, 1]
    assert isinstance(model.block2[0].attn, MoHTransNeXtGlobal)
    assert {m.p for n, m in model.named_modules() if n.endswith(("mlp.drop1", "mlp.drop2"))} == {0.2}
    assert not any(n.endswith((".q.bias", ".kv.bias", ".qkv.bias")) for n, _ in model.named_parameters())
    assert {a.cpb_fc1.out_features for a in attentions(tiny(attention_kwargs={"cpb_hidden": 16}))} == {16}
    assert tiny(patch_size=2).forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 24, 2, 2)


def test_another_mechanism() -> None:
    x = torch.randn(2, 3, 64, 40)
    plain = tiny(attention="mha", attention_kwargs={"qk_norm": True})
    assert len([m for m in plain.modules() if isinstance(m, MultiHeadAttention)]) == 5
    assert plain(x).shape == (2, 5)
    hilo = tiny(attention="hilo", attention_kwargs={"window_size": 4})
    assert {m.window_size for m in hilo.modules() if isinstance(m, HiLoAttention)} == {4}
    assert hilo(x).shape == (2, 5)
    moh = [m for m in tiny(attention="moh").modules() if isinstance(m, MoHAttention)]  # the same heads, plain softmax attention
    assert [(m.shared_heads, m.routed_topk) for m in moh] == [(2, 0), (1, 1), (1, 1), (2, 1), (0, 2)]
    everywhere = attentions(tiny(attention="moh_transnext_global"))
    assert len(everywhere) == 5
    assert all(isinstance(a, MoHTransNeXtGlobal) for a in everywhere)
    with pytest.raises(ValueError, match="'dtm' cannot stand in MoH-TransNeXt"):
        tiny(attention="dtm")
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(attention_kwargs={"no_such_option": 1})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"one entry for each stage.*depths=\(1, 1, 2\)"):
        tiny(depths=(1, 1, 2))
    with pytest.raises(ValueError, match="at least one block"):
        tiny(depths=(1, 0, 2, 1))
    with pytest.raises(ValueError, match=r"sr_ratios.*\(0, 4, 2, 1\)"):
        tiny(sr_ratios=(0, 4, 2, 1))
    with pytest.raises(ValueError, match="window_size must be odd"):
        tiny(window_sizes=(3, 3, 4, None))
    with pytest.raises(ValueError, match="patch_size must be at least 2"):
        tiny(patch_size=1)
    with pytest.raises(ValueError, match="routed_topk must be from 1 to 3"):
        tiny(shared_heads=(2, 1, 1, 0), routed_topk=(0, 1, 0, 2))
