"""`generate` on a tiny decoder with each causal mechanism: what Hugging Face's own generation tests ask of a model.

Their mixin is not shipped with transformers, so the same questions are asked here: greedy, sampling, beam search, assisted
generation, static cache, left padding, continuing from a cache; with and without cache must agree token by token.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_case import seeded
from decoder_case import CACHE, DecoderCase, causal_cases, prompt
from torch import Tensor
from transformers import DynamicCache

import attention_zoo as az
from attention_zoo.attention.cache import StateCacheLayer, measured_cache_bytes

CASES = causal_cases()
CROPPABLE = [c for c in CASES if c.info.static_cache]  # those that keep every key and value
each = pytest.mark.parametrize("case", CASES, ids=str)


def generate(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with seeded(5):
        ids: Tensor = model.generate(input_ids, **{"max_new_tokens": 9, "do_sample": False, **kwargs})
    return ids


@each
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 8}, {"num_beams": 3}], ids=["greedy", "sample", "beam"])
def test_with_cache_equals_without(case: DecoderCase, how: dict[str, Any]) -> None:
    model, ids = case.build(), prompt()
    want = generate(model, ids, use_cache=False, **how)
    assert torch.equal(generate(model, ids, use_cache=True, **how), want)
    assert want.shape == (2, 22)
    assert want[:, 13:].unique().numel() > 2, "the model says more than one thing"


@each
def test_scores_with_cache_equal_scores_without(case: DecoderCase) -> None:
    """Tokens may agree by luck; the logits of every step may not."""
    model, ids = case.build(), prompt(5)
    kwargs = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 14}
    with_cache, without = (torch.stack(generate(model, ids, use_cache=u, **kwargs).logits) for u in (True, False))
    torch.testing.assert_close(with_cache, without, atol=2e-4, rtol=1e-4)


@each
def test_a_left_padded_batch_equals_the_prompts_alone(case: DecoderCase) -> None:
    if case.attention == "combiner":
        lengths = (12, 8, 4)  # its segments are counted by slots: whole ones can be padding
    else:
        lengths = (12, 7, 3)
    model, ids = case.build(), prompt(12, 3)
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    batch = generate(model, torch.where(mask.bool(), ids, 0), attention_mask=mask)
    for i, length in enumerate(lengths):
        alone = generate(model, ids[i : i + 1, 12 - length :])
        assert batch[i, 12:].tolist() == alone[0, length:].tolist(), f"prompt of {length} tokens"


@each
def test_continuing_from_a_cache(case: DecoderCase) -> None:
    model, ids = case.build(), prompt()
    want = generate(model, ids, max_new_tokens=10)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    got = generate(model, first.sequences, max_new_tokens=6, **{CACHE: first[CACHE]})
    assert torch.equal(got, want)


@each
def test_static_cache(case: DecoderCase) -> None:
    model, ids = case.build(), prompt()
    if not case.info.static_cache:
        with pytest.raises(ValueError, match="static cache"):
            generate(model, ids, cache_implementation="static")
        return
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = {"attention_mask": mask}
    assert torch.equal(generate(model, ids, cache_implementation="static", **padded), generate(model, ids, **padded))


@each
def test_assisted_generation(case: DecoderCase) -> None:
    """A draft model proposes, the model accepts or takes back: its cache is cut, which summaries cannot be."""
    model, ids = case.build(), prompt(batch=1)
    assistant = DecoderCase("gqa").build(num_hidden_layers=1)
    if case not in CROPPABLE:
        with pytest.raises((NotImplementedError, ValueError), match=r"assisted generation|crop"):
            generate(model, ids, assistant_model=assistant)
        return
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


@each
def test_the_cache_is_as_large_as_the_report_says(case: DecoderCase) -> None:
    model, ids = case.build(), prompt(21)
    outputs = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    cache, report = outputs[CACHE], az.cache_report(model, 25)  # the last token generated was not fed back
    assert int(cache.get_seq_length()) == 25
    assert measured_cache_bytes(cache) == 2 * report.cache_bytes
    assert len(report.layers) == 2


@each
def test_a_chunked_prefill_equals_one_forward(case: DecoderCase) -> None:
    model, ids = case.build(), prompt(17)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))


@each
def test_batch_repeat_and_select(case: DecoderCase) -> None:
    """What contrastive search and the like do to a cache."""
    model, ids = case.build(), prompt(11)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :10], use_cache=True, **{CACHE: cache})
        want = model(ids).logits[:, -1]
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        got = model(ids[:, 10:].repeat_interleave(2, 0), **{CACHE: repeated}).logits[:, -1]
        cache.batch_select_indices(torch.tensor([1]))
        selected = model(ids[1:, 10:], **{CACHE: cache}).logits[:, -1]
    if not case.info.batch_coupled:
        torch.testing.assert_close(got, want.repeat_interleave(2, 0), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(selected, want[1:], atol=2e-4, rtol=1e-4)
    assert got.isfinite().all()


def test_a_layer_refuses_another_mechanisms_tokens() -> None:
    own = [c for c in CASES if not c.info.static_cache]
    if not own:
        pytest.skip("no registered mechanism has a cache layer of its own")
    cache = DynamicCache()
    DecoderCase("gqa").build()(prompt(), **{CACHE: cache})
    with pytest.raises(ValueError, match="another mechanism"):
        own[0].build()(prompt(), **{CACHE: cache})


def test_every_method_of_a_cache_layer_is_there() -> None:
    """A new version of transformers may ask a layer for something new: then this fails, not a user's generate."""
    from transformers.cache_utils import DynamicLayer

    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(DynamicLayer) <= public(StateCacheLayer)


def test_hybrids_decode_and_are_saved(tmp_path: Any) -> None:
    names = [c.attention for c in CASES]
    case = DecoderCase("gqa")
    options = [DecoderCase(name).attention_kwargs() for name in names]
    model = case.build(attention=names, attention_kwargs=options, num_hidden_layers=len(names))
    want = generate(model, prompt(), use_cache=False)
    assert torch.equal(generate(model, prompt()), want)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(layer.self_attn) for layer in again.model.layers] == [type(layer.self_attn) for layer in model.model.layers]
    assert torch.equal(generate(again, prompt()), want)
