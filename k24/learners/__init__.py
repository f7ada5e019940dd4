"""Learners: each owns its replay, says how much experience it wants, and knows nothing of the sharing scheme it trains.

To add one: a file with a class that has the methods of :class:`Learner`, and a line in :data:`LEARNERS`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from k24.envs.base import EnvSpec, TeamEnv
from k24.errors import unknown_name
from k24.learners.replay import EpisodeReplay, Episodes
from k24.learners.rollout import RandomActor, ValueActor, collect_episodes
from k24.learners.value import ValueConfig, ValueLearner
from k24.nets import AgentNet
from k24.sharing.base import Sharing
from k24.sparse.slots import Phase, SlotRule

LEARNERS: dict[str, type[ValueLearner]] = {"iql": ValueLearner, "vdn": ValueLearner, "qmix": ValueLearner}


class Learner(Protocol):
    """What the training loop asks of a learner."""

    spec: EnvSpec
    net: AgentNet
    sharing: Sharing
    rule: SlotRule
    updates: int

    def gather(self, env: TeamEnv, env_steps: int, seed: int) -> Episodes:
        """Plays until there is something to learn from."""
        ...

    def learn(self, progress: float, env_steps: int) -> None:
        """Takes the gradient steps that are due."""
        ...

    def actor(self, phase: Phase = "act", epsilon: float = 0.0) -> ValueActor:
        """The present policy."""
        ...

    def random_actor(self) -> RandomActor:
        """A policy that does not look."""
        ...

    def metrics(self) -> dict[str, float]:
        """What to log."""
        ...

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state_dict`` gave."""
        ...

    def load_policy_state(self, state: dict) -> None:
        """Takes the part of it that acting needs."""
        ...


def make_learner(
    algo: str,
    spec: EnvSpec,
    sharing: Sharing,
    config: ValueConfig | None = None,
    hidden: int = 64,
    agent_id: bool | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rule: SlotRule | None = None,
) -> Learner:
    """Builds a learner by name; arguments as for :class:`ValueLearner`.

    Raises:
        UsageError: There is no such algorithm.
    """
    if algo not in LEARNERS:
        raise unknown_name("algorithm", algo, LEARNERS)
    return LEARNERS[algo](algo, spec, sharing, config, hidden, agent_id, seed, device, rule)


__all__ = [
    "LEARNERS",
    "EpisodeReplay",
    "Episodes",
    "Learner",
    "RandomActor",
    "ValueActor",
    "ValueConfig",
    "ValueLearner",
    "collect_episodes",
    "make_learner",
]
