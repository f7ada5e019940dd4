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
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from k24.kernels.net import GRU, Linear, Net, Prepared

# Per device; a candidate that cannot run a net is left out.
CANDIDATES = {"cpu": ("cpu", "cpu_shared", "dense", "dense_linear"), "cuda": ("triton", "cusparselt", "dense", "dense_linear")}
ROUNDS, SECONDS = 7, 0.002  # rounds per candidate, and about how long one lasts


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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def signature(net: Net) -> str:
    """What of a net its speed depends on."""

    def linear(layer: Linear) -> str:
        kind = f"{layer.patterns}x{layer.codes.shape[0]}" if layer.codes is not None else f"dense x{layer.weight.shape[0]}"
        return f"{layer.in_features}-{layer.out_features} {kind}"

    parts = [f"gru({linear(b.input)}, {linear(b.recurrent)})" if isinstance(b, GRU) else linear(b) for b in net.blocks]
    return f"{net.n_slots} slots {str(net.dtype).removeprefix('torch.')}: {', '.join(parts)}"


def fastest(candidates: dict[str, Callable[[], object]], synchronize: Callable[[], None] = lambda: None) -> tuple[str, dict[str, float]]:
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

    repeats = {}
    for name, function in candidates.items():
        timed(function, 1)
        repeats[name] = max(1, min(1000, int(SECONDS / max(timed(function, 2), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, function in candidates.items():
            samples[name].append(timed(function, repeats[name]) * 1e6)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return min(medians, key=medians.__getitem__), medians


class Auto(Prepared):
    """Runs whichever backend is fastest for the rows at hand.

    Args:
        net: What to run.
        make: Prepares a net for a backend by name; raises if it cannot.
        available: Names of backends that can run the net here.
        threads: CPU threads, for the key of the cache.
        key: What else the choice depends on: versions.

    Attributes:
        name: The backend that ran last; ``auto`` before the first call.
    """

    def __init__(self, net: Net, make: Callable[[Net, str], Prepared], available: tuple[str, ...], threads: int, key: str) -> None:
        self.net, self.name = net, "auto"
        self._make, self._available = make, available
        self._key = f"{key}; {device_name(net.device)}; {threads} threads; {signature(net)}"
        self._forms: dict[str, Prepared] = {}
        self._chosen: dict[tuple[int, bool], str] = {}
        self._last: tuple[torch.Size, bool] | None = None
        self._runs: Prepared | None = None

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of every form in use."""
        return sum(form.nbytes for form in self._forms.values())

    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`."""
        now = (x.shape, slots is None)
        if now != self._last:
            self._runs = self._choose(x, h, slots)
            self._last = now
        assert self._runs is not None
        return self._runs.run(x, h, slots)

    def _choose(self, x: Tensor, h: Tensor, slots: Tensor | None) -> Prepared:
        rows = x.shape[1] if slots is None else -(-x.shape[0] // self.net.n_slots)
        bucket = 1 << max(0, rows - 1).bit_length(), slots is None
        if bucket not in self._chosen:
            self._chosen[bucket] = self._remembered(*bucket) or self._measure(x, h, slots, *bucket)
        self.name = self._chosen[bucket]
        if self.name not in self._forms:
            self._forms[self.name] = self._make(self.net, self.name)
        return self._forms[self.name]

    def _entry(self, rows: int, blocks: bool) -> str:
        return f"{self._key}; {rows} rows, {'blocks' if blocks else 'mixed'}"

    def _remembered(self, rows: int, blocks: bool) -> str | None:
        found = _read().get(self._entry(rows, blocks))
        name = found.get("backend") if isinstance(found, dict) else None
        return name if name in self._available else None

    def _measure(self, x: Tensor, h: Tensor, slots: Tensor | None, rows: int, blocks: bool) -> str:
        # Zeros would flatter nobody, but a user's NaN or denormals could: time on noise.
        x, h = torch.randn_like(x, dtype=torch.float32), torch.randn_like(h, dtype=torch.float32)
        forms = {name: self._forms.get(name) or self._make(self.net, name) for name in self._available}
        synchronize = torch.cuda.synchronize if self.net.device.type == "cuda" else lambda: None
        best, medians = fastest({name: lambda f=form: f.run(x, h, slots) for name, form in forms.items()}, synchronize)  # type: ignore[misc]
        self._forms[best] = forms[best]
        _remember(self._entry(rows, blocks), {"backend": best, "us": {name: round(us, 2) for name, us in medians.items()}})
        return best


def _read() -> dict:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(cache_path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _remember(key: str, value: dict) -> None:
    """Adds an entry; the file is replaced whole, so that readers never see half of one.

    Two writers at once may lose an entry, which is then measured again.
    """
    path = cache_path()
    with contextlib.suppress(OSError):
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
