"""How the flash engines call their libraries, with stand-ins of the libraries' signatures that compute on a CPU.

What the real kernels compute is tested in test_gpu.py; here it is the layouts, the names and order of arguments, and the gradient
of the custom operator that stands in compiled graphs.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from attention_zoo import ops
from attention_zoo.ops._problem import make_problem
from attention_zoo.ops.engines import ENGINES

Window = tuple[int | None, int | None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, softcap: float, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The reference in flash-attn's layout: (B, N, H, D), or (total, H, D) with offsets."""
    if cu_q is None:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    else:
        assert cu_k is not None
        assert cu_q.dtype == cu_k.dtype == torch.int32
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, lse = ops.attention(
        q,
        k,
        v,
        scale=scale,
        window_size=window,
        softcap=softcap or None,
        cu_seqlens=cu_q,
        cu_seqlens_k=cu_k,
        return_lse=True,
        backend="reference",
    )
    return (out.transpose(1, 2).contiguous(), lse) if cu_q is None else (out[0].transpose(0, 1).contiguous(), lse[0])


@pytest.fixture
def flash4(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """flash_attn.cute.interface of 4.0.0b36, as far as it is called."""
    library = types.ModuleType("flash_attn.cute.interface")

    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
                        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, *, return_lse=False):  # fmt: skip
        out, lse = attend(q, k, v, softmax_scale, (window_size[0], 0 if causal else window_size[1]), softcap, None, None)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                               min_seqlen_k=None, *, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0,
                               return_lse=False):  # fmt: skip
        out, lse = attend(q, k, v, softmax_scale, window_size, softcap, cu_seqlens_q, cu_seqlens_k)
        return out, lse if return_lse else None

    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
                        max_seqlen_k=None, *, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
                        window_size_right=None, return_lse=False):  # fmt: skip
        window = (window_size_left, window_size_right)
        return *attend(q, k, v, softmax_scale, window, softcap, cu_seqlens_q, cu_seqlens_k), None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                        dq=None, dk=None, dv=None, dlse=None):  # fmt: skip
        def differentiate() -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            window = (window_size_left, window_size_right)
            again, again_lse = attend(*leaves, softmax_scale, window, softcap, cu_seqlens_q, cu_seqlens_k)
            torch.testing.assert_close((out, lse), (again.detach(), again_lse.detach()))
            total = (again * dout).sum() + (0 if dlse is None else (again_lse * dlse).sum())
            return torch.autograd.grad(total, leaves)

        with ThreadPoolExecutor(1) as elsewhere:  # inside an operator autograd is switched off for the thread
            gradients = elsewhere.submit(differentiate).result()
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.copy_(gradient)
        return dq, dk, dv

    for function in (flash_attn_func, flash_attn_varlen_func, _flash_attn_fwd, _flash_attn_bwd):
        setattr(library, function.__name__, function)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["flash_attn.cute"].interface = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", library)
    yield library
    torch._dynamo.reset()


CALLS = [
    {},
    {"is_causal": True, "return_lse": True},
    {"window_size": (3, 1), "scale": 0.4},
    {"softcap": 1.5, "window_size": 2, "is_causal": True},
    {"packed": True, "is_causal": True, "return_lse": True},
    {"packed": True, "max_seqlen": 5},
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_flash4(flash4: types.ModuleType, call: dict, compiled: bool) -> None:
    call = dict(call)
    packed = call.pop("packed", False)
    batch = 1 if packed else 2
    q = torch.randn(batch, 4, 7, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, 7 if packed else 9, 8, requires_grad=True) for _ in range(2))
    if packed:
        call["cu_seqlens"] = torch.tensor([0, 2, 2, 7])

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return ENGINES["flash4"].run(q, k, v, make_problem(q, k, v, **call))

    out, lse = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(q, k, v)
    expected, expected_lse = ops.attention(q, k, v, backend="reference", **{**call, "return_lse": True})
    torch.testing.assert_close(out, expected)
    results, references = out.sin().sum(), expected.sin().sum()
    if call.get("return_lse"):
        torch.testing.assert_close(lse, expected_lse)
        results, references = results + lse.cos().sum(), references + expected_lse.cos().sum()
    gradients, expected_gradients = (torch.autograd.grad(r, (q, k, v)) for r in (results, references))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_flash4_operator_keeps_its_contract(flash4: types.ModuleType) -> None:
    q = torch.randn(2, 7, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(2))
    arguments = (q, k, v, None, None, None, None, 0.3, None, 0, 0.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.attention_zoo.flash4.default, arguments, test_utils=checks)


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_flash_attn_2_and_3(monkeypatch: pytest.MonkeyPatch, returns_tuple: bool) -> None:
    """Both may return the output alone or with the log-normaliser; flash-attn 2 marks a row without keys with +inf."""

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, return_attn_probs=False):
        out, lse = attend(q, k, v, softmax_scale, (window_size[0], 0 if causal else window_size[1]), softcap, None, None)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return (out, lse, None) if return_attn_probs or returns_tuple else out

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
               window_size=(-1, -1), softcap=0.0, return_attn_probs=False):  # fmt: skip
        assert isinstance(max_seqlen_q, int)
        assert max_seqlen_q == max_seqlen_k == 5
        out, lse = attend(q, k, v, softmax_scale, (window_size[0], 0 if causal else -1), softcap, cu_seqlens_q, cu_seqlens_k)
        return (out, lse, None) if return_attn_probs or returns_tuple else out

    for name, engine in (("flash_attn", ENGINES["flash2"]), ("flash_attn_interface", ENGINES["flash3"])):
        library = types.ModuleType(name)
        library.flash_attn_func, library.flash_attn_varlen_func = dense, varlen  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, library)
        q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        offsets = torch.tensor([0, 2, 7])
        for size, call in ((9, {"is_causal": True, "return_lse": True}), (9, {"window_size": 1}), (7, {"cu_seqlens": offsets})):
            problem = make_problem(q[:, :, :size], k, v, **call)
            result = engine.run(q[:, :, :size], k, v, problem)
            expected = ops.attention(q[:, :, :size], k, v, backend="reference", **call)
            torch.testing.assert_close(result if call.get("return_lse") else result[0], expected)
