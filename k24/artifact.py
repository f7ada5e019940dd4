"""The policy file: one ``.safetensors`` that holds a net and says how to drive it.

Tensors of each linear layer (``fc1``, ``gru_input``, ``gru_recurrent``, ``fc2``, …)::

    NAME.weight   [O, I], or [A, O, I] where every slot has its own; float32, bfloat16 or float16. Where all slots have one mask, [O, K]:
                  the weights that it keeps, K of each row, in their order
    NAME.bias     [O], or [A, O]; float32
    NAME.codes    uint8, the codes [S, O, G] of a masked layer as a stream of bits (k24.sparse.packing)

The one entry ``k24`` of ``__metadata__`` is JSON::

    {"format": "k24-policy", "version": 2, "k24": "0.1.0", "sha256": …, "policy": {the fields of PolicySpec},
     "net": {"slots": 3, "layers": [{"name": "fc1", "relu": true, "masks": {"slots": 3, "pattern": "2:4"}}, …]}}

with ``"masks": null`` for a dense layer, and ``"inputs": I`` among the masks of one whose kept weights alone are there (version 1 has none
of these). The digest covers everything else in it, and name, type, shape and bytes of every tensor.

Reading trusts nothing. Sizes are compared with that of the file before anything of that size is made, so a file costs a few times its own
size in memory, plus what a header of at most ``MAX_HEADER`` bytes comes to. The file is read, not mapped: one that is cut while it is
mapped would end the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from k24 import strict
from k24.actions import KINDS
from k24.errors import PolicyFileError, UsageError
from k24.files import write_atomically
from k24.kernels import GRU, Linear, Net
from k24.sparse.packing import pack_codes, unpack_codes
from k24.sparse.patterns import PatternSet

FORMAT, VERSION = "k24-policy", 2
MAX_HEADER = 1 << 18  # bytes; a layer takes some 400
MAX_SLOTS = 4096  # agents, too
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPARSEST = 4  # inputs of which one is kept, up to which kept weights are stored alone: reading makes so many values of each
_CHUNK = 1 << 16  # codes packed at a time: packing takes 50 times their size while it works. A multiple of 8, so chunks end on a byte.


@dataclass(frozen=True)
class PolicySpec:
    """What a user must know to drive a policy.

    Attributes:
        task: Task it was trained on.
        algo: Algorithm that trained it.
        sharing: How its agents share weights.
        steps: Environment steps of training.
        n_agents: Agents.
        obs_dim: Observation features of one agent.
        n_actions: Discrete actions of one agent, or the numbers that make up a continuous one.
        agent_id: Whether acting appends the agent's one-hot index to its observation.
        action: What the net's outputs mean, a key of :data:`k24.actions.KINDS`.
        env_args: Arguments of its task, each as ``name=value``.
        slots: What says which slot a row uses: ``agent``, its agent's index; ``(start, stop)``, those features of the observation, one-hot;
            ``given``, whoever acts.
    """

    task: str
    algo: str
    sharing: str
    steps: int
    n_agents: int
    obs_dim: int
    n_actions: int
    agent_id: bool = False
    action: str = "discrete"
    env_args: tuple[str, ...] = ()
    slots: str | tuple[int, int] = "agent"

    def __post_init__(self) -> None:
        """Refuses values of the wrong kind."""
        for name in ("task", "algo", "sharing"):
            strict.text(getattr(self, name), name)
        strict.whole(self.steps, "steps", 0)
        strict.whole(self.n_agents, "n_agents", 1, MAX_SLOTS)
        strict.whole(self.obs_dim, "obs_dim", 1)
        strict.whole(self.n_actions, "n_actions", 1)
        strict.flag(self.agent_id, "agent_id")
        strict.one_of(self.action, "action", KINDS)
        given = list(self.env_args) if isinstance(self.env_args, tuple) else self.env_args  # JSON has lists
        if isinstance(self.slots, str):
            strict.one_of(self.slots, "slots", ["agent", "given"])
        else:
            start, stop = strict.items(list(self.slots) if isinstance(self.slots, tuple) else self.slots, "slots", [2])
            strict.whole(start, "the start of slots", 0, self.obs_dim - 1)
            strict.whole(stop, "the stop of slots", start + 1, self.obs_dim)
            object.__setattr__(self, "slots", (start, stop))
        object.__setattr__(self, "env_args", tuple(strict.text(item, "env_args") for item in strict.items(given, "env_args")))

    @property
    def n_outputs(self) -> int:
        """Outputs of the net for one agent."""
        return KINDS[self.action].n_outputs(self.n_actions)


def layer_names(net: Net) -> list[str]:
    """Names of the net's linear layers, in the order of ``net.linears``."""
    numbers = count(1)
    return [
        name for block in net.blocks for name in (("gru_input", "gru_recurrent") if isinstance(block, GRU) else (f"fc{next(numbers)}",))
    ]


def write_policy(path: Path, net: Net, spec: PolicySpec) -> None:
    """Writes a policy file, whole or not at all.

    Args:
        path: Where; a file there is replaced.
        net: The net; on any device.
        spec: How it is driven.

    Raises:
        UsageError: The net is no net for ``spec``, or holds what a file cannot: other types, NaN, illegal codes.
        OSError: The file cannot be written.
    """
    net = net.map(lambda layer: replace(layer, weight=layer.weight.detach(), bias=layer.bias.detach())).to("cpu")
    check_shapes(net, spec)
    check_values(net)
    tensors: dict[str, Tensor] = {}
    for name, layer in zip(layer_names(net), net.linears, strict=True):
        weight = layer.weight[0] if layer.weight.shape[0] == 1 else layer.weight
        tensors[f"{name}.weight"] = _own(weight[_mask(layer)].view(len(weight), -1) if stores_kept_alone(layer) else weight)
        tensors[f"{name}.bias"] = _own(layer.bias[0] if layer.bias.shape[0] == 1 else layer.bias)
        if layer.codes is not None:
            parts = layer.codes.reshape(-1).split(_CHUNK)
            tensors[f"{name}.codes"] = torch.cat([pack_codes(part, layer.patterns) for part in parts])
    layers = [
        {
            "name": name,
            "relu": layer.relu,
            "masks": None
            if layer.codes is None
            else {"slots": layer.codes.shape[0], "pattern": str(layer.patterns)}
            | ({"inputs": layer.in_features} if stores_kept_alone(layer) else {}),
        }
        for name, layer in zip(layer_names(net), net.linears, strict=True)
    ]
    about = {"format": FORMAT, "version": VERSION, "k24": _k24_version(), "net": {"slots": net.n_slots, "layers": layers}}
    about["policy"] = asdict(spec)
    about["sha256"] = _digest(about, tensors)
    data = safetensors.torch.save(tensors, {"k24": _json(about)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise UsageError(f"a policy file has room for some {MAX_HEADER // 400} layers, this net has {len(layers)}")
    write_atomically(Path(path), data)


def stores_kept_alone(layer: Linear) -> bool:
    """Whether a file holds of a layer's weights those alone that its one mask keeps: no slot has a use for the others."""
    return layer.codes is not None and len(layer.codes) == 1 and layer.patterns.m <= _SPARSEST * layer.patterns.n


def _mask(layer: Linear) -> Tensor:
    """The one mask of a layer, bool ``[O, I]``."""
    assert layer.codes is not None
    return layer.patterns.mask(layer.codes, layer.in_features, torch.bool)[0]


def read_policy(path: str | os.PathLike[str]) -> tuple[Net, PolicySpec, str]:
    """Reads a policy file.

    Args:
        path: A file that :func:`write_policy` wrote.

    Returns:
        The net on the CPU, how it is driven, and the file's digest.

    Raises:
        PolicyFileError: It cannot be read, or anything in it is not as it should be; names the file and the fault.
    """
    where = repr(os.fspath(path))  # quoted, so that any path fits on the line
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # asked before opening: to open a pipe waits for whoever writes to it
            raise PolicyFileError("is a folder: give the file in it" if os.path.isdir(path) else "is a device or a pipe: give a file")
        with open(path, "rb") as file:
            return _read(file)
    except PolicyFileError as error:  # with a remedy of its own
        raise PolicyFileError(f"policy file {where}: {error}") from error
    except UsageError as error:
        raise PolicyFileError(
            f"policy file {where}: {error}; it was damaged on the way or not written by k24: export or fetch it again"
        ) from error
    except (OSError, ValueError) as error:  # a ValueError for a path that no system takes
        raise PolicyFileError(
            f"policy file {where} cannot be read ({getattr(error, 'strerror', None) or error}): check path and rights"
        ) from error


def check_shapes(net: Net, spec: PolicySpec) -> None:
    """Refuses a net that a file cannot hold or that does not fit what is said of it; looks at shapes and types alone.

    Raises:
        UsageError: Says what does not fit.
    """
    if net.n_slots > MAX_SLOTS:
        raise UsageError(f"a policy has at most {MAX_SLOTS} slots, got {net.n_slots}")
    for name, layer in zip(layer_names(net), net.linears, strict=True):
        if layer.weight.dtype not in _WEIGHT_DTYPES or layer.weight.dtype != net.dtype or layer.bias.dtype != torch.float32:
            raise UsageError(
                f"layer {name} has weights of {layer.weight.dtype} and a bias of {layer.bias.dtype}: weights must all be float32, "
                f"all bfloat16 or all float16, biases float32"
            )
        slots = [len(t) for t in (layer.weight, layer.bias, layer.codes) if t is not None]
        if any(n not in (1, net.n_slots) for n in slots):
            raise UsageError(f"weight, bias and codes of layer {name} are for {slots} slots: each must have 1 or all {net.n_slots}")
    if isinstance(spec.slots, tuple) and spec.slots[1] - spec.slots[0] != net.n_slots:
        raise UsageError(f"slots {list(spec.slots)} tell {spec.slots[1] - spec.slots[0]} types apart, the net has {net.n_slots} slots")
    if spec.agent_id and spec.slots == "agent" and spec.n_agents != net.n_slots:
        raise UsageError(f"agent_id needs a slot per agent: got {spec.n_agents} agents and {net.n_slots} slots")
    inputs = spec.obs_dim + (spec.n_agents if spec.agent_id else 0)
    if (inputs, spec.n_outputs) != (net.in_features, net.out_features):
        outputs = "" if spec.n_outputs == spec.n_actions else f", which take {spec.n_outputs} outputs where action is {spec.action}"
        raise UsageError(
            f"the net takes {net.in_features} inputs and gives {net.out_features} outputs, where the policy's spec has {inputs} "
            f"(obs_dim {spec.obs_dim}{f' and {spec.n_agents} agents' if spec.agent_id else ''}) and {spec.n_actions} actions{outputs}"
        )


def check_values(net: Net) -> None:
    """Refuses NaN, infinity and codes that are no pattern.

    Raises:
        UsageError: Names the layer.
    """
    for name, layer in zip(layer_names(net), net.linears, strict=True):
        for kind, values in (("weight", layer.weight), ("bias", layer.bias)):
            if not all(math.isfinite(bound) for bound in torch.stack(values.aminmax()).tolist()):  # either is NaN if any value is
                raise UsageError(f"the {kind} of layer {name} holds NaN or infinity, as no sound policy does")
        if layer.codes is None:
            continue
        patterns = layer.patterns
        if int(layer.codes.max()) >= patterns.n_patterns:
            raise UsageError(f"layer {name} has the code {int(layer.codes.max())}, {patterns} ends at {patterns.n_patterns - 1}")
        # What is legal in the last group depends on how many of its inputs are real, and all is legal in the others.
        legal = patterns.legal(layer.in_features % patterns.m or patterns.m)[:, 0].tolist()
        for code in (code for code, allowed in enumerate(legal) if not allowed):
            if bool((layer.codes[..., -1] == code).any()):
                raise UsageError(f"layer {name} has the code {code} in a group whose padding it would keep in place of a weight")


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the metadata without its digest, and of name, type, shape and bytes of every tensor."""
    ordered = sorted(tensors.items())
    described = [[name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in ordered]
    total = hashlib.sha256(_json([{key: value for key, value in about.items() if key != "sha256"}, described]).encode())
    for _, tensor in ordered:
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# --- reading, in the order in which it is done ---------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Where a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read(file: BufferedReader) -> tuple[Net, PolicySpec, str]:
    header, room = _header(file)
    start = file.tell()
    about = _about(header.pop("__metadata__", None))
    entries = _entries(header, room)
    shapes = _shapes(about["net"], entries)
    # The first files did not say whose each slot is: it was the agent's index.
    said = {"slots": "agent", **about["policy"]} if isinstance(about["policy"], dict) else about["policy"]
    spec = PolicySpec(**strict.table(said, "the policy's spec", [field.name for field in fields(PolicySpec)]))
    check_shapes(shapes, spec)
    tensors = {name: _tensor(file, start + entry.begin, entry) for name, entry in entries.items()}
    if _digest(about, tensors) != about["sha256"]:
        raise UsageError("is damaged: its digest is not that of its contents")
    names = iter(layer_names(shapes))

    def filled(layer: Linear) -> Linear:
        name = next(names)
        codes = None
        if layer.codes is not None:
            codes = _empty(layer.codes.numel()).view(layer.codes.shape)
            parts = tensors[f"{name}.codes"].split(_CHUNK // 8 * layer.patterns.code_bits)
            for part, packed in zip(codes.view(-1).split(_CHUNK), parts, strict=True):
                part.copy_(unpack_codes(packed, part.shape, layer.patterns))
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        filled = replace(layer, bias=bias.view(layer.bias.shape), codes=codes)
        if weight.numel() < layer.weight.numel():
            mask = _mask(filled)
            if int(mask.sum()) != weight.numel():
                raise UsageError(f"layer {name} has codes that keep {int(mask.sum())} weights, and {weight.numel()} are there")
            weight = (
                _empty(layer.weight.numel() * weight.element_size()).view(weight.dtype).zero_().masked_scatter_(mask.reshape(-1), weight)
            )
        return replace(filled, weight=weight.view(layer.weight.shape))

    net = shapes.map(filled)
    check_values(net)
    return net, spec, about["sha256"]


def _header(file: BufferedReader) -> tuple[dict[str, Any], int]:
    """The header's JSON, and how many bytes of tensors follow it."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER:
        raise _another_kind(start + file.read(56))
    if size < 8 + length:
        raise UsageError(f"is cut short: its header takes {length} bytes, and {size - 8} are left")
    return strict.parse_json(file.read(length), "the header"), size - 8 - length


def _another_kind(start: bytes | None = None) -> PolicyFileError:
    """The error for a file that begins in this way; None for one in the right format that holds something else."""
    if start is None:
        kind = "a safetensors file without k24's metadata"
    elif not start:
        kind = "empty"
    elif start.startswith(b"PK\x03\x04"):
        kind = "a zip archive, perhaps of torch.save (nothing in it was run)"
    elif start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a pickle (nothing in it was run)"
    elif all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        kind = "a text file"
    else:
        kind = "of another kind, or cut short"
    return PolicyFileError(f"is {kind}: give a policy file, as 'k24 export' writes it")


def _about(metadata: Any) -> dict[str, Any]:
    """What the file says of itself, of a version that is known here."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get("k24"), str):
        raise _another_kind()
    about = strict.parse_json(metadata["k24"], "the metadata")
    if about.get("format") != FORMAT:
        raise _another_kind()
    written = strict.whole(about.get("version"), "version", 1)
    if written > VERSION:
        raise PolicyFileError(f"has version {written} of the format and needs a newer k24: this one reads up to version {VERSION}")
    strict.table(metadata, "__metadata__", ["k24"])
    strict.table(about, "the metadata", ["format", "version", "k24", "net", "policy", "sha256"])
    strict.text(about["k24"], "k24")
    strict.text(about["sha256"], "sha256")
    return about


def _entries(header: dict[str, Any], room: int) -> dict[str, _Entry]:
    """The tensors of a header. Together they fill the ``room`` bytes behind it: none is used twice, or not at all."""
    entries = {}
    for name, entry in header.items():
        what = f"tensor {strict.shown(name)}"
        strict.table(entry, what, ["dtype", "shape", "data_offsets"])
        dtype = _DTYPES[strict.one_of(entry["dtype"], f"dtype of {what}", _DTYPES)]
        shape = [strict.whole(n, f"a size of {what}", 1) for n in strict.items(entry["shape"], f"shape of {what}", (1, 2, 3))]
        begin, end = (strict.whole(n, f"an offset of {what}", 0) for n in strict.items(entry["data_offsets"], f"offsets of {what}", (2,)))
        entries[name] = _Entry(dtype, tuple(shape), begin)
        if entries[name].nbytes != end - begin:
            raise UsageError(f"{what} has {end - begin} bytes, which is not what {shape} of {entry['dtype']} take")
    used = 0
    for name, entry in sorted(entries.items(), key=lambda named: named[1].begin):
        if entry.begin != used:
            raise UsageError(f"tensor {strict.shown(name)} begins at byte {entry.begin}, and the one before it ends at {used}")
        used += entry.nbytes
    if used != room:
        raise UsageError(f"is cut short or too long: its tensors take {used} bytes, and {room} are left for them")
    return entries


def _shapes(described: Any, entries: dict[str, _Entry]) -> Net:
    """The net without its numbers, on torch's device ``meta``, which holds shapes alone."""
    strict.table(described, "the net", ["slots", "layers"])
    slots = strict.whole(described["slots"], "slots of the net", 1, MAX_SLOTS)
    needed: set[str] = set()
    named: list[tuple[str, Linear]] = []
    for item in strict.items(described["layers"], "layers of the net"):
        strict.table(item, "a layer", ["name", "relu", "masks"])
        name = strict.text(item["name"], "name of a layer")
        layer = _layer(name, item, entries)
        named.append((name, layer))
        needed |= {f"{name}.{part}" for part in (["weight", "bias"] if layer.codes is None else ["weight", "bias", "codes"])}
    if set(entries) != needed:
        raise UsageError(f"has tensors that no layer needs: {strict.shown(sorted(set(entries) - needed))}")
    blocks: list[Linear | GRU] = []
    rest = iter(named)
    for name, layer in rest:
        recurrent = next(rest, None) if name == "gru_input" else None
        blocks.append(layer if recurrent is None else GRU(layer, recurrent[1]))
    net = Net(tuple(blocks), slots)
    if [name for name, _ in named] != layer_names(net):
        raise UsageError(f"layers must be called {strict.shown(layer_names(net))}, got {strict.shown([name for name, _ in named])}")
    return net


def _layer(name: str, item: dict[str, Any], entries: dict[str, _Entry]) -> Linear:
    """A layer without its numbers."""

    def stored(part: str, *ranks: int) -> _Entry:
        entry = entries.get(f"{name}.{part}")
        if entry is None or len(entry.shape) not in ranks:
            found = "none" if entry is None else list(entry.shape)
            raise UsageError(f"layer {name} needs a tensor {name}.{part} of {' or '.join(map(str, ranks))} dimensions, got {found}")
        return entry

    weight, bias = stored("weight", 2, 3), stored("bias", 1, 2)
    shape = weight.shape if len(weight.shape) == 3 else (1, *weight.shape)
    codes, patterns = None, PatternSet(2, 4)
    if item["masks"] is not None:
        alone = ["inputs"] if isinstance(item["masks"], dict) and "inputs" in item["masks"] else []
        masks = strict.table(item["masks"], f"masks of layer {name}", ["slots", "pattern", *alone])
        slots = strict.whole(masks["slots"], f"slots of layer {name}", 1, 1 if alone else MAX_SLOTS)
        patterns = _pattern(masks["pattern"])
        if alone:
            shape = (1, shape[1], _inputs(name, masks["inputs"], patterns, weight.shape))
        codes = torch.empty(slots, shape[1], patterns.groups(shape[2]), dtype=torch.uint8, device="meta")
        packed, needed = stored("codes", 1), -(-codes.numel() * patterns.code_bits // 8)
        if (packed.dtype, packed.nbytes) != (torch.uint8, needed):
            raise UsageError(f"codes of layer {name} take {needed} bytes of U8, got {packed.nbytes} of {_DTYPE_NAMES[packed.dtype]}")
    return Linear(
        torch.empty(shape, dtype=weight.dtype, device="meta"),
        torch.empty(bias.shape if len(bias.shape) == 2 else (1, *bias.shape), dtype=bias.dtype, device="meta"),
        codes,
        patterns,
        strict.flag(item["relu"], f"relu of layer {name}"),
    )


def _inputs(name: str, inputs: Any, patterns: PatternSet, stored: tuple[int, ...]) -> int:
    """How many inputs a layer has of whose weights those alone are there that its one mask keeps."""
    if patterns.m > _SPARSEST * patterns.n:
        raise UsageError(f"layer {name} has kept weights alone, which {patterns} never has")
    inputs = strict.whole(inputs, f"inputs of layer {name}", 1, _SPARSEST * stored[-1])
    whole, rest = divmod(inputs, patterns.m)
    kept = whole * patterns.n + min(rest, patterns.n)
    if len(stored) != 2 or stored[1] != kept:
        raise UsageError(f"layer {name} of {inputs} inputs under {patterns} keeps {kept} weights of a row, got weights {list(stored)}")
    return inputs


def _pattern(text: Any) -> PatternSet:
    # Looked at by length first: to count the patterns of an N:M of many digits takes minutes.
    if not isinstance(text, str) or len(text) > 5 or str(patterns := PatternSet.parse(text)) != text:
        raise UsageError(f"a pattern must be such as '2:4', got {strict.shown(text)}")
    return patterns


def _tensor(file: BufferedReader, at: int, entry: _Entry) -> Tensor:
    raw = _empty(entry.nbytes)
    file.seek(at)
    if file.readinto(raw.numpy().data) != entry.nbytes:
        raise UsageError("was cut short while it was read")
    return raw.view(entry.dtype).view(entry.shape)


def _empty(count: int) -> Tensor:
    try:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise PolicyFileError(f"needs {count} bytes of memory for one tensor, and there are not as many: free some") from error


# --- small things --------------------------------------------------------------------------------------------------------------


def _own(tensor: Tensor) -> Tensor:
    """The values in memory of their own: tensors of a file must not overlap."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _json(value: Any) -> str:
    """One text for one value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _k24_version() -> str:
    try:
        return version("k24")
    except PackageNotFoundError:
        return "not installed"
