"""Sweeps: the grid and its folders, what is refused before anything starts, and that no crash, kill or Ctrl-C costs more than a rerun."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cli import contents, last_json, refused
from test_train import assert_same_run

from k24.cli import main
from k24.commands.sweep import _show, _table
from k24.commands.train import read_request
from k24.config import TrainConfig, save_config
from k24.errors import UsageError
from k24.suites import SUITES
from k24.sweep import Cell, Method, Row, Status, plan
from k24.sweep.run import session
from k24.sweep.worker import Board, Meter, last_line, work
from k24.train import train

# A few rounds of four one-step episodes.
SHORT = [
    *("--steps", "64", "--envs", "4", "--hidden", "8", "--device", "cpu", "--log-every", "16", "--eval-every", "32"),
    *("--eval-episodes", "8", "--final-episodes", "8", "--checkpoint-every", "32"),
    *("--batch-size", "8", "--buffer-size", "16", "--env-steps-per-update", "8"),
]


def planned(out: Path, *methods: str, rows: list[Row] | None = None, common: list[str] | None = None) -> list[Cell]:
    """Runs on toy/matrix unless told otherwise."""
    return plan(rows or [Row("toy/matrix", "qmix", range(1))], methods, out, common or [], lambda given: read_request(given).config)


# --- the grid --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("k24", "k24", []),
        ("fups_id:hidden=44", "fups_id,hidden=44", ["--hidden", "44"]),
        ("k24:div-coef=0,hidden=92", "k24,div_coef=0,hidden=92", ["--div-coef", "0", "--hidden", "92"]),
        ("k24:--lr=-1e-3", "k24,lr=-1e-3", ["--lr", "-1e-3"]),
        ("kaleidoscope:kaleidoscope.div_coef=1", "kaleidoscope,kaleidoscope.div_coef=1", ["--kaleidoscope.div-coef", "1"]),
        ("k24:double_q=false,adaptive_reset=True", "k24,double_q=false,adaptive_reset=True", ["--no-double-q", "--adaptive-reset"]),
        ("k24:slots=my_slots:by_role", "k24,slots=my_slots:by_role", ["--slots", "my_slots:by_role"]),
    ],
)
def test_notation_of_a_method(text, name, arguments):
    method = Method.read(text)
    assert (method.name, method.arguments) == (name, arguments)


def test_arguments_of_a_task_do_not_hide_in_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    save_config(TrainConfig(task="toy/specialisation", env_args=("n_agents=8",)), file)
    common = ["--config", str(file)]
    with pytest.raises(UsageError, match=r"the file of --config has arguments of a task, n_agents=8: write them in --tasks, TASK,name=val"):
        planned(tmp_path, "k24", rows=[Row("toy/specialisation", "qmix", range(1))], common=common)
    (cell,) = planned(tmp_path, "k24", rows=[Row("toy/specialisation,n_agents=8", "qmix", range(1))], common=common)
    assert cell.config.env_args == ("n_agents=8",)


def test_a_grid_is_written_down_run_by_run(tmp_path):
    rows = [Row(task, algo, range(2)) for task in ("toy/matrix", "toy/specialisation,n_agents=4") for algo in ("qmix", "ippo")]
    cells = planned(tmp_path, "k24", "fups_id:hidden=44", rows=rows, common=["--steps", "64", "--envs", "4"])
    assert [str(cell.folder.relative_to(tmp_path)) for cell in cells] == [
        f"{task}/{algo}-{method}/seed{seed}"
        for task in ("toy/matrix", "toy/specialisation,n_agents=4")
        for algo in ("qmix", "ippo")
        for method in ("k24", "fups_id,hidden=44")
        for seed in (0, 1)
    ]
    assert cells[-1].command == (
        "k24 train toy/specialisation --algo ippo --sharing fups_id --env-args n_agents=4 --workers 0 --steps 64 --envs 4 --hidden 44 "
        f"--seed 1 --out {tmp_path}/toy/specialisation,n_agents=4/ippo-fups_id,hidden=44/seed1 --resume --quiet"
    )
    assert cells[-1].name == "toy/specialisation,n_agents=4 ippo-fups_id,hidden=44 seed1"
    config = cells[-1].config
    assert (config.task, config.env_args, config.algo, config.sharing) == ("toy/specialisation", ("n_agents=4",), "ippo", "fups_id")
    assert (config.hidden, config.seed, config.steps, config.workers) == (44, 1, 64, 0)
    assert {cell.state for cell in cells} == {"new"} and contents(tmp_path) == {}


def test_every_run_is_what_its_command_line_says(tmp_path):
    rows = [Row("toy/memory,n_agents=3", "vdn", range(2), ("--preset", "epymarl", "--hidden", "16"))]
    for cell in planned(tmp_path, "k24", "kaleidoscope:double_q=false", rows=rows, common=["--workers", "2"]):
        request = read_request(shlex.split(cell.command)[2:])
        assert request.config == cell.config and request.folder == cell.folder and request.resume and request.quiet


def test_the_more_special_setting_counts(tmp_path):
    rows = [Row("toy/matrix", "qmix", range(1), ("--hidden", "16", "--lr", "1e-3", "--steps", "100"))]
    (cell,) = planned(tmp_path, "k24:lr=3e-3", rows=rows, common=["--lr", "2e-3", "--steps", "200"])
    assert (cell.config.hidden, cell.config.steps, cell.config.learner.lr) == (16, 200, 3e-3)


def test_folders_tell_how_far_a_run_is(tmp_path):
    (tmp_path / "toy/matrix/qmix-k24/seed0").mkdir(parents=True)
    (tmp_path / "toy/matrix/qmix-k24/seed0/config.yaml.tmp").write_text("task:")
    cells = planned(tmp_path, "k24", "fups", "nops", common=SHORT)
    train(cells[1].config, cells[1].folder)
    train(cells[2].config, cells[2].folder, should_stop=lambda: True)
    before = contents(tmp_path)
    assert [cell.state for cell in planned(tmp_path, "k24", "fups", "nops", common=SHORT)] == ["new", "finished", "unfinished"]
    # What changes nothing of the result may differ; anything else is refused.
    assert [cell.state for cell in planned(tmp_path, "fups", common=[*SHORT, "--checkpoint-every", "16"])] == ["finished"]
    with pytest.raises(UsageError, match=r"qmix-nops/seed0 was started with hidden=8, now it is 16: resume with the same settings"):
        planned(tmp_path, "nops", common=[*SHORT, "--hidden", "16"])
    (tmp_path / "toy/matrix/qmix-k24/seed0/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"qmix-k24/seed0 is not empty and holds no config.yaml"):
        planned(tmp_path, "k24", common=SHORT)
    (tmp_path / "toy/matrix/qmix-k24/seed0/notes.txt").unlink()
    assert contents(tmp_path) == before
    # What is no evaluation does not count as the end of a run, and what is no folder not as a new one.
    for value in ('"good"', "true", "NaN"):
        (tmp_path / "toy/matrix/qmix-fups/seed0/eval.json").write_text(f'{{"return_mean": {value}}}')
        assert [cell.state for cell in planned(tmp_path, "fups", common=SHORT)] == ["unfinished"]
    (tmp_path / "toy/matrix/qmix-snp").mkdir()
    (tmp_path / "toy/matrix/qmix-snp/seed0").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot write the run folder .*qmix-snp/seed0 \(Not a directory\): choose another --out"):
        planned(tmp_path, "snp", common=SHORT)


def test_arguments_of_a_task_come_from_its_name_and_from_what_is_for_every_run(tmp_path):
    rows = [Row("toy/specialisation,n_agents=4", "qmix", range(1))]
    for common in (["--env-args", "x=a/b", "y=1", "--steps", "64"], ["--env-args=x=a/b", "--steps", "64", "--env_args", "y=1"]):
        found = plan(rows, ["k24"], tmp_path, common, lambda given: read_request(given).config)[0].config
        assert (found.env_args, found.steps) == (("n_agents=4", "x=a/b", "y=1"), 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no task given: name some with --tasks ('k24 tasks' lists them), or a --suite"),
        ("--task toy/matrix", "Unrecognized options: --task, toy/matrix (did you mean --tasks?); 'k24 sweep --help' lists the options"),
        ("--tasks toy/matrix --seeds 0", "seeds (=0) must be at least 1"),
        ("--tasks toy/matrix --jobs 0", "jobs (=0) must be at least 1"),
        ("--tasks toy/matrix --retries -1", "retries (=-1) must be at least 0"),
        ("--tasks toy/matrix --first-seed -1", "first_seed (=-1) must be at least 0"),
        ("--tasks toy/matrix --seeds two", "--seeds: wants a whole number such as 1000000 or None, got 'two'"),
        ("--tasks toy/matrix toy/matrx", "toy/matrx qmix-k24: unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("--tasks toy/matrix --sharing k24 k25", "toy/matrix qmix-k25: unknown sharing scheme 'k25': did you mean 'k24'?"),
        ("--tasks toy/matrix --algo qmix qmx", "toy/matrix qmx-k24: unknown algorithm 'qmx': did you mean 'qmix'?"),
        ("--tasks toy/reach", "toy/reach qmix-k24: qmix chooses among discrete actions, and this task's are continuous"),
        ("--tasks toy/matrix --sharing k24 k24", "toy/matrix qmix-k24 is asked for twice: leave one of them out"),
        ("--tasks toy/matrix --sharing k24 k24:div_coef=0", "toy/matrix qmix-k24,div_coef=0 is qmix-k24 by another name"),
        ("--tasks toy/matrix --sharing k24 k24:hidden=92 -- --hidden 92", "toy/matrix qmix-k24,hidden=92 is qmix-k24 by another name"),
        ("--tasks toy/reach --algo matd3 --sharing k24:div_coef=0.1 k24", "toy/reach matd3-k24 is matd3-k24,div_coef=0.1 by another name"),
        ("--tasks toy/matrix --sharing k24:", "method 'k24:' is incomplete: write SCHEME or SCHEME:option=value"),
        ("--tasks toy/matrix --sharing k24:hidden", "method 'k24:hidden': 'hidden' is not of the form option=value"),
        ("--tasks toy/matrix --sharing k24:hidden=", "method 'k24:hidden=': 'hidden=' is not of the form option=value"),
        ("--tasks toy/matrix --sharing k24:lr=1,lr=2", "method 'k24:lr=1,lr=2' gives lr twice: leave one of them out"),
        ("--tasks toy/matrix --sharing k24:seed=3", "method 'k24:seed=3': seed is set by the sweep: use --seeds and --first-seed"),
        (
            "--tasks toy/matrix --sharing k24:no_double_q=true",
            "method 'k24:no_double_q=true': write double_q=false, so that the option has",
        ),
        (
            "--tasks toy/matrix --sharing k24 k24:workers=2",
            "method 'k24:workers=2': workers changes nothing that is learned: give it after",
        ),
        ("--tasks toy/matrix --sharing k24:log-every=9", "method 'k24:log-every=9': log_every changes nothing that is learned: give it"),
        ("--tasks toy/x,b=1,a=2 toy/x,a=2,b=1", "toy/x,a=2,b=1 is asked for twice, with its arguments in another order: leave one of them"),
        (
            "--suite hetero -- --preset epymarl",
            "--preset and --suite exclude each other: suite hetero has settings of its own for each of its",
        ),
        ("--suite hetero -- --config=a.yaml", "--config and --suite exclude each other"),
        ("--tasks toy/matrix --sharing k24:slots=a/b", "method 'k24:slots=a/b': a value with a / can be no part of a folder's name"),
        ("--tasks toy/matrix --sharing k24:preset=smacv2", "method 'k24:preset=smacv2': preset is set by the sweep: use --preset after --"),
        ("--tasks toy/matrix --sharing k24:env_args=n=1", "method 'k24:env_args=n=1': arguments of the task belong to the task"),
        (
            "--tasks toy/matrix --sharing k24:hiden=8",
            "toy/matrix qmix-k24,hiden=8: Unrecognized options: --hiden, 8 (did you mean --hidden?)",
        ),
        (
            "--tasks toy/matrix --sharing k24:hidden=x",
            "toy/matrix qmix-k24,hidden=x: --hidden: wants a whole number such as 10",
        ),
        ("--tasks toy/matrix --sharing k24:clip=1", "toy/matrix qmix-k24,clip=1: --clip is no option of qmix, but of ippo, mappo"),
        (
            "--tasks toy/matrix --sharing kaleidoscope:div_coef=5",
            "toy/matrix qmix-kaleidoscope,div_coef=5: div_coef would change nothing: it is a setting of k24, k24_random, k24_shared, "
            "k24_magnitude, and the sharing here is kaleidoscope: use --kaleidoscope.div-coef",
        ),
        (
            "--tasks toy/matrix --sharing k24_random:alpha_lr_scale=5",
            "toy/matrix qmix-k24_random,alpha_lr_scale=5: alpha_lr_scale would change nothing: the masks are drawn once and never learn",
        ),
        (
            "--tasks toy/matrix --sharing k24:reset_ratio=0.5",
            "toy/matrix qmix-k24,reset_ratio=0.5: reset_ratio would change nothing: reset_interval is 0 and adaptive_reset is off",
        ),
        ("--tasks toy/matrix --sharing k24:snp.ratio=0.5", "toy/matrix qmix-k24,snp.ratio=0.5: snp.ratio would change nothing: it is a"),
        ("--tasks toy/matrix --sharing snp:ratio=0.5", "toy/matrix qmix-snp,ratio=0.5: --ratio is an option of snp: write --snp.ratio"),
        ("--tasks toy/specialisation,n_agents", "task 'toy/specialisation,n_agents' is not of the form TASK or TASK,name=value"),
        (
            "--tasks toy/specialisation,n_agents=1",
            "toy/specialisation,n_agents=1 qmix-k24: toy/specialisation: n_agents must be at least 2",
        ),
        ("--tasks toy/memory,n_cues=3 -- --env-args n_cues=4", "task 'toy/memory,n_cues=3' and --env-args both give n_cues: leave one"),
        ("--tasks toy/memory,map=a/b", "task 'toy/memory,map=a/b': a value with a / can be no part of a folder's name: give it after --"),
        ("--tasks toy/matrix -- --seed 3", "after --: seed is set by the sweep: use --seeds and --first-seed"),
        ("--tasks toy/matrix -- --out=there", "after --: out is set by the sweep: use --out of the sweep"),
        ("--tasks toy/matrix -- --help", "after --: help is set by the sweep: use 'k24 train --help'"),
        ("--tasks toy/matrix -- --steps 0", "toy/matrix qmix-k24: steps (=0) must be at least 1"),
        ("--tasks toy/matrix -- --preset epymrl", "toy/matrix qmix-k24: unknown preset 'epymrl': did you mean 'epymarl'?"),
        ("--suite hetro", "unknown suite 'hetro': did you mean 'hetero'?"),
        ("--suite hetero --tasks toy/matrix", "unknown task of suite hetero 'toy/matrix'"),
        ("--suite hetero --algo qmix", "--algo and --suite exclude each other: suite hetero says by which learner"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(capfd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capfd, "sweep", *arguments.split()).startswith(message)
    assert contents(tmp_path) == {}


def test_the_learner_is_that_of_the_preset_and_what_changes_nothing_is_said_once(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["sweep", "--tasks", "mpe/simple_spread", "--seeds", "2", "--sharing", "k24", "fups_id", "kaleidoscope", "--dry-run"]
    assert main([*asked, "--", "--preset", "mappo_mpe", "--div-coef", "0"]) == 0
    *lines, _ = capfd.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("new ")] == [
        "--div-coef changes nothing: it is a setting of k24, k24_random, k24_shared, k24_magnitude, and the sharing here is fups_id: "
        "leave it out",
        "--div-coef changes nothing: it is a setting of k24, k24_random, k24_shared, k24_magnitude, and the sharing here is kaleidoscope: "
        "use --kaleidoscope.div-coef",
    ]
    assert sum("--algo mappo " in line for line in lines) == 6
    assert main([*asked, "--algo", "qmix", "--", "--preset", "mappo_mpe"]) == 0
    note, *lines, _ = capfd.readouterr().out.splitlines()
    assert note == "the learner's settings in mappo_mpe are those of mappo: qmix starts from its own defaults"
    assert sum("--algo qmix " in line for line in lines) == 6


def test_seeds_that_no_setting_was_chosen_with(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked, seeds in (
        (("--tasks", "toy/matrix", "--seeds", "2", "--first-seed", "3"), [3, 4]),
        (("--suite", "hetero", "--tasks", "vmas/dispersion", "--sharing", "k24", "--first-seed", "3"), [3, 4, 5]),
    ):
        assert main(["sweep", *asked, "--dry-run"]) == 0
        *lines, _ = capfd.readouterr().out.splitlines()
        assert [int(line.partition("--seed ")[2].split()[0]) for line in lines] == seeds
        assert all(f"seed{seed} " in line for line, seed in zip(lines, seeds, strict=True))


def test_without_ray_one_line_says_what_to_install(capfd, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "--tasks", "toy/matrix", "--seeds", "1"]
    assert refused(capfd, *arguments) == "k24 sweep needs the package 'ray', which is not installed: pip install 'k24[sweep]'"
    assert main([*arguments, "--dry-run"]) == 0
    assert contents(tmp_path) == {}


def test_a_cluster_that_does_not_answer_is_one_line(capfd, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def init(address, **_):
        raise ConnectionError(f"{address} timed out")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", init)
    arguments = ["sweep", "--tasks", "toy/matrix", "--seeds", "1"]
    assert "no Ray cluster answers at ray://far:10001 (ConnectionError: ray://far:10001 timed out" in refused(
        capfd, *arguments, "--address", "ray://far:10001"
    )
    assert "Ray does not start on this machine (ConnectionError: local timed out" in refused(capfd, *arguments)


# --- suites ----------------------------------------------------------------------------------------------------------------------


def test_every_run_of_every_suite_is_a_valid_one(tmp_path):
    for methods, tasks in SUITES.values():
        rows = [Row(task.task, task.algo, range(task.seeds), tuple(shlex.split(task.settings))) for task in tasks]
        cells = planned(tmp_path, *methods, rows=rows)
        assert len(cells) == sum(task.seeds for task in tasks) * len(methods)
        assert all(task.seeds >= 3 and task.note for task in tasks)


def test_a_suite_can_be_cut_down(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["sweep", "--suite", "hetero", "--dry-run", "--seeds", "1"]
    assert main([*base, "--tasks", "toy/specialisation", "--sharing", "k24", "nops", "--", "--steps", "99"]) == 0
    *lines, last = capfd.readouterr().out.splitlines()
    assert json.loads(last) == {"runs": 6, "finished": 0, "skipped": 0, "failed": 0, "seconds": 0.0}
    requests = [read_request(shlex.split(line)[3:]) for line in lines]
    assert [line.split()[:3] for line in lines] == [["new", "k24", "train"]] * 6
    assert [(r.config.env_args, r.config.sharing) for r in requests] == [
        ((f"n_agents={n}",), sharing) for n in (2, 4, 8) for sharing in ("k24", "nops")
    ]
    assert {(r.config.steps, r.config.learner.lr) for r in requests} == {(99, 2e-3)}
    assert requests[-1].folder == Path("results/toy/specialisation,n_agents=8/qmix-nops/seed0")
    assert main([*base, "--tasks", "toy/specialisation,n_agents=4"]) == 0
    assert last_json(capfd.readouterr().out)["runs"] == len(SUITES["hetero"].methods)
    assert contents(tmp_path) == {}


# --- what is shown ---------------------------------------------------------------------------------------------------------------


def statuses(out: Path) -> list[Status]:
    """One run in each state."""
    rows = [Row("toy/matrix", "qmix", range(2)), Row("toy/memory", "qmix", range(2))]
    found = [Status(cell) for cell in planned(out, "k24", rows=rows, common=["--steps", "1000"])]
    found[0].state, found[0].value = "finished", 1.0
    found[1].state, found[1].steps, found[1].rate, found[1].value = "running", 250, 1234.5, 0.5
    found[3].state, found[3].failures = "failed", ["exit status 1: no luck", "ended by SIGKILL"]
    return found


def test_the_table_has_a_line_for_each_task_and_method(tmp_path):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    with console.file:
        console.print(_table(statuses(tmp_path)))
        console.print(_table(statuses(tmp_path), 1))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert rows == [
        "1 of 4 runs finished",
        "task method seeds return failed running",
        "toy/matrix qmix-k24 1/2 0.75 seed1 250 steps 25% 1,234/s",
        "toy/memory qmix-k24 0/2 - 1",
        "1 of 4 runs finished",
        "task method seeds return failed running",
        "toy/matrix qmix-k24 1/2 0.75 seed1 250 steps 25% 1,234/s",
        "and 1 lines more",
    ]


def test_without_a_terminal_each_event_is_a_line(tmp_path, capsys):
    now = statuses(tmp_path)
    with _show() as show:
        show(now)
        show(now)
        now[2].state, now[2].failures = "waiting", ["ended by SIGKILL"]
        show(now)
        now[1].state = "stopped"
        now[2].state = "running"
        show(now)
    assert capsys.readouterr().out.splitlines() == [
        "finished toy/matrix qmix-k24 seed0  return 1.00",
        "started  toy/matrix qmix-k24 seed1",
        "failed   toy/memory qmix-k24 seed1: ended by SIGKILL",
        "failed   toy/memory qmix-k24 seed0: ended by SIGKILL, to be tried again",
        "stopped  toy/matrix qmix-k24 seed1",
        "started  toy/memory qmix-k24 seed0",
    ]


def test_a_meter_reads_what_a_run_has_logged(tmp_path):
    log = tmp_path / "metrics.jsonl"
    meter = Meter(log)
    assert meter.read() == {}

    def write(text: str, clock: int) -> None:
        log.write_text(text)
        os.utime(log, (clock, clock))

    write('{"steps": 100, "return_train": 1.0}\n{"ste', 10)
    assert meter.read() == {"steps": 100}
    write('{"steps": 100, "return_eval": 2.0}\n{"steps": 200, "return_train": 1.0}\n[1]\n', 14)
    assert meter.read() == {"steps": 200, "rate": 25.0, "return": 2.0}
    # Resumed: the log is cut back to the checkpoint.
    write('{"steps": 50, "return_eval": 3.0}\n', 20)
    assert meter.read() == {"steps": 50, "return": 3.0}
    write('{"steps": 90, "return_eval": 4.0}\n', 24)
    assert meter.read() == {"steps": 90, "rate": 10.0, "return": 4.0}
    # Resumed hours later from its last line: the pause does not count.
    meter = Meter(log)
    assert meter.read() == {"steps": 90, "return": 4.0}
    write('{"steps": 90, "return_eval": 4.0}\n', 36_024)
    assert meter.read() == {"steps": 90, "return": 4.0}
    write('{"steps": 190, "return_train": 1.0}\n', 36_026)
    assert meter.read() == {"steps": 190, "rate": 50.0}


@pytest.mark.parametrize(("status", "expected"), [(130, "stopped"), (0, "finished"), (1, "failed")])
def test_who_cannot_save_itself_when_asked_to_stop_has_failed(tmp_path, monkeypatch, status, expected):
    class NoRay:
        """There is no ``get``: a run that waited in it would lend its core to the next one."""

        class exceptions:
            RayError = ConnectionError

    class Answer:
        """That the sweep asks to stop as soon as the training runs."""

        def future(self) -> Future[bool]:
            future: Future[bool] = Future()
            future.set_result((tmp_path / "up").exists())
            return future

    class NoBoard:
        class report:
            @staticmethod
            def remote(run: int, news: dict[str, Any]) -> Answer:
                return Answer()

    code = f"""
        import pathlib, signal, sys, time
        def stop(*_):
            print("k24: no room", file=sys.stderr)
            sys.exit({status})
        signal.signal(signal.SIGINT, stop)
        pathlib.Path("up").touch()
        time.sleep(60)
    """
    (tmp_path / "saver.py").write_text(textwrap.dedent(code))
    monkeypatch.setitem(sys.modules, "ray", NoRay)
    found = work(0, ["saver"], str(tmp_path / "seed0"), str(tmp_path), NoBoard)
    assert found == (expected, "exit status 1: no room" if status == 1 else "")


def test_the_last_line_of_a_log_is_that_of_the_last_attempt(tmp_path):
    log = tmp_path / "seed0.log"
    log.write_text("k24: earlier\n$ k24 train\n")
    assert last_line(log, 13) == ""
    with open(log, "a") as file:
        file.write("Traceback\nk24: no luck\n\n")
    assert last_line(log, 13) == "no luck"


def test_the_board_gives_news_once_and_says_when_to_stop():
    board = Board()
    assert not board.report(3, {"steps": 1}) and not board.report(3, {"steps": 2})
    assert board.read() == {3: {"steps": 2}} and board.read() == {}
    board.stop()
    assert board.report(3, {})


# --- real sweeps -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_is_up() -> Iterator[None]:
    """One session of Ray for all sweeps of this file but those that are about its end."""
    pytest.importorskip("ray")
    with session(None, 2):
        yield


def alone(cell: Cell, folder: Path) -> Path:
    """The same run by itself and undisturbed."""
    train(cell.config, folder)
    return folder


def test_a_sweep_and_what_it_does_when_asked_again(ray_is_up, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = ["k24", "fups_id:hidden=12"]
    command = ["sweep", "--tasks", "toy/matrix", "--sharing", *methods, "--seeds", "2", "--jobs", "2", "--out", "out"]
    assert main([*command, "--", *SHORT]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.startswith("4 runs below out: 4 new, 0 to go on with, 0 finished before;")
    found = last_json(out)
    assert found.pop("seconds") > 0
    assert found == {"runs": 4, "finished": 4, "skipped": 0, "failed": 0}
    cells = planned(Path("out"), *methods, rows=[Row("toy/matrix", "qmix", range(2))], common=SHORT)
    for cell in cells:
        assert f"finished {cell.name}  return " in out and cell.state == "finished"
        assert_same_run(alone(cell, tmp_path / "alone" / cell.name), cell.folder)
        assert f"{cell.folder}.log" in {str(p) for p in Path("out").rglob("*.log")}

    def seen() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in Path("out").rglob("*") if p.is_file()}

    before = seen()
    assert main([*command, "--", *SHORT]) == 0
    out = capfd.readouterr().out
    assert last_json(out).items() >= {"runs": 4, "finished": 0, "skipped": 4, "failed": 0}.items()
    assert "started" not in out and seen() == before
    assert main([*command, "--dry-run", "--", *SHORT]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[:-1]] == ["skip"] * 4
    said = refused(capfd, *command, "--", *SHORT, "--gamma", "0.9")
    assert said.startswith("out/toy/matrix/qmix-k24/seed0 was started with learner.gamma=0.99, now it is 0.9: resume with the same")
    assert seen() == before


# An environment in three states of health.
SHAKY = """
import os, signal, time
from pathlib import Path
import numpy as np
from k24.envs import EnvSpec, Outcome, SingleEnv, View

class Shaky(SingleEnv):
    spec = EnvSpec(n_agents=2, obs_dim=2, state_dim=4, n_actions=2, episode_limit=4)
    steps = 0

    def __init__(self, health):
        self.health = health

    def reset(self, seed):
        self.random = np.random.default_rng(seed)
        return self.look()

    def look(self):
        self.lights = self.random.integers(2, size=2)
        return View(np.eye(2, dtype=np.float32)[self.lights[::-1]])

    def step(self, actions):
        self.steps += 1
        if self.health == "broken" and self.steps > 40:
            raise ValueError("the bridge is out")
        if self.health == "fragile" and self.steps > 40 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.health == "slow" and not Path("hurry").exists():
            time.sleep(0.02)
        return Outcome(reward=(actions == self.lights[::-1]) / 2, view=self.look(), terminated=False)

def broken():
    return Shaky("broken")

def fragile():
    return Shaky("fragile")

def slow():
    return Shaky("slow")
"""
# Rounds of two episodes of four steps; a checkpoint every ten.
SEVERAL = [*SHORT, "--steps", "320", "--envs", "2", "--log-every", "8", "--eval-every", "160", "--checkpoint-every", "80"]


@pytest.fixture
def shaky(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with that environment, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shaky.py").write_text(SHAKY)
    yield tmp_path
    sys.modules.pop("shaky", None)


def test_a_crash_and_a_kill_stop_no_other_run(ray_is_up, capfd, shaky):
    command = ["sweep", "--tasks", "shaky:broken", "shaky:fragile", "--seeds", "1", "--jobs", "1", "--out", "out", "--", *SEVERAL]
    assert main(command) == 1
    out, err = capfd.readouterr()
    rows = [Row(f"shaky:{name}", "qmix", range(1)) for name in ("broken", "fragile")]
    broken, fragile = planned(Path("out"), "k24", rows=rows, common=SEVERAL)
    reason = f"exit status 1: shaky:broken: step: ValueError: the bridge is out ({shaky}/shaky.py:"
    lines = [line.partition(": ") for line in out.splitlines() if line.startswith("failed")]
    assert [line[0] for line in lines] == [
        "failed   shaky:broken qmix-k24 seed0",
        "failed   shaky:fragile qmix-k24 seed0",
        "failed   shaky:broken qmix-k24 seed0",
        "failed shaky:broken qmix-k24 seed0",
    ]
    assert lines[0][2].startswith(reason) and lines[0][2].endswith(", to be tried again")
    assert lines[1][2] == "ended by SIGKILL, to be tried again"
    assert lines[2][2].startswith(reason) and "again" not in lines[2][2]
    assert lines[3][2].startswith(reason) and lines[3][2].endswith("; its log: out/shaky:broken/qmix-k24/seed0.log; to repeat it:")
    assert f"\n  {broken.command}\n" in out
    assert last_json(out).items() >= {"runs": 2, "finished": 1, "skipped": 0, "failed": 1}.items()
    assert err == "k24: 1 of 2 runs failed, named above: the same command tries them again\n"
    assert (broken.state, fragile.state) == ("unfinished", "finished")
    assert_same_run(alone(fragile, shaky / "alone"), fragile.folder)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_free(log: Path) -> bool:
    """Whether no training holds a log, and with it the folder beside it."""
    with open(log) as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(p.stem[5:]) for p in (folder / "checkpoints").glob("step_*.pt")), default=0)


@pytest.mark.skipif(sys.platform != "linux", reason="a training outlives its sweep elsewhere")
def test_a_killed_sweep_leaves_nothing_running_and_goes_on(ray_is_up, capfd, shaky):
    """SIGKILL of the whole sweep, then Ctrl-C, then the same command to the end."""
    options = [*SEVERAL, "--steps", "800"]
    command = ["sweep", "--tasks", "shaky:slow", "--seeds", "1", "--jobs", "1", "--out", "out", "--", *options]
    (cell,) = planned(Path("out"), "k24", rows=[Row("shaky:slow", "qmix", range(1))], common=options)
    log = Path(f"{cell.folder}.log")
    sweep: Any = subprocess.Popen([sys.executable, "-m", "k24", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: newest(cell.folder) or sweep.poll() is not None)
        assert sweep.poll() is None, sweep.stderr.read()
        assert not is_free(log)
    finally:
        sweep.kill()
        sweep.communicate()
    wait_for(lambda: is_free(log))
    at = newest(cell.folder)
    assert 80 <= at < 800

    ended = threading.Event()

    def interrupt() -> None:
        wait_for(lambda: newest(cell.folder) > at or ended.is_set())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main(command) == 130
    finally:
        ended.set()
        thread.join()
    out, err = capfd.readouterr()
    assert "1 runs below out: 0 new, 1 to go on with, 0 finished before;" in out and "stopped  shaky:slow qmix-k24 seed0" in out
    assert err.splitlines()[-1] == "k24: stopped with 0 of 1 runs finished, the others saved: the same command goes on"
    assert is_free(log) and at < newest(cell.folder) < 800
    assert f"k24: stopped at step {newest(cell.folder)} of 800, saved" in log.read_text()

    Path("hurry").touch()
    assert main(command) == 0
    assert last_json(capfd.readouterr().out).items() >= {"runs": 1, "finished": 1, "skipped": 0, "failed": 0}.items()
    assert_same_run(alone(cell, shaky / "alone"), cell.folder)
