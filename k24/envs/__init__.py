"""Environments behind one protocol, made by name.

``make_env("mpe/simple_spread", 32)`` imports the one module that the task needs; ``import k24.envs`` imports no simulator. A suite
is a module with a table ``TASKS`` (task -> what it is about) and a function ``make(task, n_envs, device, **kwargs)``; neither may need the
simulator to be installed before ``make`` is called. To add one, write such a module and name it in ``SUITES``; to run an
environment of your own without that, subclass ``TeamEnv`` and try it with ``check_env``.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch

from k24.envs.base import EnvSpec, Observation, Outcome, SingleEnv, Step, TeamEnv, View
from k24.envs.check import check_env
from k24.errors import UsageError, unknown_name

__all__ = [
    "SUITES",
    "EnvSpec",
    "Observation",
    "Outcome",
    "SingleEnv",
    "Step",
    "Suite",
    "TaskRow",
    "TeamEnv",
    "View",
    "check_env",
    "list_tasks",
    "make_env",
]


class Suite(NamedTuple):
    """Where a family of tasks comes from.

    Attributes:
        module: The adapter's module path.
        package: The package it needs beyond k24's own; None where there is none.
        extra: The extra of k24 that installs it, as in ``pip install 'k24[vmas]'``.
        about: One line for people.
    """

    module: str
    package: str | None
    extra: str | None
    about: str


SUITES = {
    "toy": Suite("k24.envs.toy", None, None, "games of a few steps with a known best return, to test learners"),
    "mpe": Suite("k24.envs.vmas", "vmas", "mpe", "multi-agent particle environments, simulated in batches by VMAS"),
    "vmas": Suite("k24.envs.vmas", "vmas", "vmas", "VMAS's own scenarios, and blind particle spread"),
    "mpe2": Suite("k24.envs.mpe2", "mpe2", "mpe", "Farama's multi-agent particle environments, the reference; slower"),
}


class TaskRow(NamedTuple):
    """One line of ``k24 tasks``.

    Attributes:
        task: ``suite/name``.
        suite: The suite alone.
        available: Whether what it needs is installed.
        how: The command that trains on it, or the one that installs what is missing.
    """

    task: str
    suite: str
    available: bool
    how: str


def make_env(task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: object) -> TeamEnv:
    """Makes a batch of environments by name.

    Args:
        task: ``suite/name``, e.g. ``"mpe/simple_spread"``; see ``list_tasks``.
        n_envs: Parallel environments (E).
        device: Where tensors live.
        **kwargs: Options of the task, e.g. ``n_agents``; ``max_steps`` sets the episode limit of every simulated one.

    Raises:
        UsageError: An unknown task or option, a size that makes no sense, or a package that is not installed.
    """
    suite_name, slash, _ = task.partition("/")
    if not slash:
        raise unknown_name("task", task, [row.task for row in list_tasks()])
    if suite_name not in SUITES:
        raise unknown_name("environment suite", suite_name, SUITES)
    suite = SUITES[suite_name]
    module = importlib.import_module(suite.module)
    tasks = _tasks_of(suite_name, module)
    if task not in tasks:
        raise unknown_name("task", task, tasks)
    if not isinstance(n_envs, int) or n_envs < 1:
        raise UsageError(f"{task}: n_envs must be a whole number of at least 1, got {n_envs!r}")
    max_steps = kwargs.get("max_steps")
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
        raise UsageError(f"{task}: max_steps must be a whole number of at least 1, got {max_steps!r}")
    if not _installed(suite):
        raise UsageError(f"{task} needs the package {suite.package!r}, which is not installed: {_install(suite)}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{task}: unknown device {device!r}: expected cpu, cuda or cuda:<index>") from error
    try:
        return module.make(task, n_envs, where, **kwargs)
    except ImportError as error:
        raise UsageError(f"{task} needs the package {suite.package!r}, which does not import ({error}): {_install(suite)}") from error
    except UsageError:
        raise
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        # Simulators check their options in ways of their own, or not at all.
        given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        if not given:
            raise
        raise UsageError(f"{task} can't be made with {given}: {error}") from error


def list_tasks() -> list[TaskRow]:
    """Lists every task of every suite, installed or not."""
    rows = []
    for name, suite in SUITES.items():
        available = _installed(suite)
        for task in _tasks_of(name, importlib.import_module(suite.module)):
            rows.append(TaskRow(task, name, available, f"k24 train {task}" if available else _install(suite)))
    return rows


def _tasks_of(suite_name: str, module: ModuleType) -> list[str]:
    """The tasks of one suite; two suites may share a module."""
    return [task for task in module.TASKS if task.startswith(f"{suite_name}/")]


def _installed(suite: Suite) -> bool:
    return suite.package is None or importlib.util.find_spec(suite.package) is not None


def _install(suite: Suite) -> str:
    return f"pip install 'k24[{suite.extra}]'"
