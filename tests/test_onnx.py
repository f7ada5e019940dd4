"""The ONNX graph: what torch computes, in every scheme, over steps and environments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import last_json
from test_export import some_sequence
from test_nets import some_net
from test_train import BASE

from k24 import onnx as onnx_module
from k24.actions import KINDS
from k24.cli import main
from k24.errors import UsageError
from k24.evaluate import load_run
from k24.export import DTYPES, net_of
from k24.kernels import GRU, Linear, Net, prepare
from k24.nets import AgentNet
from k24.onnx import onnx_model
from k24.policy import Policy, PolicySpec
from k24.sharing import SCHEMES, make_sharing
from k24.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(BASE, folder)
    return folder


def session(model: Any) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def checked_model(net: Net, agent_id: bool = False, action: str = "discrete") -> Any:
    onnx = pytest.importorskip("onnx")
    model = onnx_model(net, agent_id, action=action)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("agent_id", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_onnx_computes_what_torch_does(name: str, agent_id: bool) -> None:
    agent_net = some_net(name, agent_id)
    run = session(checked_model(net_of(agent_net), agent_id))
    weights = agent_net.snapshot("deploy")
    for rows in (1, 7):
        obs = some_sequence(agent_net, 6, rows)
        h = torch.randn(3, rows, 8)
        expected, after = agent_net(weights, obs, h)
        state = h.numpy()
        for t in range(obs.shape[1]):
            values, state = run.run(["values", "next_state"], {"obs": obs[:, t].numpy(), "state": state})
            assert torch.allclose(torch.from_numpy(values), expected[:, t], rtol=0, atol=1e-5)
        assert torch.allclose(torch.from_numpy(state), after, rtol=0, atol=1e-5)


def test_onnx_names_and_shapes() -> None:
    model = checked_model(net_of(some_net("k24", True)), True)
    run = session(model)
    assert [(v.name, v.shape) for v in run.get_inputs()] == [("obs", [3, "envs", 5]), ("state", [3, "envs", 8])]
    assert [(v.name, v.shape) for v in run.get_outputs()] == [("values", [3, "envs", 4]), ("next_state", [3, "envs", 8])]
    assert model.opset_import[0].version == 17


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("action", [name for name in KINDS if name != "discrete"])
def test_onnx_acts_as_the_policy_does(action: str, recurrent: bool) -> None:
    """Its actions are the mode of every kind, over steps; a net without a GRU has no state."""
    n_actions = 2 if action == "gaussian" else 4
    agent_net = AgentNet(5, 4, 8, 3, make_sharing("k24", 3), agent_id=True, recurrent=recurrent)
    for layer in agent_net.layers.values():
        torch.nn.init.zeros_(layer.bias)  # so that the likeliest action is not always the same
    net, spec = net_of(agent_net), PolicySpec("t/t", "a", "k24", 0, 3, 5, n_actions, True, action)
    run, policy = session(checked_model(net, True, action)), Policy(net, spec, "reference")
    continuous = KINDS[action].continuous
    expected = [("values", [3, "envs", 4]), ("next_state", [3, "envs", 8]), ("actions", [3, "envs", *([n_actions] if continuous else [])])]
    assert [(v.name, v.shape) for v in run.get_outputs()] == [e for e in expected if recurrent or e[0] != "next_state"]
    assert [v.name for v in run.get_inputs()] == (["obs", "state"] if recurrent else ["obs"])
    state, given = None, torch.zeros(3, 6, 8).numpy()
    for obs in some_sequence(agent_net, 4, 6).transpose(0, 1):
        values, _ = policy.outputs(obs, state)
        actions, state = policy.act(obs, state)
        found = run.run(None, {"obs": obs.numpy()} | ({"state": given} if recurrent else {}))
        given = found[1]
        torch.testing.assert_close(torch.from_numpy(found[0]), values, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(found[-1]), actions, rtol=0, atol=1e-5)
    assert len(actions.unique()) > 1


def test_what_all_agents_share_is_in_the_graph_once() -> None:
    def weights(name: str) -> list[list[int]]:
        graph = checked_model(net_of(some_net(name))).graph
        return [list(i.dims) for i in graph.initializer if i.name.endswith("weight")]

    shared = [[5, 8], [8, 24], [8, 24], [8, 8], [8, 8], [8, 4]]
    assert weights("fups") == shared
    assert weights("k24_shared")[1:] == shared[1:]
    assert weights("nops")[1:] == [[3, *dims] for dims in shared][1:]
    assert weights("k24")[1:] == [*shared[1:-1], [3, 8, 4]], "what lies between the first and the last layer"


def some_linear(out: int, inputs: int, slots: int, masked: bool, relu: bool = False) -> Linear:
    codes = torch.randint(6, (slots, out, inputs // 4), dtype=torch.uint8) if masked else None
    weight = torch.randn(1 if masked else slots, out, inputs)
    return Linear(weight, torch.randn(slots, out), codes, relu=relu)


@pytest.mark.parametrize("masked", [False, True])
def test_onnx_of_one_layer_has_no_state(masked: bool) -> None:
    net = Net((some_linear(6, 8, 3, masked, relu=True),), 3)
    run = session(checked_model(net))
    assert [v.name for v in run.get_inputs()] == ["obs"] and [v.name for v in run.get_outputs()] == ["values"]
    x = torch.randn(3, 4, 8)
    (values,) = run.run(None, {"obs": x.numpy()})
    assert torch.allclose(torch.from_numpy(values), prepare(net, "reference")(x)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx_of_a_gru_alone(dtype: str) -> None:
    """Its values are its state, the index goes into the gates, and weights of any type come out as float32."""
    gru = GRU(some_linear(12, 8, 3, True), some_linear(12, 4, 3, True))
    net = Net((gru,), 3).map(lambda layer: dataclasses.replace(layer, weight=layer.weight.to(DTYPES[dtype])))
    run = session(checked_model(net, agent_id=True))
    x, h = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    values, state = run.run(None, {"obs": x.numpy(), "state": h.numpy()})
    full = torch.cat([x, torch.eye(3)[:, None].expand(-1, 2, -1)], -1)
    assert torch.allclose(torch.from_numpy(values), prepare(net, "reference")(full, h)[0], atol=1e-5)
    assert (values == state).all()


def test_onnx_of_a_run(finished, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    out, graph = tmp_path / "p.safetensors", tmp_path / "deep" / "p.onnx"
    assert main(["export", str(finished), "--out", str(out), "--onnx", str(graph), "--dtype", "fp16"]) == 0
    assert last_json(capsys.readouterr().out)["onnx"] == str(graph)
    model = onnx.load(graph)
    assert {p.key: p.value for p in model.metadata_props} == {
        "task": "toy/memory",
        "algo": "qmix",
        "sharing": "k24",
        "steps": "320",
        "action": "discrete",
    }
    run, agent_net = session(model), load_run(finished).learner.net
    obs = some_sequence(agent_net, 1)
    expected, _ = agent_net(agent_net.snapshot("deploy"), obs, agent_net.initial_state(5))
    values, _ = run.run(None, {"obs": obs[:, 0].numpy(), "state": agent_net.initial_state(5).numpy()})
    assert torch.allclose(torch.from_numpy(values), expected[:, 0], rtol=0, atol=1e-5), "float32 whatever the type of the policy"


def test_onnx_that_is_too_large(monkeypatch) -> None:
    monkeypatch.setattr(onnx_module, "MAX_BYTES", 1000)
    with pytest.raises(UsageError, match=r"dense weights of 3 agents take 2,912 bytes where one ONNX file holds 2 GB: leave ONNX out"):
        onnx_model(net_of(some_net("k24", False)))
