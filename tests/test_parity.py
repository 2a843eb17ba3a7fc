"""Parity: outputs and gradients against what the official code computed, at the tolerance that each case names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_case import ParityCase, all_cases
from torch import Tensor, nn

import attention_zoo as az

CASES = all_cases()
AUTOMATIC = [c for c in CASES if c.target in {"attention", "model"}]

# Cases that a single forward cannot show, and the test that holds ours to each.
MANUAL = {
    "agent/agentsd_attn": "tests/attention/test_agent_sd.py::test_attention_as_the_official_code",
    "agent/agentsd_match_8x6": "tests/attention/test_agent_sd.py::test_matching_as_the_official_code",
    "agent/cswin_branch_full_6x6": "tests/attention/test_agent_cswin.py::test_branch_parity",
    "agent/swin_block_window4_shift2": "tests/models/test_agent_swin.py::test_block_parity",
    "agent_swin/ckpt_resize_16_to_24": "tests/checkpoints/test_agent_swin.py::test_other_resolution",
    "cca/decode_gqa_w4_p4": "tests/attention/test_cca.py::test_decoding_as_the_official_code",
    "dgqa/diff_train_then_eval_w3": "tests/attention/test_kdgqa.py::test_dgqa_sequences",
    "dgqa/ema_train_w2": "tests/attention/test_kdgqa.py::test_dgqa_sequences",
    "gda/grow_x2": "tests/attention/test_grow.py::test_the_stored_growth",
    "moh_dit/tiny": "tests/models/test_moh_dit.py::test_official_outputs_and_gradients",
    "moh_dit/tiny_mixed": "tests/models/test_moh_dit.py::test_official_outputs_and_gradients",
    "gqa/convert_h6kv3": "tests/attention/test_gqa.py::test_conversion",
}
RETURNED = {"tokens", "out", "x", "logits"}  # stored outputs that forward returns, besides feature maps
# What a mechanism computes on the way, or a model would have without it, and the test that compares it.
ELSEWHERE = {
    "pool_weights": "tests/attention/test_cca.py::test_core_tokens_as_the_official_code",
    "core_k": "tests/attention/test_cca.py::test_core_tokens_as_the_official_code",
    "core_v": "tests/attention/test_cca.py::test_core_tokens_as_the_official_code",
    "mask": "tests/attention/test_cca.py::test_core_tokens_as_the_official_code",
    "prob": "tests/attention/test_combiner.py::test_probabilities_as_the_official_code",
    "r_idx": "tests/attention/test_bra.py::test_routing_as_the_official_code",
    "r_weight": "tests/attention/test_bra.py::test_routing_as_the_official_code",
    "logits_softmax_attention": "tests/checkpoints/test_cca.py::test_before_the_swap",
}


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", AUTOMATIC, ids=str)
def test_case(case: ParityCase) -> None:
    module = case.build()
    x, kwargs = case.inputs()
    leaves = case.record_embeddings(module)
    result = module(x, **case.hand_noise_to_layers(module, kwargs))
    outputs, stored = _named_outputs(case, getattr(result, "logits", result)), case.group("output")
    if (padding := kwargs.get("attention_mask")) is not None and padding.ndim == 2 and not padding.is_floating_point():
        outputs = {name: _without_free_rows(got, stored[name], padding) for name, got in outputs.items()}
    for name, got in outputs.items():
        close(got, laid_out(stored[name], got), case.tolerance, f"output {name}")
    _check_side_results(case, module, stored)
    _check_gradients(case, module, leaves[0] if leaves else x, outputs)


def _without_free_rows(got: Tensor, stored: Tensor, padding: Tensor) -> Tensor:
    """What a padded token returns is free where 0 is stored for it."""
    free = ~padding.bool() & (stored == 0).all(-1) if stored.shape[:2] == padding.shape else torch.zeros_like(got[..., 0]).bool()
    return got.masked_fill(free[..., None], 0.0)


def laid_out(stored: Tensor, like: Tensor) -> Tensor:
    """A stored map (B, C, H, W) or (B, H, W, C) as the tokens (B, N, C) that ours takes and returns."""
    if stored.ndim != 4 or like.ndim != 3:
        return stored
    channels_last = stored.flatten(1, 2)
    return channels_last if channels_last.shape == like.shape else stored.flatten(2).transpose(1, 2)


def _named_outputs(case: ParityCase, result: Any) -> dict[str, Tensor]:
    """What forward returned, under the names it is stored as: maps of a dense backbone, logits, or tokens (also called out)."""
    stored = case.group("output")
    if isinstance(result, (list, tuple)):
        assert len(result) == sum(name.startswith("feat") and name[4:].isdigit() for name in stored)
        return {f"feat{i}": feature_map for i, feature_map in enumerate(result)}
    names = ["logits"] if case.target == "model" else [n for n in ("tokens", "out", "x") if n in stored]
    return dict.fromkeys(names, result)


def _check_side_results(case: ParityCase, module: nn.Module, stored: dict[str, Tensor]) -> None:
    """Allocations, statistics, the auxiliary loss, and a model's features before its head."""
    for name, want in stored.items():
        if name == "allocation":
            assert module.last_allocation.tolist() == want.tolist()
        elif name.startswith("allocation_block"):
            block = module.blocks[int(name.removeprefix("allocation_block"))]
            assert block.attn.last_allocation.tolist() == want.tolist()
        elif name == "cache_after":
            close(module.cache, want, case.tolerance, name)
        elif name == "aux_loss":
            close(az.auxiliary_loss(module), want, case.tolerance, name)
        elif name == "features":
            features = module.forward_features(case.inputs()[0])
            if want.ndim == 2:  # pooled
                features = module.forward_head(features, pre_logits=True)
            close(features, want, case.tolerance, name)
        else:
            assert name in RETURNED | ELSEWHERE.keys() or name.startswith("feat"), f"nothing compares output.{name}"


def _check_gradients(case: ParityCase, module: nn.Module, x: Tensor, outputs: dict[str, Tensor]) -> None:
    """Gradient of sum(output * cotangent), the auxiliary loss included where it has a cotangent, by the input and by parameters."""
    cotangents = case.group("cotangent")
    if "grad.embedding" in case.tensors:
        (outputs["logits"] * cotangents["logits"]).sum().backward()
        gradient = module.get_input_embeddings().weight.grad  # type: ignore[operator]
        close(gradient, case.tensors["grad.embedding"], case.gradient_tolerance, "gradient by the embedding")
        return
    if "grad.input" not in case.tensors:
        assert not cotangents
        return
    if {"tokens", "out"} <= set(cotangents):
        outputs = {k: v for k, v in outputs.items() if k != "out"}  # the same output under two names
    terms = [(outputs[name] * laid_out(cotangents[name], outputs[name])).sum() for name in outputs if name in cotangents]
    assert terms
    if "aux_loss" in cotangents:
        terms.append(az.auxiliary_loss(module) * cotangents["aux_loss"])
    torch.stack(terms).sum().backward()
    assert x.grad is not None
    close(x.grad, laid_out(case.tensors["grad.input"], x.grad), case.gradient_tolerance, "gradient by the input")

    if stored := case.group("grad.state"):
        # A converter maps keys and moves rows, so it takes gradients to our names as well; NaN marks what is not stored.
        unknown = {k: torch.full_like(v, torch.nan) for k, v in case.group("state").items() if v.is_floating_point()}
        compared = 0
        for name, want in case.convert({**case.group("state"), **unknown, **stored}).items():
            if want.is_floating_point() and not want.isnan().any():
                got = module.get_parameter(name).grad
                assert got is not None
                close(got, want, case.gradient_tolerance, f"gradient by {name}")
                compared += 1
        assert compared == len(stored)


def test_every_manual_case_is_claimed() -> None:
    """A case without a generic comparison names its test: it exists, and names the case's file in turn."""
    manual = {str(c) for c in CASES if c.target not in {"attention", "model"}}
    assert manual == set(MANUAL)
    for case, test in MANUAL.items():
        assert case.split("/")[1] in _source_of(test), f"{case}: {test} does not mention it"


def test_what_is_compared_elsewhere_is() -> None:
    for name, test in ELSEWHERE.items():
        assert name in _source_of(test), f"{name}: {test} does not mention it"


def _source_of(test: str) -> str:
    """The file of a test `path::function`, which must have it."""
    file, function = test.split("::")
    path = Path(__file__).parent.parent / file
    assert path.exists(), f"{file} does not exist"
    source = path.read_text(encoding="utf-8")
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert function in functions, f"{file} has no {function}"
    return source


def test_there_are_cases() -> None:
    assert len(AUTOMATIC) >= 25
    assert {c.path.parent.name for c in CASES} >= {"hilo", "dtm", "litv2", "gqa", "kdgqa", "dgqa", "pgqa", "vit_kdgqa", "moh"}


@pytest.mark.parametrize("case", AUTOMATIC, ids=str)
def test_a_wrong_result_would_be_noticed(case: ParityCase) -> None:
    """The harness itself: with its weights off by a hundredth, no case passes."""
    broken = ParityCase(case.path)
    for key, tensor in broken.tensors.items():
        if key.startswith("state.") and tensor.is_floating_point():
            tensor += 1e-2 * torch.randn(tensor.shape)
    with pytest.raises(AssertionError):
        test_case(broken)
