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

from collections.abc import Sequence
from itertools import accumulate

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


def _tanh_(x: Tensor) -> Tensor:
    """``tanh`` in place as ``2·sigmoid(2x) - 1``, equal to rounding and less than half the time of torch's own on a CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _GruSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x: Tensor, h0: Tensor, weight_h: Tensor, bias_h: Tensor) -> Tensor:
        """Runs all steps in place; keeps the gates r and z, the recurrent candidate, n and the states for the backward pass."""
        slots, steps, rows, width = gates_x.shape
        hidden = width // 3
        gates = gates_x.new_empty(slots, steps, rows, width)
        n = gates.new_empty(slots, steps, rows, hidden)
        h = gates.new_empty(slots, steps + 1, rows, hidden)
        h[:, 0] = h0
        w_t, bias = weight_h.transpose(1, 2), bias_h[:, None]
        x_rz, x_n = gates_x[..., : 2 * hidden].unbind(1), gates_x[..., 2 * hidden :].unbind(1)
        rz, r, z, h_n = (
            gates[..., part].unbind(1) for part in (slice(2 * hidden), slice(hidden), slice(hidden, 2 * hidden), slice(2 * hidden, None))
        )
        products, candidates, states = gates.unbind(1), n.unbind(1), h.unbind(1)
        for t in range(steps):
            torch.baddbmm(bias, states[t], w_t, out=products[t])
            rz[t].add_(x_rz[t]).sigmoid_()
            _tanh_(torch.addcmul(x_n[t], r[t], h_n[t], out=candidates[t]))
            torch.lerp(candidates[t], states[t], z[t], out=states[t + 1])
        ctx.save_for_backward(weight_h, gates, n, h)
        return h[:, 1:]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Back-propagation through time."""
        weight_h, gates, n, h = ctx.saved_tensors
        slots, steps, rows, hidden = n.shape
        r, z, h_n = gates.chunk(3, -1)
        # d(gate pre-activation) / d(h') for each gate, all steps at once.
        keep = 1 - z
        to_n = torch.addcmul(keep, keep, n * n, value=-1)
        to_z = (h[:, :-1] - n).mul_(z).mul_(keep)
        to_r = (to_n * h_n).mul_(r).mul_(1 - r)
        grad_h, grad_x = torch.empty_like(gates), torch.empty_like(gates)
        h_r, h_z, h_c = (part.unbind(1) for part in grad_h.chunk(3, -1))
        x_n = grad_x[..., 2 * hidden :].unbind(1)
        per_step = zip(*(part.unbind(1) for part in (grad, to_r, to_z, to_n, r, z, grad_h)), h_r, h_z, h_c, x_n, strict=True)
        flow = torch.zeros_like(h[:, 0])
        for grad_t, to_r_t, to_z_t, to_n_t, r_t, z_t, grad_h_t, out_r, out_z, out_c, out_n in reversed(list(per_step)):
            flow = flow + grad_t
            torch.mul(flow, to_r_t, out=out_r)
            torch.mul(flow, to_z_t, out=out_z)
            torch.mul(flow, to_n_t, out=out_n)
            torch.mul(out_n, r_t, out=out_c)
            flow = torch.baddbmm(flow.mul_(z_t), grad_h_t, weight_h)
        grad_x[..., : 2 * hidden] = grad_h[..., : 2 * hidden]
        by_row = grad_h.view(slots, steps * rows, 3 * hidden)
        grad_weight = torch.bmm(by_row.transpose(1, 2), h[:, :-1].reshape(slots, steps * rows, hidden))
        return grad_x, flow, grad_weight, by_row.sum(1)


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
    return _GruSequence.apply(gates_x, h0, weight_h, bias_h)


class _GruPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x: Tensor, h0: Tensor, weight_h: Tensor, bias_h: Tensor, counts: Sequence[int]) -> Tensor:
        """As :class:`_GruSequence`, on rows that get fewer from step to step."""
        hidden = gates_x.shape[1] // 3
        gates, n, h = torch.empty_like(gates_x), gates_x.new_empty(len(gates_x), hidden), gates_x.new_empty(len(gates_x), hidden)
        w_t, before, start = weight_h.t(), h0, 0
        for count in counts:
            now = slice(start, start + count)
            product, state = gates[now], before[:count]
            torch.addmm(bias_h, state, w_t, out=product)
            product[:, : 2 * hidden].add_(gates_x[now, : 2 * hidden]).sigmoid_()
            r, z, h_n = product.chunk(3, 1)
            candidate = _tanh_(torch.addcmul(gates_x[now, 2 * hidden :], r, h_n, out=n[now]))
            before = torch.lerp(candidate, state, z, out=h[now])
            start += count
        ctx.save_for_backward(weight_h, gates, n, h, h0)
        ctx.counts = counts
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Back-propagation through time."""
        weight_h, gates, n, h, h0 = ctx.saved_tensors
        counts, hidden = ctx.counts, n.shape[1]
        starts, before = [0, *accumulate(counts)], states_before(h, h0, counts)
        r, z, h_n = gates.chunk(3, 1)
        keep = 1 - z
        to_n = torch.addcmul(keep, keep, n * n, value=-1)
        to_z = (before - n).mul_(z).mul_(keep)
        to_r = (to_n * h_n).mul_(r).mul_(1 - r)
        grad_h, grad_x = torch.empty_like(gates), torch.empty_like(gates)
        flow = torch.zeros_like(h0)
        for start, count in reversed(list(zip(starts, counts, strict=False))):
            now = slice(start, start + count)
            mine = flow[:count].add_(grad[now])
            out = grad_h[now]
            out_r, out_z, out_c = out.chunk(3, 1)
            torch.mul(mine, to_r[now], out=out_r)
            torch.mul(mine, to_z[now], out=out_z)
            torch.mul(torch.mul(mine, to_n[now], out=grad_x[now, 2 * hidden :]), r[now], out=out_c)
            mine.mul_(z[now]).addmm_(out, weight_h)
        grad_x[:, : 2 * hidden] = grad_h[:, : 2 * hidden]
        return grad_x, flow, grad_h.t() @ before, grad_h.sum(0), None


def states_before(states: Tensor, h0: Tensor, counts: Sequence[int]) -> Tensor:
    """The state before each row of :func:`gru_packed`: that of the same sequence one step earlier. All ``[sum(counts), H]``."""
    starts = accumulate([0, *counts])
    return torch.cat([h0[: counts[0]], *(states[start : start + count] for start, count in zip(starts, counts[1:], strict=False))])


def gru_packed(gates_x: Tensor, h0: Tensor, weight_h: Tensor, bias_h: Tensor, counts: Sequence[int]) -> Tensor:
    """All hidden states of sequences of different lengths, the longest first, without padding.

    Args:
        gates_x: Input gates ``[sum(counts), 3H]``: the rows of step 0, then those of step 1, and so on.
        h0: First state ``[N, H]``, N as many as ``counts[0]`` or more.
        weight_h: ``[3H, H]``.
        bias_h: ``[3H]``.
        counts: How many sequences, from the first on, have each step.

    Returns:
        The state after each row ``[sum(counts), H]``.
    """
    return _GruPacked.apply(gates_x, h0, weight_h, bias_h, counts)


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
        if self.training and torch.is_grad_enabled():
            before = torch.cat([h[None], states[:-1]]).detach().reshape(steps * rows, -1)
            member = F.one_hot(slots.clamp_min(0), self.n_slots).t().bool() & (slots >= 0)
            self.recurrent._observe_rows(before, member.repeat(1, steps))
        return states, states[-1]
