"""What learners measure: running moments of rewards, and how different the agents' policies are."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of all that was seen, batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0.0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Takes a batch of any shape."""
        values = values.double()
        n, mean = values.numel(), float(values.mean())
        delta, total = mean - self.mean, self.count + n
        self.square += float((values - mean).square().sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation, at least 1e-4 so that a constant can be divided by it."""
        return max((self.square / self.count) ** 0.5, 1e-4) if self.count > 1 else 1.0


def system_neural_diversity(policies: Tensor) -> float:
    """System Neural Diversity (Bettini et al. 2023, arXiv 2305.02128): mean distance of two agents' policies on the same observations.

    For discrete actions the distance is the square root of the Jensen–Shannon divergence in base 2, a metric in [0, 1].

    Args:
        policies: Action probabilities ``[A, observations, U]``.
    """
    n = policies.shape[0]
    i, j = torch.triu_indices(n, n, 1)
    p, q = policies[i].double(), policies[j].double()
    mean = (p + q) / 2

    def entropy(x: Tensor) -> Tensor:
        return -(x * x.clamp_min(1e-300).log2()).sum(-1)

    return float((entropy(mean) - (entropy(p) + entropy(q)) / 2).clamp_min(0).sqrt().mean())
