"""The Triton kernels against the reference: on a GPU as they are, elsewhere in Triton's interpreter, which is slow, hence small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k24.errors import UsageError
from k24.kernels import GRU, Linear, Net, prepare, reference
from k24.kernels import triton as backend
from k24.sparse.patterns import PatternSet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

with pytest.MonkeyPatch.context() as _patch:
    # Triton reads it when it is first imported, and again when kernels are defined.
    for _name, _value in INTERPRET.items():
        _patch.setenv(_name, _value)
    kernels = pytest.importorskip("k24.kernels.triton_kernels", reason="triton is not installed")


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter available to the backend in these tests only, so that no other test meets it."""
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN: what is read before it is written shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def random_linear(
    inputs: int,
    outputs: int,
    slots: int,
    dtype: torch.dtype = torch.float32,
    pattern: str | None = "2:4",
    relu: bool = False,
    code_slots: int | None = None,
    device: str = DEVICE,
) -> Linear:
    """A layer with random legal codes, or a dense one (a weight per slot) without a pattern."""
    weight = torch.randn(slots if pattern is None else 1, outputs, inputs) / inputs**0.5
    bias = torch.randn(slots, outputs)
    patterns = PatternSet.parse(pattern or "2:4")
    codes = None
    if pattern is not None:
        chance = torch.rand(code_slots or slots, outputs, patterns.groups(inputs), patterns.n_patterns) * patterns.legal(inputs).T
        codes = chance.argmax(-1).to(torch.uint8).to(device)
    return Linear(weight.to(device, dtype), bias.to(device), codes, patterns, relu)


def recurrent_net(inputs: int, hidden: int, outputs: int, slots: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Net:
    """A masked layer, a masked GRU, a dense layer and a masked one."""

    def linear(i: int, o: int, **options) -> Linear:
        return random_linear(i, o, slots, dtype, device=device, **options)

    gru = GRU(linear(hidden, 3 * hidden), linear(hidden, 3 * hidden))
    last = (linear(hidden, hidden, pattern=None, relu=True), linear(hidden, outputs))
    return Net((linear(inputs, hidden, relu=True), gru, *last), slots)


def check(net: Net, x: Tensor, h: Tensor | None = None, slots: Tensor | None = None, name: str = "triton", roundings: int = 3) -> None:
    """Compares a backend with the reference in double precision, on inputs that the weights' type can hold.

    Args:
        net: What to run.
        x: Inputs.
        h: Hidden state.
        slots: The slot of each row, for mixed rows.
        name: The backend.
        roundings: How often a value is brought to the weights' type on its way, at most (the interpreter cuts where a GPU rounds).
    """
    x = x.to(net.dtype)
    h = x.new_zeros(*x.shape[:-1], net.hidden) if h is None else h.to(net.dtype)
    before = (x.clone(), h.clone())
    y, after = prepare(net, name)(x, h, slots)
    assert torch.equal(x, before[0]) and torch.equal(h, before[1]), "changed its inputs"
    wanted = reference.run(net, x.double(), h.double(), slots)
    for got, expected in zip((y, after), wanted, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == net.dtype
        if expected.numel():
            error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            assert error <= 1e-5 + roundings * torch.finfo(net.dtype).eps, f"error {error:.1e} of the largest output"


def random_rows(net: Net, *rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and hidden states."""
    return torch.randn(*rows, net.in_features, device=DEVICE), torch.randn(*rows, net.hidden, device=DEVICE)


# Slots, rows, inputs, outputs: every kernel and number of slots per program, widths on both sides of what is padded.
SHAPES = [
    (1, 1, 4, 1),
    (3, 1, 30, 5),
    (2, 3, 65, 33),
    (8, 2, 36, 70),
    (5, 16, 7, 32),
    (2, 33, 130, 64),
    (3, 17, 64, 96),
    (2, 1, 300, 3),
    (1, 130, 18, 20),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_layer_is_the_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slots, rows, inputs, outputs = shape
    layer = random_linear(inputs, outputs, slots, dtype, relu=slots % 2 == 1)
    check(Net((layer,), slots), torch.randn(slots, rows, inputs, device=DEVICE), roundings=1)


@pytest.mark.parametrize("rows", [1, 20])
def test_each_of_the_six_patterns(rows: int) -> None:
    layer = random_linear(32, 16, 6)
    assert layer.codes is not None
    layer.codes.copy_(torch.arange(6, dtype=torch.uint8)[:, None, None])
    check(Net((layer,), 6), torch.randn(6, rows, 32, device=DEVICE))


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "4:8", "2:3"])
def test_other_patterns(pattern: str) -> None:
    for inputs in (7, 40):
        check(Net((random_linear(inputs, 9, 3, pattern=pattern),), 3), torch.randn(3, 5, inputs, device=DEVICE))


def test_many_slots() -> None:
    for rows in (1, 16):
        check(Net((random_linear(12, 6, 64, torch.bfloat16),), 64), torch.randn(64, rows, 12, device=DEVICE), roundings=1)


def test_several_chunks_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a large grid are dealt out in chunks: groups and tiles must all be met, the last chunk being a part of one."""
    monkeypatch.setattr(kernels, "CHUNK", 2)
    for rows in (1, 33):
        check(Net((random_linear(8, 96, 5),), 5), torch.randn(5, rows, 8, device=DEVICE))


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_slots_in_one_program(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
    tile = kernels.choose_tile(dtype, 64, 64, 5, rows, False)
    assert tile.slots > 1 or not tile.few  # else this would test nothing
    check(Net((random_linear(40, 64, 5, dtype),), 5), torch.randn(5, rows, 40, device=DEVICE), roundings=1)


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 33])
def test_net_with_gru_and_dense_layer(rows: int) -> None:
    net = recurrent_net(11, 20, 5, 3)
    check(net, *random_rows(net, 3, rows))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_net_in_half_precision(dtype: torch.dtype) -> None:
    net = recurrent_net(30, 40, 7, 2, dtype)
    check(net, *random_rows(net, 2, 5))
    check(net, *random_rows(net, 9), torch.tensor([1, 0, -1, 0, 0, 0, 0, 1, -3], device=DEVICE))


def test_gru_alone_and_net_without_one() -> None:
    check(
        Net((GRU(random_linear(9, 36, 2), random_linear(12, 36, 2)),), 2), *(torch.randn(2, 6, width, device=DEVICE) for width in (9, 12))
    )
    check(Net((random_linear(9, 50, 2, relu=True), random_linear(50, 3, 2)), 2), torch.randn(2, 6, 9, device=DEVICE))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of numpy, which the interpreter computes with
def test_large_gates_saturate() -> None:
    gru = GRU(random_linear(4, 24, 1), random_linear(8, 24, 1))
    check(Net((gru,), 1), 30 * torch.randn(1, 8, 4, device=DEVICE), torch.randn(1, 8, 8, device=DEVICE))


@pytest.mark.parametrize("rows", [2, 20])
def test_slots_that_share_codes_and_differ_in_biases(rows: int) -> None:
    check(Net((random_linear(10, 12, 4, code_slots=1),), 4), torch.randn(4, rows, 10, device=DEVICE))


def test_slots_that_share_everything() -> None:
    dense, masked = random_linear(10, 12, 1, pattern=None), random_linear(12, 5, 1)
    net = Net((dense, masked), 3)
    check(net, torch.randn(3, 6, 10, device=DEVICE))
    check(net, torch.randn(6, 10, device=DEVICE), slots=torch.tensor([2, 0, -1, 1, 1, 0], device=DEVICE))


MIXED = {
    "none": [],
    "nobody": [-1, -1, -2],
    "one row": [2],
    "even": [0, 1, 2, 3] * 5,
    "unbalanced": [3] * 41 + [-1, 1],
    "empty slots": [0] * 3 + [-1] + [3] * 18 + [0] * 20,
}


@pytest.mark.parametrize("slots", MIXED.values(), ids=MIXED)
def test_mixed_rows(slots: list[int]) -> None:
    net = recurrent_net(13, 12, 5, 4)
    which = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    x, h = random_rows(net, len(slots))
    check(net, x, h, which)
    y, after = prepare(net, "triton")(x, h, which)
    assert not y[which < 0].any() and not after[which < 0].any()


def test_mixed_rows_have_tables_that_meet_each_row_once() -> None:
    net = Net((random_linear(4, 4, 5),), 5)
    prepared = backend.TritonNet(net)
    for counts in ([0, 0, 0, 0, 0, 7], [3, 16, 1, 0, 33, 17], [1, 1, 1, 1, 1, 1], [0, 80, 0, 0, 0, 0], [0, 15, 15, 15, 15, 15]):
        ascending = torch.arange(-1, 5, device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
        met = torch.full_like(ascending, -1)
        table = prepared._mixed_table(ascending, 16).tolist()
        for slot, first, end in table:
            rows = ascending[first : min(first + 16, end)]
            assert (rows == slot).all()
            assert (met[first : min(first + 16, end)] == -1).all(), "a row belongs to two entries"
            met[first : min(first + 16, end)] = slot
        assert torch.equal(met, ascending)


@settings(max_examples=12)
@given(
    slots=st.integers(1, 6),
    rows=st.integers(0, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    mixed=st.booleans(),
    data=st.data(),
)
def test_any_shape(slots: int, rows: int, inputs: int, outputs: int, mixed: bool, data: st.DataObject) -> None:
    torch.manual_seed(rows)
    net = Net((random_linear(inputs, outputs, slots, relu=True),), slots)
    if mixed:
        which = torch.tensor(
            data.draw(st.lists(st.integers(-1, slots - 1), min_size=rows, max_size=rows)), dtype=torch.int64, device=DEVICE
        )
        check(net, torch.randn(rows, inputs, device=DEVICE), slots=which)
    else:
        check(net, torch.randn(slots, rows, inputs, device=DEVICE))


def test_inputs_of_another_type_give_outputs_of_that_type() -> None:
    net = recurrent_net(8, 16, 4, 2, torch.bfloat16)
    x, h = random_rows(net, 2, 3)
    y, after = prepare(net, "triton")(x, h)
    wanted, _ = prepare(net, "triton")(x.bfloat16(), h.bfloat16())
    assert y.dtype == after.dtype == torch.float32
    assert torch.equal(y.bfloat16(), wanted)


def test_inputs_that_are_a_view() -> None:
    net = Net((random_linear(32, 8, 2),), 2)
    x = torch.randn(2, 32, 6, device=DEVICE).transpose(1, 2)
    assert torch.equal(prepare(net, "triton")(x)[0], prepare(net, "triton")(x.contiguous())[0])


def test_bits_are_the_masks() -> None:
    layer = random_linear(45, 6, 3)
    bits = backend.pack_bits(layer, 3, 32, 64)
    assert bits.shape == (3, 2, 96)
    spread = (bits[..., None] >> torch.arange(32, device=DEVICE)) & 1  # [A, words, outputs, 32]
    mask = spread.permute(0, 2, 1, 3).flatten(2).unflatten(1, (3, 32))
    assert layer.codes is not None
    wanted = layer.patterns.mask(layer.codes, 45, torch.int32).unflatten(1, (3, 2))
    assert torch.equal(mask[:, :, :2, :45].to(torch.int32), wanted)
    assert not mask[:, :, 2:].any() and not mask[..., 45:].any()


def test_memory_is_one_weight_and_a_bit_per_weight_and_slot() -> None:
    layer = random_linear(128, 128, 16, torch.float32)
    prepared = prepare(Net((layer,), 16), "triton")
    assert prepared.nbytes == 128 * 128 * 4 + 16 * 128 * 128 // 8 + 16 * 128 * 4


WIDTHS = (32, 64, 96, 128, 192, 256, 1024, 3072)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_tiles_fit_the_widths(dtype: torch.dtype, mixed: bool) -> None:
    for inputs in WIDTHS:
        for outputs in WIDTHS:
            for slots in (1, 3, 64):
                for rows in (1, 3, 4, 5, 16, 100, 4096):
                    tile = kernels.choose_tile(dtype, inputs, outputs, slots, rows, mixed)
                    assert inputs % tile.inputs == 0 and outputs % tile.outputs == 0
                    assert all(size & (size - 1) == 0 for size in (tile.outputs, tile.rows, tile.inputs, tile.slots))
                    assert tile.inputs % 32 == 0
                    assert tile.slots == 1 or tile.slots <= slots * -(-rows // tile.rows)
                    if tile.few:
                        assert tile.rows >= rows
                    if mixed:
                        assert not tile.few and tile.slots == 1 and tile.rows == kernels.entry_rows(dtype, rows)


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net((random_linear(8, 4, 2, device="cpu"),), 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"backend 'triton' cannot run this net here: it is on cpu: move it to a CUDA device"):
        prepare(net, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(net) is None or DEVICE == "cuda"
    assert "float64" in str(backend.unavailable(Net((random_linear(8, 4, 2, torch.float64, device="cpu"),), 2)))
    two = Net((random_linear(8, 4, 2, torch.float16, device="cpu"), random_linear(4, 4, 2, device="cpu")), 2)
    assert "float16, float32" in str(backend.unavailable(two))
    monkeypatch.setattr(backend, "version", lambda name: "3.2.0")
    assert "triton 3.2.0 is too old: 3.3 or newer" in str(backend.unavailable(net))
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.unavailable(net))


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "compute capability 7.5: 8.0 or higher is needed"), ((9, 0), "None")])
def test_unavailable_on_old_devices(capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net((random_linear(8, 4, 2, device="cpu"),), 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Net, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in str(backend.unavailable(net))


COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from k24.kernels import triton_kernels as kernels

kernels.ENOUGH_PROGRAMS = 1
pointers = {"x_ptr", "w_ptr", "bits_ptr", "bias_ptr", "y_ptr", "table_ptr", "gates_x_ptr", "gates_h_ptr", "h_ptr", "out_ptr"}
types = {"bits_ptr": "*i32", "table_ptr": "*i32", "bias_ptr": "*fp32", "gates_x_ptr": "*fp32", "gates_h_ptr": "*fp32"}


def machine_code(kernel, short, constants, warps, stages, capability):
    signature, aligned = {}, {}
    for at, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, short) if name in pointers else "i32"
        if name not in {*constants, "n_groups", "n_rows"}:
            aligned[(at,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    made = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options)
    cores = [word in made.asm["ptx"] for word in ("wgmma", "mma.sync")]
    return {"code": len(made.asm["cubin"]), "shared": made.metadata.shared, "cores": cores}


found = []
for dtype, inputs, outputs, slots, rows, mixed, capability in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    tile = kernels.choose_tile(dtype, inputs, outputs, slots, rows, mixed)
    constants = {"RELU": True, "SLOTS": tile.slots, "BN": tile.outputs, "BB": tile.rows, "BK": tile.inputs, "CHUNK": kernels.CHUNK}
    kernel = kernels.product_few if tile.few else kernels.product
    if not tile.few:
        constants |= {"MASKED": True, "UPCAST": False}
    short = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    found.append(machine_code(kernel, short, constants, tile.warps, tile.stages, capability))
found.append(machine_code(kernels.gru_gates, "*bf16", dict(zip(("BR", "BH"), kernels.GATES)), 4, 3, 90))
print(json.dumps(found))
"""


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """To machine code, in a fresh process without the interpreter; shared memory fits the smallest GPUs of compute capability 8 and up."""
    cases = [
        ("bfloat16", 1024, 1024, 16, 1, False, 80),
        ("bfloat16", 1024, 1024, 16, 16, False, 80),
        ("bfloat16", 1024, 1024, 16, 16, False, 90),
        ("bfloat16", 1024, 1024, 4, 512, False, 90),
        ("bfloat16", 32, 32, 3, 40, True, 90),
        ("float32", 256, 256, 4, 1, False, 90),
        ("float32", 256, 256, 4, 64, False, 80),
    ]
    repository = str(Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])}
    program = tmp_path / "compile_kernels.py"
    program.write_text(COMPILE, encoding="utf-8")  # Triton reads the source of kernels, so nothing may stand on a command line
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(cases) + 1
    for case, made in zip([*cases, "gates"], found, strict=True):
        assert made["code"] > 0
        assert made["shared"] <= 99 * 1024, case
    # Tensor cores where they are meant to be: Hopper's own on 9.0, the older ones on 8.0 and for 32 outputs.
    assert [made["cores"] for made in found[1:5]] == [[False, True], [True, False], [True, False], [False, True]]
