"""Decoders of transformers that are swapped and trained on: recipes, what is trained, what is measured, saved and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from program import SCRIPTS, call
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import attention_zoo as az
from attention_zoo.swap.slot import Slot
from attention_zoo.training import finetune
from attention_zoo.training.finetune import FinetuneRecipe, FinetuneRun, as_markdown, prepare, runs_of
from attention_zoo.training.loop import TrainingDivergedError
from attention_zoo.training.recipe import RecipeError, build_recipe, describe_recipe, list_recipes, read_recipe
from attention_zoo.training.swap import apply_swap

CONSOLE = Console(quiet=True)
MOH = {"mechanism": "moh", "options": {"shared_heads": 2, "routed_topk": 1}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents in which every second letter tells the next."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{c}{c.upper()}" for c in "abcdefgh"[i:] + "zyxw" * 8) * 3, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A tiny Llama that was trained on them, by the program."""
    folder = tmp_path_factory.mktemp("models") / "base"
    config = {"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    recipe = {
        "model": {"config": config},
        "train": {"steps": 60, "lr": 0.02},
        "output": {"root": str(folder.parent), "name": "base"},
    }
    run = train(recipe, texts)
    assert run.before is run.swapped is None
    assert run.held_out[-1] == (60, run.after)
    assert run.train[0][1] > run.train[-1][1]
    return folder


def build(content: dict[str, Any], texts: Path) -> FinetuneRecipe:
    sections: dict[str, Any] = {
        "data": {"name": str(texts), "held_out_every": 4, "length": 16, "batch_size": 4},
        "train": {"steps": 6, "lr": 0.01},
        "engine": {"cpu": True},
        "output": {"save": False, "log_every": 3, "validate_every": 4},
    }
    for section, keys in content.items():
        sections[section] = {**sections.get(section, {}), **keys}
    if "root" in sections["output"]:
        sections["output"]["save"] = True
    return build_recipe(FinetuneRecipe, sections)


def train(content: dict[str, Any], texts: Path, name: str = "run") -> FinetuneRun:
    return prepare(build(content, texts), name).run(CONSOLE)


def test_swap_train_save_and_read(llama: Path, texts: Path, tmp_path: Path) -> None:
    output = {"root": str(tmp_path), "name": "moh"}
    run = train({"model": {"path": str(llama), "swap": MOH}, "output": output}, texts, "moh")
    assert run.before is not None
    assert run.swapped is not None
    assert run.before < run.swapped, "a head less at work"
    assert run.after < run.swapped
    assert run.mechanisms == {"moh": 2}
    assert [update for update, _ in run.held_out] == [4, 6]
    assert [update for update, _ in run.train] == [3, 6]
    assert run.tokens == "bytes"
    assert {path.name for path in (tmp_path / "moh").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "swap_report.json",
    }
    again = read_recipe(FinetuneRecipe, tmp_path / "moh" / "recipe.yaml")
    assert again.model.swap is not None
    # what was saved is what was measured, and is trained on without another swap
    on = train({"model": {"path": str(tmp_path / "moh")}, "train": {"steps": 1}}, texts)
    assert on.before == pytest.approx(run.after, abs=1e-4)
    assert on.swapped is None
    assert on.mechanisms == {"moh": 2}
    with pytest.raises(FileExistsError, match="is not empty"):
        prepare(build({"model": {"path": str(llama)}, "output": output}, texts), "moh")
    assert "| moh | moh x 2 |" in as_markdown([run, on])


def test_the_auxiliary_loss_is_in_the_loss_with_no_code_of_the_users(llama: Path, texts: Path) -> None:
    losses = {}
    for coefficient in (0.0, 0.01, 10.0):
        swap = {**MOH, "aux_loss_coef": coefficient}
        run = train({"model": {"path": str(llama), "swap": swap}, "train": {"steps": 3}, "output": {"log_every": 1}}, texts)
        losses[coefficient] = run.train[0][1]
    assert losses[0.0] + 0.009 < losses[0.01] < losses[0.0] + 0.03  # about K = 1 times the weight
    assert losses[10.0] > losses[0.0] + 9


def test_heads_are_taken_away_in_steps(llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    set_topk = az.set_routed_topk
    monkeypatch.setattr(az, "set_routed_topk", lambda model, k: (seen.append(k), set_topk(model, k)))
    content = {
        "model": {"path": str(llama), "swap": {"mechanism": "moh"}},
        "train": {"steps": 4, "routed_topk": {0: 2, 0.5: 1}},
        "output": {"root": str(tmp_path), "name": "moh"},
    }
    run = train(content, texts)
    assert run.swapped == pytest.approx(run.before, abs=1e-5), "it starts with all heads"
    assert seen == [2, 1]
    loaded = az.from_pretrained(tmp_path / "moh")
    assert {slot.mechanism.routed_topk for slot in loaded.modules() if isinstance(slot, Slot)} == {1}


def test_grown_heads_are_trained_and_saved(llama: Path, texts: Path, tmp_path: Path) -> None:
    content = {
        "model": {"path": str(llama), "swap": {"mechanism": "gda"}, "grow": {"factor": 2, "noise": 0.0}},
        "output": {"root": str(tmp_path), "name": "gda"},
    }
    run = train(content, texts)
    assert run.swapped == pytest.approx(run.before, abs=1e-5), "the same function"
    loaded = az.from_pretrained(tmp_path / "gda")
    assert {slot.mechanism.num_heads for slot in loaded.modules() if isinstance(slot, Slot)} == {8}
    on = train({"model": {"path": str(tmp_path / "gda")}, "train": {"steps": 1}}, texts)
    assert on.before == pytest.approx(run.after, abs=1e-4)


@pytest.mark.parametrize("mechanism", ["moh", "gda"])
def test_lora_trains_projections_and_what_is_new(mechanism: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    options = {"router": "linear"} if mechanism == "moh" else {}  # the decoders' own router has no parameters
    content: dict[str, Any] = {
        "model": {"path": str(llama), "swap": {"mechanism": mechanism, "options": options}},
        "lora": {"rank": 2},
        "output": {"root": str(tmp_path), "name": "lora"},
    }
    job = prepare(build(content, texts), "lora")
    before = {name: tensor.clone() for name, tensor in job.source.model.state_dict().items()}
    run = job.run(CONSOLE)
    after = az.from_pretrained(tmp_path / "lora").state_dict()
    assert after.keys() == before.keys(), "the adapters are merged"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".mechanism." in name for name in changed)
    kinds = {name.split(".mechanism.")[1].split(".")[0] for name in changed}
    assert kinds & {"q_proj", "qkv", "q"}
    assert kinds & {"router", "balance", "lambda_q1"}
    assert run.trained_parameters < run.parameters / 4
    assert run.swapped is not None
    assert run.after < run.swapped


def test_lora_on_layers_by_name(llama: Path, texts: Path) -> None:
    run = train({"model": {"path": str(llama)}, "lora": {"rank": 2, "target": ["up_proj"]}, "train": {"steps": 1}}, texts)
    assert run.trained_parameters == 2 * 2 * (16 + 24)


def test_only_the_swapped_layers_are_trained(llama: Path, texts: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "model": {"path": str(llama), "swap": {"mechanism": "cca", "layers": "1", "options": {"window_size": 4, "group_size": 2}}},
        "train": {"parameters": "swapped"},
        "engine": {"grad_checkpointing": True, "mixed_precision": "bf16"},
        "output": {"root": str(tmp_path), "name": "cca"},
    }
    run = train(content, texts)
    host, tuned = (az.from_pretrained(folder).state_dict() for folder in (llama, tmp_path / "cca"))
    shared = host.keys() & tuned.keys()
    assert all(torch.equal(host[name], tuned[name]) for name in shared)
    assert not torch.equal(
        host["model.layers.1.self_attn.q_proj.weight"], tuned["model.layers.1.self_attn.mechanism.q_proj.weight"]
    )
    assert run.trained_parameters == sum(t.numel() for name, t in tuned.items() if ".mechanism." in name)


def test_tokens_are_the_tokenizers(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2, "end": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    folder = tmp_path / "model"
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=4)
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="end").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["a b"] * 30 + ["b a"]), encoding="utf-8")
    data = {"name": str(text), "held_out_every": 31, "length": 2, "batch_size": 2}
    content = {
        "model": {"path": str(folder)},
        "data": data,
        "output": {"root": str(tmp_path), "name": "out"},
        "train": {"steps": 1},
    }
    job = prepare(build(content, tmp_path), "words")
    assert job.train.tolist() == [0, 1, 3] * 30
    assert job.held_out.tolist() == [1, 0, 3]
    assert job.run(CONSOLE).tokens.endswith("Fast") or "Tokenizer" in job.tokens
    assert (tmp_path / "out" / "tokenizer.json").is_file(), "it goes along"
    with pytest.raises(RecipeError, match="tokens go up to 98, the model's vocabulary has 4"):
        prepare(build({**content, "output": {}, "data": {**data, "tokens": "bytes"}}, tmp_path), "bytes")
    assert len(prepare(build({**content, "output": {}, "data": {**data, "documents": 20}}, tmp_path), "d").train) == 19 * 3


def test_variants_differ_in_what_they_say(llama: Path, texts: Path, tmp_path: Path) -> None:
    shared = {"model": {"path": str(llama)}, "variants": {"plain": {}, "moh": {"model": {"swap": MOH}, "train": {"steps": 2}}}}
    recipe = build({**shared, "output": {"root": str(tmp_path), "name": "both"}}, texts)
    runs = runs_of(recipe)
    assert list(runs) == ["plain", "moh"]
    assert runs["plain"] == replace(recipe, variants={}, output=replace(recipe.output, root=str(tmp_path / "both"), name="plain"))
    assert (runs["moh"].train.steps, runs["plain"].train.steps) == (2, 6)
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump({"kind": "finetune", **recipe.to_dict()}, sort_keys=False), encoding="utf-8")
    result = call("finetune_text", path)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "both" / "results.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["plain", "moh"]
    assert content["runs"][0]["before"] == content["runs"][1]["before"]
    assert (tmp_path / "both" / "results.md").read_text().strip() in result.output
    assert az.from_pretrained(tmp_path / "both" / "moh").config.zoo_swap
    wrong = call("finetune_text", path, "variants.third={model: {swap: {mechanism: hilo}}}", "output.name=other")
    assert wrong.exit_code == 2
    assert "cannot take the place of" in wrong.output
    assert not (tmp_path / "other").exists(), "said before the first was trained"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=4", r"no key 'train.stepz'; did you mean 'train.steps'"),
        ("steps=4", r"is a section or no key at all"),
        ("train.steps=0", r"train.steps must be at least 1, got 0"),
        ("train.parameters=some", r"train.parameters must be all or swapped, got 'some'"),
        ("engine.mixed_precision=fp8", r"engine.mixed_precision must be no or bf16 or fp16"),
        ("model.config={model_type: llama}", r"give one of them"),
        ("train.routed_topk={1.5: 2}", r"at least 0 and below 1, got '1.5'"),
        ("train.routed_topk={0: all}", r"train.routed_topk.0 must be a whole number"),
        ("variants.a=3", r"variants.a must hold sections, got 3"),
        ("variants.a={train: {step: 3}}", r"variants.a: a recipe has no key 'train.step'"),
    ],
)
def test_wrong_recipes(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(FinetuneRecipe, "finetune/tiny_llama_swaps", [override])


def test_what_cannot_be_trained_is_said(llama: Path, texts: Path, tmp_path: Path) -> None:
    path = {"path": str(llama)}
    for content, message in (
        ({"model": path, "train": {"parameters": "swapped"}}, "trains swapped layers, and the model has none"),
        ({"model": path, "lora": {"rank": 2}}, "trains swapped layers, and the model has none"),
        ({"model": path, "data": {"length": 4000}}, "too few for pieces of 4000"),
        ({"model": path, "data": {"name": str(tmp_path)}}, "neither 'pydoc-topics' nor"),
        ({"model": path, "grow": {}}, "no key 'grow'"),
        ({"model": {**path, "grow": {"factor": 2}}}, "no grouped differential attention"),
        ({"model": {"config": {"model_type": "lama"}}}, "model.config: "),
        ({"model": {"path": "timm/vit_tiny_patch16_224"}}, "holds VisionTransformer, which is no decoder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(build(content, texts), "wrong")


def test_a_run_that_diverges_says_so(llama: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(build({"model": {"path": str(llama)}, "train": {"steps": 1}}, texts), "run")
    monkeypatch.setattr(finetune, "_evaluate", lambda *args: float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"a lower train\.lr"):
        job.run(CONSOLE)


@pytest.mark.parametrize("name", list_recipes(FinetuneRecipe))
def test_the_zoos_recipes_are_right(name: str) -> None:
    """Every swap that they name fits the kind of decoder that it is for."""
    runs = runs_of(read_recipe(FinetuneRecipe, name))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 32, "vocab_size": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
    tiny = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 1}, num_attention_heads=8, num_key_value_heads=4))
    for run in runs.values():
        if run.model.swap is not None:
            report = apply_swap(tiny if "tiny" in name else model, run.model.swap, dry_run=True)
            assert report.layers


def test_the_program_lists_and_explains() -> None:
    assert "finetune/tiny_llama_swaps" in call("finetune_text", "list").output.split()
    assert "train: steps=100" in call("finetune_text", "keys").output == describe_recipe(FinetuneRecipe) + "\n"
    assert call("finetune_text", "finetune/tiny_llama_swap").exit_code == 2


@pytest.mark.slow
def test_the_program_in_a_process_of_its_own(llama: Path, texts: Path, tmp_path: Path) -> None:
    recipe = build({"model": {"path": str(llama), "swap": MOH}, "train": {"steps": 2}}, texts)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"kind": "finetune", **recipe.to_dict()}, sort_keys=False), encoding="utf-8")
    arguments = [str(SCRIPTS / "finetune_text.py"), str(path), "output.save=true", "--output", str(tmp_path / "out" / "mine")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| mine | moh x 2 |" in done.stdout
    assert az.from_pretrained(tmp_path / "out" / "mine").config.zoo_swap


def test_the_same_seed_gives_the_same_run(llama: Path, texts: Path) -> None:
    content = {"model": {"path": str(llama), "swap": MOH}, "train": {"steps": 2}, "output": {"log_every": 1}}
    first, same, other = (train({**content, "engine": {"seed": seed}}, texts) for seed in (1, 1, 2))
    assert first.train == same.train != other.train
