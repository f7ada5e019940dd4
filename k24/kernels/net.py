"""What a kernel runs: layers of masked or dense weights, in a row.

Shapes, here and in every backend: ``A`` slots (agents, or unit types), ``N`` rows per slot, ``I`` inputs, ``O`` outputs, ``G`` groups of a
row, ``H`` hidden units of a GRU. ``S`` is 1 where all slots share, else ``A``.

A net is run in one of two layouts. *Blocks*: ``x [A, N, I]``, N rows of each slot. *Mixed rows*: ``x [N, I]`` and a slot index per row,
which may change from call to call (unit types); a negative index marks a row that belongs to no slot (a dead unit), whose results are
zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from k24.errors import UsageError
from k24.sparse.patterns import PatternSet

TWO_FOUR = PatternSet(2, 4)


@dataclass(frozen=True)
class Linear:
    """``y[a] = (W ∘ M_a) x[a] + b``, then ReLU or not.

    Attributes:
        weight: ``[S, O, I]``; float32, bfloat16 or float16. ``S`` is 1 where there are codes.
        bias: ``[S, O]``, float32.
        codes: uint8 ``[S, O, G]``, the pattern of each group; None for a dense layer.
        patterns: The N:M patterns the codes belong to.
        relu: Whether ReLU follows.
    """

    weight: Tensor
    bias: Tensor
    codes: Tensor | None = None
    patterns: PatternSet = TWO_FOUR
    relu: bool = False

    def __post_init__(self) -> None:
        """Refuses shapes that do not belong together."""
        s, o, i = self.weight.shape
        if not min(s, o, i):
            raise UsageError(f"a weight must be [slots, outputs, inputs] with at least one of each, got {tuple(self.weight.shape)}")
        if self.bias.ndim != 2 or self.bias.shape[1] != o:
            raise UsageError(f"a bias must be [slots, {o}] for a weight of {tuple(self.weight.shape)}, got {tuple(self.bias.shape)}")
        if self.codes is not None and (s != 1 or self.codes.shape[1:] != (o, self.patterns.groups(i)) or self.codes.dtype != torch.uint8):
            raise UsageError(
                f"codes must be uint8 [slots, {o}, {self.patterns.groups(i)}] over one shared weight [1, {o}, {i}], got "
                f"{self.codes.dtype} {tuple(self.codes.shape)} over {tuple(self.weight.shape)}"
            )

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight.shape[2]

    @property
    def slots(self) -> set[int]:
        """How many slots its weight, its bias and its codes have."""
        return {self.weight.shape[0], self.bias.shape[0]} | (set() if self.codes is None else {self.codes.shape[0]})

    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that is multiplied with, ``[S, O, I]``; differentiable in ``weight``."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        return weight if self.codes is None else weight * self.patterns.mask(self.codes, self.in_features, weight.dtype)


@dataclass(frozen=True)
class GRU:
    """A gated recurrent unit; gates in the order r, z, n, equations in :mod:`k24.sparse.gru`.

    Attributes:
        input: ``[S, 3H, I]``.
        recurrent: ``[S, 3H, H]``.
    """

    input: Linear
    recurrent: Linear

    def __post_init__(self) -> None:
        """Refuses shapes that do not belong together."""
        rows, hidden = self.recurrent.out_features, self.recurrent.in_features
        if rows != 3 * hidden or self.input.out_features != rows or self.input.relu or self.recurrent.relu:
            raise UsageError(
                f"a GRU needs [3H, I] and [3H, H] without ReLU, got {self.input.out_features} and {rows} rows for H = {hidden}"
            )

    @property
    def hidden(self) -> int:
        """H."""
        return self.recurrent.in_features


@dataclass(frozen=True)
class Net:
    """Blocks run one after the other.

    Attributes:
        blocks: Layers; at most one GRU among them.
        n_slots: A.
    """

    blocks: tuple[Linear | GRU, ...]
    n_slots: int
    linears: tuple[Linear, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses layers that do not fit each other."""
        linears = tuple(
            layer for block in self.blocks for layer in ((block.input, block.recurrent) if isinstance(block, GRU) else (block,))
        )
        object.__setattr__(self, "linears", linears)
        if not self.blocks or sum(isinstance(block, GRU) for block in self.blocks) > 1:
            raise UsageError("a net needs at least one layer and at most one GRU")
        width = self.in_features
        for block in self.blocks:
            first = block.input if isinstance(block, GRU) else block
            if first.in_features != width:
                raise UsageError(f"a layer takes {first.in_features} inputs where the one before it has {width} outputs")
            width = block.hidden if isinstance(block, GRU) else block.out_features
        places = {t.device for layer in linears for t in (layer.weight, layer.bias, layer.codes) if t is not None}
        if len(places) > 1:
            raise UsageError(f"parts of a net are on {' and '.join(sorted(map(str, places)))}: they must be on one device")
        if self.n_slots < 1:
            raise UsageError(f"a net needs at least one slot, got {self.n_slots}")
        odd = [layer.slots for layer in linears if not layer.slots <= {1, self.n_slots}]
        if odd:
            raise UsageError(f"a layer has weights, biases or codes of {sorted(odd[0])} slots: each must have 1 or all {self.n_slots}")

    @property
    def in_features(self) -> int:
        """Inputs of the first layer."""
        first = self.blocks[0]
        return first.input.in_features if isinstance(first, GRU) else first.in_features

    @property
    def out_features(self) -> int:
        """Outputs of the last layer."""
        last = self.blocks[-1]
        return last.hidden if isinstance(last, GRU) else last.out_features

    @property
    def hidden(self) -> int:
        """H of the GRU; 0 without one."""
        return next((block.hidden for block in self.blocks if isinstance(block, GRU)), 0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.linears[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.linears[0].weight.dtype

    @property
    def masked(self) -> bool:
        """Whether any layer has codes."""
        return any(layer.codes is not None for layer in self.linears)

    def map(self, change) -> Net:
        """The same net with each linear layer replaced by ``change(layer)``."""
        blocks = [GRU(change(b.input), change(b.recurrent)) if isinstance(b, GRU) else change(b) for b in self.blocks]
        return Net(tuple(blocks), self.n_slots)

    def to(self, device: torch.device | str) -> Net:
        """The same net on a device."""
        return self.map(
            lambda layer: replace(
                layer,
                weight=layer.weight.to(device),
                bias=layer.bias.to(device),
                codes=None if layer.codes is None else layer.codes.to(device),
            )
        )

    def dense(self) -> Net:
        """The same function with masks multiplied in: a weight per slot and no codes. What 2:4 is compared with."""
        return self.map(lambda layer: replace(layer, weight=layer.effective(), codes=None))


class Prepared(ABC):
    """A net in the form that a backend runs.

    Attributes:
        net: What it was made from.
        nbytes: Bytes of weights, biases and masks that this form holds.
        holds_net: Whether it runs from the tensors of ``net`` themselves; where it does not and needs them no more, ``net`` is on torch's
            device ``meta``.
    """

    net: Net
    nbytes: int
    holds_net: bool = False

    @abstractmethod
    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the net on checked operands; see :meth:`__call__`."""

    def __call__(self, x: Tensor, h: Tensor | None = None, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the net once.

        Args:
            x: ``[A, N, I]``, or ``[N, I]`` with ``slots``.
            h: Hidden state ``[A, N, H]`` or ``[N, H]``; zeros when None. Not changed.
            slots: int64 ``[N]``, the slot of each row; negative for none.

        Returns:
            Outputs ``[A, N, O]`` or ``[N, O]``, and the next hidden state (``H`` = 0 without a GRU).

        Raises:
            UsageError: Shapes or slots do not fit the net.
        """
        if not x.is_floating_point():
            raise UsageError(f"inputs must be floating point, got {x.dtype}: convert them with .float()")
        if slots is not None and (slots.dtype != torch.int64 or slots.ndim != 1):
            raise UsageError(f"slots must be int64 [rows], got {slots.dtype} {list(slots.shape)}")
        rows, n_slots, width = x.shape[:-1], self.net.n_slots, self.net.in_features
        fits = rows == slots.shape if slots is not None else len(rows) == 2 and rows[0] == n_slots
        if not fits or x.shape[-1] != width:
            expected = f"[{n_slots}, rows, {width}]" if slots is None else f"[{slots.shape[0]}, {width}]"
            raise UsageError(f"inputs must be {expected}, got {list(x.shape)}")
        if h is None:
            h = x.new_zeros(*rows, self.net.hidden)
        elif h.shape != (*rows, self.net.hidden):
            raise UsageError(f"the hidden state must be {[*rows, self.net.hidden]}, got {list(h.shape)}")
        if slots is not None and slots.numel() and int(slots.max()) >= n_slots:
            raise UsageError(f"slot {int(slots.max())} does not exist: this net has the slots 0..{n_slots - 1}")
        return self.run(x, h, slots)
