"""What runs on Ray: one training, in a process of its own, and the board where all of them write how they do.

Nothing but the standard library is used here, and the driver sends this file along: Ray's processes load neither k24 nor torch, and
nothing that a training does can hurt them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds between looks at a training.
POLL = 0.5
# Seconds to wait for another process that still trains in the same folder, as one does that saves itself after its sweep was killed.
PATIENCE = 60.0

# Ray starts its processes with SIGINT blocked, and whoever they start inherits that. If the process that started a training dies, even by
# SIGKILL, the kernel ends the training too (PR_SET_PDEATHSIG, Linux only; elsewhere it goes on to its end).
LAUNCH = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (ImportError, AttributeError, OSError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Board:
    """Where trainings report and hear whether to stop; an actor on Ray."""

    def __init__(self) -> None:
        self._news: dict[int, dict[str, Any]] = {}
        self._stop = False

    def report(self, run: int, news: dict[str, Any]) -> bool:
        """Notes how a run does.

        Returns:
            Whether it is to stop.
        """
        self._news[run] = news
        return self._stop

    def read(self) -> dict[int, dict[str, Any]]:
        """What came since this was last asked."""
        news, self._news = self._news, {}
        return news

    def stop(self) -> None:
        """Asks everyone to stop."""
        self._stop = True


def work(run: int, arguments: list[str], folder: str, cwd: str, board: Any) -> tuple[str, str]:
    """Trains once, or goes on with a training, in a process of its own.

    Args:
        run: Its number on the board.
        arguments: Those of ``python -m``, with paths that hold anywhere.
        folder: Its run folder; what it prints goes to ``<folder>.log``.
        cwd: Where to run it, if there is such a folder on this machine.
        board: The :class:`Board`.

    Returns:
        ``finished``, ``failed`` or ``stopped``, and the reason in one line.
    """
    import ray

    meter = Meter(Path(folder) / "metrics.jsonl")

    def told_to_stop() -> bool:
        try:
            # Not by ray.get: Ray gives the processor of whoever waits in it to the next run, and soon all of them would train at once.
            return board.report.remote(run, meter.read()).future().result()
        except ray.exceptions.RayError:
            return True  # the sweep is gone

    if told_to_stop():
        return "stopped", ""
    log_path = Path(folder + ".log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a", encoding="utf-8") as log:
        if not locked(log, told_to_stop):
            return ("stopped", "") if told_to_stop() else ("failed", f"another process trains in {folder}")
        start = os.fstat(log.fileno()).st_size
        log.write(f"$ k24 {' '.join(arguments[1:])}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(os.getpid()), "-m", *arguments],
            cwd=cwd if os.path.isdir(cwd) else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for the sweep, which passes it on once.
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        asked = False
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                if told_to_stop() and not asked:
                    asked = True
                    process.send_signal(signal.SIGINT)
        except Exception:
            process.terminate()
            process.wait()
            raise
    if process.returncode == 0:
        return "finished", ""
    # A training that was asked to stop has saved itself only if it ended in one of these ways; 130 is what a shell says of SIGINT.
    if asked and process.returncode in (130, -signal.SIGINT, -signal.SIGTERM):
        return "stopped", ""
    if process.returncode < 0:
        # It had no time to say why, so its last line is about something else.
        with contextlib.suppress(ValueError):
            return "failed", f"ended by {signal.Signals(-process.returncode).name}"
    said = last_line(log_path, start)
    return "failed", f"exit status {process.returncode}" + (f": {said}" if said else "")


class Meter:
    """Reads how far a run is from the end of its ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = -1
        self._first: tuple[float, float] | None = None
        self._news: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """``steps``, ``rate`` in steps per second, and ``return`` of the newest evaluation; what is not known yet is missing."""
        try:
            found = self._path.stat()
            if found.st_mtime_ns == self._seen:
                return self._news
            self._seen = found.st_mtime_ns
            with open(self._path, "rb") as file:
                file.seek(max(0, found.st_size - 2**18))
                lines = file.read().splitlines()
        except OSError:
            return self._news
        rows = []
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
                if "return_eval" in rows[-1]:
                    break
        rows = [row for row in rows if isinstance(row, dict) and "steps" in row]
        if not rows:
            return self._news
        now, steps = found.st_mtime, rows[0]["steps"]
        if self._first is None or steps <= self._first[1]:
            self._first = now, steps  # a run that is resumed first goes back to its checkpoint, or stands at it
        self._news = {"steps": steps}
        if now > self._first[0]:
            self._news["rate"] = (steps - self._first[1]) / (now - self._first[0])
        if "return_eval" in rows[-1]:
            self._news["return"] = rows[-1]["return_eval"]
        return self._news


def locked(file: Any, told_to_stop: Callable[[], bool]) -> bool:
    """Takes a file's lock, which whoever inherits the open file holds too; waits a while for it."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if told_to_stop() or time.monotonic() > end:
                return False
            time.sleep(POLL)
        except OSError:
            return True  # a file system without locks


def last_line(path: Path, start: int) -> str:
    """The last line of a log that says something, from a place on; an error of k24 without its name."""
    with open(path, "rb") as file:
        file.seek(start)
        file.readline()
        file.seek(max(file.tell(), path.stat().st_size - 2**16))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line.removeprefix("k24: ") for line in reversed(lines) if line), "")
