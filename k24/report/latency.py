"""How long the deployed policies of a report take to act, all methods of a task in turns."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k24.bench.timing import machine, race
from k24.errors import UsageError
from k24.export import export_run
from k24.files import write_atomically
from k24.policy import Policy, load_policy
from k24.report.runs import Grid


def latencies(grid: Grid, path: Path, rows: int, seconds: float = 2.0) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Microseconds of :meth:`k24.policy.Policy.act` with one thread, from observations to actions, of each method's first run.

    The methods of a task take turns in one process. What was measured is kept in a file with the machine it was measured on, and a task is
    measured anew only where its runs or ``rows`` are others than they were.

    Args:
        grid: The runs.
        path: ``latency.json``.
        rows: Environments that act at once.
        seconds: About how long each task takes.

    Returns:
        Times by method and task; and why some can't be had.

    Raises:
        UsageError: The file is damaged.
    """
    kept = _read(path)
    found: dict[tuple[str, str], float] = {}
    unknown: list[str] = []
    for task in grid.tasks:
        folders = {method: grid.runs[method, task][0].folder for method in grid.methods}
        runs = {method: _identity(folder) for method, folder in folders.items()}
        timed = kept.get(task)
        if timed is None or timed["envs"] != rows or not runs.items() <= timed["runs"].items():
            timed = kept[task] = {"envs": rows, "runs": runs, "machine": machine(), **_race(folders, rows, seconds)}
            write_atomically(path, json.dumps(kept, indent=1).encode())
        found |= {(method, task): timed["us"][method] for method in grid.methods if method in timed["us"]}
        unknown += [f"latency of {method} on {task}: {timed['failed'][method]}" for method in grid.methods if method in timed["failed"]]
    return found, unknown


def _race(folders: dict[str, Path], rows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median microseconds of each method that can be timed, and why the others can't."""
    acting, failed = {}, {}
    for method, folder in folders.items():
        try:
            acting[method] = _acting(folder, rows)
        except UsageError as error:
            failed[method] = str(error)
    us: dict[str, float] = {}
    if acting:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            raced = race(acting, seconds=seconds)
        finally:
            torch.set_num_threads(before)
        us = {method: round(raced.median(method), 2) for method in acting}
    return {"us": us, "failed": failed}


def _identity(folder: Path) -> str:
    """Tells one run from another that has its name: a digest of what it was and how it ended."""
    return hashlib.sha256((folder / "config.yaml").read_bytes() + (folder / "eval.json").read_bytes()).hexdigest()[:16]


def _acting(folder: Path, rows: int) -> Callable[[], object]:
    """One step of a run's policy, as it is deployed, on observations of noise."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "policy.safetensors"
        export_run(folder, file)
        policy = load_policy(file, threads=1)
        obs, slots = _noise(policy, rows)
        _, state = policy.act(obs, None, slots=slots)
    return partial(policy.act, obs, state, slots=slots)


def _noise(policy: Policy, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Observations, and whose they are where the policy can't tell."""
    spec = policy.spec
    draw = torch.Generator().manual_seed(0)
    obs = torch.randn(spec.n_agents, rows, spec.obs_dim, generator=draw)
    if spec.slots != "given":
        return obs, None
    return obs, torch.randint(policy.net.n_slots, obs.shape[:-1], generator=draw)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(task): {
                "envs": int(old["envs"]),
                "runs": {str(method): str(run) for method, run in old["runs"].items()},
                "us": {str(method): float(us) for method, us in old["us"].items()},
                "failed": {str(method): str(reason) for method, reason in old["failed"].items()},
                "machine": dict(old["machine"]),
            }
            for task, old in kept.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: delete it, and add --latency to measure again") from error
