"""The command line: the only place that prints and exits.

Exit status 0 on success, 2 for a usage error (nothing was started), 1 for a failure while running, 130 when
interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from k24.commands.bench import bench_command
from k24.commands.envs import check_env_command, tasks_command
from k24.commands.options import HelpShown
from k24.commands.policies import eval_command, export_command, inspect_command
from k24.commands.report import report_command
from k24.commands.sweep import sweep_command
from k24.commands.train import Interrupted, train_command
from k24.errors import K24Error, unknown_name


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
    except Interrupted as stop:
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
    with contextlib.suppress(HelpShown):
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


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train_command, "train a team on a task"),
    "sweep": (sweep_command, "train many methods on many tasks with many seeds"),
    "report": (report_command, "compare finished runs: statistics, tables, pictures"),
    "eval": (eval_command, "play a trained policy"),
    "export": (export_command, "write a trained policy into one file"),
    "inspect": (inspect_command, "look at the masks of a run or a policy"),
    "tasks": (tasks_command, "list tasks"),
    "check-env": (check_env_command, "check an environment against the contract"),
    "bench": (bench_command, "measure speed"),
}
