"""Fills the tables of docs/results.md that are made from a report, each between two comments that name it.

    python docs/_tables.py           # rewrites docs/results.md, after `k24 report … --out docs/reports/NAME`

A table between ``<!-- report NAME, DIGITS digits -->`` and ``<!-- end of report -->`` holds what docs/reports/NAME/report.json says:
of one task each method's mean, its interval and each run, of several tasks each method's interquartile means. The one between
``<!-- summary -->`` and ``<!-- end of summary -->`` has a row for each of ``SUMMARY``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- report (\S+), (\d) digits -->\n)(.*?)(<!-- end of report -->)", re.DOTALL)
SUMMARISED = re.compile(r"(<!-- summary -->\n)(.*?)(<!-- end of summary -->)", re.DOTALL)
# Name of a row, the reports it comes from (of each method the first that has it), how its task ends there, digits.
SUMMARY = (
    ("`toy/specialisation`, 2 agents, mean over training", "specialisation_2", "=2", 3),
    ("4 agents", "specialisation", "=4", 3),
    ("8 agents", "specialisation", "=8", 3),
    ("16 agents", "specialisation", "=16", 3),
    ("`vmas/blind_spread`, 8 agents, QMIX", "blind_spread", "", 1),
    ("8 agents, MAPPO", "blind_spread_mappo", "", 1),
    ("16 agents, QMIX", "blind_spread_16 blind_spread_16_macs", "", 1),
    ("`mpe/simple_spread`, MAPPO", "simple_spread", "", 1),
    ("`mpe/simple_spread`, QMIX", "simple_spread_qmix", "", 1),
    ("`vmas/navigation`", "navigation", "", 2),
    ("`vmas/dispersion`", "dispersion dispersion_macs", "", 2),
    ("`mpe/simple_speaker_listener`, MATD3", "speaker_listener", "", 1),
    ("`smax/smacv2_5_units`, episodes won", "smax", "", 3),
)
COMPARED = ("k24", "k24,hidden=92", "fups_id", "kaleidoscope", "k24_random", "k24_random,hidden=92")


def filled(page: str, reports: Path = DOCS / "reports") -> str:
    """A page with its tables as the reports have them.

    Args:
        page: Markdown.
        reports: Folder of all reports.
    """

    def tasks(report: str) -> dict[str, Any]:
        return json.loads((reports / report / "report.json").read_text(encoding="utf-8"))["tasks"]

    def table(found: re.Match[str]) -> str:
        of = tasks(found[2])
        rows = _one(*of.values(), int(found[3])) if len(of) == 1 else _several(of, int(found[3]))
        return found[1] + _lines(rows) + found[5]

    def methods(report: str, ending: str) -> dict[str, Any]:
        return next(task["methods"] for key, task in tasks(report).items() if key.endswith(ending))

    def summary(found: re.Match[str]) -> str:
        head = ["task", *COMPARED]
        rows = [[name, *_means([methods(report, ending) for report in named.split()], digits)] for name, named, ending, digits in SUMMARY]
        return found[1] + _lines([head, ["---"] * len(head), *rows]) + found[3]

    return SUMMARISED.sub(summary, TABLE.sub(table, page))


def _lines(rows: list[list[str]]) -> str:
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n"


def _means(reports: list[dict[str, Any]], digits: int) -> list[str]:
    """Of each method its mean and half of the interval; a dash where it was not run."""
    means = [next((methods[name]["mean"] for methods in reports if name in methods), None) for name in COMPARED]
    return ["–" if m is None else f"{number(m['value'], digits)}{_half(m, digits)}" for m in means]


def _one(task: dict[str, Any], digits: int) -> list[list[str]]:
    """Best mean first."""
    head = ["method", "mean", "95% interval", "interquartile mean", "each seed", "multiply-adds", "deployed bytes"]
    rows = []
    for method, found in sorted(task["methods"].items(), key=lambda item: -item[1]["mean"]["value"]):
        mean, iqm = found["mean"], found["iqm"]
        rows.append(
            [
                _name(method),
                number(mean["value"], digits),
                _interval(mean, digits),
                f"{number(iqm['value'], digits)} ({_interval(iqm, digits)})",
                ", ".join(number(value, digits) for value in found["each"]),
                *_costs(found),
            ]
        )
    return [head, ["---"] * len(head), *rows]


def _several(tasks: dict[str, Any], digits: int) -> list[list[str]]:
    """Best mean over tasks first; costs are of the last task."""
    short = [re.sub(r"^.*?,n_agents=(\d+)$", r"\1 agents", task) for task in tasks]
    head = ["method", *short, f"multiply-adds, {short[-1]}", f"deployed bytes, {short[-1]}"]
    of: dict[str, list[Any]] = {
        method: [task["methods"][method] for task in tasks.values()] for method in list(tasks.values())[-1]["methods"]
    }
    rows = [
        [
            _name(method),
            *(f"{number(each['iqm']['value'], digits)} ({_interval(each['iqm'], digits)})" for each in found),
            *_costs(found[-1]),
        ]
        for method, found in sorted(of.items(), key=lambda item: -sum(each["iqm"]["value"] for each in item[1]))
    ]
    return [head, ["---"] * len(head), *rows]


def _costs(found: dict[str, Any]) -> list[str]:
    """Dashes where the report could not find them out."""
    return [f"{found[cost]:,}" if cost in found else "–" for cost in ("macs_per_act", "bytes")]


def number(value: float, digits: int) -> str:
    """With a minus sign that is as wide as a plus, and none before a zero."""
    return f"{value:z.{digits}f}".replace("-", "−")


def _interval(found: dict[str, Any], digits: int) -> str:
    """A dash for a single seed, which has none."""
    return "–" if found["low"] is None else f"{number(found['low'], digits)} to {number(found['high'], digits)}"


def _half(found: dict[str, Any], digits: int) -> str:
    return "" if found["low"] is None else f" ± {number((found['high'] - found['low']) / 2, digits)}"


def _name(method: str) -> str:
    """The method, in bold where it is K-2:4 with its masks learned; of a long one each option has a line."""
    shown = method.replace(",", ",<br>") if len(method) > 30 else method
    return f"**{shown}**" if method.partition(",")[0] == "k24" else shown


if __name__ == "__main__":
    results = DOCS / "results.md"
    results.write_text(filled(results.read_text(encoding="utf-8")), encoding="utf-8")
