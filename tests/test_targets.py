"""Targets, losses, mixers and the distance of policies, as numbers worked out by hand and against slow definitions."""

from __future__ import annotations

import copy
from math import log, log2, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from k24.actions import KINDS
from k24.envs.base import EnvSpec
from k24.learners import Episodes, ValueConfig, ValueLearner
from k24.learners.mixers import QMixer, SumMixer, make_mixer
from k24.learners.optimise import track
from k24.learners.statistics import RunningMoments, system_neural_diversity
from k24.learners.targets import (
    clipped_value_loss,
    gae,
    greedy_value,
    masked_mse,
    n_step_targets,
    n_step_transitions,
    ppo_loss,
    smoothed,
    td3_target,
    td_lambda_targets,
)
from k24.sharing import K24Config, SharingConfig, make_sharing

REWARD = torch.tensor([1.0, 2.0, 3.0, 4.0])
VALUE = torch.tensor([10.0, 20.0, 30.0, 40.0])  # of the state that each step led to
GAMMA = 0.5
NEVER = torch.zeros(4, dtype=torch.bool)
AT_1 = torch.tensor([False, True, False, False])
AT_1_AND_END = torch.tensor([False, True, False, True])

# What ends in the middle: nothing; the episode, by a time limit; the task itself.
WHOLE, TRUNCATED, TERMINATED = (NEVER, NEVER), (NEVER, AT_1_AND_END), (AT_1, AT_1_AND_END)


def some_steps(steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, and flags: every terminated step is a last one, not the other way round."""
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, steps, 3, generator=g, dtype=torch.float64)
    last = torch.rand(steps, 3, generator=g) < 0.3
    terminated = last & (torch.rand(steps, 3, generator=g) < 0.5)
    return reward, value, terminated, last


def explicit_n_step(reward: Tensor, value: Tensor, terminated: Tensor, last: Tensor, gamma: float, n: int, t: int) -> float:
    """From step t of one row: n rewards and a bootstrap, or fewer where the episode ends."""
    total, steps = 0.0, len(reward)
    for k in range(n):
        total += gamma**k * float(reward[t + k])
        if terminated[t + k]:
            return total
        if last[t + k] or k == n - 1 or t + k == steps - 1:
            return total + gamma ** (k + 1) * float(value[t + k])
    raise AssertionError


# --- targets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "n", "expected"),
    [
        (WHOLE, 1, [6.0, 12.0, 18.0, 24.0]),
        (WHOLE, 2, [7.0, 11.0, 15.0, 24.0]),  # 1 + 2/2 + 20/4, 2 + 3/2 + 30/4, 3 + 4/2 + 40/4, 4 + 40/2
        (WHOLE, 4, [1 + 1 + 0.75 + 0.5 + 2.5, 2 + 1.5 + 1 + 5, 15.0, 24.0]),
        (TRUNCATED, 1, [6.0, 12.0, 18.0, 24.0]),
        (TRUNCATED, 2, [7.0, 12.0, 15.0, 24.0]),  # step 1 bootstraps from what it led to, not from the next episode
        (TRUNCATED, 3, [7.0, 12.0, 15.0, 24.0]),
        (TERMINATED, 1, [6.0, 2.0, 18.0, 24.0]),
        (TERMINATED, 2, [2.0, 2.0, 15.0, 24.0]),
        (TERMINATED, 9, [2.0, 2.0, 15.0, 24.0]),
    ],
)
def test_n_step_targets_by_hand(flags: tuple[Tensor, Tensor], n: int, expected: list[float]) -> None:
    assert n_step_targets(REWARD, VALUE, *flags, GAMMA, n).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "lam", "expected"),
    [
        (WHOLE, 0.0, [6.0, 12.0, 18.0, 24.0]),
        # Backwards: 24, 3 + (15 + 12)/2, 2 + (10 + 8.25)/2, 1 + (5 + 5.5625)/2.
        (WHOLE, 0.5, [6.28125, 11.125, 16.5, 24.0]),
        (TRUNCATED, 0.5, [6.5, 12.0, 16.5, 24.0]),
        (TERMINATED, 0.5, [4.0, 2.0, 16.5, 24.0]),
        (WHOLE, 1.0, [5.75, 9.5, 15.0, 24.0]),
        (TRUNCATED, 1.0, [7.0, 12.0, 15.0, 24.0]),
        (TERMINATED, 1.0, [2.0, 2.0, 15.0, 24.0]),
    ],
)
def test_lambda_targets_by_hand(flags: tuple[Tensor, Tensor], lam: float, expected: list[float]) -> None:
    assert td_lambda_targets(REWARD, VALUE, *flags, GAMMA, lam).tolist() == pytest.approx(expected)


@given(st.integers(1, 7), st.integers(1, 8), st.floats(0, 1), st.integers(0, 10_000))
def test_n_step_targets_are_sums_of_rewards(steps: int, n: int, gamma: float, seed: int) -> None:
    data = some_steps(steps, seed)
    targets = n_step_targets(*data, gamma, n)
    for t in range(steps):
        for row in range(3):
            assert float(targets[t, row]) == pytest.approx(explicit_n_step(*(x[:, row] for x in data), gamma, n, t))


@given(st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_lambda_targets_are_means_of_n_step_targets(steps: int, gamma: float, lam: float, seed: int) -> None:
    data = some_steps(steps, seed)
    targets = td_lambda_targets(*data, gamma, lam)
    for t in range(steps):
        for row in range(3):
            rows = tuple(x[:, row] for x in data)
            ends = [k for k in range(t, steps) if rows[3][k] or k == steps - 1]
            left = ends[0] - t + 1
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
            mean = sum(w * explicit_n_step(*rows, gamma, n, t) for n, w in enumerate(weights, 1))
            assert float(targets[t, row]) == pytest.approx(mean, abs=1e-9)


@given(st.integers(1, 7), st.integers(0, 10_000))
def test_the_ends_of_lambda(steps: int, seed: int) -> None:
    data = some_steps(steps, seed)
    assert torch.allclose(td_lambda_targets(*data, 0.9, 0.0), n_step_targets(*data, 0.9, 1))
    assert torch.allclose(td_lambda_targets(*data, 0.9, 1.0), n_step_targets(*data, 0.9, steps)), "Monte Carlo, and a bootstrap at the end"


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 10_000))
def test_nothing_behind_an_episodes_end_leaks_into_it(steps: int, n: int, seed: int) -> None:
    reward, value, terminated, last = some_steps(steps, seed)
    last[-1] = True
    length = last.int().argmax(0) + 1
    behind = torch.arange(steps)[:, None] >= length
    poison = [torch.where(behind, float("nan"), x) for x in (reward, value)]
    for clean, poisoned in (
        (n_step_targets(reward, value, terminated, last, 0.9, n), n_step_targets(*poison, terminated, last, 0.9, n)),
        (td_lambda_targets(reward, value, terminated, last, 0.9, 0.7), td_lambda_targets(*poison, terminated, last, 0.9, 0.7)),
        (gae(reward, value, value, terminated, last, 0.9, 0.7), gae(*poison, poison[1], terminated, last, 0.9, 0.7)),
    ):
        assert torch.equal(clean[~behind], poisoned[~behind])


@pytest.mark.parametrize(
    ("flags", "lam", "expected"),
    [
        # δ: 1 + 10/2 - 2, 2 + 20/2 - 4, 3 + 30/2 - 6, 4 + 40/2 - 8, the second one 2 - 4 where the task ends there.
        (WHOLE, 0.0, [4.0, 8.0, 12.0, 16.0]),
        (TERMINATED, 0.0, [4.0, -2.0, 12.0, 16.0]),
        # Backwards: 16, 12 + 16/4, 8 + 16/4, 4 + 12/4.
        (WHOLE, 0.5, [7.0, 12.0, 16.0, 16.0]),
        (TRUNCATED, 0.5, [6.0, 8.0, 16.0, 16.0]),
        (TERMINATED, 0.5, [3.5, -2.0, 16.0, 16.0]),
        (WHOLE, 1.0, [13.0, 18.0, 20.0, 16.0]),
        (TRUNCATED, 1.0, [8.0, 8.0, 20.0, 16.0]),
    ],
)
def test_advantages_by_hand(flags: tuple[Tensor, Tensor], lam: float, expected: list[float]) -> None:
    value = torch.tensor([2.0, 4.0, 6.0, 8.0])
    assert gae(REWARD, value, VALUE, *flags, GAMMA, lam).tolist() == pytest.approx(expected)


@given(st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_advantages_are_returns_less_the_value(steps: int, gamma: float, lam: float, seed: int) -> None:
    reward, value_tp1, terminated, last = some_steps(steps, seed)
    other = torch.randn_like(reward)
    deltas = n_step_targets(reward, value_tp1, terminated, last, gamma, 1) - other
    assert torch.allclose(gae(reward, other, value_tp1, terminated, last, gamma, 0.0), deltas), "whatever the values"
    # What a step led to is where the next one starts, unless the episode is over: then the errors telescope.
    value = torch.cat([other[:1], torch.where(last[:-1], other[1:], value_tp1[:-1])])
    advantages = gae(reward, value, value_tp1, terminated, last, gamma, lam)
    assert torch.allclose(advantages, td_lambda_targets(reward, value_tp1, terminated, last, gamma, lam) - value)
    advantages = gae(reward, value, value_tp1, terminated, last, gamma, 1.0)
    assert torch.allclose(advantages, n_step_targets(reward, value_tp1, terminated, last, gamma, steps) - value)


@pytest.mark.parametrize(
    ("terminated", "valid", "expected"),
    [
        ([0, 0, 0], [1, 1, 1], (3.0, 0.125, 3)),  # 1 + 2/2 + 4/4
        ([0, 0, 0], [1, 1, 0], (2.0, 0.25, 2)),  # a time limit
        ([0, 0, 0], [1, 0, 0], (1.0, 0.5, 1)),
        ([0, 0, 1], [1, 1, 1], (3.0, 0.0, 3)),
        ([0, 1, 0], [1, 1, 0], (2.0, 0.0, 2)),
        ([1, 0, 0], [1, 0, 0], (1.0, 0.0, 1)),
        ([0, 0, 0], [1, 0, 1], (1.0, 0.5, 1)),  # the third is of another episode
        ([1, 0, 0], [1, 1, 1], (1.0, 0.0, 1)),  # likewise
        ([0, 0, 1], [1, 1, 0], (2.0, 0.25, 2)),  # where another task ended is nothing to this one
    ],
)
def test_n_step_transitions_by_hand(terminated: list[int], valid: list[int], expected: tuple[float, float, int]) -> None:
    among, ended = torch.tensor(valid).bool()[:, None], torch.tensor(terminated).bool()[:, None]
    reward = torch.where(among, torch.tensor([[1.0], [2.0], [4.0]]), float("nan"))
    returns, discount, steps = n_step_transitions(reward, ended, among, GAMMA)
    assert (float(returns), float(discount), int(steps)) == pytest.approx(expected)
    assert (returns.dtype, discount.dtype, steps.dtype) == (torch.float32, torch.float32, torch.int64)
    assert returns.shape == discount.shape == steps.shape == (1,)


@given(st.integers(1, 7), st.integers(1, 8), st.floats(0, 1), st.integers(0, 10_000))
def test_transitions_of_n_steps_give_n_step_targets(steps: int, n: int, gamma: float, seed: int) -> None:
    reward, value, terminated, last = some_steps(steps, seed)
    rows = torch.arange(steps) + torch.arange(n)[:, None]  # [n, T]: every step of an episode is a sample
    targets = n_step_targets(reward, value, terminated, last, gamma, n)
    for column in range(3):
        before = torch.cat([torch.zeros(1), last[:, column].cumsum(0)])  # ends before step t, and before the storage's end
        inside = rows < steps
        rows_in = rows.clamp(max=steps - 1)
        valid = inside & (before[rows_in] == before[:-1])
        returns, discount, taken = n_step_transitions(reward[rows_in, column], terminated[rows_in, column], valid, gamma)
        bootstrap = value[torch.arange(steps) + taken - 1, column]
        assert torch.allclose(returns + discount * bootstrap, targets[:, column])


def test_the_most_cautious_critic_judges() -> None:
    q_next = torch.tensor([[4.0, 1.0, 8.0], [2.0, 3.0, 8.0], [6.0, -2.0, 8.0]])
    target = td3_target(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.25, 0.0]), q_next)
    assert target.tolist() == [1 + 0.5 * 2, 1 - 0.25 * 2, 1.0]
    assert td3_target(torch.ones(3), torch.ones(3), q_next[:1]).tolist() == [5.0, 2.0, 9.0], "one critic alone"


def test_smoothing_adds_clipped_noise_and_stays_in_range() -> None:
    generator = torch.Generator()
    action = torch.tensor([-1.0, -0.25, 0.0, 1.0]).expand(5000, 4)
    unclipped = smoothed(action, 0.1, 10.0, generator.manual_seed(3))
    assert torch.equal(unclipped, smoothed(action, 0.1, 10.0, generator.manual_seed(3))), "the same noise"
    assert unclipped[:, 1:3].std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    assert unclipped[:, 1:3].mean(0).tolist() == pytest.approx([-0.25, 0.0], abs=0.01)
    assert float(unclipped.min()) == -1.0 and float(unclipped.max()) == 1.0
    clipped = smoothed(action, 0.1, 0.125, generator.manual_seed(3))
    noise = (unclipped - action)[:, 1:3]
    assert torch.allclose((clipped - action)[:, 1:3], noise.clamp(-0.125, 0.125), atol=1e-6), "clipped before it is added"
    assert torch.equal(smoothed(action, 0.0, 0.5), action)
    kept = torch.get_rng_state()
    smoothed(action, 0.1, 0.5, generator)
    assert torch.equal(torch.get_rng_state(), kept)


def test_the_best_action_is_chosen_by_one_and_judged_by_the_other() -> None:
    select, evaluate = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0]]), torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    assert greedy_value(select, evaluate).tolist() == [20.0, 1.0]
    avail = torch.tensor([[True, False, True], [False, True, False]])
    assert greedy_value(select, evaluate, avail).tolist() == [30.0, 2.0]
    assert greedy_value(evaluate, evaluate).tolist() == [30.0, 3.0], "one for both is the plain maximum"


def test_double_values_never_exceed_the_maximum() -> None:
    select, evaluate = torch.randn(2, 4, 5, 6)
    assert (greedy_value(select, evaluate) <= evaluate.amax(-1)).all()


# --- losses ----------------------------------------------------------------------------------------------------------------------


def test_masked_mean_square_by_hand() -> None:
    error = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(masked_mse(error, None)) == pytest.approx(7.5)
    assert float(masked_mse(error, torch.tensor([[True, False], [True, True]]))) == pytest.approx(26 / 3)
    assert float(masked_mse(error, torch.tensor([[True], [False]]))) == pytest.approx(2.5), "flags are spread over agents"
    assert float(masked_mse(error, torch.zeros(2, 2, dtype=torch.bool))) == 0.0


def test_masked_mean_square_gradient() -> None:
    error = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(3, 4) < 0.5
    assert gradcheck(lambda e: masked_mse(e, valid), error)
    masked_mse(error, valid).backward()
    assert torch.equal(error.grad != 0, valid)


RATIOS, ADVANTAGE = torch.tensor([1.5, 0.5, 1.1, 0.5, 1.5]), torch.tensor([1.0, 1.0, -2.0, -1.0, -1.0])
NOTHING = torch.zeros(5, dtype=torch.bool)


def test_clipped_surrogate_by_hand() -> None:
    log_prob = (RATIOS.log() - 3).requires_grad_()
    loss, clipped_fraction, approx_kl = ppo_loss(log_prob, torch.full((5,), -3.0), ADVANTAGE, 0.2, None)
    # min(1.5, 1.2), min(0.5, 0.8), -2.2 in range, min(-0.5, -0.8), min(-1.5, -1.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 2.2 - 0.8 - 1.5) / 5)
    assert float(clipped_fraction) == pytest.approx(4 / 5)
    assert float(approx_kl) == pytest.approx((2 * (0.5 - log(1.5)) + 2 * (log(2) - 0.5) + 0.1 - log(1.1)) / 5)
    loss.backward()
    # -ρ·A/5 where the minimum is not the clipped one: the policy has gone too far the right way in the first and the fourth.
    assert log_prob.grad.tolist() == pytest.approx([0.0, -0.1, 0.44, 0.0, 0.3])
    assert not clipped_fraction.requires_grad and not approx_kl.requires_grad


def test_the_first_pass_of_the_surrogate_is_the_policy_gradient() -> None:
    log_prob = torch.randn(4, 6, requires_grad=True)
    advantage = torch.randn(6)
    loss, clipped_fraction, approx_kl = ppo_loss(log_prob, log_prob.detach(), advantage, 0.2, None)
    loss.backward()
    assert loss.item() == pytest.approx(-float(advantage.mean()), abs=1e-6) and float(clipped_fraction) == float(approx_kl) == 0
    assert torch.allclose(log_prob.grad, -advantage.expand(4, 6) / 24)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_does_not_count_reaches_neither_loss_nor_gradient(garbage: float) -> None:
    counted = torch.tensor([[True, False, True], [False, True, False]])
    clean = [torch.randn(2, 3, dtype=torch.float64) for _ in range(3)]
    dirty = [torch.where(counted, x, garbage).requires_grad_() for x in clean]
    for loss in (
        lambda a, b, c, among: ppo_loss(a, b, c, 0.2, among),
        lambda a, b, c, among: (clipped_value_loss(a, b, c, 0.2, 1.0, among),),
        lambda a, b, c, among: (clipped_value_loss(a, b, c, 0.0, 1.0, among),),
    ):
        expected = loss(*(x[counted] for x in clean), None)
        found = loss(*dirty, counted)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other)
        gradient = torch.autograd.grad(found[0], dirty[0])[0]
        assert torch.equal(gradient[~counted], torch.zeros(3, dtype=torch.float64)) and gradient.isfinite().all()


def test_flags_are_spread_over_agents_and_none_may_count() -> None:
    counted = torch.tensor([[True], [False]])
    log_prob, advantage = torch.randn(2, 3), torch.randn(2, 3)
    loss, *_ = ppo_loss(log_prob, torch.zeros(2, 3), advantage, 0.2, counted)
    assert torch.allclose(loss, ppo_loss(log_prob[0], torch.zeros(3), advantage[0], 0.2, None)[0])
    value = torch.randn(5, requires_grad=True)
    for nothing in (*ppo_loss(value, ADVANTAGE, ADVANTAGE, 0.2, NOTHING), clipped_value_loss(value, ADVANTAGE, RATIOS, 0.2, 1.0, NOTHING)):
        assert nothing.item() == 0
    ppo_loss(value, ADVANTAGE, ADVANTAGE, 0.2, NOTHING)[0].backward()
    assert torch.equal(value.grad, torch.zeros(5))


def test_a_policy_that_ran_away_has_a_finite_surrogate_and_gradient() -> None:
    log_prob = torch.tensor([200.0, 200.0, 200.0, -200.0, -1e9], requires_grad=True)
    loss, clipped_fraction, _ = ppo_loss(log_prob, torch.zeros(5), torch.tensor([1.0, 0.0, -1.0, 1.0, -1.0]), 0.2, None)
    loss.backward()
    assert loss.isfinite() and float(clipped_fraction) == 1 and log_prob.grad.isfinite().all()


def test_clipped_surrogate_gradient() -> None:
    old = torch.randn(5, dtype=torch.float64)
    log_prob = (old + RATIOS.double().log()).requires_grad_()
    counted = torch.tensor([True, True, True, False, True])
    assert gradcheck(lambda x: ppo_loss(x, old, ADVANTAGE.double(), 0.2, counted)[0], log_prob)


def test_clipped_value_loss_by_hand() -> None:
    value = torch.tensor([0.5, 2.5, 0.1, -1.0], requires_grad=True)
    old, target = torch.zeros(4), torch.ones(4)
    # Errors -0.5 and 1.5 (linear), -0.9, -2 (linear); clipped, at 0.2, 0.2, 0.1 and -0.2: -0.8, -0.8, -0.9, -1.2 (linear).
    loss = clipped_value_loss(value, old, target, 0.2, 1.0, None)
    assert loss.item() == pytest.approx((0.32 + 1.0 + 0.405 + 1.5) / 4)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([0.0, 1 / 4, -0.9 / 4, -1 / 4]), "none for the first, which came 0.5 closer"
    assert clipped_value_loss(value, old, target, 0.0, 1.0, None).item() == pytest.approx((0.125 + 1.0 + 0.405 + 1.5) / 4)
    among = torch.tensor([True, False, False, True])
    assert clipped_value_loss(value, old, target, 0.2, 1.0, among).item() == pytest.approx((0.32 + 1.5) / 2)


@given(st.integers(0, 10_000), st.floats(0.01, 5))
def test_value_loss_without_clip_is_torchs_huber_loss(seed: int, delta: float) -> None:
    value, target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    ours = clipped_value_loss(value, value, target, 0.0, delta, None)
    assert torch.allclose(ours, nn.functional.huber_loss(value, target, delta=delta))
    assert torch.allclose(clipped_value_loss(value, value, target, 0.1, delta, None), ours), "nothing has moved yet"
    assert clipped_value_loss(value, target, target, 0.1, delta, None) >= ours - 1e-12, "the clip only adds"


def test_clipped_value_loss_gradient() -> None:
    value = torch.tensor([0.5, 2.5, 0.1, -1.0, 7.0], dtype=torch.float64, requires_grad=True)
    old, target = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    counted = torch.tensor([True, True, True, True, False])
    for clip in (0.0, 0.2):
        assert gradcheck(lambda v, clip=clip: clipped_value_loss(v, old, target, clip, 1.0, counted), value)


@pytest.mark.parametrize("algo", ["iql", "vdn", "qmix"])
@pytest.mark.parametrize("returns", [{}, {"n_step": 3}, {"td_lambda": 0.7}])
def test_what_is_recorded_behind_an_episodes_end_changes_nothing(algo: str, returns: dict) -> None:
    spec = EnvSpec(2, 4, 3, 3, 5)
    sharing = make_sharing("k24", 2, SharingConfig(masks=K24Config(ema_every=1)))
    learner = ValueLearner(algo, spec, sharing, ValueConfig(batch_size=4, **returns), hidden=8)
    batch = Episodes.empty(spec, 4, torch.device("cpu"), avail=False)
    batch.obs, batch.state, batch.reward = torch.randn_like(batch.obs), torch.randn_like(batch.state), torch.randn_like(batch.reward)
    batch.actions = torch.randint(0, 3, batch.actions.shape)
    length = torch.tensor([5, 3, 1, 2])
    batch.valid = torch.arange(5)[:, None] < length
    batch.terminated[length[1] - 1, 1] = True
    learner.sharing.resample(0.3)
    before = copy.deepcopy(learner.net.state_dict())
    results = []
    for garbage in (0.0, 1e3):
        behind = torch.arange(6)[:, None] > length
        batch.obs[:, behind], batch.state[behind] = garbage, garbage
        batch.reward[:, ~batch.valid], batch.actions[:, ~batch.valid] = garbage, int(garbage > 0)
        learner.net.load_state_dict(before)
        learner.net.zero_grad()
        loss = learner.td_loss(batch, learner.net.materialise("train"), observe=True)
        loss.backward()
        seen = [value.clone() for name, value in learner.net.named_buffers() if name.endswith(".ema")]
        assert all(not value.eq(1).all() for value in seen)
        results.append([loss.detach(), *seen, *(p.grad.clone() for p in learner.net.parameters())])
    assert results[0][0] > 0
    for clean, dirty in zip(*results, strict=True):
        assert torch.allclose(clean, dirty, atol=1e-7)


def test_running_moments_are_those_of_everything_seen() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    batches = [torch.randn(7) * 3 + 100, torch.randn(2, 5), torch.tensor([4.0])]
    for batch in batches:
        moments.update(batch)
    together = torch.cat([b.flatten() for b in batches]).double()
    assert moments.mean == pytest.approx(float(together.mean()))
    assert moments.std == pytest.approx(float(together.std(correction=0)))
    constant = RunningMoments()
    constant.update(torch.full((9,), 2.0))
    assert constant.std == 1e-4


# --- mixers ----------------------------------------------------------------------------------------------------------------------


def some_mixer(agents: int = 3, state_dim: int = 4) -> QMixer:
    return QMixer(agents, state_dim, embed=5, hypernet_hidden=6).double()


def test_the_sum_is_a_sum() -> None:
    assert SumMixer()(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 2)).tolist() == [7.0]


def test_mixing_is_the_stated_formula() -> None:
    mixer, q, state = some_mixer(), torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for k in range(2):
        w1 = mixer.weight_1(state[k]).abs().view(3, 5)
        hidden = nn.functional.elu(q[k] @ w1 + mixer.bias_1(state[k]))
        total = hidden @ mixer.weight_2(state[k]).abs() + mixer.bias_2(state[k])
        assert torch.allclose(mixer(q, state)[k], total)
    assert mixer(q.expand(6, 5, 2, 3), state).shape == (6, 5, 2), "any leading axes"


def test_mixing_passes_gradcheck() -> None:
    mixer = some_mixer()
    q = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(mixer, (q, state))


@given(st.integers(0, 1000), st.integers(0, 2), st.floats(0, 5))
def test_mixing_never_falls_when_an_agents_value_rises(seed: int, agent: int, step: float) -> None:
    torch.manual_seed(seed)
    mixer, q, state = some_mixer(), torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(3)
        higher = q.clone()
        higher[:, agent] += step
        assert (mixer(higher, state) >= mixer(q, state) - 1e-12).all()


def test_who_gets_which_mixer() -> None:
    assert make_mixer("iql", 2, 3, 4, 5) is None
    assert isinstance(make_mixer("vdn", 2, 3, 4, 5), SumMixer)
    mixer = make_mixer("qmix", 2, 3, 4, 5)
    assert isinstance(mixer, QMixer)
    assert mixer(torch.zeros(7, 2), torch.zeros(7, 3)).shape == (7,)


def test_a_target_follows_in_part_or_at_once() -> None:
    target, source = [torch.tensor([0.0, 4.0])], [torch.tensor([1.0, 0.0])]
    track(target, source, 0.25)
    assert target[0].tolist() == [0.25, 3.0]
    track(target, source, 1.0)
    assert target[0].tolist() == [1.0, 0.0]
    source[0].fill_(9.0)
    assert target[0].tolist() == [1.0, 0.0]


# --- how different policies are --------------------------------------------------------------------------------------------------


def test_neural_diversity_by_hand() -> None:
    left, right, coin = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]

    def snd(*policies: list[float]) -> float:
        return system_neural_diversity(KINDS["categorical"], torch.tensor(policies)[:, None].expand(-1, 4, -1).log())

    assert snd(coin, coin, coin) == 0.0
    assert snd(left, right) == pytest.approx(1.0)
    half = sqrt(-(0.75 * log2(0.75) + 0.25 * log2(0.25)) - 0.5)  # Jensen–Shannon: H(¾, ¼) - (H(1, 0) + H(½, ½))/2
    assert snd(left, coin) == pytest.approx(half)
    assert snd(left, right, coin) == pytest.approx((1 + 2 * half) / 3), "the mean over pairs"


def test_neural_diversity_is_the_mean_over_observations() -> None:
    same, apart = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = torch.stack([same, apart, apart, apart], 1).log()
    assert system_neural_diversity(KINDS["categorical"], logits) == pytest.approx(0.75)
