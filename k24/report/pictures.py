"""Pictures of a report. A method has one colour in all of them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from k24.report import statistics
from k24.report.runs import Grid
from k24.report.statistics import Scores

# Okabe and Ito's colours, which most colour-blind people can tell apart; the reference gets the first.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#999999", "#8C564B", "#17BECF", "#BCBD22", "#7F3C8D"),
)
LABELS = {"return": "return (sum over agents and steps)", "win_rate": "share of episodes won"}
# One of each for each turn of the colours.
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
SCORED = {"final": "", "training": ", mean over training"}

# What is paid for a return: key of a method's numbers, label of the axis, name.
PRICES = (
    ("macs_per_act", "multiply-adds of a joint action", "multiply-adds"),
    ("latency_us", "microseconds to act, {envs} environments at once, one thread", "latency"),
)


def draw(grid: Grid, summary: dict[str, Any], scores: dict[str, Scores], out: Path) -> dict[str, str]:
    """Draws what there is to draw.

    Args:
        grid: The runs.
        summary: Their numbers, of :func:`k24.report.summary.summarise`, and ``latency_envs``.
        scores: Normalised, by method.
        out: Folder for the pictures.

    Returns:
        File by title.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    order = sorted(grid.methods, key=lambda m: (m != summary["reference"], m))
    colour = {method: COLOURS[k % len(COLOURS)] for k, method in enumerate(order)}
    style = {method: STYLES[k // len(COLOURS) % len(STYLES)] for k, method in enumerate(order)}
    marker = {method: MARKERS[k // len(COLOURS) % len(MARKERS)] for k, method in enumerate(order)}
    files: dict[str, str] = {}

    def save(figure: Any, title: str, name: str) -> None:
        # A task's arguments may be long, and file names may not.
        files[title] = re.sub(r"[^\w.=-]+", "_", name[:100] + name[100:][-60:]) + ".png"
        figure.savefig(out / files[title], dpi=130)
        plt.close(figure)

    for task in grid.tasks:
        for name, label in ((f"{summary['metric']}_eval", LABELS[summary["metric"]]), ("snd", "SND"), ("mask_hamming", "mask distance")):
            curves = {m: [c for run in grid.runs[m, task] if len(c := run.curve(name)) > 1] for m in order}
            curves = {m: found for m, found in curves.items() if found}
            if not curves:
                continue
            figure, axis = plt.subplots(figsize=(6.8, 4.2), constrained_layout=True)
            for method, found in curves.items():
                steps, middle, low, high = _band(found)
                axis.plot(steps, middle, style[method], color=colour[method], linewidth=2.2 if method == order[0] else 1.5, label=method)
                axis.fill_between(steps, low, high, color=colour[method], alpha=0.15, linewidth=0)
            if name.endswith("_eval") and summary["tasks"][task]["random"] is not None:
                axis.axhline(summary["tasks"][task]["random"], color="#888888", linestyle="--", linewidth=1, label="random play")
            axis.set(xlabel="environment steps", ylabel=label)
            axis.set_title(f"{task}, {len(grid.runs[order[0], task])} seeds", parse_math=False)
            _finish(axis, len(curves))
            save(figure, f"{task}: {label}", f"{task}-{name}")

    figure, axis = plt.subplots(figsize=(6.8, 0.9 + 0.42 * len(order)), constrained_layout=True)
    ranked = sorted(order, key=lambda m: summary["together"][m]["iqm"].value)
    for place, method in enumerate(ranked):
        found = summary["together"][method]["iqm"]
        if found.low is not None:
            axis.barh(place, found.high - found.low, left=found.low, height=0.55, color=colour[method], alpha=0.35)
        axis.plot([found.value] * 2, [place - 0.28, place + 0.28], color=colour[method], linewidth=3)
    axis.set(yticks=range(len(ranked)), yticklabels=ranked, xlabel="interquartile mean of normalised scores, 95% interval")
    axis.margins(x=0.06)
    axis.grid(alpha=0.3, axis="x")
    save(figure, "All tasks: interquartile mean", "iqm")

    figure, axis = plt.subplots(figsize=(6.8, 4.2), constrained_layout=True)
    levels = np.linspace(0, 1, 101)
    for method in order:
        share = statistics.profile(scores[method], levels)
        axis.plot(levels, share, style[method], color=colour[method], linewidth=2.2 if method == order[0] else 1.5, label=method)
        if all(len(s) > 1 for s in scores[method]):
            low, high = statistics.bootstrap(partial(statistics.profile, levels=levels), scores[method], reps=1000)
            axis.fill_between(levels, low, high, color=colour[method], alpha=0.12, linewidth=0)
    axis.set(xlabel="normalised score", ylabel="share of runs above it", title="performance profile")
    _finish(axis, len(order))
    save(figure, "All tasks: performance profile", "profile")

    for task in grid.tasks:
        methods = summary["tasks"][task]["methods"]
        for key, label, name in PRICES:
            if not all(key in methods[m] for m in order):
                continue
            figure, axis = plt.subplots(figsize=(6.8, 4.2), constrained_layout=True)
            points = {m: (methods[m][key], methods[m]["mean"].value) for m in order}
            front = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
            axis.step(*zip(*front, strict=True), where="post", color="#bbbbbb", linewidth=1, zorder=0)
            for place, (method, (cost, value)) in enumerate(points.items()):
                mean = methods[method]["mean"]
                error = None if mean.low is None else [[max(value - mean.low, 0)], [max(mean.high - value, 0)]]
                shown: dict[str, Any] = {
                    "fmt": marker[method],
                    "color": colour[method],
                    "capsize": 3,
                    "label": method,
                    "zorder": 3 - place / len(points),
                }
                axis.errorbar(cost, value, error, **shown)
            axis.set(xlabel=label.format(envs=summary["latency_envs"]), ylabel=LABELS[summary["metric"]] + SCORED[summary["score"]])
            title = f"{task}, {len(grid.runs[order[0], task])} seeds; grey: nothing is both cheaper and better"
            axis.set_title(title, fontsize=10, parse_math=False)
            axis.ticklabel_format(axis="x", style="plain")
            axis.margins(x=0.15)
            _finish(axis, len(order))
            save(figure, f"{task}: {LABELS[summary['metric']]} against {name}", f"{task}-{name}")
    return files


def _band(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, ...]:
    """Steps, mean over seeds, and its bootstrap interval; seeds meet on straight lines between their points."""
    end = min(curve[-1][0] for curve in curves)
    steps = np.array(sorted({step for curve in curves for step, _ in curve if step <= end}))
    rows = np.stack([np.interp(steps, [step for step, _ in curve], [value for _, value in curve]) for curve in curves])
    middle = rows.mean(0)
    if len(rows) == 1:
        return steps, middle, middle, middle
    low, high = statistics.bootstrap(lambda s: np.stack([t.mean(-1) for t in s], -1), list(rows.T), reps=1000)
    return steps, middle, low, high


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point of (cost, return) is no dearer and no worse than another one, and not the same."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def _finish(axis: Any, lines: int) -> None:
    axis.grid(alpha=0.3)
    if lines > len(COLOURS):
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(frameon=False, fontsize=9, ncols=2 if lines > 6 else 1)
