"""Finished runs, read from their folders and put into a grid of methods × tasks × seeds.

A run folder is ``…/<algo>-<method>/seed<k>``, as ``k24 train`` and ``k24 sweep`` name them; its task is the one in its configuration,
with the task's arguments. A method's name holds the options that set it apart, ``qmix-k24,div_coef=0.1``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from k24.config import TrainConfig, load_config, to_dict
from k24.errors import UsageError
from k24.inspection import COSTS
from k24.strict import is_number

# Settings that may differ between the methods that are compared on a task: what makes the method, and what does not change what is learned.
FREE = ("algo", "sharing", "seed", "device", "threads", "workers", "checkpoint_every", "log_every")
# Settings of schemes. Two methods differ in them by being different methods; within one they are the same in every run.
OF_SCHEMES = ("masks", "kaleidoscope", "snp", "hypermarl", "seps")


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        folder: Where it is.
        task: Its task, with arguments: ``toy/specialisation,n_agents=4``.
        method: Algorithm and method, as its folder is called; the method alone in a grid whose tasks have one algorithm each.
        config: Its configuration.
        evaluation: What ``eval.json`` holds.
        log: Lines of ``metrics.jsonl``.
    """

    folder: Path
    task: str
    method: str
    config: TrainConfig
    evaluation: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    def curve(self, name: str) -> list[tuple[int, float]]:
        """What was logged under a name, as (environment steps, value); what is no finite number is left out."""
        return [(int(row["steps"]), float(row[name])) for row in self.log if is_number(row.get(name))]


@dataclass(frozen=True)
class Grid:
    """Runs that can be compared: every method has every task, with the same seeds.

    Attributes:
        methods: Names, in alphabetical order.
        tasks: Likewise.
        runs: By method and task, in the order of seeds.
        left_out: What was found and does not take part, for people.
    """

    methods: list[str]
    tasks: list[str]
    runs: dict[tuple[str, str], list[RunRecord]]
    left_out: list[str]


def read_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], list[Path]]:
    """All runs below some folders.

    Returns:
        Those that are finished, and the folders of those that are not.

    Raises:
        UsageError: There are none, or one can't be read.
    """
    found, unfinished = [], []
    for folder in _run_folders(folders):
        try:
            config = load_config(folder / "config.yaml")
        except UsageError as error:
            raise UsageError(f"{error}; if another version of k24 wrote it, leave the run out") from error
        if not (folder / "eval.json").exists():
            unfinished.append(folder)
            continue
        method = Path(os.path.abspath(folder)).parent.name
        if not method.startswith(f"{config.algo}-"):
            raise UsageError(f"{folder} is a run of {config.algo}, and its folder is not called {config.algo}-<method>/seed<k>: rename it")
        _require_true_name(folder, method, config)
        task = ",".join([config.task, *sorted(config.env_args)])
        found.append(RunRecord(folder, task, method, config, _read_evaluation(folder), _read_log(folder)))
    if not found:
        raise UsageError(f"no finished runs below {', '.join(map(str, folders))}: a finished run holds an eval.json")
    return found, unfinished


def _run_folders(roots: Sequence[Path]) -> list[Path]:
    """Folders with a configuration, links followed; a folder that is reached by several ways counts once."""
    found: dict[Path, Path] = {}

    def unreadable(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}): make it readable, or give the folders beside it")

    for root in roots:
        seen = set()
        for place, below, files in os.walk(root, onerror=unreadable, followlinks=True):
            real = Path(place).resolve()
            if real in seen:
                below.clear()  # a link to a folder above it
            seen.add(real)
            if "config.yaml" in files:
                found.setdefault(real, Path(place))
    return sorted(found.values())


def _require_true_name(folder: Path, method: str, config: TrainConfig) -> None:
    """Refuses a run whose folder says something else than its configuration: tables would call it by a wrong name."""
    scheme, *options = method.removeprefix(f"{config.algo}-").split(",")
    if scheme != config.sharing:
        raise UsageError(f"{folder} is a run of scheme {config.sharing}, and its folder says {scheme}: rename it")
    settings = _settings(config)
    for option, _, text in (item.partition("=") for item in options):
        asked = option.replace("-", "_")
        name = next((known for known in settings if asked in (known, known.removeprefix("masks."), known.removeprefix("learner."))), None)
        try:
            value = yaml.safe_load(text)
            value = float(value) if name and type(settings[name]) is float else value  # 1e-4 is text to YAML
        except (yaml.YAMLError, ValueError, TypeError):
            value = text
        # As text too: to YAML 2:4 is a number to the base of 60, yes a truth value, and None a word.
        if name is not None and settings[name] != value and str(settings[name]) != text:
            raise UsageError(f"{folder} has {name}={settings[name]}, and its folder says {option}={text}: rename it")


def _read_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "eval.json"
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        wrong = [name for name in ("return_mean", "win_rate", "episodes", *COSTS) if name in found and not is_number(found[name])]
        wrong += [name for name in ("return_mean", "episodes") if name not in found]
        wrong += [name for name in COSTS if name not in found and not found.keys().isdisjoint(COSTS)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): delete it, and resume the run") from error
    if wrong:
        said = f"{wrong[0]}={found.get(wrong[0])}, expected a number"
        raise UsageError(f"{path} is damaged ({said}): delete it, and resume the run, or leave the run out")
    return found


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """Lines of the log; a kill may have cut the last one short."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {folder / 'metrics.jsonl'} ({type(error).__name__}): run it again, or leave it out") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"steps": int(row["steps"]), **row})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                continue
            raise UsageError(f"{folder / 'metrics.jsonl'}, line {number}, is damaged: run it again, or leave the run out") from error
    return rows


def make_grid(runs: Sequence[RunRecord], unfinished: Sequence[Path] = (), partial: bool = False) -> Grid:
    """Puts runs side by side, and refuses those that can't be compared.

    Args:
        runs: Finished ones.
        unfinished: Folders of others.
        partial: Take the largest part that every method has, and say what is left out, instead of refusing.

    Raises:
        UsageError: A method lacks a task or a seed, a run is not finished, a run is there twice, or settings differ.
    """
    algorithms: dict[str, set[str]] = {}
    for run in runs:
        algorithms.setdefault(run.task, set()).add(run.config.algo)
    if all(len(names) == 1 for names in algorithms.values()):
        # Nothing to tell apart by it; and a suite may well learn one task by QMIX and another one by MAPPO.
        runs = [replace(run, method=run.method.removeprefix(f"{run.config.algo}-")) for run in runs]
    cells: dict[tuple[str, str], dict[int, RunRecord]] = {}
    for run in runs:
        cell = cells.setdefault((run.method, run.task), {})
        if run.seed in cell:
            raise UsageError(f"{run.folder} and {cell[run.seed].folder} are the same run: leave one of them out")
        cell[run.seed] = run
    methods, tasks = sorted({m for m, _ in cells}), sorted({t for _, t in cells})
    missing = [f"{folder} is not finished" for folder in unfinished]
    kept: dict[tuple[str, str], list[RunRecord]] = {}
    for task in tasks:
        having = [m for m in methods if (m, task) in cells]
        seeds = sorted({seed for m in having for seed in cells[m, task]})
        for method in methods:
            lacking = [str(s) for s in seeds if s not in cells.get((method, task), {})]
            if method not in having:
                missing.append(f"{method} has no run of {task}")
            elif lacking:
                missing.append(f"{method} lacks seed {', '.join(lacking)} of {task}")
        common = [s for s in seeds if all(s in cells.get((m, task), {}) for m in methods)]
        if common:
            _require_alike([cells[m, task][s] for m in methods for s in common])
            kept |= {(m, task): [cells[m, task][s] for s in common] for m in methods}
    if missing and not partial:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"unequal grid: {missing[0]}{more}: finish the runs, or compare what all have with --partial")
    tasks = sorted({task for _, task in kept}, key=by_number)
    if not tasks:
        remedy = "give folders that belong together"
        for task, names in algorithms.items():
            if len(names) > 1:
                remedy = f"{task} was learned by {' and '.join(sorted(names))}, so that methods are told apart by them; report it by itself"
        raise UsageError(f"the methods {', '.join(methods)} have no run in common, on any task with any seed: {remedy}")
    return Grid(methods, tasks, kept, missing)


def _require_alike(runs: Iterable[RunRecord]) -> None:
    """Refuses runs of one task that differ in more than what makes their methods."""
    first: dict[str, RunRecord] = {}
    for run in runs:
        _require_equal(run, first.setdefault(run.method, run), ("seed", *FREE[3:]), [])
    # Every pair: what a method's name excuses in one comparison excuses nothing between two others.
    for one, other in combinations(first.values(), 2):
        free = (*FREE, *OF_SCHEMES, *(["learner"] if one.config.algo != other.config.algo else []))
        _require_equal(other, one, free, [*_named(one.method), *_named(other.method)])


def _require_equal(run: RunRecord, other: RunRecord, free: Sequence[str], named: Sequence[str]) -> None:
    """Refuses two runs that differ in a setting which is neither free nor named."""
    here, there = _settings(run.config), _settings(other.config)
    for name in sorted(here.keys() | there.keys()):
        if name.partition(".")[0] in free or name in named or name.rpartition(".")[2] in named:
            continue
        if here.get(name) != there.get(name):
            differ = f"{run.folder} has {name}={here.get(name)} and {other.folder} {name}={there.get(name)}"
            raise UsageError(f"{differ}: compare runs of equal settings, or name the option in the method's folder")


def _settings(config: TrainConfig) -> dict[str, Any]:
    """All settings, parts of parts by dotted names; arguments of the task in alphabetical order, since none means anything by its place."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(replace(config, env_args=tuple(sorted(config.env_args)))).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _named(method: str) -> list[str]:
    """Options that a method's folder names."""
    return [found[1].replace("-", "_") for item in method.split(",")[1:] if (found := re.match(r"([\w.-]+)=", item))]


def by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts names with numbers as people do: 2 agents before 16."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
