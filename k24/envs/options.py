"""Options of simulators, which check them in ways of their own, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from k24.errors import K24Error, UsageError, unknown_name

# What simulators raise for options that they do not like.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require_options(task: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises for an option that a task doesn't have; ``max_steps`` every task has.

    Raises:
        UsageError: It names the nearest one.
    """
    known = {*known, "max_steps"}
    for name in given:
        if name not in known:
            raise unknown_name(f"option of {task}", name, known)


def build(task: str, constructor: Callable[..., Any], given: Mapping[str, object], **usual: object) -> Any:
    """Calls a simulator's constructor.

    Args:
        task: What is made, for the error.
        constructor: What makes it.
        given: The user's options.
        **usual: Its other arguments; the user's come first.

    Raises:
        UsageError: The constructor does not take what the user gave.
    """
    try:
        return constructor(**{**usual, **given})
    except K24Error:
        raise
    except REFUSALS as error:
        if not given:
            raise
        raise refused(task, given, error) from error


def refused(task: str, given: Mapping[str, object], error: Exception) -> UsageError:
    """The error for options that a simulator does not take, on one line."""
    options = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return UsageError(f"{task} can't be made with {options}: {' '.join(str(error).split()) or type(error).__name__}")
