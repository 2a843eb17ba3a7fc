"""The choice of an engine: forcing it, explaining it, and libraries that are missing, broken or in each other's way."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as az
from attention_zoo import ops
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.dispatch import _decisions, _preference
from attention_zoo.ops.engines import ENGINES, Signature, describe
from attention_zoo.ops.engines import base as engine_base

Q = torch.randn(1, 2, 5, 8)
H100 = torch.device("cuda", 0)


def call_class(**changes: object) -> Signature:
    """The class of a plain bf16 self-attention call on a GPU, but for the changes. Needs no GPU."""
    plain = dict.fromkeys(Signature._fields, False)
    plain.update(device=H100, dtype=torch.bfloat16, head_dim=64, value_dim=64, lengths="equal", mask="", packed="", large=True)
    return Signature(**{**plain, **changes})  # type: ignore[arg-type]


def test_backends_are_data_and_a_table() -> None:
    found = {b.name: b for b in az.backends()}
    assert {"reference", "torch", "flash4", "flash3", "flash2", "xformers", "flex", "triton"} <= set(found)
    assert found["reference"].available
    assert found["torch"].version == torch.__version__.split("+")[0] or found["torch"].version == torch.__version__
    assert all(b.available == (b.reason is None) for b in found.values())
    lines = str(az.backends()).splitlines()
    assert lines[0].split() == ["backend", "available", "version", "reason"]
    assert len(lines) == 1 + len(found)


def test_explain_is_data_and_a_table_and_runs_nothing() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for engine in ENGINES.values():
            patch.setattr(type(engine), "run", lambda *_: pytest.fail("explain must not run an engine"))
        explanation = az.explain(Q, Q, Q, is_causal=True)
    assert explanation.chosen == "torch"
    reports = {r.name: r for r in explanation}
    assert set(reports) == set(ENGINES)
    assert reports["reference"].serves
    assert not reports["triton"].serves
    assert "has no causality within few tokens" in str(explanation)
    assert str(explanation).splitlines()[1].startswith("->  torch")
    assert az.explain(Q, Q, Q, softcap=1.0).chosen == "reference"
    assert az.explain(Q, Q, Q, is_causal=True, backend="triton").chosen is None
    with pytest.raises(TypeError, match="softcup"):
        az.explain(Q, Q, Q, softcup=1.0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        az.explain(Q, Q, Q, softcap=-1.0)


def test_a_named_backend_that_cannot_serve_lists_every_reason() -> None:
    for error in (ValueError, RuntimeError, ops.BackendError):
        with pytest.raises(error, match="backend 'torch' cannot serve this call") as caught:
            ops.attention(Q, Q, Q, softcap=1.0, backend="torch")
    assert isinstance(caught.value, ops.BackendError)
    assert "has no softcap" in str(caught.value)
    for name in ENGINES:
        assert name in str(caught.value)
    assert {r.name for r in caught.value.explanation} == set(ENGINES)


@pytest.mark.parametrize(("given", "nearest"), [("flsh", "flash"), ("troch", "torch"), ("", "")])
def test_an_unknown_backend_suggests_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no backend is named '{given}'; did you mean '{nearest}"):
        ops.attention(Q, Q, Q, backend=given)
    with pytest.raises(ValueError, match="no backend is named"):
        az.use_backend(given)


def test_use_backend_nests_restores_and_yields_to_the_call() -> None:
    def chosen(**call: object) -> str | None:
        return az.explain(Q, Q, Q, **call).chosen

    with az.use_backend("reference"):
        assert chosen() == "reference"
        with az.use_backend("torch"):
            assert chosen() == "torch"
            assert chosen(backend="reference") == "reference"
        assert chosen() == "reference"
        with az.use_backend("auto"):
            assert chosen() == "torch"
        with az.use_backend("triton"), pytest.raises(ops.BackendError):
            ops.attention(Q, Q, Q, is_causal=True)
    assert chosen() == "torch"


def test_use_backend_stays_in_its_thread() -> None:
    seen = []
    with az.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(az.explain(Q, Q, Q).chosen))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_ZOO_BACKEND", "reference")
    assert az.explain(Q, Q, Q).chosen == "reference"
    with az.use_backend("torch"):
        assert az.explain(Q, Q, Q).chosen == "torch"
    monkeypatch.setenv("ATTENTION_ZOO_BACKEND", "flush")
    with pytest.raises(ValueError, match="did you mean 'flash'"):
        ops.attention(Q, Q, Q)
    monkeypatch.setenv("ATTENTION_ZOO_BACKEND", "")
    assert az.explain(Q, Q, Q).chosen == "torch"


def test_compiled_code_follows_use_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.attention(x, x, x), fullgraph=True, backend="eager")
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: runs.append(1) or original(*a, **k))
        expected = ops.attention(Q, Q, Q)
        assert len(runs) == 1
        with az.use_backend("reference"):
            torch.testing.assert_close(ops.attention(Q, Q, Q), expected)
        assert len(runs) == 1
    with az.use_backend("reference"):
        torch.testing.assert_close(compiled(Q), expected)
    with az.use_backend("flash"), pytest.raises(Exception, match=r"(?s)BackendError|Unsupported|cannot serve"):
        compiled(Q)
    torch.testing.assert_close(compiled(Q), expected)


def test_a_class_of_calls_is_decided_once() -> None:
    _decisions.clear()
    for length in (3, 4, 5):
        x = torch.randn(2, 2, length, 8)
        ops.attention(x, x, x, is_causal=True)
    assert len(_decisions) == 1
    ops.attention(Q, Q, Q)
    assert len(_decisions) == 2


@pytest.mark.parametrize(
    ("length", "grad", "few"), [(256, True, True), (257, True, False), (1024, False, True), (1025, False, False)]
)
def test_more_keys_are_few_where_nothing_learns(length: int, grad: bool, few: bool) -> None:
    x = torch.empty(1, 1, length, 8, requires_grad=grad)
    assert describe(x, x, x, make_problem(x, x, x)).few_keys is few
    with torch.no_grad():
        assert describe(x, x, x, make_problem(x, x, x)).few_keys is (length <= 1024)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "flash4"),
        ({"right": True, "zero_right": True}, "flash4"),
        ({"left": True, "right": True, "zero_right": True}, "flash4"),
        ({"grouped": True, "grad": True}, "flash4"),
        ({"packed": "self"}, "flash4"),
        ({"few_keys": True}, "torch"),
        ({"few_keys": True, "left": True}, "flash4"),
        ({"few_keys": True, "packed": "self"}, "flash4"),
        ({"few_keys": True, "softcap": True}, "flash4"),
        ({"few_keys": True, "short": 64}, "triton"),
        ({"few_keys": True, "short": 64, "grad": True}, "torch"),
        ({"few_keys": True, "short": 64, "grad": True, "many": True}, "triton"),
        ({"few_keys": True, "short": 64, "head_dim": 256, "many": True}, "triton"),
        ({"few_keys": True, "short": 64, "dtype": torch.float32, "many": True}, "torch"),
        ({"few_keys": True, "short": 64, "watched": True, "many": True}, "torch"),
        ({"few_keys": True, "short": 64, "bias": True, "many": True}, "torch"),
        ({"few_keys": True, "short": 64, "right": True, "zero_right": True, "many": True}, "torch"),
        ({"few_keys": True, "short": 64, "grouped": True, "many": True}, "torch"),
        ({"few_keys": True, "short": 128, "many": True}, "torch"),
        ({"few_keys": True, "short": 128, "head_dim": 32, "value_dim": 32, "many": True}, "triton"),
        ({"few_keys": True, "short": 128, "head_dim": 128, "grad": True, "many": True}, "triton"),
        ({"few_keys": True, "short": 128, "head_dim": 128, "grad": True}, "torch"),
        ({"softcap": True}, "flash4"),
        ({"lengths": "one"}, "torch"),
        ({"lengths": "one", "heavy": True}, "triton"),
        ({"lengths": "one", "heavy": True, "right": True, "zero_right": True}, "triton"),
        ({"lengths": "one", "heavy": True, "grouped": True}, "triton"),
        ({"lengths": "one", "heavy": True, "mask": "bool"}, "torch"),
        ({"lengths": "one", "heavy": True, "watched": True}, "torch"),
        ({"lengths": "one", "heavy": True, "dtype": torch.float32}, "torch"),
        ({"lengths": "one", "heavy": True, "grad": True}, "torch"),
        ({"lengths": "one", "left": True}, "flash4"),
        ({"lengths": "few"}, "torch"),
        ({"lengths": "few", "heavy": True}, "triton"),
        ({"lengths": "few", "right": True, "zero_right": True}, "triton"),
        ({"lengths": "few", "right": True, "zero_right": True, "grad": True}, "flash4"),
        ({"lengths": "few", "right": True, "left": True}, "flash4"),
        ({"lengths": "fewer", "right": True, "zero_right": True}, "flash4"),
        ({"lengths": "one", "value_dim": 128}, "triton"),
        ({"lengths": "one", "value_dim": 128, "grouped": True}, "triton"),
        ({"lengths": "one", "value_dim": 128, "grad": True}, "torch"),
        ({"lse": True, "grad": True}, "flash4"),
        ({"dropout": True}, "torch"),
        ({"mask": "bool"}, "torch"),
        ({"bias": True, "map_grad": True, "grad": True}, "torch"),
        ({"dtype": torch.float32}, "torch"),
        ({"head_dim": 512, "value_dim": 512}, "torch"),
        ({"packed": "self", "dtype": torch.float32}, "xformers"),
        ({"packed": "self", "dropout": True}, "xformers"),
        ({"packed": "self", "head_dim": 512, "value_dim": 512}, "xformers"),
        ({"packed": "cross", "dtype": torch.float32}, "flex"),
        ({"grouped": True, "mask": "bool"}, "flex"),
        ({"left": True, "dtype": torch.float32}, "flex"),
        ({"left": True, "dtype": torch.float32, "large": False}, "torch"),
        ({"lse": True, "grad": True, "dtype": torch.float32}, "flex"),
        ({"dtype": torch.float64, "lse": True}, "reference"),
        ({"empty": True}, "reference"),
    ],
)
def test_preference_on_hopper(monkeypatch: pytest.MonkeyPatch, changes: dict, first: str) -> None:
    """The first engine that serves the call when flash-attn 4, xformers and torch are all there."""
    for module in ("dispatch", "engines.base", "engines.flash4", "engines.flash23", "engines.xformers", "engines.sdpa"):
        monkeypatch.setattr(f"attention_zoo.ops.{module}.compute_capability", lambda _: 90)
    signature = call_class(**changes)
    serving = [n for n in _preference(signature) if n not in ("flash3", "flash2") and ENGINES[n].can_run(signature) is None]
    assert serving[0] == first


def test_what_needs_much_room_of_a_multiprocessor_stays_with_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.ops.dispatch.compute_capability", lambda _: 89)
    many = {"short": 64, "few_keys": True, "many": True}
    assert _preference(call_class(**many, head_dim=128))[0] == "triton"
    assert _preference(call_class(**many, head_dim=256))[0] == "torch"


@pytest.mark.parametrize(
    ("length", "keys", "short"), [(1, 1, 64), (64, 64, 64), (65, 65, 128), (128, 128, 128), (129, 129, 0), (64, 63, 0), (1, 2, 0)]
)
def test_short_sequences(length: int, keys: int, short: int) -> None:
    q, k = torch.empty(1024, 4, length, 8), torch.empty(1024, 4, keys, 8)
    found = describe(q, k, k, make_problem(q, k, k))
    assert (found.short, found.many) == (short, True)
    assert not describe(q[1:], k[1:], k[1:], make_problem(q[1:], k[1:], k[1:])).many
    packed = torch.tensor([0, length], dtype=torch.int32)
    row = torch.empty(1, 1, length, 8)
    assert describe(row, row, row, make_problem(row, row, row, cu_seqlens=packed)).short == 0


@pytest.mark.parametrize(
    ("queries", "keys", "lengths"),
    [
        (1, 1, "equal"),
        (1, 2, "one"),
        (2, 3, "few"),
        (8, 9, "few"),
        (8, 8, "equal"),
        (9, 10, "fewer"),
        (2, 1, "more"),
        (9, 8, "more"),
    ],
)
def test_how_lengths_compare(queries: int, keys: int, lengths: str) -> None:
    q, k = torch.empty(1, 1, queries, 8), torch.empty(1, 1, keys, 8)
    assert describe(q, k, k, make_problem(q, k, k)).lengths == lengths


@pytest.mark.parametrize(
    ("batch", "kv_heads", "keys", "queries", "heavy"),
    [(16, 8, 4096, 1, True), (16, 8, 4095, 1, True), (8, 8, 8191, 1, False), (8, 8, 8192, 4, True), (8, 8, 8192, 9, False),
     (16, 8, 2048, 1, True), (16, 8, 2047, 1, False), (1, 1, 2**19, 1, True)],
)  # fmt: skip
def test_what_takes_longer_to_read_than_to_call(batch: int, kv_heads: int, keys: int, queries: int, heavy: bool) -> None:
    q = torch.empty(batch, 2 * kv_heads, queries, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(batch, kv_heads, keys, 128, device="meta", dtype=torch.bfloat16)
    assert describe(q, k, k, make_problem(q, k, k)).heavy is heavy


def test_who_looks_on_gets_operators_of_torch() -> None:
    class Named(Tensor):
        pass

    def watched(x: Tensor) -> bool:
        return describe(x, x, x, make_problem(x, x, x)).watched

    seen: list[bool] = []
    x = torch.empty(2, 1, 4, 8)
    assert not watched(x)
    assert not watched(torch.nn.Parameter(x))
    assert watched(x.as_subclass(Named))
    with FlopCounterMode(display=False):
        assert watched(x)
    torch.func.vmap(lambda row: seen.append(watched(row)) or row)(x[None])
    assert seen == [True]


@pytest.mark.parametrize(
    ("engine", "changes", "reason"),
    [
        ("flash4", {"head_dim": 60, "value_dim": 60}, "multiples of 8"),
        ("flash4", {"head_dim": 264, "value_dim": 264}, "head size over 256"),
        ("flash4", {"head_dim": 64, "value_dim": 128}, "one size"),
        ("flash4", {"head_dim": 192, "value_dim": 128, "grouped": True, "grad": True}, "no backward"),
        ("flash4", {"head_dim": 80, "value_dim": 80, "grad": True}, "no multiple of 32"),
        ("flash4", {"dtype": torch.float32}, "float16 and bfloat16"),
        ("flash4", {"mask": "bool"}, "no mask or bias"),
        ("flash4", {"device": torch.device("cpu")}, "CUDA tensors only"),
        ("flash3", {"dropout": True}, "no dropout"),
        ("flash2", {"dropout": True, "softcap": True}, "not both"),
        ("flash2", {"lse": True, "grad": True}, "no gradient"),
        ("xformers", {"softcap": True}, "no softcap"),
        ("xformers", {"grouped": True, "grad": True}, "no backward"),
        ("xformers", {"right": True, "zero_right": True, "lengths": "more"}, "queries without a key"),
        ("xformers", {"left": True, "dtype": torch.float32}, "windows are for float16"),
        ("xformers", {"packed": "cross"}, "offsets of their own"),
        ("xformers", {"bias": True, "map_grad": True}, "only together"),
        ("flex", {"dropout": True}, "no dropout"),
        ("flex", {"head_dim": 8}, "from 16 to 256"),
        ("torch", {"lse": True}, "no log-normaliser"),
    ],
)
def test_limits_of_the_engines(monkeypatch: pytest.MonkeyPatch, engine: str, changes: dict, reason: str) -> None:
    for module in ("flash4", "flash23", "xformers"):
        monkeypatch.setattr(f"attention_zoo.ops.engines.{module}.compute_capability", lambda _: 90)
    assert reason in (ENGINES[engine].can_run(call_class(**changes)) or "serves it")


def in_a_fresh_process(folder: Path, code: str) -> str:
    """Run `code` where `folder` comes first on the path; returns what it prints."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n" + textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def test_broken_libraries_are_reported_and_break_nothing(tmp_path: Path) -> None:
    package(
        tmp_path,
        flash_attn_interface="import a_module_that_does_not_exist",
        xformers__in____init__="raise OSError('libcudart.so.12: cannot open shared object file\\nmore')",
        flash_attn__in____init__="raise SystemError('half installed')",
    )
    printed = in_a_fresh_process(
        tmp_path,
        """
        import warnings; warnings.simplefilter("error", UserWarning)
        import attention_zoo as az, torch
        assert not {"flash_attn", "xformers", "flash_attn_interface"} & set(sys.modules), "imported before they are needed"
        q = torch.randn(1, 1, 4, 8)
        az.ops.attention(q, q, q)
        assert not {"flash_attn", "xformers", "flash_attn_interface"} & set(sys.modules), "imported for a call on a CPU"
        print(az.backends())
        print(az.explain(q, q, q))
        """,
    )
    assert "flash3     no" in printed
    assert "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_does_not_exist'" in printed
    assert "cannot be imported: OSError: libcudart.so.12: cannot open shared object file more" in printed
    assert "cannot be imported: SystemError: half installed" in printed


def test_xformers_without_operators_and_beside_flash_attn_4(tmp_path: Path) -> None:
    """xformers looks for flash-attn 2 behind the name `flash_attn`, which may be flash-attn 4's bare namespace package."""
    package(
        tmp_path,
        flash_attn__in__cute__in____init__="",
        flash_attn__in__cute__in__interface="flash_attn_func = flash_attn_varlen_func = _flash_attn_fwd = _flash_attn_bwd = None",
        xformers__in____init__="import logging; logging.getLogger('xformers').warning('a warning at import')",
        xformers__in___cpp_lib="""
            _cpp_library_load_exception = RuntimeError("xFormers was built for:\\n    PyTorch 2.10.0+cu128")
            _built_with_cuda = False
        """,
        xformers__in__ops__in____init__="",
        xformers__in__ops__in__fmha__in____init__="""
            import importlib.util
            if importlib.util.find_spec("flash_attn"):
                import flash_attn.flash_attn_interface
        """,
    )
    printed = in_a_fresh_process(
        tmp_path,
        """
        import attention_zoo as az
        import flash_attn.cute as cute
        print(az.backends())
        import flash_attn
        assert flash_attn is sys.modules["flash_attn"] and flash_attn.cute is cute, "the namespace package is back in its place"
        """,
    )
    assert "has no operators: xFormers was built for: PyTorch 2.10.0+cu128" in printed
    of_flash4 = next(line for line in printed.splitlines() if line.startswith("flash4"))
    assert "yes" in of_flash4 if torch.cuda.is_available() else "needs a CUDA device" in of_flash4
    assert "flash-attn 4's" in next(line for line in printed.splitlines() if line.startswith("flash2"))


def test_an_import_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    class Broken(engine_base.Engine):
        name = group = "broken"
        package = "no-such-distribution"

        def load(self) -> str | None:
            tries.append(1)
            raise ImportError("no such library")

        def can_run(self, signature: Signature) -> str | None:
            return None

        def run(self, *_: object) -> object:  # type: ignore[override]
            raise AssertionError

    engine = Broken()
    assert engine.status() == engine.status() == ("", "cannot be imported: ImportError: no such library")
    assert len(tries) == 1
