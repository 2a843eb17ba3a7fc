"""The program that swaps attention in a saved model: how it is told, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program import SCRIPTS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import attention_zoo as az
from attention_zoo.cli import app
from attention_zoo.training.recipe import RecipeError, SwapRecipe
from attention_zoo.training.swap import apply_swap, open_model, parse_layers, read_swap, save_swapped

VIT = ("img_size=8", "patch_size=4", "embed_dim=16", "depth=4", "num_heads=2", "num_classes=3")


def swap(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["swap", *map(str, arguments)], catch_exceptions=False)


def vit(*arguments: Any) -> Result:
    return swap("timm/vit_tiny_patch16_224", *arguments, *(part for each in VIT for part in ("--model-arg", each)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hosts") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 31}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("3", (3,)),
        ("-1", (-1,)),
        ("8:24", (slice(8, 24),)),
        (":-2", (slice(None, -2),)),
        ("::2", (slice(None, None, 2),)),
        ("0-3", (slice(0, 4),)),
        ("0-3, 7 ,model.layers.*.self_attn", (slice(0, 4), 7, "model.layers.*.self_attn")),
    ],
)
def test_layers_as_text(text: str, layers: tuple[Any, ...]) -> None:
    assert parse_layers(text) == layers


def test_no_layers() -> None:
    with pytest.raises(RecipeError, match="no layers in ' , '"):
        parse_layers(" , ")


def test_a_model_is_swapped_saved_and_read(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "cca"
    done = swap(llama, "cca", "--layers", "1:3", "--option", "window_size=8", "--option", "group_size=4", "--output", out)
    assert done.exit_code == 0
    assert "2 layers" in done.stdout
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    az.swap_attention(model, "cca", layers=[1, 2], window_size=8, group_size=4)
    assert torch.equal(logits(az.from_pretrained(out)), logits(model))
    report = json.loads((out / "swap_report.json").read_text())
    assert report["source"] == str(llama)
    assert report["swap"]["options"] == {"window_size": 8, "group_size": 4}
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{i}.self_attn" for i in (1, 2)]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cca"], "nothing is left beside it"
    # what is swapped already can be swapped on, elsewhere
    again = swap(out, "moh", "--layers", "0", "--output", tmp_path / "both", "--dtype", "bfloat16")
    assert again.exit_code == 0
    both = az.from_pretrained(tmp_path / "both")
    assert both.dtype == torch.bfloat16
    assert {type(layer.self_attn).__name__ for layer in both.model.layers} == {"DecoderSlot", "LlamaAttention"}
    refused = swap(out, "moh", "--layers", "1", "--dry-run")
    assert refused.exit_code == 2
    assert "swapped already" in refused.output


def test_a_mapping_gives_each_layer_its_own(llama: Path, tmp_path: Path) -> None:
    told = ("--map", "0-1:gda", "--map", "2:moh", "--map", "3::cca", "--option", "cca.window_size=8")
    assert swap(llama, *told, "--output", tmp_path / "line").exit_code == 0
    file = tmp_path / "map.yaml"
    file.write_text("0:2: gda\n2: moh\n-1: [cca, {window_size: 8}]\n", encoding="utf-8")
    assert swap(llama, "--map-file", file, "--output", tmp_path / "file").exit_code == 0
    one, other = (json.loads((tmp_path / name / "config.json").read_text())["zoo_swap"] for name in ("line", "file"))
    assert one == other
    names = [layer["mechanism"] for layer in json.loads((tmp_path / "line" / "swap_report.json").read_text())["layers"]]
    assert names == ["gda", "gda", "moh", "cca"]


def test_a_dry_run_writes_nothing_and_needs_no_weights(llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    without = swap(bare, "gda", "--dry-run", "--device", "meta")
    assert without.exit_code == 0
    assert without.stdout == swap(llama, "gda", "--dry-run", "--output", tmp_path / "out").stdout
    assert without.stdout.startswith("would swap")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_a_model_of_timms(tmp_path: Path) -> None:
    options = ("--init", "mean_pool", "--option", "num_kv_heads=1", "--map", "0-1:kdgqa", "--map", "-1:dgqa")
    assert vit(*options, "--output", tmp_path / "vit").exit_code == 0
    model = az.from_pretrained(tmp_path / "vit")
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    mechanisms = [getattr(block.attn, "mechanism", None) for block in model.blocks]
    assert [None if m is None else m.attention_info.name for m in mechanisms] == ["kdgqa", "kdgqa", None, "dgqa"]
    assert swap(tmp_path / "vit", "gqa", "--layers", "2", "--option", "num_kv_heads=2", "--output", tmp_path / "on").exit_code == 0
    assert az.from_pretrained(tmp_path / "on").blocks[2].attn.mechanism.attention_info.name == "gqa"


def test_nothing_is_written_over(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("a shard of before")
    refused = swap(llama, "moh", "--output", tmp_path)
    assert refused.exit_code == 2
    assert "is not empty" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-00001-of-00002.safetensors", "notes.txt"]
    assert swap(llama, "moh", "--output", tmp_path, "--force").exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()
    assert swap(llama, "moh", "--output", tmp_path / "notes.txt", "--force").exit_code == 2


def test_a_failure_to_save_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(llama))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(az, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_swapped(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mooh"], "no attention is named 'mooh'; did you mean"),
        ([], "names one mechanism, or a mapping"),
        (["moh", "--map", "0:moh"], "names one mechanism, or a mapping"),
        (["--map", "moh"], "LAYERS:MECHANISM, as 0-3:moh; got 'moh'"),
        (["--map", "0:moh", "--layers", "1"], "says its layers itself"),
        (["--map", "0:moh", "--map", "0-2:gda"], "is chosen twice"),
        (["--map-file", "nowhere.yaml"], "nowhere.yaml"),
        (["moh", "--layers", "9"], "no attention layer is 9"),
        (["moh", "--option", "topk"], "an option is written key=value"),
        (["moh", "--option", "cca.window_size=3"], "options for cca, which is not among the mechanisms moh"),
        (["moh", "--option", "shared=3"], "has no option 'shared'"),
        (["moh", "--option", "shared_heads=[1"], "is not YAML"),
        (["moh", "--init", "copy"], "init must be one of"),
        (["moh", "--dtype", "int8"], "dtype must be float32"),
        (["moh", "--device", "nothing"], "device 'nothing'"),
        (["moh", "--pretrained"], "are for models of timm's"),
        (["hilo"], "cannot take the place of"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, llama: Path) -> None:
    done = swap(llama, *arguments, "--dry-run")
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_what_is_wrong_with_the_place_is_said(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for arguments, message in (
        ([llama, "moh"], "say where the swapped model goes"),
        ([llama, "moh", "--device", "meta", "--output", tmp_path / "out"], "goes with --dry-run"),
        ([tmp_path, "moh", "--dry-run"], "no config.json in"),
        ([tmp_path / "no" / "such", "moh", "--dry-run"], "no folder"),
        (["nobody/nothing", "moh", "--dry-run"], "no folder nobody/nothing"),
        (["vit_tiny_patch16_224", "moh", "--dry-run"], "timm/vit_tiny_patch16_224"),
        (["timm/vit_tny_patch16_224", "moh", "--dry-run"], "did you mean 'vit_tiny_patch16_224'"),
    ):
        done = swap(*arguments)
        assert done.exit_code == 2
        assert message in done.output


def test_map_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    for text, message in (("[", "neither YAML nor JSON"), ("[1]", "must hold layers"), ("0: [moh, 1]", "or \\[name")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            read_swap(map_file=file)


def test_an_unknown_recipe_of_a_swap(llama: Path) -> None:
    with pytest.raises(RecipeError, match="names one mechanism"):
        apply_swap(open_model(str(llama)).model, SwapRecipe())


@pytest.mark.slow
def test_the_program_is_the_command(llama: Path) -> None:
    """In a process of its own, once."""
    arguments = [str(llama), "moh", "--layers", "0", "--dry-run", "--device", "meta"]
    done = subprocess.run([sys.executable, str(SCRIPTS / "swap.py"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == swap(*arguments).stdout
