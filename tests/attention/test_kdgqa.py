"""Key-driven and dynamic grouped-query attention: the allocation against the papers' loops, state, causality, padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grouped_reference import even, frobenius_norms, head_outputs, heads_of_kv, min_max, output, share_out
from hypothesis import given
from hypothesis import strategies as st
from parity_case import load_case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import attention_zoo as az
from attention_zoo.attention import DynamicGroupedQueryAttention, KeyDrivenGroupedQueryAttention, set_training_step
from attention_zoo.attention.kdgqa import allocate_query_heads, allocation_to_head_map, even_allocation, key_norms

BOTH = [KeyDrivenGroupedQueryAttention, DynamicGroupedQueryAttention]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weights).sum(), [*inputs, *module.parameters()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def close_gradients(module: nn.Module, got: Tensor, want: Tensor, *inputs: Tensor) -> None:
    for a, b in zip(gradients(module, got, *inputs), gradients(module, want, *inputs), strict=True):
        close(a, b.expand_as(a), 1e-9)


# --- allocation -------------------------------------------------------------------------------------------------------------------


def weights_of_every_kind(count: int, num_kv_heads: int, kind: str) -> Tensor:
    random = torch.rand(count, num_kv_heads)
    if kind == "min-max":
        low, high = random.aminmax(dim=-1, keepdim=True)
        return (random - low) / (high - low)
    if kind == "ties":
        return torch.randint(0, 4, (count, num_kv_heads)).float()
    if kind == "halves":  # shares that lie between two integers
        return torch.randint(0, 8, (count, num_kv_heads)) + 0.5
    if kind == "wide":
        return (8 * torch.randn(count, num_kv_heads)).exp()
    assert kind == "even"
    return random


@pytest.mark.parametrize("kind", ["even", "min-max", "ties", "halves", "wide"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("extra", [0, 1, 4, 17])
def test_allocation_is_that_of_the_loops(kind: str, num_kv_heads: int, extra: int) -> None:
    """6000 random cases: ties, halves, all equal, vanishing and single key/value heads included."""
    num_heads = num_kv_heads + extra
    weights = weights_of_every_kind(50, num_kv_heads, kind)
    got = allocate_query_heads(weights, num_heads)
    assert got.dtype == torch.int64
    assert got.tolist() == [share_out(row, num_heads) for row in weights]
    assert (got >= 0).all()
    assert (got.sum(-1) == num_heads).all()


@pytest.mark.parametrize(
    "weights",
    [[0.0, 0.0, 0.0], [float("nan")] * 3, [1.0, float("inf"), 0.0], [1.0, float("nan"), 2.0]],
    ids=["0", "nan", "inf", "mixed"],
)
def test_allocation_without_proportions_is_even(weights: list[float]) -> None:
    assert allocate_query_heads(torch.tensor(weights), 8).tolist() == [3, 3, 2]


@given(num_heads=st.integers(1, 24), num_kv_heads=st.integers(1, 9))
def test_random_fixup_is_an_allocation(num_heads: int, num_kv_heads: int) -> None:
    got = allocate_query_heads(torch.rand(20, num_kv_heads), num_heads, fixup="random")
    assert (got >= 0).all()
    assert (got.sum(-1) == num_heads).all()


def test_random_fixup_gives_to_any_and_takes_from_any_above_zero() -> None:
    gained = {tuple(allocate_query_heads(torch.ones(3), 10, fixup="random").tolist()) for _ in range(60)}
    assert gained == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}
    over = torch.tensor([1.5, 1.5, 0.0, 5.0])  # rounds to 2, 2, 0, 5
    lost = {tuple(allocate_query_heads(over, 8, fixup="random").tolist()) for _ in range(60)}
    assert lost == {(1, 2, 0, 5), (2, 1, 0, 5), (2, 2, 0, 4)}
    assert allocate_query_heads(over, 8).tolist() == [2, 2, 0, 4]


def test_even_allocation() -> None:
    for num_heads in range(1, 14):
        for num_kv_heads in range(1, num_heads + 1):
            assert even_allocation(num_heads, num_kv_heads).tolist() == even(num_heads, num_kv_heads)


def test_head_map() -> None:
    allocations = [[2, 0, 3], [0, 0, 5], [5, 0, 0], [1, 2, 2]]
    want = [heads_of_kv(a) for a in allocations]
    assert allocation_to_head_map(torch.tensor(allocations), 5).tolist() == want
    assert allocation_to_head_map(torch.tensor(allocations[0]), 5).tolist() == want[0]


def test_key_norms_do_not_overflow_in_half_precision() -> None:
    keys = torch.full((1, 2, 64, 16), 3000.0, dtype=torch.float16)
    close(key_norms(keys), torch.full((1, 2), 96000.0))


# --- kdgqa ------------------------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    keys=st.none() | st.integers(1, 5),
    groups=st.integers(1, 4),
    extra=st.integers(0, 3),
    head_dim=st.sampled_from([1, 3, 4]),
    scope=st.sampled_from(["batch", "sample", "frozen"]),
)
def test_kdgqa_against_loops(batch: int, tokens: int, keys: int | None, groups: int, extra: int, head_dim: int, scope: str) -> None:
    heads = groups + extra
    options: dict[str, Any] = {"head_dim": head_dim, "alloc_scope": scope, "qkv_bias": True, "dtype": torch.float64}
    module = KeyDrivenGroupedQueryAttention(7, heads, num_kv_heads=groups, **options)
    x = torch.randn(batch, tokens, 7, dtype=torch.float64, requires_grad=True)
    context = None if keys is None else torch.randn(batch, keys, 7, dtype=torch.float64, requires_grad=True)
    norms = frobenius_norms(module, x if context is None else context)
    if scope == "sample":
        allocation = [share_out(min_max(n), heads) for n in norms]
    elif scope == "batch":
        allocation = [share_out(min_max(norms.sum(0)), heads)] * batch
    else:
        allocation = [even(heads, groups)] * batch
    want = output(module, head_outputs(module, x, allocation, context))
    got = module(x, context=context)
    assert module.last_allocation is not None
    assert module.last_allocation.dtype == torch.int64
    assert module.last_allocation.tolist() == (allocation if scope == "sample" else allocation[0])
    close(got, want, 1e-10)
    close_gradients(module, got, want, *((x,) if context is None else (x, context)))


def test_the_stronger_of_two_kv_heads_gets_all_query_heads() -> None:
    module = KeyDrivenGroupedQueryAttention(24, 6, num_kv_heads=2)
    x = torch.randn(3, 5, 24)
    for strong in (0, 1):
        with torch.no_grad():
            module.k.weight.mul_(torch.tensor([10.0, 0.1] if strong == 0 else [0.01, 100.0]).repeat_interleave(4)[:, None])
        module(x).sum().backward()
        assert module.last_allocation.tolist() == ([6, 0] if strong == 0 else [0, 6])
        silent = module.v.weight.grad.view(2, 4, 24)[1 - strong]
        assert (silent == 0).all()
        module.zero_grad()


def test_allocation_ignores_scale_and_order_of_the_keys() -> None:
    module = KeyDrivenGroupedQueryAttention(32, 16, num_kv_heads=5, head_dim=2)
    x, order = torch.randn(3, 9, 32), torch.randperm(9)
    want = module(x)
    allocation = module.last_allocation
    close(module(x[:, order]), want[:, order])
    assert torch.equal(module.last_allocation, allocation)
    module(torch.cat([x, x]))
    assert torch.equal(module.last_allocation, allocation)  # norms of a doubled batch are doubled
    with torch.no_grad():
        module.k.weight.mul_(7.0)
    module(x)
    assert torch.equal(module.last_allocation, allocation)


def test_sample_scope_is_batch_scope_for_one_sample() -> None:
    batch = KeyDrivenGroupedQueryAttention(32, 8, num_kv_heads=4)
    sample = KeyDrivenGroupedQueryAttention(32, 8, num_kv_heads=4, alloc_scope="sample")
    sample.load_state_dict(batch.state_dict())
    x = torch.randn(4, 9, 32)
    close(sample(x), torch.cat([batch(x[i : i + 1]) for i in range(4)]))
    assert sample.last_allocation.shape == (4, 4)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_vanishing_keys_give_the_even_allocation(scope: str) -> None:
    module = KeyDrivenGroupedQueryAttention(16, 8, num_kv_heads=3, alloc_scope=scope)
    nn.init.zeros_(module.k.weight)
    out = module(torch.randn(2, 5, 16))
    assert out.isfinite().all()
    assert module.last_allocation.tolist() == ([3, 3, 2] if scope == "batch" else [[3, 3, 2]] * 2)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_padded_keys_do_not_count(scope: str) -> None:
    module = KeyDrivenGroupedQueryAttention(12, 9, num_kv_heads=4, head_dim=2, alloc_scope=scope)
    x = torch.randn(2, 6, 12)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]])
    x[~real.bool()] = 50.0
    norms = frobenius_norms(module, x, real)
    allocation = [share_out(min_max(n), 9) for n in (norms if scope == "sample" else norms.sum(0).expand(2, -1))]
    want = output(module, head_outputs(module, x, allocation, allowed=real.bool()[:, None].expand(-1, 6, -1)))
    close(module(x, attention_mask=real), want)
    assert module.last_allocation.tolist() == (allocation if scope == "sample" else allocation[0])
    pairs = real.bool()[:, None, None].expand(-1, 1, 6, -1)
    for mask in (pairs[:, :, :1], pairs, torch.zeros(2, 1, 6, 6).masked_fill(~pairs, torch.finfo(torch.float32).min)):
        close(module(x, attention_mask=mask), want)  # 4-D masks that hide them from every query, as Hugging Face's, say the same
        assert module.last_allocation.tolist() == (allocation if scope == "sample" else allocation[0])
    with pytest.raises(ValueError, match="B = 2"):
        module(x, attention_mask=torch.ones(3, 6, dtype=torch.bool))


def test_freeze_allocation() -> None:
    module = KeyDrivenGroupedQueryAttention(32, 8, num_kv_heads=4)
    with pytest.raises(ValueError, match="run a forward first"):
        module.freeze_allocation()
    prompt = torch.randn(1, 9, 32)
    want = module(prompt)
    found = module.last_allocation.clone()
    module.freeze_allocation()
    assert torch.equal(module.allocation, found)
    close(module(prompt), want, 0)
    module(10 * torch.randn(2, 3, 32))
    assert torch.equal(module.last_allocation, found)

    frozen = KeyDrivenGroupedQueryAttention(32, 8, num_kv_heads=4, alloc_scope="frozen", is_causal=True).eval()
    frozen.load_state_dict(module.state_dict())
    frozen.layer_idx, cache = 0, DynamicCache()
    full = frozen(prompt)
    decoded = [frozen(part, past_key_values=cache) for part in prompt.split([5, 1, 3], dim=1)]
    close(torch.cat(decoded, 1), full)
    assert torch.equal(frozen.last_allocation, found)
    assert cache.layers[0].keys.shape == (1, 4, 9, 4)

    sample = KeyDrivenGroupedQueryAttention(32, 8, num_kv_heads=4, alloc_scope="sample")
    sample(torch.randn(2, 3, 32))
    with pytest.raises(ValueError, match="each of 2 samples"):
        sample.freeze_allocation()
    sample(torch.randn(1, 3, 32))
    sample.freeze_allocation()
    assert sample.allocation.shape == (4,)


# --- dgqa -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diff_train_then_eval_w3", "ema_train_w2"])
@pytest.mark.parametrize("published", ["argument", "set_training_step", "own counter"])
def test_dgqa_sequences(name: str, published: str) -> None:
    """Official calls in order; output, cache and allocation after each. The steps count from 0, so our own counter knows them."""
    case = load_case(f"dgqa/{name}")
    module, stored = case.build(), case.group("output")
    for i, call in enumerate(case.forward_kwargs["calls"]):
        module.train(call["mode"] == "train")
        if published == "set_training_step":
            set_training_step(module, call["training_step"])
        step = {"training_step": call["training_step"]} if published == "argument" else {}
        out = module(case.tensors[call["input"]], **step)
        torch.testing.assert_close(out, stored[f"tokens_{i}"], atol=case.tolerance, rtol=0)
        torch.testing.assert_close(module.cache, stored[f"cache_{i}"], atol=case.tolerance, rtol=0)
        assert module.last_allocation.tolist() == module.allocation.tolist() == stored[f"allocation_{i}"].tolist()


class LoopedDynamics:
    """The state of `dgqa` as the paper's code keeps it."""

    def __init__(self, num_heads: int, num_kv_heads: int, kind: str, window_size: int, beta: float) -> None:
        self.num_heads, self.kind, self.window_size, self.beta = num_heads, kind, window_size, beta
        self.cache, self.allocation = torch.zeros(num_kv_heads), even(num_heads, num_kv_heads)

    def see(self, norms: Tensor, step: int | None) -> None:
        """`step` is None in eval."""
        if step is not None and step % self.window_size:
            return
        evolution = (self.cache - norms).abs() if self.kind == "diff" else self.beta * norms + (1 - self.beta) * self.cache
        self.allocation = share_out(evolution, self.num_heads)
        self.cache = norms if step is None else (self.cache + norms) / self.window_size


@given(
    kind=st.sampled_from(["diff", "ema"]),
    window_size=st.integers(1, 3),
    beta=st.sampled_from([0.9, 0.5, 0.0, 1.0]),
    groups=st.integers(1, 4),
    extra=st.integers(0, 5),
    modes=st.lists(st.sampled_from(["train", "train", "eval"]), min_size=1, max_size=8),
)
def test_dgqa_against_loops(kind: str, window_size: int, beta: float, groups: int, extra: int, modes: list[str]) -> None:
    heads = groups + extra
    options: dict[str, Any] = {"kind": kind, "window_size": window_size, "beta": beta, "head_dim": 3, "dtype": torch.float64}
    module = DynamicGroupedQueryAttention(5, heads, num_kv_heads=groups, **options)
    looped, step = LoopedDynamics(heads, groups, kind, window_size, beta), 0
    for mode in modes:
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        looped.see(frobenius_norms(module, x).sum(0), step if mode == "train" else None)
        step += mode == "train"
        got = module.train(mode == "train")(x)
        close(module.cache, looped.cache)
        assert module.last_allocation.tolist() == module.allocation.tolist() == looped.allocation
        want = output(module, head_outputs(module, x, [looped.allocation] * 2))
        close(got, want, 1e-10)
        close_gradients(module, got, want, x)


def test_stored_allocation_in_eval() -> None:
    module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=4, eval_update=False)
    module.train()(torch.randn(2, 5, 24))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.eval()(5 * torch.randn(2, 5, 24), training_step=0)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert torch.equal(module.last_allocation, before["allocation"])
    assert int(module.step) == 1


def test_the_same_batch_twice_gives_the_even_allocation() -> None:
    module = DynamicGroupedQueryAttention(24, 8, num_kv_heads=3).eval()
    x = torch.randn(2, 5, 24)
    module(x)
    out = module(x)  # |cache - n| is 0
    assert out.isfinite().all()
    assert module.last_allocation.tolist() == [3, 3, 2]


def test_a_training_step_is_for_one_call() -> None:
    module = DynamicGroupedQueryAttention(24, 6, window_size=4).train()
    x = torch.randn(2, 5, 24)
    module(x, training_step=3)
    assert (module.cache == 0).all()
    module(x)  # the counter's second step
    assert (module.cache == 0).all()
    module(x, training_step=8)
    assert (module.cache > 0).all()
    assert int(module.step) == 3
    module.eval()(x)
    assert int(module.step) == 3
    assert "step" not in module.state_dict()


def test_set_training_step() -> None:
    layers = [DynamicGroupedQueryAttention(8, 2, window_size=5), nn.Linear(8, 8), DynamicGroupedQueryAttention(8, 2, window_size=5)]
    model = nn.Sequential(*layers).train()
    set_training_step(model, 4)
    for expected in ([0.0, 0.0], None):  # step 4 changes nothing, step 5 does
        model(torch.randn(1, 3, 8))
        for layer in (layers[0], layers[2]):
            assert (layer.cache.tolist() == [0.0]) == (expected is not None)
    set_training_step(nn.Linear(2, 2), 3)  # a recipe may call it for any model
    with pytest.raises(ValueError, match="-1"):
        set_training_step(model, -1)


def test_random_fixup_reaches_the_module() -> None:
    module = DynamicGroupedQueryAttention(24, 10, head_dim=2, num_kv_heads=3, fixup="random").eval()
    nn.init.zeros_(module.q.weight)
    with torch.no_grad():
        module.k.weight.copy_(module.k.weight[:2].repeat(3, 1))  # equal norms: thirds of 10 heads, one is left over
    seen = set()
    for _ in range(40):
        module.cache.zero_()
        module(torch.ones(1, 2, 24))
        seen.add(tuple(module.last_allocation.tolist()))
    assert seen == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}


def test_gradient_checkpointing_does_not_update_twice() -> None:
    x = torch.randn(2, 5, 24, requires_grad=True)
    for reentrant in (False, True):
        module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=3, window_size=2).train()
        other = copy.deepcopy(module)
        for _ in range(3):
            (want,) = torch.autograd.grad(module(x).square().sum(), x)
            got = checkpoint(other, x, use_reentrant=reentrant)
            x.grad = None
            got.square().sum().backward()
            close(x.grad, want, 1e-6)
            assert torch.equal(other.cache, module.cache)
            assert torch.equal(other.allocation, module.allocation)
            assert int(other.step) == int(module.step)


def test_the_cache_stays_float32() -> None:
    module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=3).train()
    module(torch.randn(2, 5, 24))
    cache = module.cache.clone()
    for half in (module.half(), module.to(torch.bfloat16), DynamicGroupedQueryAttention(24, 6, dtype=torch.bfloat16)):
        assert half.cache.dtype == torch.float32
    assert torch.equal(module.cache, cache)  # not rounded on the way
    assert module.allocation.dtype == torch.int64
    assert module.to("meta").cache.dtype == torch.float32


def test_between_updates_it_is_gqa_with_the_stored_allocation() -> None:
    module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=3, window_size=10).train()
    gqa = az.create_attention("gqa", 24, 6, num_kv_heads=3)
    gqa.load_state_dict({k: v for k, v in module.state_dict().items() if k in gqa.state_dict()})
    x = torch.randn(2, 5, 24)
    close(module(x, training_step=3), gqa(x))  # even at first


# --- both -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
def test_sizes(cls: type) -> None:
    assert [cls(4 * h, h).num_kv_heads for h in (1, 2, 3, 5, 12)] == [1, 1, 1, 2, 6]
    for wrong, nearest in ((0, 1), (-2, 1), (7, 6)):
        with pytest.raises(ValueError, match=rf"from 1 to num_heads=6, got {wrong}; the nearest is {nearest}"):
            cls(24, 6, num_kv_heads=wrong)
    assert cls(24, 6, num_kv_heads=4)(torch.randn(1, 3, 24)).shape == (1, 3, 24)


@pytest.mark.parametrize(
    ("cls", "option", "message"),
    [
        (KeyDrivenGroupedQueryAttention, {"alloc_scope": "token"}, r"alloc_scope.*'batch', 'sample', 'frozen'.*'token'"),
        (KeyDrivenGroupedQueryAttention, {"is_causal": True}, r"'batch'.*alloc_scope='frozen'"),
        (KeyDrivenGroupedQueryAttention, {"is_causal": True, "alloc_scope": "sample"}, r"'sample'.*alloc_scope='frozen'"),
        (DynamicGroupedQueryAttention, {"kind": "mean"}, r"kind.*'diff', 'ema'.*'mean'"),
        (DynamicGroupedQueryAttention, {"fixup": "none"}, r"fixup.*'deterministic', 'random'.*'none'"),
        (DynamicGroupedQueryAttention, {"window_size": 0}, r"window_size.*at least 1.*0"),
        (DynamicGroupedQueryAttention, {"beta": 1.5}, r"beta.*1\.5"),
        (DynamicGroupedQueryAttention, {"is_causal": True}, r"is_causal=True needs eval_update=False"),
    ],
)
def test_wrong_options(cls: type, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(24, 6, **option)


@pytest.mark.parametrize(("cls", "needed"), [(BOTH[0], "alloc_scope='frozen'"), (BOTH[1], "eval_update=False")])
def test_a_cache_needs_a_frozen_allocation(cls: type, needed: str) -> None:
    module = cls(24, 6).eval()
    module.layer_idx = 0
    with pytest.raises(ValueError, match=needed):
        module(torch.randn(1, 3, 24), past_key_values=DynamicCache())


def test_dgqa_with_a_cache_uses_the_stored_allocation_in_training() -> None:
    module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=3, is_causal=True, eval_update=False).train()
    module.layer_idx = 0
    module.allocation.copy_(torch.tensor([1, 4, 1]))
    x, cache = torch.randn(1, 6, 24), DynamicCache()
    decoded = [module(part, past_key_values=cache) for part in x.split([4, 2], dim=1)]
    assert (module.cache == 0).all()
    close(torch.cat(decoded, 1), module.eval()(x))


@pytest.mark.parametrize(
    ("cls", "options"), [(BOTH[0], {"alloc_scope": "frozen"}), (BOTH[1], {"eval_update": False})], ids=["kdgqa", "dgqa"]
)
def test_causal_with_an_uneven_allocation_against_loops(cls: type, options: dict[str, Any]) -> None:
    module = cls(12, 6, num_kv_heads=3, is_causal=True, **options).eval()
    module.allocation.copy_(torch.tensor([4, 0, 2]))
    x = torch.randn(2, 5, 12)
    want = output(module, head_outputs(module, x, [[4, 0, 2]] * 2, allowed=torch.ones(2, 5, 5).tril().bool()))
    close(module(x), want)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_value_is_read_from_the_device(cls: type, mode: str) -> None:
    """On the meta device there are no values: reading one, as `.item()` does, raises."""
    module = cls(24, 6, num_kv_heads=4, device="meta").train(mode == "train")
    x = torch.empty(2, 5, 24, device="meta")
    assert module(x, attention_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")).shape == x.shape
    assert module.last_allocation.device.type == "meta"


def test_training_compiles_once() -> None:
    """Steps that update and steps that do not share one graph."""
    torch._dynamo.reset()
    module = DynamicGroupedQueryAttention(24, 6, num_kv_heads=3, window_size=3).train()
    eager, counter = copy.deepcopy(module), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for _ in range(7):
        x = torch.randn(2, 5, 24)
        close(compiled(x), eager(x))
        close(module.cache, eager.cache)
        assert torch.equal(module.last_allocation, eager.last_allocation)
    assert counter.frame_count == 1


@pytest.mark.parametrize("cls", BOTH)
def test_conversion_starts_from_the_even_allocation(cls: type) -> None:
    source = az.create_attention("mha", 24, 6, qkv_bias=True)
    options: dict[str, Any] = {"alloc_scope": "frozen"} if cls is KeyDrivenGroupedQueryAttention else {"eval_update": False}
    module = cls.from_softmax_attention(source.eval(), num_kv_heads=6, **options)
    x = torch.randn(2, 5, 24)
    close(module(x), source(x))
    assert module.allocation.tolist() == [1] * 6
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        cls.from_softmax_attention(source, num_kv_heads=4)
