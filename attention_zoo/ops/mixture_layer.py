"""Mixture-of-Head attention with its projections and routers as one function, forward and backward, for eager calls.

As `hilo_layer`: what would be some twenty nodes of autograd, with views of heads and a sum of gradients, is one. Compilers get the
same from `mixture_gates`, `mixture_attention` and `load_balance_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops._kernels import Lazy, use_kernel
from attention_zoo.ops._one_node import apply_node, as_rows, linear_gradients
from attention_zoo.ops.dispatch import wanted_backend
from attention_zoo.ops.mixture import MOST_COMPARED, heads_apart, pays

if TYPE_CHECKING:
    from attention_zoo.ops.triton import mixture_balance
    from attention_zoo.ops.triton import mixture_layer as kernels
    from attention_zoo.ops.triton import mixture_norms as norms
    from attention_zoo.ops.triton.mixture import Call
    from attention_zoo.ops.triton.mixture_layer import Layer
else:
    kernels = Lazy("attention_zoo.ops.triton.mixture_layer")
    mixture_balance = Lazy("attention_zoo.ops.triton.mixture_balance")
    norms = Lazy("attention_zoo.ops.triton.mixture_norms")

__all__ = ["MixtureSettings", "mixture_layer", "query_norm_layer", "takes_layer"]

_UNIT = 16  # bytes: heads in a projection that begin elsewhere are out of the copy engine's reach
_MOST_LAYERS = 1024
_layers: dict[tuple[Any, ...], Any] = {}  # what was found for layers of some sizes


class MixtureSettings(NamedTuple):
    """Of a layer.

    Attributes:
        heads, kv_heads, dim: heads h, key/value heads and channels d of a head.
        routed, topk: how many heads can be chosen (h_r) and are (K).
        is_causal: whether a token sees those before it only.
        balanced: whether the load-balance loss is wanted.
        through: with the query-norm router, whether gates have gradients, see `query_norm_gates`.
    """

    heads: int
    kv_heads: int
    dim: int
    routed: int
    topk: int
    is_causal: bool
    balanced: bool
    through: bool = False


def takes_layer(x: Tensor, settings: MixtureSettings, dropout_p: float) -> bool:
    """Whether the kernels serve tokens like `x`, and skip enough.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    heads, _, dim, routed, topk, is_causal, *_ = settings
    if wanted_backend("auto") == "auto" and not x.is_cuda:
        return False
    (batch, tokens, _), device = x.shape, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not 0 < routed <= MOST_COMPARED or dim * dtype.itemsize % _UNIT:
        return False
    if wanted_backend("auto") == "auto" and not pays((batch, heads, tokens, dim), dtype, tokens, routed, topk, is_causal):
        return False
    return use_kernel("auto", (x,), channels=dim, dropout_p=dropout_p)


def mixture_layer(
    x: Tensor, settings: MixtureSettings, layers: tuple[Tensor | None, ...], routers: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From tokens (B, N, C) to tokens (B, N, C'), by the kernels. No gradients of gradients.

    Args:
        x: tokens.
        settings: of the layer.
        layers: weight and bias (or None) of the projections to q, k and v, (3 h d, C), and of that of the outputs, (C', h d).
        routers: weights (h_r, C), (h - h_r, C) and (2, C) of routed heads, shared heads and their balance; the second is None for
            less than two shared heads, the third without any.

    Returns: outputs, load-balance loss and load (h_r,), the last two None unless they are wanted.
    """
    return apply_node(_Layer, x, settings, (*layers, *routers))  # type: ignore[no-any-return]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: MixtureSettings, *parameters: Any) -> tuple[Any, ...]:
        qkv_weight, qkv_bias, proj, proj_bias, *routers = parameters
        weight = _join([t for t in routers if t is not None])
        qkv, logits = F.linear(x, qkv_weight, qkv_bias).contiguous(), F.linear(x, weight).contiguous()
        ctx.layer = _layer_of(qkv, logits, settings)
        router, found = kernels.attend_layer(qkv, logits, ctx.layer)
        loss, load, slopes = _balance(ctx, settings, router.scores, router.chosen)
        ctx.save_for_backward(x, qkv, logits, *router, *found, slopes, weight, qkv_weight, proj)
        return F.linear(found.out.flatten(2), proj, proj_bias), loss, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, d_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        x, qkv, logits, *rest, slopes, weight, qkv_weight, proj = ctx.saved_tensors
        routed, found = kernels.Routed(*rest[:3]), kernels.Attended(*rest[3:])
        needs_x, _, *needs = ctx.needs_input_grad
        grad = x.new_zeros((*x.shape[:2], proj.shape[0])) if grad is None else grad
        out = found.out.flatten(2)
        dout, d_proj, d_proj_bias = linear_gradients(grad, out, proj, True, *needs[2:4])
        dqkv, dlogits = kernels.attend_layer_backward(qkv, logits, ctx.layer, routed, found, dout, slopes, d_loss)
        rows, of_logits = dqkv.view(-1, qkv.shape[2]), as_rows(dlogits)
        dx, d_qkv, d_qkv_bias = linear_gradients(rows, as_rows(x), qkv_weight, needs_x, *needs[:2])
        if dx is not None:
            dx = dx.addmm_(of_logits, weight).view_as(x)
        joined = torch.mm(of_logits.t(), as_rows(x)) if any(needs[4:]) else None
        d_routers = (None, None, None) if joined is None else _cut(joined, ctx.layer)
        return dx, None, d_qkv, d_qkv_bias, d_proj, d_proj_bias, *d_routers


def query_norm_layer(
    x: Tensor, settings: MixtureSettings, layers: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `mixture_layer`, with the query-norm router; `layers`: weights and biases of the projections to q, k, v and outputs."""
    return apply_node(_NormLayer, x, settings, layers)  # type: ignore[no-any-return]


class _NormLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: MixtureSettings, *parameters: Any) -> tuple[Any, ...]:
        *projections, proj, proj_bias = parameters
        weights = projections[::2]
        q, k, v = (F.linear(x, *projections[i : i + 2]).contiguous() for i in (0, 2, 4))
        heads, routed = (settings.heads, settings.kv_heads), settings.routed
        ctx.settings, ctx.layer, ctx.out = settings, *_call_of(q, k, v, settings)
        scored = settings.balanced or settings.through
        router = norms.norm_gates.unseen()(kernels.heads_of_split(q, heads[0], heads[0]), settings.topk, heads[0] - routed, scored)
        gates, scores, chosen, _ = router
        found = kernels.attend(ctx.layer, q, k, v, gates, chosen, _apart(q, k, v, ctx.layer))
        loss, load, slopes = _balance(ctx, settings, scores, chosen)
        ctx.save_for_backward(x, q, k, v, *router, *found, slopes, *weights, proj)
        return F.linear(found.out.flatten(2), proj, proj_bias), loss, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, d_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        x, q, k, v, gates, scores, chosen, of_norms, *rest, slopes, wq, wk, wv, proj = ctx.saved_tensors
        found, settings, (batch, tokens) = kernels.Attended(*rest), ctx.settings, x.shape[:2]
        needs_x, _, *needs = ctx.needs_input_grad
        grad = x.new_zeros((batch, tokens, proj.shape[0])) if grad is None else grad
        dout, d_proj, d_proj_bias = linear_gradients(grad, found.out.flatten(2), proj, True, *needs[6:8])
        (dq, dk, dv), dgates = kernels.attend_backward(
            ctx.layer, q, k, v, gates, _apart(q, k, v, ctx.layer), found, dout, ctx.out, False, settings.through
        )
        if settings.through or d_loss is not None:
            d_scores = None
            if d_loss is not None:
                d_scores = mixture_balance.load_balance_backward.unseen()(d_loss, slopes, None, batch, tokens)
            given = dgates if settings.through else None, d_scores, kernels.heads_of_split(q, settings.heads, settings.heads)
            dq += norms.norm_gates_backward.unseen()(*given, scores, chosen, of_norms).transpose(1, 2)
        dx, of_parts = None, []
        for i, (d_part, weight) in enumerate(zip((dq, dk, dv), (wq, wk, wv), strict=True)):
            rows = d_part.view(-1, weight.shape[0])
            d_part_x, *of_part = linear_gradients(rows, as_rows(x), weight, needs_x and i == 0, *needs[2 * i : 2 * i + 2])
            if needs_x:
                dx = d_part_x if dx is None else dx.addmm_(rows, weight)
            of_parts += of_part
        return None if dx is None else dx.view_as(x), None, *of_parts, d_proj, d_proj_bias


def _balance(ctx: Any, settings: MixtureSettings, scores: Tensor, chosen: Tensor) -> tuple[Tensor | None, ...]:
    """The loss, the load and the loss's slope by the scores of any token, None unless they are wanted."""
    ctx.set_materialize_grads(False)
    if not settings.balanced:
        return None, None, None
    found = mixture_balance.load_balance.unseen()(scores, chosen, None)
    ctx.mark_non_differentiable(found[1])
    return found


def _apart(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The heads apart of projections."""
    some = call.apart // (call.heads // call.kv_heads)
    one, two = (kernels.heads_of_split(t, call.kv_heads, some) for t in (k, v))
    return kernels.heads_of_split(q, call.heads, call.apart), one, two


def _layer_of(qkv: Tensor, logits: Tensor, settings: MixtureSettings) -> Layer:
    """Of a fused projection and the routers' logits."""
    heads, _, _, routed, topk, is_causal, *_ = settings

    def find() -> Layer:
        apart = heads_apart(*kernels.heads_of(qkv, heads, heads), routed, is_causal)
        return kernels.Layer.of(qkv, logits, heads, routed, topk, apart, is_causal)

    return _remember(qkv, settings, (logits.shape[2],), find)  # type: ignore[no-any-return]


def _call_of(q: Tensor, k: Tensor, v: Tensor, settings: MixtureSettings) -> tuple[Call, tuple[int, int, int]]:
    """Of projections apart, and the strides of outputs."""
    heads, kv_heads, _, routed, topk, is_causal, *_ = settings

    def find() -> Any:
        own_k, own_v = (kernels.heads_of_split(t, kv_heads, kv_heads) for t in (k, v))
        apart = heads_apart(kernels.heads_of_split(q, heads, heads), own_k, own_v, routed, is_causal)
        return kernels.call_of_split(q, k, (heads, kv_heads), routed, topk, apart, is_causal)

    return _remember(q, settings, (), find)  # type: ignore[no-any-return]


def _remember(x: Tensor, settings: MixtureSettings, more: tuple[int, ...], find: Callable[[], Any]) -> Any:
    """What cuDNN serves is asked once for each size."""
    exact = torch.are_deterministic_algorithms_enabled()
    key = x.shape, more, settings, kernels.precision(x), x.dtype, x.device, exact
    found = _layers.get(key)
    if found is None:
        found = find()
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        _layers[key] = found
    return found


def _join(routers: list[Tensor]) -> Tensor:
    """Weights of several routers as one, of a width that the libraries' products like; whatever fills it up."""
    if len(routers) == 1:
        return routers[0]
    pad = -sum(t.shape[0] for t in routers) % 8
    while pad > 0:
        filling = routers[0][:pad]
        routers, pad = [*routers, filling], pad - filling.shape[0]
    return torch.cat(routers)


def _cut(weight: Tensor, layer: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the routers' weights in that of the joined one."""
    shared = layer.heads - layer.routed
    if shared == 0:
        return weight, None, None
    if shared == 1:
        first, balance, _ = weight.split_with_sizes([layer.routed, 2, layer.width - layer.routed - 2])
        return first, None, balance
    first, second, balance, _ = weight.split_with_sizes([layer.routed, shared, 2, layer.width - layer.heads - 2])
    return first, second, balance
