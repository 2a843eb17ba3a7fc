"""The zoo's small backbones on the handwritten digits: what their recipes promise, from YAML to the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attention_zoo.attention import AgentAttention, BiLevelRoutingAttention, LepeAttention
from attention_zoo.training.checkpoint import build_model
from attention_zoo.training.loop import Trainer
from attention_zoo.training.recipe import load_recipe
from attention_zoo.training.report import read_log
from attention_zoo.training.validate import prepare_validation, write_validation

RECIPES = ["biformer_digits", "agent_deit_digits"]


def test_what_the_recipes_say_of_their_models() -> None:
    biformer = build_model(load_recipe("biformer_digits").model, 10)
    routed = [m for m in biformer.modules() if isinstance(m, BiLevelRoutingAttention)]
    assert [(m.n_win, m.topk) for m in routed] == [((2, 2), k) for k in (1, 2, 4, 4)]
    assert len([m for m in biformer.modules() if isinstance(m, LepeAttention)]) == 1
    agents = [m for m in build_model(load_recipe("agent_deit_digits").model, 10).modules() if isinstance(m, AgentAttention)]
    assert [(m.agent_num, m.window_size, m.num_prefix_tokens) for m in agents] == [(16, (8, 8), 0)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_digits_are_learned(name: str, tmp_path: Path) -> None:
    """More than 97 % of the held-out digits, and pictures of it."""
    recipe = load_recipe(name, ["engine.cpu=true", f"output.root={tmp_path}", "output.tensorboard=false"])
    trainer = Trainer(recipe)
    trainer.fit()
    assert read_log(trainer.run.folder / "log.csv")[-1]["val_top1"] > 97
    job = prepare_validation(trainer.run.folder / "model.safetensors", [], cpu=True)
    results = job.run()
    assert results.top1 > 97
    write_validation(job, results, tmp_path / "validation")
    for picture in (trainer.run.folder / "curves.png", tmp_path / "validation" / "validation.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 10
