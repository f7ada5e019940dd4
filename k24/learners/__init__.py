"""Learners: each owns its replay, says how much experience it wants, and knows nothing of the sharing scheme it trains.

To add one: a file with a class that has the methods of :class:`Learner`, and a line in :data:`LEARNERS`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from k24.envs.base import EnvSpec, TeamEnv
from k24.errors import unknown_name
from k24.learners.optimise import CriticSharing
from k24.learners.ppo import PPOConfig, PPOLearner
from k24.learners.replay import EpisodeReplay, Episodes, TransitionReplay
from k24.learners.rollout import NetActor, RandomActor, collect_episodes
from k24.learners.td3 import TD3Config, TD3Learner
from k24.learners.value import ValueConfig, ValueLearner
from k24.nets import AgentNet
from k24.sharing.base import Sharing
from k24.sparse.slots import Phase, SlotRule

LEARNERS: dict[str, Any] = {
    "iql": ValueLearner,
    "vdn": ValueLearner,
    "qmix": ValueLearner,
    "ippo": PPOLearner,
    "mappo": PPOLearner,
    "matd3": TD3Learner,
}
LearnerConfig = ValueConfig | PPOConfig | TD3Config


class Learner(Protocol):
    """What the training loop asks of a learner.

    Attributes:
        spec: Sizes of the task.
        net: The policy's net.
        sharing: The policy's scheme.
        rule: Which slot each row uses.
        kind: What the net's outputs mean, a key of ``k24.actions.KINDS``.
    """

    spec: EnvSpec
    net: AgentNet
    sharing: Sharing
    rule: SlotRule
    kind: str

    def gather(self, env: TeamEnv, env_steps: int, seed: int) -> Episodes:
        """Plays until there is something to learn from."""
        ...

    def learn(self, progress: float, env_steps: int) -> None:
        """Takes the gradient steps that are due."""
        ...

    @property
    def updates(self) -> int:
        """Gradient steps taken."""
        ...

    def actor(self, phase: Phase = "act", sample: bool = False, seed: int = 0) -> NetActor:
        """The present policy: its best or likeliest actions, or actions drawn from it with a seed."""
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
    config: LearnerConfig | None = None,
    hidden: int = 64,
    agent_id: bool | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rule: SlotRule | None = None,
    critic_sharing: CriticSharing | None = None,
) -> Learner:
    """Builds a learner by name.

    Args:
        algo: A key of :data:`LEARNERS`.
        spec: The environment's sizes.
        sharing: The policy's parameter-sharing scheme; fresh, it becomes the learner's own.
        config: Settings; the algorithm's defaults when None.
        hidden: Hidden units of the nets.
        agent_id: Append agent indices to observations; the scheme's preference when None.
        seed: Seed of initial weights and of all random numbers of the learner.
        device: Where it learns.
        rule: Which slot of the scheme each row uses; the agent's index when None.
        critic_sharing: Makes the scheme of critics, for learners that have them; one dense network each when None.

    Raises:
        UsageError: There is no such algorithm.
    """
    if algo not in LEARNERS:
        raise unknown_name("algorithm", algo, LEARNERS)
    return LEARNERS[algo](algo, spec, sharing, config, hidden, agent_id, seed, device, rule, critic_sharing)


__all__ = [
    "LEARNERS",
    "CriticSharing",
    "EpisodeReplay",
    "Episodes",
    "Learner",
    "LearnerConfig",
    "NetActor",
    "PPOConfig",
    "PPOLearner",
    "RandomActor",
    "TD3Config",
    "TD3Learner",
    "TransitionReplay",
    "ValueConfig",
    "ValueLearner",
    "collect_episodes",
    "make_learner",
]
