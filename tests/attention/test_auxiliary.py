"""Auxiliary losses: their gradients are the same with either kind of gradient checkpointing, or with none."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from attention_case import Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention_zoo as az
from attention_zoo.attention.auxiliary import AuxiliaryLossModule
from attention_zoo.registry import attention_class

WITH_LOSS = [Case(name) for name in az.list_attentions() if issubclass(attention_class(name), AuxiliaryLossModule)]


def test_which_have_one() -> None:
    assert {"moh", "moh_transnext_global", "moh_transnext_aggregated"} == {case.name for case in WITH_LOSS}


class Layers(nn.Module):
    """Two layers after each other, each of them a checkpoint if `reentrant` is not None."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.ModuleList([case.build(dtype=torch.float64), case.build(dtype=torch.float64)]).train()

    def forward(self, x: Tensor, reentrant: bool | None, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            run = functools.partial(layer, **kwargs)
            x = x + (run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant))
        return x


def gradients(model: Layers, x: Tensor, reentrant: bool | None, scales: tuple[float, ...], **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    for scale in scales:
        out = model(leaf, reentrant, **kwargs)
        (scale * (out.square().mean() + 2.0 * az.auxiliary_loss(model))).backward()
    return [leaf.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.25)], ids=["once", "accumulated"])
@pytest.mark.parametrize("case", WITH_LOSS, ids=str)
def test_checkpoints(case: Case, scales: tuple[float, ...], reentrant: bool) -> None:
    x, kwargs = case.inputs(dtype=torch.float64)
    model = Layers(case)
    want = gradients(copy.deepcopy(model), x, None, scales, **kwargs)
    got = gradients(model, x, reentrant, scales, **kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_training_forward_without_gradients_changes_nothing() -> None:
    case = Case("moh", options={"shared_heads": 1, "routed_topk": 1})
    x, model = case.inputs()[0], case.build().train()
    with torch.no_grad():
        model(x)
    (model(x).sum() + az.auxiliary_loss(model)).backward()
    got = [p.grad.clone() for p in model.parameters()]
    other = case.build().train()
    (other(x).sum() + az.auxiliary_loss(other)).backward()
    for a, b in zip(got, (p.grad for p in other.parameters()), strict=True):
        torch.testing.assert_close(a, b)
