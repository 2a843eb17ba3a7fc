"""A vision family as its tests see it: a small model whose parameters all matter, and what timm's interface asks of every family.

`build(**options)` is a family's small model, with options over its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops

Build = Callable[..., Any]
AGENT_PAPER = {"license": "unknown", "paper": "2312.08874", "origin": "https://github.com/LeapLabTHU/Agent-Attention"}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def make_generic(model: nn.Module) -> Any:
    """No parameter and no statistic is where it starts, and the model is in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def small_model(name: str, **options: Any) -> Any:
    """The same numbers each time."""
    torch.manual_seed(0)
    return make_generic(az.create_model(name, **options))


# --- the published variants -------------------------------------------------------------------------------------------------------


def parameters_of(name: str, **options: Any) -> int:
    return sum(p.numel() for p in az.create_model(name, device="meta", **options).parameters())


def giga_multiply_adds(name: str, **options: Any) -> float:
    """Products of matrices and convolutions for one image, counted without computing them."""
    model = az.create_model(name, device="meta", **options).eval()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
        model.to_empty(device="cpu")
        model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    return counter.get_total_flops() / 2e9


def check_registered(pattern: str, names: Sequence[str], *, license: str, paper: str, origin: str) -> None:
    """The family's names with their metadata; a name ends with the side of its images, three digits, if that is not 224."""
    assert az.list_models(pattern) == sorted(names)
    for name in names:
        assert timm.is_model(name)
        config = timm.get_pretrained_cfg(name)
        assert not config.has_weights
        assert (config.license, config.paper_ids, config.origin_url) == (license, f"arXiv:{paper}", origin)
        ending = name.rpartition("_")[2]
        side = int(ending) if ending.isdecimal() and len(ending) == 3 else 224
        assert (config.input_size, config.pool_size) == ((3, side, side), (side // 32, side // 32))


def check_official_keys(manifest: Mapping[str, Any], shapes: Mapping[str, Any], prefix: str = "") -> None:
    """An official file, whose tensors have these `shapes`, loads completely. With a prefix it is a whole detector's."""
    with torch.device("meta"):
        model = az.create_model(manifest["model"], **manifest["kwargs"])
        state = {prefix + key: torch.empty(shape) for key, shape in shapes.items()}
        if prefix:
            state |= {"neck.lateral_convs.0.conv.weight": torch.empty(1), "bbox_head.retina_cls.bias": torch.empty(1)}
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    converted = az.convert_official_state_dict(manifest["model"], state, **manifest["kwargs"])
    model.load_state_dict(converted, strict=True, assign=True)


# --- timm's interface -------------------------------------------------------------------------------------------------------------


def check_head(build: Build) -> None:
    """Pooling, the logits and what is before them, other heads and channels; for 5 classes and images of 64 x 64."""
    model, x = build(drop_rate=0.1), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    width = features.shape[1]
    assert features.shape == (2, model.num_features, 2, 2)
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
    assert build(num_classes=0)(x).shape == (2, width)
    assert build(in_chans=1)(x[:, :1]).shape == (2, 5)


def check_intermediates(model: Any, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Maps of four stages, in every form that they can be asked for. Prunes the model to three. Returns the maps."""
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1:] for m in maps] == shapes
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
    return list(maps)


def check_feature_maps(model: Any, backbone: Any, x: Tensor, indices: Any, prefix: str = "") -> None:
    """The maps of `forward_intermediates`, from a backbone that holds nothing else, each parameter named as the classifier's.

    Args:
        prefix: before the classifier's names, "model." where timm's own class is around it.
    """
    state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    assert not backbone.load_state_dict(state, strict=False).missing_keys
    want = model.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices), intermediates_only=True)
    maps = backbone(x)
    for a, b in zip(maps, want, strict=True):
        close(a, b)
    assert backbone.feature_info.channels() == [m.shape[1] for m in maps]
    stages = [i % 4 for i in (range(4 - indices, 4) if isinstance(indices, int) else indices)]
    assert backbone.feature_info.reduction() == [4 * 2**i for i in stages]
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters()), "a parameter that no map depends on"


def check_layer_decay(model: nn.Module, order: Sequence[str], distinct: int) -> dict[str, float]:
    """Learning rates that decay by layers grow in the `order` of these parameters, and there are as many `distinct` ones.

    Returns: the factor of every parameter.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    scales = [scale[name] for name in order]
    assert scales == sorted(scales)
    assert len(set(scales)) == distinct
    return scale


# --- training ---------------------------------------------------------------------------------------------------------------------


def check_gradient_checkpointing(build: Build) -> None:
    """It changes neither outputs nor gradients."""
    x, results = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = build().train()
        model.set_grad_checkpointing(enable)
        out = model(x)
        (out.square().sum() + az.auxiliary_loss(model)).backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


def check_one_graph(model: nn.Module, x: Tensor, backend: str = "aot_eager") -> None:
    """torch.compile takes the model whole."""
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
