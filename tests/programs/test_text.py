"""The comparison of decoders on text: what is read, trained alike, measured, drawn and written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from program import call
from rich.console import Console

import attention_zoo as az
from attention_zoo.training import text
from attention_zoo.training.plots import Curves, plot_side_by_side
from attention_zoo.training.recipe import Recipe, RecipeError, build_recipe, list_recipes, load_recipe, read_recipe
from attention_zoo.training.text import TextDataRecipe, TextRecipe, compare, open_texts

CONSOLE = Console(quiet=True)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Eight documents in which every second letter tells the next."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{c}{c.upper()}" for c in "abcdefgh"[i:] + "zyxw" * 8) * 3, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(documents: Path, tmp_path: Path) -> dict[str, Any]:
    """The sections of the recipe; its results are in tmp_path/runs/tiny."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model": {"kwargs": sizes, "mechanisms": ["gqa", "cca"], "attention_kwargs": {"cca": {"window_size": 4, "group_size": 2}}},
        "data": {"name": str(documents), "held_out_every": 4, "length": 16, "batch_size": 4},
        "optimizer": {"lr": 0.02, "clip_grad": 1.0},
        "schedule": {"epochs": 2},
        "output": {"root": str(tmp_path / "runs"), "name": "tiny", "log_every": 4, "validate_every": 10, "sample_length": 8},
    }


def test_a_comparison(tiny: dict[str, Any], tmp_path: Path) -> None:
    runs = compare(build_recipe(TextRecipe, tiny), CONSOLE)
    assert {run.mechanism for run in runs} == {"gqa", "cca"}
    assert runs[0].bits_per_byte <= runs[1].bits_per_byte, "the best comes first"
    for run in runs:
        assert run.held_out[-1][1] < run.held_out[0][1] < math.log2(256)
        assert run.train[-1][0] == run.held_out[-1][0]
        assert [update for update, _ in run.train[:2]] == [4, 8]
        assert run.sample.startswith("The ")
        assert run.parameters > 0
    folder = tmp_path / "runs" / "tiny"
    content = json.loads((folder / "results.json").read_text())
    assert build_recipe(TextRecipe, content["recipe"]) == build_recipe(TextRecipe, tiny)
    assert [run["mechanism"] for run in content["runs"]] == [run.mechanism for run in runs]
    table = (folder / "results.md").read_text()
    assert table.index(f"| {runs[0].mechanism}") < table.index(f"| {runs[1].mechanism}")
    assert "cca, window_size=4, group_size=2" in table
    assert Image.open(folder / "curves.png").size[0] > 500
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.md", "curves.png"}


def test_the_cache_column_is_the_report_of_the_model(tiny: dict[str, Any]) -> None:
    tiny["output"] |= {"cache_tokens": 100, "sample_length": 0}
    tiny["schedule"]["epochs"] = 1
    recipe = build_recipe(TextRecipe, tiny)
    for run in compare(recipe, CONSOLE):
        kwargs = {**recipe.model.kwargs, "attention": run.mechanism, "attention_kwargs": run.options}
        report = az.cache_report(az.create_model("llama_tiny", **kwargs), 100)
        assert run.cache_bytes_per_token == report.cache_bytes_per_token
        assert run.sample == ""


def test_every_mechanism_sees_the_same_batches(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {}
    step = text._train_step

    def spy(model: Any, batch: torch.Tensor, *args: Any) -> float:
        seen.setdefault(model.config.attention, []).append(batch)
        return step(model, batch, *args)

    monkeypatch.setattr(text, "_train_step", spy)
    compare(build_recipe(TextRecipe, tiny), CONSOLE)
    first, second = (torch.stack(batches) for batches in seen.values())
    assert torch.equal(first, second)
    assert first.shape[1:] == (4, 17)
    half = len(first) // 2
    assert not torch.equal(first[:half], first[half:]), "each epoch has an order of its own"


def test_the_same_seed_gives_the_same_run(tiny: dict[str, Any]) -> None:
    tiny["model"]["mechanisms"] = ["moh"]
    results = [compare(build_recipe(TextRecipe, {**tiny, "engine": {"seed": seed}}), CONSOLE)[0] for seed in (1, 1, 2)]
    assert results[0].train == results[1].train != results[2].train
    assert results[0].sample == results[1].sample


def test_training_and_held_out_texts_are_other_documents(documents: Path) -> None:
    texts = open_texts(TextDataRecipe(name=str(documents), held_out_every=4, length=16))
    assert texts.documents == (6, 2)
    train, held_out = (bytes(part.tolist()).decode() for part in (texts.train, texts.held_out))
    contents = [path.read_text() for path in sorted(documents.iterdir())]
    assert held_out == "\n\n".join([contents[3], contents[7]])
    assert train == "\n\n".join(contents[:3] + contents[4:7])


def test_pythons_own_documentation() -> None:
    texts = open_texts(TextDataRecipe(held_out_every=6))
    assert len(texts.train) > 200_000
    assert len(texts.held_out) > 20_000
    assert sum(texts.documents) > 60


def test_the_shipped_recipe_is_found_and_short() -> None:
    assert list_recipes(TextRecipe) == ["train/text_decoders"]
    assert "train/text_decoders" not in list_recipes()
    recipe = read_recipe(TextRecipe, "text_decoders", ["schedule.epochs=1"])
    assert recipe.output.name == "text_decoders"
    assert recipe.model.mechanisms is None
    for name in az.list_attentions(pattern="causal_self"):
        options = recipe.model.attention_kwargs.get(name, {})
        model = az.create_model(recipe.model.name, attention=name, attention_kwargs=options, **recipe.model.kwargs)
        assert sum(p.numel() for p in model.parameters()) < 300_000


def test_each_kind_of_recipe_has_its_program(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"kind 'text'; scripts/train\.py follows those of the kind 'images'"):
        load_recipe(Path(__file__).parents[2] / "configs" / "train" / "text_decoders.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: {lr: 1e-3}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"kind 'images'; scripts/train_text\.py follows"):
        read_recipe(TextRecipe, path)
    path.write_text("kind: text\noptimizer: {lr: 1e-3}\n", encoding="utf-8")
    assert read_recipe(TextRecipe, path).optimizer.lr == 1e-3
    assert Recipe.kind != TextRecipe.kind


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.lenght=4", r"no key 'data.lenght'; did you mean 'data.length'"),
        ("data.mechanisms=[gqa]", r"did you mean 'model.mechanisms'"),
        ("augment.mixup=1", r"no key 'augment'"),
        ("data.batch_size=0", r"data.batch_size must be at least 1, got 0"),
        ("data.held_out_every=1", r"data.held_out_every must be at least 2"),
        ("output.temperature=0", r"output.temperature be positive"),
        ("model.mechanisms=[gqa, hilo]", r"no causal mechanism is named 'hilo'; there are .*cca"),
        ("model.attention_kwargs.ccca={}", r"no causal mechanism is named 'ccca'"),
    ],
)
def test_wrong_recipes(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(TextRecipe, "train/text_decoders", [override])


def test_wrong_texts(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither 'pydoc-topics' nor a folder"):
        open_texts(TextDataRecipe(name=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="too few for pieces of 4000"):
        open_texts(TextDataRecipe(name=str(documents), length=4000))


def test_the_program(tiny: dict[str, Any], tmp_path: Path) -> None:
    assert call("train_text", "list").output.split() == ["train/text_decoders"]
    assert "held_out_every=10" in call("train_text", "keys").output
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"kind": "text", **tiny}), encoding="utf-8")
    result = call("train_text", path, "model.mechanisms=[mha]", "schedule.epochs=1", "--output", tmp_path / "out" / "mine")
    assert result.exit_code == 0
    assert "| mha |" in result.output
    assert (tmp_path / "out" / "mine" / "curves.png").is_file()
    wrong = call("train_text", path, "model.mechanisms=[nothing]")
    assert wrong.exit_code == 2


def test_the_picture_has_a_panel_for_each_run(tmp_path: Path) -> None:
    runs = [Curves(f"m{i}", [(1, 5.0 - i / 9), (9, 3.0 - i / 9)], [(9, 3.1)]) for i in range(6)]
    plot_side_by_side(runs, tmp_path / "six.png", title="six", xlabel="updates", ylabel="loss")
    plot_side_by_side(runs[:1], tmp_path / "one.png", title="one", xlabel="updates", ylabel="loss")
    six, one = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("six.png", "one.png"))
    assert six.shape[1] > 3 * one.shape[1]
    blue = (six == np.array([0x1F, 0x77, 0xB4])).all(-1)
    cells = [[part.sum() > 100 for part in np.array_split(row, 4, axis=1)] for row in np.array_split(blue, 2)]
    assert cells == [[True] * 4, [True, True, False, False]]
