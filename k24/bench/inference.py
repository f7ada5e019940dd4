"""Speed of running a net, beside everything it competes with, in one process.

Two operations. ``layer``: one masked ``[H, H]`` linear layer per agent. ``policy``: a whole acting step, fc1 → GRU → fc2 → fc3 → fc4, from
observations to action values and the next state. The rivals are dense: torch as one writes it (``eager``: results are new tensors, as ours
are), torch with every operand and result bound beforehand (``torch``), ``torch.compile``, ONNX Runtime bound likewise, and the *twin*, our
own kernel on the same net with its masks multiplied in. What we gain over the twin is what 2:4 is worth; what we gain over the others is
that and the kernel. *Shared* is another function: ONE dense net for all agents, whose rows are one block, by our dense kernel or by torch,
whichever is faster; it tells what different agents cost, or save, beside equal ones. With several threads there is also *single*, ours on
one.

Correctness comes first: what does not agree with the reference, computed in float64, is not timed.

On a CPU observations are float32, whatever type the weights are held in; on a GPU both are of one type.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from k24.artifact import read_policy
from k24.bench.rivals import Candidate, Unavailable, brief, fastest, onnx_candidates, torch_compiled, torch_eagers
from k24.bench.timing import SPIN_SECONDS, Race, on_cpu, on_cuda, race
from k24.errors import UsageError, unknown_name
from k24.kernels import BACKENDS, GRU, Linear, Net, prepare, reference
from k24.kernels.net import TWO_FOUR
from k24.sharing.base import Role
from k24.sharing.k24 import COMMON_ROLES, OwnMasks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error allowed, relative to the largest value: some roundings of a sum in float32, and four of the type itself where values are
# held in less.
TOLERANCE = {"fp32": 1e-5, "bf16": 4 * 2**-8, "fp16": 4 * 2**-11}
# Ours are compared with these, in this order in tables.
RIVALS = ("eager", "torch", "compile", "onnx", "twin", "shared", "single")
# Which form of a rival was the fastest.
_HOW = ("torch_how", "onnx_how", "shared_how")
# From so many shapes on, `--compile auto` leaves torch.compile out: it takes seconds for each.
FEW_CASES = 4
# More than any GPU's L2 cache.
FLUSH_BYTES = 2**28
# Sizes that a policy file brings along.
_SIZES = ("hidden", "agents", "obs", "actions", "op", "own_masks", "dtype")


@dataclass(frozen=True)
class BenchInference:
    """Times acting steps and single layers beside dense torch, torch.compile, ONNX Runtime and our own dense kernel."""

    policy: Path | None = None
    """Time this exported policy; its sizes replace those below."""
    hidden: tuple[int, ...] = (64, 128, 256)
    """Hidden units (H)."""
    agents: tuple[int, ...] = (3, 8)
    """Agents (A), each with its own masks."""
    envs: tuple[int, ...] = (1, 8, 32)
    """Rows per agent (B): environments that act at once."""
    obs: int = 18
    """Observation features, for op policy."""
    actions: int = 5
    """Actions per agent, for op policy."""
    op: Literal["layer", "policy", "both"] = "both"
    """One masked [H, H] layer, a whole acting step, or both."""
    own_masks: OwnMasks = "ends"
    """Layers with a mask for each agent, for op policy: all, all but the GRU, or the first and the last."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What weights are held in."""
    backend: str | None = None
    """Our backend, or auto; the compiled one (cpu or triton) if it can run here, else auto, when None."""
    threads: int = 1
    """Threads of every candidate."""
    repeats: int | None = None
    """Rounds per case; as many as fit into about two seconds when None."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile runs too; auto is yes up to 4 cases, since it takes seconds for each."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: ``layer`` or ``policy``.
        hidden: H.
        agents: A.
        envs: B.
        dtype: A name of ``DTYPES``.
        backend: Which of ours runs.
        build: Makes the net.
        note: Why it is not the backend that one would expect; None if it is.
    """

    op: str
    hidden: int
    agents: int
    envs: int
    dtype: str
    backend: str
    build: Callable[[], Net]
    note: str | None = None

    def __str__(self) -> str:
        """Names it for people."""
        return f"{self.op} H={self.hidden} A={self.agents} B={self.envs}"


# What to measure --------------------------------------------------------------------------------------------------------------------------


def made_up_layer(out_features: int, in_features: int, slots: int, dtype: torch.dtype, relu: bool = False) -> Linear:
    """A layer of noise whose masks are any legal ones, from torch's global generator.

    Args:
        out_features: O.
        in_features: I.
        slots: A.
        dtype: Of the weight.
        relu: Whether ReLU follows.
    """
    legal = TWO_FOUR.legal(in_features).t().float()
    codes = legal.multinomial(slots * out_features, replacement=True).t().reshape(slots, out_features, -1)
    weight = torch.empty(1, out_features, in_features).uniform_(-1, 1) * (6 / in_features) ** 0.5
    return Linear(weight.to(dtype), 0.1 * torch.randn(1, out_features), codes.to(torch.uint8), relu=relu)


def made_up_net(
    op: str,
    hidden: int,
    agents: int,
    dtype: torch.dtype,
    obs: int = 18,
    actions: int = 5,
    own_masks: OwnMasks = "ends",
    seed: int = 0,
) -> Net:
    """A net of noise.

    Args:
        op: ``layer`` or ``policy``.
        hidden: H.
        agents: A.
        dtype: Of the weights.
        obs: Observation features, for ``policy``.
        actions: Actions per agent, for ``policy``.
        own_masks: Which layers have a mask for each agent, for ``policy``; the others have one for all.
        seed: Of the noise.
    """

    def layer(role: Role, outputs: int, inputs: int) -> Linear:
        slots = 1 if op == "policy" and role in COMMON_ROLES[own_masks] else agents
        return made_up_layer(outputs, inputs, slots, dtype, relu=op == "policy" and role in ("input", "hidden"))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if op == "layer":
            return Net((layer("hidden", hidden, hidden),), agents)
        gru = GRU(layer("recurrent", 3 * hidden, hidden), layer("recurrent", 3 * hidden, hidden))
        middle = (layer("hidden", hidden, hidden), layer("hidden", hidden, hidden))
        return Net((layer("input", hidden, obs), gru, *middle, layer("output", actions, hidden)), agents)


def plan(options: BenchInference) -> list[Case]:
    """Checks the options and lists the cases.

    Args:
        options: What to measure.

    Raises:
        UsageError: A size is not positive, there is no such backend or device, or the policy file cannot be read.
    """
    for name in ("hidden", "agents", "envs"):
        values = getattr(options, name)
        if not values or min(values) < 1:
            raise UsageError(f"{name} (={' '.join(map(str, values))}) must be one or more numbers of at least 1")
    for name in ("obs", "actions", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} (={value}) must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for but torch finds no CUDA device: use --device cpu, or install a CUDA build of torch")
    if options.policy is not None:
        return _plan_policy(options, options.policy)
    dtype = DTYPES[options.dtype]
    sizes: dict[str, Any] = {"obs": options.obs, "actions": options.actions, "own_masks": options.own_masks}
    backend, note = _backend(options.backend, made_up_net("policy", 4, 2, dtype).to(options.device))
    ops = ("layer", "policy") if options.op == "both" else (options.op,)
    return [
        Case(op, hidden, agents, envs, options.dtype, backend, partial(made_up_net, op, hidden, agents, dtype, **sizes), note)
        for op in ops
        for hidden in options.hidden
        for agents in options.agents
        for envs in options.envs
    ]


def _plan_policy(options: BenchInference, file: Path) -> list[Case]:
    for option in fields(options):
        if option.name in _SIZES and option.default is not MISSING and getattr(options, option.name) != option.default:
            raise UsageError(f"--policy {file} has its own sizes: leave --{option.name} out")
    net = read_policy(file)[0].to(options.device)
    dtype = next((name for name, kind in DTYPES.items() if kind == net.dtype), None)
    if dtype is None:
        raise UsageError(f"{file} holds weights of {net.dtype}: {', '.join(DTYPES)} can be timed")
    backend, note = _backend(options.backend, net)
    return [Case("policy", net.hidden, net.n_slots, envs, dtype, backend, lambda: net, note) for envs in options.envs]


def _backend(asked: str | None, net: Net) -> tuple[str, str | None]:
    """The backend to time, and why it is not the compiled one if nobody asked for another."""
    if asked == "auto":
        return asked, None
    name = asked or ("triton" if net.device.type == "cuda" else "cpu")
    if name not in BACKENDS:
        raise unknown_name("backend", name, [*BACKENDS, "auto"])
    reason = BACKENDS[name].unavailable(net)
    if reason is None:
        return name, None
    if asked is not None:
        raise UsageError(f"backend {asked!r} cannot run this net here: {reason}")
    return "auto", f"backend {name!r} cannot run this net here: {reason}"


# One case ---------------------------------------------------------------------------------------------------------------------------------


def measure(case: Case, options: BenchInference, compiled: bool = False, clock: Callable[[], float] | None = None) -> dict[str, Any]:
    """Measures one case.

    Args:
        case: One of :func:`plan`.
        options: Threads, rounds and device.
        compiled: Whether torch.compile runs too.
        clock: Tells seconds, on a CPU; the usual one when None.

    Returns:
        The row. Times are medians in µs per call and None where nothing was measured; ``notes`` says why. ``over_*`` is how many times
        faster ours is. ``error`` is None, or says how ours went wrong, and then nothing was timed. On a GPU the times are with a warm
        cache, ``cold`` holds those without.
    """
    torch.set_num_threads(options.threads)
    net = case.build().to(options.device)
    on_gpu = net.device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
    kind = net.dtype if on_gpu else torch.float32
    x = torch.randn(case.agents, case.envs, net.in_features, generator=generator).to(net.device, kind)
    h = torch.randn(case.agents, case.envs, net.hidden, generator=generator).tanh().to(net.device, kind)
    row: dict[str, Any] = {name: getattr(case, name) for name in ("op", "hidden", "agents", "envs", "dtype", "backend")}
    notes = {} if case.note is None else {"backend": case.note}
    row |= {"us": None, "us_iqr": None, **{f"{name}_us": None for name in RIVALS}, **dict.fromkeys(_HOW)}
    row |= {**{f"over_{name}": None for name in RIVALS}, "max_abs_err": None, "nbytes": None, "error": None, "notes": notes}
    with torch.inference_mode():
        gate = _Gate(net, x, h, case.dtype)
        ours, row["nbytes"] = _ours(net, x, h, case.backend, options.threads)
        row["backend"] = ours.how
        error = gate.error(ours)
        row["max_abs_err"] = error if isfinite(error) else None
        if not error <= gate.limit:
            row["error"] = f"{case}: {ours.how} differs from the reference by {error:.1e}, where {gate.limit:.1e} is allowed: not timed"
            return row
        if on_gpu:
            return row | _on_cuda(net, x, h, ours, gate, options.repeats, notes)
        return row | _on_cpu(case, net, x, h, ours, gate, options, compiled, notes, clock)


class _Gate:
    """What is right: the reference in float64."""

    def __init__(self, net: Net, x: Tensor, h: Tensor, dtype: str) -> None:
        # With its masks multiplied in once, or the reference would do it again for every slot.
        exact = net.map(lambda layer: replace(layer, weight=layer.effective(torch.float64), codes=None))
        self._expected = reference.run(exact, x.double(), h.double())
        self.limit = TOLERANCE[dtype] * max(float(values.abs().max()) for values in self._expected if values.numel())

    def error(self, candidate: Candidate) -> float:
        """Largest difference in outputs and state; NaN for NaN, infinite for wrong shapes."""
        error = torch.zeros((), dtype=torch.float64)
        for found, expected in zip(candidate.results(), self._expected, strict=True):
            if found.shape != expected.shape:
                return float("inf")
            if found.numel():
                error = torch.maximum(error, (found.double() - expected).abs().max().cpu())
        return float(error)

    def passed(self, name: str, candidates: Iterable[Candidate], notes: dict[str, str]) -> list[Candidate]:
        """Those that are right; it is noted when none is."""
        errors = {candidate.how: (self.error(candidate), candidate) for candidate in candidates}
        right = [candidate for error, candidate in errors.values() if error <= self.limit]
        if not right:
            notes[name] = f"not timed, since it differs from the reference by {min(error for error, _ in errors.values()):.1e}"
        return right


def _ours(net: Net, x: Tensor, h: Tensor, backend: str, threads: int) -> tuple[Candidate, int]:
    prepared = prepare(net, backend, threads)
    # Not prepared(x, h): the operands are known to fit, and a policy calls it like this too.
    run = partial(prepared.run, x, h, None)
    return Candidate(run, run, getattr(prepared, "name", backend)), prepared.nbytes


def _twin(net: Net, x: Tensor, h: Tensor, threads: int) -> list[Candidate]:
    """Our own dense kernel."""
    if net.dtype != torch.float32:
        raise Unavailable("our dense kernel holds float32, so it would be no equal of weights held in less")
    dense = net.dense()
    reason = BACKENDS["cpu"].unavailable(dense)
    if reason is not None:
        raise Unavailable(reason)
    return [_ours(dense, x, h, "cpu", threads)[0]]


def _shared(net: Net, x: Tensor, h: Tensor, threads: int) -> list[Candidate]:
    """One dense net for all agents. It is another function, so it cannot be checked here; its kernels are, as those of the others."""
    one = net.map(lambda layer: replace(layer, weight=layer.effective()[:1], bias=layer.bias[:1], codes=None))
    ours = [] if BACKENDS["cpu"].unavailable(one) else [_ours(one, x, h, "cpu", threads)[0]]
    return [*ours, *torch_eagers(one, x, h)]


def _on_cpu(
    case: Case,
    net: Net,
    x: Tensor,
    h: Tensor,
    ours: Candidate,
    gate: _Gate,
    options: BenchInference,
    compiled: bool,
    notes: dict[str, str],
    clock: Callable[[], float] | None,
) -> dict[str, Any]:
    makers: dict[str, Callable[[], list[Candidate]]] = {
        "eager": lambda: [_ours(net, x, h, form, options.threads)[0] for form in ("dense", "dense_linear")],
        "torch": lambda: torch_eagers(net, x, h),
        "compile": lambda: [torch_compiled(net, x, h)],
        "onnx": lambda: onnx_candidates(net, x, h, options.threads),
        "twin": lambda: _twin(net, x, h, options.threads),
    }
    if not compiled:
        del makers["compile"]
    sample = on_cpu() if clock is None else on_cpu(clock)
    pause = SPIN_SECONDS if options.threads > 1 else 0.0
    found: dict[str, Any] = {}
    if options.threads > 1:  # before there are threads of others, which would compete for the cores
        one = {"ours": ours.run, "single": _ours(net, x, h, case.backend, 1)[0].run}
        alone = figures(race(one, sample, options.repeats, pause=pause))
        found = {name: alone[name] for name in ("single_us", "over_single")}
    field = {"ours": ours, "shared": fastest(_shared(net, x, h, options.threads), sample, options.repeats, pause)}
    for name, make in makers.items():
        try:
            candidates = gate.passed(name, make(), notes)
        except Unavailable as reason:
            notes[name] = str(reason)
            continue
        if candidates:
            field[name] = fastest(candidates, sample, options.repeats, pause)
    timed = race({name: candidate.run for name, candidate in field.items()}, sample, options.repeats, pause=pause)
    return found | figures(timed) | {f"{name}_how": field[name].how for name in RIVALS if name in field and f"{name}_how" in _HOW}


def _on_cuda(net: Net, x: Tensor, h: Tensor, ours: Candidate, gate: _Gate, repeats: int | None, notes: dict[str, str]) -> dict[str, Any]:
    """Beside per-agent dense products: ONE dense net for all agents (``shared``), and NVIDIA's own 2:4 product.

    Never run so far: no machine with a GPU was at hand.
    """
    sample = on_cuda()
    field = {"ours": ours}
    if candidates := gate.passed("torch", torch_eagers(net, x, h), notes):
        field["torch"] = fastest(candidates, sample, repeats)
    field["shared"] = fastest(_shared(net, x, h, 1), sample, repeats)
    reason = BACKENDS["cusparselt"].unavailable(net)
    if reason is not None:
        notes["cusparselt"] = reason
    else:
        try:
            for candidate in gate.passed("cusparselt", [_ours(net, x, h, "cusparselt", 1)[0]], notes):
                field["cusparselt"] = candidate
        except (RuntimeError, ValueError) as error:  # shapes that the library does not take
            notes["cusparselt"] = brief(error)
    functions = {name: candidate.run for name, candidate in field.items()}
    warm, cold = race(functions, sample, repeats), race(functions, on_cuda(FLUSH_BYTES), repeats, warm=False)
    how = {"torch_how": field["torch"].how} if "torch" in field else {}
    return figures(warm) | how | {"cold": figures(cold)}


def figures(timed: Race) -> dict[str, float]:
    """What a row says about a race: ``us``, ``us_iqr``, and for each rival ``<name>_us`` and ``over_<name>``.

    Args:
        timed: A race with ``ours`` in it.
    """
    found = {"us": round(timed.median("ours"), 3), "us_iqr": round(timed.iqr("ours"), 3)}
    for name in timed.us:
        if name != "ours":
            found |= {f"{name}_us": round(timed.median(name), 3), f"over_{name}": round(timed.speedup("ours", name), 3)}
    return found


# All of them ------------------------------------------------------------------------------------------------------------------------------


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median speed-ups of groups of cases: by operation, and by rows per agent (1, 2 to 31, 32 and more).

    Args:
        rows: Of :func:`measure`.

    Returns:
        For each group that has cases: ``op``, ``envs`` (its name), ``cases``, ``over_<rival>`` (None where it never ran), and ``slower``
        (cases in which some rival was faster).
    """
    timed = [row for row in rows if row["us"] is not None]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in timed:
        name = "1" if row["envs"] == 1 else "2 to 31" if row["envs"] < 32 else "32 and more"
        groups.setdefault((row["op"], name), []).append(row)
    found = []
    for (op, envs), members in groups.items():
        over = {f"over_{name}": [row[f"over_{name}"] for row in members if row[f"over_{name}"] is not None] for name in RIVALS}
        medians = {name: round(statistics.median(values), 3) if values else None for name, values in over.items()}
        slower = sum(any((row[f"over_{name}"] or 1) < 1 for name in RIVALS) for row in members)
        found.append({"op": op, "envs": envs, "cases": len(members), **medians, "slower": slower})
    return found
