"""Statistics of reports: by hand, against what the reference implementation gives, and properties.

The reference is rliable 1.2.0, which does not run beside pandas 3, in an environment of its own
(``pip install 'pandas<3' rliable``): ``metrics.aggregate_*`` and ``probability_of_improvement`` of the matrices below, and
``library.get_interval_estimates`` with 20 000 and 5 000 samples.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k24.report import statistics

# Five runs of three tasks each.
X = np.array([[0.549, 0.715, 0.603], [0.545, 0.424, 0.646], [0.438, 0.892, 0.964], [0.383, 0.792, 0.529], [0.568, 0.926, 0.071]])
Y = np.array([[0.17, 0.116, 0.766], [0.723, 0.796, 0.883], [0.739, 0.469, 0.724], [0.195, 0.612, 0.215], [0.856, 0.517, 0.432]])
A, B = list(X.T), list(Y.T)


# --- by hand ---------------------------------------------------------------------------------------------------------------------


def test_of_eight_runs_the_middle_four_count() -> None:
    scores = [np.array([1.0, 2.0, 3.0, 100.0]), np.array([-50.0, 4.0, 5.0, 6.0])]
    assert statistics.iqm(scores) == (2 + 3 + 4 + 5) / 4
    assert statistics.mean(scores) == (106 / 4 - 35 / 4) / 2
    assert statistics.median([*scores, np.array([7.0])]) == 7.0  # of 26.5, -8.75 and 7


def test_a_task_with_fewer_runs_counts_as_much() -> None:
    scores = [np.array([0.0, 1.0]), np.array([10.0, 20.0, 30.0])]
    assert statistics.even(scores).tolist() == [[0, 0, 0, 1, 1, 1], [10, 10, 20, 20, 30, 30]]
    # Of 0 0 0 1 1 1 10 10 20 20 30 30 the middle six.
    assert statistics.iqm(scores) == pytest.approx((1 + 1 + 1 + 10 + 10 + 20) / 6)
    assert statistics.mean(scores) == (0.5 + 20) / 2


def test_shares_of_runs_above_levels() -> None:
    scores = [np.array([0.0, 1.0]), np.array([0.5, 0.5, 0.5, 2.0])]
    assert statistics.profile(scores, np.array([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [1.0, 0.75, 0.375, 0.125, 0.0]


def test_who_is_better_how_often() -> None:
    x, y = [np.array([1.0, 3.0]), np.array([5.0])], [np.array([1.0, 2.0]), np.array([5.0, 6.0])]
    # Task one: 1 = 1, 1 < 2, 3 > 1, 3 > 2; task two: 5 = 5, 5 < 6.
    assert statistics.probability_of_improvement(x, y) == ((0.5 + 0 + 1 + 1) / 4 + (0.5 + 0) / 2) / 2


def test_one_run_has_no_interval() -> None:
    assert statistics.estimate(statistics.mean, [np.array([1.0, 2.0]), np.array([3.0])]) == (2.25, None, None)


def test_the_interval_of_a_mean_by_students_t() -> None:
    # Three runs: standard deviation 2, t = 4.303.
    assert statistics.student(np.array([1.0, 3.0, 5.0])) == pytest.approx((3.0, 3 - 4.303 * 2 / 3**0.5, 3 + 4.303 * 2 / 3**0.5))
    assert statistics.student(np.array([7.0])) == (7.0, None, None)
    many = np.arange(40.0)
    assert statistics.student(many)[2] == pytest.approx(19.5 + 1.96 * many.std(ddof=1) / 40**0.5)


# --- the reference ---------------------------------------------------------------------------------------------------------------


def test_point_estimates_are_those_of_the_reference() -> None:
    assert statistics.iqm(A) == pytest.approx(0.5983333333333333)
    assert statistics.mean(A) == pytest.approx(0.603)
    assert statistics.median(A) == pytest.approx(0.5626)
    assert statistics.probability_of_improvement(A, B) == pytest.approx(0.5333333333333333)
    levels = np.linspace(0, 1, 5)
    assert statistics.profile(A, levels).tolist() == pytest.approx([1.0, 0.93333333, 0.73333333, 0.26666667, 0.0])


def test_intervals_are_those_of_the_reference() -> None:
    """Up to what two bootstraps differ by."""
    assert statistics.estimate(statistics.iqm, A, reps=20_000)[1:] == pytest.approx((0.50466, 0.70311), abs=0.006)
    assert statistics.estimate(statistics.mean, A, reps=20_000)[1:] == pytest.approx((0.49987, 0.6992), abs=0.006)
    found = statistics.estimate(statistics.probability_of_improvement, A, B)
    assert found[1:] == pytest.approx((0.30667, 0.76), abs=0.03)
    low, high = statistics.bootstrap(lambda s: statistics.profile(s, np.linspace(0, 1, 5)), A)
    assert low.tolist() == pytest.approx([1.0, 0.8, 0.46666667, 0.06666667, 0.0])
    assert high.tolist() == pytest.approx([1.0, 1.0, 0.93333333, 0.46666667, 0.0])


# --- properties ------------------------------------------------------------------------------------------------------------------

VALUES = st.floats(-100, 100, allow_subnormal=False)
SCORES = st.lists(st.lists(VALUES, min_size=1, max_size=6).map(np.array), min_size=1, max_size=4)


@given(SCORES, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_no_estimate_leaves_the_range(scores: list[np.ndarray], random) -> None:
    shuffled = [np.array(random.sample(s.tolist(), len(s))) for s in random.sample(scores, len(scores))]
    low, high = min(s.min() for s in scores), max(s.max() for s in scores)
    for statistic in (statistics.iqm, statistics.mean, statistics.median):
        assert statistic(shuffled) == pytest.approx(statistic(scores), abs=1e-9)
        assert low - 1e-9 <= statistic(scores) <= high + 1e-9


@given(SCORES, st.data())
def test_one_is_better_as_often_as_the_other_is_worse(scores: list[np.ndarray], data) -> None:
    others = [np.array(data.draw(st.lists(st.sampled_from([*s.tolist(), 0.0]), min_size=1, max_size=4))) for s in scores]
    there, back = statistics.probability_of_improvement(scores, others), statistics.probability_of_improvement(others, scores)
    assert there + back == pytest.approx(1.0)
    assert statistics.probability_of_improvement(scores, scores) == pytest.approx(0.5)


def test_bootstraps_are_repeatable_and_stay_within_their_task() -> None:
    one, two = (statistics.estimate(statistics.iqm, A) for _ in range(2))
    assert one == two != statistics.estimate(statistics.iqm, A, seed=1)
    apart = [np.array([0.0, 1.0]), np.array([100.0, 101.0])]
    low, high = statistics.bootstrap(statistics.mean, apart)
    assert (low, high) == (50.0, 51.0), "a task never gets runs of another"


def test_intervals_cover_what_they_should() -> None:
    """Of 400 samples of ten runs of two normal tasks the interval of the mean covers the true one about 19 times in 20, a little less
    often with so few runs."""
    rng = np.random.default_rng(0)
    covered = 0
    for k in range(400):
        scores = [rng.normal(mu, 1.0, 10) for mu in (0.0, 3.0)]
        _, low, high = statistics.estimate(statistics.mean, scores, reps=400, seed=k)
        assert low is not None and high is not None
        covered += low <= 1.5 <= high
    assert 0.89 < covered / 400 < 0.97
