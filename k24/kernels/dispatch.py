"""The automatic choice of a backend: time the candidates once, remember the winner.

Which backend is fastest depends on the machine, on the net and on how many rows come at a time, and no rule of thumb gets all of it
right. So ``auto`` measures: at the first call with about so many rows (in powers of two) each candidate that can run here runs a few
times, in turns, and the fastest is used from then on. Dense torch is always among them, so that nothing chosen is slower than it.

The result goes into ``dispatch.json`` in the user's cache folder (``~/.cache/k24``, or ``K24_CACHE_DIR``), under a key that names
everything it depends on. The file may be deleted at any time; one that cannot be read or written is done without.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k24.errors import UsageError
from k24.kernels.net import GRU, Linear, Net, Prepared

# Per device; a candidate that cannot run a net is left out.
CANDIDATES = {"cpu": ("cpu", "cpu_shared", "dense", "dense_linear"), "cuda": ("triton", "cusparselt", "dense", "dense_linear")}
ROUNDS, SECONDS = 7, 0.002  # rounds per candidate, and about how long one lasts
MOST_SECONDS = 0.5  # of all rounds together, after which the present one is the last
HOPELESS = 3.0  # times slower than the best so far: such a candidate leaves the race


def cache_path() -> Path:
    """Where choices are remembered."""
    folder = os.environ.get("K24_CACHE_DIR")
    if folder:
        return Path(folder) / "dispatch.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k24" / "dispatch.json"


@cache
def device_name(device: torch.device) -> str:
    """The model of a CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        # Names alone are not enough: in a virtual machine all CPUs of a maker may have the same.
        return f"{about['model name']} family {about['cpu family']} model {about['model']}"
    return platform.processor() or platform.machine()


def signature(net: Net) -> str:
    """What of a net its speed depends on."""

    def linear(layer: Linear) -> str:
        kind = f"{layer.patterns}x{layer.codes.shape[0]}" if layer.codes is not None else f"dense x{layer.weight.shape[0]}"
        return f"{layer.in_features}-{layer.out_features} {kind}"

    parts = [f"gru({linear(b.input)}, {linear(b.recurrent)})" if isinstance(b, GRU) else linear(b) for b in net.blocks]
    return f"{net.n_slots} slots {str(net.dtype).removeprefix('torch.')}: {', '.join(parts)}"


def fastest(candidates: Mapping[str, Callable[[], object]], synchronize: Callable[[], None] = lambda: None) -> tuple[str, dict[str, float]]:
    """Times candidates in turns.

    Args:
        candidates: What to run, by name.
        synchronize: Waits until the device is done.

    Returns:
        The name of the fastest by its median, and all medians in microseconds.
    """

    def timed(function: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize()
        return (time.perf_counter() - start) / repeats

    repeats, best = {}, float("inf")
    for name, function in candidates.items():
        timed(function, 1)  # compiles, fills caches
        once = max(timed(function, 2), 1e-7)
        best = min(best, once)
        if once <= HOPELESS * best:
            repeats[name] = max(1, min(1000, int(SECONDS / once)))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    end = time.perf_counter() + MOST_SECONDS
    for _ in range(ROUNDS):
        for name, times in repeats.items():
            samples[name].append(timed(candidates[name], times) * 1e6)
        if time.perf_counter() > end:
            break
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return min(medians, key=medians.__getitem__), medians


class Auto(Prepared):
    """Runs whichever backend is fastest for the rows at hand.

    Args:
        net: What to run.
        make: Prepares a net for a backend by name; raises if it cannot.
        available: Names of backends that can run the net here.
        threads: CPU threads of backends that have their own; as many as torch uses when None.
        key: What else the choice depends on: versions.

    Attributes:
        name: The backend that ran last; ``auto`` before the first call.
    """

    def __init__(self, net: Net, make: Callable[[Net, str], Prepared], available: tuple[str, ...], threads: int | None, key: str) -> None:
        self.net, self.name = net, "auto"
        self._make, self._available, self._threads = make, available, threads
        self._key = f"{key}; {device_name(net.device)}; of {' '.join(available)}; {signature(net)}"
        self._forms: dict[str, Prepared] = {}
        self._chosen: dict[tuple[int, bool, int], str] = {}
        self._last: tuple[tuple[torch.Size, bool, int], Prepared] | None = None  # one object, so that threads see it whole

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of every form in use."""
        return sum(form.nbytes for form in self._forms.values())

    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`."""
        now = (x.shape, slots is None, torch.get_num_threads())
        last = self._last
        if last is None or last[0] != now:
            self._last = last = (now, self._choose(x, h, slots))
        return last[1].run(x, h, slots)

    def _choose(self, x: Tensor, h: Tensor, slots: Tensor | None) -> Prepared:
        rows = x.shape[1] if slots is None else -(-x.shape[0] // self.net.n_slots)
        if rows == 0:  # nothing to measure
            return self._form(self._available[0])
        bucket = 1 << (rows - 1).bit_length(), slots is None, torch.get_num_threads()
        if bucket not in self._chosen:
            self._chosen[bucket] = self._remembered(*bucket) or self._measure(x, h, slots, *bucket)
        self.name = self._chosen[bucket]
        return self._form(self.name)

    def _form(self, name: str) -> Prepared:
        if name not in self._forms:
            self._forms[name] = self._make(self.net, name)
        return self._forms[name]

    def _entry(self, rows: int, blocks: bool, threads: int) -> str:
        own = "" if self._threads is None else f"{self._threads} of "
        return f"{self._key}; {own}{threads} threads; {rows} rows, {'blocks' if blocks else 'mixed'}"

    def _remembered(self, *bucket: Any) -> str | None:
        found = _read().get(self._entry(*bucket))
        name = found.get("backend") if isinstance(found, dict) else None
        return name if name in self._available else None

    def _measure(self, x: Tensor, h: Tensor, slots: Tensor | None, *bucket: Any) -> str:
        # On noise, because a user's NaN or denormals could mislead; of its own, so that nobody's random numbers depend on what is cached.
        noise = torch.Generator(x.device).manual_seed(0)
        x, h = (torch.randn(t.shape, generator=noise, device=t.device, dtype=t.dtype) for t in (x, h))
        if slots is not None:  # all slots alike, whatever the first rows to come were
            slots = torch.arange(x.shape[0], device=x.device) % self.net.n_slots
        forms, runs = {}, {}
        for name in self._available:
            # A candidate that fails here (memory, a shape that a library does not take) is none.
            with contextlib.suppress(RuntimeError, ValueError, MemoryError):
                form = self._forms.get(name) or self._make(self.net, name)
                form.run(x, h, slots)
                forms[name], runs[name] = form, partial(form.run, x, h, slots)
        if not forms:
            tried = ", ".join(self._available)
            raise UsageError(f"none of the backends {tried} can run {x.shape[-2]} rows of this net: name one to see why")
        best, medians = fastest(runs, torch.cuda.synchronize if self.net.device.type == "cuda" else lambda: None)
        self._forms[best] = forms[best]
        _remember(self._entry(*bucket), {"backend": best, "us": {name: round(us, 2) for name, us in medians.items()}})
        return best


def _read() -> dict:
    with contextlib.suppress(OSError, ValueError, RecursionError, RuntimeError):  # the last one for a user without a home
        found = json.loads(cache_path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _remember(key: str, value: dict) -> None:
    """Adds an entry; the file is replaced whole, so that readers never see half of one.

    Two writers at once may lose an entry, which is then measured again.
    """
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
            try:
                json.dump(_read() | {key: value}, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def versions() -> str:
    """What else a choice depends on."""
    return f"torch {torch.__version__}; python {sys.version_info.major}.{sys.version_info.minor}"
