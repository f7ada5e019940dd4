"""From the values of each agent to one value of the team: not at all (IQL), by sum (VDN), or monotonically (QMIX)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SumMixer(nn.Module):
    """VDN: the team's value is the sum of the agents' (Sunehag et al. 2018, arXiv 1706.05296)."""

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        """Mixes ``[..., A]`` into ``[...]``; the state is not used."""
        return q.sum(-1)


class QMixer(nn.Module):
    """QMIX: a two-layer net with non-negative weights that hypernetworks make from the state (Rashid et al. 2018, arXiv 1803.11485).

    Args:
        n_agents: A.
        state_dim: S.
        embed: Width of the mixing layer.
        hypernet_hidden: Hidden units of the two weight hypernetworks.
    """

    def __init__(self, n_agents: int, state_dim: int, embed: int = 32, hypernet_hidden: int = 64) -> None:
        super().__init__()
        self.n_agents, self.embed = n_agents, embed
        self.weight_1 = nn.Sequential(nn.Linear(state_dim, hypernet_hidden), nn.ReLU(), nn.Linear(hypernet_hidden, n_agents * embed))
        self.bias_1 = nn.Linear(state_dim, embed)
        self.weight_2 = nn.Sequential(nn.Linear(state_dim, hypernet_hidden), nn.ReLU(), nn.Linear(hypernet_hidden, embed))
        self.bias_2 = nn.Sequential(nn.Linear(state_dim, embed), nn.ReLU(), nn.Linear(embed, 1))

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        """Mixes values.

        Args:
            q: ``[..., A]``.
            state: ``[..., S]``.

        Returns:
            ``[...]``, increasing in every agent's value.
        """
        w1 = self.weight_1(state).abs().unflatten(-1, (self.n_agents, self.embed))
        hidden = F.elu((q.unsqueeze(-1) * w1).sum(-2) + self.bias_1(state))
        return (hidden * self.weight_2(state).abs()).sum(-1) + self.bias_2(state).squeeze(-1)


def make_mixer(algo: str, n_agents: int, state_dim: int, embed: int, hypernet_hidden: int) -> nn.Module | None:
    """The mixer of an algorithm: None for ``iql``."""
    if algo == "qmix":
        return QMixer(n_agents, state_dim, embed, hypernet_hidden)
    return SumMixer() if algo == "vdn" else None
