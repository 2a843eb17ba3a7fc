"""Suite `models`: whole models of the zoo against models of timm and Hugging Face of about the same size.

Images or tokens per second of the forward, and of the forward and backward of a training step; the memory of the latter. Beside
ours the same model without our kernels, as it is and under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import ops
from attention_zoo.attention.base import AttentionModule
from attention_zoo.benchmarks.cases import Build, Case, Contender, Task, Wrap, compiled, module_task, normal, plain, unique
from attention_zoo.benchmarks.roofline import FORWARD, TRAIN, Work, least_flops

__all__ = ["cases"]

Create = Callable[..., Any]  # attention_zoo.create_model

# Ours, its options; the model of timm that it is compared with; pixels of a side; images.
VISION: tuple[tuple[str, dict[str, Any], str, int, int], ...] = (
    ("litv2_s", {}, "swin_tiny_patch4_window7_224", 224, 64),
    ("litv2_b", {}, "swin_base_patch4_window7_224", 224, 64),
    ("biformer_small", {}, "swin_tiny_patch4_window7_224", 224, 64),
    ("agent_swin_t", {}, "swin_tiny_patch4_window7_224", 224, 64),
    ("agent_cswin_t", {}, "swin_tiny_patch4_window7_224", 224, 64),
    ("agent_deit_s", {}, "deit_small_patch16_224", 224, 64),
    ("agent_pvt_s", {}, "pvt_v2_b2", 224, 64),
    ("moh_transnext_small_80", {}, "swin_small_patch4_window7_224", 224, 32),
    ("halonet_paper_h0", {}, "efficientnet_b0", 256, 64),
    ("vit_base_patch16_224_kdgqa", {}, "vit_base_patch16_224", 224, 64),
    ("vit_small_patch16_224", {"attention": "moh"}, "vit_small_patch16_224", 224, 64),
    ("vit_small_patch16_224", {"attention": "moh", "img_size": 1024}, "vit_small_patch16_224", 1024, 8),
)
QUICK: tuple[tuple[str, dict[str, Any], str, int, int], ...] = (
    ("vit_tiny_patch16_224", {"attention": "moh", "img_size": 32}, "vit_tiny_patch16_224", 32, 1),
)
DECODERS = ("gqa", "kdgqa", "moh", "cca", "diff", "gda", "combiner")
LENGTHS = {"full": ((4096, 4), (16_384, 1)), "small": ((512, 1),), "quick": ((64, 1),)}  # tokens, sequences
_LLAMA: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816, "vocab_size": 8192},
    "small": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 704, "vocab_size": 512},
    "quick": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 64},
}


def cases(scale: str, create_model: Create) -> list[Case]:
    """Vision models, then decoders. `create_model`: of the package, which this room does not import."""
    return unique([*_vision(scale, create_model), *_decoders(scale, create_model)])


def _vision(scale: str, create_model: Create) -> Iterator[Case]:
    for name, options, reference, pixels, images in QUICK if scale == "quick" else VISION:
        batch = images if scale == "full" else 1
        pixels = pixels if scale == "full" else min(pixels, 256)
        settings = {**options, **({"img_size": pixels} if "img_size" in options else {})}
        theirs = {"img_size": pixels} if "img_size" in options else {}
        shape = (batch, 3, pixels, pixels)
        label = f"{name}, {options['attention']}" if "attention" in options else name
        ours = _image_model(partial(create_model, name, **settings), shape)
        yield Case(
            label,
            f"{pixels} pixels, batch {batch}, against {reference}",
            pixels,
            {
                "ours": Contender(ours),
                "theirs": Contender(
                    _image_model(partial(_timm, reference, **theirs), shape), shared=f"{reference} {pixels} {batch}"
                ),
                "plain": plain(ours, optional=True),
                "compiled": compiled(ours),
            },
            baseline="theirs",
            work=partial(_image_work, partial(create_model, name, **settings), shape),
            items=batch,
        )


def _on(device: str, dtype: torch.dtype, create: Callable[[], nn.Module]) -> nn.Module:
    """Made there, where random weights take no time."""
    with torch.device(device):
        return create().to(device, dtype)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)  # type: ignore[no-any-return]


def _image_model(create: Callable[[], nn.Module], shape: tuple[int, ...]) -> Build:
    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        return module_task(_on(device, dtype, create), normal(*shape, device=device, dtype=dtype), wrap)

    return build


def _decoders(scale: str, create_model: Create) -> Iterator[Case]:
    for length, batch in LENGTHS[scale]:
        for name in DECODERS:
            settings: dict[str, Any] = {**_LLAMA[scale], "max_position_embeddings": length}
            options: dict[str, Any] = {"attention": name}
            if name in ("gqa", "kdgqa"):
                settings["num_key_value_heads"] = settings["num_attention_heads"] // 4
            if name == "kdgqa":
                options["attention_kwargs"] = {"alloc_scope": "frozen"}
            if name in ("diff", "gda"):
                settings["num_attention_heads"] //= 2
            create = partial(_decoder, create_model, **settings, **options)
            ours, backend = _language_model(create, batch, length), "reference" if name == "combiner" else "torch"
            original = {**_LLAMA[scale], "max_position_embeddings": length}
            yield Case(
                f"llama, {name}",
                f"{length} tokens, batch {batch}, against Llama",
                length,
                {
                    "ours": Contender(ours),
                    "plain": plain(ours, backend, optional=True),
                    "compiled": compiled(ours, backend),
                    "theirs": Contender(_language_model(partial(_llama, **original), batch, length), shared=f"llama {length}"),
                },
                baseline="theirs",
                work=partial(_language_work, create, batch, length),
                items=batch * length,
            )


class Logits(nn.Module):
    """Of a language model of Hugging Face: (B, N) -> (B, N, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def _decoder(create_model: Create, **settings: Any) -> nn.Module:
    return Logits(create_model("llama", **settings))


def _llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Logits(LlamaForCausalLM(LlamaConfig(attn_implementation="sdpa", **settings)))


def _language_model(create: Callable[[], nn.Module], batch: int, length: int) -> Build:
    def build(device: str, dtype: torch.dtype, wrap: Wrap) -> Task:
        ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
        task = module_task(_on(device, dtype, create), ids, wrap)
        # transformers cannot look at its mask while a graph is recorded, and then attends with a whole one: another computation
        return replace(task, capturable=False)

    return build


def _image_work(create: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Work] | None:
    """By the products of one image's forward in plain code; None for a model that cannot be followed without data."""
    try:
        with torch.device("meta"):
            model, x = create().eval(), torch.empty(1, *shape[1:])
        with FlopCounterMode(display=False) as counter, ops.use_backend("reference"), torch.no_grad():
            model(x)
    except (NotImplementedError, RuntimeError):
        return None
    return _work(model, shape[0] * float(counter.get_total_flops()), 2.0 * shape[0] * x.numel())


def _language_work(create: Callable[[], nn.Module], batch: int, length: int) -> dict[str, Work] | None:
    """By the attention of its layers and the weights of all others, which each token meets once."""
    with torch.device("meta"):
        model = create()
    layers = [part for part in model.modules() if isinstance(part, AttentionModule)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    flops = [least_flops(layer, length) for layer in layers]
    if any(f is None for f in flops):
        return None
    linear = sum(2.0 * length * p.weight.numel() for p in model.modules() if isinstance(p, nn.Linear) and id(p) not in inside)
    return _work(model, batch * (linear + sum(f for f in flops if f is not None)), 8.0 * batch * length)


def _work(model: nn.Module, flops: float, input_bytes: float) -> dict[str, Work]:
    """With weights in half precision."""
    once = Work(flops, input_bytes + 2.0 * sum(p.numel() for p in model.parameters()))
    return {FORWARD: once, TRAIN: Work(3 * once.flops, 2 * once.bytes)}
