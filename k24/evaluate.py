"""Playing a trained policy, of a run folder or a policy file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from k24.actions import KINDS
from k24.checkpoint import load_checkpoint
from k24.config import TrainConfig, load_config
from k24.envs import EnvSpec, Observation, TeamEnv, check_options, is_listed, make_env
from k24.envs.opponents import FixedOpponents
from k24.envs.own import load
from k24.errors import RAISED, CheckpointError, PolicyFileError, RunError, UsageError, describe
from k24.learners import Learner, RandomActor, collect_episodes, make_learner
from k24.learners.rollout import slots_of
from k24.policy import Policy, load_policy
from k24.sharing import Experience, Sharing, make_critic_sharing, make_sharing
from k24.sparse.slots import Phase, SlotRule, by_unit_type

# Evaluation episodes start from other seeds than training ones.
EVAL_SEED = 1_000_003


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        config: Its configuration.
        learner: The learner with its newest nets and masks; replay and optimiser are not loaded.
        steps: Environment steps of that checkpoint.
    """

    config: TrainConfig
    learner: Learner
    steps: int


def build_learner(
    config: TrainConfig,
    spec: EnvSpec,
    device: torch.device | str = "cpu",
    rule: SlotRule | None = None,
    experience: Experience | None = None,
) -> Learner:
    """A fresh learner of a configuration.

    Args:
        config: The run.
        spec: The environment's sizes.
        device: Where it learns.
        rule: Which slot each row uses; that of the configuration when None.
        experience: Random play, for a scheme that wants to see any before training.
    """
    rule = rule or build_rule(config, spec)
    sharing = make_sharing(config.sharing, rule.n_slots, config.sharing_config)
    if experience is not None:
        sharing.prepare(experience, torch.Generator().manual_seed(config.seed))

    def critic_sharing(n_slots: int | None, ensemble: bool) -> Sharing:
        critics = make_critic_sharing(config.sharing, config.critic_sharing, n_slots, ensemble, config.sharing_config)
        if not ensemble:
            critics.follow(sharing)
        return critics

    options = {"hidden": config.hidden, "agent_id": config.append_id, "seed": config.seed, "device": device, "rule": rule}
    return make_learner(config.algo, spec, sharing, config.learner, **options, critic_sharing=critic_sharing)


def build_rule(config: TrainConfig, spec: EnvSpec) -> SlotRule:
    """Which slot each row uses.

    Raises:
        UsageError: The task knows no unit types, or the user's function can't be had or returns no rule.
    """
    if config.slots == "agent":
        return SlotRule(spec.n_agents)
    if config.slots == "unit_type":
        if spec.unit_types is None:
            raise UsageError(f"{config.task} does not say what type of unit an agent is: use --slots agent")
        return by_unit_type(*spec.unit_types)
    function = load(config.slots)
    try:
        rule = function(spec)
    except RAISED as error:
        raise UsageError(f"slots {config.slots}: the function takes the task's EnvSpec, and fails with {describe(error)}") from error
    whole = isinstance(rule, SlotRule) and type(rule.n_slots) is int and rule.n_slots >= 1
    if not whole or not callable(rule.of):
        raise UsageError(f"slots {config.slots}: the function must return a k24.SlotRule of a whole number and a function, got {rule!r}")
    rule = SlotRule(rule.n_slots, rule.of)
    for steps in (1, 2):
        try:
            slots, _ = slots_of(rule, torch.zeros(spec.n_agents, steps, 1, spec.obs_dim), None)
        except RunError as error:
            raise UsageError(f"slots {config.slots}: {error}") from error
        if slots is not None and int(slots.max()) >= rule.n_slots:
            raise UsageError(f"slots {config.slots}: the rule says there are {rule.n_slots} slots, and gives slot {int(slots.max())}")
    return rule


def build_env(config: TrainConfig, n_envs: int, device: torch.device | str = "cpu", workers: int | None = None) -> TeamEnv:
    """The environments of a configuration, with fixed opponents where ``env_args`` names them.

    Args:
        config: The run.
        n_envs: Parallel environments.
        device: Where tensors live.
        workers: Worker processes; those of the configuration when None.

    Raises:
        UsageError: There is no such task, option, side or opponent.
    """
    kwargs = config.env_kwargs
    side, opponents = kwargs.pop("side", None), kwargs.pop("opponents", None)
    check_options(config.task, kwargs)
    other: Any = opponents
    if opponents not in (None, "random"):
        try:
            # Not by auto, which chooses by the clock: backends differ in the last bits, and a run must repeat.
            other = load_policy(str(opponents), device, backend="dense")
        except PolicyFileError as error:
            raise UsageError(f"opponents: {error}") from error
    env = make_env(config.task, n_envs, device, config.workers if workers is None else workers, **kwargs)
    if isinstance(other, Policy) and KINDS[other.spec.action].continuous != env.spec.continuous:
        names = ("continuous", "discrete") if env.spec.continuous else ("discrete", "continuous")
        raise UsageError(f"opponents: {config.task} has {names[0]} actions, and {opponents} chooses {names[1]} ones: train one for it")
    return env if side is None and opponents is None else FixedOpponents(env, side, other)


def pinned(config: TrainConfig) -> TrainConfig:
    """The configuration with the opponents' file by its whole path, so that the run can be played from any folder."""
    name = "opponents="
    args = (
        a if not a.startswith(name) or a == name + "random" else f"{name}{Path(a.removeprefix(name)).absolute()}" for a in config.env_args
    )
    return replace(config, env_args=tuple(args))


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device.

    Raises:
        UsageError: It is none of these, or CUDA was asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name!r} is not known: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for but torch finds no CUDA device: use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def load_run(folder: Path, device: torch.device | str = "cpu", act: bool = False) -> Run:
    """Reads a run folder. Builds no environment, and runs no code that the folder names unless it is to act.

    Args:
        folder: Run folder.
        device: Where its learner lives.
        act: Whether the policy will act, and so needs the slot rule that the run was started with.

    Raises:
        UsageError: It is no run folder, or has no checkpoint yet.
        CheckpointError: The newest checkpoint is damaged or does not fit its configuration.
    """
    if not (folder / "config.yaml").exists():
        raise UsageError(
            f"{folder} is no run folder (it has no config.yaml): give one that 'k24 train' made, such as "
            f"results/mpe/simple_spread/qmix-k24/seed0"
        )
    config = load_config(folder / "config.yaml")
    found = load_checkpoint(folder / "checkpoints", device, mapped=True)
    if found is None:
        raise UsageError(f"{folder} has no checkpoint yet: train longer, or resume it with --resume")
    steps, state = found
    try:
        task, spec, rule = state["task"], EnvSpec(**state["spec"]), SlotRule(state["n_slots"], unit_types=state["unit_types"])
    except (KeyError, TypeError, UsageError) as error:
        raise _misfit(folder, f"{type(error).__name__}: {error}") from error
    if task != config.task:
        raise _misfit(folder, f"trained on {task}, not {config.task}")
    if act:
        rule = build_rule(config, spec)
    learner = build_learner(config, spec, device, rule)
    restore(learner.load_policy_state, state, folder)
    return Run(config, learner, steps)


def restore(load, state: dict, folder: Path) -> None:
    """Gives a learner its part of a checkpoint and turns a misfit into one clear line."""
    try:
        load(state["learner"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _misfit(folder, f"{type(error).__name__}: {error}") from error


def _misfit(folder: Path, reason: str) -> CheckpointError:
    said = " ".join(reason.split())[:160]
    return CheckpointError(f"the checkpoint in {folder} does not fit its config.yaml ({said}): restore the config it was made with")


class Actor(Protocol):
    """Who acts."""

    def reset(self, rows: int) -> None:
        """Forgets: a new episode begins in every row."""

    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``, or float32 ``[A, E, U]``."""
        ...


class PolicyActor:
    """A policy file as an actor.

    Args:
        policy: Who decides.
        sample: Draw actions from its distribution instead of taking the best or likeliest.
        generator: Source of the draws; torch's own when None.
    """

    def __init__(self, policy: Policy, sample: bool = False, generator: torch.Generator | None = None) -> None:
        self._policy, self._sample, self._generator = policy, sample, generator
        self._state: Tensor | None = None

    def reset(self, rows: int) -> None:
        """Forgets: a new episode begins in every row."""
        self._state = None

    def __call__(self, observation: Observation) -> Tensor:
        """Acts on ``[A, E, D]``; returns int64 ``[A, E]``, or float32 ``[A, E, U]``."""
        actions, self._state = self._policy.act(
            observation.obs, self._state, avail=observation.avail, sample=self._sample, generator=self._generator
        )
        return actions


@dataclass(frozen=True)
class Player:
    """A trained policy and the environments it was trained for.

    Attributes:
        actor: Who acts.
        make_env: Makes so many parallel environments.
        task: Their task.
        name: ``algo-sharing``, or ``random``.
        steps: Environment steps of training.
        policy: The policy file that acts, if it is one.
    """

    actor: Actor
    make_env: Callable[[int], TeamEnv]
    task: str
    name: str
    steps: int
    policy: Policy | None = None


def open_run(
    folder: Path, device: torch.device | str = "cpu", phase: Phase = "deploy", random: bool = False, sample: bool = False, seed: int = 0
) -> Player:
    """A run's newest policy; see :func:`load_run`.

    Args:
        folder: Run folder.
        device: Where to play.
        phase: Which masks act.
        random: Play at random instead.
        sample: Draw actions from the policy's distribution.
        seed: Seed of what is drawn.

    Raises:
        UsageError: Actions are to be drawn, and the policy is no distribution.
    """
    run = load_run(folder, device, act=True)
    actor = run.learner.random_actor() if random else run.learner.actor(phase, sample, seed)
    name = "random" if random else f"{run.config.algo}-{run.config.sharing}"

    def make(n_envs: int) -> TeamEnv:
        env = build_env(run.config, n_envs, device)
        if env.spec != run.learner.spec:
            raise _misfit(folder, f"trained on {run.learner.spec}, not {env.spec}")
        return env

    return Player(actor, make, run.config.task, name, run.steps)


def open_policy(
    path: Path,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    env_args: tuple[str, ...] = (),
    random: bool = False,
    task: str | None = None,
    sample: bool = False,
) -> Player:
    """A policy file.

    Args:
        path: The file.
        device: Where to play.
        backend: What runs it; see :func:`k24.kernels.prepare`.
        env_args: Arguments of its task, each as name=value; those it was trained with when empty.
        random: Play at random instead.
        task: What to play; the task it was trained on when None. A file can name a task, but not make us import code of its choice.
        sample: Draw actions from the policy's distribution, by torch's own random numbers.

    Raises:
        UsageError: The file is no policy, cannot run here, has no distribution to draw from, or its task is not known or has other sizes.
    """
    policy = load_policy(path, device, backend)
    spec = policy.spec
    if task is None and not is_listed(spec.task):
        raise UsageError(
            f"{path} was trained on {spec.task!r}, which is none of k24's own tasks: if it is code that you trust, name it with --task"
        )
    if spec.slots == "given":
        raise UsageError(f"{path} is told its slots by a function of its trainer's, which no file holds: play the run folder instead")
    config = TrainConfig(task=task or spec.task, env_args=env_args or spec.env_args)
    continuous = KINDS[spec.action].continuous
    if sample and not KINDS[spec.action].stochastic:
        raise UsageError(f"{path} is a {spec.action} policy, which has no distribution to draw from: leave sample out")

    def make(n_envs: int) -> TeamEnv:
        env = build_env(config, n_envs, device)
        if continuous != env.spec.continuous:
            ours, theirs = ("continuous" if each else "discrete" for each in (continuous, env.spec.continuous))
            raise UsageError(
                f"{path} gives {ours} actions (a {spec.action} policy), and {config.task} takes {theirs} ones here: give the arguments it "
                f"was trained with"
            )
        wanted, found = ((s.n_agents, s.obs_dim, s.n_actions) for s in (spec, env.spec))
        if wanted != found:
            remedy = f"give the arguments it was trained with, as in --env-args n_agents={spec.n_agents}"
            if config.task != spec.task:
                remedy = "a policy plays what has the sizes of its own task"
            raise UsageError(
                f"{path} is for {spec.task} with (agents, observation, actions) = {wanted}, and {config.task} has {found} here: {remedy}"
            )
        if isinstance(spec.slots, tuple) and spec.slots != env.spec.unit_types:
            raise UsageError(
                f"{path} reads unit types from features {list(spec.slots)}, and {config.task} has them in {env.spec.unit_types}"
            )
        return env

    if random:
        generator = torch.Generator(device).manual_seed(0)
        return Player(RandomActor(spec.n_actions, generator, continuous), make, config.task, "random", spec.steps)
    return Player(PolicyActor(policy, sample), make, config.task, f"{spec.algo}-{spec.sharing}", spec.steps, policy)


class Played(NamedTuple):
    """What came of some episodes.

    Attributes:
        returns: Undiscounted, summed over agents and steps, float64 ``[episodes]``.
        won: bool ``[episodes]``; None where the task knows no victory.
    """

    returns: Tensor
    won: Tensor | None = None


def play(actor: Actor, env: TeamEnv, episodes: int, seed: int = EVAL_SEED) -> Played:
    """Plays episodes.

    Args:
        actor: Who acts.
        env: Environments; rounds of ``env.n_envs`` episodes are played.
        episodes: Episodes wanted.
        seed: Seed of the first round.
    """
    rounds = -(-episodes // env.n_envs)
    # Anything that acts will do.
    played = [collect_episodes(env, actor, seed + k) for k in range(rounds)]  # type: ignore[arg-type]
    returns = torch.cat([batch.returns() for batch in played])[:episodes].double().cpu()
    won = [batch.won for batch in played if batch.won is not None]
    return Played(returns, torch.cat(won)[:episodes].cpu() if won else None)


def summary(played: Played) -> dict:
    """Mean return and its 95% interval (normal approximation over episodes); where episodes can be won, the share that was (Wilson's)."""
    returns, n = played.returns, len(played.returns)
    mean = float(returns.mean())
    half = 1.96 * float(returns.std(correction=1)) / n**0.5 if n > 1 else 0.0
    found = {"return_mean": mean, "return_ci95": [mean - half, mean + half], "episodes": n}
    if played.won is not None:
        rate, z2 = float(played.won.double().mean()), 1.96**2
        centre, half = (rate + z2 / (2 * n)) / (1 + z2 / n), 1.96 / (1 + z2 / n) * (rate * (1 - rate) / n + z2 / (4 * n * n)) ** 0.5
        found |= {"win_rate": rate, "win_rate_ci95": [max(centre - half, 0.0), min(centre + half, 1.0)]}
    return found


def require_picture(env: TeamEnv) -> Tensor:
    """A picture of an environment that has been reset.

    Raises:
        UsageError: It cannot be drawn.
    """
    picture = env.render()
    if picture is None:
        raise UsageError("this environment cannot be drawn: leave --gif out")
    return picture


def record_gif(actor: Actor, env: TeamEnv, path: Path, seed: int = EVAL_SEED) -> None:
    """Plays one episode in environment 0 and saves it as a moving picture.

    Raises:
        UsageError: The environment cannot be drawn.
    """
    import imageio.v3 as iio

    observation = env.reset(seed)
    actor.reset(env.n_envs)
    frames: list[Tensor | None] = [require_picture(env)]
    for _ in range(env.spec.episode_limit):
        step = env.step(actor(observation))
        if bool(step.terminated[0] | step.truncated[0]):
            break
        observation = step.current
        frames.append(env.render())
    pictures = [f.cpu().numpy() for f in frames if f is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Milliseconds; a pause where it begins and a longer one where it ends.
    shown = [700, *[100] * (len(pictures) - 2), 1500][-len(pictures) :]
    iio.imwrite(path, pictures, extension=".gif", duration=shown, loop=0)
