"""Reports: what is compared, what is refused, and what stands in them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_train import BASE

from k24.cli import main
from k24.config import save_config
from k24.errors import UsageError
from k24.inspection import COSTS
from k24.learners import PPOConfig
from k24.report import report
from k24.report.latency import latencies
from k24.report.markdown import _below, _digits
from k24.report.pictures import _beats
from k24.report.runs import by_number, make_grid, read_runs
from k24.report.statistics import Estimate
from k24.report.summary import _is_level, _verdict, marl_eval, normalised, summarise, values_of
from k24.train import train


def write_run(root: Path, method: str, seed: int, value: float, task: str = "toy/memory", unfinished: bool = False, **settings) -> Path:
    """A run folder without a training."""
    scheme = method.partition("-")[2].partition(",")[0]
    config = dataclasses.replace(BASE, task=task, sharing=scheme, seed=seed, **settings)
    folder = root / task / method / f"seed{seed}"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    lines = [json.dumps({"steps": step, "return_eval": value * step / 320, "snd": 0.5}) for step in (160, 320)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not unfinished:
        found = {"return_mean": value, "return_ci95": [value, value], "episodes": 32, "steps": 100, "task": task}
        (folder / "eval.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Two methods, two seeds, one task."""
    for method, values in (("qmix-k24", (3.0, 4.0)), ("qmix-fups_id", (1.0, 2.0))):
        for seed, value in enumerate(values):
            write_run(tmp_path, method, seed, value)
    return tmp_path


# --- the grid --------------------------------------------------------------------------------------------------------------------


def test_runs_are_put_side_by_side(four: Path) -> None:
    write_run(four, "qmix-k24", 0, 9.0, "toy/specialisation", env_args=("n_agents=4",))
    write_run(four, "qmix-fups_id", 0, 8.0, "toy/specialisation", env_args=("n_agents=4",))
    runs, unfinished = read_runs([four])
    assert not unfinished
    grid = make_grid(runs)
    assert (grid.methods, grid.tasks) == (["fups_id", "k24"], ["toy/memory", "toy/specialisation,n_agents=4"])
    assert [run.evaluation["return_mean"] for run in grid.runs["k24", "toy/memory"]] == [3.0, 4.0]
    assert grid.runs["k24", "toy/memory"][1].curve("return_eval") == [(160, 2.0), (320, 4.0)]
    assert grid.left_out == []
    found = marl_eval(grid)["toy"]["memory"]["k24"]
    assert found["run_1"] == {
        "step_0": {"step_count": 160, "return": [2.0]},
        "step_1": {"step_count": 320, "return": [4.0]},
        "absolute_metrics": {"return": [4.0]},
    }


def test_names_that_the_marl_eval_tools_take(tmp_path: Path) -> None:
    write_run(tmp_path, "qmix-k24,hidden=8", 0, 1.0, "my_env:make", env_args=("path=/a/b",))
    write_run(tmp_path, "qmix-k24,hidden=8", 0, 1.0, "toy/specialisation", env_args=("n_agents=4",))
    found = marl_eval(make_grid(*read_runs([tmp_path])))
    names = {suite: {task: list(methods) for task, methods in tasks.items()} for suite, tasks in found.items()}
    assert names == {"own": {"my_env:make,path=/a/b": ["k24;hidden=8"]}, "toy": {"specialisation,n_agents=4": ["k24;hidden=8"]}}


def test_tasks_may_be_learned_by_different_algorithms(four: Path) -> None:
    learner = PPOConfig()
    for scheme in ("k24", "fups_id"):
        write_run(four, f"mappo-{scheme}", 0, 5.0, "toy/matrix", algo="mappo", learner=learner)
    grid = make_grid(*read_runs([four]))
    assert (grid.methods, grid.tasks) == (["fups_id", "k24"], ["toy/matrix", "toy/memory"])
    for scheme in ("k24", "fups_id"):
        for seed in (0, 1):
            write_run(four, f"mappo-{scheme}", seed, 5.0, algo="mappo", learner=learner)
    shutil.rmtree(four / "toy/matrix")
    assert make_grid(*read_runs([four])).methods == ["mappo-fups_id", "mappo-k24", "qmix-fups_id", "qmix-k24"]
    shutil.rmtree(four / "toy/memory/qmix-fups_id")
    write_run(four, "qmix-fups_id", 0, 5.0, "toy/matrix")
    with pytest.raises(UsageError, match=r"no run in common.*: toy/memory was learned by mappo and qmix, .*; report it by itself"):
        make_grid(*read_runs([four]), partial=True)


def test_costs_that_cannot_be_had_are_left_out(four: Path, tmp_path: Path) -> None:
    found = report([four / "toy"], tmp_path / "report", reps=50)
    assert all("macs_per_act" not in method for method in found["tasks"]["toy/memory"]["methods"].values())
    assert len(found["costs_unknown"]) == 2 and "has no checkpoint yet" in found["costs_unknown"][0]
    assert "Costs unknown" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message", "seeds"),
    [
        (lambda root: shutil.rmtree(root / "toy/memory/qmix-k24/seed1"), "k24 lacks seed 1 of toy/memory", 1),
        (lambda root: (root / "toy/memory/qmix-k24/seed1/eval.json").unlink(), "seed1 is not finished, and 1 more", 1),
        (lambda root: write_run(root, "qmix-k24", 0, 1.0, "toy/matrix"), "fups_id has no run of toy/matrix", 2),
    ],
)
def test_unequal_grids_are_refused_unless_asked_for(four: Path, change, message: str, seeds: int) -> None:
    change(four)
    with pytest.raises(UsageError, match=f"unequal grid: .*{message}.*--partial"):
        make_grid(*read_runs([four]))
    grid = make_grid(*read_runs([four]), partial=True)
    assert grid.tasks == ["toy/memory"] and len(grid.left_out) >= 1
    assert {len(runs) for runs in grid.runs.values()} == {seeds}


def test_settings_that_must_be_equal(four: Path) -> None:
    for seed in (0, 1):
        write_run(four, "qmix-nops", seed, 1.0, hidden=12)
    with pytest.raises(UsageError, match=r"qmix-nops.seed0 has hidden=12 and .* hidden=8: compare runs of equal settings"):
        make_grid(*read_runs([four]))


def test_an_option_that_the_folder_names_may_differ(four: Path) -> None:
    for seed in (0, 1):
        write_run(four, "qmix-nops,hidden=12", seed, 1.0, hidden=12)
        masks = dataclasses.replace(BASE.masks, div_coef=0.5)
        write_run(four, "qmix-k24,div-coef=0.5", seed, 1.0, masks=masks)
    assert len(make_grid(*read_runs([four])).methods) == 4


@pytest.mark.parametrize("others", [("qmix-k24", "qmix-nops"), ("mappo-k24", "mappo-nops")])
def test_what_one_name_excuses_is_not_excused_between_others(tmp_path: Path, others: tuple[str, str]) -> None:
    """The first method names its width, or has another learner's settings; the others differ and say nothing."""
    write_run(tmp_path, "qmix-fups_id,hidden=44", 0, 1.0, hidden=44)
    for method, hidden in zip(others, (8, 64), strict=True):
        settings = {"algo": "mappo", "learner": PPOConfig()} if method.startswith("mappo") else {}
        write_run(tmp_path, method, 0, 1.0, hidden=hidden, **settings)
    with pytest.raises(UsageError, match=r"nops.seed0 has hidden=64 and .*k24.seed0 hidden=8: compare runs of equal settings"):
        make_grid(*read_runs([tmp_path]))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("qmix-k24", {"sharing": "fups"}, "is a run of scheme fups, and its folder says k24: rename it"),
        ("qmix-k24,hidden=92", {}, r"has hidden=8, and its folder says hidden=92: rename it"),
        (
            "qmix-k24,div-coef=1e-1",
            {"masks": dataclasses.replace(BASE.masks, div_coef=0.2)},
            r"has masks\.div_coef=0\.2, .* says div-coef=1e-1",
        ),
    ],
)
def test_a_folder_that_says_something_else_than_its_run(tmp_path: Path, method: str, settings: dict, message: str) -> None:
    folder = write_run(tmp_path, method, 0, 1.0)
    save_config(dataclasses.replace(read_runs([write_run(tmp_path, "qmix-k24", 9, 1.0)])[0][0].config, **settings), folder / "config.yaml")
    with pytest.raises(UsageError, match=message):
        read_runs([tmp_path])


def test_names_that_are_true(tmp_path: Path) -> None:
    masks = dataclasses.replace(BASE.masks, div_coef=1e-4, mask_rnn=False, gate="sigmoid")
    write_run(tmp_path, "qmix-k24,div_coef=1e-4,mask_rnn=false,gate=sigmoid", 0, 1.0, masks=masks)
    kaleidoscope = dataclasses.replace(BASE.kaleidoscope, threshold_lr_scale=20.0)
    write_run(tmp_path, "qmix-kaleidoscope,kaleidoscope.threshold_lr_scale=20", 0, 1.0, kaleidoscope=kaleidoscope)
    # Texts that are something else to YAML.
    masks = dataclasses.replace(BASE.masks, pattern="1:4", div_coef=None)
    write_run(tmp_path, "qmix-k24,pattern=1:4,agent_id=yes,div_coef=None", 0, 1.0, masks=masks, agent_id="yes")
    assert len(read_runs([tmp_path])[0]) == 3


def test_links_are_followed_once_and_the_order_of_arguments_does_not_matter(four: Path) -> None:
    elsewhere = four.parent / "elsewhere"
    write_run(elsewhere, "qmix-nops", 0, 1.0, "toy/specialisation", env_args=("n_agents=4", "max_steps=1"))
    write_run(four, "qmix-k24", 0, 1.0, "toy/specialisation", env_args=("max_steps=1", "n_agents=4"))
    (four / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(four, target_is_directory=True)
    runs, _ = read_runs([four])
    assert len(runs) == 6 and {run.task for run in runs} == {"toy/memory", "toy/specialisation,max_steps=1,n_agents=4"}
    grid = make_grid([run for run in runs if run.task != "toy/memory"])
    assert grid.methods == ["k24", "nops"]


@pytest.mark.parametrize("inside", ["toy/memory", "toy/memory/qmix-k24", "toy/memory/qmix-k24/seed0"])
def test_a_report_may_be_asked_for_from_within(four: Path, monkeypatch, inside: str) -> None:
    monkeypatch.chdir(four / inside)
    runs, _ = read_runs([Path(".")])
    assert len(runs) == {"toy/memory": 4, "toy/memory/qmix-k24": 2}.get(inside, 1) and runs[-1].method == "qmix-k24"


def test_a_folder_that_cannot_be_read_is_named(four: Path, monkeypatch) -> None:
    """By a scandir that is refused: whoever runs the tests may be allowed to read everything."""
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "qmix-k24":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot read .*qmix-k24 \(Permission denied\): make it readable, or give the folders beside it"):
        read_runs([four])


def test_runs_of_one_method_have_the_same_masks(four: Path) -> None:
    shutil.rmtree(four / "toy/memory/qmix-k24/seed1")
    write_run(four, "qmix-k24", 1, 4.0, masks=dataclasses.replace(BASE.masks, div_coef=0.5))
    with pytest.raises(UsageError, match=r"masks\.div_coef=0\.5 and .*div_coef=None"):
        make_grid(*read_runs([four]))


# --- damage ----------------------------------------------------------------------------------------------------------------------


def test_a_log_that_a_kill_cut_short_is_read(four: Path) -> None:
    log = four / "toy/memory/qmix-k24/seed0/metrics.jsonl"
    log.write_text(log.read_text() + '{"steps": 350, "return_ev')
    runs, _ = read_runs([four])
    assert all(len(run.log) == 2 for run in runs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"steps": 1}\nno json\n{"steps": 3}\n', "metrics.jsonl, line 2, is damaged"),
        ("eval.json", "{", "eval.json is damaged"),
        ("eval.json", '{"return_mean": "high"}', "eval.json is damaged (return_mean=high, expected a number): delete it, and resume"),
        ("eval.json", '{"return_mean": NaN, "episodes": 3}', "eval.json is damaged (return_mean=nan, expected a number)"),
        ("eval.json", '{"return_mean": true, "episodes": 3}', "eval.json is damaged (return_mean=True, expected a number)"),
        ("eval.json", '{"return_mean": 1.0}', "eval.json is damaged (episodes=None, expected a number)"),
        ("eval.json", '{"return_mean": 1' + "0" * 400 + ', "episodes": 3}', "eval.json is damaged (return_mean=1000"),
        ("eval.json", "[" * 100_000, "eval.json is damaged (RecursionError)"),
        ("eval.json", '{"return_mean": 1.0, "episodes": 3, "win_rate": null}', "eval.json is damaged (win_rate=None, expected a number)"),
        ("eval.json", '{"return_mean": 1.0, "episodes": 3, "bytes": 9}', "eval.json is damaged (macs_per_act=None, expected a number)"),
        ("eval.json", "[]", "eval.json is damaged"),
        ("config.yaml", "flavour: sour", "unknown setting 'flavour': did you mean 'learner'?; if another version of k24 wrote it, leave"),
        ("config.yaml", "algo: [", "config.yaml is no YAML"),
    ],
)
def test_damage_is_told_in_one_line(four: Path, capfd, name: str, content: str, message: str) -> None:
    (four / "toy/memory/qmix-k24/seed0" / name).write_text(content)
    assert main(["report", str(four), "--out", str(four / "report")]) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no folder given"),
        (["nowhere"], "nowhere is no folder"),
        ([".", "--reps", "0"], "reps (=0) must be at least 1"),
        ([".", "--latency", "0"], "latency (=0) must be at least 1"),
        ([".", "--metric", "win_rate"], "has no win_rate"),
        ([".", "--reference", "qmix-nops"], "unknown method 'qmix-nops': known: fups_id, k24"),
        ([".", "--reference", "k25"], "unknown method 'k25': did you mean 'k24'?"),
        (["empty"], "no finished runs below empty"),
    ],
)
def test_wrong_requests(four: Path, capfd, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(four)
    (four / "empty").mkdir()
    assert main(["report", *arguments]) == 2
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1


# --- a whole report --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two methods, two seeds, really trained for a moment."""
    root = tmp_path_factory.mktemp("trained")
    for sharing in ("k24", "fups_id"):
        for seed in (0, 1):
            config = dataclasses.replace(BASE, sharing=sharing, seed=seed)
            train(config, root / BASE.task / f"{BASE.algo}-{sharing}" / f"seed{seed}")
    return root


def test_a_report_of_real_runs(trained: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "report"
    assert main(["report", str(trained), "--out", str(out), "--random", "--latency", "2", "--reps", "200"]) == 0
    printed = capfd.readouterr().out
    found, text = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert text in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["seeds"] == {BASE.task: 2} and set(last["iqm"]) == {"k24", "fups_id"}

    mine, theirs = (found["tasks"][BASE.task]["methods"][name] for name in ("k24", "fups_id"))
    evaluations = [json.loads(path.read_text())["return_mean"] for path in sorted(trained.rglob("*-k24/seed*/eval.json"))]
    assert mine["each"] == [float(f"{value:.6g}") for value in evaluations]
    assert mine["mean"]["value"] == pytest.approx(sum(evaluations) / 2, rel=1e-5)
    assert mine["macs_per_act"] < 0.6 * theirs["macs_per_act"], "half, but for groups that padding fills"
    assert mine["params"] > theirs["params"]
    assert found["reference"] == "k24" and set(found["against"][BASE.task]) == set(found["level"][BASE.task]) == {"fups_id"}
    assert "Few seeds" in text and "summed over agents" in text and f"Random play: {found['tasks'][BASE.task]['random']:.1f}" in text
    timed = json.loads((out / "latency.json").read_text())[BASE.task]
    assert mine["latency_us"] == timed["us"]["k24"] > 0 and timed["envs"] == 2 and timed["machine"]["torch"]
    pictures = [line.split("(")[-1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) >= 7 and all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)

    again = tmp_path / "again"
    again.mkdir()
    for name in ("random.json", "latency.json"):
        shutil.copy(out / name, again)
    report([trained], again, latency=2, reps=200)
    for name in ("report.md", "report.json", "marl_eval.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), "the same runs give the same bytes"


def test_costs_travel_with_the_evaluation(trained: Path, tmp_path: Path) -> None:
    def costs() -> list[dict]:
        return list(report([tmp_path / "runs"], tmp_path / "report", reps=50)["tasks"][BASE.task]["methods"].values())

    shutil.copytree(trained, tmp_path / "runs")
    told = costs()
    for path in (tmp_path / "runs").rglob("eval.json"):
        found = json.loads(path.read_text())
        assert found["macs_per_act"] > 0 and found["bytes"] > 0 and found["params"] > 0
        path.write_text(json.dumps({name: value for name, value in found.items() if name not in COSTS}))
    assert costs() == told, "of a run that knows nothing of them, from its checkpoint"
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    assert costs() == told, "a checkpoint need not come along"


def test_what_was_timed_is_kept_until_a_run_is_another(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    grid, path = make_grid(*read_runs([tmp_path / "runs"])), tmp_path / "latency.json"
    latencies(grid, path, 2, seconds=0.1)
    kept = json.loads(path.read_text())
    kept[BASE.task]["us"] = {"k24": 1.5, "nops": 9.0}
    kept[BASE.task]["failed"] = {"fups_id": "its checkpoint is gone"}
    path.write_text(json.dumps(kept))
    assert latencies(grid, path, 2) == ({("k24", BASE.task): 1.5}, [f"latency of fups_id on {BASE.task}: its checkpoint is gone"])
    evaluation = next((tmp_path / "runs").rglob("*-k24/seed0/eval.json"))
    evaluation.write_text(evaluation.read_text() + "\n")
    found, unknown = latencies(grid, path, 2, seconds=0.1)
    assert found.keys() == {("k24", BASE.task), ("fups_id", BASE.task)} and found["k24", BASE.task] != 1.5 and not unknown
    assert latencies(grid, path, 3, seconds=0.1)[0] != found, "another number of environments"
    path.write_text("[]")
    with pytest.raises(UsageError, match="damaged: delete it"):
        latencies(grid, path, 2)


def test_scores_over_training_are_areas(four: Path, tmp_path: Path, capfd) -> None:
    grid = make_grid(*read_runs([four]))
    # Written as value/2 after 160 steps and value after 320.
    assert values_of(grid, "return", "training")["k24", "toy/memory"].tolist() == pytest.approx([0.75 * 3, 0.75 * 4])
    assert values_of(grid, "return", "final")["k24", "toy/memory"].tolist() == [3.0, 4.0]
    assert main(["report", str(four), "--score", "training", "--out", str(tmp_path / "r"), "--reps", "50"]) == 0
    assert "Scores are means over training" in capfd.readouterr().out
    log = four / "toy/memory/qmix-k24/seed0/metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    with pytest.raises(UsageError, match="seed0 was evaluated less than twice in training: compare final scores"):
        values_of(make_grid(*read_runs([four])), "return", "training")
    log.write_text('{"steps": 80, "return_eval": 1.0, "snd": null}\n{"steps": 160, "return_eval": 1.0}\n')
    with pytest.raises(UsageError, match="seed0 trained for 320 steps, and its log ends at 160: compare final scores, or run it again"):
        values_of(make_grid(*read_runs([four])), "return", "training")
    log.write_text(log.read_text() + '{"steps": 240, "return_eval": NaN}\n{"steps": 320, "return_eval": 1.0}\n')
    with pytest.raises(UsageError, match="seed0 has evaluations in its log that are no numbers: compare final scores, or run it again"):
        values_of(make_grid(*read_runs([four])), "return", "training")


def test_critics_that_are_not_equally_wide_are_told(tmp_path: Path, capfd) -> None:
    learner = PPOConfig()
    for method, settings in {
        "mappo-fups_id": {},
        "mappo-k24,hidden=92": {"hidden": 92},
        "mappo-k24,hidden=92,critic_hidden=8": {"hidden": 92, "learner": dataclasses.replace(learner, critic_hidden=8)},
    }.items():
        write_run(tmp_path, method, 0, 1.0, **{"algo": "mappo", "learner": learner} | settings)
    assert main(["report", str(tmp_path / "toy"), "--out", str(tmp_path / "r"), "--reps", "50"]) == 0
    said = "Critics are not equally wide:** fups_id 8, k24,hidden=92 92, k24,hidden=92,critic_hidden=8 8."
    assert said in capfd.readouterr().out
    shutil.rmtree(tmp_path / "toy/memory/mappo-k24,hidden=92")
    assert main(["report", str(tmp_path / "toy"), "--out", str(tmp_path / "r"), "--reps", "50"]) == 0
    assert "Critics" not in capfd.readouterr().out


def test_rounding_is_no_win(tmp_path: Path) -> None:
    for method, values in (("qmix-k24", (16.0, 16.0)), ("qmix-fups_id", (15.999998, 15.999999))):
        for seed, value in enumerate(values):
            write_run(tmp_path, method, seed, value)
    for score in ("final", "training"):
        found = report([tmp_path / "toy"], tmp_path / "report", score=score, reps=50)
        assert found["improvement"]["fups_id"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_areas_are_compared_of_curves_with_equally_many_points(four: Path) -> None:
    """The same straight line, evaluated once more, has another area below its evaluations; rounds may end at steps of their own."""
    log = four / "toy/memory/qmix-k24/seed1/metrics.jsonl"
    log.write_text("".join(json.dumps({"steps": step, "return_eval": 4.0 * step / 320}) + "\n" for step in (80, 160, 320)))
    grid = make_grid(*read_runs([four]))
    assert values_of(grid, "return", "final")["k24", "toy/memory"].tolist() == [3.0, 4.0]
    with pytest.raises(UsageError, match=r"seed1 was evaluated 3 times in training, .*seed0 2 times: compare final scores"):
        values_of(grid, "return", "training")
    log.write_text("".join(json.dumps({"steps": step, "return_eval": 4.0 * step / 320}) + "\n" for step in (163, 320)))
    assert values_of(make_grid(*read_runs([four])), "return", "training")["k24", "toy/memory"].tolist() == pytest.approx(
        [2.25, 4 * 241.5 / 320]
    )


def test_where_nobody_beats_random_play_nobody_gets_a_one(four: Path) -> None:
    grid = make_grid(*read_runs([four]))
    values = values_of(grid, "return", "final")  # k24 3 and 4, fups_id 1 and 2
    found = summarise(grid, values, "k24", {"toy/memory": 5.0}, {}, 50)
    assert found["tasks"]["toy/memory"]["range"] == (1.0, 5.0)
    assert normalised(grid, values, {"toy/memory": 5.0})["k24"][0].tolist() == [0.5, 0.75]
    assert found["improvement"]["fups_id"].value == 1.0
    assert " On toy/memory no run is better than random play: there 0 is the worst run, and 1 random play." in _below(found["tasks"])
    assert _below(summarise(grid, values, "k24", {"toy/memory": 0.5}, {}, 50)["tasks"]) == ""
    same = {cell: np.array([4.0, 4.0 - 1e-7]) for cell in values}
    assert normalised(grid, same, {})["k24"][0].tolist() == [0.5, 0.5], "rounding is no difference"
    assert normalised(grid, {cell: np.array([0.0, 0.016]) for cell in values}, {}, (0.0, 1.0))["k24"][0].tolist() == [0.0, 0.016]


def test_a_third_method_does_not_decide_who_is_level(four: Path) -> None:
    for seed, value in enumerate((9.01, 9.0)):
        write_run(four, "qmix-nops", seed, value)
    for seed, value in enumerate((-1000.0, -1001.0)):
        write_run(four, "qmix-fups", seed, value)
    grid = make_grid(*read_runs([four]))
    found = summarise(grid, values_of(grid, "return", "final"), "k24", {}, {}, 50)
    assert found["level"]["toy/memory"] == {"fups": True, "fups_id": True, "nops": False}


@pytest.mark.parametrize(("span", "digits"), [((0, 1), 2), ((0.8, 1), 3), ((-210, -140), 1), ((0, 3000), 0), ((1, 1), 2), ((0, 1e-9), 4)])
def test_digits_follow_the_range(span: tuple[float, float], digits: int) -> None:
    assert _digits(*span) == digits


def test_what_is_better_and_what_is_at_least_level() -> None:
    def found(low: float, value: float, high: float) -> dict:
        return {"mean": Estimate(value, low, high), "iqm": Estimate(value, low, high)}

    methods = {"mine": found(9.0, 10.0, 11.0), "same": found(8.5, 9.5, 10.5), "far": found(11.5, 12.0, 12.5), "low": found(1.0, 2.0, 3.0)}
    assert [_verdict(methods, "mine", other) for other in ("same", "far", "low")] == ["undecided", "worse", "better"]
    assert [_is_level(methods, "mine", other, 0.6) for other in ("same", "far", "low")] == [True, False, True]
    assert not _is_level(methods, "mine", "same", 0.4), "9.0 is more than 0.4 below 9.5"
    single = found(9.0, 10.0, 11.0) | {"iqm": Estimate(10.0, None, None)}
    assert not _is_level({"mine": single, "low": methods["low"]}, "mine", "low", 9.0), "of one seed nothing is known"


def test_which_points_nothing_beats() -> None:
    assert _beats((1, 5), (2, 5)) and _beats((2, 6), (2, 5)) and not _beats((1, 4), (2, 5)) and not _beats((2, 5), (2, 5))


def test_tasks_stand_in_the_order_of_their_numbers() -> None:
    tasks = ["toy/a,n_agents=16", "toy/a,n_agents=2", "mpe/b", "toy/a", "toy/a,n_agents=2,n=10", "toy/a,n_agents=2,n=9"]
    ordered = ["mpe/b", "toy/a", "toy/a,n_agents=2", "toy/a,n_agents=2,n=9", "toy/a,n_agents=2,n=10", "toy/a,n_agents=16"]
    assert sorted(tasks, key=by_number) == ordered
