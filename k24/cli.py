"""The command line: the only place that prints and exits.

Exit status 0 on success, 2 for a usage error (nothing was started), 1 for a failure while running, 130 when
interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from k24.errors import K24Error, UsageError, unknown_name

T = TypeVar("T")
RunFolder = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]


class _HelpShown(Exception):
    """Nothing is left to do."""


class _Interrupted(Exception):
    """A run was stopped by a signal after saving itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        argv: Arguments without the program's name; those of the process when None.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        # Here and not at the interpreter's exit, where a reader that has left would be an error message.
        sys.stdout.flush()
        return status
    except K24Error as error:
        print(f"k24: {error}", file=sys.stderr)
        return error.exit_status
    except _Interrupted as stop:
        print(f"k24: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("k24: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; give the interpreter a stdout it can flush at exit.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        return 1
    except OSError as error:
        print(f"k24: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"k24 {_version()}")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    with contextlib.suppress(_HelpShown):
        COMMANDS[arguments[0]][0](arguments[1:])
    return 0


def _version() -> str:
    try:
        return version("k24")
    except PackageNotFoundError:
        return "(not installed)"


def _usage() -> str:
    lines = ["k24: heterogeneous agents that share one network through learned 2:4 masks", "", "usage: k24 COMMAND [options]", ""]
    lines += [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "'k24 COMMAND --help' tells a command's options."])


def _parse(cls: type[T], arguments: Sequence[str], command: str, default: T | None = None, description: str | None = None) -> T:
    """Reads options into a dataclass; what is wrong with them becomes one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            extra: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(arguments), prog=f"k24 {command}", description=description, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise _HelpShown from None
        raise UsageError(_one_line(stderr.getvalue(), command)) from None


def _one_line(message: str, command: str) -> str:
    """The first paragraph of a boxed message, and the option it suggests."""
    rows = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in message.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for row in rows[1:]:
        if set(row) <= {"─"} and row:
            paragraphs.append([])
        elif row:
            paragraphs[-1].append(row)
    first = re.sub(r"^Error parsing (--\S+: )?(\S+: )?", r"\1", " ".join(paragraphs[0])) or "wrong options"
    first = re.sub(r"^Missing from k24 [^:]*: (\S+) .*", r"\1 is missing", first)
    for paragraph in paragraphs[1:]:
        if paragraph and paragraph[0].startswith("Perhaps you meant") and len(paragraph) > 1:
            first += f" (did you mean {paragraph[1].split()[0]}?)"
    return f"{first.rstrip('.')}{'' if first.endswith('?') else ';'} 'k24 {command} --help' lists the options"


# train ------------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
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


def _take(arguments: list[str], flag: str) -> str | None:
    """Removes ``--flag VALUE`` or ``--flag=VALUE`` and returns the value."""
    for k, item in enumerate(arguments):
        if item == flag:
            if k + 1 >= len(arguments):
                raise UsageError(f"{flag} wants a value")
            value = arguments[k + 1]
            del arguments[k : k + 2]
            return value
        if item.startswith(flag + "="):
            del arguments[k]
            return item[len(flag) + 1 :]
    return None


def _train(arguments: list[str]) -> None:
    from k24.config import PRESETS, TrainConfig, load_config, preset

    given = list(arguments)
    out, config_file, preset_name = _take(given, "--out"), _take(given, "--config"), _take(given, "--preset")
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
    text = (
        "Train a team. TASK comes first, as suite/name. Also: --out DIR (run folder), --resume (go on with the run there), "
        f"--config FILE (repeat a run), --preset NAME ({', '.join(PRESETS)}), --quiet (no progress bar)."
    )
    config = _parse(TrainConfig, given, "train", base, text)
    run_training(config, Path(out) if out is not None else None, resume, quiet)


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
    with _stop_on_signal() as asked, bar:
        row = bar.add_task(f"{config.task} {config.algo}-{config.sharing}", total=config.steps, speed="-", ret="-", tau="")

        def show(p: Any) -> None:
            tau = f"  tau {p.metrics['temperature']:.2f}" if "temperature" in p.metrics else ""
            value = f"{p.metrics.get('return_eval', p.metrics['return_train']):.2f}"
            bar.update(row, completed=p.steps, speed=f"{p.steps_per_second:,.0f}", ret=value, tau=tau)

        result = train(config, folder, resume, show, asked)
    if not result.finished:
        raise _Interrupted(f"stopped at step {result.steps} of {config.steps}, saved: 'k24 train --resume --out {result.folder}' goes on")
    mean, (low, high) = result.evaluation["return_mean"], result.evaluation["return_ci95"]
    print(
        f"return {mean:.2f} (95% interval {low:.2f} to {high:.2f} over {result.evaluation['episodes']} episodes; sum over agents and steps)"
    )
    print(f"run folder {result.folder}; curves: tensorboard --logdir {result.folder}")
    print(json.dumps({**result.evaluation, "folder": str(result.folder), "env_steps_per_s": round(result.steps_per_second)}))
    return result


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


# eval, inspect, tasks, check-env, bench ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalOptions:
    """Play a trained policy without exploration."""

    run: RunFolder
    """Run folder."""
    episodes: int = 256
    """Episodes."""
    seed: int = 1
    """Seed of the episodes."""
    masks: Literal["argmax", "sampled", "expected"] = "argmax"
    """Which masks act: the most likely ones, as deployed; a fresh draw per round; or what training behaves by."""
    gif: Path | None = None
    """Save one episode as a moving picture."""
    random: bool = False
    """Play at random instead, for comparison."""
    device: str = "auto"
    """cpu, cuda or auto."""


def _eval(arguments: list[str]) -> None:
    options = _parse(
        EvalOptions, arguments, "eval", description="Play a trained policy without exploration; returns are summed over agents and steps."
    )
    import torch

    from k24.evaluate import EVAL_SEED, build_env, load_run, play, record_gif, resolve_device, summary

    if options.episodes < 1:
        raise UsageError(f"episodes (={options.episodes}) must be at least 1")
    if not 0 <= options.seed < 2**20:
        raise UsageError(f"seed (={options.seed}) must lie in 0 … {2**20 - 1}")
    device = resolve_device(options.device)
    run = load_run(options.run, device)
    env = build_env(run.config, min(options.episodes, 64), device)
    phase: Any = {"argmax": "deploy", "sampled": "sampled", "expected": "act"}[options.masks]
    actor = run.learner.random_actor() if options.random else run.learner.actor(phase)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        found = {**summary(play(actor, env, options.episodes, EVAL_SEED + options.seed * 1000)), "masks": options.masks, "steps": run.steps}
    if options.gif is not None:
        record_gif(actor, build_env(run.config, 1, device), options.gif)
        print(f"episode drawn in {options.gif}")
    low, high = found["return_ci95"]
    print(f"return {found['return_mean']:.2f} (95% interval {low:.2f} to {high:.2f}, {found['episodes']} episodes)")
    print(
        json.dumps({**found, "task": run.config.task, "policy": "random" if options.random else f"{run.config.algo}-{run.config.sharing}"})
    )


@dataclass(frozen=True)
class InspectOptions:
    """Look at a run's masks."""

    run: RunFolder
    """Run folder."""
    png: Path | None = None
    """Draw mask distances, pattern usage and sparsity into this file."""


def _inspect(arguments: list[str]) -> None:
    options = _parse(InspectOptions, arguments, "inspect", description="Look at a run's masks as they would be deployed.")
    from rich.console import Console
    from rich.table import Table

    from k24.evaluate import load_run
    from k24.inspection import inspect_run, plot_inspection

    run = load_run(options.run)
    found = inspect_run(run)
    console = Console()
    title = f"{run.config.task}  {run.config.algo}-{run.config.sharing}  step {run.steps:,}"
    console.print(title)
    table = Table()
    table.add_column("layer")
    table.add_column("sparsity", justify="right")
    for name, sparsity in found["layers"].items():
        table.add_row(name, f"{sparsity:.3f}")
    table.add_row("overall", f"{found['overall_sparsity']:.3f}")
    console.print(table)
    if found["pattern_usage"] is not None:
        usage = found["pattern_usage"]
        if len(usage) <= 12:
            console.print("pattern usage  " + "  ".join(f"{k}: {p:.3f}" for k, p in enumerate(usage)))
        console.print(
            f"pattern entropy {found['pattern_entropy']:.3f} bits of {_log2(len(usage)):.3f}; weights that no agent "
            f"keeps {found['dead_weight_frac']:.3f}"
        )
    console.print("mask distance between agents (0 same, 0.5 independent)")
    for row in found["distance"][:16]:
        console.print("  " + " ".join(f"{v:.2f}" for v in row[:16]))
    console.print(
        f"{found['params']:,} parameters, {found['macs_per_act']:,} multiply-adds per joint action, {found['bytes']:,} "
        f"bytes to deploy in float32"
    )
    if options.png is not None:
        plot_inspection(found, options.png, title)
        console.print(f"drawn in {options.png}")
    public = (
        "overall_sparsity",
        "pattern_entropy",
        "mask_hamming",
        "params",
        "macs_per_act",
        "bytes",
        "layers",
        "pattern_usage",
        "distance",
    )
    print(json.dumps({k: found[k] for k in public}))


def _log2(n: int) -> float:
    from k24.sparse.metrics import most_bits

    return most_bits(n)


@dataclass(frozen=True)
class TasksOptions:
    """List tasks."""


def _tasks(arguments: list[str]) -> None:
    _parse(TasksOptions, arguments, "tasks", description="List what can be run here, and what the rest needs.")
    from k24.envs import list_tasks

    rows = list_tasks()
    width = max(len(row.task) for row in rows)
    for row in rows:
        print(f"{row.task:<{width}}  {'ready' if row.available else 'needs: ' + row.how}")


@dataclass(frozen=True)
class CheckEnvOptions:
    """Check an environment."""

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")]
    """Task, as suite/name."""


def _check_env(arguments: list[str]) -> None:
    options = _parse(
        CheckEnvOptions, arguments, "check-env", description="Check that an environment keeps the contract of k24.envs.TeamEnv."
    )
    from k24.envs import check_env, make_env

    checks = check_env(lambda: make_env(options.task, 4))
    for check in checks:
        print(f"ok  {check}")
    print(json.dumps({"ok": True, "checks": [str(c) for c in checks]}))


def _bench(arguments: list[str]) -> None:
    from k24.bench import BenchTrain, bench_train

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: k24 bench train [options]\n\n  train   one whole gradient step beside a dense net unrolled step by "
            "step, and whole training loops"
        )
        return
    kinds = {"train"}
    if arguments[0] not in kinds:
        raise unknown_name("benchmark", arguments[0], kinds)
    options = _parse(BenchTrain, arguments[1:], "bench train")
    import torch

    print(f"torch {torch.__version__}, {options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    what = {
        "update_ms": f"one update, {options.algo}-{options.sharing}",
        "dense_ms": "same, one dense net",
        "stepwise_ms": "same, dense, step by step",
    }
    found = bench_train(
        options, lambda name, median, spread: print(f"{what[name]:<40} {median:8.2f} ms  (middle half within {spread:.2f})")
    )
    print(f"memory grown by the update {found['update_mb']:.0f} MB; fast and step-by-step path differ by {found['max_rel_err']:.1e}")
    if options.task:
        print(
            f"whole loop on {options.task}: {found['env_steps_per_s']:,} env steps/s at one update per 25, "
            f"{found['env_steps_per_s_rare']:,} at one per 1664"
        )
    print(json.dumps(found))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (_train, "train a team on a task"),
    "eval": (_eval, "play a trained policy"),
    "inspect": (_inspect, "look at a run's masks"),
    "tasks": (_tasks, "list tasks"),
    "check-env": (_check_env, "check an environment against the contract"),
    "bench": (_bench, "measure speed"),
}
