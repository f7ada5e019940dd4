"""A net as an ONNX graph, for those who run policies with ONNX Runtime or something else that reads the format.

The graph is put together node by node from the net's own weights, so it holds what the policy computes and nothing of how it was trained::

    obs [A, E, D], state [A, E, H]  ->  values [A, E, K], next_state [A, E, H], actions [A, E] or [A, E, U]

with ``A`` agents (fixed), ``E`` environments (free), ``D`` observation features, ``H`` hidden units, ``K`` outputs of the net and ``U``
actions. A net without a GRU has no state. ``actions`` is the policy's mode (:mod:`k24.actions`), int64 or float32; discrete ones are chosen
among all, so where some are not available, mask ``values`` and take the largest. A net of action values (``discrete``) has no ``actions``.

ONNX knows no 2:4 masks: they are multiplied in, which makes ``A`` dense float32 weights of each masked layer. A layer that all agents share
stays one initializer. A one-hot agent index is a constant, so its columns of the first layer go into that layer's bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k24.actions import KINDS
from k24.errors import UsageError
from k24.kernels import GRU, Linear, Net

if TYPE_CHECKING:
    import onnx

OPSET = 17
# The oldest version of the file format that has this opset: every runtime that knows the operators can read the file.
IR_VERSION = 8
# Protocol buffers end at 2 GiB, and with them a model in one file; the graph itself takes a few kilobytes of that.
MAX_BYTES = 2**31 - 2**20


def require_onnx() -> None:
    """Refuses early where ONNX files cannot be made.

    Raises:
        UsageError: The package ``onnx`` is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ONNX export needs the package 'onnx', which does not import ({error}): pip install 'k24[onnx]'") from error


@torch.no_grad()
def onnx_model(net: Net, agent_id: bool = False, about: Mapping[str, str] | None = None, action: str = "discrete") -> onnx.ModelProto:
    """Builds the graph.

    Args:
        net: What to run, on any device.
        agent_id: The last A inputs of the net are the agent's one-hot index: the graph takes observations without it.
        about: Names and values to store beside the graph.
        action: What the outputs mean, a key of :data:`k24.actions.KINDS`.

    Raises:
        UsageError: The package ``onnx`` is not installed, or the model is too large for one file.
    """
    require_onnx()
    from onnx import TensorProto, helper

    agents, hidden = net.n_slots, net.hidden
    blocks = [_without_index(net.blocks[0], agents), *net.blocks[1:]] if agent_id else list(net.blocks)
    nbytes = sum(4 * layer.in_features * layer.out_features * max(layer.slots) for layer in net.linears)
    if nbytes > MAX_BYTES:
        raise UsageError(f"dense weights of {agents} agents take {nbytes:,} bytes where one ONNX file holds 2 GB: leave ONNX out")
    graph = _Graph()
    x, h = "obs", "state"
    for k, block in enumerate(blocks):
        if isinstance(block, GRU):
            x = h = graph.gru(block, x, h, str(k))
        else:
            x = graph.linear(block, x, str(k))
    # The state that goes out may be the values too (a net that ends in its GRU), so both get a name of their own.
    graph.node("Identity", [x], "values")
    if hidden:
        graph.node("Identity", [h], "next_state")

    def tensor(name: str, *width: int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [agents, "envs", *width])

    width = net.in_features - agents if agent_id else net.in_features
    inputs, outputs = [tensor("obs", width)], [tensor("values", net.out_features)]
    if hidden:
        inputs.append(tensor("state", hidden))
        outputs.append(tensor("next_state", hidden))
    if action != "discrete":
        n_actions = net.out_features // KINDS[action].n_outputs(1)
        graph.mode(action, n_actions)
        outputs.append(tensor("actions", n_actions) if KINDS[action].continuous else tensor("actions", kind=TensorProto.INT64))
    model = helper.make_model(
        helper.make_graph(graph.nodes, "policy", inputs, outputs, graph.initializers),
        producer_name="k24",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, dict(about or {}))
    return model


def _without_index(block: Linear | GRU, agents: int) -> Linear | GRU:
    """The first block, with the columns that a one-hot agent index picks moved into the bias."""
    if isinstance(block, GRU):
        return GRU(_fold(block.input, agents), block.recurrent)
    return _fold(block, agents)


def _fold(layer: Linear, agents: int) -> Linear:
    weight, width = layer.effective().float(), layer.in_features - agents
    own = weight[..., width:].expand(agents, -1, -1).diagonal(dim1=0, dim2=2).t()
    return replace(layer, weight=weight[..., :width], bias=layer.bias.float() + own, codes=None)


class _Graph:
    """Nodes and initializers so far."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Tensor) -> str:
        from onnx import numpy_helper

        values = values.float() if values.is_floating_point() else values
        self.initializers.append(numpy_helper.from_array(values.cpu().contiguous().numpy(), name))
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, list(outputs), name=outputs[0], **attributes))
        return outputs[0]

    def linear(self, layer: Linear, x: str, name: str) -> str:
        """A product per slot, or one for all rows where the weight is shared."""
        weight, bias = layer.effective().transpose(1, 2), layer.bias[:, None]
        w = self.constant(f"{name}.weight", weight if len(weight) > 1 else weight[0])
        b = self.constant(f"{name}.bias", bias if len(bias) > 1 else bias[0, 0])
        y = self.node("Add", [self.node("MatMul", [x, w], f"{name}.product"), b], f"{name}.sum")
        return self.node("Relu", [y], f"{name}.relu") if layer.relu else y

    def gru(self, block: GRU, x: str, h: str, name: str) -> str:
        """The equations of :mod:`k24.sparse.gru`; the gates r and z go together as far as they can."""
        sizes = self.constant(f"{name}.sizes", torch.tensor([2 * block.hidden, block.hidden]))
        x_rz, x_n, h_rz, h_n = (f"{name}.{part}" for part in ("x_rz", "x_n", "h_rz", "h_n"))
        self.node("Split", [self.linear(block.input, x, f"{name}.input"), sizes], x_rz, x_n, axis=-1)
        self.node("Split", [self.linear(block.recurrent, h, f"{name}.recurrent"), sizes], h_rz, h_n, axis=-1)
        rz = self.node("Sigmoid", [self.node("Add", [x_rz, h_rz], f"{name}.gates")], f"{name}.rz")
        r, z = f"{name}.r", f"{name}.z"
        self.node("Split", [rz], r, z, axis=-1)
        reset = self.node("Mul", [r, h_n], f"{name}.reset")
        n = self.node("Tanh", [self.node("Add", [x_n, reset], f"{name}.candidate")], f"{name}.n")
        kept = self.node("Mul", [z, self.node("Sub", [h, n], f"{name}.difference")], f"{name}.kept")
        return self.node("Add", [n, kept], f"{name}.next")

    def mode(self, action: str, n_actions: int) -> None:
        """The best or likeliest action, as :mod:`k24.actions` has it."""
        if not KINDS[action].continuous:
            self.node("ArgMax", ["values"], "actions", axis=-1, keepdims=0)
        elif action == "gaussian":
            sizes = self.constant("moments.sizes", torch.tensor([n_actions, n_actions]))
            self.node("Split", ["values", sizes], "means", "spreads", axis=-1)
            self.node("Tanh", ["means"], "actions")
        else:
            self.node("Tanh", ["values"], "actions")
