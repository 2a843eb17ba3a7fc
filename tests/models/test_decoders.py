"""The names of the decoders, and when transformers learns of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import attention_zoo as az
from attention_zoo.models._when_imported import when_imported  # type: ignore[import-not-found]

PROGRAM = """
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=11)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zoo_llama", **sizes))
assert type(model).__name__ == "ZooLlamaForCausalLM"
assert type(AutoConfig.for_model("combiner_lm")).__name__ == "CombinerLMConfig"
LlamaForCausalLM(LlamaConfig(**sizes)).set_attn_implementation("zoo")
"""
IMPORTS = "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM"


ORDERS = {
    "zoo-first": ("import attention_zoo", IMPORTS),
    "transformers-first": (IMPORTS, "import attention_zoo"),
    "a-part-of-it-first": ("import transformers.modeling_layers", "import attention_zoo", IMPORTS),
    "zoo-then-a-part": ("import attention_zoo", "import transformers.generation.utils", IMPORTS),
    "its-facade-first": ("import transformers", "import attention_zoo", IMPORTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_the_decoders_in_any_order(order: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "\n".join(ORDERS[order]) + PROGRAM], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_first_decoder_may_be_built_on_the_meta_device(tmp_path: Path) -> None:
    """transformers is imported then, and must not be under the device's spell."""
    program = "import torch, attention_zoo as az\nwith torch.device('meta'):\n    az.create_model('llama_tiny')\n"
    program += IMPORTS + PROGRAM  # and then as above, the zoo first
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_action_waits_for_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited_module.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    finders = list(sys.meta_path)

    def action() -> None:
        seen.append(sys.modules["awaited_module"].VALUE)

    when_imported("awaited_module", action)
    assert seen == []
    import awaited_module  # type: ignore[import-not-found]

    assert seen == [3]
    assert sys.meta_path == finders, "nothing stays behind"
    assert type(awaited_module.__spec__.loader).__module__ == "_frozen_importlib_external"
    when_imported("awaited_module", action)
    assert seen == [3, 3], "at once when it is there already"


def test_names_say_what_they_stand_for() -> None:
    names = set(az.list_models(["*llama*", "cca_*", "motif*", "combiner_lm*"]))
    assert {
        "llama",
        "llama_tiny",
        "moh_llama3_8b",
        "cca_qwen2_5_7b",
        "diffllama",
        "motif_2_6b",
        "combiner_lm",
        "combiner_lm_tiny",
    } <= names


def test_a_familys_options_stand_where_its_mechanism_does() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for attention in (None, "moh", ["moh", "moh"]):
        model = az.create_model("moh_llama", **sizes, attention=attention)
        assert [layer.self_attn.router_kind for layer in model.model.layers] == ["query_norm"] * 2
    hybrid = az.create_model("motif", **sizes, attention=["gqa", "gda"], attention_kwargs=[None, {"num_noise_heads": 2}])
    assert hybrid.config.attention_kwargs[1] == {
        "num_noise_heads": 2,
        "num_kv_heads": 2,
        "lambda_depth_offset": -1,
        "norm_eps": 1e-5,
    }
    assert az.create_model("llama", **sizes, attention=["gqa", "mha"]).config.attention_kwargs is None
    with pytest.raises(ValueError, match="names 2 layers, attention_kwargs 1"):
        az.create_model("llama", **sizes, attention=["gqa", "mha"], attention_kwargs=[None])


def test_routed_heads_that_were_set_are_saved(tmp_path: Path) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = az.create_model("moh_llama", **sizes, attention_kwargs={"shared_heads": 1, "active_heads": 4}).eval()
    for number in (2, [1, 3]):
        az.set_routed_topk(model, number)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        want = [number] * 2 if isinstance(number, int) else number
        assert [layer.self_attn.routed_topk for layer in again.model.layers] == want
        assert [layer.self_attn.router_kind for layer in again.model.layers] == ["query_norm"] * 2
