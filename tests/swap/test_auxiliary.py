"""Auxiliary losses of swapped layers enter the host's loss in training, with no code of the user's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from swap_case import shake
from torch import Tensor, nn

import attention_zoo as az

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
COEFFICIENT = 0.5

HEADS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
    "LlamaForSequenceClassification": lambda: transformers.LlamaConfig(**TEXT, num_labels=3),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**TEXT, num_labels=3),
    "BertForTokenClassification": lambda: transformers.BertConfig(**TEXT, num_labels=3),
    "BertForMaskedLM": lambda: transformers.BertConfig(**TEXT),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**IMAGE, num_labels=3),
}


def build(head: str, mechanism: str = "moh", **options: Any) -> Any:
    """A head of transformers with swapped layers, in training mode, without dropout, its routers off their zeros."""
    torch.manual_seed(0)
    config = HEADS[head]()
    for name in vars(config):
        if name.endswith(("dropout", "dropout_prob")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = getattr(transformers, head)._from_config(config)
    if mechanism == "moh":
        options = {"router": "linear", "shared_heads": 2, "routed_topk": 1, "aux_loss_coef": COEFFICIENT, **options}
    az.swap_attention(model, mechanism, **options)
    shake(model)
    return model.train()


def batch(head: str, size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if "Image" in head:
        images = torch.randn(size, 3, 32, 32, generator=draw)
        return {"pixel_values": images, "labels": torch.randint(0, 3, (size,), generator=draw)}
    ids = torch.randint(1, 64, (size, 7), generator=draw)
    if "Sequence" in head:
        return {"input_ids": ids, "labels": torch.randint(0, 3, (size,), generator=draw)}
    labels = torch.randint(0, 3, ids.shape, generator=draw) if "Token" in head else ids.clone()
    labels[:, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def plain_loss(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The task's loss alone, of the class that transformers has."""
    loss: Tensor = type(model).__mro__[1].forward(model, **inputs, **kwargs).loss
    return loss


def routers(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p for n, p in model.named_parameters() if "router" in n or "balance" in n}
    assert found
    return found


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str) -> None:
    model, inputs = build(head), batch(head)
    assert type(model).__name__ == head
    task = plain_loss(model, inputs)
    got = model(**inputs).loss
    auxiliary = az.auxiliary_loss(model)
    assert auxiliary > 0.5
    torch.testing.assert_close(got, task + COEFFICIENT * auxiliary)
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], got)
    assert model(**{n: t for n, t in inputs.items() if n != "labels"}).loss is None
    model.eval()
    assert torch.equal(model(**inputs).loss, plain_loss(model, inputs))


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM", "ViTForImageClassification"])
def test_the_shares_of_an_update_add_up_to_one(head: str) -> None:
    model, batches = build(head), [batch(head, 2, 1), batch(head, 5, 2)]
    counted = [b["labels"][..., 1:] if "Causal" in head else b["labels"] for b in batches]
    items = torch.tensor(sum(labels.ne(-100).sum().item() for labels in counted))
    for inputs, labels in zip(batches, counted, strict=True):
        added = model(**inputs, num_items_in_batch=items).loss - plain_loss(model, inputs, num_items_in_batch=items)
        share = labels.ne(-100).sum() / items
        torch.testing.assert_close(added, COEFFICIENT * share * az.auxiliary_loss(model), atol=1e-5, rtol=1e-4)


def test_the_weight() -> None:
    model = transformers.BertForMaskedLM(HEADS["BertForMaskedLM"]())
    az.swap_attention(model, "moh", layers=0)
    assert [entry["aux_loss_coef"] for entry in model.config.zoo_swap] == [0.01]
    az.swap_attention(model, "moh", layers=1, aux_loss_coef=0)
    assert [entry["aux_loss_coef"] for entry in model.config.zoo_swap] == [0.0, 0.0]
    inputs = batch("BertForMaskedLM")
    model.train()
    torch.manual_seed(0)
    got = model(**inputs).loss
    torch.manual_seed(0)
    assert torch.equal(got, plain_loss(model, inputs))
    with pytest.raises(ValueError, match="aux_loss_coef is a weight, from 0; got -1"):
        az.swap_attention(model, "moh", aux_loss_coef=-1)


def test_only_where_there_is_such_a_loss() -> None:
    model = build("BertForMaskedLM", "gqa")
    assert "aux_loss_coef" not in model.config.zoo_swap[0]
    assert "forward" not in vars(type(model))
    az.unswap(model)
    assert type(model) is transformers.BertForMaskedLM
    az.swap_attention(model, "moh")
    assert "forward" in vars(type(model))
    az.unswap(model)
    assert type(model) is transformers.BertForMaskedLM


def test_copies_pickles_and_files_keep_it(tmp_path: Path) -> None:
    model, inputs = build("LlamaForCausalLM"), batch("LlamaForCausalLM")
    want = model(**inputs).loss
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path)
    others = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        "file": az.from_pretrained(tmp_path).train(),
    }
    for name, other in others.items():
        assert torch.equal(other(**inputs).loss, want), name
        assert type(other) is type(model), name
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()


def test_a_part_that_is_swapped_counts_in_the_whole() -> None:
    model = transformers.LlamaForCausalLM(HEADS["LlamaForCausalLM"]()).train()
    az.swap_attention(model.model, "moh", aux_loss_coef=COEFFICIENT)
    inputs = batch("LlamaForCausalLM")
    got = model(**inputs).loss - plain_loss(model, inputs)
    torch.testing.assert_close(got, COEFFICIENT * az.auxiliary_loss(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("return_dict", [True, False])
def test_data_parallel(return_dict: bool) -> None:
    """What a replica is: a module of the same class, with the same attributes and copies of the parameters."""
    model, inputs = build("ViTForImageClassification"), batch("ViTForImageClassification")
    want = model(**inputs, return_dict=return_dict)[0]
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(**inputs, return_dict=return_dict)[0], want)
    items = torch.tensor([2])  # Trainer hands each replica a tensor of one number
    assert model(**inputs, num_items_in_batch=items, return_dict=return_dict)[0].shape == (1,)


@pytest.mark.slow
def test_compiled() -> None:
    model, inputs = build("LlamaForCausalLM"), batch("LlamaForCausalLM")
    want = model(**inputs).loss
    want.backward()
    expected = {n: p.grad.clone() for n, p in routers(model).items() if p.grad is not None}
    model.zero_grad()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(**inputs).loss
    torch.testing.assert_close(got, want)
    got.backward()
    for name, parameter in routers(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_checkpointed() -> None:
    model, inputs = build("LlamaForCausalLM"), batch("LlamaForCausalLM")
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in routers(model).items() if p.grad is not None}
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), labels=inputs["labels"]).loss.backward()
        for name, parameter in routers(model).items():
            torch.testing.assert_close(parameter.grad, expected[name])


def by_hand(model: Any, batches: list[list[dict[str, Tensor]]], shifted: bool, rate: float) -> None:
    """The loop that a user would write: each inner list is one update, its batches gathered."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for update in batches:
        counts = [(b["labels"][..., 1:] if shifted else b["labels"]).ne(-100).sum() for b in update]
        for inputs, count in zip(update, counts, strict=True):
            task = plain_loss(inner, inputs, num_items_in_batch=sum(counts))
            (task + COEFFICIENT * az.auxiliary_loss(model) * count / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: Any, batches: list[list[dict[str, Tensor]]], path: Path, rate: float, **kwargs: Any) -> None:
    """The same by transformers' own Trainer, with no word of auxiliary losses."""
    rows = [{n: t[i] for n, t in b.items()} for update in batches for b in update for i in range(len(b["labels"]))]
    args = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=len(batches[0]),
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **kwargs,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    InOrder(model=model, args=args, train_dataset=rows).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForSequenceClassification", "ViTForImageClassification", "lora"])
def test_trainer(head: str, tmp_path: Path) -> None:
    """Its updates are those of the loop by hand, gathered batches, LoRA and all."""
    kind = "LlamaForCausalLM" if head == "lora" else head
    models = [build(kind), build(kind)]
    if head == "lora":
        from peft import LoraConfig, get_peft_model

        saved = ["router", "shared_router", "balance"]
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], modules_to_save=saved, lora_dropout=0.0)
        adapted: list[Any] = []
        for model in models:
            torch.manual_seed(0)
            adapted.append(get_peft_model(model, config))
        models = adapted
    batches = [[batch(kind, 2, seed=2 * step + i) for i in range(2)] for step in range(3)]
    before = {n: p.detach().clone() for n, p in routers(models[0]).items()}
    by_hand(models[0], batches, "Causal" in kind, 0.1)
    trained(models[1], batches, tmp_path, 0.1)
    learned = [n for n, p in routers(models[0]).items() if p.requires_grad]
    assert learned
    assert any(not torch.equal(routers(models[0])[n], before[n]) for n in learned)
    for name in learned:
        torch.testing.assert_close(routers(models[1])[name], routers(models[0])[name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_trainer_with_mixed_precision_saves_it(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    before = {n: p.detach().clone() for n, p in routers(model).items()}
    batches = [[batch("LlamaForCausalLM", 2, seed=step)] for step in range(2)]
    trained(model, batches, tmp_path, 0.1, bf16=True)
    assert any(not torch.equal(p, before[n]) for n, p in routers(model).items())
    assert model.forward.__name__ == "forward"


def test_models_without_a_loss_leave_it_to_their_trainer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    az.swap_attention(model, "moh", aux_loss_coef=0.5)
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert az.auxiliary_loss(model).requires_grad
