"""Environments behind one protocol, made by name.

``make_env("mpe/simple_spread", 32)`` imports the one module that the task needs; ``import k24.envs`` imports no simulator. A suite
is a module with a table ``TASKS`` (task -> what it is about) and one of two functions: ``make(task, n_envs, device, **kwargs)`` where the
simulator steps whole batches, ``make_one(task, **kwargs)`` where it is a ``SingleEnv``, of which ``Copies`` runs many. Neither may need the
simulator to be installed before it is called. A module may also have ``accepts(task)``, for names beyond its table;
``IMPORTS = True``, where such names are import paths; and ``missing(package)``, which says what else a machine lacks. To add a suite, write
such a module and name it in ``SUITES``. An environment of your own needs none of that: ``make_env("my_package.my_env:make", 32)``, see
``k24.envs.own``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from k24.envs.base import EnvSpec, Observation, Outcome, SingleEnv, Step, TeamEnv, View
from k24.envs.check import check_env
from k24.envs.copies import Copies
from k24.envs.options import REFUSALS, refused
from k24.errors import K24Error, UsageError, unknown_name

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
    "check_options",
    "is_listed",
    "list_tasks",
    "make_env",
]


class Suite(NamedTuple):
    """Where a family of tasks comes from.

    Attributes:
        module: The adapter's module path.
        package: The package it needs beyond k24's own; None where there is none.
        extra: The extra of k24 that installs it, as in ``pip install 'k24[vmas]'``; None where pip alone can't.
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
    "pettingzoo": Suite("k24.envs.pettingzoo", "pettingzoo", "pettingzoo", "any PettingZoo parallel environment, by its import path"),
    "lbf": Suite("k24.envs.foraging", "lbforaging", "lbf", "level-based foraging"),
    "rware": Suite("k24.envs.foraging", "rware", "rware", "robotic warehouse"),
    "smax": Suite("k24.envs.smax", "jaxmarl", "smax", "StarCraft-like battles without StarCraft, simulated in batches by JaxMARL"),
    "smacv2": Suite("k24.envs.smacv2", "smacv2", None, "StarCraft II battles; needs the game"),
    "smac": Suite("k24.envs.smacv2", "smac", None, "SMAC's fixed StarCraft II battles; needs the game"),
    "mamujoco": Suite("k24.envs.mamujoco", "gymnasium_robotics", "mamujoco", "bodies of MuJoCo, their joints shared out among agents"),
}


class TaskRow(NamedTuple):
    """One line of ``k24 tasks``.

    Attributes:
        task: ``suite/name``.
        suite: The suite alone.
        available: Whether what it needs is installed.
        how: The command that trains on it, or the one that installs what is missing.
        about: One line for people.
    """

    task: str
    suite: str
    available: bool
    how: str
    about: str


def make_env(task: str, /, n_envs: int, device: str | torch.device = "cpu", workers: int | None = None, **kwargs: object) -> TeamEnv:
    """Makes a batch of environments by name.

    Args:
        task: ``suite/name``, e.g. ``"mpe/simple_spread"``, see ``list_tasks``; or ``"package.module:make"``, see ``k24.envs.own``.
        n_envs: Parallel environments (E).
        device: Where tensors live.
        workers: Processes of a simulator that steps one environment at a time; one per core when None, 0 for none but this.
        **kwargs: Options of the task, e.g. ``n_agents``; ``max_steps`` sets the episode limit of every simulated one.

    Raises:
        UsageError: An unknown task or option, a size that makes no sense, or a package that is not installed.
    """
    suite, module = _find(task)
    check_options(task, kwargs)
    for name, value, least in (("n_envs", n_envs, 1), ("workers", workers, 0), ("max_steps", kwargs.get("max_steps"), 1)):
        if value is None and name != "n_envs":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{task}: {name} must be a whole number of at least {least}, got {value!r}")
        if value >= 2**31:
            raise UsageError(f"{task}: {name} must be less than 2**31, got {value!r}")
    lacking = _lacking(suite, module)
    if lacking is not None:
        raise UsageError(f"{task} {lacking}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{task}: unknown device {device!r}: expected cpu, cuda or cuda:<index>") from error
    try:
        if suite is _OWN and module.is_batched(module.load(task)):
            return module.make(task, n_envs, where, **kwargs)
        if hasattr(module, "make_one"):
            return Copies(suite.module, task, kwargs, n_envs, where, workers)
        return module.make(task, n_envs, where, **kwargs)
    except ImportError as error:
        raise UsageError(f"{task} needs the package {suite.package!r}, which does not import ({error}): {_how(suite, module)}") from error
    except K24Error:
        raise
    except REFUSALS as error:
        # Simulators check their options in ways of their own, or not at all.
        if not kwargs:
            raise
        raise refused(task, kwargs, error) from error


def check_options(task: str, kwargs: Mapping[str, object]) -> None:
    """Raises for options of a task that are named like arguments of ``make_env``.

    Raises:
        UsageError: It names the first.
    """
    for name in ("task", "n_envs", "device", "workers"):
        if name in kwargs:
            raise UsageError(f"unknown option of {task} {name!r}: it is set for every task alike, outside the task's options")


def is_listed(task: str) -> bool:
    """Whether a task is one that k24 knows, so that making it imports nothing that its name alone chose.

    True for the tasks of ``list_tasks``, and for names like those that a suite works out. Where False, a name found in somebody else's file
    may run any code that Python finds.
    """
    suite_name, slash, _ = task.partition("/")
    if not slash or suite_name not in SUITES:
        return False
    module = importlib.import_module(SUITES[suite_name].module)
    return task in module.TASKS or (not getattr(module, "IMPORTS", False) and hasattr(module, "accepts") and module.accepts(task))


def list_tasks() -> list[TaskRow]:
    """Lists every task of every suite, installed or not."""
    rows = []
    for name, suite in SUITES.items():
        module = importlib.import_module(suite.module)
        available = _lacking(suite, module) is None
        for task in _tasks_of(name, module):
            how = f"k24 train {task}" if available else _how(suite, module)
            rows.append(TaskRow(task, name, available, how, module.TASKS[task]))
    return rows


def _find(task: str) -> tuple[Suite, ModuleType]:
    """The suite of a task and its module."""
    suite_name, slash, _ = task.partition("/")
    if not slash:
        if ":" in task:
            return _OWN, importlib.import_module(_OWN.module)
        listed = "a task is suite/name, as 'k24 tasks' lists them, or package.module:factory of your own"
        raise unknown_name("task", task, [row.task for row in list_tasks()], listed)
    if suite_name not in SUITES:
        raise unknown_name("environment suite", suite_name, SUITES)
    suite = SUITES[suite_name]
    module = importlib.import_module(suite.module)
    tasks = _tasks_of(suite_name, module)
    if task not in tasks and not (hasattr(module, "accepts") and module.accepts(task)):
        raise unknown_name("task", task, tasks, f"'k24 tasks {suite_name}' lists them")
    return suite, module


_OWN = Suite("k24.envs.own", None, None, "an environment of the user's")


def _tasks_of(suite_name: str, module: ModuleType) -> list[str]:
    """The tasks of one suite; two suites may share a module."""
    return [task for task in module.TASKS if task.startswith(f"{suite_name}/")]


def _lacking(suite: Suite, module: ModuleType) -> str | None:
    """What keeps a suite from running here, to stand after a task's name; None where nothing does."""
    if suite.package is not None and importlib.util.find_spec(suite.package) is None:
        return f"needs the package {suite.package!r}, which is not installed: {_how(suite, module)}"
    return f"can't run here: {module.missing(suite.package)}" if hasattr(module, "missing") and module.missing(suite.package) else None


def _how(suite: Suite, module: ModuleType) -> str:
    """How to get what a suite lacks."""
    return f"pip install 'k24[{suite.extra}]'" if suite.extra is not None else module.missing(suite.package)
