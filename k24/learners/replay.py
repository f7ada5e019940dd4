"""Whole episodes, kept in one block of memory per field.

The episode is the axis after time, ``[A, T, episodes, ...]``, which is how nets take their input: a sample is one
gather per field and needs no transposition.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from k24.envs.base import EnvSpec


@dataclass
class Episodes:
    """A batch of episodes, padded at the end to the longest possible.

    Attributes:
        obs: ``[A, T+1, B, D]``.
        state: ``[T+1, B, S]``.
        avail: bool ``[A, T+1, B, U]``, or None where every action always is.
        actions: int64 ``[A, T, B]``.
        reward: ``[A, T, B]``.
        terminated: bool ``[T, B]``.
        valid: bool ``[T, B]``, steps that were played; True up to an episode's last step.
    """

    obs: Tensor
    state: Tensor
    avail: Tensor | None
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    valid: Tensor

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

    @classmethod
    def empty(cls, spec: EnvSpec, count: int, device: torch.device, avail: bool) -> Episodes:
        """Room for ``count`` episodes of an environment, filled with zeros."""
        a, t = spec.n_agents, spec.episode_limit
        return cls(
            obs=torch.zeros(a, t + 1, count, spec.obs_dim, device=device),
            state=torch.zeros(t + 1, count, spec.state_dim, device=device),
            avail=torch.ones(a, t + 1, count, spec.n_actions, dtype=torch.bool, device=device) if avail else None,
            actions=torch.zeros(a, t, count, dtype=torch.int64, device=device),
            reward=torch.zeros(a, t, count, device=device),
            terminated=torch.zeros(t, count, dtype=torch.bool, device=device),
            valid=torch.zeros(t, count, dtype=torch.bool, device=device),
        )


# Where the episode axis is, field by field.
EPISODE_AXIS = {"obs": 2, "state": 1, "avail": 2, "actions": 2, "reward": 2, "terminated": 1, "valid": 1}


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

    def add(self, episodes: Episodes) -> None:
        """Takes a batch, over the oldest where full."""
        if self._data is None:
            self._data = Episodes.empty(self.spec, self.capacity, self.device, episodes.avail is not None)
        index = (torch.arange(episodes.count, device=self.device) + self._next) % self.capacity
        for name, axis in EPISODE_AXIS.items():
            mine, new = getattr(self._data, name), getattr(episodes, name)
            if mine is not None:
                mine.index_copy_(axis, index, new.to(mine.dtype))
        self._next = (self._next + episodes.count) % self.capacity
        self.size = min(self.size + episodes.count, self.capacity)

    def sample(self, count: int, generator: torch.Generator) -> Episodes:
        """Draws episodes.

        Args:
            count: Episodes wanted, at most ``size``.
            generator: Source of the random numbers.
        """
        assert self._data is not None
        index = torch.randperm(self.size, generator=generator, device=generator.device)[:count].to(self.device)
        picked = {f.name: getattr(self._data, f.name) for f in fields(Episodes)}
        chosen: Any = {k: None if v is None else v.index_select(EPISODE_AXIS[k], index) for k, v in picked.items()}
        return Episodes(**chosen)

    def state_dict(self) -> dict:
        """The filled part, and where the next episode goes."""
        data = {} if self._data is None else {k: getattr(self._data, k) for k in EPISODE_AXIS}
        kept = {k: None if v is None else v.narrow(EPISODE_AXIS[k], 0, self.size).clone() for k, v in data.items()}
        return {"size": self.size, "next": self._next, "data": kept}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.size, self._next = int(state["size"]), int(state["next"])
        if not state["data"]:
            return
        self._data = Episodes.empty(self.spec, self.capacity, self.device, state["data"]["avail"] is not None)
        for name, axis in EPISODE_AXIS.items():
            if state["data"][name] is not None:
                getattr(self._data, name).narrow(axis, 0, self.size).copy_(state["data"][name])
