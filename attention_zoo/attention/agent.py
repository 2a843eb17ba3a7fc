"""Agent attention: a few agent tokens, pooled from the queries, read all tokens, and every query reads the agents.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023. Follows the official code
(LeapLabTHU/Agent-Attention): its DeiT, PVT, Swin and dense-prediction forms in one module. Its training-free form for diffusion
models is in `agent_sd`.
Deviations: any grid and any agent grid on the same tables (`grid_size`, `agent_grid`), equal sizes being the official classifiers;
padding masks, cross attention, grouped key/value heads, query/key normalisation, learned agents, several prefix tokens and
sequences without a grid (`window_size=None`) are options; a mask also keeps tokens out of the pooling and of the convolution;
biases are not repeated over the batch; the softmaxes are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import (
    AttentionModule,
    check_choice,
    check_context,
    check_grid,
    check_head_split,
    check_tokens,
    drop,
    is_bare,
    merge_heads,
    project_qkv,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import projection_settings, refuse_tensors, source_heads, source_settings, split_projections
from attention_zoo.attention.functional import pure_function
from attention_zoo.ops import agent_attention, resize_grid
from attention_zoo.ops._one_node import Parts, weight_and_bias
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.agent_layer import AgentLayer, agent_layer, takes_layer
from attention_zoo.registry import register_attention

__all__ = [
    "AgentAttention",
    "AgentTables",
    "DepthwiseConv2d",
    "add_convolution",
    "agent_attention",
    "noncausal_settings",
    "padding_mask",
    "pool_agents",
    "pooled_agent_attention",
    "positive_grid",
    "resize_grid",
    "to_image",
]

Grid = tuple[int, int]

AGENT_SOURCES = ("pool", "learned")


def pool_agents(q: Tensor, grid_size: Grid | None, agent_grid: Grid, mask: Tensor | None = None) -> Tensor:
    """Average the queries over the bins of an agent grid; bins overlap or repeat where the grid is not a multiple of it.

    Args:
        q: tokens (B, N, C) of the grid, before they are split into heads, and unscaled.
        grid_size: (H, W) with H * W = N; None: a sequence, pooled to a1 * a2 agents along it.
        agent_grid: (a1, a2).
        mask: (B, N), true for real tokens: the mean is over those, and zero where a bin has none.

    Returns: (B, a1 * a2, C).
    """
    if mask is None:
        return ops.pool_tokens(q, grid_size, agent_grid)
    mean = ops.pool_tokens(q.masked_fill(~mask[..., None], 0.0), grid_size, agent_grid)
    share = ops.pool_tokens(mask[..., None].to(q.dtype), grid_size, agent_grid)
    return mean / share.masked_fill(share == 0, 1.0)


def to_image(x: Tensor, grid_size: Grid) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view. One sample, too, has the strides of a channels-last image, which convolutions want."""
    return x.unflatten(1, grid_size).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, stride 1, that keeps the size of the map; our kernel where it serves (`ops.depthwise_conv2d`).

    Shape: x (B, C, H, W), a view of channels-last tokens -> (B, C, H, W).
    """

    def __init__(self, dim: int, kernel_size: int = 3, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def add_convolution(out: Tensor, v: Tensor, convolution: nn.Module) -> Tensor:
    """`out` and the convolved values, both (B, H, W, C): in one step where nobody waits for the convolution's own forward."""
    if is_bare(convolution, DepthwiseConv2d):
        weight, bias = weight_and_bias(convolution)
        return ops.depthwise_conv2d(v, weight, bias, add=out)
    local: Tensor = convolution(v.permute(0, 3, 1, 2))
    return out + local.permute(0, 2, 3, 1).to(out.dtype)


class AgentTables(AttentionModule):
    """The two position biases of agent attention, each stored as a small square, a row and a column table.

        B_k = [ac | up(an) + ah + aw]  (n x (P + N_k))          B_q = [ca ; (up(na))^T + ha + wa]  ((P + N) x n)

    Square tables are resampled to the grid; row and column tables have the sizes of the grid that they were trained on, and are
    resampled as well on another one. `agent_grid`s other than a x a resample over the agents. All of it is bilinear.

    Attributes:
        an_bias, na_bias: (h, n, b, b). ah_bias, aw_bias: (1, h, n, H_k, 1) and (1, h, n, 1, W_k). ha_bias, wa_bias: (1, h, H, 1, n)
            and (1, h, 1, W, n). ac_bias, ca_bias: (1, h, n, P) and (1, h, P, n), where there are P > 0 prefix tokens.
    """

    has_tables: bool = False
    has_prefix_tables: bool = False
    agent_side: int
    an_bias: Tensor
    na_bias: Tensor
    ah_bias: Tensor
    aw_bias: Tensor
    ha_bias: Tensor
    wa_bias: Tensor
    ac_bias: Tensor
    ca_bias: Tensor

    def create_tables(
        self,
        num_heads: int,
        agent_num: int,
        window_size: Grid,
        *,
        key_window: Grid | None = None,
        num_prefix_tokens: int = 0,
        bias_grid: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Allocate the tables for queries on a grid `window_size` and keys on `key_window` (None: the same); not filled yet."""
        self.agent_side = _square_root(agent_num)
        (rows, columns), (key_rows, key_columns) = window_size, key_window or window_size
        shapes = {
            "an_bias": (num_heads, agent_num, bias_grid, bias_grid),
            "na_bias": (num_heads, agent_num, bias_grid, bias_grid),
            "ah_bias": (1, num_heads, agent_num, key_rows, 1),
            "aw_bias": (1, num_heads, agent_num, 1, key_columns),
            "ha_bias": (1, num_heads, rows, 1, agent_num),
            "wa_bias": (1, num_heads, 1, columns, agent_num),
        }
        if num_prefix_tokens:
            shapes["ac_bias"] = (1, num_heads, agent_num, num_prefix_tokens)
            shapes["ca_bias"] = (1, num_heads, num_prefix_tokens, agent_num)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.has_tables, self.has_prefix_tables = True, num_prefix_tokens > 0

    def resize_tables(self, window_size: Grid, key_window: Grid | None = None) -> None:
        """Resample the row and column tables to another grid for good, as the official loader does; a forward there is the same."""
        (rows, columns), (key_rows, key_columns) = window_size, key_window or window_size
        sizes = {"ah_bias": (key_rows, 1), "aw_bias": (1, key_columns), "ha_bias": (rows, 1), "wa_bias": (1, columns)}
        for name, size in sizes.items():
            table = getattr(self, name)
            agents_first = table.detach()[0] if name in {"ah_bias", "aw_bias"} else table.detach()[0].permute(0, 3, 1, 2)
            resized = resize_grid(agents_first, size).to(table.dtype)
            resized = resized if name in {"ah_bias", "aw_bias"} else resized.permute(0, 2, 3, 1)
            self.register_parameter(name, nn.Parameter(resized[None].contiguous(), table.requires_grad))

    def reset_tables(self, std: float = 0.02) -> None:
        """Truncated normal values, zeros if `std` is 0."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(parameter, std=std) if std else nn.init.zeros_(parameter)

    def key_bias(self, grid_size: Grid, agent_grid: Grid, dtype: torch.dtype | None = None) -> Tensor | None:
        """B_k (1, h, n, P + H_k * W_k) for keys on this grid; None without tables.

        `dtype`: what it may be rounded to, that of the queries for instance; None: at least float32 where it is resampled.
        """
        if not self.has_tables:
            return None
        square, *lines = self._tables()[0]
        lines = [table.reshape(*square.shape[:2], -1) for table in lines]
        return self._bias(square, lines, grid_size, agent_grid, dtype)

    def query_bias(self, grid_size: Grid, agent_grid: Grid, dtype: torch.dtype | None = None) -> Tensor | None:
        """B_q (1, h, P + H * W, n) for queries on this grid; None without tables. `dtype` as for `key_bias`."""
        if not self.has_tables:
            return None
        square, *lines = self._tables()[1]
        heads, number = square.shape[:2]
        lines = [table.reshape(heads, -1, number).transpose(1, 2) for table in lines]  # agents first
        return self._bias(square, lines, grid_size, agent_grid, dtype).transpose(-2, -1)

    def _bias(self, square: Tensor, lines: list[Tensor], grid_size: Grid, agent_grid: Grid, dtype: torch.dtype | None) -> Tensor:
        """(1, h, n, P + H * W)."""
        (rows, columns, *prefix), agents = lines, ((self.agent_side, self.agent_side), agent_grid)
        before = prefix[0] if prefix else None
        return ops.grid_bias(square, rows, columns, grid_size, prefix=before, agent_grids=agents, dtype=dtype)[None]

    def _tables(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of B_k and of B_q, as they are stored; () without tables."""
        if not self.has_tables:
            return (), ()
        of_keys, of_queries = (self.an_bias, self.ah_bias, self.aw_bias), (self.na_bias, self.ha_bias, self.wa_bias)
        if self.has_prefix_tables:
            return (*of_keys, self.ac_bias), (*of_queries, self.ca_bias)
        return of_keys, of_queries

    def _takes_layer(self, x: Tensor, grid_size: Grid, agent_grid: Grid, head_dim: int, dropout_p: float) -> bool:
        """Whether our kernels serve a whole layer on tokens like x, without resampling a table, and nobody looks on."""
        if not stands_alone(x) or ops.is_observed():
            return False
        square = None
        if self.has_tables:
            of_keys, of_queries = (self.ah_bias.shape[3], self.aw_bias.shape[4]), (self.ha_bias.shape[2], self.wa_bias.shape[3])
            if not of_keys == of_queries == grid_size or agent_grid != (self.agent_side, self.agent_side):
                return False
            square = (self.an_bias.shape[2], self.an_bias.shape[3])
        return takes_layer(x, math.prod(agent_grid), head_dim, grid_size, square, dropout_p)


@register_attention(
    "agent",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    arxiv="2312.08874",
    year=2023,
    repository="LeapLabTHU/Agent-Attention",
    patterns={"noncausal_self", "noncausal_cross"},
    spatial=True,
    padding_masks_only=True,
    prefix_tokens=True,
    cross_equals_self=False,
    cost="O(N n C)",
    engines=("triton", "torch", "flash", "xformers", "flex"),
    sequence_options={"window_size": None},
)
class AgentAttention(AgentTables):
    """Agent attention: n agents pooled from the queries collect from all keys and hand on to all queries.

        A = Pool(Q)                                         n = a * a agents, means of the queries over a grid
        V_A = softmax(A K^T / sqrt(d) + B_k) V              agent aggregation
        O = softmax(Q A^T / sqrt(d) + B_q) V_A + DWC(V)     agent broadcast, and a 3x3 depthwise convolution of the values
        y = O W_o

    Read as linear attention: phi_q(Q) = softmax(Q A^T / sqrt(d) + B_q), phi_k(K) = softmax(A K^T / sqrt(d) + B_k)^T.

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | W_q, W_k, W_v | rows of `qkv`, in this order; or `q` and the rows of `kv` |
    | A, n | `pool_agents` of the projected queries (or `agent_tokens`), `agent_num` |
    | B_1 (here B_k) | `an_bias`, `ah_bias`, `aw_bias`, `ac_bias`: `key_bias` |
    | B_2 (here B_q) | `na_bias`, `ha_bias`, `wa_bias`, `ca_bias`: `query_bias` |
    | DWC | `dwc` |
    | W_o | `proj` |

    Prefix tokens (class tokens) stand before the grid: they are read and read, without being pooled or convolved. In cross
    attention the queries' grid gives the agents, there is no convolution, and B_k only where the context has the tables' own size.
    Fully masked samples give the projection of the convolution's bias.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h.
        head_dim: channels d per head; None: dim / num_heads.
        num_kv_heads: heads of keys and values, each read by as many query heads; None: num_heads.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        qk_norm: normalise q and k per head with `norm_layer`, before the pooling.
        norm_layer: class of those normalisations, called with the number of channels.
        attn_drop, proj_drop: dropout rates on both attention maps and on the output.
        agent_num: number n of agents, a square.
        window_size: the grid (H, W), or its side, that the tables are allocated for; other grids resample them. None: sequences
            without a grid, of any length: agents are means along it, there are no tables, and the convolution is of 3 tokens.
        agent_grid: grid (a1, a2) of the agents that are pooled; None: (a, a). The tables keep a * a agents.
        num_prefix_tokens: number P of tokens before the grid.
        sr_ratio: side r of the squares of tokens that a strided convolution and a normalisation merge into one key; needs
            `split_qkv`.
        split_qkv: two projections, `q` and `kv`, in place of `qkv`.
        use_bias: whether there are position biases.
        use_dwc: whether there is the depthwise convolution of the values.
        agent_source: "pool", or "learned": agents are parameters (`agent_tokens`).
        scale: factor of the logits of both softmaxes; None: 1 / sqrt(d).
        bias_grid: side of the square tables.

    Shape: x (B, P + N, C), N = H * W row-major, context (B, M, C) -> (B, P + N, C). `grid_size` may be left out where N is the
    size of `window_size`. `attention_mask` (B, P + N), or (B, M) with a context: true or 1 for real tokens.

    Raises:
        ValueError: heads that do not divide `dim`, a number of agents that is no square, options that do not go together, a grid
            that is not N tokens or that `sr_ratio` does not divide, a mask of another form.
        TypeError: no `grid_size` where it cannot be told.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        agent_num: int = 49,
        window_size: int | Grid | None = (14, 14),
        agent_grid: Grid | None = None,
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        split_qkv: bool = False,
        use_bias: bool = True,
        use_dwc: bool = True,
        agent_source: str = "pool",
        scale: float | None = None,
        bias_grid: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_head_split(num_heads, self.num_kv_heads)
        self.agent_num, self.agent_side = agent_num, _square_root(agent_num)
        self.window_size = None if window_size is None else positive_grid("window_size", window_size)
        square = (self.agent_side, self.agent_side)
        self.agent_grid = square if agent_grid is None else positive_grid("agent_grid", agent_grid)
        check_choice("agent_source", agent_source, AGENT_SOURCES)
        self.agent_source, self.num_prefix_tokens, self.sr_ratio, self.split_qkv = (
            agent_source,
            num_prefix_tokens,
            sr_ratio,
            split_qkv,
        )
        self._check_options(num_prefix_tokens, bias_grid)
        self.scale = self.head_dim**-0.5 if scale is None else scale

        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self._sizes = (inner, kv_inner, kv_inner)
        if split_qkv:
            self.q = nn.Linear(dim, inner, bias=qkv_bias, **factory)
            self.kv = nn.Linear(dim, 2 * kv_inner, bias=qkv_bias, **factory)
        else:
            self.qkv = nn.Linear(dim, inner + 2 * kv_inner, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, eps=1e-5, **factory)
        if use_bias and self.window_size is not None:
            self.create_tables(
                num_heads,
                agent_num,
                self.window_size,
                key_window=(self.window_size[0] // sr_ratio, self.window_size[1] // sr_ratio),
                num_prefix_tokens=num_prefix_tokens,
                bias_grid=bias_grid,
                **factory,
            )
        if agent_source == "learned":
            self.agent_tokens = nn.Parameter(torch.empty(1, agent_num, inner, **factory))
        self.dwc: nn.Module | None = None
        if use_dwc:
            if self.window_size is None:
                self.dwc = nn.Conv1d(inner, inner, kernel_size=3, padding=1, groups=inner, **factory)
            else:
                self.dwc = DepthwiseConv2d(inner, **factory)
        self.proj = nn.Linear(inner, dim, **factory)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _check_options(self, num_prefix_tokens: int, bias_grid: int) -> None:
        """Raise ValueError for options that do not go together."""
        if num_prefix_tokens < 0 or bias_grid < 1 or self.sr_ratio < 1:
            raise ValueError(
                "num_prefix_tokens is at least 0, bias_grid and sr_ratio at least 1; got "
                f"num_prefix_tokens={num_prefix_tokens}, bias_grid={bias_grid}, sr_ratio={self.sr_ratio}"
            )
        if self.agent_source == "learned" and self.agent_grid != (self.agent_side, self.agent_side):
            raise ValueError(f"learned agents are not pooled: leave out agent_grid={self.agent_grid}")
        if self.sr_ratio > 1:
            if not self.split_qkv:
                raise ValueError(f"sr_ratio={self.sr_ratio} projects queries and keys of different tokens: give split_qkv=True")
            if num_prefix_tokens or self.window_size is None:
                raise ValueError(
                    f"sr_ratio={self.sr_ratio} merges tokens of a grid: it goes neither with num_prefix_tokens={num_prefix_tokens} "
                    "(only 0) nor with window_size=None"
                )
            if min(self.window_size) < self.sr_ratio:
                raise ValueError(
                    f"window_size={self.window_size} leaves no key with sr_ratio={self.sr_ratio}; the largest that does is "
                    f"{min(self.window_size)}"
                )

    def reset_parameters(self) -> None:
        """The official initialisation: truncated normal projections and tables, PyTorch's defaults elsewhere."""
        super().reset_parameters()
        for module in self.children():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.reset_tables()
        if self.agent_source == "learned":
            trunc_normal_(self.agent_tokens, std=0.02)

    def set_window_size(self, window_size: int | Grid) -> None:
        """Resample the tables to another grid. Raises ValueError for one that is not positive, or for a sequence's module."""
        if self.window_size is None:
            raise ValueError("window_size=None is for sequences without a grid: there is nothing to resize")
        self.window_size = rows, columns = positive_grid("window_size", window_size)
        if self.has_tables:
            self.resize_tables((rows, columns), (rows // self.sr_ratio, columns // self.sr_ratio))

    # --- forward ------------------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, *, grid_size: Grid | None = None, context: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        check_tokens(x, self.dim)
        check_context(context, self.dim, self.dim)
        grid = self._resolve_grid(x, grid_size)
        if grid is not None and context is None and attention_mask is None and self._is_one_node(x, grid):
            return drop(self.proj_drop, agent_layer(x, self._layer(grid)))
        mask = padding_mask(attention_mask, x if context is None else context)
        q, k, v, key_grid, key_mask = self._project(x, context, grid, mask)
        agents = self._make_agents(q, grid, mask if context is None else None)
        out = agent_attention(
            split_heads(q, self.num_heads),
            split_heads(k, self.num_kv_heads),
            split_heads(v, self.num_kv_heads),
            split_heads(agents, self.num_heads),
            key_bias=None if key_grid is None else self.key_bias(key_grid, self.agent_grid, q.dtype),
            query_bias=None if grid is None else self.query_bias(grid, self.agent_grid, q.dtype),
            key_mask=key_mask,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        out = merge_heads(out)
        if self.dwc is not None and context is None:
            out = self._add_convolution(out, v, grid, key_grid, key_mask)
        return self.proj_drop(self.proj(out))

    def _is_one_node(self, x: Tensor, grid: Grid) -> bool:
        """Whether our kernels serve the whole layer, nothing in it is adapted or quantised, and nobody looks on."""
        if self.agent_source != "pool" or self.sr_ratio > 1 or self.num_kv_heads != self.num_heads:
            return False
        if type(self.q_norm) is not nn.Identity or not is_bare(self.proj):
            return False
        if not (is_bare(self.q) and is_bare(self.kv) if self.split_qkv else is_bare(self.qkv)):
            return False
        if self.dwc is not None and not is_bare(self.dwc, DepthwiseConv2d):
            return False
        dropout_p = self.attn_drop if self.training else 0.0
        return self._takes_layer(x, grid, self.agent_grid, self.head_dim, dropout_p)

    def _layer(self, grid: Grid) -> AgentLayer:
        """The layer's parameters, for the kernels."""
        kv, kv_bias = weight_and_bias(self.kv) if self.split_qkv else (None, None)
        key_tables, query_tables = self._tables()
        return AgentLayer(
            self.num_prefix_tokens,
            grid,
            self.agent_grid,
            self.num_heads,
            self.scale,
            Parts.of(self.q if self.split_qkv else self.qkv, self.proj, self.dwc),
            kv,
            kv_bias,
            key_tables,
            query_tables,
        )

    def _resolve_grid(self, x: Tensor, grid_size: Grid | None) -> Grid | None:
        """The grid of the tokens after the prefix; None for a sequence."""
        tokens = max(x.shape[1] - self.num_prefix_tokens, 0)
        if self.window_size is None:
            if grid_size is not None:
                raise ValueError(f"window_size=None is for sequences without a grid: leave out grid_size={grid_size}")
            if not tokens:
                raise ValueError(
                    f"no tokens to pool agents from: x has {x.shape[1]}, of which num_prefix_tokens={self.num_prefix_tokens}"
                )
            return None
        if grid_size is None:
            if tokens != math.prod(self.window_size):
                raise TypeError(
                    f"grid_size is needed: x has {tokens} tokens after its prefix, and window_size={self.window_size} "
                    f"stands for {math.prod(self.window_size)}"
                )
            return self.window_size
        height, width = grid_size
        if height * width != tokens or height < 1:  # asked here first: at each call a view would take the host some microseconds
            check_grid(x[:, self.num_prefix_tokens :], grid_size)
        if height % self.sr_ratio or width % self.sr_ratio:
            nearest = tuple(max(1, round(side / self.sr_ratio)) * self.sr_ratio for side in (height, width))
            raise ValueError(f"grid_size={(height, width)} is not divisible by sr_ratio={self.sr_ratio}; the nearest is {nearest}")
        return height, width

    def _project(
        self, x: Tensor, context: Tensor | None, grid: Grid | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Grid | None, Tensor | None]:
        """q, k and v before the split into heads; the grid of the keys where the biases know it, and which keys are real."""
        key_grid = grid
        if context is not None:  # the tables say something of a context that has their own size
            known = self.window_size is not None and context.shape[1] == self.num_prefix_tokens + math.prod(self.window_size)
            key_grid = self.window_size if known else None
        if self.split_qkv:
            source = x if context is None else context
            if self.sr_ratio > 1:
                source, key_grid, mask = self._reduce(source, key_grid, mask)
            q = self.q(x)
            k, v = self.kv(source).chunk(2, dim=-1)
        else:
            q, k, v = project_qkv(self.qkv, x, context, self._sizes)
        return (
            self._normalise(self.q_norm, q, self.num_heads),
            self._normalise(self.k_norm, k, self.num_kv_heads),
            v,
            key_grid,
            mask,
        )

    def _reduce(self, source: Tensor, grid: Grid | None, mask: Tensor | None) -> tuple[Tensor, Grid, Tensor | None]:
        """Merge r x r tokens into one; masked ones are zeros there, and a merged token is real if one of its tokens is."""
        if grid is None or any(side % self.sr_ratio for side in grid):
            raise ValueError(
                f"sr_ratio={self.sr_ratio} merges squares of the keys' tokens: context must have the {self.window_size} tokens of "
                f"window_size, divisible by sr_ratio; got {source.shape[1]} tokens"
            )
        if mask is not None:
            source = source.masked_fill(~mask[..., None], 0.0)
            mask = F.max_pool2d(mask.unflatten(1, grid)[:, None].float(), self.sr_ratio).flatten(1) > 0
        merged = self.sr(to_image(source, grid))
        return self.norm(merged.flatten(2).transpose(1, 2)), (merged.shape[2], merged.shape[3]), mask

    @staticmethod
    def _normalise(norm: nn.Module, x: Tensor, num_heads: int) -> Tensor:
        return x if isinstance(norm, nn.Identity) else norm(x.unflatten(-1, (num_heads, -1))).flatten(2)

    def _make_agents(self, q: Tensor, grid: Grid | None, mask: Tensor | None) -> Tensor:
        """(B, N, h * d) -> (B or 1, n, h * d)."""
        if self.agent_source == "learned":
            return self.agent_tokens.to(q.dtype)
        start = self.num_prefix_tokens
        return pool_agents(q[:, start:], grid, self.agent_grid, None if mask is None else mask[:, start:])

    def _add_convolution(self, out: Tensor, v: Tensor, grid: Grid | None, key_grid: Grid | None, mask: Tensor | None) -> Tensor:
        """Add DWC(V) to the tokens after the prefix."""
        if mask is not None:
            v = v.masked_fill(~mask[..., None], 0.0)
        if self.num_kv_heads != self.num_heads:  # every query head gets the values that it reads
            v = v.unflatten(-1, (self.num_kv_heads, -1)).repeat_interleave(self.num_heads // self.num_kv_heads, dim=2).flatten(2)
        assert self.dwc is not None
        prefix, tokens, values = None, out, v
        if before := self.num_prefix_tokens:
            prefix, tokens = out.split([before, out.shape[1] - before], 1)
            values = v[:, before:]
        if grid is None or key_grid is None:
            tokens = tokens + self.dwc(values.transpose(1, 2)).transpose(1, 2).to(out.dtype)
        else:
            if key_grid != grid:
                values = resize_grid(to_image(values, key_grid), grid).to(v.dtype).flatten(2).transpose(1, 2)
            tokens = add_convolution(tokens.unflatten(1, grid), values.unflatten(1, grid), self.dwc).flatten(1, 2)
        return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)

    # --- conversion ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, table_std: float = 0.0, **options: Any
    ) -> Self:
        """Build agent attention from the weights of a multi-head attention: q, k, v and proj are kept, everything else is new.

        Not function-preserving: a head's map has rank n at most. Position biases and the convolution start at zero, so that the
        layer starts as pure agent attention, to be fine-tuned. Memory is not shared with the source. From a module, its dropout
        rates, scale and train mode are taken over.

        Args:
            source: an attention module or its state dict: fused `qkv` and `proj`, or separate projections; grouped key/value heads
                are kept.
            num_heads: heads of the source; needed for a state dict, and for modules without a `num_heads`.
            table_std: standard deviation of the position biases.
            options: further constructor arguments (`window_size`, `num_prefix_tokens`, `agent_num`, ...); they win over the
                settings of the source. A source with `q_norm` and `k_norm` needs qk_norm=True and its norm_layer.

        Raises:
            ValueError: a causal source, or tensors that are missing or have no place here; all of them are listed.
        """
        if getattr(source, "is_causal", False):
            raise ValueError("the source is causal: agents are means over all queries, future ones too")
        state = split_projections(source)
        inner, dim = state["q.weight"].shape
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim = resolve_head_dim(inner, num_heads)
        settings: dict[str, Any] = {
            "head_dim": head_dim,
            "num_kv_heads": state["k.weight"].shape[0] // head_dim,
            **projection_settings(state),
            **noncausal_settings(source),
        }
        module = cls(dim, num_heads, **{**settings, **options})
        module._load_softmax_attention(state)
        module.reset_tables(table_std)
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def _load_softmax_attention(self, state: Mapping[str, Tensor]) -> None:
        """Copy the projections (and the normalisations), and still the convolution."""
        own = {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in {"q", "k", "v"}}
        own.setdefault("proj.bias", state["proj.weight"].new_zeros(self.dim))
        for kind in ("weight", "bias"):
            if f"q.{kind}" in state:
                q, k, v = (state[f"{name}.{kind}"] for name in "qkv")
                own |= (
                    {f"q.{kind}": q, f"kv.{kind}": torch.cat([k, v])} if self.split_qkv else {f"qkv.{kind}": torch.cat([q, k, v])}
                )
        if self.dwc is not None:
            own |= {f"dwc.{name}": torch.zeros_like(tensor) for name, tensor in self.dwc.state_dict().items()}
        current = self.state_dict()
        new = {name for name in current if name.endswith("_bias") or name.partition(".")[0] in {"agent_tokens", "sr", "norm"}}
        refuse_tensors(
            type(self).__name__, [n for n in current if n not in own and n not in new], [n for n in own if n not in current]
        )
        self.load_state_dict(own, strict=False)

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, agents={self.agent_grid}, window_size={self.window_size}"
        defaults = {"num_kv_heads": self.num_heads, "agent_source": "pool", "num_prefix_tokens": 0, "sr_ratio": 1}
        changed = {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
        return text + "".join(f", {name}={value!r}" for name, value in changed.items())


@pure_function("agent", use_bias=False, use_dwc=False)
def pooled_agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    dropout_p: float,
    real: Tensor | None = None,
    grid_size: Grid | None = None,
    num_prefix_tokens: int = 0,
    agent_num: int = 49,
    agent_grid: Grid | None = None,
) -> Tensor:
    """`AgentAttention` without position biases and convolution, as a function: over a grid, or along a sequence without one.

    Shape: q (B, H, P + N, d), k, v (B, G, P + N, d) -> (B, H, P + N, d).
    """
    if agent_grid is None:
        agent_grid = (_square_root(agent_num),) * 2
    tokens = merge_heads(q)[:, num_prefix_tokens:]
    if not tokens.shape[1]:
        raise ValueError("no tokens to pool agents from")
    agents = pool_agents(tokens, grid_size, agent_grid, None if real is None else real[:, num_prefix_tokens:])
    return agent_attention(q, k, v, split_heads(agents, q.shape[1]), key_mask=real, scale=scale, dropout_p=dropout_p)


def _square_root(agent_num: int) -> int:
    """a with a * a = n. Raises ValueError for a number of agents that is no square."""
    side = math.isqrt(max(agent_num, 0))
    if agent_num < 1 or side * side != agent_num:
        nearest = min((max(side, 1) ** 2, (side + 1) ** 2), key=lambda n: abs(n - agent_num))
        raise ValueError(f"agent_num must be a square, got {agent_num}; the nearest is {nearest}")
    return side


def positive_grid(name: str, value: int | Grid) -> Grid:
    """A grid from its sides or from the side of a square. Raises ValueError for sides that are not two or not positive."""
    sides = tuple(int(side) for side in to_2tuple(value))
    if len(sides) != 2 or min(sides) < 1:
        nearest = tuple(max(side, 1) for side in (*sides, 1, 1)[:2])
        raise ValueError(f"{name} must be (H, W), both at least 1, or one number for both; got {value}, the nearest is {nearest}")
    return sides


def padding_mask(attention_mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """(B, M) boolean. Raises ValueError for any other kind of mask."""
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point() or attention_mask.shape != keys.shape[:2]:
        raise ValueError(
            f"attention_mask must be padding, {tuple(keys.shape[:2])} boolean or integer: agents read for all queries alike; got "
            f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()


def noncausal_settings(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the source's attributes tell."""
    if not isinstance(source, nn.Module):
        return {}
    found = {name: value for name, value in source_settings(source).items() if name in {"attn_drop", "proj_drop"}}
    if isinstance(scale := getattr(source, "scale", None), float):
        found["scale"] = scale
    return found
