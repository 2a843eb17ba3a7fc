"""PolyNorm: its formula, its initial values, its precision."""

from __future__ import annotations

import torch

from attention_zoo.models.polynorm import PolyNorm  # type: ignore[import-not-found]


def test_formula() -> None:
    module, z = PolyNorm(eps=1e-3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, -0.2, 0.7], dtype=torch.float64))
        module.bias.fill_(0.1)
    want = torch.empty_like(z)
    for b in range(2):
        for n in range(3):
            row = z[b, n].tolist()
            for c, value in enumerate(row):
                terms = [value**p / (sum(u ** (2 * p) for u in row) / 5 + 1e-3) ** 0.5 for p in (3, 2, 1)]
                want[b, n, c] = 0.5 * terms[0] - 0.2 * terms[1] + 0.7 * terms[2] + 0.1
    torch.testing.assert_close(module(z), want, atol=1e-12, rtol=0)
    leaves = (z.requires_grad_(), module.weight, module.bias)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, (x,)), leaves)


def test_initial_values() -> None:
    module = PolyNorm()
    assert module.weight.tolist() == [torch.tensor(1 / 3).item()] * 3
    assert module.bias.tolist() == [0.0]
    on_meta = PolyNorm(device="meta").to_empty(device="cpu")
    on_meta.reset_parameters()
    assert torch.equal(on_meta.weight, module.weight)
    assert "eps=1e-06" in repr(module)


def test_cubes_do_not_overflow_in_half_precision() -> None:
    module, z = PolyNorm(), torch.tensor([[300.0, -200.0, 5.0, 0.0]])
    for dtype in (torch.float16, torch.bfloat16):
        got = module.to(dtype)(z.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), PolyNorm()(z), atol=2e-2, rtol=1e-2)
