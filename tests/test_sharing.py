"""Sharing schemes: what all of them promise, and what is particular to some."""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

import k24
from k24.envs import make_env
from k24.errors import UsageError
from k24.learners import ValueConfig, ValueLearner
from k24.nets import AgentNet, Weights
from k24.sharing import SCHEMES, DenseLinear, K24Config, Sharing, SharingConfig, make_sharing
from k24.sparse import MaskedLinear, PatternSet, SlotWeights

AGENTS, OBS, HIDDEN, ACTIONS = 3, 7, 8, 5
PHASES = ("train", "act", "sampled", "deploy")
K24_FAMILY = [name for name in SCHEMES if name.startswith("k24")]


def some_net(name: str, config: SharingConfig | None = None, hidden: int = HIDDEN, seed: int = 0) -> tuple[AgentNet, Sharing]:
    torch.manual_seed(seed)
    sharing = make_sharing(name, AGENTS, config)
    net = AgentNet(OBS, ACTIONS, hidden, AGENTS, sharing)
    sharing.resample(0.3, torch.Generator().manual_seed(seed))
    return net, sharing


def masks_of(made: Weights) -> list[Tensor]:
    return [(w.weight != 0).float() for w in made]


# --- what every scheme promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("phase", PHASES)
def test_effective_weights_have_the_promised_shapes(name: str, phase: str) -> None:
    net, sharing = some_net(name)
    made = net.materialise(phase)  # type: ignore[arg-type]
    assert len(made) == len(sharing.layers) == 6
    inputs = OBS + AGENTS * net.agent_id
    sizes = [(HIDDEN, inputs), (3 * HIDDEN, HIDDEN), (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (ACTIONS, HIDDEN)]
    for w, (outputs, width) in zip(made, sizes, strict=True):
        assert isinstance(w, SlotWeights)
        assert w.weight.shape in {(AGENTS, outputs, width), (1, outputs, width)}
        assert w.bias.shape in {(AGENTS, outputs), (1, outputs)}
        assert w.weight.isfinite().all()
        assert w.weight.abs().sum() > 0
    q, h = net(made, torch.randn(AGENTS, 4, 2, OBS), net.initial_state(2))
    assert q.shape == (AGENTS, 4, 2, ACTIONS)
    assert h.shape == (AGENTS, 2, HIDDEN)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_reach_every_parameter_that_learns(name: str) -> None:
    net, sharing = some_net(name)
    made = net.materialise("train")
    torch.stack([(w.weight * torch.randn_like(w.weight)).sum() + (w.bias * torch.randn_like(w.bias)).sum() for w in made]).sum().backward()
    learning = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    assert learning
    for path, parameter in learning:
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().sum() > 0, path
    known = {id(p) for _, p in learning}
    assert {id(p) for p, _ in sharing.trained_apart()} <= known
    assert all(scale >= 0 for _, scale in sharing.trained_apart())


@pytest.mark.parametrize("name", SCHEMES)
def test_snapshots_have_no_graph_and_do_not_follow(name: str) -> None:
    net, _ = some_net(name)
    for phase in PHASES:
        kept = net.snapshot(phase)  # type: ignore[arg-type]
        before = [w.weight.clone() for w in kept]
        assert not any(w.weight.requires_grad or w.bias.requires_grad for w in kept)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01)
        assert all(torch.equal(w.weight, b) for w, b in zip(kept, before, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_state_round_trip_after_training(name: str, progress: float) -> None:
    env = make_env("toy/memory", 8)
    learners = []
    for seed in (0, 1):
        sharing = make_sharing(name, env.spec.n_agents, SharingConfig(masks=K24Config(reset_interval=3)))
        learners.append(ValueLearner("vdn", env.spec, sharing, ValueConfig(batch_size=8, env_steps_per_update=16), hidden=8, seed=seed))
    trained, fresh = learners
    for step in range(5):
        trained.gather(env, 32 * step, seed=step)
        trained.learn(progress * (step + 1) / 5, 32 * (step + 1))
    trained.metrics()
    fresh.net.load_state_dict(copy.deepcopy(trained.net.state_dict()))
    fresh.sharing.load_state_dict(copy.deepcopy(trained.sharing.state_dict()))
    for phase in ("act", "deploy"):
        for a, b in zip(trained.net.snapshot(phase), fresh.net.snapshot(phase), strict=True):  # type: ignore[arg-type]
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.bias, b.bias)
    assert fresh.sharing.metrics() == trained.sharing.metrics()
    assert len(fresh.sharing.retired()) == len(trained.sharing.retired())
    task_loss = torch.tensor(2.0)
    losses = []
    for learner in learners:
        learner.sharing.resample(0.3, torch.Generator().manual_seed(1))
        losses.append(learner.sharing.aux_loss(learner.net.materialise("train"), task_loss))
    assert (losses[0] is None) == (losses[1] is None)
    assert losses[0] is None or torch.equal(losses[0], losses[1])


def test_an_unknown_scheme_is_named_with_its_nearest() -> None:
    with pytest.raises(UsageError, match="unknown sharing scheme 'kaleidoskope': did you mean 'kaleidoscope'"):
        make_sharing("kaleidoskope", 3)


def test_every_file_of_the_folder_is_reached_from_the_table() -> None:
    folder = Path(inspect.getfile(Sharing)).parent
    reached = {"__init__"}
    for name in SCHEMES:
        net, sharing = some_net(name)
        for thing in (sharing, *net.modules()):
            reached |= {cls.__module__.rpartition(".")[2] for cls in type(thing).__mro__ if cls.__module__.startswith("k24.sharing.")}
    assert {path.stem for path in folder.glob("*.py")} == reached


def test_nets_learners_and_the_training_loop_know_no_scheme() -> None:
    package = Path(k24.__file__).parent
    classes = {cls.__name__ for name in SCHEMES for cls in type(make_sharing(name, 2)).__mro__} - {"Sharing", "ABC", "object"}
    for path in [*package.glob("learners/*.py"), package / "nets.py", package / "train.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in SCHEMES, where
            elif isinstance(node, ast.Name | ast.Attribute):
                assert (node.id if isinstance(node, ast.Name) else node.attr) not in classes, where
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("k24.sharing"):
                assert node.module in {"k24.sharing", "k24.sharing.base"}, where
                assert not {alias.name for alias in node.names} & classes, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                assert "Sharing" not in ast.unparse(node), where


# --- K-2:4 and its controls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", K24_FAMILY)
@pytest.mark.parametrize("forward", ["expected", "sample", "gumbel"])
@pytest.mark.parametrize("text", ["2:4", "1:4"])
def test_deployed_masks_are_exactly_n_of_m_in_every_layer(name: str, forward: str, text: str) -> None:
    net, _ = some_net(name, SharingConfig(masks=K24Config(pattern=text, forward=forward)))  # type: ignore[arg-type]
    patterns = PatternSet.parse(text)
    for path, made in zip(net.layers, net.materialise("deploy"), strict=True):
        for group in (made.weight != 0).split(patterns.m, -1):
            assert (group.sum(-1) == min(patterns.n, group.shape[-1])).all(), path


@pytest.mark.parametrize("name", K24_FAMILY)
def test_a_dense_recurrent_part_on_request(name: str) -> None:
    net, sharing = some_net(name, SharingConfig(masks=K24Config(mask_rnn=False)))
    assert {path for path, layer in net.layers.items() if layer.n_slots == AGENTS and isinstance(layer, MaskedLinear)} <= OWN[None]
    for path, made in zip(net.layers, net.materialise("deploy"), strict=True):
        recurrent = path.startswith("gru")
        assert isinstance(net.layers[path], DenseLinear if recurrent else MaskedLinear)
        assert (made.weight != 0).all() == recurrent
    assert len(sharing.masked) == 4  # type: ignore[attr-defined]


OWN = {
    "all": {"fc1", "gru_input", "gru_recurrent", "fc2", "fc3", "fc4"},
    "feedforward": {"fc1", "fc2", "fc3", "fc4"},
    "ends": {"fc1", "fc4"},
    "first": {"fc1"},
    None: {"fc1", "fc4"},
}


@pytest.mark.parametrize("own_masks", OWN)
@pytest.mark.parametrize("name", ["k24", "k24_random"])
def test_layers_with_a_mask_for_each_slot(name: str, own_masks: str | None) -> None:
    config = K24Config(own_masks=own_masks, hetero_init_scale=1.0, div_coef=0.1)  # type: ignore[arg-type]
    net, sharing = some_net(name, SharingConfig(masks=config))
    made = net.materialise("train")
    assert {path for path, weights in zip(net.layers, made, strict=True) if len(weights.weight) == AGENTS} == OWN[own_masks]
    assert {path for path, layer in net.layers.items() if layer.n_slots == AGENTS} == OWN[own_masks]
    metrics = sharing.metrics()
    masks = [mask.flatten(1) for mask in masks_of(net.materialise("deploy")) if len(mask) == AGENTS]
    pairs = [torch.cat([mask[i] != mask[j] for mask in masks]).float().mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert metrics["mask_hamming"] == pytest.approx(float(sum(pairs)) / 3), "of layers that may differ, and of no others"
    assert metrics["mask_hamming"] > 0.25
    assert metrics["overall_sparsity"] == pytest.approx(0.5, abs=0.05)
    if name == "k24":
        loss = sharing.aux_loss(made, torch.tensor(1.0))
        assert loss is not None
        loss.backward()
        pushed = {path for path, layer in net.layers.items() if layer.alpha.grad is not None and layer.alpha.grad.any()}
        assert pushed == OWN[own_masks], "one mask for all has nothing to differ from"
        before = {path: layer.alpha.clone() for path, layer in net.layers.items()}
        resets = sharing.reset_slot(1)
        changed = {path for path, layer in net.layers.items() if not torch.equal(layer.alpha, before[path])}
        assert changed == OWN[own_masks] and len(resets) == len(changed), "what a slot shares with others stays"


def test_without_a_gru_all_layers_have_a_mask_for_each_slot_by_default() -> None:
    net = AgentNet(OBS, ACTIONS, HIDDEN, AGENTS, make_sharing("k24", AGENTS), recurrent=False)
    assert [layer.n_slots for layer in net.layers.values()] == [AGENTS] * 3
    config = SharingConfig(masks=K24Config(own_masks="ends"))
    net = AgentNet(OBS, ACTIONS, HIDDEN, AGENTS, make_sharing("k24", AGENTS, config), recurrent=False)
    assert [layer.n_slots for layer in net.layers.values()] == [AGENTS, 1, AGENTS]


def test_one_mask_for_all_everywhere_is_the_shared_control() -> None:
    nets = [some_net(name, SharingConfig(masks=K24Config(own_masks="all", div_coef=0.0)))[0] for name in ("k24", "k24_shared")]
    for layer in nets[0].layers.values():
        with torch.no_grad():
            layer.alpha.copy_(layer.alpha[:1].expand_as(layer.alpha))
    for one, other in zip(nets[0].layers.values(), nets[1].layers.values(), strict=True):
        with torch.no_grad():
            other.weight.copy_(one.weight)
            other.bias.copy_(one.bias)
            other.alpha.copy_(one.alpha[:1])
    obs = torch.randn(AGENTS, 5, 4, OBS)
    outputs = [net(net.materialise("train"), obs, net.initial_state(4))[0] for net in nets]
    torch.testing.assert_close(*outputs)


def test_random_masks_are_uniform_and_never_change() -> None:
    everywhere = SharingConfig(masks=K24Config(own_masks="all"))
    net, sharing = some_net("k24_random", everywhere, hidden=64)
    codes = [layer.codes.clone() for layer in sharing.masked]  # type: ignore[attr-defined]
    free = torch.cat([c[..., :2].flatten() for c in codes])
    counts = torch.bincount(free.long(), minlength=6).double()
    expected = counts.sum() / 6
    assert float(((counts - expected).square() / expected).sum()) < 20.5, "chi-square, 5 degrees of freedom, 1 in 1000"
    padded = codes[0][..., -1].flatten()
    assert (OBS + AGENTS) % 4 == 2
    assert (padded == 0).all(), "two real columns in the last group: both are kept"
    masks = masks_of(net.materialise("deploy"))
    assert (masks[1][0] != masks[1][1]).float().mean() == pytest.approx(0.5, abs=0.05), "agents have masks of their own"
    assert [id(p) for p, _ in sharing.trained_apart()] == [id(layer.weight) for layer in sharing.masked], "no alphas"  # type: ignore[attr-defined]
    for progress in (0.0, 0.4, 0.8, 1.0):
        sharing.resample(progress)
        assert sharing.aux_loss(net.materialise("train"), torch.tensor(1.0)) is None
        events = sharing.step(progress, int(1e6 * progress), policy_kl=9.0)
        assert not (events.resets or events.frozen or events.retired)
        for phase in PHASES:
            assert all(torch.equal(a, b) for a, b in zip(masks_of(net.materialise(phase)), masks, strict=True))  # type: ignore[arg-type]
    other, _ = some_net("k24_random", everywhere, hidden=64, seed=1)
    assert not torch.equal(masks_of(other.materialise("deploy"))[1], masks[1])


def test_random_masks_of_a_padded_group_are_uniform_too() -> None:
    layer = make_sharing("k24_random", 3).linear(7, 4000, "input")
    counts = torch.bincount(layer.codes[..., 1].flatten().long(), minlength=6)  # type: ignore[operator, index, union-attr]
    assert counts[[2, 4, 5]].sum() == 0
    assert counts[[0, 1, 3]].float().div(12_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_one_shared_mask_is_the_same_for_all_and_learned() -> None:
    net, sharing = some_net("k24_shared", SharingConfig(masks=K24Config(ema_every=1)))
    for phase in PHASES:
        assert all(w.weight.shape[0] == 1 for w in net.materialise(phase))  # type: ignore[arg-type]
    made = net.materialise("train")
    assert sharing.aux_loss(made, torch.tensor(1.0)) is None, "nobody to differ from"
    net(made, torch.randn(AGENTS, 3, 2, OBS), net.initial_state(2), observe=True)[0].square().sum().backward()
    assert all(layer.alpha.grad.abs().sum() > 0 for layer in sharing.masked)  # type: ignore[attr-defined]
    assert all(layer.ema.ne(1).any() for layer in sharing.masked)  # type: ignore[attr-defined]
    assert sharing.metrics()["mask_hamming"] == 0.0


@pytest.mark.parametrize(("given", "scale"), [(7.0, 7.0), (0.0, 0.0), (None, 60.0)])
def test_alphas_learn_at_their_own_rate(given: float | None, scale: float) -> None:
    _, sharing = some_net("k24", SharingConfig(masks=K24Config(alpha_lr_scale=given)))
    apart = {id(p): s for p, s in sharing.trained_apart()}
    assert all(apart.pop(id(layer.alpha)) == scale for layer in sharing.masked)  # type: ignore[attr-defined]
    assert all(apart.pop(id(layer.weight)) == 2.0 for layer in sharing.masked)  # type: ignore[attr-defined]
    assert not apart


def test_a_step_moves_an_output_as_far_as_in_a_dense_layer() -> None:
    inputs = torch.ones(1, 1, 64)
    moved = {}
    for name in ("k24_random", "fups"):
        torch.manual_seed(0)
        sharing = make_sharing(name, 1)
        layer = sharing.linear(64, 32, "hidden")
        optimiser = torch.optim.Adam(
            [{"params": [p], "lr": s * 1e-3} for p, s in sharing.trained_apart()] or [{"params": [layer.weight], "lr": 1e-3}]
        )  # type: ignore[list-item]
        outputs = []
        for _ in range(2):
            weight = layer.materialise("train").weight  # type: ignore[operator]
            outputs.append(inputs @ weight[0].T)
            outputs[-1].sum().backward()
            optimiser.step()
        moved[name] = float((outputs[1] - outputs[0]).mean().detach())
    assert moved["k24_random"] == pytest.approx(moved["fups"], rel=1e-3)
    assert moved["fups"] == pytest.approx(-64e-3, rel=1e-3)


def test_diversity_is_scaled_to_its_share_of_the_task_loss() -> None:
    _, sharing = some_net("k24", SharingConfig(masks=K24Config(div_coef=0.2)))
    made = [layer.materialise("train") for layer in sharing.layers]  # type: ignore[operator]
    loss = sharing.aux_loss(made, torch.tensor(3.0))
    assert loss is not None
    assert loss.requires_grad
    # Slots that are still alike are above the floor of 1/6, so diversity is given exactly its share.
    assert loss.item() == pytest.approx(0.2 * 3.0, rel=1e-4)
    logged = sharing.metrics()
    assert logged["div_loss"] * logged["div_coef"] == pytest.approx(0.6, rel=1e-4)
    assert some_net("k24", SharingConfig(masks=K24Config(div_coef=0.0)))[1].aux_loss(made, torch.tensor(3.0)) is None


def test_a_layer_without_a_choice_does_not_disturb_diversity() -> None:
    sharing = make_sharing("k24", 3, SharingConfig(masks=K24Config(div_coef=0.1)))
    narrow, wide = sharing.linear(2, 8, "input"), sharing.linear(8, 8, "hidden")
    sharing.resample(0.0)
    loss = sharing.aux_loss([narrow.materialise("train"), wide.materialise("train")], torch.tensor(1.0))  # type: ignore[operator]
    assert loss is not None
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_lr_scale": -1.0}, "alpha_lr_scale -1.0 must not be negative"),
        ({"alpha_decay": 1.0}, r"alpha_decay 1.0 must lie in \[0, 1\)"),
        ({"alpha_decay": -0.1}, r"alpha_decay -0.1 must lie in \[0, 1\)"),
        ({"div_coef": -1.0}, r"div_coef \(=-1.0\) must not be negative"),
        ({"reset_ratio": 1.5}, r"reset_ratio \(=1.5\) in \[0, 1\]"),
        ({"kl_threshold": 0.0}, "kl_threshold 0.0 must be positive"),
        ({"pattern": "4:2"}, "4:2 keeps nothing or everything"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        K24Config(**settings)


# --- dense schemes ---------------------------------------------------------------------------------------------------------------


def test_who_owns_what_in_the_dense_schemes() -> None:
    for name, own, agent_id in (("fups", False, False), ("fups_id", False, True), ("nops", True, False)):
        net, _ = some_net(name)
        assert net.agent_id == agent_id
        made = net.materialise()
        assert {w.weight.shape[0] for w in made} == {w.bias.shape[0] for w in made} == {AGENTS if own else 1}
        if own:
            assert not torch.equal(made[0].weight[0], made[0].weight[1])
            assert not torch.equal(made[0].bias[0], made[0].bias[1])
    layer = DenseLinear(4, 2, 3, own_bias=True, bias_scale=0.1)
    assert layer.materialise().weight.shape[0] == 1
    assert layer.bias.shape == (3, 2)
    assert not torch.equal(layer.bias[0], layer.bias[1])
