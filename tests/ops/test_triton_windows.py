"""The kernels of windows that tile a map, and HiLo's on one fused projection, against their plain code."""

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
from torch import Tensor

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.attention.window import WindowAttention, from_windows, shift_mask, to_windows
from attention_zoo.ops.hilo import hilo_attention, with_window_means
from attention_zoo.ops.windows import takes_windows

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGER = 6 if DEVICE == "cuda" else 1  # the interpreter is slow
SIDES = st.integers(1, 7 * LARGER)


def windows(
    batch: int = 2, heads: int = 2, height: int = 5, width: int = 4, side: int = 2, dim: int = 8, value_dim: int = 16,
    bias: int = 1, masked: bool = True,
) -> Case:  # fmt: skip
    """`bias`: for how many different windows; the windows of one map where that is 2."""
    cells = side * side
    tensors = {
        "q": torch.randn(batch, height, width, heads, dim).permute(0, 3, 1, 2, 4),
        "k": torch.randn(batch, height, width, heads, dim).permute(0, 3, 1, 2, 4),
        "v": torch.randn(batch, heads, height, width, value_dim),
    }
    if bias:
        number = -(-height // side) * -(-width // side)
        tensors["bias"] = torch.randn(*((number,) if bias == 2 else ()), heads, cells, cells)
    settings = {"window_size": side, "scale": 0.3, "mask_padding": masked}
    return Case(ops.window_attention, tensors, settings, unbatched=("bias",))


def hilo(
    batch: int = 2, heads: tuple[int, int] = (1, 2), height: int = 5, width: int = 4, side: int = 2, keys: int = 7, dim: int = 8,
    masked: bool = False,
) -> Case:  # fmt: skip
    tensors = {
        "qkv": torch.randn(batch, height * width, (3 * heads[0] + heads[1]) * dim),
        "kv": torch.randn(batch, keys, 2 * heads[1] * dim),
    }
    places = {"grid_size": (height, width), "window_size": side, "heads": heads}
    return Case(hilo_attention, tensors, {**places, "scale": 0.3, "mask_padding": masked})


def means(batch: int = 2, height: int = 5, width: int = 7, side: int = 2, channels: int = 20, masked: bool = True) -> Case:
    return Case(_means_of, {"x": torch.randn(batch, height, width, channels)}, {"window_size": side, "mask_padding": masked})


def _means_of(x: Tensor, *, window_size: int, **options: Any) -> Tensor:
    """With the map itself, whose gradient comes back with theirs."""
    same, means = with_window_means(x, window_size, **options)
    return torch.cat([0.5 * same.flatten(1, 2), means], 1)


def short(batch: int = 3, heads: int = 2, length: int = 7, dim: int = 8, value_dim: int = 16, scale: float = 0.3) -> Case:
    """Plain attention within few tokens, which the engine of our kernels serves as maps of one window each."""
    tensors = {
        "q": torch.randn(batch, length, heads, dim).transpose(1, 2),
        "k": torch.randn(batch, heads, length, dim),
        "v": torch.randn(batch, length, heads, value_dim).transpose(1, 2),
    }
    return Case(ops.attention, tensors, {"scale": scale})


MAKERS: dict[str, Callable[[], Case]] = {"windows": windows, "hilo": hilo, "means": means, "short": short}


@FEW
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), height=SIDES, width=SIDES, side=st.sampled_from([1, 2, 3, 4, 7]),
    dims=st.sampled_from([(8, 16), (16, 16), (24, 40), (40, 24)]), bias=st.integers(0, 2), masked=st.booleans(),
)  # fmt: skip
def test_window_attention(dims: tuple[int, int], **sizes: Any) -> None:
    kernels.check_against_plain_code(windows(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    batch=st.integers(1, 2 * LARGER), heads=st.integers(1, 3), length=st.integers(2, 128),
    dims=st.sampled_from([(8, 16), (16, 16), (20, 32), (32, 24)]),
)  # fmt: skip
def test_attention_of_short_sequences(dims: tuple[int, int], **sizes: Any) -> None:
    kernels.check_against_plain_code(short(dim=dims[0], value_dim=dims[1], **sizes))


@FEW
@given(
    batch=st.integers(1, 2), heads=st.tuples(st.integers(1, 2), st.integers(1, 2)), height=SIDES, width=SIDES,
    side=st.integers(1, 3), keys=st.sampled_from([1, 16, 60, 70, 150]), dim=st.sampled_from([8, 16, 24, 40]), masked=st.booleans(),
)  # fmt: skip
def test_hilo_attention(**sizes: Any) -> None:
    kernels.check_against_plain_code(hilo(**sizes))


@FEW
@given(
    batch=st.integers(1, 2), height=SIDES, width=SIDES, side=st.integers(1, 4), channels=st.sampled_from([1, 20, 150]),
    masked=st.booleans(),
)  # fmt: skip
def test_window_means(**sizes: Any) -> None:
    kernels.check_against_plain_code(means(**sizes))


LARGE: dict[str, Callable[[], Case]] = {
    "several windows in a tile": lambda: windows(1, 1, 18, 10, side=3, bias=1),
    "biases summed over tiles": lambda: windows(3, 1, 16, 8, side=4, bias=2, masked=False),
    "a share of the queries": lambda: hilo(1, (1, 1), 14, 10, keys=20),
    "many keys": lambda: hilo(1, (1, 1), 12, 12, keys=150, dim=40),
    "several sequences in a tile": lambda: short(17, 1, 5),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=list(LARGE))
def test_several_tiles(make: Callable[[], Case]) -> None:
    kernels.check_against_plain_code(make())


# Empty calls of plain attention go to the reference, and nowhere else.
@kernels.each_check(MAKERS, empty_batch={name: make for name, make in MAKERS.items() if name != "short"})
def test_checks(check: Callable[[Case], None], make: Callable[[], Case]) -> None:
    check(make())


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({}, {"dropout_p": 0.5}, "dropout"),
        ({"height": 9, "side": 9}, {}, "81"),
        ({"height": 8, "side": 8, "value_dim": 160}, {}, "bytes"),
        ({"value_dim": 320}, {}, "256"),
        ({"double": True}, {}, "float64"),
    ],
    ids=["dropout", "large", "long", "wide", "double"],
)
def test_what_the_kernel_of_windows_refuses(changes: dict[str, Any], options: dict[str, Any], match: str) -> None:
    dtype = torch.float64 if changes.pop("double", False) else torch.float32
    case = windows(1, 1, **changes)
    tensors = {name: t.to(DEVICE, dtype) for name, t in case.tensors.items()}
    with pytest.raises(ops.BackendError, match=match):
        ops.window_attention(**tensors, **case.settings, **options, backend="triton")
    ops.window_attention(**tensors, **case.settings, **options)  # "auto" goes another way


@pytest.mark.parametrize(
    ("length", "changes", "match"),
    [
        (129, {}, "128 tokens"),
        (7, {"is_causal": True}, "causality"),
        (7, {"window_size": 3}, "window"),
        (7, {"bias": torch.zeros(7, 7)}, "bias"),
        (7, {"k": torch.randn(3, 1, 7, 8), "v": torch.randn(3, 1, 7, 16)}, "shared heads"),
        (7, {"v": torch.randn(3, 2, 7, 130)}, "128 channels"),
        (7, {"k": torch.randn(3, 2, 6, 8), "v": torch.randn(3, 2, 6, 16)}, "128 tokens"),
        (65, {"v": torch.randn(3, 2, 65, 40)}, "32 channels"),
    ],
    ids=["length", "causal", "window", "bias", "shared heads", "channels", "other keys", "channels of more"],
)
def test_which_short_sequences_the_engine_refuses(length: int, changes: dict[str, Any], match: str) -> None:
    case = short(length=length)
    call = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in {**case.tensors, **changes}.items()}
    with pytest.raises(ops.BackendError, match=match):
        ops.attention(**call, backend="triton")


def test_layouts_of_short_sequences() -> None:
    """Channels that do not lie side by side, heads that are one, values that all tokens share; what comes out has heads next to
    channels, as projections read them."""
    q = torch.randn(2, 3, 8, 7, device=DEVICE).transpose(2, 3).requires_grad_()
    k = torch.randn(2, 1, 7, 8, device=DEVICE).expand(-1, 3, -1, -1).requires_grad_()
    v = torch.randn(1, 3, 1, 16, device=DEVICE).expand(2, -1, 7, -1).requires_grad_()
    weights = torch.randn(2, 3, 16, 7, device=DEVICE).transpose(2, 3)
    found = []
    for backend in ("triton", "reference"):
        out = ops.attention(q, k, v, backend=backend)
        found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert found[0][0].transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [3, 70_000])
def test_short_sequences_beyond_a_grid(batch: int) -> None:
    case = short(batch, 1, 4)
    kernels.check_against_plain_code(case)


def test_what_the_kernels_of_hilo_refuse() -> None:
    for case, match in ((hilo(dim=160), "160"), (hilo(32_768, (1, 2), 1, 1, dim=1, keys=1), "65536")):
        with pytest.raises(ops.BackendError, match=match):
            case.run("triton")
        case.run("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_layers_take_the_kernels_by_themselves(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 8, device=DEVICE, dtype=dtype)
    with ops.use_backend("triton"):
        assert takes_windows(x, 2, 32)
        with pytest.raises(ops.BackendError, match="dropout"):
            takes_windows(x, 2, 32, 0.1)
        with pytest.raises(ops.BackendError, match="too wide"):
            takes_windows(x, 2, 32, missing="too wide")
    on_cuda = DEVICE == "cuda"
    assert takes_windows(x, 2, 32) == (on_cuda and dtype == torch.bfloat16)
    assert not takes_windows(x, 12, 32)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert takes_windows(x, 2, 32) == on_cuda


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": torch.randn(2, 2, 5, 3, 8)}, "laid out"),
        ({"bias": torch.randn(2, 4, 3)}, "bias"),
        ({"bias": torch.randn(5, 2, 4, 4)}, "divisor of the 12 windows"),
    ],
)
def test_windows_that_do_not_fit_together(changes: dict[str, Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        windows().of(**changes).run("reference")
    case = windows()
    case.settings["window_size"] = 0
    with pytest.raises(ValueError, match="window_size"):
        case.run("reference")


@pytest.mark.parametrize("changes", [{"grid_size": (4, 4)}, {"heads": (0, 3)}, {"heads": (1, 3)}])
def test_projections_that_do_not_fit_together(changes: dict[str, Any]) -> None:
    case = hilo()
    case.settings |= changes
    with pytest.raises(ValueError, match="qkv is"):
        case.run("reference")


def test_windows_of_one_token_give_its_value() -> None:
    case = windows(side=1, bias=0)
    out = ops.window_attention(**case.tensors, **case.settings)
    torch.testing.assert_close(out, case.tensors["v"])


def test_padding_of_zeros_takes_weight() -> None:
    q = torch.zeros(1, 1, 1, 1, 2)
    v = torch.ones(1, 1, 1, 1, 2)
    for masked, share in ((False, 0.25), (True, 1.0)):
        torch.testing.assert_close(ops.window_attention(q, q, v, window_size=2, mask_padding=masked), share * v)


def test_dropout_thins_the_weights() -> None:
    case = windows(1, 1, 8, 8, side=4, bias=0)
    case.tensors["v"] = torch.ones_like(case.tensors["v"])
    out = ops.window_attention(**case.tensors, **case.settings, dropout_p=0.5)
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.2


def test_who_looks_on_sees_the_probabilities() -> None:
    case = windows(bias=2)
    with kernels.looking_on(lambda call: (call.name, call.weights(None))) as seen:
        out = ops.window_attention(**case.tensors, **case.settings)
    ((name, weights),) = seen
    assert name == "window_attention"
    assert weights.shape == (2, 2, 6, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6, 4))
    first = (weights[:, :, 0] @ case.tensors["v"][:, :, :2, :2].flatten(2, 3)).unflatten(2, (2, 2))
    torch.testing.assert_close(out[:, :, :2, :2], first)


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_a_swin(shift: int) -> None:
    """As maps of one window each, with the biases of a shift."""
    grid, window = (4, 6), 2
    module = WindowAttention(16, 2, window_size=window).to(DEVICE)
    x = torch.randn(2, 24, 16, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            inside = to_windows(x, grid, window, shift)
            out = from_windows(module(inside, shift_mask(inside, grid, window, shift)), grid, window, shift)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({}, "everything"),
        ({"qkv_bias": True, "output_proj": "full"}, "everything"),
        ({"window_size": 3, "pad_mode": "mask"}, "everything"),
        ({"qkv_bias": True}, "x"),
        ({"qkv_bias": True}, "l_kv|h_proj"),
        ({"output_proj": "full"}, "h_qkv"),
    ],
    ids=["paper", "biases", "padded", "input only", "some weights", "one weight"],
)
def test_the_layer_as_one_node(options: dict[str, Any], learns: str) -> None:
    """Outputs and the gradients of what learns; nothing else gets one."""
    layer = az.create_attention("hilo", 24, 3, alpha=0.7, **options, device=DEVICE)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(learns == "everything" or name.partition(".")[0] in learns.split("|"))
    x = torch.randn(2, 4 * 5, 24, device=DEVICE, requires_grad=learns in ("everything", "x"))
    if options.get("window_size") is None:
        x = x.detach()[:, :16].requires_grad_(x.requires_grad)
    size = (4, 5) if x.shape[1] == 20 else (4, 4)
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    results = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            out = layer(x, grid_size=size)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert type(out.grad_fn).__name__ == "_LayerBackward"
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


PAPERS: dict[str, Callable[[], Case]] = {
    "14x14": lambda: hilo(4, (2, 10), 14, 14, keys=49, dim=64),
    "28x28": lambda: hilo(2, (2, 10), 28, 28, keys=196, dim=32),
    "56x56": lambda: hilo(1, (1, 2), 56, 56, keys=784, dim=32),
    "odd": lambda: hilo(2, (1, 3), 13, 15, side=3, keys=200, dim=40, masked=True),
    "wide": lambda: hilo(1, (1, 1), 21, 21, side=4, keys=25, dim=256),
    "many queries": lambda: hilo(1, (1, 1), 60, 60, keys=17, dim=128),
    "swin": lambda: windows(2, 3, 28, 28, side=7, dim=32, value_dim=32, bias=2),
    "large windows": lambda: windows(1, 2, 24, 32, side=8, dim=80, value_dim=80),
    "means": lambda: means(4, 14, 14, channels=768),
    "windows of a swin": lambda: short(64, 4, 49, 32, 32),
    "64 tokens": lambda: short(8, 2, 64, 128, 128),
    "few tokens, wide": lambda: short(9, 2, 33, 256, 256),
    "100 tokens": lambda: short(5, 3, 100, 64, 64),
    "128 tokens": lambda: short(3, 2, 128, 128, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("make", PAPERS.values(), ids=list(PAPERS))
def test_sizes_of_papers(make: Callable[[], Case]) -> None:
    """In half precision, where the tensor cores multiply, and the same every time."""
    case = make()
    kernels.check_half_precision(case)
    runs = [case.run("triton", torch.bfloat16) for _ in range(4)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "compiled"),
    [({"alpha": 0.9}, False), ({"alpha": 0.9}, True), ({"qkv_bias": True, "window_size": 3}, False)],
    ids=["paper", "paper, compiled", "padded"],
)
def test_layers_on_cuda(options: dict[str, Any], compiled: bool) -> None:
    """A whole layer in bfloat16, by itself and under autocast, against the plain code in float32."""
    layer = az.create_attention("hilo", 384, 12, device="cuda", **options)
    x = torch.randn(2, 196, 384, device="cuda", requires_grad=True)

    def run(function: Any, x: Tensor) -> tuple[Tensor, ...]:
        out = function(x, grid_size=(14, 14))
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])

    with ops.use_backend("torch"):
        exact = run(layer, x)
    with torch.autocast("cuda", torch.bfloat16):
        cast = run(layer, x)
    layer.bfloat16()
    torch._dynamo.reset()
    half = run(torch.compile(layer, fullgraph=True) if compiled else layer, x.detach().bfloat16().requires_grad_())
    for found in (cast, half):
        for got, want in zip(found, exact, strict=True):
            assert (got.float() - want).norm() < 0.05 * want.norm()
