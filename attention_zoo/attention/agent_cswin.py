"""Agent attention in stripes: CSwin's two branches, vertical and horizontal stripes of the grid, each read through agents.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023. Follows the official code
(LeapLabTHU/Agent-Attention), whose stripes and value convolution are those of CSWin Transformer, arXiv 2107.00652.
Deviations: the grid may be of any shape (`grid_size`): tables are resampled to it, and what fills up the last stripe is neither
pooled, nor read, nor convolved; padding masks, the grid of the agents and the scale are options; the softmaxes are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.agent import (
    AgentTables,
    DepthwiseConv2d,
    add_convolution,
    agent_attention,
    noncausal_settings,
    padding_mask,
    pool_agents,
    positive_grid,
)
from attention_zoo.attention.base import (
    AttentionModule,
    check_choice,
    check_grid,
    check_tokens,
    drop,
    has_hooks,
    is_bare,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import projection_settings, refuse_tensors, source_heads, split_projections
from attention_zoo.ops._one_node import Parts, weight_and_bias
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.agent_layer import AgentLayer, agent_layer
from attention_zoo.ops.stripe_layer import StripeSettings, stripe_layer, takes_layer
from attention_zoo.registry import register_attention

__all__ = ["AgentCSwinAttention", "AgentStripes", "SoftmaxStripes"]

Grid = tuple[int, int]

WHOLE, VERTICAL, HORIZONTAL = -1, 0, 1  # the official idx


class _Stripes(AgentTables):
    """Attention inside the stripes of one branch, on projected q, k and v, plus a depthwise convolution of v per stripe (`get_v`).

    Args:
        dim: channels of the branch.
        num_heads: its heads.
        resolution: side or (H, W) of the grid that it is meant for.
        idx: -1: one stripe, the whole grid; 0: vertical stripes (H x split_size); 1: horizontal ones (split_size x W).
        split_size: width of the stripes.
        scale: factor of the logits; None: 1 / sqrt(dim / num_heads).
        attn_drop: dropout rate on the attention weights.

    Shape: qkv (3, B, N, C), N = H * W row-major -> (B, N, C). `mask` (B, N), true for real tokens.

    Raises:
        ValueError: heads that do not divide `dim`, an unknown idx, stripes without width, a grid that is not N tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        resolution: int | Grid,
        idx: int = WHOLE,
        split_size: int = 1,
        scale: float | None = None,
        attn_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("idx", idx, (WHOLE, VERTICAL, HORIZONTAL))
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads)
        self.resolution, self.idx, self.split_size = positive_grid("resolution", resolution), idx, split_size
        if split_size < 1:
            raise ValueError(f"split_size must be positive, got {split_size}; the nearest is 1")
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.get_v = DepthwiseConv2d(dim, device=device, dtype=dtype)

    def stripe(self, grid_size: Grid) -> Grid:
        """Height and width of the stripes of a grid."""
        height, width = grid_size
        if self.idx == WHOLE:
            return grid_size
        return (height, min(self.split_size, width)) if self.idx == VERTICAL else (min(self.split_size, height), width)

    def forward(self, qkv: Tensor, *, grid_size: Grid, mask: Tensor | None = None) -> Tensor:
        q, k, v = qkv.unbind(0)
        check_tokens(q, self.dim, "each of q, k and v")
        grid = check_grid(q, grid_size)
        stripe = self.stripe(grid)
        real = _real_tokens(q, grid, stripe, mask)
        if stripe != grid:
            q, k, v = _to_stripes(qkv, grid, stripe).unbind(0)
        if real is not None:
            v = v.masked_fill(~real[..., None], 0.0)
        out = self.attend(q, k, v, stripe, real)
        out = add_convolution(out.unflatten(1, stripe), v.unflatten(1, stripe), self.get_v).flatten(1, 2)
        return _from_stripes(out, grid, stripe)

    def set_resolution(self, resolution: int | Grid) -> None:
        """Be meant for another grid. Raises ValueError for one that is not positive."""
        self.resolution = positive_grid("resolution", resolution)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stripe: Grid, real: Tensor | None) -> Tensor:
        """q, k, v (B * stripes, tokens of a stripe, C) -> the same; `real` (B * stripes, tokens), None: all are."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, idx={self.idx}, split_size={self.split_size}, resolution={self.resolution}"


class SoftmaxStripes(_Stripes):
    """CSwin's own branch: softmax(q k^T / sqrt(d)) v + get_v(v) in every stripe. Arguments and shapes as `_Stripes` has them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stripe: Grid, real: Tensor | None) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        mask = None if real is None else real[:, None, None, :]
        out = ops.attention(q, k, v, attn_mask=mask, scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0)
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        return merge_heads(out)


class AgentStripes(_Stripes):
    """Agent attention in every stripe, with agents of its own; stripes share the tables, which have a stripe's size.

    Args:
        agent_num: agents of each stripe, a square.
        agent_grid: grid of those that are pooled; None: as the tables have them.
        bias_grid: side of the square tables.
        others: as `_Stripes` has them.

    Raises:
        ValueError: a number of agents that is no square, and what `_Stripes` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        resolution: int | Grid,
        idx: int = WHOLE,
        split_size: int = 1,
        agent_num: int = 49,
        agent_grid: int | Grid | None = None,
        bias_grid: int = 7,
        scale: float | None = None,
        attn_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            dim, num_heads, resolution=resolution, idx=idx, split_size=split_size, scale=scale, attn_drop=attn_drop, **factory
        )
        self.create_tables(num_heads, agent_num, self.stripe(self.resolution), bias_grid=bias_grid, **factory)
        square = (self.agent_side, self.agent_side)
        self.agent_grid = square if agent_grid is None else positive_grid("agent_grid", agent_grid)
        self.reset_tables()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_tables()

    def set_resolution(self, resolution: int | Grid) -> None:
        """Resample the tables to the stripes of another grid."""
        super().set_resolution(resolution)
        self.resize_tables(self.stripe(self.resolution))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stripe: Grid, real: Tensor | None) -> Tensor:
        agents = pool_agents(q, stripe, self.agent_grid, real)
        out = agent_attention(
            *(split_heads(t, self.num_heads) for t in (q, k, v, agents)),
            key_bias=self.key_bias(stripe, self.agent_grid, q.dtype),
            query_bias=self.query_bias(stripe, self.agent_grid, q.dtype),
            key_mask=real,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return merge_heads(out)

    def whole_layer(self, x: Tensor, qkv: nn.Module, proj: nn.Module, grid: Grid, dropout_p: float) -> Tensor | None:
        """The layer of which this is the only branch, with one stripe; None where the kernels do not serve it."""
        if not self._takes_layer(x, grid, self.agent_grid, self.head_dim, dropout_p):
            return None
        parts = Parts.of(qkv, proj, self.get_v)
        return agent_layer(x, AgentLayer(0, grid, self.agent_grid, self.num_heads, self.scale, parts, None, None, *self._tables()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, agents={self.agent_grid}"


@register_attention(
    "agent_cswin",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    arxiv="2312.08874",
    year=2023,
    repository="LeapLabTHU/Agent-Attention",
    patterns={"noncausal_self"},
    spatial=True,
    padding_masks_only=True,
    cost="O(N n C)",
    engines=("triton", "torch", "flash", "xformers", "flex"),
)
class AgentCSwinAttention(AttentionModule):
    """Agent attention over the whole grid, or with half the heads in vertical and half in horizontal stripes of it.

        y = [O_1, O_2] W_o                                     one branch, or two with C/2 channels and h/2 heads each
        A = Pool(Q),   V_A = softmax(A K^T / sqrt(d) + B_k) V        in every stripe (H x s, or s x W) of the branch
        O = softmax(Q A^T / sqrt(d) + B_q) V_A + get_v(V)            get_v: 3x3 depthwise, zeros outside of the stripe

    | paper | here |
    |---|---|
    | h, d; s | `num_heads`, `head_dim`; `split_size` |
    | W_q, W_k, W_v; W_o | rows of `qkv`, in this order; `proj` |
    | A, n; B_k, B_q; get_v | of each of the branches `attns`: see `AgentAttention`, whose DWC is `get_v` here |

    With use_agents=False the branches are CSwin's own: O = softmax(Q K^T / sqrt(d)) V + get_v(V) in every stripe.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h of all branches together.
        resolution: side or (H, W) of the grid that the tables are allocated for; other grids resample them.
        split_size: width s of the stripes. None, or no less than the resolution: one branch, the whole grid.
        agent_num: agents n of each stripe, a square.
        agent_grid: grid of the agents that are pooled; None: sqrt(n) x sqrt(n). The tables keep n agents.
        use_agents: False for CSwin's softmax attention in the stripes.
        bias_grid: side of the square tables.
        qkv_bias: whether `qkv` has a bias.
        scale: factor of the logits; None: 1 / sqrt(d).
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, N, C), N = H * W row-major -> (B, N, C). `attention_mask` (B, N): true or 1 for real tokens.

    Raises:
        ValueError: channels that do not share out over the heads or heads over the branches, a number of agents that is no square,
            a grid that is not N tokens, a mask of another form.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        resolution: int | Grid = (14, 14),
        split_size: int | None = None,
        agent_num: int = 49,
        agent_grid: int | Grid | None = None,
        use_agents: bool = True,
        bias_grid: int = 7,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads)
        self.resolution, self.split_size, self.use_agents = positive_grid("resolution", resolution), split_size, use_agents
        whole = split_size is None or split_size >= max(self.resolution)
        sides = (WHOLE,) if whole else (VERTICAL, HORIZONTAL)
        if num_heads % len(sides):
            raise ValueError(
                f"two branches of stripes share the heads: num_heads={num_heads} must be even; the nearest is {num_heads + 1}"
            )
        shared: dict[str, Any] = {"resolution": resolution, "split_size": 1 if split_size is None else split_size}
        shared |= {"scale": scale, "attn_drop": attn_drop, **factory}
        own: dict[str, Any] = {"agent_num": agent_num, "agent_grid": agent_grid, "bias_grid": bias_grid} if use_agents else {}
        branch: type[_Stripes] = AgentStripes if use_agents else SoftmaxStripes
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.attns: Any = nn.ModuleList(
            branch(dim // len(sides), num_heads // len(sides), idx=idx, **shared, **own) for idx in sides
        )
        self.proj = nn.Linear(dim, dim, **factory)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initialisation: truncated normal projections and tables, PyTorch's default for `get_v`."""
        super().reset_parameters()
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def set_resolution(self, resolution: int | Grid) -> None:
        """Resample the tables to another grid; the number of branches stays. Raises ValueError for one that is not positive."""
        self.resolution = positive_grid("resolution", resolution)
        for branch in self.attns:
            branch.set_resolution(resolution)

    def forward(self, x: Tensor, *, grid_size: Grid, attention_mask: Tensor | None = None) -> Tensor:
        check_tokens(x, self.dim)
        if attention_mask is None and (out := self._in_one_node(x, check_grid(x, grid_size))) is not None:
            return drop(self.proj_drop, out)
        mask = padding_mask(attention_mask, x)
        qkv = self.qkv(x).unflatten(-1, (3, -1)).movedim(2, 0)  # (3, B, N, C)
        parts = qkv.split(self.dim // len(self.attns), dim=-1)
        outs = [attn(part, grid_size=grid_size, mask=mask) for attn, part in zip(self.attns, parts, strict=True)]
        return self.proj_drop(self.proj(torch.cat(outs, dim=-1)))

    def _in_one_node(self, x: Tensor, grid: Grid) -> Tensor | None:
        """What our kernels make of the whole layer; None where they do not serve it, or somebody has to see a part of it."""
        if not stands_alone(x) or ops.is_observed() or not (is_bare(self.qkv) and is_bare(self.proj)):
            return None
        branches, kind = list(self.attns), AgentStripes if self.use_agents else SoftmaxStripes
        if any(type(b) is not kind or has_hooks(b) or not is_bare(b.get_v, DepthwiseConv2d) for b in branches):
            return None
        branch = branches[0]
        dropout_p = branch.attn_drop if branch.training else 0.0
        if self.use_agents:
            return branch.whole_layer(x, self.qkv, self.proj, grid, dropout_p) if len(branches) == 1 else None
        settings = StripeSettings(grid, tuple(b.stripe(grid) for b in branches), branch.num_heads, branch.scale)
        if not takes_layer(x, settings, self.head_dim, dropout_p):
            return None
        return stripe_layer(
            x, settings, weight_and_bias(self.qkv), weight_and_bias(self.proj), [weight_and_bias(b.get_v) for b in branches]
        )

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build this mechanism from the weights of a multi-head attention: q, k, v and proj are kept; tables and `get_v` are zero.

        With use_agents=False and one branch it computes what the source does, otherwise it is a start for fine-tuning. Memory is
        not shared with the source. From a module, its dropout rates, scale and train mode are taken over.

        Args:
            source: an attention module or its state dict: fused `qkv` and `proj`, or separate projections.
            num_heads: heads of the source; needed for a state dict, and for modules without a `num_heads`.
            options: further constructor arguments (`resolution`, `agent_num`, ...); they win over the settings of the source.

        Raises:
            ValueError: a causal or grouped source, one of another width than its tokens, or tensors that are missing or have no
                place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), kv_shape = state["q.weight"].shape, tuple(state["k.weight"].shape)
        if getattr(source, "is_causal", False) or inner != dim or kv_shape != (dim, dim):
            raise ValueError(
                "stripes need a noncausal source whose queries, keys and values are as wide as its tokens; got q.weight "
                f"{(inner, dim)}, k.weight {kv_shape}, is_causal={getattr(source, 'is_causal', False)}"
            )
        weight = state["q.weight"]
        settings = {**projection_settings(state), **noncausal_settings(source)}
        module = cls(dim, source_heads(source, inner) if num_heads is None else num_heads, **{**settings, **options})
        own = {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in {"q", "k", "v"}}
        own.setdefault("proj.bias", weight.new_zeros(dim))
        own |= {f"qkv.{k}": torch.cat([state[f"{name}.{k}"] for name in "qkv"]) for k in ("weight", "bias") if f"q.{k}" in state}
        own |= {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items() if name.startswith("attns.")}
        current = module.state_dict()  # a refusal lists the tensors in the layer's own order
        refuse_tensors(cls.__name__, [n for n in current if n not in own], [n for n in own if n not in current])
        module.load_state_dict(own)
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, split_size={self.split_size}, use_agents={self.use_agents}"


def _to_stripes(x: Tensor, grid_size: Grid, stripe: Grid) -> Tensor:
    """Tokens (..., B, H * W, C) -> (..., B * stripes, tokens of a stripe, C), the last stripe filled up with zeros."""
    (height, width), (rows, columns) = grid_size, stripe
    below, right = -height % rows, -width % columns
    if (rows, columns) == (height, width):
        return x
    image = x.unflatten(-2, grid_size)
    if below or right:
        image = F.pad(image, (0, 0, 0, right, 0, below))
    image = image.unflatten(-2, (-1, columns)).unflatten(-4, (-1, rows))  # (..., B, vertical, rows, horizontal, columns, C)
    return image.transpose(-4, -3).flatten(-3, -2).flatten(-5, -3)


def _from_stripes(x: Tensor, grid_size: Grid, stripe: Grid) -> Tensor:
    """The inverse of `_to_stripes`; what filled up the last stripe is cut off."""
    (height, width), (rows, columns) = grid_size, stripe
    if (rows, columns) == (height, width):
        return x
    down, across = math.ceil(height / rows), math.ceil(width / columns)
    image = x.unflatten(1, stripe).unflatten(0, (x.shape[0] // (down * across), down, across)).transpose(2, 3)
    return image.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)


def _real_tokens(x: Tensor, grid_size: Grid, stripe: Grid, mask: Tensor | None) -> Tensor | None:
    """(B * stripes, tokens of a stripe), true for tokens that exist and that `mask` (B, N) lets through; None: all do."""
    fits = all(side % part == 0 for side, part in zip(grid_size, stripe, strict=True))
    if mask is None and fits:
        return None
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return _to_stripes(mask[..., None], grid_size, stripe)[..., 0]
