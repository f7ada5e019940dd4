"""HyperMARL: a network that generates each slot's weights from an embedding of the slot.

Re-implemented from the facts of Tessera, Rahman, Storkey and Albrecht, "HyperMARL: Adaptive Hypernetworks for Multi-Agent RL", NeurIPS 2025
(arXiv 2412.04233). For slot i with the learned embedding ``e_i``, every layer l has ``[W_i, b_i] = head_l(relu(trunk_l(e_i)))``: what a
gradient says of an observation reaches the embedding only through the weights, and never by way of an index in the input.

Embeddings and trunks are orthogonal with gain √2, as published. Heads are drawn so that generated weights and biases have the variance of
those of ``nn.Linear``, 1/(3I): an embedding's features are known by then, so their length is divided out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Role, Sharing, SlotLayer
from k24.sharing.dense import DenseLinear
from k24.sparse.slots import Phase, SlotWeights


@dataclass(frozen=True)
class HyperMARLConfig:
    """Settings of the HyperMARL baseline; the sizes are the published ones."""

    embedding: int = 64
    """Features of an agent's embedding."""
    hidden: int = 64
    """Hidden units of the network that generates a layer."""
    rnn: bool = True
    """Whether the GRU is generated too; the published recurrent nets share one dense GRU."""

    def __post_init__(self) -> None:
        """Checks each value."""
        if self.embedding < 1 or self.hidden < 1:
            raise UsageError(f"hypermarl needs embedding (={self.embedding}) and hidden (={self.hidden}) of at least 1")


class Embedding(nn.Module):
    """One learned vector per slot.

    Attributes:
        weight: ``[A, E]``.
    """

    def __init__(self, n_slots: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(n_slots, features), 2**0.5))


class HyperLinear(SlotLayer):
    """A layer whose weights and biases are generated.

    Args:
        in_features: Inputs (I).
        out_features: Outputs (O).
        embedding: The slots' embeddings, shared by all layers of a net.
        hidden: Hidden units of the generating network.
    """

    def __init__(self, in_features: int, out_features: int, embedding: Embedding, hidden: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n_slots = in_features, out_features, len(embedding.weight)
        self.embedding = embedding
        self.trunk = nn.Linear(embedding.weight.shape[1], hidden)
        self.head = nn.Linear(hidden, out_features * (in_features + 1))
        nn.init.orthogonal_(self.trunk.weight, 2**0.5)
        nn.init.zeros_(self.trunk.bias)
        with torch.no_grad():
            length = self._features().square().sum(1).mean()
        nn.init.normal_(self.head.weight, std=float((3 * in_features * length.clamp_min(1e-6)) ** -0.5))
        nn.init.zeros_(self.head.bias)

    def _features(self) -> Tensor:
        return torch.relu(self.trunk(self.embedding.weight))

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """What the network generates."""
        made = self.head(self._features())
        weight, bias = made.split([self.out_features * self.in_features, self.out_features], 1)
        return SlotWeights(weight.view(-1, self.out_features, self.in_features), bias)


class HyperMARL(Sharing):
    """The scheme. Embeddings tell slots apart, so nets append no agent index.

    Args:
        n_slots: Agents.
        config: Settings.
    """

    agent_id = False
    critics = 2  # each is run as a network of its own

    def __init__(self, n_slots: int, config: HyperMARLConfig | None = None) -> None:
        super().__init__(n_slots)
        self.config = config or HyperMARLConfig()
        self._embedding: Embedding | None = None

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        if role == "recurrent" and not self.config.rnn:
            return DenseLinear(in_features, out_features, self.n_slots)
        # Made with the first layer, so that it comes from the random numbers that a net is made with.
        self._embedding = self._embedding or Embedding(self.n_slots, self.config.embedding)
        return HyperLinear(in_features, out_features, self._embedding, self.config.hidden)
