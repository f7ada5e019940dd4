"""How masks move while K-2:4 trains: temperature, resets, the freeze."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k24.envs.base import EnvSpec
from k24.errors import UsageError
from k24.learners import Episodes, ValueConfig, ValueLearner
from k24.sharing import Events, K24Config, SharingConfig, make_sharing
from k24.sharing.k24 import K24
from k24.sparse import MaskConfig, MaskedLinear, Reset, TemperatureSchedule, clear_moments, draw_together, drop_state, reset_layer

TOTAL = 100  # gradient steps of a whole training


def some_scheme(**settings) -> K24:
    """Two slots, two layers."""
    scheme = make_sharing("k24", 2, SharingConfig(masks=K24Config(**settings)))
    assert isinstance(scheme, K24)
    scheme.linear(8, 16, "input")
    scheme.linear(16, 4, "output")
    return scheme


def one_step(scheme: K24, k: int, policy_kl: float | None = None) -> Events:
    """What a learner does with a scheme in its k-th gradient step."""
    scheme.resample(k / TOTAL)
    scheme.aux_loss([layer.materialise("train") for layer in scheme.layers], torch.tensor(1.0))  # type: ignore[operator]
    return scheme.step(k / TOTAL, 1000 * k, policy_kl)


# --- decay of differences ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 1000))
def test_drawing_together_keeps_the_mean_and_takes_a_share_of_each_difference(slots: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = MaskedLinear(6, 4, slots, config=MaskConfig(hetero_init_scale=2.0))
    before = layer.alpha.detach().clone()
    draw_together(layer, share)
    mean = before.mean(0)
    torch.testing.assert_close(layer.alpha.detach(), mean + (1 - share) * (before - mean))


def test_alphas_come_together_at_each_step_until_masks_are_frozen() -> None:
    scheme = some_scheme(alpha_decay=0.25, hetero_init_scale=1.0, freeze_at=0.5)
    apart = [layer.alpha.detach().std(0) for layer in scheme.masked]
    for k in range(3):
        one_step(scheme, k)
    for layer, before in zip(scheme.masked, apart, strict=True):
        torch.testing.assert_close(layer.alpha.detach().std(0), 0.75**3 * before)
    frozen = [layer.alpha.detach().clone() for layer in scheme.masked]
    one_step(scheme, 50)
    one_step(scheme, 51)
    assert all(torch.equal(layer.alpha, before) for layer, before in zip(scheme.masked, frozen, strict=True))


def test_by_default_an_alpha_loses_three_thousandths_of_its_difference() -> None:
    scheme = some_scheme()
    before = scheme.masked[0].alpha.detach().std(0)
    one_step(scheme, 1)
    torch.testing.assert_close(scheme.masked[0].alpha.detach().std(0), 0.997 * before)


def test_without_decay_only_gradients_move_alphas() -> None:
    scheme = some_scheme(alpha_decay=0.0, hetero_init_scale=1.0)
    before = [layer.alpha.detach().clone() for layer in scheme.masked]
    one_step(scheme, 1)
    assert all(torch.equal(layer.alpha, alpha) for layer, alpha in zip(scheme.masked, before, strict=True))


# --- temperature -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"), [(-1, 1.0), (0, 1.0), (0.15, 0.7575), (0.3, 0.515), (0.6, 0.03), (0.8, 0.03), (1, 0.03), (2, 0.03)]
)
def test_temperature_by_hand(progress: float, expected: float) -> None:
    assert TemperatureSchedule()(progress) == pytest.approx(expected)


def test_temperature_in_a_window_and_without_two_phases() -> None:
    late = TemperatureSchedule(5.0, 0.1, 0.5, 1.0)
    assert [late(x) for x in (0.0, 0.5, 0.625, 0.75, 0.875, 1.0)] == pytest.approx([5.0, 5.0, 3.0, 1.0, 0.55, 0.1])
    cool = TemperatureSchedule(1.0, 0.1, 0.0, 1.0)
    assert [cool(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert TemperatureSchedule(2.0, 2.0)(0.3) == 2.0


unit = st.floats(0, 1)


@given(st.floats(0.01, 1), st.floats(1, 10), unit, st.floats(0.01, 1), unit, unit)
def test_temperature_never_rises_and_stays_between_its_ends(
    low: float, high: float, start: float, width: float, x: float, y: float
) -> None:
    schedule = TemperatureSchedule(high, low, start * (1 - width), start * (1 - width) + width * 0.999)
    warm, cold = schedule(min(x, y)), schedule(max(x, y))
    assert low * (1 - 1e-9) <= cold <= warm * (1 + 1e-9)
    assert warm <= high * (1 + 1e-9)


def test_impossible_schedules() -> None:
    for arguments in ((0.1, 5.0), (5.0, 0.0), (5.0, -1.0)):
        with pytest.raises(UsageError, match="0 < temperature_min"):
            TemperatureSchedule(*arguments)
    for start, end in ((0.8, 0.8), (-0.1, 0.5), (0.0, 1.1)):
        with pytest.raises(UsageError, match="0 <= anneal_start"):
            TemperatureSchedule(start=start, end=end)


def test_resampling_sets_the_temperature_of_every_layer() -> None:
    scheme = some_scheme()
    scheme.resample(0.2)
    assert [layer.temperature for layer in scheme.masked] == pytest.approx([0.97 * 2 / 3 + 0.03] * 2)
    assert scheme.metrics()["temperature"] == pytest.approx(0.97 * 2 / 3 + 0.03)
    assert scheme.metrics()["progress"] == 0.2


# --- resets of a layer -----------------------------------------------------------------------------------------------------------


def used_layer(steps: int = 1000, **settings) -> tuple[MaskedLinear, Tensor]:
    """No slot kept the first 8 inputs in more than one step of 2000, nor slot 0 the next 8; all others were kept half the time."""
    layer = MaskedLinear(64, 64, 3, config=MaskConfig(**settings))
    rare = torch.zeros(3, 64, 64, dtype=torch.bool)
    rare[:, :, :8] = True
    rare[0, :, 8:16] = True
    layer.usage.copy_(torch.where(rare, 0.0005 * steps, 0.5 * steps))
    layer.usage_steps.fill_(steps)
    layer.last_magnitude.fill_(3.0)
    return layer, rare


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_only_what_was_hardly_ever_kept_is_drawn_anew(ratio: float) -> None:
    layer, rare = used_layer(init_gain=2.0)
    alpha, weight = layer.alpha.detach().clone(), layer.weight.detach().clone()
    alphas, weights = reset_layer(layer, ratio)
    assert alphas.parameter is layer.alpha
    assert weights.parameter is layer.weight
    for before, now, reset, candidates in ((alpha, layer.alpha, alphas, rare), (weight, layer.weight, weights, rare.all(0))):
        assert torch.equal(now != before, reset.entries), "what is said to have changed is what has"
        assert not (reset.entries & ~candidates).any()
        assert reset.entries[candidates].float().mean() == pytest.approx(ratio, abs=0.08)
    if ratio:
        assert layer.alpha[alphas.entries].detach().std() == pytest.approx(layer.config.hetero_init_scale, rel=0.3)
        fresh = layer.weight[weights.entries].detach()
        assert fresh.abs().max() <= 2 * 64**-0.5
        assert fresh.std() == pytest.approx(2 * 64**-0.5 / 3**0.5, rel=0.2), "the distribution of the start"
    assert (layer.usage == 0).all()
    assert layer.usage_steps == 0


def test_rare_means_less_than_one_step_in_a_hundred() -> None:
    layer = MaskedLinear(4, 1, 1)
    layer.usage.copy_(torch.tensor([0.0, 9.9, 10.1, 1000.0]))
    layer.usage_steps.fill_(1000)
    alphas, weights = reset_layer(layer, 1.0)
    assert alphas.entries.flatten().tolist() == weights.entries.flatten().tolist() == [True, True, False, False]


def test_a_reset_moves_the_running_magnitude_part_of_the_way() -> None:
    for blend, expected in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        layer, _ = used_layer()
        reset_layer(layer, 0.0, ema_blend=blend)
        assert layer.ema.eq(expected).all()
    layer, _ = used_layer(ema_bias_correction=True)
    reset_layer(layer, 0.0)
    assert layer.ema.eq(0.0).all(), "a bias-corrected mean needs no help"


def test_nothing_is_reset_in_a_frozen_layer_or_before_a_step() -> None:
    layer, _ = used_layer()
    layer.freeze()
    assert reset_layer(layer, 1.0) == []
    assert reset_layer(MaskedLinear(8, 4, 2), 1.0) == []


def test_resets_repeat_with_the_same_seed() -> None:
    layers = [used_layer()[0] for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        reset_layer(layer, 0.5, torch.Generator().manual_seed(4))
    assert torch.equal(layers[0].alpha, layers[1].alpha)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_usage_counts_the_masks_that_were_used() -> None:
    for forward in ("expected", "sample", "gumbel"):
        layer = MaskedLinear(6, 4, 2, config=MaskConfig(forward=forward, hetero_init_scale=1.0))  # type: ignore[arg-type]
        layer.count_usage()
        assert layer.usage_steps == 0, "nothing was used yet"
        total = torch.zeros(2, 4, 6)
        for _ in range(3):
            layer.resample(0.5)
            total += layer.materialise("train").weight.detach() / layer.weight.detach()
            layer.count_usage()
        assert torch.allclose(layer.usage, total, atol=1e-4)
        assert layer.usage_steps == 3
        assert torch.allclose(layer.usage[..., 4:], torch.tensor(3.0), atol=1e-5), "padding leaves these no choice, so they are always kept"


def test_moments_are_cleared_where_something_was_reset_and_nowhere_else() -> None:
    a, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))
    for kind in (torch.optim.Adam, torch.optim.RMSprop):
        optimiser = kind([a, b], lr=0.1)
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimiser.step()
        entries = torch.rand(3, 4) < 0.5
        names = [n for n, v in optimiser.state[a].items() if isinstance(v, Tensor) and v.shape == a.shape]
        before = {name: optimiser.state[a][name].clone() for name in names}
        other = {name: value.clone() for name, value in optimiser.state[b].items()}
        assert names
        clear_moments(optimiser, [Reset(a, entries), Reset(torch.nn.Parameter(torch.zeros(2)), torch.ones(2, dtype=torch.bool))])
        for name in names:
            assert torch.equal(optimiser.state[a][name], before[name].masked_fill(entries, 0.0))
            assert before[name].ne(0).all()
        assert all(torch.equal(optimiser.state[b][name], value) for name, value in other.items())
        assert optimiser.state[a]["step"] == 1


# --- resets and freeze of a scheme -----------------------------------------------------------------------------------------------


def test_resets_come_at_their_interval_but_not_in_the_last_one_and_never_after_the_freeze() -> None:
    scheme = some_scheme(freeze_at=0.75, reset_interval=10)
    happened = {k: one_step(scheme, k) for k in range(1, TOTAL + 1)}
    resets = [k for k, events in happened.items() if events.resets]
    assert resets == [10, 20, 30, 40, 50, 60], "at 70 only half an interval is left"
    assert [k for k, events in happened.items() if events.frozen] == [75]
    assert [id(p) for p in happened[75].retired] == [id(layer.alpha) for layer in scheme.masked]
    assert len(happened[10].resets) == 2 * len(scheme.masked)


def test_where_masks_never_freeze_nothing_is_reset_in_the_last_interval() -> None:
    scheme = some_scheme(freeze_at=2.0, reset_interval=10)
    assert [k for k in range(1, 101) if one_step(scheme, k).resets] == [10, 20, 30, 40, 50, 60, 70, 80]


def test_no_interval_no_resets_and_a_freeze_beyond_one_never_comes() -> None:
    scheme = some_scheme(freeze_at=1.5, reset_interval=0)
    events = [one_step(scheme, k) for k in range(1, TOTAL + 1)]
    assert not any(e.resets or e.frozen or e.retired for e in events)
    assert scheme.retired() == []
    with pytest.raises(UsageError, match=r"freeze_at 0.0 must be positive"):
        K24Config(freeze_at=0.0)


def test_masks_freeze_at_the_end_of_annealing_unless_told_otherwise() -> None:
    assert K24Config(anneal_end=0.7).freeze_progress == 0.7
    assert K24Config(anneal_end=0.7, freeze_at=0.9).freeze_progress == 0.9


@pytest.mark.parametrize("interval", [0, 50])
def test_a_policy_that_moved_far_triggers_a_reset(interval: int) -> None:
    scheme = some_scheme(adaptive_reset=True, kl_threshold=0.1, reset_interval=interval, freeze_at=2.0)
    assert scheme.wants_policy_kl
    assert not some_scheme().wants_policy_kl
    assert not one_step(scheme, 1).resets
    assert not one_step(scheme, 2, 0.1).resets, "at the threshold is not above it"
    assert one_step(scheme, 3, 0.11).resets
    assert not one_step(scheme, 4, None).resets


def test_a_policy_that_keeps_moving_still_has_a_quiet_end() -> None:
    scheme = some_scheme(adaptive_reset=True, reset_interval=0, freeze_at=0.75)
    # Looked at every ten steps, then every step: a reset that the nearness of the freeze forbids stays forbidden.
    looks = [*range(10, 71, 10), *range(71, 75)]
    resets = [k for k in range(1, 75) if one_step(scheme, k, 1.0 if k in looks else None).resets]
    assert resets == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("slot", [0, 1])
def test_a_slots_masks_are_drawn_anew_and_nothing_else(slot: int) -> None:
    scheme = some_scheme(hetero_init_scale=0.5)
    for k in (1, 2):
        one_step(scheme, k)
    before = [copy.deepcopy(layer.state_dict()) for layer in scheme.masked]
    resets = scheme.reset_slot(slot, torch.Generator().manual_seed(1))
    assert [r.parameter for r in resets] == [layer.alpha for layer in scheme.masked]
    for layer, reset, old in zip(scheme.masked, resets, before, strict=True):
        own = torch.zeros_like(layer.alpha, dtype=torch.bool)
        own[slot] = True
        assert torch.equal(reset.entries, own)
        assert torch.equal(layer.alpha != old["alpha"], own)
        assert (layer.usage[slot] == layer.usage_steps).all(), "new masks are not taken for weights that were never kept"
        assert torch.equal(layer.usage[1 - slot], old["usage"][1 - slot])
        assert all(torch.equal(value, old[name]) for name, value in layer.state_dict().items() if name not in ("alpha", "usage"))
    fresh = torch.cat([layer.alpha[slot].detach().flatten() for layer in scheme.masked])
    assert fresh.mean().abs() < 0.12
    assert fresh.std() == pytest.approx(0.5, rel=0.2), "the distribution of the start"
    assert one_step(scheme, 3).resets == [], "a turn of one slot does not bring the next reset forward"
    scheme.reset_slot(slot, torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([layer.alpha[slot].detach().flatten() for layer in scheme.masked]), fresh)


def test_a_slots_thresholds_are_drawn_anew_in_kaleidoscope() -> None:
    scheme = make_sharing("kaleidoscope", 3)
    scheme.linear(8, 16, "hidden")
    resets = scheme.reset_slot(1, torch.Generator().manual_seed(1))
    assert resets
    for reset in resets:
        assert reset.entries[1].all()
        assert not reset.entries[[0, 2]].any()
        assert -10 <= reset.parameter[1].min() <= reset.parameter[1].max() <= -5


def test_slots_that_have_nothing_of_their_own_are_not_reset() -> None:
    frozen = some_scheme(freeze_at=0.5)
    one_step(frozen, 60)
    others = [make_sharing(name, 2) for name in ("k24_random", "k24_shared", "fups", "fups_id", "nops")]
    for scheme in others:
        scheme.linear(8, 16, "hidden")
    for scheme in (frozen, *others):
        before = [copy.deepcopy(layer.state_dict()) for layer in scheme.layers]
        assert scheme.reset_slot(0) == []
        for layer, old in zip(scheme.layers, before, strict=True):
            assert all(torch.equal(value, old[name]) for name, value in layer.state_dict().items())


def test_alphas_leave_the_optimiser_when_they_retire() -> None:
    stays, goes = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3))
    optimiser = torch.optim.Adam([{"params": [stays]}, {"params": [goes]}], lr=0.1)
    stays.grad, goes.grad = torch.ones(3), torch.ones(3)
    optimiser.step()
    drop_state(optimiser, [goes])
    assert [len(group["params"]) for group in optimiser.param_groups] == [1, 0]
    assert goes not in optimiser.state
    assert goes.grad is None
    assert not goes.requires_grad
    before = goes.detach().clone()
    stays.grad = torch.ones(3)
    optimiser.step()
    assert torch.equal(goes, before)
    drop_state(optimiser, [goes])


def some_episodes(spec: EnvSpec, count: int) -> Episodes:
    batch = Episodes.empty(spec, count, torch.device("cpu"), avail=False)
    batch.obs, batch.state = torch.randn_like(batch.obs), torch.randn_like(batch.state)
    batch.actions = torch.randint(0, spec.n_actions, batch.actions.shape)
    batch.reward = torch.randn_like(batch.reward)
    batch.valid[:] = True
    return batch


@pytest.mark.parametrize("forward", ["expected", "sample", "gumbel"])
def test_a_learner_follows_the_freeze(forward: str) -> None:
    spec = EnvSpec(2, 5, 3, 3, 4)
    sharing = make_sharing("k24", 2, SharingConfig(masks=K24Config(forward=forward)))  # type: ignore[arg-type]
    learner = ValueLearner("qmix", spec, sharing, ValueConfig(batch_size=4, target_update=1000), hidden=8)
    alphas = [layer.alpha for layer in sharing.masked]  # type: ignore[attr-defined]
    batch = some_episodes(spec, 4)
    at_start = [w.weight for w in learner.net.snapshot("deploy")]
    learner.update(batch, 0.59, 59_000)
    held = {id(p) for group in learner.policy.optimiser.param_groups for p in group["params"]}
    assert {id(a) for a in alphas} <= held
    learner.update(batch, 0.6, 60_000)
    held = {id(p) for group in learner.policy.optimiser.param_groups for p in group["params"]}
    assert not {id(a) for a in alphas} & held
    assert not any(a in learner.policy.optimiser.state for a in alphas)
    deployed = learner.net.snapshot("deploy")
    for (weight, bias), now, start in zip(learner.state_dict()["target"]["weights"], deployed, at_start, strict=True):
        assert torch.equal(weight, now.weight), "the target network is what will be deployed"
        assert torch.equal(bias, now.bias)
        assert not torch.equal(weight, start)
    frozen = [a.detach().clone() for a in alphas]
    masks = [w.weight != 0 for w in deployed]
    for _ in range(3):
        learner.update(batch, 0.9, 90_000)
        for phase in ("train", "act", "sampled"):
            for made, fixed in zip(learner.net.snapshot(phase), learner.net.snapshot("deploy"), strict=True):  # type: ignore[arg-type]
                assert torch.equal(made.weight, fixed.weight)
    assert all(torch.equal(a, b) for a, b in zip(alphas, frozen, strict=True))
    now = learner.net.snapshot("deploy")
    assert all(torch.equal(w.weight != 0, m) for w, m in zip(now, masks, strict=True))
    assert all(not torch.equal(a.weight, b.weight) for a, b in zip(now, deployed, strict=True)), "weights train on"
