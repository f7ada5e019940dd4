"""Playing episodes: an actor that remembers its recurrent state, and a collector of whole episodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k24.envs.base import Observation, TeamEnv
from k24.errors import LAST_GOOD, RunError
from k24.learners.replay import Episodes
from k24.nets import AgentNet
from k24.sparse.slots import SlotWeights


class ValueActor:
    """Epsilon-greedy actions from action values.

    Args:
        net: The net to run.
        weights: Effective weights, made once.
        epsilon: Chance of a random action instead, per agent and step.
        generator: Source of the random numbers; needed if epsilon is above 0.
    """

    def __init__(
        self, net: AgentNet, weights: Sequence[SlotWeights], epsilon: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        self._net, self._weights, self._epsilon, self._generator = net, weights, epsilon, generator
        self._h: Tensor | None = None

    def reset(self, rows: int) -> None:
        """Forgets: a new episode begins in every row."""
        self._h = self._net.initial_state(rows)

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``."""
        assert self._h is not None
        q, self._h = self._net(self._weights, observation.obs[:, None], self._h)
        q = q[:, 0]
        if observation.avail is not None:
            q = q.masked_fill(~observation.avail, -torch.inf)
        actions = q.argmax(-1)
        if self._epsilon > 0:
            explore = torch.rand(actions.shape, generator=self._generator, device=q.device) < self._epsilon
            actions = torch.where(explore, random_actions(observation, q.shape[-1], self._generator), actions)
        return actions


class RandomActor:
    """Uniform actions among those available.

    Args:
        n_actions: U.
        generator: Source of the random numbers.
    """

    def __init__(self, n_actions: int, generator: torch.Generator) -> None:
        self._n_actions, self._generator = n_actions, generator

    def reset(self, rows: int) -> None:
        """Nothing to forget."""

    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``."""
        return random_actions(observation, self._n_actions, self._generator)


def random_actions(observation: Observation, n_actions: int, generator: torch.Generator | None) -> Tensor:
    """Uniform actions among those available, int64 ``[A, E]``."""
    shape, device = observation.obs.shape[:2], observation.obs.device
    if observation.avail is None:
        return torch.randint(0, n_actions, shape, generator=generator, device=device)
    weights = observation.avail.float().flatten(0, 1)
    return torch.multinomial(weights, 1, generator=generator).view(shape)


def collect_episodes(env: TeamEnv, actor: ValueActor | RandomActor, seed: int) -> Episodes:
    """Plays one episode in every parallel environment.

    Every round starts from ``env.reset(seed)``. That makes a round a function of its seed and of the policy, and a
    training run that is resumed between two rounds the same run bit for bit, whatever state the environment's own
    simulator keeps.

    Args:
        env: The environments.
        actor: Who acts.
        seed: Seed of this round.

    Returns:
        ``env.n_envs`` episodes.

    Raises:
        RunError: The environment gave NaN or infinity.
    """
    spec = env.spec
    now = env.reset(seed)
    actor.reset(env.n_envs)
    batch = Episodes.empty(spec, env.n_envs, env.device, now.avail is not None)
    _record(batch, now, 0)
    running = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    for t in range(spec.episode_limit):
        actions = actor(now)
        step = env.step(actions)
        batch.actions[:, t], batch.reward[:, t] = actions, step.reward
        batch.terminated[t] = step.terminated & running
        batch.valid[t] = running
        # What an action led to is recorded before the reset; rows whose episode is over play on, and what they see is not valid.
        _record(batch, step.after, t + 1)
        now = step.current
        running = running & ~(step.terminated | step.truncated)
        if not bool(running.any()):
            break
    _check_finite(batch)
    return batch


def _record(batch: Episodes, seen: Observation, t: int) -> None:
    batch.obs[:, t], batch.state[t] = seen.obs, seen.state
    if batch.avail is not None and seen.avail is not None:
        batch.avail[:, t] = seen.avail


def _check_finite(batch: Episodes) -> None:
    for name in ("obs", "state", "reward"):
        values = getattr(batch, name)
        if not bool(torch.isfinite(values).all()):
            raise RunError(f"the environment gave a {name} that is NaN or infinite: check it with 'k24 check-env'; {LAST_GOOD}")
