"""Speed of training, always beside its baseline in the same process.

``bench_train`` times whole gradient steps of a value learner on made-up episodes, and beside them the same learner with
one dense network for all agents, unrolled step by step in plain autograd: the layout that most code bases use.
Correctness first: the fast path must agree with the step-by-step one before anything is timed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from k24.allocator import keep_freed_memory
from k24.bench.timing import race
from k24.envs import make_env
from k24.envs.base import EnvSpec, Observation
from k24.errors import RunError
from k24.learners import Episodes, ValueConfig, ValueLearner, collect_episodes
from k24.nets import AgentNet, Weights
from k24.sharing import K24Config, SharingConfig, make_sharing
from k24.sparse.gru import gru_step
from k24.sparse.slots import SlotRule, apply_slots, by_unit_type


@dataclass(frozen=True)
class BenchTrain:
    """Times one whole update: masks, forward, target, diversity, backward, optimiser."""

    algo: str = "qmix"
    """Learner: iql, vdn or qmix."""
    sharing: str = "k24"
    """Sharing scheme."""
    agents: int = 3
    """Agents (A)."""
    obs: int = 18
    """Observation features (D)."""
    actions: int = 5
    """Actions per agent (U)."""
    hidden: int = 64
    """Hidden units (H)."""
    batch: int = 32
    """Episodes per update."""
    steps: int = 25
    """Steps per episode."""
    threads: int = 1
    """Threads of torch."""
    repeats: int = 30
    """Updates timed; the median counts."""
    unit_types: int = 0
    """If above 0, also time an update and an acting step whose rows choose among so many slots, beside one slot per agent."""
    envs: int = 64
    """Parallel environments of that acting step."""
    task: str = "mpe/simple_spread"
    """Task of the end-to-end figures; empty for none."""
    masks: Annotated[K24Config, tyro.conf.arg(name="")] = field(default_factory=K24Config)
    """Settings of k24 and its controls."""


def stepwise_forward(net: AgentNet, weights: Weights, obs: Tensor, h: Tensor) -> Tensor:
    """The net of :class:`~k24.nets.AgentNet`, one time step after the other in plain autograd: the oracle of the fast path.

    Args:
        net: Whose sizes and agent index count.
        weights: Effective weights.
        obs: ``[A, T, N, D]``.
        h: ``[A, N, H]``.

    Returns:
        ``[A, T, N, U]``.
    """
    fc1, gru_x, gru_h, fc2, fc3, fc4 = weights
    a, steps, n, _ = obs.shape
    outputs = []
    for t in range(steps):
        x = obs[:, t]
        if net.agent_id:
            x = torch.cat([x, torch.eye(a, device=x.device)[:, None].expand(a, n, a)], -1)
        x = F.relu(apply_slots(x, fc1.weight, fc1.bias))
        gates = apply_slots(x, gru_x.weight, gru_x.bias)
        h = gru_step(gates, h, gru_h.weight.expand(a, -1, -1), gru_h.bias.expand(a, -1))
        x = F.relu(apply_slots(h, fc2.weight, fc2.bias))
        x = F.relu(apply_slots(x, fc3.weight, fc3.bias))
        outputs.append(apply_slots(x, fc4.weight, fc4.bias))
    return torch.stack(outputs, 1)


def made_up_episodes(spec: EnvSpec, count: int, seed: int = 0) -> Episodes:
    """Full-length episodes of noise."""
    g = torch.Generator().manual_seed(seed)
    a, t = spec.n_agents, spec.episode_limit
    batch = Episodes.empty(spec, count, torch.device("cpu"), avail=False)
    batch.obs = torch.randn(a, t + 1, count, spec.obs_dim, generator=g)
    batch.state = torch.randn(t + 1, count, spec.state_dim, generator=g)
    batch.actions = torch.randint(0, spec.n_actions, (a, t, count), generator=g)
    batch.reward = torch.randn(a, t, count, generator=g)
    batch.valid[:] = True
    return batch


class StepwiseLearner(ValueLearner):
    """The same learner with the net unrolled step by step, and no statistics taken: the baseline."""

    def td_loss(self, batch: Episodes, weights: Weights, observe: bool = False) -> Tensor:
        """As the parent's, through :func:`stepwise_forward`."""
        fast, net = self.net.forward, self.net

        def forward(made: Any, obs: Tensor, h: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            return stepwise_forward(net, made, obs, h), h

        net.forward = forward  # type: ignore[method-assign, assignment]
        try:
            return super().td_loss(batch, weights)
        finally:
            net.forward = fast  # type: ignore[method-assign]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def agreement(learner: ValueLearner, batch: Episodes) -> float:
    """Largest difference between fast and step-by-step outputs and gradients, relative to the largest gradient.

    Args:
        learner: Whose net is tried.
        batch: Episodes.
    """
    learner.sharing.resample(0.5, torch.Generator().manual_seed(1))
    h0 = learner.net.initial_state(batch.count)
    results = []
    for forward in (lambda w: learner.net(w, batch.obs, h0)[0], lambda w: stepwise_forward(learner.net, w, batch.obs, h0)):
        learner.net.zero_grad()
        q = forward(learner.net.materialise("train"))
        q.square().mean().backward()
        results.append([q.detach()] + [p.grad.clone() for p in learner.net.parameters() if p.grad is not None])
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-8)) for x, y in zip(*results, strict=True))


def bench_train(options: BenchTrain, on_row: Callable[[str, float, float], None] | None = None) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        options: Sizes.
        on_row: Told each figure as it is measured: name, median in ms, interquartile range.

    Returns:
        ``update_ms``, ``stepwise_ms`` (shared dense net, step by step), ``dense_ms`` (the same net on our fast path),
        ``update_mb`` (memory grown in the first updates), ``max_rel_err``, ``env_steps_per_s`` and
        ``env_steps_per_s_rare`` (end to end at one update per 25 and per 1664 environment steps); with ``unit_types``, also what
        :func:`by_unit_type_or_agent` finds.

    Raises:
        RunError: The fast path does not agree with the step-by-step one.
    """
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    spec = EnvSpec(options.agents, options.obs, options.obs * options.agents, options.actions, options.steps)
    batch = made_up_episodes(spec, options.batch)
    config = ValueConfig(batch_size=options.batch, standardise_rewards=False)

    def learner(scheme: str, cls: type[ValueLearner] = ValueLearner) -> ValueLearner:
        return cls(options.algo, spec, make_sharing(scheme, options.agents, SharingConfig(masks=options.masks)), config, options.hidden)

    ours = learner(options.sharing)
    # Warm torch's own buffers with a net of a few units, so that what grows below is what an update needs.
    small = EnvSpec(2, 4, 8, 2, 2)
    tiny = ValueLearner(options.algo, small, make_sharing(options.sharing, 2, SharingConfig(masks=options.masks)), config, 4)
    tiny.update(made_up_episodes(small, 2), 0.1, 0)
    before = _peak_mb()
    for _ in range(3):
        ours.update(batch, 0.1, 0)
    grown = _peak_mb() - before
    error = agreement(learner(options.sharing), batch)
    if error > 1e-4:
        raise RunError(
            f"the fast path differs from the step-by-step one by {error:.1e} of the largest value (at most 1e-4): nothing is timed"
        )

    dense, stepwise = learner("fups"), learner("fups", StepwiseLearner)
    timed = race(
        {
            "update_ms": lambda: ours.update(batch, 0.1, 0),
            "dense_ms": lambda: dense.update(batch, 0.1, 0),
            "stepwise_ms": lambda: stepwise.update(batch, 0.1, 0),
        },
        rounds=options.repeats,
        sample_seconds=0,
        warm=False,
    )
    result: dict[str, Any] = {name: round(timed.median(name) / 1e3, 2) for name in timed.us}
    if on_row is not None:
        for name in timed.us:
            on_row(name, timed.median(name) / 1e3, timed.iqr(name) / 1e3)
    result |= {"update_mb": round(grown, 1), "max_rel_err": error}
    if options.unit_types:
        result |= by_unit_type_or_agent(options)
    if options.task:
        result["env_steps_per_s"] = round(end_to_end(options, envs=32, env_steps_per_update=25))
        result["env_steps_per_s_rare"] = round(end_to_end(options, envs=512, env_steps_per_update=1664))
    return result


def by_unit_type_or_agent(options: BenchTrain) -> dict[str, float]:
    """What it costs that rows choose their slot: updates and acting steps of the same rows, in the two layouts.

    Args:
        options: Sizes; ``unit_types`` is the number of slots, each as likely as the others.

    Returns:
        ``types_update_ms``, ``agents_update_ms``, ``types_act_us``, ``agents_act_us``, and the ratios ``types_update_over_agents`` and
        ``types_act_over_agents``.
    """
    types, agents, obs_dim = options.unit_types, options.agents, options.obs + options.unit_types
    spec = EnvSpec(agents, obs_dim, options.obs * agents, options.actions, options.steps, unit_types=(options.obs, obs_dim))
    generator = torch.Generator().manual_seed(1)

    def with_types(obs: Tensor) -> Tensor:
        """The same units through all steps of an episode."""
        chosen = torch.randint(types, (agents, 1, obs.shape[2]), generator=generator).expand(-1, obs.shape[1], -1)
        obs[..., options.obs :] = F.one_hot(chosen, types)
        return obs

    batch = made_up_episodes(spec, options.batch)
    batch.obs = with_types(batch.obs)
    now = Observation(with_types(torch.randn(agents, 1, options.envs, obs_dim, generator=generator))[:, 0], torch.zeros(options.envs, 1))
    functions: dict[str, Callable[[], object]] = {}
    for name, rule in (("types", by_unit_type(options.obs, obs_dim)), ("agents", SlotRule(agents))):
        sharing = make_sharing(options.sharing, rule.n_slots, SharingConfig(masks=options.masks))
        config = ValueConfig(batch_size=options.batch, standardise_rewards=False)
        learner = ValueLearner(options.algo, spec, sharing, config, options.hidden, rule=rule)
        actor = learner.actor("deploy")
        actor.reset(options.envs)
        functions |= {f"{name}_update_ms": partial(learner.update, batch, 0.1, 0), f"{name}_act_us": partial(actor, now)}
    updates, acts = ({k: v for k, v in functions.items() if k.endswith(unit)} for unit in ("_ms", "_us"))
    update, act = race(updates, rounds=options.repeats, sample_seconds=0, warm=False), race(acts, seconds=3)
    found = {name: round(update.median(name) / 1e3, 2) for name in updates} | {name: round(act.median(name), 1) for name in acts}
    return found | {
        "types_update_over_agents": round(update.speedup("agents_update_ms", "types_update_ms"), 3),
        "types_act_over_agents": round(act.speedup("agents_act_us", "types_act_us"), 3),
    }


def end_to_end(options: BenchTrain, envs: int, env_steps_per_update: int, seconds: float = 6.0) -> float:
    """Environment steps per second of a whole training loop: acting, environment, replay and learning.

    Args:
        options: Scheme, algorithm, width, task.
        envs: Parallel environments.
        env_steps_per_update: Environment steps per gradient step.
        seconds: How long to measure, after two rounds of warming up.
    """
    env = make_env(options.task, envs)
    config = ValueConfig(env_steps_per_update=env_steps_per_update)
    sharing = make_sharing(options.sharing, env.spec.n_agents, SharingConfig(masks=options.masks))
    learner = ValueLearner(options.algo, env.spec, sharing, config, options.hidden)
    learner.replay.add(collect_episodes(env, learner.random_actor(), 0))
    rounds = steps = 0
    start = 0.0
    while not start or time.perf_counter() - start < seconds:
        played = learner.gather(env, 60_000, seed=rounds).steps
        learner.learn(0.1, 60_000)
        rounds += 1
        steps += played if start else 0
        if rounds == 2:
            start = time.perf_counter()
    env.close()
    return steps / (time.perf_counter() - start)
