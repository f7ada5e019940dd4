"""A run into a file: the same policy in every scheme and type, and nothing half-written whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import contents, last_json, refused
from test_nets import some_net
from test_train import BASE, change, stop_after
from torch import Tensor

from k24 import export as export_module
from k24 import files
from k24.actions import KINDS
from k24.artifact import layer_names
from k24.cli import main
from k24.envs import EnvSpec, make_env
from k24.errors import UsageError
from k24.evaluate import PolicyActor, load_run, open_policy, play
from k24.export import DTYPES, export_run, net_of
from k24.kernels import prepare
from k24.learners import PPOConfig, TD3Config
from k24.nets import AgentNet
from k24.policy import PolicySpec, load_policy, save_policy
from k24.sharing import SCHEMES, K24Config, SharingConfig, make_sharing
from k24.sparse import MaskedLinear
from k24.sparse.slots import SlotRule, by_unit_type
from k24.train import train

SHORT = change(steps=96)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run whose masks are frozen; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(BASE, folder)
    return folder


def some_sequence(net: AgentNet, steps: int = 4, rows: int = 5) -> Tensor:
    return torch.randn(net.n_agents, steps, rows, net.obs_dim, dtype=next(net.parameters()).dtype)


def with_index(net: AgentNet, obs: Tensor) -> Tensor:
    """What the net is given at one step: observations, and the agent's index where it wants that."""
    ids = torch.eye(net.n_agents, dtype=obs.dtype)[:, None].expand(-1, obs.shape[1], -1)
    return torch.cat([obs, ids], -1) if net.agent_id else obs


def patched_run(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, value: float) -> None:
    """Makes ``export_run`` meet a run with another value somewhere in a parameter."""

    def load(path: Path) -> Any:
        run = load_run(path)
        with torch.no_grad():
            dict(run.learner.net.named_parameters())[name].view(-1)[-1] = value
        return run

    monkeypatch.setattr(export_module, "load_run", load)


# --- the net that is deployed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masks", [{}, {"mask_rnn": False}, {"pattern": "1:4"}, {"pattern": "4:8"}], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_deployed_net_is_the_policy_that_was_trained(name: str, masks: dict, frozen: bool) -> None:
    agent_net = some_net(name, **masks).double()
    for layer in agent_net.layers.values():
        if frozen and isinstance(layer, MaskedLinear):
            layer.freeze()
    obs = some_sequence(agent_net)
    h = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        expected, after = agent_net(agent_net.snapshot("deploy"), obs, h)
    net = net_of(agent_net)
    assert net.masked == name.startswith("k24")
    run = prepare(net, "reference")
    for t in range(obs.shape[1]):
        values, h = run(with_index(agent_net, obs[:, t]), h)
        assert torch.allclose(values, expected[:, t], rtol=0, atol=1e-12)
    assert torch.allclose(h, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("agent_id", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_deployed_net_without_recurrence(name: str, agent_id: bool) -> None:
    """Its state has no units and goes round like any other."""
    sharing = make_sharing(name, 3, SharingConfig(masks=K24Config(hetero_init_scale=1.0)))
    agent_net = AgentNet(5, 4, 8, 3, sharing, agent_id, recurrent=False).double()
    sharing.resample(0.3)
    obs, h = some_sequence(agent_net), agent_net.initial_state(5)
    with torch.no_grad():
        expected, _ = agent_net(agent_net.snapshot("deploy"), obs, h)
    net = net_of(agent_net)
    assert layer_names(net) == list(agent_net.layers) == ["fc1", "fc2", "fc3"]
    assert [layer.relu for layer in net.linears] == [True, True, False] and net.hidden == 0
    run = prepare(net, "reference")
    for t in range(obs.shape[1]):
        values, h = run(with_index(agent_net, obs[:, t]), h)
        assert h.shape == (3, 5, 0)
        assert torch.allclose(values, expected[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("obs_dim", [1, 2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ["k24", "k24_random", "k24_shared"])
def test_codes_of_padded_groups_are_legal(name: str, obs_dim: int) -> None:
    net = net_of(AgentNet(obs_dim, 3, 6, 2, make_sharing(name, 2), agent_id=False))
    for place, layer in enumerate(net.linears):
        own = name != "k24_shared" and place in (0, len(net.linears) - 1)
        assert layer.codes is not None and len(layer.codes) == (2 if own else 1)
        legal = layer.patterns.legal(layer.in_features)
        assert all(bool(legal[code, group]) for codes in layer.codes for row in codes for group, code in enumerate(row.tolist()))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_deployed_net_stays_when_training_goes_on(name: str) -> None:
    agent_net = some_net(name)
    net = net_of(agent_net)
    held = [t for layer in net.linears for t in (layer.weight, layer.bias, layer.codes) if t is not None]
    before = [t.clone() for t in held]
    with torch.no_grad():
        for tensor in [*agent_net.parameters(), *agent_net.buffers()]:
            tensor.add_(1) if tensor.dtype != torch.bool else tensor.fill_(True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(held, before, strict=True))


# --- the file ----------------------------------------------------------------------------------------------------------------------


def test_export_prints_what_it_wrote(finished, tmp_path, capsys):
    out = tmp_path / "not" / "there" / "policy.safetensors"
    assert main(["export", str(finished), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = last_json(printed)
    # Three observations and the index of two agents, hidden 8, 2 actions: the weights of six layers, and their biases.
    dense = 4 * (5 * 8 + 2 * 8 * 24 + 2 * 8 * 8 + 8 * 2 + 8 + 24 + 24 + 8 + 8 + 2)
    assert found == {
        "policy": str(out),
        "bytes": out.stat().st_size,
        "dense_bytes": dense,
        "agents": 2,
        "steps": 320,
        "planned": 320,
        "dtype": "fp32",
        "onnx": None,
    }
    assert f"{out.stat().st_size:,} bytes" in printed and f"({dense:,} bytes)" in printed
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_says_what_it_is_and_holds_the_policy(finished, tmp_path, dtype):
    done = export_run(finished, tmp_path / "p.safetensors", dtype)
    policy, run = load_policy(done.policy, backend="reference"), load_run(finished)
    agent_net = run.learner.net
    assert policy.spec == PolicySpec("toy/memory", "qmix", "k24", 320, 2, 3, 2, agent_net.agent_id)
    assert policy.net.dtype == DTYPES[dtype]
    obs = some_sequence(agent_net)
    expected, _ = agent_net(agent_net.snapshot("deploy"), obs, agent_net.initial_state(5))
    state, error = None, 0.0
    for t in range(obs.shape[1]):
        values, state = policy.outputs(obs[:, t], state)
        error = max(error, float((values - expected[:, t]).abs().max()))
    scale = float(expected.detach().abs().max())
    assert error < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[dtype] * max(scale, 1)
    assert (error > 1e-6) == (dtype != "fp32")


def test_a_run_that_is_not_frozen_gives_its_most_likely_masks(tmp_path):
    train(BASE, tmp_path / "run", should_stop=stop_after(4))
    run = load_run(tmp_path / "run")
    masked = [layer for layer in run.learner.net.layers.values() if isinstance(layer, MaskedLinear)]
    assert masked and not any(bool(layer.frozen) for layer in masked)
    export_run(tmp_path / "run", tmp_path / "p.safetensors")
    net = load_policy(tmp_path / "p.safetensors").net
    for layer, written in zip(run.learner.net.layers.values(), net.linears, strict=True):
        assert torch.equal(written.codes, layer.best_codes())
        kept = layer.patterns.mask(layer.best_codes(), layer.in_features).amax(0) if layer.n_slots == 1 else torch.ones(())
        assert torch.equal(written.weight[0], layer.weight * kept)


def test_an_older_file_is_replaced(finished, tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"older")
    export_run(finished, out, "bf16")
    assert load_policy(out).spec.steps == 320 and contents(tmp_path).keys() == {"p.safetensors"}


@pytest.mark.parametrize("agents", [3, 8])
def test_a_team_costs_little_more_than_one_dense_network(tmp_path, agents):
    """The promise: at hidden 128 in float32, 1 + 0.035·A times one dense network; separate networks cost A of them."""
    sizes = {}
    for name in ("k24", "nops", "fups_id"):
        agent_net = AgentNet(18, 5, 128, agents, make_sharing(name, agents), agent_id=True)
        spec = PolicySpec("a/b", "qmix", name, 0, agents, 18, 5, agent_id=True)
        save_policy(tmp_path / name, net_of(agent_net), spec)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["k24"] <= (1 + 0.035 * agents) * sizes["fups_id"]
    assert sizes["nops"] == pytest.approx(agents * sizes["fups_id"], rel=0.02)


# --- eval and inspect of a file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["k24", "k24_shared", "kaleidoscope", "fups_id", "nops"])
def test_a_file_plays_as_the_run_does(tmp_path, capsys, sharing):
    config = change(SHORT, sharing=sharing, env_args=("n_agents=3", "n_cues=3"))
    train(config, tmp_path / "run")
    out = tmp_path / "p.safetensors"
    export_run(tmp_path / "run", out)
    results = []
    for source in ([tmp_path / "run"], [out], [out, "--random"]):
        assert main(["eval", *map(str, source), "--episodes", "100", "--device", "cpu"]) == 0
        results.append(last_json(capsys.readouterr().out))
    assert results[0] == results[1]
    assert results[2]["policy"] == "random"
    capsys.readouterr()
    found = []
    for source in (tmp_path / "run", out):
        assert main(["inspect", str(source)]) == 0
        found.append(last_json(capsys.readouterr().out))
    trained, deployed = (one.pop("params") for one in found)
    assert found[0] == found[1]
    assert deployed < trained if sharing in ("k24", "k24_shared", "kaleidoscope") else deployed == trained
    # The file is the bytes that were counted, and a header.
    assert found[1]["bytes"] < out.stat().st_size < found[1]["bytes"] + 4096


# Of each algorithm and kind of net: its settings, and the kind of policy that comes of it.
TRAINED = {
    "ippo categorical": ("toy/memory", "ippo", PPOConfig(epochs=2), "categorical"),
    "mappo feed-forward": ("toy/memory", "mappo", PPOConfig(epochs=2, recurrent=False), "categorical"),
    "ippo gaussian": ("toy/reach", "ippo", PPOConfig(epochs=2), "gaussian"),
    "mappo gaussian feed-forward": ("toy/reach", "mappo", PPOConfig(epochs=2, recurrent=False), "gaussian"),
    "matd3": ("toy/reach", "matd3", TD3Config(batch_size=8, warmup=16), "deterministic"),
}


@pytest.mark.parametrize("which", TRAINED)
def test_a_file_of_every_algorithm_plays_as_the_run_does(tmp_path, capsys, which):
    task, algo, learner, action = TRAINED[which]
    train(dataclasses.replace(SHORT, task=task, algo=algo, learner=learner), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "p.safetensors")
    policy, run = load_policy(tmp_path / "p.safetensors"), load_run(tmp_path / "run")
    assert policy.spec.action == action == run.learner.kind
    assert policy.spec.n_actions == run.learner.spec.n_actions and policy.spec.n_outputs == run.learner.net.n_outputs
    assert (policy.net.hidden > 0) == run.learner.net.recurrent
    found = []
    for source in ("run", "p.safetensors"):
        assert main(["eval", str(tmp_path / source), "--episodes", "20", "--device", "cpu"]) == 0
        found.append(last_json(capsys.readouterr().out))
    assert found[0].pop("return_mean") == pytest.approx(found[1].pop("return_mean"), abs=1e-5)
    assert all(found[0][name] == found[1][name] for name in ("episodes", "steps", "policy"))


def reaching(folder: Path, action: str, n_actions: int = 1, task: str = "toy/reach", **args: int) -> Path:
    """A policy file of any kind for a game of two agents that see two numbers."""
    agent_net = AgentNet(2, KINDS[action].n_outputs(n_actions), 8, 2, make_sharing("k24", 2), agent_id=True, recurrent=False)
    env_args = tuple(f"{name}={value}" for name, value in args.items())
    save_policy(folder / "p.safetensors", net_of(agent_net), PolicySpec(task, "a", "k24", 7, 2, 2, n_actions, True, action, env_args))
    return folder / "p.safetensors"


@pytest.mark.parametrize("action", ["gaussian", "deterministic"])
def test_a_file_of_continuous_actions_plays(tmp_path, capsys, action):
    file = reaching(tmp_path, action)
    for more in ([], ["--random"]):
        assert main(["eval", str(file), "--episodes", "40", "--device", "cpu", *more]) == 0
        found = last_json(capsys.readouterr().out)
        assert found["episodes"] == 40 and found["return_mean"] < 1 and found["policy"] == ("random" if more else "a-k24")
        spread = found["return_ci95"][1] - found["return_ci95"][0]
        assert (spread > 0) == bool(more), "the game is without chance, and so is the policy"


def test_a_file_can_be_played_by_draws(tmp_path):
    player = open_policy(reaching(tmp_path, "gaussian"))
    assert player.policy is not None
    with contextlib.closing(player.make_env(30)) as env:
        found = [
            play(PolicyActor(player.policy, sample=True, generator=torch.Generator().manual_seed(seed)), env, 30).returns
            for seed in (1, 1, 2)
        ]
        best = play(player.actor, env, 30).returns
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len(found[0].unique()) == 30 and len(best.unique()) == 1
    player = open_policy(reaching(tmp_path, "deterministic"))
    assert player.policy is not None
    with contextlib.closing(player.make_env(2)) as env, pytest.raises(UsageError, match="a deterministic policy has no distribution"):
        play(PolicyActor(player.policy, sample=True), env, 2)


@pytest.mark.parametrize(
    ("action", "n_actions", "task", "message"),
    [
        ("discrete", 1, "toy/reach", "gives discrete actions (a discrete policy), and toy/reach takes continuous ones here"),
        ("categorical", 1, "toy/reach", "gives discrete actions (a categorical policy), and toy/reach takes continuous ones here"),
        ("gaussian", 2, "toy/specialisation", "gives continuous actions (a gaussian policy), and toy/specialisation takes discrete"),
        ("gaussian", 2, "toy/reach", "= (2, 2, 2), and toy/reach has (2, 2, 1) here: give the arguments it was trained with"),
    ],
)
def test_a_file_of_the_wrong_kind_of_action_is_refused(tmp_path, capfd, action, n_actions, task, message):
    file = reaching(tmp_path, action, n_actions, task)
    assert message in refused(capfd, "eval", str(file), "--episodes", "4")


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_a_backend_can_be_chosen(finished, tmp_path, capsys, backend):
    export_run(finished, tmp_path / "p.safetensors")
    assert main(["eval", str(tmp_path / "p.safetensors"), "--backend", backend, "--episodes", "64", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"64 episodes, {backend})" in out
    assert main(["eval", str(finished), "--episodes", "64", "--device", "cpu"]) == 0
    assert last_json(out) == last_json(capsys.readouterr().out)


def test_a_file_cannot_play_a_task_of_other_sizes(finished, tmp_path, capfd):
    export_run(finished, tmp_path / "p.safetensors")
    said = refused(capfd, "eval", str(tmp_path / "p.safetensors"), "--task", "toy/specialisation")
    assert "is for toy/memory with" in said and said.endswith("here: a policy plays what has the sizes of its own task")


def test_an_unfinished_policy_is_called_so(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--out", str(tmp_path / "p.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "unfinished policy" not in out and (last_json(out)["steps"], last_json(out)["planned"]) == (320, 320)
    longer = tmp_path / "longer"
    shutil.copytree(finished, longer)
    config = longer / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("steps: 320", "steps: 6400"), encoding="utf-8")
    assert main(["export", str(longer), "--out", str(tmp_path / "p.safetensors")]) == 0
    assert "trained for 320 of 6,400 steps: an unfinished policy" in capsys.readouterr().out


def test_a_file_can_be_drawn(finished, tmp_path, capsys):
    export_run(finished, tmp_path / "p.safetensors", "bf16")
    assert main(["inspect", str(tmp_path / "p.safetensors"), "--png", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "toy/memory  qmix-k24  step 320" in out and "gru_recurrent" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_of_a_file_leaves_the_training_stack_alone(finished, tmp_path):
    export_run(finished, tmp_path / "p.safetensors")
    program = """
import sys
from k24.cli import main
assert main(["inspect", sys.argv[1]]) == 0
print(sorted(name for name in sys.modules if name.startswith("k24.")))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "p.safetensors")], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "k24.artifact" in loaded
    for part in ("nets", "sharing", "learners", "envs", "config", "checkpoint", "evaluate", "export"):
        assert f"'k24.{part}" not in loaded, part


# --- bad input: one line, status 2, nothing left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export", "RUN is missing; 'k24 export --help' lists the options"),
        ("export RUN", "--out is missing; 'k24 export --help' lists the options"),
        ("export nowhere --out p.safetensors", "nowhere is no run folder (it has no config.yaml): give one that 'k24 train' made"),
        ("export . --out p.safetensors", ". is no run folder"),
        ("export file --out p.safetensors", "file is no run folder"),
        ("export EMPTY --out p.safetensors", "EMPTY has no checkpoint yet: train longer, or resume it with --resume"),
        ("export RUN --out p.pt", "--out p.pt must end in .safetensors: for example --out policy.safetensors"),
        ("export RUN --out p", "--out p must end in .safetensors"),
        ("export RUN --out folder.safetensors", "--out folder.safetensors is a folder: give the name of a file"),
        ("export RUN --out p.safetensors --onnx p.pb", "--onnx p.pb must end in .onnx: for example --onnx policy.onnx"),
        ("export RUN --out p.safetensors --onnx folder.onnx", "--onnx folder.onnx is a folder"),
        (
            "export RUN --out p.safetensors --dtype fp8",
            "invalid choice 'fp8' for argument '--dtype'. Expected one of ('fp32', 'bf16', 'fp16')",
        ),
        ("export RUN --out file/p.safetensors", "cannot write file/p.safetensors (Not a directory): choose another place"),
        ("export RUN --out p.safetensors --onnx file/p.onnx", "cannot write file/p.onnx (Not a directory): choose another place"),
        ("export RUN --out /proc/p.safetensors", "cannot write /proc/p.safetensors (No such file or directory): choose another place"),
        ("export RUN --out /dev/null/p.safetensors", "cannot write /dev/null/p.safetensors (Not a directory): choose another place"),
        ("eval nothing.safetensors", "policy file 'nothing.safetensors' cannot be read (No such file or directory)"),
        ("eval file", "policy file 'file': is empty"),
        ("eval folder.safetensors", "folder.safetensors is no run folder"),
        ("eval RUN --backend dense", "--backend dense needs a policy file: RUN is a run, export it with 'k24 export' first"),
        ("eval RUN --env-args a=1", "--env-args needs a policy file"),
        ("eval GOOD.safetensors --masks sampled", "--masks sampled needs a run: a policy file holds its most likely masks alone"),
        ("eval GOOD.safetensors --backend dnse", "unknown backend 'dnse': did you mean 'dense'?"),
        ("eval GOOD.safetensors --env-args a", "env_args 'a' is not of the form name=value"),
        ("eval GOOD.safetensors --env-args n_cue=3", "unknown option of toy/memory 'n_cue': did you mean 'n_cues'?"),
        (
            "eval GOOD.safetensors --env-args n_cues=4",
            "GOOD.safetensors is for toy/memory with (agents, observation, actions) = (2, 3, 2), and toy/memory has (2, 5, 4) here: give",
        ),
        ("eval OTHER.safetensors", "OTHER.safetensors was trained on 'some/game', which is none of k24's own tasks"),
        ("inspect nothing.safetensors", "policy file 'nothing.safetensors' cannot be read (No such file or directory)"),
        ("inspect file", "policy file 'file': is empty"),
    ],
)
def test_bad_input_is_one_line(capfd, tmp_path, monkeypatch, finished, arguments, message):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    os.symlink(finished, "RUN")
    shutil.copytree(finished, "EMPTY", ignore=shutil.ignore_patterns("checkpoints"))
    Path("file").write_bytes(b"")
    for name in ("folder.safetensors", "folder.onnx"):
        Path(name).mkdir()
    if "GOOD" in arguments:
        export_run(finished, Path("GOOD.safetensors"))
    if "OTHER" in arguments:
        agent_net = AgentNet(3, 2, 4, 2, make_sharing("k24", 2), agent_id=False)
        save_policy(Path("OTHER.safetensors"), net_of(agent_net), PolicySpec("some/game", "qmix", "k24", 0, 2, 3, 2))
    before = contents(tmp_path)
    found = refused(capfd, *arguments.split())
    assert found.startswith(message), found
    assert contents(tmp_path) == before


def test_onnx_without_its_package(capfd, tmp_path, monkeypatch, finished):
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = refused(capfd, "export", str(finished), "--out", str(tmp_path / "p.safetensors"), "--onnx", str(tmp_path / "p.onnx"))
    assert found.startswith("ONNX export needs the package 'onnx', which does not import (")
    assert found.endswith("): pip install 'k24[onnx]'")
    assert contents(tmp_path) == {}
    assert main(["export", str(finished), "--out", str(tmp_path / "p.safetensors")]) == 0, "it is needed for nothing else"
    capfd.readouterr()


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("layers.fc2.weight", float("nan"), "fp32", "layers.fc2.weight of {run} holds NaN or infinity: delete its newest checkpoint"),
        ("layers.fc4.bias", float("inf"), "bf16", "layers.fc4.bias of {run} holds NaN or infinity"),
        ("layers.gru_input.alpha", float("nan"), "fp32", "layers.gru_input.alpha of {run} holds NaN or infinity"),
        (
            "layers.gru_recurrent.weight",
            7e4,
            "fp16",
            "layer gru_recurrent has a weight of 7e+04, and fp16 ends at 6.55e+04: use --dtype fp32",
        ),
        ("layers.fc1.weight", -3.4e38, "bf16", "layer fc1 has a weight of 3.4e+38, and bf16 ends at 3.39e+38: use --dtype fp32"),
    ],
)
def test_weights_that_no_file_can_hold(capfd, tmp_path, monkeypatch, finished, name, value, dtype, message):
    patched_run(monkeypatch, finished, name, value)
    found = refused(capfd, "export", str(finished), "--out", str(tmp_path / "p.safetensors"), "--dtype", dtype)
    assert found.startswith(message.format(run=finished)), found
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["Ctrl-C", "full disk"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_is_cut_short_leaves_nothing(capfd, tmp_path, monkeypatch, finished, error, function):
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"older")

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.os, function, fail)
        found = refused(capfd, "export", str(finished), "--out", str(out), status=130 if error is KeyboardInterrupt else 2)
    assert found == ("interrupted" if error is KeyboardInterrupt else f"cannot write {out} (No space left on device): choose another place")
    assert contents(tmp_path) == {"p.safetensors": b"older"}


def test_of_two_files_both_are_written_or_none(capfd, tmp_path, monkeypatch, finished):
    pytest.importorskip("onnx")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_atomically", interrupt)
    refused(capfd, "export", str(finished), "--out", f"{tmp_path}/p.safetensors", "--onnx", f"{tmp_path}/deep/p.onnx", status=130)
    assert contents(tmp_path) == {}


# --- slots that are not the agents' indices ------------------------------------------------------------------------------------------


def groups(spec: EnvSpec) -> SlotRule:
    """One slot for all."""
    return SlotRule(1, lambda obs: torch.zeros(obs.shape[:-1], dtype=torch.int64))


@pytest.fixture(scope="module", params=["yes", "no"])
def units(request, tmp_path_factory) -> Path:
    """A finished run whose slots are unit types, with and without agent indices."""
    folder = tmp_path_factory.mktemp("units") / "run"
    config = dataclasses.replace(BASE, task="toy/units", slots="unit_type", agent_id=request.param, env_args=("n_agents=4",))
    train(config, folder)
    return folder


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
def test_a_policy_of_unit_types_reads_them_from_the_observation(units, tmp_path, backend):
    export_run(units, tmp_path / "p.safetensors")
    policy, agent_net = load_policy(tmp_path / "p.safetensors", backend=backend), load_run(units).learner.net
    assert policy.spec.slots == (0, 3) and policy.spec.n_agents == 4 and policy.net.n_slots == 3
    env = make_env("toy/units", 6, n_agents=4)
    seen, state, h = env.reset(3), None, agent_net.initial_state(6)
    rule = by_unit_type(0, 3)
    for _ in range(2):
        expected, h = agent_net(agent_net.snapshot("deploy"), seen.obs[:, None], h, slots=rule.of(seen.obs)[:, None])
        values, after = policy.outputs(seen.obs, state)
        torch.testing.assert_close(values, expected[:, 0], rtol=1e-4, atol=1e-5)
        given, _ = policy.outputs(seen.obs, state, slots=rule.of(seen.obs))
        torch.testing.assert_close(given, values)
        actions, state = policy.act(seen.obs, state, avail=seen.avail)
        assert torch.equal(state, after) and seen.avail.gather(-1, actions[..., None]).all()
        last, seen = seen, env.step(actions).after
    assert bool((~last.alive).any()) and not bool(values[~last.alive].any()) and not bool(state[~last.alive].any())
    seen = last
    with pytest.raises(UsageError, match=r"obs must be \[4, envs, 4\]"):
        policy.act(torch.zeros(4, 6, 2))
    assert policy.act(torch.zeros(4, 0, 4))[0].shape == (4, 0)
    single, _ = policy.outputs(seen.obs[:, 2], slots=rule.of(seen.obs[:, 2]))
    torch.testing.assert_close(single, policy.outputs(seen.obs[:, 2:3])[0][:, 0])
    one, _ = policy.outputs(seen.obs[:, 2].numpy())
    torch.testing.assert_close(torch.from_numpy(one), policy.outputs(seen.obs[:, 2:3])[0][:, 0])


def test_run_and_file_of_unit_types_play_alike(units, tmp_path, capsys):
    file = tmp_path / "p.safetensors"
    export_run(units, file)
    found = []
    for what in (units, file):
        assert main(["eval", str(what), "--episodes", "64"]) == 0
        found.append({k: v for k, v in last_json(capsys.readouterr().out).items() if k.startswith(("return", "win"))})
    assert found[0] == found[1] and 0 <= found[0]["win_rate"] <= 1
    with pytest.raises(UsageError, match="slots go by unit_type: leave --onnx out"):
        export_run(units, file, onnx=tmp_path / "p.onnx")


def test_a_policy_of_the_users_own_slots_must_be_told_them(tmp_path):
    config = dataclasses.replace(BASE, task="toy/units", slots="test_export:groups", agent_id="no")
    train(config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "p.safetensors")
    policy = load_policy(tmp_path / "p.safetensors")
    assert policy.spec.slots == "given"
    obs = torch.randn(3, 5, 4)
    with pytest.raises(UsageError, match="say with slots whose each row is"):
        policy.act(obs)
    assert policy.act(obs, slots=torch.zeros(3, 5, dtype=torch.int64))[0].shape == (3, 5)
    with pytest.raises(UsageError, match=r"slots must be int64 \[3, 5\]"):
        policy.act(obs, slots=torch.zeros(3, dtype=torch.int64))


# --- what a file or a folder from elsewhere cannot do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["evil:make", "pettingzoo/evil:make", "pettingzoo/evil"])
def test_a_policy_file_cannot_make_k24_import_what_it_names(finished, tmp_path, monkeypatch, capfd, task):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\n")
    export_run(finished, tmp_path / "good.safetensors")
    policy = load_policy(tmp_path / "good.safetensors")
    save_policy(Path("bad.safetensors"), policy.net, dataclasses.replace(policy.spec, task=task))
    message = refused(capfd, "eval", "bad.safetensors")
    assert message.endswith(f"was trained on {task!r}, which is none of k24's own tasks: if it is code that you trust, name it with --task")
    assert not (tmp_path / "pwned").exists()
    assert main(["eval", "bad.safetensors", "--task", "toy/memory", "--episodes", "4"]) == 0


def test_looking_at_a_run_and_exporting_it_run_no_code_that_it_names(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\n")
    shutil.copytree(finished, "run")
    config = Path("run/config.yaml").read_text().replace("slots: agent", "slots: evil:rule")
    assert "evil:rule" in config
    Path("run/config.yaml").write_text(config)
    assert main(["inspect", "run"]) == 0 and main(["export", "run", "--out", "p.safetensors"]) == 0
    assert not (tmp_path / "pwned").exists()
    assert load_policy("p.safetensors").spec.slots == "given"
