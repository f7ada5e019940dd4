"""The training loop: the same seed gives the same run, an interrupted run ends as an uninterrupted one, failures say what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k24 import train as train_module
from k24.checkpoint import load_checkpoint, save_checkpoint
from k24.config import TrainConfig, load_config
from k24.envs import Observation, Step, make_env
from k24.envs.base import TeamEnv
from k24.errors import CheckpointError, RunError, UsageError
from k24.evaluate import load_run
from k24.files import hold_folder
from k24.inspection import COSTS, inspect_learner
from k24.learners import PPOConfig, TD3Config, ValueConfig
from k24.sharing import K24Config, KaleidoscopeConfig
from k24.train import MetricLog, Progress, default_folder, round_seed, train

# 20 rounds of 4 episodes of 4 steps, two updates a round; masks freeze in round 16.
BASE = TrainConfig(
    task="toy/memory",
    steps=320,
    envs=4,
    hidden=8,
    device="cpu",
    log_every=16,
    eval_every=64,
    eval_episodes=64,
    checkpoint_every=96,
    learner=ValueConfig(lr=5e-3, batch_size=8, buffer_size=32, env_steps_per_update=8, target_update=7, epsilon_anneal=200),
)
ROUNDS = 20


def change(config: TrainConfig = BASE, **values: Any) -> TrainConfig:
    """A configuration with other values, in its parts too (``masks={...}``)."""
    parts = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(config, **parts)


def stop_after(rounds: int) -> Callable[[], bool]:
    """Asks a run to stop after so many rounds of it."""
    asked = iter(range(1, 10**9))
    return lambda: next(asked) >= rounds


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a checkpoint with its place; tensors as type, shape and bytes, numbers so that NaN equals NaN."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from leaves(v, f"{where}.{k}")
    elif isinstance(value, list | tuple):
        for k, v in enumerate(value):
            yield from leaves(v, f"{where}[{k}]")
    elif isinstance(value, Tensor):
        yield where, (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield where, repr(value)


def assert_same_run(a: Path, b: Path) -> None:
    """Same metrics, evaluation and final state, bit for bit."""
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert (a / "eval.json").read_text() == (b / "eval.json").read_text()
    found = [load_checkpoint(folder / "checkpoints") for folder in (a, b)]
    assert found[0] is not None and found[1] is not None
    assert found[0][0] == found[1][0]
    states = [dict(leaves(state)) for _, state in found]
    assert states[0].keys() == states[1].keys()
    assert [k for k in states[0] if states[0][k] != states[1][k]] == []


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of ``BASE``; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(BASE, folder)
    return folder


# --- what a run leaves behind --------------------------------------------------------------------------------------------------


def test_whoever_comes_second_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with hold_folder(folder) as mine, pytest.raises(UsageError, match="another process trains in"):
        assert mine
        train(BASE, folder)
    assert not list(folder.iterdir())


def test_a_run_folder_holds_all_that_was_promised(tmp_path):
    seen = []
    result = train(BASE, tmp_path / "run", on_progress=seen.append)
    assert result.finished and result.steps == BASE.steps and result.folder == tmp_path / "run"
    assert [p.steps for p in seen] == [16 * (k + 1) for k in range(ROUNDS)]
    assert all(p.total == BASE.steps and p.steps_per_second > 0 and "return_train" in p.metrics for p in seen)
    assert load_config(result.folder / "config.yaml") == BASE
    assert json.loads((result.folder / "eval.json").read_text()) == result.evaluation
    assert result.evaluation.keys() == {"return_mean", "return_ci95", "episodes", "steps", "task", *COSTS}
    assert result.evaluation["episodes"] == 256
    found = inspect_learner(load_run(result.folder).learner)
    assert {name: result.evaluation[name] for name in COSTS} == {name: found[name] for name in COSTS}
    assert len(list(result.folder.glob("events.out.tfevents.*"))) == 1
    assert sorted(p.name for p in (result.folder / "checkpoints").iterdir()) == [
        "index.json",
        "step_000000000320.pt",
    ]
    rows = lines(result.folder)
    assert [r["steps"] for r in rows] == [16 * (k + 1) for k in range(ROUNDS)]
    final = {"return_train", "return_eval", "return_eval_act", "loss_td", "grad_norm", "lr", "updates", "snd", "temperature"}
    assert final | {"overall_sparsity", "mask_hamming", "pattern_entropy"} <= rows[-1].keys()
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert "return_eval" in rows[0] and rows[-1]["updates"] == 2 * (ROUNDS - 1)


def test_how_often_is_logged_and_evaluated(tmp_path):
    train(change(log_every=50, eval_every=100), tmp_path / "run")
    # In the first round at or after each multiple of 50, and in the last one.
    # Evaluations likewise at multiples of 100, and in no other line.
    rows = lines(tmp_path / "run")
    assert [r["steps"] for r in rows] == [16, 64, 112, 160, 208, 256, 304, 320]
    assert [r["steps"] for r in rows if "return_eval" in r] == [16, 112, 208, 304, 320]
    assert all(("return_eval_act" in r) == ("return_eval" in r) for r in rows)


def test_evaluations_do_not_wait_for_a_line_of_metrics(tmp_path):
    train(change(log_every=100, eval_every=50), tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert [r["steps"] for r in rows] == [r["steps"] for r in rows if "return_eval" in r] == [16, 64, 112, 160, 208, 256, 304, 320]


def test_tensorboard_shows_what_the_metrics_hold(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(BASE, tmp_path / "run", should_stop=stop_after(6))
    train(BASE, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("return_train")]
    assert shown == [(r["steps"], pytest.approx(r["return_train"])) for r in lines(tmp_path / "run")]


def test_the_default_folder_names_task_method_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = change(steps=16, seed=3, sharing="nops", algo="vdn")
    assert default_folder(config) == Path("results/toy/memory/vdn-nops/seed3")
    assert train(config).folder == default_folder(config)
    assert (tmp_path / "results/toy/memory/vdn-nops/seed3/eval.json").exists()


def test_seeds_of_rounds_are_valid_and_differ():
    seeds = {round_seed(s, r) for s in (0, 1, 2, 2**63 - 1) for r in range(100)}
    assert len(seeds) == 400 and all(0 <= s < 2**31 for s in seeds)


# --- determinism ---------------------------------------------------------------------------------------------------------------


def _spread(**values: Any) -> TrainConfig:
    """A short run on a simulator: 8 rounds of 2 episodes of 25 steps."""
    pytest.importorskip("vmas")
    learner = {"batch_size": 2, "env_steps_per_update": 25, "buffer_size": 8}
    return change(task="mpe/simple_spread", steps=400, envs=2, eval_every=200, learner=learner, **values)


# Two passes over each round of 4 episodes, two episodes at a time.
PPO = PPOConfig(lr=5e-3, critic_lr=5e-3, epochs=2, minibatches=2)
FEED_FORWARD = dataclasses.replace(PPO, recurrent=False)
# Random play in the first round; from the second on two steps of the critics and one of the policy in each.
TD3 = TD3Config(lr=5e-3, critic_lr=5e-3, n_step=3, batch_size=16, buffer_size=128, env_steps_per_update=8, warmup=32)
# As long as an episode of toy/memory, with continuous actions.
REACH = {"task": "toy/reach", "env_args": ("max_steps=4",)}

# What runs are like, as changes to ``BASE``.
RUNS: dict[str, dict[str, Any]] = {
    "expected": {},
    "sample": {"masks": {"forward": "sample"}},
    "gumbel": {"masks": {"forward": "gumbel"}},
    "gumbel_soft": {"masks": {"forward": "gumbel_soft", "temperature_on": "all"}},
    "never frozen": {"masks": {"freeze_at": 2.0}},
    "EMA corrected": {"masks": {"ema_bias_correction": True, "ema_every": 3, "ema_norm": "rms", "logits": "sum"}},
    "adaptive resets": {"masks": {"adaptive_reset": True, "kl_threshold": 1e-9, "reset_interval": 0, "reset_ratio": 0.5}},
    "resets": {"masks": {"reset_interval": 3, "reset_ratio": 0.5, "alpha_lr_scale": 500.0}},
    "k24_random": {"sharing": "k24_random"},
    "k24_shared": {"sharing": "k24_shared"},
    "kaleidoscope": {"sharing": "kaleidoscope", "kaleidoscope": {"reset_interval": 40, "reset_ratio": 0.5, "threshold_lr_scale": 100.0}},
    "k24_magnitude": {"sharing": "k24_magnitude"},
    "snp": {"sharing": "snp"},
    "hypermarl": {"sharing": "hypermarl"},
    "seps": {"sharing": "seps", "seps": {"random_play": 100, "clusters": 2, "epochs": 2}, "env_args": ("n_agents=3",)},
    "ippo, seps": {"algo": "ippo", "sharing": "seps", "seps": {"random_play": 100, "epochs": 2}, "learner": FEED_FORWARD},
    "nops": {"sharing": "nops"},
    "fups_id": {"sharing": "fups_id"},
    "iql": {"algo": "iql", "learner": {"optimiser": "rmsprop", "td_lambda": 0.6, "individual_rewards": True}},
    "vdn": {"algo": "vdn", "learner": {"target_tau": 0.1, "n_step": 3, "standardise_rewards": False}},
    "ippo": {"algo": "ippo", "learner": PPO},
    "mappo": {"algo": "mappo", "learner": dataclasses.replace(PPO, critic_sharing="k24", critic_hidden=6, individual_rewards=True)},
    "ippo, masks that move": {
        "algo": "ippo",
        "learner": dataclasses.replace(PPO, target_kl=0.02),
        "masks": {"forward": "sample", "adaptive_reset": True, "kl_threshold": 1e-9, "reset_interval": 5, "reset_ratio": 0.5},
    },
    "ippo without recurrence": {"algo": "ippo", "sharing": "nops", "learner": FEED_FORWARD},
    "mappo without recurrence": {"algo": "mappo", "learner": FEED_FORWARD},
    "ippo, continuous": REACH | {"algo": "ippo", "sharing": "kaleidoscope", "learner": FEED_FORWARD},
    "mappo, continuous": REACH | {"algo": "mappo", "learner": dataclasses.replace(PPO, normalise_values=False)},
    # A critic's masks are drawn anew in rounds 4, 7, 10 and 13; policy and critics freeze in round 16.
    "matd3": REACH | {"algo": "matd3", "learner": dataclasses.replace(TD3, critic_sharing="k24", critic_reset_interval=50)},
    "matd3, a network for each critic": REACH
    | {"algo": "matd3", "learner": dataclasses.replace(TD3, critic_sharing="nops", critic_hidden=6)},
    "matd3, adaptive resets": REACH
    | {
        "algo": "matd3",
        "learner": dataclasses.replace(TD3, critic_sharing="k24", critic_rows="all", critics=3, layer_norm=False, policy_delay=1),
        "masks": {"forward": "gumbel", "adaptive_reset": True, "kl_threshold": 1e-9, "reset_interval": 7, "reset_ratio": 0.5},
    },
}


@pytest.mark.parametrize("name", ["expected", "seps", "ippo", "mappo", "ippo, continuous", "mappo, continuous", "matd3", "a simulator"])
def test_the_same_seed_gives_the_same_run(tmp_path, name):
    config = change(**RUNS[name]) if name in RUNS else _spread()
    for k, name in enumerate(("a", "b")):
        # What a program did with the global generators before has no influence, and a run does not touch them.
        torch.manual_seed(k)
        before = torch.get_rng_state()
        train(config, tmp_path / name)
        assert torch.equal(before, torch.get_rng_state())
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_gives_another_run(whole, tmp_path):
    train(change(seed=1), tmp_path / "1")
    assert lines(whole)[1]["loss_td"] != lines(tmp_path / "1")[1]["loss_td"]
    nets = [load_run(folder).learner.net for folder in (whole, tmp_path / "1")]
    assert not torch.equal(nets[0].layers["fc2"].weight, nets[1].layers["fc2"].weight)


# --- resuming ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    """Stopped after the first round, before the freeze and after it, each time to be resumed."""
    config = change(**RUNS[name])
    train(config, tmp_path / "whole")
    done = 0
    for rounds in (1, 9, 8):
        result = train(config, tmp_path / "parts", resume=done > 0, should_stop=stop_after(rounds))
        done += rounds
        assert not result.finished and result.steps == 16 * done and result.evaluation == {}
        assert not (tmp_path / "parts" / "eval.json").exists()
        if config.sharing == "k24" and config.masks.freeze_at is None:
            assert load_run(tmp_path / "parts").learner.sharing.state_dict()["frozen"] == (done >= 16)
    assert train(config, tmp_path / "parts", resume=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("sharing", ["k24", "kaleidoscope"])
def test_an_interrupted_run_of_a_simulator_ends_as_an_uninterrupted_one(tmp_path, sharing):
    config = _spread(sharing=sharing)
    train(config, tmp_path / "whole")
    for rounds in (3, 4):
        train(config, tmp_path / "parts", resume=True, should_stop=stop_after(rounds))
    assert train(config, tmp_path / "parts", resume=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["expected", "matd3"])
def test_an_unfinished_run_keeps_its_replay_bit_for_bit_and_a_finished_one_none(tmp_path, name):
    config = change(**RUNS[name])
    train(config, tmp_path / "at once", should_stop=stop_after(9))
    for rounds in (4, 5):
        train(config, tmp_path / "parts", resume=True, should_stop=stop_after(rounds))
    found = [load_checkpoint(tmp_path / folder / "checkpoints") for folder in ("at once", "parts")]
    states = [dict(leaves(state["learner"]["replay"])) for _, state in found]
    assert found[0][0] == found[1][0] < config.steps and states[0] == states[1] and len(states[0]) > 5
    train(config, tmp_path / "parts", resume=True)
    steps, state = load_checkpoint(tmp_path / "parts/checkpoints")
    assert steps >= config.steps and "replay" not in state["learner"]


def test_a_run_goes_on_on_another_kind_of_device(tmp_path):
    """Whose generators have states of another size; here one of 16 bytes, as on CUDA, in place of a CPU's."""
    train(BASE, tmp_path / "run", should_stop=stop_after(9))
    folder = tmp_path / "run/checkpoints"
    steps, state = load_checkpoint(folder)
    state["learner"]["generator"] = torch.arange(16, dtype=torch.uint8)
    save_checkpoint(folder, steps, state)
    assert train(BASE, tmp_path / "run", resume=True).finished


def test_a_run_killed_in_its_last_evaluation_goes_on_with_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/eval.json").unlink()
    assert train(BASE, tmp_path / "run", resume=True).finished
    assert_same_run(whole, tmp_path / "run")


def test_what_was_logged_after_the_checkpoint_is_logged_again(whole, tmp_path):
    """A kill leaves lines that the checkpoint knows nothing of, and perhaps half a line."""
    train(BASE, tmp_path / "parts", should_stop=stop_after(9))
    log = tmp_path / "parts" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"steps": 160, "return_train": 99.0}\n[1]\n{"steps": 176, "retu')
    train(BASE, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_the_checkpoint_before_is_as_good(whole, tmp_path):
    train(BASE, tmp_path / "parts", should_stop=stop_after(14))
    names = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").glob("*.pt"))
    assert names == ["step_000000000192.pt", "step_000000000224.pt"]
    (tmp_path / "parts" / "checkpoints" / names[1]).unlink()
    train(BASE, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_run_without_a_checkpoint_begins_anew(whole, tmp_path):
    for name, leave in (("killed", ["config.yaml", "metrics.jsonl"]), ("killed earlier", ["config.yaml"]), ("killed first", [])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml.tmp").write_text("task: toy/mem")
        for file in leave:
            (folder / file).write_text((whole / file).read_text())
        train(BASE, folder, resume=True)
        assert_same_run(whole, folder)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(BASE, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    result = train(BASE, tmp_path / "run", resume=True)
    assert result.finished and result.steps == BASE.steps
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {k: v for k, v in after.items() if k in before} == before


def test_what_changes_nothing_of_the_result_may_differ(whole, tmp_path):
    train(BASE, tmp_path / "parts", should_stop=stop_after(9))
    train(change(checkpoint_every=32, threads=1, device="auto"), tmp_path / "parts", resume=True)
    for name in ("metrics.jsonl", "eval.json"):
        assert (whole / name).read_text() == (tmp_path / "parts" / name).read_text()


# --- refusals: nothing is overwritten ------------------------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped on its way; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(BASE, folder, should_stop=stop_after(9))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, "was started with seed=0, now it is 1: resume with the same settings, or choose another --out"),
        ({"hidden": 16}, "was started with hidden=8, now it is 16"),
        ({"steps": 640}, "was started with steps=320, now it is 640"),
        ({"masks": {"kappa": 2.0}}, "was started with masks.kappa=1.0, now it is 2.0"),
        ({"learner": {"lr": 1.0}}, "was started with learner.lr=0.005, now it is 1.0"),
    ],
)
def test_another_configuration_is_not_resumed(stopped, values, message):
    before = _contents(stopped)
    with pytest.raises(UsageError) as caught:
        train(change(**values), stopped, resume=True)
    assert str(caught.value).startswith(f"{stopped} {message}")
    assert _contents(stopped) == before


def test_a_run_folder_is_not_overwritten(stopped):
    before = _contents(stopped)
    with pytest.raises(UsageError, match="exists: add --resume to go on with it, or choose another --out"):
        train(BASE, stopped)
    assert _contents(stopped) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UsageError, match="choose another --out"):
            train(BASE, tmp_path, resume=resume)
    assert _contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    refusals = []

    def intrude(_: Progress) -> None:
        if not refusals:
            with pytest.raises(UsageError) as caught:
                train(BASE, tmp_path / "run", resume=True)
            refusals.append(str(caught.value))

    train(BASE, tmp_path / "run", on_progress=intrude)
    assert refusals == [f"another process trains in {tmp_path / 'run'}: wait for its end, stop it, or choose another --out"]
    train(BASE, tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    train(BASE, tmp_path / "run", resume=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/no/run")):
        with pytest.raises(UsageError, match=r"cannot write the run folder .*: choose another --out"):
            train(BASE, out)


def test_nothing_is_made_where_the_environment_refuses(tmp_path):
    for values in ({"task": "toy/matrx"}, {"env_args": ("n_cue=3",)}, {"task": ""}):
        with pytest.raises(UsageError):
            train(change(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_net_is_refused(stopped, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("hidden: 8", "hidden: 12"))
    before = _contents(folder)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.yaml .*: restore the config it was made with"):
        train(change(hidden=12), folder, resume=True)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.yaml"):
        load_run(folder)
    assert _contents(folder) == before


def test_cuda_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="torch finds no CUDA device: use --device cpu, or install a CUDA build of torch"):
        train(change(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- failures while running ----------------------------------------------------------------------------------------------------


class Broken(TeamEnv):
    """An environment that gives a bad number from some round on."""

    def __init__(self, inner: TeamEnv, what: str, value: float, after: int) -> None:
        self.inner, self.what, self.value, self.after = inner, what, value, after
        self.spec, self.n_envs, self.device = inner.spec, inner.n_envs, inner.device
        self.rounds = 0

    def reset(self, seed: int) -> Observation:
        """Counts rounds."""
        self.rounds += 1
        return self.inner.reset(seed)

    def step(self, actions: Tensor) -> Step:
        """Spoils one number of one step."""
        step = self.inner.step(actions)
        if self.rounds <= self.after:
            return step
        if self.what == "reward":
            reward = step.reward.clone()
            reward[0, 0] = self.value
            return dataclasses.replace(step, reward=reward)
        seen = dataclasses.replace(step.after, **{self.what: torch.full_like(getattr(step.after, self.what), self.value)})
        return dataclasses.replace(step, after=seen, current=seen if step.after is step.current else step.current)


@pytest.mark.parametrize(
    ("what", "value"), [("obs", float("nan")), ("state", float("nan")), ("reward", float("nan")), ("reward", float("inf"))]
)
def test_a_bad_number_from_the_environment_ends_the_run(whole, tmp_path, monkeypatch, what, value):
    def broken(config: TrainConfig, n_envs: int, device: torch.device) -> TeamEnv:
        env = make_env(config.task, n_envs, device)
        return Broken(env, what, value, after=9) if n_envs == config.envs else env

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "build_env", broken)
        with pytest.raises(RunError) as caught:
            train(BASE, tmp_path / "parts")
    assert str(caught.value).startswith(f"the environment gave a {what} that is NaN or infinite: check it with 'k24 check-env'")
    assert caught.value.exit_status == 1
    # What was saved before is good: with a sound environment the run ends as if nothing had happened.
    assert load_run(tmp_path / "parts").steps == 96
    train(BASE, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    config = change(learner={"lr": 30.0, "grad_clip": 1e30}, checkpoint_every=1)
    with pytest.raises(RunError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    # Whichever overflows first is named.
    assert message.startswith(("loss_td is ", "the gradient of loss_td is ")) and "lower lr (=30.0)" in message and "\n" not in message
    run = load_run(tmp_path / "run")
    assert run.steps >= 16
    assert all(bool(torch.isfinite(p).all()) for p in run.learner.net.parameters())


def test_a_full_disk_keeps_the_checkpoint_before(whole, tmp_path, monkeypatch):
    from k24 import files

    saved = []
    real = files.os.fsync

    def full(descriptor: int) -> None:
        saved.append(descriptor)
        # A save flushes four times: file and folder, for the checkpoint and for the index. Before the first one the configuration is
        # written and the log made anew, with two each.
        if len(saved) == 2 + 2 + 4 + 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot write checkpoint .* \(No space left on device\): make room or mend the disk"):
            train(BASE, tmp_path / "parts")
    assert load_run(tmp_path / "parts").steps == 96
    train(BASE, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


# --- parts ---------------------------------------------------------------------------------------------------------------------


def test_the_log_is_cut_back_to_a_step(tmp_path):
    log = MetricLog(tmp_path, 0)
    for steps in (10, 20, 30):
        log.write(steps, {"x": steps / 3})
    log.close()
    MetricLog(tmp_path, 20).close()
    assert lines(tmp_path) == [{"steps": 10, "x": 10 / 3}, {"steps": 20, "x": 20 / 3}]
    MetricLog(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_kaleidoscope_settings_reach_the_scheme(tmp_path):
    config = change(sharing="kaleidoscope", kaleidoscope={"div_coef": 0.0}, steps=32)
    train(config, tmp_path / "run")
    assert config.kaleidoscope != KaleidoscopeConfig() and config.masks == K24Config()
    assert "div_loss" not in lines(tmp_path / "run")[-1]
