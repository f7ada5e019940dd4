"""From a net's outputs to actions: one class per kind of policy, the same for training and for running.

Shapes: ``U`` actions of one agent (choices of a discrete one, dimensions of a continuous one), ``K`` outputs of the net. All functions take
outputs ``[..., K]``. Discrete actions are int64 ``[...]``, continuous ones float ``[..., U]`` in [-1, 1].

| kind | outputs | action |
|---|---|---|
| ``discrete`` | U action values | the largest |
| ``categorical`` | U logits | the likeliest, or one drawn |
| ``gaussian`` | U means and U spreads | tanh of the mean, or of a draw |
| ``deterministic`` | U | tanh |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

# A Gaussian starts at a standard deviation of a half (Andrychowicz et al. 2021, arXiv 2006.05990, found that a good choice) and keeps one.
_START_STD, _LEAST_STD = 0.5, 1e-3
_STD_OFFSET = math.log(math.expm1(_START_STD - _LEAST_STD))
# Actions stay this far from the ends of [-1, 1], where the inverse of tanh is infinite.
_MARGIN = 1e-6


class ActionKind(ABC):
    """What outputs mean.

    Attributes:
        continuous: Whether actions are vectors of numbers in [-1, 1].
        stochastic: Whether the policy is a distribution that actions can be drawn from.
    """

    continuous: bool = False
    stochastic: bool = False

    def n_outputs(self, n_actions: int) -> int:
        """Outputs (K) that a net needs for U actions."""
        return n_actions

    @abstractmethod
    def mode(self, outputs: Tensor, avail: Tensor | None = None) -> Tensor:
        """The best or likeliest action.

        Args:
            outputs: ``[..., K]``.
            avail: bool ``[..., U]``, which discrete actions can be taken; None for all. A row without any gets action 0.
        """

    @abstractmethod
    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Kullback–Leibler divergence of the policy ``outputs`` from the policy ``other``, ``[...]``."""

    @abstractmethod
    def distance(self, outputs: Tensor, other: Tensor) -> Tensor:
        """How far apart two policies are, ``[...]``: what System Neural Diversity averages (Bettini et al. 2023, arXiv 2305.02128)."""


class StochasticKind(ActionKind):
    """A distribution over actions."""

    stochastic = True

    @abstractmethod
    def sample(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draws an action; arguments as for :meth:`ActionKind.mode`."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, actions: Tensor, avail: Tensor | None = None) -> Tensor:
        """Logarithm of the probability, or density, of ``actions``, ``[...]``."""

    @abstractmethod
    def entropy(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Entropy in nats, ``[...]``, with its gradient; an estimate from one draw where it has no closed form."""


class ActionValues(ActionKind):
    """One value for each discrete action; as a policy it is compared as their softmax."""

    def mode(self, outputs: Tensor, avail: Tensor | None = None) -> Tensor:
        """The action of largest value."""
        return _masked(outputs, avail).argmax(-1)

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Of the two softmaxes."""
        p, q = outputs.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    def distance(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Square root of the Jensen–Shannon divergence in base 2, a metric in [0, 1]."""
        p, q = outputs.double().softmax(-1), other.double().softmax(-1)

        def entropy(x: Tensor) -> Tensor:
            return -(x * x.clamp_min(1e-300).log2()).sum(-1)

        return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp_min(0).sqrt()


class Categorical(ActionValues, StochasticKind):
    """Logits of a distribution over discrete actions."""

    def sample(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draws by the Gumbel-max rule: the largest of logits plus independent Gumbel noise."""
        exponential = torch.empty_like(outputs, dtype=torch.float32).exponential_(generator=generator)
        return _masked(outputs - exponential.log(), avail).argmax(-1)

    def log_prob(self, outputs: Tensor, actions: Tensor, avail: Tensor | None = None) -> Tensor:
        """Log-softmax at the action taken, among those available."""
        return self._log_probs(outputs, avail).gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Exact, over the available actions."""
        log_p = self._log_probs(outputs, avail)
        terms = log_p.exp() * log_p
        return -(terms if avail is None else torch.where(avail, terms, 0.0)).sum(-1)

    def _log_probs(self, outputs: Tensor, avail: Tensor | None) -> Tensor:
        # A large number and not -inf: its gradient is zero, where that of -inf is NaN.
        return (outputs if avail is None else outputs.masked_fill(~avail, -1e9)).log_softmax(-1)


class SquashedGaussian(StochasticKind):
    """``tanh(u)`` with ``u`` from a diagonal Gaussian (Haarnoja et al. 2018, arXiv 1801.01290, appendix C).

    The first U outputs are the means; the others become standard deviations by a softplus.
    """

    continuous = True

    def n_outputs(self, n_actions: int) -> int:
        """Means and spreads."""
        return 2 * n_actions

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before the tanh, ``[..., U]`` each."""
        mean, raw = outputs.chunk(2, -1)
        return mean, F.softplus(raw + _STD_OFFSET) + _LEAST_STD

    def mode(self, outputs: Tensor, avail: Tensor | None = None) -> Tensor:
        """The mean, squashed."""
        return outputs.chunk(2, -1)[0].tanh()

    def sample(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draws, a hair's breadth away from the ends at least."""
        mean, std = self.moments(outputs)
        noise = torch.empty_like(mean, dtype=torch.float32).normal_(generator=generator).to(mean.dtype)
        return (mean + std * noise).tanh().clamp(_MARGIN - 1, 1 - _MARGIN)

    def log_prob(self, outputs: Tensor, actions: Tensor, avail: Tensor | None = None) -> Tensor:
        """Log-density of the squashed actions: that of ``u = atanh(a)`` less ``log(1 - a²)``, summed over dimensions."""
        mean, std = self.moments(outputs)
        u = actions.clamp(_MARGIN - 1, 1 - _MARGIN).atanh()
        normal = -0.5 * ((u - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return (normal - _log_slope(u)).sum(-1)

    def entropy(self, outputs: Tensor, avail: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The Gaussian's, exactly, plus the mean log-slope of the tanh, estimated from one reparameterised draw."""
        mean, std = self.moments(outputs)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e) + _log_slope(mean + std * noise)).sum(-1)

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Of the Gaussians; squashing both changes nothing."""
        (mean, std), (mean2, std2) = self.moments(outputs), self.moments(other)
        return ((std2 / std).log() + (std.square() + (mean - mean2).square()) / (2 * std2.square()) - 0.5).sum(-1)

    def distance(self, outputs: Tensor, other: Tensor) -> Tensor:
        """2-Wasserstein distance of the Gaussians before squashing."""
        (mean, std), (mean2, std2) = self.moments(outputs.double()), self.moments(other.double())
        return ((mean - mean2).square() + (std - std2).square()).sum(-1).sqrt()


class Deterministic(ActionKind):
    """One action, squashed by tanh."""

    continuous = True
    # The spread that a policy without one is taken to have where a divergence is asked for: that of TD3's exploration.
    _STD = 0.1

    def mode(self, outputs: Tensor, avail: Tensor | None = None) -> Tensor:
        """The action."""
        return outputs.tanh()

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """As if both explored with Gaussian noise of standard deviation 0.1."""
        return (outputs.tanh() - other.tanh()).square().sum(-1) / (2 * self._STD**2)

    def distance(self, outputs: Tensor, other: Tensor) -> Tensor:
        """Euclidean distance of the actions."""
        return (outputs.double().tanh() - other.double().tanh()).norm(dim=-1)


def _masked(values: Tensor, avail: Tensor | None) -> Tensor:
    return values if avail is None else values.masked_fill(~avail, -torch.inf)


def _log_slope(u: Tensor) -> Tensor:
    """``log(1 - tanh(u)²)``, exact also where tanh is 1 to rounding."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


KINDS: dict[str, ActionKind] = {
    "discrete": ActionValues(),
    "categorical": Categorical(),
    "gaussian": SquashedGaussian(),
    "deterministic": Deterministic(),
}
