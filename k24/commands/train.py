"""``k24 train``: a progress bar, a closing summary, and what signals do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k24.commands.options import parse, peek, take
from k24.errors import UsageError


class Interrupted(Exception):
    """A run was stopped by a signal after saving itself."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks the run to save and stop, the second ends it at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nk24: saving, then stopping (once more to stop at once)\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Request(NamedTuple):
    """What ``k24 train`` was asked for.

    Attributes:
        config: A :class:`~k24.config.TrainConfig`.
        folder: Run folder; None for the default one.
        resume: Whether to go on with the run there.
        quiet: Whether to show no progress bar.
        notes: Lines that the user should see.
    """

    config: Any
    folder: Path | None
    resume: bool
    quiet: bool
    notes: list[str]


def train_command(arguments: list[str]) -> None:
    """Reads the options and trains."""
    request = read_request(arguments)
    for note in request.notes:
        print(note)
    run_training(request.config, request.folder, request.resume, request.quiet)


def read_request(arguments: Sequence[str]) -> Request:
    """Reads the options of ``k24 train``.

    Args:
        arguments: As on the command line.

    Raises:
        HelpShown: They asked for help, which has been printed.
        UsageError: Something is wrong with them.
    """
    from k24.config import TrainConfig, for_algo, load_config, why_ignored
    from k24.learners import LEARNERS
    from k24.presets import PRESETS, preset

    given = list(arguments)
    out, config_file, preset_name = take(given, "--out"), take(given, "--config"), take(given, "--preset")
    resume, quiet = "--resume" in given, "--quiet" in given
    given = [a for a in given if a not in ("--resume", "--quiet")]
    if config_file is not None and preset_name is not None:
        raise UsageError(f"--config {config_file} and --preset {preset_name} exclude each other: give one of them")
    base = TrainConfig()
    if config_file is not None:
        base = load_config(Path(config_file))
    elif preset_name is not None:
        base = preset(preset_name)
    elif resume and out is not None and (Path(out) / "config.yaml").exists():
        base = load_config(Path(out) / "config.yaml")
    if given and not given[0].startswith("-"):
        given[:1] = ["--task", given[0]]
    start = for_algo(base, peek(given, "--algo") or base.algo)
    refuse_options_of_others(start.algo, {algo: learner.settings for algo, learner in LEARNERS.items()}, given)
    refuse_bare_options(start, given)
    text = (
        "Train a team. TASK comes first, as suite/name. Also: --out DIR (run folder), --resume (go on with the run there), "
        f"--config FILE (repeat a run), --preset NAME ({', '.join(PRESETS)}), --quiet (no progress bar). "
        f"Each --algo has options of its own: these are those of {start.algo}."
    )
    config = parse(TrainConfig, given, "train", start, text)
    source, notes = config_file or preset_name, []
    if source is not None and type(config.learner) is not type(base.learner):
        notes.append(f"the learner's settings in {source} are those of {base.algo}: {config.algo} starts from its own defaults")
    for option in dict.fromkeys(item.partition("=")[0].removeprefix("--") for item in given if item.startswith("--")):
        reason = why_ignored(config, option.replace("-", "_").removeprefix("no_"))
        if reason is not None:
            notes.append(f"--{option} changes nothing: {reason}")
    return Request(config, Path(out) if out is not None else None, resume, quiet, notes)


def refuse_options_of_others(algo: str, settings: Mapping[str, type], given: Sequence[str]) -> None:
    """Says which algorithms know an option that the chosen one lacks; any other that is not known is left to the parser.

    Args:
        algo: The chosen one.
        settings: The dataclass of each algorithm's options.
        given: Arguments.

    Raises:
        UsageError: There is such an option.
    """
    names = {known: {f.name for f in dataclasses.fields(options)} for known, options in settings.items()}
    for item in given:
        flag = item.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        having = [known for known in names if name in names[known]]
        if flag.startswith("--") and having and algo not in having:
            raise UsageError(f"{flag} is no option of {algo}, but of {', '.join(having)}: leave it out, or change --algo")


def refuse_bare_options(config: Any, given: Sequence[str]) -> None:
    """Gives the full name of a baseline's option that was written without the baseline's; the parser would suggest any that looks alike.

    Args:
        config: A :class:`~k24.config.TrainConfig` with the options that there are.
        given: Arguments.

    Raises:
        UsageError: There is such an option.
    """
    plain = {f.name for part in (config, config.masks, config.learner) for f in dataclasses.fields(part)}
    for flag in (item.partition("=")[0] for item in given if item.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        for part in ("kaleidoscope", "snp", "hypermarl", "seps"):
            if name not in plain and any(f.name == name for f in dataclasses.fields(getattr(config, part))):
                raise UsageError(f"{flag} is an option of {part}: write --{part}.{name.replace('_', '-')}")


def run_training(config: Any, folder: Path | None, resume: bool = False, quiet: bool = False) -> Any:
    """Trains with a progress bar and a closing summary; prints the result as JSON in the last line.

    Args:
        config: A :class:`~k24.config.TrainConfig`.
        folder: Run folder; the default one when None.
        resume: Go on with the run there.
        quiet: No progress bar.

    Returns:
        The :class:`~k24.train.Result`.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from k24.train import default_folder, train

    folder = folder or default_folder(config)
    if resume and not (folder / "config.yaml").exists():
        if not config.task:
            raise UsageError(f"{folder} is no run folder (it has no config.yaml): name a task to start one there, or the --out of a run")
        print(f"nothing to resume in {folder}: starting there")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]} steps/s  return {task.fields[ret]}{task.fields[tau]}"),
        TimeRemainingColumn(),
        disable=quiet or not sys.stderr.isatty(),
        console=_console(),
    )
    with stop_on_signal() as asked, bar:
        row = bar.add_task(f"{config.task} {config.algo}-{config.sharing}", total=config.steps, speed="-", ret="-", tau="")

        def show(p: Any) -> None:
            tau = f"  tau {p.metrics['temperature']:.2f}" if "temperature" in p.metrics else ""
            value = f"{p.metrics.get('return_eval', p.metrics['return_train']):.2f}"
            bar.update(row, completed=p.steps, speed=f"{p.steps_per_second:,.0f}", ret=value, tau=tau)

        result = train(config, folder, resume, show, asked)
    if not result.finished:
        raise Interrupted(f"stopped at step {result.steps} of {config.steps}, saved: 'k24 train --resume --out {result.folder}' goes on")
    mean, (low, high) = result.evaluation["return_mean"], result.evaluation["return_ci95"]
    print(
        f"return {mean:.2f} (95% interval {low:.2f} to {high:.2f} over {result.evaluation['episodes']} episodes; sum over agents and steps)"
    )
    if "win_rate" in result.evaluation:
        low, high = result.evaluation["win_rate_ci95"]
        print(f"won {result.evaluation['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})")
    print(f"run folder {result.folder}; curves: tensorboard --logdir {result.folder}")
    print(json.dumps({**result.evaluation, "folder": str(result.folder), "env_steps_per_s": round(result.steps_per_second)}))
    return result


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
