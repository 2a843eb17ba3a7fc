"""One registered mechanism as a test sees it: built, filled with generic numbers, fed, and run from a known state."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo.registry import attention_class

DIM, HEADS = 16, 4
GRID = (5, 3)  # odd on both sides, so that every window pads
_SMALL = {"window_size": 4}  # options sized for the sequences of the tests, where causality asks for a number
FORWARD_VOCABULARY = ("context", "grid_size", "attention_mask", "position_embeddings", "past_key_values")


@dataclass(frozen=True)
class Case:
    """A mechanism with the options that it is built with.

    Only `dim` and `num_heads` are given unless the capabilities ask for more, so a mechanism is tested as a newcomer meets it.
    """

    name: str
    is_causal: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name + ("-causal" if self.is_causal else "") + "".join(f"-{k}={v}" for k, v in self.options.items())

    @property
    def info(self) -> az.AttentionInfo:
        return az.attention_info(self.name)

    @property
    def constructor(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(attention_class(self.name)).parameters

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of forward, without self."""
        forward = attention_class(self.name).forward  # type: ignore[attr-defined]
        return {k: p for k, p in inspect.signature(forward).parameters.items() if k != "self"}

    @property
    def draws(self) -> bool:
        """Whether it is random in evaluation mode, as built: the options that causality needs rule that out."""
        return self.info.stochastic and not (self.is_causal and self.info.causal_options)

    @property
    def coupled(self) -> bool:
        """Whether a sample's output depends on its batch, as built."""
        return self.info.batch_coupled and not (self.is_causal and self.info.causal_options)

    @property
    def length_coupled(self) -> bool:
        """Whether the number of tokens decides how they are grouped, as built."""
        return self.info.length_coupled and not (self.is_causal and self.info.causal_options)

    def takes(self, argument: str) -> bool:
        return argument in self.arguments

    def kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"dim": DIM}
        if "num_heads" in self.constructor:
            kwargs["num_heads"] = HEADS
        if self.is_causal:
            kwargs.update({k: _SMALL.get(k, v) for k, v in self.info.causal_options.items()})
            if "is_causal" in self.constructor:  # a mechanism that is always causal has no such option
                kwargs["is_causal"] = True
        return {**kwargs, **self.options}

    def build(self, *, generic: bool = True, **more: Any) -> nn.Module:
        """The module, from a fixed seed. `generic`: no parameter keeps a special value (0, 1) that hides what it does."""
        with seeded(0):
            module: nn.Module = az.create_attention(self.name, **{**self.kwargs(), **more})
        if generic:
            make_generic(module)
        module.layer_idx = 0
        return module.eval()

    def inputs(
        self, batch: int = 2, length: int | None = None, grid: tuple[int, int] | None = None, **like: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """x (B, N, C) and what forward cannot do without. A spatial mechanism gets `grid` (its own N), `length` otherwise.

        Where the mechanism wants multiples, the next larger grid of them stands for `grid`. A spatial mechanism that takes masks,
        which tests write for a `length`, stands on a single row of so many tokens.
        """
        generator = torch.Generator().manual_seed(1)
        kwargs: dict[str, Any] = {}
        if self.info.spatial and length is not None and self.takes("attention_mask"):
            grid = grid or (1, length)
        length = 15 if length is None else length
        if self.info.spatial:
            height, width = (-(-side // m) * m for side, m in zip(grid or GRID, self.info.grid_multiple, strict=True))
            grid = (height, width)
            kwargs["grid_size"], length = grid, grid[0] * grid[1]
        if self.takes("context") and not self.info.patterns & {"noncausal_self", "causal_self"}:
            kwargs["context"] = torch.randn(batch, length + 2, DIM, generator=generator).to(**like)
        return torch.randn(batch, length, DIM, generator=generator).to(**like), kwargs


def cases(*, causal: bool | None = None, takes: str | None = None, pattern: str | None = None, **capabilities: bool) -> list[Case]:
    """The registered mechanisms with these capabilities; `causal=None`: as built by default, True: built causal."""
    found = []
    for name in az.list_attentions(pattern=pattern, causal=True if causal else None):
        case = Case(name, is_causal=bool(causal))
        if (takes is None or case.takes(takes)) and all(getattr(case.info, k) == v for k, v in capabilities.items()):
            found.append(case)
    return found


def make_generic(module: nn.Module) -> None:
    """Move every parameter off its initial value: zeros and ones hide a missing term, and put samplers on their kinks."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed within; the test's own go on afterwards where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """One forward from the module's present state with a fixed seed; the module keeps its state (counters, statistics, caches)."""
    with seeded(3):
        return copy.deepcopy(module)(*args, **kwargs)


def run_with_gradients(module: nn.Module, x: Tensor, /, call: Any = None, **kwargs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Output, and gradients of a fixed functional of it by x and by every parameter, from the module's present state.

    Args:
        call: called in the module's place as `call(module, x, **kwargs)`, to compile or checkpoint it.
    """
    module, x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    with seeded(3):
        out = module(x, **kwargs) if call is None else call(module, x, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    objective = (out * weights).sum() + az.auxiliary_loss(module).to(out.dtype)
    leaves = [x, *module.parameters()]
    return out.detach(), list(torch.autograd.grad(objective, leaves, allow_unused=True))


def rotary_tables(length: int, head_dim: int, layout: str = "half", start: int = 0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions start .. start + length - 1, each (N, head_dim)."""
    angles = torch.arange(start, start + length)[:, None] / 100.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    full = torch.cat([angles, angles], -1) if layout == "half" else angles.repeat_interleave(2, -1)
    return full.cos(), full.sin()
