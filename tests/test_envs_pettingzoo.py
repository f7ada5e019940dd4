"""PettingZoo's parallel environments, and the particle environments of suite ``mpe2``."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, check_env, make_env
from k24.envs import mpe2 as mpe2_module
from k24.envs import pettingzoo as pettingzoo_module
from k24.envs.pettingzoo import ParallelTeam
from k24.errors import RunError, UsageError

gymnasium = pytest.importorskip("gymnasium")
Box, Dict, Discrete, MultiBinary = (getattr(gymnasium.spaces, name) for name in ("Box", "Dict", "Discrete", "MultiBinary"))

CONTRACT = {"spec", "shapes and types", "finite values", "same seed, same episodes", "two beside each other", "close twice"}


class Scripted:
    """A parallel environment with given spaces, whose agents end when the script says so.

    Observations are what ``look`` says, by default how many steps were taken.
    """

    def __init__(self, observations, actions, ends=None, look=None, infos=None):
        self.possible_agents = list(actions)
        self.observations, self.actions = observations, actions
        self.ends, self.look, self.infos = ends or {}, look, infos or {}
        self.taken, self.closed = [], 0

    def observation_space(self, name):
        return self.observations[name]

    def action_space(self, name):
        return self.actions[name]

    def reset(self, seed=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self.see(self.agents), {name: self.infos.get(name, {}) for name in self.agents}

    def step(self, joint):
        assert set(joint) == set(self.agents)
        self.taken.append(joint)
        self.t += 1
        acting = list(self.agents)
        how = {name: self.ends.get((name, self.t), "") for name in acting}
        self.agents = [name for name in acting if not how[name]]
        terminations = {name: how[name] == "end" for name in acting}
        truncations = {name: how[name] == "cut" for name in acting}
        infos = {name: self.infos.get(name, {}) for name in acting}
        return self.see(acting), dict.fromkeys(acting, 1.0 + self.t), terminations, truncations, infos

    def see(self, names):
        return {name: self.look(name) if self.look else np.full(self.observations[name].shape, self.t + 1.0) for name in names}

    def close(self):
        self.closed += 1


def leavers(**script):
    """Agents "short" and "long"; ``short_2="end"`` says that short ends at step 2, ``"cut"`` that it is cut there."""
    ends = {(key.partition("_")[0], int(key.partition("_")[2])): how for key, how in script.items()}
    spaces = {"short": Box(-1, 9, (1,)), "long": Box(-1, 9, (2,))}
    return Scripted(spaces, {"short": Discrete(2, start=5), "long": Discrete(3)}, ends)


def padded(view, size):
    return [[*one.tolist(), *[0.0] * (size - len(one))] for one in view.obs]


# --- agents that go -------------------------------------------------------------------------------------------------------------


def test_agents_that_vanish_see_zeros_earn_nothing_and_can_only_wait():
    raw = leavers(short_2="end", long_4="cut")
    env = ParallelTeam(raw, max_steps=9)
    assert env.spec == EnvSpec(n_agents=2, obs_dim=2, state_dim=3, n_actions=3, episode_limit=9)
    view = env.reset(0)
    assert padded(view, 2) == [[1, 0], [1, 1]] and view.state is None and view.alive.tolist() == [True, True]
    assert view.avail.tolist() == [[True, True, False], [True, True, True]]
    outcomes = [env.step(np.array([1, 2])) for _ in range(4)]
    assert [list(one.reward) for one in outcomes] == [[2, 2], [3, 3], [0, 4], [0, 5]]
    # With its own end it is gone, though the environment says what it saw last; the other one is there to the end of the episode.
    assert [one.view.alive.tolist() for one in outcomes] == [[True, True], [False, True], [False, True], [False, True]]
    assert [padded(one.view, 2) for one in outcomes[1:]] == [[[0, 0], [3, 3]], [[0, 0], [4, 4]], [[0, 0], [5, 5]]]
    assert outcomes[1].view.avail.tolist() == outcomes[3].view.avail.tolist() == [[True, False, False], [True, True, True]]
    assert [(one.terminated, one.truncated) for one in outcomes] == [(False, False)] * 3 + [(False, True)]
    # Actions are numbered as the environment numbers them, and only those who are there act.
    assert raw.taken == [{"short": 6, "long": 2}] * 2 + [{"long": 2}] * 2


@pytest.mark.parametrize(
    ("script", "terminated", "truncated", "alive"),
    [
        ({"short_1": "end", "long_1": "end"}, True, False, [True, True]),
        ({"short_1": "cut", "long_1": "cut"}, False, True, [True, True]),
        # Cut for one of the last is cut for all; but nothing follows for whom the task had ended.
        ({"short_1": "end", "long_1": "cut"}, False, True, [False, True]),
        ({"short_1": "cut"}, False, False, [False, True]),
    ],
)
def test_an_episode_ends_with_the_last_agent(script, terminated, truncated, alive):
    env = ParallelTeam(leavers(**script))
    env.reset(0)
    outcome = env.step(np.array([0, 0]))
    assert (outcome.terminated, outcome.truncated) == (terminated, truncated)
    assert list(outcome.reward) == [2, 2] and outcome.view.alive.tolist() == alive
    assert padded(outcome.view, 2) == [[2 * alive[0], 0], [2, 2]]


def test_agents_kept_in_the_list_after_their_end_are_gone_all_the_same():
    raw = leavers(short_1="end", long_1="end")
    env = ParallelTeam(raw)
    env.reset(0)
    step = raw.step

    def forgetful(joint):
        result = step(joint)
        raw.agents = list(raw.possible_agents)
        return result

    raw.step = forgetful
    outcome = env.step(np.array([0, 0]))
    assert outcome.terminated and not outcome.truncated


def test_an_action_that_the_agent_does_not_have_is_an_error():
    env = ParallelTeam(leavers())
    env.reset(0)
    with pytest.raises(RunError, match="agent 'short' has actions 0 to 1, got 2"):
        env.step(np.array([2, 0]))


def test_closing_twice_closes_once():
    raw = leavers()
    env = ParallelTeam(raw)
    env.close()
    env.close()
    assert raw.closed == 1 and env.render() is None


# --- what agents see ------------------------------------------------------------------------------------------------------------


def test_observations_of_any_kind_are_flattened():
    spaces = {"image": Box(0, 255, (2, 3), np.uint8), "number": Discrete(3, start=7), "parts": Dict(a=Discrete(2), b=Box(0, 1, (2,)))}
    seen = {"image": np.arange(6, dtype=np.uint8).reshape(2, 3), "number": 8, "parts": {"a": 1, "b": np.array([0.25, 0.5], np.float32)}}
    env = ParallelTeam(Scripted(spaces, dict.fromkeys(spaces, Discrete(2)), look=seen.get))
    assert (env.spec.obs_dim, env.spec.state_dim) == (6, 6 + 3 + 4)
    view = env.reset(0)
    assert [one.tolist() for one in view.obs] == [[0, 1, 2, 3, 4, 5], [0, 1, 0], [0, 1, 0.25, 0.5]]
    assert all(one.dtype == np.float32 for one in view.obs)


def test_action_masks_come_with_the_observation_or_in_infos():
    mask = {"seen": np.array([0, 1, 1], np.int8), "told": np.array([1, 0], bool), "free": None, "waits": np.zeros(3, np.int8)}
    masked = Dict(observation=Box(0, 9, (2,)), action_mask=Box(0, 1, (3,), np.int8))
    spaces = {"seen": masked, "told": Box(0, 9, (1,)), "free": Discrete(2), "waits": masked}
    actions = {"seen": Discrete(3), "told": Discrete(2), "free": Discrete(3), "waits": Discrete(3)}

    def look(name):
        if name == "free":
            return 1
        return {"observation": np.array([3.0, 4.0]), "action_mask": mask[name]} if spaces[name] is masked else np.array([5.0])

    env = ParallelTeam(Scripted(spaces, actions, look=look, infos={"told": {"action_mask": mask["told"]}}))
    expected = [[False, True, True], [True, False, False], [True, True, True], [True, False, False]]
    view = env.reset(0)
    assert [one.tolist() for one in view.obs] == [[3, 4], [5], [0, 1], [3, 4]] and view.avail.tolist() == expected
    assert env.step(np.array([1, 0, 2, 0])).view.avail.tolist() == expected
    mask["seen"] = np.ones(4)
    with pytest.raises(RunError, match=r"the action mask of agent 'seen' must have 3 entries, got \[4\]"):
        env.step(np.array([1, 0, 2, 0]))


def test_an_action_mask_counts_whatever_else_is_beside_it():
    space = Dict(observation=Box(0, 9, (2,)), goal=Discrete(2), action_mask=Box(0, 1, (3,), np.int8))
    seen = {"observation": np.array([3.0, 4.0]), "goal": 1, "action_mask": np.array([0, 1, 0], np.int8)}
    env = ParallelTeam(Scripted({"one": space}, {"one": Discrete(3)}, look=lambda name: seen))
    view = env.reset(0)
    assert env.spec.obs_dim == 4 and sorted(view.obs[0].tolist()) == [0, 1, 3, 4] and view.avail.tolist() == [[False, True, False]]


def test_the_state_is_the_environments_own_where_it_has_a_vector():
    raw = leavers()
    raw.state = lambda: np.array([raw.t, 7, 8, 9], dtype=np.float64)
    env = ParallelTeam(raw)
    assert env.spec.state_dim == 4 and env.reset(0).state.tolist() == [0, 7, 8, 9] and env.reset(0).state.dtype == np.float32
    assert env.step(np.array([0, 0])).view.state.tolist() == [1, 7, 8, 9]
    raw.state = lambda: np.zeros(3)
    with pytest.raises(RunError, match=r"state\(\) must always have 4 features, as it had at first, got \[3\]"):
        env.step(np.array([0, 0]))
    for useless in (lambda: np.zeros((2, 2)), {"not": "a function"}):
        raw.state = useless
        assert ParallelTeam(raw).spec.state_dim == 3


# --- continuous actions ---------------------------------------------------------------------------------------------------------


def test_continuous_actions_are_stretched_to_each_agents_box():
    actions = {"arm": Box(np.array([0, -2], np.float32), np.array([1, 6], np.float32)), "grid": Box(-0.1, 0.3, (1, 1), np.float64)}
    raw = Scripted(dict.fromkeys(actions, Box(0, 9, (1,))), actions)
    env = ParallelTeam(raw)
    assert env.spec == EnvSpec(n_agents=2, obs_dim=1, state_dim=2, n_actions=2, episode_limit=500, continuous=True)
    view = env.reset(0)
    assert view.avail is None and view.alive.tolist() == [True, True]
    env.step(np.array([[-1, 0], [0.5, 0.7]], np.float32))
    assert raw.taken[-1]["arm"].tolist() == [0, 2] and raw.taken[-1]["arm"].dtype == np.float32
    np.testing.assert_allclose(raw.taken[-1]["grid"], [[0.2]])
    for edge in (-1, 1):
        env.step(np.full((2, 2), edge, np.float32))
        assert all(box.contains(raw.taken[-1][name]) for name, box in actions.items())


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Discrete(2), Box(0, 1, (1,))], "all agents must have discrete actions, or all must have boxes, got 'a' Discrete"),
        ([MultiBinary(2), MultiBinary(2)], "all agents must have discrete actions, or all must have boxes"),
        ([Box(0, 1, (1,)), Box(0, np.inf, (1,))], "the actions of agent 'b' must be floats with finite bounds, got Box"),
        ([Box(0, 3, (1,), np.int64)] * 2, "the actions of agent 'a' must be floats with finite bounds, got Box"),
    ],
)
def test_actions_of_other_kinds_are_usage_errors(actions, message):
    with pytest.raises(UsageError, match=message):
        ParallelTeam(Scripted(dict.fromkeys("ab", Box(0, 9, (1,))), dict(zip("ab", actions, strict=True))))


def test_observations_that_have_no_fixed_size_are_usage_errors():
    with pytest.raises(UsageError, match="agent 'a' must observe what can be flattened, got Sequence"):
        ParallelTeam(Scripted({"a": gymnasium.spaces.Sequence(Discrete(2))}, {"a": Discrete(2)}))


# --- by import path -------------------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from gymnasium.spaces import Box, Discrete

class Countdown:
    "Ends of itself after `lasts` steps; agents are paid for action 1."
    def __init__(self, lasts, max_cycles):
        self.possible_agents, self.lasts, self.max_cycles = ["a", "b"], lasts, max_cycles
    def observation_space(self, name):
        return Box(-9, 9, (2,))
    def action_space(self, name):
        return Discrete(2)
    def reset(self, seed=None, options=None):
        self.t, self.agents, self.noise = 0, ["a", "b"], np.random.default_rng(seed)
        return self.see(), {}
    def see(self):
        return {name: self.noise.normal(size=2).clip(-9, 9) for name in ("a", "b")}
    def step(self, joint):
        self.t += 1
        over, cut = self.t >= self.lasts, self.t >= self.max_cycles
        if over or cut:
            self.agents = []
        flags = dict.fromkeys(joint, over), dict.fromkeys(joint, cut and not over)
        return self.see(), {name: float(action) for name, action in joint.items()}, *flags, {}
    def close(self):
        pass

def parallel_env(**options):
    return raw_env(**options)

class raw_env(Countdown):
    def __init__(self, lasts=4, max_cycles=6):
        super().__init__(lasts, max_cycles)

def brief(lasts=2):
    return Countdown(lasts, 10**9)

nothing = 3

def other():
    return "no environment"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "k24_test_countdown.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "k24_test_broken.py").write_text("import no_such_package", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    pytest.importorskip("pettingzoo")


@pytest.mark.parametrize(
    ("task", "options", "limit"),
    [
        ("k24_test_countdown:parallel_env", {}, 6),
        ("k24_test_countdown:parallel_env", {"max_steps": 3}, 3),
        ("k24_test_countdown:brief", {}, 10**9),
        ("k24_test_countdown:brief", {"max_steps": 5, "lasts": 9}, 5),
    ],
)
def test_environments_by_import_path(own_module, task, options, limit):
    env = make_env(f"pettingzoo/{task}", 2, workers=0, **options)
    assert env.spec == EnvSpec(2, 2, 4, 2, limit)
    passed = set(check_env(lambda: make_env(f"pettingzoo/{task}", 2, workers=0, **options), steps=20))
    assert passed >= CONTRACT | {"auto-reset"}
    env.reset(0)
    lasts = min(limit, options.get("lasts", 2 if "brief" in task else 4))
    for t in range(1, lasts + 1):
        step = env.step(torch.ones(2, 2, dtype=torch.int64))
        assert step.reward.tolist() == [[1, 1], [1, 1]]
        assert (step.terminated | step.truncated).all() == (t == lasts)
    assert step.truncated.all() == (limit == lasts)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "no_such_package.envs",
            {},
            r"tried to import 'no_such_package.envs', and got ModuleNotFoundError: .*install what provides 'no_such",
        ),
        ("k24_test_broken:make", {}, "tried to import 'k24_test_broken', .*install what provides 'no_such_package' with pip"),
        ("k24_test_countdown:nothing", {}, "the module 'k24_test_countdown' has no function 'nothing'"),
        ("k24_test_countdown:other", {}, "expected a PettingZoo parallel environment with possible_agents, got str"),
        ("k24_test_countdown:parallel_env", {"last": 3}, "unknown option of pettingzoo/k24_test_countdown:parallel_env 'last': .*'lasts'"),
        ("k24_test_countdown:parallel_env", {"max_cycles": 3}, "unknown option of .* 'max_cycles': did you mean 'max_steps'"),
        ("simple_spread_v3", {}, "unknown task 'pettingzoo/simple_spread_v3': did you mean 'pettingzoo/mpe2.simple_spread_v3'"),
        ("mpe2 simple", {}, "unknown task 'pettingzoo/mpe2 simple'"),
    ],
)
def test_what_is_not_there_is_a_usage_error(own_module, task, options, message):
    with pytest.raises(UsageError, match=message):
        make_env(f"pettingzoo/{task}", 2, workers=0, **options)


@pytest.mark.parametrize("task", pettingzoo_module.TASKS)
def test_the_listed_pettingzoo_environments_keep_the_contract(task):
    pytest.importorskip("mpe2")
    # One environment alone: closing a second one in this process would quit pygame.
    env = make_env(task, 8, workers=0)
    passed = set(check_env(env, steps=12))
    assert passed >= CONTRACT - {"two beside each other", "close twice"}
    assert env.reset(0).alive.all()
    env.close()


# --- mpe2 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("mpe2/simple_spread", {}),
        ("mpe2/simple_spread", {"continuous_actions": True, "N": 2}),
        ("mpe2/simple_speaker_listener", {}),
        ("mpe2/simple_tag", {}),
        ("mpe2/simple_world_comm", {"continuous_actions": True}),
    ],
)
def test_mpe2_tasks_keep_the_contract(task, options):
    pytest.importorskip("mpe2")
    passed = set(check_env(lambda: make_env(task, 2, workers=0, max_steps=8, **options)))
    assert passed >= CONTRACT | {"auto-reset", "other seed, other episodes", "render"}


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("task", ["simple_spread_v3", "simple_speaker_listener_v4"])
def test_mpe2_numbers_are_the_raw_ones_to_the_last_and_the_clock_is_a_cut(task, continuous):
    pytest.importorskip("mpe2")
    limit = 25
    env = mpe2_module.make_one(f"mpe2/{task.rpartition('_')[0]}", continuous_actions=continuous)
    raw = importlib.import_module(f"mpe2.{task}").parallel_env(max_cycles=limit, continuous_actions=continuous)
    names = raw.possible_agents
    chooser = np.random.default_rng(0)
    for seed in (11, 12):
        view, (seen, _) = env.reset(seed), raw.reset(seed=seed)
        for t in range(1, limit + 1):
            assert view.state is None and view.alive is None
            for mine, name in zip(view.obs, names, strict=True):
                assert np.array_equal(mine, seen[name])
            if continuous:
                actions = chooser.uniform(-1, 1, (env.spec.n_agents, env.spec.n_actions)).astype(np.float32)
                sizes = [raw.action_space(name).shape[0] for name in names]
                joint = {name: ((row[:size] + 1) / 2).astype(np.float32) for name, row, size in zip(names, actions, sizes, strict=True)}
            else:
                actions = np.array([chooser.integers(raw.action_space(name).n) for name in names])
                joint = dict(zip(names, actions.tolist(), strict=True))
            outcome = env.step(actions)
            seen, rewards, _, _, _ = raw.step(joint)
            np.testing.assert_allclose(outcome.reward, [rewards[name] for name in names], rtol=1e-5 * continuous, atol=1e-6 * continuous)
            assert not outcome.terminated and outcome.truncated == (t == limit)
            view = outcome.view
            if continuous:
                # The raw one goes on from where ours is, so that rounding does not add up.
                for mine, name in zip(view.obs, names, strict=True):
                    np.testing.assert_allclose(mine, seen[name], rtol=1e-4, atol=1e-5)
                seen = dict(zip(names, view.obs, strict=True))
        assert not raw.agents and any(outcome.reward)


def test_mpe2_sides_and_available_actions():
    pytest.importorskip("mpe2")
    env = mpe2_module.make_one("mpe2/simple_world_comm")
    assert env.sides == ("adversary",) * 4 + ("good",) * 2
    assert env.reset(0).avail.sum(1).tolist() == [20, 5, 5, 5, 5, 5]
    assert mpe2_module.make_one("mpe2/simple_crypto").sides == ("adversary", "good", "good")
    spread = mpe2_module.make_one("mpe2/simple_spread")
    assert spread.sides is None and spread.reset(0).avail is None
    two_sided = {task for task in mpe2_module.TASKS if mpe2_module.make_one(task).sides}
    assert two_sided == {task for task, about in mpe2_module.TASKS.items() if "two sides" in about}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_rate": 3}, "unknown option of mpe2/simple_spread 'local_rate': did you mean 'local_ratio'"),
        ({"render_mode": "human"}, "unknown option of mpe2/simple_spread 'render_mode'"),
        ({"local_ratio": 3.0}, "mpe2/simple_spread can't be made with local_ratio=3.0: local_ratio is a proportion"),
    ],
)
def test_wrong_options_of_mpe2(options, message):
    pytest.importorskip("mpe2")
    with pytest.raises(UsageError, match=message):
        make_env("mpe2/simple_spread", 2, workers=0, **options)


def test_closing_one_mpe2_environment_leaves_others_drawable():
    pytest.importorskip("mpe2")
    one, other = (make_env("mpe2/simple_reference", 1, workers=0) for _ in range(2))
    one.reset(0)
    other.close()
    assert one.render().shape == (700, 700, 3)


def test_every_mpe2_task_names_a_module_that_is_there():
    mpe2 = pytest.importorskip("mpe2")
    assert mpe2.__file__ is not None
    for name, (module, _) in mpe2_module._MODULES.items():
        assert "max_cycles" in inspect.signature(importlib.import_module(f"mpe2.{module}").raw_env).parameters, name
