"""Mixture-of-Head attention with its projections and routers as one function, forward and backward, for eager calls.

As `hilo_layer`: what would be some twenty nodes of autograd, with views of heads and a sum of gradients, is one. Compilers get the
same from `mixture_gates`, `mixture_attention` and `load_balance_loss`. Attention is either packed or one call of a library for all
heads, as `mixture.packs` decides. Projections that are more than their weights (adapted, quantised, hooked) stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attention_zoo.ops import _fused
from attention_zoo.ops._kernels import Lazy, use_kernel
from attention_zoo.ops._one_node import apply_node, as_rows, bias_gradients, linear_gradients
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.dispatch import select, wanted_backend
from attention_zoo.ops.engines import describe
from attention_zoo.ops.mixture import MOST_COMPARED, heads_apart, is_short, packs

if TYPE_CHECKING:
    from attention_zoo.ops.triton import mixture_balance
    from attention_zoo.ops.triton import mixture_layer as kernels
    from attention_zoo.ops.triton import mixture_norms as norms
    from attention_zoo.ops.triton.mixture import Call
    from attention_zoo.ops.triton.mixture_layer import Layer, Routers
else:
    kernels = Lazy("attention_zoo.ops.triton.mixture_layer")
    mixture_balance = Lazy("attention_zoo.ops.triton.mixture_balance")
    norms = Lazy("attention_zoo.ops.triton.mixture_norms")

__all__ = ["MixtureSettings", "linear_gates", "mixture_layer", "query_norm_layer", "settings_of_layer", "takes_gates"]

_UNIT = 16  # bytes: heads in a projection that begin elsewhere are out of the copy engine's reach
_MOST_LAYERS = 1024
_layers: dict[tuple[Any, ...], Any] = {}  # what was found for layers of some sizes
_kernels: dict[tuple[Any, ...], str | None] = {}  # which of torch's kernels attends, for layers of some sizes


class MixtureSettings(NamedTuple):
    """Of a layer.

    Attributes:
        heads, kv_heads, dim: heads h, key/value heads and channels d of a head.
        routed, topk: how many heads can be chosen (h_r) and are (K).
        is_causal: whether a token sees those before it only.
        balanced: whether the load-balance loss is wanted.
        through: with the query-norm router, whether gates have gradients, see `query_norm_gates`.
        kernel: which of torch's kernels computes all heads, see `_fused.py`; empty: ours compute the chosen ones, packed.
    """

    heads: int
    kv_heads: int
    dim: int
    routed: int
    topk: int
    is_causal: bool
    balanced: bool
    through: bool = False
    kernel: str = ""


def settings_of_layer(x: Tensor, settings: MixtureSettings, dropout_p: float) -> MixtureSettings | None:
    """The settings, with the kernel, if tokens like `x` are served; else None.

    Raises:
        BackendError: "triton" is asked for, by `use_backend` or the environment, and cannot serve it.
    """
    heads, _, dim, routed, topk, is_causal, *_ = settings
    if not x.is_cuda and wanted_backend("auto") == "auto":
        return None
    (batch, tokens, _), device = x.shape, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not 0 < routed <= MOST_COMPARED or dim * dtype.itemsize % _UNIT:
        return None
    if not use_kernel("auto", (x,), channels=dim, dropout_p=dropout_p):
        return None
    if packs((batch, heads, tokens, dim), dtype, tokens, routed, topk, is_causal):
        return settings
    kernel = _kernel_of(x, dtype, settings)
    return None if kernel is None else settings._replace(kernel=kernel)


def _kernel_of(x: Tensor, dtype: torch.dtype, settings: MixtureSettings) -> str | None:
    """Which of torch's kernels attends in a layer on tokens like `x`, if projections are of this dtype; None: none should.

    As "auto" chooses, but for short calls, where another library cannot make up for the host's time that the node saves.
    """
    key = x.shape, dtype, x.device, settings[:3], settings.is_causal, torch.is_grad_enabled(), _fused.preferences()
    if key not in _kernels:
        if len(_kernels) >= _MOST_LAYERS:
            _kernels.clear()
        _kernels[key] = _find_kernel(x, dtype, settings)
    return _kernels[key]


def _find_kernel(x: Tensor, dtype: torch.dtype, settings: MixtureSettings) -> str | None:
    heads, kv_heads, dim, _, _, is_causal, *_ = settings
    batch, tokens, _ = x.shape
    projected = x.new_empty((batch, tokens, (heads + 2 * kv_heads) * dim), dtype=dtype, requires_grad=torch.is_grad_enabled())
    parts = projected.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in parts)
    kernel = _fused.fused_kernel(q, k, v, is_causal)
    if kernel is None or is_short(q.shape, tokens, is_causal):
        return kernel
    engine = select(describe(q, k, v, make_problem(q, k, v, is_causal=is_causal)), "auto")
    return kernel if engine.name == "torch" else None


def mixture_layer(
    x: Tensor,
    settings: MixtureSettings,
    projected: Tensor | None,
    layers: tuple[Tensor | None, ...],
    routers: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From tokens (B, N, C) to tokens (B, N, C'), by the kernels. No gradients of gradients.

    Args:
        x: tokens.
        settings: of the layer, as `settings_of_layer` returns them.
        projected: q, k and v, (B, N, 3 h d), where they are there already: outputs are those of the heads, (B, N, h d), then.
        layers: weight and bias (or None) of the projections to q, k and v, (3 h d, C), and of that of the outputs, (C', h d); not
            looked at if they are `projected`.
        routers: weights (h_r, C), (h - h_r, C) and (2, C) of routed heads, shared heads and their balance; the second is None for
            less than two shared heads, the third without any.

    Returns: outputs, load-balance loss and load (h_r,), the last two None unless they are wanted.
    """
    given = (None,) * 4 if projected is not None else layers
    return apply_node(_Layer, x, settings, (projected, *given, *routers))  # type: ignore[no-any-return]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: MixtureSettings, *parameters: Any) -> tuple[Any, ...]:
        projected, qkv_weight, qkv_bias, proj, proj_bias, *routers = parameters
        weight = _join([t for t in routers if t is not None])
        qkv = (F.linear(x, qkv_weight, qkv_bias) if projected is None else projected).contiguous()
        logits = F.linear(x, weight).contiguous()
        ctx.layer = _layer_of(qkv, logits, settings)
        router = kernels.route(logits, ctx.layer.routers)
        found = kernels.attend_layer(qkv, ctx.layer, router, _is_recorded(ctx))
        loss, load, slopes = _balance(ctx, settings, router.scores, router.chosen)
        ctx.save_for_backward(x, qkv, logits, *router, slopes, weight, qkv_weight, proj, *found)
        out = found.out.flatten(2)
        return out if proj is None else F.linear(out, proj, proj_bias), loss, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, d_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        x, qkv, logits, gates, scores, chosen, slopes, weight, qkv_weight, proj, *found = ctx.saved_tensors
        needs_x, _, needs_projected, *needs = ctx.needs_input_grad
        dout, d_proj = _back_through_output(grad, found[0].flatten(2), proj, needs[2])
        dqkv, dgates = kernels.attend_layer_backward(qkv, ctx.layer, gates, tuple(found), dout)
        of_loss = (None, None) if d_loss is None else (slopes, d_loss)
        of_logits = as_rows(kernels.route_backward(logits, ctx.layer.routers, scores, chosen, dgates, *of_loss))
        tokens, rows = as_rows(x), dqkv.view(-1, qkv.shape[2])
        dx = torch.mm(of_logits, weight) if needs_x else None
        d_qkv = None
        if qkv_weight is not None:
            d_qkv = torch.mm(rows.t(), tokens) if needs[0] else None
            dx = None if dx is None else dx.addmm_(rows, qkv_weight)
        d_qkv_bias, d_proj_bias = bias_gradients(rows if needs[1] else None, grad if needs[3] else None)
        of_routers = _back_to_routers(of_logits, tokens, ctx.layer.routers, any(needs[4:]))
        d_projected = dqkv.view_as(qkv) if needs_projected else None
        return None if dx is None else dx.view_as(x), None, d_projected, d_qkv, d_qkv_bias, d_proj, d_proj_bias, *of_routers


def _is_recorded(ctx: Any) -> bool:
    """Whether a backward may follow a forward with this context."""
    return any(getattr(ctx, "needs_input_grad", ()))


def _back_through_output(
    grad: Tensor | None, out: Tensor, proj: Tensor | None, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of the heads' outputs (B, N, h d), contiguous, and of the weight of their projection, if there is one."""
    if grad is None:
        return torch.zeros_like(out), None
    if proj is None:
        return grad.contiguous(), None
    dout, d_proj, _ = linear_gradients(grad, out, proj, True, wants_weight, False)
    return dout, d_proj


def query_norm_layer(
    x: Tensor, settings: MixtureSettings, projected: tuple[Tensor, ...] | None, layers: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `mixture_layer`, with the query-norm router; q, k and v and the weights and biases of their projections are apart."""
    given = (*projected, *(None,) * 8) if projected is not None else (*(None,) * 3, *layers)
    return apply_node(_NormLayer, x, settings, given)  # type: ignore[no-any-return]


class _NormLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: MixtureSettings, *parameters: Any) -> tuple[Any, ...]:
        projected, (*projections, proj, proj_bias) = parameters[:3], parameters[3:]
        weights = projections[::2]
        if projected[0] is None:
            projected = tuple(F.linear(x, *projections[i : i + 2]) for i in (0, 2, 4))
        q, k, v = (t.contiguous() for t in projected)
        heads, shared = settings.heads, settings.heads - settings.routed
        ctx.settings = settings
        scored = settings.balanced or settings.through
        router = norms.norm_gates.unseen()(kernels.heads_of_split(q, heads, heads), settings.topk, shared, scored)
        gates, scores, chosen, _ = router
        found: Any
        if settings.kernel:
            whole = _whole(q, k, v, settings)
            found = kernels.attend_all(settings.kernel, whole, gates, settings.is_causal, _is_recorded(ctx))
        else:
            ctx.layer, ctx.out = _call_of(q, k, v, settings)
            found = kernels.attend(ctx.layer, q, k, v, gates, chosen, _apart(q, k, v, ctx.layer))
        loss, load, slopes = _balance(ctx, settings, scores, chosen)
        ctx.save_for_backward(x, q, k, v, *router, slopes, *weights, proj, *found)
        out = found.out.flatten(2)
        return out if proj is None else F.linear(out, proj, proj_bias), loss, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, d_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        x, q, k, v, gates, scores, chosen, of_norms, slopes, wq, wk, wv, proj, *found = ctx.saved_tensors
        settings, (batch, tokens) = ctx.settings, x.shape[:2]
        needs_x, _, *needs = ctx.needs_input_grad
        needs_projected, needs = needs[:3], needs[3:]
        dout, d_proj = _back_through_output(grad, found[0].flatten(2), proj, needs[6])
        if settings.kernel:
            of_heads, dgates = kernels.attend_all_backward(
                settings.kernel, _whole(q, k, v, settings), gates, kernels.Gated(*found), dout, settings.is_causal, settings.through
            )
            dq, dk, dv = (t.transpose(1, 2) for t in of_heads)
        else:
            (dq, dk, dv), dgates = kernels.attend_backward(
                ctx.layer, q, k, v, gates, _apart(q, k, v, ctx.layer), kernels.Attended(*found), dout, ctx.out, False,
                settings.through,
            )  # fmt: skip
        if settings.through or d_loss is not None:
            d_scores = None
            if d_loss is not None:
                d_scores = mixture_balance.load_balance_backward.unseen()(d_loss, slopes, None, batch, tokens)
            given = dgates if settings.through else None, d_scores, kernels.heads_of_split(q, settings.heads, settings.heads)
            dq += norms.norm_gates_backward.unseen()(*given, scores, chosen, of_norms).transpose(1, 2)
        if wq is None:
            d_projected = (
                t.reshape(like.shape) if wanted else None
                for t, like, wanted in zip((dq, dk, dv), (q, k, v), needs_projected, strict=True)
            )
            return None, None, *d_projected, *(None,) * 8
        of_parts: list[Tensor | None] = []
        rows = [t.reshape(-1, like.shape[2]) for t, like in zip((dq, dk, dv), (q, k, v), strict=True)]
        of_biases = bias_gradients(*(t if wanted else None for t, wanted in zip(rows, needs[1:6:2], strict=True)))
        for own, of_bias, wanted in zip(rows, of_biases, needs[:6:2], strict=True):
            of_parts += [torch.mm(own.t(), as_rows(x)) if wanted else None, of_bias]
        dx = torch.mm(rows[0], wq).addmm_(rows[1], wk).addmm_(rows[2], wv) if needs_x else None
        (d_proj_bias,) = bias_gradients(grad if needs[7] else None)
        return None if dx is None else dx.view_as(x), None, None, None, None, *of_parts, d_proj, d_proj_bias


def takes_gates(x: Tensor, routed: int) -> bool:
    """Whether `linear_gates` serves tokens like `x`, eager calls."""
    return 0 < routed <= MOST_COMPARED and use_kernel("auto", (x,), channels=1)


def linear_gates(x: Tensor, sizes: tuple[int, int, int], routers: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (B, N, h), scores and choice (B, N, h_r) of tokens (B, N, C), by the kernels. No gradients of gradients.

    Args:
        x: tokens.
        sizes: h, h_r and K.
        routers: as for `mixture_layer`.
    """
    return apply_node(_Gates, x, sizes, routers)  # type: ignore[no-any-return]


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, int, int], *routers: Tensor | None) -> tuple[Tensor, ...]:
        weight = _join([t for t in routers if t is not None])
        logits = F.linear(x, weight).contiguous()
        ctx.routers = kernels.Routers.of(logits, *sizes)
        gates, scores, chosen = kernels.route(logits, ctx.routers)
        ctx.save_for_backward(x, logits, scores, chosen, weight)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return gates, scores, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates: Tensor | None, dscores: Tensor | None, _: None) -> tuple[Any, ...]:
        x, logits, scores, chosen, weight = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        routers = ctx.routers
        dgates = scores.new_zeros((*scores.shape[:2], routers.heads)) if dgates is None else dgates.contiguous()
        slopes = None if dscores is None else dscores.contiguous()
        of_logits = as_rows(kernels.route_backward(logits, routers, scores, chosen, dgates, slopes, None))
        dx = torch.mm(of_logits, weight).view_as(x) if needs_x else None
        return dx, None, *_back_to_routers(of_logits, as_rows(x), routers, any(needs))


def _balance(ctx: Any, settings: MixtureSettings, scores: Tensor, chosen: Tensor) -> tuple[Tensor | None, ...]:
    """The loss, the load and the loss's slope by the scores of any token, None unless they are wanted."""
    ctx.set_materialize_grads(False)
    if not settings.balanced:
        return None, None, None
    found = mixture_balance.load_balance.unseen()(scores, chosen, None)
    ctx.mark_non_differentiable(found[1])
    return found


def _whole(q: Tensor, k: Tensor, v: Tensor, settings: MixtureSettings) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of projections."""
    heads, kv_heads, *_ = settings
    own_k, own_v = (kernels.heads_of_split(t, kv_heads, kv_heads) for t in (k, v))
    return kernels.heads_of_split(q, heads, heads), own_k, own_v


def _apart(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The heads apart of projections."""
    some = call.apart // (call.heads // call.kv_heads)
    one, two = (kernels.heads_of_split(t, call.kv_heads, some) for t in (k, v))
    return kernels.heads_of_split(q, call.heads, call.apart), one, two


def _layer_of(qkv: Tensor, logits: Tensor, settings: MixtureSettings) -> Layer:
    """Of a fused projection and the routers' logits."""
    heads, _, dim, routed, topk, is_causal, *_ = settings

    def find() -> Layer:
        kernel = settings.kernel
        apart = 0 if kernel else heads_apart(*kernels.heads_of(qkv, heads, heads), routed, is_causal)
        routers = kernels.Routers.of(logits, heads, routed, topk)
        return kernels.Layer(routers, dim, apart, is_causal, kernel, kernels.precision(qkv))

    return _remember(qkv, settings, (logits.shape[2],), find)  # type: ignore[no-any-return]


def _call_of(q: Tensor, k: Tensor, v: Tensor, settings: MixtureSettings) -> tuple[Call, tuple[int, int, int]]:
    """Of projections apart that are packed, and the strides of outputs."""
    heads, kv_heads, _, routed, topk, is_causal, *_ = settings

    def find() -> Any:
        apart = heads_apart(*_whole(q, k, v, settings), routed, is_causal)
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


def _back_to_routers(of_logits: Tensor, tokens: Tensor, routers: Routers, wanted: bool) -> tuple[Tensor | None, ...]:
    """The gradients of the routers' weights, from (B N, width) of the logits and tokens (B N, C)."""
    if not wanted:
        return None, None, None
    weight = torch.mm(of_logits.t(), tokens)
    shared = routers.heads - routers.routed
    if shared == 0:
        return weight, None, None
    if shared == 1:
        first, balance, _ = weight.split_with_sizes([routers.routed, 2, routers.width - routers.routed - 2])
        return first, None, balance
    first, second, balance, _ = weight.split_with_sizes([routers.routed, shared, 2, routers.width - routers.heads - 2])
    return first, second, balance
