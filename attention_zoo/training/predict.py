"""A checkpoint asked about image files: what `scripts/predict.py` runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from attention_zoo.training.checkpoint import Description, load_model, read_description
from attention_zoo.training.data import InputConfig, input_config
from attention_zoo.training.plots import Prediction, plot_predictions
from attention_zoo.training.recipe import DataRecipe, RecipeError

__all__ = ["ImageResult", "Predictor", "draw", "predict", "prepare_prediction"]


@dataclass(frozen=True)
class Predictor:
    """A model that is ready for image files."""

    model: nn.Module
    input: InputConfig
    class_names: tuple[str, ...]
    device: torch.device


@dataclass(frozen=True)
class ImageResult:
    """The most probable classes of one image, the first first, as (name, probability)."""

    path: Path
    image: Image.Image
    classes: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"image": str(self.path), "classes": [{"name": n, "probability": p} for n, p in self.classes]}


def prepare_prediction(
    checkpoint: str | Path, *, model: str | None = None, classes: str | Path | None = None, cpu: bool = False
) -> Predictor:
    """Load the model, its form of input and the names of its classes.

    Args:
        model: name of the model, for a file that says nothing.
        classes: text file with one class name on each line; wins over the names in the checkpoint.

    Raises:
        CheckpointError, RecipeError, FileNotFoundError: what is wrong with the files.
    """
    described = read_description(checkpoint)
    if described is None and model is None:
        raise RecipeError(f"{checkpoint} does not say which model it holds: name it with --model")
    network, chosen = load_model(checkpoint, None if model is None else Description(model=model))
    form = described.input_config if described is not None and described.input else input_config(network, DataRecipe())
    outputs = int(getattr(network, "num_classes", len(chosen.class_names)))
    names = chosen.class_names or (described.class_names if described is not None else ())
    if classes is not None:
        names = tuple(line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip())
        if len(names) != outputs:
            raise RecipeError(f"{classes} names {len(names)} classes, the model has {outputs}")
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    return Predictor(network.to(device).eval(), form, names or tuple(f"class {i}" for i in range(outputs)), device)


@torch.no_grad()
def predict(predictor: Predictor, paths: Iterable[str | Path], top_k: int = 5) -> list[ImageResult]:
    """The `top_k` most probable classes of each image (all classes where there are fewer).

    Raises:
        FileNotFoundError: no such file. ValueError: a file that is no image, or a damaged one.
    """
    transform, results = predictor.input.transform(), []
    opened = [(Path(path), _open(Path(path), predictor.input.mode)) for path in paths]  # complain before computing
    for path, image in opened:
        probabilities = predictor.model(transform(image)[None].to(predictor.device)).float().softmax(dim=-1)[0]
        best = probabilities.topk(min(top_k, len(probabilities)))
        named = tuple((predictor.class_names[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True))
        results.append(ImageResult(path, image, named))
    return results


def draw(results: Iterable[ImageResult], path: str | Path) -> None:
    """The images with their first class, as a PNG."""
    plot_predictions([Prediction(r.image, *r.classes[0]) for r in results], path, title="Predictions")


def _open(path: Path, mode: str) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's ways of meeting a damaged file
        raise ValueError(f"{path} is damaged or too large: {error}") from None
