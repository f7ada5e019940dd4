"""SMAX: its rules are JaxMARL's, the batch, the ends and the restarts are ours."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

from k24.envs import check_env, smax
from k24.envs.base import Observation, Step
from k24.errors import RunError, UsageError

pytest.importorskip("jaxmarl")


def _choose(seen: Observation, chooser: torch.Generator) -> torch.Tensor:
    """Random available actions."""
    return torch.multinomial(seen.avail.flatten(0, 1).float(), 1, generator=chooser).view(seen.alive.shape)


def _play(env: smax.SmaxEnv, n_steps: int) -> list[Step]:
    """A rollout with random actions."""
    chooser = torch.Generator().manual_seed(0)
    seen, steps = env.reset(0), []
    for _ in range(n_steps):
        steps.append(env.step(_choose(seen, chooser)))
        seen = steps[-1].current
    return steps


# Enemies that do not shoot make battles that can be won by shooting, and that go on to the time limit without.
PEACEFUL = {"enemy_shoots": False, "max_steps": 20}
QUICK = {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize("task", ["smax/3m", "smax/smacv2_5_units"])
def test_keeps_the_contract(task):
    passed = check_env(lambda: smax.make(task, 3))
    wanted = {"auto-reset", "other seed, other episodes", "two beside each other", "global generators undisturbed", "render"}
    assert wanted <= set(passed)


def test_steps_as_jaxmarl_does():
    """The oracle: one environment of the batch, by SMAX's public functions and from the same keys, over several episodes."""
    jax, module = smax._import_jaxmarl()
    single = module.HeuristicEnemySMAX(scenario=module.map_name_to_scenario("smacv2_5_units"))
    reset, advance, avail_of = (jax.jit(one, compiler_options=QUICK) for one in (single.reset, single.step_env, single.get_avail_actions))
    env = smax.make("smax/smacv2_5_units", 3)
    index, n_agents, n_ends = 1, env.spec.n_agents, 0

    def scaled(state):
        """Ten numbers for each of ten units (health, two of its place, weapon, type one-hot), teams, types."""
        units = np.array(state[:100]).reshape(10, 10) / [1, 32, 32, 1.87, 1, 1, 1, 1, 1, 1]
        return np.concatenate([units.flatten(), state[100:110], state[110:] / 6]).clip(-1, 1)

    def compare(seen, obs, state):
        avail = avail_of(state)
        for agent, name in enumerate(single.agents):
            np.testing.assert_allclose(seen.obs[agent, index], obs[name], atol=1e-4)
            np.testing.assert_array_equal(seen.avail[agent, index], avail[name])
        np.testing.assert_allclose(seen.state[index], scaled(obs["world_state"]), atol=1e-4)
        np.testing.assert_array_equal(seen.alive[:, index], state.state.unit_alive[:n_agents])

    def begin(key):
        key, used = jax.random.split(key)
        return key, *reset(used)

    key = jax.random.wrap_key_data(np.random.SeedSequence(5).generate_state(6).reshape(3, 2)[index])
    # A reset is a step that nobody sees, which takes a key as any other.
    key, obs, state = begin(jax.random.split(key)[0])
    seen, chooser = env.reset(5), torch.Generator().manual_seed(5)
    compare(seen, obs, state)
    for _ in range(90):
        actions = _choose(seen, chooser)
        orders = {name: actions[agent, index].item() for agent, name in enumerate(single.agents)}
        key, used = jax.random.split(key)
        # From the state of the batch: the two are compiled differently, and rounding would drive them apart over an episode.
        state = jax.tree.map(lambda batch: batch[index], env._battles.state)
        obs, state, rewards, dones, _ = advance(used, state, orders)
        step = env.step(actions)
        compare(step.after, obs, state)
        assert step.reward[:, index].sum() == pytest.approx(float(rewards["ally_0"]), abs=1e-5)
        assert bool(step.terminated[index]) == bool(dones["__all__"])
        if dones["__all__"]:
            n_ends += 1
            key, obs, state = begin(key)
        seen = step.current
        compare(seen, obs, state)
    assert n_ends >= 2


def test_unit_types_are_where_the_spec_says():
    env = smax.make("smax/smacv2_5_units", 3)
    start, stop = env.spec.unit_types
    assert stop == env.spec.obs_dim and stop - start == 6
    chooser = torch.Generator().manual_seed(0)
    seen, kinds, died = env.reset(1), set(), 0
    for _ in range(30):
        types = torch.from_numpy(np.array(env._battles.state.state.unit_types)[:, :5].astype(np.int64)).T
        expected = torch.nn.functional.one_hot(types, 6) * seen.alive[..., None]
        assert torch.equal(seen.obs[..., start:stop], expected.float())
        kinds |= set(types[seen.alive].tolist())
        died += int((~seen.alive).sum())
        seen = env.step(_choose(seen, chooser)).current
    assert len(kinds) == 6 and died


def test_dead_allies_see_nothing_and_can_only_stop():
    seen = [step.after for step in _play(smax.make("smax/3m", 3), 60)]
    obs = torch.stack([one.obs for one in seen])
    avail, alive = torch.stack([one.avail for one in seen]), torch.stack([one.alive for one in seen])
    assert (~alive).any() and alive.any()
    assert not obs[~alive].any()
    only_stop = torch.zeros(8, dtype=torch.bool)
    only_stop[4] = True
    assert (avail[~alive] == only_stop).all()
    # The living may walk wherever they like, and shoot at some time.
    assert avail[alive][:, :5].all() and avail[alive][:, 5:].any()


def test_winning_is_outliving_all_enemies():
    env = smax.make("smax/3m", 3, **PEACEFUL)
    seen, returned, won_returns = env.reset(0), torch.zeros(3), []
    for _ in range(80):
        # East, where the enemies come from, until one can be shot.
        shots = seen.avail[..., 5:]
        step = env.step(torch.where(shots.any(dim=-1), shots.int().argmax(dim=-1) + 5, 1))
        # The state begins with ten numbers a unit, the first of them its health.
        health = step.after.state[:, : 6 * 10].unflatten(1, (6, 10))[..., 0]
        allies_alive, enemies_alive = (health[:, :3] > 0).any(dim=1), (health[:, 3:] > 0).any(dim=1)
        assert torch.equal(step.won, allies_alive & ~enemies_alive)
        assert torch.equal(step.terminated, ~allies_alive | ~enemies_alive)
        returned += step.reward.sum(dim=0)
        won_returns += returned[step.won].tolist()
        returned[step.terminated | step.truncated] = 0
        seen = step.current
    # Each pays all of the enemies' health, and the bonus.
    assert len(won_returns) >= 3
    assert won_returns == pytest.approx([2.0] * len(won_returns), abs=1e-4)


def test_time_limit_cuts_and_does_not_end():
    env = smax.make("smax/3m", 3, **PEACEFUL)
    assert env.spec.episode_limit == 20
    env.reset(0)
    for count in range(1, 41):
        step = env.step(torch.full((3, 3), 4))
        assert step.truncated.tolist() == [count % 20 == 0] * 3
        assert not step.terminated.any() and not step.won.any()
        assert (step.after is step.current) == (count % 20 != 0)
    assert not torch.equal(step.after.obs, step.current.obs)


def test_the_rest_of_the_batch_does_not_notice_a_restart():
    steps = _play(smax.make("smax/3m", 3), 60)
    partly = [(step, on) for step in steps if (on := ~(step.terminated | step.truncated)).any() and not on.all()]
    assert partly
    for step, on in partly:
        for name, axis in (("obs", 1), ("state", 0), ("avail", 1), ("alive", 1)):
            before, now = (getattr(seen, name).movedim(axis, 0) for seen in (step.after, step.current))
            assert torch.equal(now[on], before[on])
        assert step.current.alive[:, ~on].all()


def test_seeds():
    env = smax.make("smax/smacv2_5_units", 3)
    first, again, other = env.reset(3), env.reset(3), env.reset(4)
    assert torch.equal(first.state, again.state)
    assert not torch.equal(first.state, other.state)
    assert not torch.equal(first.state[0], first.state[1])
    types = slice(*env.spec.unit_types)
    assert not torch.equal(first.obs[..., types], other.obs[..., types])
    env.reset(2**40)


def test_table_is_jaxmarls():
    scenarios = sys.modules[smax._import_jaxmarl()[1].SMAX.__module__].MAP_NAME_TO_SCENARIO
    assert set(smax.TASKS) == {f"smax/{name}" for name in scenarios}
    for name, scenario in scenarios.items():
        assert ("random" in smax.TASKS[f"smax/{name}"]) == scenario.smacv2_unit_type_generation == scenario.smacv2_position_generation


def test_defaults_are_those_of_smax():
    module = smax._import_jaxmarl()[1]
    taken = inspect.signature(module.SMAX).parameters | inspect.signature(module.HeuristicEnemySMAX).parameters
    assert {name: taken[name].default for name in smax._OPTIONS} == smax._OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step": 3}, "unknown option of smax/3m 'max_step': did you mean 'max_steps'?"),
        ({"max_steps": 2.5}, "smax/3m: max_steps must be of type int, as its default 100, got 2.5"),
        ({"walls_cause_death": 1}, "smax/3m: walls_cause_death must be of type bool, as its default True, got 1"),
        ({"attack_mode": "nearest"}, "smax/3m: attack_mode must be closest or random, got 'nearest'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError) as caught:
        smax.make("smax/3m", 2, **options)
    assert str(caught.value) == message


def test_a_whole_number_will_do_for_a_float():
    assert smax.make("smax/3m", 3, won_battle_bonus=1)._program is smax.make("smax/3m", 3)._program


def test_wrong_actions_are_named():
    with pytest.raises(RunError, match="actions must be from 0 to 7, got 4 to 8"):
        smax.make("smax/3m", 3).step(torch.tensor([[4, 4, 4], [4, 8, 4], [4, 4, 4]]))


def test_picture_shows_both_sides_and_not_the_dead():
    env = smax.make("smax/3m", 3)

    def spots(colour):
        """Where a colour is, ``[pixels, 2]``."""
        shade = torch.tensor([round(255 * part) for part in colour], dtype=torch.uint8)
        return (env.render() == shade).all(dim=-1).nonzero()

    seen = env.reset(0)
    assert env.render().shape == (320, 320, 3)
    allies, enemies = spots(smax._BLUE), spots(smax._RED)
    assert len(allies) and len(enemies)
    assert allies[:, 1].max() < 160 < enemies[:, 1].min()  # allies begin on the left
    chooser = torch.Generator().manual_seed(0)
    while seen.alive[:, 0].all():
        seen = env.step(_choose(seen, chooser)).current
    assert 0 < len(spots(smax._BLUE)) < len(allies)


def test_jax_is_imported_late_and_without_side_effects():
    code = """
import io, random, sys
import numpy as np
import k24.envs
from k24.envs import smax
assert not {"jax", "jaxmarl"} & set(sys.modules), "imported too early"
sys.stdout = mine = io.StringIO()
before = random.getstate(), np.random.get_state()[1].tolist()
env = smax.make("smax/3m", 2)
assert sys.stdout is mine and sys.stderr is sys.__stderr__ and mine.getvalue() == "", mine.getvalue()
assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "global generators touched"
assert sys.modules["jax"].config.jax_platforms == "cpu"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
