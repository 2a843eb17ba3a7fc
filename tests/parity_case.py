"""One parity case: what the official code computed for given weights and inputs, and how ours is built and fed to compare.

A case is a safetensors file `tests/fixtures/parity/<name>/<case>.safetensors`. Its tensors: `state.*` (official weights),
`input.*`, `output.*`, `cotangent.*` (weights of the outputs in the objective), `grad.input`, `grad.state.*` and `debug.*`. Its
metadata say which mechanism or model it is, with which arguments, and how close ours must come.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import attention_zoo as az

FIXTURES = Path(__file__).parent / "fixtures" / "parity"

# Tables of positions that the official forward is handed, and ours makes itself.
BUILT_BY_OURS = {"relative_coords_table", "relative_pos_index"}

# Decoders whose cases name the mechanism's options and Hugging Face's configuration in one, some fields by other names.
DECODERS = {"moh_llama", "motif", "diffllama", "llama_cca"}
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "mlp_hidden_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True)
class ParityCase:
    path: Path

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def meta(self) -> dict[str, str]:
        with safe_open(self.path, "pt") as file:
            return file.metadata()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    @property
    def target(self) -> str:
        """What is compared: an "attention", a "model", or "manual": a test of its own."""
        return self.meta["target"]

    @property
    def forward_kwargs(self) -> dict[str, Any]:
        return json.loads(self.meta.get("forward_kwargs") or "{}")

    @property
    def tolerance(self) -> float:
        return float(self.meta["tolerance"])

    @property
    def gradient_tolerance(self) -> float:
        return float(self.meta.get("tolerance_grad") or max(10 * self.tolerance, 1e-4))

    # --- ours -----------------------------------------------------------------------------------------------------------------

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Our name, and the keyword arguments in our vocabulary."""
        name, kwargs = self.meta["mechanism"], json.loads(self.meta["zoo_kwargs"])
        if name == "vit_kdgqa":  # stored as the family; each of its mechanisms has a model name of its own
            attention, kwargs["attention_kwargs"] = kwargs.pop("attn"), kwargs.pop("attn_kwargs")
            return f"vit_base_patch16_224_{attention}", kwargs
        if name in DECODERS:
            return name, _decoder_arguments(kwargs)
        if "causal" in kwargs and self.target != "model":
            kwargs["is_causal"] = kwargs.pop("causal")
        kwargs |= {k: v for k, v in self.forward_kwargs.items() if k in {"is_causal", "rope_layout"} and v is not None}
        return name, kwargs

    def build(self) -> nn.Module:
        """Our module with the official weights, in the case's mode."""
        name, kwargs = self.arguments()
        module: nn.Module = az.create_model(name, **kwargs) if self.target == "model" else az.create_attention(name, **kwargs)
        module.load_state_dict(self.convert(self.group("state")), strict=True)
        return module.train(self.meta["mode"] == "train")

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        name, kwargs = self.arguments()
        return az.convert_official_state_dict(name, state, **kwargs)

    def inputs(self) -> tuple[Tensor, dict[str, Any]]:
        """The main input, a leaf (unless it is token ids), and forward's keyword arguments."""
        inputs = self.group("input")
        x = next(inputs[name] for name in ("tokens", "x", "input_ids") if name in inputs)
        inputs = {k: v for k, v in inputs.items() if k not in {"tokens", "x", "input_ids", "hidden_states", *BUILT_BY_OURS}}
        if "rope_theta" in self.arguments()[1]:  # the tables are those that the mechanism makes itself
            inputs = {k: v for k, v in inputs.items() if k not in {"cos", "sin"}}
        kwargs: dict[str, Any] = {}
        for key, value in self.forward_kwargs.items():
            if key == "grid_size":
                kwargs[key] = tuple(value)
            elif isinstance(value, str) and value.startswith("input."):
                kwargs[key] = inputs.pop(value.removeprefix("input."))
            elif key not in {"is_causal", "rope_layout", "cross"}:
                kwargs[key] = value
        for mask in ("attn_mask", "key_padding_mask"):
            if mask in inputs:
                kwargs["attention_mask"] = inputs.pop(mask)
        if "rope_cos" in inputs:  # one column per angle; ours are as wide as a head, each angle twice
            half = self.forward_kwargs.get("rope_layout", "half") == "half"
            tables = (inputs.pop("rope_cos"), inputs.pop("rope_sin"))
            kwargs["position_embeddings"] = tuple(torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in tables)
        assert not inputs, f"the harness does not know what to do with {sorted(inputs)}"
        return x.requires_grad_(x.is_floating_point()), kwargs

    def record_embeddings(self, module: nn.Module) -> list[Tensor]:
        """The embedded tokens of a language model as a leaf, by which its gradient is stored, once forward has run; else empty."""
        leaves: list[Tensor] = []

        def detach(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            leaves.append(out.detach().requires_grad_())
            return leaves[-1]

        if "input.input_ids" in self.tensors:
            module.get_input_embeddings().register_forward_hook(detach)  # type: ignore[operator]
        return leaves

    def hand_noise_to_layers(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A model's stored noise has one slice for each layer that draws some; each layer is called with its own."""
        if self.target != "model" or "noise" not in kwargs:
            return kwargs
        noise = kwargs.pop("noise")
        layers = [m for m in model.modules() if "noise" in inspect.signature(m.forward).parameters]
        for layer, part in zip(layers, noise, strict=True):
            layer.register_forward_pre_hook(lambda _, args, kw, part=part: (args, {**kw, "noise": part}), with_kwargs=True)
        return kwargs


def _decoder_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model`: the configuration's fields, and what remains as the mechanism's options."""
    config = kwargs.pop("llama_config", {})
    kwargs.pop("swap", None)
    config.update({CONFIG_NAMES[k]: kwargs.pop(k) for k in list(kwargs) if k in CONFIG_NAMES})
    theta = config.pop("rope_theta", None) or kwargs.pop("rope_theta", None)
    if theta:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if "attn_norm_eps" in kwargs:
        kwargs["norm_eps"] = kwargs.pop("attn_norm_eps")
    return {**config, "attention_kwargs": kwargs}


def all_cases() -> list[ParityCase]:
    return [ParityCase(path) for path in sorted(FIXTURES.glob("*/*.safetensors"))]


def load_case(name: str) -> ParityCase:
    """The case `folder/stem`, for the tests of manual cases."""
    return ParityCase(FIXTURES / f"{name}.safetensors")
