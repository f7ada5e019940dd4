"""Speed of MATD3: what critics cost that are masks on one network, beside one dense critic and beside two with a network each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from k24.bench.learning import (
    BenchTrain,
    OnRow,
    disagreement,
    grown_mb,
    loop_speeds,
    made_up_transitions,
    make,
    race_updates,
    require_agreement,
    separate_forward,
    training_loops,
    update,
)
from k24.envs.base import EnvSpec
from k24.learners import TD3Config


@dataclass(frozen=True)
class BenchTD3(BenchTrain):
    """Times updates of an ensemble of critics and of the policy; sizes are those of a HalfCheetah of two agents."""

    algo: str = "matd3"
    agents: int = 2
    obs: int = 10
    state: int = 17
    """State features (S)."""
    actions: int = 3
    """Numbers that make up an agent's action (U)."""
    hidden: int = 256
    batch: int = 1000
    """Transitions per update."""
    critic_sharing: str = "k24"
    """Sharing scheme of the critics."""
    critics: int | None = None
    """Critics of the ensemble; when not given, 5 as masks on one network, 2 as networks of their own."""
    task: str = ""
    envs: int = 20
    """Parallel environments of the end-to-end figures."""


def bench_critics(options: BenchTD3, on_row: OnRow | None = None) -> dict[str, Any]:
    """Runs the benchmark of MATD3.

    An update is a gradient step of the critics, and that share of one of the policy that comes with each on average: what is timed are as
    many consecutive updates as there are to a step of the policy.

    Args:
        options: Sizes.
        on_row: Told each figure as it is measured.

    Returns:
        ``update_ms``; ``one_critic_ms`` (one dense critic, the policy as it is), ``all_rows_ms`` (each critic learns from every row instead
        of its part of them), ``two_networks_ms`` (two dense critics); ``over_one_critic``, ``all_rows_over_one_critic`` and
        ``two_networks_over_one_critic``, how many times longer an update takes than with one critic; ``critics``, how many; ``update_mb``,
        memory grown in the first updates; ``max_rel_err``, between all critics in one pass and a pass for each; with a task also
        ``env_steps_per_s`` and ``two_networks_env_steps_per_s``, end to end.

    Raises:
        RunError: All critics in one pass do not agree with a pass for each.
        UsageError: Sizes do not fit together, or the task is not for MATD3.
    """
    spec = EnvSpec(options.agents, options.obs, options.state, options.actions, 1000, continuous=True)
    ours = TD3Config(batch_size=options.batch, critics=options.critics, critic_sharing=options.critic_sharing)
    two_networks = replace(ours, critics=2, critic_sharing="nops")
    variants = {
        "update_ms": ours,
        "one_critic_ms": replace(ours, critics=1, critic_sharing="fups"),
        "all_rows_ms": replace(ours, critic_rows="all"),
        "two_networks_ms": two_networks,
    }
    learners = {name: make(options, spec, settings) for name, settings in variants.items()}
    batch = made_up_transitions(spec, options.batch)
    count = learners["update_ms"].n_critics
    small = EnvSpec(2, 4, 8, 2, 2, continuous=True)
    tiny = make(replace(options, hidden=min(options.hidden, 16)), small, replace(ours, batch_size=count))
    grown = grown_mb(update(tiny, made_up_transitions(small, count)), update(learners["update_ms"], batch))

    loops = {
        "env_steps_per_s": (options.envs, ours, options.sharing),
        "two_networks_env_steps_per_s": (options.envs, two_networks, options.sharing),
    }
    with training_loops(options, loops) as whole:
        error = agreement(make(options, spec, ours), options.batch)
        require_agreement(error, "all critics in one pass", "a pass for each of them")

        def several(name: str) -> Callable[[], object]:
            once = update(learners[name], batch)
            return lambda: [once() for _ in range(ours.policy_delay)]

        result: dict[str, Any]
        result, timed = race_updates({name: several(name) for name in variants}, options.repeats, on_row, ours.policy_delay)
        for name, over in (("update_ms", "over"), ("all_rows_ms", "all_rows_over"), ("two_networks_ms", "two_networks_over")):
            result[f"{over}_one_critic"] = round(timed.speedup("one_critic_ms", name), 3)
        return result | {"critics": count, "update_mb": round(grown, 1), "max_rel_err": error} | loop_speeds(whole, options.seconds)


def agreement(learner: Any, rows: int) -> float:
    """Compares all critics in one pass with a pass for each: on the same rows, as the target judges, and on rows of their own.

    Args:
        learner: Whose critics are tried.
        rows: How many.
    """
    net, count = learner.critic.net, learner.n_critics
    x = torch.randn(rows // count * count, net.obs_dim, generator=torch.Generator().manual_seed(0))
    layouts = x.expand(count, 1, -1, -1), x.view(count, 1, -1, net.obs_dim)
    return max(disagreement(net, learner.critic.sharing, each, separate_forward) for each in layouts)
