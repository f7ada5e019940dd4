"""Policy files and the policies loaded from them: what is written is read back, runs, and costs what it should."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

import k24
from k24 import artifact, kernels
from k24.actions import KINDS, StochasticKind
from k24.artifact import stores_kept_alone
from k24.errors import PolicyFileError, UsageError
from k24.kernels import GRU, Linear, Net
from k24.kernels.net import Prepared
from k24.kernels.reference import run as reference
from k24.policy import Policy, PolicySpec, load_policy, save_policy
from k24.sparse.patterns import PatternSet


def random_codes(slots: int, rows: int, inputs: int, patterns: PatternSet) -> torch.Tensor:
    """Legal codes, each group's drawn among those that it may take."""
    legal = patterns.legal(inputs)
    drawn = torch.multinomial(legal.T.float(), slots * rows, replacement=True)  # [G, S·O]
    return drawn.T.reshape(slots, rows, -1).to(torch.uint8)


def random_linear(inputs: int, outputs: int, slots: int, kind: str, dtype=torch.float32, relu=False, pattern="2:4") -> Linear:
    """A layer; ``kind`` says what each slot has of its own: nothing, its mask, its weight, its bias, or one mask is for all."""
    patterns = PatternSet.parse(pattern)
    own_weight, own_bias = (slots if kind == "own" else 1), (slots if kind in ("own", "bias") else 1)
    code_slots = {"masked": slots, "one mask": 1}.get(kind)
    return Linear(
        torch.randn(own_weight, outputs, inputs).div(inputs**0.5).to(dtype),
        torch.randn(own_bias, outputs),
        None if code_slots is None else random_codes(code_slots, outputs, inputs, patterns),
        patterns,
        relu,
    )


def random_net(slots=3, inputs=7, hidden=6, outputs=5, kind="masked", dtype=torch.float32, gru=True, pattern="2:4") -> Net:
    """``fc1, GRU, fc2, fc3``, or without the GRU; the last layer dense."""

    def linear(i: int, o: int, relu: bool = False, kind: str = kind) -> Linear:
        return random_linear(i, o, slots, kind, dtype, relu, pattern)

    between = (GRU(linear(hidden, 3 * hidden), linear(hidden, 3 * hidden)),) if gru else ()
    return Net((linear(inputs, hidden, True), *between, linear(hidden, hidden, True), linear(hidden, outputs, kind="shared")), slots)


def spec_of(net: Net, agent_id: bool = False, action: str = "discrete", **changes) -> PolicySpec:
    obs_dim = net.in_features - (net.n_slots if agent_id else 0)
    n_actions = net.out_features // 2 if action == "gaussian" else net.out_features
    spec = PolicySpec("toy/matrix", "qmix", "k24", 1000, net.n_slots, obs_dim, n_actions, agent_id, action)
    return replace(spec, **changes)


def same(a: Net, b: Net) -> bool:
    """Whether two nets are equal to the bit."""

    def parts(layer: Linear) -> tuple:
        return layer.weight, layer.bias, torch.zeros(0, dtype=torch.uint8) if layer.codes is None else layer.codes

    return (
        a.n_slots == b.n_slots
        and [type(block) for block in a.blocks] == [type(block) for block in b.blocks]
        and all(
            (x.relu, x.codes is None) == (y.relu, y.codes is None)
            and (x.codes is None or x.patterns == y.patterns)
            and all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(parts(x), parts(y), strict=True))
            for x, y in zip(a.linears, b.linears, strict=True)
        )
    )


def kept(net: Net) -> Net:
    """As a file holds it: without what the one mask of a layer drops."""
    return net.map(lambda layer: replace(layer, weight=layer.effective()) if stores_kept_alone(layer) else layer)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Net]:
    net = random_net()
    save_policy(tmp_path / "policy.safetensors", net, spec_of(net))
    return tmp_path / "policy.safetensors", net


# --- what is written is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gru", [True, False])
@pytest.mark.parametrize("kind", ["masked", "one mask", "shared", "own", "bias"])
def test_round_trip(tmp_path, kind, gru, dtype) -> None:
    net = random_net(kind=kind, gru=gru, dtype=dtype)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net))
    policy = load_policy(tmp_path / "p.safetensors", backend="reference")
    assert same(policy.net, kept(net))
    assert policy.spec == spec_of(net)
    assert isinstance(policy, k24.Policy) and k24.load_policy is load_policy


sizes = st.integers(1, 9)


@given(
    slots=st.integers(1, 4), inputs=sizes, hidden=sizes, outputs=sizes, gru=st.booleans(), agent_id=st.booleans(),
    kind=st.sampled_from(["masked", "one mask", "shared", "own", "bias"]), pattern=st.sampled_from(["2:4", "1:4", "4:8", "3:4", "1:2"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_round_trip_of_any_net(tmp_path_factory, slots, inputs, hidden, outputs, gru, agent_id, kind, pattern, dtype) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    net = random_net(slots, inputs + (slots if agent_id else 0), hidden, outputs, kind, dtype, gru, pattern)
    save_policy(path, net, spec_of(net, agent_id, steps=2**40))
    policy = load_policy(path, backend="reference")
    assert same(policy.net, kept(net))
    assert policy.spec == spec_of(net, agent_id, steps=2**40)


@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "3:4", "2:3", "1:8"])
def test_weights_that_the_one_mask_of_a_layer_drops_are_not_stored(tmp_path, pattern, inputs) -> None:
    net = Net((random_linear(inputs, 5, 3, "one mask", pattern=pattern), random_linear(5, 4, 3, "masked", pattern=pattern)), 3)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net))
    with safetensors.safe_open(tmp_path / "p.safetensors", "pt") as file:
        stored = file.get_tensor("fc1.weight"), file.get_tensor("fc2.weight")
    one, own = net.linears
    n, m = one.patterns.n, one.patterns.m
    per_row = inputs if pattern == "1:8" else inputs // m * n + min(inputs % m, n)
    assert stored[0].shape == (5, per_row), "1:8 would make eight values of each that is read"
    assert torch.equal(stored[1], own.weight[0]), "what one slot drops another may keep"
    if pattern != "1:8":
        assert torch.equal(stored[0].flatten(), one.weight[0][one.patterns.mask(one.codes, inputs)[0].bool()]), "in their order"
    assert same(load_policy(tmp_path / "p.safetensors", backend="reference").net, kept(net))


def test_files_of_the_first_version_are_read(saved) -> None:
    path, net = saved
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["k24"])
    assert about["version"] == 2
    about["version"] = 1
    tensors = safetensors.torch.load(data)
    about["sha256"] = artifact._digest(about, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"k24": json.dumps(about)}))
    assert same(load_policy(path, backend="reference").net, net)


@pytest.mark.parametrize("action", KINDS)
def test_round_trip_of_any_kind_of_action(tmp_path, action) -> None:
    net = random_net(outputs=6)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net, action=action))
    policy = load_policy(tmp_path / "p.safetensors", backend="reference")
    assert same(policy.net, net) and policy.spec == spec_of(net, action=action)
    assert policy.spec.action == action and policy.spec.n_outputs == 6 and policy.spec.n_actions == (3 if action == "gaussian" else 6)


def test_other_programs_can_open_it(saved) -> None:
    path, net = saved
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["k24"])
        assert torch.equal(file.get_tensor("gru_input.weight"), net.linears[1].weight[0])
        assert set(file.keys()) == {f"{name}.{part}" for name in artifact.layer_names(net) for part in ("weight", "bias", "codes")} - {
            "fc3.codes"
        }
    assert about["policy"]["task"] == "toy/matrix" and about["net"]["layers"][0]["masks"] == {"slots": 3, "pattern": "2:4"}


def test_the_same_policy_is_the_same_file(saved, tmp_path) -> None:
    path, net = saved
    save_policy(tmp_path / "again.safetensors", net, spec_of(net))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_views_and_gradients_are_written_as_values(tmp_path) -> None:
    net = random_net(kind="own", gru=False)
    memory = torch.randn(3, 6, 7 * 2, requires_grad=True)
    odd = replace(net.blocks[0], weight=memory[..., ::2], bias=net.blocks[0].bias.requires_grad_())
    twice = Net((odd, net.blocks[1], net.blocks[2]), 3)
    save_policy(tmp_path / "p.safetensors", twice, spec_of(net))
    assert same(load_policy(tmp_path / "p.safetensors", backend="reference").net, twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net, spec: (net, replace(spec, obs_dim=8)), "takes 7 inputs and gives 5 outputs, where the policy's spec has 8"),
        (lambda net, spec: (net, replace(spec, n_actions=4)), "and 4 actions"),
        (
            lambda net, spec: (net, replace(spec, n_actions=5, action="gaussian")),
            "gives 5 outputs, where the policy's spec has 7 (obs_dim 7) and 5 actions, which take 10 outputs where action is gaussian",
        ),
        (lambda net, spec: (net, replace(spec, agent_id=True)), "has 10 (obs_dim 7 and 3 agents)"),
        (lambda net, spec: (net, replace(spec, agent_id=True, n_agents=2)), "got 2 agents and 3 slots"),
        (lambda net, spec: (net.map(lambda x: replace(x, weight=x.weight.double())), spec), "weights of torch.float64"),
        (lambda net, spec: (net.map(lambda x: replace(x, bias=x.bias.half())), spec), "a bias of torch.float16"),
        (lambda net, spec: (net.map(lambda x: replace(x, weight=x.weight / 0)), spec), "weight of layer fc1 holds NaN or infinity"),
        (lambda net, spec: (net.map(lambda x: replace(x, bias=x.bias * float("nan"))), spec), "bias of layer fc1 holds NaN"),
        (lambda net, spec: (_bad_codes(net, 6), spec), "the code 6"),
        # Seven inputs: the last group has three, and the patterns 1001, 0101 and 0011 would keep its padding.
        (lambda net, spec: (_bad_codes(net, 2), spec), "the code 2 in a group whose padding"),
        (lambda net, spec: (Net(random_net(kind="shared").blocks, 5000), spec), "at most 4096 slots"),
        (lambda net, spec: (_deep(net), spec), "has room for"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused(tmp_path, change, message) -> None:
    net = random_net(kind="one mask")
    net, spec = change(net, spec_of(net))
    with pytest.raises(UsageError) as caught:
        save_policy(tmp_path / "p.safetensors", net, spec)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _bad_codes(net: Net, code: int) -> Net:
    first = net.blocks[0]
    codes = first.codes.clone()
    codes[0, 3, -1] = code
    return Net((replace(first, codes=codes), *net.blocks[1:]), net.n_slots)


def _deep(net: Net) -> Net:
    return Net((*net.blocks[:-1], *[net.blocks[-2]] * 1000, net.blocks[-1]), net.n_slots)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": ""}, {"task": "two\nlines"}, {"task": "\ud800"}, {"algo": 3}, {"sharing": "x" * 201}, {"steps": -1}, {"steps": 1.0},
        {"n_agents": 0}, {"n_agents": 4097}, {"n_agents": True}, {"obs_dim": 2**63},
        {"n_actions": "5"}, {"agent_id": 1}, {"action": "continuous"}, {"action": None}, {"action": ["gaussian"]},
    ],
)  # fmt: skip
def test_a_spec_that_makes_no_sense_is_refused(changes) -> None:
    (name,) = changes
    with pytest.raises(UsageError, match=name) as caught:
        spec_of(random_net(), **changes)
    assert "\n" not in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(saved, monkeypatch) -> None:
    path, net = saved
    before = path.read_bytes()
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:

            def full(*args):
                raise OSError(28, "No space left on device")

            patched.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                save_policy(path, random_net(), spec_of(net))
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == before
    save_policy(path, other := random_net(), spec_of(net))
    assert same(load_policy(path, backend="reference").net, other)


# --- acting ----------------------------------------------------------------------------------------------------------------------


def own_reference(net: Net, obs: torch.Tensor, h: torch.Tensor | None, agent_id: bool = False, slots=None):
    """What the policy must compute, in float64."""
    x = obs.double()
    if agent_id:
        eye = torch.eye(net.n_slots, dtype=torch.float64)
        ids = eye[slots] if slots is not None else eye[:, None].expand(-1, obs.shape[1], -1)
        x = torch.cat([x, ids], -1)
    h = torch.zeros(*x.shape[:-1], net.hidden, dtype=torch.float64) if h is None else h.double()
    return reference(net, x, h, slots)


@pytest.mark.parametrize("backend", ["auto", *kernels.BACKENDS])
@pytest.mark.parametrize("agent_id", [False, True])
@pytest.mark.parametrize("gru", [True, False])
def test_acting_equals_the_reference_over_steps(tmp_path, gru, agent_id, backend) -> None:
    net = random_net(slots=3, inputs=10, gru=gru)
    if backend != "auto" and (reason := kernels.BACKENDS[backend].unavailable(net)) is not None:
        pytest.skip(reason)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net, agent_id))
    policy = load_policy(tmp_path / "p.safetensors", backend=backend, threads=1)
    assert policy.backend == backend or backend == "auto"
    state, h = None, None
    for _ in range(3):
        obs = torch.randn(3, 4, policy.spec.obs_dim)
        values, h = own_reference(net, obs, h, agent_id)
        found, _ = policy.outputs(obs, state)
        actions, state = policy.act(obs, state)
        torch.testing.assert_close(found, values.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, h.float(), atol=1e-5, rtol=1e-5)
        assert actions.dtype == torch.int64 and torch.equal(actions, found.argmax(-1))
    assert policy.q_values(obs, state)[0].shape == (3, 4, 5)


@pytest.mark.parametrize("backend", ["auto", *kernels.BACKENDS])
@pytest.mark.parametrize("action", ["categorical", "gaussian", "deterministic"])
@pytest.mark.parametrize("gru", [True, False])
def test_every_kind_of_policy_acts_by_its_mode(gru, action, backend) -> None:
    net = random_net(outputs=4, gru=gru)
    if backend != "auto" and (reason := kernels.BACKENDS[backend].unavailable(net)) is not None:
        pytest.skip(reason)
    policy, continuous = Policy(net, spec_of(net, action=action), backend, 1), KINDS[action].continuous
    state, h = None, None
    for _ in range(3):
        obs = torch.randn(3, 5, 7)
        values, h = own_reference(net, obs, h)
        found, _ = policy.outputs(obs, state)
        torch.testing.assert_close(found, values.float(), atol=1e-5, rtol=1e-5)
        seen = state
        actions, state = policy.act(obs, seen)
        assert torch.equal(actions, KINDS[action].mode(found)) and state.shape == (3, 5, 6 if gru else 0)
        assert actions.shape == ((3, 5, policy.spec.n_actions) if continuous else (3, 5))
        assert actions.dtype == (torch.float32 if continuous else torch.int64)
        one, after = policy.act(obs[:, 0], None if seen is None else seen[:, 0])
        torch.testing.assert_close(one, actions[:, 0])
        assert after.shape == (3, 6 if gru else 0)
    arrays, _ = policy.act(obs.numpy(), seen)
    assert isinstance(arrays, np.ndarray) and arrays.dtype == (np.float32 if continuous else np.int64)
    np.testing.assert_array_equal(arrays, actions.numpy())


def test_continuous_actions_are_float32_whatever_the_weights() -> None:
    net = random_net(outputs=4, dtype=torch.bfloat16)
    obs = torch.randn(3, 50, 7).bfloat16()
    for action in ("gaussian", "deterministic"):
        policy = Policy(net, spec_of(net, action=action), "dense")
        outputs, _ = policy.outputs(obs)
        actions, _ = policy.act(obs)
        assert outputs.dtype == torch.bfloat16 and actions.dtype == torch.float32 and float(actions.abs().max()) <= 1
        assert torch.equal(actions, KINDS[action].mode(outputs.float()))
    drawn, _ = Policy(net, spec_of(net, action="gaussian"), "dense").act(obs * 1e6, sample=True)
    assert drawn.dtype == torch.float32 and float(drawn.abs().max()) < 1


@pytest.mark.parametrize("action", ["categorical", "gaussian"])
def test_sampled_actions_are_the_distributions(action) -> None:
    net = random_net(outputs=4)
    kind, policy = KINDS[action], Policy(net, spec_of(net, action=action), "dense")
    assert isinstance(kind, StochasticKind)
    obs, state = torch.randn(3, 200, 7), torch.randn(3, 200, 6)
    outputs, expected_state = policy.outputs(obs, state)
    generator = torch.Generator().manual_seed(3)
    first, after = policy.act(obs, state, sample=True, generator=generator)
    second, _ = policy.act(obs, state, sample=True, generator=generator)
    again = torch.Generator().manual_seed(3)
    assert torch.equal(first, kind.sample(outputs, None, again)) and torch.equal(second, kind.sample(outputs, None, again))
    assert not torch.equal(first, second) and torch.equal(after, expected_state)
    mode, _ = policy.act(obs, state, generator=generator)
    assert torch.equal(mode, kind.mode(outputs)) and not torch.equal(mode, first)
    arrays, _ = policy.act(obs.numpy(), state, sample=True, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(arrays, first.numpy())
    torch.manual_seed(4)
    own, _ = policy.act(obs, state, sample=True)
    torch.manual_seed(4)
    assert torch.equal(own, policy.act(obs, state, sample=True)[0]), "without a generator, torch's own"


def test_sampled_actions_are_available() -> None:
    net = random_net()
    policy = Policy(net, spec_of(net, action="categorical"), "dense")
    obs, avail = torch.randn(3, 500, 7), torch.rand(3, 500, 5) < 0.4
    generator = torch.Generator().manual_seed(0)
    actions, _ = policy.act(obs, avail=avail, sample=True, generator=generator)
    some = avail.any(-1)
    assert bool((avail.gather(2, actions[..., None])[..., 0] | (~some & (actions == 0))).all()) and bool((~some).any())
    expected = KINDS["categorical"].sample(policy.outputs(obs)[0], avail, torch.Generator().manual_seed(0))
    assert torch.equal(actions, expected)


@pytest.mark.parametrize("action", ["categorical", "gaussian"])
@pytest.mark.parametrize("slots", [(0, 3), "given", "agent"])
@pytest.mark.parametrize("gru", [True, False])
def test_rows_that_choose_their_slot_in_every_kind(gru, slots, action) -> None:
    """A state without units goes round like any other, and rows of no slot have outputs of zero."""
    net = random_net(slots=3, inputs=7 + 4, outputs=4, gru=gru) if slots != "agent" else random_net(slots=3, outputs=4, gru=gru)
    n_agents = 3 if slots == "agent" else 4
    policy = Policy(net, spec_of(net, action=action, n_agents=n_agents, obs_dim=7, agent_id=slots != "agent", slots=slots), "dense")
    types = torch.randint(-1, 3, (n_agents, 6))
    obs = torch.randn(n_agents, 6, 7)
    obs[..., :3] = torch.nn.functional.one_hot(types.clamp_min(0), 3) * (types >= 0)[..., None]
    told = None if isinstance(slots, tuple) else types
    state = None
    for _ in range(2):
        outputs, _ = policy.outputs(obs, state, told)
        actions, state = policy.act(obs, state, slots=told)
        assert outputs.shape == (n_agents, 6, 4) and torch.equal(actions, KINDS[action].mode(outputs))
        assert state.shape == (n_agents, 6, 6 if gru else 0)
        assert not outputs[types < 0].any() and bool(outputs[types >= 0].any())


def test_without_an_environment_dimension(saved) -> None:
    path, _ = saved
    policy = load_policy(path, backend="dense")
    obs = torch.randn(2, 3, 7)
    wide_actions, wide = policy.act(obs[0][:, None])
    actions, state = policy.act(obs[0])
    assert actions.shape == (3,) and state.shape == (3, 6)
    assert torch.equal(actions, wide_actions[:, 0]) and torch.equal(state, wide[:, 0])
    values, state = policy.outputs(obs[1], state)
    assert values.shape == (3, 5)
    torch.testing.assert_close(values, policy.outputs(obs[1][:, None], wide)[0][:, 0])


@pytest.mark.parametrize("agent_id", [False, True])
def test_rows_of_mixed_slots(tmp_path, agent_id) -> None:
    net = random_net(inputs=9)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net, agent_id))
    policy = load_policy(tmp_path / "p.safetensors", backend="dense")
    slots = torch.tensor([2, 0, 0, -1, 1, 2])
    obs, state = torch.randn(6, policy.spec.obs_dim), torch.randn(6, 6)
    live = slots >= 0
    values, after = own_reference(net, obs[live], state[live], agent_id, slots[live])
    found, found_state = policy.outputs(obs, state, slots)
    torch.testing.assert_close(found[live], values.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_state[live], after.float(), atol=1e-5, rtol=1e-5)
    assert not found[3].any() and not found_state[3].any()
    actions, _ = policy.act(obs.numpy(), state, slots=slots.numpy())
    assert isinstance(actions, np.ndarray) and actions.shape == (6,)
    assert policy.act(obs, slots=slots)[1].shape == (6, 6)


@pytest.mark.parametrize("kind", ["masked", "shared"])
def test_who_follows_another_agents_policy_is_told_its_index(kind) -> None:
    net = random_net(inputs=9, kind=kind)
    policy = Policy(net, spec_of(net, agent_id=True), "dense")
    obs, slots = torch.randn(3, 4, 6), torch.tensor([2, 0, 1])
    found, _ = policy.outputs(obs, slots=slots[:, None].expand(3, 4))
    rows, _ = policy.outputs(obs.flatten(0, 1), slots=slots.repeat_interleave(4))
    torch.testing.assert_close(found, rows.view(3, 4, -1))
    # As if that agent had seen it.
    torch.testing.assert_close(found[slots.argsort()], policy.outputs(obs[slots.argsort()])[0])


def test_fewer_slots_than_agents_need_slots(tmp_path) -> None:
    net = random_net(slots=2)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net, n_agents=5))
    policy = load_policy(tmp_path / "p.safetensors", backend="dense")
    with pytest.raises(UsageError, match="2 slots for 5 agents: say with slots"):
        policy.act(torch.zeros(5, 3, 7))
    assert policy.act(torch.zeros(5, 7), slots=torch.tensor([0, 1, 1, 0, 0]))[0].shape == (5,)


def test_unavailable_actions_are_not_taken(saved) -> None:
    policy = load_policy(saved[0], backend="dense")
    obs = torch.randn(3, 50, 7)
    values, _ = policy.outputs(obs)
    avail = torch.rand(3, 50, 5) < 0.5
    avail[..., 4] |= ~avail.any(-1)
    actions, _ = policy.act(obs, avail=avail)
    assert avail.gather(2, actions[..., None]).all()
    assert (actions != values.argmax(-1)).any()
    assert torch.equal(values.gather(2, actions[..., None])[..., 0], values.where(avail, values.new_tensor(-9e9)).amax(-1))
    for other in (avail.numpy(), avail.int(), avail.numpy().astype(np.float64)):
        assert torch.equal(policy.act(obs, avail=other)[0], actions)
    none, _ = policy.act(obs, avail=torch.zeros(3, 50, 5, dtype=torch.bool))
    assert not none.any()


def test_arrays_in_and_out(saved) -> None:
    policy = load_policy(saved[0], backend="dense")
    obs = np.random.default_rng(0).normal(size=(3, 4, 7))
    actions, state = policy.act(obs)
    assert isinstance(actions, np.ndarray) and actions.dtype == np.int64 and isinstance(state, torch.Tensor)
    assert isinstance(policy.outputs(obs)[0], np.ndarray)
    expected, _ = policy.act(torch.from_numpy(obs))
    assert np.array_equal(actions, expected)
    frozen = obs.astype(np.float32)
    frozen.flags.writeable = False
    for other in (frozen, np.ascontiguousarray(obs[..., ::-1])[..., ::-1], obs.astype(">f4"), np.asfortranarray(obs), obs.tolist()):
        assert np.array_equal(policy.act(other)[0], expected)
    whole = np.arange(21).reshape(3, 7)
    assert np.array_equal(policy.act(whole)[0], policy.act(torch.from_numpy(whole).float())[0])


def test_other_types_and_no_environments(saved) -> None:
    policy = load_policy(saved[0], backend="reference")
    obs = torch.randn(3, 4, 7)
    expected, state = policy.outputs(obs)
    values, after = policy.outputs(obs.double())
    torch.testing.assert_close(values, expected)
    assert after.dtype == torch.float32
    torch.testing.assert_close(policy.outputs(obs, state.double())[0], policy.outputs(obs, state)[0])
    assert load_policy(saved[0], backend="dense").act(torch.zeros(3, 0, 7))[0].shape == (3, 0)


def test_the_state_given_is_not_changed(saved) -> None:
    policy = load_policy(saved[0], backend="dense")
    for obs, state in ((torch.randn(3, 4, 7), torch.randn(3, 4, 6)), (torch.randn(3, 7), torch.randn(3, 6))):
        before, seen = state.clone(), obs.clone()
        policy.act(obs, state, avail=torch.ones(*obs.shape[:-1], 5, dtype=torch.bool))
        assert torch.equal(before, state) and torch.equal(obs, seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.act(torch.zeros(3, 4, 8)), "obs must be [3, envs, 7] or [3, 7] (agents first), got [3, 4, 8]"),
        (lambda p: p.act(torch.zeros(4, 3, 7)), "got [4, 3, 7]"),
        (lambda p: p.act(torch.zeros(7)), "got [7]"),
        (lambda p: p.act(torch.zeros(())), "got []"),
        (lambda p: p.act(torch.zeros(3, 1, 1, 7)), "got [3, 1, 1, 7]"),
        (lambda p: p.act("observation"), "obs must be a tensor or an array of numbers"),
        (lambda p: p.act(None), "obs must be"),
        (lambda p: p.act([[1, 2], [3]]), "obs must be a tensor or an array of numbers"),
        (lambda p: p.act(torch.zeros(3, 4, 7), torch.zeros(3, 5, 6)), "state must be the tensor [3, 4, 6]"),
        (lambda p: p.act(torch.zeros(3, 7), torch.zeros(3, 1, 6)), "state must be the tensor [3, 6]"),
        (lambda p: p.act(torch.zeros(3, 7), np.zeros((3, 6))), "got ndarray"),
        (lambda p: p.act(torch.zeros(3, 7), avail=torch.ones(3, 4)), "avail must be [3, 5], got [3, 4]"),
        (
            lambda p: p.act(torch.zeros(4, 7), slots=torch.tensor([0, 1, 2])),
            "slots must be int64 [4] for obs [4, 7], got torch.int64 [3]",
        ),
        (lambda p: p.act(torch.zeros(2, 2, 7), slots=torch.tensor([[0, 1], [1, 0]])), "obs must be [3, envs, 7]"),
        (lambda p: p.act(torch.zeros(3, 7), slots=torch.tensor([0, 1, 3])), "slot 3 does not exist"),
        (
            lambda p: p.act(torch.zeros(3, 7), slots=torch.tensor([0.0, 1, 2])),
            "slots must be int64 [3] for obs [3, 7], got torch.float32 [3]",
        ),
        (lambda p: p.act(torch.zeros(3, 7), torch.zeros(2, 6), slots=torch.tensor([0, 1, 2])), "state must be the tensor [3, 6]"),
    ],
)
@pytest.mark.parametrize("agent_id", [False, True])
def test_what_does_not_fit_is_named(tmp_path, call, message, agent_id) -> None:
    net = random_net(inputs=10 if agent_id else 7)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net, agent_id))
    with pytest.raises(UsageError) as caught:
        call(load_policy(tmp_path / "p.safetensors", backend="dense"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("action", "call", "message"),
    [
        (
            "discrete",
            lambda p: p.act(torch.zeros(3, 7), sample=True),
            "a discrete policy has no distribution to sample from, only categorical, gaussian ones have: leave sample out",
        ),
        ("deterministic", lambda p: p.act(torch.zeros(3, 7), sample=True), "a deterministic policy has no distribution"),
        (
            "deterministic",
            lambda p: p.act(torch.zeros(3, 7), avail=torch.ones(3, 4)),
            "avail is for discrete actions, and those of this policy are deterministic: leave avail out",
        ),
        ("gaussian", lambda p: p.act(torch.zeros(3, 7), avail=torch.ones(3, 4), sample=True), "those of this policy are gaussian"),
        ("categorical", lambda p: p.act(torch.zeros(3, 7), avail=torch.ones(3, 5)), "avail must be [3, 4], got [3, 5]"),
        ("categorical", lambda p: p.q_values(torch.zeros(3, 7)), "outputs mean categorical actions and are no action values: use outputs"),
        ("gaussian", lambda p: p.q_values(torch.zeros(3, 7)), "use outputs"),
    ],
)
def test_what_a_kind_of_policy_cannot_do_is_named(action, call, message) -> None:
    net = random_net(outputs=4)
    with pytest.raises(UsageError) as caught:
        call(Policy(net, spec_of(net, action=action), "dense"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- devices, backends, memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", 5.5])
def test_a_device_that_is_not_there(saved, device) -> None:
    with pytest.raises(UsageError, match=str(device)):
        load_policy(saved[0], device=device)


def test_a_backend_that_is_not_there(saved) -> None:
    with pytest.raises(UsageError, match="unknown backend 'dens': did you mean 'dense'"):
        load_policy(saved[0], backend="dens")


# Without a compiler at installation there is nothing to hold masks as bits.
small = pytest.mark.skipif(not kernels.cpu.library_path().exists(), reason="the C++ kernels were not built")


def agents_net(slots: int, kind: str) -> Net:
    """The net of ``slots`` agents at hidden 128, all of it masked."""

    def linear(i: int, o: int, relu: bool = False) -> Linear:
        return random_linear(i, o, slots, kind, relu=relu)

    return Net((linear(64, 128, True), GRU(linear(128, 384), linear(128, 384)), linear(128, 128, True), linear(128, 16)), slots)


@small
def test_eight_agents_cost_little_more_than_one_dense_network(tmp_path) -> None:
    net, dense = agents_net(8, "masked"), agents_net(1, "shared")
    one = sum(layer.weight.nbytes + layer.bias.nbytes for layer in dense.linears)
    path = tmp_path / "p.safetensors"
    save_policy(path, net, spec_of(net))
    save_policy(tmp_path / "dense.safetensors", dense, spec_of(dense))
    policy = load_policy(path, backend="cpu_shared")
    assert path.stat().st_size <= (1 + 0.035 * 8) * one <= 1.3 * (tmp_path / "dense.safetensors").stat().st_size
    assert policy.nbytes <= 1.3 * one
    assert load_policy(tmp_path / "dense.safetensors", backend="dense").nbytes == one
    assert same(policy.net, net), "read again"


def test_a_team_that_shares_what_lies_between_costs_less_than_one_dense_network(tmp_path) -> None:
    net, dense = agents_net(8, "masked"), agents_net(1, "shared")
    first, gru, middle, last = net.blocks
    one = (GRU(*(replace(layer, codes=layer.codes[:1]) for layer in (gru.input, gru.recurrent))), replace(middle, codes=middle.codes[:1]))
    net = Net((first, *one, last), 8)
    save_policy(tmp_path / "p.safetensors", net, spec_of(net))
    save_policy(tmp_path / "dense.safetensors", dense, spec_of(dense))
    assert (tmp_path / "p.safetensors").stat().st_size <= 0.65 * (tmp_path / "dense.safetensors").stat().st_size


def test_nothing_of_the_net_stays_that_the_backend_does_not_keep(saved, monkeypatch) -> None:
    held: list[weakref.ref] = []

    def remember(net: Net, threads: int | None) -> Prepared:
        held.extend(weakref.ref(t) for layer in net.linears for t in (layer.codes,) if t is not None)
        made = kernels.dense.Dense(net)
        made.__class__ = type("Frugal", (kernels.dense.Dense,), {})
        made.net = net if remember.keeps else net.to("meta")
        return made

    monkeypatch.setitem(kernels.BACKENDS, "frugal", kernels.Backend("", lambda net: None, remember))
    canonical = sum(t.nbytes for layer in saved[1].linears for t in (layer.weight, layer.bias, layer.codes) if t is not None)
    for remember.keeps in (True, False):
        held.clear()
        policy = load_policy(saved[0], backend="frugal")
        gc.collect()
        assert held and all((ref() is not None) == remember.keeps for ref in held)
        assert policy.nbytes == policy._prepared.nbytes + (canonical if remember.keeps else 0)
        assert same(policy.net, saved[1])
    assert load_policy(saved[0], backend="reference").nbytes == canonical


@small
def test_a_policy_made_in_memory_keeps_its_net() -> None:
    net = agents_net(2, "masked")
    policy = Policy(net, spec_of(net), "cpu_shared")
    assert policy.net is net
    assert policy.nbytes > kernels.prepare(net, "cpu_shared").nbytes + sum(
        layer.weight.nbytes + layer.codes.nbytes for layer in net.linears
    )
    with pytest.raises(UsageError, match="takes 64 inputs"):
        Policy(net, spec_of(net, obs_dim=3))


def test_reading_again_notices_another_file(saved) -> None:
    path, net = saved
    policy = load_policy(path, backend="dense")
    assert same(policy.net, net)
    save_policy(path, random_net(), spec_of(net))
    with pytest.raises(k24.PolicyFileError, match="another one than was loaded: load it again"):
        _ = policy.net
    path.unlink()
    with pytest.raises(k24.PolicyFileError, match="No such file"):
        _ = policy.net


def test_loading_uses_nothing_of_the_training_stack(saved) -> None:
    program = f"""
import sys
import numpy, torch, safetensors.torch
before = set(sys.modules)
import k24
policy = k24.load_policy({str(saved[0])!r}, backend="dense")
actions, state = policy.act(torch.zeros(3, 2, 7))
new = {{name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}}
allowed = ("k24.sparse", "k24.kernels", "k24.errors", "k24.files", "k24.strict", "k24.actions", "k24.artifact", "k24.policy")
strange = sorted(name for name in new if name != "k24" and not name.startswith(allowed))
assert not strange, strange
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(k24.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(tmp_path, dtype) -> None:
    net = random_net(inputs=10, dtype=dtype)
    save_policy(tmp_path / "p.safetensors", net.to("cuda"), spec_of(net, True))
    policy = load_policy(tmp_path / "p.safetensors", device="cuda", backend="dense")
    obs = torch.randn(3, 4, 7)
    values, state = policy.outputs(obs)
    assert values.device == state.device == policy.device
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(values.cpu(), own_reference(net, obs, None, True)[0].float(), atol=tolerance, rtol=tolerance)
    actions, state = policy.act(obs.numpy(), state, avail=np.ones((3, 4, 5), dtype=bool))
    assert isinstance(actions, np.ndarray) and state.is_cuda
    assert policy.act(obs.cuda()[:, 0], state[:, 0])[0].is_cuda
    assert policy.act(torch.zeros(4, 7), slots=np.array([0, 2, -1, 1]))[0].shape == (4,)


@pytest.mark.gpu
def test_every_kind_of_policy_on_a_gpu() -> None:
    net = random_net(outputs=4).to("cuda")
    obs = torch.randn(3, 40, 7, device="cuda")
    for action, kind in KINDS.items():
        policy = Policy(net, spec_of(net, action=action), "dense")
        outputs, _ = policy.outputs(obs)
        assert torch.equal(policy.act(obs)[0], kind.mode(outputs))
        if isinstance(kind, StochasticKind):
            one, two = (policy.act(obs, sample=True, generator=torch.Generator("cuda").manual_seed(1))[0] for _ in range(2))
            assert one.is_cuda and torch.equal(one, two)
            with pytest.raises(UsageError, match="the generator is on cpu and the policy on cuda:0: make it there"):
                policy.act(obs, sample=True, generator=torch.Generator())


def test_a_policy_goes_to_other_processes(saved, tmp_path) -> None:
    """By its file where it has one, which keeps what is sent small."""
    path, net = saved
    loaded = load_policy(path, backend="dense", threads=1)
    made = Policy(net, loaded.spec, "dense")
    obs = torch.randn(loaded.spec.n_agents, 4, loaded.spec.obs_dim)
    wanted, _ = loaded.outputs(obs)
    for policy in (loaded, made):
        sent = pickle.dumps(policy)
        again = pickle.loads(sent)
        assert torch.equal(again.outputs(obs)[0], wanted)
        assert again.spec == policy.spec and again.backend == "dense"
    assert len(pickle.dumps(loaded)) < 1000
    sent = pickle.dumps(loaded)
    with torch.no_grad():
        net.linears[0].bias.add_(1)
    save_policy(path, net, loaded.spec)
    for again in (lambda: pickle.loads(sent), lambda: copy.deepcopy(loaded)):
        with pytest.raises(PolicyFileError, match="is another one than was loaded: load it again"):
            again()


@pytest.mark.parametrize("threads", [0, -1, 2.5, "2", 2**31])
def test_a_number_of_threads_that_is_none(saved, threads) -> None:
    for backend in ("auto", "dense"):
        with pytest.raises(UsageError, match=re.escape(f"threads (={threads}) must be a whole number from 1 on")):
            load_policy(saved[0], backend=backend, threads=threads)


def test_observations_in_bfloat16_keep_their_type_with_agent_ids() -> None:
    net = random_net(slots=3, inputs=7 + 3)
    policy = Policy(net, PolicySpec("t/t", "qmix", "k24", 1, 3, 7, 5, agent_id=True), "dense")
    obs = torch.randn(3, 2, 7)
    exact, _ = policy.outputs(obs)
    net16 = Policy(net.map(lambda layer: replace(layer, weight=layer.weight.bfloat16())), policy.spec, "dense")
    values, state = net16.outputs(obs.bfloat16())
    assert values.dtype == state.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), exact, rtol=0.1, atol=0.1)
