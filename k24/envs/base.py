"""One protocol for batched team environments, and one for single ones.

Shapes, everywhere in k24: ``A`` agents, ``E`` parallel environments, ``D`` observation features, ``S`` state features, ``U`` actions.
All tensors of one environment live on one device.

``TeamEnv`` is what learners see: a whole batch as tensors. A simulator of one environment at a time is written as a ``SingleEnv``, in
numpy and without any bookkeeping; ``k24.envs.copies`` runs many of them, in worker processes, and makes a ``TeamEnv`` of them.

The contract is small, and chosen so that no learner needs a special case:

* ``step`` resets on its own each environment whose episode ended. ``Step.after`` is what the action really led to (the
  last observation of an episode included, and its reward), ``Step.current`` is what to act on next. Where no episode ended they
  are the same object.
* ``terminated`` says that the task itself ended, so the value of what follows is 0. ``truncated`` says that a time limit cut
  the episode: what follows has a value, and targets bootstrap from ``Step.after``. Learners must not confuse the two.
* Rewards are per agent. What a learner makes of them (a team sum, say) is the learner's choice.
* ``reset(seed)`` starts every environment anew, and the same seed gives the same episodes bit for bit. Environments keep their random
  numbers to themselves: they neither read nor disturb torch's, numpy's or Python's global generators.
* An agent that is not ``alive`` sees zeros, and nothing it does matters. It counts for nothing in learning.
* Continuous actions lie in [-1, 1] in every environment; adapters stretch them to what the simulator wants.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from k24.errors import UsageError


@dataclass(frozen=True)
class EnvSpec:
    """What a net must know of an environment.

    Attributes:
        n_agents: Agents in the team (A).
        obs_dim: Features of one agent's observation (D); shorter observations are padded with zeros.
        state_dim: Features of the global state (S), for centralised critics and mixers.
        n_actions: Discrete actions per agent (U); agents with fewer have the rest unavailable. Where ``continuous``, the numbers that make
            up one agent's action; agents with fewer ignore the rest.
        episode_limit: The most steps an episode can take.
        continuous: Whether actions are vectors of U numbers in [-1, 1].
        unit_types: ``(start, stop)`` of the observation features that say one-hot which type of unit an agent is, where it has types that
            differ between episodes; all zero for a dead one. None where there is no such thing.

    Raises:
        UsageError: Sizes or limits that are no whole numbers of at least 1 (numpy's count), or another field that makes no sense.
    """

    n_agents: int
    obs_dim: int
    state_dim: int
    n_actions: int
    episode_limit: int
    continuous: bool = False
    unit_types: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("n_agents", "obs_dim", "state_dim", "n_actions", "episode_limit"):
            given = getattr(self, name)
            number = _whole(given)
            if number is None or number < 1:
                raise UsageError(f"EnvSpec: {name} must be a whole number of at least 1, got {given!r}")
            object.__setattr__(self, name, number)
        if not isinstance(self.continuous, bool | np.bool_):
            raise UsageError(f"EnvSpec: continuous must be True or False, got {self.continuous!r}")
        object.__setattr__(self, "continuous", bool(self.continuous))
        if self.unit_types is not None:
            edges = tuple(map(_whole, self.unit_types)) if isinstance(self.unit_types, Sequence) else ()
            if len(edges) != 2 or None in edges or not 0 <= edges[0] < edges[1] <= self.obs_dim:
                expected = f"(start, stop) with 0 <= start < stop <= obs_dim (={self.obs_dim})"
                raise UsageError(f"EnvSpec: unit_types must be None or {expected}, got {self.unit_types!r}")
            object.__setattr__(self, "unit_types", edges)


def _whole(value: Any) -> Any:
    """A whole number as Python's, numpy's too; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class Observation:
    """What the team sees at one moment.

    Attributes:
        obs: float32 ``[A, E, D]``.
        state: float32 ``[E, S]``.
        avail: bool ``[A, E, U]``, the actions each agent may take, at least one; None when all of them always are. An environment
            gives it in every observation or in none; never where actions are continuous.
        alive: bool ``[A, E]``, which agents are there; None when all of them always are. Given always or never, too.
    """

    obs: Tensor
    state: Tensor
    avail: Tensor | None = None
    alive: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What one step of the team led to.

    Attributes:
        after: The observation that followed, also where it is the last of its episode.
        current: The observation to act on next: that of the new episode where one ended.
        reward: float32 ``[A, E]``.
        terminated: bool ``[E]``, the task ended.
        truncated: bool ``[E]``, a time limit cut the episode, at ``EnvSpec.episode_limit`` steps; before only where the environment
            ``may_cut``. Never where ``terminated`` is.
        won: bool ``[E]``, episodes that just ended in victory, where the task knows such a thing; else None, always.
    """

    after: Observation
    current: Observation
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    won: Tensor | None = None


class TeamEnv(ABC):
    """A batch of environments in which one team acts.

    Attributes:
        spec: Sizes and limits.
        n_envs: Parallel environments (E).
        device: Where all tensors live.
        sides: The side of each agent, where several play against each other (``("adversary", "adversary", "good")``); else None.
        restarts: How often a part of the environment broke down and was started again.
        may_cut: Whether episodes may be truncated before the episode limit, by a simulator with limits of its own.
    """

    spec: EnvSpec
    n_envs: int
    device: torch.device
    sides: tuple[str, ...] | None = None
    restarts: int = 0
    may_cut: bool = False

    @abstractmethod
    def reset(self, seed: int) -> Observation:
        """Starts every environment anew; the same seed repeats the same episodes."""

    @abstractmethod
    def step(self, actions: Tensor) -> Step:
        """Takes one joint action, int64 ``[A, E]``, or float32 ``[A, E, U]`` where ``spec.continuous``."""

    def close(self) -> None:
        """Frees what the environment holds. May be called more than once."""

    def render(self) -> Tensor | None:
        """A picture of environment 0, uint8 ``[height, width, 3]``; None where there is none."""
        return None


class View(NamedTuple):
    """What the team sees in a single environment.

    Attributes:
        obs: One vector per agent, or ``[A, D]``; shorter ones are padded with zeros. May be overwritten by the next call.
        state: ``[S]``; None for all observations side by side, without padding.
        avail: bool ``[A, U]``; None where every action always is available.
        alive: bool ``[A]``; None where all agents always are there.
    """

    obs: Sequence[np.ndarray] | np.ndarray
    state: np.ndarray | None = None
    avail: np.ndarray | None = None
    alive: np.ndarray | None = None


class Outcome(NamedTuple):
    """What one step led to in a single environment.

    Attributes:
        view: What followed, also at the end of an episode.
        reward: ``[A]``.
        terminated: The task ended.
        truncated: The simulator cut the episode, at any step; its caller also does so at ``EnvSpec.episode_limit``.
        won: Whether an episode that ended here was won; None where the task knows no victory.
    """

    view: View
    reward: Sequence[float] | np.ndarray
    terminated: bool
    truncated: bool = False
    won: bool | None = None


class SingleEnv(ABC):
    """One environment of one team, in numpy. It begins no episode unless asked to.

    Every episode starts by ``reset(seed)``, and its seed and the actions say all that happens in it: after a breakdown it is played again.

    Attributes:
        spec: Sizes and limits.
        sides: As for ``TeamEnv``.
    """

    spec: EnvSpec
    sides: tuple[str, ...] | None = None

    @abstractmethod
    def reset(self, seed: int) -> View:
        """Starts an episode; the same seed (below 2**32) repeats it."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> Outcome:
        """Takes one joint action, int64 ``[A]``, or float32 ``[A, U]`` where ``spec.continuous``."""

    def close(self) -> None:
        """Frees what it holds. May be called more than once."""

    def render(self) -> np.ndarray | None:
        """A picture, uint8 ``[height, width, 3]``; None where there is none."""
        return None
