"""Official Combiner layouts: flax and TF layers of every pattern, and the flax language model, converted back and forth."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as az
from attention_zoo.checkpoints import CheckpointError

FLAX = {"query.kernel": (6, 2, 5), "key.kernel": (6, 2, 5), "value.kernel": (6, 2, 5), "DenseGeneral_0.kernel": (2, 5, 6)}
FLAX_AXIAL = {
    **FLAX,
    "DenseGeneral_1.kernel": (6, 2, 5),
    "DenseGeneral_2.kernel": (2, 5, 6),
    "LayerNorm_0.scale": (6,),
    "LayerNorm_0.bias": (6,),
}
TF = {
    **{f"{name}/weight": (6, 2, 5) for name in "qkv"},
    **{f"{name}/bias": (2, 5) for name in "qkv"},
    "dense/weight": (2, 5, 6),
    "dense/bias": (6,),
}
TF_AXIAL = {
    **TF,
    "rowmajor_param_post/dense/weight": (2, 5, 6),
    "rowmajor_param_post/dense/bias": (6,),
    "rowmajor_param_post/pre_norm/gamma": (6,),
    "rowmajor_param_post/pre_norm/beta": (6,),
    "rowmajor_param_post/dense_1/weight": (6, 2, 5),
    "rowmajor_param_post/dense_1/bias": (2, 5),
}
TF_DEEPSET = {**TF, "pooling_query/dense/weight": (5, 5), "pooling_key/dense/weight": (5, 5)}
PLAIN = {"dim": 6, "num_heads": 2, "head_dim": 5}
JAX, TENSORFLOW = {**PLAIN, "qkv_bias": False, "proj_bias": False}, {**PLAIN, "qkv_bias": True}
LAYERS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    **{f"flax-{p}": (FLAX, {**JAX, "pattern": p}) for p in ("fixed", "logsparse", "mixture")},
    "flax-axial": (FLAX_AXIAL, {**JAX, "pattern": "axial"}),
    "flax-axial-wsum": ({**FLAX}, {**JAX, "pattern": "axial", "row_summary": "wsum"}),
    "tf-fixed": (TF, TENSORFLOW),
    "tf-axial": (TF_AXIAL, {**TENSORFLOW, "pattern": "axial"}),
    "tf-deepset": (TF_DEEPSET, {**TENSORFLOW, "summary_act": "deepset"}),
}


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_load_strictly(name: str) -> None:
    shapes, options = LAYERS[name]
    state = random_state(shapes)
    module = az.create_attention("combiner", **options)
    converted = az.convert_official_state_dict("combiner", state, **options)
    module.load_state_dict(converted, strict=True)
    dotted = {key.replace("/", "."): tensor for key, tensor in state.items()}
    again = az.convert_official_state_dict("combiner", dotted, **options)
    assert all(torch.equal(again[key], tensor) for key, tensor in converted.items())
    own = az.convert_official_state_dict("combiner", converted, **options)
    assert own.keys() == converted.keys(), "our own names pass through"


def test_kernels_mean_the_same() -> None:
    """Each projection as an einsum over the official kernels."""
    state, x = random_state(TF_AXIAL), torch.randn(3, 6)
    module = az.create_attention("combiner", **TENSORFLOW, pattern="axial")
    module.load_state_dict(az.convert_official_state_dict("combiner", state, **TENSORFLOW, pattern="axial"))
    q, k, v = module.qkv(x).view(3, 3, 2, 5).unbind(1)
    for got, name in ((q, "q"), (k, "k"), (v, "v"), (module.summary_key(x).view(3, 2, 5), "rowmajor_param_post/dense_1")):
        torch.testing.assert_close(got, torch.einsum("nc,chd->nhd", x, state[f"{name}/weight"]) + state[f"{name}/bias"])
    for layer, name in ((module.proj, "dense"), (module.summary_proj, "rowmajor_param_post/dense")):
        want = torch.einsum("nhd,hdc->nc", q, state[f"{name}/weight"]) + state[f"{name}/bias"]
        torch.testing.assert_close(layer(q.flatten(1)), want)
    state = random_state(TF_DEEPSET)
    converted = az.convert_official_state_dict("combiner", state, **TENSORFLOW, summary_act="deepset")
    assert torch.equal(converted["pool_q.weight"], state["pooling_query/dense/weight"].T)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (FLAX_AXIAL, JAX, r"unknown keys: DenseGeneral_1\.kernel, DenseGeneral_2\.kernel, LayerNorm_0\.bias, LayerNorm_0\.scale"),
        (FLAX, {**JAX, "pattern": "axial"}, r"missing keys: DenseGeneral_1\.kernel.*LayerNorm_0\.scale"),
        (TF, {**PLAIN, "proj_bias": False}, r"unknown keys: dense\.bias, k\.bias, q\.bias, v\.bias"),
        ({"qkv.weight": (30, 6)}, JAX, r"missing keys: proj\.weight"),
        (FLAX, {**JAX, "summary_act": "deepset"}, r"no pool_q\.weight"),
    ],
)
def test_keys_that_do_not_fit_are_listed(shapes: dict[str, tuple[int, ...]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        az.convert_official_state_dict("combiner", random_state(shapes), **options)


# --- the language model -----------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 7, "dim": 6, "depth": 2, "num_heads": 2, "mlp_dim": 8, "max_len": 12}
OFFICIAL = {
    "fixed": "_SelfAttSqrtn_0",
    "axial": "_SelfAttAxialRowmajor_0",
    "logsparse": "_SelfAttLogn_0",
    "mixture": "_AxialMixtureAtt_0",
}


def language_model(pattern: str) -> dict[str, Tensor]:
    norm = {"scale": (6,), "bias": (6,)}
    shapes: dict[str, tuple[int, ...]] = {"Embed_0.embedding": (7, 6)}
    shapes |= {f"autoreg_model.LayerNorm_0.{k}": s for k, s in norm.items()}
    shapes |= {"autoreg_model.Dense_0.kernel": (6, 7), "autoreg_model.Dense_0.bias": (7,)}
    for i in range(2):
        layer = f"autoreg_model.transformer_layer_{i}."
        shapes |= {f"{layer}LayerNorm_{j}.{k}": s for j in range(2) for k, s in norm.items()}
        shapes |= {f"{layer}MlpBlock_0.Dense_0.kernel": (6, 8), f"{layer}MlpBlock_0.Dense_0.bias": (8,)}
        shapes |= {f"{layer}MlpBlock_0.Dense_1.kernel": (8, 6), f"{layer}MlpBlock_0.Dense_1.bias": (6,)}
        attention = FLAX_AXIAL if pattern == "axial" else FLAX
        for key, shape in attention.items():
            shapes[f"{layer}{OFFICIAL[pattern]}.{key}"] = tuple(3 if n == 5 else n for n in shape)
    return random_state(shapes)


@pytest.mark.parametrize("pattern", OFFICIAL)
def test_language_models_load_strictly(pattern: str) -> None:
    state = language_model(pattern)
    model = az.create_model("combiner_lm", **SIZES, pattern=pattern)
    converted = az.convert_official_state_dict("combiner_lm", state, **SIZES, pattern=pattern)
    model.load_state_dict(converted, strict=True)
    assert torch.equal(model.lm_head.weight, state["autoreg_model.Dense_0.kernel"].T)
    assert torch.equal(model.model.layers[1].mlp.fc1.weight, state["autoreg_model.transformer_layer_1.MlpBlock_0.Dense_0.kernel"].T)
    assert az.convert_official_state_dict("combiner_lm", converted, **SIZES).keys() == converted.keys()


def test_language_models_that_do_not_fit() -> None:
    state = language_model("fixed")
    lost = "autoreg_model.transformer_layer_1.LayerNorm_1.scale"
    with pytest.raises(CheckpointError, match=f"missing keys: {re.escape(lost)}"):
        az.convert_official_state_dict("combiner_lm", {k: v for k, v in state.items() if k != lost}, **SIZES)
    with pytest.raises(CheckpointError, match="missing keys"):
        az.convert_official_state_dict("combiner_lm", state, **{**SIZES, "depth": 3})
    for options in ({"pos_emb": "learned"}, {"attention": "mha"}, {"tie_embeddings": True}, {"tie_word_embeddings": True}):
        with pytest.raises(CheckpointError, match="sinusoidal"):
            az.convert_official_state_dict("combiner_lm", state, **SIZES, **options)


def test_hugging_face_names_of_the_arguments() -> None:
    renamed = {"dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
    state, sizes = language_model("axial"), {renamed.get(name, name): value for name, value in SIZES.items()}
    model = az.create_model("combiner_lm", **sizes, pattern="axial")
    model.load_state_dict(az.convert_official_state_dict("combiner_lm", state, **sizes, pattern="axial"), strict=True)


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_may_be_missing_where_it_is_tied(tied: bool) -> None:
    state = az.create_model("combiner_lm", **SIZES).state_dict()
    del state["lm_head.weight"]
    converted = az.convert_official_state_dict("combiner_lm", state, **SIZES, tie_word_embeddings=tied)
    assert ("lm_head.weight" in converted) == tied
