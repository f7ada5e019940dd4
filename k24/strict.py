"""Values from outside, checked one by one before anything relies on them.

Each function but the last returns what it was given if that is as it should be, and says what is wrong otherwise. What it quotes is cut
to a few dozen characters, so that a message stays one line whatever was in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from reprlib import repr as shown
from typing import Any

from k24.errors import UsageError

MAX_TEXT = 200  # characters
MAX_INT = (1 << 63) - 1


def parse_json(raw: bytes | str, what: str) -> dict[str, Any]:
    """Parses JSON, as strictly as it is meant: UTF-8, no key twice, no NaN, an object at the top.

    Raises:
        UsageError: It is anything else.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key stands twice")
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        # Given bytes, json would take UTF-16 and UTF-32 too.
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        result = json.loads(text, object_pairs_hook=table, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else shown(str(error))
        raise UsageError(f"{what} cannot be read as JSON ({reason})") from error
    if not isinstance(result, dict):
        raise UsageError(f"{what} must be a JSON object, got {shown(result)}")
    return result


def table(value: Any, what: str, keys: Iterable[str]) -> dict[str, Any]:
    """An object with just these keys."""
    if not isinstance(value, dict) or set(value) != set(keys):
        raise UsageError(f"{what} must have the keys {', '.join(keys)}, got {shown(sorted(value) if isinstance(value, dict) else value)}")
    return value


def items(value: Any, what: str, sizes: Iterable[int] | None = None) -> list[Any]:
    """A list, of one of these sizes."""
    if not isinstance(value, list) or (sizes is not None and len(value) not in sizes):
        long = "" if sizes is None else f" of {' or '.join(map(str, sizes))}"
        raise UsageError(f"{what} must be a list{long}, got {shown(value)}")
    return value


def whole(value: Any, what: str, least: int, most: int = MAX_INT) -> int:
    """A whole number in range; a bool is none."""
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{what} must be a whole number in {least}..{most}, got {shown(value)}")
    return value


def flag(value: Any, what: str) -> bool:
    """True or false; a number is neither."""
    if type(value) is not bool:
        raise UsageError(f"{what} must be true or false, got {shown(value)}")
    return value


def text(value: Any, what: str) -> str:
    """A short line."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        raise UsageError(f"{what} must be a line of 1..{MAX_TEXT} characters, got {shown(value)}")
    return value


def one_of(value: Any, what: str, known: Iterable[str]) -> str:
    """One of these texts."""
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{what} must be one of {', '.join(known)}, got {shown(value)}")
    return value


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
