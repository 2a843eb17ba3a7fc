"""Training from end to end, and through stops, kills and restarts."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from program import SCRIPTS, call
from safetensors import safe_open
from safetensors.torch import load_file

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError
from attention_zoo.training.checkpoint import Run, load_model, read_description
from attention_zoo.training.loop import Stopped, Trainer, TrainingDivergedError
from attention_zoo.training.optim import create_optimizer, create_scheduler, parameter_groups
from attention_zoo.training.recipe import OptimizerRecipe, RecipeError, ScheduleRecipe, make_recipe
from attention_zoo.training.report import read_log

from .conftest import sections


@pytest.fixture(autouse=True)
def _settings_come_back() -> Any:
    """A deterministic run switches torch's global setting."""
    yield
    torch.use_deterministic_algorithms(False)


class StopsAt(Trainer):
    """Gets a SIGTERM during the given update."""

    update = 0

    def _log_update(self, sums: torch.Tensor) -> None:
        super()._log_update(sums)
        if self.step == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    tiny: dict[str, Any], name: str = "tiny", cls: type[Trainer] = Trainer, resume: str | None = None, **sections: Any
) -> Trainer:
    content = {**tiny, "output": {**tiny["output"], "name": name}}
    for section, keys in sections.items():
        content[section] = {**content.get(section, {}), **keys}
    trainer = cls(make_recipe(content), resume=resume)
    trainer.fit()
    return trainer


def same(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_learns_and_leaves_everything_behind(tiny: dict[str, Any]) -> None:
    trainer = run(
        tiny, schedule={"epochs": 4}, output={"tensorboard": True, "name": "tiny", "log_every": 5}, data={"batch_size": 32}
    )
    folder = trainer.run.folder
    rows = read_log(folder / "log.csv")
    assert [r["epoch"] for r in rows] == list(range(4))
    assert rows[-1]["step"] == 4 * (1437 // 32)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_top1"] > 25  # ten classes: 10 is chance
    assert rows[-1]["lr"] < rows[1]["lr"]
    picture = np.asarray(Image.open(folder / "curves.png").convert("L"))
    assert picture.shape[0] > 300
    assert picture.std() > 10
    assert any(p.stat().st_size > 500 for p in (folder / "tensorboard").iterdir())
    assert make_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())) == trainer.recipe
    assert len(trainer.run.checkpoints()) == 2
    # the file is enough to build the model again, and it holds the average of the weights
    model, description = load_model(folder / "model.safetensors")
    assert description.metrics["top1"] == pytest.approx(rows[-1]["val_top1"], abs=1e-3)
    assert description.class_names == tuple("0123456789")
    assert trainer.ema is not None
    assert all(torch.equal(v, trainer.ema.module.state_dict()[k]) for k, v in model.state_dict().items())
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["attention_zoo"])["kwargs"]["num_classes"] == 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that nothing stopped."""
    return run(sections(tmp_path_factory.mktemp("runs")), "whole")


@pytest.mark.parametrize("stop", [3, 11, 16], ids=["within an epoch", "at its end", "in the second"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny: dict[str, Any], whole: Trainer, stop: int) -> None:
    StopsAt.update = stop
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        run(tiny, "stopped", StopsAt)
    assert stopped.value.checkpoint.name == f"step-{stop:08d}"
    resumed = run(tiny, "stopped", resume="auto")
    for file in ("model.safetensors", "best.safetensors"):
        assert same(whole.run.folder / file, resumed.run.folder / file)
    timeless = [
        [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in read_log(t.run.folder / "log.csv")]
        for t in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    states = [t.run.load(t.run.checkpoints()[-1]) for t in (whole, resumed)]
    assert all(torch.equal(v, states[1][0]["ema"][k]) for k, v in states[0][0]["ema"].items())
    moments = [s[1]["optimizer"]["state"] for s in states]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


def test_accumulation_resumes_too(tiny: dict[str, Any]) -> None:
    options = {"engine": {"accumulate": 2}, "data": {"batch_size": 64}, "ema": {"decay": None}}
    whole = run(tiny, "whole", **options)
    StopsAt.update = 4
    with pytest.raises(Stopped):
        run(tiny, "stopped", StopsAt, **options)
    resumed = run(tiny, "stopped", resume="auto", **options)
    assert same(whole.run.folder / "model.safetensors", resumed.run.folder / "model.safetensors")


def test_a_killed_run_goes_on_bit_for_bit(tiny: dict[str, Any], recipe_file: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, in a process of its own; what is lost is at most what came after the last checkpoint."""
    longer = {"output": {"checkpoint_every": 2}, "schedule": {"epochs": 4}}
    overrides = [f"{section}.{key}={value}" for section, keys in longer.items() for key, value in keys.items()]
    killed = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), str(recipe_file), *overrides, "output.name=killed"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    runs = tmp_path / "runs"
    checkpoints = Run(runs / "killed").checkpoints
    while killed.poll() is None and not any(int(p.name[5:]) > 3 for p in checkpoints()):
        time.sleep(0.01)
    killed.kill()
    output = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL, output
    assert not (runs / "killed" / "model.safetensors").exists()
    resumed = call("train", recipe_file, *overrides, "output.name=killed", "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert "going on from" in resumed.output
    whole = run(tiny, "whole", **longer)
    assert same(whole.run.folder / "model.safetensors", runs / "killed" / "model.safetensors")
    assert [r["epoch"] for r in read_log(runs / "killed" / "log.csv")] == list(range(4))


def test_a_finished_run_that_is_resumed_only_validates(tiny: dict[str, Any]) -> None:
    first = run(tiny)
    before = load_file(first.run.folder / "model.safetensors")
    again = run(tiny, resume="auto")
    assert again.last is not None
    assert first.last is not None
    assert again.last.metrics() == first.last.metrics()
    after = load_file(first.run.folder / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(read_log(first.run.folder / "log.csv")) == 2


def test_a_run_does_not_overwrite_another(tiny: dict[str, Any]) -> None:
    run(tiny)
    with pytest.raises(FileExistsError, match="--resume auto"):
        run(tiny)


def test_checkpoints_that_do_not_fit_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    StopsAt.update = 3
    with pytest.raises(Stopped) as stopped:
        run(tiny, "stopped", StopsAt)
    with pytest.raises(RecipeError, match=r"saved with an average of the weights: see ema\.decay"):
        run(tiny, "stopped", resume="auto", ema={"decay": None})
    with pytest.raises(RecipeError, match="within an epoch of 11 updates, now an epoch has 22"):
        run(tiny, "stopped", resume="auto", data={"batch_size": 64})
    with pytest.raises(RecipeError, match="is of another model"):
        run(tiny, "stopped", resume="auto", model={**tiny["model"], "kwargs": {**tiny["model"]["kwargs"], "depth": 2}})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(tiny, "stopped", resume=str(tmp_path / "nothing"))
    (stopped.value.checkpoint / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tiny, "stopped", resume="auto")


class Hostile:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile-was-here",)


def test_a_hostile_state_is_refused(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    StopsAt.update = 3
    with pytest.raises(Stopped) as stopped:
        run(tiny, "stopped", StopsAt)
    torch.save({"epoch": Hostile()}, stopped.value.checkpoint / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tiny, "stopped", resume="auto")
    assert not (tmp_path / "hostile-was-here").exists()


def test_unfinished_checkpoints_are_not_found(tmp_path: Path) -> None:
    for name in (".step-00000009.tmp", "step-00000003", "step-00000012"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in Run(tmp_path).checkpoints()] == ["step-00000003", "step-00000012"]


def test_a_diverged_run_says_so(tiny: dict[str, Any]) -> None:
    class Diverges(Trainer):
        def _step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, aux = super()._step(images, labels)
            return loss * float("nan"), aux

    with pytest.raises(TrainingDivergedError, match=r"the loss is nan .* at update 5"):
        run(tiny, cls=Diverges, output={**tiny["output"], "name": "tiny", "log_every": 5})


def test_auxiliary_losses_are_added(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import attention_zoo.training.loop as loop

    seen = []

    def constant(model: torch.nn.Module) -> torch.Tensor:
        seen.append(model)
        return next(model.parameters()).square().mean() * 0 + 3.0

    monkeypatch.setattr(loop.az, "auxiliary_loss", constant)
    trainer = run(tiny, schedule={"epochs": 1, "warmup_epochs": 0})
    assert read_log(trainer.run.folder / "log.csv")[0]["aux_loss"] == pytest.approx(3.0)
    seen.clear()
    run(tiny, "without", schedule={"epochs": 1, "warmup_epochs": 0}, loss={"aux_weight": 0.0})
    assert not seen


def test_training_goes_on_from_weights_with_other_classes(tiny: dict[str, Any], tmp_path: Path) -> None:
    weights = run(tiny, schedule={"epochs": 1, "warmup_epochs": 0}).run.folder / "model.safetensors"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)).save(tmp_path / "images" / split / name / f"{i}.png")
    model = {**tiny["model"], "checkpoint_path": str(weights)}
    data = {"name": "folder", "root": str(tmp_path / "images"), "batch_size": 4}
    trainer = run(tiny, "tuned", model=model, data=data, schedule={"epochs": 1, "warmup_epochs": 0})
    assert trainer.module.num_classes == 2
    description = read_description(trainer.run.folder / "model.safetensors")
    assert description is not None
    assert description.class_names == ("a", "b")
    assert load_model(trainer.run.folder / "model.safetensors")[0].num_classes == 2


def test_learning_rates_per_parameter() -> None:
    model = az.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    recipe = OptimizerRecipe(lr=1e-2, lr_batch_size=512, layer_decay=0.5, lr_multipliers={"blocks.*.attn.qkv.weight": 0.01})
    optimizer = create_optimizer(model, recipe, images_per_update=256)
    schedule = create_scheduler(
        optimizer, ScheduleRecipe(name="constant", epochs=2), recipe, images_per_update=256, updates_per_epoch=4
    )
    for update in range(8):
        schedule.step_update(update)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == pytest.approx(5e-3)
    assert rates[id(model.blocks[1].mlp.fc1.weight)] == pytest.approx(2.5e-3)
    assert rates[id(model.blocks[1].attn.qkv.weight)] == pytest.approx(2.5e-5)
    assert rates[id(model.blocks[1].attn.qkv.bias)] == pytest.approx(2.5e-3)
    assert decays[id(model.blocks[0].mlp.fc1.weight)] == 0.05
    assert decays[id(model.blocks[0].mlp.fc1.bias)] == decays[id(model.pos_embed)] == 0.0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_the_cosine_rises_and_falls() -> None:
    model = torch.nn.Linear(2, 2)
    recipe = OptimizerRecipe(lr=1.0)
    optimizer = create_optimizer(model, recipe, 1)
    schedule = ScheduleRecipe(epochs=10, warmup_epochs=2, warmup_lr=0.0, min_lr=0.0)
    scheduler = create_scheduler(optimizer, schedule, recipe, images_per_update=1, updates_per_epoch=5)
    rates = []
    for update in range(51):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(0.5)
    assert max(rates) == rates[10] > 0.9
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (OptimizerRecipe(name="adamww"), "optimizer.name='adamww'"),
        (OptimizerRecipe(options={"betaz": 1}), "betaz"),
        (
            OptimizerRecipe(lr_multipliers={"*.conv_offset.weight": 0.01}),
            r"no parameter of the model matches '\*\.conv_offset\.weight'",
        ),
    ],
)
def test_wrong_optimizers_say_what_is_wrong(recipe: OptimizerRecipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create_optimizer(torch.nn.Linear(2, 2), recipe, 1)


def test_unknown_schedule() -> None:
    recipe = OptimizerRecipe()
    optimizer = create_optimizer(torch.nn.Linear(2, 2), recipe, 1)
    with pytest.raises(RecipeError, match=r"schedule\.name='cosin'"):
        create_scheduler(optimizer, ScheduleRecipe(name="cosin"), recipe, images_per_update=1, updates_per_epoch=1)


def test_groups_keep_their_scale_without_layer_decay() -> None:
    groups = parameter_groups(torch.nn.Linear(2, 2), OptimizerRecipe(lr_multipliers={"weight": 0.1}))
    assert sorted((g["lr_scale"], g["weight_decay"]) for g in groups) == [(0.1, 0.05), (1.0, 0.0)]


def test_the_csv_has_the_columns_that_are_documented(tiny: dict[str, Any]) -> None:
    trainer = run(tiny, schedule={"epochs": 1, "warmup_epochs": 0})
    with (trainer.run.folder / "log.csv").open() as file:
        assert next(csv.reader(file)) == [
            "epoch",
            "step",
            "lr",
            "train_loss",
            "aux_loss",
            "val_loss",
            "val_top1",
            "val_top5",
            "images_per_second",
            "seconds",
        ]
