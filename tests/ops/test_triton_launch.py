"""Settled launches: compiled kernels get addresses and numbers in their own order, and whatever they were not compiled for does not
reach them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from attention_zoo.ops.triton import _launch
from attention_zoo.ops.triton._launch import Launch, Place, Tiled, VaryingLaunch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _scale_kernel(X, Y, factor, N, ADD: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    x = tl.load(X + n, mask=n < N, other=0.0) * factor
    if ADD:
        x += tl.load(Y + n, mask=n < N, other=0.0)
    tl.store(Y + n, x, mask=n < N)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_parts_of_tensors_without_views(offset: int) -> None:
    """Also of tensors that begin elsewhere than those of the first call."""
    launch = Launch(_scale_kernel, (2,), (Place(0, offset), Place(1)), (2.0, 20), {"ADD": True, "BN": 16, "num_warps": 1})
    x, y = torch.randn(64, device=DEVICE), torch.zeros(40, device=DEVICE)
    for start in (0, 1, 8, 4, 0):
        launch(x[start:], y[start:])
        want = torch.zeros(40, device=DEVICE)
        want[start : start + 20] = 2 * x[start + offset : start + offset + 20]
        torch.testing.assert_close(y, want)
        y.zero_()
    assert (launch._run is not None) == (DEVICE == "cuda")


class _Compiled:
    """What Triton returns from a launch on a GPU."""

    metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, stream: self.calls.append((grid, *args, stream))


class _Kernel:
    """A kernel that was compiled: it notes what reaches Triton, and what the compiled one."""

    arg_names = ("X", "Y", "Z", "scale", "N", "ADD", "BN")

    def __init__(self) -> None:
        self.compiled = _Compiled()
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> _Compiled:
            self.calls.append((grid, *args, constants))
            return self.compiled

        return launch


def test_compiled_kernels_get_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "CompiledKernel", _Compiled)
    monkeypatch.setattr(_launch, "_current_stream", lambda: 77)
    kernel, constants = _Kernel(), {"num_warps": 4, "BN": 32, "ADD": True}
    launch = Launch(kernel, (5, 6), (Place(1), Place(0, 7, (3, 1)), Place(0)), (0.5, 9), constants)
    x, y = torch.zeros(32), torch.zeros(32, dtype=torch.float16)
    assert not (x.data_ptr() | y.data_ptr()) % 16
    launch(x[1:], y)  # a start that Triton has to look at
    assert launch._run is None
    launch(x, y)
    assert [(call[0], *call[4:]) for call in kernel.calls] == [((5, 6), 0.5, 9, constants)] * 2
    assert [t.data_ptr() for t in kernel.calls[1][1:4]] == [y.data_ptr(), x.data_ptr() + 28, x.data_ptr()]
    assert not kernel.compiled.calls
    launch(x[4:], y[8:])
    starts = y.data_ptr() + 16, x.data_ptr() + 16 + 28, x.data_ptr() + 16
    assert kernel.compiled.calls == [((5, 6, 1), *starts, 0.5, 9, True, 32, 77)]
    launch(x, y[1:])
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (3, 1)


def test_compiled_kernels_get_other_grids_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with tensors or numbers that they were not compiled for."""
    monkeypatch.setattr(_launch, "CompiledKernel", _Compiled)
    monkeypatch.setattr(_launch, "_current_stream", lambda: 77)
    kernel, constants = _Kernel(), {"num_warps": 4, "BN": 32, "ADD": True}
    launch = VaryingLaunch(kernel, constants)
    tensors = [torch.zeros(32) for _ in range(3)]
    starts = [t.data_ptr() for t in tensors]
    assert not any(start % 16 for start in starts)
    launch(5, (tensors[0][1:], *tensors[1:]), (0.5, 9))
    launch(5, tensors, (0.5, 2**31))
    launch(6, tensors, (0.5, 9))
    assert [(call[0], *call[4:]) for call in kernel.calls] == [
        ((grid,), 0.5, number, constants) for grid, number in ((5, 9), (5, 2**31), (6, 9))
    ]
    assert not kernel.compiled.calls
    launch(7, tensors, (0.25, 10))
    assert kernel.compiled.calls == [((7, 1, 1), *starts, 0.25, 10, True, 32, 77)]
    launch(7, (tensors[0][1:], *tensors[1:]), (0.25, 10))
    launch(7, tensors, (0.25, 2**31))
    assert (len(kernel.calls), len(kernel.compiled.calls)) == (5, 1)


@triton.jit
def _flip_kernel(X, Y, Z, ROWS, BN: tl.constexpr):
    """Z = Y - X of a tile."""
    row = tl.program_id(0) * BN
    n, d = row + tl.arange(0, BN), tl.arange(0, 16)
    y = tl.load(Y + n[:, None] * 16 + d[None, :], mask=(n < ROWS)[:, None], other=0.0)
    tl.store(Z + n[:, None] * 16 + d[None, :], y - X.load([row, 0]), mask=(n < ROWS)[:, None])


def test_tiles_of_tensors_without_views() -> None:
    """What is outside of the described tensor is 0."""
    tiled = Tiled(0, 32, (32, 1), (20, 12), (16, 16))
    launch = Launch(_flip_kernel, (2,), (tiled, Place(1), Place(2)), (20,), {"BN": 16, "num_warps": 4})
    for _ in range(2):
        x, y = torch.randn(22, 32, device=DEVICE), torch.randn(20, 16, device=DEVICE)
        want, got = y.clone(), torch.empty_like(y)
        want[:, :12] -= x[1:21, :12]
        launch(x, y, got)
        torch.testing.assert_close(got, want)
    assert (launch._run is not None) == (DEVICE == "cuda")


def test_compiled_kernels_get_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a settled launch they have what Triton's launcher makes the map for the copy engine of."""
    monkeypatch.setattr(_launch, "CompiledKernel", _Compiled)
    monkeypatch.setattr(_launch, "_current_stream", lambda: 77)
    kernel, constants = _Kernel(), {"num_warps": 4, "BN": 32, "ADD": True}
    places = Place(1), Tiled(0, 8, (16, 1), (3, 12), (16, 16)), Place(0)
    launch = Launch(kernel, (5,), places, (0.5, 9), constants)
    x, y = torch.zeros(64), torch.zeros(32)
    launch(x, y)
    first = kernel.calls[0][2]
    assert (first.base.data_ptr(), first.shape, first.strides, first.block_shape) == (x.data_ptr() + 32, [3, 12], [16, 1], [16, 16])
    launch(x, y)
    ((_, begin, second, end, *_),) = kernel.compiled.calls
    assert (begin, end) == (y.data_ptr(), x.data_ptr())
    assert (second.base.data_ptr(), list(second.shape), list(second.strides)) == (x.data_ptr() + 32, [3, 12], [16, 1])
    assert (second.padding, second.round_f32_to_tf32) == (first.padding, False)
