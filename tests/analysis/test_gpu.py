"""Attention maps on a CUDA device: fused kernels in half precision, compiled FlexAttention, generation with a static cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from maps_case import IMAGES, close, record, vit

import attention_zoo as az

pytestmark = pytest.mark.gpu

CONFIG: dict[str, Any] = {
    **{"vocab_size": 99, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "pad_token_id": 0, "eos_token_id": 98},
}


def llama(implementation: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval().to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vision_transformer(dtype: torch.dtype) -> None:
    model = vit()
    _, reference = record(model, IMAGES)
    model, images = model.to("cuda", dtype), IMAGES.to("cuda", dtype)
    with torch.no_grad():
        want = model(images)
    out, maps = record(model, images)
    assert torch.equal(out, want)
    assert maps[0].device.type == "cuda"
    assert maps[0].dtype == torch.float32
    for number in range(2):
        close(maps[number].cpu(), reference[number], 2e-2)
    _, maps = record(model, images, device="cpu", rows=[3, 1])
    close(maps[1], reference[1][:, :, [3, 1]], 2e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_decoder(implementation: str) -> None:
    """The compiled kernel of FlexAttention stays the one that runs without the block."""
    model = llama(implementation, torch.bfloat16)
    tokens = torch.randint(3, 90, (2, 40), device="cuda")
    with torch.no_grad():
        want = model(tokens).logits
    out, maps = record(model, tokens)
    assert torch.equal(out.logits, want)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(tokens, output_attentions=True).attentions
    close(maps[0], eager[0].float(), 2e-2)


def test_generation_that_compiles_itself() -> None:
    model = llama("sdpa", torch.float32)
    tokens = torch.randint(3, 90, (2, 9), device="cuda")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(tokens, **settings)
    with az.record_attention(model, forwards="all", rows=-1) as maps:
        got = model.generate(tokens, **settings)
    assert torch.equal(got, want)
    assert [step.shape[2] for step in maps.history(0)] == [1] * 4


@pytest.mark.parametrize("name", ["mha", "cca", "diff", "moh"])
def test_a_mechanism(name: str) -> None:
    module = az.create_attention(name, 128, 4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 50, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = module(x)
    out, maps = record(module, x, effective=True)
    assert torch.equal(out, want)
    assert maps[0].shape == (2, 4, 50, 50)
    assert maps[0].device.type == "cuda"
