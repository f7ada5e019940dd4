"""Options: arguments into dataclasses, and what is wrong with them into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from k24.errors import UsageError

T = TypeVar("T")
RunFolder = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]


class HelpShown(Exception):
    """Nothing is left to do."""


def parse(cls: type[T], arguments: Sequence[str], command: str, default: T | None = None, description: str | None = None) -> T:
    """Reads options into a dataclass.

    Raises:
        HelpShown: They asked for help, which has been printed.
        UsageError: Something is wrong with them.
    """
    _require_once(cls, arguments)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            extra: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(arguments), prog=f"k24 {command}", description=description, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise HelpShown from None
        raise UsageError(_one_line(stderr.getvalue(), command)) from None


def _require_once(cls: type, arguments: Sequence[str]) -> None:
    """Refuses an option of several values that is given again, because only the last one would count."""
    given = [item.partition("=")[0].replace("_", "-") for item in arguments]
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        if str(field.type).startswith("tuple[") and given.count(flag) > 1:
            raise UsageError(f"{flag} is given {given.count(flag)} times: give all values after one {flag}")


def _one_line(message: str, command: str) -> str:
    """The first paragraph of a boxed message, and the option it suggests."""
    rows = [re.sub(r"[│╭╮╰╯]|^[+|]|[+|]$", "", line).strip() for line in message.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for row in rows[1:]:
        if set(row) <= {"─", "-"} and row:
            paragraphs.append([])
        elif row:
            paragraphs[-1].append(row)
    first = re.sub(r"^Error parsing (--\S+: )?(\S+: )?", r"\1", " ".join(paragraphs[0])) or "wrong options"
    first = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"wants a whole number such as 1000000, got \1", first)
    first = re.sub(r"could not convert string to float: (.*)", r"wants a number, got \1", first)
    if command == "train":
        first = re.sub(r"^(Unrecognized options: [^-\s,=]+/[^\s,=]+)$", r"\1 (TASK comes first, options after it)", first)
    # A setting that may be left open is a union for the parser, which tells what each of its types says.
    first = re.sub(r"no type matching \{None\}\|\S+ could be instantiated.* (wants a .*?), got (.*)", r"\1 or None, got \2", first)
    first = re.sub(r"^Missing from k24 [^:]*: (\S+) .*", r"\1 is missing", first)
    for paragraph in paragraphs[1:]:
        if paragraph and paragraph[0].startswith("Perhaps you meant") and len(paragraph) > 1:
            first += f" (did you mean {paragraph[1].split()[0]}?)"
    return f"{first.rstrip('.')}{'' if first.endswith('?') else ';'} 'k24 {command} --help' lists the options"


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, which stays; of several the last, which is the one that counts."""
    found = None
    for k, item in enumerate(arguments):
        if item == flag:
            found = arguments[k + 1] if k + 1 < len(arguments) else None
        elif item.startswith(flag + "="):
            found = item[len(flag) + 1 :]
    return found


def take(arguments: list[str], flag: str) -> str | None:
    """Removes ``--flag VALUE`` or ``--flag=VALUE`` and returns the value."""
    for k, item in enumerate(arguments):
        if item == flag:
            if k + 1 >= len(arguments):
                raise UsageError(f"{flag} wants a value")
            value = arguments[k + 1]
            if value.startswith("--"):
                raise UsageError(f"{flag} wants a value, got {value}")
            del arguments[k : k + 2]
            return value
        if item.startswith(flag + "="):
            del arguments[k]
            return item[len(flag) + 1 :]
    return None
