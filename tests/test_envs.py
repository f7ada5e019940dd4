"""Environments: the contract, the simulators behind it, and games whose outcome is known."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from k24.envs import SUITES, EnvSpec, Observation, TeamEnv, check_env, list_tasks, make_env
from k24.envs import toy as toy_module
from k24.errors import RunError, UsageError

ALWAYS = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}


def _random_actions(env: TeamEnv, obs: Observation, chooser: torch.Generator) -> torch.Tensor:
    spec = env.spec
    weight = torch.ones(spec.n_agents, env.n_envs, spec.n_actions) if obs.avail is None else obs.avail.float()
    return torch.multinomial(weight.flatten(0, 1), 1, generator=chooser).view(spec.n_agents, env.n_envs)


# --- names ---------------------------------------------------------------------------------------------------------------------


def test_every_suite_lists_tasks_and_says_how_to_get_them():
    rows = list_tasks()
    assert {row.suite for row in rows} == set(SUITES)
    assert len({row.task for row in rows}) == len(rows)
    for row in rows:
        assert row.task.startswith(f"{row.suite}/")
        assert row.how == f"k24 train {row.task}" if row.available else row.how.startswith("pip install 'k24[")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("simple_spread", {}, "unknown task 'simple_spread': did you mean 'mpe/simple_spread'?"),
        ("mpee/simple_spread", {}, "unknown environment suite 'mpee': did you mean 'mpe'?"),
        ("toy/matrx", {}, "unknown task 'toy/matrx': did you mean 'toy/matrix'?"),
        ("toy/memory", {"n_cue": 3}, "unknown option of toy/memory 'n_cue': did you mean 'n_cues'?"),
        ("toy/memory", {"n_cues": 1}, "toy/memory: n_cues must be at least 2, got 1"),
        ("toy/memory", {"max_steps": 0}, "toy/memory: max_steps must be a whole number of at least 1, got 0"),
        ("toy/matrix", {"n_envs": 0}, "toy/matrix: n_envs must be a whole number of at least 1, got 0"),
        ("toy/matrix", {"device": "gpu"}, "toy/matrix: unknown device 'gpu': expected cpu, cuda or cuda:<index>"),
        ("toy/specialisation", {"n_agents": "3"}, "toy/specialisation: n_agents must be a whole number, got '3'"),
    ],
)
def test_wrong_names_and_options(task, options, message):
    with pytest.raises(UsageError) as caught:
        make_env(task, **{"n_envs": 2, **options})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("task", "option"), [("mpe/simple_spread", "n_agent"), ("vmas/blind_spread", "n_colour"), ("mpe2/simple_spread", "local_rate")]
)
def test_misspelt_options_of_a_simulator_are_errors(task, option):
    pytest.importorskip(SUITES[task.split("/")[0]].package)
    with pytest.raises(UsageError, match=f"unknown option of {task} '{option}': did you mean '{option[:5]}"):
        make_env(task, 2, **{option: 3})


@pytest.mark.parametrize("task", ["mpe/simple_spread", "vmas/navigation"])
def test_options_that_a_simulator_cannot_take_are_usage_errors(task):
    pytest.importorskip("vmas")
    with pytest.raises(UsageError, match=f"{task} can't be made with n_agents=0: "):
        make_env(task, 2, n_agents=0)


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
        "print(json.dumps([listed, sorted({'vmas', 'mpe2', 'pettingzoo', 'gymnasium', 'gym', 'pygame', 'pyglet'} & set(sys.modules))]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listed, loaded = json.loads(out)
    assert listed > 30
    assert loaded == []


# --- toy games ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [*((task, {}) for task in toy_module.TASKS), ("toy/specialisation", {"n_agents": 5}), ("toy/memory", {"max_steps": 9})],
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


@pytest.mark.parametrize(
    "actions", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64), torch.full((2, 3), 3), torch.full((2, 3), -1)]
)
def test_a_wrong_joint_action_is_an_error(actions):
    env = make_env("toy/matrix", 3)
    env.reset(0)
    with pytest.raises(RunError, match="step: actions must be"):
        env.step(actions)


# --- VMAS -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("mpe/simple_spread", {}),
        ("mpe/simple_spread", {"n_agents": 5, "max_steps": 7}),
        ("mpe/simple_speaker_listener", {}),
        ("mpe/simple_crypto", {"max_steps": 6}),
        ("mpe/simple_adversary", {"max_steps": 6}),
        ("vmas/blind_spread", {}),
        ("vmas/navigation", {"max_steps": 12, "n_agents": 3}),
        ("vmas/balance", {"max_steps": 40}),
        ("vmas/give_way", {"max_steps": 6}),
        ("vmas/dispersion", {"max_steps": 8}),
    ],
)
def test_vmas_tasks_keep_the_contract(task, options):
    pytest.importorskip("vmas")
    passed = set(check_env(lambda: make_env(task, 3, **options)))
    assert passed >= ALWAYS | {"auto-reset", "other seed, other episodes", "render"}


@pytest.mark.parametrize("task", ["mpe/simple_spread", "mpe/simple_reference", "mpe/simple_world_comm", "vmas/navigation", "vmas/balance"])
def test_vmas_numbers_are_those_of_its_own_environment_class(task):
    vmas = pytest.importorskip("vmas")
    n_envs, limit = 4, 25
    ours = make_env(task, n_envs, max_steps=limit)
    raw = vmas.make_env(task.split("/")[1], n_envs, continuous_actions=False, seed=5)
    obs, raw_obs = ours.reset(5), raw.reset(seed=5)
    chooser = torch.Generator().manual_seed(0)
    for _ in range(limit):
        for mine, theirs in zip(obs.obs, raw_obs, strict=True):
            assert torch.equal(mine[:, : theirs.shape[1]], theirs) and not mine[:, theirs.shape[1] :].any()
        assert torch.equal(obs.state, torch.cat(raw_obs, dim=-1))
        actions = _random_actions(ours, obs, chooser)
        step = ours.step(actions)
        raw_obs, raw_rewards, raw_done, _ = raw.step(list(actions.unsqueeze(-1).clone()))
        assert torch.equal(step.reward, torch.stack(raw_rewards)) and torch.equal(step.terminated, raw_done)
        if (step.terminated | step.truncated).any():
            break
        obs = step.current
    for mine, theirs in zip(step.after.obs, raw_obs, strict=True):
        assert torch.equal(mine[:, : theirs.shape[1]], theirs)


def test_speakers_that_cannot_move_have_only_words():
    pytest.importorskip("vmas")
    env = make_env("mpe/simple_speaker_listener", 2)
    obs = env.reset(0)
    assert env.spec.n_actions == 9 and obs.avail.sum(-1).tolist() == [[3, 3], [9, 9]]
    assert env.spec.obs_dim == 11 and env.spec.state_dim == 3 + 11
    with pytest.raises(RunError, match="agent 0 has actions 0 to 2, got 5 to 5"):
        env.step(torch.full((2, 2), 5))
    # What was said is heard at the next step: the word is the last part of the listener's observation.
    step = env.step(torch.tensor([[0, 2], [0, 0]]))
    assert step.current.obs[1, :, -3:].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_vmas_resets_only_what_ended_and_tells_an_end_from_a_cut():
    pytest.importorskip("vmas")
    env = make_env("vmas/balance", 16, max_steps=60)
    obs = env.reset(1)
    chooser = torch.Generator().manual_seed(1)
    clock = torch.zeros(16, dtype=torch.int64)
    terminated = truncated = 0
    for _ in range(150):
        step = env.step(_random_actions(env, obs, chooser))
        clock += 1
        assert torch.equal(step.truncated, (clock == 60) & ~step.terminated)
        terminated, truncated = terminated + int(step.terminated.sum()), truncated + int(step.truncated.sum())
        clock[step.terminated | step.truncated] = 0
        obs = step.current
    assert terminated > 0 and truncated > 0


def test_global_generators_survive_an_error_inside_vmas():
    pytest.importorskip("vmas")
    env = make_env("mpe/simple_speaker_listener", 2)
    env.reset(0)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with pytest.raises(RunError):
        env.step(torch.full((2, 2), 8))
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all() and random.random() == expected[2]


def test_pictures_show_agents_where_they_are():
    pytest.importorskip("vmas")
    env = make_env("vmas/blind_spread", 2, n_agents=1, n_colours=1)
    env.reset(0)
    agent, landmark = env.scenario.world.agents[0], env.scenario.world.landmarks[0]
    agent.set_pos(torch.tensor([[0.6, 0.6], [0.0, 0.0]]), batch_index=None)
    landmark.set_pos(torch.tensor([[-0.6, -0.6], [0.0, 0.0]]), batch_index=None)
    picture = env.render()
    assert picture.shape == (320, 320, 3) and picture.dtype == torch.uint8
    # The view spans 1.2 each way; y points up, rows point down.
    column, row = int((1.2 + 0.6) / 2.4 * 320), int((1.2 - 0.6) / 2.4 * 320)
    assert picture[row, column].tolist() == picture[320 - row, 320 - column].tolist() == [214, 38, 40]
    assert picture[row, 320 - column].tolist() == picture[160, 160].tolist() == [255, 255, 255]


# --- blind particle spread ------------------------------------------------------------------------------------------------------


def test_blind_spread_pays_the_distance_to_the_hidden_colour():
    pytest.importorskip("vmas")
    env = make_env("vmas/blind_spread", 2, n_agents=4, n_colours=2)
    env.reset(0)
    world, colours = env.scenario.world, env.scenario.colours
    for agent in world.agents:
        agent.set_pos(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), batch_index=None)
    world.landmarks[0].set_pos(torch.tensor([[0.3, 0.4], [1.0, 0.5]]), batch_index=None)
    world.landmarks[1].set_pos(torch.tensor([[-0.6, 0.8], [0.4, -0.8]]), batch_index=None)
    # Action 0 is no force, and nobody moves at the start; all sit on each other and none is pushed away.
    step = env.step(torch.zeros(4, 2, dtype=torch.int64))
    due = torch.tensor([[-0.5, -0.5], [-1.0, -1.0]])
    torch.testing.assert_close(step.reward, due[colours])
    expected = torch.tensor([[0, 0, 0, 0, 0.3, 0.4, -0.6, 0.8], [1, 0, 0, 0, 0, 0.5, -0.6, -0.8]])
    torch.testing.assert_close(step.after.obs, expected.expand(4, 2, 8))


def test_blind_spread_colours_are_balanced_fixed_and_unseen():
    pytest.importorskip("vmas")
    env, other = make_env("vmas/blind_spread", 2), make_env("vmas/blind_spread", 2, colour_seed=1)
    assert sorted(env.scenario.colours) == [0, 0, 1, 1, 2, 2, 3, 3] == sorted(other.scenario.colours)
    assert env.scenario.colours != other.scenario.colours
    before = list(env.scenario.colours)
    assert torch.equal(env.reset(7).obs, other.reset(7).obs)
    assert env.scenario.colours == before and env.spec == EnvSpec(8, 12, 96, 9, 25)
    with pytest.raises(UsageError, match=r"n_colours must be from 1 to n_agents \(=8\), got 9"):
        make_env("vmas/blind_spread", 2, n_colours=9)


def test_blind_spread_is_worth_knowing_the_colours():
    """At random a team of eight gets about -200 in 25 steps; one that goes straight to its landmarks about -125."""
    pytest.importorskip("vmas")
    env = make_env("vmas/blind_spread", 64)
    colours = env.scenario.colours

    def go(obs: torch.Tensor) -> torch.Tensor:
        offset = torch.stack([obs[i, :, 4 + 2 * c : 6 + 2 * c] for i, c in enumerate(colours)])
        want = 3 * offset - 0.8 * obs[..., 2:4]
        level = torch.where(want > 0.15, 2, torch.where(want < -0.15, 1, 0))
        return 3 * level[..., 0] + level[..., 1]

    chooser, returns = torch.Generator().manual_seed(0), {}
    for name in ("random", "straight"):
        obs, total = env.reset(0), 0.0
        for _ in range(25):
            step = env.step(go(obs.obs) if name == "straight" else _random_actions(env, obs, chooser))
            obs, total = step.current, total + float(step.reward.sum(0).mean())
        returns[name] = total
    assert -220 < returns["random"] < -190 and -140 < returns["straight"] < -110


# --- MPE2 and PettingZoo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mpe2/simple_spread", "mpe2/simple_speaker_listener", "mpe2/simple_tag"])
def test_mpe2_tasks_keep_the_contract(task):
    pytest.importorskip("mpe2")
    assert set(check_env(lambda: make_env(task, 2, max_steps=8))) >= ALWAYS | {"auto-reset", "other seed, other episodes", "render"}


@pytest.mark.parametrize("task", ["simple_spread_v3", "simple_speaker_listener_v4"])
def test_mpe2_rewards_are_the_raw_ones_to_the_last_and_the_clock_is_a_cut(task):
    pytest.importorskip("mpe2")
    import importlib

    from k24.envs.mpe2 import env_seeds

    n_envs, limit = 2, 25
    env = make_env(f"mpe2/{task.rpartition('_')[0]}", n_envs)
    raws = [importlib.import_module(f"mpe2.{task}").parallel_env(max_cycles=limit) for _ in range(n_envs)]
    names = raws[0].possible_agents
    obs = env.reset(11)
    for raw, seed in zip(raws, env_seeds(11, n_envs), strict=True):
        raw.reset(seed=seed)
    chooser = torch.Generator().manual_seed(0)
    for episode, t in itertools.product(range(2), range(limit)):
        actions = _random_actions(env, obs, chooser)
        step = env.step(actions)
        for e, raw in enumerate(raws):
            seen, rewards, _, _, _ = raw.step({name: int(actions[a, e]) for a, name in enumerate(names)})
            assert step.reward[:, e].tolist() == [float(np.float32(rewards[name])) for name in names], (episode, t)
            for a, name in enumerate(names):
                assert np.array_equal(step.after.obs[a, e, : len(seen[name])].numpy(), seen[name])
            if t == limit - 1:
                assert not raw.agents
                first, _ = raw.reset()
                assert np.array_equal(step.current.state[e].numpy(), np.concatenate([first[name] for name in names]))
        assert step.truncated.all() if t == limit - 1 else not step.truncated.any()
        assert not step.terminated.any()
        obs = step.current


class _Leavers:
    """Agent "short" leaves after 2 steps; the other goes on to step 4, ended of itself in odd copies and cut in even ones."""

    possible_agents = ("short", "long")

    def __init__(self, copy: int) -> None:
        self.copy, self.closed = copy, 0

    def action_space(self, name):
        import gymnasium

        return gymnasium.spaces.Discrete(2, start=5) if name == "short" else gymnasium.spaces.Discrete(3)

    def observation_space(self, name):
        import gymnasium

        return gymnasium.spaces.Box(-1, 9, (1 if name == "short" else 2,))

    def reset(self, seed=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self._see(), {}

    def step(self, actions):
        assert actions == {name: 5 if name == "short" else 0 for name in self.agents}
        self.t += 1
        present = list(self.agents)
        over = {name: self.t == (2 if name == "short" else 4) for name in present}
        cut = {name: over[name] and self.copy % 2 == 0 and name == "long" for name in present}
        seen = self._see()
        self.agents = [name for name in present if not over[name]]
        return seen, dict.fromkeys(present, 1.0 + self.t), {name: over[name] and not cut[name] for name in present}, cut, {}

    def _see(self):
        return {name: np.full(1 if name == "short" else 2, self.t + 1.0) for name in self.agents}

    def close(self):
        self.closed += 1


def test_agents_that_vanish_see_zeros_earn_nothing_and_can_only_wait():
    pytest.importorskip("gymnasium")
    from k24.envs.mpe2 import ParallelEnv

    copies = []
    env = ParallelEnv(lambda i: copies.append(_Leavers(i)) or copies[-1], 2, episode_limit=4)
    assert env.spec == EnvSpec(n_agents=2, obs_dim=2, state_dim=3, n_actions=3, episode_limit=4)
    obs = env.reset(0)
    assert obs.obs[:, 0].tolist() == [[1, 0], [1, 1]] and obs.avail[:, 0].tolist() == [[True, True, False], [True, True, True]]
    rewards = []
    for t in range(4):
        step = env.step(torch.zeros(2, 2, dtype=torch.int64))
        rewards.append(step.reward[:, 0].tolist())
        if t == 1:
            assert step.after.obs[0, 0].tolist() == [3, 0] and not step.terminated.any()
        if t == 2:
            assert step.current.obs[:, 0].tolist() == [[0, 0], [4, 4]] and step.current.state[0].tolist() == [0, 4, 4]
            assert step.current.avail[0].tolist() == [[True, False, False]] * 2
    assert rewards == [[2, 2], [3, 3], [0, 4], [0, 5]]
    assert step.truncated.tolist() == [True, False] and step.terminated.tolist() == [False, True]
    assert step.after.obs[1, 0].tolist() == [5, 5] and step.current.obs[:, 0].tolist() == [[1, 0], [1, 1]]
    env.close()
    env.close()
    assert [one.closed for one in copies] == [1, 1]


def test_closing_one_mpe2_environment_leaves_others_drawable():
    pytest.importorskip("mpe2")
    one, other = make_env("mpe2/simple_reference", 1), make_env("mpe2/simple_reference", 1)
    one.reset(0)
    other.close()
    assert one.render().shape == (700, 700, 3)
