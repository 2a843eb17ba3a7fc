"""How good a model is on labelled images: top-1, top-5, loss, and results per class."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ClassResult", "Evaluation", "evaluate"]


@dataclass(frozen=True)
class ClassResult:
    """Results of one class, in per cent: `precision` of what was called it, `recall` of what is it (its top-1 accuracy)."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """Results on a set of images.

    Attributes:
        images: how many.
        loss: mean cross-entropy.
        top1, top5: per cent of the images whose class is the first, or among the first five (of fewer classes: all).
        confusion: (K, K) counts, row: true class, column: predicted class.
        truth, predicted: classes of the images that this device saw, in the loader's order.
    """

    images: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    def per_class(self, names: Iterable[str]) -> list[ClassResult]:
        """Results of each class. A class that was never predicted has precision 0, one without images recall 0."""
        hits, truth, called = self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        results = []
        for index, name in enumerate(names):
            precision = 100.0 * hits[index] / called[index] if called[index] else 0.0
            recall = 100.0 * hits[index] / truth[index] if truth[index] else 0.0
            f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            results.append(ClassResult(name, int(truth[index]), float(precision), float(recall), float(f1)))
        return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    device: torch.device,
    accelerator: Any = None,
    channels_last: bool = False,
) -> Evaluation:
    """Run `model` over a loader, in evaluation mode (its mode comes back afterwards).

    Args:
        loader: batches (images (B, C, H, W), labels (B,)); a label of -1 is padding.
        accelerator: accelerate's, to work in its precision and to add up over devices; None: one device, the weights' precision.

    Shape: the model maps (B, C, H, W) to (B, num_classes).
    """
    was_training = model.training
    model.eval()
    meters = {name: AverageMeter() for name in ("loss", "top1", "top5")}
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.float64, device=device)
    seen: list[Tensor] = []  # (2, B): true and predicted class
    autocast: AbstractContextManager
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        autocast = nullcontext() if accelerator is None else accelerator.autocast()
        with autocast:
            logits = model(images).float()
        real = labels >= 0
        logits, labels = logits[real], labels[real]
        if not len(labels):
            continue
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        for name, value in (("loss", F.cross_entropy(logits, labels)), ("top1", top1), ("top5", top5)):
            meters[name].update(value, len(labels))
        seen.append(torch.stack([labels, logits.argmax(dim=1)]))
        confusion += torch.bincount(seen[-1][0] * num_classes + seen[-1][1], minlength=num_classes**2)
    model.train(was_training)
    sums = torch.tensor([float(meters[n].sum) for n in meters] + [meters["loss"].count], dtype=torch.float64, device=device)
    if accelerator is not None:
        sums, confusion = accelerator.reduce(sums, "sum"), accelerator.reduce(confusion, "sum")
    loss, top1, top5, images_seen = sums.tolist()
    counts = confusion.view(num_classes, num_classes).cpu().numpy().astype(np.int64)
    truth, predicted = torch.cat(seen, dim=1).cpu().numpy() if seen else np.zeros((2, 0), dtype=np.int64)
    return Evaluation(int(images_seen), loss / images_seen, top1 / images_seen, top5 / images_seen, counts, truth, predicted)
