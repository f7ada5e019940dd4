"""Numbers of a report: each method on each task, all tasks together, who beats whom, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from k24.errors import UsageError
from k24.report import statistics
from k24.report.runs import Grid, RunRecord
from k24.report.statistics import Estimate, Scores

# By how much of a task's range a method may be worse and still count as level.
MARGIN = 0.02
METRICS = {"return": "return_mean", "win_rate": "win_rate"}
SCORES = ("final", "training")


# One number for each run of a method on a task.
Values = dict[tuple[str, str], np.ndarray]


def values_of(grid: Grid, metric: str, score: str) -> Values:
    """What each run scored.

    Args:
        grid: The runs.
        metric: ``return`` or ``win_rate``.
        score: ``final``, its final evaluation; or ``training``, the mean of its evaluations over training (the area under its learning
            curve, divided by the steps), which tells who learns sooner where all end at the same.

    Raises:
        UsageError: A run has no such evaluation.
    """
    for run in (run for runs in grid.runs.values() for run in runs):
        if METRICS[metric] not in run.evaluation:
            raise UsageError(f"{run.folder} has no {metric}: its task knows no victory, compare returns")
        if score == "training" and len(run.curve(f"{metric}_eval")) < 2:
            raise UsageError(f"{run.folder} was evaluated less than twice in training: compare final scores, or train it with --eval-every")

    def one(run: RunRecord) -> float:
        if score == "final":
            return float(run.evaluation[METRICS[metric]])
        steps, values = np.array(run.curve(f"{metric}_eval")).T
        return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))

    return {cell: np.array([one(run) for run in runs]) for cell, runs in grid.runs.items()}


def ranges(grid: Grid, values: Values, random: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What a score is measured in on each task: the worst run of all (or random play, where known) and the best run.

    Args:
        grid: The runs.
        values: What each scored.
        random: What random play gets, by task; tasks may be missing.
    """
    every = {task: np.concatenate([values[method, task] for method in grid.methods]) for task in grid.tasks}
    return {task: (random.get(task, float(scores.min())), float(scores.max())) for task, scores in every.items()}


def normalised(grid: Grid, values: Values, random: dict[str, float]) -> dict[str, Scores]:
    """Scores of each method, one array per task, from 0 to 1 over :func:`ranges`; arguments as there."""
    spans = ranges(grid, values, random)

    def scaled(method: str, task: str) -> np.ndarray:
        scores, (low, high) = values[method, task], spans[task]
        return (scores - low) / (high - low) if high > low else np.ones_like(scores)

    return {method: [scaled(method, task) for task in grid.tasks] for method in grid.methods}


def summarise(grid: Grid, values: Values, reference: str | None, random: dict[str, float], costs: dict, reps: int) -> dict[str, Any]:
    """Everything that is written into ``report.json``, but for what it is called.

    Args:
        grid: The runs.
        values: What each scored.
        reference: Method that the others are compared with; None for no such comparison.
        random: What random play gets, by task.
        costs: By method and task: ``macs_per_act``, ``params``, ``bytes`` and ``latency_us``, as far as they are known.
        reps: Bootstrap samples.
    """
    spans = ranges(grid, values, random)
    tasks: dict[str, dict[str, Any]] = {}
    for task in grid.tasks:
        seeds = [run.seed for run in grid.runs[grid.methods[0], task]]
        tasks[task] = {"random": random.get(task), "range": spans[task], "methods": {}, "seeds": seeds}
        for method in grid.methods:
            scored = values[method, task]
            tasks[task]["methods"][method] = {
                "mean": statistics.student(scored),
                "iqm": statistics.estimate(statistics.iqm, [scored], reps=reps),
                "each": scored.tolist(),
                **costs.get((method, task), {}),
            }
    scores = normalised(grid, values, random)
    result: dict[str, Any] = {
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
        margins = {task: MARGIN * (high - low) for task, (low, high) in spans.items()}
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
