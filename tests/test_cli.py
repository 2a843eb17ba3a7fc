"""The command `attention-zoo`: what it prints, and one clear line with exit code 2 for what it cannot find."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attention_zoo as az
from attention_zoo.cli import app
from attention_zoo.registry import attention_class


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def listed(*arguments: str) -> list[str]:
    """First cells of the rows of `list`; folded cells go on in lines that start with a space."""
    lines = run("list", *arguments).stdout.splitlines()
    assert lines[0].split()[0] in ("mechanism", "model")
    return [line.split()[0] for line in lines[1:] if line.strip() and not line.startswith(" ")]


def test_version() -> None:
    assert run("--version").stdout.strip() == f"attention-zoo {az.__version__}"


def test_help_names_the_commands() -> None:
    out = run("--help").stdout
    assert all(command in out for command in ("list", "info", "backends", "swap"))


def test_list_shows_the_mechanisms() -> None:
    assert listed() == az.list_attentions()
    row = next(line for line in run("list").stdout.splitlines() if line.startswith("mha "))
    assert all(text in row for text in ("2017", "causal cross cache", "O(N^2 d h)", "Attention Is All You Need"))


@pytest.mark.parametrize("wildcard", ["*gqa", "m*", "moh", "[gm]*"])
def test_list_takes_a_wildcard(wildcard: str) -> None:
    assert listed(wildcard) == az.list_attentions(wildcard)


@pytest.mark.parametrize("capability", ["causal", "cross", "spatial", "kv_cache"])
@pytest.mark.parametrize("wanted", [True, False])
def test_list_narrows_by_capability(capability: str, wanted: bool) -> None:
    flag = ("--" if wanted else "--no-") + capability.replace("_", "-")
    names = az.list_attentions(**{capability: wanted})
    if names:
        assert listed(flag) == names
    else:
        assert flag in run("list", flag, code=2).stderr


def test_flags_add_up() -> None:
    assert listed("m*", "--causal", "--no-spatial") == az.list_attentions("m*", causal=True, spatial=False)


def test_list_shows_the_models() -> None:
    assert listed("--models") == az.list_models()
    assert listed("--models", "vit_small*") == az.list_models("vit_small*")
    row = next(line for line in run("list", "--models").stdout.splitlines() if line.startswith("vit_small_patch16_224_gqa "))
    assert "embed_dim=384" in row


@pytest.mark.parametrize("name", az.list_attentions())
def test_info_of_every_mechanism(name: str) -> None:
    out = run("info", name).stdout
    info = az.attention_info(name)
    assert out.startswith(f"{name}: ")
    wanted = [info.title, str(info.year), info.cost, *info.equation.splitlines(), *info.engines]
    wanted += [f"https://arxiv.org/abs/{info.arxiv}"] if info.arxiv else []
    wanted += [f"https://github.com/{info.repository}"] if info.repository else []
    wanted += [pattern.replace("_", " ") for pattern in info.patterns]
    flat = " ".join(out.split())
    missing = [text for text in wanted if " ".join(text.split()) not in flat]
    assert not missing
    options = out[out.index("\nOptions") : out.index("\nEngines")]
    for option, parameter in inspect.signature(attention_class(name)).parameters.items():
        row = re.search(rf"^{option} +(\S+)(.*)$", options, re.MULTILINE)
        assert row, f"{option} has no row"
        assert row[1] == "required" if parameter.default is parameter.empty else True
        assert row[2].strip() or option in {"device", "dtype"}, f"{option} is not described"


def test_info_reads_the_symbol_table_and_the_options() -> None:
    out = run("info", "moh").stdout
    assert re.search(r"^h_s, K +shared_heads, routed_topk *$", out, re.MULTILINE)
    assert re.search(r"^num_heads +8 +number of query heads h\. *$", out, re.MULTILINE)
    assert re.search(r"^norm_layer +LayerNorm +class of those", out, re.MULTILINE)
    assert re.search(r"^proj_drop +0\.0 +dropout rates", out, re.MULTILINE), "two options described together"
    assert "g = [a_0 s, a_1 r]" in out, "brackets are text, not markup"


def test_info_says_which_engines_work_here() -> None:
    out = run("info", "mha").stdout
    engines = out[out.index("Engines") :]
    assert re.search(rf"^torch +works: torch {re.escape(torch.__version__.split('+')[0])}", engines, re.MULTILINE)
    for backend in az.backends():
        if not backend.available and backend.name != "triton":
            assert f"{backend.name}: " in engines


def test_info_of_a_model() -> None:
    out = run("info", "vit_small_patch16_224_gqa").stdout
    with torch.device("meta"):
        parameters = sum(p.numel() for p in az.create_model("vit_small_patch16_224_gqa").parameters())
    for text in ("vit_kdgqa", f"{parameters:,}", "3 x 224 x 224", "attention='gqa'", "embed_dim=384"):
        assert text in out


def test_info_says_both_where_a_mechanism_and_a_model_share_a_name() -> None:
    shared = set(az.list_attentions()) & set(az.list_models())
    assert "agent_cswin" in shared
    for name in shared:
        mechanism, _, model = run("info", name).stdout.partition("The model of the same name")
        assert mechanism.startswith(f"{name}: ")
        assert "Engines of its hot path" in mechanism
        assert re.search(rf"^{name}\nfamily +{name}", model, re.MULTILINE)


def test_backends() -> None:
    out = run("backends").stdout
    for backend in az.backends():
        row = next(line for line in out.splitlines() if line.startswith(f"{backend.name} "))
        assert ("yes" if backend.available else "no") in row.split()
        assert " ".join((backend.reason or backend.version).split()[:3]) in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "mohh"), r"^error: nothing is named 'mohh'; did you mean 'moh'"),
        (("info", "vit_small_patch16_224_gqq"), r"did you mean .*'vit_small_patch16_224_gqa'"),
        (("info", "%"), r"^error: nothing is named '%'$"),
        (("list", "kdqga"), r"no mechanism is named 'kdqga'; did you mean 'kdgqa'"),
        (("list", "zz*"), r"no mechanism is named 'zz\*'$"),
        (("list", "--models", "vit_smal_patch16_224_gqa"), r"no model is named .*; did you mean 'vit_small_patch16_224_gqa'"),
        (("list", "--models", "--no-kv-cache"), r"--no-kv-cache belongs to mechanisms, not to --models"),
    ],
    ids=str,
)
def test_what_cannot_be_found_is_one_clear_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not result.stdout
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [("info",), ("lst",), ("list", "--fast"), ("backends", "torch")], ids=str)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert "Traceback" not in run(*arguments, code=2).output
