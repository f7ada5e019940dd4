"""Suite ``mpe2``: Farama's multi-agent particle environments, and any PettingZoo parallel environment.

MPE2 (the home of the MPE tasks that left PettingZoo) simulates one environment at a time in numpy, so it is slow. It is here because it is
the reference: five actions, and the rewards of the literature. Copies run one after the other in this process.

Two things about PettingZoo are easy to get wrong, and tests pin both:

* At the end of an episode ``env.agents`` is already empty when ``step`` returns. The last rewards and observations are in what
  ``step`` returned; whoever loops over ``env.agents`` loses them.
* The particle environments only ever end by their clock (unless told to stop on success), which is a truncation: the value of what follows
  is not 0.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.errors import RunError, UsageError, unknown_name

_MODULES = {
    "simple": ("simple_v3", "one agent goes to one landmark"),
    "simple_adversary": ("simple_adversary_v3", "two agents hide their landmark from an adversary (two sides)"),
    "simple_crypto": ("simple_crypto_v3", "Alice and Bob talk, Eve listens in (two sides)"),
    "simple_formation": ("simple_formation_v1", "agents stand on a circle round a landmark"),
    "simple_line": ("simple_line_v1", "agents stand on the line between two landmarks"),
    "simple_push": ("simple_push_v3", "an agent and an adversary push for one landmark (two sides)"),
    "simple_reference": ("simple_reference_v3", "two agents tell each other where to go"),
    "simple_speaker_listener": ("simple_speaker_listener_v4", "one speaks, the other goes where it is told"),
    "simple_spread": ("simple_spread_v3", "three agents cover three landmarks and do not collide"),
    "simple_tag": ("simple_tag_v3", "three chase one (two sides)"),
    "simple_world_comm": ("simple_world_comm_v3", "a leader tells chasers where the prey hides (two sides)"),
    "collect_treasure": ("collect_treasure_v1", "collectors fetch treasure, depositors take it in"),
}

TASKS = {f"mpe2/{name}": about for name, (_, about) in _MODULES.items()}


def env_seeds(seed: int, n_envs: int) -> list[int]:
    """Seeds of the single copies. Runs with neighbouring seeds share none, as they would with ``seed + i``."""
    return [int(one) for one in np.random.SeedSequence(seed).generate_state(n_envs)]


class ParallelEnv(TeamEnv):
    """Copies of a PettingZoo parallel environment with discrete actions.

    Agents that are gone see zeros, earn nothing and have only action 0. An episode ends when all are gone: truncated if any of the
    last ones to go was truncated and not terminated, else terminated. The state is all agents' observations side by side, without padding.
    """

    def __init__(
        self,
        make_one: Callable[[int], Any],
        n_envs: int,
        episode_limit: int,
        device: str | torch.device = "cpu",
        close_copies: bool = True,
    ) -> None:
        """Builds the copies.

        Args:
            make_one: Makes copy ``i``.
            n_envs: How many copies.
            episode_limit: The number of steps after which the environment itself truncates an episode.
            device: Where tensors live.
            close_copies: Whether ``close`` closes the copies too.

        Raises:
            UsageError: Actions that are not discrete, or observations that are not vectors.
        """
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._close_copies = close_copies
        self._envs = [make_one(index) for index in range(n_envs)]
        first = self._envs[0]
        self._names = list(first.possible_agents)
        for name in self._names:
            if type(first.action_space(name)).__name__ != "Discrete":
                raise UsageError(f"{first}: agent {name!r} must have discrete actions, got {first.action_space(name)}")
            if len(first.observation_space(name).shape or ()) != 1:
                raise UsageError(f"{first}: agent {name!r} must observe a vector, got {first.observation_space(name)}")
        self._sizes = [first.observation_space(name).shape[0] for name in self._names]
        self._counts = [int(first.action_space(name).n) for name in self._names]
        self._starts = [int(first.action_space(name).start) for name in self._names]
        self.spec = EnvSpec(len(self._names), max(self._sizes), sum(self._sizes), max(self._counts), episode_limit)
        # What each agent may do while it is there, and when it is gone, [A, U].
        self._may = np.arange(max(self._counts)) < np.array(self._counts)[:, None]
        self._gone = np.broadcast_to(np.arange(max(self._counts)) == 0, self._may.shape)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        return self._observe([env.reset(seed=one)[0] for env, one in zip(self._envs, env_seeds(seed, self.n_envs), strict=True)])

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        spec = self.spec
        require_actions(self, actions)
        chosen = actions.T.tolist()
        reward = np.zeros((spec.n_agents, self.n_envs), dtype=np.float32)
        terminated = np.zeros(self.n_envs, dtype=bool)
        truncated = np.zeros(self.n_envs, dtype=bool)
        seen, onward = [], []
        for e, env in enumerate(self._envs):
            present = set(env.agents)
            joint = {}
            for name, action, count, start in zip(self._names, chosen[e], self._counts, self._starts, strict=True):
                if name in present:
                    if action >= count:
                        raise RunError(f"step: agent {name!r} has actions 0 to {count - 1}, got {action}")
                    joint[name] = action + start
            observations, rewards, terminations, truncations, _ = env.step(joint)
            # By name, not by `env.agents`: that list is already empty at the end of an episode.
            reward[:, e] = [rewards.get(name, 0.0) for name in self._names]
            seen.append(observations)
            if not env.agents or all(terminations.get(name) or truncations.get(name) for name in present):
                truncated[e] = any(truncations.get(name) and not terminations.get(name) for name in present)
                terminated[e] = not truncated[e]
                observations = env.reset()[0]
            onward.append(observations)
        after = self._observe(seen)
        current = self._observe(onward) if (terminated | truncated).any() else after
        flags = (torch.from_numpy(flag).to(self.device) for flag in (terminated, truncated))
        return Step(after, current, torch.from_numpy(reward).to(self.device), *flags)

    def render(self) -> Tensor | None:
        """The picture of copy 0, if it was made with ``render_mode="rgb_array"``."""
        if getattr(self._envs[0], "render_mode", None) != "rgb_array":
            return None
        return torch.from_numpy(np.array(self._envs[0].render(), dtype=np.uint8))

    def close(self) -> None:
        """See ``TeamEnv.close``."""
        while self._envs:
            env = self._envs.pop()
            if self._close_copies:
                env.close()

    def _observe(self, seen: list[dict[str, np.ndarray]]) -> Observation:
        """Pads and stacks what each copy's agents see."""
        spec = self.spec
        obs = np.zeros((spec.n_agents, self.n_envs, spec.obs_dim), dtype=np.float32)
        present = np.ones((spec.n_agents, self.n_envs), dtype=bool)
        for e, observations in enumerate(seen):
            for a, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
                if name in observations:
                    obs[a, e, :size] = observations[name]
                else:
                    present[a, e] = False
        state = np.concatenate([obs[a, :, :size] for a, size in enumerate(self._sizes)], axis=-1)
        # Always given: whether agents will vanish is not known beforehand.
        avail = np.where(present[..., None], self._may[:, None], self._gone[:, None])
        return Observation(*(torch.from_numpy(one).to(self.device) for one in (obs, state, avail)))


def make(task: str, n_envs: int, device: str | torch.device = "cpu", max_steps: int = 25, **kwargs: object) -> ParallelEnv:
    """Builds one task of ``TASKS``.

    Args:
        task: A key of ``TASKS``.
        n_envs: Copies.
        device: Where tensors live.
        max_steps: Episode limit.
        **kwargs: Options of the environment, e.g. ``N`` (agents of simple_spread) or ``local_ratio``.

    Raises:
        UsageError: An option that the environment doesn't know.
    """
    # pygame greets on stdout, which belongs to the command line's own output.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    module = importlib.import_module(f"mpe2.{_MODULES[task.removeprefix('mpe2/')][0]}")
    fixed = {"max_cycles", "render_mode", "continuous_actions"}
    known = set(inspect.signature(module.raw_env).parameters) - fixed
    for name in kwargs:
        if name not in known:
            raise unknown_name(f"option of {task}", name, known | {"max_steps"})

    def make_one(index: int) -> Any:
        # Only copy 0 is ever drawn.
        return module.parallel_env(max_cycles=max_steps, render_mode="rgb_array" if index == 0 else None, **kwargs)

    # Closing one of them quits pygame for the whole process, and no other could be drawn any more. They hold no window.
    return ParallelEnv(make_one, n_envs, max_steps, device, close_copies=False)
