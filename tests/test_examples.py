"""The numbered examples do what they say: each is run as a user runs it, in a process of its own, and writes where it is told to."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml
from safetensors.torch import load_file

import k24

EXAMPLES = Path(__file__).parents[1] / "examples"
TRIED = {"01_layer", "02_train", "03_own_environment", "04_act", "05_metrics", "06_benchmarl"}


def run(name: str, tmp_path: Path, *options: object) -> dict[str, str]:
    """Runs an example; what it printed, by what stands at the beginning of each line."""
    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(out), *map(str, options)]
    done = subprocess.run(command, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(here.iterdir()), "it wrote into the current folder, not below --out"
    return dict(re.split(r"  +| (?=differ in )", line, maxsplit=1) for line in done.stdout.splitlines())


def first_number(text: str) -> float:
    found = re.search(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", text)
    assert found is not None, text
    return float(found[0].replace(",", ""))


def test_every_numbered_example_is_tried_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("0*.py")} == TRIED


def test_the_layer_learns_what_one_network_cannot(tmp_path: Path) -> None:
    said = run("01_layer", tmp_path, "--steps", 700)
    error = {name: first_number(said[name]) for name in ("error before", "error after", "best without masks")}
    assert error["error after"] < error["error before"] / 10
    assert error["error after"] < error["best without masks"] / 4
    assert said["kept of every four"].startswith("2 to 2 weights")
    # 64·16/4 groups of the first layer and 4·64/4 of the second, for four slots.
    assert "1,280 groups" in said["kept of every four"]
    saved = load_file(tmp_path / "out" / "layers.safetensors")
    assert bool(saved["first.frozen"]) and bool(saved["second.frozen"])
    layer = k24.MaskedLinear(16, 64, n_slots=4)
    layer.load_state_dict({name.removeprefix("first."): value for name, value in saved.items() if name.startswith("first.")})
    assert torch.equal(layer.mask().unflatten(-1, (-1, 4)).sum(-1), torch.full((4, 64, 4), 2.0))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    said = run("02_train", tmp_path, "--steps", 1280)
    whole, parts = (json.loads((tmp_path / "out" / name / "eval.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts and whole["return_mean"] == pytest.approx(1.0) and whole["steps"] == 1280
    assert said["return"].startswith("1.000") and said["resumed"] == "to 1,280 steps, return 1.000"
    assert said["stopped"].endswith("after 640 steps, finished: False")
    assert said["same as in one go"].startswith("True")


def test_an_own_environment_is_checked_and_learned(tmp_path: Path) -> None:
    said = run("03_own_environment", tmp_path, "--steps", 4000)
    assert said["Corridor"].startswith("keeps the contract")
    assert "expected reward to be float32" in said["Sloppy"]
    # Home at the end of the corridor: 8, 8, 7, 6 or 5 of 8 steps from the five cells; in its middle: 8, 8, 8, 7 or 7.
    assert first_number(said["best return"]) == pytest.approx((34 / 5 + 38 / 5 + 34 / 5) / 3, abs=0.05)
    assert first_number(said["return"]) > 0.9 * first_number(said["best return"]) > 2 * first_number(said["return by chance"])
    assert yaml.safe_load((tmp_path / "out" / "run" / "config.yaml").read_text())["task"] == "corridor:make"


def test_a_policy_acts_without_the_training_stack(tmp_path: Path) -> None:
    said = run("04_act", tmp_path)
    assert first_number(said["right answers"]) > 0.95
    assert said["training stack"].startswith("not imported")
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        assert first_number(said["ONNX Runtime"].removeprefix("differs by ")) < 1e-5
    policy = k24.load_policy(tmp_path / "out" / "policy.safetensors")
    # A cue of each kind, then nothing, then the question: it is named by either agent, whichever the other one saw.
    cues = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    blank = torch.zeros(2, 4, 3)
    shown, asked = blank.scatter(2, cues[..., None], 1.0), blank.clone()
    asked[..., 2] = 1
    state = None
    for obs in (shown, blank, blank, asked):
        actions, state = policy.act(obs, state)
    assert torch.equal(actions, cues)


def test_metrics_are_read_and_drawn(tmp_path: Path) -> None:
    said = run("05_metrics", tmp_path, "--steps", 800)
    assert said["TensorBoard events"].endswith("the same values: True")
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert said["metrics.jsonl"].endswith(f", {len(lines)} lines")
    assert said["temperature"].startswith("1.000 at") and "0.030 at step 800" in said["temperature"]
    assert said["masks of gru_input"].startswith("0.500 of the weights kept")
    picture = matplotlib.image.imread(tmp_path / "out" / "metrics.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert float(picture[..., :3].std()) > 0.1, "the picture is blank"


@pytest.mark.skipif(importlib.util.find_spec("benchmarl") is None, reason="needs BenchMARL: pip install 'k24[benchmarl]'")
def test_benchmarl_trains_masked_policies(tmp_path: Path) -> None:
    said = run("06_benchmarl", tmp_path, "--iterations", 5, "--envs", 10)
    assert said["masks"] == "frozen after 3,000 of 5,000 frames; exactly 2:4: True"
    assert first_number(said["alpha"]) > 0.05
    assert 0 < first_number(said["distance of masks"]) <= 0.6
    # Of 18 observations the last two are kept by all: (10·64 + 32·64 + 32·4) weights of the (18·64 + 64·64 + 64·4).
    assert first_number(said["share of weights"]) == pytest.approx(2816 / 5504, abs=1e-3)


def regression(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "hetero_regression.py"), *map(str, options)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)


def test_the_regression_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    kept = tmp_path / "rows.json"
    options = ("--sharing", "k24", "fups_bias", "--match", "macs", "--steps", 100, "--seeds", 2, "--json", kept)
    first = regression(*options, "--agents", 2)
    assert first.returncode == 0, first.stderr[-2000:]
    found = json.loads(first.stdout.splitlines()[-1])["rows"]
    assert [(row["sharing"], row["hidden"]) for row in found] == [("k24", 64), ("fups_bias", 44)]
    assert all(len(row["nmse_by_seed"]) == 2 and 0 < row["nmse"] < 0.5 for row in found)

    # What stands in the file is not run again: a number that no run gives stays.
    changed = json.loads(kept.read_text())
    changed["rows"][0]["nmse"] = 7.0
    kept.write_text(json.dumps(changed))
    second = regression(*options, "--agents", 2, 3, "--png", tmp_path / "rows.png")
    assert second.returncode == 0, second.stderr[-2000:]
    assert [(row["sharing"], row["agents"], row["nmse"] == 7.0) for row in json.loads(second.stdout.splitlines()[-1])["rows"]] == [
        ("k24", 2, True),
        ("fups_bias", 2, False),
        ("k24", 3, False),
        ("fups_bias", 3, False),
    ]
    assert matplotlib.image.imread(tmp_path / "rows.png").ndim == 3


def test_the_regression_refuses_what_was_measured_otherwise(tmp_path: Path) -> None:
    kept = tmp_path / "rows.json"
    assert regression("--agents", 2, "--steps", 5, "--seeds", 1, "--json", kept).returncode == 0
    before = kept.read_bytes()
    other = regression("--agents", 2, "--steps", 6, "--seeds", 1, "--json", kept)
    assert (other.returncode, other.stdout, other.stderr) == (1, "", f"{kept} was measured with steps=5, now it is 6: name another file\n")
    assert kept.read_bytes() == before
