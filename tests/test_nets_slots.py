"""Rows that choose their slot: against a net that looks at one row at a time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k24.envs import make_env
from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.errors import RunError, UsageError
from k24.learners import Episodes, NetActor, ValueConfig, ValueLearner
from k24.learners.rollout import slots_of
from k24.nets import AgentNet
from k24.sharing import SCHEMES, K24Config, SharingConfig, make_sharing
from k24.sparse.gru import gru_step
from k24.sparse.layers import MaskedLinear
from k24.sparse.slots import SlotRule, SlotWeights, by_unit_type

AGENTS, SLOTS, HIDDEN, OBS, ACTIONS = 4, 3, 8, 6, 5


def make_net(scheme: str = "k24", seed: int = 0) -> AgentNet:
    torch.manual_seed(seed)
    sharing = make_sharing(scheme, SLOTS, SharingConfig(masks=K24Config(ema_every=1, own_masks="all")))
    net = AgentNet(OBS, ACTIONS, HIDDEN, AGENTS, sharing)
    with torch.no_grad():
        for layer in net.layers.values():
            if isinstance(layer, MaskedLinear):
                layer.alpha.normal_()
    sharing.resample(0.5, torch.Generator().manual_seed(seed))
    return net


def row_by_row(net: AgentNet, weights: list[SlotWeights], obs: Tensor, h: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: each row, each step, with the weights of its slot; a row of none gives zeros and forgets."""

    def linear(k: int, slot: int, x: Tensor) -> Tensor:
        w = weights[k]
        return w.weight[slot if len(w.weight) > 1 else 0] @ x + w.bias[slot if len(w.bias) > 1 else 0]

    agents, steps, rows, _ = obs.shape
    outputs, last = {}, {}
    for a in range(agents):
        for n in range(rows):
            state = h[a, n]
            for t in range(steps):
                slot = int(slots[a, t, n])
                if slot < 0:
                    outputs[a, t, n], state = obs.new_zeros(net.n_outputs), torch.zeros_like(state)
                    continue
                x = obs[a, t, n]
                if net.agent_id:
                    x = torch.cat([x, torch.eye(agents, dtype=x.dtype)[a]])
                x = linear(0, slot, x).relu()
                w, b = weights[2].weight, weights[2].bias
                gates = linear(1, slot, x)[None, None]
                own_w, own_b = w[slot if len(w) > 1 else 0][None], b[slot if len(b) > 1 else 0][None]
                state = gru_step(gates, state[None, None], own_w, own_b)[0, 0]
                outputs[a, t, n] = linear(5, slot, linear(4, slot, linear(3, slot, state).relu()).relu())
            last[a, n] = state
    out = torch.stack([torch.stack([torch.stack([outputs[a, t, n] for n in range(rows)]) for t in range(steps)]) for a in range(agents)])
    return out, torch.stack([torch.stack([last[a, n] for n in range(rows)]) for a in range(agents)])


def sequences(kind: str, steps: int, rows: int, g: torch.Generator) -> Tensor:
    """Slots ``[A, T, N]``: the same all along, with deaths, with late arrivals, or anything."""
    whole = torch.randint(0, SLOTS, (AGENTS, 1, rows), generator=g).expand(-1, steps, -1).clone()
    moment = torch.randint(0, steps + 1, (AGENTS, 1, rows), generator=g)
    clock = torch.arange(steps)[:, None]
    if kind == "deaths":
        whole[clock.expand_as(whole) >= moment] = -1
    elif kind == "arrivals":
        whole[clock.expand_as(whole) < moment] = -1
    elif kind == "anything":
        whole = torch.randint(-1, SLOTS, whole.shape, generator=g)
    return whole


@pytest.mark.parametrize("kind", ["whole", "deaths", "arrivals", "anything"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_are_those_of_single_rows(scheme: str, kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    net = make_net(scheme)
    obs, slots = torch.randn(AGENTS, 5, 7, OBS, generator=g), sequences(kind, 5, 7, g)
    h = torch.randn(AGENTS, 7, HIDDEN, generator=g)
    results = []
    for run in (lambda w: net(w, obs, h, slots=slots), lambda w: row_by_row(net, w, obs, h, slots)):
        net.zero_grad()
        out, last = run(net.materialise("train"))
        out.square().sum().backward()
        living = (slots[:, -1] >= 0)[..., None]
        results.append([out.detach(), (last * living).detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["whole", "deaths", "arrivals", "anything"]), st.integers(0, 2**31))
def test_one_sequence_is_its_steps_taken_singly(steps: int, rows: int, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    net = make_net()
    weights = net.snapshot("act")
    obs, slots = torch.randn(AGENTS, steps, rows, OBS, generator=g), sequences(kind, steps, rows, g)
    whole, _ = net(weights, obs, net.initial_state(rows), slots=slots)
    h = net.initial_state(rows)
    for t in range(steps):
        out, h = net(weights, obs[:, t : t + 1], h, slots=slots[:, t : t + 1])
        torch.testing.assert_close(out[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "deaths", "anything"])
def test_the_agents_own_indices_as_slots_are_the_plain_layout(kind: str) -> None:
    torch.manual_seed(0)
    net = AgentNet(OBS, ACTIONS, HIDDEN, SLOTS, make_sharing("k24", SLOTS))
    weights, obs = net.snapshot("act"), torch.randn(SLOTS, 5, 7, OBS)
    alive = torch.ones(SLOTS, 5, 7, dtype=torch.bool) if kind == "whole" else torch.rand(SLOTS, 5, 7) < 0.7
    slots = torch.arange(SLOTS)[:, None, None].expand_as(alive)
    plain, _ = net(weights, obs, net.initial_state(7), alive=alive)
    assert torch.equal(plain[~alive], torch.zeros_like(plain[~alive]))
    if kind == "whole":
        torch.testing.assert_close(net(weights, obs, net.initial_state(7), slots=slots)[0], plain)
        torch.testing.assert_close(net(weights, obs, net.initial_state(7))[0], plain)


@pytest.mark.parametrize("kind", ["whole", "deaths", "arrivals", "anything"])
def test_only_rows_that_count_move_the_running_magnitude_and_each_moves_its_own(kind: str) -> None:
    g = torch.Generator().manual_seed(3)
    net = make_net()
    layer = net.layers["fc1"]
    assert isinstance(layer, MaskedLinear)
    obs, slots = torch.randn(AGENTS, 5, 7, OBS, generator=g), sequences(kind, 5, 7, g)
    slots[slots == 1] = -1  # nobody is of this type
    valid = torch.arange(5)[:, None] < torch.randint(2, 6, (7,), generator=g)
    before = layer.ema.clone()
    net(net.materialise("train"), obs, net.initial_state(7), valid, observe=True, slots=slots)
    x = torch.cat([obs, torch.eye(AGENTS)[:, None, None].expand(-1, 5, 7, -1)], -1)
    for slot in range(SLOTS):
        mine = (slots == slot) & valid
        if slot == 1:
            assert torch.equal(layer.ema[slot], before[slot])
        else:
            expected = before[slot] * 0.99 + x[mine].abs().mean(0) * 0.01
            torch.testing.assert_close(layer.ema[slot], expected)
    assert int(layer.seen) == 1, "one pass is one update, however many blocks it takes"
    recurrent = net.layers["gru_recurrent"]
    assert isinstance(recurrent, MaskedLinear)
    assert torch.equal(recurrent.ema[1], torch.ones(HIDDEN)) and not torch.equal(recurrent.ema[0], torch.ones(HIDDEN))


def test_a_slot_that_does_not_exist_is_named() -> None:
    net = make_net()
    obs = torch.randn(AGENTS, 1, 2, OBS)
    with pytest.raises(UsageError, match="slot 3 does not exist: this net has the slots 0 to 2"):
        net(net.snapshot("act"), obs, net.initial_state(2), slots=torch.full((AGENTS, 1, 2), SLOTS))


# --- rules --------------------------------------------------------------------------------------------------------------------------------


def test_unit_types_are_read_from_the_observation() -> None:
    rule = by_unit_type(2, 5)
    obs = torch.zeros(4, 1, 2, 6)
    obs[0, 0, 0, 2] = obs[1, 0, 0, 3] = obs[2, 0, 1, 4] = 1
    obs[3, 0, 1, 5] = 1  # not a type
    assert rule.of is not None and rule.n_slots == 3
    assert rule.of(obs)[:, 0].tolist() == [[0, -1], [1, -1], [-1, 2], [-1, -1]]


def test_the_dead_have_no_slot_whatever_a_rule_says() -> None:
    rule = SlotRule(2, lambda obs: torch.ones(obs.shape[:-1], dtype=torch.int64))
    alive = torch.tensor([[[True, False]]])
    slots, rest = slots_of(rule, torch.zeros(1, 1, 2, 3), alive)
    assert slots is not None and slots.tolist() == [[[1, -1]]] and rest is None
    assert slots_of(None, torch.zeros(1, 1, 2, 3), alive) == (None, alive)


@pytest.mark.parametrize("wrong", [lambda obs: obs[..., 0], lambda obs: obs.sum().long(), lambda obs: 3])
def test_a_rule_that_gives_something_else_is_told_so(wrong) -> None:
    with pytest.raises(RunError, match=r"the slot rule must return int64 \[1, 1, 2\]"):
        slots_of(SlotRule(2, wrong), torch.zeros(1, 1, 2, 3), None)


def test_any_negative_slot_is_none() -> None:
    slots, _ = slots_of(SlotRule(2, lambda obs: torch.full(obs.shape[:-1], -7)), torch.zeros(1, 1, 2, 3), None)
    assert slots is not None and slots.tolist() == [[[-1, -1]]]


def test_a_rule_that_raises_is_quoted() -> None:
    with pytest.raises(RunError, match=r"the slot rule raised IndexError: index 9 .*test_nets_slots\.py:\d+"):
        slots_of(SlotRule(2, lambda obs: obs[..., 9].long()), torch.zeros(1, 1, 2, 3), None)


def test_a_rule_and_a_scheme_must_agree() -> None:
    spec = EnvSpec(2, OBS, 4, ACTIONS, 5)
    with pytest.raises(UsageError, match="the slot rule has 3 slots and the sharing scheme 2"):
        ValueLearner("qmix", spec, make_sharing("k24", 2), rule=by_unit_type(0, 3))


# --- the learner --------------------------------------------------------------------------------------------------------------------------


def episodes(spec: EnvSpec, count: int, g: torch.Generator, dead: Tensor) -> Episodes:
    """Noise of units whose type is in their first three features; from ``dead [A, count]`` on they are gone."""
    a, t = spec.n_agents, spec.episode_limit
    batch = Episodes.empty(spec, count, torch.device("cpu"), avail=True, alive=True)
    types = torch.randint(0, 3, (a, 1, count), generator=g).expand(-1, t + 1, -1)
    batch.obs = torch.randn(a, t + 1, count, spec.obs_dim, generator=g)
    batch.obs[..., :3] = torch.nn.functional.one_hot(types, 3).float()
    batch.alive = torch.arange(t + 1)[:, None] < dead[:, None]
    batch.obs[~batch.alive] = 0
    batch.state = torch.randn(t + 1, count, spec.state_dim, generator=g)
    batch.actions = torch.randint(0, spec.n_actions, (a, t, count), generator=g)
    batch.reward = torch.randn(a, t, count, generator=g)
    batch.valid[:] = True
    return batch


@pytest.mark.parametrize("algo", ["iql", "vdn", "qmix"])
@pytest.mark.parametrize("rule", [None, by_unit_type(0, 3)])
def test_what_the_dead_did_changes_nothing(algo: str, rule: SlotRule | None) -> None:
    spec = EnvSpec(3, OBS, 4, ACTIONS, 5, unit_types=(0, 3))
    g = torch.Generator().manual_seed(0)
    dead = torch.tensor([[2, 6, 3], [6, 1, 6], [6, 6, 4]])
    batch = episodes(spec, 3, g, dead)
    learner = ValueLearner(algo, spec, make_sharing("k24", 3), ValueConfig(standardise_rewards=False), HIDDEN, rule=rule)
    learner.sharing.resample(0.5, torch.Generator().manual_seed(1))

    def loss_and_state() -> list[Tensor]:
        learner.net.zero_grad()
        loss = learner.td_loss(batch, learner.net.materialise("train"), observe=False)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in learner.net.parameters() if p.grad is not None)]

    before = loss_and_state()
    assert batch.alive is not None
    batch.actions = torch.where(batch.alive[:, :-1], batch.actions, (batch.actions + 1) % ACTIONS)
    for one, other in zip(before, loss_and_state(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("returns", [{"td_lambda": 0.6}, {"n_step": 3}, {}])
def test_what_is_paid_after_an_agents_death_does_not_reach_it(returns: dict) -> None:
    """Without a mixer each agent has returns of its own, and they end with it."""
    spec = EnvSpec(2, OBS, 4, ACTIONS, 5, unit_types=(0, 3))
    dead = torch.tensor([[2, 2], [6, 6]])
    batch = episodes(spec, 2, torch.Generator().manual_seed(0), dead)
    batch.obs[1] = 0  # only the one that dies is looked at
    learner = ValueLearner(
        "iql", spec, make_sharing("k24", 3), ValueConfig(standardise_rewards=False, **returns), HIDDEN, rule=by_unit_type(0, 3)
    )
    learner.sharing.resample(0.5, torch.Generator().manual_seed(1))
    losses = []
    for paid in (0.0, 100.0):
        batch.reward[:, 3:] = paid
        losses.append(float(learner.td_loss(batch, learner.net.materialise("train")).detach()))
    assert losses[0] == pytest.approx(losses[1])


def test_a_batch_in_which_no_row_counts_is_told() -> None:
    spec = EnvSpec(2, OBS, 4, ACTIONS, 5)
    batch = episodes(spec, 2, torch.Generator().manual_seed(0), torch.zeros(2, 2, dtype=torch.int64))
    learner = ValueLearner("iql", spec, make_sharing("k24", 3), ValueConfig(standardise_rewards=False), HIDDEN, rule=by_unit_type(0, 3))
    with pytest.raises(RunError, match="no row of the batch has a slot"):
        learner.update(batch, 0.1, 0)


def test_policies_are_compared_on_what_the_living_saw() -> None:
    env = make_env("toy/units", 32)
    unsaid = NoAlive(env)
    learner = ValueLearner("qmix", env.spec, make_sharing("k24", 3), ValueConfig(), HIDDEN, rule=by_unit_type(0, 3))
    learner.gather(unsaid, 0, seed=0)
    assert bool((learner.state_dict()["pool"]["obs"][:, :3].sum(1) == 1).all())


class NoAlive(TeamEnv):
    """The same without saying who is alive: only the types show it."""

    def __init__(self, env: TeamEnv) -> None:
        self.env, self.spec, self.n_envs, self.device = env, env.spec, env.n_envs, env.device

    def reset(self, seed: int) -> Observation:
        return replace(self.env.reset(seed), alive=None)

    def step(self, actions: Tensor) -> Step:
        step = self.env.step(actions)
        after = replace(step.after, alive=None)
        return replace(step, after=after, current=after if step.current is step.after else replace(step.current, alive=None))


def test_the_dead_take_an_available_action() -> None:
    net = make_net()
    obs = torch.zeros(AGENTS, 3, OBS)
    avail = torch.zeros(AGENTS, 3, ACTIONS, dtype=torch.bool)
    avail[..., 2] = True
    actor = NetActor(net, net.snapshot("act"), rule=by_unit_type(0, 3))
    actor.reset(3)
    actions = actor(Observation(obs, torch.zeros(3, 1), avail, torch.zeros(AGENTS, 3, dtype=torch.bool)))
    assert torch.equal(actions, torch.full((AGENTS, 3), 2))


# --- memory -------------------------------------------------------------------------------------------------------------------------------

WATCHED = """
import re, sys, torch
from k24.nets import AgentNet
from k24.sharing import make_sharing
from k24.sparse.layers import MaskedLinear

torch.set_num_threads(1)
hidden, rows, slots = 64, 24_000, 6
g = torch.Generator().manual_seed(0)

def peak_mb():
    # Not ru_maxrss, which a child process takes over from its parent.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

if sys.argv[1] == "layer":
    layer = MaskedLinear(hidden, hidden, n_slots=slots)
    layer.resample(0.5)
    x, of = torch.randn(rows, hidden, generator=g), torch.randint(0, slots, (rows,), generator=g)
    run = lambda n: layer(x[:n], of[:n]).sum().backward()
else:
    net = AgentNet(hidden, 5, hidden, 4, make_sharing("k24", slots), agent_id=False)
    x = torch.randn(4, 20, rows // 80, hidden, generator=g)
    of = torch.randint(0, slots, (4, 1, rows // 80), generator=g).expand(-1, 20, -1)
    run = lambda n: net(net.materialise(), x[:, :, :max(n // 80, 1)], net.initial_state(max(n // 80, 1)), observe=True,
                        slots=of[:, :, :max(n // 80, 1)])[0].sum().backward()
run(200)
before = peak_mb()
run(rows)
print(peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(("what", "tensors"), [("layer", 12), ("net", 60)])
def test_no_weight_is_gathered_per_row(what: str, tensors: int) -> None:
    """Memory grows by so many ``[rows, hidden]`` tensors; one ``[rows, hidden, hidden]`` would be 64 more."""
    done = subprocess.run([sys.executable, "-c", WATCHED, what], capture_output=True, text=True, check=True)
    grown, one_tensor = float(done.stdout), 24_000 * 64 * 4 / 2**20
    assert 0 < grown < tensors * one_tensor
