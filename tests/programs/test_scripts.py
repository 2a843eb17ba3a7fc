"""The three programs as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import call

from attention_zoo.training.data import open_images
from attention_zoo.training.recipe import DataRecipe, make_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    from attention_zoo.training.loop import Trainer

    root = tmp_path_factory.mktemp("runs")
    kwargs = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    recipe = make_recipe(
        {
            "model": {"name": "vit_tiny_patch16_224", "attention": "mha", "kwargs": kwargs},
            "data": {"name": "sklearn-digits", "batch_size": 32, "workers": 0, "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
            "optimizer": {"lr": 3e-3},
            "schedule": {"epochs": 4},
            "engine": {"cpu": True},
            "output": {"root": str(root), "name": "run", "tensorboard": False},
        }
    )
    Trainer(recipe).fit()
    return root / "run"


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    open_images(DataRecipe(name="sklearn-digits"), "val").images[0][0].save(path)
    return path


def test_train_lists_and_explains() -> None:
    assert "train/litv2_digits" in call("train", "list").output.split()
    assert "optimizer: name=adamw" in call("train", "keys").output
    assert "optimizer.lr=1e-3" in call("train", "--help").output


def test_train_runs_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    result = call("train", recipe_file, "schedule.epochs=1", "schedule.warmup_epochs=0", "--output", tmp_path / "out" / "mine")
    torch.use_deterministic_algorithms(False)
    assert result.exit_code == 0
    assert "top-1" in result.output
    assert (tmp_path / "out" / "mine" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no recipe file and no recipe of the zoo is named 'nothing'"),
        (["RECIPE", "model.name=vit_tny"], "no model is named 'vit_tny'"),
        (["RECIPE", "model.attention=mah"], "no attention is named 'mah'"),
        (["RECIPE", "model.kwargs.depht=3"], "depht"),
        (["RECIPE", "data.name=folder", "data.root=/nowhere"], "no folder /nowhere/train"),
        (["RECIPE", "model.checkpoint_path=/nowhere.pth"], "no checkpoint at /nowhere.pth"),
        (["RECIPE", "data.batch_size=5000"], "fewer than one update takes"),
    ],
)
def test_train_says_what_is_wrong(arguments: list[str], message: str, recipe_file: Path) -> None:
    result = call("train", *[recipe_file if a == "RECIPE" else a for a in arguments])
    torch.use_deterministic_algorithms(False)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_validate_measures_what_training_measured(trained: Path, tmp_path: Path) -> None:
    result = call("validate", trained / "model.safetensors", "--output", tmp_path, "--cpu")
    assert result.exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    last = (trained / "log.csv").read_text().splitlines()[-1].split(",")
    assert results["top1"] == pytest.approx(float(last[6]), abs=1e-3)
    assert results["loss"] == pytest.approx(float(last[5]), abs=1e-4)
    assert f"top-1 {results['top1']:.2f} %" in result.output
    confusion = np.loadtxt(tmp_path / "confusion_matrix.csv", delimiter=",", skiprows=1, usecols=range(1, 11))
    assert confusion.sum() == results["images"] == 360
    assert confusion.trace() / 3.6 == pytest.approx(results["top1"])
    for i, row in enumerate(results["per_class"]):
        assert row["images"] == confusion[i].sum()
        assert row["recall"] == pytest.approx(100 * confusion[i, i] / confusion[i].sum())
        assert row["precision"] == pytest.approx(100 * confusion[i, i] / max(confusion[:, i].sum(), 1))
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 11
    picture = np.asarray(Image.open(tmp_path / "validation.png").convert("L"))
    assert min(picture.shape) > 500
    assert picture.std() > 20


def test_validate_takes_other_data(trained: Path, tmp_path: Path) -> None:
    result = call("validate", trained / "model.safetensors", "--split", "train", "--output", tmp_path, "--samples", 0, "--cpu")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 1437


def test_validate_says_what_is_wrong(trained: Path, tmp_path: Path) -> None:
    weights = trained / "model.safetensors"
    broken, foreign = tmp_path / "broken.safetensors", tmp_path / "foreign.pth"
    broken.write_bytes(weights.read_bytes()[:1000])
    torch.save({"a": torch.zeros(1)}, foreign)
    for arguments, message in (
        ([tmp_path / "none.safetensors"], "no checkpoint at"),
        ([broken], "not a readable safetensors file"),
        ([foreign], "name it with --model"),
        ([foreign, "--model", "vit_tiny_patch16_224"], "does not fit 'vit_tiny_patch16_224'"),
        ([weights, "data.nam=x"], "did you mean 'data.name'"),
        ([weights, "--split", "test"], "has the splits train, val"),
        ([weights, "model.kwargs.depth=2"], "does not fit"),
    ):
        result = call("validate", *arguments, "--cpu")
        assert result.exit_code == 2
        assert message in result.output


def test_predict_names_the_digit(trained: Path, digit: Path, tmp_path: Path) -> None:
    text = call("predict", trained / "model.safetensors", digit, "--top-k", 3, "--cpu").output
    assert text.startswith(f"{digit}: ")
    assert text.count(" %") == 3
    result = call("predict", trained / "model.safetensors", digit, digit, "--json", "--cpu", "--picture", tmp_path / "p.png")
    first, second = json.loads(result.output)
    assert first == second
    probabilities = [c["probability"] for c in first["classes"]]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    everything = json.loads(call("predict", trained / "model.safetensors", digit, "--json", "--top-k", 99, "--cpu").output)[0][
        "classes"
    ]
    assert {c["name"] for c in everything} == set("0123456789")
    assert sum(c["probability"] for c in everything) == pytest.approx(1.0, abs=1e-5)
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 5


def test_predict_agrees_with_validate(trained: Path, digit: Path) -> None:
    from attention_zoo.training.predict import predict, prepare_prediction
    from attention_zoo.training.validate import prepare_validation

    job = prepare_validation(trained / "model.safetensors", cpu=True)
    said = predict(prepare_prediction(trained / "model.safetensors", cpu=True), [digit], 1)[0].classes[0][0]
    assert said == job.images.class_names[job.run().predicted[0]]


def test_predict_takes_names_from_a_file(trained: Path, digit: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)) + "\n")
    assert ": digit " in call("predict", trained / "model.safetensors", digit, "--classes", names, "--cpu").output
    names.write_text("one\ntwo\n")
    result = call("predict", trained / "model.safetensors", digit, "--classes", names, "--cpu")
    assert result.exit_code == 2
    assert "names 2 classes, the model has 10" in result.output


def test_predict_says_what_is_wrong(trained: Path, digit: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(digit.read_bytes()[:60])
    for image, message in ((tmp_path / "none.png", "no image at"), (text, "not an image that Pillow can read"), (cut, "damaged")):
        result = call("predict", trained / "model.safetensors", image, "--cpu")
        assert result.exit_code == 2
        assert message in result.output
    assert call("predict", tmp_path / "none.safetensors", digit).exit_code == 2


class Hostile:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors"])
def test_hostile_checkpoints_are_refused(name: str, digit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile()}, name)
    result = call("predict", name, digit, "--model", "vit_tiny_patch16_224", "--cpu")
    assert result.exit_code == 2
    assert "error: " in result.output
    assert not (tmp_path / "hostile-was-here").exists()
