"""The C++ kernels: every instruction set of this machine and both layouts, with scratch memory full of NaN; and how they are loaded.

tests/test_kernels.py has what is asked of every backend.
"""

from __future__ import annotations

import copy
import gc
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import NETS, assert_equals_reference, common_gru, gru, linear, nets, operands, recurrent

from k24.errors import UsageError
from k24.kernels import GRU, Net, cpu, prepare, reference

ROOT = Path(__file__).parents[1]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++"))), None)
HERE = cpu.best_isa()
FORMS = [(isa, layout) for isa in cpu.ISAS for layout in ("packed", "shared") if HERE and cpu.ISAS[isa] <= cpu.ISAS[HERE]]
kernels = pytest.mark.skipif(HERE is None, reason="no C++ library, or no kernel for this CPU")

if FORMS:
    form = pytest.mark.parametrize("form", [partial(cpu.Cpu, isa=isa, layout=layout) for isa, layout in FORMS], ids=map(" ".join, FORMS))
else:
    form = pytest.mark.skip(reason="no C++ library, or no kernel for this CPU")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    cpu.poison(True)
    yield
    cpu.poison(False)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | None], None]]:
    """Sets what stands in place of the library; what was loaded comes back afterwards."""

    def put(path: Path | None) -> None:
        monkeypatch.setattr(cpu, "library_path", lambda: path or Path("/nowhere/_cpu.so"))
        cpu._library.cache_clear()

    yield put
    monkeypatch.undo()
    cpu._library.cache_clear()


# What is computed ------------------------------------------------------------------------------------------------------------------


@form
@pytest.mark.parametrize("kind", NETS)
def test_kinds_of_nets(form, kind: str) -> None:
    net = NETS[kind]()
    prepared = form(net)
    for rows in (0, 1, 2, 5, 7, 9, 14, 16, 30, 33):
        assert_equals_reference(prepared, net, *operands(net, rows), what=f"{rows} rows")
        assert_equals_reference(prepared, net, *operands(net, rows, mixed=True), what=f"{rows} mixed rows")


@form
@given(net=nets(), rows=st.integers(0, 70), mixed=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_nets(form, net: Net, rows: int, mixed: bool, dtype: torch.dtype) -> None:
    net = net.map(lambda layer: replace(layer, weight=layer.weight.to(dtype)))
    assert_equals_reference(form(net), net, *operands(net, rows, mixed))


@form
@pytest.mark.parametrize("width", [250, 255, 256, 257, 260, 300, 513])
def test_layers_that_take_several_passes(form, width: int) -> None:
    """ReLU comes after the last pass and the bias before the first, whether rows fill a register or not."""
    net = Net((linear(width, 40, relu=True), linear(40, width, relu=True, bias_slots=3), linear(width, 5)), 3)
    for rows in (1, 3, 9, 13, 16, 50):
        assert_equals_reference(form(net), net, *operands(net, rows), what=f"{rows} rows")


@form
def test_values_far_from_one(form) -> None:
    """Gates are saturated, not broken, by any size of input; sums are as large as float32 allows."""
    net = Net((gru(6, 5), linear(5, 4)), 3)
    prepared = form(net)
    x, h, _ = operands(net, 20)
    for scale in (1e-30, 1e-6, 30.0, 90.0, 1e4, 1e20):
        eps = 1e-5 if scale < 100 else 1e-3  # a gate is the sigmoid of a small difference of large numbers, now and then
        assert_equals_reference(prepared, net, x * scale, h, eps=eps, what=f"inputs times {scale}")
        assert_equals_reference(prepared, net, x, h * scale, eps=eps, what=f"hidden state times {scale}")
    single = Net((linear(6, 5, relu=True),), 3)
    x = x * 1e30
    wanted = reference.run(single, x.double(), x.new_zeros(3, 20, 0).double())[0]
    torch.testing.assert_close(form(single)(x)[0].double(), wanted, rtol=1e-4, atol=1e25)


@form
def test_gates_at_infinity(form) -> None:
    """An update gate that is shut keeps the hidden state bit for bit; one that is open replaces it."""
    cell = gru(4, 8, masked=False)
    h = torch.randn(3, 18, 8)
    for gate, wanted in ((1e9, h), (-1e9, torch.ones_like(h))):
        bias = torch.zeros(1, 24)
        bias[:, 8:16], bias[:, 16:] = gate, 1e9  # z, and n towards tanh(∞) = 1
        net = Net((GRU(replace(cell.input, bias=bias), cell.recurrent),), 3)
        torch.testing.assert_close(form(net)(torch.randn(3, 18, 4), h)[1], wanted, rtol=0, atol=1e-6)


@form
@pytest.mark.parametrize("rows", [1, 20])
def test_relu_keeps_nan_and_cuts_the_rest(form, rows: int) -> None:
    weight, bias = torch.zeros(1, 4, 4), torch.tensor([[-1.0, -0.0, 2.0, -torch.inf]])
    net = Net((replace(linear(4, 4, slots=1, relu=True), weight=weight, bias=bias),), 1)
    prepared = form(net)
    assert prepared(torch.randn(1, rows, 4))[0].tolist() == [[[0, 0, 2, 0]] * rows]
    assert prepared(torch.full((1, rows, 4), torch.nan))[0].isnan().all()


@form
def test_number_of_threads_out_of_range(form) -> None:
    net = recurrent(64, 64, 5)
    x, h, _ = operands(net, 300)
    wanted = form(net, threads=1)(x, h)
    for threads in (0, -3, 1000):
        for got, right in zip(form(net, threads=threads)(x, h), wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


@kernels
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_codes_that_are_no_pattern_are_refused(layout: str) -> None:
    """The library takes codes for indices."""
    layer = linear(8, 4)
    assert layer.codes is not None
    layer.codes[1, 2, 1] = 6
    with pytest.raises(UsageError, match="6"):
        cpu.Cpu(Net((layer,), 3), layout=layout)


@form
def test_nets_run_side_by_side(form) -> None:
    """ctypes lets go of Python's lock, so two calls do run at once: each thread has scratch memory of its own."""
    each = [(recurrent(10, 48, 5), 33), (recurrent(40, 16, 300), 5)]
    wrong: list[BaseException] = []
    start = threading.Barrier(len(each))

    def work(net: Net, x: torch.Tensor, h: torch.Tensor, wanted: torch.Tensor) -> None:
        try:
            prepared = form(net)
            start.wait()
            for _ in range(300):
                torch.testing.assert_close(prepared(x, h)[0], wanted, rtol=0, atol=1e-4)
        except BaseException as error:
            wrong.append(error)

    threads = []
    for net, rows in each:
        x, h, _ = operands(net, rows)
        threads.append(threading.Thread(target=work, args=(net, x, h, reference.run(net, x, h)[0])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


RACE = """
import sys, threading, torch
from test_kernels import operands, recurrent
from k24.kernels import cpu
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
net = recurrent(16, 16, 16)
prepared, wrong = cpu.Cpu(net), []
def work(rows):
    x, h, _ = operands(net, rows)
    wanted = cpu.Cpu(net)(x, h)[0]
    for _ in range(3000):
        y, _ = prepared(x, h)
        if y.shape != wanted.shape or not torch.equal(y, wanted):
            wrong.append(rows)
threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 3, 40, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("wrong results:", len(wrong))
"""


@kernels
def test_one_net_runs_in_several_threads() -> None:
    """With other numbers of rows in each. In a process of its own, which may break where this one should go on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", RACE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "wrong results: 0\n", f"exit status {done.returncode}: {done.stdout}{done.stderr[-300:]}"


@kernels
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_nets_that_are_dropped_give_their_memory_back(layout: str) -> None:
    net = Net((linear(256, 1024, slots=8), linear(1024, 64, slots=8)), 8)
    size = cpu.Cpu(net, layout=layout).nbytes
    x = torch.randn(8, 20, 256)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(3):
        cpu.Cpu(net, layout=layout)(x)
    before, count = resident(), 12
    for _ in range(count):
        cpu.Cpu(net, layout=layout)(x)
    assert resident() - before < count * size / 4


# How they are chosen and loaded ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler")
def test_library_is_there_where_there_is_a_compiler() -> None:
    assert cpu.library_path().exists(), "there is a C++ compiler, but the library was not built: pip install -e ."
    assert not isinstance(cpu._library(), str), cpu._library()


@kernels
def test_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    net = recurrent(10, 24, 5)
    monkeypatch.delenv("K24_ISA", raising=False)
    assert cpu.Cpu(net).isa == FORMS[0][0]
    for isa in dict.fromkeys(isa for isa, _ in FORMS):
        monkeypatch.setenv("K24_ISA", isa)
        prepared = cpu.Cpu(net)
        assert prepared.isa == isa
        assert_equals_reference(prepared, net, *operands(net, 20))
    monkeypatch.setenv("K24_ISA", "sse2")
    with pytest.raises(UsageError, match="K24_ISA=sse2 in the environment is not known: use avx512 or avx2"):
        prepare(net, "cpu")


@kernels
def test_names_that_do_not_exist() -> None:
    net = recurrent(10, 24, 5)
    with pytest.raises(UsageError, match="sse2"):
        cpu.Cpu(net, isa="sse2")
    with pytest.raises(UsageError, match="dense"):
        cpu.Cpu(net, layout="dense")


@kernels
def test_inputs_that_are_elsewhere() -> None:
    net = recurrent(10, 24, 5)
    prepared = cpu.Cpu(net)
    x, h, slots = operands(net, 4, mixed=True)
    blocks, state, _ = operands(net, 4)
    prepared(blocks, state)  # what is like the last call is not examined again, but this is
    for wrong in ((x.to("meta"), h, slots), (x, h.to("meta"), slots), (blocks.to("meta"), state), (blocks, state.to("meta"))):
        with pytest.raises(UsageError, match="this net runs on the CPU, and an input is on meta"):
            prepared(*wrong)


@kernels
def test_instruction_set_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu._library()
    monkeypatch.delenv("K24_ISA", raising=False)
    monkeypatch.setattr(library, "k24_best_isa", lambda: 0)
    with pytest.raises(UsageError, match="backend 'cpu' cannot run this net here: this CPU has neither AVX-512 nor AVX2"):
        prepare(recurrent(10, 24, 5), "cpu")
    monkeypatch.setattr(library, "k24_best_isa", lambda: cpu.ISAS["avx2"])
    assert cpu.best_isa() == "avx2"
    monkeypatch.setenv("K24_ISA", "avx512")
    with pytest.raises(UsageError, match="or not what K24_ISA asks for"):
        prepare(recurrent(10, 24, 5), "cpu")


def test_no_library(no_library) -> None:
    no_library(None)
    net = recurrent(10, 24, 5)
    for name in ("cpu", "cpu_shared"):
        with pytest.raises(
            UsageError, match=rf"backend '{name}' cannot run this net here: .*not built: install a C\+\+ compiler.*reinstall k24"
        ):
            prepare(net, name)
    assert cpu.best_isa() is None
    cpu.poison(True)  # has nothing to do
    auto = prepare(net)
    assert_equals_reference(auto, net, *operands(net, 3))
    assert auto.name.startswith("dense")


def test_library_that_does_not_load(no_library, tmp_path: Path) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"\x7fELF and then nothing")
    no_library(broken)
    with pytest.raises(UsageError, match=r"its C\+\+ library does not load \(.*_cpu.so.*\): reinstall k24"):
        prepare(recurrent(10, 24, 5), "cpu")


@pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler")
def test_library_of_another_version(no_library, tmp_path: Path) -> None:
    """One from before there was a version has no function for it."""
    for source, found in (('extern "C" int k24_version() { return 99; }', 99), ('extern "C" int k24_run() { return 0; }', 0)):
        (tmp_path / f"{found}.cpp").write_text(source)
        library = tmp_path / f"{found}.so"
        subprocess.run([str(COMPILER), "-shared", "-fPIC", tmp_path / f"{found}.cpp", "-o", library], check=True)
        no_library(library)
        with pytest.raises(UsageError, match=f"its C.. library is of version {found} where this k24 needs {cpu.VERSION}: reinstall k24"):
            prepare(recurrent(10, 24, 5), "cpu")


@kernels
@pytest.mark.parametrize("common", ["nothing", "the GRU", "everything"])
@pytest.mark.parametrize("isa", sorted(cpu.ISAS))
def test_outputs_depend_on_nothing_but_their_own_row(isa: str, common: str) -> None:
    """Not on how many rows come with it, of any slot, nor on threads, nor on whether masks are packed, bits, or multiplied in."""
    if cpu.ISAS[isa] > cpu.ISAS[cpu.best_isa() or "avx2"]:
        pytest.skip(f"this CPU has no {isa}")
    net = common_gru(18, 100, 5) if common == "the GRU" else recurrent(18, 100, 5, code_slots=3 if common == "nothing" else 1)
    x, h, _ = operands(net, 131)
    wanted = cpu.Cpu(net, 1, isa=isa)(x, h)
    for form in (cpu.Cpu(net, 1, isa=isa), cpu.Cpu(net, 2, isa=isa), cpu.Cpu(net, 1, "shared", isa), cpu.Cpu(net.dense(), 1, isa=isa)):
        for rows in (1, 2, 3, 4, 7, 8, 14, 16, 31, 33, 64, 131):
            for got, right in zip(form(x[:, :rows].contiguous(), h[:, :rows].contiguous()), wanted, strict=True):
                assert torch.equal(got, right[:, :rows]), f"{rows} rows"


@kernels
@pytest.mark.parametrize(
    ("change", "slots"),
    [
        ({}, 0),
        ({"out_features": 0}, 2),
        ({"in_features": 0}, 2),
        ({"weight_slots": 2}, 2),
        ({"bias_slots": 3}, 2),
        ({"code_slots": 3}, 3 + 1),
        ({"role": 1}, 2),
        ({"role": 2}, 2),
        ({"role": 7}, 2),
        ({"codes": 6}, 2),
    ],
)
def test_the_library_itself_refuses_what_does_not_fit(change: dict, slots: int) -> None:
    """Any language may call it."""
    library = cpu._library()
    assert not isinstance(library, str)
    weight, bias, codes = torch.zeros(2, 4, 8), torch.zeros(3, 4), torch.zeros(3, 4, 2, dtype=torch.uint8)

    def made(slots: int, **fields) -> int | None:
        codes[0, 0, 0] = fields.pop("codes", 5)
        layer = cpu._Layer(weight.data_ptr(), codes.data_ptr(), bias.data_ptr(), 1, 1, 1, 4, 8, 0, 0)
        for name, value in fields.items():
            setattr(layer, name, value)
        return library.k24_create(cpu.ISAS[str(cpu.best_isa())], slots, 1, (cpu._Layer * 1)(layer), 0, 0)

    assert made(slots, **change) is None
    handle = made(2)
    assert handle
    x, y = torch.zeros(3, 8), torch.zeros(3, 4)
    assert library.k24_run(handle, x.data_ptr(), None, y.data_ptr(), None, 3, None, 1) == -1  # three rows of two slots
    library.k24_free(handle)


@kernels
def test_the_library_itself_refuses_two_states() -> None:
    library = cpu._library()
    assert not isinstance(library, str)
    values = torch.zeros(3 * 64 * 64)

    def layer(role: int, wide: int, deep: int) -> cpu._Layer:
        return cpu._Layer(values.data_ptr(), None, values.data_ptr(), 1, 0, 1, wide, deep, 0, role)

    def made(*layers: cpu._Layer) -> int | None:
        return library.k24_create(cpu.ISAS[str(cpu.best_isa())], 1, len(layers), (cpu._Layer * len(layers))(*layers), 0, 0)

    first, second = (layer(1, 192, 64), layer(2, 192, 64)), (layer(1, 24, 64), layer(2, 24, 8))
    handle = made(*first)
    assert handle and made(*second) and made(*first, *second) is None
    library.k24_free(handle)


@kernels
def test_a_packed_net_lives_as_long_as_anyone_uses_it() -> None:
    net = recurrent(10, 24, 5)
    x, h, _ = operands(net, 4)
    form = cpu.Cpu(net)
    wanted = form(x, h)[0]
    other = copy.copy(form)
    del form
    gc.collect()
    assert torch.equal(other(x, h)[0], wanted)
    with pytest.raises(TypeError, match="cannot be copied or pickled: pickle the policy, or prepare the net again"):
        copy.deepcopy(other)


@kernels
def test_foreign_defaults_change_nothing() -> None:
    net = recurrent(10, 24, 5)
    x, h, _ = operands(net, 4)
    wanted = cpu.Cpu(net)(x, h)
    form = cpu.Cpu(net)
    kind = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            for _ in range(2):
                for got, right in zip(form(x, h), wanted, strict=True):
                    assert got.dtype == torch.float32 and torch.equal(got, right)
    finally:
        torch.set_default_dtype(kind)


@kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_of_a_threaded_process_runs_on(tmp_path: Path) -> None:
    program = """
import os, sys, torch
from test_kernels import operands, recurrent
from k24.kernels.cpu import Cpu
net = recurrent(64, 256, 5)
x, h, _ = operands(net, 64)
form = Cpu(net, 2)
wanted = form(x, h)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(form(x, h)[0], wanted) else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "0\n", done.stderr[-300:]


# Under the sanitizers --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler, or no kernels")
def test_kernels_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    """csrc/kernels_test.cpp under the address and undefined behaviour sanitizers; not optimised, to compile sooner."""
    flags = ["-g1", "-O0", "-std=c++17", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    avx2 = ["-mavx2", "-mfma"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    (probe := tmp_path / "probe.cpp").write_text("int main() {}")
    if subprocess.run([COMPILER, *flags, probe, "-o", tmp_path / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("this compiler has no sanitizers or no OpenMP")
    objects = []
    for name, options in {"kernels_test": ["-O1"], "api": [], "avx2": avx2, "avx512": avx512}.items():
        objects.append(tmp_path / f"{name}.o")
        subprocess.run([COMPILER, *flags, *options, "-c", ROOT / "csrc" / f"{name}.cpp", "-o", objects[-1]], check=True)
    program = tmp_path / "kernels_test"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    # The program looks for leaks itself: the sanitizer's own search needs rights that a container may lack.
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([program, "300"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("300 nets, ") and (HERE is None or "nets, 0 runs" not in done.stdout), done.stdout
