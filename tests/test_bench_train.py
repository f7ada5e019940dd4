"""``k24 bench train``: the right things beside each other, and no speed of a wrong result. No test looks at how long anything took."""

from __future__ import annotations

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import k24.nets
from k24.bench import BenchTrain, bench_train, critics, learning, train, train_options
from k24.bench.learning import disagreement, loop_speeds, made_up_episodes, make, race_updates, separate_forward, stepwise_forward, unroll
from k24.bench.timing import Race
from k24.cli import main
from k24.envs.base import EnvSpec
from k24.errors import RunError, UsageError
from k24.learners import LEARNERS, PPOConfig, TD3Config, TD3Learner, ValueConfig
from k24.nets import AgentNet
from k24.sharing import make_sharing
from k24.sparse.slots import SlotWeights, apply_slots

SMALL = ["--agents", "2", "--obs", "6", "--actions", "3", "--hidden", "8", "--repeats", "2", "--seconds", "0.001"]
EPISODES = [*SMALL, "--steps", "3", "--task", "toy/matrix"]
SIZES = {
    "qmix": [*EPISODES, "--batch", "2"],
    "mappo": [*EPISODES, "--envs", "3", "--epochs", "2"],
    "ippo": [*EPISODES, "--envs", "3", "--epochs", "1"],
    "matd3": [*SMALL, "--state", "5", "--batch", "11", "--envs", "2", "--task", ""],
}
COMMON = {"update_ms", "update_mb", "max_rel_err"}
OF_EPISODES = COMMON | {"dense_ms", "stepwise_ms", "env_steps_per_s"}
OF_CRITICS = COMMON | {"one_critic_ms", "all_rows_ms", "two_networks_ms", "critics"}
KEYS = {
    "qmix": OF_EPISODES | {"env_steps_per_s_rare"},
    "mappo": OF_EPISODES | {"dense_env_steps_per_s"},
    "ippo": OF_EPISODES | {"dense_env_steps_per_s"},
    "matd3": OF_CRITICS | {"over_one_critic", "all_rows_over_one_critic", "two_networks_over_one_critic"},
}


def run(capfd, algo: str, *more: str) -> tuple[list[str], dict]:
    assert main(["bench", "train", "--algo", algo, *SIZES[algo], *more]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    return lines, json.loads(lines[-1])


# --- what it finds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", KEYS)
def test_command_prints_each_figure_and_json(capfd, algo: str) -> None:
    lines, found = run(capfd, algo)
    assert set(found) == KEYS[algo]
    assert all(value > 0 for name, value in found.items() if name.endswith(("_ms", "_s", "one_critic")))
    assert found["max_rel_err"] < 1e-4 and "1 thread;" in lines[0]
    assert lines[1].startswith(f"one update, {algo}-k24 ") and sum(" ms  (" in line for line in lines) == sum("_ms" in key for key in found)
    assert any(line.startswith("whole loop on toy/matrix: ") for line in lines) == (algo != "matd3")


@pytest.mark.parametrize(("algo", "sharing"), [("qmix", "nops"), ("mappo", "k24_random"), ("ippo", "fups_id"), ("matd3", "kaleidoscope")])
def test_other_schemes(capfd, algo: str, sharing: str) -> None:
    lines, found = run(capfd, algo, "--sharing", sharing, *(["--task", ""] if algo != "matd3" else []))
    assert lines[1].startswith(f"one update, {algo}-{sharing} ")
    assert set(found) == {name for name in KEYS[algo] if "steps_per_s" not in name}


def test_slots_by_unit_type_on_request(capfd) -> None:
    lines, found = run(capfd, "qmix", "--unit-types", "2", "--envs", "4", "--task", "")
    kinds = {f"{layout}_{what}" for layout in ("types", "agents") for what in ("update_ms", "act_us")}
    assert set(found) == KEYS["qmix"] - {"env_steps_per_s", "env_steps_per_s_rare"} | kinds | {
        "types_update_over_agents",
        "types_act_over_agents",
    }
    assert any(line.startswith("rows that choose among 2 slots: ") for line in lines)


def test_matd3_end_to_end(capfd) -> None:
    lines, found = run(capfd, "matd3", "--task", "toy/reach")
    assert set(found) == KEYS["matd3"] | {"env_steps_per_s", "two_networks_env_steps_per_s"}
    assert any(line.startswith("whole loop on toy/reach: ") for line in lines)


@pytest.mark.parametrize(
    ("own", "asked", "count"), [("k24", None, 5), ("k24", 3, 3), ("nops", None, 2), ("kaleidoscope", None, 5), ("auto", None, 2)]
)
def test_critics_that_are_compared(monkeypatch, own: str, asked: int | None, count: int) -> None:
    """Which learners race, how many updates a sample of each takes, and what becomes of the times."""
    made, updated = [], []

    def noted(options, spec, settings, *more):
        made.append((settings, make(options, spec, settings, *more)))
        return made[-1][1]

    def update(learner, *_) -> None:
        updated.append(learner)

    def raced(updates, repeats, on_row, per_call):
        updated.clear()
        for run in updates.values():
            run()
        counts = [sum(learner is candidate for learner in updated) for _, candidate in made[:4]]
        assert counts == [per_call] * 4 == [TD3Config().policy_delay] * 4
        us = {
            "update_ms": [400.0, 300.0],
            "one_critic_ms": [200.0, 150.0],
            "all_rows_ms": [500.0, 450.0],
            "two_networks_ms": [300.0, 225.0],
        }
        return {}, Race(us)

    monkeypatch.setattr(critics, "make", noted)
    monkeypatch.setattr(critics, "race_updates", raced)
    monkeypatch.setattr(TD3Learner, "update", update)
    found = bench_train(critics.BenchTD3(critic_sharing=own, critics=asked, obs=6, hidden=8, batch=10))
    assert [learner.n_critics for _, learner in made[:4]] == [count, 1, count, 2]
    assert [settings.critic_rows for settings, _ in made[:4]] == ["split", "split", "all", "split"]
    kinds = [learner.critic.sharing for _, learner in made[:4]]
    wanted = [type(make_sharing(name, 1)) for name in (own.replace("auto", "nops"), "fups", own.replace("auto", "nops"), "nops")]
    assert [type(kind) for kind in kinds] == wanted and kinds[3].own and not kinds[1].own
    assert len({type(learner.sharing) for _, learner in made}) == 1  # one and the same policy
    assert found["over_one_critic"] == 2.0 and found["all_rows_over_one_critic"] == 2.75 and found["two_networks_over_one_critic"] == 1.5
    assert found["critics"] == count


def test_times_are_those_of_one_update(monkeypatch) -> None:
    monkeypatch.setattr(learning, "race", lambda *_, **__: Race({"a": [2000.0, 4000.0, 6000.0]}))
    rows = []
    found, _ = race_updates({"a": lambda: None}, 3, lambda *row: rows.append(row), per_call=2)
    assert found == {"a": 2.0} and rows == [("a", 2.0, 2.0)]


def test_loops_take_turns_and_warm_up(monkeypatch) -> None:
    """One step takes 0.1 s in a and 0.4 s in b, all of it learning; the first two rounds take longer and do not count."""
    clock, order = [0.0], []
    monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Learner:
        def __init__(self, name: str, each: float) -> None:
            self.name, self.each, self.rounds = name, each, 0

        def gather(self, env, env_steps, seed):
            order.append((self.name, seed))
            return SimpleNamespace(steps=10)

        def learn(self, progress, env_steps) -> None:
            self.rounds += 1
            clock[0] += 1000.0 if self.rounds <= 2 else 10 * self.each

    loops = {"a": (None, Learner("a", 0.1)), "b": (None, Learner("b", 0.4))}
    assert loop_speeds(loops, seconds=7.0) == {"a": 10, "b": 2}  # 2.5, rounded to even
    # 7 s of each are 14 s of both: three rounds of 5 s after the two.
    assert order == [(name, number) for number in range(5) for name in "ab"]
    assert loop_speeds({}, seconds=1.0) == {}


# --- correctness first -----------------------------------------------------------------------------------------------------------


def broken_run_gru(gates, h, made, right=k24.nets.run_gru):
    return right(gates, h, made) * 1.01


def broken_critic_gru(gates, h, made, right=k24.nets.run_gru):
    """Wrong for a single slot alone, which is how the critic of MAPPO has it."""
    return right(gates, h, made) * (1.01 if len(gates) == 1 else 1.0)


def one_mask_for_all(x, weight, bias):
    return apply_slots(x, weight[:1].expand_as(weight), bias)


def half_the_gradient(x, weight, bias):
    """Of inputs; values are right."""
    return apply_slots((x + x.detach()) / 2, weight, bias)


@pytest.mark.parametrize(
    ("algo", "name", "broken", "message"),
    [
        ("qmix", "run_gru", broken_run_gru, "the fast path differs from the step-by-step one by "),
        ("ippo", "run_gru", broken_run_gru, "the fast path differs from the step-by-step one by "),
        ("mappo", "run_gru", broken_critic_gru, "the fast path differs from the step-by-step one by "),
        ("mappo", "apply_slots", half_the_gradient, "the fast path differs from the step-by-step one by "),
        ("matd3", "apply_slots", one_mask_for_all, "all critics in one pass differs from a pass for each of them by "),
        ("matd3", "apply_slots", half_the_gradient, "all critics in one pass differs from a pass for each of them by "),
    ],
)
def test_nothing_is_timed_of_a_path_that_is_wrong(capfd, monkeypatch, algo: str, name: str, broken, message: str) -> None:
    monkeypatch.setattr(k24.nets, name, broken)
    assert main(["bench", "train", "--algo", algo, *SIZES[algo], "--task", ""]) == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and err.startswith(f"k24: {message}") and err.endswith(": nothing is timed\n")


def test_nan_is_no_agreement() -> None:
    with pytest.raises(RunError, match="a differs from b by nan"):
        learning.require_agreement(float("nan"), "a", "b")
    learning.require_agreement(1e-4, "a", "b")


def test_a_pass_for_each_by_hand() -> None:
    net = AgentNet(1, 1, 2, 2, make_sharing("nops", 2), recurrent=False)
    weights = [
        SlotWeights(torch.tensor([[[1.0], [-1.0]], [[2.0], [0.0]]]), torch.tensor([[0.0, 1.0]])),  # one bias for both
        SlotWeights(torch.tensor([[[1.0, 2.0], [3.0, -9.0]]]), torch.tensor([[0.0, 0.0], [0.0, -20.0]])),  # one weight for both
        SlotWeights(torch.tensor([[[1.0, 10.0]], [[1.0, 10.0]]]), torch.tensor([[0.5], [0.5]])),
    ]
    x = torch.tensor([3.0, 3.0]).view(2, 1, 1, 1)
    # Slot 0: (3, -2) -> (3, 0) -> (3, 9) -> 3 + 90 + 0.5. Slot 1: (6, 1) -> (8, 18 - 9 - 20) -> (8, 0) -> 8.5.
    assert separate_forward(net, weights, x, net.initial_state(1)).flatten().tolist() == [93.5, 8.5]


def test_a_pass_for_each_normalises_by_hand() -> None:
    net = AgentNet(1, 1, 2, 1, make_sharing("nops", 1), recurrent=False, layer_norm=True)
    weights = [
        SlotWeights(torch.tensor([[[1.0], [-1.0]]]), torch.zeros(1, 2)),
        SlotWeights(torch.eye(2)[None] * 5, torch.zeros(1, 2)),
        SlotWeights(torch.tensor([[[2.0, 10.0]]]), torch.zeros(1, 1)),
    ]
    # (3, -3) -> (1, -1) -> (1, 0) -> (5, 0) -> (1, -1) -> (1, 0) -> 2.
    out = separate_forward(net, weights, torch.full((1, 1, 1, 1), 3.0), net.initial_state(1))
    assert out.item() == pytest.approx(2.0, abs=1e-4)


def test_difference_is_a_share_of_the_largest_value() -> None:
    sharing = make_sharing("fups", 2)
    net = AgentNet(3, 2, 4, 2, sharing)
    obs = torch.randn(2, 3, 2, 3)
    assert disagreement(net, sharing, obs, stepwise_forward) < 1e-5
    # Outputs of 1.25 times the size: (1.25 - 1) / 1.25, and gradients of 1.25² times the size: 0.5625 / 1.5625.
    larger = disagreement(net, sharing, obs, lambda *arguments: stepwise_forward(*arguments) * 1.25)
    assert larger == pytest.approx(0.36, abs=1e-5)
    # What has a gradient one way and none the other is no agreement either.
    assert disagreement(net, sharing, obs, lambda net, weights, obs, h: stepwise_forward(net, weights, obs.detach(), h)) > 1


@pytest.mark.parametrize("algo", ["vdn", "mappo"])
def test_the_baseline_learns_the_same_step_by_step(monkeypatch, algo: str) -> None:
    """Each of its nets is unrolled, and its first update is that of the fast one, to rounding."""
    spec = EnvSpec(2, 4, 8, 3, 5)
    settings = ValueConfig(standardise_rewards=False) if algo == "vdn" else PPOConfig(epochs=1)
    fast, plain = (make(train_options(algo), spec, settings, "fups") for _ in range(2))
    batch, counted = made_up_episodes(spec, 4), []
    nets = [net for net, *_ in train._nets(plain, batch)]
    for net in nets:
        unroll(net)

    def noted(net, *arguments):
        counted.append(net)
        return stepwise_forward(net, *arguments)

    monkeypatch.setattr(learning, "stepwise_forward", noted)
    for learner in (fast, plain):
        learner.update(batch, 0.1, 0)
    assert set(counted) == set(nets) and len(nets) == (1 if algo == "vdn" else 2)
    ours, theirs = fast.metrics(), plain.metrics()
    losses = [name for name in ours if name.startswith("loss_")]
    assert losses and all(ours[name] == pytest.approx(theirs[name], abs=1e-5) for name in [*losses, "grad_norm"])


# --- options ---------------------------------------------------------------------------------------------------------------------


def test_each_learner_can_be_timed() -> None:
    assert set(train.KINDS) == set(LEARNERS.values())
    assert [train_options(algo).algo for algo in LEARNERS] == list(LEARNERS)
    for options, _ in train.KINDS.values():
        assert all(f.name in vars(options()) for f in fields(options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--algo qmx", "unknown algorithm 'qmx': did you mean 'qmix'?"),
        ("--algo", "Missing value for argument '--algo'"),
        ("--epochs 2", "--epochs is no option of qmix, but of ippo, mappo: leave it out, or change --algo"),
        ("--algo mappo --batch=9", "--batch is no option of mappo, but of iql, vdn, qmix, matd3: leave it out"),
        ("--algo matd3 --unit-types 2", "--unit-types is no option of matd3, but of iql, vdn, qmix: leave it out"),
        ("--algo matd3 --steps 2", "--steps is no option of matd3, but of iql, vdn, qmix, ippo, mappo: leave it out"),
        ("--epoch 2", "Unrecognized options: --epoch, 2"),
        ("--sharing k25", "unknown sharing scheme 'k25': did you mean 'k24'?"),
        ("--threads 0", "threads (=0) must be at least 1"),
        ("--repeats 0", "repeats (=0) must be at least 1"),
        ("--unit-types -1", "unit_types (=-1) must be at least 0"),
        ("--seconds nan", "seconds (=nan) must be above 0"),
        ("--algo mappo --epochs 0", "epochs (=0) must be at least 1"),
        ("--algo matd3 --critics 0", "critics (=0) must be at least 1"),
        ("--algo matd3 --batch 3 --hidden 8", "batch_size (=3) must be at least the number of critics (=5)"),
        ("--algo matd3 --task toy/matrix", "matd3 learns continuous actions, and this task's are discrete"),
        ("--task toy/matrx", "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
    ],
)
def test_bad_options_are_one_line(capfd, monkeypatch, arguments: str, message: str) -> None:
    for module in (train, critics):
        monkeypatch.setattr(module, "race_updates", None)  # they are refused before anything is timed
    small = [] if "--hidden" in arguments else ["--hidden", "8"]
    assert main(["bench", "train", *arguments.split(), *(small if arguments != "--algo" else [])]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"k24: {message}") and err.count("\n") == 1


def test_options_of_another_algorithm_are_refused() -> None:
    with pytest.raises(UsageError, match="algo mappo has its options in a BenchPPO, got a BenchValue: change both"):
        bench_train(train.BenchValue(algo="mappo"))
    with pytest.raises(UsageError, match="algo qmix has its options in a BenchValue, got a BenchTrain: change both"):
        bench_train(BenchTrain())


def test_help_tells_the_options_of_the_algorithm(capfd) -> None:
    for algo, own, others in (("qmix", "--unit-types", "--epochs"), ("mappo", "--epochs", "--batch"), ("matd3", "--critics", "--steps")):
        assert main(["bench", "train", "--algo", algo, "--help"]) == 0
        out = capfd.readouterr().out
        assert own in out and others not in out and f"these are those of {algo}" in " ".join(out.replace("│", " ").split())
