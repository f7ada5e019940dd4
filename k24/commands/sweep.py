"""``k24 sweep``: many runs at once, a live table of how they do, and what to do about those that failed."""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from k24.commands.options import parse, peek
from k24.commands.train import Interrupted, read_request, stop_on_signal
from k24.errors import RunError, UsageError, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

    from k24.config import TrainConfig
    from k24.sweep import Row, Status

# Seeds of a sweep that says nothing of them.
SEEDS = 5
# Lines of a terminal that the live table leaves to what is printed above it, and to its own head.
MARGIN = 8


@dataclass(frozen=True)
class SweepOptions:
    """A grid of runs."""

    tasks: tuple[str, ...] = ()
    """Tasks, each as TASK or TASK,name=value,… with arguments of the task; of a suite, those to take."""
    sharing: tuple[str, ...] = ()
    """Methods, each as SCHEME or SCHEME:option=value,… with options of k24 train; k24, or those of the suite."""
    algo: tuple[str, ...] = ()
    """Learners; qmix, or what the suite or the preset says."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many seeds of each; 5, or what the suite says."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="K")] = 0
    """Seeds are K, K+1, …: other ones than those that settings were chosen with."""
    suite: str | None = None
    """Tasks with learners, settings and seeds that are written down: hetero, agents or ablation."""
    out: Path = Path("results")
    """Folder for all runs; with --address one that all machines see."""
    address: str | None = None
    """Ray cluster to run on, for example ray://head:10001; this machine alone when not given."""
    jobs: int | None = None
    """Runs at a time; one per core of this machine, or as many as the cluster has room for."""
    retries: int = 1
    """How often a run that failed is tried again, from its last checkpoint."""
    dry_run: bool = False
    """List the runs with their command lines, and start none."""

    def __post_init__(self) -> None:
        """Checks counts."""
        counts = (("seeds", self.seeds, 1), ("first_seed", self.first_seed, 0), ("jobs", self.jobs, 1), ("retries", self.retries, 0))
        for name, value, least in counts:
            if value is not None and value < least:
                raise UsageError(f"{name} (={value}) must be at least {least}")

    def seeds_of(self, usual: int) -> range:
        """Seeds of a task that usually has so many."""
        return range(self.first_seed, self.first_seed + (self.seeds or usual))


def sweep_command(arguments: list[str]) -> None:
    """Reads the options and carries the sweep out.

    Args:
        arguments: Options of the sweep, and after ``--`` those of ``k24 train`` for every run.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    text = "Train every method on every task with several seeds. Options after -- are those of 'k24 train', for every run."
    options = parse(SweepOptions, arguments[:split], "sweep", description=text)
    from k24.suites import SUITES
    from k24.sweep import plan, require_environments, require_ray, sweep

    common = arguments[split + 1 :]
    rows = _rows(options, common)
    methods = options.sharing or (SUITES[options.suite].methods if options.suite else ("k24",))
    notes: dict[str, None] = {}

    def read(given: Sequence[str]) -> TrainConfig:
        request = read_request(given)
        notes.update(dict.fromkeys(request.notes))
        return request.config

    cells = plan(rows, methods, options.out, common, read)
    for note in notes:
        print(note)
    require_environments(cell for cell in cells if cell.state != "finished")
    if options.dry_run:
        word = {"new": "new", "unfinished": "resume", "finished": "skip"}
        for cell in cells:
            print(f"{word[cell.state]:<7} {cell.command}")
        skipped = sum(cell.state == "finished" for cell in cells)
        print(json.dumps({"runs": len(cells), "finished": 0, "skipped": skipped, "failed": 0, "seconds": 0.0}))
        return
    require_ray()
    counts = {state: sum(cell.state == state for cell in cells) for state in ("new", "unfinished", "finished")}
    print(
        f"{len(cells)} runs below {options.out}: {counts['new']} new, {counts['unfinished']} to go on with, {counts['finished']} finished "
        "before; each prints into seed<k>.log beside its folder",
        flush=True,
    )
    start = time.monotonic()
    with stop_on_signal() as asked, _show() as show:
        found = sweep(cells, options.jobs, options.address, options.retries, show, asked)
    _report(found, time.monotonic() - start)


def _rows(options: SweepOptions, common: Sequence[str]) -> list[Row]:
    """Tasks and learners, from the options, from a suite, or from the preset or file that all runs share."""
    from k24.suites import SUITES
    from k24.sweep import Row

    if options.suite is None:
        if not options.tasks:
            raise UsageError("no task given: name some with --tasks ('k24 tasks' lists them), or a --suite")
        seeds = options.seeds_of(SEEDS)
        return [Row(task, algo, seeds) for task in options.tasks for algo in options.algo or (_algo_of(common),)]
    if options.suite not in SUITES:
        raise unknown_name("suite", options.suite, SUITES)
    if options.algo:
        raise UsageError(f"--algo and --suite exclude each other: suite {options.suite} says by which learner each of its tasks is learned")
    for flag in ("--preset", "--config"):
        if peek(common, flag) is not None:
            raise UsageError(f"{flag} and --suite exclude each other: suite {options.suite} has settings of its own for each of its tasks")
    suite = SUITES[options.suite].tasks
    for task in options.tasks:
        if not any(task in _names(row.task) for row in suite):
            raise unknown_name(f"task of suite {options.suite}", task, [row.task for row in suite])
    return [
        Row(row.task, row.algo, options.seeds_of(row.seeds), tuple(shlex.split(row.settings)))
        for row in suite
        if not options.tasks or any(task in _names(row.task) for task in options.tasks)
    ]


def _algo_of(common: Sequence[str]) -> str:
    """The learner of the preset or file that all runs share; the default one where there is none."""
    source = [item for flag in ("--preset", "--config") if (value := peek(common, flag)) is not None for item in (flag, value)]
    try:
        return str(read_request(source).config.algo)
    except UsageError:
        return "qmix"  # what is wrong is said once it is known of which run


def _names(task: str) -> tuple[str, str]:
    """What a task of a suite may be called: by its full name, or without its arguments, which means all that differ in them."""
    return task, task.partition(",")[0]


@contextlib.contextmanager
def _show() -> Iterator[Callable[[Sequence[Status]], None]]:
    """A live table where there is a terminal, and a line for each thing that happens everywhere else."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    told: dict[str, tuple[str, int]] = {}

    def say(statuses: Sequence[Status], states: Sequence[str]) -> None:
        for status in statuses:
            new, before = (status.state, len(status.failures)), told.get(status.cell.name, ("waiting", 0))
            told[status.cell.name] = new
            if new[1] > before[1]:
                again = ", to be tried again" if status.state == "waiting" else ""
                _line(console, f"failed   {status.cell.name}: {status.failures[-1]}{again}")
            elif new[0] != before[0] and new[0] in states:
                value = f"  return {status.value:.2f}" if status.state == "finished" and status.value is not None else ""
                _line(console, f"{'started' if status.state == 'running' else status.state:<8} {status.cell.name}{value}")

    if not console.is_terminal:
        yield lambda statuses: say(statuses, ("running", "finished", "stopped"))
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def draw(statuses: Sequence[Status]) -> None:
            say(statuses, ())
            live.update(_table(statuses, max(console.height - MARGIN, 3)), refresh=True)

        yield draw


def _line(console: object, text: str) -> None:
    """Prints one line, as it is; above a live table where there is one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)  # type: ignore[attr-defined]


def _table(statuses: Sequence[Status], most: int | None = None) -> Table:
    """One line for each task and method.

    Args:
        statuses: Of all runs.
        most: Lines there is room for; of more, those are shown where something goes on.
    """
    from rich.table import Table

    groups: dict[tuple[str, str], list[Status]] = {}
    for status in statuses:
        groups.setdefault((status.cell.task, status.cell.method), []).append(status)
    shown = list(groups)
    if most is not None and len(shown) > most:
        shown = [key for key in shown if any(status.state in ("running", "failed") for status in groups[key])][:most]
    ended = sum(status.state in ("finished", "skipped") for status in statuses)
    table = Table(title=f"{ended} of {len(statuses)} runs finished", title_justify="left", box=None, header_style="bold")
    for name, justify in (("task", "left"), ("method", "left"), ("seeds", "right"), ("return", "right"), ("failed", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("running")
    for key in shown:
        group = groups[key]
        values = [status.value for status in group if status.value is not None]
        failed = sum(status.state == "failed" for status in group)
        table.add_row(
            *key,
            f"{sum(status.state in ('finished', 'skipped') for status in group)}/{len(group)}",
            f"{statistics.fmean(values):.2f}" if values else "-",
            str(failed) if failed else "",
            "\n".join(_running(status) for status in group if status.state == "running"),
        )
    if len(shown) < len(groups):
        table.caption = f"and {len(groups) - len(shown)} lines more"
        table.caption_justify = "left"
    return table


def _running(status: Status) -> str:
    """Step, share and speed of a run."""
    config = status.cell.config
    rate = f"  {status.rate:,.0f}/s" if status.rate is not None else ""
    return f"seed{config.seed}  {status.steps:,} steps  {min(status.steps / config.steps, 1):.0%}{rate}"


def _report(statuses: Sequence[Status], seconds: float) -> None:
    """What came of it: a table, the runs that failed, and JSON in the last line.

    Raises:
        Interrupted: The sweep was asked to stop.
        RunError: Runs failed.
    """
    from rich.console import Console

    count = {state: sum(status.state == state for status in statuses) for state in ("finished", "skipped", "failed", "stopped")}
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(statuses))
    for status in statuses:
        if status.state == "failed":
            _line(console, f"failed {status.cell.name}: {status.failures[-1]}; its log: {status.cell.folder}.log; to repeat it:")
            _line(console, f"  {status.cell.command}")
    if count["stopped"]:
        done = count["finished"] + count["skipped"]
        raise Interrupted(f"stopped with {done} of {len(statuses)} runs finished, the others saved: the same command goes on")
    result = {"runs": len(statuses), **{name: count[name] for name in ("finished", "skipped", "failed")}, "seconds": round(seconds, 1)}
    print(json.dumps(result), flush=True)
    if count["failed"]:
        raise RunError(f"{count['failed']} of {len(statuses)} runs failed, named above: the same command tries them again")
