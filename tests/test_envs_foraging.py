"""Level-based foraging and the robotic warehouse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, check_env, make_env
from k24.envs import foraging as foraging_module
from k24.envs.foraging import make_one
from k24.errors import UsageError

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("lbforaging")
pytest.importorskip("rware")

CONTRACT = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}
FORWARD = 1
LOAD = 5


def random_actions(env, chooser):
    return chooser.integers(env.spec.n_actions, size=env.spec.n_agents)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("lbf/8x8-2p-2f-coop", {}),
        ("lbf/2s-10x10-3p-3f", {"max_steps": 20, "penalty": 0.1}),
        ("lbf/5x5-2p-1f", {}),
        ("rware/tiny-2ag", {"max_steps": 30}),
        ("rware/tiny-3ag-hard", {"max_steps": 20, "max_inactivity_steps": 15}),
        ("rware/small-4ag", {"max_steps": 20, "reward_type": "global", "observation_type": "image", "sensor_range": 2}),
    ],
)
def test_tasks_keep_the_contract(task, options):
    passed = set(check_env(lambda: make_env(task, 3, workers=0, **options)))
    assert passed >= CONTRACT | {"auto-reset", "other seed, other episodes", "render"}


@pytest.mark.parametrize("task", foraging_module.TASKS)
def test_every_listed_task_is_accepted_and_begins(task):
    assert foraging_module.accepts(task)
    env = make_one(task)
    assert len(env.reset(0).obs) == env.spec.n_agents == int(re.search(r"(\d+)(p|ag)", task)[1])
    assert env.spec.episode_limit == (50 if task.startswith("lbf/") else 500)


@pytest.mark.parametrize(
    ("prefix", "task", "registered"),
    [("Foraging-", "lbf/{}", "Foraging-{}-v3"), ("rware-", "rware/{}", "rware-{}-v2")],
)
def test_every_name_of_the_packages_means_what_it_means_there(prefix, task, registered):
    names = [name.removeprefix(prefix)[:-3] for name in gymnasium.registry if name.startswith(prefix)]
    assert len(names) > 200
    assert all(foraging_module.accepts(task.format(name)) for name in names)
    for name in [*names[:: len(names) // 12], names[-1]]:
        raw = gymnasium.make(registered.format(name), disable_env_checker=True).unwrapped
        try:
            env = make_one(task.format(name))
        except UsageError:
            assert raw.request_queue_size == 0  # a warehouse in which nothing can be earned
            continue
        raw.reset(seed=5), env.reset(5)
        apart = {"_max_episode_steps", "max_steps"}
        mine, theirs = vars(env.env), vars(raw)
        settings = [key for key, value in theirs.items() if isinstance(value, int | float | str | tuple | None) and key not in apart]
        assert len(settings) > 8 and all(mine[key] == theirs[key] for key in settings), name


@pytest.mark.parametrize(
    ("task", "registered"),
    [
        ("lbf/8x8-2p-2f-coop", "Foraging-8x8-2p-2f-coop-v3"),
        ("lbf/2s-10x10-3p-3f", "Foraging-2s-10x10-3p-3f-v3"),
        ("rware/tiny-2ag", "rware-tiny-2ag-v2"),
    ],
)
def test_numbers_are_the_raw_ones_and_the_clock_is_a_cut(task, registered):
    env = make_one(task)
    limit, chooser = env.spec.episode_limit, np.random.default_rng(0)
    paid, cut = 0.0, 0
    for seed in range(3):
        # The raw one is made anew for each: it would carry the players' last places over, see below.
        raw = gymnasium.make(registered, disable_env_checker=True).unwrapped
        view, (seen, _) = env.reset(seed), raw.reset(seed=seed)
        for t in range(1, limit + 1):
            for mine, theirs in zip(view.obs, seen, strict=True):
                assert np.array_equal(mine, theirs)
            actions = random_actions(env, chooser)
            outcome = env.step(actions)
            seen, rewards, done, _, _ = raw.step(actions.tolist())
            view, paid = outcome.view, paid + sum(rewards)
            assert list(outcome.reward) == list(rewards) and not outcome.truncated
            # The raw one calls its time limit an end.
            assert outcome.terminated == (done and t < limit)
            if done:
                cut += t == limit
                break
    assert cut and (paid > 0 or task != "lbf/2s-10x10-3p-3f")  # in the others, nothing is earned by chance


def test_the_time_limit_is_a_cut_and_all_food_eaten_an_end():
    env = make_env("lbf/5x5-2p-1f", 16, workers=0, max_steps=12)
    env.reset(0)
    chooser = torch.Generator().manual_seed(0)
    ended = returned = torch.zeros(16)
    for _ in range(12):
        step = env.step(torch.randint(6, (2, 16), generator=chooser))
        returned = returned + step.reward.sum(0) * (ended == 0)
        ended = ended + step.terminated
        if step.truncated.any():
            break
    assert step.truncated.any() and not (step.truncated & (ended > 0)).any()
    # One food: who ate it got the whole return, and that was the end.
    assert ended.any() and torch.equal(returned, (ended > 0).float())


def test_the_last_food_ends_the_episode_and_is_paid_by_level():
    env = make_one("lbf/8x8-2p-1f")
    env.reset(0)
    raw = env.env
    raw.field[:] = 0
    raw.field[3, 3], raw._food_spawned = 3, 3
    for player, place, level in zip(raw.players, [(3, 2), (2, 3)], [1, 2], strict=True):
        player.position, player.level = place, level
    raw._gen_valid_moves()
    alone = env.step(np.array([LOAD, 0]))
    assert not alone.terminated and list(alone.reward) == [0, 0]
    together = env.step(np.array([LOAD, LOAD]))
    assert together.terminated and not together.truncated
    np.testing.assert_allclose(together.reward, [1 / 3, 2 / 3])


def test_an_episode_does_not_hang_on_the_one_before():
    used = make_one("lbf/5x5-4p-1f")
    chooser = np.random.default_rng(0)
    for seed in range(20):
        assert np.array_equal(make_one("lbf/5x5-4p-1f").reset(seed).obs, used.reset(seed).obs)
        for _ in range(5):
            used.step(random_actions(used, chooser))


def deliver(env):
    """Puts robot 0, with a wanted shelf, one step above a goal, and drives it there."""
    raw = env.env
    robot, shelf = raw.agents[0], raw.request_queue[0]
    x, y = raw.goals[0]
    for index, other in enumerate(raw.agents[1:]):
        other.x, other.y = 0, index
    shelf.x, shelf.y = robot.x, robot.y = x, y - 1
    robot.carrying_shelf, robot.dir = shelf, type(robot.dir).DOWN
    raw._recalc_grid()
    return env.step(np.array([FORWARD] + [0] * (env.spec.n_agents - 1)))


@pytest.mark.parametrize(
    ("reward_type", "expected"),
    [(None, [1, 0, 0]), ("individual", [1, 0, 0]), ("two_stage", [0.5, 0, 0]), ("global", [1 / 3, 1 / 3, 1 / 3])],
)
def test_a_delivery_adds_one_to_the_return(reward_type, expected):
    env = make_one("rware/tiny-3ag", **({} if reward_type is None else {"reward_type": reward_type}))
    env.reset(0)
    outcome = deliver(env)
    np.testing.assert_allclose(outcome.reward, expected)
    assert not outcome.terminated and not outcome.truncated


def test_standing_idle_ends_a_warehouse_only_where_asked_to():
    env = make_one("rware/tiny-2ag", max_inactivity_steps=4)
    env.reset(0)
    idle = np.zeros(2, dtype=np.int64)
    assert [env.step(idle).terminated for _ in range(2)] == [False, False]
    assert not deliver(env).terminated
    assert [env.step(idle).terminated for _ in range(4)] == [False, False, False, True]
    patient = make_one("rware/tiny-2ag", max_steps=5)
    patient.reset(0)
    assert not any(patient.step(idle).terminated for _ in range(9))


def test_image_observations_are_flattened():
    env = make_one("rware/tiny-2ag", observation_type="image", sensor_range=2)
    assert env.spec == EnvSpec(2, 5 * 5 * 5, 2 * 5 * 5 * 5, 5, 500)
    view = env.reset(0)
    assert np.array_equal(view.obs[1].reshape(5, 5, 5), env.env._make_obs(env.env.agents[1]))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("lbf/8x8-2p-2f-co", {}, "unknown task 'lbf/8x8-2p-2f-co': did you mean 'lbf/8x8-2p-2f-coop'?"),
        ("lbf/8x9-2p-2f", {}, "unknown task 'lbf/8x9-2p-2f'"),
        ("rware/huge-2ag", {}, "unknown task 'rware/huge-2ag'"),
        ("lbf/8x8-2p-2f", {"penalti": 1}, "unknown option of lbf/8x8-2p-2f 'penalti': did you mean 'penalty'?"),
        ("lbf/8x8-2p-2f", {"grid_observation": True}, "unknown option of lbf/8x8-2p-2f 'grid_observation'"),
        ("lbf/8x8-2p-2f", {"max_player_level": 0}, r"lbf/8x8-2p-2f can't be made with max_player_level=0: min_player_level must be"),
        ("lbf/3x3-20p-1f", {}, "lbf/3x3-20p-1f has no room for all that it should hold"),
        ("rware/tiny-99ag", {}, "rware/tiny-99ag has no room for all that it should hold"),
        ("rware/tiny-1ag-hard", {}, "rware/tiny-1ag-hard: no shelf is ever wanted there"),
        ("rware/tiny-2ag", {"reward_type": "both"}, "unknown reward_type of rware/tiny-2ag 'both': known: global, individual, two_stage"),
        ("rware/tiny-2ag", {"msg_bits": 2}, "unknown option of rware/tiny-2ag 'msg_bits'"),
    ],
)
def test_wrong_names_and_options(task, options, message):
    with pytest.raises(UsageError, match=message):
        make_env(task, 2, workers=0, **options)


def test_pictures_show_players_food_robots_and_shelves():
    env = make_one("lbf/8x8-2p-1f")
    env.reset(0)
    env.env.field[:] = 0
    env.env.field[0, 7] = 2
    for player, place in zip(env.env.players, [(7, 0), (7, 1)], strict=True):
        player.position = place
    picture = env.render()
    assert picture.shape == (320, 320, 3) and picture.dtype == np.uint8
    green, blue, white = picture[20, 300].tolist(), picture[300, 20].tolist(), picture[20, 20].tolist()
    assert green[1] > max(green[0], green[2]) and blue[2] > max(blue[:2]) and white == [255] * 3
    warehouse = make_one("rware/tiny-2ag")
    warehouse.reset(0)
    # Two goals of 2 cells, in a room of 11 times 10.
    x, y = warehouse.env.goals[0]
    row, column = (y + 0.5) / 11 * 320, (x + 0.5 + 0.5) / 11 * 320
    assert warehouse.render()[int(row), int(column)].max() < 80
