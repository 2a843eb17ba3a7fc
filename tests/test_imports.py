"""The walls between the rooms: imports only go down, and importing the package brings in nothing optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of ours, besides itself. A file or folder of attention_zoo that is not here fails the test below.
BELOW = {
    "registry": set(),
    "ops": set(),
    "attention": {"ops", "registry"},
    "checkpoints": {"registry"},
    "models": {"attention", "checkpoints", "ops", "registry"},
    "swap": {"models", "checkpoints", "attention", "registry"},
    "analysis": {"attention", "ops", "registry"},
    "benchmarks": {"attention", "ops", "registry"},
}
FACADE = {"cli", "training", "scripts"}  # programs: everything below, through the package itself as a user would
FREE = {"__init__", "_version", "configs"}  # the facade gathers all rooms; the others import nothing of ours

# Not part of importing the package: other engines, and what only programs, tests or the swap of a Hugging Face model need.
OPTIONAL = {
    *("transformers", "flash_attn", "flash_attn_interface", "xformers", "accelerate", "peft", "matplotlib", "sklearn", "datasets"),
    *("tensorboard", "torch.utils.tensorboard", "rich", "typer", "pytest", "torch._dynamo", "torch._inductor"),
    *("attention_zoo.ops.triton", "attention_zoo.cli", "attention_zoo.training", "attention_zoo.analysis"),
}

HEAVY = {"transformers", "flash_attn", "xformers", "accelerate", "matplotlib", "sklearn", "torch.utils.tensorboard"}

FILES = sorted([*ROOT.glob("attention_zoo/**/*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("configs/**/*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "attention_zoo" else parts[0]


ROOMS = {room_of(path) for path in FILES}


def imports(path: Path) -> list[tuple[int, str]]:
    """Absolute names of all that a file imports, wherever in it; `from a import b` gives a.b."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (parts if parts[0] == "attention_zoo" else ("attention_zoo", *parts))[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def rooms_imported(path: Path) -> list[tuple[int, str]]:
    """Line and room of each import of ours; what the package's own `__init__` offers counts as the room `__init__`."""
    ours = [(line, name.split(".")[1]) for line, name in imports(path) if name.split(".")[0] == "attention_zoo" and "." in name]
    bare = [(line, "__init__") for line, name in imports(path) if name == "attention_zoo"]
    return [(line, room if room in ROOMS else "__init__") for line, room in ours] + bare


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room in FREE | FACADE:
        return
    assert room in BELOW, f"{room} has no place in the house: write down what it may import"
    for line, imported in rooms_imported(path):
        assert imported in BELOW[room] | {room}, f"{path.name}:{line}: {room} imports {imported}"


def test_the_package_names_the_models_in_one_place() -> None:
    """models/ is mapped into the package at installation: type checkers cannot follow an absolute import of it."""
    naming = {p.relative_to(ROOT).as_posix() for p in FILES for _, n in imports(p) if n.startswith("attention_zoo.models")}
    assert {p for p in naming if p.startswith("attention_zoo/")} <= {"attention_zoo/__init__.py"}
    for path in ROOT.glob("models/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith(("attention_zoo.models", "models")), f"{path}: siblings are relative"


def test_registry_needs_the_standard_library_only() -> None:
    names = {name.split(".")[0] for _, name in imports(ROOT / "attention_zoo" / "registry.py")}
    assert names <= set(sys.stdlib_module_names)


def test_nothing_imports_the_tests_or_the_shared_reference() -> None:
    for path in [*FILES, *ROOT.glob("scripts/*.py")]:
        assert not {"tests", "attention_case", "parity_case", "conftest"} & {n.split(".")[0] for _, n in imports(path)}
    needle = "/work/" + "shared"
    for path in [*FILES, *ROOT.glob("scripts/*"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/**/*.yaml")]:
        if path.is_file():
            assert needle not in path.read_text(encoding="utf-8"), path


def test_the_walls_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: it sees every way of writing an import."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "attention_zoo" / "ops" / "deep" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import attention_zoo\nfrom attention_zoo import registry, create_model\nfrom ... import attention\n"
        "def f():\n    from attention_zoo.attention.base import attend\nfrom . import sibling\nfrom ..attention import x\n"
    )
    names = [name for _, name in sorted(imports(path))]
    assert names == [
        "attention_zoo",
        "attention_zoo.create_model",
        "attention_zoo.registry",
        "attention_zoo.attention",
        "attention_zoo.attention.base.attend",
        "attention_zoo.ops.deep.sibling",
        "attention_zoo.ops.attention.x",
    ]
    assert [room for _, room in sorted(rooms_imported(path))] == [
        "__init__", "__init__", "registry", "attention", "attention", "ops", "ops",
    ]  # fmt: skip


def test_importing_brings_in_nothing_optional_and_has_no_side_effects() -> None:
    """In a process of its own, beyond what torch and timm themselves import: threads, default dtype and device, the random state
    and the warning filters stay as they were. Nor does listing the mechanisms bring in anything heavy."""
    program = (
        "import sys, torch, timm, safetensors, warnings, logging\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(),\n"
        "            torch.get_rng_state().sum().item(), torch.get_float32_matmul_precision(), list(warnings.filters),\n"
        "            list(logging.getLogger().handlers))\n"
        "before, modules = state(), set(sys.modules)\n"
        "import attention_zoo\n"
        "assert state() == before, (before, state())\n"
        "assert not torch.cuda.is_initialized()\n"
        f"print(*[m for m in {OPTIONAL!r} if m in sys.modules and m not in modules])\n"
        "from typer.testing import CliRunner\n"  # and then the command line
        "from attention_zoo.cli import app\n"
        "assert CliRunner().invoke(app, ['list']).exit_code == 0\n"
        f"print(*{HEAVY!r} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")
