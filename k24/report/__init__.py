"""Reports over finished runs: statistics with intervals, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from k24.errors import UsageError, unknown_name
from k24.evaluate import EVAL_SEED, build_env, build_learner, load_run, play
from k24.evaluate import summary as summary_of
from k24.files import write_atomically
from k24.inspection import COSTS, costs_of
from k24.report import markdown, pictures
from k24.report.latency import latencies
from k24.report.runs import Grid, make_grid, read_runs
from k24.report.statistics import REPS
from k24.report.summary import BOUNDS, METRICS, SCORES, marl_eval, normalised, plain, summarise, values_of
from k24.strict import is_number

# Episodes of random play.
EPISODES = 256


def report(
    folders: Sequence[Path],
    out: Path,
    metric: str = "return",
    score: str = "final",
    reference: str | None = None,
    partial: bool = False,
    random: bool = False,
    latency: int | None = None,
    reps: int = REPS,
) -> dict[str, Any]:
    """Compares all finished runs below some folders.

    ``out`` gets ``report.md``, ``report.json``, ``marl_eval.json`` and the pictures. The same runs give the same bytes; what was played or
    timed is kept beside them.

    Args:
        folders: Where run folders are.
        out: Folder for the report; made if missing.
        metric: ``return`` or ``win_rate``.
        score: ``final``, of the final evaluation, or ``training``, the mean over training.
        reference: Method that the others are compared with; the first that is k24 when None, else none.
        partial: Compare what all methods have, instead of refusing unequal grids.
        random: Play each task at random too, once; what it gets is kept in ``random.json``.
        latency: Time an acting step of each method's deployed policy in so many environments at once; not timed when None.
        reps: Bootstrap samples.

    Returns:
        What ``report.json`` holds.

    Raises:
        UsageError: Runs are missing, damaged, or can't be compared.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: give folders with runs somewhere below them, such as results/mpe")
    grid = make_grid(*read_runs(folders), partial)
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    if score not in SCORES:
        raise unknown_name("score", score, SCORES)
    values = values_of(grid, metric, score)
    if reference is None:
        reference = next((m for m in grid.methods if m == "k24" or m.partition("-")[2] == "k24"), None)
    elif reference not in grid.methods:
        # As its folder is called: with the algorithm, which is left out of names where each task is learned by one.
        full = {f"{run.config.algo}-{run.method}": run.method for runs in grid.runs.values() for run in runs}
        if reference not in full:
            raise unknown_name("method", reference, grid.methods)
        reference = full[reference]
    try:
        out.mkdir(parents=True, exist_ok=True)
        played = _random_play(grid, out, random, metric)
        costs, unknown = _costs(grid)
        if latency is not None:
            times, more = latencies(grid, out / "latency.json", latency)
            costs = {cell: {**costs.get(cell, {}), **({"latency_us": times[cell]} if cell in times else {})} for cell in grid.runs}
            unknown += more
        about = {"metric": metric, "score": score, "costs_unknown": unknown, "latency_envs": latency}
        summary = about | summarise(grid, values, reference, played, costs, reps, BOUNDS[metric])
        drawn = pictures.draw(grid, summary, normalised(grid, values, played, BOUNDS[metric]), out)
        counts = sorted({int(run.evaluation["episodes"]) for runs in grid.runs.values() for run in runs})
        text = markdown.write(summary, drawn, " or ".join(map(str, counts)))
        write_atomically(out / "report.md", text.encode())
        write_atomically(out / "report.json", json.dumps(plain(summary), indent=1, allow_nan=False).encode())
        write_atomically(out / "marl_eval.json", json.dumps(marl_eval(grid)).encode())
    except OSError as error:
        raise UsageError(f"cannot write the report into {out} ({error.strerror}): choose another --out") from error
    return plain(summary)


def _costs(grid: Grid) -> tuple[dict[tuple[str, str], dict[str, float]], list[str]]:
    """Multiply-adds, parameters and bytes of each method on each task, mean over its runs; and why some can't be had."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    unknown: list[str] = []
    for cell, runs in grid.runs.items():
        try:
            # In the evaluation, if this version of k24 trained it; then a checkpoint, which is large, need not have come along.
            of_runs = [run.evaluation if COSTS[0] in run.evaluation else costs_of(load_run(run.folder).learner) for run in runs]
        except UsageError as error:
            unknown.append(str(error))  # returns can be compared without
            continue
        # What thresholds mask, and into how many clusters agents fall, differs from run to run.
        found[cell] = {name: round(fmean(float(costs[name]) for costs in of_runs)) for name in COSTS}
    return found, unknown


def _random_play(grid: Grid, out: Path, wanted: bool, metric: str) -> dict[str, float]:
    """What random play gets on each task, where it was asked for now or before."""
    path, known = out / "random.json", {}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            known = {str(task): {str(k): float(v) for k, v in found.items()} for task, found in known.items()}
            if not all(is_number(value) for found in known.values() for value in found.values()):
                raise ValueError("not a finite number")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UsageError(f"{path} is damaged: delete it, and add --random to play again") from error
    for task in grid.tasks:
        if not wanted or task in known:
            continue
        config = grid.runs[grid.methods[0], task][0].config
        env = build_env(config, 64)
        try:
            outcome = summary_of(play(build_learner(config, env.spec).random_actor(), env, EPISODES, EVAL_SEED))
        finally:
            env.close()
        known[task] = {name: float(outcome[key]) for name, key in METRICS.items() if key in outcome}
    if wanted:
        write_atomically(path, json.dumps(known, indent=1).encode())
    return {task: known[task][metric] for task in grid.tasks if metric in known.get(task, {})}


__all__ = ["report"]
