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
        if "causal" in kwargs:
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
        """The main input, a leaf, and forward's keyword arguments."""
        inputs = self.group("input")
        x = inputs.pop("tokens", inputs.get("x"))
        inputs.pop("x", None)
        kwargs: dict[str, Any] = {}
        for key, value in self.forward_kwargs.items():
            if key == "grid_size":
                kwargs[key] = tuple(value)
            elif isinstance(value, str) and value.startswith("input."):
                kwargs[key] = inputs.pop(value.removeprefix("input."))
            elif key not in {"is_causal", "rope_layout"}:
                kwargs[key] = value
        if "rope_cos" in inputs:  # one column per angle; ours are as wide as a head, each angle twice
            half = self.forward_kwargs.get("rope_layout", "half") == "half"
            tables = (inputs.pop("rope_cos"), inputs.pop("rope_sin"))
            kwargs["position_embeddings"] = tuple(torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in tables)
        assert not inputs, f"the harness does not know what to do with {sorted(inputs)}"
        return x.requires_grad_(), kwargs

    def hand_noise_to_layers(self, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A model's stored noise has one slice for each layer that draws some; each layer is called with its own."""
        if self.target != "model" or "noise" not in kwargs:
            return kwargs
        noise = kwargs.pop("noise")
        layers = [m for m in model.modules() if "noise" in inspect.signature(m.forward).parameters]
        for layer, part in zip(layers, noise, strict=True):
            layer.register_forward_pre_hook(lambda _, args, kw, part=part: (args, {**kw, "noise": part}), with_kwargs=True)
        return kwargs


def all_cases() -> list[ParityCase]:
    return [ParityCase(path) for path in sorted(FIXTURES.glob("*/*.safetensors"))]


def load_case(name: str) -> ParityCase:
    """The case `folder/stem`, for the tests of manual cases."""
    return ParityCase(FIXTURES / f"{name}.safetensors")
