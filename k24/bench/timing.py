"""Fair timing: candidates take turns, and what is compared are their times within one round.

A machine that others use changes its speed from second to second. So all candidates run in one process, one short sample each per round and
in an order that rotates; a speed-up is the median over rounds of the ratio *within* a round, which a busy moment leaves alone, and not the
ratio of two medians.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from k24.kernels.cpu import best_isa

# Runs a function so many times and tells the seconds it took.
Sampler = Callable[[Callable[[], object], int], float]

# Worker threads of torch, ONNX Runtime and OpenMP go on spinning for a while after a call. They must have gone to sleep before the next
# candidate starts, or it would share its cores with them.
SPIN_SECONDS = 0.01

# A clock that stands still must not make the calibration run for ever.
MOST_CALLS = 1_000_000


@dataclass(frozen=True)
class Race:
    """What was measured.

    Attributes:
        us: Microseconds per call, one value per round and in the same order of rounds for each name.
    """

    us: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Microseconds per call."""
        return statistics.median(self.us[name])

    def iqr(self, name: str) -> float:
        """Interquartile range in microseconds; 0 after a single round."""
        if len(self.us[name]) < 2:
            return 0.0
        quartiles = statistics.quantiles(self.us[name], n=4)
        return quartiles[2] - quartiles[0]

    def speedup(self, name: str, over: str) -> float:
        """How many times faster ``name`` is than ``over``: the median of the ratios within each round."""
        return statistics.median(theirs / max(ours, 1e-9) for ours, theirs in zip(self.us[name], self.us[over], strict=True))


def on_cpu(clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Samples by a clock.

    Args:
        clock: Tells seconds.
    """

    def sample(function: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return clock() - start

    return sample


def on_cuda(flush_bytes: int = 0) -> Sampler:
    """Samples by CUDA events on the current stream. Never run so far: no machine with a GPU was at hand.

    Args:
        flush_bytes: Overwrite a buffer of this size before each call, so that it finds nothing of its own in the L2 cache; 0 leaves the
            cache warm.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    scratch = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")

    def timed(function: Callable[[], object], calls: int) -> float:
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def cold(function: Callable[[], object], calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            scratch.zero_()
            seconds += timed(function, 1)
        return seconds

    return cold if flush_bytes else timed


def race(
    functions: Mapping[str, Callable[[], object]],
    sample: Sampler | None = None,
    rounds: int | None = None,
    seconds: float = 1.5,
    sample_seconds: float = 0.002,
    warm: bool = True,
    pause: float = 0.0,
) -> Race:
    """Times functions against each other.

    Args:
        functions: The candidates by name.
        sample: How to time; by the CPU's clock when None.
        rounds: Samples of each candidate; as many as fit into ``seconds``, but 5 to 200, when None.
        seconds: About how long the whole takes.
        sample_seconds: How long a sample lasts at least: what is shorter is called several times in it.
        warm: Call each candidate once more before each of its samples, so that it does not pay for the caches that the one before filled.
        pause: Seconds of rest before each sample; see ``SPIN_SECONDS``.

    Returns:
        Times by name.
    """
    sample = sample or on_cpu()
    calls, cost = {}, 0.0
    for name, function in functions.items():
        sample(function, 3)
        calls[name], took = _calibrate(function, sample, sample_seconds)
        cost += took * (calls[name] + warm) + pause
    if rounds is None:
        rounds = max(5, min(200, int(seconds / max(cost, 1e-9))))
    names = list(functions)
    us: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for k in range(rounds):
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                if pause:
                    time.sleep(pause)
                if warm:
                    functions[name]()
                us[name].append(sample(functions[name], calls[name]) / calls[name] * 1e6)
    return Race(us)


def _calibrate(function: Callable[[], object], sample: Sampler, seconds: float) -> tuple[int, float]:
    """How many calls a sample of that length takes, and the seconds of one call."""
    calls = 1
    while (took := sample(function, calls)) < seconds and calls < MOST_CALLS:
        calls = min(MOST_CALLS, calls * max(2, min(100, int(seconds / max(took, 1e-9)))))
    each = took / calls
    return max(1, min(calls, round(seconds / max(each, 1e-9)))), each


@contextlib.contextmanager
def _no_garbage_collection():
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# Where a figure was measured --------------------------------------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a speed depends on besides the code.

    ``cpu``, ``cores``, ``load`` (processes that wanted one in the last minute), ``isa`` (what torch uses), ``k24_isa`` (what our kernels
    use), ``gpu``, versions, and the ``commit`` of k24 in a checkout.

    Args:
        device: ``cuda`` asks for the GPU's name too.
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "k24_isa": best_isa(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "k24": _version("k24"),
        "commit": _commit(Path(__file__).parents[2]),
    }


def header(found: Mapping[str, Any], threads: int) -> str:
    """One line about :func:`machine` for people.

    Args:
        found: What it returned.
        threads: How many were used.
    """
    commit = f" at {found['commit']}" if found["commit"] else ""
    load = "" if found["load"] is None else f" with load {found['load']}"
    where = found["gpu"] or f"{found['cpu']} ({found['cores']} cores{load}; torch {found['isa']}, k24 {found['k24_isa'] or 'none'})"
    runtime = f", onnxruntime {found['onnxruntime']}" if found["onnxruntime"] else ""
    return f"{where}, {threads} thread{'s' if threads > 1 else ''}; torch {found['torch']}{runtime}, k24 {found['k24']}{commit}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the checkout whose root is ``folder``, with ``-dirty`` for changes; None where it is none, or git is missing."""
    if not (folder / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None
