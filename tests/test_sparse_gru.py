"""The recurrent part: whole sequences against their definition, against torch's own GRU, and with masks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from k24.errors import UsageError
from k24.sparse import MaskConfig, MaskedGRU, MaskedLinear, gru_sequence, gru_step
from k24.sparse.gru import gru_packed, states_before


def some_inputs(slots: int, steps: int, rows: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(slots, steps, rows, 3 * hidden), (slots, rows, hidden), (slots, 3 * hidden, hidden), (slots, 3 * hidden)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def unrolled(gates_x: Tensor, h: Tensor, weight_h: Tensor, bias_h: Tensor) -> Tensor:
    states = []
    for t in range(gates_x.shape[1]):
        h = gru_step(gates_x[:, t], h, weight_h, bias_h)
        states.append(h)
    return torch.stack(states, 1)


def some_gru(in_features: int = 6, hidden: int = 4, n_slots: int = 3, **settings) -> MaskedGRU:
    gru = MaskedGRU(in_features, hidden, n_slots, config=MaskConfig(hetero_init_scale=2.0, ema_every=1, **settings))
    gru.resample(0.3)
    return gru


def masks(gru: MaskedGRU) -> tuple[Tensor, Tensor]:
    return gru.input.mask().detach(), gru.recurrent.mask().detach()


# --- sequences -------------------------------------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    # One unit, all weights 0 but the biases: r = z = sigmoid(0) = 1/2, n = tanh(1 + 1/2·2) = tanh 2, h' = n/2 + h/2.
    gates = torch.tensor([[[0.0, 0.0, 1.0]]])
    bias = torch.tensor([[0.0, 0.0, 2.0]])
    h = gru_step(gates, torch.full((1, 1, 1), 0.5), torch.zeros(1, 3, 1), bias)
    assert float(h) == pytest.approx(0.5 * float(torch.tanh(torch.tensor(2.0))) + 0.25)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_sequence_equals_its_steps_in_values_and_gradients(slots: int, steps: int, rows: int, hidden: int) -> None:
    torch.manual_seed(steps)
    inputs = some_inputs(slots, steps, rows, hidden)
    upstream = torch.randn(slots, steps, rows, hidden, dtype=torch.float64)
    results = []
    for function in (gru_sequence, unrolled):
        states = function(*inputs)
        assert states.shape == upstream.shape
        results.append([states, *torch.autograd.grad((states * upstream).sum(), inputs)])
    for ours, definition in zip(*results, strict=True):
        assert torch.allclose(ours, definition, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
def test_gradcheck_of_a_sequence(steps: int) -> None:
    assert gradcheck(gru_sequence, some_inputs(2, steps, 2, 3))


def test_gradients_that_nobody_wants_are_not_an_error() -> None:
    gates, h, weight, bias = some_inputs(2, 3, 2, 3)
    states = gru_sequence(gates.detach(), h.detach(), weight, bias.detach())
    states[:, -1].sum().backward()
    explicit = torch.autograd.grad(unrolled(gates, h, weight, bias)[:, -1].sum(), weight)[0]
    assert torch.allclose(weight.grad, explicit)
    assert gates.grad is None


def test_large_inputs_saturate_and_stay_finite() -> None:
    gates, h, weight, bias = (x.detach().float() * 1e3 for x in some_inputs(2, 3, 2, 3))
    h = h.clamp(-1, 1)
    gates.requires_grad_()
    states = gru_sequence(gates, h, weight, bias)
    states.sum().backward()
    assert states.abs().max() <= 1
    assert gates.grad.isfinite().all()


# --- masked ----------------------------------------------------------------------------------------------------------------------


def torch_gru(gru: MaskedGRU, slot: int) -> nn.GRU:
    """One slot as torch's own, its weights masked."""
    with torch.no_grad():
        own = nn.GRU(gru.input.in_features, gru.hidden)
        own.weight_ih_l0.copy_(gru.input.weight * gru.input.mask()[slot])
        own.weight_hh_l0.copy_(gru.recurrent.weight * gru.recurrent.mask()[slot])
        own.bias_ih_l0.copy_(gru.input.bias)
        own.bias_hh_l0.copy_(gru.recurrent.bias)
    return own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("given_state", [True, False])
def test_each_slot_is_torchs_gru_with_masked_weights(training: bool, steps: int, given_state: bool) -> None:
    gru = some_gru(in_features=7, hidden=6).train(training)
    own = [torch_gru(gru, slot) for slot in range(3)]
    x = torch.randn(3, steps, 4, 7)
    h = torch.randn(3, 4, 6) if given_state else None
    states, last = gru(x, h)
    assert torch.equal(states[:, -1], last)
    for slot in range(3):
        expected, _ = own[slot](x[slot], None if h is None else h[slot][None])
        assert torch.allclose(states[slot], expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_rows_of_mixed_slots_equal_the_blocked_form(steps: int, training: bool) -> None:
    gru = some_gru(ema_momentum=0.5).train(training)
    slots = torch.tensor([2, 0, -1, 1, 0, -1])
    x, h = torch.randn(steps, 6, 6), torch.randn(6, 4)
    with torch.no_grad():
        blocked, _ = gru(x.expand(3, -1, -1, -1), h.expand(3, -1, -1))
    states, last = gru(x, h, slots)
    assert torch.equal(states[-1], last)
    for row, slot in enumerate(slots.tolist()):
        assert torch.allclose(states[:, row], blocked[slot, :, row] if slot >= 0 else torch.zeros(steps, 4), atol=1e-6)


def test_rows_of_mixed_slots_are_seen_like_blocks() -> None:
    blocks, rows = some_gru(), some_gru()
    rows.load_state_dict(copy.deepcopy(blocks.state_dict()))
    x = torch.randn(3, 4, 2, 6)
    blocks(x)
    rows(x.permute(1, 0, 2, 3).reshape(4, 6, 6), slots=torch.tensor([0, 0, 1, 1, 2, 2]))
    for name in ("input", "recurrent"):
        seen = [getattr(gru, name).ema for gru in (blocks, rows)]
        assert torch.allclose(*seen, atol=1e-6)
        assert seen[0].ne(1).any(1).all()


def test_the_recurrent_map_sees_the_states_it_multiplies() -> None:
    gru = some_gru(ema_momentum=0.0)
    x, h = torch.randn(3, 4, 2, 6), torch.randn(3, 2, 4)
    states, _ = gru(x, h)
    before = torch.cat([h[:, None], states[:, :-1]], 1)
    assert torch.allclose(gru.recurrent.ema, before.abs().mean((1, 2)), atol=1e-6)
    assert torch.allclose(gru.input.ema, x.abs().mean((1, 2)), atol=1e-6)
    seen = gru.recurrent.ema.clone()
    gru.eval()(x)
    with torch.no_grad():
        gru.train()(x)
    assert torch.equal(gru.recurrent.ema, seen)


def test_gradients_reach_every_slot_through_the_mask_alone() -> None:
    gru = some_gru(forward="sample")
    inputs, recurrent = masks(gru)
    states, _ = gru(torch.randn(3, 4, 2, 6))
    states.square().sum().backward()
    for layer, mask in ((gru.input, inputs), (gru.recurrent, recurrent)):
        assert (layer.weight.grad[mask.sum(0) == 0] == 0).all()
        assert layer.weight.grad.abs().sum() > 0
        assert (layer.alpha.grad.abs().amax((1, 2)) > 0).all()


def test_one_mask_per_resample_and_a_freeze_for_good() -> None:
    gru = some_gru(64, 32, forward="sample", ema_momentum=0.0)
    x = torch.randn(3, 3, 2, 64) * torch.logspace(-3, 3, 64)
    first, second = gru(x)[0], gru(x)[0]
    assert torch.equal(first, second)
    gru.resample(0.3)
    assert not torch.equal(gru(x)[0], first)
    gru.freeze()
    frozen = gru.eval()(x)[0]
    gru.resample(0.3)
    assert torch.equal(gru.train()(x)[0], frozen)
    for layer in (gru.input, gru.recurrent):
        assert layer.mask().unflatten(-1, (-1, 4)).sum(-1).eq(2).all()


def test_state_round_trip() -> None:
    gru, other = some_gru(), some_gru()
    x = torch.randn(3, 4, 2, 6)
    gru(x)
    other.load_state_dict(copy.deepcopy(gru.state_dict()))
    assert torch.equal(gru.eval()(x)[0], other.eval()(x)[0])
    gru.freeze()
    other.load_state_dict(copy.deepcopy(gru.state_dict()))
    assert torch.equal(gru.train()(x)[0], other.train()(x)[0])


def test_a_wrong_input_is_named() -> None:
    gru = some_gru()
    with pytest.raises(UsageError, match="takes 6 features, got an input of shape"):
        gru(torch.randn(3, 4, 2, 5))
    with pytest.raises(UsageError, match="slot 3 does not exist"):
        gru.eval()(torch.randn(4, 2, 6), slots=torch.tensor([0, 3]))
    assert isinstance(gru.input, MaskedLinear)
    assert gru.recurrent.weight.shape == (12, 4)


# --- sequences of different lengths ------------------------------------------------------------------------------------------------


def packed_inputs(lengths: list[int], width: int, dtype: torch.dtype) -> tuple[list[int], list[Tensor]]:
    """Counts of rows per step, and gates, first state, weight and bias."""
    g = torch.Generator().manual_seed(len(lengths))
    counts = [sum(length > t for length in lengths) for t in range(max(lengths))]
    shapes = [(sum(counts), 3 * width), (len(lengths), width), (3 * width, width), (3 * width,)]
    return counts, [torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [[1], [4], [3, 3, 3], [5, 4, 2, 1, 1], [7, 1]])
def test_packed_sequences_are_each_sequence_by_itself(lengths: list[int]) -> None:
    counts, (gates, h0, weight, bias) = packed_inputs(lengths, 3, torch.float64)
    states = gru_packed(gates, h0, weight, bias, counts)
    rows = [[sum(counts[:t]) + i for t in range(length)] for i, length in enumerate(lengths)]
    alone = [gru_sequence(gates[row][None, :, None], h0[i][None, None], weight[None], bias[None])[0, :, 0] for i, row in enumerate(rows)]
    for row, expected in zip(rows, alone, strict=True):
        torch.testing.assert_close(states[row], expected)
    before = states_before(states, h0, counts)
    for i, row in enumerate(rows):
        torch.testing.assert_close(before[row], torch.cat([h0[i : i + 1], states[row[:-1]]]))


@pytest.mark.parametrize("lengths", [[2], [3, 2, 2, 1]])
def test_gradients_of_packed_sequences(lengths: list[int]) -> None:
    counts, inputs = packed_inputs(lengths, 2, torch.float64)
    assert gradcheck(lambda *x: gru_packed(*x, counts), inputs)
