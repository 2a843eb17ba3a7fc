"""timm's optimizers and schedulers as a recipe asks for them."""

from __future__ import annotations

import fnmatch
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from attention_zoo.training.recipe import OptimizerRecipe, RecipeError, ScheduleRecipe

__all__ = ["create_optimizer", "create_scheduler", "parameter_groups", "scale_lr"]


def scale_lr(recipe: OptimizerRecipe, lr: float, images_per_update: int) -> float:
    """`lr` as the recipe means it: for batches of `lr_batch_size` images, or just so."""
    return lr if recipe.lr_batch_size is None else lr * images_per_update / recipe.lr_batch_size


def create_optimizer(model: nn.Module, recipe: OptimizerRecipe, images_per_update: int) -> Optimizer:
    """timm's `create_optimizer_v2` over `parameter_groups`.

    Raises:
        RecipeError: an optimizer that timm does not have, an option that the optimizer does not have.
    """
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.name,
            lr=scale_lr(recipe, recipe.lr, images_per_update),
            weight_decay=recipe.weight_decay,
            param_group_fn=lambda m: parameter_groups(m, recipe),
            **recipe.options,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"optimizer.name={recipe.name!r} with optimizer.options={recipe.options}: {error}") from None


def parameter_groups(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """timm's groups (weight decay on or off, layer decay), each split by `lr_multipliers`; `lr_scale` is read by its schedulers.

    Raises:
        RecipeError: a pattern that no parameter matches.
    """
    without: set[str] = getattr(model, "no_weight_decay", set)()
    if recipe.layer_decay is not None:
        groups = param_groups_layer_decay(
            model, weight_decay=recipe.weight_decay, no_weight_decay_list=without, layer_decay=recipe.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=recipe.weight_decay, no_weight_decay_list=without)
    names = {id(p): name for name, p in model.named_parameters()}
    for pattern in recipe.lr_multipliers:
        if not fnmatch.filter(names.values(), pattern):
            raise RecipeError(f"optimizer.lr_multipliers: no parameter of the model matches {pattern!r}")
    split: list[dict[str, Any]] = []
    for group in groups:
        by_factor: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(_factor(names[id(parameter)], recipe.lr_multipliers), []).append(parameter)
        for factor, parameters in by_factor.items():
            split.append({**group, "params": parameters, "lr_scale": group.get("lr_scale", 1.0) * factor})
    return split


def create_scheduler(
    optimizer: Any, recipe: ScheduleRecipe, optimizer_recipe: OptimizerRecipe, *, images_per_update: int, updates_per_epoch: int
) -> Any:
    """timm's scheduler, stepped with `step_update(number of updates)`.

    Raises:
        RecipeError: a schedule that timm does not have.
    """
    constant = recipe.name == "constant"  # timm's "none" would forget warm-up and lr_scale
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if constant else recipe.name,
            num_epochs=recipe.epochs,
            decay_epochs=recipe.epochs + 1 if constant else recipe.decay_epochs,
            decay_rate=1.0 if constant else recipe.decay_rate,
            min_lr=scale_lr(optimizer_recipe, recipe.min_lr, images_per_update),
            warmup_lr=scale_lr(optimizer_recipe, recipe.warmup_lr, images_per_update),
            warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"schedule.name={recipe.name!r}: {error}") from None
    if scheduler is None:
        raise RecipeError(f"schedule.name={recipe.name!r} is no schedule of timm's; try cosine, linear, step, poly or constant")
    return scheduler


def _factor(name: str, multipliers: dict[str, float]) -> float:
    return next((factor for pattern, factor in multipliers.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)
