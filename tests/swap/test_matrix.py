"""Every mechanism in every host: what a swapped model does as its original does, one test for each host, mechanism and check.

The pairs come from the registry and from `swap_hosts.HOSTS`. By default every mechanism is refused by one host of each kind and
swapped into one of every second, the hosts by turns, and the checks run, by turns too, over a selection in which is every host and
every mechanism; all pairs and checks: slow.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from attention_case import seeded
from marks import slow_but
from swap_case import PRESERVING, assert_same_state, misfits, shake, snapshot
from swap_hosts import HOSTS, PADDING, HostCase
from torch import Tensor, nn
from transformers import StaticCache

import attention_zoo as az
from attention_zoo.registry import attention_class
from attention_zoo.swap import convert, core
from attention_zoo.swap.core import find_hosts
from attention_zoo.swap.slot import Slot

MECHANISMS = [name for name in az.list_attentions() if az.attention_info(name).keeps_shape]
# What a cache is called since transformers 5.24, and before.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Pair:
    """A mechanism in a host."""

    host: HostCase
    name: str

    def __str__(self) -> str:
        return f"{self.host.name}-{self.name}"

    @property
    def info(self) -> az.AttentionInfo:
        return az.attention_info(self.name)

    @property
    def misfits(self) -> list[str]:
        return misfits(self.host.traits, self.name)

    def swap(self, model: Any, **options: Any) -> az.SwapReport:
        """Swap the host's layers; FLOPs, which take the most of the time, are counted in dry runs only."""
        counted = contextlib.nullcontext() if "dry_run" in options else mock.patch.object(convert, "forward_flops", return_value=0)
        with seeded(1), counted:
            return az.swap_attention(model, self.name, layers=self.host.layers, **{"init": initial(self.name), **options})

    def swapped(self) -> Any:
        """A swapped model of one's own, in evaluation mode, no parameter of it at its initial value."""
        return copy.deepcopy(_swapped(self.host.name, self.name))

    def run(self, model: Any, feed: dict[str, Tensor] | None = None) -> Tensor:
        """The model's output on the host's own inputs or others, with its gradients."""
        with seeded(3):
            return self.host.run(model, self.host.inputs() if feed is None else feed)

    def see(self, model: Any, feed: dict[str, Tensor] | None = None) -> Tensor:
        """The same of a copy, so that what a mechanism counts from call to call stays as it is."""
        with torch.no_grad():
            return self.run(copy.deepcopy(model), feed)


@functools.lru_cache(maxsize=1)
def _swapped(host: str, name: str) -> Any:
    pair, model = Pair(HOSTS[host], name), HOSTS[host].build()
    pair.swap(model)
    with seeded(2):
        for module in slots(model):
            shake(module)
    return model


@functools.cache
def initial(name: str) -> str:
    """How the mechanism starts: from the host's weights, unless it has no conversion of usual softmax attention."""
    weights = {f"{part}_proj.weight": torch.randn(8, 8) for part in "qkvo"}
    options = {"is_causal": True, **az.attention_info(name).causal_options}
    own = inspect.signature(attention_class(name)).parameters
    causal = az.attention_info(name).patterns <= {"causal_self", "causal_cross"}
    try:
        attention_class(name).from_softmax_attention(  # type: ignore[attr-defined]
            weights, num_heads=2, **({n: v for n, v in options.items() if n in own} if causal else {})
        )
    except (AttributeError, ValueError):
        return "random"
    return "convert"


def slots(model: nn.Module) -> list[Slot]:
    return [module for module in model.modules() if isinstance(module, Slot)]


def close(got: Tensor, want: Tensor, atol: float = 2e-5, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


def config_of(model: Any) -> Any:
    return model.config.to_dict() if hasattr(model, "config") else None


PAIRS = [Pair(host, name) for host in HOSTS.values() for name in MECHANISMS]
FITTING = [pair for pair in PAIRS if not pair.misfits]
REFUSED = [pair for pair in PAIRS if pair.misfits]


def kinds() -> list[list[HostCase]]:
    """The hosts in groups whose layers are alike."""
    groups: dict[Any, list[HostCase]] = {}
    for host in HOSTS.values():
        groups.setdefault((host.is_timm, host.feed, host.traits), []).append(host)
    return list(groups.values())


def rotating(pairs: list[Pair]) -> list[Pair]:
    """Every mechanism in one host of each kind, the hosts of a kind by turns."""
    chosen = {(hosts[number % len(hosts)].name, name) for hosts in kinds() for number, name in enumerate(MECHANISMS)}
    return [pair for pair in pairs if (pair.host.name, pair.name) in chosen]


def covering() -> list[Pair]:
    """Every host once, the mechanisms by turns, and those mechanisms whose turn did not come."""
    chosen: list[Pair] = []
    for number, host in enumerate(HOSTS.values()):
        of_host = [pair for pair in FITTING if pair.host is host]
        chosen += [of_host[number % len(of_host)]] if of_host else []
    for name in MECHANISMS:
        of_name = [pair for pair in FITTING if pair.name == name and pair not in chosen]
        if all(pair.name != name for pair in chosen):
            chosen += of_name[:1]
    return sorted(chosen, key=FITTING.index)


# Checks


def check_padding(pair: Pair) -> None:
    """What stands in the padding does not matter."""
    model = pair.swapped()
    model = getattr(model, getattr(model, "base_model_prefix", ""), model)  # heads find the last token by the padding
    for side in ("right", "left") if pair.host.traits.rope else ("right",):
        feed = pair.host.inputs(side)
        want = pair.see(model, feed)
        feed["pixel_values" if pair.host.feed == "patches" else "input_ids"] = _other_padding(feed)
        close(pair.see(model, feed), want)


def _other_padding(feed: dict[str, Tensor]) -> Tensor:
    if "pixel_values" in feed:
        return torch.where(feed["pixel_attention_mask"].bool()[..., None], feed["pixel_values"], 7.0)
    return torch.where(feed["attention_mask"].bool(), feed["input_ids"], 7)


def check_alone(pair: Pair) -> None:
    """A padded text is what it is alone, on either side of the padding."""
    model = pair.swapped()
    model = getattr(model, getattr(model, "base_model_prefix", ""), model)
    for side in ("right", "left"):
        feed = pair.host.inputs(side)
        real = feed["attention_mask"][1].bool()
        positions = (feed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        want = pair.see(model, {"input_ids": feed["input_ids"][1:, real], "position_ids": positions[1:, real]})
        close(pair.see(model, {**feed, "position_ids": positions})[1:, real], want)


def check_backward(pair: Pair) -> None:
    """Every parameter that the output depends on gets a gradient, in the mechanism and around it as before."""
    model = pair.swapped()
    _trained(pair, model)
    for slot in slots(model):
        without = {name for name, p in slot.mechanism.named_parameters() if p.grad is None}
        assert without <= set(pair.info.silent_parameters)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    original = pair.host.build()
    _trained(pair, original)
    inside = tuple(f"{host.name}." for host in find_hosts(original))
    around = {name for name, p in original.named_parameters() if p.grad is not None and not name.startswith(inside)}
    assert around == {name for name, p in model.named_parameters() if p.grad is not None and not name.startswith(inside)}


def check_generate(pair: Pair) -> None:
    """Greedy and beam search over a left-padded batch give the same with and without a cache; a static one where it may be."""
    model, feed = pair.swapped(), pair.host.inputs("left")
    settings = {**feed, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PADDING}
    want = model.generate(use_cache=False, **settings)
    assert want.shape == (2, feed["input_ids"].shape[1] + 4)
    assert torch.equal(model.generate(use_cache=True, **settings), want)
    beams = {**settings, "num_beams": 3}
    assert torch.equal(model.generate(use_cache=True, **beams), model.generate(use_cache=False, **beams))
    static = StaticCache(config=model.config, max_cache_len=16)
    if pair.info.static_cache:
        assert torch.equal(model.generate(**{CACHE: static}, **settings), want)
    else:
        with pytest.raises(ValueError, match="cannot use a static cache"):
            model.generate(**{CACHE: static}, **settings)


def check_save(pair: Pair, folder: Path) -> None:
    """A saved model comes back bit by bit, with its swaps."""
    model = pair.swapped()
    az.save_pretrained(model, folder, **({"model_args": pair.host.model_args} if pair.host.is_timm else {}))
    loaded = az.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert core.swaps_of(loaded) == core.swaps_of(model) != []
    assert_same_state(loaded, snapshot(model))
    assert torch.equal(pair.see(loaded), pair.see(model))


def check_lora(pair: Pair) -> None:
    """Adapters on a mechanism's projections start without effect, are all trained, alone, and merge."""
    peft = pytest.importorskip("peft")
    model = pair.swapped()
    want = pair.see(model)
    linear = sorted({n for slot in slots(model) for n, m in slot.mechanism.named_modules() if type(m) is nn.Linear})
    assert linear
    pattern = r".*\.mechanism\.(" + "|".join(map(re.escape, linear)) + ")"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=pattern)).eval()
    close(pair.see(adapted), want)
    pair.run(adapted).square().mean().backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == {
        n for n, p in adapted.named_parameters() if "lora_" in n
    }
    with seeded(4), torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed = pair.see(adapted)
    assert not torch.allclose(changed, want, atol=1e-3)
    close(pair.see(adapted.merge_and_unload()), changed)


def check_checkpointing(pair: Pair) -> None:
    """Outputs and gradients are those without gradient checkpointing."""
    want_out, want = _trained(pair, pair.swapped())
    for reentrant in (False, True):
        model = pair.swapped()
        if pair.host.is_timm:
            if reentrant:
                continue  # timm has one way
            model.set_grad_checkpointing(True)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.config.use_cache = False
        out, got = _trained(pair, model)
        close(out, want_out)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def _trained(pair: Pair, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one step of training."""
    out = pair.run(model.train())
    (out.square().mean() + 0.01 * az.auxiliary_loss(model)).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_modes(pair: Pair) -> None:
    """Training and evaluation reach the mechanism; copies compute the same."""
    model = pair.swapped()
    want = pair.see(model)
    assert torch.equal(pair.see(copy.deepcopy(model)), want)
    model.train()
    assert all(module.training for slot in slots(model) for module in slot.modules())
    model.eval()
    assert not any(module.training for slot in slots(model) for module in slot.modules())
    assert torch.equal(pair.see(model), want)


def check_bfloat16(pair: Pair) -> None:
    model = pair.swapped().bfloat16()
    feed = {n: t.bfloat16() if t.is_floating_point() else t for n, t in pair.host.inputs().items()}
    got = pair.run(model, feed)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_dry_run(pair: Pair) -> None:
    model = pair.host.build()
    before, modules, config, state = snapshot(model), list(model.modules()), config_of(model), torch.get_rng_state()
    report = pair.swap(model, dry_run=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(model, before, modules, config)
    assert pair.swap(model, dry_run=False).layers == report.layers


def check_unswap(pair: Pair) -> None:
    model = pair.host.build()
    want, before, modules, config = pair.see(model), snapshot(model), list(model.modules()), config_of(model)
    report = pair.swap(model)
    assert az.unswap(model) == [row.name for row in report.layers]
    assert_untouched(model, before, modules, config)
    assert torch.equal(pair.see(model), want)


def check_function(pair: Pair) -> None:
    """Settings that keep the function keep the model's output."""
    model = pair.host.build()
    want = pair.see(model)
    options = {**PRESERVING[pair.name], **SIZED.get(pair.name, {})}
    if "num_kv_heads" in options:
        options["num_kv_heads"] = pair.host.traits.num_kv_heads
    report = pair.swap(model, **options)
    close(pair.see(model), want)
    assert all(row.preserving for row in report.layers if row.tried_tokens <= 128)  # the windows above


def check_compile(pair: Pair) -> None:
    """Without graph breaks, as every host does."""
    torch.compiler.reset()
    model = pair.swapped()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(pair.run(compiled), pair.run(model))
    pair.run(compiled).square().mean().backward()


# The options of `PRESERVING` are for small grids; these are for the matrix's.
SIZED: dict[str, dict[str, Any]] = {
    "agent_cswin": {"resolution": 8},
    "cca": {"window_size": 16},
    "combiner": {"window_size": 128},
    "halo": {"block_size": 8},
}
CHECKS: dict[str, Callable[..., None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def applies(pair: Pair, check: str) -> bool:
    """Whether there is anything to check."""
    if check == "padding":
        return pair.host.feed in ("tokens", "patches")
    if check == "alone":
        return pair.host.traits.is_causal and pair.host.feed == "tokens"
    if check == "generate":
        return pair.host.head == "lm"
    if check == "function":
        return pair.name in PRESERVING
    return True


def checked() -> Iterator[tuple[Pair, str]]:
    """Every fitting pair with every check that applies."""
    for pair in FITTING:
        for check in filter(functools.partial(applies, pair), CHECKS):
            yield pair, check


# What is compiled by default: one host of each calling convention.
COMPILED = {"timm-siglip-gqa", "hf-bert-gqa", "hf-gpt2-gqa"}


def by_turns() -> Iterator[tuple[Pair, str]]:
    """Of the pairs that cover hosts and mechanisms every third, for each check others than for the check before it."""
    for turn, check in enumerate(CHECKS):
        if check == "compile":
            yield from ((pair, check) for pair in FITTING if str(pair) in COMPILED)
        else:
            yield from ((pair, check) for pair in [pair for pair in covering() if applies(pair, check)][turn % 3 :: 3])


@pytest.mark.parametrize(("pair", "check"), slow_but(list(by_turns()), checked()), ids=str)
def test_checks(pair: Pair, check: str, tmp_path: Path) -> None:
    function = CHECKS[check]
    function(pair, tmp_path) if check == "save" else function(pair)


# What stands in what, written down: x where a mechanism fits into the host of the column, - where it is refused.
COLUMNS = (
    *("timm-vit", "timm-vit_avg", "timm-vit_norm", "timm-dinov3", "hf-bert", "hf-vit", "hf-gpt2", "hf-llama"),
    *("hf-mistral-window", "hf-qwen3", "hf-gemma2-softcap", "hf-gemma3"),
)
KNOWN = {
    "agent": "x x x - x x - - - - - -",
    "agent_cswin": "- x - - - - - - - - - -",
    "bra": "x x - - - x - - - - - -",
    "cca": "- - - - - - x x - - - -",
    "combiner": "x x - x x x x x - - - -",
    "dgqa": "x x x x x x x x x x - x",
    "diff": "x x - x x x x x x - - -",
    "gda": "x x - x x x x x x - - -",
    "gqa": "x x x x x x x x x x - x",
    "halo": "x x - - - x - - - - - -",
    "hilo": "- x - - - - - - - - - -",
    "kdgqa": "x x x x x x x x x x - x",
    "lepe_attention": "x x - - - x - - - - - -",
    "mha": "x x x x x x x x x x - x",
    "moh": "x x x x x x x x x x - x",
    "moh_transnext_aggregated": "- x - - - - - - - - - -",
    "moh_transnext_global": "- x - - - - - - - - - -",
    "pgqa": "x x x x x x x x x x - x",
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_stands_in_what(name: str) -> None:
    found = ["-" if misfits(HOSTS[column].traits, name) else "x" for column in COLUMNS]
    assert found == KNOWN[name].split()


@pytest.mark.parametrize("pair", slow_but(rotating(FITTING)[::2], FITTING), ids=str)
def test_forward(pair: Pair) -> None:
    """Every pair that should fit is swapped and runs."""
    model = copy.deepcopy(_host(pair.host.name))
    want = pair.run(model)
    report = pair.swap(model)
    assert len(slots(model)) == len(report.layers) > 0
    got = pair.run(model)
    assert got.shape == want.shape
    assert got.isfinite().all()


@pytest.mark.parametrize("pair", slow_but(rotating(REFUSED), REFUSED), ids=str)
def test_refusal(pair: Pair) -> None:
    """Every other pair is refused with all of its reasons, for each of its layers, and the model is what it was."""
    model = copy.deepcopy(_host(pair.host.name))
    before, modules, config = snapshot(model), list(model.modules()), config_of(model)
    names = [host.name for host in find_hosts(model) if fnmatch.fnmatchcase(host.name, pair.host.layers or "*")]
    with pytest.raises(ValueError, match="cannot take the place of") as caught:
        pair.swap(model)
    assert_untouched(model, before, modules, config)
    missing = [text for text in (*pair.misfits, names[-1]) if text not in str(caught.value)]
    assert not missing, str(caught.value)
    if good := next((other for other in FITTING if other.host is pair.host), None):
        with pytest.raises(ValueError, match=re.escape(names[-1])):
            az.swap_attention(model, {names[0]: good.name, names[-1]: pair.name}, init="random")
        assert_untouched(model, before, modules, config)


@functools.lru_cache(maxsize=1)
def _host(name: str) -> Any:
    return HOSTS[name].build()


def assert_untouched(model: Any, before: dict[str, Tensor], modules: list[nn.Module], config: Any) -> None:
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert config_of(model) == config
    assert not core.swaps_of(model)


@pytest.mark.parametrize("step", ["build", "install"])
@pytest.mark.parametrize(
    "host",
    [
        pytest.param(host, id=host.name, marks=pytest.mark.slow if number else ())
        for hosts in kinds()
        for number, host in enumerate(hosts)
    ],
)
def test_a_failure_in_the_last_layer(host: HostCase, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with the last layer, the others are back in their places."""
    pairs = [pair for pair in FITTING if pair.host is host]
    if not pairs:
        pytest.skip("no mechanism stands in this host")
    model = copy.deepcopy(_host(host.name))
    want, before, modules, config = pairs[0].see(model), snapshot(model), list(model.modules()), config_of(model)
    hosts = [found for found in find_hosts(model) if fnmatch.fnmatchcase(found.name, host.layers or "*")]
    owner, name = (core, "build_mechanism") if step == "build" else (type(hosts[-1].adapter), "install")
    function = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        given = next(
            getattr(argument, "host", argument) for argument in args if hasattr(argument, "host") or hasattr(argument, "refuse")
        )
        if given.name == hosts[-1].name:
            raise RuntimeError("it went wrong")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(RuntimeError, match="it went wrong"):
        pairs[0].swap(model)
    monkeypatch.undo()
    assert_untouched(model, before, modules, config)
    assert torch.equal(pairs[0].see(model), want)
    assert not any(hooked(module) for module in model.modules())


def hooked(module: nn.Module) -> bool:
    return any(type(hook).__module__.startswith("attention_zoo.") for hook in module._forward_hooks.values())
