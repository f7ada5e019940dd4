"""The command line from end to end: what it prints, leaves behind and refuses, and that a kill at any moment costs nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_train import BASE, Broken, assert_same_run, stop_after

from k24 import checkpoint, cli
from k24 import train as train_module
from k24.cli import main
from k24.commands.train import stop_on_signal
from k24.config import TrainConfig, load_config
from k24.envs import make_env
from k24.evaluate import load_run
from k24.learners import LEARNERS, PPOConfig
from k24.train import train

# 20 rounds of 16 steps, as options.
TOY = [
    *("train", "toy/memory", "--steps", "320", "--envs", "4", "--hidden", "8", "--device", "cpu"),
    *("--log-every", "16", "--eval-every", "64", "--eval-episodes", "64", "--checkpoint-every", "96"),
    *("--lr", "5e-3", "--batch-size", "8", "--buffer-size", "32", "--env-steps-per-update", "8", "--target-update", "7"),
    *("--epsilon-anneal", "200"),
]
# A run of some seconds, so that a signal meets it at work: 100 rounds, a checkpoint every 5.
LONG = [*TOY, "--steps", "6400", "--envs", "16", "--checkpoint-every", "320", "--env-steps-per-update", "64"]


def start(*arguments: str, cwd: Path, **options) -> subprocess.Popen[str]:
    """Runs ``python -m k24`` in a process of its own."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-m", "k24", *arguments], cwd=cwd, text=True, **pipe)


def run(*arguments: str, cwd: Path) -> str:
    """Runs a command that must succeed; returns what it printed."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "", err
    return out


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until something holds or the process has ended."""
    end = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.003)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line on stderr with which a command is refused."""
    capfd.readouterr()
    assert main(arguments) == status
    err = capfd.readouterr().err
    assert err.startswith("k24: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("k24: ").rstrip("\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


# --- kill and resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    """The long run, in one go."""
    assert main([*LONG, "--out", str(place / "whole"), "--quiet"]) == 0
    return place / "whole"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process of the interrupted run ended."""

    status: int
    steps: int
    """Of the newest checkpoint."""
    out: str
    err: str


@pytest.fixture(scope="module")
def interrupted(place) -> tuple[Path, list[Ended]]:
    """The same run, ended by signals at several moments and resumed each time."""
    folder = place / "interrupted"
    checkpoints = folder / "checkpoints"
    chance = random.Random(1)

    def steps() -> int:
        return max((int(p.stem[5:]) for p in checkpoints.glob("step_*.pt")), default=0)

    def in_the_middle_of_a_write() -> bool:
        return any(checkpoints.glob("*.tmp"))

    moments: list[tuple[int, Callable[[], object]]] = [
        (signal.SIGKILL, (folder / "config.yaml").exists),
        (signal.SIGKILL, in_the_middle_of_a_write),
        (signal.SIGTERM, lambda: steps() >= before + 960),
        (signal.SIGKILL, lambda: steps() >= before + 320 * chance.randint(3, 6)),
        (signal.SIGINT, lambda: steps() >= before + 960),
    ]
    ends = []
    for k, (number, moment) in enumerate(moments):
        before = steps()
        process = start(*LONG, "--out", str(folder), *(["--resume"] if k else []), cwd=place)
        wait_for(moment, process)
        time.sleep(chance.random() * 0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        ends.append(Ended(process.returncode, steps(), out, err))
    # Leftovers, had a kill come in the middle of a write.
    (checkpoints / "step_000000009999.pt.tmp").write_bytes(b"half a checkpoint")
    (checkpoints / "index.json.tmp").write_bytes(b"[")
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"steps": 99')
    process = start("train", "--resume", "--out", str(folder), cwd=place)
    out, err = process.communicate(timeout=120)
    return folder, [*ends, Ended(process.returncode, steps(), out, err)]


def test_signals_at_any_moment_cost_nothing(uninterrupted, interrupted):
    """Kill -9 before, while and after a checkpoint is written, SIGTERM and SIGINT; the end is the same bit for bit."""
    folder, ends = interrupted
    assert [e.status for e in ends] == [-signal.SIGKILL, -signal.SIGKILL, 130, -signal.SIGKILL, 130, 0]
    steps = [e.steps for e in ends]
    assert steps == sorted(steps) and steps[1] < steps[2] < steps[3] < steps[4] < steps[5] == 6400
    assert ends[-1].err == ""
    assert_same_run(uninterrupted, folder)
    assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("which", [2, 4], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_how_to_go_on(interrupted, which):
    folder, ends = interrupted
    end = ends[which]
    assert end.err.strip().splitlines() == [
        "k24: saving, then stopping (once more to stop at once)",
        f"k24: stopped at step {end.steps} of 6400, saved: 'k24 train --resume --out {folder}' goes on",
    ]
    assert "{" not in end.out


def test_train_prints_its_result_last(interrupted):
    folder, ends = interrupted
    found = last_json(ends[-1].out)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert found.items() >= evaluation.items()
    assert found["folder"] == str(folder)
    assert found.keys() == evaluation.keys() | {"folder", "env_steps_per_s"}
    assert {p.name.split(".")[0] for p in folder.iterdir()} == {"checkpoints", "config", "eval", "events", "metrics"}


def test_eval_of_a_run(interrupted, capsys):
    folder, _ = interrupted
    assert main(["eval", str(folder), "--episodes", "100"]) == 0
    found = last_json(capsys.readouterr().out)
    assert {"return_mean", "return_ci95", "episodes"} <= found.keys()
    assert found["episodes"] == 100 and found["policy"] == "qmix-k24" and found["task"] == "toy/memory" and found["steps"] == 6400
    low, high = found["return_ci95"]
    assert low <= found["return_mean"] <= high


def test_eval_repeats_itself_and_knows_other_policies(interrupted, capsys):
    folder, _ = interrupted

    def value(*options: str) -> float:
        assert main(["eval", str(folder), "--device", "cpu", *options]) == 0
        return last_json(capsys.readouterr().out)["return_mean"]

    assert value() == value()
    assert value("--masks", "sampled") == value("--masks", "expected") == value()  # frozen, so they are all the same
    assert value("--random") == pytest.approx(0.5, abs=0.15)


def test_masks_are_drawn_anew_in_each_round_and_by_the_seed(tmp_path, capsys):
    train(BASE, tmp_path / "run", should_stop=stop_after(9))  # before the freeze
    actor = load_run(tmp_path / "run").learner.actor("sampled")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(2):
            actor.reset(3)
            drawn.append(torch.cat([made.weight.flatten() for made in actor._weights]))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[4])
    values = []
    for seed in ("1", "1", "2"):
        assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--masks", "sampled", "--seed", seed]) == 0
        values.append(last_json(capsys.readouterr().out)["return_mean"])
    assert values[0] == values[1] != values[2]


def test_inspect_of_a_run(interrupted, place):
    folder, _ = interrupted
    out = run("inspect", str(folder), "--png", "deep/masks.png", cwd=place)
    found = last_json(out)
    assert {"overall_sparsity", "pattern_entropy", "mask_hamming", "params", "macs_per_act", "bytes"} <= found.keys()
    assert 0.4 < found["overall_sparsity"] <= 0.5 and 0 <= found["mask_hamming"] <= 1 and found["bytes"] < 4 * found["params"]
    assert (place / "deep/masks.png").read_bytes().startswith(b"\x89PNG")


def test_a_configuration_file_repeats_a_run(interrupted, uninterrupted, place, capsys):
    folder, _ = interrupted
    assert main(["train", "--config", str(folder / "config.yaml"), "--out", str(place / "other")]) == 0
    assert_same_run(uninterrupted, place / "other")
    assert (place / "other" / "config.yaml").read_text() == (folder / "config.yaml").read_text()
    capsys.readouterr()


def test_a_second_signal_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.count("saving, then stopping") == 1


def test_an_episode_can_be_drawn(tmp_path, capsys):
    from PIL import Image

    pytest.importorskip("vmas")
    options = ["--steps", "100", "--envs", "2", "--hidden", "8", "--device", "cpu", "--batch-size", "2", "--buffer-size", "8"]
    assert main(["train", "mpe/simple_spread", *options, "--out", str(tmp_path / "run")]) == 0
    gif = tmp_path / "episode.gif"
    assert main(["eval", str(tmp_path / "run"), "--episodes", "2", "--gif", str(gif)]) == 0
    assert f"episode drawn in {gif}\n" in capsys.readouterr().out
    with Image.open(gif) as film:
        assert film.format == "GIF" and film.n_frames == 25
        shown = []
        for frame in range(25):
            film.seek(frame)
            shown.append(film.info["duration"])
    assert shown == [700, *[100] * 23, 1500]
    other = tmp_path / "other.gif"
    assert main(["eval", str(tmp_path / "run"), "--episodes", "2", "--seed", "2", "--gif", str(other)]) == 0
    assert other.read_bytes() != gif.read_bytes()


# --- help and lists ------------------------------------------------------------------------------------------------------------


def test_help_version_and_lists(capfd):
    for arguments, expected in (
        (["--help"], "usage: k24 COMMAND"),
        (["-h"], "usage: k24 COMMAND"),
        (["--version"], "k24 "),
        (["tasks"], "lbf/"),
        (["tasks", "mpe"], "mpe/simple_spread  "),
        (["bench"], "usage: k24 bench"),
        *(([name, "--help"], f"k24 {name}") for name in cli.COMMANDS),
    ):
        assert main(arguments) == 0, arguments
        out, err = capfd.readouterr()
        assert expected in out and err == "", arguments
    assert main([]) == 2
    out, _ = capfd.readouterr()
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("algo", LEARNERS)
def test_help_names_every_setting(capfd, algo):
    """Those of the algorithm, and none that only others have."""
    assert main(["train", "--algo", algo, "--help"]) == 0
    out = capfd.readouterr().out
    config = TrainConfig(algo=algo)
    names = [f.name for part in (config, config.learner, config.masks) for f in dataclasses.fields(part)]
    parts = ("kaleidoscope", "snp", "hypermarl", "seps")
    names += [f"{part}.{f.name}" for part in parts for f in dataclasses.fields(getattr(config, part))]
    flags = {f"--{n.replace('_', '-')}" for n in names if n not in ("learner", "masks", *parts)}
    shown = set(re.findall(r"--[a-z][a-z.0-9-]*", out))
    assert flags <= shown
    others = {f"--{f.name.replace('_', '-')}" for learner in LEARNERS.values() for f in dataclasses.fields(learner.settings)}
    assert shown & others <= flags
    for option in ("--out", "--resume", "--config", "--preset", "--quiet"):
        assert option in out


def test_check_env(capfd):
    assert main(["check-env", "toy/matrix"]) == 0
    out, _ = capfd.readouterr()
    found = last_json(out)
    assert found["ok"] is True and len(found["checks"]) == len(out.splitlines()) - 1


@pytest.mark.parametrize("arguments", [["tasks"], ["train", "--help"]])
def test_a_reader_that_leaves_early_is_no_error(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*arguments, cwd=tmp_path, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 1


# --- bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("train", "no task given: 'k24 tasks' lists them, for example mpe/simple_spread"),
        ("train toy/matrx", "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("train matrix", "unknown task 'matrix': did you mean 'toy/matrix'?"),
        ("train toy/matrix --slots unit_type", "toy/matrix does not say what type of unit an agent is: use --slots agent"),
        ("train toy/matrix --slots type", "slots 'type' is not known: use agent, unit_type or package.module:function"),
        ("train toy/matrix --slots no_such:rule", "no_such:rule: the module 'no_such' does not import"),
        (
            "train toy/matrix --slots test_cli:last_json",
            "slots test_cli:last_json: the function takes the task's EnvSpec, and fails with AttributeError",
        ),
        ("train toy/matrix --workers -2", "workers (=-2) must be at least 0"),
        ("train toy/matrix --env-args opponents=random side=good", "side 'good': this task has one side only"),
        ("train mpe/simple_tag --env-args side=prey", "side and opponents go together: "),
        ("train mpe/simple_tag --env-args side=prey opponents=random", "unknown side 'prey'"),
        ("train mpe/simple_tag --env-args side=good opponents=no.safetensors", "opponents: policy file '"),
        ("train mpe/simple --env-args continuous_actions=true", "qmix chooses among discrete actions, and this task's are continuous"),
        ("train mpe", "unknown task 'mpe'"),
        ("tasks mpee", "unknown environment suite 'mpee': did you mean 'mpe'?"),
        ("check-env toy/matrx", "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("bench env toy/matrx", "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("train tooy/matrix", "unknown environment suite 'tooy': did you mean 'toy'?"),
        ("train toy/matrix --stepz 3", "Unrecognized options: --stepz, 3 (did you mean --steps?); 'k24 train --help' lists the options"),
        ("train toy/matrix --ratio 0.5 --sharing snp", "--ratio is an option of snp: write --snp.ratio"),
        (
            "train e1",
            "unknown task 'e1': a task is suite/name, as 'k24 tasks' lists them, or package.module:factory of your own",
        ),
        ("train toy/matrix extra", "Unrecognized options: extra; 'k24 train --help' lists the options"),
        ("train toy/matrix --algo qmx", "unknown algorithm 'qmx': did you mean 'qmix'?"),
        ("train toy/matrix --algo mapo --clip 0.1", "unknown algorithm 'mapo': did you mean 'mappo'?"),
        ("train toy/matrix --algo", "Missing value for argument '--algo'"),
        (
            "train toy/matrix --algo mappo --epsilon-start 1",
            "--epsilon-start is no option of mappo, but of iql, vdn, qmix: leave it out, or change --algo",
        ),
        ("train toy/matrix --algo=matd3 --no-double-q", "--no-double-q is no option of matd3, but of iql, vdn, qmix: leave it out"),
        ("train toy/matrix --algo mappo --algo qmix --clip=0.1", "--clip is no option of qmix, but of ippo, mappo: leave it out"),
        ("train toy/matrix --clip 0.1", "--clip is no option of qmix, but of ippo, mappo: leave it out"),
        ("train toy/matrix --preset mappo_mpe --n-step 3", "--n-step is no option of mappo, but of iql, vdn, qmix, matd3: leave it out"),
        ("train toy/matrix --algo mappo --clp 1", "Unrecognized options: --clp, 1 (did you mean --clip?); 'k24 train --help' lists"),
        ("train toy/matrix --algo mappo --critic-sharing k25", "unknown sharing scheme of a critic 'k25': did you mean 'k24'?"),
        ("train toy/matrix --algo mappo --minibatches 33", "minibatches (=33) must not exceed envs (=32): episodes are not cut"),
        ("train toy/matrix --algo matd3", "matd3 learns continuous actions, and this task's are discrete"),
        *((f"train toy/reach --algo {a}", f"{a} chooses among discrete actions, and this task's are continuous") for a in ("iql", "vdn")),
        ("train toy/matrix --sharing k25", "unknown sharing scheme 'k25': did you mean 'k24'? 'k24 train --help' lists the options"),
        ("train toy/matrix --steps abc", "--steps: wants a whole number such as 1000000, got 'abc'; 'k24 train --help' lists the options"),
        ("train toy/matrix --steps 1.5", "--steps: wants a whole number such as 1000000, got '1.5'"),
        ("train toy/matrix --lr fast", "--lr: wants a number, got 'fast'"),
        ("train toy/matrix --alpha-decay x", "--alpha-decay: wants a number or None, got 'x'; 'k24 train --help' lists the options"),
        ("train toy/matrix --workers 1.5", "--workers: wants a whole number such as 1000000 or None, got '1.5'"),
        ("train toy/matrix --diversity much", "invalid choice 'much' for argument '--diversity'. Expected one of ('orthogonality', "),
        ("train toy/matrix --kaleidoscope.div-coef x", "--kaleidoscope.div-coef: wants a number, got 'x'"),
        ("train toy/matrix --steps", "Missing value for argument '--steps'"),
        ("train toy/matrix --out", "--out wants a value"),
        ("train toy/matrix --out --resume", "--out wants a value, got --resume"),
        ("train --steps 100 toy/matrix", "Unrecognized options: toy/matrix (TASK comes first, options after it); 'k24 train --help'"),
        ("train toy/matrix --env-args a=1 --env-args b=2", "--env-args is given 2 times: give all values after one --env-args"),
        ("sweep --tasks toy/matrix --sharing k24 --sharing nops", "--sharing is given 2 times: give all values after one --sharing"),
        ("train toy/matrix --steps -3", "steps (=-3) must be at least 1"),
        ("train toy/matrix --envs 0", "envs (=0) must be at least 1"),
        ("train toy/matrix --seed -1", "seed (=-1) must lie in 0"),
        ("train toy/matrix --seed 99999999999999999999", "seed (=99999999999999999999) must lie in 0"),
        ("train toy/matrix --lr 0", "lr (=0.0) must be positive"),
        ("train toy/matrix --lr nan", "lr (=nan) must be positive"),
        ("train toy/matrix --lr inf", "lr (=inf) must be a finite number"),
        ("train toy/matrix --hidden 1", "hidden (=1) fits no 2:4 mask, which keeps 2 weights of a group: use 2 or more"),
        ("train toy/matrix --hidden 3 --pattern 4:8", "hidden (=3) fits no 4:8 mask, which keeps 4 weights of a group: use 4 or more"),
        ("train toy/matrix --pattern 4:4", "pattern 4:4 keeps nothing or everything: use N:M with 0 < N < M, for example 2:4"),
        ("train toy/matrix --pattern 2-4", "pattern '2-4' is not of the form N:M: use for example 2:4, 1:4 or 4:8"),
        ("train toy/matrix --n-step 3 --td-lambda 0.5", "td_lambda (=0.5) and n_step (=3) exclude each other: set one of them"),
        ("train toy/matrix --individual-rewards", "individual_rewards needs algo iql, got algo qmix: a mixer has one value for the team"),
        ("train toy/matrix --device gpu", "device 'gpu' is not known: use auto, cpu or cuda"),
        ("train toy/matrix --env-args n_agents", "env_args 'n_agents' is not of the form name=value: for example --env-args n_agents=5"),
        ("train toy/matrix --env-args a=[", "env_args 'a=[' holds no value that can be read"),
        ("train toy/memory --env-args n_cue=3", "unknown option of toy/memory 'n_cue': did you mean 'n_cues'?"),
        ("train toy/memory --env-args n_cues=1", "toy/memory: n_cues must be at least 2, got 1"),
        ("train toy/matrix --preset epymrl", "unknown preset 'epymrl': did you mean 'epymarl'?"),
        ("train toy/matrix --config x --preset epymarl", "--config x and --preset epymarl exclude each other: give one of them"),
        ("train --config no.yaml", "cannot read the configuration no.yaml: No such file or directory"),
        (
            "train --resume --out nowhere",
            "nowhere is no run folder (it has no config.yaml): name a task to start one there, or the --out of a run",
        ),
        ("eval", "RUN is missing; 'k24 eval --help' lists the options"),
        ("eval nowhere", "nowhere is no run folder (it has no config.yaml): give one that 'k24 train' made"),
        ("eval nowhere --episodes 0", "episodes (=0) must be at least 1"),
        ("eval nowhere --episodes -5", "episodes (=-5) must be at least 1"),
        ("eval nowhere --sample --random", "--sample and --random exclude each other: give one of them"),
        ("eval nowhere --seed -1", "seed (=-1) must lie in 0"),
        ("eval nowhere --masks best", "invalid choice 'best' for argument '--masks'. Expected one of ('argmax', 'sampled', 'expected')"),
        ("eval nowhere --device gpu", "device 'gpu' is not known: use auto, cpu or cuda"),
        ("inspect", "RUN is missing"),
        ("inspect nowhere", "nowhere is no run folder"),
        ("check-env", "TASK is missing"),
        ("check-env toy/matrx", "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("bench inferense", "unknown benchmark 'inferense': "),
    ],
)
def test_bad_input_is_one_line(capfd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capfd, *arguments.split()).startswith(message)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(capfd, tmp_path, finished):
    message = "device 'cuda' was asked for but torch finds no CUDA device: use --device cpu, or install a CUDA build of torch"
    assert refused(capfd, *TOY, "--device", "cuda", "--out", str(tmp_path / "run")) == message
    assert refused(capfd, "eval", str(finished), "--device", "cuda") == message
    assert not (tmp_path / "run").exists()


def test_out_that_cannot_be_written(capfd, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert refused(capfd, *TOY, "--out", str(out)) == f"cannot write the run folder {out} (Not a directory): choose another --out"
    assert contents(tmp_path) == {"file": b"no folder"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(BASE, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The same, stopped before its end, with two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(BASE, folder, should_stop=stop_after(14))
    return folder


def test_the_options_of_these_tests_are_their_configuration(finished, tmp_path, capsys):
    assert main([*TOY, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(finished, tmp_path / "run")
    capsys.readouterr()


def test_a_run_that_exists_is_left_alone(capfd, finished):
    before = contents(finished)
    found = refused(capfd, *TOY, "--out", str(finished))
    assert found == f"run folder {finished} exists: add --resume to go on with it, or choose another --out"
    found = refused(capfd, "train", "--resume", "--out", str(finished), "--lr", "0.1")
    assert found == f"{finished} was started with learner.lr=0.005, now it is 0.1: resume with the same settings, or choose another --out"
    found = refused(capfd, "train", "toy/matrix", "--resume", "--out", str(finished))
    assert found.startswith(f"{finished} was started with task=toy/memory, now it is toy/matrix")
    assert contents(finished) == before


# --- policies that are distributions, and continuous actions -------------------------------------------------------------------

# Some rounds of 16 episodes of 3 steps.
REACH = [
    *("train", "toy/reach", "--envs", "16", "--hidden", "8", "--device", "cpu", "--quiet"),
    *("--log-every", "48", "--eval-every", "96", "--eval-episodes", "16", "--checkpoint-every", "96"),
]
OF_MATD3 = ["--algo", "matd3", "--warmup", "48", "--batch-size", "16", "--buffer-size", "300", "--env-steps-per-update", "16"]


@pytest.fixture(scope="module")
def reached(tmp_path_factory) -> dict[str, Path]:
    """A short run of each learner of continuous actions; not to be changed."""
    folder = tmp_path_factory.mktemp("reached")
    for algo, options in (("ippo", []), ("mappo", ["--critic-sharing", "nops"]), ("matd3", OF_MATD3)):
        assert main([*REACH, "--steps", "192", "--algo", algo, *options, "--out", str(folder / algo)]) == 0
    return {algo: folder / algo for algo in ("ippo", "mappo", "matd3")}


def value_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> float:
    capsys.readouterr()
    assert main(["eval", *arguments, "--episodes", "64", "--device", "cpu"]) == 0
    return last_json(capsys.readouterr().out)["return_mean"]


@pytest.mark.parametrize("algo", ["ippo", "mappo", "matd3"])
def test_continuous_actions_from_training_to_file(reached, tmp_path, capsys, algo):
    """A run and its file behave alike, and the run's configuration is all that it takes to repeat it."""
    run, file = reached[algo], tmp_path / "policy.safetensors"
    assert main(["export", str(run), "--out", str(file)]) == 0
    assert value_of(capsys, str(file)) == pytest.approx(value_of(capsys, str(run)), abs=1e-4)
    for policy in (run, file):
        assert main(["inspect", str(policy)]) == 0
        assert 0.4 < last_json(capsys.readouterr().out)["overall_sparsity"] <= 0.5
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert_same_run(run, tmp_path / "again")


@pytest.mark.parametrize("algo", ["ippo", "mappo", "matd3"])
def test_an_interrupted_run_of_any_learner_ends_as_an_uninterrupted_one(reached, tmp_path, algo):
    folder, asked = tmp_path / "run", iter(range(9))
    config = load_config(reached[algo] / "config.yaml")
    assert not train(config, folder, should_stop=lambda: next(asked) == 1).finished
    assert main(["train", "--resume", "--out", str(folder), "--quiet"]) == 0
    assert_same_run(reached[algo], folder)


@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_actions_can_be_drawn(reached, tmp_path, capsys, algo):
    """Of a run and of its file, each time the same ones; the draws of young policies are wide, and cost return."""
    run, file = str(reached[algo]), str(tmp_path / "policy.safetensors")
    assert main(["export", run, "--out", file]) == 0
    for policy in (run, file):
        drawn = value_of(capsys, policy, "--sample")
        assert drawn == value_of(capsys, policy, "--sample")
        assert drawn < value_of(capsys, policy) - 0.01


def test_actions_that_cannot_be_drawn(reached, finished, tmp_path, capfd):
    assert main(["export", str(reached["matd3"]), "--out", str(tmp_path / "matd3.safetensors")]) == 0
    assert main(["export", str(finished), "--out", str(tmp_path / "qmix.safetensors")]) == 0
    for policy, message in (
        (reached["matd3"], "matd3 learns a deterministic policy, which is no distribution to draw from"),
        (finished, "qmix learns a discrete policy, which is no distribution to draw from"),
        (tmp_path / "matd3.safetensors", f"{tmp_path}/matd3.safetensors is a deterministic policy, which has no distribution to draw from"),
        (tmp_path / "qmix.safetensors", f"{tmp_path}/qmix.safetensors is a discrete policy, which has no distribution to draw from"),
    ):
        assert refused(capfd, "eval", str(policy), "--sample").startswith(message)


def test_a_run_is_not_resumed_by_another_algorithm(reached, capfd):
    before = contents(reached["ippo"])
    for algo, options in (("mappo", ["--clip", "0.1"]), ("matd3", ["--warmup", "10"])):
        found = refused(capfd, "train", "--resume", "--out", str(reached["ippo"]), "--algo", algo, *options)
        assert found.startswith(f"{reached['ippo']} was started with algo=ippo, now it is {algo}: resume with the same settings")
    found = refused(capfd, "train", "--resume", "--out", str(reached["ippo"]), "--clip", "0.1")
    assert found.startswith(f"{reached['ippo']} was started with learner.clip=0.2, now it is 0.1")
    assert contents(reached["ippo"]) == before


def test_a_file_or_preset_of_another_algorithm(reached, tmp_path, capsys):
    """Settings of its learner give way to defaults, which is said; those of the run stay, and options come on top."""
    base = reached["matd3"] / "config.yaml"
    assert main(["train", "--config", str(base), "--algo", "ippo", "--clip", "0.1", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"the learner's settings in {base} are those of matd3: ippo starts from its own defaults\n")
    expected = dataclasses.replace(load_config(base), algo="ippo", learner=PPOConfig(clip=0.1))
    assert load_config(tmp_path / "run" / "config.yaml") == expected
    # MAPPO understands what IPPO was told.
    base = reached["ippo"] / "config.yaml"
    assert main(["train", "--config", str(base), "--algo", "mappo", "--out", str(tmp_path / "same"), "--quiet"]) == 0
    assert "own defaults" not in capsys.readouterr().out
    # Only together with the options must values fit: 6000 episodes are too many for the default replay of QMIX.
    options = ["--preset", "mappo_mpe", "--envs", "6000", "--algo", "qmix", "--buffer-size", "6000", "--out", str(base)]
    assert main(["train", "toy/matrix", *options]) == 2
    assert "buffer_size" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory may be promised without end")
@pytest.mark.parametrize(
    "options",
    [["--buffer-size", "900000000000"], ["--batch-size", "900000000000", "--buffer-size", "900000000000"]],
    ids=lambda options: options[0],
)
def test_more_than_there_is_memory_for(capfd, tmp_path, options):
    command = [*REACH, "--algo", "matd3", "--steps", "96", "--warmup", "16", "--out", str(tmp_path / "run"), *options]
    found = refused(capfd, *command, status=1)
    assert found.startswith("out of memory (") and "buffer_size, batch_size, envs" in found


def test_pictures_that_cannot_be_made(capfd, finished, tmp_path):
    gif = tmp_path / "x.gif"
    assert refused(capfd, "eval", str(finished), "--gif", str(gif), "--episodes", "10000000") == (
        "this environment cannot be drawn: leave --gif out"
    ), "said before anything is played"
    (tmp_path / "file").write_text("")
    refused(capfd, "inspect", str(finished), "--png", str(tmp_path / "file" / "x.png"), status=1)
    # The name's ending does not matter.
    assert main(["inspect", str(finished), "--png", str(tmp_path / "x.txt")]) == 0
    assert (tmp_path / "x.txt").read_bytes().startswith(b"\x89PNG")


# --- damaged runs --------------------------------------------------------------------------------------------------------------


def _newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("*.pt"))[-1]


def _replace(path: Path, data: bytes) -> None:
    """Puts other contents in the newest checkpoint, and their checksum in the index."""
    path.write_bytes(data)
    index = path.parent / "index.json"
    entries = json.loads(index.read_text())
    entries[-1]["sha256"] = hashlib.sha256(data).hexdigest()
    index.write_text(json.dumps(entries))


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def _cut(folder: Path) -> None:
    _newest(folder).write_bytes(_newest(folder).read_bytes()[:-100])


def _flip(folder: Path) -> None:
    data = bytearray(_newest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    _newest(folder).write_bytes(data)


def _pickle(folder: Path) -> None:
    _replace(_newest(folder), pickle.dumps({"format": 2, "steps": 320, "state": _Bomb(str(folder / "executed"))}))


def _format(folder: Path) -> None:
    torch.save({"format": 99, "steps": 320, "state": {}}, folder / "x")
    _replace(_newest(folder), (folder / "x").read_bytes())


def _empty_state(folder: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "steps": 320, "state": {}}, folder / "x")
    _replace(_newest(folder), (folder / "x").read_bytes())


def _index(folder: Path) -> None:
    (folder / "checkpoints" / "index.json").write_text("no json")


def _gone(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("*.pt"):
        path.unlink()


def _config(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, "is damaged or cut short ("),
    "flipped": (_flip, "bytes, its checksum differs): there is no earlier one: start over with another --out"),
    "code": (_pickle, "holds more than tensors and plain values (none of it was run): there is no earlier one: start over"),
    "format": (_format, f"has format 99, this k24 reads format {checkpoint.FORMAT}: use the k24 version that wrote it, or start over"),
    "empty": (_empty_state, "does not fit its config.yaml (KeyError: "),
    "index": (_index, "checkpoints/index.json is damaged: restore it, or start over with another --out"),
    "gone": (_gone, "step_000000000320.pt is gone: restore it, or start over with another --out"),
    "config: garbage": (_config("task:", "[\x00"), "config.yaml is no YAML: "),
    "config: unknown setting": (_config("seed:", "sead:"), "config.yaml: unknown setting 'sead': did you mean 'seed'?"),
    "config: wrong kind": (_config("hidden: 8", "hidden: big"), "config.yaml: hidden is 'big', expected int"),
    "config: other net": (_config("hidden: 8", "hidden: 12"), "does not fit its config.yaml (RuntimeError: "),
    "config: other scheme": (_config("sharing: k24", "sharing: nops"), "does not fit its config.yaml (RuntimeError: "),
    "config: other task": (
        _config("task: toy/memory", "task: toy/matrix"),
        "does not fit its config.yaml (",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_one_line_and_left_as_it_is(capfd, finished, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage, message = DAMAGE[name]
    damage(folder)
    before = contents(folder)
    for command in (["eval", str(folder)], ["inspect", str(folder)], ["train", "--resume", "--out", str(folder)]):
        found = refused(capfd, *command)
        assert message in found and str(folder) in found, found
    assert contents(folder) == before
    assert not (folder / "executed").exists()


def test_the_remedy_for_a_damaged_checkpoint_works(capfd, finished, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    _cut(folder)
    assert "delete it to go on from step_000000000192.pt" in refused(capfd, "train", "--resume", "--out", str(folder))
    _newest(folder).unlink()
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert_same_run(finished, folder)
    capfd.readouterr()


def test_a_run_without_a_checkpoint(capfd, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for command in ("eval", "inspect"):
        assert refused(capfd, command, str(folder)) == f"{folder} has no checkpoint yet: train longer, or resume it with --resume"


# --- failures while running ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(capfd, tmp_path):
    found = refused(capfd, *TOY, "--out", str(tmp_path / "run"), "--lr", "30", "--checkpoint-every", "1", status=1)
    assert found.startswith(("loss_td is ", "the gradient of loss_td is ")) and "lower lr (=30.0)" in found
    assert main(["eval", str(tmp_path / "run"), "--episodes", "4"]) == 0


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_an_environment_that_gives_nan(capfd, tmp_path, monkeypatch, what):
    def broken(config: TrainConfig, n_envs: int, device: torch.device) -> Broken:
        return Broken(make_env(config.task, n_envs, device), what, float("nan"), after=9)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "build_env", broken)
        found = refused(capfd, *TOY, "--eval-every", "1000", "--out", str(tmp_path / "run"), status=1)
    assert found.startswith(f"the environment gave a {what} that is NaN or infinite: check it with 'k24 check-env'")
    assert main(["eval", str(tmp_path / "run"), "--episodes", "4"]) == 0
