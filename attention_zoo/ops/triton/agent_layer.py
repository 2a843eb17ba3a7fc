"""What stands between the projections of agent attention, forward and backward, on tensors as its layer has them.

Pooling, biases from tables, both steps of attention and their gradients are launches that are settled once for a layer: they find
heads and parts where they stand in a projection, and write gradients there. Of T = P + H W tokens the first P, the prefix, stand
before the grid: they are neither pooled nor, by the layer, convolved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops.triton._common import precision
from attention_zoo.ops.triton._launch import Launch, Place, launch_all, settled
from attention_zoo.ops.triton.agent import Call, Gradients, add_samples_launch, agents_read_launches, tokens_read_launch
from attention_zoo.ops.triton.grid_bias import grid_bias_gradient_launch, grid_bias_launch
from attention_zoo.ops.triton.token_pool import pool_gradient_launch, pool_launch

__all__ = ["Attended", "LayerCall", "attend", "attend_backward"]

Grid = tuple[int, int]
# Of keys: (h, n, b, b'), (1, h, n, H, 1), (1, h, n, 1, W), and (1, h, n, P) where P > 0; then of queries, the same with n last, but
# for the first.
Tables = tuple[Tensor, ...]


class LayerCall(NamedTuple):
    """What the launches of a layer depend on.

    Attributes:
        batch, prefix, grid, bins, heads, dim: of samples, of the tokens, of the n agents, of heads and their channels.
        scale: factor of both logits.
        sides: of the square tables, of keys and of queries; None: there are no tables.
        dtypes, device: of the projection, then of the tables.
    """

    batch: int
    prefix: int
    grid: Grid
    bins: Grid
    heads: int
    dim: int
    scale: float
    sides: tuple[Grid, Grid] | None
    bytes: int
    precision: str
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, qkv: Tensor, prefix: int, grid: Grid, bins: Grid, heads: int, scale: float, tables: Tables) -> LayerCall:
        """Of a projection (B, T, 3 h d); `tables`: all or none."""
        squares = tables[:: max(len(tables) // 2, 1)]
        sides = ((squares[0].shape[2], squares[0].shape[3]), (squares[1].shape[2], squares[1].shape[3])) if tables else None
        dim, dtypes = qkv.shape[2] // (3 * heads), (qkv.dtype, *(t.dtype for t in tables))
        sizes = qkv.shape[0], prefix, grid, bins, heads, dim, scale
        return cls(*sizes, sides, qkv.element_size(), precision(qkv), dtypes, qkv.device)

    @property
    def number(self) -> int:
        return self.bins[0] * self.bins[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def each(self) -> int:
        """Tables of keys, and of queries."""
        return 4 if self.prefix else 3

    def call(self) -> Call:
        sizes = self.batch, self.heads, 1, self.number, self.tokens, self.dim, self.dim
        return Call(*sizes, self.scale, self.bytes, self.precision)

    def part(self, tensor: int, number: int) -> Place:
        """q, k or v in a projection, by (B, h, tokens)."""
        channels = self.heads * self.dim
        return Place(tensor, number * channels, (3 * self.tokens * channels, self.dim, 3 * channels))

    def pooled(self, tensor: int) -> Place:
        """The queries in a projection that stand on the grid, by (B, H W)."""
        queries = self.part(tensor, 0)
        return Place(tensor, self.prefix * queries.strides[2], queries.strides[::2])

    def alone(self, tensor: int, length: int) -> Place:
        """(B, length, h d), by (B, h, length)."""
        channels = self.heads * self.dim
        return Place(tensor, 0, (length * channels, self.dim, channels))

    def bias(self, tensor: int, number: int) -> Place | None:
        """The keys' or the queries' of (2, h, n, tokens), by (B, h, tokens, n)."""
        if self.sides is None:
            return None
        size = self.number * self.tokens
        return Place(tensor, number * self.heads * size, (0, size, 1, self.tokens))

    def tables(self, first: int, number: int) -> tuple[Place, Place, Place, Place | None]:
        """Square, rows, columns and prefix of keys or of queries, by (h, n, ...)."""
        assert self.sides is not None
        n, (below, right) = self.number, self.sides[number]
        square = Place(first, 0, (n * below * right, below * right, right, 1))
        rows, columns, prefix = (
            Place(first + 1 + i, 0, (n * length, length, 1) if number == 0 else (n * length, 1, n))
            for i, length in enumerate((*self.grid, self.prefix))
        )
        return square, rows, columns, prefix if self.prefix else None

    def shapes(self, number: int) -> tuple[tuple[int, ...], ...]:
        """Of the tables of keys or of queries."""
        assert self.sides is not None
        h, n, (height, width) = self.heads, self.number, self.grid
        keys = (1, h, n, height, 1), (1, h, n, 1, width), (1, h, n, self.prefix)
        queries = (1, h, height, 1, n), (1, h, 1, width, n), (1, h, self.prefix, n)
        return ((h, n, *self.sides[number]), *(keys, queries)[number])[: self.each]


class Attended(NamedTuple):
    """Of a forward.

    Attributes:
        pooled: the agents, (B, n, h d).
        biases: of keys and of queries, (2, h, n, T); None: there are none.
        read, lse: what the agents have read, (B, n, h d), and the log-normalisers (B, h, n).
        out: (B, T, h d).
    """

    pooled: Tensor
    biases: Tensor | None
    read: Tensor
    lse: Tensor
    out: Tensor


@settled
def _forward_launches(layer: LayerCall) -> tuple[list[Launch], int]:
    """Of projection, agents, biases, what was read, log-normalisers, parts, outputs, tables; and how many numbers parts has."""
    call, agents = layer.call(), layer.alone(1, layer.number)
    q, k, v = (layer.part(0, number) for number in range(3))
    launches = [pool_launch(layer.batch, layer.heads * layer.dim, layer.grid, layer.bins, layer.pooled(0), Place(1))]
    if layer.sides is not None:
        for number, sides in enumerate(layer.sides):
            shape, out = (layer.heads, layer.number, layer.prefix), Place(2, number * layer.heads * layer.number * layer.tokens)
            tables = layer.tables(7 + layer.each * number, number)
            launches.append(grid_bias_launch(shape, layer.grid, sides, *tables, out))
    read = layer.alone(3, layer.number)
    steps, numbers = agents_read_launches(call, agents, k, v, layer.bias(2, 0), None, read, Place(4), 5)
    launches += steps
    launches.append(tokens_read_launch(call, q, agents, read, layer.bias(2, 1), layer.alone(6, layer.tokens)))
    return launches, numbers


def attend(qkv: Tensor, layer: LayerCall, tables: Tables) -> Attended:
    """Of a projection (B, T, 3 h d), contiguous, as are the tables."""
    channels = layer.heads * layer.dim
    pooled = qkv.new_empty((layer.batch, layer.number, channels))
    read, out = torch.empty_like(pooled), qkv.new_empty((layer.batch, layer.tokens, channels))
    lse = qkv.new_empty((layer.batch, layer.heads, layer.number), dtype=torch.float32)
    biases = None if layer.sides is None else qkv.new_empty((2, layer.heads, layer.number, layer.tokens))
    if layer.batch:
        launches, numbers = _forward_launches(layer)
        parts = lse.new_empty(numbers) if numbers else lse
        launch_all(launches, (qkv, pooled, qkv if biases is None else biases, read, lse, parts, out, *tables))
    return Attended(pooled, biases, read, lse, out)


@settled
def _backward_launches(layer: LayerCall, wants: tuple[bool, bool]) -> tuple[list[Launch], int]:
    """Of projection, agents, biases, what was read, log-normalisers, gradients of outputs and of the projection, sums, gradients of
    the agents, of what was read, of logits and of a bias, then of the tables that are wanted; and how many numbers sums has."""
    call, agents, read = layer.call(), layer.alone(1, layer.number), layer.alone(3, layer.number)
    q, k, v, dq, dk, dv = (layer.part(tensor, number) for tensor in (0, 6) for number in range(3))
    d_agents, d_read = layer.alone(8, layer.number), layer.alone(9, layer.number)
    logits = [Place(10) if wanted else None for wanted in wants]
    grad, sums = layer.alone(5, layer.tokens), Place(7)
    of_queries = Gradients(
        q, grad, agents, read, None, None, layer.bias(2, 1), None, dq, dq, logits[1], sums, d_agents, d_read
    ).launches(call)  # fmt: skip
    of_keys = Gradients(
        k, v, agents, d_read, read, Place(4), layer.bias(2, 0), None, dk, dv, logits[0], sums, d_agents, None
    ).launches(call, add=True)  # fmt: skip
    launches: list[Launch] = []
    for number, (steps, _) in ((1, of_queries), (0, of_keys)):
        launches += steps
        if wants[number] and layer.sides is not None:
            shape, size = (layer.heads, layer.number, layer.prefix), layer.heads * layer.number * layer.tokens
            found = 10
            if layer.batch > 1:
                launches.append(add_samples_launch(layer.batch, size, Place(10), Place(11)))
                found = 11
            of_bias = Place(found, 0, (layer.number * layer.tokens, layer.tokens))
            first = 12 + (layer.each if number == 1 and wants[0] else 0)
            launches.append(
                grid_bias_gradient_launch(shape, layer.grid, layer.sides[number], of_bias, *layer.tables(first, number))
            )
    pooled = layer.batch, layer.heads * layer.dim, layer.grid, layer.bins
    launches.append(pool_gradient_launch(*pooled, Place(8), layer.pooled(6), add=True))
    return launches, of_queries[1]


def attend_backward(
    qkv: Tensor, layer: LayerCall, found: Attended, grad: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """From `grad` (B, T, h d), contiguous: of the projection, and of the tables, those of keys and of queries if wanted."""
    dqkv, tables = torch.empty_like(qkv), _empty_tables(qkv, layer, wants)
    given = [t for t in tables if t is not None]
    if not layer.batch:
        for table in given:
            table.zero_()
        return dqkv, tables
    launches, numbers = _backward_launches(layer, wants)
    sums = qkv.new_empty(numbers, dtype=torch.float32)
    d_agents, d_read, d_logits, d_bias = torch.empty_like(found.pooled), torch.empty_like(found.read), qkv, qkv
    if any(wants):  # n numbers for a token and head of each sample: one tensor serves both steps, one after the other
        d_logits = qkv.new_empty((layer.batch, layer.heads, layer.number, layer.tokens))
        d_bias = torch.empty_like(d_logits[0]) if layer.batch > 1 else d_logits
    of_forward = found.pooled, qkv if found.biases is None else found.biases, found.read, found.lse
    launch_all(launches, (qkv, *of_forward, grad, dqkv, sums, d_agents, d_read, d_logits, d_bias, *given))
    return dqkv, tables


def _empty_tables(like: Tensor, layer: LayerCall, wants: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    tables: list[Tensor | None] = []
    for number, wanted in enumerate(wants):
        if wanted and layer.sides is not None:
            dtypes = layer.dtypes[1 + number * layer.each :]
            tables += (like.new_empty(shape, dtype=dtype) for shape, dtype in zip(layer.shapes(number), dtypes, strict=False))
        else:
            tables += [None] * layer.each
    return tuple(tables)
