"""Environments of the user's own: ``package.module:function``, found as Python finds modules, the current folder included.

The function comes in two kinds. One that takes ``n_envs`` makes a whole batch: ``make(n_envs, device, **options) -> TeamEnv``. Any other
makes one environment, ``make(**options)``, a ``SingleEnv`` or a PettingZoo parallel environment; copies of it run in worker processes.
Options are those given as ``--env-args name=value``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from k24.envs.base import Observation, SingleEnv, Step, TeamEnv
from k24.envs.check import Given, require_observation, require_spec, require_step
from k24.errors import RAISED, K24Error, RunError, UsageError, describe, unknown_name

TASKS: dict[str, str] = {}

_log = logging.getLogger("k24")


def load(path: str) -> Callable[..., Any]:
    """Imports ``package.module:function``.

    Raises:
        UsageError: There is no such module or function, or the module does not import.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not name.isidentifier():
        raise UsageError(f"{path!r} is no import path: expected package.module:function, for example my_package.my_env:make")
    if "" not in sys.path:
        sys.path.append("")  # an installed command has its own folder first, and not the user's; last, so as to hide nothing installed
    try:
        module = importlib.import_module(module_name)
    except RAISED as error:
        # Whatever a user's module raises while it is imported.
        said = f"{type(error).__name__}: {error}" if isinstance(error, ModuleNotFoundError) else describe(error)
        raise UsageError(f"{path}: the module {module_name!r} does not import ({said})") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise UsageError(f"{module_name}: {unknown_name('function', name, public)}")
    return function


def is_batched(function: Callable[..., Any]) -> bool:
    """Whether a user's function makes a whole batch.

    Raises:
        UsageError: It doesn't say what it takes, as some that are not written in Python.
    """
    return "n_envs" in _parameters(function)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"expected a function whose parameters can be looked up, got {function!r}: write one in Python") from error


def _require_options(task: str, function: Callable[..., Any], given: Iterable[str]) -> None:
    """Raises for an option that a user's function doesn't take."""
    parameters = _parameters(function)
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {name for name, one in parameters.items() if one.kind in by_name} - {"n_envs", "device"}
    for name in given:
        if name not in known:
            raise unknown_name(f"option of {task}", name, known)


class OwnBatch(TeamEnv):
    """A user's batch of environments, whose exceptions say where they come from, and whose results are looked at as they come.

    Values (finite numbers, available actions) are looked at on CPU only, for elsewhere that would wait for the device.

    Args:
        task: Its name.
        env: The user's.
        n_envs: How many parallel environments were asked for.

    Attributes:
        called: The task and the user's class, for errors.

    Raises:
        RunError: It says of itself what makes no sense, or has another number of parallel environments.
    """

    def __init__(self, task: str, env: TeamEnv, n_envs: int) -> None:
        self._task, self._env = task, env
        self.called = f"{task}: {type(env).__name__}"
        with _told(task):
            for name in ("spec", "n_envs", "device", "sides", "restarts", "may_cut"):
                setattr(self, name, getattr(env, name, None))
        require_spec(self)
        if self.n_envs != n_envs:
            raise RunError(f"{self.called}.n_envs: expected the {n_envs} that were asked for, got {self.n_envs}")
        self._values = self.device.type == "cpu"
        self._given = Given()

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        with _told(f"{self._task}: reset"):
            observation = self._env.reset(seed)
            self.restarts = self._env.restarts
        require_observation(self, "reset", "the result", observation, self._values)
        self._given.require(self, "reset", observation)
        return observation

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        with _told(f"{self._task}: step"):
            step = self._env.step(actions)
            self.restarts = self._env.restarts
        require_step(self, step, self._values)
        self._given.require(self, "step", step.after, step.current, step)
        return step

    def close(self) -> None:
        """See ``TeamEnv.close``; a failure spoils nothing that was done."""
        try:
            self._env.close()
        except RAISED as error:
            _log.warning("%s: close: %s", self._task, describe(error))

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
    except RAISED as error:
        raise RunError(f"{what} raised {describe(error)}") from error


def make(task: str, n_envs: int, device: torch.device, **kwargs: object) -> TeamEnv:
    """Makes a batch by a function that takes ``n_envs``.

    Raises:
        UsageError: It returned something else, or has no such option.
        RunError: It raised an exception, or what it made breaks the contract.
    """
    function = load(task)
    _require_options(task, function, kwargs)
    with _told(task):
        env = function(n_envs=n_envs, device=device, **kwargs)
    if not isinstance(env, TeamEnv):
        raise UsageError(f"{task} takes n_envs, so it must return a k24.envs.TeamEnv, got {type(env).__name__}")
    return OwnBatch(task, env, n_envs)


def make_one(task: str, **kwargs: object) -> SingleEnv:
    """Makes one environment by a function that doesn't take ``n_envs``.

    Raises:
        UsageError: It returned something else, has no such option, or lacks what it imports.
    """
    function = load(task)
    _require_options(task, function, kwargs)
    try:
        env = function(**kwargs)
        if isinstance(env, SingleEnv):
            return env
        if hasattr(env, "possible_agents") and hasattr(env, "observation_space"):
            from k24.envs.pettingzoo import ParallelTeam

            return ParallelTeam(env)
    except ImportError as error:
        raise UsageError(f"{task} can't be made: {describe(error)}") from error
    raise UsageError(
        f"{task} must return a k24.envs.SingleEnv or a PettingZoo parallel environment, got {type(env).__name__}; a function that makes a "
        f"whole batch (k24.envs.TeamEnv) takes n_envs"
    )
