"""Carrying a sweep out: who trains when, what is tried again, and what is known of each run meanwhile."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k24.errors import RunError, UsageError, describe
from k24.sweep import worker
from k24.sweep.plan import Cell, evaluation_of

# Seconds between looks at the board.
POLL = 0.5
# Ray's object store holds nothing here; this is the least that it takes.
STORE = 80 * 2**20


@dataclass
class Status:
    """How a run does.

    Attributes:
        cell: The run.
        state: ``skipped`` if it was finished before; ``stopped`` if the sweep was asked to stop before it was finished.
        steps: Environment steps done, as far as its log says.
        rate: Steps per second; None where not known.
        value: Mean return of the newest evaluation; None before the first.
        failures: One line for each time that it failed.
    """

    cell: Cell
    state: Literal["waiting", "running", "finished", "skipped", "failed", "stopped"] = "waiting"
    steps: int = 0
    rate: float | None = None
    value: float | None = None
    failures: list[str] = field(default_factory=list)

    def read_evaluation(self) -> bool:
        """Takes steps and return from the run's end, if it has come to one."""
        found = evaluation_of(self.cell.folder)
        if found is not None:
            self.steps, self.value = self.cell.config.steps, float(found["return_mean"])
        return found is not None


def sweep(
    cells: Sequence[Cell],
    jobs: int | None = None,
    address: str | None = None,
    retries: int = 1,
    on_change: Callable[[Sequence[Status]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Status]:
    """Trains all runs that are not finished; one that fails is tried again, going on from its checkpoint, and stops no other.

    Args:
        cells: The runs.
        jobs: How many train at a time; None for one per core of this machine, or as many as a cluster has room for.
        address: Of a Ray cluster, e.g. ``ray://head:10001``; None for this machine alone.
        retries: How often a run that failed is tried again.
        on_change: Called now and then.
        should_stop: Asked as often; when it says yes, running trainings save themselves and the sweep ends.

    Returns:
        One status for each run, in their order.

    Raises:
        UsageError: Ray is missing, the cluster does not answer, or a folder can't be made.
        RunError: Ray broke down.
    """
    statuses = [Status(cell) for cell in cells]
    for status in statuses:
        if status.cell.state == "finished" and status.read_evaluation():
            status.state = "skipped"
    queue = deque(number for number, status in enumerate(statuses) if status.state == "waiting")
    if queue:
        for number in queue:
            _make_parent(statuses[number].cell.folder)
        with session(address, jobs) as ray:
            try:
                _carry_out(ray, statuses, queue, jobs, retries, on_change, should_stop)
            except ray.exceptions.RayError as error:
                raise RunError(f"Ray broke down ({describe(error)[:300]}): the same command goes on where the runs stopped") from error
    return statuses


def _carry_out(
    ray: Any,
    statuses: list[Status],
    queue: deque[int],
    jobs: int | None,
    retries: int,
    on_change: Callable[[Sequence[Status]], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    ray.cloudpickle.register_pickle_by_value(worker)
    board = ray.remote(num_cpus=0)(worker.Board).remote()
    work = ray.remote(num_cpus=1, max_retries=0)(worker.work)
    flying: dict[Any, int] = {}
    stopping = False
    while queue or flying:
        if not stopping and should_stop is not None and should_stop():
            stopping = True
            for number in queue:
                statuses[number].state = "stopped"
            queue.clear()
            ray.get(board.stop.remote())
        while queue and (jobs is None or len(flying) < jobs):
            number = queue.popleft()
            cell = statuses[number].cell
            folder = str(cell.folder.absolute())
            arguments = ["k24", "train", *(folder if a == str(cell.folder) else a for a in cell.arguments)]
            flying[work.remote(number, arguments, folder, os.getcwd(), board)] = number
        done = ray.wait(list(flying), timeout=POLL)[0] if flying else []
        for number, news in ray.get(board.read.remote()).items():
            if number not in flying.values():
                continue  # the last word of a process that died since
            status = statuses[number]
            status.state = "running"
            status.steps, status.rate = news.get("steps", status.steps), news.get("rate")
            status.value = news.get("return", status.value)
        for ref in done:
            status = statuses[number := flying.pop(ref)]
            try:
                state, reason = ray.get(ref)
            except ray.exceptions.RayError as error:
                state, reason = "failed", f"its process on Ray died ({describe(error)[:300]})"
            status.rate = None
            if state == "finished" and not status.read_evaluation():
                state, reason = (
                    "failed",
                    f"it ended well, but there is no {status.cell.folder / 'eval.json'}: is --out a folder that all machines see?",
                )
            if state == "failed":
                status.failures.append(reason)
                if len(status.failures) <= retries and not stopping:
                    state = "waiting"
                    queue.append(number)
            status.state = state
        if on_change is not None:
            on_change(statuses)


@contextlib.contextmanager
def session(address: str | None, jobs: int | None) -> Iterator[Any]:
    """Ray, started or connected to, and left again; a session that this process has already is used, and left open.

    Args:
        address: Of a cluster; None to start Ray on this machine.
        jobs: Trainings at a time on this machine; one per core when None.

    Raises:
        UsageError: Ray is missing, or there is nobody at the address.
    """
    require_ray()
    # Told nobody, no less of the processor for trainings than for other programs, and GPUs left to be seen by who did not ask for one.
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_worker_niceness", "0"), ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")):
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Ray Client connection timed out", UserWarning)  # an error says so too
            # JAX, where a task was built with it, warns of what Ray does here: a fork whose child is another program at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            if address is None:
                ray.init("local", num_cpus=jobs or cores(), include_dashboard=False, object_store_memory=STORE, **quiet)
            else:
                ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        said = describe(error)[:300]
        if address is None:
            raise UsageError(f"Ray does not start on this machine ({said}): is there memory left, and can /tmp be written?") from error
        raise UsageError(
            f"no Ray cluster answers at {address} ({said}): give ray://HOST:10001, with the address that 'ray start --head' printed; where "
            "the cluster asks for a token, set RAY_AUTH_MODE=token"
        ) from error
    try:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray has put a handler of its own there, which ends the process at once
        yield ray
    finally:
        ray.shutdown()


def require_ray() -> None:
    """Raises where Ray is not installed.

    Raises:
        UsageError: It says how to get it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("k24 sweep needs the package 'ray', which is not installed: pip install 'k24[sweep]'")


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_parent(folder: Path) -> None:
    """Makes the folder that a run folder and its log will be in."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write the run folder {folder} ({error.strerror}): choose another --out") from error
