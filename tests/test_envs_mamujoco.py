"""MuJoCo's bodies shared out among agents."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, check_env, make_env
from k24.envs import mamujoco as mamujoco_module
from k24.envs.mamujoco import make_one
from k24.errors import UsageError

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium_robotics")

# gymnasium's viewer complains as it goes, on machines where it found no OpenGL.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*OffScreenViewer:pytest.PytestUnraisableExceptionWarning")

CONTRACT = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}


def random_actions(env, chooser):
    return chooser.uniform(-1, 1, (env.spec.n_agents, env.spec.n_actions)).astype(np.float32)


@pytest.mark.parametrize(
    "task", ["Ant-4x2", "HalfCheetah-2x3", "Humanoid-17x1", "Swimmer-10x2", "Walker2d-2x3", "Hopper-3x1", "Reacher-2x1"]
)
def test_tasks_keep_the_contract(task):
    passed = set(check_env(lambda: make_env(f"mamujoco/{task}", 2, workers=0, max_steps=16)))
    assert passed >= CONTRACT | {"auto-reset", "other seed, other episodes"}


@pytest.mark.parametrize("task", [*mamujoco_module.TASKS, "mamujoco/Swimmer-3x1", "mamujoco/ManySegmentSwimmer-1x4"])
def test_every_partition_moves_every_joint_once(task):
    assert mamujoco_module.accepts(task)
    env = make_one(task)
    env.reset(0)
    raw = env.team.env
    body = raw.single_agent_env
    sizes = [raw.action_space(name).shape[0] for name in raw.possible_agents]
    moved = []
    for agent, joint in itertools.product(range(env.spec.n_agents), range(env.spec.n_actions)):
        actions = np.zeros((env.spec.n_agents, env.spec.n_actions), dtype=np.float32)
        actions[agent, joint] = 0.5
        outcome = env.step(actions)
        driven = np.flatnonzero(body.data.ctrl)
        # Half of the way from the middle of an actuator's range, which is 0 in all of them, to its end.
        np.testing.assert_allclose(body.data.ctrl[driven], body.model.actuator_ctrlrange[driven, 1] / 2)
        assert len(driven) == (joint < sizes[agent])
        moved += driven.tolist()
        if outcome.terminated:
            env.reset(0)
    assert sorted(moved) == list(range(body.model.nu)) and sum(sizes) == body.model.nu
    assert outcome.view.alive is None and outcome.view.avail is None and outcome.view.state.shape == (env.spec.state_dim,)
    part = task.partition("-")[2]
    assert env.spec.n_agents == ({"9|8": 2, "3p": 3}.get(part) or int(part.partition("x")[0]))


@pytest.mark.parametrize(("body", "part"), [("Ant", "2x4d"), ("Hopper", "3x1"), ("Humanoid", "9|8"), ("ManySegmentSwimmer", "10x2")])
def test_numbers_are_the_raw_ones_and_the_sum_over_agents_is_the_bodys_reward(body, part):
    from gymnasium_robotics import mamujoco_v1

    env, raw = make_one(f"mamujoco/{body.removeprefix('ManySegment')}-{part}"), mamujoco_v1.parallel_env(body, part)
    chooser, ends = np.random.default_rng(0), 0
    for seed in (3, 4):
        view, (seen, _) = env.reset(seed), raw.reset(seed=seed)
        for _ in range(60):
            assert np.array_equal(view.state, raw.state().astype(np.float32))
            for mine, name in zip(view.obs, raw.possible_agents, strict=True):
                assert np.array_equal(mine, seen[name].astype(np.float32))
            actions = random_actions(env, chooser)
            joint = {}
            for name, row in zip(raw.possible_agents, actions, strict=True):
                box = raw.action_space(name)
                joint[name] = (row[: box.shape[0]] * box.high.astype(np.float64)).astype(np.float32)
            outcome = env.step(actions)
            seen, rewards, terminations, _, _ = raw.step(joint)
            assert outcome.reward == [rewards[raw.possible_agents[0]] / env.spec.n_agents] * env.spec.n_agents
            assert outcome.terminated == any(terminations.values()) and not outcome.truncated
            view = outcome.view
            if outcome.terminated:
                ends += 1
                break
    assert ends == (2 if body in ("Hopper", "Humanoid") else 0)


def test_the_limit_is_a_cut_and_a_fall_is_an_end():
    env = make_env("mamujoco/Hopper-3x1", 8, workers=0, max_steps=20)
    env.reset(0)
    chooser, clock = torch.Generator().manual_seed(0), torch.zeros(8)
    ended = cut = 0
    for _ in range(40):
        step = env.step(torch.rand(3, 8, 1, generator=chooser) * 2 - 1)
        clock += 1
        assert torch.equal(step.truncated, (clock == 20) & ~step.terminated)
        ended, cut = ended + int(step.terminated.sum()), cut + int(step.truncated.sum())
        clock[step.terminated | step.truncated] = 0
    assert ended and cut


def test_sizes_limits_and_options():
    assert make_one("mamujoco/Humanoid-17x1").spec == EnvSpec(17, 92, 348, 1, 1000, continuous=True)
    assert make_one("mamujoco/Reacher-2x1").spec.episode_limit == 50
    near, far = (make_one("mamujoco/HalfCheetah-6x1", agent_obsk=k).spec.obs_dim for k in (0, 2))
    assert near < make_one("mamujoco/HalfCheetah-6x1").spec.obs_dim < far
    env = make_one("mamujoco/Swimmer-2x1", reset_noise_scale=0.0)
    assert np.array_equal(env.reset(0).state, env.reset(1).state)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("Ant-3x3", {}, "unknown task 'mamujoco/Ant-3x3': did you mean 'mamujoco/Ant-"),
        ("Humanoid-17x2", {}, "unknown task 'mamujoco/Humanoid-17x2': did you mean 'mamujoco/Humanoid-17x1'"),
        ("Swimmer-1x1", {}, "mamujoco/Swimmer-1x1: expected at least 2 segments in all, got 1x1"),
        ("Ant-4x2", {"agent_obsk": -1}, "mamujoco/Ant-4x2: agent_obsk must be a whole number of at least 0, got -1"),
        ("Ant-4x2", {"healthy_rewrd": 1}, "unknown option of mamujoco/Ant-4x2 'healthy_rewrd': did you mean 'healthy_reward'"),
        ("Ant-4x2", {"include_cfrc_ext_in_observation": False}, "unknown option of mamujoco/Ant-4x2 'include_cfrc_ext_in_observation'"),
        ("Hopper-3x1", {"frame_skip": "a"}, "mamujoco/Hopper-3x1 can't be made with frame_skip='a'"),
    ],
)
def test_wrong_names_and_options(task, options, message):
    with pytest.raises(UsageError, match=message):
        make_env(f"mamujoco/{task}", 2, workers=0, **options)


def test_a_picture_where_the_machine_can_draw_one(monkeypatch):
    env = make_one("mamujoco/Hopper-3x1")
    env.reset(0)
    picture = env.render()
    assert picture is None or (picture.shape == (480, 480, 3) and picture.dtype == np.uint8 and picture.std() > 1)

    def draw():
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(env.team.env, "render", draw)
    assert env.render() is None


def test_making_a_body_says_nothing_and_writes_nothing(tmp_path):
    code = "from k24.envs.mamujoco import make_one; [make_one(f'mamujoco/{t}').reset(0) for t in ('HalfCheetah-6x1', 'Swimmer-10x2')]"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("", "", [])
