"""``k24 bench inference``: fair sums, right rivals, and no speed of a wrong result. No test looks at how long anything took."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from k24.artifact import PolicySpec
from k24.bench import BenchInference, header, machine, measure, plan, summary
from k24.bench import rivals as rivals_module
from k24.bench import timing as timing_module
from k24.bench.inference import RIVALS, figures, made_up_net
from k24.bench.rivals import TORCH_FORMS, Candidate, Unavailable, fastest, onnx_candidates, torch_compiled, torch_eager, torch_eagers
from k24.bench.timing import Race, on_cpu, race
from k24.cli import main
from k24.kernels import BACKENDS, Backend, Net, dense, reference
from k24.policy import save_policy

TINY = ("--hidden", "8", "--agents", "2", "--envs", "1", "--obs", "6", "--repeats", "1", "--compile", "off", "--backend", "dense")
FIELDS = {
    *("op", "hidden", "agents", "envs", "dtype", "backend", "us", "us_iqr", "torch_us", "torch_how", "compile_us", "onnx_us", "twin_us"),
    *("eager_us", "over_eager", "over_torch", "over_onnx", "over_twin", "max_abs_err", "nbytes"),
}


def operands(net: Net, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(net.n_slots, rows, net.in_features), torch.randn(net.n_slots, rows, net.hidden).tanh()


def one_slot_for_all(net: Net) -> Net:
    """Dense, and the same weights for all slots."""
    return net.map(lambda layer: replace(layer, weight=layer.effective()[:1], codes=None))


def ticking(seconds: float = 0.01):
    """A clock that goes on by the same amount each time it is read."""
    ticks = count()
    return lambda: next(ticks) * seconds


def tiny(**changes) -> BenchInference:
    options = {"hidden": (8,), "agents": (2,), "envs": (3,), "obs": 6, "repeats": 1, "compile": "off", "backend": "dense"}
    return BenchInference(**(options | changes))


def wrong_backend(spoil) -> Backend:
    class Wrong(dense.Dense):
        def run(self, x, h, slots):
            y, after = super().run(x, h, slots)
            return spoil(y), after

    return Backend("wrong on purpose", dense.unavailable, lambda net, _: Wrong(net))


# --- sums ----------------------------------------------------------------------------------------------------------------------


def test_speedup_is_the_median_of_ratios_within_rounds() -> None:
    timed = Race({"ours": [1.0, 2.0, 4.0], "torch": [8.0, 2.0, 4.0], "onnx": [3.0, 6.0, 12.0]})
    assert timed.speedup("ours", "torch") == 1.0  # where the medians would say 2
    assert timed.speedup("ours", "onnx") == 3.0
    assert timed.median("ours") == 2.0 and timed.iqr("ours") == 3.0
    assert Race({"ours": [5.0]}).iqr("ours") == 0.0


def test_figures_of_made_up_timings() -> None:
    found = figures(Race({"ours": [2.0, 4.0, 6.0], "torch": [4.0, 12.0, 30.0], "twin": [1.0, 2.0, 3.0]}))
    assert found == {"us": 4.0, "us_iqr": 4.0, "torch_us": 12.0, "over_torch": 3.0, "twin_us": 2.0, "over_twin": 0.5}


def test_race_divides_by_calls_and_takes_turns() -> None:
    now, order = 0.0, []

    def candidate(name: str, seconds: float):
        def run() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return run

    sampled = []

    def sample(function, calls: int) -> float:
        sampled.append(calls)
        return on_cpu(lambda: now)(function, calls)

    functions = {"a": candidate("a", 1e-3), "b": candidate("b", 3e-3), "c": candidate("c", 1e-4)}
    timed = race(functions, sample, rounds=4, sample_seconds=2e-3, warm=False)
    assert [pytest.approx(timed.median(name)) for name in "abc"] == [1000.0, 3000.0, 100.0]
    assert timed.speedup("a", "b") == pytest.approx(3.0) and timed.iqr("a") == pytest.approx(0.0)
    assert sampled[-3:] == [2, 1, 20]  # calls that fill 2 ms; the fourth round begins with a again
    in_turns = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert "".join(in_turns[-12:]) == "abcbcacababc"


def test_race_warms_up_before_each_sample() -> None:
    counted = {True: 0, False: 0}
    for warm in counted:
        calls = count()
        timed = race({"a": lambda calls=calls: next(calls)}, on_cpu(ticking()), rounds=5, warm=warm)
        counted[warm] = next(calls)
        assert len(timed.us["a"]) == 5
    assert counted[True] - counted[False] == 5


def test_race_rests_before_each_sample_if_told_to(monkeypatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(timing_module.time, "sleep", rests.append)
    race({"a": lambda: None, "b": lambda: None}, on_cpu(ticking()), rounds=3)
    assert rests == []
    timed = race({"a": lambda: None, "b": lambda: None}, on_cpu(ticking(2**-6)), seconds=1.0, warm=False, pause=2**-6)
    assert rests == [2**-6] * 32 and len(timed.us["a"]) == 16


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_may_fall_asleep_between_candidates(monkeypatch, threads: int) -> None:
    rests: list[float] = []
    monkeypatch.setattr(timing_module.time, "sleep", rests.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda asked: rests.append(-asked))
    options = tiny(op="layer", threads=threads)
    assert measure(plan(options)[0], options)["error"] is None
    assert rests[0] == -threads and (len(rests) > 1) == (threads > 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (1.0, 32), (1e6, 200)])
def test_race_fits_its_rounds_into_the_time_given(seconds: float, rounds: int) -> None:
    timed = race({"a": lambda: None, "b": lambda: None}, on_cpu(ticking(2**-6)), seconds=seconds, warm=False)
    assert [len(values) for values in timed.us.values()] == [rounds, rounds]


def test_race_ends_though_the_clock_stands_still(monkeypatch) -> None:
    monkeypatch.setattr(timing_module, "MOST_CALLS", 64)
    assert race({"a": lambda: None}, on_cpu(lambda: 1.0), rounds=2).us == {"a": [0.0, 0.0]}


def test_race_leaves_garbage_collection_as_it_was() -> None:
    def stop() -> None:
        assert gc.isenabled() or next(calls) < 5
        if not gc.isenabled():
            raise KeyboardInterrupt

    calls = count()
    with pytest.raises(KeyboardInterrupt):
        race({"a": stop}, rounds=3)
    assert gc.isenabled()


def test_the_heat_is_won_by_the_fastest() -> None:
    now = 0.0

    def candidate(seconds: float, how: str) -> Candidate:
        def run() -> None:
            nonlocal now
            now += seconds

        return Candidate(run, lambda: (torch.zeros(0), torch.zeros(0)), how)

    found = fastest([candidate(3e-3, "slow"), candidate(1e-3, "fast"), candidate(2e-3, "middling")], on_cpu(lambda: now))
    assert found.how == "fast"


def test_summary_groups_by_rows_and_counts_losses() -> None:
    def row(op: str, envs: int, torch_: float | None, twin: float | None, us: float | None = 1.0) -> dict:
        over = {f"over_{name}": None for name in RIVALS} | {"over_torch": torch_, "over_twin": twin}
        return {"op": op, "envs": envs, "us": us, **over}

    rows = [
        row("layer", 1, 3.0, 1.5),
        row("layer", 1, 5.0, 0.5),
        row("layer", 8, 2.0, 1.0),
        row("layer", 32, 4.0, None),
        row("layer", 128, 2.0, 2.0),
    ]
    rows += [row("policy", 1, 9.0, 1.1), row("policy", 1, None, None, us=None)]
    found = {(group.pop("op"), group.pop("envs")): group for group in summary(rows)}
    empty = {f"over_{name}": None for name in RIVALS if name not in ("torch", "twin")}
    assert found == {
        ("layer", "1"): {"cases": 2, "over_torch": 4.0, "over_twin": 1.0, "slower": 1, **empty},
        ("layer", "2 to 31"): {"cases": 1, "over_torch": 2.0, "over_twin": 1.0, "slower": 0, **empty},
        ("layer", "32 and more"): {"cases": 2, "over_torch": 3.0, "over_twin": 2.0, "slower": 0, **empty},
        ("policy", "1"): {"cases": 1, "over_torch": 9.0, "over_twin": 1.1, "slower": 0, **empty},
    }
    assert summary([]) == []


# --- nets and rivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "hidden", "obs"), [("layer", 8, 18), ("layer", 6, 18), ("policy", 8, 18), ("policy", 5, 1), ("policy", 2, 7)]
)
def test_made_up_nets_hold_legal_masks_and_repeat(op: str, hidden: int, obs: int) -> None:
    net = made_up_net(op, hidden, 3, torch.float32, obs, 4)
    for layer in net.linears:
        legal = layer.patterns.legal(layer.in_features)
        groups = torch.arange(layer.codes.shape[-1]).expand_as(layer.codes)
        assert legal[layer.codes.long(), groups].all()
    own = {layer.codes.shape[0] for layer in (net.linears[0], net.linears[-1])}, {layer.codes.shape[0] for layer in net.linears[1:-1]}
    assert own == ({3}, set() if op == "layer" else {1})
    everywhere = made_up_net(op, hidden, 3, torch.float32, obs, 4, "all")
    assert all(layer.codes.shape[0] == 3 for layer in everywhere.linears)
    again = made_up_net(op, hidden, 3, torch.float32, obs, 4)
    assert all(torch.equal(a.weight, b.weight) and torch.equal(a.codes, b.codes) for a, b in zip(net.linears, again.linears, strict=True))
    assert (net.in_features, net.out_features, net.hidden) == ((hidden, hidden, 0) if op == "layer" else (obs, 4, hidden))


@pytest.mark.parametrize("form", TORCH_FORMS)
@pytest.mark.parametrize("op", ["layer", "policy"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 2000])
def test_torch_in_every_form_is_the_reference(form: str, op: str, shared: bool, rows: int) -> None:
    net = made_up_net(op, 8, 3, torch.float32, 7, 5)
    net = one_slot_for_all(net) if shared else net
    x, h = operands(net, rows)
    kept = x.clone(), h.clone()
    with torch.inference_mode():
        candidate = torch_eager(net, x, h, form, torch.float32)
        candidate.run()
        found = [values.clone() for values in candidate.results()]
    for got, expected in zip(found, reference.run(net, x, h), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept[0]) and torch.equal(h, kept[1])


def test_torch_runs_in_both_types_where_weights_are_held_in_less() -> None:
    single = made_up_net("layer", 8, 2, torch.float32)
    assert [candidate.how for candidate in torch_eagers(single, *operands(single, 1))] == [*TORCH_FORMS]
    net = made_up_net("policy", 16, 2, torch.bfloat16, 7, 5)
    x, h = operands(net, 4)
    with torch.inference_mode():
        candidates = torch_eagers(net, x, h)
        assert {c.how for c in candidates} == {*TORCH_FORMS, *(f"{form} bfloat16" for form in TORCH_FORMS)}
        expected = reference.run(net, x, h)
        for candidate in candidates:
            tolerance = 0.05 if "bfloat16" in candidate.how else 1e-5
            for got, right in zip(candidate.results(), expected, strict=True):
                torch.testing.assert_close(got.float(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", ["layer", "policy"])
@pytest.mark.parametrize("shared", [False, True])
def test_onnx_runtime_in_every_form_is_the_reference(op: str, shared: bool) -> None:
    pytest.importorskip("onnxruntime")
    net = made_up_net(op, 8, 3, torch.float32, 7, 5)
    net = one_slot_for_all(net) if shared else net
    x, h = operands(net, 4)
    candidates = onnx_candidates(net, x, h, 1)
    assert [c.how for c in candidates] == (["matmul"] if shared else ["matmul", "matmul per slot"])
    for candidate in candidates:
        candidate.run()
        for got, expected in zip(candidate.results(), reference.run(net, x, h), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_missing_package_is_told(monkeypatch) -> None:
    net = made_up_net("layer", 8, 2, torch.float32)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unavailable, match=r"onnxruntime.*: pip install 'k24\[onnx\]'"):
        onnx_candidates(net, *operands(net, 1), 1)


def test_a_compiler_that_fails_is_told(monkeypatch) -> None:
    def broken(*_, **__):
        def run(*_):
            raise RuntimeError("\n no C++ compiler\nand pages more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    net = made_up_net("layer", 8, 2, torch.float32)
    with pytest.raises(Unavailable, match=r"^it does not compile here: RuntimeError: no C\+\+ compiler$"):
        torch_compiled(net, *operands(net, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_torch_is_the_reference(shared: bool) -> None:
    net = made_up_net("policy", 8, 3, torch.float32, 7, 5)
    net = one_slot_for_all(net) if shared else net
    x, h = operands(net, 4)
    with torch.inference_mode():
        for got, expected in zip(torch_compiled(net, x, h).results(), reference.run(net, x, h), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- rows ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rows_are_complete(dtype: str) -> None:
    options = tiny(dtype=dtype)
    rows = [measure(case, options) for case in plan(options)]
    assert [(row["op"], row["hidden"], row["agents"], row["envs"], row["dtype"]) for row in rows] == [
        ("layer", 8, 2, 3, dtype),
        ("policy", 8, 2, 3, dtype),
    ]
    for row in rows:
        assert set(row) >= FIELDS
        assert json.loads(json.dumps(row)) == row
        assert row["error"] is None and row["backend"] == "dense" and row["nbytes"] > 0 and 0 <= row["max_abs_err"] < 1e-5
        assert row["us"] > 0 and row["us_iqr"] == 0 and row["torch_us"] > 0 and row["compile_us"] is None
        assert row["torch_how"].startswith(TORCH_FORMS)
        # One round: its ratio is that of the times.
        assert row["over_torch"] == pytest.approx(row["torch_us"] / row["us"], rel=0.01, abs=0.01)
        for name in RIVALS:
            assert (row[f"{name}_us"] is None) == (row[f"over_{name}"] is None)


def test_all_candidates_go_by_the_clock_given() -> None:
    options = tiny(repeats=4, op="policy")
    row = measure(plan(options)[0], options, clock=ticking(0.01))
    timed = [name for name in RIVALS if row[f"{name}_us"] is not None]
    assert "torch" in timed and row["us"] == pytest.approx(1e4) and row["us_iqr"] == pytest.approx(0, abs=1e-3)
    assert all(row[f"over_{name}"] == pytest.approx(1.0) for name in timed)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda y: y + 1e-3, 1e-3),
        (lambda y: y.flip(0), None),
        (lambda y: y * float("nan"), None),
        (lambda y: y[:, :1], None),
    ],
)
def test_nothing_wrong_is_timed(monkeypatch, spoil, error: float | None) -> None:
    monkeypatch.setitem(BACKENDS, "dense", wrong_backend(spoil))
    options = tiny()
    for case in plan(options):
        row = measure(case, options)
        assert row["error"].startswith(f"{case}: dense differs from the reference by ") and "\n" not in row["error"]
        assert row["us"] is None and all(row[f"{name}_us"] is None and row[f"over_{name}"] is None for name in RIVALS)
        if error is not None:
            assert row["max_abs_err"] == pytest.approx(error, rel=0.01)
        assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_rounding_alone_passes(monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "dense", wrong_backend(lambda y: y * (1 + 2**-22)))
    assert measure(plan(tiny())[0], tiny())["error"] is None


def test_a_wrong_rival_is_left_out(monkeypatch) -> None:
    right = rivals_module.torch_eager
    monkeypatch.setattr(
        rivals_module, "torch_eager", lambda *a: replace(c := right(*a), results=lambda: (c.results()[0] + 1, c.results()[1]))
    )
    row = measure(plan(tiny())[0], tiny())
    assert row["error"] is None and row["us"] > 0
    assert row["torch_us"] is None and row["over_torch"] is None and row["torch_how"] is None
    assert row["notes"]["torch"].startswith("not timed, since it differs from the reference by 1.0e+00")


def test_one_dense_net_for_all_agents_is_timed_too() -> None:
    row = measure(plan(tiny(op="policy"))[0], tiny(op="policy"))
    assert row["shared_us"] > 0 and row["over_shared"] > 0 and row["shared_how"] in {"cpu", *TORCH_FORMS}


def test_our_dense_kernel_is_the_twin() -> None:
    options = tiny(backend=None)
    case = plan(options)[0]
    row = measure(case, options)
    reason = BACKENDS["cpu"].unavailable(case.build())
    if reason is None:
        assert row["backend"] == "cpu" and row["twin_us"] > 0 and row["over_twin"] > 0
    else:
        assert row["twin_us"] is None and row["notes"]["twin"] == reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_on_a_gpu(dtype: str) -> None:
    options = tiny(device="cuda", hidden=(64,), envs=(16,), dtype=dtype)
    for case in plan(options):
        row = measure(case, options)
        assert row["error"] is None and row["us"] > 0 and row["torch_us"] > 0 and row["cold"]["us"] > 0 and row["shared_us"] > 0


# --- command -------------------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_json(capfd) -> None:
    assert main(["bench", "inference", *TINY]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    found = json.loads(lines[-1])
    assert set(found) == {"rows", "machine", "threads"} and found["threads"] == 1 and err == ""
    assert [row["op"] for row in found["rows"]] == ["layer", "policy"]
    assert found["machine"]["torch"] == torch.__version__ and f"torch {torch.__version__}" in lines[0] and "1 thread;" in lines[0]
    assert any("eager" in line and "twin" in line for line in lines)  # the head of the table
    assert any(line.startswith("layer, 1 rows per agent: ") and "x over torch" in line for line in lines)
    assert any(line.startswith("ours is the backend dense;") for line in lines)


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (9999.0, True)])
def test_command_warns_of_a_busy_machine(capfd, monkeypatch, load: float, busy: bool) -> None:
    import k24.bench

    monkeypatch.setattr(k24.bench, "machine", lambda device: {**machine(device), "load": load})
    assert main(["bench", "inference", *TINY, "--op", "layer"]) == 0
    assert ("the cores are busy" in capfd.readouterr().out) == busy


def test_command_fails_after_printing_what_is_wrong(capfd, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "dense", wrong_backend(lambda y: y + 1))
    assert main(["bench", "inference", *TINY]) == 1
    out, err = capfd.readouterr()
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert len(rows) == 2 and all(row["us"] is None and row["error"] for row in rows)
    assert err.startswith("k24: 2 of 2 cases are wrong; layer H=8 A=2 B=1: dense differs from the reference by 1.0e+00")
    assert err.count("\n") == 1


def test_an_interrupted_command_prints_what_it_has(capfd, monkeypatch) -> None:
    import k24.bench

    def stopped(case, options, compiled):
        if case.op == "policy":
            raise KeyboardInterrupt
        return measure(case, options, compiled)

    monkeypatch.setattr(k24.bench, "measure", stopped)
    assert main(["bench", "inference", *TINY]) == 130
    out, err = capfd.readouterr()
    assert [row["op"] for row in json.loads(out.splitlines()[-1])["rows"]] == ["layer"]
    assert err == "k24: stopped after 1 of 2 cases\n"


@pytest.mark.parametrize(("flag", "cases", "expected"), [("auto", 2, True), ("auto", 6, False), ("on", 6, True), ("off", 2, False)])
def test_torch_compile_runs_for_few_cases_or_when_asked(capfd, monkeypatch, flag: str, cases: int, expected: bool) -> None:
    import k24.bench

    asked = []

    def noted(case, options, compiled):
        asked.append(compiled)
        raise KeyboardInterrupt

    monkeypatch.setattr(k24.bench, "measure", noted)
    envs = [str(k + 1) for k in range(cases // 2)]
    at = TINY.index("--envs") + 1
    main(["bench", "inference", *TINY[:at], *envs, *TINY[at + 1 :], "--compile", flag])
    assert asked == [expected]
    capfd.readouterr()


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    net = made_up_net("policy", 8, 3, torch.float32, 9, 4)
    save_policy(
        tmp_path / "x.safetensors",
        net,
        PolicySpec(task="toy/matrix", algo="qmix", sharing="k24", steps=1, n_agents=3, obs_dim=9, n_actions=4),
    )
    return tmp_path / "x.safetensors"


def test_a_policy_file_is_timed(capfd, policy_file: Path) -> None:
    command = ["bench", "inference", "--policy", str(policy_file), "--envs", "1", "2", "--repeats", "1", "--compile", "off"]
    assert main([*command, "--backend", "dense"]) == 0
    rows = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["op"], row["hidden"], row["agents"], row["envs"], row["dtype"]) for row in rows] == [
        ("policy", 8, 3, 1, "fp32"),
        ("policy", 8, 3, 2, "fp32"),
    ]
    assert all(row["us"] > 0 and row["error"] is None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backend dens", "unknown backend 'dens': did you mean 'dense'?"),
        ("--dtype fp8", "invalid choice 'fp8' for argument '--dtype'. Expected one of"),
        ("--op gru", "invalid choice 'gru' for argument '--op'"),
        ("--hidden -8", "hidden (=-8) must be one or more numbers of at least 1"),
        ("--hidden 8 0", "hidden (=8 0) must be one or more numbers of at least 1"),
        ("--agents 0", "agents (=0) must be one or more numbers of at least 1"),
        ("--envs 1 -1", "envs (=1 -1) must be one or more numbers of at least 1"),
        ("--obs 0", "obs (=0) must be at least 1"),
        ("--actions -2", "actions (=-2) must be at least 1"),
        ("--threads 0", "threads (=0) must be at least 1"),
        ("--repeats 0", "repeats (=0) must be at least 1"),
        ("--device gpu", "invalid choice 'gpu' for argument '--device'"),
        ("--hiden 8", "Unrecognized options: --hiden"),
        ("--policy no.safetensors", ""),
    ],
)
def test_bad_options_are_one_line(capfd, arguments: str, message: str) -> None:
    assert main(["bench", "inference", *arguments.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"k24: {message}") and err.count("\n") == 1


def test_sizes_beside_a_policy_file_are_refused(capfd, policy_file: Path) -> None:
    assert main(["bench", "inference", "--policy", str(policy_file), "--hidden", "64"]) == 2
    assert capfd.readouterr().err == f"k24: --policy {policy_file} has its own sizes: leave --hidden out\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(capfd) -> None:
    assert main(["bench", "inference", "--device", "cuda"]) == 2
    assert capfd.readouterr().err.startswith("k24: device 'cuda' was asked for but torch finds no CUDA device")


def test_a_backend_that_cannot_run_here_is_told(capfd, monkeypatch) -> None:
    away = replace(BACKENDS["dense"], unavailable=lambda net: "it is Sunday")
    monkeypatch.setitem(BACKENDS, "dense", away)
    assert main(["bench", "inference", *TINY]) == 2
    assert capfd.readouterr().err == "k24: backend 'dense' cannot run this net here: it is Sunday\n"
    # Nobody asked for one by name: another takes its place, and the row says why.
    monkeypatch.setitem(BACKENDS, "cpu", away)
    case = plan(tiny(backend=None))[0]
    assert case.backend == "auto" and case.note == "backend 'cpu' cannot run this net here: it is Sunday"


# --- where it was measured -----------------------------------------------------------------------------------------------------


def test_header_says_where(tmp_path: Path) -> None:
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and found["isa"] and found["gpu"] is None and found["k24"]
    line = header({**found, "commit": "abc1234"}, 2)
    assert found["cpu"] in line and "2 threads" in line and line.endswith(f"k24 {found['k24']} at abc1234")
    assert " at " not in header({**found, "commit": None}, 1)
    assert timing_module._commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert timing_module._commit(tmp_path) is None  # what is there is no repository
