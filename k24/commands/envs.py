"""``k24 tasks`` and ``k24 check-env``: what there is to train on, and whether it keeps the contract."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from k24.commands.options import parse
from k24.errors import unknown_name


@dataclass(frozen=True)
class TasksOptions:
    """List tasks."""

    suite: Annotated[Positional[str], tyro.conf.arg(metavar="SUITE")] = ""
    """One suite, its tasks one by one with what they are about; all suites when left out."""


def tasks_command(arguments: list[str]) -> None:
    """Reads the options and prints suites, or the tasks of one."""
    options = parse(TasksOptions, arguments, "tasks", description="List what can be run here, and what the rest needs.")
    from k24.envs import SUITES, list_tasks

    rows = list_tasks()
    if options.suite:
        if options.suite not in SUITES:
            raise unknown_name("environment suite", options.suite, SUITES)
        rows = [row for row in rows if row.suite == options.suite]
        width = max(len(row.task) for row in rows)
        for row in rows:
            print(f"{row.task:<{width}}  {row.about}")
        print(f"{'ready' if rows[0].available else 'to enable'}: {rows[0].how}")
        return
    for name, suite in SUITES.items():
        mine = [row for row in rows if row.suite == name]
        print(f"{name + '/':<12} {'ready' if mine[0].available else 'not here'}: {suite.about}")
        if not mine[0].available:
            print(f"{'':<12} to enable: {mine[0].how}")
        names = ", ".join(row.task.partition("/")[2] for row in mine)
        print(textwrap.fill(names, 120, initial_indent=" " * 13, subsequent_indent=" " * 13, break_on_hyphens=False))
    print("'k24 tasks SUITE' says what each is about; 'k24 train my_package.my_env:make' trains on an environment of your own")


@dataclass(frozen=True)
class CheckEnvOptions:
    """Check an environment."""

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")]
    """Task, as suite/name, or my_package.my_env:make."""
    env_args: tuple[str, ...] = ()
    """Arguments of the task, each as name=value."""
    workers: int = 0
    """Processes for a simulator that steps one environment at a time; 0 for none but this."""


def check_env_command(arguments: list[str]) -> None:
    """Reads the options, checks, and prints the checks that passed, as JSON in the last line."""
    options = parse(
        CheckEnvOptions, arguments, "check-env", description="Check that an environment keeps the contract of k24.envs.TeamEnv."
    )
    from k24.config import TrainConfig
    from k24.envs import check_env
    from k24.evaluate import build_env

    config = TrainConfig(task=options.task, env_args=options.env_args)
    checks = check_env(lambda: build_env(config, 4, "cpu", options.workers))
    for check in checks:
        print(f"ok  {check}")
    print(json.dumps({"ok": True, "checks": [str(c) for c in checks]}))
