"""Effective maps: times the values they are the heads' outputs, of every mechanism that has values of tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_case import Case, cases, seeded
from maps_case import IMAGES, close, record, vit
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.analysis import effective_attention
from attention_zoo.attention.differential import DifferentialAttention

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "agent_cswin": [{"split_size": 2}],
    "bra": [{"n_win": 2, "topk": 2}, {"n_win": 2, "soft_routing": True}],
    "cca": [{"window_size": 3, "group_size": 2}],
    "combiner": [{"pattern": p, "window_size": 3} for p in ("logsparse", "mixture")],
    "diff": [{"version": "v2"}, {"pairing": "halves", "sub_norm": False}, {"sub_norm": False}],
    "gda": [{"sub_norm": False}],
    "halo": [{"block_size": 2, "halo_size": 1, "mask_padding": True}],
    "hilo": [{"pad_mode": "mask"}, {"alpha": 1.0}, {"alpha": 0.0}, {"output_proj": "full"}],
    "moh": [{"num_kv_heads": 2, "router": "query_norm"}],
}
NO_MAP = ("dtm", "moh_transnext_aggregated")  # the one attends to nothing, the other to features of pooled tokens
AXIAL = Case("combiner", options={"pattern": "axial", "window_size": 3})  # makes keys from values
CASES = [
    *(case for case in [*cases(), *cases(causal=True)] if case.name not in NO_MAP),
    *(Case(name, options=options) for name, several in OPTIONS.items() for options in several),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_map_times_values_is_the_output(case: Case) -> None:
    """The values that the module makes, in place of the map's probes; convolutions are set to 0 for the comparison."""
    module: Any = case.build(dtype=torch.float64)
    x, kwargs = case.inputs(dtype=torch.float64)
    if hasattr(module, "noise_mode"):
        module.noise_mode = "never"
    for name, parameter in module.named_parameters():
        if {"dwc", "lepe", "get_v"} & set(name.split(".")):
            parameter.data.zero_()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = effective_attention(module, x, **kwargs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any("forward" in part.__dict__ for part in module.modules())
    values, heads = run(module, x, kwargs)
    if values is None:  # not one projection of all tokens: proved inside, on random values
        assert case.name in ("bra", "halo", "hilo")
        return
    said = found @ values
    if isinstance(module, DifferentialAttention) and module.sub_norm:
        said = module.subln(said) * (1 - module.lambda_init)
    close(said, heads, 1e-9)


def run(module: Any, x: Tensor, kwargs: Any) -> tuple[Tensor | None, Tensor]:
    """Values (B, H, N, d) as the query heads read them, and outputs (B, H, N, d) of a forward."""
    module, seen = copy.deepcopy(module), {}
    names = ("qkv", "kv", "v_proj", "v", "proj", "o_proj")
    for name in names:
        if isinstance(layer := getattr(module, name, None), nn.Module):
            layer.register_forward_hook(lambda _module, args, out, name=name: seen.update({name: (args[0], out)}))
    module(x, **kwargs)
    out = next(seen[name][0] for name in ("proj", "o_proj") if name in seen) if {"proj", "o_proj"} & seen.keys() else x
    heads = out.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    made = next((seen[name][1] for name in names[:4] if name in seen), None)
    if made is None or made.ndim != 3 or made.shape[1] != x.shape[1]:
        return None, heads
    kv_heads, width = getattr(module, "num_kv_heads", None) or module.num_heads, heads.shape[-1]
    values = made[..., made.shape[-1] - kv_heads * width :]
    if getattr(module, "pairing", "") == "halves":
        values = values.unflatten(-1, (2, kv_heads, -1)).transpose(-3, -2).flatten(-3)
    values = values.unflatten(-1, (kv_heads, width)).transpose(1, 2)
    allocation = getattr(module, "last_allocation", None)
    if allocation is None:
        return values.repeat_interleave(module.num_heads // kv_heads, 1), heads
    each = allocation if allocation.ndim == 2 else allocation.expand(len(x), -1)
    return torch.stack([v.repeat_interleave(a, 0) for v, a in zip(values, each, strict=True)]), heads


def test_of_a_plain_softmax_it_is_the_map() -> None:
    module = az.create_attention("mha", 16, 4, is_causal=True, scale_norm=True)
    x = torch.randn(2, 7, 16)
    _, maps = record(module, x)
    close(effective_attention(module, x), maps[0], 1e-5)


def test_across_to_a_context() -> None:
    module = az.create_attention("mha", 16, 4)
    x, context = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    _, maps = record(module, x, call={"context": context})
    close(effective_attention(module, x, context=context), maps[0], 1e-5)


def test_what_is_no_map_says_why() -> None:
    with pytest.raises(ValueError, match="depend on them"):
        effective_attention(AXIAL.build(), torch.randn(2, 15, 16))  # type: ignore[arg-type]
    aggregated = az.create_attention("moh_transnext_aggregated", 16, 4)
    with pytest.raises(ValueError, match="not those of its tokens"):
        effective_attention(aggregated, torch.randn(2, 16, 16), grid_size=(4, 4))
    with pytest.raises(ValueError, match="no heads"):
        effective_attention(az.create_attention("dtm", 16), torch.randn(2, 16, 16), grid_size=(4, 4))


def test_a_module_stays_as_it_is() -> None:
    module = az.create_attention("dgqa", 16, 4, attn_drop=0.5).train()
    x = torch.randn(2, 5, 16)
    before = copy.deepcopy(module)
    with seeded(0):
        state = torch.get_rng_state()
        effective_attention(module, x)
        assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(part.training for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before.buffers(), strict=True))
    assert module.last_allocation is None


@pytest.mark.parametrize("name", ["agent", "bra", "hilo", "moh"])
def test_recorded_in_a_swapped_model(name: str) -> None:
    """A single map of tokens for each layer, whatever it computes; other layers have what they have."""
    model = vit(class_token=False, global_pool="avg")
    options = {"agent": {"agent_num": 4, "use_bias": False, "use_dwc": False}, "bra": {"n_win": 2, "topk": 2}}
    az.swap_attention(model, name, layers=1, **options.get(name, {}))
    with torch.no_grad():
        want = model(IMAGES)
    out, maps = record(model, IMAGES, effective=True)
    assert torch.equal(out, want)
    assert [maps[layer].shape for layer in maps] == [(2, 3, 16, 16)] * 2
    mechanism: Any = model.get_submodule("blocks.1.attn.mechanism")
    inputs: list[Any] = []
    mechanism.register_forward_pre_hook(lambda _module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    _, some = record(model, IMAGES, effective=True, rows=[2, -1], heads="mean")
    close(some[1], maps[1][:, :, [2, 15]].mean(1, keepdim=True))
    close(maps[1], effective_attention(mechanism, *inputs[0][0], **inputs[0][1]))
    assert maps.calls(1)


def test_a_layer_without_a_map_says_why_when_it_is_asked() -> None:
    _, maps = record(AXIAL.build(), torch.randn(2, 15, 16), effective=True)
    with pytest.raises(ValueError, match="keys or weights depend on them"):
        maps[0]
    assert len(maps.calls(0)) > 1
