"""The dense schemes: one network for all, with or without an agent index, one network each, and two that lie between.

Between are one network whose biases (``fups_bias``) or whose output layer (``multihead``) are each slot's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from k24.sharing.base import Role, Sharing, SlotLayer
from k24.sparse.slots import Phase, SlotWeights


class DenseLinear(SlotLayer):
    """A dense linear map per slot.

    Args:
        in_features: Inputs (I).
        out_features: Outputs (O).
        n_slots: Slots (A).
        own_weight: One weight per slot instead of one for all.
        own_bias: One bias per slot instead of one for all.
        bias_scale: Standard deviation added to each slot's bias, so that slots differ from the first step.
    """

    def __init__(
        self, in_features: int, out_features: int, n_slots: int, own_weight: bool = False, own_bias: bool = False, bias_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n_slots = in_features, out_features, n_slots
        drawn = [nn.Linear(in_features, out_features) for _ in range(n_slots if own_weight else 1)]
        self.weight = nn.Parameter(torch.stack([d.weight.detach() for d in drawn]))
        bias = torch.stack([d.bias.detach() for d in drawn])
        if own_bias and not own_weight:
            bias = bias.repeat(n_slots, 1)
        self.bias = nn.Parameter(bias + bias_scale * torch.randn_like(bias) if bias_scale else bias)

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """The parameters as they are."""
        return SlotWeights(self.weight, self.bias)


class Dense(Sharing):
    """One dense network for all slots, but for what each of them owns.

    Args:
        n_slots: Agents.
        own: What each slot owns: nothing if None (FuPS), the ``biases`` of all layers, the recurrent ones included, the ``output`` layer
            (a head on a shared trunk), or ``everything`` (NoPS).
        agent_id: Whether the agent's index is appended to its observation.
    """

    critics = 2  # each costs a network of its own, or runs as one

    def __init__(self, n_slots: int, own: Literal["biases", "output", "everything"] | None = None, agent_id: bool = False) -> None:
        super().__init__(n_slots)
        self.own, self.agent_id = own, agent_id

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        whole = self.own == "everything" or (self.own == "output" and role == "output")
        if self.own == "biases":
            # To what the slots have in common each adds as much again, so that they differ from the first step.
            return DenseLinear(in_features, out_features, self.n_slots, own_bias=True, bias_scale=(3 * in_features) ** -0.5)
        return DenseLinear(in_features, out_features, self.n_slots, own_weight=whole, own_bias=whole)
