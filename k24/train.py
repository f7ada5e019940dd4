"""The training loop: gather, learn, log, evaluate, save. It has no branch on the algorithm, the scheme or the task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.allocator import keep_freed_memory, told_when_memory_is_short
from k24.checkpoint import KEEP, load_checkpoint, save_checkpoint
from k24.config import TrainConfig, first_difference, load_config, save_config
from k24.envs import TeamEnv
from k24.errors import UsageError
from k24.evaluate import EVAL_SEED, build_env, build_learner, pinned, play, resolve_device, restore, summary
from k24.files import hold_folder, write_atomically
from k24.inspection import costs_of
from k24.learners import Learner, collect_episodes
from k24.learners.rollout import slots_of
from k24.sharing import Experience
from k24.sparse.slots import Phase

# Settings that may differ when a run is resumed: none of them changes what is learned.
MAY_DIFFER = ("device", "threads", "workers", "checkpoint_every")
# What is logged of an evaluation, and which masks act in it.
EVALUATED: dict[str, Phase] = {"eval": "deploy", "eval_act": "act"}


@dataclass(frozen=True)
class Progress:
    """What a run reports of itself.

    Attributes:
        steps: Environment steps done.
        total: Environment steps wanted.
        steps_per_second: Since this process began.
        metrics: The newest metrics, evaluations included.
    """

    steps: int
    total: int
    steps_per_second: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        folder: The run folder.
        steps: Environment steps done.
        finished: False if it was asked to stop before the end; it can be resumed.
        evaluation: What ``eval.json`` holds; empty unless finished.
        steps_per_second: Of this process, everything included.
    """

    folder: Path
    steps: int
    finished: bool
    evaluation: dict[str, Any]
    steps_per_second: float


class MetricLog:
    """``metrics.jsonl`` and TensorBoard events, cut back to a checkpoint's step when a run is resumed."""

    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = []
        if steps and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["steps"] <= steps:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut short
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._board = SummaryWriter(str(folder), purge_step=steps + 1)

    def write(self, steps: int, metrics: dict[str, float]) -> None:
        """Logs one line."""
        self._file.write(json.dumps({"steps": steps, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, steps)
        self._board.flush()

    def close(self) -> None:
        """Writes what is pending."""
        self._file.close()
        self._board.close()


def default_folder(config: TrainConfig) -> Path:
    """``results/<task>/<algo>-<sharing>/seed<k>``."""
    return Path("results") / config.task / f"{config.algo}-{config.sharing}" / f"seed{config.seed}"


def check_folder(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Checks that a run may start in a folder, or go on there; writes nothing.

    Raises:
        UsageError: It exists and ``resume`` is not set, it holds a run of another configuration, or it can't be read.
    """
    try:
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not held:
        return
    if not resume:
        raise UsageError(f"run folder {folder} exists: add --resume to go on with it, or choose another --out")
    if "config.yaml" in held:
        difference = first_difference(load_config(folder / "config.yaml"), config, MAY_DIFFER)
        if difference is not None:
            name, old, new = difference
            raise UsageError(
                f"{folder} was started with {name}={old}, now it is {new}: resume with the same settings, or choose another --out"
            )
    elif not all(is_half_begun(name) for name in held):
        raise UsageError(f"{folder} is not empty and holds no config.yaml: choose another --out")


def is_half_begun(name: str) -> bool:
    """Whether a file in a run folder is the configuration of a run that was killed while it wrote that."""
    return name.startswith("config.yaml.") and name.endswith(".tmp")


def prepare_folder(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Makes a run folder, or checks that one may be resumed.

    Raises:
        UsageError: As for :func:`check_folder`, or it can't be written.
    """
    check_folder(config, folder, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            save_config(config, folder / "config.yaml")
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write the run folder {folder} ({error.strerror}): choose another --out")


def train(
    config: TrainConfig,
    folder: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Trains, and leaves a run folder behind.

    The folder holds ``config.yaml``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/`` and, once finished, ``eval.json``.

    Args:
        config: The run.
        folder: Where; ``default_folder(config)`` when None.
        resume: Go on with the run in ``folder``, from the start if it was killed before its first checkpoint.
        on_progress: Called after every round.
        should_stop: Asked after every round; when it says yes, a checkpoint is written and the run ends, to be resumed later.

    Raises:
        UsageError: Something is wrong before anything starts, or another process trains in the folder.
        RunError: Something failed while running; the last checkpoint is good.
    """
    if not config.task:
        raise UsageError("no task given: 'k24 tasks' lists them, for example mpe/simple_spread")
    with told_when_memory_is_short("use less of buffer_size, batch_size, envs, eval_episodes or hidden, or shorter episodes"):
        return _train(config, folder, resume, on_progress, should_stop)


def _train(
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Result:
    folder, config = folder or default_folder(config), pinned(config)
    check_folder(config, folder, resume)  # before environments are built, which takes seconds
    device = resolve_device(config.device)
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    env = build_env(config, config.envs, device)
    eval_env = build_env(config, config.eval_episodes, device)
    try:
        learner = build_learner(config, env.spec, env.device)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        with hold_folder(folder) as mine:
            if not mine:
                raise UsageError(f"another process trains in {folder}: wait for its end, stop it, or choose another --out")
            prepare_folder(config, folder, resume)  # only now, or it would be another one's that began at the same moment
            return _rounds(config, folder, learner, env, eval_env, resume, on_progress, should_stop)
    finally:
        env.close()
        eval_env.close()


def _rounds(
    config: TrainConfig,
    folder: Path,
    learner: Learner,
    env: TeamEnv,
    eval_env: TeamEnv,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Result:
    """Rounds of gathering and learning in a folder that is ours, from its newest checkpoint on."""
    steps = rounds = 0
    next_log, next_eval, next_checkpoint = 0, 0, config.checkpoint_every
    metrics: dict[str, float] = {}
    found = load_checkpoint(folder / "checkpoints", env.device) if resume else None
    if found is not None:
        steps, state = found
        restore(learner.load_state_dict, state, folder)
        rounds, next_log, next_eval, next_checkpoint = (int(state[k]) for k in ("rounds", "next_log", "next_eval", "next_checkpoint"))
        metrics = dict(state["metrics"])
    elif learner.sharing.random_play:
        # Built anew, so that targets and all else begin with what the scheme has made of it.
        learner = build_learner(config, env.spec, env.device, experience=play_at_random(learner, env, config.seed))
    first, start = steps, time.perf_counter()
    log = MetricLog(folder, steps)

    def save() -> None:
        final = steps >= config.steps
        save_checkpoint(
            folder / "checkpoints",
            steps,
            {
                "learner": learner.final_state_dict() if final else learner.state_dict(),
                "task": config.task,
                "spec": asdict(env.spec),
                "n_slots": learner.rule.n_slots,
                "unit_types": learner.rule.unit_types,
                "rounds": rounds,
                "next_log": next_log,
                "next_eval": next_eval,
                "next_checkpoint": next_checkpoint,
                "metrics": metrics,
            },
            keep=1 if final else KEEP,
        )

    def speed() -> float:
        return (steps - first) / max(time.perf_counter() - start, 1e-9)

    try:
        while steps < config.steps:
            episodes = learner.gather(env, steps, seed=round_seed(config.seed, rounds))
            steps, rounds = steps + episodes.steps, rounds + 1
            learner.learn(min(steps / config.steps, 1.0), steps)
            metrics["return_train"] = float(episodes.returns().mean())
            done = steps >= config.steps
            if steps >= min(next_log, next_eval) or done:
                if steps >= next_log:
                    next_log = _after(steps, config.log_every)
                measured = {"return_train": metrics["return_train"], **learner.metrics()}
                if steps >= next_eval or done:
                    next_eval = _after(steps, config.eval_every)
                    for name, phase in EVALUATED.items():
                        outcome = summary(play(learner.actor(phase), eval_env, config.eval_episodes))
                        measured[f"return_{name}"] = outcome["return_mean"]
                        if "win_rate" in outcome:
                            measured[f"win_rate_{name}"] = outcome["win_rate"]
                if env.restarts + eval_env.restarts:
                    measured["env_restarts"] = float(env.restarts + eval_env.restarts)
                log.write(steps, measured)
                metrics |= measured
            if on_progress is not None:
                on_progress(Progress(steps, config.steps, speed(), metrics))
            stop = should_stop is not None and should_stop()
            if (stop or steps >= next_checkpoint) and not done:
                next_checkpoint = _after(steps, config.checkpoint_every)
                save()
                if stop:
                    return Result(folder, steps, False, {}, speed())
        rate = speed()
        if steps > first:
            save()
        evaluation = {
            **summary(play(learner.actor("deploy"), eval_env, max(config.eval_episodes, config.final_episodes), EVAL_SEED + 500)),
            **costs_of(learner),
            "steps": steps,
            "task": config.task,
        }
        write_atomically(folder / "eval.json", json.dumps(evaluation, indent=1).encode())
        return Result(folder, steps, True, evaluation, rate)
    finally:
        log.close()


def play_at_random(learner: Learner, env: TeamEnv, seed: int) -> Experience:
    """Whole rounds of random play, until there is as much as the learner's scheme wants to see before training.

    Args:
        learner: The learner.
        env: The training environments.
        seed: Seed of the run; rounds have seeds of their own.
    """
    actor, steps = learner.random_actor(), 0
    parts: list[list[Tensor]] = []
    while steps < learner.sharing.random_play:
        episodes = collect_episodes(env, actor, round_seed(seed, -1 - len(parts))).cut()
        steps += episodes.steps
        slots, alive = slots_of(learner.rule, episodes.obs, episodes.alive)
        if slots is None:
            slots = torch.arange(len(episodes.obs), device=env.device)[:, None, None].expand(episodes.obs.shape[:-1])
            slots = slots if alive is None else slots.where(alive, -1)
        # Of a unit that dies, or becomes another one, nobody knows what its action led to.
        kept = episodes.valid & (slots[:, :-1] >= 0) & (slots[:, 1:] == slots[:, :-1])
        actions = episodes.actions if env.spec.continuous else F.one_hot(episodes.actions, env.spec.n_actions).float()
        rows = (slots[:, :-1], episodes.obs[:, :-1], actions, episodes.reward, episodes.obs[:, 1:])
        parts.append([part[kept] for part in rows])
    return Experience(steps, *(torch.cat(column) for column in zip(*parts, strict=True)))


def round_seed(seed: int, rounds: int) -> int:
    """Seed of a round of episodes: a pure function of the run's seed and the round, so that a resumed run meets the same episodes."""
    return (seed * 1_000_003 + rounds * 7919 + 17) % 2**31


def _after(steps: int, every: int) -> int:
    """The first multiple of ``every`` that lies ahead."""
    return (steps // every + 1) * every
