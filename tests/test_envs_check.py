"""The conformance test of environments: a good one passes, and each fault is named."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from k24.envs import EnvSpec, Observation, Step, TeamEnv, check_env
from k24.errors import RunError, UsageError


class _Walk(TeamEnv):
    """Two agents on a line: a good environment, with one fault to choose."""

    shared = torch.Generator()

    def __init__(self, fault: str = "", n_envs: int = 3) -> None:
        self.fault, self.n_envs, self.device = fault, n_envs, torch.device("cpu")
        self.sides = ("left",) if fault == "sides" else None
        self.may_cut = fault == "cuts"
        self.spec = EnvSpec(n_agents=2, obs_dim=1, state_dim=2, n_actions=3, episode_limit=6) if fault != "spec" else {}
        self._own = self.shared if fault == "shared generator" else torch.Generator()
        self._drift = 0.0

    def _draw(self) -> torch.Tensor:
        n = 1 if self.fault == "same start" else self.n_envs
        if self.fault == "global generator":
            return torch.rand(2, n)
        if self.fault == "reads global":
            with torch.random.fork_rng(devices=[]):
                return torch.rand(2, n)
        if self.fault == "numpy":
            return torch.as_tensor(np.random.rand(2, n), dtype=torch.float32)
        return torch.rand(2, n, generator=self._own).expand(2, self.n_envs)

    def _see(self) -> Observation:
        obs = self._x.unsqueeze(-1).clone()
        if self.fault == "buffer":
            self._buffer = getattr(self, "_buffer", obs)
            obs = self._buffer.copy_(obs)
        if self.fault == "dtype":
            obs = obs.double()
        if self.fault == "nan":
            obs[1, 0] = float("nan")
        avail = torch.ones(2, self.n_envs, 3, dtype=torch.bool)
        avail[0, 1] = self.fault != "stuck"
        return Observation(obs, self._x.T.clone(), avail)

    def reset(self, seed: int) -> Observation:
        self._own.manual_seed(0 if self.fault == "seed" else seed)
        self._t = torch.zeros(self.n_envs, dtype=torch.int64)
        self._x = self._draw().clone() + (self._drift if self.fault == "keeps" else 0.0)
        return self._see()

    def step(self, actions: torch.Tensor) -> Step:
        self._x = self._x + actions - 1
        self._drift += 0.5
        self._t += 1
        reward = self._x[:1].clone() if self.fault == "reward shape" else self._x.clone()
        terminated = (self._x > 3).all(0)
        truncated = self._t >= (4 if self.fault in ("early", "cuts") else 6)
        if self.fault == "endless":
            truncated = torch.zeros_like(terminated)
        if self.fault != "both":
            truncated = truncated & ~terminated
        else:
            terminated = terminated | (self._t >= 6)
        ended = terminated | truncated
        if self.fault == "costs":
            reward = -torch.ones_like(reward)
        if self.fault in ("last reward", "costs"):
            reward[:, ended] = 0
        if self.fault == "falls":  # paid while it stands
            terminated = (self._x > 1).all(0)
            truncated, ended = truncated & ~terminated, truncated | terminated
            reward = (~terminated).float().expand(2, -1).clone()
        after = self._see()
        if ended.any() or self.fault == "two objects":
            if self.fault != "no restart":
                self._x = torch.where(ended, self._draw(), self._x)
            if self.fault != "clock":
                self._t = torch.where(ended, 0, self._t)
            current = self._see()
            after = current if self.fault == "last observation" else after
        else:
            current = after
        return (after, reward) if self.fault == "tuple" else Step(after, current, reward, terminated, truncated)


def test_check_env_passes_a_good_environment_and_leaves_the_generators_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    passed = check_env(_Walk)
    assert torch.equal(torch.rand(2), expected[0]) and (np.random.rand(), random.random()) == expected[1:]
    assert set(passed) >= {"spec", "auto-reset", "last reward", "episode_limit", "same seed, same episodes", "other seed, other episodes"}
    assert set(passed) - set(check_env(_Walk())) == {"two beside each other", "close twice"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("spec", r"_Walk.spec: expected an EnvSpec, got dict"),
        ("sides", r"_Walk.sides: expected one for each of 2 agents, got \('left',\)"),
        ("early", r"truncated at the episode_limit \(=6\) only, got in environment 0 after 4 steps of its episode"),
        ("dtype", r"_Walk.reset: expected the result.obs to be float32 \[2, 3, 1\] on cpu, got float64 \[2, 3, 1\] on cpu"),
        ("reward shape", r"_Walk.step: expected reward to be float32 \[2, 3\] on cpu, got float32 \[1, 3\] on cpu"),
        ("tuple", r"_Walk.step: expected a Step, got tuple"),
        ("nan", r"_Walk.reset: expected the result.obs to be finite, got nan"),
        ("stuck", r"at least one action for each agent, got none for agent 0 in environment 1"),
        ("both", r"terminated and truncated never both, got both in environment \d"),
        ("two objects", r"after and current to be one object where no episode ended, got two"),
        ("endless", r"every episode to end within episode_limit \(=6\) steps, got environment \d goes on after 6"),
        ("clock", r"truncated at the episode_limit \(=6\) only, got in environment \d after 1 steps of its episode"),
        ("no restart", r"after to hold the last observation .*, got after equal to current at each end"),
        ("last observation", r"after to hold the last observation .*, got after equal to current at each end"),
        ("last reward", r"the reward of an episode's last step, got 0 at each last step"),
        ("buffer", r"tensors that stay as they were returned, got those of call 0 overwritten"),
        ("seed", r"_Walk.reset: expected another start for another seed \(=1\), got the one of seed 0; the seed is not heeded"),
        ("same start", r"parallel environments that start differently, as they do with another seed"),
        ("keeps", r"the same first observation for the same seed \(=0\), got another"),
        ("global generator", r"_Walk.reset: expected global generators undisturbed, got that of torch changed"),
        ("numpy", r"_Walk.reset: expected global generators undisturbed, got that of numpy changed"),
        ("reads global", r"the same first observation for the same seed \(=0\), got another; does it draw from a global generator"),
        ("shared generator", r"the same episodes with a second environment beside it, got others"),
    ],
)
def test_check_env_names_the_fault(fault, message):
    with pytest.raises(RunError, match=message):
        check_env(lambda: _Walk(fault))


def test_check_env_refuses_what_is_no_environment():
    with pytest.raises(RunError, match="expected a TeamEnv or a function that makes one, got dict"):
        check_env(dict)


@pytest.mark.parametrize(("honest", "passed"), [("costs", set()), ("cuts", {"last reward"}), ("falls", set())])
def test_check_env_does_not_cry_wolf(honest, passed):
    """Where each step costs and the last is free, where a simulator has limits of its own, where the step that loses is not paid."""
    assert set(check_env(lambda: _Walk(honest))) >= {"auto-reset", *passed}


def test_the_second_environment_is_closed_last():
    """There are environments whose ``close`` closes what all of their kind draw with."""
    closed = []

    class Drawn(_Walk):
        def render(self):
            assert not closed
            return torch.zeros(2, 2, 3, dtype=torch.uint8)

        def close(self):
            closed.append(self)

    assert {"render", "close twice", "two beside each other"} <= set(check_env(Drawn))
    assert len(closed) == 3 and closed[0] is closed[1]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *((name, 0, "a whole number of at least 1") for name in ("n_agents", "obs_dim", "state_dim", "n_actions", "episode_limit")),
        ("n_agents", 2.0, "a whole number of at least 1"),
        ("episode_limit", None, "a whole number of at least 1"),
        ("obs_dim", True, "a whole number of at least 1"),
        ("continuous", "yes", "True or False"),
        ("unit_types", (0, 5), r"None or \(start, stop\) with 0 <= start < stop <= obs_dim \(=4\)"),
        ("unit_types", (1, 1), "None or"),
        ("unit_types", (0, 1, 2), "None or"),
        ("unit_types", 3, "None or"),
        ("unit_types", "01", "None or"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_by_name(field, value, expected):
    sizes = {"n_agents": 2, "obs_dim": 4, "state_dim": 8, "n_actions": 3, "episode_limit": 5, field: value}
    with pytest.raises(UsageError, match=f"^EnvSpec: {field} must be {expected}.*, got {re.escape(repr(value))}$"):
        EnvSpec(**sizes)


def test_sizes_of_numpy_become_pythons():
    two, four = np.int64(2), np.int32(4)
    spec = EnvSpec(two, four, four, two, four, np.True_, [np.int8(1), four])
    assert spec == EnvSpec(2, 4, 4, 2, 4, True, (1, 4)) and hash(spec) == hash(EnvSpec(2, 4, 4, 2, 4, True, (1, 4)))
    assert json.dumps(asdict(spec))
