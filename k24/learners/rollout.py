"""Playing episodes: an actor that remembers its recurrent state, and a collector of whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k24.actions import KINDS, ActionKind, StochasticKind
from k24.envs.base import Observation, Step, TeamEnv
from k24.errors import LAST_GOOD, RAISED, RunError, describe
from k24.learners.replay import Episodes
from k24.nets import AgentNet
from k24.sparse.slots import SlotRule, SlotWeights

# What a net's outputs [A, E, K] are made into: actions, int64 [A, E] or float32 [A, E, U].
Choice = Callable[[Tensor, Observation], Tensor]


class NetActor:
    """A net that acts and remembers its recurrent state.

    Args:
        net: The net to run.
        weights: Effective weights, made once.
        choose: From outputs ``[A, E, K]`` and what was observed to actions; the largest output of the available ones when None.
        rule: Which slot each row uses; the agent's index when None.
        redraw: What to act with from each reset on, in place of ``weights``.
    """

    def __init__(
        self,
        net: AgentNet,
        weights: Sequence[SlotWeights],
        choose: Choice | None = None,
        rule: SlotRule | None = None,
        redraw: Callable[[], Sequence[SlotWeights]] | None = None,
    ) -> None:
        self._net, self._weights, self._choose, self._rule = net, weights, choose or likeliest(KINDS["discrete"]), rule
        self._redraw = redraw
        self._h: Tensor | None = None

    def reset(self, rows: int) -> None:
        """Forgets: a new episode begins in every row."""
        if self._redraw is not None:
            self._weights = self._redraw()
        self._h = self._net.initial_state(rows)

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``, or float32 ``[A, E, U]``."""
        assert self._h is not None
        obs, alive = observation.obs[:, None], observation.alive
        slots, alive = slots_of(self._rule, obs, None if alive is None else alive[:, None])
        outputs, self._h = self._net(self._weights, obs, self._h, slots=slots, alive=alive)
        return self._choose(outputs[:, 0], observation)


def likeliest(kind: ActionKind) -> Choice:
    """The best or likeliest action."""
    return lambda outputs, observation: kind.mode(outputs, observation.avail)


def drawn(kind: StochasticKind, generator: torch.Generator) -> Choice:
    """An action drawn from the policy."""
    return lambda outputs, observation: kind.sample(outputs, observation.avail, generator)


def epsilon_greedy(epsilon: float, generator: torch.Generator) -> Choice:
    """The action of largest value, or with chance ``epsilon`` per agent and step any of the available ones."""

    def choose(outputs: Tensor, observation: Observation) -> Tensor:
        actions = KINDS["discrete"].mode(outputs, observation.avail)
        explore = torch.rand(actions.shape, generator=generator, device=outputs.device) < epsilon
        return torch.where(explore, random_actions(observation, outputs.shape[-1], generator), actions)

    return choose


def noisy(kind: ActionKind, std: float, generator: torch.Generator) -> Choice:
    """The action with Gaussian noise on it, kept in [-1, 1]."""

    def choose(outputs: Tensor, observation: Observation) -> Tensor:
        actions = kind.mode(outputs)
        return (actions + std * torch.empty_like(actions).normal_(generator=generator)).clamp_(-1, 1)

    return choose


class RandomActor:
    """Uniform actions, of discrete ones among those available.

    Args:
        n_actions: U.
        generator: Source of the random numbers.
        continuous: Whether actions are U numbers in [-1, 1].
    """

    def __init__(self, n_actions: int, generator: torch.Generator, continuous: bool = False) -> None:
        self._n_actions, self._generator, self._continuous = n_actions, generator, continuous

    def reset(self, rows: int) -> None:
        """Nothing to forget."""

    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``, or float32 ``[A, E, U]``."""
        if self._continuous:
            shape, device = (*observation.obs.shape[:2], self._n_actions), observation.obs.device
            return torch.rand(shape, generator=self._generator, device=device).mul_(2).sub_(1)
        return random_actions(observation, self._n_actions, self._generator)


def slots_of(rule: SlotRule | None, obs: Tensor, alive: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What :class:`~k24.nets.AgentNet` is told of whose weights each row uses, and which rows count.

    Args:
        rule: Which slot each row uses; the agent's index when None.
        obs: ``[A, T, N, D]``.
        alive: bool ``[A, T, N]``, or None for all.

    Returns:
        ``slots`` and ``alive``, one of them None.

    Raises:
        RunError: The rule gave something else than one slot per row.
    """
    if rule is None or rule.of is None:
        return None, alive
    try:
        slots = rule.of(obs)
    except RAISED as error:
        raise RunError(f"the slot rule raised {describe(error)}") from error
    if not isinstance(slots, Tensor) or slots.shape != obs.shape[:-1] or slots.dtype != torch.int64:
        got = f"{slots.dtype} {list(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
        raise RunError(f"the slot rule must return int64 {list(obs.shape[:-1])} for observations {list(obs.shape)}, got {got}")
    slots = slots.clamp_min(-1)
    return (slots if alive is None else slots.where(alive, -1)), None


def random_actions(observation: Observation, n_actions: int, generator: torch.Generator | None) -> Tensor:
    """Uniform actions among those available, int64 ``[A, E]``."""
    shape, device = observation.obs.shape[:2], observation.obs.device
    if observation.avail is None:
        return torch.randint(0, n_actions, shape, generator=generator, device=device)
    weights = observation.avail.float().flatten(0, 1)
    return torch.multinomial(weights, 1, generator=generator).view(shape)


def collect_episodes(env: TeamEnv, actor: NetActor | RandomActor, seed: int) -> Episodes:
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
    _check_shapes(env, now)
    actor.reset(env.n_envs)
    batch = Episodes.empty(spec, env.n_envs, env.device, now.avail is not None, now.alive is not None)
    _record(batch, now, 0)
    running = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    for t in range(spec.episode_limit):
        actions = actor(now)
        step = env.step(actions)
        if t == 0:
            _check_step(env, step)
            batch.won = None if step.won is None else torch.zeros_like(running)
        batch.actions[:, t], batch.reward[:, t] = actions, step.reward
        batch.terminated[t] = step.terminated & running
        batch.valid[t] = running
        if batch.won is not None and step.won is not None:
            batch.won |= step.won & running
        # What an action led to is recorded before the reset; rows whose episode is over play on, and what they see is not valid.
        _record(batch, step.after, t + 1)
        now = step.current
        running = running & ~(step.terminated | step.truncated)
        if not bool(running.any()):
            break
    _check_finite(batch)
    return batch


def _check_shapes(env: TeamEnv, seen: Observation) -> None:
    """Says what is wrong with an environment before it is an error deep inside the net."""
    spec, e = env.spec, env.n_envs
    wanted: dict[str, tuple[int, ...]] = {
        "obs": (spec.n_agents, e, spec.obs_dim),
        "state": (e, spec.state_dim),
        "avail": (spec.n_agents, e, spec.n_actions),
        "alive": (spec.n_agents, e),
    }
    for name, shape in wanted.items():
        _check_shape(name, getattr(seen, name), shape)


def _check_step(env: TeamEnv, step: Step) -> None:
    _check_shapes(env, step.after)
    _check_shapes(env, step.current)
    _check_shape("reward", step.reward, (env.spec.n_agents, env.n_envs))
    for name in ("terminated", "truncated", "won"):
        _check_shape(name, getattr(step, name), (env.n_envs,))
    for name, value in (("obs", step.after.obs), ("state", step.after.state), ("reward", step.reward)):
        _require_finite(name, value)


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise RunError(f"the environment gave {name} {list(value.shape)}, its spec says {list(shape)}: check it with 'k24 check-env'")


def _require_finite(name: str, values: Tensor) -> None:
    # A sum is quicker than a look at each value, and finite unless one of them is not (or all together are too large).
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise RunError(f"the environment gave a {name} that is NaN or infinite: check it with 'k24 check-env'; {LAST_GOOD}")


def _record(batch: Episodes, seen: Observation, t: int) -> None:
    batch.obs[:, t], batch.state[t] = seen.obs, seen.state
    if batch.avail is not None and seen.avail is not None:
        batch.avail[:, t] = seen.avail
    if batch.alive is not None and seen.alive is not None:
        batch.alive[:, t] = seen.alive


def _check_finite(batch: Episodes) -> None:
    for name in ("obs", "state", "reward"):
        _require_finite(name, getattr(batch, name))
