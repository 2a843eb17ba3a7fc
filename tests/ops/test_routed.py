"""Attention between routed regions against a loop over regions, routes and heads; what it must not depend on; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_zoo import ops

F64 = torch.float64


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def make(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    regions: int = 3,
    key_regions: int = 4,
    n: int = 2,
    m: int = 3,
    number: int = 2,
) -> dict[str, Tensor]:
    """Every tensor of a call, in float64, with gradients where there can be one."""
    call = {
        "q": torch.randn(batch, heads, regions, n, 4, dtype=F64),
        "k": torch.randn(batch, kv_heads, key_regions, m, 4, dtype=F64),
        "v": torch.randn(batch, kv_heads, key_regions, m, 5, dtype=F64),
        "route_weights": torch.rand(batch, regions, number, dtype=F64),
        "shared_k": torch.randn(batch, kv_heads, 2, 4, dtype=F64),
        "shared_v": torch.randn(batch, kv_heads, 2, 5, dtype=F64),
    }
    call = {name: tensor.requires_grad_() for name, tensor in call.items()}
    order = torch.rand(batch, regions, key_regions).argsort(-1)
    return {**call, "routes": order[..., :number], "key_mask": torch.rand(batch, key_regions, m) > 0.3}


def by_loop(call: dict[str, Tensor], scale: float) -> Tensor:
    q, k, v, routes = (call[name] for name in ("q", "k", "v", "routes"))
    batch, heads, regions, n, _ = q.shape
    groups = heads // k.shape[1]
    out = []
    for b in range(batch):
        for h in range(heads):
            for r in range(regions):
                keys, values = [], []
                for slot, j in enumerate(routes[b, r].tolist()):
                    weight = call["route_weights"][b, r, slot] if "route_weights" in call else 1.0
                    mask = call["key_mask"] if "key_mask" in call else torch.ones(1, *k.shape[2:4]).bool()
                    mask = mask[None] if mask.ndim == 2 else mask
                    for t in range(k.shape[3]):
                        if mask[min(b, len(mask) - 1), j, t]:
                            keys.append(weight * k[b, h // groups, j, t])
                            values.append(weight * v[b, h // groups, j, t])
                if "shared_k" in call:
                    keys += list(call["shared_k"][b, h // groups])
                    values += list(call["shared_v"][b, h // groups])
                for i in range(n):
                    if keys:
                        out.append((scale * torch.stack(keys) @ q[b, h, r, i]).softmax(0) @ torch.stack(values))
                    else:
                        out.append(0 * v[0, 0, 0, 0])
    return torch.stack(out).view(*q.shape[:-1], v.shape[-1])


@given(
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2]),
    n=st.integers(1, 2),
    m=st.integers(1, 3),
    number=st.integers(1, 4),
    dropped=st.sets(st.sampled_from(["route_weights", "key_mask", "shared"])),
    masks_differ=st.booleans(),
)
def test_against_a_loop(batch: int, kv_heads: int, n: int, m: int, number: int, dropped: set[str], masks_differ: bool) -> None:
    call = make(batch=batch, kv_heads=kv_heads, n=n, m=m, number=number)
    call = {name: t for name, t in call.items() if name.split("_k")[0].split("_v")[0] not in dropped and name not in dropped}
    if "key_mask" in call and not masks_differ:
        call["key_mask"] = call["key_mask"][0]
    leaves = [t for t in call.values() if t.requires_grad]
    got, want = ops.routed_attention(**call, scale=0.7), by_loop(call, 0.7)
    close(got, want)
    cotangent = torch.randn_like(want)
    gradients = [torch.autograd.grad((t * cotangent).sum(), leaves, allow_unused=True) for t in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        close(a, torch.zeros_like(a) if b is None else b)


def test_order_of_the_routes_does_not_matter() -> None:
    call = make(number=4)
    order = torch.rand(call["routes"].shape).argsort(-1)
    shuffled = {name: call[name].gather(-1, order) for name in ("routes", "route_weights")}
    close(ops.routed_attention(**call), ops.routed_attention(**{**call, **shuffled}))


def test_regions_that_are_not_chosen_do_not_matter() -> None:
    call = make()
    call["routes"] = torch.tensor([[[0, 2], [2, 3], [0, 3]]]).expand(2, -1, -1)  # never 1
    changed = {name: call[name].detach().index_fill(2, torch.tensor([1]), 30.0) for name in ("k", "v")}
    close(ops.routed_attention(**call), ops.routed_attention(**{**call, **changed}))
    gradient = torch.autograd.grad(ops.routed_attention(**call).sum(), call["k"])[0]
    assert gradient[:, :, 1].abs().max() == 0
    assert gradient[:, :, [0, 2, 3]].abs().amax((0, 1, 3, 4)).min() > 0


def test_all_regions_are_plain_attention_and_the_normaliser_is_its() -> None:
    call = {name: t for name, t in make(number=4).items() if name in ("q", "k", "v")}
    call["routes"] = torch.arange(4).expand(2, 3, 4)
    out, lse = ops.routed_attention(**call, return_lse=True)
    plain, plain_lse = ops.attention(*(call[name].flatten(2, 3) for name in ("q", "k", "v")), return_lse=True)
    close(out.flatten(2, 3), plain)
    close(lse.flatten(2, 3), plain_lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    call = make()
    low = {name: t.to(dtype) if t.is_floating_point() else t for name, t in call.items()}
    out = ops.routed_attention(**low)
    assert out.dtype == dtype
    close(out.double(), ops.routed_attention(**call), 0.05)


def test_no_samples_and_nothing_to_see() -> None:
    assert ops.routed_attention(**make(batch=0)).shape == (0, 2, 3, 2, 5)
    call = {name: t for name, t in make().items() if "shared" not in name}
    call["key_mask"] = torch.zeros(4, 3, dtype=torch.bool)
    out = ops.routed_attention(**call)
    assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), [call[n] for n in ("q", "k", "v")])
    assert all((g == 0).all() for g in gradients)


def test_dropout_drops() -> None:
    call = make()
    a, b = (ops.routed_attention(**call, dropout_p=0.5) for _ in range(2))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.randn(2, 2, 6, 4)}, r"q must be \(B, H, R, n, D\)"),
        ({"v": torch.randn(2, 2, 4, 2, 5)}, r"v \(B, H_kv, R_k, m, D_v\).*\(2, 2, 4, 2, 5\)"),
        ({"k": torch.randn(2, 2, 4, 3, 3)}, r"k \(B, H_kv, R_k, m, D\).*\(2, 2, 4, 3, 3\)"),
        ({"routes": torch.zeros(2, 4, 2, dtype=torch.long)}, r"routes must be int64 .*\(2, 3, 'K'\).*\(2, 4, 2\)"),
        ({"routes": torch.zeros(2, 3, 2, dtype=torch.int32)}, r"routes must be int64.*int32"),
        ({"route_weights": torch.zeros(2, 3, 3)}, r"route_weights.*\(2, 3, 2\).*\(2, 3, 3\)"),
        ({"key_mask": torch.zeros(4, 2).bool()}, r"key_mask must be boolean \(4, 3\) or \(2, 4, 3\).*\(4, 2\)"),
        ({"key_mask": torch.zeros(4, 3)}, "key_mask must be boolean.*float32"),
        ({"shared_v": None}, "shared_k and shared_v go together"),
        ({"shared_k": torch.randn(2, 2, 2, 5)}, r"shared_k must be.*\(2, 2, 2, 5\)"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.routed_attention(**{**make(), **wrong})
