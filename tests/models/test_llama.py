"""Llama-style decoders as Hugging Face models: built, configured, initialised, saved, trained, adapted, compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_case import seeded
from decoder_case import VOCABULARY, DecoderCase, causal_cases, prompt
from marks import slow_but
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import attention_zoo as az
from attention_zoo.models.llama import ZooLlamaConfig, ZooLlamaForCausalLM  # type: ignore[import-not-found]

CASES = causal_cases()
each = pytest.mark.parametrize("case", CASES, ids=str)


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids, **kwargs).logits
    return out


# --- names and configuration ------------------------------------------------------------------------------------------------------


def test_the_docs_first_decoder() -> None:
    """DESIGN's own line."""
    model = az.create_model("llama", attention="moh", attention_kwargs={"shared_heads": 2}, hidden_size=256, num_hidden_layers=4)
    assert isinstance(model, ZooLlamaForCausalLM)
    assert [layer.self_attn.shared_heads for layer in model.model.layers] == [2] * 4


# Parameters of the published sizes, from the specs (manifests: what the checkpoints hold).
PUBLISHED = {
    "moh_llama3_8b": 8_030_261_248,
    "cca_llama2_7b": 6_738_415_616,
    "cca_llama3_1_8b": 8_030_261_248,
    "cca_qwen2_5_7b": 7_615_616_512,
    "motif_2_6b": 2_597_218_432,
    "motif_2_12_7b": 12_703_860_896,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    model = az.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_names_are_listed_and_are_not_timms() -> None:
    import timm

    names = az.list_models("*llama*")
    assert {"llama", "llama_tiny", "moh_llama", "moh_llama3_8b", "llama_cca", "cca_llama2_7b", "diffllama"} <= set(names)
    assert not [n for n in (*names, *az.list_models("motif*")) if timm.is_model(n)]
    with pytest.raises(az.UnknownNameError, match="llama_tiny"):
        az.create_model("lama_tiny")


@each
def test_llama_tiny_takes_every_causal_mechanism(case: DecoderCase) -> None:
    model = az.create_model("llama_tiny", attention=case.attention)
    assert {type(layer.self_attn).attention_info.name for layer in model.model.layers} == {case.attention}
    assert all(layer.self_attn.is_causal for layer in model.model.layers)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert logits(model, torch.randint(256, (1, 5))).shape == (1, 5, 256)


@each
def test_config_round_trip(case: DecoderCase, tmp_path: Path) -> None:
    config = case.build().config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, ZooLlamaConfig)
    assert again.attention == case.attention
    file_dependent = {"_name_or_path": "", "transformers_version": None}
    assert {**again.to_dict(), **file_dependent} == {**config.to_dict(), **file_dependent}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zoo_llama"


def test_heads_that_are_not_given_are_the_mechanisms() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    plain = ZooLlamaConfig(attention="gqa", **sizes)
    assert (plain.num_key_value_heads, plain.head_dim) == (4, 8), "as LlamaConfig"
    given = ZooLlamaConfig(attention="gqa", num_key_value_heads=2, head_dim=6, **sizes)
    assert (given.num_key_value_heads, given.head_dim) == (2, 6)
    of_options = ZooLlamaConfig(attention="gqa", attention_kwargs={"num_kv_heads": 1}, **sizes)
    assert of_options.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "hilo"}, "causal"),
        ({"attention": "no_such"}, "no attention is named"),
        ({"attention": ["gqa"]}, "1 entries, the model 2 layers"),
        ({"attention_kwargs": [{}, {}, {}]}, "3 entries, the model 2 layers"),
        ({"attention_kwargs": {"norm_layer": torch.nn.LayerNorm}}, "plain values"),
        ({"attention_kwargs": [None, {"is_causal": False}]}, "a decoder is causal"),
        ({"attention": "mha", "num_key_value_heads": 2}, "num_kv_heads=2"),
        ({"num_attention_heads": 3}, "3"),
        ({"num_key_value_heads": 3}, "3"),
    ],
)
def test_wrong_configurations_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderCase("gqa").build(**changes)


def test_unknown_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="no_such_field"):
        az.create_model("llama_tiny", no_such_field=1)
    with pytest.raises(TypeError, match="no_such_option"):
        az.create_model("llama_tiny", attention_kwargs={"no_such_option": 1})
    with pytest.raises(ValueError, match="one mechanism"):
        az.create_model("litv2_s", attention=["hilo"])


def test_per_layer_mechanisms_and_options() -> None:
    model = DecoderCase("gqa").build(
        attention=["gqa", "moh"], attention_kwargs=[None, {"router": "query_norm", "shared_heads": 1, "routed_topk": 2}]
    )
    first, second = (layer.self_attn for layer in model.model.layers)
    assert (type(first).attention_info.name, type(second).attention_info.name) == ("gqa", "moh")
    assert (second.shared_heads, second.routed_topk) == (1, 2)


# --- the same as Hugging Face's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["gqa", "mha"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_llama_gives_llamas_logits(attention: str, tied: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2 if attention == "gqa" else 4, "attention_bias": True, "tie_word_embeddings": tied}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = az.create_model("llama", attention=attention, checkpoint_path=tmp_path, **sizes).eval()
    ids = torch.randint(40, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)
    got, want = (logits(m, ids, attention_mask=mask) for m in (ours, theirs))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    headless = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    with pytest.raises(az.CheckpointError, match="lm_head"):
        az.convert_official_state_dict("llama", headless, **{**sizes, "tie_word_embeddings": False})
    with pytest.raises(az.CheckpointError, match="moh"):
        az.convert_official_state_dict("llama", theirs.state_dict(), attention="moh", **sizes)


def test_a_checkpoint_of_llama_with_entries_for_each_layer() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).state_dict()
    lists = {"attention": ["mha", "mha"], "attention_kwargs": [{"qkv_bias": True, "proj_bias": True}] * 2}
    model = az.create_model("llama", **sizes, **lists)
    model.load_state_dict(az.convert_official_state_dict("llama", state, **sizes, **lists), strict=True)
    lists = {"attention": ["moh", "moh"], "attention_kwargs": [{"shared_heads": 2, "qkv_bias": True, "proj_bias": True}] * 2}
    az.create_model("moh_llama", **sizes, **lists).load_state_dict(
        az.convert_official_state_dict("moh_llama", state, **sizes, **lists)
    )
    with pytest.raises(az.CheckpointError, match="in every layer, not 'gqa', 'mha'"):
        az.convert_official_state_dict("llama", state, **sizes, attention=["mha", "gqa"])


@each
def test_a_tied_decoders_checkpoint_loads_by_path(case: DecoderCase, tmp_path: Path) -> None:
    """The file holds the embedding once; it is no official one."""
    model, ids = case.build(tie_word_embeddings=True), prompt()
    model.save_pretrained(tmp_path)
    again = az.create_model("llama", checkpoint_path=tmp_path, **case.config(tie_word_embeddings=True)).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_zoo_as_attention_implementation_of_llama() -> None:
    """`set_attn_implementation("zoo")` on an untouched Hugging Face model: the same numbers, padded, packed, windowed, cached."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    ids = torch.randint(1, 40, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    packed = torch.cat([torch.arange(6), torch.arange(5)])[None].expand(2, -1)
    for build in (
        lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **sizes)),
    ):
        model = build().eval()
        results = []
        for implementation in ("eager", "zoo"):
            model.set_attn_implementation(implementation)
            rows = logits(model, ids, attention_mask=mask)[mask.bool()]
            kinds = [{}, {"cache_implementation": "static"}, {"num_beams": 2}]
            texts = [model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **kind) for kind in kinds]
            results.append((rows, logits(model, ids), logits(model, ids, position_ids=packed), *texts))
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# --- masks ------------------------------------------------------------------------------------------------------------------------


@each
def test_what_stands_in_the_padding_does_not_matter(case: DecoderCase) -> None:
    model, ids = case.build(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 9:] = 0
    changed = torch.where(mask.bool(), ids, 7)
    a, b = (logits(model, t, attention_mask=mask) for t in (ids, changed))
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)


@each
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_other_implementations_masks_mean_the_same(case: DecoderCase, implementation: str) -> None:
    """transformers makes a 4-D float mask for "eager" and a boolean one, or none, for "sdpa"; "zoo" keeps the padding."""
    model, ids = case.build(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    want = logits(model, ids, attention_mask=mask), logits(model, ids)
    model.set_attn_implementation(implementation)
    got = logits(model, ids, attention_mask=mask), logits(model, ids)
    torch.testing.assert_close(got[0][mask.bool()], want[0][mask.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if not c.info.padding_masks_only and not c.info.batch_coupled], ids=str)
def test_packed_sequences(case: DecoderCase) -> None:
    """position_ids that start again mark the sequences of a packed row, as for any model of transformers."""
    model, ids = case.build(), prompt(11, 1)
    packed = logits(model, ids, position_ids=torch.cat([torch.arange(6), torch.arange(5)])[None], use_cache=False)
    alone = torch.cat([logits(model, ids[:, :6]), logits(model, ids[:, 6:])], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


# --- weights ----------------------------------------------------------------------------------------------------------------------


@each
def test_saved_and_loaded_bit_exactly(case: DecoderCase, tmp_path: Path) -> None:
    model, ids = case.build(), prompt()
    model.save_pretrained(tmp_path)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        az.create_model("llama", checkpoint_path=tmp_path, **case.config()),
    ):
        assert torch.equal(logits(again.eval(), ids), logits(model, ids))
    assert again.config.attention == case.attention
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {m.weight.dtype for m in half.modules() if isinstance(m, torch.nn.Linear)} == {torch.bfloat16}
    assert logits(half, ids).isfinite().all()


@each
def test_parameters_that_a_checkpoint_lacks_are_initialised(case: DecoderCase, tmp_path: Path) -> None:
    """transformers leaves unknown parameters as the memory was; what a mechanism adds must come out as it starts."""
    model = case.build()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k or k.endswith(("q_proj.weight", "qkv.weight"))}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # it empties what it is given
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = case.build(generic=False)
    for (name, got), new in zip(again.state_dict().items(), fresh.state_dict().values(), strict=True):
        if name in state:
            assert torch.equal(got, model.state_dict()[name]), name
        elif new.is_floating_point() and new.numel() > 16 and new.std() > 0:
            assert 0.5 < got.std() / new.std() < 2.0, f"{name} starts at another scale"
        elif new.is_floating_point() and new.numel() > 1 and new.std() > 0:
            assert got.abs().max() < 5 * new.abs().max(), f"{name} starts at another scale"
        else:
            assert torch.equal(got, new), f"{name} is not what it starts as"


@each
def test_built_on_the_meta_device(case: DecoderCase) -> None:
    model = az.create_model("llama", device="meta", **case.config())
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert az.create_model("llama", dtype=torch.bfloat16, **case.config()).dtype == torch.bfloat16


# --- training ---------------------------------------------------------------------------------------------------------------------


@each
def test_gradient_checkpointing_equals_plain(case: DecoderCase) -> None:
    ids, gradients = prompt(), []
    for checkpointing in (False, True):
        model = case.build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with seeded(4):
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_auxiliary_losses_are_part_of_the_training_loss() -> None:
    ids = prompt()
    case = DecoderCase("moh", {"shared_heads": 1, "routed_topk": 1})
    with_aux, without = (case.build(aux_loss_coef=c).train()(ids, labels=ids) for c in (0.5, 0.0))
    model = case.build().train()
    model(ids)
    auxiliary = az.auxiliary_loss(model)
    assert auxiliary > 0.5
    torch.testing.assert_close(with_aux.loss - without.loss, 0.5 * auxiliary, atol=1e-5, rtol=1e-4)
    evaluated, plain = (case.build(aux_loss_coef=c)(ids, labels=ids).loss for c in (0.5, 0.0))
    assert torch.equal(evaluated, plain), "in evaluation the loss is the task's"


def test_auxiliary_losses_of_a_gathered_update_are_a_mean() -> None:
    """`Trainer` adds up the losses of several batches, each divided by the tokens of all."""
    case, coefficient = DecoderCase("moh", {"shared_heads": 1, "routed_topk": 1}), 0.5
    model, plain = (case.build(aux_loss_coef=c).train() for c in (coefficient, 0.0))
    batches = [prompt(9, seed=5), prompt(5, seed=6)]
    items = sum(ids[:, 1:].numel() for ids in batches)
    added, expected = 0.0, 0.0
    for ids in batches:
        with_aux, without = (m(ids, labels=ids, num_items_in_batch=items).loss for m in (model, plain))
        added += (with_aux - without).item()
        expected += coefficient * az.auxiliary_loss(model).item() * ids[:, 1:].numel() / items
    assert added == pytest.approx(expected, rel=1e-3)


def test_classifiers_train_with_auxiliary_losses() -> None:
    config = ZooLlamaConfig(**DecoderCase("moh", {"shared_heads": 1, "routed_topk": 1}).config(num_labels=3, aux_loss_coef=0.5))
    model, ids = AutoModelForSequenceClassification.from_config(config).train(), prompt()
    got = model(ids, labels=torch.tensor([0, 2])).loss
    config.aux_loss_coef = 0.0
    want = model(ids, labels=torch.tensor([0, 2])).loss
    torch.testing.assert_close(got - want, 0.5 * az.auxiliary_loss(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_gradients_of_auxiliary_losses(reentrant: bool) -> None:
    ids = prompt()
    model = DecoderCase("moh", {"shared_heads": 1, "routed_topk": 1}).build(aux_loss_coef=3.0).train()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        for scale in (1.0, 0.25):  # gradients of two batches add up
            (model(inputs_embeds=embedded, labels=ids).loss * scale).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


class Repeating(torch.utils.data.Dataset):
    """Sequences that count upwards: something to learn in a few steps."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(12) + index) % (VOCABULARY - 1) + 1
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("case", slow_but(2, CASES), ids=str)
def test_trainer(case: DecoderCase, tmp_path: Path) -> None:
    model = case.build(generic=False)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeating())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.6 * losses[0], losses


@each
def test_lora(case: DecoderCase, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    model, ids = case.build(), prompt()
    want = logits(model, ids)
    linears = sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.model.layers[0].self_attn.named_modules() if type(m) is torch.nn.Linear}
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linears, task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(adapted, ids), want, atol=0, rtol=0)
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.eval()
    moved = logits(adapted, ids)
    assert not torch.allclose(moved, want, atol=1e-4)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(case.build(), tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), moved, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), ids), moved, atol=1e-4, rtol=1e-4)


def test_heads_for_classification() -> None:
    ids = prompt()
    for auto, shape in ((AutoModelForSequenceClassification, (2, 3)), (AutoModelForTokenClassification, (2, 13, 3))):
        model = auto.from_config(ZooLlamaConfig(**DecoderCase("gqa").config(num_labels=3)))
        assert model(ids).logits.shape == shape
    base = AutoModel.from_config(ZooLlamaConfig(**DecoderCase("gqa").config()))
    assert base(ids).last_hidden_state.shape == (2, 13, 32)


@each
def test_hidden_states_and_embeddings(case: DecoderCase) -> None:
    model, ids = case.build(), prompt()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model(ids).logits.shape[-1] == VOCABULARY + 3


@pytest.mark.slow
@each
def test_compiles(case: DecoderCase) -> None:
    torch._dynamo.reset()
    model, ids = case.build(), prompt()
    want = logits(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
