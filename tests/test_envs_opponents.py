"""Playing one side against opponents that do not learn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from k24.envs import Observation, Step, TeamEnv, check_env, make_env
from k24.envs.base import EnvSpec
from k24.envs.opponents import FixedOpponents
from k24.errors import RunError, UsageError
from k24.kernels import GRU, Linear, Net
from k24.policy import PolicySpec, load_policy, save_policy


class _Duel(TeamEnv):
    """Agents "red", "blue", "red": everyone sees the clock of its environment and its own index; environment e ends after 2 + e steps."""

    sides = ("red", "blue", "red")

    def __init__(self, n_envs: int = 3, continuous: bool = False, masked: bool = False) -> None:
        self.n_envs, self.device = n_envs, torch.device("cpu")
        self.spec = EnvSpec(3, 2, 1, 4, 1 + n_envs, continuous)
        self.masked = masked
        self.played: list[torch.Tensor] = []
        self.closed = 0

    def reset(self, seed: int) -> Observation:
        self.clock = torch.zeros(self.n_envs)
        return self._see()

    def step(self, actions: torch.Tensor) -> Step:
        self.played.append(actions.clone())
        self.clock = self.clock + 1
        after = self._see()
        ended = self.clock == torch.arange(self.n_envs) + 2
        self.clock = self.clock.masked_fill(ended, 0)
        reward = actions.float() if not self.spec.continuous else actions.sum(-1)
        self.restarts += 1
        return Step(after, self._see() if ended.any() else after, reward, ended, torch.zeros_like(ended), ended)

    def close(self) -> None:
        self.closed += 1

    def _see(self) -> Observation:
        obs = torch.stack([self.clock.expand(3, -1), torch.arange(3.0)[:, None].expand(-1, self.n_envs)], -1)
        avail = None
        if self.masked:
            # Agent a may take actions a and 3.
            avail = torch.nn.functional.one_hot(torch.arange(3), 4).bool() | torch.tensor([False, False, False, True])
            avail = avail[:, None].expand(-1, self.n_envs, -1).contiguous()
        return Observation(obs, self.clock[:, None], avail, torch.ones(3, self.n_envs, dtype=torch.bool))


class _Counter:
    """Its state counts the steps since it was cleared; it plays that number, and remembers what it was shown."""

    def __init__(self, n_agents: int, **sizes: int) -> None:
        self.spec = SimpleNamespace(**({"n_agents": n_agents, "obs_dim": 2, "n_actions": 4} | sizes))
        self.shown: list[torch.Tensor] = []

    def act(self, obs, state=None, *, avail=None):
        self.shown.append(obs)
        state = torch.zeros(*obs.shape[:2], 5) if state is None else state
        return state[..., 0].long(), state + 1


def test_only_our_rows_are_seen_and_both_sides_are_played():
    inner, policy = _Duel(), _Counter(1)
    env = FixedOpponents(inner, "red", policy)
    assert env.spec == EnvSpec(2, 2, 1, 4, 4) and env.sides is None and env.n_envs == 3
    obs = env.reset(0)
    assert obs.obs[..., 1].tolist() == [[0] * 3, [2] * 3] and obs.alive.shape == (2, 3)
    step = env.step(torch.tensor([[3, 2, 1], [1, 2, 3]]))
    assert inner.played[0].tolist() == [[3, 2, 1], [0, 0, 0], [1, 2, 3]] and policy.shown[0][..., 1].tolist() == [[1] * 3]
    assert step.reward.tolist() == [[3, 2, 1], [1, 2, 3]] and step.after is step.current and step.won.shape == (3,)
    assert step.after.obs[..., 1].tolist() == [[0] * 3, [2] * 3] and step.after.state.tolist() == [[1]] * 3
    assert env.restarts == 1
    env.close()
    assert inner.closed == 1


def test_opponents_forget_where_an_episode_ends_and_nowhere_else():
    inner = _Duel()
    env = FixedOpponents(inner, "red", _Counter(1))
    env.reset(0)
    for t in range(9):
        step = env.step(torch.zeros(2, 3, dtype=torch.int64))
        # Environment e plays episodes of 2 + e steps: the opponent's memory is as old as its episode.
        assert inner.played[-1][1].tolist() == [t % 2, t % 3, t % 4]
        assert (step.after is step.current) == (not step.terminated.any())
    env.reset(0)
    env.step(torch.zeros(2, 3, dtype=torch.int64))
    assert inner.played[-1][1].tolist() == [0, 0, 0]


def test_a_policy_of_everybody_plays_the_rows_of_the_other_side():
    inner, policy = _Duel(), _Counter(3)
    env = FixedOpponents(inner, "blue", policy)
    assert env.spec.n_agents == 1
    env.reset(0)
    for t in range(2):
        env.step(torch.full((1, 3), 3))
        assert inner.played[-1].tolist() == [[t] * 3, [3] * 3, [t] * 3] and policy.shown[-1].shape == (3, 3, 2)


@pytest.mark.parametrize("continuous", [False, True])
def test_random_opponents_are_seeded_and_keep_to_what_is_available(continuous):
    inner = _Duel(n_envs=40, continuous=continuous, masked=not continuous)
    env = FixedOpponents(inner, "blue", "random")
    ours = torch.zeros(1, 40, 4) if continuous else torch.full((1, 40), 3)
    for seed in (0, 0, 1):
        env.reset(seed)
        for _ in range(3):
            env.step(ours)
    first, again, other = (torch.stack(inner.played[k : k + 3])[:, [0, 2]] for k in (0, 3, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    if continuous:
        assert first.min() < -0.9 and first.max() > 0.9 and first.shape == (3, 2, 40, 4)
    else:
        assert set(first[:, 0].flatten().tolist()) == {0, 3} and set(first[:, 1].flatten().tolist()) == {2, 3}


@pytest.mark.parametrize("options", [{}, {"continuous_actions": True}])
@pytest.mark.parametrize("side", ["adversary", "good"])
def test_simple_tag_with_random_opponents_keeps_the_contract(side, options):
    pytest.importorskip("vmas")
    passed = check_env(lambda: FixedOpponents(make_env("mpe/simple_tag", 3, max_steps=5, **options), side))
    assert {"auto-reset", "other seed, other episodes", "two beside each other", "close twice"} <= set(passed)


def test_mpe2_tasks_have_sides_too():
    pytest.importorskip("mpe2")
    passed = check_env(lambda: FixedOpponents(make_env("mpe2/simple_adversary", 2, max_steps=5, workers=0), "good"))
    assert {"auto-reset", "two beside each other"} <= set(passed)


@pytest.fixture
def prey(tmp_path):
    """A policy file for the one good agent of simple_tag, of a net with a memory."""
    torch.manual_seed(0)

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(torch.randn(1, outputs, inputs), torch.randn(1, outputs))

    net = Net((linear(16, 8), GRU(linear(8, 24), linear(8, 24)), linear(8, 9)), 1)
    save_policy(tmp_path / "prey.safetensors", net, PolicySpec("mpe/simple_tag", "iql", "fups", 1, 1, 16, 9, False))
    return load_policy(tmp_path / "prey.safetensors", backend="reference")


def test_a_policy_file_plays_as_it_would_by_hand(prey):
    pytest.importorskip("vmas")
    env = FixedOpponents(make_env("mpe/simple_tag", 4, max_steps=4), "adversary", prey)
    inner = make_env("mpe/simple_tag", 4, max_steps=4)
    assert env.spec == EnvSpec(3, 16, inner.spec.state_dim, 9, 4)
    ours, everybody = env.reset(5), inner.reset(5)
    chooser, state, moves = torch.Generator().manual_seed(0), None, set()
    for t in range(10):
        assert torch.equal(ours.obs, everybody.obs[:3]) and torch.equal(ours.state, everybody.state)
        actions = torch.randint(9, (3, 4), generator=chooser)
        fled, state = prey.act(everybody.obs[3:], state)
        moves |= set(fled.flatten().tolist())
        step, whole = env.step(actions), inner.step(torch.cat([actions, fled]))
        assert torch.equal(step.reward, whole.reward[:3]) and torch.equal(step.after.obs, whole.after.obs[:3])
        if t % 4 == 3:
            assert step.truncated.all()
            state = None
        ours, everybody = step.current, whole.current
    assert len(moves) > 1


def test_wrong_sides_and_opponents_are_errors():
    with pytest.raises(UsageError, match=r"unknown side 'rad': did you mean 'red'"):
        FixedOpponents(_Duel(), "rad")
    with pytest.raises(UsageError, match=r"side 'red': this task has one side only"):
        FixedOpponents(make_env("toy/matrix", 2), "red")
    with pytest.raises(UsageError, match=r"unknown kind of opponents 'randon': did you mean 'random'"):
        FixedOpponents(_Duel(), "red", "randon")
    with pytest.raises(
        UsageError, match=r"\(agents, observation, actions\) = \(2, 2, 4\) can't play the other side, which has \(1, 2, 4\)"
    ):
        FixedOpponents(_Duel(), "red", _Counter(2))
    with pytest.raises(UsageError, match=r"= \(1, 7, 4\) can't play"):
        FixedOpponents(_Duel(), "red", _Counter(1, obs_dim=7))
    for pair in ((None, "random"), ("red", None), (3, "random"), ("red", 3)):
        with pytest.raises(UsageError, match="side and opponents go together: side=adversary opponents=random"):
            FixedOpponents(_Duel(), *pair)
    with pytest.raises(UsageError, match="opponents: this policy must be told a slot for each agent"):
        FixedOpponents(_Duel(), "red", _Counter(1, slots="given"))
    env = FixedOpponents(_Duel(continuous=True), "red", _Counter(1))
    env.reset(0)
    with pytest.raises(RunError, match=r"opponents: actions must be float32 \[1, 3, 4\], got int64 \[1, 3\]"):
        env.step(torch.zeros(2, 3, 4))
