"""Speed of training, always beside its baseline in the same process.

``bench_train`` times whole updates on made-up experience. Learners of recurrent nets (values, PPO) run beside the same learner with one
dense network for all agents, unrolled step by step in plain autograd: the layout that most code bases use. MATD3 runs beside itself with
other critics, see :mod:`k24.bench.critics`.
Correctness first: the fast path must agree with the plain one before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.allocator import keep_freed_memory
from k24.bench.critics import BenchTD3, bench_critics
from k24.bench.learning import (
    BenchTrain,
    OnRow,
    disagreement,
    grown_mb,
    loop_speeds,
    made_up_episodes,
    make,
    race_updates,
    require_agreement,
    stepwise_forward,
    training_loops,
    unroll,
    update,
)
from k24.bench.timing import race
from k24.envs.base import EnvSpec, Observation
from k24.errors import UsageError, unknown_name
from k24.learners import LEARNERS, Episodes, LearnerConfig, PPOConfig, PPOLearner, TD3Learner, ValueConfig, ValueLearner
from k24.nets import AgentNet
from k24.sharing import Sharing
from k24.sparse.slots import SlotRule, by_unit_type


@dataclass(frozen=True)
class BenchValue(BenchTrain):
    """Times one whole update: masks, forward, target, diversity, backward, optimiser."""

    batch: int = 32
    """Episodes per update."""
    steps: int = 25
    """Steps per episode."""
    unit_types: int = 0
    """If above 0, also time an update and an acting step whose rows choose among so many slots, beside one slot per agent."""
    envs: int = 64
    """Parallel environments of that acting step; the end-to-end figures have their own."""


@dataclass(frozen=True)
class BenchPPO(BenchTrain):
    """Times all that is learned from one round: advantages, then every pass over it by policy and critic."""

    algo: str = "mappo"
    envs: int = 128
    """Parallel environments, and so episodes of a round."""
    steps: int = 25
    """Steps per episode of what is made up."""
    epochs: int = 4
    """Passes over a round."""
    repeats: int = 10


# How each kind of learner is timed: its options, and what runs.
KINDS: dict[type, tuple[type[BenchTrain], Callable[[Any, OnRow | None], dict[str, Any]]]] = {
    ValueLearner: (BenchValue, lambda options, on_row: bench_values(options, on_row)),
    PPOLearner: (BenchPPO, lambda options, on_row: bench_ppo(options, on_row)),
    TD3Learner: (BenchTD3, bench_critics),
}


def train_options(algo: str) -> BenchTrain:
    """The options that an algorithm has, at their defaults.

    Raises:
        UsageError: There is no such algorithm.
    """
    if algo not in LEARNERS:
        raise unknown_name("algorithm", algo, LEARNERS)
    return KINDS[LEARNERS[algo]][0](algo=algo)


def bench_train(options: BenchTrain, on_row: OnRow | None = None) -> dict[str, Any]:
    """Runs the benchmark that suits the algorithm: :func:`bench_values`, :func:`bench_ppo` or :func:`~k24.bench.critics.bench_critics`.

    Args:
        options: Of :func:`train_options`.
        on_row: Told each figure as it is measured: name, median in ms, interquartile range.

    Returns:
        What that function does.

    Raises:
        RunError: The fast path does not agree with the plain one.
        UsageError: Options are those of another algorithm.
    """
    wanted = type(train_options(options.algo))
    if type(options) is not wanted:
        raise UsageError(f"algo {options.algo} has its options in a {wanted.__name__}, got a {type(options).__name__}: change both")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    return KINDS[LEARNERS[options.algo]][1](options, on_row)


# Recurrent nets and whole episodes --------------------------------------------------------------------------------------------------------


def bench_values(options: BenchValue, on_row: OnRow | None = None) -> dict[str, Any]:
    """Times updates of IQL, VDN or QMIX.

    Args:
        options: Sizes.
        on_row: Told each figure as it is measured.

    Returns:
        ``update_ms``, ``stepwise_ms`` (shared dense net, step by step), ``dense_ms`` (the same net on our fast path),
        ``update_mb`` (memory grown in the first updates), ``max_rel_err``, ``env_steps_per_s`` and
        ``env_steps_per_s_rare`` (end to end at one update per 25 and per 1664 environment steps, in 32 and 512 environments); with
        ``unit_types``, also what :func:`by_unit_type_or_agent` finds.
    """
    settings = ValueConfig(batch_size=options.batch, standardise_rewards=False)
    loops: dict[str, tuple[int, LearnerConfig, str]] = {
        "env_steps_per_s": (32, ValueConfig(env_steps_per_update=25), options.sharing),
        "env_steps_per_s_rare": (512, ValueConfig(env_steps_per_update=1664), options.sharing),
    }
    result = _bench_episodes(options, _spec(options), settings, options.batch, loops, on_row)
    return result | by_unit_type_or_agent(options) if options.unit_types else result


def bench_ppo(options: BenchPPO, on_row: OnRow | None = None) -> dict[str, Any]:
    """Times what IPPO or MAPPO learns from a round.

    Args:
        options: Sizes.
        on_row: Told each figure as it is measured.

    Returns:
        ``update_ms``, ``stepwise_ms``, ``dense_ms``, ``update_mb`` and ``max_rel_err`` as for :func:`bench_values`, of all that is learned
        from one round; ``env_steps_per_s`` and ``dense_env_steps_per_s`` (one dense net for all agents), end to end.
    """
    settings = PPOConfig(epochs=options.epochs)
    loops: dict[str, tuple[int, LearnerConfig, str]] = {
        "env_steps_per_s": (options.envs, settings, options.sharing),
        "dense_env_steps_per_s": (options.envs, settings, "fups"),
    }
    return _bench_episodes(options, _spec(options), settings, options.envs, loops, on_row)


def _spec(options: BenchValue | BenchPPO) -> EnvSpec:
    """Sizes of what is made up; the state is all observations together."""
    return EnvSpec(options.agents, options.obs, options.obs * options.agents, options.actions, options.steps)


def _bench_episodes(
    options: BenchTrain,
    spec: EnvSpec,
    settings: LearnerConfig,
    count: int,
    loops: dict[str, tuple[int, LearnerConfig, str]],
    on_row: OnRow | None,
) -> dict[str, Any]:
    """Updates by so many episodes, beside dense nets, and whole loops."""
    ours, dense, stepwise = (make(options, spec, settings, sharing) for sharing in (options.sharing, "fups", "fups"))
    batch = made_up_episodes(spec, count)
    for net, *_ in _nets(stepwise, batch):
        unroll(net)
    # Torch's own buffers come with a net of a few units, so that what grows below is what an update needs.
    small = EnvSpec(2, 4, 8, 2, 2)
    tiny = make(replace(options, hidden=min(options.hidden, 16)), small, settings)
    grown = grown_mb(update(tiny, made_up_episodes(small, 2)), update(ours, batch))

    with training_loops(options, loops) as whole:
        error = max(disagreement(*each, stepwise_forward) for each in _nets(make(options, spec, settings), batch))
        require_agreement(error, "the fast path", "the step-by-step one")
        updates = {"update_ms": update(ours, batch), "dense_ms": update(dense, batch), "stepwise_ms": update(stepwise, batch)}
        result: dict[str, Any]
        result, _ = race_updates(updates, options.repeats, on_row)
        return result | {"update_mb": round(grown, 1), "max_rel_err": error} | loop_speeds(whole, options.seconds)


def _nets(learner: Any, batch: Episodes) -> list[tuple[AgentNet, Sharing, Tensor]]:
    """Each net that learns, its scheme, and what it sees of these episodes."""
    nets = [(learner.policy, batch.obs)]
    if isinstance(learner, PPOLearner):
        nets.append((learner.critic, batch.state[None] if learner.algo == "mappo" else batch.obs))
    return [(trained.net, trained.sharing, seen) for trained, seen in nets]


def by_unit_type_or_agent(options: BenchValue) -> dict[str, float]:
    """What it costs that rows choose their slot: updates and acting steps of the same rows, in the two layouts.

    Args:
        options: Sizes; ``unit_types`` is the number of slots, each as likely as the others.

    Returns:
        ``types_update_ms``, ``agents_update_ms``, ``types_act_us``, ``agents_act_us``, and the ratios ``types_update_over_agents`` and
        ``types_act_over_agents``.
    """
    types, agents, obs_dim = options.unit_types, options.agents, options.obs + options.unit_types
    spec = replace(_spec(options), obs_dim=obs_dim, unit_types=(options.obs, obs_dim))
    generator = torch.Generator().manual_seed(1)

    def with_types(obs: Tensor) -> Tensor:
        """The same units through all steps of an episode."""
        chosen = torch.randint(types, (agents, 1, obs.shape[2]), generator=generator).expand(-1, obs.shape[1], -1)
        obs[..., options.obs :] = F.one_hot(chosen, types)
        return obs

    batch = made_up_episodes(spec, options.batch)
    batch.obs = with_types(batch.obs)
    now = Observation(with_types(torch.randn(agents, 1, options.envs, obs_dim, generator=generator))[:, 0], torch.zeros(options.envs, 1))
    settings = ValueConfig(batch_size=options.batch, standardise_rewards=False)
    updates: dict[str, Callable[[], object]] = {}
    acts: dict[str, Callable[[], object]] = {}
    for name, rule in (("types", by_unit_type(options.obs, obs_dim)), ("agents", SlotRule(agents))):
        learner = make(options, spec, settings, rule=rule)
        actor = learner.actor("deploy")
        actor.reset(options.envs)
        updates[f"{name}_update_ms"], acts[f"{name}_act_us"] = update(learner, batch), partial(actor, now)
    found, timed = race_updates(updates, options.repeats)
    act = race(acts, seconds=3)
    return (
        found
        | {name: round(act.median(name), 1) for name in acts}
        | {
            "types_update_over_agents": round(timed.speedup("agents_update_ms", "types_update_ms"), 3),
            "types_act_over_agents": round(act.speedup("agents_act_us", "types_act_us"), 3),
        }
    )
