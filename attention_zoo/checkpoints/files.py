"""Checkpoint file -> state dict, without running code that the file holds.

safetensors files hold only tensors. PyTorch files are pickles: they are read with `weights_only=True`, which refuses everything but
tensors and plain containers. Published training checkpoints often carry a configuration object beside the weights; the few harmless
classes of that kind are replaced by an inert stand-in, so that such files load where the class is not installed, and without it.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attention_zoo.checkpoints.convert import CheckpointError

__all__ = ["read_checkpoint"]

# Keys under which training programs keep the weights, averaged (EMA) weights first, as timm prefers them.
_WEIGHT_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


class _Inert:
    """Stands for an object of a checkpoint that nobody needs: takes whatever the pickle hands it and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertMapping:
    """The same for subclasses of dict, whose items the unpickler writes only into a dict of its own kind."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


_HARMLESS_GLOBALS = {
    "argparse.Namespace": _Inert,
    "pathlib.PosixPath": _Inert,
    "numpy.dtype": _Inert,
    "numpy.core.multiarray.scalar": _Inert,
    "numpy._core.multiarray.scalar": _Inert,
    "yacs.config.CfgNode": _InertMapping,
    "easydict.EasyDict": _InertMapping,
}


def read_checkpoint(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: `.safetensors`, a PyTorch file, or a folder with either (sharded or not).

    Args:
        path: the file or folder.
        key: where the weights are inside a PyTorch checkpoint; None looks under the usual names, averaged weights first.

    Returns: parameter name -> tensor on the CPU; prefixes left by wrappers (`module.`, `_orig_mod.`) are taken off.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a truncated or damaged file, one that would have to run code, or one that holds no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        return _read_folder(path, key)
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error
    else:
        state = _find_weights(_load_pickle(path), path, key)
    return _without_wrapper_prefixes(state)


def _read_folder(folder: Path, key: str | None) -> dict[str, Tensor]:
    index = next((f for f in sorted(folder.glob("*.index.json"))), None)
    if index is not None:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise CheckpointError(f"{index} points outside its folder: {', '.join(shards)}")
    else:
        files = [f.name for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt") for f in sorted(folder.glob(pattern))]
        if len(files) != 1:
            raise CheckpointError(f"{folder} should hold one checkpoint file or an index; found {', '.join(files) or 'none'}")
        shards = files
    state: dict[str, Tensor] = {}
    for shard in shards:
        state.update(read_checkpoint(folder / shard, key=key))
    return state


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _HARMLESS_GLOBALS.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = _unsafe_globals(path)
        if wanted:
            raise CheckpointError(
                f"{path} would have to run code to be loaded: it refers to {', '.join(wanted)}. Only tensors and plain containers "
                "are read. If you trust the file, load it yourself and save its state dict as safetensors"
            ) from error
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, UnicodeDecodeError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint (truncated or damaged?): {first_line}") from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the old, non-zip format cannot be scanned; the caller has the first error
        return []
    return sorted(set(found) - set(_HARMLESS_GLOBALS))


def _find_weights(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise CheckpointError(f"{path} has no state dict under {key!r}; its keys: {', '.join(map(str, content))}")
        content = content[key]
    else:
        content = next((content[k] for k in _WEIGHT_KEYS if isinstance(content.get(k), Mapping)), content)
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    others = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if not tensors or others:
        what = f"entries that are no tensors: {', '.join(others[:8])}" if others else "no tensors"
        raise CheckpointError(f"{path} holds no plain state dict: it has {what}")
    return tensors


def _without_wrapper_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
