"""An environment of your own: written, checked, trained by its import path.

    python examples/03_own_environment.py
    python examples/03_own_environment.py --steps 20000 --out results/own

``Corridor`` is all that you write: a batch of environments as tensors, with ``reset`` and ``step``. (A simulator of one environment in
numpy is less work: a ``k24.envs.SingleEnv``, see docs/environments.md.) ``check_env`` plays it at random and says which rule of the
contract it breaks, if any. Then a task name of the form ``module:function`` trains it, here and on the command line.

A file whose name begins with a digit cannot be imported, so this one puts a copy of itself into the folder as ``corridor.py``; where that
lies, ``k24 check-env corridor:make`` and ``k24 train corridor:make`` find it too.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from k24.envs import EnvSpec, Observation, Step, TeamEnv, check_env, make_env
from k24.errors import RunError, UsageError


class Corridor(TeamEnv):
    """Three agents walk along five cells, and each has a door of its own that nobody shows it.

    Agent i is at home at cell 2i. It sees its cell alone, and earns 1/3 for each step that ends at home. Who acts alike cannot win.
    """

    cells, limit = 5, 8

    def __init__(self, n_envs: int, device: str | torch.device = "cpu", n_agents: int = 3) -> None:
        if not 1 <= n_agents <= 3:
            raise UsageError(f"n_agents must be 1 to 3, got {n_agents}: there are three doors")
        self.n_envs, self.device = n_envs, torch.device(device)
        self.spec = EnvSpec(n_agents, obs_dim=self.cells, state_dim=n_agents * self.cells, n_actions=3, episode_limit=self.limit)
        self._doors = 2 * torch.arange(n_agents, device=self.device)[:, None]
        self._random = torch.Generator(self.device)  # of its own: the global one is left alone

    def reset(self, seed: int) -> Observation:
        """The same seed repeats the same episodes."""
        self._random.manual_seed(seed)
        return self._begin()

    def step(self, actions: Tensor) -> Step:
        """Takes int64 ``[agents, envs]``: 0 left, 1 stay, 2 right."""
        self._clock += 1
        self._cell = (self._cell + actions - 1).clamp(0, self.cells - 1)
        reward = (self._cell == self._doors) / self.spec.n_agents
        over = self._clock == self.limit
        after = self._look()
        # A time limit cuts the episode: truncated. Where the task itself ends, it is terminated. All environments keep the same time here.
        truncated = torch.full((self.n_envs,), over, device=self.device)
        return Step(after, self._begin() if over else after, reward, torch.zeros_like(truncated), truncated)

    def _begin(self) -> Observation:
        self._clock = 0
        shape = (self.spec.n_agents, self.n_envs)
        self._cell = torch.randint(self.cells, shape, generator=self._random, device=self.device)
        return self._look()

    def _look(self) -> Observation:
        obs = F.one_hot(self._cell, self.cells).float()
        return Observation(obs, obs.transpose(0, 1).flatten(1))  # the state is what all see, side by side


def make(n_envs: int, device: torch.device, **options: int) -> TeamEnv:
    """What the import path names; options are those of ``--env-args``."""
    return Corridor(n_envs, device, **options)


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    steps: int = 8000
    """Environment steps."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder for the module and the run; a temporary one when not given."""


class Sloppy(Corridor):
    """A usual mistake: rewards in double precision, where learners want float32."""

    def step(self, actions: Tensor) -> Step:
        step = super().step(actions)
        return replace(step, reward=step.reward.double())


def mean_return(env: TeamEnv, choose: Callable[[Tensor], Tensor]) -> float:
    """What a team earns in an episode, by a function from observations ``[agents, envs, features]`` to actions."""
    total, observation = 0.0, env.reset(seed=1)
    for _ in range(env.spec.episode_limit):
        step = env.step(choose(observation.obs))
        total, observation = total + float(step.reward.sum(0).mean()), step.current
    return total


def importable(folder: Path) -> str:
    """Puts a copy of this file where it can be imported, and returns the task's name."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "corridor.py")
    sys.path.insert(0, str(folder))
    return "corridor:make"


def main(options: Options, folder: Path) -> None:
    """Checks, trains, and says what came of it."""
    # Imported here, because a copy of this file is also the module of the environment, which needs none of it.
    from k24.config import TrainConfig
    from k24.learners import ValueConfig
    from k24.train import train

    passed = check_env(lambda: Corridor(n_envs=4))
    print(f"Corridor             keeps the contract: {', '.join(passed[:3])} and {len(passed) - 3} other checks")
    try:
        check_env(lambda: Sloppy(n_envs=4))
    except RunError as error:
        print(f"Sloppy               breaks it: {error}")

    config = TrainConfig(
        task=importable(folder),
        algo="vdn",
        steps=options.steps,
        seed=options.seed,
        envs=16,
        hidden=32,
        device="cpu",
        learner=ValueConfig(lr=5e-3, batch_size=32, buffer_size=256, env_steps_per_update=16, target_update=20, epsilon_anneal=2000),
    )
    result = train(config, folder / "run")
    print(f"trained              {config.task} with {config.algo}-{config.sharing}, {result.steps:,} steps")

    env, chance = make_env(config.task, 4096), torch.Generator().manual_seed(0)
    doors = torch.tensor([[0], [2], [4]])
    print(f"return by chance     {mean_return(env, lambda obs: torch.randint(3, obs.shape[:2], generator=chance)):.2f}")
    print(f"return               {result.evaluation['return_mean']:.2f}")
    print(f"best return          {mean_return(env, lambda obs: (doors - obs.argmax(-1)).sign() + 1):.2f}")
    print(f"go on with           cd {folder} && k24 eval run")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-own-")))
