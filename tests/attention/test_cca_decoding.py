"""Decoding with core-context attention and no gradients: the cache appends in place, in buffers with some room."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from attention_zoo.attention import cca
from attention_zoo.attention.cache import measured_cache_bytes
from tests.attention.test_cca import OPTIONS, build, close, decode, padding, tokens


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little that the tests fill it up."""
    monkeypatch.setattr(cca, "_ROOM", 3)


@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 3, 5]), min_size=1, max_size=14),
    w=st.integers(0, 8),
    p=st.integers(1, 4),
    options=st.sampled_from(OPTIONS),
    inference=st.booleans(),
)
def test_any_split_equals_one_forward(chunks: list[int], w: int, p: int, options: dict[str, Any], inference: bool) -> None:
    module, x = build(w, p, **options), tokens(sum(chunks))
    with torch.inference_mode() if inference else torch.no_grad():
        close(decode(module, x, tuple(chunks)), module(x))


@given(data=st.data(), w=st.integers(0, 7), p=st.integers(1, 4), options=st.sampled_from(OPTIONS), prompt=st.integers(1, 9))
def test_any_padding(data: Any, w: int, p: int, options: dict[str, Any], prompt: int) -> None:
    length = prompt + 9
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=2, max_size=3)))
    module, x = build(w, p, **options), tokens(length, len(mask))
    with torch.no_grad():
        out = decode(module, x, (prompt, *(1,) * 9), mask)
        for i, row in enumerate(mask):
            if row.any():
                close(out[i : i + 1, row], module(x[i : i + 1, row]))


@torch.no_grad()
def test_what_is_kept_stays_where_it_is() -> None:
    module, x, cache = build(4, 2), tokens(40), DynamicCache()
    decode(module, x[:, :20], (19, 1), cache=cache)
    layer, places = cache.layers[0], []
    for i in range(20, 40):
        decode(module, x[:, i : i + 1], (1,), cache=cache)
        places.append((layer.keys.untyped_storage().data_ptr(), layer.core_keys.untyped_storage().data_ptr()))
        assert measured_cache_bytes(cache) == 2 * 8 * module.cache_elements(i + 1)
        for tensor in (layer.keys, layer.values, layer.core_keys, layer.core_values):
            assert tensor.untyped_storage().nbytes() <= 8 * tensor.numel() + 8 * 2 * tensor.shape[1] * 4 * 5
    assert sum(a[0] != b[0] for a, b in itertools.pairwise(places)) <= 7
    assert sum(a[1] != b[1] for a, b in itertools.pairwise(places)) <= 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["shallow", "deep"])
@torch.no_grad()
def test_copies_go_ways_of_their_own(copied: Any) -> None:
    """Also where two layers have the same tensors: the first to append keeps the buffer."""
    module, x, y = build(4, 2), tokens(30), tokens(30, seed=6)
    y[:, :15] = x[:, :15]
    cache = DynamicCache()
    decode(module, x[:, :15], (12, 1, 1, 1), cache=cache)
    other = DynamicCache()
    other.layers.append(copied(cache.layers[0]))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(15, 30):
        parts[0].append(decode(module, x[:, i : i + 1], (1,), cache=cache))
        parts[1].append(decode(module, y[:, i : i + 1], (1,), cache=other))
    close(torch.cat(parts[0], 1), module(x)[:, 15:])
    close(torch.cat(parts[1], 1), module(y)[:, 15:])


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_beams_and_repetitions(padded: bool) -> None:
    module, x = build(3, 2), tokens(24, 3)
    mask = padding(24, (24, 18, 14) if padded else (24,) * 3)
    cache, order = DynamicCache(), torch.tensor([1, 1, 2])

    def step(i: int, rows: Tensor) -> Tensor:
        seen = mask[rows][:, : i + 1] if padded else None
        return module(x[rows, i : i + 1], past_key_values=cache, attention_mask=seen)

    decode(module, x[:, :12], (10, 1, 1), mask[:, :12] if padded else None, cache)
    rows, got = torch.arange(3), []
    for i in range(12, 24):
        if i == 15:
            cache.reorder_cache(order)
            rows = rows[order]
        if i == 19:
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)
        if i == 21:
            cache.batch_select_indices(torch.tensor([0, 4]))
            rows = rows[[0, 4]]
        got.append(step(i, rows))
        want = module(x[rows, : i + 1], attention_mask=mask[rows][:, : i + 1] if padded else None)
        close(got[-1], want[:, -1:])


def test_with_and_without_gradients_in_turns() -> None:
    """A step with gradients must not be spoilt by the steps that come before its backward."""
    module, x, cache = build(3, 2), tokens(16).requires_grad_(), DynamicCache()
    with torch.no_grad():
        decode(module, x[:, :10], (8, 1, 1), cache=cache)
    out = decode(module, x[:, 10:12], (2,), cache=cache)
    with torch.no_grad():
        rest = decode(module, x[:, 12:], (1,) * 4, cache=cache)
    close(torch.cat([out, rest], 1), module(x)[:, 10:])
    out.sum().backward()
    assert x.grad is not None


def test_inference_and_no_grad_in_turns() -> None:
    module, x, cache, got = build(3, 2), tokens(16), DynamicCache(), []
    for i, context in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad] * 4):
        with context():
            got.append(decode(module, x[:, i : i + 1], (1,), cache=cache).clone())
    with torch.no_grad():
        close(torch.cat([t.clone() for t in got], 1), module(x))


@torch.no_grad()
def test_a_change_of_dtype() -> None:
    module, x, cache = build(3, 2), tokens(20), DynamicCache()
    decode(module, x[:, :14], (10, 1, 1, 1, 1), cache=cache)
    single = copy.deepcopy(module).float()
    out = decode(single, x[:, 14:].float(), (1,) * 6, cache=cache)
    close(out.double(), module(x)[:, 14:], 1e-4)


@torch.no_grad()
def test_padded_tokens_are_moved_only_when_the_room_is_used_up() -> None:
    module, x, mask, cache = build(4, 2), tokens(44, 3), padding(44, (44, 39, 30)), DynamicCache()
    decode(module, x[:, :20], (20,), mask[:, :20], cache)
    layer, places = cache.layers[0], []
    assert layer.keys.shape[2] == 4 + 2 - 1
    for i in range(20, 44):
        out = module(x[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1])
        close(out, module(x[:, : i + 1], attention_mask=mask[:, : i + 1])[:, -1:])
        assert layer.keys.shape[2] <= 4 + 2 - 1 + 3
        places.append(layer.keys.untyped_storage().data_ptr())
    assert sum(a != b for a, b in itertools.pairwise(places)) <= 16
