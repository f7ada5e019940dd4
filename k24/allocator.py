"""Memory: freed memory is kept instead of handed back to the system between gradient steps, and where there is too little, that is said.

An update allocates and frees the same few dozen megabytes every time. By default glibc returns large blocks to the
kernel and fetches them again, page by page: some 8 000 page faults in one update of 8 agents with 128 hidden units, a
quarter of its time on a virtual machine. Raising two thresholds keeps the pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from k24.errors import LAST_GOOD, RunError

# Numbers of glibc's mallopt(3) parameters, and values for them in bytes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP, _PAD = 1 << 30, 1 << 26
_LARGEST_FROM_HEAP = 1 << 25  # the most that glibc takes


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; harmless to call again.

    Returns:
        Whether the C library took it; False on other systems, where nothing changes.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_FROM_HEAP), (_TRIM_THRESHOLD, _KEEP), (_TOP_PAD, _PAD))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


@contextlib.contextmanager
def told_when_memory_is_short(remedy: str) -> Iterator[None]:
    """Turns the errors of torch and numpy for memory that can't be had into one of ours.

    Args:
        remedy: What to do about it.

    Raises:
        RunError: There was not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises no type of its own.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        wanted = next((line for line in str(error).splitlines() if "allocate" in line.lower()), "").partition("DefaultCPUAllocator: ")
        raise RunError(f"out of memory ({(wanted[2] or wanted[0]).strip()[:120]}): {remedy}; {LAST_GOOD}") from error
