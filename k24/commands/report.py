"""``k24 report``: statistics, tables and pictures over finished runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from k24.commands.options import parse
from k24.errors import UsageError


@dataclass(frozen=True)
class ReportOptions:
    """What to compare, and how."""

    folders: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR…")]
    """Folders with runs somewhere below them."""
    out: Path = Path("report")
    """Folder for the report."""
    metric: Literal["return", "win_rate"] = "return"
    """What to compare."""
    score: Literal["final", "training"] = "final"
    """Of the final evaluation, or the mean of the evaluations over training, which tells who learns sooner."""
    reference: str | None = None
    """Method that the others are compared with, as its folder is called; the first that is k24 when not given."""
    partial: bool = False
    """Compare what all methods have, and say what is left out, instead of refusing."""
    random: bool = False
    """Play each task at random too, and scale scores from there."""
    latency: int | None = None
    """Time an acting step of each method's deployed policy, in so many environments at once."""
    reps: int = 5000
    """Bootstrap samples."""


def report_command(arguments: list[str]) -> None:
    """Reads the options, writes the report, and prints it; the last line is JSON."""
    text = "Compare finished runs: means and interquartile means with bootstrap intervals, who beats whom, costs, and pictures."
    options = parse(ReportOptions, arguments, "report", description=text)
    if not options.folders:
        raise UsageError("no folder given: name one with runs below it, such as results")
    if options.reps < 1:
        raise UsageError(f"reps (={options.reps}) must be at least 1")
    if options.latency is not None and options.latency < 1:
        raise UsageError(f"latency (={options.latency}) must be at least 1: it is the number of environments that act at once")
    from k24.report import report

    found = report(**vars(options))
    print((options.out / "report.md").read_text(encoding="utf-8"))
    print(f"written to {options.out}: report.md, report.json, marl_eval.json and pictures")
    seeds = {task: len(values["seeds"]) for task, values in found["tasks"].items()}
    print(json.dumps({"metric": found["metric"], "seeds": seeds, "iqm": {m: v["iqm"] for m, v in found["together"].items()}}))
