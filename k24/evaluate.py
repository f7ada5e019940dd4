"""Playing a trained policy, and reading a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k24.checkpoint import load_checkpoint
from k24.config import TrainConfig, load_config
from k24.envs import TeamEnv, make_env
from k24.errors import CheckpointError, UsageError
from k24.learners import Learner, RandomActor, ValueActor, collect_episodes, make_learner
from k24.sharing import make_sharing

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


def build_learner(config: TrainConfig, env: TeamEnv) -> Learner:
    """A fresh learner of a configuration."""
    sharing = make_sharing(config.sharing, env.spec.n_agents, config.sharing_config)
    return make_learner(config.algo, env.spec, sharing, config.learner, config.hidden, config.append_id, config.seed, env.device)


def build_env(config: TrainConfig, n_envs: int, device: torch.device | str = "cpu") -> TeamEnv:
    """The environments of a configuration."""
    return make_env(config.task, n_envs, device, **config.env_kwargs)


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


def load_run(folder: Path, device: torch.device | str = "cpu") -> Run:
    """Reads a run folder.

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
    found = load_checkpoint(folder / "checkpoints", device)
    if found is None:
        raise UsageError(f"{folder} has no checkpoint yet: train longer, or resume it with --resume")
    steps, state = found
    env = build_env(config, 1, device)
    learner = build_learner(config, env)
    restore(learner.load_policy_state, state, folder)
    return Run(config, learner, steps)


def restore(load, state: dict, folder: Path) -> None:
    """Gives a learner its part of a checkpoint and turns a misfit into one clear line."""
    try:
        load(state["learner"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"the checkpoint in {folder} does not fit its config.yaml ({type(error).__name__}: {reason}): restore the "
            f"config it was made with"
        ) from error


def play(actor: ValueActor | RandomActor, env: TeamEnv, episodes: int, seed: int = EVAL_SEED) -> Tensor:
    """Undiscounted returns, summed over agents and steps.

    Args:
        actor: Who acts.
        env: Environments; rounds of ``env.n_envs`` episodes are played.
        episodes: Episodes wanted.
        seed: Seed of the first round.

    Returns:
        float64 ``[episodes]``.
    """
    rounds = -(-episodes // env.n_envs)
    returns = [collect_episodes(env, actor, seed + k).returns() for k in range(rounds)]
    return torch.cat(returns)[:episodes].double().cpu()


def summary(returns: Tensor) -> dict:
    """Mean and its 95% interval (normal approximation over episodes).

    Args:
        returns: ``[episodes]``.
    """
    mean = float(returns.mean())
    half = 1.96 * float(returns.std(correction=1)) / len(returns) ** 0.5 if len(returns) > 1 else 0.0
    return {"return_mean": mean, "return_ci95": [mean - half, mean + half], "episodes": len(returns)}


def record_gif(actor: ValueActor | RandomActor, env: TeamEnv, path: Path, seed: int = EVAL_SEED) -> None:
    """Plays one episode in environment 0 and saves it as a moving picture.

    Raises:
        UsageError: The environment cannot be drawn.
    """
    import imageio.v3 as iio

    observation = env.reset(seed)
    actor.reset(env.n_envs)
    frames = [env.render()]
    if frames[0] is None:
        raise UsageError("this environment cannot be drawn: leave --gif out")
    for _ in range(env.spec.episode_limit):
        step = env.step(actor(observation))
        if bool(step.terminated[0] | step.truncated[0]):
            break
        observation = step.current
        frames.append(env.render())
    pictures = [f.cpu().numpy() for f in frames if f is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, pictures, extension=".gif", duration=100, loop=0)
