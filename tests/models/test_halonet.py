"""HaloNet: sizes and costs of the paper's family and of timm's networks, timm's outputs, timm's interface, other mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from marks import slow_but
from model_case import check_gradient_checkpointing, check_one_graph, close, make_generic, small_model
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.attention import HaloAttention, MultiHeadAttention
from attention_zoo.models.halonet import HaloBlock, MapAttention, holds_halo_attention

# Name -> millions of parameters, giga multiply-adds, side of the image.
PAPER = {
    "halonet_paper_h0": (5.50, 2.35, 256),
    "halonet_paper_h1": (8.10, 2.99, 256),
    "halonet_paper_h2": (9.41, 3.31, 256),
    "halonet_paper_h3": (11.84, 6.18, 320),
    "halonet_paper_h4": (19.10, 12.0, 384),
    "halonet_paper_h5": (30.72, 32.2, 448),
    "halonet_paper_h6": (43.46, 52.8, 512),
    "halonet_paper_h7": (67.43, 109, 600),
}
TIMM = {
    "halonet_h1": (8.10, 3.00, 256),
    "halonet26t": (12.48, 3.19, 256),
    "halonet50ts": (22.73, 5.30, 256),
    "sehalonet33ts": (13.69, 3.55, 256),
    "eca_halonext26ts": (10.76, 2.44, 256),
    "haloregnetz_b": (11.68, 1.97, 224),
    "lamhalobotnet50ts_256": (22.57, 5.02, 256),
    "halo2botnet50ts_256": (22.64, 5.02, 256),
}
QUICK = {"halonet26t", "haloregnetz_b", "lamhalobotnet50ts_256"}  # of them
TINY: dict[str, Any] = {
    "blocks": [
        {"type": "bottle", "d": 1, "c": 16, "s": 1, "br": 0.5},
        [{"type": "self_attn", "d": 1, "c": 24, "s": 2, "br": 0.5}, {"type": "bottle", "d": 1, "c": 24, "br": 0.5}],
        {"type": "self_attn", "d": 2, "c": 32, "s": 2, "br": 0.5, "self_attn_kwargs": {"block_size": 2, "num_heads": 4}},
    ],
    "stem_chs": 8,
    "stem_type": "tiered",
    "stem_pool": "",
    "act_layer": "silu",
    "num_features": 40,
    "self_attn_kwargs": {"block_size": 4, "halo_size": 1, "num_heads": 2},
    "num_classes": 5,
}


def tiny(**options: Any) -> Any:
    return small_model("halonet", **{**TINY, **options})


def layers_of(model: nn.Module) -> list[HaloAttention]:
    return [m for m in model.modules() if isinstance(m, HaloAttention)]


# --- the published variants -------------------------------------------------------------------------------------------------------


def multiply_adds(model: nn.Module, side: int) -> int:
    """Products of convolutions, linear layers and halo attention, where both position tables are multiplied whole."""
    total = 0

    def count(module: Any, inputs: tuple[Tensor], out: Tensor) -> None:
        nonlocal total
        if isinstance(module, HaloAttention):
            queries = [-(-n // module.query_stride) for n in inputs[0].shape[2:]]
            keys = module.win_size**2 * (module.head_dim + module.value_dim)
            positions = 2 * (2 * module.win_size - 1) * module.head_dim
            total += queries[0] * queries[1] * module.num_heads * (keys + positions)
        else:
            total += out.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, HaloAttention)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize("name", slow_but(1, PAPER))
def test_the_papers_family(name: str) -> None:
    millions, giga, side = PAPER[name]
    model = az.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert multiply_adds(model, side) / 1e9 == pytest.approx(giga, rel=0.003)
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    assert model.pretrained_cfg["pool_size"] == (-(-side // 32), -(-side // 32))
    assert [next(iter(layers_of(stage))).num_heads for stage in model.stages] == [4, 8, 8, 8]
    assert all(layer.mask_padding for layer in layers_of(model))


@pytest.mark.parametrize("name", slow_but(QUICK, TIMM))
def test_timms_networks(name: str) -> None:
    millions, giga, side = TIMM[name]
    with torch.device("meta"):
        model = az.create_model(name, attention="halo", **({"img_size": side} if name.endswith("_256") else {})).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    if "bot" not in name:  # lambda layers and bottleneck attention are not counted here
        assert multiply_adds(model, side) / 1e9 == pytest.approx(giga, rel=0.011)  # the table has normalisations and more


def test_names() -> None:
    names = az.list_models("halonet*")
    assert names == ["halonet", *PAPER]
    for name in names:
        config = timm.get_pretrained_cfg(name)
        assert timm.is_model(name)
        assert not config.has_weights
        assert "2103.12731" in config.paper_ids
    assert not set(TIMM) & set(az.list_models())
    assert all(holds_halo_attention(name) for name in (*TIMM, "halonet26t.a1h_in1k"))
    assert not any(holds_halo_attention(name) for name in ("botnet26t_256", "resnet10t", "vit_tiny_patch16_224"))


def test_layout_of_the_paper() -> None:
    model = az.create_model("halonet_paper_h5", device="meta")
    assert [len(stage) for stage in model.stages] == [3, 3, 23, 3]
    block = model.stages[1][0]
    assert isinstance(block, HaloBlock)
    assert (block.conv1_1x1.conv.out_channels, block.self_attn.dim_out, block.conv3_1x1.conv.out_channels) == (128, 320, 256)
    assert (block.self_attn.head_dim, block.self_attn.value_dim, block.self_attn.stride) == (16, 40, 2)
    assert block.post_attn.num_features == 320
    assert tuple(block.self_attn.kv.weight.shape) == (128 + 320, 128, 1, 1)
    assert model.final_conv.conv.out_channels == 1536


# --- timm's weights and outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(QUICK, TIMM))
def test_computes_what_timm_does(name: str) -> None:
    side = TIMM[name][2]
    options = {"num_classes": 3, **({"img_size": side} if name.endswith("_256") else {})}
    theirs = timm.create_model(name, **options)
    make_generic(theirs)
    ours = az.create_model(name, attention="halo", **options)
    assert not any(isinstance(m, HaloAttn) for m in ours.modules())
    assert len(layers_of(ours)) == sum(isinstance(m, HaloAttn) for m in theirs.modules())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        want = theirs.eval()(x)
        close(ours.eval()(x) / want.abs().max(), want / want.abs().max(), 1e-4)


def test_timms_initial_weights_stay() -> None:
    models = []
    for options in ({}, {"attention": "halo"}):
        torch.manual_seed(0)
        models.append(az.create_model("haloregnetz_b", **options).state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


def test_options_for_timms_networks() -> None:
    model = az.create_model("halonet26t", attention="halo", attention_kwargs={"mask_padding": True}, num_classes=3).eval()
    assert model(torch.randn(1, 3, 100, 70)).shape == (1, 3)
    maps = az.create_model("halonet26t", attention="halo", features_only=True).eval()(torch.randn(1, 3, 256, 256))
    assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]
    with pytest.raises(ValueError, match="belong to halo attention"):
        az.create_model("halonet26t", attention="mha", pretrained=True)
    with pytest.raises(ValueError, match="cannot stand in a HaloNet"):
        az.create_model("halonet26t", attention="dtm")
    with pytest.raises(ValueError, match=r"4 x 4.*\(7, 7\)|do not divide"):
        az.create_model("halonet26t", attention="halo").eval()(torch.randn(1, 3, 224, 224))


def test_pretrained_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))  # nothing downloads
    assert layers_of(az.create_model("halonet26t", attention="halo", pretrained=True))
    with pytest.raises(ValueError, match=r"halo_size.*pos_embed\.height_rel, pos_embed\.width_rel"):
        az.create_model("halonet26t", attention="halo", attention_kwargs={"halo_size": 3}, pretrained=True)


# --- forward ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 17)])
def test_any_image_size_with_masked_padding(size: tuple[int, int]) -> None:
    model, x = tiny(attention_kwargs={"mask_padding": True}), torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == (2, 40, *(-(-side // 16) for side in size))


def test_gradient_checkpointing_changes_nothing() -> None:
    check_gradient_checkpointing(tiny)


def test_compiles_to_one_graph() -> None:
    check_one_graph(tiny(blocks=TINY["blocks"][:2]), torch.randn(2, 3, 64, 64), backend="eager")


def test_timms_interface() -> None:
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1:] for m in maps] == [(8 // 2, 32, 32), (16, 16, 16), (24, 8, 8), (40, 4, 4)]
    close(final, model.forward_features(x))
    close(model(x), model.forward_head(final))
    backbone = az.create_model("halonet", features_only=True, **TINY)
    assert backbone.feature_info.reduction() == [2, 4, 8, 16]
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert tiny(num_classes=0, in_chans=1)(x[:, :1]).shape == (2, 40)
    assert set(model.group_matcher()) == {"stem", "blocks"}


def test_initialisation() -> None:
    model = az.create_model("halonet", **TINY)
    layer = layers_of(model)[1]
    assert layer.q.weight.std().item() == pytest.approx(16**-0.5, rel=0.2)  # the layer's own, not that of convolutions
    assert not model.stages[1][0].conv3_1x1.bn.weight.any()
    assert model.stages[1][0].post_attn.weight.all()


# --- other layers and mechanisms --------------------------------------------------------------------------------------------------


def test_configurations() -> None:
    model = tiny()
    assert [(layer.win_size, layer.num_heads, layer.stride) for layer in layers_of(model)] == [(6, 2, 2), (8, 4, 2), (8, 4, 1)]
    wide = tiny(self_attn_kwargs={"block_size": 4, "num_heads": 2, "value_ratio": 2.0, "dim_head": 3})
    assert (layers_of(wide)[0].dim_out, layers_of(wide)[0].head_dim) == (32, 3)
    assert wide(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    mixed = {
        "blocks": [
            {
                "type": "self_attn",
                "d": 1,
                "c": 16,
                "s": 1,
                "br": 0.5,
                "self_attn_layer": "halo",
                "self_attn_kwargs": {"num_heads": 2},
            },
            {
                "type": "self_attn",
                "d": 1,
                "c": 16,
                "s": 2,
                "br": 0.5,
                "self_attn_layer": "bottleneck",
                "self_attn_kwargs": {"num_heads": 2},
            },
        ],
        "self_attn_layer": None,
        "attn_layer": "se",
        "img_size": 64,
    }
    model = tiny(**mixed)
    assert [type(m).__name__ for m in model.modules() if type(m).__name__ in {"HaloAttention", "BottleneckAttn"}] == [
        "HaloAttention",
        "BottleneckAttn",
    ]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("attention", ["mha", "hilo"])
def test_another_mechanism(attention: str) -> None:
    model = tiny(attention=attention)
    layers = [m for m in model.modules() if isinstance(m, MapAttention)]
    assert [(layer.stride, layer.attention.num_heads) for layer in layers] == [(2, 2), (2, 4), (1, 4)]
    assert model(torch.randn(2, 3, 50, 70)).shape == (2, 5)
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(attention_kwargs={"no_such_option": 1})


def test_another_mechanism_in_timms_network() -> None:
    model = az.create_model("halonet26t", attention="mha", num_classes=3).eval()
    assert sum(isinstance(m, MultiHeadAttention) for m in model.modules()) == 3
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)


def test_whole_grid_as_one_block_is_multi_head_attention() -> None:
    """Without positions, and where the block holds the whole map: `mha` at stride 1 with the same weights."""
    torch.manual_seed(0)
    layer = HaloAttention(8, 2, block_size=4, halo_size=0)
    plain = MapAttention(MultiHeadAttention(8, 2))
    nn.init.zeros_(layer.pos_embed.height_rel)
    nn.init.zeros_(layer.pos_embed.width_rel)
    with torch.no_grad():
        k, v = layer.kv.weight.flatten(1).view(2, 2, 4, 8).unbind(1)
        plain.attention.qkv.weight.copy_(torch.cat([layer.q.weight.flatten(1), k.flatten(0, 1), v.flatten(0, 1)]))
        plain.attention.proj.weight.copy_(layer.proj.weight)
        plain.attention.proj.bias.copy_(layer.proj.bias)
    x = torch.randn(2, 8, 4, 4)
    close(layer(x), plain(x))


def test_in_a_vision_transformer_with_a_class_token() -> None:
    options = {"img_size": 80, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    own = {"block_size": 2, "halo_size": 1, "mask_padding": True}
    model = az.create_model("vit_tiny_patch16_224", attention="halo", attention_kwargs=own, **options).eval()
    assert [layer.num_prefix_tokens for layer in layers_of(model)] == [1, 1]
    assert model(torch.randn(2, 3, 80, 80)).shape == (2, 3)
    whole = az.create_model("vit_tiny_patch16_224", attention="halo", attention_kwargs=own | {"halo_size": 4}, **options).eval()
    plain = az.create_model("vit_tiny_patch16_224", attention="mha", **options).eval()
    make_generic(plain)
    whole.load_state_dict(plain.state_dict(), strict=False)
    for block, source in zip(whole.blocks, plain.blocks, strict=True):
        block.attn = HaloAttention.from_softmax_attention(source.attn, num_prefix_tokens=1, **own | {"halo_size": 4})
    x = torch.randn(2, 3, 80, 80)
    close(whole.eval()(x), plain(x))
