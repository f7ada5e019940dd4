"""Speed of environments: with a net that acts, alone, and the raw simulator beside them.

The raw simulator is stepped by the plainest loop that its own users would write, with random actions made beforehand. The ratio says what
our protocol, the net and its memory of the episode cost.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import Positional

from k24.bench.timing import race
from k24.config import TrainConfig
from k24.envs import TeamEnv
from k24.errors import UsageError
from k24.evaluate import build_env, build_learner
from k24.learners import NetActor, PPOConfig, RandomActor, ValueConfig

# Steps of the whole batch in one sample.
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class BenchEnv:
    """Times environment steps, acting included."""

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")] = "mpe/simple_spread"
    """Task, as suite/name."""
    envs: int = 64
    """Parallel environments."""
    sharing: str = "k24"
    """Sharing scheme of the net that acts."""
    slots: str = "agent"
    """Whose masks a row uses: agent or unit_type."""
    hidden: int = 64
    """Hidden units of the net that acts."""
    threads: int = 1
    """Threads of torch."""
    workers: int = 0
    """Processes for simulators that step one environment at a time; 0 for none but this one."""
    seconds: float = 12.0
    """How long to measure, about."""
    raw: bool = True
    """Also time the raw simulator."""
    env_args: tuple[str, ...] = ()
    """Arguments of the task, each as name=value."""


def bench_env(options: BenchEnv) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        options: What to time.

    Returns:
        Environment steps per second: ``env_steps_per_s`` with the net acting, ``random_steps_per_s`` with random actions, and
        ``raw_steps_per_s`` of the raw simulator, None where there is no plain loop for it; and ``over_raw``, how many times longer a step
        takes with the net acting.
    """
    if options.threads < 1 or options.envs < 1 or options.workers < 0 or not 0 < options.seconds < 1e6:
        raise UsageError(
            f"threads (={options.threads}) and envs (={options.envs}) must be at least 1, workers (={options.workers}) at least 0, "
            f"seconds (={options.seconds}) above 0"
        )
    torch.set_num_threads(options.threads)
    config = TrainConfig(
        task=options.task,
        sharing=options.sharing,
        slots=options.slots,
        hidden=options.hidden,
        env_args=options.env_args,
        envs=options.envs,
        learner=ValueConfig(buffer_size=max(options.envs, ValueConfig.buffer_size)),
    )
    env, alone = (build_env(config, options.envs, "cpu", options.workers) for _ in range(2))
    try:
        if env.spec.continuous:
            # The same recurrent net, of a learner that has continuous actions.
            config = replace(config, algo="ippo", learner=PPOConfig())
        functions = {
            "acting": _player(env, build_learner(config, env.spec).actor("act")),
            "random": _player(alone, RandomActor(alone.spec.n_actions, torch.Generator().manual_seed(0), alone.spec.continuous)),
        }
        raw = _raw(options) if options.raw else None
        if raw is not None:
            functions["raw"] = raw
        timed = race(functions, seconds=options.seconds, sample_seconds=_SAMPLE_SECONDS, warm=False)
    finally:
        env.close()
        alone.close()
    found: dict[str, Any] = {name: options.envs / timed.median(name) * 1e6 for name in timed.us}
    return {
        "task": options.task,
        "envs": options.envs,
        "workers": options.workers,
        "threads": options.threads,
        "env_steps_per_s": round(found["acting"]),
        "random_steps_per_s": round(found["random"]),
        "raw_steps_per_s": round(found["raw"]) if "raw" in found else None,
        "over_raw": round(timed.speedup("raw", "acting"), 3) if "raw" in found else None,
    }


def _player(env: TeamEnv, actor: NetActor | RandomActor) -> Callable[[], None]:
    """One step of the whole batch per call."""
    seen = env.reset(0)
    actor.reset(env.n_envs)

    def step() -> None:
        nonlocal seen
        seen = env.step(actor(seen)).current

    return step


def _raw(options: BenchEnv) -> Callable[[], None] | None:
    """One step of as many raw environments per call; None where there is no plain loop."""
    suite, _, name = options.task.partition("/")
    kwargs = TrainConfig(task=options.task, env_args=options.env_args).env_kwargs
    if {"side", "opponents"} & set(kwargs):
        return None
    if suite in ("mpe", "vmas"):
        return None if name == "blind_spread" else _raw_vmas(suite, name, options.envs, kwargs)
    if suite == "smax":
        return _raw_smax(name, options.envs, kwargs)
    if suite in ("lbf", "rware"):
        return _raw_tuple(options.task, options.envs, kwargs)
    if suite in ("mpe2", "pettingzoo", "mamujoco"):
        return _raw_parallel(suite, options.task, options.envs, kwargs)
    return None


def _raw_vmas(suite: str, name: str, envs: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    import vmas

    continuous = bool(kwargs.pop("continuous_actions", False))
    # VMAS finds its scenarios by their file's name.
    env = vmas.make_env(
        name.rpartition("/")[2],
        num_envs=envs,
        device="cpu",
        continuous_actions=continuous,
        seed=0,
        max_steps=kwargs.pop("max_steps", None),
        **kwargs,
    )
    env.reset()
    actions = [[env.get_random_action(agent) for agent in env.agents] for _ in range(16)]
    limit, count = 25 if suite == "mpe" else 100, 0

    def step() -> None:
        nonlocal count
        env.step(actions[count % 16])
        count += 1
        if count % limit == 0:
            env.reset()

    return step


def _raw_smax(name: str, envs: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    with contextlib.redirect_stdout(io.StringIO()):  # jaxmarl greets on stdout
        import jax
        from jaxmarl import make
        from jaxmarl.environments.smax import map_name_to_scenario

    env = make("HeuristicEnemySMAX", scenario=map_name_to_scenario(name), **kwargs)

    @jax.jit
    def one(key: Any, state: Any) -> tuple[Any, Any]:
        key, choose, go = jax.random.split(key, 3)
        avail = jax.vmap(env.get_avail_actions)(state)
        keys = jax.random.split(choose, len(env.agents))
        actions = {agent: jax.random.categorical(k, jax.numpy.log(avail[agent] + 1e-9)) for agent, k in zip(env.agents, keys, strict=True)}
        _, state, *_ = jax.vmap(env.step)(jax.random.split(go, envs), state, actions)
        return key, state

    key = jax.random.PRNGKey(0)
    _, state = jax.jit(jax.vmap(env.reset))(jax.random.split(key, envs))

    def step() -> None:
        nonlocal key, state
        key, state = one(key, state)
        jax.block_until_ready(state)

    return step


def _raw_tuple(task: str, envs: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    made = [importlib.import_module("k24.envs.foraging").make_one(task, **kwargs) for _ in range(envs)]
    limit, raw, chance = made[0].spec.episode_limit, [one.env for one in made], random.Random(0)
    counts = [int(space.n) for space in raw[0].action_space]
    actions = [[chance.randrange(n) for n in counts] for _ in range(997)]
    for k, one in enumerate(raw):
        one.reset(seed=k)
    clock = [0] * envs
    count = 0

    def step() -> None:
        nonlocal count
        for k, one in enumerate(raw):
            count += 1
            clock[k] += 1
            _, _, terminated, truncated, _ = one.step(actions[count % 997])
            if terminated or truncated or clock[k] == limit:
                one.reset()
                clock[k] = 0

    return step


def _raw_parallel(suite: str, task: str, envs: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    made = [importlib.import_module(f"k24.envs.{suite}").make_one(task, **kwargs) for _ in range(envs)]
    raw: list[Any] = [getattr(one, "team", one).env for one in made]
    for k, one in enumerate(raw):
        one.reset(seed=k)
    names = raw[0].possible_agents
    for name in names:
        raw[0].action_space(name).seed(0)
    actions = [{name: raw[0].action_space(name).sample() for name in names} for _ in range(997)]
    limit, clock, count = made[0].spec.episode_limit, [0] * envs, 0

    def step() -> None:
        nonlocal count
        for k, one in enumerate(raw):
            count += 1
            clock[k] += 1
            joint = actions[count % 997]
            one.step({name: joint[name] for name in one.agents})
            if not one.agents or clock[k] == limit:
                one.reset()
                clock[k] = 0

    return step
