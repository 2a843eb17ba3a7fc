"""Agent attention's kernels, its biases made from tables and its pooling, against their plain code."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import kernel_case as kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import DEVICE, FEW, Case
from marks import slow_but
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 8 if DEVICE == "cuda" else 1  # the interpreter is slow


def agent(
    batch: int = 2, kv_heads: int = 1, group: int = 2, queries: int = 20, keys: int = 150, number: int = 5, dim: int = 8,
    value_dim: int = 16, bias: int = 1, masked: bool = False, shared_agents: bool = False,
) -> Case:  # fmt: skip
    """`bias`: 0, none; 1, shared by the samples; 2, one for each. A mask leaves the last sample nothing."""
    heads = kv_heads * group
    tensors = {
        "q": torch.randn(batch, queries, heads, dim).transpose(1, 2),
        "k": torch.randn(batch, keys, kv_heads, dim).transpose(1, 2),
        "v": torch.randn(batch, kv_heads, keys, value_dim),
        "agents": torch.randn(1 if shared_agents else batch, heads, number, dim),
    }
    if bias:
        samples = batch if bias == 2 else 1
        tensors["key_bias"] = torch.randn(samples, heads, number, keys)
        tensors["query_bias"] = torch.randn(samples, 1 if bias == 2 else heads, number, queries).mT
    if masked:
        tensors["key_mask"] = torch.rand(batch, keys) > 0.5
        tensors["key_mask"][-1] = False
    unbatched = (("key_bias", "query_bias") if bias == 1 else ()) + (("agents",) if shared_agents else ())
    return Case(ops.agent_attention, tensors, {"scale": 0.3, "query_scale": 0.4}, unbatched=unbatched, operators=4)


def bias(
    heads: int = 2, agents: tuple[int, int] = (2, 2), square: tuple[int, int] = (3, 3), grid: tuple[int, int] = (5, 9),
    known: tuple[int, int] | None = None, prefix: int = 1, wanted: tuple[int, int] | None = None,
) -> Case:  # fmt: skip
    number = agents[0] * agents[1]
    rows, columns = known or grid
    tensors = {
        "square": torch.randn(heads, number, *square),
        "rows": torch.randn(heads, number, rows),
        "columns": torch.randn(heads, columns, number).mT,
    }
    if prefix:
        tensors["prefix"] = torch.randn(heads, number, prefix)
    return Case(ops.grid_bias, tensors, {"size": grid, "agent_grids": (agents, wanted or agents)})


def pool(batch: int = 2, grid: tuple[int, int] | None = (7, 5), bins: tuple[int, int] = (3, 2), dim: int = 20) -> Case:
    tokens = 35 if grid is None else grid[0] * grid[1]
    return Case(_pool_part, {"x": torch.randn(batch, tokens, 3 * dim)}, {"grid_size": grid, "bins": bins})


def _pool_part(x: Tensor, **settings: Any) -> Tensor:
    """Of tokens that lie among others, as the queries of a fused projection do."""
    return ops.pool_tokens(x.chunk(3, -1)[1], **settings)


MAKERS: dict[str, Callable[[], Case]] = {"agent": lambda: agent(masked=True), "bias": bias, "pool": pool}
SAMPLED = {kind: make for kind, make in MAKERS.items() if kind != "bias"}
SIDES = st.integers(1, 9 * LARGER)


@FEW
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 2), queries=st.integers(1, 80 * LARGER),
    keys=st.sampled_from([1, 7, 64, 150, 270 * LARGER]), number=st.sampled_from([1, 4, 17, 49]),
    dims=st.sampled_from([(8, 16), (16, 16), (24, 40), (40, 24)]), bias=st.integers(0, 2), masked=st.booleans(),
    shared_agents=st.booleans(),
)  # fmt: skip
def test_agent_attention(dims: tuple[int, int], **sizes: Any) -> None:
    kernels.check_against_plain_code(agent(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    agents=st.tuples(st.integers(1, 3), st.integers(1, 3)), square=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    grid=st.tuples(SIDES, SIDES), known=st.none() | st.tuples(SIDES, SIDES), prefix=st.integers(0, 2),
    wanted=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip
def test_grid_bias(**sizes: Any) -> None:
    kernels.check_against_plain_code(bias(**sizes))


@FEW
@given(
    grid=st.none() | st.tuples(SIDES, SIDES), bins=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dim=st.sampled_from([1, 20, 70]),
)  # fmt: skip
def test_pool_tokens(**sizes: Any) -> None:
    kernels.check_against_plain_code(pool(**sizes))


LARGE: dict[str, Callable[[], Case]] = {
    "many agents": lambda: agent(1, number=81, queries=70, keys=70),
    "long": lambda: agent(1, 1, 1, queries=130, keys=700),
    "bias": lambda: bias(1, grid=(33, 40)),
    "pool": lambda: pool(1, (20, 19), (3, 3), 70),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=list(LARGE))
def test_several_tiles(make: Callable[[], Case]) -> None:
    kernels.check_against_plain_code(make())


@kernels.each_check(MAKERS, empty_batch=SAMPLED)
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


def test_no_keys() -> None:
    case = agent(bias=1)
    keyless = case.of(**{name: case.tensors[name][:, :, :0] for name in ("k", "v")}, key_bias=case.tensors["key_bias"][..., :0])
    for name, found in keyless.run("triton").items():
        assert not found.any(), name


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({}, {"dropout_p": 0.5}, "dropout"),
        ({"agents": torch.randn(2, 2, 144, 8), "key_bias": None, "query_bias": None}, {}, "144 agents"),
        ({name: torch.randn(2, 2, 20, 8).double() for name in ("q", "k", "v", "agents")}, {}, "float64"),
        ({"v": torch.randn(2, 1, 150, 320)}, {}, "256"),
    ],
    ids=["dropout", "agents", "double", "wide"],
)
def test_what_the_kernel_refuses(changes: dict[str, Any], options: dict[str, Any], match: str) -> None:
    tensors: dict[str, Any] = {**agent(bias=0).tensors, **changes}
    tensors = {name: t if t is None else t.to(DEVICE) for name, t in tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        ops.agent_attention(**tensors, **options, backend="triton")
    ops.agent_attention(**tensors, **options)  # "auto" goes another way


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": torch.randn(2, 1, 149, 8)}, "must be"),
        ({"key_bias": torch.randn(1, 2, 5, 149)}, "key_bias"),
        ({"query_bias": torch.randn(3, 2, 20, 5)}, "query_bias"),
        ({"key_mask": torch.ones(2, 20, dtype=torch.bool)}, "key_mask"),
    ],
)
def test_what_does_not_fit_together(changes: dict[str, Tensor], match: str) -> None:
    tensors = {name: t.to(DEVICE) for name, t in {**agent().tensors, **changes}.items()}
    with pytest.raises(ValueError, match=match):
        ops.agent_attention(**tensors, backend="triton")


def test_who_looks_on_sees_two_calls_of_attention() -> None:
    case, seen = agent(bias=1, masked=True), {}
    for backend in ("reference", "triton"):
        with kernels.looking_on(lambda call: (call.name, call.weights(None), call.queries.shape[-2])) as seen[backend]:
            case.run(backend)
    assert [(name, queries) for name, _, queries in seen["triton"]] == [("attention", 5), ("attention", 20)]
    for (_, want, _), (_, got, _) in zip(seen["reference"], seen["triton"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


MODULES: dict[str, tuple[dict[str, Any], tuple[int, int] | None]] = {
    "own grid": ({"agent_num": 4, "window_size": (4, 5)}, (4, 5)),
    "other grids": (
        {"agent_num": 4, "window_size": (4, 5), "agent_grid": (2, 3), "num_prefix_tokens": 1, "num_kv_heads": 1},
        (5, 3),
    ),
    "sequence": ({"agent_num": 4, "window_size": None}, None),
}


@pytest.mark.parametrize(("options", "grid"), MODULES.values(), ids=list(MODULES))
def test_module(options: dict[str, Any], grid: tuple[int, int] | None) -> None:
    """The whole layer, its parameters' gradients too."""
    module = az.create_attention("agent", 32, 2, **options).to(DEVICE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    length = options.get("num_prefix_tokens", 0) + (13 if grid is None else grid[0] * grid[1])
    mask = torch.rand(2, length, device=DEVICE) > 0.2

    def layer(x: Tensor, backend: str, **parameters: Tensor) -> Tensor:
        with ops.use_backend(backend):
            arguments = {"grid_size": grid, "attention_mask": mask}
            return torch.func.functional_call(module, {n.replace("/", "."): p for n, p in parameters.items()}, (x,), arguments)

    parameters = {name.replace(".", "/"): p.detach() for name, p in module.named_parameters()}
    kernels.check_against_plain_code(Case(layer, {"x": torch.randn(2, length, 32), **parameters}))


@pytest.mark.parametrize(
    ("options", "learns"),
    slow_but(
        7,
        [
            ({"num_prefix_tokens": 1}, "everything"),
            ({"split_qkv": True}, "everything"),
            ({"qkv_bias": True, "agent_num": 9, "head_dim": 8}, "everything"),
            ({"use_dwc": False, "qkv_bias": False}, "everything"),
            ({"use_bias": False, "agent_grid": (2, 3)}, "everything"),
            ({"qkv_bias": True}, "x"),
            ({"qkv_bias": True}, "an_bias|proj.weight"),
            ({}, "everything"),
            ({}, "dwc.bias|wa_bias|qkv.weight"),
            ({"agent_num": 9, "window_size": (12, 13)}, "everything"),
            ({"num_prefix_tokens": 3, "qkv_bias": True}, "ac_bias|wa_bias|qkv.bias"),
            ({"num_prefix_tokens": 2, "use_bias": False}, "everything"),
            ({"num_prefix_tokens": 2}, "na_bias|dwc.weight"),
            ({"split_qkv": True, "qkv_bias": False, "num_prefix_tokens": 1, "use_dwc": False}, "everything"),
            ({"split_qkv": True}, "kv.weight|q.bias"),
        ],
    ),
    ids=[
        "class token",
        "split",
        "biases",
        "no convolution",
        "no tables",
        "input only",
        "some parameters",
        "paper",
        "others",
        "shares",
        "tables of prefixes",
        "prefix without tables",
        "one side's tables",
        "split with a prefix",
        "parts of a split",
    ],
)
def test_the_layer_as_one_node(options: dict[str, Any], learns: str) -> None:
    """Outputs and the gradients of what learns; nothing else gets one."""
    options = {"agent_num": 4, "window_size": (4, 5), **options}
    length = options.get("num_prefix_tokens", 0) + options["window_size"][0] * options["window_size"][1]
    layer, grid = az.create_attention("agent", 32, 2, **options).to(DEVICE), options["window_size"]
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(learns == "everything" or name in learns.split("|"))
    x = torch.randn(2, length, 32, device=DEVICE, requires_grad=learns in ("everything", "x"))
    kernels.check_one_node(layer, x, grid)


def test_what_is_not_one_node() -> None:
    layer = az.create_attention("agent", 32, 2, agent_num=4, window_size=(4, 5), num_prefix_tokens=1, attn_drop=0.1).to(DEVICE)
    layer.eval()
    x, grid, mask = torch.randn(2, 21, 32, device=DEVICE), (4, 5), None

    def is_node(module: Any = layer, **options: Any) -> bool:
        with ops.use_backend("triton"):
            arguments = {"grid_size": grid, "attention_mask": mask, **options}
            return type(module(x, **arguments).grad_fn).__name__ == "_LayerBackward"

    assert is_node()
    assert not is_node(grid_size=(5, 4))  # the tables are resampled
    assert not is_node(attention_mask=torch.ones(2, 21, device=DEVICE) > 0)
    layer.train()  # with dropout
    with pytest.raises(ops.BackendError, match="dropout"):
        is_node()
    layer.eval()
    with kernels.looking_on() as calls:
        assert not is_node()
    assert len(calls) == 2
    for part in (layer.proj, layer.dwc):
        handle = part.register_forward_hook(lambda *_: None)
        assert not is_node()
        handle.remove()
    assert is_node()
    options = {"agent_num": 4, "window_size": (4, 5), "split_qkv": True}
    split, x = az.create_attention("agent", 32, 2, **options).to(DEVICE), x[:, 1:]
    assert is_node(split)
    handle = split.kv.register_forward_hook(lambda *_: None)
    assert not is_node(split)
    x, grid = x[:, :16], (4, 4)
    assert not is_node(az.create_attention("agent", 32, 2, agent_num=4, window_size=4, split_qkv=True, sr_ratio=2).to(DEVICE))


def test_one_node_under_autocast() -> None:
    layer = az.create_attention("agent", 32, 2, agent_num=4, window_size=(4, 5), num_prefix_tokens=1, split_qkv=True).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 21, 32, device=DEVICE)
    with ops.use_backend("triton"):
        want = layer(x, grid_size=(4, 5))
        with torch.autocast(DEVICE, torch.float16):
            got = layer(x, grid_size=(4, 5))
    assert got.dtype == torch.float16
    assert type(got.grad_fn).__name__ == "_LayerBackward"
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
    found = [torch.autograd.grad(out.float().square().sum(), list(layer.parameters())) for out in (want, got)]
    for right, gradient in zip(*found, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() < 2e-2 * right.norm()
