"""Bi-level routing attention: a router picks, for each region of the grid, a few regions, and only their tokens are attended to.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810, 2023. Follows the official code
(rayleizhu/BiFormer), whose two implementations are `pad_mode` "input" (or "none") and "qkv"; with soft routing keys are weighted as
well as values.
Deviations: `pad_mode="mask"`, the default, lets padding neither route nor be attended to (all modes agree where the regions divide
the grid); `topk` is clamped to the number of regions; routing is float32 whatever the dtype; dropout, other numbers of regions
along the two sides, and prefix tokens are options; the softmax is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import (
    AttentionModule,
    check_choice,
    check_grid,
    check_tokens,
    drop,
    is_bare,
    merge_heads,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import load_converted, projection_settings, source_heads, source_settings, split_projections
from attention_zoo.attention.functional import pure_function
from attention_zoo.attention.lepe import LocalPositionEncoding
from attention_zoo.ops._one_node import Parts
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.routed_layer import RoutedLayer, routed_layer
from attention_zoo.ops.routed_map import Regions, best_regions, routed_map_attention, takes_map, with_values
from attention_zoo.registry import register_attention

__all__ = ["BiLevelRoutingAttention", "bi_level_routing"]

PAD_MODES = ("none", "input", "qkv", "mask")
KV_DOWNSAMPLES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")
ROUTINGS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))  # soft, diff, param


class _BiLevelRouting:
    """The attention between tokens that are projected already; the attributes are `BiLevelRoutingAttention`'s."""

    num_heads: int
    n_win: tuple[int, int]
    topk: int
    kv_downsample: str
    kv_per_win: int
    kv_downsample_ratio: int
    param_routing: bool
    diff_routing: bool
    soft_routing: bool
    pad_mode: str
    num_prefix_tokens: int
    scale: float
    attn_drop: float
    training: bool
    lepe: nn.Module | None
    router: Any

    def cut_grid(self, grid_size: tuple[int, int]) -> Regions:
        """The regions of a grid. Raises ValueError when the pad mode does not allow it."""
        (height, width), (rows, columns) = grid_size, self.n_win
        if self.pad_mode == "qkv":
            if height < rows or width < columns:
                raise ValueError(
                    f"pad_mode='qkv' needs a token for each region: grid_size must be at least {self.n_win}, got {grid_size}"
                )
            region = (height // rows, width // columns)
            return Regions(-(-height // region[0]), -(-width // region[1]), *region)
        regions = Regions(rows, columns, -(-height // rows), -(-width // columns))
        if any(regions.padding(grid_size)):
            multiple = (rows * regions.height, columns * regions.width)
            if self.pad_mode == "none":
                raise ValueError(
                    f"n_win={self.n_win} does not divide grid_size={grid_size}; {multiple} would do, or another pad_mode"
                )
            if self.pad_mode == "mask" and self.kv_downsample != "identity":
                raise ValueError(
                    f"n_win={self.n_win} does not divide grid_size={grid_size}, and pooling a region of which a part is not there "
                    f"is undefined; {multiple} would do, or pad_mode='input'"
                )
        return regions

    def _attend_to_routed(
        self,
        q: tuple[Tensor, Tensor],
        k: tuple[Tensor, Tensor],
        v: tuple[Tensor, Tensor],
        grid_size: tuple[int, int],
        regions: Regions,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The grid's own tokens (B, N, C) before the output projection, and their routing."""
        size = (v[1].shape[1], v[1].shape[2])
        padding = regions.padding(size)
        queries, keys, values = (regions.cut(_pad(t[1], padding)) for t in (q, k, v))  # (B, R, n, C)
        real = None
        if any(padding):
            ones = torch.ones(1, *size, 1, dtype=torch.bool, device=queries.device)
            real = regions.cut(_pad(ones, padding))[0, :, :, 0]  # (R, n)
        routing = self.route(queries, keys, real)
        shared = [split_heads(t[0], self.num_heads) if self.num_prefix_tokens else None for t in (k, v)]
        out = ops.routed_attention(
            self._split_heads(queries),
            self._split_heads(self._downsample(keys, regions)),
            self._split_heads(self._downsample(values, regions)),
            routing[0],
            route_weights=routing[1] if self.soft_routing else None,
            key_mask=real if self.pad_mode == "mask" else None,
            shared_k=shared[0],
            shared_v=shared[1],
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        image = regions.join(out.permute(0, 2, 3, 1, 4).flatten(3))[:, : size[0], : size[1]]
        if self.lepe is not None:
            image = image + self.lepe(v[1])
        return image[:, : grid_size[0], : grid_size[1]].flatten(1, 2), routing

    def _attend_to_all(
        self, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], grid_size: tuple[int, int]
    ) -> Tensor:
        """The prefix tokens (B, P, C): they see every token of the grid, and no padding."""
        height, width = grid_size
        keys, values = (torch.cat([first, image[:, :height, :width].flatten(1, 2)], dim=1) for first, image in (k, v))
        parts = (split_heads(t, self.num_heads) for t in (q[0], keys, values))
        out = ops.attention(*parts, scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0)
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        return merge_heads(out)

    def route(self, queries: Tensor, keys: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k regions whose mean key suits each region's mean query best, and their softmax weights.

        Args:
            queries, keys: (B, R, n, qk_dim).
            real: (R, n), which tokens are; the others are zeros. None: all.

        Returns: numbers of regions (B, R, k), int64, and weights (B, R, k), float32 (float64 for float64).
        """
        if not self.diff_routing:
            queries, keys = queries.detach(), keys.detach()
        with ops.no_autocast(queries):  # near-ties would fall differently in low precision
            q_mean, k_mean = (_region_means(t, real) for t in (queries, keys))
            if self.param_routing:
                emb = self.router["emb"]
                weight = next(emb.parameters())
                q_mean, k_mean = (emb(t.to(weight.dtype)).to(t.dtype) for t in (q_mean, k_mean))
            logits = (self.scale * q_mean) @ k_mean.transpose(-2, -1)  # (B, R, R)
            if real is not None and self.pad_mode == "mask":
                logits = logits.masked_fill(~real.any(1), -torch.inf)
            best, routes = logits.topk(min(self.topk, logits.shape[-1]), dim=-1)
            return routes, best.softmax(-1)

    def _downsamples(self) -> bool:
        return self.kv_downsample != "identity" and (self.kv_downsample_ratio != 1 or self.kv_downsample.startswith("ada_"))

    def _downsample(self, x: Tensor, regions: Regions) -> Tensor:
        """Keys or values (B, R, n, C), pooled inside each region: (B, R, n', C)."""
        if not self._downsamples():
            return x
        side = self.kv_downsample_ratio
        size = (regions.height, regions.width)
        maps = x.flatten(0, 1).transpose(1, 2).unflatten(2, size)
        if self.kv_downsample.startswith("ada_"):
            pool = F.adaptive_avg_pool2d if self.kv_downsample == "ada_avgpool" else F.adaptive_max_pool2d
            pooled = pool(maps, self.kv_per_win)
        elif min(size) < side:
            raise ValueError(
                f"regions of {size} tokens leave no key after pooling by kv_downsample_ratio={side}; "
                f"use at most {min(size)}, or a larger grid"
            )
        else:
            pooled = (F.avg_pool2d if self.kv_downsample == "avgpool" else F.max_pool2d)(maps, side)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (x.shape[0], x.shape[1]))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, R, n, H * D) -> (B, H, R, n, D), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)


@register_attention(
    "bra",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arxiv="2303.08810",
    year=2023,
    repository="rayleizhu/BiFormer",
    patterns={"noncausal_self"},
    spatial=True,
    cost="O(S^4 C + N^2 k C / S^2 + N s^2 C)",
    engines=("triton", "flash", "torch", "xformers", "flex"),
)
class BiLevelRoutingAttention(_BiLevelRouting, AttentionModule):
    """Bi-level routing attention: the tokens of a region attend to those of the k regions that suit its mean query best.

        A^r = Q^r (K^r)^T                                   Q^r, K^r: means of the queries and keys of each of S x S regions
        I^r = topk(A^r)                                     rows: a list of k regions for each region, shared by all heads
        K^g, V^g = gather(K, I^r), gather(V, I^r)           times softmax(A^r at I^r) with soft_routing
        O = softmax(scale Q (K^g)^T) V^g + LePE(V)          y = O W_o

    | paper | here |
    |---|---|
    | S, k | `n_win`, `topk` |
    | Q^r (K^r)^T, I^r | `route`, which gives the k best and their softmax |
    | W^q, W^k, W^v | rows of `qkv`, in this order |
    | LePE | `lepe`, depthwise, kernel `side_dwconv` |
    | W^o | `proj` |

    A region need not choose itself: topk=1 is not window attention. With topk the number of regions and no LePE, this is multi-head
    attention.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads.
        n_win: S, regions along each side of the grid, or along its height and its width.
        topk: regions k that each region attends to; all, where there are fewer.
        qk_dim: channels of queries and keys, all heads together; None: dim.
        qk_scale: factor of the logits and of the routing's; None (or 0): 1 / sqrt(qk_dim), not of a head's channels.
        side_dwconv: side of LePE's kernel, odd; 0: no LePE.
        qkv_bias: whether `qkv` has a bias.
        out_proj: whether there is `proj`.
        kv_downsample: pooling of the keys and values inside each region before attention: "identity" (none), "ada_avgpool" or
            "ada_maxpool" to `kv_per_win` x `kv_per_win` tokens, "avgpool" or "maxpool" of `kv_downsample_ratio` x
            `kv_downsample_ratio` tokens. Routing and LePE see them as they were.
        kv_per_win: side of what the adaptive poolings leave of a region.
        kv_downsample_ratio: side of the windows of the other two.
        param_routing: the region means pass a linear layer `router.emb` first; needs diff_routing.
        diff_routing: the routing weights have a gradient; needs soft_routing.
        soft_routing: keys and values of a region count times its routing weight.
        pad_mode: where S does not divide the grid. "none": an error; "input": zeros fill the grid before the projection, and are
            tokens as any other; "qkv": regions of floor(H / S) x floor(W / S), as many as are needed, filled with queries, keys and
            values of zero that are attended to; "mask": S x S regions, what fills them is not there.
        num_prefix_tokens: tokens before the grid, a class token for instance. All tokens attend to them and they to all; they take
            no part in routing and LePE.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.

    Shape: x (B, P + N, C), P = num_prefix_tokens, N = H * W row-major -> (B, P + N, C). With return_routing=True also the regions
        (B, R, k), int64, the best first, and their softmax weights (B, R, k), 0 where fewer than k are real.

    Raises:
        ValueError: heads that do not divide `dim` or `qk_dim`, options out of range or that do not go together, a grid that is not
            N tokens, that the regions do not divide ("none"; "mask" with pooling), or that is too small for them ("qkv", pooling).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        n_win: int | tuple[int, int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 3,
        qkv_bias: bool = True,
        out_proj: bool = True,
        kv_downsample: str = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        pad_mode: str = "mask",
        num_prefix_tokens: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads)
        self.qk_dim = dim if qk_dim is None else qk_dim
        self.qk_head_dim = resolve_head_dim(self.qk_dim, num_heads)
        self.n_win: tuple[int, int] = to_2tuple(n_win)
        self.topk, self.side_dwconv, self.num_prefix_tokens, self.pad_mode = topk, side_dwconv, num_prefix_tokens, pad_mode
        self.kv_downsample, self.kv_per_win, self.kv_downsample_ratio = kv_downsample, kv_per_win, kv_downsample_ratio
        self.param_routing, self.diff_routing, self.soft_routing = param_routing, diff_routing, soft_routing
        self._check_options(out_proj)
        self.scale = qk_scale or self.qk_dim**-0.5
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, bias=qkv_bias, **factory)
        if param_routing:
            self.router = nn.ModuleDict({"emb": nn.Linear(self.qk_dim, self.qk_dim, **factory)})
        self.lepe = LocalPositionEncoding(dim, side_dwconv, **factory) if side_dwconv else None
        self.proj: nn.Module = nn.Linear(dim, dim, **factory) if out_proj else nn.Identity()
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    def _check_options(self, out_proj: bool) -> None:
        check_choice("pad_mode", self.pad_mode, PAD_MODES)
        check_choice("kv_downsample", self.kv_downsample, KV_DOWNSAMPLES)
        if len(self.n_win) != 2:
            raise ValueError(f"n_win must be one number of regions, or two, along height and width; got {self.n_win}")
        counts: dict[str, Any] = {"n_win": min(self.n_win), "topk": self.topk}
        if self.kv_downsample != "identity":
            name = "kv_per_win" if self.kv_downsample.startswith("ada_") else "kv_downsample_ratio"
            counts[name] = getattr(self, name)
        for name, value in counts.items():
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a positive whole number, got {value}; the nearest is {max(1, int(value))}")
        if self.num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be at least 0, got {self.num_prefix_tokens}")
        flags = (self.soft_routing, self.diff_routing, self.param_routing)
        if flags not in ROUTINGS:
            raise ValueError(
                "diff_routing needs soft_routing, and param_routing needs diff_routing: without them no gradient reaches the "
                f"router; got soft_routing={flags[0]}, diff_routing={flags[1]}, param_routing={flags[2]}"
            )
        if self.pad_mode == "qkv":
            given = {"soft_routing": self.soft_routing, "out_proj=False": not out_proj}
            given |= {f"kv_downsample={self.kv_downsample!r}": self.kv_downsample != "identity"}
            given |= {f"qk_dim={self.qk_dim}": self.qk_dim != self.dim}
            if any(given.values()):
                names = ", ".join(name for name, is_given in given.items() if is_given)
                raise ValueError(f"pad_mode='qkv' follows an implementation that has no {names}; pad_mode='mask' or 'input' has")

    @classmethod
    def from_softmax_attention(
        cls, source: nn.Module | Mapping[str, Tensor], *, num_heads: int | None = None, **options: Any
    ) -> Self:
        """Build BRA from the weights of a multi-head attention.

        LePE starts at zero and the logits keep the source's scale, so that with topk = all regions (and, on grids that the regions
        do not divide, pad_mode="mask") the result computes what the source does; then lower topk step by step. Memory is not shared
        with the source. From a module, its dropout rates, scale and train mode are taken over.

        Args:
            source: an attention module or its state dict: timm's or the zoo's fused `qkv` and `proj`, or separate projections.
            num_heads: heads of the source; needed for a state dict, and for modules without a `num_heads`.
            options: further constructor arguments; they win over the settings of the source.

        Raises:
            ValueError: a causal or grouped source, heads whose channels are not dim / num_heads, pooled keys, or tensors without a
                place here (normalised queries and keys); all of them are listed.
        """
        state = split_projections(source)
        num_heads = source_heads(source, state["q.weight"].shape[0]) if num_heads is None else num_heads
        shapes = {name: tuple(state[f"{name}.weight"].shape) for name in ("q", "k", "v", "proj")}
        dim = shapes["q"][1]
        if set(shapes.values()) != {(dim, dim)}:
            raise ValueError(
                f"BRA needs as many key/value heads as query heads, together as wide as the tokens; got weights {shapes}"
            )
        if (kind := options.get("kv_downsample", "identity")) != "identity":
            raise ValueError(f"kv_downsample={kind!r} pools keys that the source attends to one by one; convert with 'identity'")
        if not options.get("out_proj", True):
            raise ValueError("the source has an output projection: out_proj=False would drop it")
        settings = {"qk_scale": (dim // num_heads) ** -0.5, **projection_settings(state)}
        module = cls(dim, num_heads, **{**settings, **_source_settings(source), **options})
        own = {"qkv.weight": torch.cat([state.pop(f"{name}.weight") for name in "qkv"])}
        if "q.bias" in state:
            own["qkv.bias"] = torch.cat([state.pop(f"{name}.bias") for name in "qkv" if f"{name}.bias" in state])
        own |= {"proj.bias": state["proj.weight"].new_zeros(dim), **state}
        started = {name: torch.zeros_like(t) for name, t in module.state_dict().items() if name.startswith("lepe.")}
        started |= {name: t for name, t in module.state_dict().items() if name.startswith("router.")}
        load_converted(module, {**started, **own})
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def forward(
        self, x: Tensor, *, grid_size: tuple[int, int], return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, self.dim)
        before = min(self.num_prefix_tokens, x.shape[1])
        image = x[:, before:] if before else x
        grid_size = check_grid(image, grid_size)
        regions = self.cut_grid(grid_size)
        if self._attends_on_map(x, grid_size, regions):
            out, routes, best = (self._in_one_node if self._is_one_node(x) else self._on_map)(x, grid_size, regions)
            out = drop(self.proj_drop, out)
            return (out, routes, best.softmax(-1)) if return_routing else out
        q, k, v = self._project(x[:, :before], image.unflatten(1, grid_size), regions)
        out, routing = self._attend_to_routed(q, k, v, grid_size, regions)
        if self.num_prefix_tokens:
            out = torch.cat([self._attend_to_all(q, k, v, grid_size), out], dim=1)
        out = self.proj_drop(self.proj(out))
        return (out, *routing) if return_routing else out

    def _attends_on_map(self, x: Tensor, grid_size: tuple[int, int], regions: Regions) -> bool:
        """Whether regions that tile the map are all there is to the attention, nobody looks on, and the kernels serve it."""
        more = self.num_prefix_tokens or self.param_routing or self.diff_routing or self._downsamples()
        if more or any(regions.padding(grid_size)) or ops.is_observed():
            return False
        return takes_map(x, regions, max(self.head_dim, self.qk_head_dim), dropout_p=self.attn_drop if self.training else 0.0)

    def _is_one_node(self, x: Tensor) -> bool:
        """Whether, besides, the layers are their weights and biases."""
        if not (stands_alone(x) and is_bare(self.qkv) and is_bare(self.proj)):
            return False
        return self.lepe is None or is_bare(self.lepe, LocalPositionEncoding)

    def _in_one_node(self, x: Tensor, grid_size: tuple[int, int], regions: Regions) -> tuple[Tensor, Tensor, Tensor]:
        """As `_on_map`."""
        return routed_layer(
            x,
            RoutedLayer(
                regions,
                self.qk_dim,
                self.num_heads,
                self.scale,
                min(self.topk, regions.rows * regions.columns),
                self.soft_routing,
                Parts.of(self.qkv, self.proj, self.lepe),
            ),
        )

    def _on_map(self, x: Tensor, grid_size: tuple[int, int], regions: Regions) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, the routes and their products, without a region being cut out."""
        qkv = self.qkv(x)
        qkv = qkv.view(qkv.shape[0], *grid_size, qkv.shape[2])
        routes, best = best_regions(
            qkv[..., : 2 * self.qk_dim], regions, scale=self.scale, topk=min(self.topk, regions.rows * regions.columns)
        )
        weights = best.softmax(-1) if self.soft_routing else None
        qkv, values = with_values(qkv, 2 * self.qk_dim)
        out = routed_map_attention(
            qkv, routes, regions, qk_dim=self.qk_dim, heads=self.num_heads, scale=self.scale, route_weights=weights
        )
        if self.lepe is not None:
            out = self.lepe(values, add=out) if type(self.lepe) is LocalPositionEncoding else out + self.lepe(values)
        return self.proj(out.flatten(1, 2)), routes, best

    def _project(self, prefix: Tensor, image: Tensor, regions: Regions) -> tuple[tuple[Tensor, Tensor], ...]:
        """q, k and v, each as prefix tokens (B, P, C) and map (B, H, W, C), or with pad_mode="input" the whole padded map."""
        if self.pad_mode == "input":
            image = _pad(image, regions.padding((image.shape[1], image.shape[2])))
        tokens = image.flatten(1, 2)
        if self.num_prefix_tokens:
            tokens = torch.cat([prefix, tokens], dim=1)
        parts = self.qkv(tokens).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        start, size = self.num_prefix_tokens, (image.shape[1], image.shape[2])
        return tuple((part[:, :start], part[:, start:].unflatten(1, size)) for part in parts)

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, pad_mode={self.pad_mode!r}"
        flags = [name for name in ("soft_routing", "diff_routing", "param_routing") if getattr(self, name)]
        text += "".join(f", {name}=True" for name in flags)
        return text + (f", kv_downsample={self.kv_downsample!r}" if self.kv_downsample != "identity" else "")


class _Routing(_BiLevelRouting):
    """The same without parameters."""

    param_routing, lepe, training = False, None, True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            setattr(self, name, value)


def _refuse_input_padding(*, pad_mode: str, **_: Any) -> None:
    if pad_mode == "input":
        raise ValueError(
            "pad_mode='input' pads before the projections, and a function of q, k and v comes after them; 'mask' does not"
        )


@pure_function("bra", check=_refuse_input_padding, side_dwconv=0)
def bi_level_routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    n_win: int | tuple[int, int] = 7,
    topk: int = 4,
    kv_downsample: str = "identity",
    kv_per_win: int = 4,
    kv_downsample_ratio: int = 4,
    soft_routing: bool = False,
    diff_routing: bool = False,
    pad_mode: str = "mask",
) -> Tensor:
    """`BiLevelRoutingAttention` without LePE and router, as a function; routing and logits have the host's scale.

    Shape: q (B, H, P + N, D), k, v (B, G, P + N, D), N row-major on the grid -> (B, H, P + N, D).
    """
    num_heads = q.shape[1]
    routing = _Routing(
        {
            "num_heads": num_heads,
            "n_win": to_2tuple(n_win),
            "topk": topk,
            "kv_downsample": kv_downsample,
            "kv_per_win": kv_per_win,
            "kv_downsample_ratio": kv_downsample_ratio,
            "soft_routing": soft_routing,
            "diff_routing": diff_routing,
            "pad_mode": pad_mode,
            "num_prefix_tokens": num_prefix_tokens,
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "attn_drop": dropout_p,
        }
    )
    tokens = [merge_heads(t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // t.shape[1], 1)) for t in (q, k, v)]
    parts = [(t[:, :num_prefix_tokens], t[:, num_prefix_tokens:].unflatten(1, grid_size)) for t in tokens]
    maps = (parts[0], parts[1], parts[2])
    out, _ = routing._attend_to_routed(*maps, grid_size, routing.cut_grid(grid_size))
    if num_prefix_tokens:
        out = torch.cat([routing._attend_to_all(*maps, grid_size), out], dim=1)
    return split_heads(out, num_heads)


def _pad(image: Tensor, padding: tuple[int, int]) -> Tensor:
    """(B, H, W, C) with zeros (False) below and on the right."""
    below, right = padding
    return F.pad(image, (0, 0, 0, right, 0, below)) if below or right else image


def _region_means(x: Tensor, real: Tensor | None) -> Tensor:
    """(B, R, n, C) -> (B, R, C), in at least float32; 0 for a region without real tokens."""
    work = torch.promote_types(x.dtype, torch.float32)
    if real is None:
        return x.mean(2, dtype=work)
    return x.sum(2, dtype=work) / real.sum(1).clamp_min(1).to(work)[:, None]


def _source_settings(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the source's attributes tell. Raises ValueError for a causal source: it has no grid."""
    if not isinstance(source, nn.Module):
        return {}
    if getattr(source, "is_causal", False):
        raise ValueError("the source is causal: BRA attends both ways, and a region's mean holds tokens that come later")
    found = {name: value for name, value in source_settings(source).items() if name in {"attn_drop", "proj_drop"}}
    if isinstance(scale := getattr(source, "scale", None), float):
        found["qk_scale"] = scale
    return found
