"""A trained run as one file that runs without the training stack.

Training keeps scores, optimisers and replay; running needs the shared weights once and one pattern code per group and slot. Layers of other
schemes go as the dense weights they come down to, one set per slot that differs: this is what makes files comparable in size.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from k24.errors import UsageError, unknown_name
from k24.evaluate import load_run
from k24.files import write_atomically
from k24.kernels import GRU, Linear, Net
from k24.nets import AgentNet
from k24.onnx import onnx_model, require_onnx
from k24.policy import PolicySpec, save_policy
from k24.sparse.layers import MaskedLinear
from k24.sparse.slots import SlotWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        policy: The policy file.
        bytes: Its size.
        dense_bytes: Size of one dense network of the same layers and type, weights and biases alone.
        agents: Agents in the file.
        dtype: Type of its weights, a key of :data:`DTYPES`.
        steps: Environment steps that it was trained for.
        planned: Those of the whole run; while ``steps`` are fewer, masks may still change.
        onnx: The ONNX file, if one was asked for.
    """

    policy: Path
    bytes: int
    dense_bytes: int
    agents: int
    dtype: str
    steps: int
    planned: int
    onnx: Path | None = None


@torch.no_grad()
def linear_of(layer: nn.Module, relu: bool = False) -> Linear:
    """A layer that is deployed: a mask at its most likely pattern, or the weights of each slot.

    Args:
        layer: A layer of any sharing scheme, frozen or not.
        relu: Whether a ReLU follows.

    Returns:
        It as kernels take it, sharing no memory with it.
    """
    if isinstance(layer, MaskedLinear):
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        return Linear(layer.weight.clone()[None], bias.clone()[None], layer.best_codes().clone(), layer.patterns, relu)
    made: SlotWeights = layer.materialise("deploy")  # type: ignore[operator]
    return Linear(made.weight.clone(), made.bias.clone(), relu=relu)


@torch.no_grad()
def net_of(agent_net: AgentNet) -> Net:
    """The net that is deployed: every mask at its most likely pattern.

    Args:
        agent_net: A net of any sharing scheme, frozen or not, recurrent or not.

    Returns:
        Its layers as kernels take them, sharing no memory with it.
    """
    assert not agent_net.layer_norm, "a Net has no layer norm; critics have, and are not exported"
    names = [name for name in agent_net.layers if name != "gru_recurrent"]
    layers = agent_net.layers
    blocks = [
        GRU(linear_of(layers[name]), linear_of(layers["gru_recurrent"]))
        if name == "gru_input"
        else linear_of(layers[name], relu=name != names[-1])
        for name in names
    ]
    return Net(tuple(blocks), agent_net.n_slots)


def export_run(folder: Path, out: Path, dtype: str = "fp32", onnx: Path | None = None) -> Exported:
    """Writes the newest policy of a run; files take their names once all are written.

    Args:
        folder: Run folder.
        out: Policy file, ``*.safetensors``; replaced if there is one.
        dtype: Type of its weights, a key of :data:`DTYPES`.
        onnx: Also an ONNX file, ``*.onnx``, in float32.

    Raises:
        UsageError: The run cannot be read, a weight is NaN or too large for ``dtype``, or a file cannot be written.
        CheckpointError: The newest checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    _check_name(out, ".safetensors", "--out")
    if onnx is not None:
        _check_name(onnx, ".onnx", "--onnx")
        require_onnx()
    run = load_run(folder)
    agent_net, rule = run.learner.net, run.learner.rule
    if onnx is not None and run.config.slots != "agent":
        raise UsageError(f"an ONNX file holds one policy per agent, and here slots go by {run.config.slots}: leave --onnx out")
    for name, parameter in agent_net.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UsageError(f"{name} of {folder} holds NaN or infinity: delete its newest checkpoint to export the one before")
    net = net_of(agent_net)
    spec = PolicySpec(
        task=run.config.task,
        algo=run.config.algo,
        sharing=run.config.sharing,
        steps=run.steps,
        n_agents=agent_net.n_agents,
        obs_dim=agent_net.obs_dim,
        n_actions=run.learner.spec.n_actions,
        agent_id=agent_net.agent_id,
        action=run.learner.kind,
        env_args=run.config.env_args,
        slots="agent" if run.config.slots == "agent" else rule.unit_types or "given",
    )
    typed = _as_type(net, list(agent_net.layers), dtype)
    with contextlib.ExitStack() as files:
        save_policy(files.enter_context(_whole(out)), typed, spec)
        if onnx is not None:
            about = {"task": spec.task, "algo": spec.algo, "sharing": spec.sharing, "steps": str(spec.steps), "action": spec.action}
            graph = onnx_model(net, spec.agent_id, about, spec.action).SerializeToString()
            write_atomically(files.enter_context(_whole(onnx)), graph)
    dense = sum(layer.weight[0].numel() * layer.weight.element_size() + 4 * layer.out_features for layer in typed.linears)
    return Exported(out, out.stat().st_size, dense, spec.n_agents, dtype, run.steps, run.config.steps, onnx)


def _check_name(path: Path, suffix: str, option: str) -> None:
    if path.suffix != suffix:
        raise UsageError(f"{option} {path} must end in {suffix}: for example {option} policy{suffix}")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give the name of a file")


def _as_type(net: Net, names: list[str], dtype: str) -> Net:
    """The net with weights of a type; biases stay float32."""
    kind = DTYPES[dtype]
    for name, layer in zip(names, net.linears, strict=True):
        if not bool(torch.isfinite(layer.weight.to(kind)).all()):
            raise UsageError(
                f"layer {name} has a weight of {float(layer.weight.abs().max()):.3g}, and {dtype} ends at {torch.finfo(kind).max:.3g}: "
                f"use --dtype fp32"
            )
    return net.map(lambda layer: replace(layer, weight=layer.weight.to(kind)))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Gives a place to write a file at; it takes its name at the end, or whatever stops that leaves nothing of it."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
