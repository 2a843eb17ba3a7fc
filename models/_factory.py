"""`create_model` and `list_models`: timm's factory, with `attention=` and with official checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import model_entrypoint
from torch import Tensor, nn

from attention_zoo import registry
from attention_zoo.checkpoints import CheckpointError, convert_official_state_dict, read_checkpoint

from .halonet import build_halonet, holds_halo_attention
from .vit import build_vit

__all__ = ["create_model", "list_models"]

_some = partial(registry.some, most=12)  # keys in an error message


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    attention: str | Sequence[str] | None = None,
    attention_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    **kwargs: Any,
) -> Any:
    """Build a model by name: timm's `create_model` with two more arguments.

    Args:
        name: one of ours (`list_models()`) or any of timm's.
        pretrained: load timm's weights (timm's names only; with `attention`, only timm's own kind can take them: "mha", "halo").
        checkpoint_path: weights to load, ours or the official ones (detected and converted): `.safetensors` or a PyTorch file.
        attention: a registered mechanism for every block. Our own models put it where their paper has its own; of timm's models,
            the Vision Transformers of its standard block and the networks with halo attention can take it.
        attention_kwargs: options of the mechanism.
        kwargs: the model's own arguments, `num_classes`, `img_size`, `features_only`, `drop_path_rate`, ...

    Returns: a timm model, or, for the names of decoders, a Hugging Face `PreTrainedModel`; those take the fields of its
        configuration as further arguments (`hidden_size`, `num_hidden_layers`, ...), and `attention` and `attention_kwargs` may be
        lists, one entry for each layer.

    Raises:
        UnknownNameError: no such model or mechanism; the nearest names are listed.
        ValueError: arguments that do not go together.
        CheckpointError: a file that cannot be read or does not fit the model. The keys that do not fit are listed.
    """
    ours = name in registry.model_info() and name in list_models()
    if not ours and ":" not in name and not timm.is_model(name.split(".")[0]):
        raise _unknown_model(name)
    if pretrained and ours:
        raise ValueError(f"no weights of {name!r} can be fetched; get the official file (see its page) and give checkpoint_path")
    options: Any = dict(attention_kwargs) if isinstance(attention_kwargs, Mapping) else attention_kwargs
    builder = registry.model_builder(name) if ours else None
    if builder is not None:
        model = builder(name, registry.model_info(name).family, attention=attention, attention_kwargs=options, **kwargs)
    elif not (isinstance(attention, str | None) and isinstance(options, dict | None)):
        raise ValueError(f"{name!r} has one mechanism for all its blocks: attention is a name, attention_kwargs a dict")
    elif ours:
        chosen = {"attention": attention, "attention_kwargs": options}
        model = timm.create_model(name, **{k: v for k, v in chosen.items() if v is not None}, **kwargs)
    elif attention is not None:
        build = build_halonet if holds_halo_attention(name) else build_vit
        model = build(name, attention, options, pretrained=pretrained, **kwargs)
    elif options is not None:
        raise ValueError(f"attention_kwargs without attention: {name!r} is timm's own model")
    else:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path, name, attention=attention, attention_kwargs=options, **kwargs)
    return model


def list_models(filter: str | Iterable[str] = "*", *, exclude: str | Iterable[str] = ()) -> list[str]:
    """Names of our models, sorted; `filter` and `exclude` are shell-style wildcards, one or several.

    The vision models are in timm's registry as well. timm's own names are listed by `timm.list_models`.
    """
    known = registry.model_info()
    return sorted(n for n in known if _is_ours(n) and registry.matches(n, filter) and not registry.matches(n, exclude))


def load_checkpoint(model: nn.Module, path: str | Path, name: str, **kwargs: Any) -> None:
    """Load a checkpoint file into `model`, which `create_model(name, **kwargs)` built: ours as it is, an official one converted.

    Raises:
        CheckpointError: the file fits neither way; the model's weights are then untouched.
    """
    state, own = _name_shared(read_checkpoint(path), model), model.state_dict()
    if kwargs.get("features_only") or kwargs.get("num_classes") == 0:
        state = _backbone_part(state, own)
    said = {k: v for k, v in kwargs.items() if v is not None}
    if state.keys() == own.keys() and any(state[k].shape != own[k].shape for k in own):
        with contextlib.suppress(registry.UnknownNameError, CheckpointError):  # of other sizes: some converters resample
            state = convert_official_state_dict(name, state, **said)
    if state.keys() != own.keys():
        try:
            state = convert_official_state_dict(name, state, **said)
        except registry.UnknownNameError:
            raise CheckpointError(f"{path} does not fit {name!r}: {_key_difference(state, own)}") from None
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} does not fit {name!r}: {_key_difference(state, own)}; as an official file: {error}"
            ) from None
    if state.keys() != own.keys():
        raise CheckpointError(f"{path} does not fit {name!r}: {_key_difference(state, own)}")
    wrong = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own if state[k].shape != own[k].shape]
    if wrong:
        raise CheckpointError(
            f"{path} was saved from a model of other sizes than this {name!r}: {_some(wrong)}. Build it with the arguments of the "
            "checkpoint (num_classes, img_size, ...); model.reset_classifier(n) exchanges the head afterwards"
        )
    model.load_state_dict(state, strict=True)


def _name_shared(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with every name of a tensor that the model has under several: files may hold tied weights once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    held = {name: found[0] for tied in names.values() if (found := [n for n in tied if n in state]) for name in tied}
    return {**{name: state[other] for name, other in held.items()}, **state}


def _backbone_part(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a backbone has of a classifier's file, if all of it is there: timm's feature classes keep it under `model.`."""
    for prefix in ("", "model."):
        if all(key.startswith(prefix) and key.removeprefix(prefix) in state for key in own):
            return {key: state[key.removeprefix(prefix)] for key in own}
    return state


def _is_ours(name: str) -> bool:
    if registry.model_builder(name) is not None:
        return True
    return timm.is_model(name) and model_entrypoint(name).__module__.startswith("attention_zoo.")


def _unknown_model(name: str) -> registry.UnknownNameError:
    hint = registry.did_you_mean(name, {*list_models(), *timm.list_models()}) or f"; ours are {', '.join(list_models())}"
    return registry.UnknownNameError(f"no model is named {name!r}{hint}")


def _key_difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    parts = [f"{what}: {_some(keys)}" for what, keys in (("missing keys", missing), ("unknown keys", unknown)) if keys]
    return "; ".join(parts)
