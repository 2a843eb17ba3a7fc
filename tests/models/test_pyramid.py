"""timm's interface of the pyramid classifiers (`models/_pyramid.py`), over the families that take it as it is."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.models._pyramid import block_types, check_stages

TINY: dict[str, dict[str, Any]] = {
    "agent_swin": {"depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "attn_type": "AMBB1", "window_size": 16},
    "agent_cswin": {"depth": (1, 2, 2, 1), "num_heads": (2, 2, 2, 4), "attn_type": "AMBB1", "split_size": (1, 2, 2, 2)},
}
COMMON: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "agent_num": (4, 4, 4, 4), "num_classes": 5}
STAGE = {"agent_swin": "layers.{}.", "agent_cswin": "stage{}."}  # where a stage's parameters stand, counted from 0 and from 1

families = pytest.mark.parametrize("family", sorted(TINY))


def tiny(family: str, **options: Any) -> Any:
    """A small model whose parameters all matter; agents in stage 0 and in half of stage 1, the rest softmax in windows."""
    torch.manual_seed(0)
    model = az.create_model(family, **{**TINY[family], **COMMON, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def stages_of(family: str, model: nn.Module) -> set[int]:
    offset = 1 if family == "agent_cswin" else 0
    names = [name.removeprefix("model.") for name, _ in model.named_parameters()]
    return {i for i in range(4) if any(name.startswith(STAGE[family].format(i + offset)) for name in names)}


@families
def test_head(family: str) -> None:
    model, x = tiny(family, drop_rate=0.1), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 2, 2)
    close(model(x), model.head(features.mean((2, 3))))
    close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(3, "max")
    close(model(x), model.head(features.amax((2, 3))))
    model.reset_classifier(0)
    close(model(x), features.amax((2, 3)))
    model.reset_classifier(0, "")
    close(model(x), features)
    assert tiny(family, num_classes=0)(x).shape == (2, 64)
    assert tiny(family, in_chans=1)(x[:, :1]).shape == (2, 5)


@families
def test_intermediates(family: str) -> None:
    model, x = tiny(family), torch.randn(2, 3, 60, 44)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1:] for m in maps] == [(8, 15, 11), (16, 8, 6), (32, 4, 3), (64, 2, 2)]
    close(final, model.forward_features(x))
    close(model.forward_intermediates(x, norm=True)[1][-1], final)
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    close(last, maps[3])
    stage1, nhwc = model.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NHWC")
    close(stage1, maps[1])
    for a, b in zip(nhwc, maps[:2], strict=True):
        close(a.permute(0, 3, 1, 2), b)
    with pytest.raises(ValueError, match=r"'NCHW' or 'NHWC'.*'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    close(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], maps[2])
    close(model(x), maps[2])  # no norm, head or way to the last stage is left
    assert stages_of(family, model) == {0, 1, 2}
    model.set_input_size((60, 44))
    assert model(x).shape == maps[2].shape


@families
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,), (-1,), 2])
def test_feature_maps(family: str, indices: Any) -> None:
    """The maps of `forward_intermediates`, from a backbone that holds nothing else."""
    model, x = tiny(family), torch.randn(2, 3, 60, 44)
    backbone = az.create_model(family, features_only=True, out_indices=indices, **TINY[family], **COMMON).eval()
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    assert not backbone.load_state_dict(state, strict=False).missing_keys
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    maps = backbone(x)
    for a, b in zip(maps, want, strict=True):
        close(a, b)
    assert backbone.feature_info.channels() == [m.shape[1] for m in maps]
    assert backbone.feature_info.reduction() == [4 * m.shape[1] // 8 for m in maps]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters()), "a parameter that no map depends on"


@families
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    x, results = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = tiny(family).train()
        model.set_grad_checkpointing(enable)
        out = model(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


@families
def test_compiles_to_one_graph(family: str) -> None:
    torch._dynamo.reset()
    size = {"num_heads": (2, 2), "agent_num": (4, 4)}
    size |= (
        {"depths": (1, 2), "attn_type": "AB"}
        if family == "agent_swin"
        else {"depth": (1, 1), "split_size": (2, 2), "attn_type": "BA"}
    )
    model, x = tiny(family, **size), torch.randn(2, 3, 60, 44)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@families
def test_meta_device_and_dtype(family: str) -> None:
    model = az.create_model(family, device="meta", dtype=torch.bfloat16, **TINY[family], **COMMON)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    half = tiny(family).bfloat16()
    assert half(torch.randn(2, 3, 64, 64).bfloat16()).dtype == torch.bfloat16
    model, x = tiny(family), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    close(out.float(), model(x), 0.1)


@families
def test_empty_batch_and_independent_samples(family: str) -> None:
    model, x = tiny(family), torch.randn(3, 3, 60, 44)
    assert model(x[:0]).shape == (0, 5)
    close(model(x)[1:2], model(x[1:2]))


@families
def test_layer_decay_follows_the_depth(family: str) -> None:
    model = tiny(family)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    first = "patch_embed.proj.weight" if family == "agent_swin" else "stage1_conv_embed.0.weight"
    blocks = {
        "agent_swin": [
            "layers.0.blocks.0.",
            "layers.0.downsample.",
            "layers.2.blocks.0.",
            "layers.2.blocks.1.",
            "layers.3.blocks.0.",
        ],
        "agent_cswin": ["stage1.0.", "merge1.", "stage3.0.", "stage3.1.", "stage4.0."],
    }[family]
    scales = [scale[first], *({s for n, s in scale.items() if n.startswith(b)} for b in blocks), scale["norm.weight"]]
    flat = [s.pop() if isinstance(s, set) and len(s) == 1 else s for s in scales]
    assert flat == sorted(flat)
    assert len(set(flat[:6])) == 6


@families
def test_bad_arguments(family: str) -> None:
    depths = "depth" if family == "agent_cswin" else "depths"
    with pytest.raises(ValueError, match=rf"one entry for each stage.*{depths}=\(1, 1, 2\)"):
        tiny(family, **{depths: (1, 1, 2)}, attn_type="AAA")
    with pytest.raises(ValueError, match=r"out_indices.*features_only"):
        tiny(family, out_indices=[0])
    with pytest.raises(ValueError, match=r"'dtm' cannot stand in Agent-"):
        tiny(family, attention="dtm")
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(family, attention_kwargs={"no_such_option": 1})


@families
def test_registered(family: str) -> None:
    names = az.list_models(f"{family}*")
    assert family in names
    for name in names:
        config = timm.get_pretrained_cfg(name)
        assert not config.has_weights
        assert "2312.08874" in config.paper_ids
        assert config.origin_url == "https://github.com/LeapLabTHU/Agent-Attention"
        side = int(name.rpartition("_")[2]) if name.endswith(("288", "384")) else 224
        assert (config.input_size, config.pool_size) == ((3, side, side), (side // 32, side // 32))


def test_block_types() -> None:
    assert block_types("AAAB", (1, 2, 1, 2)) == ["A", "AA", "A", "BB"]
    assert block_types("AMB2", (1, 4, 3)[:3]) == ["A", "AABB", "BBB"]
    assert block_types("MB1", (3, 1)) == ["ABB", "B"]
    assert block_types("MM12", (2, 14)) == ["AA", "A" * 12 + "BB"]
    assert block_types("MB0", (2, 1)) == ["BB", "B"]
    assert block_types("IS", (1, 1), letters="IS") == ["I", "S"]
    for wrong in ("AAB", "AABBB", "AAMB", "AABB2", "AACB", "AAMB2x", ""):
        with pytest.raises(ValueError, match=r"4 letters.*'AAAM2'.*got"):
            block_types(wrong, (1, 1, 1, 1))


def test_check_stages() -> None:
    check_stages(depths=(1, 2), num_heads=[1, 1])
    with pytest.raises(ValueError, match=r"depths=\(1, 2\), num_heads=\(1,\)"):
        check_stages(depths=(1, 2), num_heads=[1])
    with pytest.raises(ValueError, match="at least one block"):
        check_stages(depths=(1, 0), num_heads=[1, 1])
