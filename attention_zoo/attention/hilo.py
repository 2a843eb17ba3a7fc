"""HiLo attention: some heads look closely at small windows, the others see the whole grid through window means.

Fast Vision Transformers with HiLo Attention, arXiv 2205.13213, 2022. Follows the official code (ziplab/LITv2); grids that the
window does not divide are zero-padded on the right and bottom before any projection, as in its dense-prediction backbone.
Deviations: the grid may be of any shape (`grid_size`); dropout and query/key normalisation are options; `pad_mode="mask"` keeps
padding out of windows and means; `output_proj="full"` mixes all heads, which a converted softmax attention needs; the softmax is
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.base import (
    AttentionModule,
    attend,
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
from attention_zoo.ops._one_node import weight_and_bias
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.hilo import hilo_attention, pool_windows, too_wide, with_window_means
from attention_zoo.ops.hilo_layer import HiloSettings, hilo_layer
from attention_zoo.ops.windows import takes_windows
from attention_zoo.registry import register_attention

__all__ = ["HiLoAttention"]

PAD_MODES = ("zero", "mask")
OUTPUT_PROJECTIONS = ("split", "full")
_TOKENS_AT_ONCE = 4096  # on a CPU, of all samples together, for each thread
_LAYERS = ("h_qkv", "l_q", "l_kv", "h_proj", "l_proj", "proj")


@register_attention(
    "hilo",
    title="Fast Vision Transformers with HiLo Attention",
    arxiv="2205.13213",
    year=2022,
    repository="ziplab/LITv2",
    patterns={"noncausal_self"},
    spatial=True,
    cost="O(N s^2 (1 - alpha) C + (N / s)^2 alpha C)",
    engines=("triton", "flash", "torch", "xformers", "flex"),
)
class HiLoAttention(AttentionModule):
    """HiLo attention: high-frequency heads attend inside small windows, low-frequency heads to the means of all windows.

        y = [Y_h, Y_l]                                     h_l = floor(alpha h) Lo-Fi heads, h - h_l Hi-Fi heads
        Y_h = concat_i(softmax(q_i k_i^T / sqrt(d)) v_i) W_hp    keys: the s x s tokens of the query's window
        Y_l = concat_j(softmax(q_j k_j^T / sqrt(d)) v_j) W_lp    keys: k, v = P W_lkv of P = the mean of every window

    | paper | here |
    |---|---|
    | N_h, d | `num_heads`, `head_dim` |
    | alpha, s | `alpha`, `window_size` |
    | heads of the two branches | `h_heads`, `l_heads` |
    | Hi-Fi: W_q, W_k, W_v; W_hp | rows of `h_qkv`, in this order; `h_proj` |
    | Lo-Fi: W_q; W_k, W_v; W_lp | `l_q`; rows of `l_kv`; `l_proj` |
    | one W_o for both (output_proj="full") | `proj`, columns [Hi-Fi, Lo-Fi] |

    With window_size=1 a window is a token: every head becomes Lo-Fi, whatever alpha, and the result is multi-head attention.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads of both branches together.
        head_dim: channels d per head; None: dim / num_heads. Others need output_proj="full".
        window_size: side s of the windows.
        alpha: share of the heads that are Lo-Fi, from 0 to 1; the number is rounded down.
        qkv_bias: whether `h_qkv`, `l_q` and `l_kv` have a bias.
        qk_scale: factor of the logits; None (or 0): 1 / sqrt(d).
        qk_norm: normalise q and k per head with `norm_layer`; both branches share the two normalisations.
        norm_layer: class of those normalisations, called with the number of channels.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.
        pad_mode: what stands in the cells that fill up the last windows. "zero": tokens of zeros that count in the means and are
            attended to; "mask": nothing. The same where s divides H and W.
        output_proj: "split": one projection for each branch, side by side; "full": one over all heads.

    Shape: x (B, N, C), N = H * W row-major -> (B, N, C).

    Raises:
        ValueError: heads that do not divide `dim`, alpha or a window out of range, an unknown mode, a grid that is not N tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad_mode: str = "zero",
        output_proj: str = "split",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("pad_mode", pad_mode, PAD_MODES)
        check_choice("output_proj", output_proj, OUTPUT_PROJECTIONS)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.h_heads, self.l_heads = self.count_heads(num_heads, alpha, window_size)
        self.window_size, self.alpha, self.pad_mode, self.output_proj = window_size, alpha, pad_mode, output_proj
        self.scale = qk_scale or self.head_dim**-0.5
        inner, h_dim, l_dim = (heads * self.head_dim for heads in (num_heads, self.h_heads, self.l_heads))
        if output_proj == "split" and inner != dim:
            raise ValueError(
                f"output_proj='split' puts the heads' channels side by side, so head_dim={self.head_dim} times "
                f"num_heads={num_heads} must be dim={dim}; head_dim={dim / num_heads:g} is, or use output_proj='full'"
            )
        if self.l_heads:
            self.l_q = nn.Linear(dim, l_dim, bias=qkv_bias, **factory)
            self.l_kv = nn.Linear(dim, 2 * l_dim, bias=qkv_bias, **factory)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * h_dim, bias=qkv_bias, **factory)
        if output_proj == "full":
            self.proj = nn.Linear(inner, dim, **factory)
        else:
            if self.l_heads:
                self.l_proj = nn.Linear(l_dim, l_dim, **factory)
            if self.h_heads:
                self.h_proj = nn.Linear(h_dim, h_dim, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    @staticmethod
    def count_heads(num_heads: int, alpha: float, window_size: int) -> tuple[int, int]:
        """Heads of the Hi-Fi and of the Lo-Fi branch. Raises ValueError when alpha or the window is out of range."""
        if not 0.0 <= alpha <= 1.0:
            nearest = 1 if alpha > 1 else 0
            raise ValueError(f"alpha is the share of Lo-Fi heads, from 0 to 1; got {alpha}, the nearest is {nearest}")
        if window_size < 1 or window_size != int(window_size):
            raise ValueError(
                f"window_size must be a positive whole number, got {window_size}; the nearest is {max(1, int(window_size))}"
            )
        l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        return num_heads - l_heads, l_heads

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        high_heads: Sequence[int] | None = None,
        output_proj: str = "full",
        **options: Any,
    ) -> Self:
        """Build HiLo from the weights of a multi-head attention: every head keeps its q, k and v, in one of the two branches.

        The mean of a window's keys is the key of its mean, so that Lo-Fi keys are the window means of the source's. The result
        computes what the source does with window_size=1, and with alpha=0 on a grid of one whole window, if `output_proj` is
        "full" or one branch has all heads. Memory is not shared with the source. From a module, its dropout rates, scale and
        train mode are taken over. Class tokens have to be taken off by the caller.

        Args:
            source: an attention module or its state dict: timm's or the zoo's fused `qkv` and `proj`, or separate projections.
            num_heads: heads of the source; needed for a state dict, and for modules without a `num_heads`.
            high_heads: which heads of the source become Hi-Fi, in this order (the most local ones are a good choice); this sets
                alpha. None: as many of the first as `alpha` says.
            output_proj: "full" keeps the source's output projection; "split" keeps its two diagonal blocks.
            options: further constructor arguments; they win over the settings of the source. A source with `q_norm` and `k_norm`
                needs qk_norm=True and its norm_layer.

        Raises:
            ValueError: a causal or grouped source, heads that it does not have, both `alpha` and `high_heads`, or tensors that are
                missing or have no place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), kv_shape = state["q.weight"].shape, tuple(state["k.weight"].shape)
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        if kv_shape != (inner, dim) or inner % num_heads:
            raise ValueError(
                "HiLo needs as many key/value heads as query heads, all of the same tokens: with "
                f"{num_heads} heads, q.weight is {(inner, dim)} and k.weight {kv_shape}"
            )
        settings = {
            "head_dim": inner // num_heads,
            **projection_settings(state),
            "output_proj": output_proj,
            **_source_settings(source, inner // num_heads),
        }
        order = list(range(num_heads))
        if high_heads is not None:
            order, options["alpha"] = _order_heads(num_heads, list(high_heads), options)
        module = cls(dim, num_heads, **{**settings, **options})
        if high_heads is not None and module.h_heads != len(high_heads):
            raise ValueError(f"window_size={module.window_size} makes every head Lo-Fi: leave out high_heads={list(high_heads)}")
        module._load_softmax_attention(state, order)
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def _load_softmax_attention(self, state: Mapping[str, Tensor], order: Sequence[int]) -> None:
        """Copy q, k, v, proj (and the normalisations); `order` lists the source's heads, Hi-Fi first."""
        width, h_dim = self.head_dim, self.h_heads * self.head_dim
        channels = torch.cat([torch.arange(head * width, (head + 1) * width) for head in order])
        own: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            if f"q.{kind}" in state:
                rows = [state[f"{name}.{kind}"][channels.to(state[f"{name}.{kind}"].device)] for name in "qkv"]
                own[f"h_qkv.{kind}"] = torch.cat([r[:h_dim] for r in rows])
                own[f"l_q.{kind}"] = rows[0][h_dim:]
                own[f"l_kv.{kind}"] = torch.cat([r[h_dim:] for r in rows[1:]])
        weight = state["proj.weight"][:, channels.to(state["proj.weight"].device)]
        bias = state.get("proj.bias", weight.new_zeros(self.dim))
        if self.output_proj == "full":
            own |= {"proj.weight": weight, "proj.bias": bias}
        else:
            own |= {"h_proj.weight": weight[:h_dim, :h_dim], "h_proj.bias": bias[:h_dim]}
            own |= {"l_proj.weight": weight[h_dim:, h_dim:], "l_proj.bias": bias[h_dim:]}
        own |= {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in {"q", "k", "v", "proj"}}
        own = {name: tensor for name, tensor in own.items() if tensor.numel()}  # a branch without heads has no parameters
        load_converted(self, own)

    def forward(self, x: Tensor, *, grid_size: tuple[int, int]) -> Tensor:
        check_tokens(x, self.dim)
        height, width = check_grid(x, grid_size)
        if self._is_fused(x):
            return drop(self.proj_drop, self._attend_fused(x, (height, width)))
        if self.output_proj == "full":
            return self.proj_drop(self.proj(torch.cat(self._attend_branches(x, height, width), dim=-1)))
        layers = [*([self.h_proj] if self.h_heads else []), *([self.l_proj] if self.l_heads else [])]
        if len(layers) == 2 and self._writes_in_place(x):
            return self.proj_drop(self._attend_in_parts(x, height, width))
        branches = self._attend_branches(x, height, width)
        return self.proj_drop(torch.cat([layer(branch) for layer, branch in zip(layers, branches, strict=True)], dim=-1))

    def _attend_branches(self, x: Tensor, height: int, width: int, project: _Project | None = None) -> list[Tensor]:
        """What each branch has before its output projection, (B, N, heads * d); `project`: how a layer is applied to tokens."""
        image, real = self._pad(x.unflatten(1, (height, width)))
        project = _apply if project is None else project
        branches = []
        if self.h_heads:
            branches.append(self._attend_in_windows(image, real, project)[:, :height, :width].flatten(1, 2))
        if self.l_heads:
            branches.append(self._attend_to_means(x, image, real, project))
        return branches

    def _writes_in_place(self, x: Tensor) -> bool:
        """Whether a CPU only computes: nothing is recorded, traced, cast, drawn at random or looked at."""
        if type(x) is not Tensor or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        quiet = not (self.training and self.attn_drop) and not torch.is_autocast_enabled("cpu") and not ops.is_observed()
        return quiet and self._is_bare()

    def _attend_in_parts(self, x: Tensor, height: int, width: int) -> Tensor:
        """A few samples at a time, projections into memory that all of them use, both of the outputs written where they belong.

        So there is no copy to put the branches side by side, and little fresh memory, whose pages the system has to clear first:
        together more than a tenth of the time at 14 x 14 tokens of 768 channels, batch 64.
        """
        out, few = x.new_empty(x.shape), max(1, torch.get_num_threads() * _TOKENS_AT_ONCE // x.shape[1])
        layers, rooms = (self.h_proj, self.l_proj), dict[nn.Module, Tensor]()

        def project(layer: nn.Module, x: Tensor) -> Tensor:
            weight, bias = weight_and_bias(layer)
            shape = (*x.shape[:-1], weight.shape[0])
            size = math.prod(shape)
            room = rooms.get(layer)
            if room is None:  # the first samples are as many as any
                room = rooms[layer] = x.new_empty(size)
            place = room[:size].view(-1, shape[-1])
            if bias is None:
                torch.mm(x.flatten(0, -2), weight.t(), out=place)
            else:
                torch.addmm(bias, x.flatten(0, -2), weight.t(), out=place)
            return place.view(shape)

        for some, part in zip(x.split(few), out.split(few), strict=True):
            places = part.flatten(0, 1).split([layer.out_features for layer in layers], -1)
            for layer, branch, place in zip(layers, self._attend_branches(some, height, width, project), places, strict=True):
                torch.addmm(layer.bias, branch.flatten(0, 1), layer.weight.t(), out=place)
        return out

    def _is_fused(self, x: Tensor) -> bool:
        """Whether our kernels take both branches at once: where they serve, nothing is to be dropped, and nobody looks on."""
        if not (self.h_heads and self.l_heads and isinstance(self.q_norm, nn.Identity)) or ops.is_observed():
            return False
        if not self._is_bare():
            return False
        dropout_p = self.attn_drop if self.training else 0.0
        return takes_windows(x, self.window_size, self.head_dim, dropout_p, too_wide(self.head_dim, x.dtype))

    def _is_bare(self) -> bool:
        """Whether the layers are their weights and biases."""
        return all(is_bare(layer) for name, layer in self._modules.items() if name in _LAYERS and layer is not None)

    def _attend_fused(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """The same with one matrix product for all that is projected from the tokens, and one for the outputs of both branches."""
        (height, width), s = grid_size, self.window_size
        (rows, columns), masked = grid_size, self.pad_mode == "mask"
        if not masked and self.h_qkv.bias is not None and (height % s or width % s):  # the keys of padding are the bias
            image, _ = self._pad(x.unflatten(1, grid_size))
            rows, columns = image.shape[1:3]
            x = image.flatten(1, 2)
        heads = self.h_heads, self.l_heads
        if (rows, columns) == grid_size and stands_alone(x):
            return self._in_one_node(x, HiloSettings(grid_size, s, heads, self.scale, masked))
        image, means = with_window_means(x.unflatten(1, (rows, columns)), s, mask_padding=masked)
        weight, bias = torch.cat([self.h_qkv.weight, self.l_q.weight]), _join(self.h_qkv.bias, self.l_q.bias)
        qkv, kv = F.linear(image.flatten(1, 2), weight, bias), self.l_kv(means)
        out = hilo_attention(qkv, kv, grid_size=(rows, columns), window_size=s, heads=heads, scale=self.scale, mask_padding=masked)
        if (rows, columns) != grid_size:
            out = out.unflatten(1, (rows, columns))[:, :height, :width].flatten(1, 2)
        return self._project(out)

    def _in_one_node(self, x: Tensor, settings: HiloSettings) -> Tensor:
        """The same with one node of autograd, whose books take longer than a GPU takes for a small map."""
        layers = self._modules
        names = ("proj",) if self.output_proj == "full" else ("h_proj", "l_proj")
        (high, high_bias), (query, query_bias), (kv, kv_bias) = (weight_and_bias(layers[n]) for n in ("h_qkv", "l_q", "l_kv"))
        out_weights, out_biases = zip(*(weight_and_bias(layers[name]) for name in names), strict=True)
        return hilo_layer(x, settings, (high, query, kv), (high_bias, query_bias, kv_bias), out_weights, out_biases)

    def _project(self, out: Tensor) -> Tensor:
        """Output projections of both branches as one matrix product: its zeros cost less than a second one and a copy."""
        if self.output_proj == "full":
            return F.linear(out, self.proj.weight, self.proj.bias)
        weight = torch.block_diag(self.h_proj.weight, self.l_proj.weight)
        return F.linear(out, weight, torch.cat([self.h_proj.bias, self.l_proj.bias]))

    def _pad(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, H', W', C), multiples of s; and which cells are real, (H', W'), None where all may be attended to."""
        height, width = image.shape[1:3]
        below, right = -height % self.window_size, -width % self.window_size
        if not (below or right):
            return image, None
        real = None
        if self.pad_mode == "mask":
            real = F.pad(torch.ones(height, width, dtype=torch.bool, device=image.device), (0, right, 0, below))
        return F.pad(image, (0, 0, 0, right, 0, below)), real

    def _attend_in_windows(self, image: Tensor, real: Tensor | None, project: _Project) -> Tensor:
        """Hi-Fi: (B, H', W', C) -> (B, H', W', h_heads * d)."""
        s, (batch, height, width, _) = self.window_size, image.shape
        qkv = _to_windows(project(self.h_qkv, image), s)
        # (windows, s^2, 3, heads, d)
        q, k, v = qkv.unflatten(-1, (3, self.h_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if real is not None:
            keys = _to_windows(real[None, :, :, None], s)[None, :, None, None, :, 0]  # (1, windows of an image, 1, 1, s^2)
            mask = keys.expand(batch, -1, -1, -1, -1).flatten(0, 1)
        out = attend(self, self.q_norm(q), self.k_norm(k), v, attention_mask=mask, scale=self.scale)
        cells = merge_heads(out).unflatten(0, (batch, height // s, width // s)).unflatten(3, (s, s))
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _attend_to_means(self, x: Tensor, image: Tensor, real: Tensor | None, project: _Project) -> Tensor:
        """Lo-Fi: queries of x (B, N, C), keys from the windows of the image (B, H', W', C) -> (B, N, l_heads * d)."""
        s, pooled = self.window_size, x
        if s > 1:
            pooled = pool_windows(image, s)
        if real is not None:  # the mean over real tokens only
            pooled = pooled / pool_windows(real[None, :, :, None].to(x.dtype), s)
        q = split_heads(project(self.l_q, x), self.l_heads)
        k, v = (split_heads(t, self.l_heads) for t in project(self.l_kv, pooled).chunk(2, dim=-1))
        return merge_heads(attend(self, self.q_norm(q), self.k_norm(k), v, scale=self.scale))

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads} (Hi-Fi {self.h_heads}, Lo-Fi {self.l_heads}), head_dim={self.head_dim}"
        text += f", window_size={self.window_size}, alpha={self.alpha}"
        return text + (f", pad_mode={self.pad_mode!r}" if self.pad_mode != "zero" else "")


_Project = Callable[[nn.Module, Tensor], Tensor]


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    projected: Tensor = layer(x)
    return projected


def _join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _to_windows(image: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, size^2, C), windows and the tokens inside them row-major."""
    height, width = image.shape[1:3]
    blocks = image.unflatten(2, (width // size, size)).unflatten(1, (height // size, size))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _source_settings(source: nn.Module | Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Constructor arguments that the source's attributes tell. Raises ValueError for a causal source: it has no grid."""
    if not isinstance(source, nn.Module):
        return {}
    if getattr(source, "is_causal", False):
        raise ValueError("the source is causal: HiLo attends both ways over a grid of image patches")
    found = {name: value for name, value in source_settings(source).items() if name in {"attn_drop", "proj_drop"}}
    scale = getattr(source, "scale", None)
    if isinstance(scale, float) and not math.isclose(scale, head_dim**-0.5):
        found["qk_scale"] = scale
    return found


def _order_heads(num_heads: int, high_heads: list[int], options: Mapping[str, Any]) -> tuple[list[int], float]:
    """The heads with the Hi-Fi ones first, and the alpha that gives as many Lo-Fi heads as are left."""
    if "alpha" in options:
        raise ValueError(f"high_heads={high_heads} says which and how many heads are Hi-Fi: leave out alpha={options['alpha']}")
    if len(set(high_heads)) != len(high_heads) or not set(high_heads) <= set(range(num_heads)):
        raise ValueError(f"high_heads must be different numbers from 0 to {num_heads - 1}, got {high_heads}")
    low_heads = [head for head in range(num_heads) if head not in high_heads]
    alpha = len(low_heads) / num_heads
    if int(num_heads * alpha) < len(low_heads):  # the quotient was rounded down
        alpha = math.nextafter(alpha, 1.0)
    return high_heads + low_heads, alpha
