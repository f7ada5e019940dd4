"""What learners measure: running moments of rewards, and how different the agents' policies are."""

from __future__ import annotations

import torch
from torch import Tensor

from k24.actions import ActionKind
from k24.learners.replay import Episodes
from k24.learners.rollout import slots_of
from k24.nets import AgentNet
from k24.sparse.slots import Phase, SlotRule

# Observations that policies are compared on.
POOL = 256


class RunningMoments:
    """Mean and variance of all that was seen, batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0.0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Takes a batch of any shape; an empty one says nothing."""
        if not values.numel():
            return
        values = values.double()
        n, mean = values.numel(), float(values.mean())
        delta, total = mean - self.mean, self.count + n
        self.square += float((values - mean).square().sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict:
        """Everything in it."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.count, self.mean, self.square = (float(state[name]) for name in ("count", "mean", "square"))

    @property
    def std(self) -> float:
        """Standard deviation, at least 1e-4 so that a constant can be divided by it."""
        return max((self.square / self.count) ** 0.5, 1e-4) if self.count > 1 else 1.0


def system_neural_diversity(kind: ActionKind, outputs: Tensor) -> float:
    """System Neural Diversity (Bettini et al. 2023, arXiv 2305.02128): mean distance of two agents' policies on the same observations.

    Args:
        kind: Says what distance is: Jensen–Shannon of discrete policies, 2-Wasserstein of Gaussian ones.
        outputs: ``[A, observations, K]``.
    """
    i, j = torch.triu_indices(len(outputs), len(outputs), 1)
    return float(kind.distance(outputs[i], outputs[j]).mean())


class PolicyPool:
    """A few observations from the first episodes, on which policies are compared: with each other, and with what they were.

    Args:
        kind: What the net's outputs mean.
        net: Whose policies.
        rule: Which slot each row uses.
    """

    def __init__(self, kind: ActionKind, net: AgentNet, rule: SlotRule) -> None:
        self._kind, self._net, self._rule = kind, net, rule
        self._obs: Tensor | None = None
        self._before: Tensor | None = None

    def fill(self, episodes: Episodes) -> None:
        """Takes observations of agents that are there, until it has some."""
        if self._obs is not None:
            return
        slots, alive = slots_of(self._rule, episodes.obs, episodes.alive)
        alive = alive if slots is None else slots >= 0
        played = episodes.valid.expand(self._net.n_agents, -1, -1)
        counted = played if alive is None else played & alive[:, :-1]
        seen = episodes.obs[:, :-1].permute(1, 2, 0, 3)[counted.permute(1, 2, 0)]
        # Evenly over the steps of the episodes: the first rows of many environments are all of the first step.
        chosen = torch.linspace(0, len(seen) - 1, min(POOL, len(seen))).long()
        self._obs = seen[chosen.to(seen.device)] if len(seen) else None

    @torch.no_grad()
    def _outputs(self, phase: Phase) -> Tensor | None:
        """Each slot asked about every observation, ``[slots, pool, K]``."""
        return None if self._obs is None else self._net.compare(self._net.snapshot(phase), self._obs)

    def moved(self) -> float | None:
        """Mean divergence of the policies from what they were at the call before; None at the first."""
        now, before = self._outputs("act"), self._before
        self._before = now
        return None if now is None or before is None else float(self._kind.divergence(now, before).mean())

    def metrics(self) -> dict[str, float]:
        """``snd`` of the deployed masks, where several slots can differ."""
        outputs = self._outputs("deploy") if self._net.n_slots > 1 else None
        return {} if outputs is None else {"snd": system_neural_diversity(self._kind, outputs)}

    def state_dict(self) -> dict:
        """Everything in it."""
        return {"obs": self._obs, "before": self._before}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._obs, self._before = state["obs"], state["before"]
