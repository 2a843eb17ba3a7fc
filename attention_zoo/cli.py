"""The command `attention-zoo`: what the zoo holds, what each mechanism and model is, which engines work here; and swapping."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import attention_zoo as az
from attention_zoo.registry import UnknownNameError, attention_class, did_you_mean, model_info
from attention_zoo.training.console import stdout, user_errors

__all__ = ["app"]

_WIDTH_OF_A_PIPE = 160  # without a terminal nothing says how wide a line may be; 80 columns would fold every table

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attention-zoo {az.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass  # the options of the command itself are done by their callbacks


@app.command("list")
def list_names(
    wildcard: Annotated[str, typer.Argument(help="Shell-style wildcard; quote it.")] = "*",
    models: Annotated[bool, typer.Option("--models", help="Models instead of mechanisms.")] = False,
    causal: Annotated[bool | None, typer.Option(help="Causal attention.")] = None,
    cross: Annotated[bool | None, typer.Option(help="Cross attention.")] = None,
    spatial: Annotated[bool | None, typer.Option(help="Works on a grid of tokens.")] = None,
    kv_cache: Annotated[bool | None, typer.Option(help="Decodes with a cache.")] = None,
) -> None:
    """List mechanisms, or models; flags narrow the mechanisms."""
    flags = {"causal": causal, "cross": cross, "spatial": spatial, "kv_cache": kv_cache}
    given = [f"--{'' if value else 'no-'}{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    with user_errors():
        if models and given:
            raise ValueError(f"{', '.join(given)} belongs to mechanisms, not to --models")
        names = (
            az.list_models(wildcard)
            if models
            else az.list_attentions(wildcard, causal=causal, cross=cross, spatial=spatial, kv_cache=kv_cache)
        )
        if not names:
            known = az.list_models() if models else az.list_attentions()
            hint = f" with {', '.join(given)}" if given and wildcard == "*" else did_you_mean(wildcard, known)
            raise ValueError(f"no {'model' if models else 'mechanism'} is named {wildcard!r}{hint}")
    _print(_models_table(names) if models else _attentions_table(names))


@app.command()
def info(name: Annotated[str, typer.Argument(help="A mechanism or a model.")]) -> None:
    """Explain a mechanism (paper, equation, options, cost, engines) or a model (family, preset, size), or both of one name."""
    mechanisms, presets = az.list_attentions(), model_info()
    with user_errors():
        if name not in mechanisms and name not in presets:
            raise UnknownNameError(f"nothing is named {name!r}" + did_you_mean(name, [*mechanisms, *presets]))
        model = _explain_model(name) if name in presets else None
    if name in mechanisms:
        _print(_explain_attention(name))
    if name in mechanisms and model is not None:
        _print("\nThe model of the same name\n")
    if model is not None:
        _print(model)


@app.command()
def backends() -> None:
    """List the engines that compute attention: which are installed and work here, and why the others do not."""
    rows = [(b.name, "yes" if b.available else "no", b.version or "-", b.reason or "") for b in az.backends()]
    _print(_table(("backend", "available", "version", "reason"), rows))


@app.command()
def swap(
    model: Annotated[str, typer.Argument(help="A folder, owner/name on Hugging Face's hub, or timm/NAME.")],
    mechanism: Annotated[str | None, typer.Argument(help="What to put into its layers; without it, see --map.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the swapped model; it must be empty or not exist.")] = None,
    layers: Annotated[str | None, typer.Option(help="3, 8:24, 0-3, a pattern of names; several with commas. Default: all.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of the mechanism, or mechanism.key=value; repeat it.")] = None,
    init: Annotated[str, typer.Option(help="convert, mean_pool or random.")] = "convert",
    map_: Annotated[list[str] | None, typer.Option("--map", help="LAYERS:MECHANISM, instead of MECHANISM; repeat it.")] = None,
    map_file: Annotated[Path | None, typer.Option(help="The same as YAML or JSON: layers -> name or [name, options].")] = None,
    aux_loss_coef: Annotated[float | None, typer.Option(help="Weight of auxiliary losses in a Hugging Face model's loss.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm: with its published weights.")] = False,
    model_arg: Annotated[list[str] | None, typer.Option(help="timm: key=value for timm.create_model; repeat it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as saved.")] = None,
    device: Annotated[str | None, typer.Option(help='Where to swap; "meta" with --dry-run reads no weights.')] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would change.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Put a mechanism into a pretrained model and save it, its weights carried over as far as they go.

    The folder gets the model, tokenizer or processor files of the source, and swap_report.json; attention_zoo.from_pretrained reads
    it. scripts/finetune_text.py trains it on.

    Examples:

      attention-zoo swap meta-llama/Llama-3.1-8B cca --layers 8:24 --option group_size=16 --output llama_cca

      attention-zoo swap timm/vit_small_patch16_224 kdgqa --pretrained --init mean_pool --option num_kv_heads=3 --output vit_kdgqa

      attention-zoo swap llama --map 0-3:gda --map 4::cca --option cca.window_size=512 --dry-run
    """
    with user_errors():
        from attention_zoo.training.swap import apply_swap, open_model, read_options, read_swap, require_free, save_swapped

        if output is None and not dry_run:
            raise ValueError("say where the swapped model goes, --output FOLDER, or --dry-run")
        if device == "meta" and not dry_run:
            raise ValueError("on the device meta there are no weights to save: it goes with --dry-run")
        recipe = read_swap(
            mechanism,
            layers=layers,
            maps=map_ or (),
            map_file=map_file,
            options=option or (),
            init=init,
            aux_loss_coef=aux_loss_coef,
        )
        if output is not None and not dry_run:
            require_free(output, force=force)
        source = open_model(model, pretrained=pretrained, model_args=read_options(model_arg or ()), dtype=dtype, device=device)
        report = apply_swap(source.model, recipe, dry_run=dry_run)
    stdout.print(str(report), markup=False)
    if output is not None and not dry_run:
        save_swapped(source, output, {"source": model, "swap": dataclasses.asdict(recipe), **report.as_dict()}, force=force)
        stdout.print(f"the swapped model and swap_report.json are in {output}/", markup=False)


def _print(renderable: Any) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_OF_A_PIPE)
    console.print(renderable)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table whose cells are printed as they are: equations have brackets, which rich would read as markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(header):
        table.add_column(column, no_wrap=i == 0, style="cyan" if i == 0 else None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    table = _table(("", ""), facts)
    table.show_header = False
    return table


def _attentions_table(names: Iterable[str]) -> Table:
    rows = []
    for name in names:
        found = az.attention_info(name)
        marks = {"causal": found.causal, "cross": found.cross, "spatial": found.spatial, "cache": found.kv_cache}
        rows.append((name, str(found.year), " ".join(k for k, v in marks.items() if v), found.cost, found.title))
    return _table(("mechanism", "year", "can", "cost", "paper"), rows)


def _models_table(names: Iterable[str]) -> Table:
    found = [model_info(name) for name in names]
    return _table(("model", "family", "preset"), [(m.name, m.family, _settings(m.kwargs)) for m in found])


def _explain_attention(name: str) -> Group:
    found, cls = az.attention_info(name), attention_class(name)
    documentation = inspect.getdoc(cls) or ""
    prefix = "may stand before the grid" if found.prefix_tokens else "have no place beside the grid"
    facts = [
        ("paper", f"{found.title} ({found.year})"),
        ("arXiv", f"https://arxiv.org/abs/{found.arxiv}" if found.arxiv else "none"),
        ("official code", f"https://github.com/{found.repository}" if found.repository else "none"),
        ("class", f"{cls.__module__}.{cls.__qualname__}"),
        ("patterns", ", ".join(p.replace("_", " ") for p in sorted(found.patterns))),
        ("needs a grid", "yes; class tokens " + prefix if found.spatial else "no"),
        ("key/value cache", "yes" if found.kv_cache else "no"),
        ("cost", found.cost),
        *(("of q, k, v alone", f'attn_implementation="{n}" in a Hugging Face model') for n in az.list_functionals(f"zoo_{name}")),
    ]
    return Group(
        Text(f"{name}: {found.summary}", style="bold"),
        Padding(Text(found.equation), (1, 4)),
        _facts(facts),
        Text(),
        _table(("symbol", "here"), _symbols(documentation), "Symbols"),
        Text(),
        _table(("option", "default", ""), _options(cls, documentation), "Options"),
        Text(),
        _table(("engine", "here"), [(engine, _installed(engine)) for engine in found.engines], "Engines of its hot path"),
    )


def _explain_model(name: str) -> Group:
    found = model_info(name)
    with torch.device("meta"):
        model = az.create_model(name)
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    facts = [
        ("family", found.family),
        ("preset", _settings(found.kwargs) or "none"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("input size", " x ".join(map(str, size)) if size else "none"),
        ("paper", str(config.get("paper_name") or "none")),
        ("class", f"{type(model).__module__}.{type(model).__qualname__}"),
    ]
    return Group(Text(name, style="bold"), _facts(facts))


def _symbols(documentation: str) -> list[tuple[str, ...]]:
    """Rows of the docstring's table: symbol of the paper, attribute here."""
    rows = [line.strip() for line in documentation.splitlines() if line.strip().startswith("|")]
    cells = [tuple(cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", row.strip("|"))) for row in rows]
    return [row for row in cells[1:] if not set("".join(row)) <= set("-: ")]  # without the header and its rule


def _options(cls: type, documentation: str) -> list[tuple[str, str, str]]:
    """Constructor arguments: name, default, and what the docstring says of them."""
    described = _arguments(documentation)
    return [
        (name, "required" if p.default is p.empty else _short(p.default), described.get(name, ""))
        for name, p in inspect.signature(cls).parameters.items()
    ]


def _arguments(documentation: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` section, `a, b: text` for each of a and b."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", documentation + "\n", re.MULTILINE)
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section.group(1)) if section else []:
        names, _, text = " ".join(entry.split()).partition(": ")
        entries.update({name.strip(): text for name in names.split(",")})
    return entries


def _installed(engine: str) -> str:
    """What of an engine works here; "flash" is any version of flash-attn."""
    found = [b for b in az.backends() if b.name == engine or (engine == "flash" and b.name.startswith("flash"))]
    working = [f"{b.name} {b.version}".strip() for b in found if b.available]
    if working:
        return "works: " + ", ".join(working)
    return "not here" + "".join(f"; {b.name}: {b.reason}" for b in found)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={_short(v)}" for k, v in settings.items())


def _short(value: Any) -> str:
    return value.__name__ if inspect.isclass(value) or inspect.isfunction(value) else repr(value)
