"""Every backend of the CPU against the reference in float64. GPU backends have tests of their own, the C++ kernels some more."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k24 import kernels
from k24.errors import UsageError
from k24.kernels import BACKENDS, GRU, Linear, Net, Prepared, prepare, reference
from k24.sparse.patterns import PatternSet

NAMES = ("reference", "dense", "dense_linear", "cpu", "cpu_shared")
FAST = NAMES[1:]  # those that compute in float32 whatever comes in
# Single inputs up to five groups, then around the borders of registers, of words of mask bits, and of what is cut into several passes.
WIDTHS = (*range(1, 21), 31, 32, 33, 63, 64, 65, 100, 127, 129, 255, 256, 257, 300)
ROWS = (0, 1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 28, 31, 32, 33, 63, 64, 65, 100, 129)


def linear(
    inputs: int,
    outputs: int,
    slots: int = 3,
    masked: bool = True,
    code_slots: int | None = None,
    bias_slots: int = 1,
    weight_slots: int = 1,
    dtype: torch.dtype = torch.float32,
    relu: bool = False,
) -> Linear:
    weight = (torch.randn(weight_slots, outputs, inputs) / inputs**0.5).to(dtype)
    codes = torch.randint(0, 6, (slots if code_slots is None else code_slots, outputs, -(-inputs // 4)), dtype=torch.uint8)
    return Linear(weight, torch.randn(bias_slots, outputs), codes if masked else None, relu=relu)


def gru(inputs: int, hidden: int, slots: int = 3, **options) -> GRU:
    return GRU(linear(inputs, 3 * hidden, slots, **options), linear(hidden, 3 * hidden, slots, **options))


def recurrent(inputs: int, hidden: int, outputs: int, slots: int = 3, **options) -> Net:
    """The shape of a trained agent: a layer, a GRU, a layer."""
    first, last = linear(inputs, hidden, slots, relu=True, **options), linear(hidden, outputs, slots, **options)
    return Net((first, gru(hidden, hidden, slots, **options), last), slots)


def common_gru(inputs: int, hidden: int, outputs: int, slots: int = 3, **options) -> Net:
    """The same with one mask for all in the GRU."""
    first, last = linear(inputs, hidden, slots, relu=True, **options), linear(hidden, outputs, slots, **options)
    return Net((first, gru(hidden, hidden, slots, code_slots=1, **options), last), slots)


def operands(net: Net, rows: int, mixed: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks of so many rows per slot; or so many mixed rows, about one in eight of them of no slot."""
    shape = (rows,) if mixed else (net.n_slots, rows)
    slots = torch.randint(0, net.n_slots, shape).masked_fill(torch.rand(shape) < 1 / 8, -1) if mixed else None
    return torch.randn(*shape, net.in_features), torch.randn(*shape, net.hidden).tanh(), slots


def assert_equals_reference(
    form: Prepared, net: Net, x: Tensor, h: Tensor, slots: Tensor | None = None, eps: float = 1e-5, what: object = ""
) -> None:
    """Float32 keeps 1e-5 of the largest value; results have the shape and type of what came in."""
    with torch.no_grad():
        y, after = form(x, h, slots)
        wanted, state = reference.run(net, x.double(), h.double(), slots)
    for name, got, right in (("outputs", y, wanted), ("hidden state", after, state)):
        assert got.shape == right.shape and got.dtype == x.dtype, (what, name)
        if right.numel():
            error, limit = (got.double() - right).abs().max().item(), eps * max(1.0, right.abs().max().item())
            assert error <= limit, f"{what} {name}: off by {error:.2e}, more than {limit:.2e}"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return needed(request.param)


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> str:
    return needed(request.param)


def needed(name: str) -> str:
    if reason := BACKENDS[name].unavailable(Net((linear(4, 4),), 3)):
        pytest.skip(reason)  # tests/test_kernels_cpu.py says when this must not be
    return name


# What is computed ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [4, 8, 12, 36, 1, 2, 3, 5, 6, 7])
def test_every_pattern_keeps_the_weights_it_stands_for(name: str, inputs: int) -> None:
    """Every pair of patterns in the first and the last group; in whole numbers, worked out apart from the reference."""
    kept = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    pairs = list(product(range(6), range(6)))
    groups = -(-inputs // 4)
    codes = torch.randint(0, 6, (2, 36, groups), dtype=torch.uint8)
    codes[0, :, 0], codes[0, :, -1] = (torch.tensor(column, dtype=torch.uint8) for column in zip(*pairs, strict=True))
    weight = torch.randint(1, 50, (36, inputs)).float()
    x = torch.randint(1, 50, (2, 3, inputs)).float()
    y, _ = prepare(Net((Linear(weight[None], torch.arange(36.0)[None], codes),), 2), name)(x)
    for slot, row, o in product(range(2), range(3), range(36)):
        columns = [4 * g + place for g, code in enumerate(codes[slot, o].tolist()) for place in kept[code] if 4 * g + place < inputs]
        assert y[slot, row, o] == o + sum(weight[o, i] * x[slot, row, i] for i in columns)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(name: str, width: int) -> None:
    """As inputs, as outputs, and between two layers."""
    net = Net((linear(width, width, relu=True), linear(width, 7), linear(7, width)), 3)
    form = prepare(net, name)
    for rows in (1, 4, 17):
        assert_equals_reference(form, net, *operands(net, rows))


@pytest.mark.parametrize("hidden", WIDTHS)
def test_widths_of_a_gru(name: str, hidden: int) -> None:
    net = Net((gru(5, hidden, 2), linear(hidden, 3, 2)), 2)
    form = prepare(net, name)
    for rows in (1, 6, 16):
        assert_equals_reference(form, net, *operands(net, rows))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_rows(name: str, masked: bool, mixed: bool) -> None:
    net = recurrent(10, 20, 5, masked=masked)
    form = prepare(net, name)
    for rows in ROWS:
        assert_equals_reference(form, net, *operands(net, rows, mixed), what=f"{rows} rows")


def test_many_rows(name: str) -> None:
    net = recurrent(18, 33, 5, slots=2)
    form = prepare(net, name)
    assert_equals_reference(form, net, *operands(net, 4096))
    assert_equals_reference(form, net, *operands(net, 4096, mixed=True))


def test_slots(name: str) -> None:
    for slots in (*range(1, 65), 65, 66, 130):
        net = recurrent(6, 4, 3, slots, bias_slots=slots)
        form = prepare(net, name)
        assert_equals_reference(form, net, *operands(net, 2), what=f"{slots} slots")
        assert_equals_reference(form, net, *operands(net, 3 * slots, mixed=True), what=f"{slots} slots, mixed")


NETS = {
    "a GRU that all share": lambda: common_gru(18, 64, 5, 4),
    "one layer": lambda: Net((linear(9, 6),), 3),
    "a layer with ReLU at the end": lambda: Net((linear(9, 6, relu=True),), 3),
    "only a GRU": lambda: Net((gru(9, 6),), 3),
    "only a GRU of whole registers": lambda: Net((gru(16, 32),), 3),
    "a GRU first": lambda: Net((gru(9, 6), linear(6, 5)), 3),
    "a GRU last": lambda: Net((linear(9, 6, relu=True), gru(6, 10)), 3),
    "a wide GRU last": lambda: Net((linear(9, 6, relu=True), gru(6, 128)), 3),
    "five layers": lambda: Net((*(linear(12, 12, relu=True) for _ in range(4)), linear(12, 2)), 3),
    "one code for all slots": lambda: recurrent(9, 6, 5, code_slots=1),
    "one code for all slots, a bias each": lambda: recurrent(9, 6, 5, code_slots=1, bias_slots=3),
    "a bias each": lambda: recurrent(9, 6, 5, bias_slots=3),
    "one slot": lambda: recurrent(9, 6, 5, slots=1),
    "all dense and shared": lambda: recurrent(9, 6, 5, masked=False),
    "all dense, a weight each": lambda: recurrent(9, 6, 5, masked=False, weight_slots=3, bias_slots=3),
    "all dense, a weight each and one bias": lambda: recurrent(9, 6, 5, masked=False, weight_slots=3),
    "dense between masked": lambda: Net((linear(9, 40, relu=True), linear(40, 40, masked=False, relu=True), linear(40, 5)), 3),
    "masked between dense": lambda: Net((linear(9, 40, masked=False, relu=True), gru(40, 40), linear(40, 5, masked=False)), 3),
    "a dense GRU": lambda: Net((linear(9, 40, relu=True), gru(40, 40, masked=False), linear(40, 5)), 3),
    "a masked input and a dense recurrence": lambda: Net((GRU(linear(9, 18), linear(6, 18, masked=False)), linear(6, 5)), 3),
}


@pytest.mark.parametrize("kind", NETS)
def test_kinds_of_nets(name: str, kind: str) -> None:
    net = NETS[kind]()
    form = prepare(net, name)
    for rows in (1, 5, 14, 40):
        assert_equals_reference(form, net, *operands(net, rows), what=f"{rows} rows")
        assert_equals_reference(form, net, *operands(net, rows, mixed=True), what=f"{rows} mixed rows")


@st.composite
def nets(draw: st.DrawFn) -> Net:
    slots = draw(st.integers(1, 6))
    widths = draw(st.lists(st.integers(1, 70), min_size=2, max_size=5))
    at = draw(st.integers(0, 2 * len(widths)))  # where the GRU is; past the end there is none
    each = st.sampled_from([1, slots])
    blocks: list[Linear | GRU] = []
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        masked = draw(st.booleans())
        weight_slots = 1 if masked else draw(each)
        options = {"masked": masked, "code_slots": draw(each), "bias_slots": draw(each), "weight_slots": weight_slots}
        if place == at:
            blocks.append(gru(inputs, outputs, slots, **options))
        else:
            blocks.append(linear(inputs, outputs, slots, relu=draw(st.booleans()), **options))
    return Net(tuple(blocks), slots)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(net=nets(), rows=st.integers(0, 40), mixed=st.booleans())
def test_random_nets(name: str, net: Net, rows: int, mixed: bool) -> None:
    assert_equals_reference(prepare(net, needed(name)), net, *operands(net, rows, mixed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_used_as_they_are(name: str, dtype: torch.dtype) -> None:
    """The reference takes the same rounded weights, so that no more than float32 is lost."""
    net = recurrent(10, 24, 5, dtype=dtype)
    form = prepare(net, name)
    for rows in (1, 6, 20):
        assert_equals_reference(form, net, *operands(net, rows))
    assert_equals_reference(form, net, *operands(net, 30, mixed=True))


def test_layers_of_several_types(name: str) -> None:
    net = Net((linear(8, 8, dtype=torch.bfloat16), linear(8, 8), linear(8, 4, dtype=torch.float16)), 3)
    assert_equals_reference(prepare(net, name), net, *operands(net, 5))


# What comes in and what goes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_inputs_of_other_types_give_results_of_their_type(fast: str, dtype: torch.dtype, mixed: bool) -> None:
    net = recurrent(10, 24, 5)
    x, h, slots = operands(net, 6, mixed)
    assert_equals_reference(prepare(net, fast), net, x.to(dtype), h.to(dtype), slots, eps=max(1e-5, torch.finfo(dtype).eps))


def test_inputs_that_are_not_contiguous(name: str) -> None:
    net = recurrent(10, 24, 5)
    form = prepare(net, name)
    x, h = torch.randn(6, 10, 3).permute(2, 0, 1), torch.randn(3, 6, 48).tanh()[..., ::2]
    assert_equals_reference(form, net, x, h)
    assert_equals_reference(form, net, x[:1].expand(3, -1, -1), h[:, :1].expand(-1, 6, -1))
    x, h, slots = torch.randn(10, 14).T, torch.randn(28, 24).tanh()[::2], (torch.arange(28) // 2 % 3)[::2]
    assert not (x.is_contiguous() or h.is_contiguous() or slots.is_contiguous())
    assert_equals_reference(form, net, x, h, slots)


MIXED = {
    "ascending": [0, 0, 1, 1, 2, 2],
    "unsorted": [2, 0, 1, 1, 2, 0, 2],
    "only some slots": [2, 0, 2],
    "all of one slot": [1] * 20,
    "the last slot alone": [2],
    "some of none": [-1, 2, 0, -7, 1, -1],
    "all of none": [-1, -2, -(2**40)],
    "no rows": [],
}


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_rows(name: str, kind: str) -> None:
    net = recurrent(10, 24, 5, bias_slots=3)
    slots = torch.tensor(MIXED[kind], dtype=torch.int64)
    x, h = torch.randn(len(slots), 10), torch.randn(len(slots), 24).tanh()
    x[slots < 0] = torch.nan  # nobody looks at these
    form = prepare(net, name)
    assert_equals_reference(form, net, x, h, slots)
    y, after = form(x, h, slots)
    assert not y[slots < 0].any() and not after[slots < 0].any()


@pytest.mark.parametrize("mixed", [False, True])
def test_numbers_that_are_none_stay_in_their_row(name: str, mixed: bool) -> None:
    net = recurrent(10, 24, 5)
    form = prepare(net, name)
    x, h, slots = operands(net, 30, mixed)
    y, after = form(x, h, slots)
    bad = torch.zeros(x.shape[:-1], dtype=torch.bool)
    bad.view(-1)[::7] = True
    x, h = x.clone(), h.clone()
    x[bad], h[bad] = torch.nan, torch.inf
    spoilt, spoilt_after = form(x, h, slots)
    assert torch.equal(spoilt[~bad], y[~bad]) and torch.equal(spoilt_after[~bad], after[~bad])
    alive = bad if slots is None else bad & (slots >= 0)
    assert spoilt[alive].isnan().all(), "NaN was swallowed"


@pytest.mark.parametrize("mixed", [False, True])
def test_calls_leave_alone_what_they_were_given_and_what_they_gave(name: str, mixed: bool) -> None:
    net = recurrent(10, 32, 16)
    form = prepare(net, name)
    x, h, slots = operands(net, 9, mixed)
    given = [t.clone() for t in (x, h)]
    first = form(x, h, slots)
    kept = [t.clone() for t in first]
    for rows in (9, 30, 1):
        form(*operands(net, rows, mixed))
    assert all(torch.equal(a, b) for a, b in zip((x, h), given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_hidden_state_starts_at_zero_and_runs_on(name: str) -> None:
    net = recurrent(10, 24, 5)
    form, h = prepare(net, name), torch.zeros(3, 4, 24)
    x = torch.randn(3, 4, 10)
    assert torch.equal(form(x)[0], form(x, h)[0])
    wanted = h.double()
    for _ in range(20):
        x = torch.randn(3, 4, 10)
        y, h = form(x, h)
        right, wanted = reference.run(net, x.double(), wanted)
    torch.testing.assert_close(y.double(), right, rtol=0, atol=1e-5)
    assert prepare(Net((linear(10, 4),), 3), name)(x)[1].shape == (3, 4, 0)


def test_weights_are_taken_over_when_prepared(fast: str) -> None:
    net = recurrent(10, 24, 5)
    form, (x, h, _) = prepare(net, fast), operands(net, 3)
    before = form(x, h)[0].clone()
    for layer in net.linears:
        layer.weight.zero_()
    assert torch.equal(form(x, h)[0], before)


@pytest.mark.parametrize("backend", ["cpu", "cpu_shared"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_number_of_threads_does_not_change_a_bit(backend: str, masked: bool, mixed: bool) -> None:
    net = recurrent(96, 128, 16, slots=4, masked=masked)
    x, h, slots = operands(net, 203, mixed)
    (y, after), *others = (prepare(net, needed(backend), threads=threads)(x, h, slots) for threads in (1, 2, 3))
    for other, other_after in others:
        assert torch.equal(y, other) and torch.equal(after, other_after)


def test_gradients_of_the_reference() -> None:
    net = recurrent(6, 4, 3, slots=2, bias_slots=2)
    (first, cell, last), slots = net.blocks, torch.tensor([1, 0, -1, 1])
    assert isinstance(first, Linear) and isinstance(cell, GRU) and isinstance(last, Linear)
    values = [t.double().requires_grad_() for layer in (first, cell.input, cell.recurrent, last) for t in (layer.weight, layer.bias)]

    def function(x: Tensor, h: Tensor, *values: Tensor):
        pairs = zip(values[::2], values[1::2], strict=True)
        a, b, c, d = (replace(layer, weight=w, bias=v) for layer, (w, v) in zip(net.linears, pairs, strict=True))
        changed = Net((a, GRU(b, c), d), 2)
        return (*reference.run(changed, x.view(2, 2, 6), h.view(2, 2, 4)), *reference.run(changed, x, h, slots))

    x, h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, h, *values))
    torch.stack([t.sum() for t in function(x, h, *values)]).sum().backward()
    kept = first.patterns.mask(first.codes, 6).amax(0) > 0
    assert values[0].grad is not None and not values[0].grad[0][~kept].any(), "a weight that nobody keeps has a gradient"


# Backends as such ------------------------------------------------------------------------------------------------------------------


def test_table_has_every_file_that_is_a_backend() -> None:
    folder = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    modules = {backend.unavailable.__module__.rpartition(".")[2] for backend in BACKENDS.values()}
    assert folder - modules == {"__init__", "net", "dispatch", "triton_kernels"}
    assert set(NAMES) | {"triton", "cusparselt"} == set(BACKENDS)


def test_bytes_that_are_held() -> None:
    net = Net((linear(64, 128, slots=4, bias_slots=4),), 4)
    weight, bias, codes = 64 * 128 * 4, 4 * 128 * 4, 4 * 128 * 16
    assert prepare(net, "reference").nbytes == weight + bias + codes
    assert prepare(net, "dense").nbytes == prepare(net, "dense_linear").nbytes == 4 * weight + bias
    if BACKENDS["cpu"].unavailable(net) is None:
        assert prepare(net, "cpu").nbytes == 4 * (weight // 2 + weight // 32) + bias
        assert prepare(net, "cpu_shared").nbytes == weight + 4 * weight // 32 + bias
        half = net.map(lambda layer: replace(layer, weight=layer.weight.bfloat16()))
        assert prepare(half, "cpu").nbytes == 4 * (weight // 4 + weight // 32) + bias


def test_backend_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="unknown backend 'cpus': did you mean 'cpu'"):
        prepare(Net((linear(4, 4),), 3), "cpus")


def test_other_patterns_are_refused_where_they_cannot_run(name: str) -> None:
    patterns = PatternSet(1, 4)
    net = Net((replace(linear(8, 4), patterns=patterns, codes=torch.randint(0, 4, (3, 4, 2), dtype=torch.uint8)),), 3)
    if name.startswith("cpu"):
        with pytest.raises(UsageError, match=f"backend '{name}' cannot run this net here: it runs 2:4 masks, and this net has 1:4"):
            prepare(net, name)
    else:
        assert_equals_reference(prepare(net, name), net, *operands(net, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, h, s: (x[:2], h, None), r"inputs must be \[3, rows, 8\], got \[2, 5, 8\]"),
        (lambda x, h, s: (x[..., :7], h, None), r"inputs must be \[3, rows, 8\], got \[3, 5, 7\]"),
        (lambda x, h, s: (x[0], h, None), r"inputs must be \[3, rows, 8\], got \[5, 8\]"),
        (lambda x, h, s: (x[None], h, None), r"inputs must be \[3, rows, 8\], got \[1, 3, 5, 8\]"),
        (lambda x, h, s: (x, h[:, :4], None), r"the hidden state must be \[3, 5, 4\], got \[3, 4, 4\]"),
        (lambda x, h, s: (x, h[..., :3], None), r"the hidden state must be \[3, 5, 4\], got \[3, 5, 3\]"),
        (lambda x, h, s: (x, h[0], None), r"the hidden state must be \[3, 5, 4\], got \[5, 4\]"),
        (lambda x, h, s: (x[0], h[0], s[:4]), r"inputs must be \[4, 8\], got \[5, 8\]"),
        (lambda x, h, s: (x, h, s), r"inputs must be \[5, 8\], got \[3, 5, 8\]"),
        (lambda x, h, s: (x[0], h[0], s.int()), r"slots must be int64 \[rows\], got torch.int32 \[5\]"),
        (lambda x, h, s: (x[0], h[0], s + 1), r"slot 3 does not exist: this net has the slots 0..2"),
        (lambda x, h, s: (x[0], h[1:3], s), r"the hidden state must be \[5, 4\], got \[2, 5, 4\]"),
    ],
)
def test_operands_that_do_not_fit(name: str, change, message: str) -> None:
    form = prepare(Net((gru(8, 4),), 3), name)
    right = torch.randn(3, 5, 8), torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 1, -1])
    form(right[0], right[1])  # a backend may remember what it has checked
    with pytest.raises(UsageError, match=message):
        form(*change(*right))


def codes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(torch.zeros(1, 4, 8), torch.zeros(1, 5)), r"a bias must be \[slots, 4\].*got \(1, 5\)"),
        (lambda: Linear(torch.zeros(1, 4, 8), torch.zeros(4)), r"a bias must be \[slots, 4\].*got \(4,\)"),
        (
            lambda: Linear(torch.zeros(1, 4, 8), torch.zeros(1, 4), codes_of(3, 4, 3)),
            r"codes must be uint8 \[slots, 4, 2\].*got.*\(3, 4, 3\)",
        ),
        (
            lambda: Linear(torch.zeros(2, 4, 8), torch.zeros(1, 4), codes_of(2, 4, 2)),
            r"over one shared weight \[1, 4, 8\].*over \(2, 4, 8\)",
        ),
        (lambda: Linear(torch.zeros(1, 4, 8), torch.zeros(1, 4), codes_of(3, 4, 2).long()), "codes must be uint8.*got torch.int64"),
        (lambda: GRU(linear(4, 9), linear(4, 12)), r"a GRU needs \[3H, I\] and \[3H, H\] without ReLU, got 9 and 12 rows for H = 4"),
        (lambda: GRU(linear(4, 12), linear(5, 12)), "got 12 and 12 rows for H = 5"),
        (lambda: GRU(linear(4, 12, relu=True), linear(4, 12)), "without ReLU"),
        (lambda: Net((), 3), "at least one layer and at most one GRU"),
        (lambda: Net((gru(4, 4), gru(4, 4)), 3), "at least one layer and at most one GRU"),
        (lambda: Net((linear(4, 5), linear(4, 4)), 3), "a layer takes 4 inputs where the one before it has 5 outputs"),
        (lambda: Net((gru(4, 5), linear(4, 4)), 3), "a layer takes 4 inputs where the one before it has 5 outputs"),
        (lambda: Net((linear(4, 5, slots=2),), 3), "each must have 1 or all 3"),
        (lambda: Net((linear(4, 5, bias_slots=2),), 3), "each must have 1 or all 3"),
        (lambda: Net((linear(4, 5, slots=3, bias_slots=4, code_slots=2),), 4), "each must have 1 or all 4"),
        (lambda: Net((linear(4, 5, slots=1),), 0), "at least one slot"),
        (lambda: linear(4, 0), "at least one"),
        (lambda: Linear(torch.zeros(1, 4, 0), torch.zeros(1, 4)), "at least one"),
        (lambda: gru(4, 0), "at least one"),
    ],
)
def test_nets_that_cannot_be(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
