"""timm's Vision Transformers as hosts: ViT, DeiT, DINOv2, CLIP and SigLIP towers, EVA, DINOv3 and Perception Encoder.

By structure: every layer of timm's own `Attention`, `EvaAttention` and `AttentionRope` is found, wherever it stands. Other
attention of timm's (relative position biases, windows, pooled keys, fused with the MLP) is listed and refused with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from attention_zoo.swap.hosts import Adapter, Host, register_adapter
from attention_zoo.swap.slot import Slot, describe_refusal, install_slot, linear_problem, shared_problem

__all__ = ["TimmAdapter", "TimmSlot"]

_PLAIN = (Attention, EvaAttention, AttentionRope)
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")
_PARTS = {*_PROJECTIONS, "q_bias", "v_bias", "q_norm", "k_norm"}


class TimmSlot(Slot):
    """A mechanism that is called as timm's attention is: x (B, N, C), rotary tables, mask, causal flag -> (B, N, C).

    Args:
        mechanism: what attends.
        num_prefix_tokens: class and register tokens before the patches; rotary tables do not turn them.
    """

    def __init__(self, mechanism: Any, num_prefix_tokens: int) -> None:
        super().__init__(mechanism)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`rope` holds sines, then cosines, of the patches: (N_patches, 2 D), with dropped patches (B, 1, N_patches, 2 D)."""
        tables = None if rope is None else _tables(rope, self.num_prefix_tokens)
        return self.attend(x, None if attn_mask is None else _mask(attn_mask), is_causal, tables)


def _tables(rope: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """timm's [sin, cos] of the patches as (cos, sin) of all tokens, each (N, D) or (B, N, D); the prefix is turned by 0."""
    if rope.ndim == 4:
        rope = rope.squeeze(1)
    sin, cos = rope.chunk(2, dim=-1)
    still = (*rope.shape[:-2], num_prefix_tokens, cos.shape[-1])
    return torch.cat([cos.new_ones(still), cos], dim=-2), torch.cat([sin.new_zeros(still), sin], dim=-2)


def _mask(attn_mask: Tensor) -> Tensor:
    """timm's masks are (N, N), (B, N, N) or broadcastable to (B, H, N, N); ours are 4-D (a 2-D boolean one would be padding)."""
    if attn_mask.ndim == 3:
        return attn_mask.unsqueeze(1)
    return attn_mask[(None,) * (4 - attn_mask.ndim)]


class TimmAdapter(Adapter):
    """Layers that timm calls as `attn(x, rope=..., attn_mask=..., is_causal=...)`."""

    def find(self, model: nn.Module) -> list[Host]:
        owners = dict(_owners(model))
        hosts: list[Host] = []
        count = 0
        for name, module in model.named_modules():
            vit = _nearest(owners, name)
            if isinstance(module, TimmSlot):
                count += 1  # swapped already; the others keep their numbers
            elif isinstance(module, _PLAIN):
                hosts.append(self._describe(name, module, count, vit, model))
                count += 1
            elif _is_other_attention(module):
                hosts.append(self._refused(name, module, count))
                count += 1
        return hosts

    def softmax_state(self, host: Host) -> dict[str, Tensor]:
        module: Any = host.module
        state: dict[str, Tensor] = {}
        if getattr(module, "qkv", None) is not None:
            qkv = {"weight": module.qkv.weight, "bias": _fused_bias(module)}
            for kind, rows in qkv.items():
                if rows is not None:
                    pieces = zip("qkv", rows.chunk(3), strict=True)
                    state.update({f"{part}_proj.{kind}": piece for part, piece in pieces})
        else:
            biased = module.q_proj.bias is not None
            for part in "qkv":
                layer = getattr(module, f"{part}_proj")
                state[f"{part}_proj.weight"] = layer.weight
                if biased:  # EVA's keys have no bias where its queries and values have one
                    zeros = layer.weight.new_zeros(len(layer.weight)).requires_grad_(module.q_proj.bias.requires_grad)
                    state[f"{part}_proj.bias"] = zeros if layer.bias is None else layer.bias
        parts = {"o_proj": module.proj, "q_norm": module.q_norm, "k_norm": module.k_norm}
        return state | {f"{part}.{name}": tensor for part, layer in parts.items() for name, tensor in layer.named_parameters()}

    def install(self, model: nn.Module, host: Host, mechanism: Any) -> Callable[[], None]:
        parent, _, leaf = host.name.rpartition(".")
        if host.rope:
            mechanism.rope_layout = _rope_layout(host.module)
        vit = _nearest(dict(_owners(model)), host.name)
        grid = _patch_conv(vit) if vit is not None and host.spatial else None
        slot = TimmSlot(mechanism, host.prefix_tokens)
        return install_slot(model.get_submodule(parent), leaf, slot, host.layer_idx, grid)

    def state_prefix(self, host: Host) -> str:
        return f"{host.name}.mechanism."

    def _describe(self, name: str, module: Any, index: int, vit: Any, model: nn.Module) -> Host:
        rope = vit is not None and getattr(vit, "rope", None) is not None
        return Host(
            name=name,
            module=module,
            adapter=self,
            index=index,
            dim=module.proj.out_features,
            num_heads=module.num_heads,
            num_kv_heads=getattr(module, "num_kv_heads", module.num_heads),
            head_dim=module.head_dim,
            is_causal=False,
            qkv_bias=_has_bias(module),
            proj_bias=module.proj.bias is not None,
            scale=module.head_dim**-0.5 if module.fused_attn else module.scale,  # the fused kernel is not told the layer's
            qk_norm=not isinstance(module.q_norm, nn.Identity),
            rope=rope and not isinstance(module, Attention),
            window_size=None,
            softcap=None,
            attn_drop=module.attn_drop.p,
            proj_drop=module.proj_drop.p,
            prefix_tokens=_prefix_tokens(module, vit),
            spatial=vit is not None and _patch_conv(vit) is not None and not _drops_patches(vit),
            grid_size=getattr(getattr(vit, "patch_embed", None), "grid_size", None),
            layer_idx=index,
            refuse=_refusal(name, module, vit) or shared_problem(model, name, module),
        )

    def _refused(self, name: str, module: Any, index: int) -> Host:
        return Host(
            name=name, module=module, adapter=self, index=index, dim=0, num_heads=0, num_kv_heads=0, head_dim=0,
            is_causal=False, qkv_bias=False, proj_bias=False, scale=1.0, qk_norm=False, rope=False, window_size=None, softcap=None,
            attn_drop=0.0, proj_drop=0.0, prefix_tokens=0, spatial=False, grid_size=None, layer_idx=None,
            refuse=_other_reason(module),
        )  # fmt: skip


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The Vision Transformers in a model (itself, towers, what a feature wrapper holds), by name."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("timm.") and hasattr(module, "blocks") and hasattr(module, "num_features"):
            yield name, module


def _nearest(owners: dict[str, nn.Module], name: str) -> Any:
    """The innermost owner of the module `name`, or None."""
    inside = [owner for owner in owners if owner == "" or name.startswith(f"{owner}.")]
    return owners[max(inside, key=len)] if inside else None


def _patch_conv(vit: Any) -> nn.Module | None:
    """The convolution whose map is the grid of patches; None where patches are embedded otherwise."""
    conv = getattr(getattr(vit, "patch_embed", None), "proj", None)
    return conv if isinstance(conv, nn.Conv2d) else None


def _drops_patches(vit: Any) -> bool:
    """Whether patches are left out in training, so that no grid is left."""
    drop = getattr(vit, "patch_drop", None)
    return getattr(drop, "prob", 0.0) > 0


def _prefix_tokens(module: Any, vit: Any) -> int:
    """As the Vision Transformer says, as the rotating layer says where it stands in no model that knows."""
    return int(getattr(vit, "num_prefix_tokens", getattr(module, "num_prefix_tokens", 0)))


def _rope_layout(module: Any) -> str:
    return "half" if getattr(module, "rotate_half", False) else "interleaved"


def _has_bias(module: Any) -> bool:
    projection = module.qkv if getattr(module, "qkv", None) is not None else module.q_proj
    return projection.bias is not None or getattr(module, "q_bias", None) is not None


def _fused_bias(module: Any) -> Tensor | None:
    """The bias of all three projections; EVA holds those of queries and values, beside keys that have none."""
    if getattr(module, "q_bias", None) is not None:
        return torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    return module.qkv.bias  # type: ignore[no-any-return]


def _refusal(name: str, module: Any, vit: Any) -> str | None:
    """Why a layer of timm's plain attention cannot be swapped; None if it can."""
    if not name:
        return "it is the whole model; a swap replaces layers inside one"
    if type(module) not in _PLAIN:
        return f"{type(module).__name__} changes timm's {type(module).__mro__[1].__name__}; what it computes is not known"
    if module.gate is not None:
        return "its output is gated (gated=True), which no mechanism has"
    if not isinstance(module.norm, nn.Identity):
        return "its output is normalised before the projection (scale_norm), which would be lost"
    projections = {n: getattr(module, n) for n in _PROJECTIONS if getattr(module, n, None) is not None}
    if problem := linear_problem(**projections):
        return problem
    if problem := describe_refusal(module, _PARTS):
        return problem
    dim = (module.qkv if "qkv" in projections else module.q_proj).in_features
    if module.proj.out_features != dim:
        return f"it turns {dim} channels into {module.proj.out_features}; mechanisms keep them"
    if not isinstance(module, Attention) and (getattr(vit, "rope_mixed", False) or getattr(vit, "rope_is_mixed", False)):
        return "each of its heads has rotary tables of its own (mixed); mechanisms share one table"
    if vit is None and not isinstance(module, Attention):
        return f"{name} stands in no Vision Transformer of timm's: it is not known whether it rotates queries and keys"
    return None


def _is_other_attention(module: Any) -> bool:
    """Whether a module of timm's attends from tokens to tokens in a way that is not the plain one. Pooling heads are no such."""
    kind = type(module)
    named = "Attn" in kind.__name__ or "Attention" in kind.__name__ or kind.__name__.endswith("ParallelScalingBlock")
    attends = named and hasattr(module, "num_heads") and "Pool" not in kind.__name__
    return attends and kind.__module__.startswith("timm.")


def _other_reason(module: nn.Module) -> str:
    kind, names = type(module).__name__, [n for n, _ in module.named_parameters()]
    if any("rel_pos" in n or "relative_position" in n for n in names) or hasattr(module, "rel_pos"):
        return f"{kind} adds a relative position bias, which would be lost"
    if kind.endswith("ParallelScalingBlock"):
        return f"{kind} fuses the projections of its attention with those of its MLP"
    return f"{kind} is not softmax attention of all tokens to all tokens"


register_adapter(TimmAdapter())
