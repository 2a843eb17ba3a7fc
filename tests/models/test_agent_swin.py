"""Agent-Swin: the official block, timm's Swin where all blocks are softmax, windows, image sizes, the published variants."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from marks import slow_but
from model_case import AGENT_PAPER, check_registered, close, giga_multiply_adds, make_generic, parameters_of, small_model
from parity_case import load_case
from timm.data import resolve_data_config
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention import AgentAttention, HiLoAttention, MultiHeadAttention
from attention_zoo.attention.window import WindowAttention, from_windows, shift_mask, to_windows
from attention_zoo.models.agent_swin import AgentSwinBlock

TINY: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 8,
    "depths": (1, 2, 2),
    "num_heads": (1, 2, 4),
    "agent_num": (4, 9, 4),
    "attn_type": "AMB1",
    "num_classes": 5,
}


def tiny(**options: Any) -> Any:
    return small_model("agent_swin", **{**TINY, **options})


# --- the published variants -------------------------------------------------------------------------------------------------------

VARIANTS = [
    ("agent_swin", 28_902_964, 4.499),
    ("agent_swin_t", 28_902_964, 4.499),
    ("agent_swin_s", 49_666_684, 8.701),
    ("agent_swin_s_288", 49_707_964, 14.535),
    ("agent_swin_b", 88_095_096, 15.400),
    ("agent_swin_b_384", 88_305_016, 46.207),
]


@pytest.mark.parametrize(("name", "parameters", "giga"), slow_but({VARIANTS[1]}, VARIANTS))
def test_size_and_cost(name: str, parameters: int, giga: float) -> None:
    """Parameters, and products of matrices and convolutions, as counted from the official code."""
    assert parameters_of(name) == parameters
    assert giga_multiply_adds(name) == pytest.approx(giga, abs=6e-4)


def test_registered() -> None:
    check_registered("agent_swin*", [name for name, *_ in VARIANTS], **AGENT_PAPER)


def test_layout() -> None:
    model = az.create_model("agent_swin_b", device="meta")
    kinds = [[type(block.attn) for block in layer.blocks] for layer in model.layers]
    assert kinds == [[AgentAttention] * 2] * 2 + [[AgentAttention] * 2 + [WindowAttention] * 16] + [[WindowAttention] * 2]
    assert [layer.blocks[0].attn.agent_num for layer in model.layers[:3]] == [9, 16, 49]
    assert [layer.blocks[0].attn.window_size for layer in model.layers] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [block.shift_size for block in model.layers[2].blocks] == [0, 0] + [0, 3] * 8
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.5, 24).tolist())
    config = resolve_data_config(model=model)
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.875, "squash", "bicubic")
    large = az.create_model("agent_swin_b_384", device="meta")
    assert large.layers[2].blocks[2].attn.window_size == (12, 12)
    assert resolve_data_config(model=large)["crop_pct"] == 1.0


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = az.create_model("agent_swin", **{**TINY, "embed_dim": 32, "ape": True})
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", "table", "embed", ".fc1.weight", ".qkv.weight", "reduction.weight", "head.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.endswith(".bias") and "dwc" not in name and "patch_embed" not in name:
            assert not parameter.any(), name


def test_weight_decay() -> None:
    """Tables of relative positions and the absolute ones are left out, the agents' tables are not."""
    model = tiny(ape=True)
    assert model.no_weight_decay() == {
        "absolute_pos_embed",
        "layers.1.blocks.1.attn.relative_position_bias_table",
        "layers.2.blocks.0.attn.relative_position_bias_table",
        "layers.2.blocks.1.attn.relative_position_bias_table",
    }


# --- blocks -----------------------------------------------------------------------------------------------------------------------


def test_block_parity() -> None:
    """The official block, windows of 4 on a map of 8, a shift that wraps around unmasked: agent/swin_block_window4_shift2."""
    case = load_case("agent/swin_block_window4_shift2")
    kwargs = json.loads(case.meta["zoo_kwargs"])
    block = AgentSwinBlock(**kwargs | {"attention_kwargs": {"agent_num": kwargs.pop("agent_num")}})
    block.load_state_dict({k: v for k, v in case.group("state").items() if k != "attn_mask"}, strict=True)
    x = case.group("input")["x"].requires_grad_()
    out = block(x, tuple(case.forward_kwargs["grid_size"]))
    close(out, case.group("output")["x"], case.tolerance)
    (out * case.group("cotangent")["x"]).sum().backward()
    close(x.grad, case.tensors["grad.input"], float(case.meta["grad_tolerance"]))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("grid", [(8, 8), (4, 12), (12, 8)])
def test_softmax_block_is_timms(grid: tuple[int, int], shift: int) -> None:
    """Where windows divide the map; a map one window high is not shifted, as in Swin's own code."""
    ours = make_generic(AgentSwinBlock(8, grid, 2, 4, shift, attn_type="B"))
    shift = 0 if min(grid) == 4 else shift
    theirs = SwinTransformerBlock(8, grid, num_heads=2, window_size=4, shift_size=shift).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, grid[0] * grid[1], 8)
    close(ours(x, grid), theirs(x.unflatten(1, grid)).flatten(1, 2))


@pytest.mark.parametrize("grid", [(9, 6), (3, 10), (1, 1)])
def test_softmax_block_on_a_map_that_windows_do_not_divide(grid: tuple[int, int]) -> None:
    """The map is filled up with zeros behind the norm, which are attended to, before it is shifted (Swin's detection code)."""
    block = make_generic(AgentSwinBlock(8, (8, 8), 2, 4, 2, attn_type="B"))
    x, (height, width) = torch.randn(2, grid[0] * grid[1], 8), grid
    down, across = -(-height // 4) * 4, -(-width // 4) * 4
    padded = F.pad(block.norm1(x).unflatten(1, grid), (0, 0, 0, across - width, 0, down - height))
    shift = 2 if min(grid) > 4 else 0
    theirs = SwinTransformerBlock(8, (down, across), num_heads=2, window_size=4, shift_size=shift, always_partition=True).eval()
    theirs.load_state_dict(block.state_dict(), strict=True)
    attended = theirs._attn(padded)[:, :height, :width].flatten(1, 2)
    out = x + attended
    close(block(x, grid), out + block.mlp(block.norm2(out)))


def test_agents_in_windows() -> None:
    """Every window of the shifted map is a sample of its own, seams and all."""
    block, grid = make_generic(AgentSwinBlock(8, (8, 8), 2, 4, 2, attention_kwargs={"agent_num": 4})), (8, 12)
    x = torch.randn(2, 96, 8)
    image = torch.roll(block.norm1(x).unflatten(1, grid), (-2, -2), (1, 2))
    rows = []
    for sample in image:
        row = torch.empty_like(sample)
        for i in range(0, 8, 4):
            for j in range(0, 12, 4):
                window = sample[i : i + 4, j : j + 4]
                row[i : i + 4, j : j + 4] = block.attn(window.reshape(1, 16, 8), grid_size=(4, 4)).view(4, 4, 8)
        rows.append(row)
    out = x + torch.roll(torch.stack(rows), (2, 2), (1, 2)).flatten(1, 2)
    close(block(x, grid), out + block.mlp(block.norm2(out)))


def test_windows_that_cover_the_map() -> None:
    """They are the map, whatever it is later; a shift has no meaning."""
    block = AgentSwinBlock(8, (4, 4), 2, 7, 3, attention_kwargs={"agent_num": 4})
    assert block.window_size is None
    assert block.attn.window_size == (4, 4)
    x = torch.randn(1, 15, 8)
    out = x + block.attn(block.norm1(x), grid_size=(5, 3))
    close(block(x, (5, 3)), out + block.mlp(block.norm2(out)))
    rectangle = AgentSwinBlock(8, (4, 8), 2, 7, 3, attention_kwargs={"agent_num": 4})
    assert (rectangle.window_size, rectangle.attn.window_size) == (4, (4, 4))  # as officially: square windows, not shifted here
    assert AgentSwinBlock(8, (4, 8), 2, 8, attention_kwargs={"agent_num": 4}).window_size == 4
    assert AgentSwinBlock(8, (4, 8), 2, None, attention_kwargs={"agent_num": 4}).attn.window_size == (4, 8)
    softmax = AgentSwinBlock(8, (4, 4), 2, 7, 3, attn_type="B")
    assert (softmax.window_size, softmax.attn.relative_position_bias_table.shape) == (4, (49, 2))
    small = make_generic(AgentSwinBlock(8, (8, 8), 2, 4, 2, attention_kwargs={"agent_num": 4}))  # a smaller map than its windows
    out = x + from_windows(small.attn(to_windows(small.norm1(x), (5, 3), 3, 0), grid_size=(3, 3)), (5, 3), 3, 0)
    close(small(x, (5, 3)), out + small.mlp(small.norm2(out)))


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3)])
@pytest.mark.parametrize(("window", "shift"), [(2, 1), (3, 1), (4, 0)])
def test_windows_and_back(grid: tuple[int, int], window: int, shift: int) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    windows = to_windows(x, grid, window, shift)
    assert windows.shape[1:] == (window * window, 3)
    assert torch.equal(from_windows(windows, grid, window, shift), x)


def test_shift_mask() -> None:
    x = torch.randn(1, 64, 8)
    assert shift_mask(x, (8, 8), 4, 0) is None
    block = SwinTransformerBlock(8, (8, 12), window_size=4, shift_size=2)
    close(shift_mask(x, (8, 12), 4, 2), block.attn_mask)


# --- the model --------------------------------------------------------------------------------------------------------------------


def test_all_softmax_is_timms_swin() -> None:
    """Without agents this is Swin; timm merges at the start of the next stage instead of the end of this one."""
    ours = tiny(img_size=112, attn_type="BBB", window_size=28)
    theirs = SwinTransformer(
        img_size=112, embed_dim=8, depths=(1, 2, 2), num_heads=(1, 2, 4), num_classes=5, window_size=7, drop_path_rate=0.0
    ).eval()
    state = {}
    for key, tensor in ours.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage + 1}.")
        state[key.replace("head.", "head.fc.")] = tensor
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 112, 112)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(64, 64), (54, 42), (96, 130), (9, 5)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """Without rebuilding, and as if the image had been padded with zeros to whole patches."""
    model, x = tiny(ape=True), torch.randn(2, 3, *size)
    close(model(x), model(F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))))
    assert model.forward_features(x).shape == (2, 32, -(-size[0] // 16), -(-size[1] // 16))


@pytest.mark.parametrize("size", [(96, 64), (128, 128)])
def test_set_input_size(size: tuple[int, int]) -> None:
    """The same model as one built for that size, with what is learned resampled to it; softmax windows stay where they fit."""
    model, x = tiny(ape=True), torch.randn(2, 3, *size)
    before = model(x)
    model.set_input_size(size)
    built = tiny(img_size=size, ape=True)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert (model.img_size, model.grid_size) == (size, (size[0] // 4, size[1] // 4))
    windows = [[block.window_size for block in layer.blocks] for layer in model.layers]
    assert windows == [[block.window_size for block in layer.blocks] for layer in built.layers]
    if windows[2] == [4, 4]:  # the map of stage 2 was 4 x 4 when it was built, and still is the shorter side
        close(model(x), before)
    restored = tiny(img_size=size, ape=True)
    restored.load_state_dict(model.state_dict())
    close(restored(x), model(x))


def test_set_input_size_with_other_windows() -> None:
    model = tiny(window_size=4, img_size=128)
    assert [block.window_size for block in model.layers[1].blocks] == [4, 7]
    assert [block.shift_size for block in model.layers[2].blocks] == [0, 3]
    model.layers[1].blocks[1].attn.relative_position_bias_table.requires_grad_(False)
    table = model.layers[1].blocks[1].attn.relative_position_bias_table.T.unflatten(1, (13, 13))[None]
    model.set_input_size(256, window_size=64)
    resized = model.layers[1].blocks[1].attn.relative_position_bias_table
    close(resized.T.unflatten(1, (15, 15))[None], F.interpolate(table, size=(15, 15), mode="bicubic", align_corners=False))
    assert not resized.requires_grad
    assert model.layers[1].blocks[1].attn.window_size == (8, 8)
    assert model.layers[0].blocks[0].attn.window_size == (64, 64)
    assert model(torch.randn(1, 3, 256, 256)).shape == (1, 5)
    with pytest.raises(ValueError, match="must be positive"):
        model.set_input_size(0)


def test_options_reach_the_layers() -> None:
    model = tiny(
        attn_drop_rate=0.1,
        proj_drop_rate=0.2,
        patch_norm=False,
        qkv_bias=False,
        agent_grid=((3, 2), None, None),
        attention_kwargs={"use_dwc": False},
    )
    agents = [m for m in model.modules() if isinstance(m, AgentAttention)]
    softmax = [m for m in model.modules() if isinstance(m, WindowAttention)]
    assert [(a.agent_num, a.agent_grid, a.attn_drop, a.proj_drop.p, a.dwc) for a in agents] == [
        (4, (3, 2), 0.1, 0.2, None),
        (9, (3, 3), 0.1, 0.2, None),
    ]
    assert {(s.attn_drop.p, s.proj_drop.p) for s in softmax} == {(0.1, 0.2)}
    assert not any("patch_embed.norm" in n or "qkv.bias" in n for n, _ in model.named_parameters())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model.train()(x), model(x))


@pytest.mark.parametrize(("attention", "kind"), [("mha", MultiHeadAttention), ("hilo", HiLoAttention)])
def test_another_mechanism(attention: str, kind: type) -> None:
    model = tiny(attention=attention)
    assert sum(isinstance(m, kind) for m in model.modules()) == 2  # in the place of the agents; B blocks stay
    assert model(torch.randn(2, 3, 54, 42)).shape == (2, 5)
    model.set_input_size(96)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)
