"""Does an environment keep the contract of ``k24.envs.base``?

Environments fail quietly: a last observation overwritten by the next episode's first, a time limit reported as an end, a lost last
reward, a seed that is not heeded. Nothing crashes then, the learner just learns less. ``check_env`` plays a few episodes and
looks for each of these by name. It can't see everything: it knows neither the game's rules nor which reward was due.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.errors import RunError

_LONGEST_PLAY = 250


def require_actions(env: TeamEnv, actions: Tensor) -> None:
    """Raises unless ``actions`` is a joint action of this team; adapters call it first thing in ``step``.

    Args:
        env: The environment.
        actions: What was given to ``step``; expected int64 ``[A, E]``, each from 0 to U - 1, or float32 ``[A, E, U]`` in [-1, 1] where the
            environment is continuous. Values are looked at on CPU only, for elsewhere that would wait for the device.

    Raises:
        RunError: Another shape, type or range.
    """
    spec = env.spec
    shape, dtype = action_shape(spec, env.n_envs)
    if actions.shape != shape or actions.dtype != dtype:
        raise RunError(f"step: actions must be {str(dtype)[6:]} {list(shape)}, got {_kind(actions)}")
    if actions.device.type == "cpu":
        low, high = (bound.item() for bound in torch.aminmax(actions))
        least, most = (-1, 1) if spec.continuous else (0, spec.n_actions - 1)
        if not (low >= least and high <= most):  # NaN compares false
            raise RunError(f"step: actions must be from {least} to {most}, got {low:g} to {high:g}")


def action_shape(spec: EnvSpec, n_envs: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a joint action of ``n_envs`` environments."""
    if spec.continuous:
        return (spec.n_agents, n_envs, spec.n_actions), torch.float32
    return (spec.n_agents, n_envs), torch.int64


def require_spec(env: TeamEnv) -> None:
    """Raises ``RunError`` unless what an environment says of itself makes sense; an ``EnvSpec`` always does."""
    spec, n_envs, device = (getattr(env, name, None) for name in ("spec", "n_envs", "device"))
    if not isinstance(spec, EnvSpec):
        _fail(env, "spec", "an EnvSpec", type(spec).__name__)
    if not isinstance(n_envs, int) or n_envs < 1:
        _fail(env, "n_envs", "a whole number of at least 1", repr(n_envs))
    if env.sides is not None and (not isinstance(env.sides, tuple | list) or len(env.sides) != spec.n_agents):
        _fail(env, "sides", f"one for each of {spec.n_agents} agents", repr(env.sides))
    if not isinstance(device, torch.device):
        _fail(env, "device", "a torch.device", repr(device))


def require_observation(env: TeamEnv, method: str, name: str, observation: Observation, values: bool = True) -> None:
    """Raises ``RunError`` unless an observation has the kinds, shapes and types that the contract wants.

    Args:
        env: Whose it is.
        method: Which of its methods returned it, for the error.
        name: What it is there, for the error.
        observation: What came.
        values: Whether to look at values, too: all must be finite, and every agent must have something to do. Waits for the device.
    """
    spec = env.spec
    if not isinstance(observation, Observation):
        _fail(env, method, f"{name} to be an Observation", type(observation).__name__)
    agents = (spec.n_agents, env.n_envs)
    _check_tensor(env, method, f"{name}.obs", observation.obs, (*agents, spec.obs_dim), torch.float32, values)
    _check_tensor(env, method, f"{name}.state", observation.state, (env.n_envs, spec.state_dim), torch.float32, values)
    if spec.continuous and observation.avail is not None:
        _fail(env, method, f"{name}.avail to be None where actions are continuous", _kind(observation.avail))
    if observation.alive is not None:
        _check_tensor(env, method, f"{name}.alive", observation.alive, agents, torch.bool)
    if observation.avail is not None:
        _check_tensor(env, method, f"{name}.avail", observation.avail, (*agents, spec.n_actions), torch.bool)
        stuck = (~observation.avail.any(dim=-1)).nonzero().tolist() if values else []
        if stuck:
            got = f"none for agent {stuck[0][0]} in environment {stuck[0][1]}"
            _fail(env, method, f"{name}.avail with at least one action for each agent", got)


def require_step(env: TeamEnv, step: Step, values: bool = True) -> None:
    """Raises ``RunError`` unless a step has the kinds, shapes and types that the contract wants; see ``require_observation``."""
    if not isinstance(step, Step):
        _fail(env, "step", "a Step", type(step).__name__)
    require_observation(env, "step", "after", step.after, values)
    if step.current is not step.after:
        require_observation(env, "step", "current", step.current, values)
    _check_tensor(env, "step", "reward", step.reward, (env.spec.n_agents, env.n_envs), torch.float32, values)
    _check_tensor(env, "step", "terminated", step.terminated, (env.n_envs,), torch.bool)
    _check_tensor(env, "step", "truncated", step.truncated, (env.n_envs,), torch.bool)
    if step.won is not None:
        _check_tensor(env, "step", "won", step.won, (env.n_envs,), torch.bool)


class Given:
    """Remembers which of the optional parts an environment gave at first; it must give them always or never."""

    def __init__(self) -> None:
        self._given: dict[str, bool] = {}

    def require(self, env: TeamEnv, method: str, *parts: Observation | Step) -> None:
        """Raises ``RunError`` where a part has become another habit."""
        for part in parts:
            for name in ("won",) if isinstance(part, Step) else ("avail", "alive"):
                given = getattr(part, name) is not None
                if self._given.setdefault(name, given) is not given:
                    _fail(env, method, f"{name} given always or never", "both")


def check_env(env: TeamEnv | Callable[[], TeamEnv], seed: int = 0, steps: int | None = None) -> list[str]:
    """Checks that an environment keeps the contract, by playing it at random.

    The environment is reset several times and left in the middle of an episode. Use at least two parallel environments: with one, a batch
    that repeats itself can't be seen.

    Args:
        env: An environment, or a function that makes one. With a function, two are made and must not influence each other, and
            they are closed at the end.
        seed: Seed of the episodes and of the random actions.
        steps: Steps per play; three plays are made, four with a function. By default one and a half episodes, at most 250.

    Returns:
        The names of the checks that passed. Those that need what did not come up (say, an end of an episode) are left out.

    Raises:
        RunError: The first breach: the method, what was expected, what came.
    """
    make = None if isinstance(env, TeamEnv) else env
    with _globals_kept(), ExitStack() as stack:
        before = _globals(None)
        subject = env if make is None else make()
        if not isinstance(subject, TeamEnv):
            raise RunError(f"check_env: expected a TeamEnv or a function that makes one, got {type(subject).__name__}")
        if make is not None:
            _same_globals(subject, "__init__", before)
        require_spec(subject)
        passed = ["spec"]
        # Into the middle of the second episode: the next play then starts from a world that a reset must really clear.
        limit = subject.spec.episode_limit
        steps = steps or min(limit + limit // 2 + 1, _LONGEST_PLAY)
        play = _play(subject, seed, steps)
        passed += ["shapes and types", "finite values", "available actions", "global generators undisturbed", "returned tensors stay"]
        passed += _check_ends(subject, play)
        passed += _check_seeds(subject, play, seed)
        if make is not None:
            # Closed last: there are environments that close something which all of their kind draw with.
            other = stack.enter_context(closing(make()))
            passed += _check_independence(subject, other, play, seed)
        passed += _check_render(subject)
        if make is not None:
            subject.close()
            subject.close()
            passed.append("close twice")
    return passed


@dataclass
class _Play:
    """What was seen in one rollout, copied at the time."""

    first: Observation
    actions: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def _play(env: TeamEnv, seed: int, steps: int) -> _Play:
    """Plays at random from a fresh reset, and checks everything that shows in a single step."""
    chooser = torch.Generator().manual_seed(seed)
    before = _globals(env)
    obs = env.reset(seed)
    _same_globals(env, "reset", before)
    _check_observation(env, "reset", "the result", obs)
    given = Given()
    given.require(env, "reset", obs)
    play = _Play(_copy(obs))
    handed: list[tuple[object, object]] = [(obs, play.first)]
    for _ in range(steps):
        actions = _choose(env, obs, chooser)
        before = _globals(env)
        step = env.step(actions.clone())
        _same_globals(env, "step", before)
        _check_step(env, step)
        given.require(env, "step", step.after, step.current, step)
        play.actions.append(actions)
        play.steps.append(_copy(step))
        handed.append((step, play.steps[-1]))
        obs = step.current
    for index, (original, copy) in enumerate(handed):
        if not _same(original, copy):
            method = "step" if index else "reset"
            got = f"those of call {index} overwritten by later steps; return copies"
            _fail(env, method, "tensors that stay as they were returned", got)
    return play


def _choose(env: TeamEnv, obs: Observation, chooser: torch.Generator) -> Tensor:
    """Random available actions."""
    spec = env.spec
    if spec.continuous:
        return torch.rand(spec.n_agents, env.n_envs, spec.n_actions, generator=chooser).mul_(2).sub_(1).to(env.device)
    weight = torch.ones(spec.n_agents, env.n_envs, spec.n_actions) if obs.avail is None else obs.avail.cpu().float()
    return torch.multinomial(weight.flatten(0, 1), 1, generator=chooser).view(spec.n_agents, env.n_envs).to(env.device)


def _check_observation(env: TeamEnv, method: str, name: str, observation: Observation) -> None:
    """All of ``require_observation``, and what the features may say."""
    require_observation(env, method, name, observation)
    if observation.alive is not None:
        haunting = ((observation.obs != 0).any(dim=-1) & ~observation.alive).nonzero().tolist()
        if haunting:
            got = f"others for agent {haunting[0][0]} in environment {haunting[0][1]}"
            _fail(env, method, f"{name}.obs to be zeros for agents that are not alive", got)
    types = env.spec.unit_types
    if types is not None:
        bits = observation.obs[..., slice(*types)]
        mixed = (((bits != 0) & (bits != 1)).any(dim=-1) | (bits.sum(dim=-1) > 1)).nonzero().tolist()
        if mixed:
            got = f"{bits[tuple(mixed[0])].tolist()} for agent {mixed[0][0]} in environment {mixed[0][1]}"
            _fail(env, method, f"features {list(types)} of {name}.obs to be one-hot, or zeros for a dead unit", got)


def _check_step(env: TeamEnv, step: Step) -> None:
    """All of ``require_step``, and what shows in a single step beyond it."""
    require_step(env, step)
    _check_observation(env, "step", "after", step.after)
    _check_observation(env, "step", "current", step.current)
    both = (step.terminated & step.truncated).nonzero().flatten().tolist()
    if both:
        _fail(env, "step", "terminated and truncated never both", f"both in environment {both[0]}; what ended of itself was not cut")
    ended = step.terminated | step.truncated
    if step.won is not None:
        early = (step.won & ~ended).nonzero().flatten().tolist()
        if early:
            _fail(env, "step", "won only where an episode ended", f"it in environment {early[0]}, whose episode goes on")
    if not ended.any() and step.after is not step.current:
        _fail(env, "step", "after and current to be one object where no episode ended", "two")
    for name in ("obs", "state", "avail", "alive"):
        after, current = getattr(step.after, name), getattr(step.current, name)
        if after is not None and current is not None:
            moved = _differs(after, current, batch_dim=0 if name == "state" else 1) & ~ended
            if moved.any():
                where = int(moved.nonzero()[0])
                _fail(env, "step", f"current.{name} equal to after.{name} where the episode goes on", f"another one in environment {where}")


def _check_tensor(
    env: TeamEnv, method: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, values: bool = False
) -> None:
    """Shape, type and device of one tensor, and finite values where ``values``."""
    good = isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype == dtype and value.device.type == env.device.type
    if not good:
        _fail(env, method, f"{name} to be {str(dtype)[6:]} {list(shape)} on {env.device}", _kind(value))
    if values and not torch.isfinite(value).all():
        _fail(env, method, f"{name} to be finite", f"{value[~torch.isfinite(value)][0].item()}")


def _check_ends(env: TeamEnv, play: _Play) -> list[str]:
    """How episodes end, and how the next ones begin."""
    limit = env.spec.episode_limit
    clock = torch.zeros(env.n_envs, dtype=torch.int64, device=env.device)
    restarted_blindly, restarts = 0, 0
    paid_before, paid_last, gained, n_cut = True, False, False, 0
    for step in play.steps:
        clock += 1
        ended = step.terminated | step.truncated
        late = ((clock >= limit) & ~ended).nonzero().flatten().tolist()
        if late:
            got = f"environment {late[0]} goes on after {int(clock[late[0]])}"
            _fail(env, "step", f"every episode to end within episode_limit (={limit}) steps", got)
        early = [] if env.may_cut else (step.truncated & (clock < limit)).nonzero().flatten().tolist()
        if early:
            got = f"in environment {early[0]} after {int(clock[early[0]])} steps of its episode; clock not reset, or did the task end?"
            _fail(env, "step", f"truncated at the episode_limit (={limit}) only", got)
        same = ~(_differs(step.after.obs, step.current.obs, 1) | _differs(step.after.state, step.current.state, 0))
        restarts += int(ended.sum())
        restarted_blindly += int((same & ended).sum())
        paid = (step.reward != 0).any(dim=0)
        paid_before &= bool(paid[~ended].all())
        paid_last |= bool(paid[ended].any())
        gained |= bool((step.reward[:, ~ended] > 0).any())
        n_cut += int(step.truncated.sum())
        clock[ended] = 0
    passed = ["episode_limit", "terminated or truncated"]
    if restarts and _vary(play.first):
        if restarted_blindly == restarts:
            got = "after equal to current at each end: either the last observation is lost, or nothing was reset"
            _fail(env, "step", "after to hold the last observation of the old episode, and current the first of the new one", got)
        passed.append("auto-reset")
    # Where every step costs something, the one that reaches the goal may well be free; and where standing is paid, falling is not.
    if restarts and restarts < len(play.steps) * env.n_envs and paid_before and (paid_last or (gained and n_cut)):
        if not paid_last:
            _fail(env, "step", "the reward of an episode's last step", "0 at each last step, though every other step is paid")
        passed.append("last reward")
    return passed


def _check_seeds(env: TeamEnv, play: _Play, seed: int) -> list[str]:
    """The same seed repeats everything, whatever the global generators hold; another one doesn't."""
    _scramble_globals(seed + 1)
    again = _play(env, seed, len(play.steps))
    if not _same(play.first, again.first):
        got = "another; does it draw from a global generator, or keep something?"
        _fail(env, "reset", f"the same first observation for the same seed (={seed})", got)
    for index, (one, repeated) in enumerate(zip(play.steps, again.steps, strict=True)):
        if not _same(one, repeated):
            got = f"another result at step {index + 1}; does it draw from a global generator, or keep something over a reset?"
            _fail(env, "step", f"the same episodes for the same seed (={seed}) and actions", got)
    other = _play(env, seed + 1, len(play.steps))
    if not _same(play.first, other.first):
        # Where there are few starts, copies may meet by chance; not time and again.
        if env.n_envs > 1 and not any(_vary(first) for first in (play.first, *(env.reset(seed + k) for k in range(1, 6)))):
            got = "the same start in all of them"
            _fail(env, "reset", "parallel environments that start differently, as they do with another seed", got)
        return ["same seed, same episodes", "other seed, other episodes"]
    if _vary(play.first):
        _fail(env, "reset", f"another start for another seed (={seed + 1})", f"the one of seed {seed}; the seed is not heeded")
    return ["same seed, same episodes"]


def _check_independence(env: TeamEnv, other: TeamEnv, play: _Play, seed: int) -> list[str]:
    """Two environments of one process do not touch each other."""
    chooser = torch.Generator().manual_seed(seed + 2)
    obs = other.reset(seed + 2)
    same = _same(play.first, env.reset(seed))
    for actions, expected in zip(play.actions, play.steps, strict=True):
        obs = other.step(_choose(other, obs, chooser)).current
        same = same and _same(expected, env.step(actions.clone()))
    if not same:
        got = "others; do the two share a generator, or does a reset keep something?"
        _fail(env, "step", "the same episodes with a second environment beside it", got)
    return ["two beside each other"]


def _check_render(env: TeamEnv) -> list[str]:
    """A picture, or None."""
    picture = env.render()
    if picture is None:
        return []
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        _fail(env, "render", "uint8 [height, width, 3] or None", _kind(picture))
    return ["render"]


def _vary(first: Observation) -> bool:
    """Whether first observations differ between the environments of the batch."""
    obs, state = first.obs, first.state
    return not (torch.equal(obs, obs[:, :1].expand_as(obs)) and torch.equal(state, state[:1].expand_as(state)))


def _differs(one: Tensor, other: Tensor, batch_dim: int) -> Tensor:
    """Which environments have unequal entries, bool ``[E]``."""
    return (one != other).transpose(0, batch_dim).flatten(1).any(dim=1)


def _same(one: Any, other: Any) -> bool:
    """Whether two Observations or Steps are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if one is None:
        return other is None
    return all(_same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))


def _copy(one: Any) -> Any:
    """A copy of an Observation or a Step that later calls can't reach."""
    if isinstance(one, Tensor):
        return one.clone()
    return None if one is None else type(one)(*(_copy(getattr(one, part.name)) for part in fields(one)))


def _kind(value: object) -> str:
    """Type, shape and device, for an error."""
    return f"{str(value.dtype)[6:]} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _fail(env: TeamEnv, method: str, expected: str, got: str) -> NoReturn:
    # A wrapper is called by what it wraps, which is what a user can change.
    raise RunError(f"{getattr(env, 'called', type(env).__name__)}.{method}: expected {expected}, got {got}")


def _globals(env: TeamEnv | None) -> dict[str, object]:
    """The state of every global generator the environment could touch."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": random.getstate(),
    }
    if env is not None and env.device.type == "cuda":
        state["torch.cuda"] = torch.cuda.get_rng_state(env.device).numpy().tobytes()
    return state


def _same_globals(env: TeamEnv, method: str, before: dict[str, object]) -> None:
    now = _globals(env)
    touched = [name for name in before if now[name] != before[name]]
    if touched:
        _fail(env, method, "global generators undisturbed", f"that of {touched[0]} changed")


def _scramble_globals(seed: int) -> None:
    """Sets the global generators to something else."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def _globals_kept() -> Iterator[None]:
    """Whatever happens inside, the caller's generators are as they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
