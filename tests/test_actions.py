"""What outputs mean: probabilities and densities by hand, against torch.distributions and by integration, and actions that can be taken."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributions

from k24 import actions
from k24.actions import KINDS, ActionKind, Categorical, StochasticKind

DISCRETE = [name for name, kind in KINDS.items() if not kind.continuous]
CONTINUOUS = [name for name, kind in KINDS.items() if kind.continuous]
STOCHASTIC = [name for name, kind in KINDS.items() if kind.stochastic]
categorical, gaussian, deterministic = (KINDS[name] for name in ("categorical", "gaussian", "deterministic"))
assert isinstance(categorical, StochasticKind) and isinstance(gaussian, StochasticKind)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def outputs_of(name: str, *lead: int, n_actions: int = 3, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*lead, KINDS[name].n_outputs(n_actions), dtype=torch.float64)


# --- the table -------------------------------------------------------------------------------------------------------------------


def test_every_kind_is_in_the_table_and_says_what_it_is() -> None:
    found = {c for _, c in inspect.getmembers(actions, inspect.isclass) if issubclass(c, ActionKind) and not inspect.isabstract(c)}
    assert {type(kind) for kind in KINDS.values()} == found
    assert (DISCRETE, CONTINUOUS, STOCHASTIC) == (["discrete", "categorical"], ["gaussian", "deterministic"], ["categorical", "gaussian"])
    assert [kind.n_outputs(5) for kind in KINDS.values()] == [5, 5, 10, 5]


# --- discrete: by hand -----------------------------------------------------------------------------------------------------------

WEIGHTS = numbers(1, 2, 3, 4).log()
AVAIL = torch.tensor([True, False, True, True])


def test_the_best_action_is_the_largest_of_those_available() -> None:
    for name in DISCRETE:
        values = torch.tensor([[1.0, 5.0, 3.0, 2.0], [-7.0, -5.0, -9.0, -8.0]])
        assert KINDS[name].mode(values).tolist() == [1, 1]
        assert KINDS[name].mode(values, AVAIL.expand(2, -1)).tolist() == [2, 0]
        assert KINDS[name].mode(values, torch.zeros(2, 4, dtype=torch.bool)).tolist() == [0, 0]


def test_log_probabilities_by_hand() -> None:
    """Weights 1, 2, 3, 4 make tenths; without the second, eighths."""
    every = torch.arange(4)
    found = categorical.log_prob((WEIGHTS + 7).expand(4, -1), every)
    torch.testing.assert_close(found.exp(), numbers(0.1, 0.2, 0.3, 0.4))
    found = categorical.log_prob((WEIGHTS - 7).expand(4, -1), every, AVAIL.expand(4, -1))
    torch.testing.assert_close(found.exp(), numbers(1 / 8, 0, 3 / 8, 4 / 8))


def test_entropy_by_hand() -> None:
    # 0.1 ln 10 + 0.2 ln 5 + 0.3 ln 10/3 + 0.4 ln 5/2, and 1/8 ln 8 + 3/8 ln 8/3 + 1/2 ln 2
    assert float(categorical.entropy(WEIGHTS)) == pytest.approx(1.2798542258, abs=1e-9)
    assert float(categorical.entropy(WEIGHTS, AVAIL)) == pytest.approx(0.9743147529, abs=1e-9)
    only = torch.tensor([False, False, True, False])
    assert float(categorical.entropy(WEIGHTS, only)) == 0.0
    assert float(categorical.entropy(WEIGHTS, ~(only | True))) == 0.0
    assert float(categorical.entropy(torch.zeros(5, dtype=torch.float64))) == pytest.approx(math.log(5))


@pytest.mark.parametrize("name", DISCRETE)
def test_divergence_of_discrete_policies(name: str) -> None:
    p, q = numbers(0.5, 0.5).log() + 3, numbers(0.25, 0.75).log() - 1
    # 1/2 ln 2 + 1/2 ln 2/3, and 1/4 ln 1/2 + 3/4 ln 3/2
    assert float(KINDS[name].divergence(p, q)) == pytest.approx(0.1438410362, abs=1e-9)
    assert float(KINDS[name].divergence(q, p)) == pytest.approx(0.1308120352, abs=1e-9)
    p, q = outputs_of(name, 6, scale=3), outputs_of(name, 6, scale=3)
    expected = distributions.kl_divergence(distributions.Categorical(logits=p), distributions.Categorical(logits=q))
    torch.testing.assert_close(KINDS[name].divergence(p, q), expected)


@pytest.mark.parametrize("name", DISCRETE)
def test_distance_of_discrete_policies_by_hand(name: str) -> None:
    kind = KINDS[name]
    even, first, second = numbers(0, 0), numbers(1000, 0), numbers(0, 1000)
    # Of (1/2, 1/2) and (1, 0): the entropy of (3/4, 1/4), 0.8112781 bits, less half a bit.
    assert float(kind.distance(even, first)) == pytest.approx(math.sqrt(0.3112781245), abs=1e-9)
    assert float(kind.distance(first, second)) == pytest.approx(1.0)
    assert float(kind.distance(first, first + 5)) == 0.0


# --- Gaussian: by hand, against torch, by integration ------------------------------------------------------------------------------


def test_density_by_hand() -> None:
    """At the start of training: mean 0, standard deviation 1/2."""
    outputs = torch.zeros(2, 2, dtype=torch.float64)
    mean, std = gaussian.moments(outputs)
    torch.testing.assert_close((mean, std), (torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 0.5, dtype=torch.float64)))
    # -ln 1/2 - ln(2 pi)/2; one standard deviation on, 1/2 less, and less ln(1 - tanh² 1/2) for the slope.
    found = gaussian.log_prob(outputs, numbers(0, math.tanh(0.5))[:, None])
    torch.testing.assert_close(found, numbers(-0.2257913526, -0.7257913526 + 0.2402290139), atol=1e-9, rtol=0)


def against_torch(outputs: Tensor) -> distributions.Distribution:
    normal = distributions.Normal(*gaussian.moments(outputs))
    return distributions.Independent(distributions.TransformedDistribution(normal, distributions.TanhTransform()), 1)


@given(mean=st.floats(-2, 2), raw=st.floats(-3, 2), place=st.floats(-0.999, 0.999))
def test_density_is_that_of_a_change_of_variables(mean: float, raw: float, place: float) -> None:
    outputs = numbers(mean, -mean / 2, raw, raw / 2)
    taken = numbers(place, -place / 3)
    torch.testing.assert_close(gaussian.log_prob(outputs, taken), against_torch(outputs).log_prob(taken), rtol=1e-6, atol=1e-6)


# Fine enough for the integrals below: midpoints of a million equal parts of (-1, 1).
PARTS = 1_000_000
GRID = (torch.arange(PARTS, dtype=torch.float64) + 0.5) * (2 / PARTS) - 1


def log_density(outputs: Tensor) -> Tensor:
    return gaussian.log_prob(outputs.expand(PARTS, -1), GRID[:, None])


SHAPES = [numbers(0, 0), numbers(0.7, 0.5), numbers(-1.5, -1), numbers(0.2, -4)]


@pytest.mark.parametrize("outputs", SHAPES, ids=lambda o: str(o.tolist()))
def test_density_integrates_to_one_and_entropy_to_what_is_estimated(outputs: Tensor) -> None:
    log_p = log_density(outputs)
    p = log_p.exp()
    assert float(p.mean() * 2) == pytest.approx(1, abs=1e-6)
    drawn = gaussian.entropy(outputs.expand(100_000, -1), generator=seeded())
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert float(drawn.mean()) == pytest.approx(float(-(p * log_p).mean() * 2), abs=4 * error)
    assert error < 0.01


def test_entropy_of_several_dimensions_is_the_sum() -> None:
    outputs = torch.cat([torch.stack([s[0] for s in SHAPES]), torch.stack([s[1] for s in SHAPES])])
    both = gaussian.entropy(outputs.expand(20_000, -1), generator=seeded()).mean()
    each = sum(gaussian.entropy(s.expand(20_000, -1), generator=seeded(1)).mean() for s in SHAPES)
    assert float(both) == pytest.approx(float(each), abs=0.05)


def test_divergence_of_gaussians() -> None:
    p, q = outputs_of("gaussian", 5), outputs_of("gaussian", 5)
    expected = distributions.kl_divergence(distributions.Normal(*gaussian.moments(p)), distributions.Normal(*gaussian.moments(q))).sum(-1)
    torch.testing.assert_close(gaussian.divergence(p, q), expected)
    assert not gaussian.divergence(p, p).any()
    # That squashing changes nothing is seen by integrating over the squashed actions.
    log_p, log_q = log_density(SHAPES[1]), log_density(SHAPES[0])
    integral = float((log_p.exp() * (log_p - log_q)).mean() * 2)
    assert float(gaussian.divergence(SHAPES[1], SHAPES[0])) == pytest.approx(integral, abs=1e-5)


def test_distance_of_gaussians_by_hand() -> None:
    assert float(gaussian.distance(numbers(1, -1, 0.3, 2), numbers(4, 3, 0.3, 2))) == pytest.approx(5)
    narrow, wide = numbers(1, -1), numbers(1, 2)
    spread = float(gaussian.moments(wide)[1] - gaussian.moments(narrow)[1])
    assert spread > 1 and float(gaussian.distance(narrow, wide)) == pytest.approx(spread)


def test_deterministic_policies_by_hand() -> None:
    here, there = numbers(0, 0), numbers(math.atanh(0.3), -math.atanh(0.4))
    torch.testing.assert_close(deterministic.mode(there), numbers(0.3, -0.4))
    assert float(deterministic.distance(here, there)) == pytest.approx(0.5)
    # Two Gaussians of standard deviation 0.1 whose means are 0.5 apart: 0.5² / (2 · 0.1²).
    assert float(deterministic.divergence(here, there)) == pytest.approx(12.5)


def test_the_mode_of_a_gaussian_is_its_mean_squashed() -> None:
    outputs = outputs_of("gaussian", 4)
    torch.testing.assert_close(gaussian.mode(outputs), gaussian.moments(outputs)[0].tanh())


# --- what holds for all ------------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(list(KINDS)), seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_distance_is_a_metric_and_divergence_is_none_from_oneself(name: str, seed: int, scale: float) -> None:
    kind = KINDS[name]
    torch.manual_seed(seed)
    a, b, c = (outputs_of(name, 4, scale=scale) for _ in range(3))
    ab, bc, ac = kind.distance(a, b), kind.distance(b, c), kind.distance(a, c)
    assert bool((ab >= 0).all()) and bool((ac <= ab + bc + 1e-9).all())
    torch.testing.assert_close(ab, kind.distance(b, a))
    torch.testing.assert_close(kind.distance(a, a), torch.zeros(4, dtype=torch.float64))
    assert bool((kind.divergence(a, b) >= -1e-9).all())
    torch.testing.assert_close(kind.divergence(a, a), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str) -> None:
    kind = KINDS[name]
    outputs, other = outputs_of(name, 4).requires_grad_(), outputs_of(name, 4).requires_grad_()
    assert torch.autograd.gradcheck(kind.divergence, (outputs, other))
    if not isinstance(kind, StochasticKind):
        return
    avail = None if kind.continuous else torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, True]])
    taken = kind.sample(outputs.detach(), avail, seeded())
    assert torch.autograd.gradcheck(lambda o: kind.log_prob(o, taken, avail), (outputs,))
    assert torch.autograd.gradcheck(lambda o: kind.entropy(o, avail, seeded(3)), (outputs,))
    if avail is not None:
        loss = (kind.log_prob(outputs, taken, avail) + kind.entropy(outputs, avail)).sum()
        (gradient,) = torch.autograd.grad(loss, outputs)
        assert not gradient[~avail].any(), "what cannot be done teaches nothing"


def test_draws_come_as_often_as_they_should() -> None:
    count = 40_000
    drawn = categorical.sample(WEIGHTS.expand(count, -1), AVAIL.expand(count, -1), seeded())
    p = numbers(1 / 8, 0, 3 / 8, 4 / 8)
    share = torch.bincount(drawn, minlength=4) / count
    assert bool(((share - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all())
    assert share[1] == 0
    outputs = numbers(0.4, -1, 0.5, -0.5)
    mean, std = gaussian.moments(outputs)
    before = gaussian.sample(outputs.expand(count, -1), generator=seeded()).atanh()
    assert bool(((before.mean(0) - mean).abs() <= 4 * std / math.sqrt(count)).all())
    assert bool(((before.std(0) / std - 1).abs() <= 4 / math.sqrt(2 * count)).all())


@st.composite
def rows_of_choices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Outputs of any size, and which can be taken."""
    n = draw(st.integers(1, 6))
    rows = draw(st.integers(1, 5))
    values = draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=n * rows, max_size=n * rows))
    avail = draw(st.lists(st.booleans(), min_size=n * rows, max_size=n * rows))
    return torch.tensor(values).view(rows, n), torch.tensor(avail).view(rows, n)


@given(rows=rows_of_choices(), seed=st.integers(0, 2**32))
def test_what_is_not_available_is_never_chosen(rows: tuple[Tensor, Tensor], seed: int) -> None:
    values, avail = rows
    chosen = [KINDS[name].mode(values, avail) for name in DISCRETE]
    chosen += [kind.sample(values, avail, seeded(seed)) for kind in KINDS.values() if isinstance(kind, Categorical)]
    for each in chosen:
        assert each.dtype == torch.int64 and each.shape == avail.shape[:1]
        taken = avail.gather(-1, each[:, None])[:, 0]
        assert bool((taken | (~avail.any(-1) & (each == 0))).all())


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8), seed=st.integers(0, 2**32))
def test_continuous_actions_stay_within_their_bounds(values: list[float], seed: int) -> None:
    outputs = torch.tensor(values).view(2, 4)
    for name in CONTINUOUS:
        assert float(KINDS[name].mode(outputs).abs().max()) <= 1
    drawn = gaussian.sample(outputs, generator=seeded(seed))
    assert drawn.shape == (2, 2) and drawn.dtype == torch.float32 and float(drawn.abs().max()) < 1


@pytest.mark.parametrize("name", STOCHASTIC)
def test_one_seed_draws_one_thing_and_leaves_other_numbers_alone(name: str) -> None:
    kind = KINDS[name]
    assert isinstance(kind, StochasticKind)
    outputs = outputs_of(name, 50).float()
    before = torch.get_rng_state()
    generator = seeded(5)
    first, second = kind.sample(outputs, None, generator), kind.sample(outputs, None, generator)
    kind.entropy(outputs, None, generator)
    assert torch.equal(first, kind.sample(outputs, None, seeded(5))) and not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    again = kind.sample(outputs)
    torch.manual_seed(0)
    assert torch.equal(again, kind.sample(outputs)), "without a generator, torch's own"


@pytest.mark.parametrize("mean", [0.0, 8.0, -60.0])
@pytest.mark.parametrize("raw", [-30.0, 0.0, 30.0])
def test_saturated_actions_have_finite_densities_and_gradients(mean: float, raw: float) -> None:
    """At the ends of the range the inverse of tanh is infinite, and a float32 tanh gets there from 9 on."""
    outputs = torch.tensor([[mean, -mean, raw, raw]] * 3, requires_grad=True)
    taken = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 1.0]])
    log_p, entropy = gaussian.log_prob(outputs, taken), gaussian.entropy(outputs, generator=seeded())
    (gradient,) = torch.autograd.grad((log_p + entropy).sum(), outputs)
    assert bool(torch.isfinite(log_p).all()) and bool(torch.isfinite(entropy).all()) and bool(torch.isfinite(gradient).all())
    drawn = gaussian.sample(outputs, generator=seeded())
    assert bool(torch.isfinite(gaussian.log_prob(outputs, drawn)).all())
