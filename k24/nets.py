"""Networks built from a sharing scheme's layers.

Shapes: ``A`` agents, ``T`` steps, ``N`` rows (environments or episodes), ``D`` observation features, ``U`` actions,
``H`` hidden units. Time is folded into rows wherever nothing is recurrent: the fully connected layers see all ``T·N``
rows at once, and just the GRU's recurrent product loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Sharing
from k24.sparse.gru import gru_packed, gru_sequence, states_before
from k24.sparse.layers import MaskedLinear
from k24.sparse.slots import Phase, SlotWeights, apply_slots, pack_by_slot, sort_by_slot

Weights = list[SlotWeights]
# By layer, what it is to take note of: slot, inputs, and which of these rows count.
Segments = dict[str, list[tuple[int, Tensor, Tensor]]]


def detach_weights(weights: Sequence[SlotWeights]) -> Weights:
    """Effective weights alone, without graph: what a rollout, a target network or an export keeps."""
    return [SlotWeights(w.weight.detach().clone(), w.bias.detach().clone()) for w in weights]


class AgentNet(nn.Module):
    """``fc1 → GRU → fc2 → fc3 → fc4``, or without recurrence ``fc1 → fc2 → fc3``; ReLU after each fully connected layer but the last.

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
        recurrent: Whether there is a GRU. Without one a hidden state has no units, ``[A, N, 0]``.
        layer_norm: Normalise what goes into each ReLU (Ba et al. 2016, arXiv 1607.06450, without gain and bias: the layers that follow
            have them). Only without recurrence; such a net cannot be exported.
    """

    def __init__(
        self,
        obs_dim: int,
        n_outputs: int,
        hidden: int,
        n_agents: int,
        sharing: Sharing,
        agent_id: bool | None = None,
        recurrent: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        assert not (recurrent and layer_norm), "packed sequences know no normalisation"
        self.n_agents, self.hidden, self.obs_dim, self.n_outputs = n_agents, hidden, obs_dim, n_outputs
        self.recurrent, self.layer_norm = recurrent, layer_norm
        self.n_slots = sharing.n_slots
        self.agent_id = sharing.agent_id if agent_id is None else agent_id
        inputs = obs_dim + (n_agents if self.agent_id else 0)
        self.layers = nn.ModuleDict({"fc1": sharing.linear(inputs, hidden, "input")})
        if recurrent:
            self.layers["gru_input"] = sharing.linear(hidden, 3 * hidden, "recurrent")
            self.layers["gru_recurrent"] = sharing.linear(hidden, 3 * hidden, "recurrent")
        self.layers["fc2"] = sharing.linear(hidden, hidden, "hidden")
        if recurrent:
            self.layers["fc3"] = sharing.linear(hidden, hidden, "hidden")
        self.layers["fc4" if recurrent else "fc3"] = sharing.linear(hidden, n_outputs, "output")
        self.register_buffer("_ids", torch.eye(n_agents), persistent=False)
        self._sorted: tuple[Tensor, list[tuple[list[int], Tensor]], Tensor] | None = None

    def initial_state(self, rows: int) -> Tensor:
        """Zeros ``[A, N, H]``; ``[A, N, 0]`` without recurrence."""
        return self._ids.new_zeros(self.n_agents, rows, self.hidden if self.recurrent else 0)  # type: ignore[operator]

    def materialise(self, phase: Phase = "train") -> Weights:
        """Effective weights of every layer, in order; see :data:`~k24.sparse.slots.Phase`."""
        return [layer.materialise(phase) for layer in self.layers.values()]  # type: ignore[operator]

    @torch.no_grad()
    def snapshot(self, phase: Phase) -> Weights:
        """Effective weights without graph: for acting, evaluation and targets."""
        return detach_weights(self.materialise(phase))

    def forward(
        self,
        weights: Sequence[SlotWeights],
        obs: Tensor,
        h: Tensor,
        valid: Tensor | None = None,
        observe: bool = False,
        slots: Tensor | None = None,
        alive: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs a sequence.

        Args:
            weights: From :meth:`materialise` or :meth:`snapshot`.
            obs: ``[A, T, N, D]``.
            h: ``[A, N, H]``.
            valid: bool ``[T, N]``, steps that belong to an episode; None for all.
            observe: Let the layers take note of their inputs (the learner's online pass, and nothing else).
            slots: int64 ``[A, T, N]``, whose weights each row uses; the agent's index when None. Negative for a row of none: its
                output and its hidden state are zero.
            alive: bool ``[A, T, N]``, rows that count, where slots are the agents' indices; None for all. The others' outputs are zero.

        Returns:
            Outputs ``[A, T, N, U]`` and the last hidden state.
        """
        a, t, n, width = obs.shape
        if not self.recurrent and t > 1:
            # No step knows of another, so all are rows of one.
            slots, alive, valid = (None if flags is None else flags.reshape(-1, 1, t * n) for flags in (slots, alive, valid))
            valid = None if valid is None else valid[0]
            out, _ = self(weights, obs.reshape(a, 1, t * n, width), h.new_zeros(a, t * n, 0), valid, observe, slots, alive)
            return out.view(a, t, n, -1), h
        if self.agent_id:
            ids = self._ids[:, None, None].expand(a, t, n, a)  # type: ignore[index]
            obs = torch.cat([obs, ids], -1)
        noted = {name: layer for name, layer in self.layers.items() if isinstance(layer, MaskedLinear)} if observe else {}
        if slots is not None:
            return self._forward_slots(weights, obs, h, valid, noted, slots)
        rows = valid if alive is None else alive if valid is None else alive & valid
        rows = None if rows is None else rows.reshape(-1, t * n)

        out, states = _run(weights, obs, h, {name: partial(layer.observe, valid=rows) for name, layer in noted.items()}, self.layer_norm)
        return out if alive is None else out * alive[..., None], states[:, -1]

    def compare(self, weights: Sequence[SlotWeights], obs: Tensor) -> Tensor:
        """Asks every slot about the same observations, each at the start of an episode.

        Args:
            weights: From :meth:`snapshot`.
            obs: ``[N, D]``.

        Returns:
            ``[slots, N, U]``. Slot k says it is agent k, counted round where there are more slots than agents.
        """
        x = obs.expand(self.n_slots, 1, -1, -1)
        if self.agent_id:
            ids = self._ids[torch.arange(self.n_slots) % self.n_agents]  # type: ignore[index]
            x = torch.cat([x, ids[:, None, None].expand(-1, 1, len(obs), -1)], -1)
        h = x.new_zeros(self.n_slots, len(obs), self.hidden if self.recurrent else 0)
        return _run(weights, x, h, {}, self.layer_norm)[0][:, 0]

    def _forward_slots(
        self, weights: Sequence[SlotWeights], obs: Tensor, h: Tensor, valid: Tensor | None, noted: dict[str, MaskedLinear], slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows that choose their slot; observations come with the agents' indices."""
        if bool((slots >= self.n_slots).any()):
            raise UsageError(f"slot {int(slots.max())} does not exist: this net has the slots 0 to {self.n_slots - 1}")
        if not noted and all(len(w.weight) == len(w.bias) == 1 for w in weights):
            slots = slots.clamp_max(0)  # one set of weights for all: nothing to tell apart
        seen: Segments = {name: [] for name in noted}
        alive = slots >= 0
        counted = alive if valid is None else alive & valid
        own = slots.amax(1)
        if obs.shape[1] == 1:
            out, last = self._forward_sorted(weights, obs, h, counted, own, seen)
        else:
            # Sequences whose slot changes on the way, or whose unit comes back, take one step after the other; few do, if any.
            odd = ((slots != own[:, None]) & alive).any(1)
            odd |= (alive[:, 1:] & ~alive[:, :-1]).any(1)
            some = bool(odd.any())
            plain = (own.masked_fill(odd, -1), alive & ~odd[:, None]) if some else (own, alive)
            out, last = self._forward_packed(weights, obs, h, plain[1], counted, plain[0], seen)
            if some:
                stepped, last_stepped = self._forward_steps(weights, obs, h, counted, slots.masked_fill(~odd[:, None], -1), seen)
                out, last = out + stepped, last + last_stepped
        for name, layer in noted.items():
            layer.observe_segments(seen[name])
        return out, last

    def _forward_packed(
        self, weights: Sequence[SlotWeights], obs: Tensor, h: Tensor, alive: Tensor, counted: Tensor, own: Tensor, seen: Segments
    ) -> tuple[Tensor, Tensor]:
        """Whole sequences of the slots ``own [A, N]``, each as long as its unit lives: nothing is computed for the other rows."""
        a, t, n, width = obs.shape
        flat, flat_h, flat_counted = obs.reshape(a * t * n, width), h.reshape(a * n, -1), counted.reshape(-1)
        packs, back = pack_by_slot(own, alive, self.n_slots)
        cut = _cut(weights)
        outputs, last = [], torch.zeros_like(flat_h)
        for slot, sequences, counts, at in packs:
            fc1, gru_x, gru_h, fc2, fc3, fc4 = cut[min(slot, len(cut) - 1)]
            start, here = flat_h[sequences], flat_counted[at]

            def linear(name: str, x: Tensor, made: SlotWeights, slot: int = slot, here: Tensor = here) -> Tensor:
                if name in seen:
                    seen[name].append((slot, x.detach(), here))
                return F.linear(x, made.weight[0], made.bias[0])

            x = linear("fc1", flat.index_select(0, at), fc1).relu_()
            states = gru_packed(linear("gru_input", x, gru_x), start, gru_h.weight[0], gru_h.bias[0], counts)
            if "gru_recurrent" in seen:
                seen["gru_recurrent"].append((slot, states_before(states.detach(), start, counts), here))
            x = linear("fc3", linear("fc2", states, fc2).relu_(), fc3).relu_()
            outputs.append(linear("fc4", x, fc4))
            if len(counts) == t:
                last = last.index_copy(0, sequences[: counts[-1]], states[len(states) - counts[-1] :])
        if not outputs:
            return obs.new_zeros(a, t, n, self.n_outputs), last.view(a, n, -1)
        out = torch.cat(outputs).index_select(0, back).view(a, t, n, -1)
        return out * alive[..., None], last.view(a, n, -1)

    def _forward_sorted(
        self, weights: Sequence[SlotWeights], obs: Tensor, h: Tensor, counted: Tensor, own: Tensor, seen: Segments
    ) -> tuple[Tensor, Tensor]:
        """One step of rows sorted by their slot ``own [A, N]``."""
        a, _, n, width = obs.shape
        if self._sorted is None or not torch.equal(self._sorted[0], own):
            # Kept, because units are what they are for many steps.
            self._sorted = own, *sort_by_slot(own.flatten(), self.n_slots)
        _, blocks, back = self._sorted
        if not blocks:
            return obs.new_zeros(a, 1, n, self.n_outputs), torch.zeros_like(h)
        flat, flat_h, flat_own, flat_counted = obs.reshape(a * n, width), h.flatten(0, 1), own.flatten(), counted.reshape(-1)
        outputs, lasts = [], []
        for slots, at in blocks:
            height, rows = at.shape
            watch = {}
            if seen:
                # A line is filled up with a row of another slot, or with one that it already has.
                lengths = torch.stack([(flat_own == slot).sum() for slot in slots])
                valid = flat_counted[at] & (torch.arange(rows, device=obs.device) < lengths[:, None])
                watch = {name: partial(_keep, kept, slots, valid) for name, kept in seen.items()}
            x = flat.index_select(0, at.flatten()).view(height, 1, rows, width)
            out, states = _run(_of_slots(weights, slots), x, flat_h[at], watch, self.layer_norm)
            outputs.append(out.flatten(0, 2))
            lasts.append(states.flatten(0, 2))
        alive = (own >= 0)[..., None]
        out, last = (
            (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, back).unflatten(0, (a, n)) * alive
            for parts in (outputs, lasts)
        )
        return out[:, None], last

    def _forward_steps(
        self, weights: Sequence[SlotWeights], obs: Tensor, h: Tensor, counted: Tensor, slots: Tensor, seen: Segments
    ) -> tuple[Tensor, Tensor]:
        """One step after the other."""
        outputs = []
        for t in range(obs.shape[1]):
            now = slice(t, t + 1)
            out, h = self._forward_sorted(weights, obs[:, now], h, counted[:, now], slots[:, t], seen)
            outputs.append(out)
        return torch.cat(outputs, 1), h


def _cut(weights: Sequence[SlotWeights]) -> list[Weights]:
    """Each slot's weights, ``[1, O, I]``, cut up in one go: autograd then puts their gradients together once and not once per slot."""
    cut = [(w.weight.split(1), w.bias.split(1)) for w in weights]
    n_slots = max(max(len(w), len(b)) for w, b in cut)
    return [[SlotWeights(w[min(s, len(w) - 1)], b[min(s, len(b) - 1)]) for w, b in cut] for s in range(n_slots)]


def _of_slots(weights: Sequence[SlotWeights], slots: list[int]) -> Sequence[SlotWeights]:
    """Some slots' weights, ``[len(slots), O, I]``, or 1 where all slots share them."""
    return [SlotWeights(*(part if len(part) in (1, len(slots)) else part[slots] for part in (w.weight, w.bias))) for w in weights]


def _keep(segments: list[tuple[int, Tensor, Tensor]], slots: list[int], valid: Tensor, x: Tensor) -> None:
    segments.extend((slot, x[k], valid[k]) for k, slot in enumerate(slots))


def _run(
    weights: Sequence[SlotWeights], x: Tensor, h: Tensor, watch: Mapping[str, Callable[[Tensor], None]], layer_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """The layers in order, over one block of rows per slot.

    Args:
        weights: One per layer.
        x: Inputs ``[A, T, N, I]``.
        h: ``[A, N, H]``; ``[A, N, 0]`` where no layer is recurrent.
        watch: By name, who is shown a layer's inputs ``[A, T·N, I]``.
        layer_norm: Normalise what goes into each ReLU.

    Returns:
        Outputs ``[A, T, N, U]`` and all hidden states ``[A, T, N, H]``.
    """
    first, *rest = weights
    a, t, n, _ = x.shape

    def linear(name: str, x: Tensor, made: SlotWeights) -> Tensor:
        if name in watch:
            watch[name](x.detach())
        return apply_slots(x, made.weight, made.bias)

    def hidden(name: str, x: Tensor, made: SlotWeights) -> Tensor:
        x = linear(name, x, made)
        return (F.layer_norm(x, x.shape[-1:]) if layer_norm else x).relu_()

    x = hidden("fc1", x.reshape(a, t * n, -1), first)
    states = h[:, None]
    if len(rest) > 2:
        gru_x, gru_h, *rest = rest
        gates = linear("gru_input", x, gru_x).view(a, t, n, -1)
        states = run_gru(gates, h, gru_h)
        if "gru_recurrent" in watch:
            watch["gru_recurrent"](torch.cat([h[:, None], states[:, :-1]], 1).detach().reshape(a, t * n, -1))
        x = states.reshape(a, t * n, -1)
    for k, made in enumerate(rest[:-1], 2):
        x = hidden(f"fc{k}", x, made)
    return linear(f"fc{len(rest) + 1}", x, rest[-1]).view(a, t, n, -1), states


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
