"""Modules A and B: scores, logits, distributions, draws, and the gradients they state."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from k24.errors import UsageError
from k24.sparse import PatternSet
from k24.sparse.scoring import choose, draw_noise, first_argmax, inverse_cdf, log_score, mask_of_patterns, pattern_logits, score

TWO_FOUR = PatternSet.parse("2:4")
KINDS = [("log", "none"), ("sum", "none"), ("sum", "group"), ("sum", "layer"), ("sum", "layernorm")]
# Quantiles of the chi-square distribution with 5 degrees of freedom.
CHI2_999, CHI2_001 = 20.515, 0.210


def some_layer(slots: int = 2, rows: int = 3, in_features: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, running magnitude and alpha of no special form."""
    return (
        torch.randn(rows, in_features, dtype=dtype),
        torch.rand(slots, in_features, dtype=dtype) + 0.1,
        torch.randn(slots, rows, in_features, dtype=dtype),
    )


def chi_square(codes: Tensor, pi: Tensor) -> float:
    counts = torch.bincount(codes.flatten().long(), minlength=len(pi)).double()
    expected = pi.double() * counts.sum()
    return float(((counts - expected).square() / expected).sum())


# --- module A --------------------------------------------------------------------------------------------------------------------

# |W|·EMA = 1, 4, 3, 2; exp(0) = 1, sigmoid(0) = 1/2.
WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0]], dtype=torch.float64)
EMA = torch.tensor([[1.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
ALPHA = torch.zeros(1, 1, 4, dtype=torch.float64)


def test_score_by_hand() -> None:
    assert score(WEIGHT, EMA, ALPHA).flatten().tolist() == [1.0, 4.0, 3.0, 2.0]
    # exp(log 3) = 3, and there is no end to it.
    assert score(WEIGHT, EMA, ALPHA + math.log(3)).flatten().tolist() == pytest.approx([3.0, 12.0, 9.0, 6.0])
    assert log_score(WEIGHT, EMA, ALPHA + 1000).flatten().tolist() == pytest.approx([1000 + math.log(x) for x in (1, 4, 3, 2)])
    # sigmoid(log 3) = 3/4.
    assert score(WEIGHT, EMA, ALPHA, "sigmoid").flatten().tolist() == [0.5, 2.0, 1.5, 1.0]
    assert score(WEIGHT, EMA, ALPHA + math.log(3), "sigmoid").flatten().tolist() == pytest.approx([0.75, 3.0, 2.25, 1.5])
    assert log_score(WEIGHT, EMA, ALPHA, "sigmoid").exp().flatten().tolist() == pytest.approx([0.5, 2.0, 1.5, 1.0])


def test_score_is_per_slot_and_leaves_the_weight_alone() -> None:
    weight, ema, alpha = some_layer()
    weight.requires_grad_()
    alpha.requires_grad_()
    for function in (score, log_score):
        s = function(weight, ema, alpha)
        assert torch.autograd.grad(s.sum(), weight, allow_unused=True)[0] is None
    for gate, through in (("exp", torch.exp), ("sigmoid", torch.sigmoid)):
        explicit = torch.stack([weight.abs() * ema[a] * through(alpha[a]) for a in range(2)])
        assert torch.allclose(score(weight, ema, alpha, gate), explicit)  # type: ignore[arg-type]
        assert torch.allclose(log_score(weight, ema, alpha, gate), explicit.log())  # type: ignore[arg-type]


# --- module B: logits ------------------------------------------------------------------------------------------------------------


def test_logits_by_hand() -> None:
    def logits(kind: str, normalise: str = "none") -> list[float]:
        return pattern_logits(WEIGHT, EMA, ALPHA, TWO_FOUR, kind, normalise, "sigmoid").flatten().tolist()  # type: ignore[arg-type]

    # Order 1100, 1010, 1001, 0110, 0101, 0011.
    assert logits("log") == pytest.approx([math.log(x) for x in (1.0, 0.75, 0.5, 3.0, 2.0, 1.5)])
    assert logits("sum") == [2.5, 2.0, 1.5, 3.5, 3.0, 2.5]
    assert logits("sum", "group") == pytest.approx([2.0, 1.6, 1.2, 2.8, 2.4, 2.0])
    assert logits("sum", "layer") == pytest.approx([2.0, 1.6, 1.2, 2.8, 2.4, 2.0])
    # Mean 2.5, variance (0 + .25 + 1 + 1 + .25 + 0)/6 = 5/12.
    assert logits("sum", "layernorm") == pytest.approx([x / math.sqrt(5 / 12 + 1e-5) for x in (0, -0.5, -1, 1, 0.5, 0)])


def test_group_and_layer_normalisation_differ_where_groups_do() -> None:
    weight = torch.cat([WEIGHT, 3 * WEIGHT], 1)
    ema, alpha = EMA.repeat(2, 2), torch.zeros(2, 1, 8, dtype=torch.float64)
    ema[1] *= 10
    by_group = pattern_logits(weight, ema, alpha, TWO_FOUR, "sum", "group")
    by_layer = pattern_logits(weight, ema, alpha, TWO_FOUR, "sum", "layer")
    # Mean scores are 1.25 and 3.75: 2.5 over the slot's layer, whatever the scale of the slot's inputs.
    for slot in range(2):
        assert by_group[0, slot, 0].tolist() == pytest.approx([2.0, 2.0])
        assert by_layer[0, slot, 0].tolist() == pytest.approx([1.0, 3.0])


def test_log_logits_are_the_k_subset_distribution() -> None:
    for patterns in (TWO_FOUR, PatternSet.parse("1:4"), PatternSet.parse("3:6")):
        weight, ema, alpha = some_layer(in_features=2 * patterns.m)
        for temperature, kappa in ((1.0, 1.0), (0.3, 1.0), (5.0, 2.0)):
            pi, _, _ = choose(pattern_logits(weight, ema, alpha, patterns), temperature, None, "expected", kappa)
            s = score(weight, ema, alpha).unflatten(-1, (-1, patterns.m)) ** (kappa / temperature)
            products = torch.stack([s[..., list(kept)].prod(-1) for kept in combinations(range(patterns.m), patterns.n)])
            assert torch.allclose(pi, products / products.sum(0), rtol=1e-9)


def test_log_logits_do_not_see_the_scale_of_weights_or_inputs() -> None:
    weight, ema, alpha = some_layer()
    pi = pattern_logits(weight, ema, alpha, TWO_FOUR).softmax(0)
    assert torch.allclose(pattern_logits(1e-3 * weight, 50 * ema, alpha, TWO_FOUR).softmax(0), pi)
    raw = pattern_logits(1e-3 * weight, ema, alpha, TWO_FOUR, "sum").softmax(0)
    assert float((raw - 1 / 6).abs().max()) < 1e-2, "raw sums of small scores are next to uniform"


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("in_features", [16, 15, 10])
def test_the_most_likely_pattern_keeps_the_top_scores(kind: str, normalise: str, text: str, in_features: int) -> None:
    patterns = PatternSet.parse(text)
    weight, ema, alpha = some_layer(in_features=in_features)
    codes = first_argmax(pattern_logits(weight, ema, alpha, patterns, kind, normalise))  # type: ignore[arg-type]
    mask = patterns.mask(codes, in_features)
    for s, kept in zip(score(weight, ema, alpha).split(patterns.m, -1), mask.split(patterns.m, -1), strict=True):
        top = s.topk(min(patterns.n, s.shape[-1]), -1).indices
        assert torch.equal(kept, torch.zeros_like(kept).scatter(-1, top, 1.0))


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
def test_padding_is_never_kept_in_place_of_a_weight(kind: str, normalise: str) -> None:
    for in_features in (5, 6, 7):
        weight, ema, alpha = some_layer(in_features=in_features)
        # Scores of 1e-6, far below the 1 that padding would have as exp(0).
        logits = pattern_logits(weight * 1e-6, ema, alpha, TWO_FOUR, kind, normalise)  # type: ignore[arg-type]
        pi, _, _ = choose(logits, 5.0, None, "expected")
        mask = mask_of_patterns(pi, None, TWO_FOUR, in_features)
        real = in_features - 4
        assert torch.allclose(mask[..., 4:].sum(-1), torch.full((2, 3), float(min(real, 2)), dtype=torch.float64))
        assert torch.allclose(mask[..., :4].sum(-1), torch.full((2, 3), 2.0, dtype=torch.float64))


# --- module B: draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["gumbel", "sample"])
@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.4])
def test_draws_follow_pi_at_every_temperature(forward: str, temperature: float) -> None:
    logits = pattern_logits(WEIGHT, EMA, ALPHA, TWO_FOUR).float().expand(6, 1, 1, 20_000)
    noise = draw_noise(logits.shape[1:], forward, 6, torch.Generator().manual_seed(1), logits.device)  # type: ignore[arg-type]
    pi, _, codes = choose(logits, temperature, noise, forward)  # type: ignore[arg-type]
    assert codes is not None
    assert CHI2_001 < chi_square(codes, pi[:, 0, 0, 0]) < CHI2_999
    other = (logits[:, 0, 0, 0] / (2 * temperature)).softmax(0)
    assert chi_square(codes, other) > 2 * CHI2_999, "the test would notice another temperature"


def test_temperature_on_the_noise_too_never_calms_the_draws() -> None:
    logits = pattern_logits(WEIGHT, EMA, ALPHA, TWO_FOUR).float().expand(6, 1, 1, 20_000)
    noise = draw_noise(logits.shape[1:], "gumbel", 6, torch.Generator().manual_seed(1), logits.device)
    at_one = logits[:, 0, 0, 0].softmax(0)
    drawn = {}
    for tau in (5.0, 0.1):
        _, _, codes = choose(logits, tau, noise, "gumbel", temperature_on="all")
        assert codes is not None
        assert chi_square(codes, at_one) < CHI2_999
        drawn[tau] = codes
    assert (drawn[5.0] == drawn[0.1]).float().mean() > 0.999, "equal up to rounding in ties"
    _, _, calm = choose(logits, 0.1, noise, "gumbel")
    assert calm is not None
    assert (calm == 3).float().mean() > 0.9, "on the logits alone, the best pattern of products 1, .75, .5, 3, 2, 1.5 wins"


def test_gumbel_noise_is_standard() -> None:
    noise = draw_noise(torch.Size([100, 100, 1]), "gumbel", 6, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert noise is not None
    assert noise.shape == (6, 100, 100, 1)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert draw_noise(torch.Size([2]), "expected", 6, None, torch.device("cpu")) is None


@given(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 7.0]), min_size=2, max_size=8).filter(any), st.integers(0, 1000))
def test_a_pattern_of_probability_zero_is_never_drawn(weights: list[float], seed: int) -> None:
    pi = torch.tensor(weights) / sum(weights)
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    uniform = torch.cat([ends, torch.rand(200, generator=torch.Generator().manual_seed(seed))])
    codes = inverse_cdf(pi[:, None].expand(-1, len(uniform)), uniform)
    assert (pi[codes.long()] > 0).all()


def test_inverse_cdf_by_hand() -> None:
    pi = torch.tensor([0.25, 0.0, 0.5, 0.25])[:, None].expand(-1, 6)
    assert inverse_cdf(pi, torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8, 0.99])).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("forward", ["gumbel", "sample"])
def test_illegal_patterns_are_never_drawn(forward: str) -> None:
    weight, ema, alpha = some_layer(in_features=7, rows=500, dtype=torch.float32)
    logits = pattern_logits(weight, ema, alpha, TWO_FOUR)
    noise = draw_noise(logits.shape[1:], forward, 6, None, logits.device)  # type: ignore[arg-type]
    _, _, codes = choose(logits, 5.0, noise, forward)  # type: ignore[arg-type]
    assert codes is not None
    assert set(codes[..., 1].flatten().tolist()) == {0, 1, 3}


@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
def test_first_argmax_is_argmax_and_the_first_among_equals(patterns: int, groups: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 3, (patterns, 2, groups), generator=g).float()
    values[torch.rand(values.shape, generator=g) < 0.2] = -torch.inf
    values[0, 0, 0] = 0.0
    assert first_argmax(values).flatten().tolist() == [row.index(max(row)) for row in values.flatten(1).t().tolist()]
    distinct = torch.randn(patterns, groups, generator=g)
    assert torch.equal(first_argmax(distinct).long(), distinct.argmax(0))


def test_a_temperature_of_zero_is_refused() -> None:
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"temperature .* must be positive"):
            choose(torch.zeros(6, 1, 1, 1), temperature, None, "expected")


# --- gradients -------------------------------------------------------------------------------------------------------------------


def test_straight_through_gradient_is_that_of_the_expected_mask() -> None:
    for patterns, in_features in ((TWO_FOUR, 8), (TWO_FOUR, 7), (PatternSet.parse("1:4"), 4)):
        groups = patterns.groups(in_features)
        q = torch.rand(patterns.n_patterns, 2, 3, groups, dtype=torch.float64).softmax(0).requires_grad_()
        codes = torch.randint(0, patterns.n_patterns, (2, 3, groups)).to(torch.uint8)
        upstream = torch.randn(2, 3, in_features, dtype=torch.float64)
        hard = mask_of_patterns(q, codes, patterns, in_features)
        assert torch.equal(hard, patterns.mask(codes, in_features, torch.float64))
        soft = torch.einsum("paog,pm->aogm", q, patterns.table.double()).flatten(-2)[..., :in_features]
        assert torch.allclose(mask_of_patterns(q, None, patterns, in_features), soft)
        (stated,) = torch.autograd.grad((soft * upstream).sum(), q)
        for mask in (hard, mask_of_patterns(q, None, patterns, in_features)):
            (surrogate,) = torch.autograd.grad((mask * upstream).sum(), q)
            assert torch.allclose(surrogate, stated)


@pytest.mark.parametrize(("kind", "normalise"), [("log", "none"), ("sum", "none"), ("sum", "layernorm")])
@pytest.mark.parametrize("forward", ["expected", "gumbel_soft"])
def test_gradcheck_of_soft_masks(kind: str, normalise: str, forward: str) -> None:
    weight, ema, alpha = some_layer(rows=2, in_features=7)
    noise = draw_noise(torch.Size([2, 2, 2]), forward, 6, None, weight.device)  # type: ignore[arg-type]
    noise = None if noise is None else noise.double()

    def mask(a: Tensor) -> Tensor:
        logits = pattern_logits(weight, ema, a, TWO_FOUR, kind, normalise)  # type: ignore[arg-type]
        _, q, codes = choose(logits, 0.7, noise, forward, kappa=1.5)  # type: ignore[arg-type]
        assert codes is None
        return mask_of_patterns(q, None, TWO_FOUR, 7)

    assert gradcheck(mask, alpha.requires_grad_())


@pytest.mark.parametrize("normalise", ["group", "layer"])
def test_normalisation_is_a_constant_to_the_gradient(normalise: str) -> None:
    weight, ema, alpha = some_layer()
    alpha.requires_grad_()
    s = score(weight, ema, alpha)
    grouped = s.detach().unflatten(-1, (2, 4))
    mean = grouped.mean(-1, keepdim=True) if normalise == "group" else grouped.mean((1, 2, 3), keepdim=True)
    upstream = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    stated = torch.einsum("aogm,pm->paog", s.unflatten(-1, (2, 4)) / mean, TWO_FOUR.table.double())
    logits = pattern_logits(weight, ema, alpha, TWO_FOUR, "sum", normalise)  # type: ignore[arg-type]
    assert torch.allclose(logits, stated)
    grads = [torch.autograd.grad((x * upstream).sum(), alpha, retain_graph=True)[0] for x in (logits, stated)]
    assert torch.allclose(*grads)


@pytest.mark.parametrize("forward", ["gumbel", "sample"])
def test_drawn_masks_pass_the_gradient_of_their_relaxation(forward: str) -> None:
    weight, ema, alpha = some_layer()
    alpha.requires_grad_()
    noise = draw_noise(torch.Size([2, 3, 2]), forward, 6, None, weight.device)  # type: ignore[arg-type]
    assert noise is not None
    logits = pattern_logits(weight, ema, alpha, TWO_FOUR)
    _, q, codes = choose(logits, 0.5, noise.double(), forward)  # type: ignore[arg-type]
    stated = (logits / 0.5 + (noise.double() if forward == "gumbel" else 0)).softmax(0)
    expected = torch.einsum("paog,pm->aogm", stated, TWO_FOUR.table.double()).flatten(-2)
    upstream = torch.randn(2, 3, 8, dtype=torch.float64)
    drawn = mask_of_patterns(q, codes, TWO_FOUR, 8)
    grads = [torch.autograd.grad((m * upstream).sum(), alpha, retain_graph=True)[0] for m in (drawn, expected)]
    assert torch.allclose(*grads)
    assert float(grads[0].abs().min()) > 0


@pytest.mark.parametrize(("kind", "normalise"), KINDS)
@pytest.mark.parametrize("forward", ["expected", "sample", "gumbel", "gumbel_soft"])
def test_extreme_values_stay_finite(kind: str, normalise: str, forward: str) -> None:
    weight, ema, alpha = some_layer(rows=4, in_features=10, dtype=torch.float32)
    weight[0], weight[1, :4], weight[1, 4] = 0.0, 0.0, 1e6
    ema[0, :5], ema[1] = 0.0, 0.0
    alpha[:, 2], alpha[:, 3, ::2], alpha[:, 3, 1::2] = -50.0, 50.0, -50.0
    alpha.requires_grad_()
    for temperature in (5.0, 0.1, 1e-3):
        logits = pattern_logits(weight, ema, alpha, TWO_FOUR, kind, normalise)  # type: ignore[arg-type]
        noise = draw_noise(logits.shape[1:], forward, 6, None, weight.device)  # type: ignore[arg-type]
        pi, q, codes = choose(logits, temperature, noise, forward)  # type: ignore[arg-type]
        mask = mask_of_patterns(q, codes, TWO_FOUR, 10)
        (grad,) = torch.autograd.grad(mask.square().sum() + pi.square().sum(), alpha)
        assert mask.isfinite().all()
        assert pi.isfinite().all()
        assert grad.isfinite().all()
        assert torch.allclose(mask[..., :8].unflatten(-1, (2, 4)).sum(-1), torch.tensor(2.0), atol=1e-4)
        assert torch.allclose(mask[..., 8:], torch.tensor(1.0), atol=1e-4), "two real columns, two kept"
