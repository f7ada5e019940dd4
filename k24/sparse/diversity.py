"""Module C: losses that keep the slots' patterns apart, and the coefficient that scales them.

All take pattern distributions ``pi [P, A, O, G]``, one tensor per layer, and return a scalar with a gradient to every slot's alpha. (With
``pi`` detached, as one known implementation has it, the loss is a constant and the module does nothing.) Sums over pairs of slots are
taken in O(A): ``Σ_{i<j} a_i·a_j = (|Σ a_i|² - Σ |a_i|²) / 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from k24.sparse.patterns import PatternSet

DiversityLoss = Literal["orthogonality", "jensen_shannon", "symmetric_kl", "hamming"]


def _mean_over_layers(per_layer: Callable[[Tensor], Tensor], pis: Sequence[Tensor]) -> Tensor:
    return torch.stack([per_layer(pi) for pi in pis]).mean()


class _PairProducts(torch.autograd.Function):
    """``Σ_{i≠j} pi_i · pi_j`` over groups; one pass forward and one back where autograd's own would take three each."""

    @staticmethod
    def forward(ctx, pi: Tensor) -> Tensor:
        total = pi.sum(1)
        ctx.save_for_backward(pi, total)
        return total.square().sum() - torch.dot(pi.reshape(-1), pi.reshape(-1))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        pi, total = ctx.saved_tensors
        return (total[:, None] - pi).mul_(2 * grad)


def pattern_orthogonality(pis: Sequence[Tensor]) -> Tensor:
    """Mean over groups, layers and pairs of slots of ``pi_i · pi_j``.

    1 when all slots are sure of the same patterns, 1/P when all are uniform or independent of each other, 0 when all
    are sure of different ones. With more slots than patterns 0 cannot be reached; it is at least
    ``(A/P - 1) / (A - 1)``, and that where P divides A.

    Args:
        pis: One ``[P, A, O, G]`` per layer, A at least 2.

    Returns:
        A scalar in [0, 1].
    """

    def one(pi: Tensor) -> Tensor:
        slots, groups = pi.shape[1], pi.shape[2] * pi.shape[3]
        return _PairProducts.apply(pi) / (slots * (slots - 1) * groups)

    return _mean_over_layers(one, pis)


def jensen_shannon(pis: Sequence[Tensor]) -> Tensor:
    """Minus the Jensen–Shannon divergence of the slots' distributions, in units of log(min(A, P)); 0 when equal, -1 at the most."""

    def one(pi: Tensor) -> Tensor:
        mean = pi.mean(1)
        divergence = _entropy(mean).mean() - _entropy(pi).mean()
        return -divergence / torch.log(torch.tensor(float(min(pi.shape[0], pi.shape[1]))))

    return _mean_over_layers(one, pis)


def symmetric_kl(pis: Sequence[Tensor]) -> Tensor:
    """Minus the mean over pairs of ``KL(i‖j) + KL(j‖i)``; unbounded, since sure and different slots are infinitely far apart."""

    def one(pi: Tensor) -> Tensor:
        slots, groups = pi.shape[1], pi.shape[2] * pi.shape[3]
        log_pi = pi.clamp_min(1e-8).log()
        # Σ_{i≠j} (pi_i - pi_j)·(log pi_i - log pi_j) / 2 over unordered pairs, written with sums over slots.
        total = slots * (pi * log_pi).sum() - (pi.sum(1) * log_pi.sum(1)).sum()
        return -2 * total / (slots * (slots - 1) * groups)

    return _mean_over_layers(one, pis)


def expected_overlap(pis: Sequence[Tensor], patterns: PatternSet) -> Tensor:
    """Minus the expected Hamming distance of two slots' masks, as a share of the weights; 0 when equal and sure.

    Two patterns that share a weight count as half different, which orthogonality does not see.
    """

    def one(pi: Tensor) -> Tensor:
        slots, groups = pi.shape[1], pi.shape[2] * pi.shape[3]
        table = patterns.table.to(pi)
        kept = (table.t() @ pi.reshape(patterns.n_patterns, -1)).view(patterns.m, *pi.shape[1:])
        # E|a - b| of two independent bits is a + b - 2ab.
        pairs = slots * (slots - 1)
        both = kept.sum(1).square().sum() - kept.square().sum()
        return -(2 * (slots - 1) * kept.sum() - 2 * both) / (pairs * groups * patterns.m)

    return _mean_over_layers(one, pis)


def _entropy(pi: Tensor) -> Tensor:
    return -(pi * pi.clamp_min(1e-12).log()).sum(0)


def diversity_loss(kind: DiversityLoss, pis: Sequence[Tensor], patterns: PatternSet) -> Tensor:
    """Module C by name; lower is more diverse.

    Args:
        kind: One of :data:`DiversityLoss`.
        pis: One ``[P, A, O, G]`` per layer.
        patterns: The N:M patterns.
    """
    if pis[0].shape[1] < 2:
        return pis[0].new_zeros(())
    if kind == "hamming":
        return expected_overlap(pis, patterns)
    return {"orthogonality": pattern_orthogonality, "jensen_shannon": jensen_shannon, "symmetric_kl": symmetric_kl}[kind](pis)


class AdaptiveCoefficient:
    """Scales a diversity loss to a fixed share of the task loss: ``|target · mean(last task losses) / mean(last diversity losses)|``.

    The denominator has a floor. Without one the coefficient grows without bound as the diversity loss falls (above 40 at a loss of 0.003 in
    one run), until diversity is all that trains. At the value of independent masks, 1/P, there is nothing left to gain.

    Args:
        target: Share of the task loss (``div_coef``).
        length: How many steps are averaged.
        floor: Smallest magnitude of the denominator.

    Attributes:
        value: The coefficient in force.
    """

    def __init__(self, target: float, length: int = 100, floor: float = 0.0) -> None:
        self.target, self.floor, self.length = target, floor, length
        self._task: list[float] = []
        self._diversity: list[float] = []
        self.value = target

    def update(self, task_loss: float, diversity: float) -> float:
        """Takes one step's losses and returns the coefficient."""
        for history, item in ((self._task, task_loss), (self._diversity, diversity)):
            history.append(item)
            del history[: -self.length]
        scale = max(abs(sum(self._diversity) / len(self._diversity)), self.floor)
        if scale > 0:
            self.value = abs(self.target * (sum(self._task) / len(self._task)) / scale)
        return self.value

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"task": list(self._task), "diversity": list(self._diversity), "value": self.value}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._task, self._diversity, self.value = list(state["task"]), list(state["diversity"]), float(state["value"])
