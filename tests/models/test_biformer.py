"""BiFormer and BiFormer-STL: sizes and costs of the variants, every option against the formula, timm's interface, dense maps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
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
    giga_multiply_adds,
    parameters_of,
    small_model,
)
from torch import Tensor, nn
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention import BiLevelRoutingAttention, LepeAttention, MultiHeadAttention

NAMES = ["biformer", "biformer_base", "biformer_small", "biformer_stl", "biformer_stl_nchw", "biformer_tiny"]
SIZES = {
    "biformer": (13_142_760, 2.216),
    "biformer_tiny": (13_142_760, 2.216),
    "biformer_small": (25_536_232, 4.464),
    "biformer_base": (56_804_968, 9.759),
    "biformer_stl": (28_372_552, 4.574),
    "biformer_stl_nchw": (28_372_552, 4.574),
}
TINY: dict[str, Any] = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "head_dim": 8, "num_classes": 5}
LAYOUTS: dict[str, dict[str, Any]] = {
    "biformer": {**TINY, "n_win": 2, "topks": (1, 2, 3, -2)},
    "biformer_stl": {**TINY, "n_wins": (2, 2, 2, 2), "topks": (1, 2, 3, -2)},
    "biformer_stl_nchw": {**TINY, "n_wins": (2, 2, 2, 2), "topks": (1, 2, 3, -1)},
}
each_layout = pytest.mark.parametrize("name", list(LAYOUTS))


def tiny(name: str = "biformer", **options: Any) -> Any:
    return small_model(name, **{**LAYOUTS[name], **options})


# --- the published variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    assert parameters_of(name) == SIZES[name][0]


@pytest.mark.parametrize("name", slow_but({"biformer_tiny", "biformer_stl_nchw"}, [n for n in NAMES if n != "biformer"]))
def test_multiply_adds(name: str) -> None:
    """Products of matrices and convolutions, as measured on the official code."""
    assert giga_multiply_adds(name) == pytest.approx(SIZES[name][1], abs=0.0006)


def test_registered() -> None:
    check_registered("biformer*", NAMES, license="mit", paper="2303.08810", origin="https://github.com/rayleizhu/BiFormer")
    smallest = timm.get_pretrained_cfg("biformer_stl_nchw").min_input_size
    assert tuple(smallest) == (3, 112, 112)
    assert az.create_model("biformer_stl_nchw", depths=(1, 1, 1, 1))(torch.randn(1, *smallest)).shape == (1, 1000)


def test_layout_of_biformer() -> None:
    model = az.create_model("biformer_base", device="meta")
    attentions = [[block.attn for block in stage] for stage in model.stages]
    for stage, heads, topk in zip(attentions, (3, 6, 12), (1, 4, 16), strict=False):
        assert {(a.num_heads, a.topk, a.n_win, a.side_dwconv, a.pad_mode) for a in stage} == {(heads, topk, (7, 7), 5, "mask")}
        assert all(a.scale == (32 * heads) ** -0.5 for a in stage)
    assert {(a.num_heads, a.head_dim, a.lepe_on, a.qkv.bias) for a in attentions[3]} == {(8, 96, "x", None)}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    assert not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())


def test_layouts_of_stl() -> None:
    for name, last, pad_mode in (("biformer_stl", "x", "mask"), ("biformer_stl_nchw", "v", "qkv")):
        model = az.create_model(name, device="meta", side_dwconv=3)
        attentions = [[block.attn for block in stage.blocks] for stage in model.stages]
        for stage, heads, topk in zip(attentions, (3, 6, 12), (1, 4, 16), strict=False):
            assert {(a.num_heads, a.topk, a.side_dwconv, a.pad_mode) for a in stage} == {(heads, topk, 3, pad_mode)}
        kernel = 5 if last == "v" else 3
        assert {(a.num_heads, a.lepe_on, a.side_dwconv) for a in attentions[3]} == {(8, last, kernel)}


@pytest.mark.parametrize("name", NAMES[2:5])
def test_initialisation(name: str) -> None:
    model = az.create_model(name)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for key, linear in linears:
        if name == "biformer_stl_nchw" and key != "head":  # 1x1 convolutions there, with PyTorch's start
            assert linear.weight.std().item() == pytest.approx((3 * linear.in_features) ** -0.5, rel=0.1)
        else:
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert linear.bias is None or not linear.bias.any()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        assert conv.weight.std().item() == pytest.approx((3 * conv.weight[0].numel()) ** -0.5, rel=0.15)


# --- forward ----------------------------------------------------------------------------------------------------------------------


def map_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W), written out."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def pixelwise(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def mix(attn: Any, x: Tensor) -> Tensor:
    """What a block's `attn` gives for a map; the mechanisms are tested for themselves."""
    if isinstance(attn, (BiLevelRoutingAttention, LepeAttention, MultiHeadAttention)):
        place = {} if isinstance(attn, MultiHeadAttention) else {"grid_size": tuple(x.shape[2:])}
        return attn(x.flatten(2).transpose(1, 2), **place).transpose(1, 2).reshape(x.shape)
    one, two, three = attn.children()
    x = F.conv2d(x, one.weight, one.bias)
    x = F.conv2d(x, two.weight, two.bias, padding=2, groups=x.shape[1])
    return F.conv2d(x, three.weight, three.bias)


def block_by_formula(block: Any, x: Tensor, pre_norm: bool) -> Tensor:
    if block.pos_embed is not None:
        x = x + F.conv2d(x, block.pos_embed.weight, block.pos_embed.bias, padding=1, groups=x.shape[1])

    def mlp(t: Tensor) -> Tensor:
        t = pixelwise(block.mlp[0], t)
        if hasattr(block.mlp[1], "dwconv"):
            t = F.conv2d(t, block.mlp[1].dwconv.weight, block.mlp[1].dwconv.bias, padding=1, groups=t.shape[1])
        return pixelwise(block.mlp[-1], F.gelu(t))

    for norm, gamma, branch in ((block.norm1, block.gamma1, lambda t: mix(block.attn, t)), (block.norm2, block.gamma2, mlp)):
        out = branch(map_norm(norm, x) if pre_norm else x)
        x = x + (out if gamma is None else gamma[:, None, None] * out)
        x = x if pre_norm else map_norm(norm, x)
    return x


def by_formula(model: Any, x: Tensor, pre_norm: bool = True) -> list[Tensor]:
    """Maps of the stages, and logits, on maps (B, C, H, W) as the official code has them."""
    found = []
    for i, stage in enumerate(model.stages):
        for layer in model.downsample_layers[i]:
            x = layer(x)
        for block in getattr(stage, "blocks", stage):
            x = block_by_formula(block, x, pre_norm)
        found.append(x)
    return [*found, model.head(model.norm(x).mean((2, 3)))]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("biformer", {}),
    ("biformer", {"layer_scale_init": 0.5}),
    ("biformer", {"pre_norm": False, "layer_scale_init": 0.5}),
    ("biformer", {"pre_norm": False, "mlp_dwconv": True}),
    ("biformer", {"pos_dwconv": 0, "side_dwconv": 3, "mlp_ratios": (1, 1.5, 2, 3)}),
    ("biformer", {"topks": (0, -1, -2, 2), "qk_dims": (8, 16, 24, 64)}),
    ("biformer", {"kv_downsample": "ada_avgpool", "kv_per_wins": (4, 2, 1, -1)}),
    ("biformer", {"soft_routing": True, "diff_routing": True, "param_routing": True, "qk_scale": 0.5}),
    ("biformer", {"attention": "mha"}),
    ("biformer_stl", {}),
    ("biformer_stl", {"side_dwconv": 3, "pad_mode": "input", "n_wins": (3, 2, 1, 1)}),
    ("biformer_stl_nchw", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_against_the_formula(name: str, options: dict[str, Any]) -> None:
    size = (64, 96) if "kv_downsample" in options else (64, 80)
    model, x = tiny(name, **options).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    want = by_formula(model, x, options.get("pre_norm", True))
    maps = model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip([*maps, model(x)], want, strict=True):
        close(a, b, 1e-9)
    for key, value in options.items():  # the options arrived
        if key in ("qk_scale", "pad_mode", "soft_routing", "param_routing"):
            assert (
                getattr(model.stages[0][0].attn if name == "biformer" else model.stages[0].blocks[0].attn, key.removeprefix("qk_"))
                == value
            )


@each_layout
@pytest.mark.parametrize("size", [(64, 64), (58, 46), (70, 130)])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    model, x = tiny(name), torch.randn(2, 3, *size)
    grid = [-(-side // 4) for side in size] if name == "biformer" else [side // 4 for side in size]
    for _ in range(3):
        grid = [-(-side // 2) for side in grid] if name == "biformer" else [side // 2 for side in grid]
    assert model.forward_features(x).shape == (2, 32, *grid)
    close(model(x)[:1], model(x[:1]))


def test_images_with_fewer_tokens_than_regions() -> None:
    x, n_wins = torch.randn(1, 3, 58, 46), (2, 2, 3, 1)  # three rows and two columns in stage 2
    assert tiny("biformer_stl", n_wins=n_wins)(x).shape == (1, 5)
    with pytest.raises(ValueError, match=r"pad_mode='qkv'.*at least \(3, 3\), got \(3, 2\)"):
        tiny("biformer_stl_nchw", n_wins=n_wins)(x)


@each_layout
def test_gradient_at_batch_size_one(name: str) -> None:
    """Against the same image twice: torch 2.15's batch normalisation on the CPU is wrong for one sample in some layouts."""
    for mode in (False, True):
        model, x = tiny(name).double().train(mode), torch.randn(1, 3, 64, 64, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(model(torch.cat([leaf, leaf]))[0].square().sum() * (2 if mode else 1), leaf)
        leaf = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
        if not mode:  # statistics of two samples have a part in both outputs
            close(got, want, 1e-9)
        direction, step = torch.randn_like(x), 1e-6
        with torch.no_grad():
            ends = [model(x + sign * step * direction).square().sum() for sign in (1, -1)]
        close((ends[0] - ends[1]) / (2 * step), (got * direction).sum(), 1e-4)


@each_layout
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    check_gradient_checkpointing(partial(tiny, name))


@pytest.mark.parametrize("name", slow_but(1, LAYOUTS))
def test_compiles_to_one_graph(name: str) -> None:
    options = {key: (*value[:1], *value[3:]) for key, value in LAYOUTS[name].items() if isinstance(value, tuple)}
    check_one_graph(tiny(name, **options, mlp_ratios=(2, 2)), torch.randn(2, 3, 28, 20))  # a routed stage, and the last


def test_drop_path_grows() -> None:
    model = az.create_model("biformer_small", device="meta", drop_path_rate=0.15)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx(torch.linspace(0, 0.15, 30).tolist())


# --- timm's interface -------------------------------------------------------------------------------------------------------------


@each_layout
def test_head(name: str) -> None:
    check_head(partial(tiny, name))
    assert tiny(name, img_size=96)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@each_layout
def test_intermediates(name: str) -> None:
    model, x = tiny(name), torch.randn(2, 3, 64, 96)
    norm, final = model.norm, model.forward_features(x)
    maps = check_intermediates(model, x, [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)])
    close(final, norm(maps[3]))
    assert not any(n.startswith(("stages.3", "downsample_layers.3", "norm", "head")) for n, _ in model.named_parameters())


@each_layout
def test_parameter_groups(name: str) -> None:
    model = tiny(name)
    block = "blocks." if "stl" in name else ""
    order = [
        "downsample_layers.0.0.weight",
        f"stages.0.{block}0.norm2.weight",
        f"downsample_layers.1.{1 if 'stl' in name else 0}.weight",
        f"stages.1.{block}0.attn.qkv.weight",
        f"stages.2.{block}0.attn.qkv.weight",
        f"stages.2.{block}1.mlp.0.weight",
        f"stages.3.{block}0.attn.lepe.weight",
    ]
    scale = check_layer_decay(model, order, len(order))
    assert scale["norm.weight"] == scale["head.weight"] == 1 or scale["norm.weight"] >= scale[order[-1]]
    assert model.no_weight_decay() == set()


def test_bad_arguments() -> None:
    for name, options, message in (
        ("biformer", {"depths": (1, 1, 2)}, r"one entry for each stage.*depths=\(1, 1, 2\)"),
        ("biformer_stl", {"n_wins": (7, 7)}, r"one entry for each stage.*n_wins=\(7, 7\)"),
        ("biformer", {"topks": (1, 4, 16, -3)}, r"topks.*one of -2, -1, 0; got -3"),
        ("biformer_stl", {"topks": (1, 4, 16, -1)}, r"topks.*one of -2; got -1"),
        ("biformer_stl_nchw", {"topks": (1, 4, 16, -2)}, r"topks.*one of -1; got -2"),
        ("biformer_stl", {"topks": (0, 4, 16, -2)}, r"topks.*one of -2; got 0"),
        ("biformer", {"pos_dwconv": 5}, r"pos_dwconv must be 3.*or 0; got 5"),
        ("biformer", {"layer_scale_init": -1}, r"layer_scale_init.*None for no factors; got -1"),
        ("biformer_stl", {"variant": "nhwc"}, r"variant must be one of 'legacy', 'nchw'; got 'nhwc'"),
        ("biformer", {"head_dim": 5}, r"num_heads"),
        ("biformer", {"attention": "dtm"}, r"'dtm' cannot stand in BiFormer"),
        ("biformer", {"out_norm": "layernorm2d"}, r"out_norm belongs to features_only=True"),
        ("biformer", {"out_indices": (0, 1)}, r"out_indices belongs to features_only=True"),
        ("biformer", {"features_only": True, "out_norm": "batchnorm"}, r"out_norm must be 'layernorm2d' or None, got 'batchnorm'"),
        ("biformer", {"kv_downsample": "ada_maxpool"}, r"kv_per_win.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(name, **options)


def test_layer_scale_may_start_at_a_whole_number() -> None:
    model = az.create_model("biformer", **LAYOUTS["biformer"], layer_scale_init=1)
    assert torch.equal(model.stages[0][0].gamma1, torch.ones(8))


# --- dense backbone ---------------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,), (-1,), 2])
def test_feature_maps(name: str, indices: Any) -> None:
    backbone = az.create_model(name, features_only=True, out_indices=indices, **LAYOUTS[name]).eval()
    check_feature_maps(tiny(name), backbone, torch.randn(2, 3, 64, 96), indices)


@each_layout
def test_norms_of_the_maps(name: str) -> None:
    """On the returned maps only: the next stage is given the map as it was."""
    x = torch.randn(1, 3, 64, 64)
    plain = tiny(name, features_only=True)
    normed = tiny(name, features_only=True, out_norm="layernorm2d")
    assert not set(plain.state_dict()) - set(normed.state_dict())
    normed.load_state_dict(plain.state_dict(), strict=False)
    for i, (a, b) in enumerate(zip(plain(x), normed(x), strict=True)):
        close(map_norm(normed.extra_norms[f"{i}"], a), b)
    some = tiny(name, features_only=True, out_norm="layernorm2d", out_indices=(1, 3))
    assert {n.split(".")[1] for n in some.state_dict() if n.startswith("extra_norms")} == {"1", "3"}


def test_parameters_of_the_dense_backbone() -> None:
    model = az.create_model("biformer_small", device="meta", features_only=True, out_norm="layernorm2d", pad_mode="input", n_win=16)
    assert sum(p.numel() for p in model.parameters()) == 25_024_128


def test_weights_do_not_depend_on_the_regions() -> None:
    model, finer = tiny(), tiny(n_win=4)
    finer.load_state_dict(model.state_dict())
    assert finer(torch.randn(1, 3, 64, 64)).shape == (1, 5)


# --- other mechanisms -------------------------------------------------------------------------------------------------------------


@each_layout
def test_another_mechanism(name: str) -> None:
    model = tiny(name, attention="mha", attention_kwargs={"qk_norm": True}, drop_path_rate=0.1, attn_drop_rate=0.1)
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert [a.num_heads for a in attentions] == [1, 2, 3, 3, 8]
    assert {a.attn_drop for a in attentions} == {0.1}
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(name, attention_kwargs={"no_such_option": 1})
    options = tiny(name, attention_kwargs={"topk": 1}, proj_drop_rate=0.2)
    assert {m.topk for m in options.modules() if isinstance(m, BiLevelRoutingAttention)} == {1}
    assert {m.proj_drop.p for m in options.modules() if isinstance(m, (BiLevelRoutingAttention, LepeAttention))} == {0.2}
