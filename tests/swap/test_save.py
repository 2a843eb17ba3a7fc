"""A swapped model is saved and loaded bit by bit, with its swaps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from swap_case import shake
from torch import nn

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError
from attention_zoo.swap.hosted import host_class
from attention_zoo.swap.record import swaps_of

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}

CASES: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "llama-moh": ("LlamaForCausalLM", transformers.LlamaConfig(**DECODER, tie_word_embeddings=True), "moh", {}),
    "llama-cca": ("LlamaForCausalLM", transformers.LlamaConfig(**DECODER), "cca", {"layers": 1}),
    "llama-pooled": ("LlamaForCausalLM", transformers.LlamaConfig(**DECODER), "gqa", {"init": "mean_pool", "num_kv_heads": 1}),
    "gemma3-gqa": ("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**DECODER), "gqa", {}),
    "bert-moh": ("BertModel", transformers.BertConfig(**TEXT), "moh", {}),
    "vit-agent": ("ViTModel", transformers.ViTConfig(**IMAGE), "agent", {"window_size": 4, "agent_num": 4}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_hugging_face_models(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, config, mechanism, options = CASES[case]
    model = getattr(transformers, kind)._from_config(config, dtype=dtype).eval()
    x = torch.randn(2, 3, 32, 32, dtype=dtype) if kind == "ViTModel" else torch.randint(1, 64, (2, 9))
    az.swap_attention(model, mechanism, **options)
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = az.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.zoo_swap == model.config.zoo_swap
    before, after = model.state_dict(), loaded.state_dict()
    assert list(after) == list(before)
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(loaded(x)[0], model(x)[0])
    loaded.save_pretrained(tmp_path / "again")
    again = az.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[n], t) for n, t in before.items())


def tiny_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT).eval()


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32, dtype=dtype)
    az.swap_attention(model, {0: "moh", 1: ("agent", {"window_size": (4, 4), "agent_num": 4})})
    shake(model.to(dtype))
    az.save_pretrained(model, tmp_path, model_args=VIT)
    loaded = az.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("wrapped", ["compiled", "parallel", "dtypes"])
def test_wrapped_timm_models_and_those_of_several_dtypes(wrapped: str, tmp_path: Path) -> None:
    model = tiny_vit()
    az.swap_attention(model, "moh")
    if wrapped == "dtypes":
        model.to(torch.bfloat16).head.float()
    wrappers = {"compiled": torch.compile, "parallel": nn.DataParallel, "dtypes": lambda model: model}
    az.save_pretrained(wrappers[wrapped](model), tmp_path)
    loaded = az.from_pretrained(tmp_path).state_dict()
    assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_models_that_were_not_swapped(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()
    az.save_pretrained(model, tmp_path)
    ids = torch.randint(1, 64, (2, 9))
    assert torch.equal(az.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        az.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a Hugging Face model"):
        az.save_pretrained(nn.Linear(2, 2), tmp_path)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    with pytest.raises(ValueError, match="leave model_args out"):
        az.save_pretrained(model, tmp_path, model_args={"depth": 2})
    az.swap_attention(model, "gqa")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["zoo_swap"][0]["mechanism"] = "moh"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing: .*model\.layers\.0\.self_attn"):
        az.from_pretrained(tmp_path)


def assert_loads(model: Any, path: Path, *inputs: Any, pick: Any = None, **kwargs: Any) -> Any:
    """Save, load, and compare tensors, records and outputs."""
    az.save_pretrained(model.eval(), path)
    loaded = az.from_pretrained(path)
    assert host_class(type(loaded)) is host_class(type(model))
    assert swaps_of(loaded) == swaps_of(model) != []
    before, after = model.state_dict(), loaded.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    with torch.no_grad():
        want, got = model(*inputs, **kwargs), loaded(*inputs, **kwargs)
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out[0] for out in (got, want)))
    return loaded


@pytest.mark.parametrize("swapped", ["part", "whole"])
@pytest.mark.parametrize("saved", ["part", "whole"])
def test_a_part_and_the_whole(swapped: str, saved: str, tmp_path: Path) -> None:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), torch.randint(1, 64, (2, 9))
    az.swap_attention(model if swapped == "whole" else model.model, "moh", shared_heads=2, routed_topk=1)
    shake(model)
    assert_loads(model if saved == "whole" else model.model, tmp_path, ids)


def clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    ).eval()


@pytest.mark.parametrize("tower", ["vision_model", None])
def test_towers(tower: str | None, tmp_path: Path) -> None:
    """A tower's swap stands in its own part of the configuration, whatever is swapped and saved."""
    model = clip()
    part = model.get_submodule(tower) if tower else model
    az.swap_attention(part, "moh", layers="*.0.*" if tower else "vision_model.*.0.*", shared_heads=2, routed_topk=1)
    az.swap_attention(model, "gqa", layers="text_model.*")
    shake(model)
    assert len(model.config.vision_config.zoo_swap) == 1
    assert len(model.config.text_config.zoo_swap) == 2
    assert not hasattr(model.config, "zoo_swap")
    inputs = {"input_ids": torch.randint(1, 64, (2, 7)), "pixel_values": torch.randn(2, 3, 32, 32)}
    assert_loads(model, tmp_path / "whole", **inputs)
    assert_loads(model.vision_model, tmp_path / "tower", inputs["pixel_values"])


def test_the_text_model_of_a_model_of_images_and_text(tmp_path: Path) -> None:
    """As a whole it is refused; its text model can be swapped alone, and the whole saved and loaded."""
    text = {**DECODER, "max_position_embeddings": 64, "sliding_window": 8}
    vision = {**IMAGE, "intermediate_size": 48}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    model, ids = transformers.Gemma3ForConditionalGeneration(config).eval(), torch.randint(1, 60, (2, 9))
    with pytest.raises(ValueError, match="swap its text model alone"):
        az.swap_attention(model, "gqa", layers="model.language_model.*")
    az.swap_attention(model.model.language_model, "gqa", num_kv_heads=2)
    shake(model)
    assert len(model.config.text_config.zoo_swap) == 2
    assert_loads(model, tmp_path, ids)


def test_a_timm_model_inside_transformers(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=VIT)
    for part in ("timm_model", ""):
        model = transformers.TimmWrapperForImageClassification(config)
        az.swap_attention(model.get_submodule(part), "moh", aux_loss_coef=0.5)
        x = torch.randn(2, 3, 32, 32)
        assert_loads(model, tmp_path / f"swapped_{part}", x)
        task = transformers.TimmWrapperForImageClassification.forward(model.train(), x, labels=torch.tensor([0, 1])).loss
        got = model(x, labels=torch.tensor([0, 1])).loss
        torch.testing.assert_close(got, task + 0.5 * az.auxiliary_loss(model), atol=1e-5, rtol=1e-5)


def test_towers_that_share_one_configuration(tmp_path: Path) -> None:
    """Then names count from the whole model."""
    model = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    model.encoder.twin = transformers.BertModel(model.config)
    az.swap_attention(model, "gqa", layers=["encoder.twin.*", 0])
    assert [e["name"].startswith("encoder.twin") for e in model.config.zoo_swap] == [False, True, True]
    az.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"BertModel has no layer encoder\.twin"):
        az.from_pretrained(tmp_path)


def test_what_is_changed_after_the_swap(tmp_path: Path) -> None:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), torch.randint(1, 64, (2, 9))
    az.swap_attention(model, {0: "moh", 1: ("gda", {"num_noise_heads": 1, "num_kv_heads": 1})}, init="mean_pool", num_kv_heads=1)
    az.set_routed_topk(model, 1)
    assert_loads(model, tmp_path / "topk", ids)
    moh = model.model.layers[0].self_attn.mechanism
    moh.set_topk(2)
    grown = az.grow_model(model, 2, noise=0.1)
    loaded = assert_loads(grown, tmp_path / "grown", ids)
    assert loaded.model.layers[0].self_attn.mechanism.routed_topk == 2
    assert loaded.model.layers[1].self_attn.mechanism.num_heads == 2 * model.model.layers[1].self_attn.mechanism.num_heads
    slot = loaded.model.layers[1].self_attn
    slot.mechanism = az.grow_signal_heads(slot.mechanism, 2, symmetric=True)
    assert_loads(loaded, tmp_path / "again", ids)
    with pytest.raises(ValueError, match="not kept"):
        az.unswap(loaded)


def test_a_differential_layer_grows_into_a_grouped_one(tmp_path: Path) -> None:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), torch.randint(1, 64, (2, 9))
    az.swap_attention(model, "diff", layers=0)
    slot = model.model.layers[0].self_attn
    slot.mechanism = az.grow_signal_heads(slot.mechanism, 2, noise=0.1)
    loaded = assert_loads(model, tmp_path, ids)
    assert [entry["mechanism"] for entry in loaded.config.zoo_swap] == ["gda"]


def test_files_in_pieces_and_other_dtypes(tmp_path: Path) -> None:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval(), torch.randint(1, 64, (2, 9))
    az.swap_attention(model, "moh")
    shake(model)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(az.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    for name in ("dtype", "torch_dtype"):
        half = az.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert az.from_pretrained(tmp_path, dtype="bfloat16", attn_implementation="eager").config._attn_implementation == "eager"
    placed, info = az.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(placed(ids).logits, model(ids).logits)


def test_a_device_map_keeps_the_auxiliary_loss(tmp_path: Path) -> None:
    """accelerate wraps the method of the class that a model has while it is loaded."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), torch.randint(1, 64, (2, 9))
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    plain = model(ids, labels=ids).loss
    az.swap_attention(model, "moh", aux_loss_coef=0.5)
    loss = model.train()(ids, labels=ids).loss
    torch.testing.assert_close(loss, plain + 0.5 * az.auxiliary_loss(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("subfolder", ["", "inside"])
def test_from_the_hub(subfolder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval(), torch.randint(1, 64, (2, 9))
    az.swap_attention(model, "gqa")
    model.save_pretrained(tmp_path / subfolder)
    asked: dict[str, Any] = {}

    def download(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub = {"revision": "v1", "token": "secret", "cache_dir": "there"}
    loaded = az.from_pretrained("owner/name", dtype=torch.float64, **hub, **({"subfolder": subfolder} if subfolder else {}))
    local = az.from_pretrained(tmp_path / subfolder, dtype=torch.float64)
    assert torch.equal(loaded(ids).logits, local(ids).logits)
    assert loaded.dtype == torch.float64
    assert {name: asked[name] for name in ("repo_id", *hub)} == {"repo_id": "owner/name", **hub}


def test_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves itself as save_pretrained does, with what was changed since the swap."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    az.swap_attention(model, "moh")
    az.set_routed_topk(model, 1)
    kept: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    class Card:
        def save(self, path: str) -> None:
            kept.append(json.loads((Path(path).parent / "config.json").read_text()))
            raise Stop

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="owner/name"))
    monkeypatch.setattr("transformers.utils.hub.create_repo", lambda *a, **k: SimpleNamespace(repo_id="owner/name"), raising=False)
    with pytest.raises(Stop):
        model.push_to_hub("name")
    assert [entry["constructor"]["routed_topk"] for entry in kept[0]["zoo_swap"]] == [1, 1]


def test_transformers_own_loading_says_what_it_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    az.swap_attention(model, "gqa")
    model.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.propagate = before
    assert "self_attn.mechanism" in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    del config["zoo_swap"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"without a place: .*mechanism"):
        az.from_pretrained(tmp_path)


def test_architectures(tmp_path: Path) -> None:
    decoder = az.create_model("llama_tiny", attention="moh")
    decoder.save_pretrained(tmp_path / "ours")
    assert type(az.from_pretrained(tmp_path / "ours")) is type(decoder)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    for names, match in ((["NoSuchModel"], "has no model 'NoSuchModel'"), (None, "should name one class")):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
        with pytest.raises(CheckpointError, match=match):
            az.from_pretrained(tmp_path)


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (32, 64), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
    "head": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": 1, "num_classes": 3}),
    "pooled": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "global_pool": "avg", "class_token": False}),
    "no head": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}),
    "wide": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0, "init_values": 0.1}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 3}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 3}),
    "published": ("vit_tiny_patch16_224.augreg_in21k", {}),
}


@pytest.mark.parametrize("case", TIMM)
def test_timm_models_say_what_they_were_built_with(case: str, tmp_path: Path) -> None:
    name, args = TIMM[case]
    model = timm.create_model(name, **args)
    az.swap_attention(model, "moh", layers=0)
    shake(model)
    size = args.get("img_size", 224)
    x = torch.randn(1, args.get("in_chans", 3), *(size if isinstance(size, tuple) else (size, size)))
    loaded = assert_loads(model, tmp_path, x)
    assert loaded.pretrained_cfg == model.pretrained_cfg


def test_our_own_vision_models(tmp_path: Path) -> None:
    model = az.create_model("litv2_ti", img_size=64, num_classes=3) if "litv2_ti" in az.list_models() else None
    model = model or az.create_model("litv2_s", num_classes=3)
    az.save_pretrained(model.eval(), tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(az.from_pretrained(tmp_path)(x), model(x))


def test_timm_models_that_cannot_be_told(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3, act_layer=nn.ReLU)
    az.swap_attention(model, "gqa")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act is GELU, not ReLU.*say in model_args"):
        az.save_pretrained(model, tmp_path / "act")
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3)
    model.head = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="model_args"):
        az.save_pretrained(model, tmp_path / "head")
    with pytest.raises(ValueError, match="say in model_args"):
        az.save_pretrained(tiny_vit(), tmp_path / "wrong", model_args={"depth": 5})
    assert not list(tmp_path.iterdir())


def lora(model: Any, **kwargs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **kwargs))
    return adapted.eval()


def test_adapters_of_a_swapped_base(tmp_path: Path) -> None:
    from peft import PeftModel

    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval(), torch.randint(1, 64, (2, 9))
    az.swap_attention(model, "moh", router="linear", shared_heads=2, routed_topk=1)
    shake(model)
    model.save_pretrained(tmp_path / "base")
    adapted = lora(model, modules_to_save=["router", "balance"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    want = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(az.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, want)
    merged = again.merge_and_unload()
    mechanism = merged.model.layers[0].self_attn.mechanism
    assert all(type(layer) is nn.Linear for layer in (mechanism.q_proj, mechanism.router))
    torch.testing.assert_close(merged(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert_loads(merged, tmp_path / "merged", ids)


def test_adapters_before_the_swap_are_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    adapted = lora(model)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with pytest.raises(ValueError, match="merge adapters"):
        az.swap_attention(adapted, "gqa")
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
    assert adapted.merge_and_unload().config is model.config
    az.swap_attention(model, "gqa")


def test_a_model_with_adapters_elsewhere_is_swapped(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), torch.randint(1, 64, (2, 9))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    az.swap_attention(adapted, "moh", aux_loss_coef=0.5)
    assert [entry["name"] for entry in model.config.zoo_swap] == ["layers.0.self_attn", "layers.1.self_attn"]
    loss, plain = adapted.train()(ids, labels=ids).loss, transformers.LlamaForCausalLM.forward(model, ids, labels=ids).loss
    torch.testing.assert_close(loss, plain + 0.5 * az.auxiliary_loss(model), atol=1e-5, rtol=1e-5)
    assert_loads(adapted.merge_and_unload(), tmp_path, ids)
