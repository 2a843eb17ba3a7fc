"""Which layers and models reach our kernels without being asked: on CUDA those that have one, elsewhere none."""

from __future__ import annotations

from typing import Any

import kernel_case as kernels
import pytest
import timm
import torch
from kernel_case import Called
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attention_zoo as az
from attention_zoo.registry import attention_info

# The operators that a mechanism calls at least, and what it needs to be built.
KERNELS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "agent": ({"agents_read_forward", "tokens_read_forward"}, {}),
    "bra": ({"routed_map_forward", "best_regions"}, {"n_win": 8}),
    "cca": ({"core_context_forward", "core_pooling_forward"}, {"window_size": 32, "group_size": 4}),
    "diff": ({"differential_cudnn_forward"}, {}),
    "gda": ({"differential_cudnn_forward"}, {}),
    "halo": ({"halo_forward"}, {"block_size": 8, "halo_size": 3}),
    "hilo": ({"hilo_forward"}, {}),
    "moh": ({"mixture_forward"}, {"shared_heads": 1, "routed_topk": 1}),
    "moh_transnext_aggregated": ({"foveal_forward", "cosine_heads"}, {}),
    "moh_transnext_global": ({"cosine_heads"}, {}),
}
SPATIAL_MODELS = {
    "agent_deit_t": "agents_read_forward",
    "biformer_tiny": "routed_map_forward",
    "halonet_paper_h0": "halo_forward",
    "litv2_s": "hilo_forward",
    "moh_transnext_small_80": "foveal_forward",
}
# Maps of a converted "diff" share keys, and are one call.
SWAPPED_IN_VIT = {name: KERNELS[name][0] for name in ("bra", "halo", "hilo", "agent")} | {"diff": {"subtract_noise_forward"}}
SWAPPED_IN_LLAMA = {"cca": 2048, "moh": 16384}  # lengths from which the kernels pay


def called(module: nn.Module, x: Tensor, **inputs: Any) -> set[str]:
    with torch.no_grad(), Called() as calls:
        module(x, **inputs)
    return calls.names


def layer_calls(name: str, device: str, side: int, dim: int, batch: int = 1) -> set[str]:
    options = KERNELS[name][1] | ({"window_size": (side, side)} if name == "agent" else {})
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    layer = az.create_attention(name, dim, 4, **options, **half)
    grid = {"grid_size": (side, side)} if attention_info(name).spatial else {}
    return called(layer, torch.randn(batch, side * side, dim, **half), **grid)


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures of heads leave calls as small as these to the dense engines."""
    monkeypatch.setattr("attention_zoo.ops.mixture._LEAST_WORK", (0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_layers_take_kernels_on_cuda(name: str) -> None:
    side = 28 if name == "hilo" else 64  # more window means go to the engines
    assert KERNELS[name][0] <= layer_calls(name, "cuda", side, 256, batch=8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_layers_as_graphed_callables(name: str) -> None:
    options = KERNELS[name][1] | ({"window_size": (16, 16)} if name == "agent" else {})
    layer = az.create_attention(name, 64, 4, **options, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grid = {"grid_size": (16, 16)} if attention_info(name).spatial else {}
    kernels.check_graphed_callable(layer, x, **grid)


def test_what_has_kernels_says_so() -> None:
    assert set(KERNELS) <= set(az.list_attentions(engine="triton"))


@pytest.mark.parametrize("name", KERNELS)
def test_layers_take_none_on_a_cpu(name: str) -> None:
    assert not layer_calls(name, "cpu", 8, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPATIAL_MODELS)
def test_models_take_kernels_on_cuda(name: str) -> None:
    model = az.create_model(name, num_classes=10).to("cuda", torch.bfloat16).eval()
    size = model.pretrained_cfg["input_size"]
    assert SPATIAL_MODELS[name] in called(model, torch.randn(1, *size, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SWAPPED_IN_VIT)
def test_swapped_vision_models_take_kernels_on_cuda(name: str) -> None:
    class_token = name != "diff" and not attention_info(name).prefix_tokens
    bare = {"class_token": False, "global_pool": "avg"} if class_token else {}
    model = timm.create_model("vit_tiny_patch16_224", img_size=256, num_classes=10, depth=2, **bare)
    az.swap_attention(model, name, **KERNELS[name][1])
    model = model.to("cuda", torch.bfloat16).eval()
    assert SWAPPED_IN_VIT[name] <= called(model, torch.randn(1, 3, 256, 256, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SWAPPED_IN_LLAMA)
def test_swapped_decoders_take_kernels_on_cuda(name: str) -> None:
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(config)
    az.swap_attention(model, name, **KERNELS[name][1])
    model = model.to("cuda", torch.bfloat16).eval()
    tokens = torch.randint(64, (1, SWAPPED_IN_LLAMA[name]), device="cuda")
    assert KERNELS[name][0] <= called(model, tokens, use_cache=False)
