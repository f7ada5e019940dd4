"""Environments of the user's own: ``package.module:function``, found as Python finds modules, the current folder included.

The function comes in two kinds. One that takes ``n_envs`` makes a whole batch: ``make(n_envs, device, **options) -> TeamEnv``. Any other
makes one environment, ``make(**options)``, a ``SingleEnv`` or a PettingZoo parallel environment; copies of it run in worker processes.
Options are those given as ``--env-args name=value``.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from k24.envs.base import Observation, SingleEnv, Step, TeamEnv
from k24.envs.batch import describe
from k24.errors import K24Error, RunError, UsageError, unknown_name

TASKS: dict[str, str] = {}


def load(path: str) -> Callable[..., Any]:
    """Imports ``package.module:function``.

    Raises:
        UsageError: There is no such module or function, or the module does not import.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not name.isidentifier():
        raise UsageError(f"{path!r} is no import path: expected package.module:function, for example my_package.my_env:make")
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed command has its own folder there, and not the user's
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # Whatever a user's module raises while it is imported.
        said = f"{type(error).__name__}: {error}" if isinstance(error, ModuleNotFoundError) else describe(error)
        raise UsageError(f"{path}: the module {module_name!r} does not import ({said})") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise UsageError(f"{module_name}: {unknown_name('function', name, public)}")
    return function


def is_batched(function: Callable[..., Any]) -> bool:
    """Whether a user's function makes a whole batch."""
    return "n_envs" in inspect.signature(function).parameters


class OwnBatch(TeamEnv):
    """A user's batch of environments, whose exceptions say where they come from.

    Args:
        task: Its name.
        env: The user's.
    """

    def __init__(self, task: str, env: TeamEnv) -> None:
        self._task, self._env = task, env
        self.spec, self.n_envs, self.device, self.sides = env.spec, env.n_envs, env.device, env.sides

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        with _told(f"{self._task}: reset"):
            return self._env.reset(seed)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        with _told(f"{self._task}: step"):
            return self._env.step(actions)

    def close(self) -> None:
        """See ``TeamEnv.close``."""
        self._env.close()

    def render(self) -> Tensor | None:
        """See ``TeamEnv.render``."""
        with _told(f"{self._task}: render"):
            return self._env.render()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns whatever a user's code raises into one line."""
    try:
        yield
    except K24Error:
        raise
    except Exception as error:
        raise RunError(f"{what} raised {describe(error)}") from error


def make(task: str, n_envs: int, device: torch.device, **kwargs: object) -> TeamEnv:
    """Makes a batch by a function that takes ``n_envs``.

    Raises:
        UsageError: It returned something else.
        RunError: It raised an exception.
    """
    with _told(task):
        env = load(task)(n_envs=n_envs, device=device, **kwargs)
    if not isinstance(env, TeamEnv):
        raise UsageError(f"{task} takes n_envs, so it must return a k24.envs.TeamEnv, got {type(env).__name__}")
    return OwnBatch(task, env)


def make_one(task: str, **kwargs: object) -> SingleEnv:
    """Makes one environment by a function that doesn't take ``n_envs``.

    Raises:
        UsageError: It returned something else.
    """
    env = load(task)(**kwargs)
    if isinstance(env, SingleEnv):
        return env
    if hasattr(env, "possible_agents") and hasattr(env, "observation_space"):
        from k24.envs.pettingzoo import ParallelTeam

        return ParallelTeam(env)
    raise UsageError(
        f"{task} must return a k24.envs.SingleEnv or a PettingZoo parallel environment, got {type(env).__name__}; a function that makes a "
        f"whole batch (k24.envs.TeamEnv) takes n_envs"
    )
