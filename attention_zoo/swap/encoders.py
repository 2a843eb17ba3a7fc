"""Hugging Face's encoders as hosts: BERT, RoBERTa and their kin; ViT, DeiT, DINOv2; the towers of CLIP and SigLIP.

Two shapes of layer: BERT's, whose projections stand in `self` (DINOv2's once in `attention`) and whose output projection in
`output.dense`, and the later one with `q_proj, k_proj, v_proj` and `o_proj` or `out_proj`. Layers of these shapes in other families
are listed and refused: what their models do around them (position biases in masks, windows, dropped tokens) was not checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from attention_zoo.swap.hosts import Adapter, Host, register_adapter
from attention_zoo.swap.hugging_face import check_call, family_of, hook_again_after, read_mask
from attention_zoo.swap.slot import Slot, describe_refusal, install_slot, linear_problem, replace_module, shared_problem

__all__ = ["BertAdapter", "BertSlot", "Dinov2Adapter", "Dinov2Slot", "EncoderAdapter", "EncoderSlot"]

# Folders of transformers.models whose layers have been read.
_BERTS = {"bert", "camembert", "electra", "roberta", "xlm_roberta"}
_OLD_DINOV2 = {"dinov2", "dinov2_with_registers"}
_ENCODERS = {"clip", "deit", "dinov2", "dinov2_with_registers", "ijepa", "siglip", "siglip2", "vit", "vit_msn"}
_CAUSAL_TOWERS = {"clip_text_model"}


class EncoderSlot(Slot):
    """A mechanism that is called as Hugging Face's encoders call their attention; there are no attention weights to return."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, is_causal: bool | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """(B, N, C) and a mask of any kind that an attention implementation asks for -> (B, N, C), None.

        Raises:
            ValueError: an input that the mechanism does not take.
        """
        check_call(self.mechanism.attention_info.name, kwargs)
        return self.attend(hidden_states, read_mask(attention_mask), bool(is_causal)), None


class BertSlot(EncoderSlot):
    """The same in the place of BERT's `self`, whose output projection is the mechanism's."""

    place = "self"


class Dinov2Slot(EncoderSlot):
    """The same in the place of what DINOv2 called its `attention` inside `attention`."""

    place = "attention"


class _HuggingFaceAdapter(Adapter):
    """What both shapes share: the search, and the description of a layer."""

    families: set[str]
    slot: type[EncoderSlot]
    place: str  # what is replaced, seen from the host's module: "" for itself

    def find(self, model: nn.Module) -> list[Host]:
        hosts: list[Host] = []
        count = 0
        for name, module in model.named_modules():
            if type(module) is self.slot:
                count += 1  # the others keep their numbers
            elif self._fits(module):
                hosts.append(self._describe(name, module, count, model))
                count += 1
        return hosts

    def softmax_state(self, host: Host) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": tensor
            for name, layer in self._linear(host.module).items()
            for kind, tensor in layer.named_parameters()
        }

    def state_prefix(self, host: Host) -> str:
        return ".".join(part for part in (host.name, self.place, "mechanism.") if part)

    def _fits(self, module: nn.Module) -> bool:
        """Whether the module has the shape of this adapter's layers."""
        raise NotImplementedError

    def _linear(self, module: nn.Module) -> dict[str, Any]:
        """q_proj, k_proj, v_proj and o_proj of a layer."""
        raise NotImplementedError

    def _settings(self, module: Any) -> dict[str, Any]:
        """num_heads, head_dim, scale, is_causal and attn_drop of a layer."""
        raise NotImplementedError

    def _unknown(self, module: nn.Module) -> str | None:
        """Which parts of a layer could not be read."""
        raise NotImplementedError

    def _describe(self, name: str, module: nn.Module, index: int, model: nn.Module) -> Host:
        linear, (prefix_tokens, conv, grid_size) = self._linear(module), _patches(model, name)
        settings = self._settings(module)
        return Host(
            name=name,
            module=module,
            adapter=self,
            index=index,
            dim=linear["o_proj"].out_features,
            num_kv_heads=settings["num_heads"],
            qkv_bias=linear["q_proj"].bias is not None,
            proj_bias=linear["o_proj"].bias is not None,
            qk_norm=False,
            rope=False,
            window_size=None,
            softcap=None,
            proj_drop=0.0,
            prefix_tokens=prefix_tokens,
            spatial=conv is not None,
            grid_size=grid_size,
            layer_idx=index,
            refuse=self._refusal(name, module, settings, linear) or shared_problem(model, name, module),
            **settings,
        )

    def _refusal(self, name: str, module: nn.Module, settings: dict[str, Any], linear: dict[str, Any]) -> str | None:
        """Why the layer cannot be swapped; None if it can."""
        if not name:
            return "it is the whole model; a swap replaces layers inside one"
        family = family_of(module)
        if family == "beit":
            return "its model adds a relative position bias, which would be lost"
        if family not in self.families:
            return f"{type(module).__name__} is of a family that is not known: known are {', '.join(sorted(self.families))}"
        if problem := linear_problem(**linear) or self._unknown(module):
            return problem
        if settings["head_dim"] * settings["num_heads"] != linear["q_proj"].out_features:
            return f"{linear['q_proj'].out_features} channels are not {settings['num_heads']} heads of {settings['head_dim']}"
        return None


class BertAdapter(_HuggingFaceAdapter):
    """BERT's shape: a module with `self` (query, key, value) and `output` (dense, dropout, normalisation).

    The mechanism takes the place of `self`, its projection included, and `output.dense` that of an identity.
    """

    families = _BERTS
    slot: type[EncoderSlot] = BertSlot
    place = "self"

    def replaced(self, host: Host) -> list[nn.Module]:
        module: Any = host.module
        return [self._inner(module), module.output.dense]

    def install(self, model: nn.Module, host: Host, mechanism: Any) -> Callable[[], None]:
        module: Any = host.module
        _, conv, _ = _patches(model, host.name)
        undo_inner = install_slot(module, self.place, self.slot(mechanism), host.layer_idx, conv)
        undo_dense = replace_module(module.output, "dense", nn.Identity())

        def undo() -> None:
            undo_dense()
            undo_inner()

        return hook_again_after(undo, model)

    def _fits(self, module: nn.Module) -> bool:
        inner, output = self._inner(module), getattr(module, "output", None)
        has = all(isinstance(getattr(inner, name, None), nn.Module) for name in ("query", "key", "value"))
        has = has and hasattr(inner, "num_attention_heads") and hasattr(inner, "attention_head_size")
        return has and hasattr(output, "dense") and not getattr(module, "is_cross_attention", False) and _is_transformers(module)

    def _inner(self, module: nn.Module) -> Any:
        return getattr(module, self.place, None)

    def _linear(self, module: Any) -> dict[str, Any]:
        inner = self._inner(module)
        return {"q_proj": inner.query, "k_proj": inner.key, "v_proj": inner.value, "o_proj": module.output.dense}

    def _settings(self, module: Any) -> dict[str, Any]:
        inner = self._inner(module)
        return {
            "num_heads": inner.num_attention_heads,
            "head_dim": inner.attention_head_size,
            "scale": getattr(inner, "scaling", inner.attention_head_size**-0.5),
            "is_causal": bool(getattr(inner, "is_decoder", False) or getattr(inner, "is_causal", False)),
            "attn_drop": getattr(inner, "dropout_prob", getattr(getattr(inner, "dropout", None), "p", 0.0)),
        }

    def _unknown(self, module: Any) -> str | None:
        inner = self._inner(module)
        if getattr(getattr(inner, "config", None), "position_embedding_type", None) not in (None, "absolute"):
            return "it adds relative position embeddings to its logits, which would be lost"
        if getattr(inner, "is_decoder", False):
            return "it is the self attention of a decoder (is_decoder=True), whose cache is not supported"
        return describe_refusal(inner, {"query", "key", "value"})


class Dinov2Adapter(BertAdapter):
    """DINOv2's shape in transformers before 5.20 or so: BERT's, with `attention` for `self`."""

    families = _OLD_DINOV2
    slot = Dinov2Slot
    place = "attention"


class EncoderAdapter(_HuggingFaceAdapter):
    """The later shape: a module with q_proj, k_proj, v_proj and o_proj or out_proj, and no cache, rotation or second input."""

    families = _ENCODERS
    slot = EncoderSlot
    place = ""

    def install(self, model: nn.Module, host: Host, mechanism: Any) -> Callable[[], None]:
        parent, _, leaf = host.name.rpartition(".")
        _, conv, _ = _patches(model, host.name)
        undo = install_slot(model.get_submodule(parent), leaf, EncoderSlot(mechanism), host.layer_idx, conv)
        return hook_again_after(undo, model)

    def _fits(self, module: nn.Module) -> bool:
        has = all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))
        if not has or not (hasattr(module, "o_proj") or hasattr(module, "out_proj")) or not _is_transformers(module):
            return False
        parameters = inspect.signature(module.forward).parameters
        return not parameters.keys() - {"hidden_states", "attention_mask", "output_attentions", "kwargs"}

    def _linear(self, module: Any) -> dict[str, Any]:
        output = module.o_proj if hasattr(module, "o_proj") else module.out_proj
        return {"q_proj": module.q_proj, "k_proj": module.k_proj, "v_proj": module.v_proj, "o_proj": output}

    def _settings(self, module: Any) -> dict[str, Any]:
        drop = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
        tower = getattr(getattr(module, "config", None), "model_type", "")
        return {
            "num_heads": int(getattr(module, "num_heads", getattr(module, "num_attention_heads", 0))),
            "head_dim": module.head_dim,
            "scale": getattr(module, "scaling", getattr(module, "scale", module.head_dim**-0.5)),
            "is_causal": bool(getattr(module, "is_causal", False)) or tower in _CAUSAL_TOWERS,
            "attn_drop": float(getattr(drop, "p", drop)),
        }

    def _unknown(self, module: nn.Module) -> str | None:
        return describe_refusal(module, {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"})


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _patches(model: nn.Module, name: str) -> tuple[int, nn.Module | None, tuple[int, int] | None]:
    """Of the tower around the module `name`: class, distillation and register tokens, the convolution whose map is the grid, and
    that grid for an image of the model's size.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        embeddings: Any = getattr(model.get_submodule(".".join(parts[:depth])), "embeddings", None)
        if embeddings is None:
            continue
        conv = getattr(getattr(embeddings, "patch_embeddings", None), "projection", getattr(embeddings, "patch_embedding", None))
        if not isinstance(conv, nn.Conv2d):
            return 0, None, None
        registers = getattr(embeddings, "register_tokens", None)
        single = ("cls_token", "class_embedding", "distillation_token")
        prefix_tokens = sum(isinstance(getattr(embeddings, token, None), nn.Parameter) for token in single)
        return prefix_tokens + (0 if registers is None else registers.shape[1]), conv, _grid(embeddings, conv)
    return 0, None, None


def _grid(embeddings: nn.Module, conv: nn.Conv2d) -> tuple[int, int] | None:
    """(H, W) of the patches of an image of the size that the embeddings were built for, where they say it."""
    holders = (embeddings, getattr(embeddings, "patch_embeddings", None))
    size = next((size for holder in holders if (size := getattr(holder, "image_size", None)) is not None), None)
    if size is None:
        return None
    height, width = ((s - k) // step + 1 for s, k, step in zip(to_2tuple(size), conv.kernel_size, conv.stride, strict=True))
    return height, width


register_adapter(BertAdapter())
register_adapter(Dinov2Adapter())
register_adapter(EncoderAdapter())
