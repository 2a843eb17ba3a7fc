"""The program that grows a saved decoder's signal heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from program import call
from transformers import AutoModelForCausalLM

import attention_zoo as az

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 17}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = az.create_model("llama_tiny", attention="gda", attention_kwargs={"num_noise_heads": 2}, **SIZES)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(12)[None]).logits
    return out


def test_without_noise_the_function_stays(saved: Path, tmp_path: Path) -> None:
    done = call("grow", saved, tmp_path / "grown", "--factor", 3, "--noise", 0)
    assert done.exit_code == 0
    assert "12 signal heads" in done.stdout
    torch.testing.assert_close(logits(tmp_path / "grown"), logits(saved), atol=1e-5, rtol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown").config.num_attention_heads == 12


def test_by_default_the_copies_differ_a_little(saved: Path, tmp_path: Path) -> None:
    assert call("grow", saved, tmp_path / "grown").exit_code == 0
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").model.layers[0].self_attn
    heads = layer.q_proj.weight.unflatten(0, (2, 5, -1))[0]
    assert (heads[0] - heads[1]).abs().max() > 0
    torch.testing.assert_close(logits(tmp_path / "grown"), logits(saved), atol=0.05, rtol=0.05)


def test_what_cannot_be_grown_is_said(saved: Path, tmp_path: Path) -> None:
    assert call("grow", saved, saved).exit_code == 2, "nothing is written over"
    az.create_model("llama_tiny", **SIZES).save_pretrained(tmp_path / "plain")
    done = call("grow", tmp_path / "plain", tmp_path / "grown")
    assert done.exit_code == 2
    assert "gda" in done.output
    assert not (tmp_path / "grown").exists()
    assert call("grow", tmp_path / "nothing", tmp_path / "grown").exit_code == 2
