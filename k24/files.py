"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that replaces ``path`` once all is written; if that fails, ``path`` stays as it was.

    The contents go to a temporary file beside it (``<name>.<thread>.tmp``, so that two writers do not meet), are flushed to disk, and only
    then take its name.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[bool]:
    """Takes a folder for oneself while the block runs; whoever dies gives it back.

    Yields:
        False if another process, or another block, has it. True where the file system or the platform knows no locks.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file by new contents, or leaves it as it was; see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)
