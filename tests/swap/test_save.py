"""A swapped model is saved and loaded bit by bit, with its swaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from swap_case import shake
from torch import nn

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError

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
