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


# What scores lie between by what they are, where they do.
Bounds = tuple[float, float] | None
BOUNDS: dict[str, Bounds] = {"return": None, "win_rate": (0.0, 1.0)}
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
    first: dict[tuple[str, str], RunRecord] = {}
    for run in (run for runs in grid.runs.values() for run in runs):
        if METRICS[metric] not in run.evaluation:
            raise UsageError(f"{run.folder} has no {metric}: its task knows no victory, compare returns")
        if score == "training":
            _require_whole(run, f"{metric}_eval")
            # Learners count steps in portions of their own, so that only those of one learner are evaluated equally often.
            _require_as_often(run, first.setdefault((run.task, run.config.algo), run), f"{metric}_eval")

    def one(run: RunRecord) -> float:
        if score == "final":
            return _without_rounding(run.evaluation[METRICS[metric]])
        steps, values = np.array(run.curve(f"{metric}_eval")).T
        return _without_rounding(np.trapezoid(values, steps) / (steps[-1] - steps[0]))

    return {cell: np.array([one(run) for run in runs]) for cell, runs in grid.runs.items()}


def _without_rounding(value: float) -> float:
    """Six digits: a return is a sum of float32 numbers, and what its order of summing leaves must not count as a win."""
    return float(f"{value:.6g}")


def _require_whole(run: RunRecord, name: str) -> None:
    """Refuses a curve that says less of a run than those of others do."""
    curve, remedy = run.curve(name), "compare final scores, or run it again"
    if len(curve) < 2:
        raise UsageError(f"{run.folder} was evaluated less than twice in training: compare final scores, or train it with --eval-every")
    if len(curve) < sum(name in row for row in run.log):
        raise UsageError(f"{run.folder} has evaluations in its log that are no numbers: {remedy}")
    if curve[-1][0] < run.config.steps:
        raise UsageError(f"{run.folder} trained for {run.config.steps:,} steps, and its log ends at {curve[-1][0]:,}: {remedy}")


def _require_as_often(run: RunRecord, other: RunRecord, name: str) -> None:
    """Refuses two curves of unequally many points: an area is another one then, whatever was learned.

    Not of unequal steps: where episodes end early, rounds of two runs end at different steps.
    """
    mine, theirs = len(run.curve(name)), len(other.curve(name))
    if mine != theirs:
        said = f"{run.folder} was evaluated {mine} times in training, {other.folder} {theirs} times"
        raise UsageError(f"{said}: compare final scores, or train with equal --eval-every, longer than a round")


def ranges(grid: Grid, values: Values, random: dict[str, float], bounds: Bounds = None) -> dict[str, tuple[float, float]]:
    """What a score is measured in on each task: the worst run of all (or random play, where known) and the best run.

    Where no run is better than random play, it is what the best would be: 0 is the worst run then, and 1 random play.

    Args:
        grid: The runs.
        values: What each scored.
        random: What random play gets, by task; tasks may be missing.
        bounds: What all scores are known to lie between, which is taken then.
    """
    if bounds is not None:
        return dict.fromkeys(grid.tasks, bounds)
    every = {task: np.concatenate([values[method, task] for method in grid.methods]) for task in grid.tasks}
    spans = {}
    for task, scores in every.items():
        worst, best = float(scores.min()), float(scores.max())
        played = random.get(task, worst)
        spans[task] = (played, best) if played < best else (worst, max(best, played))
    return spans


def normalised(grid: Grid, values: Values, random: dict[str, float], bounds: Bounds = None) -> dict[str, Scores]:
    """Scores of each method, one array per task, from 0 to 1 over :func:`ranges`; one half where all are equal. Arguments as there."""
    spans = ranges(grid, values, random, bounds)

    def scaled(method: str, task: str) -> np.ndarray:
        scores, (low, high) = values[method, task], spans[task]
        same = high - low <= 1e-6 * max(abs(low), abs(high))  # rounding is no difference to be blown up
        return np.full_like(scores, 0.5) if same else (scores - low) / (high - low)

    return {method: [scaled(method, task) for task in grid.tasks] for method in grid.methods}


def summarise(
    grid: Grid, values: Values, reference: str | None, random: dict[str, float], costs: dict, reps: int, bounds: Bounds = None
) -> dict[str, Any]:
    """Everything that is written into ``report.json``, but for what it is called.

    Args:
        grid: The runs.
        values: What each scored.
        reference: Method that the others are compared with; None for no such comparison.
        random: What random play gets, by task.
        costs: By method and task: ``macs_per_act``, ``params``, ``bytes`` and ``latency_us``, as far as they are known.
        reps: Bootstrap samples.
        bounds: What all scores are known to lie between.
    """
    spans = ranges(grid, values, random, bounds)
    tasks: dict[str, dict[str, Any]] = {}
    for task in grid.tasks:
        seeds = [run.seed for run in grid.runs[grid.methods[0], task]]
        tasks[task] = {"random": random.get(task), "range": spans[task], "methods": {}, "seeds": seeds, **_settings_of(grid, task)}
        for method in grid.methods:
            scored = values[method, task]
            tasks[task]["methods"][method] = {
                "mean": statistics.student(scored),
                "iqm": statistics.estimate(statistics.iqm, [scored], reps=reps),
                "each": scored.tolist(),
                **costs.get((method, task), {}),
            }
    scores = normalised(grid, values, random, bounds)
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
            other: statistics.estimate(
                statistics.probability_of_improvement, *([values[m, task] for task in grid.tasks] for m in (reference, other)), reps=reps
            )
            for other in others
        }
        result["against"] = {task: {other: _verdict(tasks[task]["methods"], reference, other) for other in others} for task in grid.tasks}
        result["level"] = {
            task: {
                other: result["against"][task][other] != "worse"
                and _is_level(
                    tasks[task]["methods"], reference, other, _margin(random.get(task), values[reference, task], values[other, task])
                )
                for other in others
            }
            for task in grid.tasks
        }
    return result


def _verdict(methods: dict[str, Any], reference: str, other: str) -> str:
    """``better`` or ``worse`` where the intervals of the means are apart, else ``undecided``."""
    mine, theirs = (methods[name]["mean"] for name in (reference, other))
    if None in (*mine, *theirs):
        return "undecided"
    return "better" if mine.low > theirs.high else "worse" if mine.high < theirs.low else "undecided"


def _settings_of(grid: Grid, task: str) -> dict[str, Any]:
    """What a task's runs have in common, or all that there is of it, what a method's name says being its own; and how wide critics are."""
    configs = [grid.runs[method, task][0].config for method in grid.methods]
    plain = [grid.runs[method, task][0].config for method in grid.methods if "," not in method] or configs
    return {
        "algo": sorted({config.algo for config in configs}),
        "steps": sorted({config.steps for config in plain}),
        "hidden": sorted({config.hidden for config in plain}),
        "critic_hidden": {
            method: config.critic_hidden for method, config in zip(grid.methods, configs, strict=True) if config.critic_hidden is not None
        },
    }


def _margin(random: float | None, mine: np.ndarray, theirs: np.ndarray) -> float:
    """By how much one of two methods may be worse: a share of what lies between random play, or else their worst run, and their best."""
    both = np.concatenate([mine, theirs])
    low = float(both.min()) if random is None else min(random, float(both.max()))
    return MARGIN * (float(both.max()) - low)


def _is_level(methods: dict[str, Any], reference: str, other: str, margin: float) -> bool:
    """Whether the reference is at least level (not inferior): the interval of its IQM ends no lower than the margin below theirs."""
    low = methods[reference]["iqm"].low
    return low is not None and low >= methods[other]["iqm"].value - margin


def marl_eval(grid: Grid) -> dict[str, Any]:
    """The runs in the layout that the marl-eval tools read: environment, task (in lower case), algorithm, run, steps."""
    result: dict[str, Any] = {}
    for (method, task), runs in grid.runs.items():
        plain_task, comma, arguments = task.lower().partition(",")
        suite, slash, name = plain_task.partition("/")
        suite, name = (suite, name) if slash else ("own", plain_task)
        # Its tools refuse commas in the name of an algorithm.
        into = result.setdefault(suite, {}).setdefault(name + comma + arguments, {}).setdefault(method.replace(",", ";"), {})
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
