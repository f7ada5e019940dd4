"""The runs of a sweep, written down and checked before one of them starts.

Two notations say what differs between runs, and name their folders:

* a task is ``TASK`` or ``TASK,name=value,…`` with arguments of the task, e.g. ``toy/specialisation,n_agents=4``;
* a method is ``SCHEME`` or ``SCHEME:option=value,…`` with options of ``k24 train``, e.g. ``k24:div_coef=0.1,hidden=92``.

A run's folder is ``<out>/<task>/<algo>-<method>/seed<k>``, where the colon of a method has become a comma, so that it reads
``qmix-k24,div_coef=0.1,hidden=92``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k24.config import TrainConfig, why_ignored
from k24.envs import EnvSpec
from k24.errors import UsageError
from k24.evaluate import build_env, build_learner, pinned, resolve_device
from k24.strict import is_number
from k24.train import MAY_DIFFER, is_half_begun, prepare_folder

State = Literal["new", "unfinished", "finished"]

# Options of k24 train that a sweep sets itself, each with what to use instead.
TAKEN = {
    "task": "--tasks",
    "algo": "--algo",
    "sharing": "--sharing",
    "seed": "--seeds and --first-seed",
    "out": "--out of the sweep",
    "preset": "--preset after --, for every run",
    "config": "--config after --, for every run",
    "resume": "nothing: every run of a sweep goes on where it stopped",
    "quiet": "nothing: runs of a sweep write into their logs",
    "help": "'k24 train --help'",
}


@dataclass(frozen=True)
class Method:
    """A sharing scheme, with settings that differ from those of the other methods.

    Attributes:
        scheme: A key of :data:`k24.sharing.SCHEMES`; not looked up here.
        options: Name and value of each setting, names as in ``k24 train`` with underscores.
    """

    scheme: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, text: str) -> Method:
        """Reads ``SCHEME`` or ``SCHEME:option=value,…``.

        Raises:
            UsageError: It is neither, or an option is one that the sweep sets.
        """
        scheme, colon, rest = text.partition(":")
        example = "write SCHEME or SCHEME:option=value,option=value, for example k24:div_coef=0.1,hidden=92"
        if not scheme or (colon and not rest):
            raise UsageError(f"method {text!r} is incomplete: {example}")
        options: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            option, equals, value = item.partition("=")
            option = option.strip().removeprefix("--").replace("-", "_")
            if not re.fullmatch(r"[a-z]\w*(\.[a-z]\w*)?", option) or not equals or not value:
                raise UsageError(f"method {text!r}: {item!r} is not of the form option=value: {example}")
            if option in options:
                raise UsageError(f"method {text!r} gives {option} twice: leave one of them out")
            if option.startswith("no_"):
                raise UsageError(f"method {text!r}: write {option.removeprefix('no_')}=false, so that the option has one name")
            if option in (*MAY_DIFFER, "log_every"):
                raise UsageError(f"method {text!r}: {option} changes nothing that is learned: give it after --, for every run")
            if option == "env_args":
                raise UsageError(f"method {text!r}: arguments of the task belong to the task: write TASK,name=value in --tasks")
            _require_free(option, f"method {text!r}")
            _require_no_slash(value, f"method {text!r}")
            options[option] = value
        return cls(scheme, tuple(options.items()))

    @property
    def name(self) -> str:
        """As it stands in a run's folder, after the algorithm."""
        return self.scheme + "".join(f",{option}={value}" for option, value in self.options)

    @property
    def arguments(self) -> list[str]:
        """The settings as arguments of ``k24 train``."""
        found = []
        for option, value in self.options:
            part, dot, last = option.replace("_", "-").rpartition(".")
            if value.lower() in ("true", "false"):
                found += [f"--{part}{dot}{'' if value.lower() == 'true' else 'no-'}{last}"]
            else:
                found += [f"--{part}{dot}{last}", value]
        return found


@dataclass(frozen=True)
class Row:
    """A task, how it is learned, and how often.

    Attributes:
        task: ``TASK`` or ``TASK,name=value,…``.
        algo: Learner.
        seeds: Which.
        settings: Further arguments of ``k24 train``.
    """

    task: str
    algo: str
    seeds: range
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        task: As it was written, with its arguments.
        method: Algorithm and method, as its folder is called.
        config: Its configuration.
        folder: Its run folder.
        arguments: Those of ``k24 train`` that carry it out, or go on with it.
        state: ``new``, ``unfinished`` or ``finished``, as the folder was found.
    """

    task: str
    method: str
    config: TrainConfig
    folder: Path
    arguments: tuple[str, ...]
    state: State

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task} {self.method} seed{self.config.seed}"

    @property
    def command(self) -> str:
        """The command line that carries it out by itself, or goes on with it."""
        return shlex.join(["k24", "train", *self.arguments])


def plan(
    rows: Sequence[Row], methods: Sequence[str], out: Path, common: Sequence[str], read: Callable[[Sequence[str]], TrainConfig]
) -> list[Cell]:
    """Every run of a grid, rows × methods × seeds, each with its configuration checked; nothing is written.

    Args:
        rows: Tasks and learners.
        methods: In the notation of this file.
        out: Folder for all of them.
        common: Arguments of ``k24 train`` for every run; a method's own settings come after them, so that these count.
        read: Turns arguments of ``k24 train`` into a configuration, as that command does.

    Raises:
        UsageError: Something is wrong with a run, which the message names, or its folder holds another one.
    """
    for item in common:
        option = item.partition("=")[0].lstrip("-").replace("-", "_")
        if item.startswith("-") and option not in ("preset", "config"):
            _require_free(option, "after --")
    spelt: dict[tuple[str, ...], str] = {}
    for task in (row.task for row in rows):
        first, *env_args = task.split(",")
        if spelt.setdefault((first, *sorted(env_args)), task) != task:
            raise UsageError(f"{task} is asked for twice, with its arguments in another order: leave one of them out")
    found: dict[Path, Cell] = {}
    settled: dict[Row, dict[str, TrainConfig]] = {}
    for row, method in itertools.product(rows, map(Method.read, methods)):
        arguments = _arguments(row, method, common)
        folder = out / row.task / f"{row.algo}-{method.name}"
        try:
            config = read(arguments)
        except UsageError as error:
            raise UsageError(f"{row.task} {folder.name}: {error}") from error
        _require_named_arguments(row, arguments, config)
        for option, _ in method.options:
            if (reason := why_ignored(config, option)) is not None:
                raise UsageError(f"{row.task} {folder.name}: {option} would change nothing: {reason}")
        # Two names of one method would be compared as two. What is left open counts as what it stands for.
        effective = dataclasses.replace(config, masks=config.sharing_config.masks)
        for other, theirs in settled.setdefault(row, {}).items():
            if theirs == effective and other != folder.name:
                raise UsageError(f"{row.task} {folder.name} is {other} by another name, with the same settings: leave one of them out")
        settled[row][folder.name] = effective
        for seed in row.seeds:
            mine = folder / f"seed{seed}"
            if mine in found:
                raise UsageError(f"{row.task} {folder.name} is asked for twice: leave one of them out")
            seeded = dataclasses.replace(config, seed=seed)
            complete = (*arguments, "--seed", str(seed), "--out", str(mine), "--resume", "--quiet")
            found[mine] = Cell(row.task, folder.name, seeded, mine, complete, _state(seeded, mine))
    return list(found.values())


def require_environments(cells: Iterable[Cell]) -> None:
    """Builds each environment and each learner once, for what only they can refuse: a task, its arguments, a missing package.

    Args:
        cells: Runs; of several that differ in their seed only the first is tried.

    Raises:
        UsageError: One is refused; the message names the run.
    """
    specs: dict[tuple[str, ...], EnvSpec] = {}
    tried = set()
    for cell in cells:
        if (cell.task, cell.method) in tried:
            continue
        tried.add((cell.task, cell.method))
        try:
            resolve_device(cell.config.device)
            where = (cell.config.task, *cell.config.env_args)
            if where not in specs:
                env = build_env(cell.config, 1, "cpu", workers=0)
                specs[where] = env.spec
                env.close()
            build_learner(cell.config, specs[where])
        except UsageError as error:
            raise UsageError(f"{cell.task} {cell.method}: {error}") from error


def evaluation_of(folder: Path) -> dict[str, Any] | None:
    """What ``eval.json`` holds, the last thing that a run writes; None while there is none."""
    try:
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = found.get("return_mean") if isinstance(found, dict) else None
    return found if is_number(value) else None


def _arguments(row: Row, method: Method, common: Sequence[str]) -> list[str]:
    """Arguments of ``k24 train`` that runs of all seeds share; of an option given more than once the last counts."""
    task, *env_args = row.task.split(",")
    shared = [*row.settings, *common]
    if not task or not all(re.fullmatch(r"[A-Za-z_]\w*=.+", item) for item in env_args):
        raise UsageError(f"task {row.task!r} is not of the form TASK or TASK,name=value: for example toy/specialisation,n_agents=4")
    if env_args:
        _require_no_slash("".join(env_args), f"task {row.task!r}")
    shared, others = _without_env_args(shared)
    for name in {item.partition("=")[0] for item in env_args} & {item.partition("=")[0] for item in others}:
        raise UsageError(f"task {row.task!r} and --env-args both give {name}: leave one of them out")
    if env_args or others:
        env_args = ["--env-args", *env_args, *others]
    # One core is what a run has to itself, so simulators of one environment at a time are stepped in the run's own process.
    workers = [] if any(item.partition("=")[0] == "--workers" for item in shared) else ["--workers", "0"]
    return [task, "--algo", row.algo, "--sharing", method.scheme, *env_args, *workers, *shared, *method.arguments]


def _without_env_args(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of ``k24 train`` without arguments of the task, and these."""
    kept: list[str] = []
    found: list[str] = []
    inside = False
    for item in arguments:
        option, equals, value = item.partition("=")
        if item.startswith("--"):
            inside = option.replace("_", "-") == "--env-args"
            if inside and equals:
                found.append(value)
        if not inside:
            kept.append(item)
        elif not item.startswith("--"):
            found.append(item)
    return kept, found


def _require_named_arguments(row: Row, arguments: Sequence[str], config: TrainConfig) -> None:
    """Refuses arguments of the task that come from a file: the folder would not tell, and those of other tasks would replace them."""
    hidden = sorted(set(config.env_args) - set(_without_env_args(arguments)[1]))
    if hidden:
        raise UsageError(
            f"{row.task}: the file of --config has arguments of a task, {', '.join(hidden)}: write them in --tasks, TASK,name=value"
        )


def _state(config: TrainConfig, folder: Path) -> State:
    """How far a run is, which may also be none of ours."""
    try:
        begun = any(not is_half_begun(path.name) for path in folder.iterdir())
    except FileNotFoundError:
        return "new"
    except OSError as error:
        raise UsageError(f"cannot write the run folder {folder} ({error.strerror}): choose another --out") from error
    if not begun:
        return "new"
    prepare_folder(pinned(config), folder, resume=True)  # refuses other configurations, and writes nothing where there is one
    return "unfinished" if evaluation_of(folder) is None else "finished"


def _require_free(option: str, where: str) -> None:
    """Refuses an option that the sweep sets itself."""
    if option in TAKEN:
        raise UsageError(f"{where}: {option} is set by the sweep: use {TAKEN[option]}")


def _require_no_slash(value: str, where: str) -> None:
    """Refuses a value that would become folders within folders."""
    if "/" in value:
        raise UsageError(f"{where}: a value with a / can be no part of a folder's name: give it after --, for every run")
