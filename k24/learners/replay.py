"""Whole episodes, kept in one block of memory per field.

The episode is the axis after time, ``[A, T, episodes, ...]``, which is how nets take their input: a sample is one
gather per field and needs no transposition.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k24.envs.base import EnvSpec
from k24.learners.targets import n_step_transitions


@dataclass
class Episodes:
    """A batch of episodes, padded at the end to the longest possible.

    Attributes:
        obs: ``[A, T+1, B, D]``.
        state: ``[T+1, B, S]``.
        avail: bool ``[A, T+1, B, U]``, or None where every action always is.
        actions: int64 ``[A, T, B]``, or float32 ``[A, T, B, U]`` where they are continuous.
        reward: ``[A, T, B]``.
        terminated: bool ``[T, B]``.
        valid: bool ``[T, B]``, steps that were played; True up to an episode's last step.
        alive: bool ``[A, T+1, B]``, or None where all agents always are.
        won: bool ``[B]``, or None where the task knows no victory.
    """

    obs: Tensor
    state: Tensor
    avail: Tensor | None
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    valid: Tensor
    alive: Tensor | None = None
    won: Tensor | None = None

    @property
    def count(self) -> int:
        """Episodes (B)."""
        return self.valid.shape[1]

    @property
    def steps(self) -> int:
        """Steps played, over all episodes."""
        return int(self.valid.sum())

    def returns(self) -> Tensor:
        """Undiscounted return of each episode, summed over agents and steps, ``[B]``."""
        return (self.reward.sum(0) * self.valid).sum(0)

    def part(self, index: Tensor) -> Episodes:
        """Some of the episodes.

        Args:
            index: int64, their numbers.
        """
        chosen: Any = {}
        for name, axis in EPISODE_AXIS.items():
            value = getattr(self, name)
            chosen[name] = None if value is None else value.index_select(axis, index)
        return Episodes(**chosen)

    def cut(self) -> Episodes:
        """The same without the steps that no episode lasted to."""
        longest = int(self.valid.any(1).sum())
        chosen: Any = {}
        for name, axis in EPISODE_AXIS.items():
            value = getattr(self, name)
            chosen[name] = value if value is None or axis == 0 else value.narrow(axis - 1, 0, longest + (name in _ONE_MORE))
        return Episodes(**chosen)

    @classmethod
    def empty(cls, spec: EnvSpec, count: int, device: torch.device, avail: bool, alive: bool = False, won: bool = False) -> Episodes:
        """Room for ``count`` episodes of an environment, filled with zeros; says which of the optional fields there are."""
        a, t, actions = spec.n_agents, spec.episode_limit, torch.float32 if spec.continuous else torch.int64
        return cls(
            obs=torch.zeros(a, t + 1, count, spec.obs_dim, device=device),
            state=torch.zeros(t + 1, count, spec.state_dim, device=device),
            avail=torch.ones(a, t + 1, count, spec.n_actions, dtype=torch.bool, device=device) if avail else None,
            actions=torch.zeros(a, t, count, *([spec.n_actions] if spec.continuous else []), dtype=actions, device=device),
            reward=torch.zeros(a, t, count, device=device),
            terminated=torch.zeros(t, count, dtype=torch.bool, device=device),
            valid=torch.zeros(t, count, dtype=torch.bool, device=device),
            alive=torch.ones(a, t + 1, count, dtype=torch.bool, device=device) if alive else None,
            won=torch.zeros(count, dtype=torch.bool, device=device) if won else None,
        )


# Where the episode axis is, field by field, and whether what it holds goes on one step past the last action. Time is the axis before it.
EPISODE_AXIS = {"obs": 2, "state": 1, "avail": 2, "actions": 2, "reward": 2, "terminated": 1, "valid": 1, "alive": 2, "won": 0}
_ONE_MORE = {"obs", "state", "avail", "alive"}


def last_steps(valid: Tensor) -> Tensor:
    """Each episode's last played step, bool ``[T, B]``."""
    following = torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    return valid & ~following


class Transitions(NamedTuple):
    """Single moments of episodes, and what came of each some steps later.

    Attributes:
        obs: ``[A, N, D]``.
        state: ``[N, S]``.
        actions: int64 ``[A, N]``, or float32 ``[A, N, U]``.
        returns: The team's discounted rewards up to the later moment, ``[N]``.
        discount: Of the value of the later moment, ``[N]``; 0 where the task ended.
        next_obs: ``[A, N, D]``.
        next_state: ``[N, S]``.
        alive: bool ``[A, N]``, or None for all.
        next_alive: Likewise.
    """

    obs: Tensor
    state: Tensor
    actions: Tensor
    returns: Tensor
    discount: Tensor
    next_obs: Tensor
    next_state: Tensor
    alive: Tensor | None = None
    next_alive: Tensor | None = None


class EpisodeReplay:
    """The last ``capacity`` episodes, sampled uniformly without replacement.

    Args:
        spec: Sizes.
        capacity: Episodes kept.
        device: Where they are kept.
    """

    def __init__(self, spec: EnvSpec, capacity: int, device: torch.device) -> None:
        self.spec, self.capacity, self.device = spec, capacity, device
        self.size = 0
        self._next = 0
        self._data: Episodes | None = None
        self._played: Tensor | None = None

    def add(self, episodes: Episodes) -> None:
        """Takes a batch, over the oldest where full; the last of it where it is larger than all there is room for."""
        if self._data is None:
            self._data = self._empty(**{name: getattr(episodes, name) is not None for name in ("avail", "alive", "won")})
        if episodes.count > self.capacity:
            episodes = episodes.part(torch.arange(episodes.count - self.capacity, episodes.count, device=self.device))
        index = (torch.arange(episodes.count, device=self.device) + self._next) % self.capacity
        for name, axis in EPISODE_AXIS.items():
            mine, new = getattr(self._data, name), getattr(episodes, name)
            if mine is not None:
                mine.index_copy_(axis, index, new.to(mine.dtype))
        self._next = (self._next + episodes.count) % self.capacity
        self.size = min(self.size + episodes.count, self.capacity)
        self._played = None

    def sample(self, count: int, generator: torch.Generator) -> Episodes:
        """Draws episodes, cut to the longest of them.

        Args:
            count: Episodes wanted, at most ``size``.
            generator: Source of the random numbers.
        """
        assert self._data is not None
        index = torch.randperm(self.size, generator=generator, device=generator.device)[:count].to(self.device)
        # Steps past the end of the longest episode drawn are not worth the copy, nor what the learner would do with them.
        longest = int(self._data.valid.index_select(1, index).any(1).sum())
        chosen: Any = {}
        for field in fields(Episodes):
            name, data = field.name, getattr(self._data, field.name)
            axis = EPISODE_AXIS[name]
            if data is not None and axis > 0:
                data = data.narrow(axis - 1, 0, longest + (name in _ONE_MORE))
            chosen[name] = None if data is None else data.index_select(axis, index)
        return Episodes(**chosen)

    def sample_transitions(self, count: int, n_step: int, gamma: float, generator: torch.Generator) -> Transitions:
        """Draws steps, each as likely as any other, with replacement.

        Args:
            count: Transitions wanted (N).
            n_step: Steps of reward that a transition holds, less at an episode's end.
            gamma: Discount.
            generator: Source of the random numbers.
        """
        assert self._data is not None
        data, room = self._data, self._data.valid.shape[1]
        if self._played is None:
            # Step t of episode b is entry t·room + b, as it lies in memory.
            self._played = data.valid.flatten().nonzero().squeeze(1)
        start = self._played[torch.randint(len(self._played), (count,), generator=generator, device=generator.device).to(self.device)]
        end = data.valid.numel()
        steps = start + room * torch.arange(n_step, device=self.device)[:, None]
        inside = steps < end
        steps = steps.where(inside, start)
        reward = sum(data.reward[agent].view(-1)[steps] for agent in range(self.spec.n_agents))
        assert isinstance(reward, Tensor)
        returns, discount, taken = n_step_transitions(reward, data.terminated.view(-1)[steps], data.valid.view(-1)[steps] & inside, gamma)
        following = start + room * taken

        def at(values: Tensor | None, index: Tensor, agents: bool = True) -> Any:
            return None if values is None else values.flatten(int(agents), int(agents) + 1).index_select(int(agents), index)

        return Transitions(
            obs=at(data.obs, start),
            state=at(data.state, start, False),
            actions=at(data.actions, start),
            returns=returns,
            discount=discount,
            next_obs=at(data.obs, following),
            next_state=at(data.state, following, False),
            alive=at(data.alive, start),
            next_alive=at(data.alive, following),
        )

    def _empty(self, avail: bool, alive: bool, won: bool) -> Episodes:
        return Episodes.empty(self.spec, self.capacity, self.device, avail, alive, won)

    def state_dict(self) -> dict:
        """The filled part, and where the next episode goes."""
        data = {} if self._data is None else {k: getattr(self._data, k) for k in EPISODE_AXIS}
        kept = {k: None if v is None else v.narrow(EPISODE_AXIS[k], 0, self.size).clone() for k, v in data.items()}
        return {"size": self.size, "next": self._next, "data": kept}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.size, self._next, self._played = int(state["size"]), int(state["next"]), None
        if not state["data"]:
            return
        self._data = self._empty(**{name: state["data"].get(name) is not None for name in ("avail", "alive", "won")})
        for name, axis in EPISODE_AXIS.items():
            if state["data"].get(name) is not None:
                getattr(self._data, name).narrow(axis, 0, self.size).copy_(state["data"][name])
