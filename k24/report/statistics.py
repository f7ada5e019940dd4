"""Statistics of few runs on several tasks: point estimates with stratified bootstrap intervals.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264). Where all tasks have
as many runs, numbers are those of its reference implementation. Where they have not, every task counts as much as any other: its runs are
repeated until all tasks have the same number, before anything is pooled.

Scores are a sequence of arrays, one per task, ``[..., runs]``: axes before the last are bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[NDArray[np.float64]]

# Bootstrap samples, and the confidence of intervals.
REPS, CONFIDENCE = 5000, 0.95
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; from there on that of the normal distribution is near enough.
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Estimate(NamedTuple):
    """A number and its interval.

    Attributes:
        value: Of the runs as they are.
        low: Lower end; None where a task has a single run, which says nothing of how runs differ.
        high: Upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None


def even(scores: Scores) -> NDArray[np.float64]:
    """All tasks' runs, each repeated until every task has as many, ``[..., tasks, runs]``."""
    wanted = math.lcm(*(s.shape[-1] for s in scores))
    return np.stack([np.repeat(s, wanted // s.shape[-1], axis=-1) for s in scores], axis=-2)


def iqm(scores: Scores) -> NDArray[np.float64]:
    """Interquartile mean: of all tasks' runs together, the mean of the middle half (section 4.3)."""
    pooled = even(scores)
    pooled = np.sort(pooled.reshape(*pooled.shape[:-2], -1), axis=-1)
    count = pooled.shape[-1]
    return pooled[..., count // 4 : count - count // 4].mean(-1)


def mean(scores: Scores) -> NDArray[np.float64]:
    """Mean over tasks of the mean over runs."""
    return np.mean([s.mean(-1) for s in scores], axis=0)


def median(scores: Scores) -> NDArray[np.float64]:
    """Median over tasks of the mean over runs."""
    return np.median([s.mean(-1) for s in scores], axis=0)


def profile(scores: Scores, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Performance profile: the share of runs above each level, ``[..., levels]`` (section 4.2).

    Args:
        scores: One array per task.
        levels: Scores to be above.
    """
    return np.mean([(s[..., None, :] > levels[:, None]).mean(-1) for s in scores], axis=0)


def probability_of_improvement(scores: Scores, others: Scores) -> NDArray[np.float64]:
    """How likely a run of one is better than a run of the other, ties counting half, mean over tasks (section 4.3).

    Args:
        scores: One array per task.
        others: Those of the other method, on the same tasks.
    """
    better = [(np.sign(x[..., :, None] - y[..., None, :]) + 1).mean((-2, -1)) / 2 for x, y in zip(scores, others, strict=True)]
    return np.mean(better, axis=0)


def bootstrap(
    statistic: Callable[..., NDArray[np.float64]], *groups: Scores, reps: int = REPS, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the percentile interval of a statistic, runs drawn with replacement within each task and group.

    Args:
        statistic: Takes as many groups of scores.
        *groups: Scores of one or more methods.
        reps: Bootstrap samples.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [[s[rng.integers(s.shape[-1], size=(reps, s.shape[-1]))] for s in scores] for scores in groups]
    values = statistic(*drawn)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def estimate(statistic: Callable[..., NDArray[np.float64]], *groups: Scores, reps: int = REPS, seed: int = 0) -> Estimate:
    """A statistic that is one number, with its 95% interval; arguments as for :func:`bootstrap`."""
    value = float(statistic(*groups))
    if any(s.shape[-1] < 2 for scores in groups for s in scores):
        return Estimate(value, None, None)
    low, high = bootstrap(statistic, *groups, reps=reps, seed=seed)
    return Estimate(value, float(low), float(high))


def student(values: NDArray[np.float64]) -> Estimate:
    """Mean of one task's runs with its 95% interval by Student's t, which is wide enough for few of them; a bootstrap is not.

    Args:
        values: ``[runs]``.
    """
    count, middle = len(values), float(values.mean())
    if count < 2:
        return Estimate(middle, None, None)
    half = (T975[count - 2] if count - 1 <= len(T975) else 1.96) * float(values.std(ddof=1)) / count**0.5
    return Estimate(middle, middle - half, middle + half)
