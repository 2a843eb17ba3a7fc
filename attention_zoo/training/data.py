"""Images: where they come from, how they are augmented, and loaders that can stop and go on anywhere.

Two rules make a run repeatable. The order of an epoch depends on (seed, epoch) only, so a restart skips what was seen instead of
reading it again. The augmentation of a batch depends on (seed, epoch, its images) only, so neither the number of workers nor a
restart changes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from attention_zoo.training.recipe import AugmentRecipe, DataRecipe, RecipeError, nearest_key

__all__ = ["EpochBatches", "ImageSet", "InputConfig", "input_config", "open_images", "train_loader", "validation_loader"]

SOURCES = ("folder", "torchvision/NAME", "hf/OWNER/NAME", "sklearn-digits")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images[i]` is (PIL image, class index). `class_names[c]` is what class c is called."""

    images: Any
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class InputConfig:
    """The form in which a model sees an image; saved with its weights.

    Attributes:
        input_size: (channels, height, width); one channel stands for grey images, else three.
        mean, std: of the normalisation, per channel, for values in [0, 1].
        interpolation: of resizing: "bilinear", "bicubic", ...
        crop_pct: share of the resized image's side that the central crop keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @property
    def mode(self) -> str:
        """PIL's mode of the images: "L" or "RGB"."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """PIL image -> normalised tensor (C, H, W), without any randomness."""
        return create_transform(
            input_size=self.input_size, mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=self.crop_pct
        )

    def train_transform(self, augment: AugmentRecipe) -> Callable[[Image.Image], Tensor]:
        """PIL image -> augmented, normalised tensor (C, H, W)."""
        return create_transform(
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            is_training=True,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode=augment.random_erasing_mode,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputConfig:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def input_config(model: nn.Module, recipe: DataRecipe, *, img_size: Any = None, in_chans: int | None = None) -> InputConfig:
    """What the recipe says, and for what it leaves open the model's `img_size` argument or its own published setting (timm's)."""
    channels = 3 if in_chans is None else in_chans
    for name, values in (("mean", recipe.mean), ("std", recipe.std)):
        if values is not None and len(values) not in (1, channels):
            raise RecipeError(f"data.{name} must hold 1 number or {channels}, one for each channel; got {list(values)}")
    args = {"mean": recipe.mean, "std": recipe.std, "interpolation": recipe.interpolation, "crop_pct": recipe.crop_pct}
    size = recipe.image_size if recipe.image_size is not None else img_size
    resolved = resolve_data_config({**args, "in_chans": channels}, model=model)
    height, width = resolved["input_size"][1:] if size is None else (size, size) if isinstance(size, int) else size
    mean, std = (_per_channel(resolved[name], channels) for name in ("mean", "std"))
    return InputConfig((channels, height, width), mean, std, resolved["interpolation"], resolved["crop_pct"])


def open_images(recipe: DataRecipe, split: str, *, class_names: tuple[str, ...] | None = None) -> ImageSet:
    """Open one split of the recipe's data.

    Args:
        split: what `recipe.train_split` or `recipe.val_split` says.
        class_names: the classes in the order of the labels, where the set itself does not fix it (a folder).

    Raises:
        RecipeError: an unknown source or split. FileNotFoundError: the data are not there; says how to get them.
    """
    name = recipe.name
    if name == "sklearn-digits":
        return _digits(split, recipe)
    if name == "folder":
        return _folder(split, recipe, class_names)
    if name.startswith("torchvision/"):
        return _torchvision(name.split("/", 1)[1], split, recipe)
    if name.startswith("hf/"):
        return _hugging_face(name.split("/", 1)[1], split, recipe)
    hint = nearest_key(name, ["folder", "sklearn-digits"]) if "/" not in name else ""
    raise RecipeError(f"data.name must be one of {', '.join(SOURCES)}; got {name!r}{hint if 'mean' in hint else ''}")


def train_loader(
    data: ImageSet,
    config: InputConfig,
    recipe: DataRecipe,
    augment: AugmentRecipe,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> tuple[DataLoader, EpochBatches]:
    """Batches (images (B, C, H, W), labels (B,)) of this device, and their sampler: `start(epoch, batch)` says where to begin."""
    batches = EpochBatches(len(data), recipe.batch_size, seed=seed, rank=rank, world_size=world_size, accumulate=accumulate)
    images = _Transformed(data.images, config.train_transform(augment), config.mode, seed)
    return _loader(images, batches, recipe.workers), batches


def validation_loader(data: ImageSet, config: InputConfig, recipe: DataRecipe, *, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Batches (images, labels) of this device, in order. Labels of the padding that gives every device as many batches are -1."""
    batches = _OrderedBatches(len(data), recipe.val_batch_size or recipe.batch_size, rank, world_size)
    return _loader(_Transformed(data.images, config.transform(), config.mode, None), batches, recipe.workers)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index); the last images that do not fill an update on every device wait for another epoch.

    `len` is the number of batches of a whole epoch on one device, a multiple of `accumulate`.

    Raises:
        RecipeError: fewer images than one update needs.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> None:
        update = batch_size * world_size * accumulate
        if size < update:
            raise RecipeError(
                f"{size} training images are fewer than one update takes: data.batch_size={batch_size} x {world_size} devices x "
                f"engine.accumulate={accumulate} = {update}"
            )
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.batches = size // update * accumulate
        self.epoch, self.first = 0, 0

    def start(self, epoch: int, batch: int = 0) -> None:
        """The next iteration is over the epoch `epoch`, from its batch `batch` on."""
        self.epoch, self.first = epoch, batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for batch in range(self.first, self.batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


class _OrderedBatches(Sampler[list[int]]):
    """Every world_size-th image in order; a negative number ~i is image i once more, as padding."""

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        mine = list(range(rank, size, world_size))
        mine += [~0] * (-(-size // world_size) - len(mine))
        self.chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)


class _Transformed(Dataset):
    """Images as tensors, a batch at a time. Keys: (epoch, index) where a seed makes the augmentation repeatable, else indices."""

    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor], mode: str, seed: int | None) -> None:
        self.images, self.transform, self.mode, self.seed = images, transform, mode, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index if index >= 0 else ~index]
        image = image if image.mode == self.mode else image.convert(self.mode)
        return self.transform(image), int(label) if index >= 0 else -1

    def __getitems__(self, keys: list[Any]) -> list[tuple[Tensor, int]]:
        if self.seed is None:
            return [self[index] for index in keys]
        with _seeded(self.seed, *keys[0]):
            return [self[index] for _, index in keys]


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers from `entropy`; what stood before comes back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reach for the GPU in every worker
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _loader(images: Dataset, batches: Sampler, workers: int) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # a loader without a generator of its own draws a number from the global one at every start, which a restart would shift
        generator=torch.Generator(),
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number per channel; the three of a colour normalisation become their mean for grey images."""
    if len(values) == channels:
        return tuple(values)
    return (float(np.mean(values)),) * channels


def _digits(split: str, recipe: DataRecipe) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with 17 grey levels; a stratified fifth (360) is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=recipe.split_seed)
    splits = {recipe.train_split: parts[0], recipe.val_split: parts[1]}
    if split not in splits:
        raise RecipeError(f"sklearn-digits has the splits {', '.join(splits)}; got {split!r}")
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [(Image.fromarray(grey[i]), int(digits.target[i])) for i in sorted(splits[split])]
    return ImageSet(images, tuple(map(str, range(10))))


def _folder(split: str, recipe: DataRecipe, class_names: tuple[str, ...] | None) -> ImageSet:
    """root/split/class/image, timm's image folder."""
    if recipe.root is None:
        raise RecipeError("data.name=folder needs data.root, the folder that holds the splits")
    folder = Path(recipe.root).expanduser() / split
    if not folder.is_dir():
        beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise FileNotFoundError(f"no folder {folder}" + (f"; beside it: {', '.join(beside[:10])}" if beside else ""))
    try:
        images = create_dataset("", root=str(folder), split=split, search_split=False)
        if class_names is not None:  # the labels follow the model's order, not this folder's
            if unknown := set(images.reader.class_to_idx) - set(class_names):
                raise RecipeError(f"{folder} holds classes that the model does not know: {', '.join(sorted(unknown)[:10])}")
            class_map = {name: i for i, name in enumerate(class_names)}
            images = create_dataset("", root=str(folder), split=split, search_split=False, class_map=class_map)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise FileNotFoundError(f"no images in {folder}/CLASS/: {error}") from None
    class_to_idx = images.reader.class_to_idx
    return ImageSet(images, tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)))


def _torchvision(name: str, split: str, recipe: DataRecipe) -> ImageSet:
    """A set of torchvision that has `train=` or `split=`, and PIL images."""
    import inspect

    import torchvision

    known = [n for n in torchvision.datasets.__all__ if n[0].isupper()]
    if name not in known:
        raise RecipeError(f"torchvision has no set {name!r}{nearest_key(name, known)}")
    if recipe.root is None:
        raise RecipeError(f"data.name={recipe.name} needs data.root, where torchvision keeps it")
    cls = getattr(torchvision.datasets, name)
    parameters = inspect.signature(cls).parameters
    if "train" in parameters:
        options: dict[str, Any] = {"train": split == recipe.train_split}
    elif "split" in parameters:
        options = {"split": split}
    else:
        raise RecipeError(f"torchvision's {name} has neither train= nor split=; make an image folder of it")
    if recipe.download and "download" in parameters:
        options["download"] = True
    try:
        images = cls(root=str(Path(recipe.root).expanduser()), **options)
    except RuntimeError as error:
        raise FileNotFoundError(f"{recipe.name} is not in {recipe.root}; data.download=true fetches it ({error})") from None
    classes = getattr(images, "classes", None)
    if classes is None:
        raise RecipeError(f"torchvision's {name} does not name its classes; make an image folder of it")
    return ImageSet(images, tuple(map(str, classes)))


def _hugging_face(name: str, split: str, recipe: DataRecipe) -> ImageSet:
    """A set of the Hugging Face Hub (or a local folder in its format) with an image column and a class label column."""
    try:
        import datasets
    except ImportError:
        raise RecipeError(f"data.name={recipe.name} needs the package `datasets`: pip install datasets") from None
    local = datasets.DownloadConfig(local_files_only=not recipe.download)
    try:
        rows = datasets.load_dataset(name, split=split, cache_dir=recipe.root, download_config=local)
    except (ConnectionError, FileNotFoundError) as error:
        hint = "" if recipe.download else "; data.download=true fetches it"
        raise FileNotFoundError(f"{recipe.name} cannot be opened{hint} ({error})") from None
    for key, column in (("image_column", recipe.image_column), ("label_column", recipe.label_column)):
        if column not in rows.column_names:
            raise RecipeError(f"data.{key}={column!r} is not a column of {recipe.name}; it has {', '.join(rows.column_names)}")
    names = getattr(rows.features[recipe.label_column], "names", None)
    if names is None:
        raise RecipeError(f"{recipe.label_column!r} of {recipe.name} is not a class label")
    return ImageSet(_Rows(rows, recipe.image_column, recipe.label_column), tuple(names))


class _Rows:
    """(image, label) of a table's rows."""

    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image, self.label = rows, image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return row[self.image], row[self.label]
