"""A gated recurrent unit over slots, whole sequences at a time.

Equations (Cho et al. 2014, in the variant of ``torch.nn.GRU``, reset gate after the product), gates in the order r, z, n::

    r = sigmoid(xr + hr)     z = sigmoid(xz + hz)     n = tanh(xn + r · hn)     h' = n + z · (h - n)

where ``x* = W_x x + b_x`` and ``h* = W_h h + b_h``. The input products of all T steps are one matrix product outside; only the
recurrent product has to loop. :func:`gru_sequence` writes the backward pass by hand: everything that does not depend on
the incoming gradient is done for all steps at once, and the weight's gradient is one product at the end instead of T
small ones. :func:`gru_step` is the definition, and the oracle in the tests.

Shapes: ``A`` slots (1 where all share one weight), ``T`` steps, ``N`` rows, ``H`` hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k24.sparse.layers import MaskConfig, MaskedLinear
from k24.sparse.patterns import PatternSet
from k24.sparse.slots import by_segments


def gru_step(gates_x: Tensor, h: Tensor, weight_h: Tensor, bias_h: Tensor) -> Tensor:
    """One step.

    Args:
        gates_x: ``[A, N, 3H]``.
        h: ``[A, N, H]``.
        weight_h: ``[A, 3H, H]``.
        bias_h: ``[A, 3H]``.

    Returns:
        The next hidden state ``[A, N, H]``.
    """
    gates_h = torch.baddbmm(bias_h[:, None], h, weight_h.transpose(1, 2))
    xr, xz, xn = gates_x.chunk(3, -1)
    hr, hz, hn = gates_h.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return torch.lerp(n, h, z)


class _GruSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x: Tensor, h0: Tensor, weight_h: Tensor, bias_h: Tensor) -> Tensor:
        """Runs all steps; keeps r and z, n, the recurrent candidate and the states for the backward pass."""
        slots, steps, rows, width = gates_x.shape
        hidden = width // 3
        # Time first, so that each step's block is contiguous.
        gates = torch.empty(steps, slots, rows, 2 * hidden, dtype=gates_x.dtype, device=gates_x.device)
        candidate_h = gates.new_empty(steps, slots, rows, hidden)
        n = torch.empty_like(candidate_h)
        h = gates.new_empty(steps + 1, slots, rows, hidden)
        h[0] = h0
        w_t, bias = weight_h.transpose(1, 2), bias_h[:, None]
        for t in range(steps):
            x_t, rz = gates_x[:, t], gates[t]
            product = torch.baddbmm(bias, h[t], w_t)
            torch.add(x_t[..., : 2 * hidden], product[..., : 2 * hidden], out=rz).sigmoid_()
            candidate_h[t] = product[..., 2 * hidden :]
            torch.addcmul(x_t[..., 2 * hidden :], rz[..., :hidden], candidate_h[t], out=n[t]).tanh_()
            torch.lerp(n[t], h[t], rz[..., hidden:], out=h[t + 1])
        ctx.save_for_backward(weight_h, gates, candidate_h, n, h)
        return h[1:].transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Back-propagation through time."""
        weight_h, gates, candidate_h, n, h = ctx.saved_tensors
        steps, slots, rows, hidden = n.shape
        r, z = gates[..., :hidden], gates[..., hidden:]
        # d(gate pre-activation) / d(h') for each gate, all steps at once.
        to_n = (1 - z) * (1 - n * n)
        to_z = (h[:-1] - n) * z * (1 - z)
        to_r = to_n * candidate_h * r * (1 - r)
        grad_h = gates.new_empty(steps, slots, rows, 3 * hidden)
        grad_n = torch.empty_like(n)
        flow = torch.zeros_like(h[0])
        for t in reversed(range(steps)):
            flow = flow + grad[:, t]
            torch.mul(flow, to_r[t], out=grad_h[t, ..., :hidden])
            torch.mul(flow, to_z[t], out=grad_h[t, ..., hidden : 2 * hidden])
            torch.mul(flow, to_n[t], out=grad_n[t])
            torch.mul(grad_n[t], r[t], out=grad_h[t, ..., 2 * hidden :])
            flow = torch.baddbmm(flow * z[t], grad_h[t], weight_h)
        by_slot = grad_h.transpose(0, 1).reshape(slots, steps * rows, 3 * hidden)
        grad_weight = torch.bmm(by_slot.transpose(1, 2), h[:-1].transpose(0, 1).reshape(slots, steps * rows, hidden))
        grad_bias = by_slot.sum(1)
        grad_x = torch.cat([grad_h[..., : 2 * hidden], grad_n], -1).transpose(0, 1)
        return grad_x, flow, grad_weight, grad_bias


def gru_sequence(gates_x: Tensor, h0: Tensor, weight_h: Tensor, bias_h: Tensor) -> Tensor:
    """All hidden states of a sequence.

    Args:
        gates_x: Input gates ``[A, T, N, 3H]`` (``W_x x + b_x``).
        h0: First state ``[A, N, H]``.
        weight_h: ``[A, 3H, H]``.
        bias_h: ``[A, 3H]``.

    Returns:
        States after each step ``[A, T, N, H]``.
    """
    if gates_x.shape[1] == 1:
        return gru_step(gates_x[:, 0], h0, weight_h, bias_h)[:, None]
    return _GruSequence.apply(gates_x, h0, weight_h, bias_h)


class MaskedGRU(nn.Module):
    """A GRU with one shared pair of weights and a learned N:M mask per slot on both.

    Args:
        in_features: Inputs (I).
        hidden: Hidden units (H).
        n_slots: Agents, or unit types (A).
        pattern: N:M; overrides that of ``config`` when given.
        config: How masks are scored and chosen.

    Attributes:
        input: The map from inputs to the three gates.
        recurrent: The map from the hidden state to the three gates.
    """

    def __init__(
        self, in_features: int, hidden: int, n_slots: int, pattern: str | PatternSet | None = None, config: MaskConfig | None = None
    ) -> None:
        super().__init__()
        self.hidden, self.n_slots = hidden, n_slots
        self.input = MaskedLinear(in_features, 3 * hidden, n_slots, pattern, config=config)
        self.recurrent = MaskedLinear(hidden, 3 * hidden, n_slots, pattern, config=config)

    def resample(self, progress: float, generator: torch.Generator | None = None) -> None:
        """Draws the masks of this step; see :meth:`MaskedLinear.resample`."""
        self.input.resample(progress, generator)
        self.recurrent.resample(progress, generator)

    def freeze(self) -> None:
        """Fixes the masks for good."""
        self.input.freeze()
        self.recurrent.freeze()

    def forward(self, x: Tensor, h: Tensor | None = None, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs a sequence.

        Args:
            x: ``[A, T, N, I]``, or ``[T, N, I]`` with ``slots``.
            h: ``[A, N, H]``, or ``[N, H]`` with ``slots``; zeros when None.
            slots: int64 ``[N]``, each row's slot, the same at all T steps; -1 for a row of none.

        Returns:
            All states ``[A, T, N, H]`` (or ``[T, N, H]``) and the last one.
        """
        if slots is not None:
            return self._forward_rows(x, h, slots)
        a, t, n, width = x.shape
        h = x.new_zeros(a, n, self.hidden) if h is None else h
        gates = self.input(x.reshape(a, t * n, width)).view(a, t, n, -1)
        weight, bias = self.recurrent.materialise("train" if self.training else "deploy")[:2]
        states = gru_sequence(gates, h, weight, bias.expand(a, -1))
        if self.training and torch.is_grad_enabled():
            before = torch.cat([h[:, None], states[:, :-1]], 1).detach()
            self.recurrent.observe(before.reshape(a, t * n, self.hidden))
        return states, states[:, -1]

    def _forward_rows(self, x: Tensor, h: Tensor | None, slots: Tensor) -> tuple[Tensor, Tensor]:
        steps, rows, _ = x.shape
        h = x.new_zeros(rows, self.hidden) if h is None else h
        gates = self.input(x.reshape(steps * rows, -1), slots.repeat(steps)).view(steps, rows, -1)
        weight, bias = self.recurrent.materialise("train" if self.training else "deploy")[:2]

        def run(slot: int, block: Tensor) -> Tensor:
            x_rows, h_rows = block[:, : -self.hidden], block[:, -self.hidden :]
            if not len(block):
                return block.new_zeros(0, steps * self.hidden)
            x_rows = x_rows.view(1, len(block), steps, -1).transpose(1, 2)
            out = gru_sequence(x_rows, h_rows[None], weight[slot][None], bias)
            return out[0].transpose(0, 1).reshape(len(block), -1)

        block = torch.cat([gates.transpose(0, 1).reshape(rows, -1), h], 1)
        states = by_segments(block, slots, self.n_slots, run).view(rows, steps, self.hidden).transpose(0, 1)
        if self.training and torch.is_grad_enabled() and not self.recurrent.frozen:
            before = torch.cat([h[None], states[:-1]]).detach().reshape(steps * rows, -1)
            member = F.one_hot(slots.clamp_min(0), self.n_slots).t().bool() & (slots >= 0)
            self.recurrent._observe_rows(before, member.repeat(1, steps))
        return states, states[-1]
