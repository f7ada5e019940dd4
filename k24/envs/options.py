"""Options of simulators, which check them in ways of their own, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from k24.errors import UsageError, unknown_name


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
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        if not given:
            raise
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UsageError(f"{task} can't be made with {options}: {error or type(error).__name__}") from error
