"""What our kernels are compared with, each in the fastest form found for it.

A rival runs the same net on the same operands, and everything that can be done before the call is done before: masks are multiplied in,
weights lie in the order that its library likes best, and outputs have their place already. Where one form of a rival wins here and another
there, all of them run a heat, and the winner is the one that counts. Shapes are those of :mod:`k24.kernels.net`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from k24.bench.timing import Sampler, race
from k24.errors import UsageError
from k24.kernels import GRU, Linear, Net
from k24.onnx import onnx_model

# Forms of a product over slots in torch: one batched product on weights [A, I, O]; on weights [A, O, I] as they come; with the bias added
# afterwards; or one product per slot. None is the best at all sizes.
TORCH_FORMS = ("bmm", "bmm rows", "bmm then add", "addmm")
# From so many values on, torch's own tanh takes longer than four simpler passes that give the same.
LONG_TANH = 8192


@dataclass(frozen=True)
class Candidate:
    """Something that runs a net.

    Attributes:
        run: One call, on operands that are bound already.
        results: Outputs ``[A, N, O]`` and the next state ``[A, N, H]`` of a call.
        how: Which form of it this is.
    """

    run: Callable[[], object]
    results: Callable[[], tuple[Tensor, Tensor]]
    how: str


class Unavailable(Exception):
    """A rival that cannot run here; the message says why."""


def fastest(candidates: Iterable[Candidate], sample: Sampler | None = None, rounds: int | None = None, pause: float = 0.0) -> Candidate:
    """The winner of a short race.

    Args:
        candidates: At least one.
        sample: How to time.
        rounds: As many as fit into some 0.15 s when None.
        pause: Seconds of rest before each sample.
    """
    by_how = {candidate.how: candidate for candidate in candidates}
    if len(by_how) == 1:
        return next(iter(by_how.values()))
    runs = {how: candidate.run for how, candidate in by_how.items()}
    heat = race(runs, sample, rounds, seconds=0.15, sample_seconds=0.001, pause=pause)
    return by_how[min(by_how, key=heat.median)]


# torch ------------------------------------------------------------------------------------------------------------------------------------


def torch_eager(net: Net, x: Tensor, h: Tensor, form: str, dtype: torch.dtype) -> Candidate:
    """Plain torch with as little Python as can be: a list of calls whose operands and results are bound.

    Args:
        net: The net.
        x: ``[A, N, I]``.
        h: ``[A, N, H]``.
        form: One of ``TORCH_FORMS``.
        dtype: What is computed in.
    """
    calls: list[Callable[[], object]] = []

    def linear(layer: Linear, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:2], layer.out_features)
        weight = layer.effective().to(dtype).transpose(1, 2)
        weight = weight if form == "bmm rows" else weight.contiguous()
        bias = layer.bias.to(dtype)[:, None].expand_as(out).contiguous()
        if weight.shape[0] == 1:  # all slots share it: one product of all rows
            calls.append(partial(torch.addmm, bias.flatten(0, 1), x.flatten(0, 1), weight[0], out=out.view(-1, layer.out_features)))
        elif form == "addmm":
            calls.extend(partial(torch.addmm, *operands, out=y) for *operands, y in zip(bias, x, weight, out, strict=True))
        elif form == "bmm then add":
            calls.extend((partial(torch.bmm, x, weight, out=out), partial(out.add_, bias)))
        else:
            calls.append(partial(torch.baddbmm, bias, x, weight, out=out))
        if layer.relu:
            calls.append(out.relu_)
        return out

    def gru(block: GRU, x: Tensor, h: Tensor) -> Tensor:
        gates, before = linear(block.input, x), linear(block.recurrent, h)
        split = [2 * block.hidden, block.hidden]
        (gates_rz, gates_n), (before_rz, before_n) = gates.split(split, -1), before.split(split, -1)
        r, z = gates_rz.chunk(2, -1)
        n, after = torch.empty_like(h), torch.empty_like(h)
        calls.extend((partial(gates_rz.add_, before_rz), gates_rz.sigmoid_, partial(torch.addcmul, gates_n, r, before_n, out=n)))
        calls.extend(
            (n.tanh_,) if n.numel() < LONG_TANH or n.is_cuda else (partial(n.mul_, 2), n.sigmoid_, partial(n.mul_, 2), partial(n.sub_, 1))
        )
        calls.append(partial(torch.lerp, n, h, z, out=after))
        return after

    y, h = x.to(dtype), h.to(dtype)
    for block in net.blocks:
        if isinstance(block, GRU):
            y = h = gru(block, y, h)
        else:
            y = linear(block, y)

    def run() -> None:
        for call in calls:
            call()

    def results() -> tuple[Tensor, Tensor]:
        run()
        return y, h

    return Candidate(run, results, form if dtype == torch.float32 else f"{form} {str(dtype).removeprefix('torch.')}")


def torch_eagers(net: Net, x: Tensor, h: Tensor) -> list[Candidate]:
    """All forms of plain torch: on a CPU in float32 and in the net's own type, elsewhere in its own."""
    kinds = dict.fromkeys((torch.float32, net.dtype) if x.device.type == "cpu" else (net.dtype,))
    return [torch_eager(net, x, h, form, kind) for kind in kinds for form in TORCH_FORMS]


def torch_compiled(net: Net, x: Tensor, h: Tensor) -> Candidate:
    """``torch.compile`` of the same step, written so that the compiler can join what follows a product; takes seconds.

    Raises:
        Unavailable: It does not compile here.
    """
    from torch._inductor import config

    def operands(layer: Linear) -> tuple[Tensor, Tensor, bool]:
        return layer.effective().to(x.dtype).transpose(1, 2).contiguous(), layer.bias.to(x.dtype)[:, None].contiguous(), layer.relu

    blocks = [tuple(operands(layer) for layer in ((b.input, b.recurrent) if isinstance(b, GRU) else (b,))) for b in net.blocks]

    def linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        y = (torch.bmm(x, weight) if weight.shape[0] > 1 else x @ weight[0]) + bias
        return y.relu() if relu else y

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for block in blocks:
            if len(block) == 1:
                x = linear(x, *block[0])
            else:
                (xr, xz, xn), (hr, hz, hn) = linear(x, *block[0]).chunk(3, -1), linear(h, *block[1]).chunk(3, -1)
                n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
                x = h = torch.lerp(n, h, torch.sigmoid(xz + hz))
        return x, h

    torch._dynamo.reset()
    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    try:
        # One process compiles: a pool of workers would still be busy when the timing starts.
        with config.patch(compile_threads=1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(x, h)
            compiled(x, h)
    except Exception as error:  # whatever a compiler can stumble over
        raise Unavailable(f"it does not compile here: {brief(error)}") from error
    return Candidate(lambda: compiled(x, h), lambda: compiled(x, h), "inductor")


# ONNX Runtime -----------------------------------------------------------------------------------------------------------------------------


def onnx_candidates(net: Net, x: Tensor, h: Tensor, threads: int) -> list[Candidate]:
    """ONNX Runtime on the graph that ``k24 export`` writes, and on the same with one product per slot, faster from about H = 128 on.

    Args:
        net: The net.
        x: float32 ``[A, N, I]``.
        h: float32 ``[A, N, H]``.
        threads: Threads of the runtime.

    Raises:
        Unavailable: A package is missing, or the model is too large.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"{error}: pip install 'k24[onnx]'") from error
    try:
        model = onnx_model(net)
    except UsageError as error:
        raise Unavailable(str(error)) from error
    models = {"matmul": model}
    if net.n_slots > 1 and net.masked:
        models["matmul per slot"] = _per_slot(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return [_onnx_session(onnxruntime, model, options, x, h, how) for how, model in models.items()]


def _onnx_session(onnxruntime: Any, model: Any, options: Any, x: Tensor, h: Tensor, how: str) -> Candidate:
    """Operands are bound to the session once, which saves a third of a short call."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    named = {"obs": x, "state": h} if h.shape[-1] else {"obs": x}
    operands = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()) for name, value in named.items()}
    for name, operand in operands.items():
        binding.bind_ortvalue_input(name, operand)
    for output in session.get_outputs():
        shape = [*x.shape[:2], output.shape[-1]]
        binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, "float32"))

    def results() -> tuple[Tensor, Tensor]:
        session.run_with_iobinding(binding)
        found = [torch.from_numpy(value) for value in binding.copy_outputs_to_cpu()]
        # The runtime reads its operands where they are, so that something has to hold them for as long as it may run.
        return found[0], found[1] if "state" in operands else h

    return Candidate(partial(session.run_with_iobinding, binding), results, how)


def _per_slot(model: Any) -> Any:
    """The same graph with each batched product by constants ``[A, I, O]`` taken apart: ONNX Runtime packs only matrices beforehand."""
    import numpy as np
    from onnx import ModelProto, helper, numpy_helper

    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = []
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else None
        if name is None or len(constants[name].dims) < 3:
            nodes.append(node)
            continue
        slots = numpy_helper.to_array(constants[name])
        xs, ys = ([f"{name}.{end}{slot}" for slot in range(len(slots))] for end in "xy")
        graph.initializer.append(numpy_helper.from_array(np.ones(len(slots), dtype=np.int64), f"{name}.sizes"))
        nodes.append(helper.make_node("Split", [node.input[0], f"{name}.sizes"], xs, axis=0))
        for slot, weight in enumerate(slots):
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"{name}.{slot}"))
            nodes.append(helper.make_node("MatMul", [xs[slot], f"{name}.{slot}"], [ys[slot]]))
        nodes.append(helper.make_node("Concat", ys, list(node.output), axis=0))
        graph.initializer.remove(constants[name])
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def brief(error: Exception) -> str:
    """The kind of an error and the first line of its message, which can be pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:160]}" if lines else type(error).__name__
