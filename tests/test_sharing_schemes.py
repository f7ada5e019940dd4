"""The baselines of parameter sharing, each against what its paper says of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_learning import ONE_STEP, by, pairs
from torch import Tensor

from k24.envs import make_env
from k24.envs.toy import Specialisation
from k24.errors import UsageError
from k24.evaluate import build_env, build_learner, load_run
from k24.export import net_of
from k24.inspection import inspect_learner, inspect_net
from k24.learners import PPOConfig, TD3Config, ValueConfig, ValueLearner
from k24.nets import AgentNet
from k24.policy import PolicySpec, load_policy, save_policy
from k24.sharing import (
    SCHEMES,
    Experience,
    HyperMARLConfig,
    K24Config,
    SePSConfig,
    Sharing,
    SharingConfig,
    SNPConfig,
    make_critic_sharing,
    make_sharing,
)
from k24.sharing.seps import AutoEncoder, SePS, find_clusters, k_means
from k24.sparse.slots import SlotWeights
from k24.train import play_at_random, train

AGENTS, OBS, HIDDEN, ACTIONS = 3, 18, 64, 5
BASELINES = ["multihead", "fups_bias", "k24_magnitude", "snp", "hypermarl", "seps"]


def net_by(name: str, config: SharingConfig | None = None, hidden: int = HIDDEN, seed: int = 0, **options) -> tuple[AgentNet, Sharing]:
    torch.manual_seed(seed)
    sharing = make_sharing(name, AGENTS, config)
    return AgentNet(OBS, ACTIONS, hidden, AGENTS, sharing, **options), sharing


def by_hand(weights: list[SlotWeights], obs: Tensor) -> Tensor:
    """Each slot by itself through torch's own layers: outputs ``[A, T, N, U]`` of observations ``[A, T, N, D]``."""
    outputs = []
    for slot in range(len(obs)):
        own = [(w.weight[min(slot, len(w.weight) - 1)], w.bias[min(slot, len(w.bias) - 1)]) for w in weights]
        (w1, b1), (wx, bx), (wh, bh), (w2, b2), (w3, b3), (w4, b4) = own
        gru = torch.nn.GRU(wh.shape[1], wh.shape[1])
        gru.weight_ih_l0, gru.weight_hh_l0 = torch.nn.Parameter(wx), torch.nn.Parameter(wh)
        gru.bias_ih_l0, gru.bias_hh_l0 = torch.nn.Parameter(bx), torch.nn.Parameter(bh)
        x, _ = gru(F.linear(obs[slot], w1, b1).relu())
        outputs.append(F.linear(F.linear(F.linear(x, w2, b2).relu(), w3, b3).relu(), w4, b4))
    return torch.stack(outputs)


# --- all of them -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_a_net_of_it_is_each_slot_by_itself(name: str) -> None:
    net, sharing = net_by(name, agent_id=False)
    sharing.resample(0.5)
    obs, weights = torch.randn(AGENTS, 5, 2, OBS), net.snapshot("deploy")
    with torch.no_grad():
        assert torch.allclose(net(weights, obs, net.initial_state(2))[0], by_hand(weights, obs), atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_a_file_of_it_acts_as_the_net_does(tmp_path, name: str) -> None:
    net, _ = net_by(name)
    save_policy(tmp_path / "p", net_of(net), PolicySpec("a/b", "qmix", name, 0, AGENTS, OBS, ACTIONS, net.agent_id))
    policy = load_policy(tmp_path / "p")
    obs, state = torch.randn(AGENTS, 4, 6, OBS), None
    expected, _ = net(net.snapshot("deploy"), obs, net.initial_state(6))
    for t in range(4):
        values, _ = policy.outputs(obs[:, t], state)
        actions, state = policy.act(obs[:, t], state)
        assert torch.allclose(values, expected[:, t], atol=1e-4)
        assert torch.equal(actions, values.argmax(-1))


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_makes_the_same_net(name: str) -> None:
    nets = [net_by(name, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert any(not torch.equal(nets[0][key], nets[2][key]) for key in nets[0])


@pytest.mark.parametrize("name", BASELINES)
def test_who_is_told_its_index(name: str) -> None:
    assert make_sharing(name, AGENTS).agent_id == (name == "k24_magnitude")


# What each costs: values trained, bytes deployed, multiply-adds of a joint action, of nets with D inputs.
DENSE = {d: 64 * d + 2 * 64 * 192 + 2 * 64 * 64 + 64 * 5 for d in (OBS, OBS + AGENTS)}
BIASES = 64 + 2 * 192 + 2 * 64 + 5
KEPT = 45  # of 64 units, at a ratio of 0.3
COSTS = {
    "nops": (3 * (DENSE[18] + BIASES), 12 * (DENSE[18] + BIASES), 3 * DENSE[18]),
    "fups_bias": (DENSE[18] + 3 * BIASES, 4 * (DENSE[18] + 3 * BIASES), 3 * DENSE[18]),
    "multihead": (DENSE[18] + BIASES + 2 * (64 * 5 + 5), 4 * (DENSE[18] + BIASES + 2 * (64 * 5 + 5)), 3 * DENSE[18]),
    # Two of four weights everywhere, but for the last input of 21, which stands alone in its group; three bits for each group of four.
    "k24_magnitude": (DENSE[21] + BIASES, None, 3 * (DENSE[21] - 64) // 2 + 3 * 64),
    "snp": (DENSE[18] + BIASES, None, 3 * (18 * KEPT + 6 * KEPT**2 + 2 * KEPT**2 + 5 * KEPT)),
    "hypermarl": (3 * 64 + 6 * (64 * 64 + 64) + 65 * (DENSE[18] + BIASES), 12 * (DENSE[18] + BIASES), 3 * DENSE[18]),
    "seps": (3 * (DENSE[18] + BIASES), 12 * (DENSE[18] + BIASES), 3 * DENSE[18]),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_it_costs(name: str) -> None:
    net, sharing = net_by(name)
    params, deployed, macs = COSTS[name]
    found = inspect_net(net_of(net))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) - sharing.idle() == params
    assert found["macs_per_act"] == macs
    # Five agents of these three slots, unit types for instance: what a slot costs on average, for each of them.
    assert inspect_net(net_of(net), 5)["macs_per_act"] == pytest.approx(5 / 3 * macs, abs=1)
    if deployed is None:
        bits = 3 * sum(o * -(-i // 4) for o, i in [(64, 21), (192, 64), (192, 64), (64, 64), (64, 64), (5, 64)])
        if name == "snp":
            bits = 3 * sum(o + i for o, i in [(64, 18), (192, 64), (192, 64), (64, 64), (64, 64), (5, 64)])
        # Under one mask for all, what it keeps; what all agents use together is three times as many.
        values = macs // 3 + BIASES if name == "k24_magnitude" else params
        # Bits fill up the last byte of every layer.
        assert 0 <= found["bytes"] - 4 * values - bits / 8 < 6
    else:
        assert found["bytes"] == deployed


def test_the_table_in_the_documents_is_what_the_script_prints(monkeypatch, capsys) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "argv", ["scheme_costs.py"])
    runpy.run_path(str(root / "examples" / "scheme_costs.py"), run_name="__main__")
    *table, last = capsys.readouterr().out.splitlines()
    assert set(table) <= set((root / "docs" / "schemes.md").read_text(encoding="utf-8").splitlines())
    assert len(json.loads(last)) == len(table) - 2 == len(SCHEMES) + 1


def test_values_are_counted_once_where_slots_have_the_same(tmp_path) -> None:
    net, sharing = net_by("seps")
    net.layers["fc1"].clusters.of.copy_(torch.tensor([0, 1, 0]))  # type: ignore[union-attr]
    found = inspect_net(net_of(net))
    assert found["bytes"] == 8 * (DENSE[18] + BIASES) and found["params"] == 2 * (DENSE[18] + BIASES)
    assert found["macs_per_act"] == 3 * DENSE[18]
    assert sharing.idle() == DENSE[18] + BIASES


# --- multihead, fups_bias --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weights", "biases"), [("multihead", [1] * 5 + [3], [1] * 5 + [3]), ("fups_bias", [1] * 6, [3] * 6)])
def test_what_each_slot_owns_of_a_dense_network(name: str, weights: list[int], biases: list[int]) -> None:
    made = net_by(name)[0].materialise()
    assert [len(w.weight) for w in made] == weights and [len(w.bias) for w in made] == biases
    for w in made:
        for part in (w.weight, w.bias):
            assert len(part) == 1 or not torch.equal(part[0], part[1]), "slots differ from the first step"


@pytest.mark.parametrize("name", ["multihead", "fups_bias", "snp", "seps"])
def test_what_one_slot_learns_reaches_the_shared_part_and_its_own(name: str) -> None:
    net, _ = net_by(name)
    made = net.materialise()
    net(made, torch.randn(AGENTS, 3, 4, OBS), net.initial_state(4))[0][0].square().sum().backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None, path
        if len(parameter) == AGENTS and (name != "multihead" or path.startswith("layers.fc4")):
            assert parameter.grad[0].any() and not parameter.grad[1:].any(), path
        else:
            assert parameter.grad.any(), path


# --- k24_magnitude ---------------------------------------------------------------------------------------------------------------


def test_the_largest_weights_are_kept_and_chosen_again_as_they_move() -> None:
    net, sharing = net_by("k24_magnitude", hidden=8)
    for _ in range(2):
        for layer, made in zip(net.layers.values(), net.materialise("deploy"), strict=True):
            assert made.weight.shape[0] == 1
            for weights, kept in zip(layer.weight.split(4, 1), (made.weight[0] != 0).split(4, 1), strict=True):  # type: ignore[union-attr, operator]
                expected = F.one_hot(weights.abs().topk(min(2, weights.shape[1])).indices, weights.shape[1]).sum(1).bool()
                assert torch.equal(kept, expected)
        with torch.no_grad():
            for layer in net.layers.values():
                layer.weight.normal_()  # type: ignore[union-attr, operator]
    assert [id(p) for p, _ in sharing.trained_apart()] == [id(layer.weight) for layer in sharing.masked], "no alphas"  # type: ignore[attr-defined]


@pytest.mark.parametrize("correction", [False, True])
def test_nothing_but_the_size_of_weights_counts(correction: bool) -> None:
    net, sharing = net_by("k24_magnitude", SharingConfig(masks=K24Config(reset_interval=1, ema_bias_correction=correction)))
    before = [layer.best_codes() for layer in sharing.masked]  # type: ignore[attr-defined]
    weights = [layer.weight.clone() for layer in sharing.masked]  # type: ignore[attr-defined]
    for progress in (0.0, 0.1):
        sharing.resample(progress)
        made = net.materialise("train")
        net(made, 9 * torch.rand(AGENTS, 4, 5, OBS), net.initial_state(5), observe=True)[0].sum().backward()
        assert sharing.aux_loss(made, torch.tensor(1.0)) is None
        sharing.step(progress, 0)
    for layer, codes, weight in zip(sharing.masked, before, weights, strict=True):  # type: ignore[attr-defined]
        assert layer.alpha.grad is None and not layer.alpha.any() and (layer.running_magnitude() == 1).all()
        same = layer.weight == weight  # but for what a reset drew anew
        assert same.float().mean() > 0.9 and (torch.equal(layer.best_codes(), codes) or not same.all())
    assert sharing.step(0.8, 0).frozen
    frozen = [layer.codes.clone() for layer in sharing.masked]  # type: ignore[attr-defined]
    with torch.no_grad():
        for layer in sharing.masked:  # type: ignore[attr-defined]
            layer.weight.normal_()
    assert all(torch.equal(layer.best_codes(), codes) for layer, codes in zip(sharing.masked, frozen, strict=True))  # type: ignore[attr-defined]


# --- snp -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 64), (0.3, 45), (0.5, 32), (0.99, 1)])
def test_each_slot_lacks_as_many_neurons_as_asked_for_and_others(ratio: float, kept: int) -> None:
    net, sharing = net_by("snp", SharingConfig(snp=SNPConfig(ratio)))
    before = net.state_dict()
    for name in ("fc1", "gru_input", "fc2", "fc3"):
        units = net.layers[name].kept_out[:, :64]  # type: ignore[index, union-attr]
        assert units.sum(1).tolist() == [kept] * AGENTS
        if kept < 64:
            assert not torch.equal(units[0], units[1])
    for progress in (0.0, 0.9):
        sharing.resample(progress)
        sharing.step(progress, 10**6)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), "fixed"


def test_a_slot_is_the_smaller_network_of_the_neurons_it_has() -> None:
    """Rows and columns of dropped neurons cut out of the shared weights give the same outputs, and a state that stays zero."""
    net, _ = net_by("snp", agent_id=False)
    obs = torch.randn(AGENTS, 6, 3, OBS)
    outputs, state = net(net.snapshot("act"), obs, net.initial_state(3))
    for slot in range(AGENTS):
        cut = []
        for layer in net.layers.values():
            rows, columns = layer.kept_out[slot], layer.kept_in[slot]  # type: ignore[union-attr, index]
            cut.append(SlotWeights(layer.weight[rows][:, columns][None], layer.bias[rows][None]))  # type: ignore[union-attr, index]
        assert torch.allclose(by_hand(cut, obs[slot : slot + 1])[0], outputs[slot], atol=1e-5)
        has = net.layers["fc2"].kept_in[slot]  # type: ignore[union-attr, index]
        assert not state[slot][:, ~has].any() and state[slot][:, has].all()


def test_weights_of_dropped_neurons_learn_nothing_from_the_slot() -> None:
    net, _ = net_by("snp")
    net(net.materialise(), torch.randn(AGENTS, 3, 4, OBS), net.initial_state(4))[0][1].square().sum().backward()
    for layer in net.layers.values():
        rows, columns = layer.kept_out[1], layer.kept_in[1]  # type: ignore[union-attr, index]
        assert not layer.weight.grad[~rows].any() and not layer.weight.grad[:, ~columns].any()  # type: ignore[union-attr, index]
        assert not layer.bias.grad[~rows].any()  # type: ignore[union-attr, index]


# --- hypermarl -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [1, 3, 80])
def test_generated_weights_start_at_the_usual_scale(agents: int) -> None:
    torch.manual_seed(0)
    sharing = make_sharing("hypermarl", agents)
    for inputs, outputs in ((18, 64), (64, 192), (256, 8)):
        made = sharing.linear(inputs, outputs, "hidden").materialise()  # type: ignore[operator]
        assert float(made.weight.detach().std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
        if made.bias.numel() > 100:
            assert float(made.bias.detach().square().mean()) ** 0.5 == pytest.approx((3 * inputs) ** -0.5, rel=0.2)
        if agents > 1:
            agreement = torch.corrcoef(made.weight.detach()[:2].flatten(1))[0, 1]
            assert float(agreement) < 0.9


def test_one_embedding_generates_all_layers() -> None:
    net, _ = net_by("hypermarl", SharingConfig(hypermarl=HyperMARLConfig(embedding=4, hidden=6)))
    embeddings = {name: p for name, p in net.named_parameters() if "embedding" in name}
    assert [p.shape for p in embeddings.values()] == [(AGENTS, 4)]
    net(net.materialise(), torch.randn(AGENTS, 3, 4, OBS), net.initial_state(4))[0][2].square().sum().backward()
    gradient = next(iter(embeddings.values())).grad
    assert gradient is not None and gradient[2].any() and not gradient[:2].any()
    with torch.no_grad():
        before = net.materialise()
        next(iter(embeddings.values()))[0].add_(1)
        for old, new in zip(before, net.materialise(), strict=True):
            assert not torch.equal(old.weight[0], new.weight[0]) and torch.equal(old.weight[1:], new.weight[1:])


def test_a_recurrent_part_that_is_shared_on_request() -> None:
    made = net_by("hypermarl", SharingConfig(hypermarl=HyperMARLConfig(rnn=False)))[0].materialise()
    assert [len(w.weight) for w in made] == [3, 1, 1, 3, 3, 3]


# --- seps ------------------------------------------------------------------------------------------------------------------------


def played(kinds: list[int], rows: int = 600, noise: float = 0.1, seed: int = 0) -> Experience:
    """Agents of one kind are pushed by an action where those of another are pulled, and are paid for other things."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.arange(len(kinds)).repeat(rows)
    obs, actions = torch.randn(len(slots), 4, generator=g), F.one_hot(torch.randint(3, slots.shape, generator=g), 3).float()
    kind = torch.tensor(kinds)[slots].float()
    push = (1 - 2 * kind) * (actions[:, 0] - actions[:, 1])
    after = obs + push[:, None] + noise * torch.randn(obs.shape, generator=g)
    return Experience(rows, slots, obs, actions, kind * obs[:, 0], after)


QUICK = SePSConfig(epochs=6, hidden=32)


@pytest.mark.parametrize("kinds", [[0, 1], [0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0, 0]], ids=str)
def test_kinds_are_told_apart_and_equals_put_together(kinds: list[int]) -> None:
    found = find_clusters(played(kinds), len(kinds), QUICK, torch.Generator().manual_seed(1))
    assert found == kinds, "and counted in the order in which they come"


def test_as_many_clusters_as_asked_for() -> None:
    experience = played([0, 1, 1, 0])
    for count in (1, 2, 3):
        found = find_clusters(experience, 4, dataclasses.replace(QUICK, clusters=count), torch.Generator().manual_seed(1))
        assert len(set(found)) == count
        if count == 2:
            assert found == [0, 1, 1, 0]


def test_clusters_depend_on_the_seed_and_on_nothing_else() -> None:
    experience, before = played([0, 0, 0, 0]), torch.get_rng_state()
    found = []
    for k in range(2):
        torch.manual_seed(k)
        found.append(find_clusters(experience, 4, dataclasses.replace(QUICK, clusters=3), torch.Generator().manual_seed(5)))
    assert found[0] == found[1]
    torch.set_rng_state(before)
    find_clusters(experience, 4, QUICK, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_prediction_errors_by_hand() -> None:
    model = AutoEncoder(2, 1, 1, SePSConfig(code=1, hidden=1))
    with torch.no_grad():
        for part in model.decoder:
            if isinstance(part, torch.nn.Linear):
                part.weight.fill_(1.0)
                part.bias.zero_()
    slots, inputs, targets = torch.tensor([0, 0, 1]), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [1.0], [1.0]])
    # With code 0 the first slot predicts 1 and 2; with code 2 the second one 5.
    assert model.errors(torch.tensor([[0.0], [2.0]]), slots, inputs, targets).tolist() == [[0.5], [16.0]]
    with torch.no_grad():
        model.mean.copy_(torch.tensor([[0.0], [2.0]]))
        model.log_std.zero_()
    # Without noise errors are 0, 1 and 16; divergences of means 0, 0 and 2 at standard deviation 1 are 0, 0 and 2.
    loss = model.loss(slots, inputs, targets, torch.zeros(3, 1), 0.3)
    assert loss.item() == pytest.approx(17 / 3 + 0.3 * 2 / 3)


def test_k_means_of_clear_groups() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(6, 2, generator=g) * 0.1 + place for place in (0.0, 5.0, 9.0)])
    labels = k_means(points, 3, g)
    assert [len(set(part.tolist())) for part in labels.split(6)] == [1, 1, 1] and len(set(labels.tolist())) == 3
    assert len(set(k_means(torch.zeros(4, 2), 2, g).tolist())) == 1
    assert sorted(k_means(points[:3], 3, g).tolist()) == [0, 1, 2]


def test_slots_are_spread_over_the_networks_until_something_is_known() -> None:
    for clusters, expected in ((None, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (9, [0, 1, 2, 3, 4])):
        sharing = make_sharing("seps", 5, SharingConfig(seps=SePSConfig(clusters=clusters)))
        made = sharing.linear(4, 3, "input").materialise()  # type: ignore[operator]
        same = [[bool(torch.equal(a, b)) for a in made.weight] for b in made.weight]
        assert same == [[i == j for i in expected] for j in expected]
        assert sharing.idle() == 0


def test_nobody_plays_for_what_is_settled() -> None:
    wanted = {(1, None): 0, (3, None): 70, (3, 1): 0, (3, 2): 70, (3, 3): 0, (3, 7): 0}
    for (slots, clusters), steps in wanted.items():
        assert make_sharing("seps", slots, SharingConfig(seps=SePSConfig(clusters=clusters, random_play=70))).random_play == steps
    assert all(make_sharing(name, 3).random_play == 0 for name in BASELINES if name != "seps")


def test_agents_of_a_cluster_share_what_they_learn_and_a_checkpoint_knows_them() -> None:
    env = make_env("toy/memory", 8)
    experience = played([0, 0])
    learners = []
    for seed in (0, 1):
        sharing = make_sharing("seps", 2, SharingConfig(seps=QUICK))
        if seed == 0:
            sharing.prepare(experience, torch.Generator().manual_seed(0))
        learners.append(ValueLearner("qmix", env.spec, sharing, ValueConfig(batch_size=8), hidden=8, seed=seed))
    prepared, fresh = learners
    assert prepared.sharing.metrics() == {"clusters": 1.0, "random_play_steps": 600.0}
    for made, target in zip(prepared.net.snapshot("act"), prepared._target.weights, strict=True):
        assert torch.equal(made.weight[0], made.weight[1]) and torch.equal(made.weight, target.weight)
    fresh.load_state_dict(copy.deepcopy(prepared.state_dict()))
    assert fresh.sharing.metrics() == prepared.sharing.metrics()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(fresh.net.snapshot("act"), prepared.net.snapshot("act"), strict=True))


def test_critics_of_the_agents_are_put_together_as_these_are() -> None:
    config = by("ippo", ONE_STEP, task="toy/specialisation", sharing="seps", env_args=("n_agents=4",))
    env = build_env(config, 4)
    learner = build_learner(config, env.spec, experience=played([0, 1, 1, 0]))
    for net in (learner.net, learner.critic.net):  # type: ignore[attr-defined]
        assert net.layers["fc1"].clusters.of.tolist() == [0, 1, 1, 0]
    other = make_critic_sharing("seps", "nops", 4, False)
    other.follow(learner.sharing)
    assert not isinstance(other, SePS)


class Mortals(Specialisation):
    """Specialisation over three steps; agent 0 is there for the first of them alone."""

    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs, n_agents=3)
        self.spec = dataclasses.replace(self.spec, episode_limit=3)

    def reset(self, seed: int):
        self.clock = 0
        return self._seen(super().reset(seed))

    def step(self, actions: Tensor):
        self.clock += 1
        step = super().step(actions)
        seen, done = self._seen(step.after), torch.full((self.n_envs,), self.clock == 3)
        return dataclasses.replace(step, after=seen, current=seen, terminated=done)

    def _seen(self, observation):
        alive = torch.ones(3, self.n_envs, dtype=torch.bool)
        alive[0] = self.clock < 2
        return dataclasses.replace(observation, alive=alive, obs=torch.full((3, self.n_envs, 1), float(self.clock)) * alive[..., None])


def test_random_play_is_told_of_the_living_alone() -> None:
    env = Mortals(4)
    config = by("qmix", ONE_STEP, sharing="seps", seps=SePSConfig(random_play=20))
    learner = build_learner(config, env.spec)
    found = play_at_random(learner, env, 0)
    assert found.steps == 24, "whole rounds of four episodes of three steps"
    moments = {(int(s), float(o), float(n)) for s, o, n in zip(found.slots, found.obs, found.next_obs, strict=True)}
    assert moments == {(0, 0, 1), *((agent, t, t + 1) for agent in (1, 2) for t in range(3))}
    assert len(found.slots) == 8 * 7
    assert found.actions.shape == (56, 3) and (found.actions.sum(1) == 1).all()
    again = play_at_random(learner, env, 0)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again[1:], strict=True))


def test_random_play_knows_the_users_slots_and_continuous_actions() -> None:
    seps = SePSConfig(random_play=20)
    env = make_env("toy/specialisation", 8, n_agents=4)
    learner = build_learner(by("qmix", ONE_STEP, sharing="seps", seps=seps), env.spec, rule=pairs(env.spec))
    assert torch.bincount(play_at_random(learner, env, 0).slots).tolist() == [48, 48]
    env = make_env("toy/reach", 4)
    for algo, settings in (("ippo", PPOConfig(recurrent=False)), ("matd3", TD3Config())):
        config = dataclasses.replace(by("ippo", ONE_STEP, sharing="seps", seps=seps, steps=50_000), algo=algo, learner=settings)
        found = play_at_random(build_learner(config, env.spec), env, 0)
        assert found.actions.shape == (len(found.slots), env.spec.n_actions) and found.actions.abs().max() <= 1


def test_a_run_plays_first_and_says_so(tmp_path) -> None:
    config = by("qmix", ONE_STEP, task="toy/specialisation", sharing="seps", steps=160, seps=SePSConfig(random_play=250, hidden=8))
    train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.steps == 160, "random play is no part of the run's steps"
    # All is alike in this game but what one does oneself, so random play has nothing to tell the two agents by.
    assert run.learner.sharing.metrics() == {"clusters": 1.0, "random_play_steps": 256.0}
    found = inspect_learner(run.learner)
    assert found["params"] == sum(p[0].numel() for p in run.learner.net.parameters()) == found["bytes"] // 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SNPConfig(ratio=1.0), r"ratio \(=1.0\) must lie in \[0, 1\)"),
        (lambda: HyperMARLConfig(hidden=0), r"hypermarl needs embedding \(=64\) and hidden \(=0\) of at least 1"),
        (lambda: SePSConfig(clusters=0), r"clusters \(=0\) must be at least 1"),
        (lambda: SePSConfig(epochs=0), r"epochs \(=0\) of seps must be at least 1"),
        (lambda: SePSConfig(tolerance=0.0), r"seps needs tolerance \(=0.0\)"),
    ],
)
def test_impossible_settings(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
