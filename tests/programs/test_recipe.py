"""Recipes: files, overrides, and what a user is told about a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from marks import slow_but

from attention_zoo.training.checkpoint import build_model
from attention_zoo.training.optim import create_optimizer
from attention_zoo.training.recipe import (
    Recipe,
    RecipeError,
    apply_overrides,
    describe_recipe,
    list_recipes,
    load_recipe,
    make_recipe,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_fills_in_and_the_rest_stays(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "optimizer: {lr: 5e-4, clip_grad: 5}\nmodel: {kwargs: {depth: 2}}\n"))
    assert recipe.optimizer.lr == 5e-4  # YAML 1.1 reads 5e-4 as text
    assert recipe.optimizer.clip_grad == 5.0
    assert recipe.model.kwargs == {"depth": 2}
    assert recipe.schedule == Recipe().schedule
    assert recipe.output.name == "mine"


def test_overrides_win_and_reach_into_free_keys(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-2", "model.kwargs.embed_dim=32", "data.mean=[0.1, 0.2, 0.3]", "model.attention=moh"]
    recipe = load_recipe(write(tmp_path, "optimizer: {lr: 5e-4}\n"), overrides)
    assert (recipe.optimizer.lr, recipe.model.kwargs, recipe.data.mean) == (1e-2, {"embed_dim": 32}, (0.1, 0.2, 0.3))
    assert recipe.model.attention == "moh"
    assert (
        load_recipe(write(tmp_path, "optimizer: {layer_decay: 0.7}"), ["optimizer.layer_decay=null"]).optimizer.layer_decay is None
    )


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""))
    assert dataclasses.replace(recipe, output=Recipe().output) == Recipe()


def test_a_recipe_survives_its_dict() -> None:
    recipe = make_recipe({"augment": {"crop_scale": [0.5, 1]}, "optimizer": {"lr_multipliers": {"*.bias": 2}}})
    assert make_recipe(recipe.to_dict()) == recipe


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", r"no key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"),
        ("optimiser: {lr: 1}", r"no key 'optimiser'; did you mean 'optimizer'\?"),
        ("batch_size: 3", r"no key 'batch_size'; did you mean 'data.batch_size'\?"),
        ("zzzz: 3", r"no key 'zzzz'; keys here: model, data"),
        ("optimizer: {lr: fast}", "optimizer.lr must be a number, got 'fast'"),
        ("data: {batch_size: 2.5}", "data.batch_size must be a whole number, got 2.5"),
        ("data: {batch_size: true}", "data.batch_size must be a whole number, got True"),
        ("data: {download: 1}", "data.download must be true or false, got 1"),
        ("model: {kwargs: 3}", "model.kwargs must be keys with values, got 3"),
        ("data: {mean: 0.5}", "data.mean must be a list of numbers, got 0.5"),
        ("model: 3", "model must hold keys, got 3"),
        ("[1, 2]", "must hold sections"),
        ("a: [", "is not YAML"),
        ("data: {batch_size: 0}", "data.batch_size must be at least 1, got 0"),
        ("engine: {mixed_precision: fp8}", "engine.mixed_precision must be no, fp16, bf16 or null, got 'fp8'"),
        ("ema: {decay: 1.0}", "ema.decay must be between 0 and 1"),
        ("schedule: {epochs: 3, warmup_epochs: 4}", "schedule.warmup_epochs must be from 0 to schedule.epochs=3, got 4"),
        ("data: {batch_size: 5}\naugment: {mixup: 0.1}", "data.batch_size must be even"),
        ("augment: {crop_scale: [1, 0.5]}", "augment.crop_scale must be two positive numbers"),
        ("loss: {label_smoothing: 1}", "loss.label_smoothing must be"),
        ("optimizer: {lr: 0}", "optimizer.lr must be positive"),
        ("output: {keep: 0}", "output.keep must be at least 1"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "written key.sub=value, got 'optimizer.lr'"),
        ("optimzer.lr=1", "did you mean 'optimizer'"),
        ("optimizer=1", "'optimizer' is a section or no key at all"),
        ("optimizer.lr.x=1", "'lr' holds a value, not keys"),
        ("data.mean=[", "is not YAML"),
    ],
)
def test_wrong_overrides_say_what_is_wrong(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, "optimizer: {lr: 1}"), [override])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'train/litv2_digts'; did you mean train/litv2_digits"):
        load_recipe("train/litv2_digts")


def test_apply_overrides_makes_sections() -> None:
    content: dict = {}
    apply_overrides(content, ["data.root=/x", "model.kwargs.depth=3"])
    assert content == {"data": {"root": "/x"}, "model": {"kwargs": {"depth": 3}}}


@pytest.mark.parametrize("name", list_recipes())
def test_the_zoos_recipes_are_right(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.output.name == name.rsplit("/", 1)[-1]
    assert load_recipe(name.rsplit("/", 1)[-1]) == recipe


@pytest.mark.parametrize("name", slow_but({"train/litv2_digits", "finetune/vit_kdgqa_digits"}, list_recipes()))
def test_the_zoos_recipes_build_their_models(name: str) -> None:
    recipe = load_recipe(name, ["model.pretrained=false", "model.checkpoint_path=null"])
    model = build_model(recipe.model, 10)
    assert model.num_classes == 10
    optimizer = create_optimizer(model, recipe.optimizer, images_per_update=512)
    assert optimizer.defaults["lr"] == recipe.optimizer.lr
    slow = [g for g in optimizer.param_groups if g["lr_scale"] == 0.01]
    assert bool(slow) == ("litv2" in name)  # the sampling offsets of its token merging
    assert all(p.ndim == 4 for g in slow for p in g["params"])


def test_every_key_is_described() -> None:
    text = describe_recipe()
    for section, keys in Recipe().to_dict().items():
        assert f"{section}: " in text
        assert all(f"{key}=" in text for key in keys)
