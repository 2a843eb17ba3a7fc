"""`create_model` and `list_models`: names, arguments, and what may be loaded."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

import attention_zoo as az
from attention_zoo.registry import model_builder

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 6, "num_classes": 5}


def tiny(attention="gqa", **kwargs):
    return az.create_model(f"vit_small_patch16_224_{attention}", **{**TINY, **kwargs})


def test_our_vision_models_names_are_timms_too():
    names = [name for name in az.list_models() if model_builder(name) is None]
    assert names
    for name in names:
        assert timm.is_model(name)
        assert name in timm.list_models(name)


def test_no_name_of_ours_was_timms():
    """timm warns when a registration overwrites another; a name registered twice would have lost timm's default cfg."""
    from timm.models import model_entrypoint

    assert all(model_entrypoint(n).__module__.startswith("timm.") for n in ("vit_base_patch16_224", "halonet_h1", "resnet50"))


def test_list_models_filters():
    assert az.list_models("vit_small*_gqa") == ["vit_small_patch16_224_gqa"]
    assert az.list_models("vit_small*", exclude=["*_gqa", "*_kdgqa"]) == [
        "vit_small_patch16_224_dgqa",
        "vit_small_patch16_224_pgqa",
    ]
    assert az.list_models("nothing*") == []


def test_same_call_as_timm():
    torch.manual_seed(0)
    ours = tiny()
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224_gqa", **TINY)
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_timms_own_names_pass_through():
    assert type(az.create_model("resnet10t", num_classes=3)).__name__ == "ResNet"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "vit_smal_patch16_224_gqa"}, "did you mean .*vit_small_patch16_224_gqa"),
        ({"name": "vit_small_patch16_224", "attention": "mhaa"}, "did you mean 'mha'"),
        ({"name": "resnet10t", "attention": "mha"}, "standard block"),
        ({"name": "vit_relpos_base_patch16_224", "attention": "mha"}, "standard block"),
        ({"name": "resnet10t", "attention_kwargs": {"a": 1}}, "without attention"),
        ({"name": "vit_small_patch16_224_gqa", "pretrained": True}, "checkpoint_path"),
        ({"name": "vit_tiny_patch16_224", "attention": "gqa", "pretrained": True}, "belong to its own attention"),
        ({"name": "vit_small_patch16_224_gqa", "attention_kwargs": {"num_kv_heads": 4}}, "num_kv_heads=4"),
        ({"name": "vit_tiny_patch16_224", "attention": "gqa", "scale_attn_norm": True}, "scale_norm=True"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        az.create_model(**call)


def test_unknown_option_of_the_mechanism():
    with pytest.raises(TypeError, match="did you mean 'num_kv_heads'"):
        tiny(attention_kwargs={"num_kv_head": 3})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_own_checkpoint(tmp_path, suffix):
    model, path = tiny(), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    again = tiny(checkpoint_path=path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), again.eval()(x))


@pytest.mark.parametrize("name", ["litv2", "moh_transnext"])
def test_a_classifiers_own_file_without_its_head(name, tmp_path):
    options = {"num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 5}
    if name == "litv2":
        options["embed_dim"] = 8
    else:
        options |= {"embed_dims": (4, 8, 8, 8), "shared_heads": (1, 2, 2, 1), "routed_topk": (0, 0, 0, 1)}
    model, path = az.create_model(name, **options), tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    headless = az.create_model(name, **{**options, "num_classes": 0}, checkpoint_path=path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in headless.state_dict().items())


def test_checkpoint_that_does_not_fit(tmp_path):
    model, path = tiny(), tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(az.CheckpointError, match=r"head\.weight \(5, 24\) instead of \(7, 24\)"):
        tiny(num_classes=7, checkpoint_path=path)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("norm.")} | {"surplus": torch.zeros(1)}
    save_file(state, path)
    with pytest.raises(az.CheckpointError, match=r"missing keys: norm\.bias, norm\.weight; unknown keys: surplus"):
        tiny(checkpoint_path=path)
    with pytest.raises(az.CheckpointError, match="missing keys"):
        az.create_model("resnet10t", checkpoint_path=path)
    with pytest.raises(FileNotFoundError):
        tiny(checkpoint_path=tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("litv2", {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64}),
        ("agent_swin", {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64, "agent_num": (4,) * 4}),
    ],
)
def test_a_classifiers_file_starts_a_dense_backbone(name, kwargs, tmp_path):
    """Our own file as it is: the head and the final norm are left out, as timm does."""
    classifier = az.create_model(name, **kwargs).eval()
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    for out_indices in ((0, 1, 2, 3), (1, 2)):
        dense = az.create_model(
            name, features_only=True, out_indices=out_indices, checkpoint_path=tmp_path / "model.safetensors", **kwargs
        ).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            want = classifier.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
            for got, expected in zip(dense(x), want, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
