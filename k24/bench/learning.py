"""What benchmarks of training share: options, learners, made-up experience, the plain way to compute the same, and whole training loops."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from k24.bench.timing import Race, race
from k24.config import TrainConfig
from k24.envs import TeamEnv, make_env
from k24.envs.base import EnvSpec
from k24.errors import RunError, UsageError
from k24.evaluate import build_learner
from k24.learners import Episodes, Learner, LearnerConfig
from k24.learners.replay import Transitions
from k24.nets import AgentNet, Weights
from k24.sharing import K24Config, Sharing
from k24.sparse.gru import gru_step
from k24.sparse.slots import SlotRule, apply_slots

# Computes what a net does: effective weights, observations [A, T, N, D], hidden state [A, N, H]; outputs [A, T, N, U].
Plain = Callable[[AgentNet, Weights, Tensor, Tensor], Tensor]
# Told each figure as it is measured: name, median in ms, interquartile range.
OnRow = Callable[[str, float, float], None]

# How far fast and plain way may differ, as a share of the largest value.
TOLERANCE = 1e-4

# Where in its run a learner is while it is timed: masks are still drawn, exploration has fallen, and random play is over.
PROGRESS, ENV_STEPS = 0.1, 60_000


@dataclass(frozen=True)
class BenchTrain:
    """What can be chosen whatever the learner; each kind of learner adds its own, and its own defaults."""

    algo: str = "qmix"
    """Learner; --algo NAME --help tells its options."""
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
    threads: int = 1
    """Threads of torch."""
    repeats: int = 30
    """How often what is timed runs; the median counts."""
    task: str = "mpe/simple_spread"
    """Task of the end-to-end figures; empty for none."""
    seconds: float = 6.0
    """How long to measure each end-to-end figure, after two rounds of warming up."""
    masks: Annotated[K24Config, tyro.conf.arg(name="")] = field(default_factory=K24Config)
    """Settings of k24 and its controls."""

    def __post_init__(self) -> None:
        """Checks sizes; names are checked by what they are names of."""
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "unit_types" else 1
            if type(value) is int and value < least:
                raise UsageError(f"{f.name} (={value}) must be at least {least}")
        if not 0 < self.seconds < 1e6:
            raise UsageError(f"seconds (={self.seconds}) must be above 0")


def make(options: BenchTrain, spec: EnvSpec, settings: LearnerConfig, sharing: str | None = None, rule: SlotRule | None = None) -> Any:
    """A learner as ``k24 train`` would build it.

    Args:
        options: Algorithm, scheme, width, masks.
        spec: Sizes.
        settings: Of the learner.
        sharing: Another scheme.
        rule: Which slot each row uses; the agent's index when None.

    Raises:
        UsageError: There is no such scheme, or settings do not fit together.
    """
    config = TrainConfig(
        algo=options.algo, sharing=sharing or options.sharing, hidden=options.hidden, masks=options.masks, learner=settings, envs=1
    )
    return build_learner(config, spec, rule=rule)


# Made-up experience -----------------------------------------------------------------------------------------------------------------------


def made_up_episodes(spec: EnvSpec, count: int, seed: int = 0) -> Episodes:
    """Full-length episodes of noise, of discrete actions."""
    g = torch.Generator().manual_seed(seed)
    a, t = spec.n_agents, spec.episode_limit
    batch = Episodes.empty(spec, count, torch.device("cpu"), avail=False)
    batch.obs = torch.randn(a, t + 1, count, spec.obs_dim, generator=g)
    batch.state = torch.randn(t + 1, count, spec.state_dim, generator=g)
    batch.actions = torch.randint(0, spec.n_actions, (a, t, count), generator=g)
    batch.reward = torch.randn(a, t, count, generator=g)
    batch.valid[:] = True
    return batch


def made_up_transitions(spec: EnvSpec, count: int, seed: int = 0) -> Transitions:
    """Transitions of noise, of continuous actions; none ends an episode."""
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, spec.n_agents, count, spec.obs_dim, generator=g)
    state, next_state = torch.randn(2, count, spec.state_dim, generator=g)
    actions = torch.rand(spec.n_agents, count, spec.n_actions, generator=g) * 2 - 1
    returns, discount = torch.randn(count, generator=g), torch.full((count,), 0.9)
    return Transitions(obs, state, actions, returns, discount, next_obs, next_state, None, None)


# The plain way ----------------------------------------------------------------------------------------------------------------------------


def stepwise_forward(net: AgentNet, weights: Weights, obs: Tensor, h: Tensor) -> Tensor:
    """A recurrent :class:`~k24.nets.AgentNet`, one time step after the other in plain autograd: the oracle of the fast path.

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


def separate_forward(net: AgentNet, weights: Weights, obs: Tensor, h: Tensor) -> Tensor:
    """A net without recurrence, one pass for each slot over that slot's weights alone: what all slots in one pass must equal.

    Arguments and result are those of :func:`stepwise_forward`; agent indices are not appended.
    """
    outputs = []
    for slot, x in enumerate(obs):
        for made in weights:
            if made is not weights[0]:
                x = F.relu(F.layer_norm(x, x.shape[-1:]) if net.layer_norm else x)
            x = F.linear(x, made.weight[min(slot, len(made.weight) - 1)], made.bias[min(slot, len(made.bias) - 1)])
        outputs.append(x)
    return torch.stack(outputs)


def unroll(net: AgentNet) -> None:
    """Makes a net run step by step for good, and no layer take note of its inputs: the baseline."""

    def forward(weights: Weights, obs: Tensor, h: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return stepwise_forward(net, weights, obs, h), h

    net.forward = forward  # type: ignore[method-assign, assignment]


def disagreement(net: AgentNet, sharing: Sharing, obs: Tensor, plain: Plain) -> float:
    """Largest difference between the fast and the plain way, in outputs and in gradients of weights and observations.

    Args:
        net: The net.
        sharing: Its scheme, of which masks are drawn.
        obs: ``[A, T, N, D]``.
        plain: The plain way.

    Returns:
        The difference as a share of the largest value.
    """
    sharing.resample(0.5, torch.Generator().manual_seed(1))
    obs, h0 = obs.detach().requires_grad_(), net.initial_state(obs.shape[2])
    wanted = [obs, *(p for p in net.parameters() if p.requires_grad)]
    results = []
    for forward in (lambda w: net(w, obs, h0)[0], lambda w: plain(net, w, obs, h0)):
        outputs = forward(net.materialise("train"))
        gradients = torch.autograd.grad(outputs.square().mean(), wanted, allow_unused=True)
        results.append([outputs.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True))])
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-8)) for x, y in zip(*results, strict=True))


def require_agreement(found: float, fast: str, plain: str) -> None:
    """Refuses to time what computes something else.

    Args:
        found: Of :func:`disagreement`.
        fast: What the fast way is called.
        plain: What the plain one is called.

    Raises:
        RunError: They differ by more than rounding.
    """
    if not found <= TOLERANCE:  # NaN is no agreement
        raise RunError(f"{fast} differs from {plain} by {found:.1e} of the largest value (at most {TOLERANCE:.0e}): nothing is timed")


# Measuring --------------------------------------------------------------------------------------------------------------------------------


def grown_mb(small: Callable[[], object], first: Callable[[], object]) -> float:
    """How much memory the first updates need, in MB.

    Args:
        small: An update of a net of a few units, which makes torch's own buffers.
        first: The update; called three times.
    """
    small()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        first()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def race_updates(
    updates: Mapping[str, Callable[[], object]], repeats: int, on_row: OnRow | None = None, per_call: int = 1
) -> tuple[dict[str, float], Race]:
    """Times updates, which take turns.

    Args:
        updates: By name.
        repeats: Samples of each.
        on_row: Told each figure.
        per_call: Updates that each of them takes.

    Returns:
        Medians in ms of one update, rounded, and what was measured of each call.
    """
    timed = race(updates, rounds=repeats, sample_seconds=0, warm=False)
    if on_row is not None:
        for name in updates:
            on_row(name, timed.median(name) / per_call / 1e3, timed.iqr(name) / per_call / 1e3)
    return {name: round(timed.median(name) / per_call / 1e3, 2) for name in updates}, timed


@contextlib.contextmanager
def training_loops(
    options: BenchTrain, wanted: Mapping[str, tuple[int, LearnerConfig, str]]
) -> Iterator[dict[str, tuple[TeamEnv, Learner]]]:
    """Environments of the task and who learns in them; without a task, nothing. Entered before anything is timed, to refuse it early.

    Args:
        options: Task and algorithm.
        wanted: By name, parallel environments, settings of the learner, and its scheme.

    Raises:
        UsageError: There is no such task, or it is not for this algorithm.
    """
    with contextlib.ExitStack() as stack:
        loops: dict[str, tuple[TeamEnv, Learner]] = {}
        for name, (envs, settings, sharing) in wanted.items() if options.task else ():
            env = make_env(options.task, envs)
            stack.callback(env.close)
            loops[name] = env, make(options, env.spec, settings, sharing)
        yield loops


def loop_speeds(loops: Mapping[str, tuple[TeamEnv, Learner]], seconds: float) -> dict[str, int]:
    """Environment steps per second of whole loops, which take turns round by round: acting, environment, memory and learning.

    Args:
        loops: Of :func:`training_loops`.
        seconds: About how long to measure each, after two rounds of warming up.
    """
    steps, took = dict.fromkeys(loops, 0), dict.fromkeys(loops, 0.0)
    for number in itertools.count():
        if sum(took.values()) >= seconds * len(loops):
            break
        for name, (env, learner) in loops.items():
            start = time.perf_counter()
            played = learner.gather(env, ENV_STEPS, seed=number).steps
            learner.learn(PROGRESS, ENV_STEPS)
            if number >= 2:
                steps[name], took[name] = steps[name] + played, took[name] + time.perf_counter() - start
    return {name: round(steps[name] / took[name]) for name in loops}


def update(learner: Any, batch: Episodes | Transitions) -> Callable[[], object]:
    """An update by these, as something to call."""
    return partial(learner.update, batch, PROGRESS, 0)
