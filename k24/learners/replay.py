"""What was played, kept in one block of memory per field: whole episodes, or single moments of them.

What is drawn (an episode, a moment) is the last axis before the features, ``[A, T, episodes, ...]`` or ``[A, moments, ...]``, which is how
nets take their input: a sample is one gather per field and needs no transposition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        return self.until(int(self.valid.any(1).sum()))

    def until(self, steps: int) -> Episodes:
        """The first so many steps of every episode, as views."""
        chosen: Any = {}
        for name, axis in EPISODE_AXIS.items():
            value = getattr(self, name)
            chosen[name] = value if value is None or axis == 0 else value.narrow(axis - 1, 0, steps + (name in _ONE_MORE))
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
        capacity: Episodes kept.
        device: Where they are kept.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.size = 0
        self._next = 0
        self._data: Episodes | None = None

    def add(self, episodes: Episodes) -> None:
        """Takes a batch, over the oldest where full; the last of it where it is larger than all there is room for."""
        if self._data is None:
            self._make_room({name: getattr(episodes, name) for name in EPISODE_AXIS})
        if episodes.count > self.capacity:
            episodes = episodes.part(torch.arange(episodes.count - self.capacity, episodes.count, device=self.device))
        index = (torch.arange(episodes.count, device=self.device) + self._next) % self.capacity
        for name, axis in EPISODE_AXIS.items():
            mine = getattr(self._data, name)
            if mine is not None:
                mine.index_copy_(axis, index, getattr(episodes, name))
        self._next = (self._next + episodes.count) % self.capacity
        self.size = min(self.size + episodes.count, self.capacity)

    def sample(self, count: int, generator: torch.Generator) -> Episodes:
        """Draws episodes, cut to the longest of them.

        Args:
            count: Episodes wanted, at most ``size``.
            generator: Source of the random numbers.
        """
        assert self._data is not None
        index = torch.randperm(self.size, generator=generator, device=generator.device)[:count].to(self.device)
        # Steps past the end of the longest episode drawn are not worth the copy, nor what the learner would do with them.
        return self._data.until(int(self._data.valid.index_select(1, index).any(1).sum())).part(index)

    def _make_room(self, like: Mapping[str, Tensor | None]) -> None:
        """Room for episodes of these sizes. Nothing is written to it, so that memory is taken as it fills."""
        room: Any = {}
        for name, axis in EPISODE_AXIS.items():
            found = like.get(name)
            room[name] = None if found is None else found.new_empty([*found.shape[:axis], self.capacity, *found.shape[axis + 1 :]])
        self._data = Episodes(**room)

    def state_dict(self) -> dict:
        """The filled part, and where the next episode goes."""
        data = {} if self._data is None else {k: getattr(self._data, k) for k in EPISODE_AXIS}
        kept = {k: None if v is None else _filled(v, EPISODE_AXIS[k], self.size) for k, v in data.items()}
        return {"size": self.size, "next": self._next, "data": kept}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.size, self._next, self._data = int(state["size"]), int(state["next"]), None
        if not state["data"]:
            return
        self._make_room(state["data"])
        for name, axis in EPISODE_AXIS.items():
            if state["data"].get(name) is not None:
                getattr(self._data, name).narrow(axis, 0, self.size).copy_(state["data"][name])


class TransitionReplay:
    """The last ``capacity`` moments of episodes, whose steps are sampled uniformly with replacement.

    Moments lie in the order in which they were played, one episode after the other, and the last of each is what its last step led to: what
    a step earned in the next n is read by walking on, up to a moment that no step was taken in. Episodes that end early take no more
    room than they have steps.

    Args:
        capacity: Moments kept; at least an episode's.
        device: Where they are kept.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.size = 0
        self._next = 0
        self._data: dict[str, Tensor] = {}
        self._starts: Tensor | None = None

    def add(self, episodes: Episodes) -> None:
        """Takes a batch, over the oldest where full; the last of it where it is larger than all there is room for."""
        count, played = episodes.count, torch.cat([episodes.valid, torch.zeros_like(episodes.valid[:1])])
        seen = torch.cat([episodes.valid[:1], episodes.valid])
        # Moments by number, time after time as they lie in the batch, in the order of episodes.
        order = seen.t().reshape(-1).nonzero().squeeze(1)[-self.capacity :]
        moment = order % len(seen) * count + order // len(seen)
        step = moment.clamp_max(episodes.valid.numel() - 1)  # of a last moment there is no step: whatever stands there is not looked at
        actions = episodes.actions
        if episodes.alive is not None:
            here = episodes.alive[:, :-1]
            actions = actions.where(here if actions.dim() == 3 else here[..., None], 0)  # the dead do nothing
        found = {
            "obs": episodes.obs.flatten(1, 2).index_select(1, moment),
            "state": episodes.state.flatten(0, 1).index_select(0, moment),
            "actions": actions.flatten(1, 2).index_select(1, step),
            "reward": episodes.reward.sum(0).view(-1)[step],
            "terminated": episodes.terminated.view(-1)[step],
            "played": played.view(-1)[moment],
        }
        if episodes.alive is not None:
            found["alive"] = episodes.alive.flatten(1, 2).index_select(1, moment)
        if not self._data:
            self._make_room(found)
        index = (torch.arange(len(moment), device=self.device) + self._next) % self.capacity
        for name, value in found.items():
            self._data[name].index_copy_(_TRANSITION_AXIS[name], index, value)
        self._next = (self._next + len(moment)) % self.capacity
        self.size = min(self.size + len(moment), self.capacity)
        self._starts = None

    def sample(self, count: int, n_step: int, gamma: float, generator: torch.Generator) -> Transitions:
        """Draws steps, each as likely as any other.

        Args:
            count: Transitions wanted (N).
            n_step: Steps of reward that a transition holds, less at an episode's end.
            gamma: Discount.
            generator: Source of the random numbers.
        """
        data = self._data
        if self._starts is None:
            self._starts = data["played"][: self.size].nonzero().squeeze(1)
        start = self._starts[torch.randint(len(self._starts), (count,), generator=generator, device=generator.device).to(self.device)]
        # The newest moment is an episode's last, so that no walk runs from it into the oldest.
        steps = (start + torch.arange(n_step, device=self.device)[:, None]) % self.capacity
        flags = data["terminated"][steps], data["played"][steps]
        returns, discount, taken = n_step_transitions(data["reward"][steps], *flags, gamma)
        following = (start + taken) % self.capacity

        def at(name: str, index: Tensor) -> Tensor:
            return data[name].index_select(_TRANSITION_AXIS[name], index)

        return Transitions(
            obs=at("obs", start),
            state=at("state", start),
            actions=at("actions", start),
            returns=returns,
            discount=discount,
            next_obs=at("obs", following),
            next_state=at("state", following),
            alive=at("alive", start) if "alive" in data else None,
            next_alive=at("alive", following) if "alive" in data else None,
        )

    def _make_room(self, like: Mapping[str, Tensor]) -> None:
        """Room for moments of these sizes, its memory taken as it fills; flags are False where nothing is yet."""
        for name, found in like.items():
            axis = _TRANSITION_AXIS[name]
            shape = [*found.shape[:axis], self.capacity, *found.shape[axis + 1 :]]
            self._data[name] = found.new_zeros(shape) if name in ("terminated", "played") else found.new_empty(shape)

    def state_dict(self) -> dict:
        """The filled part, and where the next moment goes."""
        kept = {name: _filled(value, _TRANSITION_AXIS[name], self.size) for name, value in self._data.items()}
        return {"size": self.size, "next": self._next, "data": kept}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.size, self._next, self._data, self._starts = int(state["size"]), int(state["next"]), {}, None
        self._make_room(state["data"])
        for name, value in state["data"].items():
            self._data[name].narrow(_TRANSITION_AXIS[name], 0, self.size).copy_(value)


# Where the axis of moments is.
_TRANSITION_AXIS = {"obs": 1, "state": 0, "actions": 1, "reward": 0, "terminated": 0, "played": 0, "alive": 1}


def _filled(room: Tensor, axis: int, size: int) -> Tensor:
    """What is written, as a tensor that holds nothing else: a view would be saved with all the room it is cut from."""
    return room if size == room.shape[axis] else room.narrow(axis, 0, size).clone()
