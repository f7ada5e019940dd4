"""Copies of single environments: the same whatever the number of workers, and whatever becomes of them.

This file is also the module of the environments it tests: workers import it for ``make_one``.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, Outcome, SingleEnv, View, check_env, worker
from k24.envs.batch import episode_seed
from k24.envs.copies import Copies
from k24.errors import RunError, UsageError

HERE = Path(__file__).parent


class Walk(SingleEnv):
    """Agents on a line: a good environment, with things to give and faults to choose.

    Action 3 is never available and does what the file ``trouble`` in ``folder`` says; file ``noise`` there makes everything random.
    """

    def __init__(self, sizes=(3, 2), give=(), continuous=False, fault="", folder=None, limit=6, ends=4.0, **options) -> None:
        n_agents, n_actions = len(sizes), 2 if continuous else 4
        state_dim = 2 if "state" in give or fault == "state dim" else sum(sizes)
        obs_dim = max(sizes) - 1 if fault == "long" else max(sizes)
        self.spec = EnvSpec(n_agents, obs_dim, state_dim, n_actions, limit, continuous)
        self.sides = tuple("left" if agent % 2 else "right" for agent in range(n_agents))
        self.sizes, self.give, self.fault, self.folder, self.ends = sizes, give, fault, Path(folder or "/nowhere"), ends
        self.chatty = options.get("chatty", False)
        self.buffer = [np.zeros(size) for size in sizes]
        self.kept: list[np.ndarray] = []

    def reset(self, seed: int) -> View:
        self.random = np.random.default_rng(seed)
        self.x, self.t = self.random.random(len(self.sizes)), 0
        if self.fault == "exit in reset":
            sys.exit(0)
        if self.fault == "raise in reset":
            raise KeyError("no map")
        return self.view()

    def step(self, actions: np.ndarray) -> Outcome:
        assert actions.dtype == (np.float32 if self.spec.continuous else np.int64) and len(actions) == self.spec.n_agents
        assert not self.kept or (self.kept[0] == self.kept[1]).all(), "what an environment was given stays as it was"
        self.kept = [actions, actions.copy()]
        if self.chatty:
            print("the simulator talks")
        if not self.spec.continuous and actions[0] == 3:
            self.trouble()
        moved = actions.sum(axis=-1) if self.spec.continuous else actions
        self.x = self.x + 0.3 * (moved - 1) + 0.1 * self.random.standard_normal(len(self.x))
        self.t += 1
        if (self.folder / "noise").exists():
            self.x += np.frombuffer(os.urandom(len(self.x)), np.uint8) / 2560  # little: no episode should end by it
        terminated = bool(self.x.sum() > self.ends)
        won = bool(self.x[0] > self.x[1]) if "won" in self.give else None
        reward: object = list(self.x) if self.t % 2 else self.x.copy()
        late = self.t == 2
        if late and self.fault == "won once":
            won = True
        if late and self.fault in _REWARDS:
            reward = _REWARDS[self.fault]
        if late and self.fault in _ENDS:
            return Outcome(self.view(), reward, **_ENDS[self.fault])  # type: ignore[arg-type]
        if late and self.fault == "tuple":
            return (self.view(), reward, False, False)  # type: ignore[return-value]
        if late and self.fault == "exit":
            sys.exit("that's it")
        if late and self.fault == "raise":
            raise ValueError("negative\nmass")
        return Outcome(self.view(), reward, terminated, self.fault == "own limit" and self.t == 3, won)  # type: ignore[arg-type]

    def trouble(self) -> None:
        file = self.folder / "trouble"
        if not file.exists():
            return
        kind = file.read_text()
        if kind != "exit":
            file.unlink()
        if kind == "hang once":
            time.sleep(1000)
        if kind == "raise once":
            raise ValueError("a wheel came off")
        if kind in ("exit", "exit once"):
            os._exit(3)

    def view(self) -> View:
        """Always the same arrays, as the contract allows."""
        for agent, row in enumerate(self.buffer):
            row[:] = np.arange(len(row)) + self.x[agent]
        obs: object = np.array(self.buffer) if "matrix" in self.give else self.buffer
        state = np.array([self.x.sum(), self.t]) if "state" in self.give else None
        avail = np.ones((len(self.sizes), self.spec.n_actions), dtype=np.int8) if "avail" in self.give else None
        alive = np.arange(len(self.sizes)) != (self.t - 3) if "alive" in self.give else None
        if avail is not None:
            avail[:, -1] = 0
            if alive is not None:
                avail[~alive] = 0
        if self.t == (0 if self.fault.endswith(" at first") else 2) and self.fault.removesuffix(" at first") in _VIEWS:
            return _VIEWS[self.fault.removesuffix(" at first")](View(obs, state, avail, alive))  # type: ignore[arg-type]
        return View(obs, state, avail, alive)  # type: ignore[arg-type]

    def render(self) -> np.ndarray | None:
        if self.fault == "raise in render":
            raise OSError("no display")
        return np.full((4, 5, 3), self.t, np.float64 if self.fault == "picture" else np.uint8) if "picture" in self.give else None

    def close(self) -> None:
        if self.fault == "raise in close":
            raise OSError("already gone")
        if self.fault == "exit in close":
            sys.exit(0)


_REWARDS = {"one reward": 1.0, "short reward": [1.0], "text": ["a", "b"], "nan reward": [0.0, np.nan]}
_ENDS: dict[str, dict] = {
    "ends apart": {"terminated": np.zeros(2, bool)},
    "text as end": {"terminated": False, "truncated": "no"},
    "share of an end": {"terminated": 0.5},
    "won apart": {"terminated": False, "won": np.zeros(2, bool)},
    "numpy end": {"terminated": np.array(False), "truncated": np.int8(0)},
}
_VIEWS = {
    "few": lambda view: view._replace(obs=view.obs[:1]),
    "shrinks": lambda view: view._replace(obs=[view.obs[0], view.obs[1][:1]]),
    "flat": lambda view: view._replace(obs=[view.obs[0], 1.0]),
    "deep": lambda view: view._replace(obs=[view.obs[0], view.obs[1][:, None]]),
    "text in obs": lambda view: view._replace(obs=[view.obs[0], ["a", "b"]]),
    "nan": lambda view: view._replace(obs=[view.obs[0], np.array([0.0, np.nan])]),
    "ragged": lambda view: view._replace(obs=[view.obs[0], [[1.0, 2.0], [3.0]]]),
    "nothing": lambda view: view._replace(obs=None),
    "a generator": lambda view: view._replace(obs=(one for one in view.obs)),
    "bare": lambda view: view.obs,
    "state once": lambda view: view._replace(state=np.zeros(5)),
    "state shape": lambda view: view._replace(state=np.zeros(3)),
    "state inf": lambda view: view._replace(state=np.array([np.inf, 0.0])),
    "avail never": lambda view: view._replace(avail=None),
    "avail flat": lambda view: view._replace(avail=np.ones(4)),
    "stuck": lambda view: view._replace(avail=np.arange(8).reshape(2, 4) < 4),
    "alive shape": lambda view: view._replace(alive=np.ones((2, 1))),
}


def make_one(task: str, **kwargs: object) -> SingleEnv:
    if task == "usage":
        raise UsageError("unknown option of usage 'colour'")
    if task == "exit":
        sys.exit()
    if task == "import":
        raise ImportError("no module named 'pacman'")
    if task == "value":
        raise ValueError("field too\nsmall")
    if task == "other":
        return "walk"  # type: ignore[return-value]
    if task == "unlike":
        make_one.made = getattr(make_one, "made", 0) + 1  # type: ignore[attr-defined]
        return Walk(limit=make_one.made)  # type: ignore[attr-defined]
    return Walk(**kwargs)  # type: ignore[arg-type]


def walks(n_envs: int = 5, workers: int = 0, **kwargs: object) -> Copies:
    return Copies(__name__, "walk", kwargs, n_envs, workers=workers)


def play(env: Copies, seed: int, steps: int) -> list:
    """A reset and some steps with actions that are always the same."""
    chooser = torch.Generator().manual_seed(7)
    seen: list = [env.reset(seed)]
    for _ in range(steps):
        if env.spec.continuous:
            actions = torch.rand(env.spec.n_agents, env.n_envs, 2, generator=chooser) * 2 - 1
        else:
            actions = torch.randint(3, (env.spec.n_agents, env.n_envs), generator=chooser)
        seen.append(env.step(actions))
    return seen


def same(one: object, other: object) -> bool:
    """Equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if one is None:
        return other is None
    return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))  # type: ignore[arg-type]


# --- in one process -------------------------------------------------------------------------------------------------------------

KINDS = [
    {},
    {"sizes": (3, 3), "give": ("matrix", "avail")},
    {"sizes": (1, 4, 2), "give": ("state", "won")},
    {"give": ("avail", "alive", "won", "picture")},
    {"sizes": (2, 2), "give": ("alive", "matrix")},
    {"continuous": True, "ends": 0.5},
]


@pytest.mark.parametrize("kwargs", KINDS)
def test_copies_keep_the_contract(kwargs):
    passed = check_env(lambda: walks(**kwargs))
    assert set(passed) >= {"auto-reset", "last reward", "same seed, same episodes", "other seed, other episodes", "two beside each other"}


def test_observations_are_padded_and_stand_side_by_side_as_the_state():
    env = walks(n_envs=2, sizes=(1, 3))
    assert env.sides == ("right", "left")
    first = env.reset(5)
    alone = Walk(sizes=(1, 3))
    for copy in range(2):
        rows = [torch.tensor(row, dtype=torch.float32) for row in alone.reset(episode_seed(5, copy, 0)).obs]
        torch.testing.assert_close(first.obs[0, copy], torch.cat([rows[0], torch.zeros(2)]), rtol=0, atol=0)
        torch.testing.assert_close(first.obs[1, copy], rows[1], rtol=0, atol=0)
        torch.testing.assert_close(first.state[copy], torch.cat(rows), rtol=0, atol=0)
    assert first.avail is None and first.alive is None


def test_the_dead_see_nothing_and_have_action_0():
    env = walks(give=("alive", "avail"), ends=100.0)
    first, *steps = play(env, 0, 5)
    assert first.alive.all() and all(step.after.alive.all() for step in steps[:2])
    for agent, step in enumerate(steps[2:4]):
        obs, alive, avail = step.after.obs, step.after.alive, step.after.avail
        assert not alive[agent].any() and alive[1 - agent].all()
        assert (obs[agent] == 0).all() and (obs[1 - agent] != 0).any()
        assert (step.after.state.view(5, 5)[:, :3] == 0).all() == (agent == 0)
        assert avail[agent].sum() == 5 and avail[agent, :, 0].all() and avail[1 - agent].sum() == 15


def test_an_end_of_the_tasks_own_is_no_truncation_and_the_limit_is_kept():
    steps = play(walks(n_envs=8, give=("won",), limit=5, ends=2.0), 0, 40)[1:]
    clock = torch.zeros(8, dtype=torch.int64)
    ends, wins, at_limit = 0, 0, 0
    for step in steps:
        clock += 1
        assert torch.equal(step.terminated, step.reward.sum(0) > 2.0)
        assert torch.equal(step.truncated, (clock == 5) & ~step.terminated)
        ended = step.terminated | step.truncated
        assert torch.equal(step.won, ended & (step.reward[0] > step.reward[1]))
        ends, wins, at_limit = ends + int(step.terminated.sum()), wins + int(step.won.sum()), at_limit + int(step.truncated.sum())
        torch.testing.assert_close(step.after.obs[:, :, 0], step.reward, rtol=0, atol=0)
        assert (step.current.obs[:, ended, 0] < 1).all(), "a new episode begins between 0 and 1"
        clock[ended] = 0
    assert ends and at_limit and 0 < wins < ends + at_limit


def test_an_end_at_the_very_limit_is_terminated():
    step = play(walks(limit=1, ends=-100.0), 0, 1)[1]
    assert step.terminated.all() and not step.truncated.any()


def test_the_simulators_own_limit_counts_too():
    steps = play(walks(fault="own limit", ends=100.0), 0, 6)[1:]
    assert [bool(step.truncated.all()) for step in steps] == [False, False, True] * 2
    assert not any(step.terminated.any() for step in steps)


def test_every_episode_of_every_copy_has_a_seed_of_its_own():
    seeds = [episode_seed(seed, copy, episode) for seed in range(4) for copy in range(20) for episode in range(20)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert episode_seed(1, 2, 3) == episode_seed(1, 2, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"fault": "long"},
            r"walk: reset: expected 2 observations, each a vector of at most obs_dim \(=2\) features, got float64 \[3\], float64 \[2\]",
        ),
        (
            {"fault": "state dim"},
            r"expected a state, or a state_dim \(=2\) that is the sum of all observations' features \(=5\)",
        ),
        ({"give": ("avail",), "continuous": True}, r"expected avail to be None where actions are continuous, got int8 \[2, 2\]"),
        (
            {"fault": "few"},
            r"walk: step: expected 2 observations, one per agent, got 1 \(environment 0, step 2 of its episode\); ",
        ),
        ({"fault": "shrinks"}, r"the observation of agent 1 to be a vector of 2 features, as before, got float64 \[1\]"),
        ({"fault": "flat"}, r"the observation of agent 1 to be a vector of 2 features, as before, got float \[\]"),
        ({"fault": "deep"}, r"the observation of agent 1 to be a vector of 2 features, as before, got float64 \[2, 1\]"),
        ({"fault": "text in obs"}, r"expected observations, state, avail and alive of numbers, got float64 \[3\], list \[2\]"),
        ({"fault": "ragged"}, r"the observation of agent 1 to be a vector of 2 features, as before, got list"),
        ({"fault": "nothing"}, r"walk: step: expected 2 observations in a list, one per agent, got NoneType \[\]"),
        ({"fault": "a generator"}, r"walk: step: expected 2 observations in a list, one per agent, got generator \[\]"),
        ({"fault": "nothing at first"}, r"walk: reset: expected 2 observations in a list, one per agent, got NoneType \[\]"),
        ({"fault": "ragged at first"}, r"walk: reset: expected 2 observations, each a vector .*, got float64 \[3\], list \("),
        ({"fault": "nan"}, r"expected finite observations of agent 1, got nan"),
        ({"fault": "bare"}, r"expected a View, got list"),
        ({"fault": "tuple"}, r"expected an Outcome, got tuple"),
        ({"fault": "state once"}, r"expected state given always or never, got both"),
        ({"fault": "state shape", "give": ("state",)}, r"expected state of shape \[2\], got float64 \[3\]"),
        ({"fault": "state inf", "give": ("state",)}, r"expected a finite state, got inf"),
        ({"fault": "avail never", "give": ("avail",)}, r"expected avail given always or never, got both"),
        ({"fault": "avail flat", "give": ("avail",)}, r"expected avail of shape \[2, 4\], got float64 \[4\]"),
        ({"fault": "stuck", "give": ("avail",)}, r"expected at least one action available for agent 1, got none"),
        ({"fault": "alive shape", "give": ("alive",)}, r"expected alive of shape \[2\], got float64 \[2, 1\]"),
        ({"fault": "won once"}, r"expected won given always or never, got both"),
        ({"fault": "won apart", "give": ("won",)}, r"expected won to be True or False, one for the team, got bool \[2\]"),
        ({"fault": "ends apart"}, r"expected terminated to be True or False, one for the team, got bool \[2\]"),
        ({"fault": "text as end"}, r"expected truncated to be True or False, one for the team, got str \[\]"),
        ({"fault": "share of an end"}, r"expected terminated to be True or False, one for the team, got float \[\]"),
        ({"fault": "one reward"}, r"expected reward to be 2 numbers, one per agent, got float \[\]"),
        ({"fault": "short reward"}, r"expected reward to be 2 numbers, one per agent, got list \[1\]"),
        ({"fault": "text"}, r"expected reward to be 2 numbers, one per agent, got list \[2\]"),
        ({"fault": "nan reward"}, r"expected a finite reward of agent 1, got nan"),
        ({"fault": "raise"}, rf"walk: step: ValueError: negative mass \({__file__}:\d+\) \(environment 0\)"),
        ({"fault": "raise in reset"}, r"walk: reset: KeyError: 'no map' "),
    ],
)
def test_what_breaks_the_contract_is_named(kwargs, message):
    env = walks(ends=100.0, **kwargs)
    with pytest.raises(RunError, match=message) as caught:
        play(env, 0, 4)
    assert "\n" not in str(caught.value)


def test_ends_may_be_numpys():
    assert not any(step.terminated.any() or step.truncated.any() for step in play(walks(ends=100.0, fault="numpy end"), 0, 4)[1:])


def test_pictures():
    env = walks(give=("picture",))
    play(env, 0, 2)
    assert torch.equal(env.render(), torch.full((4, 5, 3), 2, dtype=torch.uint8))
    assert walks().render() is None
    with pytest.raises(RunError, match=r"walk: render: expected uint8 \[height, width, 3\] or None, got float64 \[4, 5, 3\]"):
        grey = walks(give=("picture",), fault="picture")
        grey.reset(0)
        grey.render()
    with pytest.raises(RunError, match="walk: render: OSError: no display"):
        walks(fault="raise in render").render()


def test_steps_need_running_episodes():
    env = walks(fault="raise", ends=100.0)
    actions = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(RunError, match="walk: step: expected running episodes, got none: call reset first"):
        env.step(actions)
    env.reset(0)
    env.step(actions)
    for message in ("negative mass", "expected running episodes, got none"):
        with pytest.raises(RunError, match=message):
            env.step(actions)
    with pytest.raises(RunError, match=r"step: actions must be int64 \[2, 5\], got int64 \[2, 4\]"):
        env.step(actions[:, :4])
    env.close()
    env.close()
    with pytest.raises(RunError, match="walk: reset: expected an open environment, got one that was closed"):
        env.reset(0)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("usage", UsageError, r"^unknown option of usage 'colour'$"),
        ("import", ImportError, r"^no module named 'pacman'$"),
        ("value", RunError, rf"^value can't be made: ValueError: field too small \({__file__}:\d+\)$"),
        ("other", RunError, r"^other: expected a SingleEnv with an EnvSpec, got str$"),
        ("unlike", RunError, r"^unlike: expected the same EnvSpec from every copy, got EnvSpec"),
    ],
)
def test_errors_of_making_keep_their_kind(task, kind, message):
    with pytest.raises(kind, match=message):
        Copies(__name__, task, {}, 2, workers=0)


# --- in workers -----------------------------------------------------------------------------------------------------------------
# Each start of a worker imports torch, so as many tests as can be share one environment of two workers: copies 0 and 1, and 2 to 4.


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trouble")
    env = walks(workers=2, give=("avail", "picture"), folder=str(folder))
    yield env, folder
    processes = [one._process for one in env._runner._workers]
    env.close()
    env.close()
    assert all(process is None or process.returncode == 0 for process in processes)


def in_peace() -> Copies:
    """The same without trouble."""
    return walks(give=("avail", "picture"))


def play_into_trouble(env: Copies, step: int = 4) -> list:
    """A reset and 9 steps, with the action that asks for trouble by copy 3 at one of them."""
    chooser = torch.Generator().manual_seed(7)
    seen: list = [env.reset(1)]
    for now in range(9):
        actions = torch.randint(3, (2, 5), generator=chooser)
        if now == step:
            actions[0, 3] = 3
        seen.append(env.step(actions))
    return seen


def process(env: Copies, index: int) -> subprocess.Popen:
    """That of a worker."""
    return env._runner._workers[index]._process  # type: ignore[union-attr, return-value]


def test_workers_keep_the_contract(troubled):
    env, _ = troubled
    passed = check_env(env)
    assert set(passed) >= {"auto-reset", "last reward", "same seed, same episodes", "returned tensors stay", "render"}


def test_results_do_not_depend_on_the_number_of_workers(troubled):
    kwargs = {"give": ("avail", "picture")}
    three = walks(workers=3, **kwargs)
    for seed in (0, 1):
        expected = play(walks(**kwargs), seed, 20)
        assert same(play(troubled[0], seed, 20), expected)
        assert same(play(three, seed, 20), expected)
    three.close()


def test_there_are_no_more_workers_than_copies():
    kwargs = {"sizes": (2, 3, 1), "give": ("alive", "state", "won"), "continuous": True, "ends": 2.0}
    env = walks(1, workers=9, **kwargs)
    assert len(env._runner._workers) == 1 and env.sides == ("right", "left", "right")
    assert same(play(env, 3, 12), play(walks(1, **kwargs), 3, 12))
    env.close()


def test_a_killed_worker_is_restored_to_the_bit(troubled, caplog):
    env, _ = troubled
    before = env.restarts
    expected = play(in_peace(), 2, 20)
    chooser = torch.Generator().manual_seed(7)
    seen: list = [env.reset(2)]
    for now in range(20):
        if now == 15:
            dead = process(env, 1).pid
            os.kill(dead, signal.SIGKILL)
        seen.append(env.step(torch.randint(3, (2, 5), generator=chooser)))
    assert same(seen, expected)
    assert env.restarts == before + 1
    (record,) = caplog.records
    assert record.name == "k24" and record.levelno == logging.WARNING
    assert record.getMessage() == f"walk: worker 1 (process {dead}) was killed by SIGKILL; started again, environments restored: 3"


def test_a_worker_that_ends_within_a_step_is_restored_to_the_bit(troubled, caplog):
    env, folder = troubled
    (folder / "trouble").write_text("exit once")
    before = env.restarts
    assert same(play_into_trouble(env), play_into_trouble(in_peace()))
    assert env.restarts == before + 1
    assert "ended with exit status 3; started again, environments restored: 3" in caplog.text


def test_a_worker_that_hangs_is_ended_and_restored_to_the_bit(troubled, caplog, monkeypatch):
    env, folder = troubled
    (folder / "trouble").write_text("hang once")
    start = worker.Worker.start
    # Little patience until it hangs, and enough again for its successor to start.
    monkeypatch.setattr(worker, "PATIENCE", 4.0)
    monkeypatch.setattr(worker.Worker, "start", lambda self: (setattr(worker, "PATIENCE", 300.0), start(self)))
    assert same(play_into_trouble(env), play_into_trouble(in_peace()))
    assert "gave no answer for 4 s; started again, environments restored: 3" in caplog.text


def test_an_answer_that_nobody_waited_for_is_left(troubled):
    env, _ = troubled
    env.reset(0)
    env._runner._workers[0].ask("render")  # as after Ctrl-C
    assert same(play(env, 0, 5), play(in_peace(), 0, 5))


def test_an_exception_in_a_worker_says_where_and_a_reset_goes_on(troubled):
    env, folder = troubled
    (folder / "trouble").write_text("raise once")
    before = env.restarts
    with pytest.raises(RunError, match=rf"^walk: step: ValueError: a wheel came off \({__file__}:\d+\) \(environment 3\)$"):
        play_into_trouble(env)
    with pytest.raises(RunError, match="expected running episodes"):
        env.step(torch.zeros(2, 5, dtype=torch.int64))
    assert same(play(env, 0, 5), play(in_peace(), 0, 5))
    assert env.restarts == before


def test_an_episode_that_does_not_go_the_same_way_again_is_cut_off(troubled, caplog):
    env, folder = troubled
    (folder / "noise").touch()
    actions = torch.zeros(2, 5, dtype=torch.int64)
    env.reset(0)
    env.step(actions)
    last = env.step(actions)
    assert not (last.terminated | last.truncated).any()
    process(env, 1).kill()
    step = env.step(actions)
    (folder / "noise").unlink()
    assert step.truncated.tolist() == [False, False, True, True, True] and not step.terminated.any()
    assert (step.reward[:, 2:] == 0).all() and (step.reward[:, :2] != 0).all()
    for after, seen, current in zip(*((one.obs, one.avail) for one in (step.after, last.current, step.current)), strict=True):
        assert torch.equal(after[:, 2:], seen[:, 2:]) and torch.equal(after[:, :2], current[:, :2])
    fresh = [Walk().reset(episode_seed(0, copy, 1)).obs[0][0] for copy in (2, 3, 4)]
    torch.testing.assert_close(step.current.obs[0, 2:, 0], torch.tensor(np.array(fresh, np.float32)), rtol=0, atol=0)
    assert "environments restored: 0, cut short as they did not go the same way again: 3" in caplog.text
    following = [env.step(actions) for _ in range(6)]
    assert [one.truncated.tolist() for one in following[:4]] == [[False] * 5] * 2 + [[True] * 2 + [False] * 3] + [[False] * 5]
    assert following[5].truncated.tolist() == [False] * 2 + [True] * 3


def test_a_worker_that_always_ends_is_given_up(troubled):
    env, folder = troubled
    (folder / "trouble").write_text("exit")
    with pytest.raises(RunError, match=r"walk: step: worker 1 \(process \d+\) ended with exit status 3, the last of 3 in a row; fewer env"):
        play_into_trouble(env)
    (folder / "trouble").unlink()
    assert same(play(env, 0, 5), play(in_peace(), 0, 5)), "a reset starts it again"


def test_errors_of_making_keep_their_kind_from_a_worker():
    with pytest.raises(UsageError, match=r"^unknown option of usage 'colour'$"):
        Copies(__name__, "usage", {}, 2, workers=1)


@pytest.mark.parametrize("error", [UsageError("size 0"), RunError("broke"), ImportError("no module"), OSError("no space\nleft")])
def test_errors_that_workers_send_are_of_a_kind_that_callers_know(error):
    sent = pickle.loads(pickle.dumps(worker._portable(error)))
    if isinstance(error, OSError):
        assert type(sent) is RunError and str(sent) == "OSError: no space left"
    else:
        assert type(sent) is type(error) and str(sent) == str(error)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("task", "fault", "said"),
    [
        ("exit", "", r"^exit can't be made: SystemExit \(.*:\d+\)$"),
        ("walk", "exit in reset", r"^walk: reset: SystemExit: 0 \(.*:\d+\) \(environment 0\)$"),
        ("walk", "exit", r"^walk: step: SystemExit: that's it \(.*:\d+\) \(environment 0\)$"),
    ],
)
def test_sys_exit_in_a_simulator_is_an_error_like_any_other(workers, task, fault, said):
    with pytest.raises(RunError, match=said):
        play(Copies(__name__, task, {"fault": fault} if fault else {}, 2, workers=workers), 0, 3)


@pytest.mark.parametrize("fault", ["raise in close", "exit in close"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_simulator_that_fails_at_its_end_spoils_nothing(workers, fault, caplog, capfd):
    env = walks(2, workers=workers, fault=fault)
    play(env, 0, 2)
    env.close()
    said = "walk: close: " + ("OSError: already gone" if "raise" in fault else "SystemExit: 0")
    assert (caplog.text if workers == 0 else capfd.readouterr().err).count(said) == 2


def test_options_that_can_not_be_sent_are_refused():
    with pytest.raises(UsageError, match=r"walk: expected options that can be sent to workers, got .*; use workers=0"):
        walks(workers=1, give=lambda: None)


def test_nothing_is_left_when_the_parent_is_killed(tmp_path):
    code = (
        f"import sys, torch; from k24.envs.copies import Copies; env = Copies({__name__!r}, 'walk', {{'chatty': True}}, 2, workers=2);"
        "env.reset(0); env.step(torch.zeros(2, 2, dtype=torch.int64)); print('ready', flush=True); sys.stdin.read()"
    )
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n", "what simulators print does not come first"
        parent.kill()
        # Ends only when the last process that can write to these is gone.
        out, err = parent.communicate(timeout=60)
    assert out == "" and err.count("the simulator talks") == 2
    assert list(tmp_path.iterdir()) == []
