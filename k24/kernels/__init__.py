"""One function, several backends: run a net of masked layers, fast.

``prepare(net, "cpu")`` brings a :class:`~k24.kernels.net.Net` into the form that a backend runs; calling the result runs it. All backends
compute what ``reference`` computes; where an input is infinite or NaN, they may differ in which outputs it spoils. ``prepare(net, "auto")``
times those that can run here and keeps the fastest.

Backends load what they need (a shared library, a compiler) when they are asked for and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from k24.errors import UsageError, unknown_name
from k24.kernels import cpu, cusparselt, dense, dispatch, reference, triton
from k24.kernels.net import GRU, Linear, Net, Prepared


@dataclass(frozen=True)
class Backend:
    """A way to run a net.

    Attributes:
        about: One line for people.
        unavailable: Why it cannot run this net here; None if it can.
        prepare: Brings a net into its form, for so many threads (None for as many as torch uses).
    """

    about: str
    unavailable: Callable[[Net], str | None]
    prepare: Callable[[Net, int | None], Prepared]


BACKENDS: dict[str, Backend] = {
    "reference": Backend("plain torch, the definition of correct", reference.unavailable, lambda net, _: reference.Reference(net)),
    "dense": Backend("masks multiplied in, one batched product per layer", dense.unavailable, lambda net, _: dense.Dense(net)),
    "dense_linear": Backend(
        "masks multiplied in, one product per slot and layer", dense.unavailable, lambda net, _: dense.Dense(net, True)
    ),
    "cpu": Backend("C++, the kept weights of each slot packed", cpu.unavailable, lambda net, threads: cpu.Cpu(net, threads)),
    "cpu_shared": Backend(
        "C++, shared weights and a bit per weight and slot", cpu.unavailable, lambda net, threads: cpu.Cpu(net, threads, "shared")
    ),
    "triton": Backend("GPU, shared weights and a bit per weight and slot", triton.unavailable, lambda net, _: triton.TritonNet(net)),
    "cusparselt": Backend(
        "GPU, NVIDIA's 2:4 product per slot and layer", cusparselt.unavailable, lambda net, _: cusparselt.CuSparseLtNet(net)
    ),
}


def prepare(net: Net, backend: str = "auto", threads: int | None = None) -> Prepared:
    """Brings a net into the form that a backend runs.

    Args:
        net: The net, on the device it is to run on.
        backend: A name of ``BACKENDS``, or ``auto``.
        threads: CPU threads of backends that have their own; as many as torch uses when None.

    Raises:
        UsageError: There is no such backend, or it cannot run this net here; the message says why. Or the number of threads is none.
    """
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads < 2**31):
        raise UsageError(f"threads (={threads}) must be a whole number from 1 on, or None for as many as torch uses")
    if backend == "auto":
        candidates = dispatch.CANDIDATES.get(net.device.type, ())
        available = tuple(name for name in candidates if BACKENDS[name].unavailable(net) is None)
        make = partial(prepare, threads=threads)
        build = f"{cpu.build()}; " if net.device.type == "cpu" else ""
        return dispatch.Auto(net, make, available, threads, build + dispatch.versions())
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, [*BACKENDS, "auto"])
    reason = BACKENDS[backend].unavailable(net)
    if reason is not None:
        raise UsageError(f"backend {backend!r} cannot run this net here: {reason}")
    return BACKENDS[backend].prepare(net, threads)


__all__ = ["BACKENDS", "GRU", "Backend", "Linear", "Net", "Prepared", "prepare"]
