"""Official checkpoints of Agent-Swin and Agent-CSwin (LeapLabTHU/Agent-Attention).

Agent-Swin's names are ours already; in Agent-CSwin's blocks, the projections and branches of the attention stand without `attn.`.
Our own names are taken as well, so that files of other sizes and heads load whoever saved them. Relative position indices and
shift masks, which follow from the sizes, are left out. A checkpoint of another image size than the model is built for is
resampled on the way, as the official loader does.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor

from attention_zoo.checkpoints.agent import refit_head, resize_state
from attention_zoo.checkpoints.convert import CheckpointError, rename_keys
from attention_zoo.registry import register_converter

__all__ = ["convert_agent_cswin", "convert_agent_swin"]

State = dict[str, Tensor]

_DERIVED = ("relative_position_index", "attn_mask")
_CSWIN_RULES = [(r"(stage\d\.\d+)\.(qkv|attns|proj)\.", r"\1.attn.\2.")]


@register_converter("agent_swin")
def convert_agent_swin(state_dict: State, **kwargs: Any) -> State:
    """A whole Agent-Swin; arguments as for `create_model`.

    With num_classes=0 the official head is left out, a head of another number of classes starts at zero. With features_only, the
    official norm and head are left out, and stages that no map needs.

    Raises:
        CheckpointError: another mechanism than the official one, unknown or missing keys.
    """
    return _convert("agent_swin", state_dict, [], kwargs)


@register_converter("agent_cswin")
def convert_agent_cswin(state_dict: State, **kwargs: Any) -> State:
    """A whole Agent-CSwin; as `convert_agent_swin`."""
    return _convert("agent_cswin", state_dict, _CSWIN_RULES, kwargs)


def _convert(family: str, state_dict: State, rules: list[tuple[str, str]], kwargs: dict[str, Any]) -> State:
    mechanism = "agent_cswin" if family == "agent_cswin" else "agent"
    if (attention := kwargs.get("attention", mechanism)) != mechanism:
        raise CheckpointError(f"official {family} checkpoints have agent attention in their blocks, not {attention!r}")
    features_only, num_classes = kwargs.get("features_only", False), kwargs.get("num_classes", 1000)
    classifier = {k: v for k, v in kwargs.items() if k not in {"features_only", "feature_cls", "out_indices"}}
    model = timm.create_model(family, **{**classifier, "device": "meta"})
    own = model.state_dict()
    official = {name: name.replace(".attn.", ".") if rules else name for name in own}
    ends = {name for name in own if name.startswith(("norm.", "head."))} if features_only else set()
    state = {official.get(key, key): tensor for key, tensor in state_dict.items() if not key.endswith(_DERIVED)}
    state = rename_keys(
        state if features_only else refit_head(state, num_classes),
        rules,
        expected=[name for key, name in official.items() if key not in ends],
        optional=["norm.weight", "norm.bias", "head.weight", "head.bias"] if features_only else [],
    )
    grids = {"absolute_pos_embed": model.grid_size} if "absolute_pos_embed" in own else {}
    state = resize_state(state, own, grids=grids)
    if not features_only:
        return state
    wanted = timm.create_model(family, **{**kwargs, "device": "meta"}).state_dict()
    return {name: state[name.removeprefix("model.")] for name in wanted}
