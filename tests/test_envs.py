"""Environments: the contract, the simulators behind it, and games whose outcome is known."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from k24.envs import SUITES, check_env, check_options, is_listed, list_tasks, make_env
from k24.envs import toy as toy_module
from k24.errors import RunError, UsageError

ALWAYS = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}


# --- names ---------------------------------------------------------------------------------------------------------------------


def test_every_suite_lists_tasks_and_says_how_to_get_them():
    rows = list_tasks()
    assert {row.suite for row in rows} == set(SUITES)
    assert len({row.task for row in rows}) == len(rows)
    for row in rows:
        assert row.task.startswith(f"{row.suite}/")
        assert row.about
        if row.available:
            assert row.how == f"k24 train {row.task}"
        elif SUITES[row.suite].extra is not None:
            assert row.how == f"pip install 'k24[{SUITES[row.suite].extra}]'"
        else:
            assert "https://github.com/oxwhirl/" in row.how or "SC2PATH" in row.how


def test_every_extra_of_a_suite_is_one_of_the_package():
    """And `envs` has them all."""
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {suite.extra for suite in SUITES.values() if suite.extra is not None}
    assert named <= set(extras)
    assert set(re.search(r"\[(.*)\]", extras["envs"][0])[1].split(",")) == named


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "no_such_module:make",
            {},
            "no_such_module:make: the module 'no_such_module' does not import (ModuleNotFoundError: No module named 'no_such_module')",
        ),
        ("my env:make", {}, "'my env:make' is no import path: expected package.module:function, for example my_package.my_env:make"),
        ("lbf/8x8-2p-2f-cop", {}, "unknown task 'lbf/8x8-2p-2f-cop': did you mean 'lbf/8x8-2p-2f-coop'?"),
        ("rware/tiny-2agg", {}, "unknown task 'rware/tiny-2agg': did you mean 'rware/tiny-2ag'?"),
        ("smax/4m", {}, "unknown task 'smax/4m': did you mean 'smax/8m'?"),
        ("smacv2/teran_5_vs_5", {}, "unknown task 'smacv2/teran_5_vs_5': did you mean 'smacv2/terran_5_vs_5'?"),
        ("mamujoco/Ant-4x3", {}, "unknown task 'mamujoco/Ant-4x3': did you mean 'mamujoco/Ant-4x2'?"),
        ("toy/memory", {"workers": -1}, "toy/memory: workers must be a whole number of at least 0, got -1"),
        ("simple_spread", {}, "unknown task 'simple_spread': did you mean 'mpe/simple_spread'?"),
        ("mpee/simple_spread", {}, "unknown environment suite 'mpee': did you mean 'mpe'?"),
        ("toy/matrx", {}, "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("toy/memory", {"n_cue": 3}, "unknown option of toy/memory 'n_cue': did you mean 'n_cues'?"),
        ("toy/memory", {"n_cues": 1}, "toy/memory: n_cues must be at least 2, got 1"),
        ("toy/memory", {"max_steps": 0}, "toy/memory: max_steps must be a whole number of at least 1, got 0"),
        ("toy/memory", {"max_steps": 10**20}, "toy/memory: max_steps must be less than 2**31, got 100000000000000000000"),
        ("toy/memory", {"max_steps": True}, "toy/memory: max_steps must be a whole number of at least 1, got True"),
        ("toy/memory", {"task": 3}, "unknown option of toy/memory 'task': it is set for every task alike, outside the task's options"),
        ("toy/matrix", {"n_envs": 0}, "toy/matrix: n_envs must be a whole number of at least 1, got 0"),
        ("toy/matrix", {"device": "gpu"}, "toy/matrix: unknown device 'gpu': expected cpu, cuda or cuda:<index>"),
        ("toy/reach", {"n_agents": 1}, "toy/reach: n_agents must be at least 2, got 1"),
        ("toy/reach", {"max_steps": 1}, "toy/reach: max_steps must be at least 2, got 1"),
        ("toy/specialisation", {"n_agents": "3"}, "toy/specialisation: n_agents must be a whole number, got '3'"),
    ],
)
def test_wrong_names_and_options(task, options, message):
    with pytest.raises(UsageError) as caught:
        make_env(task, **{"n_envs": 2, **options})
    assert str(caught.value) == message


@pytest.mark.parametrize(("task", "option"), [("mpe/simple_spread", "n_agent"), ("vmas/blind_spread", "n_colour")])
def test_misspelt_options_of_a_simulator_are_errors(task, option):
    pytest.importorskip(SUITES[task.split("/")[0]].package)
    with pytest.raises(UsageError, match=f"unknown option of {task} '{option}': did you mean '{option[:5]}"):
        make_env(task, 2, **{option: 3})


@pytest.mark.parametrize("task", ["mpe/simple_spread", "vmas/navigation"])
def test_options_that_a_simulator_cannot_take_are_usage_errors(task):
    pytest.importorskip("vmas")
    with pytest.raises(UsageError, match=f"{task} can't be made with n_agents=0: "):
        make_env(task, 2, n_agents=0)


@pytest.mark.parametrize("name", ["task", "n_envs", "device", "workers"])
def test_options_are_not_named_like_arguments_of_make_env(name):
    check_options("toy/memory", {"n_cues": 2})
    with pytest.raises(UsageError, match=f"unknown option of toy/memory '{name}': it is set for every task alike"):
        check_options("toy/memory", {name: 3})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("odd\nsize"), "odd size"),
        (ZeroDivisionError("no step"), "no step"),
        (AttributeError("no map"), "no map"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_a_constructor_raises_for_options_is_one_line(monkeypatch, error, reason):
    def make(*args, **kwargs):
        raise error

    monkeypatch.setattr(toy_module, "make", make)
    with pytest.raises(UsageError) as caught:
        make_env("toy/memory", 2, n_cues=3)
    assert str(caught.value) == f"toy/memory can't be made with n_cues=3: {reason}"
    with pytest.raises(type(error)):
        make_env("toy/memory", 2)


@pytest.mark.parametrize(
    ("task", "listed"),
    [
        ("toy/matrix", True),
        ("pettingzoo/mpe2.simple_tag_v3", True),
        ("lbf/9x9-3p-2f", True),
        ("mamujoco/ManySegmentAnt-3x2", True),
        ("pettingzoo/os.path", False),
        ("pettingzoo/os:system", False),
        ("my_env:make", False),
        ("lbf/os.path", False),
        ("toy/my_env:make", False),
        ("matrix", False),
        ("nowhere/matrix", False),
    ],
)
def test_only_names_that_import_nothing_of_their_own_are_listed(task, listed):
    assert is_listed(task) is listed


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(SUITES, "mpe", SUITES["mpe"]._replace(package="no_such_package"))
    with pytest.raises(UsageError) as caught:
        make_env("mpe/simple_spread", 2)
    assert str(caught.value) == "mpe/simple_spread needs the package 'no_such_package', which is not installed: pip install 'k24[mpe]'"
    rows = {row.task: row for row in list_tasks()}
    assert not rows["mpe/simple_spread"].available
    assert rows["mpe/simple_spread"].how == "pip install 'k24[mpe]'"


def test_importing_k24_envs_and_listing_tasks_loads_no_simulator():
    code = (
        "import json, sys, k24.envs as envs; listed = len(envs.list_tasks()); envs.make_env('toy/matrix', 2);"
        "print(json.dumps([listed, sorted(set(%r) & set(sys.modules))]))"
    )
    simulators = ["vmas", "mpe2", "pettingzoo", "gymnasium", "gym", "pygame", "pyglet", "jax", "jaxmarl", "mujoco", "lbforaging", "rware"]
    out = subprocess.run([sys.executable, "-c", code % simulators], capture_output=True, text=True, check=True).stdout
    listed, loaded = json.loads(out)
    assert listed > 100
    assert loaded == []


# --- toy games ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        *((task, {}) for task in toy_module.TASKS),
        ("toy/specialisation", {"n_agents": 5}),
        ("toy/memory", {"max_steps": 9}),
        ("toy/reach", {"n_agents": 3, "n_dims": 2, "max_steps": 2}),
    ],
)
def test_toy_games_keep_the_contract(task, options):
    assert set(check_env(lambda: make_env(task, 5, **options))) >= ALWAYS


def test_matrix_pays_its_table_and_every_better_action_is_better_whatever_the_other_does():
    env = make_env("toy/matrix", 9)
    env.reset(0)
    pairs = list(itertools.product(range(3), repeat=2))
    step = env.step(torch.tensor(pairs).T)
    table = torch.tensor(env.payoff)
    torch.testing.assert_close(step.reward.sum(0), table.flatten())
    assert step.terminated.all() and not step.truncated.any()
    assert pairs[int(step.reward.sum(0).argmax())] == (1, 1) and float(table.max()) == env.optimal_return
    assert (table[1] > table[0]).all() and (table[0] > table[2]).all() and torch.equal(table, table.T)


def test_specialisation_pays_for_distinct_actions():
    env = make_env("toy/specialisation", 4, n_agents=3)
    env.reset(0)
    step = env.step(torch.tensor([[0, 0, 0, 2], [0, 1, 1, 0], [0, 0, 2, 1]]))
    torch.testing.assert_close(step.reward.sum(0), torch.tensor([1 / 3, 2 / 3, 1.0, env.optimal_return]))
    torch.testing.assert_close(step.reward[0], step.reward[2])


def test_memory_pays_for_the_cue_of_the_first_step_at_the_last():
    env = make_env("toy/memory", 64, n_agents=3, n_cues=4, max_steps=5)
    obs = env.reset(3)
    for _ in range(2):
        cue = obs.obs[..., :4].argmax(-1)
        assert (obs.obs.sum(-1) == 1).all() and len(cue.unique()) == 4
        for t in range(5):
            step = env.step(cue)
            assert bool(step.terminated.all()) == (t == 4)
            torch.testing.assert_close(step.reward.sum(0), torch.full((64,), env.optimal_return if t == 4 else 0.0))
            if t < 4:
                expected = torch.tensor([0.0, 0, 0, 0, 1 if t == 3 else 0]).expand(3, 64, 5)
                torch.testing.assert_close(step.after.obs, expected)
        obs = step.current
    wrong = (obs.obs[..., :4].argmax(-1) + 1) % 4
    for _ in range(5):
        step = env.step(wrong)
    assert step.reward.sum() == 0


def test_reach_pays_at_the_last_step_for_how_near_each_agent_is_to_its_own_goal():
    env = make_env("toy/reach", 6)
    obs = env.reset(0)
    assert env.spec.continuous and obs.avail is None
    # Columns: right; right in another order of steps; still; both to one side; the wrong way round; beyond the edge and into it.
    plays = torch.tensor(
        [
            [[-1, -1, 0, 1, 1, -1], [-1, 0, 0, 1, 1, -1], [0, -1, 0, 0, 0, -1]],  # the first agent's goal is at -0.8, a step is 0.4
            [[2 / 3, 1, 0, 1, -1, 1], [2 / 3, 1, 0, 1, -1, 0.5], [2 / 3, 0, 0, 0, 0, 0]],
        ]
    )
    # d² over V = 0.64: 0; 0; 1 each; 1.6² = 2.56 and 0; 2.56 each; (1 - 0.8)² = 0.04 and (0.6 - 0.8)² = 0.04.
    returns = torch.tensor([1, 1, 0, 1 - 2, 1 - 4, 1 - 0.0625])
    for _ in range(2):
        assert (obs.obs == 0).all()
        for t in range(3):
            step = env.step(plays[:, t, :, None])
            assert bool(step.terminated.all()) == (t == 2) and not step.truncated.any()
            torch.testing.assert_close(step.after.obs[..., 1], torch.full((2, 6), (t + 1) / 3))
            torch.testing.assert_close(step.after.state, step.after.obs.transpose(0, 1).flatten(1))
            torch.testing.assert_close(step.reward.sum(0), returns if t == 2 else torch.zeros(6))
        places = torch.tensor([[-0.8, -0.8, 0, 0.8, 0.8, -1], [0.8, 0.8, 0, 0.8, -0.8, 0.6]])
        torch.testing.assert_close(step.after.obs[..., 0], places)
        obs = step.current
    assert float(returns.max()) == env.optimal_return
    torch.testing.assert_close(step.reward[:, 3], torch.tensor([-1.5, 0.5]))  # each is paid for what it did itself


def test_agents_that_reach_alike_earn_nothing():
    """Neither a fixed place, whichever, nor one drawn at random from any distribution that is the same for all."""
    env = make_env("toy/reach", 201, n_agents=5, n_dims=2, max_steps=2)
    env.reset(0)
    drift = torch.linspace(-1, 1, 201)[None, :, None].expand(5, 201, 2)
    env.step(drift)
    alike = env.step(torch.zeros(5, 201, 2)).reward.sum(0)
    assert float(alike.max()) == pytest.approx(0, abs=1e-6) and int(alike.argmax()) == 100, "by staying at 0"
    env = make_env("toy/reach", 4)
    env.reset(0)
    # Each of two agents tosses a coin for a place of ±0.4, and so every pair of places is as likely.
    tosses = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]])[..., None]
    for push in (1.0, 0.0, 0.0):
        step = env.step(push * tosses)
    assert float(step.reward.sum(0).mean()) == pytest.approx(-(0.4**2) / 0.64)
    assert float(step.reward.sum(0)[1]) == pytest.approx(1 - 0.25), "one pair is lucky: 0.4 from the goals, 0.16/0.64"


def test_reach_in_two_dimensions_wants_both():
    env = make_env("toy/reach", 3, n_agents=3, n_dims=2)
    assert env.spec.n_actions == 2 and env.spec.obs_dim == 3 and env.spec.state_dim == 9
    env.reset(0)
    towards = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])  # the middle one's goal is where it starts
    actions = torch.stack([towards, -towards, towards * torch.tensor([1.0, 0.0])], 1) * (2 / 3)
    for _ in range(3):
        step = env.step(actions)
    # V is 0.64 · 2/3. Outer agents: 0; 1.6² = 2.56, over V 6; one dimension of two, 0.64/2, over V 0.75.
    torch.testing.assert_close(step.reward.sum(0), torch.tensor([1, 1 - 2 / 3 * 6, 1 - 2 / 3 * 0.75]))
    torch.testing.assert_close(step.reward[1], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("actions", [torch.zeros(2, 3), torch.zeros(2, 3, 1, dtype=torch.int64), torch.full((2, 3, 1), 1.01)])
def test_a_wrong_continuous_joint_action_is_an_error(actions):
    env = make_env("toy/reach", 3)
    env.reset(0)
    with pytest.raises(RunError, match="step: actions must be"):
        env.step(actions)


@pytest.mark.parametrize(
    "actions", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64), torch.full((2, 3), 3), torch.full((2, 3), -1)]
)
def test_a_wrong_joint_action_is_an_error(actions):
    env = make_env("toy/matrix", 3)
    env.reset(0)
    with pytest.raises(RunError, match="step: actions must be"):
        env.step(actions)
