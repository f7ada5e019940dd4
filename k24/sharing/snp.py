"""SNP-PS: one shared network, of which every slot lacks other neurons, drawn at the start and fixed.

Re-implemented from the facts of Kim and Sung, "Parameter Sharing with Network Pruning for Scalable Multi-Agent Deep Reinforcement
Learning", AAMAS 2023 (arXiv 2303.00912). The pruning is structured: whole hidden neurons are dropped, with all that leads to them and all
that reads them, so what is left of a slot's network is a smaller dense one. Which neurons are dropped is what tells slots apart.

A hidden neuron here is a unit of fc1, of the GRU's state, or of one of the layers between the GRU and the output. What leads to a unit of
the state are its rows in all three gates, of both matrices; what reads it are its columns in the recurrent matrix and in the layer that
follows. A dropped unit has no biases either, so that its gates stand at one half, its candidate at zero, and its state stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Role, Sharing, SlotLayer
from k24.sparse.slots import Phase, SlotWeights


@dataclass(frozen=True)
class SNPConfig:
    """Settings of the SNP-PS baseline."""

    ratio: float = 0.3
    """Share of each hidden layer's neurons that an agent lacks; 0.3 leaves about half of the multiply-adds, as 2:4 masks do."""

    def __post_init__(self) -> None:
        """Checks each value."""
        if not 0 <= self.ratio < 1:
            raise UsageError(f"ratio (={self.ratio}) must lie in [0, 1), as 0.3")


class SNPLinear(SlotLayer):
    """A shared weight without the rows and columns of the neurons that a slot lacks.

    Args:
        kept_in: bool ``[A, I]``, the inputs that each slot has.
        kept_out: bool ``[A, O]``, its outputs.

    Attributes:
        weight: ``[O, I]``.
        bias: ``[O]``.
    """

    kept_in: Tensor
    kept_out: Tensor

    def __init__(self, kept_in: Tensor, kept_out: Tensor) -> None:
        super().__init__()
        self.n_slots, self.in_features, self.out_features = len(kept_in), kept_in.shape[1], kept_out.shape[1]
        dense = nn.Linear(self.in_features, self.out_features)
        self.weight, self.bias = dense.weight, dense.bias
        self.register_buffer("kept_in", kept_in)
        self.register_buffer("kept_out", kept_out)

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """The rows and columns that each slot has."""
        kept = self.kept_out[:, :, None] & self.kept_in[:, None]
        return SlotWeights(self.weight * kept, self.bias * self.kept_out)


class SNP(Sharing):
    """The scheme. What a slot lacks tells it apart, so nets append no agent index.

    Args:
        n_slots: Agents.
        config: Settings.
    """

    agent_id = False

    def __init__(self, n_slots: int, config: SNPConfig | None = None) -> None:
        super().__init__(n_slots)
        self.config = config or SNPConfig()
        self._last: Role | None = None
        self._units = torch.ones(n_slots, 0, dtype=torch.bool)

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        # Layers come in the order in which they read each other; the second recurrent one reads the state that both of them make.
        same_units, self._last = role == "recurrent" and self._last == "recurrent", role
        kept_in = torch.ones(self.n_slots, in_features, dtype=torch.bool) if role == "input" else self._units
        assert kept_in.shape[1] == in_features, "a layer reads all that the one before gives"
        if role == "output":
            return SNPLinear(kept_in, torch.ones(self.n_slots, out_features, dtype=torch.bool))
        gates = 3 if role == "recurrent" else 1
        if not same_units:
            self._units = self._draw(out_features // gates)
        return SNPLinear(kept_in, self._units.repeat(1, gates))

    def _draw(self, units: int) -> Tensor:
        """Which of a layer's units each slot has: as many as the ratio says and at least one, bool ``[A, units]``."""
        kept = max(1, round(units * (1 - self.config.ratio)))
        return torch.rand(self.n_slots, units).argsort(1) < kept
