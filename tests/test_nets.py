"""The agent net: its fast path against its definition, agent indices, independence of agents, and the metrics' names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k24.bench import stepwise_forward
from k24.envs import make_env
from k24.learners import ValueConfig, ValueLearner
from k24.nets import AgentNet, run_gru
from k24.sharing import SCHEMES, K24Config, SharingConfig, make_sharing
from k24.sparse import MaskedLinear, SlotWeights

AGENTS, OBS, HIDDEN, ACTIONS = 3, 5, 8, 4


def some_net(name: str, agent_id: bool | None = None, **masks) -> AgentNet:
    sharing = make_sharing(name, AGENTS, SharingConfig(masks=K24Config(hetero_init_scale=1.0, ema_every=1, **masks)))
    net = AgentNet(OBS, ACTIONS, HIDDEN, AGENTS, sharing, agent_id)
    sharing.resample(0.3)
    return net


def some_inputs(steps: int = 6, rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(AGENTS, steps, rows, OBS), torch.randn(AGENTS, rows, HIDDEN)


# --- against the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("steps", [1, 6])
def test_the_fast_path_equals_one_step_after_the_other(name: str, steps: int) -> None:
    net = some_net(name)
    obs, h = some_inputs(steps)
    obs.requires_grad_()
    h.requires_grad_()
    upstream = torch.randn(AGENTS, steps, 4, ACTIONS)
    wanted = [obs, h, *(p for p in net.parameters() if p.requires_grad)]
    results = []
    for forward in (lambda w: net(w, obs, h)[0], lambda w: stepwise_forward(net, w, obs, h)):
        q = forward(net.materialise("train"))
        results.append([q, *torch.autograd.grad((q * upstream).sum(), wanted)])
    for fast, definition in zip(*results, strict=True):
        assert torch.allclose(fast, definition, atol=1e-5 * max(1.0, float(definition.detach().abs().max())))


@pytest.mark.parametrize("forward", ["sample", "gumbel", "gumbel_soft"])
def test_the_fast_path_with_drawn_masks(forward: str) -> None:
    net = some_net("k24", forward=forward)
    obs, h = some_inputs()
    weights = net.materialise("train")
    assert torch.allclose(net(weights, obs, h)[0], stepwise_forward(net, weights, obs, h), atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sequence_may_be_cut_anywhere(name: str) -> None:
    net = some_net(name)
    obs, h = some_inputs()
    weights = net.snapshot("act")
    with torch.no_grad():
        whole, last = net(weights, obs, h)
        first, between = net(weights, obs[:, :2], h)
        second, end = net(weights, obs[:, 2:], between)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)
    assert torch.allclose(end, last, atol=1e-6)


@pytest.mark.parametrize(("weights", "biases"), [(1, 1), (1, AGENTS), (AGENTS, 1), (AGENTS, AGENTS)])
def test_a_recurrent_weight_for_all_equals_copies_of_it(weights: int, biases: int) -> None:
    made = SlotWeights(torch.randn(weights, 3 * HIDDEN, HIDDEN), torch.randn(biases, 3 * HIDDEN))
    gates, h = torch.randn(AGENTS, 5, 2, 3 * HIDDEN), torch.randn(AGENTS, 2, HIDDEN)
    copies = SlotWeights(made.weight.expand(AGENTS, -1, -1).clone(), made.bias.expand(AGENTS, -1).clone())
    assert torch.allclose(run_gru(gates, h, made), run_gru(gates, h, copies), atol=1e-6)


# --- agents ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_agents_do_not_see_each_other(name: str) -> None:
    net = some_net(name)
    obs, h = some_inputs()
    weights = net.snapshot("act")
    with torch.no_grad():
        q, last = net(weights, obs, h)
        for agent in range(AGENTS):
            other_obs, other_h = obs.clone(), h.clone()
            other_obs[agent] += 1.0
            other_h[agent] -= 0.5
            changed = [(a != b).flatten(1).any(1) for a, b in zip(net(weights, other_obs, other_h), (q, last), strict=True)]
            expected = torch.arange(AGENTS) == agent
            assert torch.equal(changed[0], expected)
            assert torch.equal(changed[1], expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_do_not_see_each_other_nor_later_steps(name: str) -> None:
    net = some_net(name)
    obs, h = some_inputs()
    weights = net.snapshot("act")
    with torch.no_grad():
        q, _ = net(weights, obs, h)
        other = obs.clone()
        other[:, 3, 1] += 1.0
        changed = (net(weights, other, h)[0] - q).abs().amax((0, 3)) > 1e-6
    assert changed[3:, 1].all()
    changed[3:, 1] = False
    assert not changed.any()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_agents_index_is_appended(name: str) -> None:
    net = some_net(name)
    assert net.agent_id == make_sharing(name, AGENTS).agent_id
    with_id = some_net(name, agent_id=True)
    assert with_id.layers["fc1"].in_features == OBS + AGENTS
    plain = some_net(name, agent_id=False)
    assert plain.layers["fc1"].in_features == OBS
    # By hand: the one-hot index as further observations of a net that appends none.
    obs, h = some_inputs()
    by_hand = torch.cat([obs, torch.eye(AGENTS)[:, None, None].expand(AGENTS, 6, 4, AGENTS)], -1)
    weights = with_id.snapshot("act")
    outputs, _ = with_id(weights, obs, h)
    with_id.agent_id = False
    assert torch.equal(with_id(weights, by_hand, h)[0], outputs)


def test_shared_dense_agents_differ_by_their_index_alone() -> None:
    obs, h = some_inputs()
    obs, h = obs[:1].expand_as(obs), h[:1].expand_as(h)
    for name, differ in (("fups", False), ("fups_id", True)):
        net = some_net(name)
        q, _ = net(net.snapshot("act"), obs, h)
        assert (not torch.allclose(q[0], q[1], atol=1e-5)) == differ


def test_masks_make_agents_differ_without_an_index() -> None:
    obs, h = some_inputs()
    obs, h = obs[:1].expand_as(obs), h[:1].expand_as(h)
    for name in ("k24", "k24_random"):
        net = some_net(name, agent_id=False)
        q, _ = net(net.snapshot("deploy"), obs, h)
        assert not torch.allclose(q[0], q[1], atol=1e-3)


# --- without recurrence ----------------------------------------------------------------------------------------------------------


def feed_forward(name: str, layer_norm: bool = False, agent_id: bool | None = None, **masks) -> AgentNet:
    sharing = make_sharing(name, AGENTS, SharingConfig(masks=K24Config(hetero_init_scale=1.0, ema_every=1, **masks)))
    net = AgentNet(OBS, ACTIONS, HIDDEN, AGENTS, sharing, agent_id, recurrent=False, layer_norm=layer_norm)
    sharing.resample(0.3)
    return net


def in_plain_torch(net: AgentNet, weights: list[SlotWeights], obs: Tensor, slots: Tensor) -> Tensor:
    """Row by row: ``[A, T, N, U]``, zero for a row of no slot."""
    out = obs.new_zeros(*obs.shape[:-1], ACTIONS)
    for at in (slots >= 0).nonzero().tolist():
        agent, t, n = at
        x, slot = obs[agent, t, n], int(slots[agent, t, n])
        if net.agent_id:
            x = torch.cat([x, torch.eye(AGENTS)[agent]])
        for k, made in enumerate(weights):
            x = made.weight[min(slot, len(made.weight) - 1)] @ x + made.bias[min(slot, len(made.bias) - 1)]
            if k < 2:
                x = F.relu(F.layer_norm(x, (HIDDEN,)) if net.layer_norm else x)
        out[agent, t, n] = x
    return out


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_net_without_recurrence_against_plain_torch(name: str, layer_norm: bool) -> None:
    net = feed_forward(name, layer_norm)
    assert list(net.layers) == ["fc1", "fc2", "fc3"]
    obs, weights, h = some_inputs()[0], net.materialise("train"), net.initial_state(4)
    assert h.shape == (AGENTS, 4, 0)
    own = torch.arange(AGENTS)[:, None, None].expand(AGENTS, 6, 4)
    expected = in_plain_torch(net, weights, obs, own)
    whole, last = net(weights, obs, h)
    assert last.shape == h.shape
    assert torch.allclose(whole, expected, atol=1e-5)
    steps = torch.cat([net(weights, obs[:, t : t + 1], h)[0] for t in range(6)], 1)
    assert torch.allclose(whole, steps, atol=1e-6), "time folded into rows is one step after the other"
    upstream = torch.randn_like(whole)
    wanted = [p for p in net.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((q * upstream).sum(), wanted, retain_graph=True, allow_unused=True) for q in (whole, expected)]
    for mine, definition in zip(*gradients, strict=True):
        assert (mine is None) == (definition is None)
        assert mine is None or torch.allclose(mine, definition, atol=1e-4)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", ["k24", "nops", "fups_id"])
def test_slots_without_recurrence(name: str, layer_norm: bool) -> None:
    net = feed_forward(name, layer_norm)
    obs, weights, h = some_inputs()[0], net.materialise("train"), net.initial_state(4)
    slots = torch.randint(-1, AGENTS, (AGENTS, 6, 4))
    assert torch.allclose(net(weights, obs, h, slots=slots)[0], in_plain_torch(net, weights, obs, slots), atol=1e-5)
    alive = torch.rand(AGENTS, 6, 4) < 0.6
    own = torch.arange(AGENTS)[:, None, None].expand(AGENTS, 6, 4)
    expected = in_plain_torch(net, weights, obs, own.where(alive, -1))
    assert torch.allclose(net(weights, obs, h, alive=alive)[0], expected, atol=1e-5)
    assert torch.allclose(net(weights, obs, h, slots=own.where(alive, -1))[0], expected, atol=1e-5)


@pytest.mark.parametrize("by_slots", [False, True])
@pytest.mark.parametrize("partly", [False, True])
def test_without_recurrence_a_sequence_is_observed_once(partly: bool, by_slots: bool) -> None:
    net = feed_forward("k24", agent_id=False, ema_momentum=0.75)
    obs, h = some_inputs()[0], net.initial_state(4)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]).bool() if partly else None
    alive = torch.rand(AGENTS, 6, 4) < 0.6
    slots = torch.arange(AGENTS)[:, None, None].expand(AGENTS, 6, 4).where(alive, -1)
    who = {"slots": slots} if by_slots else {"alive": alive}
    net(net.materialise("train"), obs, h, valid, observe=True, **who)
    for agent in range(AGENTS):
        rows = obs[agent][alive[agent] if valid is None else alive[agent] & valid]
        expected = 0.75 * 1.0 + 0.25 * rows.abs().mean(0)
        assert torch.allclose(net.layers["fc1"].ema[agent], expected, atol=1e-6), "one batch of 24 rows, not six of four"


def test_every_slot_is_asked_alike_without_recurrence() -> None:
    net = feed_forward("k24", agent_id=True)
    obs, weights = torch.randn(4, OBS), net.snapshot("deploy")
    own = torch.arange(AGENTS)[:, None, None].expand(AGENTS, 1, 4)
    expected = in_plain_torch(net, weights, obs.expand(AGENTS, 1, 4, OBS), own)
    assert torch.allclose(net.compare(weights, obs), expected[:, 0], atol=1e-5)


# --- statistics ------------------------------------------------------------------------------------------------------------------


def test_only_the_learners_own_pass_is_observed() -> None:
    net = some_net("k24", ema_momentum=0.0, own_masks="all")
    obs, h = some_inputs()
    weights = net.materialise("train")
    layers = {name: layer for name, layer in net.layers.items() if isinstance(layer, MaskedLinear)}
    net(weights, obs, h)
    assert all(layer.ema.eq(1).all() for layer in layers.values())
    net(weights, obs, h, observe=True)
    assert all(layer.ema.ne(1).any() for layer in layers.values())
    assert torch.allclose(layers["fc1"].ema[:, :OBS], obs.abs().mean((1, 2)), atol=1e-6)
    assert torch.allclose(layers["fc1"].ema[:, OBS:], torch.eye(AGENTS))
    states = [h]
    for t in range(obs.shape[1] - 1):
        states.append(net(weights, obs[:, t : t + 1], states[-1])[1])
    assert torch.allclose(layers["gru_recurrent"].ema, torch.stack(states).abs().mean((0, 2)), atol=1e-6), "the states that it multiplies"


@pytest.mark.parametrize("name", ["k24", "k24_shared"])
def test_steps_outside_an_episode_are_not_observed(name: str) -> None:
    obs, h = some_inputs()
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]).bool()
    poisoned = torch.where(valid[None, :, :, None], obs, 1e6)
    nets = [some_net(name, ema_momentum=0.0) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, seen in zip(nets, (obs, poisoned), strict=True):
        net(net.materialise("deploy"), seen, h, valid, observe=True)
    for ours, other in zip(nets[0].layers.values(), nets[1].layers.values(), strict=True):
        assert torch.allclose(ours.ema, other.ema, atol=1e-6)
    rows = obs[:, valid].abs()
    expected = rows.mean(1) if name == "k24" else rows.mean((0, 1))[None]
    assert torch.allclose(nets[0].layers["fc1"].ema[:, :OBS], expected, atol=1e-6)


# The names that are part of the interface, whatever logs them.
NAMES = {
    *("loss_td", "div_loss", "div_coef", "temperature", "progress", "pattern_entropy", "overall_sparsity", "snd"),
    *("pattern_mean_similarity", "pattern_max_similarity", "pattern_min_similarity", "mask_hamming", "mask_flip_rate"),
    *(f"pattern_{k}_prob" for k in range(6)),
    *(f"sparsity_layer_{k}" for k in range(6)),
    "dead_weight_frac",
}


def test_every_public_metric_is_logged_and_a_number() -> None:
    env = make_env("toy/memory", 8)
    sharing = make_sharing("k24", env.spec.n_agents, SharingConfig(masks=K24Config(div_coef=0.1)))
    learner = ValueLearner("qmix", env.spec, sharing, ValueConfig(batch_size=8, env_steps_per_update=32), hidden=8)
    for step in range(2):
        learner.gather(env, 32 * step, seed=step)
        learner.learn(0.1 * (step + 1), 32 * (step + 1))
        metrics = learner.metrics()
    assert set(metrics) >= NAMES
    assert all(isinstance(value, float) and value == value for value in metrics.values())
    assert metrics["progress"] == pytest.approx(0.2)
    assert metrics["temperature"] == pytest.approx(1 - 0.97 / 3)
    assert 0.4 < metrics["overall_sparsity"] <= 0.5
