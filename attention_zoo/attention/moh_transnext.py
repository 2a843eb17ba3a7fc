"""MoH inside TransNeXt: cosine attention with learned position biases, global or foveal, whose heads each token weighs and picks.

MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, 2024, on the attentions of TransNeXt: Robust Foveal
Visual Perception for Vision Transformers, arXiv 2311.17132, 2023. Follows the official code (SkyworkAI/MoH, MoH-ViT); the
routing is `moh`'s.
Deviations: the grid may change from call to call (`grid_size`), positions and neighbourhoods follow it; the relative offsets of
grids are found by their arithmetic, not by sorting; a pretraining grid with a side of 1 counts as 2, where the code divides 0
by 0; pooled grids may be as large as the grid or larger; normalisations, length scales, position biases, softmax and gates are
float32 under mixed precision. All heads are computed and the unused ones multiplied by 0, as in the official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import check_grid, check_tokens, merge_heads, resolve_head_dim, split_heads
from attention_zoo.attention.conversion import load_converted, source_settings
from attention_zoo.attention.moh import MixtureOfHeads, work_dtype
from attention_zoo.registry import register_attention

__all__ = ["MoHTransNeXtAggregated", "MoHTransNeXtGlobal"]

Grid = tuple[int, int]

_ROUTERS = ("router", "shared_router", "balance")
_TEMPERATURE = math.log(math.expm1(1 / 0.24))  # softplus of it is 1 / 0.24


class _TransNeXtHeads(MixtureOfHeads):
    """What the two forms share: gated heads, cosine queries with an embedding and a temperature, position biases, the way out."""

    qk_layers: ClassVar[tuple[str, ...]]  # the projections of queries, keys and values, whose bias is an option

    def _create_common(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int | None,
        routed_topk: int | None,
        input_resolution: int | Sequence[int] | None,
        pretrain_resolution: int | Sequence[int] | None,
        cpb_hidden: int,
        attn_drop: float,
        proj_drop: float,
        **factory: Any,
    ) -> None:
        self.dim, self.head_dim = dim, resolve_head_dim(dim, num_heads)
        self._set_heads(num_heads, shared_heads, routed_topk)
        self.input_resolution = _as_grid("input_resolution", input_resolution)
        self.pretrain_resolution = _as_grid("pretrain_resolution", pretrain_resolution) or self.input_resolution
        if cpb_hidden < 1:
            raise ValueError(f"cpb_hidden must be positive, got {cpb_hidden}; the nearest is 1")
        self.proj = nn.Linear(dim, dim, **factory)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **factory))
        self.cpb_fc1 = nn.Linear(2, cpb_hidden, **factory)
        self.cpb_fc2 = nn.Linear(cpb_hidden, num_heads, **factory)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self._create_routers(dim, **factory)

    def reset_parameters(self) -> None:
        """The paper's initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.temperature, _TEMPERATURE)
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        shared_heads: int | None = None,
        routed_topk: int | None = None,
        **options: Any,
    ) -> Self:
        """Build this mechanism from TransNeXt's own attention, which has the same parameters but no routers.

        Routers start at zero, which makes every gate 1, and by default K = h_r: the result computes what the source does. Lower K
        with `set_topk` during fine-tuning. Memory is not shared with the source.

        Args:
            source: an attention layer of a TransNeXt or its state dict, under the official names.
            shared_heads: None: half the heads.
            routed_topk: None: all routed heads.
            options: further constructor arguments; `input_resolution` (or `pretrain_resolution`) is the grid that the source was
                trained on, and the aggregated form needs its `sr_ratio` or `pool_size`.

        Raises:
            ValueError: a source without query embeddings, temperatures and position biases: weights that learned scaled dot
                products mean nothing in a cosine attention. Or tensors that are missing or have no place here.
        """
        state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
        if not {"query_embedding", "temperature", "cpb_fc1.weight"} <= state.keys():
            raise ValueError(
                f"{cls.__name__} starts from TransNeXt's attention only: its logits are cosines with a learned temperature and "
                f"continuous position biases, which weights of another attention do not carry over to; found {', '.join(state)}"
            )
        num_heads = state["temperature"].shape[0]
        shared_heads = num_heads // 2 if shared_heads is None else shared_heads
        settings = {
            "shared_heads": shared_heads,
            "routed_topk": num_heads - shared_heads if routed_topk is None else routed_topk,
            "qkv_bias": f"{cls.qk_layers[0]}.bias" in state,
            "cpb_hidden": state["cpb_fc1.weight"].shape[0],
            "device": state["temperature"].device,
            "dtype": state["temperature"].dtype,
        }
        if "relative_pos_bias_local" in state:
            settings["window_size"] = math.isqrt(state["relative_pos_bias_local"].shape[1])
        if isinstance(source, nn.Module):
            settings |= {k: v for k, v in source_settings(source).items() if k in {"attn_drop", "proj_drop"}}
        module = cls(state["proj.weight"].shape[0], num_heads, **{**settings, **options})
        own = module.state_dict()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.split(".")[0] in _ROUTERS}
        load_converted(module, {**zeros, **state})
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, shared_heads={self.shared_heads}, "
            f"routed_topk={self.routed_topk}, pretrain_resolution={self.pretrain_resolution}"
        )

    def _position_bias(self, x: Tensor, grid: Grid, key_grid: Grid) -> Tensor:
        """(h, H * W, Hk * Wk): the MLP of every relative position that occurs, put where it occurs."""
        positions = _per_geometry(_positions, _cached_positions, x, grid, key_grid, self.pretrain_resolution or grid)
        hidden = F.relu(_linear(self.cpb_fc1, positions.coordinates))
        table = _linear(self.cpb_fc2, hidden).t().unflatten(1, (-1, positions.num_columns))  # (h, vertical, horizontal)
        bias = table.index_select(2, positions.columns.flatten()).index_select(1, positions.rows.flatten())
        bias = bias.unflatten(2, positions.columns.shape).unflatten(1, positions.rows.shape)  # (h, H, Hk, W, Wk)
        return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _mix(self, heads: Tensor, gates: Tensor) -> Tensor:
        """Heads' outputs (B, h, N, d), weighted by gates (B, N, h), through the output projection."""
        return self.proj_drop(self.proj(merge_heads(ops.gate_heads(heads, gates.transpose(1, 2)))))


@register_attention(
    "moh_transnext_global",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    year=2024,
    repository="SkyworkAI/MoH",
    patterns={"noncausal_self"},
    spatial=True,
    cost="O(N^2 C)",
    engines=("torch", "xformers", "flex", "triton"),
    silent_parameters=("cpb_fc2.bias",),
)
class MoHTransNeXtGlobal(_TransNeXtHeads):
    """TransNeXt's global attention with MoH's gates: cosine logits, scaled by the length, with continuous position biases.

        y = concat_i(g_i o_i) W_o                                g: shared and routed gates, as `moh`'s linear router makes them
        o = softmax((L2(q) + E) tau ln(N) L2(k)^T + B) v         per head; L2(v) = v / ||v||, tau = softplus(temperature)
        B = W_2 relu(W_1 t + b_1) + b_2                          t = sign(r) log_8(|r| + 1), r = 8 (p_query - p_key) / (P - 1)

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | h_s, K | `shared_heads`, `routed_topk` |
    | W_r, W_s, W_h (wg, wg_1, wg_0 in the official code) | `router`, `shared_router`, `balance` |
    | q, k, v; W_o | rows of `qkv`; `proj` |
    | E; temperature | `query_embedding`; `temperature` |
    | W_1, W_2 | `cpb_fc1`, `cpb_fc2` |
    | P, sides of the grid of pretraining | `pretrain_resolution` |
    | load-balance loss | `aux_loss`, gathered by `attention_zoo.auxiliary_loss(model)`; the paper's weight is 0.01 |

    `cpb_fc2.bias` shifts all logits of a query alike, so that here it has no effect; it is part of the official checkpoints.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h.
        input_resolution: grid, or its side, that the layer is meant for.
        shared_heads: heads h_s that every token uses, the first ones. Without this and routed_topk: h / 2.
        routed_topk: routed heads K that each token chooses, from 1 to h_r = h - h_s, or 0 when all are shared. Without this and
            shared_heads: h / 4, at least 1.
        pretrain_resolution: grid that scales positions; None: input_resolution, and without that the grid of each call.
        qkv_bias: whether `qkv` has a bias.
        cpb_hidden: hidden width of the position MLP.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, N, C), N = H * W row-major -> (B, N, C).

    Raises:
        ValueError: heads that do not divide `dim` or do not go together, sides that are not positive, a grid that is not N tokens.
    """

    qk_layers = ("qkv",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        input_resolution: int | Sequence[int] | None = None,
        shared_heads: int | None = None,
        routed_topk: int | None = None,
        pretrain_resolution: int | Sequence[int] | None = None,
        qkv_bias: bool = True,
        cpb_hidden: int = 512,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        heads = (dim, num_heads, shared_heads, routed_topk)
        factory = {"device": device, "dtype": dtype}
        self._create_common(*heads, input_resolution, pretrain_resolution, cpb_hidden, attn_drop, proj_drop, **factory)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor, *, grid_size: Grid) -> Tensor:
        self._forget_auxiliary_loss()
        check_tokens(x, self.dim)
        grid = check_grid(x, grid_size)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        gates, scores, chosen = self._route_linearly(x)
        queries, _ = ops.cosine_queries(q, self.query_embedding, self.temperature, math.log(x.shape[1]))
        bias = self._position_bias(x, grid, grid)[None]
        drop = self.attn_drop if self.training else 0.0
        keys, values = ops.unit_heads(k, self.num_heads), split_heads(v, self.num_heads)
        heads = ops.attention(queries, keys, values, bias=bias, scale=1.0, dropout_p=drop)
        assert isinstance(heads, Tensor)  # no log-normaliser was asked for
        heads = self._keep_statistics(heads, scores, chosen)
        return self._mix(heads, gates)


@register_attention(
    "moh_transnext_aggregated",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    year=2024,
    repository="SkyworkAI/MoH",
    patterns={"noncausal_self"},
    spatial=True,
    cost="O(N (w^2 + P) C)",
    engines=("triton", "reference"),
)
class MoHTransNeXtAggregated(_TransNeXtHeads):
    """TransNeXt's aggregated attention with MoH's gates: one softmax over a token's neighbours and a coarse view of the whole grid.

        y = concat_i(g_i o_i) W_o                                g: shared and routed gates, as `moh`'s linear router makes them
        o = sum_j (A_j + L2(q) T_j + b_j) v_j + sum_p A_p v_p    j: the w x w tokens around the query, p: the P pooled ones
        A = softmax([Q L2(k_j) + B_j, Q L2(k_p) + B_p])          outside the grid: -inf;  Q = (L2(q) + E) tau ln(#j + P)
        k_p, v_p: of LN(pool(GELU(S x))), by the same W_k, W_v;  B_p = W_2 relu(W_1 t + b_1) + b_2 as in `moh_transnext_global`

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | h_s, K | `shared_heads`, `routed_topk` |
    | W_r, W_s, W_h (wg, wg_1, wg_0 in the official code) | `router`, `shared_router`, `balance` |
    | w; P | `window_size`; product of `pool_grid(grid_size)` |
    | W_q; W_k, W_v; W_o | `q`; rows of `kv`; `proj` |
    | S, LN | `sr` (1x1 convolution), `norm` |
    | E; temperature, tau = softplus(temperature) | `query_embedding`; `temperature` |
    | W_1, W_2; B_j | `cpb_fc1`, `cpb_fc2`; `relative_pos_bias_local` |
    | T, b: the part of a neighbour's weight that depends on its place, not on its key | `learnable_tokens`, `learnable_bias` |
    | load-balance loss | `aux_loss`, gathered by `attention_zoo.auxiliary_loss(model)`; the paper's weight is 0.01 |

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h.
        input_resolution: grid, or its side, that the layer is meant for.
        shared_heads: heads h_s that every token uses, the first ones. Without this and routed_topk: h / 2.
        routed_topk: routed heads K that each token chooses, from 1 to h_r = h - h_s, or 0 when all are shared. Without this and
            shared_heads: h / 4, at least 1.
        window_size: side w of the neighbourhood, odd.
        pool_size: the pooled grid, or its side, whatever the grid of the call.
        sr_ratio: the pooled grid is the grid of the call over this, rounded down, at least 1. Without pool_size and this: 2.
        pretrain_resolution: grid that scales positions; None: input_resolution, and without that the grid of each call.
        qkv_bias: whether `q` and `kv` have a bias.
        cpb_hidden: hidden width of the position MLP.
        attn_drop, proj_drop: dropout rates on the attention weights (not on the part of T and b) and on the output.

    Shape: x (B, N, C), N = H * W row-major -> (B, N, C).

    Raises:
        ValueError: heads that do not divide `dim` or do not go together, an even window, both `pool_size` and `sr_ratio`, sides
            that are not positive, a grid that is not N tokens.
    """

    qk_layers = ("q", "kv")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        input_resolution: int | Sequence[int] | None = None,
        shared_heads: int | None = None,
        routed_topk: int | None = None,
        window_size: int = 3,
        pool_size: int | Sequence[int] | None = None,
        sr_ratio: int | None = None,
        pretrain_resolution: int | Sequence[int] | None = None,
        qkv_bias: bool = True,
        cpb_hidden: int = 512,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        heads = (dim, num_heads, shared_heads, routed_topk)
        factory = {"device": device, "dtype": dtype}
        self._create_common(*heads, input_resolution, pretrain_resolution, cpb_hidden, attn_drop, proj_drop, **factory)
        if window_size < 1 or window_size % 2 == 0:
            nearest = max(1, window_size + 1)
            raise ValueError(f"window_size must be odd and positive, for a middle; got {window_size}, the nearest is {nearest}")
        if pool_size is not None and sr_ratio is not None:
            raise ValueError(f"pool_size={pool_size} and sr_ratio={sr_ratio} both say how large the pooled grid is: give one")
        if sr_ratio is not None and sr_ratio < 1:
            raise ValueError(f"sr_ratio must be at least 1, got {sr_ratio}")
        self.window_size = window_size
        self.pool_size = _as_grid("pool_size", pool_size)
        self.sr_ratio = 2 if sr_ratio is None and pool_size is None else sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.sr = nn.Conv2d(dim, dim, kernel_size=1, **factory)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, **factory)
        places = window_size**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, places, **factory))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, places, **factory))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, places, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation."""
        super().reset_parameters()
        nn.init.normal_(self.sr.weight, std=math.sqrt(2 / self.dim))
        nn.init.zeros_(self.sr.bias)  # type: ignore[arg-type]
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def pool_grid(self, grid_size: Grid) -> Grid:
        """The pooled grid of a grid."""
        if self.pool_size is not None:
            return self.pool_size
        assert self.sr_ratio is not None
        return max(1, grid_size[0] // self.sr_ratio), max(1, grid_size[1] // self.sr_ratio)

    def forward(self, x: Tensor, *, grid_size: Grid) -> Tensor:
        self._forget_auxiliary_loss()
        check_tokens(x, self.dim)
        grid = check_grid(x, grid_size)
        pool = self.pool_grid(grid)
        k, v = self._keys_and_values(x)
        pooled_k, pooled_v = self._keys_and_values(self._pool(x, grid, pool))
        gates, scores, chosen = self._route_linearly(x)
        place = _per_geometry(_neighbourhood, _cached_neighbourhood, x, grid, self.window_size, pool[0] * pool[1])
        queries, directions = ops.cosine_queries(self.q(x), self.query_embedding, self.temperature, place.scale)
        heads = ops.foveal_attention(
            queries,
            directions,
            k,
            v,
            pooled_k,
            pooled_v,
            local_bias=self.relative_pos_bias_local,
            pooled_bias=self._position_bias(x, grid, pool),
            tokens=self.learnable_tokens,
            token_bias=self.learnable_bias,
            outside=place.outside,
            grid_size=grid,
            window_size=self.window_size,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        heads = self._keep_statistics(heads, scores, chosen)
        return self._mix(heads, gates)

    def _pool(self, x: Tensor, grid: Grid, pool: Grid) -> Tensor:
        """(B, N, C) -> (B, P, C)."""
        image = self.act(self.sr(x.transpose(1, 2).unflatten(2, grid)))
        pooled: Tensor = self.norm(F.adaptive_avg_pool2d(image, pool).flatten(2).transpose(1, 2))
        return pooled

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """L2(k) and v, each (B, h, N, d)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return ops.unit_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def extra_repr(self) -> str:
        coarse = f"pool_size={self.pool_size}" if self.pool_size is not None else f"sr_ratio={self.sr_ratio}"
        return f"{super().extra_repr()}, window_size={self.window_size}, {coarse}"


def _as_grid(name: str, value: int | Sequence[int] | None) -> Grid | None:
    """A grid from its sides or from the side of a square. Raises ValueError for sides that are not positive."""
    if value is None:
        return None
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name} must be (H, W), both at least 1, or one number for both; got {value}")
    return sides[0], sides[1]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of x, which is not to be rounded."""
    with ops.no_autocast(x):
        if type(layer) is nn.Linear:
            return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return layer(x.to(layer.weight.dtype)).to(x.dtype)  # adapted: its own forward is the only right one


# --- what depends on the grid only ------------------------------------------------------------------------------------------------


class _Positions(NamedTuple):
    """The relative positions of a grid's tokens and keys: `coordinates` t of each pair of offsets that occurs, (vertical *
    `num_columns`, 2), and which vertical offset stands at (row, key row), which horizontal one at (column, key column)."""

    coordinates: Tensor
    num_columns: int
    rows: Tensor  # (H, Hk)
    columns: Tensor  # (W, Wk)


class _Neighbourhood(NamedTuple):
    scale: Tensor  # (N, 1): ln of the number of keys that each token sees
    outside: Tensor  # (N, w * w): which places of its window are not in the grid


_Geometry = TypeVar("_Geometry", _Positions, _Neighbourhood)


def _per_geometry(build: Callable[..., _Geometry], cached: Callable[..., _Geometry], x: Tensor, *key: Any) -> _Geometry:
    """`build(*key, device, dtype)`, kept for the next call: all layers of a stage have the same.

    Not kept are tensors that belong to a trace or a transform, and those made in inference mode cannot be used in training.
    """
    where = (x.device, work_dtype(x))
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._are_functorch_transforms_active():
        return build(*key, *where)
    with torch.inference_mode(False):
        return cached(*key, *where)


def _positions(grid: Grid, key_grid: Grid, pretrain_grid: Grid, device: torch.device, dtype: torch.dtype) -> _Positions:
    (y, rows), (x, columns) = (
        _offsets(size, keys, trained, device, dtype) for size, keys, trained in zip(grid, key_grid, pretrain_grid, strict=True)
    )
    coordinates = torch.cartesian_prod(y, x)
    return _Positions(coordinates, x.shape[0], rows, columns)


def _offsets(size: int, num_keys: int, pretrained: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Along one side: t of every offset that occurs, ascending, and which of them stands between each token and each key, (N, M).

    A key stands at the mean of its pooling bin, so that twice an offset is a whole number.
    """
    centres = [key * size // num_keys - (-(key + 1) * size // num_keys) - 1 for key in range(num_keys)]  # twice the mean
    step = 2 if len({centre % 2 for centre in centres}) == 1 else 1
    lowest, highest = -centres[-1], 2 * (size - 1) - centres[0]
    scaled = torch.arange(lowest, highest + 1, step, device=device, dtype=dtype) * (4 / max(pretrained - 1, 1))
    t = torch.sign(scaled) * torch.log2(scaled.abs() + 1) / 3
    doubled = 2 * torch.arange(size, device=device)[:, None] - torch.tensor(centres, device=device)
    return t, (doubled - lowest) // step


def _neighbourhood(grid: Grid, window_size: int, num_pooled: int, device: torch.device, dtype: torch.dtype) -> _Neighbourhood:
    steps = torch.arange(window_size, device=device) - window_size // 2
    places = [torch.arange(size, device=device)[:, None] + steps for size in grid]
    y, x = ((place >= 0) & (place < size) for place, size in zip(places, grid, strict=True))
    inside = (y[:, None, :, None] & x[None, :, None, :]).flatten(2).flatten(0, 1)
    return _Neighbourhood(torch.log(inside.sum(-1, keepdim=True).to(dtype) + num_pooled), ~inside)


_cached_positions = lru_cache(maxsize=32)(_positions)
_cached_neighbourhood = lru_cache(maxsize=32)(_neighbourhood)
