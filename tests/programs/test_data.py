"""Images, loaders and what makes them repeatable."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from attention_zoo.training.data import (
    EpochBatches,
    ImageSet,
    InputConfig,
    input_config,
    open_images,
    train_loader,
    validation_loader,
)
from attention_zoo.training.recipe import AugmentRecipe, DataRecipe, RecipeError

DIGITS = DataRecipe(name="sklearn-digits", batch_size=32, workers=0)
FORM = InputConfig((1, 16, 16), (0.5,), (0.5,))
STRONG = AugmentRecipe(crop_scale=(0.5, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5", random_erasing=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/{train,val}/{cat,dog,eel}/*.png; the validation split has no cat."""
    rng = np.random.default_rng(0)
    for split, classes in (("train", ("cat", "dog", "eel")), ("val", ("dog", "eel"))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_digits_are_split_into_stratified_disjoint_parts() -> None:
    train, held_out = open_images(DIGITS, "train"), open_images(DIGITS, "val")
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    counts = np.bincount([held_out.images[i][1] for i in range(360)], minlength=10)
    assert counts.min() >= 35
    assert counts.max() <= 37
    from sklearn.datasets import load_digits

    whole = load_digits()
    pixels = [np.asarray(s.images[i][0]) for s in (train, held_out) for i in range(len(s))]
    assert all(p.shape == (8, 8) and p.dtype == np.uint8 for p in pixels)
    # every digit stands in exactly one of the parts
    parts = sorted(p.tobytes() for p in pixels)
    assert parts == sorted(np.round(i * 255 / 16).astype(np.uint8).tobytes() for i in whole.images)


def test_the_digits_split_follows_its_seed() -> None:
    def labels(seed: int) -> list[bytes]:
        images = open_images(DataRecipe(name="sklearn-digits", split_seed=seed), "val").images
        return [np.asarray(i).tobytes() for i, _ in images]

    assert labels(0) == labels(0)
    assert labels(0) != labels(1)


def test_folder_labels_follow_the_training_classes(folder: Path) -> None:
    recipe = DataRecipe(root=str(folder))
    train = open_images(recipe, "train")
    assert train.class_names == ("cat", "dog", "eel")
    held_out = open_images(recipe, "val", class_names=train.class_names)
    assert held_out.class_names == train.class_names
    assert {label for _, label in (held_out.images[i] for i in range(len(held_out)))} == {1, 2}


@pytest.mark.parametrize(
    ("recipe", "split", "error", "message"),
    [
        (
            DataRecipe(name="sklearn-digts"),
            "train",
            RecipeError,
            r"must be one of .*'sklearn-digts'; did you mean 'sklearn-digits'\?",
        ),
        (DataRecipe(name="sklearn-digits"), "test", RecipeError, "has the splits train, val; got 'test'"),
        (DataRecipe(), "train", RecipeError, r"needs data\.root"),
        (
            DataRecipe(name="torchvision/CIFAR1000", root="/nowhere"),
            "train",
            RecipeError,
            "no set 'CIFAR1000'; did you mean 'CIFAR100'",
        ),
        (DataRecipe(name="torchvision/CIFAR100"), "train", RecipeError, r"needs data\.root"),
        (DataRecipe(name="torchvision/CIFAR100", root="/nowhere"), "train", FileNotFoundError, "data.download=true fetches it"),
        (DataRecipe(name="torchvision/FakeData", root="/nowhere"), "train", RecipeError, "neither train= nor split="),
    ],
)
def test_wrong_sources_say_what_is_wrong(recipe: DataRecipe, split: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_images(recipe, split)


def test_hugging_face_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match="pip install datasets"):
        open_images(DataRecipe(name="hf/ylecun/mnist"), "train")


def test_wrong_folders_say_what_is_wrong(folder: Path) -> None:
    recipe = DataRecipe(root=str(folder))
    with pytest.raises(FileNotFoundError, match="beside it: train, val"):
        open_images(recipe, "test")
    with pytest.raises(RecipeError, match="does not know: dog"):
        open_images(recipe, "val", class_names=("cat", "eel"))
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        open_images(recipe, "empty")


def test_input_config_prefers_the_recipe_then_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert input_config(model, DataRecipe()).input_size == (3, 224, 224)
    assert input_config(model, DataRecipe()).mean == (0.5, 0.5, 0.5)
    form = input_config(model, DataRecipe(mean=(0.1,), crop_pct=1.0), img_size=32, in_chans=1)
    assert (form.input_size, form.mean, form.std, form.mode) == ((1, 32, 32), (0.1,), (0.5,), "L")
    assert input_config(model, DataRecipe(image_size=64), img_size=32).input_size == (3, 64, 64)
    with pytest.raises(RecipeError, match=r"data\.std must hold 1 number or 3"):
        input_config(model, DataRecipe(std=(0.1, 0.2)))
    assert InputConfig.from_dict(form.to_dict()) == form


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_an_epoch_is_shared_out_without_overlap(world: int, accumulate: int) -> None:
    samplers = [EpochBatches(100, 8, seed=3, rank=r, world_size=world, accumulate=accumulate) for r in range(world)]
    for sampler in samplers:
        sampler.start(5)
    seen = [index for sampler in samplers for batch in sampler for _, index in batch]
    assert len({len(s) for s in samplers}) == 1
    assert len(samplers[0]) % accumulate == 0
    assert len(seen) == len(set(seen)) == len(samplers[0]) * 8 * world


def test_a_restart_sees_what_is_left_of_the_epoch() -> None:
    sampler = EpochBatches(50, 4, seed=1)
    sampler.start(2)
    whole = list(sampler)
    sampler.start(2, 7)
    assert list(sampler) == whole[7:]
    sampler.start(3)
    assert list(sampler) != whole


def test_too_few_images_for_an_update() -> None:
    with pytest.raises(RecipeError, match=r"10 training images are fewer .*=4 x 2 devices x engine.accumulate=2 = 16"):
        EpochBatches(10, 4, world_size=2, accumulate=2)


def batches(workers: int, epoch: int, first: int = 0) -> list[torch.Tensor]:
    data = open_images(DIGITS, "train")
    small = ImageSet([data.images[i] for i in range(96)], data.class_names)
    recipe = DataRecipe(name="sklearn-digits", batch_size=32, workers=workers)
    loader, sampler = train_loader(small, FORM, recipe, STRONG, seed=7)
    sampler.start(epoch, first)
    return [images for images, _ in loader]


def test_augmentation_depends_on_neither_workers_nor_restarts() -> None:
    alone, helped = batches(0, 1), batches(2, 1)
    assert len(alone) == len(helped) == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert torch.equal(batches(0, 1, first=2)[0], alone[2])
    assert not torch.equal(batches(0, 2)[0], alone[0])


def test_loading_leaves_the_global_random_numbers_alone() -> None:
    def draw() -> tuple[float, float, float]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        batches(0, 0)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("world", [1, 3])
def test_validation_sees_every_image_once(world: int) -> None:
    data = open_images(DIGITS, "val")
    small = ImageSet([data.images[i] for i in range(31)], data.class_names)
    loaders = [validation_loader(small, FORM, DataRecipe(batch_size=4, workers=0), rank=r, world_size=world) for r in range(world)]
    labels = torch.cat([labels for loader in loaders for _, labels in loader])
    assert len({len(loader) for loader in loaders}) == 1  # FSDP hangs on a device that has a batch more
    assert sorted(labels[labels >= 0].tolist()) == sorted(label for _, label in small.images)
    assert int((labels < 0).sum()) == -(-31 // world) * world - 31
