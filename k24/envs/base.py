"""One protocol for batched team environments.

Shapes, everywhere in k24: ``A`` agents, ``E`` parallel environments, ``D`` observation features, ``S`` state features, ``U`` actions.
All tensors of one environment live on one device.

The contract is small, and chosen so that no learner needs a special case:

* ``step`` resets on its own each environment whose episode ended. ``Step.after`` is what the action really led to (the
  last observation of an episode included, and its reward), ``Step.current`` is what to act on next. Where no episode ended they
  are the same object.
* ``terminated`` says that the task itself ended, so the value of what follows is 0. ``truncated`` says that a time limit cut
  the episode: what follows has a value, and targets bootstrap from ``Step.after``. Learners must not confuse the two.
* Rewards are per agent. What a learner makes of them (a team sum, say) is the learner's choice.
* ``reset(seed)`` starts every environment anew, and the same seed gives the same episodes bit for bit. Environments keep their random
  numbers to themselves: they neither read nor disturb torch's, numpy's or Python's global generators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EnvSpec:
    """What a net must know of an environment.

    Attributes:
        n_agents: Agents in the team (A).
        obs_dim: Features of one agent's observation (D); shorter observations are padded with zeros.
        state_dim: Features of the global state (S), for centralised critics and mixers.
        n_actions: Discrete actions per agent (U); agents with fewer have the rest unavailable.
        episode_limit: The most steps an episode can take.
    """

    n_agents: int
    obs_dim: int
    state_dim: int
    n_actions: int
    episode_limit: int


@dataclass(frozen=True)
class Observation:
    """What the team sees at one moment.

    Attributes:
        obs: float32 ``[A, E, D]``.
        state: float32 ``[E, S]``.
        avail: bool ``[A, E, U]``, the actions each agent may take, at least one; None when all of them always are. An environment
            gives it in every observation or in none.
    """

    obs: Tensor
    state: Tensor
    avail: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What one step of the team led to.

    Attributes:
        after: The observation that followed, also where it is the last of its episode.
        current: The observation to act on next: that of the new episode where one ended.
        reward: float32 ``[A, E]``.
        terminated: bool ``[E]``, the task ended.
        truncated: bool ``[E]``, a time limit cut the episode, at ``EnvSpec.episode_limit`` steps. Never where ``terminated`` is.
    """

    after: Observation
    current: Observation
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


class TeamEnv(ABC):
    """A batch of environments in which one team acts.

    Attributes:
        spec: Sizes and limits.
        n_envs: Parallel environments (E).
        device: Where all tensors live.
    """

    spec: EnvSpec
    n_envs: int
    device: torch.device

    @abstractmethod
    def reset(self, seed: int) -> Observation:
        """Starts every environment anew; the same seed repeats the same episodes."""

    @abstractmethod
    def step(self, actions: Tensor) -> Step:
        """Takes one joint action, int64 ``[A, E]``."""

    def close(self) -> None:
        """Frees what the environment holds. May be called more than once."""

    def render(self) -> Tensor | None:
        """A picture of environment 0, uint8 ``[height, width, 3]``; None where there is none."""
        return None
