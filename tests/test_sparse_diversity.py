"""Module C: losses that keep slots apart, and the coefficient that scales them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from math import log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from k24.sparse import AdaptiveCoefficient, MaskConfig, MaskedLinear, PatternSet, diversity_loss, pattern_orthogonality

TWO_FOUR = PatternSet.parse("2:4")
KINDS = ["orthogonality", "jensen_shannon", "symmetric_kl", "hamming"]


def sure(*choices: list[int]) -> Tensor:
    """One-hot ``pi`` from a list of patterns per slot, one output row."""
    return F.one_hot(torch.tensor(choices), 6).movedim(-1, 0).double()[:, :, None]


def some_pi(slots: int, rows: int = 2, groups: int = 3, patterns: PatternSet = TWO_FOUR) -> Tensor:
    return torch.randn(patterns.n_patterns, slots, rows, groups, dtype=torch.float64).softmax(0)


# --- by hand ---------------------------------------------------------------------------------------------------------------------

UNIFORM = torch.full((6, 3, 1, 2), 1 / 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("pi", "expected"),
    [
        (sure([0, 3], [0, 3], [0, 3]), 1.0),
        (UNIFORM, 1 / 6),
        (sure([0, 3], [1, 4], [2, 5]), 0.0),
        (sure([0, 3], [0, 4], [1, 4]), 1 / 3),  # one pair of three agrees in each group
        (torch.stack([torch.tensor([0.5, 0.5, 0, 0, 0, 0]), torch.tensor([0.5, 0.25, 0.25, 0, 0, 0])], 1).double()[..., None, None], 0.375),
    ],
)
def test_orthogonality_by_hand(pi: Tensor, expected: float) -> None:
    assert float(pattern_orthogonality([pi])) == pytest.approx(expected)


def test_layers_weigh_the_same_whatever_their_size() -> None:
    same, different = sure([0] * 50, [0] * 50), sure([0], [1])
    assert float(pattern_orthogonality([same, different])) == pytest.approx(0.5)


def test_more_slots_than_patterns_cannot_all_differ() -> None:
    # Eight slots over six patterns, two patterns taken twice: 2 of 28 pairs agree. The mean over patterns is what bounds it.
    spread = sure(*[[k % 6] for k in range(8)])
    assert float(pattern_orthogonality([spread])) == pytest.approx(2 / 28)
    for slots in (7, 8, 12):
        bound = (slots / 6 - 1) / (slots - 1)
        for _ in range(5):
            assert float(pattern_orthogonality([some_pi(slots)])) >= bound
    even = sure(*[[k % 6] for k in range(12)])
    assert float(pattern_orthogonality([even])) == pytest.approx((12 / 6 - 1) / 11), "reached where all are used alike"


@pytest.mark.parametrize(
    ("kind", "equal", "apart"),
    [
        ("jensen_shannon", 0.0, -1.0),
        ("symmetric_kl", 0.0, 2 * log(1e-8)),
        ("hamming", 0.0, -1.0),  # 1100 against 0011
    ],
)
def test_alternatives_by_hand(kind: str, equal: float, apart: float) -> None:
    assert float(diversity_loss(kind, [sure([0], [0])], TWO_FOUR)) == pytest.approx(equal, abs=1e-9)  # type: ignore[arg-type]
    assert float(diversity_loss(kind, [sure([0], [5])], TWO_FOUR)) == pytest.approx(apart)  # type: ignore[arg-type]


def test_hamming_sees_patterns_that_share_a_weight() -> None:
    # 1100 and 1010 differ in two of four weights; two uniform masks in half of them.
    assert float(diversity_loss("hamming", [sure([0], [1])], TWO_FOUR)) == pytest.approx(-0.5)
    assert float(diversity_loss("hamming", [UNIFORM], TWO_FOUR)) == pytest.approx(-0.5)


def test_jensen_shannon_is_in_units_of_what_can_be_reached() -> None:
    assert float(diversity_loss("jensen_shannon", [sure([0], [1], [2])], TWO_FOUR)) == pytest.approx(-1.0)
    assert float(diversity_loss("jensen_shannon", [sure(*[[k % 6] for k in range(12)])], TWO_FOUR)) == pytest.approx(-1.0)


# --- against explicit pairs ------------------------------------------------------------------------------------------------------


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(0)


def _kept(pi: Tensor) -> Tensor:
    return torch.einsum("pog,pm->mog", pi, TWO_FOUR.table.double())


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "orthogonality": lambda p, q: (p * q).sum(0).mean(),
    "symmetric_kl": lambda p, q: -(_kl(p, q) + _kl(q, p)).mean(),
    "hamming": lambda p, q: -(_kept(p) + _kept(q) - 2 * _kept(p) * _kept(q)).mean(),
}


@given(st.sampled_from(sorted(PAIRS)), st.integers(2, 9), st.integers(0, 1000))
def test_sums_over_slots_equal_loops_over_pairs(kind: str, slots: int, seed: int) -> None:
    torch.manual_seed(seed)
    pis = [some_pi(slots), some_pi(slots, 1, 4)]
    explicit = [torch.stack([PAIRS[kind](pi[:, i], pi[:, j]) for i, j in combinations(range(slots), 2)]).mean() for pi in pis]
    assert torch.allclose(diversity_loss(kind, pis, TWO_FOUR), torch.stack(explicit).mean())  # type: ignore[arg-type]


@given(st.integers(2, 9), st.integers(0, 1000))
def test_jensen_shannon_is_the_mean_divergence_from_the_mean(slots: int, seed: int) -> None:
    torch.manual_seed(seed)
    pi = some_pi(slots)
    explicit = torch.stack([_kl(pi[:, i], pi.mean(1)).mean() for i in range(slots)]).mean() / log(min(slots, 6))
    assert torch.allclose(diversity_loss("jensen_shannon", [pi], TWO_FOUR), -explicit)


def test_a_single_slot_has_nobody_to_differ_from() -> None:
    for kind in KINDS:
        assert float(diversity_loss(kind, [some_pi(1)], TWO_FOUR)) == 0.0  # type: ignore[arg-type]


# --- gradients -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    pis = [some_pi(3).requires_grad_(), some_pi(3, 1, 1).requires_grad_()]
    assert gradcheck(lambda *p: diversity_loss(kind, p, TWO_FOUR), pis)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_slots_alpha_feels_it(kind: str) -> None:
    layer = MaskedLinear(8, 4, 3, config=MaskConfig(hetero_init_scale=0.5))
    layer.resample(0.4)
    made = layer.materialise("train")
    assert made.pi is not None
    diversity_loss(kind, [made.pi], TWO_FOUR).backward()  # type: ignore[arg-type]
    assert (layer.alpha.grad.abs().amax((1, 2)) > 1e-6).all()
    assert layer.weight.grad is None or not layer.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_sure_patterns_give_finite_gradients(kind: str) -> None:
    pi = sure([0, 1, 2], [0, 1, 5], [4, 1, 2]).requires_grad_()
    diversity_loss(kind, [pi], TWO_FOUR).backward()  # type: ignore[arg-type]
    assert pi.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_descending_it_parts_slots_that_are_nearly_equal(kind: str) -> None:
    logits = torch.nn.Parameter(0.1 * torch.randn(6, 3, 2, 4, dtype=torch.float64))
    optimiser = torch.optim.Adam([logits], 0.1)
    for _ in range(100):
        optimiser.zero_grad()
        diversity_loss(kind, [logits.softmax(0)], TWO_FOUR).backward()  # type: ignore[arg-type]
        optimiser.step()
    best = TWO_FOUR.mask(logits.argmax(0), 16)
    apart = torch.stack([(best[i] != best[j]).float().mean() for i, j in combinations(range(3), 2)]).mean()
    assert apart > 0.55, "three masks cannot differ in more than two thirds of the weights, independent ones do in half"


# --- adaptive coefficient --------------------------------------------------------------------------------------------------------


def test_coefficient_by_hand() -> None:
    coefficient = AdaptiveCoefficient(0.1, length=2)
    assert coefficient.value == 0.1, "before anything is known"
    assert coefficient.update(4.0, 0.5) == pytest.approx(0.8)  # 0.1 · 4 / 0.5
    assert coefficient.update(2.0, 0.25) == pytest.approx(0.8)  # 0.1 · 3 / 0.375
    assert coefficient.update(6.0, 0.25) == pytest.approx(1.6)  # the first has left: 0.1 · 4 / 0.25
    assert coefficient.update(6.0, -0.75) == pytest.approx(2.4)  # 0.1 · 6 / |-0.25|
    assert coefficient.value == pytest.approx(2.4)


def test_coefficient_with_a_floor_stays_bounded() -> None:
    free, floored = AdaptiveCoefficient(0.1), AdaptiveCoefficient(0.1, floor=1 / 6)
    for _ in range(150):
        assert free.update(1.0, 0.002) == pytest.approx(50.0)
        assert floored.update(1.0, 0.002) == pytest.approx(0.6)
    assert floored.update(1.0, 100.0) == pytest.approx(0.1 / (99 * 0.002 + 100) * 100), "above the floor it is not felt"


def test_coefficient_keeps_its_value_where_there_is_nothing_to_divide_by() -> None:
    coefficient = AdaptiveCoefficient(0.1)
    assert coefficient.update(3.0, 0.0) == 0.1
    assert coefficient.update(3.0, 2.0) == pytest.approx(0.3)


def test_coefficient_state_round_trip() -> None:
    one, other = AdaptiveCoefficient(0.1, 3), AdaptiveCoefficient(0.1, 3)
    for task, diversity in ((1.0, 0.3), (2.0, 0.2), (3.0, 0.4), (0.5, 0.1)):
        one.update(task, diversity)
    state = copy.deepcopy(one.state_dict())
    other.load_state_dict(state)
    assert other.value == one.value
    one.update(7.0, 0.6)
    assert other.state_dict() == state, "what is saved is a copy"
    assert other.update(7.0, 0.6) == one.value
