"""Hugging Face's decoders as hosts: Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3 and GPT-2.

By structure: `q_proj, k_proj, v_proj, o_proj`, or `qkv_proj, o_proj`, or `c_attn, c_proj`, in a module that counts its layer.
Layers of these shapes in other families are listed and refused: what their models do around them has not been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from attention_zoo.attention.base import refuse_where
from attention_zoo.swap.hosts import Adapter, Host, register_adapter
from attention_zoo.swap.hugging_face import check_call, family_of, hook_again_after, read_mask, window_problem
from attention_zoo.swap.slot import Slot, describe_refusal, install_slot, linear_problem, shared_problem

__all__ = ["DecoderAdapter", "DecoderSlot"]

# Folders of transformers.models whose layers have been read.
_FAMILIES = {"gemma", "gemma2", "gemma3", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3"}
# The projections of the three shapes; the last one is the output's.
_SHAPES = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"), ("c_attn", "c_proj"))
_OUTPUTS = ("o_proj", "c_proj")
_NORMS = ("q_norm", "k_norm")


class DecoderSlot(Slot):
    """A mechanism that is called as Hugging Face's decoders call their attention; there are no attention weights to return.

    Args:
        mechanism: what attends.
        window_size: tokens that the layer saw; None: all.
        config: the layer's, which says how the model attends now.
    """

    def __init__(self, mechanism: Any, window_size: int | None = None, config: Any = None) -> None:
        super().__init__(mechanism)
        self.window_size = window_size
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,  # what cache was called before transformers 5.24
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, N, C), and masks of any kind that an attention implementation asks for -> (B, N, C), None.

        Raises:
            ValueError: an input that the mechanism does not take, or something that the masks of the model's attention
                implementation do not hold: a window, or the bounds of packed sequences.
        """
        check_call(self.mechanism.attention_info.name, kwargs)
        if problem := window_problem(self.window_size, self.config):
            raise ValueError(problem)
        self._check_packing(attention_mask, kwargs)
        cache = past_key_values if cache is None else cache
        cache = getattr(cache, "self_attention_cache", cache)  # GPT-2's may hold one for cross attention beside it
        return self.attend(hidden_states, read_mask(attention_mask), False, position_embeddings, cache), None

    def _check_packing(self, attention_mask: Any, said: Mapping[str, Any]) -> None:
        """Refuse sequences that are packed in one row and not in a mask: flash-attn's kernels read that from the positions."""
        positions = said.get("position_ids")
        implementation = str(getattr(self.config, "_attn_implementation", None))
        if attention_mask is None and positions is not None and implementation.startswith("flash"):
            masked = f"packed sequences are in the masks of 'eager' and 'sdpa' attention, not in those of {implementation!r}"
            refuse_where(positions.diff() != 1, masked)


class DecoderAdapter(Adapter):
    """Causal layers with a cache, called with `hidden_states`, rotary tables, a mask and a cache; they return a pair."""

    has_cache = True

    def find(self, model: nn.Module) -> list[Host]:
        hosts: list[Host] = []
        count = 0
        for name, module in model.named_modules():
            if isinstance(module, DecoderSlot):
                count += 1  # swapped already; the others keep their numbers
            elif _shape(module) is not None:
                hosts.append(self._describe(name, module, count, model))
                count += 1
        return hosts

    def softmax_state(self, host: Host) -> dict[str, Tensor]:
        module: Any = host.module
        shape = _shape(module)
        state: dict[str, Tensor] = {}
        for name in shape or ():
            transposed = name.startswith("c_")  # GPT-2's Conv1D holds its weight the other way round
            for kind, tensor in getattr(module, name).named_parameters():
                state[f"{name}.{kind}"] = tensor.t() if transposed and kind == "weight" else tensor
        fused, out = ("qkv_proj", "c_attn"), {"c_proj": "o_proj"}
        sizes = [heads * host.head_dim for heads in (host.num_heads, host.num_kv_heads, host.num_kv_heads)]
        named: dict[str, Tensor] = {}
        for full, tensor in state.items():
            name, _, kind = full.rpartition(".")
            if name in fused:
                named.update({f"{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.split(sizes), strict=True)})
            else:
                named[f"{out.get(name, name)}.{kind}"] = tensor
        norms = [(norm, getattr(module, norm, None)) for norm in _NORMS]
        return named | {f"{norm}.{kind}": t for norm, layer in norms if layer is not None for kind, t in layer.named_parameters()}

    def install(self, model: nn.Module, host: Host, mechanism: Any) -> Callable[[], None]:
        mechanism.is_rotated = host.rope
        parent, _, leaf = host.name.rpartition(".")
        slot = DecoderSlot(mechanism, host.window_size, getattr(host.module, "config", None))
        return hook_again_after(install_slot(model.get_submodule(parent), leaf, slot, host.layer_idx, None), model)

    def state_prefix(self, host: Host) -> str:
        return f"{host.name}.mechanism."

    def _describe(self, name: str, module: Any, index: int, model: nn.Module) -> Host:
        linear, config = {part: getattr(module, part) for part in _shape(module) or ()}, module.config
        gpt2 = "c_attn" in linear
        head_dim = int(module.head_dim)
        num_heads = int(config.num_attention_heads)
        bias = [layer.bias is not None for layer in linear.values()]
        dropout = module.attn_dropout.p if gpt2 else module.attention_dropout
        return Host(
            name=name,
            module=module,
            adapter=self,
            index=index,
            dim=int(config.hidden_size),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(module),
            head_dim=head_dim,
            is_causal=bool(module.is_causal),
            qkv_bias=bias[0],
            proj_bias=bias[-1],
            scale=float(module.scaling),
            qk_norm=hasattr(module, "q_norm"),
            rope=not gpt2,
            window_size=_window(module),
            softcap=getattr(module, "attn_logit_softcapping", None),
            attn_drop=float(dropout or 0.0),
            proj_drop=float(module.resid_dropout.p) if gpt2 else 0.0,
            prefix_tokens=0,
            spatial=False,
            grid_size=None,
            layer_idx=module.layer_idx,
            refuse=_refusal(module, linear, model) or shared_problem(model, name, module),
        )


def _shape(module: Any) -> tuple[str, ...] | None:
    """The names of a decoder layer's projections; None for any other module."""
    if (
        not type(module).__module__.startswith("transformers.")
        or not hasattr(module, "layer_idx")
        or not hasattr(module, "scaling")
    ):
        return None
    if not hasattr(module, "head_dim") or not hasattr(module, "is_causal") or not hasattr(module, "config"):
        return None
    if getattr(module, "is_cross_attention", False):
        return None  # GPT-2's, to an encoder: it stays
    return next((names for names in _SHAPES if all(isinstance(getattr(module, n, None), nn.Module) for n in names)), None)


def _window(module: Any) -> int | None:
    """Tokens that a layer sees, itself included; Mistral and Phi-3 say it for all layers in their configuration."""
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = getattr(module.config, "sliding_window", None) if family_of(module) in {"mistral", "phi3"} else None
    return None if window is None else int(window)


def _rotated_share(config: Any) -> float:
    """The share of a head's channels that rotary tables turn."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    shares = [value for one in each if (value := one.get("partial_rotary_factor")) is not None]
    return float(min(shares, default=getattr(config, "partial_rotary_factor", None) or 1.0))


def _num_kv_heads(module: Any) -> int:
    """Key and value heads; GPT-2 has as many as query heads."""
    config = module.config
    grouped = None if hasattr(module, "c_attn") else getattr(config, "num_key_value_heads", None)
    return int(grouped or config.num_attention_heads)


def _size_problem(module: Any, linear: Mapping[str, Any]) -> str | None:
    """Why projections are not of the sizes that the configuration says, as after heads were pruned; None if they are."""
    heads, kv_heads = int(module.config.num_attention_heads), _num_kv_heads(module)
    want = module.head_dim * (heads + 2 * kv_heads)
    have = sum(layer.weight.shape[1 if name == "c_attn" else 0] for name, layer in linear.items() if name not in _OUTPUTS)
    if have == want:
        return None
    heads_of = f"{heads} + 2 * {kv_heads} heads of {module.head_dim}"
    return f"its projections have {have} rows, {heads_of} have {want}; were heads pruned?"


def _refusal(module: Any, linear: Mapping[str, nn.Module], model: Any) -> str | None:
    """Why the layer cannot be swapped; None if it can."""
    family = family_of(module)
    if family not in _FAMILIES:
        return f"{type(module).__name__} is of a family that is not known: known are {', '.join(sorted(_FAMILIES))}"
    plain = {name: layer for name, layer in linear.items() if not (name.startswith("c_") and type(layer).__name__ == "Conv1D")}
    if problem := linear_problem(**plain) or describe_refusal(module, {*linear, *_NORMS}):
        return problem
    if not module.is_causal:
        return "its decoder attends in both directions (use_bidirectional_attention)"
    if getattr(getattr(model, "config", None), "model_type", None) == "gemma3":
        return "its model lets the tokens of an image see each other, which a causal mechanism does not; swap its text model alone"
    if (share := _rotated_share(module.config)) != 1.0:
        return f"its rotary tables turn {share:.0%} of a head's channels; mechanisms turn all of them"
    if problem := _size_problem(module, linear):
        return problem
    return window_problem(_window(module), module.config)


register_adapter(DecoderAdapter())
