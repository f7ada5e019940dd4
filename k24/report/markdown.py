"""A report as text."""

from __future__ import annotations

import math
from typing import Any

from k24.report.statistics import Estimate
from k24.report.summary import MARGIN

DEFINED = {
    "return": "**Return**: rewards as the environment gives them, undiscounted, summed over agents and over the steps of an episode; "
    "of a run, the mean over {episodes} episodes of its final evaluation with the deployed masks.",
    "win_rate": "**Win rate**: share of {episodes} episodes of a run's final evaluation that ended in victory, with the deployed masks.",
}

COSTS = {"macs_per_act": "multiply-adds", "params": "parameters", "bytes": "bytes", "latency_us": "µs to act"}


def write(summary: dict[str, Any], pictures: dict[str, str], episodes: str) -> str:
    """The report in Markdown.

    Args:
        summary: Of :func:`k24.report.summary.summarise`, and ``latency_envs`` and ``costs_unknown``.
        pictures: File by title, in the order in which they are shown.
        episodes: Of the final evaluations, as text.
    """
    metric, reference = summary["metric"], summary["reference"]
    lines = ["# Report", "", DEFINED[metric].format(episodes=episodes), ""]
    if summary["score"] == "training":
        lines += ["**Scores are means over training**: of the evaluations of the deployed masks, the area under the learning curve.", ""]
    lines += [
        "Intervals are of 95%: Student's t for the mean of one task, percentile bootstraps over the seeds of each task for all else.",
        "",
    ]
    if summary["left_out"]:
        lines += ["**Left out:** " + "; ".join(summary["left_out"]) + ".", ""]
    if summary["costs_unknown"]:
        lines += ["**Costs unknown:** " + "; ".join(summary["costs_unknown"]) + ".", ""]
    if summary["latency_envs"] is not None:
        timed = f"one call of the exported policy for {summary['latency_envs']} environments at once, one thread"
        lines += [f"**µs to act**: {timed}, all methods of a task in turns in one process (machine: latency.json).", ""]
    few = min(len(task["seeds"]) for task in summary["tasks"].values())
    if few < 5:
        lines += [f"**Few seeds:** some task has {few}; bootstraps of so few runs are too narrow. Read differences as leads.", ""]

    for name, task in summary["tasks"].items():
        digits = _digits(*task["range"])
        count = len(task["seeds"])
        about = f"{', '.join(a.upper() for a in task['algo'])}, {_numbers(task['steps'])} steps, hidden {_numbers(task['hidden'])}"
        seeds = f"{count} seed{'s' * (count > 1)} ({', '.join(map(str, task['seeds']))})"
        lines += [f"## {name}", "", f"{about} where a method does not say otherwise; {seeds}."]
        if task["random"] is not None:
            lines[-1] += f" Random play: {task['random']:.{digits}f}."
        if len(set(task["critic_hidden"].values())) > 1:
            widths = ", ".join(f"{method} {width}" for method, width in task["critic_hidden"].items())
            lines += ["", f"**Critics are not equally wide:** {widths}. They cost nothing to run, and wider ones may teach better."]
        costs = {key: title for key, title in COSTS.items() if any(key in found for found in task["methods"].values())}
        head = ["method", "mean", "95% interval", "IQM", "95% interval", "each seed", *costs.values()]
        lines += ["", _row(head), _row(["---"] * len(head))]
        for method, found in sorted(task["methods"].items(), key=lambda item: -item[1]["mean"].value):
            mean, iqm = found["mean"], found["iqm"]
            cells = [method, f"{mean.value:.{digits}f}", _interval(mean, digits), f"{iqm.value:.{digits}f}", _interval(iqm, digits)]
            cells.append(", ".join(f"{value:.{digits}f}" for value in found["each"]))
            cells += [f"{found[key]:,}" if key in found else "" for key in costs]
            lines.append(_row(cells))
        lines.append("")

    several = len(summary["tasks"]) > 1
    if several:
        lines += [
            "## Each task",
            "",
            "IQM with its interval.",
            "",
            _row(["method", *summary["tasks"]]),
            _row(["---"] * (1 + len(summary["tasks"]))),
        ]
        for method in summary["together"]:
            each = [(task["methods"][method]["iqm"], _digits(*task["range"])) for task in summary["tasks"].values()]
            lines.append(_row([method, *(f"{iqm.value:.{digits}f} ({_interval(iqm, digits)})" for iqm, digits in each)]))
        lines.append("")
    lines += ["## All tasks together" if several else "## Normalised", ""]
    known = [name for name, task in summary["tasks"].items() if task["random"] is not None]
    low = "what random play gets" if len(known) == len(summary["tasks"]) else "the worst run of all methods"
    if known and len(known) < len(summary["tasks"]):
        low += f" (random play for {', '.join(known)})"
    scaled = f"Scores are scaled per task: 0 is {low}, 1 the best run.{_below(summary['tasks'])}"
    lines += [
        scaled if metric == "return" else "Win rates stand as they are, from 0 to 1.",
        "",
        _row(["method", "IQM", "mean", "median"]),
        _row(["---"] * 4),
    ]
    for method, found in sorted(summary["together"].items(), key=lambda item: -item[1]["iqm"].value):
        lines.append(_row([method, *(f"{found[k].value:.3f} ({_interval(found[k], 3)})" for k in ("iqm", "mean", "median"))]))
    lines.append("")

    if reference is not None:
        lines += [f"## {reference} against the others", ""]
        said = f"Probability that a run of {reference} is better than one of the other method, mean over tasks"
        lines += [
            f"{said}; better and worse where intervals of means are apart; at least level where the interval of {reference}'s IQM ends no "
            f"lower than the other's IQM less {MARGIN:.0%} of what lies between random play (or else the worst run of the two) "
            "and the best of the two. With few seeds that is easily reached: read it beside the means.",
            "",
            _row(["other", "probability", "better on", "undecided on", "worse on", "at least level on"]),
            _row(["---"] * 6),
        ]
        for other, chance in summary["improvement"].items():
            where = {v: [t for t in summary["tasks"] if summary["against"][t][other] == v] for v in ("better", "undecided", "worse")}
            where["level"] = [t for t in summary["tasks"] if summary["level"][t][other]]
            cells = [other, f"{chance.value:.2f} ({_interval(chance, 2)})", *(", ".join(where[v]) or "–" for v in where)]
            lines.append(_row(cells))
        lines.append("")
    for title, file in pictures.items():
        lines += [f"![{title}]({file})", ""]
    return "\n".join(lines)


def _numbers(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)


def _below(tasks: dict[str, Any]) -> str:
    """On which tasks no run was better than random play."""
    below = [name for name, task in tasks.items() if task["random"] is not None and task["range"][0] != task["random"]]
    return f" On {', '.join(below)} no run is better than random play: there 0 is the worst run, and 1 random play." if below else ""


def _digits(low: float, high: float) -> int:
    """Digits after the point that tell scores of such a range apart: three or so in all."""
    return min(4, max(0, 2 - math.floor(math.log10(high - low)))) if high > low else 2


def _interval(found: Estimate, digits: int) -> str:
    if found.low is None or found.high is None:
        return "unknown, one seed"
    return f"{found.low:.{digits}f} to {found.high:.{digits}f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
