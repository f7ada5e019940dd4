"""The Kaleidoscope baseline: thresholds, diversity and resets, against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k24.errors import UsageError
from k24.export import net_of
from k24.inspection import inspect_net
from k24.nets import AgentNet
from k24.sharing import DenseLinear, KaleidoscopeConfig, make_sharing
from k24.sharing.kaleidoscope import Kaleidoscope, KaleidoscopeLinear


def layer_with(weight: list[list[float]], thresholds: list) -> KaleidoscopeLinear:
    """A layer with given weights and, per agent, given thresholds after the sigmoid."""
    w, t = torch.tensor(weight), torch.tensor(thresholds)
    layer = KaleidoscopeLinear(w.shape[1], w.shape[0], t.shape[0])
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.threshold.copy_(torch.logit(t))
    return layer


def test_thresholded_weight_by_hand() -> None:
    layer = layer_with([[0.5, -0.3, 0.1, -0.2]], [[[0.2, 0.1, 0.3, 0.05]], [[0.6, 0.2, 0.05, 0.3]]])
    made = layer.materialise()
    assert made.weight[0, 0].tolist() == pytest.approx([0.3, -0.2, 0.0, -0.15])
    assert made.weight[1, 0].tolist() == pytest.approx([0.0, -0.1, 0.05, 0.0])
    assert layer.mask()[:, 0].tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]


def test_thresholds_start_where_nearly_nothing_is_masked() -> None:
    threshold = KaleidoscopeLinear(64, 64, 3).threshold
    assert -10 <= threshold.min() < -9.9
    assert -5.1 < threshold.max() <= -5


def test_thresholded_weight_learns_through_the_values() -> None:
    layer = layer_with([[0.5, -0.3, 0.1, -0.2]], [[[0.2, 0.1, 0.3, 0.05]], [[0.6, 0.2, 0.05, 0.3]]])
    layer.materialise().weight.sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 2.0, 1.0, 1.0]], "one for every agent that keeps it"
    slope = torch.sigmoid(layer.threshold) * (1 - torch.sigmoid(layer.threshold))
    assert torch.allclose(layer.threshold.grad, -layer.weight.sign() * layer.mask() * slope)


def some_scheme(layers: list[KaleidoscopeLinear | DenseLinear], n_slots: int, **settings) -> Kaleidoscope:
    scheme = Kaleidoscope(n_slots, KaleidoscopeConfig(**settings))
    scheme.layers = list[nn.Module](layers)
    return scheme


def test_diversity_is_the_stated_formula() -> None:
    layers = []
    for width, outputs in ((6, 4), (4, 4), (4, 3)):
        w, t = torch.randn(outputs, width) * 0.5, torch.rand(3, outputs, width) * 0.5
        layers.append(layer_with(w.tolist(), t.tolist()))
    scheme = some_scheme([layers[0], DenseLinear(4, 4, 3), *layers[1:]], 3)
    params = 24 + 16 + 12
    expected = 0.0
    for c, layer in zip((1, 2, 4), layers, strict=True):
        for i in range(3):
            for j in range(3):
                expected += c * float((layer.weight.abs() * (layer.mask()[i] - layer.mask()[j])).abs().sum().detach())
    made = [layer.materialise() for layer in scheme.layers]  # type: ignore[operator]
    loss = scheme.diversity(made)
    assert loss.item() == pytest.approx(-expected / (3 * 2 * params), rel=1e-5)
    loss.backward()
    assert all(layer.weight.grad is None for layer in layers), "|W| is detached"
    assert all(layer.threshold.grad.abs().sum() > 0 for layer in layers)


def test_diversity_has_the_stated_surrogate_gradient() -> None:
    layer = layer_with([[0.5, -0.3, 0.1, -0.2]], [[[0.2, 0.1, 0.3, 0.05]], [[0.6, 0.2, 0.05, 0.3]]])
    scheme = some_scheme([layer], 2)
    scheme.diversity([layer.materialise()]).backward()
    mask, threshold = layer.mask(), torch.sigmoid(layer.threshold.detach())
    # d(loss)/d(M_i) = -|W|·sign(M_i - M_j)/params; the step function passes its tanh on to |W| - sigmoid(s).
    upstream = -layer.weight.detach().abs() * torch.sign(mask - mask.flip(0)) / 4
    assert torch.allclose(layer.threshold.grad, -torch.tanh(upstream) * threshold * (1 - threshold), atol=1e-7)
    assert (layer.threshold.grad[0, 0, 0] > 0).all(), "descent lowers the threshold of the agent that keeps the weight: masks stay apart"


@pytest.mark.parametrize("recurrent", [True, False])
def test_resets_only_what_all_agents_mask_and_with_a_gru_not_the_first_layer(recurrent: bool) -> None:
    high, low = [0.9] * 8, [0.001] * 4 + [0.9] * 4
    layers = [layer_with([[0.5] * 8] * 200, [[low] * 200, [high] * 200]) for _ in range(2)]
    scheme = some_scheme([*layers, DenseLinear(8, 8, 2)] if recurrent else layers, 2, reset_interval=100, reset_ratio=0.25)
    assert not scheme.step(0.0, 99).resets
    before = layers[1].threshold.detach().clone()
    events = scheme.step(0.0, 100)
    assert not scheme.step(0.0, 199).resets
    reset = layers[1:] if recurrent else layers
    assert [id(r.parameter) for r in events.resets] == [id(p) for layer in reset for p in (layer.weight, layer.threshold)]
    assert recurrent == bool(layers[0].weight.eq(0.5).all())
    entries, thresholds = (r.entries for r in events.resets[-2:])
    assert torch.equal(thresholds, layers[1].threshold != before) and torch.equal(thresholds, entries.expand(2, -1, -1))
    drawn = layers[1].threshold[thresholds]
    assert drawn.min() >= -10 and drawn.max() <= -5, "as at the start, so that every agent has the weight again"
    assert torch.equal(entries, layers[1].weight != 0.5)
    assert not entries[:, :4].any(), "agent 0 still uses these"
    assert entries[:, 4:].float().mean() == pytest.approx(0.25, abs=0.05)
    assert layers[1].weight[entries].abs().max() <= 8**-0.5
    assert scheme.step(0.0, 200).resets


@pytest.mark.parametrize("name", ["threshold_lr_scale", "div_coef"])
def test_settings_that_would_turn_round_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"kaleidoscope\.{name} \(=-1.0\) must not be negative: 0 switches it off"):
        KaleidoscopeConfig(**{name: -1.0})


def test_what_is_inspected_is_what_is_logged() -> None:
    """The dense GRU, which agents share by design, counts in neither."""
    scheme = make_sharing("kaleidoscope", 3)
    net = AgentNet(5, 4, 8, 3, scheme, agent_id=False)
    with torch.no_grad():
        for layer in scheme.layers:
            if isinstance(layer, KaleidoscopeLinear):
                layer.threshold.uniform_(-4, 0)
    found, logged = inspect_net(net_of(net)), scheme.metrics()
    assert 0.1 < logged["overall_sparsity"] < 0.9 and logged["mask_hamming"] > 0.1
    assert {name: found[name] for name in ("overall_sparsity", "mask_hamming")} == pytest.approx(
        {name: logged[name] for name in ("overall_sparsity", "mask_hamming")}, rel=1e-5
    )


def test_no_reset_in_the_last_interval() -> None:
    scheme = some_scheme([KaleidoscopeLinear(8, 8, 2) for _ in range(2)], 2, reset_interval=100)
    found = [steps for steps in range(10, 601, 10) if scheme.step(steps / 600, steps).resets]
    assert found == [100, 200, 300, 400], "at 500 the end is no more than an interval away"


def test_reports_what_it_masks() -> None:
    scheme = some_scheme([layer_with([[0.5, -0.3, 0.1, -0.2]], [[[0.2, 0.1, 0.3, 0.05]], [[0.6, 0.2, 0.05, 0.3]]])], 2)
    scheme.aux_loss([scheme.layers[0].materialise()], torch.tensor(2.0))  # type: ignore[operator]
    metrics = scheme.metrics()
    assert metrics["sparsity_layer_0"] == metrics["overall_sparsity"] == pytest.approx(3 / 8)
    assert metrics["mask_hamming"] == pytest.approx(3 / 4)
    # -(0.5 + 0.1 + 0.2)·2/(2·4), and the coefficient makes it half of the task loss.
    assert metrics["div_loss"] == pytest.approx(-0.2)
    assert metrics["div_coef"] == pytest.approx(0.5 * 2.0 / 0.2)
