"""The registry: names, capabilities, lookup, and what its errors say."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from torch import nn

import attention_zoo as az
from attention_zoo import registry
from attention_zoo.registry import PATTERNS, UnknownNameError, register_attention

FIELDS: dict[str, Any] = {"title": "A Title", "arxiv": None, "year": 2024, "repository": None, "patterns": {"noncausal_self"}}


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests register into copies of the tables."""
    for table in ("_attentions", "_models", "_converters"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def register(name: str = "toy", **fields: Any) -> type:
    @register_attention(name, **{**FIELDS, **fields})
    class Toy(nn.Module):
        """Toys around.

            y = x
              + 0

        Args:
            dim: channels.
        """

        def __init__(self, dim: int, num_heads: int = 1, *, toy_size: int = 1) -> None:
            super().__init__()
            self.sizes = dim, num_heads, toy_size

    return Toy


def test_register_and_create() -> None:
    cls = register(cost="O(N)", engines=["torch"], min_grid_size=(2, 2), causal_options={"a": 1}, sequence_options={"b": None})
    info = az.attention_info("toy")
    assert (info.name, info.title, info.cost, info.engines) == ("toy", "A Title", "O(N)", ("torch",))
    assert (info.summary, info.equation) == ("Toys around.", "y = x\n  + 0")
    assert (info.min_grid_size, info.causal_options, info.batch_coupled) == ((2, 2), {"a": 1}, False)
    assert info.sequence_options == {"b": None}
    assert info is cls.attention_info
    assert registry.attention_class("toy") is cls
    assert az.create_attention("toy", 8, toy_size=3).sizes == (8, 1, 3)
    assert az.create_attention("toy", dim=8, num_heads=2).sizes == (8, 2, 1)


def test_a_name_is_given_once() -> None:
    cls = register()
    with pytest.raises(ValueError, match=r"'mha' is registered already: attention_zoo\.attention\.mha\.MultiHeadAttention"):
        register("mha")
    register_attention("toy", **FIELDS)(cls)  # the same definition again: a module that is reloaded


def test_a_model_name_is_given_once() -> None:
    registry.register_model_info("toy_s", "toy", depth=2)
    registry.register_model_info("toy_s", "toy", depth=2)
    with pytest.raises(ValueError, match="'toy_s' is registered already"):
        registry.register_model_info("toy_s", "toy", depth=3)
    assert registry.model_info("toy_s").kwargs == {"depth": 2}
    assert registry.model_info()["toy_s"].family == "toy"
    with pytest.raises(UnknownNameError, match=r"no model is named 'toys'; did you mean 'toy_s'"):
        registry.model_info("toys")


def test_converters() -> None:
    register("plain")
    registry.register_model_info("toy_s", "toy", depth=2)

    @registry.register_converter("toy", "other")
    def convert(state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {**state_dict, **kwargs}

    assert registry.converter("toy_s") == (convert, {"depth": 2})
    assert registry.converter("other") == (convert, {})
    assert az.convert_official_state_dict("toy_s", {"a": 1}) == {"a": 1, "depth": 2}
    assert az.convert_official_state_dict("toy_s", {"a": 1}, depth=3) == {"a": 1, "depth": 3}
    registry.register_converter("toy")(convert)
    with pytest.raises(ValueError, match="a converter named 'toy' is registered already"):
        registry.register_converter("toy")(lambda state_dict, **kwargs: {})
    with pytest.raises(UnknownNameError, match=r"'plain' has no official checkpoint format; those that have one: .*other.*toy"):
        registry.converter("plain")
    with pytest.raises(UnknownNameError, match=r"'othr'; did you mean 'other'"):
        registry.converter("othr")


@pytest.mark.parametrize("patterns", [(), {"sideways"}, {"noncausal_self", "sideways"}])
def test_patterns_are_known(patterns: Any) -> None:
    with pytest.raises(ValueError, match=r"'toy': patterns must be a non-empty subset of .*noncausal_self"):
        register(patterns=patterns)


@pytest.mark.parametrize(("wrong", "right"), [("mah", "mha"), ("MHA", "mha"), ("toy-attention", "toy_attention"), ("Toy", "toy")])
def test_unknown_names_suggest_the_nearest(wrong: str, right: str) -> None:
    register()
    register("toy_attention")
    for look_up in (az.attention_info, az.create_attention):
        with pytest.raises(UnknownNameError, match=rf"no attention is named '{wrong}'; did you mean .*'{right}'"):
            look_up(wrong)


def test_unknown_names_without_a_near_one_list_what_is_known() -> None:
    with pytest.raises(UnknownNameError, match=r"known: .*mha"):
        az.attention_info("zzzzzzzz")
    with pytest.raises(KeyError):
        az.attention_info("zzzzzzzz")
    with pytest.raises(ValueError, match=r"^no attention is named 'zzzzzzzz'"):  # readable: not the repr that KeyError prints
        az.attention_info("zzzzzzzz")


def test_unknown_options_suggest_the_nearest() -> None:
    register()
    with pytest.raises(TypeError, match=r"'toy' has no option 'toysize'; did you mean 'toy_size'\?; its options: dim, num_heads"):
        az.create_attention("toy", 8, toysize=1)
    with pytest.raises(TypeError, match="dim"):
        az.create_attention("toy")


def test_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_attentions", {})
    register("grid", spatial=True, engines=["torch", "flash"])
    register("gru", patterns={"causal_self"}, kv_cache=True, engines=["triton"])
    register("bridge", patterns={"noncausal_cross"})
    register("both", patterns=PATTERNS, kv_cache=True, engines=["torch"])
    names = az.list_attentions
    assert names() == ["both", "bridge", "grid", "gru"]
    assert names("gr*") == ["grid", "gru"]
    assert names(["b*", "gru"]) == ["both", "bridge", "gru"]
    assert names("gr*", exclude="*u") == ["grid"]
    assert names(exclude=["b*", "gru"]) == ["grid"]
    assert names("GR*") == []
    assert (names(causal=True), names(causal=False)) == (["both", "gru"], ["bridge", "grid"])
    assert (names(cross=True), names(cross=False)) == (["both", "bridge"], ["grid", "gru"])
    assert (names(spatial=True), names(kv_cache=True)) == (["grid"], ["both", "gru"])
    assert names(causal=True, cross=False) == ["gru"]
    assert names(engine="torch") == ["both", "grid"]
    assert names(pattern="noncausal_self") == ["both", "grid"]
    with pytest.raises(ValueError, match=r"unknown pattern 'causal'; the patterns are noncausal_self, "):
        names(pattern="causal")


def test_information_is_frozen() -> None:
    info = az.attention_info("mha")
    for field in dataclasses.fields(info):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(info, field.name, None)
    assert isinstance(hash(info), int)
    assert copy.deepcopy(info) == pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize("pattern", PATTERNS)
def test_capabilities_follow_from_the_patterns(pattern: str) -> None:
    info = az.AttentionInfo("toy", "A Title", None, 2024, None, frozenset({pattern}))
    assert info.causal == pattern.startswith("causal")
    assert info.cross == pattern.endswith("cross")


def test_summary_and_equation_of_sparse_docstrings() -> None:
    def read(text: str | None) -> tuple[str, str]:
        return registry._read_docstring(type("Toy", (), {"__doc__": text}))

    assert read(None) == ("", "")
    assert read("One line.") == ("One line.", "")
    assert read("One line.\n\n    Args:\n        dim: channels.\n    ") == ("One line.", "")
    assert read("One line.\n\n        a = b\n\n        c = d\n\n    Text.\n    ") == ("One line.", "a = b\n\nc = d")
