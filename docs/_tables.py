"""Fills the tables of docs/results.md and README.md that are made from a report, each between two comments that name it.

    python docs/_tables.py           # rewrites both, after `k24 report … --out docs/reports/NAME`

A table between ``<!-- report NAME, DIGITS digits -->`` and ``<!-- end of report -->`` holds what docs/reports/NAME/report.json says:
of one task each method's mean, its interval and each run, of several tasks each method's interquartile means. The one between
``<!-- summary -->`` and ``<!-- end of summary -->`` has a row for each of ``SUMMARY``, the one between ``<!-- front page -->`` and
``<!-- end of front page -->`` for those that have a name there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- report (\S+), (\d) digits -->\n)(.*?)(<!-- end of report -->)", re.DOTALL)
SUMMARISED = re.compile(r"(<!-- summary -->\n)(.*?)(<!-- end of summary -->)", re.DOTALL)
FRONT_PAGE = re.compile(r"(<!-- front page -->\n)(.*?)(<!-- end of front page -->)", re.DOTALL)
# Name of a row, the reports it comes from (of each method the first that has it), how its task ends there, digits, name on the front page.
SUMMARY = (
    ("`vmas/blind_spread`, 8 agents, QMIX", "blind_spread", "", 1, "`vmas/blind_spread`, 8 agents, QMIX, 600k steps"),
    ("8 agents, MAPPO", "blind_spread_mappo", "", 1, "the same by MAPPO, 200k steps"),
    ("16 agents, QMIX", "blind_spread_16 blind_spread_16_macs", "", 1, "16 agents, QMIX, 600k steps"),
    ("`toy/specialisation`, 2 agents, mean over training", "specialisation_2", "=2", 3, None),
    ("4 agents", "specialisation", "=4", 3, None),
    ("8 agents", "specialisation", "=8", 3, None),
    ("16 agents", "specialisation", "=16", 3, "`toy/specialisation`, 16 agents, QMIX, mean over 10k steps"),
    ("`mpe/simple_spread`, MAPPO", "simple_spread_macs simple_spread", "", 1, "`mpe/simple_spread`, MAPPO, 1M steps"),
    ("`mpe/simple_spread`, QMIX", "simple_spread_qmix", "", 1, "the same by QMIX"),
    ("`vmas/navigation`", "navigation navigation_macs", "", 2, "`vmas/navigation`, MAPPO, 500k steps"),
    ("`vmas/dispersion`", "dispersion dispersion_macs", "", 2, "`vmas/dispersion`, MAPPO, 1.5M steps, pieces eaten of 4"),
    ("`mpe/simple_speaker_listener`, MATD3", "speaker_listener", "", 1, "`mpe/simple_speaker_listener`, MATD3, 500k steps"),
    ("`smax/smacv2_5_units`, episodes won", "smax", "", 3, "`smax/smacv2_5_units`, QMIX, 1M steps, share of episodes won"),
)
COMPARED = ("k24", "k24,hidden=92", "fups_id", "kaleidoscope", "k24_random", "k24_random,hidden=92")
IN_WORDS = {
    "k24": "K-2:4, half the multiply-adds",
    "k24,hidden=92": "K-2:4, as many",
    "fups_id": "dense + agent index",
    "kaleidoscope": "Kaleidoscope",
    "k24_random": "fixed random 2:4",
}


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

    def of_row(named: str, ending: str) -> list[dict[str, Any]]:
        return [next(task for key, task in tasks(report).items() if key.endswith(ending)) for report in named.split()]

    def summary(found: re.Match[str]) -> str:
        head = ["task", *COMPARED]
        rows = [[name, *_cells(_means(of_row(named, ending), COMPARED), digits)] for name, named, ending, digits, _ in SUMMARY]
        return found[1] + _lines([head, ["---"] * len(head), *rows]) + found[3]

    def front_page(found: re.Match[str]) -> str:
        head = ["", "seeds", *IN_WORDS.values(), "random policy"]
        rows = [_front(name, of_row(named, ending), digits) for _, named, ending, digits, name in SUMMARY if name]
        return found[1] + _lines([head, ["---"] * len(head), *rows]) + found[3]

    return FRONT_PAGE.sub(front_page, SUMMARISED.sub(summary, TABLE.sub(table, page)))


def _lines(rows: list[list[str]]) -> str:
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n"


def _means(reports: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any] | None]:
    """The mean of each method in the first report that has it."""
    return [next((task["methods"][name]["mean"] for task in reports if name in task["methods"]), None) for name in names]


def _cells(means: list[dict[str, Any] | None], digits: int) -> list[str]:
    """Each mean with half of its interval; a dash for a method that was not run."""
    return ["–" if m is None else f"{number(m['value'], digits)}{_half(m, digits)}" for m in means]


def _front(name: str, reports: list[dict[str, Any]], digits: int) -> list[str]:
    """A row of the front page: the number of seeds, each method's mean, the best in bold, and what random play gets."""
    means = _means(reports, IN_WORDS)
    best = max(m["value"] for m in means if m is not None)
    cells = [f"**{cell}**" if m and m["value"] == best else cell for m, cell in zip(means, _cells(means, digits), strict=True)]
    random = reports[0]["random"]
    return [name, str(len(reports[0]["seeds"])), *cells, "–" if random is None else number(random, digits)]


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
    for written in (DOCS / "results.md", DOCS.parent / "README.md"):
        written.write_text(filled(written.read_text(encoding="utf-8")), encoding="utf-8")
