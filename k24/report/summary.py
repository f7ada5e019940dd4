"""Numbers of a report: each method on each task, all tasks together, who beats whom, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from k24.report import statistics
from k24.report.runs import Grid, RunRecord
from k24.report.statistics import Estimate, Scores

# By how much of a task's range a method may be worse and still count as level.
MARGIN = 0.02
METRICS = {"return": "return_mean", "win_rate": "win_rate"}


def scores_of(runs: list[RunRecord], metric: str) -> np.ndarray:
    """Final evaluations, one number per seed."""
    return np.array([float(run.evaluation[METRICS[metric]]) for run in runs])


def ranges(grid: Grid, metric: str, random: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What a score is measured in on each task: the worst run of all (or random play, where known) and the best run.

    Args:
        grid: The runs.
        metric: ``return`` or ``win_rate``.
        random: What random play gets, by task; tasks may be missing.
    """
    every = {task: np.concatenate([scores_of(grid.runs[method, task], metric) for method in grid.methods]) for task in grid.tasks}
    return {task: (random.get(task, float(scores.min())), float(scores.max())) for task, scores in every.items()}


def normalised(grid: Grid, metric: str, random: dict[str, float]) -> dict[str, Scores]:
    """Scores of each method, one array per task, from 0 to 1 over :func:`ranges`; arguments as there."""
    spans = ranges(grid, metric, random)

    def scaled(method: str, task: str) -> np.ndarray:
        scores, (low, high) = scores_of(grid.runs[method, task], metric), spans[task]
        return (scores - low) / (high - low) if high > low else np.ones_like(scores)

    return {method: [scaled(method, task) for task in grid.tasks] for method in grid.methods}


def summarise(grid: Grid, metric: str, reference: str | None, random: dict[str, float], costs: dict, reps: int) -> dict[str, Any]:
    """Everything that is written into ``report.json``.

    Args:
        grid: The runs.
        metric: ``return`` or ``win_rate``.
        reference: Method that the others are compared with; None for no such comparison.
        random: What random play gets, by task.
        costs: By method and task: ``macs_per_act``, ``params``, ``bytes`` and ``latency_us``, as far as they are known.
        reps: Bootstrap samples.
    """
    tasks: dict[str, Any] = {}
    for task in grid.tasks:
        tasks[task] = {"random": random.get(task), "methods": {}, "seeds": [run.seed for run in grid.runs[grid.methods[0], task]]}
        for method in grid.methods:
            runs = grid.runs[method, task]
            values = scores_of(runs, metric)
            tasks[task]["methods"][method] = {
                "mean": statistics.student(values),
                "iqm": statistics.estimate(statistics.iqm, [values], reps=reps),
                "each": values.tolist(),
                **costs.get((method, task), {}),
            }
    scores = normalised(grid, metric, random)
    result: dict[str, Any] = {
        "metric": metric,
        "reference": reference,
        "tasks": tasks,
        "together": {
            method: {
                name: statistics.estimate(function, scores[method], reps=reps)
                for name, function in (("iqm", statistics.iqm), ("mean", statistics.mean), ("median", statistics.median))
            }
            for method in grid.methods
        },
        "left_out": grid.left_out,
    }
    if reference is not None:
        others = [method for method in grid.methods if method != reference]
        result["improvement"] = {
            other: statistics.estimate(statistics.probability_of_improvement, scores[reference], scores[other], reps=reps)
            for other in others
        }
        result["against"] = {task: {other: _verdict(tasks[task]["methods"], reference, other) for other in others} for task in grid.tasks}
        margins = {task: MARGIN * (high - low) for task, (low, high) in ranges(grid, metric, random).items()}
        result["level"] = {
            task: {other: _is_level(tasks[task]["methods"], reference, other, margins[task]) for other in others} for task in grid.tasks
        }
    return result


def _verdict(methods: dict[str, Any], reference: str, other: str) -> str:
    """``better`` or ``worse`` where the intervals of the means are apart, else ``undecided``."""
    mine, theirs = (methods[name]["mean"] for name in (reference, other))
    if None in (*mine, *theirs):
        return "undecided"
    return "better" if mine.low > theirs.high else "worse" if mine.high < theirs.low else "undecided"


def _is_level(methods: dict[str, Any], reference: str, other: str, margin: float) -> bool:
    """Whether the reference is at least level (not inferior): the interval of its IQM ends no lower than the margin below theirs."""
    low = methods[reference]["iqm"].low
    return low is not None and low >= methods[other]["iqm"].value - margin


def marl_eval(grid: Grid) -> dict[str, Any]:
    """The runs in the layout that the marl-eval tools read: environment, task (in lower case), algorithm, run, steps."""
    result: dict[str, Any] = {}
    for (method, task), runs in grid.runs.items():
        suite, _, name = task.lower().partition("/")
        into = result.setdefault(suite, {}).setdefault(name, {}).setdefault(method, {})
        for run in runs:
            logged = {name: dict(run.curve(f"{name}_eval")) for name, key in METRICS.items() if key in run.evaluation}
            steps: dict[str, Any] = {
                f"step_{k}": {"step_count": step, **{name: [values[step]] for name, values in logged.items() if step in values}}
                for k, step in enumerate(sorted(logged["return"]))
            }
            final = {name: [float(run.evaluation[METRICS[name]])] for name in logged}
            into[f"run_{run.seed}"] = {**steps, "absolute_metrics": final}
    return result


def plain(value: Any) -> Any:
    """Estimates as dictionaries, for JSON."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
