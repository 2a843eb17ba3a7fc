"""Mixture-of-Head attention: every token uses a few shared heads and picks, for itself, a few of the others.

MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, 2024. Follows the official code (SkyworkAI/MoH) where
paper and code differ: routed gates are renormalised over the chosen heads, and gates carry the factors h_s, K and 2, so that zero
routers give gates of 1.
Deviations: gates, top-k and the load-balance loss are float32 under mixed precision; ties go to the lowest head; one shared head
has a constant gate; the query-norm router ranks the norms themselves (the code divides by their deviation first, which is NaN for
one head) and, with qk_norm, those before it; padding does not count in the load-balance loss, which lives on the module, not on
its class. The official code computes all heads and multiplies those that a token has not chosen by 0; here they are not computed
for long sequences on a GPU (`ops.mixture_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo import ops
from attention_zoo.attention.auxiliary import AuxiliaryLossModule
from attention_zoo.attention.base import (
    ROPE_LAYOUTS,
    attend,
    check_choice,
    check_context,
    check_head_split,
    check_tokens,
    has_hooks,
    is_bare,
    is_idle,
    merge_heads,
    project_qkv,
    resolve_head_dim,
    split_heads,
)
from attention_zoo.attention.conversion import (
    load_converted,
    projection_settings,
    separate_names,
    source_heads,
    source_settings,
    split_projections,
    update_layer_options,
    whole_heads,
)
from attention_zoo.ops._one_node import weight_and_bias
from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops.mixture import load_balance_loss, top_k_mask, work_softmax
from attention_zoo.ops.mixture_layer import (
    MixtureSettings,
    linear_gates,
    mixture_layer,
    query_norm_layer,
    settings_of_layer,
    takes_gates,
)
from attention_zoo.registry import PATTERNS, register_attention

__all__ = ["MixtureOfHeads", "MoHAttention", "load_balance_loss", "set_routed_topk", "top_k_mask", "work_dtype"]

_ROUTERS = "router", "shared_router", "balance"
_SPLIT = "q_proj", "k_proj", "v_proj", "o_proj"
_GATES = {"linear": "soft", "query_norm": "hard"}  # the kind of gate that each router makes


class MixtureOfHeads(AuxiliaryLossModule):
    """What every Mixture-of-Head layer has, whatever its heads compute: shared and routed heads, linear routers, gates, the loss.

    A subclass calls `_set_heads` and `_create_routers` in its constructor, multiplies its heads' outputs by the gates of
    `_route_linearly`, and calls `_forget_auxiliary_loss` first and `_keep_statistics` once in every forward.
    """

    debug: bool = False
    last_head_load: Tensor | None = None
    num_heads: int
    shared_heads: int
    routed_heads: int
    routed_topk: int

    def _set_heads(self, num_heads: int, shared: int | None, topk: int | None, active: int | None = None) -> None:
        """Set `num_heads`, `shared_heads`, `routed_heads` and `routed_topk`. Raises ValueError when they do not go together."""
        self.num_heads = num_heads
        self.shared_heads, self.routed_topk = _resolve_heads(num_heads, shared, topk, active)
        self.routed_heads = num_heads - self.shared_heads

    def _create_routers(self, dim: int, **factory: Any) -> None:
        if self.routed_heads > 0:
            self.router = nn.Linear(dim, self.routed_heads, bias=False, **factory)
        if self.shared_heads > 1:
            self.shared_router = nn.Linear(dim, self.shared_heads, bias=False, **factory)
        if self.routed_heads > 0 and self.shared_heads > 0:
            self.balance = nn.Linear(dim, 2, bias=False, **factory)

    def set_topk(self, routed_topk: int) -> None:
        """Let each token choose `routed_topk` heads from now on: 1 to h_r, or 0 when every head is shared. Raises ValueError."""
        _check_topk(self.num_heads, self.shared_heads, routed_topk)
        self.routed_topk = routed_topk

    def _route_linearly(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gates (B, N, h), shared heads first; scores p and 0/1 choice m, each (B, N, h_r), or None without routed heads.

        All in float32 at least: gates that are rounded to half precision choose other heads.
        """
        if stands_alone(x) and takes_gates(x, self.routed_heads) and self._has_bare_routers():
            return linear_gates(x, (self.num_heads, self.routed_heads, self.routed_topk), self._router_weights())
        logits, shared, balance = self._router_logits(x)
        if logits is not None:
            return ops.mixture_gates(logits, shared, balance, topk=self.routed_topk, shared_heads=self.shared_heads)
        if shared is None:  # a softmax over one head
            return torch.ones_like(x[..., :1], dtype=work_dtype(x)), None, None
        return self.shared_heads * work_softmax(shared), None, None

    def _has_bare_routers(self) -> bool:
        """Whether the linear routers are their weights."""
        layers: dict[str, Any] = self._modules
        return all(is_bare(layers[name]) for name in _ROUTERS if name in layers)

    def _router_weights(self) -> tuple[Tensor | None, ...]:
        """Of the linear routers, each None where the layer has none."""
        layers: dict[str, Any] = self._modules
        return tuple(weight_and_bias(layers[name])[0] if name in layers else None for name in _ROUTERS)

    def _router_logits(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of routed heads, shared heads and the balance of the two, each None where the layer has no such router."""
        layers = [getattr(self, name, None) for name in _ROUTERS]
        if not x.is_cuda or any(layer is not None and not is_bare(layer) for layer in layers):
            return tuple(None if layer is None else layer(x) for layer in layers)  # type: ignore[return-value]
        weights = [layer.weight for layer in layers if layer is not None]
        if len(weights) < 2:
            return tuple(None if layer is None else layer(x) for layer in layers)  # type: ignore[return-value]
        sizes = [len(weight) for weight in weights]
        sizes.append(-sum(sizes) % 8)  # a width that the libraries' products like; whatever fills it up
        found = list(F.linear(x, torch.cat([*weights, weights[0].detach()[:1].expand(sizes[-1], -1)])).split(sizes, dim=-1))
        return tuple(None if layer is None else found.pop(0) for layer in layers)  # type: ignore[return-value]

    def constructor_options(self) -> dict[str, Any]:
        given = {name: value for name, value in super().constructor_options().items() if name != "active_heads"}
        return {**given, "shared_heads": self.shared_heads, "routed_topk": self.routed_topk}

    @property
    def _wants_statistics(self) -> bool:
        return self.training or self.debug

    def _keep_statistics(self, heads: Tensor, scores: Tensor | None, chosen: Tensor | None, real: Tensor | None = None) -> Tensor:
        """Set `aux_loss` and `last_head_load` for this forward; `real` (B, N) or broadcastable says which tokens count.

        Returns: the outputs of the heads, to go on with, see `AuxiliaryLossModule`.
        """
        aux_loss, load = None, None
        if self._wants_statistics and scores is not None and chosen is not None:
            aux_loss, load = load_balance_loss(scores, chosen, real)
        self.last_head_load = load if self.debug else None
        return self._keep_auxiliary_loss(aux_loss, heads)


@register_attention(
    "moh",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    year=2024,
    repository="SkyworkAI/MoH",
    patterns=PATTERNS,
    kv_cache=True,
    cost="O(N^2 d (h_s + K)); with masks, dropout or few tokens O(N^2 d h)",
    engines=("triton", "flash", "torch", "xformers", "flex"),
    decoder_options={"router": "query_norm"},  # as the paper continues to train LLaMA3-8B; no new parameters
)
class MoHAttention(MixtureOfHeads):
    """Mixture-of-Head attention: each token mixes h_s shared heads with the K best of the other h_r = h - h_s, weighted per token.

        y = concat_i(g_i o_i) W_o,   o_i = softmax(q_i k_i^T / sqrt(d)) v_i,   g = [a_0 s, a_1 r]
        s = h_s softmax(W_s x)                        shared heads, the first h_s
        r = K p m / sum(p m),   p = softmax(W_r x)    routed heads; m = 1 for the K largest p of the token, else 0
        a = 2 softmax(W_h x)                          balance of the two kinds
        router "query_norm":  g = 1 for shared heads and for the K routed heads of largest ||q_i||, else 0

    | paper | here |
    |---|---|
    | h, d | `num_heads`, `head_dim` |
    | h_s, K | `shared_heads`, `routed_topk` |
    | W_r (wg in the official code) | `router` |
    | W_s (wg_1); absent if h_s < 2, when s = 1 | `shared_router` |
    | W_h (wg_0); absent if h_s = 0 or K = 0, when a = 1 | `balance` |
    | q, k, v; W_o | `qkv`, `proj`, or `q_proj, k_proj, v_proj`, `o_proj` |
    | load-balance loss | `aux_loss`: h_r sum_e mean(p_e) mean(m_e), K when balanced |

    The projections are fused as timm's for the linear router with as many key/value heads as query heads and context of width dim;
    else, and with `split_qkv`, they are split as Hugging Face's.

    After a forward in training mode `aux_loss` holds the layer's load-balance loss (None otherwise, and without routed heads);
    `attention_zoo.auxiliary_loss(model)` gathers it, the paper's weight is 0.01. The query-norm router's p is softmax(n / std(n)),
    n the norms. With `debug = True` on the module, `last_head_load` holds the share of tokens that chose each routed head, (h_r,).

    Args:
        dim: channels C of the tokens.
        num_heads: number of query heads h.
        head_dim: channels d per head; None: dim / num_heads.
        num_kv_heads: number of key/value heads, a divisor of h; None: h. Query heads have their own gates.
        shared_heads: heads h_s that every token uses, the first ones. Without this, routed_topk and active_heads: h / 2.
        routed_topk: routed heads K that each token chooses. Without this and active_heads: h / 4, at least 1, at most h_r.
        active_heads: h_s + K, instead of routed_topk.
        router: "linear", learned from x, or "query_norm", the norm of each head's query, without parameters.
        split_qkv: whether q, k and v have projections of their own, `q_proj, k_proj, v_proj` and `o_proj`, instead of timm's fused
            `qkv` and `proj`; None: where they cannot be fused, and with the query-norm router.
        gate: "soft" for the linear router, "hard" (0 or 1) for the query-norm router; None: the router's.
        router_grad: gradient through the query-norm router's choice, "none", or "ste": straight through to p of the chosen heads.
        qkv_bias: whether the projections of q, k and v have a bias.
        qk_norm: normalise q and k per head with `norm_layer` (before any rotation).
        norm_layer: class of those normalisations, called with the number of channels.
        proj_bias: whether the output projection has a bias.
        attn_drop, proj_drop: dropout rates on the attention weights and on the output.
        is_causal: each token attends to itself and those before it; the last query stands at the last key.
        rope_layout: channel pairs of `position_embeddings`, "half" or "interleaved".
        context_dim: channels of `context`; None: dim.

    Shape: x (B, N, C), context (B, M, context_dim) -> (B, N, C). The cache holds the keys and values of all heads.

    Raises:
        ValueError: numbers of heads that do not go together, a gate or router_grad that is not the router's, an unknown choice,
            tokens or masks of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        shared_heads: int | None = None,
        routed_topk: int | None = None,
        active_heads: int | None = None,
        router: str = "linear",
        split_qkv: bool | None = None,
        gate: str | None = None,
        router_grad: str = "none",
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool = False,
        rope_layout: str = "half",
        context_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("rope_layout", rope_layout, ROPE_LAYOUTS)
        self.dim, self.head_dim = dim, resolve_head_dim(dim, num_heads, head_dim)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_head_split(num_heads, self.num_kv_heads)
        self._set_heads(num_heads, shared_heads, routed_topk, active_heads)
        _check_router(router, gate, router_grad, self.routed_heads)
        self.router_kind, self.router_grad = router, router_grad
        self.is_causal, self.rope_layout = is_causal, rope_layout
        self.context_dim = dim if context_dim is None else context_dim

        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        can_fuse = self.num_kv_heads == num_heads and self.context_dim == dim
        if split_qkv is False and not can_fuse:
            raise ValueError(
                "split_qkv=False needs as many key/value heads as query heads, and context of width dim; leave it None"
            )
        self.fused = can_fuse and router == "linear" if split_qkv is None else not split_qkv
        if self.fused:
            self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)
        else:
            self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
            self.k_proj = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
            self.v_proj = nn.Linear(self.context_dim, kv_inner, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        if self.fused:
            self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        else:
            self.o_proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if router == "linear":
            self._create_routers(dim, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        self._forget_auxiliary_loss()
        check_tokens(x, self.dim)
        given = None
        if context is attention_mask is position_embeddings is past_key_values is None and self._is_one_node(x):
            settings = settings_of_layer(x, self._settings(), self.attn_drop if self.training else 0.0)
            if settings is not None:
                if self._has_bare_projections():
                    return self._in_one_node(x, settings, None)
                given = tuple(layer(x) for layer in self._projections())
                if all(_is_like(t, x) for t in given):
                    output = self.proj if self.fused else self.o_proj
                    return self.proj_drop(output(self._in_one_node(x, settings, given)))
        q, k, v = self._project(x, context, given)
        gates, scores, chosen = self._route(x, q)
        heads = attend(
            self,
            self.q_norm(q),
            self.k_norm(k),
            v,
            cross=context is not None,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            operation=functools.partial(ops.mixture_attention, gates=gates.transpose(1, 2), chosen=chosen, topk=self.routed_topk),
        )
        real = None  # read after `attend`, which has checked the mask
        if self._wants_statistics and attention_mask is not None and context is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx) - x.shape[1]
            real = _real_tokens(attention_mask, x.shape[1], start)
        heads = self._keep_statistics(heads, scores, chosen, real)
        output = self.proj if self.fused else self.o_proj
        return self.proj_drop(output(merge_heads(heads)))

    @classmethod
    def from_softmax_attention(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        router: str = "linear",
        shared_heads: int | None = None,
        routed_topk: int | None = None,
        head_order: Sequence[int] | None = None,
        **options: Any,
    ) -> Self:
        """Build this mechanism from the weights of a softmax attention; with every head active it computes what the source does.

        Linear routers start at zero, which makes every gate 1. By default K = h_r, all heads: lower it with `set_topk` during
        fine-tuning. Memory is not shared with the source.

        Args:
            source: an attention module or its state dict, with fused `qkv` and `proj` (timm's, the zoo's), or separate projections
                named `q, k, v, proj` or `q_proj, k_proj, v_proj, o_proj`. It may have fewer key/value heads than query heads.
            num_heads: query heads of the source; needed for a state dict, and for modules without `num_heads` or `head_dim`.
            router: "linear" (for encoders) or "query_norm" (for pretrained decoders).
            shared_heads: None: the first half, rounded down to whole groups of query heads with one key/value head.
            routed_topk: None, without active_heads: all routed heads.
            head_order: head i of the result is head head_order[i] of the source, so that the heads that matter most can come first
                and be the shared ones. Query heads with one key/value head must stay together.
            options: further constructor arguments; they win over the settings of the source. For a state dict with `q_norm` and
                `k_norm` give qk_norm=True and its norm_layer.

        Raises:
            ValueError: head counts that do not divide, an order that is no permutation or splits a group, or tensors that are
                missing or have no place here; all of them are listed.
        """
        state = split_projections(source)
        (inner, dim), context_dim = state["q.weight"].shape, state["k.weight"].shape[1]
        num_heads = source_heads(source, inner) if num_heads is None else num_heads
        head_dim, num_kv_heads = whole_heads(state, num_heads)
        check_head_split(num_heads, num_kv_heads)
        if shared_heads is None:
            group = num_heads // num_kv_heads
            shared_heads = num_heads // 2 // group * group
        if routed_topk is None and options.get("active_heads") is None:
            routed_topk = num_heads - shared_heads
        module = cls(
            dim,
            num_heads,
            router=router,
            shared_heads=shared_heads,
            routed_topk=routed_topk,
            num_kv_heads=num_kv_heads,
            **{
                "head_dim": head_dim,
                **projection_settings(state),
                "qk_norm": "q_norm" in {name.partition(".")[0] for name in state},
                "proj_bias": "proj.bias" in state,
                "context_dim": context_dim,
                **(_source_settings(source) if isinstance(source, nn.Module) else {}),
                **options,
            },
        )
        if head_order is not None:
            state = _reorder_heads(state, head_order, num_heads, num_kv_heads)
        module._load_projections(state, source)
        return module.train(source.training) if isinstance(source, nn.Module) else module

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"shared_heads={self.shared_heads}, routed_topk={self.routed_topk}, router={self.router_kind!r}, "
            f"is_causal={self.is_causal}"
        )

    def _settings(self) -> MixtureSettings:
        sizes = self.num_heads, self.num_kv_heads, self.head_dim, self.routed_heads, self.routed_topk
        return MixtureSettings(*sizes, self.is_causal, self._wants_statistics, self.router_grad == "ste")

    def _is_one_node(self, x: Tensor) -> bool:
        """Whether what stands between the projections of self-attention of x may be one node: nothing else, and nobody looks on."""
        layers: dict[str, Any] = self._modules
        if self.fused != (self.router_kind == "linear") or self.context_dim != self.dim:
            return False
        if not stands_alone(x) or ops.is_observed() or not self._has_bare_routers():
            return False
        return all(type(layers[name]) is nn.Identity and not has_hooks(layers[name]) for name in ("q_norm", "k_norm"))

    def _projections(self) -> list[Any]:
        """To queries, keys and values."""
        layers: dict[str, Any] = self._modules
        return [layers[name] for name in (("qkv",) if self.fused else _SPLIT[:3])]

    def _has_bare_projections(self) -> bool:
        """Whether the layers on both sides of that are their weights."""
        layers: dict[str, Any] = self._modules
        found = [*self._projections(), layers["proj" if self.fused else "o_proj"]]
        return is_idle(layers["proj_drop"]) and all(map(is_bare, found))

    def _in_one_node(self, x: Tensor, settings: MixtureSettings, given: tuple[Tensor, ...] | None) -> Tensor:
        """The same with one node of autograd, whose books take longer than a GPU takes for a few thousand tokens.

        given: what the projections to queries, keys and values say; the output is not projected then. None: all are in the node.
        """
        layers: dict[str, Any] = self._modules
        weights: tuple[Tensor | None, ...] = ()
        if given is None:
            weights = tuple(t for name in (("qkv", "proj") if self.fused else _SPLIT) for t in weight_and_bias(layers[name]))
        if self.fused:
            projected = None if given is None else given[0]
            out, loss, load = mixture_layer(x, settings, projected, weights, self._router_weights())
        else:
            out, loss, load = query_norm_layer(x, settings, given, weights)
        if self.debug or self.last_head_load is not None:
            self.last_head_load = load if self.debug else None
        return self._keep_auxiliary_loss(loss, out)

    def _project(
        self, x: Tensor, context: Tensor | None, given: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """q (B, h, N, d) of x, k and v (B, h_kv, M, d) of context (of x when it is None); `given`: what the projections say."""
        check_context(context, self.dim, self.context_dim)
        if self.fused:
            sizes = (self.num_heads * self.head_dim,) * 3
            if context is None:  # the gradients of q, k and v may lie in one tensor already
                q, k, v = ops.split_channels(self.qkv(x) if given is None else given[0], sizes)
            else:
                q, k, v = project_qkv(self.qkv, x, context, sizes)
        elif given is not None:
            q, k, v = given
        else:
            source = x if context is None else context
            q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)

    def _route(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gates, scores and choice, as `_route_linearly` returns them."""
        return self._route_by_query_norm(q) if self.router_kind == "query_norm" else self._route_linearly(x)

    def _route_by_query_norm(self, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of queries that are not yet rotated, which keeps their norms."""
        if self.routed_heads == 0:
            return torch.ones((q.shape[0], q.shape[2], self.shared_heads), dtype=work_dtype(q), device=q.device), None, None
        return ops.query_norm_gates(
            q,
            topk=self.routed_topk,
            shared_heads=self.shared_heads,
            scored=self._wants_statistics,
            through=self.router_grad == "ste",
        )

    def _load_projections(self, state: dict[str, Tensor], source: nn.Module | Mapping[str, Tensor]) -> None:
        """Load q, k, v, proj and normalisations, whatever they are called here, and set the routers to zero. Raises ValueError."""
        if isinstance(source, nn.Module):
            for name in ("q_norm", "k_norm"):  # the source's own kind, with its epsilon
                norm = getattr(source, name, None)
                if isinstance(norm, nn.Module) and nn.Identity not in (type(norm), type(getattr(self, name))):
                    setattr(self, name, deepcopy(norm))
        loaded = separate_names(state)
        if self.fused:
            for kind in ("weight", "bias"):
                parts = [loaded.pop(f"{name}_proj.{kind}") for name in "qkv" if f"{name}_proj.{kind}" in loaded]
                if parts:
                    loaded[f"qkv.{kind}"] = torch.cat(parts)
            loaded = {name.replace("o_proj.", "proj."): tensor for name, tensor in loaded.items()}
        own = self.state_dict()
        routers = {name for name in own if name.split(".")[0] in _ROUTERS}
        load_converted(self, {**{name: torch.zeros_like(own[name]) for name in routers}, **loaded})


def set_routed_topk(model: nn.Module, routed_topk: int | Sequence[int]) -> None:
    """Set K of every Mixture-of-Head layer of `model` that has routed heads: one number for all, or one for each layer in order.

    A decoder's configuration follows, so that what `save_pretrained` writes has the new numbers.

    Raises:
        ValueError: a number that a layer cannot have, or another count of numbers than of layers; no layer is changed then.
    """
    layers = [m for m in model.modules() if isinstance(m, MixtureOfHeads) and m.routed_heads > 0]
    numbers = [routed_topk] * len(layers) if isinstance(routed_topk, int) else list(routed_topk)
    if len(numbers) != len(layers):
        raise ValueError(f"routed_topk has {len(numbers)} numbers, the model {len(layers)} layers with routed heads")
    for layer, number in zip(layers, numbers, strict=True):
        _check_topk(layer.num_heads, layer.shared_heads, number)
    for layer, number in zip(layers, numbers, strict=True):
        layer.set_topk(number)
    config = getattr(model, "config", None)
    if hasattr(config, "attention") and hasattr(config, "attention_kwargs"):
        numbered = {layer.layer_idx: layer for layer in layers if layer.layer_idx is not None}
        update_layer_options(
            config,
            {
                index: {"shared_heads": layer.shared_heads, "routed_topk": layer.routed_topk, "active_heads": None}
                for index, layer in numbered.items()
            },
        )


def _resolve_heads(num_heads: int, shared: int | None, topk: int | None, active: int | None) -> tuple[int, int]:
    """(shared_heads, routed_topk), checked."""
    if topk is not None and active is not None:
        raise ValueError(f"routed_topk={topk} and active_heads={active}: give one; active_heads is shared_heads + routed_topk")
    by_default = topk is None and active is None
    if shared is None:
        shared = num_heads // 2 if by_default else 0
    if not 0 <= shared <= num_heads:
        nearest = 0 if shared < 0 else num_heads
        raise ValueError(f"shared_heads={shared} must be from 0 to num_heads={num_heads}; the nearest is {nearest}")
    if active is not None:
        topk = active - shared
    elif topk is None:
        topk = min(max(1, num_heads // 4), num_heads - shared)
    _check_topk(num_heads, shared, topk, given=active)
    return shared, topk


def _check_topk(num_heads: int, shared: int, topk: int, given: int | None = None) -> None:
    """Raise ValueError unless K fits; `given` is the active_heads that it came from."""
    routed = num_heads - shared
    lowest = min(routed, 1)
    if lowest <= topk <= routed:
        return
    nearest, offset = min(max(topk, lowest), routed), 0 if given is None else shared
    name = "routed_topk" if given is None else "active_heads"
    allowed = f"from {lowest + offset} to {routed + offset}" if routed else f"{offset}"
    raise ValueError(
        f"num_heads={num_heads} with shared_heads={shared} leaves {routed} routed heads: {name} must be {allowed}, "
        f"got {topk + offset}; the nearest is {nearest + offset}"
        + ("; to route none, share all heads" if routed and topk == 0 else "")
    )


def _check_router(router: str, gate: str | None, router_grad: str, routed_heads: int) -> None:
    check_choice("router", router, _GATES)
    if gate not in (None, _GATES[router]):
        raise ValueError(f"router={router!r} makes gates of the kind {_GATES[router]!r}; got gate={gate!r}")
    check_choice("router_grad", router_grad, ("none", "ste"))
    if router_grad == "ste" and router != "query_norm":
        raise ValueError("router_grad='ste' is for router='query_norm'; the linear router has its own gradient: leave it 'none'")
    if router_grad == "ste" and routed_heads == 1:
        raise ValueError("router_grad='ste' compares the norms of at least 2 routed heads, got 1; use 'none'")


def work_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where the tensor has it."""
    return torch.promote_types(x.dtype, torch.float32)


def _is_like(projected: Tensor, x: Tensor) -> bool:
    """Whether what a projection says of tokens x is a plain tensor of what x is, or will be under autocast."""
    fits = stands_alone(projected) and projected.ndim == 3 and projected.device == x.device
    return fits and (projected.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))


def _real_tokens(attention_mask: Tensor, num_tokens: int, start: int | Tensor) -> Tensor:
    """Which tokens are no padding, broadcastable to (B, N): those that some query may attend to.

    Args:
        attention_mask: in any form, over all keys; the N tokens stand at `start` among them.
    """
    if attention_mask.is_floating_point():  # -inf, or the lowest number, as Hugging Face writes
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    else:
        allowed = attention_mask.bool()
    if attention_mask.ndim == 4:
        allowed = allowed.any(2).any(1)
    elif attention_mask.is_floating_point():
        allowed = allowed.any(0, keepdim=True)
    if allowed.shape[1] in (1, num_tokens):
        return allowed
    return allowed.index_select(1, torch.arange(num_tokens, device=allowed.device) + start)


def _source_settings(source: nn.Module) -> dict[str, Any]:
    """What the source's attributes tell, causality also of modules that are not the zoo's."""
    is_causal = getattr(source, "is_causal", None)
    return {**source_settings(source), **({"is_causal": is_causal} if isinstance(is_causal, bool) else {})}


def _reorder_heads(state: dict[str, Tensor], order: Sequence[int], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """Heads in another order: rows of q, k and v, columns of proj. Raises ValueError when a key/value group would be split."""
    order, group = list(order), num_heads // num_kv_heads
    if sorted(order) != list(range(num_heads)):
        raise ValueError(f"head_order must name each of the heads 0 to {num_heads - 1} once, got {order}")
    groups = [{head // group for head in order[i : i + group]} for i in range(0, num_heads, group)]
    if any(len(g) > 1 for g in groups):
        raise ValueError(
            f"head_order moves whole groups of {group} query heads, which share a key/value head; heads of different groups stand "
            f"together in {order}"
        )
    kv_order = [g.pop() for g in groups]
    moved = dict(state)
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "proj" and kind == "weight":
            moved[name] = tensor.unflatten(1, (num_heads, -1))[:, order].flatten(1)
        elif module in ("q", "k", "v"):
            heads, wanted = (num_heads, order) if module == "q" else (num_kv_heads, kv_order)
            moved[name] = tensor.unflatten(0, (heads, -1))[wanted].flatten(0, 1)
    return moved
