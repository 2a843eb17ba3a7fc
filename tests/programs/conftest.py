"""A recipe small enough for tests: a tiny Vision Transformer on the digits, seconds per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("accelerate", reason="the programs need the extra `train`")


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """The sections of the recipe; its run is tmp_path/runs/tiny."""
    return sections(tmp_path / "runs")


def sections(root: Path) -> dict[str, Any]:
    return {
        "model": {
            "name": "vit_tiny_patch16_224",
            "attention": "mha",
            "kwargs": {
                "img_size": 8,
                "patch_size": 4,
                "in_chans": 1,
                "embed_dim": 16,
                "depth": 1,
                "num_heads": 2,
                "proj_drop_rate": 0.1,
                "drop_path_rate": 0.1,
            },
        },
        "data": {"name": "sklearn-digits", "batch_size": 128, "workers": 0, "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
        "augment": {"crop_scale": [0.8, 1.0], "mixup": 0.2},
        "optimizer": {"lr": 3e-3, "clip_grad": 1.0},
        "schedule": {"epochs": 2, "warmup_epochs": 1},
        "ema": {"decay": 0.9},
        "engine": {"cpu": True, "deterministic": True},
        "output": {"root": str(root), "name": "tiny", "tensorboard": False},
    }


@pytest.fixture
def recipe_file(tiny: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return path
