"""Growing grouped differential attention: more signal heads, exactly the same function, ready to be trained on.

The step of Grouped Differential Attention, arXiv 2510.06949, 2025, from a small to a larger model, as far as heads go: signal heads
are replicated, noise heads, keys, values and the cache stay as they are. The authors' script is not public; this is our definition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attention_zoo.attention.conversion import update_layer_options
from attention_zoo.attention.diff import DiffAttention
from attention_zoo.attention.gda import GroupedDiffAttention

__all__ = ["grow_model", "grow_signal_heads"]

_Model = TypeVar("_Model", bound=nn.Module)
_GROWING = ("q_proj", "o_proj", "lambda_proj")


def grow_signal_heads(
    module_or_state: nn.Module | Mapping[str, Tensor],
    factor: int,
    split: str | Sequence[float] = "equal",
    noise: float = 0.0,
    snr_db: float | None = None,
    *,
    num_heads: int | None = None,
    num_noise_heads: int | None = None,
    head_dim: int | None = None,
    symmetric: bool = False,
) -> Any:
    """Repeat each signal head `factor` times, side by side in its group, and share its output columns out over the copies.

        q rows of a group:  [s_0, s_1, n] -> [s_0, s_0, s_1, s_1, n]       o_proj columns of copy c:  a_c times the original's

    The layer computes exactly what it did. Without noise and with equal shares all copies have equal gradients for ever: give
    `noise` (0.01 is a good start; it changes the function by as much) or unequal shares before training.

    Args:
        module_or_state: a `gda` layer (or one of `diff`, which becomes one), or the state dict of one.
        factor: copies of each head, the original included.
        split: "equal", or the shares a_1 ... a_factor of the output columns, of sum 1.
        noise: deviation of what is added to the q rows of all copies but the first, relative to that of the rows.
        snr_db: the same as a ratio of signal to noise in decibels, instead of `noise`.
        num_heads, num_noise_heads, head_dim: of the layer, needed for a state dict.
        symmetric: repeat whole groups, noise heads included, as the paper's baseline does.

    Returns: a new module, or the grown state dict; memory is not shared with what changes.

    Raises:
        ValueError: a factor below 1, shares of another number or sum, both `noise` and `snr_db`, a state dict of other sizes,
            projections that are no plain linear layers.
    """
    weights = _shares(factor, split)
    relative = _relative_noise(noise, snr_db)
    if not isinstance(module_or_state, nn.Module):
        if num_heads is None or num_noise_heads is None:
            raise ValueError("a state dict does not say how many heads it has: give num_heads, num_noise_heads and head_dim")
        _check_sizes(module_or_state, num_heads, num_noise_heads, head_dim)
        return {**module_or_state, **_grow(module_or_state, num_heads, num_noise_heads, weights, relative, symmetric)}
    module = module_or_state
    if isinstance(module, DiffAttention):
        module = GroupedDiffAttention.from_diff(module)
    if not isinstance(module, GroupedDiffAttention):
        raise ValueError(f"only grouped differential attention has signal heads to grow, not {type(module).__name__}")
    adapted = [name for name in _GROWING if type(getattr(module, name, None)) not in (nn.Linear, type(None))]
    if adapted:
        raise ValueError(f"{', '.join(adapted)} are no plain linear layers: merge adapters and undo quantisation before growing")
    grown = copy.deepcopy(module)
    state = _grow(module.state_dict(), module.num_heads, module.num_noise_heads, weights, relative, symmetric)
    for name, tensor in state.items():
        linear, _, kind = name.rpartition(".")
        owner = grown.get_submodule(linear)
        setattr(owner, kind, nn.Parameter(tensor, requires_grad=module.get_parameter(name).requires_grad))
        owner.out_features, owner.in_features = owner.weight.shape  # type: ignore[assignment, misc]
    grown.num_heads *= factor
    grown.num_noise_heads *= factor if symmetric else 1
    return grown


def grow_model(
    model: _Model,
    factor: int,
    split: str | Sequence[float] = "equal",
    noise: float = 0.0,
    snr_db: float | None = None,
    *,
    symmetric: bool = False,
) -> _Model:
    """A copy of the model with every `gda` layer grown by `grow_signal_heads`; the configuration of a decoder follows.

    Args:
        model: any module that holds `gda` layers.
        factor, split, noise, snr_db, symmetric: as for `grow_signal_heads`.

    Returns: the grown model; `model` is left as it is. Where it has a `config` with `attention` and `attention_kwargs`, the copy's
        builds the grown model, so that `save_pretrained` and `from_pretrained` work.

    Raises:
        ValueError: no layer to grow, or as for `grow_signal_heads`.
    """
    layers = [m for m in model.modules() if isinstance(m, GroupedDiffAttention)]
    if not layers:
        raise ValueError("the model holds no grouped differential attention ('gda') to grow")
    replaced = {id(m): grow_signal_heads(m, factor, split, noise, snr_db, symmetric=symmetric) for m in layers}
    grown = copy.deepcopy(model, dict(replaced))  # the copy takes the grown layers where it meets the old ones
    config = getattr(grown, "config", None)
    if hasattr(config, "attention") and hasattr(config, "attention_kwargs"):
        _update_config(config, list(replaced.values()))
    return grown


def _grow(
    state: Mapping[str, Tensor], num_heads: int, num_noise_heads: int, weights: Sequence[float], relative: float, symmetric: bool
) -> dict[str, Tensor]:
    """The tensors that change, grown."""
    queries, outputs = _orders(num_heads // num_noise_heads, num_noise_heads, len(weights), symmetric)
    grown: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("q_proj.weight", "q_proj.bias"):
            heads = tensor.unflatten(0, (num_heads + num_noise_heads, -1))
            copies = heads[[head for head, _ in queries]]
            if relative and name.endswith("weight"):
                new = torch.tensor([copy_number > 0 for _, copy_number in queries], device=tensor.device)
                deviation = copies.float().std(dim=(1, 2), keepdim=True).to(tensor.dtype) * new[:, None, None]
                copies = copies + relative * deviation * torch.randn_like(copies)
            grown[name] = copies.flatten(0, 1)
        elif name == "o_proj.weight":
            share = torch.tensor([weights[c] for _, c in outputs], device=tensor.device, dtype=tensor.dtype)
            columns = tensor.unflatten(1, (num_heads, -1))[:, [head for head, _ in outputs]]
            grown[name] = (columns * share[:, None]).flatten(1)
        elif name in ("lambda_proj.weight", "lambda_proj.bias"):
            grown[name] = tensor[[head for head, _ in outputs]]
    return grown


def _orders(ratio: int, groups: int, factor: int, symmetric: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """For each new query head, and each new output head: which one it is a copy of, and which copy."""
    queries, outputs = [], []
    for m in range(groups):
        if symmetric:
            members = [(g, c) for c in range(factor) for g in range(ratio + 1)]
        else:
            members = [*((g, c) for g in range(ratio) for c in range(factor)), (ratio, 0)]
        queries += [(m * (ratio + 1) + g, c) for g, c in members]
        outputs += [(m * ratio + g, c) for g, c in members if g < ratio]
    return queries, outputs


def _shares(factor: int, split: str | Sequence[float]) -> list[float]:
    if factor < 1 or factor != int(factor):
        raise ValueError(f"factor is how many heads become of one, a whole number from 1; got {factor}, the nearest is 1")
    if split == "equal":
        return [1.0 / factor] * factor
    shares = [] if isinstance(split, str) else [float(share) for share in split]
    if len(shares) != factor or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(f"split must be 'equal' or {factor} shares of sum 1, one for each copy; got {split!r}")
    return shares


def _relative_noise(noise: float, snr_db: float | None) -> float:
    if noise and snr_db is not None:
        raise ValueError(f"noise={noise} and snr_db={snr_db} say the same in two ways: give one")
    if noise < 0:
        raise ValueError(f"noise is a relative deviation, from 0; got {noise}")
    return noise if snr_db is None else 10.0 ** (-snr_db / 20.0)


def _check_sizes(state: Mapping[str, Tensor], num_heads: int, num_noise_heads: int, head_dim: int | None) -> None:
    """Raise ValueError unless a layer of these sizes can have this state dict."""
    missing = [name for name in ("q_proj.weight", "o_proj.weight") if name not in state]
    if missing:
        raise ValueError(f"no state dict of one 'gda' layer: it lacks {', '.join(missing)}")
    GroupedDiffAttention.resolve_noise_heads(num_heads, None, num_noise_heads)
    rows, columns, heads = state["q_proj.weight"].shape[0], state["o_proj.weight"].shape[1], num_heads + num_noise_heads
    width = rows // heads if head_dim is None else head_dim
    if rows != heads * width or columns not in (num_heads * width, 2 * num_heads * width):
        raise ValueError(
            f"q_proj.weight has {rows} rows and o_proj.weight {columns} columns, which num_heads={num_heads}, "
            f"num_noise_heads={num_noise_heads}, head_dim={width} do not give"
        )


def _update_config(config: Any, layers: Sequence[GroupedDiffAttention]) -> None:
    """Let a decoder's configuration build the grown layers: head counts for all layers where they agree, else options of each."""
    sizes = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    alike = len(layers) == config.num_hidden_layers and all(len({getattr(m, name) for m in layers}) == 1 for name in sizes)
    changes = {}
    for layer in layers:
        assert layer.layer_idx is not None  # decoders number their layers
        own = {name: None if alike else getattr(layer, name) for name in sizes}
        changes[layer.layer_idx] = {"num_noise_heads": layer.num_noise_heads, **own}
    update_layer_options(config, changes)
    if alike:
        for name, field in sizes.items():
            setattr(config, field, getattr(layers[0], name))
