"""Reading checkpoint files: every form that is published, and every way a file can be wrong."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attention_zoo.checkpoints import CheckpointError, read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def assert_weights(state):
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(state[k], v) for k, v in WEIGHTS.items())


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert_weights(read_checkpoint(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema"])
def test_pickle_finds_the_weights(tmp_path, key):
    torch.save(WEIGHTS if key is None else {key: WEIGHTS, "epoch": 3}, tmp_path / "w.pth")
    assert_weights(read_checkpoint(tmp_path / "w.pth"))


def test_averaged_weights_come_first_unless_a_key_is_given(tmp_path):
    other = {k: v + 1 for k, v in WEIGHTS.items()}
    torch.save({"model": other, "model_ema": WEIGHTS}, tmp_path / "w.pth")
    assert_weights(read_checkpoint(tmp_path / "w.pth"))
    assert torch.equal(read_checkpoint(tmp_path / "w.pth", key="model")["a.bias"], other["a.bias"])
    with pytest.raises(CheckpointError, match="no state dict under 'ema'"):
        read_checkpoint(tmp_path / "w.pth", key="ema")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_taken_off(tmp_path, prefix):
    torch.save({prefix + k: v for k, v in WEIGHTS.items()}, tmp_path / "w.pth")
    assert_weights(read_checkpoint(tmp_path / "w.pth"))


def test_training_checkpoint_with_configuration_objects(tmp_path, monkeypatch):
    """Official LITv2 training files hold a yacs node: it loads as nothing, whether or not yacs is installed."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = CfgNode(MODEL=CfgNode(DEPTHS=[2, 2]))
    node.__dict__["frozen"] = True
    torch.save({"model": WEIGHTS, "config": node, "args": argparse.Namespace(lr=1.0), "best": np.float64(0.5)}, tmp_path / "w.pth")
    monkeypatch.undo()
    assert_weights(read_checkpoint(tmp_path / "w.pth"))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_file_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "extra": Hostile()}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="system" if not legacy else "not a readable|run code"):
        read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "raw.pth")
    assert not (tmp_path / "hostile_was_here").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_file(tmp_path, name, kept):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(WEIGHTS, path)
    else:
        save_file(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"w": "no tensor"}}, {}])
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds"):
        read_checkpoint(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_sharded_folder(tmp_path):
    index = {"weight_map": {}}
    for i, (key, value) in enumerate(WEIGHTS.items()):
        save_file({key: value}, tmp_path / f"part{i}.safetensors")
        index["weight_map"][key] = f"part{i}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_weights(read_checkpoint(tmp_path))
    index["weight_map"]["a.bias"] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        read_checkpoint(tmp_path)


def test_folder_with_one_file_and_with_two(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_weights(read_checkpoint(tmp_path))
    torch.save(WEIGHTS, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_checkpoint(tmp_path)
