"""Tables of results are those of the reports, and so are the means that the READMEs repeat."""

from __future__ import annotations

import json
import re
import runpy
import tarfile
from pathlib import Path

import pytest

from k24.inspection import COSTS
from k24.report.runs import make_grid, read_runs
from k24.report.summary import values_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


TABLES = runpy.run_path(str(DOCS / "_tables.py"))
filled = TABLES["filled"]


def method(value: float, *each: float) -> dict:
    found = {"value": value, "low": value - 1, "high": value + 2}
    return {"mean": found, "iqm": found, "each": list(each), "macs_per_act": 1234, "bytes": 56789}


def test_a_report_of_one_task(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    tasks = {"vmas/navigation": {"methods": {"fups_id": method(-3.25, -3.0, -3.5), "k24,hidden=92": method(2.0, 1.0, 3.0)}}}
    (tmp_path / "some/report.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    page = "Before.\n\n<!-- report some, 1 digits -->\nold\n<!-- end of report -->\n\nAfter.\n"
    found = filled(page, tmp_path)
    assert found.splitlines() == [
        "Before.",
        "",
        "<!-- report some, 1 digits -->",
        "",
        "| method | mean | 95% interval | interquartile mean | each seed | multiply-adds | deployed bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| **k24,hidden=92** | 2.0 | 1.0 to 4.0 | 2.0 (1.0 to 4.0) | 1.0, 3.0 | 1,234 | 56,789 |",
        "| fups_id | −3.2 | −4.2 to −1.2 | −3.2 (−4.2 to −1.2) | −3.0, −3.5 | 1,234 | 56,789 |",
        "",
        "<!-- end of report -->",
        "",
        "After.",
    ]
    assert filled(found, tmp_path) == found


def test_a_report_of_several_tasks(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    task = {"methods": {"k24_random": method(1.0, 1.0), "kaleidoscope,kaleidoscope.threshold_lr_scale=20": method(2.0, 2.0)}}
    tasks = {"toy/specialisation,n_agents=2": task, "toy/specialisation,n_agents=16": task}
    (tmp_path / "some/report.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    found = filled("<!-- report some, 2 digits -->\n<!-- end of report -->", tmp_path)
    assert found.splitlines()[2:6] == [
        "| method | 2 agents | 16 agents | multiply-adds, 16 agents | deployed bytes, 16 agents |",
        "| --- | --- | --- | --- | --- |",
        "| kaleidoscope,<br>kaleidoscope.threshold_lr_scale=20 | 2.00 (1.00 to 4.00) | 2.00 (1.00 to 4.00) | 1,234 | 56,789 |",
        "| k24_random | 1.00 (0.00 to 3.00) | 1.00 (0.00 to 3.00) | 1,234 | 56,789 |",
    ]


def test_what_a_report_does_not_know_is_a_dash(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    alone = {"value": -0.01, "low": None, "high": None}
    tasks = {"toy/matrix": {"methods": {"fups": {"mean": alone, "iqm": alone, "each": [-0.01]}}}}
    (tmp_path / "some/report.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    found = filled("<!-- report some, 1 digits -->\n<!-- end of report -->", tmp_path)
    assert found.splitlines()[4] == "| fups | 0.0 | – | 0.0 (–) | 0.0 | – | – |"


def test_a_row_of_the_front_page() -> None:
    methods = {"k24": method(-2.0, -2.0), "fups_id": method(-3.0, -3.0), "snp": method(9.0, 9.0)}
    first = {"methods": methods, "seeds": [0, 1, 2], "random": -7.25}
    second = {"methods": {"fups_id": method(5.0, 5.0), "k24,hidden=92": method(-1.0, -1.0)}, "seeds": [0], "random": None}
    front = TABLES["_front"]
    assert front("some", [first, second], 1) == ["some", "3", "−2.0 ± 1.5", "**−1.0 ± 1.5**", "−3.0 ± 1.5", "–", "–", "−7.2"]
    assert front("some", [second], 1) == ["some", "1", "–", "−1.0 ± 1.5", "**5.0 ± 1.5**", "–", "–", "–"]


@pytest.mark.parametrize(
    ("path", "tables"),
    [("docs/results.md", {"TABLE": 15, "SUMMARISED": 1, "FRONT_PAGE": 0}), ("README.md", {"TABLE": 0, "SUMMARISED": 0, "FRONT_PAGE": 1})],
)
def test_pages_have_what_the_reports_say(path: str, tables: dict[str, int]) -> None:
    page = (ROOT / path).read_text(encoding="utf-8")
    assert {name: len(TABLES[name].findall(page)) for name in tables} == tables
    assert filled(page) == page, "run python docs/_tables.py"


@pytest.mark.parametrize("archive", sorted(DOCS.glob("reports/*/runs.tar.xz")), ids=lambda path: path.parent.name)
def test_runs_that_are_kept_make_their_report(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as kept:
        kept.extractall(tmp_path, filter="data")
    said = json.loads((archive.parent / "report.json").read_text(encoding="utf-8"))
    grid = make_grid(*read_runs([tmp_path]))
    values = values_of(grid, said["metric"], said["score"])
    assert {task: set(found["methods"]) for task, found in said["tasks"].items()} == {task: set(grid.methods) for task in grid.tasks}
    for (method, task), runs in grid.runs.items():
        found = said["tasks"][task]["methods"][method]
        assert values[method, task].tolist() == found["each"]
        assert [found[name] for name in COSTS] == [round(sum(run.evaluation[name] for run in runs) / len(runs)) for name in COSTS]


def test_the_same_runs_make_the_same_archive(tmp_path: Path) -> None:
    for name in ("qmix-k24/seed0", "qmix-k24/seed1"):
        (tmp_path / "memory" / name).mkdir(parents=True)
        for kind in ("config.yaml", "eval.json", "metrics.jsonl", "events.out"):
            (tmp_path / "memory" / name / kind).write_text(name)
    (tmp_path / "memory/qmix-k24/seed1/eval.json").unlink()
    packed = runpy.run_path(str(DOCS / "_runs.py"))["pack"]([tmp_path / "memory"])
    (tmp_path / "runs.tar.xz").write_bytes(packed)
    with tarfile.open(tmp_path / "runs.tar.xz") as kept:
        assert kept.getnames() == [f"memory/qmix-k24/seed0/{name}" for name in ("config.yaml", "eval.json", "metrics.jsonl")]
    assert runpy.run_path(str(DOCS / "_runs.py"))["pack"]([tmp_path / "memory"]) == packed


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/results.md"])
def test_means_with_intervals_are_those_of_some_report(page: str) -> None:
    """But for MATD3, whose runs are of several machines."""
    known = []
    for path in DOCS.glob("reports/*/report.json"):
        for task in json.loads(path.read_text(encoding="utf-8"))["tasks"].values():
            known += [(found["mean"]["value"], (found["mean"]["high"] - found["mean"]["low"]) / 2) for found in task["methods"].values()]
    text = "\n".join(line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "MATD3" not in line)
    said = re.findall(r"([−-]?\d+\.\d+) ± (\d+\.\d+)", text)
    assert len(said) > 10
    for mean, half in said:
        digits = len(mean.partition(".")[2])
        shown = [(TABLES["number"](value, digits), TABLES["number"](width, digits)) for value, width in known]
        assert (mean.replace("-", "−"), half) in shown, f"{page}: no report has {mean} ± {half}"
