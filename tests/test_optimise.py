"""Gradient steps on a net of some scheme: learning rates, refusals, what the optimiser forgets, and what follows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from k24.envs.base import EnvSpec
from k24.errors import RunError, UsageError
from k24.learners.optimise import Target, Trainee, rule_for, track
from k24.nets import AgentNet
from k24.sharing import K24Config, SharingConfig, make_sharing
from k24.sharing.base import Events
from k24.sparse import MaskedLinear, Reset
from k24.sparse.slots import SlotRule

AGENTS, OBS, ACTIONS = 2, 3, 2


def some_trainee(scheme: str = "k24", optimiser: str = "adam", masks: dict | None = None, **settings) -> Trainee:
    torch.manual_seed(0)
    sharing = make_sharing(scheme, AGENTS, SharingConfig(masks=K24Config(**(masks or {}))))
    net = AgentNet(OBS, ACTIONS, 8, AGENTS, sharing, recurrent=False)
    settings = {"lr": 0.01, "grad_clip": 10.0} | settings
    return Trainee("loss_x", net, sharing, optimiser=optimiser, **settings)  # type: ignore[arg-type]


def loss_of(trainee: Trainee, weights, seed: int = 0) -> Tensor:
    """Mean square of the outputs for random inputs, off from one."""
    x = torch.randn(AGENTS, 1, 16, OBS, generator=torch.Generator().manual_seed(seed))
    return (trainee.net(weights, x, trainee.net.initial_state(16))[0] - 1).square().mean()


def one_step(trainee: Trainee, progress: float = 0.1, seed: int = 0) -> Events:
    g = torch.Generator().manual_seed(seed)
    weights = trainee.begin(progress, g)
    trainee.step(loss_of(trainee, weights, seed), weights)
    return trainee.settle(progress, 0, None, g)


def layers(trainee: Trainee) -> list[MaskedLinear]:
    return [layer for layer in trainee.net.layers.values() if isinstance(layer, MaskedLinear)]


def held(trainee: Trainee) -> set[int]:
    return {id(p) for group in trainee.optimiser.param_groups for p in group["params"]}


# --- learning rate ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "share"), [(-1.0, 1.0), (0.0, 1.0), (0.6, 1.0), (0.7, 0.8), (0.8, 0.6), (0.9, 0.4), (1.0, 0.2), (1.5, 0.2)]
)
def test_the_learning_rate_falls_on_a_line(progress: float, share: float) -> None:
    trainee = some_trainee(lr=0.5, decay=(0.6, 0.2))
    trainee.begin(progress, torch.Generator())
    assert [group["lr"] for group in trainee.optimiser.param_groups] == pytest.approx([0.5 * share, 2 * 0.5 * share, 60 * 0.5 * share])
    assert trainee.metrics()["lr"] == pytest.approx(0.5 * share)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0, 2.0])
def test_or_never(progress: float) -> None:
    trainee = some_trainee("fups", lr=0.5)
    trainee.begin(progress, torch.Generator())
    assert [group["lr"] for group in trainee.optimiser.param_groups] == [0.5]


def test_every_parameter_is_trained_once_and_masked_weights_and_alphas_at_their_own_rates() -> None:
    other = nn.Linear(2, 2)
    trainee = some_trainee(others=[other])
    own, weights, alphas = (group["params"] for group in trainee.optimiser.param_groups)
    assert [id(p) for p in weights] == [id(layer.weight) for layer in layers(trainee)]
    assert [id(p) for p in alphas] == [id(layer.alpha) for layer in layers(trainee)]
    expected = {id(p) for p in [*trainee.net.parameters(), *other.parameters()]}
    assert len(own) + len(weights) + len(alphas) == len(expected)
    assert held(trainee) == expected
    assert isinstance(some_trainee(optimiser="rmsprop").optimiser, torch.optim.RMSprop)


# --- a step ----------------------------------------------------------------------------------------------------------------------


def test_a_step_is_adams_with_a_clipped_gradient() -> None:
    trainee = some_trainee("nops", grad_clip=0.05, eps=1e-5)
    reference = copy.deepcopy(trainee.net)
    optimiser = torch.optim.Adam(reference.parameters(), lr=0.01, eps=1e-5)
    for k in range(3):
        one_step(trainee, seed=k)
        x = torch.randn(AGENTS, 1, 16, OBS, generator=torch.Generator().manual_seed(k))
        loss = (reference(reference.materialise("train"), x, reference.initial_state(16))[0] - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        optimiser.step()
        metrics = trainee.metrics()
        assert metrics["loss_x"] == pytest.approx(float(loss.detach()))
        assert metrics["grad_norm"] == pytest.approx(float(norm)), "the norm before clipping"
        assert metrics["updates"] == trainee.updates == k + 1
    assert float(norm) > 0.05
    for mine, other in zip(trainee.net.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_the_schemes_own_loss_is_trained_too() -> None:
    """The task's loss does not depend on the second agent; diversity moves its masks all the same."""
    moved = []
    for coefficient in (0.0, 0.1):
        trainee = some_trainee(masks={"div_coef": coefficient, "hetero_init_scale": 1.0})
        before = layers(trainee)[1].alpha[1].detach().clone()
        weights = trainee.begin(0.1, torch.Generator())
        x = torch.randn(AGENTS, 1, 16, OBS)
        trainee.step(trainee.net(weights, x, trainee.net.initial_state(16))[0][0].square().mean(), weights)
        moved.append(not torch.equal(layers(trainee)[1].alpha[1], before))
    assert moved == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_none_leave_parameters_as_they_were(where: str, bad: float) -> None:
    trainee = some_trainee()
    one_step(trainee)
    before = copy.deepcopy((trainee.net.state_dict(), trainee.optimiser.state_dict()["state"]))
    weights = trainee.begin(0.1, torch.Generator())
    loss = loss_of(trainee, weights)
    if where == "loss":
        loss = loss * bad
    else:
        weights[0].weight.register_hook(lambda gradient: gradient * bad)
    expected = f"loss_x is {bad} after 1 updates: lower lr" if where == "loss" else "the gradient of loss_x is nan after 1 updates"
    with pytest.raises(RunError, match=expected):
        trainee.step(loss, weights)
    assert trainee.updates == 1
    after = trainee.net.state_dict(), trainee.optimiser.state_dict()["state"]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items() if "usage" not in name)
    for k, state in before[1].items():
        assert all(torch.equal(value, after[1][k][name]) for name, value in state.items())


def test_a_loss_of_nothing_is_refused() -> None:
    trainee = some_trainee()
    with pytest.raises(RunError, match="no row of the batch has a slot after 0 updates"):
        trainee.step(torch.tensor(1.0), trainee.begin(0.1, torch.Generator()))


def test_what_is_behaved_by_follows_the_temperature_even_where_no_step_follows() -> None:
    trainee = some_trainee(masks={"hetero_init_scale": 1.0})
    trainee.begin(0.0, torch.Generator())
    warm = trainee.acting()
    trainee.begin(0.8, torch.Generator())
    for made, old, now in zip(trainee.acting(), warm, trainee.net.snapshot("act"), strict=True):
        assert torch.equal(made.weight, now.weight)
        assert not torch.equal(made.weight, old.weight)


# --- what is forgotten -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adam", "rmsprop"])
def test_moments_of_what_was_reset_are_cleared(optimiser: str) -> None:
    trainee = some_trainee(optimiser=optimiser)
    one_step(trainee)
    alpha = layers(trainee)[1].alpha
    entries = torch.rand_like(alpha) < 0.5
    names = [name for name, value in trainee.optimiser.state[alpha].items() if value.shape == alpha.shape]
    before = {name: trainee.optimiser.state[alpha][name].clone() for name in names}
    acting = trainee.acting()
    assert trainee.acting() is acting, "made once"
    trainee.forget(Events(resets=[Reset(alpha, entries)]))
    assert names
    for name in names:
        assert torch.equal(trainee.optimiser.state[alpha][name], before[name].masked_fill(entries, 0.0))
    assert trainee.acting() is not acting, "what is behaved by is made anew"


@pytest.mark.parametrize("forward", ["expected", "sample"])
def test_alphas_leave_at_the_freeze(forward: str) -> None:
    trainee = some_trainee(masks={"freeze_at": 0.5, "forward": forward})
    assert not one_step(trainee, 0.4).frozen
    alphas = [layer.alpha for layer in layers(trainee)]
    assert {id(a) for a in alphas} <= held(trainee)
    before = trainee.acting()
    assert one_step(trainee, 0.5).frozen
    assert not {id(a) for a in alphas} & held(trainee)
    assert not any(a in trainee.optimiser.state for a in alphas)
    for made, deployed, old in zip(trainee.acting(), trainee.net.snapshot("deploy"), before, strict=True):
        assert torch.equal(made.weight, deployed.weight)
        assert not torch.equal(made.weight, old.weight)
    frozen = [a.detach().clone() for a in alphas]
    masks = [made.weight != 0 for made in trainee.acting()]
    assert not one_step(trainee, 0.9).frozen, "it happens once"
    assert all(torch.equal(a, b) for a, b in zip(alphas, frozen, strict=True))
    assert all(torch.equal(made.weight != 0, mask) for made, mask in zip(trainee.acting(), masks, strict=True))
    trainee.begin(1.0, torch.Generator())
    assert trainee.metrics()["lr"] > 0


# --- what follows ----------------------------------------------------------------------------------------------------------------


def both(target: Target, trainee: Trainee, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of a target, and that which it follows."""
    made = [(a, b) for t, s in zip(target.weights, trainee.acting(), strict=True) for a, b in ((t.weight, s.weight), (t.bias, s.bias))]
    assert target.module is not None
    return made + list(zip(target.module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0, 2.0])
def test_a_target_moves_by_a_share_of_the_way(rate: float) -> None:
    other = nn.Linear(2, 2)
    trainee = some_trainee(others=[other])
    target = Target(trainee, other)
    start = [t.detach().clone() for t, _ in both(target, trainee, other)]
    with torch.no_grad():
        other.weight += 1.0
    one_step(trainee)
    for (t, _), old in zip(both(target, trainee, other), start, strict=True):
        assert torch.equal(t, old), "it does not move by itself"
    target.follow(rate)
    for (t, source), old in zip(both(target, trainee, other), start, strict=True):
        expected = source if rate >= 1 else (1 - rate) * old + rate * source
        assert torch.allclose(t, expected, atol=1e-6)
        assert rate < 1 or torch.equal(t, source)
    assert not any(t.requires_grad for made in target.weights for t in (made.weight, made.bias))


def test_tracking_needs_as_many_tensors_on_both_sides() -> None:
    with pytest.raises(ValueError, match="zip"):
        track([torch.zeros(2)], [], 0.5)


# --- slot rules ------------------------------------------------------------------------------------------------------------------


def test_the_slot_rule_is_the_agents_index_unless_given_and_fits_the_scheme() -> None:
    spec, sharing = EnvSpec(AGENTS, OBS, 1, ACTIONS, 3), make_sharing("k24", AGENTS)
    assert rule_for(None, spec, sharing) == SlotRule(AGENTS)
    rule = SlotRule(AGENTS, lambda obs: obs[..., 0].long())
    assert rule_for(rule, spec, sharing) is rule
    with pytest.raises(UsageError, match="the slot rule has 3 slots and the sharing scheme 2: give both the same"):
        rule_for(SlotRule(3), spec, sharing)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [0.4, 0.6])
@pytest.mark.parametrize("forward", ["expected", "sample"])
def test_a_trainee_and_its_target_go_on_as_they_were(forward: str, until: float) -> None:
    """Taken up again before the freeze and after it."""

    def some() -> tuple[Trainee, Target, nn.Module]:
        mixer = nn.Linear(2, 2)
        trainee = some_trainee(masks={"freeze_at": 0.5, "forward": forward, "reset_interval": 2}, others=[mixer])
        return trainee, Target(trainee, mixer), mixer

    def go_on(trainee: Trainee, target: Target, steps: list[float]) -> None:
        for progress in steps:
            one_step(trainee, progress, int(1000 * progress))
            target.follow(0.3)

    (trainee, target, mixer), (other, other_target, other_mixer) = some(), some()
    first, then = [p for p in (0.1, 0.2, 0.3, 0.4, 0.6) if p <= until], [0.62, 0.7, 0.8]
    go_on(trainee, target, first)
    state = copy.deepcopy((trainee.state_dict(), target.state_dict()))
    other.load_state_dict(state[0])
    other_target.load_state_dict(state[1])
    assert other.updates == trainee.updates == len(first)
    for progress in then:
        for t, f in ((trainee, target), (other, other_target)):
            go_on(t, f, [progress])
        assert trainee.metrics() == other.metrics()
    assert all(torch.equal(value, other.net.state_dict()[name]) for name, value in trainee.net.state_dict().items())
    for (mine, _), (theirs, _) in zip(both(target, trainee, mixer), both(other_target, other, other_mixer), strict=True):
        assert torch.equal(mine, theirs)


def test_a_policys_state_alone_is_enough_to_act() -> None:
    trainee, other = some_trainee(), some_trainee()
    for k in range(3):
        one_step(trainee, seed=k)
    other.acting()
    other.load_policy_state(copy.deepcopy(trainee.state_dict()))
    for mine, theirs in zip(trainee.acting(), other.acting(), strict=True):
        assert torch.equal(mine.weight, theirs.weight)
    assert other.updates == 0
