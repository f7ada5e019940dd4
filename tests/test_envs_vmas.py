"""Suites mpe and vmas: VMAS's own numbers, the contract, and what was set right or made fast."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, Observation, TeamEnv, check_env, make_env
from k24.envs.particles import Particles
from k24.errors import RunError, UsageError

vmas = pytest.importorskip("vmas")

ALWAYS = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}


def _random_actions(env: TeamEnv, obs: Observation, chooser: torch.Generator) -> torch.Tensor:
    spec = env.spec
    if spec.continuous:
        return torch.rand(spec.n_agents, env.n_envs, spec.n_actions, generator=chooser) * 2 - 1
    weight = torch.ones(spec.n_agents, env.n_envs, spec.n_actions) if obs.avail is None else obs.avail.float()
    return torch.multinomial(weight.flatten(0, 1), 1, generator=chooser).view(spec.n_agents, env.n_envs)


# --- the contract ---------------------------------------------------------------------------------------------------------------


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
        ("vmas/wind_flocking", {"max_steps": 8}),
        ("vmas/road_traffic", {"max_steps": 5, "n_agents": 3}),
        ("vmas/debug/asym_joint", {"max_steps": 4}),
        ("vmas/debug/circle_trajectory", {"max_steps": 6, "dt_delay": 2}),
        ("vmas/debug/goal", {"max_steps": 6, "dt_delay": 2}),
        ("vmas/debug/het_mass", {"max_steps": 6}),
        ("vmas/debug/line_trajectory", {"max_steps": 6}),
        ("mpe/simple_spread", {"max_steps": 6, "continuous_actions": True}),
        ("mpe/simple_speaker_listener", {"max_steps": 6, "continuous_actions": True}),
        ("vmas/road_traffic", {"max_steps": 5, "n_agents": 3, "continuous_actions": True}),
        ("vmas/debug/het_mass", {"max_steps": 6, "continuous_actions": True}),
    ],
)
def test_vmas_tasks_keep_the_contract(task, options):
    passed = set(check_env(lambda: make_env(task, 3, **options)))
    assert passed >= ALWAYS | {"auto-reset", "other seed, other episodes", "render"}


@pytest.mark.parametrize(
    ("task", "options"), [("vmas/debug/vel_control", {"max_steps": 5}), ("vmas/debug/waterfall", {"max_steps": 2, "n_agents": 2})]
)
def test_tasks_with_one_start_keep_the_contract(task, options):
    assert set(check_env(lambda: make_env(task, 3, **options))) >= ALWAYS | {"last reward", "render"}


def test_football_can_be_played_by_both_teams():
    env = make_env("vmas/football", 2, ai_red_agents=False, n_blue_agents=2, n_red_agents=2)
    assert env.sides == ("good", "good", "adversary", "adversary")


@pytest.mark.parametrize(
    ("task", "sides"),
    [
        ("mpe/simple_tag", ("adversary", "adversary", "adversary", "good")),
        ("mpe/simple_crypto", ("adversary", "good", "good")),
        ("mpe/simple_spread", None),
        ("vmas/football", None),
    ],
)
def test_tasks_with_two_sides_say_who_is_on_which(task, sides):
    assert make_env(task, 2).sides == sides


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_continuous_actions_are_on_or_off(value):
    with pytest.raises(UsageError, match="mpe/simple: continuous_actions must be true or false, got"):
        make_env("mpe/simple", 2, continuous_actions=value)
    with pytest.raises(UsageError, match="'continuous_action': did you mean 'continuous_actions'"):
        make_env("mpe/simple", 2, continuous_action=True)


# --- the same numbers as VMAS ---------------------------------------------------------------------------------------------------


# VMAS draws one goal for all environments there, and ours one for each.
ONE_GOAL_IN_VMAS = ["mpe/simple_adversary", "mpe/simple_push", "mpe/simple_reference", "mpe/simple_speaker_listener"]


def _in_units_of_vmas(env: TeamEnv, raw, actions: torch.Tensor) -> list[torch.Tensor]:
    """A joint action as VMAS's own class takes it."""
    if not env.spec.continuous:
        return list(actions.unsqueeze(-1).clone())
    given = []
    for row, agent in zip(actions, raw.agents, strict=True):
        inputs, words = agent.action_size, 0 if agent.silent else raw.world.dim_c
        start = inputs if agent.movable else 0
        force = row[:, :inputs] * agent.action.u_range_tensor if agent.movable else torch.zeros(env.n_envs, inputs)
        given.append(torch.cat([force, (row[:, start : start + words] + 1) / 2], dim=-1))
    return given


def _assert_same_as_vmas(task: str, options: dict[str, object], continuous: bool, n_envs: int = 16, steps: int = 30) -> TeamEnv:
    """Plays ours and VMAS's own environment class beside each other."""
    ours = make_env(task, n_envs, max_steps=1000, continuous_actions=continuous, **options)
    raw = vmas.make_env(task.split("/")[1], n_envs, continuous_actions=continuous, seed=5, **options)
    obs, raw_obs = ours.reset(5), raw.reset(seed=5)
    if task in ONE_GOAL_IN_VMAS:
        for mine, theirs in zip(ours.scenario.world.agents, raw.agents, strict=True):
            for name in ("goal", "goal_b"):
                if getattr(theirs, name, None) is not None:
                    getattr(mine, name)._which.fill_(raw.world.landmarks.index(getattr(theirs, name)))
        obs = ours._observe()
    chooser = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for mine, theirs in zip(obs.obs, raw_obs, strict=True):
            assert torch.equal(mine[:, : theirs.shape[1]], theirs) and not mine[:, theirs.shape[1] :].any()
        assert torch.equal(obs.state, torch.cat(raw_obs, dim=-1))
        actions = _random_actions(ours, obs, chooser)
        step = ours.step(actions)
        raw_obs, raw_rewards, raw_done, _ = raw.step(_in_units_of_vmas(ours, raw, actions))
        assert torch.equal(step.reward, torch.stack(raw_rewards)) and torch.equal(step.terminated, raw_done)
        obs = step.after
        if step.terminated.any():
            break
    for mine, theirs in zip(step.after.obs, raw_obs, strict=True):
        assert torch.equal(mine[:, : theirs.shape[1]], theirs)
    return ours


@pytest.mark.parametrize("task", ["ball_passage", "ball_trajectory", "debug/asym_joint", "joint_passage", "passage", "wind_flocking"])
def test_every_environment_has_a_draw_of_its_own(task, monkeypatch):
    """In VMAS's scenarios who stands where is one draw for the whole batch."""
    options = {"random_start_angle": True} if task == "debug/asym_joint" else {}
    env = make_env(f"vmas/{task}", 6, **options)
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *sizes, **kwargs: drawn.append(sizes) or real(*sizes, **kwargs))
    env.reset(0)
    assert len(drawn) >= 6


def test_every_environment_has_a_gap_of_its_own():
    env = make_env("vmas/passage", 32)
    env.reset(0)
    walls = [one for one in env.scenario.world.landmarks if one.name.startswith("passage")]
    gaps = [wall.state.pos[:, 0] for wall in walls if not wall.collide]
    assert all(len(gap.unique()) > 1 for gap in gaps) and gaps


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("task", ["mpe/simple_reference", "vmas/balance", "vmas/multi_give_way", "vmas/transport"])
def test_numbers_are_those_of_its_own_environment_class(task, continuous):
    _assert_same_as_vmas(task, {}, continuous, n_envs=4, steps=20)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("mpe/simple_adversary", {}),
        ("mpe/simple_crypto", {}),
        ("mpe/simple_push", {}),
        ("mpe/simple_speaker_listener", {}),
        ("mpe/simple_spread", {}),
        ("mpe/simple_spread", {"n_agents": 5, "obs_agents": False}),
        ("mpe/simple_tag", {}),
        ("mpe/simple_world_comm", {}),
        ("vmas/discovery", {}),
        ("vmas/dispersion", {}),
        ("vmas/flocking", {}),
        ("vmas/navigation", {}),
    ],
)
def test_worlds_of_round_bodies_are_stepped_at_once_to_the_same_numbers(task, options, continuous):
    ours = _assert_same_as_vmas(task, options, continuous)
    assert isinstance(ours._physics, Particles)


@pytest.mark.parametrize("task", ["vmas/balance", "vmas/give_way", "vmas/football", "vmas/debug/het_mass", "vmas/debug/vel_control"])
def test_other_worlds_are_left_to_vmas(task):
    env = make_env(task, 2)
    assert env._physics is env.scenario.world


@pytest.mark.parametrize("task", ONE_GOAL_IN_VMAS)
def test_every_episode_has_a_goal_of_its_own(task):
    env = make_env(task, 64, max_steps=100)
    env.reset(0)
    for agent in env.scenario.world.agents:
        for goal in (one for one in (getattr(agent, "goal", None), getattr(agent, "goal_b", None)) if one is not None):
            landmarks = env.scenario.world.landmarks
            before = goal._which.clone()
            assert before.unique().tolist() == list(range(len(landmarks)))
            at = torch.stack([landmark.state.pos for landmark in landmarks])
            assert torch.equal(goal.pos, torch.stack([at[which, env_index] for env_index, which in enumerate(before.tolist())]))
    drawn = set()
    for _ in range(40):
        env.scenario.env_reset_world_at(3)
        drawn.add(int(goal._which[3]))
        assert torch.equal(goal._which[4:], before[4:]) and torch.equal(goal._which[:3], before[:3])
    assert drawn == set(range(len(landmarks)))


def test_the_speaker_sees_the_colour_of_the_landmark_that_pays():
    env = make_env("mpe/simple_speaker_listener", 32)
    seen = env.reset(0).obs
    colours = torch.stack([landmark.color for landmark in env.scenario.world.landmarks])
    goal = (seen[0, :, :3] - colours[:, None]).abs().sum(-1).argmin(0)
    # Where the listener stands on that landmark, and nowhere else, nobody pays.
    listener, places = env.scenario.world.agents[1], torch.stack([landmark.state.pos for landmark in env.scenario.world.landmarks])
    listener.set_pos(places[goal, torch.arange(32)], batch_index=None)
    assert not env.scenario.reward(env.scenario.world.agents[0]).any()
    listener.set_pos(places[(goal + 1) % 3, torch.arange(32)], batch_index=None)
    assert (env.scenario.reward(env.scenario.world.agents[0]) < 0).all()


def test_in_reference_and_push_colours_tell_the_goal():
    env = make_env("mpe/simple_reference", 32)
    seen = env.reset(0).obs
    colours = torch.stack([landmark.color for landmark in env.scenario.world.landmarks])
    for agent, mine in zip(env.scenario.world.agents, seen, strict=True):
        assert torch.equal(mine[:, 8:11], colours[agent.goal_b._which])
    env = make_env("mpe/simple_push", 32)
    seen = env.reset(0).obs
    # Velocity, offset to the goal, own colour (0.5 brighter where the goal is marked), offsets to both landmarks.
    for row, which in zip(seen[1], env.scenario.world.agents[1].goal._which.tolist(), strict=True):
        assert torch.equal(row[2:4], row[7 + 2 * which : 9 + 2 * which])
        assert row[4:7].tolist() == [0.25, 0.75, 0.25] if which == 0 else row[4:7].tolist() == [0.25, 0.25, 0.75]


# --- actions --------------------------------------------------------------------------------------------------------------------


def test_continuous_actions_are_stretched_to_what_an_agent_can_do():
    env = make_env("mpe/simple_tag", 2, continuous_actions=True)
    assert env.spec.continuous and env.spec.n_actions == 2 and env.reset(0).avail is None
    env.step(torch.tensor([[-1.0, 0.5]]).expand(4, 2, 2).contiguous())
    # Chasers push with 3, the prey with 4.
    assert [agent.action.u.tolist() for agent in env.scenario.world.agents] == [[[-3, 1.5]] * 2] * 3 + [[[-4, 2]] * 2]
    with pytest.raises(RunError, match="actions must be from -1 to 1, got 2 to 2"):
        env.step(torch.full((4, 2, 2), 2.0))


def test_continuous_words_go_from_nothing_to_one():
    env = make_env("mpe/simple_speaker_listener", 2, continuous_actions=True)
    env.reset(0)
    assert env.spec.n_actions == 3
    actions = torch.zeros(2, 2, 3)
    actions[0] = torch.tensor([[-1.0, 0.0, 1.0], [1.0, -1.0, 0.5]])
    # The listener has two inputs, and its third number means nothing.
    assert env.step(actions).current.obs[1, :, -3:].tolist() == [[0, 0.5, 1], [1, 0, 0.75]]


def test_speakers_that_cannot_move_have_only_words():
    env = make_env("mpe/simple_speaker_listener", 2)
    obs = env.reset(0)
    assert env.spec.n_actions == 9 and obs.avail.sum(-1).tolist() == [[3, 3], [9, 9]]
    assert env.spec.obs_dim == 11 and env.spec.state_dim == 3 + 11
    with pytest.raises(RunError, match="agent 0 has actions 0 to 2, got 5 to 5"):
        env.step(torch.full((2, 2), 5))
    # What was said is heard at the next step: the word is the last part of the listener's observation.
    step = env.step(torch.tensor([[0, 2], [0, 0]]))
    assert step.current.obs[1, :, -3:].tolist() == [[1, 0, 0], [0, 0, 1]]


# --- episodes -------------------------------------------------------------------------------------------------------------------


def test_wind_blows_in_full_when_an_episode_begins():
    env = make_env("vmas/wind_flocking", 16, max_steps=3)
    obs, agent, chooser = env.reset(0), env.scenario.big_agent, torch.Generator().manual_seed(0)
    for t in range(7):
        obs = env.step(_random_actions(env, obs, chooser)).current
        assert torch.equal(agent.gravity, env.scenario.wind) == (t % 3 == 2)
    wind, covered = env.scenario.wind, agent.gravity.clone()
    row = int((covered != wind).any(dim=1).nonzero()[0])
    env.scenario.env_reset_world_at(row)
    covered[row] = wind[row]
    assert torch.equal(agent.gravity, covered) and not torch.equal(covered, wind)


def test_cars_are_not_fined_for_a_new_episode_beside_them():
    one, other = (make_env("vmas/road_traffic", 3, n_agents=3, is_add_noise=False) for _ in range(2))
    assert torch.equal(one.reset(1).obs, other.reset(1).obs)
    chooser = torch.Generator().manual_seed(0)
    for t in range(4):
        # They stand, and turn their wheels.
        actions = torch.randint(3, (3, 3), generator=chooser)
        mine, theirs = one.step(actions), other.step(actions)
        assert not (mine.terminated | theirs.terminated)[[0, 2]].any()
        assert torch.equal(mine.reward[:, [0, 2]], theirs.reward[:, [0, 2]]), t
        if t == 1:
            # As where environment 1 ended: it begins anew, and all are looked at once more.
            with other._random:
                other.scenario.env_reset_world_at(1)
                other._observe()
    assert not torch.equal(mine.reward[:, 1], theirs.reward[:, 1])


def test_masses_are_drawn_for_each_episode():
    env = make_env("vmas/debug/het_mass", 2, max_steps=1)
    masses = []
    for seed in (0, 0, 1):
        env.reset(seed)
        masses.append([agent.mass for agent in env.scenario.world.agents])
        env.step(torch.zeros(2, 2, dtype=torch.int64))
        masses.append([agent.mass for agent in env.scenario.world.agents])
    assert masses[:2] == masses[2:4] and masses[0] != masses[1] and masses[0] != masses[4]


def test_vmas_resets_only_what_ended_and_tells_an_end_from_a_cut():
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
    env = make_env("mpe/simple_speaker_listener", 2)
    env.reset(0)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with pytest.raises(RunError):
        env.step(torch.full((2, 2), 8))
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all() and random.random() == expected[2]


def test_pictures_show_agents_where_they_are():
    env = make_env("vmas/blind_spread", 2, n_agents=1, n_colours=1)
    env.reset(0)
    agent, landmark = env.scenario.world.agents[0], env.scenario.world.landmarks[0]
    agent.set_pos(torch.tensor([[0.6, 0.6], [0.0, 0.0]]), batch_index=None)
    landmark.set_pos(torch.tensor([[-0.6, -0.6], [0.0, 0.0]]), batch_index=None)
    picture = env.render()
    assert picture.shape == (320, 320, 3) and picture.dtype == torch.uint8
    # The view spans 1.2 each way; y points up, rows point down.
    column, row = int((1.2 + 0.6) / 2.4 * 320), int((1.2 - 0.6) / 2.4 * 320)
    # The agent in its colour, its place in a pale one: three parts of the colour and seven of white.
    assert picture[row, column].tolist() == [214, 94, 0] and picture[320 - row, 320 - column].tolist() == [243, 207, 178]
    assert picture[row, 320 - column].tolist() == picture[160, 160].tolist() == [255, 255, 255]


# --- blind particle spread ------------------------------------------------------------------------------------------------------


def test_blind_spread_pays_the_distance_to_the_hidden_colour():
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
