"""The one-step masked weight against the composition of small functions that defines it."""

from __future__ import annotations

import pytest
import torch

from k24.sparse.fused import masked_weight
from k24.sparse.patterns import PatternSet
from k24.sparse.scoring import Gate, choose, mask_of_patterns, pattern_logits


@pytest.mark.parametrize("gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("pattern", "inputs"), [("2:4", 8), ("2:4", 11), ("2:4", 9), ("1:4", 6), ("4:8", 20), ("2:8", 16)])
def test_it_equals_the_composition(pattern: str, inputs: int, drawn: bool, gate: Gate) -> None:
    patterns, scale = PatternSet.parse(pattern), 0.7
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(5, inputs, generator=g, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(3, 5, inputs, generator=g, dtype=torch.float64, requires_grad=True)
    ema = torch.rand(3, inputs, generator=g, dtype=torch.float64)
    uniform = torch.rand(3, 5, patterns.groups(inputs), generator=g, dtype=torch.float64) if drawn else None
    out_grad = torch.randn(3, 5, inputs, generator=g, dtype=torch.float64)
    results = []
    for fused in (True, False):
        weight.grad = alpha.grad = None
        if fused:
            made, pi, mask, _ = masked_weight(weight, alpha, ema, patterns, scale, uniform, gate=gate)
        else:
            logits = pattern_logits(weight, ema, alpha, patterns, gate=gate)
            pi, q, codes = choose(logits, 1 / scale, uniform, "sample" if drawn else "expected")
            mask = mask_of_patterns(q, codes, patterns, inputs)
            made = weight * mask
        ((made * out_grad).sum() + pi[:, 0].mul(pi[:, 1]).sum()).backward()
        results.append([made.detach(), pi.detach(), mask.detach(), weight.grad, alpha.grad])
    for ours, defined in zip(*results, strict=True):
        assert torch.allclose(ours, defined, atol=1e-12)
    assert results[0][4].abs().sum() > 0


@pytest.mark.parametrize("gate", ["sigmoid", "exp"])
def test_gradcheck(gate: Gate) -> None:
    patterns = PatternSet(2, 4)
    weight = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    ema = torch.rand(2, 7, dtype=torch.float64)
    # By the definition W does not feel its own score, so only alpha's gradient is the function's derivative.
    fixed = weight.detach()
    assert torch.autograd.gradcheck(lambda a: masked_weight(fixed, a, ema, patterns, 1.3, gate=gate)[:2], (alpha,))


def test_a_draw_given_is_kept() -> None:
    patterns = PatternSet(2, 4)
    weight, alpha, ema = torch.randn(4, 8), torch.randn(2, 4, 8), torch.ones(2, 8)
    uniform = torch.rand(2, 4, 2)
    codes = torch.randint(0, 6, (2, 4, 2), dtype=torch.uint8)
    _, _, mask, kept = masked_weight(weight, alpha, ema, patterns, 1.0, uniform, codes)
    assert torch.equal(kept, codes)
    assert torch.equal(mask, patterns.mask(codes, 8))
