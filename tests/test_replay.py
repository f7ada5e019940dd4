"""Memory of episodes, and how they get there."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.errors import RunError
from k24.learners import EpisodeReplay, Episodes, NetActor, RandomActor, TransitionReplay, collect_episodes
from k24.learners.replay import EPISODE_AXIS
from k24.learners.rollout import epsilon_greedy
from k24.nets import AgentNet
from k24.sharing import make_sharing

CPU = torch.device("cpu")
SPEC = EnvSpec(n_agents=2, obs_dim=3, state_dim=4, n_actions=5, episode_limit=6)


def marked(names: list[int], avail: bool = False) -> Episodes:
    """Episodes whose every field carries their number."""
    batch = Episodes.empty(SPEC, len(names), CPU, avail)
    numbers = torch.tensor(names)
    batch.obs += numbers[:, None]
    batch.state += numbers[:, None]
    batch.actions += numbers
    batch.reward += numbers
    batch.terminated |= numbers % 2 == 0
    batch.valid |= torch.arange(SPEC.episode_limit)[:, None] <= numbers % SPEC.episode_limit
    if batch.avail is not None:
        batch.avail &= (numbers % 2 == 1)[:, None]
    return batch


def numbers_of(batch: Episodes) -> list[int]:
    """The episodes' numbers; every field must agree on them, cut to the longest."""
    names = batch.actions[0, 0].tolist()
    again = marked(names, batch.avail is not None)
    longest = max(name % SPEC.episode_limit + 1 for name in names)
    again = Episodes(
        again.obs[:, : longest + 1],
        again.state[: longest + 1],
        None if again.avail is None else again.avail[:, : longest + 1],
        again.actions[:, :longest],
        again.reward[:, :longest],
        again.terminated[:longest],
        again.valid[:longest],
    )
    for field in fields(Episodes):
        mine, expected = getattr(batch, field.name), getattr(again, field.name)
        assert (mine is None) == (expected is None)
        assert mine is None or torch.equal(mine, expected), field.name
    return names


def contents(replay: EpisodeReplay) -> list[int]:
    return sorted(numbers_of(replay.sample(replay.size, torch.Generator().manual_seed(0))))


# --- ring buffer -----------------------------------------------------------------------------------------------------------------


def test_the_oldest_episodes_make_room() -> None:
    replay = EpisodeReplay(5, CPU)
    for names, kept in (
        ([1, 2, 3], [1, 2, 3]),
        ([4], [1, 2, 3, 4]),
        ([5, 6, 7], [3, 4, 5, 6, 7]),  # across the end
        ([8, 9, 10, 11, 12], [8, 9, 10, 11, 12]),  # all at once
    ):
        replay.add(marked(names))
        assert contents(replay) == kept
        assert replay.size == len(kept)


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
def test_it_always_holds_the_newest(capacity: int, batches: list[int], avail: bool) -> None:
    replay, added = EpisodeReplay(capacity, CPU), 0
    for count in batches:
        count = min(count, capacity)
        replay.add(marked(list(range(added, added + count)), avail))
        added += count
        assert contents(replay) == list(range(max(0, added - capacity), added))


def test_of_a_batch_larger_than_all_room_the_last_are_kept() -> None:
    replay = EpisodeReplay(3, CPU)
    replay.add(marked([1]))
    replay.add(marked([2, 3, 4, 5, 6]))
    assert contents(replay) == [4, 5, 6]
    replay.add(marked([7]))
    assert contents(replay) == [5, 6, 7], "the oldest makes room, wherever it lies"


def test_what_is_sampled_is_a_copy() -> None:
    replay = EpisodeReplay(3, CPU)
    batch = marked([1, 2, 3])
    replay.add(batch)
    batch.obs.fill_(99.0)
    replay.sample(3, torch.Generator()).reward.fill_(99.0)
    assert contents(replay) == [1, 2, 3]


# --- sampling --------------------------------------------------------------------------------------------------------------------


def test_sampling_is_without_replacement_uniform_and_repeatable() -> None:
    replay = EpisodeReplay(20, CPU)
    replay.add(marked(list(range(10))))
    g = torch.Generator().manual_seed(3)
    counts = torch.zeros(10)
    for _ in range(500):
        names = numbers_of(replay.sample(4, g)) if counts.sum() < 40 else replay.sample(4, g).actions[0, 0].tolist()
        assert len(set(names)) == 4
        counts[names] += 1
    # Each episode is in four tenths of the batches: 200 times, with a standard deviation of 11.
    assert counts.sum() == 2000
    assert float((counts - 200).abs().max()) < 40
    draws = [numbers_of(replay.sample(10, torch.Generator().manual_seed(5))) for _ in range(2)]
    assert draws[0] == draws[1] != sorted(draws[0])
    assert sorted(draws[0]) == list(range(10))


# --- transitions -----------------------------------------------------------------------------------------------------------------


def whose_moments(lengths: list[int], first: int, continuous: bool, alive: bool) -> Episodes:
    """Episodes that say in every field whose moment it is: number times 100 plus time. Behind the end there is nothing but NaN."""
    spec = EnvSpec(2, 3, 1, 2, 6, continuous)
    batch = Episodes.empty(spec, len(lengths), CPU, avail=False, alive=alive)
    length = torch.tensor(lengths)
    moment = 100.0 * (first + torch.arange(len(lengths))) + torch.arange(7.0)[:, None]
    agents = torch.tensor([0.0, 0.25])[:, None, None]
    seen = torch.arange(7)[:, None] <= length
    batch.valid[:] = seen[1:]
    batch.obs[:] = torch.where(seen, moment + agents, torch.nan)[..., None]
    batch.state[:] = torch.where(seen, moment, torch.nan)[..., None]
    batch.reward[:] = torch.where(batch.valid, (moment[:-1] % 7) * torch.tensor([1.0, 10.0])[:, None, None], torch.nan)
    batch.actions[:] = (moment[:-1] + agents)[..., None] if continuous else (moment[:-1] + 1000 * agents).long()
    for k, n in enumerate(lengths):
        batch.terminated[n - 1, k] = (first + k) % 2 == 0  # a time limit ends the odd ones
    if batch.alive is not None:
        batch.alive[:] = (moment + 4 * agents) % 3 < 2
    return batch


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    round_size=st.integers(1, 4),
    room=st.integers(7, 40),
    n_step=st.integers(1, 8),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    continuous=st.booleans(),
    alive=st.booleans(),
)
def test_transitions_against_a_walk_through_the_episodes(
    lengths: list[int], round_size: int, room: int, n_step: int, gamma: float, continuous: bool, alive: bool
) -> None:
    replay = TransitionReplay(room, CPU)
    g = torch.Generator().manual_seed(0)
    for first in range(0, len(lengths), round_size):
        replay.add(whose_moments(lengths[first : first + round_size], first, continuous, alive))
        replay.sample(3, n_step, gamma, g)  # what was played is counted again after each round
    drawn = replay.sample(60, n_step, gamma, g)
    assert (drawn.alive is not None) == (drawn.next_alive is not None) == alive
    # Moments in the order of play, an episode's last included: the newest are kept, whichever episode they cut.
    kept = {(number, t) for number, length in enumerate(lengths) for t in range(length + 1)}
    kept = set(sorted(kept)[-room:])
    visited = set()
    for k in range(60):
        number, t = divmod(int(drawn.state[k, 0]), 100)
        visited.add((number, t))
        steps = min(n_step, lengths[number] - t)
        rewards = [11.0 * ((100 * number + t + j) % 7) for j in range(steps)]
        ended = t + steps == lengths[number] and number % 2 == 0
        moment, later = 100.0 * number + t, 100.0 * number + t + steps
        assert drawn.returns[k] == pytest.approx(sum(gamma**j * r for j, r in enumerate(rewards)))
        assert drawn.discount[k] == pytest.approx(0.0 if ended else gamma**steps)
        assert drawn.next_state[k, 0] == later
        for agent in range(2):
            here = not alive or (moment + agent) % 3 < 2
            assert (drawn.obs[agent, k] == moment + 0.25 * agent).all()
            assert (drawn.next_obs[agent, k] == later + 0.25 * agent).all()
            assert (drawn.actions[agent, k] == (moment + (0.25 if continuous else 250) * agent if here else 0)).all()
            if drawn.alive is not None and drawn.next_alive is not None:
                assert drawn.alive[agent, k] == here
                assert drawn.next_alive[agent, k] == ((later + agent) % 3 < 2)
    assert visited <= {(number, t) for number, t in kept if t < lengths[number]}
    assert drawn.actions.dtype == (torch.float32 if continuous else torch.int64)
    assert drawn.actions.shape == ((2, 60, 2) if continuous else (2, 60))


def test_every_step_is_as_likely_as_any_other() -> None:
    replay = TransitionReplay(30, CPU)
    replay.add(whose_moments([1, 6, 3], 0, True, False))
    drawn = replay.sample(10_000, 2, 0.9, torch.Generator().manual_seed(0))
    moments, counts = drawn.state[:, 0].unique(return_counts=True)
    assert moments.tolist() == [0, 100, 101, 102, 103, 104, 105, 200, 201, 202]
    # A thousand each, with a standard deviation of 30.
    assert (counts - 1000).abs().max() < 120
    again = replay.sample(10_000, 2, 0.9, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.state, again.state)


def test_transitions_after_a_round_trip() -> None:
    replay, other = (TransitionReplay(30, CPU) for _ in range(2))
    other.add(whose_moments([6, 6], 50, True, True))
    other.sample(1, 1, 0.9, torch.Generator())
    replay.add(whose_moments([1, 6, 3], 0, True, True))
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    draws = [r.sample(50, 3, 0.9, torch.Generator().manual_seed(0)) for r in (replay, other)]
    for mine, theirs in zip(*draws, strict=True):
        assert torch.equal(mine, theirs)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("avail", [False, True])
@pytest.mark.parametrize("added", [0, 3, 5, 7])
def test_state_round_trip(added: int, avail: bool) -> None:
    replay, other = EpisodeReplay(5, CPU), EpisodeReplay(5, CPU)
    for k in range(added):
        replay.add(marked([k], avail))
    state = copy.deepcopy(replay.state_dict())
    for name, value in state["data"].items():
        assert value is None or value.shape[EPISODE_AXIS[name]] == min(added, 5), "only what is filled is saved"
    other.load_state_dict(state)
    for more in ([100, 101], [102, 103, 104]):
        replay.add(marked(more, avail))
        other.add(marked(more, avail))
        assert replay.size == other.size
        draws = [numbers_of(r.sample(4, torch.Generator().manual_seed(1))) for r in (replay, other)]
        assert draws[0] == draws[1]


# --- playing ---------------------------------------------------------------------------------------------------------------------


class Clock(TeamEnv):
    """Environment k ends after k+1 steps: even ones because the task does, odd ones by a time limit. All see the time and their number."""

    def __init__(self, n_envs: int, bad: float | None = None) -> None:
        self.spec, self.n_envs, self.device, self.bad = EnvSpec(2, 2, 1, 3, n_envs), n_envs, CPU, bad

    def _see(self, time: Tensor) -> Observation:
        obs = torch.stack([time.float(), torch.arange(self.n_envs).float()], -1).expand(2, -1, -1)
        return Observation(obs, time[:, None].float(), torch.tensor([True, False, True]).expand(2, self.n_envs, 3))

    def reset(self, seed: int) -> Observation:
        self.time, self.taken = torch.zeros(self.n_envs, dtype=torch.int64), []
        return self._see(self.time)

    def step(self, actions: Tensor) -> Step:
        self.taken.append(actions.clone())
        self.time = self.time + 1
        reward = self.time.float().expand(2, -1) * torch.tensor([[1.0], [10.0]])
        if self.bad is not None:
            reward = reward * self.bad
        after = self._see(self.time)
        ended = self.time == torch.arange(self.n_envs) + 1
        even = torch.arange(self.n_envs) % 2 == 0
        self.time = torch.where(ended, 0, self.time)
        return Step(after, self._see(self.time), reward, ended & even, ended & ~even)


def test_an_episode_is_recorded_up_to_its_end_and_no_further() -> None:
    env = Clock(4)
    batch = collect_episodes(env, RandomActor(3, torch.Generator().manual_seed(0)), seed=0)
    length = torch.arange(4) + 1
    time = torch.arange(4)[:, None]
    assert torch.equal(batch.valid, time < length)
    assert torch.equal(batch.terminated, (time == length - 1) & (length % 2 == 1)), "a time limit does not end the task"
    assert batch.steps == 10
    assert batch.count == 4
    assert batch.returns().tolist() == [11.0, 33.0, 66.0, 110.0]
    assert torch.equal(batch.actions, torch.stack(env.taken, 1))
    assert set(batch.actions.unique().tolist()) == {0, 2}, "action 1 is not available"
    for k in range(4):
        assert batch.obs[0, : k + 2, k, 0].tolist() == list(range(k + 2)), "the last one is what the action led to, not the new episode"
        assert batch.state[: k + 2, k, 0].tolist() == list(range(k + 2))
    assert torch.equal(batch.obs[..., 1], torch.arange(4.0).expand(2, 5, 4))
    assert batch.avail is not None
    assert not batch.avail[..., :4, :, 1].any()


def test_collecting_stops_when_all_episodes_have_ended() -> None:
    env = Clock(3)
    env.spec = EnvSpec(2, 2, 1, 3, 50)
    collect_episodes(env, RandomActor(3, torch.Generator()), seed=0)
    assert len(env.taken) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_reported(bad: float) -> None:
    with pytest.raises(RunError, match="the environment gave a reward that is NaN or infinite"):
        collect_episodes(Clock(3, bad), RandomActor(3, torch.Generator()), seed=0)


def test_the_actor_is_greedy_among_what_it_may_do_and_remembers() -> None:
    net = AgentNet(2, 3, 8, 2, make_sharing("nops", 2))
    weights = net.snapshot("act")
    env = Clock(4)
    batch = collect_episodes(env, NetActor(net, weights), seed=0)
    with torch.no_grad():
        q, _ = net(weights, batch.obs[:, :-1], net.initial_state(4))
    q[..., 1] = -torch.inf
    assert torch.equal(batch.actions[:, batch.valid], q.argmax(-1)[:, batch.valid])


@pytest.mark.parametrize(("epsilon", "share"), [(0.0, 0.0), (0.5, 0.25), (1.0, 0.5)])
def test_exploration_is_uniform_over_what_is_available(epsilon: float, share: float) -> None:
    net = AgentNet(2, 3, 8, 2, make_sharing("fups", 2))
    actor = NetActor(net, net.snapshot("act"), epsilon_greedy(epsilon, torch.Generator().manual_seed(0)))
    actor.reset(4000)
    seen = Observation(torch.ones(2, 4000, 2), torch.zeros(4000, 1), torch.tensor([True, False, True]).expand(2, 4000, 3))
    actions = actor(seen)
    assert (actions != 1).all()
    greedy = NetActor(net, net.snapshot("act"))
    greedy.reset(4000)
    # Of the random actions, half are the greedy one anyway.
    assert float((actions != greedy(seen)).float().mean()) == pytest.approx(share, abs=0.03)
