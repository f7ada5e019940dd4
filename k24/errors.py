"""The errors a user can meet.

Each message names the value, what was expected and the remedy, and fits on one line: the command line prints it as it
is. ``UsageError`` means that nothing was started (exit status 2); ``RunError`` means that something failed while
running (exit status 1) and that what was saved before is still good.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

# Said with every failure while running: true also before the first checkpoint was written.
LAST_GOOD = "checkpoints written before are still good"


class K24Error(Exception):
    """Base of every error that k24 raises on purpose."""

    exit_status = 1


class UsageError(K24Error, ValueError):
    """A wrong option, name, file or shape: found before any work started."""

    exit_status = 2


class RunError(K24Error, RuntimeError):
    """A failure while running: NaN in a loss, an environment that broke its contract."""


class CheckpointError(UsageError):
    """A checkpoint that is damaged, of another version, or of another configuration."""


class PolicyFileError(UsageError):
    """A policy file that is missing, damaged, of a newer version, or of another kind."""


def unknown_name(kind: str, name: str, known: Iterable[str], listed: str | None = None) -> UsageError:
    """Builds the error for a name that is not in a table, with the nearest known one.

    Args:
        kind: What the name stands for, e.g. ``"sharing scheme"``.
        name: The name that was given.
        known: The names that exist.
        listed: Where they are listed, said instead of them when there are too many for a line.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = listed or (f"known: {', '.join(known)}" if known else "there are none")
    return UsageError(f"unknown {kind} {name!r}: {hint}")


# What simulators raise. A sys.exit() in their code is no wish to end this program.
RAISED = (Exception, SystemExit)


def describe(error: BaseException) -> str:
    """Type, message and place of an exception, on one line."""
    said = " ".join([type(error).__name__ + ":" * bool(str(error)), *str(error).split()])
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno})" if frames else said
