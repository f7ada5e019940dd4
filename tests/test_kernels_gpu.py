"""The GPU backends on a GPU: large shapes, no waiting for the device, capture in a CUDA graph, and cuSPARSELt itself."""

from __future__ import annotations

import pytest
import torch
from test_kernels_triton import DTYPES, check, random_linear, random_rows, recurrent_net

from k24.kernels import BACKENDS, Net, Prepared, cusparselt, prepare, reference

pytestmark = pytest.mark.gpu

# Slots, rows, inputs, outputs: every kind of tile, several waves of programs, and rows that end inside an entry.
SHAPES = [
    (16, 1, 1024, 1024),
    (64, 2, 257, 4096),
    (7, 4, 640, 96),
    (16, 16, 1024, 1024),
    (64, 33, 512, 2048),
    (3, 1000, 300, 500),
    (2, 4096, 1024, 1024),
]


def prepared_or_skip(net: Net, name: str) -> Prepared:
    if (reason := BACKENDS[name].unavailable(net)) is not None:
        pytest.skip(reason)
    return prepare(net, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_layer_is_the_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slots, rows, inputs, outputs = shape
    net = Net((random_linear(inputs, outputs, slots, dtype, relu=True, device="cuda"),), slots)
    check(net, torch.randn(slots, rows, inputs, device="cuda"), roundings=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 100, 5000])
def test_mixed_rows_are_the_references(rows: int, dtype: torch.dtype) -> None:
    net = recurrent_net(130, 256, 20, 24, dtype, device="cuda")
    slots = (torch.randn(rows, device="cuda") * 8).long().clamp(-1, 23)  # most of them in few slots
    check(net, *random_rows(net, rows), slots)


@pytest.mark.parametrize("name", ["triton", "cusparselt"])
@pytest.mark.parametrize("rows", [1, 40, 600])
def test_whole_net_is_the_references(rows: int, name: str) -> None:
    net = recurrent_net(96, 512, 14, 8, torch.bfloat16, device="cuda")
    prepared_or_skip(net, name)
    # cuSPARSELt's gates are rounded once more before they meet.
    check(net, *random_rows(net, 8, rows), name=name, roundings=3 if name == "triton" else 6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_cusparselt_takes_any_width_and_mixed_rows(dtype: torch.dtype) -> None:
    for inputs, outputs, rows in ((5, 3, 1), (30, 50, 7), (512, 1024, 333)):
        net = Net((random_linear(inputs, outputs, 3, dtype, device="cuda"),), 3)
        prepared_or_skip(net, "cusparselt")
        check(net, torch.randn(3, rows, inputs, device="cuda"), name="cusparselt", roundings=2)
        check(
            net, torch.randn(rows, inputs, device="cuda"), slots=torch.arange(rows, device="cuda") % 4 - 1, name="cusparselt", roundings=2
        )
    assert cusparselt.version() != "none"


def test_running_twice_gives_the_same_bits() -> None:
    net = recurrent_net(64, 256, 10, 16, torch.bfloat16, device="cuda")
    prepared = prepare(net, "triton")
    x, h = random_rows(net, 16, 50)
    first, second = prepared(x, h), prepared(x, h)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_blocks_and_mixed_rows_never_wait() -> None:
    """``run`` itself: what surrounds it looks at the slots of mixed rows, and waits for that."""
    net = recurrent_net(64, 128, 10, 8, torch.bfloat16, device="cuda")
    prepared = prepare(net, "triton")
    x, h = random_rows(net, 8, 24)
    slots = torch.randint(-1, 8, (8 * 24,), device="cuda")
    operands = ((x, h, None), (x.flatten(0, 1), h.flatten(0, 1), slots))
    for each in operands:
        prepared.run(*each)  # compiles, and lays out the table of its blocks
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in operands:
            prepared.run(*each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows", [1, 24])
def test_captured_in_a_cuda_graph(rows: int, mixed: bool) -> None:
    net = recurrent_net(64, 128, 10, 8, torch.bfloat16, device="cuda")
    prepared = prepare(net, "triton")
    x, h = random_rows(net, 8, rows)
    slots = None
    if mixed:
        x, h, slots = x.flatten(0, 1), h.flatten(0, 1), torch.randint(-1, 8, (8 * rows,), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prepared.run(x, h, slots)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = prepared.run(x, h, slots)
    for _ in range(2):  # the graph must read what stands in its inputs now
        x.normal_()
        h.normal_()
        if slots is not None:
            slots.random_(-1, 8)
        graph.replay()
        wanted = prepared.run(x, h, slots)
        assert torch.equal(y, wanted[0]) and torch.equal(after, wanted[1])


def test_no_weight_per_slot_is_ever_in_memory() -> None:
    slots, width = 64, 2048
    net = Net((random_linear(width, width, slots, torch.bfloat16, device="cuda"),), slots)
    prepared = prepare(net, "triton")
    one = width * width * 2
    assert prepared.nbytes < one * (1 + slots / 16) + slots * width * 4 + 1
    for operands in (
        (torch.randn(slots, 1, width, device="cuda"), torch.empty(slots, 1, 0, device="cuda"), None),
        (torch.randn(64, width, device="cuda"), torch.empty(64, 0, device="cuda"), torch.arange(64, device="cuda") % slots),
    ):
        prepared.run(*operands)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepared.run(*operands)
        assert torch.cuda.max_memory_allocated() - before < one


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    net = recurrent_net(20, 32, 4, 2).to("cuda:1")
    x = torch.randn(2, 5, 20, device="cuda:1")
    y, _ = prepare(net, "triton")(x)
    wanted, _ = reference.run(net, x.double(), x.new_zeros(2, 5, 32).double())
    assert (y.double() - wanted).abs().max() < 1e-4
