"""IPPO and MAPPO: how a round is judged, the steps taken on it, and what neither may see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.errors import RunError
from k24.learners import PPOConfig, PPOLearner
from k24.learners.ppo import _Played
from k24.learners.replay import Episodes
from k24.sharing import K24Config, SharingConfig, make_sharing
from k24.sparse import MaskedLinear
from k24.sparse.scoring import MaskForward
from k24.sparse.slots import by_unit_type

AGENTS, OBS, STATE, ACTIONS = 2, 3, 4, 3
CPU = torch.device("cpu")


def some_spec(continuous: bool = False, steps: int = 5, agents: int = AGENTS) -> EnvSpec:
    return EnvSpec(agents, OBS, STATE, ACTIONS, steps, continuous)


def some_episodes(spec: EnvSpec, lengths: list[int], terminated: bool = True, alive: bool = False, seed: int = 0) -> Episodes:
    """Episodes full of random numbers, behind their end too; the task ends the even ones and a time limit the others."""
    g = torch.Generator().manual_seed(seed)
    batch = Episodes.empty(spec, len(lengths), CPU, avail=False, alive=alive)
    for name in ("obs", "state", "reward"):
        getattr(batch, name).normal_(generator=g)
    if spec.continuous:
        batch.actions.uniform_(-0.9, 0.9, generator=g)
    else:
        batch.actions.random_(0, spec.n_actions, generator=g)
    batch.valid[:] = torch.arange(spec.episode_limit)[:, None] < torch.tensor(lengths)
    for k, length in enumerate(lengths):
        batch.terminated[length - 1, k] = terminated and k % 2 == 0
    return batch


def some_learner(algo: str = "ippo", scheme: str = "fups", spec: EnvSpec | None = None, **settings) -> PPOLearner:
    masks, critic = settings.pop("masks", {}), settings.pop("critic", None)
    spec = spec or some_spec()
    sharing = make_sharing(scheme, spec.n_agents, SharingConfig(masks=K24Config(**masks)))
    return PPOLearner(algo, spec, sharing, PPOConfig(**settings), hidden=8, critic_sharing=critic)


def parameters(learner: PPOLearner) -> dict[str, Tensor]:
    """Everything that moves: parameters and buffers of both nets."""
    nets = {"policy": learner.net, "critic": learner.critic.net}
    return {f"{who}.{name}": value.detach().clone() for who, net in nets.items() for name, value in net.state_dict().items()}


def standardised(values: list[float]) -> Tensor:
    x = torch.tensor(values)
    return (x - x.mean()) / (x.std() + 1e-5)


class Drift(TeamEnv):
    """Five steps of random observations."""

    def __init__(self, spec: EnvSpec, n_envs: int = 4) -> None:
        self.spec, self.n_envs, self.device = spec, n_envs, CPU

    def _see(self) -> Observation:
        shape = self.spec.n_agents, self.n_envs, self.spec.obs_dim
        return Observation(torch.randn(shape, generator=self._g), torch.randn(self.n_envs, self.spec.state_dim, generator=self._g))

    def reset(self, seed: int) -> Observation:
        self._g, self._time = torch.Generator().manual_seed(seed), 0
        return self._see()

    def step(self, actions: Tensor) -> Step:
        self._time += 1
        after = self._see()
        over = torch.full((self.n_envs,), self._time % self.spec.episode_limit == 0)
        reward = torch.randn(self.spec.n_agents, self.n_envs, generator=self._g)
        return Step(after, after, reward, torch.zeros_like(over), over)


# --- looking back, by hand ---------------------------------------------------------------------------------------------------------
#
# Two episodes, γ = λ = 1/2. The task ends the first after two steps, a time limit the second after three. With δ_t = r_t + v_{t+1}/2 - v_t
# and A_t = δ_t + A_{t+1}/4, and 50 and 99 for what must not count:
#
#             rewards      values         δ            advantages            targets
#   first     1, 3         1, 2, 50, 99   1, 1         1.25, 1               2.25, 3
#   second    2, 0, 4      0, 4, 2, 8     4, -3, 6     3.625, -1.5, 6        3.625, 2.5, 8
#
# Team rewards are split between the agents as (1, 2) + (0, 1) and (1, 0, 4) + (1, 0, 0).

FIRST, SECOND = [1.25, 1.0], [3.625, -1.5, 6.0]


def by_hand(alive: bool = False) -> Episodes:
    batch = some_episodes(some_spec(steps=3), [2, 3], alive=alive)
    batch.reward[:, :, 0] = torch.tensor([[1.0, 2.0, torch.nan], [0.0, 1.0, torch.nan]])
    batch.reward[:, :, 1] = torch.tensor([[1.0, 0.0, 4.0], [1.0, 0.0, 0.0]])
    if batch.alive is not None:
        batch.alive[1, 1:, 1] = False  # agent 1 is there for the first step of the second episode and no longer
    return batch


def judged(algo: str, value: list, batch: Episodes, moments: tuple[float, float] | None = None, **settings):
    """Looks back with values ``[V, B, T+1]`` in place of the critic's."""
    learner = some_learner(algo, spec=some_spec(steps=3), gamma=0.5, gae_lambda=0.5, **settings)
    given = torch.tensor(value).transpose(1, 2)
    if moments is not None:
        mean, std = moments
        learner._returns.load_state_dict({"count": 10.0, "mean": mean, "square": 10 * std * std})
        given = (given - mean) / std
    learner._values = lambda *_, **__: given  # type: ignore[method-assign]
    return learner, learner._look_back(batch)


TEAM = [[1.0, 2.0, 50.0, 99.0], [0.0, 4.0, 2.0, 8.0]]


def test_one_value_for_the_team_by_hand() -> None:
    batch = by_hand()
    _, seen = judged("mappo", [TEAM], batch, normalise_values=False)
    assert torch.equal(seen.valued, batch.valid[None])
    assert torch.equal(seen.counted, batch.valid.expand(2, -1, -1))
    assert torch.allclose(seen.target[0, :2, 0], torch.tensor([2.25, 3.0]))
    assert torch.allclose(seen.target[0, :, 1], torch.tensor([3.625, 2.5, 8.0])), "a time limit bootstraps from the 8 behind it"
    expected = standardised(2 * (FIRST + SECOND))[:5]
    for agent in range(2):
        assert torch.allclose(torch.cat([seen.advantage[agent, :2, 0], seen.advantage[agent, :, 1]]), expected)
    assert torch.equal(seen.value, torch.tensor([TEAM]).transpose(1, 2)[:, :-1])


def test_the_teams_value_outlives_an_agent() -> None:
    _, seen = judged("mappo", [TEAM], by_hand(alive=True), normalise_values=False)
    assert torch.allclose(seen.target[0, :, 1], torch.tensor([3.625, 2.5, 8.0]))
    assert seen.valued.sum() == 5
    assert seen.counted[1, :, 1].tolist() == [True, False, False], "the policy of a dead agent did nothing"
    expected = standardised([*FIRST, *SECOND, *FIRST, SECOND[0]])
    assert torch.allclose(seen.advantage[0, :, 1], expected[2:5])
    assert torch.allclose(seen.advantage[1, 0, 1], expected[7])


@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_a_value_for_each_agent_by_hand(algo: str) -> None:
    # Agent 1 has the value 3 in the second episode and dies after a reward of 1: δ = 1 - 3. What a dead one is worth (7) is not asked.
    values = [TEAM, [TEAM[0], [3.0, 7.0, 7.0, 7.0]]]
    _, seen = judged(algo, values, by_hand(alive=True), normalise_values=False, individual_rewards=True)
    # Of their own rewards: first episode (1, 2) and (0, 1) with values 1, 2: δ (1, 0) and (0, -1), A (1, 0) and (-1/4, -1).
    # Second, agent 0: rewards 1, 0, 4 with values 0, 4, 2, 8: δ 3, -3, 6, A 2.625, -1.5, 6.
    expected = standardised([1.0, 0.0, 2.625, -1.5, 6.0, -0.25, -1.0, -2.0])
    got = [seen.advantage[0, :2, 0], seen.advantage[0, :, 1], seen.advantage[1, :2, 0], seen.advantage[1, :1, 1]]
    assert torch.allclose(torch.cat(got), expected, atol=1e-6)
    assert torch.allclose(seen.target[0, :, 1], torch.tensor([2.625, 2.5, 8.0]))
    assert torch.allclose(seen.target[1, :2, 0], torch.tensor([0.75, 1.0]))
    assert seen.target[1, 0, 1] == 1.0
    assert torch.equal(seen.valued, seen.counted)
    assert seen.valued.sum() == 8


def test_agents_with_a_value_of_their_own_learn_the_teams_reward_unless_told_otherwise() -> None:
    values = [TEAM, [TEAM[0], [3.0, 7.0, 7.0, 7.0]]]
    _, seen = judged("ippo", values, by_hand(alive=True), normalise_values=False)
    assert torch.allclose(seen.target[0, :, 1], torch.tensor([3.625, 2.5, 8.0]))
    assert torch.allclose(seen.target[1, :2, 0], torch.tensor([2.25, 3.0]))
    assert seen.target[1, 0, 1] == 2.0, "the team's reward of 2, and nothing after death"


def test_a_row_without_a_slot_is_as_good_as_dead() -> None:
    batch = by_hand(alive=True)
    assert batch.alive is not None
    values = [TEAM, [TEAM[0], [3.0, 7.0, 7.0, 7.0]]]
    _, expected = judged("ippo", values, batch, normalise_values=False)
    batch.obs[..., :2] = torch.eye(2)[:, None, None] * batch.alive[..., None]  # what type it is, and none behind death
    learner = some_learner("ippo", spec=some_spec(steps=3), gamma=0.5, gae_lambda=0.5, normalise_values=False)
    learner.rule = by_unit_type(0, 2)
    learner._values = lambda *_, **__: torch.tensor(values).transpose(1, 2)  # type: ignore[method-assign]
    batch.alive = None
    seen = learner._look_back(batch)
    assert seen.played.alive is None
    assert seen.played.slots is not None
    assert (seen.played.slots[:, 3, 0] == -1).all(), "what is behind the end is of no unit"
    for name in ("counted", "valued"):
        assert torch.equal(getattr(seen, name), getattr(expected, name))
    assert torch.allclose(seen.advantage[seen.counted], expected.advantage[seen.counted])
    assert torch.allclose(seen.target[seen.valued], expected.target[seen.valued])


def test_the_critics_units_are_those_of_returns() -> None:
    learner, seen = judged("mappo", [TEAM], by_hand(), (10.0, 4.0))
    targets = torch.tensor([2.25, 3.0, 3.625, 2.5, 8.0])
    moments = learner._returns
    # Ten returns of mean 10 and variance 16, and these five.
    mean = (100.0 + float(targets.sum())) / 15
    variance = (10 * (16.0 + (10.0 - mean) ** 2) + float((targets - mean).square().sum())) / 15
    assert moments.count == 15
    assert moments.mean == pytest.approx(mean)
    assert moments.std == pytest.approx(variance**0.5)
    assert torch.allclose(seen.target[:, seen.valued[0]] * moments.std + moments.mean, targets[[0, 2, 1, 3, 4]][None], atol=1e-5)
    _, plain = judged("mappo", [TEAM], by_hand(), normalise_values=False)
    assert torch.allclose(seen.advantage[seen.counted], plain.advantage[plain.counted], atol=1e-5), "advantages are in units of reward"


# --- steps -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(("algo", "scheme"), [("ippo", "fups"), ("mappo", "nops")])
def test_at_the_first_step_the_policy_is_what_it_was(algo: str, scheme: str, recurrent: bool, continuous: bool) -> None:
    learner = some_learner(algo, scheme, some_spec(continuous), epochs=1, recurrent=recurrent)
    learner.gather(Drift(learner.spec), 0, seed=0)
    learner.learn(0.1, 20)
    metrics = learner.metrics()
    assert metrics["approx_kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["updates"] == metrics["critic_updates"] == 1
    learner.learn(0.1, 20)
    assert learner.updates == 1, "a round is learned from once"


@pytest.mark.parametrize("forward", ["expected", "sample", "gumbel"])
@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_a_round_is_learned_from_with_the_masks_that_acted_in_it(algo: str, forward: MaskForward) -> None:
    config = SharingConfig(masks=K24Config(forward=forward, hetero_init_scale=1.0))
    masked: Callable = lambda n, ensemble: make_sharing("k24", n or 1, config)  # noqa: E731
    spec = some_spec()
    learner = PPOLearner(algo, spec, make_sharing("k24", AGENTS, config), PPOConfig(epochs=1), hidden=8, critic_sharing=masked)
    for k in range(3):
        learner.gather(Drift(spec), 20 * k, seed=k)
        acted = [learner.net.snapshot("train")[0].weight, learner.critic.net.snapshot("train")[0].weight]
        learner.learn(0.2 * k, 20 * k)
        metrics = learner.metrics()
        assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert metrics["clip_fraction"] == 0.0
        if forward != "expected":
            learner._draw()
            drawn = [learner.net.snapshot("train")[0].weight, learner.critic.net.snapshot("train")[0].weight]
            assert all(((a != 0) != (b != 0)).any() for a, b in zip(acted, drawn, strict=True)), "each round has masks of its own"


@pytest.mark.parametrize("continuous", [False, True])
def test_a_step_against_plain_torch(continuous: bool) -> None:
    """One pass of IPPO without recurrence, losses written out and gradients by torch."""
    lengths, clip, delta, entropy_coef = [5, 2, 4], 0.2, 0.5, 0.0 if continuous else 0.03
    batch = some_episodes(some_spec(continuous), lengths)
    learner = some_learner(
        *("ippo", "fups", some_spec(continuous)), epochs=2, recurrent=False, huber_delta=delta, entropy_coef=entropy_coef, grad_clip=0.3
    )
    nets = [copy.deepcopy(net) for net in (learner.net, learner.critic.net)]

    def plain(net: nn.Module, x: Tensor) -> Tensor:
        for name in ("fc1", "fc2", "fc3"):
            layer = net.layers[name]  # type: ignore[union-attr,index]
            weight, bias = (p.expand(AGENTS, *p.shape[1:]) for p in (layer.weight, layer.bias))
            x = torch.einsum("atnd,aod->atno", x, weight) + bias[:, None, None]
            x = x.relu() if name != "fc3" else x
        return x

    def log_prob(outputs: Tensor) -> tuple[Tensor, Tensor]:
        if not continuous:
            policy = Categorical(logits=outputs)
            return policy.log_prob(batch.actions), policy.entropy()
        mean, std = learner._kind.moments(outputs)  # type: ignore[attr-defined]
        inside = Normal(mean, std).log_prob(batch.actions.atanh()) - (1 - batch.actions.square()).log()
        return inside.sum(-1), torch.zeros(())

    mask = batch.valid.expand(AGENTS, -1, -1)
    with torch.no_grad():
        old_log, old_value = log_prob(plain(nets[0], batch.obs[:, :-1]))[0], plain(nets[1], batch.obs)[..., 0]
        advantage = torch.zeros(AGENTS, 5, 3)
        for agent in range(AGENTS):
            for k, length in enumerate(lengths):
                following = 0.0
                for t in reversed(range(length)):
                    v_next = 0.0 if t == length - 1 and k % 2 == 0 else float(old_value[agent, t + 1, k])
                    error = float(batch.reward[:, t, k].sum()) + 0.99 * v_next - float(old_value[agent, t, k])
                    following = error + 0.99 * 0.95 * following
                    advantage[agent, t, k] = following
        target = advantage + old_value[:, :-1]
        target = (target - target[mask].mean()) / target[mask].std(unbiased=False)
        advantage = (advantage - advantage[mask].mean()) / (advantage[mask].std() + 1e-5)
    optimisers = [torch.optim.Adam(net.parameters(), lr=5e-4, eps=1e-5) for net in nets]
    for _ in range(2):
        now, entropy = log_prob(plain(nets[0], batch.obs[:, :-1]))
        ratio = (now - old_log).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage) + entropy_coef * entropy
        value = plain(nets[1], batch.obs[:, :-1])[..., 0]
        near = old_value[:, :-1] + (value - old_value[:, :-1]).clamp(-clip, clip)
        huber = nn.HuberLoss(reduction="none", delta=delta)
        losses = [-gain[mask].mean(), torch.maximum(huber(value, target), huber(near, target))[mask].mean()]
        for net, optimiser, loss in zip(nets, optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimiser.step()
    learner.update(batch, 0.1, 0)
    for mine, reference in zip((learner.net, learner.critic.net), nets, strict=True):
        for (name, p), q in zip(mine.named_parameters(), reference.parameters(), strict=True):
            assert torch.allclose(p, q, atol=2e-6), name
    assert learner.metrics()["loss_value"] == pytest.approx(float(losses[1].detach()), rel=1e-4)


def test_a_freeze_ends_the_policys_steps_of_a_round_and_not_the_critics() -> None:
    learner = some_learner(scheme="k24", masks={"freeze_at": 0.5}, epochs=4)
    batch = some_episodes(learner.spec, [5, 5])
    counts = []
    for progress in (0.4, 0.6, 0.7):
        learner.update(batch, progress, 0)
        counts.append((learner.policy.updates, learner.critic.updates))
    assert counts == [(4, 4), (5, 8), (9, 12)]


def test_a_reset_ends_them_too() -> None:
    learner = some_learner("mappo", "k24", masks={"freeze_at": 2.0, "reset_interval": 3}, epochs=5)
    learner.update(some_episodes(learner.spec, [5, 5]), 0.1, 0)
    assert (learner.policy.updates, learner.critic.updates) == (3, 5)


def test_passes_stop_once_the_policy_has_moved_far() -> None:
    batch = some_episodes(some_spec(), [5, 5, 5])
    steps = []
    for target_kl in (0.0, 1e-9, 1e3):
        learner = some_learner(epochs=6, target_kl=target_kl, lr=0.01)
        learner.update(batch, 0.1, 0)
        steps.append(learner.policy.updates)
        assert learner.critic.updates == 6
        assert learner.metrics()["approx_kl"] <= (target_kl or 1e3)
    assert steps == [6, 1, 6], "the first step never counts as far: the policy is still what it was"
    learner.update(batch, 0.1, 0)
    assert learner.policy.updates == 12, "the next round starts afresh"


@given(st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_minibatches_partition_the_episodes(count: int, minibatches: int, alive: bool) -> None:
    minibatches = min(count, minibatches)
    spec = some_spec(steps=2)
    learner = some_learner("ippo", spec=spec, minibatches=minibatches, recurrent=False)
    whole = learner._look_back(some_episodes(spec, [1 + k % 2 for k in range(count)], alive=alive))
    marks = torch.arange(float(count))
    whole.played.episodes.obs[:] = marks[:, None]
    whole.played.episodes.reward[:] = marks
    whole = whole._replace(log_prob=marks.expand(2, 2, count), target=marks.expand(2, 2, count), advantage=marks.expand(2, 2, count))
    parts = list(learner._parts(whole))
    assert len(parts) == minibatches
    assert sorted(name for part in parts for name in part.target[0, 0].tolist()) == marks.tolist()
    sizes = [part.played.episodes.count for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        names = part.target[0, 0]
        assert torch.equal(part.played.episodes.obs[0, 0, :, 0], names)
        assert torch.equal(part.played.episodes.reward[1, 1], names)
        assert torch.equal(part.log_prob[1, 1], names)
        assert torch.equal(part.advantage[0, 1], names)
        assert torch.equal(part.value, whole.value[..., names.long()])
        assert torch.equal(part.played.episodes.valid[1], names % 2 == 1)
        assert part.counted is None or torch.equal(part.counted, whole.counted[..., names.long()])  # type: ignore[index]
        assert (part.played.alive is None) != alive


def test_every_pass_takes_all_minibatches_in_an_order_of_its_own() -> None:
    learner = some_learner(epochs=3, minibatches=2)
    seen: list[list[float]] = []
    policy_step = learner._policy_step
    learner._policy_step = lambda part, *rest: (seen.append(part.played.episodes.obs[0, 0, :, 0].tolist()), policy_step(part, *rest))[1]  # type: ignore
    batch = some_episodes(learner.spec, [5] * 6)
    learner.update(batch, 0.1, 0)
    assert learner.policy.updates == learner.critic.updates == 6
    passes = [seen[k] + seen[k + 1] for k in range(0, 6, 2)]
    assert all(sorted(order) == sorted(batch.obs[0, 0, :, 0].tolist()) for order in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]


# --- what must not be seen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_what_lies_behind_an_end_is_never_seen(algo: str, recurrent: bool, continuous: bool) -> None:
    spec, lengths = some_spec(continuous), [5, 2, 1, 4]
    batches = [some_episodes(spec, lengths, alive=True) for _ in range(2)]
    poisoned = batches[1]
    for k, length in enumerate(lengths):
        poisoned.obs[:, length + 1 :, k] = 1e6
        poisoned.state[length + 1 :, k] = -1e6
        poisoned.reward[:, length:, k] = torch.nan
        poisoned.actions[:, length:, k] = 1
        poisoned.alive[:, length + 1 :, k] = False  # type: ignore[index]
    masked: Callable = lambda n, ensemble: make_sharing("k24", n or 1)  # noqa: E731
    learners = [some_learner(algo, "k24", spec, epochs=2, minibatches=2, recurrent=recurrent, critic=masked) for _ in range(2)]
    for learner, batch in zip(learners, batches, strict=True):
        learner.update(batch, 0.1, 0)
    assert learners[0]._returns.state_dict() == learners[1]._returns.state_dict()
    assert learners[0].metrics() == pytest.approx(learners[1].metrics())
    clean, other = map(parameters, learners)
    assert any("ema" in name for name in clean)
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert torch.allclose(value, other[name], atol=1e-6), name


@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_a_dead_agents_actions_and_rewards_behind_death_teach_nothing(algo: str) -> None:
    batches = [some_episodes(some_spec(), [5, 5], alive=True) for _ in range(2)]
    for batch in batches:
        batch.alive[1, 2:, 0] = False  # type: ignore[index]
    batches[1].actions[1, 2:, 0] = (batches[1].actions[1, 2:, 0] + 1) % ACTIONS
    batches[1].obs[1, 2:, 0] = 100.0
    learners = [some_learner(algo, "nops", individual_rewards=True, epochs=2) for _ in range(2)]
    if algo == "ippo":
        batches[1].reward[1, 2:, 0] = 100.0
    for learner, batch in zip(learners, batches, strict=True):
        learner.update(batch, 0.1, 0)
    clean, other = map(parameters, learners)
    assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in clean.items())


def test_numbers_that_are_none_leave_everything_as_it_was() -> None:
    learner = some_learner()
    batch = some_episodes(learner.spec, [5, 5])
    batch.reward[0, 1, 1] = torch.nan
    before = parameters(learner)
    with pytest.raises(RunError, match="loss_policy is nan"):
        learner.update(batch, 0.1, 0)
    assert all(torch.equal(value, before[name]) for name, value in parameters(learner).items())


# --- critics ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(("algo", "sees", "ignores"), [("mappo", "state", "obs"), ("ippo", "obs", "state")])
def test_what_the_critic_sees(algo: str, sees: str, ignores: str, recurrent: bool) -> None:
    learner = some_learner(algo, recurrent=recurrent)
    batch = some_episodes(learner.spec, [5, 3])
    weights, played = learner.critic.acting(), _Played(batch, None, None, None)
    value = learner._values(weights, played)
    assert value.shape == ((1 if algo == "mappo" else AGENTS), 6, 2)
    getattr(batch, ignores).fill_(9.0)
    assert torch.equal(learner._values(weights, played), value)
    getattr(batch, sees).fill_(9.0)
    assert (learner._values(weights, played) != value).all()


def test_a_central_critic_has_one_output_for_each_reward() -> None:
    for own, outputs in ((False, 1), (True, AGENTS)):
        learner = some_learner("mappo", individual_rewards=own)
        assert learner.critic.net.n_outputs == outputs
        played = _Played(some_episodes(learner.spec, [5, 3]), None, None, None)
        assert learner._values(learner.critic.acting(), played).shape == (outputs, 6, 2)


@pytest.mark.parametrize(("algo", "slots"), [("mappo", 1), ("ippo", AGENTS)])
def test_critics_are_made_as_asked(algo: str, slots: int) -> None:
    asked = []

    def critic(n_slots: int | None, ensemble: bool):
        asked.append((n_slots, ensemble))
        return make_sharing("k24", n_slots or 99)

    learner = some_learner(algo, critic=critic)
    assert asked == [(slots, False)]
    assert learner.critic.sharing.n_slots == learner.critic.net.n_slots == slots
    assert all(isinstance(layer, MaskedLinear) for layer in learner.critic.net.layers.values())
    assert not any(isinstance(layer, MaskedLinear) for layer in learner.net.layers.values())
    learner.update(some_episodes(learner.spec, [5, 5]), 0.2, 0)
    learner.gather(Drift(learner.spec), 10, seed=0)  # masks are drawn, and cooled, when a round begins
    metrics = learner.metrics()
    assert metrics["critic_temperature"] == pytest.approx(1 - 0.97 / 3)
    assert 0.4 < metrics["critic_overall_sparsity"] <= 0.5
    assert not {"temperature", "overall_sparsity", "critic_loss_value"} & set(metrics)
    assert {"loss_policy", "loss_value", "grad_norm", "critic_grad_norm", "lr", "critic_lr", "entropy"} <= set(metrics)


@pytest.mark.parametrize("algo", ["mappo", "ippo"])
def test_critics_are_as_wide_as_asked_and_the_policy_stays_the_same(algo: str) -> None:
    usual, narrow = some_learner(algo), some_learner(algo, critic_hidden=5)
    assert [(learner.net.hidden, learner.critic.net.hidden) for learner in (usual, narrow)] == [(8, 8), (8, 5)]
    assert parameters(narrow)["critic.layers.fc2.weight"].shape[1:] == (5, 5)
    assert all(same.equal(parameters(narrow)[name]) for name, same in parameters(usual).items() if name.startswith("policy"))
    before = parameters(narrow)
    narrow.update(some_episodes(narrow.spec, [5, 3]), 0.2, 0)
    assert not any(value.equal(before[name]) for name, value in parameters(narrow).items() if name.endswith("fc2.weight"))


@pytest.mark.parametrize(("algo", "slots"), [("mappo", 1), ("ippo", AGENTS)])
def test_critics_are_dense_unless_told_otherwise(algo: str, slots: int) -> None:
    learner = some_learner(algo, "k24")
    assert [len(layer.weight) for layer in learner.critic.net.layers.values()] == [slots] * len(learner.critic.net.layers)
    learner.update(some_episodes(learner.spec, [5, 5]), 0.2, 0)
    assert "temperature" in learner.metrics()
    assert "critic_temperature" not in learner.metrics()


# --- acting ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
def test_draws_repeat_with_their_seed_and_evaluation_disturbs_nothing(continuous: bool) -> None:
    learner = some_learner(spec=some_spec(continuous))
    now = Observation(torch.randn(AGENTS, 200, OBS), torch.randn(200, STATE))
    before = learner.generator.get_state()

    def act(**how) -> Tensor:
        actor = learner.actor(**how)
        actor.reset(200)
        return actor(now)

    first, again, other, likeliest = act(sample=True, seed=3), act(sample=True, seed=3), act(sample=True, seed=4), act()
    learner.random_actor()(now)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, likeliest)
    assert torch.equal(likeliest, act(seed=5))
    assert torch.equal(learner.generator.get_state(), before)
    outputs, _ = learner.net(learner.policy.acting(), now.obs[:, None], learner.net.initial_state(200))
    expected = outputs[:, 0, :, :ACTIONS].tanh() if continuous else outputs[:, 0].argmax(-1)
    assert torch.equal(likeliest, expected)
    learner.gather(Drift(learner.spec), 0, seed=0)
    assert not torch.equal(learner.generator.get_state(), before), "training draws with the learner's own"


def test_draws_are_as_likely_as_the_policy_says() -> None:
    learner = some_learner()
    now = Observation(torch.ones(AGENTS, 5000, OBS), torch.zeros(5000, STATE))
    actor = learner.actor(sample=True, seed=1)
    actor.reset(5000)
    outputs, _ = learner.net(learner.policy.acting(), now.obs[:, None, :1], learner.net.initial_state(1))
    shares = torch.nn.functional.one_hot(actor(now), ACTIONS).float().mean(1)
    assert torch.allclose(shares, outputs[:, 0, 0].softmax(-1), atol=0.03)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ippo", "mappo"])
def test_a_run_that_is_taken_up_again_is_the_same_run(algo: str) -> None:
    def learner() -> PPOLearner:
        return some_learner(algo, "k24", masks={"forward": "sample"}, epochs=2, minibatches=2)

    def go_on(learner: PPOLearner, rounds: range) -> None:
        for k in rounds:
            learner.gather(Drift(learner.spec), 20 * k, seed=k)
            learner.learn(0.2 * k, 20 * k)
            logged.append(learner.metrics())

    logged: list[dict[str, float]] = []
    whole, first, second = learner(), learner(), learner()
    go_on(whole, range(4))
    go_on(first, range(2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    go_on(second, range(2, 4))
    expected, got = parameters(whole), parameters(second)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert logged[:4] == logged[4:]
