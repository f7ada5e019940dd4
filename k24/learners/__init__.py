"""Learners: each owns its replay, says how much experience it wants, and knows nothing of the sharing scheme it trains.

To add one: a file with a subclass of :class:`~k24.learners.base.Learner`, and a line in :data:`LEARNERS`.
"""

from __future__ import annotations

from typing import Any

from k24.envs.base import EnvSpec
from k24.errors import unknown_name
from k24.learners.base import Learner
from k24.learners.optimise import CriticSharing
from k24.learners.ppo import PPOConfig, PPOLearner
from k24.learners.replay import EpisodeReplay, Episodes, TransitionReplay
from k24.learners.rollout import NetActor, RandomActor, collect_episodes
from k24.learners.td3 import TD3Config, TD3Learner
from k24.learners.value import ValueConfig, ValueLearner
from k24.sharing.base import Sharing

LEARNERS: dict[str, type[Learner]] = {
    "iql": ValueLearner,
    "vdn": ValueLearner,
    "qmix": ValueLearner,
    "ippo": PPOLearner,
    "mappo": PPOLearner,
    "matd3": TD3Learner,
}
LearnerConfig = ValueConfig | PPOConfig | TD3Config


def make_learner(algo: str, spec: EnvSpec, sharing: Sharing, config: LearnerConfig | None = None, **options: Any) -> Learner:
    """Builds a learner by name.

    Args:
        algo: A key of :data:`LEARNERS`.
        spec: The environment's sizes.
        sharing: The policy's parameter-sharing scheme; fresh, it becomes the learner's own.
        config: Settings; the algorithm's defaults when None.
        **options: The others of :class:`~k24.learners.base.Learner`, by name.

    Raises:
        UsageError: There is no such algorithm, or it can't learn this task.
    """
    if algo not in LEARNERS:
        raise unknown_name("algorithm", algo, LEARNERS)
    return LEARNERS[algo](algo, spec, sharing, config, **options)


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
