"""Official Mixture-of-Head layers: every combination of routers has its own set of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attention_zoo as az

# Options -> the router keys that the official layer of these options has.
ROUTERS = [
    ({"shared_heads": 4, "routed_topk": 2}, {"wg.weight": (4, 24), "wg_0.weight": (2, 24), "wg_1.weight": (4, 24)}),
    ({"shared_heads": 2, "active_heads": 5}, {"wg.weight": (6, 24), "wg_0.weight": (2, 24), "wg_1.weight": (2, 24)}),
    ({"shared_heads": 1, "routed_topk": 3}, {"wg.weight": (7, 24), "wg_0.weight": (2, 24)}),
    ({"shared_heads": 0, "routed_topk": 3}, {"wg.weight": (8, 24)}),
    ({"shared_heads": 8}, {"wg_1.weight": (8, 24)}),
    ({}, {"wg.weight": (4, 24), "wg_0.weight": (2, 24), "wg_1.weight": (4, 24)}),
]


def official_state(routers: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    shapes = {"qkv.weight": (72, 24), "qkv.bias": (72,), "proj.weight": (24, 24), "proj.bias": (24,), **routers}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(("options", "routers"), ROUTERS, ids=str)
def test_every_set_of_routers_converts_and_loads(options: dict[str, int], routers: dict[str, tuple[int, ...]]) -> None:
    kwargs = {"dim": 24, "num_heads": 8, "qkv_bias": True, **options}
    state = official_state(routers)
    before = dict(state)
    module = az.create_attention("moh", **kwargs)
    module.load_state_dict(az.convert_official_state_dict("moh", state, **kwargs), strict=True)
    assert state.keys() == before.keys(), "the input is not modified"
    ours = module.state_dict()
    for official, name in (("wg", "router"), ("wg_1", "shared_router"), ("wg_0", "balance"), ("qkv", "qkv"), ("proj", "proj")):
        assert (f"{official}.weight" in state) == (f"{name}.weight" in ours)
        if f"{official}.weight" in state:
            assert torch.equal(ours[f"{name}.weight"], state[f"{official}.weight"])


def test_query_norm_layers_keep_hugging_face_names() -> None:
    kwargs = {"dim": 24, "num_heads": 4, "num_kv_heads": 2, "router": "query_norm", "proj_bias": False}
    state = {f"{n}_proj.weight": torch.randn(12 if n in "kv" else 24, 24) for n in "qkvo"}
    converted = az.convert_official_state_dict("moh", state, **kwargs)
    assert converted.keys() == state.keys()
    az.create_attention("moh", **kwargs).load_state_dict(converted, strict=True)


def test_tensors_on_the_meta_device_convert() -> None:
    with torch.device("meta"):
        state = official_state(ROUTERS[0][1])
        converted = az.convert_official_state_dict("moh", state, dim=24, num_heads=8, qkv_bias=True)
    assert converted["router.weight"].device.type == "meta"


def test_wrong_keys_are_all_listed() -> None:
    state = official_state({"wg.weight": (4, 24), "wg_2.weight": (4, 24), "gate": (1,)})
    with pytest.raises(az.CheckpointError, match=r"unknown keys: gate, wg_2\.weight; missing keys: wg_0\.weight, wg_1\.weight"):
        az.convert_official_state_dict("moh", state, dim=24, num_heads=8, qkv_bias=True)


def test_options_are_checked_as_the_constructor_does() -> None:
    with pytest.raises(ValueError, match="routed_topk must be from 1 to 4"):
        az.convert_official_state_dict("moh", {}, dim=24, num_heads=8, shared_heads=4, routed_topk=0)
    with pytest.raises(TypeError, match="no option 'routed'"):
        az.convert_official_state_dict("moh", {}, dim=24, routed=1)
