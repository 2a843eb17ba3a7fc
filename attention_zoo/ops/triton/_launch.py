"""Launches that are settled: what a kernel is launched with, but for the tensors, is found once for all calls of the same sizes.

Triton looks at each argument of each launch, and an operation of PyTorch, also a view, takes the host as long as some kernels take
the GPU. So a settled launch goes to the compiled kernel by itself, with addresses, and finds parts of tensors without views.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Launch", "Place", "Tiled", "VaryingLaunch", "launch_all", "settled"]

# Versions of Triton whose launcher takes addresses and what stands for descriptors, which its documentation does not promise.
_VERSIONS = ("3.6", "3.7", "3.8")
_ALIGNED = 15  # bits of an address that Triton's kernels are compiled for: those of which all are 0, and others

# Decorator of a function that makes launches from sizes, strides, dtype, device and settings: those are made once.
settled = functools.lru_cache(maxsize=1024)


class Place(NamedTuple):
    """Where a kernel finds a tensor: in which one of the launch's, how many elements behind its start, and with which strides."""

    tensor: int
    offset: int = 0
    strides: tuple[int, ...] = ()


class Tiled(NamedTuple):
    """Where a kernel finds a tensor that it reads in tiles, by the copy engine: a `Place` that a descriptor describes.

    Its start and its steps but the last one, which is 1, are multiples of 16 bytes.
    """

    tensor: int
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    block: tuple[int, ...]


class Launch:
    """A kernel with its grid, numbers and constants, to be called with tensors that always have the same dtypes and device.

    The first call goes by way of Triton, which compiles; so does every one with tensors that do not begin at 16 bytes, and with
    other versions of Triton than those that were tried.

    Args:
        kernel: whose arguments are pointers and descriptors, then numbers, then constants.
        grid: of up to three numbers.
        places: of the pointers and descriptors, among the tensors of a call.
        numbers: in the kernel's order.
        constants: by name, with warps and stages.
    """

    __slots__ = ("_constants", "_grid", "_kernel", "_numbers", "_places", "_run", "_starts", "_tiled", "_values")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        places: Sequence[Place | Tiled],
        numbers: Sequence[float],
        constants: Mapping[str, Any],
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, tuple(numbers), dict(constants)
        self._places = tuple(place[:2] for place in places)
        self._tiled = tuple((number, place) for number, place in enumerate(places) if isinstance(place, Tiled))
        self._run: Any = None
        self._starts: tuple[tuple[int, int], ...] = ()  # places, their offsets in bytes
        self._values: tuple[Any, ...] = ()  # of what follows the pointers

    def __call__(self, *tensors: Tensor) -> None:
        launch_all((self,), tensors)

    def _launch(self, tensors: Sequence[Tensor], aligned: bool) -> None:
        found: list[Any] = [_behind(tensors[number], offset) for number, offset in self._places]
        for number, tiled in self._tiled:
            found[number] = TensorDescriptor(found[number], list(tiled.shape), list(tiled.strides), list(tiled.block))
        compiled = self._kernel[self._grid](*found, *self._numbers, **self._constants)
        if aligned and _takes_addresses(compiled):
            self._starts = tuple((number, offset * tensors[number].element_size()) for number, offset in self._places)
            names = self._kernel.arg_names[len(self._places) + len(self._numbers) :]
            self._values = *self._numbers, *(self._constants[name] for name in names)
            run = compiled[(*self._grid, 1, 1)[:3]]
            self._run = functools.partial(_run_described, run, self._tiled) if self._tiled else run


class VaryingLaunch:
    """A kernel with its constants, whose grid and numbers change from call to call, as where keys grow by one at each step.

    The kernel specialises none of its numbers (`do_not_specialize`). As with `Launch` the first call goes by way of Triton, and all
    do with tensors that do not begin at 16 bytes, or numbers that take more than 32 bits.

    Args:
        kernel: whose arguments are pointers, then numbers, then constants.
        constants: by name, with warps and stages.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_values")

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        self._kernel, self._constants = kernel, dict(constants)
        self._compiled: Any = None
        self._values: tuple[Any, ...] = ()  # of the constants that are the kernel's arguments

    def __call__(self, grid: int, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        """One program for each number below `grid`; `tensors` always have the same dtypes and device, `numbers` the same types."""
        starts, bits = [tensor.data_ptr() for tensor in tensors], 0
        for start in starts:
            bits |= start
        usual = not bits & _ALIGNED and max(numbers) < 2**31
        if usual and self._compiled is not None:
            self._compiled[(grid, 1, 1)](*starts, *numbers, *self._values, stream=_current_stream())
            return
        compiled = self._kernel[(grid,)](*tensors, *numbers, **self._constants)
        if usual and _takes_addresses(compiled):
            names = self._kernel.arg_names[len(tensors) + len(numbers) :]
            self._compiled, self._values = compiled, tuple(self._constants[name] for name in names)


def _takes_addresses(compiled: Any) -> bool:
    """Whether what Triton returned from a launch can be called without Triton."""
    known = triton.__version__.startswith(_VERSIONS) and isinstance(compiled, CompiledKernel)
    return known and compiled.metadata.target.backend == "cuda"  # type: ignore[no-any-return]


class _Described:
    """What Triton's launcher reads of a descriptor: it fills in the map for the copy engine at each launch."""

    __slots__ = ("_start", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, start: int, tiled: Tiled) -> None:
        self._start, self.shape, self.strides = start, tiled.shape, tiled.strides

    @property
    def base(self) -> _Described:
        return self

    def data_ptr(self) -> int:
        return self._start


def _run_described(run: Any, descriptors: tuple[tuple[int, Tiled], ...], *values: Any, stream: int) -> None:
    """A compiled kernel, some of whose addresses become descriptors."""
    given = list(values)
    for number, tiled in descriptors:
        given[number] = _Described(given[number], tiled)
    run(*given, stream=stream)


def launch_all(launches: Iterable[Launch], tensors: Sequence[Tensor], beside: torch.cuda.Stream | None = None) -> None:
    """One after the other with the same tensors, on the current stream or on `beside`."""
    bits, starts = 0, []
    for tensor in tensors:
        start = tensor.data_ptr()
        bits |= start
        starts.append(start)
    aligned, stream = not bits & _ALIGNED, None if beside is None else beside.cuda_stream
    for launch in launches:
        if aligned and launch._run is not None:
            stream = _current_stream() if stream is None else stream
            launch._run(*[starts[tensor] + offset for tensor, offset in launch._starts], *launch._values, stream=stream)
        else:
            with contextlib.nullcontext() if beside is None else torch.cuda.stream(beside):
                launch._launch(tensors, aligned)


def _current_stream() -> int:
    return driver.active.get_current_stream(driver.active.get_current_device())  # type: ignore[no-any-return]


def _behind(tensor: Tensor, offset: int) -> Tensor:
    """What begins so many elements behind the start of `tensor`."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset) if offset else tensor
