"""One thread a process, no window, fixed seeds: what every test may take for granted."""

from __future__ import annotations

import os

# Read when the libraries load, so set before any of them is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import random
import tempfile

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# What tests measure about speed is theirs alone and forgotten with them. Processes they start inherit it.
_CACHE = tempfile.TemporaryDirectory()
os.environ["K24_CACHE_DIR"] = _CACHE.name

# No deadline, because a busy machine is not a bug; the same examples each time, because a red run must be repeatable.
hypothesis.settings.register_profile("k24", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("k24")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Makes a test's random numbers independent of which tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
