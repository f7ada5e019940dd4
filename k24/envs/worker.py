"""A process that runs some copies of an environment, seen from both of its ends.

``Worker`` is the end of whoever starts it, ``main`` is what runs in it. It is a plain child process that imports what it needs: no fork of
a process that already runs threads, and nothing asked of the script that started it. The two share memory that has no name, and talk
through a socket pair: a request is ``(number, method, arguments)``, an answer ``(number, kind, result)``. Kind ``working`` says that
there is more to come, ``done`` that this was it; a result may be an exception.

However either of them ends, nothing is left behind: the socket tells each that the other is gone, the memory goes with them, and a
worker leads a process group of its own, which is ended with all that its simulator started.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any

from k24.envs.batch import Arrays, Batch
from k24.errors import RAISED, RunError, UsageError, describe

PATIENCE = 300.0  # seconds without a sign of life after which a worker is taken for dead
GRACE = 10.0  # seconds that a worker has for closing its copies
_LOOK_AGAIN = 1.0  # seconds after which to see whether the other end still runs

# sys.path comes first: k24 itself may be found by it alone. The end is that of multiprocessing's children, without what the interpreter
# does at its end: it takes its time once torch is loaded.
_CODE = """
import json, os, sys
sys.path[:] = json.loads(sys.argv.pop())
from k24.envs.worker import main
main(*map(int, sys.argv[1:]))
os._exit(0)
"""
# Many processes share the cores, so none needs threads for its sums.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class WorkerDied(Exception):
    """A worker is gone; says which and how."""


class Worker:
    """One child process and how to talk to it.

    Attributes:
        copies: Which copies it runs.
    """

    def __init__(self, index: int, copies: range, order: tuple[str, str, bytes], memory: int) -> None:
        """Says what is to run; nothing is started.

        Args:
            index: Its number, for people.
            copies: Which copies it is to run.
            order: Module, task and pickled options, see ``Batch``.
            memory: Descriptor of the memory to share, which may be empty until ``bind`` is asked for.
        """
        self.copies = copies
        self._index, self._order, self._memory = index, order, memory
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        # As they are now: relative paths lead elsewhere once the folder has been changed.
        self._path = json.dumps([os.path.abspath(entry) if entry == "" or os.path.isdir(entry) else entry for entry in map(str, sys.path)])

    def start(self) -> None:
        """Starts the process, and asks it to make its copies."""
        self._pipe, theirs = Pipe()
        with theirs:
            given = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, *map(str, given), str(os.getpid()), self._path],
                stdin=subprocess.DEVNULL,
                stdout=2,  # simulators print; the standard output is for results
                pass_fds=given,
                env={**os.environ, **_ONE_THREAD},
                process_group=0,
            )
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self.ask("make", *self._order, self.copies)

    def ask(self, method: str, *arguments: Any) -> None:
        """Asks for a method of the process, see ``_Server``."""
        self._asked += 1
        with contextlib.suppress(OSError):  # whoever is gone is found out by not answering
            if self._process is not None:
                self._pipe.send((self._asked, method, arguments))

    def answer(self) -> Any:
        """Waits for the answer to what was asked last, and returns it; it may be an exception.

        Raises:
            WorkerDied: The process is gone, or was ended because it gave no sign of life for ``PATIENCE`` seconds.
        """
        process = self._process
        if process is None:
            raise WorkerDied(f"worker {self._index} does not run")
        name = f"worker {self._index} (process {process.pid})"
        heard = time.monotonic()
        while True:
            if self._poll.poll(1000 * min(PATIENCE, _LOOK_AGAIN)):
                try:
                    number, kind, result = self._pipe.recv()
                except (EOFError, OSError):
                    break
                except BaseException:
                    self.end(0.0)  # Ctrl-C: the rest of the answer would be taken for the next one
                    raise
                if number == self._asked and kind == "done":
                    return result
                heard = time.monotonic()  # it is at work on this, or still on something that nobody waits for any more
            elif process.poll() is not None:
                break  # though something that it started keeps the socket open
            elif time.monotonic() - heard >= PATIENCE:
                self.end(0.0)
                raise WorkerDied(f"{name} gave no answer for {PATIENCE:g} s")
        self.end(1.0)
        status = process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        raise WorkerDied(f"{name} {how}")

    def end(self, patience: float) -> None:
        """Waits for the process to end of itself, then ends it and all that it started. May be called more than once."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._pipe.close()


def end_all(workers: list[Worker], memory: int, owner: int) -> None:
    """Ends workers and frees what they share, unless this is a fork of the process ``owner`` that they belong to."""
    if os.getpid() != owner:
        return
    for worker in workers:
        worker.ask("close")
    last = time.monotonic() + GRACE
    for worker in workers:
        worker.end(max(0.0, last - time.monotonic()))
    os.close(memory)


def nameless_memory() -> int:
    """The descriptor of an empty file without a name, which goes when nobody has it open any more."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("k24")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Server:
    """What a worker does on request: a method each."""

    def __init__(self, pipe: Connection, memory: int) -> None:
        self._pipe, self._memory = pipe, memory
        self._batch: Batch | None = None

    def run(self) -> bool:
        """Answers until asked to close, or left alone; returns whether it was asked."""
        method = None
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._number, method, arguments = self._pipe.recv()
                if method == "close":
                    break
                try:
                    result = self._do(method, arguments)
                except RAISED as error:
                    result = _portable(error)
                self._pipe.send((self._number, "done", result))
        if self._batch is not None:
            self._batch.close()
        return method == "close"

    def _do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "make":
            module, task, options, copies = arguments
            self._batch = Batch(module, task, pickle.loads(options), copies, self._tick)
            return self._batch.spec, self._batch.sides
        assert self._batch is not None
        if method == "bind":
            (n_envs,) = arguments
            spec = self._batch.spec
            self._batch.bind(Arrays(spec, n_envs, mmap.mmap(self._memory, Arrays.size(spec, n_envs))))
            return None
        return getattr(self._batch, method)(*arguments)

    def _tick(self) -> None:
        self._pipe.send((self._number, "working", None))


def main(pipe: int, memory: int, parent: int) -> None:
    """Runs a worker in this process, which is to end afterwards.

    Args:
        pipe: Descriptor of the socket to whoever started it.
        memory: Descriptor of the memory to share.
        parent: Process id of whoever started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    faulthandler.enable()
    for descriptor in (pipe, memory):
        os.set_inheritable(descriptor, False)  # not for what a simulator starts
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    asked = False
    try:
        asked = _Server(Connection(pipe), memory).run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if not asked:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # nobody else ends what a simulator has started


def _outlive(parent: int) -> None:
    """Ends this process and all that it started where a simulator keeps it from noticing that its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_LOOK_AGAIN)
    time.sleep(GRACE)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _portable(error: BaseException) -> Exception:
    """An exception that can be sent: of a kind that callers tell apart, else a ``RunError``."""
    for kind in (UsageError, RunError, ImportError):
        if isinstance(error, kind):
            return kind(str(error))
    return RunError(describe(error))
