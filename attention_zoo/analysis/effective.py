"""The one map over tokens that a mechanism comes down to, however many softmaxes, windows, regions and summaries it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.attention.base import AttentionModule
from attention_zoo.attention.bra import BiLevelRoutingAttention
from attention_zoo.attention.differential import DifferentialAttention
from attention_zoo.attention.halo import HaloAttention
from attention_zoo.attention.hilo import HiLoAttention
from attention_zoo.attention.mha import MultiHeadAttention

__all__ = ["effective_attention"]

_VALUES = ("qkv", "kv", "v_proj", "v", "h_qkv", "l_kv")  # projections whose last columns are the values
_OUTPUTS = ("proj", "o_proj", "h_proj", "l_proj")
_CONVOLUTIONS = ("dwc", "lepe", "get_v")  # what mechanisms add beside their attention


@torch.no_grad()
def effective_attention(module: AttentionModule, x: Tensor, **inputs: Any) -> Tensor:
    """How much each token's value counts in each head's output: out_h(i) = sum_j M_h(i, j) v(j), with everything but v fixed.

    Found by giving the tokens values of 0 and 1, as many at once as a head has channels, in N / d forwards, and proved on random
    values. Gates and the factors of differences are in it, so that rows need not sum to one nor be positive; convolutions beside
    the attention, the normalisation of differential heads, noise and dropout are not. The module stays as it is.

    Args:
        module: a mechanism of the zoo.
        x: its tokens (B, N, C).
        inputs: what else its forward takes; no cache.

    Returns: M (B, H, N_q, N), N_q tokens of x over the N tokens of x or of the context, float32 or float64.

    Raises:
        ValueError: no such map: values that are not those of tokens (pooled features), keys made from values, a cache.
    """
    if inputs.get("past_key_values") is not None:
        raise ValueError("with a cache there are tokens whose values are not in this forward")
    with _as_it_is(module):
        probe = _Probe(module.eval(), x, inputs)
        maps = [probe.measure(number) for number in range(len(probe.sites))]
        probe.prove(maps)
        tokens = [site.to_tokens(found) for site, found in zip(probe.sites, maps, strict=True)]
    return torch.stack(tokens).sum(0)  # a head has its values from one of the projections, and nothing from the others


@dataclass
class _Site:
    """A projection that makes values.

    Attributes:
        module: the projection.
        length: the number n of values in a sample, of the projection's output.
        put: (output, values (n, d)) -> the output with these values in every head.
        to_tokens: a map over the n values (..., n) as one over tokens (..., N).
    """

    module: nn.Module
    length: Callable[[Tensor], int]
    put: Callable[[Tensor, Tensor], Tensor]
    to_tokens: Callable[[Tensor], Tensor]


class _Probe:
    """Forwards of a mechanism with other values, up to its output projection.

    Attributes:
        width: channels d of a head's values.
        lengths: number of values of each site.
    """

    def __init__(self, module: Any, x: Tensor, inputs: dict[str, Any]) -> None:
        self.module, self.x, self.inputs = module, x, inputs
        outputs = [layer for name in _OUTPUTS if isinstance(layer := getattr(module, name, None), nn.Module)]
        heads = getattr(module, "num_heads", None)
        if heads is None or not outputs:
            raise ValueError(f"{type(module).__name__} has no heads and output projection to read them from")
        self.width = sum(getattr(layer, "in_features", module.dim) for layer in outputs) // heads
        self.sites = _find_sites(module, x, inputs, self.width)
        self.lengths = [0] * len(self.sites)
        self.values: list[Tensor] | None = None
        self.outputs: list[Tensor] = []
        self.calls: list[int] = []
        _leave_out_the_rest(module)
        for number, site in enumerate(self.sites):
            if type(site.module) is nn.Linear:
                site.module.__class__ = _Watched
            site.module.forward = self._putting(number, site, site.module.forward)
        for layer in outputs:
            layer.forward = self._reading
        self.run(None)

    def run(self, values: list[Tensor] | None) -> Tensor:
        """The heads' outputs (B, H, N, d) with these values (n, d) of each site; None: with those that the module has."""
        self.values, self.outputs, self.calls = values, [], []
        with _as_it_is(self.module):  # layers that learn in a forward see each of them for the first time
            self.module(self.x, **self.inputs)
        if sorted(self.calls) != list(range(len(self.sites))):
            raise ValueError(f"{type(self.module).__name__} attends to values that are not those of its tokens")
        out = torch.cat(self.outputs, -1).unflatten(-1, (self.module.num_heads, self.width)).transpose(1, 2)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def measure(self, number: int) -> Tensor:
        """(B, H, N, n) over the values of one site, those of the others being 0."""
        columns, length = [], self.lengths[number]
        for start in range(0, length, self.width):
            values = [self.x.new_zeros(n, self.width) for n in self.lengths]
            values[number][start : start + self.width].fill_diagonal_(1.0)
            columns.append(self.run(values)[..., : length - start])
        return torch.cat(columns, -1)

    def prove(self, maps: list[Tensor]) -> None:
        """Raise ValueError unless random values give what the maps say."""
        generator = torch.Generator().manual_seed(0)
        values = [10.0 * torch.randn(n, self.width, generator=generator).to(self.x) for n in self.lengths]
        out = self.run(values)
        said = torch.stack([found @ v.to(found.dtype) for found, v in zip(maps, values, strict=True)]).sum(0)
        tolerance = (
            1e-2 if self.x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(self.x.device.type) else 1e-4
        )
        if not bool(((said - out).abs() <= 10.0 * tolerance).all()):
            raise ValueError(f"{type(self.module).__name__} is no fixed linear map of its values: keys or weights depend on them")

    def _putting(self, number: int, site: _Site, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor) -> Tensor:
            out = original(x)
            if (context := self.inputs.get("context")) is not None and x is not context:  # for the queries of a fused projection
                return out
            self.calls.append(number)
            self.lengths[number] = site.length(out)
            return out if self.values is None else site.put(out, self.values[number].to(out))

        return forward

    def _reading(self, x: Tensor) -> Tensor:
        self.outputs.append(x)
        return x


class _Watched(nn.Linear):
    """A projection whose forward has to be called: of a plain one, only the rows that are needed may be taken."""


# --- where values are -------------------------------------------------------------------------------------------------------------


def _find_sites(module: Any, x: Tensor, inputs: dict[str, Any], width: int) -> list[_Site]:
    kv_heads = getattr(module, "num_kv_heads", None) or module.num_heads
    if isinstance(module, HaloAttention):
        return [_Site(module.kv, lambda out: out.shape[2:].numel(), _halo_put(module.num_heads), lambda found: found)]
    if isinstance(module, HiLoAttention):
        return _hilo_sites(module, x, inputs["grid_size"])
    projection = next((layer for name in _VALUES if isinstance(layer := getattr(module, name, None), nn.Module)), None)
    if projection is None:
        raise ValueError(f"{type(module).__name__} has no projection of values")
    context = inputs.get("context")
    length = (x if context is None else context).shape[1]
    halves = isinstance(module, DifferentialAttention) and module.pairing == "halves"

    def put(out: Tensor, values: Tensor) -> Tensor:
        parts = values.chunk(2, -1) if halves else [values]  # the halves of all heads stand one after another
        columns = torch.cat([part.repeat(1, kv_heads) for part in parts], -1)
        return torch.cat([out[..., : out.shape[-1] - columns.shape[-1]], columns.expand(len(out), -1, -1)], -1)

    def to_tokens(found: Tensor) -> Tensor:
        if isinstance(module, BiLevelRoutingAttention) and found.shape[-1] != length:
            return _without_padding(found, module, inputs["grid_size"])
        if found.shape[-1] != length:
            raise ValueError(f"{type(module).__name__} has {found.shape[-1]} values for {length} tokens")
        return found

    return [_Site(projection, lambda out: out.shape[1], put, to_tokens)]


def _without_padding(found: Tensor, module: BiLevelRoutingAttention, grid: tuple[int, int]) -> Tensor:
    """Columns of the prefix tokens and of the grid, without those of the cells that fill up the regions."""
    below, right = module.cut_grid(grid).padding(grid)
    prefix, cells = found.tensor_split([module.num_prefix_tokens], -1)
    image = cells.unflatten(-1, (grid[0] + below, grid[1] + right))[..., : grid[0], : grid[1]]
    return torch.cat([prefix, image.flatten(-2)], -1)


def _halo_put(num_heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Of a map (B, heads * (d_k + d), H, W), the keys and values of each head side by side."""

    def put(out: Tensor, values: Tensor) -> Tensor:
        heads = out.unflatten(1, (num_heads, -1)).clone()
        heads[:, :, -values.shape[1] :] = values.t().unflatten(1, tuple(out.shape[2:]))
        return heads.flatten(1, 2)

    return put


def _hilo_sites(module: Any, x: Tensor, grid: tuple[int, int]) -> list[_Site]:
    """Hi-Fi's values are those of the cells of the grid as windows fill it up, Lo-Fi's the means of the windows."""
    size, (height, width) = module.window_size, grid
    rows, columns = -(-height // size), -(-width // size)

    def put(heads: int) -> Callable[[Tensor, Tensor], Tensor]:
        def put_last(out: Tensor, values: Tensor) -> Tensor:
            new = values.repeat(1, heads).view(*out.shape[1:-1], -1)
            return torch.cat([out[..., : out.shape[-1] - new.shape[-1]], new.expand(len(out), *new.shape)], -1)

        return put_last

    def cells(found: Tensor) -> Tensor:
        return found.unflatten(-1, (rows * size, columns * size))[..., :height, :width].flatten(-2)

    def means(found: Tensor) -> Tensor:
        real = F.pad(x.new_ones(1, 1, height, width), (0, columns * size - width, 0, rows * size - height))
        share = F.avg_pool2d(real, size) if module.pad_mode == "mask" else torch.ones_like(F.avg_pool2d(real, size))
        windows = found.unflatten(-1, (rows, columns)) / (size * size * share[0, 0].to(found.dtype))
        spread = windows.repeat_interleave(size, -1).repeat_interleave(size, -2)
        return spread[..., :height, :width].flatten(-2)

    sites = []
    if module.h_heads:
        sites.append(_Site(module.h_qkv, lambda out: out.shape[1:-1].numel(), put(module.h_heads), cells))
    if module.l_heads:
        sites.append(_Site(module.l_kv, lambda out: out.shape[1], put(module.l_heads), means))
    return sites


def _leave_out_the_rest(module: Any) -> None:
    """What is no attention adds nothing, normalises nothing and draws nothing."""
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in _CONVOLUTIONS:
            part.forward = torch.zeros_like
    kind = type(module)
    if issubclass(kind, DifferentialAttention) and module.sub_norm:
        module.sub_norm = False  # nor scales by 1 - lambda_init
    if issubclass(kind, MultiHeadAttention):
        module.norm.forward = lambda heads: heads
    if hasattr(module, "noise_mode"):
        module.noise_mode = "never"


@contextlib.contextmanager
def _as_it_is(module: nn.Module) -> Iterator[None]:
    """Everything that a module holds is afterwards what it was: classes, attributes, modes, forwards, numbers in buffers."""
    held = [(part, type(part), {**part.__dict__, "_buffers": dict(part._buffers)}) for part in module.modules()]
    numbers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, kind, attributes in held:
            part.__class__ = kind
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for buffer, number in numbers:
            buffer.copy_(number)
