"""One side of a task with two: the other is played by opponents that do not learn.

Where two sides play against each other, returns summed over everybody mean little, and each side is hard to judge while the other one
learns. ``FixedOpponents`` makes a team environment of our side alone: the others become part of the world. They act at random, or by a
policy that was trained before, such as a policy file that ``k24.load_policy`` opened.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import action_shape, require_actions
from k24.errors import RunError, UsageError, unknown_name


class Opponents(Protocol):
    """Who can play the other side; ``k24.policy.Policy`` is one."""

    @property
    def spec(self) -> Any:
        """Has ``n_agents`` (those of the other side, or everybody's), ``obs_dim`` and ``n_actions``."""
        ...

    def act(self, obs: Tensor, state: Tensor | None = None, *, avail: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Takes ``obs`` ``[agents, E, D]``, what the call before returned (None at first) and the available actions.

        Returns:
            Actions ``[agents, E]``, or ``[agents, E, U]`` where they are continuous, and a state ``[agents, E, ...]`` or None.
        """
        ...


class FixedOpponents(TeamEnv):
    """Our side of ``env``, against opponents that do not learn.

    Observations and actions are as wide as those of all agents, so that what was trained on one side meets the same sizes when it plays
    against the other. The state is that of everybody.
    """

    def __init__(self, env: TeamEnv, side: str, opponents: Literal["random"] | Opponents = "random") -> None:
        """Takes over an environment; it is closed with this one.

        Args:
            env: All sides.
            side: Ours, one of ``env.sides``; all others are played.
            opponents: ``"random"``, among the available actions; or who acts for them, greedily or however it likes.

        Raises:
            UsageError: A task of one side, an unknown side, or opponents of other sizes.
        """
        if not isinstance(side, str) or not (isinstance(opponents, str) or hasattr(opponents, "act")):
            given = f"side={side} opponents={opponents}"
            raise UsageError(f"side and opponents go together: side=adversary opponents=random, or a policy file; got {given}")
        if env.sides is None:
            raise UsageError(f"side {side!r}: this task has one side only, so nobody can be an opponent: leave side and opponents out")
        if side not in env.sides:
            raise unknown_name("side", side, set(env.sides))
        self._env = env
        self.may_cut = env.may_cut
        self.n_envs, self.device, self.restarts = env.n_envs, env.device, env.restarts
        place = torch.arange(env.spec.n_agents, device=env.device)
        mine = torch.tensor([one == side for one in env.sides], device=env.device)
        self._ours, self._theirs = place[mine], place[~mine]
        self.spec = replace(env.spec, n_agents=len(self._ours))
        self._policy: Opponents | None = None
        self._told = self._theirs
        if not isinstance(opponents, str):
            if getattr(opponents.spec, "slots", None) == "given":
                raise UsageError(
                    "opponents: this policy must be told a slot for each agent, which nobody does here: use one that needs none"
                )
            self._policy = opponents
            self._told = place if opponents.spec.n_agents == len(place) else self._theirs
            _check_sizes(opponents.spec, env.spec, len(self._told))
        elif opponents != "random":
            raise unknown_name("kind of opponents", opponents, {"random"})
        self._random = torch.Generator(env.device)
        self._state: Tensor | None = None

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``; seeds random opponents, too."""
        self._now, self._state = self._env.reset(seed), None
        # Not by the seed itself, which would give them the numbers that the environment itself may draw.
        self._random.manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
        return _rows(self._now, self._ours)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        joint = actions.new_empty(self._env.spec.n_agents, *actions.shape[1:])
        joint[self._ours], joint[self._theirs] = actions, self._answer()
        step = self._env.step(joint)
        self._now, self.restarts = step.current, self._env.restarts
        ended = step.terminated | step.truncated
        if self._state is not None and bool(ended.any()):
            self._state = None if bool(ended.all()) else self._state.masked_fill(ended.view(1, -1, *[1] * (self._state.ndim - 2)), 0)
        after = _rows(step.after, self._ours)
        current = after if step.current is step.after else _rows(step.current, self._ours)
        return replace(step, after=after, current=current, reward=step.reward[self._ours])

    def close(self) -> None:
        """See ``TeamEnv.close``."""
        self._env.close()

    def render(self) -> Tensor | None:
        """See ``TeamEnv.render``; everybody is in the picture."""
        return self._env.render()

    @torch.no_grad()
    def _answer(self) -> Tensor:
        """What the opponents do now."""
        seen = _rows(self._now, self._told)
        if self._policy is None:
            return self._draw(seen)
        actions, self._state = self._policy.act(seen.obs, self._state, avail=seen.avail)
        shape, dtype = action_shape(replace(self.spec, n_agents=len(self._told)), self.n_envs)
        if actions.shape != shape or actions.dtype != dtype:
            raise RunError(f"opponents: actions must be {str(dtype)[6:]} {list(shape)}, got {str(actions.dtype)[6:]} {list(actions.shape)}")
        return (actions if self._told is self._theirs else actions[self._theirs]).to(self.device)

    def _draw(self, seen: Observation) -> Tensor:
        """Uniform actions among the available."""
        shape, n_actions = seen.obs.shape[:2], self.spec.n_actions
        if self.spec.continuous:
            return torch.rand(*shape, n_actions, generator=self._random, device=self.device) * 2 - 1
        if seen.avail is None:
            return torch.randint(n_actions, shape, generator=self._random, device=self.device)
        return torch.multinomial(seen.avail.float().flatten(0, 1), 1, generator=self._random).view(shape)


def _rows(seen: Observation, agents: Tensor) -> Observation:
    """What some of the agents see; the state is everybody's."""
    avail, alive = (None if each is None else each.index_select(0, agents) for each in (seen.avail, seen.alive))
    return Observation(seen.obs.index_select(0, agents), seen.state, avail, alive)


def _check_sizes(policy: Any, env: EnvSpec, n_agents: int) -> None:
    """Raises unless a policy of these sizes can play."""
    wanted = (n_agents, env.obs_dim, env.n_actions)
    found = (policy.n_agents, policy.obs_dim, policy.n_actions)
    if found != wanted:
        raise UsageError(
            f"opponents: a policy for (agents, observation, actions) = {found} can't play the other side, which has {wanted}: train one on "
            f"that side of the same task"
        )
