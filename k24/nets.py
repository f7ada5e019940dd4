"""Networks built from a sharing scheme's layers.

Shapes: ``A`` agents, ``T`` steps, ``N`` rows (environments or episodes), ``D`` observation features, ``U`` actions,
``H`` hidden units. Time is folded into rows wherever nothing is recurrent: the fully connected layers see all ``T·N``
rows at once, and just the GRU's recurrent product loops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from k24.sharing.base import Sharing
from k24.sparse.gru import gru_sequence
from k24.sparse.slots import Phase, SlotWeights, apply_slots

Weights = list[SlotWeights]


def detach_weights(weights: Sequence[SlotWeights]) -> Weights:
    """Effective weights alone, without graph: what a rollout, a target network or an export keeps."""
    return [SlotWeights(w.weight.detach().clone(), w.bias.detach().clone()) for w in weights]


class AgentNet(nn.Module):
    """``fc1 → GRU → fc2 → fc3 → fc4`` with ReLU after each fully connected layer but the last.

    Parameters live in the layers; what runs are *effective weights*, one list per use::

        weights = net.materialise()                       # this step's masked weights, with gradient
        q, h = net(weights, obs, net.initial_state(N))    # a whole sequence

    Args:
        obs_dim: Observation features (D).
        n_outputs: Outputs per agent (U).
        hidden: Hidden units (H).
        n_agents: Agents (A).
        sharing: The scheme whose layers it is made of.
        agent_id: Append the agent's one-hot index to its observation; the scheme's preference when None.
    """

    def __init__(self, obs_dim: int, n_outputs: int, hidden: int, n_agents: int, sharing: Sharing, agent_id: bool | None = None) -> None:
        super().__init__()
        self.n_agents, self.hidden, self.obs_dim, self.n_outputs = n_agents, hidden, obs_dim, n_outputs
        self.agent_id = sharing.agent_id if agent_id is None else agent_id
        inputs = obs_dim + (n_agents if self.agent_id else 0)
        self.layers = nn.ModuleDict(
            {
                "fc1": sharing.linear(inputs, hidden, "input"),
                "gru_input": sharing.linear(hidden, 3 * hidden, "recurrent"),
                "gru_recurrent": sharing.linear(hidden, 3 * hidden, "recurrent"),
                "fc2": sharing.linear(hidden, hidden, "hidden"),
                "fc3": sharing.linear(hidden, hidden, "hidden"),
                "fc4": sharing.linear(hidden, n_outputs, "output"),
            }
        )
        self.register_buffer("_ids", torch.eye(n_agents), persistent=False)

    def initial_state(self, rows: int) -> Tensor:
        """Zeros ``[A, N, H]``."""
        return self._ids.new_zeros(self.n_agents, rows, self.hidden)  # type: ignore[operator]

    def materialise(self, phase: Phase = "train") -> Weights:
        """Effective weights of every layer, in order; see :data:`~k24.sparse.slots.Phase`."""
        return [layer.materialise(phase) for layer in self.layers.values()]  # type: ignore[operator]

    @torch.no_grad()
    def snapshot(self, phase: Phase) -> Weights:
        """Effective weights without graph: for acting, evaluation and targets."""
        return detach_weights(self.materialise(phase))

    def forward(
        self, weights: Sequence[SlotWeights], obs: Tensor, h: Tensor, valid: Tensor | None = None, observe: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Runs a sequence.

        Args:
            weights: From :meth:`materialise` or :meth:`snapshot`.
            obs: ``[A, T, N, D]``.
            h: ``[A, N, H]``.
            valid: bool ``[T, N]``, steps that belong to an episode; None for all.
            observe: Let the layers take note of their inputs (the learner's online pass, and nothing else).

        Returns:
            Outputs ``[A, T, N, U]`` and the last hidden state.
        """
        fc1, gru_x, gru_h, fc2, fc3, fc4 = weights
        a, t, n, _ = obs.shape
        if self.agent_id:
            ids = self._ids[:, None, None].expand(a, t, n, a)  # type: ignore[index]
            obs = torch.cat([obs, ids], -1)
        rows = None if valid is None else valid.reshape(1, t * n)
        noted = {name: layer for name, layer in self.layers.items() if hasattr(layer, "observe")} if observe else {}

        def linear(name: str, x: Tensor, made: SlotWeights) -> Tensor:
            if observe and name in noted:
                noted[name].observe(x.detach(), rows)  # type: ignore[operator]
            return apply_slots(x, made.weight, made.bias)

        x = linear("fc1", obs.reshape(a, t * n, -1), fc1).relu_()
        gates = linear("gru_input", x, gru_x).view(a, t, n, -1)
        states = run_gru(gates, h, gru_h)
        if observe and "gru_recurrent" in noted:
            before = torch.cat([h[:, None], states[:, :-1]], 1).detach()
            noted["gru_recurrent"].observe(before.reshape(a, t * n, -1), rows)  # type: ignore[operator]
        x = linear("fc2", states.reshape(a, t * n, -1), fc2).relu_()
        x = linear("fc3", x, fc3).relu_()
        return linear("fc4", x, fc4).view(a, t, n, -1), states[:, -1]


def run_gru(gates: Tensor, h: Tensor, made: SlotWeights) -> Tensor:
    """The recurrent part over slots; a weight that all slots share runs on all their rows as one block.

    Args:
        gates: ``[A, T, N, 3H]``.
        h: ``[A, N, H]``.
        made: Weight ``[A, 3H, H]`` or ``[1, 3H, H]``, bias likewise.

    Returns:
        ``[A, T, N, H]``.
    """
    a, t, n, width = gates.shape
    if made.weight.shape[0] == 1 and a > 1 and made.bias.shape[0] == 1:
        block = gates.transpose(0, 1).reshape(1, t, a * n, width)
        states = gru_sequence(block, h.reshape(1, a * n, -1), made.weight, made.bias)
        return states.view(t, a, n, -1).transpose(0, 1)
    return gru_sequence(gates, h, made.weight.expand(a, -1, -1), made.bias.expand(a, -1))
