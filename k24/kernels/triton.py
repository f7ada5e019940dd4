"""The Triton backend: masks as bits over the shared weight, no weight per slot in memory.

A masked layer is held as its one weight ``[O, I]`` and ``I`` bits per output and slot, and multiplied as it is by
:mod:`k24.kernels.triton_kernels`. A dense layer goes through torch for blocks of rows, and through the same kernel for mixed rows.

Rows of blocks ``[A, N, I]`` stand one after the other. Mixed rows are sorted by slot; which rows belong together is worked out on the
device, with room for the worst case. So :meth:`TritonNet.run` never waits for the device, and after one call with the same shapes it can
be captured in a CUDA graph, which small nets need: launching from Python takes longer than they do.

State: checked in Triton's interpreter and compiled for compute capability 8.0 and 9.0, never run on a GPU; see
:mod:`~k24.kernels.triton_kernels`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.kernels.net import GRU, Linear, Net, Prepared
from k24.sparse.slots import apply_slots

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = "k24.kernels.triton_kernels"
# Before it, Triton knew no tuples that grow in a loop.
OLDEST = (3, 3)


def padded(values: Tensor, parts: int, outputs: int, inputs: int) -> Tensor:
    """Widens ``[..., parts · O, I]`` by zeros to ``[..., parts · outputs, inputs]``, each part for itself."""
    split = values.unflatten(-2, (parts, -1))
    return F.pad(split, (0, inputs - split.shape[-1], 0, outputs - split.shape[-2])).flatten(-3, -2).contiguous()


def pack_bits(layer: Linear, parts: int, outputs: int, inputs: int) -> Tensor:
    """Masks as bits.

    Args:
        layer: A masked layer.
        parts: 3 for the gates of a GRU, else 1.
        outputs: Outputs of a part, padded.
        inputs: Inputs, padded to a multiple of 32.

    Returns:
        int32 ``[S, inputs / 32, parts · outputs]``, bit ``j`` of word ``(k, o)`` for weight ``(o, 32k + j)``; zeros where padded.
    """
    assert layer.codes is not None
    place = torch.arange(32, dtype=torch.int32, device=layer.codes.device)
    slots = []
    for codes in layer.codes:  # one after the other: spread out, the masks of a slot are as large as its weight
        mask = padded(layer.patterns.mask(codes, layer.in_features, torch.int32), parts, outputs, inputs)
        slots.append((mask.unflatten(-1, (-1, 32)) << place).sum(-1, dtype=torch.int32).T)
    return torch.stack(slots).contiguous()


@dataclass(frozen=True)
class _Layer:
    """A layer as the kernels take it; widths padded.

    Attributes:
        weight: ``[S, O, I]``.
        bias: ``[S, O]``, float32 for the kernels, of the weight's type for torch.
        bits: int32 ``[S, I / 32, O]``, or None for a dense layer.
        relu: Whether ReLU follows.
    """

    weight: Tensor
    bias: Tensor
    bits: Tensor | None
    relu: bool


@dataclass(frozen=True)
class _Rows:
    """How rows are dealt to programs.

    Attributes:
        slots: Slots that have rows.
        per_slot: Rows per slot; the average for mixed rows.
        table: What the kernels read, for mixed rows only; else it depends on the tile.
    """

    slots: int
    per_slot: int
    table: Tensor | None = None


class TritonNet(Prepared):
    """A net whose masked layers are one weight and bits.

    Args:
        net: What to run.
    """

    def __init__(self, net: Net) -> None:
        from k24.kernels import triton_kernels

        self.net, self._kernels = net, triton_kernels
        self._layers: dict[int, _Layer] = {}
        for block in net.blocks:
            for layer in (block.input, block.recurrent) if isinstance(block, GRU) else (block,):
                self._layers[id(layer)] = self._lay(layer, 3 if isinstance(block, GRU) else 1)
        self._tables: dict[tuple[int, int, int], Tensor] = {}
        held = [t for laid in self._layers.values() for t in (laid.weight, laid.bias, laid.bits) if t is not None]
        self.nbytes = sum(t.numel() * t.element_size() for t in held)

    def _lay(self, layer: Linear, parts: int) -> _Layer:
        """Widens a layer whose outputs are so many parts."""
        width = self._kernels.padded_width
        outputs, inputs = width(layer.out_features // parts), width(layer.in_features)
        weight = padded(layer.weight, parts, outputs, inputs)
        bias = padded(layer.bias[..., None], parts, outputs, 1)[..., 0].contiguous()
        if layer.codes is None:
            return _Layer(weight, bias.to(weight.dtype), None, layer.relu)
        return _Layer(weight, bias, pack_bits(layer, parts, outputs, inputs), layer.relu)

    def _block_table(self, rows: int, per_entry: int, multiple: int) -> Tensor:
        """Entries of blocks, slots fastest, filled up with empty ones; made once per shape and kept, for graphs that read them."""
        key = (rows, per_entry, multiple)
        if key not in self._tables:
            entries = [
                (slot, slot * rows + start, (slot + 1) * rows) for start in range(0, rows, per_entry) for slot in range(self.net.n_slots)
            ]
            entries += [(0, 0, 0)] * (-len(entries) % multiple)
            self._tables[key] = torch.tensor(entries, dtype=torch.int32, device=self.net.device)
        return self._tables[key]

    def _mixed_table(self, slots: Tensor, per_entry: int) -> Tensor:
        """Entries of rows sorted by slot, made on the device.

        Args:
            slots: int64 ``[N]``, ascending; rows of negative slots are left out.
            per_entry: Rows of one entry.

        Returns:
            int32 ``[entries, 3]``: as many as any ``N`` rows could need, those too many without rows.
        """
        count = self.net.n_slots
        bounds = torch.searchsorted(slots, torch.arange(count + 1, device=slots.device))
        starts, ends = bounds[:-1], bounds[1:]
        used = (ends - starts + per_entry - 1) // per_entry
        after = used.cumsum(0)
        entry = torch.arange(min(slots.numel(), slots.numel() // per_entry + count), device=slots.device)
        slot = torch.searchsorted(after, entry, right=True).clamp_max(count - 1)
        first = starts[slot] + (entry - (after - used)[slot]) * per_entry
        return torch.stack([slot, first, ends[slot]], 1).to(torch.int32)

    def _linear(self, layer: _Layer, x: Tensor, rows: _Rows, dtype: torch.dtype) -> Tensor:
        """``[rows, I]`` to ``[rows, O]`` of a type."""
        mixed = rows.table is not None
        if layer.bits is None and not mixed:
            y = apply_slots(x.view(rows.slots, -1, x.shape[1]), layer.weight, layer.bias)
            return (y.relu_() if layer.relu else y).flatten(0, 1).to(dtype)
        _, outputs, inputs = layer.weight.shape
        tile = self._kernels.choose_tile(layer.weight.dtype, inputs, outputs, rows.slots, rows.per_slot, mixed)
        table = self._block_table(rows.per_slot, tile.rows, tile.slots) if rows.table is None else rows.table
        y = x.new_empty(x.shape[0], outputs, dtype=dtype)
        self._kernels.launch_product(x, layer.weight, layer.bits, layer.bias, y, table, tile, layer.relu)
        return y

    def _enter(self, values: Tensor, order: Tensor | None) -> Tensor:
        """Rows in the order and type and width that the kernels take."""
        rows = values.flatten(0, -2) if order is None else values.index_select(0, order)
        missing = self._kernels.padded_width(rows.shape[1]) - rows.shape[1] if rows.shape[1] else 0  # no GRU, no hidden state
        rows = rows.to(self.net.dtype)
        return F.pad(rows, (0, missing)) if missing else rows.contiguous()

    def _leave(self, rows: Tensor, width: int, like: Tensor, slots: Tensor | None, order: Tensor | None) -> Tensor:
        """The opposite of :meth:`_enter`; zeros for rows of no slot."""
        rows = rows[:, :width].to(like.dtype)
        if slots is None or order is None:
            return rows.reshape(*like.shape[:-1], width)
        return torch.empty_like(rows).index_copy_(0, order, rows).masked_fill_((slots < 0)[:, None], 0)

    @torch.no_grad()
    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`."""
        net, shape = self.net, x.shape[:-1]
        if not shape.numel():
            return x.new_zeros(*shape, net.out_features), torch.zeros_like(h)
        with torch.cuda.device_of(x):
            order = None
            rows = _Rows(net.n_slots, shape[-1])
            if slots is not None:
                average = -(-shape[0] // net.n_slots)
                ascending, order = slots.sort(stable=True)
                rows = _Rows(net.n_slots, average, self._mixed_table(ascending, self._kernels.entry_rows(net.dtype, average)))
            y, after = self._enter(x, order), self._enter(h, order)
            for block in net.blocks:
                if isinstance(block, GRU):
                    gates_x = self._linear(self._layers[id(block.input)], y, rows, torch.float32)
                    gates_h = self._linear(self._layers[id(block.recurrent)], after, rows, torch.float32)
                    y = after = self._kernels.launch_gates(gates_x, gates_h, after)
                else:
                    y = self._linear(self._layers[id(block)], y, rows, net.dtype)
            return self._leave(y, net.out_features, x, slots, order), self._leave(after, net.hidden, h, slots, order)


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels, and has not already loaded these for a device."""
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    return asked and getattr(sys.modules.get(KERNELS), "INTERPRETED", True)


def unavailable(net: Net) -> str | None:
    """Why Triton cannot run this net here; None if it can."""
    if find_spec("triton") is None:
        return "the package triton is missing: pip install triton (Linux only; CUDA builds of torch bring it)"
    try:
        found = version("triton")
    except PackageNotFoundError:  # builds of torch before its release name the package differently
        found = ""
    if found and tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed, which comes with torch 2.7 and newer"
    if any(layer.weight.dtype not in DTYPES for layer in net.linears) or len({layer.weight.dtype for layer in net.linears}) > 1:
        kinds = ", ".join(sorted({str(layer.weight.dtype).removeprefix("torch.") for layer in net.linears}))
        return f"its weights are {kinds}: use one of float32, bfloat16 and float16 for all layers"
    if interpreted():
        return None
    if net.device.type != "cuda":
        return f"it is on {net.device}: move it to a CUDA device (to try the kernels slowly on a CPU, set TRITON_INTERPRET=1 at the start)"
    major, minor = torch.cuda.get_device_capability(net.device)
    if major < 8:
        return f"{net.device} has compute capability {major}.{minor}: 8.0 or higher is needed"
    return None
