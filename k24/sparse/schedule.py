"""The temperature over training: a pure function of progress.

A line from ``init`` to ``minimum``. Where it starts above 1 there are two: down to 1, while patterns are explored, and from 1 to
``minimum``, while they commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from k24.errors import UsageError


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature as a pure function of training progress.

    Attributes:
        init: tau before ``start``.
        minimum: tau after ``end``.
        start: Share of training where it begins to fall.
        end: Share of training where it has fallen.
    """

    init: float = 1.0
    minimum: float = 0.03
    start: float = 0.0
    end: float = 0.6

    def __post_init__(self) -> None:
        """Checks the order of the ends."""
        if not 0 < self.minimum <= self.init:
            raise UsageError(f"temperatures must satisfy 0 < temperature_min (={self.minimum}) <= temperature_init (={self.init})")
        if not 0 <= self.start < self.end <= 1:
            raise UsageError(f"annealing must satisfy 0 <= anneal_start (={self.start}) < anneal_end (={self.end}) <= 1")

    def __call__(self, progress: float) -> float:
        """Returns tau.

        Linear from ``init`` to 1 over the first half of the annealing window and from 1 to ``minimum`` over the second;
        where 1 does not lie between the ends, one straight line.

        Args:
            progress: Share of training done; clamped to [0, 1].
        """
        x = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        if not self.minimum < 1.0 < self.init:
            return self.init + (self.minimum - self.init) * x
        if x < 0.5:
            return self.init + (1.0 - self.init) * 2 * x
        return 1.0 + (self.minimum - 1.0) * (2 * x - 1)
