"""Image classifiers that are swapped when a run starts: what the run starts from, trains, writes, and what reads it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from program import call
from rich.console import Console

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError
from attention_zoo.swap.core import swaps_of
from attention_zoo.training.checkpoint import build_model, load_model, read_description
from attention_zoo.training.evaluate import Evaluation
from attention_zoo.training.loop import Stopped, Trainer
from attention_zoo.training.predict import prepare_prediction
from attention_zoo.training.recipe import ModelRecipe, Recipe, RecipeError, SwapRecipe, load_recipe, make_recipe
from attention_zoo.training.uptrain import as_markdown, uptrain, write_uptraining
from attention_zoo.training.validate import prepare_validation

from .test_train import StopsAt, same

CONSOLE = Console(quiet=True)
HOST = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 4}


@pytest.fixture(autouse=True)
def _settings_come_back() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def recipe(root: Path, name: str = "run", *, model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": HOST, **(model or {})},
        "data": {"name": "sklearn-digits", "batch_size": 128, "workers": 0, "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
        "optimizer": {"lr": 3e-3},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "engine": {"cpu": True, "deterministic": True},
        "output": {"root": str(root), "name": name, "tensorboard": False},
    }
    for section, keys in sections.items():
        content[section] = {**content.get(section, {}), **keys}
    return make_recipe(content)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a Vision Transformer with its own attention."""
    root = tmp_path_factory.mktemp("base")
    Trainer(recipe(root), console=CONSOLE).fit()
    torch.use_deterministic_algorithms(False)
    return root / "run" / "model.safetensors"


def swapped(base: Path, **swap: Any) -> dict[str, Any]:
    return {"checkpoint_path": str(base), "swap": swap}


def test_the_weights_come_first_and_then_the_swap(base: Path) -> None:
    host, _ = load_model(base)
    model = build_model(ModelRecipe("vit_tiny_patch16_224", kwargs=HOST, checkpoint_path=str(base), swap=SwapRecipe("moh")), 10)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), host(x))  # all heads at work: the same function
    assert [entry["mechanism"] for entry in swaps_of(model)] == ["moh", "moh"]


def test_a_swapped_run_is_read_again(base: Path, tmp_path: Path) -> None:
    """Validation, prediction, resumption and a second fine-tuning know the swap from the file."""
    model = swapped(base, map={"0": "moh", "1": ["kdgqa", {"num_kv_heads": 2}]}, init="convert", options={})
    trainer = Trainer(recipe(tmp_path, model=model, schedule={"epochs": 1}), console=CONSOLE)
    last = trainer.fit()
    weights = tmp_path / "run" / "model.safetensors"
    description = read_description(weights)
    assert description is not None
    assert [entry["mechanism"] for entry in description.zoo_swap] == ["moh", "kdgqa"]
    assert [json.loads(json.dumps(entry)) for entry in description.zoo_swap] == description.zoo_swap
    assert prepare_validation(weights, cpu=True).run().metrics() == pytest.approx(last.metrics(), abs=1e-4)
    assert swaps_of(prepare_prediction(weights, cpu=True).model) == description.zoo_swap
    result = call("validate", weights, "--output", tmp_path / "validation", "--cpu")
    assert result.exit_code == 0
    on = ModelRecipe("vit_tiny_patch16_224", kwargs=HOST, checkpoint_path=str(weights))
    second = build_model(on, 4)  # other classes: the head is new, the rest as it was
    assert second.num_classes == 4
    assert swaps_of(second) == description.zoo_swap
    state = trainer.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state_dict().items() if not name.startswith("head."))
    with pytest.raises(RecipeError, match=r"holds 'vit_tiny_patch16_224', swapped: set model\.name"):
        build_model(ModelRecipe("vit_small_patch16_224", checkpoint_path=str(weights)), 10)
    with pytest.raises(CheckpointError, match="does not fit 'vit_tiny_patch16_224' with its swapped layers"):
        prepare_validation(weights, ["model.kwargs.embed_dim=32"], cpu=True)


def test_a_folder_of_the_swap_program_is_a_checkpoint(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **HOST).eval()
    az.swap_attention(model, "moh", layers=[1], routed_topk=1)
    az.save_pretrained(model, tmp_path / "folder")
    start = recipe(tmp_path, model={"checkpoint_path": str(tmp_path / "folder")}, schedule={"epochs": 1})
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(build_model(start.model, 10).eval()(x), model(x))
    Trainer(start, console=CONSOLE).fit()
    assert swaps_of(load_model(tmp_path / "run" / "model.safetensors")[0]) == swaps_of(model)
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is no file, and no folder that"):
        build_model(start.model, 10)


@pytest.mark.slow
def test_a_stopped_swapped_run_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = swapped(base, mechanism="dgqa", init="mean_pool", options={"num_kv_heads": 2})

    def build(name: str) -> Recipe:
        return recipe(tmp_path, name, model=model, schedule={"epochs": 1}, ema={"decay": 0.9})

    Trainer(build("whole"), console=CONSOLE).fit()
    StopsAt.update = 5
    with pytest.raises(Stopped):
        StopsAt(build("stopped"), console=CONSOLE).fit()
    Trainer(build("stopped"), resume="auto", console=CONSOLE).fit()
    assert same(tmp_path / "whole" / "model.safetensors", tmp_path / "stopped" / "model.safetensors")


def test_what_the_run_starts_from_is_measured_and_the_auxiliary_loss_counts(base: Path, tmp_path: Path) -> None:
    class Ordered(Trainer):
        seen: list[int] = []  # noqa: RUF012

        def _validate(self) -> Evaluation:
            self.seen.append(self.step)
            return super()._validate()

    model = swapped(base, mechanism="moh", options={"routed_topk": 1})
    sections = {"schedule": {"epochs": 1}, "output": {"validate_first": True}, "loss": {"aux_weight": 0.5}}
    trainer = Ordered(recipe(tmp_path, model=model, **sections), console=CONSOLE)
    trainer.fit()
    assert Ordered.seen == [0, 11]
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    aux = [float(row.split(",")[rows[0].split(",").index("aux_loss")]) for row in rows[1:]]
    assert len(aux) == 1
    assert all(value >= 0.9 for value in aux)  # perfect balance is K = 1
    routers = {name: p for name, p in trainer.module.named_parameters() if "router" in name}
    assert routers
    assert all(p.abs().max() > 0 for p in routers.values())  # they started at zero


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ({}, "names one mechanism, or a mapping"),
        ({"mechanism": "mooh"}, "no attention is named 'mooh'"),
        ({"mechanism": "cca"}, "cannot take the place of"),
        ({"mechanism": "moh", "layers": "7:9"}, "no attention layer is"),
    ],
    ids=str,
)
def test_wrong_swaps_are_said(swap: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(recipe(tmp_path, model=swapped(base, **swap)), console=CONSOLE)


def test_slices_are_no_numbers_to_the_base_of_sixty(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {swap: {mechanism: moh, layers: 8:24}}\n", encoding="utf-8")
    assert load_recipe(path).model.swap == SwapRecipe("moh", "8:24")
    assert load_recipe(path, ["model.swap.layers=1:12"]).model.swap == SwapRecipe("moh", "1:12")
    assert load_recipe(path, ["model.swap=null"]).model.swap is None
    with pytest.raises(RecipeError, match=r"no key 'model\.swap\.layer'; did you mean 'model\.swap\.layers'"):
        load_recipe(path, ["model.swap.layer=1:12"])


def test_up_training_is_compared(base: Path, tmp_path: Path) -> None:
    start = recipe(base.parents[1])  # its run is finished: it is not trained again
    swap = {"mechanism": "kdgqa", "init": "mean_pool", "options": {"num_kv_heads": 2}}
    tune = recipe(tmp_path, "tune", model={"swap": swap}, schedule={"epochs": 1})
    runs = uptrain(start, tune, ["gqa", "kdgqa"], CONSOLE)
    before, gqa, kdgqa = runs
    assert (before.mechanism, before.converted) == ("", None)
    assert before.trained == pytest.approx(read_top1(base), abs=1e-3)
    assert gqa.parameters == kdgqa.parameters == before.parameters - 2 * 2 * (16 * 8 + 8)
    assert kdgqa.converted != gqa.converted
    folder = write_uptraining(tune, start, runs)
    assert folder == tmp_path / "tune"
    assert "| kdgqa, num_kv_heads=2 |" in (folder / "results.md").read_text() == as_markdown(runs)
    assert [run["mechanism"] for run in json.loads((folder / "results.json").read_text())["runs"]] == ["", "gqa", "kdgqa"]
    with pytest.raises(FileExistsError, match="holds the checkpoints of a run"):
        uptrain(start, tune, ["gqa"], CONSOLE)
    with pytest.raises(RecipeError, match=r"needs model\.swap\.mechanism"):
        uptrain(start, start, ["gqa"], CONSOLE)


def read_top1(weights: Path) -> float:
    description = read_description(weights)
    assert description is not None
    return description.metrics["top1"]


def test_the_program_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, message in (
        (["train/vit_digits", "finetune/vit_kdgqa_digits", "mooh"], "no attention is named 'mooh'"),
        (["train/vit_digits", "train/vit_digits", "gqa"], "needs model.swap.mechanism"),
        (["train/nothing", "finetune/vit_kdgqa_digits", "gqa"], "no recipe file and no recipe of the zoo"),
    ):
        result = call("uptrain", *arguments, "--root", tmp_path)
        assert result.exit_code == 2
        assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)  # 90 s of one core
def test_the_digits_are_learned_again(tmp_path: Path) -> None:
    """From a trained model through mean pooling, which costs most of it, back to nearly what it was."""
    said = ["engine.cpu=true", "output.tensorboard=false", f"output.root={tmp_path}"]
    start, tune = load_recipe("train/vit_digits", said), load_recipe("finetune/vit_kdgqa_digits", said)
    before, *runs = uptrain(start, tune, ["gqa", "kdgqa", "dgqa:kind=ema,window_size=22,eval_update=false"], CONSOLE)
    assert before.trained > 97
    for run in runs:
        assert run.converted is not None
        assert run.converted < before.trained - 5
        assert run.trained > before.trained - 3
