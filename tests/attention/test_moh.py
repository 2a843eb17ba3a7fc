"""Mixture-of-Head attention against its formulas written out token by token, the official numbers, and the paper's invariants."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_case import make_generic, rotary_tables, run
from marks import slow_but
from safetensors import safe_open
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention_zoo as az
from attention_zoo.attention import MoHAttention, set_routed_topk
from attention_zoo.attention.moh import load_balance_loss, top_k_mask

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "parity" / "moh").glob("*.safetensors"))

LAYERS: list[dict[str, Any]] = [
    {"dim": 12, "num_heads": 6, "shared_heads": 2, "routed_topk": 2, "qkv_bias": True},
    {"dim": 10, "num_heads": 5, "shared_heads": 0, "routed_topk": 3},
    {"dim": 12, "num_heads": 4, "shared_heads": 1, "active_heads": 3, "head_dim": 5, "proj_bias": False},
    {"dim": 9, "num_heads": 3, "shared_heads": 3, "routed_topk": 0, "qk_norm": True},
    {"dim": 7, "num_heads": 1, "shared_heads": 1},
    {"dim": 8, "num_heads": 4, "shared_heads": 3, "routed_topk": 1},
    {"dim": 8, "num_heads": 4, "shared_heads": 2, "routed_topk": 2, "qk_norm": True},
    {"dim": 12, "num_heads": 6, "num_kv_heads": 2, "shared_heads": 3, "routed_topk": 2, "is_causal": True},
    {"dim": 8, "num_heads": 4, "shared_heads": 1, "routed_topk": 2, "context_dim": 5},
    {"dim": 12, "num_heads": 6, "num_kv_heads": 3, "shared_heads": 2, "routed_topk": 2, "router": "query_norm", "qkv_bias": True},
    {"dim": 12, "num_heads": 6, "shared_heads": 0, "routed_topk": 2, "router": "query_norm", "router_grad": "ste"},
    {
        "dim": 12,
        "num_heads": 6,
        "shared_heads": 2,
        "routed_topk": 4,
        "router": "query_norm",
        "router_grad": "ste",
        "is_causal": True,
    },
    {"dim": 12, "num_heads": 5, "shared_heads": 1, "routed_topk": 2, "router": "query_norm", "head_dim": 3, "qk_norm": True},
    {"dim": 12, "num_heads": 3, "shared_heads": 3, "routed_topk": 0, "router": "query_norm"},
]


def build(seed: int = 0, **options: Any) -> MoHAttention:
    """A float64 layer whose parameters have no special values."""
    torch.manual_seed(seed)
    module = MoHAttention(**{"dtype": torch.float64, **options})
    make_generic(module)
    return module


# --- the formulas, token by token -------------------------------------------------------------------------------------------------


def query_rows(module: MoHAttention) -> tuple[Tensor, Tensor | None]:
    inner = module.num_heads * module.head_dim
    linear = module.qkv if hasattr(module, "qkv") else module.q_proj
    return linear.weight[:inner], None if linear.bias is None else linear.bias[:inner]


def key_value_rows(module: MoHAttention) -> list[tuple[Tensor, Tensor | None]]:
    if not hasattr(module, "qkv"):
        return [(p.weight, p.bias) for p in (module.k_proj, module.v_proj)]
    inner = module.num_heads * module.head_dim
    return [
        (
            module.qkv.weight[i * inner : (i + 1) * inner],
            None if module.qkv.bias is None else module.qkv.bias[i * inner : (i + 1) * inner],
        )
        for i in (1, 2)
    ]


def softmax_of(numbers: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(n) for n in numbers]
    return [e / sum(exponentials) for e in exponentials]


def dot(row: Tensor, x: Tensor, bias: Tensor | None = None, i: int = 0) -> Tensor:
    return (row * x).sum() + (0 if bias is None else bias[i])


def token_gates(module: MoHAttention, x: Tensor, queries: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """g, p and the chosen heads of one token x (C,), whose query of each head is given."""
    hs, k = module.shared_heads, module.routed_topk
    hr = module.num_heads - hs
    if module.router_kind == "query_norm":
        norms = [q.square().sum().sqrt() for q in queries[hs:]]
        chosen = sorted(range(hr), key=lambda e: (-norms[e].item(), e))[:k]
        p = norms
        if hr > 1:
            mean = sum(norms) / hr
            deviation = (sum((n - mean) ** 2 for n in norms) / (hr - 1)).sqrt()
            p = softmax_of([n / (deviation + 1e-6) for n in norms])
        elif hr == 1:
            p = [torch.ones_like(norms[0])]
        one = torch.ones_like(x[0])
        through = [p[e] - p[e].detach() if module.router_grad == "ste" else 0 * one for e in range(hr)]
        return [one] * hs + [one + through[e] if e in chosen else 0 * one for e in range(hr)], p, chosen
    shared = [torch.ones_like(x[0])] * hs
    if hs > 1:
        shared = [hs * s for s in softmax_of([dot(row, x) for row in module.shared_router.weight])]
    if hr == 0:
        return shared, [], []
    p = softmax_of([dot(row, x) for row in module.router.weight])
    chosen = sorted(range(hr), key=lambda e: (-p[e].item(), e))[:k]
    total = sum(p[e] for e in chosen)
    routed = [k * p[e] / total if e in chosen else torch.zeros_like(x[0]) for e in range(hr)]
    if hs == 0:
        return routed, p, chosen
    a = [2 * s for s in softmax_of([dot(row, x) for row in module.balance.weight])]
    return [a[0] * s for s in shared] + [a[1] * r for r in routed], p, chosen


def formula(
    module: MoHAttention, x: Tensor, context: Tensor | None = None, allowed: Tensor | None = None, real: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N, C), gates (B, N, h) and the load-balance loss, one token, head and key after the other."""
    context = x if context is None else context
    h, d, group = module.num_heads, module.head_dim, module.num_heads // module.num_kv_heads
    (wq, bq), ((wk, bk), (wv, bv)) = query_rows(module), key_value_rows(module)
    output = module.proj if hasattr(module, "proj") else module.o_proj
    length, keys = x.shape[1], context.shape[1]
    rows, all_gates, statistics = [], [], []
    for b in range(x.shape[0]):
        k = nn.functional.linear(context[b], wk, bk).reshape(keys, -1, d)
        v = nn.functional.linear(context[b], wv, bv).reshape(keys, -1, d)
        for n in range(length):
            q = nn.functional.linear(x[b, n], wq, bq).reshape(h, d)
            g, p, chosen = token_gates(module, x[b, n], list(q))
            if p and (real is None or real[b, n]):
                statistics.append((p, chosen))
            seen = [
                j for j in range(keys) if (allowed is None or allowed[b, j]) and (not module.is_causal or j <= n + keys - length)
            ]
            mixed = []
            for i in range(h):
                qi = module.q_norm(q[i])
                logits = [(qi * module.k_norm(k[j, i // group])).sum() / math.sqrt(d) for j in seen]
                o = sum((w * v[j, i // group] for w, j in zip(softmax_of(logits), seen, strict=True)), torch.zeros_like(qi))
                mixed.append(g[i] * o)
            rows.append(nn.functional.linear(torch.cat(mixed), output.weight, output.bias))
            all_gates.append(torch.stack(g))
    aux = x.new_zeros(())
    for e in range(h - module.shared_heads):
        me = sum(p[e] for p, _ in statistics) / len(statistics)
        ce = sum(e in chosen for _, chosen in statistics) / len(statistics)
        aux = aux + (h - module.shared_heads) * me * ce
    return torch.stack(rows).reshape(*x.shape[:2], -1), torch.stack(all_gates).reshape(*x.shape[:2], h), aux


def gates_of(module: MoHAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The gates that a forward multiplies the heads' outputs by: read off where they are made."""
    return module._route(x, module._project(x, context)[0])[0]


def gradients_of(objective: Tensor, module: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(objective, [x, *parameters], allow_unused=True)
    for name, tensor, gradient in zip(["x", *names], [x, *parameters], gradients, strict=True):
        yield name, torch.zeros_like(tensor) if gradient is None else gradient


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 1), (3, 2)], ids=str)
def test_equals_the_formulas(options: dict[str, Any], batch: int, length: int) -> None:
    """Outputs, load-balance loss and all gradients, routers' included, in training mode."""
    module = build(**options).train()
    x = torch.randn(batch, length, module.dim, dtype=torch.float64, requires_grad=True)
    context = torch.randn(batch, 4, module.context_dim, dtype=torch.float64) if "context_dim" in options else None
    y = module(x, context=context)
    wanted, wanted_gates, wanted_aux = formula(module, x, context)
    aux = az.auxiliary_loss(module)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gates_of(module, x, context), wanted_gates)
    torch.testing.assert_close(aux, wanted_aux.to(aux.dtype))
    weights = torch.randn_like(y)
    got, want = ((out * weights).sum() + 0.7 * loss for out, loss in ((y, aux), (wanted, wanted_aux)))
    for (name, a), (_, b) in zip(gradients_of(got, module, x), gradients_of(want, module, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_random_layers_equal_the_formulas() -> None:
    """Twenty layers of random odd sizes and options."""
    draw = random.Random(7)
    for seed in range(20):
        kv = draw.choice([1, 2, 3])
        heads = kv * draw.choice([1, 2, 3])
        shared = draw.randrange(heads + 1)
        options: dict[str, Any] = {
            "dim": draw.choice([5, 6, 11]),
            "num_heads": heads,
            "num_kv_heads": kv,
            "head_dim": draw.choice([1, 3, 4]),
            "shared_heads": shared,
            "routed_topk": draw.randint(min(1, heads - shared), heads - shared),
            "router": draw.choice(["linear", "query_norm"]),
            "qkv_bias": draw.random() < 0.5,
            "is_causal": draw.random() < 0.5,
        }
        module = build(seed, **options).train()
        x = torch.randn(draw.randint(1, 3), draw.randint(1, 6), module.dim, dtype=torch.float64, requires_grad=True)
        padding = torch.rand(x.shape[:2]) > 0.3
        padding[:, 0] = True
        y = module(x, attention_mask=padding)
        wanted, _, wanted_aux = formula(module, x, allowed=padding, real=padding)
        torch.testing.assert_close(y, wanted, msg=lambda m, o=options: f"{o}: {m}")
        aux = az.auxiliary_loss(module)
        torch.testing.assert_close(aux, wanted_aux.to(aux.dtype), msg=lambda m, o=options: f"{o}: {m}")
        weights = torch.randn_like(y)
        got, want = ((out * weights).sum() + loss for out, loss in ((y, aux), (wanted, wanted_aux)))
        for (name, a), (_, b) in zip(gradients_of(got, module, x), gradients_of(want, module, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=lambda m, o=options, n=name: f"{o} {n}: {m}")


# --- what the official code computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_gates_and_router_gradients_of_the_official_code(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    kwargs = json.loads(metadata["zoo_kwargs"])
    kwargs["is_causal"] = kwargs.pop("causal")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    module = az.create_attention("moh", **kwargs).train(metadata["mode"] == "train")
    module.load_state_dict(az.convert_official_state_dict("moh", state, **kwargs), strict=True)
    x = tensors["input.tokens"].requires_grad_()
    tolerance, tolerance_grad = (float(metadata[key]) for key in ("tolerance", "tolerance_grad"))

    wanted_gates = tensors["debug.gates"] if "debug.gates" in tensors else tensors["debug.head_mask"]
    torch.testing.assert_close(gates_of(module, x), wanted_gates, atol=tolerance, rtol=0)

    tables = {}
    if "input.rope_cos" in tensors:
        tables["position_embeddings"] = tuple(torch.cat([tensors[f"input.rope_{n}"]] * 2, -1) for n in ("cos", "sin"))
    out = module(x, **tables)
    torch.testing.assert_close(out, tensors["output.tokens"], atol=tolerance, rtol=0)
    objective = (out * tensors["cotangent.tokens"]).sum()
    if "output.aux_loss" in tensors:
        torch.testing.assert_close(module.aux_loss, tensors["output.aux_loss"], atol=tolerance, rtol=0)
        objective = objective + module.aux_loss * tensors["cotangent.aux_loss"]
    objective.backward()
    torch.testing.assert_close(x.grad, tensors["grad.input"], atol=tolerance_grad, rtol=0)
    official = {k.removeprefix("grad.state."): v for k, v in tensors.items() if k.startswith("grad.state.")}
    names = {"wg.weight": "router", "wg_1.weight": "shared_router", "wg_0.weight": "balance"}
    assert len(official) == len([n for n in names.values() if hasattr(module, n)]) or module.router_kind == "query_norm"
    for name, gradient in official.items():
        torch.testing.assert_close(getattr(module, names[name]).weight.grad, gradient, atol=tolerance_grad, rtol=0)


def test_the_official_cases_are_there() -> None:
    assert len(FIXTURES) >= 4


# --- invariants of the gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "topk"), [(3, 2), (2, 1), (1, 3), (1, 6), (0, 4)])
def test_sums_and_counts_of_soft_gates(shared: int, topk: int) -> None:
    module = build(dim=14, num_heads=7, shared_heads=shared, routed_topk=topk)
    x = 3 * torch.randn(3, 11, 14, dtype=torch.float64)
    gates = gates_of(module, x)
    assert torch.equal((gates != 0).sum(-1), torch.full((3, 11), shared + topk))
    routed = gates[..., shared:].sum(-1)
    if shared == 0:
        torch.testing.assert_close(routed, torch.full_like(routed, topk))
    else:
        balance = 2 * module.balance(x).softmax(-1)
        torch.testing.assert_close(gates[..., :shared].sum(-1), shared * balance[..., 0])
        torch.testing.assert_close(routed, topk * balance[..., 1])
        torch.testing.assert_close(balance.sum(-1), torch.full_like(routed, 2.0))


def test_hard_gates_are_zero_or_one() -> None:
    module = build(dim=14, num_heads=7, shared_heads=2, routed_topk=3, router="query_norm")
    gates = gates_of(module, torch.randn(3, 11, 14, dtype=torch.float64))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert (gates[..., :2] == 1).all()
    assert (gates[..., 2:].sum(-1) == 3).all()


def test_zero_routers_restrict_attention_to_the_first_heads() -> None:
    """All scores equal: the lowest routed heads are chosen, every gate is 1, the others' columns of W_o do not matter."""
    module = build(dim=12, num_heads=6, shared_heads=2, routed_topk=2)
    for router in (module.router, module.shared_router, module.balance):
        nn.init.zeros_(router.weight)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.equal(gates_of(module, x), torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64).expand(2, 5, 6))
    plain = az.create_attention("mha", 12, 6, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "qkv" in k or "proj" in k})
    nn.init.zeros_(plain.proj.weight[:, 8:])
    torch.testing.assert_close(module(x), plain(x))


def test_ties_go_to_the_lowest_heads() -> None:
    scores = torch.tensor([[1.0, 2, 2, 2], [3, 3, 3, 3], [0, 1, 0, 1], [2, 1, 1, 0]])
    assert top_k_mask(scores, 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    wide = torch.randint(0, 3, (200, 33)).float()  # torch.topk breaks ties otherwise at such widths
    for row, mask in zip(wide.tolist(), top_k_mask(wide, 9), strict=True):
        assert sorted(sorted(range(33), key=lambda e: (-row[e], e))[:9]) == mask.nonzero().flatten().tolist()
    module = build(dim=8, num_heads=4, shared_heads=0, routed_topk=2, router="query_norm")
    nn.init.zeros_(module.q_proj.weight)
    gates = gates_of(module, torch.randn(1, 3, 8, dtype=torch.float64))
    assert gates.tolist() == [[[1, 1, 0, 0]] * 3]


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_tokens_may_change_places(router: str) -> None:
    module = build(dim=12, num_heads=6, shared_heads=2, routed_topk=1, router=router).eval()
    x, order = torch.randn(2, 7, 12, dtype=torch.float64), torch.randperm(7)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


def test_query_norm_selection_ignores_scale_and_rotation() -> None:
    module = build(dim=16, num_heads=4, shared_heads=1, routed_topk=1, router="query_norm").eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    gates = gates_of(module, x)
    q = module._project(x, None)[0]
    rotated = az.attention.base.apply_rotary(q, tuple(t.double() for t in rotary_tables(9, 4)))
    assert not torch.allclose(rotated, q)
    assert torch.equal(module._route(x, rotated)[0], gates)
    with torch.no_grad():
        module.q_proj.weight.mul_(3.7)
    assert torch.equal(gates_of(module, x), gates)
    with torch.no_grad():
        module.q_proj.weight[8:12].mul_(30.0)  # the largest now
    assert (gates_of(module, x)[..., 2] == 1).all()


def test_query_norm_ranks_what_the_normalisation_would_level() -> None:
    """With qk_norm every head's query has nearly one norm: the projection's own is what tells the heads apart."""
    module = build(dim=16, num_heads=4, shared_heads=1, routed_topk=1, router="query_norm", qk_norm=True).eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    norms = module._project(x, None)[0].norm(dim=-1)[:, 1:]
    assert torch.equal(gates_of(module, x)[..., 1:].argmax(-1), norms.argmax(1))


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_grouped_heads_equal_repeated_keys_and_values(router: str) -> None:
    options = {"dim": 12, "num_heads": 6, "shared_heads": 2, "routed_topk": 2, "router": router, "context_dim": 7}
    module = build(num_kv_heads=2, **options).eval()
    full = build(**options).eval()
    state = module.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 1, 2)).expand(-1, 3, -1, -1).flatten(0, 2)
    full.load_state_dict(state)
    x, context = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 8, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x, context=context), full(x, context=context))


def test_heads_that_nobody_chooses_get_no_gradient() -> None:
    module = build(dim=8, num_heads=4, shared_heads=1, routed_topk=1, router="query_norm").train()
    with torch.no_grad():
        module.q_proj.weight[4:6].mul_(100.0)  # head 2 wins everywhere
    module(torch.randn(2, 6, 8, dtype=torch.float64)).sum().backward()
    heads = module.v_proj.weight.grad.unflatten(0, (4, 2)).abs().amax((1, 2))
    assert (heads > 0).tolist() == [True, False, True, False]


def test_fully_masked_rows_are_zero_and_keep_their_gates() -> None:
    module = build(dim=8, num_heads=4, proj_bias=False).train()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[0, :, 1] = False
    out = module(x, attention_mask=mask)
    assert (out[0, 1] == 0).all()
    assert (out[1] != 0).all()
    (out.sum() + module.aux_loss).backward()
    assert x.grad.isfinite().all()


# --- straight through -------------------------------------------------------------------------------------------------------------


def test_straight_through_gradient_is_that_of_the_scores() -> None:
    """Forward unchanged; backward adds sum_i d_i * score_i over the chosen heads, with d_i = <o_i, W_o,i^T dy>."""
    options = {"dim": 12, "num_heads": 5, "head_dim": 3, "shared_heads": 1, "routed_topk": 2, "router": "query_norm"}
    plain = build(**options).eval()
    through = build(**options, router_grad="ste").eval()
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 4, 12, dtype=torch.float64)
    y = through(x)
    assert torch.equal(y, plain(x))

    heads = nn.functional.linear(x, plain.q_proj.weight).unflatten(-1, (5, 3))
    norms = heads.norm(dim=-1)[..., 1:]
    scores = (norms / (norms.std(-1, keepdim=True) + 1e-6)).softmax(-1)
    chosen = gates_of(plain, x)[..., 1:]
    d_gates = []
    for i in range(1, 5):  # the gate of head i alone: y is linear in it
        alone = copy.deepcopy(plain)
        with torch.no_grad():
            alone.o_proj.weight[:, torch.arange(15) // 3 != i] = 0
            alone.o_proj.bias.zero_()
            alone.set_topk(4)
            d_gates.append((alone(x) * dy).sum(-1))
    extra = (torch.stack(d_gates, -1) * scores * chosen).sum()
    want = torch.autograd.grad((plain(x) * dy).sum() + extra, [x, plain.q_proj.weight])
    got = torch.autograd.grad((y * dy).sum(), [x, through.q_proj.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(got[1], torch.autograd.grad((plain(x) * dy).sum(), plain.q_proj.weight)[0])


def test_straight_through_stands_equal_norms() -> None:
    module = build(dim=8, num_heads=4, shared_heads=1, routed_topk=2, router="query_norm", router_grad="ste").train()
    nn.init.zeros_(module.q_proj.weight)
    (module(torch.randn(2, 3, 8, dtype=torch.float64)).sum() + module.aux_loss).backward()
    assert module.q_proj.weight.grad.isfinite().all()


# --- the load-balance loss --------------------------------------------------------------------------------------------------------


def test_balanced_heads_cost_k() -> None:
    module = build(dim=12, num_heads=6, shared_heads=2, routed_topk=3).train()
    nn.init.zeros_(module.router.weight)  # p is uniform, so whatever is chosen the loss is K
    module(torch.randn(2, 5, 12, dtype=torch.float64))
    torch.testing.assert_close(module.aux_loss, torch.tensor(3.0, dtype=torch.float64))


def test_unbalanced_heads_cost_more() -> None:
    scores = torch.tensor([0.9, 0.05, 0.03, 0.02]).expand(2, 7, 4)
    loss, load = load_balance_loss(scores, top_k_mask(scores, 1))
    torch.testing.assert_close(loss, torch.tensor(4 * 0.9))
    assert load.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_loss_is_there_in_training_only(router: str) -> None:
    module = build(dim=8, num_heads=4, router=router)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert module.aux_loss is None
    module.train()(x)
    first = module.aux_loss
    assert first is not None
    assert first.requires_grad
    assert first.shape == ()
    module(x + 1)
    assert module.aux_loss is not first
    module.eval()(x)
    assert module.aux_loss is None
    assert az.auxiliary_loss(module) == 0


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_no_graph_outlives_the_backward_pass(router: str) -> None:
    """Of a model in several layers, whose next forward would meet nodes that remember another stream."""
    model = nn.Sequential(*(build(i, dim=8, num_heads=4, router=router) for i in range(3))).train()
    for part in model:
        part.requires_grad_()
    x = torch.randn(2, 3, 8, dtype=torch.float64)

    def nodes() -> list[Any]:
        return [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]

    out = model(x)
    value = az.auxiliary_loss(model).item()
    for node in nodes():
        node.metadata["seen"] = True
    aux = az.auxiliary_loss(model)
    (out.sum() + aux).backward()
    del out, aux, node
    assert not any(node.metadata for node in nodes())
    assert az.auxiliary_loss(model).item() == value
    assert not az.auxiliary_loss(model).requires_grad


def test_a_loss_that_waits_for_its_gradient_keeps_its_graph() -> None:
    module = build(dim=8, num_heads=4).train()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    together = torch.autograd.grad(module(x).sum() + az.auxiliary_loss(module), module.router.weight)[0]
    of_task = torch.autograd.grad(module(x).sum(), module.router.weight, retain_graph=True)[0]
    of_loss = torch.autograd.grad(az.auxiliary_loss(module), module.router.weight)[0]
    torch.testing.assert_close(of_task + of_loss, together)


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_layers_that_share_all_heads_have_no_loss(router: str) -> None:
    module = build(dim=8, num_heads=4, shared_heads=4, router=router).train()
    module(torch.randn(2, 3, 8, dtype=torch.float64))
    assert module.aux_loss is None


def test_loss_of_a_model_is_the_mean_over_layers_with_a_router() -> None:
    layers = nn.ModuleList(
        [build(i, dim=8, num_heads=4, shared_heads=s, routed_topk=4 - s) for i, s in enumerate((2, 4, 1))]
    ).train()
    model = nn.Sequential(*layers, nn.Linear(8, 2, dtype=torch.float64))
    model(torch.randn(2, 3, 8, dtype=torch.float64))
    want = (layers[0].aux_loss + layers[2].aux_loss) / 2
    torch.testing.assert_close(az.auxiliary_loss(model), want, check_dtype=False)
    assert az.auxiliary_loss(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("form", ["padding", "bool", "float", "finfo-min", "causal-bool"])
def test_padding_leaves_the_statistics(form: str) -> None:
    module = build(dim=8, num_heads=4, shared_heads=2, routed_topk=1).train()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    mask = padding[:, None, None, :].expand(2, 1, 5, 5)
    forms = {
        "padding": padding.long(),
        "bool": mask,
        "float": torch.zeros(mask.shape).masked_fill(~mask, -math.inf),
        "finfo-min": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        "causal-bool": mask & torch.ones(5, 5).tril().bool(),
    }
    module(x, attention_mask=forms[form])
    scores, chosen = module._route(x, module._project(x, None)[0])[1:]
    p, m = scores[padding], chosen[padding]
    torch.testing.assert_close(module.aux_loss, 2 * (p.mean(0) * m.mean(0)).sum())


def test_masks_without_padding_count_every_token() -> None:
    module = build(dim=8, num_heads=4, shared_heads=2, routed_topk=1).train()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    module(x)
    want = module.aux_loss
    for mask in (torch.randn(5, 5), torch.eye(5).bool()[None, None], torch.ones(1, 1, 1, 1).bool(), torch.ones(2, 5).long()):
        module(x, attention_mask=mask)
        torch.testing.assert_close(module.aux_loss, want)
    module(x, context=torch.randn(2, 3, 8, dtype=torch.float64), attention_mask=torch.tensor([[1, 1, 0], [0, 1, 1]]))
    torch.testing.assert_close(module.aux_loss, want, msg="the padding of the context is not that of the tokens")


def test_statistics_behind_a_cache_count_the_new_tokens() -> None:
    from transformers import DynamicCache, LlamaConfig, StaticCache

    module = build(dim=8, num_heads=4, shared_heads=2, routed_topk=1, is_causal=True).train()
    module.layer_idx = 0
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    real = padding[:, 4:].bool()
    scores, chosen = module._route(x, module._project(x, None)[0])[1:]
    want = 2 * (scores[:, 4:][real].mean(0) * chosen[:, 4:][real].mean(0)).sum()
    for cache in (DynamicCache(), StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=9)):
        with torch.no_grad():
            module(x[:, :4], attention_mask=padding[:, :4], past_key_values=cache)
            module(x[:, 4:], attention_mask=padding, past_key_values=cache)
        torch.testing.assert_close(module.aux_loss, want)


def test_head_load_is_kept_for_debugging() -> None:
    module = build(dim=12, num_heads=6, shared_heads=1, routed_topk=2).eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    module(x)
    assert module.last_head_load is None
    module.debug = True
    module(x)
    assert module.last_head_load.shape == (5,)
    torch.testing.assert_close(module.last_head_load, (gates_of(module, x)[..., 1:] != 0).double().mean((0, 1)))
    torch.testing.assert_close(module.last_head_load.sum(), torch.tensor(2.0, dtype=torch.float64))
    assert module.aux_loss is None


def test_copies_after_a_training_step_leave_the_graph_behind() -> None:
    module = build(dim=8, num_heads=4).train()
    module.debug = True
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    module(x)
    twin = copy.deepcopy(module)
    assert twin.aux_loss is None
    assert module.aux_loss is not None
    file = io.BytesIO()
    torch.save(nn.Sequential(module), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)[0]
    assert torch.equal(loaded(x), module(x))
    torch.testing.assert_close(loaded.aux_loss, module.aux_loss)


def test_checkpointed_layers_keep_a_right_loss() -> None:
    module = build(dim=8, num_heads=4).train()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    (module(x).sum() + az.auxiliary_loss(module)).backward()
    want, gradient = module.aux_loss.detach(), module.router.weight.grad.clone()
    module.zero_grad()
    out = checkpoint(module, x, use_reentrant=False)
    torch.testing.assert_close(module.aux_loss.detach(), want)
    (out.sum() + az.auxiliary_loss(module)).backward()
    torch.testing.assert_close(module.aux_loss.detach(), want)
    torch.testing.assert_close(module.router.weight.grad, gradient)


@pytest.mark.parametrize("router", slow_but(1, ["query_norm", "linear"]))
def test_compiled_training_step_keeps_the_loss(router: str) -> None:
    torch._dynamo.reset()
    module = build(dim=8, num_heads=4, shared_heads=2, routed_topk=1, router=router).train()
    x, padding = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    module(x, attention_mask=padding).sum().backward(retain_graph=True)
    want = module.aux_loss.detach()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(x, attention_mask=padding)
    torch.testing.assert_close(module.aux_loss.detach(), want)
    module.zero_grad()
    (out.sum() + az.auxiliary_loss(compiled)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    module.set_topk(2)
    torch.testing.assert_close(compiled(x, attention_mask=padding), module(x, attention_mask=padding))


def test_distributed_data_parallel() -> None:
    module = build(dim=8, num_heads=4).train()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    (module(x).square().sum() + az.auxiliary_loss(module)).backward()
    want = [p.grad.clone() for p in module.parameters()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module.zero_grad(set_to_none=True)
        wrapped = nn.parallel.DistributedDataParallel(module)
        (wrapped(x).square().sum() + az.auxiliary_loss(wrapped)).backward()
    finally:
        torch.distributed.destroy_process_group()
    for gradient, parameter in zip(want, module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# --- mixed precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half-module"])
def test_gates_are_float32_under_mixed_precision(router: str, dtype: torch.dtype, autocast: bool) -> None:
    module = build(dim=16, num_heads=4, router=router, dtype=torch.float32).train()
    x = torch.randn(3, 7, 16)
    want = module(x).detach()
    module.zero_grad()
    if not autocast:
        module, x = module.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = module(x)
        gates = gates_of(module, x)
    assert gates.dtype == torch.float32
    assert module.aux_loss.dtype == torch.float32
    assert out.dtype == dtype
    off = (out.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.median() < 0.03
    (out.float().sum() + az.auxiliary_loss(module)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_query_norms_do_not_overflow_in_half_precision() -> None:
    module = build(dim=8, num_heads=4, shared_heads=2, routed_topk=1, router="query_norm", dtype=torch.float16).eval()
    with torch.no_grad():
        module.q_proj.weight.mul_(300.0)  # squares beyond 65504
    x = torch.randn(2, 5, 8).half()
    norms = (x.double() @ module.q_proj.weight.double().T).unflatten(-1, (4, 2)).norm(dim=-1)[..., 2:]
    assert norms.max() > 256
    assert torch.equal(gates_of(module, x)[..., 2:].argmax(-1), norms.argmax(-1))


# --- numbers of heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "shared", "topk"), [(1, 0, 1), (2, 1, 1), (3, 1, 1), (4, 2, 1), (6, 3, 1), (8, 4, 2), (12, 6, 3)]
)
def test_default_heads(heads: int, shared: int, topk: int) -> None:
    for router in ("linear", "query_norm"):
        module = az.create_attention("moh", 12 * heads, heads, router=router)
        assert (module.shared_heads, module.routed_topk, module.routed_heads) == (shared, topk, heads - shared)
        assert module(torch.randn(1, 2, 12 * heads)).shape == (1, 2, 12 * heads)


def test_ways_to_say_how_many_heads_are_active() -> None:
    for options, want in (
        ({"shared_heads": 2, "active_heads": 4}, (2, 2)),
        ({"shared_heads": 2, "active_heads": 6}, (2, 4)),
        ({"active_heads": 3}, (0, 3)),
        ({"routed_topk": 3}, (0, 3)),
        ({"shared_heads": 6}, (6, 0)),
        ({"shared_heads": 6, "active_heads": 6}, (6, 0)),
        ({"shared_heads": 1, "routed_topk": 5}, (1, 5)),
    ):
        module = MoHAttention(12, 6, **options)
        assert (module.shared_heads, module.routed_topk) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shared_heads": 2, "routed_topk": 0},
            r"leaves 4 routed heads: routed_topk must be from 1 to 4, got 0; the nearest is 1; to route none, share",
        ),
        ({"num_kv_heads": 2, "split_qkv": False}, r"split_qkv=False needs as many key/value heads"),
        ({"shared_heads": 2, "routed_topk": 0}, r"routed_topk must be from 1 to 4, got 0"),
        ({"shared_heads": 2, "routed_topk": 5}, r"from 1 to 4, got 5; the nearest is 4"),
        ({"shared_heads": 2, "routed_topk": -1}, r"from 1 to 4, got -1; the nearest is 1"),
        ({"shared_heads": 6, "routed_topk": 1}, r"leaves 0 routed heads: routed_topk must be 0, got 1"),
        ({"shared_heads": 0, "routed_topk": 0}, r"from 1 to 6, got 0"),
        ({"shared_heads": 7, "routed_topk": 0}, r"shared_heads=7 must be from 0 to num_heads=6; the nearest is 6"),
        ({"shared_heads": -1, "routed_topk": 2}, r"shared_heads=-1 .* the nearest is 0"),
        ({"shared_heads": 2, "active_heads": 2}, r"active_heads must be from 3 to 6, got 2; the nearest is 3"),
        ({"shared_heads": 2, "active_heads": 7}, r"active_heads must be from 3 to 6, got 7; the nearest is 6"),
        ({"active_heads": 0}, r"active_heads must be from 1 to 6, got 0"),
        ({"shared_heads": 6, "active_heads": 7}, r"active_heads must be 6, got 7"),
        ({"shared_heads": 2, "routed_topk": 1, "active_heads": 3}, r"routed_topk=1 and active_heads=3: give one"),
        ({"num_kv_heads": 4}, r"num_heads=6 .* num_kv_heads=4; the nearest that does is 3"),
        ({"num_kv_heads": 0}, r"num_kv_heads=0; the nearest that does is 1"),
        ({"router": "top2"}, r"router must be one of 'linear', 'query_norm'; got 'top2'"),
        ({"gate": "hard"}, r"router='linear' makes gates of the kind 'soft'; got gate='hard'"),
        ({"router": "query_norm", "gate": "soft"}, r"kind 'hard'; got gate='soft'"),
        ({"gate": "medium"}, r"got gate='medium'"),
        ({"router_grad": "full"}, r"router_grad must be one of 'none', 'ste'; got 'full'"),
        ({"router_grad": "ste"}, r"router_grad='ste' is for router='query_norm'"),
        ({"router": "query_norm", "router_grad": "ste", "shared_heads": 5, "routed_topk": 1}, r"at least 2 routed heads, got 1"),
        ({"head_dim": 0}, r"head_dim=0"),
    ],
    ids=str,
)
def test_heads_and_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        az.create_attention("moh", 12, 6, **options)


def test_gates_may_be_named() -> None:
    MoHAttention(12, 6, gate="soft")
    MoHAttention(12, 6, router="query_norm", gate="hard")


def test_parameter_names_and_shapes() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in MoHAttention(12, 6, **options).state_dict().items() if k.endswith("weight")}

    fused = {"qkv.weight": (36, 12), "proj.weight": (12, 12)}
    split = {f"{n}_proj.weight": (12, 12) for n in "qkvo"}
    grouped = {**split, "k_proj.weight": (4, 12), "v_proj.weight": (4, 12)}
    routers = {"router.weight": (4, 12), "shared_router.weight": (2, 12), "balance.weight": (2, 12)}
    some = {"shared_heads": 2, "routed_topk": 1}
    assert shapes(**some) == fused | routers
    assert shapes(**some, context_dim=12) == fused | routers
    assert shapes(**some, num_kv_heads=2) == grouped | routers
    assert shapes(**some, router="query_norm") == split
    assert shapes(shared_heads=1, routed_topk=5) == fused | {"router.weight": (5, 12), "balance.weight": (2, 12)}
    assert shapes(shared_heads=0, routed_topk=5) == fused | {"router.weight": (6, 12)}
    assert shapes(shared_heads=6) == fused | {"shared_router.weight": (6, 12)}
    assert shapes(**some, context_dim=5)["k_proj.weight"] == (12, 5)
    assert shapes(**some, head_dim=3)["qkv.weight"] == (54, 12)
    assert not [n for n, _ in MoHAttention(12, 6).named_parameters() if n.endswith("bias") and "router" in n]


def test_cross_attention_of_another_width_needs_its_context() -> None:
    with pytest.raises(ValueError, match="context_dim=5: give context"):
        MoHAttention(12, 6, context_dim=5)(torch.randn(1, 2, 12))


def test_set_topk() -> None:
    module = build(dim=12, num_heads=6, shared_heads=2, routed_topk=4).eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    module.set_topk(1)
    torch.testing.assert_close(module(x), formula(module, x)[0])
    assert "routed_topk=1" in repr(module)
    for wrong in (0, 5, -1):
        with pytest.raises(ValueError, match="from 1 to 4"):
            module.set_topk(wrong)
    assert module.routed_topk == 1
    all_shared = build(dim=12, num_heads=6, shared_heads=6)
    all_shared.set_topk(0)
    with pytest.raises(ValueError, match="must be 0, got 2"):
        all_shared.set_topk(2)


def test_set_routed_topk_of_a_model() -> None:
    model = nn.Sequential(*[MoHAttention(12, 6, shared_heads=s, routed_topk=6 - s) for s in (2, 6, 3)])
    set_routed_topk(model, 2)
    assert [m.routed_topk for m in model] == [2, 0, 2]
    set_routed_topk(model, (4, 1))
    assert [m.routed_topk for m in model] == [4, 0, 1]
    with pytest.raises(ValueError, match="got 4"):
        set_routed_topk(model, 4)
    with pytest.raises(ValueError, match=r"3 numbers, the model 2 layers"):
        set_routed_topk(model, [1, 1, 1])
    assert [m.routed_topk for m in model] == [4, 0, 1], "nothing is changed when one layer cannot"


# --- from softmax attention -------------------------------------------------------------------------------------------------------


class GroupedLayer(nn.Module):
    """An attention layer with the names of Hugging Face's decoders."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 3) -> None:
        super().__init__()
        self.head_dim, self.is_causal = head_dim, True
        self.q_proj = nn.Linear(12, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(12, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(12, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def sources() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    torch.manual_seed(0)
    return {
        "timm": (TimmAttention(12, 6, qkv_bias=True), {}),
        "timm-qk-norm": (TimmAttention(12, 4, qk_norm=True, norm_layer=functools.partial(nn.LayerNorm, eps=0.1)), {}),
        "mha": (az.create_attention("mha", 12, 6, head_dim=3, is_causal=True), {}),
        "mha-cross": (az.create_attention("mha", 12, 6, context_dim=5), {"context": torch.randn(2, 4, 5)}),
        "gqa": (az.create_attention("gqa", 12, 6, num_kv_heads=2, qkv_bias=True), {}),
        "hugging-face": (GroupedLayer(), {}),
    }


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("name", sources())
def test_conversion_preserves_the_function(name: str, router: str) -> None:
    source, inputs = sources()[name]
    make_generic(source)
    source.eval()
    module = MoHAttention.from_softmax_attention(source, router=router)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x, **inputs), run(source, x, **inputs), atol=1e-6, rtol=1e-5)
    assert module.routed_topk == module.routed_heads > 0
    assert module.shared_heads > 0
    assert not module.training
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in source.parameters()}
    if router == "linear":
        assert all((getattr(module, n).weight == 0).all() for n in ("router", "shared_router", "balance") if hasattr(module, n))
    module.set_topk(1)
    assert not torch.allclose(module(x, **inputs), run(source, x, **inputs), atol=1e-3)


@pytest.mark.parametrize("shared", range(7))
def test_conversion_with_any_number_of_shared_heads(shared: int) -> None:
    source = az.create_attention("mha", 12, 6).train()
    module = MoHAttention.from_softmax_attention(source, shared_heads=shared)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), source(x))
    assert module.training


def test_conversion_with_a_number_of_active_heads() -> None:
    source = az.create_attention("mha", 12, 6)
    module = MoHAttention.from_softmax_attention(source, shared_heads=2, active_heads=5)
    assert (module.shared_heads, module.routed_topk) == (2, 3)


def test_conversion_from_a_state_dict() -> None:
    source = az.create_attention("mha", 12, 6, qkv_bias=True)
    module = MoHAttention.from_softmax_attention(source.state_dict(), num_heads=6, shared_heads=1, routed_topk=2)
    assert (module.shared_heads, module.routed_topk) == (1, 2)
    module.set_topk(5)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), source(x))


@pytest.mark.parametrize("name", ["timm", "gqa", "hugging-face", "mha-cross"])
@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_heads_in_another_order(name: str, router: str) -> None:
    """The function stays, and the first head, the shared one, is the source's head_order[0]."""
    source, inputs = sources()[name]
    make_generic(source.eval())
    order = {"timm": [5, 0, 3, 1, 2, 4], "gqa": [4, 3, 5, 0, 2, 1], "hugging-face": [3, 2, 0, 1], "mha-cross": [1, 2, 0, 5, 4, 3]}[
        name
    ]
    module = MoHAttention.from_softmax_attention(source, router=router, head_order=order, shared_heads=1)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x, **inputs), run(source, x, **inputs), atol=1e-6, rtol=1e-5)

    only_first = copy.deepcopy(source)
    d, weight = module.head_dim, (only_first.proj if hasattr(source, "proj") else only_first.o_proj).weight
    alone = copy.deepcopy(module)
    with torch.no_grad():
        weight[:, torch.arange(weight.shape[1]) // d != order[0]] = 0
        (alone.proj if alone.fused else alone.o_proj).weight[:, d:] = 0
    torch.testing.assert_close(alone(x, **inputs), run(only_first, x, **inputs), atol=1e-6, rtol=1e-5)


def test_shared_heads_are_whole_groups_by_default() -> None:
    for heads, kv, shared in ((6, 6, 3), (6, 2, 3), (9, 3, 3), (4, 1, 0), (12, 3, 4)):
        source = az.create_attention("gqa", 36, heads, num_kv_heads=kv)
        module = MoHAttention.from_softmax_attention(source)
        assert module.shared_heads == shared
        x = torch.randn(1, 3, 36)
        torch.testing.assert_close(module(x), source(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head_order": [0, 1, 2, 3, 4, 4]}, r"each of the heads 0 to 5 once"),
        ({"head_order": [0, 1, 2]}, r"each of the heads 0 to 5 once"),
        ({"head_order": [0, 1, 3, 2, 4, 5]}, r"whole groups of 3 query heads"),
        ({"num_heads": 5}, r"no whole number of heads; is num_heads=5\?"),
        ({"num_heads": 0}, r"num_heads=0"),
        ({"shared_heads": 7}, r"shared_heads=7 must be"),
        ({"routed_topk": 9}, r"routed_topk must be from 1 to 3"),
        ({"qk_norm": True}, r"missing: k_norm\.bias, k_norm\.weight, q_norm\.bias, q_norm\.weight"),
        ({"proj_bias": False}, r"without a place: o_proj\.bias"),
    ],
    ids=str,
)
def test_conversions_that_cannot_be(kwargs: dict[str, Any], message: str) -> None:
    source = az.create_attention("gqa", 12, 6, num_kv_heads=2)
    with pytest.raises(ValueError, match=message):
        MoHAttention.from_softmax_attention(source, **kwargs)


def test_conversion_needs_to_know_the_heads() -> None:
    state = az.create_attention("mha", 12, 6).state_dict()
    with pytest.raises(ValueError, match="give num_heads"):
        MoHAttention.from_softmax_attention(state)
    with pytest.raises(ValueError, match="found fc1"):
        MoHAttention.from_softmax_attention({"fc1.weight": torch.zeros(2, 2)}, num_heads=2)
    with pytest.raises(ValueError, match=r"without a place: norm\.bias, norm\.weight"):
        MoHAttention.from_softmax_attention(az.create_attention("mha", 12, 6, scale_norm=True))


def test_split_projections_compute_the_same() -> None:
    """`split_qkv` is a matter of names: the fused layer's rows, spread over q_proj, k_proj and v_proj."""
    options = {"shared_heads": 1, "routed_topk": 2, "qkv_bias": True}
    fused, split = (MoHAttention(12, 4, split_qkv=s, **options) for s in (None, True))
    state = fused.state_dict()
    for kind in ("weight", "bias"):
        state.update({f"{n}_proj.{kind}": t for n, t in zip("qkv", state.pop(f"qkv.{kind}").chunk(3), strict=True)})
        state[f"o_proj.{kind}"] = state.pop(f"proj.{kind}")
    split.load_state_dict(state, strict=True)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(split(x), fused(x))


def test_one_number_of_heads_leaves_the_other_a_default() -> None:
    for shared, want in ((0, (0, 2)), (2, (2, 2)), (7, (7, 1)), (8, (8, 0))):
        module = MoHAttention(16, 8, shared_heads=shared)
        assert (module.shared_heads, module.routed_topk) == want
