"""The masked linear layer: products, the life of a mask, running magnitudes, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k24.errors import UsageError
from k24.sparse import MaskConfig, MaskedLinear, apply_slots

DRAWN = ["sample", "gumbel"]
FORWARDS = ["expected", "sample", "gumbel", "gumbel_soft"]


def some_layer(in_features: int = 8, out_features: int = 5, n_slots: int = 3, progress: float = 0.3, **settings) -> MaskedLinear:
    """A layer whose slots differ and whose scores follow its inputs, ready to train."""
    layer = MaskedLinear(in_features, out_features, n_slots, config=MaskConfig(**{"hetero_init_scale": 2.0, "ema_every": 1} | settings))
    layer.resample(progress)
    return layer


def loop(layer: MaskedLinear, x: Tensor, mask: Tensor) -> Tensor:
    """The definition: one slot after the other."""
    return torch.stack([x[a] @ (layer.weight * mask[a]).t() + layer.bias for a in range(layer.n_slots)])


# --- products --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("text", "in_features", "n_slots"), [("2:4", 8, 3), ("2:4", 7, 1), ("1:4", 9, 2), ("4:8", 20, 2)])
def test_forward_is_a_loop_over_slots(forward: str, training: bool, text: str, in_features: int, n_slots: int) -> None:
    layer = some_layer(in_features, n_slots=n_slots, pattern=text, forward=forward).train(training)
    mask, x = layer.mask().detach(), torch.randn(n_slots, 4, in_features)
    assert mask.shape == (n_slots, 5, in_features)
    assert torch.allclose(layer(x), loop(layer, x, mask), atol=1e-6)
    if forward in DRAWN or not training:
        for group in mask.split(layer.patterns.m, -1):
            assert (group.sum(-1) == min(layer.patterns.n, group.shape[-1])).all()


@given(st.lists(st.integers(-1, 2), min_size=0, max_size=12), st.booleans())
def test_rows_of_mixed_slots_equal_the_blocked_form(slots: list[int], training: bool) -> None:
    torch.manual_seed(len(slots))
    layer = some_layer().train(training)
    with torch.no_grad():
        x = torch.randn(len(slots), 8)
        blocked = layer(x.expand(3, -1, -1))
        y = layer(x, torch.tensor(slots, dtype=torch.int64))
    assert y.shape == (len(slots), 5)
    for row, slot in enumerate(slots):
        expected = blocked[slot, row] if slot >= 0 else torch.zeros(5)
        assert torch.allclose(y[row], expected, atol=1e-6)


def test_rows_of_mixed_slots_have_the_gradient_of_the_blocked_form() -> None:
    layer, x = some_layer(ema_momentum=0.0), torch.randn(6, 8, requires_grad=True)
    slots = torch.tensor([2, 0, -1, 1, 0, 2])
    upstream = torch.randn(6, 5)
    parameters = [x, layer.weight, layer.bias, layer.alpha]
    rows = torch.autograd.grad((layer(x, slots) * upstream).sum(), parameters)
    layer.ema.fill_(1.0)
    chosen = layer.weight * layer.mask()
    picked = torch.stack([x[k] @ chosen[s].t() + layer.bias if s >= 0 else torch.zeros(5) for k, s in enumerate(slots.tolist())])
    for ours, explicit in zip(rows, torch.autograd.grad((picked * upstream).sum(), parameters), strict=True):
        assert torch.allclose(ours, explicit, atol=1e-6)
    assert (rows[0][2] == 0).all()


def test_the_weight_learns_through_the_masked_product_alone() -> None:
    for forward in FORWARDS:
        layer, x = some_layer(forward=forward), torch.randn(3, 4, 8)
        mask = layer.mask().detach()
        upstream = torch.randn(3, 4, 5)
        (layer(x) * upstream).sum().backward()
        explicit = (torch.einsum("ano,ani->aoi", upstream, x) * mask).sum(0)
        assert torch.allclose(layer.weight.grad, explicit, atol=1e-5), forward
        assert torch.allclose(layer.bias.grad, upstream.sum((0, 1)), atol=1e-5)
        assert (layer.alpha.grad.abs().amax((1, 2)) > 0).all(), "every slot's alpha learns"


def test_a_shared_weight_equals_one_copy_per_slot() -> None:
    x, weight, bias = torch.randn(3, 4, 8), torch.randn(1, 5, 8), torch.randn(3, 5)
    for b in (bias, bias[:1]):
        assert torch.allclose(apply_slots(x, weight, b), apply_slots(x, weight.expand(3, -1, -1), b.expand(3, -1)), atol=1e-6)


def test_where_a_layer_starts() -> None:
    layers = []
    for gain in (1.0, 3.0):
        torch.manual_seed(0)
        layers.append(MaskedLinear(64, 64, 2, config=MaskConfig(init_gain=gain)))
    assert torch.equal(layers[1].weight, 3 * layers[0].weight)
    assert torch.equal(layers[1].bias, layers[0].bias)
    assert layers[0].weight.abs().max() <= 64**-0.5
    assert layers[0].alpha.detach().std() == pytest.approx(0.3, rel=0.05)
    assert layers[0].ema.eq(1).all()


# --- the life of a mask ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", DRAWN)
def test_one_mask_per_resample_though_the_running_magnitude_moves(forward: str) -> None:
    layer = some_layer(64, 16, forward=forward, ema_momentum=0.0)
    x = torch.randn(3, 4, 64) * torch.logspace(-3, 3, 64)[torch.randperm(64)]
    mask, best = layer.mask().detach(), layer.best_codes()
    first, second = layer(x), layer(x)
    assert not torch.equal(layer.best_codes(), best), "the magnitude did move"
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(first, second)
    layer.resample(0.3)
    assert not torch.equal(layer.mask(), mask)


@pytest.mark.parametrize("forward", FORWARDS)
def test_evaluation_takes_the_most_likely_pattern(forward: str) -> None:
    layer = some_layer(forward=forward).eval()
    best = layer.patterns.mask(layer.logits().argmax(0), 8)
    assert torch.equal(layer.mask(), best)
    layer.resample(0.0)
    assert torch.equal(layer.mask(), best), "whatever was drawn"


def test_what_each_phase_asks_for() -> None:
    for forward in FORWARDS:
        layer = some_layer(64, 32, forward=forward)
        best = layer.patterns.mask(layer.best_codes(), 64)
        soft = (layer.probabilities().movedim(0, -1) @ layer.patterns.table).flatten(-2)
        masks = {phase: layer._mask(phase)[0] for phase in ("train", "act", "sampled", "deploy")}
        assert torch.equal(masks["deploy"], best)
        assert torch.allclose(masks["act"], soft if forward == "expected" else best, atol=1e-6)
        assert torch.allclose(masks["train"], soft, atol=1e-6) == (forward == "expected")
        assert set(masks["sampled"].unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(masks["sampled"], layer._mask("sampled")[0]), "a fresh draw each time"
        assert not torch.equal(masks["sampled"], best)


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_freeze_fixes_one_function_for_training_and_evaluation(forward: str) -> None:
    layer, x = some_layer(forward=forward), torch.randn(3, 4, 8)
    before = layer.eval()(x)
    layer.freeze()
    for training in (True, False):
        layer.train(training)
        layer.resample(0.9)
        assert torch.equal(layer(x), before)
    for phase in ("train", "act", "sampled", "deploy"):
        assert torch.equal(layer._mask(phase)[0], layer.mask())
    layer.train()
    magnitude = layer.ema.clone()
    layer(x).square().sum().backward()
    assert layer.alpha.grad is None
    assert layer.weight.grad.abs().sum() > 0
    assert torch.equal(layer.ema, magnitude)
    with torch.no_grad():
        layer.alpha.normal_()
        layer.weight.neg_()
    pi = layer.probabilities()
    assert torch.equal(pi.argmax(0).to(torch.uint8), layer.codes), "for good, whatever becomes of alpha and the weight"
    assert pi.sum(0).eq(1).all()
    assert not pi.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_state_round_trip(frozen: bool) -> None:
    layer = some_layer(forward="sample", ema_bias_correction=True)
    layer(torch.randn(3, 4, 8))
    layer.count_usage()
    if frozen:
        layer.freeze()
    other = some_layer(forward="sample", ema_bias_correction=True)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(3, 4, 8)
    for training in (False, True):
        for each in (layer, other):
            each.train(training).resample(0.5, torch.Generator().manual_seed(1))
        for _ in range(2):
            assert torch.equal(layer(x), other(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# --- running magnitude -----------------------------------------------------------------------------------------------------------

# Mean |x| is (2, 3), root mean square (√5, 3).
ROWS = torch.tensor([[1.0, -3.0], [3.0, 3.0]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.9 + 0.2, 0.9 + 0.3)),
        ({"ema_momentum": 0.0}, (2.0, 3.0)),
        ({"ema_norm": "rms"}, (0.9 + 0.1 * 5**0.5, 0.9 + 0.3)),
        ({"ema_bias_correction": True}, (2.0, 3.0)),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_running_magnitude_by_hand(settings: dict, expected: tuple[float, float], mixed: bool) -> None:
    layer = MaskedLinear(2, 4, 2, "1:2", config=MaskConfig(**{"ema_every": 1, "ema_momentum": 0.9, **settings}))
    layer.resample(0.0)
    if mixed:
        layer(torch.cat([ROWS, 2 * ROWS, 9 * ROWS]), torch.tensor([0, 0, 1, 1, -1, -1]))
    else:
        layer(torch.stack([ROWS, 2 * ROWS]))
    assert layer.running_magnitude()[0].tolist() == pytest.approx(expected)
    start = 0.0 if settings else 0.9
    twice = [start + 2 * (e - start) for e in expected] if settings.get("ema_norm") != "rms" else [0.9 + 0.2 * 5**0.5, 1.5]
    assert layer.running_magnitude()[1].tolist() == pytest.approx(twice)


def test_bias_correction_is_the_weighted_mean_of_what_was_seen() -> None:
    layer = MaskedLinear(4, 4, 1, config=MaskConfig(ema_every=1, ema_momentum=0.9, ema_bias_correction=True))
    assert layer.running_magnitude().tolist() == [[1.0] * 4], "one before anything was seen"
    for value in (2.0, 5.0):
        layer.observe(torch.full((1, 3, 4), -value))
    assert layer.running_magnitude()[0].tolist() == pytest.approx([(0.9 * 2 + 5) / 1.9] * 4)


def test_only_every_kth_pass_is_seen() -> None:
    layer = MaskedLinear(4, 4, 1, config=MaskConfig(ema_momentum=0.5, ema_every=2))
    seen = []
    for value in (8.0, 2.0, 8.0, 4.0):
        layer.observe(torch.full((1, 3, 4), value))
        seen.append(float(layer.ema[0, 0]))
    assert seen == [1.0, 1.5, 1.5, 2.75]


@pytest.mark.parametrize("corrected", [False, True])
def test_no_pass_is_seen_where_the_running_magnitude_is_left_out(corrected: bool) -> None:
    layer = MaskedLinear(4, 4, 2, config=MaskConfig(ema_every=0, ema_bias_correction=corrected))
    layer.observe(torch.full((2, 3, 4), 8.0))
    assert layer.running_magnitude().eq(1).all() and int(layer.seen) == 0


def test_only_training_passes_with_gradient_are_seen() -> None:
    layer, x = some_layer(), torch.randn(3, 4, 8) * 9
    for rows, slots in ((x, None), (x[0], torch.tensor([0, 1, 2, 0]))):
        layer.eval()(rows, slots)
        with torch.no_grad():
            layer.train()(rows, slots)
        assert layer.ema.eq(1).all()
        layer(rows, slots)
        assert layer.ema.ne(1).all()
        layer.ema.fill_(1.0)


def test_rows_that_do_not_count_leave_no_trace() -> None:
    x = torch.randn(3, 5, 8)
    valid = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    poisoned = torch.where(valid[..., None], x, float("nan"))
    for norm in ("mean", "rms"):
        layer = some_layer(ema_momentum=0.9, ema_norm=norm)
        layer.observe(poisoned, valid)
        for slot, rows in ((0, [0, 1, 4]), (1, [0])):
            kept = x[slot, rows]
            now = kept.abs().mean(0) if norm == "mean" else kept.square().mean(0).sqrt()
            assert torch.allclose(layer.ema[slot], 0.9 + 0.1 * now)
        assert torch.allclose(layer.ema[2], torch.ones(8)), "a slot without rows keeps its value"
        layer.ema[2] = 5.0
        layer.observe(poisoned, valid)
        assert torch.allclose(layer.ema[2], torch.full((8,), 5.0))


def test_rows_that_count_may_be_named_once_for_all_slots() -> None:
    x, valid = torch.randn(3, 5, 8), torch.tensor([True, False, True, False, False])
    once, each = some_layer(), some_layer()
    once.observe(x, valid)
    each.observe(x, valid.expand(3, 5))
    assert torch.equal(once.ema, each.ema)
    shared = some_layer(n_slots=1, ema_momentum=0.0)
    shared.observe(x, valid)
    assert torch.allclose(shared.ema[0], x[:, valid].abs().mean((0, 1))), "one mask for all sees all their rows"


def test_an_absent_slot_of_mixed_rows_keeps_its_value() -> None:
    layer = some_layer()
    layer.ema[1] = 7.0
    layer(torch.randn(4, 8), torch.tensor([0, 2, 2, -1]))
    assert torch.allclose(layer.ema[1], torch.full((8,), 7.0))


@pytest.mark.parametrize("mixed", [False, True])
def test_an_absent_slot_keeps_its_value_under_bias_correction(mixed: bool) -> None:
    layer = some_layer(n_slots=2, ema_bias_correction=True)
    for present in ([0], [0], [0, 1], [0]):
        before = layer.running_magnitude()[1].clone()
        slots = torch.tensor(present)
        if mixed:
            layer(torch.full((len(present), 8), 3.0), slots)
        else:
            layer.observe(torch.full((2, 1, 8), 3.0), torch.isin(torch.arange(2), slots)[:, None])
        if 1 not in present:
            assert torch.allclose(layer.running_magnitude()[1], before)
    assert torch.allclose(layer.running_magnitude()[0], torch.full((8,), 3.0))


# --- errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 2), r"in_features \(=0\) must be at least 1"),
        ((8, 0, 2), r"out_features \(=0\) must be at least 1"),
        ((8, 4, 0), r"n_slots \(=0\) must be at least 1"),
        ((8, 4, 2, "4:2"), "4:2 keeps nothing or everything"),
    ],
)
def test_impossible_sizes(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MaskedLinear(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_momentum": 1.0}, "ema_momentum 1.0 must lie in"),
        ({"ema_every": -1}, "ema_every -1 must not be negative"),
        ({"kappa": 0.0}, "kappa 0.0 must be positive"),
        ({"hetero_init_scale": -1.0}, "hetero_init_scale -1.0 must not be negative"),
        ({"temperature_min": 0.0}, r"temperature_min \(=0.0\)"),
        ({"anneal_start": 0.9}, r"anneal_start \(=0.9\) < anneal_end \(=0.6\)"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MaskConfig(**settings)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "slots", "message"),
    [
        ((2, 4, 7), None, r"takes 8 features, got an input of shape \(2, 4, 7\)"),
        ((3, 4, 8), None, r"takes \[n_slots=2, rows, features\], got \(3, 4, 8\): pass slots="),
        ((4, 8), None, r"takes \[n_slots=2, rows, features\], got \(4, 8\)"),
        ((2, 4, 8), torch.zeros(4, dtype=torch.int64), r"takes \[rows, features\], got \(2, 4, 8\)"),
    ],
)
def test_wrong_inputs(training: bool, shape: tuple[int, ...], slots: Tensor | None, message: str) -> None:
    layer = some_layer(n_slots=2).train(training)
    with pytest.raises(UsageError, match=message):
        layer(torch.randn(shape), slots)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), r"slot 2 does not exist: this layer has the slots 0\.\.1"),
        (torch.tensor([0, 1]), r"slots must be int64 of shape \(4,\), got torch.int64 \(2,\)"),
        (torch.zeros(4), r"slots must be int64 of shape \(4,\), got torch.float32"),
    ],
)
def test_wrong_slots(training: bool, slots: Tensor, message: str) -> None:
    layer = some_layer(n_slots=2).train(training)
    with pytest.raises(UsageError, match=message):
        layer(torch.randn(4, 8), slots)


def test_a_drawn_mask_must_be_asked_for() -> None:
    for forward in ("sample", "gumbel", "gumbel_soft"):
        layer = MaskedLinear(8, 4, 2, config=MaskConfig(forward=forward))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"no mask for this step: call resample\(progress\)"):
            layer(torch.randn(2, 3, 8))
        layer.eval()(torch.randn(2, 3, 8))


def test_a_width_below_n_keeps_all_there_is() -> None:
    layer = MaskedLinear(3, 5, 2, pattern="4:8")
    layer.resample(0.5)
    assert torch.equal(layer.mask(), torch.ones(2, 5, 3))
    assert torch.equal(layer.eval().mask(), torch.ones(2, 5, 3))
    assert layer.free_groups == 0
